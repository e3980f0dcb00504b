"""Hand-worked scores, published row shapes through the documented lines, `evaluate.py vqa`."""

import argparse
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import grpo
import model
import sft
from benchmarks import questions, tabletop_data

ROOT = Path(__file__).parent.parent

CASES = {  # score: [(answer, the row's own, more of the row, what it is worth)]
    "exact": [
        ("Red cube.", "red cube", {}, 1),
        ("red", "red cube", {}, 0),
        ("Yes, it would fit.", "yes", {}, 1),
        ("yesterday", "yes", {}, 0),
        ("No", "yes", {}, 0),
        # dressed up: each of these got 0, though a person would take it
        ("**Yes**", "yes", {}, 1),
        ("*Yes*, it would.", "yes", {}, 1),
        ('"Yes"', "Yes.", {}, 1),
        ("Answer: no", "no", {}, 1),
        (r"\boxed{\text{Yes}}", "yes", {}, 1),
        ("Yes or no", "yes", {}, 0),
        ("no/yes", "no", {}, 0),
        ("not sure", "no", {}, 0),
        ("**Red cube**", "red cube", {}, 1),
        ("The answer is red cube.", "red cube", {}, 1),
        ("the final answer: `red cube`", "red cube", {}, 1),
        ("The answer is a red cube", "red cube", {}, 0),
        ("1,024", "1024", {}, 1),
        ("1 024", "1024", {}, 1),
        ("12.0", "12", {}, 1),
        ("$12$", "12", {}, 1),
        (r"\(12\)", "12", {}, 1),
        ("12 cubes", "12", {}, 0),
        ("1,2", "12", {}, 0),
        ("", "red cube", {}, 0),
        # found by trying others: the point of ".5" was taken for a full stop
        (".5", "5", {}, 0),
        (".5", "0.5", {}, 1),
        ("**.5**.", "0.5", {}, 1),
        ("... 5", "5", {}, 1),
        ("Yes and no.", "yes", {}, 0),
        ("\u662f\u3002", "\u662f", {}, 1),
    ],
    "choice": [
        ("B", "(B)", {}, 1),
        ("(B)", "B", {}, 1),
        ("b", "B", {}, 1),
        ("B. the ball", "B", {}, 1),
        ("B: the ball", "B", {}, 1),
        ("The answer is B", "B", {}, 1),
        ("Option B", "B", {}, 1),
        ("A red cube, so (B)", "B", {}, 1),
        ("A red cube", "A", {}, 0),
        ("(A) or (B)", "B", {}, 0),
        ("C", "B", {}, 0),
        ("", "B", {}, 0),
        ("The answer is a ball", "A", {}, 0),
        # dressed up
        ("**A**", "A", {}, 1),
        ("**A.** the cube", "A", {}, 1),
        (r"\boxed{B}", "B", {}, 1),
        (r"So we get $\boxed{\text{B}}$.", "B", {}, 1),
        (r"(A) is too far, so \boxed{B}", "B", {}, 1),
        ("$B$", "B", {}, 1),
        ("`b`", "B", {}, 1),
        ("A)", "A", {}, 1),
        ("[A]", "A", {}, 1),
        ("A.", "A", {}, 1),
        ("Answer: A", "A", {}, 1),
        ("**Answer:** (a)", "A", {}, 1),
        ("answer: a", "A", {}, 1),
        ("A, the red cube", "A", {}, 1),
        ("A - the red cube", "A", {}, 1),
        ("A\nIt is nearer.", "A", {}, 1),
        ("\uff21", "A", {}, 1),
        ("A, B", "A", {}, 0),
        ("A or B", "B", {}, 0),
        ("**A** and **B**", "A", {}, 0),
        ("the cube", "A", {}, 0),
        # found by trying others: small letters counted in "(b)", but not in "(b)."
        ("(b).", "B", {}, 1),
        ("(b) the ball", "B", {}, 1),
        ("b) the ball", "B", {}, 1),
        ("Option b", "B", {}, 1),
        ("\u2018B\u2019", "B", {}, 1),
        ("B\u3002", "B", {}, 1),
        ("C is correct", "C", {}, 1),
        ("(a) or (b)", "A", {}, 0),
        ("a or b", "A", {}, 0),
        ("e.g. the ball", "E", {}, 0),
        ("a ball", "A", {}, 0),
        ("not A", "A", {}, 0),  # got 1
        ("It is not (a), but (b).", "B", {}, 1),
        ("A, not B", "A", {}, 1),
    ],
    "number": [
        ("3", "3", {}, 1),
        ("about 3.0 cubes", "3", {}, 1),
        ("4", "3", {}, 0),
        ("-0.52", "-0.5", {"tolerance": 0.02}, 1),
        ("-0.53", "-0.5", {"tolerance": 0.02}, 0),
        ("[0.1, .2, -1]", "0.1 0.2 -1", {}, 1),
        ("0.1 0.2", "0.1 0.2 -1", {}, 0),
        ("three", "3", {}, 0),  # numbers in words are none
        # thousands, and what LaTeX and Markdown put around a number
        ("1,024", "1024", {}, 1),
        ("1024", "1,024", {}, 1),
        ("about **1,234,567**", "1234567", {}, 1),
        ("-1,024.5", "-1024.5", {}, 1),
        ("1 024", "1024", {}, 1),
        ("1\u202f024", "1024", {}, 1),
        ("1'024", "1024", {}, 1),
        (r"1{,}024", "1024", {}, 1),
        ("$12$", "12", {}, 1),
        ("12.0", "12", {}, 1),
        (r"3 + 4 = \boxed{7}", "7", {}, 1),
        ("\u22120.5", "-0.5", {}, 1),
        ("1.5e-3", "0.0015", {}, 1),
        ("5 m\u00b2", "5", {}, 1),
        ("10,200", "10200", {}, 1),
        ("[10,200]", "[10, 200]", {}, 1),  # who asked for two numbers means two
        ("100 200 300", "100 200 300", {}, 1),
        ("1,024", "[1, 24]", {}, 0),
        ("1,024", "1,24", {}, 0),
        ("1,02", "102", {}, 0),
        ("1,0245", "10245", {}, 0),
        ("1.024", "1024", {}, 0),
        ("1,024 or 1,025", "1024", {}, 0),
        ("3 + 4 = 7", "7", {}, 0),
        ("twelve", "12", {}, 0),
        # found by trying others: each of these was read as the number before the sign
        ("1\u00bd", "1", {}, 0),
        ("10\u00b3", "10", {}, 0),
        ("-3", "3", {}, 0),
        ("3.0e2", "300", {}, 1),
        ("50%", "50", {}, 1),
    ],
    "point": [
        ("[(0.3, 0.4)]", "", {"box": [0.2, 0.3, 0.4, 0.5]}, 1),
        ("(0.3, 0.4), (0.9, 0.4), [.3,.6], (0.2, 0.3)", "", {"box": [0.2, 0.3, 0.4, 0.5]}, 0.5),
        ("(3, 4)", "", {"box": [0.2, 0.3, 0.4, 0.5]}, 0),
        ("on the left", "", {"box": [0.2, 0.3, 0.4, 0.5]}, 0),
        ("\uff080.3\uff0c0.4\uff09", "", {"box": [0.2, 0.3, 0.4, 0.5]}, 1),  # full-width
        # the mask is white in rows 10..19 of 40 and columns 40..59 of 80
        ("(0.5, 0.25)", "", {"mask": "m.png"}, 1),
        ("(0.5, 0.49)", "", {"mask": "m.png"}, 1),
        ("(0.5, 0.5)", "", {"mask": "m.png"}, 0),
        ("(0.49, 0.3)", "", {"mask": "m.png"}, 0),
        ("(-0.5, 0.3), (1.0, 1.0), (0.7, 0.4)", "", {"mask": "m.png"}, 1 / 3),
        # one that is white up to the image's right end, and no further
        ("(0.99, 0.5)", "", {"mask": "right.png"}, 1),
        ("(1.0, 0.5), (1.2, 0.5), (0.9, -0.1), (0.9, 1.1)", "", {"mask": "right.png"}, 0),
    ],
}


@pytest.fixture
def folder(tmp_path):
    mask = np.zeros((40, 80), np.uint8)
    mask[10:20, 40:60] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    right = np.zeros((40, 80), np.uint8)
    right[:, 60:] = 255
    Image.fromarray(right).save(tmp_path / "right.png")
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "i.png")
    return tmp_path


@pytest.mark.parametrize("score", CASES)
def test_scores(score, folder):
    for answer, right, row, value in CASES[score]:
        assert worth(score, answer, right, row, folder) == pytest.approx(value), answer


def worth(score, answer, right, row, folder="", unit=1, graded=False):
    right_answer = grpo.RightAnswer(score, right, row, model.Path(folder), unit)
    return grpo.answer_score(answer, right_answer, graded)


E = 1 / np.e  # what an answer is worth that is off by its scale
GRADED = {  # score: [(answer, the row's own, more of the row, what it is worth graded, and not)]
    "number": [
        ("10 8 0", "10 4 0", {"tolerance": 2}, (1 + E + 1) / 3, 0),
        ("10 6 0", "10 4 0", {"tolerance": 2}, 1, 1),
        ("4", "3", {}, E, 0),  # no tolerance: one more or less
        ("1,024", "1024", {}, 1, 1),
        ("3 4", "3", {}, 0, 0),
        ("many", "3", {}, 0, 0),
        ("1e999", "3", {}, 0, 0),
    ],
    "items": [
        (
            "red cube d5, plate 10 9, gripper a1",
            "plate 10 4, red cube d5",
            {},
            (1 + (1 + E**5) / 2) / 3,
            1 / 3,
        ),
        ("plate 10 6", "plate 10 3", {"tolerance": 2}, (1 + E**0.5) / 2, 0),
        ("Right 11, down 8, open.", "right 11, down 8, open", {"tolerance": 1}, 1, 1),
        ("right 11, down 8", "right 11, down 8, open", {}, 2 / 3, 2 / 3),
        ("left 11, open", "right 11, open", {"tolerance": 1}, 0.5, 0.5),  # the wrong way
        ("cup 1 2, cup 7 8", "cup 7 8, cup 1 2", {}, 1, 1),  # two of a name: each once
        ("cup 1 2, cup 1 2", "cup 7 8, cup 1 2", {}, (E**6 + 1) / 2, 0.5),
        ("cup 1 2, cup 1 2", "cup 1 2", {}, 0.5, 0.5),  # saying it twice
        ("red cube d4", "red cube d5", {}, 0, 0),  # the name of a cell is no number
        ("", "open", {}, 0, 0),
    ],
    "point": [
        ("(0.5, 0.5)", "", {"box": [0.4, 0.4, 0.6, 0.6]}, 1, 1),
        ("(0.7, 0.5)", "", {"box": [0.4, 0.4, 0.6, 0.6]}, E, 0),
        ("(0.63, 0.64), (0.5, 0.5)", "", {"box": [0.4, 0.4, 0.6, 0.6]}, (E**0.5 + 1) / 2, 0.5),
        ("nowhere", "", {"box": [0.4, 0.4, 0.6, 0.6]}, 0, 0),
        ("(1e999, 0.5)", "", {"box": [0.4, 0.4, 0.6, 0.6]}, 0, 0),
        # the mask is white in rows 10..19 of 40 and columns 40..59 of 80: the last pixel's middle
        # is (59.5 / 80, 19.5 / 40)
        ("(0.74375, 0.5875)", "", {"mask": "m.png"}, E, 0),
        ("(0.7, 0.4)", "", {"mask": "m.png"}, 1, 1),
    ],
    "path": [
        ("(0.1, 0.1), (0.5, 0.1)", "(0.1, 0.1), (0.2, 0.1), (0.5, 0.1)", {}, 1, 1),  # by its length
        ("(0.1, 0.2), (0.5, 0.2)", "(0.1, 0.1), (0.5, 0.1)", {}, E, E),
        ("(0.3, 0.3)", "(0.3, 0.3), (0.3, 0.3)", {}, 1, 1),  # a rest
        ("(0, 0), (0.4, 0)", "(0, 0), (0.8, 0)", {}, E**2, E**2),  # half as far: 0 to 0.4 off
        ("the way", "(0.1, 0.1), (0.5, 0.1)", {}, 0, 0),
        ("a1 c1", "a1 b1 c1", {"grid": [8, 8]}, 1, 1),
        ("a2 c2", "a1 c1", {"grid": [10, 10]}, E, E),  # a row of cells is 0.1
    ],
}


@pytest.mark.parametrize("score", GRADED)
def test_graded_scores_by_hand(score, folder):
    for answer, right, row, graded, plain in GRADED[score]:
        assert worth(score, answer, right, row, folder, graded=True) == pytest.approx(graded), (
            answer
        )
        assert worth(score, answer, right, row, folder) == pytest.approx(plain), answer


def test_a_path_back_and_forth_is_not_the_way_there():
    """Two paths over the same points in another order are compared along their length."""
    assert worth("path", "(0.5, 0), (0, 0)", "(0, 0), (0.5, 0)", {}) < 0.1


def test_each_row_of_tabletop_is_scored_as_it_says(tmp_path):
    """All kinds of questions, each right by its own answer and not by another row's."""
    args = argparse.Namespace(out=tmp_path, seed=5, size=16, tilt=0.0, single=True)
    lines = "".join(tabletop_data.make_conversation(args, number) for number in range(120))
    (tmp_path / "d.jsonl").write_text(lines)
    source = model.ConversationDataset(tmp_path / "d.jsonl", None, 0)
    seen = {}
    for i in source.train:
        right = grpo.right_answer(source, i)
        grpo.check_question(source, i, right)
        assert grpo.answer_score(right.text, right, graded=True) == 1
        seen.setdefault(grpo.base_kind(source.row(i)), []).append(right)
    assert seen.keys() == (tabletop_data.SCENE | tabletop_data.TASK).keys()
    for rights in seen.values():
        other = next(right for right in rights if right.text != rights[0].text)
        assert grpo.answer_score(other.text, rights[0]) < 1
    args.single = False
    row = json.loads(tabletop_data.make_conversation(args, 1))
    first = json.loads(lines.splitlines()[1])  # 0 is a single question
    assert row["messages"][0] == first["messages"][0] and len(row["messages"]) == 10
    assert row["score"] == first["score"] and "kind" not in row


def test_points_in_thousandths_and_in_pixels(folder):
    row = {"mask": "m.png", "images": ["i.png"]}
    thousandths = '{"point_2d": [500, 250]}'
    assert worth("point", thousandths, "", row, folder, 1000) == 1
    assert worth("point", "(40, 10), (40, 20)", "", row, folder, 0) == 0.5


def turned(folder):
    """A phone's photo: 40 wide and 80 high to whoever looks at it, stored lying."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = folder / "phone.jpg"
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(path, exif=exif)
    return path.name


def test_points_in_pixels_of_a_turned_photo(folder):
    """The model sees the photo upright, 80 high; points were divided by the stored 80 x 40, so that
    (20, 70) lay below the picture. The mask lay sideways just so."""
    row = {"images": [turned(folder)], "box": [0.4, 0.8, 0.6, 0.95]}
    assert worth("point", "(20, 70)", "", row, folder, 0) == 1
    mask = np.zeros((40, 80), np.uint8)
    mask[10:20, 60:] = 255  # upright: its rows 60 to 79, columns 20 to 29
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(mask).save(folder / "phone_mask.jpg", exif=exif, quality=100)
    row["mask"] = "phone_mask.jpg"
    del row["box"]
    assert worth("point", "(25, 70)", "", row, folder, 0) == 1
    assert worth("point", "(35, 15)", "", row, folder, 0) == 0


@pytest.mark.parametrize("depth", [8, 16])
def test_masks_of_any_depth(folder, depth):
    """65,535 is the white of 16 bits; masks of labels 0 and 1 are black all over."""
    white = 2**depth - 1
    mask = np.zeros((40, 80), f"uint{depth}")
    mask[10:20, 40:60] = white
    row = {"mask": "deep.png", "images": ["i.png"]}
    Image.fromarray(mask).save(folder / "deep.png")
    assert worth("point", "(0.5, 0.3), (0.1, 0.1)", "", row, folder) == 0.5
    Image.fromarray(mask // white).save(folder / "deep.png")
    with pytest.raises(ValueError, match="deep.png: nothing is white in it"):
        worth("point", "(0.5, 0.3)", "", row, folder)


def test_images_of_rows_are_opened_like_those_of_training(tmp_path):
    """`datasets` hands out images as PIL opened them, turned by nobody: they were saved lying."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.zeros((40, 80, 3), np.uint8))
    lying.save(tmp_path / "p.jpg", exif=exif)
    deep = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    questions.write(tmp_path / "q", [("q", "a", "k", [Image.open(tmp_path / "p.jpg"), deep])])
    assert Image.open(tmp_path / "q/images/0_0.png").size == (40, 80)
    assert np.asarray(Image.open(tmp_path / "q/images/0_1.png"))[0, 0].tolist() == [127] * 3


def picture(side=16, level=90):
    return Image.fromarray(np.full((side, side, 3), level, np.uint8))


def published(folder):
    """A row of each benchmark, field by field as published."""
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    picture().save(folder / "images" / "07.jpg")
    picture(level=255).convert("L").save(folder / "masks" / "07.jpg")
    return {
        "BLINK": (
            "choice",
            {
                "idx": "val_Relative_Depth_1",
                "sub_task": "Relative_Depth",
                "answer": "(B)",
                "question": "Which point is closer?",
                "choices": ["A is closer", "B is closer"],
                "prompt": "Which point is closer?\n(A) A is closer\n(B) B is closer",
                "explanation": "",
                "image_1": picture(),
                "image_2": picture(),
                "image_3": None,
                "image_4": None,
            },
        ),
        "MMStar": (
            "choice",
            {
                "index": 0,
                "question": "What is it?\nOptions: A: a cup, B: a hat, C: a car, D: a cat",
                "image": picture(),
                "answer": "C",
                "category": "coarse perception",
                "l2_category": "image topic",
                "meta_info": {"source": "MMBench"},
            },
        ),
        "RoboSpatial": (
            "exact",
            {
                "category": "configuration",
                "question": "Is the cup left of the can? Yes or no.",
                "answer": "no",
                "img": picture(),
                "depth_image": picture(),
                "mask": None,
            },
        ),
        "its context": (
            "point",
            {
                "category": "context",
                "question": "Pinpoint several points in the free space.",
                "answer": "[(0.1, 0.1), (0.9, 0.1), (0.9, 0.9)]",
                "img": picture(),
                "depth_image": picture(),
                "mask": picture(level=255).convert("L"),
            },
        ),
        "Where2Place": (
            "point",
            {
                "question_id": 7,
                "image": "07.jpg",
                "category": "free space",
                "text": "Locate points between the cups.",
            },
        ),
        "Robot-R1": (
            "exact",
            {
                "question": "What is next?",
                "answer": "Lift the lid.",
                "category": "planning",
                "image": picture(),
            },
        ),
    }


RIGHT = {
    "BLINK": "(B)",
    "MMStar": "C: a car",
    "RoboSpatial": "No.",
    "its context": "[(0.5, 0.5)]",
    "Where2Place": "[(0.2, 0.8), (0.4, 0.6)]",
    "Robot-R1": "lift the lid",
}


def documented():
    """name -> the code of its line in the docstring of benchmarks/questions.py."""
    line = r"^    (\S+(?: \S+)?)  +(\(r\[.*(?:\n {6,}.*)*)"
    found = re.findall(line, questions.__doc__, re.MULTILINE)
    return {name: code.replace("\n", " ") for name, code in found}


@functools.cache
def tiny():
    return model.load(model.Path(model.__file__).parent / "assets/tiny-vlm")


def scripted(monkeypatch, answer):
    """What the model answers; -> the questions it was asked."""
    seen, backbone = [], tiny()
    monkeypatch.setattr(model, "load", lambda *args, **kwargs: backbone)

    def answers(backbone, samples, max_new_tokens, size, cuda_graphs):
        for sample in samples:
            question = sample.messages[-1]["content"]
            seen.append(question)
            assert question.count("<image>") == len(sample.images)
            assert all(image.ndim == 3 for image in model.open_images(sample))
        texts = [answer(text) for text in seen[-len(samples) :]]
        return [sft.GreedyAnswer(text, truncated=text == "maybe") for text in texts]

    monkeypatch.setattr(sft, "greedy_answers", answers)
    return seen


def vqa(data, out, *flags, total=None):
    evaluate.main(
        [
            "vqa",
            "--policy",
            "tiny",
            "--device",
            "cpu",
            "--data",
            str(data),
            "--out",
            str(out),
            *flags,
        ]
    )
    metrics = json.loads(out.read_text())["arms"]["policy"]["metrics"]
    truncated = metrics.pop("truncated")
    assert truncated["n"] == (total or sum(metric["n"] for metric in metrics.values()))
    return metrics


@pytest.mark.parametrize("name", RIGHT)
def test_each_published_shape_converts_in_its_documented_line(tmp_path, monkeypatch, name):
    score, r = published(tmp_path)[name]
    monkeypatch.chdir(tmp_path)
    questions.write("q", [eval(documented()[name], {"r": r, "range": range})])
    replies = [RIGHT[name], "maybe (Z)"]
    seen = scripted(monkeypatch, lambda text: replies.pop(0))
    metrics = vqa(tmp_path / "q/questions.jsonl", tmp_path / "r.json", "--score", score)
    ((key, value),) = metrics.items()
    assert key.startswith(score) and value["mean"] == 1 and value["n"] == 1
    assert seen[0].count("<image>") == (2 if name == "BLINK" else 1)
    assert (
        vqa(tmp_path / "q/questions.jsonl", tmp_path / "s.json", "--score", score)[key]["mean"] == 0
    )


def rows_to(path, rows):
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(path.parent / "i.png")
    lines = [
        {
            "images": ["i.png"],
            "kind": kind,
            **more,
            "messages": [
                {"role": "user", "content": f"<image>{question}"},
                {"role": "assistant", "content": answer},
            ],
        }
        for kind, question, answer, more in rows
    ]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"images": ["gone.png"]}, r"d.jsonl:2: .*gone.png: image does not open"),
        ({"images": []}, 'd.jsonl:2: 1 "<image>" but 0 images'),
    ],
)
def test_all_images_are_looked_at_before_the_first_question(tmp_path, monkeypatch, row, says):
    """One that was missing ended the run when its turn came, and with it all answers so far."""
    seen = scripted(monkeypatch, lambda text: "A")
    data = rows_to(tmp_path / "d.jsonl", [("k", "q", "A", {}), ("k", "q", "A", row)])
    with pytest.raises(ValueError, match=says):
        vqa(data, tmp_path / "r.json")
    assert not seen


def test_prompt_modes_kinds_and_the_file_of_answers(tmp_path, monkeypatch):
    data = rows_to(
        tmp_path / "d.jsonl",
        [
            ("depth", "q1", "A", {}),
            ("depth", "q2", "B", {}),
            ("two words", "q3", "<think>x</think><answer>C</answer>", {}),
        ],
    )
    seen = scripted(monkeypatch, lambda text: "B")
    for prompt, modes in (
        ("row", (None, None, True)),
        ("think", (True,) * 3),
        ("direct", (False,) * 3),
    ):
        del seen[:]
        metrics = vqa(
            data,
            tmp_path / f"{prompt}.json",
            "--score",
            "choice",
            "--prompt",
            prompt,
            "--answers",
            str(tmp_path / "a.jsonl"),
            "--batch",
            "2",
        )
        assert seen == [model.ask(f"<image>q{i + 1}", mode) for i, mode in enumerate(modes)]
        assert (metrics["choice depth"]["mean"], metrics["choice depth"]["n"]) == (0.5, 2)
        assert metrics["choice two_words"]["mean"] == 0
    written = [json.loads(x) for x in (tmp_path / "a.jsonl").open()]
    assert [(x["right"], x["answer"], x["mark"]) for x in written] == [
        ("A", "B", 0),
        ("B", "B", 1),
        ("C", "B", 0),
    ]


def test_rows_by_their_own_scores(tmp_path, monkeypatch):
    rows = [
        ("depth", "q1", "A", {"score": "choice"}),
        ("far+think", "q2", "10", {"score": "number", "tolerance": 2}),
        ("far", "q3", "10", {"score": "number", "tolerance": 2}),
        ("way", "q4", "(0.1, 0.1), (0.2, 0.2)", {"score": "path"}),
    ]
    data = rows_to(tmp_path / "d.jsonl", rows)
    replies = {"q1": "(A)", "q2": "13", "q3": "9", "q4": "right on"}
    seen = scripted(monkeypatch, lambda text: replies[text[-2:]])
    metrics = vqa(data, tmp_path / "r.json", "--score", "row", total=4)
    assert {name: metric["mean"] for name, metric in metrics.items()} == {
        "choice depth": 1, "number far": 1, "number far+think": 0, "path way": 0, "answers": 0.5,
    }  # fmt: skip
    variant = json.loads((tmp_path / "r.json").read_text())["arms"]["policy"]
    assert variant["paired"] == {"answers": [1, 0, 1, 0]}
    more = ["--score", "row", "--graded", "--kinds", "far"]
    metrics = vqa(data, tmp_path / "g.json", *more, total=2)
    assert metrics["number_graded far+think"]["mean"] == pytest.approx(np.exp(-0.5))
    assert len(seen) == 6
    vqa(data, tmp_path / "h.json", "--score", "number", "--kinds", "far", "--rows", "1")
    assert len(seen) == 7 and seen[-1].endswith("q2")
    with pytest.raises(ValueError, match="d.jsonl: no row is of --kinds near"):
        vqa(data, tmp_path / "n.json", "--kinds", "near")
    rows.append(("k", "q5", "x", {"score": "taste"}))
    data = rows_to(tmp_path / "d.jsonl", rows)
    with pytest.raises(
        ValueError, match="d.jsonl:5: its \"score\" is 'taste'; write one of exact, cho"
    ):
        vqa(data, tmp_path / "t.json", "--score", "row")


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("score", "row", "message"),
    [
        (
            "choice",
            ("k", "q", "the ball", {}),
            "d.jsonl:2: its answer 'the ball' is none for the sc",
        ),
        (
            "number",
            ("k", "q", "many", {}),
            "d.jsonl:2: its answer 'many' is none for the score number",
        ),
        ("point", ("k", "q", "", {}), 'd.jsonl:2: .* "mask" is None; write the path of'),
        (
            "point",
            ("k", "q", "", {"mask": "gone.png"}),
            "d.jsonl:2: .*gone.png: image does not open",
        ),
        ("point", ("k", "q", "", {"mask": "../i.png"}), "d.jsonl:2: image ../i.png lies outside"),
        ("point", ("k", "q", "", {"mask": "d.jsonl"}), "d.jsonl:2: .*d.jsonl: image does not open"),
        ("point", ("k", "q", "", {"mask": "i.png"}), "d.jsonl:2: i.png: nothing is white in it"),
        (
            "point",
            ("k", "q", "", {"box": [0.5, 0.1, 0.2, 0.3]}),
            'd.jsonl:2: .* its "box" is .0.5, .*; write .left, top',
        ),
        ("point", ("k", "q", "", {"box": [30, 10, 40, 30]}), "d.jsonl:2: .* is .30, .* in 0 .. 1"),
        ("point", ("k", "q", "", {"box": [0.1, 0.2]}), "d.jsonl:2: .* is .0.1, 0.2.; write .left"),
        (
            "point",
            ("k", "q", "", {"box": [float("nan")] * 4}),
            "d.jsonl:2: .* is .nan, .* in 0 .. 1",
        ),
        # these were found when their turn came, after the answers to all rows before them
        ("choice", ("k", "q \ud83d", "A", {}), "d.jsonl:2: half a character"),
        ("choice", ("k \ud83d", "q", "A", {}), "d.jsonl:2: half a character"),
        ("choice", ("k", "q", "A", {"images": ["gone.png"]}), "d.jsonl:2: .*gone.png: image does"),
        ("choice", ("k", "<image>q", "A", {}), 'd.jsonl:2: 2 "<image>" but 1 images'),
    ],
)
def test_mislabelled_rows_are_named_first(tmp_path, monkeypatch, score, row, message):
    good = {"choice": "A", "number": "3", "point": ""}[score]
    data = rows_to(tmp_path / "d.jsonl", [("k", "q", good, {"box": [0, 0, 1, 1]}), row])
    seen = scripted(monkeypatch, lambda text: "A")
    with pytest.raises(ValueError, match=message) as e:
        vqa(data, tmp_path / "r.json", "--score", score)
    assert "\n" not in str(e.value) and not seen and not (tmp_path / "r.json").exists()


def test_truncated_rows_and_unreadable_images(tmp_path, monkeypatch):
    data = rows_to(tmp_path / "d.jsonl", [("k", "q", "A", {}), ("k", "q", "B", {})])
    cut(data)
    scripted(monkeypatch, lambda text: "A")
    with pytest.raises(ValueError, match=r"d.jsonl:2: not a row"):
        vqa(data, tmp_path / "r.json")
    with pytest.raises(ValueError, match="row 0: .*none.png: image does not open"):
        questions.write(tmp_path / "q", [("q", "a", "k", [tmp_path / "none.png"])])
    assert not (tmp_path / "q/questions.jsonl").exists()


def conversation(*turns):
    return json.dumps(
        {"images": ["i.png"], "messages": [{"role": role, "content": text} for role, text in turns]}
    )


def test_all_before_the_first_answer_is_asked(tmp_path, monkeypatch):
    """Of a row that begins with a system message, that message alone was asked, without the
    question and its image; of a row of several turns the image of a later turn would be missing."""
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "i.png")
    system = ("system", "Answer by a colour.")
    first = ("user", "<image>What colour is the cube?")
    rows = [
        [system, first, ("assistant", "<think>It is lit.</think><answer>red</answer>")],
        [first, ("assistant", "red"), ("user", "And the ball?"), ("assistant", "blue")],
        [("user", "Name a colour."), ("assistant", "red"), first, ("assistant", "blue")],
    ]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(conversation(*turns) + "\n" for turns in rows))
    asked = []

    def encode(backbone, messages, images=(), prompt_only=False, max_pixels=0):
        asked.append((messages, len(images)))
        return {"ids": np.zeros(1, int)}

    ids = tiny().tokenizer("red").input_ids
    generated = {"ids": model.torch.tensor([[*ids, tiny().vocab.eos], [*ids, *ids[:1]], [*ids, 0]])}
    monkeypatch.setattr(model, "load", lambda *args, **kwargs: tiny())
    monkeypatch.setattr(model, "encode", encode)
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: generated)
    out = tmp_path / "r.json"
    flags = ["vqa", "--policy", "x", "--device", "cpu", "--data", str(data), "--out", str(out)]
    evaluate.main([*flags, "--answers", str(tmp_path / "new/a.jsonl")])
    assert [[message["role"] for message in messages] for messages, _ in asked] == [
        ["system", "user"],
        ["user"],
        ["user"],
    ]
    assert asked[0][0][0]["content"] == system[1], "no mode line on it"
    assert asked[0][0][1]["content"] == model.ask(first[1], True)
    assert [n for _, n in asked] == [1, 1, 0]
    metrics = json.loads(out.read_text())["arms"]["policy"]["metrics"]
    assert metrics["truncated"]["mean"] == pytest.approx(2 / 3)
    written = [json.loads(line) for line in (tmp_path / "new/a.jsonl").open()]
    assert [line["truncated"] for line in written] == [False, True, True]
    assert written[0]["question"] == model.ask(first[1], True)

    del asked[:]
    evaluate.main([*flags, "--prompt", "direct"])
    assert asked[0][0][1]["content"] == model.ask(first[1], False), "its mode replaces the row's"
    data.write_text(conversation(system, ("assistant", "red")) + "\n")
    with pytest.raises(ValueError, match="d.jsonl:1: an answer without a question before it"):
        evaluate.main(flags)


# ---- easy-VQA, and answers without images --------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("q", "a"), "row 1: not enough values to unpack"),
        (
            ("q", "a", "k", [np.zeros((4, 4, 3), np.uint8)]),
            "row 1: an image is .*ndarray.*; give a",
        ),
    ],
)
def test_a_row_that_cannot_be_converted_is_named(tmp_path, bad, message):
    """Of a short one nobody knew which; an array was an "unhashable type"."""
    with pytest.raises(ValueError, match=message):
        questions.write(tmp_path / "out", [("q", "a", "k", []), bad])


def test_an_image_that_many_rows_name_is_copied_once(tmp_path):
    """The 38,575 training rows of easy-VQA, which name 4,000 files, were to become 38,575 files."""
    for name in ("a.png", "b.png"):
        picture(level=ord(name[0])).save(tmp_path / name)
    asked = ["a.png", "b.png", "a.png"]
    rows = [(f"q{i}", "A", "k", [tmp_path / name]) for i, name in enumerate(asked)]
    questions.write(tmp_path / "out", rows)
    lines = [json.loads(line) for line in (tmp_path / "out/questions.jsonl").open()]
    assert [line["images"] for line in lines] == [
        ["images/0_0.png"],
        ["images/1_0.png"],
        ["images/0_0.png"],
    ]
    assert len(list((tmp_path / "out/images").iterdir())) == 2
    assert np.asarray(Image.open(tmp_path / "out/images/1_0.png"))[0, 0].tolist() == [ord("b")] * 3


@pytest.fixture
def easy_vqa(tmp_path, monkeypatch):
    """A package of that name: its three lists and its images by number, as 1.0 gives them."""
    picture(64).save(tmp_path / "7.png")
    paths = {7: str(tmp_path / "7.png")}
    asked = ["is there a circle?", "what shape is present?", "what color is the circle?"]
    published = (asked, ["yes", "circle", "teal"], [7, 7, 7])
    package = argparse.Namespace(
        get_train_questions=lambda: published,
        get_train_image_paths=lambda: paths,
        get_test_questions=lambda: tuple(column[:1] for column in published),
        get_test_image_paths=lambda: paths,
    )
    monkeypatch.setitem(sys.modules, "easy_vqa", package)


def test_easy_vqa_becomes_rows_that_sft_reads(tmp_path, easy_vqa, monkeypatch):
    questions.main(["easy-vqa", "--out", str(tmp_path / "easy")])
    train = model.ConversationDataset(tmp_path / "easy/train/questions.jsonl", None, 0)
    assert [train.row(i)["kind"] for i in train.train] == ["yes or no", "shape", "colour"]
    assert [grpo.right_answer(train, i).text for i in train.train] == ["yes", "circle", "teal"]
    row = model.encode_sample(tiny(), train[0])
    assert row["grid"].tolist() == [[1, 8, 8]]
    assert tiny().tokenizer.decode(row["ids"][row["target"]]) == "yes<|im_end|>"
    test = model.ConversationDataset(tmp_path / "easy/test/questions.jsonl", None, 0)
    assert test.units == 1
    with pytest.raises(ValueError, match="easy/train: already holds questions; delete them, or"):
        questions.main(["easy-vqa", "--out", str(tmp_path / "easy")])
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ValueError, match="pip install easy-vqa==1.0"):
        next(questions.easy_vqa("train"))


def test_the_documented_commands_of_easy_vqa(tmp_path, easy_vqa, monkeypatch):
    """From the package to the results file, each command of docs/data.md with toy sizes."""
    text = (ROOT / "docs/data.md").read_text()
    block = text[text.index("pip install easy-vqa") :].partition("```")[0].replace("\\\n", "")
    block = re.sub(r"(data|runs|results)/easy_vqa", rf"{tmp_path}/\1", block)
    main_of = {
        "-m benchmarks.questions ": questions.main,
        "sft.py ": sft.main,
        "evaluate.py ": evaluate.main,
    }
    toy = " --steps 1 --batch 2 --holdout-rows 1 --max-new-tokens 2"
    monkeypatch.chdir(ROOT)
    done = []
    for command in block.splitlines()[1:]:
        name = next(name for name in main_of if name in command)
        arguments = command.partition(name)[2] + (toy if name == "sft.py " else "")
        main_of[name](arguments.split())
        done.append(name)
    assert done == [*main_of, "evaluate.py "]
    variants = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert list(variants) == ["majority", "question only", "tiny-vlm"]
    for variant in variants.values():
        assert variant["metrics"]["exact yes_or_no"]["n"] == 1
        assert len(variant["paired"]["answers"]) == 1
    assert variants["question only"]["metrics"]["answers"]["mean"] == 1


def test_easy_vqa_as_published():
    """Its own counts, and that each question comes with an image of the split."""
    pytest.importorskip("easy_vqa")
    rows = list(questions.easy_vqa("test"))
    assert len(rows) == 9673 and len({answer for _, answer, *_ in rows}) == 13
    counts = {
        kind: sum(row[2] == kind for row in rows) for kind in ("yes or no", "shape", "colour")
    }
    assert counts == {"yes or no": 7136, "shape": 1257, "colour": 1280}
    assert len({row[3][0] for row in rows}) == 1000
    assert Image.open(rows[0][3][0]).size == (64, 64)


def test_answers_without_images_by_hand(tmp_path):
    """q1 was mostly answered by yes, q2 by no, all together mostly by no; q3 is new."""
    more = {"score": "exact"}
    known = [("q1", "yes"), ("q1", "no"), ("q1", "yes"), ("q2", "no"), ("q2", "no"), ("q4", "no")]
    train = rows_to(tmp_path / "train.jsonl", [("k", *pair, more) for pair in known])
    to_answer = [("q1", "yes"), ("q1", "yes"), ("q2", "no"), ("q3", "yes"), ("q3", "no")]
    data = rows_to(tmp_path / "test.jsonl", [("k", *pair, more) for pair in to_answer])
    out = tmp_path / "r.json"
    flags = ["--train", str(train), "--data", str(data), "--out", str(out)]
    evaluate.main(["blind", *flags])
    results = json.loads(out.read_text())
    variants = results["arms"]
    assert variants["majority"]["paired"]["answers"] == [0, 0, 1, 0, 1]
    assert variants["question only"]["paired"]["answers"] == [1, 1, 1, 0, 1]
    accuracy = variants["question only"]["metrics"]["exact k"]
    assert accuracy == evaluate.wilson(4, 5)
    assert results["commands"] == ["python evaluate.py " + " ".join(["blind", *flags])]
    rows_to(data, [("k", "q1", "yes", {})])
    with pytest.raises(ValueError, match='test.jsonl:1: its "score" is None; write one of exact'):
        evaluate.main(["blind", *flags])
