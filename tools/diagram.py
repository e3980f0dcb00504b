"""The diagram of the three stages in the README: writes docs/pipeline.svg.

    python -m tools.diagram                      # or --out FILE

Each stage is a card with the same four rows: what goes in, the multimodal LLM (MLLM), what comes
out, and what it is trained by. Cards have a fill of their own and arrows are of a middle grey, so
that the picture reads on a light page and on a dark one. No dependencies.
"""

import argparse
import html
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 682, 316  # of the whole picture, pixels
CARD_WIDTH, CARD_HEIGHT, GAP = 206, 282, 31  # GAP: between cards, where the weights pass
BOX_WIDTH, BOX_HEIGHT = 182, 36
ROWS = (42, 102, 162, 234)  # top of the four rows, from the top of the card
SMALL = 11  # font size of a second line and of the legend

INK, PALE_INK = "#1f2933", "#52606d"
PAPER, EDGE, ARROW = "#ffffff", "#cbd2d9", "#829ab1"
PLAIN = "#f0f4f8"  # data: inputs and outputs
TRAINED = "#ffd8a8"
FROZEN = "#c3dafe"
GOAL = "#c6f6d5"  # what the training asks for

FONT = "font-family='Helvetica, Arial, sans-serif'"


@dataclass(frozen=True)
class Box:
    """One row of a card: one or two lines of text on a fill; `sheets` copies lie behind it."""

    fill: str
    title: str
    below: str = ""
    sheets: int = 0


@dataclass(frozen=True)
class Stage:
    title: str
    file: str
    rows: tuple[Box, Box, Box, Box]


STAGES = (
    Stage(
        "1. SFT",
        "sft.py",
        (
            Box(PLAIN, "image + question", "or image + instruction"),
            Box(TRAINED, "MLLM"),
            Box(PLAIN, "thought and answer", "or FAST tokens, no thought"),
            Box(GOAL, "cross-entropy", "on the assistant's tokens"),
        ),
    ),
    Stage(
        "2. RL (GRPO)",
        "grpo.py",
        (
            Box(PLAIN, "image + instruction"),
            Box(TRAINED, "MLLM"),
            Box(PLAIN, "thought, then FAST tokens", "G completions a prompt", sheets=2),
            Box(GOAL, "reward (r_f + r_a) / 2", "compared within the group of G"),
        ),
    ),
    Stage(
        "3. VLA",
        "vla.py",
        (
            Box(PLAIN, "image + instruction"),
            Box(FROZEN, "MLLM", "features of layer 18 of 28"),
            Box(TRAINED, "flow-matching head", "with state, noise: K actions"),
            Box(GOAL, "squared error", "of the velocity of the flow"),
        ),
    ),
)


def rectangle(x, y, width, height, fill, radius=6, edge=EDGE):
    return (
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='{radius}' "
        f"fill='{fill}' stroke='{edge}'/>"
    )


def words(x, y, text, size=13, fill=INK, anchor="middle", weight="normal"):
    return (
        f"<text x='{x}' y='{y}' {FONT} font-size='{size}' font-weight='{weight}' "
        f"fill='{fill}' text-anchor='{anchor}'>{html.escape(text)}</text>"
    )


def arrow(x1, y1, x2, y2):
    return (
        f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{ARROW}' stroke-width='2' "
        "marker-end='url(#head)'/>"
    )


def draw_box(box, x, y):
    """A box with its upper left corner at (x, y) -> SVG elements."""
    elements = []
    for sheet in range(box.sheets, 0, -1):
        shift = 4 * sheet
        elements.append(rectangle(x + shift, y + shift, BOX_WIDTH, BOX_HEIGHT, box.fill))
    elements.append(rectangle(x, y, BOX_WIDTH, BOX_HEIGHT, box.fill))
    centre = x + BOX_WIDTH / 2
    if box.below:
        elements.append(words(centre, y + 15, box.title))
        elements.append(words(centre, y + 29, box.below, SMALL, PALE_INK))
    else:
        elements.append(words(centre, y + 23, box.title))
    return elements


def draw_stage(stage, x, y):
    """A card with its upper left corner at (x, y) -> SVG elements."""
    elements = [rectangle(x, y, CARD_WIDTH, CARD_HEIGHT, PAPER, radius=9)]
    elements.append(words(x + 12, y + 20, stage.title, 15, INK, "start", "bold"))
    elements.append(words(x + CARD_WIDTH - 12, y + 20, stage.file, 12, PALE_INK, "end"))
    left = x + (CARD_WIDTH - BOX_WIDTH) / 2
    centre = x + CARD_WIDTH / 2
    for top, next_top, box in zip(ROWS, ROWS[1:], stage.rows, strict=False):
        start = y + top + BOX_HEIGHT + 4 * box.sheets + 2
        elements.append(arrow(centre, start, centre, y + next_top - 8))
    for top, box in zip(ROWS, stage.rows, strict=True):
        elements += draw_box(box, left, y + top)
    return elements


def legend(y):
    """The meaning of the fills, in one line."""
    elements, x = [], 8
    meanings = ((TRAINED, "trained"), (FROZEN, "frozen"), (GOAL, "what it is trained by"))
    for fill, meaning in meanings:
        elements.append(rectangle(x, y - 10, 14, 12, fill, radius=3))
        elements.append(words(x + 20, y, meaning, SMALL, ARROW, "start"))
        x += 50 + 6 * len(meaning)
    return elements


def diagram():
    """The whole picture as the text of an SVG file."""
    head = (
        "<defs><marker id='head' viewBox='0 0 8 8' refX='6' refY='4' markerWidth='5' "
        "markerHeight='5' orient='auto'>"
        f"<path d='M0,0 L8,4 L0,8 z' fill='{ARROW}'/></marker></defs>"
    )
    elements = [head]
    for number, stage in enumerate(STAGES):
        x = 1 + number * (CARD_WIDTH + GAP)
        elements += draw_stage(stage, x, 1)
        if number > 0:  # the weights go from one MLLM to the next
            middle = 1 + ROWS[1] + BOX_HEIGHT / 2
            elements.append(arrow(x - GAP + 3, middle, x - 6, middle))
            elements.append(words(x - GAP / 2, middle - 8, "init", SMALL, ARROW))
    elements += legend(HEIGHT - 10)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' "
        f"width='{WIDTH}' height='{HEIGHT}' role='img'>\n"
        "<title>RoboAlign: SFT, GRPO, and an action head on the frozen features</title>\n"
        + "\n".join(elements)
        + "\n</svg>\n"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.diagram", description=__doc__)
    parser.add_argument("--out", default="docs/pipeline.svg", help="file to write")
    args = parser.parse_args(argv)
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(diagram(), encoding="utf-8")
    except OSError as e:
        raise SystemExit(f"error: --out {out}: {e.strerror}; name a file to write") from e
    print(out)


if __name__ == "__main__":
    main()
