"""How dense Python files are to read: a thermometer, not a target.

    python -m tools.density *.py

A row for each file: lines of code (without comments, docstrings, blank lines); Python's tokens on
such a line; assignments of the form a, b = x, y in 100 assignments; comprehensions in 100 lines of
code; walrus operators; mean length of an assigned name. In 19 files of 14 admired repositories the
medians are 8.0 tokens, 1%, 0.7 comprehensions, no walrus, 8.0 letters.
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Density(NamedTuple):
    code_lines: int
    tokens_a_line: float
    tuple_assignments: float  # in 100 assignments
    comprehensions: float  # in 100 lines of code
    walrus: int
    name_length: float


def docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of the lines on which docstrings stand."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                lines |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def measure(source: str) -> Density:
    """Density of a file; shares of what it does not have are 0. SyntaxError."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    in_docstring = docstring_lines(tree)
    token_lines = []  # the line of each token that counts
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT and token.start[0] not in in_docstring:
            token_lines.append(token.start[0])
    code_lines = len(set(token_lines))
    assignments = [n for n in nodes if isinstance(n, (ast.Assign, ast.AnnAssign, ast.AugAssign))]
    tuple_assignments = 0
    for node in assignments:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            tuple_assignments += isinstance(node.value, ast.Tuple)
    comprehensions = sum(isinstance(node, COMPREHENSIONS) for node in nodes)
    names = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return Density(
        code_lines,
        tokens_a_line=len(token_lines) / max(code_lines, 1),
        tuple_assignments=100 * tuple_assignments / max(len(assignments), 1),
        comprehensions=100 * comprehensions / max(code_lines, 1),
        walrus=sum(isinstance(node, ast.NamedExpr) for node in nodes),
        name_length=sum(len(name) for name in names) / max(len(names), 1),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.density",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args(argv)
    print(f"{'file':20s}  lines  tokens  tuples  compr.  walrus  names")
    for path in args.files:
        try:
            d = measure(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError) as e:
            raise SystemExit(f"error: {path}: no Python that can be read ({e})") from e
        print(
            f"{path.name:20s} {d.code_lines:6d} {d.tokens_a_line:7.1f} {d.tuple_assignments:6.1f}% "
            f"{d.comprehensions:7.1f} {d.walrus:7d} {d.name_length:6.1f}"
        )


if __name__ == "__main__":
    main()
