"""The embedded world: physics invariants, expert, fixed evaluation states, the data it writes."""

import argparse
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fast_tokenizer
import model
from benchmarks import simulate
from benchmarks import tabletop as tt
from benchmarks import tabletop_data as td

ROOT = Path(tt.__file__).parents[1]


def run_expert(env):
    while env.steps < env.limit:
        if env.advance(env.expert()[0]):
            return True
    return False


@pytest.mark.parametrize("suite", tt.SUITES)
def test_expert_solves_every_task(suite):
    for task in range(10):
        wins = 0
        for seed in range(6):
            env = tt.Tabletop(suite)
            env.place(task, seed, "train")
            wins += run_expert(env)
        assert wins == 6, f"{env.instruction}: {wins} of 6"


@pytest.mark.parametrize("suite", tt.SUITES)
def test_every_task_can_fail(suite):
    """Doing nothing, and moving at random, must not solve a task."""
    for task in range(10):
        for policy in ("still", "random"):
            env = tt.Tabletop(suite)
            env.place(task, 3, "eval")
            rng = np.random.default_rng(task)
            solved = False
            while env.steps < env.limit and not solved:
                solved = env.advance(np.zeros(7) if policy == "still" else rng.uniform(-1, 1, 7))
            assert not solved, f"{policy} solved {env.instruction}"


@pytest.mark.parametrize("suite", tt.SUITES)
def test_nothing_overlaps_at_reset_and_relations_are_true(suite):
    for task in range(10):
        for seed in range(10):
            env = tt.Tabletop(suite)
            env.place(task, seed, "eval")
            spots = [thing.xy for thing in env.things] + [env.plate]
            if env.button:
                spots.append(env.button)
            for a, b in itertools.combinations(spots, 2):
                assert math.dist(a, b) > 0.08
            assert not any(env.satisfied(goal) for goal in env.goals)
            relation = env.tasks[task].relation
            if relation and relation.side == "left of":
                x, _ = env.plate if relation.reference == "plate" else env.button
                assert env.things[0].x < x - 0.03 < x + 0.03 < env.things[1].x


def test_reset_is_a_function_of_suite_task_and_trial():
    def state(split, seed):
        env = tt.Tabletop("goal")
        obs = env.reset(4, seed, split)
        return obs["image"].tobytes() + obs["state"].tobytes()

    assert state("eval", 1) == state("eval", 1) != state("eval", 2)
    assert state("eval", 1) != state("train", 1), "training and evaluation must not share states"


def grasp(env, name):
    """Put the gripper around a thing and close."""
    thing = env.find(name)
    env.gripper_xyz = np.array([thing.x, thing.y, thing.z + 0.02])
    for _ in range(3):
        env.advance([0, 0, 0, 0, 0, 0, 1])
    return thing


def test_grasp_carry_release_by_hand():
    env = tt.Tabletop("goal")
    env.place(0, 0, "train")
    cube = grasp(env, "red cube")
    assert env.held is cube
    x, z = cube.x, env.gripper_xyz[2]
    env.advance([0, 0, 1, 0, 0, 0, 1])
    assert env.gripper_xyz[2] == pytest.approx(z + tt.STEP) and cube.z == pytest.approx(tt.STEP)
    env.advance([1, 0, 0, 0, 0, 0, 1])
    assert cube.x == pytest.approx(x + tt.STEP)
    env.gripper_xyz[:2] = env.plate
    env.advance([0, 0, 0, 0, 0, 0, -1])
    env.advance([0, 0, 0, 0, 0, 0, -1])
    assert env.held is None and cube.on == "plate" and cube.z == 0
    assert env.satisfied(tt.Goal("on", "red cube", "plate"))


def test_grasp_misses_beside_above_or_tilted():
    for offset in ([0.02, 0, 0.02], [0, 0, 0.06]):
        env = tt.Tabletop("goal")
        env.place(0, 0, "train")
        thing = env.find("red cube")
        env.gripper_xyz = np.array([thing.x, thing.y, 0]) + offset
        for _ in range(3):
            env.advance([0, 0, 0, 0, 0, 0, 1])
        assert env.held is None
    env = tt.Tabletop("goal")
    env.place(0, 0, "train")
    env.gripper_rpy[0] = 0.45
    grasp(env, "red cube")
    assert env.held is None


def test_stacking_and_sliding_off():
    env = tt.Tabletop("goal")
    env.place(3, 0, "train")
    red = grasp(env, "red cube")
    blue = env.find("blue cube")
    for dx, on in ((0.0, "blue cube"), (0.03, "table")):
        red.x, red.y, red.z = blue.x + dx, blue.y, 0.05
        red.on = "gripper"
        env._fall(red)
        assert red.on == on and red.z == (tt.SIZE if on == "blue cube" else 0)
        if on == "table":
            assert math.dist(red.xy, blue.xy) == pytest.approx(tt.SIZE)


def test_push_moves_a_block_and_what_stands_on_it():
    env = tt.Tabletop("goal")
    env.place(8, 0, "train")
    blue = env.find("blue cube")
    red = env.find("red cube")
    red.x, red.y, red.z = blue.x, blue.y, tt.SIZE
    red.on = "blue cube"
    env.aperture = 0.0
    env.gripper_xyz = np.array([blue.x + 0.045, blue.y, 0.02])
    x = blue.x
    for _ in range(3):
        env.advance([-1, 0, 0, 0, 0, 0, 1])
    assert blue.x == pytest.approx(x + 0.045 - 3 * tt.STEP - 0.03)
    assert red.x == pytest.approx(blue.x)


def test_drawer_runs_on_its_rail():
    env = tt.Tabletop("goal")
    env.place(6, 0, "train")
    env.gripper_xyz = np.array([*env.handle(), 0.02])
    for _ in range(3):
        env.advance([0, 0, 0, 0, 0, 0, 1])
    assert env.held == "drawer"
    before = env.drawer_pull
    assert not env.advance([1, 0, 1, 0, 0, 0, 1])
    assert env.drawer_pull == before and env.gripper_xyz[0] == pytest.approx(env.drawer_x), "y only"
    for _ in range(5):
        env.advance([0, 1, 0, 0, 0, 0, 1])
    assert env.drawer_pull == tt.TRAVEL and env.satisfied(tt.Goal("open", "drawer"))


def test_step_checks_actions_and_clips():
    env = tt.Tabletop("goal")
    env.place(0, 0, "train")
    with pytest.raises(ValueError, match="7 finite"):
        env.step([0] * 6)
    with pytest.raises(ValueError, match="7 finite"):
        env.step([np.nan] * 7)
    x = env.gripper_xyz[0]
    env.advance([5, 0, 0, 0, 0, 0, 0])
    assert env.gripper_xyz[0] == pytest.approx(min(x + tt.STEP, tt.EDGE))


def test_expert_is_smooth():
    """Actions of neighbouring states are near each other, or chunks could not be predicted."""
    env = tt.Tabletop("object")
    env.place(2, 5, "train")
    for _ in range(10):
        action, _ = env.expert()
        twin = env.clone()
        twin.gripper_xyz = twin.gripper_xyz + 1e-4
        assert np.abs(twin.expert()[0] - action).max() < 0.05
        env.advance(action)


def test_clone_is_independent():
    env = tt.Tabletop("goal")
    env.place(0, 0, "train")
    grasp(env, "red cube")
    twin = env.clone()
    before = (env.find("red cube").x, env.gripper_xyz.copy())
    for _ in range(3):
        twin.advance([1, 0, 1, 0, 0, 0, 1])
    assert env.find("red cube").x == before[0] and (env.gripper_xyz == before[1]).all()
    assert twin.held is twin.find("red cube")


def test_chains_are_feasible_and_fixed():
    for number in range(6):
        trial, instructions = tt.chain(number)
        assert (trial, instructions) == tt.chain(number) and len(set(instructions)) == 5
        env = tt.Tabletop("goal")
        env.place(0, trial, "eval")
        assert all(env.follow(text) for text in instructions)


def test_cells_and_pixels_agree():
    """A 64 px image holds cell d5 in its patch (column 3, row 4)."""
    env = tt.Tabletop("object")
    env.place(0, 0, "train")
    cube = env.things[0]
    cube.x, cube.y = -0.025, 0.025
    env.gripper_xyz = np.array([0.15, -0.15, 0.1])
    env.plate = (-0.15, 0.15)
    assert td.cell(cube.x, cube.y) == "d5"
    patch = env.render()[32:40, 24:32]
    assert (np.abs(patch[1:-1, 1:-1].astype(int) - tt.COLORS["red"]) < 3).all()


@pytest.mark.parametrize(("size", "tilt"), [(64, 0.0), (96, 0.5)])
def test_camera_sizes_and_tilt(size, tilt):
    env = tt.Tabletop("goal", size, tilt)
    image = env.reset(0, 0)["image"]
    assert image.shape == (size, size, 3) and image.dtype == np.uint8 and image.std() > 10


def test_answers_come_from_the_state():
    rng = np.random.default_rng(0)
    for number in range(40):
        env = td.random_state(np.random.default_rng(number))
        question = td.ask("where", env, rng)
        name = question.text.removeprefix("Where is the ").removesuffix("?")
        cells = {place.name: td.cell(place.x, place.y) for place in td.named_places(env)}
        assert question.answer == cells[name] and question.answer in question.thought

        question = td.ask("point", env, rng)
        name = question.text.removeprefix("Point to the ").removesuffix(".")
        spots = {place.name: (place.x, place.y) for place in td.named_places(env)}
        spots["gripper"] = env.gripper_xyz[:2]
        centimetres = [100 * (v + tt.EDGE) for v in spots[name]]
        answered = [int(word) for word in question.answer.split()]
        np.testing.assert_allclose(answered, centimetres, atol=0.5001)
        assert f"{name} {question.answer}" in td.ask("points", env, rng).answer

        question = td.ask("movement", env, rng)
        options = question.text.split("A) ")[1].replace(" B) ", "|").replace(" C) ", "|").split("|")
        letters = "ABC"[: len(options)]  # two, when the wrong ones are all alike
        _, plan = env.expert()
        expected = td.heading(plan.move, plan.fingers)
        assert dict(zip(letters, options, strict=True))[question.answer] == expected


def test_heading_in_words():
    assert td.heading(np.array([0.1, -0.026, 0.004]), -1) == "right 10, back 3, open"
    assert td.heading(np.array([-0.4, 0, -0.08]), 1) == "left 40, down 8, close"


def test_a_thought_is_true_of_the_state_it_is_about():
    """Whatever thought() may say is read back, so that a true one states nothing false."""
    phases = set()
    for number in range(300):
        env = td.random_state(np.random.default_rng(number))
        _, plan = env.expert()
        true = td.thought(env, plan)
        assert all(td.statements(true, true).values()), true
        phases.add(plan.phase)
        parsed = td.parse_thought(true)
        assert (parsed.target_cell, parsed.phase) == (td.cell(*plan.target_xy), plan.phase)
        np.testing.assert_allclose(parsed.move, 100 * plan.move, atol=0.5001)
    assert len(phases) == 10


TRUE = (
    "The red cube is at d5. The gripper is at c4, high, open. Now reach: right 7, front 3, close."
)


@pytest.mark.parametrize(
    ("old", "new", "false"),
    [
        ("red cube", "blue cube", {"target", "target cell"}),  # d5 is not where the blue one is
        ("d5", "d6", {"target cell"}),
        ("c4", "c5", {"gripper cell"}),
        ("high", "mid", {"height"}),
        ("open.", "holding the red cube.", {"doing"}),
        ("reach", "grasp", {"phase"}),
        ("right 7", "right 9", set()),
        ("right 7", "right 10", {"x within 2 cm"}),
        ("right 7", "left 7", {"x sign", "x within 2 cm"}),
        ("right 7, ", "", {"x sign", "x within 2 cm"}),
        ("front 3", "back 1", {"y sign", "y within 2 cm"}),
        ("front 3, ", "front 3, up 2, ", {"z sign"}),  # it should stay at its height
        ("close.", "open.", {"fingers"}),
    ],
)
def test_each_statement_is_told_apart(old, new, false):
    is_true = td.statements(TRUE.replace(old, new), TRUE)
    assert {name for name, value in is_true.items() if not value} == false
    assert len(is_true) == 13


@pytest.mark.parametrize(
    "text",
    [
        "",
        TRUE.removesuffix(" Now reach: right 7, front 3, close."),  # cut off
        TRUE.replace("right 7", "right seven"),
        TRUE.replace("right 7", "right 7, left 7"),  # whatever it is, one would be true
        TRUE + " " + TRUE,
        TRUE.replace("d5", "m9"),
    ],
)
def test_what_cannot_be_read_states_nothing_true(text):
    is_true = td.statements(text, TRUE)
    assert is_true.keys() == td.statements(TRUE, TRUE).keys()
    assert not any(is_true.values())


def test_a_recorded_thought_of_another_world_is_one_line():
    with pytest.raises(ValueError, match="no thought of Tabletop: 'grasp it'; record the episodes"):
        td.statements(TRUE, "grasp it")


def digest(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The command run twice with one seed, by 1 and by 2 workers -> (folder, the last command)."""
    root = tmp_path_factory.mktemp("tabletop")
    for out, workers in (("a", "1"), ("b", "2")):
        command = [
            sys.executable,
            "-m",
            "benchmarks.tabletop_data",
            "--out",
            str(root / out),
            "--episodes",
            "8",
            "--conversations",
            "24",
            "--thought-actions",
            "12",
            "--seed",
            "7",
            "--workers",
            workers,
        ]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return root, command


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_command_writes_the_formats_same_seed_same_bytes(made):
    """Once the episodes differed from run to run: safetensors leave metadata in random order."""
    root, command = made
    assert digest(root / "a") == digest(root / "b")
    files = fast_tokenizer.read_episodes(root / "a" / "episodes")
    assert len(files) == 8 and files[0].action.shape[1] == 7 and files[0].state.shape[1] == 8
    assert files[0].frame(0).shape == (64, 64, 3) and np.abs(files[0].action).max() <= 1
    assert (files[1].task, files[1].fps) == (tt.suite_tasks("object")[0].instruction, 5)
    assert files[1].source == "tabletop object task 0"
    stats = json.loads((root / "a" / "episodes" / "stats.json").read_text())
    everything = np.concatenate([f.action for f in files])
    assert np.allclose(stats["action"]["mean"], everything.mean(0), atol=1e-5)
    talks = rows(root / "a" / "conversations.jsonl")
    assert len(talks) == 24
    for row in talks:
        assert Image.open(root / "a" / row["images"][0]).size == (64, 64)
        assert row["messages"][0]["content"].startswith("<image>")
        assert all(
            "FAST" not in m["content"] and "ACTION" not in m["content"] for m in row["messages"]
        )
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert again.returncode != 0 and "already holds data" in again.stderr


def test_questions_about_actions_are_those_of_the_model(made):
    """Else the thoughts before an action would be trained on a prompt that nobody asks."""
    tasks = [task for suite in tt.SUITES for task in tt.suite_tasks(suite)]
    questions = {"<image>" + model.action_question(task.instruction) for task in tasks}
    for row in rows(made[0] / "a" / "thought_actions.jsonl"):
        assert row["messages"][0]["content"] in questions
    for row in rows(made[0] / "a" / "conversations.jsonl"):
        users, answers = row["messages"][::2], row["messages"][1::2]
        assert [m["content"].count("<image>") for m in users] == [1] + [0] * (len(answers) - 1)
        for m in answers:
            assert re.fullmatch(r"(<think>[^<>]+</think>)?<answer>[^<>]+</answer>", m["content"])


def test_thought_actions_carry_a_chunk(made):
    found = rows(made[0] / "a" / "thought_actions.jsonl")
    assert len(found) == 12
    for row in found:
        chunk, answer = np.array(row["chunk"]), row["messages"][1]["content"]
        assert chunk.shape == (5, 7) and np.abs(chunk).max() <= 1
        assert re.fullmatch(r"<think>[^<>]+</think><answer><ACTION></answer>", answer)


@pytest.mark.parametrize("flag", ["--episodes", "--horizon", "--noise", "--size", "--workers"])
def test_flags_out_of_range_stop_before_anything_is_written(flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        td.main(["--out", str(tmp_path / "out"), flag, "-1"])
    assert f"argument {flag}: -1 is not " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_is_not_written_over(tmp_path):
    """Thoughts before actions alone were, and a file as --out was a traceback."""
    out = tmp_path / "out"
    flags = ["--out", str(out), "--episodes", "0", "--conversations", "0", "--thought-actions", "1"]
    out.mkdir()
    (out / "thought_actions.jsonl").write_text("")
    with pytest.raises(SystemExit, match="already holds data"):
        td.main(flags)
    command = [sys.executable, "-m", "benchmarks.tabletop_data"]
    done = subprocess.run(
        [*command, "--out", __file__], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ")


def thought_action_args(out, horizon=5, kinds="plan"):
    return argparse.Namespace(
        out=out, seed=0, size=16, tilt=0.0, horizon=horizon, carried_on=0.0,
        thought_kinds=kinds.split(","),
    )  # fmt: skip


@pytest.mark.parametrize("asked_for", ["plan,scene,task", "plan,task"])
def test_thoughts_before_actions_are_of_the_kinds_asked_for(asked_for, tmp_path):
    """Of each as many, from both kinds of state; only the thought differs from rows of plans. Of
    two kinds one has not all the demonstrated states, which are every other row."""
    mixed = thought_action_args(tmp_path, kinds=asked_for)
    plain = thought_action_args(tmp_path)
    kinds = {kind: [] for kind in asked_for.split(",")}
    for number in range(24):
        row = json.loads(td.make_thought_action(mixed, number))
        text = row["messages"][1]["content"]
        thought = re.fullmatch(r"<think>(.+)</think><answer><ACTION></answer>", text)[1]
        instruction = row["messages"][0]["content"].split("Instruction: ")[1].split("\n")[0]
        if td.parse_thought(thought) is not td.UNREADABLE:
            kind = "plan"
        elif thought == f"{instruction}.":
            kind = "task"
        else:  # "red cube d4, plate h7, gripper b1 low open."
            assert re.fullmatch(r"(?:[a-z ]+ [a-h][1-8][a-z ]*, )+[a-z0-9 ]+\.", thought), thought
            kind = "scene"
        kinds[kind].append(number % 2)
        row["messages"][1] = json.loads(td.make_thought_action(plain, number))["messages"][1]
        assert row == json.loads(td.make_thought_action(plain, number))
    of_each_state = 24 // len(kinds) // 2
    halves = [0] * of_each_state + [1] * of_each_state
    assert {kind: sorted(states) for kind, states in kinds.items()} == dict.fromkeys(kinds, halves)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--thought-kinds", "plan,poem"],
            "'poem' is no kind of thought; they are plan, scene, task",
        ),
        (["--thought-kinds", "task"], "--thought-kinds says what --thought-actions N think"),
    ],
)
def test_kinds_of_thought_that_mean_nothing_are_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        td.main(["--out", str(tmp_path / "out"), *flags])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_thought_actions_end_with_the_task(tmp_path):
    """Past the end a chunk repeated the last movement, and the model learned to move on."""
    args = thought_action_args(tmp_path, horizon=12)
    ended_early = 0
    for number in range(40):
        rng = np.random.default_rng([5, 0, number])
        env = (td.demonstrated_state if number % 2 else td.random_state)(rng, args.size)
        expected = []
        is_done = False
        while len(expected) < 12 and not is_done:
            expected.append(env.expert()[0].round(4).tolist())
            is_done = env.advance(expected[-1])
        steps_after = 12 - len(expected)
        ended_early += steps_after > 0
        still = [0] * 6 + expected[-1][6:]  # no movement, the fingers as they were told last
        chunk = json.loads(td.make_thought_action(args, number))["chunk"]
        assert chunk == expected + [still] * steps_after
    assert ended_early > 2  # the case is among them
    args.horizon = 5000  # longer than any task; it drew states for ever
    assert len(json.loads(td.make_thought_action(args, 0))["chunk"]) == 5000


def test_demonstrated_states_are_of_all_steps_alike():
    """random_state() stops within 30 steps, before the second goal of a task of two."""
    steps = {"short": [], "long": []}
    late = 0
    for number in range(400):
        env = td.demonstrated_state(np.random.default_rng([8, number]), 16)
        done = env.steps
        while not env.advance(env.expert()[0]):
            pass
        steps["long" if env.suite == "long" else "short"].append((done + 0.5) / env.steps)
        late += done >= 30
    for shares in steps.values():  # uniform in 0 .. 1: mean 1/2, std 0.289 / sqrt(n)
        assert abs(np.mean(shares) - 0.5) < 3 * 0.289 / len(shares) ** 0.5
    assert late > 20


def test_tasks_that_carry_on_begin_where_others_ended():
    """Nearly all of a chain's instructions do, and no demonstration did: heads solved 94% of first
    instructions and 73% of those behind a solved one."""
    left = {"held": 0, "lit": 0, "on the plate": 0, "stacked": 0}
    for number in range(60):
        env = tt.Tabletop("goal", 16)
        env.place(number % 10, number, "train")
        text = env.instruction
        td.carry_on(env, np.random.default_rng([9, number]))
        assert env.instruction == text and env.goals == [tt.GOALS[text]] and env.steps == 0
        assert not env.satisfied(tt.GOALS[text])
        left["held"] += env.held is not None
        left["lit"] += env.button_lit
        left["on the plate"] += any(math.dist(thing.xy, env.plate) < 0.02 for thing in env.things)
        left["stacked"] += any(thing.z >= tt.SIZE and thing is not env.held for thing in env.things)
    assert min(left.values()) > 3, left

    fresh = tt.Tabletop("goal")
    fresh.place(3, 5, "train")
    never, always = (td.demonstration("goal", 3, 5, 0.06, carried_on=chance) for chance in (0, 1))
    assert np.array_equal(never[0]["image"][0], fresh.render())
    assert not np.array_equal(always[0]["image"][0], fresh.render())
    assert never[1]["task"] == always[1]["task"]
    spatial = [td.demonstration("spatial", 3, 5, 0.06, carried_on=chance)[0] for chance in (0, 1)]
    assert np.array_equal(spatial[0]["image"], spatial[1]["image"])
    lit = [
        td.demonstrated_state(np.random.default_rng([8, number]), 16, carried_on=chance).button_lit
        for chance in (0, 1)
        for number in range(80)
    ]
    assert sum(lit[:80]) < sum(lit[80:])


def test_action_tokens_are_made_of_a_tasks_last_movements_too(tmp_path):
    """No chunk began within 4 steps of the end, so no thought or action was learned of a lift,
    which takes 4, and a model by its own tokens solved 0 of 50 of them."""
    lifting = td.demonstration("goal", 9, 5, 0.06)  # of the red cube
    fast_tokenizer.write_episodes(tmp_path / "e", [lifting])
    (episode,) = fast_tokenizer.read_episodes(tmp_path / "e")
    assert fast_tokenizer.chunk_starts(episode, 5) == range(len(episode))
    last = episode.action[-1]
    assert last[2] > 0.5  # up
    still = [0] * 6 + [last[6]]
    assert np.array_equal(fast_tokenizer.action_chunks(episode, 5)[-1], [last] + [still] * 4)
    args = thought_action_args(tmp_path)
    rows = [json.loads(td.make_thought_action(args, number)) for number in range(1, 600, 2)]
    lifts = [row["chunk"] for row in rows if "Now lift" in row["messages"][1]["content"]]
    assert len(lifts) > 2
    assert any(chunk[-1] == [0] * 6 + [1.0] for chunk in lifts)


def test_grid_of_questions_and_ways_to_answer_is_covered():
    """Each kind is asked both directly and with a thought; actions are never among them."""
    turns = [turn for i in range(80) for turn in td.conversation(0, i)[1]]
    seen = {(turn.kind, turn.question.thought is not None) for turn in turns}
    assert seen == {(kind, think) for kind in {**td.SCENE, **td.TASK} for think in (True, False)}


def test_demonstrations_are_the_experts():
    """Recorded actions are the expert's in the recorded states, whatever was executed instead."""
    for seed, disturbed in ((12, False), (16, True)):
        demo, _ = td.demonstration("goal", 0, seed, noise=0.06)
        assert demo["image"].shape == (len(demo["action"]), 64, 64, 3)
        moved = np.diff(demo["state"][:, :3], axis=0) / tt.STEP
        gap = np.abs(moved - demo["action"][:-1, :3]).max()
        assert gap > 0.5 if disturbed else gap < 1e-3
        env = tt.Tabletop("goal")
        env.place(0, seed, "train")
        for action, move in zip(demo["action"], moved, strict=False):  # the last has none
            assert np.allclose(env.expert()[0], action, atol=1e-3)
            env.advance([*move, *action[3:]])


@pytest.mark.parametrize("tilt", [0.0, 0.5])
@pytest.mark.parametrize("suite", tt.SUITES)
def test_recorded_objects_are_where_the_image_shows_them(suite, tilt):
    """Each in its own colour, unless the hand or another thing is over it; positions in the frame
    of the state: what is held moves with the hand."""
    shown = 0
    asked = 0
    for task in (0, 5):
        arrays, header = td.demonstration(suite, task, 12, 0.06, 128, tilt)
        names = json.loads(header["objects"])
        T = len(arrays["action"])
        assert arrays["object_position"].shape == (T, len(names), 3)
        for i, name in enumerate(names):
            color = {"plate": (215, 215, 225), "drawer handle": (60, 40, 20)}.get(name)
            color = color or tt.COLORS.get(name.removeprefix("other ").split()[0])
            if color is None:  # the button, whose light changes
                continue
            for t in range(T):
                x, y = arrays["object_pixel"][t, i] * 128 + [4, 0]  # beside the light on a ball
                shown += np.abs(arrays["image"][t, int(y), int(x)].astype(int) - color).max() < 12
                asked += 1
        state = arrays["state"]
        np.testing.assert_allclose(arrays["hand_pixel"][:, 0], (state[:, 0] + 0.2) / 0.4, atol=1e-6)
        y = state[:, 1] - tilt * state[:, 2]
        np.testing.assert_allclose(arrays["hand_pixel"][:, 1], (y + 0.2) / 0.4, atol=1e-6)
        held = ["holding" in text for text in json.loads(header["thoughts"])]
        if suite != "object" and task == 0:  # a cube is carried to the plate
            carried = arrays["object_position"][held, 0] - state[held, :3]
            assert sum(held) > 3 and np.abs(carried).max() < 0.03
    assert shown > 0.7 * asked


@pytest.mark.parametrize("suite", tt.SUITES)
def test_recorded_thoughts_and_targets_are_the_experts(suite):
    """The text that thought_actions.jsonl has for the same state, and the object that it names."""
    for task in range(10):
        arrays, header = td.demonstration(suite, task, 16, 0.0)
        names = json.loads(header["objects"])
        targets = json.loads(header["targets"])
        thoughts = json.loads(header["thoughts"])
        env = tt.Tabletop(suite)
        env.place(task, 16, "train")
        assert header["task"] == env.instruction
        for t, action in enumerate(arrays["action"]):
            _, plan = env.expert()
            assert thoughts[t] == td.thought(env, plan)
            said = re.match(r"The (.*?) is at (..)\.", thoughts[t])
            if targets[t] < 0:
                assert said[1] == "drop spot"
            else:
                assert names[targets[t]].endswith(said[1])
                position = arrays["object_position"][t, targets[t]]
                assert td.cell(*position[:2]) == said[2] or np.abs(position % 0.05).min() < 1e-3
            env.advance(action)
        if suite == "spatial":
            assert names == ["red cube", "other red cube", "plate", "button"]
            assert set(targets) == {0, 2}, "of two red cubes the one that is meant"
        if env.goals[0].object == "drawer":
            assert names[targets[0]] == "drawer handle"


def test_episodes_hold_what_is_known_of_objects(made):
    for file in fast_tokenizer.read_episodes(made[0] / "a" / "episodes"):
        assert {"plate"} < set(file.objects) and set(file.targets) <= {
            -1,
            *range(len(file.objects)),
        }
        assert len(file.thoughts) == len(file.targets) == len(file)
        assert file.object_position.shape == (len(file), len(file.objects), 3)
        assert file.object_pixel.shape == (len(file), len(file.objects), 2)
        assert file.hand_pixel.shape == (len(file), 2)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_writer_leaves_the_first_ones_work_alone(tmp_path, resume):
    """It used to fail and to delete the other's episodes on its way out."""
    episode = {
        "image": np.zeros((2, 4, 4, 3), np.uint8),
        "state": np.zeros((2, 3), np.float32),
        "action": np.zeros((2, 2), np.float32),
    }

    def slow():
        yield dict(episode), {"task": "t", "source": "s"}
        with pytest.raises(
            SystemExit, match="out.part.*another command writes there, or delete it"
        ):
            fast_tokenizer.write_episodes(tmp_path / "out", iter([]), resume=resume)
        yield dict(episode), {"task": "t", "source": "s"}

    fast_tokenizer.write_episodes(tmp_path / "out", slow(), resume=resume)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


class Thinker:
    """Stays where it is and thinks of its instruction; notes which thoughts it is told."""

    horizon = 4
    hold = None
    thoughts = None

    def __init__(self):
        self.told = []

    def act_batch(self, images, instructions, states, keys, thoughts=None):
        self.told.append(thoughts)
        self.thoughts = [f"So I {text}. " * 3 for text in instructions]
        return np.zeros((len(images), 4, 7))


def short_trials():
    """Two that are filmed, each over after 6 steps."""
    trials = tt.make_trials(["goal"], 1, 0)[:2]
    for trial in trials:
        trial.film = simulate.Film(tt.FILM_FPS)
        trial.env.limit = 6
    return trials


def test_films_show_what_is_thought(tmp_path):
    """In words below the picture, from the first frame on; films of a policy that writes nothing
    have none, and are as high as they were."""
    policy = Thinker()
    trials = short_trials()
    tt.drive(policy, trials, batch=8, execute=3)
    assert policy.told == [None, None]
    for trial in trials:
        assert trial.thought.startswith("So I ")
        assert [frame.size for frame in trial.film.frames] == [(256, 356)] * 7, (
            "before, and each step"
        )
        for frame in (trial.film.frames[0], trial.film.frames[-1]):
            caption = np.asarray(frame.convert("L"))[280:]
            for line in range(3):
                assert caption[line * 19 : line * 19 + 19].min() < 60, "has black letters"
    plain = short_trials()[0]
    plain.act(np.zeros((1, 7)))
    assert [frame.size for frame in plain.film.frames] == [(256, 280)] * 2


def test_which_trials_are_filmed_and_how_films_are_called():
    """A chain of which one of five was done was a success; of two chains one was filmed."""
    made = []
    for suite, task, seed, solved in (("goal", 1, 0, 1), ("chain", 0, 0, 1), ("chain", 0, 1, 0)):
        trial = types.SimpleNamespace(suite=suite, task=task, seed=seed, solved=solved)
        assert tt.is_among_first(trial)
        made.append(tt.name_of_film(trial))
    assert made == ["goal_1_success", "chain_0_1_of_5", "chain_1_0_of_5"]
    for suite, task, seed in (("goal", 2, 0), ("goal", 0, 1), ("chain", 0, 2)):
        assert not tt.is_among_first(types.SimpleNamespace(suite=suite, task=task, seed=seed))


def test_compared_policies_get_the_same_noise_in_the_same_trial():
    """By suite, task, trial and number of the forward alone: whatever the policy did before, and
    whichever trials share its forwards."""

    def keys_and_states(move, batch):
        """Of each forward of a policy that always makes the same movement."""
        drawn = {}

        def act_batch(images, instructions, states, keys):
            for key, state in zip(keys, states, strict=True):
                drawn[tuple(key)] = tuple(state)
            chunks = np.zeros((len(images), 4, 7))
            chunks[..., 2] = move
            return chunks

        trials = tt.make_trials(["goal", "chain"], 1, 1)
        for trial in trials:
            trial.env.limit = 6
        policy = types.SimpleNamespace(act_batch=act_batch, horizon=4, hold=None, thoughts=None)
        tt.drive(policy, trials, batch, execute=3)
        return drawn

    up = keys_and_states(0.5, batch=8)
    still = keys_and_states(0.0, batch=3)
    goal, chain = tt.EVALUATED.index("goal"), tt.EVALUATED.index("chain")
    trials = [(goal, task, 0) for task in range(10)] + [(chain, 0, 0)]
    assert up.keys() == still.keys() == {(*trial, n) for trial in trials for n in (0, 1)}
    assert all((up[key] == still[key]) == (key[-1] == 0) for key in up), "they see other states"


def test_lines_are_whole_words():
    font = types.SimpleNamespace(getlength=len)
    assert simulate.wrap("push the cube to its place", font, 9) == [
        "push the",
        "cube to",
        "its place",
    ]
    assert simulate.wrap("unbelievable is a word", font, 5) == ["unbelievable", "is a", "word"]
    assert simulate.wrap("", font, 5) == []


def test_a_head_of_recorded_thoughts_is_told_the_experts():
    """Those that thought_actions.jsonl has for the same states."""
    policy = Thinker()
    trials = short_trials()
    want = [td.thought(trial.env, trial.env.expert()[1]) for trial in trials]
    tt.drive(policy, trials, batch=8, execute=3, thought="true")
    assert policy.told[0] == want and len(policy.told) == 2


def test_another_thought_than_its_own():
    """Removed: it says nothing. Swapped: of another scene, the same in any batch and each time."""
    told = {}
    for batch in (8, 1):
        for kind in ("own", "removed", "swapped"):
            policy = Thinker()
            trials = short_trials()
            tt.drive(policy, trials, batch=batch, execute=3, thought=kind)
            told[kind, batch] = policy.told
    assert told["own", 8] == [None, None]
    assert told["removed", 8] == [["", ""]] * 2
    together = [text for texts in told["swapped", 8] for text in texts]
    assert together == [text for texts in told["swapped", 1] for text in texts]
    assert len(set(together)) == 4
    assert all(td.parse_thought(text) is not td.UNREADABLE for text in together)
    trial = short_trials()[0]
    assert together[0] != td.thought(trial.env, trial.env.expert()[1])


def test_a_policy_without_thoughts_is_given_none():
    policy = types.SimpleNamespace(thinks=False)
    args = types.SimpleNamespace(thought="true", policy="runs/x")
    with pytest.raises(ValueError, match="--thought true: runs/x reads no thought in this mode"):
        tt.evaluate(policy, args, slice(None))
