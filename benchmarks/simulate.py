"""What real simulators share: demonstrations of their experts, and trials that ask one policy.

A simulator is a module of benchmarks/ with tasks(args) -> ["group/task"], options(args) -> {} that
JSON can hold, and Simulator(task, cameras=None, **options), which has limit (steps), fps,
    reset(number, split)    "eval": the benchmark's trial `number`; "train": other states
    observe() -> {"image": uint8 (H, W, 3), ..., "state": (S,), "prompt"}; renders, as nothing else
    advance(action (A,)) -> success;   expert() -> the next action;   close()
Simulators run in processes of their own (`python -m benchmarks.simulate` is one of them), in any
Python that has the simulator, and ask the evaluating process through benchmarks/serve.py.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
import zlib

import numpy as np
from tqdm import tqdm

from benchmarks import serve

# headless; mesa's software renderer is faster on few cores without threads of its own
for name, value in (("MUJOCO_GL", "egl"), ("PYOPENGL_PLATFORM", "egl"), ("LP_NUM_THREADS", "0")):
    os.environ.setdefault(name, value)


def subcommands(commands, parent):
    """serve, metaworld and libero of evaluate.py."""
    for name in ("serve", "metaworld", "libero"):
        module = importlib.import_module(f"benchmarks.{name}")
        parser = commands.add_parser(name, parents=[parent], help=module.__doc__.split(":")[0])
        module.arguments(parser.add_argument)
        if name != "serve":
            add = parser.add_argument
            add("--trials", type=int, default=module.TRIALS, help="trials a task")
            add("--workers", type=int, default=2, help="simulator processes")
            add("--python", default=sys.executable, help="Python that has the simulator")


def resume(path, head):
    """The trials that a stopped evaluation of the same `head` left in path: {(task, n): row}."""
    rows = []
    if path.exists():
        text = path.read_text()
        try:  # a last line without its end was cut off by the stop
            old, *rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
            differ = [k for k in head if old.get(k) != head[k]]
            rows = {(row["task"], row["trial"]): row for row in rows}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}: not trials of evaluate.py ({e!r}); delete it") from e
        if differ:
            raise ValueError(f"{path}: trials with another {', '.join(differ)}; delete it, or name "
                             "another --arm or --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [head, *dict(rows).values()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return dict(rows)


def trials(policy, args):
    """All trials of `evaluate.py metaworld | libero` -> [(group, task, success)] in fixed order.

    Each finished trial is kept in OUT.SIMULATOR.ARM.jsonl, from which the same command goes on.
    ValueError naming task and trial when a simulator crashes: that is no failure of the policy."""
    module, rest = importlib.import_module(f"benchmarks.{args.command}"), []
    options = {**module.options(args), "cameras": list(policy.cameras)}
    jobs = [(task, n) for task in module.tasks(args) for n in range(args.trials)]
    weights = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes()
                                      for p in policy.head.parameters())).hexdigest()[:16]
    head = {"weights": weights, "seed": args.seed, "execute": args.execute,
            "ensemble": args.ensemble, **options}
    path = pathlib.Path(args.out).with_suffix(f".{args.command}.{args.arm}.jsonl")
    server = serve.Server(policy, args.execute, args.ensemble, batch=args.batch, every=1 << 62)
    rows, crashed = resume(path, head), []
    left = [job for job in jobs if job not in rows]
    queue = iter(left)  # shared by the threads below
    command = [args.python, "-m", "benchmarks.simulate", args.command, json.dumps(options)]

    def feed(port):
        with contextlib.suppress(BrokenPipeError), subprocess.Popen(
                [*command, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                cwd=pathlib.Path(__file__).parents[1]) as worker:
            for job in queue:
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps(job), file=worker.stdin, flush=True)
                if not (line := worker.stdout.readline()):
                    crashed.append((*job, worker.wait()))
                if crashed:
                    return rest.append(job)
                rows[job] = json.loads(line)
                file.write(line)
                file.flush()
                bar.update()

    with (serve.background(server) as port, open(path, "a") as file,
          tqdm(total=len(jobs), initial=len(rows), desc="trials", disable=None) as bar,
          concurrent.futures.ThreadPoolExecutor(args.workers) as pool):
        list(pool.map(feed, [port] * min(args.workers, len(left))))
    if crashed:
        task, n, code = crashed[0]
        raise ValueError(f"the simulator stopped in task {task}, trial {n} (exit code {code}, its "
                         f"words are above); the same command goes on after the {len(rows)} trials "
                         f"in {path}")
    print(server)
    return [(*job[0].split("/"), rows[job]["success"]) for job in jobs]


def trial(env, infer, number):
    """One closed-loop trial -> (success, steps). Rendered only where a chunk begins."""
    env.reset(number, "eval")
    steps = 0
    while steps < env.limit:
        seed = [zlib.crc32(env.task.encode()), number, steps]
        actions = infer({**env.observe(), "seed": seed, "reset": steps == 0})["actions"]
        for action in actions[: env.limit - steps]:
            steps += 1
            if env.advance(action):
                return True, steps
    return False, steps


def worker(name, options, port):
    """Trials [task, number] from stdin, a row for each to stdout."""
    answers, env = os.fdopen(os.dup(1), "w"), None
    os.dup2(2, 1)  # what simulators print belongs to stderr
    module = importlib.import_module(f"benchmarks.{name}")
    with serve.client(port) as infer:
        for line in sys.stdin:
            (task, number), start = json.loads(line), time.time()
            if env is None or env.task != task:
                if env:
                    env.close()
                env = module.Simulator(task, **json.loads(options))
            success, steps = trial(env, infer, number)
            print(json.dumps({"task": task, "trial": number, "success": success, "steps": steps,
                              "seconds": round(time.time() - start, 2)}), file=answers, flush=True)
    if env:
        env.close()


def demonstrate(env, seed, noise):
    """One demonstration as arrays, or None when the expert failed. Recorded is what the expert does
    in each state; carried out is that plus noise, so that there are recoveries (DART, 1703.09327)."""
    env.reset(seed, "train")
    rng, rows, success = np.random.default_rng(seed), [], False
    while not success and len(rows) < env.limit:
        action = np.clip(env.expert(), -1, 1).astype(np.float32)
        rows.append({**env.observe(), "action": action})
        push = np.append(rng.normal(0, noise, len(action) - 1), 0)  # the gripper stays as it is
        success = env.advance(np.clip(action + push, -1, 1).astype(np.float32))
    names = rows[0].keys() - {"prompt"}
    return {k: np.stack([row[k] for row in rows]) for k in names} if success else None


def demonstrations(module, args):
    """-> (arrays, header) of each episode. Failures are dropped and counted; ten in a row raise."""
    tasks, failed = module.tasks(args), 0
    for t, task in enumerate(tasks):
        env = module.Simulator(task, **module.options(args))
        for e in range(args.episodes):
            number, arrays, tries = e * len(tasks) + t, None, 0  # tasks take turns in the folder
            while not arrays and tries < 10:
                seed = ((args.seed << 20) + number) * 10 + tries
                arrays, tries = demonstrate(env, seed, args.noise), tries + 1
            if not arrays:
                raise ValueError(f"{task}: the expert failed 10 times in a row; leave it out")
            failed += tries - 1
            yield number, arrays, {"task": env.prompt, "fps": str(env.fps), "source": task}
        env.close()
    print(f"{failed} failed demonstrations dropped")


def record(name, convert=None):
    """`python -m benchmarks.NAME`: the expert's demonstrations, or convert(args), as episodes."""
    from benchmarks.tabletop import write_episode
    from fast_tokenizer import statistics

    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(description="Demonstrations of a scripted expert.")
    add = parser.add_argument
    add("--out", required=True, help="folder to write")
    add("--episodes", type=int, default=20, help="demonstrations a task")
    add("--seed", type=int, default=0, help="of states and noise")
    add("--noise", type=float, default=0.1, help="std of what is added to the expert's actions")
    if convert:
        add("--convert", default="", help="instead: folder of the published demonstrations")
        add("--drop-noops", action="store_true", help="with it: leave out steps that do nothing")
    module.arguments(add)
    args = parser.parse_args()
    out, kept = pathlib.Path(args.out) / "episodes", []
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds data; name another --out or delete it")
    out.mkdir(parents=True, exist_ok=True)
    source = convert if convert and args.convert else demonstrations
    for number, arrays, header in tqdm(source(module, args), "episodes", disable=None):
        write_episode(out / f"episode_{number:06d}.safetensors", arrays, header)
        kept.append((arrays["action"], arrays["state"]))
    stats = {k: statistics(np.concatenate(x)) for k, x in zip(("action", "state"), zip(*kept))}
    (out / "stats.json").write_text(json.dumps(stats, indent=1))
    print(f"{out}: {len(kept)} episodes of {stats['action']['count']} steps")


def entry(run, *argv):
    try:
        run(*argv)
    except (ValueError, FileNotFoundError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    entry(worker, *sys.argv[1:])
