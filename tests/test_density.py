"""tools/density.py on a file that is counted by hand."""

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
