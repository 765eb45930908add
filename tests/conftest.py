from pathlib import Path

import pytest
from hypothesis import settings

import megatrain
from megatrain.data.build import BuildOptions, build

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
