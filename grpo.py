"""Stage 2 of RoboAlign (arXiv 2603.21341): GRPO. Think in words, then act; learn from both.

In: a checkpoint of sft.py (with its FAST tokenizer) and recorded episodes, or rows of questions.
Out: the same model with all weights trained, whose thoughts lead to better action tokens.
1. draw prompts (image, instruction) at recorded steps; target: the FAST ids of the next K actions
2. sample G completions of each: <think>words</think><answer>action tokens</answer>
3. reward (r_f + r_a) / 2: r_f well formed and decodable, r_a common prefix with target / max(m, n)
4. advantage of a completion: (r - mean) / (std + 1e-6) in its group of G (GRPO, 2402.03300)
5. a few updates a rollout, each on its own prompts: clipped ratio, dual clip, mean over tokens
6. + 0.01 x KL (k3) to the model that RL started from, in the loss; repeat
--credit expected pays a thought the mean of r_a over all answers to it, not what a drawn one got.
Our deviations: r_a is over max(m, n), the paper's over the target's m, so surplus tokens cost; and
it is 0 where r_f is 0. Groups whose rewards are all equal are not forwarded (--no-skip-zero-std
does): they get no gradient of the KL either, while their tokens stay in the mean's divisor. The G
completions of a prompt share its keys and values, in sampling and update: same gradients.
A question is answered in words instead, and r_a is its row's "score": language and visual RL, alone
or mixed with episodes. A first reader may skip "Scores of answers", "Log-probabilities" and
"Credit".

Reads --init, --data. Writes runs/grpo/{log.jsonl, step_*/, final/}.
python grpo.py                                   # tabletop, one CPU process
torchrun --nproc_per_node 2 grpo.py              # 2 CPU processes, 2 s a step; or 2 GPUs
torchrun --nproc_per_node 8 grpo.py paper        # 8 GPUs; took the authors about 1 h
python grpo.py language --data data/tabletop/conversations.jsonl    # or visual: points and paths"""

import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fast_tokenizer import (
    BelowOne,
    Count,
    FastTokenizer,
    Natural,
    NonNegative,
    Positive,
    Share,
    answer_help,
    join_splits,
    normalize,
    read_image,
    reading,
    warn_of_other_split,
)

if __name__ == "__main__":
    answer_help(__file__)  # --help ends here, before torch and transformers take their seconds

import torch
from torch import distributed, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer

import model
from model import Backbone, ConversationDataset, Dist, EpisodeDataset, Row, Source, all_sum


@dataclass(frozen=True)
class Config:
    preset: str = ""
    # what is read and written
    init: str = "runs/sft/final"  # checkpoint of stage sft, or grpo to go on from it as a new run
    data: str = "data/tabletop/episodes"  # path:weight,... as in sft.py: episodes, conversations
    kinds: str = ""  # of conversations only rows of these kinds, as where,what; empty: all
    holdout_rows: Natural = 256  # rows of each .jsonl kept for evaluation, the last; of episodes 5%
    outside_images: bool = False  # images of a .jsonl may lie outside its folder
    out: str = "runs/grpo"  # folder of checkpoints and log
    # rollouts
    seed: Natural = 0  # prompts and samples are a function of (seed, step, index)
    steps: Natural = 100  # rollout steps
    prompts: Count = 32  # prompts a rollout step, all ranks together
    group: Count = 8  # completions a prompt (G)
    max_new_tokens: Count = 96  # longest completion
    temperature: Positive = 1.0  # of sampling and of the log-probabilities in the loss
    thought: str = "own"  # before an answer: own, none, or filler (full stops, not sampled)
    filler: Count = 44  # tokens of a filler thought; SFT's own have so many on Tabletop
    dynamic_sampling: Natural = 0  # rounds of fresh prompts for groups with equal rewards (DAPO)
    max_pixels: Natural = 0  # larger images are shrunk to so many pixels; 0: as the backbone says
    # reward and objective
    reward: str = "prefix"  # r_a of actions, one of REWARDS; of words, as their row says
    advantage: str = "grpo"  # one of ADVANTAGES; drgrpo: no std, a constant for the token count
    credit: str = "all"  # which tokens are paid r_a, or its mean: one of CREDITS
    clip_low: NonNegative = 0.2  # ratio at least 1 - this
    clip_high: NonNegative = 0.3  # ratio at most 1 + this
    dual_clip: NonNegative = 3.0  # loss at most this x |A| where the advantage A < 0; 0: off
    kl_coef: NonNegative = 0.01  # weight of the KL to the initial model; 0: off
    anchor_coef: NonNegative = 0.0  # weight of the distance of features from that model's; 0: off
    anchor_layer: Natural = 0  # LLM layer of these features, as vla.py's --layer; 0: its default
    recompute_old_logp: bool = False  # ratios to the update's own log-probs, not the sampler's
    skip_zero_std: bool = True  # do not forward groups whose rewards are all equal
    # adapters
    lora: Natural = 0  # rank of adapters that train in place of the weights; 0: the weights train
    lora_alpha: Positive = 32.0  # adapters count alpha / rank
    lora_targets: str = ""  # linear layers of the LLM to adapt, as q_proj,v_proj; empty: all
    bf16_base: bool = False  # with --lora: what is frozen is kept in bf16, in half the memory
    # optimizer
    batch: Count = 16  # prompts an update, all ranks together; prompts / batch updates a step
    lr: Positive = 3e-5  # AdamW, constant
    warmup_ratio: Share = 0.0  # share of the steps
    weight_decay: NonNegative = 0.01  # not on norms and biases
    beta2: BelowOne = 0.999  # of AdamW; beta1 is 0.9
    max_grad_norm: NonNegative = 1.0  # gradients are clipped to this global norm; 0: not
    # does not affect results, but for rounding
    micro_batch: Count = 8  # prompts a rank forwards and backwards at once; lower it for memory
    rollout_batch: Natural = 0  # prompts a rank samples at once, of like length; 0: all it has
    cuda_graphs: bool = True  # on a GPU, replay decoding steps as CUDA graphs
    recompute: bool = False  # activation checkpointing: less memory, a third more time an update
    cpu_offload: bool = False  # keep the reference model in the CPU's memory
    shards: Natural = 0  # ranks that share a copy of the weights, others mirror it; 0: all
    timeout_hours: Positive = 6.0  # ranks wait so long for the slowest, as when it downloads
    eval_every: Natural = 25  # steps between held-out evaluations, also at the end; 0: never
    eval_prompts: Count = 64  # held-out prompts of all sources, fixed over the run, each once
    show_every: Natural = 10  # steps between printed rollouts; 0: never
    save_every: Natural = 50  # steps between checkpoints with optimizer; 0: only the final one
    keep: Natural = 0  # newest of these that stay; 0: all
    resume: bool = False  # go on from the newest checkpoint in OUT
    changed_data: bool = False  # --resume although --data, or --init of --lora, has changed

    @property
    def needs_reference(self) -> bool:
        """Whether the model that RL starts from is kept."""
        return self.kl_coef > 0 or self.anchor_coef > 0


PRESETS = {
    "tabletop": {},
    "speedrun": {"steps": 80, "lr": 2e-5, "save_every": 0},
    # RL on answers in words, by themselves: two of the paper's baselines, on Tabletop's questions
    "language": {
        "data": "data/tabletop/conversations.jsonl", "out": "runs/grpo-language",
        "kinds": "where,what,relation,holding,gripper,choice,caption,"
        "target,direction,phase,fingers,movement",
        "steps": 80, "lr": 2e-5, "save_every": 0,
    },
    "visual": {
        "data": "data/tabletop/conversations.jsonl", "out": "runs/grpo-visual",
        "kinds": "point,points,trajectory", "steps": 80, "lr": 2e-5, "save_every": 0,
    },
    # Paper section "RL": 12.8K samples, 1 epoch = 25 rollout steps of 4 updates of 640 completions.
    "paper": {
        "init": "runs/sft-paper/final", "data": "data/bridge", "out": "runs/grpo-paper",
        "steps": 25, "prompts": 512, "batch": 128, "group": 5, "max_new_tokens": 2048, "lr": 1e-6,
        "micro_batch": 4, "rollout_batch": 32, "recompute": True,
        "eval_every": 5, "eval_prompts": 512, "show_every": 1, "save_every": 5, "keep": 2,
    },
}  # fmt: skip


# ---- Data ----------------------------------------------------------------------------------------


class RightAnswer(NamedTuple):
    """What an answer in words is scored by."""

    score: str  # one of SCORES
    text: str  # the row's own answer
    row: dict  # of the file: "tolerance", "box", "mask" or "grid", see the scores
    folder: Path  # of the file
    unit: float = 1  # what points are divided by to be shares of the image; 0: its pixels


Target = list[int] | RightAnswer  # of a prompt: action ids of the next K actions, or words


class Pick(NamedTuple):
    """What a prompt is about."""

    source: int  # of those that --data names
    i: int  # index in it: a step of its episodes, a row of its file


BEYOND_ANY_RUN = 1 << 40  # more prompts than any run draws


def draw_prompts(
    seed: int,
    sources: list[Source],
    weights: list[float],
    prompt_numbers: Sequence[int],
    again: int = 0,
) -> list[Pick]:
    """What each prompt is about. The prompts of a run are numbered: step * cfg.prompts + index in
    the step. Sources are drawn by weight, as in sft.py; of each source every row comes once,
    shuffled, before any comes again, as in an epoch of the paper. again: the round of dynamic
    sampling, from 1; each round has other draws for the same numbers. 0: none.

        number            0 1 2 3 4
        its source        0 1 0 0 1
        drawn_up_to[0]    1 1 2 3 3    number 3 is the third draw of source 0: order[2] of its rows
    """
    total = max(prompt_numbers, default=-1) + 1
    p = np.asarray(weights, float) / sum(weights)
    source_of = model.rng(seed, "sources", again).choice(len(sources), total, p=p)  # of each number
    drawn_up_to = [np.cumsum(source_of == s) for s in range(len(sources))]  # of each source
    picks = []
    for number in prompt_numbers:
        s = int(source_of[number])
        train = sources[s].train
        draws_before = int(drawn_up_to[s][number]) - 1  # of this source
        draws_before += again * BEYOND_ANY_RUN  # so the epoch is one that no run reaches
        epoch, index = divmod(draws_before, len(train))
        order = shuffled_rows(seed, s, len(train), epoch)
        picks.append(Pick(s, train[order[index]]))
    return picks


@lru_cache(maxsize=16)
def shuffled_rows(seed: int, source: int, n: int, epoch: int) -> list[int]:
    """The order of a source's n training rows in an epoch."""
    # the first source draws as the only one of a run does
    keys = ("prompts", epoch, source) if source else ("prompts", epoch)
    return model.rng(seed, *keys).permutation(n).tolist()


def prompt_rows(
    backbone: Backbone, sources: list[Source], picks: Sequence[Pick], cfg: Config
) -> tuple[list[Row], list[Target]]:
    """Prompts, as --thought asks -> rows, targets. No picks, no prompts: a rank may have none."""
    rows, targets = [], []
    for s, i in picks:
        sample = sources[s].question(i, think=cfg.thought != "none")
        row = model.encode_sample(backbone, sample, prompt_only=True)
        if cfg.thought == "filler":
            filler = model.filler_thought(backbone, cfg.filler)
            row = model.with_thought(row, model.encode_thought(backbone, filler))
        rows.append(row | {"sample_id": sample.sample_id})
        targets.append(target_of(sources[s], i))
    return rows, targets


def target_of(source: Source, i: int) -> Target:
    """Action ids of the K actions that follow, or what an answer in words is scored by. Of a row of
    several turns its first answer says which."""
    if isinstance(source, EpisodeDataset):
        return source.target_ids(i)
    row = source.row(i)
    first_answer = next(m["content"] for m in row["messages"] if m["role"] == "assistant")
    if "<ACTION>" in first_answer:
        return source.action_ids(row, source.sample_id(i))
    return right_answer(source, i)


def right_answer(
    source: ConversationDataset, i: int, score: str = "", unit: float = 1
) -> RightAnswer:
    """What answers to row i are scored by: by its own "score", or by another one. ValueError naming
    the row when it has no first question, "score" is unknown, or a field is none that it reads."""
    sample_id = source.sample_id(i)
    row = {**source.row(i), "sample_id": sample_id}
    score = score or row.get("score")
    if score not in tuple(SCORES):  # a tuple, since JSON may hold a list, which is no key
        raise ValueError(f'{sample_id}: its "score" is {score!r}; write one of {", ".join(SCORES)}')
    fault = field_fault(score, row)
    if fault:
        raise ValueError(f"{sample_id}: for the score {score} its {fault}")
    answered = len(source.question(i).messages)
    text = model.answer_text(source[i].messages[answered]["content"])
    return RightAnswer(score, text, row, source.path.parent, unit)


def field_fault(score: str, row: dict) -> str:
    """What is wrong with the fields of a row that a score reads, and the cure; "" for nothing."""
    tolerance = row.get("tolerance", 0)
    if score in ("number", "items") and not are_numbers([tolerance], 1, 0):
        return f'"tolerance" is {tolerance!r}; write a number of at least 0, or leave it out'
    if score in ("point", "path") and "grid" in row and not are_numbers(row["grid"], 2, 1):
        return f'"grid" is {row["grid"]!r}; write [columns, rows], numbers of at least 1'
    if score == "point" and "box" in row:
        box = row["box"]
        if not are_numbers(box, 4, 0, 1) or not (box[0] < box[2] and box[1] < box[3]):
            return f'"box" is {box!r}; write [left, top, right, bottom] in 0 .. 1'
    elif score == "point" and not isinstance(row.get("mask"), str):
        return (
            f'"mask" is {row.get("mask")!r}; write the path of an image, or a "box" [left, top, '
            "right, bottom] in 0 .. 1"
        )
    return ""


def are_numbers(values: object, count: int, least: float, most: float = 1e300) -> bool:
    """Whether JSON holds a list of so many numbers in least .. most; true and NaN are none."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(type(value) in (int, float) and least <= value <= most for value in values)


def check_question(source: ConversationDataset, i: int, target: Target) -> None:
    """Raises Damaged if row i cannot be asked: its text, its tags, its images, of which the headers
    are opened. If it is answered in words, also if that answer does not earn 1 by its own score;
    not of a point, whose row says where it may be and no more."""
    sample_id = source.sample_id(i)
    question = source.question(i)
    with reading(sample_id):
        messages, image_sizes = source.outline(i)
        model.check_messages(messages, len(image_sizes))
        model.check_text(question.kind or "")
        if not isinstance(target, RightAnswer):
            return
        if isinstance(target.row.get("mask"), str):  # else its score does not read it
            source.image_path(target.row["mask"], sample_id)
        worth = answer_score(target.text, target)
        if worth != 1 and target.score != "point":
            raise ValueError(f"its answer {target.text!r} is none for the score {target.score}")


def named_kinds(text: str) -> set[str]:
    """The value of --kinds, "where,what"; none: all."""
    return {kind.strip() for kind in text.split(",") if kind.strip()}


def base_kind(row: dict) -> str:
    """The kind of question of a row: "point" of "point", "point+think" and "point+choice"."""
    return (row.get("kind") or "").partition("+")[0]


def keep_kinds(sources: list[Source], kinds: str) -> None:
    """Narrows each source of conversations to the rows of these kinds ("": of all), and checks
    them. "point" is "point+think" too. ValueError for a kind that no row has."""
    wanted = named_kinds(kinds)
    seen = set()
    for source in sources:
        if isinstance(source, EpisodeDataset):
            continue
        kept = []
        for i in range(source.units):
            row = source.row(i)
            kind = base_kind(row)
            if wanted and kind not in wanted:
                continue
            seen.add(kind)
            check_question(source, i, target_of(source, i))
            kept.append(i)
        n_train = len(source.train)
        source.train = [i for i in kept if i < n_train]
        source.held = [i for i in kept if i >= n_train]
        if not source.train:
            raise ValueError(f"{source.path}: no row to train on is of --kinds {kinds}")
    if wanted - seen:
        raise ValueError(f"--kinds: no row is of kind {', '.join(sorted(wanted - seen))}")


# ---- Scores of answers in words ------------------------------------------------------------------
#
# What an answer to a question is worth, 0 .. 1, to RL and to evaluate.py vqa. A row's "score" names
# one of SCORES. Of both answers plain() leaves what is said; who names two options has named none,
# and numbers in words ("twelve") are worth 0. RL asks for the `graded` worth: how near an answer
# is, where a group of wrong ones would all earn 0; what is right is worth 1 either way.

NEAR = 0.1  # shares of the image: a point or path so far off is worth 1 / e
PATH_POINTS = 32  # of a path, when two are compared


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
    r"""What an answer says, without how it is dressed: "**Yes**" -> "Yes", "$12$" -> "12",
    "The answer is \boxed{B}." -> "B"."""
    text = text.translate(AS_ASCII)
    boxes = re.findall(BOXED, text)
    if boxes:
        text = boxes[-1]  # the last one: what stands before it is the working
    text = re.sub(LATEX_WORDS, r"\1", text).replace("{,}", ",")
    text = re.sub(r"\*\*|__|[`$]|\\[()\[\],]", "", text)
    return re.sub(INTRODUCTION, "", text.strip(" \t\n*_"))


def exact(answer: str, right: RightAnswer, graded: bool) -> float:
    """1 for the same text, case and punctuation around it aside, or the same number; for a yes or
    no, for the same first word ("Yes or no" is none)."""
    answer = undecorated(answer)
    right_text = undecorated(right.text)
    if right_text in ("yes", "no"):
        said = re.match(r"(yes|no)\b(?!\s*(?:/|&|or\b|and\b)\s*(?:yes|no)\b)", answer)
        return float(said is not None and said[1] == right_text)
    if answer == right_text:
        return float(answer != "")
    wanted = as_number(right_text)
    return float(wanted is not None and as_number(answer) == wanted)


def undecorated(text: str) -> str:
    """plain() in small letters, without the punctuation around it; the point of ".5" stays."""
    text = plain(text).casefold().rstrip(DECORATION)
    bare = text.lstrip(DECORATION)
    if text.removesuffix(bare).endswith(".") and bare[:1].isdecimal():
        return "." + bare
    return bare


def as_number(text: str) -> float | None:
    """The number that a text is, "1,024" -> 1024.0, "1.5" -> 1.5; None if it is something else."""
    if not re.fullmatch(f"(?:{THOUSANDS}|{NUMBER})", text):
        return None
    joined = readings(text)[0]
    return joined[0]


def choice(answer: str, right: RightAnswer, graded: bool) -> float:
    """1 for the same single letter; who names two has chosen none."""
    chosen = letters(answer)
    return float(chosen == letters(right.text) and len(chosen) == 1)


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
LONE_NUMBER = rf"(?<!\S){NUMBER}(?!\S)"  # not the 5 of "d5"
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


def number(answer: str, right: RightAnswer, graded: bool) -> float:
    """1 for the same numbers in the same order, each within the row's "tolerance" (0 if none), else
    0. Graded: the mean of exp(-excess / tolerance) over the numbers, excess being what a number is
    off beyond the tolerance (none: exp(-excess)). The tolerance is the scale since it says what the
    row's unit calls near.

        right "10 4 0", tolerance 2, answer "10 8 0"  ->  0;  graded (1 + e^-1 + 1) / 3 = 0.79"""
    worths = [0.0]
    for said in readings(answer):
        for wanted in readings(right.text):
            if len(said) == len(wanted) and said:
                worths.append(numbers_worth(said, wanted, right, graded))
    return max(worths)


def numbers_worth(said: list[float], wanted: list[float], right: RightAnswer, graded: bool):
    """What equally many numbers are worth; see number()."""
    tolerance = right.row.get("tolerance", 0)
    excess = np.abs(np.subtract(said, wanted)) - tolerance
    if not graded:
        return float(excess.max() <= 1e-9)
    return float(np.exp(-np.maximum(excess, 0) / (tolerance or 1)).mean())


def items(answer: str, right: RightAnswer, graded: bool) -> float:
    """A list divided by commas, in any order: the share of items that are right, over the longer of
    the two. An item is right by its words and, as in number(), the numbers that stand among them.

        right "plate 10 4, red cube d5", answer "red cube d5, plate 10 9, gripper a1"  ->  1 / 3"""
    unmatched = split_items(answer)
    wanted = split_items(right.text)
    longer = max(len(unmatched), len(wanted), 1)
    worth = 0.0
    for words, numbers in wanted:
        worths = {}  # of the answer's items that it may be -> what they are worth
        for i, (other_words, said) in enumerate(unmatched):
            if other_words == words:
                worths[i] = numbers_worth(said, numbers, right, graded) if numbers else 1.0
        if worths:
            best = max(worths, key=worths.get)
            worth += worths[best]
            del unmatched[best]
    return worth / longer


def split_items(text: str) -> list[tuple[str, list[float]]]:
    """A list divided by commas -> of each item its words, with # for each number, and these."""
    parts = []
    for item in re.split(r"[,\n]", undecorated(text)):
        words = " ".join(item.split())
        if words:
            numbers = [float(number) for number in re.findall(LONE_NUMBER, words)]
            parts.append((re.sub(LONE_NUMBER, "#", words), numbers))
    return parts


def point(answer: str, right: RightAnswer, graded: bool) -> float:
    """The share of the answer's points inside the row's "mask" (white) or "box" [left, top, right,
    bottom], 0 .. 1 of the image. Graded: the mean over the points of exp(-distance / NEAR), with
    the distance to mask or box in shares of the image, 0 inside. ValueError for a mask without
    white."""
    points = points_in(answer, right)  # (N, 2)
    if "box" in right.row:
        distances = box_distances(points, right.row["box"])
    else:
        mask = open_of_row(right, right.row["mask"]).mean(2) > 127  # (H, W)
        if not mask.any():
            raise ValueError(
                f"{right.row['mask']}: nothing is white in it, so that every answer is wrong"
            )
        distances = mask_distances(points, mask)
    if not len(points):
        return 0.0
    return float(np.mean(np.exp(-distances / NEAR) if graded else distances == 0))


def path(answer: str, right: RightAnswer, graded: bool) -> float:
    """exp(-d / NEAR), d the mean distance between the two paths (shares of the image) when both
    have PATH_POINTS points, equally far apart along them; 0 for no path. Graded or not."""
    said = points_in(answer, right)
    wanted = points_in(right.text, right)
    if not len(said) or not len(wanted):
        return 0.0
    gaps = along_path(said) - along_path(wanted)  # (PATH_POINTS, 2)
    return float(np.exp(-np.linalg.norm(gaps, axis=1).mean() / NEAR))


def along_path(points: np.ndarray) -> np.ndarray:
    """Points (N, 2) of a path -> (PATH_POINTS, 2), equally far apart along it."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)  # (N - 1,)
    lengths = np.concatenate([[0.0], np.cumsum(steps)])  # (N,) from the start
    places = np.linspace(0, lengths[-1], PATH_POINTS)
    return np.stack([np.interp(places, lengths, axis) for axis in points.T], 1)


def points_in(text: str, right: RightAnswer) -> np.ndarray:
    """The points that a text names, (N, 2) x, y in shares: "(0.3, 0.4)". Where the row has a "grid"
    [columns, rows] they are the middles of its cells: "d5" is in column 4 of row 5."""
    if "grid" in right.row:
        cells = re.findall(r"\b([a-z])(\d{1,2})\b", plain(text).casefold())
        middles = [(ord(column) - ord("a") + 0.5, int(row) - 0.5) for column, row in cells]
        return np.array(middles, float).reshape(-1, 2) / right.row["grid"]
    scale = right.unit
    if not scale:
        height, width = open_of_row(right, right.row["images"][0]).shape[:2]
        scale = (width, height)
    pairs = np.array(re.findall(PAIR, text.translate(AS_ASCII)), float)
    return (pairs.reshape(-1, 2) / scale).clip(-99, 99)  # "1e999" is far outside, and no more


def open_of_row(right: RightAnswer, name: str) -> np.ndarray:
    """An image that the row names, (H, W, 3) uint8 as training sees it. Damaged naming the row."""
    path = right.folder / name
    return read_image(path, f"{right.row.get('sample_id', '')}: {path}")


def box_distances(points: np.ndarray, box: list[float]) -> np.ndarray:
    """Points (N, 2) in 0 .. 1 -> how far from the box they are, 0 inside, (N,)."""
    low, high = np.reshape(box, (2, 2))
    outside = np.maximum(np.maximum(low - points, points - high), 0)
    return np.linalg.norm(outside, axis=1)


def mask_distances(points: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Points (N, 2) in 0 .. 1 -> how far from the mask (H, W) they are: 0 in a pixel where it is
    true, else to the middle of the nearest such pixel, (N,)."""
    size = np.array(mask.shape[::-1])  # width, height
    # 1. the pixel in which each point lies; a frame of False catches points outside
    framed = np.pad(mask, 1)  # (H + 2, W + 2)
    pixels = np.floor(points * size).astype(int) + 1  # (N, 2) column and row of framed
    columns, rows = pixels.clip(0, size + 1).T  # (N,) each
    is_inside = framed[rows, columns]  # (N,)
    # 2. the middle of the nearest white pixel
    white_rows, white_columns = np.nonzero(mask)
    middles = (np.stack([white_columns, white_rows], 1) + 0.5) / size  # (M, 2)
    nearest = [np.linalg.norm(middles - point, axis=1).min() for point in points]
    return np.where(is_inside, 0.0, np.reshape(nearest, -1))


SCORES = {
    "exact": exact,
    "choice": choice,
    "number": number,
    "items": items,
    "point": point,
    "path": path,
}


def answer_score(answer: str, right: RightAnswer, graded: bool = False) -> float:
    """What an answer is worth, 0 .. 1; graded: by how near it is."""
    return SCORES[right.score](answer, right, graded)


# ---- Reward --------------------------------------------------------------------------------------


# fork point: the reward. r_a of actions is a function (action tokenizer, N generated and N target
# lists of action ids) -> (N,) in [0, 1], with a name in REWARDS, which --reward and evaluate.py
# take. r_a of words is one of SCORES. reward() checks both.
IdLists = list[list[int]]


def prefix_rewards(_: FastTokenizer, generated: IdLists, targets: IdLists) -> np.ndarray:
    """Common prefix over the longer of the two (the paper: over the target). Brittle: one early
    coefficient that is off by a rounding step, and nothing after it counts."""
    return np.array([model.prefix_reward(a, b) for a, b in zip(generated, targets, strict=True)])


def action_closeness(
    action_tokenizer: FastTokenizer, generated: IdLists, targets: IdLists
) -> np.ndarray:
    """exp(-L1 / 0.1) of decoded actions, L1 the mean over K x A in normalised units (range 2); 0
    where they do not decode."""
    actions, decodes = action_tokenizer.decode(generated)
    target_actions, _ = action_tokenizer.decode(targets)  # (N, K, A)
    return np.where(decodes, closeness(action_tokenizer, actions, target_actions), 0.0)


def closeness(action_tokenizer: FastTokenizer, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(-L1 / 0.1) between chunks a and b (N, K, A) -> (N,); NaN where one is."""
    if action_tokenizer.stats is not None:
        a = normalize(a, action_tokenizer.stats)
        b = normalize(b, action_tokenizer.stats)
    return np.exp(-np.abs(a - b).mean((1, 2)) / 0.1)


def ladder_rewards(
    action_tokenizer: FastTokenizer, generated: IdLists, targets: IdLists
) -> np.ndarray:
    """The prefix reward with a soft "equal": the mean, over k up to the longer of the two, of
    exp(-L1 / 0.1) between what the first k tokens of each decode to, later coefficients 0. A rung
    for each token, low frequencies first (OAT, 2602.04215); a near miss early is not the end. 0
    where the whole does not decode, which may be hundreds of tokens long."""
    # 1. the first 1, 2, 3, ... tokens of each pair
    _, decodes = action_tokenizer.decode(generated)
    generated_prefixes = []
    target_prefixes = []
    counts = []  # rungs of each pair
    for generated_ids, target_ids, is_whole in zip(generated, targets, decodes, strict=True):
        rungs = max(len(generated_ids), len(target_ids)) if is_whole else 0
        for k in range(1, rungs + 1):
            generated_prefixes.append(generated_ids[:k])
            target_prefixes.append(target_ids[:k])
        counts.append(rungs)
    if not generated_prefixes:
        return np.zeros(len(generated))
    # 2. how close they come, all rungs of all pairs at once
    generated_actions, _ = action_tokenizer.decode(generated_prefixes, partial=True)
    target_actions, _ = action_tokenizer.decode(target_prefixes, partial=True)
    values = closeness(action_tokenizer, generated_actions, target_actions)
    # 3. the mean over the rungs of each pair
    rungs_of_each = np.split(np.nan_to_num(values), np.cumsum(counts)[:-1])
    return np.array([rungs.mean() if len(rungs) else 0.0 for rungs in rungs_of_each])


def subsequence_rewards(_: FastTokenizer, generated: IdLists, targets: IdLists) -> np.ndarray:
    """Longest common subsequence over the longer of the two."""
    rewards = []
    for a, b in zip(generated, targets, strict=True):
        rewards.append(common_subsequence(a, b) / max(len(a), len(b), 1))
    return np.array(rewards)


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence of two lists."""
    best = [0] * (len(b) + 1)  # of what was read of a, with the first j of b
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            above = best[j + 1]
            best[j + 1] = diagonal + 1 if x == y else max(above, best[j])
            diagonal = above
    return best[-1]


def no_rewards(_: FastTokenizer, generated: IdLists, targets: IdLists) -> np.ndarray:
    """0: only the format pays. The control of what RL gains without being told right from wrong
    (as 2506.10947 has for mathematics)."""
    return np.zeros(len(generated))


REWARDS = {
    "prefix": prefix_rewards,
    "ladder": ladder_rewards,
    "l1": action_closeness,
    "lcs": subsequence_rewards,
    "format": no_rewards,
}


def reward(
    backbone: Backbone,
    token_ids: list[list[int]],
    targets: list[Target],
    kind: str = "prefix",
    think: bool = True,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """r = (r_f + r_a) / 2 in [0, 1] (2603.21341, "Reward").

    token_ids: N sampled sequences, without padding. targets: N lists of action ids, or what answers
    in words are scored by. kind: one of REWARDS, of actions. think=False scores answers
    without a thought of their own, of which r_f asks for none.
    -> r (N,) float64, and {"r_f", "r_a", "tags", "markers", "decodes"}: (N,) float64 each, the last
    two 0 for words."""
    if kind not in REWARDS:
        raise ValueError(f"reward {kind!r} is unknown; choose one of {', '.join(REWARDS)}")
    names = ("r_f", "r_a", "tags", "markers", "decodes")
    parts = {name: np.zeros(len(token_ids)) for name in names}
    in_words = is_in_words(targets)
    for is_wanted, score in ((~in_words, partial(action_parts, kind=kind)), (in_words, word_parts)):
        indices = np.flatnonzero(is_wanted)
        if not len(indices):
            continue
        these_ids = [token_ids[i] for i in indices]
        these_targets = [targets[i] for i in indices]
        for name, values in score(backbone, these_ids, these_targets, think).items():
            parts[name][indices] = values
    # ours: a malformed answer earns nothing, whatever its tokens
    parts["r_a"] = np.where(parts["r_f"], parts["r_a"], 0.0)
    outside = ~((parts["r_a"] >= 0) & (parts["r_a"] <= 1))  # NaN too
    if outside.any():
        i = int(np.argmax(outside))  # the first
        name, wanted = f"reward {kind}", f"action ids {targets[i]}"
        if in_words[i]:
            name, wanted = f"score {targets[i].score}", repr(targets[i].text)
        raise ValueError(
            f"{name} gave {parts['r_a'][i]:g} where {wanted} are right; give numbers from 0 to 1"
        )
    return (parts["r_f"] + parts["r_a"]) / 2, parts


def is_in_words(targets: list[Target]) -> np.ndarray:
    """(N,) bool: which are answered in words, not by actions."""
    return np.array([isinstance(target, RightAnswer) for target in targets], bool)


def action_parts(backbone, token_ids, targets, think, kind) -> dict[str, np.ndarray]:
    """reward()'s parts of answers by actions."""
    parsed = [model.parse_actions(backbone, sequence) for sequence in token_ids]
    generated = [answer.action_ids for answer in parsed]
    _, decodes = backbone.action_tokenizer.decode(generated)
    r_a = np.asarray(REWARDS[kind](backbone.action_tokenizer, generated, targets), float)
    if r_a.shape != (len(targets),):
        raise ValueError(
            f"reward {kind} gave an array {r_a.shape} for {len(targets)} completions; give one "
            "number for each"
        )
    return {
        "r_f": format_reward(parsed, decodes, think),
        "r_a": r_a,
        **format_diagnostics(backbone, token_ids, parsed, think),
        "decodes": decodes,
    }


def word_parts(backbone, token_ids, targets, think) -> dict[str, np.ndarray]:
    """reward()'s parts of answers in words: r_f is the tags alone."""
    parsed = [model.parse_words(backbone, sequence) for sequence in token_ids]
    r_f = np.array([words.has_thought if think else words.well_formed for words in parsed], float)
    r_a = []
    for words, right in zip(parsed, targets, strict=True):
        r_a.append(answer_score(words.answer, right, graded=True) if words.well_formed else 0.0)
    return {"r_f": r_f, "r_a": np.array(r_a), "tags": r_f}


def format_reward(parsed: list[model.ParsedAnswer], decodes: np.ndarray, think: bool) -> np.ndarray:
    """r_f (N,), 0 or 1: well formed, with a thought if one was asked for, and tokens that decode to
    K x A coefficients."""
    # has_thought implies well_formed
    has_format = [answer.has_thought if think else answer.well_formed for answer in parsed]
    return (np.array(has_format, bool) & decodes).astype(np.float64)


WITH_THOUGHT = re.compile(
    r"\s*<think>.*\S.*</think>\s*<answer>.*</answer>\s*<\|im_end\|>", re.DOTALL
)
WITHOUT_THOUGHT = re.compile(r".*<answer>.*</answer>\s*<\|im_end\|>", re.DOTALL)


def format_diagnostics(backbone, token_ids, parsed, think) -> dict[str, np.ndarray]:
    """What a format that fails still has right: "tags" in place; "markers",
    one run of FAST tokens between ACTION_START and ACTION_END and none elsewhere. (N,) each."""
    vocab = backbone.vocab
    action_tokens = {*vocab.fast, vocab.action_start, vocab.action_end}
    tag_pattern = WITH_THOUGHT if think else WITHOUT_THOUGHT
    tags, markers = [], []
    for sequence, answer in zip(token_ids, parsed, strict=True):
        text = backbone.tokenizer.decode(sequence, skip_special_tokens=False)
        tags.append(bool(tag_pattern.fullmatch(text)))
        places = [i for i, token in enumerate(sequence) if token in action_tokens]
        is_one_run = len(places) > 2 and places[-1] - places[0] == len(places) - 1
        markers.append(
            is_one_run
            and len(places) == len(answer.action_ids) + 2
            and sequence[places[0]] == vocab.action_start
            and sequence[places[-1]] == vocab.action_end
        )
    return {"tags": np.array(tags, np.float64), "markers": np.array(markers, np.float64)}


# ---- Advantage -----------------------------------------------------------------------------------
#
# Advantage = deviation / scale: how far a completion is from the mean of its group, over a scale of
# the group.
#
# fork point: the advantage. A scale is a function (rewards of B groups (B, G)) -> (B, 1), with a
# name in ADVANTAGES, which --advantage takes. What is no deviation over a scale goes into
# advantage(), another divisor of the whole loss into update_step().


def std_scale(r: torch.Tensor) -> torch.Tensor:
    """GRPO: the std + 1e-6; over G - 1, as in the paper's framework."""
    degrees = max(r.shape[1] - 1, 1)  # G = 1: greedy evaluation
    deviations = r - r.mean(1, keepdim=True)
    variance = deviations.square().sum(1, keepdim=True) / degrees
    return variance.sqrt() + 1e-6


def no_scale(r: torch.Tensor) -> torch.Tensor:
    """Dr. GRPO (2503.20783): 1. A std weighs up groups that are nearly all right or all wrong."""
    return torch.ones_like(r[:, :1])


ADVANTAGES = {
    "grpo": std_scale,
    "drgrpo": no_scale,
}


def has_zero_std(r: torch.Tensor) -> torch.Tensor:
    """Which groups of r (B, G) have equal rewards, and so nothing to compare, (B,) bool."""
    return r.amax(1) - r.amin(1) < 1e-6


def advantage(
    r: torch.Tensor, kind: str = "grpo", paid: torch.Tensor | None = None
) -> torch.Tensor:
    """Sampled rewards r (B, G) -> advantages (B, G); 0 in groups of equal r. kind: one of
    ADVANTAGES.

    paid (B, G): what --credit pays in place of r. The deviations are paid's, the scale is that of
    the sampled rewards r, which alone say what groups get 0. So the parts of a reward give the
    parts of its advantage. Of a right, a wrong and a malformed answer, all over the std of r, 0.5:

                         what is paid         advantages
        r                1.0   0.5   0.0      1.00   0.00  -1.00
        paid = r_f / 2   0.5   0.5   0.0      0.33   0.33  -0.67
        paid = r_a / 2   0.5   0.0   0.0      0.67  -0.33  -0.33"""
    paid = r if paid is None else paid
    deviations = paid - paid.mean(1, keepdim=True)
    scale = ADVANTAGES[kind](r)
    # else a rounding error over 1e-6 would pass for an advantage
    return (deviations / scale).masked_fill(has_zero_std(r)[:, None], 0.0)


# ---- Objective -----------------------------------------------------------------------------------


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ref_logp: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float = 3.0,
    kl_coef: float = 0.01,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy gradient with KL, summed over tokens; fp32.

    logp, old_logp (at sampling), ref_logp (None: no KL), mask (1 on tokens that count: the sampled
    ones, with --credit expected a target's in their place) (N, T); advantages (N, 1) or (N, T).
    -> (loss summed over counted tokens, to be divided by their number on all ranks; {"clipped":
    number of tokens whose gradient is clipped away, "kl": summed k3})."""
    # fork point: the objective
    mask = mask.bool()
    # clipped surrogate
    log_ratio = (logp - old_logp).clamp(-20, 20)  # e^20 is finite
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -torch.minimum(unclipped, clipped)
    is_clipped = clipped < unclipped
    # dual clip (1912.09729): a token grown likely though bad has a bounded loss, and gradient
    if dual_clip > 0:
        bound = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        is_clipped = is_clipped | (loss > bound)
        loss = torch.minimum(loss, bound)
    # KL to the reference: E[k3] = KL(policy || reference), and k3 is never negative
    k3 = torch.zeros_like(loss)
    if ref_logp is not None:
        log_ref_ratio = (ref_logp - logp).clamp(-20, 20)
        k3 = log_ref_ratio.exp() - log_ref_ratio - 1
    loss = torch.where(mask, loss + kl_coef * k3, 0.0).sum()
    sums = {
        "clipped": (is_clipped & mask).sum(),
        "kl": torch.where(mask, k3.detach(), 0.0).sum(),
    }
    return loss, sums


# ---- Log-probabilities of completions ------------------------------------------------------------


class SharedKV(DynamicLayer):
    """Keys and values of one layer in an update with gradient. A pass over the prompts keeps
    theirs; in a second one (given `prompt`) the n completions of each see them, so that a prompt is
    forwarded once. What token 1 of a completion sees, of a prompt of 3 tokens padded to 4:

        prompt 0 1 1 1, own tokens 1 1 0

    Nothing else is stored, so that activation checkpointing may call update() again."""

    def __init__(self, prompt: "SharedKV | None" = None, n: int = 1):
        super().__init__()
        self.prompt = prompt
        self.n = n

    def update(self, k, v, *args, **kwargs):
        if self.prompt is None:
            if self.keys is None:  # the first pass's, through which gradients come back
                self.keys, self.values = k, v
            return k, v
        prompt_k = self.prompt.keys.repeat_interleave(self.n, 0)
        prompt_v = self.prompt.values.repeat_interleave(self.n, 0)
        return torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2)

    def get_seq_length(self):
        return 0 if self.prompt is None else self.prompt.keys.shape[2]


def token_logp(
    net: nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
) -> torch.Tensor:
    """hidden (N, D), ids (N,) -> log-probabilities (N,), fp32 nats. banned: ids of probability 0,
    as in model.generate."""

    def score(logits, ids):  # logits (n, V), in place where that spares a pass
        if temperature != 1:
            logits = logits / temperature
        if len(banned):
            logits.index_fill_(-1, torch.as_tensor(banned, device=logits.device), -torch.inf)
        return (logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0],)

    (logp,) = model.score_in_slices(net, score, hidden, ids)
    return logp


def completion_logp(
    backbone: Backbone,
    rows: list[Row],
    ids: torch.Tensor,
    mask: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-probabilities of G completions of each of B prompts, with gradient, a prompt forwarded
    once. Equals forwarding B * G full rows.

    rows: B prompts; ids, mask (N, T), N = B * G, padded right, completion g of prompt b in row
    b * G + g. -> (N, T) fp32, 0 where mask is 0.

    A token's probability is told by the hidden state one position before it. Of a prompt p0 p1 p2
    with two completions a0 a1 a2 and b0 b1, so N = 2, T = 3 and S = 2 of them are forwarded:

        1. forward the prompt         p0 p1 p2
        2. forward the completions    a0 a1      each sees the prompt's keys and its own
                                      b0 b1
           their positions             3  4      behind the prompt's
        3. who tells of whom          p2 a0 a1   tell of   a0 a1 a2
                                      p2 b0 b1             b0 b1 -     (padding: 0)"""
    N, T = ids.shape
    device = ids.device
    G = N // len(rows)
    # 1. the prompts
    prompts = model.to_device(model.collate(rows, backbone.vocab.pad, left=True), device)
    prompt_kv = [SharedKV() for _ in backbone.net.model.language_model.layers]
    prompt_hidden = model.hidden_states(backbone.net, prompts, Cache(layers=prompt_kv))
    last_hidden = prompt_hidden[:, -1]  # (B, D); padded left, so the last token is a prompt's own
    # 2. the completions behind them
    S = max(T - 1, 1)  # the last token tells of none, but all ranks forward something
    next_position = prompts["positions"].amax((0, 2)) + 1  # (B,) of M-RoPE's three the largest
    first_position = next_position.repeat_interleave(G)  # (N,)
    positions = first_position[:, None] + torch.arange(S, device=device)  # (N, S)
    prompt_mask = prompts["mask"].repeat_interleave(G, 0)  # (N, prompt)
    completions = {
        "ids": ids[:, :S],
        "positions": positions.expand(3, N, S),  # text counts alike in all three
        "mask": torch.cat([prompt_mask, mask[:, :S]], 1),  # (N, prompt + S)
    }
    completion_kv = [SharedKV(layer, G) for layer in prompt_kv]
    hidden = model.hidden_states(backbone.net, completions, Cache(layers=completion_kv))
    # 3. who tells of whom
    first_hidden = last_hidden.repeat_interleave(G, 0)[:, None]  # (N, 1, D)
    telling = torch.cat([first_hidden, hidden[:, : T - 1]], 1)  # (N, T, D)
    counted = mask.bool()
    logp = token_logp(
        backbone.net, telling[counted], ids[counted], temperature, backbone.vocab.banned
    )
    return torch.zeros(N, T, device=device).masked_scatter(counted, logp)


def measured_logp(
    backbone: Backbone,
    rows: list[Row],
    ids: torch.Tensor,
    mask: torch.Tensor,
    micro_batch: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """completion_logp() without gradient, micro_batch of the B prompts at once. -> (N, T)."""
    G = len(ids) // len(rows)
    logps = []
    with torch.no_grad():
        for first in range(0, len(rows), micro_batch):
            end = first + micro_batch
            completions = slice(first * G, end * G)
            of_prompts = rows[first:end], ids[completions], mask[completions]
            logps.append(completion_logp(backbone, *of_prompts, temperature))
    return torch.cat(logps)


# ---- Anchor --------------------------------------------------------------------------------------
#
# RL's gradient also moves the features that the head of vla.py will read. --anchor-coef holds them
# (2607.13429, 2605.25802): it weighs their distance from those of the model that RL started from.


@contextmanager
def prompt_features(net: nn.Module, cfg: Config) -> Iterator[list[torch.Tensor]]:
    """Yields a list, to which the first forward inside (that of the prompts, see completion_logp)
    appends its hidden states at the anchor's layer: (B, T, D), padded left, with gradient where
    there is one. They are what vla.truncate() lets a net put out. Without an anchor it stays
    empty."""
    features = []
    if not cfg.anchor_coef:
        yield features
        return

    def keep(hidden):
        if not features:  # the prompts are forwarded first, then the completions
            features.append(hidden)

    hook = model.keep_layer_output(net, model.feature_layer(net, cfg.anchor_layer), keep)
    try:
        yield features
    finally:
        hook.remove()


def anchor_distance(
    features: torch.Tensor, ref_features: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """Distance of the features of B prompts from the reference's: squared, as a share of the mean
    square of the reference's token (the head begins with a LayerNorm), mean over the tokens of a
    prompt. features, ref_features (B, T, D), padded left to T from lengths; -> (B,) fp32."""
    distances = []
    for own, ref, length in zip(features.float(), ref_features.float(), lengths, strict=True):
        difference = own[-length:] - ref[-length:]  # (t, D)
        of_tokens = difference.square().mean(-1) / ref[-length:].square().mean(-1)  # (t,)
        distances.append(of_tokens.mean())
    return torch.stack(distances)


# ---- Rollout -------------------------------------------------------------------------------------


class Learned(NamedTuple):
    """What an update learns from N completions, padded right to the longest."""

    ids: torch.Tensor  # (N, T) long
    mask: torch.Tensor  # (N, T) long
    old_logp: torch.Tensor  # (N, T) fp32, at sampling; see recompute_old_logp
    advantages: torch.Tensor  # (N, T) fp32, of each token
    target_weight: torch.Tensor  # (N, T) fp32, of the expected reward; 0 but on a target's tokens


@dataclass
class Group:
    """One prompt and its G completions; see Learned."""

    row: Row
    ids: torch.Tensor  # (G, T)
    mask: torch.Tensor
    old_logp: torch.Tensor
    advantages: torch.Tensor
    target_weight: torch.Tensor
    zero_std: bool  # all rewards are equal: no advantage


METRICS = [
    "reward", "reward_squared", "r_f", "r_a", "tags", "markers", "decodes",
    "frac_reward_zero_std", "prompt_length",
    "completion_length", "truncated", "distinct_thoughts", "distinct_actions", "distinct_answers",
    "entropy",
]  # fmt: skip
EXPECTED_METRICS = ["expected_r_a", "group_std_expected_r_a", "group_std_r_a"]  # --credit expected
METRICS += EXPECTED_METRICS
ANSWER_TYPES = ["action", *SCORES]  # for each of which there is an r_a too
METRICS += [f"r_a_{answer_type}" for answer_type in ANSWER_TYPES]
Sums = dict[str, list[float]]  # metric -> [sum, count] over completions, groups or tokens of a rank


def rollout(
    backbone: Backbone,
    cfg: Config,
    rows: list[Row],
    targets: list[Target],
    keys: Sequence[int],
    seed: int,
    G: int,
    greedy: bool = False,
) -> tuple[list[Group], Sums, str]:
    """Samples and scores G completions of each of this rank's B prompts; keys: one int a prompt.
    -> B groups, sums of METRICS, a text to show. The completions of all prompts stand in one list
    of N = B * G, those of a prompt side by side; of 2 prompts with G = 3:

        completion   0 1 2 3 4 5
        its prompt   0 0 0 1 1 1

    The numbers below are those of the algorithm, at the top of this file."""
    if not rows:
        return [], {name: [0.0, 0] for name in METRICS}, ""
    # 2. sample
    samples = model.generate(
        backbone,
        rows,
        G,
        cfg.max_new_tokens,
        cfg.temperature,
        greedy=greedy,
        seed=seed,
        keys=keys,
        rollout_batch=cfg.rollout_batch,
        cuda_graphs=cfg.cuda_graphs,
    )
    token_ids = []  # of each completion, without padding
    for ids, mask in zip(samples["ids"].cpu(), samples["mask"].bool().cpu(), strict=True):
        token_ids.append(ids[mask].tolist())
    # 3. score
    repeated_targets = []  # of each completion
    for target in targets:
        repeated_targets += [target] * G
    r, diagnostics = reward(
        backbone, token_ids, repeated_targets, cfg.reward, think=cfg.thought == "own"
    )
    # 4. compare within groups: what each token learns from
    by_group = torch.tensor(r, dtype=torch.float32).view(-1, G)  # (B, G)
    zero_std = has_zero_std(by_group)  # (B,)
    if is_expected(cfg):
        learned, expected = with_expected_reward(
            backbone, cfg, rows, samples["logp"], token_ids, repeated_targets, by_group
        )
        diagnostics |= expected_diagnostics(expected, diagnostics["r_a"], repeated_targets, G)
    else:
        learned = with_sampled_reward(
            backbone, cfg, samples, token_ids, repeated_targets, by_group, diagnostics["r_f"]
        )
    groups = []
    for b, row in enumerate(rows):
        completions = slice(b * G, b * G + G)
        T = int(learned.mask[completions].sum(1).max())  # the longest of this group
        of_group = Learned(*[tensor[completions, :T] for tensor in learned])
        groups.append(Group(row, *of_group, zero_std=bool(zero_std[b])))
    # What is logged. The mean -log p of what was sampled is the entropy, and costs no forward.
    surprise = -samples["logp"][samples["mask"].bool()].cpu()  # (tokens,)
    diagnostics["entropy"] = surprise.numpy()
    diagnostics["prompt_length"] = np.repeat([len(row["ids"]) for row in rows], G)
    sums = rollout_metrics(backbone, token_ids, repeated_targets, r, diagnostics, zero_std, G)
    text = backbone.tokenizer.decode(token_ids[0])
    target = targets[0]
    target_text = target.text if isinstance(target, RightAnswer) else model.action_answer(target)
    return groups, sums, f"{text!r} r {r[0]:.3f}, target {target_text}"


def with_sampled_reward(
    backbone: Backbone,
    cfg: Config,
    samples: model.Samples,
    token_ids: list[list[int]],
    targets: list[Target],
    by_group: torch.Tensor,
    r_f: np.ndarray,
) -> Learned:
    """What N = B * G completions learn from the rewards that they were drawn with, by_group (B, G):
    each token its completion's advantage; with --credit prefix see token_advantages(). r_f (N,). Of
    a prompt with G = 2 completions of 3 and 2 tokens:

        rewards              0.7                0.5         mean 0.6, std over G - 1 0.141
        advantages           0.71              -0.71
        of each token        0.71  0.71  0.71  -0.71 -0.71  0 (padding)"""
    advantages = advantage(by_group, cfg.advantage)  # (B, G)
    if cfg.credit == "prefix":
        half_r_f = torch.tensor(r_f / 2, dtype=torch.float32).view_as(by_group)
        format_part = advantage(by_group, cfg.advantage, paid=half_r_f)
        of_tokens = token_advantages(
            backbone, token_ids, targets, advantages.flatten(), format_part.flatten()
        )
    else:
        of_tokens = []
        for of_completion, ids in zip(advantages.flatten(), token_ids, strict=True):
            of_tokens.append(of_completion.expand(len(ids)))
    return Learned(
        samples["ids"],
        samples["mask"],
        old_logp=samples["logp"],
        advantages=pad_sequence(of_tokens, batch_first=True).to(samples["ids"].device),  # (N, T)
        target_weight=torch.zeros_like(samples["logp"]),
    )


def rollout_metrics(backbone, token_ids, targets, r, diagnostics, zero_std, G) -> Sums:
    """Sums and counts of METRICS, those of actions or words over their completions alone. Distinct
    thoughts, actions, answers: different ones / G, 1 when all of a group differ; falling, they show
    a collapse."""
    fast = set(backbone.vocab.fast)
    thoughts, actions, answers = [], [], []
    for sequence in token_ids:
        thought, _, answer = backbone.tokenizer.decode(sequence).partition("<answer>")
        thoughts.append(thought)
        answers.append(answer)
        actions.append(tuple(token for token in sequence if token in fast))

    def distinct(items):
        groups = [items[i : i + G] for i in range(0, len(items), G)]
        return np.array([len(set(group)) / G for group in groups])

    in_words = is_in_words(targets)  # (N,), N = B * G
    group_in_words = in_words[::G]  # (B,)
    answer_types = np.array([t.score if isinstance(t, RightAnswer) else "action" for t in targets])
    values = {name: [] for name in EXPECTED_METRICS}  # empty without --credit expected
    values |= diagnostics
    for name in ("markers", "decodes"):
        values[name] = diagnostics[name][~in_words]
    values |= {
        "reward": r,
        "reward_squared": r**2,
        "frac_reward_zero_std": zero_std.tolist(),
        "completion_length": [len(sequence) for sequence in token_ids],
        "truncated": [sequence[-1] != backbone.vocab.eos for sequence in token_ids],
        "distinct_thoughts": distinct(thoughts),
        "distinct_actions": distinct(actions)[~group_in_words],
        "distinct_answers": distinct(answers)[group_in_words],
    }
    for answer_type in ANSWER_TYPES:
        values[f"r_a_{answer_type}"] = diagnostics["r_a"][answer_types == answer_type]
    return {name: [float(np.sum(values[name])), len(values[name])] for name in METRICS}


def add_sums(a: Sums, b: Sums) -> Sums:
    return {name: [a[name][0] + b[name][0], a[name][1] + b[name][1]] for name in a}


def means(sums: Sums) -> dict[str, float]:
    """Sums of this rank -> means over all ranks, of what there is: no r_a_path without paths, and
    none beside r_a itself where all answers are paths. The squared rewards become "reward_std",
    over all completions (N - 1)."""
    flat = []
    for pair in sums.values():
        flat += pair
    total = np.reshape(all_sum(flat), (-1, 2))
    of_all = dict(zip(sums, total.tolist(), strict=True))
    mean = {}
    for name, (value, count) in of_all.items():
        is_r_a_itself = name.startswith("r_a_") and count == of_all["r_a"][1]
        if name == "reward_squared" and count:
            variance = (value - count * mean["reward"] ** 2) / max(count - 1, 1)
            # below, as in has_zero_std(), it is the rounding of equal rewards
            mean["reward_std"] = variance**0.5 if variance > 1e-12 else 0.0
        elif count and not is_r_a_itself:
            mean[name] = value / count
    return mean


def replace_zero_std_groups(backbone, cfg, sources, weights, groups, prompt_numbers, sums) -> Sums:
    """Dynamic sampling (DAPO, 2503.14476, section 3.2): fresh prompts take the place of groups
    with equal rewards, in `groups` itself, up to cfg.dynamic_sampling times. -> sums, in which the
    replaced groups count too."""
    for again in range(1, cfg.dynamic_sampling + 1):
        replaced = [i for i, group in enumerate(groups) if group.zero_std]
        # other shuffles, so that a row may come again
        numbers = [prompt_numbers[i] for i in replaced]
        picks = draw_prompts(cfg.seed, sources, weights, numbers, again)
        rows, targets = prompt_rows(backbone, sources, picks, cfg)
        keys = [number + again * BEYOND_ANY_RUN for number in numbers]  # other samples
        fresh, fresh_sums, _ = rollout(backbone, cfg, rows, targets, keys, cfg.seed, cfg.group)
        for i, group in zip(replaced, fresh, strict=True):
            groups[i] = group
        sums = add_sums(sums, fresh_sums)
    return sums


# ---- Credit (--credit) ---------------------------------------------------------------------------
#
# Which tokens learn from which part of the reward. The paper's way, "all", needs nothing of this.

CREDITS = {
    "all": "r_a is paid to all tokens of a completion",
    "prefix": "to those until the first wrong action token",
    "expected": "E[r_a] is paid to the thought, and the answer learns by its gradient",
    "expected-thought": "the first of these two alone",
    "expected-answer": "the second alone",
}


def is_expected(cfg: Config) -> bool:
    return cfg.credit.startswith("expected")


def token_advantages(
    backbone: Backbone,
    token_ids: list[list[int]],
    targets: list[Target],
    advantages: torch.Tensor,
    format_part: torch.Tensor,
) -> list[torch.Tensor]:
    """--credit prefix: what follows the first wrong action token cannot raise the prefix reward,
    so only the format's part of the advantage reaches it. Of a target 3 5 and advantage A:

        <think> ... <ACTION_START>  3  7  2  <ACTION_END></answer>
           A    ...       A         A  A  F    F           F        F: the format's part

    token_ids, targets: N sequences and what they should say; advantages, format_part (N,). -> N
    tensors, (T,) each. All of a malformed completion and of an answer in words is credited."""
    result = []
    for i, (sequence, target) in enumerate(zip(token_ids, targets, strict=True)):
        answer = model.parse_actions(backbone, sequence)
        credited = len(sequence)
        if answer.well_formed and not isinstance(target, RightAnswer):
            first_wrong = model.common_prefix(answer.action_ids, target)
            credited = sequence.index(backbone.vocab.action_start) + 1 + first_wrong + 1
        is_credited = torch.arange(len(sequence)) < credited
        result.append(torch.where(is_credited, advantages[i], format_part[i]))
    return result


# What a thought is worth is hidden by the answer that is drawn behind it: on Tabletop, after an SFT
# of which 1% thinks before it acts, the r_a that is to be expected behind the thoughts of one
# prompt differs by 0.01, r_a itself by 0.15. --credit expected takes the draw out. The prefix
# reward pays a token only behind right ones, so its mean over all answers is known without a sample
# (as in 2505.21493, where only whole answers pay):
#
#     E[r_a | thought] = (p(t_1) + p(t_1) p(t_2) + ... + p(t_1) ... p(t_m)) / m
#
# t: the target's m tokens, the last of them ACTION_END. This mean is what the thought is paid, and
# the answer learns by its gradient. It divides by m, where a drawn r_a divides by the longer list:
# surplus tokens cost it the p of ACTION_END instead (docs/deviations.md).


def expected_prefix(logp: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
    """E[r_a] (N,), from the log-probabilities (N, T) of the target's tokens, which is_target (N, T)
    marks; 0 where there are none. Probabilities 0.5, 0.8 and 1: (0.5 + 0.4 + 0.4) / 3."""
    of_prefix = torch.where(is_target, logp, 0.0).cumsum(1).exp()
    return torch.where(is_target, of_prefix, 0.0).sum(1) / is_target.sum(1).clamp(min=1)


def with_expected_reward(
    backbone: Backbone,
    cfg: Config,
    rows: list[Row],
    sampled_logp: torch.Tensor,
    token_ids: list[list[int]],
    targets: list[Target],
    by_group: torch.Tensor,
) -> tuple[Learned, np.ndarray]:
    """--credit expected: what is learned from N = B * G sampled completions, and E[r_a] of each,
    (N,). sampled_logp (N, T): of their tokens; by_group (B, G): their rewards.

    A completion keeps its thought and gets the target's answer in place of the drawn one. One row:

        1. ids            <think> ... <answer> <ACTION_START>   3  7  <ACTION_END>
        2. old_logp       of the sampler                        by a forward of the same weights
        3. advantages        A     A     A           A          0  0       0
        4. target_weight     0     0     0           0          W  W       W

    A = ((1 + E[r_a]) / 2 - its mean in the group) / scale, the scale of the sampled rewards, as in
    advantage(). W = 0.5 / scale: group_loss() adds -W * E[r_a], whose gradient teaches the answer.
    Groups whose sampled rewards are equal have A = W = 0, though E[r_a] may differ.

    What has no target's answer keeps all its tokens, with A on each and W = 0: a malformed
    completion is worth 0 in place of (1 + E[r_a]) / 2, an answer in words its sampled reward.

    --credit expected-thought puts W = 0, expected-answer A = 0: of the other half then the KL alone
    is learned. Answers in words keep their A in both."""
    G = by_group.shape[1]
    by_group = by_group.to(sampled_logp.device)
    # 1. ids, mask: the target's answers
    ids, mask, old_logp, is_target = with_targets(
        backbone, sampled_logp, token_ids, targets, cfg.thought == "own"
    )
    # 2. old_logp: also of the targets' tokens, which were not drawn; and E[r_a], which they make
    logp = measured_logp(backbone, rows, ids, mask, cfg.micro_batch, cfg.temperature)
    old_logp = torch.where(is_target, logp, old_logp)
    expected = expected_prefix(logp, is_target)
    # 3. advantages: A
    in_words = torch.tensor(is_in_words(targets), device=ids.device)
    worth = torch.where(is_target.any(1), (1 + expected) / 2, 0.0)
    worth = torch.where(in_words, by_group.flatten(), worth)  # (N,)
    of_completions = advantage(by_group, cfg.advantage, paid=worth.view(-1, G)).flatten()  # (N,)
    if cfg.credit == "expected-answer":
        of_completions = torch.where(in_words, of_completions, 0.0)
    advantages = torch.where(is_target, 0.0, of_completions[:, None])  # (N, T)
    # 4. target_weight: W
    weights = 0.5 / ADVANTAGES[cfg.advantage](by_group)  # (B, 1)
    weights = weights.masked_fill(has_zero_std(by_group)[:, None], 0.0)
    if cfg.credit == "expected-thought":
        weights = torch.zeros_like(weights)
    target_weight = torch.where(is_target, weights.repeat_interleave(G, 0), 0.0)  # (N, T)
    learned = Learned(ids, mask, old_logp, advantages, target_weight)
    return learned, expected.cpu().numpy()


def expected_diagnostics(
    expected: np.ndarray, r_a: np.ndarray, targets: list[Target], G: int
) -> dict[str, np.ndarray]:
    """EXPECTED_METRICS, of actions alone: E[r_a] (N,), and how far it and the drawn r_a (N,) differ
    within a group, (B,) each."""
    is_action = ~is_in_words(targets)
    of_actions = is_action[::G]
    return {
        "expected_r_a": expected[is_action],
        "group_std_r_a": r_a.reshape(-1, G).std(1)[of_actions],
        "group_std_expected_r_a": expected.reshape(-1, G).std(1)[of_actions],
    }


def with_targets(
    backbone: Backbone,
    sampled_logp: torch.Tensor,
    token_ids: list[list[int]],
    targets: list[Target],
    think: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Completions whose answer is the target's in place of the drawn one, from ACTION_START on:

        <think> ... <answer> <ACTION_START>  3  7 <ACTION_END>     is_target: 0 ... 0 0 1 1 1

    -> ids, mask, old_logp (0 where is_target), is_target (N, T each). What is not well formed until
    there stays, and so does an answer in words; is_target is 0 in these."""
    vocab = backbone.vocab
    in_words = is_in_words(targets)
    ids, old_logp, is_target = [], [], []
    for i, (sequence, target) in enumerate(zip(token_ids, targets, strict=True)):
        kept = len(sequence)  # tokens that stay as they were drawn
        answer = []  # the target's tokens behind them
        start = 0 if in_words[i] else answer_start(backbone, sequence, think)
        if start > 0:
            kept = start
            answer = [vocab.fast[index] for index in target] + [vocab.action_end]
        ids.append(torch.tensor(sequence[:kept] + answer))
        old_logp.append(pad(sampled_logp[i, :kept].cpu(), (0, len(answer))))
        is_target.append(torch.arange(kept + len(answer)) >= kept)
    mask = [torch.ones_like(one) for one in ids]
    return tuple(
        pad_sequence(tensors, True).to(sampled_logp.device)
        for tensors in (ids, mask, old_logp, is_target)
    )


def answer_start(backbone: Backbone, sequence: list[int], think: bool) -> int:
    """How many tokens of a completion come before its first action token, if it is well formed
    until there; else 0."""
    vocab = backbone.vocab
    if vocab.action_start not in sequence:
        return 0
    begun = sequence[: sequence.index(vocab.action_start) + 1]
    closing = [*backbone.tokenizer.encode("</answer>", add_special_tokens=False), vocab.eos]
    # any answer that is well formed, so that the parser judges what comes before it
    whole = [*begun, vocab.fast[0], vocab.action_end, *closing]
    answer = model.parse_actions(backbone, whole)
    has_format = answer.has_thought if think else answer.well_formed
    return len(begun) if has_format else 0


# ---- Update --------------------------------------------------------------------------------------


def stack_groups(groups: list[Group]) -> tuple[list[Row], Learned]:
    """The prompts of B groups, and their completions (B*G, T)."""
    T = max(group.ids.shape[1] for group in groups)

    def stack(name):  # -> (B*G, T)
        tensors = [getattr(group, name) for group in groups]
        return torch.cat([pad(tensor, (0, T - tensor.shape[1])) for tensor in tensors])

    return [group.row for group in groups], Learned(*map(stack, Learned._fields))


def group_loss(
    backbone: Backbone, reference: Backbone | None, groups: list[Group], cfg: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of some groups summed over their tokens, and the sums that are logged.

    1. the reference, for the KL   2. the policy   3. clipped objective and KL
    4. --credit expected: the answer's part   5. --anchor-coef: the distance of a token's prompt"""
    rows, (ids, mask, old_logp, advantages, target_weight) = stack_groups(groups)
    # 1. the reference
    ref_logp = None
    if reference is not None:
        with (
            torch.no_grad(),
            model.adapters_off(reference.net),
            prompt_features(reference.net, cfg) as ref_features,
        ):
            ref_logp = completion_logp(reference, rows, ids, mask, cfg.temperature)
    # 2. the policy
    with prompt_features(backbone.net, cfg) as features:
        logp = completion_logp(backbone, rows, ids, mask, cfg.temperature)
    # 3. old_logp is what the sampler said, so the first update of a rollout is on-policy
    loss, logged = policy_loss(
        logp,
        old_logp,
        advantages,
        mask,
        ref_logp,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip,
        kl_coef=cfg.kl_coef,
    )
    # 4. the answer's part: W * E[r_a], see with_expected_reward()
    if is_expected(cfg):
        expected = expected_prefix(logp, target_weight > 0)
        loss = loss - (target_weight.amax(1) * expected).sum()
    # 5. the anchor, which needs the reference (Config.needs_reference)
    if cfg.anchor_coef > 0:
        lengths = [len(row["ids"]) for row in rows]
        distances = anchor_distance(features[0], ref_features[0], lengths)  # (B,)
        tokens = mask.view(len(rows), -1).sum(1)  # (B,) of the completions; 0 of an idle group
        logged["anchor"] = (distances * tokens).sum()
        loss = loss + cfg.anchor_coef * logged["anchor"]
    return loss, {**logged, **gap_sums(logp.detach(), old_logp, mask, cfg)}


def gap_sums(
    logp: torch.Tensor, old_logp: torch.Tensor, mask: torch.Tensor, cfg: Config
) -> dict[str, torch.Tensor]:
    """Sums over tokens of |logp - old_logp|, "gap", of those whose ratio is "outside" the clip
    range, and their number, "forwarded". Before a rollout's first update the two are of the same
    weights, and what they differ by is the sampler's doing."""
    difference = torch.where(mask.bool(), logp - old_logp, 0.0)
    ratio = difference.exp()
    is_outside = (ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)
    return {"gap": difference.abs().sum(), "outside": is_outside.sum(), "forwarded": mask.sum()}


def micro_batches_of(groups: list[Group], cfg: Config) -> list[list[Group]]:
    """This rank's groups of an update that are forwarded, --micro-batch at once. All ranks get
    equally many micro-batches, since under FSDP each forward is collective: a rank that has none
    left forwards a group of one-token completions that do not count."""
    learning = [group for group in groups if not (group.zero_std and cfg.skip_zero_std)]
    micro_batches = []
    for i in range(0, len(learning), cfg.micro_batch):
        micro_batches.append(learning[i : i + cfg.micro_batch])
    most = all_max(len(micro_batches))  # of the rank that has the most
    while len(micro_batches) < most:
        micro_batches.append([idle_group(groups[0])])
    return micro_batches


@torch.no_grad()
def recompute_old_logp(
    backbone: Backbone, batches: list[list[Group]], cfg: Config
) -> dict[str, float]:
    """Before the first update of a rollout: in the groups of its update batches the update's own
    log-probabilities take the place of the sampler's. -> gap_sums() between the two, over all
    ranks; {} when nothing is forwarded."""
    sums = Counter()
    for batch in batches:
        for micro_batch in micro_batches_of(batch, cfg):
            rows, (ids, mask, old_logp, *_) = stack_groups(micro_batch)
            logp = completion_logp(backbone, rows, ids, mask, cfg.temperature)
            for name, value in gap_sums(logp, old_logp, mask, cfg).items():
                sums[name] += float(value)
            for group, group_logp in zip(micro_batch, logp.split(cfg.group), strict=True):
                group.old_logp = group_logp[:, : group.ids.shape[1]]
    return sum_over_ranks(sums)


LARGE_GAP = 0.01  # share of the sampled tokens


def gap_metrics(sums: dict[str, float], step: int, dist: Dist) -> dict[str, float]:
    """What is logged of gap_sums() at a rollout's first update; a line where they are too large.
    step: as in the log, from 1."""
    if not sums:  # nothing was forwarded, so nothing was measured
        return {}
    gap = sums["gap"] / sums["forwarded"]
    outside = sums["outside"] / sums["forwarded"]
    if outside > LARGE_GAP and dist.rank == 0:
        print(
            f"warning: step {step}: {outside:.1%} of the sampled tokens are outside the clip range "
            f"before the first update (sampler and update differ by {gap:.2g} nats a token); try "
            "--recompute-old-logp"
        )
    return {"sampler_gap": gap, "sampler_outside_clip": outside}


def update_step(
    backbone: Backbone,
    reference: Backbone | None,
    optim: torch.optim.Optimizer,
    groups: list[Group],
    cfg: Config,
    dist: Dist,
    when: str,
) -> dict[str, float]:
    """One optimizer step on this rank's groups of an update batch. -> sums over the tokens of all
    ranks, and this update's loss, grad_norm and updates = 1; {} when no rank forwards a group,
    since all have equal rewards (--skip-zero-std): no step, and no weight decay either.

    1. all tokens count in the mean, those of groups that are not forwarded too
    2. all ranks run as many forwards, since under FSDP each is collective
    3. forward, backward
    4. step"""
    # 1. what the sum of the loss is divided by: the token mean, or (Dr. GRPO) a constant, so that
    # long completions are not weighed down
    tokens = all_sum(sum(int(group.mask.sum()) for group in groups))
    divisor = tokens
    if cfg.advantage == "drgrpo":
        divisor = cfg.batch * cfg.group * cfg.max_new_tokens
    # 2. micro-batches
    micro_batches = micro_batches_of(groups, cfg)
    if not micro_batches:
        return {}
    # 3. forward and backward
    check = partial(model.stop_if_not_finite, cfg.out, when, dist, arrays_of(groups))  # name, value
    sums = Counter()
    for micro_batch in micro_batches:
        loss, logged = group_loss(backbone, reference, micro_batch, cfg)
        check("loss", loss.item())
        (loss * dist.world_size / divisor).backward()  # FSDP averages over ranks
        for name, value in {"loss": loss, **logged}.items():
            sums[name] += float(value.detach())
    # 4. step
    grad_norm = model.clip_gradients(backbone.net.parameters(), cfg.max_grad_norm)
    check("gradient norm", grad_norm)
    optim.step()
    optim.zero_grad()
    total = sum_over_ranks(sums)
    return {**total, "loss": total["loss"] / divisor, "grad_norm": grad_norm, "updates": 1}


def sum_over_ranks(sums: dict[str, float]) -> dict[str, float]:
    return dict(zip(sums, all_sum(list(sums.values())), strict=True))


def all_max(count: int) -> int:
    """The largest of the ranks' counts."""
    value = torch.tensor(count)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        if distributed.get_backend() == "nccl":
            value = value.cuda()
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return int(value)


def idle_group(group: Group) -> Group:
    """The same prompt with one token a completion, which does not count."""
    one_token = {name: getattr(group, name)[:, :1] for name in Learned._fields}
    nothing = {name: torch.zeros_like(one_token[name]) for name in ("mask", "target_weight")}
    return replace(group, **{**one_token, **nothing})


def arrays_of(groups: list[Group]) -> Iterator[dict]:
    """Groups as model.stop_if_not_finite saves them."""
    for group in groups:
        prompt = {f"prompt_{name}": value for name, value in group.row.items()}
        yield {**vars(group), **prompt, "sample_id": [group.row.get("sample_id", "")]}


# ---- Evaluation ----------------------------------------------------------------------------------


def held_out_prompts(
    backbone: Backbone, cfg: Config, sources: list[Source], weights: list[float], dist: Dist
) -> tuple[list[Row], list[Target]]:
    """This rank's share of --eval-prompts prompts, which are divided by the weights of the sources
    and spread evenly over what each holds out; each once, also where there are fewer. -> rows,
    targets."""
    picks = []
    for s, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        n = round(cfg.eval_prompts * weight / sum(weights))
        if source.held:
            picks += [Pick(s, i) for i in model.evenly_spaced(source.held, n)]
    if cfg.eval_every and not picks:
        raise ValueError(
            f"--eval-every {cfg.eval_every}: no row to ask is held out; raise --holdout-rows or "
            "--eval-prompts, or give --eval-every 0"
        )
    return prompt_rows(backbone, sources, picks[dist.rank :: dist.world_size], cfg)


def warn_of_long_answers(
    backbone: Backbone, cfg: Config, targets: list[Target], dist: Dist
) -> None:
    """One line when actions of the held-out prompts do not fit into a completion, even without a
    thought: what reaches them is cut off, so malformed and worth 0. All ranks call it."""
    n_actions = 0
    n_long = 0
    for target in targets:
        if not isinstance(target, RightAnswer):
            answer = f"{model.action_answer(target)}<|im_end|>"
            ids = backbone.tokenizer.encode(answer, add_special_tokens=False)
            n_actions += 1
            n_long += len(ids) > cfg.max_new_tokens
    n_actions, n_long = all_sum([n_actions, n_long])
    if n_long and dist.rank == 0:
        print(
            f"warning: the right actions of {n_long:.0f} of {n_actions:.0f} evaluation prompts "
            f"have more tokens than --max-new-tokens {cfg.max_new_tokens}, without any thought: "
            "raise it, or fit a FAST tokenizer of fewer tokens a chunk",
            file=sys.stderr,
        )


def evaluate(
    backbone: Backbone, cfg: Config, rows: list[Row], targets: list[Target], dist: Dist
) -> dict[str, float]:
    """Held-out reward, greedy and sampled; the same prompts and draws each time, other draws than
    in training (seed + 1). rows, targets: this rank's, as held_out_prompts() gives them."""
    keys = [dist.rank + i * dist.world_size for i in range(len(rows))]
    metrics = {}
    cfg = replace(cfg, credit="all")  # nothing is learned here
    with model.unsharded(backbone.net):
        for style, G in (("greedy", 1), ("sampled", cfg.group)):
            is_greedy = style == "greedy"
            _, sums, _ = rollout(backbone, cfg, rows, targets, keys, cfg.seed + 1, G, is_greedy)
            mean = means(sums)
            for name, value in mean.items():
                if name in ("reward", "r_f") or name.startswith("r_a"):
                    metrics[f"eval_{style}_{name}"] = value
    return metrics


# ---- Main ----------------------------------------------------------------------------------------


def check_config(cfg: Config) -> None:
    """ValueError naming the cure when the settings do not fit together."""
    if cfg.prompts % cfg.batch:
        raise ValueError(f"--prompts {cfg.prompts} must be a multiple of --batch {cfg.batch}")
    if cfg.group < 2:
        raise ValueError(f"--group {cfg.group}; an advantage needs at least 2 completions")
    if 0 < cfg.dual_clip <= 1:
        raise ValueError(
            f"--dual-clip {cfg.dual_clip} bounds tokens that have not changed; give more than 1, "
            "or 0 for none"
        )
    if cfg.anchor_layer and not cfg.anchor_coef:
        raise ValueError(
            f"--anchor-layer {cfg.anchor_layer} without --anchor-coef: nothing is anchored; give "
            "both, or neither"
        )
    if cfg.filler != Config.filler and cfg.thought != "filler":
        raise ValueError(
            f"--filler {cfg.filler} --thought {cfg.thought}: there is no filler; give --thought "
            "filler too, or leave --filler out"
        )
    if cfg.lora and cfg.cpu_offload:
        raise ValueError(
            "--cpu-offload --lora: the reference is the policy without its adapters, there is no "
            "second model to offload; leave --cpu-offload out"
        )
    choices = {
        "advantage": tuple(ADVANTAGES),
        "credit": tuple(CREDITS),
        "reward": tuple(REWARDS),
        "thought": ("own", "none", "filler"),
    }
    for name, allowed in choices.items():
        value = getattr(cfg, name)
        if value not in allowed:
            raise ValueError(f"--{name} {value}: choose one of {', '.join(allowed)}")
    if cfg.credit != "all" and cfg.reward != "prefix":
        raise ValueError(
            f"--credit {cfg.credit} --reward {cfg.reward}: it rests on how the prefix reward pays, "
            "give --credit all, or --reward prefix"
        )


SHOWN = [  # in the terminal, six figures a line; log.jsonl has all
    "step", "reward", "r_a", "frac_reward_zero_std", "entropy", "completion_length", "kl",
    "eval_greedy_reward", "eval_greedy_r_f", "eval_greedy_r_a",
    "eval_sampled_reward", "eval_sampled_r_f", "eval_sampled_r_a",
    "rollout",
]  # fmt: skip


class Prepared(NamedTuple):
    backbone: Backbone  # sharded
    reference: Backbone | None  # sharded, frozen; None: not needed; with --lora the backbone
    optim: torch.optim.Optimizer
    sources: list[Source]
    weights: list[float]  # by which prompts are drawn from them
    data: dict[str, dict]  # what run.json says of them
    first_step: int  # 0, or where a resumed run goes on
    num_tokens: float  # until then: of this rank, or of all ranks where rank 0 resumes
    resume_from: Path | None  # the checkpoint that this run goes on from


def prepare(cfg: Config, dist: Dist) -> Prepared:
    """Loads policy and reference, shards them, and restores the optimizer of a run to resume.
    ValueError when checkpoint and data do not fit."""
    resume_from = model.checkpoint_to_resume(cfg)  # None: a new run
    path = resume_from or cfg.init
    if cfg.lora:  # adapters stand on it, also after --resume: load_train_state() restores them
        path = cfg.init
    stages = ("base", "sft", "grpo")  # base: it knows no actions, and may be asked for words
    backbone = model.load(path, dist.build, stages=stages, max_pixels=cfg.max_pixels)
    mixture = model.parse_mixture(cfg.data)
    if backbone.action_tokenizer is None and any(
        not item.path.endswith(".jsonl") for item in mixture
    ):
        raise ValueError(
            f"{path}: no fast/ in this checkpoint, so it knows no action tokens; run sft.py on "
            "episodes with --action-tokenizer"
        )
    sources = model.open_sources(
        mixture, backbone.action_tokenizer, cfg.holdout_rows, cfg.outside_images
    )
    keep_kinds(sources, cfg.kinds)
    model.feature_layer(backbone.net, cfg.anchor_layer)  # one that is not there ends the run here
    weights, _ = model.mixture_shares(mixture, [len(source.train) for source in sources])
    data = {str(source.path): {"sha256": source.fingerprint} for source in sources}
    if cfg.lora:
        model.add_adapters(backbone.net, cfg)
        data[cfg.init] = {"sha256": model.frozen_sha256(backbone.net)}
    if resume_from and not cfg.changed_data:
        model.check_unchanged(data, resume_from)
    if cfg.recompute:
        model.recompute_activations(backbone.net)
    model.shard(backbone.net, dist)
    reference = None
    if cfg.needs_reference and cfg.lora:
        reference = backbone  # group_loss() turns the adapters off
    elif cfg.needs_reference:  # always the model RL started from, also after --resume
        reference = model.load(cfg.init, dist.build)
        reference.net.requires_grad_(False).eval()
        model.shard(reference.net, dist, offload=cfg.cpu_offload)
    betas = (0.9, cfg.beta2)
    optim = model.make_optimizer(backbone.net, cfg.lr, cfg.weight_decay, betas)
    first_step, counted = model.load_train_state(resume_from, backbone.net, optim)
    model.check_steps(resume_from, first_step, cfg.steps)
    num_tokens = float(counted.sum())  # 0 of a new run
    return Prepared(
        backbone, reference, optim, sources, weights, data, first_step, num_tokens, resume_from
    )


def main(argv: Sequence[str] | None = None) -> None:
    cfg = model.parse_config(Config, PRESETS, argv)
    model.keep_freed_memory()
    dist = model.setup(cfg.seed, cfg.shards, cfg.batch, cfg.timeout_hours)
    check_config(cfg)
    model.check_adapters(cfg, dist)
    prepared = prepare(cfg, dist)
    backbone, reference, optim, sources, weights, data, first_step, num_tokens, _ = prepared
    eval_rows, eval_targets = held_out_prompts(backbone, cfg, sources, weights, dist)
    warn_of_long_answers(backbone, cfg, eval_targets, dist)
    split = [source.split for source in sources if isinstance(source, EpisodeDataset)]
    if dist.rank == 0:
        warn_of_other_split(backbone.run.get("split", []), split)
    run = {
        "stage": "grpo",
        "config": asdict(cfg),
        "parent": cfg.init,
        "command": model.command_line("grpo.py", argv),
        "data": data,
        "split": join_splits(backbone.run.get("split", []), split),
    }
    save_checkpoint = partial(model.save, what=backbone, optim=optim)
    model.stop_on_sigterm()
    log = model.Log(cfg.out, cfg, dist, SHOWN)

    for step in range(first_step, cfg.steps):
        if cfg.eval_every and step % cfg.eval_every == 0:
            log.write(step=step, **evaluate(backbone, cfg, eval_rows, eval_targets, dist))
        start_time = time.perf_counter()

        # 1. draw this rank's prompts
        first_number = step * cfg.prompts
        prompt_numbers = range(first_number, first_number + cfg.prompts)
        local_numbers = prompt_numbers[dist.rank :: dist.world_size]
        picks = draw_prompts(cfg.seed, sources, weights, local_numbers)
        rows, targets = prompt_rows(backbone, sources, picks, cfg)

        # 2. to 4. sample, score, compare within groups
        with model.unsharded(backbone.net):
            groups, sums, shown = rollout(
                backbone, cfg, rows, targets, local_numbers, cfg.seed, cfg.group
            )
            if cfg.dynamic_sampling:
                sums = replace_zero_std_groups(
                    backbone, cfg, sources, weights, groups, local_numbers, sums
                )
        num_tokens += sums["prompt_length"][0] + sums["completion_length"][0]
        rollout_time = time.perf_counter()

        # 5. and 6. update, each time on other prompts of the rollout
        for params in optim.param_groups:
            params["lr"] = model.learning_rate(
                step, cfg.steps, cfg.lr, cfg.warmup_ratio, "constant"
            )
        backbone.net.train()
        local_batch = cfg.batch // dist.world_size
        batches = [groups[i : i + local_batch] for i in range(0, len(groups), local_batch)]
        before_update = {}  # gap_sums(), before the weights change
        if cfg.recompute_old_logp:
            before_update = recompute_old_logp(backbone, batches, cfg)
        total = Counter()
        for i, batch in enumerate(batches):
            when = f"step {step + 1}, update {i + 1}"  # as the log counts steps
            sums_of_update = update_step(backbone, reference, optim, batch, cfg, dist, when)
            before_update = before_update or sums_of_update
            total.update(sums_of_update)  # a Counter: it adds
        update_time = time.perf_counter()

        # The loss is no sign of progress: at the first update of a rollout it is near 0 whatever
        # the policy does. Watch held-out r_a; and frac_reward_zero_std, entropy and distinct
        # actions for a collapse.
        done = step + 1
        forwarded = max(total["forwarded"], 1)
        updates = max(total["updates"], 1)
        anchor = {"anchor": total["anchor"] / forwarded} if cfg.anchor_coef else {}
        log.write(
            step=done,
            **means(sums),
            clip_fraction=total["clipped"] / forwarded,
            kl=total["kl"] / forwarded,
            **anchor,
            **gap_metrics(before_update, done, dist),
            loss=total["loss"] / updates,
            grad_norm=total["grad_norm"] / updates,
            updates=total["updates"],
            lr=optim.param_groups[0]["lr"],
            rollout_s=rollout_time - start_time,
            update_s=update_time - rollout_time,
            tokens_per_s=all_sum(sums["completion_length"][0]) / (update_time - start_time),
            num_tokens=int(all_sum(num_tokens)),  # so far, prompts once a completion
        )
        if cfg.show_every and done % cfg.show_every == 0:
            log.write(step=done, rollout=shown)
        model.save_step(cfg, done, run, save_checkpoint, [num_tokens])
    # a last evaluation that fails loses nothing
    final = Path(cfg.out) / "final"
    if not model.has_ended(prepared.resume_from):
        model.save(final, backbone, {**run, "step": cfg.steps})
    model.end_on_sigterm()
    if cfg.eval_every:
        metrics = evaluate(backbone, cfg, eval_rows, eval_targets, dist)
        log.write(step=cfg.steps, **metrics)
        model.add_metrics(final, metrics)


if __name__ == "__main__":
    model.run_main(main, "--micro-batch, or --rollout-batch if it was in a rollout")
