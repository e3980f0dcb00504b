"""The whole pipeline as a user runs it, on toy sizes: every command of speedrun.sh, file by file."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import untrained

ROOT = pathlib.Path(__file__).parents[1]


def run(*argv, ok=True):
    """One command in the repository; returns what it printed. With ok=False it must fail, by one line."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    if ok:
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, tokenizer and one toy checkpoint of each stage, made by the README's commands."""
    at = tmp_path_factory.mktemp("pipeline")
    run(
        "-m",
        "benchmarks.tabletop_data",
        "--out",
        at / "data",
        "--episodes",
        24,
        "--conversations",
        60,
        "--thought-actions",
        20,
        "--seed",
        1,
    )
    run(
        "fast_tokenizer.py",
        "fit",
        "--data",
        at / "data",
        "--out",
        at / "fast",
        "--horizon",
        5,
        "--scale",
        1.5,
        "--vocab-size",
        64,
    )
    mix = f"{at}/data/conversations.jsonl:1,{at}/data/episodes:3,{at}/data/thought_actions.jsonl:1"
    run(
        "sft.py",
        "tabletop",
        "--init",
        untrained.folder("tiny-vlm"),
        "--data",
        mix,
        "--action-tokenizer",
        at / "fast",
        "--out",
        at / "sft",
        "--steps",
        3,
        "--batch",
        4,
        "--holdout-rows",
        8,
        "--eval-rows",
        8,
        "--probe-prompts",
        2,
    )
    run(
        "grpo.py",
        "tabletop",
        "--init",
        at / "sft",
        "--data",
        at / "data/episodes",
        "--out",
        at / "grpo",
        "--steps",
        1,
        "--prompts",
        2,
        "--batch",
        2,
        "--group",
        2,
        "--max-new-tokens",
        12,
        "--eval-prompts",
        2,
    )
    run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "vla.py",
        "tabletop",
        "--init",
        at / "grpo",
        "--data",
        at / "data/episodes",
        "--out",
        at / "vla",
        "--steps",
        3,
        "--batch",
        8,
        "--eval-rows",
        8,
    )
    return at


def test_stages_leave_checkpoints_that_name_their_stage(made):
    for stage in ("sft", "grpo", "vla"):
        run_json = json.loads((made / stage / "final" / "run.json").read_text())
        assert run_json["stage"] == stage and run_json["versions"]["torch"]
        assert (made / stage / "log.jsonl").read_text().startswith('{"config"')
    rows = [json.loads(line) for line in (made / "sft/log.jsonl").read_text().splitlines()]
    assert {"probe_format", "probe_r_a"} <= rows[-1].keys(), (
        "sft.py ends with thinking rollouts before RL"
    )


def test_evaluate_writes_one_file_and_its_table(made):
    results = made / "results.json"
    run(
        "evaluate.py",
        "actions",
        "--policy",
        made / "grpo",
        "--data",
        made / "data/episodes",
        "--variant",
        "toy",
        "--out",
        results,
        "--prompts",
        4,
        "--samples",
        2,
        "--max-new-tokens",
        16,
    )
    out = run(
        "evaluate.py",
        "tabletop",
        "--policy",
        made / "vla",
        "--variant",
        "toy",
        "--out",
        results,
        "--suites",
        "goal,chain",
        "--trials",
        1,
        "--chains",
        1,
        "--gif",
        made / "gif",
    )
    assert "success goal" in out
    arm = json.loads(results.read_text())["arms"]["toy"]["metrics"]
    assert arm["success goal"]["n"] == 10 and arm["think sampled r_a"]["n"] == 4
    assert all(m["low"] <= m["mean"] <= m["high"] for m in arm.values() if m["low"] is not None)
    assert list((made / "gif").glob("goal_*.gif"))
    assert "| toy |" in run("evaluate.py", "report", results)


def test_questions_are_scored_by_kind(made):
    rows = [json.loads(line) for line in (made / "data/conversations.jsonl").open()]
    run(
        "evaluate.py",
        "vqa",
        "--policy",
        made / "sft",
        "--data",
        made / "data/conversations.jsonl",
        "--rows",
        12,
        "--max-new-tokens",
        8,
        "--out",
        made / "vqa.json",
    )
    metrics = json.loads((made / "vqa.json").read_text())["arms"]["policy"]["metrics"]
    assert sum(m["n"] for m in metrics.values()) == 12
    assert f"exact {rows[0]['kind']}" in metrics


def test_wrong_stage_is_refused_in_one_line(made):
    line = run(
        "sft.py",
        "--init",
        made / "vla",
        "--data",
        made / "data/conversations.jsonl",
        "--action-tokenizer",
        "",
        "--out",
        made / "x",
        ok=False,
    )
    assert "stage 'vla'" in line and "expected" in line
    line = run("grpo.py", "--init", made / "vla", "--data", made / "data/episodes", ok=False)
    assert "stage 'vla'" in line
    line = run("vla.py", "--init", made / "vla", "--data", made / "data/episodes", ok=False)
    assert "stage 'vla'" in line
    line = run(
        "evaluate.py", "actions", "--policy", made / "vla", "--data", made / "data", ok=False
    )
    assert "stage 'vla'" in line
    line = run("evaluate.py", "tabletop", "--policy", made / "sft", ok=False)
    assert "stage 'sft'" in line
