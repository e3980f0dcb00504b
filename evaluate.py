"""Every number that the project reports: closed-loop success, action tokens, answers, the table.

    python evaluate.py tabletop --policy runs/vla --chains 50 --arm RL --out results/run.json
    python evaluate.py actions --policy runs/grpo --data data/test --arm RL --out results/run.json
    python evaluate.py vqa --policy assets/tiny-vlm --data data/test/conversations.jsonl
    python evaluate.py metaworld|libero --policy runs/vla
    python evaluate.py calvin --policy runs/vla --data task_ABC_D --out results/calvin.json
    python evaluate.py report results/run.json

`metaworld`, `libero` and `calvin` are real simulators. All add
one arm to a results file; `report` makes one Markdown table of such files, with the paired
differences between consecutive arms. Every success rate carries its n and a 95% Wilson interval;
means carry a 95% bootstrap interval over prompts or chains (2,000 resamples, seed 0)."""

import argparse
import fcntl
import itertools
import json
import os
import pathlib
import platform
import shlex
import sys
import time

import numpy as np
import torch

import fast_tokenizer
import model


def wilson(successes, n):
    """Success rate in [0, 1] with its 95% Wilson score interval: {"mean", "low", "high", "n"}."""
    if n == 0:
        raise ValueError("a success rate needs at least one trial; raise --trials")
    z, p = 1.959964, successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    # the outer ends are exactly 0 and 1 at the extremes; rounding must not push them past the mean
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return {"mean": p, "low": min(low, p), "high": max(high, p), "n": n}


def bootstrap(values, resamples=2000):
    """Mean of values (N,), its 95% percentile bootstrap interval: {"mean", "low", "high", "n"}."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return {"mean": None, "low": None, "high": None, "n": 0}
    picks = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def chain_metrics(lengths):
    """Subtasks in a row of each chain, 0 .. 5 -> {"chain length", "chain 1" .. "chain 5"}."""
    rates = {f"chain {k}": wilson(sum(n >= k for n in lengths), len(lengths)) for k in range(1, 6)}
    return {"chain length": bootstrap(lengths), **rates}


def record(path, arm, metrics, args, started, paired=None):
    """Add metrics {name: interval} to `arm` of the results file, beside others that do the same."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = (
            read_results(path)
            if path.exists()
            else {"preset": args.preset, "arms": {}, "commands": []}
        )
        place = results["arms"].setdefault(arm, {"metrics": {}, "paired": {}, "checkpoints": {}})
        place["metrics"].update(metrics)
        place["paired"].update(paired or {})
        place["checkpoints"][args.command] = str(args.policy)
        results["seeds"] = sorted({*results.get("seeds", []), args.seed})
        gpus, cpu = torch.cuda.device_count(), f"{os.cpu_count()} CPU cores ({platform.machine()})"
        results["hardware"] = (
            f"{gpus} x {torch.cuda.get_device_name()}"
            if gpus
            else f"{cpu}, {torch.get_num_threads()} threads"
        )
        results["minutes"] = round(results.get("minutes", 0) + (time.time() - started) / 60, 2)
        results["versions"] = model.versions()
        command = shlex.join(["python", "evaluate.py", *args.argv])
        results["commands"] = [c for c in results["commands"] if c != command] + [command]
        model.write_json(path, results)
    for name, value in metrics.items():
        if len(name.split()) < 3:
            print(f"{name:24s}", "{mean:6.3f}  [{low:.3f}, {high:.3f}]  n {n}".format(**value))
    print(f"{path}: arm {arm}, {len(metrics)} metrics")


def read_results(path):
    """A results file as a dict. Raises ValueError when it is not one."""
    try:
        results = json.loads(pathlib.Path(path).read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: not JSON ({e.msg}); delete the file") from e
    if not isinstance(results, dict) or "arms" not in results:
        raise ValueError(f'{path}: no "arms" in it; give a results file that evaluate.py wrote')
    return results


SUITES = "spatial,object,goal,long,chain"


def tally(rows):
    """[(group, task, solved)] -> success of all, of each group, and of each task in it."""
    parts = {"success": [solved for _, _, solved in rows]} if rows else {}
    for group, task, solved in rows:
        for name in (f"success {group}", f"success {group} {task}"):
            parts.setdefault(name, []).append(solved)
    return {name: wilson(sum(part), len(part)) for name, part in parts.items()}


def tabletop(args):
    """`evaluate.py tabletop`: success per task and suite, chains, and GIFs of the first trials."""
    from benchmarks.tabletop import drive, make_trials
    from vla import Policy

    started, suites = time.time(), args.suites.split(",")
    if unknown := set(suites) - set(SUITES.split(",")):
        raise ValueError(f"--suites {','.join(sorted(unknown))}: choose from {SUITES}")
    policy = Policy.load(args.policy, device=args.device, seed=args.seed)
    trials = make_trials(suites, args.trials, args.chains)
    for trial in trials:
        trial.film = bool(args.gif) and trial.seed == 0 and trial.task < 2
        trial.shoot()
    drive(policy, trials, args.batch, args.execute, args.ensemble)
    rows = [(t.suite, t.task, t.solved) for t in trials if t.suite != "chain"]
    lengths, metrics = [t.solved for t in trials if t.suite == "chain"], tally(rows)
    metrics |= chain_metrics(lengths) if lengths else {}
    for trial in trials:
        trial.save(args.gif)
    paired = {"success": [solved for _, _, solved in rows], "chain length": lengths}
    record(args.out, args.variant, metrics, args, started, paired)


def simulator(args):
    """`evaluate.py metaworld | libero | calvin`: closed loops elsewhere; `serve`: for robots."""
    from benchmarks import calvin, simulate
    from vla import Policy

    started, policy = time.time(), Policy.load(args.policy, device=args.device, seed=args.seed)
    if args.command == "calvin":
        wins = calvin.play(policy, args.data, args.chains, args.execute, args.ensemble)
        metrics, name = chain_metrics(wins), "chain length"
    else:
        rows = simulate.trials(policy, args)
        metrics, name, wins = tally(rows), "success", [solved for _, _, solved in rows]
    return record(args.out, args.variant, metrics, args, started, {name: wins})


def held_out(backbone, data, count, seed, think):
    """`count` prompts at random steps of the episodes: (rows, target tokens, chunks (N, K, A))."""
    fast, files = (
        backbone.action_tokenizer,
        fast_tokenizer.read_episodes(data, action_tokenizer=backbone.action_tokenizer),
    )
    rng, rows, chunks = model.rng(seed, 11), [], []
    for _ in range(count):
        episode = files[int(rng.integers(len(files)))]
        t = int(rng.integers(len(episode)))
        prompt = model.action_prompt(episode.task, think)
        rows.append(model.encode(backbone, prompt, [episode.frame(t)], prompt_only=True))
        chunks.append(fast_tokenizer.action_chunks(episode, fast.horizon)[t])
    return rows, fast.encode(np.stack(chunks)), np.stack(chunks)


def score(backbone, ids, n, targets, chunks, think):
    """Scores of B * n lists of ids: (means by prompt {name: (B,)}, distinct thoughts and actions).

    "l1" is over the completions that decode, in normalised units (range 2); r_f says how many."""
    from grpo import reward

    value, info = reward(backbone, ids, [t for t in targets for _ in range(n)], think=think)
    made = [
        model.parse_actions(backbone, row)[2] if good else [] for row, good in zip(ids, info["r_f"])
    ]
    decoded, _ = backbone.action_tokenizer.decode(made)  # (B * n, K, A), NaN where malformed
    true = chunks.repeat(n, axis=0)
    if backbone.action_tokenizer.stats is not None:
        decoded, true = (
            fast_tokenizer.normalize(x, backbone.action_tokenizer.stats) for x in (decoded, true)
        )
    gap = np.abs(decoded - true).mean((1, 2)).reshape(-1, n)  # (B, n)
    means = {
        k: v.reshape(-1, n).mean(1)
        for k, v in (("reward", value), ("r_f", info["r_f"]), ("r_a", info["r_a"]))
    }
    some = np.isfinite(gap).any(1)
    means["l1"] = np.nanmean(gap[some], 1) if some.any() else np.zeros(0)
    thoughts = {backbone.tokenizer.decode(row).split("</think>")[0] for row in ids}
    return means, len(thoughts), len({tuple(m) for m in made if m})


def actions(args):
    """`evaluate.py actions`: format rate, r_a, L1; thinking and direct; sampled and greedy."""
    started = time.time()
    backbone = model.load(args.policy, device=args.device, stages=("base", "sft", "grpo"))
    if backbone.action_tokenizer is None:
        if not args.action_tokenizer:
            raise ValueError(
                f"{args.policy}: no action tokenizer; name one for the targets with --fast"
            )
        backbone.action_tokenizer = fast_tokenizer.FastTokenizer.load(args.action_tokenizer)
    metrics, paired = {}, {}
    for mode, think in (("think", True), ("direct", False)):
        rows, targets, chunks = held_out(backbone, args.data, args.prompts, args.seed, think)
        for style, n in (("sampled", args.samples), ("greedy", 1)):
            out = model.generate(
                backbone,
                rows,
                n,
                args.max_new_tokens,
                greedy=style == "greedy",
                seed=args.seed,
                rollout_batch=args.batch,
            )
            ids = [row[keep].tolist() for row, keep in zip(out["ids"], out["mask"].bool())]
            means, thoughts, distinct = score(backbone, ids, n, targets, chunks, think)
            for name, values in means.items():
                metrics[f"{mode} {style} {name}"] = bootstrap(values)
                if name in ("reward", "r_a"):
                    paired[f"{mode} {style} {name}"] = [round(float(v), 5) for v in values]
            total = len(rows) * n
            for name, count in (("distinct thoughts", thoughts), ("distinct actions", distinct)):
                metrics[f"{mode} {style} {name}"] = {
                    "mean": count,
                    "low": None,
                    "high": None,
                    "n": total,
                }
            line = "  ".join(
                f"{k} " + (f"{v.mean():.3f}" if len(v) else "-") for k, v in means.items()
            )
            print(
                f"{mode:6s} {style:7s}  {line}  distinct thoughts {thoughts}, actions {distinct} "
                f"of {total} (targets {len({tuple(t) for t in targets})} of {len(targets)})"
            )
    record(args.out, args.variant, metrics, args, started, paired)


def vqa(args):
    """`evaluate.py vqa`: marks (benchmarks/questions.py) of greedy answers, by kind of row."""
    from benchmarks.questions import marks

    started = time.time()
    backbone = model.load(args.policy, device=args.device, stages=("base", "sft", "grpo"))
    metrics = {
        f"{args.score} {kind}": bootstrap(v) if args.score == "point" else wilson(sum(v), len(v))
        for kind, v in sorted(marks(backbone, args).items())
    }
    record(args.out, args.variant, metrics, args, started)


COLUMNS = {
    "format (think)": "think sampled r_f",
    "reward": "think sampled reward",
    "r_a": "think sampled r_a",
    "L1": "think sampled l1",
    "spatial": "success spatial",
    "object": "success object",
    "goal": "success goal",
    "long": "success long",
    "average": "success",
    "chain length": "chain length",
}


def show(key, value):
    """One cell: mean [low, high]; a dash where nothing was measured."""
    if value is None or value["mean"] is None:
        return "-"
    k, form = (100, "{:.1f}") if key.startswith("success") else (1, "{:.3f}")
    mean, low, high = (form.format(k * value[x]) for x in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def report(args):
    """`evaluate.py report`: results files -> one Markdown table, and differences between arms."""
    for path in args.files:
        results = read_results(path)
        if args.minutes:
            results["minutes_whole_run"] = args.minutes
            model.write_json(path, results)
        whole = results.get("minutes_whole_run")
        about = (
            f"Preset {results['preset']}, seeds {results['seeds']}, {results['hardware']}; "
            + (f"the whole run {whole} min, " if whole else "")
            + f"evaluation {results['minutes']} min. Mean [95% interval]; success in percent."
        )
        names = args.variants.split(",") if args.variants else list(results["arms"])
        if missing := set(names) - set(results["arms"]):
            raise ValueError(
                f"{path}: no arm {', '.join(sorted(missing))}; it has {', '.join(results['arms'])}"
            )
        arms = [(name, results["arms"][name]) for name in names]
        lines = [
            about,
            "",
            "| arm | " + " | ".join(COLUMNS) + " |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        for arm, place in arms:
            cells = [show(key, place["metrics"].get(key)) for key in COLUMNS.values()]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        lines += ["", "Paired differences (same prompts, trials and chains):", ""]
        for (first, a), (second, b) in itertools.pairwise(arms):
            for key in COLUMNS.values():
                old, new = a["paired"].get(key), b["paired"].get(key)
                if old and new and len(old) == len(new):
                    gain = bootstrap(np.array(new, float) - np.array(old, float))
                    lines.append(f"- {key}: {second} - {first} = {show(key, gain)}, n {gain['n']}")
        key = "think sampled distinct actions"
        counts = [
            f"{arm} {place['metrics'][key]['mean']}"
            for arm, place in arms
            if key in place["metrics"]
        ]
        if counts:
            lines.append("- distinct actions in sampled thinking rollouts: " + ", ".join(counts))
        text = "\n".join(lines) + "\n"
        print(text)
        if args.markdown:
            pathlib.Path(args.markdown).write_text(text)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, *parents):
        return commands.add_parser(name, help=text, parents=parents).add_argument

    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--policy", required=True, help="checkpoint: vla in a closed loop; base, sft, grpo else")
    add("--variant", default="policy", help="row of the results table")
    add("--out", default="results/results.json", help="results file; the arm is added to it")
    add("--preset", default="tabletop", help="name of the run, noted in the results file")
    add("--seed", type=int, default=0, help="seed of sampling and of the policy's noise")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    loop = argparse.ArgumentParser(add_help=False, parents=[common])
    add = loop.add_argument
    add("--execute", type=int, default=0, help="steps of a chunk that are carried out; 0: half")
    add("--ensemble", type=float, default=0, help="decay of temporal ensembling; 0: none")
    add("--batch", type=int, default=256, help="environments or clients a forward")
    asked = (sys.argv[1:] if argv is None else argv)[:1]
    for name in ("metaworld", "libero"):
        add = command(name, "closed-loop success in a real simulator", loop)
        if asked == [name]:  # its flags are in its module
            from benchmarks import simulate

            simulate.evaluation_arguments(name, add)
    add = command("tabletop", "closed-loop success on Tabletop", loop)
    add("--suites", default=SUITES, help="chain is CALVIN's protocol")
    add("--trials", type=int, default=10, help="trials a task (10 tasks a suite)")
    add("--chains", type=int, default=100, help="chains of five instructions")
    add("--gif", default="", help="folder for rollouts as animated GIFs (two tasks a suite)")
    add = command("calvin", "CALVIN's chains", loop)
    add("--data", required=True, help="a CALVIN dataset; its validation/ describes the environment")
    add("--chains", type=int, default=1000, help="the first chains of the 1,000")
    add = command("actions", "action tokens on held-out prompts", common)
    add("--data", required=True, help="folder of held-out episodes")
    add(
        "--action-tokenizer",
        default="",
        help="action tokenizer for checkpoints that have none (base)",
    )
    add("--prompts", type=int, default=512, help="held-out prompts")
    add("--samples", type=int, default=4, help="samples a prompt at temperature 1")
    add("--max-new-tokens", type=int, default=96, help="tokens a completion at most")
    add("--batch", type=int, default=64, help="prompts a forward")
    add = command("vqa", "marked answers to questions", common)
    add("--data", required=True, help="conversations, .jsonl")
    add("--score", default="exact", choices=["exact", "choice", "number", "point"])
    add(
        "--prompt",
        default="row",
        choices=["row", "think", "direct"],
        help="mode of the prompt; row: as the row's own answer begins",
    )
    add("--unit", type=float, default=1, help="what points are divided by; 0: the image's pixels")
    add("--answers", default="", help="also write each answer here, .jsonl")
    add("--rows", type=int, default=0, help="first rows of the file; 0: all")
    add("--max-new-tokens", type=int, default=128, help="tokens an answer at most")
    add("--batch", type=int, default=64, help="rows a forward")
    add = command("report", "results files -> Markdown")
    add("files", nargs="+", help="results files")
    add("--markdown", default="", help="also write the table here")
    add("--variants", default="", help="rows of the table, in this order; empty: all")
    add("--minutes", type=float, default=0, help="of the whole run, to be noted")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    {f.__name__: f for f in (tabletop, actions, vqa, report)}.get(args.command, simulator)(args)


if __name__ == "__main__":
    model.run_main(main, "--batch")
