"""tools/density.py on a file that is counted by hand."""

import pytest

from tools import density

SOURCE = '''"""Three lines of code; this is none."""

# nor is this
first, second = 1, [letter for letter in "ab"]
if (third := first) and second:
    third += 1
'''


def test_density_by_hand():
    d = density.measure(SOURCE)
    assert d.code_lines == 3 and d.walrus == 1
    # first , second = 1 , [ letter for letter in "ab" ] / if ( third := first ) and second : / ...
    assert d.tokens_a_line == (13 + 9 + 3) / 3
    assert d.tuple_assignments == 50  # of `first, second = ...` and `third += 1`
    assert d.comprehensions == 100 / 3
    assert d.name_length == (5 + 6 + 6 + 5 + 5) / 5  # first, second, letter, third, third


def test_a_file_without_assignments_or_code_has_a_row(tmp_path, capsys):
    """A file that only returns, as tools/extras.py does, divided by its 0 assignments."""
    assert density.measure("def f():\n    return 1\n").tuple_assignments == 0
    assert density.measure('"""Words."""\n') == (0, 0, 0, 0, 0, 0)
    (tmp_path / "broken.py").write_text("def f(:\n")
    for name in ("broken.py", "none.py"):
        with pytest.raises(SystemExit, match=rf"error: .*{name}: no Python that can be read"):
            density.main([str(tmp_path / name)])
