"""Meta-World 3.1.1 (arXiv 1910.10897): 50 tasks of a real-physics arm. pip install metaworld==3.1.1

    python -m benchmarks.metaworld --episodes 20 --out data/metaworld        # MT10's tasks
    python evaluate.py metaworld --policy runs/vla --trials 20

Demonstrations are of the package's own experts. Action (4,): hand xyz and gripper, in [-1, 1];
state (4,): hand xyz (m) and finger opening; the places of goals and objects are in the image alone.
Trial n of a task is the state that the package draws from seed n; training draws from other seeds.
"""

import numpy as np

from benchmarks import simulate
from benchmarks.serve import need

TRIALS = 20
PROMPTS = {  # MT10, in words; other tasks are asked for by the words of their names
    "reach-v3": "reach the red ball", "push-v3": "push the puck to the goal",
    "pick-place-v3": "bring the puck to the goal", "door-open-v3": "open the door",
    "drawer-open-v3": "open the drawer", "drawer-close-v3": "close the drawer",
    "button-press-topdown-v3": "press the button from above",
    "peg-insert-side-v3": "insert the peg into the hole", "window-open-v3": "open the window",
    "window-close-v3": "close the window",
}


def arguments(add):
    add("--tasks", default=",".join(PROMPTS), help="which tasks; the default is MT10")
    add("--size", type=int, default=128, help="image side, the same in training and evaluation")
    add("--limit", type=int, default=300, help="steps a trial, at most 500")


def tasks(args):
    return [f"metaworld/{name}" for name in args.tasks.split(",")]


def options(args):
    return {"size": args.size, "limit": args.limit}


class Simulator:
    fps = 80

    def __init__(self, task, size, limit, cameras=None):
        world, policies = need("metaworld==3.1.1", "metaworld.env_dict", "metaworld.policies")
        name = task.split("/")[1]
        if name not in world.ALL_V3_ENVIRONMENTS:
            raise ValueError(f"Meta-World has no task {name!r}; --tasks of names like reach-v3")
        if cameras and cameras != ["image"]:
            raise ValueError(f"the policy wants the cameras {', '.join(cameras)}; here is image")
        self.task, self.limit, self.make = task, limit, policies.ENV_POLICY_MAP[name]
        self.prompt = PROMPTS.get(name, name.removesuffix("-v3").replace("-", " "))
        self.env = world.ALL_V3_ENVIRONMENTS[name](
            render_mode="rgb_array", camera_name="corner2", width=size, height=size)
        self.env._partially_observable = self.env._freeze_rand_vec = False  # as its MT benchmarks
        self.env._set_task_called = self.env.seeded_rand_vec = True
        del self.env.sawyer_observation_space  # made while partially observable: it zeroes the goal
        quality = self.env.model.vis.quality  # 8 times as fast on a CPU: no anti-aliasing, shadows
        quality.offsamples = quality.shadowsize = 0

    def reset(self, number, split):
        self.env.seed(number if split == "eval" else (1 << 20) + number)
        self.seen, _ = self.env.reset()
        self.policy = self.make()

    def observe(self):
        image = np.ascontiguousarray(self.env.render()[::-1, ::-1])  # corner2 hangs upside down
        return {"image": image, "state": self.seen[:4].astype(np.float32), "prompt": self.prompt}

    def advance(self, action):
        self.seen, _, _, _, info = self.env.step(np.clip(action, -1, 1))
        return bool(info["success"])

    def expert(self):
        return self.policy.get_action(self.seen)

    def close(self):
        self.env.close()


if __name__ == "__main__":
    simulate.entry(simulate.record, "metaworld")
