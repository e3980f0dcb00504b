"""Every number that the project reports: closed-loop success, action tokens, answers, the table.

    python evaluate.py tabletop --policy runs/vla --chains 50 --variant RL --out results/run.json
    python evaluate.py actions --policy runs/grpo --data data/test --variant RL
    python evaluate.py vqa --policy assets/tiny-vlm --data data/test/conversations.jsonl
    python evaluate.py vqa|actions ... --keep-right own.jsonl   # own thoughts for the next SFT
    python evaluate.py blind --train D/train.jsonl --data D/test.jsonl   # answers without images
    python evaluate.py thought --policy runs/grpo --data data/test   # after another thought
    python evaluate.py gain --policy runs/grpo --over runs/sft --data data/test   # by thoughts?
    python evaluate.py probe --policy runs/grpo --data data/test  # what its frozen features tell
    python evaluate.py metaworld|libero --policy runs/vla
    python evaluate.py tabletop --policy runs/grpo --mode think   # or direct: by its own tokens
    python evaluate.py tokens --action-tokenizer runs/fast        # the expert, through these tokens
    python evaluate.py calvin --policy runs/vla --data task_ABC_D --out results/calvin.json
    torchrun --nproc_per_node 8 evaluate.py libero --policy runs/vla      # or any but blind, report
    python evaluate.py report results/run.json

Each command but `report`, `tokens` and `blind` measures one model and writes its metrics to a
results file, under the name of a variant; `report` makes one Markdown table of such a file, a row
for each variant, with the paired differences between consecutive ones. Under torchrun each rank
takes its share of the trials, prompts or questions, rank 0 writes the results of all, and those are
what one process finds (up to rounding in batches of other sizes). Every success rate carries its n
and a 95% Wilson interval; means carry a 95% bootstrap interval over prompts or chains (2,000
resamples, seed 0). Successes of two models in the same trials are also compared by McNemar's exact
test.

In the order of the file: intervals, the results file, ranks, then what is measured (closed loop,
action tokens, questions), the report, the command line. tabletop, metaworld, libero and calvin are
modules of benchmarks/, as are the questions, the thought, the gain and the probe; only what was
asked for is imported. Who wants to know what a number means reads the three sections of what is
measured."""

import argparse
import contextlib
import fcntl
import hashlib
import importlib
import itertools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np
import torch
from scipy.stats import binomtest
from torch import distributed

import fast_tokenizer
import grpo
import model
import vla
from fast_tokenizer import count, natural, non_negative

# ---- Intervals -----------------------------------------------------------------------------------


class Interval(TypedDict):
    """A mean and its 95% interval; None where there is none."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


def wilson(successes: int, n: int) -> Interval:
    """Success rate in [0, 1] with its 95% Wilson score interval. ValueError when n is 0.

    8 of 10 gives mean 0.8, low 0.490, high 0.943."""
    if n == 0:
        raise ValueError("a success rate needs at least one trial; raise --trials")
    interval = binomtest(int(successes), n).proportion_ci(method="wilson")
    mean = successes / n
    # the outer ends are exactly 0 and 1 at the extremes; rounding must not push them past the mean
    low = min(float(interval.low), mean)
    high = max(float(interval.high), mean)
    return {"mean": mean, "low": low, "high": high, "n": n}


def bootstrap(values, resamples: int = 2000) -> Interval:
    """Mean of values (N,) with its 95% percentile bootstrap interval; all None when N is 0."""
    values = np.asarray(values, np.float64)
    n = len(values)
    if n == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": n}


class McNemar(NamedTuple):
    """Two models in the same trials: only those count that one of them alone solved."""

    gained: int  # solved by the second alone
    lost: int  # by the first alone
    p: float  # two-sided, exact: the chance of such a split, or a rarer one, of fair coins


def mcnemar(before: np.ndarray, after: np.ndarray) -> McNemar:
    """McNemar's exact test of paired successes (N,), each 0 or 1.

    Of 10 trials that one model alone solved the second solved 9: p = 2 (1 + 10) / 2^10 = 0.021."""
    gained = int(((before == 0) & (after == 1)).sum())
    lost = int(((before == 1) & (after == 0)).sum())
    p = 1.0  # without a trial that tells them apart
    if gained + lost:
        p = float(binomtest(gained, gained + lost).pvalue)
    return McNemar(gained, lost, p)


# ---- Results file --------------------------------------------------------------------------------
#
# One JSON file a run. The key of the variants on disk is "arms", as in files of earlier versions:
#   {"preset", "arms": {variant: {"metrics": {name: Interval}, "paired": {name: values}, ...}},
#    "tokens", "commands", "seeds", "hardware", "minutes", "versions"}
# "paired" holds a metric's value of each prompt, trial or chain, in an order that all share, and
# "items" {metric: digest} which ones these are. Beside them a variant has "checkpoints" {command:
# path}, "prompts" {command: where they come from}, and "seconds" {command: {"chunk", "forward"}},
# of a policy, on average; "thought" is the part of a chunk's that a head's thought takes. They are
# no metrics: the same command gives others each time.
# Of a model that drives by its own tokens the mode follows the command, as in "tabletop think"; of
# chains alone "chain" ends the key of "seconds", as in "tabletop think chain".
# "tokens" holds what `tokens` found: {"action_tokenizer": path, "horizon", "execute": actions,
# "metrics"}; a later one takes its place.


def read_results(path: str | Path) -> dict:
    """A results file as a dict. ValueError when it is not one."""
    results = model.read_json(path)
    if not isinstance(results, dict) or "arms" not in results:
        raise ValueError(f'{path}: no "arms" in it; give a results file that evaluate.py wrote')
    return results


@contextlib.contextmanager
def open_results(args: argparse.Namespace, started: float) -> Iterator[dict]:
    """The results file args.out as a dict, to be added to; at the end it is written, with how its
    numbers came about. started: when the evaluation began, time.time(). Evaluations may write to
    one file at once: each takes the lock beside it."""
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            results = read_results(path)
        else:
            results = {"arms": {}, "commands": [], "seeds": []}
        results["preset"] = args.preset or results.get("preset", "tabletop")
        yield results
        if hasattr(args, "device"):  # else no model ran
            results["hardware"] = hardware(args.device)
        results.setdefault("hardware", hardware("cpu"))
        minutes = (time.time() - started) / 60
        results["minutes"] = round(results.get("minutes", 0) + minutes, 2)
        results["versions"] = model.versions()
        command = model.command_line("evaluate.py", args.argv)
        earlier = [other for other in results.get("commands", []) if other != command]
        results["commands"] = [*earlier, command]
        model.write_json(path, results)


def write_metrics(
    metrics: dict[str, Interval],
    paired: dict[str, list[float]],
    args: argparse.Namespace,
    started: float,
    items: dict[str, Sequence] | None = None,
    prompts_from: str = "",
    seconds: dict[str, dict[str, float]] | None = None,
    record_as: str = "",
):
    """Add metrics to the variant args.variant of the file args.out, and print them. Metrics of the
    same name are replaced, others stay.

    paired: the values of each prompt, trial or chain, by metric. started: see open_results().
    items: names of those, in the same order. prompts_from: of action tokens, where they come from.
    seconds: of a policy, {"tabletop think": {"chunk", "forward"}}, by what it drove. record_as: key
    of checkpoint and prompts_from; the command if not given."""
    record_as = record_as or args.command
    digests = {}
    for metric, names in (items or {}).items():
        digests[metric] = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    with open_results(args, started) as results:
        new_variant = {"metrics": {}, "paired": {}, "checkpoints": {}}
        variant = results["arms"].setdefault(args.variant, new_variant)
        left_out = groups_left_out(variant["metrics"], metrics)
        variant["metrics"].update(metrics)
        variant["paired"].update(paired)
        variant["checkpoints"][record_as] = str(args.policy)
        if digests:
            variant.setdefault("items", {}).update(digests)
        if prompts_from:
            earlier = variant.get("prompts", {})
            if isinstance(earlier, str):  # of a file from before 2026-11-30
                earlier = {}
            variant["prompts"] = earlier | {record_as: prompts_from}
        if seconds:
            variant.setdefault("seconds", {}).update(seconds)
        results["seeds"] = sorted({*results.get("seeds", []), args.seed})
    if args.command != "actions":  # which has a table of its own
        print_metrics(metrics)
    for seconds_of_way in (seconds or {}).values():
        for unit, value in seconds_of_way.items():
            print(f"{f'seconds a {unit}':24s} {value:.4f}")
    print(f"{args.out}: variant {args.variant}, {len(metrics)} metrics")
    if left_out:
        print(
            f"{args.out}: {', '.join(left_out)} of {args.variant} are of an earlier call, and no "
            "part of its success now; name all suites in one call for one figure of all"
        )


def groups_left_out(earlier: dict[str, Interval], new: dict[str, Interval]) -> list[str]:
    """Groups of trials whose success an earlier call measured and this one did not, so that the
    success of all is now without them: "goal" of an earlier "think success goal" where there is a
    new "think success" and no new "think success goal"."""
    groups = []
    for name in new:
        if name.split()[-1] != "success":
            continue
        for other in earlier:
            group = other.removeprefix(f"{name} ")
            if group != other and " " not in group and other not in new:  # " ": of a single task
                groups.append(group)
    return groups


def print_metrics(metrics: dict[str, Interval]):
    """A line each of the short names; longer ones are of single tasks."""
    for name, value in metrics.items():
        words = [word for word in name.split() if word not in (*vla.MODES, "sampled")]
        if len(words) <= 2:
            print(f"{name:24s}", "{mean:6.3f}  [{low:.3f}, {high:.3f}]  n {n}".format(**value))


def hardware(device: str) -> str:
    """What the evaluation runs on, in words. device: of each of its ranks."""
    if device.startswith("cuda"):
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        return f"{ranks} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {threads} threads"


# ---- Ranks ---------------------------------------------------------------------------------------

T = TypeVar("T")


def start_ranks(args: argparse.Namespace) -> model.Dist:
    """This process among those of torchrun, one alone without; puts args.device right, and checks
    that the results can be written."""
    dist = model.setup(args.seed)
    args.device = args.device or str(dist.device)
    check_out(args.out)
    return dist


def check_out(out: str):
    """Before hours are spent: ValueError when no results can be written to this file."""
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"--out {path}: a folder; name a file in it, as results/run.json")
    if path.exists():
        read_results(path)


def local_share(dist: model.Dist) -> slice:
    """all_items[local_share(dist)] are this rank's: of 5 on 2 ranks 0, 2, 4 and 1, 3."""
    return slice(dist.rank, None, dist.world_size)


def gather(local_items: list[T], dist: model.Dist) -> list[T]:
    """The items of all ranks in their order before local_share(); all ranks call it."""
    if dist.world_size == 1:
        return local_items
    shares = [None] * dist.world_size
    distributed.all_gather_object(shares, local_items)
    items = [None] * sum(len(share) for share in shares)
    for rank, share in enumerate(shares):
        items[rank :: dist.world_size] = share
    return items


# ---- Closed loop ---------------------------------------------------------------------------------

SIMULATORS = {  # modules of benchmarks/
    "tabletop": "closed-loop success on Tabletop",
    "metaworld": "closed-loop success in a real simulator",
    "libero": "closed-loop success in a real simulator",
    "calvin": "CALVIN's chains",
}


def simulator_module(name: str):
    """benchmarks/NAME.py, imported now: arguments(add), check(args), and evaluate(policy, args,
    local), which gives a benchmarks.simulate.Outcome of the share `local` of all trials."""
    return importlib.import_module(f"benchmarks.{name}")


def closed_loop(args: argparse.Namespace):
    """`evaluate.py tabletop | metaworld | libero | calvin`: a policy drives to each trial's end.

    In the file, names begin with the way in which it drove. A head has none; a checkpoint of sft or
    grpo, which drives by the tokens that it writes, its mode, then "sampled" with --sampled, then
    what --thought gave it in place of its own. "chain" follows, in what a call took that drove
    chains alone: what an earlier call's trials took stays beside it.

        it drove         what came of it         its seconds              a share of its chunks
        a head           success                 tabletop                 thoughts unfinished
        think            think success           tabletop think           think retried
        think, chains    think chain length      tabletop think chain     think chain retried
        think, removed   think removed success   tabletop think removed   think removed retried

    Of a checkpoint that writes, "retried" is the share whose first answer did not decode, "held
    still" where no answer did. Of a head that reads its own thoughts, "thoughts unfinished" is the
    share that --max-thought of vla.py cut off."""
    # 1. this rank's share of the trials
    started = time.time()
    simulator = simulator_module(args.command)
    simulator.check(args)
    dist = start_ranks(args)
    policy = vla.policy_of_flags(args)
    local_outcome = simulator.evaluate(policy, args, local_share(dist))

    # 2. what became of the trials and chains of all ranks
    metrics = {}
    paired = {}
    items = {}
    trials = gather(local_outcome.trials or [], dist)
    if trials:  # without any, those of an earlier call stay in the file
        metrics |= success_metrics(trials)
        paired["success"] = [trial.solved for trial in trials]
        items["success"] = [(trial.group, trial.task) for trial in trials]
    chain_lengths = gather(local_outcome.chain_lengths or [], dist)
    if chain_lengths:
        metrics |= chain_metrics(chain_lengths)
        paired["chain length"] = chain_lengths

    # 3. what their names begin with
    way = []
    if isinstance(policy, vla.TokenPolicy):
        way.append(policy.mode)
        if policy.sampled:
            way.append("sampled")
    if getattr(args, "thought", "own") != "own":  # a flag of Tabletop
        way.append(args.thought)
    chains_alone = ["chain"] if chain_lengths and not trials else []

    # 4. what it took
    names = ("chunks", "forwards", "seconds", "retried", "held", "thinking", "unfinished")
    of_all_ranks = model.all_sum([policy.count[name] for name in names])
    count = dict(zip(names, of_all_ranks, strict=True))
    seconds = {}
    if count["chunks"]:  # else all trials were over before
        for unit in ("chunk", "forward"):
            seconds[unit] = round(count["seconds"] / count[f"{unit}s"], 5)
        shares = {}  # metric -> of how many chunks it tells
        if count["thinking"]:
            seconds["thought"] = round(count["thinking"] / count["chunks"], 5)
            shares["thoughts unfinished"] = count["unfinished"]
        if isinstance(policy, vla.TokenPolicy):
            shares["retried"] = count["retried"]
            shares["held still"] = count["held"]
        for name, n in shares.items():
            metrics[joined(*chains_alone, name)] = wilson(int(n), int(count["chunks"]))

    # 5. into the file
    metrics = {joined(*way, name): value for name, value in metrics.items()}
    paired = {joined(*way, name): values for name, values in paired.items()}
    items = {joined(*way, name): trial_names for name, trial_names in items.items()}
    if dist.rank == 0:
        record_as = joined(args.command, *way)
        timed = {joined(record_as, *chains_alone): seconds} if seconds else {}
        write_metrics(metrics, paired, args, started, items, seconds=timed, record_as=record_as)


def joined(*words: str) -> str:
    return " ".join(words)


def success_metrics(trials) -> dict[str, Interval]:
    """Trials (group, task, solved) -> success of all, of each group, of each task in it."""
    solved = {}  # metric -> list of 0 and 1
    for trial in trials:
        group = f"success {trial.group}"
        for name in ("success", group, f"{group} {trial.task}"):
            solved.setdefault(name, []).append(trial.solved)
    return {name: wilson(sum(values), len(values)) for name, values in solved.items()}


def chain_metrics(lengths: list[int]) -> dict[str, Interval]:
    """Subtasks in a row of each chain, 0 .. 5 -> {"chain length", "chain 1" .. "chain 5"}.

    "chain 3" is the share of chains with at least three; none at all for no chains."""
    if not lengths:
        return {}
    metrics = {"chain length": bootstrap(lengths)}
    for k in range(1, 6):
        reached = sum(length >= k for length in lengths)
        metrics[f"chain {k}"] = wilson(reached, len(lengths))
    return metrics


def expert_through_tokens(args: argparse.Namespace):
    """`evaluate.py tokens`: success of Tabletop's expert when its actions pass through the tokens.

    It is a fact of the tokenizer, not of a model: the table has it in its caption."""
    from benchmarks import tabletop_tokens

    started = time.time()
    dist = model.setup(seed=0)  # nothing is drawn
    check_out(args.out)
    tokenizer = None
    if args.action_tokenizer:
        tokenizer = fast_tokenizer.FastTokenizer.load(args.action_tokenizer)
    local_trials = tabletop_tokens.evaluate(tokenizer, args, local_share(dist))
    metrics = success_metrics(gather(local_trials, dist))
    if dist.rank > 0:
        return
    with open_results(args, started) as results:
        results["tokens"] = {
            "action_tokenizer": args.action_tokenizer,
            "horizon": tokenizer.horizon if tokenizer else args.execute,
            "execute": args.execute,
            "metrics": metrics,
        }
    print_metrics(metrics)
    print(tokens_sentence(results["tokens"]))


# ---- Models that write ---------------------------------------------------------------------------


def load_backbone(policy: str, device: str) -> model.Backbone:
    """The checkpoint of a stage that writes text, in the type in which a policy head computes: bf16
    on a GPU."""
    return model.load(policy, device, model.compute_dtype(device), stages=("base", "sft", "grpo"))


# ---- Action tokens -------------------------------------------------------------------------------
#
# B prompts, n completions of each, K steps of a chunk, A action dimensions.


class Prompts(NamedTuple):
    """This rank's prompts at random steps of episodes, and what was done there."""

    keys: list[int]  # B numbers among the prompts of all ranks
    rows: list[model.Row]  # B of them
    targets: list[list[int]]  # B lists of action ids
    chunks: np.ndarray  # (B, K, A), dataset units
    steps: list[tuple[fast_tokenizer.EpisodeFile, int]]  # B episodes, each with its step


def episodes_to_ask(backbone: model.Backbone, data: str, split: str) -> tuple[list, str]:
    """The episodes of `data` that prompts are drawn from -> (they, in words which they are).

    split: "all", "held-out" (those that every stage holds out of such a folder), "train" (the
    others), or "auto": held out when the checkpoint says that it was trained on this folder, or on
    one of as many episodes and the same names of held-out ones, else all."""
    episodes = fast_tokenizer.read_episodes(data, 0, backbone.action_tokenizer)
    fast_tokenizer.require_instructions(episodes)
    folder = episodes[0].path.parent
    words_of_all = f"all {len(episodes)} episodes of {folder}"
    if split == "all":
        return episodes, f"{words_of_all}: as --split all asks"

    # 1. what the checkpoint says of this folder
    records = backbone.run.get("split", [])
    own = [record for record in records if Path(record["folder"]).resolve() == folder.resolve()]
    as_many = [record for record in records if record["episodes"] == len(episodes)]
    if split == "auto" and not own and not as_many:  # a single episode, too, which has no split
        return episodes, f"{words_of_all}: {why_unseen(records)}"
    train, held_out = fast_tokenizer.split_episodes(episodes)
    here = fast_tokenizer.split_record(episodes, held_out)
    # of one that may be this folder: copied, or named as seen from elsewhere
    namesakes = [record for record in as_many if record["sha256"] == here["sha256"]]

    # 2. which episodes
    if split == "auto" and not own and not namesakes:
        return episodes, f"{words_of_all}: {why_unseen(records)}"
    if split == "train":
        return train, f"the {len(train)} of {len(episodes)} episodes of {folder} to train on"
    words = f"the {len(held_out)} held-out ones of {len(episodes)} episodes of {folder}"
    if namesakes and not own:
        words += (
            f", which has the names of {namesakes[0]['folder']} (if it is another: --split all)"
        )
    if any(record["sha256"] != here["sha256"] for record in own):
        words += "; the checkpoint held out others, and may have been trained on these"
    return held_out, words


def why_unseen(records: list[dict]) -> str:
    """Why a checkpoint with these split_record()s is taken not to have seen other episodes."""
    if not records:
        return "the checkpoint names no episodes that it was trained on"
    folders = ", ".join(record["folder"] for record in records)
    return f"which the checkpoint was not trained on (but on {folders})"


def draw_prompts(
    backbone: model.Backbone, episodes: list, args: argparse.Namespace, think: bool, local: slice
) -> Prompts:
    """This rank's share of args.prompts prompts at random steps of the episodes: the same for each
    checkpoint whose action tokens span as many steps."""
    tokenizer = backbone.action_tokenizer
    rng = model.rng(args.seed, 11)
    drawn = []
    for _ in range(args.prompts):
        episode = episodes[int(rng.integers(len(episodes)))]
        starts = fast_tokenizer.chunk_starts(episode, tokenizer.horizon)
        drawn.append((episode, starts[int(rng.integers(len(starts)))]))

    rows = []
    chunks = []
    for episode, step in drawn[local]:
        prompt = model.action_prompt(episode.task, think)
        rows.append(model.encode(backbone, prompt, [episode.frame(step)], prompt_only=True))
        chunks.append(fast_tokenizer.action_chunks(episode, tokenizer.horizon)[step])  # (K, A)
    chunks = np.reshape(chunks, (-1, tokenizer.horizon, tokenizer.action_dim)).astype(np.float32)
    targets = tokenizer.encode(chunks) if rows else []
    return Prompts(list(range(args.prompts)[local]), rows, targets, chunks, drawn[local])


STATEMENTS = {  # the world that an episode's source begins with -> module that has statements()
    "tabletop": "benchmarks.tabletop_data",
}
Statements = Callable[[str, str], dict[str, bool]]


def statements_of(episodes: list) -> Statements | None:
    """What tells which statements of a thought are true, given the true thought; None when these
    episodes hold no thoughts, or are not all of one world in STATEMENTS."""
    worlds = {episode.source.partition(" ")[0] for episode in episodes}
    known = [STATEMENTS.get(world) for world in worlds]
    if len(known) != 1 or None in known or any(episode.thoughts is None for episode in episodes):
        return None
    return importlib.import_module(known[0]).statements


def true_shares(statements: Statements, own: list[str], true_thought: str) -> dict[str, float]:
    """The model's own thoughts about one prompt -> {"thought true": share of their statements that
    are true, "thought true NAME": how often this one is}."""
    each = [statements(thought, true_thought) for thought in own]
    shares = {name: float(np.mean([is_true[name] for is_true in each])) for name in each[0]}
    by_name = {f"thought true {name}": share for name, share in shares.items()}
    return {"thought true": float(np.mean(list(shares.values()))), **by_name}


def steps_of(prompts: Prompts, dist: model.Dist) -> list[tuple[str, int]]:
    """(episode, step) of the prompts of all ranks; all ranks call it."""
    return gather([(episode.name, step) for episode, step in prompts.steps], dist)


class Score(NamedTuple):
    """What a prompt's n completions are worth."""

    # "reward", "r_f", "r_a", "l1" (NaN: none decodes), "truncated"; of true_shares() what is known
    means: dict[str, float]
    thoughts: set[str] | None  # those that differ; None: none was asked for
    actions: set[tuple[int, ...]]  # lists of action ids that decode


def complete(
    backbone: model.Backbone, prompts: Prompts, n: int, greedy: bool, args
) -> list[list[int]]:
    """B * n lists of token ids, those of a prompt side by side."""
    if not prompts.rows:  # a rank may have none
        return []
    samples = model.generate(
        backbone,
        prompts.rows,
        n,
        args.max_new_tokens,
        greedy=greedy,
        seed=args.seed,
        keys=prompts.keys,
        rollout_batch=args.batch,
        cuda_graphs=args.cuda_graphs,
    )
    completions = []
    for ids, mask in zip(samples["ids"], samples["mask"].bool(), strict=True):
        completions.append(ids[mask].tolist())
    return completions


def score_completions(
    backbone: model.Backbone,
    completions: list[list[int]],
    n: int,
    prompts: Prompts,
    kind: str,
    think: bool,
    statements: Statements | None = None,
) -> list[Score]:
    """Scores of B prompts with n completions each, those of a prompt side by side. kind: one of
    grpo.REWARDS. statements: of thoughts, where it is known which are true.

    "l1" is over the completions that decode, in normalised units (range 2); r_f says how many there
    are. "truncated" is the share that the limit of tokens cut off: it is never in the format.
    1. reward   2. distance of the decoded actions   3. each prompt"""
    if not completions:
        return []
    # 1. reward
    targets = [target for target in prompts.targets for _ in range(n)]
    reward, parts = grpo.reward(backbone, completions, targets, kind, think)

    # 2. distance of the decoded actions; a completion that is not in the format decodes to NaN
    action_ids = []
    for completion, r_f in zip(completions, parts["r_f"], strict=True):
        parsed = model.parse_actions(backbone, completion)
        action_ids.append(parsed.action_ids if r_f else [])
    decoded, _ = backbone.action_tokenizer.decode(action_ids)  # (B * n, K, A)
    demonstrated = prompts.chunks.repeat(n, axis=0)  # (B * n, K, A)
    stats = backbone.action_tokenizer.stats
    if stats is not None:
        decoded = fast_tokenizer.normalize(decoded, stats)
        demonstrated = fast_tokenizer.normalize(demonstrated, stats)
    l1 = np.abs(decoded - demonstrated).mean((1, 2))  # (B * n,)

    # 3. each prompt
    truncated = np.array([backbone.vocab.eos not in ids for ids in completions], float)
    scores = []
    for b in range(len(prompts.rows)):
        of_prompt = slice(b * n, (b + 1) * n)
        means = {}
        for name, values in (("reward", reward), ("r_f", parts["r_f"]), ("r_a", parts["r_a"])):
            means[name] = float(values[of_prompt].mean())
        finite = l1[of_prompt][np.isfinite(l1[of_prompt])]
        means["l1"] = float(finite.mean()) if len(finite) else float("nan")
        means["truncated"] = float(truncated[of_prompt].mean())
        thoughts = None
        if think:
            own_thoughts = [vla.thought_text(backbone, ids) for ids in completions[of_prompt]]
            thoughts = set(own_thoughts) - {""}
            if statements:
                episode, step = prompts.steps[b]
                means |= true_shares(statements, own_thoughts, episode.thoughts[step])
        actions = {tuple(ids) for ids in action_ids[of_prompt] if ids}
        scores.append(Score(means, thoughts, actions))
    return scores


def action_tokens(args: argparse.Namespace):
    """`evaluate.py actions`: format rate, r_a, L1; thinking and direct; sampled and greedy. Of
    thoughts, where the episodes hold true ones, the share of true statements.

    1. the model, with an action tokenizer for the targets   2. this rank's prompts
    3. complete and score them   4. metrics, of the prompts of all ranks"""
    from benchmarks import rejection

    started = time.time()
    rejection.check_actions(args)
    dist = start_ranks(args)

    # 1. the model, with an action tokenizer for the targets
    backbone = load_backbone(args.policy, args.device)
    args.max_new_tokens = model.token_limit(args.max_new_tokens, backbone, 96)
    if backbone.action_tokenizer is None:
        if not args.action_tokenizer:
            raise ValueError(
                f"{args.policy}: no action tokenizer; name one for the targets with "
                "--action-tokenizer"
            )
        backbone.action_tokenizer = fast_tokenizer.FastTokenizer.load(args.action_tokenizer)
    elif args.action_tokenizer:
        other = fast_tokenizer.FastTokenizer.load(args.action_tokenizer)
        if other.horizon != backbone.action_tokenizer.horizon:
            raise ValueError(
                f"--action-tokenizer {args.action_tokenizer}: {args.policy} has one of its own, of "
                f"{backbone.action_tokenizer.horizon} actions a chunk, not {other.horizon}"
            )
    episodes, words = episodes_to_ask(backbone, args.data, args.split)
    if dist.rank == 0:
        print(f"{args.prompts} prompts from {words}; {args.max_new_tokens} tokens at most")

    metrics = {}
    paired = {}
    for mode, think in (("think", True), ("direct", False)):
        # 2. this rank's prompts
        prompts = draw_prompts(backbone, episodes, args, think, local_share(dist))
        targets = gather(prompts.targets, dist)
        statements = statements_of(episodes) if think else None
        for style, n in (("sampled", args.samples), ("greedy", 1)):
            # 3. complete and score them
            completions = complete(backbone, prompts, n, style == "greedy", args)
            local_scores = score_completions(
                backbone, completions, n, prompts, args.reward, think, statements
            )

            # 4. metrics, of the prompts of all ranks
            new_metrics, new_paired = action_metrics(gather(local_scores, dist), n)
            if dist.rank == 0:
                print_scores(mode, style, new_metrics, targets)
            for name, interval in new_metrics.items():
                metrics[f"{mode} {style} {name}"] = interval
            for name, values in new_paired.items():
                paired[f"{mode} {style} {name}"] = values
            if args.keep_right and (mode, style) == ("think", "sampled"):
                local_kept = rejection.kept_actions(backbone, completions, prompts, args)
                kept = gather(local_kept, dist)
    steps = steps_of(prompts, dist)  # those of either mode
    if dist.rank == 0:
        words = f"{args.prompts} from {words}"
        items = dict.fromkeys(paired, steps)
        write_metrics(metrics, paired, args, started, items, words)
        if args.keep_right:
            rejection.write_actions(kept, args)


PAIRED = ["reward", "r_a", "l1", "thought true"]  # what two models are compared in, by prompt


def action_metrics(
    scores: list[Score], n: int
) -> tuple[dict[str, Interval], dict[str, list[float | None]]]:
    """Scores of all prompts, n completions each -> metrics; of those in PAIRED each prompt's value.

    "l1" leaves out prompts without a completion that decodes: their value is None. Few distinct
    actions to many prompts are a collapsed policy."""
    metrics = {}
    paired = {}
    for name in scores[0].means:
        of_prompts = [score.means[name] for score in scores]
        metrics[name] = bootstrap([value for value in of_prompts if not np.isnan(value)])
        if name in PAIRED:
            rounded = [round(value, 5) for value in of_prompts]
            paired[name] = [None if np.isnan(value) else value for value in rounded]
    distinct = {"actions": set().union(*[score.actions for score in scores])}
    if scores[0].thoughts is not None:
        distinct["thoughts"] = set().union(*[score.thoughts for score in scores])
    for kind, of_all in distinct.items():
        total = len(scores) * n
        metrics[f"distinct {kind}"] = {"mean": len(of_all), "low": None, "high": None, "n": total}
    return metrics, paired


def print_scores(mode: str, style: str, metrics: dict[str, Interval], targets: list[list[int]]):
    """A line or two of `evaluate.py actions`; a dash where no completion decodes."""
    words = []
    for name in ("reward", "r_f", "r_a", "l1", "truncated"):
        mean = metrics[name]["mean"]
        words.append(f"{name} -" if mean is None else f"{name} {mean:.3f}")
    actions = metrics["distinct actions"]
    distinct = f"actions {actions['mean']}"
    if "distinct thoughts" in metrics:
        distinct = f"thoughts {metrics['distinct thoughts']['mean']}, {distinct}"
    distinct_targets = len({tuple(target) for target in targets})
    print(
        f"{mode:6s} {style:7s}  {'  '.join(words)}  distinct {distinct} "
        f"of {actions['n']} (targets {distinct_targets} of {len(targets)})"
    )
    statements = []
    for name, value in metrics.items():
        if name.startswith("thought true"):
            short = name.removeprefix("thought true").strip() or "all"
            statements.append(f"{short} {value['mean']:.3f}")
    if statements:
        print(f"  true in thoughts: {', '.join(statements)}")


# ---- Questions -----------------------------------------------------------------------------------


def vqa(args: argparse.Namespace):
    """`evaluate.py vqa`: scores of greedy answers, by kind of row, and how many were cut off. By
    --score row also the mean of all, "answers", whose paired values stand in the order of rows."""
    from benchmarks import questions, rejection

    started = time.time()
    rejection.check_answers(args)
    dist = start_ranks(args)
    if args.answers and Path(args.answers).is_dir():
        raise ValueError(f"--answers {args.answers}: a folder; name a file in it")
    backbone = load_backbone(args.policy, args.device)
    args.max_new_tokens = model.token_limit(args.max_new_tokens, backbone, 128)
    asked = questions.questions_to_ask(backbone, args)
    local = local_share(dist)
    answers = gather(questions.answer_greedily(backbone, asked[local], args), dist)
    if args.keep_right:
        keys = list(range(len(asked)))[local]
        kept = gather(rejection.kept_answers(backbone, asked[local], keys, args), dist)
    if dist.rank > 0:
        return
    if args.answers:
        questions.write_answers(args.answers, answers)
    metrics, paired = answer_metrics(answers, by_row=args.score == "row")
    truncated = sum(answer.truncated for answer in answers)
    metrics["truncated"] = wilson(truncated, len(answers))
    rows = [args.score]
    for one in asked:
        rows.append([*[message["content"] for message in one.sample.messages], one.right.text])
    items = dict.fromkeys(paired, tuple(rows))
    write_metrics(metrics, paired, args, started, items)
    if args.keep_right:
        rejection.write(kept, args)


def answer_metrics(
    answers: list, by_row: bool
) -> tuple[dict[str, Interval], dict[str, list[float]]]:
    """Scored answers (questions.Answer) -> metrics and paired values, as write_metrics() takes
    them. by_row: with the mean of all, "answers"."""
    values = {}  # metric -> scores
    for answer in answers:
        values.setdefault(answer.metric, []).append(answer.score)
    metrics = {}
    for name, scores in sorted(values.items()):
        score, _ = name.split()
        if score in ("exact", "choice", "number"):  # each answer is right or wrong
            metrics[name] = wilson(sum(scores), len(scores))
        else:
            metrics[name] = bootstrap(scores)
    paired = {}
    if by_row:
        paired["answers"] = [round(answer.score, 5) for answer in answers]
        metrics["answers"] = bootstrap(paired["answers"])
    return metrics, paired


def blind(args: argparse.Namespace):
    """`evaluate.py blind`: what questions are worth to one who sees no image, in two variants."""
    from benchmarks import questions

    started = time.time()
    dist = model.setup(seed=0)  # nothing is drawn
    check_out(args.out)
    if dist.rank > 0:  # there is no work to share
        return
    for variant, answers in questions.blind_answers(args.train, args.data).items():
        args.variant = variant
        args.policy = args.train  # in the file: where the answers come from
        write_metrics(*answer_metrics(answers, by_row=True), args, started)
        started = time.time()


# ---- Report --------------------------------------------------------------------------------------

COLUMNS = {  # head of a column: its metric
    "format (think)": "think sampled r_f",
    "reward": "think sampled reward",
    "r_a": "think sampled r_a",
    "L1": "think sampled l1",
    "true thoughts": "think sampled thought true",
    "spatial": "success spatial",
    "object": "success object",
    "goal": "success goal",
    "long": "success long",
    "average": "success",
    "chain length": "chain length",
}
# Regular expressions of metrics of which each has a row of its own, named by the first group.
TRUE_STATEMENTS = "think sampled thought true (.+)"
ANSWERS = f"((?:{'|'.join(grpo.SCORES)})(?:_graded)? .+|answers)"
# What variants are compared in, where each prompt's, trial's or chain's value is known.
GREEDY = ["think greedy r_a", "think greedy l1", "think greedy thought true"]
COMPARED = [*COLUMNS.values(), *GREEDY, *[f"{mode} success" for mode in vla.MODES], "answers"]


def report(args: argparse.Namespace):
    """`evaluate.py report`: results files -> a Markdown table and differences between variants of
    each. Prints them, writes them to args.markdown if that is set, and keeps args.minutes and
    args.note in the files."""
    texts = []
    for path in args.files:
        results = read_results(path)
        unknown = sorted({"preset", "seeds", "hardware", "minutes"} - set(results))
        if unknown:
            raise ValueError(f"{path}: does not say its {', '.join(unknown)}; measure again")
        if args.minutes:
            results["minutes_whole_run"] = args.minutes
        if args.note:
            results["note"] = args.note
        if args.minutes or args.note:
            model.write_json(path, results)
        names = named_variants(args.variants, list(results["arms"]), path)
        variants = [(name, results["arms"][name]) for name in names]  # one may come twice
        lines = [
            heading(results),
            "",
            *table(variants),
            "",
            "Paired differences (same prompts, trials and chains):",
            "",
            *paired_differences(variants),
            *distinct_actions(variants),
            *ways_to_drive(variants),
            *rows_by_kind("true in sampled thoughts", TRUE_STATEMENTS, variants),
            *rows_by_kind("answers, by score and kind", ANSWERS, variants),
        ]
        texts.append("\n".join(lines) + "\n")
        print(texts[-1])
    if args.markdown:
        Path(args.markdown).parent.mkdir(parents=True, exist_ok=True)
        Path(args.markdown).write_text("\n".join(texts), "utf-8")


def named_variants(text: str, known: list[str], path: str | Path) -> list[str]:
    """Names of --variants, which commas separate and may hold themselves; of "" all. ValueError for
    one that the file does not know."""
    if not text:
        return known
    names = []
    while text:
        fitting = [name for name in known if f"{text},".startswith(f"{name},")]
        if not fitting:
            unknown = text.split(",", 1)[0]
            raise ValueError(f"{path}: no variant {unknown}; it has {', '.join(known)}")
        names.append(max(fitting, key=len))
        text = text[len(names[-1]) + 1 :]
    return names


def heading(results: dict) -> str:
    """What was run where, and how long it took."""
    whole_run = results.get("minutes_whole_run")
    minutes = f"evaluation {results['minutes']} min"
    if whole_run:
        minutes = f"the whole run {whole_run} min, {minutes}"
    words = (
        f"Preset {results['preset']}, seeds {results['seeds']}, {results['hardware']}; {minutes}. "
        "Mean [95% interval]; success in percent."
    )
    if "tokens" in results:
        words += f" {tokens_sentence(results['tokens'])}"
    if "note" in results:
        words = f"**{results['note']}** {words}"
    return words


def tokens_sentence(tokens: dict) -> str:
    """What `evaluate.py tokens` found, for the caption of the table."""
    success = tokens["metrics"]["success"]
    subject = "Through these action tokens the expert itself"
    if not tokens["action_tokenizer"]:
        subject = "Without action tokens the expert"
    return (
        f"{subject} succeeds in {cell('success', success)} percent of {success['n']} trials "
        f"({tokens['execute']} of {tokens['horizon']} actions executed)."
    )


def table(variants: list[tuple[str, dict]]) -> list[str]:
    """Lines of a Markdown table: a row for each variant, a column for each of COLUMNS that somebody
    measured. None when nobody measured any."""
    measured = {metric for _, variant in variants for metric in variant["metrics"]}
    columns = {head: metric for head, metric in COLUMNS.items() if metric in measured}
    if not columns:
        return []
    lines = [
        "| model | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, variant in variants:
        cells = [cell(metric, variant["metrics"].get(metric)) for metric in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def cell(metric: str, value: Interval | None) -> str:
    """mean [low, high], a success in percent; a dash where nothing was measured."""
    if value is None or value["mean"] is None:
        return "-"
    if "success" in metric.split():
        mean, low, high = (f"{100 * value[key]:.1f}" for key in ("mean", "low", "high"))
    else:
        mean, low, high = (f"{value[key]:.3f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def paired_differences(variants: list[tuple[str, dict]]) -> list[str]:
    """Each variant minus the one above it, for what is COMPARED, measured on the same items.
    Left out are items of which one of the two has no value. Of what is right or wrong, as success,
    also McNemar's test."""
    lines = []
    for (old_name, old), (new_name, new) in itertools.pairwise(variants):
        for metric in COMPARED:
            digests = [variant.get("items", {}).get(metric) for variant in (old, new)]
            if None not in digests and digests[0] != digests[1]:  # older files have none
                lines.append(f"- {metric}: {new_name} was measured on other items than {old_name}")
                continue
            before = np.array(old["paired"].get(metric, []), float)  # NaN: no value
            after = np.array(new["paired"].get(metric, []), float)
            if len(before) != len(after):
                continue
            has_values = ~np.isnan(after - before)
            before, after = before[has_values], after[has_values]
            gain = bootstrap(after - before)
            if gain["n"]:
                line = f"{metric}: {new_name} - {old_name} = {cell(metric, gain)}, n {gain['n']}"
                if np.isin([before, after], (0, 1)).all():
                    test = mcnemar(before, after)
                    line += f"; {test.gained} gained, {test.lost} lost, McNemar's p {test.p:.2g}"
                lines.append(f"- {line}")
    return lines


def distinct_actions(variants: list[tuple[str, dict]]) -> list[str]:
    """A line each for sampled and greedy rollouts with the counts of all variants, none when nobody
    counted."""
    lines = []
    for style in ("sampled", "greedy"):
        metric = f"think {style} distinct actions"
        counts = []
        for name, variant in variants:
            if metric in variant["metrics"]:
                counts.append(f"{name} {variant['metrics'][metric]['mean']}")
        if counts:
            lines.append(f"- distinct actions in {style} thinking rollouts: {', '.join(counts)}")
    return lines


def ways_to_drive(variants: list[tuple[str, dict]]) -> list[str]:
    """Lines of another Markdown table: success by the head and by the model's own tokens, each with
    the seconds that a chunk took. None when no model drove by its own tokens."""
    measured = [name for _, variant in variants for name in variant["metrics"]]
    if not any(f"{mode} success" in measured for mode in vla.MODES):
        return []
    lines = [
        "",
        "| driven by | " + " | ".join(name for name, _ in variants) + " |",
        "|---" * (len(variants) + 1) + "|",
    ]
    for mode in ("", *vla.MODES):
        row_name = f"its own tokens, {mode}" if mode else "its head"
        metric = f"{mode} success" if mode else "success"
        cells = []
        for _, variant in variants:
            success = cell("success", variant["metrics"].get(metric))
            for way, seconds in variant.get("seconds", {}).items():
                mode_of_way = " ".join(way.split()[1:])  # "tabletop think" -> "think"
                if mode_of_way == mode:
                    success += f", {seconds['chunk']:.3f} s"
            cells.append(success)
        lines.append(f"| {row_name} | " + " | ".join(cells) + " |")
    return lines


def rows_by_kind(head: str, pattern: str, variants: list[tuple[str, dict]]) -> list[str]:
    """Lines of a Markdown table: a row for each metric that fits the pattern, a column for each
    variant. None when nobody measured any."""
    rows = {}  # metric -> its name in the table, in the order in which they were measured
    for _, variant in variants:
        for metric in variant["metrics"]:
            if match := re.fullmatch(pattern, metric):
                rows[metric] = match[1]
    if not rows:
        return []
    lines = [
        "",
        f"| {head} | " + " | ".join(name for name, _ in variants) + " |",
        "|---" * (len(variants) + 1) + "|",
    ]
    for metric, row in rows.items():
        cells = [cell(metric, variant["metrics"].get(metric)) for _, variant in variants]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


# ---- Command line --------------------------------------------------------------------------------


def results_flags(add):
    """Flags of all commands that measure something."""
    add("--out", default="results/results.json", help="results file, which is added to")
    add("--preset", default="", help="name of the run, noted in the results file; tabletop")


def common_flags(add):
    """Flags of all commands that measure a model."""
    results_flags(add)
    add(
        "--policy",
        required=True,
        help="checkpoint: vla, sft or grpo in a closed loop; base, sft or grpo else",
    )
    add("--variant", default="policy", help="name of the model: its row of the results table")
    add("--seed", type=natural, default=0, help="seed of sampling and of the policy's noise")
    add(
        "--device",
        type=lambda text: text and model.device_name(text),
        default="",
        help="cuda, cuda:1, ... or cpu; empty: this rank's GPU, else cpu",
    )


def closed_loop_flags(add):
    """Flags of all simulators; each has more in its module."""
    add("--execute", type=natural, default=0, help="steps of a chunk that are carried out; 0: half")
    add("--ensemble", type=non_negative, default=0, help="decay of temporal ensembling; 0: none")
    add("--batch", type=count, default=256, help="environments or clients a forward")
    vla.policy_flags(add)


def writing_flags(add):
    """Flags of what lets a model write."""
    add(
        "--max-new-tokens",
        type=count,
        help="tokens an answer at most; as in the checkpoint's own run if not given",
    )
    add("--batch", type=count, default=64, help="prompts a forward")
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, replay the sampler's steps as CUDA graphs",
    )


def split_flag(add):
    """Of what reads episodes by episodes_to_ask()."""
    add(
        "--split",
        default="auto",
        choices=["auto", "train", "held-out", "all"],
        help="of episodes; auto: held-out if the checkpoint was trained on their folder, else all",
    )


def episode_flags(add):
    """Flags of what asks for actions at steps of episodes."""
    add("--data", required=True, help="folder of episodes")
    split_flag(add)
    add("--prompts", type=count, default=512, help="prompts, at random steps")


def reward_flag(add):
    add("--reward", default="prefix", choices=list(grpo.REWARDS), help="measure of r_a")


def action_token_flags(add):
    """Flags of `actions` alone."""
    add(
        "--action-tokenizer",
        default="",
        help="action tokenizer for checkpoints that have none (base)",
    )
    add("--samples", type=count, default=4, help="samples a prompt at temperature 1")


def report_flags(add):
    add("files", nargs="+", help="results files")
    add("--markdown", default="", help="also write the table here")
    add("--variants", default="", help="rows of the table, in this order; empty: all")
    add("--minutes", type=non_negative, default=0, help="of the whole run, to be noted in the file")
    add("--note", default="", help="what the table's caption begins with, to be noted in the file")


INSIDE = {  # commands that look into a model: modules of benchmarks/ with arguments(), measure()
    "thought": "what follows another thought than its own",
    "gain": "what a gain is by: thoughts, or answers to them",
    "probe": "what frozen features tell, layer by layer",
}


def make_parser(asked: str) -> argparse.ArgumentParser:
    """The parser of all commands. Of benchmarks/, only the module asked for is imported."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    for name, text in SIMULATORS.items():
        command = commands.add_parser(name, help=text)
        common_flags(command.add_argument)
        closed_loop_flags(command.add_argument)
        if name == asked:
            simulator_module(name).arguments(command.add_argument)
        command.set_defaults(run=closed_loop)

    command = commands.add_parser("tokens", help="success of the expert through action tokens")
    results_flags(command.add_argument)
    if asked == "tokens":
        from benchmarks import tabletop_tokens

        tabletop_tokens.arguments(command.add_argument)
    command.set_defaults(run=expert_through_tokens)

    command = commands.add_parser("actions", help="action tokens on prompts from episodes")
    common_flags(command.add_argument)
    writing_flags(command.add_argument)
    episode_flags(command.add_argument)
    reward_flag(command.add_argument)
    action_token_flags(command.add_argument)
    if asked == "actions":
        from benchmarks import rejection

        rejection.arguments(command.add_argument)
    command.set_defaults(run=action_tokens)

    command = commands.add_parser("vqa", help="scored answers to questions")
    common_flags(command.add_argument)
    writing_flags(command.add_argument)
    if asked == "vqa":
        from benchmarks import questions, rejection

        questions.arguments(command.add_argument)
        rejection.arguments(command.add_argument)
        rejection.answer_arguments(command.add_argument)
    command.set_defaults(run=vqa)

    for name, text in INSIDE.items():
        command = commands.add_parser(name, help=text)
        common_flags(command.add_argument)
        if name == asked:
            module = importlib.import_module(f"benchmarks.{name}")
            module.arguments(command.add_argument)
            command.set_defaults(run=module.measure)

    command = commands.add_parser("blind", help="questions answered without their images")
    results_flags(command.add_argument)
    if asked == "blind":
        from benchmarks import questions

        questions.blind_arguments(command.add_argument)
    command.set_defaults(run=blind, seed=0)  # nothing is drawn

    command = commands.add_parser("report", help="results files -> Markdown")
    report_flags(command.add_argument)
    command.set_defaults(run=report)
    return parser


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else list(argv)
    asked = argv[0] if argv else ""
    args = make_parser(asked).parse_args(argv)
    args.argv = argv  # noted in the results file
    model.quiet_libraries()
    args.run(args)


if __name__ == "__main__":
    model.run_main(main, "--batch")
