"""Questions and thoughts about any robot, from what its episodes record.

    python -m tools.robot_questions --data data/libero --out data/libero_questions --rows 150000

reads episodes (folder/*.safetensors, whatever they come from) and writes, in the formats of
docs/data.md, conversations.jsonl of the training episodes, held_out.jsonl of those that all stages
hold out, thought_actions.jsonl with --thought-actions, frames/*.png and report.json. Facts come
from state, action, instruction, rate and camera alone. The same seed gives the same bytes.

1. axes: which numbers of the state are the hand's place, which tell of the gripper, and their words
2. motion of an episode: places, gripper, waypoints, the primitive of each step
3. a kind of question and a step are drawn; the facts at that step give question and answer
4. half of the answers follow a thought: some facts in any order and wording, then the conclusion

In the order of the file as above, then rows and the command. Who wants another kind of question
adds a function and a line to KINDS. T: steps of an episode.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.tabletop_data import (
    ACTION_QUESTION,
    Question,
    displacement,
    json_row,
    multiple_choice,
    pick,
    save_frame,
)
from fast_tokenizer import (
    EpisodeFile,
    action_chunks,
    chunk_starts,
    count,
    natural,
    non_negative,
    positive,
    read_episodes,
    split_episodes,
)

# ---- Axes ----------------------------------------------------------------------------------------

AXES = Path(__file__).parent / "axes"
WORLDS = ("tabletop", "libero", "metaworld", "calvin")  # each has a file there


class Gripper(NamedTuple):
    """Which numbers tell whether the gripper is closed."""

    of: str  # "state", or "action": what was commanded in the step before
    dimensions: list[int]
    closed: list[float]  # what these read when it is closed, or holds something
    open: list[float]


class Axes(NamedTuple):
    """What the numbers of a state mean."""

    position: list[int]  # dimensions of the state that are x, y and the height
    metres: float  # in one unit of them
    origin: list[float]  # from where places are counted, m
    origin_name: str
    words: list[list[str]]  # of x, y and the height: where it is less, where it is more
    gripper: Gripper


def read_axes(path: str | Path, state_dim: int, action_dim: int) -> Axes:
    """Axes from a file, for a robot of so many dimensions. ValueError naming what is wrong."""
    fields = read_object(path, Axes._fields)
    try:
        axes = Axes(**fields)._replace(gripper=Gripper(**fields["gripper"]))
        fault = axes_fault(axes)
    except (TypeError, ValueError) as e:
        fault = str(e)
    if fault:
        raise ValueError(f"{path}: {fault}; write it as {AXES / 'libero.json'}")
    gripper = axes.gripper
    dims = {"state": state_dim, "action": action_dim}
    for name, of, dimensions in (
        ("position", "state", axes.position),
        ("gripper", gripper.of, gripper.dimensions),
    ):
        for dimension in dimensions:
            if not isinstance(dimension, int) or not 0 <= dimension < dims[of]:
                raise ValueError(
                    f"{path}: {name} names dimension {dimension} of the {of}, which has 0 .. "
                    f"{dims[of] - 1}; correct the file, or give another one with --axes"
                )
    return axes


def axes_fault(axes: Axes) -> str:
    """What makes the values of a file no axes; "" when they are. TypeError, ValueError."""
    gripper = axes.gripper
    words = [word for pair in axes.words for word in pair]
    if not 0 < axes.metres < np.inf:
        return f'"metres" {axes.metres} is not above 0'
    if len(axes.position) != 3 or len(axes.origin) != 3 or not np.isfinite(axes.origin).all():
        return '"position" and "origin" are not 3 numbers each'
    if not isinstance(axes.origin_name, str) or not all(isinstance(word, str) for word in words):
        return '"origin_name" or one of "words" is no text'
    if len(axes.words) != 3 or len(set(words)) != 6 or words[4:] != ["down", "up"]:
        return f'"words" {axes.words} are not 3 pairs of different words, the last of down and up'
    if gripper.of not in ("state", "action"):
        return f'"of" of the gripper is {gripper.of!r}, not state or action'
    lengths = {len(gripper.dimensions), len(gripper.closed), len(gripper.open)}
    if lengths == {0} or len(lengths) != 1 or list(gripper.closed) == list(gripper.open):
        return "a gripper needs as many dimensions as values when closed and, other ones, open"
    np.array([gripper.closed, gripper.open], float)
    return ""


def read_object(path: str | Path, keys: tuple[str, ...]) -> dict:
    """A JSON object that has just these keys. ValueError, FileNotFoundError."""
    try:
        fields = json.loads(Path(path).read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: not JSON ({e.msg}); repair it") from e
    except (FileNotFoundError, IsADirectoryError) as e:
        raise FileNotFoundError(f"{path}: no such file; see those in {AXES}") from e
    if not isinstance(fields, dict) or set(fields) != set(keys):
        raise ValueError(f"{path}: its keys are not {', '.join(keys)}; see those in {AXES}")
    return fields


def axes_path(given: str, files: list[EpisodeFile]) -> Path:
    """--axes, else the file of the world that the episodes name as their source."""
    if given:
        return Path(given)
    source = files[0].source
    for world in WORLDS:
        if re.search(rf"(?<![a-z]){world}", source.lower()):
            return AXES / f"{world}.json"
    if source.startswith(("spatial/", "object/", "goal/", "long/")):  # as benchmarks/libero.py
        return AXES / "libero.json"
    raise ValueError(
        f"{files[0]}: axes of {source or 'an unnamed source'!r} are unknown; say with --axes FILE "
        f"which numbers of the state are the hand's place, as the files in {AXES} do"
    )


class Camera(NamedTuple):
    """Where places show in the images."""

    matrix: np.ndarray  # (3, 4): (x, y, z, 1), m, as in the state -> (u w, v w, w), pixels
    size: list[float]  # height and width in those pixels

    def project(self, places: np.ndarray) -> np.ndarray:
        """Places (N, 3), m -> (N, 2) x, y as shares of width and height; NaN behind the camera."""
        homogeneous = np.pad(places, ((0, 0), (0, 1)), constant_values=1.0)  # (N, 4)
        uvw = homogeneous @ self.matrix.T  # (N, 3)
        depth = np.where(uvw[:, 2:] > 0, uvw[:, 2:], np.nan)
        return uvw[:, :2] / depth / self.size[::-1]


def read_camera(path: str | Path) -> Camera:
    """A camera from a file. ValueError naming what is wrong."""
    fields = read_object(path, Camera._fields)
    try:
        camera = Camera(np.array(fields["matrix"], float), np.array(fields["size"], float))
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: {e}; give numbers") from e
    fits = camera.matrix.shape == (3, 4) and camera.size.shape == (2,)
    if not fits or not np.isfinite(camera.matrix).all() or not (camera.size > 0).all():
        raise ValueError(f'{path}: "matrix" must be 3 x 4, and "size" height and width')
    return camera


# ---- Motion of an episode ------------------------------------------------------------------------

RESTING = 0.1  # of the fast tenth's speed: slower than this the hand rests
SLOW = 0.4  # of it: who closes the fingers in faster motion grasps nothing
MOVED = 0.02  # m from where the gripper changed: it has been grasped, or let go


class Motion(NamedTuple):
    """What a recorded episode tells of its steps."""

    file: EpisodeFile
    state_position: np.ndarray  # (T, 3) m, as in the state
    position: np.ndarray  # (T, 3) m, from the origin of the axes
    closed: np.ndarray  # (T,) whether the gripper is
    waypoint: np.ndarray  # (T,) the step of the next one; the last step has none and names itself
    primitive: list[str]  # T of PRIMITIVES
    ahead: int  # steps that "next" means


PRIMITIVES = {  # how a thought may say it
    "reach": ["it reaches for something", "it approaches", "it moves there with open fingers"],
    "grasp": ["it grasps", "the fingers close around something", "it takes hold"],
    "lift": ["it lifts what it holds", "it goes up with its load"],
    "carry": ["it carries what it holds", "it transports its load"],
    "place": ["it puts down what it holds", "it lowers its load"],
    "release": ["it lets go", "the fingers have just opened", "it releases what it held"],
    "push": ["it pushes with closed fingers", "it moves with closed fingers that hold nothing"],
}


def read_motion(file: EpisodeFile, axes: Axes, seconds: float) -> Motion:
    """The motion of an episode; "next" means so many seconds. ValueError naming the episode."""
    if len(file) < 2:
        raise ValueError(f"{file}: one frame, in which nothing moves; delete or record it again")
    if not file.fps:
        raise ValueError(f"{file}: its rate (fps) is not recorded; add it to the header")
    if not file.task.strip():
        raise ValueError(f"{file}: no instruction (task); add it to the header or delete it")
    state_position = file.state[:, axes.position].astype(np.float64) * axes.metres  # (T, 3)
    closed = gripper_closed(file, axes.gripper)
    ahead = max(1, round(seconds * file.fps))
    steps = np.linalg.norm(np.diff(state_position, axis=0), axis=1)
    speed = np.append(steps, steps[-1])  # (T,) m a step
    fast = np.quantile(speed, 0.9)
    return Motion(
        file=file,
        state_position=state_position,
        position=state_position - axes.origin,
        closed=closed,
        waypoint=next_waypoints(closed, speed < RESTING * fast),
        primitive=primitives(state_position, closed, speed < SLOW * fast, ahead),
        ahead=ahead,
    )


def gripper_closed(file: EpisodeFile, gripper: Gripper) -> np.ndarray:
    """Whether the gripper is closed at each step (T,): over halfway from open to closed."""
    values = file.state if gripper.of == "state" else file.action
    opened = np.array(gripper.open, float)
    span = np.array(gripper.closed, float) - opened
    closed = (values[:, gripper.dimensions] - opened) @ span > 0.5 * span @ span  # (T,)
    if gripper.of == "action":  # the action of a step shows in the frame of the next one
        closed = np.append(closed[:1], closed[:-1])
    return closed


def next_waypoints(closed: np.ndarray, resting: np.ndarray) -> np.ndarray:
    """For each step the next one at which the gripper has changed, the hand begins to rest or the
    episode ends (T,)."""
    is_waypoint = np.zeros(len(closed), bool)
    is_waypoint[1:] = (closed[1:] != closed[:-1]) | (resting[1:] & ~resting[:-1])
    is_waypoint[-1] = True
    waypoint = np.full(len(closed), len(closed) - 1)
    for t in range(len(closed) - 2, -1, -1):
        waypoint[t] = t + 1 if is_waypoint[t + 1] else waypoint[t + 1]
    return waypoint


def primitives(place: np.ndarray, closed: np.ndarray, slow: np.ndarray, ahead: int) -> list[str]:
    """The primitive of each step, of places (T, 3) m:

        open                          reach    until the hand has left where it opened: release
        closed from the start,
        or closed in fast motion      push
        closed                        grasp    until the hand has left where it closed, then by its
                                               direction: lift, carry or place; standing: as before

    The direction is that of the next `ahead` steps, up to the next change of the gripper."""
    changes = np.flatnonzero(closed[1:] != closed[:-1]) + 1
    names = []
    holds = False
    changed_at = None  # where the gripper changed, until the hand has left it
    for t, is_closed in enumerate(closed):
        if t and is_closed != closed[t - 1]:
            changed_at = place[t]
            holds = bool(is_closed and slow[t])
        if changed_at is not None and np.linalg.norm(place[t] - changed_at) > MOVED:
            changed_at = None
        end = min([t + ahead, len(place) - 1, *changes[changes > t][:1]])
        move = place[end] - place[t]  # (3,)
        level = np.linalg.norm(move[:2])
        if not is_closed:
            name = "reach" if changed_at is None else "release"
        elif not holds:
            name = "push"
        elif changed_at is not None:
            name = "grasp"
        elif np.linalg.norm(move) < 0.003:
            name = names[-1]
        elif abs(move[2]) > level:
            name = "lift" if move[2] > 0 else "place"
        else:
            name = "carry"
        names.append(name)
    return names


class World(NamedTuple):
    """What all episodes share."""

    axes: Axes
    camera: Camera | None
    instructions: list[str]  # that occur


class Moment(NamedTuple):
    """A step of an episode, of which questions are asked."""

    world: World
    motion: Motion
    t: int

    @property
    def place(self) -> np.ndarray:
        """Of the hand, from the origin (3,) m."""
        return self.motion.position[self.t]

    @property
    def task(self) -> str:
        return self.motion.file.task

    @property
    def later(self) -> int:
        """The step that is `ahead`, at most the last."""
        return min(self.t + self.motion.ahead, len(self.motion.position) - 1)

    def move_to(self, step: int) -> np.ndarray:
        return self.motion.position[step] - self.place

    def seconds(self) -> str:
        return f"{self.motion.ahead / self.motion.file.fps:.2g} seconds"


# ---- Words ---------------------------------------------------------------------------------------


def move_words(moment: Moment, move: np.ndarray, none: str = "nowhere") -> str:
    """A move (3,), m, in words, in cm: "right 11, front 4"; less than half of one is `none`."""
    return ", ".join(displacement(move, moment.world.axes.words)) or none


def place_words(moment: Moment, place: np.ndarray) -> str:
    """A place (3,), m, as move_words()."""
    return move_words(moment, place, "0")


HERE = "right here"


def waypoint_words(moment: Moment, move: np.ndarray) -> str:
    """The way to a waypoint (3,), m, as move_words()."""
    return move_words(moment, move, HERE)


def centimetres(values: np.ndarray) -> str:
    """Metres as whole centimetres: "12, -5, 20"."""
    return ", ".join(str(int(np.copysign(100 * abs(value) + 0.5, value))) for value in values)


def number_hint(moment: Moment) -> str:
    more = [words[1] for words in moment.world.axes.words]
    return f"Three numbers in cm: {', '.join(more)}; less than 0 is the other way."


def gripper_state(moment: Moment) -> str:
    """open, closed, about to close or about to open (within `ahead` steps)."""
    closed = moment.motion.closed
    now = closed[moment.t]
    if (closed[moment.t : moment.later + 1] != now).any():
        return "about to open" if now else "about to close"
    return "closed" if now else "open"


def progress(moment: Moment) -> int:
    """Percent of the episode, to the nearest 5."""
    return 5 * round(20 * moment.t / (len(moment.motion.position) - 1))


def event(moment: Moment, step: int) -> str:
    """What happens at a waypoint."""
    closed = moment.motion.closed
    if closed[step] != closed[step - 1]:
        return "the fingers close" if closed[step] else "the fingers open"
    return "the task ends" if step == len(closed) - 1 else "the hand rests"


SENTENCES = {  # a fact -> ways to say it in a thought
    "position": [
        "The hand is {place} cm from {origin}.",
        "Seen from {origin}, the hand is {place} (cm).",
        "The gripper's place is {place}.",
        "In centimetres from {origin}, the hand is {place}.",
    ],
    "gripper": [
        "The gripper is {gripper}.",
        "Its fingers are {gripper}.",
        "I see a gripper that is {gripper}.",
    ],
    "instruction": [
        "The task is: {task}.",
        "The robot was told to {task}.",
        "What has to be done: {task}.",
    ],
    "movement": [
        "The hand moves {move} next.",
        "Next it goes {move}.",
        "In the next {seconds} it moves {move}.",
    ],
    "waypoint": [
        "The next waypoint is {waypoint} from here, where {event}.",
        "It heads {waypoint}; there {event}.",
        "{waypoint} from here {event}.",
    ],
    "waypoint here": [
        "The next waypoint is right here, where {event}.",
        "Without going further, {event}.",
    ],
    "primitive": [
        "At the moment {doing}.",
        "This is the {primitive} phase: {doing}.",
        "The robot's present step is to {primitive}.",
    ],
    "progress": [
        "About {progress}% of the task is done.",
        "The task is {progress}% done.",
    ],
}


def say(moment: Moment, rng, fact: str) -> str:
    """A fact about a moment in one of its wordings."""
    waypoint = int(moment.motion.waypoint[moment.t])
    waypoint_move = waypoint_words(moment, moment.move_to(waypoint))
    if fact == "waypoint" and waypoint_move == HERE:
        fact = "waypoint here"
    primitive = moment.motion.primitive[moment.t]
    sentence = pick(rng, SENTENCES[fact]).format(
        place=place_words(moment, moment.place),
        origin=moment.world.axes.origin_name,
        gripper=gripper_state(moment),
        task=moment.task.strip().rstrip("."),
        move=move_words(moment, moment.move_to(moment.later)),
        seconds=moment.seconds(),
        waypoint=waypoint_move,
        event=event(moment, waypoint),
        doing=pick(rng, PRIMITIVES[primitive]),
        primitive=primitive,
        progress=progress(moment),
    )
    return sentence[0].upper() + sentence[1:]


def thought(moment: Moment, rng, context: tuple[str, ...], conclusion: str) -> str:
    """One to three of the facts of `context` in any order, then what follows."""
    n = int(rng.integers(1, min(3, len(context)) + 1))
    facts = [context[i] for i in rng.permutation(len(context))[:n]]
    sentences = [say(moment, rng, fact) for fact in facts]
    return " ".join([*sentences, conclusion])


# ---- Questions -----------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A question of some kind, before it is known how it is asked."""

    text: str
    hint: str  # how an open answer is to be written
    answer: str  # to the open question
    conclusion: str  # of the thought
    options: tuple[str, list[str]] | None  # the right and wrong ones of a choice; None: open only
    context: tuple[str, ...]  # facts that a thought may begin with
    score: str = "exact"  # by which of grpo.SCORES the open answer is marked
    more: dict = {}  # what that needs  # noqa: RUF012
    steps: tuple[int, ...] = ()  # of the frames; none: that of the moment
    told: bool = True  # whether the question names the instruction


def wrong_moves(rng, right: np.ndarray, apart: float) -> list[np.ndarray]:
    """Four moves (3,) m that are at least `apart` from the right one along an axis: it is turned
    round, axis by axis, and disturbed."""
    size = max(float(np.linalg.norm(right)), 2 * apart)
    wrong = []
    while len(wrong) < 4:
        move = right * rng.choice([-1.0, 1.0, 0.0], 3) + rng.normal(0, 0.5 * size, 3)
        if np.abs(move - right).max() >= apart:
            wrong.append(move)
    return wrong


def move_options(moment, rng, right, apart: float, words=move_words) -> tuple[str, list[str]]:
    wrong = [words(moment, move) for move in wrong_moves(rng, right, apart)]
    return words(moment, right), wrong


def place_options(moment, rng) -> tuple[str, list[str]]:
    """Wrong are places at which the hand is in other steps, at least 4 cm away along an axis."""
    places = rng.permutation(moment.motion.position)[:32]
    wrong = []
    for place in [*places, *wrong_moves(rng, moment.place, 0.04)]:
        if np.abs(place - moment.place).max() >= 0.04:
            wrong.append(place_words(moment, place))
    return place_words(moment, moment.place), wrong


def ask_position(moment, rng) -> Asked:
    place = moment.place
    return Asked(
        text=pick(
            rng,
            [
                f"Where is the hand, seen from {moment.world.axes.origin_name}?",
                f"How far is the hand from {moment.world.axes.origin_name}, in cm?",
            ],
        ),
        hint=number_hint(moment),
        answer=centimetres(place),
        conclusion=say(moment, rng, "position"),
        options=place_options(moment, rng),
        context=("gripper", "primitive"),
        score="number",
        more={"tolerance": 2},
        told=False,
    )


def ask_direction(moment, rng) -> Asked | None:
    """By the axis along which it moves most; None where two are alike."""
    if moment.t + moment.motion.ahead != moment.later:
        return None
    move = moment.move_to(moment.later)
    sizes = np.sort(abs(move))
    axis = int(abs(move).argmax())
    names = moment.world.axes.words
    if sizes[2] < 0.005:
        answer = "nowhere"
    elif sizes[2] < max(0.01, 1.25 * sizes[1]):
        return None
    else:
        answer = names[axis][int(move[axis] > 0)]
    every = [*[name for pair in names for name in pair], "nowhere"]
    others = [name for name in every if name != answer]
    return Asked(
        text=pick(
            rng,
            [
                f"Which way does the hand move in the next {moment.seconds()}?",
                f"Where does the hand mostly go in the next {moment.seconds()}?",
            ],
        ),
        hint=f"One of {', '.join(every)}.",
        answer=answer,
        conclusion=pick(
            rng, ["{} So it mostly goes {}.", "{} That is mostly {}.", "{} Mostly {}."]
        ).format(say(moment, rng, "movement"), answer),
        options=(answer, [str(name) for name in rng.permutation(others)]),
        context=("instruction", "position", "gripper", "primitive", "waypoint"),
    )


def ask_movement(moment, rng) -> Asked | None:
    if moment.t + moment.motion.ahead != moment.later:
        return None
    move = moment.move_to(moment.later)
    return Asked(
        text=f"Which way and how far does the hand move in the next {moment.seconds()}?",
        hint=number_hint(moment),
        answer=centimetres(move),
        conclusion=say(moment, rng, "movement"),
        options=move_options(moment, rng, move, 0.02),
        context=("instruction", "position", "gripper", "primitive", "waypoint"),
        score="number",
        more={"tolerance": 1},
    )


def ask_waypoint(moment, rng) -> Asked | None:
    step = int(moment.motion.waypoint[moment.t])
    if step == moment.t:
        return None
    move = moment.move_to(step)
    return Asked(
        text=pick(
            rng,
            [
                "Where is the hand's next waypoint, from where it is now?",
                "How far is it to where the gripper next changes or the hand next rests or ends?",
            ],
        ),
        hint=number_hint(moment),
        answer=centimetres(move),
        conclusion=say(moment, rng, "waypoint"),
        options=move_options(moment, rng, move, 0.04, waypoint_words),
        context=("instruction", "position", "gripper", "primitive", "movement"),
        score="number",
        more={"tolerance": 2},
    )


GRIPPER = ["open", "closed", "about to close", "about to open"]


def ask_gripper(moment, rng) -> Asked:
    answer = gripper_state(moment)
    others = [name for name in GRIPPER if name != answer]
    return Asked(
        text=pick(
            rng,
            [
                f"How is the gripper, and does it change in the next {moment.seconds()}?",
                f"Is the gripper open or closed, or does it change in the next {moment.seconds()}?",
            ],
        ),
        hint=f"One of {', '.join(GRIPPER)}.",
        answer=answer,
        conclusion=say(moment, rng, "gripper"),
        options=(answer, [str(name) for name in rng.permutation(others)]),
        context=("instruction", "position", "primitive", "movement", "waypoint"),
    )


def ask_primitive(moment, rng) -> Asked:
    answer = moment.motion.primitive[moment.t]
    others = [name for name in PRIMITIVES if name != answer]
    doing = pick(rng, PRIMITIVES[answer])
    return Asked(
        text=pick(rng, ["Which primitive is it?", "What is the hand doing at the moment?"]),
        hint=f"One of {', '.join(PRIMITIVES)}.",
        answer=answer,
        conclusion=pick(
            rng, ["So {}: {}.", "It seems that {}, which is to {}.", "Hence {} ({})."]
        ).format(doing, answer),
        options=(answer, [str(name) for name in rng.permutation(others)]),
        context=("instruction", "position", "gripper", "movement", "waypoint"),
    )


def ask_instruction(moment, rng) -> Asked:
    """Among those that occur in the data."""
    others = [text for text in moment.world.instructions if text != moment.task]
    return Asked(
        text=pick(rng, ["Which instruction is being carried out?", "What was the robot told?"]),
        hint="",
        answer=moment.task,
        conclusion=pick(
            rng,
            ["So the instruction is: {}.", "This fits one instruction: {}.", "It must be: {}."],
        ).format(moment.task),
        options=(moment.task, [str(text) for text in rng.permutation(others)]),
        context=("position", "gripper", "movement", "primitive"),
        told=False,
    )


def ask_order(moment, rng) -> Asked | None:
    """Two frames between which the hand has moved, or the gripper changed."""
    later_steps = np.arange(moment.later, len(moment.motion.position))
    distance = np.linalg.norm(moment.motion.position[later_steps] - moment.place, axis=1)
    changed = moment.motion.closed[later_steps] != moment.motion.closed[moment.t]
    candidates = later_steps[(later_steps > moment.t) & ((distance > 0.03) | changed)]
    if not len(candidates):
        return None
    shown = [moment.t, int(pick(rng, candidates))]
    first_is_earlier = bool(rng.random() < 0.5)
    if not first_is_earlier:
        shown.reverse()
    answer, other = ("first", "second") if first_is_earlier else ("second", "first")
    seen = []
    for name, step in zip(["first", "second"], shown, strict=True):
        at = moment._replace(t=step)
        seen.append(
            f"In the {name} image the hand is {place_words(at, at.place)}, the gripper "
            f"{gripper_state(at)}."
        )
    if rng.random() < 0.5:
        seen.reverse()
    ending = pick(
        rng,
        [
            f"So the {answer} one comes first.",
            f"The {answer} is the earlier one.",
            f"That makes the {other} the later one, and the {answer} the earlier.",
        ],
    )
    return Asked(
        text=pick(rng, ["Which of the two images comes first?", "Which image is the earlier one?"]),
        hint="first or second.",
        answer=answer,
        conclusion=" ".join([*seen, ending]),
        options=(f"the {answer}", [f"the {other}"]),
        context=("instruction",),
        steps=tuple(shown),
    )


def ask_progress(moment, rng) -> Asked:
    percent = progress(moment)
    others = [value for value in range(0, 101, 5) if abs(value - percent) >= 25]
    return Asked(
        text=pick(rng, ["How much of the task is done?", "How far has the task got?"]),
        hint="A number in percent.",
        answer=str(percent),
        conclusion=say(moment, rng, "progress"),
        options=(f"{percent}%", [f"{value}%" for value in rng.permutation(others)]),
        context=("instruction", "position", "gripper", "primitive"),
        score="number",
        more={"tolerance": 10},
    )


PATH_POINTS = 5


def image_points(moment: Moment, steps) -> np.ndarray | None:
    """The hand in the image at some steps (N, 2), shares of width and height; None outside it."""
    points = moment.world.camera.project(moment.motion.state_position[steps])
    is_inside = ((points >= 0) & (points <= 1)).all()  # not of NaN
    return points if is_inside else None


def point_words(points) -> str:
    return ", ".join(f"({x:.2f}, {y:.2f})" for x, y in points)


POINT_HINT = "As (x, y), shares of the image's width and height from its top left."


def ask_point(moment, rng) -> Asked | None:
    points = image_points(moment, [moment.t])
    if points is None:
        return None
    x, y = points[0].round(2)
    box = [max(x - 0.05, 0), max(y - 0.05, 0), min(x + 0.05, 1), min(y + 0.05, 1)]
    return Asked(
        text=pick(rng, ["Point to the hand.", "Where in the image is the hand?"]),
        hint=POINT_HINT,
        answer=point_words(points),
        conclusion=pick(rng, ["The hand shows at {}.", "In the image the hand is at {}."]).format(
            point_words(points)
        ),
        options=None,
        context=("position", "gripper", "primitive"),
        score="point",
        more={"box": [round(float(side), 3) for side in box]},
        told=False,
    )


def ask_path(moment, rng) -> Asked | None:
    """From now to the next waypoint, where that is a way to be seen."""
    waypoint = int(moment.motion.waypoint[moment.t])
    steps = np.linspace(moment.t, waypoint, PATH_POINTS).round().astype(int)
    points = image_points(moment, steps)
    if waypoint == moment.t or points is None or np.ptp(points, axis=0).max() < 0.05:
        return None
    return Asked(
        text=pick(
            rng,
            [
                "Trace the hand's path to its next waypoint.",
                "Which path does the hand take in the image to its next waypoint?",
            ],
        ),
        hint=f"{PATH_POINTS} points. {POINT_HINT}",
        answer=point_words(points),
        conclusion=pick(
            rng, ["{} In the image that is from {} to {}.", "{} It leads from {} to {}."]
        ).format(say(moment, rng, "waypoint"), point_words(points[:1]), point_words(points[-1:])),
        options=None,
        context=("instruction", "position", "gripper", "primitive", "movement"),
        score="number",
        more={"tolerance": 0.05},
    )


class Kind(NamedTuple):
    weight: float  # how often, among all kinds
    ask: Callable[..., Asked | None]  # (moment, rng); None: not at this moment
    classes: Callable[[Moment], str] | None = None  # answers of which each is asked as often


# fork point: the kinds of questions
KINDS = {
    "position": Kind(2, ask_position),
    "direction": Kind(2, ask_direction),
    "movement": Kind(2, ask_movement),
    "waypoint": Kind(2, ask_waypoint),
    "gripper": Kind(1, ask_gripper, gripper_state),
    "primitive": Kind(1, ask_primitive, lambda moment: moment.motion.primitive[moment.t]),
    "instruction": Kind(1, ask_instruction),
    "order": Kind(1, ask_order),
    "progress": Kind(1, ask_progress),
    "point": Kind(1, ask_point),
    "path": Kind(1, ask_path),
}


def possible_kinds(world: World) -> list[str]:
    """Those that these data can answer."""
    missing = set()
    if world.camera is None:
        missing |= {"point", "path"}
    if len(world.instructions) < 2:
        missing.add("instruction")
    return [kind for kind in KINDS if kind not in missing]


def parse_shares(text: str, world: World) -> dict[str, float]:
    """The value of --shares, "kind:share,...", "" for the weights of KINDS -> shares that sum to 1.
    ValueError for an unknown kind, one that the data cannot answer, a share that is no number."""
    possible = possible_kinds(world)
    if text:
        shares = {}
        for item in text.split(","):
            kind, _, share = item.strip().partition(":")
            if kind not in KINDS:
                raise ValueError(f"--shares: no kind {kind!r}; there are {', '.join(KINDS)}")
            if kind not in possible:
                needs = "two instructions" if kind == "instruction" else "--camera FILE"
                raise ValueError(f"--shares: {kind} needs {needs}; leave it out or give that")
            if kind in shares:
                raise ValueError(f"--shares: {kind} is named twice; name each once")
            try:
                shares[kind] = non_negative(share)
            except argparse.ArgumentTypeError as e:
                raise ValueError(f"--shares {item.strip()}: {e}; write kind:share") from e
    else:
        shares = {kind: KINDS[kind].weight for kind in possible}
    total = sum(shares.values())
    if not total:
        raise ValueError(f"--shares {text}: all are 0; give one that is not")
    return {kind: share / total for kind, share in shares.items()}


# ---- Rows ----------------------------------------------------------------------------------------

TRIES = 200  # to find a moment at which a question can be asked


class Source(NamedTuple):
    """Episodes to ask about."""

    world: World
    motions: list[Motion]
    ends: np.ndarray  # (episodes,) how many steps there are up to the end of each
    first_frame: int  # frames are counted from here
    saved: dict[int, str]  # the path of each frame that is written, by its number


def make_source(world: World, motions: list[Motion], first_frame: int) -> Source:
    ends = np.cumsum([len(motion.position) for motion in motions])
    return Source(world, motions, ends, first_frame, {})


def draw_moment(source: Source, rng, classes=None) -> tuple[int, Moment]:
    """The index of an episode and a step of it, all steps alike; with `classes` those of one class
    of the episode, which is drawn first."""
    step = int(rng.integers(source.ends[-1]))
    index = int(np.searchsorted(source.ends, step, side="right"))
    motion = source.motions[index]
    start = int(source.ends[index]) - len(motion.position)
    moment = Moment(source.world, motion, step - start)
    if classes is None:
        return index, moment
    by_class = {}
    for t in range(len(motion.position)):
        by_class.setdefault(classes(moment._replace(t=t)), []).append(t)
    return index, moment._replace(t=pick(rng, by_class[pick(rng, sorted(by_class))]))


def save_frames(source: Source, out: Path, index: int, steps) -> list[str]:
    """Writes frames of an episode, those that are not there yet -> their paths below `out`."""
    motion = source.motions[index]
    start = source.first_frame + int(source.ends[index]) - len(motion.position)
    names = []
    for step in steps:
        number = start + step
        if number not in source.saved:
            source.saved[number] = save_frame(out, "frames", number, motion.file.frame(step))
        names.append(source.saved[number])
    return names


class Row(NamedTuple):
    line: str
    kind: str
    has_thought: bool
    is_choice: bool


def make_row(source: Source, out: Path, shares: dict[str, float], rng) -> Row:
    """A question about a random moment. ValueError when none can be asked."""
    # 1. what is asked, and when
    kind = str(rng.choice(list(shares), p=list(shares.values())))
    for _ in range(TRIES):
        index, moment = draw_moment(source, rng, KINDS[kind].classes)
        asked = KINDS[kind].ask(moment, rng)
        if asked:
            break
    else:
        raise ValueError(
            f"{source.motions[0].file.path.parent}: found no step for a question of kind {kind}; "
            f"leave it out of --shares, or shorten --ahead"
        )
    # 2. how
    has_thought = bool(rng.random() < 0.5)
    is_choice = bool(asked.options and rng.random() < 0.5)
    more = {"score": asked.score, **asked.more}
    ending = asked.hint
    answer = asked.answer
    conclusion = asked.conclusion
    if is_choice:
        ending, answer = multiple_choice(rng, *asked.options)
        more = {"score": "choice"}
        if rng.random() < 0.5:
            conclusion += f" That is {answer}."
    text = f"{asked.text} {ending}".strip()
    if asked.told:
        text = f"Instruction: {moment.task}\n{text}"
    reason = thought(moment, rng, asked.context, conclusion) if has_thought else None
    # 3. the line
    frames = save_frames(source, out, index, asked.steps or [moment.t])
    way = kind + ("+choice" if is_choice else "") + ("+think" if has_thought else "")
    line = json_row(frames, [Question(text, reason, answer)], kind=way, **more)
    return Row(line, kind, has_thought, is_choice)


def make_thought_action(source: Source, out: Path, horizon: int, rng) -> str:
    """A line of thought_actions.jsonl: a thought, then the recorded actions (`horizon` x A)."""
    while True:
        index, moment = draw_moment(source, rng)
        motion = moment.motion
        if moment.t in chunk_starts(motion.file, horizon):
            break
    move = move_words(moment, moment.move_to(moment.later))
    fingers = {
        "open": "keep the fingers open",
        "closed": "keep the fingers closed",
        "about to open": "open the fingers",
        "about to close": "close the fingers",
    }[gripper_state(moment)]
    conclusion = pick(
        rng,
        [
            f"Now {motion.primitive[moment.t]}: {move}, {fingers}.",
            f"So move {move} and {fingers}.",
            f"Next: {fingers} and go {move}.",
        ],
    )
    context = ("instruction", "position", "gripper", "primitive", "waypoint")
    reason = thought(moment, rng, context, conclusion)
    chunk = action_chunks(motion.file, horizon)[moment.t].astype(float).round(6).tolist()
    frames = save_frames(source, out, index, [moment.t])
    text = f"Instruction: {moment.task}\n{ACTION_QUESTION}"
    return json_row(frames, [Question(text, reason, "<ACTION>")], chunk=chunk)


# ---- Command -------------------------------------------------------------------------------------


def rows_of_kinds(rows: list[Row]) -> dict:
    """What report.json says of a file."""
    kinds = Counter(row.kind for row in rows)
    return {
        "rows": len(rows),
        "thoughts": sum(row.has_thought for row in rows) / len(rows),
        "choices": sum(row.is_choice for row in rows) / len(rows),
        "kinds": {kind: kinds[kind] / len(rows) for kind in KINDS if kind in kinds},
    }


def write_questions(args) -> dict:
    """Writes all files below args.out -> what report.json says. ValueError, FileNotFoundError."""
    # 1. read and check everything
    files = read_episodes(args.data)
    state_dim = files[0].state.shape[1]
    if not state_dim:
        raise ValueError(f"{args.data}: no state is recorded; convert it with the robot's state")
    path = axes_path(args.axes, files)
    axes = read_axes(path, state_dim, files[0].action.shape[1])
    camera = read_camera(args.camera) if args.camera else None
    world = World(axes, camera, sorted({file.task for file in files}))
    shares = parse_shares(args.shares, world)
    train_files, held_files = split_episodes(files)
    train = make_source(world, [read_motion(file, axes, args.ahead) for file in train_files], 0)
    held_motions = [read_motion(file, axes, args.ahead) for file in held_files]
    held = make_source(world, held_motions, int(train.ends[-1]))

    # 2. frames, and the lines in memory
    out = Path(args.out)
    report = {
        "data": str(args.data),
        "axes": str(path),
        "seed": args.seed,
        "train_episodes": len(train_files),
        "held_out_episodes": len(held_files),
        "instructions": len(world.instructions),
        "not_asked": [kind for kind in KINDS if kind not in shares],
        "thought_actions": args.thought_actions,
    }
    lines = {}
    parts = {"held_out": (held, args.held_rows, 1), "conversations": (train, args.rows, 0)}
    for name, (source, total, stream) in parts.items():
        rows = []
        for i in tqdm(range(total), name, disable=None):
            rng = np.random.default_rng([6, args.seed, stream, i])
            rows.append(make_row(source, out, shares, rng))
        if rows:
            report[name] = rows_of_kinds(rows)
            lines[name] = [row.line for row in rows]
    if args.thought_actions:
        lines["thought_actions"] = []
    for i in tqdm(range(args.thought_actions), "thought_actions", disable=None):
        rng = np.random.default_rng([6, args.seed, 2, i])
        lines["thought_actions"].append(make_thought_action(train, out, args.horizon, rng))

    # 3. files
    for name, of_file in lines.items():
        (out / f"{name}.jsonl").write_text("".join(of_file))
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.robot_questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", required=True, help="folder of episodes")
    add("--out", required=True, help="folder to write")
    add("--rows", type=count, default=20000, help="questions about training episodes")
    add("--held-rows", type=natural, default=1000, help="questions about held-out episodes")
    add("--axes", default="", help="what the state means, .json; empty: by the episodes' source")
    add("--camera", default="", help="its 3x4 matrix, .json: adds the kinds point and path")
    add("--shares", default="", help="kind:share,... of the rows; empty: all kinds")
    add("--ahead", type=positive, default=0.4, help="seconds that `next` means")
    add("--thought-actions", type=natural, default=0, help="rows of thought_actions.jsonl")
    add("--horizon", type=count, default=5, help="actions in each, as of the FAST tokenizer")
    add("--seed", type=natural, default=0)
    args = parser.parse_args(argv)
    out = Path(args.out)
    if (out / "conversations.jsonl").exists():
        raise SystemExit(f"error: {out} already holds data; name another --out or delete it")
    try:
        report = write_questions(args)
    except (ValueError, FileNotFoundError) as e:
        raise SystemExit(f"error: {e}") from e
    for name in ("conversations", "held_out"):
        if name in report:
            part = report[name]
            shares = [f"{kind} {share:.1%}" for kind, share in part["kinds"].items()]
            print(
                f"{out / name}.jsonl: {part['rows']} rows, {part['thoughts']:.1%} with a thought, "
                f"{part['choices']:.1%} multiple choice; {', '.join(shares)}"
            )
    if report["not_asked"]:
        print(f"not asked: {', '.join(report['not_asked'])}")


if __name__ == "__main__":
    main()
