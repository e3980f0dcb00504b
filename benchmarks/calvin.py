"""CALVIN (arXiv 2112.03227): its 1,000 evaluation chains, the closed loop, its data as episodes.

    python -m benchmarks.calvin convert --data task_ABC_D/training --out data/calvin
    python evaluate.py calvin --policy runs/vla --data task_ABC_D --out results/calvin.json

`convert` turns each annotated window (at most 64 frames) of a split into an episode: image (static
camera), image_gripper, state = robot_obs (15), action = rel_actions (7). The protocol is the
official one: reset once a chain, 360 steps a subtask, the first validation annotation as
instruction, the gripper exactly -1 or +1; the first failure ends a chain.

In the order of the file: which chains there are, how their initial states are laid out, the closed
loop, the converter. The first two reproduce what the authors' code draws, down to their random
numbers; who wants to know how a policy is evaluated reads the third alone.
"""

import argparse
import functools
import itertools
import json
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from tqdm import tqdm

from benchmarks.simulate import (
    FILMED_TASKS,
    Film,
    FinishedTrials,
    Outcome,
    check_policy,
    film_argument,
    pinhole_camera,
    project,
    render_headless,
)
from fast_tokenizer import count, reading, write_episodes
from tools.extras import require

# ---- Chains --------------------------------------------------------------------------------------

SIDES = ("right", "left")
BLOCKS = ("red_block", "blue_block", "pink_block")
KEYS = ("led", "lightbulb", "slider", "drawer", *BLOCKS)  # of a state

# Task, category: what must hold > what holds then. B, C and D stand for the blocks in any order, S
# and O for a side and the other one, L for a light. Indented tasks alternate with the one above.
RULES = """\
rotate_B_S turn: B=table >
push_B_S turn: B=table >
move_slider_O slider: slider=S > slider=O
open_drawer drawer: drawer=closed > drawer=open
close_drawer drawer: drawer=open > drawer=closed
lift_B_table lift_table: B=table > B=grasped
 lift_B_slider lift_slider: B=slider_S slider=O > B=grasped
 lift_B_drawer lift_drawer: B=drawer drawer=open > B=grasped
place_in_slider place: B=grasped slider=S > B=slider_S
place_in_drawer place: B=grasped drawer=open > B=drawer
stack_block stack: B=grasped C=table > B=stacked_top C=stacked_bottom
unstack_block unstack: B=stacked_top C=stacked_bottom > B=table C=table
turn_on_L light: L=0 > L=1
 turn_off_L light: L=1 > L=0
push_into_drawer push: B=table C=slider_S D=slider_S drawer=open > B=drawer
push_into_drawer push: B=table C=slider_S D=slider_O drawer=open > B=drawer"""


class Rule(NamedTuple):
    """One way to do a task: parts of a state, as {key: value}."""

    before: dict[str, str]
    after: dict[str, str]


class Task(NamedTuple):
    category: str
    rules: list[Rule]


def read_rules(text: str) -> dict[str, Task]:
    """RULES with all letters filled in: the tasks by name, in the official order."""
    tasks = {}
    for lines in re.split(r"\n(?! )", text):  # a line, with the indented ones below it
        for blocks, sides, light in itertools.product(
            itertools.permutations(BLOCKS), itertools.permutations(SIDES), ("lightbulb", "led")
        ):
            words = dict(zip("BCDSOL", (*blocks, *sides, light), strict=True))
            for line in lines.translate(str.maketrans(words)).splitlines():
                head, before, after = re.split("[:>]", line)
                name, category = head.split()
                task = tasks.setdefault(name, Task(category, []))
                task.rules.append(Rule(read_state(before), read_state(after)))
    return tasks


def read_state(text: str) -> dict[str, str]:
    """ "slider=left drawer=open" -> {"slider": "left", "drawer": "open"}."""
    return dict(pair.split("=") for pair in text.split())


TASKS = read_rules(RULES)


@functools.cache
def after(state: tuple[str, ...], name: str) -> tuple[str, ...] | None:
    """The state (values of KEYS) that a task leads to; None unless CALVIN's rules give just one.

    The hand must be empty before, unless a block must be grasped."""
    present = dict(zip(KEYS, state, strict=True))
    ends = set()
    for rule in TASKS[name].rules:
        holds = rule.before.items() <= present.items()
        grasped = "grasped" in state
        must_be_grasped = "grasped" in rule.before.values()
        if holds and grasped == must_be_grasped:
            ends.add(tuple({**present, **rule.after}.values()))
    return ends.pop() if len(ends) == 1 else None


def initial_states() -> list[tuple[str, ...]]:
    """The states (values of KEYS) in which chains begin, in the official order."""
    places = ("table", "slider_right", "slider_left")
    states = []
    for state in itertools.product("01", "01", SIDES, ("closed", "open"), *[places] * 3):
        on_table = state.count("table")
        in_slider = max(state.count("slider_right"), state.count("slider_left"))
        if on_table in (1, 2) and in_slider < 2:
            states.append(state)
    return states


def can_follow(state: tuple[str, ...], names: list[str]) -> bool:
    """Does each task in a row have one end, in which the next can begin?"""
    for name in names:
        state = after(state, name)
        if state is None:
            return False
    return True


@functools.cache
def chains() -> list[tuple[dict, tuple[str, ...]]]:
    """The 1,000 official chains (initial state, five task names) in order; 15 CPU seconds.

    Each initial state has its share of them, drawn by a generator of its own: five tasks of five
    categories that can follow each other."""
    made = []
    states = initial_states()
    for i, share in enumerate(np.array_split(range(1000), len(states))):
        start = {}
        for key, value in zip(KEYS, states[i], strict=True):
            start[key] = int(value) if value in "01" else value
        start["grasped"] = 0
        rng = np.random.RandomState(i)
        while len(made) <= share[-1]:
            names = list(TASKS)
            rng.shuffle(names)  # the numbers that choice(34, 5, replace=False) draws
            names = names[:5]
            categories = {TASKS[name].category for name in names}
            if len(categories) == 5 and can_follow(states[i], names):
                made.append((dict(start), tuple(names)))
    np.random.RandomState(0).shuffle(made)
    return made


# ---- Initial states ------------------------------------------------------------------------------

ROBOT = [  # robot_obs: where each chain begins
    *(0.02586889, -0.2313129, 0.5712808),  # hand xyz, m
    *(3.09045411, -0.02908596, 1.50013585),  # its turn, rad
    0.07999963,  # opening of the gripper, m
    *(-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928),
    1.0,  # of the gripper: open
]
TABLE = [(0.0500000896, -0.120000177, 0.459990009), (0.229995412, -0.11999514, 0.45999001)]
SLIDER = {
    "slider_left": (-0.240851662, 0.0924044687, 0.460990009),
    "slider_right": (0.070341633, 0.0924044687, 0.460990009),
}


def fnv(data: bytes) -> int:
    """32-bit FNV hash from basis 0: the seed of an initial state, by which CALVIN lays it out."""
    value = 0
    for byte in data:
        value = (value * 0x01000193 & 0xFFFFFFFF) ^ byte
    return value


def layout(state: dict) -> tuple[np.ndarray, np.ndarray]:
    """Initial state -> robot_obs (15,), scene_obs (24,) for env.reset: where its blocks lie."""
    rng = np.random.RandomState(fnv(str(state.values()).encode("utf-16-le")))
    table = list(TABLE)
    rng.shuffle(table)
    scene = np.zeros(24)
    scene[:6] = [
        0.28 if state["slider"] == "left" else 0,
        0.22 if state["drawer"] == "open" else 0,
        0,
        0.088 * state["lightbulb"],
        state["lightbulb"],
        state["led"],
    ]
    # red gets the first place on the table, pink the second, blue what red leaves: of the three,
    # at most two are there
    red_on_table = state["red_block"] == "table"
    place_of = {"red_block": 0, "blue_block": 1 if red_on_table else 0, "pink_block": 1}
    for start, block in zip((6, 12, 18), BLOCKS, strict=True):
        scene[start : start + 3] = SLIDER.get(state[block], table[place_of[block]])
        scene[start + 5] = rng.uniform(np.pi * 3 / 8, np.pi * 5 / 8)
    return np.array(ROBOT), scene


# ---- Closed loop ---------------------------------------------------------------------------------

STEPS = 360  # of a subtask
FPS = 30
ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")  # each -1 .. 1


class Field(NamedTuple):
    """CALVIN's name and shape of what we read."""

    key: str
    shape: tuple[int, ...]


KEPT = {  # by our name
    "image": Field("rgb_static", (200, 200, 3)),
    "image_gripper": Field("rgb_gripper", (84, 84, 3)),
    "state": Field("robot_obs", (15,)),
    "action": Field("rel_actions", (7,)),
}


def arguments(add):
    """Flags of `evaluate.py calvin`."""
    add("--data", required=True, help="a CALVIN dataset; its validation/ describes the environment")
    add("--chains", type=count, default=1000, help="the first chains of the 1,000")
    film_argument(add)


def check(args):
    """ValueError when a flag is wrong, before a policy is loaded."""
    if args.chains > 1000:
        raise ValueError(f"--chains {args.chains}: there are 1,000")
    described = Path(args.data, "validation", ".hydra", "merged_config.yaml")
    if not described.is_file():
        raise ValueError(
            f"--data {args.data}: no {described}; give the folder of a CALVIN dataset, as "
            "task_ABC_D, with its validation/"
        )


def evaluate(policy, args, local: slice) -> Outcome:
    return Outcome(chain_lengths=play(policy, args, local))


class World(NamedTuple):
    env: object  # calvin_env's
    oracle: object  # says which tasks were done between two moments
    annotations: dict[str, list[str]]  # the ways to ask for each task


def open_world(data: str) -> World:
    """CALVIN's environment for a dataset. ValueError when the package is missing."""
    render_headless()
    package, envs, oracles = require(
        "-e calvin/calvin_env, after git clone --recursive https://github.com/mees/calvin",
        "calvin_env",
        "calvin_env.envs.play_table_env",
        "calvin_env.envs.tasks",
    )
    conf = Path(package.__file__).resolve().parents[2] / "calvin_models" / "conf"
    rules = yaml.safe_load((conf / "callbacks/rollout/tasks/new_playtable_tasks.yaml").read_text())
    words = yaml.safe_load((conf / "annotations/new_playtable_validation.yaml").read_text())
    env = envs.get_env(Path(data) / "validation", show_gui=False)
    return World(env, oracles.Tasks(rules["tasks"]), words)


def play(policy, args, local: slice) -> list[int]:
    """This process's share of the first args.chains -> how many subtasks in a row each solved,
    0 .. 5. Finished chains stand in a file, see FinishedTrials."""
    cameras = [name for name in KEPT if name.startswith("image")]
    (state_dim,) = KEPT["state"].shape
    check_policy(policy, cameras, state_dim, ACTION_NAMES)
    from vla import ChunkExecutor  # not above: to convert takes no torch

    finished = FinishedTrials("calvin", policy, args, [str(Path(args.data).resolve())])
    lengths = {row["chain"]: row["length"] for row in finished.rows}
    world = open_world(args.data)
    rendered = world.env.cameras
    numbers = range(args.chains)[local]
    for number in tqdm(numbers, "chains", disable=None):
        if number in lengths:
            continue
        state, names = chains()[number]
        robot, scene = layout(state)
        world.env.reset(robot_obs=robot, scene_obs=scene)
        executor = ChunkExecutor(policy.horizon, args.execute, args.ensemble, policy.hold)
        film = Film(FPS) if args.film and number < FILMED_TASKS else None
        length = 0
        for name in names:
            if not attempt(world, rendered, policy, executor, name, [number, length], film):
                break
            length += 1
        if film:
            film.save(args.film, f"calvin_{number}_{length}_of_{len(names)}")
        lengths[number] = length
        finished.add({"chain": number, "length": length})
    return [lengths[number] for number in numbers]


def attempt(
    world: World,
    cameras,
    policy,
    executor,
    name: str,
    noise_key: list[int],
    film: Film | None = None,
) -> bool:
    """One subtask -> whether it was done in time. cameras: the environment's, as it was opened.
    noise_key: with the step it seeds the noise."""
    env = world.env
    instruction = world.annotations[name][0]
    start = env.get_info()

    def look() -> tuple[list[np.ndarray], np.ndarray]:
        """Images of the policy's cameras, robot_obs; step() would render both cameras each time,
        three quarters of its time."""
        env.cameras = cameras
        obs = env.get_obs()
        env.cameras = []
        return [obs["rgb_obs"][KEPT[camera].key] for camera in policy.cameras], obs["robot_obs"]

    for step in range(0, STEPS, executor.execute):
        # 1. look
        images, state = look()

        # 2. ask the policy
        key = [*noise_key, step]
        chunk = policy.act_batch([images], [instruction], state[None], keys=[key])[0]  # (K, 7)
        thought = policy.thoughts[0] if policy.thoughts else None
        actions = executor(chunk, instruction)[: STEPS - step]
        actions = actions.astype(np.float64).clip(-1, 1)

        # 3. act
        for i, action in enumerate(actions):
            if film and (step + i) % film.every == 0:
                film.shoot(look()[0][0] if i else images[0], instruction, thought)
            action[-1] = 1 if action[-1] > 0 else -1
            told = action.copy()  # the robot scales the movement in place
            info = env.step(action)[3]
            if world.oracle.get_task_info_for_set(start, info, {name}):
                executor.interrupt(told)
                if film:
                    film.shoot(look()[0][0], instruction, thought)
                return True
    return False


# ---- Converter -----------------------------------------------------------------------------------


class NumpyUnpickler(pickle.Unpickler):
    """CALVIN's annotations are a pickled dict; nothing but numpy's own arrays is built from it."""

    def find_class(self, module, name):
        if module[:5] != "numpy" or name not in ("_reconstruct", "ndarray", "dtype", "scalar"):
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return super().find_class(module, name)


# Blocks: in the words of the annotations, and where scene_obs has x, y, z of each. What stands for
# the slider, the drawer and the lights there are joints and switches, not places.
BLOCK_STARTS = {
    name.replace("_", " "): start for name, start in zip(BLOCKS, (6, 12, 18), strict=True)
}


class Window(NamedTuple):
    """An annotated stretch of a recording."""

    text: str
    start: int  # frames, both inclusive
    end: int


def read_windows(folder: Path) -> list[Window]:
    """The annotated windows of a split. Damaged when there are none or one is malformed."""
    path = folder / "lang_annotations" / "auto_lang_ann.npy"
    windows = []
    with reading(path), open(path, "rb") as f:
        np.lib.format.read_magic(f)
        np.lib.format.read_array_header_1_0(f)
        annotations = NumpyUnpickler(f).load().item()
        texts = annotations["language"]["ann"]
        bounds = annotations["info"]["indx"]
        for text, (start, end) in zip(texts, bounds, strict=True):
            if end < start or not text.strip():
                raise ValueError(f"window {start}-{end} with the annotation {text!r}")
            windows.append(Window(text, start, end))
    return windows


def read_frame(path: Path) -> dict[str, np.ndarray]:
    """One recorded step, by our names. Damaged when something is missing or out of range."""
    step = {}
    with reading(path), np.load(path) as f:
        for name, field in KEPT.items():
            step[name] = f[field.key]
            if step[name].shape != field.shape:
                raise ValueError(f"{field.key} is {step[name].shape}, not {field.shape}")
        size = abs(step["action"])  # (7,), the last is the gripper
        if size.max() > 1.001 or size[6] != 1:
            raise ValueError(f"rel_actions above 1, or a gripper not -1 or 1: {step['action']}")
        scene = f["scene_obs"]
        if scene.shape != (24,):
            raise ValueError(f"scene_obs is {scene.shape}, not (24,)")
        positions = [scene[start : start + 3] for start in BLOCK_STARTS.values()]
        step["object_position"] = np.stack(positions)  # (3, 3) m
    return step


def static_camera(folder: Path) -> np.ndarray | None:
    """The matrix (3, 4) of the static camera, see simulate.project(), by the split's own
    description of its environment; None when it has none. Damaged when that says less."""
    path = folder / ".hydra" / "merged_config.yaml"
    if not path.exists():
        return None
    with reading(path, yaml.YAMLError):
        camera = yaml.safe_load(path.read_text())["cameras"]["static"]
        eye = np.array(camera["look_from"], float)
        back = eye - camera["look_at"]
        back /= np.linalg.norm(back)
        right = np.cross(camera["up_vector"], back)
        right /= np.linalg.norm(right)
        axes = np.column_stack([right, np.cross(back, right), back])
        if camera["aspect"] != 1:
            raise ValueError(f"aspect of the static camera is {camera['aspect']}, not 1")
        return pinhole_camera(eye, axes, float(camera["fov"]))


def recordings(folder: Path):
    """Yields (arrays, header) of each annotated window of a split. The block that an annotation
    names, if it is one alone, is what the whole window goes for."""
    camera = static_camera(folder)
    blocks = list(BLOCK_STARTS)
    for text, start, end in read_windows(folder):
        steps = [read_frame(folder / f"episode_{t:07d}.npz") for t in range(start, end + 1)]
        arrays = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
        if camera is not None:
            hands = arrays["state"][:, :3]
            positions = arrays["object_position"]  # (T, 3, 3)
            arrays["hand_pixel"] = project(camera, hands)
            arrays["object_pixel"] = np.stack([project(camera, points) for points in positions])
        named = [blocks.index(name) for name in blocks if name in text]
        target = named[0] if len(named) == 1 else -1
        yield (
            arrays,
            {
                "task": text,
                "fps": str(FPS),
                "source": f"calvin {folder.name} {start}-{end}",
                "deltas": "6",
                "objects": json.dumps(blocks),
                "targets": json.dumps([target] * len(steps)),
            },
        )


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calvin", description=__doc__)
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("--data", required=True, help="training/ or validation/ of a dataset")
    parser.add_argument("--out", required=True, help="folder for the episodes")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what is written when it stops, and go on there the next time",
    )
    args = parser.parse_args(argv)
    write_episodes(args.out, recordings(Path(args.data)), resume=args.resume)


if __name__ == "__main__":
    main()
