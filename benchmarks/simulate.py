"""What simulators share: the outcome of an evaluation, and, for real simulators, demonstrations of
their experts and trials that ask one policy.

A benchmark is a module of benchmarks/ with
    arguments(add)                   flags of `evaluate.py NAME`; add is a parser's add_argument
    check(args)                      ValueError when they are wrong, before a policy is loaded or
                                     a recording begins
    evaluate(policy, args, local)    -> Outcome of trials[local], this process's share of them all;
                                     noise by a trial's own numbers, so that shares change nothing
                                     and compared policies meet the same in each of its steps
metaworld.py and libero.py, which are driven by the code below, also have TRIALS (a task),
STATE_DIM and ACTION_NAMES (see check_policy), task_arguments(add) (flags of recording and
evaluation alike), tasks(args) -> ["group/task"] and Simulator(task, sizes, limit), sizes being
{camera: [H, W]}, with limit (steps), fps, cameras, prompt, env and
    reset(number, split)         "eval": the benchmark's trial `number`; "train": other states
    observe(cameras)             -> {"image": uint8 (H, W, 3), ..., "state": (S,)}
    advance(action, look)        (A,) in [-1, 1] -> success; renders only if look: observe follows
    expert()                     -> the next action
    scene()                      -> Scene: what a recording keeps beside, of the state then seen

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
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools import protocol
from tools.extras import require

ROOT = Path(__file__).parents[1]

# ---- Outcome -------------------------------------------------------------------------------------


class TrialResult(NamedTuple):
    group: str  # suite
    task: str | int
    solved: bool | int


class Outcome(NamedTuple):
    """What a benchmark hands to evaluate.py, of this process's share; None for what it does not
    have."""

    trials: list[TrialResult] | None = None  # single tasks, in an order that all policies share
    chain_lengths: list[int] | None = None  # subtasks in a row that each chain got to


def check_once(flag: str, chosen: Sequence[str]):
    """ValueError when a flag names something twice: the same trials again make n larger and the
    interval narrower, but measure nothing."""
    twice = sorted({name for name in chosen if chosen.count(name) > 1})
    if twice:
        raise ValueError(f"{flag}: {', '.join(twice)} is named twice; name each once")


def check_limit(limit: int, most: int):
    """ValueError when --limit asks for more steps than the simulator takes in a trial: the one
    after them would be a crash, in the middle of an evaluation."""
    if limit > most:
        raise ValueError(f"--limit {limit}: the simulator takes at most {most} steps in a trial")


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


SIDE = 128  # pixels: --size where neither the user nor the checkpoint says one


# ---- Does the policy fit? ------------------------------------------------------------------------


def check_policy(policy, cameras: Sequence[str], state_dim: int, action_names: Sequence[str]):
    """Before the first trial: ValueError when the policy reads or does something else than the
    simulator shows and takes. action_names: of the dimensions, each of which is -1 .. 1."""
    unknown = [name for name in policy.cameras if name not in cameras]
    if unknown:
        raise ValueError(
            f"the policy reads the cameras {', '.join(policy.cameras)}; the simulator has "
            f"{', '.join(cameras)}: train with these names"
        )
    state_stats = policy.spec["stats"].get("state")  # none of a policy that reads no state
    trained_dim = len(state_stats["q01"]) if state_stats else state_dim
    if trained_dim != state_dim:
        raise ValueError(
            f"the policy was trained on states of {trained_dim} numbers, the simulator shows "
            f"{state_dim}; train on recordings of this simulator"
        )
    dims = len(action_names)
    check_action_range(policy.spec, [-1.0] * dims, [1.0] * dims, action_names)


def check_action_range(
    spec: dict, low: Sequence[float], high: Sequence[float], names: Sequence[str]
):
    """ValueError, in a line that names the dimension, when the actions that a policy was trained on
    are of another convention than those that a simulator takes, low .. high (A,) by names.

    spec: vla.PolicySpec; what older checkpoints do not hold is not checked. Refused are
    1. another number of dimensions
    2. values further beyond low .. high than a tenth of its width: degrees, joint angles
    3. a gripper that moves, but never to one side of the middle: 0 .. 1 never opens or never closes
    4. movements that all stay below a twentieth of a full one: metres or radians a step
    What stays still may be anywhere, but for 2: tasks need not move each dimension."""
    # 1. another number of dimensions
    dims = len(spec["stats"]["action"]["q01"])
    if dims != len(names):
        raise ValueError(
            f"the policy was trained on actions of {dims} numbers, the simulator takes "
            f"{len(names)} ({', '.join(names)}); train on recordings of this simulator"
        )
    if "action_range" not in spec:
        return
    low = np.asarray(low)  # (A,)
    high = np.asarray(high)
    trained_low = np.asarray(spec["action_range"]["low"])
    trained_high = np.asarray(spec["action_range"]["high"])
    width = high - low
    middle = (low + high) / 2
    is_gripper = np.array(["gripper" in name for name in names])
    is_finger = np.array(["finger" in name for name in names])  # Meta-World's effort

    def refuse(i: int, why: str, cure: str):
        raise ValueError(
            f"action dimension {i + 1} ({names[i]}): the policy was trained on "
            f"{trained_low[i]:g} .. {trained_high[i]:g}, the simulator takes {low[i]:g} .. "
            f"{high[i]:g}: {why}; {cure} in the training data and train the head again"
        )

    # 2. values beyond
    beyond = np.maximum(trained_high - high, low - trained_low) / width
    if beyond.max() > 0.1:
        refuse(int(beyond.argmax()), "what is beyond would be cut off", "convert this dimension")

    # 3. a gripper of one side
    moves = trained_high - trained_low > 0.01 * width
    never_low = trained_low > middle - 0.05 * width
    never_high = trained_high < middle + 0.05 * width
    for i in np.flatnonzero(is_gripper & moves & (never_low | never_high)):
        end = low[i] if never_low[i] else high[i]
        why = f"it could never be told {end:g}"
        refuse(int(i), why, f"stretch it to {low[i]:g} .. {high[i]:g}")

    # 4. movements that are next to nothing
    reach = np.maximum(trained_high - middle, middle - trained_low) / (width / 2)
    reach[is_gripper | is_finger] = 0
    largest = int(reach.argmax())
    if 0 < reach[largest] < 0.05:
        why = "the arm would hardly move, and in no other dimension further"
        refuse(largest, why, "divide movements by what the simulator makes of 1")


def image_sizes(policy, size: int, default: int) -> dict[str, list[int]]:
    """What to render: camera of the policy -> [H, W], pixels. size: --size, 0: what the policy was
    trained on, and `default` where its checkpoint does not say. ValueError when a square is no
    image of training at another scale."""
    trained = policy.spec.get("image_sizes", {})
    sizes = {}
    for camera in policy.cameras:
        height, width = trained.get(camera, (default, default))
        if size and height != width:
            raise ValueError(
                f"--size {size}: a square, but the policy was trained on {camera} of {height} x "
                f"{width} (height x width); leave --size away"
            )
        sizes[camera] = [size, size] if size else [height, width]
    return sizes


# ---- Films ---------------------------------------------------------------------------------------

FILM_SIDE = 256  # width of a film's frame, pixels
FILM_RATE = 10  # frames a second that a film has at most, about
FILMED_TASKS = 2  # of each group: their first trial is filmed
TITLE_HEIGHT = 24  # above the frame, pixels: a line or two
CAPTION_LINES = 4  # of the thought below it
CAPTION_HEIGHT = 19  # of a line, pixels: readable also where the film is shown at half its size


class Film:
    """Frames of a trial under its instruction and over its thoughts, to be an animated GIF that
    runs as fast as the robot. frames: PIL images of 64 colours.

    fps: steps a second of the simulator; of a fast one only every so many steps, `every`, are
    shot. ValueError when Pillow is missing."""

    def __init__(self, fps: float):
        self.images, self.drawing, self.fonts = require(
            "pillow", "PIL.Image", "PIL.ImageDraw", "PIL.ImageFont"
        )
        self.frames = []
        self.every = max(1, round(fps / FILM_RATE))
        self.duration = round(1000 * self.every / fps)  # of a frame, ms

    def shoot(self, image: np.ndarray, title: str, thought: str | None = None):
        """Keep a frame (H, W, 3) uint8. thought: None where the policy writes none."""
        shown = self.images.fromarray(image)
        height = round(FILM_SIDE * shown.height / shown.width)
        if shown.width != FILM_SIDE:
            shown = shown.resize((FILM_SIDE, height), self.images.Resampling.LANCZOS)
        bottom = TITLE_HEIGHT + height
        caption_height = 0 if thought is None else CAPTION_LINES * CAPTION_HEIGHT
        picture = self.images.new("RGB", (FILM_SIDE, bottom + caption_height), "white")
        picture.paste(shown, (0, TITLE_HEIGHT))
        draw = self.drawing.Draw(picture)
        small = self.fonts.load_default()
        title_lines = wrap(title, small, FILM_SIDE - 8)[:2]
        for number, line in enumerate(title_lines):
            top = 11 * number if len(title_lines) > 1 else 6
            draw.text((4, top), line, "black", small)
        if thought is not None:
            font = self.fonts.load_default(CAPTION_HEIGHT - 3)
            lines = wrap(thought, font, FILM_SIDE - 8)[:CAPTION_LINES]
            for number, line in enumerate(lines):
                draw.text((4, bottom + number * CAPTION_HEIGHT), line, "black", font)
        self.frames.append(picture.quantize(64))

    def save(self, folder: str | Path, name: str):
        """Write the frames as folder/name.gif."""
        path = Path(folder) / f"{name}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        first, *others = self.frames
        pause = [self.frames[-1]] * 6  # the end stays to be seen
        first.save(
            path, save_all=True, append_images=others + pause, duration=self.duration, loop=0
        )


def wrap(text: str, font, width: int) -> list[str]:
    """Lines of whole words, each at most `width` pixels wide (or one word)."""
    lines = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def film_name(group: str, task: str | int, solved: bool | int) -> str:
    return f"{group}_{task}_{'success' if solved else 'failure'}"


def folder_for_films(text: str) -> str:
    """The value of --film; a file is refused before the hours of the first trial."""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    return text


def film_argument(add, *earlier_names: str):
    """A flag that all evaluations share."""
    add(
        "--film",
        *earlier_names,
        dest="film",
        type=folder_for_films,
        default="",
        metavar="FOLDER",
        help=f"folder for animated GIFs, with any thoughts: the first trial of {FILMED_TASKS} "
        "tasks a suite, the first chains; what was over before is not filmed",
    )


def trials_to_film(jobs: Sequence[tuple[str, int]]) -> set[tuple[str, int]]:
    """Of trials ("group/task", number) the first of FILMED_TASKS tasks of each group."""
    tasks_of = {}  # group -> tasks, in their order
    for task, _ in jobs:
        tasks_of.setdefault(task.split("/")[0], {})[task] = None
    chosen = set()
    for tasks in tasks_of.values():
        chosen |= {(task, 0) for task in list(tasks)[:FILMED_TASKS]}
    return chosen


# ---- Trials that are over ------------------------------------------------------------------------


class FinishedTrials:
    """OUT.SIMULATOR.VARIANT.HASH.jsonl: trials of these weights and settings, a row each, so that
    the same command goes on after a crash or a stop, on any number of ranks. rows: those of before.

    All ranks append to the one file, a row in one write."""

    def __init__(self, name: str, policy, args, further_settings: list):
        settings = [args.seed, args.execute, args.ensemble, *further_settings]
        content = hashlib.sha256(json.dumps(settings).encode())
        for piece in policy.identity():
            content.update(piece)
        digest = content.hexdigest()[:8]
        variant = args.variant.replace("/", "_")  # it may be the path of a checkpoint
        self.path = Path(args.out).with_suffix(f".{name}.{variant}.{digest}.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self.rows = []
        for line in self.path.read_text().split("\n"):
            if line.endswith("}"):  # a line that a stop cut off does not
                self.rows.append(json.loads(line))

    def add(self, row: dict):
        with open(self.path, "a") as file:  # what a stop cuts off keeps a line of its own
            file.write("\n" + json.dumps(row))


# ---- Trials: the evaluating process --------------------------------------------------------------


def limit_argument(add):
    """A flag that recording and evaluation share."""
    from fast_tokenizer import natural  # not above: workers need no tokenizer

    add("--limit", type=natural, default=0, help="steps a trial; 0: the benchmark's own")


def program(text: str) -> str:
    """The value of --python, as a whole path: workers run in another folder. What cannot be run is
    refused before a policy is loaded."""
    found = shutil.which(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no program that can be run")
    return os.path.abspath(found)  # links stay: a virtual environment's python is one


def trial_arguments(add, trials: int):
    """Flags of `evaluate.py NAME` for a real simulator; trials: how many of a task by default."""
    from fast_tokenizer import count, natural

    add(
        "--size",
        type=natural,
        default=0,
        help=f"side of rendered images, pixels; 0: as in training, {SIDE} for an old checkpoint",
    )
    limit_argument(add)
    add("--trials", type=count, default=trials, help="trials a task")
    add("--workers", type=count, default=2, help="simulator processes of each rank")
    add("--python", type=program, default=sys.executable, help="a Python that has the simulator")
    film_argument(add)


def run_trials(name: str, policy, args, local: slice) -> Outcome:
    """This process's share of the trials of `evaluate.py metaworld | libero`, which have a fixed
    order. ValueError naming task and trial when a simulator crashes; see FinishedTrials.
    1. what is left to do   2. serve the policy, share the rest among worker processes"""
    from tqdm import tqdm  # neither above: workers run in a Python without tqdm and torch

    from tools.serve import Server

    # 1. what is left to do
    module = importlib.import_module(f"benchmarks.{name}")
    check_policy(policy, module.Simulator.cameras, module.STATE_DIM, module.ACTION_NAMES)
    sizes = image_sizes(policy, args.size, SIDE)
    all_jobs = [(task, number) for task in module.tasks(args) for number in range(args.trials)]
    jobs = all_jobs[local]
    # the words: trials of a version in which the picture seeded the noise are not gone on with
    settings = [sizes, args.limit, "noise by task, trial and step"]
    finished = FinishedTrials(name, policy, args, settings)
    solved = {}  # (task, number) -> success
    for row in finished.rows:
        solved[row["task"], row["trial"]] = row["success"]
    jobs_left = [job for job in jobs if job not in solved]
    filmed = trials_to_film(all_jobs) if args.film else set()
    film_folder = str(Path(args.film).resolve())  # workers run in another folder

    # 2. serve the policy, share the rest among worker processes
    server = Server(policy, args.execute, args.ensemble, batch=args.batch)
    crashes = []  # (task, number, exit code)
    processes = []  # of the workers

    def run_worker(start):
        """Every so many of the trials that are left, in one worker process."""
        own_jobs = jobs_left[start :: args.workers]
        numbers = {}  # task -> of its trials; an argument ends at 128 KiB
        for task, number in own_jobs:
            numbers.setdefault(task, []).append(number)
        own_filmed = [job for job in own_jobs if job in filmed]
        order = json.dumps([name, sizes, args.limit, port, numbers, own_filmed, film_folder])
        command = [args.python, "-m", "benchmarks.simulate", order]
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, cwd=ROOT) as process:
            processes.append(process)
            for line in process.stdout:
                row = json.loads(line)
                solved[row["task"], row["trial"]] = row["success"]
                finished.add(row)
                progress.update()
                if crashes:  # of another worker
                    process.kill()
        for task, number in own_jobs:
            if (task, number) not in solved:
                crashes.append((task, number, process.returncode))

    done = len(jobs) - len(jobs_left)
    with (
        server.listen() as port,
        tqdm(total=len(jobs), initial=done, desc="trials", disable=None) as progress,
        concurrent.futures.ThreadPoolExecutor(args.workers) as pool,
    ):
        try:
            list(pool.map(run_worker, range(min(args.workers, len(jobs_left)))))
        finally:  # of what stops this process the workers may not have been told
            for process in processes:
                process.kill()
    if crashes:
        task, number, code = crashes[0]
        raise ValueError(
            f"the simulator stopped in task {task}, trial {number} (exit code {code}, see "
            f"above); the same command goes on after the {len(solved)} trials in {finished.path}"
        )
    print(server)
    return Outcome([TrialResult(*job[0].split("/"), solved[job]) for job in jobs])


# ---- Trials: a worker process --------------------------------------------------------------------


def worker(
    name: str,
    sizes: dict[str, list[int]],
    limit: int,
    port: int,
    numbers: dict[str, list[int]],
    filmed: list,
    film_folder: str,
):
    """Trials, task -> numbers -> a row of JSON for each to stdout, and films of some, [task,
    number], in a folder. sizes: camera -> [H, W].

    Takes stdout for the rows; what simulators print goes to stderr. What its user can cure ends it
    in one line."""
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(f"benchmarks.{name}")
    try:
        protocol.network()
    except ValueError as e:  # no such package in this Python
        raise SystemExit(f"error: {e}") from e
    with protocol.client(port) as (infer, metadata):
        for task, numbers_of_task in numbers.items():
            try:
                env = module.Simulator(task, sizes, limit)
            except ValueError as e:  # no such task, or no such package in this Python
                raise SystemExit(f"error: {e}") from e
            for number in numbers_of_task:
                film = Film(env.fps) if [task, number] in filmed else None
                try:
                    success, steps = run_trial(env, task, number, infer, metadata["cameras"], film)
                except protocol.Refused as e:  # as of a policy that answers NaN
                    raise SystemExit(str(e)) from e
                if film:
                    film.save(film_folder, film_name(*task.split("/"), success))
                row = {"task": task, "trial": number, "success": success, "steps": steps}
                print(json.dumps(row), file=rows, flush=True)
            env.env.close()


def run_trial(
    env, task: str, number: int, infer, cameras: list[str], film: Film | None = None
) -> tuple[bool, int]:
    """One trial -> success, steps taken. Renders only where a chunk begins, but for a film. The
    noise is by task, number and step: policies that are compared get the same, whatever they
    see."""
    env.reset(number, "eval")
    actions = []  # of the chunk, still to be carried out
    for step in range(env.limit):
        is_shot = film is not None and step % film.every == 0
        if not actions or is_shot:
            obs = env.observe(cameras)
        if not actions:
            noise_key = [task, number, step]
            answer = infer(
                {**obs, "prompt": env.prompt, "reset": step == 0, "noise_key": noise_key}
            )
            actions = list(answer["actions"])
        if is_shot:
            film.shoot(obs[cameras[0]], env.prompt, answer.get("thought"))
        action = actions.pop(0)
        success = env.advance(action, look=film is not None or not actions)
        if success:
            break
    if film is not None:
        film.shoot(env.observe(cameras)[cameras[0]], env.prompt, answer.get("thought"))
    return success, step + 1


# ---- What is where -------------------------------------------------------------------------------


class Scene(NamedTuple):
    """What a simulator knows of objects at a step; places in metres, in the frame of the state."""

    hand: np.ndarray  # (3,)
    positions: dict[str, np.ndarray]  # name, each its own -> (3,); the same names at every step
    camera: np.ndarray  # (3, 4), of the first camera's images as they are recorded: see project()
    target: str  # the one of them that the expert is going for; "": none


def distinct(names: Sequence[str]) -> list[str]:
    """Equal names told apart, the first one being meant: "black bowl", "other black bowl", then
    "black bowl 3"."""
    told_apart = []
    for i, name in enumerate(names):
        same_before = names[:i].count(name)
        if same_before == 0:
            told_apart.append(name)
        elif same_before == 1:
            told_apart.append(f"other {name}")
        else:
            told_apart.append(f"{name} {same_before + 1}")
    return told_apart


def pinhole_camera(
    position: np.ndarray, axes: np.ndarray, fovy: float, mirrored=False, upside_down=False
) -> np.ndarray:
    """The matrix (3, 4), see project(), of a camera at position (3,) m with square images.

    axes: 9 numbers, the columns of (3, 3) are its right, its up and its back (mujoco's cam_xmat).
    fovy: its field of view, degrees. Its images are recorded mirrored (left is right), or turned by
    180 degrees."""
    axes = np.reshape(axes, (3, 3))
    focal = 0.5 / np.tan(np.radians(fovy) / 2)  # in sides of the image
    inner = np.array([[focal, 0, -0.5], [0, -focal, -0.5], [0, 0, -1]])
    outer = np.column_stack([axes.T, -axes.T @ position])  # (3, 4): world to camera
    matrix = inner @ outer
    if mirrored or upside_down:
        matrix[0] = matrix[2] - matrix[0]
    if upside_down:
        matrix[1] = matrix[2] - matrix[1]
    return matrix


def project(camera: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (N, 3) m -> (N, 2): x, y as shares of the image's width and height, from its top left;
    NaN behind the camera. camera (3, 4): (x, y, z, 1) m -> (u w, v w, w)."""
    scaled = np.column_stack([points, np.ones(len(points))]) @ camera.T  # (N, 3)
    depth = np.where(scaled[:, 2:] > 0, scaled[:, 2:], np.nan)  # (N, 1)
    return scaled[:, :2] / depth


# ---- Demonstrations ------------------------------------------------------------------------------


def demonstration(name: str, args, number: int, task: str) -> tuple[dict | None, dict[str, str]]:
    """Demonstration `number` of a task: (arrays, header); arrays None when the expert failed.

    Recorded is what the expert does in each state; carried out is that plus noise, so that there
    are recoveries (DART, arXiv 1703.09327)."""
    simulator = importlib.import_module(f"benchmarks.{name}").Simulator
    sizes = {camera: [args.size, args.size] for camera in simulator.cameras}
    env = simulator(task, sizes, args.limit)
    seed = (args.seed << 24) + number
    env.reset(seed, "train")
    rng = np.random.default_rng(seed)
    rows = []
    targets = []
    success = False
    while not success and len(rows) < env.limit:
        action = np.clip(env.expert(), -1, 1).astype(np.float32)
        scene = env.scene()
        objects = list(scene.positions)
        positions = np.stack(list(scene.positions.values()))  # (N, 3)
        row = {
            **env.observe(env.cameras),
            "action": action,
            "object_position": positions.astype(np.float32),
            "object_pixel": project(scene.camera, positions).astype(np.float32),
            "hand_pixel": project(scene.camera, scene.hand[None])[0].astype(np.float32),
        }
        rows.append(row)
        targets.append(objects.index(scene.target) if scene.target else -1)
        push = np.append(rng.normal(0, args.noise, len(action) - 1), 0)  # not on the gripper
        success = env.advance(np.clip(action + push, -1, 1).astype(np.float32))
    env.env.close()
    deltas = str(len(action) - 1)  # all but the gripper
    header = {"task": env.prompt, "fps": str(env.fps), "source": task, "deltas": deltas}
    if not success:
        return None, header
    header |= {"objects": json.dumps(objects), "targets": json.dumps(targets)}
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
    from fast_tokenizer import count, non_negative, write_episodes  # not above, as in arguments()

    parser = argparse.ArgumentParser(description="Demonstrations of a scripted expert.")
    add = parser.add_argument
    add("command", nargs="?", choices=["record"], help="of the scripted expert")
    add("--out", required=True, help="folder to write")
    add("--episodes", type=count, default=20, help="demonstrations a task that are tried")
    add("--seed", type=int, default=0, choices=range(10), help="of states and noise")
    add("--workers", type=count, default=2, help="simulator processes")
    add(
        "--noise",
        type=non_negative,
        default=0.1,
        help="std of what is added to the expert's actions",
    )
    if convert:
        add("--convert", default="", help="instead: folder of the published demonstrations")
        add("--drop-noops", action="store_true", help="with it: leave out steps that do nothing")
    module = importlib.import_module(f"benchmarks.{name}")
    module.task_arguments(add)
    add("--size", type=count, default=SIDE, help="side of the images, pixels")
    limit_argument(add)
    args = parser.parse_args()
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if convert and args.convert:
        unused = sorted(given - {"command", "out", "convert", "drop_noops"})
        if unused:
            parser.error(f"--convert takes all demonstrations: --{unused[0]} would do nothing")
        recordings = convert(args)
    elif "drop_noops" in given:
        parser.error("--drop-noops is of --convert: the expert's steps all do something")
    else:
        try:
            module.check(args)
        except ValueError as e:
            parser.error(str(e))
        recordings = demonstrations(name, args)
    write_episodes(Path(args.out) / "episodes", recordings)


if __name__ == "__main__":
    worker(*json.loads(sys.argv[1]))
