"""What tools/question_page.py draws, and that its page needs nothing else."""

import base64
import io
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from tools import question_page

ROOT = Path(__file__).parents[1]
GREY = (90, 90, 90)


def row(answer: str, kind: str = "", images=("grey.png",), question: str = "Where?", **more):
    messages = [
        {"role": "user", "content": "<image>" * len(images) + question},
        {"role": "assistant", "content": answer},
    ]
    return {"images": list(images), "messages": messages, "kind": kind, **more}


def write(folder: Path, rows) -> Path:
    Image.new("RGB", (64, 32), GREY).save(folder / "grey.png")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


class Page(HTMLParser):
    """The pictures and the texts of a page, by their class."""

    def __init__(self, path: Path):
        super().__init__()
        self.pictures = []
        self.texts = []
        self.tags = set()
        self.name = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.name = dict(attrs).get("class", "")
        if tag == "img":
            kind, _, data = dict(attrs)["src"].partition(",")
            assert kind == "data:image/png;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            self.pictures.append(picture.convert("RGB"))

    def handle_data(self, data):
        if data.strip() and self.name:
            self.texts.append((self.name, data.strip()))


def page_of(folder: Path, rows, *flags: str) -> Page:
    out = folder / "new/page.html"
    question_page.main(["--data", str(write(folder, rows)), "--out", str(out), *flags])
    return Page(out)


def colours(picture: Image.Image, *places) -> list[str]:
    """What stands at shares of width and height of a picture."""
    names = {ImageColor.getrgb(question_page.ANSWER): "answer", GREY: "grey"}
    names[ImageColor.getrgb(question_page.ASKED)] = "asked"
    width, height = picture.size
    return [names.get(picture.getpixel((int(x * width), int(y * height)))) for x, y in places]


def test_answers_are_drawn_on_the_frame(tmp_path):
    """A frame is 256 wide, so that 0.01 of it are 2.56 pixels: dots have a radius of 4."""
    path = "(0.10, 0.50), (0.50, 0.50), (0.90, 0.10)"
    rows = [
        row("<answer>(0.25, 0.50)</answer>", "point", box=[0.5, 0.25, 0.75, 0.75], score="point"),
        row(f"<answer>{path}</answer>", "path", score="path"),
        row(f"<answer>{path}</answer>", "points", score="point"),
        row("<answer>(17, 32), (0.5, 7)</answer>", "centimetres"),
        row("<answer>cup</answer>", "which", question="What is at (0.25, 0.50)?"),
        row("<answer>a1 d1 d4</answer>", "cells", score="path", grid=[4, 4]),  # Tabletop's way
    ]
    pictures = page_of(tmp_path, rows).pictures
    assert [picture.size for picture in pictures] == [(256, 128)] * 6
    point, path, points, centimetres, which, cells = pictures
    assert colours(point, (0.25, 0.5), (0.5, 0.5), (0.75, 0.3), (0.6, 0.5)) == [
        *["answer"] * 3,  # the dot, two sides of the box
        "grey",
    ]
    between = (0.3, 0.5)
    assert colours(path, (0.1, 0.5), between, (0.9, 0.1)) == ["answer"] * 3
    assert colours(points, (0.1, 0.5), between, (0.9, 0.1)) == ["answer", "grey", "answer"]
    assert centimetres.getcolors() == [(256 * 128, GREY)]
    assert colours(cells, (0.5, 0.125), (0.875, 0.5), (0.5, 0.5)) == ["answer", "answer", "grey"]
    ring = (0.25 + 6.5 / 256, 0.5)
    assert colours(which, ring, (0.25, 0.5)) == ["asked", "grey"]


def test_texts_are_shown_as_they_are(tmp_path):
    """Also what looks like HTML, and both turns of a row; an image asked about beside another."""
    answer = "<think>x < y & so on.</think><answer><b>B</b></answer>"
    two = row(answer, "order+think", ["grey.png", "grey.png"], "<script>alert(1)</script>")
    two["messages"] += [
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "<answer>nothing</answer>"},
    ]
    actions = row("<think>Go.</think><answer><ACTION></answer>", chunk=[[0.125, -1.0], [0, 0]])
    page = page_of(tmp_path, [two, actions])
    assert page.texts == [
        ("kind", "order+think"),
        ("question", "<script>alert(1)</script>"),
        ("thought", "x < y & so on."),
        ("answer", "<b>B</b>"),
        ("question", "And then?"),
        ("answer", "nothing"),
        ("question", "Where?"),
        ("thought", "Go."),
        ("answer", "2 actions, the first (0.12, -1)"),
    ]
    assert not page.tags & {"script", "b", "link"}
    assert [picture.width for picture in page.pictures] == [512, 256]


def test_kinds_take_turns(tmp_path):
    kinds = ["a", "a+think", "a", "b+choice", "c", "b"]
    rows = [row(f"<answer>{i}</answer>", kind) for i, kind in enumerate(kinds)]
    for total, shown in ((3, "034"), (5, "03415"), (9, "034152")):
        page = page_of(tmp_path, rows, "--rows", str(total))
        assert "".join(text for name, text in page.texts if name == "answer") == shown


def test_a_picture_without_a_browser(tmp_path):
    """Four columns of 256 and margins of 10; the same bytes each time."""
    answers = [f"<answer>(0.50, 0.50)</answer>{' word' * 40 * i}" for i in range(6)]
    data = write(tmp_path, [row(answer, str(i)) for i, answer in enumerate(answers)])
    contents = []
    for name in ("one.png", "two.png", "page.jpg"):
        question_page.main(["--data", str(data), "--out", str(tmp_path / name)])
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    page = Image.open(tmp_path / "one.png")
    assert page.width == 10 + 4 * 266 == Image.open(tmp_path / "page.jpg").width
    answer = ImageColor.getrgb(question_page.ANSWER)
    assert all(page.getpixel((10 + 266 * i + 128, 10 + 64)) == answer for i in range(4))


BAD = {
    "name it .html, .png or .jpg": ([row("a")], ["--out", "page.txt"]),
    "no such file": ([row("a")], ["--data", "nowhere.jsonl"]),
    "rows.jsonl:2: not a row": ([row("a"), {"messages": 3}], []),
    "rows.jsonl:1: ": ([row("a", images=["gone.png"])], []),
    "lies outside": ([row("a", images=["../grey.png"])], []),
    "rows.jsonl:1: cannot reshape": ([row("a", box=[1, 2])], []),
    "rows.jsonl:1: TypeError": ([row("<ACTION>", chunk=[0.5, 1.0])], []),  # was a traceback
    "rows.jsonl:1: Unknown format": ([row("<ACTION>", chunk=["x"])], []),  # named no row
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(tmp_path, message):
    rows, flags = BAD[message]
    argv = ["--data", str(write(tmp_path, rows)), "--out", str(tmp_path / "page.html"), *flags]
    with pytest.raises(SystemExit) as error:
        question_page.main(argv)
    text = str(error.value)
    assert text.startswith("error: ") and message in text and "\n" not in text
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    """It was a traceback."""
    (tmp_path / "page.html").mkdir()
    data = str(write(tmp_path, [row("a")]))
    with pytest.raises(SystemExit, match=r"error: .*directory.*page\.html"):
        question_page.main(["--data", data, "--out", str(tmp_path / "page.html")])


def test_a_page_is_utf8_in_any_locale(tmp_path):
    """It says charset=utf-8, and what its reader's locale lacks ended in a traceback."""
    data = write(tmp_path, [row("<answer>\u00e9\u4e2d</answer>")])
    out = tmp_path / "page.html"
    command = [sys.executable, "-m", "tools.question_page", "--data", str(data), "--out", str(out)]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(command, check=True, cwd=ROOT, env=plain)
    assert "\u00e9\u4e2d</p>" in out.read_text(encoding="utf-8")
