"""Optional packages: what only one part needs, listed with pins in requirements-extras.txt."""

import importlib
from types import ModuleType


def require(install: str, *modules: str) -> list[ModuleType]:
    """Optional modules, imported now, in the order of their names.

    ValueError when one is missing: it ends in `pip install {install}`."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ModuleNotFoundError as e:
        raise ValueError(f"this needs the package {e.name}: pip install {install}") from e
