"""Tabletop, the embedded world: a small LIBERO-shaped benchmark in numpy, its expert and its data.

World (metres): a table x (right), y (towards the front) in [-0.2, 0.2], z up; cubes and balls of
4 cm, a plate, a button, a drawer at the back edge, a gripper. Kinematic: no forces, but contacts
move things, nothing overlaps at reset, and each task can be failed. The default camera looks
straight down: an 8x8-pixel patch of a 64x64 image is one of the cells a1 (back left) ... h8 (front
right) in which questions and thoughts name places. A cast shadow shows height.

Four suites of ten tasks in LIBERO's sense (arXiv 2306.03310): `spatial` (which of two equal cubes:
the relation decides), `object` (which object), `goal` (one scene, the instruction decides the
verb), `long` (two goals in sequence); and CALVIN's protocol (arXiv 2112.03227): chains of five.
"""

import copy
import dataclasses
import math
import pathlib

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm


EDGE = 0.2  # half the table's side, m
STEP = 0.025  # translation of a full action, m a step
TURN = 0.1  # rotation of a full action, rad a step
SIZE = 0.04  # cubes and balls, m
HOVER = 0.11  # height at which the expert travels, m
PLATE, BUTTON = 0.045, 0.028  # radii, m
OPEN, CLOSED, TRAVEL = 0.07, 0.01, 0.085  # drawer: open beyond, closed below, longest pull, m

COLORS = {
    "red": (225, 40, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 230),
    "yellow": (245, 215, 40),
    "purple": (160, 60, 200),
}
OBJECTS = [f"{color} {shape}" for shape in ("cube", "ball") for color in COLORS]
SIDES = {"left of": (-1, 0), "right of": (1, 0), "behind": (0, -1), "in front of": (0, 1)}
SUITES = ["spatial", "object", "goal", "long"]

# A goal is (verb, object, destination). A task of LONG is two goals in order.
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
    "put the red cube on the plate, then press the button",
    "put the blue cube on the plate, then press the button",
    "put the green ball on the plate, then open the drawer",
    "open the drawer, then press the button",
    "close the drawer, then put the red cube on the plate",
    "press the button, then stack the red cube on the blue cube",
    "stack the red cube on the blue cube, then open the drawer",
    "open the drawer, then lift the red cube",
    "close the drawer, then stack the green ball on the blue cube",
    "close the drawer, then press the button",
]


def suite_tasks(suite):
    """The ten tasks of one of SUITES: [(instruction, [goal, ...], relation or None)]."""
    if suite == "spatial":
        relations = [(side, ref) for ref in ("plate", "button") for side in SIDES]
        relations += [("nearest to", "plate"), ("farthest from", "plate")]
        return [
            (
                f"pick up the red cube {side} the {ref} and put it on the plate",
                [("on", "red cube", "plate")],
                (side, ref),
            )
            for side, ref in relations
        ]
    if suite == "object":
        return [
            (f"pick up the {name} and put it on the plate", [("on", name, "plate")], None)
            for name in OBJECTS
        ]
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown; choose one of {', '.join(SUITES)}")
    texts = GOALS if suite == "goal" else LONG
    return [(text, [GOALS[part] for part in text.split(", then ")], None) for text in texts]


def paint(image, shapes):
    """Paint discs and rectangles, as _shapes lists them, over a float image (n, n, 3)."""
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


@dataclasses.dataclass(eq=False)
class Thing:
    """A cube or ball: its name, the centre of its bottom, and what it rests `on`."""

    name: str
    x: float
    y: float
    z: float = 0.0
    on: str = "table"

    @property
    def at(self):
        return self.x, self.y


class Tabletop:
    """The environment. Actions (7,) in [-1, 1], all deltas: xyz, roll pitch yaw, gripper (-1 opens,
    +1 closes). obs: {"image": uint8 (size, size, 3), "state": float32 (8,) = gripper xyz (m), roll
    pitch yaw (rad), the two finger positions (m), "instruction": str}. `tilt` > 0 turns the camera
    from straight down to oblique."""

    def __init__(self, suite="goal", size=64, tilt=0.0):
        self.suite, self.size, self.tilt = suite, size, tilt
        self.task_list = suite_tasks(suite)
        self.limit = 130 if suite == "long" else 70  # steps
        self.still = (None, None)  # what the painted background shows, and the background

    def reset(self, task, seed, split="eval"):
        """Start trial `seed` of a task -> obs. The splits "eval" and "train" share no randomness."""
        self.place(task, seed, split)
        return self.observe()

    def place(self, task, seed, split):
        """`reset` without rendering."""
        rng = np.random.default_rng([split != "train", SUITES.index(self.suite), task, seed])
        text, goals, relation = self.task_list[task]
        while not self._lay_out(rng, goals, relation):
            pass
        self.pos = rng.uniform([-0.17, -0.1, 0.07], [0.17, 0.17, 0.13])
        self.rpy, self.aperture, self.held, self.grip = np.zeros(3), 1.0, None, None
        self.instruct(text, goals)

    def instruct(self, text, goals=None):
        """Give a new instruction in the present state (chains do this without reset)."""
        self.instruction, self.goals, self.steps = text, goals or [GOALS[text]], 0
        self.begin = {thing.name: thing.x for thing in self.things}

    def _lay_out(self, rng, goals, relation):
        """One try at a random scene -> whether the task makes sense in it."""
        self.lit, self.drawer_x, self.drawer, back = False, None, 0.0, -0.16
        if self.suite == "spatial":
            names = ["red cube", "red cube"]
        elif self.suite == "object":
            others = [name for name in OBJECTS if name != goals[0][1]]
            names = [goals[0][1], *rng.choice(others, 3, replace=False)]
        else:
            names, back = ["red cube", "blue cube", "green ball"], -0.05
            self.drawer_x, self.drawer = rng.uniform(-0.12, 0.12), rng.uniform(0.03, 0.05)
        spots = []
        for _ in range(100):
            spot = tuple(rng.uniform([-0.165, back], 0.165).tolist())
            if all(math.dist(spot, other) > 0.085 for other in spots):
                spots.append(spot)
            if len(spots) == len(names) + 2:
                break
        else:
            return False
        self.plate, button, *rest = spots
        self.button = None if self.suite == "object" else button
        self.things = [Thing(str(name), *spot) for name, spot in zip(names, rest)]
        if goals[0][0] == "push":  # the way of the gripper and of the blue cube must be free
            red, blue, green = self.things
            path = [(blue.x - d, blue.y) for d in (-0.05, 0.05, 0.1)]
            places = [self.plate, self.button, red.at, green.at]
            clear = all(math.dist(a, b) >= 0.06 for a in path for b in places)
            return clear and -0.05 < blue.x < 0.11
        return relation is None or self._single_out(*relation)

    def _single_out(self, side, ref):
        """Order the red cubes -> whether things[0] alone stands in the relation, by a margin."""
        x, y = self.plate if ref == "plate" else self.button
        (dx, dy), sign = (
            SIDES.get(side, (0, 0)),
            {"nearest to": -1, "farthest from": 1}.get(side, 0),
        )
        scores = [
            (t.x - x) * dx + (t.y - y) * dy + sign * math.dist(t.at, (x, y)) for t in self.things
        ]
        if scores[0] < scores[1]:
            self.things.reverse()
        low, high = sorted(scores)
        return high - low > 0.06 if sign else high > 0.04 and low < -0.04

    def find(self, name):
        """The thing of that name, the first of two; or the name, as the button is no Thing."""
        return next((thing for thing in self.things if thing.name == name), name)

    def handle(self):
        """Place (x, y) of the drawer's handle, None without a drawer."""
        return None if self.drawer_x is None else (self.drawer_x, -EDGE + 0.03 + self.drawer)

    def step(self, action):
        """Apply one action (7,) -> (obs, success, done); done also at the step limit."""
        success = self.advance(action)
        return self.observe(), success, success or self.steps >= self.limit

    def advance(self, action):
        """`step` without rendering -> success. ValueError unless 7 finite numbers are given."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers, got shape {action.shape}: {action}")
        action = np.clip(action, -1, 1)
        old, thing = self.pos, self.held
        new = np.clip(old + STEP * action[:3], [-EDGE, -EDGE, 0.005], [EDGE, EDGE, 0.2])
        if thing == "drawer":  # the rail lets the hand move along y only
            self.drawer = float(np.clip(self.drawer + new[1] - old[1], 0, TRAVEL))
            new = np.array([old[0], self.handle()[1], old[2]])
        elif thing:
            thing.x, thing.y, thing.z = (new + self.grip).tolist()
            if thing.z < 0:  # the table is in the way
                new, thing.z = new - [0, 0, thing.z], 0.0
        self.pos, self.rpy = new, np.clip(self.rpy + TURN * action[3:6], -0.5, 0.5)
        self._fingers(float(action[6]))
        self._push()
        if self.button and self.pos[2] < 0.02 and math.dist(self.pos[:2], self.button) < BUTTON:
            self.lit = True
        self.steps += 1
        return all(self.satisfied(goal) for goal in self.goals)

    def _fingers(self, command):
        """Move the fingers by the command, grasp what they close on, release what they let go."""
        self.aperture = min(max(self.aperture - 0.35 * command, 0.0), 1.0)
        if self.held:
            self.aperture = max(self.aperture, 0.4)  # an object fills the rest
            if self.aperture > 0.6:
                thing, self.held = self.held, None
                if thing != "drawer":
                    self._fall(thing)
        elif self.aperture <= 0.5 and command > 0 and np.abs(self.rpy).max() <= 0.4:
            (x, y, z), handle = self.pos, self.handle()
            if handle and z < 0.04 and math.dist((x, y), handle) < 0.018:
                self.held = "drawer"
            for thing in self.things:
                around = math.dist(thing.at, (x, y)) < 0.016 and -0.005 < z - thing.z < 0.036
                if around and not self._above_it(thing):
                    self.held, thing.on = thing, "gripper"
                    self.grip = np.array([thing.x - x, thing.y - y, thing.z - z])
                    break
            if self.held:
                self.aperture = 0.4

    def _above_it(self, thing):
        """The things that stand on this one."""
        return [
            t
            for t in self.things
            if t.on == thing.name and t.z > thing.z and math.dist(t.at, thing.at) < 0.03
        ]

    def _fall(self, thing):
        """Drop a released thing onto what is below: another thing, the plate, or the table."""
        thing.z, thing.on = 0.0, "table"
        if math.dist(thing.at, self.plate) < PLATE - 0.005:
            thing.on = "plate"
        for other in sorted(self.things, key=lambda t: t.z):
            gap = math.dist(thing.at, other.at)
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
        if thing.on == "plate" and math.dist(thing.at, self.plate) > PLATE:
            thing.on = "table"

    def _push(self):
        """Contacts: low fingers (and a low carried thing) move what stands in their way."""
        x, y, z = self.pos
        carried = self.held if isinstance(self.held, Thing) else None
        low = z - (0.02 if carried else 0)
        for thing in self.things:
            if thing is carried or not thing.z - 0.005 < low < thing.z + SIZE:
                continue
            gap = math.dist(thing.at, (x, y))
            if not carried and self.aperture >= 0.5 and gap < 0.02:
                if gap > 0.012:  # between the open fingers: free to move 12 mm, then dragged along
                    self._shift(thing, x, y, 0.012)
                continue
            radius = SIZE if carried else 0.03 if self.aperture < 0.5 else 0.034
            if gap < radius:
                self._shift(thing, x, y, min(radius, gap + STEP))

    def satisfied(self, goal):
        """Is this goal (verb, object, destination) reached in the present state?"""
        verb, name, dest = goal
        if name in ("button", "drawer"):
            return {"press": self.lit, "open": self.drawer > OPEN, "close": self.drawer < CLOSED}[
                verb
            ]
        thing = self.find(name)
        return {
            "on": thing.on == dest,
            "lift": self.held is thing and thing.z > 0.06,
            "push": self.begin[name] - thing.x > 0.06,
        }[verb]  # to the left

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
            image = np.full((n, n, 3), (206, 192, 170), np.float32)
            self.still = (key, paint(image, fixed))
        return (paint(self.still[1].copy(), moving) + 0.5).astype(np.uint8)

    def _shapes(self):
        """What the camera sees, back to front, in metres, as two lists (fixed, moving) of
        (is disc, x, y, half width, half height, half width of the gap, r, g, b, alpha)."""
        shapes = []

        def add(disc, x, y, z, rx, ry, color, alpha=1.0, gap=0.0):
            shapes.append((disc, x, y - self.tilt * z, rx, ry, gap, *color, alpha))

        add(1, *self.plate, 0, PLATE, PLATE, (250, 250, 250))
        add(1, *self.plate, 0, PLATE - 0.012, PLATE - 0.012, (215, 215, 225))
        if self.button:
            add(0, *self.button, 0, BUTTON, BUTTON, (70, 70, 70))
            add(1, *self.button, 0, 0.017, 0.017, (60, 240, 240) if self.lit else (135, 135, 135))
        if handle := self.handle():
            x, y = handle
            add(0, x, -EDGE + (y + EDGE) / 2, 0, 0.05, (y + EDGE) / 2, (125, 85, 45))
            add(0, x, y, 0.02, 0.025, 0.008, (60, 40, 20))
        fixed = len(shapes)
        for thing in sorted(self.things, key=lambda t: t.z):
            ball, half = thing.name.endswith("ball"), SIZE / 2 * (1 + 1.5 * thing.z)
            shade = 0.4 * thing.z
            if shade > 0:
                add(ball, thing.x + shade, thing.y + shade, 0, half, half, (0, 0, 0), 0.35)
            add(ball, thing.x, thing.y, thing.z, half, half, COLORS[thing.name.split()[0]])
            if ball:
                add(1, thing.x - 0.004, thing.y - 0.004, thing.z, 0.008, 0.008, (255, 255, 255))
        x, y, z = self.pos.tolist()
        zoom, spread = 1 + 2 * z, 0.012 + 0.016 * self.aperture  # nearer to the camera looks larger
        wide, slit, deep = (spread + 0.006) * zoom, (spread - 0.006) * zoom, 0.018 * zoom
        shadow, fingers = (0.4 * z, 0, (0, 0, 0), 0.35), (0.0, z, (15, 15, 15), 1.0)
        for shade, height, *ink in (shadow, fingers):
            add(0, x + shade, y + shade, height, wide, deep, *ink, slit)
            add(0, x + shade, y + shade - deep, height, wide, 0.004 * zoom, *ink)
        return shapes[:fixed], shapes[fixed:]

    def expert(self):
        """The scripted expert -> (action (7,) in [-1, 1], plan): {"phase", "target" (name), "at"
        (x, y of the target), "move" (3,) m to the waypoint, "grip"}. A smooth function of the
        present state: perturbed ones show recoveries, and chunks can be predicted from the scene."""
        todo = (goal for goal in self.goals if not self.satisfied(goal))
        verb, name, dest = next(todo, self.goals[-1])
        (x, y, z), thing = self.pos, self.find(name)
        wanted = None if verb in ("press", "push") else thing
        if self.held not in (None, wanted):  # something else is in the hand: put it down here
            way, near = self._approach((x, y), z if self.held == "drawer" else 0.02)
            return self._act("drop", "gripper", (x, y), way, -near)
        if verb == "press":
            return self._act("press", name, self.button, self._approach(self.button, 0.0)[0], 1.0)
        at, low = (self.handle(), 0.02) if thing == "drawer" else (thing.at, thing.z + 0.02)
        if verb == "push":
            if 0.02 < x - thing.x < 0.07 and abs(y - thing.y) < 0.012 and z < 0.035:
                return self._act("push", name, at, (thing.x - 0.02, thing.y, 0.02), 1.0)
            way, _ = self._approach((thing.x + 0.05, thing.y), 0.02)
            return self._act("reach", name, at, way, 1.0)
        if self.held is None:
            way, near = self._approach(at, low)
            return self._act("grasp" if near > 0 else "reach", name, at, way, near)
        if thing == "drawer":
            phase, pull = ("pull", 0.12) if verb == "open" else ("shut", -0.12)
            return self._act(phase, name, at, (x, y + pull, z), 1.0)
        if verb == "lift":
            return self._act("lift", name, (x, y), (x, y, 0.14), 1.0)
        base = self.find(dest)
        at, low = (self.plate, 0.0) if dest == "plate" else (base.at, base.z + SIZE)
        dx, dy, dz = self.grip
        way, near = self._approach((at[0] - dx, at[1] - dy), low + 0.004 - dz)
        return self._act("place" if near > 0 else "carry", dest, at, way, -near)

    def _approach(self, at, low):
        """-> waypoint over `at`: travel height far away, down to `low` within the last 6 cm; and
        nearness to its end, from -1 away to +1 there, smooth (m): it commands the fingers."""
        gap = math.dist(self.pos[:2], at)
        far = min(max((gap - 0.015) / 0.05, 0.0), 1.0)
        height = low + (max(HOVER, low + 0.05) - low) * far * far * (3 - 2 * far)
        near = math.tanh(3 * (1 - math.hypot(gap, self.pos[2] - low) / 0.011))
        return (*at, height), near

    def _act(self, phase, target, at, way, grip):
        """Action and plan for a waypoint `way` (3,), as `expert` returns them."""
        (x, y, z), move = self.pos, way - self.pos
        u = 0.6 * move / STEP
        # the fingers still enclose something that is not wanted: rise before moving sideways
        for thing in self.things:
            inside = math.dist(thing.at, (x, y)) < 0.045 and z < thing.z + SIZE
            if inside and thing is not self.held and (thing.name != target or phase == "carry"):
                free = min(max((z - thing.z - 0.015) / 0.03, 0.0), 1.0)
                u = np.array([u[0] * free, u[1] * free, max(u[2], 1.0 - free)])
        speed = float(np.linalg.norm(u))
        u = u * (math.tanh(speed) / speed if speed > 1e-9 else 1.0)
        action = np.concatenate([u, np.clip(-self.rpy / TURN, -1, 1), [grip]])
        return action, {"phase": phase, "target": target, "at": at, "move": move, "grip": grip}

    def follow(self, text):
        """Let the expert carry out an instruction of the goal suite from here -> success."""
        self.instruct(text)
        todo = not self.satisfied(GOALS[text])  # else it is no task
        return todo and any(self.advance(self.expert()[0]) for _ in range(self.limit))

    def clone(self):
        """An independent copy of the present state."""
        twin = copy.copy(self)
        twin.things = [copy.copy(thing) for thing in self.things]
        twin.held = dict(zip(self.things, twin.things)).get(self.held, self.held)
        return twin


# ---- evaluation trials of evaluate.py; chains are CALVIN's protocol on this world


def chain(number):
    """Chain `number`: (trial of the goal suite's task 0, [five instructions]). As CALVIN's, chains
    are feasible: the expert finishes all five from the initial state chosen."""
    rng = np.random.default_rng([2, number])
    while True:
        picks = rng.choice(list(GOALS), 5, replace=False).tolist()
        trial = int(rng.integers(1 << 40))
        plates, stacks = (sum(word in p for p in picks) for word in ("plate", "stack"))
        env = Tabletop("goal")
        env.place(0, trial, "eval")
        if plates < 2 and stacks < 2 and all(env.follow(text) for text in picks):
            return trial, picks


class Trial:
    """One episode of a suite, or chain number `seed`, in its own environment."""

    def __init__(self, suite, task, seed):
        self.suite, self.task, self.seed = suite, task, seed
        self.done, self.solved, self.frames, self.film = False, 0, [], False
        self.env = Tabletop("goal" if suite == "chain" else suite)
        seed, self.todo = chain(seed) if suite == "chain" else (seed, [])
        self.env.place(task, seed, "eval")
        if self.todo:
            self.env.instruct(self.todo.pop(0))

    def act(self, actions):
        """Carry out a chunk's actions (K, 7), or as many as the instruction lasts. A chain's next
        one is given in the state that this one leaves."""
        for action in actions:
            success = self.env.advance(action)
            self.shoot()
            self.solved += success
            if success and self.todo:
                return self.env.instruct(self.todo.pop(0))
            self.done = success or self.env.steps >= self.env.limit
            if self.done:
                return None

    def shoot(self):
        if self.film:
            picture = Image.new("RGB", (256, 280), "white")
            picture.paste(Image.fromarray(self.env.render(256)), (0, 24))
            ImageDraw.Draw(picture).text((4, 6), self.env.instruction[:48], "black")
            self.frames.append(picture.quantize(64))

    def save(self, folder):
        """The frames, if any were shot, as folder/SUITE_TASK_OUTCOME.gif."""
        if self.frames:
            outcome = "success" if self.solved else "failure"
            path = pathlib.Path(folder) / f"{self.suite}_{self.task}_{outcome}.gif"
            path.parent.mkdir(parents=True, exist_ok=True)
            first, *rest = self.frames + self.frames[-1:] * 6
            first.save(path, save_all=True, append_images=rest, duration=120, loop=0)


def make_trials(suites, trials, chains):
    """The fixed evaluation trials of each suite (10 tasks x trials), and the chains."""
    made = [
        Trial(suite, task, seed)
        for suite in suites
        if suite != "chain"
        for task in range(10)
        for seed in range(trials)
    ]
    return made + [Trial("chain", 0, n) for n in range(chains if "chain" in suites else 0)]


def drive(policy, trials, batch, execute=0, ensemble=0.0):
    """Run all trials to their ends: a round is one batched forward and `execute` steps of each."""
    bar = tqdm(total=len(trials), desc="trials", disable=None)
    from vla import ChunkExecutor  # not above: to make data takes no torch

    plans = {trial: ChunkExecutor(policy.horizon, execute, ensemble) for trial in trials}
    while active := [trial for trial in trials if not trial.done]:
        for start in range(0, len(active), batch):
            part = active[start : start + batch]
            seen = [trial.env.observe() for trial in part]
            images, states, texts = ([o[k] for o in seen] for k in seen[0])
            chunks = policy.act_batch(images, texts, np.stack(states))  # (B, K, A)
            for trial, text, chunk in zip(part, texts, chunks):
                trial.act(plans[trial](chunk, text))
        bar.update(sum(trial.done for trial in active))
    bar.close()
