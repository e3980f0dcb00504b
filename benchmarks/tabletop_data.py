"""What Tabletop is learned from: questions with thoughts, demonstrations, and the command that writes them.

    python -m benchmarks.tabletop_data --out data/tabletop --episodes 600 --conversations 20000 --seed 0

writes episodes/episode_*.safetensors, episodes/stats.json, conversations.jsonl and frames/*.png
(formats: docs/data.md). The same seed gives the same bytes at any number of workers.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import pathlib

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.tabletop import EDGE, OBJECTS, SUITES, Tabletop, suite_tasks
from fast_tokenizer import write_episodes

ACTION_QUESTION = "What should the robot do next?"  # as model.action_question asks it


# ---- questions and answers from the ground-truth state


def cell(x, y):
    """Name of the 5 cm cell at (x, y): column a-h left to right, row 1-8 back to front."""
    column, row = (min(max(int((v + EDGE) / 0.05), 0), 7) for v in (x, y))
    return f"{'abcdefgh'[column]}{row + 1}"


def everything(env, key=lambda t: 0):
    """[(name, x, y)] of the things, in the order of `key`, and of what is fixed."""
    fixed = {"plate": env.plate, "button": env.button, "drawer handle": env.handle()}
    places = [*((t.name, t.at) for t in sorted(env.things, key=key)), *fixed.items()]
    return [(name, *spot) for name, spot in places if spot]


def named_places(env):
    """[(name, x, y)] of everything on the table that has a name of its own."""
    names = [thing.name for thing in env.things]
    return [place for place in everything(env) if names.count(place[0]) < 2]


def hand(env):
    """The gripper in words: cell, height, what it does."""
    height = "low" if env.pos[2] < 0.04 else "mid" if env.pos[2] < 0.08 else "high"
    grip = "open" if env.aperture > 0.5 else "closed"
    if env.held:
        grip = "holding the " + ("handle" if env.held == "drawer" else env.held.name)
    return cell(*env.pos[:2]), height, grip


def heading(plan):
    """The expert's next move in words: "right 11, front 4, down 8, open", in centimetres."""
    sides = ("left", "right"), ("back", "front"), ("down", "up")
    words = [
        f"{plus if delta > 0 else minus} {count}"
        for delta, (minus, plus) in zip(plan["move"], sides)
        if (count := int(100 * abs(delta) + 0.5))
    ]
    return ", ".join([*words, "close" if plan["grip"] > 0 else "open"])


def thought(env, plan):
    """The reasoning before a move: target, its place, the gripper's, the phase, the direction."""
    target = {"drawer": "handle", "gripper": "drop spot"}.get(plan["target"], plan["target"])
    return (
        f"The {target} is at {cell(*plan['at'])}. The gripper is at {', '.join(hand(env))}. "
        f"Now {plan['phase']}: {heading(plan)}."
    )


def point(x, y):
    """A place in whole centimetres from the left and the back edge: "17 32"."""
    return f"{100 * (x + EDGE):.0f} {100 * (y + EDGE):.0f}"


def caption(env, place=cell):
    """Everything on the table in words, each with its place, in the order of cells."""
    places = everything(env, lambda t: (cell(*t.at), t.name, t.x, t.y))
    words = [f"{name} {place(x, y)}" for name, x, y in places]
    words.append(" ".join(("gripper", place(*env.pos[:2]), *hand(env)[1:])))
    return ", ".join(words + ["light on"] * env.lit)


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def _choices(rng, right, wrong):
    """Shuffle one right and two wrong options into "A) ... B) ... C) ..." and the right letter."""
    options = [right, *[w for w in dict.fromkeys(wrong) if w != right][:2]]
    order = rng.permutation(len(options))
    text = " ".join(f"{'ABC'[i]}) {options[j]}" for i, j in enumerate(order))
    return text, "ABC"[list(order).index(0)]


# kind of question -> weight. Each is asked both ways, directly and with a thought.
SCENE = {
    "where": 4,
    "what": 4,
    "relation": 2,
    "holding": 1,
    "gripper": 2,
    "choice": 1,
    "caption": 4,
    "point": 4,
    "points": 5,
}
TASK = {"target": 2, "direction": 8, "phase": 1, "fingers": 1, "movement": 1, "trajectory": 2}


def scene_question(kind, env, rng):
    """A question about what the image shows -> (question, thought, answer)."""
    places, gripper = named_places(env), ", ".join(hand(env))
    if kind == "where":
        name, x, y = _pick(rng, places)
        return f"Where is the {name}?", f"The {name} is at {cell(x, y)}.", cell(x, y)
    if kind == "point":
        name, x, y = _pick(rng, [*places, ("gripper", *env.pos[:2])])
        return f"Point to the {name}.", f"The {name} is at {cell(x, y)}.", point(x, y)
    if kind == "choice":
        name, *spot = _pick(rng, places)
        others = [p[0] for p in places] + list(rng.permutation(OBJECTS))
        there = [n for n, *at in places if cell(*at) == cell(*spot)]
        wrong = [str(o) for o in rng.permutation(others) if o not in there]
        text, letter = _choices(rng, name, wrong)
        where = cell(*spot)
        return f"Which one is at {where}? {text}", f"At {where} there is {name}.", letter
    if kind == "what":
        _, *spot = _pick(rng, everything(env)[: len(env.things)] + places[-3:])
        where = cell(*(rng.uniform(-EDGE, EDGE, 2) if rng.random() < 0.15 else spot))
        there = [n for n, *at in everything(env, lambda t: -t.z) if cell(*at) == where]
        answer = there[0] if there else "nothing"
        return f"What is at {where}?", f"At {where} there is {answer}.", answer
    if kind == "relation":
        (a, ax, ay), (b, bx, by) = (places[i] for i in rng.permutation(len(places))[:2])
        wide = abs(ax - bx) > abs(ay - by)
        low, high = ("left", "right") if wide else ("behind", "in front")
        return (
            f"Is the {a} {low} or {high} of the {b}?",
            f"The {a} is at {cell(ax, ay)}. The {b} is at {cell(bx, by)}.",
            low if (ax < bx if wide else ay < by) else high,
        )
    held = gripper.partition("holding the ")[2]
    question, answer = {
        "holding": ("What is the gripper holding?", held or "nothing"),
        "gripper": ("Where is the gripper?", gripper),
        "caption": ("Describe the scene.", caption(env)),
        "points": ("Point to everything.", caption(env, point)),
    }[kind]
    return question, f"The gripper is at {gripper}.", answer


def task_question(kind, env, rng):
    """A question about the expert's next move -> (question, thought, answer)."""
    _, plan = env.expert()
    if kind == "movement":
        wrong = []
        for _ in range(4):
            move = plan["move"] * rng.choice([-1.0, 1.0, 0.0], 3) + rng.normal(0, 0.05, 3)
            wrong.append(heading({"move": move, "grip": rng.choice([-1, 1])}))
        text, answer = _choices(rng, heading(plan), wrong)
        question = f"Which movement is next? {text}"
    elif kind == "trajectory":
        question, ahead, path = "Trace the path of the gripper.", env.clone(), [env.pos]
        for _ in range(12):
            ahead.advance(ahead.expert()[0])
            path.append(ahead.pos)
        answer = " ".join(cell(x, y) for x, y, _ in path[::3])
    else:
        fingers = heading(plan).split(", ")[-1]
        question, answer = {
            "target": ("Where is the target?", cell(*plan["at"])),
            "direction": ("Which way should the gripper move?", heading(plan)),
            "phase": ("Which phase is it?", plan["phase"]),
            "fingers": ("Should the fingers open or close?", fingers),
        }[kind]
    return f"Instruction: {env.instruction}\n{question}", thought(env, plan), answer


def random_state(rng, size=64, tilt=0.0):
    """A scene in the middle of a random task, sometimes disturbed."""
    env = Tabletop(_pick(rng, SUITES), size, tilt)
    env.place(int(rng.integers(10)), int(rng.integers(1 << 40)), "train")
    if rng.random() < 0.4:  # anywhere above the table
        env.pos = rng.uniform([-0.19, -0.19, 0.015], [0.19, 0.19, 0.15])
        env.aperture = float(rng.random() < 0.6)
        env._push()
    env.lit = bool(rng.random() < 0.3 and env.button)
    for _ in range(int(rng.integers(0, 30))):
        twin = env.clone()
        if env.advance(env.expert()[0]):
            return twin  # a finished task has no next move
    return env


def conversation(seed, number, size=64, tilt=0.0):
    """Conversation `number`: (image, [(kind, question, thought or None, answer), ...])."""
    rng = np.random.default_rng([3, seed, number])
    env = random_state(rng, size, tilt)
    kinds = SCENE | TASK
    shares = np.array(list(kinds.values())) / sum(kinds.values())
    count = 1 if number % 4 == 0 else 5  # a quarter of single questions, held-out scores use those
    turns = []
    for kind in rng.choice(list(kinds), count, replace=False, p=shares).tolist():
        ask = scene_question if kind in SCENE else task_question
        question, reason, answer = ask(kind, env, rng)
        turns.append((kind, question, reason if rng.random() < 0.5 else None, answer))
    turns.sort(key=lambda turn: turn[0] in ("caption", "points"))  # the rest could be copied
    return env.render(), turns


# ---- writing the data


def record(suite, task, seed, noise, size=64, tilt=0.0):
    """One demonstration: dict of arrays, or None when the expert failed. Some are disturbed: the
    recorded actions are always the expert's for the state seen, but disturbed steps execute a
    random push, so that demonstrations contain recoveries (as in DART, arXiv 1703.09327)."""
    env = Tabletop(suite, size, tilt)
    env.place(task, seed, "train")
    rng = np.random.default_rng([4, SUITES.index(suite), task, seed])
    disturbed, left = rng.random() < 0.5, 0
    rows, success = [], False
    while not success and env.steps < env.limit:
        obs, (action, _) = env.observe(), env.expert()
        rows.append((obs["image"], obs["state"], action.astype(np.float32)))
        if disturbed and left == 0 and rng.random() < noise:
            left, push = int(rng.integers(2, 5)), rng.uniform(-1, 1, 3)
        if left:
            action = np.concatenate([push, action[3:]])
            left -= 1
        success = env.advance(action)
    arrays = zip(("image", "state", "action"), map(np.stack, zip(*rows)))
    return dict(arrays) if success else None


def _episode_job(args, number):
    """Demonstration `number` -> how many failed ones were dropped before it, arrays, header."""
    suite, task = SUITES[number % 4], number // 4 % 10
    header = {
        "task": suite_tasks(suite)[task][0],
        "fps": "5",
        "source": f"tabletop {suite} task {task}",
    }
    for dropped in itertools.count():
        seed = (args.seed << 24) + (number << 4) + dropped
        if arrays := record(suite, task, seed, args.noise, args.size, args.tilt):
            return dropped, arrays, header


def _rows(args, folder, number, image, groups):
    """Save a frame -> lines of JSON about it. groups: ([(question, thought or None, answer), ...],
    what more the line holds) of each."""
    name, lines = f"{folder}/{number // 1000:04d}/{number:07d}.png", []
    path = pathlib.Path(args.out) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)
    for turns, more in groups:
        messages = []
        for question, reason, answer in turns:
            question = question if messages else "<image>" + question
            think = f"<think>{reason}</think>" if reason else ""
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"{think}<answer>{answer}</answer>"},
            ]
        lines.append(json.dumps({"images": [name], "messages": messages, **more}) + "\n")
    return "".join(lines)


def _conversation_job(args, number):
    image, turns = conversation(args.seed, number, args.size, args.tilt)
    groups = [([turn], {"kind": kind + "+think" * bool(turn[1])}) for kind, *turn in turns]
    if len(turns) > 1 and not args.single:
        groups = [([turn for _, *turn in turns], {})]
    return _rows(args, "frames", number, image, groups)


def _thought_action_job(args, number):
    """A thought followed by the expert's next actions: not in the paper's data, see sft.py."""
    env = random_state(np.random.default_rng([5, args.seed, number]), args.size, args.tilt)
    image, question = env.render(), f"Instruction: {env.instruction}\n{ACTION_QUESTION}"
    turn, chunk = (question, thought(env, env.expert()[1]), "<ACTION>"), []
    while len(chunk) < args.horizon:
        chunk.append(env.expert()[0].round(4).tolist())
        if env.advance(chunk[-1]):  # past the end an episode's last action repeats
            chunk += [chunk[-1]] * (args.horizon - len(chunk))
    return _rows(args, "thought_frames", number, image, [([turn], {"chunk": chunk})])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tabletop_data", description=__doc__)
    add = parser.add_argument
    add("--out", required=True, help="folder to write")
    add("--episodes", type=int, default=600, help="demonstrations, spread over the 40 tasks")
    add("--conversations", type=int, default=20000, help="rows of conversations.jsonl")
    add("--single", action="store_true", help="each question of a conversation in its own row")
    add("--thought-actions", type=int, default=0, help="rows of thought_actions.jsonl, see README")
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

        def made(job, count):
            return pool.imap(functools.partial(job, args), range(count), 8)

        if args.episodes:
            write_episodes(
                out / "episodes",
                (
                    dropped.append(count) or episode
                    for count, *episode in made(_episode_job, args.episodes)
                ),
            )
        for name, job, count in (
            ("conversations", _conversation_job, args.conversations),
            ("thought_actions", _thought_action_job, args.thought_actions),
        ):
            if count:
                with open(out / f"{name}.jsonl", "w") as f:
                    f.writelines(tqdm(made(job, count), name, count, disable=None))
    print(f"{out}: {sum(dropped)} failed demonstrations dropped, {args.conversations} rows")


if __name__ == "__main__":
    main()
