"""tools/diagram.py draws what is committed."""

from pathlib import Path

import pytest

from tools import diagram

ROOT = Path(__file__).parents[1]


def test_the_committed_picture_is_what_it_draws(tmp_path, capsys):
    """In a new folder too, which was a traceback."""
    out = tmp_path / "new/pipeline.svg"
    diagram.main(["--out", str(out)])
    assert out.read_bytes() == (ROOT / "docs/pipeline.svg").read_bytes()
    assert capsys.readouterr().out == f"{out}\n"
    with pytest.raises(SystemExit, match="error: --out .*: Is a directory; name a file"):
        diagram.main(["--out", str(tmp_path)])
