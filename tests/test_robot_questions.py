"""Hand-worked facts of a scripted episode, and the files that tools/robot_questions.py writes."""

import hashlib
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

import grpo
import model
from benchmarks import tabletop_data as td
from fast_tokenizer import (
    FastTokenizer,
    encode_frames,
    read_episode_file,
    read_episodes,
    split_episodes,
    write_episodes,
)
from tools import motion as mt
from tools import robot_questions as rq

AXES = {
    "position": [0, 1, 2],
    "metres": 1,
    "origin": [0.1, 0, 0],
    "origin_name": "the corner",
    "words": [["back", "forward"], ["right", "left"], ["down", "up"]],
    "gripper": {"of": "action", "dimensions": [3], "closed": [1], "open": [-1]},
}
CAMERA = {"matrix": [[1, 0, 0, 0.5], [0, 1, 0, 0.5], [0, 0, 0, 1]], "size": [1, 1]}


def scripted() -> dict[str, np.ndarray]:
    """20 steps at 10 Hz: there 0-4, closes at 6, up 8-10, left 11-14, down 15-16, opens at 18."""
    x = [0, 0.05, 0.1, 0.15] + [0.2] * 16
    y = [0] * 11 + [0.06, 0.12, 0.18] + [0.24] * 6
    z = [0.1] * 8 + [0.15, 0.2] + [0.25] * 5 + [0.2, 0.15, 0.15, 0.15, 0.2]
    grip = [-1] * 5 + [1] * 12 + [-1] * 3  # shows in the frame of the next step
    action = np.zeros((20, 4), np.float32)
    action[:, 3] = grip
    return {
        "image": np.zeros((20, 8, 8, 3), np.uint8),
        "state": np.stack([x, y, z], 1).astype(np.float32),
        "action": action,
    }


def write_file(path: Path, value) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def with_objects(arrays, header, pixels: bool = True):
    """A cube, picked up as the fingers close at 6 and 2 cm below the hand until they open at 18; a
    plate where it ends; a lamp. A camera is there, as CAMERA."""
    hand = arrays["state"]
    place = np.zeros((20, 3, 3), np.float32)
    place[:, 0] = hand[np.clip(np.arange(20), 6, 17)] + [0, 0.01, -0.02]
    place[:, 1] = [0.2, 0.25, 0.1]
    place[:, 2] = [-0.1, -0.3, 0.3]
    more = {"object_position": place}
    if pixels:
        more |= {"object_pixel": place[:, :, :2] + 0.5, "hand_pixel": hand[:, :2] + 0.5}
    known = {
        "objects": ["cube", "plate", "lamp"],
        "targets": [0] * 8 + [1] * 10 + [-1] * 2,
        "thoughts": [f"I am at {t}." for t in range(20)],
    }
    known = {key: json.dumps(value) for key, value in known.items()}
    return arrays | more, header | known


@pytest.fixture
def world(tmp_path):
    axes = mt.read_axes(write_file(tmp_path / "axes.json", AXES), 3, 4)
    return rq.World(axes, ["lift the cube", "put the cube away", "wave"])


@pytest.fixture
def camera(tmp_path):
    return mt.read_camera(write_file(tmp_path / "camera.json", CAMERA))


HEADER = {"task": "put the cube away", "fps": "10", "source": "script"}


def moment_of(world, folder: Path, recording, camera=None) -> rq.Moment:
    """The first step of a recording that is written and read."""
    write_episodes(folder, [recording])
    (path,) = folder.glob("*.safetensors")
    (file,) = read_episode_file(path)
    return rq.Moment(world, mt.read_motion(file, world.axes, 0.2, camera), 0)


@pytest.fixture
def moment(world, camera, tmp_path):
    return moment_of(world, tmp_path / "script", (scripted(), HEADER), camera)


@pytest.fixture
def among_objects(world, tmp_path):
    """Step 10: the hand is at forward 10, up 25 and holds the cube."""
    at_first = moment_of(world, tmp_path / "objects", with_objects(scripted(), HEADER))
    return at_first._replace(t=10)


def test_motion_by_hand(moment):
    motion = moment.motion
    assert motion.ahead == 2
    assert np.flatnonzero(motion.closed).tolist() == list(range(6, 18))
    # it begins to rest at 4 and 16, closes at 6, opens at 18, ends at 19
    expected = [4] * 4 + [6] * 2 + [16] * 10 + [18] * 2 + [19] * 2
    assert motion.waypoint.tolist() == expected
    # at 9 the next two steps go up 5 and left 6; at 17 it stands, and then it opens
    names = ["reach"] * 6 + ["grasp"] * 2 + ["lift"] + ["carry"] * 5 + ["place"] * 4
    assert motion.primitive == [*names, "release", "reach"]


def test_who_closes_in_motion_or_from_the_start_pushes():
    place = np.zeros((12, 3))
    place[:, 0] = 0.05 * np.arange(12)
    fast = np.zeros(12, bool)
    closing = np.arange(12) >= 4
    unknown = np.full(12, -1)
    assert mt.primitives(place, closing, fast, unknown, unknown, 2) == ["reach"] * 4 + ["push"] * 8
    assert mt.primitives(place, ~fast, fast, unknown, unknown, 2) == ["push"] * 12
    # the same motion, but slow where it closes
    assert mt.primitives(place, closing, ~fast, unknown, unknown, 2)[4:6] == ["grasp", "carry"]


def test_a_new_target_ends_grasp_and_release():
    """Of a hand that closes at 2 and opens at 8 and moves 1 mm a step: so near, it would grasp and
    let go all the time, while the thought says that it goes for the plate."""
    place = np.zeros((12, 3))
    place[:, 0] = 0.001 * np.arange(12)
    closed = (np.arange(12) >= 2) & (np.arange(12) < 8)
    slow = np.ones(12, bool)
    unknown = np.full(12, -1)
    names = mt.primitives(place, closed, slow, unknown, unknown, 4)
    assert names == ["reach"] * 2 + ["grasp"] * 6 + ["release"] * 4
    target = np.array([0] * 4 + [1] * 6 + [0] * 2)
    names = mt.primitives(place, closed, slow, unknown, target, 4)
    carry = ["carry"] * 4  # 4 mm in 4 steps; those before the fingers open as before
    assert names == ["reach"] * 2 + ["grasp"] * 2 + carry + ["release"] * 2 + ["reach"] * 2
    target[10:] = -1  # none is no new one
    assert mt.primitives(place, closed, slow, unknown, target, 4)[8:] == ["release"] * 4


def test_fingers_that_close_on_a_new_target_grasp():
    """Of a hand that stands and gets its target as it closes: there was nothing to leave, so all
    that followed was as the step before, which is reach, with closed fingers."""
    place = np.zeros((12, 3))
    closed = np.arange(12) >= 4
    target = np.array([0] * 4 + [1] * 8)
    names = mt.primitives(place, closed, np.ones(12, bool), np.full(12, -1), target, 2)
    assert names == ["reach"] * 4 + ["grasp"] * 8


GRIPPER_STATES = {3: "open", 4: "about to close", 6: "closed", 15: "closed", 16: "about to open"}


def test_gripper_states_by_hand(moment):
    for t, state in GRIPPER_STATES.items():
        assert rq.gripper_state(moment._replace(t=t)) == state
        assert rq.ask_gripper(moment._replace(t=t), np.random.default_rng(0)).answer == state


ANSWERS = {  # kind -> (step, the open answer)
    "position": (10, "10, 0, 25"),
    "direction": (10, "left"),
    "movement": (10, "0, 12, 0"),
    "waypoint": (10, "0, 24, -10"),
    "gripper": (4, "about to close"),
    "primitive": (15, "place"),
    "instruction": (0, "put the cube away"),
    "progress": (10, "55"),  # 10 of 19
    "point": (10, "(0.70, 0.50)"),
    "path": (10, "(0.70, 0.50), (0.70, 0.62), (0.70, 0.68), (0.70, 0.74), (0.70, 0.74)"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_by_hand(moment, kind):
    t, answer = ANSWERS[kind]
    asked = rq.KINDS[kind].ask(moment._replace(t=t), np.random.default_rng(0))
    assert asked.answer == answer
    right, wrong = asked.options or ("", [])
    assert right not in wrong
    assert worth(answer, asked.score, asked.more, Path()) == 1 or (kind == "point")


def test_words_by_hand(moment):
    at = moment._replace(t=10)
    assert rq.place_words(at, at.place) == "forward 10, up 25"
    assert rq.waypoint_words(at, at.move_to(16)) == "left 24, down 10"
    assert rq.event(at, 6) == "the fingers close"
    assert rq.event(at, 16) == "the hand rests"
    assert rq.event(at, 19) == "the task ends"
    # half a centimetre is rounded alike in words and in numbers
    assert rq.place_words(at, np.array([0.125, -0.125, 0])) == "forward 13, right 13"
    assert rq.centimetres(np.array([0.125, -0.125, -0.001])) == "13, -13, 0"


def test_after_the_last_step_nothing_happens(world, tmp_path):
    """Fingers that open in the last frame are open there, and yet a thought about that frame said
    "Without going further, the fingers open."."""
    arrays = scripted()
    arrays["action"][:, 3] = [-1] * 5 + [1] * 13 + [-1] * 2
    at = moment_of(world, tmp_path / "late", (arrays, HEADER))
    assert np.flatnonzero(~at.motion.closed).tolist() == [*range(6), 19]
    assert rq.event(at._replace(t=18), 19) == "the fingers open"
    rng = np.random.default_rng(0)
    said = {rq.say(at._replace(t=19), rng, "waypoint") for _ in range(20)}
    assert said == {
        "The next waypoint is right here, where the task ends.",
        "Without going further, the task ends.",
    }


def test_directions_that_are_no_answer_are_not_asked(moment):
    rng = np.random.default_rng(0)
    assert rq.ask_direction(moment._replace(t=9), rng) is None  # up 5 and left 6
    assert rq.ask_direction(moment._replace(t=18), rng) is None  # what follows is not recorded
    assert rq.ask_direction(moment._replace(t=5), rng).answer == "nowhere"
    assert rq.ask_waypoint(moment._replace(t=19), rng) is None
    assert rq.ask_path(moment._replace(t=17), rng) is None  # nothing moves


def test_wrong_places_are_places_of_the_episode(moment):
    at = moment._replace(t=10)
    asked = rq.ask_position(at, np.random.default_rng(0))
    right, wrong = asked.options
    places = {rq.place_words(at, place) for place in moment.motion.position}
    assert right == "forward 10, up 25" and set(wrong[:2]) <= places - {right}


def test_pixels_of_a_camera(tmp_path):
    """A camera at the origin looks along z; focal length 320, an image of 480 x 640."""
    matrix = [[320, 0, 320, 0], [0, 320, 240, 0], [0, 0, 1, 0]]
    path = write_file(tmp_path / "camera.json", {"matrix": matrix, "size": [480, 640]})
    points = mt.read_camera(path).project(np.array([[0, 0, 1], [0.5, 0.375, 1], [1, 1, -1]]))
    np.testing.assert_allclose(points, [[0.5, 0.5], [0.75, 0.75], [np.nan, np.nan]])


def test_which_of_two_frames_comes_first(moment):
    seen = set()
    for seed in range(20):
        asked = rq.ask_order(moment._replace(t=8), np.random.default_rng(seed))
        first, second = asked.steps
        assert 8 in asked.steps and max(asked.steps) >= 10
        assert asked.answer == ("first" if first < second else "second")
        seen.add(asked.answer)
    assert seen == {"first", "second"}


def test_a_thought_states_facts_and_the_conclusion(moment):
    at = moment._replace(t=10)
    rng = np.random.default_rng(0)
    asked = rq.ask_direction(at, rng)
    asked = asked._replace(conclusion="So it goes left.", context=(*asked.context, "movement"))
    thoughts = {rq.thought(at, rng, asked) for _ in range(200)}
    assert len(thoughts) > 100  # of 200
    for text in thoughts:
        assert text.endswith("So it goes left.")
        assert "{" not in text
    together = " ".join(thoughts)
    for fact in ("forward 10, up 25", "closed", "put the cube away", "left 12", "carr", "down 10"):
        assert fact in together
    assert "right" not in together.replace("right here", "")


# ---- Objects -------------------------------------------------------------------------------------


def test_what_the_hand_holds_by_hand(among_objects):
    """The cube moves with the hand between closing (6) and opening (18); the plate and the lamp
    stand still. A cube that is pushed is not held, nor one that slips out."""
    assert among_objects.motion.held.tolist() == [-1] * 6 + [0] * 12 + [-1] * 2
    hand = np.zeros((12, 3))
    hand[:, 0] = 0.03 * np.arange(12)
    cube = hand[:, None] + [0.02, 0, 0]  # (T, 1, 3)
    closed = np.arange(12) >= 2
    assert mt.held_objects(hand, cube, closed).tolist() == [-1] * 2 + [0] * 10
    pushed = np.maximum(cube, [0.3, 0, 0])
    assert (mt.held_objects(hand, pushed, closed) == -1).all()
    lost = np.minimum(cube, [0.2, 0, 0])
    assert (mt.held_objects(hand, lost, closed) == -1).all()


def test_who_closes_in_motion_around_an_object_holds_it(world, tmp_path):
    """LIBERO's expert does, and its thoughts said that it pushes while it carries the bowl."""
    arrays = scripted()
    arrays["state"][:8, 2] += 0.05 * np.arange(8)[::-1]  # it comes down, at full speed, and closes
    names = moment_of(world, tmp_path / "without", (arrays, HEADER)).motion.primitive
    assert names[6:18] == ["push"] * 12
    motion = moment_of(world, tmp_path / "with", with_objects(arrays, HEADER)).motion
    assert motion.held[6:18].tolist() == [0] * 12
    assert motion.primitive[8:18] == ["lift"] + ["carry"] * 5 + ["place"] * 4


def test_a_hand_that_begins_with_a_thing_in_it():
    """It stands for two steps, then lifts: of the first step there is none before to be as, which
    ended the run with an IndexError. A hand that holds nothing pushes, as before."""
    place = np.zeros((8, 3))
    place[:, 2] = [0, 0, 0, 0.05, 0.1, 0.15, 0.2, 0.25]
    closed = np.ones(8, bool)
    unknown = np.full(8, -1)
    held = mt.held_objects(place, place[:, None], closed)
    assert held.tolist() == [0] * 8
    names = mt.primitives(place, closed, closed, held, unknown, 1)
    assert names == ["grasp"] * 2 + ["lift"] * 5 + ["lift"]
    assert mt.primitives(place, closed, closed, unknown, unknown, 1) == ["push"] * 8


OBJECT_ANSWERS = {  # kind -> a part of the question -> the open answer, at step 10
    "where": {
        "cube": "10, 1, 23",
        "plate": "10, 25, 10",
        "lamp": "-20, -30, 30",
        "what the hand is going for": "10, 25, 10",
    },
    "offset": {"cube": "0, 1, -2", "plate": "0, 25, -15", "lamp": "-30, -30, 5"},
    "relation": {
        "from the cube is the plate: right or left": "left",
        "from the plate is the cube: right or left": "right",
        "from the lamp is the cube: right or left": "left",
        "from the lamp is the plate: right or left": "left",
        "from the cube is the lamp: right or left": "right",
        "from the plate is the lamp: right or left": "right",
    },
    "target": {"": "plate"},
    "holding": {"": "cube"},
    "which": {
        "nearest the hand": "cube",
        "hand closest to": "cube",
        "at forward 10, left 1, up 23,": "cube",
        "at forward 10, left 25, up 10,": "plate",
        "at back 20, right 30, up 30,": "lamp",
        "at (0.70, 0.51)": "cube",
        "at (0.70, 0.75)": "plate",
        "at (0.40, 0.20)": "lamp",
        "furthest left": "plate",
        "furthest right": "lamp",
        "furthest back": "lamp",
        "furthest up": "lamp",
        "furthest down": "plate",
        "further left than the cube": "plate",
        "further right than the cube": "lamp",
        "further right than the plate": None,  # two are
        "further up than the cube": "lamp",
        "further up than the plate": None,
        "further down than the cube": "plate",
        "further back than the cube": "lamp",
        "further back than the plate": "lamp",
    },
    "object_point": {"cube": "(0.70, 0.51)", "plate": "(0.70, 0.75)", "lamp": "(0.40, 0.20)"},
}


@pytest.mark.parametrize("kind", OBJECT_ANSWERS)
def test_answers_about_objects_by_hand(among_objects, kind):
    seen = set()
    for seed in range(400):
        asked = rq.KINDS[kind].ask(among_objects, np.random.default_rng(seed))
        parts = [part for part in OBJECT_ANSWERS[kind] if part in asked.text]
        assert parts, asked.text
        part = max(parts, key=len)
        assert asked.answer == OBJECT_ANSWERS[kind][part], asked.text
        seen.add(part)
        right, wrong = asked.options or ("", [])
        assert right not in wrong
        last_words = asked.conclusion.split()[-4:]
        assert kind not in ("which", "target", "holding") or asked.answer in asked.conclusion
        assert kind != "relation" or f"{asked.answer}." == last_words[-1]
    assert seen == {part for part, answer in OBJECT_ANSWERS[kind].items() if answer}


def test_of_equal_objects_the_instruction_tells_which_is_meant(world, tmp_path):
    """Of two black bowls "Point to the black bowl." had one right answer, which nobody could tell:
    the recording calls the one so that the instruction means."""
    for names, has_twins in ((["cube", "other cube", "lamp"], True), (["cube", "b", "c"], False)):
        arrays, header = with_objects(scripted(), HEADER)
        header["objects"] = json.dumps(names)
        at = moment_of(world, tmp_path / str(has_twins), (arrays, header))._replace(t=10)
        for kind in OBJECT_ANSWERS.keys() - {"target"}:
            told = set()
            for seed in range(60):
                asked = rq.KINDS[kind].ask(at, np.random.default_rng(seed))
                if asked and "what the hand is going for" not in asked.text:
                    told.add(asked.told)
            assert told == {has_twins}, kind
        assert not rq.ask_position(at, np.random.default_rng(0)).told


def test_questions_without_a_clear_answer_are_not_asked(among_objects):
    rng = np.random.default_rng(0)
    alike = among_objects.motion.object_position.copy()
    alike[:, 1:] = alike[:, :1]
    at = among_objects._replace(motion=among_objects.motion._replace(object_position=alike))
    assert rq.nearest_to_hand(at, rng) is None  # all in one place
    assert rq.at_place(at, rng) is None
    assert rq.furthest(at, rng) is None
    assert rq.ask_relation(at, rng) is None
    assert rq.ask_target(among_objects._replace(t=18), rng) is None  # no target at the end
    unknown = np.full(20, -1)
    at = among_objects._replace(motion=among_objects.motion._replace(held=unknown))
    assert rq.ask_holding(at, rng) is None  # closed around what is not recorded
    assert rq.ask_holding(at._replace(t=3), rng).answer == "nothing"
    out = np.full((20, 3, 2), 1.2)
    at = among_objects._replace(motion=among_objects.motion._replace(object_pixel=out))
    assert rq.ask_object_point(at, rng) is None and rq.at_pixel(at, rng) is None


def test_what_is_not_there_is_not_asked_about(among_objects):
    places = among_objects.motion.object_position.copy()
    places[:, 1] = np.nan
    at = among_objects._replace(motion=among_objects.motion._replace(object_position=places))
    assert [thing.name for thing in at.objects] == ["cube", "lamp"]
    assert at.target is None and at.held.name == "cube"
    for kind in ("where", "offset", "which", "relation", "object_point"):
        for seed in range(50):
            asked = rq.KINDS[kind].ask(at, np.random.default_rng(seed))
            assert "plate" not in f"{asked.text} {asked.hint} {asked.conclusion} {asked.options}"


def test_pixels_are_recorded_or_a_cameras(world, camera, tmp_path):
    """What is recorded is taken without --camera, a camera before what is recorded."""
    recorded = moment_of(world, tmp_path / "recorded", with_objects(scripted(), HEADER))
    recording = with_objects(scripted(), HEADER, pixels=False)
    projected = moment_of(world, tmp_path / "projected", recording, camera)
    for name in ("hand_pixel", "object_pixel"):
        values = getattr(recorded.motion, name)
        np.testing.assert_allclose(values, getattr(projected.motion, name), atol=1e-6)
    for at in (recorded, projected):
        asked = rq.ask_path(at._replace(t=10), np.random.default_rng(0))
        assert asked.answer == ANSWERS["path"][1]
    other = camera._replace(matrix=camera.matrix * [[1], [1], [2]])
    moved = moment_of(world, tmp_path / "other", with_objects(scripted(), HEADER), other)
    np.testing.assert_allclose(moved.motion.hand_pixel, recorded.motion.hand_pixel / 2, atol=1e-6)


PLAN = "The plate is at forward 10, left 25, up 10. The gripper is at forward 10, up 25, holding the cube. Now carry: left 12, close."  # noqa: E501


def test_one_form_of_thought_as_tabletops(among_objects, world):
    """Target, its place, the hand's and its state, phase and direction; the same each time."""
    fixed = among_objects._replace(world=world._replace(thought_style="fixed"))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert rq.action_thought(fixed, rng) == PLAN
        assert rq.thought(fixed, rng, rq.ask_direction(fixed, rng)) == (
            f"{PLAN} The hand moves left 12 next. So it mostly goes left."
        )
        # what does not follow from the instruction does without the plan
        assert "Now" not in rq.thought(fixed, rng, rq.ask_relation(fixed, rng))
    assert rq.action_thought(fixed._replace(t=18), np.random.default_rng(0)) == (
        "The gripper is at forward 10, left 24, up 15, open. Now release: up 5, open."
    )
    env = td.Tabletop("goal")
    env.place(0, 5, "train")
    _, plan = env.expert()
    shape = re.sub(r"(at|Now|The) [^.:]+", r"\1 ...", td.thought(env, plan).partition(":")[0])
    assert shape == re.sub(r"(at|Now|The) [^.:]+", r"\1 ...", PLAN.partition(":")[0])


def test_recorded_thoughts_are_taken_word_for_word(among_objects, world):
    at = among_objects._replace(world=world._replace(thought_style="recorded"))
    rng = np.random.default_rng(0)
    assert rq.action_thought(at, rng) == "I am at 10."
    assert rq.thought(at, rng, rq.ask_target(at, rng)).startswith("I am at 10. The target is")


def test_varied_thoughts_before_actions_name_all_that_matters(among_objects):
    rng = np.random.default_rng(0)
    thoughts = {rq.action_thought(among_objects, rng) for _ in range(200)}
    assert len(thoughts) > 150
    for text in thoughts:
        for fact in ("plate", "forward 10, left 25, up 10", "forward 10, up 25", "left 12"):
            assert fact in text
        assert "holding the cube" in text and "carry" in text and "{" not in text
    assert len({text.split()[0] for text in thoughts}) > 4


# ---- Files ---------------------------------------------------------------------------------------

NUMBER = 8  # episodes, of which one is held out


def recordings(encoded: bool = False, objects: bool = False):
    """The script with other tasks and speeds; a pixel tells which episode and step a frame is."""
    for number in range(NUMBER):
        arrays = scripted()
        arrays["state"] = arrays["state"] * (1 + 0.1 * number)
        for t in range(20):
            arrays["image"][t, 0, 0] = (number, t, 0)
        header = {
            "task": ["lift the cube", "put the cube away", "wave"][number % 3],
            "fps": "10",
            "source": "script",
        }
        if objects:
            arrays, header = with_objects(arrays, header)
        if encoded:
            encoded_arrays, encoded_header = encode_frames(arrays.pop("image"), "image", "png")
            arrays |= encoded_arrays
            header |= encoded_header
        yield arrays, header


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robot")
    write_episodes(folder / "episodes", recordings())
    write_file(folder / "axes.json", AXES)
    write_file(folder / "camera.json", CAMERA)
    return folder


def flags(folder: Path, out: Path, **more) -> list[str]:
    values = {
        "data": folder,
        "out": out,
        "axes": folder / "axes.json",
        "camera": folder / "camera.json",
        "ahead": 0.2,
        "rows": 400,
        "held-rows": 100,
        "thought-actions": 40,
        "horizon": 4,
    }
    values.update({name.replace("_", "-"): value for name, value in more.items()})
    argv = []
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    return argv


@pytest.fixture(scope="module")
def written(data):
    rq.main(flags(data, data / "out"))
    return data / "out"


@pytest.fixture(scope="module")
def data_objects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    write_episodes(folder / "episodes", recordings(objects=True))
    write_file(folder / "axes.json", AXES)
    return folder


@pytest.fixture(scope="module")
def written_objects(data_objects):
    """All pixels are the recorded ones."""
    rq.main(flags(data_objects, data_objects / "out", camera="", rows=1000, held_rows=400))
    return data_objects / "out"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def worth(right: str, score: str, row: dict, folder: Path) -> float:
    """What a row's own answer is worth."""
    return grpo.answer_score(right, grpo.RightAnswer(score, right, row, folder))


def contents(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "report.json":
            name = str(path.relative_to(folder))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("of_objects", [False, True])
def test_every_right_answer_scores_1(written, written_objects, of_objects):
    written = written_objects if of_objects else written
    rows = rows_of(written / "conversations.jsonl") + rows_of(written / "held_out.jsonl")
    kinds = set()
    for row in rows:
        answer = row["messages"][1]["content"]
        right = model.answer_text(answer)
        assert worth(right, row["score"], row, written) == 1
        assert worth(right, "exact", row, written) == 1
        assert row["messages"][0]["content"].count("<image>") == len(row["images"])
        assert answer.startswith("<think>" if "+think" in row["kind"] else "<answer>")
        kinds.add(row["kind"])
    object_kinds = {kind for kind in rq.KINDS if kind in OBJECT_ANSWERS}
    for kind in rq.KINDS.keys() - (set() if of_objects else object_kinds):
        ways = {way for way in kinds if way.split("+")[0] == kind}
        if kind in ("point", "path", "object_point"):
            assert ways == {kind, f"{kind}+think"}
        else:
            assert ways == {kind, f"{kind}+think", f"{kind}+choice", f"{kind}+choice+think"}


def test_options_differ(written, written_objects):
    rows = rows_of(written / "conversations.jsonl")
    for row in [*rows, *rows_of(written_objects / "conversations.jsonl")]:
        if "+choice" not in row["kind"]:
            continue
        _, *options = re.split(r" ?[ABC]\) ", row["messages"][0]["content"])
        is_pair = row["kind"].startswith(("order", "relation"))
        assert len(options) == (2 if is_pair else 3), row
        assert len(set(options)) == len(options)


@pytest.mark.parametrize("of_objects", [False, True])
def test_held_out_frames_never_reach_training_rows(
    data, written, data_objects, written_objects, of_objects
):
    if of_objects:
        data, written = data_objects, written_objects
    files = read_episodes(data)
    train_files, held_files = split_episodes(files)
    numbers = {name: files.index(file) for file in files for name in [file.name]}
    train = {numbers[file.name] for file in train_files}
    held = {numbers[file.name] for file in held_files}
    for name, allowed in (
        ("conversations", train),
        ("thought_actions", train),
        ("held_out", held),
    ):
        seen = set()
        for row in rows_of(written / f"{name}.jsonl"):
            for image in row["images"]:
                seen.add(int(td.Image.open(written / image).getpixel((0, 0))[0]))
        assert seen == allowed


def test_rows_load_and_chunks_are_the_recorded_actions(data, written):
    chunks = np.concatenate([file.action[:16].reshape(4, 4, 4) for file in read_episodes(data)])
    tokenizer = FastTokenizer.fit(chunks, 64, 3)
    for name in ("conversations", "held_out", "thought_actions"):
        source = model.ConversationDataset(written / f"{name}.jsonl", tokenizer, 0)
        for i in source.train:
            assert len(model.open_images(source[i])) == len(source.row(i)["images"])
    files = read_episodes(data)
    for row in rows_of(written / "thought_actions.jsonl"):
        number, t, _ = td.Image.open(written / row["images"][0]).getpixel((0, 0))
        np.testing.assert_allclose(row["chunk"], files[number].action[t : t + 4], atol=1e-6)
        assert row["messages"][1]["content"].startswith("<think>")
        assert row["messages"][1]["content"].endswith("</think><answer><ACTION></answer>")


@pytest.mark.parametrize("style", ["varied", "recorded"])
def test_thoughts_before_an_episodes_last_actions(tmp_path, style):
    """Where the robot is known to hold still past the end all steps begin a chunk. But what came of
    the last action is not recorded: before it "go nowhere, keep the fingers closed" was thought,
    and up and open done. The expert's own thought knows."""
    said = [(arrays, header | {"deltas": "3"}) for arrays, header in recordings(objects=True)]
    write_episodes(tmp_path / "episodes", said)
    write_file(tmp_path / "axes.json", AXES)
    rq.main(flags(tmp_path, tmp_path / "out", camera="", thought_style=style, thought_actions=400))
    steps = set()
    for row in rows_of(tmp_path / "out/thought_actions.jsonl"):
        number, t, _ = td.Image.open(tmp_path / "out" / row["images"][0]).getpixel((0, 0))
        steps.add(t)
        action = read_episodes(tmp_path)[number].action
        still = np.append([0, 0, 0], action[-1, 3:])
        expected = [*action[t : t + 4], *[still] * 4][:4]
        np.testing.assert_allclose(row["chunk"], expected, atol=1e-6)
    assert steps == set(range(19 if style == "varied" else 20))


def test_same_seed_same_bytes_raw_or_encoded(data, written, tmp_path):
    write_episodes(tmp_path / "episodes", recordings(encoded=True))
    for name in ("axes", "camera"):
        (tmp_path / f"{name}.json").write_bytes((data / f"{name}.json").read_bytes())
    rq.main(flags(tmp_path, tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(written)
    rq.main(flags(data, tmp_path / "other", seed=1))
    assert contents(tmp_path / "other") != contents(written)


def test_shares_are_reported(data, tmp_path, capsys):
    rq.main(flags(data, tmp_path / "out", shares="gripper:1, progress:3", rows=200))
    report = json.loads((tmp_path / "out/report.json").read_text())
    part = report["conversations"]
    assert part["kinds"].keys() == {"gripper", "progress"}
    assert 0.65 < part["kinds"]["progress"] < 0.85
    assert 0.4 < part["thoughts"] < 0.6 and 0.4 < part["choices"] < 0.6
    assert "path" in report["not_asked"]
    printed = capsys.readouterr().out
    assert f"progress {part['kinds']['progress']:.1%}" in printed
    assert printed.count("axes: ") == 1, "only report.json said which"


def test_rare_answers_are_asked_as_often_as_others(data, tmp_path):
    """The gripper is about to open in 2 of 20 steps."""
    rq.main(flags(data, tmp_path / "out", shares="gripper:1", rows=400))
    answers = [
        row["messages"][1]["content"] for row in rows_of(tmp_path / "out/conversations.jsonl")
    ]
    said = [model.answer_text(answer) for answer in answers]
    for state in rq.GRIPPER:
        assert said.count(state) > 0.15 * sum(len(answer) > 1 for answer in said)


def test_same_seed_same_bytes_with_objects(data_objects, written_objects, tmp_path):
    again = flags(data_objects, tmp_path / "again", camera="", rows=1000, held_rows=400)
    rq.main(again)
    assert contents(tmp_path / "again") == contents(written_objects)
    report = json.loads((tmp_path / "again/report.json").read_text())
    assert report["not_asked"] == [] and report["episodes_with_objects"] == NUMBER


@pytest.mark.parametrize("style", ["fixed", "recorded"])
def test_thought_styles(data_objects, tmp_path, style):
    argv = flags(data_objects, tmp_path / "out", camera="", thought_style=style)
    rq.main(argv)
    for row in rows_of(tmp_path / "out/thought_actions.jsonl"):
        _, t, _ = td.Image.open(tmp_path / "out" / row["images"][0]).getpixel((0, 0))
        thought = row["messages"][1]["content"].partition("</think>")[0].removeprefix("<think>")
        if style == "recorded":
            assert thought == f"I am at {t}."
        else:
            target = "cube" if t < 8 else "plate"
            assert thought.startswith(f"The {target} is at " if t < 18 else "The gripper is at ")
    # the wording of a kind is one
    endings = set()
    for row in rows_of(tmp_path / "out/conversations.jsonl"):
        if row["kind"] == "progress+think":
            endings.add(re.sub(r"\d+", "N", row["messages"][1]["content"].split(". ")[-1]))
    assert len(endings) == 1


def test_few_episodes_with_objects_are_asked_about_them(data_objects, tmp_path):
    """One in training and the held-out one: kinds that need objects take their steps from these,
    where they would else be looked for in vain."""
    recorded = list(recordings())
    with_them = list(recordings(objects=True))
    files = read_episodes(data_objects)
    _, (held,) = split_episodes(files)
    chosen = {files.index(held), 0 if files.index(held) else 1}
    mixed = [with_them[i] if i in chosen else recorded[i] for i in range(NUMBER)]
    write_episodes(tmp_path / "episodes", mixed)
    argv = flags(
        data_objects, tmp_path / "out", data=tmp_path, camera="", shares="where:1", rows=40
    )
    rq.main(argv)
    images = {
        image for row in rows_of(tmp_path / "out/conversations.jsonl") for image in row["images"]
    }
    numbers = {td.Image.open(tmp_path / "out" / image).getpixel((0, 0))[0] for image in images}
    assert numbers == chosen - {files.index(held)}
    # not among the held-out ones: not asked at all
    mixed[files.index(held)] = recorded[files.index(held)]
    write_episodes(tmp_path / "other/episodes", mixed)
    argv = flags(
        data_objects, tmp_path / "out2", data=tmp_path / "other", camera="", shares="where:1"
    )
    assert "where needs episodes that record objects" in error_of(argv)


def test_what_no_step_can_answer_is_not_asked(data_objects, tmp_path):
    """Hands that are closed around nothing all the time, as those that only push, and out of sight
    with all objects: by default the run ended at the first such question."""
    changed = []
    for arrays, header in recordings(objects=True):
        arrays["action"][:, 3] = 1
        arrays["object_position"][:] = arrays["object_position"][0]
        arrays["object_pixel"] += 2
        arrays["hand_pixel"] -= 2
        changed.append((arrays, header))
    write_episodes(tmp_path / "episodes", changed)
    rq.main(flags(data_objects, tmp_path / "out", data=tmp_path, camera=""))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["not_asked"] == ["point", "path", "holding", "object_point"]


def test_what_few_steps_can_answer_is_asked(data, tmp_path):
    """`next` means 59.9 s, which follow on the first of 600 steps only: most rows were given up
    after 200 tries, and the first of these ended the run, with all lines lost."""
    slow = []
    for arrays, header in recordings():
        longer = {name: np.repeat(values, 30, axis=0) for name, values in arrays.items()}
        slow.append((longer, header))
    write_episodes(tmp_path / "episodes", slow)
    more = {"camera": "", "ahead": 59.9, "shares": "movement:1", "thought_actions": 0}
    rq.main(flags(data, tmp_path / "out", data=tmp_path, rows=20, held_rows=5, **more))
    rows = rows_of(tmp_path / "out/conversations.jsonl")
    assert len(rows) == 20
    for row in rows:
        assert td.Image.open(tmp_path / "out" / row["images"][0]).getpixel((0, 0))[1] == 0


GRIP = AXES["gripper"]
BAD_AXES = {
    "dimension 7 of the state, which has 0 .. 2": {**AXES, "position": [0, 1, 7]},
    "gripper names dimension 4 of the action": {**AXES, "gripper": {**GRIP, "dimensions": [4]}},
    "are not 3 numbers each": {**AXES, "position": [0, 1]},
    '"metres" 0 is not above 0': {**AXES, "metres": 0},
    "are not 3 pairs of different words": {**AXES, "words": [["a", "b"], ["c", "d"], ["a", "up"]]},
    "not state or action": {**AXES, "gripper": {**GRIP, "of": "hand"}},
    "as many dimensions as values": {**AXES, "gripper": {**GRIP, "open": [1]}},
    "its keys are not": {"position": [0, 1, 2]},
    # these two passed: the second number of a place was the first, and no gripper ever closed
    "a dimension is named twice": {**AXES, "position": [0, 0, 1]},
    "of the gripper are not numbers": {**AXES, "gripper": {**GRIP, "open": [float("nan")]}},
    "could not convert string to float": {**AXES, "gripper": {**GRIP, "open": ["wide"]}},
}


@pytest.mark.parametrize("message", BAD_AXES)
def test_bad_axes(data, tmp_path, message):
    axes = write_file(tmp_path / "axes.json", BAD_AXES[message])
    assert message in error_of(flags(data, tmp_path / "out", axes=axes))


def test_axes_that_are_no_text_are_named(tmp_path):
    """The codec's error alone named no file."""
    (tmp_path / "axes.json").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match=r"axes\.json: not JSON .*can't decode.*; repair it"):
        mt.read_axes(tmp_path / "axes.json", 3, 4)


def error_of(argv: list[str]) -> str:
    """The one line in which a command ends."""
    with pytest.raises(SystemExit) as error:
        rq.main(argv)
    text = str(error.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


BAD_FLAGS = {
    "no kind 'colour'": {"shares": "colour:1"},
    "a number of at least 0": {"shares": "gripper:many"},
    "all are 0": {"shares": "gripper:0"},
    "named twice": {"shares": "gripper:1,gripper:2"},
    "needs --camera FILE": {"shares": "path:1", "camera": ""},
    "kind direction; leave it out of --shares, or change --ahead": {
        "shares": "direction:1",
        "ahead": 60,
    },
    "are unknown; say with --axes FILE": {"axes": ""},
    "no thoughts are recorded": {"thought-style": "recorded"},
    "object_point needs episodes that record objects in sight": {"shares": "object_point:1"},
    "no such file": {"axes": "nowhere.json"},
    "no episode_*.safetensors here": {"data": "nowhere"},
    '"matrix" must be 3 x 4': {"camera": {"matrix": [[1, 2]], "size": [1, 1]}},
}


@pytest.mark.parametrize("message", BAD_FLAGS)
def test_bad_flags(data, tmp_path, message):
    changed = dict(BAD_FLAGS[message])
    if isinstance(changed.get("camera"), dict):
        changed["camera"] = write_file(tmp_path / "camera.json", changed["camera"])
    assert message in error_of(flags(data, tmp_path / "out", **changed))
    assert not (tmp_path / "out").exists()


def test_not_over_what_is_there(data, written):
    assert "already holds data" in error_of(flags(data, written))


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_is_no_folder_to_write_in(data, tmp_path, below):
    """--out FILE ended in a traceback, a NotADirectoryError at the first frame."""
    (tmp_path / "notes.txt").write_text("kept")
    message = error_of(flags(data, tmp_path / "notes.txt" / below))
    assert "notes.txt is a file, no folder to write in" in message
    assert (tmp_path / "notes.txt").read_text() == "kept"


def cut(arrays, header):
    return {name: values[:1] for name, values in arrays.items()}, header


BAD_EPISODES = {
    "one frame, in which nothing moves": cut,
    "its rate (fps) is not recorded": lambda arrays, header: (arrays, {**header, "fps": "0"}),
    "no instruction": lambda arrays, header: (arrays, {**header, "task": " "}),
    "no state is recorded": lambda arrays, header: (
        {**arrays, "state": np.zeros((20, 0), np.float32)},
        header,
    ),
}


@pytest.mark.parametrize("message", BAD_EPISODES)
def test_bad_episodes(data, tmp_path, message):
    change = BAD_EPISODES[message]
    changed = [change(arrays, header) for arrays, header in recordings()]
    write_episodes(tmp_path / "episodes", changed)
    argv = flags(data, tmp_path / "out", data=tmp_path)
    assert message in error_of(argv)


def test_one_instruction_is_no_question(data, tmp_path, capsys):
    same = [(arrays, {**header, "task": "wave"}) for arrays, header in recordings()]
    write_episodes(tmp_path / "episodes", same)
    rq.main(flags(data, tmp_path / "out", data=tmp_path, rows=20, camera=""))
    assert "not asked: instruction, point, path, where" in capsys.readouterr().out
    argv = flags(data, tmp_path / "other", data=tmp_path, shares="instruction:1")
    assert "instruction needs two instructions" in error_of(argv)


def test_spaces_around_an_instruction_make_no_other_one(data, tmp_path):
    """Two of three options were "put the cube away" and "put the cube away ", of which one was
    right. And where only spaces differ there is no question."""
    tasks = ["put the cube away", " put the cube away ", "wave", "lift the cube", "wave "]
    spaced = [
        (arrays, {**header, "task": tasks[number % 5]})
        for number, (arrays, header) in enumerate(recordings())
    ]
    write_episodes(tmp_path / "episodes", spaced)
    argv = flags(data, tmp_path / "out", data=tmp_path, shares="instruction:1", rows=100)
    rq.main(argv)
    known = {task.strip() for task in tasks}
    for row in rows_of(tmp_path / "out/conversations.jsonl"):
        answer = model.answer_text(row["messages"][1]["content"])
        _, *options = re.split(r" ?[ABC]\) ", row["messages"][0]["content"])
        if "+choice" in row["kind"]:
            assert len(options) == 3 and set(options) == known
        else:
            assert answer in known
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["instructions"] == 3
    same = [
        (arrays, {**header, "task": tasks[number % 2]})
        for number, (arrays, header) in enumerate(recordings())
    ]
    write_episodes(tmp_path / "same/episodes", same)
    argv = flags(data, tmp_path / "other", data=tmp_path / "same", shares="instruction:1")
    assert "instruction needs two instructions" in error_of(argv)


# ---- Files of axes -------------------------------------------------------------------------------

DIMENSIONS = {"tabletop": (8, 7), "libero": (8, 7), "metaworld": (4, 4), "calvin": (15, 7)}


@pytest.mark.parametrize("name", mt.WORLDS)
def test_axes_of_our_worlds(name):
    mt.read_axes(mt.AXES / f"{name}.json", *DIMENSIONS[name])


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("tabletop goal task 3", "tabletop"),
        ("metaworld/reach-v3", "metaworld"),
        ("spatial/2", "libero"),
        ("LIBERO_DATASETS/libero_goal/open_it_demo.hdf5/data/demo_3", "libero"),
    ],
)
def test_axes_by_the_source_of_a_recording(moment, source, name):
    """They were guessed by part of a name."""
    moment.motion.file.source = source
    assert mt.axes_path("", [moment.motion.file]).stem == name
    assert mt.axes_path("mine.json", [moment.motion.file]) == Path("mine.json")


def test_episodes_of_two_worlds_have_no_common_axes(world, tmp_path):
    """Those of Tabletop were taken for CALVIN's episodes too where one of Tabletop came first."""
    files = []
    for source in ("tabletop goal task 3", "tabletop goal task 4", "calvin training 0-64", "mine"):
        recording = (scripted(), {**HEADER, "source": source})
        files.append(moment_of(world, tmp_path / source, recording).motion.file)
    assert mt.axes_path("", files[:2]).stem == "tabletop"
    with pytest.raises(
        ValueError, match="of calvin by its source .* is of tabletop; keep"
    ) as error:
        mt.axes_path("", files[:3])
    assert "\n" not in str(error.value) and str(files[2]) in str(error.value)
    with pytest.raises(ValueError, match="axes of 'mine' are unknown; say with --axes FILE"):
        mt.axes_path("", [files[0], files[3]])
    assert mt.axes_path("mine.json", files) == Path("mine.json")


def test_tabletop_facts_agree_with_its_world(tmp_path):
    """Position, gripper and pixels of a demonstration, as benchmarks/tabletop.py names them."""
    write_episodes(tmp_path / "one", [td.demonstration("goal", 0, 5, 0.0)])
    (file,) = read_episode_file(next((tmp_path / "one").glob("*.safetensors")))
    axes = mt.read_axes(mt.axes_path("", [file]), 8, 7)
    motion = mt.read_motion(file, axes, 0.4, mt.read_camera(mt.AXES / "tabletop_camera.json"))
    env = td.Tabletop("goal")
    env.place(0, 5, "train")
    for t in range(len(file)):
        x, y, z = env.gripper_xyz
        np.testing.assert_allclose(motion.position[t], [x, y, z], atol=1e-6)
        u, v = motion.hand_pixel[t]
        np.testing.assert_allclose(file.hand_pixel[t], [u, v], atol=1e-6)
        np.testing.assert_allclose(file.object_pixel[t], motion.object_pixel[t], atol=1e-6)
        held = motion.objects[motion.held[t]] if motion.held[t] >= 0 else ""
        if env.held is not None or not motion.closed[t]:  # else the fingers are closing
            assert held == (env.held.name if env.held else "")
        assert td.cell(x, y) == f"{'abcdefgh'[int(8 * u)]}{int(8 * v) + 1}"
        env.advance(file.action[t])
    phases = [name for name, _ in itertools.groupby(motion.primitive)]
    assert phases[:4] == ["reach", "grasp", "carry", "place"]
