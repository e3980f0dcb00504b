"""Public question benchmarks: their rows for `evaluate.py vqa`, and what an answer scores.

`write(folder, rows)` writes questions.jsonl with its images; a row is (question, answer, kind,
images[, more]), one line for each benchmark, `r` being a row as published (load_dataset of the
datasets package; Where2Place: the lines of point_questions.jsonl, in its folder):

    BLINK        (r["prompt"], r["answer"], r["sub_task"], [r[f"image_{k}"] for k in (1, 2, 3, 4)])
    MMStar       (r["question"], r["answer"], r["category"], [r["image"]])
    RoboSpatial  (r["question"], r["answer"], r["category"], [r["img"]])
    its context  (r["question"], "", "context", [r["img"]], {"mask": r["mask"]})
    Where2Place  (r["text"], "", "all", [f"images/{r['image']}"],
                  {"mask": f"masks/{r['question_id']:02d}.jpg"})
    Robot-R1     (r["question"], r["answer"], r["category"], [r["image"]])

Scores, in this order: choice, choice, exact (yes and no), point, point, exact. Robot-R1 Bench is
open questions that a large model judges from 0 to 3: give such a judge the file of --answers.

Another way to score is a function and a line in SCORES.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import model
import sft
from fast_tokenizer import read_image, reading

# ---- Rows ----------------------------------------------------------------------------------------


def write(folder: str | Path, rows):
    """Rows as above -> folder/questions.jsonl, written last, and folder/images/.

    more: a dict with "mask" (an image or its path), "box" or "tolerance", see the scores below."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (question, answer, kind, images, *more) in enumerate(rows):
        with reading(f"row {i}"):
            names = []
            for k, image in enumerate(images):
                if image is not None:
                    names.append(save_image(folder, f"{i}_{k}.png", image, i))
            row = {"images": names, "kind": kind}
            for further in more:
                row.update(further)
            row["messages"] = [
                {"role": "user", "content": "<image>" * len(names) + question},
                {"role": "assistant", "content": answer},
            ]
            if "mask" in row:
                row["mask"] = save_image(folder, f"{i}_mask.png", row["mask"], i)
            lines.append(json.dumps(row) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))


def save_image(folder: Path, name: str, image, row_number: int) -> str:
    """Save an image, or a copy of the file that a path names -> its path below the folder."""
    if isinstance(image, Image.Image):
        pixels = to_rgb(image)
    else:
        pixels = read_image(image, f"row {row_number}: {image}")
    path = f"images/{name}"
    Image.fromarray(pixels).save(folder / path)
    return path


# ---- Scores --------------------------------------------------------------------------------------
#
# Each is a function (answer, right answer, row, its folder, unit of points) -> 0 .. 1, whatever of
# these it needs.

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
THOUSANDS = r"(?<![\d.,])\d{1,3}(?:([, '\u2019])\d{3})(?:\1\d{3})*(?![\d,'\u2019]|\.\d+[,.])"
PAIR = rf"[(\[]\s*({NUMBER})\s*,\s*({NUMBER})\s*[)\]]"  # RoboPoint's and Qwen's way to point
LETTER = r"\(([A-H])\)|\b([A-H])(?=[.):]|$)|(?i:answer|option|choice)(?i: is)?:? ?([A-H])\b"


def exact(answer: str, right: str, row: dict, folder: Path, unit: float) -> float:
    """1 for the same text, case and full stop aside; for a yes or no, for the same first word."""
    answer = answer.lower().strip(" .")
    right = right.lower().strip(" .")
    if right in ("yes", "no"):
        answer = re.match(r"\w*", answer)[0]
    return float(answer == right)


def choice(answer: str, right: str, row: dict, folder: Path, unit: float) -> float:
    """1 for the same single letter; who names two has chosen none."""
    chosen = letters(answer)
    return float(chosen == letters(right) and len(chosen) == 1)


def letters(text: str) -> set[str]:
    """The letters A .. H that a text names as options: "(B)", "B.", "The answer is B" -> {"B"}."""
    text = text.strip()
    if len(text) < 4:  # a lone letter may be small
        text = text.upper()
    return {"".join(groups) for groups in re.findall(LETTER, text)}


def number(answer: str, right: str, row: dict, folder: Path, unit: float) -> float:
    """1 for the same numbers in the same order, each within the row's "tolerance" (0 if none)."""
    said = np.array(re.findall(NUMBER, answer), float)
    wanted = np.array(re.findall(NUMBER, right), float)
    if len(said) != len(wanted) or len(said) == 0:
        return 0.0
    return float(abs(said - wanted).max() <= row.get("tolerance", 0) + 1e-9)


def point(answer: str, right: str, row: dict, folder: Path, unit: float) -> float:
    """The share of the answer's points inside the row's "mask" (white) or "box" [left, top, right,
    bottom], 0 .. 1 of the image. unit: what points are divided by to be fractions too; 0: the
    image's pixels. ValueError for a box that is none."""
    scale = unit or Image.open(folder / row["images"][0]).size
    points = np.array(re.findall(PAIR, answer), float).reshape(-1, 2) / scale  # (N, 2) x, y
    if "box" in row:
        inside = in_box(points, row["box"])
    else:
        mask = np.asarray(Image.open(folder / row["mask"]).convert("L")) > 127  # (H, W)
        inside = in_mask(points, mask)
    return float(np.mean(inside)) if len(points) else 0.0


def in_box(points: np.ndarray, box: list[float]) -> np.ndarray:
    """Points (N, 2) in 0 .. 1 -> which lie in the box, (N,)."""
    low, high = np.reshape(box, (2, 2))
    if low.min() < 0 or (low >= high).any() or high.max() > 1:
        raise ValueError(f"box {box} is not left, top, right, bottom in 0 .. 1")
    return ((points >= low) & (points <= high)).all(1)


def in_mask(points: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Points (N, 2) in 0 .. 1 -> which lie where the mask (H, W) is true, (N,)."""
    height, width = mask.shape
    framed = np.pad(mask, 1)  # a frame of False catches points outside
    x, y = np.floor(points * (width, height)).astype(int).T + 1
    return framed[y.clip(0, height + 1), x.clip(0, width + 1)]


SCORES = {"exact": exact, "choice": choice, "number": number, "point": point}


def answer_score(
    score: str, answer: str, right: str, row: dict, folder: Path, unit: float = 1
) -> float:
    """What an answer is worth, 0 .. 1. score: one of SCORES. right: the row's own answer."""
    return SCORES[score](answer, right, row, folder, unit)


# ---- evaluate.py vqa -----------------------------------------------------------------------------


def arguments(add):
    """Flags of `evaluate.py vqa`."""
    add("--data", required=True, help="conversations, .jsonl")
    add("--score", default="exact", choices=list(SCORES))
    add(
        "--prompt",
        default="row",
        choices=["row", "think", "direct"],
        help="mode of the prompt; row: as the row's own answer begins",
    )
    add("--unit", type=float, default=1, help="what points are divided by; 0: the image's pixels")
    add("--answers", default="", help="also write each answer here, .jsonl")
    add("--rows", type=int, default=0, help="first rows of the file; 0: all")
    add("--max-new-tokens", type=int, default=128, help="tokens an answer at most")
    add("--batch", type=int, default=64, help="rows a forward")


class Asked(NamedTuple):
    """A question as it is asked."""

    row: dict  # of the file
    right: str  # the row's own answer
    sample: sft.Sample  # whose first message is asked


def questions_to_ask(source: sft.ConversationDataset, args) -> list[Asked]:
    """The first question of each row. Damaged when a row's own answer would not score 1."""
    folder = source.path.parent
    asked = []
    for i in source.train[: args.rows or None]:
        row = source.row(i)
        sample = source[i]
        right = sft.answer_text(sample.messages[1]["content"])
        with reading(sample.sample_id):
            score = answer_score(args.score, right, right, row, folder, args.unit)
            if score != 1 and args.score != "point":
                raise ValueError(f"its answer {right!r} is none for --score {args.score}")
        if args.prompt != "row":
            text = model.ask(row["messages"][0]["content"], args.prompt == "think")
            sample = sample._replace(messages=[{"role": "user", "content": text}])
        kind = (sample.kind or "all").replace(" ", "_")  # a word of a metric's name
        asked.append(Asked(row, right, sample._replace(kind=kind)))
    return asked


def score_answers(backbone, args) -> dict[str, list[float]]:
    """Greedy answers to the rows of args.data -> {kind: [score, 0 .. 1]}.

    Writes the answers to args.answers too, if that is set. Damaged when a row cannot be scored."""
    source = sft.ConversationDataset(args.data, backbone.action_tokenizer, 0)
    asked = questions_to_ask(source, args)
    samples = [one.sample for one in asked]
    answers = sft.greedy_answers(backbone, samples, args.max_new_tokens, args.batch)

    scores = {}
    lines = []
    for (row, right, sample), answer in zip(asked, answers, strict=True):
        score = answer_score(args.score, answer, right, row, source.path.parent, args.unit)
        scores.setdefault(sample.kind, []).append(score)
        written = {  # the keys of this file are older than the names above
            "where": sample.sample_id,
            "kind": sample.kind,
            "question": sample.messages[0]["content"],
            "right": right,
            "answer": answer,
            "mark": score,
        }
        lines.append(json.dumps(written) + "\n")
    if args.answers:
        Path(args.answers).write_text("".join(lines))
    return scores
