"""Folders with backbones of random weights, each written once a test run."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from tools import backbones

FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


@functools.cache
def folder(size: str) -> str:
    """-> path of an untrained backbone of a size of tools/backbones.py, for --init."""
    backbones.write(size, FOLDER / size)
    return str(FOLDER / size)
