"""tools/memory.py: what it foretells against the bytes of the tensors of real (tiny) runs."""

import dataclasses

import numpy as np
import pytest
import torch

import grpo
import model
import sft
from tools import backbones, memory
from fast_tokenizer import FastTokenizer
import untrained

SIZES = ["tiny-qwen3-vl", "tiny-qwen2.5-vl"]


@pytest.fixture(params=SIZES)
def backbone(request, monkeypatch):
    """Deeper and wider than the sizes of other tests: what is not a block must not weigh most."""
    size = dataclasses.replace(
        backbones.SIZES[request.param], layers=6, depth=6, hidden=128, vision=128, heads=4, kv=2
    )
    monkeypatch.setitem(backbones.SIZES, "deep", size)
    backbone = backbones.random_backbone("deep")
    backbone.action_tokenizer = FastTokenizer.fit(
        np.random.default_rng(0).normal(size=(99, 4, 3)), 48, 2
    )
    sft.grow_vocabulary(backbone, 48)
    return backbone


def rows_of(backbone, n, prompt_only):
    pixels = np.random.default_rng(1).integers(0, 255, (n, 64, 64, 3), np.uint8)
    talk = [{"role": "user", "content": "<image>" + "go left " * 12}]
    if not prompt_only:
        talk.append({"role": "assistant", "content": "the red block " * 9})
    return [model.encode(backbone, talk, [x], prompt_only) for x in pixels]


def meta(backbone):
    """The same net without weights: estimates must not need them."""
    net = backbones.random_backbone("deep", device="meta")
    net.net.resize_token_embeddings(
        len(backbone.net.get_input_embeddings().weight), mean_resizing=False
    )
    return net.net


@pytest.mark.parametrize(("recompute", "muon"), [(False, False), (False, True), (True, False)])
def test_sft(backbone, recompute, muon):
    rows, cfg = rows_of(backbone, 3, False), sft.Config(batch=3, recompute=recompute, muon=muon)
    T, P = len(rows[0]["ids"]), len(rows[0]["patches"])
    parts, peaks = memory.estimate("sft", cfg, meta(backbone), 1, T, P, torch.float32)
    if recompute:
        model.recompute_activations(backbone.net.train())
    optim = model.make_optimizer(backbone.net, 1e-3, 0.0, (0.9, 0.95), muon)
    keeps = memory.kept(backbone.net, lambda: model.hidden_states(backbone.net, sft.pack(rows)))
    if not recompute:  # else a block is computed again when autograd has let go of much
        assert parts["activations"] == pytest.approx(keeps, rel=0.15)
    else:
        assert (
            keeps
            < parts["activations"]
            < 0.6 * memory.activations(meta(backbone), sft.Config(), 3 * T, 3 * P, torch.float32)
        )
    sft.token_loss(backbone.net, sft.pack(rows))[0].backward()
    optim.step()
    params = list(backbone.net.parameters())
    if muon:  # it lets go of the gradients that it has used
        sft.token_loss(backbone.net, sft.pack(rows))[0].backward()
    assert parts["weights"] == sum(p.nbytes for p in params)
    assert parts["gradients"] == pytest.approx(sum(p.grad.nbytes for p in params), rel=0.001)
    state = sum(x.nbytes for s in optim.state.values() for x in s.values())
    assert parts["optimizer"] == pytest.approx(state, rel=0.001)
    assert peaks["update"] == pytest.approx(sum(parts.values()))
    four, _ = memory.estimate("sft", cfg, meta(backbone), 4, T, P, torch.float32)
    assert four["weights"] == parts["weights"] / 4 and four["gathered units"] > 0


def test_grpo(backbone, monkeypatch):
    rows, G, new = rows_of(backbone, 2, True), 3, 40
    cfg = grpo.Config(prompts=2, batch=2, micro_batch=2, group=G, max_new_tokens=new)
    T, P = len(rows[0]["ids"]), len(rows[0]["patches"])
    parts, peaks = memory.estimate("grpo", cfg, meta(backbone), 1, T, P, torch.float32)
    made = []

    class Watched(model.SampleKV):
        def update(self, *args, **kwargs):
            first, out = self.prompt is None, super().update(*args, **kwargs)
            made.extend([x.nbytes for x in (*self.prompt, self.keys, self.values)] if first else [])
            return out

    monkeypatch.setattr(model, "SampleKV", Watched)
    out = model.generate(backbone, rows, G, new, stop=[])
    assert parts["KV cache"] == sum(made)
    keeps = memory.kept(
        backbone.net, lambda: grpo.completion_logp(backbone, rows, out["ids"], out["mask"])
    )
    V = len(backbone.net.get_input_embeddings().weight)
    softmax = 2 * G * new * V * 4  # of the logits' peak, autograd keeps this
    assert parts["activations"] == pytest.approx(keeps - softmax, rel=0.15)
    assert parts["reference"] == parts["weights"] and peaks["update"] > peaks["rollout"]
    assert parts["logits"] == 2 * G * new * V * memory.LOGITS
    monkeypatch.setattr(model, "LOGITS_AT_ONCE", 20 * V)  # the same update, 20 tokens at a time
    sliced = memory.estimate("grpo", cfg, meta(backbone), 1, T, P, torch.float32)[0]
    assert sliced["logits"] == 20 * V * memory.LOGITS
    less = memory.kept(
        backbone.net, lambda: grpo.completion_logp(backbone, rows, out["ids"], out["mask"])
    )
    assert less == pytest.approx(keeps - softmax, rel=0.02), "no slice keeps its logits"
    away = dataclasses.replace(cfg, cpu_offload=True)
    assert (
        memory.estimate("grpo", away, meta(backbone), 1, T, P, torch.float32)[0]["reference"] == 0
    )


@pytest.mark.parametrize(
    ("argv", "size"),
    [
        (["sft", "paper", "--size", "qwen2.5-vl-7b", "--ranks", "8"], 8.29),
        (["grpo", "paper", "--size", "qwen3-vl-8b", "--ranks", "16", "--shards", "8"], 8.77),
        (["vla", "paper", "--size", "qwen2.5-vl-3b"], 3.75),
    ],
)
def test_real_sizes_are_told_without_memory(argv, size, capsys):
    argv = [*argv, "--compute", "bf16"]
    assert memory.main([*argv, "--gb", "1000"]) == 0
    assert memory.main([*argv, "--gb", "5"]) == 1
    out = capsys.readouterr().out
    assert f"{size} B parameters" in out and "does not fit in 5 GB" in out
    weights = float(out.split("weights")[1].split()[0])
    if argv[0] != "vla":
        assert weights == pytest.approx(size * 4 / 8, abs=0.06)  # fp32, over the shards


@pytest.mark.parametrize("stage", ["sft", "grpo", "vla"])
def test_this_machine_is_the_default_and_nothing_is_run(stage, capsys, tmp_path, monkeypatch):
    argv = [
        stage,
        "paper",
        "--init",
        untrained.folder("tiny-qwen3-vl"),
        "--out",
        str(tmp_path / "o"),
    ]
    monkeypatch.setattr(memory, "this_machine", lambda: (2, 1000.0, True))
    assert memory.main(argv) == 0
    told = capsys.readouterr().out
    assert "GB on each of 2 ranks" in told and "bfloat16 compute" in told and "in 1000 GB" in told
    monkeypatch.setattr(memory, "this_machine", lambda: (1, 1000.0, False))
    assert memory.main([*argv, "--ranks", "4"]) == 0
    told = capsys.readouterr().out
    assert "GB on each of 4 ranks" in told and "float32 compute" in told and "in 250 GB" in told
    assert not (tmp_path / "o").exists()
