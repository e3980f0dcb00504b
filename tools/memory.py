"""What a run needs of each rank's memory, told before it starts; all is built on the meta device.

python -m tools.memory sft paper --size qwen2.5-vl-7b --ranks 8 --gb 80
python -m tools.memory grpo paper --size qwen2.5-vl-7b --recompute --cpu-offload
python -m tools.memory vla paper --init runs/grpo-paper

Flags of the stage follow its preset. Ranks and memory are by default those of this machine.
Weights, gradients, optimizer and caches are counted exactly; activations by asking autograd what it
keeps of one block. The allocator's fragments and the libraries' workspaces come on top: 10% or so.
"""

import argparse
import os
import sys
from unittest import mock

import torch

import grpo
import model
import sft
import vla
from tools import backbones

META, FP32 = model.META, 4
LOGITS = 16  # bytes a logit at the peak: bf16, fp32, its softmax and their gradients


def kept(module, call, *args, **kwargs):
    """Bytes that autograd keeps of call(...), besides the module's own parameters."""
    own, seen = {p.untyped_storage()._cdata for p in module.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        call(*args, **kwargs)
    sizes = {x._cdata: x.nbytes() for x in (t.untyped_storage() for t in seen)}
    return sum(size for at, size in sizes.items() if at not in own)


def flash(q, k, v, *args, **kwargs):
    """Attention that keeps what a fused kernel keeps; META would take the unfused one."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


fused = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", flash)


def activations(net, cfg, tokens, patches, dtype, T=64):
    """Bytes of a forward with gradient over so many tokens and patches, logits aside, told by what
    one block of each kind keeps of T."""
    lm, c, total = net.model.language_model, net.config.vision_config, 0
    width, narrow = lm.layers[0].self_attn.head_dim, c.hidden_size // c.num_heads
    kinds = [(tokens, lm.layers, lm.config.hidden_size, width, (1, T), {})]
    if not getattr(cfg, "freeze_vision", False):
        kinds.append(
            (
                patches,
                net.model.visual.blocks,
                c.hidden_size,
                narrow,
                (T,),
                {"cu_seqlens": torch.tensor([0, T])},
            )
        )
    for n, blocks, D, head, lead, more in kinds:
        x = torch.empty(*lead, D, device=META, dtype=dtype, requires_grad=True)
        angles = [torch.empty(*lead, head, device=META, dtype=dtype) for _ in range(2)]
        with fused:
            each = kept(blocks[0], blocks[0], x, position_embeddings=angles, **more) / T
        L = len(blocks)  # recompute: the inputs of all blocks, and all of one block
        total += n * (L * D * dtype.itemsize + each if cfg.recompute else L * each)
    return total


def count(params, trained=False):
    return sum(p.numel() for p in params if p.requires_grad or not trained)


def units(net):
    """Parameters of what shard() gathers at a time: (largest unit, root)."""
    *each, whole = (count(part.parameters()) for part in model.fsdp_units(net))
    return max(each, default=0), whole - sum(each)


def state(cfg, net, n):
    """Bytes of gradients and optimizer on one of n ranks: two averages of each parameter, with Muon
    one of an inner()."""
    trained, inner = count(net.parameters(), True), count(model.muon_matrices(net))
    averages = 2 * trained - inner * getattr(cfg, "muon", False)
    return {"gradients": trained * FP32 / n, "optimizer": averages * FP32 / n}


def estimate(stage, cfg, net, ranks, row, patches, dtype=torch.bfloat16):
    """-> {what: bytes on a rank}, {phase: its peak}; net on META or real, vision frozen or not."""
    b, n, c = dtype.itemsize, cfg.shards or ranks, net.config.text_config
    whole, (largest, root) = count(net.parameters()), units(net)
    gathered = (2 * largest + root) * b  # one unit computes, one arrives
    gathered += max(largest, root) * (b + FP32)  # the gradients of one, and as they are reduced
    gathered *= ranks > 1 or b < FP32
    fixed = {"weights": whole * FP32 / n, **state(cfg, net, n), "gathered units": gathered}
    B, G, T = (
        (cfg.micro_batch, cfg.group, cfg.max_new_tokens)
        if stage == "grpo"
        else (cfg.micro_batch or cfg.batch // ranks, 1, 0)
    )
    targets = B * (G * T or row)
    work = {
        "activations": activations(net, cfg, B * (row + G * T), B * patches, dtype),
        "logits": min(targets * c.vocab_size, model.LOGITS_AT_ONCE) * LOGITS,
    }
    if stage == "sft":
        return {**fixed, **work}, {"update": sum(fixed.values()) + sum(work.values())}
    L, k_proj = c.num_hidden_layers, net.model.language_model.layers[0].self_attn.k_proj
    kv = 2 * k_proj.out_features * b  # bytes a token and layer; in the update for each completion
    work["activations"] += B * row * kv * (L + G * (1 if cfg.recompute else L))
    fixed["reference"] = whole * FP32 / n * (cfg.kl_coef > 0 and not cfg.cpu_offload)
    rows = (cfg.rollout_batch or cfg.prompts // ranks) * G
    cache = {
        "whole model": whole * b * (ranks > 1 or b < FP32),
        "KV cache": (rows // G * row + rows * T) * kv * L,
        "sampling": rows * c.vocab_size * 3 * FP32,
    }
    idle = fixed["gradients"] + gathered  # not there while sampling
    return {**fixed, **work, **cache}, {
        "update": sum(fixed.values()) + sum(work.values()),
        "rollout": sum(fixed.values()) - idle + sum(cache.values()),
    }


def head_estimate(cfg, net, ranks, row, dtype=torch.bfloat16):
    """estimate() of vla.py: the cut backbone, frozen in dtype, and a head of 14 state numbers."""
    lm, n = net.model.language_model, cfg.shards or ranks
    vla.truncate(net, cfg.layer or round(0.64 * len(lm.layers)))
    B, R, K = cfg.batch // ranks, cfg.draws, cfg.horizon
    with META, fused:
        head = vla.FlowHead(
            vla.HeadConfig(
                lm.config.hidden_size,
                cfg.dim,
                cfg.layers,
                cfg.heads,
                cfg.vl_layers,
                14,
                7,
                K,
                cfg.future_tokens,
                dropout=cfg.dropout,
            )
        )
        chunk, drawn = torch.empty(B, K, 7), (torch.empty(B, R, K, 7), torch.empty(B, R))
        work = kept(
            head,
            head.loss,
            torch.empty(B, row, lm.config.hidden_size),
            None,
            torch.empty(B, 14),
            chunk,
            chunk,
            drawn,
            1,
        )
    size, (largest, root), b = count(head.parameters()) * FP32, units(net), dtype.itemsize
    whole = count(net.parameters()) * b  # for --cache features there while they are made
    backbone = (
        {"backbone": whole / n, "gathered units": (2 * largest + root) * b}
        if cfg.cache == "none"
        else {"backbone": whole}
    )
    made = {
        **backbone,
        "weights": size * (1 + bool(cfg.ema_decay)) / n + size,
        **state(cfg, head, n),
        "activations": work,
    }
    return made, {"update": sum(made.values())}


def this_machine():
    """-> ranks, memory of each (10^9 bytes), and whether they are GPUs."""
    gpus = torch.cuda.device_count()
    if gpus:
        return gpus, torch.cuda.get_device_properties(0).total_memory / 1e9, True
    return 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, False


def tell(stage, cfg, ranks, gb, dtype=torch.bfloat16, row=0, image=256, size=""):
    """Prints what a run of `stage` with this Config needs. -> whether all of it fits in gb."""
    if size:
        backbone = backbones.random_backbone(size, device="meta")
        backbone.image_spec = backbone.image_spec.bounded(cfg.max_pixels)
    else:
        backbone = model.load(cfg.init, META, max_pixels=cfg.max_pixels)
    if getattr(cfg, "freeze_vision", False):
        backbone.net.model.visual.requires_grad_(False)
    spec = backbone.image_spec
    h, w = (
        x // spec.patch
        for x in model.smart_resize(
            image, image, spec.patch * spec.merge, spec.min_pixels, spec.max_pixels
        )
    )
    row, params = (
        row or (cfg.max_length if stage == "sft" else 256),
        list(backbone.net.parameters()),
    )
    if stage == "vla":
        parts, peaks = head_estimate(cfg, backbone.net, ranks, row, dtype)
    else:
        parts, peaks = estimate(stage, cfg, backbone.net.to(dtype), ranks, row, h * w, dtype)
    print(
        f"{stage} {cfg.preset}, {size or cfg.init}: {count(params) / 1e9:.2f} B parameters"
        + f", {count(params, True) / 1e9:.2f} B of them trained" * (stage != "vla")
    )
    print(
        f"GB on each of {ranks} ranks, rows of {row} tokens with {h * w} patches, "
        f"{str(dtype)[6:]} compute"
    )
    for name, value in parts.items():
        print(f"  {name:16s} {value / 1e9:7.1f}")
    for name, value in peaks.items():
        fits = "fits" if value < 0.9 * gb * 1e9 else "does not fit"
        print(f"{name + ', peak':18s} {value / 1e9:7.1f}   {fits} in {gb:.4g} GB, 10% left free")
    return all(v < 0.9 * gb * 1e9 for v in peaks.values())


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ranks, gb, gpu = this_machine()
    add = parser.add_argument
    add("stage", choices=["sft", "grpo", "vla"])
    add("--size", default="", help="a published backbone in place of --init, as in tools.backbones")
    add("--ranks", type=int, default=ranks, help=f"processes, one a GPU ({ranks})")
    add("--gb", type=float, help=f"memory of one, 10^9 bytes ({gb:.4g} over the ranks of a CPU)")
    add("--compute", choices=["bf16", "fp32"], default="bf16" if gpu else "fp32", help="type")
    add("--row", type=int, default=0, help="tokens of a row; 0: sft --max-length, else 256")
    add("--image", type=int, default=256, help="side of the one image of a row, pixels")
    args, rest = parser.parse_known_args(argv)
    if args.size not in ("", *backbones.SIZES):
        parser.error(f"--size {args.size}: choose one of {', '.join(backbones.SIZES)}")
    stage = {"sft": sft, "grpo": grpo, "vla": vla}[args.stage]
    cfg = model.parse_config(stage.Config, stage.PRESETS, rest)
    gb = args.gb or (gb if gpu else gb / args.ranks)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.compute]
    fits = tell(args.stage, cfg, args.ranks, gb, dtype, args.row, args.image, args.size)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
