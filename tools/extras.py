"""Optional packages: what only one part needs, listed with pins in requirements-extras.txt."""

import importlib


def require(install, *modules):
    """Optional modules, imported now. ValueError naming the pip install when one is missing."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ModuleNotFoundError as e:
        raise ValueError(f"this needs the package {e.name}: pip install {install}") from e
