"""Public question benchmarks: their rows for `evaluate.py vqa`, and how an answer is marked.

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
"""

import functools
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

import model
import sft
from fast_tokenizer import reading

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
PAIR = rf"[(\[]\s*({NUMBER})\s*,\s*({NUMBER})\s*[)\]]"  # RoboPoint's and Qwen's way to point
LETTER = r"\(([A-H])\)|\b([A-H])(?=[.):]|$)|(?i:answer|option|choice)(?i: is)?:? ?([A-H])\b"


def write(folder, rows):
    """Rows as above -> folder/questions.jsonl, written last; more: "mask", "box", "tolerance"."""
    folder, lines = Path(folder), []
    (folder / "images").mkdir(parents=True, exist_ok=True)

    def save(image, name):
        image = image if isinstance(image, Image.Image) else Image.open(image)
        image.convert("RGB").save(folder / (path := f"images/{name}"))
        return path

    for i, (question, answer, kind, images, *more) in enumerate(rows):
        with reading(f"row {i}"):
            names = [save(x, f"{i}_{k}.png") for k, x in enumerate(images) if x is not None]
            row = {
                "images": names,
                "kind": kind,
                **dict(*more),
                "messages": [
                    {"role": "user", "content": "<image>" * len(names) + question},
                    {"role": "assistant", "content": answer},
                ],
            }
            if "mask" in row:
                row["mask"] = save(row["mask"], f"{i}_mask.png")
            lines.append(json.dumps(row) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))


def mark(score, text, want, row, folder, unit=1):
    """Mark of an answer, 0 .. 1: `exact`, the same text, case and full stop aside, or first word for
    a yes or no; `choice`, the same single letter; `number`, the same ones, within "tolerance";
    `point`, the share inside the "mask" (white) or "box" [left, top, right, bottom] in fractions of
    the image. unit: what points are divided by to be fractions too, 0: the image's pixels."""
    if score == "exact":
        text, want = (t.lower().strip(" .") for t in (text, want))
        return float((re.match(r"\w*", text)[0] if want in ("yes", "no") else text) == want)
    if score == "choice":  # who names two letters has chosen none
        a, b = (
            {"".join(x) for x in re.findall(LETTER, t.upper() if len(t) < 4 else t)}
            for t in (text.strip(), want.strip())
        )
        return float(a == b and len(a) == 1)
    if score == "number":
        a, b = (np.array(re.findall(NUMBER, t), float) for t in (text, want))
        return float(len(a) == len(b) > 0 and abs(a - b).max() <= row.get("tolerance", 0) + 1e-9)
    unit = unit or Image.open(folder / row["images"][0]).size
    xy = np.array(re.findall(PAIR, text), float).reshape(-1, 2) / unit  # (N, 2)
    if "box" in row:
        low, high = np.reshape(row["box"], (2, 2))
        if low.min() < 0 or (low >= high).any() or high.max() > 1:
            raise ValueError(f"box {row['box']} is not left, top, right, bottom in 0 .. 1")
        inside = ((xy >= low) & (xy <= high)).all(1)
    else:
        mask = np.asarray(Image.open(folder / row["mask"]).convert("L")) > 127  # (H, W)
        x, y = np.floor(xy * mask.shape[::-1]).astype(int).T + 1
        inside = np.pad(mask, 1)[y.clip(0, len(mask) + 1), x.clip(0, mask.shape[1] + 1)]
    return float(np.mean(inside)) if len(xy) else 0.0


def marks(backbone, args):
    """Greedy answers to the first question of each row of args.data -> {kind: [mark]}; and to the
    file args.answers. Damaged when a row's own answer would not be marked right."""
    source, found, written, todo = (
        sft.ConversationDataset(args.data, backbone.action_tokenizer, 0),
        {},
        [],
        [],
    )
    grade = functools.partial(mark, args.score, folder=source.path.parent, unit=args.unit)
    for i in source.train[: args.rows or None]:
        row, (messages, images, kind, where) = source.row(i), source[i]
        want = sft.answer_text(messages[1]["content"])
        with reading(where):
            if grade(want, want, row) != 1 and args.score != "point":
                raise ValueError(f"its answer {want!r} is none for --score {args.score}")
        if args.prompt != "row":
            text = model.ask(row["messages"][0]["content"], args.prompt == "think")
            messages = [{"role": "user", "content": text}]
        todo.append((row, want, (messages, images, (kind or "all").replace(" ", "_"), where)))
    texts = sft.greedy_answers(
        backbone, [item for *_, item in todo], args.max_new_tokens, args.batch
    )
    for (row, want, (messages, _, kind, where)), text in zip(todo, texts):
        found.setdefault(kind, []).append(grade(text, want, row))
        written.append(
            {
                "where": where,
                "kind": kind,
                "question": messages[0]["content"],
                "right": want,
                "answer": text,
                "mark": found[kind][-1],
            }
        )
    if args.answers:
        Path(args.answers).write_text("".join(json.dumps(x) + "\n" for x in written))
    return found
