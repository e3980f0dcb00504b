"""tools/speed.py at toy sizes: both sides of each pair ran and did the same work. No test
looks at the times: a shared machine cannot tell."""

import argparse
import importlib.util
import json

import pytest
import torch
from ranks import on_ranks

from tools import speed

TOY = ["--prompts", "2", "--group", "2", "--new-tokens", "4", "--repeats", "1"]


@pytest.fixture
def measure(capsys):
    """Runs a command -> its pairs, as printed."""
    threads = torch.get_num_threads()

    def run(*argv):
        returned = speed.main([*argv, "--json"])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1, "with --json stdout holds one line, whatever the peer prints"
        record = json.loads(lines[0])
        assert record == json.loads(json.dumps(returned))
        assert record["command"].startswith(f"python -m tools.speed {argv[0]}")
        assert record["hardware"] and record["versions"]["torch"]
        for pair in record["pairs"].values():
            if "skipped" in pair:
                continue
            for side in ("ours", "peer", "ratio"):
                figure = pair[side]
                assert 0 < figure["q25"] <= figure["median"] <= figure["q75"] and figure["n"] == 1
            ratio = pair["peer"]["median"] / pair["ours"]["median"]
            assert pair["ratio"]["median"] == pytest.approx(ratio)
        return record["pairs"]

    yield run
    torch.set_num_threads(threads)


def test_rollout(measure):
    pair = measure("rollout", *TOY)["rollout"]
    assert pair["work"]["tokens"] == {"ours": 16, "peer": 16}  # prompts x group x new: none stops
    assert pair["greedy_agreement"] > 0.9  # 1 but for near ties


def test_decode_bound_by_hand():
    """What rollout adds on a GPU; here with the bandwidth of a CPU, for its counts."""
    args = argparse.Namespace(
        device="cpu",
        ranks=0,
        on_the_wall=False,
        repeats=1,
        size="tiny",
        group=3,
        new_tokens=5,
        peak_tflops=1.0,
    )
    backbone = speed.make_backbone(args)
    rows = speed.prompt_rows(backbone, speed.questions(2, 28))
    got = speed.decode_bound(backbone, rows, prompt_length=10, seconds=1e3, args=args)
    query_output = 2 * 256 * 256
    key_value = 2 * 256 * 128
    norms = 2 * 32 + 2 * 256  # of queries and keys, and of the block
    mlp = 3 * 256 * 768
    weights = 4 * (query_output + key_value + norms + mlp) + 4096 * 256
    cached_tokens = 2 * (10 + 3 * 5 / 2)  # prompts x (T + samples, half written on average)
    cache = cached_tokens * 4 * 2 * 128  # layers x (k, v) x width
    assert got["read_gb_step"] == pytest.approx(4e-9 * (weights + cache))
    assert got["arithmetic_step_s"] == pytest.approx(2 * 6 * weights / 1e12)
    assert got["share_of_bound"] == pytest.approx(got["bound_step_s"] / got["step_s"])
    assert got["step_s"] == pytest.approx(1e3 / 4, rel=0.01)


def test_grpo(measure):
    pairs = measure("grpo", *TOY)
    work = pairs["update"]["work"]
    assert work["forwarded"] == {"ours": 16, "peer": 16}  # no group tied, as ties cost us nothing
    assert work["grad_norm"]["ours"] == pytest.approx(work["grad_norm"]["peer"], rel=1e-4)
    assert work["grad_norm"]["ours"] > 0
    if importlib.util.find_spec("trl") is None:
        assert pairs["step"] == {"skipped": "pip install trl==1.16.0"}
    else:
        assert pairs["step"]["work"]["tokens"] == {"ours": 16, "peer": 16}


def test_sft(measure):
    pairs = measure("sft", "--batch", "3", "--repeats", "1")
    loss = pairs["step"]["work"]["loss"]
    assert loss["ours"] == pytest.approx(loss["peer"], rel=1e-4) and 0 < loss["ours"] < 20


def test_head(measure):
    keep_memory = [] if torch.cuda.is_available() else ["--keep-memory"]
    pairs = measure("head", "--batch", "4", "--repeats", "1", *keep_memory)
    loss = pairs["step"]["work"]["loss"]
    assert loss["ours"] == pytest.approx(loss["peer"], rel=0.02) and loss["ours"] > 0


def test_fast(measure):
    pairs = measure("fast", "--chunks", "64", "--repeats", "1")
    for pair in pairs.values():
        assert pair["work"]["identical"] == {"ours": 1, "peer": 1}
    assert pairs["encode"]["work"]["tokens"]["ours"] > 64
    assert pairs["decode"]["work"]["decoded"]["ours"] == 64


def test_input(measure):
    pairs = measure("input", "--image", "56", "--repeats", "1")
    assert list(pairs) == ["2 threads", "4 threads", "jpeg 95", "png"]
    assert pairs["2 threads"]["unit"] == "s" and pairs["png"]["unit"] == "CPU s"
    assert pairs["png"]["work"]["bytes"]["ours"] == speed.READS * 64 * 56 * 56 * 3
    assert 0 < pairs["jpeg 95"]["bytes_a_frame"] < pairs["png"]["bytes_a_frame"]


def test_cost_on_two_ranks_is_one_record(capfd):
    on_ranks(speed.main, ["cost", *TOY, "--image", "28"], 2)
    (line,) = capfd.readouterr().out.splitlines()
    record = json.loads(line)
    settings = record["settings"]
    assert record["command"].startswith("torchrun --nproc_per_node 2 -m tools.speed cost")
    assert settings["ranks"] == 2 and len(settings["cost"]) == 7
    assert all(row["rollout"] > 0 and row["update"] > 0 for row in settings["cost"])
    on_ranks(speed.main, ["cost", "--prompts", "3"], 2, code=2)
    assert "--prompts a multiple of the ranks" in capfd.readouterr().err


def test_different_work_gives_no_figure():
    def tokens(ours, peer):
        return {"tokens": speed.Work(ours, peer)}

    args = argparse.Namespace(device="cpu", repeats=1, on_the_wall=False)
    with pytest.raises(ValueError, match="turn 0: tokens is 8 in ours, 7 in the peer"):
        speed.compare(lambda turn: 8, lambda turn: 7, tokens, args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(capsys):
    """It was an AssertionError of torch."""
    for flags, words in (
        (["--device", "cuda"], "--device cuda: this machine has no GPU that torch knows"),
        (["--group", "1"], "--group and --new-tokens must be at least 2"),
    ):
        with pytest.raises(SystemExit):
            speed.main(["sft", *flags])
        assert words in capsys.readouterr().err
