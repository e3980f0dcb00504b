"""LIBERO's HDF5 demonstrations in their published layout -> episodes; the protocol's settings."""

import argparse
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from benchmarks import libero, simulate
from fast_tokenizer import read_episodes


def test_axis_angle_against_scipy():
    for q in Rotation.random(20, rng=0).as_quat():
        got = Rotation.from_rotvec(libero.axis_angle(q)).as_matrix()
        assert got == pytest.approx(Rotation.from_quat(q).as_matrix(), abs=1e-6)
    assert libero.axis_angle(np.array([0, 0, 0, 1.0])).tolist() == [0, 0, 0]
    # just beyond half a turn the long way round is kept, as robosuite's quat2axisangle has it
    assert libero.axis_angle(np.array([1.0, 0, 0, -1e-3]))[0] == pytest.approx(
        np.pi + 2e-3, abs=1e-5
    )


def test_protocol_settings():
    parser = argparse.ArgumentParser()
    libero.arguments(parser.add_argument)
    args = parser.parse_args([])
    assert len(libero.tasks(args)) == 40 and libero.TRIALS == 50
    assert list(libero.LIMITS.values()) == [220, 280, 300, 520]
    args = parser.parse_args(["--suites", "libero_spatial", "--tasks", "3,7", "--limit", "280"])
    assert libero.tasks(args) == ["spatial/3", "spatial/7"]
    assert args.size == 0 and args.limit == 280
    for flags in (["--suites", "libero_moon"], ["--tasks", "1234"]):
        with pytest.raises(ValueError, match="--suites of spatial.*0 to 9"):
            libero.tasks(parser.parse_args(flags))
    parser.add_argument("--episodes", default=20)  # a recording
    recorded = libero.tasks(parser.parse_args(["--suites", "spatial,object"]))
    assert len(recorded) == 19 and "spatial/4" not in recorded  # in it each try failed
    goal = libero.tasks(parser.parse_args(["--suites", "goal"]))
    assert goal == [f"goal/{number}" for number in libero.GOAL_GRASPS]
    for flags in (["--suites", "spatial,long"], ["--suites", "goal", "--tasks", "1,3"]):
        with pytest.raises(ValueError, match="the expert can do .*spatial 0,1,2,3,5,6,7,8,9, obj"):
            libero.tasks(parser.parse_args(flags))


def test_things_are_called_as_instructions_call_them():
    spatial = "pick up the black bowl next to the cookie box and place it on the plate"
    for name, instruction, words in (
        ("akita_black_bowl_1", spatial, "black bowl"),
        ("akita_black_bowl_1", "put the bowl on the stove", "bowl"),
        ("cookies_1", spatial, "cookie box"),
        ("glazed_rim_porcelain_ramekin_1", spatial, "ramekin"),
        ("wooden_cabinet_1", spatial, "cabinet"),
        ("wooden_cabinet_1", "pick up the bowl on the wooden cabinet", "wooden cabinet"),
        ("alphabet_soup_1", "pick up the alphabet soup", "alphabet soup"),
        ("plate_2", "put the white mug on the right plate", "right plate"),
        ("plate_2", "put the white mug on the plate", "plate"),
        ("wine_rack_1", spatial, "wine rack"),
    ):
        assert libero.spoken(name, instruction) == words


# ---- the package: what LIBERO offers, as far as a trial needs it


class FakeWorld:
    """robosuite's part: sensors are made anew at each reset, and asked in each step."""

    def __init__(self, shapes, calls):
        self.shapes = shapes  # camera -> (H, W)
        self.calls = calls
        self.steps = 0
        self.obj_of_interest = ["akita_black_bowl_1", "plate_1"]
        self.obj_body_id = {"plate_1": 0, "akita_black_bowl_1": 1, "akita_black_bowl_2": 2}
        self.object_sites_dict = {"wooden_cabinet_1_top_region": None}

    def _create_camera_sensors(self, name):
        def sensor(cache):
            self.calls.append(f"render {name}")
            height, width = self.shapes[name]
            row, column = np.mgrid[:height, :width]
            return np.stack([row, column, row * 0 + self.steps], 2).astype(np.uint8)

        return [sensor], [f"{name}_image"]

    def observe(self):
        obs = {
            "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
            "robot0_eef_quat": np.array([0, 0, 0.5**0.5, 0.5**0.5]),  # a quarter about z
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }
        for sensor, name in self.sensors:
            obs[name] = sensor({})
        return obs


class FakeEnv:
    """LIBERO's OffScreenRenderEnv; done in step 12."""

    def __init__(self, bddl_file_name, camera_names, camera_heights, camera_widths):
        self.calls = [bddl_file_name]
        shapes = dict(
            zip(camera_names, zip(camera_heights, camera_widths, strict=True), strict=True)
        )
        self.env = FakeWorld(shapes, self.calls)

    def seed(self, seed):
        self.calls.append(f"seed {seed}")

    def reset(self):
        self.calls.append("reset")
        self.env.steps = 0
        self.env.sensors = []
        for camera in self.env.shapes:
            sensors, names = self.env._create_camera_sensors(camera)
            self.env.sensors += zip(sensors, names, strict=True)

    def set_init_state(self, state):
        self.calls.append(f"state {state}")

    def step(self, action):
        self.env.steps += 1
        self.calls.append(list(action))
        done = self.env.steps == 12
        return self.env.observe(), float(done), done, {}


@pytest.fixture
def package(monkeypatch):
    """LIBERO's modules: each suite has 50 initial states, numbered, of every task."""
    task = SimpleNamespace(
        language="put the bowl in the top drawer", problem_folder="suite", bddl_file="task.bddl"
    )

    class Suite:
        def get_task(self, number):
            return task

        def get_task_init_states(self, number):
            return [f"{number}.{i}" for i in range(50)]

    suites = {f"libero_{name}": Suite for name in ("spatial", "object", "goal", "10")}
    modules = {
        "libero.libero": {"get_libero_path": lambda name: f"/{name}"},
        "libero.libero.benchmark": {"get_benchmark_dict": lambda: suites},
        "libero.libero.envs": {"OffScreenRenderEnv": FakeEnv},
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    monkeypatch.setattr(libero, "compile_scenes_once", lambda: None)


def test_a_trial_begins_as_the_benchmark_says(package):
    """Seed 0, the initial state of its number and never a reset after it, ten steps with an open
    gripper; a camera renders where somebody looks."""
    env = libero.Simulator("long/3", {"image": [4, 6], "image_wrist": [2, 2]}, 0)
    assert (env.limit, env.prompt) == (520, "put the bowl in the top drawer")
    calls = env.env.calls
    env.reset(2, "eval")
    settle = [0, 0, 0, 0, 0, 0, -1]
    renders = ["render agentview", "render robot0_eye_in_hand"]
    begun = ["/bddl_files/suite/task.bddl", "seed 0", "reset", "state 3.2"]
    assert calls == [*begun, *[settle] * 10, *renders]
    del calls[:]
    assert env.advance(np.zeros(7), look=False) is False
    assert env.advance(np.zeros(7), look=True) is True, "in the step in which the goal holds"
    assert [call for call in calls if isinstance(call, str)] == renders
    del calls[:]
    env.reset(7, "train")
    assert calls[:2] == ["seed 7", "reset"] and not any("state" in str(call) for call in calls)
    # "bowl" is the one that the task is about; the drawer that the instruction names is there too
    assert env.objects == {
        "bowl": "akita_black_bowl_1",
        "plate": "plate_1",
        "other bowl": "akita_black_bowl_2",
        "top drawer": "wooden_cabinet_1_top_region",
    }


def test_what_a_policy_sees_is_what_it_was_trained_on(package):
    """Both pictures turned by 180 degrees, each of its own size, as the converter does (below); the
    state is the hand's place, its turn, the two fingers."""
    env = libero.Simulator("spatial/0", {"image": [4, 6], "image_wrist": [2, 3]}, 99)
    env.reset(0, "eval")
    assert env.limit == 99
    seen = env.observe(["image", "image_wrist"])
    assert seen["image"].shape == (4, 6, 3) and seen["image_wrist"].shape == (2, 3, 3)
    for name, last in (("image", [3, 5]), ("image_wrist", [1, 2])):
        assert seen[name][0, 0].tolist() == [*last, 10], "the picture after ten steps"
        assert seen[name][-1, -1].tolist() == [0, 0, 10]
        assert seen[name][0, -1].tolist() == [last[0], 0, 10]
    state = [0.1, 0.2, 0.3, 0, 0, np.pi / 2, 0.04, -0.04]
    assert seen["state"].dtype == np.float32
    assert seen["state"].tolist() == pytest.approx(state, abs=1e-6)
    # of a policy that reads one camera the other is of the usual size
    env = libero.Simulator("object/0", {"image_wrist": [2, 2]}, 0)
    side = simulate.SIDE
    assert list(env.env.env.shapes.values()) == [(side, side), (2, 2)] and env.limit == 280


def write(path, demos=2, steps=6, **changes):
    """A file in the layout of LIBERO's demonstrations (shared by its four suites)."""
    h5py = pytest.importorskip("h5py", reason="pip install -r requirements-extras.txt")
    rng = np.random.default_rng(len(path.name))
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_name"] = "Libero_Tabletop_Manipulation"
        data.attrs["problem_info"] = json.dumps(
            {"language_instruction": ['"', *changes.get("words", path.name[:5]), '"']}
        )
        data.attrs["macros_image_convention"] = changes.get("convention", "opengl")
        for i in range(demos):
            n = steps + i
            demo = data.create_group(f"demo_{i}")
            obs = demo.create_group("obs")
            obs["agentview_rgb"] = rng.integers(0, 255, (n, 8, 8, 3), np.uint8)
            obs["eye_in_hand_rgb"] = rng.integers(0, 255, (n, 8, 8, 3), np.uint8)
            obs["ee_states"] = rng.normal(size=(n, 6))
            obs["gripper_states"] = rng.normal(size=(n, 2))
            obs["joint_states"] = rng.normal(size=(n, 7))
            actions = rng.uniform(-1, 1, (n, 7))
            actions[:, 6] = -1
            actions[2:4, :6] = 0  # two steps without motion, in the second of which
            actions[3:, 6] = 1  # the gripper closes
            demo["actions"] = actions
            demo.attrs["num_samples"] = n
        if "cut" in changes:
            name = "demo_1/" + changes["cut"]
            without_the_last = data[name][:-1]
            del data[name]
            data[name] = without_the_last
        if "drop" in changes:
            del data["demo_1/" + changes["drop"]]
        if "wrong" in changes:
            data["demo_1/" + changes["wrong"]][2] = np.nan


def convert(monkeypatch, folder, out, *flags):
    monkeypatch.setattr(sys, "argv", ["x", "--convert", str(folder), "--out", str(out), *flags])
    simulate.record("libero", libero.convert)
    return read_episodes(out)


def test_demonstrations_become_episodes(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py", reason="pip install -r requirements-extras.txt")
    for name in ("first_demo.hdf5", "second_demo.hdf5"):
        write(tmp_path / name, demos=11)
    files = convert(monkeypatch, tmp_path, tmp_path / "a")
    assert [f.task for f in files[:4]] == ["first", "secon"] * 2, "tasks take turns"
    assert [len(f) for f in files[::2]] == list(range(6, 17)), "demo_10 after demo_9"
    assert files[0].fps == 20 and files[0].deltas == 6
    assert files[0].cameras == ("image", "image_wrist")
    with h5py.File(tmp_path / "first_demo.hdf5") as file:
        demo = file["data/demo_1"]
        turned = demo["obs/agentview_rgb"][3][::-1, ::-1]
        assert (files[2].frame(3) == turned).all()
        assert (
            files[2].frame(0, "image_wrist") == demo["obs/eye_in_hand_rgb"][0][::-1, ::-1]
        ).all()
        state = np.concatenate([demo["obs/ee_states"], demo["obs/gripper_states"]], 1)
        assert files[2].state == pytest.approx(state, abs=1e-6)
        assert files[2].action == pytest.approx(demo["actions"][:], abs=1e-6)
    fewer = convert(monkeypatch, tmp_path, tmp_path / "b", "--drop-noops")
    assert [len(f) for f in fewer] == [len(f) - 1 for f in files], "the closing gripper stays"
    assert (fewer[0].frame(2) == files[0].frame(3)).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cut": "actions"}, "demo_1: image is"),
        ({"drop": "obs/ee_states"}, "ee_states"),
        ({"cut": "obs/agentview_rgb"}, "demo_1: image is"),
        ({"wrong": "actions"}, "demo_1: action of step 2 is not finite"),
        ({"convention": "opencv"}, "not in the opengl convention"),
        ({"words": " "}, "its language_instruction is empty"),  # it was converted as it is
    ],
)
def test_damaged_demonstrations_are_named(tmp_path, monkeypatch, changes, words):
    write(tmp_path / "a_demo.hdf5", **changes)
    with pytest.raises(SystemExit, match=f"a_demo.hdf5.*{words}.*copy the dataset again"):
        convert(monkeypatch, tmp_path, tmp_path / "out")


def test_files_that_are_no_demonstrations(tmp_path, monkeypatch):
    pytest.importorskip("h5py", reason="pip install -r requirements-extras.txt")
    with pytest.raises(SystemExit, match="no .*_demo.hdf5 in it"):
        convert(monkeypatch, tmp_path, tmp_path / "out")
    write(tmp_path / "b_demo.hdf5")
    whole = (tmp_path / "b_demo.hdf5").read_bytes()
    for i, content in enumerate((whole[: len(whole) // 2], b"", b"<html>not found</html>")):
        (tmp_path / "b_demo.hdf5").write_bytes(content)
        with pytest.raises(SystemExit, match="b_demo.hdf5: .*copy the dataset again"):
            convert(monkeypatch, tmp_path, tmp_path / f"out{i}")


@pytest.mark.sim
@pytest.mark.parametrize(
    ("task", "first", "others"),
    [
        ("spatial/0", ["black bowl", "plate"], {"other black bowl", "cabinet", "stove", "ramekin"}),
        ("spatial/4", ["black bowl", "plate"], {"other black bowl", "top drawer"}),
        ("object/0", ["alphabet soup", "basket"], {"milk", "butter", "tomato sauce"}),
        ("goal/0", ["bowl", "cream cheese"], {"middle drawer", "stove", "wine rack"}),
    ],
)
def test_objects_of_the_real_simulator(task, first, others):
    """Names, what the expert goes for, and the camera of tools/axes."""
    pytest.importorskip("libero.libero.envs", reason="LIBERO's Python, see docs/simulators.md")
    env = libero.Simulator(task, {"image": [64, 64], "image_wrist": [64, 64]}, 0)
    assert env.env.env.horizon == libero.SETTLING + libero.MOST_STEPS
    assert len(env.states) == libero.TRIALS
    env.reset(1, "train")
    suite = task.split("/")[0]
    if suite != "goal":
        env.expert()
    else:  # a part of the furniture counts as the whole
        env.target = "flat_stove_1_cook_region"
    scene = env.scene()
    assert list(scene.positions)[:2] == first and others < set(scene.positions)
    assert scene.target == ("stove" if suite == "goal" else first[0])
    axes = Path(libero.__file__).parents[1] / "tools/axes"
    kind = "object" if suite == "object" else "spatial"
    committed = json.loads((axes / f"libero_{kind}_camera.json").read_text())["matrix"]
    np.testing.assert_allclose(scene.camera, committed, atol=1e-3)
    for name, key in env.objects.items():
        position = scene.positions[name]
        if key + "_pos" in env.seen:  # the middle of a thing is near its origin
            assert np.linalg.norm(position - env.seen[key + "_pos"]) < 0.08
        share = simulate.project(scene.camera, position[None])
        assert (share > 0).all() and (share < 1).all()
    env.env.close()


@pytest.mark.sim
def test_a_scene_that_is_compiled_once_is_the_same_after_each_reset(monkeypatch):
    """The second trial: the states, frames and objects of a simulator that compiles anew."""
    pytest.importorskip("libero.libero.envs", reason="LIBERO's Python, see docs/simulators.md")
    import mujoco
    from robosuite.utils.binding_utils import MjSim

    def second_trial():
        env = libero.Simulator("spatial/0", {"image": [64, 64], "image_wrist": [64, 64]}, 0)
        seen = []
        for number in range(2):
            env.reset(number, "train")
            for _ in range(6):
                env.advance(env.expert(), look=True)
            objects = np.concatenate(list(env.scene().positions.values()))
            seen.append({**env.observe(env.cameras), "objects": objects})
        env.env.close()
        return seen[1]

    texts = []
    compile_scene = mujoco.MjModel.from_xml_string
    monkeypatch.setattr(
        mujoco.MjModel, "from_xml_string", lambda xml: texts.append(xml) or compile_scene(xml)
    )
    libero.compile_scenes_once.cache_clear()
    once = second_trial()
    assert len(texts) == 1
    monkeypatch.setattr(libero, "compile_scenes_once", lambda: None)
    anew = classmethod(lambda cls, xml: cls(mujoco.MjModel.from_xml_string(xml)))
    monkeypatch.setattr(MjSim, "from_xml_string", anew)
    each_time = second_trial()
    assert len(texts) == 4  # LIBERO resets once more as it builds a task
    for name, value in each_time.items():
        np.testing.assert_array_equal(once[name], value)


@pytest.mark.sim
@pytest.mark.parametrize("number", libero.GOAL_GRASPS)
def test_the_expert_does_goal(number):
    pytest.importorskip("libero.libero.envs", reason="LIBERO's Python, see docs/simulators.md")
    env = libero.Simulator(f"goal/{number}", {"image": [64, 64], "image_wrist": [64, 64]}, 0)
    env.reset(1, "train")
    targets = []
    success = False
    while not success and len(targets) < env.limit:
        action = np.clip(env.expert(), -1, 1)
        targets.append(env.scene().target)
        success = env.advance(action, look=False)
    assert success
    thing, place = (name for name, _ in itertools.groupby(targets))
    assert thing in env.prompt and place in env.prompt
    env.env.close()


@pytest.mark.sim
def test_a_file_written_from_the_real_simulator(tmp_path, monkeypatch):
    """Frames and states as LIBERO's own recorder stores them (create_dataset.py: images as
    rendered, the hand by robosuite's quat2axisangle) become the episode of our own recording."""
    pytest.importorskip("libero.libero.envs", reason="LIBERO's Python, see docs/simulators.md")
    h5py = pytest.importorskip("h5py", reason="pip install -r requirements-extras.txt")
    from robosuite.utils.transform_utils import quat2axisangle

    env = libero.Simulator("spatial/2", {"image": [64, 64], "image_wrist": [48, 64]}, 0)
    env.reset(1, "eval")
    write(tmp_path / "real_demo.hdf5", demos=1)
    rows = []
    ours = []
    for _ in range(4):
        seen = env.seen
        action = np.float64(env.expert())
        hand = np.concatenate([seen["robot0_eef_pos"], quat2axisangle(seen["robot0_eef_quat"])])
        rows.append(
            {
                "obs/agentview_rgb": seen["agentview_image"],
                "obs/ee_states": hand,
                "obs/eye_in_hand_rgb": seen["robot0_eye_in_hand_image"],
                "actions": action,
                "obs/gripper_states": seen["robot0_gripper_qpos"],
            }
        )
        ours.append({**env.observe(env.cameras), "action": np.float32(action)})
        env.advance(action)
    env.env.close()
    with h5py.File(tmp_path / "real_demo.hdf5", "a") as file:
        for name in rows[0]:
            del file["data/demo_0/" + name]
            file["data/demo_0/" + name] = np.stack([row[name] for row in rows])
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": env.prompt})
    (episode,) = convert(monkeypatch, tmp_path, tmp_path / "out")
    assert episode.task == env.prompt and len(episode) == 4
    for t, row in enumerate(ours):
        assert row["image"].std() > 10 and (row["image"] != ours[t - 1]["image"]).any()
        assert all((episode.frame(t, name) == row[name]).all() for name in env.cameras)
        assert episode.state[t] == pytest.approx(row["state"], abs=1e-6)
        assert (episode.action[t] == row["action"]).all()
