import pytest


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="minutes; run with -m slow"))
