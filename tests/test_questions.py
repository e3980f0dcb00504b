"""Hand-worked scores, published row shapes through the documented lines, `evaluate.py vqa`."""

import functools
import json
import re

import numpy as np
import pytest
from PIL import Image

import evaluate
import model
import sft
from benchmarks import questions

CASES = {  # score: [(answer, the row's own, more of the row, what it is worth)]
    "exact": [
        ("Red cube.", "red cube", {}, 1),
        ("red", "red cube", {}, 0),
        ("Yes, it would fit.", "yes", {}, 1),
        ("yesterday", "yes", {}, 0),
        ("No", "yes", {}, 0),
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
    ],
    "number": [
        ("3", "3", {}, 1),
        ("about 3.0 cubes", "3", {}, 1),
        ("4", "3", {}, 0),
        ("-0.52", "-0.5", {"tolerance": 0.02}, 1),
        ("-0.53", "-0.5", {"tolerance": 0.02}, 0),
        ("[0.1, .2, -1]", "0.1 0.2 -1", {}, 1),
        ("0.1 0.2", "0.1 0.2 -1", {}, 0),
        ("three", "3", {}, 0),
    ],
    "point": [
        ("[(0.3, 0.4)]", "", {"box": [0.2, 0.3, 0.4, 0.5]}, 1),
        ("(0.3, 0.4), (0.9, 0.4), [.3,.6], (0.2, 0.3)", "", {"box": [0.2, 0.3, 0.4, 0.5]}, 0.5),
        ("(3, 4)", "", {"box": [0.2, 0.3, 0.4, 0.5]}, 0),
        ("on the left", "", {"box": [0.2, 0.3, 0.4, 0.5]}, 0),
        # the mask is white in rows 10..19 of 40 and columns 40..59 of 80
        ("(0.5, 0.25)", "", {"mask": "m.png"}, 1),
        ("(0.5, 0.49)", "", {"mask": "m.png"}, 1),
        ("(0.5, 0.5)", "", {"mask": "m.png"}, 0),
        ("(0.49, 0.3)", "", {"mask": "m.png"}, 0),
        ("(-0.5, 0.3), (1.0, 1.0), (0.7, 0.4)", "", {"mask": "m.png"}, 1 / 3),
    ],
}


@pytest.fixture
def folder(tmp_path):
    mask = np.zeros((40, 80), np.uint8)
    mask[10:20, 40:60] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "i.png")
    return tmp_path


@pytest.mark.parametrize("score", CASES)
def test_scores(score, folder):
    for answer, right, row, value in CASES[score]:
        found = questions.answer_score(score, answer, right, row, folder)
        assert found == pytest.approx(value), answer


def test_points_in_thousandths_and_in_pixels(folder):
    row = {"mask": "m.png", "images": ["i.png"]}
    thousandths = '{"point_2d": [500, 250]}'
    assert questions.answer_score("point", thousandths, "", row, folder, 1000) == 1
    assert questions.answer_score("point", "(40, 10), (40, 20)", "", row, folder, 0) == 0.5


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
    monkeypatch.setattr(model, "load", lambda path, device, stages: backbone)

    def answers(backbone, items, max_new_tokens=128, size=64):
        for messages, images, _, where in items:
            seen.append(messages[0]["content"])
            assert messages[0]["content"].count("<image>") == len(images)
            opened = sft.open_images(sft.Sample(messages, images, None, where))
            assert all(image.ndim == 3 for image in opened)
        return [answer(text) for text in seen[-len(items) :]]

    monkeypatch.setattr(sft, "greedy_answers", answers)
    return seen


def vqa(data, out, *flags):
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
    return json.loads(out.read_text())["arms"]["policy"]["metrics"]


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


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("score", "row", "message"),
    [
        ("choice", ("k", "q", "the ball", {}), "d.jsonl:2: its answer 'the ball' is none for --sc"),
        (
            "number",
            ("k", "q", "many", {}),
            "d.jsonl:2: its answer 'many' is none for --score number",
        ),
        ("point", ("k", "q", "", {}), "d.jsonl:2: KeyError: 'mask'"),
        ("point", ("k", "q", "", {"mask": "gone.png"}), "d.jsonl:2: FileNotFoundError.*gone.png"),
        ("point", ("k", "q", "", {"mask": "d.jsonl"}), "d.jsonl:2: UnidentifiedImageError"),
        (
            "point",
            ("k", "q", "", {"box": [0.5, 0.1, 0.2, 0.3]}),
            "d.jsonl:2: box .* is not left, top",
        ),
        ("point", ("k", "q", "", {"box": [30, 10, 40, 30]}), "d.jsonl:2: box .* in 0 .. 1"),
        ("point", ("k", "q", "", {"box": [0.1, 0.2]}), "d.jsonl:2: cannot reshape"),
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
