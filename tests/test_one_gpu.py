"""One GPU, as a CPU can play it: FSDP of one rank, fp32 masters, bf16 compute, in all three stages.

On one GPU every stage takes this way, while one process on a CPU takes none of it: a head without
future tokens once trained on any CPU and ended the first step on any GPU."""

import numpy as np
import pytest
import torch
from ranks import on_ranks
from test_grpo import flags, write_world
from test_sft import args, conversations, log
from test_vla import argv, data, records  # noqa: F401, a fixture
from torch import distributed

import grpo
import model
import sft
import vla


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("grpo"))


@pytest.fixture
def one_gpu(monkeypatch):
    """-> run(main, argv): a stage as on one GPU, in a process of its own. Units are as small as
    the tiny nets have them, so that there are several."""

    def run(main, argv):
        def alone(argv):
            store = distributed.HashStore()
            distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            main(argv)
            distributed.destroy_process_group()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "uses_fsdp", lambda dist: True)
            patch.setattr(model, "compute_dtype", lambda device: torch.bfloat16)
            patch.setattr(model, "SMALL", 1000)
            on_ranks(alone, argv, 1)

    return run


@pytest.mark.parametrize("more", [(), ("--no-muon", "--lora", 4)], ids=["whole", "adapters"])
def test_sft(tmp_path, one_gpu, more):
    talk = conversations(tmp_path)[0]
    sft.main(args(tmp_path / "cpu", talk, *more))
    if "--lora" in more:
        more = [*more, "--bf16-base"]
    one_gpu(sft.main, args(tmp_path / "gpu", talk, *more))
    assert_alike(log(tmp_path / "cpu"), log(tmp_path / "gpu"), "loss")


@pytest.mark.parametrize("more", [(), ("--lora", "4", "--bf16-base")], ids=["whole", "adapters"])
def test_grpo(world, one_gpu, monkeypatch, more):
    """What is sampled differs by rounding; the update must see it as the sampler did. Untrained,
    nothing is ever right: what is paid here is a lottery among completions."""

    def lottery(backbone, ids, targets, kind, think):
        r = np.array([sum(i) % 5 / 4 for i in ids])
        return r, dict.fromkeys(("r_f", "r_a", "tags", "markers", "decodes"), r)

    monkeypatch.setattr(grpo, "reward", lottery)
    out = f"gpu {len(more)}"
    one_gpu(grpo.main, flags(world, out, "--steps", "2", *more))
    training = [record for record in log(world / out) if "kl" in record]
    assert len(training) == 2
    for record in training:
        assert all(np.isfinite(value) for value in record.values() if isinstance(value, float))
        assert abs(record["sampler_gap"]) < 0.05 and record["grad_norm"] > 0
    model.load(world / out / "final", stages=("grpo",))


@pytest.mark.parametrize(
    "more",
    [{}, {"cache": "none"}, {"cache": "none", "backbone-lr": 1e-4}],
    ids=["features kept", "in the loop", "unfrozen"],
)
def test_vla(data, tmp_path, one_gpu, more):  # noqa: F811
    """Of a head without future tokens, as the speedrun's."""
    more = {"future-tokens": 0, **more}
    vla.main(argv(data, tmp_path / "cpu", **more))
    one_gpu(vla.main, argv(data, tmp_path / "gpu", **more))
    assert_alike(records(tmp_path / "cpu")[1:], records(tmp_path / "gpu")[1:], "loss")


def assert_alike(ours: list[dict], theirs: list[dict], metric: str):
    """The same steps, whose metric differs by the rounding of bf16."""
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        if metric in a:
            assert b[metric] == pytest.approx(a[metric], rel=0.05)
