"""tools/speed.py at toy sizes: both sides of each pair ran and did the same work. No test
looks at the times: a shared machine cannot tell."""

import importlib.util
import json

import pytest
import torch
from ranks import on_ranks

from tools import speed

TOY = ["--prompts", "2", "--group", "2", "--new", "4", "--repeats", "1"]


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
            if "skipped" not in pair:
                for side in ("ours", "peer", "ratio"):
                    q = pair[side]
                    assert 0 < q["q25"] <= q["median"] <= q["q75"] and q["n"] == 1
                assert pair["ratio"]["median"] == pytest.approx(
                    pair["peer"]["median"] / pair["ours"]["median"]
                )
        return record["pairs"]

    yield run
    torch.set_num_threads(threads)


def test_rollout(measure):
    pair = measure("rollout", *TOY)["rollout"]
    assert pair["work"]["tokens"] == {"ours": 16, "peer": 16}  # prompts x group x new: none stops
    assert pair["greedy_agreement"] > 0.9  # 1 but for near ties


def test_decode_bound_by_hand():
    """What rollout adds on a GPU; here with the bandwidth of a CPU, for its counts."""
    args = speed.argparse.Namespace(
        device="cpu", ranks=0, repeats=1, size="tiny", group=3, new=5, peak_tflops=1.0
    )
    backbone = speed.make_backbone(args)
    rows = speed.prompts(backbone, speed.questions(2, 28))
    got = speed.decode_bound(backbone, rows, 10, 1e3, args)
    block = (
        256 * 256 * 2 + 2 * 256 * 128 + 2 * 32 + 3 * 256 * 768 + 2 * 256
    )  # q, o; k, v; norms; mlp
    weights = 4 * block + 4096 * 256
    cache = 2 * (10 + 3 * 5 / 2) * 4 * 2 * 128  # prompts x (T + samples) x layers x (k, v) x width
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
    loss = measure("sft", "--batch", "3", "--repeats", "1")["step"]["work"]["loss"]
    assert loss["ours"] == pytest.approx(loss["peer"], rel=1e-4) and 0 < loss["ours"] < 20


def test_head(measure):
    keep = [] if torch.cuda.is_available() else ["--keep-memory"]
    loss = measure("head", "--batch", "4", "--repeats", "1", *keep)["step"]["work"]["loss"]
    assert loss["ours"] == pytest.approx(loss["peer"], rel=0.02) and loss["ours"] > 0


def test_fast(measure):
    pairs = measure("fast", "--chunks", "64", "--repeats", "1")
    assert (
        pairs["encode"]["work"]["identical"]
        == pairs["decode"]["work"]["identical"]
        == {"ours": 1, "peer": 1}
    )
    assert pairs["encode"]["work"]["tokens"]["ours"] > 64
    assert pairs["decode"]["work"]["decoded"]["ours"] == 64


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
    args = speed.argparse.Namespace(device="cpu", repeats=1, ranks=0)
    with pytest.raises(ValueError, match="turn 0: tokens is 8 in ours, 7 in the peer"):
        speed.compare(lambda k: 8, lambda k: 7, lambda a, b: {"tokens": (a, b, 0)}, args)
