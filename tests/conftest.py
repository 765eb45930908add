from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import megatrain
from megatrain.data.build import BuildOptions, build
from tests.servers import ObjectServer

settings.register_profile("megatrain", deadline=None)  # how busy a machine is says nothing about the code
settings.load_profile("megatrain")


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of this package's own source code."""
    out = tmp_path_factory.mktemp("data") / "source"
    source = Path(megatrain.__file__).parent
    build(
        BuildOptions(inputs=(source / "base", source / "nn"), out=out, include=("*.py",), vocab_size=300, held_out=0.2)
    )
    return out


@pytest.fixture(scope="session")
def _object_store() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


@pytest.fixture
def object_store(_object_store: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """An S3 server that is well, which this process and those that it starts talk to. Take a bucket of your own."""
    for name, value in _object_store.environment.items():
        monkeypatch.setenv(name, value)
    _object_store.gets.clear()
    yield _object_store
    _object_store.fault = None
