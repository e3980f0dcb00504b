"""CALVIN (arXiv 2112.03227): its 1,000 evaluation chains, the closed loop, its data as episodes.

    python -m benchmarks.calvin convert --data task_ABC_D/training --out data/calvin
    python evaluate.py calvin --policy runs/vla --data task_ABC_D --out results/calvin.json

`convert` turns each annotated window (at most 64 frames) of a split into an episode: image (static
camera), image_gripper, state = robot_obs (15), action = rel_actions (7). The protocol is the
official one: reset once a chain, 360 steps a subtask, the first validation annotation as
instruction, the gripper exactly -1 or +1; the first failure ends a chain.
"""

import argparse
import functools
import pickle
import re
from itertools import accumulate, permutations, product, takewhile
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from fast_tokenizer import reading, write_episodes
from tools.extras import require

STEPS = 360  # of a subtask
KEPT = {
    "image": ("rgb_static", (200, 200, 3)),
    "image_gripper": ("rgb_gripper", (84, 84, 3)),
    "state": ("robot_obs", (15,)),
    "action": ("rel_actions", (7,)),
}  # our name: theirs, shape
SIDES, BLOCKS = ("right", "left"), ("red_block", "blue_block", "pink_block")
KEYS = ("led", "lightbulb", "slider", "drawer", *BLOCKS)  # of a state
# task, category: what must hold > what holds then. B, C and D stand for the blocks in any order, S
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


def _tasks():
    """name -> (category, [(what must hold, what holds then)]), in the official order."""
    tasks, lights = {}, ("lightbulb", "led")
    for lines in re.split(r"\n(?! )", RULES):
        for blocks, sides, light in product(permutations(BLOCKS), permutations(SIDES), lights):
            words = str.maketrans(dict(zip("BCDSOL", (*blocks, *sides, light))))
            for line in lines.translate(words).splitlines():
                (name, category), *rule = (part.split() for part in re.split("[:>]", line))
                rule = [dict(pair.split("=") for pair in part) for part in rule]
                tasks.setdefault(name, (category, []))[1].append(rule)
    return tasks


TASKS = _tasks()


@functools.cache
def after(state, name):
    """The state (values of KEYS) that a task leads to; None unless CALVIN's rules give just one.
    The hand must be empty before, unless a block must be grasped."""
    at = dict(zip(KEYS, state))
    found = {
        tuple({**at, **new}.values())
        for old, new in TASKS[name][1]
        if old.items() <= at.items() and ("grasped" in state) == ("grasped" in old.values())
    }
    return found.pop() if len(found) == 1 else None


@functools.cache
def chains():
    """The 1,000 official chains [(initial state, five task names)] in order; 15 CPU seconds."""
    places, made = ("table", "slider_right", "slider_left"), []
    states = [
        state
        for state in product("01", "01", SIDES, ("closed", "open"), *[places] * 3)
        if state.count("table") in (1, 2) and max(map(state.count, places[1:])) < 2
    ]
    for i, share in enumerate(np.array_split(range(1000), len(states))):
        start = {k: int(v) if v in "01" else v for k, v in zip(KEYS, states[i])} | {"grasped": 0}
        rng, names = np.random.RandomState(i), list(TASKS)
        while len(made) <= share[-1]:
            rng.shuffle(picks := names[:])  # the numbers that choice(34, 5, replace=False) draws
            ends = accumulate(picks[:5], lambda at, name: at and after(at, name), initial=states[i])
            if all(ends) and len({TASKS[name][0] for name in picks[:5]}) == 5:
                made.append((dict(start), tuple(picks[:5])))
    np.random.RandomState(0).shuffle(made)
    return made


def fnv(data):
    """32-bit FNV hash from basis 0: the seed of an initial state, by which CALVIN lays it out."""
    return functools.reduce(lambda h, byte: h * 0x01000193 & 0xFFFFFFFF ^ byte, data, 0)


def layout(state):
    """Initial state -> robot_obs (15,), scene_obs (24,) for env.reset: where its blocks lie."""
    robot = np.array(
        [
            0.02586889,
            -0.2313129,
            0.5712808,
            3.09045411,
            -0.02908596,
            1.50013585,
            0.07999963,
            -1.21779124,
            1.03987629,
            2.11978254,
            -2.34205014,
            -0.87015899,
            1.64119093,
            0.55344928,
            1.0,
        ]
    )
    table = [(0.0500000896, -0.120000177, 0.459990009), (0.229995412, -0.11999514, 0.45999001)]
    slider = {
        "slider_left": (-0.240851662, 0.0924044687, 0.460990009),
        "slider_right": (0.070341633, 0.0924044687, 0.460990009),
    }
    rng = np.random.RandomState(fnv(str(state.values()).encode("utf-16-le")))
    rng.shuffle(table)
    free = (0, int(state["red_block"] == "table"), 1)  # place of each block that is on the table
    scene = np.zeros(24)
    scene[:6] = [
        0.28 * (state["slider"] == "left"),
        0.22 * (state["drawer"] == "open"),
        0,
        0.088 * state["lightbulb"],
        state["lightbulb"],
        state["led"],
    ]
    for at, block, place in zip((6, 12, 18), BLOCKS, free):
        scene[at : at + 3] = slider.get(state[block], table[place])
        scene[at + 5] = rng.uniform(np.pi * 3 / 8, np.pi * 5 / 8)
    return robot, scene


def world(data):
    """-> environment, oracle, {task: its validation annotations}."""
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
    return env, oracles.Tasks(rules["tasks"]), words


def play(policy, data, count, execute=0, ensemble=0.0):
    """The first `count` chains -> how many subtasks in a row each solved, 0 .. 5."""
    if not {"image", "image_gripper"} >= set(policy.cameras):
        raise ValueError(f"cameras {', '.join(policy.cameras)}; use image or image,image_gripper")
    from vla import ChunkExecutor  # not above: to convert takes no torch

    env, oracle, words = world(data)
    cameras, lengths = env.cameras, []

    def attempt(name):  # -> whether it was done in time
        text, start = words[name][0], env.get_info()
        for step in range(0, STEPS, plan.execute):
            env.cameras = cameras
            obs = env.get_obs()
            env.cameras = []  # step() would render both cameras, three quarters of its time
            views = [obs["rgb_obs"][KEPT[camera][0]] for camera in policy.cameras]
            chunk = plan(policy.act(views, text, obs["robot_obs"]), text)
            for action in chunk[: STEPS - step].astype(np.float64).clip(-1, 1):
                action[-1] = 1 if action[-1] > 0 else -1
                info = env.step(action)[3]
                if oracle.get_task_info_for_set(start, info, {name}):
                    return True
        return False

    for state, names in tqdm(chains()[:count], "chains", disable=None):
        robot, scene = layout(state)
        env.reset(robot_obs=robot, scene_obs=scene)
        plan = ChunkExecutor(policy.horizon, execute, ensemble)
        lengths.append(sum(takewhile(bool, map(attempt, names))))
    return lengths


class Plain(pickle.Unpickler):
    """CALVIN's annotations are a pickled dict; nothing but numpy's own arrays is built from it."""

    def find_class(self, module, name):
        if module[:5] != "numpy" or name not in ("_reconstruct", "ndarray", "dtype", "scalar"):
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return super().find_class(module, name)


def frame(path):
    """One recorded step -> {our name: array}."""
    step = {}
    with reading(path), np.load(path) as f:
        for name, (key, shape) in KEPT.items():
            step[name] = f[key]
            if step[name].shape != shape:
                raise ValueError(f"{key} is {step[name].shape}, not {shape}")
        if (action := abs(step["action"])).max() > 1.001 or action[6] != 1:
            raise ValueError(f"rel_actions above 1, or a gripper not -1 or 1: {step['action']}")
    return step


def recorded(folder):
    """The annotated windows of a split as (arrays, header)."""
    path = folder / "lang_annotations" / "auto_lang_ann.npy"
    with reading(path), open(path, "rb") as f:
        np.lib.format.read_magic(f)
        np.lib.format.read_array_header_1_0(f)
        found = Plain(f).load().item()
        windows = list(zip(found["language"]["ann"], found["info"]["indx"], strict=True))
        for text, (start, end) in windows:
            if end < start or not text.strip():
                raise ValueError(f"window {start}-{end} with the annotation {text!r}")
    for text, (start, end) in windows:  # both ends inclusive
        steps = [frame(folder / f"episode_{t:07d}.npz") for t in range(start, end + 1)]
        yield (
            {name: np.stack([s[name] for s in steps]) for name in KEPT},
            {"task": text, "fps": "30", "source": f"calvin {folder.name} {start}-{end}"},
        )


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calvin", description=__doc__)
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("--data", required=True, help="training/ or validation/ of a dataset")
    parser.add_argument("--out", required=True, help="folder for the episodes")
    args = parser.parse_args(argv)
    write_episodes(args.out, recorded(Path(args.data)))


if __name__ == "__main__":
    main()
