"""What a run needs of each rank's memory, told before it starts; all is built on the meta device.

    python -m tools.memory --gpu 24 --gpus 2          # which models and stages fit, by which flags?
    python -m tools.memory sft paper --size qwen2.5-vl-7b --gpu 80 --gpus 8
    python -m tools.memory grpo paper --size qwen2.5-vl-7b --lora 16 --bf16-base
    python -m tools.memory vla paper --init runs/grpo-paper

Without a stage: a table of the published sizes and the stages' presets `paper` on so many cards
(RUNGS says what is tried). With one: what it needs, flags of the stage behind its preset. Ranks and
memory are by default those of this machine. The last line has the flags to use: the largest
--micro-batch and --rollout-batch that fit.
Weights, gradients, optimizer and caches are counted exactly; activations by asking autograd what it
keeps of one block. The allocator's fragments and the libraries' workspaces come on top: 10% or so.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

import fast_tokenizer
import grpo
import model
import sft
import vla
from tools import backbones

STAGES = {"sft": sft, "grpo": grpo, "vla": vla}
COMPUTE_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
META = model.META
FP32 = 4  # bytes a number
LOGITS = 16  # bytes a logit at the peak: bf16, fp32, its softmax and their gradients
BF16 = 2
ANSWER_TOKENS = 32  # of the action tokens that vla.py --ce-weight learns
PROMPT_TOKENS = 256  # of a row where nothing says how long it is
ACTION_TOKENS = 2050  # of a vocabulary that knows none yet: as FAST for Bridge has
STATE_DIM = 14  # of a policy whose data is not looked at: two arms of seven joints
ACTION_DIM = 7
FREE_SHARE = 0.1  # for the allocator's fragments and the libraries' workspaces


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank."""

    parts: dict[str, float]  # "weights", "gradients", ... -> bytes
    peaks: dict[str, float]  # phase ("update", "rollout") -> bytes that are there at a time


@dataclass(frozen=True)
class Load:
    """What the estimate depends on besides the stage's Config and the net."""

    ranks: int
    row_tokens: int  # the image's among them; in GRPO those of a prompt
    row_patches: int
    dtype: torch.dtype  # of compute


class Machine(NamedTuple):
    """Where the command runs."""

    ranks: int  # one a GPU; 1 on a CPU
    gb: float  # 10^9 bytes of a GPU, or of the whole memory
    has_gpu: bool


# ---- Counting -----------------------------------------------------------------------------------


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def count_trained(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad)


class Units(NamedTuple):
    """Parameters of what model.shard gathers at a time."""

    largest: int  # of all units but the root: a block, or an end of the vocabulary
    root: int  # what is in no other unit


def count_units(net: nn.Module, counter: Callable = count) -> Units:
    *inner, whole = [counter(unit.parameters()) for unit in model.fsdp_units(net)]
    return Units(largest=max(inner, default=0), root=whole - sum(inner))


def gathered_bytes(net: nn.Module, dtype: torch.dtype, counter: Callable = count) -> float:
    """Of a forward through sharded parameters: the root, the unit that computes, the next one."""
    units = count_units(net, counter)
    return (2 * units.largest + units.root) * dtype.itemsize


def optimizer_parts(cfg, net: nn.Module, shards: int) -> dict[str, float]:
    """Bytes of gradients and optimizer: AdamW has two averages of each parameter, Muon one."""
    trained = count_trained(net.parameters())
    averages = 2 * trained
    if getattr(cfg, "muon", False):
        averages -= count(model.muon_matrices(net))
    return {"gradients": trained * FP32 / shards, "optimizer": averages * FP32 / shards}


# ---- Activations --------------------------------------------------------------------------------


def kept(module: nn.Module, call: Callable, *args, **kwargs) -> int:
    """Bytes that autograd keeps of call(...), besides the module's own parameters."""
    saved = []

    def remember(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        call(*args, **kwargs)
    parameters = {p.untyped_storage()._cdata for p in module.parameters()}
    sizes = {}  # by storage, which several of the saved tensors may share
    for tensor in saved:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def flash_attention(q, k, v, *args, **kwargs):
    """Attention that keeps what a fused kernel keeps; META would take the unfused one."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, 1)
        v = v.repeat_interleave(groups, 1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


fused = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", flash_attention)


def block_bytes(
    block: nn.Module, lead: tuple[int, ...], width: int, head_dim: int, dtype, **more
) -> int:
    """What autograd keeps of one block for an input (*lead, width)."""
    x = torch.empty(*lead, width, device=META, dtype=dtype, requires_grad=True)
    cos, sin = (torch.empty(*lead, head_dim, device=META, dtype=dtype) for _ in range(2))
    with fused:
        return kept(block, block, x, position_embeddings=[cos, sin], **more)


def activations(
    net: nn.Module, cfg, tokens: int, patches: int, dtype: torch.dtype, T: int = 64
) -> float:
    """Bytes of a forward with gradient over so many tokens and patches, logits aside: what one
    block of each kind keeps of T positions, times blocks and positions."""

    def of_blocks(blocks, positions, width, each):
        """each: bytes a position of one block."""
        if cfg.recompute:  # the inputs of all blocks, and all of the one that is computed again
            return positions * (len(blocks) * width * dtype.itemsize + each)
        return positions * (len(blocks) * each)

    # 1. language model
    language = net.model.language_model
    width = language.config.hidden_size
    head_dim = language.layers[0].self_attn.head_dim
    each = block_bytes(language.layers[0], (1, T), width, head_dim, dtype) / T
    total = of_blocks(language.layers, tokens, width, each)

    # 2. vision tower
    if any(p.requires_grad for p in net.model.visual.parameters()):
        vision = net.config.vision_config
        blocks = net.model.visual.blocks
        width = vision.hidden_size
        head_dim = width // vision.num_heads
        one_image = torch.tensor([0, T])
        each = block_bytes(blocks[0], (T,), width, head_dim, dtype, cu_seqlens=one_image) / T
        total += of_blocks(blocks, patches, width, each)
    return total


# ---- Estimates ----------------------------------------------------------------------------------


def resident_parts(cfg, net: nn.Module, load: Load) -> dict[str, float]:
    """What sft.py and grpo.py keep through an update: the net's masters and their state, sharded,
    and the units that are gathered meanwhile."""
    shards = cfg.shards or load.ranks
    gathered = 0
    if is_copied(load):
        gathered = gathered_bytes(net, load.dtype, copied_counter(cfg, load))
        trained_units = count_units(net, count_trained)
        # the gradients of one unit, and as they are reduced
        gathered += max(trained_units) * (load.dtype.itemsize + FP32)
    trained = count_trained(net.parameters())
    frozen = count(net.parameters()) - trained
    return {
        "weights": (trained * FP32 + frozen * (BF16 if cfg.bf16_base else FP32)) / shards,
        **optimizer_parts(cfg, net, shards),
        "gathered units": gathered,
    }


def is_copied(load: Load) -> bool:
    """Whether a forward needs another copy of the weights than the masters of this rank."""
    return load.ranks > 1 or load.dtype.itemsize < FP32


def copied_counter(cfg, load: Load) -> Callable:
    """What counts those of some parameters that a forward needs copies of: see model.frozen_weights
    for the others."""
    shards = cfg.shards or load.ranks
    is_as_computed = cfg.bf16_base and load.dtype.itemsize == BF16
    return count_trained if shards == 1 and is_as_computed else count


def logit_bytes(net: nn.Module, targets: int) -> int:
    """At the peak; those of more tokens are made by slices."""
    return min(targets * net.config.text_config.vocab_size, model.LOGITS_AT_ONCE) * LOGITS


def rows_at_once(given: int, total: int, load: Load) -> int:
    """Rows that a rank forwards at once: as many as were `given` (0: all), but no more than its
    share of the `total` of all ranks."""
    local_rows = max(1, total // load.ranks)
    return min(given or local_rows, local_rows)


def sft_estimate(cfg: sft.Config, net: nn.Module, load: Load) -> Estimate:
    """sft.py on rows that are targets throughout; net on META or real, vision frozen or not."""
    rows = rows_at_once(cfg.micro_batch, cfg.batch, load)
    tokens = rows * load.row_tokens
    patches = rows * load.row_patches
    parts = resident_parts(cfg, net, load)
    parts["activations"] = activations(net, cfg, tokens, patches, load.dtype)
    parts["logits"] = logit_bytes(net, tokens)
    return Estimate(parts, peaks={"update": sum(parts.values())})


def kv_bytes(net: nn.Module, load: Load) -> int:
    """Keys and values of a token in one layer."""
    attention = net.model.language_model.layers[0].self_attn
    return 2 * attention.k_proj.out_features * load.dtype.itemsize


def sampling_parts(net: nn.Module, cached_tokens: int, samples: int, load: Load) -> dict:
    """Keys and values of so many tokens, and the next token's scores of so many samples."""
    config = net.config.text_config
    return {
        "KV cache": cached_tokens * kv_bytes(net, load) * config.num_hidden_layers,
        "sampling": samples * config.vocab_size * 3 * FP32,
    }


def grpo_estimate(cfg: grpo.Config, net: nn.Module, load: Load) -> Estimate:
    """grpo.py when all completions reach --max-new-tokens."""
    layers = net.config.text_config.num_hidden_layers
    weights = count(net.parameters())
    fixed = resident_parts(cfg, net, load)

    # 1. an update: B prompts, and G completions of each, which share the prompt's keys and values
    B = rows_at_once(cfg.micro_batch, cfg.batch, load)
    G = cfg.group
    new_tokens = B * G * cfg.max_new_tokens
    tokens = B * load.row_tokens + new_tokens
    work = {
        "activations": activations(net, cfg, tokens, B * load.row_patches, load.dtype),
        "logits": logit_bytes(net, new_tokens),
    }
    # In attention they are copied for each completion: at all layers, or at the one that is
    # computed again.
    copied_layers = 1 if cfg.recompute else layers
    work["activations"] += B * load.row_tokens * kv_bytes(net, load) * (layers + G * copied_layers)

    # 2. the model that RL started from: with adapters the same one
    shards = cfg.shards or load.ranks
    fixed["reference"] = 0.0
    if cfg.needs_reference and not cfg.cpu_offload and not cfg.lora:
        fixed["reference"] = weights * FP32 / shards

    # 3. a rollout: the whole model is gathered once, and nothing of an update is there
    prompts = rows_at_once(cfg.rollout_batch, cfg.prompts, load)
    samples = prompts * G
    cached_tokens = prompts * load.row_tokens + samples * cfg.max_new_tokens
    copied = copied_counter(cfg, load)(net.parameters()) if is_copied(load) else 0
    sampling = {
        "whole model": copied * load.dtype.itemsize,
        **sampling_parts(net, cached_tokens, samples, load),
    }
    idle = fixed["gradients"] + fixed["gathered units"]
    peaks = {
        "update": sum(fixed.values()) + sum(work.values()),
        "rollout": sum(fixed.values()) - idle + sum(sampling.values()),
    }
    return Estimate({**fixed, **work, **sampling}, peaks)


def vla_estimate(cfg: vla.Config, net: nn.Module, load: Load) -> Estimate:
    """vla.py: the backbone, which is cut here, frozen in the compute type, and the head; one that
    --backbone-lr trains is what sft.py would need for it. Thoughts are counted at --max-thought
    tokens, recorded ones too, answers of --ce-weight at ANSWER_TOKENS."""
    # 0. thoughts, which the whole backbone writes before anything else is there
    thinking = {}
    feature_tokens = load.row_tokens
    if cfg.condition != "prompt":
        feature_tokens = cfg.max_thought
        if cfg.condition == "thought":
            feature_tokens += load.row_tokens
        if cfg.thoughts == "own":
            rows = vla.FRAMES_AT_ONCE
            cached_tokens = rows * (load.row_tokens + cfg.max_thought)
            thinking = {
                "whole model": count(net.parameters()) * load.dtype.itemsize,
                **sampling_parts(net, cached_tokens, rows, load),
            }
    language = net.model.language_model
    if not cfg.ce_weight:
        vla.truncate(net, cfg.layer)
    shards = cfg.shards or load.ranks

    # 1. the head, and what it keeps of a batch
    B = cfg.batch // load.ranks
    R = cfg.draws
    chunk_shape = (cfg.horizon, ACTION_DIM)  # (K, A)
    width = language.config.hidden_size
    with META, fused:
        head = vla.FlowHead(
            vla.HeadConfig(
                vl_dim=width,
                dim=cfg.dim,
                layers=cfg.layers,
                heads=cfg.heads,
                vl_layers=cfg.vl_layers,
                state_dim=STATE_DIM,
                action_dim=ACTION_DIM,
                horizon=cfg.horizon,
                future_tokens=cfg.future_tokens,
                dropout=cfg.dropout,
            )
        )
        action = torch.empty(B, *chunk_shape)
        activation_bytes = kept(
            head,
            head.loss,
            feats=torch.empty(B, feature_tokens, width),
            mask=None,
            state=torch.empty(B, STATE_DIM),
            action=action,
            action_mask=action,
            drawn=vla.Draws(noise=torch.empty(B, R, *chunk_shape), time=torch.empty(B, R)),
            divisor=1,
        )

    # 2. the backbone: whole on each rank (vla.py shards one that takes over half of the memory)
    backbone = count(net.parameters()) * load.dtype.itemsize
    parts = {"backbone": backbone}
    if cfg.backbone_lr:
        parts = trained_backbone(cfg, net, replace(load, row_tokens=feature_tokens))
    elif cfg.cache == "none" and cfg.shard_backbone:
        parts["backbone"] = backbone / shards
        if shards > 1:  # a lone rank computes with what it has: model.frozen_weights
            parts["gathered units"] = gathered_bytes(net, load.dtype)

    # 3. the head's masters, sharded, their average too, and one gathered head
    head_bytes = count(head.parameters()) * FP32
    copies = 2 if cfg.ema_decay else 1
    of_head = {
        "weights": head_bytes * copies / shards + head_bytes,
        **optimizer_parts(cfg, head, shards),
        "activations": activation_bytes,
    }
    for name, size in of_head.items():
        parts[name] = parts.get(name, 0) + size
    peaks = {"update": sum(parts.values())}
    if thinking:
        peaks["thoughts"] = sum(thinking.values())
    return Estimate({**parts, **thinking}, peaks)


def trained_backbone(cfg: vla.Config, net: nn.Module, load: Load) -> dict[str, float]:
    """Parts of the backbone in vla.py --backbone-lr: cut, its lm_head frozen, or whole with
    --ce-weight."""
    as_sft = sft.Config(batch=cfg.batch, shards=cfg.shards)
    net.to(load.dtype)
    if not cfg.ce_weight:
        net.requires_grad_(False)
        net.model.requires_grad_(True)
        parts = sft_estimate(as_sft, net, load).parts
        del parts["logits"]
        return parts
    answered = replace(load, row_tokens=load.row_tokens + ANSWER_TOKENS)
    parts = sft_estimate(as_sft, net, answered).parts
    parts["logits"] = logit_bytes(net, cfg.batch // load.ranks * ANSWER_TOKENS)
    return parts


def estimate(stage: str, cfg, net: nn.Module, load: Load) -> Estimate:
    """What a run of `stage` needs. net: on META or real, in the type of compute; for vla.py it is
    cut after the layer that the head reads."""
    by_stage = {"sft": sft_estimate, "grpo": grpo_estimate, "vla": vla_estimate}
    return by_stage[stage](cfg, net, load)


# ---- Flags that fit -----------------------------------------------------------------------------


class RowsFlag(NamedTuple):
    """A flag that says how many rows a rank forwards at once, and no result depends on it."""

    name: str
    total: str  # the field with the rows that all ranks share out
    phase: str  # whose peak it decides


ROWS_FLAGS = {
    "sft": [RowsFlag("micro_batch", "batch", "update")],
    "grpo": [
        RowsFlag("micro_batch", "batch", "update"),
        RowsFlag("rollout_batch", "prompts", "rollout"),
    ],
    "vla": [],  # whose --batch is one forward
}


def largest_that_fits(
    flag: RowsFlag, stage: str, cfg, net: nn.Module, load: Load, usable: float
) -> int:
    """The largest value of a flag whose peak stays under so many usable bytes; 0: not even 1 does.
    Of values that need as many forwards the smallest: of 16 rows by 9 at most, 8 and 8."""
    most = rows_at_once(0, getattr(cfg, flag.total), load)
    fits, too_many = 0, most + 1
    while too_many - fits > 1:
        rows = (fits + too_many) // 2
        needed = estimate(stage, replace(cfg, **{flag.name: rows}), net, load)
        if needed.peaks[flag.phase] < usable:
            fits = rows
        else:
            too_many = rows
    if fits == 0:
        return 0
    forwards = math.ceil(most / fits)
    return math.ceil(most / forwards)


# ---- Table: all sizes and stages on some cards --------------------------------------------------

LORA = {"lora": 16, "bf16_base": True}
PUBLISHED = ["qwen3-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-4b", "qwen2.5-vl-7b", "qwen3-vl-8b"]
# Flags beside the preset `paper`, from what is fastest to what needs least memory; the first that
# fits is told. All weights before adapters: another method, and maybe another result.
RUNGS = {
    "sft": [
        {"recompute": False},
        {"recompute": True},
        {"recompute": False, **LORA},
        {"recompute": True, **LORA},
    ],
    "grpo": [
        {"recompute": False},
        {"recompute": True},
        {"recompute": True, "cpu_offload": True},
        {"recompute": False, **LORA},
        {"recompute": True, **LORA},
    ],
    "vla": [{}, {"shard_backbone": True}],
}


class Fit(NamedTuple):
    """How to run a stage on some cards."""

    flags: dict[str, bool | float]  # fields beside the preset's
    peak: float  # bytes, of the phase that needs most


def first_fit(stage: str, cfg, size: str, load: Load, usable: float) -> Fit:
    """The first rung that fits in so many usable bytes, with its largest numbers of rows; the last
    one with a row at once where none does."""
    for rung in RUNGS[stage]:
        tried = replace(cfg, **rung)
        net = load_shapes(tried, size).net.to(load.dtype)
        rows = {}
        for flag in ROWS_FLAGS[stage]:
            rows[flag.name] = largest_that_fits(flag, stage, tried, net, load, usable) or 1
        needed = estimate(stage, replace(tried, **rows), net, load)
        fit = Fit({**rung, **rows}, max(needed.peaks.values()))
        if fit.peak < usable:
            break
    return fit


def option(name: str, value: bool | float) -> str:
    """A flag as it is typed."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def tell_table(ranks: int, gb: float, dtype: torch.dtype, row: int, image: int) -> None:
    """Prints which sizes and stages fit on so many cards of so many GB. row, image: as of
    load_of()."""
    print(f"{ranks} x {gb:.4g} GB, {FREE_SHARE:.0%} of it left free; flags beside the preset paper")
    print("| model | stage | peak, GB | flags |\n|---|---|---|---|")
    for size in PUBLISHED:
        for name, stage in STAGES.items():
            cfg = stage.Config(**{"preset": "paper", **stage.PRESETS["paper"]})
            spec = backbones.image_spec(backbones.SIZES[size]).bounded(cfg.max_pixels)
            load = load_of(name, cfg, spec, ranks, dtype, row, image)
            fit = first_fit(name, cfg, size, load, (1 - FREE_SHARE) * gb * 1e9)
            flags = []
            for field, value in fit.flags.items():
                if value != getattr(cfg, field):
                    flags.append(option(field, value))
            verdict = " ".join(flags)
            if fit.peak >= (1 - FREE_SHARE) * gb * 1e9:
                verdict = f"does not fit, not even with {verdict}"
            print(f"| {size} | {name} | {fit.peak / 1e9:.1f} | {verdict} |", flush=True)


# ---- Command line -------------------------------------------------------------------------------


def this_machine() -> Machine:
    gpus = torch.cuda.device_count()
    if gpus:
        return Machine(gpus, torch.cuda.get_device_properties(0).total_memory / 1e9, True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(1, memory / 1e9, False)


def load_shapes(cfg, size: str) -> model.Backbone:
    """The backbone of --size, or else of --init, on META; its vision tower frozen if the run
    does."""
    if size:
        backbone = backbones.random_backbone(size, device="meta")
        backbone.image_spec = backbone.image_spec.bounded(cfg.max_pixels)
    else:
        backbone = model.load(cfg.init, META, max_pixels=cfg.max_pixels)
    if getattr(cfg, "freeze_vision", False):
        backbone.net.model.visual.requires_grad_(False)
    if getattr(cfg, "lora", 0):
        row_ids = ()
        if isinstance(cfg, sft.Config):
            row_ids = sft.action_rows(backbone.vocab) or range(ACTION_TOKENS)
        model.add_adapters(backbone.net, cfg, row_ids)
    return backbone


def check_ranks(run: str, cfg, ranks: int) -> None:
    """ValueError where the run would stop since so many ranks cannot share it out: see
    model.setup()."""
    if cfg.batch % ranks:
        raise ValueError(f"--gpus {ranks}: must divide --batch {cfg.batch} of {run}")
    if cfg.shards and ranks % cfg.shards:
        raise ValueError(f"--gpus {ranks}: must be a multiple of --shards {cfg.shards} of {run}")


def load_of(
    stage: str, cfg, spec: model.ImageSpec, ranks: int, dtype: torch.dtype, row: int, image: int
) -> Load:
    """row: tokens, 0: as the stage has; image: side of its one square image, pixels."""
    _, rows, columns = model.image_grid(image, image, spec)
    row_tokens = row or (cfg.max_length if stage == "sft" else PROMPT_TOKENS)
    return Load(ranks=ranks, row_tokens=row_tokens, row_patches=rows * columns, dtype=dtype)


def tell(what: str, backbone: model.Backbone, stage: str, cfg, load: Load, gb: float) -> bool:
    """Prints what a run of `stage` with this Config needs of each rank. what: the run's and the
    backbone's names. -> whether all of it fits in gb."""
    parameters = list(backbone.net.parameters())
    billions = f"{count(parameters) / 1e9:.2f} B parameters"
    if stage != "vla":  # which trains a head alone
        billions += f", {count_trained(parameters) / 1e9:.2f} B of them trained"
        backbone.net.to(load.dtype)
    needed = estimate(stage, cfg, backbone.net, load)

    compute = str(load.dtype).removeprefix("torch.")
    print(f"{what}: {billions}")
    print(
        f"GB on each of {load.ranks} ranks, rows of {load.row_tokens} tokens with "
        f"{load.row_patches} patches, {compute} compute"
    )
    for name, size in needed.parts.items():
        print(f"  {name:16s} {size / 1e9:7.1f}")
    usable = (1 - FREE_SHARE) * gb * 1e9
    for name, size in needed.peaks.items():
        verdict = "fits" if size < usable else "does not fit"
        room = f"{verdict} in {gb:.4g} GB, {FREE_SHARE:.0%} left free"
        print(f"{name + ', peak':18s} {size / 1e9:7.1f}   {room}")
    tell_flags(backbone.net, stage, cfg, load, usable, gb)
    return all(size < usable for size in needed.peaks.values())


def tell_flags(net: nn.Module, stage: str, cfg, load: Load, usable: float, gb: float) -> None:
    """Prints the flags to use on cards of so many GB, or what to try where none fits."""
    to_use = []
    for flag in ROWS_FLAGS[stage]:
        rows = largest_that_fits(flag, stage, cfg, net, load, usable)
        option = "--" + flag.name.replace("_", "-")
        if rows == 0:
            print(f"{option} 1 is too much for {gb:.4g} GB: {cures(stage, cfg, flag.phase)}")
        else:
            to_use.append(f"{option} {rows}")
    if to_use:
        print(f"fastest that fits in {gb:.4g} GB: {' '.join(to_use)}")


def cures(stage: str, cfg, phase: str) -> str:
    """What lowers a peak beside the number of rows."""
    flags = []
    if phase == "update" and not cfg.recompute:
        flags.append("--recompute")
    if stage == "grpo" and cfg.needs_reference and not cfg.cpu_offload and not cfg.lora:
        flags.append("--cpu-offload")
    if not cfg.lora:
        flags.append("--lora 16 --bf16-base")
    if stage == "grpo":
        flags.append("a lower --max-new-tokens")
    return ", ".join([*flags, "a lower --max-pixels", "more ranks"])


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 when the run fits, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    machine = this_machine()
    add = parser.add_argument
    add("stage", choices=STAGES, nargs="?", help="none: a table of all of them")
    add("--size", default="", help="a published backbone in place of --init, as in tools.backbones")
    add(
        "--ranks",
        "--gpus",
        type=fast_tokenizer.count,
        default=machine.ranks,
        help=f"processes, one a GPU ({machine.ranks})",
    )
    add(
        "--gb",
        "--gpu",
        type=fast_tokenizer.positive,
        help=f"memory of one, 10^9 bytes ({machine.gb:.4g} over the ranks of a CPU)",
    )
    add(
        "--compute",
        choices=COMPUTE_TYPES,
        help="type; bf16 of a GPU, and of those of a table",
    )
    add(
        "--row",
        type=fast_tokenizer.natural,
        default=0,
        help="tokens of a row; 0: sft --max-length, else 256",
    )
    add(
        "--image",
        type=fast_tokenizer.count,
        default=256,
        help="side of the one image of a row, pixels",
    )
    args, stage_argv = parser.parse_known_args(argv)
    if args.size not in ("", *backbones.SIZES):
        parser.error(f"--size {args.size}: choose one of {', '.join(backbones.SIZES)}")
    gb = args.gb or (machine.gb if machine.has_gpu else machine.gb / args.ranks)
    is_gpu = machine.has_gpu or args.stage is None
    dtype = COMPUTE_TYPES[args.compute or ("bf16" if is_gpu else "fp32")]
    if args.stage is None:
        if args.size or stage_argv:
            parser.error(f"{' '.join(stage_argv) or '--size'}: goes with a stage; name it first")
        for name, stage in STAGES.items():
            check_ranks(f"{name} paper", stage.Config(**stage.PRESETS["paper"]), args.ranks)
        tell_table(args.ranks, gb, dtype, args.row, args.image)
        return 0

    stage = STAGES[args.stage]
    cfg = model.parse_config(stage.Config, stage.PRESETS, stage_argv)
    stage.check_config(cfg)
    check_ranks(f"{args.stage} {cfg.preset}", cfg, args.ranks)
    if stage is not vla:
        device = torch.device("cuda" if dtype == torch.bfloat16 else "cpu")  # only its name counts
        model.check_adapters(cfg, model.Dist(rank=0, world_size=args.ranks, device=device))
    backbone = load_shapes(cfg, args.size)
    load = load_of(args.stage, cfg, backbone.image_spec, args.ranks, dtype, args.row, args.image)
    what = f"{args.stage} {cfg.preset}, {args.size or cfg.init}"
    return 0 if tell(what, backbone, args.stage, cfg, load, gb) else 1


if __name__ == "__main__":
    model.run_main(lambda: sys.exit(main()), "--micro-batch")
