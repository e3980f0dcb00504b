"""Questions and thoughts about any robot, from what its episodes record.

    python -m tools.robot_questions --data data/libero --out data/libero_questions --rows 150000

reads episodes (folder/*.safetensors, whatever they come from) and writes, in the formats of
docs/data.md, conversations.jsonl of the training episodes, held_out.jsonl of those that all stages
hold out, thought_actions.jsonl with --thought-actions, frames/*.png and report.json. Facts come
from state, action, instruction, rate and camera; where the recorder knew of objects, from these
too. The same seed gives the same bytes.

1. tools/motion.py reads what an episode tells of its steps
2. a kind of question and a step are drawn; the facts at that step give question and answer
3. half of the answers follow a thought: some facts in any order and wording, then the conclusion

In the order of the file: words; questions about the hand; about objects; rows; the command. Who
wants another kind of question adds a function and a line to KINDS.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.tabletop_data import (
    Question,
    displacement,
    heading,
    json_row,
    multiple_choice,
    pick,
    plan_words,
    save_frame,
)
from fast_tokenizer import (
    action_chunks,
    action_question,
    chunk_starts,
    count,
    natural,
    non_negative,
    positive,
    read_episodes,
    split_episodes,
)
from tools.motion import Axes, Motion, axes_path, read_axes, read_camera, read_motion

# ---- Moments -------------------------------------------------------------------------------------


class World(NamedTuple):
    """What all episodes share."""

    axes: Axes
    instructions: list[str]  # that occur, without the spaces around them
    thought_style: str = "varied"  # of THOUGHT_STYLES


class Thing(NamedTuple):
    """A recorded object at a moment."""

    index: int  # among those of the episode
    name: str
    place: np.ndarray  # (3,) m, from the origin


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

    def thing(self, index: int) -> Thing | None:
        """An object of the episode; None when it is not there, and for -1."""
        if index < 0:
            return None
        place = self.motion.object_position[self.t, index]
        if not np.isfinite(place).all():
            return None
        return Thing(index, self.motion.objects[index], place)

    @property
    def objects(self) -> list[Thing]:
        """Those that are there."""
        things = [self.thing(index) for index in range(len(self.motion.objects))]
        return [thing for thing in things if thing is not None]

    @property
    def has_twins(self) -> bool:
        """Whether there is an "other" object of the same name: which is which only the instruction
        tells."""
        return any(name.startswith("other ") for name in self.motion.objects)

    @property
    def target(self) -> Thing | None:
        """What the hand is going for."""
        return self.thing(int(self.motion.target[self.t]))

    @property
    def held(self) -> Thing | None:
        """What the hand holds."""
        return self.thing(int(self.motion.held[self.t]))

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
    """What happens at a waypoint; at the last step, which has no next one, the task ends."""
    if step == moment.t:
        return "the task ends"
    closed = moment.motion.closed
    if closed[step] != closed[step - 1]:
        return "the fingers close" if closed[step] else "the fingers open"
    return "the task ends" if step == len(closed) - 1 else "the hand rests"


def hand_words(moment: Moment) -> str:
    """What the hand does: "open", "closed", "holding the plate"."""
    if moment.held:
        return f"holding the {moment.held.name}"
    return "closed" if moment.motion.closed[moment.t] else "open"


PRIMITIVES = {  # how a thought may say it
    "reach": ["it reaches for something", "it approaches", "it moves there with open fingers"],
    "grasp": ["it grasps", "the fingers close around something", "it takes hold"],
    "lift": ["it lifts what it holds", "it goes up with its load"],
    "carry": ["it carries what it holds", "it transports its load"],
    "place": ["it puts down what it holds", "it lowers its load"],
    "release": ["it lets go", "the fingers have just opened", "it releases what it held"],
    "push": ["it pushes with closed fingers", "it moves with closed fingers that hold nothing"],
}

# fork point: the wording of thoughts
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
    "hand": [
        "The gripper is at {place}, {hand}.",
        "The hand is {hand}, {place} cm from {origin}.",
        "Seen from {origin}, the hand is {place} (cm), and it is {hand}.",
        "The gripper, {hand}, is at {place}.",
    ],
    "objects": ["The scene has {objects}.", "I see {objects}.", "In the scene: {objects}."],
    "target": [
        "The target is the {target} at {target_place}.",
        "The hand is going for the {target}, {target_place} cm from {origin}.",
        "It goes for the {target}, which is at {target_place}.",
        "The {target} is at {target_place}, and that is where the hand is going.",
    ],
    "target from hand": [
        "From the hand it is {target_offset} to the {target}.",
        "The {target} is {target_offset} from the hand.",
    ],
    "held": [
        "The hand holds the {held}.",
        "The {held} is between the fingers.",
        "It has got hold of the {held}.",
    ],
}


def is_known(moment: Moment, fact: str) -> bool:
    if fact == "objects":
        return bool(moment.objects)
    if fact == "held":
        return moment.held is not None
    return not fact.startswith("target") or moment.target is not None


def phrase(moment: Moment, rng, wordings: list[str]) -> str:
    """One of them; where thoughts are not varied the first one."""
    return pick(rng, wordings) if moment.world.thought_style == "varied" else wordings[0]


def say(moment: Moment, rng, fact: str) -> str:
    """A fact about a moment in one of its wordings."""
    waypoint = int(moment.motion.waypoint[moment.t])
    waypoint_move = waypoint_words(moment, moment.move_to(waypoint))
    if fact == "waypoint" and waypoint_move == HERE:
        fact = "waypoint here"
    primitive = moment.motion.primitive[moment.t]
    values = {
        "place": place_words(moment, moment.place),
        "origin": moment.world.axes.origin_name,
        "gripper": gripper_state(moment),
        "hand": hand_words(moment),
        "task": moment.task.strip().rstrip("."),
        "move": move_words(moment, moment.move_to(moment.later)),
        "seconds": moment.seconds(),
        "waypoint": waypoint_move,
        "event": event(moment, waypoint),
        "primitive": primitive,
        "progress": progress(moment),
        "objects": ", ".join(f"the {thing.name}" for thing in moment.objects),
    }
    if moment.target:
        values["target"] = moment.target.name
        values["target_place"] = place_words(moment, moment.target.place)
        values["target_offset"] = waypoint_words(moment, moment.target.place - moment.place)
    if moment.held:
        values["held"] = moment.held.name
    wording = phrase(moment, rng, SENTENCES[fact])
    values["doing"] = phrase(moment, rng, PRIMITIVES[primitive])
    sentence = wording.format(**values)
    return sentence[0].upper() + sentence[1:]


def say_all(moment: Moment, rng, facts: list[str]) -> str:
    """Facts in any order."""
    return " ".join(say(moment, rng, facts[i]) for i in rng.permutation(len(facts)))


THOUGHT_STYLES = {
    "varied": "facts in any order and wording",
    "fixed": "target, hand, phase and direction in one form, as Tabletop's",
    "recorded": "the expert's own where one is recorded for each step",
}


def plan_thought(moment: Moment) -> str:
    """Target and hand, their places, phase and direction, in the one form of Tabletop's thoughts,
    or what the expert's own thought was."""
    if moment.world.thought_style == "recorded":
        return moment.motion.file.thoughts[moment.t]
    target = moment.target
    fingers = 1 if moment.motion.closed[moment.later] else -1
    return plan_words(
        target.name if target else "",
        place_words(moment, target.place) if target else "",
        f"{place_words(moment, moment.place)}, {hand_words(moment)}",
        moment.motion.primitive[moment.t],
        heading(moment.move_to(moment.later), fingers, moment.world.axes.words),
    )


def thought(moment: Moment, rng, asked: "Asked") -> str:
    """Facts, then what follows. Varied: one to three of those that fit the question, and the target
    if it is one of them. Else the plan, where the question names the instruction."""
    if moment.world.thought_style != "varied":
        plan = plan_thought(moment) if asked.told and not asked.steps else ""
        return f"{plan} {asked.conclusion}".strip()
    known = [fact for fact in asked.context if is_known(moment, fact)]
    always = [fact for fact in known if fact == "target"]
    others = [fact for fact in known if fact != "target"]
    n = int(rng.integers(1, min(3, len(others)) + 1)) if others else 0
    drawn = [others[i] for i in rng.permutation(len(others))[:n]]
    if always:
        lead = say_all(moment, rng, [*always, *drawn])
    else:
        lead = " ".join(say(moment, rng, fact) for fact in drawn)
    return f"{lead} {asked.conclusion}".strip()


# ---- Questions about the hand --------------------------------------------------------------------


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


AIM = ("target", "target from hand", "held")  # facts that fit where the instruction is named


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


def place_options(moment, rng, right: np.ndarray, places) -> tuple[str, list[str]]:
    """Wrong are those of `places`, each (3,), that are at least 4 cm away along an axis."""
    wrong = []
    for place in [*places, *wrong_moves(rng, right, 0.04)]:
        if np.abs(place - right).max() >= 0.04:
            wrong.append(place_words(moment, place))
    return place_words(moment, right), wrong


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
        options=place_options(moment, rng, place, rng.permutation(moment.motion.position)[:32]),
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
        conclusion=phrase(
            moment, rng, ["{} So it mostly goes {}.", "{} That is mostly {}.", "{} Mostly {}."]
        ).format(say(moment, rng, "movement"), answer),
        options=(answer, [str(name) for name in rng.permutation(others)]),
        context=("instruction", "position", "gripper", "primitive", "waypoint", *AIM),
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
        context=("instruction", "position", "gripper", "primitive", "waypoint", *AIM),
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
        context=("instruction", "position", "gripper", "primitive", "movement", *AIM),
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
        context=("instruction", "position", "primitive", "movement", "waypoint", *AIM),
    )


def ask_primitive(moment, rng) -> Asked:
    answer = moment.motion.primitive[moment.t]
    others = [name for name in PRIMITIVES if name != answer]
    doing = phrase(moment, rng, PRIMITIVES[answer])
    return Asked(
        text=pick(rng, ["Which primitive is it?", "What is the hand doing at the moment?"]),
        hint=f"One of {', '.join(PRIMITIVES)}.",
        answer=answer,
        conclusion=phrase(
            moment, rng, ["So {}: {}.", "It seems that {}, which is to {}.", "Hence {} ({})."]
        ).format(doing, answer),
        options=(answer, [str(name) for name in rng.permutation(others)]),
        context=("instruction", "position", "gripper", "movement", "waypoint", *AIM),
    )


def ask_instruction(moment, rng) -> Asked:
    """Among those that occur in the data; spaces around them make no other one."""
    task = moment.task.strip()
    others = [text for text in moment.world.instructions if text != task]
    return Asked(
        text=pick(rng, ["Which instruction is being carried out?", "What was the robot told?"]),
        hint="",
        answer=task,
        conclusion=phrase(
            moment,
            rng,
            ["So the instruction is: {}.", "This fits one instruction: {}.", "It must be: {}."],
        ).format(task),
        options=(task, [str(text) for text in rng.permutation(others)]),
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
    if moment.world.thought_style == "varied" and rng.random() < 0.5:
        seen.reverse()
    ending = phrase(
        moment,
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
        context=("instruction", "position", "gripper", "primitive", *AIM),
        score="number",
        more={"tolerance": 10},
    )


PATH_POINTS = 5


def in_sight(points: np.ndarray) -> bool:
    """Whether points (N, 2), shares of width and height, all lie in the image; NaN does not."""
    return bool(((points >= 0) & (points <= 1)).all())


def point_words(points) -> str:
    return ", ".join(f"({x:.2f}, {y:.2f})" for x, y in points)


POINT_HINT = "As (x, y), shares of the image's width and height from its top left."


def pointing(moment, rng, name: str, pixel: np.ndarray, context: tuple[str, ...]) -> Asked | None:
    """To something that shows at `pixel` (2,); None when it is out of sight."""
    if not in_sight(pixel):
        return None
    x, y = pixel.astype(float).round(2)
    box = [max(x - 0.05, 0), max(y - 0.05, 0), min(x + 0.05, 1), min(y + 0.05, 1)]
    words = point_words([pixel])
    return Asked(
        text=pick(rng, [f"Point to the {name}.", f"Where in the image is the {name}?"]),
        hint=POINT_HINT,
        answer=words,
        conclusion=phrase(
            moment,
            rng,
            [f"The {name} shows at {words}.", f"In the image the {name} is at {words}."],
        ),
        options=None,
        context=context,
        score="point",
        more={"box": [round(float(side), 3) for side in box]},
        told=False,
    )


def ask_point(moment, rng) -> Asked | None:
    pixel = moment.motion.hand_pixel[moment.t]
    return pointing(moment, rng, "hand", pixel, ("position", "gripper", "primitive"))


def ask_path(moment, rng) -> Asked | None:
    """From now to the next waypoint, where that is a way to be seen."""
    waypoint = int(moment.motion.waypoint[moment.t])
    steps = np.linspace(moment.t, waypoint, PATH_POINTS).round().astype(int)
    points = moment.motion.hand_pixel[steps]
    if waypoint == moment.t or not in_sight(points) or np.ptp(points, axis=0).max() < 0.05:
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
        conclusion=phrase(
            moment, rng, ["{} In the image that is from {} to {}.", "{} It leads from {} to {}."]
        ).format(say(moment, rng, "waypoint"), point_words(points[:1]), point_words(points[-1:])),
        options=None,
        context=("instruction", "position", "gripper", "primitive", "movement", *AIM),
        score="path",
    )


# ---- Questions about objects ---------------------------------------------------------------------

APART = 0.03  # m along an axis: less is not told from nothing


def object_place(moment, rng, thing: Thing) -> str:
    """Where an object is, as a sentence of a thought."""
    words = place_words(moment, thing.place)
    return phrase(
        moment,
        rng,
        [
            f"The {thing.name} is at {words}.",
            f"The {thing.name} is {words} cm from {moment.world.axes.origin_name}.",
            f"I see the {thing.name} at {words}.",
        ],
    )


def name_options(rng, right: str, others: list[str]) -> tuple[str, list[str]] | None:
    """Of a choice among names; None when there is no other one."""
    others = [name for name in others if name != right]
    return (right, [str(name) for name in rng.permutation(others)]) if others else None


def names_hint(rng, names: list[str]) -> str:
    """In an order that says nothing."""
    return f"One of {', '.join(rng.permutation(names))}."


def ask_where(moment, rng) -> Asked | None:
    """Of any object, or, a third of the time, of the one that the hand is going for."""
    if not moment.objects:
        return None
    thing = pick(rng, moment.objects)
    others = [other.place for other in moment.objects]
    origin = moment.world.axes.origin_name
    context = ("objects", "hand")
    told = moment.target is not None and rng.random() < 1 / 3
    if told:
        thing = moment.target
        text = f"Where is what the hand is going for, seen from {origin}?"
        context = ("instruction", "hand", "primitive", "target", "target from hand")
    else:
        text = pick(
            rng,
            [
                f"Where is the {thing.name}, seen from {origin}?",
                f"How far is the {thing.name} from {origin}, in cm?",
            ],
        )
    return Asked(
        text=text,
        hint=number_hint(moment),
        answer=centimetres(thing.place),
        conclusion=object_place(moment, rng, thing),
        options=place_options(moment, rng, thing.place, rng.permutation(others)),
        context=context,
        score="number",
        more={"tolerance": 2},
        told=told or moment.has_twins,
    )


class Which(NamedTuple):
    """A question that one of several objects answers."""

    text: str
    right: Thing
    reason: str  # a thought that ends with the answer


def nearest_to_hand(moment, rng) -> Which | None:
    distances = [float(np.linalg.norm(thing.place - moment.place)) for thing in moment.objects]
    first, second = np.argsort(distances)[:2]
    if distances[second] < max(distances[first] + 0.02, 1.25 * distances[first]):
        return None
    right, next_one = moment.objects[first], moment.objects[second]
    return Which(
        pick(rng, ["Which object is nearest the hand?", "What is the hand closest to?"]),
        right,
        f"From the hand it is {100 * distances[first]:.0f} cm to the {right.name} and "
        f"{100 * distances[second]:.0f} to the {next_one.name}. The {right.name} is nearest.",
    )


def at_place(moment, rng) -> Which | None:
    right = pick(rng, moment.objects)
    for other in moment.objects:
        if other.index != right.index and np.abs(other.place - right.place).max() < APART:
            return None
    words = place_words(moment, right.place)
    return Which(
        f"What is at {words}, in cm from {moment.world.axes.origin_name}?",
        right,
        f"At {words} there is the {right.name}.",
    )


def at_pixel(moment, rng) -> Which | None:
    """Nothing else shows within 8% of the image along either side."""
    if moment.motion.object_pixel is None:
        return None
    pixels = moment.motion.object_pixel[moment.t]  # (N, 2)
    right = pick(rng, moment.objects)
    pixel = pixels[right.index]
    near = np.abs(pixels - pixel).max(1) < 0.08  # (N,), itself too
    if not in_sight(pixel) or near.sum() != 1:
        return None
    words = point_words([pixel])
    return Which(
        f"What shows at {words} in the image (x, y as shares of its width and height)?",
        right,
        f"At {words} there is the {right.name}.",
    )


def furthest(moment, rng) -> Which | None:
    axis = int(rng.integers(3))
    is_more = bool(rng.integers(2))
    word = moment.world.axes.words[axis][is_more]
    along = [float(thing.place[axis]) * (1 if is_more else -1) for thing in moment.objects]
    second, first = np.argsort(along)[-2:]
    if along[first] < along[second] + APART:
        return None
    right = moment.objects[first]
    places = [object_place(moment, rng, moment.objects[i]) for i in (first, second)]
    return Which(
        pick(rng, [f"Which object is furthest {word}?", f"What lies furthest {word}?"]),
        right,
        f"{' '.join(places)} Furthest {word} is the {right.name}.",
    )


def beside_another(moment, rng) -> Which | None:
    """The only one that lies to one side of another; of three objects or more."""
    axis = int(rng.integers(3))
    is_more = bool(rng.integers(2))
    word = moment.world.axes.words[axis][is_more]
    reference = pick(rng, moment.objects)
    beyond = []
    for thing in moment.objects:
        distance = (thing.place - reference.place)[axis] * (1 if is_more else -1)
        if distance > 0:
            beyond.append((thing, distance))
    if len(moment.objects) < 3 or len(beyond) != 1 or beyond[0][1] < APART:
        return None
    right = beyond[0][0]
    places = [object_place(moment, rng, thing) for thing in (reference, right)]
    return Which(
        f"Which object is further {word} than the {reference.name}?",
        right,
        f"{' '.join(places)} Further {word} is the {right.name}.",
    )


def ask_which(moment, rng) -> Asked | None:
    """Tries the ways below in random order and takes the first that has an answer; None: none
    has."""
    if len(moment.objects) < 2:
        return None
    ways = [nearest_to_hand, at_place, at_pixel, furthest, beside_another]
    for i in rng.permutation(len(ways)):
        which = ways[i](moment, rng)
        if which:
            break
    else:
        return None
    names = [thing.name for thing in moment.objects]
    return Asked(
        text=which.text,
        hint=names_hint(rng, names),
        answer=which.right.name,
        conclusion=which.reason,
        options=name_options(rng, which.right.name, names),
        context=("hand", "objects"),
        told=moment.has_twins,
    )


def ask_relation(moment, rng) -> Asked | None:
    """Along the axis on which two objects are further apart."""
    if len(moment.objects) < 2:
        return None
    first, second = (moment.objects[i] for i in rng.permutation(len(moment.objects))[:2])
    way = first.place - second.place  # (3,)
    axis = int(abs(way).argmax())
    if abs(way[axis]) < APART:
        return None
    low, high = moment.world.axes.words[axis]
    answer, other = (high, low) if way[axis] > 0 else (low, high)
    places = [object_place(moment, rng, thing) for thing in (first, second)]
    return Asked(
        text=f"Which way from the {second.name} is the {first.name}: {low} or {high}?",
        hint="",
        answer=answer,
        conclusion=f"{' '.join(places)} So it is {answer}.",
        options=(answer, [other]),
        context=(),
        told=moment.has_twins,
    )


def target_name(moment: Moment) -> str:
    return moment.target.name if moment.target else ""


def ask_target(moment, rng) -> Asked | None:
    target = moment.target
    if target is None:
        return None
    names = [thing.name for thing in moment.objects]
    return Asked(
        text=pick(rng, ["Which object is the hand going for?", "What is the hand's target?"]),
        hint=names_hint(rng, names),
        answer=target.name,
        conclusion=say(moment, rng, "target"),
        options=name_options(rng, target.name, names),
        context=("instruction", "hand", "primitive", "movement", "waypoint"),
    )


def ask_offset(moment, rng) -> Asked | None:
    """From the hand to an object, half of the time the one that it is going for."""
    if not moment.objects:
        return None
    thing = pick(rng, moment.objects)
    if moment.target and rng.random() < 0.5:
        thing = moment.target
    way = thing.place - moment.place
    words = waypoint_words(moment, way)
    hand_at = say(moment, rng, "hand")
    thing_at = object_place(moment, rng, thing)
    return Asked(
        text=pick(
            rng,
            [
                f"Which way and how far is it from the hand to the {thing.name}?",
                f"How must the hand move to get to the {thing.name}?",
            ],
        ),
        hint=number_hint(moment),
        answer=centimetres(way),
        conclusion=phrase(
            moment,
            rng,
            [
                f"{hand_at} {thing_at} From hand to {thing.name} it is {words}.",
                f"{thing_at} {hand_at} So the {thing.name} is {words} from the hand.",
            ],
        ),
        options=move_options(moment, rng, way, 0.04, waypoint_words),
        context=("objects",),
        score="number",
        more={"tolerance": 2},
        told=moment.has_twins,
    )


def holding(moment: Moment) -> str:
    """What the hand holds; "" when the fingers are closed and it is not known."""
    if moment.held:
        return moment.held.name
    return "" if moment.motion.closed[moment.t] else "nothing"


def ask_holding(moment, rng) -> Asked | None:
    answer = holding(moment)
    if not answer:
        return None
    names = [*(thing.name for thing in moment.objects), "nothing"]
    name = f"the {answer}" if moment.held else answer
    return Asked(
        text=pick(rng, ["What is the hand holding?", "What is between the fingers?"]),
        hint=names_hint(rng, names),
        answer=answer,
        conclusion=phrase(moment, rng, ["It holds {}.", "So {} is held.", "That is {}."]).format(
            name
        ),
        options=name_options(rng, answer, names),
        context=("hand", "primitive", "objects"),
        told=moment.has_twins,
    )


def ask_object_point(moment, rng) -> Asked | None:
    if not moment.objects:
        return None
    thing = pick(rng, moment.objects)
    pixel = moment.motion.object_pixel[moment.t, thing.index]
    asked = pointing(moment, rng, thing.name, pixel, ("objects", "hand"))
    return asked and asked._replace(told=moment.has_twins)


# ---- Kinds ---------------------------------------------------------------------------------------


def most_objects(motion: Motion) -> int:
    """The most that are there at once."""
    return int(np.isfinite(motion.object_position).all(2).sum(1).max())


def ever_in_sight(pixels: np.ndarray | None) -> bool:
    """Whether one of the points (..., 2) lies in the image at any step; None: not known."""
    return pixels is not None and bool(((pixels >= 0) & (pixels <= 1)).all(-1).any())


class Need(NamedTuple):
    """What a kind asks about."""

    met: Callable[[Motion, World], bool]
    cure: str  # how to come by it


NEEDS = {
    "": Need(lambda motion, world: True, ""),
    "instructions": Need(lambda motion, world: len(world.instructions) > 1, "two instructions"),
    "hand pixels": Need(
        lambda motion, world: ever_in_sight(motion.hand_pixel),
        "--camera FILE, or episodes that record hand_pixel, and a hand in sight",
    ),
    "object": Need(lambda motion, world: most_objects(motion) > 0, "episodes that record objects"),
    "objects": Need(
        lambda motion, world: most_objects(motion) > 1, "episodes that record two objects or more"
    ),
    "object pixels": Need(
        lambda motion, world: most_objects(motion) > 0 and ever_in_sight(motion.object_pixel),
        "episodes that record objects in sight and their pixels, or --camera FILE",
    ),
    "free or holding": Need(
        lambda motion, world: (
            most_objects(motion) > 0 and not (motion.closed & (motion.held < 0)).all()
        ),
        "episodes that record objects, and fingers that open or hold one",
    ),
    "targets": Need(
        lambda motion, world: (motion.target >= 0).any() and most_objects(motion) > 1,
        "episodes that record targets among two objects or more",
    ),
}


class Kind(NamedTuple):
    weight: float  # how often, among all kinds
    ask: Callable[..., Asked | None]  # (moment, rng); None: not at this moment
    classes: Callable[[Moment], str] | None = None  # answers of which each is asked as often
    needs: str = ""  # of NEEDS


# fork point: the kinds of questions
KINDS = {
    "position": Kind(2, ask_position),
    "direction": Kind(2, ask_direction),
    "movement": Kind(2, ask_movement),
    "waypoint": Kind(2, ask_waypoint),
    "gripper": Kind(1, ask_gripper, gripper_state),
    "primitive": Kind(1, ask_primitive, lambda moment: moment.motion.primitive[moment.t]),
    "instruction": Kind(1, ask_instruction, needs="instructions"),
    "order": Kind(1, ask_order),
    "progress": Kind(1, ask_progress),
    "point": Kind(1, ask_point, needs="hand pixels"),
    "path": Kind(1, ask_path, needs="hand pixels"),
    "where": Kind(3, ask_where, needs="object"),
    "which": Kind(2, ask_which, needs="objects"),
    "relation": Kind(2, ask_relation, needs="objects"),
    "target": Kind(2, ask_target, target_name, needs="targets"),
    "offset": Kind(2, ask_offset, needs="object"),
    "holding": Kind(1, ask_holding, holding, needs="free or holding"),
    "object_point": Kind(3, ask_object_point, needs="object pixels"),
}


# ---- Rows ----------------------------------------------------------------------------------------

TRIES = 10_000  # to find a moment at which a question can be asked: of some kinds there are few


class Pool(NamedTuple):
    """Episodes of a source that have what a question needs."""

    indices: list[int]
    ends: np.ndarray  # how many steps there are up to the end of each


class Source(NamedTuple):
    """Episodes to ask about."""

    world: World
    motions: list[Motion]
    pools: dict[str, Pool]  # by what is needed, of NEEDS
    first_frame: int  # frames are counted from here
    saved: dict[int, str]  # the path of each frame that is written, by its number


def make_source(world: World, motions: list[Motion], first_frame: int) -> Source:
    pools = {}
    for name, need in NEEDS.items():
        indices = [i for i, motion in enumerate(motions) if need.met(motion, world)]
        ends = np.cumsum([len(motions[i].position) for i in indices], dtype=int)
        pools[name] = Pool(indices, ends)
    return Source(world, motions, pools, first_frame, {})


def parse_shares(text: str, sources: list[Source]) -> dict[str, float]:
    """The value of --shares, "kind:share,...", "" for the weights of KINDS -> shares that sum to 1.
    ValueError for an unknown kind, one that a source cannot answer, a share that is no number."""
    possible = [
        name
        for name, kind in KINDS.items()
        if all(source.pools[kind.needs].indices for source in sources)
    ]
    if text:
        shares = {}
        for item in text.split(","):
            kind, _, share = item.strip().partition(":")
            if kind not in KINDS:
                raise ValueError(f"--shares: no kind {kind!r}; there are {', '.join(KINDS)}")
            if kind not in possible:
                cure = NEEDS[KINDS[kind].needs].cure
                raise ValueError(
                    f"--shares: {kind} needs {cure}, to train on and held out; leave it out or "
                    "give that"
                )
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


def draw_moment(source: Source, rng, needs: str = "", classes=None) -> tuple[int, Moment]:
    """The index of an episode that has what is needed and a step of it, all steps alike; with
    `classes` those of one class of the episode, which is drawn first."""
    pool = source.pools[needs]
    step = int(rng.integers(pool.ends[-1]))
    position = int(np.searchsorted(pool.ends, step, side="right"))
    index = pool.indices[position]
    motion = source.motions[index]
    start = int(pool.ends[position]) - len(motion.position)
    moment = Moment(source.world, motion, step - start)
    if classes is None:
        return index, moment
    by_class = {}
    for t in range(len(motion.position)):
        by_class.setdefault(classes(moment._replace(t=t)), []).append(t)
    drawn_class = pick(rng, sorted(by_class))
    t = pick(rng, by_class[drawn_class])
    return index, moment._replace(t=t)


def save_frames(source: Source, out: Path, index: int, steps) -> list[str]:
    """Writes frames of an episode, those that are not there yet -> their paths below `out`."""
    motion = source.motions[index]
    start = source.first_frame + int(source.pools[""].ends[index]) - len(motion.position)
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
    name = str(rng.choice(list(shares), p=list(shares.values())))
    kind = KINDS[name]
    for _ in range(TRIES):
        index, moment = draw_moment(source, rng, kind.needs, kind.classes)
        asked = kind.ask(moment, rng)
        if asked:
            break
    else:
        raise ValueError(
            f"{source.motions[0].file.path.parent}: found no step for a question of kind {name}; "
            "leave it out of --shares, or change --ahead"
        )
    # 2. how
    has_thought = bool(rng.random() < 0.5)
    is_choice = bool(asked.options and rng.random() < 0.5)
    more = {"score": asked.score, **asked.more}
    ending = asked.hint
    answer = asked.answer
    if is_choice:
        ending, answer = multiple_choice(rng, *asked.options)
        more = {"score": "choice"}
        if source.world.thought_style == "varied" and rng.random() < 0.5:
            asked = asked._replace(conclusion=f"{asked.conclusion} That is {answer}.")
    text = f"{asked.text} {ending}".strip()
    if asked.told:
        text = f"Instruction: {moment.task}\n{text}"
    reason = thought(moment, rng, asked) if has_thought else None
    # 3. the line
    frames = save_frames(source, out, index, asked.steps or [moment.t])
    way = name + ("+choice" if is_choice else "") + ("+think" if has_thought else "")
    line = json_row(frames, [Question(text, reason, answer)], kind=way, **more)
    return Row(line, name, has_thought, is_choice)


def action_thought(moment: Moment, rng) -> str:
    """The thought before the next actions: phase and direction, after some facts; where the target
    is known always after its place, the hand's and the hand's state."""
    if moment.world.thought_style != "varied":
        return plan_thought(moment)
    primitive = moment.motion.primitive[moment.t]
    move = move_words(moment, moment.move_to(moment.later))
    fingers = {
        "open": "keep the fingers open",
        "closed": "keep the fingers closed",
        "about to open": "open the fingers",
        "about to close": "close the fingers",
    }[gripper_state(moment)]
    if moment.target:
        further = ["instruction", "waypoint", "target from hand"]
        drawn = [further[i] for i in rng.permutation(len(further))[: rng.integers(3)]]
        lead = say_all(moment, rng, ["target", "hand", *drawn])
        endings = [
            f"Now {primitive}: {move}, {fingers}.",
            f"The phase is {primitive}, so move {move} and {fingers}.",
            f"To {primitive}, {fingers} and go {move}.",
            f"It is time to {primitive}. Move {move}; {fingers}.",
        ]
        return f"{lead} {pick(rng, endings)}"
    endings = [
        f"Now {primitive}: {move}, {fingers}.",
        f"So move {move} and {fingers}.",
        f"Next: {fingers} and go {move}.",
    ]
    ending = pick(rng, endings)
    context = ["instruction", "position", "gripper", "primitive", "waypoint"]
    n = int(rng.integers(1, 4))
    facts = [context[i] for i in rng.permutation(len(context))[:n]]
    return " ".join([*(say(moment, rng, fact) for fact in facts), ending])


def make_thought_action(source: Source, out: Path, horizon: int, rng) -> str:
    """A line of thought_actions.jsonl: a thought, then the next actions (`horizon` x A). What the
    last action led to is not recorded, so only the expert's own thought is learned before it."""
    says_the_last = source.world.thought_style == "recorded"
    while True:
        index, moment = draw_moment(source, rng)
        file = moment.motion.file
        is_last = moment.t == len(file) - 1
        if moment.t in chunk_starts(file, horizon) and (says_the_last or not is_last):
            break
    reason = action_thought(moment, rng)
    chunk = action_chunks(file, horizon)[moment.t].astype(float).round(6).tolist()
    frames = save_frames(source, out, index, [moment.t])
    question = Question(action_question(moment.task), reason, "<ACTION>")
    return json_row(frames, [question], chunk=chunk)


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
    print(f"axes: {path}")
    axes = read_axes(path, state_dim, files[0].action.shape[1])
    camera = read_camera(args.camera) if args.camera else None
    if args.thought_style == "recorded":
        for file in files:
            if file.thoughts is None:
                raise ValueError(
                    f"{file}: no thoughts are recorded; record them, or name another style"
                )
    instructions = sorted({file.task.strip() for file in files})
    world = World(axes, instructions, args.thought_style)
    train_files, held_files = split_episodes(files)
    sources = []
    first_frame = 0
    for part_files in (train_files, held_files):
        motions = [read_motion(file, axes, args.ahead, camera) for file in part_files]
        sources.append(make_source(world, motions, first_frame))
        first_frame += sum(len(file) for file in part_files)
    train, held = sources
    shares = parse_shares(args.shares, sources if args.held_rows else [train])

    # 2. frames, and the lines in memory
    out = Path(args.out)
    report = {
        "data": str(args.data),
        "axes": str(path),
        "seed": args.seed,
        "train_episodes": len(train_files),
        "held_out_episodes": len(held_files),
        "episodes_with_objects": sum(bool(file.objects) for file in files),
        "instructions": len(world.instructions),
        "thought_style": args.thought_style,
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
    add("--camera", default="", help="its 3x4 matrix, .json; empty: pixels that are recorded")
    add("--shares", default="", help="kind:share,... of the rows; empty: all kinds")
    add("--ahead", type=positive, default=0.4, help="seconds that `next` means")
    add("--thought-actions", type=natural, default=0, help="rows of thought_actions.jsonl")
    add(
        "--thought-style",
        default="varied",
        choices=list(THOUGHT_STYLES),
        help="; ".join(f"{name}: {style}" for name, style in THOUGHT_STYLES.items()),
    )
    add("--horizon", type=count, default=5, help="actions in each, as of the FAST tokenizer")
    add("--seed", type=natural, default=0)
    args = parser.parse_args(argv)
    out = Path(args.out)
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir():
        raise SystemExit(f"error: {existing} is a file, no folder to write in; name another --out")
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
