"""What real simulators share: demonstrations of their experts, and trials that ask one policy.

A simulator is a module of benchmarks/ with TRIALS (a task), arguments(add), tasks(args) ->
["group/task"] and Simulator(task, size, limit) with limit (steps), fps, cameras, prompt, env and
    reset(number, split)    "eval": the benchmark's trial `number`; "train": other states
    observe(cameras) -> {"image": uint8 (H, W, 3), ..., "state": (S,)}
    advance(action (A,) in [-1, 1], look) -> success; look: observe follows, else nothing renders
    expert() -> the next action
It runs in processes of its own (`python -m benchmarks.simulate` is one), in any Python that has it,
and asks the evaluating process through tools/serve.py.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys

import numpy as np
from tqdm import tqdm

from tools import protocol

# headless; mesa's software renderer is faster on few cores without threads of its own
os.environ.update(
    {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl", "LP_NUM_THREADS": "0", **os.environ}
)


def arguments(module, add):
    """Flags of recording and evaluation alike."""
    module.arguments(add)
    add("--size", type=int, default=128, help="image side, the same in training and evaluation")
    add("--limit", type=int, default=0, help="steps a trial; 0: the benchmark's own")


def evaluation_arguments(name, add):
    """Flags of `evaluate.py NAME`."""
    module = importlib.import_module(f"benchmarks.{name}")
    arguments(module, add)
    add("--trials", type=int, default=module.TRIALS, help="trials a task")
    add("--workers", type=int, default=2, help="simulator processes")
    add("--python", default=sys.executable, help="a Python that has the simulator")


def trials(policy, args):
    """All trials of `evaluate.py metaworld | libero` -> [(group, task, success)] in fixed order.

    Finished ones stand in OUT.SIMULATOR.ARM.HASH.jsonl (of weights and settings), from which the
    same command goes on. ValueError naming task and trial when a simulator crashes."""
    module, crashed = importlib.import_module(f"benchmarks.{args.command}"), []
    settings = [args.seed, args.execute, args.ensemble, args.size, args.limit]
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in policy.head.parameters())
    mark = hashlib.sha256(json.dumps(settings).encode() + weights).hexdigest()[:8]
    path = pathlib.Path(args.out).with_suffix(f".{args.command}.{args.variant}.{mark}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    rows = [json.loads(line) for line in path.read_text().split("\n") if line.endswith("}")]
    done = {(row["task"], row["trial"]): row["success"] for row in rows}
    jobs = [(task, n) for task in module.tasks(args) for n in range(args.trials)]
    left = [job for job in jobs if job not in done]
    from tools.serve import Server  # not above: workers run in a Python without torch

    server = Server(policy, args.execute, args.ensemble, batch=args.batch)

    def work(start):
        """Every so many of the trials that are left, in one worker process."""
        mine = left[start :: args.workers]
        order = json.dumps([args.command, args.size, args.limit, port, mine])
        with subprocess.Popen(
            [args.python, "-m", "benchmarks.simulate", order],
            text=True,
            stdout=subprocess.PIPE,
            cwd=pathlib.Path(__file__).parents[1],
        ) as worker:
            for line in worker.stdout:
                row = json.loads(line)
                done[row["task"], row["trial"]] = row["success"]
                file.write("\n" + line.strip())  # what a stop cuts off keeps a line of its own
                bar.update()
                if crashed:
                    worker.kill()
        crashed.extend((*job, worker.returncode) for job in mine if job not in done)

    with (
        server.listen() as port,
        open(path, "a", 1) as file,
        tqdm(total=len(jobs), initial=len(done), desc="trials", disable=None) as bar,
        concurrent.futures.ThreadPoolExecutor(args.workers) as pool,
    ):
        list(pool.map(work, range(min(args.workers, len(left)))))
    if crashed:
        task, n, code = crashed[0]
        raise ValueError(
            f"the simulator stopped in task {task}, trial {n} (exit code {code}, see "
            f"above); the same command goes on after the {len(done)} trials in {path}"
        )
    print(server)
    return [(*task.split("/"), done[task, n]) for task, n in jobs]


def worker(name, size, limit, port, jobs):
    """Trials [(task, number)] -> a row for each to stdout. Renders where a chunk begins."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what simulators print belongs to stderr
    module = importlib.import_module(f"benchmarks.{name}")
    with protocol.client(port) as (infer, about):
        for task, trials in itertools.groupby(jobs, lambda job: job[0]):
            env = module.Simulator(task, size, limit)
            for _, number in trials:
                env.reset(number, "eval")
                chunk = []
                for step in range(env.limit):
                    if not chunk:
                        obs = {**env.observe(about["cameras"]), "prompt": env.prompt}
                        chunk = list(infer({**obs, "reset": step == 0})["actions"])
                    if success := env.advance(chunk.pop(0), look=not chunk):
                        break
                row = {"task": task, "trial": number, "success": success, "steps": step + 1}
                print(json.dumps(row), file=answers, flush=True)
            env.env.close()


def demonstrate(name, args, number, task):
    """-> (arrays, header) of demonstration `number` of a task; arrays None when the expert failed.
    Recorded is what the expert does in each state; carried out is that plus noise, so that there
    are recoveries (DART, arXiv 1703.09327)."""
    env = importlib.import_module(f"benchmarks.{name}").Simulator(task, args.size, args.limit)
    env.reset(seed := (args.seed << 24) + number, "train")
    rng, rows, success = np.random.default_rng(seed), [], False
    while not success and len(rows) < env.limit:
        action = np.clip(env.expert(), -1, 1).astype(np.float32)
        rows.append({**env.observe(env.cameras), "action": action})
        push = np.append(rng.normal(0, args.noise, len(action) - 1), 0)  # not on the gripper
        success = env.advance(np.clip(action + push, -1, 1).astype(np.float32))
    env.env.close()
    arrays = {k: np.stack([row[k] for row in rows]) for k in rows[0]} if success else None
    return arrays, {"task": env.prompt, "fps": str(env.fps), "source": task}


def demonstrations(name, args):
    """-> (arrays, header) of each, tasks in turns; failures are dropped and counted."""
    tasks, failed = importlib.import_module(f"benchmarks.{name}").tasks(args), collections.Counter()
    jobs = [(name, args, *job) for job in itertools.product(range(args.episodes), tasks)]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, spawn) as pool:
        for arrays, header in pool.map(demonstrate, *zip(*jobs, strict=True)):
            failed[header["source"]] += arrays is None
            if arrays:
                yield arrays, header
    print(f"{failed.total()} failed demonstrations dropped: {dict(+failed)}")


def record(name, convert=None):
    """`python -m benchmarks.NAME`: the expert's demonstrations, or convert(args), as episodes."""
    from fast_tokenizer import write_episodes

    module = importlib.import_module(f"benchmarks.{name}")
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
    arguments(module, add)
    args = parser.parse_args()
    made = convert(args) if convert and args.convert else demonstrations(name, args)
    write_episodes(pathlib.Path(args.out) / "episodes", made)


if __name__ == "__main__":
    worker(*json.loads(sys.argv[1]))
