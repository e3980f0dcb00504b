"""A page of frames with their questions, thoughts and answers: what a set of conversations holds.

    python -m tools.question_page --data data/libero_questions/conversations.jsonl --out page.html

writes one file: .html, with the frames inside, for a browser, or the same as a picture, .png or
.jpg. Points of an answer are dots on its frame, those of a path are joined, points that a question
names are rings, a row's box is a frame. Kinds take turns, so that each shows.

In the order of the file: rows, what is drawn on a frame, the page as HTML, the page as a picture.
"""

import argparse
import base64
import html
import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import grpo
import model
from benchmarks.simulate import wrap
from fast_tokenizer import count, read_image, reading

# ---- Rows ----------------------------------------------------------------------------------------


class Turn(NamedTuple):
    question: str
    thought: str  # "" when there is none
    answer: str


class Card(NamedTuple):
    """A row as it is shown."""

    kind: str
    picture: Image.Image | None  # its frames side by side; None: it has none
    turns: list[Turn]


def rows_in_turn(source: model.ConversationDataset, total: int) -> list[int]:
    """The rows to show, of each kind the first, then the second, ...; ways of asking ("+think") are
    no kinds of their own."""
    by_kind = {}
    for i in source.train:
        kind = (source.row(i).get("kind") or "").partition("+")[0]
        by_kind.setdefault(kind, []).append(i)
    chosen = []
    longest = max(len(rows) for rows in by_kind.values())
    for turn in range(min(longest, total)):
        chosen += [rows[turn] for rows in by_kind.values() if turn < len(rows)]
    return chosen[:total]


def read_cards(path: str | Path, total: int, outside_images: bool = False) -> list[Card]:
    """Cards of a conversations file. ValueError naming the row; FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; name conversations, .jsonl")
    source = model.ConversationDataset(path, None, 0, outside_images)
    cards = []
    for i in rows_in_turn(source, total):
        row = source.row(i)
        sample_id = source.sample_id(i)
        images = []
        for name in row["images"]:
            file = source.image_path(name, sample_id)
            images.append(read_image(file, f"{sample_id}: {file}"))
        with reading(sample_id):
            turns = read_turns(row)
            picture = draw_row(images, row, turns[0]) if images else None
        cards.append(Card(row.get("kind") or "", picture, turns))
    return cards


def read_turns(row: dict) -> list[Turn]:
    turns = []
    question = ""
    for message in row["messages"]:
        text = message["content"].replace("<image>", "").strip()
        if message["role"] == "user":
            question = text
        elif message["role"] == "assistant":
            thought = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
            answer = model.answer_text(text)
            if answer == "<ACTION>" and row.get("chunk"):
                first = ", ".join(f"{value:.2g}" for value in row["chunk"][0])
                answer = f"{len(row['chunk'])} actions, the first ({first})"
            turns.append(Turn(question, thought[1].strip() if thought else "", answer))
    return turns


# ---- What is drawn on a frame --------------------------------------------------------------------

SIDE = 256  # width of a frame, pixels
ANSWER, ASKED, EDGE = "#ff2d55", "#ffd60a", "#000000"


def points_of(text: str, row: dict) -> list[tuple[float, float]]:
    """The points (x, y) of a text, as they are scored, that lie in the image."""
    points = grpo.points_in(text, grpo.RightAnswer("point", text, row, Path()))  # (N, 2)
    is_inside = ((points >= 0) & (points <= 1)).all(1)
    return [tuple(point) for point in points[is_inside].tolist()]


def draw_row(images: list[np.ndarray], row: dict, turn: Turn) -> Image.Image:
    """Frames (H, W, 3) side by side, SIDE wide each; what question and answer point to is drawn on
    the first."""
    frames = []
    for image in images:
        height = max(1, round(SIDE * image.shape[0] / image.shape[1]))
        frame = Image.fromarray(image).resize((SIDE, height), Image.Resampling.LANCZOS)
        frames.append(frame)
    draw = ImageDraw.Draw(frames[0])
    width, height = frames[0].size
    if "box" in row:
        corners = np.reshape(row["box"], (2, 2)) * (width, height)
        draw.rectangle([tuple(corner) for corner in corners.tolist()], outline=ANSWER)
    asked = [(width * x, height * y) for x, y in points_of(turn.question, {})]
    answered = [(width * x, height * y) for x, y in points_of(turn.answer, row)]
    if row.get("score") == "path" and len(answered) > 1:
        draw.line(answered, fill=EDGE, width=5, joint="curve")
        draw.line(answered, fill=ANSWER, width=3, joint="curve")
    for center in asked:
        draw.circle(center, 8, outline=EDGE, width=4)
        draw.circle(center, 7, outline=ASKED, width=2)
    for center in answered:
        draw.circle(center, 4, fill=ANSWER, outline=EDGE)
    picture = Image.new("RGB", (SIDE * len(frames), max(frame.height for frame in frames)), "white")
    for i, frame in enumerate(frames):
        picture.paste(frame, (SIDE * i, 0))
    return picture


# ---- The page as HTML ----------------------------------------------------------------------------

STYLE = """
body { font: 14px sans-serif; margin: 1em; background: #fff; color: #1f2933 }
main { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start }
article { width: 256px; border: 1px solid #cbd2d9; padding: 8px }
article.wide { width: 512px }
img { max-width: 100% }
.kind { color: #829ab1; font-size: 12px }
.thought { color: #52606d; font-style: italic }
.answer { font-weight: bold }
p { margin: 4px 0; white-space: pre-wrap; overflow-wrap: break-word }
"""


def html_page(cards: list[Card], title: str) -> str:
    """One page with everything inside."""
    articles = []
    for card in cards:
        is_wide = card.picture is not None and card.picture.width > SIDE
        parts = [f'<article class="{"wide" if is_wide else ""}">']
        if card.picture is not None:
            png = io.BytesIO()
            card.picture.save(png, "PNG")
            data = base64.b64encode(png.getvalue()).decode()
            parts.append(f'<img alt="" src="data:image/png;base64,{data}">')
        if card.kind:
            parts.append(paragraph("kind", card.kind))
        for turn in card.turns:
            parts.append(paragraph("question", turn.question))
            if turn.thought:
                parts.append(paragraph("thought", turn.thought))
            parts.append(paragraph("answer", turn.answer))
        articles.append("\n".join([*parts, "</article>"]))
    title = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1><main>\n"
        + "\n".join(articles)
        + "\n</main></body></html>\n"
    )


def paragraph(name: str, text: str) -> str:
    return f'<p class="{name}">{html.escape(text)}</p>'


# ---- The page as a picture -----------------------------------------------------------------------

COLUMNS, MARGIN, LINE = 4, 10, 16  # LINE: height of a line of text, pixels
COLOURS = {"kind": "#829ab1", "question": "#1f2933", "thought": "#52606d", "answer": "#c2185b"}


def draw_card(card: Card, font) -> Image.Image:
    """A card SIDE wide; several frames are made smaller to fit."""
    picture = card.picture
    if picture is not None and picture.width > SIDE:
        picture = picture.resize((SIDE, round(picture.height * SIDE / picture.width)))
    lines = []  # (text, colour)
    texts = [("kind", card.kind)]
    for turn in card.turns:
        texts += zip(("question", "thought", "answer"), turn, strict=True)
    for name, text in texts:
        for text_line in text.splitlines():
            shown_lines = wrap(text_line, font, SIDE) or [""]
            lines += [(line, COLOURS[name]) for line in shown_lines]
    top = picture.height + 4 if picture is not None else 0
    drawn = Image.new("RGB", (SIDE, top + LINE * len(lines)), "white")
    if picture is not None:
        drawn.paste(picture)
    draw = ImageDraw.Draw(drawn)
    for i, (line, colour) in enumerate(lines):
        draw.text((0, top + LINE * i), line, colour, font)
    return drawn


def picture_page(cards: list[Card]) -> Image.Image:
    """The cards in COLUMNS columns, each below the one that ends first."""
    font = ImageFont.load_default(12)
    bottoms = [MARGIN] * min(COLUMNS, len(cards))
    slots = []  # (left, top, card)
    for card in cards:
        drawn = draw_card(card, font)
        column = int(np.argmin(bottoms))
        slots.append((MARGIN + column * (SIDE + MARGIN), bottoms[column], drawn))
        bottoms[column] += drawn.height + 2 * MARGIN
    width = MARGIN + len(bottoms) * (SIDE + MARGIN)
    page = Image.new("RGB", (width, max(bottoms)), "white")
    for left, top, drawn in slots:
        page.paste(drawn, (left, top))
    return page


# ---- Command -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.question_page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", required=True, help="conversations, .jsonl")
    add("--out", required=True, help="file to write: .html, .png or .jpg")
    add("--rows", type=count, default=24, help="rows to show, kinds in turn")
    add("--outside-images", action="store_true", help="images may lie outside the file's folder")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix not in (".html", ".png", ".jpg"):
        raise SystemExit(f"error: --out {out}: no page; name it .html, .png or .jpg")
    try:
        cards = read_cards(args.data, args.rows, args.outside_images)
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".html":
            out.write_text(html_page(cards, str(args.data)), encoding="utf-8")
        else:
            picture_page(cards).save(out, quality=85)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    print(f"{out}: {len(cards)} rows, {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
