"""Our code against its peers, taking turns in one process: rollout, GRPO, SFT, head training, FAST.

In: nothing; weights are random and data synthetic. Out: a line a pair, then one JSON line with both
medians, quartiles and the ratio (peer / ours). Both sides start from the same weights and inputs,
run once unmeasured, and what they did is compared at each turn (tokens, losses, ids): a difference
is an error. On CPU: one thread, process CPU seconds, which a busy machine disturbs less than wall
time; on cuda wall seconds between synchronisations. In doubt the peer is favoured: its batches are
made before the clock starts (rollout), gradient checkpointing is off (TRL). Both sides run in a
process as it comes, without our scripts' setting of glibc (model.keep_freed_memory); --keep-memory
gives it to both. In rollout and grpo the end of the turn is banned: all have --new-tokens tokens.

python -m tools.speed rollout                       # transformers generate
python -m tools.speed grpo --image 224              # a step of TRL; full rows in the update
python -m tools.speed sft --device cuda --size 3b   # plain transformers, padded rows
python -m tools.speed head                          # the frozen backbone in the loop
python -m tools.speed fast                          # the published code, chunk by chunk
python -m tools.speed input --image 256             # ours alone: loader threads, encoded episodes
python -m tools.speed cost --repeats 3              # ours alone: group, completion, image grow
torchrun --nproc_per_node 2 -m tools.speed cost --repeats 3   # and with ranks: wall seconds

After the two sections that all share, each section is one of these commands.
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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
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
from fast_tokenizer import (
    CODECS,
    EpisodeFile,
    FastTokenizer,
    count,
    encode_frames,
    natural,
    positive,
    read_episodes,
    write_episodes,
)
from tools import backbones

HORIZON = 16  # steps of a chunk, K
ACTION_DIM = 7  # A
STATE_DIM = 8  # S
ACTION_TOKENS = 1024  # vocabulary of the action tokenizer
QUESTION = "put the {}red block to the left of the blue bowl"


# ---- Weights and inputs -------------------------------------------------------------------------

SIZES = {"3b": "qwen2.5-vl-3b", "7b": "qwen2.5-vl-7b", "tiny-vlm": "tiny-vlm", "tiny": "speed"}
ADDED_TOKENS = ACTION_TOKENS + 2 + len(model.SPECIAL_TOKENS) + len(model.TAGS)  # 2: start and end
backbones.SIZES["speed"] = backbones.Size(
    vocab_size=4096 - ADDED_TOKENS,
    hidden=256,
    layers=4,
    heads=8,
    kv_heads=4,
    mlp=768,
    rope_theta=1e6,
    vision_hidden=128,
    vision_mlp=512,
    patch=14,
    pixel_bounds=(4 * 28**2, 4096 * 28**2),
)


class Question(NamedTuple):
    """What a prompt is made of."""

    text: str
    image: np.ndarray  # uint8 (side, side, 3)


def make_backbone(args: argparse.Namespace) -> model.Backbone:
    """Random weights, bf16 on GPU, with FAST tokens; "tiny-vlm" is shaped as the embedded one."""
    dtype = model.compute_dtype(args.device)
    if args.size == "tiny-vlm":
        backbone = backbones.random_backbone("tiny-vlm")
        backbone.net.to(args.device, dtype)
        return backbone
    texts = [*backbones.SENTENCES * 20, " ".join(random_words(6000, 0))]
    backbone = backbones.random_backbone(SIZES[args.size], 0, texts, args.device)
    backbone.net.to(dtype)
    backbone.action_tokenizer = fitted_tokenizer()
    sft.grow_vocabulary(backbone, ACTION_TOKENS)
    # the end of the turn too; there are no unused rows
    banned = backbone.tokenizer.convert_tokens_to_ids(model.SPECIAL_TOKENS)
    backbone.vocab = replace(backbone.vocab, banned=banned)
    return backbone


def random_words(n: int, seed: int) -> list[str]:
    """n words of 3 to 8 small letters."""
    rng = model.rng(seed, "words")
    words = []
    for _ in range(n):
        letters = rng.integers(97, 123, rng.integers(3, 9))
        words.append(bytes(letters.tolist()).decode())
    return words


def smooth_chunks(n: int, seed: int | str) -> np.ndarray:
    """n chunks (n, K, A) in [-1, 1]; their power falls with frequency, as that of recorded ones."""
    coefficients = model.rng(0, "chunks", seed).normal(size=(n, HORIZON, ACTION_DIM))
    fall = 2 / (1 + np.arange(HORIZON)[:, None]) ** 1.8  # (K, 1)
    return np.tanh(idct(coefficients * fall, axis=1, norm="ortho")).astype(np.float32)


def fitted_tokenizer() -> FastTokenizer:
    """An action tokenizer that clips nothing: constant chunks have the largest coefficients."""
    constant = np.ones((2, HORIZON, ACTION_DIM)) * [[[1.0]], [[-1.0]]]
    chunks = np.concatenate([smooth_chunks(8192, "fit"), constant])
    return FastTokenizer.fit(chunks, ACTION_TOKENS, 10)


def questions(n: int, side: int) -> list[Question]:
    """n questions about images of so many pixels a side; the texts differ in length."""
    images = model.rng(0, "images").integers(0, 256, (n, side, side, 3), np.uint8)
    items = []
    for i, image in enumerate(images):
        instruction = QUESTION.format("far " * (i % 3))
        question = model.ask(model.action_question(instruction), think=True)
        items.append(Question("<image>" + question, image))
    return items


def prompt_rows(backbone: model.Backbone, items: list[Question]) -> list[dict]:
    rows = []
    for item in items:
        messages = [{"role": "user", "content": item.text}]
        rows.append(model.encode(backbone, messages, [item.image], prompt_only=True))
    return rows


def lengths(rows: list[dict]) -> list[int]:
    return [len(row["ids"]) for row in rows]


def plain_inputs(
    backbone: model.Backbone, rows: list[dict], device: str, left: bool = False
) -> tuple[dict, torch.Tensor]:
    """Rows -> arguments of transformers' own forward, and where targets are (B, T)."""
    batch = model.to_device(model.collate(rows, backbone.vocab.pad, left), device)
    inputs = {
        "input_ids": batch["ids"],
        "attention_mask": batch["mask"],
        "mm_token_type_ids": (batch["ids"] == backbone.vocab.image).int(),
        "pixel_values": model.cut_patches(batch["pixels"], batch["grid"], backbone.image_spec),
        "image_grid_thw": batch["grid"],
    }
    return inputs, batch["target"]


# ---- Measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quartiles:
    """Of one figure over the measured turns."""

    median: float
    q25: float
    q75: float
    n: int  # turns

    @classmethod
    def of(cls, values: np.ndarray) -> "Quartiles":
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median=median, q25=low, q75=high, n=len(values))


class Work(NamedTuple):
    """A number of what each side did in a turn; they may differ by a share of the larger one."""

    ours: float
    peer: float
    tolerance: float = 0


@dataclass
class Pair:
    """Our seconds beside a peer's for the same work."""

    ours: Quartiles
    peer: Quartiles
    ratio: Quartiles  # peer / ours in each turn
    unit: str  # of ours and peer
    work: dict[str, Work]  # of the last turn
    more: dict[str, float] = field(default_factory=dict)  # what else is known of this pair

    def record(self) -> dict:
        """As it is printed and stands in results/speed.jsonl."""
        work = {name: {"ours": w.ours, "peer": w.peer} for name, w in self.work.items()}
        return {
            "ours": asdict(self.ours),
            "peer": asdict(self.peer),
            "ratio": asdict(self.ratio),
            "unit": self.unit,
            "work": work,
            **self.more,
        }


@dataclass(frozen=True)
class Comparison:
    """What a command has measured."""

    pairs: dict[str, Pair]
    settings: dict  # what the flags do not say: lengths of the prompts and so on
    skipped: dict[str, str] = field(default_factory=dict)  # pair -> what to install for it

    def record(self) -> dict[str, dict]:
        measured = {name: pair.record() for name, pair in self.pairs.items()}
        return measured | {name: {"skipped": why} for name, why in self.skipped.items()}


def clock(args: argparse.Namespace) -> float:
    """Seconds; of the process's CPU time, or on the wall: on a GPU, of several ranks or threads."""
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() if args.on_the_wall else time.process_time()


def compare(
    ours: Callable[[int], Any],
    peer: Callable[[int], Any],
    work: Callable[[Any, Any], dict[str, Work]],
    args: argparse.Namespace,
) -> Pair:
    """ours(turn) and peer(turn) one after the other, turn 0 unmeasured.

    work: of what ours returned and what the peer returned. ValueError when they did not do the
    same."""
    spent = []
    for turn in range(args.repeats + 1):
        times = [clock(args)]
        results = []
        for side in (ours, peer):
            results.append(side(turn))
            times.append(clock(args))
        spent.append(np.diff(times))
        done = work(*results)
        check_work(done, turn)
    ours_seconds, peer_seconds = np.array(spent[1:]).T  # (turns,) each
    return Pair(
        ours=Quartiles.of(ours_seconds),
        peer=Quartiles.of(peer_seconds),
        ratio=Quartiles.of(peer_seconds / ours_seconds),
        unit="s" if args.on_the_wall else "CPU s",
        work=done,
    )


def check_work(work: dict[str, Work], turn: int) -> None:
    for name, (ours, peer, tolerance) in work.items():
        if not abs(ours - peer) <= tolerance * max(abs(ours), abs(peer)):
            raise ValueError(
                f"turn {turn}: {name} is {ours} in ours, {peer} in the peer; they do not "
                "do the same work, so a ratio would mean nothing"
            )


def timed(run: Callable[[], Any], args: argparse.Namespace) -> float:
    """Median seconds of run(), which has no peer."""
    pair = compare(lambda turn: run(), lambda turn: None, lambda ours, peer: {}, args)
    return pair.ours.median


def same_tokens(ours: torch.Tensor, peer: torch.Tensor) -> dict[str, Work]:
    """Of masks of sampled tokens, or of their sums."""
    return {"tokens": Work(int(ours.sum()), int(peer.sum()))}


def training_step(
    loss: torch.Tensor, net: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """What follows the loss, alike on both sides. -> the loss, detached."""
    loss.backward()
    model.clip_gradients(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


# ---- rollout ------------------------------------------------------------------------------------


def rollout(args: argparse.Namespace) -> Comparison:
    """model.generate against transformers' generate, which forwards a prompt once a completion; on
    a GPU also with its steps replayed as CUDA graphs against without."""
    # 1. the same prompts for both
    backbone = make_backbone(args)
    rows = prompt_rows(backbone, questions(args.prompts, args.image))
    inputs, _ = plain_inputs(backbone, rows, args.device, left=True)
    inputs |= {
        "suppress_tokens": backbone.vocab.banned,
        "max_new_tokens": args.new_tokens,
        "min_new_tokens": args.new_tokens,
    }
    prompt_length = inputs["input_ids"].shape[1]
    backbone.net.eval()

    # 2. sample
    def ours(turn, cuda_graphs=True):
        samples = model.generate(
            backbone, rows, args.group, args.new_tokens, seed=turn, cuda_graphs=cuda_graphs
        )
        return samples["mask"]  # (B*G, T)

    def peer(turn):
        torch.manual_seed(turn)
        ids = backbone.net.generate(
            **inputs, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=args.group
        )
        return ids[:, prompt_length:] != backbone.vocab.pad

    pair = compare(ours, peer, same_tokens, args)

    # 3. greedily both must give the same tokens, but for near ties, and in bf16
    our_ids = model.generate(backbone, rows, 1, args.new_tokens, greedy=True)["ids"]
    peer_ids = backbone.net.generate(**inputs, do_sample=False)[:, prompt_length:]
    pair.more["greedy_agreement"] = (our_ids == peer_ids).float().mean().item()

    # 4. what only a GPU has: a limit by its bandwidth, and graphs
    pairs = {"rollout": pair}
    if args.device != "cpu":
        pair.more |= decode_bound(backbone, rows, prompt_length, pair.ours.median, args)
        pairs["graphs"] = compare(
            lambda turn: ours(turn, cuda_graphs=True).sum(),
            lambda turn: ours(turn, cuda_graphs=False).sum(),
            same_tokens,
            args,
        )
    return Comparison(pairs, {"prompt_tokens": lengths(rows)})


def decode_bound(
    backbone: model.Backbone,
    rows: list[dict],
    prompt_length: int,
    seconds: float,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Decoding reads all weights and the cache (prompts once) at each token: how near to that. With
    many rows arithmetic, 2 FLOP a weight and row, takes longer than reading.

    seconds: of a whole rollout of rows, with prompts of prompt_length tokens when padded."""
    # 1. what a step reads and computes
    language = backbone.net.model.language_model
    weights = [*language.layers.parameters(), backbone.net.lm_head.weight]
    weight_bytes = sum(p.nbytes for p in weights)
    kv_width = language.layers[0].self_attn.k_proj.out_features
    layers = backbone.net.config.text_config.num_hidden_layers
    token_bytes = 2 * layers * kv_width * backbone.net.dtype.itemsize
    # in the cache, on average over the steps
    cached_tokens = len(rows) * (prompt_length + args.group * args.new_tokens / 2)
    read_bytes = weight_bytes + cached_tokens * token_bytes
    flop = 2 * len(rows) * args.group * sum(p.numel() for p in weights)

    # 2. how fast this memory is
    block = torch.empty(1 << 30, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(block)
    bandwidth = 2 * block.nbytes / timed(lambda: target.copy_(block), args)  # it reads and writes

    # 3. how long a step takes: a rollout of one token is prompts alone
    prompt_seconds = timed(lambda: model.generate(backbone, rows, args.group, 1), args)
    step_seconds = (seconds - prompt_seconds) / (args.new_tokens - 1)
    return {
        "copy_gb_s": bandwidth / 1e9,
        "read_gb_step": read_bytes / 1e9,
        "step_s": step_seconds,
        "bound_step_s": read_bytes / bandwidth,
        "share_of_bound": read_bytes / bandwidth / step_seconds,
        "arithmetic_step_s": flop / (args.peak_tflops * 1e12),
    }


# ---- grpo ---------------------------------------------------------------------------------------

OUR_REWARD = grpo.reward  # while we measure, score() stands in its place


def score(backbone, ids, targets, kind="prefix", think=True):
    """The reward plus a number in [0, 1) made of the ids: random weights earn nothing, and groups
    that tie would cost us nothing. Arguments and results are those of grpo.reward."""
    rewards, info = OUR_REWARD(backbone, ids, targets, kind, think)
    return rewards + [zlib.crc32(np.array(row)) / 2**32 for row in ids], info


def full_rows_logp(backbone, rows, ids, mask, temperature=1.0):
    """grpo.completion_logp by B*G full rows, padded right; here all completions have T tokens."""
    G = len(ids) // len(rows)
    T = ids.shape[1]
    full_rows = []
    for i, completion in enumerate(ids.cpu().numpy()):
        prompt = rows[i // G]
        after = prompt["positions"].max() + 1 + np.arange(T)
        full_rows.append(
            prompt
            | {
                "ids": np.concatenate([prompt["ids"], completion]),
                "positions": np.concatenate([prompt["positions"], np.tile(after, (3, 1))], -1),
                "target": np.concatenate([prompt["target"], np.ones(T, bool)]),
            }
        )
    batch = model.to_device(model.collate(full_rows, backbone.vocab.pad), ids.device)
    hidden = model.hidden_states(backbone.net, batch)  # (B*G, longest, D)
    predicts = batch["target"][:, 1:]  # a position predicts the token after it
    hidden = hidden[:, :-1][predicts]  # (B*G*T, D), ordered as the ids
    logp = grpo.token_logp(backbone.net, hidden, ids.flatten(), temperature, backbone.vocab.banned)
    return logp.view_as(ids)


class GrpoStep:
    """What a step of grpo.py is made of, with all prompts in one update, and KL."""

    def __init__(self, args: argparse.Namespace):
        if args.ranks:  # as grpo.py runs
            model.keep_freed_memory()
            self.dist = model.setup(0)
        else:
            self.dist = model.Dist(0, 1, torch.device(args.device))
        self.backbone = make_backbone(args)
        self.cfg = grpo.Config(
            prompts=args.prompts,
            batch=args.prompts,
            micro_batch=args.prompts,
            group=args.group,
            max_new_tokens=args.new_tokens,
        )
        items = questions(args.prompts, args.image)
        self.items = items[self.dist.rank :: self.dist.world_size]  # this rank's
        chunks = smooth_chunks(len(self.items), "gold")
        self.targets = self.backbone.action_tokenizer.encode(chunks)
        net = copy.deepcopy(self.backbone.net).requires_grad_(False).eval()
        self.reference = replace(self.backbone, net=net)
        if args.ranks:
            model.shard(self.backbone.net, self.dist)
            model.shard(self.reference.net, self.dist)

    def sample(self, turn: int) -> list:
        """Encodes the prompts, samples and scores: the groups of a step."""
        with mock.patch.object(grpo, "reward", score):
            rows = prompt_rows(self.backbone, self.items)
            numbers = range(len(self.items))
            with model.unsharded(self.backbone.net):
                return grpo.rollout(
                    self.backbone, self.cfg, rows, self.targets, numbers, turn, self.cfg.group
                )[0]

    def make_update(self, full_rows: bool = False) -> Callable[[list, int], dict]:
        """-> update(groups, turn), which returns its metrics. full_rows: of a copy of the net, by
        full_rows_logp."""
        learner = self.backbone
        completion_logp = grpo.completion_logp
        if full_rows:
            learner = replace(self.backbone, net=copy.deepcopy(self.backbone.net))
            completion_logp = full_rows_logp
        cfg = self.cfg
        optimizer = model.make_optimizer(learner.net, cfg.lr, cfg.weight_decay, (0.9, cfg.beta2))

        def update(groups, turn):
            with mock.patch.object(grpo, "completion_logp", completion_logp):
                learner.net.train()
                return grpo.update_step(
                    learner, self.reference, optimizer, groups, cfg, self.dist, f"turn {turn}"
                )

        return update


def grpo_step(args: argparse.Namespace) -> Comparison:
    """A whole step (encode, sample, score, update) against TRL's, and the update alone against one
    on full rows."""
    # 1. the update alone, on the same groups
    step = GrpoStep(args)
    groups = step.sample(0)
    ours = step.make_update()
    peer = step.make_update(full_rows=True)
    loose = 1e-3 if args.device == "cpu" else 0.1  # bf16; and the differences of the steps add up

    def same_update(our_metrics, peer_metrics):
        return {
            "forwarded": Work(our_metrics["forwarded"], peer_metrics["forwarded"]),
            "grad_norm": Work(our_metrics["grad_norm"], peer_metrics["grad_norm"], loose),
        }

    pairs = {}
    skipped = {}
    pairs["update"] = compare(
        lambda turn: ours(groups, turn),
        lambda turn: peer(groups, turn),
        same_update,
        args,
    )
    # 2. the whole step
    if importlib.util.find_spec("trl"):
        with tempfile.TemporaryDirectory() as folder:
            pairs["step"] = compare(
                lambda turn: ours(step.sample(turn), turn)["forwarded"],
                trl_step(step, folder),
                lambda our_tokens, peer_tokens: {"tokens": Work(our_tokens, peer_tokens)},
                args,
            )
    else:
        skipped["step"] = "pip install trl==1.16.0"
    prompt_tokens = lengths(prompt_rows(step.reference, step.items))
    return Comparison(pairs, {"prompt_tokens": prompt_tokens}, skipped)


def trl_step(ours: GrpoStep, folder: str) -> Callable[[int], int]:
    """-> step(turn): one step of TRL's GRPOTrainer from our reference, with our settings, without
    the logging and data loading of its loop; it returns the number of completion tokens.

    folder: where the reference is written, for TRL loads it from where the policy came from."""
    import datasets
    import trl

    backbone = ours.reference
    cfg = ours.cfg
    # 1. weights and data
    backbone.net.save_pretrained(folder)
    backbone.image_spec.save(folder)
    examples = []
    for item, target in zip(ours.items, ours.targets, strict=True):
        messages = [{"role": "user", "content": item.text.removeprefix("<image>")}]
        image = Image.fromarray(item.image)
        examples.append({"prompt": messages, "image": image, "target": target})
    dataset = datasets.Dataset.from_list(examples)

    # 2. settings
    config = trl.GRPOConfig(
        folder,
        use_cpu=backbone.net.device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(examples) * cfg.group,
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
        rewards, _ = score(backbone, completion_ids, target, cfg.reward)
        return rewards.tolist()

    # 3. a trainer that has made its first step, in which it also makes its optimizer. A processor
    # is to have a part for videos too, which wants torchvision; not here.
    lenient = mock.patch.object(
        transformers.Qwen3VLProcessor,
        "check_argument_for_proper_class",
        lambda self, name, part: type(part),
    )
    with contextlib.redirect_stdout(sys.stderr), lenient:
        processor = transformers.Qwen3VLProcessor(
            Qwen2VLImageProcessorPil.from_pretrained(folder),
            backbone.tokenizer,
            chat_template=backbone.tokenizer.chat_template,
        )
        net = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=backbone.net.dtype
        )
        trainer = trl.GRPOTrainer(net, reward, config, dataset, processing_class=processor)
        trainer.train()
        batch = next(iter(trainer.get_train_dataloader()))

    def step(turn):
        trainer.training_step(trainer.model_wrapped, batch, None)  # samples, scores, backward
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), cfg.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return int(trainer._buffered_inputs[0]["completion_mask"].sum())

    return step


# ---- sft ----------------------------------------------------------------------------------------


def conversation_rows(backbone: model.Backbone, items: list[Question]) -> list[dict]:
    """Questions with answers that differ much in length: half of them think, up to 59 words."""
    rng = model.rng(0, "answers")
    words = random_words(60, 1)
    rows = []
    for i, item in enumerate(items):
        thought = ""
        if i % 2:
            thought = f"<think>{' '.join(words[: rng.integers(60)])}</think>"
        action_ids = backbone.action_tokenizer.encode(smooth_chunks(1, i))[0]
        messages = [
            {"role": "user", "content": item.text},
            {"role": "assistant", "content": thought + model.action_answer(action_ids)},
        ]
        rows.append(model.encode(backbone, messages, [item.image]))
    return rows


def sft_step(args: argparse.Namespace) -> Comparison:
    """The step of sft.py (packed rows, logits where targets are) against right-padded rows and the
    loss that the net itself computes, from all logits."""
    backbone = make_backbone(args)
    rows = conversation_rows(backbone, questions(args.batch or 24, args.image))
    our_net = backbone.net.train()
    peer_net = copy.deepcopy(backbone.net)
    our_optimizer = model.make_optimizer(our_net, 2e-5, 0.01, (0.9, 0.999))
    peer_optimizer = model.make_optimizer(peer_net, 2e-5, 0.01, (0.9, 0.999))

    def packed(turn):
        batch = model.to_device(sft.pack(rows), args.device)
        sums = sft.token_loss(our_net, batch)
        return training_step(sums.loss / sums.tokens, our_net, our_optimizer)

    def padded(turn):
        inputs, is_target = plain_inputs(backbone, rows, args.device)
        labels = inputs["input_ids"].masked_fill(~is_target, -100)
        loss = peer_net(**inputs, labels=labels).loss
        return training_step(loss, peer_net, peer_optimizer)

    loose = 1e-4 if args.device == "cpu" else 0.02
    pair = compare(packed, padded, functools.partial(same_loss, loose), args)
    if args.device != "cpu":
        flop = training_flop(backbone.net, rows)
        peak = args.peak_tflops * 1e12
        pair.more["ours_mfu"] = flop / pair.ours.median / peak
        pair.more["peer_mfu"] = flop / pair.peer.median / peak
    return Comparison({"step": pair}, {"row_tokens": lengths(rows)})


def same_loss(tolerance: float, ours: torch.Tensor, peer: torch.Tensor) -> dict[str, Work]:
    return {"loss": Work(ours.item(), peer.item(), tolerance)}


def training_flop(net: torch.nn.Module, rows: list[dict]) -> int:
    """6 x parameters x tokens, each part for what it must see: the head targets, the tower patches.
    What attention multiplies is not counted."""
    seen = [
        (net.model.language_model.layers, sum(lengths(rows))),
        (net.lm_head, sum(int(row["target"].sum()) for row in rows)),
        (net.model.visual, sum(int(row["grid"].prod(1).sum()) for row in rows)),
    ]
    total = 0
    for part, tokens in seen:
        total += 6 * tokens * sum(p.numel() for p in part.parameters())
    return total


# ---- head ---------------------------------------------------------------------------------------


def write_noise_episodes(folder: str, side: int) -> None:
    """4 episodes of 24 steps of noise, images of so many pixels a side."""
    for number in range(4):
        rng = model.rng(0, "episode", number)
        arrays = {
            "image": rng.integers(0, 256, (24, side, side, 3), np.uint8),
            "state": rng.normal(size=(24, STATE_DIM)).astype(np.float32),
            "action": smooth_chunks(24, number)[:, 0],
        }
        path = Path(folder) / f"episode_{number}.safetensors"
        save_file(arrays, path, {"task": QUESTION.format("")})


def head_step(args: argparse.Namespace) -> Comparison:
    """The step of vla.py on cached features against the same with the frozen backbone in the loop;
    the head of the speedrun preset, at 3b and 7b that of the paper's."""
    # 1. settings
    settings = dict(vla.PRESETS["paper" if args.size in ("3b", "7b") else "speedrun"])
    if args.batch is not None:
        settings["batch"] = args.batch
    if args.vl_layers is not None:
        settings["vl_layers"] = args.vl_layers
    with tempfile.TemporaryDirectory() as folder:
        # 2. features, from the disk or from the backbone
        write_noise_episodes(folder, args.image)
        one_camera = {"data": folder, "out": f"{folder}/out", "cameras": "image"}
        cfg = vla.Config(**{**settings, **one_camera})
        backbone = make_backbone(args)
        dist = model.Dist(0, 1, torch.device(args.device))
        frames = vla.FrameDataset(cfg)
        vla.freeze_backbone(backbone, cfg.layer)
        cached = vla.build_cache(backbone, frames, cfg, dist)
        live = vla.LiveFeatures(backbone, frames, cfg, dist.device)

        # 3. twice the same head
        torch.manual_seed(0)
        head_config = vla.HeadConfig(
            vl_dim=backbone.net.config.text_config.hidden_size,
            dim=cfg.dim,
            layers=cfg.layers,
            heads=cfg.heads,
            vl_layers=cfg.vl_layers,
            state_dim=STATE_DIM,
            action_dim=ACTION_DIM,
            horizon=cfg.horizon,
            future_tokens=cfg.future_tokens,
        )
        our_head = vla.FlowHead(head_config).to(args.device)
        peer_head = copy.deepcopy(our_head)

        # 4. train
        def make_step(head, source):
            betas = (cfg.beta1, cfg.beta2)
            optimizer = model.make_optimizer(head, cfg.lr, cfg.weight_decay, betas, cfg.muon)

            def step(turn):
                frame_ids = vla.sample_order(cfg, frames.train, turn)
                fetched = vla.Fetched(frame_ids, source.read(frame_ids))
                loss, _ = vla.flow_loss(head, source, frames, cfg, turn, fetched, dist)
                return training_step(loss, head, optimizer)

            return step

        pair = compare(
            make_step(our_head, cached),
            make_step(peer_head, live),
            functools.partial(same_loss, 0.02),  # the cache holds 16 bits a number
            args,
        )
        prompt_tokens = len(live.read([0])[0]["ids"])
    more = {"prompt_tokens": prompt_tokens, "head": repr(our_head.cfg), "frames": cfg.batch}
    return Comparison({"step": pair}, more)


# ---- fast ---------------------------------------------------------------------------------------


class PublishedFast:
    """FAST as physical-intelligence/fast codes it (arXiv 2501.09747), chunk by chunk through a
    tokenizer of transformers; on our vocabulary, for the same ids, hence without its byte level."""

    def __init__(self, ours: FastTokenizer):
        bpe = Tokenizer.from_str(ours.bpe.to_str())
        bpe.decoder = decoders.Fuse()
        self.bpe = transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe, clean_up_tokenization_spaces=False
        )
        self.scale = ours.scale
        self.min_token = ours.min_coef

    def encode(self, chunks: np.ndarray) -> list[list[int]]:
        ids = []
        for chunk in chunks:
            coefficients = np.around(dct(chunk[None], axis=1, norm="ortho") * self.scale)
            codes = np.maximum(coefficients.flatten() - self.min_token, 0).astype(int)
            ids.append(self.bpe("".join(map(chr, codes)))["input_ids"])
        return ids

    def decode(self, ids: list[list[int]]) -> np.ndarray:
        chunks = []
        for chunk_ids in ids:
            codes = np.array(list(map(ord, self.bpe.decode(chunk_ids))))
            coefficients = (codes + self.min_token).reshape(-1, ACTION_DIM)  # (K, A)
            chunks.append(idct(coefficients / self.scale, axis=0, norm="ortho"))
        return np.stack(chunks)


def fast_codes(args: argparse.Namespace) -> Comparison:
    """FastTokenizer on a batch against the published code. Each turn has fresh chunks and each side
    its own BPE, because a BPE remembers what it has encoded."""
    ours = fitted_tokenizer()
    peer = PublishedFast(ours)
    chunks = [smooth_chunks(args.chunks, turn) for turn in range(args.repeats + 1)]
    third = fitted_tokenizer()
    ids = [third.encode(batch) for batch in chunks]

    def same_ids(our_ids, peer_ids):
        return {
            "tokens": Work(count_tokens(our_ids), count_tokens(peer_ids)),
            "identical": Work(int(our_ids == peer_ids), 1),
        }

    def same_chunks(our_result, peer_chunks):
        our_chunks, ok = our_result
        identical = np.array_equal(our_chunks, peer_chunks.astype(np.float32))
        return {
            "decoded": Work(int(ok.sum()), len(peer_chunks)),
            "identical": Work(int(identical), 1),
        }

    pairs = {
        "encode": compare(
            lambda turn: ours.encode(chunks[turn]),
            lambda turn: peer.encode(chunks[turn]),
            same_ids,
            args,
        ),
        "decode": compare(
            lambda turn: ours.decode(ids[turn]),
            lambda turn: peer.decode(ids[turn]),
            same_chunks,
            args,
        ),
    }
    return Comparison(pairs, {"tokens_a_chunk": count_tokens(ids[0]) / args.chunks})


def count_tokens(ids: Iterable[list[int]]) -> int:
    return sum(len(row) for row in ids)


# ---- input --------------------------------------------------------------------------------------


def photos(n: int, side: int) -> list[Image.Image]:
    """Blots of all sizes and a little noise: a JPEG of one is about as large as a photo's."""
    rng = model.rng(0, "photos")
    pictures = []
    for _ in range(n):
        values = rng.normal(0, 4, (side, side, 3))
        for blots in (4, 16, 64):
            small = Image.fromarray(rng.integers(0, 256, (blots, blots, 3), np.uint8))
            values += np.asarray(small.resize((side, side), Image.BICUBIC)) / 3.0
        pictures.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    return pictures


def sft_input(args: argparse.Namespace) -> Comparison:
    """Our own loading, beside a plainer way of it: rows of SFT with a photo of a megapixel by
    several threads, beside one (seconds on the wall); frames of episodes with --image pixels a side
    as PNG or JPEG, beside raw ones."""
    backbone = make_backbone(args)
    pairs = {}
    with tempfile.TemporaryDirectory() as folder:
        # 1. rows by threads
        source = write_photo_rows(Path(folder), 16)

        def load(threads, turn):
            with ThreadPoolExecutor(threads) as pool:
                loading = [
                    pool.submit(sft.load_row, backbone, source, i, 8192) for i in source.train
                ]
                return sum(len(future.result()["ids"]) for future in loading)

        on_the_wall = argparse.Namespace(**{**vars(args), "on_the_wall": True})
        for threads in (2, 4):
            pair = compare(
                functools.partial(load, threads),
                functools.partial(load, 1),
                lambda ours, peer: {"tokens": Work(ours, peer)},
                on_the_wall,
            )
            pair.more["ms_a_megapixel"] = 1000 * pair.ours.median / len(source.train)
            pairs[f"{threads} threads"] = pair

        # 2. frames of episodes
        frames = np.stack([np.asarray(photo) for photo in photos(64, args.image)])
        episodes = {"raw": write_photo_episode(folder, frames, "raw")}
        for codec in CODECS:
            episodes[codec] = write_photo_episode(folder, frames, codec)
            pair = compare(
                lambda turn, codec=codec: read_frames(episodes[codec]),
                lambda turn: read_frames(episodes["raw"]),
                lambda ours, peer: {"bytes": Work(ours, peer)},
                args,
            )
            pair.more["ms_a_frame"] = 1000 * pair.ours.median / (READS * len(frames))
            pair.more["bytes_a_frame"] = len(episodes[codec].path.read_bytes()) / len(frames)
            pairs[codec] = pair
    return Comparison(pairs, {"rows": len(source.train), "frames": len(frames)})


READS = 8  # of each frame in a turn


def read_frames(episode: EpisodeFile) -> int:
    """All frames some times -> their bytes."""
    return sum(episode.frame(t).nbytes for _ in range(READS) for t in range(len(episode)))


def write_photo_rows(folder: Path, n: int) -> model.ConversationDataset:
    lines = []
    for i, photo in enumerate(photos(n, 1024)):
        photo.save(folder / f"{i}.jpg", quality=90)
        messages = [
            {"role": "user", "content": "<image>" + QUESTION.format("")},
            {"role": "assistant", "content": "done"},
        ]
        lines.append(json.dumps({"images": [f"{i}.jpg"], "messages": messages}) + "\n")
    (folder / "photos.jsonl").write_text("".join(lines))
    return model.ConversationDataset(folder / "photos.jsonl", None, 0)


def write_photo_episode(folder: str, frames: np.ndarray, codec: str) -> EpisodeFile:
    arrays = {
        "image": frames,
        "state": np.zeros((len(frames), STATE_DIM), np.float32),
        "action": np.zeros((len(frames), ACTION_DIM), np.float32),
    }
    header = {"task": QUESTION.format(""), "fps": "5", "source": "photos"}
    if codec != "raw":
        encoded, encoded_header = encode_frames(frames, "image", codec)
        arrays |= encoded
        header |= encoded_header
    out = Path(folder, codec)
    with contextlib.redirect_stdout(sys.stderr):
        write_episodes(out, [(arrays, header)])
    return read_episodes(out)[0]


# ---- cost ---------------------------------------------------------------------------------------


def cost(args: argparse.Namespace) -> Comparison:
    """Our own seconds of a rollout and an update, as one setting at a time grows; under torchrun on
    that many ranks, which share the prompts."""
    start = {"group": args.group, "new_tokens": args.new_tokens, "image": args.image}
    changes = [{}]
    for name, value in start.items():
        changes += [{name: 2 * value}, {name: 4 * value}]
    table = []
    for change in changes:
        step = GrpoStep(argparse.Namespace(**{**vars(args), **change}))
        groups = step.sample(0)
        update = step.make_update()
        row = {
            **start,
            **change,
            "prompt": max(lengths(prompt_rows(step.reference, step.items))),
            "rollout": timed(functools.partial(step.sample, 1), args),
            "update": timed(functools.partial(update, groups, 0), args),
        }
        table.append(row)
        if is_first_rank():
            print("  ".join(f"{k} {v:<7.4g}" for k, v in row.items()), file=sys.stderr)
    return Comparison({}, {"cost": table})


# ---- Command line -------------------------------------------------------------------------------

COMMANDS = {
    "rollout": rollout,
    "grpo": grpo_step,
    "sft": sft_step,
    "head": head_step,
    "fast": fast_codes,
    "input": sft_input,
    "cost": cost,
}


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def hardware(device: str) -> str:
    """What a figure was measured on."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", path.read_text()) if path.exists() else None
    return f"{name[1] if name else platform.machine()}, 1 thread"


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, with the defaults that depend on others filled in."""
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
    add("--repeats", type=count, default=9, help="measured turns")
    add("--json", action="store_true", help="print the JSON line alone")
    add("--keep-memory", action="store_true", help="glibc keeps freed memory, for both sides")
    add("--prompts", type=count, default=4, help="rollout, grpo, cost: prompts")
    add("--group", type=count, default=8, help="rollout, grpo, cost: completions a prompt")
    add("--new-tokens", type=count, default=64, help="rollout, grpo, cost: tokens a completion")
    add("--image", type=count, help="side of the images, pixels (tiny-vlm: 64, else 112)")
    add("--batch", type=count, help="sft: rows (24); head: frames (that of the preset)")
    add("--vl-layers", type=natural, help="head: self-attention over the features (the preset's)")
    add("--chunks", type=count, default=4096, help="fast: chunks a batch")
    add("--peak-tflops", type=positive, default=989.0, help="cuda: peak of the GPU in bf16")
    args = parser.parse_args(argv)
    args.ranks = int(os.environ.get("WORLD_SIZE", "0"))  # 0: not under torchrun
    args.on_the_wall = args.ranks > 0 or args.device == "cuda"
    args.size = args.size or ("tiny-vlm" if args.command == "head" else "tiny")
    args.image = args.image or (64 if args.size == "tiny-vlm" else 112)

    if args.keep_memory and torch.cuda.is_available():
        parser.error("--keep-memory is for the CPU; hide the GPU: CUDA_VISIBLE_DEVICES=")
    if args.ranks and (args.command != "cost" or args.prompts % args.ranks):
        parser.error("under torchrun: cost, with --prompts a multiple of the ranks")
    if args.size == "tiny-vlm" and args.command not in ("head", "fast"):
        parser.error("--size tiny-vlm is for head; choose tiny, 3b or 7b")
    if min(args.group, args.new_tokens) < 2:
        parser.error("--group and --new-tokens must be at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch knows")
    return args


def make_record(argv: list[str], args: argparse.Namespace, comparison: Comparison) -> dict:
    """A row of results/speed.jsonl."""
    start = ["python"]
    if args.ranks:
        start = ["torchrun", "--nproc_per_node", str(args.ranks)]
    versions = dict(model.versions())
    if "trl" in sys.modules:
        versions["trl"] = sys.modules["trl"].__version__
    return {
        "benchmark": args.command,
        "pairs": comparison.record(),
        "settings": {**vars(args), **comparison.settings},
        "command": shlex.join([*start, "-m", "tools.speed", *argv]),
        "hardware": hardware(args.device),
        "versions": versions,
        "commit": model.commit(),
    }


def print_pairs(command: str, comparison: Comparison) -> None:
    """A line a pair: medians, and quartiles in brackets."""
    for name, pair in comparison.pairs.items():
        cells = []
        for side in ("ours", "peer", "ratio"):
            value = getattr(pair, side)
            cells.append(f"{side} {value.median:.4g} ({value.q25:.4g} .. {value.q75:.4g})")
        print(f"{command} {name}, {pair.unit}: {', '.join(cells)}")
    for name, why in comparison.skipped.items():
        print(f"{command} {name}, skipped: {why}")


def main(argv: list[str] | None = None) -> dict:
    """-> the record that is printed."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model.quiet_libraries()
    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.keep_memory:
        model.keep_freed_memory()
    comparison = COMMANDS[args.command](args)
    record = make_record(argv, args, comparison)
    if not args.json:
        print_pairs(args.command, comparison)
    if is_first_rank():
        print(json.dumps(record), flush=True)
    return record


if __name__ == "__main__":
    model.run_main(main, "--prompts, --group or --batch")
