"""What real simulators share: demonstrations of their experts, and trials that ask one policy.

A simulator is a module of benchmarks/ with tasks(args) -> ["group/task"], options(args) -> what JSON
can hold, and Simulator(task, **options) with limit (steps), fps, cameras, prompt, env.close() and
    reset(number, split)    "eval": the benchmark's trial `number`; "train": other states
    observe(cameras) -> {"image": uint8 (H, W, 3), ..., "state": (S,)}
    advance(action (A,) in [-1, 1], look) -> success; look: observe follows, else nothing renders
    expert() -> the next action
It runs in processes of its own (`python -m benchmarks.simulate` is one), in any Python that has it,
and asks the evaluating process through benchmarks/serve.py.
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
import zlib

import numpy as np
from tqdm import tqdm

from benchmarks import serve

# headless; mesa's software renderer is faster on few cores without threads of its own
for name, value in (("MUJOCO_GL", "egl"), ("PYOPENGL_PLATFORM", "egl"), ("LP_NUM_THREADS", "0")):
    os.environ.setdefault(name, value)


def subcommands(commands, parent):
    """serve, metaworld and libero for evaluate.py."""
    for name in ("serve", "metaworld", "libero"):
        module = importlib.import_module(f"benchmarks.{name}")
        parser = commands.add_parser(name, parents=[parent], help=module.__doc__.split("\n")[0])
        module.arguments(add := parser.add_argument)
        if name != "serve":
            add("--trials", type=int, default=module.TRIALS, help="trials a task")
            add("--workers", type=int, default=2, help="simulator processes")
            add("--python", default=sys.executable, help="a Python that has the simulator")


def resume(path, head):
    """{(task, number): success} of the trials that a stopped evaluation with this head left."""
    lines = [head]
    with contextlib.suppress(FileNotFoundError):
        try:  # what follows the last line's end was cut off by the stop
            lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]] or lines
            if differ := [k for k in head if lines[0].get(k) != head[k]]:
                raise ValueError(f"trials with another {', '.join(differ)}")
            {row["task"]: row["trial"] for row in lines[1:]}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}: {e}; delete it, or name another --arm or --out") from e
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {(row["task"], row["trial"]): row["success"] for row in lines[1:]}


def trials(policy, args):
    """All trials of `evaluate.py metaworld | libero` -> [(group, task, success)] in fixed order.

    Finished ones stand in OUT.SIMULATOR.ARM.jsonl, from which the same command goes on. ValueError
    naming task and trial when a simulator crashes: that is no failure of the policy."""
    module, crashed = importlib.import_module(f"benchmarks.{args.command}"), []
    jobs = [(task, n) for task in module.tasks(args) for n in range(args.trials)]
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in policy.head.parameters())
    head = {"weights": hashlib.sha256(weights).hexdigest()[:16], "seed": args.seed,
            "execute": args.execute, "ensemble": args.ensemble, **module.options(args)}
    path = pathlib.Path(args.out).with_suffix(f".{args.command}.{args.arm}.jsonl")
    server = serve.Server(policy, args.execute, args.ensemble, batch=args.batch, every=1 << 62)
    done = resume(path, head)
    left = [job for job in jobs if job not in done]
    queue = iter(left)  # shared by the threads below
    command = [args.python, "-m", "benchmarks.simulate", args.command,
               json.dumps(module.options(args))]

    def feed(port):
        with contextlib.suppress(BrokenPipeError), subprocess.Popen(
                [*command, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                cwd=pathlib.Path(__file__).parents[1]) as worker:
            for job in queue:
                if crashed:
                    return
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps(job), file=worker.stdin, flush=True)
                if not (line := worker.stdout.readline()):
                    return crashed.append((*job, worker.wait()))
                done[job] = json.loads(line)["success"]
                file.write(line)
                file.flush()
                bar.update()

    with (serve.background(server) as port, open(path, "a") as file,
          tqdm(total=len(jobs), initial=len(done), desc="trials", disable=None) as bar,
          concurrent.futures.ThreadPoolExecutor(args.workers) as pool):
        list(pool.map(feed, [port] * min(args.workers, len(left))))
    if crashed:
        task, n, code = crashed[0]
        raise ValueError(f"the simulator stopped in task {task}, trial {n} (exit code {code}, its "
                         f"words are above); the same command goes on after the {len(done)} trials "
                         f"in {path}")
    print(server)
    return [(*task.split("/"), done[task, n]) for task, n in jobs]


def worker(name, options, port):
    """Trials [task, number] from stdin, a row for each to stdout. Renders where a chunk begins."""
    answers, env, last = os.fdopen(os.dup(1), "w"), None, None
    os.dup2(2, 1)  # what simulators print belongs to stderr
    module = importlib.import_module(f"benchmarks.{name}")
    with serve.client(port) as (infer, about):
        for line in sys.stdin:
            task, number = json.loads(line)
            if task != last:
                if env:
                    env.env.close()
                env, last = module.Simulator(task, **json.loads(options)), task
            if unknown := set(about["cameras"]) - set(env.cameras):
                raise ValueError(f"{name} has no camera {min(unknown)}, which the policy needs; it "
                                 f"has {', '.join(env.cameras)}")
            env.reset(number, "eval")
            steps, success = 0, False
            while steps < env.limit and not success:
                seed = [zlib.crc32(task.encode()), number, steps]
                obs = {**env.observe(about["cameras"]), "prompt": env.prompt, "seed": seed}
                chunk = infer({**obs, "reset": not steps})["actions"][: env.limit - steps]
                for i, action in enumerate(chunk, 1):
                    steps += 1
                    if success := env.advance(np.clip(action, -1, 1), look=i == len(chunk)):
                        break
            print(json.dumps({"task": task, "trial": number, "success": success, "steps": steps}),
                  file=answers, flush=True)
    if env:
        env.env.close()


def demonstrate(env, seed, noise):
    """One demonstration as arrays, or None when the expert failed. Recorded is what the expert does
    in each state; carried out is that plus noise, so that there are recoveries (DART, 1703.09327)."""
    env.reset(seed, "train")
    rng, rows, success = np.random.default_rng(seed), [], False
    while not success and len(rows) < env.limit:
        action = np.clip(env.expert(), -1, 1).astype(np.float32)
        rows.append({**env.observe(env.cameras), "action": action})
        push = np.append(rng.normal(0, noise, len(action) - 1), 0)  # the gripper stays as it is
        success = env.advance(np.clip(action + push, -1, 1).astype(np.float32))
    return {k: np.stack([row[k] for row in rows]) for k in rows[0]} if success else None


def demonstrations(module, args):
    """-> (number, arrays, header) of each; failures are dropped and counted, a task is left out
    after ten in a row. Numbers are such that the tasks take turns in the folder."""
    tasks, failed = module.tasks(args), 0
    for t, task in enumerate(tasks):
        env = module.Simulator(task, **module.options(args))
        for number in range(t, args.episodes * len(tasks), len(tasks)):
            for seed in range(10 * number, 10 * number + 10):
                if arrays := demonstrate(env, (args.seed << 24) + seed, args.noise):
                    yield number, arrays, {"task": env.prompt, "fps": str(env.fps), "source": task}
                    break
                failed += 1
            else:
                print(f"{task}: the expert failed 10 times in a row; the task is left out here")
                break
        env.env.close()
    print(f"{failed} failed demonstrations dropped")


def record(name, convert=None):
    """`python -m benchmarks.NAME`: the expert's demonstrations, or convert(...), as episodes."""
    from benchmarks.tabletop import write_episode
    from fast_tokenizer import statistics

    module, kept = importlib.import_module(f"benchmarks.{name}"), []
    parser = argparse.ArgumentParser(description="Demonstrations of a scripted expert.")
    add = parser.add_argument
    add("--out", required=True, help="folder to write")
    add("--episodes", type=int, default=20, help="demonstrations a task")
    add("--seed", type=int, default=0, help="of states and noise, below 10")
    add("--noise", type=float, default=0.1, help="std of what is added to the expert's actions")
    if convert:
        add("--convert", default="", help="instead: folder of the published demonstrations")
        add("--drop-noops", action="store_true", help="with it: leave out steps that do nothing")
    module.arguments(add)
    args = parser.parse_args()
    out = pathlib.Path(args.out) / "episodes"
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds data; name another --out or delete it")
    out.mkdir(parents=True, exist_ok=True)
    source = convert if convert and args.convert else demonstrations
    for number, arrays, header in tqdm(source(module, args), "episodes", disable=None):
        write_episode(out / f"episode_{number:06d}.safetensors", arrays, header)
        kept.append((arrays["action"], arrays["state"]))
    if kept:
        stats = {k: statistics(np.concatenate(x)) for k, x in zip(("action", "state"), zip(*kept))}
        (out / "stats.json").write_text(json.dumps(stats, indent=1))
    print(f"{out}: {len(kept)} episodes of {sum(len(a) for a, _ in kept)} steps")


def entry(run, *argv):
    try:
        run(*argv)
    except (ValueError, FileNotFoundError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    entry(worker, *sys.argv[1:])
