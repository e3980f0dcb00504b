"""Intervals against hand-worked numbers, the trial runner against scripted policies, the table."""

import argparse
import collections
import json
import multiprocessing
import pathlib
import re
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import untrained
from ranks import on_ranks

import evaluate
import fast_tokenizer
import model
import sft
import vla
from benchmarks import simulate, tabletop_data
from benchmarks import tabletop as tt
from benchmarks.simulate import Outcome, TrialResult
from benchmarks.tabletop import drive
from tools import backbones, memory, speed


def test_wilson_against_a_worked_example():
    """8 of 10: Wilson's interval is 0.490 to 0.943 (e.g. Newcombe 1998); 0 of n starts at 0."""
    value = evaluate.wilson(8, 10)
    assert (round(value["low"], 3), round(value["high"], 3), value["n"]) == (0.490, 0.943, 10)
    assert evaluate.wilson(0, 20)["low"] == 0 and evaluate.wilson(20, 20)["high"] == 1
    with pytest.raises(ValueError, match="at least one"):
        evaluate.wilson(0, 0)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (1, 3), (8, 10), (431, 500), (0, 97)])
def test_wilson_is_the_root_of_its_equation(successes, n):
    """Its ends are the p at which the score |k / n - p| / sqrt(p (1 - p) / n) is 1.959964. They
    were coded here; scipy's are the same to the eighth digit."""
    value = evaluate.wilson(successes, n)
    assert 0 <= value["low"] <= value["mean"] <= value["high"] <= 1
    for end in (value["low"], value["high"]):
        if 0 < end < 1:
            score = abs(successes / n - end) / (end * (1 - end) / n) ** 0.5
            assert score == pytest.approx(1.959964, abs=1e-7)


def test_mcnemar_by_hand():
    """Ten trials that one model alone solves, nine of them the second: 1 + 10 of the 2^10 ways to
    fall are as rare on either side, p = 22 / 1024. What both or neither solve does not count."""
    both, neither = [1, 1], [0, 0]
    before = np.array([0] * 9 + [1] + both * 20 + neither * 30)
    after = np.array([1] * 9 + [0] + both * 20 + neither * 30)
    assert evaluate.mcnemar(before, after) == (9, 1, pytest.approx(22 / 1024))
    assert evaluate.mcnemar(after, before) == (1, 9, pytest.approx(22 / 1024))
    assert evaluate.mcnemar(before, before) == (0, 0, 1.0)
    five_each = np.arange(10) % 2
    assert evaluate.mcnemar(five_each, 1 - five_each) == (5, 5, pytest.approx(1.0))


def test_bootstrap_covers_the_mean_and_is_repeatable():
    values = np.random.default_rng(1).normal(2, 1, 400)
    value = evaluate.bootstrap(values)
    assert value == evaluate.bootstrap(values) and value["low"] < values.mean() < value["high"]
    assert value["high"] - value["low"] == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert evaluate.bootstrap([])["n"] == 0


def test_committed_intervals_follow_from_the_committed_values():
    results = pathlib.Path(__file__).parents[1] / "results/speedrun.json"
    checked = 0
    for variant in json.loads(results.read_text())["arms"].values():
        for metric in ("chain length", "think greedy r_a", "think sampled thought true"):
            values = [v for v in variant["paired"].get(metric, []) if v is not None and v == v]
            if values:
                # abs: the file rounds values
                assert evaluate.bootstrap(values) == pytest.approx(
                    variant["metrics"][metric], abs=1e-5
                )
                checked += 1
    assert checked == 9


class Scripted:
    """A policy with the interface of vla.Policy that reads the expert off the environments."""

    horizon = 8
    hold = None
    thoughts = None

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
    assert "| SFT+RL | 0.275 [" in out and "75.0 [" in out
    # every prompt gained 0.05, so the interval of the difference has no width
    assert "think sampled r_a: SFT+RL - SFT = 0.050 [0.050, 0.050], n 51" in out
    line = next(line for line in out.splitlines() if line.startswith("- success: SFT+RL"))
    assert line.startswith("- success: SFT+RL - SFT = 25.0 [")  # 10 of 40 trials, booleans
    assert line.endswith(", n 40; 10 gained, 0 lost, McNemar's p 0.002")  # 2 / 2^10
    assert out.count("McNemar") == 1, "of successes alone"
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


def test_differences_leave_out_prompts_of_which_nothing_decodes(tmp_path, capsys):
    """L1 was compared by its means alone: it has no value where no completion decodes. Answers to
    questions were not compared."""

    def variant(values):
        return {"metrics": {}, "paired": {"think greedy l1": values, "answers": values[:1]}}

    before = variant([0.3, None, 0.3, 0.5])
    after = variant([0.2, 0.2, None, 0.4])
    path = write_results(tmp_path, {"SFT": before, "SFT+RL": after, "none": variant([None] * 4)})
    evaluate.main(["report", str(path)])
    out = capsys.readouterr().out
    assert "- think greedy l1: SFT+RL - SFT = -0.100 [-0.100, -0.100], n 2" in out
    assert "- answers: SFT+RL - SFT = -0.100 [-0.100, -0.100], n 1" in out
    assert "none - SFT+RL" not in out and "McNemar" not in out


def test_answers_that_are_right_or_wrong_get_mcnemars_test(tmp_path, capsys):
    """Five that the second model alone has right: p = 2 / 2^5. Partly right ones get none."""
    variants = {}
    for name, right in (("SFT", 3), ("SFT+RL", 8)):
        answers = [1.0] * right + [0.0] * (10 - right)
        variants[name] = {"metrics": {}, "paired": {"answers": answers}}
    evaluate.main(["report", str(write_results(tmp_path, variants))])
    assert ", n 10; 5 gained, 0 lost, McNemar's p 0.062\n" in capsys.readouterr().out
    variants["SFT"]["paired"]["answers"][9] = None  # not answered: left out, as of the difference
    evaluate.main(["report", str(write_results(tmp_path, variants))])
    assert ", n 9; 5 gained, 0 lost, McNemar's p 0.062\n" in capsys.readouterr().out
    variants["SFT"]["paired"]["answers"][9] = 0.5
    evaluate.main(["report", str(write_results(tmp_path, variants))])
    assert "McNemar" not in capsys.readouterr().out


def test_other_items_are_not_compared(tmp_path, capsys):
    """As many prompts of other episodes were called the same ones."""
    variants = {}
    for name, digest in (("base", "1"), ("SFT", "1"), ("SFT+RL", "2")):
        variants[name] = {"metrics": {}, "paired": {"answers": [0.0, 1.0]}}
        variants[name]["items"] = {"answers": digest}
    evaluate.main(["report", str(write_results(tmp_path, variants))])
    printed = capsys.readouterr().out
    assert "- answers: SFT - base = 0.000" in printed
    assert "- answers: SFT+RL was measured on other items than SFT\n" in printed
    assert "SFT+RL - SFT" not in printed


def test_a_table_has_what_was_measured(tmp_path, capsys):
    """Of questions it was a row of dashes for each variant."""
    values = [{"mean": mean, "low": 0.0, "high": 1.0, "n": 4} for mean in (0.25, 0.5, 0.75)]
    answers = {"exact where": values[0], "path_graded trajectory+think": values[1]}
    answers |= {"answers": values[2], "truncated": values[2]}
    variants = {"SFT": {"metrics": answers, "paired": {}}, "base": {"metrics": {}, "paired": {}}}
    evaluate.main(["report", str(write_results(tmp_path, variants))])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert tables == [
        "| answers, by score and kind | SFT | base |",
        "|---|---|---|",
        "| exact where | 0.250 [0.000, 1.000] | - |",
        "| path_graded trajectory+think | 0.500 [0.000, 1.000] | - |",
        "| answers | 0.750 [0.000, 1.000] | - |",
    ]
    variants["base"]["metrics"] = {"chain length": values[0]}
    evaluate.main(["report", str(write_results(tmp_path, variants)), "--variants", "base"])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert tables[:3] == [
        "| model | chain length |",
        "|---|---|",
        "| base | 0.250 [0.000, 1.000] |",
    ]


def test_names_of_variants_may_have_commas():
    known = ["SFT", "SFT, reads its thought", "base"]
    assert evaluate.named_variants("SFT,base,SFT", known, "r.json") == ["SFT", "base", "SFT"]
    both = "SFT, reads its thought,SFT"
    assert evaluate.named_variants(both, known, "r.json") == ["SFT, reads its thought", "SFT"]
    with pytest.raises(ValueError, match=r"r.json: no variant SFT\+RL; it has SFT, SFT, reads"):
        evaluate.named_variants("base,SFT+RL", known, "r.json")


def test_one_markdown_file_of_all_results_files(tmp_path, capsys):
    """It held the last one's table alone."""
    success = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    path = write_results(tmp_path, {"base": {"metrics": {"success": success}, "paired": {}}})
    other = tmp_path / "other.json"
    other.write_text(path.read_text().replace('"base"', '"SFT"'))
    markdown = tmp_path / "new/t.md"
    evaluate.main(["report", str(path), str(other), "--markdown", str(markdown)])
    assert "| base |" in markdown.read_text() and "| SFT |" in markdown.read_text()
    path.write_text('{"arms": {}}')
    with pytest.raises(ValueError, match="does not say its hardware, minutes, preset, seeds"):
        evaluate.main(["report", str(path)])


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


def test_a_later_command_takes_nothing_away(tmp_path):
    """Each adds what it found and how; the same command again stands once, behind the others. What
    items it was is by their order too, in which their values stand."""
    path = tmp_path / "r.json"
    items = [("episode", 0), ("episode", 1)]
    for command, metric, seed, minutes, of_metric, preset in (
        ("actions", "a", 3, 2, items, "toy"),
        ("vqa", "b", 0, 1, items, ""),
        ("actions", "c", 3, 4, items[::-1], ""),
    ):
        args = argparse.Namespace(
            out=path, variant="SFT", preset=preset, command=command, policy=command, seed=seed
        )
        args.argv = [command]
        evaluate.write_metrics(
            {metric: evaluate.wilson(1, 2)},
            {metric: [0.0, 1.0]},
            args,
            time.time() - 60 * minutes,
            {metric: of_metric},
            f"those of {command}",
            {command: {"chunk": 0.5}},
        )
    results = json.loads(path.read_text())
    assert results["preset"] == "toy" and results["seeds"] == [0, 3]
    assert results["minutes"] == pytest.approx(7, abs=0.2)
    assert [line.split()[-1] for line in results["commands"]] == ["vqa", "actions"]
    variant = results["arms"]["SFT"]
    for name in ("metrics", "paired", "items"):
        assert sorted(variant[name]) == ["a", "b", "c"], name
    for name in ("checkpoints", "prompts", "seconds"):
        assert sorted(variant[name]) == ["actions", "vqa"], name
    assert variant["items"]["a"] == variant["items"]["b"] != variant["items"]["c"]


def test_answers_are_counted_by_hand():
    """A number, too, is right or wrong: 8 of 10 have Wilson's interval. Parts of lists have not."""
    scores = {"number point": [1.0] * 8 + [0.0] * 2, "items caption": [0.5, 1.0, 0.25]}
    answers = []
    for metric, of_metric in scores.items():
        answers += [types.SimpleNamespace(metric=metric, score=score) for score in of_metric]
    metrics, paired = evaluate.answer_metrics(answers, by_row=True)
    assert metrics["number point"] == evaluate.wilson(8, 10)
    assert metrics["items caption"] == evaluate.bootstrap([0.5, 1.0, 0.25])
    assert paired == {"answers": [*scores["number point"], *scores["items caption"]]}
    assert metrics["answers"]["mean"] == pytest.approx(9.75 / 13)
    assert evaluate.answer_metrics(answers, by_row=False)[1] == {}


def test_seconds_stand_beside_the_way_that_took_them(tmp_path, capsys):
    """Of its own tokens with its own thought, not of those after a thought that was given to it."""
    metrics = {"think success": evaluate.wilson(1, 2)}
    seconds = {"tabletop think": {"chunk": 1.5}, "tabletop think removed": {"chunk": 0.5}}
    variant = {"metrics": metrics, "paired": {}, "seconds": seconds}
    evaluate.main(["report", str(write_results(tmp_path, {"SFT": variant}))])
    assert "| its own tokens, think | 50.0 [9.5, 90.5], 1.500 s |" in capsys.readouterr().out


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
    unasked = types.SimpleNamespace(count=collections.Counter())
    monkeypatch.setattr(evaluate.vla, "load_policy", lambda *args: unasked)
    described = tmp_path / "validation/.hydra/merged_config.yaml"
    described.parent.mkdir(parents=True)
    described.touch()
    for command, more in (("libero", []), ("calvin", ["--data", str(tmp_path)])):
        module = evaluate.simulator_module(command)
        monkeypatch.setattr(module, "evaluate", lambda policy, args, local: outcomes[args.command])
        evaluate.main([command, "--policy", "x", "--out", str(path), *more])
    variant = json.loads(path.read_text())["arms"]["policy"]
    assert variant["paired"] == {"success": [True, False], "chain length": [5, 0]}
    assert variant["metrics"]["success goal 1"]["mean"] == 0
    assert variant["metrics"]["chain 5"]["mean"] == 0.5


def test_what_thoughts_cost_is_reported(tmp_path, monkeypatch):
    """Of a head that reads its own: 4 chunks in 2 forwards, a quarter of their time for thoughts,
    one of which was cut off."""
    path = tmp_path / "r.json"
    count = collections.Counter(chunks=4, forwards=2, seconds=8.0, thinking=2.0, unfinished=1)
    policy = types.SimpleNamespace(count=count)
    asked = []
    monkeypatch.setattr(evaluate.vla, "load_policy", lambda *args: asked.append(args) or policy)
    module = evaluate.simulator_module("tabletop")
    outcome = Outcome(trials=[TrialResult("goal", "0", True)])
    monkeypatch.setattr(module, "evaluate", lambda policy, args, local: outcome)
    evaluate.main(["tabletop", "--policy", "x", "--out", str(path), "--seed", "5"])
    assert asked[0][0] == "x" and asked[0][5] == 5, "the seed of its noise"
    variant = json.loads(path.read_text())["arms"]["policy"]
    assert variant["seconds"]["tabletop"] == {"chunk": 2.0, "forward": 4.0, "thought": 0.5}
    unfinished = variant["metrics"]["thoughts unfinished"]
    assert (unfinished["mean"], unfinished["n"]) == (0.25, 4)
    assert "retried" not in variant["metrics"], "a head always gives a chunk"


def test_chains_alone_leave_the_trials_of_an_earlier_call(tmp_path, monkeypatch):
    """`--suites chain` wrote an empty list over each trial's success, and the differences to other
    models were gone from the report."""
    path = tmp_path / "r.json"
    policy = types.SimpleNamespace(count=collections.Counter(chunks=1, forwards=1, seconds=1.0))
    monkeypatch.setattr(evaluate.vla, "load_policy", lambda *args: policy)
    module = evaluate.simulator_module("tabletop")
    trials = [TrialResult("goal", "0", True)]
    for outcome in (Outcome(trials, []), Outcome([], [3, 5])):
        monkeypatch.setattr(module, "evaluate", lambda policy, args, local, o=outcome: o)
        evaluate.main(["tabletop", "--policy", "x", "--out", str(path)])
    paired = json.loads(path.read_text())["arms"]["policy"]["paired"]
    assert paired == {"success": [True], "chain length": [3, 5]}


def test_suites_that_a_later_call_leaves_out_are_named(tmp_path, monkeypatch, capsys):
    """`--suites goal` after `--suites spatial` takes the place of its success, not of its parts."""
    path = tmp_path / "r.json"
    policy = types.SimpleNamespace(count=collections.Counter())
    monkeypatch.setattr(evaluate.vla, "load_policy", lambda *args: policy)
    module = evaluate.simulator_module("tabletop")
    said = []
    for groups in (["spatial"], ["spatial"], ["goal"], ["goal", "spatial"]):
        outcome = Outcome([TrialResult(group, "0", True) for group in groups])
        monkeypatch.setattr(module, "evaluate", lambda policy, args, local, o=outcome: o)
        evaluate.main(["tabletop", "--policy", "x", "--variant", "SFT", "--out", str(path)])
        said.append("spatial of SFT are of an earlier call" in capsys.readouterr().out)
    assert said == [False, False, True, False]
    metrics = json.loads(path.read_text())["arms"]["SFT"]["metrics"]
    assert metrics["success"]["n"] == 2


def test_what_chains_alone_took_stands_beside_what_trials_took(tmp_path, monkeypatch):
    """`--suites chain` wrote its 3 retries of 4 chunks over the trials' 1 of 8, its seconds over
    theirs: results/half_full.json told of SFT's chains beside SFT+RL's trials."""
    path = tmp_path / "r.json"
    module = evaluate.simulator_module("tabletop")
    calls = [
        (Outcome([TrialResult("goal", "0", True)], []), {"chunks": 8, "retried": 1, "held": 0}),
        (Outcome([], [3, 5]), {"chunks": 4, "retried": 3, "held": 1}),
    ]
    for outcome, count in calls:
        policy = vla.TokenPolicy.__new__(vla.TokenPolicy)
        policy.mode = "think"
        policy.sampled = False
        policy.count = collections.Counter(forwards=2, seconds=8.0, **count)
        monkeypatch.setattr(evaluate.vla, "load_policy", lambda *args, p=policy: p)
        monkeypatch.setattr(module, "evaluate", lambda policy, args, local, o=outcome: o)
        evaluate.main(["tabletop", "--policy", "x", "--out", str(path)])
    variant = json.loads(path.read_text())["arms"]["policy"]
    shares = {name: variant["metrics"][name]["mean"] for name in variant["metrics"]}
    assert (shares["think retried"], shares["think held still"]) == (1 / 8, 0)
    assert (shares["think chain retried"], shares["think chain held still"]) == (3 / 4, 1 / 4)
    assert variant["seconds"] == {
        "tabletop think": {"chunk": 1.0, "forward": 4.0},
        "tabletop think chain": {"chunk": 2.0, "forward": 4.0},
    }


def test_a_head_and_own_tokens_stand_beside_each_other(tmp_path, monkeypatch, capsys):
    """Driving by own tokens once took the place of the head's success in the same variant."""
    path = tmp_path / "r.json"
    drivers = {
        "": types.SimpleNamespace(count=collections.Counter(chunks=2, forwards=2, seconds=1.0)),
        "think": vla.TokenPolicy.__new__(vla.TokenPolicy),
        "think sampled": vla.TokenPolicy.__new__(vla.TokenPolicy),
    }
    for way in ("think", "think sampled"):
        drivers[way].mode = "think"
        drivers[way].sampled = way == "think sampled"
        drivers[way].count = collections.Counter(chunks=4, forwards=1, seconds=8.0, retried=1)
    module = evaluate.simulator_module("tabletop")
    for mode, is_solved in (("", True), ("think", False), ("think sampled", True)):
        monkeypatch.setattr(evaluate.vla, "load_policy", lambda *args, m=mode: drivers[m])
        outcome = Outcome(trials=[TrialResult("goal", "0", is_solved)])
        monkeypatch.setattr(module, "evaluate", lambda policy, args, local, o=outcome: o)
        evaluate.main(["tabletop", "--policy", "x", "--variant", "SFT", "--out", str(path)])
    variant = json.loads(path.read_text())["arms"]["SFT"]
    assert variant["metrics"]["success"]["mean"] == 1
    assert variant["metrics"]["think success"]["mean"] == 0
    assert variant["metrics"]["think retried"]["mean"] == 0.25
    assert "think sampled success     1.000" in capsys.readouterr().out, "it is printed too"
    assert variant["metrics"]["think sampled success"]["mean"] == 1
    assert variant["paired"] == {
        "success": [True],
        "think success": [False],
        "think sampled success": [True],
    }
    capsys.readouterr()
    evaluate.main(["report", str(path)])
    printed = capsys.readouterr().out
    assert "| its head | 100.0 [20.7, 100.0], 0.500 s |" in printed
    assert "| its own tokens, think | 0.0 [0.0, 79.3], 2.000 s |" in printed
    assert "| its own tokens, direct | - |" in printed


# ---- the expert through action tokens


@pytest.fixture(scope="module")
def expert_chunks():
    """What the expert does in each suite, K = 5 actions at a time: (B, 5, 7)."""
    chunks = []
    for suite in tt.SUITES:
        for task in range(10):
            env = tt.Tabletop(suite)
            env.place(task, 0, "train")
            while env.steps < 40:
                chunks.append(tabletop_data.expert_chunk(env, 5))
                for action in chunks[-1][:2]:
                    env.advance(action)
    return np.stack(chunks)


def tokens_metrics(path):
    return json.loads(path.read_text())["tokens"]["metrics"]


def test_fine_tokens_drive_and_coarse_ones_do_not(expert_chunks, tmp_path, capsys):
    """The speedrun's tokens were so coarse that the expert itself failed two of three tasks through
    them; r_a, which they made easy, had hidden it."""
    out = tmp_path / "r.json"
    shares = {}
    for scale, vocab_size in ((10, 256), (1, 18)):
        tokenizer = fast_tokenizer.FastTokenizer.fit(expert_chunks, vocab_size, scale)
        tokenizer.save(tmp_path / "fast")
        flags = ["--action-tokenizer", str(tmp_path / "fast"), "--trials", "1"]
        evaluate.main(["tokens", "--out", str(out), *flags])
        shares[scale] = tokens_metrics(out)["success"]["mean"]
        assert tokens_metrics(out)["success"]["n"] == 40
    assert shares[10] == 1
    assert shares[1] < 0.7
    printed = capsys.readouterr().out
    assert (
        "Through these action tokens the expert itself succeeds in 100.0 [91.2, 100.0]" in printed
    )
    assert "(2 of 5 actions executed)" in printed

    write_variant(out, "SFT")  # the caption of the table says it
    evaluate.main(["report", str(out)])
    _, _, report = capsys.readouterr().out.partition("Preset p, ")
    caption = report.splitlines()[0]
    percent = 100 * shares[1]
    assert f"Through these action tokens the expert itself succeeds in {percent:.1f} [" in caption
    assert json.loads(out.read_text())["arms"].keys() == {"SFT"}, "it is no model"


def test_without_tokens_the_expert_does_all_trials_on_any_number_of_ranks(tmp_path, capsys):
    for world in (1, 2):
        argv = ["tokens", "--trials", "1", "--execute", "3", "--out", str(tmp_path / f"{world}")]
        on_ranks(evaluate.main, argv, world)
    one = json.loads((tmp_path / "1").read_text())
    two = json.loads((tmp_path / "2").read_text())
    assert one["tokens"] == two["tokens"]
    assert one["tokens"]["metrics"]["success long"] == evaluate.wilson(10, 10)
    assert one["seeds"] == [], "nothing is drawn"


def test_the_experts_chunk_leaves_the_environment_alone():
    env = tt.Tabletop("long")
    env.place(3, 0, "eval")
    chunk = tabletop_data.expert_chunk(env, 4)
    assert env.steps == 0
    for action in chunk:
        assert (env.expert()[0].round(4) == action).all()
        env.advance(action)


def test_the_experts_chunk_holds_still_when_the_task_is_done():
    """It went on, lifting: an end that nobody is trained on."""
    env = tt.Tabletop("goal")
    env.place(9, 0, "eval")  # lift the red cube
    chunk = tabletop_data.expert_chunk(env, 60)
    steps = 0
    while not env.advance(chunk[steps]):
        steps += 1
    assert chunk[steps][2] > 0.5  # up, and done
    assert (chunk[steps + 1 :] == [0] * 6 + [chunk[steps][6]]).all() and steps < 59


def test_more_actions_than_a_chunk_has_are_refused(expert_chunks, tmp_path):
    fast_tokenizer.FastTokenizer.fit(expert_chunks, 64, 2).save(tmp_path / "fast")
    flags = ["--action-tokenizer", str(tmp_path / "fast"), "--out", str(tmp_path / "r.json")]
    with pytest.raises(ValueError, match="--execute 6: .*fast has chunks of 5 actions"):
        evaluate.main(["tokens", "--execute", "6", *flags])


# ---- ranks, the split, the limit of tokens


def metrics_of(path):
    variant = json.loads(path.read_text())["arms"]["policy"]
    return {"metrics": variant["metrics"], "paired": variant["paired"]}


class Lucky(Scripted):
    """The expert in half of the trials, still in the others, by what its noise is drawn from."""

    cameras = ("image",)

    def __init__(self):
        super().__init__([])
        self.count = collections.Counter()
        widths = {"state": 8, "action": 7}
        self.spec = {
            "stats": {name: {"q01": [-1.0] * n, "q99": [1.0] * n} for name, n in widths.items()}
        }

    def act_batch(self, images, instructions, states, keys):
        chunks = super().act_batch(images, instructions, states)
        for b, (suite, task, seed, _) in enumerate(keys):
            if model.rng(0, suite, task, seed).random() < 0.5:
                chunks[b] = 0
        return chunks


def test_ranks_equal_one_in_a_closed_loop(tmp_path, monkeypatch):
    """Under torchrun every rank ran all trials and wrote them to the same file. Noise came from the
    number of the call and the row in the batch, so that a share of the trials went another way."""
    policy = Lucky()
    make_trials = tt.make_trials

    def make_known_trials(*args):
        policy.trials = make_trials(*args)
        return policy.trials

    monkeypatch.setattr(tt, "make_trials", make_known_trials)
    monkeypatch.setattr(evaluate.vla, "load_policy", lambda *args: policy)
    for world in (1, 2):
        flags = ["--suites", "spatial,goal,chain", "--trials", "1", "--chains", "3", "--batch", "7"]
        argv = ["tabletop", "--policy", "x", "--out", str(tmp_path / f"{world}.json"), *flags]
        on_ranks(evaluate.main, argv, world)
    one = metrics_of(tmp_path / "1.json")
    assert metrics_of(tmp_path / "2.json") == one
    assert one["metrics"]["success"]["n"] == 20 and 0 < one["metrics"]["success"]["mean"] < 1
    assert len(one["paired"]["chain length"]) == 3


def test_gather_puts_shares_in_order(tmp_path):
    """Seven items on three ranks: one has a share of three; and two on three: one has none."""
    for total in (7, 2):
        on_ranks(gather_numbers, [total, tmp_path / "gathered"], 3)
        assert json.loads((tmp_path / "gathered").read_text()) == list(range(total))


def gather_numbers(argv):
    total, path = argv
    dist = model.setup(0)
    numbers = evaluate.gather(list(range(total))[evaluate.local_share(dist)], dist)
    if dist.rank == 0:
        path.write_text(json.dumps(numbers))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with data, and an untrained model with action tokens, as sft.py saves it."""
    folder = tmp_path_factory.mktemp("written")
    tabletop_data.main(
        [
            *("--out", str(folder / "data"), "--episodes", "24", "--conversations", "8"),
            *("--single", "--workers", "1", "--seed", "3"),
        ]
    )
    files = fast_tokenizer.read_episodes(folder / "data")
    stats = fast_tokenizer.read_stats(folder / "data", files)["action"]
    chunks = fast_tokenizer.all_chunks(files, 5, 1)
    backbone = model.load(untrained.folder("tiny-vlm"))
    backbone.action_tokenizer = fast_tokenizer.FastTokenizer.fit(chunks, 18, 1, stats)
    sft.grow_vocabulary(backbone, 18)
    _, held_out = fast_tokenizer.split_episodes(files)
    run = {
        "stage": "sft",
        "step": 1,
        "config": {"max_new_tokens": 7},
        "parent": "",
        "split": [fast_tokenizer.split_record(files, held_out)],
    }
    model.save(folder / "sft" / "final", backbone, run)
    return folder


def actions(folder, out, *flags):
    argv = ["actions", "--policy", str(folder / "sft"), "--data", str(folder / "data")]
    sizes = ["--prompts", "5", "--samples", "2", "--batch", "3"]
    return [*argv, "--device", "cpu", "--out", str(out), *sizes, *flags]


def test_ranks_equal_one_in_action_tokens_and_questions(written, tmp_path):
    """evaluate.py ran on one GPU of eight, and the other seven ranks would have done the same."""
    for world in (1, 2):
        out = tmp_path / f"{world}.json"
        on_ranks(evaluate.main, actions(written, out), world)
        data = ["--data", str(written / "data/conversations.jsonl"), "--rows", "5"]
        answers = ["--answers", str(tmp_path / f"{world}.jsonl")]
        common = ["vqa", "--policy", str(written / "sft"), "--device", "cpu", "--out", str(out)]
        on_ranks(evaluate.main, [*common, *data, *answers], world)
    one = metrics_of(tmp_path / "1.json")
    assert metrics_of(tmp_path / "2.json") == one
    assert len(one["paired"]["think sampled r_a"]) == 5
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()
    assert len((tmp_path / "1.jsonl").read_text().splitlines()) == 5


def test_scores_of_completions_by_hand():
    """Two prompts, four completions each. The first prompt's: right, another's action, right but
    without the thought that was asked for, and cut off before an action. Only the first two count
    in l1 and among the actions; l1 is in normalised units, here halves and tenths of the dataset's.
    Of the second prompt nothing decodes, so it has no l1."""
    low, high = np.array([-1.0, 10.0]), np.array([3.0, 30.0])
    stats = {"q01": low.tolist(), "q99": high.tolist()}
    chunks = np.random.default_rng(0).uniform(low, high, (60, 3, 2)).astype(np.float32)
    backbone = model.load(untrained.folder("tiny-vlm"))
    tokenizer = fast_tokenizer.FastTokenizer.fit(chunks, 64, 4, stats)
    backbone.action_tokenizer = tokenizer
    sft.grow_vocabulary(backbone, tokenizer.vocab_size)
    targets = tokenizer.encode(chunks[:2])
    assert targets[0] != targets[1]

    def completion(text):
        return backbone.tokenizer(text)["input_ids"]

    right, other = (model.action_answer(ids) + "<|im_end|>" for ids in targets)
    texts = [f"<think>left</think>{right}", f"<think>up</think>{other}", right, "<think>left"]
    completions = [completion(text) for text in [*texts, *["<think>no", "so<|im_end|>"] * 2]]
    prompts = evaluate.Prompts([0, 1], [None] * 2, targets, chunks[:2], [])
    scores = evaluate.score_completions(backbone, completions, 4, prompts, "prefix", think=True)

    decoded, ok = tokenizer.decode(targets)
    assert ok.all()
    gaps = np.abs(decoded - chunks[0]) / [2, 10]  # a unit is half of q01 .. q99
    l1 = gaps.mean((1, 2))  # of the right and of the other action
    assert l1[0] < 0.15 < l1[1]
    r_a = model.prefix_reward(targets[1], targets[0])
    assert scores[0].means == pytest.approx(
        {
            "reward": (1 + (1 + r_a) / 2) / 4,
            "r_f": 0.5,
            "r_a": (1 + r_a) / 4,
            "l1": l1.mean(),
            "truncated": 0.25,
        },
        rel=1e-5,
    )
    assert scores[0].thoughts == {"left", "up"} and scores[0].actions == {*map(tuple, targets)}
    nothing = {"reward": 0, "r_f": 0, "r_a": 0, "l1": np.nan, "truncated": 0.5}
    assert scores[1].means == pytest.approx(nothing, nan_ok=True) and scores[1].actions == set()

    metrics, paired = evaluate.action_metrics(scores, 4)
    assert metrics["l1"]["n"] == 1 and metrics["l1"]["mean"] == pytest.approx(l1.mean())
    assert metrics["r_f"] == {"mean": 0.25, "low": 0.0, "high": 0.5, "n": 2}
    assert paired["l1"] == [round(scores[0].means["l1"], 5), None]
    assert metrics["distinct actions"] == {"mean": 2, "low": None, "high": None, "n": 8}
    direct = evaluate.score_completions(backbone, completions, 4, prompts, "prefix", think=False)
    assert direct[0].thoughts is None and direct[0].means["r_f"] == 0.75


def test_completions_may_be_as_long_as_in_the_run(written, tmp_path, capsys):
    """GRPO's preset allowed 2,048 tokens, evaluate.py 96: a thought of 97 counted as malformed, and
    nothing said that it was cut off."""
    out = tmp_path / "r.json"
    lengths = []
    generate = model.generate

    def measured(*args, **kwargs):
        samples = generate(*args, **kwargs)
        lengths.append(samples["mask"].shape[1])
        return samples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", measured)
        evaluate.main(actions(written, out))
        assert max(lengths) == 7, "what run.json says"
        truncated = metrics_of(out)["metrics"]["think sampled truncated"]
        assert truncated["n"] == 5 and truncated["mean"] > 0.5  # an untrained model rarely ends
        assert "7 tokens at most" in capsys.readouterr().out
        evaluate.main(actions(written, out, "--max-new-tokens", "3", "--no-cuda-graphs"))
        assert max(lengths[4:]) == 3
    backbone = types.SimpleNamespace(run={})
    assert model.token_limit(None, backbone, 96) == 96


def test_prompts_are_called_held_out_only_when_they_are(written, tmp_path, monkeypatch, capsys):
    """Prompts came from all episodes of --data and were called held out, also when the model was
    trained on 95% of them."""
    backbone = model.load(written / "sft")
    folder = written / "data/episodes"
    files = fast_tokenizer.read_episodes(folder)
    _, held_out = fast_tokenizer.split_episodes(files)

    def asked(data, split="auto"):
        episodes, words = evaluate.episodes_to_ask(backbone, data, split)
        return [episode.name for episode in episodes], words

    monkeypatch.chdir(written)
    names, words = asked("data")  # the same folder by another path
    assert names == [episode.name for episode in held_out]
    assert words == f"the 1 held-out ones of {len(files)} episodes of data/episodes"
    names, words = asked(folder, "all")
    assert len(names) == len(files) and words.startswith(f"all {len(files)} episodes")

    shutil.copytree(folder, tmp_path / "copy")
    assert asked(tmp_path / "copy")[0] == [episode.name for episode in held_out], "the same ones"
    shutil.copytree(folder, tmp_path / "test")
    (tmp_path / "test" / files[1].path.name).unlink()  # another folder: all of it is unseen
    names, words = asked(tmp_path / "test")
    assert len(names) == len(files) - 1
    assert "which the checkpoint was not trained on (but on " in words
    assert len(asked(tmp_path / "test", "held-out")[0]) == 1

    (record,) = backbone.run["split"]
    elsewhere = {**record, "folder": "elsewhere"}
    backbone.run["split"] = fast_tokenizer.join_splits([record, elsewhere], [elsewhere])
    assert len(backbone.run["split"]) == 2, "what SFT saw is not forgotten in GRPO"
    assert asked(folder)[0] == [episode.name for episode in held_out]
    elsewhere["sha256"] = "of other episodes"
    assert "held out others" not in asked(folder)[1], "of another folder"
    record["sha256"] = "of other episodes"
    assert "held out others, and may have been trained on these" in asked(folder)[1]
    backbone.run = {}
    assert "the checkpoint names no episodes" in asked(folder)[1]

    out = tmp_path / "r.json"
    evaluate.main(actions(written, out))
    sentence = f"5 prompts from the 1 held-out ones of {len(files)} episodes"
    assert sentence in capsys.readouterr().out
    variant = json.loads(out.read_text())["arms"]["policy"]
    assert "held-out" in variant["prompts"]["actions"]
    assert set(variant["items"]) == set(variant["paired"]), "which prompts these are"
    assert "think sampled distinct thoughts" in variant["metrics"]
    assert "direct sampled distinct thoughts" not in variant["metrics"], (
        "whole answers were counted"
    )
    digests = variant["items"]
    evaluate.main([*actions(written, out), "--seed", "1"])
    others = json.loads(out.read_text())["arms"]["policy"]["items"]
    assert digests.keys() == others.keys()
    assert not set(digests.values()) & set(others.values())


def test_prompts_begin_where_chunks_may(written, tmp_path):
    """Of a robot of which nobody knows how it holds still chunks lie inside the episode: of 7 steps
    those from 0, 1 and 2 have 5 actions. Where it is known each step has a chunk."""
    backbone = model.load(written / "sft")
    arrays, header = tabletop_data.demonstration("goal", 1, 0, 0.0)
    arrays = {name: arrays[name][:7] for name in ("image", "state", "action")}
    header = {"task": header["task"]}
    for deltas, starts in (({}, range(3)), ({"deltas": "6"}, range(7))):
        folder = tmp_path / f"{len(deltas)}"
        fast_tokenizer.write_episodes(folder, [(arrays, header | deltas)])
        episodes = fast_tokenizer.read_episodes(folder)
        args = argparse.Namespace(prompts=60, seed=0)
        prompts = evaluate.draw_prompts(backbone, episodes, args, True, slice(None))
        assert {step for _, step in prompts.steps} == set(starts)
        _, step = prompts.steps[7]
        within = arrays["action"][step : step + 5]
        np.testing.assert_array_equal(prompts.chunks[7][: len(within)], within)


def test_what_is_sampled_follows_the_seed(written):
    """And not the prompts alone, which follow it too."""
    backbone = model.load(written / "sft")
    episodes = fast_tokenizer.read_episodes(written / "data")
    args = argparse.Namespace(prompts=3, seed=0, max_new_tokens=7, batch=3, cuda_graphs=False)
    prompts = evaluate.draw_prompts(backbone, episodes, args, True, slice(None))
    found = []
    for args.seed in (0, 0, 1):
        found.append(evaluate.complete(backbone, prompts, 2, False, args))
    assert found[0] == found[1] != found[2]


def test_statements_are_of_one_world_with_thoughts():
    """One episode without them, or of a world whose thoughts nobody can read, and none are told."""

    def known(*episodes):
        files = [types.SimpleNamespace(source=source, thoughts=of) for source, of in episodes]
        return evaluate.statements_of(files)

    tabletop = ("tabletop goal task 0", ["a thought"])
    assert known(tabletop, tabletop) is tabletop_data.statements
    assert known(tabletop, ("tabletop goal task 1", None)) is None
    assert known(tabletop, ("lab", ["a thought"])) is None


def test_a_single_episode_can_be_asked_about(tmp_path):
    """It has no split, and none is asked for: --split all, too, ended in "all of them held out"."""
    episode = tabletop_data.demonstration("goal", 1, 0, 0.0)
    fast_tokenizer.write_episodes(tmp_path / "one", [episode])
    trained_on = {"folder": "data", "episodes": 20, "held_out": 1, "sha256": "of their names"}
    for records, split, why in (
        ([], "all", "as --split all asks"),
        ([], "auto", "the checkpoint names no episodes"),
        ([trained_on], "auto", "which the checkpoint was not trained on (but on data)"),
    ):
        backbone = types.SimpleNamespace(action_tokenizer=None, run={"split": records})
        episodes, words = evaluate.episodes_to_ask(backbone, tmp_path / "one", split)
        assert len(episodes) == 1 and why in words
    with pytest.raises(ValueError, match="1 episodes, all of them held out; record more"):
        evaluate.episodes_to_ask(backbone, tmp_path / "one", "held-out")


def test_episodes_without_an_instruction_are_not_asked_about(tmp_path):
    """The stages refuse to train on them; the model was asked to carry out "" and scored by it."""
    arrays, header = tabletop_data.demonstration("goal", 1, 0, 0.0)
    fast_tokenizer.write_episodes(tmp_path / "blank", [(arrays, {**header, "task": " "})])
    backbone = types.SimpleNamespace(action_tokenizer=None, run={})
    with pytest.raises(ValueError, match="episode_000000: its instruction is blank; write one"):
        evaluate.episodes_to_ask(backbone, tmp_path / "blank", "all")


def with_thoughts(folder, out):
    """Three episodes of a folder, each step with a thought of some state of Tabletop."""
    some_thoughts = []
    for number in range(20):
        env = tabletop_data.random_state(np.random.default_rng(number))
        some_thoughts.append(tabletop_data.thought(env, env.expert()[1]))
    recordings = []
    for file in fast_tokenizer.read_episodes(folder, 3):
        arrays = {"state": file.state, "action": file.action}
        arrays["image"] = np.stack([file.frame(t) for t in range(len(file))])
        thoughts = [some_thoughts[t % 20] for t in range(len(file))]
        header = {"task": file.task, "source": file.source, "thoughts": json.dumps(thoughts)}
        recordings.append((arrays, header))
    fast_tokenizer.write_episodes(out / "episodes", recordings)
    return out


def test_true_statements_in_thoughts_are_counted(written, tmp_path, monkeypatch, capsys):
    """Of the two completions of each prompt the first has a true thought; the second one that has
    the target in another cell, or none that can be read."""
    data = with_thoughts(written / "data", tmp_path / "data")

    def complete(backbone, prompts, n, greedy, args):
        completions = []
        for number, (episode, step) in zip(prompts.keys, prompts.steps, strict=True):
            thought = episode.thoughts[step]
            cell = tabletop_data.parse_thought(thought).target_cell
            elsewhere = "b1" if cell == "a1" else "a1"
            second = thought.replace(f"is at {cell}", f"is at {elsewhere}", 1)
            if number % 2:
                second = "no idea"
            for text in [thought, second][:n]:
                answer = f"<think>{text}</think><answer>"
                completions.append(backbone.tokenizer(answer)["input_ids"])
        return completions

    monkeypatch.setattr(evaluate, "complete", complete)
    out = tmp_path / "r.json"
    flags = ["--data", str(data), "--prompts", "6"]
    evaluate.main([*actions(written, out), *flags])
    metrics = metrics_of(out)["metrics"]
    paired = metrics_of(out)["paired"]
    assert metrics["think greedy thought true"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 6}
    assert paired["think sampled thought true"] == [round(25 / 26, 5), 0.5] * 3  # 13 statements
    assert metrics["think sampled thought true phase"]["mean"] == 0.75
    assert metrics["think sampled thought true target cell"]["mean"] == 0.5
    assert not [name for name in metrics if name.startswith("direct") and "true" in name]
    printed = capsys.readouterr().out
    assert "true in thoughts: all 0.731" in printed and "x within 2 cm 0.750" in printed
    evaluate.main(["report", str(out)])
    printed = capsys.readouterr().out
    assert "| true in sampled thoughts | policy |" in printed
    assert "| target cell | 0.500 [0.500, 0.500] |" in printed

    files = fast_tokenizer.read_episodes(data)
    assert evaluate.statements_of(files) is tabletop_data.statements
    files[1].source = "another world"
    assert evaluate.statements_of(files) is None
    files = fast_tokenizer.read_episodes(data)
    files[2].thoughts = None
    assert evaluate.statements_of(files) is None


def test_results_that_could_not_be_written_stop_before_the_work(tmp_path):
    """A results file cut short was found after the last of 2,000 trials, and they were lost."""
    (tmp_path / "r.json").write_text('{"arms"')
    policy = ["--policy", "nowhere/x"]
    for argv in (
        ["tabletop", *policy],
        ["vqa", "--data", "x", *policy],
        ["actions", "--data", "x", *policy],
        ["tokens", "--action-tokenizer", "nowhere/x"],
    ):
        with pytest.raises(ValueError, match="r.json:1: not JSON"):
            evaluate.main([*argv, "--out", str(tmp_path / "r.json")])
    with pytest.raises(ValueError, match="--out .*: a folder; name a file"):
        evaluate.main(["tabletop", "--policy", "nowhere/x", "--out", str(tmp_path)])
    argv = ["vqa", "--data", "x", "--policy", "nowhere/x", "--out", str(tmp_path / "new.json")]
    with pytest.raises(ValueError, match="--answers .*: a folder; name a file"):
        evaluate.main([*argv, "--answers", str(tmp_path)])  # found after the last answer


@pytest.mark.parametrize(
    "flags",
    [
        "actions --prompts 0",
        "actions --samples 0",
        "actions --batch 0",
        "actions --max-new-tokens 0",
        "vqa --batch 0",
        "vqa --max-new-tokens 0",
        "vqa --rows -1",
        "vqa --unit -1",
        "tabletop --trials 0",
        "tabletop --chains 0",
        "tabletop --batch 0",
        "tabletop --execute -1",
        "tabletop --ensemble -1",
        "tabletop --seed -1",
        "libero --trials 0",
        "libero --workers 0",
        "libero --size -1",
        "metaworld --limit -1",
        "calvin --chains 0",
        "tokens --trials 0",
        "tokens --execute 0",
    ],
)
def test_flags_out_of_range_stop_before_anything_loads(flags, capsys):
    """--batch 0, --prompts 0 and --max-new-tokens 0 were tracebacks after the model had loaded."""
    command, flag, value = flags.split()
    required = [] if command == "tokens" else ["--policy", "x", "--data", "x"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([command, *required, flag, value])
    assert stop.value.code == 2
    assert f"argument {flag}: {value} is not a" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_no_traceback(tmp_path, capsys):
    """Torch raises RuntimeError for "gpu", AssertionError for cuda without CUDA."""
    for device in ("gpu", "cuda:99"):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(["tabletop", "--policy", "x", "--device", device])
        assert stop.value.code == 2
        assert f"--device: '{device}' is no device of this machine" in capsys.readouterr().err
    out = str(tmp_path / "r.json")
    with pytest.raises(FileNotFoundError, match="x: no such folder"):  # empty: this rank's
        evaluate.main(["tabletop", "--policy", "./no/x", "--out", out, "--device", ""])


def record_metaworld(argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["metaworld", *argv])
        simulate.record("metaworld")


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (tabletop_data.main, "--out x --workers 0"),
        (tabletop_data.main, "--out x --size 0"),
        (tabletop_data.main, "--out x --noise 2"),
        (backbones.main, "tiny-vlm --out x --seed -1"),
        (speed.main, "grpo --batch 0"),
        (speed.main, "grpo --peak-tflops 0"),
        (memory.main, "sft --ranks 0"),
        (memory.main, "sft --gb 0"),
        (record_metaworld, "record --out x --size 0"),
        (record_metaworld, "record --out x --episodes 0"),
    ],
)
def test_flags_of_tools_and_benchmarks_have_ranges(main, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = argv.split()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    other_names = r"(/--\w+)?"  # --ranks is --gpus too
    message = rf"argument {words[-2]}{other_names}: {words[-1]} is not"
    assert re.search(message, capsys.readouterr().err)
