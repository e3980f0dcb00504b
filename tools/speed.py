"""Our code against its peers, taking turns in one process: rollout, GRPO, SFT, head training, FAST.

In: nothing; weights are random and data synthetic. Out: a line a pair, then one JSON line with both
medians, quartiles and the ratio (peer / ours). Both sides start from the same weights and inputs,
run once unmeasured, and what they did is compared at each turn (tokens, losses, ids): a difference
is an error. On CPU: one thread, process CPU seconds, which a busy machine disturbs less than wall
time; on cuda wall seconds between synchronisations. In doubt the peer is favoured: its batches are
made before the clock starts (rollout), gradient checkpointing is off (TRL). Both sides run in a
process as it comes, without our scripts' setting of glibc (model.setup); --keep-memory gives it to
both. In rollout and grpo the end of the turn is banned: all have --new tokens.

python -m tools.speed rollout                       # transformers generate
python -m tools.speed grpo --image 224              # a step of TRL; full rows in the update
python -m tools.speed sft --device cuda --size 3b   # plain transformers, padded rows
python -m tools.speed head                          # the frozen backbone in the loop
python -m tools.speed fast                          # the published code, chunk by chunk
python -m tools.speed cost --repeats 3              # ours alone: group, completion, image grow
torchrun --nproc_per_node 2 -m tools.speed cost --repeats 3   # and with ranks: wall seconds
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import os
import platform
import re
import shlex
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.numpy import save_file
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import grpo
import model
import sft
import vla
from tools import backbones
from fast_tokenizer import FastTokenizer

HORIZON, DIM = 16, 7  # steps K of a chunk, action dimensions A
FAST = 1024  # FAST tokens
QUESTION = "put the {}red block to the left of the blue bowl"

# Weights and inputs

SIZES = {"3b": "qwen2.5-vl-3b", "7b": "qwen2.5-vl-7b", "tiny-vlm": "tiny-vlm", "tiny": "speed"}
backbones.SIZES["speed"] = backbones.Size(
    vocab=4096 - FAST - 2 - len(model.SPECIAL_TOKENS) - len(model.TAGS),
    hidden=256,
    layers=4,
    heads=8,
    kv=4,
    mlp=768,
    theta=1e6,
    vision=128,
    vision_mlp=512,
    patch=14,
    pixels=(4 * 28**2, 4096 * 28**2),
)


def make_backbone(args):
    """Random weights, bf16 on GPU, with FAST tokens; "tiny-vlm" is shaped as the embedded one."""
    size, device, dtype = args.size, args.device, vla.compute_dtype(args.device)
    if size == "tiny-vlm":
        backbone = backbones.random_backbone("tiny-vlm")
        backbone.net.to(device, dtype)
        return backbone
    texts = [*backbones.SENTENCES * 20, " ".join(words(6000, 0))]
    backbone = backbones.random_backbone(SIZES[size], 0, texts, device)
    backbone.net.to(dtype)
    backbone.action_tokenizer = fitted()
    sft.grow_vocabulary(backbone, FAST)
    backbone.vocab.banned = backbone.tokenizer.convert_tokens_to_ids(
        model.SPECIAL_TOKENS
    )  # the end too; no unused rows
    return backbone


def words(n, seed):
    rng = model.rng(seed, "words")
    return [bytes(rng.integers(97, 123, rng.integers(3, 9)).tolist()).decode() for _ in range(n)]


def smooth(n, seed):
    """n chunks (n, K, A) in [-1, 1]; their power falls with frequency, as that of recorded ones."""
    coefs = model.rng(0, "chunks", seed).normal(size=(n, HORIZON, DIM))
    fall = 2 / (1 + np.arange(HORIZON)[:, None]) ** 1.8
    return np.tanh(idct(coefs * fall, axis=1, norm="ortho")).astype(np.float32)


def fitted():
    ends = np.ones((2, HORIZON, DIM)) * [[[1.0]], [[-1.0]]]  # the largest coefficients: no clipping
    return FastTokenizer.fit(np.concatenate([smooth(8192, "fit"), ends]), FAST, 10)


def questions(n, side):
    """-> n times (text, image (side, side, 3) uint8); the texts differ in length."""
    images = model.rng(0, "images").integers(0, 256, (n, side, side, 3), np.uint8)
    texts = [model.action_question(QUESTION.format("far " * (i % 3))) for i in range(n)]
    return [("<image>" + model.ask(t, think=True), image) for t, image in zip(texts, images)]


def prompts(backbone, items):
    return [
        model.encode(backbone, [{"role": "user", "content": text}], [image], prompt_only=True)
        for text, image in items
    ]


def lengths(rows):
    return [len(row["ids"]) for row in rows]


def plain(backbone, rows, device, left=False):
    """Rows -> arguments of transformers' own forward, and where targets are."""
    batch = model.to_device(model.collate(rows, backbone.vocab.pad, left), device)
    return {
        "input_ids": batch["ids"],
        "attention_mask": batch["mask"],
        "mm_token_type_ids": (batch["ids"] == backbone.vocab.image).int(),
        "pixel_values": batch["patches"],
        "image_grid_thw": batch["grid"],
    }, batch["target"]


# Measuring


def clock(args):
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() if args.ranks or args.device == "cuda" else time.process_time()


def compare(ours, peer, work, args):
    """ours(k) and peer(k) by turns, turn 0 unmeasured. work(what ours returned, what peer returned)
    -> {name: (number, number, relative tolerance)}; ValueError when they differ by more.
    -> {"ours", "peer", "ratio" (of the two in each turn): quartiles, "unit", "work"}."""
    spent = []
    for k in range(args.repeats + 1):
        at, done = [clock(args)], []
        for side in (ours, peer):
            done.append(side(k))
            at.append(clock(args))
        spent.append(np.diff(at))
        did = work(*done)
        for name, (a, b, tolerance) in did.items():
            if not abs(a - b) <= tolerance * max(abs(a), abs(b)):
                raise ValueError(
                    f"turn {k}: {name} is {a} in ours, {b} in the peer; they do not "
                    "do the same work, so a ratio would mean nothing"
                )
    a, b = np.array(spent[1:]).T
    pair = {}
    for name, x in (("ours", a), ("peer", b), ("ratio", b / a)):
        low, median, high = np.quantile(x, [0.25, 0.5, 0.75]).tolist()
        pair[name] = {"median": median, "q25": low, "q75": high, "n": len(x)}
    return pair | {
        "unit": "CPU s" if args.device == "cpu" and not args.ranks else "s",
        "work": {name: {"ours": a, "peer": b} for name, (a, b, _) in did.items()},
    }


def timed(run, args):
    """Median seconds of run(), which has no peer."""
    return compare(lambda k: run(), lambda k: None, lambda x, y: {}, args)["ours"]["median"]


# Ours against its peers


def rollout(args):
    """model.generate against transformers' generate, which forwards a prompt once a completion; on
    a GPU also with its steps replayed as CUDA graphs against without."""
    backbone, G, new = make_backbone(args), args.group, args.new
    rows = prompts(backbone, questions(args.prompts, args.image))
    batch = plain(backbone, rows, args.device, left=True)[0] | {
        "suppress_tokens": backbone.vocab.banned,
        "max_new_tokens": new,
        "min_new_tokens": new,
    }
    T = batch["input_ids"].shape[1]

    def peer(k):
        torch.manual_seed(k)
        return (
            backbone.net.generate(
                **batch, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=G
            )[:, T:]
            != backbone.vocab.pad
        )

    backbone.net.eval()
    pair = compare(
        lambda k: model.generate(backbone, rows, G, new, seed=k)["mask"],
        peer,
        lambda x, y: {"tokens": (int(x.sum()), int(y.sum()), 0)},
        args,
    )
    same = (
        model.generate(backbone, rows, 1, new, greedy=True)["ids"]
        == backbone.net.generate(**batch, do_sample=False)[:, T:]
    )
    pair["greedy_agreement"] = same.float().mean().item()  # below 1 only by near ties, and in bf16
    pairs = {"rollout": pair}
    if args.device != "cpu":
        pair |= decode_bound(backbone, rows, T, pair["ours"]["median"], args)
        graphs = [
            lambda k, on=on: model.generate(backbone, rows, G, new, seed=k, cuda_graphs=on)[
                "mask"
            ].sum()
            for on in (True, False)
        ]
        pairs["graphs"] = compare(*graphs, lambda x, y: {"tokens": (int(x), int(y), 0)}, args)
    return pairs, {"prompt_tokens": lengths(rows)}


def decode_bound(backbone, rows, T, seconds, args):
    """Decoding reads all weights and the cache (prompts once) at each token: how near to that. With
    many rows arithmetic, 2 FLOP a weight and row, takes longer than reading."""
    lm, c = backbone.net.model.language_model, backbone.net.config.text_config
    weights = [*lm.layers.parameters(), backbone.net.lm_head.weight]
    flop = 2 * len(rows) * args.group * sum(p.numel() for p in weights)
    kv = lm.layers[0].self_attn.k_proj.out_features
    token = 2 * c.num_hidden_layers * kv * backbone.net.dtype.itemsize
    seen = len(rows) * (T + args.group * args.new / 2)  # tokens in the cache, on average
    read = sum(p.nbytes for p in weights) + seen * token  # bytes a step
    block = torch.empty(1 << 30, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(block)
    speed = 2 * block.nbytes / timed(lambda: target.copy_(block), args)  # it reads and writes
    step = (seconds - timed(lambda: model.generate(backbone, rows, args.group, 1), args)) / (
        args.new - 1
    )
    return {
        "copy_gb_s": speed / 1e9,
        "read_gb_step": read / 1e9,
        "step_s": step,
        "bound_step_s": read / speed,
        "share_of_bound": read / speed / step,
        "arithmetic_step_s": flop / (args.peak_tflops * 1e12),
    }


def full_logp(backbone, rows, ids, mask, temperature=1.0):
    """grpo.completion_logp by B*G full rows, padded right; here all completions have T tokens."""
    full, T = [], ids.shape[1]
    for i, new in enumerate(ids.cpu().numpy()):
        row = rows[i // (len(ids) // len(rows))]
        more = {
            "ids": new,
            "positions": np.tile(row["positions"].max() + 1 + np.arange(T), (3, 1)),
            "target": np.ones(T, bool),
        }
        full.append(row | {k: np.concatenate([row[k], x], -1) for k, x in more.items()})
    batch = model.to_device(model.collate(full, backbone.vocab.pad), ids.device)
    h = model.hidden_states(backbone.net, batch)[:, :-1][
        batch["target"][:, 1:]
    ]  # (N, D), ordered as the ids
    both = grpo.token_logp(backbone.net, h, ids.flatten(), temperature, backbone.vocab.banned)
    return [x.view_as(ids) for x in both]


def score(backbone, ids, targets, kind, reward=grpo.reward):
    """The reward plus a number in [0, 1) made of the ids: random weights earn nothing, and groups
    that tie would cost us nothing."""
    r, info = reward(backbone, ids, targets, kind)
    return r + [zlib.crc32(np.array(row)) / 2**32 for row in ids], info


def parts(args):
    """What a step of grpo.py is made of, with all prompts in one update, and KL."""
    dist = model.setup(0) if args.ranks else model.Dist(0, 1, torch.device(args.device))
    backbone, items = make_backbone(args), questions(args.prompts, args.image)
    cfg = grpo.Config(
        prompts=args.prompts,
        batch=args.prompts,
        micro_batch=args.prompts,
        group=args.group,
        max_new_tokens=args.new,
    )
    items = items[dist.rank :: dist.world_size]
    gold = backbone.action_tokenizer.encode(smooth(len(items), "gold"))
    ref = replace(backbone, net=copy.deepcopy(backbone.net).requires_grad_(False).eval())
    for net in (backbone.net, ref.net) if args.ranks else ():
        model.shard(net, dist)

    @mock.patch.object(grpo, "reward", score)
    def sample(k):
        rows = prompts(backbone, items)
        with model.unsharded(backbone.net):
            return grpo.rollout(backbone, cfg, rows, gold, range(len(items)), k, args.group)[0]

    def learner(logp=grpo.completion_logp):
        one = (
            backbone
            if logp is grpo.completion_logp
            else replace(backbone, net=copy.deepcopy(backbone.net))
        )
        optim = model.make_optimizer(one.net, cfg.lr, cfg.weight_decay, (0.9, cfg.beta2))

        @mock.patch.object(grpo, "completion_logp", logp)
        def update(groups, k):
            one.net.train()
            return grpo.update(one, ref, optim, groups, cfg, dist, f"turn {k}")

        return update

    return ref, cfg, items, gold, sample, learner


def grpo_step(args):
    """A whole step (encode, sample, score, update) against TRL's, and the update alone against one
    on full rows."""
    ref, cfg, items, gold, sample, learner = parts(args)
    groups, ours, full = sample(0), learner(), learner(full_logp)
    loose = 1e-3 if args.device == "cpu" else 0.1  # bf16; and the differences of the steps add up
    pairs = {
        "update": compare(
            lambda k: ours(groups, k),
            lambda k: full(groups, k),
            lambda x, y: {
                k: (x[k], y[k], tol) for k, tol in (("forwarded", 0), ("grad_norm", loose))
            },
            args,
        )
    }
    if importlib.util.find_spec("trl"):
        with tempfile.TemporaryDirectory() as folder:
            peer = trl_step(ref, cfg, items, gold, folder)
            pairs["step"] = compare(
                lambda k: ours(sample(k), k)["forwarded"],
                peer,
                lambda x, y: {"tokens": (x, y, 0)},
                args,
            )
    else:
        pairs["step"] = {"skipped": "pip install trl==1.16.0"}
    return pairs, {"prompt_tokens": lengths(prompts(ref, items))}


def cost(args):
    """Our own seconds of a rollout and an update, as one setting at a time grows; under torchrun on
    that many ranks, which share the prompts."""
    start, rows = {"group": args.group, "new": args.new, "image": args.image}, []
    for change in ({}, *({k: m * v} for k, v in start.items() for m in (2, 4))):
        ref, _, items, _, sample, learner = parts(argparse.Namespace(**{**vars(args), **change}))
        groups, update = sample(0), learner()
        rows.append(
            {
                **start,
                **change,
                "prompt": max(lengths(prompts(ref, items))),
                "rollout": timed(functools.partial(sample, 1), args),
                "update": timed(functools.partial(update, groups, 0), args),
            }
        )
        if os.environ.get("RANK", "0") == "0":
            print("  ".join(f"{k} {v:<7.4g}" for k, v in rows[-1].items()), file=sys.stderr)
    return {}, {"cost": rows}


def trl_step(backbone, cfg, items, gold, folder):
    """-> step(k): one step of TRL's GRPOTrainer with the settings of cfg, without the logging and
    data loading of its loop; returns the number of completion tokens."""
    import datasets
    import trl

    backbone.net.save_pretrained(
        folder
    )  # TRL loads its reference model from where the policy came from
    backbone.image_spec.save(folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    data = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": text.removeprefix("<image>")}],
                "image": Image.fromarray(image),
                "target": t,
            }
            for (text, image), t in zip(items, gold)
        ]
    )
    config = trl.GRPOConfig(
        folder,
        use_cpu=backbone.net.device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(items) * cfg.group,
        num_generations=cfg.group,
        max_completion_length=cfg.max_new_tokens,
        temperature=cfg.temperature,
        beta=cfg.kl_coef,
        epsilon=cfg.clip_low,
        epsilon_high=cfg.clip_high,
        loss_type="bnpo",
        learning_rate=cfg.lr,
        lr_scheduler_type="constant",
        weight_decay=cfg.weight_decay,
        adam_beta2=cfg.beta2,
        max_grad_norm=cfg.max_grad_norm,
        max_steps=1,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        generation_kwargs={
            "min_new_tokens": cfg.max_new_tokens,
            "suppress_tokens": backbone.vocab.banned,
        },
    )

    def reward(completion_ids, target, **_):
        return score(backbone, completion_ids, target, cfg.reward)[0].tolist()

    # A processor is to have a part for videos too, which wants torchvision; not here.
    lenient = mock.patch.object(
        transformers.Qwen3VLProcessor,
        "check_argument_for_proper_class",
        lambda self, name, part: type(part),
    )
    with contextlib.redirect_stdout(sys.stderr), lenient:
        reader = transformers.Qwen3VLProcessor(
            images, backbone.tokenizer, chat_template=backbone.tokenizer.chat_template
        )
        net = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=backbone.net.dtype
        )
        trainer = trl.GRPOTrainer(net, reward, config, data, processing_class=reader)
        trainer.train()  # one step, in which it also makes its optimizer
        batch = next(iter(trainer.get_train_dataloader()))

    def step(_):
        trainer.training_step(trainer.model_wrapped, batch, None)  # samples, scores, backward
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), cfg.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return int(trainer._buffered_inputs[0]["completion_mask"].sum())

    return step


def sft_step(args):
    """The step of sft.py (packed rows, logits where targets are) against right-padded rows and the
    loss that the net itself computes, from all logits. Answers differ much in length."""
    backbone, items = make_backbone(args), questions(args.batch or 24, args.image)
    rng, rows, texts = model.rng(0, "answers"), [], words(60, 1)
    for i, (question, image) in enumerate(items):
        thought = f"<think>{' '.join(texts[: rng.integers(60)])}</think>" if i % 2 else ""
        answer = thought + model.action_answer(backbone.action_tokenizer.encode(smooth(1, i))[0])
        rows.append(
            model.encode(
                backbone,
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                [image],
            )
        )
    nets = backbone.net.train(), copy.deepcopy(backbone.net)
    optims = [model.make_optimizer(net, 2e-5, 0.01, (0.9, 0.999)) for net in nets]

    def packed(k):
        loss, count, _ = sft.token_loss(nets[0], model.to_device(sft.pack(rows), args.device))
        return learn(loss / count, nets[0], optims[0])

    def padded(k):
        batch, target = plain(backbone, rows, args.device)
        labels = batch["input_ids"].masked_fill(~target, -100)
        return learn(nets[1](**batch, labels=labels).loss, nets[1], optims[1])

    loose = 1e-4 if args.device == "cpu" else 0.02
    pair = compare(packed, padded, lambda x, y: {"loss": (x.item(), y.item(), loose)}, args)
    if args.device != "cpu":
        # 6 x parameters x tokens, each part for what it must see: the head targets, the tower
        # patches. What attention multiplies is not counted.
        net = backbone.net
        parts = [
            (net.model.language_model.layers, sum(lengths(rows))),
            (net.lm_head, sum(int(r["target"].sum()) for r in rows)),
            (net.model.visual, sum(len(r["patches"]) for r in rows)),
        ]
        flop = 6 * sum(p.numel() * seen for part, seen in parts for p in part.parameters())
        for side in ("ours", "peer"):
            pair[f"{side}_mfu"] = flop / pair[side]["median"] / (args.peak_tflops * 1e12)
    return {"step": pair}, {"row_tokens": lengths(rows)}


def learn(loss, net, optim):
    loss.backward()
    model.clip_gradients(net.parameters(), 1.0)
    optim.step()
    optim.zero_grad()
    return loss.detach()


def head_step(args):
    """The step of vla.py on cached features against the same with the frozen backbone in the loop;
    the head of the speedrun preset, at 3b and 7b that of the paper's."""
    preset = vla.PRESETS["paper" if args.size in ("3b", "7b") else "speedrun"]
    given = {k: v for k, v in vars(args).items() if k in ("batch", "vl_layers") and v is not None}
    with tempfile.TemporaryDirectory() as folder:
        for e in range(4):
            rng, shape = model.rng(0, "episode", e), (24, args.image, args.image, 3)
            save_file(
                {
                    "image": rng.integers(0, 256, shape, np.uint8),
                    "state": rng.normal(size=(24, 8)).astype(np.float32),
                    "action": smooth(24, e)[:, 0],
                },
                Path(folder) / f"episode_{e}.safetensors",
                {"task": QUESTION.format("")},
            )
        cfg = vla.Config(**{**preset, **given, "data": folder, "out": f"{folder}/out"})
        backbone, dist = make_backbone(args), model.Dist(0, 1, torch.device(args.device))
        frames, _ = vla.FrameDataset(cfg), vla.freeze_backbone(backbone, cfg.layer)
        sources = (
            vla.build_cache(backbone, frames, cfg, dist),
            vla.LiveFeatures(backbone, frames, cfg, args.device),
        )
        torch.manual_seed(0)
        head = vla.FlowHead(
            vla.HeadConfig(
                backbone.net.config.text_config.hidden_size,
                cfg.dim,
                cfg.layers,
                cfg.heads,
                cfg.vl_layers,
                8,
                DIM,
                cfg.horizon,
                cfg.future_tokens,
            )
        ).to(args.device)
        heads = head, copy.deepcopy(head)
        optims = [
            model.make_optimizer(h, cfg.lr, cfg.weight_decay, (cfg.beta1, cfg.beta2), cfg.muon)
            for h in heads
        ]

        def step(i, k):
            ids = vla.sample_order(cfg, len(frames.train), k)
            fetched = ids, sources[i].read(ids)
            loss, _ = vla.flow_loss(heads[i], sources[i], frames, cfg, k, fetched, dist)
            return learn(loss, heads[i], optims[i])

        pair = compare(
            functools.partial(step, 0),
            functools.partial(step, 1),
            lambda x, y: {"loss": (x.item(), y.item(), 0.02)},
            args,
        )  # the cache holds 16 bits a number
        tokens = len(sources[1].read([0])[0]["ids"])
    return {"step": pair}, {"prompt_tokens": tokens, "head": repr(head.cfg), "frames": cfg.batch}


class Published:
    """FAST as physical-intelligence/fast codes it (arXiv 2501.09747), chunk by chunk through a
    tokenizer of transformers; on our vocabulary, for the same ids, hence without its byte level."""

    def __init__(self, fast):
        bpe = Tokenizer.from_str(fast.bpe.to_str())
        bpe.decoder = decoders.Fuse()
        self.bpe = transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe, clean_up_tokenization_spaces=False
        )
        self.scale, self.min_token = fast.scale, fast.min_coef

    def encode(self, chunks):
        coefs = (np.around(dct(chunk[None], axis=1, norm="ortho") * self.scale) for chunk in chunks)
        codes = (np.maximum(c.flatten() - self.min_token, 0).astype(int) for c in coefs)
        return [self.bpe("".join(map(chr, c)))["input_ids"] for c in codes]

    def decode(self, tokens):
        codes = (np.array(list(map(ord, self.bpe.decode(ids)))) for ids in tokens)
        coefs = ((c + self.min_token).reshape(-1, DIM) for c in codes)  # (K, A) each
        return np.stack([idct(c / self.scale, axis=0, norm="ortho") for c in coefs])


def fast_codes(args):
    """FastTokenizer on a batch against the published code. Each turn has fresh chunks and each side
    its own BPE, because a BPE remembers what it has encoded."""
    ours = fitted()
    peer = Published(ours)
    chunks = [smooth(args.chunks, k) for k in range(args.repeats + 1)]
    ids = list(map(fitted().encode, chunks))
    pairs = {
        "encode": compare(
            lambda k: ours.encode(chunks[k]),
            lambda k: peer.encode(chunks[k]),
            lambda x, y: {
                "tokens": (sum(map(len, x)), sum(map(len, y)), 0),
                "identical": (int(x == y), 1, 0),
            },
            args,
        ),
        "decode": compare(
            lambda k: ours.decode(ids[k]),
            lambda k: peer.decode(ids[k]),
            lambda x, y: {
                "decoded": (int(x[1].sum()), len(y), 0),
                "identical": (int(np.array_equal(x[0], y.astype(np.float32))), 1, 0),
            },
            args,
        ),
    }
    return pairs, {"tokens_a_chunk": sum(map(len, ids[0])) / args.chunks}


# Main

COMMANDS = {
    "rollout": rollout,
    "grpo": grpo_step,
    "sft": sft_step,
    "head": head_step,
    "fast": fast_codes,
    "cost": cost,
}


def hardware(device):
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{name[1] if name else platform.machine()}, 1 thread"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m tools.speed",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--size", choices=SIZES, help="backbone (head: tiny-vlm, else tiny)")
    add("--repeats", type=int, default=9, help="measured turns")
    add("--json", action="store_true", help="print the JSON line alone")
    add("--keep-memory", action="store_true", help="glibc keeps freed memory, for both sides")
    add("--prompts", type=int, default=4, help="rollout, grpo: prompts")
    add("--group", type=int, default=8, help="rollout, grpo: completions a prompt")
    add("--new", type=int, default=64, help="rollout, grpo: tokens a completion")
    add("--image", type=int, help="side of the images, pixels (tiny-vlm: 64, else 112)")
    add("--batch", type=int, help="sft: rows (24); head: frames (that of the preset)")
    add("--vl-layers", type=int, help="head: self-attention over the features (the preset's)")
    add("--chunks", type=int, default=4096, help="fast: chunks a batch")
    add("--peak-tflops", type=float, default=989.0, help="cuda: peak of the GPU in bf16")
    args = parser.parse_args(argv)
    args.ranks = int(os.environ.get("WORLD_SIZE", "0"))  # 0: not under torchrun
    if args.keep_memory and torch.cuda.is_available():
        parser.error("--keep-memory is for the CPU; hide the GPU: CUDA_VISIBLE_DEVICES=")
    if args.ranks and (args.command != "cost" or args.prompts % args.ranks):
        parser.error("under torchrun: cost, with --prompts a multiple of the ranks")
    args.size = args.size or ("tiny-vlm" if args.command == "head" else "tiny")
    args.image = args.image or (64 if args.size == "tiny-vlm" else 112)
    if args.size == "tiny-vlm" and args.command not in ("head", "fast"):
        parser.error("--size tiny-vlm is for head; choose tiny, 3b or 7b")
    if min(args.repeats, args.prompts, args.chunks) < 1 or min(args.group, args.new) < 2:
        parser.error("--repeats, --prompts, --chunks must be at least 1, --group, --new 2")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.keep_memory:
        model.setup(0)
    pairs, more = COMMANDS[args.command](args)
    trl = {"trl": sys.modules["trl"].__version__} if "trl" in sys.modules else {}
    record = {
        "benchmark": args.command,
        "pairs": pairs,
        "settings": {**vars(args), **more},
        "command": shlex.join(
            [
                *(["torchrun", "--nproc_per_node", str(args.ranks)] if args.ranks else ["python"]),
                "-m",
                "tools.speed",
                *argv,
            ]
        ),
        "hardware": hardware(args.device),
        "versions": {**model.versions(), **trl},
        "commit": model.commit(),
    }
    for name, pair in pairs.items() if not args.json else ():
        cells = (
            f"{k} {pair[k]['median']:.4g} ({pair[k]['q25']:.4g} .. {pair[k]['q75']:.4g})"
            for k in ("ours", "peer", "ratio")
            if k in pair
        )
        print(
            f"{args.command} {name}, {pair.get('unit', 'skipped')}: "
            f"{pair.get('skipped') or ', '.join(cells)}"
        )
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(record), flush=True)
    return record


if __name__ == "__main__":
    model.run_main(main, "--prompts, --group or --batch")
