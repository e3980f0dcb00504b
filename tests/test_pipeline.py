"""The whole pipeline as a user runs it, on toy sizes: the commands of speedrun.sh, file by file."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import untrained
from huggingface_hub import ModelCard

import evaluate
from fast_tokenizer import config_parser

ROOT = Path(__file__).parents[1]


def finished(command):
    """Runs `python COMMAND` in the repository -> the finished process."""
    return subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )


def run(command):
    """-> what the command printed; it must succeed."""
    process = finished(command)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def refusal(command):
    """-> the line with which the command ends; it must fail, and without a traceback."""
    process = finished(command)
    assert process.returncode != 0, process.stdout[-3000:]
    assert "Traceback" not in process.stderr, process.stderr[-3000:]
    return process.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data, tokenizer and one toy checkpoint of each stage, made by the README's
    commands."""
    made = tmp_path_factory.mktemp("pipeline")
    data = made / "data"
    run(
        f"-m benchmarks.tabletop_data --out {data} --episodes 24 --conversations 60 "
        "--thought-actions 20 --seed 1"
    )
    run(
        f"fast_tokenizer.py fit --data {data} --out {made}/fast --horizon 5 --scale 1.5 "
        "--vocab-size 64"
    )
    mixture = f"{data}/conversations.jsonl:1,{data}/episodes:3,{data}/thought_actions.jsonl:1"
    run(
        f"sft.py tabletop --init {untrained.folder('tiny-vlm')} --data {mixture} "
        f"--action-tokenizer {made}/fast --out {made}/sft --steps 3 --batch 4 --holdout-rows 8 "
        "--eval-rows 8 --probe-prompts 2 --max-new-tokens 12"
    )
    run(
        f"grpo.py tabletop --init {made}/sft --data {data}/episodes --out {made}/grpo --steps 1 "
        "--prompts 2 --batch 2 --group 2 --max-new-tokens 12 --eval-prompts 2"
    )
    run(
        "-m torch.distributed.run --standalone --nproc_per_node=2 vla.py tabletop "
        f"--init {made}/grpo --data {data}/episodes --out {made}/vla --steps 3 --batch 8 "
        "--eval-rows 8"
    )
    return made


def test_stages_leave_checkpoints_that_name_their_stage(made):
    for stage in ("sft", "grpo", "vla"):
        run_json = json.loads((made / stage / "final" / "run.json").read_text())
        assert run_json["stage"] == stage
        assert run_json["versions"]["torch"]
        assert (made / stage / "log.jsonl").read_text().startswith('{"config"')
    last_line = (made / "sft/log.jsonl").read_text().splitlines()[-1]
    last = json.loads(last_line)
    assert {"probe_format", "probe_r_a"} <= last.keys(), "sft.py ends with thinking rollouts"


def test_checkpoints_carry_a_model_card(made, monkeypatch):
    """Base, data, command and metrics; and how it says to load the checkpoint is how one does."""
    monkeypatch.syspath_prepend(ROOT)
    commands = {
        "sft": f"python sft.py tabletop --init {untrained.folder('tiny-vlm')} --data ",
        "grpo": f"python grpo.py tabletop --init {made}/sft --data ",
        "vla": f"torchrun --nproc_per_node 2 vla.py tabletop --init {made}/grpo --data ",
    }
    for stage, command in commands.items():
        folder = made / stage / "final"
        record = json.loads((folder / "run.json").read_text())
        card = ModelCard.load(folder / "README.md")
        assert f"| base model | {untrained.folder('tiny-vlm')} (licence: unknown" in card.text
        assert f"| trained from | {record['parent']} |" in card.text
        for path, source in record["data"].items():
            assert f"| data | {path} (sha256 {source['sha256'][:12]}) |" in card.text
        assert f"```bash\n{command}" in card.text
        assert record["metrics"]
        for name, value in record["metrics"].items():
            assert f"| {name} | {value:.4g} |" in card.text
        loading, _, _ = card.text.partition("```python\n")[2].partition("\n```")
        names = {}
        for line in loading.replace("FOLDER", str(folder)).splitlines():
            if "policy.act(" not in line:
                exec(line, names)
    assert names["policy"].spec == record["policy"], "vla comes last"


def test_evaluate_writes_one_file_and_its_table(made):
    results = made / "results.json"
    run(
        f"evaluate.py actions --policy {made}/grpo --data {made}/data/episodes --variant toy "
        f"--out {results} --prompts 4 --samples 2 --max-new-tokens 16"
    )
    printed = run(
        "-m torch.distributed.run --standalone --nproc_per_node=2 "
        f"evaluate.py tabletop --policy {made}/vla --variant toy --out {results} "
        f"--suites goal,chain --trials 1 --chains 1 --film {made}/films"
    )
    assert "success goal" in printed
    metrics = json.loads(results.read_text())["arms"]["toy"]["metrics"]
    assert metrics["success goal"]["n"] == 10
    assert metrics["think sampled r_a"]["n"] == 4
    for metric in metrics.values():
        if metric["low"] is not None:
            assert metric["low"] <= metric["mean"] <= metric["high"]
    assert list((made / "films").glob("goal_*.gif"))
    assert "| toy |" in run(f"evaluate.py report {results}")


def test_a_model_drives_by_its_own_tokens(made):
    """From a checkpoint of sft or grpo. Here hardly anything decodes: it holds still, and that is
    counted."""
    results = made / "drive.json"
    flags = f"--out {results} --suites goal,chain --trials 1 --chains 1 --execute 5 --tries 2"
    printed = run(f"evaluate.py tabletop --policy {made}/sft --variant think {flags}")
    assert "seconds a chunk" in printed
    run(
        "-m torch.distributed.run --standalone --nproc_per_node=2 "
        f"evaluate.py tabletop --policy {made}/grpo --variant direct --mode direct {flags}"
    )
    for mode, variant in json.loads(results.read_text())["arms"].items():
        metrics = {
            name.removeprefix(f"{mode} "): value for name, value in variant["metrics"].items()
        }
        assert metrics["success"]["n"] == 10
        assert metrics["retried"]["n"] == metrics["held still"]["n"] > 10
        assert metrics["retried"]["mean"] >= metrics["held still"]["mean"] > 0
        seconds = variant["seconds"][f"tabletop {mode}"]
        assert seconds["forward"] >= seconds["chunk"]


def test_questions_are_scored_by_kind(made):
    data = made / "data/conversations.jsonl"
    run(
        f"evaluate.py vqa --policy {made}/sft --data {data} --rows 12 --max-new-tokens 8 "
        f"--out {made}/vqa.json"
    )
    metrics = json.loads((made / "vqa.json").read_text())["arms"]["policy"]["metrics"]
    assert sum(metric["n"] for name, metric in metrics.items() if name != "truncated") == 12
    first_row = json.loads(data.read_text().splitlines()[0])
    assert f"exact {first_row['kind']}" in metrics


def test_wrong_stage_is_refused_in_one_line(made):
    data = made / "data"
    line = refusal(
        f"sft.py --init {made}/vla --data {data}/conversations.jsonl --action-tokenizer '' "
        f"--out {made}/x"
    )
    assert "stage 'vla'" in line
    assert "expected" in line
    for command in (
        f"grpo.py --init {made}/vla --data {data}/episodes",
        f"vla.py --init {made}/vla --data {data}/episodes",
        f"evaluate.py actions --policy {made}/vla --data {data}",
    ):
        assert "stage 'vla'" in refusal(command)
    line = refusal(f"evaluate.py tabletop --policy {made}/vla --mode think --out {made}/x.json")
    assert "--mode think: the head" in line
    untrained_model = untrained.folder("tiny-vlm")
    line = refusal(f"evaluate.py tabletop --policy {untrained_model} --out {made}/x.json")
    assert "no policy; train one from it" in line


# ---- speedrun.sh itself, its commands noted instead of run

STAND_IN = r"""#!/bin/sh
case "$*" in
  *torch.cuda*) echo 0; exit ;;
  -c*) exec {python} "$@" ;;
  ${{FAILS:-none}}) exit 1 ;;
  *tabletop_data*) mkdir -p "$4" ;;
esac
words=$(printf '%s\037' {name} "$@"); echo "$words" >> {commands}
"""


def start_speedrun(folder, **environment):
    """speedrun.sh in this folder and environment: the ended process, and the commands that it gave
    (with those of earlier calls), each as a list of words."""
    shutil.copy(ROOT / "speedrun.sh", folder)
    (folder / "tools").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tools/venv.sh", folder / "tools")
    commands = folder / "commands"
    for name in ("python", "torchrun"):
        stand_in = folder / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(STAND_IN.format(python=sys.executable, name=name, commands=commands))
        stand_in.chmod(0o755)
    path = f"{folder}/bin:{os.environ['PATH']}"
    kept = {name: os.environ[name] for name in ("HOME", "PYTHONPATH") if name in os.environ}
    process = subprocess.run(
        ["bash", "speedrun.sh"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**kept, "PATH": path, "SKIP_INSTALL": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        check=False,
    )
    lines = commands.read_text().split("\n")[:-1] if commands.exists() else []
    return process, [line.split("\037")[:-1] for line in lines]


def commands_of_speedrun(folder, **environment):
    process, commands = start_speedrun(folder, **environment)
    assert process.returncode == 0, process.stdout + process.stderr
    return commands


SIZES = ("speedrun", "quick", "full")


def check_command(command):
    """The flags of a command are flags of what it runs: SystemExit where one is not."""
    scripts = [i for i, word in enumerate(command) if word.endswith(".py")]
    if not scripts or command[scripts[0]] == "fast_tokenizer.py":
        return None  # python -m benchmarks.tabletop_data, and fit
    script, *words = command[scripts[0] :]
    if script == "evaluate.py":
        evaluate.make_parser(words[0]).parse_args(words)
    else:
        config_parser(ROOT / script).parse_args(words)
    return script


@pytest.mark.parametrize("name", ["speedrun", "quick", "full"])
def test_speedrun_gives_commands_that_there_are(name, tmp_path):
    size = {} if name == "speedrun" else {name.upper(): "1"}
    commands = commands_of_speedrun(tmp_path, **size)
    checked = [check_command(command) for command in commands]
    assert checked.count("vla.py") == 3
    # tokens, 3 x actions, 3 x tabletop by heads and 2 x by own tokens, report
    assert checked.count("evaluate.py") == 10
    assert f"data/{name}.unfinished/train" in commands[0]
    mixture = next(
        word for command in commands for word in command if "conversations.jsonl:" in word
    )
    weights = [float(source.rpartition(":")[2]) for source in mixture.split(",")]
    assert weights == [0.5, 3, 0.3]
    for command in commands:
        assert "--condition" not in command, "the heads read the prompt, as the paper's"
    assert (tmp_path / "runs" / name / "ended/write_table").exists()
    assert (tmp_path / "data" / name).exists()
    report = commands[-1]
    note = report[report.index("--note") + 1]
    assert note.startswith("A quick look: every stage ran, none to its end") == (name == "quick")

    # Another size would overwrite the speedrun's table, checkpoints and data.
    words = " ".join(" ".join(command) for command in commands)
    places = [f"{folder}/{size}" for folder in ("data", "runs", "results") for size in SIZES]
    assert {place for place in places if place in words} == {
        place for place in places if place.endswith(f"/{name}") and place != "results/quick"
    }


STOPS = {  # what fails: how many commands before it
    "*tabletop_data*test*": 1,
    "*grpo.py*": 5,
    "*tabletop*vla/SFT --variant*": 12,
}


@pytest.mark.parametrize("stop", STOPS)
def test_speedrun_goes_on_where_it_was_stopped(stop, tmp_path):
    """FULL=1 takes hours, and machines are taken away. What has ended is not done again; a stage of
    training goes on by --resume; minutes count from the first start."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    all_of_them = commands_of_speedrun(whole, FULL="1")

    process, first = start_speedrun(stopped, FULL="1", FAILS=stop)
    assert process.returncode == 1 and len(first) >= STOPS[stop]
    process, _ = start_speedrun(stopped, FULL="1")
    assert process.returncode == 1
    assert process.stderr == (
        "error: runs/full or data/full is from an earlier run; RESUME=1 goes on with it; or delete "
        "both, or set others\n"
    )
    (stopped / "runs/full/seconds").write_text("3600\n")
    rest = commands_of_speedrun(stopped, FULL="1", RESUME="1")[len(first) :]
    for command in rest:
        if check_command(command) in ("sft.py", "grpo.py", "vla.py"):
            assert command.pop() == "--resume"
    assert len(first) + len(rest) < 1.5 * len(all_of_them)
    minutes = rest[-1].index("--minutes") + 1
    assert rest[-1][minutes] == "60.0" and all_of_them[-1][minutes] == "0.0"
    rest[-1][minutes] = "0.0"
    assert {tuple(command) for command in first + rest} == {tuple(c) for c in all_of_them}

    again = commands_of_speedrun(stopped, FULL="1", RESUME="1")
    assert len(again) == len(first) + len(rest)  # all has ended


def test_there_must_be_a_speedrun_to_go_on_with(tmp_path):
    process, commands = start_speedrun(tmp_path, RESUME="1")
    assert process.returncode == 1 and not commands
    assert process.stderr == (
        "error: RESUME=1, and runs/speedrun holds no run to go on with; run without it\n"
    )


@pytest.mark.parametrize(
    "size", [{"QUICK": "yes"}, {"FULL": "yes"}, {"QUICK": "1", "FULL": "1"}], ids=str
)
def test_another_size_is_refused(size, tmp_path):
    """QUICK=yes would be the whole speedrun, which nobody waits for who asks so."""
    quick, full = size.get("QUICK", "0"), size.get("FULL", "0")
    with pytest.raises(AssertionError, match=f"error: QUICK={quick}, FULL={full}; give one of"):
        commands_of_speedrun(tmp_path, **size)


def test_the_test_data_are_not_trained_on(tmp_path):
    """SEED=1000 made the training data by the seed of the test data: the same scenes."""
    process, commands = start_speedrun(tmp_path, SEED="1000")
    assert process.returncode == 1 and not commands
    assert process.stderr.startswith("error: SEED=1000 is that of the test data, which would be tr")
    data = commands_of_speedrun(tmp_path, SEED="7")[:2]
    assert [command[command.index("--seed") + 1] for command in data] == ["7", "1000"]


def test_0_is_no(tmp_path):
    """As in QUICK=0 and FULL=0. RESUME=0 was told that there is no run to go on with,
    SKIP_INSTALL=0 took the Python that is active."""
    assert not any("--resume" in command for command in commands_of_speedrun(tmp_path, RESUME="0"))
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "commands").unlink()
    (tmp_path / "new").symlink_to(tmp_path)  # its bin/ is an environment's
    (tmp_path / "bin/activate").touch()
    first = commands_of_speedrun(tmp_path, SKIP_INSTALL="0", VENV="new")[0]
    assert first[:4] == ["python", "-m", "pip", "install"]
