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

easy-VQA, which a package of PyPI carries whole, is small enough to be learned here:

    python -m benchmarks.questions easy-vqa --out data/easy_vqa    # train/ and test/questions.jsonl
    python evaluate.py blind --train data/easy_vqa/train/questions.jsonl \\
        --data data/easy_vqa/test/questions.jsonl    # what can be answered with closed eyes

Another way to score is a function and a line in grpo.SCORES, by which RL rewards answers too.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

import grpo
import model
import sft
from fast_tokenizer import natural, non_negative, read_image, reading, to_rgb
from tools import extras

# ---- Rows ----------------------------------------------------------------------------------------


def write(folder: str | Path, rows):
    """Rows as above -> folder/questions.jsonl, written last, and folder/images/, where a file that
    several rows name is copied once.

    more: a dict with "mask" (an image or its path), "box", "tolerance" or "score", see
    grpo.SCORES."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    copies = {}  # path of an image -> that of its copy below the folder
    lines = []
    for i, given in enumerate(rows):
        with reading(f"row {i}"):
            question, answer, kind, images, *more = given
            names = []
            for k, image in enumerate(images):
                if image is None:
                    continue
                if isinstance(image, Image.Image):
                    names.append(save_image(folder, f"{i}_{k}.png", image, i))
                    continue
                if not isinstance(image, str | Path):
                    raise ValueError(f"an image is {type(image)}; give a PIL image or a path")
                if image not in copies:
                    copies[image] = save_image(folder, f"{i}_{k}.png", image, i)
                names.append(copies[image])
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


# ---- easy-VQA ------------------------------------------------------------------------------------


def easy_vqa(split: str) -> Iterator[tuple]:
    """Rows of a split of easy-VQA (Victor Zhou, MIT licence): "train" has 38,575 about 4,000 images
    of 64 x 64 pixels with one shape each, "test" 9,673 about 1,000. Its 13 answers are of three
    kinds. ValueError without the package."""
    (package,) = extras.require("easy-vqa==1.0", "easy_vqa")
    if split == "train":
        published = zip(*package.get_train_questions(), strict=True)
        paths = package.get_train_image_paths()
    else:
        published = zip(*package.get_test_questions(), strict=True)
        paths = package.get_test_image_paths()
    for question, answer, image in published:
        if answer in ("yes", "no"):
            kind = "yes or no"
        else:
            kind = "shape" if answer in ("circle", "rectangle", "triangle") else "colour"
        yield question, answer, kind, [paths[image]], {"score": "exact"}


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
        asked.append(question_to_ask(source, i, think, score, args.unit))
    if not asked:
        raise ValueError(f"{args.data}: no row is of --kinds {args.kinds}")
    return asked


def question_to_ask(
    source: model.ConversationDataset,
    i: int,
    think: bool | None = None,
    score: str = "",
    unit: float = 1,
) -> Asked:
    """The first question of row i; by default in the row's own mode, scored as the row says."""
    right = grpo.right_answer(source, i, score, unit)
    grpo.check_question(source, i, right)
    return Asked(source.question(i, think), right)


def answer_greedily(backbone, asked: list[Asked], args) -> list[Answer]:
    """A model's most probable answers to questions, scored."""
    samples = [one.sample for one in asked]
    answers = sft.greedy_answers(
        backbone, samples, args.max_new_tokens, args.batch, args.cuda_graphs
    )
    return score_answers(asked, answers, args.graded)


def score_answers(
    asked: list[Asked], answers: list[sft.GreedyAnswer], graded: bool = False
) -> list[Answer]:
    """What answers to questions are worth."""
    scored = []
    for (sample, right), (text, truncated) in zip(asked, answers, strict=True):
        score = grpo.answer_score(text, right, graded)
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
        way = f"{right.score}_graded" if graded else right.score
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


# ---- evaluate.py blind ---------------------------------------------------------------------------


def blind_arguments(add):
    """Flags of `evaluate.py blind`."""
    add("--train", required=True, help="conversations whose answers are known, .jsonl")
    add("--data", required=True, help="conversations to be answered, .jsonl")


def blind_answers(train: str | Path, data: str | Path) -> dict[str, list[Answer]]:
    """Answers that look at no image, by two ways: "majority", the answer that is most frequent in
    `train`, to every question; "question only", the one most frequent there after the same words
    (the majority's after new ones). What a model answers better, it has seen."""
    train_source = model.ConversationDataset(train, None, 0, outside_images=True)
    after_question = {}  # words of a question -> Counter of its answers
    frequency = Counter()
    for i in train_source.train:
        words, answer = words_and_answer(train_source, i)
        after_question.setdefault(words, Counter())[answer] += 1
        frequency[answer] += 1
    majority = most_frequent(frequency)

    source = model.ConversationDataset(data, None, 0, outside_images=True)
    asked = [question_to_ask(source, i) for i in source.train]
    by_question = []
    for one in asked:
        answers = after_question.get(one.sample.messages[-1]["content"])
        text = most_frequent(answers) if answers else majority
        by_question.append(sft.GreedyAnswer(text, truncated=False))
    by_majority = [sft.GreedyAnswer(majority, truncated=False)] * len(asked)
    return {
        "majority": score_answers(asked, by_majority),
        "question only": score_answers(asked, by_question),
    }


def words_and_answer(source: model.ConversationDataset, i: int) -> tuple[str, str]:
    """The first question of row i, and its answer."""
    return source.question(i).messages[-1]["content"], grpo.right_answer(source, i).text


def most_frequent(answers: Counter) -> str:
    """Of equally frequent ones the first in the alphabet."""
    return min(answers, key=lambda answer: (-answers[answer], answer))


# ---- Command -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.questions", description="Writes a set of questions as rows."
    )
    parser.add_argument("name", choices=["easy-vqa"], help="the set")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    for split in ("train", "test"):
        folder = Path(args.out) / split
        if (folder / "questions.jsonl").exists():
            raise ValueError(
                f"--out {folder}: already holds questions; delete them, or name another"
            )
        write(folder, easy_vqa(split))
        print(f"{folder}/questions.jsonl")


if __name__ == "__main__":
    model.run_main(main, "")
