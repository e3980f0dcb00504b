"""Meta-World 3.1.1 (arXiv 1910.10897): tasks of an arm with real physics

    python -m benchmarks.metaworld record --episodes 20 --out data/metaworld # the tasks of MT10
    python evaluate.py metaworld --policy runs/vla

The experts are the package's own. Action (4,): hand xyz and gripper, in [-1, 1]; state (4,): hand
xyz (m), finger opening. Trial n begins in the state of seed n; demonstrations begin in others.
"""

import numpy as np

from benchmarks import simulate
from tools.extras import require

TRIALS = 20
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


def arguments(add):
    add("--tasks", default=",".join(PROMPTS), help="which tasks; the default is MT10")


def tasks(args):
    return [f"metaworld/{name}" for name in args.tasks.split(",")]


class Simulator:
    fps, cameras = 80, ["image"]

    def __init__(self, task, size, limit):
        world, policies = require("metaworld==3.1.1", "metaworld.env_dict", "metaworld.policies")
        name = task.split("/")[1]
        if name not in world.ALL_V3_ENVIRONMENTS:
            raise ValueError(f"Meta-World has no task {name!r}; --tasks of names like reach-v3")
        self.limit, self.make = limit or 300, policies.ENV_POLICY_MAP[name]
        self.prompt = PROMPTS.get(name, name.removesuffix("-v3").replace("-", " "))
        self.env = env = world.ALL_V3_ENVIRONMENTS[name](
            render_mode="rgb_array", camera_name="corner2", width=size, height=size
        )
        env._partially_observable = env._freeze_rand_vec = False  # as in its MT benchmarks
        env._set_task_called = env.seeded_rand_vec = True
        del env.sawyer_observation_space  # made while partially observable: it would hide the goal
        env.model.vis.quality.offsamples = env.model.vis.quality.shadowsize = 0  # 8 times as fast

    def reset(self, number, split):
        self.env.seed(number if split == "eval" else (1 << 20) + number)
        self.seen, self.policy = self.env.reset()[0], self.make()

    def observe(self, cameras):
        image = np.ascontiguousarray(self.env.render()[::-1, ::-1])  # corner2 hangs upside down
        return {"image": image, "state": self.seen[:4].astype(np.float32)}

    def advance(self, action, look=True):
        self.seen, _, _, _, info = self.env.step(action)
        return bool(info["success"])

    def expert(self):
        return self.policy.get_action(self.seen)


if __name__ == "__main__":
    simulate.record("metaworld")
