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
