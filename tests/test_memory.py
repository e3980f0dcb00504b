"""tools/memory.py: what it foretells against the bytes of the tensors of real (tiny) runs."""

import dataclasses

import numpy as np
import pytest
import torch
import untrained

import grpo
import model
import sft
import vla
from fast_tokenizer import FastTokenizer
from tools import backbones, memory

SIZES = ["tiny-qwen3-vl", "tiny-qwen2.5-vl"]


@pytest.fixture(params=SIZES)
def backbone(request, monkeypatch):
    """Deeper and wider than the sizes of other tests: what is not a block must not weigh most."""
    size = dataclasses.replace(
        backbones.SIZES[request.param],
        layers=6,
        vision_layers=6,
        hidden=128,
        vision_hidden=128,
        heads=4,
        kv_heads=2,
    )
    monkeypatch.setitem(backbones.SIZES, "deep", size)
    backbone = backbones.random_backbone("deep")
    chunks = np.random.default_rng(0).normal(size=(99, 4, 3))
    backbone.action_tokenizer = FastTokenizer.fit(chunks, 48, 2)
    sft.grow_vocabulary(backbone, 48)
    return backbone


def rows_of(backbone, n, prompt_only):
    pixels = np.random.default_rng(1).integers(0, 255, (n, 64, 64, 3), np.uint8)
    messages = [{"role": "user", "content": "<image>" + "go left " * 12}]
    if not prompt_only:
        messages.append({"role": "assistant", "content": "the red block " * 9})
    return [model.encode(backbone, messages, [image], prompt_only) for image in pixels]


def load_of(rows, ranks=1):
    return memory.Load(ranks, len(rows[0]["ids"]), int(rows[0]["grid"].prod()), torch.float32)


def total_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def meta(backbone):
    """The same net without weights: estimates must not need them."""
    net = backbones.random_backbone("deep", device="meta").net
    rows = len(backbone.net.get_input_embeddings().weight)
    net.resize_token_embeddings(rows, mean_resizing=False)
    return net


@pytest.mark.parametrize(("recompute", "muon"), [(False, False), (False, True), (True, False)])
def test_sft(backbone, recompute, muon):
    rows = rows_of(backbone, 3, prompt_only=False)
    cfg = sft.Config(batch=3, recompute=recompute, muon=muon)
    told = memory.estimate("sft", cfg, meta(backbone), load_of(rows))

    # activations
    if recompute:
        model.recompute_activations(backbone.net.train())
    keeps = memory.kept(backbone.net, lambda: model.hidden_states(backbone.net, sft.pack(rows)))
    if recompute:  # a block is computed again when autograd has let go of much
        tokens = 3 * len(rows[0]["ids"])
        patches = 3 * int(rows[0]["grid"].prod())
        without = memory.activations(meta(backbone), sft.Config(), tokens, patches, torch.float32)
        assert keeps < told.parts["activations"] < 0.6 * without
    else:
        assert told.parts["activations"] == pytest.approx(keeps, rel=0.15)

    # weights, gradients and optimizer, after a step
    optim = model.make_optimizer(backbone.net, 1e-3, 0.0, (0.9, 0.95), muon)
    sft.token_loss(backbone.net, sft.pack(rows))[0].backward()
    optim.step()
    if muon:  # it lets go of the gradients that it has used
        sft.token_loss(backbone.net, sft.pack(rows))[0].backward()
    params = list(backbone.net.parameters())
    gradients = total_bytes(p.grad for p in params)
    moments = sum(total_bytes(state.values()) for state in optim.state.values())
    assert told.parts["weights"] == total_bytes(params)
    assert told.parts["gradients"] == pytest.approx(gradients, rel=0.001)
    assert told.parts["optimizer"] == pytest.approx(moments, rel=0.001)
    assert told.peaks["update"] == pytest.approx(sum(told.parts.values()))

    # four ranks
    sharded = memory.estimate("sft", cfg, meta(backbone), load_of(rows, ranks=4))
    assert sharded.parts["weights"] == told.parts["weights"] / 4
    assert sharded.parts["gathered units"] > 0


def test_grpo(backbone, monkeypatch):
    rows = rows_of(backbone, 2, prompt_only=True)
    G, new_tokens = 3, 40
    cfg = grpo.Config(prompts=2, batch=2, micro_batch=2, group=G, max_new_tokens=new_tokens)
    told = memory.estimate("grpo", cfg, meta(backbone), load_of(rows))

    # the rollout's cache
    cache_bytes = []

    class Watched(model.SampleKV):
        def update(self, *args, **kwargs):
            first = self.prompt is None
            out = super().update(*args, **kwargs)
            if first:
                cache_bytes.append(total_bytes([*self.prompt, self.keys, self.values]))
            return out

    monkeypatch.setattr(model, "SampleKV", Watched)
    out = model.generate(backbone, rows, G, new_tokens, stop=[])
    assert told.parts["KV cache"] == sum(cache_bytes)

    # the update, with all logits at once
    def update():
        grpo.completion_logp(backbone, rows, out["ids"], out["mask"])

    keeps = memory.kept(backbone.net, update)
    V = len(backbone.net.get_input_embeddings().weight)
    logits = 2 * G * new_tokens * V
    softmax = 4 * logits  # bytes; of the logits' peak, autograd keeps this
    assert told.parts["activations"] == pytest.approx(keeps - softmax, rel=0.15)
    assert told.parts["reference"] == told.parts["weights"]
    assert told.peaks["update"] > told.peaks["rollout"]
    assert told.parts["logits"] == logits * memory.LOGITS

    # the same update, 20 tokens at a time
    monkeypatch.setattr(model, "LOGITS_AT_ONCE", 20 * V)
    sliced = memory.estimate("grpo", cfg, meta(backbone), load_of(rows))
    assert sliced.parts["logits"] == 20 * V * memory.LOGITS
    keeps_sliced = memory.kept(backbone.net, update)
    assert keeps_sliced == pytest.approx(keeps - softmax, rel=0.02), "no slice keeps its logits"

    offloaded = dataclasses.replace(cfg, cpu_offload=True)
    told = memory.estimate("grpo", offloaded, meta(backbone), load_of(rows))
    assert told.parts["reference"] == 0
    for coef, kept in ((0.0, 0), (1.0, told.parts["weights"])):  # the anchor needs one too
        anchored = dataclasses.replace(cfg, kl_coef=0.0, anchor_coef=coef)
        told = memory.estimate("grpo", anchored, meta(backbone), load_of(rows))
        assert told.parts["reference"] == kept


def test_adapters(backbone):
    """They alone have gradients; a base in bf16 takes half, and one GPU makes no copy of it."""
    rows = rows_of(backbone, 3, prompt_only=False)
    row_ids = sft.action_rows(backbone.vocab)
    cfg = sft.Config(batch=3, lora=4)

    def shapes(cfg):
        net = meta(backbone)
        model.add_adapters(net, cfg, row_ids)
        return net

    told = memory.estimate("sft", cfg, shapes(cfg), load_of(rows))
    model.add_adapters(backbone.net, cfg, row_ids)
    keeps = memory.kept(backbone.net, lambda: model.hidden_states(backbone.net, sft.pack(rows)))
    assert told.parts["activations"] == pytest.approx(keeps, rel=0.15)
    params = list(backbone.net.parameters())
    optim = model.make_optimizer(backbone.net, 1e-3, 0.0, (0.9, 0.95))
    sft.token_loss(backbone.net, sft.pack(rows))[0].backward()
    optim.step()
    gradients = total_bytes(p.grad for p in params if p.grad is not None)
    moments = sum(total_bytes(state.values()) for state in optim.state.values())
    assert told.parts["weights"] == total_bytes(params)
    assert told.parts["gradients"] == gradients < 0.2 * told.parts["weights"]
    assert told.parts["optimizer"] == pytest.approx(moments, rel=0.001)

    half = dataclasses.replace(cfg, bf16_base=True)
    net = shapes(half)
    one_gpu = dataclasses.replace(load_of(rows), dtype=torch.bfloat16)
    two_gpus = dataclasses.replace(one_gpu, ranks=2)
    weights = total_bytes(net.parameters())
    net.to(torch.bfloat16)
    assert memory.estimate("sft", half, net, one_gpu).parts["weights"] == weights
    assert memory.estimate("sft", half, net, two_gpus).parts["weights"] == weights / 2
    rl = grpo.Config(prompts=2, batch=2, lora=4, bf16_base=True)
    for load, copied in ((one_gpu, gradients / 2), (two_gpus, total_bytes(net.parameters()))):
        parts = memory.estimate("grpo", rl, net, load).parts
        assert parts["reference"] == 0
        assert parts["whole model"] == copied


@pytest.mark.parametrize(("gb", "fitting"), [("30", 3), ("0.5", 2)])
def test_the_table_names_flags_that_fit(gb, fitting, monkeypatch, capsys):
    """Each of its rows against the command for that run alone."""
    monkeypatch.setattr(memory, "PUBLISHED", ["tiny-qwen3-vl"])
    machine = ["--gpu", gb, "--gpus", "1"]
    assert memory.main(machine) == 0
    rows = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("| tiny"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert [row[1] for row in rows] == ["sft", "grpo", "vla"]
    verdicts = []
    for size, stage, peak, text in rows:
        fits = not text.startswith("does not fit, not even with ")
        flags = text.removeprefix("does not fit, not even with ").split()
        argv = [stage, "paper", "--size", size, *machine, "--compute", "bf16", *flags]
        assert memory.main(argv) == (0 if fits else 1)
        told = capsys.readouterr().out
        peaks = [float(line.split()[2]) for line in told.splitlines() if ", peak" in line]
        assert max(peaks) == float(peak)
        verdicts.append(fits)
    assert sum(verdicts) == fitting


@pytest.mark.parametrize(
    ("gb", "flags"),
    [
        (24, {"recompute": False, "lora": 16, "bf16_base": True, "micro_batch": 1}),
        (48, {"recompute": True, "micro_batch": 9}),
    ],
)
def test_all_weights_come_before_adapters(gb, flags):
    """Qwen3-VL-2B on one GPU, against what memory.first_fit tried before."""
    cfg = sft.Config(**sft.PRESETS["paper"])
    load = memory.Load(ranks=1, row_tokens=4096, row_patches=256, dtype=torch.bfloat16)
    assert memory.first_fit("sft", cfg, "qwen3-vl-2b", load, 0.9e9 * gb).flags == flags


def test_what_goes_into_no_table_is_one_line(capsys):
    with pytest.raises(SystemExit):
        memory.main(["--gpu", "24", "--recompute"])
    assert "--recompute: goes with a stage; name it first" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--gpus 3: must divide --batch 128 of sft paper"):
        memory.main(["--gpu", "24", "--gpus", "3"])


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["grpo", "--lora", "4", "--cpu-offload"], "--cpu-offload --lora: the reference"),
        (["sft", "--lora", "4", "--muon"], "--muon --lora: Muon"),
        (["sft", "--bf16-base"], "--bf16-base: goes with adapters"),
        (["sft", "--lora", "4", "--lora-targets", "qkv"], "--lora-targets 'qkv': choose of"),
        # which model.setup() refuses; vla.py on more ranks than frames was a RuntimeError
        (["sft", "paper", "--gpus", "3"], "--gpus 3: must divide --batch 128 of sft paper"),
        (["vla", "--gpus", "500", "--batch", "64"], "--gpus 500: must divide --batch 64 of vla"),
        (["grpo", "--gpus", "4", "--shards", "8"], "--gpus 4: must be a multiple of --shards 8"),
    ],
)
def test_what_the_stage_refuses_does_not_fit(argv, error):
    """Of such flags it told the peak, and that they fit."""
    with pytest.raises(ValueError, match=error):
        memory.main([*argv, "--size", "tiny-qwen3-vl", "--compute", "bf16"])


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
    told = capsys.readouterr().out
    assert f"{size} B parameters" in told and "does not fit in 5 GB" in told
    weights = float(told.split("weights")[1].split()[0])
    if argv[0] != "vla":
        assert weights == pytest.approx(size * 4 / 8, abs=0.06)  # fp32, over the shards


@pytest.mark.parametrize("flag", memory.ROWS_FLAGS["grpo"])
def test_the_flags_are_the_largest_that_fit(flag):
    """Against an estimate for each value; of 12 rows by 7 at most, 6 and 6 are forwarded."""
    net = backbones.random_backbone("tiny-qwen3-vl", device="meta").net
    cfg = grpo.Config(batch=12, prompts=12)
    load = memory.Load(ranks=1, row_tokens=256, row_patches=64, dtype=torch.float32)
    peaks = []
    for rows in range(1, 13):
        estimate = memory.estimate("grpo", dataclasses.replace(cfg, **{flag.name: rows}), net, load)
        peaks.append(estimate.peaks[flag.phase])
    assert peaks == sorted(peaks)
    expected = [0, 1, 2, 3, 4, 4, 6, 6, 6, 6, 6, 6, 12]  # by how many rows fit
    for fitting, peak in enumerate([*peaks, 2 * peaks[-1]]):
        usable = peak  # not quite enough for one more
        value = memory.largest_that_fits(flag, "grpo", cfg, net, load, usable)
        assert value == expected[fitting], fitting


@pytest.mark.parametrize("stage", [sft, grpo])
def test_no_more_rows_are_counted_than_a_rank_has(stage):
    """`grpo.py` on 8 ranks has 2 prompts a rank in an update; it was told the memory of the 8 that
    --micro-batch allows, and that they do not fit."""
    net = backbones.random_backbone("tiny-qwen3-vl", device="meta").net
    load = memory.Load(ranks=8, row_tokens=256, row_patches=64, dtype=torch.float32)
    cfg = stage.Config(batch=16, micro_batch=2)
    if stage is grpo:
        cfg = dataclasses.replace(cfg, prompts=16, rollout_batch=2)
    more = {flag.name: 8 for flag in memory.ROWS_FLAGS[stage.__name__]}
    exact = memory.estimate(stage.__name__, cfg, net, load)
    assert memory.estimate(stage.__name__, dataclasses.replace(cfg, **more), net, load) == exact


def test_thoughts_take_the_whole_backbone_and_longer_features():
    """By hand: two layers of 64 frames of 256 + 8 tokens, keys and values; the head's activations
    grow with the tokens that it reads."""
    load = memory.Load(ranks=1, row_tokens=256, row_patches=64, dtype=torch.bfloat16)
    estimates = {}
    for condition, thoughts in (
        ("prompt", "own"),
        ("thought", "own"),
        ("thought-only", "own"),
        ("thought", "recorded"),
    ):
        net = backbones.random_backbone("tiny-qwen3-vl", device="meta").net
        cfg = vla.Config(condition=condition, thoughts=thoughts, max_thought=8)
        estimates[condition, thoughts] = memory.estimate("vla", cfg, net, load)
    net = backbones.random_backbone("tiny-qwen3-vl", device="meta").net
    config = net.config.text_config
    parts = estimates["thought", "own"].parts
    assert parts["whole model"] == sum(p.numel() for p in net.parameters()) * 2
    kv_width = config.num_key_value_heads * config.head_dim
    assert parts["KV cache"] == 64 * (256 + 8) * 2 * kv_width * 2 * config.num_hidden_layers
    assert estimates["thought", "own"].peaks["thoughts"] > parts["whole model"] + parts["KV cache"]
    for key in (("prompt", "own"), ("thought", "recorded")):
        assert set(estimates[key].peaks) == {"update"}
    by_length = [("thought-only", "own"), ("prompt", "own"), ("thought", "own")]
    sizes = [estimates[key].parts["activations"] for key in by_length]
    assert sizes[0] < sizes[1] < sizes[2]
    assert parts["activations"] == estimates["thought", "recorded"].parts["activations"]


def test_a_trained_backbone_takes_what_sft_of_it_takes():
    """By hand, on one rank in fp32: AdamW's two averages and a gradient of each number that the
    flow reaches through the first of two blocks; with the cross-entropy of all of them."""
    load = memory.Load(ranks=1, row_tokens=256, row_patches=64, dtype=torch.float32)
    size = "tiny-qwen3-vl"
    parts = {}
    for name, flags in (
        ("frozen", {}),
        ("flow", {"backbone_lr": 1e-4}),
        ("both", {"backbone_lr": 1e-4, "ce_weight": 0.1}),
    ):
        cfg = vla.Config(cache="none", batch=8, layer=1, muon=True, **flags)
        net = backbones.random_backbone(size, device="meta").net
        parts[name] = memory.estimate("vla", cfg, net, load).parts
    net = backbones.random_backbone(size, device="meta").net
    language_model = net.model.language_model
    assert len(language_model.layers) == 2
    whole = sum(p.numel() for p in net.parameters())
    above = [*language_model.layers[1].parameters(), *language_model.norm.parameters()]
    cut = whole - sum(p.numel() for p in above)
    for name, trained in (("flow", cut), ("both", whole)):
        for part, bytes_each in (("gradients", 4), ("optimizer", 8), ("weights", 4)):
            assert parts[name][part] - parts["frozen"][part] == trained * bytes_each
        assert "backbone" not in parts[name], "its masters are what computes"
    for less, more in (("frozen", "flow"), ("flow", "both")):
        assert parts[less]["activations"] < parts[more]["activations"]
    assert "logits" not in parts["flow"] and parts["both"]["logits"] > 0


def test_what_fits_no_card_is_told_its_cures(capsys):
    argv = ["grpo", "paper", "--size", "qwen2.5-vl-7b", "--ranks", "8", "--gb", "60"]
    assert memory.main([*argv, "--compute", "bf16", "--no-recompute"]) == 1
    *_, cure, flags = capsys.readouterr().out.splitlines()
    assert cure.startswith("--micro-batch 1 is too much for 60 GB: --recompute, --cpu-offload, ")
    assert flags.startswith("fastest that fits in 60 GB: --rollout-batch ")


def test_the_flags_that_are_printed_are_flags_of_the_stage(capsys):
    argv = ["sft", "paper", "--size", "qwen2.5-vl-7b", "--ranks", "8", "--gb", "80"]
    memory.main([*argv, "--compute", "bf16"])
    flags = capsys.readouterr().out.splitlines()[-1].partition(": ")[2].split()
    cfg = model.parse_config(sft.Config, sft.PRESETS, ["paper", *flags])
    assert cfg.micro_batch > 2, "two rows leave most of the card empty"


@pytest.mark.parametrize("stage", ["sft", "grpo", "vla"])
def test_this_machine_is_the_default_and_nothing_is_run(stage, capsys, tmp_path, monkeypatch):
    out = tmp_path / "out"
    argv = [stage, "paper", "--init", untrained.folder("tiny-qwen3-vl"), "--out", str(out)]
    two_gpus = memory.Machine(ranks=2, gb=1000.0, has_gpu=True)
    monkeypatch.setattr(memory, "this_machine", lambda: two_gpus)
    assert memory.main(argv) == 0
    told = capsys.readouterr().out
    assert "GB on each of 2 ranks" in told and "bfloat16 compute" in told and "in 1000 GB" in told
    cpu = memory.Machine(ranks=1, gb=1000.0, has_gpu=False)
    monkeypatch.setattr(memory, "this_machine", lambda: cpu)
    assert memory.main([*argv, "--ranks", "4"]) == 0
    told = capsys.readouterr().out
    assert "GB on each of 4 ranks" in told and "float32 compute" in told and "in 250 GB" in told
    assert not out.exists()
