"""Rejection sampling: a model's own thoughts that led to right answers, as rows for sft.py.

    python evaluate.py vqa --policy runs/sft --data D/conversations.jsonl --score row \\
        --prompt think --samples 8 --keep 2 --keep-right D/own_thoughts.jsonl
    python evaluate.py actions --policy runs/sft --data D/episodes --split train \\
        --prompts 4000 --samples 8 --keep-right D/own_action_thoughts.jsonl

The paper distils its reasoning data from a larger model; these are the model's own. A thought is
kept where it is well formed and its answer is worth at least --least (graded, as RL rewards it): 1,
right, of words; 0.5 of actions, the best first. A row holds the thought and what is right: of words
the answer itself, of actions those recorded (field "chunk"), so that a near miss teaches no error.
Of several thoughts about one question the diverse ones come first, see diverse().
"""

import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import grpo
import model
import vla
from benchmarks.questions import Asked
from fast_tokenizer import IMAGE_TAGS, EpisodeFile, count, natural, share

# ---- Flags ---------------------------------------------------------------------------------------


def arguments(add):
    """Flags of both commands."""
    add(
        "--keep-right", default="", help="write own thoughts that led to right answers here, .jsonl"
    )
    add("--keep", type=count, help="of a question at most so many, the diverse ones first; 2")
    add(
        "--least",
        type=share,
        help="what a kept answer is worth at least; 1 of words, 0.5 of actions",
    )


def set_defaults(args, defaults: dict[str, int | float]):
    """Gives flags that --keep-right alone reads their defaults; without it ValueError for one that
    would do nothing."""
    for name, value in defaults.items():
        is_given = getattr(args, name) is not None
        if is_given and not args.keep_right:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: of answers to be kept; name a file by --keep-right")
        if args.keep_right and not is_given:
            setattr(args, name, value)


def check_file(file: str):
    """Before hours are spent: ValueError or OSError when no rows can be written to this file."""
    if not file:
        return
    if Path(file).is_dir() or not file.endswith(".jsonl"):
        raise ValueError(f"--keep-right {file}: name a file that ends in .jsonl")
    Path(file).parent.mkdir(parents=True, exist_ok=True)


def answer_arguments(add):
    """Further flags of `evaluate.py vqa`."""
    add("--samples", type=count, help="answers to keep from, a question; 8")
    add(
        "--holdout-rows",
        type=natural,
        help="last rows of the file that are not asked, as no stage trains on them; 256",
    )


def check_answers(args):
    """Flags of `evaluate.py vqa`. sft.py must find the images of args.data from the file to be
    written."""
    set_defaults(args, {"samples": 8, "keep": 2, "least": 1.0, "holdout_rows": 256})
    check_file(args.keep_right)
    if not args.keep_right:
        return
    if args.prompt != "think":
        raise ValueError(f"--keep-right keeps thoughts: give --prompt think, not {args.prompt}")
    if Path(args.keep_right).resolve() == Path(args.data).resolve():
        raise ValueError(f"--keep-right {args.keep_right}: is --data itself; name another file")
    way = relative(Path(args.data).parent, args.keep_right)
    if way.split(os.sep)[0] == os.pardir and not args.outside_images:
        raise ValueError(
            f"--keep-right {args.keep_right}: its folder does not hold the images of {args.data}, "
            f"which sft.py then refuses; give a file in {Path(args.data).parent}, or trust it with "
            "--outside-images"
        )


def check_actions(args):
    """Flags of `evaluate.py actions`. Rows to train on are of no held-out episode."""
    set_defaults(args, {"keep": 2, "least": 0.5})
    check_file(args.keep_right)
    if args.keep_right and args.split != "train":
        raise ValueError(
            f"--keep-right of --split {args.split}: held-out episodes are not to be trained on; "
            "give --split train"
        )


def relative(path: Path, file: str) -> str:
    """A path as seen from the folder of `file`. Below it links stay as they are, since
    model.image_path() looks at the words of a path; elsewhere ".." follows them."""
    as_written = os.path.relpath(path.absolute(), Path(file).absolute().parent)
    if os.pardir not in Path(as_written).parts:
        return as_written
    return os.path.relpath(path.resolve(), Path(file).resolve().parent)


# ---- Which thoughts ------------------------------------------------------------------------------


def diverse(thoughts: list[str], k: int) -> list[int]:
    """Which k of the thoughts, none of them blank, to keep, in the order of choice: the first, then
    each time the one whose most similar thought among those chosen is least similar. Similar are
    two by the words and pairs of neighbouring words that both have, over those that either has
    (Jaccard); two in which these are the same are never both chosen.

        of "a b c", "a b d", "e" two: the first and "e", as "a b d" shares a, b and "a b" of 7
    """
    parts = [words_and_pairs(thought) for thought in thoughts]
    chosen = []
    similarity = np.full(len(thoughts), -1.0)  # of each to the most similar one that is chosen
    while len(chosen) < k and (similarity < 1).any():
        best = int(similarity.argmin())
        chosen.append(best)
        for i, other in enumerate(parts):
            shared = len(other & parts[best]) / len(other | parts[best])
            similarity[i] = max(similarity[i], shared)
    return chosen


def words_and_pairs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {(word,) for word in words} | set(itertools.pairwise(words))


# ---- Answers in words ----------------------------------------------------------------------------


def kept_answers(backbone, asked: list[Asked], keys: list[int], args) -> list[list[dict]]:
    """args.samples answers to each question -> rows of those that are kept. keys: one a question,
    of which the draws are a function."""
    kept = []
    n = args.samples
    for start in range(0, len(asked), args.batch):
        questions = asked[start : start + args.batch]
        rows = [model.encode_sample(backbone, one.sample, prompt_only=True) for one in questions]
        samples = model.generate(
            backbone,
            rows,
            n,
            args.max_new_tokens,
            seed=args.seed,
            keys=keys[start : start + args.batch],
            cuda_graphs=args.cuda_graphs,
        )
        for b, one in enumerate(questions):
            right = []
            for ids in samples["ids"][b * n : (b + 1) * n].tolist():
                words = model.parse_words(backbone, ids)
                worth = grpo.answer_score(words.answer, one.right, graded=True)
                is_worth_it = words.has_thought and worth >= args.least - 1e-9
                if is_worth_it and is_plain(words.thought + words.answer):
                    right.append(words)
            chosen = diverse([words.thought for words in right], args.keep)
            kept.append([own_row(one, right[i], args.keep_right) for i in chosen])
    return kept


def is_plain(text: str) -> bool:
    """Whether sft.py would read the text as text."""
    return not any(tag in text for tag in (*IMAGE_TAGS, "<ACTION>"))


def own_row(asked: Asked, words: model.ParsedWords, file: str) -> dict:
    """The row that was asked, answered by the model, its paths as seen from `file`."""
    right = asked.right
    # a chunk is of a later turn, which is left out
    row = {name: value for name, value in right.row.items() if name not in ("sample_id", "chunk")}
    asked_images = row["images"][: len(asked.sample.images)]
    row["images"] = [relative(right.folder / name, file) for name in asked_images]
    if "mask" in row:
        row["mask"] = relative(right.folder / row["mask"], file)
    answered = len(asked.sample.messages)
    answer = f"<think>{words.thought}</think><answer>{words.answer}</answer>"
    row["messages"] = [*row["messages"][:answered], {"role": "assistant", "content": answer}]
    return row


def write(kept: list[list[dict]], args):
    """The rows of all questions -> the file."""
    path = Path(args.keep_right)
    rows = [row for of_question in kept for row in of_question]
    if not rows:
        raise ValueError(
            f"{path}: no answer had a thought, its format and a worth of {args.least:g}; raise "
            "--samples, lower --least, or train the model further"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answered = sum(bool(of_question) for of_question in kept)
    print(f"{path}: {len(rows)} rows, of {answered} of {len(kept)} questions")


# ---- Actions -------------------------------------------------------------------------------------


class KeptThought(NamedTuple):
    """A thought that led to actions near the recorded ones."""

    thought: str
    episode: EpisodeFile
    step: int
    chunk: np.ndarray  # (K, A) action_chunks() of the recording, dataset units


def kept_actions(backbone, completions: list[list[int]], prompts, args) -> list[list[KeptThought]]:
    """Of the args.samples completions of each prompt (evaluate.Prompts) those that are kept: by
    r_a, the best first, and of equal ones the diverse first."""
    n = args.samples
    targets = [target for target in prompts.targets for _ in range(n)]
    _, parts = grpo.reward(backbone, completions, targets, args.reward)
    kept = []
    for b, (episode, step) in enumerate(prompts.steps):
        by_worth = {}  # r_a -> thoughts
        for g in range(b * n, (b + 1) * n):
            thought = vla.thought_text(backbone, completions[g])
            is_worth_it = parts["r_f"][g] and parts["r_a"][g] >= args.least - 1e-9
            if is_worth_it and is_plain(thought):
                by_worth.setdefault(parts["r_a"][g], []).append(thought)
        thoughts = []
        for worth in sorted(by_worth, reverse=True):
            some = by_worth[worth]
            thoughts += [some[i] for i in diverse(some, args.keep)]
        thoughts = list(dict.fromkeys(thoughts))[: args.keep]  # one may have led to several chunks
        chunk = prompts.chunks[b]
        kept.append([KeptThought(thought, episode, step, chunk) for thought in thoughts])
    return kept


def write_actions(kept: list[list[KeptThought]], args):
    """Thought + action rows, see sft.py, and their frames beside the file."""
    path = Path(args.keep_right)
    frames = f"{path.stem}_frames"
    rows = []  # of each question
    drawn = set()  # (episode, step): what is drawn again is the same question
    for number, thoughts in enumerate(kept):
        name = f"{frames}/{number:07d}.png"
        if thoughts:
            step = (thoughts[0].episode.name, thoughts[0].step)
            if step in drawn:
                continue
            drawn.add(step)
        rows.append([])
        for one in thoughts:
            (path.parent / frames).mkdir(parents=True, exist_ok=True)
            Image.fromarray(one.episode.frame(one.step)).save(path.parent / name)
            question = "<image>" + model.action_question(one.episode.task)
            answer = f"<think>{one.thought}</think><answer><ACTION></answer>"
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            chunk = np.asarray(one.chunk, float).round(6).tolist()
            rows[-1].append({"images": [name], "messages": messages, "chunk": chunk})
    write(rows, args)
