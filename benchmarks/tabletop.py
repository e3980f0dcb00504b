"""Tabletop, the embedded world: a small LIBERO-shaped benchmark in numpy, its expert and its data.

World (metres, seconds do not matter): a table x (right), y (towards the front) in [-0.2, 0.2], z
up. Coloured cubes and balls of 4 cm, a plate, a button, a drawer at the back edge, and a gripper
that grasps, carries, releases, stacks, pushes, presses and pulls. Kinematic: no forces, but
contacts move things, nothing overlaps at reset, and each task can be failed. The image's default
camera looks straight down, so that one 8x8-pixel patch of a 64x64 image is one of the 8x8 cells
a1 (back left) ... h8 (front right) in which questions and thoughts name places. A cast shadow
shows height.

Four suites of ten tasks in LIBERO's sense (arXiv 2306.03310): `spatial` (which of two equal cubes:
the relation decides), `object` (which object), `goal` (one scene, the instruction decides the
verb), `long` (two goals in sequence); and CALVIN's protocol (arXiv 2112.03227): chains of five
instructions without reset.

    python -m benchmarks.tabletop --out data/tabletop --episodes 600 --conversations 20000 --seed 0

writes episodes/episode_*.safetensors, episodes/stats.json, conversations.jsonl and frames/*.png
(formats: README). The same seed gives the same bytes at any number of workers.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import pathlib
import pickle
import shutil
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import save
from tqdm import tqdm

EDGE = 0.2  # half the table's side, m
STEP = 0.025  # translation of a full action, m a step
TURN = 0.1  # rotation of a full action, rad a step
SIZE = 0.04  # cubes and balls, m
HOVER = 0.11  # height at which the expert travels, m
PLATE, BUTTON = 0.045, 0.028  # radii, m
OPEN, CLOSED = 0.07, 0.01  # drawer: counts as open beyond, as closed below, m
TRAVEL = 0.085  # drawer: longest pull, m

COLORS = {
    "red": (225, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 230), "yellow": (245, 215, 40),
    "purple": (160, 60, 200), "white": (250, 250, 250),
}
OBJECTS = [f"{color} {shape}" for shape in ("cube", "ball")
           for color in ("red", "green", "blue", "yellow", "purple")]
SIDES = ["left of", "right of", "behind", "in front of"]
SUITES = ["spatial", "object", "goal", "long"]
LIMITS = {"spatial": 70, "object": 70, "goal": 70, "long": 130, "chain": 70}  # steps

ACTION_QUESTION = "What should the robot do next?"  # as model.action_question asks it

# A goal is (verb, object, destination); a task is an instruction with the goals that it asks for,
# in order.
GOALS = {
    "put the red cube on the plate": ("on", "red cube", "plate"),
    "put the blue cube on the plate": ("on", "blue cube", "plate"),
    "put the green ball on the plate": ("on", "green ball", "plate"),
    "stack the red cube on the blue cube": ("on", "red cube", "blue cube"),
    "stack the green ball on the blue cube": ("on", "green ball", "blue cube"),
    "press the button": ("press", "button", None),
    "open the drawer": ("open", "drawer", None),
    "close the drawer": ("close", "drawer", None),
    "push the blue cube to the left": ("push", "blue cube", None),
    "lift the red cube": ("lift", "red cube", None),
}
LONG = [
    ("put the red cube on the plate", "press the button"),
    ("put the blue cube on the plate", "press the button"),
    ("put the green ball on the plate", "open the drawer"),
    ("open the drawer", "press the button"),
    ("close the drawer", "put the red cube on the plate"),
    ("press the button", "stack the red cube on the blue cube"),
    ("stack the red cube on the blue cube", "open the drawer"),
    ("open the drawer", "lift the red cube"),
    ("close the drawer", "stack the green ball on the blue cube"),
    ("close the drawer", "press the button"),
]


def suite_tasks(suite):
    """The ten tasks of a suite: list of (instruction, [goal, ...], relation or None).

    Raises ValueError for an unknown suite.
    """
    if suite == "spatial":
        relations = [(side, ref) for ref in ("plate", "button") for side in SIDES]
        relations += [("nearest to", "plate"), ("farthest from", "plate")]
        goal = ("on", "red cube", "plate")
        return [(f"pick up the red cube {side} the {ref} and put it on the plate", [goal],
                 (side, ref)) for side, ref in relations]
    if suite == "object":
        return [(f"pick up the {name} and put it on the plate", [("on", name, "plate")], None)
                for name in OBJECTS]
    if suite == "goal":
        return [(text, [goal], None) for text, goal in GOALS.items()]
    if suite == "long":
        return [(f"{a}, then {b}", [GOALS[a], GOALS[b]], None) for a, b in LONG]
    raise ValueError(f"suite {suite!r} is unknown; choose one of {', '.join(SUITES)}")


def paint(image, shapes):
    """Paint shapes in order over a float image (n, n, 3): rectangles, with a gap in the middle if
    asked, and discs."""
    n = len(image)
    scale, grid = n / (2 * EDGE), np.arange(n, dtype=np.float32)
    disc, x, y, rx, ry, gap, *color, alpha = np.array(shapes, np.float32).T  # (N,) each
    u, v, ru, rv, gap = (x + EDGE) * scale, (y + EDGE) * scale, rx * scale, ry * scale, gap * scale
    color = np.stack(color, 1)  # (N, 3)

    def covered(centre, half):  # share of each pixel that lies within centre +- half, (N, n)
        low, high = (centre - half)[:, None], (centre + half)[:, None]
        return (np.minimum(grid + 1, high) - np.maximum(grid, low)).clip(0, 1)

    cu, cv = covered(u, ru) - covered(u, gap), covered(v, rv) * alpha[:, None]
    du, dv = (grid + 0.5 - u[:, None]) ** 2, (grid + 0.5 - v[:, None]) ** 2  # (N, n)
    box = np.stack([u - ru, u + ru + 2, v - rv, v + rv + 2], 1).clip(0, n).astype(int).tolist()
    for i, (a, b, c, d) in enumerate(box):
        if disc[i]:
            cover = (ru[i] + 0.5 - np.sqrt(dv[i, c:d, None] + du[i, a:b])).clip(0, 1) * alpha[i]
        else:
            cover = cv[i, c:d, None] * cu[i, a:b]
        view = image[c:d, a:b]
        view += cover[..., None] * (color[i] - view)
    return image


class Thing:
    """A cube or ball: name, place of its bottom centre (x, y, z), and what it rests `on`."""

    __slots__ = ("name", "on", "x", "y", "z")

    def __init__(self, name, x, y, z=0.0, on="table"):
        self.name, self.x, self.y, self.z, self.on = name, x, y, z, on


class Tabletop:
    """The environment. Actions (7,) in [-1, 1], all deltas: xyz, roll pitch yaw, gripper (-1 opens,
    +1 closes).

    obs: {"image": uint8 (size, size, 3), "state": float32 (8,) = gripper xyz (m), roll pitch yaw
    (rad), the two finger positions (m), "instruction": str}. `tilt` > 0 turns the camera from
    straight down to oblique.
    """

    def __init__(self, suite="goal", size=64, tilt=0.0):
        self.suite, self.size, self.tilt = suite, size, tilt
        self.task_list = suite_tasks(suite)
        self.tasks = [text for text, _, _ in self.task_list]
        self.still = (None, None)  # the painted background and what it shows

    # ---- reset

    def reset(self, task, seed, split="eval"):
        """Start trial `seed` of a task. split "eval" and "train" never share a random stream.
        Returns obs."""
        self.place(task, seed, split)
        return self.observe()

    def place(self, task, seed, split):
        """`reset` without rendering."""
        number = SUITES.index(self.suite)
        self.rng = np.random.default_rng([0 if split == "train" else 1, number, task, seed])
        _, goals, relation = self.task_list[task]
        while not self._lay_out(relation, goals):
            pass
        self.pos = self.rng.uniform([-0.17, -0.1, 0.07], [0.17, 0.17, 0.13])
        self.rpy = np.zeros(3)
        self.aperture, self.held, self.grip = 1.0, None, None
        self.instruct(self.tasks[task], goals, LIMITS[self.suite])

    def instruct(self, text, goals, limit):
        """Give a new instruction in the present state (chains do this without reset)."""
        self.instruction, self.goals, self.limit, self.steps = text, goals, limit, 0
        self.begin = {thing.name: (thing.x, thing.y) for thing in self.things}

    def _lay_out(self, relation, goals):
        """One try at a random scene in which the task's relation singles out one cube; False to
        try again."""
        rng, self.lit = self.rng, False
        if self.suite == "spatial":
            names = ["red cube", "red cube"]
        elif self.suite == "object":
            target = goals[0][1]
            others = [name for name in OBJECTS if name != target]
            names = [target, *rng.choice(others, 3, replace=False)]
        else:
            names = ["red cube", "blue cube", "green ball"]
        self.drawer_x, self.drawer = None, 0.0
        if self.suite in ("goal", "long"):
            self.drawer_x, self.drawer = rng.uniform(-0.12, 0.12), rng.uniform(0.03, 0.05)
        back = -0.05 if self.drawer_x is not None else -0.16
        spots = []
        for _ in range(100):
            spot = rng.uniform([-0.165, back], [0.165, 0.165])
            if all(math.dist(spot, other) > 0.085 for other in spots):
                spots.append(spot)
            if len(spots) == len(names) + 2:
                break
        else:
            return False
        self.plate = tuple(map(float, spots[0]))
        self.button = tuple(map(float, spots[1])) if self.suite != "object" else None
        self.things = [Thing(str(n), float(x), float(y)) for n, (x, y) in zip(names, spots[2:])]
        if any(verb == "push" for verb, _, _ in goals):
            thing = self.find("blue cube")
            if not -0.05 < thing.x < 0.11:
                return False
            path = [(thing.x - d, thing.y) for d in (-0.05, 0.05, 0.1)]
            places = [self.plate, self.button, *((t.x, t.y) for t in self.things if t is not thing)]
            if any(math.dist(a, b) < 0.06 for a in path for b in places):
                return False
        return relation is None or self._single_out(*relation)

    def _single_out(self, side, ref):
        """Order the two red cubes so that only things[0] stands in the relation to the reference,
        by a margin."""
        x, y = self.plate if ref == "plate" else self.button
        axes = {"left of": (-1, 0), "right of": (1, 0), "behind": (0, -1), "in front of": (0, 1)}
        axis = axes.get(side)

        def score(t):
            if axis:
                return (t.x - x) * axis[0] + (t.y - y) * axis[1]
            return math.hypot(t.x - x, t.y - y) * (-1 if side == "nearest to" else 1)

        self.things.sort(key=score, reverse=True)
        a, b = map(score, self.things)
        return (a > 0.04 and b < -0.04) if axis else a - b > 0.06

    def find(self, name):
        """The thing of that name; of two equal ones, the first: the relation singles it out."""
        return next(thing for thing in self.things if thing.name == name)

    def handle(self):
        """Place (x, y) of the drawer's handle."""
        return self.drawer_x, -EDGE + 0.03 + self.drawer

    # ---- step

    def step(self, action):
        """Apply one action (7,). Returns (obs, success, done); done also at the step limit.

        Raises ValueError when the action is not 7 finite numbers.
        """
        success = self.advance(action)
        return self.observe(), success, success or self.steps >= self.limit

    def advance(self, action):
        """`step` without rendering; returns success."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers, got shape {action.shape}: {action}")
        action = np.clip(action, -1, 1)
        old = self.pos
        new = np.clip(old + STEP * action[:3], [-EDGE, -EDGE, 0.005], [EDGE, EDGE, 0.2])
        if self.held == "drawer":  # the rail lets the hand move along y only
            self.drawer = float(np.clip(self.drawer + new[1] - old[1], 0, TRAVEL))
            new = np.array([old[0], self.handle()[1], old[2]])
        self.pos = new
        self.rpy = np.clip(self.rpy + TURN * action[3:6], -0.5, 0.5)
        if isinstance(self.held, Thing):
            thing = self.held
            thing.x, thing.y, thing.z = (float(v) for v in new + self.grip)
            if thing.z < 0:  # the table is in the way
                self.pos, thing.z = new - [0, 0, thing.z], 0.0
        self._fingers(float(action[6]))
        self._push()
        if self.button and self.pos[2] < 0.02 and math.dist(self.pos[:2], self.button) < BUTTON:
            self.lit = True
        self.steps += 1
        return all(self.satisfied(goal) for goal in self.goals)

    def _fingers(self, command):
        """Move the fingers by the command, grasp what they close on, release what they let go."""
        self.aperture = min(max(self.aperture - 0.35 * command, 0.0), 1.0)
        if self.held is not None:
            self.aperture = max(self.aperture, 0.4)  # an object fills the rest
            if self.aperture > 0.6:
                thing, self.held = self.held, None
                if isinstance(thing, Thing):
                    self._fall(thing)
            return
        if self.aperture > 0.5 or command <= 0 or np.abs(self.rpy).max() > 0.4:
            return
        x, y, z = self.pos
        if self.drawer_x is not None and z < 0.04 and math.dist((x, y), self.handle()) < 0.018:
            self.held = "drawer"
        for thing in self.things:
            if math.hypot(thing.x - x, thing.y - y) < 0.016 and -0.005 < z - thing.z < 0.036:
                if self._above_it(thing):
                    continue
                self.held, thing.on = thing, "gripper"
                self.grip = np.array([thing.x - x, thing.y - y, thing.z - z])
                break
        if self.held is not None:
            self.aperture = 0.4

    def _above_it(self, thing):
        """The things that stand on this one."""
        return [t for t in self.things if t is not thing and t.on == thing.name and t.z > thing.z
                and math.hypot(t.x - thing.x, t.y - thing.y) < 0.03]

    def _fall(self, thing):
        """Drop a released thing onto what is below: another thing, the plate, or the table."""
        thing.z, thing.on = 0.0, "table"
        if math.dist((thing.x, thing.y), self.plate) < PLATE - 0.005:
            thing.on = "plate"
        for other in sorted(self.things, key=lambda t: t.z):
            gap = math.hypot(thing.x - other.x, thing.y - other.y)
            if other is thing or gap > 0.9 * SIZE:
                continue
            if gap < 0.022:
                thing.z, thing.on = other.z + SIZE, other.name
            else:  # off the edge: it slides down beside
                self._shift(thing, other.x, other.y, SIZE)

    def _shift(self, thing, x, y, radius):
        """Move a thing away from (x, y) to the given distance, with whatever stands on it."""
        dx, dy = thing.x - x, thing.y - y
        gap = math.hypot(dx, dy) or 1e-9
        dx, dy = dx / gap * (radius - gap), dy / gap * (radius - gap)
        for other in (thing, *self._above_it(thing)):
            other.x = min(max(other.x + dx, -EDGE + 0.02), EDGE - 0.02)
            other.y = min(max(other.y + dy, -EDGE + 0.02), EDGE - 0.02)
        if thing.on == "plate" and math.dist((thing.x, thing.y), self.plate) > PLATE:
            thing.on = "table"

    def _push(self):
        """Contacts: low fingers (and a low carried thing) move what stands in their way."""
        x, y, z = self.pos
        carried = self.held if isinstance(self.held, Thing) else None
        low = z - (0.02 if carried else 0)
        for thing in self.things:
            if thing is carried or not thing.z - 0.005 < low < thing.z + SIZE:
                continue
            gap = math.hypot(thing.x - x, thing.y - y)
            if carried:
                radius = SIZE
            elif self.aperture < 0.5:
                radius = 0.03
            elif gap < 0.02:  # between the open fingers: free to move 12 mm, then dragged along
                if gap > 0.012:
                    self._shift(thing, x, y, 0.012)
                continue
            else:
                radius = 0.034
            if gap < radius:
                self._shift(thing, x, y, min(radius, gap + STEP))

    def satisfied(self, goal):
        """Is this goal (verb, object, destination) reached in the present state?"""
        verb, name, dest = goal
        if verb == "on":
            return self.find(name).on == dest
        if verb == "press":
            return self.lit
        if verb == "open":
            return self.drawer > OPEN
        if verb == "close":
            return self.drawer < CLOSED
        thing = self.find(name)
        if verb == "lift":
            return self.held is thing and thing.z > 0.06
        return self.begin[name][0] - thing.x > 0.06  # push to the left

    def goal(self):
        """The first goal that is not reached yet (the last one when all are)."""
        return next((g for g in self.goals if not self.satisfied(g)), self.goals[-1])

    # ---- render

    def observe(self):
        fingers = 0.04 * self.aperture
        state = np.array([*self.pos, *self.rpy, fingers, -fingers], np.float32)
        return {"image": self.render(), "state": state, "instruction": self.instruction}

    def render(self, size=None):
        """The camera image, uint8 (size, size, 3), anti-aliased: places show below a pixel."""
        n = size or self.size
        fixed, moving = self._shapes()
        key = (n, self.tilt, tuple(fixed))
        if self.still[0] != key:  # what does not move is painted once
            image = np.empty((n, n, 3), np.float32)
            image[:] = (206, 192, 170)
            self.still = (key, paint(image, fixed))
        image = paint(self.still[1].copy(), moving)
        return (image + 0.5).astype(np.uint8)

    def _shapes(self):
        """What the camera sees, back to front, in metres, as two lists (fixed, moving) of
        (is disc, x, y, half width, half height, half width of the gap, r, g, b, alpha)."""
        fixed, moving = [], []

        def add(disc, x, y, z, rx, ry, color, alpha=1.0, gap=0.0, to=moving):
            to.append((disc, x, y - self.tilt * z, rx, ry, gap, *color, alpha))

        add(1, *self.plate, 0, PLATE, PLATE, COLORS["white"], to=fixed)
        add(1, *self.plate, 0, PLATE - 0.012, PLATE - 0.012, (215, 215, 225), to=fixed)
        if self.button:
            add(0, *self.button, 0, BUTTON, BUTTON, (70, 70, 70), to=fixed)
            light = (60, 240, 240) if self.lit else (135, 135, 135)
            add(1, *self.button, 0, 0.017, 0.017, light, to=fixed)
        if self.drawer_x is not None:
            x, y = self.handle()
            add(0, x, -EDGE + (y + EDGE) / 2, 0, 0.05, (y + EDGE) / 2, (125, 85, 45), to=fixed)
            add(0, x, y, 0.02, 0.025, 0.008, (60, 40, 20), to=fixed)
        for thing in sorted(self.things, key=lambda t: t.z):
            ball, half = thing.name.endswith("ball"), SIZE / 2 * (1 + 1.5 * thing.z)
            if thing.z > 0:
                shade = 0.4 * thing.z
                add(ball, thing.x + shade, thing.y + shade, 0, half, half, (0, 0, 0), 0.35)
            add(ball, thing.x, thing.y, thing.z, half, half, COLORS[thing.name.split()[0]])
            if ball:
                add(1, thing.x - 0.004, thing.y - 0.004, thing.z, 0.008, 0.008, (255, 255, 255))
        x, y, z = self.pos.tolist()
        zoom, spread = 1 + 2 * z, 0.012 + 0.016 * self.aperture  # nearer to the camera looks larger
        layers = (0.4 * z, 0, (0, 0, 0), 0.35), (0.0, z, (15, 15, 15), 1.0)  # shadow, fingers
        for shade, height, color, alpha in layers:
            wide, slit = (spread + 0.006) * zoom, (spread - 0.006) * zoom
            add(0, x + shade, y + shade, height, wide, 0.018 * zoom, color, alpha, slit)
            add(0, x + shade, y + shade - 0.018 * zoom, height, wide, 0.004 * zoom, color, alpha)
        return fixed, moving

    # ---- expert

    def expert(self):
        """The scripted expert, a smooth function of the present state (so perturbed states show
        recoveries).

        Returns (action (7,) in [-1, 1], plan): plan = {"phase", "target" (name), "at" (x, y of the
        target), "move" (3,) m to the waypoint, "grip"}. Speed is limited isotropically and falls
        off proportionally near the waypoint, height is blended with the distance left: chunks of
        its actions are predictable from the scene.
        """
        verb, name, dest = self.goal()
        x, y, z = self.pos
        held = self.held
        needed = name if verb in ("on", "lift") else "drawer" if verb in ("open", "close") else None
        holding = held is not None and (held if held == "drawer" else held.name) == needed
        if needed and needed != "drawer" and isinstance(held, Thing):
            holding = held is self.find(needed)
        if held is not None and not holding:  # something else is in the hand: put it down here
            way = np.array([x, y, z if held == "drawer" else 0.02])
            return self._act("drop", "gripper", (x, y), way, -self._near(0.0, way[2] - z))
        if verb == "press":
            return self._act("press", name, self.button, self._above(*self.button, 0.0), 1.0)
        if verb == "push":
            thing = self.find(name)
            start = (thing.x + 0.05, thing.y)
            dx, dy = x - thing.x, y - thing.y
            if dx > 0.02 and abs(dy) < 0.012 and dx < 0.07 and z < 0.035:
                way = np.array([thing.x - 0.02, thing.y, 0.02])
                return self._act("push", name, (thing.x, thing.y), way, 1.0)
            return self._act("reach", name, (thing.x, thing.y), self._above(*start, 0.02), 1.0)
        if not holding:
            if needed == "drawer":
                at, low = self.handle(), 0.02
            else:
                thing = self.find(name)
                at, low = (thing.x, thing.y), thing.z + 0.02
            way = self._above(*at, low)
            grip = self._near(math.dist((x, y), at), z - low)
            return self._act("grasp" if grip > 0 else "reach", name, at, way, grip)
        if verb in ("open", "close"):
            way = np.array([x, y + (0.12 if verb == "open" else -0.12), z])
            return self._act("pull" if verb == "open" else "shut", name, self.handle(), way, 1.0)
        if verb == "lift":
            return self._act("lift", name, (x, y), np.array([x, y, 0.14]), 1.0)
        if dest == "plate":
            at, low = self.plate, 0.0
        else:
            base = self.find(dest)
            at, low = (base.x, base.y), base.z + SIZE
        low = low + 0.004 - self.grip[2]
        spot = (at[0] - self.grip[0], at[1] - self.grip[1])
        grip = -self._near(math.dist((x, y), spot), z - low)
        return self._act("place" if grip < 0 else "carry", dest, at, self._above(*spot, low), grip)

    def _above(self, x, y, low):
        """Waypoint over (x, y): travel height far away, down to `low` within the last 6 cm."""
        far = min(max((math.hypot(x - self.pos[0], y - self.pos[1]) - 0.015) / 0.05, 0.0), 1.0)
        return np.array([x, y, low + (max(HOVER, low + 0.05) - low) * far * far * (3 - 2 * far)])

    def _near(self, gap, dz):
        """+1 at the pose, -1 away from it, smooth between (m): commands the fingers."""
        return math.tanh(3 * (1 - math.hypot(gap, dz) / 0.011))

    def _act(self, phase, target, at, way, grip):
        move = way - self.pos
        u = 0.6 * move / STEP
        x, y, z = self.pos
        # the fingers still enclose something that is not wanted: rise before moving sideways
        for thing in self.things:
            inside = math.hypot(thing.x - x, thing.y - y) < 0.045 and z < thing.z + SIZE
            if inside and thing is not self.held and (thing.name != target or phase == "carry"):
                free = min(max((z - thing.z - 0.015) / 0.03, 0.0), 1.0)
                u = np.array([u[0] * free, u[1] * free, max(u[2], 1.0 - free)])
        speed = float(np.linalg.norm(u))
        u = u * (math.tanh(speed) / speed if speed > 1e-9 else 1.0)
        action = np.concatenate([u, np.clip(-self.rpy / TURN, -1, 1), [grip]])
        return action, {"phase": phase, "target": target, "at": at, "move": move, "grip": grip}

    def follow(self, text):
        """Let the expert carry out one instruction of the goal suite in the present state; True
        when it succeeds."""
        self.instruct(text, [GOALS[text]], LIMITS["chain"])
        if self.satisfied(GOALS[text]):
            return False  # nothing left to do: not a task
        while self.steps < self.limit:
            if self.advance(self.expert()[0]):
                return True
        return False

    def clone(self):
        """An independent copy of the present state."""
        twin = Tabletop.__new__(Tabletop)
        twin.__dict__.update(self.__dict__)
        twin.things = [Thing(t.name, t.x, t.y, t.z, t.on) for t in self.things]
        if isinstance(self.held, Thing):
            twin.held = twin.things[self.things.index(self.held)]
        return twin


# ---- CALVIN's protocol on this world


def chain(number):
    """Chain `number`: (trial of the goal suite's task 0, [five instructions]).

    As CALVIN's, chains are feasible: the expert finishes all five from the initial state chosen.
    """
    rng = np.random.default_rng([2, number])
    while True:
        picks = [list(GOALS)[i] for i in rng.choice(len(GOALS), 5, replace=False)]
        trial = int(rng.integers(1 << 40))
        plates = sum(p.endswith("plate") for p in picks)
        if plates > 1 or sum(p.startswith("stack") for p in picks) > 1:
            continue
        env = Tabletop("goal")
        env.place(0, trial, "eval")
        if all(env.follow(text) for text in picks):
            return trial, picks


# ---- evaluation trials of evaluate.py


class Trial:
    """One episode, or one chain of instructions without reset, in its own environment."""

    def __init__(self, env, suite, task, seed, todo=()):
        self.env, self.suite, self.task, self.seed, self.todo = env, suite, task, seed, list(todo)
        self.done, self.solved, self.frames, self.film = False, 0, [], False

    def shoot(self):
        if not self.film:
            return
        picture = Image.new("RGB", (256, 280), "white")
        picture.paste(Image.fromarray(self.env.render(256)), (0, 24))
        ImageDraw.Draw(picture).text((4, 6), self.env.instruction[:48], "black")
        self.frames.append(picture)

    def act(self, actions):
        """Carry out a chunk's actions (K, 7), or as many as the trial lasts."""
        for action in actions:
            success = self.env.advance(action)
            self.shoot()
            if success:
                self.solved += 1
                self.next()
                return
            if self.env.steps >= self.env.limit:
                self.done = True
                return

    def save(self, folder):
        """The frames, if any were shot, as folder/SUITE_TASK_OUTCOME.gif."""
        if not self.frames:
            return
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        frames = [f.quantize(64) for f in self.frames]
        name = f"{self.suite}_{self.task}_{'success' if self.solved else 'failure'}.gif"
        frames += frames[-1:] * 6
        frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=120, loop=0)

    def next(self):
        """The chain's next instruction, in the state that the last one left; done when none is."""
        if not self.todo:
            self.done = True
            return
        text = self.todo.pop(0)
        self.env.instruct(text, [GOALS[text]], LIMITS["chain"])


def make_trials(suites, trials, chains):
    """The fixed evaluation trials of each suite (10 tasks x trials), and the chains."""
    made = []
    for suite in suites:
        for task in range(10 if suite != "chain" else 0):
            for seed in range(trials):
                env = Tabletop(suite)
                env.place(task, seed, "eval")
                made.append(Trial(env, suite, task, seed))
    for number in range(chains if "chain" in suites else 0):
        state, todo = chain(number)
        env = Tabletop("goal")
        env.place(0, state, "eval")
        made.append(Trial(env, "chain", 0, number, todo))
        made[-1].next()
    return made


def drive(policy, trials, batch, execute=0, ensemble=0.0):
    """Run all trials to their ends: a round is one batched forward and `execute` steps of each."""
    from benchmarks.serve import Chunks

    active, bar = list(trials), tqdm(total=len(trials), desc="trials", disable=None)
    plans = {trial: Chunks(policy.horizon, execute, ensemble) for trial in trials}
    while active:
        for start in range(0, len(active), batch):
            part = active[start : start + batch]
            seen = [trial.env.observe() for trial in part]
            chunks = policy.act_batch(
                [o["image"] for o in seen], [o["instruction"] for o in seen],
                np.stack([o["state"] for o in seen]))  # (B, K, A)
            for trial, o, chunk in zip(part, seen, chunks):
                trial.act(plans[trial](chunk, o["instruction"]))
        left = [trial for trial in active if not trial.done]
        bar.update(len(active) - len(left))
        active = left
    bar.close()


# ---- questions and answers from the ground-truth state


def cell(x, y):
    """Name of the 5 cm cell at (x, y): column a-h left to right, row 1-8 back to front."""
    column = min(max(int((x + EDGE) / 0.05), 0), 7)
    row = min(max(int((y + EDGE) / 0.05), 0), 7)
    return "abcdefgh"[column] + str(row + 1)


def named_places(env):
    """[(name, x, y)] of everything on the table that has a name of its own."""
    names = [t.name for t in env.things]
    places = [(t.name, t.x, t.y) for t in env.things if names.count(t.name) == 1]
    places.append(("plate", *env.plate))
    if env.button:
        places.append(("button", *env.button))
    if env.drawer_x is not None:
        places.append(("drawer handle", *env.handle()))
    return places


def hand(env):
    """The gripper in words: cell, height, what it does."""
    height = "low" if env.pos[2] < 0.04 else "mid" if env.pos[2] < 0.08 else "high"
    if env.held is not None:
        grip = "holding the " + ("handle" if env.held == "drawer" else env.held.name)
    else:
        grip = "open" if env.aperture > 0.5 else "closed"
    return cell(*env.pos[:2]), height, grip


def heading(plan):
    """The expert's next move in words: "right 11, front 4, down 8, open", in centimetres."""
    words, sides = [], (("left", "right"), ("back", "front"), ("down", "up"))
    for delta, (minus, plus) in zip(plan["move"], sides):
        count = int(100 * abs(delta) + 0.5)
        if count:
            words.append(f"{plus if delta > 0 else minus} {count}")
    words.append("close" if plan["grip"] > 0 else "open")
    return ", ".join(words)


def thought(env, plan):
    """The reasoning before a move: target, its place, the gripper's, the phase, the direction."""
    at, height, grip = hand(env)
    target = {"drawer": "handle", "gripper": "drop spot"}.get(plan["target"], plan["target"])
    return (f"The {target} is at {cell(*plan['at'])}. The gripper is at {at}, {height}, {grip}. "
            f"Now {plan['phase']}: {heading(plan)}.")


def point(x, y):
    """A place in whole centimetres from the left and the back edge: "17 32"."""
    return f"{100 * (x + EDGE):.0f} {100 * (y + EDGE):.0f}"


def caption(env, place=cell):
    """Everything on the table in words, each with its place, in the order of cells."""
    places = sorted((cell(t.x, t.y), t.name, t.x, t.y) for t in env.things)
    places = [(name, x, y) for _, name, x, y in places] + [
        p for p in named_places(env) if p[0] in ("plate", "button", "drawer handle")]
    _, height, grip = hand(env)
    text = ", ".join(f"{name} {place(x, y)}" for name, x, y in places)
    text += f", gripper {place(*env.pos[:2])} {height} {grip}"
    return text + (", light on" if env.lit else "")


def _where(env, rng):
    name, x, y = _pick(rng, named_places(env))
    return f"Where is the {name}?", f"The {name} is at {cell(x, y)}.", cell(x, y)


def _what(env, rng):
    places = [(t.name, t.x, t.y) for t in env.things] + named_places(env)[-3:]
    _, x, y = _pick(rng, places)
    if rng.random() < 0.15:
        x, y = rng.uniform(-EDGE, EDGE, 2)
    where = cell(x, y)
    stack = [t.name for t in sorted(env.things, key=lambda t: -t.z) if cell(t.x, t.y) == where]
    under = [n for n, px, py in named_places(env) if n not in OBJECTS and cell(px, py) == where]
    answer = (stack + under + ["nothing"])[0]
    return f"What is at {where}?", f"At {where} there is {answer}.", answer


def _point(env, rng):
    name, x, y = _pick(rng, [*named_places(env), ("gripper", *env.pos[:2])])
    return f"Point to the {name}.", f"The {name} is at {cell(x, y)}.", point(x, y)


def _points(env, rng):
    _, reason, _ = _caption(env, rng)
    return "Point to everything.", reason, caption(env, point)


def _relation(env, rng):
    places = named_places(env)
    (a, ax, ay), (b, bx, by) = (places[i] for i in rng.permutation(len(places))[:2])
    if abs(ax - bx) > abs(ay - by):
        question, answer = f"Is the {a} left or right of the {b}?", "left" if ax < bx else "right"
    else:
        question = f"Is the {a} behind or in front of the {b}?"
        answer = "behind" if ay < by else "in front"
    return question, f"The {a} is at {cell(ax, ay)}. The {b} is at {cell(bx, by)}.", answer


def _holding(env, rng):
    at, height, grip = hand(env)
    answer = grip.removeprefix("holding the ") if env.held is not None else "nothing"
    return "What is the gripper holding?", f"The gripper is at {at}, {height}, {grip}.", answer


def _gripper(env, rng):
    answer = ", ".join(hand(env))
    return "Where is the gripper?", f"The gripper is at {answer}.", answer


def _choices(rng, right, wrong):
    """Shuffle one right and two wrong options into "A) ... B) ... C) ..." and the right letter."""
    options = [right, *[w for w in dict.fromkeys(wrong) if w != right][:2]]
    order = rng.permutation(len(options))
    text = " ".join(f"{'ABC'[i]}) {options[j]}" for i, j in enumerate(order))
    return text, "ABC"[list(order).index(0)]


def _choice(env, rng):
    name, x, y = _pick(rng, named_places(env))
    others = [p[0] for p in named_places(env)] + list(rng.permutation(OBJECTS))
    wrong = [str(o) for o in rng.permutation(others) if all(o != n or cell(a, b) != cell(x, y)
             for n, a, b in named_places(env))]
    text, letter = _choices(rng, name, wrong)
    return f"Which one is at {cell(x, y)}? {text}", f"At {cell(x, y)} there is {name}.", letter


def _caption(env, rng):
    at, height, grip = hand(env)
    return "Describe the scene.", f"The gripper is at {at}, {height}, {grip}.", caption(env)


def _task(env, question):
    return f"Instruction: {env.instruction}\n{question}"


def _target(env, rng):
    _, plan = env.expert()
    return _task(env, "Where is the target?"), thought(env, plan), cell(*plan["at"])


def _direction(env, rng):
    _, plan = env.expert()
    return _task(env, "Which way should the gripper move?"), thought(env, plan), heading(plan)


def _phase(env, rng):
    _, plan = env.expert()
    return _task(env, "Which phase is it?"), thought(env, plan), plan["phase"]


def _fingers(env, rng):
    _, plan = env.expert()
    answer = "close" if plan["grip"] > 0 else "open"
    return _task(env, "Should the fingers open or close?"), thought(env, plan), answer


def _movement(env, rng):
    _, plan = env.expert()
    wrong = []
    for _ in range(4):
        move = plan["move"] * rng.choice([-1.0, 1.0, 0.0], 3) + rng.normal(0, 0.05, 3)
        wrong.append(heading({"move": move, "grip": rng.choice([-1, 1])}))
    text, letter = _choices(rng, heading(plan), wrong)
    return _task(env, f"Which movement is next? {text}"), thought(env, plan), letter


def _trajectory(env, rng):
    _, plan = env.expert()
    ahead, cells = env.clone(), [cell(*env.pos[:2])]
    for _ in range(4):
        for _ in range(3):
            ahead.advance(ahead.expert()[0])
        cells.append(cell(*ahead.pos[:2]))
    return _task(env, "Trace the path of the gripper."), thought(env, plan), " ".join(cells)


# kind of question -> (maker, weight). Each is asked both ways, directly and with a thought.
SCENE = {"where": (_where, 4), "what": (_what, 4), "relation": (_relation, 2),
         "holding": (_holding, 1), "gripper": (_gripper, 2), "choice": (_choice, 1),
         "caption": (_caption, 4), "point": (_point, 4), "points": (_points, 5)}
TASK = {"target": (_target, 2), "direction": (_direction, 8), "phase": (_phase, 1),
        "fingers": (_fingers, 1), "movement": (_movement, 1), "trajectory": (_trajectory, 2)}


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def random_state(rng, size=64, tilt=0.0):
    """A scene in the middle of some task: a random suite and task, the expert run for a while,
    sometimes disturbed."""
    env = Tabletop(_pick(rng, SUITES), size, tilt)
    env.place(int(rng.integers(10)), int(rng.integers(1 << 40)), "train")
    if rng.random() < 0.4:  # anywhere above the table
        env.pos = rng.uniform([-0.19, -0.19, 0.015], [0.19, 0.19, 0.15])
        env.aperture = float(rng.random() < 0.6)
        env._push()
    if rng.random() < 0.3 and env.button:
        env.lit = True
    for _ in range(int(rng.integers(0, 30))):
        twin = env.clone()
        if env.advance(env.expert()[0]):
            return twin  # a finished task has no next move
    return env


def conversation(seed, number, size=64, tilt=0.0):
    """Conversation `number`: (image, [(kind, question, thought or None, answer), ...])."""
    rng = np.random.default_rng([3, seed, number])
    env = random_state(rng, size, tilt)
    makers = {**SCENE, **TASK}
    weights = np.array([w for _, w in makers.values()], float)
    count = 1 if number % 4 == 0 else 5  # a quarter of single questions, held-out scores use those
    turns = []
    for kind in rng.choice(list(makers), count, replace=False, p=weights / weights.sum()):
        question, reason, answer = makers[kind][0](env, rng)
        turns.append((str(kind), question, reason if rng.random() < 0.5 else None, answer))
    # last, or the rest could be copied from them
    turns.sort(key=lambda turn: turn[0] in ("caption", "points"))
    return env.render(), turns


# ---- writing the data


def record(suite, task, seed, noise, size=64, tilt=0.0):
    """One demonstration: dict of arrays, or None when the expert failed. Some are disturbed.

    Recorded actions are always the expert's for the state seen; disturbed steps execute a random
    push instead, so that the demonstrations contain recoveries (as in DART, arXiv 1703.09327).
    """
    env = Tabletop(suite, size, tilt)
    obs = env.reset(task, seed, split="train")
    rng = np.random.default_rng([4, SUITES.index(suite), task, seed])
    disturbed, left = rng.random() < 0.5, 0
    frames, states, actions, done, success = [], [], [], False, False
    while not done:
        action, _ = env.expert()
        frames.append(obs["image"])
        states.append(obs["state"])
        actions.append(action.astype(np.float32))
        if disturbed and left == 0 and rng.random() < noise:
            left, push = int(rng.integers(2, 5)), rng.uniform(-1, 1, 3)
        if left:
            action = np.concatenate([push, action[3:]])
            left -= 1
        obs, success, done = env.step(action)
    if not success:
        return None
    return {"image": np.stack(frames), "state": np.stack(states), "action": np.stack(actions)}


def write_episode(path, arrays, header):
    """safetensors with the header's keys sorted: the library leaves them in random order."""
    data = save(arrays, header)
    n = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:n])
    head["__metadata__"] = dict(sorted(header.items()))
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode().ljust(n - 8)
    path.write_bytes(data[:8] + text + data[n:])


class Damaged(ValueError):
    """One line about data that cannot be used: where, what is wrong, the cure."""


@contextlib.contextmanager
def reading(where, *more):
    """What goes wrong inside becomes Damaged, naming `where` (a file, perhaps a row). more: further
    kinds of errors."""
    try:
        yield
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, EOFError,
            pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, *more) as e:
        kind = "" if type(e) is ValueError else f"{type(e).__name__}: "
        why = str(e).replace("\n", " ")
        raise Damaged(f"{where}: {kind}{why}; repair it or copy the dataset again") from e


def write_episodes(out, made):
    """Episodes that a converter makes, (arrays, header) each -> folder `out` with its stats.json.
    A conversion that fails ends in one line and leaves nothing behind."""
    from fast_tokenizer import statistics

    out, seen = pathlib.Path(out), {"action": [], "state": []}
    part = out.with_name(out.name + ".part")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} already holds data; name another --out or delete it")
        part.mkdir(parents=True)
        for number, (arrays, header) in enumerate(tqdm(made, "episodes", disable=None)):
            for name, rows in seen.items():
                rows.append(arrays[name].astype(np.float32))
                with reading(header["source"]):
                    if len(bad := np.flatnonzero(~np.isfinite(rows[-1]).all(1))):
                        raise ValueError(f"{name} of step {bad[0]} is not finite")
            arrays |= {name: rows[-1] for name, rows in seen.items()}
            write_episode(part / f"episode_{number:06d}.safetensors", arrays, header)
        if not seen["action"]:
            raise ValueError(f"no episodes for {out}; give a folder with some as --data")
        stats = {name: statistics(np.concatenate(rows)) for name, rows in seen.items()}
        (part / "stats.json").write_text(json.dumps(stats, indent=1))
        part.replace(out)
    except ModuleNotFoundError as e:
        raise SystemExit(f"error: {e}; pip install -r requirements-extras.txt") from e
    except (ValueError, FileExistsError) as e:
        raise SystemExit(f"error: {e}") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: {number + 1} episodes of {stats['action']['count']} steps")


def _episode_job(job):
    number, seed, noise, size, tilt = job
    suite, task = SUITES[number % 4], number // 4 % 10
    arrays, dropped = None, -1
    while arrays is None:
        dropped += 1
        arrays = record(suite, task, (seed << 24) + (number << 4) + dropped, noise, size, tilt)
    text = suite_tasks(suite)[task][0]
    header = {"task": text, "fps": "5", "source": f"tabletop {suite} task {task}"}
    return dropped, arrays, header


def _save_frame(folder, kind, number, image):
    name = f"{kind}/{number // 1000:04d}/{number:07d}.png"
    path = pathlib.Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)
    return name


def _conversation_job(job):
    folder, number, seed, size, tilt, single, _ = job
    image, turns = conversation(seed, number, size, tilt)
    name, rows, messages = _save_frame(folder, "frames", number, image), [], []
    for kind, question, reason, answer in turns:
        think = f"<think>{reason}</think>" if reason else ""
        messages += [{"role": "user", "content": ("" if messages else "<image>") + question},
                     {"role": "assistant", "content": f"{think}<answer>{answer}</answer>"}]
        if single or len(turns) == 1:
            rows.append({"images": [name], "messages": messages,
                         "kind": kind + ("+think" if reason else "")})
            messages = []
    return "\n".join(map(json.dumps, rows or [{"images": [name], "messages": messages}]))


def _thought_action_job(job):
    """A thought followed by the expert's next actions: not in the paper's data, see sft.py."""
    folder, number, seed, size, tilt, _, horizon = job
    env = random_state(np.random.default_rng([5, seed, number]), size, tilt)
    name = _save_frame(folder, "thought_frames", number, env.render())
    _, plan = env.expert()
    reason, question = thought(env, plan), _task(env, ACTION_QUESTION)
    ahead, chunk = env.clone(), []
    while len(chunk) < horizon:
        chunk.append(ahead.expert()[0].round(4).tolist())
        if ahead.advance(chunk[-1]):  # past the end an episode's last action repeats
            chunk += [chunk[-1]] * (horizon - len(chunk))
    answer = f"<think>{reason}</think><answer><ACTION></answer>"
    messages = [{"role": "user", "content": "<image>" + question},
                {"role": "assistant", "content": answer}]
    return json.dumps({"images": [name], "messages": messages, "chunk": chunk})


def main(argv=None):
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tabletop", description=about)
    add = parser.add_argument
    add("--out", required=True, help="folder to write")
    add("--episodes", type=int, default=600, help="demonstrations, spread over the 40 tasks")
    add("--conversations", type=int, default=20000, help="rows of conversations.jsonl")
    add("--single", action="store_true", help="each question of a conversation in its own row")
    add("--thought-actions", type=int, default=0,
        help="rows of thought_actions.jsonl: thought + action, a deviation of sft.py")
    add("--horizon", type=int, default=5, help="actions in each of them, as of the FAST tokenizer")
    add("--seed", type=int, default=0, help="training seed; evaluation states have their own")
    add("--noise", type=float, default=0.06, help="chance a step that a disturbance begins")
    add("--size", type=int, default=64, help="image side in pixels")
    add("--tilt", type=float, default=0.0, help="0 looks straight down; 0.5 is oblique")
    add("--workers", type=int, default=2, help="processes; the bytes do not depend on it")
    args = parser.parse_args(argv)
    out, dropped = pathlib.Path(args.out), []
    if (out / "conversations.jsonl").exists():
        raise SystemExit(f"error: {out} already holds data; name another --out or delete it")
    out.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        jobs = [(i, args.seed, args.noise, args.size, args.tilt) for i in range(args.episodes)]
        if jobs:
            write_episodes(out / "episodes", (dropped.append(count) or made for count, *made in
                                              pool.imap(_episode_job, jobs, 8)))
        for name, job, count in (("conversations", _conversation_job, args.conversations),
                                 ("thought_actions", _thought_action_job, args.thought_actions)):
            if count == 0:
                continue
            jobs = [(str(out), i, args.seed, args.size, args.tilt, args.single, args.horizon)
                    for i in range(count)]
            with open(out / f"{name}.jsonl", "w") as f:
                rows = tqdm(pool.imap(job, jobs, 64), name, count, disable=None)
                f.writelines(row + "\n" for row in rows)
    print(f"{out}: {sum(dropped)} failed demonstrations dropped, {args.conversations} rows")


if __name__ == "__main__":
    main()
