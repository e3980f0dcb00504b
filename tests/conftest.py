import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))


def pytest_configure(config):
    config.addinivalue_line("markers", "sim: runs a real simulator, where one is installed")
