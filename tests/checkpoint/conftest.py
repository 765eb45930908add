"""A folder in memory, where fsync costs nothing; the tests that use it write thousands of small files."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def memory_path() -> Iterator[Path]:
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder)
