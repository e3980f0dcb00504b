"""Meta-World 3.1.1 (arXiv 1910.10897): tasks of a robot arm with real physics.

    python -m benchmarks.metaworld record --episodes 20 --out data/metaworld # the tasks of MT10
    python evaluate.py metaworld --policy runs/vla

The experts are the package's own. Action (4,): hand xyz and gripper, in [-1, 1]; state (4,): hand
xyz (m), finger opening. Trial n begins in the state of seed n; demonstrations begin in others. A
trial succeeds as soon as a step of its 300 does; published trials often have the 500 that the
package allows (--limit 500).
benchmarks/simulate.py has the interface and what drives it.
"""

import re
from typing import NamedTuple

import numpy as np

from benchmarks import simulate
from tools.extras import require

TRIALS = 20  # a task
STATE_DIM = 4
LIMIT = 300  # steps of a trial, by default
MOST_STEPS = 500  # the package's max_path_length
# Effort 0 leaves the fingers as they are, and the experts of some tasks never go below: 0 .. 1 is
# no other convention here, so that this is no "gripper" to simulate.check_action_range().
ACTION_NAMES = ("x", "y", "z", "finger effort")  # each -1 .. 1
PROMPTS = {  # MT10; other tasks are asked for by the words of their names
    "reach-v3": "reach the red ball",
    "push-v3": "push the puck to the goal",
    "pick-place-v3": "bring the puck to the goal",
    "door-open-v3": "open the door",
    "drawer-open-v3": "open the drawer",
    "drawer-close-v3": "close the drawer",
    "button-press-topdown-v3": "press the button",
    "peg-insert-side-v3": "insert the peg sideways",
    "window-open-v3": "open the window",
    "window-close-v3": "close the window",
}


class Place(NamedTuple):
    """Where Meta-World keeps the place of an object."""

    kind: str  # thing, goal: of the observation; site, body: of mujoco
    name: str = ""  # of the site or body
    offset: tuple[float, float, float] = (0, 0, 0)  # from there, m


THING = Place("thing")
GOAL = Place("goal")
# The place in the observation is 5 cm too high in drawer-close.
DRAWER_HANDLE = Place("body", "drawer_link", (0, -0.16, 0))
OBJECTS = {  # in the order of the recordings; other tasks have an "object" and a "goal"
    "reach-v3": {"red ball": GOAL, "puck": THING},
    "push-v3": {"puck": THING, "goal": GOAL},
    "pick-place-v3": {"puck": THING, "goal": GOAL},
    "door-open-v3": {"door handle": THING},
    "drawer-open-v3": {"drawer handle": DRAWER_HANDLE},
    "drawer-close-v3": {"drawer handle": DRAWER_HANDLE},
    "button-press-topdown-v3": {"button": THING},
    "peg-insert-side-v3": {"peg": THING, "hole": Place("site", "hole")},
    "window-open-v3": {"window handle": THING},
    "window-close-v3": {"window handle": THING},
}


def task_arguments(add):
    """Flags of recording and evaluation."""
    add("--tasks", default=",".join(PROMPTS), help="which tasks; the default is MT10")


def arguments(add):
    """Flags of `evaluate.py metaworld`."""
    task_arguments(add)
    simulate.trial_arguments(add, TRIALS)


def tasks(args) -> list[str]:
    return [f"metaworld/{name}" for name in args.tasks.split(",")]


def check(args):
    """ValueError when a flag is wrong. Which tasks there are is known where Meta-World is
    installed, see Simulator; here only what can be none."""
    names = args.tasks.split(",")
    for name in names:
        if not re.fullmatch("[a-z-]+-v3", name):
            raise ValueError(f"--tasks {args.tasks}: {name!r} is no task; give names like reach-v3")
    simulate.check_once("--tasks", names)
    simulate.check_limit(args.limit, MOST_STEPS)


def evaluate(policy, args, local: slice) -> simulate.Outcome:
    return simulate.run_trials("metaworld", policy, args, local)


class Simulator:
    """One task; benchmarks/simulate.py says what each method is for."""

    fps = 80
    cameras = ("image",)

    def __init__(self, task: str, sizes: dict[str, list[int]], limit: int):
        """sizes: camera -> [H, W] of its images. limit: steps of a trial, 0: LIMIT. ValueError for
        an unknown task."""
        simulate.render_headless()
        world, policies, self.mujoco = require(
            "metaworld==3.1.1", "metaworld.env_dict", "metaworld.policies", "mujoco"
        )
        name = task.split("/")[1]
        if name not in world.ALL_V3_ENVIRONMENTS:
            raise ValueError(f"Meta-World has no task {name!r}; --tasks of names like reach-v3")
        self.limit = limit or LIMIT
        self.prompt = PROMPTS.get(name, name.removesuffix("-v3").replace("-", " "))
        self.task = name
        self.make_expert = policies.ENV_POLICY_MAP[name]
        height, width = sizes["image"]
        env = world.ALL_V3_ENVIRONMENTS[name](
            render_mode="rgb_array", camera_name="corner2", width=width, height=height
        )
        # as in its MT benchmarks: the goal is seen, and drawn anew from the seed at each reset
        env._partially_observable = False
        env._freeze_rand_vec = False
        env._set_task_called = True
        env.seeded_rand_vec = True
        del env.sawyer_observation_space  # made while partially observable: it would hide the goal
        # 8 times as fast
        env.model.vis.quality.offsamples = 0
        env.model.vis.quality.shadowsize = 0
        self.env = env

    def reset(self, number: int, split: str):
        self.env.seed(number if split == "eval" else (1 << 20) + number)
        self.seen, _ = self.env.reset()
        # reset() moves the goal after the last step: the first image showed it where it was before
        self.mujoco.mj_kinematics(self.env.model, self.env.data)
        self.policy = self.make_expert()

    def observe(self, cameras: list[str]) -> dict[str, np.ndarray]:
        image = np.ascontiguousarray(self.env.render()[::-1, ::-1])  # corner2 hangs upside down
        return {"image": image, "state": self.seen[:4].astype(np.float32)}

    def advance(self, action, look: bool = True) -> bool:
        self.seen, _, _, _, info = self.env.step(action)
        return bool(info["success"])

    def expert(self) -> np.ndarray:
        return self.policy.get_action(self.seen.copy())  # some write into it

    def scene(self) -> simulate.Scene:
        data = self.env.data
        positions = {}
        for name, place in OBJECTS.get(self.task, {"object": THING, "goal": GOAL}).items():
            match place.kind:
                case "thing":
                    position = self.seen[4:7]
                case "goal":
                    position = self.seen[-3:]
                case "site":
                    position = data.site(place.name).xpos
                case "body":
                    position = data.body(place.name).xpos
            positions[name] = position + place.offset
        corner = self.env.model.camera("corner2").id
        camera = simulate.pinhole_camera(
            data.cam_xpos[corner],
            data.cam_xmat[corner],
            self.env.model.cam_fovy[corner],
            upside_down=True,
        )
        return simulate.Scene(self.seen[:3], positions, camera, self._target(list(positions)))

    def _target(self, names: list[str]) -> str:
        """Which object the expert is going for."""
        if self.task not in OBJECTS:
            return ""  # the experts of these were not looked at
        thing = names[0]
        if self.task == "reach-v3" or len(names) == 1:
            return thing
        # The others go to a place beside the thing, then wait for the fingers to close on it, then
        # go to the goal. Which of these: does the place that they go to move with the thing?
        places = []
        for shift in (0, 1e-7):
            seen = self.seen.copy()
            seen[4:7] += shift
            places.append(self.policy._desired_pos(self.policy._parse_obs(seen)))  # (3,) m
        follows = not np.array_equal(*places)
        waits = np.array_equal(places[0], self.seen[:3])
        return thing if follows or waits else names[1]


if __name__ == "__main__":
    simulate.record("metaworld")
