"""Intervals against hand-worked numbers, the trial runner against scripted policies, the table."""

import argparse
import json
import multiprocessing
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import evaluate
from benchmarks import tabletop as tt
from benchmarks.simulate import Outcome, TrialResult
from benchmarks.tabletop import drive


def test_wilson_against_a_worked_example():
    """8 of 10: Wilson's interval is 0.490 to 0.943 (e.g. Newcombe 1998); 0 of n starts at 0."""
    value = evaluate.wilson(8, 10)
    assert (round(value["low"], 3), round(value["high"], 3), value["n"]) == (0.490, 0.943, 10)
    assert evaluate.wilson(0, 20)["low"] == 0 and evaluate.wilson(20, 20)["high"] == 1
    with pytest.raises(ValueError, match="at least one"):
        evaluate.wilson(0, 0)


def test_bootstrap_covers_the_mean_and_is_repeatable():
    values = np.random.default_rng(1).normal(2, 1, 400)
    value = evaluate.bootstrap(values)
    assert value == evaluate.bootstrap(values) and value["low"] < values.mean() < value["high"]
    assert value["high"] - value["low"] == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert evaluate.bootstrap([])["n"] == 0


class Scripted:
    """A policy with the interface of vla.Policy that reads the expert off the environments."""

    horizon = 8

    def __init__(self, trials, still=False):
        self.trials = trials
        self.still = still

    def act_batch(self, images, instructions, states, keys=None):
        chunks = []
        for instruction, state in zip(instructions, states, strict=True):
            twin = self.seen_from(instruction, state).clone()
            chunk = []
            for _ in range(8):
                action = np.zeros(7) if self.still else twin.expert()[0]
                chunk.append(action)
                twin.advance(action)
            chunks.append(np.stack(chunk))
        return np.stack(chunks)

    def seen_from(self, instruction, state):
        """The environment that shows this instruction and state."""
        for trial in self.trials:
            env = trial.env
            if not trial.done and env.instruction == instruction:
                if np.allclose(env.gripper_xyz, state[:3], atol=1e-6):
                    return env
        raise AssertionError("an observation of no trial")


def test_closed_loop_counts_what_the_expert_solves_and_a_still_hand_does_not():
    suites = ["spatial", "object", "goal", "long", "chain"]
    trials = tt.make_trials(suites, 1, 3)
    drive(Scripted(trials), trials, execute=4, batch=16)
    assert all(t.done for t in trials)
    assert [t.solved for t in trials] == [1] * 40 + [5] * 3
    trials = tt.make_trials(["goal", "chain"], 1, 2)
    drive(Scripted(trials, still=True), trials, execute=4, batch=16)
    assert [t.solved for t in trials] == [0] * 12
    assert all(t.env.steps == t.env.limit for t in trials)


def test_trials_are_the_fixed_evaluation_states():
    trials = tt.make_trials(["object"], 2, 0)
    again = tt.make_trials(["object"], 2, 0)
    assert len(trials) == 20
    for a, b in zip(trials, again, strict=True):
        assert (a.env.render() == b.env.render()).all()
    env = tt.Tabletop("object")
    env.reset(0, 0, "train")
    assert (trials[0].env.render() != env.render()).any()


def write_results(tmp_path, variants):
    path = tmp_path / "r.json"
    results = {
        "preset": "p",
        "arms": variants,
        "seeds": [0],
        "hardware": "h",
        "minutes": 1,
        "versions": {},
        "commands": [],
    }
    path.write_text(json.dumps(results))
    return path


def test_report_table_and_paired_differences(tmp_path, capsys):
    def variant(shift):
        values = [round(0.2 + shift + 0.001 * i, 4) for i in range(51)]
        metrics = {
            "think sampled r_a": evaluate.bootstrap(values),
            "success": evaluate.wilson(30, 40),
        }
        wins = [True] * 30 + [shift > 0] * 10
        return {"metrics": metrics, "paired": {"think sampled r_a": values, "success": wins}}

    path = write_results(tmp_path, {"SFT": variant(0), "SFT+RL": variant(0.05)})
    evaluate.main(["report", str(path), "--markdown", str(tmp_path / "r.md")])
    out = capsys.readouterr().out
    assert "| SFT+RL | - | - | 0.275 [" in out and "75.0 [" in out
    # every prompt gained 0.05, so the interval of the difference has no width
    assert "think sampled r_a: SFT+RL - SFT = 0.050 [0.050, 0.050], n 51" in out
    assert "success: SFT+RL - SFT = 25.0 [" in out  # 10 of 40 trials more, and wins are booleans
    assert (tmp_path / "r.md").read_text() in out
    evaluate.main(["report", str(path), "--variants", "SFT+RL,SFT", "--minutes", "19.5"])
    out = capsys.readouterr().out
    assert "SFT - SFT+RL = -0.050" in out and "the whole run 19.5 min" in out
    assert out.index("| SFT+RL |") < out.index("| SFT |")
    evaluate.main(
        ["report", str(path), "--variants", "SFT,SFT+RL,SFT"]
    )  # to compare with one again
    out = capsys.readouterr().out
    assert out.count("| SFT |") == 2 and "SFT - SFT+RL = -0.050" in out
    with pytest.raises(ValueError, match="no variant base; it has SFT, SFT"):
        evaluate.main(["report", str(path), "--variants", "base,SFT"])


def write_variant(path, name):
    args = argparse.Namespace(
        out=path, variant=name, preset="p", command="actions", policy="x", seed=0, argv=[name]
    )
    evaluate.write_metrics({"m": evaluate.wilson(1, 2)}, {}, args, started=0)


def test_evaluations_at_once_lose_no_variant(tmp_path):
    """Each reads the file, adds its own and writes it back: without a lock the last one wins."""
    path = tmp_path / "r.json"
    names = [f"variant{i}" for i in range(12)]
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=write_variant, args=(path, name)) for name in names]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert sorted(json.loads(path.read_text())["arms"]) == sorted(names)


def test_bad_results_file_is_one_line(tmp_path):
    (tmp_path / "bad.json").write_text('{"arms": {')
    with pytest.raises(ValueError, match=r"bad.json:1: not JSON .*delete the file"):
        evaluate.main(["report", str(tmp_path / "bad.json")])
    with pytest.raises(ValueError, match="choose from spatial"):
        evaluate.main(["tabletop", "--policy", "x", "--suites", "spatial,moon"])


@pytest.mark.parametrize("command", ["tabletop", "metaworld", "libero", "calvin", "vqa", "actions"])
def test_help_of_a_command_names_its_own_flags(command, capsys):
    """They stand in the module of the command, which is imported for it alone."""
    flag = {"vqa": "--score", "actions": "--reward", "metaworld": "--python", "libero": "--suites"}
    with pytest.raises(SystemExit):
        evaluate.main([command, "--help"])
    out = capsys.readouterr().out
    assert flag.get(command, "--chains") in out and "--variant" in out


def test_plain_help_imports_no_benchmark():
    code = """
import sys, evaluate
try:
    evaluate.main(["--help"])
except SystemExit:
    print([name for name in sys.modules if name.split(".")[0] in ("benchmarks", "tools")])
"""
    root = pathlib.Path(evaluate.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert "libero" in done.stdout and done.stdout.endswith("[]\n")


def test_what_a_benchmark_has_none_of_is_not_written(tmp_path, monkeypatch):
    """An evaluation on CALVIN must leave the successes that LIBERO wrote before it alone."""
    path = tmp_path / "r.json"
    outcomes = {
        "libero": Outcome(trials=[TrialResult("goal", "0", True), TrialResult("goal", "1", False)]),
        "calvin": Outcome(chain_lengths=[5, 0]),
    }
    monkeypatch.setattr(evaluate.vla.Policy, "load", lambda *args, **kwargs: None)
    for command, more in (("libero", []), ("calvin", ["--data", "x"])):
        module = evaluate.simulator_module(command)
        monkeypatch.setattr(module, "evaluate", lambda policy, args, local: outcomes[args.command])
        evaluate.main([command, "--policy", "x", "--out", str(path), *more])
    variant = json.loads(path.read_text())["arms"]["policy"]
    assert variant["paired"] == {"success": [True, False], "chain length": [5, 0]}
    assert variant["metrics"]["success goal 1"]["mean"] == 0
    assert variant["metrics"]["chain 5"]["mean"] == 0.5
