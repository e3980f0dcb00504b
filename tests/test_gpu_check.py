"""tools/gpu_check.py: every step at toy size on a CPU, so that the first GPU meets no bug in it."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import distributed

import model
from tools import gpu_check

ROOT = Path(__file__).parents[1]


def test_all_checks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    out = tmp_path / "made" / "check.json"
    assert gpu_check.main(["--cpu", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    checks = record["checks"]
    assert list(checks) == list(gpu_check.CHECKS) and record["versions"]["torch"]
    assert list(checks["stages"]["stage_seconds"]) == list(gpu_check.STAGES)
    for size in ("tiny-qwen2.5-vl", "tiny-qwen3-vl"):
        gap = checks["gap"][size]
        assert 0 < gap["sampler"]["mean"] < 0.05 and gap["sampler"]["outside"] == 0
        assert gap["floor"]["mean"] < 0.05
    assert checks["graphs"]["same_tokens"] == 1 and not checks["graphs"]["recording_failed"]
    assert checks["decode"]["pairs"]["rollout"]["ours"]["median"] > 0
    assert checks["sft"]["pairs"]["step"]["ours"]["median"] > 0
    assert checks["memory"]["sft"]["estimate_gb"]["update"] > 0
    assert checks["memory"]["grpo"]["estimate_gb"]["rollout"] > 0
    for run in ("grpo", "grpo_lora"):
        assert checks["memory"][run]["peak_gb"] == {"rollout": None, "update": None}


def test_a_check_that_fails_is_recorded_and_the_rest_runs(tmp_path, monkeypatch, capsys):
    def fails(setting):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def meets_another_torch(setting):  # ended the call, and the one GPU was given back
        raise TypeError("bmm() got an unexpected keyword argument 'out_dtype'")

    monkeypatch.setitem(gpu_check.CHECKS, "gap", fails)
    monkeypatch.setitem(gpu_check.CHECKS, "decode", meets_another_torch)
    monkeypatch.setitem(gpu_check.CHECKS, "graphs", lambda setting: {"same_tokens": 1.0})
    out = tmp_path / "check.json"
    assert gpu_check.main(["--cpu", "--out", str(out), "--only", "gap", "decode", "graphs"]) == 1
    checks = json.loads(out.read_text())["checks"]
    assert checks["gap"]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert checks["decode"]["error"].startswith("TypeError: bmm()")
    assert any("meets_another_torch" in line for line in checks["decode"]["traceback"])
    assert checks["graphs"]["same_tokens"] == 1


def test_a_stage_that_fails_says_its_last_words(monkeypatch):
    monkeypatch.setattr(gpu_check, "STAGES", {"sft": "sft.py speedrun --data {0}/none.jsonl"})
    with pytest.raises(RuntimeError, match=r"^sft: exit status 1\n(.*\n)*error: .*none.jsonl"):
        gpu_check.check_stages(gpu_check.TOY)


def test_a_folder_is_no_file_to_write(tmp_path, capsys):
    """That was a traceback after the first check's minutes, whose numbers were lost."""
    with pytest.raises(SystemExit):
        gpu_check.main(["--cpu", "--only", "gap", "--out", str(tmp_path)])
    assert "a folder; name a file in it" in capsys.readouterr().err


def test_no_process_group_is_left_by_a_check_that_fails(monkeypatch):
    """Its threads may abort the process as it ends, with the exit status of a crash."""

    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_check, "sft_memory", fails)
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    with pytest.raises(torch.OutOfMemoryError):
        gpu_check.check_memory(gpu_check.TOY)
    assert not distributed.is_initialized()


def test_the_gap_sees_a_sampler_that_is_off(monkeypatch):
    backbone = gpu_check.random_backbone("tiny-qwen3-vl", gpu_check.TOY)
    rows = gpu_check.speed.prompt_rows(backbone, gpu_check.speed.questions(2, 64))
    generate = model.generate

    def shifted(*args, **kw):
        samples = generate(*args, **kw)
        return {**samples, "logp": samples["logp"] - 1}

    monkeypatch.setattr(model, "generate", shifted)
    gaps = gpu_check.sampler_gap(backbone, rows, 2, 5)
    assert gaps["sampler"].mean == pytest.approx(1, abs=1e-4) and gaps["sampler"].outside == 1
    assert gaps["floor"].mean < 1e-4 and gaps["floor"].outside == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs for minutes on a GPU")
def test_without_a_gpu_it_says_so():
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.startswith("no GPU here") and not done.stderr
