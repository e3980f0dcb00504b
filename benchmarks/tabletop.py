"""Tabletop, the embedded world: a small LIBERO-shaped benchmark in numpy, with its expert.

World (metres): a table x (right), y (towards the front) in [-0.2, 0.2], z up; cubes and balls of
4 cm, a plate, a button, a drawer at the back edge, a gripper. Kinematic: no forces, but contacts
move things, nothing overlaps at reset, and each task can be failed. The default camera looks
straight down: an 8x8-pixel patch of a 64x64 image is one of the cells a1 (back left) ... h8 (front
right) in which questions and thoughts name places. A cast shadow shows height.

Four suites of ten tasks in LIBERO's sense (arXiv 2306.03310): `spatial` (which of two equal cubes:
the relation decides), `object` (which object), `goal` (one scene, the instruction decides the
verb), `long` (two goals, one after the other; at the end both must hold); and CALVIN's protocol
(arXiv 2112.03227): chains of five.

    env = Tabletop("goal")
    obs = env.reset(task=0, seed=0)
    obs, success, done = env.step(env.expert()[0])

In the order of the file: tasks, pictures, the environment with its expert, evaluation. Who only
evaluates reads the last; questions and demonstrations made from this world: tabletop_data.py.
"""

import copy
import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.simulate import (
    FILM_SIDE,
    FILMED_TASKS,
    Film,
    Outcome,
    TrialResult,
    check_once,
    check_policy,
    film_argument,
    film_name,
    image_sizes,
)
from fast_tokenizer import count, natural

SIDE = 64  # of images, pixels
STATE_DIM = 8
ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")  # each -1 .. 1
EDGE = 0.2  # half the table's side, m
STEP = 0.025  # translation of a full action, m a step
TURN = 0.1  # rotation of a full action, rad a step
SIZE = 0.04  # cubes and balls, m
HOVER = 0.11  # height at which the expert travels, m
PLATE = 0.045  # radius, m
BUTTON = 0.028  # radius, m
OPEN = 0.07  # the drawer is open when pulled further than this, m
CLOSED = 0.01  # and closed when pulled less far than this, m
FILM_FPS = 1000 / 120  # steps that its films show a second
TRAVEL = 0.085  # longest pull of the drawer, m
HANDLE = 0.02  # height of its handle, m

COLORS = {
    "red": (225, 40, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 230),
    "yellow": (245, 215, 40),
    "purple": (160, 60, 200),
}
OBJECTS = [f"{color} {shape}" for shape in ("cube", "ball") for color in COLORS]

# ---- Tasks ---------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """What must hold in the end."""

    verb: str  # on, press, open, close, push (to the left), lift
    object: str  # name of a thing, "button" or "drawer"
    destination: str | None = None  # of "on": "plate" or the name of a thing


class Relation(NamedTuple):
    """By what an instruction tells one of two equal cubes from the other."""

    side: str  # one of SIDES, "nearest to", "farthest from"
    reference: str  # "plate" or "button"


class Task(NamedTuple):
    instruction: str
    goals: list[Goal]  # in the expert's order
    relation: Relation | None = None


SUITES = ["spatial", "object", "goal", "long"]
SIDES = {"left of": (-1, 0), "right of": (1, 0), "behind": (0, -1), "in front of": (0, 1)}
GOALS = {  # the goal suite
    "put the red cube on the plate": Goal("on", "red cube", "plate"),
    "put the blue cube on the plate": Goal("on", "blue cube", "plate"),
    "put the green ball on the plate": Goal("on", "green ball", "plate"),
    "stack the red cube on the blue cube": Goal("on", "red cube", "blue cube"),
    "stack the green ball on the blue cube": Goal("on", "green ball", "blue cube"),
    "press the button": Goal("press", "button"),
    "open the drawer": Goal("open", "drawer"),
    "close the drawer": Goal("close", "drawer"),
    "push the blue cube to the left": Goal("push", "blue cube"),
    "lift the red cube": Goal("lift", "red cube"),
}
LONG = [  # two of GOALS each
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


def suite_tasks(suite: str) -> list[Task]:
    """The ten tasks of one of SUITES. ValueError for another name."""
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown; choose one of {', '.join(SUITES)}")
    if suite == "spatial":
        return spatial_tasks()
    if suite == "object":
        return object_tasks()
    if suite == "goal":
        return [Task(text, [goal]) for text, goal in GOALS.items()]
    return [Task(text, [GOALS[part] for part in text.split(", then ")]) for text in LONG]


def spatial_tasks() -> list[Task]:
    relations = [Relation(side, reference) for reference in ("plate", "button") for side in SIDES]
    relations += [Relation("nearest to", "plate"), Relation("farthest from", "plate")]
    tasks = []
    for relation in relations:
        which = f"red cube {relation.side} the {relation.reference}"
        text = f"pick up the {which} and put it on the plate"
        tasks.append(Task(text, [Goal("on", "red cube", "plate")], relation))
    return tasks


def object_tasks() -> list[Task]:
    tasks = []
    for name in OBJECTS:
        text = f"pick up the {name} and put it on the plate"
        tasks.append(Task(text, [Goal("on", name, "plate")]))
    return tasks


# ---- Pictures ------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A disc or rectangle as the camera sees it: metres on the table, colours 0 .. 255."""

    is_disc: bool
    x: float
    y: float
    half_width: float
    half_height: float
    half_gap: float  # a rectangle may have a slit along its middle, as between two fingers
    red: float
    green: float
    blue: float
    alpha: float


def paint(image: np.ndarray, shapes: list[Shape]) -> np.ndarray:
    """Paint shapes, the first one lowest, over a float image (n, n, 3) -> the same image.

    Anti-aliased, so that places show below a pixel: a shape's share of each pixel is its weight.
    1. metres to pixels   2. shares, for all shapes at once   3. blend, one shape after another"""
    # 1. metres to pixels, N shapes
    n = len(image)
    scale = n / (2 * EDGE)  # pixels a metre
    columns = np.array(shapes, np.float32).T  # (10, N)
    is_disc, x, y, half_width, half_height, half_gap = columns[:6]  # (N,) each
    color = columns[6:9].T  # (N, 3)
    alpha = columns[9]  # (N,)
    u = (x + EDGE) * scale
    v = (y + EDGE) * scale
    radius_u = half_width * scale
    radius_v = half_height * scale
    gap = half_gap * scale

    # 2. shares of a rectangle, by column and by row; squared distances to the middle of a disc
    grid = np.arange(n, dtype=np.float32)

    def covered(centre, half):
        """Share of each pixel of a line that lies within centre +- half, (N, n)."""
        low = (centre - half)[:, None]
        high = (centre + half)[:, None]
        return (np.minimum(grid + 1, high) - np.maximum(grid, low)).clip(0, 1)

    column_share = covered(u, radius_u) - covered(u, gap)  # (N, n)
    row_share = covered(v, radius_v) * alpha[:, None]  # (N, n)
    column_distance = (grid + 0.5 - u[:, None]) ** 2  # (N, n)
    row_distance = (grid + 0.5 - v[:, None]) ** 2  # (N, n)

    # 3. blend, inside the box around each shape
    edges = [u - radius_u, u + radius_u + 2, v - radius_v, v + radius_v + 2]
    boxes = np.stack(edges, 1).clip(0, n).astype(int).tolist()  # N x 4
    for i, (left, right, top, bottom) in enumerate(boxes):
        if is_disc[i]:
            squared = row_distance[i, top:bottom, None] + column_distance[i, left:right]
            share = (radius_u[i] + 0.5 - np.sqrt(squared)).clip(0, 1) * alpha[i]
        else:
            share = row_share[i, top:bottom, None] * column_share[i, left:right]
        view = image[top:bottom, left:right]  # (h, w, 3), share (h, w)
        view += share[..., None] * (color[i] - view)
    return image


# ---- Environment ---------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Thing:
    """A cube or ball: its name, the centre of its bottom (m), and what it rests `on`."""

    name: str
    x: float
    y: float
    z: float = 0.0
    on: str = "table"  # or "plate", the name of another thing, "gripper"

    @property
    def xy(self) -> tuple[float, float]:
        return self.x, self.y


@dataclasses.dataclass
class Plan:
    """What the expert is about to do, in terms that questions and thoughts put into words."""

    phase: str  # reach, grasp, carry, place, lift, pull, shut, press, push, drop
    target: str  # name of what the hand moves to; "gripper": the place where it is
    target_xy: tuple[float, float]  # m
    move: np.ndarray  # (3,) m from the gripper to its next waypoint
    fingers: float  # -1 opens, +1 closes


def random_spots(rng, count: int, back: float) -> list[tuple[float, float]] | None:
    """Places (x, y) at least 8.5 cm apart, none behind y = back; None when chance finds too few."""
    spots = []
    for _ in range(100):
        spot = tuple(rng.uniform([-0.165, back], 0.165).tolist())
        if all(math.dist(spot, other) > 0.085 for other in spots):
            spots.append(spot)
        if len(spots) == count:
            return spots
    return None


def relation_score(side: str, thing: Thing, reference: tuple[float, float]) -> float:
    """How far a thing is on that side of the reference, or how near (negative) or far it is, m."""
    if side == "nearest to":
        return -math.dist(thing.xy, reference)
    if side == "farthest from":
        return math.dist(thing.xy, reference)
    x, y = reference
    right, front = SIDES[side]
    return (thing.x - x) * right + (thing.y - y) * front


class Tabletop:
    """The environment: `tasks`, reset(task, seed) -> obs, step(action) -> (obs, success, done).

    Actions (7,) in [-1, 1]: movements in xyz and roll pitch yaw, and the gripper (-1 opens, +1
    closes).
    obs: {"image": uint8 (size, size, 3), "state": float32 (8,) = gripper xyz (m), roll pitch yaw
    (rad), the two finger positions (m), "instruction": str}. tilt > 0 turns the camera from
    straight down to oblique. limit: steps of an episode.

    The state: things, plate and button (x, y; None without one), button_lit, drawer_x and
    drawer_pull (m; None and 0 without one), gripper_xyz and gripper_rpy (3,), aperture (0 closed
    .. 1 open), held (a Thing, "drawer" or None), held_offset (3,) from the gripper to the Thing."""

    def __init__(self, suite: str = "goal", size: int = SIDE, tilt: float = 0.0):
        self.suite = suite
        self.size = size
        self.tilt = tilt
        self.tasks = suite_tasks(suite)
        self.limit = 130 if suite == "long" else 70
        self.background_key = None  # what the background shows that was painted last
        self.background = None

    # ---- reset and step --------------------------------------------------------------------------

    def reset(self, task: int, seed: int, split: str = "eval") -> dict:
        """Start trial `seed` of a task -> obs. Splits "eval" and "train" share no randomness."""
        self.place(task, seed, split)
        return self.observe()

    def place(self, task: int, seed: int, split: str):
        """`reset` without rendering."""
        if split not in ("train", "eval"):
            raise ValueError(f"split {split!r}; give train or eval")
        is_eval = int(split == "eval")
        rng = np.random.default_rng([is_eval, SUITES.index(self.suite), task, seed])
        text, goals, relation = self.tasks[task]
        while not self._lay_out(rng, goals, relation):
            pass
        self.gripper_xyz = rng.uniform([-0.17, -0.1, 0.07], [0.17, 0.17, 0.13])
        self.gripper_rpy = np.zeros(3)
        self.aperture = 1.0
        self.held = None
        self.held_offset = None
        self.instruct(text, goals)

    def instruct(self, text: str, goals: list[Goal] | None = None):
        """Give a new instruction in the present state (chains do this without reset)."""
        self.instruction = text
        self.goals = goals or [GOALS[text]]
        self.steps = 0
        self.start_x = {thing.name: thing.x for thing in self.things}

    def step(self, action) -> tuple[dict, bool, bool]:
        """Apply one action (7,) -> (obs, success, done); done also at the step limit."""
        success = self.advance(action)
        done = success or self.steps >= self.limit
        return self.observe(), success, done

    def advance(self, action) -> bool:
        """`step` without rendering -> success. ValueError unless 7 finite numbers are given.

        1. the hand and what it holds   2. fingers   3. contacts   4. the button"""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers, got shape {action.shape}: {action}")
        action = np.clip(action, -1, 1)

        # 1. the hand and what it holds
        old = self.gripper_xyz
        new = np.clip(old + STEP * action[:3], [-EDGE, -EDGE, 0.005], [EDGE, EDGE, 0.2])
        if self.held == "drawer":  # the rail lets the hand move along y only
            self.drawer_pull = float(np.clip(self.drawer_pull + new[1] - old[1], 0, TRAVEL))
            new = np.array([old[0], self.handle()[1], old[2]])
        elif self.held is not None:
            thing = self.held
            thing.x, thing.y, thing.z = (new + self.held_offset).tolist()
            if thing.z < 0:  # the table is in the way
                new = new - [0, 0, thing.z]
                thing.z = 0.0
        self.gripper_xyz = new
        self.gripper_rpy = np.clip(self.gripper_rpy + TURN * action[3:6], -0.5, 0.5)

        # 2. fingers
        self._move_fingers(float(action[6]))

        # 3. contacts
        self.push_things()

        # 4. the button
        if self.button and self.gripper_xyz[2] < 0.02:
            if math.dist(self.gripper_xyz[:2], self.button) < BUTTON:
                self.button_lit = True

        self.steps += 1
        return all(self.satisfied(goal) for goal in self.goals)

    def satisfied(self, goal: Goal) -> bool:
        """Is this goal reached in the present state?"""
        match goal.verb:
            case "press":
                return self.button_lit
            case "open":
                return self.drawer_pull > OPEN
            case "close":
                return self.drawer_pull < CLOSED
        thing = self.find(goal.object)
        match goal.verb:
            case "on":
                return thing.on == goal.destination
            case "lift":
                return self.held is thing and thing.z > 0.06
            case "push":
                return self.start_x[goal.object] - thing.x > 0.06  # to the left

    def find(self, name: str) -> Thing:
        """The thing of that name, the first of two."""
        return next(thing for thing in self.things if thing.name == name)

    def handle(self) -> tuple[float, float] | None:
        """Place (x, y) of the drawer's handle, None without a drawer."""
        if self.drawer_x is None:
            return None
        return self.drawer_x, -EDGE + 0.03 + self.drawer_pull

    def clone(self) -> "Tabletop":
        """An independent copy of the present state."""
        twin = copy.copy(self)
        twin.things = [copy.copy(thing) for thing in self.things]
        if isinstance(self.held, Thing):
            twin.held = twin.things[self.things.index(self.held)]
        return twin

    # ---- a random scene --------------------------------------------------------------------------

    def _lay_out(self, rng, goals: list[Goal], relation: Relation | None) -> bool:
        """One try at a random scene -> whether the task makes sense in it.

        1. what stands on the table   2. where   3. whether the task can be done and failed"""
        # 1. what stands on the table
        self.button_lit = False
        self.drawer_x = None
        self.drawer_pull = 0.0
        back = -0.16  # nothing behind it
        if self.suite == "spatial":
            names = ["red cube", "red cube"]
        elif self.suite == "object":
            wanted = goals[0].object
            others = [name for name in OBJECTS if name != wanted]
            names = [wanted, *rng.choice(others, 3, replace=False)]
        else:
            names = ["red cube", "blue cube", "green ball"]
            back = -0.05  # the drawer needs room
            self.drawer_x = rng.uniform(-0.12, 0.12)
            self.drawer_pull = rng.uniform(0.03, 0.05)

        # 2. where
        spots = random_spots(rng, len(names) + 2, back)
        if spots is None:
            return False
        self.plate, button, *rest = spots
        self.button = None if self.suite == "object" else button
        self.things = [Thing(str(name), *spot) for name, spot in zip(names, rest, strict=True)]

        # 3. whether the task can be done and failed
        if goals[0].verb == "push":
            return self._can_push()
        if relation is not None:
            return self._single_out(relation)
        return True

    def _can_push(self) -> bool:
        """The way of the gripper and of the blue cube must be free."""
        red, blue, green = self.things
        path = [(blue.x - distance, blue.y) for distance in (-0.05, 0.05, 0.1)]
        obstacles = [self.plate, self.button, red.xy, green.xy]
        for spot in path:
            if any(math.dist(spot, obstacle) < 0.06 for obstacle in obstacles):
                return False
        return -0.05 < blue.x < 0.11

    def _single_out(self, relation: Relation) -> bool:
        """Order the red cubes -> whether things[0] alone stands in the relation, by a margin."""
        reference = self.plate if relation.reference == "plate" else self.button
        scores = [relation_score(relation.side, thing, reference) for thing in self.things]
        if scores[0] < scores[1]:
            self.things.reverse()
        low, high = sorted(scores)
        if relation.side in SIDES:
            return high > 0.04 and low < -0.04
        return high - low > 0.06

    # ---- contacts --------------------------------------------------------------------------------

    def _move_fingers(self, command: float):
        """Open (-1) or close (+1) the fingers: they grasp what they close on and let go of it."""
        self.aperture = min(max(self.aperture - 0.35 * command, 0.0), 1.0)
        if self.held is not None:
            self.aperture = max(self.aperture, 0.4)  # an object fills the rest
            if self.aperture > 0.6:
                released = self.held
                self.held = None
                if released != "drawer":
                    self._fall(released)
        elif self.aperture <= 0.5 and command > 0 and np.abs(self.gripper_rpy).max() <= 0.4:
            self._grasp()
            if self.held is not None:
                self.aperture = 0.4

    def _grasp(self):
        """Hold the handle or a thing, where one is between the fingers."""
        x, y, z = self.gripper_xyz
        handle = self.handle()
        if handle is not None and z < 0.04 and math.dist((x, y), handle) < 0.018:
            self.held = "drawer"
        for thing in self.things:
            enclosed = math.dist(thing.xy, (x, y)) < 0.016 and -0.005 < z - thing.z < 0.036
            if enclosed and not self._above(thing):
                self.held = thing
                thing.on = "gripper"
                self.held_offset = np.array([thing.x - x, thing.y - y, thing.z - z])
                break

    def _above(self, thing: Thing) -> list[Thing]:
        """The things that stand on this one."""
        above = []
        for other in self.things:
            if other.on == thing.name and other.z > thing.z:
                if math.dist(other.xy, thing.xy) < 0.03:
                    above.append(other)
        return above

    def _fall(self, thing: Thing):
        """Drop a released thing onto what is below: another thing, the plate, or the table."""
        thing.z = 0.0
        thing.on = "table"
        if math.dist(thing.xy, self.plate) < PLATE - 0.005:
            thing.on = "plate"
        for other in sorted(self.things, key=lambda other: other.z):
            gap = math.dist(thing.xy, other.xy)
            if other is thing or gap > 0.9 * SIZE:
                continue
            if gap < 0.022:
                thing.z = other.z + SIZE
                thing.on = other.name
            else:  # off the edge: it slides down beside
                self._shift(thing, other.x, other.y, SIZE)

    def _shift(self, thing: Thing, x: float, y: float, radius: float):
        """Move a thing away from (x, y) to the given distance, with whatever stands on it."""
        dx = thing.x - x
        dy = thing.y - y
        gap = math.hypot(dx, dy) or 1e-9
        dx = dx / gap * (radius - gap)
        dy = dy / gap * (radius - gap)
        for other in (thing, *self._above(thing)):
            other.x = min(max(other.x + dx, -EDGE + 0.02), EDGE - 0.02)
            other.y = min(max(other.y + dy, -EDGE + 0.02), EDGE - 0.02)
        if thing.on == "plate" and math.dist(thing.xy, self.plate) > PLATE:
            thing.on = "table"

    def push_things(self):
        """Low fingers, and a low carried thing, move what stands in their way.

        Only the place of the hand at the end of a step counts, and a step is up to 2.5 cm long.
        So millimetres decide where a thing goes that is not pushed at its middle. And what open
        fingers drag along they leave behind in a step of over 8 mm: it stays 12 mm off the middle
        of the hand, and 20 mm off it is no longer between them."""
        x, y, z = self.gripper_xyz
        carried = self.held if isinstance(self.held, Thing) else None
        fingers_open = self.aperture >= 0.5
        lowest = z - (0.02 if carried else 0)
        for thing in self.things:
            if thing is carried or not thing.z - 0.005 < lowest < thing.z + SIZE:
                continue
            gap = math.dist(thing.xy, (x, y))
            if not carried and fingers_open and gap < 0.02:
                if gap > 0.012:  # between the open fingers: free to move 12 mm, then dragged along
                    self._shift(thing, x, y, 0.012)
                continue
            if carried:
                radius = SIZE
            else:
                radius = 0.034 if fingers_open else 0.03
            if gap < radius:
                self._shift(thing, x, y, min(radius, gap + STEP))

    # ---- camera ----------------------------------------------------------------------------------

    def observe(self) -> dict:
        """image, state (8,) and instruction, as in the docstring of the class."""
        finger = 0.04 * self.aperture
        state = np.array([*self.gripper_xyz, *self.gripper_rpy, finger, -finger], np.float32)
        return {"image": self.render(), "state": state, "instruction": self.instruction}

    def render(self, size: int | None = None) -> np.ndarray:
        """The camera image, uint8 (size, size, 3), anti-aliased: places show below a pixel."""
        n = size or self.size
        fixed = self._fixed_shapes()
        key = (n, self.tilt, tuple(fixed))
        if self.background_key != key:  # what does not move is painted once
            table = np.full((n, n, 3), (206, 192, 170), np.float32)
            self.background = paint(table, fixed)
            self.background_key = key
        image = paint(self.background.copy(), self._moving_shapes())
        return (image + 0.5).astype(np.uint8)

    def pixel(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Where the camera shows what is at (x, y, z) m: shares of the image's width and height,
        from its top left."""
        return (x + EDGE) / (2 * EDGE), (y - self.tilt * z + EDGE) / (2 * EDGE)

    def _disc(self, x, y, z, radius, color, alpha=1.0) -> Shape:
        """A disc at height z: to a tilted camera, what is higher shows further back."""
        return Shape(True, x, y - self.tilt * z, radius, radius, 0.0, *color, alpha)

    def _box(self, x, y, z, half_width, half_height, color, alpha=1.0, half_gap=0.0) -> Shape:
        """The same for a rectangle."""
        y = y - self.tilt * z
        return Shape(False, x, y, half_width, half_height, half_gap, *color, alpha)

    def _fixed_shapes(self) -> list[Shape]:
        """Plate, button and drawer, the lowest first, as paint() wants them."""
        shapes = [
            self._disc(*self.plate, 0, PLATE, (250, 250, 250)),
            self._disc(*self.plate, 0, PLATE - 0.012, (215, 215, 225)),
        ]
        if self.button:
            light = (60, 240, 240) if self.button_lit else (135, 135, 135)
            shapes.append(self._box(*self.button, 0, BUTTON, BUTTON, (70, 70, 70)))
            shapes.append(self._disc(*self.button, 0, 0.017, light))
        handle = self.handle()
        if handle is not None:
            x, y = handle
            half = (y + EDGE) / 2  # from the back edge to the handle
            shapes.append(self._box(x, -EDGE + half, 0, 0.05, half, (125, 85, 45)))
            shapes.append(self._box(x, y, HANDLE, 0.025, 0.008, (60, 40, 20)))
        return shapes

    def _moving_shapes(self) -> list[Shape]:
        """Things, then the gripper, each with its shadow, the lowest first."""
        shapes = []
        black = (0, 0, 0)
        for thing in sorted(self.things, key=lambda thing: thing.z):
            x, y, z = thing.x, thing.y, thing.z
            color = COLORS[thing.name.split()[0]]
            half = SIZE / 2 * (1 + 1.5 * z)  # nearer to the camera looks larger
            shade = 0.4 * z  # how far the shadow falls
            if thing.name.endswith("ball"):
                if shade > 0:
                    shapes.append(self._disc(x + shade, y + shade, 0, half, black, 0.35))
                shapes.append(self._disc(x, y, z, half, color))
                shapes.append(self._disc(x - 0.004, y - 0.004, z, 0.008, (255, 255, 255)))
            else:
                if shade > 0:
                    shapes.append(self._box(x + shade, y + shade, 0, half, half, black, 0.35))
                shapes.append(self._box(x, y, z, half, half, color))

        x, y, z = self.gripper_xyz.tolist()
        zoom = 1 + 2 * z  # nearer to the camera looks larger
        spread = 0.012 + 0.016 * self.aperture
        wide = (spread + 0.006) * zoom
        slit = (spread - 0.006) * zoom
        deep = 0.018 * zoom
        shadow = (0.4 * z, 0, black, 0.35)
        fingers = (0.0, z, (15, 15, 15), 1.0)
        for shade, height, color, alpha in (shadow, fingers):
            x_shown = x + shade
            y_shown = y + shade
            bar = 0.004 * zoom  # it joins the two fingers
            shapes.append(self._box(x_shown, y_shown, height, wide, deep, color, alpha, slit))
            shapes.append(self._box(x_shown, y_shown - deep, height, wide, bar, color, alpha))
        return shapes

    # ---- expert ----------------------------------------------------------------------------------

    def expert(self) -> tuple[np.ndarray, Plan]:
        """The scripted expert: action (7,) in [-1, 1] and what it is part of.

        A smooth function of the present state: perturbed states show recoveries, and chunks can be
        predicted from the scene. For the first goal that does not hold yet:
        1. put down what the goal does not want in the hand
        2. press the button
        3. push: go to the right side of the thing, then left
        4. reach for what is wanted and grasp it
        5. with it in the hand: pull or shut the drawer, lift the thing, carry and place it"""
        open_goals = [goal for goal in self.goals if not self.satisfied(goal)]
        goal = open_goals[0] if open_goals else self.goals[-1]
        name = goal.object
        x, y, z = self.gripper_xyz
        if goal.verb in ("press", "push"):
            wanted = None  # nothing in the hand
        else:
            wanted = "drawer" if name == "drawer" else self.find(name)

        # 1. put down, here, what the goal does not want in the hand
        if self.held not in (None, wanted):
            low = z if self.held == "drawer" else 0.02
            waypoint, near = self._approach((x, y), low)
            fingers = -near  # they open where it arrives
            return self._act("drop", "gripper", (x, y), waypoint, fingers)

        # 2. press the button
        if goal.verb == "press":
            waypoint, _ = self._approach(self.button, 0.0)
            return self._act("press", name, self.button, waypoint, 1.0)

        # 3. push
        if goal.verb == "push":
            thing = self.find(name)
            behind = 0.02 < x - thing.x < 0.07 and abs(y - thing.y) < 0.012 and z < 0.035
            if behind:
                waypoint = (thing.x - 0.02, thing.y, 0.02)
                return self._act("push", name, thing.xy, waypoint, 1.0)
            waypoint, _ = self._approach((thing.x + 0.05, thing.y), 0.02)
            return self._act("reach", name, thing.xy, waypoint, 1.0)

        # 4. reach and grasp
        if wanted == "drawer":
            target_xy = self.handle()
            low = 0.02
        else:
            target_xy = wanted.xy
            low = wanted.z + 0.02
        if self.held is None:
            waypoint, near = self._approach(target_xy, low)
            phase = "grasp" if near > 0 else "reach"
            fingers = near  # they close where it arrives
            return self._act(phase, name, target_xy, waypoint, fingers)

        # 5. with it in the hand
        if goal.verb == "open":
            return self._act("pull", name, target_xy, (x, y + 0.12, z), 1.0)
        if goal.verb == "close":
            return self._act("shut", name, target_xy, (x, y - 0.12, z), 1.0)
        if goal.verb == "lift":
            return self._act("lift", name, (x, y), (x, y, 0.14), 1.0)
        if goal.destination == "plate":
            target_xy = self.plate
            low = 0.0
        else:
            base = self.find(goal.destination)
            target_xy = base.xy
            low = base.z + SIZE
        dx, dy, dz = self.held_offset
        over = (target_xy[0] - dx, target_xy[1] - dy)
        waypoint, near = self._approach(over, low + 0.004 - dz)
        phase = "place" if near > 0 else "carry"
        fingers = -near  # they open where it arrives
        return self._act(phase, goal.destination, target_xy, waypoint, fingers)

    def _approach(self, xy, low: float) -> tuple[tuple[float, float, float], float]:
        """-> waypoint over xy (m), and nearness to the end of the way, -1 away .. +1 there.

        The waypoint is at travel height as long as the hand is over 6.5 cm away, and comes down to
        `low`, where it is from 1.5 cm on. Both are smooth."""
        gap = math.dist(self.gripper_xyz[:2], xy)
        far = min(max((gap - 0.015) / 0.05, 0.0), 1.0)
        height = low + (max(HOVER, low + 0.05) - low) * far * far * (3 - 2 * far)
        near = math.tanh(3 * (1 - math.hypot(gap, self.gripper_xyz[2] - low) / 0.011))
        return (*xy, height), near

    def _act(self, phase, target, target_xy, waypoint, fingers) -> tuple[np.ndarray, Plan]:
        """Action (7,) and plan for a waypoint (3,), as `expert` returns them."""
        x, y, z = self.gripper_xyz
        move = waypoint - self.gripper_xyz  # (3,) m
        wish = 0.6 * move / STEP  # (3,) share of a full action

        # the fingers still enclose something that is not wanted: rise before moving sideways
        for thing in self.things:
            enclosed = math.dist(thing.xy, (x, y)) < 0.045 and z < thing.z + SIZE
            wanted = thing.name == target and phase != "carry"
            if enclosed and thing is not self.held and not wanted:
                free = min(max((z - thing.z - 0.015) / 0.03, 0.0), 1.0)
                wish = np.array([wish[0] * free, wish[1] * free, max(wish[2], 1.0 - free)])

        # one speed limit for all directions
        speed = float(np.linalg.norm(wish))
        wish = wish * (math.tanh(speed) / speed if speed > 1e-9 else 1.0)
        turn = np.clip(-self.gripper_rpy / TURN, -1, 1)
        action = np.concatenate([wish, turn, [fingers]])
        return action, Plan(phase, target, target_xy, move, fingers)

    def follow(self, text: str) -> bool:
        """Let the expert carry out an instruction of the goal suite from here -> success."""
        self.instruct(text)
        if self.satisfied(GOALS[text]):
            return False  # it is no task
        for _ in range(self.limit):
            if self.advance(self.expert()[0]):
                return True
        return False


# ---- Evaluation ----------------------------------------------------------------------------------

EVALUATED = [*SUITES, "chain"]  # choices of --suites
CHAIN_LENGTH = 5


def chain(number: int) -> tuple[int, list[str]]:
    """Chain `number`: the trial of the goal suite's task 0 in which it begins, five instructions.

    As CALVIN's, chains are feasible: the expert finishes all five from the state chosen."""
    rng = np.random.default_rng([2, number])
    while True:
        instructions = rng.choice(list(GOALS), CHAIN_LENGTH, replace=False).tolist()
        trial = int(rng.integers(1 << 40))
        env = Tabletop("goal")
        env.place(0, trial, "eval")
        plates = sum("plate" in text for text in instructions)
        stacks = sum("stack" in text for text in instructions)
        if plates < 2 and stacks < 2 and all(env.follow(text) for text in instructions):
            return trial, instructions


class Trial:
    """One episode of a suite, or chain number `seed`, in its own environment.

    done: it is over. solved: 1 or 0; of a chain, how many in a row. film: of its steps, or None."""

    def __init__(self, suite: str, task: int, seed: int, size: int = SIDE):
        self.suite = suite
        self.task = task
        self.seed = seed
        self.forwards = 0  # how often the policy was asked
        self.done = False
        self.solved = 0
        self.film: Film | None = None
        self.thought = None  # what the policy last thought, if it thinks
        if suite == "chain":
            self.env = Tabletop("goal", size)
            start, instructions = chain(seed)
        else:
            self.env = Tabletop(suite, size)
            start = seed
            instructions = []  # the task's own
        self.to_do = instructions  # still to be given
        self.env.place(task, start, "eval")
        if self.to_do:
            self.env.instruct(self.to_do.pop(0))

    def noise_key(self) -> list[int]:
        """What the next chunk's noise is drawn by: the same whatever other trials there are."""
        return [EVALUATED.index(self.suite), self.task, self.seed, self.forwards]

    def act(self, actions: np.ndarray, thought: str | None = None):
        """Carry out a chunk's actions (K, 7), or as many as the instruction lasts. A chain's next
        one is given in the state that this one leaves; where that is done already, any action
        solves it (chain() has none of these on the expert's way). thought: before them, of a policy
        that thinks."""
        self.thought = thought
        if self.forwards == 0:
            self.shoot()
        self.forwards += 1
        for action in actions:
            success = self.env.advance(action)
            self.shoot()
            self.solved += success
            if success and self.to_do:
                self.env.instruct(self.to_do.pop(0))
                return
            self.done = success or self.env.steps >= self.env.limit
            if self.done:
                return

    def shoot(self):
        """Keep a frame if the trial is filmed."""
        if self.film:
            self.film.shoot(self.env.render(FILM_SIDE), self.env.instruction, self.thought)


def make_trials(
    suites: list[str], trials: int, chains: int, local: slice = slice(None), size: int = SIDE
) -> list[Trial]:
    """The fixed evaluation trials of each suite (10 tasks x trials), then the chains: of each of
    the two the share `local`. size: image side, pixels."""
    single = []
    for suite in suites:
        if suite != "chain":
            single += itertools.product([suite], range(10), range(trials))
    chained = []
    if "chain" in suites:
        chained = [("chain", 0, number) for number in range(chains)]
    return [Trial(*trial, size) for trial in single[local] + chained[local]]


THOUGHTS = ("own", "removed", "swapped", "true")  # choices of --thought


def given_thought(trial: Trial, kind: str) -> str:
    """What a policy is told in place of its own thought: nothing ("removed"), the expert's thought
    here ("true") or in a random other scene, the same one in each run ("swapped")."""
    from benchmarks import tabletop_data  # it imports this module

    if kind == "removed":
        return ""
    env = trial.env
    if kind == "swapped":
        env = tabletop_data.random_state(np.random.default_rng([6, *trial.noise_key()]))
    return tabletop_data.thought(env, env.expert()[1])


def drive(
    policy,
    trials: list[Trial],
    batch: int,
    execute: int = 0,
    ensemble: float = 0.0,
    thought: str = "own",
):
    """Run all trials to their ends: a round is one batched forward and `execute` steps of each.
    thought: one of THOUGHTS, what the policy thinks."""
    from vla import ChunkExecutor  # not above: to make data takes no torch

    progress = tqdm(total=len(trials), desc="trials", disable=None)
    executors = {}
    for trial in trials:
        executors[trial] = ChunkExecutor(policy.horizon, execute, ensemble, policy.hold)
    active = [trial for trial in trials if not trial.done]
    while active:
        for start in range(0, len(active), batch):
            together = active[start : start + batch]
            seen = [trial.env.observe() for trial in together]
            images = [obs["image"] for obs in seen]
            states = np.stack([obs["state"] for obs in seen])
            texts = [obs["instruction"] for obs in seen]
            keys = [trial.noise_key() for trial in together]
            given = {}
            if thought != "own":
                given["thoughts"] = [given_thought(trial, thought) for trial in together]
            chunks = policy.act_batch(images, texts, states, keys=keys, **given)  # (B, K, A)
            thoughts = policy.thoughts or [None] * len(together)
            for trial, text, chunk, words in zip(together, texts, chunks, thoughts, strict=True):
                trial.act(executors[trial](chunk, text), words)
        progress.update(sum(trial.done for trial in active))
        active = [trial for trial in trials if not trial.done]
    progress.close()


def arguments(add):
    """Flags of `evaluate.py tabletop`."""
    add("--suites", default=",".join(EVALUATED), help="chain is CALVIN's protocol")
    add("--trials", type=count, default=10, help="trials a task (10 tasks a suite)")
    add("--chains", type=count, default=100, help="chains of five instructions")
    add(
        "--size",
        type=natural,
        default=0,
        help=f"image side, pixels; 0: as in training, {SIDE} for an old checkpoint",
    )
    add(
        "--thought",
        default="own",
        choices=THOUGHTS,
        help="in place of the policy's own: none, that of a random other scene, the expert's",
    )
    film_argument(add, "--gif")  # its earlier name


def check(args):
    """ValueError when a flag is wrong, before a policy is loaded."""
    check_once("--suites", args.suites.split(","))
    unknown = set(args.suites.split(",")) - set(EVALUATED)
    if unknown:
        choices = ",".join(EVALUATED)
        raise ValueError(f"--suites {','.join(sorted(unknown))}: choose from {choices}")


def is_among_first(trial: Trial) -> bool:
    """Whether --film films it: the first trial of some tasks a suite, the first chains."""
    if trial.suite == "chain":
        return trial.seed < FILMED_TASKS
    return trial.seed == 0 and trial.task < FILMED_TASKS


def name_of_film(trial: Trial) -> str:
    """goal_1_failure;  chain_0_3_of_5: how many in a row, which is neither success nor failure."""
    if trial.suite == "chain":
        return f"chain_{trial.seed}_{trial.solved}_of_{CHAIN_LENGTH}"
    return film_name(trial.suite, trial.task, trial.solved)


def evaluate(policy, args, local: slice) -> Outcome:
    """`evaluate.py tabletop`: this process's share of trials and chains, and films of the first
    ones in args.film."""
    if args.thought != "own" and not policy.thinks:
        raise ValueError(f"--thought {args.thought}: {args.policy} reads no thought in this mode")
    check_policy(policy, ["image"], STATE_DIM, ACTION_NAMES)
    height, width = image_sizes(policy, args.size, SIDE)["image"]
    if height != width:
        raise ValueError(f"the policy saw images of {height} x {width}; Tabletop's are square")
    trials = make_trials(args.suites.split(","), args.trials, args.chains, local, height)
    for trial in trials:
        if args.film and is_among_first(trial):
            trial.film = Film(FILM_FPS)
    thought = args.thought
    if thought == "own" and policy.spec.get("thoughts") == "recorded":
        thought = "true"  # a head that was trained on recorded ones writes none
    drive(policy, trials, args.batch, args.execute, args.ensemble, thought)
    results = []
    chain_lengths = []
    for trial in trials:
        if trial.film:
            trial.film.save(args.film, name_of_film(trial))
        if trial.suite == "chain":
            chain_lengths.append(trial.solved)
        else:
            results.append(TrialResult(trial.suite, trial.task, trial.solved))
    return Outcome(results, chain_lengths)
