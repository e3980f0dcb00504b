"""Optional packages: what only one part needs, listed with pins in requirements-extras.txt."""

import importlib
from types import ModuleType


def require(install: str, *modules: str) -> list[ModuleType]:
    """Optional modules, imported now, in the order of their names.

    ValueError when one is missing: it ends in `pip install {install}`; or when one of them lacks
    another package, which that did not bring, as metaworld==3.1.1 does not bring packaging."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ModuleNotFoundError as e:
        missing = e.name or str(e)
        if missing.split(".")[0] not in {name.split(".")[0] for name in modules}:
            raise ValueError(
                f"this needs the package {missing} too: install it beside {install}"
            ) from e
        raise ValueError(f"this needs the package {missing}: pip install {install}") from e
