"""What only a GPU can answer, in one call of under ten minutes on one of them.

In: nothing; weights are random and data synthetic, but for `stages`, which trains assets/tiny-vlm
on Tabletop. Out: one JSON, written again after each check.

    bash tools/gpu_check.sh                    # -> runs/gpu_check.json
    bash tools/gpu_check.sh --cpu --out FILE   # the same steps at toy size on a CPU

| check  | question                                                                              |
|--------|---------------------------------------------------------------------------------------|
| stages | do all stages of speedrun.sh run, a few steps each, and what they trained drive?      |
| gap    | are the sampler's log-probabilities in bf16 those of the update, with large keys?     |
| graphs | do CUDA graphs sample the same tokens as the plain loop, and how much faster?         |
| memory | how near are the estimates of tools.memory to the measured peaks of SFT and GRPO?     |
| decode | a decoding step against transformers' generate and the bandwidth (tools.speed)        |
| sft    | an SFT step against plain transformers, and its FLOP utilisation (tools.speed)        |

A check that fails is recorded as such, with its traceback, and the exit status is 1; the others run
all the same.
"""

import argparse
import copy
import gc
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed

import grpo
import model
import sft
from tools import backbones, memory, speed

MINUTES = 9.0  # no check begins later
FAILURES = (  # a GPU's memory that runs out, and what code raises that has never met one
    RuntimeError,
    ValueError,
    OSError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
)


@dataclass(frozen=True)
class Setting:
    """How large the checks are."""

    device: str
    qwen2_5_vl: str  # sizes of tools.backbones
    qwen3_vl: str
    speed_size: str  # of tools.speed
    image: int  # side, pixels
    prompts: int
    group: int  # completions a prompt
    new_tokens: int
    rows: int  # of an SFT step
    repeats: int  # measured turns


GPU = Setting(
    device="cuda",
    qwen2_5_vl="qwen2.5-vl-3b",
    qwen3_vl="qwen3-vl-2b",
    speed_size="3b",
    image=256,
    prompts=16,
    group=8,
    new_tokens=192,
    rows=16,
    repeats=3,
)
TOY = Setting(
    device="cpu",
    qwen2_5_vl="tiny-qwen2.5-vl",
    qwen3_vl="tiny-qwen3-vl",
    speed_size="tiny",
    image=64,
    prompts=2,
    group=2,
    new_tokens=6,
    rows=2,
    repeats=1,
)


# ---- All stages ----------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
STAGES = {  # name -> command; {0} is a folder
    "data": "-m benchmarks.tabletop_data --out {0}/data --single "
    "--episodes 8 --conversations 16 --thought-actions 48 --carried-on 0.5",
    "fast": "fast_tokenizer.py fit --data {0}/data --out {0}/fast "
    "--horizon 5 --scale 2.5 --vocab-size 64",
    "sft": "sft.py speedrun --steps 8 --holdout-rows 16 --eval-rows 8 --probe-prompts 4 "
    "--action-tokenizer {0}/fast --out {0}/sft --data {0}/data/conversations.jsonl:0.5,"
    "{0}/data/episodes:1.5,{0}/data/thought_actions.jsonl:2",
    "grpo": "grpo.py speedrun --steps 2 --prompts 8 --batch 8 --eval-prompts 8 "
    "--no-skip-zero-std --max-new-tokens 48 --init {0}/sft --data {0}/data/episodes --out {0}/grpo",
    "vla": "vla.py speedrun --steps 8 --eval-rows 8 "
    "--init {0}/grpo --data {0}/data/episodes --out {0}/vla",
    "actions": "evaluate.py actions --policy {0}/grpo --data {0}/data/episodes --prompts 8 "
    "--out {0}/results.json",
    "drive": "evaluate.py tabletop --policy {0}/vla --suites chain --chains 1 "
    "--out {0}/results.json",
    "drive by tokens": "evaluate.py tabletop --policy {0}/grpo --mode think --suites chain "
    "--chains 1 --tries 1 --out {0}/results.json",
}


def check_stages(setting: Setting) -> dict:
    """Each as a user starts it -> its seconds. RuntimeError for the first that fails, with what it
    said last."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if setting.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in STAGES.items():
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *command.format(folder).split()],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,  # its status is read below
            )
            if done.returncode:
                last_words = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
                raise RuntimeError(f"{name}: exit status {done.returncode}\n{last_words}")
            seconds[name] = round(time.perf_counter() - began, 1)
    return {"stage_seconds": seconds}


# ---- Sampler against update ---------------------------------------------------------------------


class Gap(NamedTuple):
    """Between two log-probabilities of the same sampled tokens."""

    mean: float  # |difference|, nats
    outside: float  # share of the tokens outside GRPO's clip range


def enlarge_keys(backbone: model.Backbone, seed: int = 0) -> None:
    """Queries and keys as large as published ones, in place. Qwen2.5's come from biases (queries
    of std 3.5, keys of 27 and up to 175); Qwen3 has none, and norms whose weights are made 8."""
    generator = torch.Generator().manual_seed(seed)
    for layer in backbone.net.model.language_model.layers:
        attention = layer.self_attn
        if attention.k_proj.bias is None:
            attention.k_norm.weight.data.fill_(8.0)
            continue
        for bias, std in (attention.q_proj.bias, 3.5), (attention.k_proj.bias, 80.0):
            bias.data.copy_(std * torch.randn(bias.shape, generator=generator))


@torch.no_grad()
def sampler_gap(
    backbone: model.Backbone, rows: list[model.Row], group: int, new_tokens: int
) -> dict[str, Gap]:
    """ "sampler": its log-probabilities against the update's; "floor": those of the update against
    its own, one prompt at a time, where only the shapes of products differ."""
    samples = model.generate(backbone, rows, group, new_tokens, stop=[])
    ids, mask = samples["ids"], samples["mask"]

    def update_logp(prompts):
        completions = slice(prompts.start * group, prompts.stop * group)
        return grpo.completion_logp(backbone, rows[prompts], ids[completions], mask[completions])

    together = update_logp(slice(0, len(rows)))
    alone = torch.cat([update_logp(slice(b, b + 1)) for b in range(len(rows))])
    cfg = grpo.Config()
    gaps = {}
    for name, logp in ("sampler", samples["logp"]), ("floor", alone):
        sums = grpo.gap_sums(together, logp, mask, cfg)
        tokens = float(sums["forwarded"])
        gaps[name] = Gap(float(sums["gap"]) / tokens, float(sums["outside"]) / tokens)
    return gaps


def random_backbone(size: str, setting: Setting) -> model.Backbone:
    """With random weights, fp32 as masters are."""
    backbone = backbones.random_backbone(size, device=setting.device)
    backbone.action_tokenizer = speed.fitted_tokenizer()
    sft.grow_vocabulary(backbone, speed.ACTION_TOKENS)
    return backbone


def check_gap(setting: Setting) -> dict:
    result = {}
    for size in setting.qwen2_5_vl, setting.qwen3_vl:
        backbone = random_backbone(size, setting)
        enlarge_keys(backbone)
        backbone.net.bfloat16().eval()
        rows = speed.prompt_rows(backbone, speed.questions(setting.prompts, setting.image))
        gaps = sampler_gap(backbone, rows, setting.group, setting.new_tokens)
        result[size] = {name: gap._asdict() for name, gap in gaps.items()}
    return result


# ---- CUDA graphs --------------------------------------------------------------------------------


def check_graphs(setting: Setting) -> dict:
    """On a CPU both are the plain loop."""
    backbone = random_backbone(setting.qwen3_vl, setting)
    backbone.net.to(torch.bfloat16 if setting.device == "cuda" else torch.float32)
    rows = speed.prompt_rows(backbone, speed.questions(setting.prompts, setting.image))
    result = {}
    ids = {}
    for name, cuda_graphs in ("plain", False), ("graphs", True):
        reset_peak(setting)
        seconds = []
        for _ in range(setting.repeats + 1):
            start = now(setting)
            samples = model.generate(
                backbone, rows, setting.group, setting.new_tokens, stop=[], cuda_graphs=cuda_graphs
            )
            seconds.append(now(setting) - start)
        ids[name] = samples["ids"]
        result[name] = {"seconds": min(seconds[1:]), "peak_gb": peak_gb(setting)}
    result["same_tokens"] = (ids["plain"] == ids["graphs"]).float().mean().item()
    result["recording_failed"] = model.RECORDING_FAILED.is_set()
    return result


def now(setting: Setting) -> float:
    if setting.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(setting: Setting) -> None:
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(setting: Setting) -> float | None:
    """Since reset_peak(), 10^9 bytes; None on a CPU, which does not count them."""
    return torch.cuda.max_memory_allocated() / 1e9 if setting.device == "cuda" else None


# ---- Memory -------------------------------------------------------------------------------------


def check_memory(setting: Setting) -> dict:
    """SFT and GRPO through FSDP on one rank: fp32 masters, bf16 compute, AdamW after a step."""
    device = torch.device(setting.device)
    try:
        dist = model.setup(0) if setting.device == "cuda" else model.Dist(0, 1, device)
        return {
            "sft": sft_memory(setting, dist),
            "grpo": grpo_memory(setting, dist),
            "grpo_lora": grpo_memory(setting, dist, lora=16),
        }
    finally:  # left to Python's exit, its threads now and then abort the process
        if distributed.is_initialized():
            distributed.destroy_process_group()


def estimate(stage: str, cfg, rows: list[model.Row], setting: Setting) -> dict[str, float]:
    """What tools.memory tells of such a run -> phase -> GB at its peak."""
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    shapes = backbones.random_backbone(setting.qwen3_vl, device="meta")
    sft.grow_vocabulary(shapes, speed.ACTION_TOKENS)
    if cfg.lora:
        model.add_adapters(shapes.net, cfg)
    longest = max(len(row["ids"]) for row in rows)
    patches = int(max(row["grid"].prod(1).sum() for row in rows))
    load = memory.Load(ranks=1, row_tokens=longest, row_patches=patches, dtype=dtype)
    told = memory.estimate(stage, cfg, shapes.net.to(dtype), load)
    return {phase: size / 1e9 for phase, size in told.peaks.items()}


def fits(told: dict[str, float], setting: Setting) -> bool:
    if setting.device == "cpu":
        return True
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    return max(told.values()) < (1 - memory.FREE_SHARE) * total


def sft_memory(setting: Setting, dist: model.Dist) -> dict:
    backbone = random_backbone(setting.qwen3_vl, setting)
    questions = speed.questions(setting.rows, setting.image)
    rows = speed.conversation_rows(backbone, questions)
    longest = max(rows, key=lambda row: len(row["ids"]))
    rows = [longest] * setting.rows  # the estimate is of rows of one length
    told = estimate("sft", sft.Config(batch=setting.rows), rows, setting)
    if not fits(told, setting):
        return {"estimate_gb": told, "skipped": "the estimate does not fit this GPU"}
    model.shard(backbone.net.train(), dist)
    optimizer = model.make_optimizer(backbone.net, 1e-5, 0.0, (0.9, 0.95))
    for _ in range(2):  # the optimizer has its averages from the first step on
        reset_peak(setting)
        batch = model.to_device(sft.pack(rows), dist.device)
        sums = sft.token_loss(backbone.net, batch)
        speed.training_step(sums.loss / sums.tokens, backbone.net, optimizer)
    return {"estimate_gb": told, "peak_gb": {"update": peak_gb(setting)}}


def grpo_memory(setting: Setting, dist: model.Dist, lora: int = 0) -> dict:
    """lora: rank of adapters, on a base in bf16 where there is a GPU; 0: all weights train."""
    cfg = grpo.Config(
        lora=lora,
        bf16_base=lora > 0 and setting.device == "cuda",
        prompts=setting.prompts,
        batch=setting.prompts,
        micro_batch=2,
        group=setting.group,
        max_new_tokens=setting.new_tokens,
        skip_zero_std=False,  # random weights earn nothing
        recompute=True,
    )
    backbone = random_backbone(setting.qwen3_vl, setting)
    rows = speed.prompt_rows(backbone, speed.questions(setting.prompts, setting.image))
    targets = backbone.action_tokenizer.encode(speed.smooth_chunks(len(rows), "targets"))
    told = estimate("grpo", cfg, rows, setting)
    if not fits(told, setting):
        return {"estimate_gb": told, "skipped": "the estimate does not fit this GPU"}
    reference = backbone
    if lora:
        model.add_adapters(backbone.net, cfg)
    else:
        net = copy.deepcopy(backbone.net).requires_grad_(False).eval()
        reference = replace(backbone, net=net)
        model.shard(net, dist)
    model.recompute_activations(backbone.net)
    model.shard(backbone.net, dist)
    optimizer = model.make_optimizer(backbone.net, cfg.lr, 0.0, (0.9, cfg.beta2))
    peaks = {}
    for turn in range(2):
        reset_peak(setting)
        with model.unsharded(backbone.net):
            groups, _, _ = grpo.rollout(
                backbone, cfg, rows, targets, range(len(rows)), turn, cfg.group
            )
        peaks["rollout"] = peak_gb(setting)
        reset_peak(setting)
        backbone.net.train()
        grpo.update_step(backbone, reference, optimizer, groups, cfg, dist, f"turn {turn}")
        peaks["update"] = peak_gb(setting)
    tokens = float(torch.stack([group.mask.sum() for group in groups]).float().mean())
    return {"estimate_gb": told, "peak_gb": peaks, "tokens_a_prompt": tokens}


# ---- Speed --------------------------------------------------------------------------------------


def speed_row(command: str, setting: Setting, *more: str) -> dict:
    """A row as results/speed.jsonl has them."""
    argv = [command, "--device", setting.device, "--size", setting.speed_size]
    return speed.main([*argv, "--repeats", str(setting.repeats), "--json", *more])


def check_decode(setting: Setting) -> dict:
    counts = {
        "--prompts": setting.prompts,
        "--group": setting.group,
        "--new-tokens": setting.new_tokens,
        "--image": setting.image,
    }
    more = []
    for flag, value in counts.items():
        more += [flag, str(value)]
    return speed_row("rollout", setting, *more)


def check_sft(setting: Setting) -> dict:
    return speed_row("sft", setting, "--batch", str(setting.rows))


# ---- Command line -------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Setting], dict]] = {
    "stages": check_stages,
    "gap": check_gap,
    "graphs": check_graphs,
    "decode": check_decode,
    "sft": check_sft,
    "memory": check_memory,  # last: it starts a process group
}


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 1 when a check has failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="runs/gpu_check.json", help="the JSON to write")
    parser.add_argument("--cpu", action="store_true", help="all steps at toy size on a CPU")
    parser.add_argument("--only", choices=CHECKS, nargs="+", help="these checks alone")
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        print("no GPU here, so there is nothing to check; --cpu runs all steps at toy size")
        return 0

    setting = TOY if args.cpu else GPU
    model.quiet_libraries()
    out = Path(args.out)
    if out.is_dir():
        parser.error(f"--out {out}: a folder; name a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    record = {
        "hardware": speed.hardware(setting.device),
        "versions": model.versions(),
        "commit": model.commit(),
        "setting": vars(setting),
        "checks": {},
    }
    for name in args.only or CHECKS:
        began = time.perf_counter()
        if began - start > MINUTES * 60:
            result = {"skipped": f"after {MINUTES:g} minutes"}
        else:
            reset_peak(setting)  # and lets go of what the check before has used
            try:
                result = CHECKS[name](setting)
            except FAILURES as e:
                error = f"{type(e).__name__}: {e}"
                result = {"error": error, "traceback": traceback.format_exc().splitlines()}
        result["seconds"] = round(time.perf_counter() - began, 1)
        record["checks"][name] = result
        model.write_json(out, record)
        state = result.get("error") or result.get("skipped") or "done"
        print(f"{name}: {state}, {result['seconds']} s", flush=True)
    print(f"{out}: {len(record['checks'])} checks in {time.perf_counter() - start:.0f} s")
    return int(any("error" in result for result in record["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
