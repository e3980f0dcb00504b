"""Trials in worker processes and demonstrations, with a toy simulator that the tests write, and with
Meta-World itself where it is installed (marker sim)."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from test_serve import Fake

from benchmarks import simulate
from fast_tokenizer import read_episodes

TOY = '''
"""A hand on a line: the state is its place, the goal 10 * (task + 1) steps of 1 to the right."""
import os, pathlib
import numpy as np
TRIALS = 2
def arguments(add): pass
def tasks(args): return ["toy/0", "toy/1"]
class Simulator:
    limit, fps, cameras = 15, 10, ["image", "image_wrist"]
    def __init__(self, task, size, limit):
        print("simulators print")
        self.task, self.prompt, self.env = task, "go right", self
        self.goal = 10 * (int(task[-1]) + 1)
    def reset(self, number, split):
        self.at, self.views, self.number = 8.0 if split == "train" else number, 0, number
        if os.path.exists(os.environ["CRASH"]) and [self.task[-1], number] == ["1", 1]:
            os._exit(139)
    def observe(self, cameras):
        self.views += 1
        view = np.full((8, 8, 3), self.views, np.uint8)
        return {**{name: view for name in cameras}, "state": np.float32([self.at, 0])}
    def advance(self, action, look=True):
        self.at += float(action[0])
        return self.at >= self.goal
    def expert(self):  # fails in every state whose seed ends in 0
        return np.array([0.0 if self.number % 10 == 0 else 5.0, 0, 0])
    def close(self): pass
'''


class Right(Fake):
    """Goes right by 1 in each step."""

    def __init__(self):
        super().__init__()
        import torch

        self.head, self.seen = torch.nn.Linear(1, 1), []

    def act_batch(self, images, instructions, states, keys=None):
        self.seen += [(int(view[0][0, 0, 0]), float(s[0])) for view, s in zip(images, states)]
        return np.ones((len(images), 4, 3), np.float32)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy among the benchmarks, for this process and its workers -> evaluation's arguments."""
    pytest.importorskip("websockets", reason="pip install -r requirements-extras.txt")
    pytest.importorskip("msgpack", reason="pip install -r requirements-extras.txt")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CRASH", str(tmp_path / "crash"))
    return types.SimpleNamespace(
        command="toy",
        out=str(tmp_path / "r.json"),
        variant="a",
        trials=2,
        workers=2,
        execute=2,
        seed=0,
        ensemble=0,
        batch=8,
        python=sys.executable,
        size=8,
        limit=0,
    )


def rows(args):
    """What the results files of all settings hold."""
    lines = [
        line
        for path in pathlib.Path(args.out).parent.glob("r.toy.a.*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_trials_ask_at_chunk_boundaries_and_stop_at_the_limit(toy):
    policy = Right()
    assert simulate.trials(policy, toy) == [("toy", "0", True)] * 2 + [("toy", "1", False)] * 2
    for view, at in policy.seen:
        assert at in (2 * (view - 1), 2 * (view - 1) + 1), "a frame a chunk of two, no more"
    assert sorted(at for _, at in policy.seen) == sorted(
        n + step for last in (10, 15) for n in (0, 1) for step in range(0, last, 2)
    )
    steps = {(r["task"], r["trial"]): r["steps"] for r in rows(toy)}
    assert steps == {("toy/0", 0): 10, ("toy/0", 1): 9, ("toy/1", 0): 15, ("toy/1", 1): 15}


def test_a_crash_is_no_failed_trial_and_the_same_command_goes_on(toy, tmp_path, capfd):
    policy = Right()
    (tmp_path / "crash").touch()
    toy.workers = 1
    with pytest.raises(
        ValueError, match=r"task toy/1, trial 1 \(exit code 139.*after the 3 trials"
    ):
        simulate.trials(policy, toy)
    (path,) = tmp_path.glob("r.toy.a.*.jsonl")
    path.write_text(path.read_text() + '\n{"task": "toy/1", "tri')  # a line cut off by the stop
    (tmp_path / "crash").unlink()
    policy.seen.clear()
    assert [row[2] for row in simulate.trials(policy, toy)] == [True, True, False, False]
    assert {at % 2 for _, at in policy.seen} == {1}, "only the last trial was run again"
    policy.seen.clear()
    assert len(simulate.trials(policy, toy)) == 4 and not policy.seen
    assert len(rows(toy)) == 4
    toy.execute = 1
    assert len(simulate.trials(policy, toy)) == 4 and len(rows(toy)) == 8, "other settings, anew"
    assert len(simulate.trials(Right(), toy)) == 4 and len(rows(toy)) == 12, "other weights, anew"
    assert "simulators print" in capfd.readouterr().err


def test_a_crash_stops_the_other_workers(toy, tmp_path):
    (tmp_path / "crash").touch()
    toy.trials = 12
    with pytest.raises(ValueError, match=r"task toy/1, trial 1 \(exit code 139"):
        simulate.trials(Right(), toy)
    assert len(rows(toy)) < 23


def test_record_drops_failures_and_counts_them(toy, tmp_path, monkeypatch, capsys):
    argv = ["x", "record", "--out", str(tmp_path / "data"), "--episodes", "4"]
    monkeypatch.setattr(sys, "argv", argv)
    simulate.record("toy")
    files = read_episodes(tmp_path / "data")
    assert [f.source for f in files] == ["toy/0", "toy/1"] * 3, "tasks take turns"
    assert files[0].task == "go right" and files[0].fps == 10
    assert files[0].cameras == ("image", "image_wrist")
    assert set(files[0].action[:, 0]) == {1.0}, "clipped, and without the noise"
    assert len(set(np.diff(files[1].state[:, 0]))) > 1, "carried out with noise"
    assert (tmp_path / "data/episodes/stats.json").exists()
    assert "2 failed demonstrations dropped: {'toy/0': 1, 'toy/1': 1}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="already holds data"):
        simulate.record("toy")


@pytest.mark.sim
def test_metaworld_records_and_evaluates(tmp_path, monkeypatch):
    """Real physics: the expert's demonstration, and the expert as the policy of two trials."""
    pytest.importorskip("metaworld", reason="pip install -r requirements-extras.txt")
    pytest.importorskip("websockets", reason="pip install -r requirements-extras.txt")
    root = pathlib.Path(__file__).parents[1]
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.metaworld",
            "--tasks",
            "reach-v3",
            "--episodes",
            "2",
            "--size",
            "32",
            "--out",
            tmp_path,
        ],
        cwd=root,
        check=True,
    )
    files = read_episodes(tmp_path)
    assert len(files) == 2 and files[0].task == "reach the red ball"
    assert files[0].action.shape[1] == files[0].state.shape[1] == 4
    assert files[0].frame(0).shape == (32, 32, 3) and files[0].frame(0).std() > 10
    assert (files[0].state[0] != files[1].state[-1]).any()
    args = types.SimpleNamespace(
        command="metaworld",
        out=str(tmp_path / "r.json"),
        variant="a",
        trials=2,
        workers=1,
        execute=4,
        seed=0,
        ensemble=0,
        batch=8,
        python=sys.executable,
        tasks="reach-v3",
        size=32,
        limit=40,
    )
    policy = Right()  # a constant push to the right reaches no goal, and each trial is counted
    policy.cameras, policy.action_dim = ["image"], 4
    policy.spec["stats"] = {
        "state": {"q01": [0] * 4, "q99": [1] * 4},
        "action": {"q01": [-1] * 4, "q99": [1] * 4},
    }
    monkeypatch.setattr(
        Right,
        "act_batch",
        lambda self, images, *_: (
            self.sizes.append(images[0][0].shape) or np.ones((len(images), 4, 4), np.float32)
        ),
    )
    assert simulate.trials(policy, args) == [("metaworld", "reach-v3", False)] * 2
    assert policy.sizes == [(32, 32, 3)] * 20, "a frame every 4 of 40 steps"
