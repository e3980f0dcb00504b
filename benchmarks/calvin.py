"""CALVIN (arXiv 2112.03227): its 1,000 evaluation chains, the closed loop, its data as episodes.

    python -m benchmarks.calvin convert --data task_ABC_D/training --out data/calvin
    python evaluate.py calvin --policy runs/vla --data task_ABC_D --out results/calvin.json

`convert` turns each annotated window (at most 64 frames) of a split into an episode: image (static
camera, 200 x 200), image_gripper (84 x 84), state = robot_obs (15), action = rel_actions (7).
`evaluate.py calvin` is the official protocol: reset once a chain, 360 steps a subtask, the first
validation annotation as instruction, the gripper exactly -1 or +1; the first failure ends a chain.
It needs the public calvin repository with calvin_env installed from it, and a dataset's validation
folder, whose .hydra/ describes the environment. Cameras are rendered where the policy looks only.
"""

import argparse
import functools
import itertools
import pickle
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from benchmarks.serve import Chunks
from benchmarks.tabletop import reading, write_episodes

STEPS = 360  # of a subtask
KEPT = {"image": ("rgb_static", (200, 200, 3)), "image_gripper": ("rgb_gripper", (84, 84, 3)),
        "state": ("robot_obs", (15,)), "action": ("rel_actions", (7,))}  # our name: theirs, shape
KEYS = ("led", "lightbulb", "slider", "drawer", "red_block", "blue_block", "pink_block", "grasped")

# ---- the chains


def _tasks():
    """name -> (category, [(what must hold, what holds then)]), in the official order."""
    blocks, free, held, tasks = KEYS[4:7], {"grasped": 0}, {"grasped": 1}, {}
    sides, pairs = ("right", "left"), list(itertools.permutations(KEYS[4:7], 2))
    for verb, b, side in itertools.product(("rotate", "push"), blocks, sides):
        tasks[f"{verb}_{b}_{side}"] = "turn", [({b: "table", **free}, {})]
    for name, part, old, new in (
            ("move_slider_left", "slider", "right", "left"),
            ("move_slider_right", "slider", "left", "right"),
            ("open_drawer", "drawer", "closed", "open"),
            ("close_drawer", "drawer", "open", "closed")):
        tasks[name] = part, [({part: old, **free}, {part: new})]
    for b in blocks:
        for place, rules in (
                ("table", [{b: "table"}]),
                ("slider", [{b: f"slider_{x}", "slider": y} for x, y in (sides, sides[::-1])]),
                ("drawer", [{b: "drawer", "drawer": "open"}])):
            tasks[f"lift_{b}_{place}"] = f"lift {place}", [
                ({**rule, **free}, {b: "grasped", **held}) for rule in rules]
    tasks["place_in_slider"] = "place", [({b: "grasped", "slider": x}, {b: f"slider_{x}", **free})
                                         for b in blocks for x in sides]
    tasks["place_in_drawer"] = "place", [({b: "grasped", "drawer": "open"}, {b: "drawer", **free})
                                         for b in blocks]
    stack = [{a: "stacked_top", b: "stacked_bottom", **free} for a, b in pairs]
    tasks["stack_block"] = "stack", [
        ({a: "grasped", b: "table"}, new) for (a, b), new in zip(pairs, stack)]
    tasks["unstack_block"] = "unstack", [
        (old, {a: "table", b: "table"}) for (a, b), old in zip(pairs, stack)]
    for light, (verb, on) in itertools.product(("lightbulb", "led"), (("on", 1), ("off", 0))):
        tasks[f"turn_{verb}_{light}"] = "light", [({light: 1 - on, **free}, {light: on})]
    away = dict.fromkeys(blocks, ("slider_right", "slider_left"))
    tasks["push_into_drawer"] = "push in", [
        ({**away, b: "table", "drawer": "open", **free}, {b: "drawer"}) for b in blocks]
    return tasks


TASKS = _tasks()


@functools.cache
def after(state, name):
    """The state (values of KEYS) that a task leads to; None unless CALVIN's rules give just one."""
    at = dict(zip(KEYS, state))
    found = [tuple({**at, **new}.values()) for old, new in TASKS[name][1]
             if all(at[k] in v if isinstance(v, tuple) else at[k] == v for k, v in old.items())]
    return found[0] if len(found) == 1 else None


@functools.cache
def chains():
    """The 1,000 official chains [(initial state, five task names)] in order; 15 CPU seconds."""
    places, made = ("table", "slider_right", "slider_left"), []
    states = [values for values in itertools.product(
        (0, 1), (0, 1), ("right", "left"), ("closed", "open"), places, places, places, (0,))
        if values.count("table") in (1, 2) and max(map(values.count, places[1:])) < 2]
    for i, share in enumerate(np.array_split(range(1000), len(states))):
        rng, end = np.random.RandomState(i), len(made) + len(share)
        while len(made) < end:
            state, picks = states[i], list(TASKS)
            rng.shuffle(picks)  # the numbers that choice(34, 5, replace=False) draws
            for name in picks[:5]:
                if (state := after(state, name)) is None:
                    break
            else:
                if len({TASKS[name][0] for name in picks[:5]}) == 5:
                    made.append((dict(zip(KEYS, states[i])), tuple(picks[:5])))
    np.random.RandomState(0).shuffle(made)
    return made


def fnv(data):
    """32-bit FNV hash from basis 0: the seed of an initial state, by which CALVIN lays it out."""
    return functools.reduce(lambda h, byte: h * 0x01000193 & 0xFFFFFFFF ^ byte, data, 0)


def layout(state):
    """Initial state -> robot_obs (15,), scene_obs (24,) for env.reset: where its blocks lie."""
    robot = np.array([
        0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963,
        -1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0])
    rng = np.random.RandomState(fnv(str(state.values()).encode("utf-16-le")))
    table = [(5.00000896e-02, -1.20000177e-01, 4.59990009e-01),
             (2.29995412e-01, -1.19995140e-01, 4.59990010e-01)]
    slider = {"slider_left": (-2.40851662e-01, 9.24044687e-02, 4.60990009e-01),
              "slider_right": (7.03416330e-02, 9.24044687e-02, 4.60990009e-01)}
    rng.shuffle(table)
    free = {"red_block": 0, "blue_block": int(state["red_block"] == "table"), "pink_block": 1}
    scene = np.zeros(24)
    scene[:6] = [0.28 * (state["slider"] == "left"), 0.22 * (state["drawer"] == "open"), 0,
                 0.088 * state["lightbulb"], state["lightbulb"], state["led"]]
    for at, block in zip((6, 12, 18), KEYS[4:7]):
        scene[at : at + 3] = slider.get(state[block], table[free[block]])
        scene[at + 5] = rng.uniform(np.pi * 3 / 8, np.pi * 5 / 8)
    return robot, scene


# ---- the closed loop


def world(data):
    """-> environment, oracle, {task: its validation annotations}."""
    try:
        import calvin_env
        from calvin_env.envs.play_table_env import get_env
        from calvin_env.envs.tasks import Tasks

        conf = Path(calvin_env.__file__).resolve().parents[2] / "calvin_models" / "conf"
        oracle, words = (yaml.safe_load((conf / name).read_text()) for name in (
            "callbacks/rollout/tasks/new_playtable_tasks.yaml",
            "annotations/new_playtable_validation.yaml"))
        env = get_env(Path(data) / "validation", show_gui=False)
    except (ImportError, FileNotFoundError) as e:
        raise ValueError(
            f"{e}: CALVIN needs git clone --recursive https://github.com/mees/calvin, then pip "
            "install -e calvin/calvin_env, and a dataset with validation/.hydra as --data") from e
    return env, Tasks(oracle["tasks"]), words


def attempt(policy, env, oracle, name, text, plan):
    """One subtask from where the environment stands -> whether the oracle saw it done in time."""
    start, cameras = env.get_info(), env.cameras
    for step in range(0, STEPS, plan.execute):
        obs = env.get_obs()
        views = [obs["rgb_obs"][KEPT[camera][0]] for camera in policy.cameras]
        chunk = plan(policy.act(views, text, obs["robot_obs"]), text)
        chunk = np.clip(chunk, -1, 1).astype(np.float64)
        chunk[:, -1] = np.where(chunk[:, -1] > 0, 1, -1)
        env.cameras = []  # step() would render both cameras, three quarters of its time
        try:
            for action in chunk[: STEPS - step]:
                info = env.step(action.copy())[3]  # the robot scales its argument in place
                if oracle.get_task_info_for_set(start, info, {name}):
                    return True
        finally:
            env.cameras = cameras
    return False


def play(policy, data, count, execute=0, ensemble=0.0):
    """The first `count` chains -> how many subtasks in a row each solved, 0 .. 5."""
    if not {"image", "image_gripper"} >= set(policy.cameras):
        raise ValueError(f"cameras {', '.join(policy.cameras)}; train the policy on image or on "
                         "image,image_gripper")
    env, oracle, words = world(data)
    lengths = []
    for state, names in tqdm(chains()[:count], "chains", disable=None):
        env.reset(**dict(zip(("robot_obs", "scene_obs"), layout(state))))
        plan = Chunks(policy.horizon, execute, ensemble)
        done = (attempt(policy, env, oracle, n, words[n][0], plan) for n in names)
        lengths.append(sum(itertools.takewhile(bool, done)))  # the first failure ends the chain
    return lengths


# ---- the data


class Plain(pickle.Unpickler):
    """CALVIN's annotations are a pickled dict; nothing but numpy's own arrays is built from it."""

    def find_class(self, module, name):
        allowed = "_reconstruct", "ndarray", "dtype", "scalar"
        if module.split(".")[0] != "numpy" or name not in allowed:
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return super().find_class(module, name)


def annotations(path):
    """-> [(instruction, (first frame, last frame))] of a split."""
    with reading(path), open(path, "rb") as f:
        np.lib.format.read_magic(f)
        np.lib.format.read_array_header_1_0(f)
        found = Plain(f).load().item()
        rows = list(zip(found["language"]["ann"], found["info"]["indx"], strict=True))
        for text, (start, end) in rows:
            if end < start or not text.strip():
                raise ValueError(f"window {start}-{end} with the annotation {text!r}")
        return rows


def frame(path):
    """One recorded step -> {our name: array}."""
    with reading(path), np.load(path) as f:
        step = {name: f[key] for name, (key, _) in KEPT.items()}
        for name, (key, shape) in KEPT.items():
            if step[name].shape != shape:
                raise ValueError(f"{key} is {step[name].shape}, not {shape}")
        if (abs(step["action"]) > 1.001).any() or abs(step["action"][6]) != 1:
            raise ValueError(f"rel_actions {step['action'].round(3)} are not in [-1, 1] with a "
                             "gripper of -1 or 1")
    return step


def recorded(folder, limit):
    """The annotated windows of a split as (arrays, header)."""
    windows = annotations(folder / "lang_annotations" / "auto_lang_ann.npy")
    for text, (start, end) in windows[: limit or None]:
        steps = [frame(folder / f"episode_{t:07d}.npz") for t in range(start, end + 1)]
        yield ({name: np.stack([s[name] for s in steps]) for name in KEPT},
               {"task": text, "fps": "30", "source": f"calvin {folder.name} {start}-{end}"})


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calvin", description=__doc__)
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("--data", required=True, help="training/ or validation/ of a dataset")
    parser.add_argument("--out", required=True, help="folder for the episodes")
    parser.add_argument("--limit", type=int, default=0, help="first N windows only; 0: all")
    args = parser.parse_args(argv)
    write_episodes(args.out, recorded(Path(args.data), args.limit))


if __name__ == "__main__":
    main()
