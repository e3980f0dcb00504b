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
from fast_tokenizer import natural, non_negative, read_image, reading, to_rgb

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
# these it needs. Of both answers plain() leaves what is said; what can be read in two ways, one of
# them wrong, and numbers in words ("twelve") are worth 0.

BOXED = r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}"  # LaTeX, with at most one pair of braces inside
LATEX_WORDS = r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"
INTRODUCTION = (
    r"(?i)^(?:so,? |therefore,? )?(?:the )?(?:final |correct )?answer(?: is)?(?:\s*:\s*|\s+)"
)
DECORATION = " \t\n\"'\u201c\u201d\u2018\u2019*_.,;!"  # around an answer


AS_ASCII = {  # full-width forms, minus and spaces; not "\u00b2", which would make m\u00b2 a number
    **{0xFF00 + code: 0x20 + code for code in range(1, 0x5F)},
    **dict.fromkeys(map(ord, "\u00a0\u2009\u202f\u3000"), " "),
    ord("\u2212"): "-",
    ord("\u3002"): ".",
}


def plain(text: str) -> str:
    """What an answer says, without how it is dressed: "**Yes**" -> "Yes", "$12$" -> "12",
    "The answer is \\\\boxed{B}." -> "B"."""
    text = text.translate(AS_ASCII)
    boxes = re.findall(BOXED, text)
    if boxes:
        text = boxes[-1]  # the last one: what stands before it is the working
    text = re.sub(LATEX_WORDS, r"\1", text).replace("{,}", ",")
    text = re.sub(r"\*\*|__|[`$]|\\[()\[\],]", "", text)
    return re.sub(INTRODUCTION, "", text.strip(" \t\n*_"))


def exact(answer: str, right: str, row: dict, folder: Path, unit: float) -> float:
    """1 for the same text, case and punctuation around it aside, or the same number; for a yes or
    no, for the same first word ("Yes or no" is none)."""
    answer = undecorated(answer)
    right = undecorated(right)
    if right in ("yes", "no"):
        said = re.match(r"(yes|no)\b(?!\s*(?:/|&|or\b|and\b)\s*(?:yes|no)\b)", answer)
        return float(said is not None and said[1] == right)
    if answer == right:
        return float(answer != "")
    wanted = whole_number(right)
    return float(wanted is not None and whole_number(answer) == wanted)


def undecorated(text: str) -> str:
    """plain() in small letters, without the punctuation around it; the point of ".5" stays."""
    text = plain(text).casefold().rstrip(DECORATION)
    bare = text.lstrip(DECORATION)
    if text.removesuffix(bare).endswith(".") and bare[:1].isdecimal():
        return "." + bare
    return bare


def whole_number(text: str) -> float | None:
    """The number that a text is, "1,024" -> 1024.0; None when it is something else."""
    if not re.fullmatch(f"(?:{THOUSANDS}|{NUMBER})", text):
        return None
    joined = readings(text)[0]
    return joined[0]


def choice(answer: str, right: str, row: dict, folder: Path, unit: float) -> float:
    """1 for the same single letter; who names two has chosen none."""
    chosen = letters(answer)
    return float(chosen == letters(right) and len(chosen) == 1)


LETTER = (
    r"[(\[]([A-Ha-h])[)\]]"  # (B)  [B]  (b)
    r"|^([a-h])(?:\)|[.:]\s)"  # b) the ball  b. the ball
    r"|\b([A-H])(?=[.):]|,\s|\s+[-\u2013\u2014]\s|\s*$)"  # B.  B)  B: the ball  B - the ball  B
    r"|\b([A-H])(?=\s*(?:/|or\b|and\b|&)\s*[A-H]\b)"  # A or B: two, whatever else is said
    r"|\b([A-H])(?= is (?:the )?(?:correct|right)\b)"
    r"|^([A-H])\s*\n"  # alone in the first line
    r"|(?i:answer|option|choice)(?i: is)?:?\s?(?:([A-H])\b|([b-h])$)"  # Option B  option b
)

REFUSED_LETTER = r"\b[Nn]ot\s+(?:[Oo]ption\s+)?(?:[(\[][A-Ha-h][)\]]|[A-H]\b)"  # not A  not (a)


def letters(text: str) -> set[str]:
    """The letters A .. H that a text names as options: "(B)", "B.", "The answer is B", "not A but
    B" -> {"B"}."""
    text = re.sub(REFUSED_LETTER, "", plain(text)).strip("\"'\u201c\u201d\u2018\u2019., \n")
    if len(text) < 4:  # a lone letter may be small
        text = text.upper()
    return {"".join(groups).upper() for groups in re.findall(LETTER, text)}


NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# 1,024 or 1 024 or 1'024, the same separator throughout; not part of a longer number
THOUSANDS = r"(?<![\d.,'])[-+]?\d{1,3}([, '\u2019])\d{3}(?:\1\d{3})*(?!\d|[,'\u2019]\d)(?:\.\d+)?"
FRACTION = r"[\d.,]*[\u00bc-\u00be\u2150-\u215e]|[\d.,]*\d[\u00b2\u00b3\u00b9]"  # 1\u00bd is not 1
PAIR = rf"[(\[]\s*({NUMBER})\s*,\s*({NUMBER})\s*[)\]]"  # RoboPoint's and Qwen's way to point


def readings(text: str) -> list[list[float]]:
    """The numbers of a text in order, in each way that they can be read: "1,024" is 1024, since
    nobody writes 024; "10,200" is 10200 or 10 and 200."""
    text = re.sub(FRACTION, "?", plain(text))
    without_separators = re.sub(THOUSANDS, lambda match: re.sub(r"[, '\u2019]", "", match[0]), text)
    joined = [float(number) for number in re.findall(NUMBER, without_separators)]
    apart = re.findall(NUMBER, text)
    if without_separators == text or any(re.match(r"0\d", number) for number in apart):
        return [joined]
    return [joined, [float(number) for number in apart]]


def number(answer: str, right: str, row: dict, folder: Path, unit: float) -> float:
    """1 for the same numbers in the same order, each within the row's "tolerance" (0 if none)."""
    for said in readings(answer):
        for wanted in readings(right):
            if len(said) == len(wanted) and said:
                difference = np.abs(np.subtract(said, wanted)).max()
                if difference <= row.get("tolerance", 0) + 1e-9:
                    return 1.0
    return 0.0


def point(answer: str, right: str, row: dict, folder: Path, unit: float) -> float:
    """The share of the answer's points inside the row's "mask" (white) or "box" [left, top, right,
    bottom], 0 .. 1 of the image. unit: what points are divided by to be fractions too; 0: the
    image's pixels. ValueError for a box that is none, and for a mask without white."""
    scale = unit or open_of_row(row, row["images"][0], folder).shape[1::-1]  # width, height
    pairs = re.findall(PAIR, answer.translate(AS_ASCII))
    points = np.array(pairs, float).reshape(-1, 2) / scale  # (N, 2) x, y
    if "box" in row:
        inside = in_box(points, row["box"])
    else:
        mask = open_of_row(row, row["mask"], folder).mean(2) > 127  # (H, W)
        if not mask.any():
            raise ValueError(
                f"{row['mask']}: nothing is white in it, so that every answer is wrong"
            )
        inside = in_mask(points, mask)
    return float(np.mean(inside)) if len(points) else 0.0


def open_of_row(row: dict, name: str, folder: Path) -> np.ndarray:
    """An image that a row names, (H, W, 3) uint8 as training sees it. Damaged naming the row."""
    path = folder / name
    return read_image(path, f"{row.get('sample_id', '')}: {path}")


def in_box(points: np.ndarray, box: list[float]) -> np.ndarray:
    """Points (N, 2) in 0 .. 1 -> which lie in the box, (N,)."""
    low, high = np.reshape(box, (2, 2))
    if not (0 <= low.min() and (low < high).all() and high.max() <= 1):  # nor NaN
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
    add(
        "--unit",
        type=non_negative,
        default=1,
        help="what points are divided by; 0: the image's pixels",
    )
    add("--answers", default="", help="also write each answer here, .jsonl")
    add("--rows", type=natural, default=0, help="first rows of the file; 0: all")
    add("--outside-images", action="store_true", help="images may lie outside the file's folder")


class Asked(NamedTuple):
    """A question as it is asked."""

    row: dict  # of the file
    right: str  # the row's own answer
    sample: sft.Sample  # with the messages before the first answer


class Answer(NamedTuple):
    """What came of a question."""

    kind: str
    score: float  # 0 .. 1
    truncated: bool  # cut off by the limit of tokens
    line: dict  # of the file of --answers


def questions_to_ask(source: sft.ConversationDataset, args) -> list[Asked]:
    """What stands before the first answer of each row: its question, a system message too. Damaged
    when a row's own answer would not score 1, or the row cannot be asked: text, tags, images, of
    which the headers are opened."""
    folder = source.path.parent
    asked = []
    for i in source.train[: args.rows or None]:
        sample = source[i]
        row = {**source.row(i), "sample_id": sample.sample_id}
        roles = [message["role"] for message in sample.messages]
        answered = roles.index("assistant")
        right = sft.answer_text(sample.messages[answered]["content"])
        with reading(sample.sample_id):
            if "mask" in row:
                source.image_path(row["mask"], sample.sample_id)
            if roles[max(answered - 1, 0)] != "user":
                raise ValueError("an answer without a question before it")
            outline = source.outline(i)
            model.check_messages(outline.messages, len(outline.image_sizes))
            model.check_text(sample.kind or "")
            score = answer_score(args.score, right, right, row, folder, args.unit)
            if score != 1 and args.score != "point":
                raise ValueError(f"its answer {right!r} is none for --score {args.score}")
        sample = sft.first_question(sample)
        if args.prompt != "row":
            text = model.ask(row["messages"][answered - 1]["content"], args.prompt == "think")
            question = {**sample.messages[-1], "content": text}
            sample = sample._replace(messages=[*sample.messages[:-1], question])
        kind = (sample.kind or "all").replace(" ", "_")  # a word of a metric's name
        asked.append(Asked(row, right, sample._replace(kind=kind)))
    return asked


def score_answers(backbone, args, local: slice) -> list[Answer]:
    """Greedy answers to the share `local` of the rows of args.data. Damaged when a row, of any
    share, cannot be scored."""
    source = sft.ConversationDataset(args.data, backbone.action_tokenizer, 0, args.outside_images)
    asked = questions_to_ask(source, args)[local]
    samples = [one.sample for one in asked]
    answers = sft.greedy_answers(
        backbone, samples, args.max_new_tokens, args.batch, args.cuda_graphs
    )

    scored = []
    for (row, right, sample), (text, truncated) in zip(asked, answers, strict=True):
        score = answer_score(args.score, text, right, row, source.path.parent, args.unit)
        line = {  # the keys of this file are older than the names above
            "where": sample.sample_id,
            "kind": sample.kind,
            "question": sample.messages[-1]["content"],
            "right": right,
            "answer": text,
            "truncated": truncated,
            "mark": score,
        }
        scored.append(Answer(sample.kind, score, truncated, line))
    return scored


def write_answers(path: str | Path, answers: list[Answer]):
    """The file of --answers."""
    lines = [json.dumps(answer.line) + "\n" for answer in answers]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
