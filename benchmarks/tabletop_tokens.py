"""Can action tokens drive? Tabletop's scripted expert, its actions written as tokens and read back.

    python evaluate.py tokens --action-tokenizer runs/speedrun/fast

At each forward a policy would write the expert's next K actions; here the expert itself does, on a
copy of the environment. Tokens through which it fails are no target: a model that writes them
without a fault, and is rewarded for it, fails the task.
"""

import numpy as np

from benchmarks.simulate import TrialResult
from benchmarks.tabletop import SUITES, make_trials
from benchmarks.tabletop_data import expert_chunk
from fast_tokenizer import FastTokenizer, count


def arguments(add):
    """Flags of `evaluate.py tokens`."""
    add("--action-tokenizer", default="", help="folder of it; empty: the expert as it is")
    add("--trials", type=count, default=5, help="trials a task (40 tasks)")
    add("--execute", type=count, default=2, help="actions of a chunk that are carried out")


def evaluate(tokenizer: FastTokenizer | None, args, local: slice) -> list[TrialResult]:
    """This process's share of the trials, which are those of `evaluate.py tabletop`. tokenizer:
    None carries out what the expert says.

    A round, over all trials that are not over: 1. the expert's chunks   2. through the tokens
    3. carry out the first args.execute actions"""
    horizon = tokenizer.horizon if tokenizer else args.execute
    if args.execute > horizon:
        raise ValueError(
            f"--execute {args.execute}: {args.action_tokenizer} has chunks of {horizon} actions; "
            "give as many or fewer"
        )
    trials = make_trials(SUITES, args.trials, 0, local)
    active = trials
    while active:
        # 1. the expert's chunks
        chunks = np.stack([expert_chunk(trial.env, horizon) for trial in active])  # (B, K, 7)

        # 2. through the tokens
        if tokenizer:
            chunks, decodes = tokenizer.decode(tokenizer.encode(chunks))
            assert decodes.all(), "a tokenizer reads what it wrote"

        # 3. carry out the first actions
        for trial, chunk in zip(active, chunks, strict=True):
            trial.act(chunk[: args.execute])
        active = [trial for trial in active if not trial.done]
    return [TrialResult(trial.suite, trial.task, trial.solved) for trial in trials]
