"""What Tabletop is learned from: questions with thoughts, demonstrations, their command.

    python -m benchmarks.tabletop_data --out data/tabletop --episodes 600 --conversations 20000

writes episodes/episode_*.safetensors (with what is where, and the expert's thoughts),
episodes/stats.json, conversations.jsonl, thought_actions.jsonl and their frames/*/*.png (formats:
docs/data.md). The same seed gives the same bytes at any number of workers.

In the order of the file: words for what is on the table and for the expert's plan; questions, a
function for each kind; demonstrations; rows of the .jsonl files; the command. Who wants another
kind of question adds a function and a line to SCENE or TASK.
"""

import argparse
import functools
import json
import math
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.simulate import distinct
from benchmarks.tabletop import EDGE, GOALS, HANDLE, OBJECTS, SIZE, SUITES, Plan, Tabletop
from fast_tokenizer import (
    Recording,
    action_question,
    count,
    hold_still,
    natural,
    non_negative,
    share,
    write_episodes,
)

# ---- Words ---------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where something is, m."""

    name: str
    x: float
    y: float


def cell(x: float, y: float) -> str:
    """Name of the 5 cm cell at (x, y): column a-h left to right, row 1-8 back to front.

    (-0.2, -0.2) is in a1, (0.2, 0.2) in h8."""
    column = min(max(int((x + EDGE) / 0.05), 0), 7)
    row = min(max(int((y + EDGE) / 0.05), 0), 7)
    return f"{'abcdefgh'[column]}{row + 1}"


def centimetres(x: float, y: float) -> str:
    """A place in whole centimetres from the left and the back edge: "17 32"."""
    return f"{100 * (x + EDGE):.0f} {100 * (y + EDGE):.0f}"


def everything(env: Tabletop, key=None) -> list[Place]:
    """The things, in the order of `key` (none: their own), then what is fixed."""
    things = env.things if key is None else sorted(env.things, key=key)
    places = [Place(thing.name, *thing.xy) for thing in things]
    fixed = {"plate": env.plate, "button": env.button, "drawer handle": env.handle()}
    for name, spot in fixed.items():
        if spot:
            places.append(Place(name, *spot))
    return places


def named_places(env: Tabletop) -> list[Place]:
    """Everything on the table that has a name of its own."""
    names = [thing.name for thing in env.things]
    return [place for place in everything(env) if names.count(place.name) < 2]


def gripper_words(env: Tabletop) -> tuple[str, str, str]:
    """The gripper in words: cell, height, what it does."""
    x, y, z = env.gripper_xyz
    if z < 0.04:
        height = "low"
    else:
        height = "mid" if z < 0.08 else "high"
    if env.held is None:
        doing = "open" if env.aperture > 0.5 else "closed"
    else:
        doing = "holding the " + ("handle" if env.held == "drawer" else env.held.name)
    return cell(x, y), height, doing


DIRECTIONS = (("left", "right"), ("back", "front"), ("down", "up"))  # of lesser, greater x, y, z


def displacement(move, directions=DIRECTIONS) -> list[str]:
    """A move (3,), m, in words, in whole centimetres: ["right 11", "front 4", "down 8"]."""
    words = []
    for delta, (minus, plus) in zip(move, directions, strict=True):
        count = int(100 * abs(delta) + 0.5)
        if count:
            words.append(f"{plus if delta > 0 else minus} {count}")
    return words


def heading(move, fingers: float, directions=DIRECTIONS) -> str:
    """A move (3,) in words, in centimetres: "right 11, front 4, down 8, open"."""
    return ", ".join([*displacement(move, directions), "close" if fingers > 0 else "open"])


def plan_words(target: str, target_place: str, gripper: str, phase: str, heading: str) -> str:
    """The shape of a thought before a move; without a target its sentence is left out."""
    sentences = [f"The gripper is at {gripper}.", f"Now {phase}: {heading}."]
    if target:
        sentences.insert(0, f"The {target} is at {target_place}.")
    return " ".join(sentences)


def thought(env: Tabletop, plan: Plan) -> str:
    """The reasoning before a move: target, its place, the gripper's, the phase, the direction."""
    target = {"drawer": "handle", "gripper": "drop spot"}.get(plan.target, plan.target)
    return plan_words(
        target,
        cell(*plan.target_xy),
        ", ".join(gripper_words(env)),
        plan.phase,
        heading(plan.move, plan.fingers),
    )


THOUGHT_KINDS = {  # what rows of thought_actions.jsonl think before they act
    "plan": thought,
    "scene": lambda env, plan: f"{caption(env)}.",
    "task": lambda env, plan: f"{env.instruction}.",
}


class ParsedThought(NamedTuple):
    """What thought() says, taken apart."""

    target: str
    target_cell: str
    gripper_cell: str
    height: str
    doing: str
    phase: str
    move: tuple[float, float, float]  # along x, y, z, whole cm
    fingers: str


UNREADABLE = ParsedThought(*[""] * 6, (math.nan, math.nan, math.nan), "")  # equal to no other
MOVE = "".join(rf"(?:({minus}|{plus}) (\d+), )?" for minus, plus in DIRECTIONS)
THOUGHT = re.compile(
    r"The ([a-z ]+) is at ([a-h][1-8])\. "
    r"The gripper is at ([a-h][1-8]), (low|mid|high), ([a-z ]+)\. "
    rf"Now ([a-z]+): {MOVE}(open|close)\."
)


def parse_thought(text: str) -> ParsedThought:
    """The reverse of thought(). UNREADABLE when the text is not of that form."""
    match = THOUGHT.fullmatch(text.strip())
    if match is None:
        return UNREADABLE
    *words, fingers = match.groups()
    move = []
    for axis, (minus, _) in enumerate(DIRECTIONS):
        direction, count = words[6 + 2 * axis : 8 + 2 * axis]
        distance = int(count or 0)
        move.append(-distance if direction == minus else distance)
    return ParsedThought(*words[:6], tuple(move), fingers)


def statements(text: str, true_text: str) -> dict[str, bool]:
    """Which statements of a thought are true, by name; true_text: the one that is right here.

    The target's cell is right only for the right target. Of each axis "x", "y", "z" of the move:
    "... sign" (0 cm has a sign of its own), and "... within 2 cm". A thought that cannot be read
    states nothing true. ValueError when true_text cannot be read."""
    stated = parse_thought(text)
    true = parse_thought(true_text)
    if true is UNREADABLE:
        raise ValueError(f"no thought of Tabletop: {true_text!r}; record the episodes again")
    is_true = {
        "target": stated.target == true.target,
        "target cell": (stated.target, stated.target_cell) == (true.target, true.target_cell),
        "gripper cell": stated.gripper_cell == true.gripper_cell,
        "height": stated.height == true.height,
        "doing": stated.doing == true.doing,
        "phase": stated.phase == true.phase,
    }
    for axis, stated_cm, true_cm in zip("xyz", stated.move, true.move, strict=True):
        is_true[f"{axis} sign"] = bool(np.sign(stated_cm) == np.sign(true_cm))
        is_true[f"{axis} within 2 cm"] = abs(stated_cm - true_cm) <= 2
    is_true["fingers"] = stated.fingers == true.fingers
    return is_true


def caption(env: Tabletop, where=cell) -> str:
    """Everything on the table in words, each with its place (cell or centimetres), by cells."""
    places = everything(env, lambda thing: (cell(*thing.xy), thing.name, thing.x, thing.y))
    words = [f"{place.name} {where(place.x, place.y)}" for place in places]
    _, height, doing = gripper_words(env)
    x, y, _ = env.gripper_xyz
    words.append(f"gripper {where(x, y)} {height} {doing}")
    if env.button_lit:
        words.append("light on")
    return ", ".join(words)


# ---- Questions -----------------------------------------------------------------------------------


class Question(NamedTuple):
    text: str
    thought: str | None  # None: answered directly
    answer: str


def pick(rng, options):
    return options[int(rng.integers(len(options)))]


def multiple_choice(rng, right: str, wrong: list[str]) -> tuple[str, str]:
    """Shuffle one right and two wrong options -> "A) ... B) ... C) ...", the right letter."""
    distinct = [option for option in dict.fromkeys(wrong) if option != right]
    options = [right, *distinct[:2]]
    order = list(rng.permutation(len(options)))
    text = " ".join(f"{'ABC'[i]}) {options[j]}" for i, j in enumerate(order))
    return text, "ABC"[order.index(0)]


def where_is(env, rng) -> Question:
    name, x, y = pick(rng, named_places(env))
    return Question(f"Where is the {name}?", f"The {name} is at {cell(x, y)}.", cell(x, y))


def what_is_at(env, rng) -> Question:
    """A cell with something in it, or any; of several things in it, the highest."""
    things = everything(env)[: len(env.things)]
    fixed = named_places(env)[-3:]  # plate, button, handle; for a missing one a thing comes again
    _, x, y = pick(rng, things + fixed)
    if rng.random() < 0.15:
        x, y = rng.uniform(-EDGE, EDGE, 2)
    here = cell(x, y)
    highest_first = everything(env, lambda thing: -thing.z)
    there = [place.name for place in highest_first if cell(place.x, place.y) == here]
    answer = there[0] if there else "nothing"
    return Question(f"What is at {here}?", f"At {here} there is {answer}.", answer)


def which_one(env, rng) -> Question:
    """Multiple choice of names; wrong are those that are not in the cell, but for a red cube
    without a name of its own (4 of 1,500 questions have two right options)."""
    places = named_places(env)
    right = pick(rng, places)
    here = cell(right.x, right.y)
    there = [place.name for place in places if cell(place.x, place.y) == here]
    names = [place.name for place in places] + list(rng.permutation(OBJECTS))
    wrong = [str(name) for name in rng.permutation(names) if name not in there]
    options, letter = multiple_choice(rng, right.name, wrong)
    return Question(
        f"Which one is at {here}? {options}", f"At {here} there is {right.name}.", letter
    )


def relation_of_two(env, rng) -> Question:
    """Along the axis on which they are further apart."""
    places = named_places(env)
    first, second = (places[i] for i in rng.permutation(len(places))[:2])
    if abs(first.x - second.x) > abs(first.y - second.y):
        low, high = "left", "right"
        first_is_low = first.x < second.x
    else:
        low, high = "behind", "in front"
        first_is_low = first.y < second.y
    return Question(
        f"Is the {first.name} {low} or {high} of the {second.name}?",
        f"The {first.name} is at {cell(first.x, first.y)}. "
        f"The {second.name} is at {cell(second.x, second.y)}.",
        low if first_is_low else high,
    )


def point_to(env, rng) -> Question:
    x, y, _ = env.gripper_xyz
    name, x, y = pick(rng, [*named_places(env), Place("gripper", x, y)])
    return Question(f"Point to the {name}.", f"The {name} is at {cell(x, y)}.", centimetres(x, y))


def gripper_thought(env) -> str:
    return f"The gripper is at {', '.join(gripper_words(env))}."


def what_is_held(env, rng) -> Question:
    _, _, doing = gripper_words(env)
    held = doing.partition("holding the ")[2]
    return Question("What is the gripper holding?", gripper_thought(env), held or "nothing")


def where_is_the_gripper(env, rng) -> Question:
    answer = ", ".join(gripper_words(env))
    return Question("Where is the gripper?", gripper_thought(env), answer)


def describe(env, rng) -> Question:
    return Question("Describe the scene.", gripper_thought(env), caption(env))


def point_to_everything(env, rng) -> Question:
    return Question("Point to everything.", gripper_thought(env), caption(env, centimetres))


def where_is_the_target(env, rng, plan) -> tuple[str, str]:
    return "Where is the target?", cell(*plan.target_xy)


def which_direction(env, rng, plan) -> tuple[str, str]:
    return "Which way should the gripper move?", heading(plan.move, plan.fingers)


def which_phase(env, rng, plan) -> tuple[str, str]:
    return "Which phase is it?", plan.phase


def open_or_close(env, rng, plan) -> tuple[str, str]:
    return "Should the fingers open or close?", "close" if plan.fingers > 0 else "open"


def which_movement(env, rng, plan) -> tuple[str, str]:
    """Multiple choice; the wrong ones turn the right one round, axis by axis, and disturb it."""
    wrong = []
    for _ in range(4):
        move = plan.move * rng.choice([-1.0, 1.0, 0.0], 3) + rng.normal(0, 0.05, 3)
        fingers = rng.choice([-1, 1])
        wrong.append(heading(move, fingers))
    options, letter = multiple_choice(rng, heading(plan.move, plan.fingers), wrong)
    return f"Which movement is next? {options}", letter


def trace_the_path(env, rng, plan) -> tuple[str, str]:
    """The cells of the gripper now and every third of the next 12 steps."""
    ahead = env.clone()
    path = [env.gripper_xyz]
    for _ in range(12):
        ahead.advance(ahead.expert()[0])
        path.append(ahead.gripper_xyz)
    return "Trace the path of the gripper.", " ".join(cell(x, y) for x, y, _ in path[::3])


class Kind(NamedTuple):
    """A kind of question. Each is asked both ways, directly and with a thought."""

    weight: int  # how often, among all kinds
    ask: Callable  # SCENE: (env, rng) -> Question; TASK: (env, rng, plan) -> question, answer
    score: dict  # by what its answers are scored: fields of a row, see grpo.SCORES


EXACT = {"score": "exact"}
CHOICE = {"score": "choice"}
LIST = {"score": "items"}
CELLS = {"score": "path", "grid": [8, 8]}  # as cell() names them

# tolerances are in centimetres; a thing is about 4 cm wide
SCENE = {  # what the image shows
    "where": Kind(4, where_is, EXACT),
    "what": Kind(4, what_is_at, EXACT),
    "relation": Kind(2, relation_of_two, EXACT),
    "holding": Kind(1, what_is_held, EXACT),
    "gripper": Kind(2, where_is_the_gripper, LIST),
    "choice": Kind(1, which_one, CHOICE),
    "caption": Kind(4, describe, LIST),
    "point": Kind(4, point_to, {"score": "number", "tolerance": 2}),
    "points": Kind(5, point_to_everything, {**LIST, "tolerance": 2}),
}
TASK = {  # the expert's next move
    "target": Kind(2, where_is_the_target, EXACT),
    "direction": Kind(8, which_direction, {**LIST, "tolerance": 1}),
    "phase": Kind(1, which_phase, EXACT),
    "fingers": Kind(1, open_or_close, EXACT),
    "movement": Kind(1, which_movement, CHOICE),
    "trajectory": Kind(2, trace_the_path, CELLS),
}


def ask(kind: str, env: Tabletop, rng) -> Question:
    """A question of that kind about the present state, with its thought."""
    if kind in SCENE:
        return SCENE[kind].ask(env, rng)
    _, plan = env.expert()
    question, answer = TASK[kind].ask(env, rng, plan)
    text = f"Instruction: {env.instruction}\n{question}"
    return Question(text, thought(env, plan), answer)


def random_state(rng, size: int = 64, tilt: float = 0.0) -> Tabletop:
    """A scene in the middle of a random task, sometimes disturbed."""
    env = Tabletop(pick(rng, SUITES), size, tilt)
    env.place(int(rng.integers(10)), int(rng.integers(1 << 40)), "train")
    if rng.random() < 0.4:  # the gripper anywhere above the table
        env.gripper_xyz = rng.uniform([-0.19, -0.19, 0.015], [0.19, 0.19, 0.15])
        env.aperture = float(rng.random() < 0.6)
        env.push_things()
    env.button_lit = bool(rng.random() < 0.3 and env.button)
    for _ in range(int(rng.integers(0, 30))):
        before = env.clone()
        if env.advance(env.expert()[0]):
            return before  # a finished task has no next move (11 of 1,500 were so from the start)
    return env


MOST_BEFORE = 4  # instructions that are carried out before one that carries on


def carry_on(env: Tabletop, rng) -> None:
    """Let the expert carry out other instructions of the goal suite, 1 to MOST_BEFORE of them,
    before env's own is given: it then begins where another ended, as in a chain. CALVIN's
    demonstrations, of play without a reset, do so too (arXiv 2112.03227). The scene may be laid out
    anew for it, and that env's own can be done is not asked: demonstration() drops failures."""
    text = env.instruction
    others = [goal for goal in GOALS if goal != text]
    while True:
        earlier = rng.choice(others, int(rng.integers(1, MOST_BEFORE + 1)), replace=False)
        if all(env.follow(other) for other in earlier) and not env.satisfied(GOALS[text]):
            break
        env.place(int(rng.integers(10)), int(rng.integers(1 << 40)), "train")
    env.instruct(text)


def demonstrated_state(rng, size: int = 64, tilt: float = 0.0, carried_on: float = 0.0) -> Tabletop:
    """A scene on the expert's way to the end of a random task, each of its steps as likely. What
    demonstrations are made of: a random_state() is never late in a task of two goals. carried_on:
    see demonstration(); of such ways some 2% of the expert's fail, which are not dropped here."""
    env = Tabletop(pick(rng, SUITES), size, tilt)
    env.place(int(rng.integers(10)), int(rng.integers(1 << 40)), "train")
    # with carried_on = 0 no number is drawn here, so that what is drawn later stays the same
    if carried_on and env.suite == "goal" and rng.random() < carried_on:
        carry_on(env, rng)
    chosen = env
    for seen in range(1, env.limit + 1):
        # reservoir sampling: the newest takes the place with chance 1 / seen, so all are as likely
        if rng.random() < 1 / seen:
            chosen = env.clone()
        if env.advance(env.expert()[0]):
            break
    return chosen


class Turn(NamedTuple):
    kind: str
    question: Question


def conversation(
    seed: int, number: int, size: int = 64, tilt: float = 0.0
) -> tuple[np.ndarray, list[Turn]]:
    """Conversation `number`: image (size, size, 3) and its turns, half of them with a thought."""
    rng = np.random.default_rng([3, seed, number])
    env = random_state(rng, size, tilt)
    weights = {name: kind.weight for name, kind in (SCENE | TASK).items()}
    shares = np.array(list(weights.values())) / sum(weights.values())
    count = 1 if number % 4 == 0 else 5  # a quarter of single questions, held-out scores use those
    turns = []
    for kind in rng.choice(list(weights), count, replace=False, p=shares).tolist():
        question = ask(kind, env, rng)
        if rng.random() >= 0.5:
            question = question._replace(thought=None)
        turns.append(Turn(kind, question))
    # descriptions come last: the answers to the rest could be copied from them
    turns.sort(key=lambda turn: turn.kind in ("caption", "points"))
    return env.render(), turns


# ---- Demonstrations ------------------------------------------------------------------------------

DELTAS = 6  # of the 7 dimensions of an action the first 6 are movements, which 0 stops


def expert_chunk(env: Tabletop, horizon: int) -> np.ndarray:
    """The expert's next actions (K, 7), to four digits, from the present state, which stays as it
    is. When the task is done the hand holds still."""
    ahead = env.clone()
    actions = []
    is_done = False
    for _ in range(horizon):
        if is_done:
            actions.append(hold_still(actions[-1], DELTAS))
        else:
            actions.append(ahead.expert()[0].round(4))
            is_done = ahead.advance(actions[-1])
    return np.stack(actions)


class Seen(NamedTuple):
    """An object as a recording keeps it."""

    name: str  # its own: of two red cubes, "red cube" and "other red cube"
    position: tuple[float, float, float]  # of its middle, m
    pixel: tuple[float, float]  # shares of the image


def seen_objects(env: Tabletop) -> list[Seen]:
    """The things in their own order, by which the first of two equal ones is the one that an
    instruction means; then plate, button and drawer handle, as far as they are there."""
    seen = []
    names = distinct([thing.name for thing in env.things])
    for name, thing in zip(names, env.things, strict=True):
        middle = (thing.x, thing.y, thing.z + SIZE / 2)
        # pixels as it is drawn: by the height of its bottom
        seen.append(Seen(name, middle, env.pixel(thing.x, thing.y, thing.z)))
    for name, x, y in everything(env)[len(env.things) :]:
        z = HANDLE if name == "drawer handle" else 0.0
        seen.append(Seen(name, (x, y, z), env.pixel(x, y, z)))
    return seen


def demonstration(
    suite: str,
    task: int,
    seed: int,
    noise: float,
    size: int = 64,
    tilt: float = 0.0,
    carried_on: float = 0.0,
) -> Recording | None:
    """image (T, size, size, 3), state (T, 8), action (T, 7), what is known of N objects (formats:
    docs/data.md), and the header of all that; None when the expert failed.

    Some are disturbed: the recorded actions are always the expert's for the state seen, but
    disturbed steps execute a random push, so that demonstrations contain recoveries (as in DART,
    arXiv 1703.09327). noise: the chance a step that a disturbance begins, of 2 to 4 steps.
    carried_on: the chance in the goal suite that it begins where other instructions ended."""
    env = Tabletop(suite, size, tilt)
    env.place(task, seed, "train")
    start_rng = np.random.default_rng([7, task, seed])
    if suite == "goal" and start_rng.random() < carried_on:
        carry_on(env, start_rng)
    rng = np.random.default_rng([4, SUITES.index(suite), task, seed])
    disturbed = rng.random() < 0.5
    steps_left = 0  # of a disturbance
    rows = []  # a dict of arrays a step
    names = [thing.name for thing in seen_objects(env)]
    targets = []
    thoughts = []
    success = False
    while not success and env.steps < env.limit:
        obs = env.observe()
        action, plan = env.expert()
        seen = seen_objects(env)
        row = {
            "image": obs["image"],
            "state": obs["state"],
            "action": action,
            "object_position": [thing.position for thing in seen],
            "object_pixel": [thing.pixel for thing in seen],
            "hand_pixel": env.pixel(*env.gripper_xyz),
        }
        rows.append(row)
        target = {"drawer": "drawer handle"}.get(plan.target, plan.target)
        targets.append(names.index(target) if target in names else -1)  # -1: "gripper"
        thoughts.append(thought(env, plan))
        if disturbed and steps_left == 0 and rng.random() < noise:
            steps_left = int(rng.integers(2, 5))
            push = rng.uniform(-1, 1, 3)
        if steps_left:
            action = np.concatenate([push, action[3:]])
            steps_left -= 1
        success = env.advance(action)
    if not success:
        return None
    arrays = {}
    for name in rows[0]:
        dtype = np.uint8 if name == "image" else np.float32
        arrays[name] = np.array([row[name] for row in rows], dtype)
    header = {
        "task": env.instruction,
        "fps": "5",
        "deltas": str(DELTAS),
        "source": f"tabletop {suite} task {task}",
        "objects": json.dumps(names),
        "targets": json.dumps(targets),
        "thoughts": json.dumps(thoughts),
    }
    return arrays, header


def make_episode(args, number: int) -> tuple[int, dict[str, np.ndarray], dict[str, str]]:
    """Demonstration `number`: how many failures were dropped before it, its arrays and header."""
    suite, task = args.tasks[number % len(args.tasks)]
    dropped = 0
    while True:
        seed = (args.seed << 24) + (number << 4) + dropped
        recording = demonstration(
            suite, task, seed, args.noise, args.size, args.tilt, args.carried_on
        )
        if recording is not None:
            return dropped, *recording
        dropped += 1


# ---- Rows of the .jsonl files --------------------------------------------------------------------


def save_frame(out: str | Path, folder: str, number: int, image: np.ndarray) -> str:
    """Write a frame -> its path below `out`; a folder holds 1,000."""
    name = f"{folder}/{number // 1000:04d}/{number:07d}.png"
    path = Path(out) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)
    return name


def json_row(frames: list[str], questions: list[Question], **more) -> str:
    """One line: a conversation about frames, mostly one. more: what else the row holds."""
    messages = []
    for question in questions:
        text = question.text if messages else "<image>" * len(frames) + question.text
        reason = f"<think>{question.thought}</think>" if question.thought else ""
        answer = f"{reason}<answer>{question.answer}</answer>"
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer})
    return json.dumps({"images": frames, "messages": messages, **more}) + "\n"


def make_conversation(args, number: int) -> str:
    """Lines of conversations.jsonl: one, or with --single one for each question."""
    image, turns = conversation(args.seed, number, args.size, args.tilt)
    frame = save_frame(args.out, "frames", number, image)
    kinds = SCENE | TASK
    if len(turns) > 1 and not args.single:  # RL and evaluation ask the first question of a row
        questions = [turn.question for turn in turns]
        return json_row([frame], questions, **kinds[turns[0].kind].score)
    lines = []
    for kind, question in turns:
        way = f"{kind}+think" if question.thought else kind
        lines.append(json_row([frame], [question], kind=way, **kinds[kind].score))
    return "".join(lines)


def make_thought_action(args, number: int) -> str:
    """A line of thought_actions.jsonl: a thought followed by the expert's next actions; every other
    one from a demonstrated_state(), the rest from a random_state(), which may be off the way. Its
    thought is of each of --thought-kinds in turn.

    Not in the paper's data, see sft.py."""
    rng = np.random.default_rng([5, args.seed, number])
    if number % 2:
        env = demonstrated_state(rng, args.size, args.tilt, args.carried_on)
    else:
        env = random_state(rng, args.size, args.tilt)
    image = env.render()
    _, plan = env.expert()
    kind = args.thought_kinds[number // 2 % len(args.thought_kinds)]
    words = THOUGHT_KINDS[kind](env, plan)
    question = Question(action_question(env.instruction), words, "<ACTION>")
    chunk = expert_chunk(env, args.horizon).tolist()
    frame = save_frame(args.out, "thought_frames", number, image)
    return json_row([frame], [question], chunk=chunk)


# ---- Command -------------------------------------------------------------------------------------

ALL_TASKS = [(suite, task) for task in range(10) for suite in SUITES]


def task_list(text: str) -> list[tuple[str, int]]:
    """For `type=` of argparse: "long:0,goal:3" -> [("long", 0), ("goal", 3)]."""
    tasks = []
    for item in text.split(","):
        suite, _, task = item.partition(":")
        if not task.isdecimal() or (suite, int(task)) not in ALL_TASKS:
            raise argparse.ArgumentTypeError(
                f"{item!r} is no task; name them as long:0 (suites {', '.join(SUITES)}, tasks 0..9)"
            )
        tasks.append((suite, int(task)))
    return tasks


def thought_kinds(text: str) -> list[str]:
    """For `type=` of argparse: "plan,task" -> ["plan", "task"]."""
    kinds = text.split(",")
    for kind in kinds:
        if kind not in THOUGHT_KINDS:
            known = ", ".join(THOUGHT_KINDS)
            raise argparse.ArgumentTypeError(f"{kind!r} is no kind of thought; they are {known}")
    return kinds


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tabletop_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", required=True, help="folder to write")
    add("--episodes", type=natural, default=600, help="demonstrations, spread over the tasks")
    add("--tasks", type=task_list, default=ALL_TASKS, help="of demonstrations: long:0,...; all 40")
    add("--conversations", type=natural, default=20000, help="conversations of several questions")
    add("--single", action="store_true", help="each question of a conversation in its own row")
    add("--thought-actions", type=natural, default=0, help="rows of thought_actions.jsonl")
    add(
        "--thought-kinds",
        type=thought_kinds,
        help="what the thoughts of --thought-actions say, in turn: plan, the default (where the "
        "target and the gripper are, and the move), scene (where everything is), task (the "
        "instruction again)",
    )
    add("--horizon", type=count, default=5, help="actions in each, as of the FAST tokenizer")
    add("--seed", type=natural, default=0, help="training seed; evaluation states have their own")
    add("--noise", type=share, default=0.06, help="chance a step that a disturbance begins")
    add(
        "--carried-on",
        type=share,
        default=0.0,
        help="share of goal-suite tasks that begin where others ended, as those of chains do",
    )
    add("--size", type=count, default=64, help="image side in pixels")
    add("--tilt", type=non_negative, default=0.0, help="0 looks straight down; 0.5 is oblique")
    add("--workers", type=count, default=2, help="processes; the bytes do not depend on it")
    args = parser.parse_args(argv)
    if args.thought_kinds and not args.thought_actions:
        parser.error("--thought-kinds says what --thought-actions N think; give that too")
    args.thought_kinds = args.thought_kinds or ["plan"]
    out = Path(args.out)
    for name in ("conversations", "thought_actions"):
        if (out / f"{name}.jsonl").exists():
            raise SystemExit(f"error: {out} already holds data; name another --out or delete it")
    out.mkdir(parents=True, exist_ok=True)
    dropped = 0

    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:

        def in_order(make, total):
            """make(args, number) of each number, worked out by the pool, 8 at a time."""
            return pool.imap(functools.partial(make, args), range(total), 8)

        def episodes():
            nonlocal dropped
            for dropped_before, arrays, header in in_order(make_episode, args.episodes):
                dropped += dropped_before
                yield arrays, header

        if args.episodes:
            write_episodes(out / "episodes", episodes())
        for name, make, total in (
            ("conversations", make_conversation, args.conversations),
            ("thought_actions", make_thought_action, args.thought_actions),
        ):
            if total:
                with open(out / f"{name}.jsonl", "w") as f:
                    f.writelines(tqdm(in_order(make, total), name, total, disable=None))
    print(f"{out}: {dropped} failed demonstrations dropped, {args.conversations} conversations")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
