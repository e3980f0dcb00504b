"""What simulators share: the outcome of an evaluation, and, for real simulators, demonstrations of
their experts and trials that ask one policy.

A benchmark is a module of benchmarks/ with
    arguments(add)               flags of `evaluate.py NAME`; add is a parser's add_argument
    check(args)                  ValueError when they are wrong, before a policy is loaded
    evaluate(policy, args)       -> Outcome
metaworld.py and libero.py, which are driven by the code below, also have TRIALS (a task),
task_arguments(add) (flags of recording and evaluation alike), tasks(args) -> ["group/task"] and
Simulator(task, size, limit) with limit (steps), fps, cameras, prompt, env and
    reset(number, split)         "eval": the benchmark's trial `number`; "train": other states
    observe(cameras)             -> {"image": uint8 (H, W, 3), ..., "state": (S,)}
    advance(action, look)        (A,) in [-1, 1] -> success; renders only if look: observe follows
    expert()                     -> the next action

A real simulator runs in processes of its own (`python -m benchmarks.simulate` is one), in any
Python that has it, even one without torch, and asks the evaluating process through tools/serve.py.
"""

import argparse
import collections
import concurrent.futures
import functools
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tools import protocol

ROOT = Path(__file__).parents[1]

# ---- Outcome -------------------------------------------------------------------------------------


class TrialResult(NamedTuple):
    group: str  # suite
    task: str | int
    solved: bool | int


class Outcome(NamedTuple):
    """What a benchmark hands to evaluate.py; None for what it does not have."""

    trials: list[TrialResult] | None = None  # single tasks, in an order that all policies share
    chain_lengths: list[int] | None = None  # subtasks in a row that each chain got to


def render_headless():
    """Set the environment variables by which mujoco renders without a screen; before its import.

    Mesa's software renderer is faster on few cores without threads of its own. What the user has
    set stays."""
    for name, value in (
        ("MUJOCO_GL", "egl"),
        ("PYOPENGL_PLATFORM", "egl"),
        ("LP_NUM_THREADS", "0"),
    ):
        os.environ.setdefault(name, value)


def size_arguments(add):
    """Flags that recording and evaluation share."""
    add("--size", type=int, default=128, help="image side, the same in training and evaluation")
    add("--limit", type=int, default=0, help="steps a trial; 0: the benchmark's own")


# ---- Trials: the evaluating process --------------------------------------------------------------


def trial_arguments(add, trials: int):
    """Flags of `evaluate.py NAME` for a real simulator; trials: how many of a task by default."""
    size_arguments(add)
    add("--trials", type=int, default=trials, help="trials a task")
    add("--workers", type=int, default=2, help="simulator processes")
    add("--python", default=sys.executable, help="a Python that has the simulator")


def results_path(name: str, policy, args) -> Path:
    """OUT.SIMULATOR.VARIANT.HASH.jsonl: finished trials of these weights and settings."""
    settings = [args.seed, args.execute, args.ensemble, args.size, args.limit]
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in policy.head.parameters())
    digest = hashlib.sha256(json.dumps(settings).encode() + weights).hexdigest()[:8]
    return Path(args.out).with_suffix(f".{name}.{args.variant}.{digest}.jsonl")


def run_trials(name: str, policy, args) -> Outcome:
    """All trials of `evaluate.py metaworld | libero`, in a fixed order.

    Finished ones stand in a file (see results_path), from which the same command goes on.
    ValueError naming task and trial when a simulator crashes.
    1. what is left to do   2. serve the policy, share the rest among worker processes"""
    from tools.serve import Server  # not above: workers run in a Python without torch

    # 1. what is left to do
    module = importlib.import_module(f"benchmarks.{name}")
    jobs = [(task, number) for task in module.tasks(args) for number in range(args.trials)]
    path = results_path(name, policy, args)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    solved = {}  # (task, number) -> success
    for line in path.read_text().split("\n"):
        if line.endswith("}"):  # a line that a stop cut off does not
            row = json.loads(line)
            solved[row["task"], row["trial"]] = row["success"]
    jobs_left = [job for job in jobs if job not in solved]

    # 2. serve the policy, share the rest among worker processes
    server = Server(policy, args.execute, args.ensemble, batch=args.batch)
    crashes = []  # (task, number, exit code)

    def run_worker(start):
        """Every so many of the trials that are left, in one worker process."""
        own_jobs = jobs_left[start :: args.workers]
        order = json.dumps([name, args.size, args.limit, port, own_jobs])
        command = [args.python, "-m", "benchmarks.simulate", order]
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, cwd=ROOT) as process:
            for line in process.stdout:
                row = json.loads(line)
                solved[row["task"], row["trial"]] = row["success"]
                file.write("\n" + line.strip())  # what a stop cuts off keeps a line of its own
                progress.update()
                if crashes:  # of another worker
                    process.kill()
        for task, number in own_jobs:
            if (task, number) not in solved:
                crashes.append((task, number, process.returncode))

    with (
        server.listen() as port,
        open(path, "a", 1) as file,
        tqdm(total=len(jobs), initial=len(solved), desc="trials", disable=None) as progress,
        concurrent.futures.ThreadPoolExecutor(args.workers) as pool,
    ):
        list(pool.map(run_worker, range(min(args.workers, len(jobs_left)))))
    if crashes:
        task, number, code = crashes[0]
        raise ValueError(
            f"the simulator stopped in task {task}, trial {number} (exit code {code}, see "
            f"above); the same command goes on after the {len(solved)} trials in {path}"
        )
    print(server)
    return Outcome([TrialResult(*job[0].split("/"), solved[job]) for job in jobs])


# ---- Trials: a worker process --------------------------------------------------------------------


def worker(name: str, size: int, limit: int, port: int, jobs: list):
    """Trials [(task, number)] -> a row of JSON for each to stdout.

    Takes stdout for the rows; what simulators print goes to stderr."""
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(f"benchmarks.{name}")
    with protocol.client(port) as (infer, metadata):
        for task, jobs_of_task in itertools.groupby(jobs, lambda job: job[0]):
            env = module.Simulator(task, size, limit)
            for _, number in jobs_of_task:
                success, steps = run_trial(env, number, infer, metadata["cameras"])
                row = {"task": task, "trial": number, "success": success, "steps": steps}
                print(json.dumps(row), file=rows, flush=True)
            env.env.close()


def run_trial(env, number: int, infer, cameras: list[str]) -> tuple[bool, int]:
    """One trial -> success, steps taken. Renders only where a chunk begins."""
    env.reset(number, "eval")
    actions = []  # of the chunk, still to be carried out
    for step in range(env.limit):
        if not actions:
            obs = env.observe(cameras)
            answer = infer({**obs, "prompt": env.prompt, "reset": step == 0})
            actions = list(answer["actions"])
        action = actions.pop(0)
        success = env.advance(action, look=not actions)
        if success:
            break
    return success, step + 1


# ---- Demonstrations ------------------------------------------------------------------------------


def demonstration(name: str, args, number: int, task: str) -> tuple[dict | None, dict[str, str]]:
    """Demonstration `number` of a task: (arrays, header); arrays None when the expert failed.

    Recorded is what the expert does in each state; carried out is that plus noise, so that there
    are recoveries (DART, arXiv 1703.09327)."""
    env = importlib.import_module(f"benchmarks.{name}").Simulator(task, args.size, args.limit)
    seed = (args.seed << 24) + number
    env.reset(seed, "train")
    rng = np.random.default_rng(seed)
    rows = []
    success = False
    while not success and len(rows) < env.limit:
        action = np.clip(env.expert(), -1, 1).astype(np.float32)
        rows.append({**env.observe(env.cameras), "action": action})
        push = np.append(rng.normal(0, args.noise, len(action) - 1), 0)  # not on the gripper
        success = env.advance(np.clip(action + push, -1, 1).astype(np.float32))
    env.env.close()
    header = {"task": env.prompt, "fps": str(env.fps), "source": task}
    if not success:
        return None, header
    arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return arrays, header


def demonstrations(name: str, args):
    """Yields (arrays, header) of each, tasks in turns; failures are dropped and counted."""
    module = importlib.import_module(f"benchmarks.{name}")
    numbers = []
    tasks = []
    for number, task in itertools.product(range(args.episodes), module.tasks(args)):
        numbers.append(number)
        tasks.append(task)
    failed = collections.Counter()
    make = functools.partial(demonstration, name, args)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, spawn) as pool:
        for arrays, header in pool.map(make, numbers, tasks):
            if arrays is None:
                failed[header["source"]] += 1
            else:
                yield arrays, header
    counts = {task: failed[task] for task in module.tasks(args) if failed[task]}
    print(f"{failed.total()} failed demonstrations dropped: {counts}")


def record(name: str, convert=None):
    """`python -m benchmarks.NAME`: writes the expert's demonstrations as episodes.

    convert(args): yields the published demonstrations, which --convert asks for instead."""
    from fast_tokenizer import write_episodes  # not above: workers need no tokenizer

    parser = argparse.ArgumentParser(description="Demonstrations of a scripted expert.")
    add = parser.add_argument
    add("command", nargs="?", choices=["record"], help="of the scripted expert")
    add("--out", required=True, help="folder to write")
    add("--episodes", type=int, default=20, help="demonstrations a task that are tried")
    add("--seed", type=int, default=0, help="of states and noise, below 10")
    add("--workers", type=int, default=2, help="simulator processes")
    add("--noise", type=float, default=0.1, help="std of what is added to the expert's actions")
    if convert:
        add("--convert", default="", help="instead: folder of the published demonstrations")
        add("--drop-noops", action="store_true", help="with it: leave out steps that do nothing")
    importlib.import_module(f"benchmarks.{name}").task_arguments(add)
    size_arguments(add)
    args = parser.parse_args()
    if convert and args.convert:
        recordings = convert(args)
    else:
        recordings = demonstrations(name, args)
    write_episodes(Path(args.out) / "episodes", recordings)


if __name__ == "__main__":
    worker(*json.loads(sys.argv[1]))
