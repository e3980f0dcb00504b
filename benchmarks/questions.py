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

Another way to score is a function and a line in grpo.SCORES, by which RL rewards answers too.
"""

import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image

import grpo
import model
import sft
from fast_tokenizer import natural, non_negative, read_image, reading, to_rgb

# ---- Rows ----------------------------------------------------------------------------------------


def write(folder: str | Path, rows):
    """Rows as above -> folder/questions.jsonl, written last, and folder/images/.

    more: a dict with "mask" (an image or its path), "box" or "tolerance", see grpo.SCORES."""
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
    add(
        "--score",
        default="exact",
        choices=["row", *grpo.SCORES],
        help="of all rows; row: as each row's own field says, and the mean of all as `answers`",
    )
    add(
        "--graded",
        action="store_true",
        help="how near an answer is, as RL rewards it, not whether it is right",
    )
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
    add("--kinds", default="", help="only rows of these kinds, as where,what; empty: all")
    add("--rows", type=natural, default=0, help="first rows of the file, of these kinds; 0: all")
    add("--outside-images", action="store_true", help="images may lie outside the file's folder")


class Asked(NamedTuple):
    """A question as it is asked."""

    sample: model.Sample  # with the messages before the first answer
    right: grpo.RightAnswer


class Answer(NamedTuple):
    """What came of a question."""

    metric: str  # that it belongs to: score and kind
    score: float  # 0 .. 1
    truncated: bool  # cut off by the limit of tokens
    line: dict  # of the file of --answers


def questions_to_ask(backbone, args) -> list[Asked]:
    """The first question of each row of args.data. ValueError naming the row when it cannot be
    asked or scored: all are looked at before the first is asked."""
    held_out = args.holdout_rows or 0  # where the answers are to be trained on
    source = model.ConversationDataset(
        args.data, backbone.action_tokenizer, held_out, args.outside_images
    )
    score = "" if args.score == "row" else args.score
    think = {"row": None, "think": True, "direct": False}[args.prompt]
    kinds = grpo.named_kinds(args.kinds)
    asked = []
    for i in source.train:
        if kinds and grpo.base_kind(source.row(i)) not in kinds:
            continue
        if args.rows and len(asked) == args.rows:
            break
        right = grpo.right_answer(source, i, score, args.unit)
        grpo.check_question(source, i, right)
        asked.append(Asked(source.question(i, think), right))
    if not asked:
        raise ValueError(f"{args.data}: no row is of --kinds {args.kinds}")
    return asked


def score_answers(backbone, asked: list[Asked], args) -> list[Answer]:
    """Greedy answers to questions."""
    samples = [one.sample for one in asked]
    answers = sft.greedy_answers(
        backbone, samples, args.max_new_tokens, args.batch, args.cuda_graphs
    )
    scored = []
    for (sample, right), (text, truncated) in zip(asked, answers, strict=True):
        score = grpo.answer_score(text, right, args.graded)
        kind = metric_kind(sample.kind)
        line = {  # the keys of this file are older than the names above
            "where": sample.sample_id,
            "kind": kind,
            "question": sample.messages[-1]["content"],
            "right": right.text,
            "answer": text,
            "truncated": truncated,
            "mark": score,
        }
        way = f"{right.score}_graded" if args.graded else right.score
        scored.append(Answer(f"{way} {kind}", score, truncated, line))
    return scored


def metric_kind(kind: str | None) -> str:
    """A row's kind as a word of a metric's name."""
    return "_".join((kind or "").split()) or "all"


def write_answers(path: str | Path, answers: list[Answer]):
    """The file of --answers."""
    lines = [json.dumps(answer.line) + "\n" for answer in answers]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
