"""docs/walkthrough.ipynb: what is committed can be read as it is, and it runs."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs/walkthrough.ipynb"
OWN = ["benchmarks", "fast_tokenizer", "grpo", "model", "vla"]  # modules that it shows


def cells():
    """The cells, each with its "source" and the text of its outputs as one string."""
    read = json.loads(NOTEBOOK.read_text())["cells"]
    for cell in read:
        cell["source"] = "".join(cell["source"])
        cell["text"] = "".join("".join(part.get("text", "")) for part in cell.get("outputs", []))
    return read


def code():
    """Python of all code cells, without the lines that run commands."""
    sources = [cell["source"] for cell in cells() if cell["cell_type"] == "code"]
    return re.sub(r"^!(.*\\\n)*.*$", "", "\n".join(sources), flags=re.MULTILINE)


def test_the_committed_page_is_whole_and_small():
    """Each code cell was run, in order, without an error and without a path of somebody's machine;
    GitHub shows no notebook of many megabytes."""
    assert NOTEBOOK.stat().st_size < 2e6
    code_cells = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code_cells] == list(range(1, len(code_cells) + 1))
    for cell in code_cells:
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert "error" not in kinds
        assert "error:" not in cell["text"] and "Traceback" not in cell["text"]
        for output in cell["outputs"]:
            assert not re.search(r"/(root|home|work|tmp|Users)/", json.dumps(output))


def test_each_figure_is_followed_by_what_to_see():
    read = cells()
    figures = 0
    for cell, after in zip(read, [*read[1:], None], strict=True):
        pictures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if pictures:
            figures += 1
            assert after["cell_type"] == "markdown", cell["source"]
            says = after["source"].partition("**What to see:** ")[2]
            assert len(says.split()) > 10, cell["source"]
    assert figures == 7
    gifs = [o for cell in read for o in cell.get("outputs", []) if "image/gif" in json.dumps(o)]
    assert len(gifs) == 2, "one of each policy"


def test_it_shows_the_projects_own_functions_and_repeats_none():
    tree = ast.parse(code())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert set(OWN) <= imported
    lines = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")]:
        lines |= {line.strip() for line in path.read_text().splitlines()}
    shown = {line.strip() for line in code().splitlines()}
    repeated = [line for line in shown & lines if len(line) > 40 and "import" not in line]
    assert not repeated


SMALL = {"DEMONSTRATIONS": 3, "SFT_STEPS": 2, "HEAD_STEPS": 2, "TRIALS": 1, "TASKS": [5]}


def test_it_runs(tmp_path):
    """All cells from the first to the last, with data and steps that teach nothing: a minute. Among
    the slow tests, which CI leaves out, it did not tell that grpo.prompt_rows() had changed."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    for name in ("ipykernel", "matplotlib"):
        pytest.importorskip(name)
    page = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in page.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in {**SMALL, "FOLDER": str(tmp_path / "run")}.items():
        line = rf"^{name} = [^#\n]*"
        parameters.source, found = re.subn(
            line, f"{name} = {value!r}  ", parameters.source, flags=re.MULTILINE
        )
        assert found == 1, name
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}  # where Jupyter starts it
    nbclient.NotebookClient(page, timeout=900, kernel_name="python3", resources=folder).execute()
    text = "".join(
        "".join(o.get("text", "")) for cell in page.cells for o in cell.get("outputs", [])
    )
    assert "1 of 1" in text or "0 of 1" in text, "the last part was reached"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "episodes",
        "fast",
        "gif",
        "rows",
        "sft",
        "vla",
    ]
