"""tools/study.py: what is missing, what runs, what is refused. tools/study_report.py: statistics by
hand, the report of made-up results. Stages are tiny scripts; no model is trained."""

import itertools
import json
import os
import re
import shlex
import signal
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import evaluate
import grpo
import model
from benchmarks import probe
from tools import study, study_report
from tools.study import Data, Folders, Matrix, Model, Runner, Stage

ROOT = Path(__file__).parents[1]
FOLDERS = Folders("runs", "data", "results")

# ---- The matrix ----------------------------------------------------------------------------------


def test_parents_are_shared_and_stand_before_what_starts_from_them():
    wanted = {"SFT+RL": [0, 1], "language-RL": [0]}
    stages = study.all_stages(study.MATRIX, wanted, FOLDERS, ranks=2)
    keys = list(stages)
    assert keys.count("SFT_0") == 1 and "data/test" in keys and "language-RL_1" not in keys
    assert stages["SFT+RL_0"].inputs == ("data/0/train", "SFT_0")
    assert stages["language-RL_0"].inputs == ("data/0/words", "SFT_0")
    assert stages["SFT+RL_0 head thought"].inputs == ("SFT+RL_0", "data/0/train")
    assert stages["SFT+RL_0 drives thought"].inputs == ("SFT+RL_0 head thought",)
    assert stages["SFT+RL_0 actions"].inputs == ("data/test", "data/0/fast", "SFT+RL_0")
    assert "SFT_0 actions" not in keys, "a parent that nobody asked for is not measured"
    for number, stage in enumerate(stages.values()):
        assert all(keys.index(other) < number for other in stage.inputs)
    assert stages["SFT_0"].slots == 2 and stages["SFT+RL_1"].slots == 2
    assert stages["SFT+RL_0 head prompt"].slots == 1
    plan = study.missing(stages, {}, study.targets_of(study.MATRIX, wanted, stages))
    for_nobody = [
        "data/0/train/no_thoughts.jsonl",
        "data/0/kinds",
        "data/scenes",
        "runs/qwen_random",
        "runs/qwen",
        "data/1/train/no_thoughts.jsonl",
        "data/1/kinds",
        "data/1/words",
    ]
    assert [stage.key for stage in plan] == [key for key in keys if key not in for_nobody]


def test_the_rows_of_a_model_that_learns_from_its_own_are_written_first():
    stages = study.all_stages(study.MATRIX, {"rejection": [0]}, FOLDERS, ranks=2)
    rows = stages["rejection_0 (1 of 2)"]
    assert rows.output == "runs/rejection_0_rows/thoughts.jsonl"
    assert "--policy runs/SFT_0 " in rows.command and "SFT_0" in rows.inputs
    assert stages["rejection_0"].inputs == ("rejection_0 (1 of 2)", "SFT_0", "data/0/fast")


def test_another_architecture_begins_with_a_backbone_that_the_study_trains_once():
    wanted = {"base-qwen": [0, 1], "SFT+RL-qwen": [1]}
    stages = study.all_stages(study.MATRIX, wanted, FOLDERS, ranks=2)
    assert stages["runs/qwen"].inputs == ("runs/qwen_random", "data/scenes")
    assert stages["runs/qwen"].slots == 2 and stages["runs/qwen_random"].slots == 1
    assert study.steps_of(stages["runs/qwen"].command) == 16000
    assert stages["runs/qwen"].output == "runs/qwen"
    for seed in (0, 1):
        assert "runs/qwen" in stages[f"base-qwen_{seed} actions"].inputs
    assert "--init runs/qwen --out runs/SFT-qwen_1 --seed 1" in stages["SFT-qwen_1"].command
    assert "runs/qwen" in stages["SFT-qwen_1"].inputs
    assert "SFT-qwen_1" in stages["SFT+RL-qwen_1"].inputs


def test_every_declared_command_is_understood():
    """A flag that a stage does not have would come to light hours later."""
    matrix = study.MATRIX
    names = [one.name for one in matrix.models]
    assert len(set(names)) == len(names)
    for one in matrix.models:
        assert set(one.against.split()) <= set(names) - {one.name}
        assert set(one.heads.split()) <= set(matrix.heads)
        assert set(one.measures.split()) <= set(matrix.measures)
        assert not re.search(r"[\s,/_]", one.name), "names are folders, and words of commands"
        if "gain" in one.measures.split():
            parent = study.model_named(matrix.models, one.parent)
            assert parent.commands, f"{one.name}: {parent.name} writes no actions"
    stages = study.all_stages(matrix, {name: [0] for name in names}, FOLDERS, 2)
    quick = study.all_stages(matrix, {"rejection": [0], "SFT+RL": [0]}, FOLDERS, 2, quick=True)
    understood = set()
    for stage in [*stages.values(), *quick.values()]:
        words = shlex.split(stage.command)
        flags = tuple(word for word in words if "/" not in word)  # paths are as good as others
        if flags in understood:
            continue
        understood.add(flags)
        if words[0] in study.TRAINING:
            module = study.TRAINING[words[0]]
            cfg = model.parse_config(module.Config, module.PRESETS, words[1:])
            assert cfg.steps == study.steps_of(stage.command) > 0 and cfg.seed == 0
        elif words[0] == "evaluate.py":
            args = evaluate.make_parser(words[1]).parse_args(words[1:])
            assert args.seed == 0 and (not stage.variant or args.variant == stage.variant)


def test_the_probe_has_its_trajectories_in_a_quick_study_too():
    """--quick recorded 5 and the probe stopped: it asks for 20."""
    stages = study.all_stages(study.MATRIX, {"base": [0]}, FOLDERS, 2, quick=True)
    words = shlex.split(stages["data/one_task"].command)
    episodes = [int(value) for flag, value in itertools.pairwise(words) if flag == "--episodes"]
    command = shlex.split(stages["base_0 probe"].command)
    args = evaluate.make_parser("probe").parse_args(command[1:])
    assert episodes[-1] >= (args.trajectories or probe.TRAJECTORIES)


def test_the_first_models_are_those_of_the_speedrun():
    """Its data and tokenizer, its SFT, RL and head."""
    script = re.sub(r" +", " ", (ROOT / "speedrun.sh").read_text().replace("\\\n", " "))
    for words in (
        "--episodes 3200 --conversations 6000 --thought-actions 36000 --carried-on 0.5",
        "--horizon 5 --scale 2.5 --vocab-size 64 --max-episodes 400",
    ):
        assert words in script
        assert any(words in data.command for data in study.DATA)
    stages = study.all_stages(study.MATRIX, {"SFT+RL": [3]}, FOLDERS, ranks=2)
    assert stages["SFT_3"].command == (
        "sft.py speedrun --data data/3/train/conversations.jsonl:0.5,"
        "data/3/train/episodes:3,data/3/train/thought_actions.jsonl:0.3 --init assets/tiny-vlm "
        "--out runs/SFT_3 --seed 3 --action-tokenizer data/3/fast"
    )
    assert stages["SFT+RL_3"].command == (
        "grpo.py speedrun --data data/3/train/episodes --init runs/SFT_3 --out runs/SFT+RL_3 "
        "--seed 3"
    )
    assert stages["SFT+RL_3 head prompt"].command == (
        "vla.py speedrun --init runs/SFT+RL_3 "
        "--data data/3/train/episodes --out runs/heads/SFT+RL_3/prompt --seed 3"
    )
    default = script.partition("0,0)")[2].partition(";;")[0]
    assert "$DATA/train/conversations.jsonl:0.5,$DATA/train/episodes:3\n" in script
    assert "$DATA/train/thought_actions.jsonl:0.3 #" in script
    assert "sft=(speedrun) #" in re.sub(r"\s+", " ", default)
    assert "grpo=(speedrun)" in default
    assert "head=(speedrun)" in default


def test_models_of_several_kinds_of_thoughts_learn_from_these():
    """And their control, the same steps on plans, does not."""
    wanted = {"kinds+RL": [0], "half-kinds+RL": [0], "half-plans": [0]}
    stages = study.all_stages(study.MATRIX, wanted, FOLDERS, ranks=2)
    assert "data/0/kinds/thought_actions.jsonl:2 " in stages["kinds_0"].command
    assert "data/0/train/thought_actions.jsonl:2 " in stages["half_0"].command
    kinds = stages["half-kinds_0"].command
    plans = stages["half-plans_0"].command
    assert "--data data/0/kinds/thought_actions.jsonl --init runs/half_0 " in kinds
    assert plans == kinds.replace("/kinds/", "/train/").replace("half-kinds", "half-plans")
    assert "--thought-kinds plan,scene,task" in stages["data/0/kinds"].command


def test_what_starts_a_stage():
    stage = Stage("SFT_0", "sft.py speedrun --out 'a b'", "a b", "sft.py", slots=2)
    *launcher, script, preset, flag, out, resume = study.launch_words(stage)
    assert launcher[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert [script, preset, flag, out, resume] == ["sft.py", "speedrun", "--out", "a b", "--resume"]
    measure = stage._replace(command="evaluate.py vqa", slots=1)
    assert study.launch_words(measure)[1:] == ["evaluate.py", "vqa"]
    assert study.launch_words(stage._replace(command="awk x y"))[0] == "awk"


# ---- Running -------------------------------------------------------------------------------------

TRAIN = """
    import pathlib, sys
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    if "--fail" in flags:
        sys.exit("error: " + flags["--fail"])
    out = pathlib.Path(flags["--out"])
    out.mkdir(parents=True, exist_ok=True)
    with open("ran.txt", "a") as log:
        log.write(str(out) + "\\n")
"""
EVALUATE = """
    import json, pathlib, sys
    way = sys.argv[1]
    flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    assert pathlib.Path(flags["--policy"]).exists()
    out = pathlib.Path(flags["--out"])
    results = {"arms": {}, "commands": [], "minutes": 0}
    if out.exists():
        results = json.loads(out.read_text())
    arm = results["arms"].setdefault(flags["--variant"], {"metrics": {}, "checkpoints": {}})
    arm["metrics"][{"actions": "think greedy r_a", "vqa": "answers"}[way]] = {"mean": 1}
    arm["checkpoints"][way] = flags["--policy"]
    out.write_text(json.dumps(results))
    with open("ran.txt", "a") as log:
        log.write("measured " + flags["--variant"] + (" vqa" if way == "vqa" else "") + "\\n")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with scripts that stand in for a stage and for evaluate.py; the base lies there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 0)  # workers are cores
    Path("train.py").write_text(textwrap.dedent(TRAIN))
    Path("evaluate.py").write_text(textwrap.dedent(EVALUATE))
    Path(study.BASE).mkdir(parents=True)
    return tmp_path


TRAIN_COMMAND = "train.py --data {test} --init {init} --out {out}"  # flags: train.py is no stage


def small_matrix(**more_flags):
    """base, A and B on it, C on A; more_flags: of a model's command."""

    def trained(name, parent):
        command = f"{TRAIN_COMMAND} {more_flags.get(name, '')}".strip()
        return Model(name, parent, [command], "what", against=parent, measures="actions", seeds=1)

    base = Model("base", "", [], "what", against="", measures="actions", seeds=1)
    models = [base, trained("A", "base"), trained("B", "base"), trained("C", "A")]
    data = [Data("{test}", "train.py --out {path}", "")]
    return Matrix(data, models, {}, {"actions": "evaluate.py actions"})


def two_measures(of_test="", of_actions="", **more_flags):
    """The same, each measured in two ways, one of which needs the data; more flags of these."""
    matrix = small_matrix(**more_flags)
    models = [one._replace(measures="actions vqa") for one in matrix.models]
    data = [Data("{test}", f"train.py --out {{path}} {of_test}".strip(), "")]
    actions = f"evaluate.py actions --data {{test}} {of_actions}".strip()
    return Matrix(data, models, {}, {"actions": actions, "vqa": "evaluate.py vqa"})


def metrics_of(name):
    arms = evaluate.read_results(f"results/{name}_0.json")["arms"]
    return list(arms[name]["metrics"]) if name in arms else []


def run(matrix, *flags):
    return study.main(["--workers", "2", "--results", "results", *flags], matrix)


def what_ran():
    path = Path("ran.txt")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_all_runs_once_and_a_second_call_has_nothing_to_do(place, capsys):
    assert run(small_matrix()) == 0
    ran = what_ran()
    assert ran[0] == "data/study/test" or "measured base" in ran[:2]
    trained = [line for line in ran if line.startswith("runs/")]
    assert sorted(trained) == ["runs/study/A_0", "runs/study/B_0", "runs/study/C_0"]
    assert trained.index("runs/study/A_0") < trained.index("runs/study/C_0")
    assert sum(line.startswith("measured") for line in ran) == 4
    assert sorted(path.name for path in Path("results").glob("*_0.json")) == [
        "A_0.json", "B_0.json", "C_0.json", "base_0.json",
    ]  # fmt: skip
    capsys.readouterr()
    assert run(small_matrix()) == 0
    assert what_ran() == [] and "0 stages to run" in capsys.readouterr().out
    # whoever has the results alone has nothing to train; of what is asked anew only what it needs
    for folder in ("A_0", "B_0", "C_0"):
        Path("runs/study", folder).rmdir()
    assert run(small_matrix()) == 0 and what_ran() == []
    Path("results/C_0.json").unlink()
    assert run(small_matrix()) == 0
    assert what_ran() == ["runs/study/A_0", "runs/study/C_0", "measured C"]


def test_only_some_models_with_what_they_start_from(place):
    assert run(small_matrix(), "--only", "C", "--seeds", "2") == 0
    assert what_ran() == [
        "data/study/test", "runs/study/A_2", "runs/study/C_2", "measured C",
    ]  # fmt: skip


def test_only_some_measures_and_heads_of_each_model():
    wanted = {"base": [0], "SFT": [0], "RL-l1": [0]}
    matrix = study.narrowed(study.MATRIX, "think,actions", "prompt")
    stages = study.all_stages(matrix, wanted, FOLDERS, ranks=2)
    targets = study.targets_of(study.MATRIX, wanted, stages)
    assert targets == [
        "base_0 actions", "base_0 drives prompt",
        "SFT_0 actions", "SFT_0 think", "SFT_0 drives prompt",
        "RL-l1_0 actions",
    ]  # fmt: skip
    all_of_them = study.all_stages(study.MATRIX, wanted, FOLDERS, ranks=2)
    assert study.narrowed(study.MATRIX, "", "") == study.MATRIX
    assert all(all_of_them[key] == stage for key, stage in stages.items()), "they run once"
    matrix = study.narrowed(study.MATRIX, "none", "none")
    stages = study.all_stages(matrix, wanted, FOLDERS, ranks=2)
    assert study.targets_of(study.MATRIX, wanted, stages) == []
    targets = study.targets_of(study.MATRIX, wanted, stages, only_checkpoints=True)
    assert targets == ["SFT_0", "RL-l1_0"]


def test_a_filter_trains_no_model_of_which_it_asks_nothing(place):
    """--measures probe --heads none trained every model that has no probe, for hours."""
    matrix = two_measures()
    matrix.models.append(Model("D", "base", [TRAIN_COMMAND], "what", "", measures="", seeds=1))
    without_vqa = matrix.models[1]._replace(measures="actions")
    matrix.models[1] = without_vqa
    assert run(matrix, "--measures", "vqa", "--heads", "none", "--workers", "1") == 0
    ran = what_ran()
    assert "measured base vqa" in ran and "measured B vqa" in ran
    assert "runs/study/A_0" in ran and "runs/study/C_0" in ran, "C has vqa and starts from A"
    assert "runs/study/D_0" in ran, "it is there to be trained alone"
    only = ("--only", "A", "--seeds", "1")
    assert run(matrix, *only, "--measures", "vqa") == 0 and what_ran() == []
    assert run(matrix, *only, "--measures", "none", "--heads", "none") == 0
    assert what_ran() == ["runs/study/A_1"]


def test_a_dry_run_starts_nothing(place, capsys):
    assert run(small_matrix(), "--dry-run") == 0
    assert not Path("results").exists() and not Path("runs").exists() and what_ran() == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("8 stages to run: 0.1 worker hours, about 0.1 hours on 2 workers")
    assert re.match(r" +1  data/study/test +1.0 min, 1 worker$", lines[0])


def test_a_changed_command_is_refused_until_redo(place, capsys):
    run(small_matrix())
    what_ran()
    changed = small_matrix(A="--lr 3")
    with pytest.raises(ValueError, match=r"^A_0: was run as `train.py .*A_0`, is now .* --redo"):
        run(changed)
    with pytest.raises(ValueError, match="A_0: was run as"):
        run(changed, "--dry-run")
    assert run(changed, "--redo", "--dry-run") == 0
    assert "4 stages to run" in capsys.readouterr().out
    assert what_ran() == [] and Path("runs/study/A_0").exists()
    assert run(changed, "--redo") == 0
    ran = what_ran()
    assert "runs/study/B_0" not in ran and "measured base" not in ran
    assert sorted(ran) == ["measured A", "measured C", "runs/study/A_0", "runs/study/C_0"]
    assert run(changed) == 0 and what_ran() == []


def test_results_of_a_model_that_has_changed_do_not_outlive_it(place):
    """A report of the new A and the old C would compare what does not belong together."""
    run(small_matrix())
    assert run(small_matrix(A="--fail now"), "--redo") == 1
    assert evaluate.read_results("results/C_0.json")["arms"] == {}
    assert "B" in evaluate.read_results("results/B_0.json")["arms"]


def test_results_of_another_model_go_where_their_own_command_has_changed_too(place):
    """They stayed, as if of the same model; its training failed, and the report had them."""
    flags = ("--only", "A", "--measures", "actions")
    run(two_measures(), *flags)
    now = two_measures(of_actions="--prompts 2", A="--fail now")
    assert run(now, *flags, "--redo") == 1
    assert evaluate.read_results("results/A_0.json")["arms"] == {}


def test_redo_deletes_what_has_changed_and_nothing_else(place):
    """With a model's `actions`, of data that had changed, its `vqa` went too, and was not run
    again."""
    one_at_a_time = ("--only", "base", "--workers", "1")
    run(two_measures(), *one_at_a_time)
    what_ran()
    for number, asked in enumerate([(), ("--measures", "actions")]):
        now = two_measures(of_test=f"--more {number}")
        assert run(now, *one_at_a_time, *asked, "--redo") == 0
        assert what_ran() == ["data/study/test", "measured base"]
        assert sorted(metrics_of("base")) == ["answers", "think greedy r_a"]
        assert run(now, *one_at_a_time) == 0 and what_ran() == []

    # what the deleted measure wrote is not there before it is written again
    now = two_measures(of_test="--fail now")
    assert run(now, *one_at_a_time, "--redo") == 1
    assert metrics_of("base") == ["answers"]
    # a command alone that has changed: of the same model and data, so it stays until then
    run(two_measures(), *one_at_a_time, "--redo")
    Path("evaluate.py").write_text("raise SystemExit('error: no luck')")
    assert run(two_measures(of_actions="--prompts 2"), *one_at_a_time, "--redo") == 1
    assert sorted(metrics_of("base")) == ["answers", "think greedy r_a"]


def test_what_is_left_away_is_forgotten_with_its_model_alone(place):
    """A row of the report would else hold the new model's actions beside the old one's answers."""
    only_actions = ("--only", "A", "--workers", "1", "--measures", "actions", "--redo")
    run(two_measures(), "--only", "A", "--workers", "1")
    what_ran()
    now = two_measures(of_actions="--prompts 2")
    assert run(now, *only_actions) == 0 and what_ran() == ["measured A"]
    assert sorted(metrics_of("A")) == ["answers", "think greedy r_a"]
    now = two_measures(of_actions="--prompts 2", A="--lr 3")
    assert run(now, *only_actions) == 0 and what_ran() == ["runs/study/A_0", "measured A"]
    assert metrics_of("A") == ["think greedy r_a"]
    assert run(now, "--only", "A") == 0 and what_ran() == ["measured A vqa"], "without --redo"


def test_what_nobody_needs_may_have_changed(place):
    """It stopped everything, and --redo deleted it."""

    def matrix(flags):
        of_a_and_d = small_matrix()
        of_a_and_d.data.append(Data("{scenes}", f"train.py --out {{path}} {flags}".strip(), ""))
        command = TRAIN_COMMAND.replace("{test}", "{scenes}")
        of_a_and_d.models.append(of_a_and_d.models[1]._replace(name="D", commands=[command]))
        return of_a_and_d

    run(matrix(""))
    what_ran()
    now = matrix("--more 1")
    assert run(now, "--only", "A") == 0 and what_ran() == []
    with pytest.raises(ValueError, match="data/study/scenes: was run as"):
        run(now, "--only", "A,D")
    assert run(small_matrix(A="--lr 3"), "--only", "A", "--redo") == 0
    assert what_ran() == ["runs/study/A_0", "measured A"]
    assert Path("data/study/scenes").exists() and Path("runs/study/D_0").exists()
    assert run(matrix("")._replace(models=small_matrix(A="--lr 3").models), "--only", "A") == 0


def test_names_of_metrics_tell_what_measured_them():
    """--redo deletes by these; of a name that it does not know the old value would stay."""
    for command in [*study.MEASURES.values(), study.DRIVE]:
        assert study.kind_of(command).split()[0] in study.METRIC_NAMES
    assert study.is_metric_of("tabletop think removed", "think removed success goal 3")
    assert not study.is_metric_of("tabletop think", "think removed success goal 3")
    assert not study.is_metric_of("tabletop", "think success")
    assert study.is_metric_of("tabletop think sampled", "think sampled success goal 3")
    assert not study.is_metric_of("actions", "think sampled success goal 3")
    assert study.is_metric_of("actions", "think sampled r_a")
    for score in grpo.SCORES:
        assert study.is_metric_of("vqa", f"{score} where")
        assert study.is_metric_of("vqa", f"{score}_graded where")
    for path in (ROOT / "results").glob("study*/*_[0-9].json"):
        for variant in json.loads(path.read_text())["arms"].values():
            for name in [*variant["metrics"], *variant["paired"]]:
                ways = [way for way in variant["checkpoints"] if study.is_metric_of(way, name)]
                assert len(ways) == 1, (path, name, ways)


def test_a_folder_may_be_spelled_in_several_ways(place):
    """ "w/" cut each stage off from what it starts from: all began at once, and failed."""
    assert run(small_matrix(), "--only", "C", "--runs", "./w/", "--data", "d//") == 0
    assert what_ran() == ["d/test", "w/A_0", "w/C_0", "measured C"]
    assert run(small_matrix(), "--only", "C", "--runs", "w", "--data", "d") == 0
    assert what_ran() == []
    assert run(small_matrix(), "--only", "C", "--runs", ".", "--data", ".", "--redo") == 0
    assert what_ran() == ["test", "A_0", "C_0", "measured C"]


def test_a_model_stands_behind_its_parent():
    """Listed before it, it had no parent: it began at once, and its digest knew nothing of it."""
    matrix = small_matrix()
    matrix.models.reverse()
    with pytest.raises(ValueError, match="C_0: starts from A_0, which the matrix lists behind it"):
        study.all_stages(matrix, {"C": [0]}, FOLDERS, ranks=2)


def test_a_changed_parent_is_refused_too(place):
    """C was trained from A as it was; only C is asked for, and A's checkpoint is another now."""
    run(small_matrix(), "--only", "C")
    run(small_matrix(A="--lr 3"), "--only", "A", "--redo")
    with pytest.raises(ValueError, match=r"^C_0: something that it starts from has changed \(data"):
        run(small_matrix(A="--lr 3"), "--only", "C")


def test_what_lies_there_already_is_not_taken_for_a_stages(place):
    Path("runs/study/B_0").mkdir(parents=True)
    with pytest.raises(ValueError, match="runs/study/B_0: exists, but this study has not written"):
        run(small_matrix())
    assert what_ran() == []


def test_a_failure_stays_alone_and_is_named(place, capsys):
    assert run(small_matrix(A="--fail no-luck")) == 1
    out = capsys.readouterr().out
    assert "FAILED  A_0: exit 1: error: no-luck (all of it in runs/study/logs/A_0.txt)" in out
    assert "1 stages failed: A_0" in out
    assert "3 stages not started, as what they need is not there: A_0 actions, C_0, C_0" in out
    ran = what_ran()
    assert {"runs/study/B_0", "measured B", "measured base"} <= set(ran)
    assert not any("A" in line or "C" in line for line in ran)
    # mended, it goes on with what is missing alone
    Path("train.py").write_text(Path("train.py").read_text().replace("sys.exit", "print"))
    assert run(small_matrix(A="--fail no-luck")) == 0
    assert sorted(what_ran()) == ["measured A", "measured C", "runs/study/A_0", "runs/study/C_0"]


def test_the_last_line_is_the_stages_not_torchruns(tmp_path):
    """It was a ruler: of a run of two ranks the log goes on with how they ended."""
    log = tmp_path / "log.txt"
    log.write_text(
        "step 1\rstep 2\nerror: all of them held out\nerror: all of them held out\n"
        "W1128 18:27:15 22969 torch/distributed/elastic/multiprocessing/api.py:1028] Sending ...\n"
        "Traceback (most recent call last):\n======\n"
    )
    assert study.last_line(log) == "error: all of them held out"
    log.write_text("step 1\rstep 2\n\n")
    assert study.last_line(log) == "step 2"
    log.write_text("")
    assert study.last_line(log) == "it said nothing"


def test_a_stage_that_ends_well_without_its_output_has_failed(place, capsys):
    Path("evaluate.py").write_text("print('nothing')")
    assert run(small_matrix(), "--only", "base") == 1
    assert "base_0 actions: it has not written results/base_0.json: nothing" in (
        capsys.readouterr().out
    )


def python_stage(key, code, folder, **more):
    """A stage that runs some lines of Python, and then writes its output."""
    output = folder / key
    code = f"{textwrap.dedent(code)}\nopen({str(output)!r}, 'w')"
    return Stage(key, f"-c {shlex.quote(code)}", str(output), key, digest=key, **more)


def run_stages(folder, stages, workers=("0", "1"), records=None, **more):
    """-> exit status, and the runner."""
    folders = Folders(str(folder / "runs"), "", str(folder / "results"))
    records = {} if records is None else records
    runner = Runner(stages, records, folders, list(workers), **more)
    with study.only_one(folders.runs) as lock:
        return runner.run(lock), runner


MEET = """
    import pathlib, time
    pathlib.Path({mine!r}).touch()
    for _ in range(1200):
        if pathlib.Path({other!r}).exists():
            break
        time.sleep(0.05)
    else:
        raise SystemExit("alone")
"""


def test_two_workers_work_at_once(tmp_path):
    """Each of two stages waits for the other; with one worker both would wait in vain."""
    a, b = str(tmp_path / "1"), str(tmp_path / "2")
    stages = [
        python_stage("a", MEET.format(mine=a, other=b), tmp_path),
        python_stage("b", MEET.format(mine=b, other=a), tmp_path),
    ]
    status, _ = run_stages(tmp_path, stages)
    assert status == 0


def test_a_stage_of_two_ranks_has_both_workers(tmp_path):
    alone = """
        import pathlib, time
        busy = pathlib.Path({busy!r})
        assert not list(busy.parent.glob("*.busy")), "somebody else works"
        busy.touch()
        time.sleep(0.2)
        assert list(busy.parent.glob("*.busy")) == [busy], "somebody else has begun"
        busy.unlink()
    """
    busy = [str(tmp_path / f"{number}.busy") for number in range(3)]
    single = """
        import pathlib, time
        pathlib.Path({busy!r}).touch()
        time.sleep(0.1)
        pathlib.Path({busy!r}).unlink()
    """
    stages = [
        python_stage("a", alone.format(busy=busy[0]), tmp_path, slots=2),
        python_stage("b", alone.format(busy=busy[1]), tmp_path, slots=2),
        python_stage("c", single.format(busy=busy[2]), tmp_path),
    ]
    # torchrun is for scripts of the pipeline, so that these run as they are
    status, _ = run_stages(tmp_path, stages)
    assert status == 0


def test_a_stage_of_two_ranks_does_not_wait_for_what_is_measured_before_it(tmp_path, capsys):
    """A model's measurements came before the next model's training, and at the last of them, a
    head of ten minutes, the other worker had nothing to do."""
    stages = [
        python_stage("A", "pass", tmp_path, slots=2),
        python_stage("A head", "pass", tmp_path, inputs=("A",)),
        python_stage("B", "pass", tmp_path, slots=2),
        python_stage("B head", "pass", tmp_path, inputs=("B",)),
    ]
    run_stages(tmp_path, stages)
    lines = [line for line in capsys.readouterr().out.splitlines() if "  started " in line]
    started = [line.split("  started ")[1].split(" (about")[0] for line in lines]
    assert started == ["A", "B", "A head", "B head"]


def test_each_gpu_has_its_own_stage(tmp_path):
    code = """
        import os, time
        open({path!r}, "w").write(os.environ["CUDA_VISIBLE_DEVICES"])
        time.sleep(0.3)
    """
    seen = [tmp_path / "seen_a", tmp_path / "seen_b"]
    stages = [
        python_stage(key, code.format(path=str(path)), tmp_path)
        for key, path in zip("ab", seen, strict=True)
    ]
    status, _ = run_stages(tmp_path, stages, ("3", "5"), on_gpus=True)
    assert status == 0
    assert sorted(path.read_text() for path in seen) == ["3", "5"]


def test_hours_start_nothing_that_would_not_end_in_time(tmp_path, capsys):
    """Estimates are what the study has measured of stages of the same kind."""

    def record(kind, seconds):
        return {"command": "x", "digest": "", "kind": kind, "slots": 1, "seconds": seconds}

    records = {"before": record("long", 3000.0), "before too": record("short", 2.0)}
    long = python_stage("long", "", tmp_path)
    after = python_stage("after", "", tmp_path, inputs=("long",))
    short = python_stage("short", "", tmp_path)
    assert study.estimate(long, records) == 3000
    deadline = time.time() + 600
    status, runner = run_stages(tmp_path, [long, after, short], records=records, deadline=deadline)
    assert status == 0
    assert not Path(long.output).exists() and Path(short.output).exists()
    assert runner.late == ["long"] and runner.blocked == ["after"]
    assert "1 stages not started, as they would not end in time: long" in capsys.readouterr().out


def test_estimates_of_training_are_by_the_step():
    rl = Stage("x", "grpo.py speedrun --steps 240", "", "grpo.py", slots=2)
    assert study.estimate(rl, {}) == pytest.approx(240 * 2.5)
    done = {"command": "grpo.py speedrun", "kind": "grpo.py", "seconds": 160.0}  # of 80 steps
    assert study.estimate(rl, {"SFT+RL_0": done}) == pytest.approx(480)


def test_estimates_of_stopped_training_are_of_what_is_left(tmp_path, capsys):
    """Four of six minutes done, it was as long as before, and --hours did not begin it again."""
    out = tmp_path / "RL"
    rl = Stage("RL_0", "grpo.py speedrun --steps 144", str(out), "grpo.py", digest="d")
    record = {"command": rl.command, "kind": "grpo.py", "digest": "d", "spent": 240.0}
    assert study.estimate(rl, {"RL_0": record}) == 360, "it has no checkpoint"
    out.mkdir()
    assert study.estimate(rl, {"RL_0": record}) == 120
    assert study.estimate(rl, {"RL_0": record | {"spent": 400.0}}) == 0
    assert study.estimate(rl, {"RL_0": record | {"digest": "another"}}) == 360
    study.print_plan([rl], {"RL_0": record}, workers=1)
    assert "   2.0 min, 1 worker, was begun\n" in capsys.readouterr().out
    measure = rl._replace(command="evaluate.py vqa", kind="vqa")  # it does not resume
    assert study.estimate(measure, {"RL_0": record | {"kind": "vqa"}}) == study.SECONDS["vqa"]


def test_what_has_ended_and_is_lost_was_not_begun(tmp_path, capsys):
    """It said so of a checkpoint that had been deleted: nothing is there to go on from."""
    sft = Stage("SFT_0", "sft.py speedrun", str(tmp_path / "SFT"), "sft.py", digest="d")
    record = {"command": sft.command, "kind": "sft.py", "digest": "d", "seconds": 60.0}
    study.print_plan([sft], {"SFT_0": record}, workers=1)
    assert "1.0 min, 1 worker\n" in capsys.readouterr().out


def test_more_workers_than_gpus_are_refused(monkeypatch):
    """--workers 8 was one worker on a machine with one GPU."""
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert study.worker_names(0) == study.worker_names(2) == (["3", "5"], True)
    assert study.worker_names(1) == (["3"], True)
    with pytest.raises(ValueError, match="--workers 8: a worker is a GPU, of which there are 2"):
        study.worker_names(8)


def test_sigterm_stops_the_children_and_a_second_run_goes_on(place, capsys):
    slow = """
        import os, pathlib, sys, time
        flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        if flags["--out"].endswith("A_0"):
            pathlib.Path("pid").write_text(str(os.getpid()))
            time.sleep(60)
    """
    quick = Path("train.py").read_text()
    Path("train.py").write_text(textwrap.dedent(slow) + quick)

    def stop_when_it_runs():
        deadline = time.monotonic() + 60  # as long as the stage sleeps: then the test fails
        while not (Path("pid").exists() and Path("pid").read_text()):
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_it_runs)
    thread.start()
    assert run(small_matrix(), "--only", "A") == 143
    thread.join()
    assert "stopping A_0" in capsys.readouterr().out
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)
    records = model.read_json("results/stages.json")
    assert "seconds" in records["data/study/test"] and "seconds" not in records["A_0"]
    what_ran()
    Path("train.py").write_text(quick)
    assert run(small_matrix(), "--only", "A") == 0
    assert what_ran() == ["runs/study/A_0", "measured A"]
    assert "A_0" in capsys.readouterr().out.split("was begun")[0]
    assert "spent" not in model.read_json("results/stages.json")["A_0"]


def test_half_an_output_is_deleted_before_it_is_written_again(tmp_path):
    stage = python_stage("a", "", tmp_path)
    Path(stage.output).mkdir()
    (Path(stage.output) / "half").touch()
    records = {"a": {"command": stage.command, "digest": "a", "kind": "a", "slots": 1}}
    status, _ = run_stages(tmp_path, [stage], records=records)
    assert status == 0
    assert Path(stage.output).is_file()


def test_two_studies_do_not_run_in_one_folder(tmp_path):
    with study.only_one(str(tmp_path)):
        with pytest.raises(ValueError, match="a study runs there"):
            with study.only_one(str(tmp_path)):
                pass
    with study.only_one(str(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "SFT,nobody"], "no model nobody; the study has base, A, B, C"),
        (["--only", "A", "--seeds", "1000"], "--seeds 1000: .* of what is measured on"),
        (["--only", "A", "--seeds", "0,x"], "--seeds 0,x: .*; give numbers, as 0,1,2"),
        (["--measures", "actions,vqa"], "--measures: no 'vqa'; give some of actions, or none"),
        (["--heads", "prompt"], "--heads: no 'prompt'; give some of"),
        (["--runs", "my runs"], "--runs my runs: name a folder without spaces, commas, colons, #"),
        (["--data", "a,b"], "--data a,b: name a folder without"),
        (["--data", "a#b"], "--data a#b: name a folder without"),
        (["--results", "a:b"], "--results a:b: name a folder without"),
    ],
)
def test_wrong_flags_are_one_line(place, flags, words):
    if flags[1].startswith("SFT"):
        flags = ["--only", "A,nobody"]
    with pytest.raises(ValueError, match=words):
        run(small_matrix(), *flags)


# ---- Statistics ----------------------------------------------------------------------------------


def test_seeds_are_resampled_not_only_items():
    """Two seeds of equal items, 0 and 1: means are 0, 0.5, 1 in 1/4, 1/2, 1/4 of the resamples. The
    items alone, all together, would give [0.43, 0.57] of 200."""
    estimate = study_report.hierarchical_bootstrap({0: [0.0] * 100, 1: [1.0] * 100}, 2000)
    assert estimate.interval == {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 200}
    assert estimate.by_seed == {0: 0.0, 1: 1.0}
    assert estimate.p == pytest.approx(2 * 0.25, abs=0.05), "a quarter is at 0 or below"


def test_items_are_resampled_within_a_seed():
    """One seed: the plain bootstrap, whose interval is mean +- 1.96 s / sqrt(N)."""
    items = np.random.default_rng(1).normal(0.1, 1, 400)
    interval = study_report.hierarchical_bootstrap({0: items}, 8000).interval
    half = 1.96 * items.std() / 20
    assert interval["low"] == pytest.approx(items.mean() - half, abs=0.01)
    assert interval["high"] == pytest.approx(items.mean() + half, abs=0.01)


def test_a_seed_of_few_items_weighs_as_much():
    """Of 4 items of one seed and 1 of another the mean is that of the seeds, 0.5, not 0.8."""
    estimate = study_report.hierarchical_bootstrap({0: [1.0] * 4, 1: [0.0]}, 100)
    assert estimate.interval["mean"] == 0.5 and estimate.interval["n"] == 5


def test_variances_of_seeds_and_items_add():
    """S seeds whose means have variance a, N items of variance b each: a resampled mean has
    variance (a + b / N) / S, with a and b those of the sample itself."""
    rng = np.random.default_rng(2)
    by_seed = {seed: rng.normal(seed / 2, 3, 50) for seed in range(4)}
    means = np.array([items.mean() for items in by_seed.values()])
    b = np.mean([items.var() for items in by_seed.values()])
    sd = np.sqrt((means.var() + b / 50) / 4)
    interval = study_report.hierarchical_bootstrap(by_seed, 8000).interval
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * sd, rel=0.06)
    assert interval["mean"] == pytest.approx(means.mean())


def test_p_by_hand():
    always = study_report.hierarchical_bootstrap({0: [1.0, 1.0], 1: [0.5]}, 999)
    assert always.p == pytest.approx(2 / 1000)
    assert study_report.hierarchical_bootstrap({0: [0.0, 0.0]}, 999).p == 1
    # of two items, 3 and -1: means of -1, 1 and 3 in 1/4, 1/2, 1/4
    one_in_four = study_report.hierarchical_bootstrap({0: [3.0, -1.0]}, 4000)
    assert one_in_four.p == pytest.approx(0.5, abs=0.04)


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1, which is not below the one before."""
    assert study_report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert study_report.holm([0.5, 0.9]) == [1, 1]
    assert study_report.holm([]) == []


# ---- Report --------------------------------------------------------------------------------------

PAGE = """# Study

Prose that stays.

<!-- study: models -->
old
<!-- end -->

More prose.

<!-- study: differences -->
<!-- end -->
<!-- study: heads -->
<!-- end -->
<!-- study: head differences -->
<!-- end -->
<!-- study: cost -->
<!-- end -->
<!-- study: matrix -->
<!-- end -->
<!-- study: thoughts -->
<!-- end -->
<!-- study: worths -->
<!-- end -->
<!-- study: worth differences -->
<!-- end -->
<!-- study: gains -->
<!-- end -->
<!-- study: questions -->
<!-- end -->
"""


def write_results(folder, name, seed, r_a, success=None, preset="study"):
    metrics = {"think sampled r_f": {"mean": 0.9 + seed / 100, "low": 0, "high": 1, "n": 4}}
    if name == "SFT":
        for metric in ("given removed r_a", "worth own"):
            metrics[metric] = {"mean": seed / 10, "low": 0, "high": 1, "n": 4}
    if name != "SFT+RL":
        metrics["exact what"] = {"mean": 0.8 + seed / 10, "low": 0, "high": 1, "n": 4}
    arms = {name: {"metrics": metrics, "paired": {"think greedy r_a": r_a}}}
    if success:
        arms[f"{name} prompt"] = {
            "metrics": {},
            "paired": {"success": success},
            "seconds": {"tabletop": {"chunk": 0.01}},
        }
    results = {"preset": preset, "arms": arms, "hardware": "2 cores"}
    results |= {"commands": [], "minutes": 1.0}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}_{seed}.json").write_text(json.dumps(results))


def test_tokens_of_a_log(tmp_path):
    rows = [
        {"config": {}},
        {"step": 1, "num_tokens": 9},
        {"step": 2, "num_tokens": 20},
        {"step": 2},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert study.logged_tokens(str(tmp_path)) == 20
    assert study.logged_tokens(str(tmp_path / "none")) == 0


@pytest.fixture
def made_up(tmp_path):
    """base, SFT and SFT+RL of two seeds; SFT+RL's gain over SFT is 0.1 in each prompt but one,
    which has no value; heads of one seed."""
    folder = tmp_path / "study"
    for seed in (0, 1):
        write_results(folder, "base", seed, [0.0, 0.0, 0.0, 0.0])
        write_results(folder, "SFT", seed, [0.2, 0.4, None, 0.3], [0, 1, 0, 1] if seed else None)
        after = [0.3, 0.5, 0.9, 0.4]
        write_results(folder, "SFT+RL", seed, after, [1, 1, 0, 1] if seed else None)
    sft = {"command": "sft.py speedrun --steps 100 --resume", "kind": "sft.py", "slots": 2}
    records = {"SFT_0": {**sft, "seconds": 1800.0, "num_tokens": 4_210_000}, "SFT_1": sft}
    records["SFT_0 actions"] = {"command": "x", "kind": "actions", "slots": 1, "seconds": 60.0}
    (folder / "stages.json").write_text(json.dumps(records))
    return folder


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].strip("| "): line for line in lines}


def test_the_report_of_made_up_results(made_up, tmp_path, capsys):
    page = tmp_path / "study.md"
    page.write_text(PAGE)
    arguments = ["report", "--results", str(made_up), "--page", str(page), "--figures", ""]
    assert study.main(arguments) == 0
    text = page.read_text()
    assert "Prose that stays." in text and "More prose." in text and "\nold\n" not in text
    rows = rows_of(text.split("<!-- study: models -->")[1].split("<!-- end -->")[0])
    assert "0.905 (0.900 to 0.910)" in rows["SFT"] and "2 x 3" in rows["SFT"]
    assert "| 0.300 [" in rows["SFT"] and list(rows) == ["model", "base", "SFT", "SFT+RL"]

    section = text.split("<!-- study: differences -->")[1].split("<!-- end -->")[0]
    rows = rows_of(section)
    assert "| 0.100 [0.100, 0.100], p 5e-05 (0.0002) | 2 x 3 |" in rows["SFT+RL - SFT"]
    # two seeds of base, SFT and SFT+RL make 3 comparisons of r_a, and one of the heads
    assert "correction over all 4 comparisons" in section
    assert "seeds 0, 1; 2 cores; the study so far took 1.0 worker hours" in section

    rows = rows_of(text.split("<!-- study: head differences -->")[1].split("<!-- end -->")[0])
    without_p = "| prompt | 25.0 [0.0, 75.0] | 1 x 4 |"
    assert rows["SFT+RL - SFT"].endswith(without_p), "no p where the interval holds 0"
    rows = rows_of(text.split("<!-- study: heads -->")[1].split("<!-- end -->")[0])
    assert "| prompt | 75.0 [25.0, 100.0] | 0.010 | 1 x 4 |" in rows["SFT+RL"]
    rows = rows_of(text.split("<!-- study: cost -->")[1].split("<!-- end -->")[0])
    assert rows["SFT"] == "| SFT | 2,400 samples | 4.2 | 60.0 | 0.0 | 1.0 | 1 |"
    rows = rows_of(text.split("<!-- study: thoughts -->")[1].split("<!-- end -->")[0])
    assert rows == {
        "model": "| model | none | seeds |",
        "SFT": "| SFT | 0.050 (0.000 to 0.100) | 2 |",
    }, "neither models that were not asked nor what was asked of none"
    rows = rows_of(text.split("<!-- study: worths -->")[1].split("<!-- end -->")[0])
    assert rows["model"] == "| model | the most probable one | seeds |"
    assert rows["SFT"] == "| SFT | 0.050 (0.000 to 0.100) | 2 |"
    rows = rows_of(text.split("<!-- study: questions -->")[1].split("<!-- end -->")[0])
    same = "0.850 (0.800 to 0.900)"
    assert rows == {
        "model": "| model | what | seeds |",
        "base": f"| base | {same} | 2 |",
        "SFT": f"| SFT | {same} | 2 |",
    }

    study.main(arguments)
    assert page.read_text() == text, "the same again"


def test_what_thoughts_are_worth_has_a_table_of_differences(made_up):
    """Apart from that of the models, and of the prompts that have a value."""
    worths = {"SFT": ([0.1, 0.2], [0.3, None]), "SFT+RL": ([0.2, 0.3], [0.34, 1])}
    for name, (sampled, true) in worths.items():
        path = made_up / f"{name}_0.json"
        results = json.loads(path.read_text())
        results["arms"][name]["paired"] |= {"worth sampled": sampled, "worth true": true}
        path.write_text(json.dumps(results))
    results = study_report.read_study(str(made_up), study.MATRIX)
    comparisons = study_report.compare(results, study.MATRIX, 100)
    report = study_report.Report(results, study.MATRIX, comparisons, study.read_records(made_up))
    rows = rows_of("\n".join(study_report.TABLES["worth differences"](report)))
    assert list(rows) == ["difference", "SFT+RL - SFT"]
    cells = [cell.split(" [")[0] for cell in rows["SFT+RL - SFT"].split(" | ")]
    assert cells[1:] == ["0.100", "0.040", "1 x 2; 1 x 1 |"]
    assert "sampled thought" not in "".join(study_report.TABLES["differences"](report))


def test_a_gain_is_over_the_parent_prompt_by_prompt(made_up):
    """It is a difference as it is measured, and one of the comparisons that the correction is over:
    three of r_a, one of a head, and this one."""
    for seed, gained in ((0, [0.1, 0.2, 0.3]), (1, [0.0, 0.2, 0.1])):
        path = made_up / f"SFT+RL_{seed}.json"
        results = json.loads(path.read_text())
        results["arms"]["SFT+RL"]["paired"]["gain answers"] = gained
        path.write_text(json.dumps(results))
    results = study_report.read_study(str(made_up), study.MATRIX)
    comparisons = study_report.compare(results, study.MATRIX, 100)
    assert len(comparisons) == 5
    report = study_report.Report(results, study.MATRIX, comparisons, study.read_records(made_up))
    rows = rows_of("\n".join(study_report.TABLES["gains"](report)))
    assert list(rows) == ["difference", "SFT+RL - SFT"]
    assert "| 0.150 [" in rows["SFT+RL - SFT"] and rows["SFT+RL - SFT"].endswith("| 2 x 3 |")
    assert "by its answers" not in "".join(study_report.TABLES["differences"](report))


def test_minutes_of_a_part_are_of_the_seeds_that_ran_it(made_up):
    """Two seeds trained, one of them measured in a minute: that was half a minute of measuring."""
    results = study_report.read_study(str(made_up), study.MATRIX)
    records = study.read_records(str(made_up))
    records["SFT_1"] = records["SFT_0"] | {"seconds": 600.0}
    records["SFT_0 vqa"] = records["SFT_0 actions"]
    records["SFT_1 head prompt"] = {"command": "x", "slots": 1, "seconds": 30.0}
    rows = study_report.cost_table(study_report.Report(results, study.MATRIX, [], records))
    assert "| SFT | 2,400 samples | 4.2 | 40.0 | 0.5 | 2.0 | 2 |" in rows
    assert [study_report.part_of_cost(rest) for rest in ("", "(1 of 2)", "drives prompt")] == [
        "training", "training", "measuring",
    ]  # fmt: skip


def test_what_a_model_was_trained_on():
    """Samples are steps times batch; rollouts come in groups, of so many prompts a step."""
    grpo_command = "grpo.py speedrun --steps 20 --prompts 4 --group 16 --resume"
    assert study_report.samples_of(grpo_command) == "80 prompts x 16 rollouts"
    assert study_report.samples_of("sft.py speedrun --steps 30 --batch 8") == "240 samples"
    assert study_report.samples_of("evaluate.py actions --policy x") == "-"


def test_a_range_is_from_the_lowest_to_the_highest_seed():
    """In whatever order the seeds came. Of one seed there is its own interval."""
    results = {"SFT": {}}
    for seed, mean in enumerate((0.5, 0.9, 0.1)):
        metrics = {"x": {"mean": mean, "low": 0.0, "high": 1.0, "n": 4}}
        results["SFT"][seed] = {"arms": {"SFT": {"metrics": metrics, "paired": {}}}}
    report = study_report.Report(results, study.MATRIX, [], {})
    assert study_report.plain_cell(report, "SFT", "x") == "0.500 (0.100 to 0.900)"
    del results["SFT"][1], results["SFT"][2]
    assert study_report.plain_cell(report, "SFT", "x") == "0.500 [0.000, 1.000]"
    assert study_report.plain_cell(report, "SFT", "y") == "-"


def test_captions_promise_an_interval_where_there_is_one(made_up):
    """All tables said that they had them; those of thoughts and questions had the seeds' range."""
    results = study_report.read_study(str(made_up), study.MATRIX)
    comparisons = study_report.compare(results, study.MATRIX, 100)
    records = study.read_records(str(made_up))
    report = study_report.Report(results, study.MATRIX, comparisons, records)
    for name in ("models", "differences", "heads", "head differences"):
        caption = study_report.TABLES[name](report)[-1]
        assert "Mean [95% interval] over seeds 0, 1; 2 cores" in caption, name
    for name in ("thoughts", "questions", "cost"):
        caption = study_report.TABLES[name](report)[-1]
        assert "95%" not in caption and "Seeds 0, 1; 2 cores" in caption, name
    assert "distinct thoughts of several seeds: mean (" in study_report.models_table(report)[-1]


def test_nothing_of_two_seeds_is_bold_and_captions_of_few_say_why():
    """p of few seeds is too small: of two without a difference it is below 0.05 in 9 to 28% of all
    cases, and such differences were bold."""
    metric = study_report.METRICS[0]

    def of_seeds(count):
        by_seed = {seed: [0.1, 0.2] for seed in range(count)}
        estimate = study_report.hierarchical_bootstrap(by_seed, 4000)
        return study_report.Comparison("SFT+RL", "SFT", "", metric, estimate, 0.01)

    cells = [study_report.difference_cell(of_seeds(count)) for count in (1, 2, 3, 5)]
    assert [cell.startswith("**") for cell in cells] == [False, False, True, True]
    assert all(", p 0.0005 (0.01)" in cell for cell in cells)
    of_many = of_seeds(3)._replace(corrected_p=0.2)
    cell = study_report.difference_cell(of_many)
    assert "**" not in cell and cell.endswith(", p 0.0005 (0.2)"), "bold is what is left by Holm"
    for counts, says_so in (((5,), False), ((5, 4), True), ((2,), True)):
        comparisons = [of_seeds(count) for count in counts]
        report = study_report.Report({}, study.MATRIX, comparisons, {})
        words = study_report.correction(report)
        assert ("Of fewer than 5 seeds p is too small" in words) == says_so
        assert "bold: below 0.05 after it, of 3 seeds or more" in words


def test_a_block_that_cannot_be_filled_is_one_line_and_the_page_stays(made_up, tmp_path):
    """Without its end a block took the prose up to the next one's; a misspelt one stayed old."""
    page = tmp_path / "page.md"
    arguments = ["report", "--results", str(made_up), "--page", str(page), "--figures", ""]
    next_block = "Prose.\n<!-- study: cost -->\n<!-- end -->\n"
    wrong = {
        "<!-- study: models -->\nold\n": r"models has no <!-- end -->, or does not stand on a line",
        "<!-- study: models --> \n<!-- end -->\n": r"models has no <!-- end -->, or does not stand",
        "<!-- study: Models -->\n<!-- end -->\n": r"no table Models; write <!-- study: NAME",
        "<!-- study: head-differences -->\n<!-- end -->\n": r"no table head-differences; write",
    }
    for block, words in wrong.items():
        for text in (block + next_block, next_block + block):
            page.write_text(text)
            with pytest.raises(ValueError, match=words):
                study.main(arguments)
            assert page.read_text() == text


def test_a_page_has_its_own_figures(made_up, tmp_path, monkeypatch):
    """Those of another page were docs/study_*.png: it took the study's place."""

    class Figure:
        def savefig(self, path, dpi):
            Path(path).write_text("picture")

    monkeypatch.setattr(study_report, "figures_of", lambda report: {"heads": Figure()})
    page = tmp_path / "study_first.md"
    page.write_text("<!-- study: cost -->\n<!-- end -->\n")
    study.main(["report", "--results", str(made_up), "--page", str(page)])
    study.main(
        ["report", "--results", str(made_up), "--page", str(page), "--figures", f"{tmp_path}/of_"]
    )
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["of_heads.png", "study_first_heads.png"]


def test_the_page_shows_metrics_that_there_are():
    """A misspelt one would leave its column out and say nothing."""
    known = set()
    for path in (ROOT / "results").glob("study*/few*.json"):
        for variant in json.loads(path.read_text())["arms"].values():
            known |= set(variant["metrics"])
    shown = [
        study_report.THOUGHTS,
        study_report.WORTHS,
        study_report.QUESTIONS,
        study_report.PROBES,
    ]
    for titles in shown:
        assert set(titles) <= known
    ours = study_report.METRICS + study_report.WORTH_METRICS
    assert set(study_report.SHOWN) <= {metric.name for metric in ours}


def test_a_difference_of_one_seed_says_so_beside_those_of_two(made_up, tmp_path):
    for name in ("SFT", "SFT+RL"):
        path = made_up / f"{name}_1.json"
        results = json.loads(path.read_text())
        results["arms"][name]["paired"]["think greedy l1"] = [0.1, 0.2, 0.3, 0.4]
        path.write_text(json.dumps(results))
    page = tmp_path / "page.md"
    page.write_text("<!-- study: differences -->\n<!-- end -->\n")
    study.main(["report", "--results", str(made_up), "--page", str(page), "--figures", ""])
    row = rows_of(page.read_text())["SFT+RL - SFT"]
    assert "| 0.000 [0.000, 0.000], one seed | 2 x 3; 1 x 4 |" in row and row.count("seed") == 1


def test_a_table_without_rows_says_so():
    """It was a head and a caption over nothing."""
    report = study_report.Report({}, study.MATRIX, [], {})
    for name, lines_of in study_report.TABLES.items():
        is_declared = name == "matrix"  # what is asked is there before anything is measured
        assert (lines_of(report) == ["Not measured yet."]) == (not is_declared), name


def test_tokens_of_quick_results_say_so(tmp_path):
    write_results(tmp_path / "quick", "base", 0, [0.0, 1.0], preset="quick")
    page = tmp_path / "page.md"
    page.write_text("<!-- study: models -->\n<!-- end -->\n")
    arguments = ["report", "--results", str(tmp_path / "quick"), "--page", str(page)]
    study.main([*arguments, "--figures", ""])
    assert "**Preset quick: these numbers say nothing of the method.**" in page.read_text()
    write_results(tmp_path / "quick", "SFT", 0, [0.0, 1.0], preset="study")
    write_results(tmp_path / "quick", "base", 0, [0.0, 1.0], preset="study")
    write_results(tmp_path / "quick", "base", 1, [0.0, 1.0], preset="quick")
    study.main([*arguments, "--figures", ""])
    assert "**Preset quick, study: these numbers say nothing" in page.read_text(), "any of them"


def test_figures_hold_the_differences(made_up):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extras.txt")
    matrix = study.MATRIX
    results = study_report.read_study(str(made_up), matrix)
    comparisons = study_report.compare(results, matrix, 500)
    report = study_report.Report(results, matrix, comparisons, {})
    figures = study_report.figures_of(report)
    assert list(figures) == ["differences", "heads"]
    r_a, head = figures["differences"].axes
    assert r_a.get_title() == "greedy r_a"
    assert head.get_title() == "success of the head that reads: prompt, %"
    labels = [tick.get_text() for tick in r_a.get_yticklabels()]
    assert labels == ["SFT+RL - SFT"], "base, of which all are 0, would set the scale"
    means = [line.get_xdata()[0] for line in r_a.get_lines() if line.get_marker() == "o"]
    assert means == pytest.approx([0.1])
    assert [line.get_xdata()[0] for line in head.get_lines() if line.get_marker() == "o"] == [25]
    dots = [line.get_xdata().tolist() for line in head.get_lines() if line.get_marker() == "."]
    assert dots == [[25]], "of its one seed, in percent too"


def test_a_mean_beside_its_interval_by_rounding_is_drawn():
    """Of equal items the resamples' mean may be 1e-17 above the mean: matplotlib stopped."""
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extras.txt")
    from matplotlib.figure import Figure

    metric = study_report.METRICS[0]
    above, below = np.nextafter(0.3, 1), np.nextafter(0.3, 0)
    rows = []
    for end in (above, below):
        interval = {"mean": 0.3, "low": end, "high": end, "n": 3}
        rows.append(study_report.Row("SFT - base", interval, [0.3]))
    study_report.draw_rows(Figure().add_subplot(), rows, metric, {"SFT": "black"})


def test_what_cannot_be_reported_is_one_line(made_up, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no tables here")
    arguments = ["report", "--results", str(made_up), "--page", str(page)]
    with pytest.raises(ValueError, match=r"page.md: no place for a table; write <!-- study: NAME"):
        study.main(arguments)
    page.write_text("<!-- study: modles -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no table modles"):
        study.main(arguments)
    with pytest.raises(ValueError, match="no results of the study in it"):
        study.main(["report", "--results", str(tmp_path), "--page", str(page)])
    write_results(made_up, "SFT", 1, [0.2, 0.4])
    with pytest.raises(ValueError, match=r"greedy r_a, seed 1: SFT has 2 values and base 4"):
        study.main(arguments)
