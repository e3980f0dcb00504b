"""What a gain is by: by other thoughts, or by other answers to the same ones?

    python evaluate.py gain --policy runs/grpo --over runs/sft --data data/test --variant SFT+RL

1. both models sample n thoughts about each prompt, as RL does
2. each model reads both models' thoughts: the r_a to be expected of its answers behind them (see
   benchmarks/thought.py)
3. what --policy has behind its own thoughts beyond what --over has behind its own, in two parts:

                                 thoughts of --over    thoughts of --policy
        answers of --over               0.20        0.01      0.21
                                        0.02                  0.03
        answers of --policy             0.22        0.02      0.24

   thoughts: 0.015, the mean of 0.01 and 0.02;   answers: 0.025;   together: 0.04

RL that aligns thoughts with actions gains by thoughts. RL whose gain is by answers alone writes
better actions behind whatever is thought: more SFT on actions would do as well.
"""

import time
from typing import NamedTuple

import numpy as np

import evaluate
import grpo
import model
from benchmarks import thought
from fast_tokenizer import count

OLD, NEW = 0, 1  # --over, --policy


class Crossed(NamedTuple):
    """Of one prompt. Axes of two are OLD and NEW."""

    worth: np.ndarray  # (2, 2, n) E[r_a]: whose thoughts, whose answers
    well_formed: np.ndarray  # (2, n) whose thoughts: whether they are, until their answer begins


def cross(backbones: list[model.Backbone], prompts: evaluate.Prompts, args) -> list[Crossed]:
    """What each of the two models makes of both models' sampled thoughts."""
    n = args.samples
    worth = np.zeros((2, 2, len(prompts.rows), n))
    well_formed = np.zeros((2, len(prompts.rows), n), bool)
    for thinker in (OLD, NEW):
        completions = evaluate.complete(backbones[thinker], prompts, n, False, args)
        starts = [grpo.answer_start(backbones[thinker], ids, True) for ids in completions]
        well_formed[thinker] = np.reshape(starts, (-1, n)) > 0
        for answerer in (OLD, NEW):
            expected = thought.expected_r_a(backbones[answerer], prompts, completions, n, args)
            worth[thinker, answerer] = expected
    return [Crossed(worth[:, :, b], well_formed[:, b]) for b in range(len(prompts.rows))]


def gains(crossed: list[Crossed]) -> dict[str, np.ndarray]:
    """Of all prompts -> "all", and its parts "thoughts" and "answers", (P,) each. "form" is a part
    of "thoughts": that more of them (or fewer) are well formed, at what those are worth on average
    that are."""
    worth = np.stack([one.worth for one in crossed])  # (P, 2, 2, n)
    well_formed = np.stack([one.well_formed for one in crossed])  # (P, 2, n)
    means = worth.mean(-1)
    each = worth.sum() / max(2 * well_formed.sum(), 1)  # what is not well formed is worth 0
    shares = well_formed.mean(-1)  # (P, 2)
    return {
        "all": means[:, NEW, NEW] - means[:, OLD, OLD],
        "thoughts": (means[:, NEW] - means[:, OLD]).mean(1),
        "form": each * (shares[:, NEW] - shares[:, OLD]),
        "answers": (means[:, :, NEW] - means[:, :, OLD]).mean(1),
    }


# ---- Command -------------------------------------------------------------------------------------


def arguments(add):
    add("--over", required=True, help="checkpoint that --policy is compared with, as its parent")
    add("--samples", type=count, default=8, help="sampled thoughts a prompt and model")


def same_prompts(
    new: model.Backbone, old: model.Backbone, episodes: list, args, local: slice
) -> evaluate.Prompts:
    """This rank's prompts. ValueError where they, or their actions, are other tokens to the one
    model than to the other."""
    of_new, of_old = (
        evaluate.draw_prompts(backbone, episodes, args, True, local) for backbone in (new, old)
    )
    ids_of_new, ids_of_old = (
        [row["ids"].tolist() for row in prompts.rows] for prompts in (of_new, of_old)
    )
    if new.vocab != old.vocab or ids_of_new != ids_of_old or of_new.targets != of_old.targets:
        raise ValueError(
            f"--over {args.over}: writes with other tokens than {args.policy}; give the checkpoint "
            "that it was trained from"
        )
    return of_new


def measure(args):
    """`evaluate.py gain`. Metrics: see gains()."""
    started = time.time()
    dist = evaluate.start_ranks(args)
    local = evaluate.local_share(dist)
    new = thought.load_acting(args.policy, args.device)
    old = thought.load_acting(args.over, args.device)
    args.max_new_tokens = model.token_limit(args.max_new_tokens, new, 96)
    episodes, words = evaluate.episodes_to_ask(new, args.data, args.split)
    if dist.rank == 0:
        print(f"{args.prompts} prompts from {words}")
    prompts = same_prompts(new, old, episodes, args, local)
    crossed = evaluate.gather(cross([old, new], prompts, args), dist)
    items = evaluate.steps_of(prompts, dist)
    if dist.rank == 0:
        metrics = {}
        paired = {}
        for name, values in gains(crossed).items():
            metrics[f"gain {name}"] = evaluate.bootstrap(values.tolist())
            paired[f"gain {name}"] = values.round(5).tolist()
        words = f"{args.prompts} from {words}"
        evaluate.write_metrics(metrics, paired, args, started, dict.fromkeys(paired, items), words)
