"""--lora: gradients against those of the merged model, what a checkpoint holds, resume, ranks, and
GRPO's reference."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import untrained
from ranks import on_ranks
from test_grpo import (
    CLOCK,
    chunks,
    flags,
    make_backbone,
    make_groups,
    prompt_rows,
    records,
    spread_rewards,
    write_world,
)
from test_sft import args, assert_close_logs, assert_close_weights, conversations, log, thought_row
from torch import distributed
from torch.distributed.tensor import DTensor

import grpo
import model
import sft
from fast_tokenizer import FastTokenizer
from tools import backbones

SIZES = ["tiny-qwen3-vl", "tiny-qwen2.5-vl"]
INIT = untrained.folder("tiny-qwen3-vl")
RANK = 3
RUN = {"stage": "sft", "step": 1, "config": {}, "parent": ""}


@dataclasses.dataclass(frozen=True)
class Config:
    lora: int = RANK
    lora_alpha: float = 6.0
    lora_targets: str = ""
    bf16_base: bool = False
    seed: int = 0


def with_adapters(size="tiny-qwen3-vl", rows=True, **more):
    """A backbone that knows actions, with adapters in a state that training may have led to."""
    backbone = make_backbone(size)
    row_ids = sft.action_rows(backbone.vocab) if rows else ()
    model.add_adapters(backbone.net, Config(**more), row_ids)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in backbone.net.named_parameters():
            if name.endswith(model.ADAPTERS):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return backbone


@pytest.fixture
def untied(monkeypatch):
    size = dataclasses.replace(backbones.SIZES["tiny-qwen3-vl"], tied=False)
    monkeypatch.setitem(backbones.SIZES, "untied", size)
    return "untied"


def completions(backbone, n, G, T=5):
    """Of n prompts G completions each, action tokens among them: prompts, ids and mask (n*G, T)."""
    rows = prompt_rows(backbone, range(3, 3 + n))
    rng = np.random.default_rng(1)
    ids = torch.from_numpy(rng.integers(5, 300, (n * G, T)))
    ids[:, 1] = torch.tensor(backbone.vocab.fast[: n * G])
    mask = torch.ones_like(ids)
    mask[::2, -1] = 0
    return rows, ids, mask


def loss_of_grpo(backbone):
    """Through the shared prompt."""
    rows, ids, mask = completions(backbone, n=2, G=3)
    weight = torch.linspace(-1, 1, ids.numel()).view_as(mask)
    return (grpo.completion_logp(backbone, rows, ids, mask) * weight).sum()


def loss_of_sft(backbone):
    """Of a pack of rows."""
    packed = []
    for i, chunk in enumerate(chunks(3)):
        answer = model.action_answer(backbone.action_tokenizer.encode(chunk[None])[0])
        messages = [
            {"role": "user", "content": "<image>go " * (i + 1)},
            {"role": "assistant", "content": f"<think>left</think>{answer}"},
        ]
        images = [np.full((32, 32, 3), 50 * i, np.uint8)] * (i + 1)
        packed.append(model.encode(backbone, messages, images))
    return sft.token_loss(backbone.net, sft.pack(packed)).loss


# ---- Gradients and checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [*SIZES, "untied"])
def test_gradients_are_those_of_the_merged_model(size, recompute, untied, tmp_path):
    """Of the checkpoint, read as any other, all weights train. Where a matrix W + s B A has the
    gradient g, the adapters have s B^T g and s g A^T; the rows of the vocabulary have what its
    table has there. The loss is the same too: merged equals unmerged."""
    adapted = with_adapters(size)
    model.save(tmp_path / "c", adapted, RUN)
    plain = model.load(tmp_path / "c")
    layers = {}
    for name, module in adapted.net.named_modules():
        if isinstance(module, model.LoraLinear):
            layers[name] = module
    assert len(layers) == 2 * 7  # of two blocks all linear layers
    if recompute:
        model.recompute_activations(adapted.net.train())
    row_ids = sorted(sft.action_rows(adapted.vocab))

    def assert_close(ours, theirs, name):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name

    for loss_of in (loss_of_sft, loss_of_grpo):
        for backbone in (adapted, plain):
            backbone.net.zero_grad()
        loss, merged_loss = loss_of(adapted), loss_of(plain)
        assert loss.item() == pytest.approx(merged_loss.item(), rel=1e-5)
        loss.backward()
        merged_loss.backward()

        for name, layer in layers.items():
            g = plain.net.get_parameter(f"{name}.weight").grad
            assert g.abs().max() > 0
            assert_close(layer.lora_a.grad, layer.scale * layer.lora_b.detach().T @ g, name)
            assert_close(layer.lora_b.grad, layer.scale * g @ layer.lora_a.detach().T, name)
        for ours, theirs in (
            (adapted.net.get_input_embeddings(), plain.net.get_input_embeddings()),
            (adapted.net.get_output_embeddings(), plain.net.get_output_embeddings()),
        ):
            assert_close(ours.rows.grad, theirs.weight.grad[row_ids], "rows")
        for name, p in adapted.net.named_parameters():
            assert (p.grad is not None) == name.endswith(model.ADAPTERS), name


@pytest.mark.parametrize("size", [*SIZES, "untied"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_checkpoint_is_merged_and_loads_in_plain_transformers(size, bf16, untied, tmp_path):
    """Also with a base in bf16, of which the merged weights are not rounded."""
    adapted = with_adapters(size, bf16_base=bf16)
    model.save(tmp_path / "c", adapted, RUN)
    net = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "c", dtype="auto")
    names = {name for name, _ in net.named_parameters()}
    assert names == {name for name, _ in make_backbone(size).net.named_parameters()}
    table, head = net.get_input_embeddings().weight, net.get_output_embeddings().weight
    assert (table is head) == (size != "untied")
    assert {p.dtype for p in net.parameters()} == {torch.float32}

    if bf16:
        assert {p.dtype for p in adapted.net.parameters()} == {torch.float32, torch.bfloat16}
        adapted.net.float()  # to compute with the same numbers
    _, ids, _ = completions(adapted, n=1, G=4)
    ours = adapted.net(input_ids=ids).logits
    theirs = net(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_targets_and_rank():
    backbone = with_adapters(rows=False, lora_targets="q_proj, down_proj", lora_alpha=1.5)
    trained = {name: p.shape for name, p in backbone.net.named_parameters() if p.requires_grad}
    size = backbones.SIZES["tiny-qwen3-vl"]
    block = "model.language_model.layers.1."
    assert trained[block + "mlp.down_proj.lora_a"] == (RANK, size.mlp)
    assert trained[block + "mlp.down_proj.lora_b"] == (size.hidden, RANK)
    assert trained[block + "self_attn.q_proj.lora_b"] == (size.heads * size.head_dim, RANK)
    assert len(trained) == 2 * 2 * 2  # blocks, targets, A and B
    assert backbone.net.get_submodule(block + "mlp.down_proj").scale == 0.5


def test_peft_computes_the_same():
    """The adapters of Hugging Face's own library, with our A and B, give the same logits."""
    peft = pytest.importorskip("peft")
    adapted = with_adapters(rows=False)
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=rf".*language_model.*\.({'|'.join(kinds)})",
        lora_dropout=0.0,
    )
    theirs = peft.get_peft_model(make_backbone().net, config)
    values = {}
    for name, p in adapted.net.named_parameters():
        if name.endswith(model.ADAPTERS):
            layer, _, part = name.rpartition(".")
            kind = {"lora_a": "lora_A", "lora_b": "lora_B"}[part]
            values[f"base_model.model.{layer}.{kind}.default.weight"] = p.detach()
    loaded = theirs.load_state_dict(values, strict=False)
    assert not loaded.unexpected_keys and len(values) == 28
    _, ids, _ = completions(adapted, n=1, G=4)
    ours = adapted.net(input_ids=ids).logits
    assert (ours - theirs(input_ids=ids).logits).abs().max() < 1e-4


# ---- SFT -----------------------------------------------------------------------------------------


@pytest.fixture
def talk(tmp_path):
    """Conversations, some of which act, and the FAST tokenizer of their actions."""
    tokenizer = FastTokenizer.fit(chunks(200), 48, scale=2)
    tokenizer.save(tmp_path / "fast")
    extra = [thought_row(chunk) for chunk in chunks(4)]
    data, n = conversations(tmp_path / "talk", 8, extra)

    def flags(out, *more, **kw):
        more = ["--no-muon", "--lora", RANK, "--lr", 3e-3, *more]
        more = ["--action-tokenizer", tmp_path / "fast", *more]
        return args(tmp_path / out, data, *more, holdout=n, **kw)

    return flags


def weights(folder):
    return dict(model.load(folder).net.named_parameters())


def test_sft_trains_adapters_and_new_rows_alone(talk, tmp_path):
    sft.main(talk("o", "--lora-targets", "v_proj"))
    before = make_init(tmp_path / "fast")
    trained = model.load(tmp_path / "o", stages=("sft",))
    row_ids = sft.action_rows(trained.vocab)
    for name, old in before.net.named_parameters():
        new = trained.net.get_parameter(name)
        if "v_proj.weight" in name:
            change = (new - old).detach()
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == RANK
        elif "embed_tokens" in name:
            changed = (new != old).any(1).nonzero()[:, 0].tolist()
            assert changed == sorted(row_ids)
        else:
            assert torch.equal(new, old), name
    last = log(tmp_path / "o")
    assert last[5]["loss"] < last[0]["loss"]
    # the base, whose hash stands in run.json for --resume, is no data on the model card
    card = (tmp_path / "o" / "final" / "README.md").read_text()
    assert card.count("| data |") == 1 and f"| trained from | {INIT} |" in card


def make_init(fast):
    """INIT as a run begins with it."""
    backbone = model.load(INIT)
    sft.grow_vocabulary(backbone, FastTokenizer.load(fast).vocab_size)
    return backbone


def test_sft_resumes_exactly(talk, tmp_path):
    """Weights that hold the adapters merged do not say what these were: train_state/ does."""
    sft.main(talk("a", "--save-every", 2, steps=4))
    shutil.copytree(tmp_path / "a" / "step_000002", tmp_path / "b" / "step_000002")
    sft.main(talk("b", "--save-every", 2, "--resume", steps=4))
    old, new = log(tmp_path / "a"), log(tmp_path / "b")
    assert [r["loss"] for r in old[2:4]] == [r["loss"] for r in new[:2]]
    a, b = weights(tmp_path / "a" / "final"), weights(tmp_path / "b" / "final")
    assert all(torch.equal(p, b[name]) for name, p in a.items())
    with pytest.raises(ValueError, match="was run with another --lora-alpha"):
        sft.main(talk("b", "--resume", "--lora-alpha", 8, steps=4))


def test_a_changed_init_is_named_on_resume(talk, tmp_path):
    """Adapters mean nothing beside other weights, as of an --init that was trained anew since."""
    shutil.copytree(INIT, tmp_path / "init")
    flags = ["--init", tmp_path / "init", "--save-every", 1]
    sft.main(talk("o", *flags, steps=1))
    other = model.load(INIT)
    with torch.no_grad():
        for p in other.net.parameters():
            p.mul_(1.01)
    model.save(tmp_path / "init", other, RUN | {"stage": "base"})
    with pytest.raises(ValueError, match="init: has changed since .*step_000001"):
        sft.main(talk("o", *flags, "--resume"))


def test_sft_on_two_ranks_equals_one(talk, tmp_path, monkeypatch, untied):
    """An FSDP unit for each block and end of the vocabulary, recomputed; and the state that two
    ranks left goes on on one. (The ids of the trained rows were one tensor in two units:
    rank 1 then waited forever for a second copy of it.)"""
    monkeypatch.setattr(model, "SMALL", 0)
    backbones.write(untied, tmp_path / "untied")
    flags = ["--save-every", 2, "--init", tmp_path / "untied", "--recompute"]
    sft.main(talk("one", *flags, steps=3))
    on_ranks(sft.main, talk("two", *flags, steps=3), 2)
    shutil.copytree(tmp_path / "two" / "step_000002", tmp_path / "back" / "step_000002")
    sft.main(talk("back", *flags, "--resume", steps=3))
    one = log(tmp_path / "one")
    assert_close_logs(one, log(tmp_path / "two"))
    assert_close_logs(one[2:], log(tmp_path / "back"))
    assert_close_weights(tmp_path / "one" / "final", tmp_path / "two" / "final")
    assert_close_weights(tmp_path / "one" / "final", tmp_path / "back" / "final")


# ---- A base in bf16 ------------------------------------------------------------------------------


def test_a_base_in_bf16_computes_with_its_rounded_weights(talk, tmp_path):
    """Two ranks, which gather fp32 from shards in bf16, as one unit, against one whose --init has
    been rounded."""
    rounded = make_init(tmp_path / "fast")
    table = rounded.net.get_input_embeddings().weight
    row_ids = sft.action_rows(rounded.vocab)
    with torch.no_grad():
        trained_rows = table[row_ids]
        for p in rounded.net.parameters():
            p.copy_(p.bfloat16())
        table[row_ids] = trained_rows
    model.save(tmp_path / "rounded", rounded, RUN)
    sft.main(talk("fp32", "--init", tmp_path / "rounded", steps=2))
    on_ranks(sft.main, talk("bf16", "--bf16-base", steps=2), 2)
    assert_close_logs(log(tmp_path / "fp32"), log(tmp_path / "bf16"))


def whole_base(argv):
    """A rank that has all weights, in the type of compute."""
    dist = model.setup(seed=0, shards=1)
    adapted = with_adapters(bf16_base=True)
    net = model.shard(adapted.net, dist, dtype=torch.bfloat16)
    for name, p in net.named_parameters():
        assert isinstance(p, DTensor) == p.requires_grad == name.endswith(model.ADAPTERS), name
    loss = loss_of_sft(adapted)
    loss.backward()
    grads = [p.grad.to_local() for p in net.parameters() if p.requires_grad]
    mean = [all_mean(grad) for grad in grads]
    assert all(torch.equal(a, b) for a, b in zip(grads, mean, strict=True))  # ranks agree
    with model.unsharded(net):
        sampled = model.generate(adapted, completions(adapted, 2, 1)[0], 2, 4)
    assert sampled["ids"].shape[0] == 4
    model.save(Path(argv[0]) / "c", adapted, RUN)
    if dist.rank == 0:
        merged = loss_of_sft(model.load(Path(argv[0]) / "c"))
        assert loss.item() == pytest.approx(merged.item(), rel=2e-2)


def all_mean(tensor):
    mean = tensor.clone()
    distributed.all_reduce(mean)
    return mean / distributed.get_world_size()


@pytest.mark.parametrize("small", [10**9, 0], ids=["whole", "by blocks"])
def test_a_whole_base_in_bf16_is_not_copied(tmp_path, monkeypatch, small):
    """One GPU held 7B twice, as shards of one and gathered."""
    monkeypatch.setattr(model, "SMALL", small)
    on_ranks(whole_base, [str(tmp_path)], 2)


# ---- GRPO ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("lora"))


def rl(world, out, *more):
    return flags(world, out, "--lora", str(RANK), "--lr", "0.01", *more)


def test_the_reference_is_the_policy_without_its_adapters(world):
    """After a few steps it still says what --init says, and the policy something else; with no
    second set of weights."""
    cfg = model.parse_config(grpo.Config, grpo.PRESETS, rl(world, "reference"))
    prepared = grpo.prepare(cfg, model.setup(0))
    backbone = prepared.backbone
    assert prepared.reference is backbone
    with torch.no_grad():
        for name, p in backbone.net.named_parameters():
            if name.endswith("lora_b"):
                p.add_(0.1)
    batch = completions(backbone, n=2, G=2)
    with torch.no_grad():
        policy = grpo.completion_logp(backbone, *batch)
        with model.adapters_off(backbone.net):
            reference = grpo.completion_logp(backbone, *batch)
        again = grpo.completion_logp(backbone, *batch)
        init = grpo.completion_logp(model.load(world / "sft"), *batch)
    assert torch.equal(reference, init)
    assert torch.equal(policy, again) and (policy - init).abs().max() > 1e-3


def test_the_loss_has_the_kl_and_the_anchor_to_the_reference(world, monkeypatch):
    """The same as of the merged policy against a second copy of --init, in a run's own loss."""
    cfg = model.parse_config(grpo.Config, grpo.PRESETS, rl(world, "kl"))
    backbone = grpo.prepare(cfg, model.setup(0)).backbone
    with torch.no_grad():
        for name, p in backbone.net.named_parameters():
            if name.endswith("lora_b"):
                p.add_(0.05)
    model.save(world / "merged", backbone, RUN)
    groups, _ = make_groups(backbone, n=2)
    merged, init = model.load(world / "merged"), model.load(world / "sft")
    cfg = dataclasses.replace(cfg, anchor_coef=2.0)
    loss, logged = grpo.group_loss(backbone, backbone, groups, cfg)
    merged_loss, merged_logged = grpo.group_loss(merged, init, groups, cfg)
    for name in ("kl", "anchor"):
        assert logged[name] > 0
        assert logged[name].item() == pytest.approx(merged_logged[name].item(), rel=1e-3)
    assert loss.item() == pytest.approx(merged_loss.item(), rel=1e-3, abs=1e-5)


def test_grpo_resumes_exactly(world, monkeypatch):
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    grpo.main(rl(world, "whole", "--steps", "3", "--save-every", "2"))
    shutil.copytree(world / "whole" / "step_000002", world / "parts" / "step_000002")
    grpo.main(rl(world, "parts", "--steps", "3", "--save-every", "2", "--resume"))
    whole, parts = weights(world / "whole" / "final"), weights(world / "parts" / "final")
    init = weights(world / "sft")
    assert all(torch.equal(p, parts[name]) for name, p in whole.items())
    for name, p in whole.items():  # adapters alone: not the rows of the vocabulary either
        is_adapted = "language_model" in name and name.endswith("proj.weight")
        assert torch.equal(p, init[name]) != is_adapted, name
    old, new = records(world / "whole")[-2], records(world / "parts")[-2]
    assert old["step"] == 3 and all(old[k] == new[k] for k in old.keys() - CLOCK)
    go_on = ["--init", str(world / "whole"), "--steps", "1"]  # any later stage reads it
    grpo.main(rl(world, "further", *go_on))


def test_grpo_on_two_ranks_equals_one(world, monkeypatch):
    """By blocks, recomputed, with the KL to the policy without its adapters."""
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    monkeypatch.setattr(model, "SMALL", 0)
    both = ["--steps", "2", "--batch", "4", "--micro-batch", "1", "--show-every", "1"]
    grpo.main(rl(world, "one", *both))
    on_ranks(grpo.main, rl(world, "two", *both, "--recompute"), 2)
    one, two = records(world / "one"), records(world / "two")
    for a, b in zip(one[1:], two[1:], strict=True):
        for k in a.keys() - CLOCK - {"rollout"}:
            late = a["step"] > 1 or ("eval_greedy_reward" in a and a["step"])
            assert a[k] == pytest.approx(b[k], rel=1e-3 if late else 1e-5, abs=1e-6), (a["step"], k)
        assert a.get("rollout") == b.get("rollout")
    assert one[2]["grad_norm"] > 0 and one[4]["kl"] > 0
    ours, theirs = weights(world / "one" / "final"), weights(world / "two" / "final")
    assert max((p - theirs[name]).abs().max().item() for name, p in ours.items()) < 3e-4


# ---- Bad input -----------------------------------------------------------------------------------


def test_bad_input_is_one_line(talk, world):
    def error(main, argv, match):
        with pytest.raises(ValueError, match=match):
            main(argv)

    unknown = (
        "--lora-targets 'qkv': choose of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj"
    )
    error(sft.main, talk("bad", "--lora-targets", "q_proj,qkv"), unknown)
    error(sft.main, talk("bad", "--muon"), "--muon --lora: .* give --no-muon")
    error(sft.main, talk("bad", "--bf16-base", "--lora", 0), "--bf16-base: .* give --lora 16 too")
    no_lora = ["--lora", 0, "--lora-targets", "q_proj"]  # trained all weights, and said nothing
    error(sft.main, talk("bad", *no_lora), "--lora-targets: goes with adapters")
    error(grpo.main, flags(world, "bad", "--lora-alpha", "8"), "--lora-alpha: goes with adapters")
    error(sft.main, talk("bad", "--bf16-base"), "--bf16-base: one process on a CPU")
    error(grpo.main, rl(world, "bad", "--bf16-base"), "--bf16-base: one process on a CPU")
    error(grpo.main, rl(world, "bad", "--cpu-offload"), "--cpu-offload --lora: the reference is")
