"""What a gain is by: by other thoughts, or by other answers to the same ones?

    python evaluate.py gain --policy runs/grpo --over runs/sft --data data/test --variant SFT+RL

1. both models sample n thoughts about each prompt, at temperature 1
2. each model reads both models' thoughts: the r_a to be expected of its answers behind them (see
   benchmarks/thought.py)
3. what --policy has behind its own thoughts beyond what --over has behind its own, in two parts:

                                 thoughts of --over    thoughts of --policy
        answers of --over               0.20        0.01      0.21
                                        0.02                  0.03
        answers of --policy             0.22        0.02      0.24

   thoughts: 0.015, the mean of 0.01 and 0.02;   answers: 0.025;   together: 0.04
   form: the part of thoughts' that is had by more of them being well formed

A gain by answers may be that they are better whatever is thought, or that they obey the thought
better: `evaluate.py thought` replaces it and tells."""

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


def cross(
    backbones: list[model.Backbone], prompts_of: list[evaluate.Prompts], args
) -> list[Crossed]:
    """What each of the two models makes of both models' sampled thoughts. prompts_of: the same ones
    as each model reads them."""
    n = args.samples
    B = len(prompts_of[OLD].rows)
    worth = np.zeros((2, 2, B, n))
    well_formed = np.zeros((2, B, n), bool)
    for thinker in (OLD, NEW):
        completions = evaluate.complete(backbones[thinker], prompts_of[thinker], n, False, args)
        starts = [grpo.answer_start(backbones[thinker], ids, True) for ids in completions]
        well_formed[thinker] = np.reshape(starts, (B, n)) > 0
        for answerer in (OLD, NEW):
            worth[thinker, answerer] = thought.expected_r_a(
                backbones[answerer], prompts_of[answerer], completions, n, args
            )
    return [Crossed(worth[:, :, b], well_formed[:, b]) for b in range(B)]


def gains(one: Crossed) -> dict[str, float]:
    """Of one prompt -> "all", and its parts "thoughts" and "answers"; "form" is a part of
    "thoughts".

    Form: of old thoughts 1/2 are well formed, each worth 0.2, of new ones all, each worth 0.4:
    (1 - 1/2) * (0.2 + 0.4) / 2 = 0.15. Where one model has none, the other's count."""
    means = one.worth.mean(2)  # (2, 2)
    shares = one.well_formed.mean(1)  # (2,)
    # what well-formed ones are worth, of each model that has any; the others are worth 0
    of_thinkers = means.mean(1)  # (2,)
    has_any = shares > 0
    each = of_thinkers[has_any] / shares[has_any]
    return {
        "all": means[NEW, NEW] - means[OLD, OLD],
        "thoughts": (means[NEW] - means[OLD]).mean(),
        "form": (shares[NEW] - shares[OLD]) * each.mean() if len(each) else 0.0,
        "answers": (means[:, NEW] - means[:, OLD]).mean(),
    }


# ---- Command -------------------------------------------------------------------------------------


def arguments(add):
    evaluate.writing_flags(add)
    evaluate.episode_flags(add)
    add("--over", required=True, help="checkpoint that --policy is compared with, as its parent")
    add("--samples", type=count, default=8, help="sampled thoughts a prompt and model")


def tokens_of(backbone: model.Backbone) -> tuple:
    """What two models have in common that can read each other's writing about the same prompts."""
    actions = backbone.action_tokenizer
    return backbone.vocab, backbone.tokenizer.get_vocab(), actions.horizon, actions.action_dim


def draw_for_both(
    new: model.Backbone, old: model.Backbone, episodes: list, args, local: slice
) -> list[evaluate.Prompts]:
    """This rank's prompts as the old model reads them, and as the new one does: images may differ
    in size. ValueError where a word or an action is other tokens to the one than to the other."""
    prompts_of = []
    if tokens_of(old) == tokens_of(new):  # else the steps that are drawn may differ
        for backbone in (old, new):
            prompts_of.append(evaluate.draw_prompts(backbone, episodes, args, True, local))
    if not prompts_of or prompts_of[OLD].targets != prompts_of[NEW].targets:
        raise ValueError(
            f"--over {args.over}: writes with other tokens than {args.policy}; give the checkpoint "
            "that it was trained from"
        )
    return prompts_of


def measure(args):
    """`evaluate.py gain`. Metrics "gain NAME", see gains()."""
    started = time.time()
    dist = evaluate.start_ranks(args)
    local = evaluate.local_share(dist)
    new = thought.load_acting(args.policy, args.device)
    old = thought.load_acting(args.over, args.device)
    args.max_new_tokens = model.token_limit(args.max_new_tokens, new, 96)
    episodes, words = evaluate.episodes_to_ask(new, args.data, args.split)
    if dist.rank == 0:
        print(f"{args.prompts} prompts from {words}")
    prompts_of = draw_for_both(new, old, episodes, args, local)
    crossed = evaluate.gather(cross([old, new], prompts_of, args), dist)
    steps = evaluate.steps_of(prompts_of[NEW], dist)
    if dist.rank == 0:
        metrics = {}
        paired = {}
        each = [gains(one) for one in crossed]
        for name in each[0]:
            values = [round(float(of_prompt[name]), 5) for of_prompt in each]
            metrics[f"gain {name}"] = evaluate.bootstrap(values)
            paired[f"gain {name}"] = values
        words = f"{args.prompts} from {words}"
        evaluate.write_metrics(metrics, paired, args, started, dict.fromkeys(paired, steps), words)
