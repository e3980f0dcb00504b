"""CALVIN: the published chains, the protocol on a fake of the package, the converter."""

import argparse
import collections
import hashlib
import itertools
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml

import evaluate
import fast_tokenizer
import vla
from benchmarks import calvin


def test_the_thousand_chains_are_the_published_ones():
    text = repr([(dict(state), names) for state, names in calvin.chains()])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "bc4ebc402fd59f57"
    assert calvin.chains()[0][1] == (
        "rotate_blue_block_right",
        "move_slider_right",
        "lift_red_block_slider",
        "place_in_slider",
        "turn_off_lightbulb",
    )


def test_initial_states_are_laid_out_by_their_hash():
    # the FNV authors' own: hashed from basis 0, this text gives the basis of all later versions
    assert calvin.fnv(rb"chongo <Landon Curt Noll> /\../" + b"\\") == 0x811C9DC5
    state = {
        "led": 1,
        "lightbulb": 0,
        "slider": "left",
        "drawer": "open",
        "red_block": "table",
        "blue_block": "slider_left",
        "pink_block": "table",
        "grasped": 0,
    }
    robot, scene = calvin.layout(state)
    assert robot.shape == (15,) and robot[14] == 1
    assert scene[:6].tolist() == [0.28, 0.22, 0, 0, 0, 1]
    red, blue, pink = scene[6:9], scene[12:15], scene[18:21]
    assert np.allclose(blue, [-0.2409, 0.0924, 0.4610], atol=1e-4)
    assert sorted([red[0], pink[0]]) == pytest.approx([0.05, 0.22999541], abs=1e-6)
    turns = scene[[11, 17, 23]]
    assert len(set(turns)) == 3 and (abs(turns - np.pi / 2) <= np.pi / 8).all()
    assert (calvin.layout(dict(state))[1] == scene).all()
    places = {
        calvin.layout({**state, "led": i, "lightbulb": j, "drawer": d})[1][6]
        for i in (0, 1)
        for j in (0, 1)
        for d in ("open", "closed")
    }
    assert len(places) == 2  # the hash shuffles the two places on the table


# ---- the package: what calvin_env offers, with a hand that only moves along x

ENV = """
import numpy as np

class Env:
    def __init__(self, folder):
        assert (folder / ".hydra" / "merged_config.yaml").read_text()
        self.cameras, self.x = ["static", "gripper"], 0.0
        self.steps, self.resets, self.renders = 0, [], 0

    def reset(self, robot_obs=None, scene_obs=None):
        assert robot_obs.shape == (15,) and scene_obs.shape == (24,)
        self.resets.append(scene_obs)
        self.x = 0.0

    def get_obs(self):
        self.renders += bool(self.cameras)
        shapes = {"rgb_static": (200, 200, 3), "rgb_gripper": (84, 84, 3)}
        rgb = {k: np.zeros(v, np.uint8) for k, v in shapes.items() if self.cameras}
        return {"rgb_obs": rgb, "robot_obs": np.full(15, self.x), "scene_obs": np.zeros(24)}

    def get_info(self):
        return {"x": self.x}

    def step(self, action):
        assert action.shape == (7,) and (abs(action) <= 1).all() and action[6] in (-1, 1), action
        action[:3] *= 0.02  # in place, as the robot of calvin_env does
        self.x += action[0]
        self.steps += 1
        return self.get_obs(), 0, False, self.get_info()

made = []

def get_env(dataset_path, obs_space=None, show_gui=True):
    assert not show_gui
    made.append(Env(dataset_path))
    return made[-1]
"""
TASKS = """
class Tasks:
    def __init__(self, tasks):
        self.tasks = tasks

    def get_task_info_for_set(self, start_info, end_info, task_filter):
        moved = end_info["x"] - start_info["x"]
        return {name for name in self.tasks if name in task_filter and moved > 0.2 - 1e-9}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A calvin checkout with calvin_env in it, and a dataset's folder."""
    envs = tmp_path / "calvin" / "calvin_env" / "calvin_env" / "envs"
    conf = tmp_path / "calvin" / "calvin_models" / "conf"
    files = {
        envs.parent / "__init__.py": "",
        envs / "__init__.py": "",
        envs / "play_table_env.py": ENV,
        envs / "tasks.py": TASKS,
        conf / "callbacks/rollout/tasks/new_playtable_tasks.yaml": yaml.safe_dump(
            {"_target_": "calvin_env.envs.tasks.Tasks", "tasks": dict.fromkeys(calvin.TASKS)}
        ),
        conf / "annotations/new_playtable_validation.yaml": yaml.safe_dump(
            {name: [f"please {name}", "another wording"] for name in calvin.TASKS}
        ),
        tmp_path / "task_D_D/validation/.hydra/merged_config.yaml": "env: {}\n",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in [n for n in sys.modules if n.split(".")[0] == "calvin_env"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(envs.parents[1])
    yield tmp_path / "task_D_D"
    for name in [n for n in sys.modules if n.split(".")[0] == "calvin_env"]:
        del sys.modules[name]


class Scripted:
    """Ten full steps along x for what it can do, none for what it cannot; values out of range."""

    horizon, action_dim, cameras = 16, 7, ["image", "image_gripper"]
    hold = thoughts = None

    def __init__(self, can):
        self.can, self.asked = can, []
        self.keys = []  # by which noise would be drawn
        self.head = torch.nn.Linear(1, 1)
        self.count = collections.Counter()
        widths = {"state": 15, "action": 7}
        self.spec = {
            "stats": {name: {"q01": [-1.0] * n, "q99": [1.0] * n} for name, n in widths.items()}
        }

    def identity(self):
        return vla.bytes_of(self.head.parameters())

    def act_batch(self, images, instructions, states, keys):
        assert [x.shape for x in images[0]] == [(200, 200, 3), (84, 84, 3)]
        assert states.shape == (1, 15)
        self.asked.append(instructions[0])
        self.keys += keys
        chunk = np.zeros((16, 7), np.float32)
        chunk[:, 0] = 1.7 * (instructions[0].removeprefix("please ") in self.can)
        chunk[:, 6] = 0.3  # half open: neither of the two that the gripper takes
        return chunk[None]


def test_the_protocol_and_its_statistics(package, tmp_path, monkeypatch):
    can = set(calvin.TASKS) - {"open_drawer", "close_drawer", "turn_on_led"}
    policy = Scripted(can)
    monkeypatch.setattr(vla, "load_policy", lambda *args: policy)
    out = tmp_path / "r.json"
    evaluate.main(
        [
            "calvin",
            "--policy",
            "x",
            "--data",
            str(package),
            "--chains",
            "40",
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
    )
    names = [n for _, n in calvin.chains()[:40]]
    lengths = [len(list(itertools.takewhile(can.__contains__, n))) for n in names]
    assert {0, 5} <= set(lengths)
    arm = json.loads(out.read_text())["arms"]["policy"]
    assert arm["paired"]["chain length"] == lengths
    assert arm["metrics"]["chain length"]["mean"] == pytest.approx(np.mean(lengths))
    for k in range(1, 6):
        assert arm["metrics"][f"chain {k}"]["mean"] == np.mean([n >= k for n in lengths])
        assert arm["metrics"][f"chain {k}"]["n"] == 40
    env = sys.modules["calvin_env.envs.play_table_env"].made[0]
    failed = sum(n < 5 for n in lengths)
    # one reset a chain, 10 steps a success, 360 a failure; a look before every 8 of them
    assert len(env.resets) == 40 and env.steps == 10 * sum(lengths) + 360 * failed
    assert env.renders == len(policy.asked) == 2 * sum(lengths) + 45 * failed
    states = [calvin.layout(state)[1] for state, _ in calvin.chains()[:40]]
    assert all((a == b).all() for a, b in zip(env.resets, states, strict=True))
    assert policy.asked[0] == f"please {names[0][0]}"  # the first of its annotations


def flags(tmp_path, data, chains=1):
    """What `evaluate.py calvin` passes on."""
    return argparse.Namespace(
        out=tmp_path / "r.json",
        variant="a",
        data=data,
        chains=chains,
        execute=8,
        ensemble=0,
        seed=0,
        film="",
    )


def test_a_gripper_that_holds_still_keeps_what_it_was_told(package, tmp_path):
    """The first subtask is over after two steps of eight, the gripper closed. Then nothing decodes:
    it was opened, as the steps would have done that were not carried out."""
    policy = Scripted(set(calvin.TASKS))
    policy.hold = vla.Hold(np.arange(7) == 6, np.ones(7))
    chunk = np.zeros((1, 16, 7), np.float32)
    chunk[0, :, 6] = [-1, -1, *[1] * 14]
    chunk[0, :, 0] = 1
    nothing = np.full_like(chunk, np.nan)
    answers = [chunk, *[nothing] * 45]
    policy.act_batch = lambda *args, **kwargs: answers.pop(0)
    world = calvin.open_world(package)
    world.env.told = []
    step = world.env.step

    def keep(action):
        world.env.told.append(action[6])
        return step(action)

    world.env.step = keep
    done = world.oracle.get_task_info_for_set
    world.oracle.get_task_info_for_set = lambda start, info, names: (
        len(world.env.told) == 2 or done(start, info, names)
    )
    executor = vla.ChunkExecutor(16, 8, hold=policy.hold)
    first, second = list(calvin.TASKS)[:2]
    cameras = world.env.cameras
    assert calvin.attempt(world, cameras, policy, executor, first, [0, 0])
    assert not calvin.attempt(world, cameras, policy, executor, second, [0, 1])
    assert world.env.told == [-1] * (2 + 360)


def test_the_first_chains_are_filmed(package, tmp_path):
    """A frame every third step of 30 a second, from each look's own picture, and one where a
    subtask ends; the chains are what they are without a film, and so are their actions."""
    policy = Scripted(set(calvin.TASKS))
    args = flags(tmp_path, package, chains=3)
    plain = calvin.play(policy, args, slice(None))
    env = sys.modules["calvin_env.envs.play_table_env"].made[-1]
    steps, renders = env.steps, env.renders
    args.seed = 1  # else they are over
    args.film = tmp_path / "films"
    assert calvin.play(policy, args, slice(None)) == plain == [5, 5, 5]
    env = sys.modules["calvin_env.envs.play_table_env"].made[-1]
    assert env.steps == steps == 3 * 5 * 10
    # of a subtask's 10 steps in chunks of 8: steps 3, 6 and 9, and the end; 0 is a look anyway
    assert env.renders == renders + 2 * 5 * 4
    films = sorted(path.name for path in args.film.iterdir())
    assert films == ["calvin_0_5_of_5.gif", "calvin_1_5_of_5.gif"]


def test_a_crash_in_a_late_chain_loses_none_before_it(package, tmp_path):
    """1,000 chains take a day; the lengths were kept in memory alone, so that a simulator's crash
    in chain 999 lost all of them. And noise came from the number of the call: a share of the chains
    gave other results than all of them."""
    args = flags(tmp_path, package, chains=6)
    policy = Scripted(set(calvin.TASKS) - {"open_drawer", "turn_on_led"})
    whole = calvin.play(policy, args, slice(None))
    for path in tmp_path.glob("r.calvin.*.jsonl"):
        path.unlink()

    crashing = Scripted(policy.can)
    crashing.head = policy.head
    fourth = calvin.chains()[3][1][0]

    def crash(images, instructions, *args, **kwargs):
        if instructions[0] == f"please {fourth}" and len(resets()) == 4:
            raise RuntimeError("lost the connection to the physics server")
        return Scripted.act_batch(crashing, images, instructions, *args, **kwargs)

    def resets():
        return sys.modules["calvin_env.envs.play_table_env"].made[-1].resets

    crashing.act_batch = crash
    with pytest.raises(RuntimeError, match="lost the connection"):
        calvin.play(crashing, args, slice(None))
    assert len(resets()) == 4
    assert calvin.play(policy, args, slice(None)) == whole
    assert len(resets()) == 3, "chains 0 to 2 were not run again"

    args.seed = 1  # another run: nothing of the first is taken
    second = Scripted(policy.can)
    second.head = policy.head
    shares = [calvin.play(second, args, slice(rank, None, 2)) for rank in (0, 1)]
    assert [shares[0], shares[1]] == [whole[::2], whole[1::2]]
    assert sorted(second.keys) == sorted(policy.keys[: len(second.keys)])
    assert len(set(map(tuple, second.keys))) == len(second.keys)


def test_a_folder_that_is_no_dataset_is_named_before_the_policy_is_loaded(package, tmp_path):
    """One of its two splits, as the converter takes, was first found wrong by the simulator."""
    argv = ["calvin", "--policy", "x", "--out", str(tmp_path / "r.json"), "--data"]
    for folder in (package / "validation", tmp_path / "elsewhere"):
        with pytest.raises(ValueError, match=f"--data {folder}: no .*; give the folder of a CALV"):
            evaluate.main([*argv, str(folder)])
    args = evaluate.make_parser("calvin").parse_args([*argv, str(package)])
    calvin.check(args)
    args.chains = 1001
    with pytest.raises(ValueError, match="--chains 1001: there are 1,000"):
        calvin.check(args)


def test_what_is_missing_is_one_line(package, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="elsewhere/validation/.hydra/merged_config.yaml"):
        calvin.play(Scripted(()), flags(tmp_path, tmp_path / "elsewhere"), slice(None))
    policy = Scripted(())
    policy.cameras = ["image", "image_wrist"]
    with pytest.raises(ValueError, match="cameras image, image_wrist; the simulator has image, "):
        calvin.play(policy, flags(tmp_path, package), slice(None))
    monkeypatch.setitem(sys.modules, "calvin_env", None)
    with pytest.raises(ValueError, match="calvin_env.*pip install -e calvin/calvin_env") as e:
        calvin.play(Scripted(()), flags(tmp_path, package), slice(None))
    assert "\n" not in str(e.value)


# ---- the data

WINDOWS = [("open the drawer", (3, 6)), ("turn on the light", (5, 9))]


def write(folder, texts=None):
    """A split: ten frames, two annotated windows that overlap, both ends inclusive."""
    rng = np.random.default_rng(0)
    (folder / "lang_annotations").mkdir(parents=True)
    for t in range(10):
        action = rng.uniform(-1, 1, 7)
        action[6] = 1 if t < 5 else -1
        np.savez(
            folder / f"episode_{t:07d}.npz",
            rgb_static=np.full((200, 200, 3), t, np.uint8),
            rgb_gripper=np.full((84, 84, 3), 100 + t, np.uint8),
            rel_actions=action,
            actions=10 * action,
            robot_obs=np.arange(15) + t / 10,
            scene_obs=np.arange(24) / 10 + t,
        )
    np.save(folder / "ep_start_end_ids.npy", np.array([[0, 9]]))
    annotate(folder, texts or [w[0] for w in WINDOWS], [w[1] for w in WINDOWS])
    return folder


def annotate(folder, texts, windows):
    found = {
        "language": {"ann": texts, "task": texts, "emb": np.zeros((2, 1, 384), np.float32)},
        "info": {"indx": [tuple(map(np.int64, w)) for w in windows], "episodes": []},
    }
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", found, allow_pickle=True)


def convert(tmp_path):
    calvin.main(["convert", "--data", str(tmp_path / "training"), "--out", str(tmp_path / "out")])
    return fast_tokenizer.read_episodes(tmp_path / "out")


def test_each_annotated_window_becomes_an_episode(tmp_path):
    write(tmp_path / "training")
    files = convert(tmp_path)
    assert [(f.task, len(f), f.fps) for f in files] == [
        ("open the drawer", 4, 30),
        ("turn on the light", 5, 30),
    ]
    assert files[1].source == "calvin training 5-9" and files[1].deltas == 6
    for file, (_, (start, end)) in zip(files, WINDOWS, strict=True):
        for k, t in enumerate(range(start, end + 1)):
            with np.load(tmp_path / "training" / f"episode_{t:07d}.npz") as f:
                assert (file.frame(k) == f["rgb_static"]).all()
                assert (file.frame(k, "image_gripper") == f["rgb_gripper"]).all()
                assert (file.action[k] == f["rel_actions"].astype(np.float32)).all()
                assert (file.state[k] == f["robot_obs"].astype(np.float32)).all()
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["action"]["count"] == 9 and len(stats["state"]["q01"]) == 15


HYDRA = """
cameras:
  static: {fov: 10, aspect: 1, width: 200, height: 200, look_at: [-0.0262, -0.0302, 0.392],
    look_from: [2.8715, -2.1666, 2.5552], up_vector: [0.4041, 0.2281, 0.8811]}
"""


def pybullet_share(point):
    """x, y of a point in the image of HYDRA's camera, by pybullet's own two matrices
    (computeViewMatrix, computeProjectionMatrixFOV), as its documentation writes them."""
    eye, target = np.array([2.8715, -2.1666, 2.5552]), np.array([-0.0262, -0.0302, 0.392])
    forward = (target - eye) / np.linalg.norm(target - eye)
    side = np.cross(forward, [0.4041, 0.2281, 0.8811])
    side /= np.linalg.norm(side)
    up = np.cross(side, forward)
    view = np.eye(4)
    view[:3, :3] = [side, up, -forward]
    view[:3, 3] = [-side @ eye, -up @ eye, forward @ eye]
    y_scale = 1 / np.tan(np.radians(10) / 2)
    near, far = 0.01, 10
    projection = np.diag([y_scale, y_scale, (near + far) / (near - far), 0])
    projection[2, 3] = 2 * near * far / (near - far)
    projection[3, 2] = -1
    x, y, _, w = projection @ view @ [*point, 1]
    return (x / w + 1) / 2, (1 - y / w) / 2


def test_blocks_of_a_window(tmp_path):
    """Their places as scene_obs has them; pixels where the split says how its camera stands."""
    folder = write(
        tmp_path / "training", ["lift the pink block", "put the red block on the blue block"]
    )
    first, second = convert(tmp_path)
    assert first.objects == second.objects == ["red block", "blue block", "pink block"]
    assert first.targets == [2] * 4 and second.targets == [-1] * 5
    for file, start in ((first, 3), (second, 5)):
        steps = np.arange(len(file))[:, None] + start
        for i, column in enumerate((6, 12, 18)):
            expected = (np.arange(column, column + 3) / 10 + steps).astype(np.float32)
            np.testing.assert_allclose(file.object_position[:, i], expected, rtol=1e-6)
    assert first.object_pixel is first.hand_pixel is None  # no camera is known
    (folder / ".hydra").mkdir()
    (folder / ".hydra/merged_config.yaml").write_text(HYDRA)
    near_table = np.zeros(24)
    near_table[[6, 7, 8, 12, 13, 14, 18, 19, 20]] = [0.2, 0, 0.46, 0, -0.1, 0.5, -0.2, 0.1, 0.46]
    for t in range(10):
        hand = np.zeros(15)
        hand[:3] = [0.03, -0.2, 0.57 - t / 100]
        change(folder / f"episode_{t:07d}.npz", scene_obs=near_table, robot_obs=hand)
    shutil.rmtree(tmp_path / "out")
    first, _ = convert(tmp_path)
    for t in range(4):
        shares = [pybullet_share(point) for point in first.object_position[t]]
        np.testing.assert_allclose(first.object_pixel[t], shares, atol=1e-5)
        share = pybullet_share(first.state[t, :3])
        np.testing.assert_allclose(first.hand_pixel[t], share, atol=1e-5)
    assert (np.abs(first.object_pixel - 0.5) < 0.5).all(), "the table is in the picture"


@pytest.mark.parametrize(
    ("text", "message"),
    [("cameras: {}", "KeyError: 'static'"), (HYDRA.replace("aspect: 1", "aspect: 2"), "is 2, not")],
)
def test_a_camera_that_is_not_described_is_one_line(tmp_path, text, message):
    folder = write(tmp_path / "training")
    (folder / ".hydra").mkdir()
    (folder / ".hydra/merged_config.yaml").write_text(text)
    with pytest.raises(SystemExit, match=f"merged_config.yaml: .*{message}") as e:
        convert(tmp_path)
    assert "\n" not in str(e.value)


def test_a_conversion_goes_on_after_a_stop(tmp_path):
    """A damaged frame at the end of a split lost the hours before it."""
    folder = write(tmp_path / "training")
    frame = folder / "episode_0000009.npz"
    whole = frame.read_bytes()
    cut(frame)
    flags = ["--data", str(folder), "--out", str(tmp_path / "out"), "--resume"]
    with pytest.raises(SystemExit, match="episode_0000009.npz: BadZipFile.*stays in"):
        calvin.main(["convert", *flags])
    assert [path.name for path in (tmp_path / "out.part").iterdir()] == [
        "episode_000000.safetensors"
    ]
    frame.write_bytes(whole)
    calvin.main(["convert", *flags])
    assert [file.task for file in fast_tokenizer.read_episodes(tmp_path / "out")] == [
        "open the drawer",
        "turn on the light",
    ]


def change(path, **new):
    with np.load(path) as f:
        step = {**f, **new}
    np.savez(path, **{k: v for k, v in step.items() if v is not None})


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def trap(folder):
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", {"language": Trap()})


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


FRAME, ANN = "episode_0000006.npz", "auto_lang_ann.npy"
BAD = {
    "frame gone": (lambda f: (f / FRAME).unlink(), f"{FRAME}: FileNotFoundError"),
    "frame cut": (lambda f: cut(f / FRAME), f"{FRAME}: BadZipFile"),
    "frame no npz": (lambda f: (f / FRAME).write_text("hello"), f"{FRAME}: .*pickle"),
    "no actions": (lambda f: change(f / FRAME, rel_actions=None), f"{FRAME}: KeyError: .*rel_act"),
    "cameras swapped": (
        lambda f: change(f / FRAME, rgb_static=np.zeros((84, 84, 3), np.uint8)),
        rf"{FRAME}: rgb_static is \(84, 84, 3\), not \(200, 200, 3\)",
    ),
    "absolute actions": (
        lambda f: change(f / FRAME, rel_actions=np.full(7, 3.0)),
        rf"{FRAME}: rel_actions above 1, .*3",
    ),
    "gripper": (lambda f: change(f / FRAME, rel_actions=np.zeros(7)), "gripper not -1 or 1.*0"),
    "NaN": (
        lambda f: change(f / FRAME, robot_obs=np.full(15, np.nan)),
        "calvin training 3-6: state of step 3 is not finite",
    ),
    "no scene": (lambda f: change(f / FRAME, scene_obs=np.zeros(6)), r"scene_obs is \(6,\), not"),
    "no annotations": (lambda f: (f / "lang_annotations" / ANN).unlink(), f"{ANN}: FileNotFound"),
    "annotations cut": (lambda f: cut(f / "lang_annotations" / ANN), f"{ANN}: "),
    "code in annotations": (trap, rf"{ANN}: UnpicklingError: it would run \w+.mkdir"),
    "a text too few": (
        lambda f: annotate(f, ["open"], [(3, 6), (5, 9)]),
        rf"{ANN}: zip\(\) argument 2",
    ),
    "window backwards": (lambda f: annotate(f, ["a", "b"], [(6, 3), (5, 9)]), "window 6-3"),
    "empty text": (lambda f: annotate(f, ["a", " "], [(3, 6), (5, 9)]), "window 5-9 .* ' '"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_ends_in_one_line_and_leaves_nothing(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage, message = BAD[case]
    damage(write(tmp_path / "training"))
    with pytest.raises(SystemExit, match=message) as stop:
        convert(tmp_path)
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
    assert [p.name for p in tmp_path.iterdir()] == ["training"]  # neither out, nor part, nor trap
