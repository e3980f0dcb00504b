"""Stage 3 of RoboAlign (arXiv 2603.21341): a flow-matching action head, as GR00T N1.5's, on the
features of one layer of the backbone, which stays frozen unless --backbone-lr trains it too.

In: a checkpoint of stage base, sft or grpo, and episodes (images, state, actions, instruction).
Out: a policy (images, instruction, state) -> the next K actions. It writes no text at run time:
reasoning acts through the features that RL shaped; with --condition the backbone first writes a
thought, which the head reads too. (TokenPolicy, which needs no stage 3, lets a checkpoint of sft or
grpo drive by the action tokens that it writes.)
1. cut the backbone after layer 0.64 L (18 of 28)
2. its hidden states over all image and text tokens of the action prompt are the features
3. the head reads them, and as one token the normalised state, which the backbone does not see
4. x_t = (1 - t) noise + t action; the head learns the velocity action - noise, masked past the end
5. 4 Euler steps from seeded noise give the chunk; q01/q99 statistics turn it into dataset units
Our deviations: the features of all frames are computed once and memory-mapped (--cache features);
several (time, noise) draws share a frame's features (--draws); averaged weights act (--ema-decay).

Reads --init, --data. Writes runs/vla/{log.jsonl, features/, step_*/, final/}.
OMP_NUM_THREADS=1 python vla.py              # tabletop; 12 minutes on one CPU core. With torchrun
                                             # --nproc_per_node N on N of them, or on N GPUs
python vla.py speedrun --init I --data D   # as in speedrun.sh: 8 minutes on one CPU core, 82.0% of
                                 # 200 trials succeed on the base [76.1, 86.7], 93.0 on SFT
                                 # [88.6, 95.8]
torchrun --nproc_per_node 8 vla.py paper --init runs/grpo-paper --data data/libero
                                 # 8 GPUs, both cameras; not run here at full size. An image of
                                 # 128 px (LIBERO as published) is 25 tokens for Qwen2.5-VL, one
                                 # of 256 px 81; for Qwen3-VL either is 64

Read first: Config, "Flow-matching head", main. "Data", "Thoughts" and "Features of the backbone"
can wait; "Policies" and "Carrying out chunks" are for who drives a robot.

Legend: B frames of a batch, R draws of a frame, K chunk length, A action dimensions, S state
dimensions, T tokens of a prompt, F future tokens, Q query tokens of a block, N frames of the data,
D width, H attention heads, d head width, L layers of the backbone. A mask is 1 where it counts.
"""

import argparse
import bisect
import copy
import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np

from fast_tokenizer import (
    STILL,
    BelowOne,
    Count,
    Natural,
    NonNegative,
    Positive,
    Share,
    Stats,
    action_chunks,
    answer_help,
    check_stats,
    chunk_starts,
    count,
    episodes_sha256,
    join_splits,
    normalize,
    open_arrays,
    positive,
    rare_lines,
    read_episodes,
    read_stats,
    reading,
    require_instructions,
    split_episodes,
    split_record,
    unnormalize,
    warn_of_other_split,
)

if __name__ == "__main__":
    answer_help(__file__)  # --help need not wait for torch

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import model
from model import THINK_END, Backbone, Dist, Row, TokenSums, encode_thought, with_thought

# ---- Config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    preset: str = ""

    # data
    data: str = "data/tabletop/episodes"  # folder of episodes and stats.json
    cameras: str = "image"  # camera names of the episodes, separated by commas
    max_episodes: Natural = 0  # only the first episodes; 0: all
    stride: Count = 1  # use every stride-th frame of an episode: neighbours say nearly the same
    holdout_share: BelowOne = 0.05  # of the episodes, drawn at random, for evaluation; 0: none
    horizon: Count = 8  # actions in a chunk, K

    # features of the backbone
    init: str = "runs/grpo"  # checkpoint of stage base, sft or grpo; or hub name
    layer: Natural = 0  # LLM layer whose output conditions the head; 0: 0.64 of the depth
    think: bool = False  # the prompt asks for a thought; --condition thought does so by itself
    condition: str = "prompt"  # what the head reads
    thoughts: str = "own"  # own: the model's, by its most probable tokens; recorded: the episodes'
    max_thought: Count = 64  # tokens of an own thought at most
    max_pixels: Natural = 0  # larger images are shrunk to so many pixels; 0: as the backbone says
    backbone_lr: NonNegative = 0.0  # peak learning rate of what lies up to --layer; 0: frozen
    ce_weight: NonNegative = 0.0  # of its action tokens' cross-entropy, it trains all; 0: none

    # head
    dim: Count = 128  # width of the head
    layers: Count = 4  # blocks of the head; 0, 2, ... read the features
    heads: Count = 4  # attention heads
    vl_layers: Natural = 1  # self-attention blocks over the features; 0: none
    future_tokens: Natural = 4  # learned tokens between state and actions
    dropout: BelowOne = 0.0  # in the head

    # schedule
    seed: Natural = 0  # order of the frames, noise, initial weights of the head
    steps: Natural = 2000  # optimizer steps
    batch: Count = 64  # frames a step, over all ranks
    draws: Count = 2  # (time, noise) pairs a frame and step, which share its features

    # optimizer
    lr: Positive = 1e-3  # peak learning rate
    warmup_ratio: Share = 0.05  # share of the steps; cosine to 0 after it
    beta1: BelowOne = 0.95  # AdamW
    beta2: BelowOne = 0.999  # AdamW
    weight_decay: NonNegative = 1e-5  # AdamW, not on norms and biases
    max_grad_norm: NonNegative = 1.0  # gradient norm; 0: no clipping
    muon: bool = False  # the head's inner matrices by orthogonalised momentum (Muon), not AdamW
    ema_decay: BelowOne = 0.999  # decay of the averaged head that the policy uses; 0: no average

    # time and memory: the results are the same up to rounding
    cache: str = "features"  # features: the backbone runs once, before training; none: in each step
    shard_backbone: bool = False  # with cache none: shard it even where each rank has room for it
    shards: Natural = 0  # ranks that share a copy of the weights, more nodes mirror it; 0: all

    # does not affect results
    out: str = "runs/vla"  # run folder
    timeout_hours: Positive = 6.0  # ranks wait so long for the slowest, as when it downloads
    cache_dir: str = ""  # folder of the cached features; empty: features/ in --out
    resume: bool = False  # continue from the newest step_* in --out
    changed_data: bool = False  # --resume although the episodes have changed
    log_every: Count = 50  # steps
    eval_every: Natural = 500  # steps; 0: only at the end
    eval_rows: Natural = 256  # held-out frames of one evaluation
    save_every: Natural = 1000  # steps; 0: only at the end
    keep: Natural = 0  # newest checkpoints step_* that stay; 0: all


PRESETS = {
    "tabletop": {},
    "speedrun": {
        "stride": 8, "horizon": 5, "vl_layers": 0, "future_tokens": 0,
        "steps": 2200, "lr": 4e-3, "muon": True, "save_every": 0,
    },
    "paper": {
        "init": "runs/grpo-paper", "data": "data/libero", "out": "runs/vla-paper",
        "cameras": "image,image_wrist", "horizon": 16,
        "dim": 1536, "layers": 16, "heads": 32, "vl_layers": 4, "future_tokens": 32, "dropout": 0.2,
        "cache": "none", "steps": 60000, "batch": 32, "draws": 1, "lr": 1e-4, "ema_decay": 0.0,
        "eval_every": 2000, "save_every": 10000,
    },
}  # fmt: skip


# What the head reads. A thought follows the prompt that asks to think.
CONDITIONS = {
    "prompt": "the prompt",
    "thought": "the prompt and the thought behind it",
    "thought-only": "the thought's tokens, which have seen the prompt",
}


def check_config(cfg: Config) -> None:
    """ValueError for what the types of the flags let pass and makes no sense."""
    for name, choices in (
        ("cache", ("features", "none")),
        ("condition", CONDITIONS),
        ("thoughts", ("own", "recorded")),
    ):
        value = getattr(cfg, name)
        if value not in choices:
            raise ValueError(f"--{name} {value}: choose {' or '.join(choices)}")
    if cfg.thoughts == "recorded" and cfg.condition == "prompt":
        raise ValueError(
            "--thoughts recorded: the head reads none; add --condition thought or thought-only"
        )
    check_trained_backbone(cfg)
    cameras = cfg.cameras.split(",")
    if len(set(cameras)) < len(cameras):
        raise ValueError(f"--cameras {cfg.cameras}: name each of them once")
    check_width("--dim", cfg.dim, cfg.heads)


def check_trained_backbone(cfg: Config) -> None:
    if cfg.ce_weight and not cfg.backbone_lr:
        raise ValueError(
            f"--ce-weight {cfg.ce_weight}: the backbone is frozen; add --backbone-lr, as 1e-5"
        )
    if cfg.ce_weight and asks_to_think(cfg):
        raise ValueError(
            f"--ce-weight {cfg.ce_weight}: it learns the answer to the prompt that does not ask to "
            "think; leave out --think and --condition"
        )
    if cfg.backbone_lr and cfg.cache != "none":
        raise ValueError(
            f"--backbone-lr {cfg.backbone_lr}: features of a backbone that is trained change in "
            "each step; add --cache none"
        )
    if cfg.backbone_lr and cfg.condition != "prompt" and cfg.thoughts == "own":
        raise ValueError(
            f"--backbone-lr {cfg.backbone_lr}: own thoughts would be those of the model before it "
            "was trained; add --thoughts recorded"
        )


def check_width(name: str, width: int, heads: int) -> None:
    if width % heads or width % 2:
        raise ValueError(f"{name} {width} must be even and a multiple of --heads {heads}")


# ---- Data: numbers in memory, frames on disk -----------------------------------------------------


class FrameDataset:
    """Every stride-th frame of a folder of episodes, each with its state and the K actions that
    follow it. Frames are numbered through; of two episodes of 3 and 4 steps, with --stride 2 and
    --horizon 2:

        frame    0    1    2    3
        episode  0    0    1    1
        step     0    2    0    2
        actions  0 1  2 -  0 1  2 3     their steps; past the end see action_chunks()
        mask     1 1  1 0  1 1  1 1

    state (N, S) and action (N, K, A) are normalised by q01/q99 -> [-1, 1], not clipped; mask (N, K)
    is 0 past the end of the episode. train and held are the numbers of the frames to train on and
    to evaluate on; frame_ranges holds those of each episode. image_sizes and action_range go into
    the PolicySpec.
    ValueError naming what does not fit; FileNotFoundError without episodes."""

    def __init__(self, cfg: Config):
        self.episodes = read_episodes(cfg.data, cfg.max_episodes)
        self.cameras = cfg.cameras.split(",")
        self.stats = read_stats(cfg.data, self.episodes)
        self.stride = cfg.stride
        self._check(cfg)

        # 1. the numbers of each episode's frames
        lengths, states, chunks, masks = [], [], [], []
        for episode in self.episodes:
            steps = np.arange(0, len(episode), cfg.stride)
            steps_left = len(episode) - steps  # to the end, this one among them
            lengths.append(len(steps))
            states.append(episode.state[steps])
            chunks.append(action_chunks(episode, cfg.horizon)[steps])
            masks.append(np.arange(cfg.horizon) < steps_left[:, None])
        state = normalize(np.concatenate(states), self.stats["state"])
        action = normalize(np.concatenate(chunks), self.stats["action"])
        self.state = state.astype(np.float32)  # (N, S)
        self.action = action.astype(np.float32)  # (N, K, A)
        self.mask = np.concatenate(masks)  # (N, K)

        # 2. which frames are whose
        self.ends = np.cumsum(lengths)
        self.frame_ranges = []
        for end, length in zip(self.ends.tolist(), lengths, strict=True):
            self.frame_ranges.append(range(end - length, end))

        # 3. which are held out
        train_episodes, self.held_out_episodes = self.episodes, []
        if cfg.holdout_share > 0:
            split = split_episodes(self.episodes, cfg.holdout_share)
            train_episodes, self.held_out_episodes = split
        self.train = self._frames_of(train_episodes)  # frame ids
        self.held = self._frames_of(self.held_out_episodes)

        # 4. what a policy that has learned from them should know
        sizes = self.episodes[0].image_sizes
        self.image_sizes = {camera: list(sizes[camera]) for camera in self.cameras}
        actions = np.concatenate([episode.action for episode in train_episodes])  # (., A)
        self.action_range = {"low": actions.min(0).tolist(), "high": actions.max(0).tolist()}

    def _frames_of(self, episodes):
        """Episodes -> the numbers of their frames."""
        chosen = set(episodes)
        frame_ids = []
        for episode, frame_range in zip(self.episodes, self.frame_ranges, strict=True):
            if episode in chosen:
                frame_ids.extend(frame_range)
        return np.array(frame_ids, int)

    def _check(self, cfg):
        require_instructions(self.episodes)
        for episode in self.episodes:
            if cfg.thoughts == "recorded" and episode.thoughts is None:
                raise ValueError(
                    f"{episode}: holds no thoughts; record it by what knows them, as "
                    "benchmarks.tabletop_data does, or use --thoughts own"
                )
            for camera in self.cameras:
                if camera not in episode.cameras:
                    raise ValueError(
                        f"{episode}: no camera {camera!r}; choose --cameras among "
                        f"{', '.join(episode.cameras)}"
                    )
                size = episode.image_sizes[camera]
                first_size = self.episodes[0].image_sizes[camera]
                if size != first_size:
                    raise ValueError(
                        f"{episode}: {camera} is {pixels(size)}, in {self.episodes[0].name} "
                        f"{pixels(first_size)}; record or convert all episodes at one size"
                    )
        longest = max(len(episode) for episode in self.episodes)
        if not 0 < cfg.horizon <= longest:
            raise ValueError(
                f"--horizon {cfg.horizon} is not in 1..{longest}, the length of the "
                f"longest episode of {cfg.data}"
            )

    def locate(self, frame_id: int) -> tuple[int, int]:
        """Number of a frame -> number of its episode, and its step there (0 .. T-1)."""
        number = int(np.searchsorted(self.ends, frame_id, side="right"))
        index_in_episode = int(frame_id) - self.frame_ranges[number].start
        return number, index_in_episode * self.stride

    def observation(self, frame_id: int) -> tuple[list[np.ndarray], str]:
        """-> the images of the cameras, each uint8 (H, W, 3), and the instruction."""
        number, step = self.locate(frame_id)
        episode = self.episodes[number]
        return [episode.frame(step, camera) for camera in self.cameras], episode.task

    def replay(self, frame_ids: np.ndarray) -> Iterator[dict]:
        """What model.stop_if_not_finite() saves of a batch. A generator: it runs only if a step
        fails. No images: "frame" and the data folder give them back."""
        sample_ids = []
        for frame_id in frame_ids:
            number, step = self.locate(frame_id)
            sample_ids.append(f"{self.episodes[number]}:{step}")
        yield {
            "sample_id": sample_ids,
            "frame": frame_ids,
            "state": self.state[frame_ids],
            "action": self.action[frame_ids],
        }


@functools.lru_cache(2)  # a step may begin in one pass and end in the next
def pass_order(seed: int, frame_count: int, pass_number: int) -> np.ndarray:
    return model.rng(seed, "pass", pass_number).permutation(frame_count)


def sample_order(cfg: Config, train: np.ndarray, step: int) -> np.ndarray:
    """Those of the frames `train` that a step learns from (batch,): a function of (seed, step),
    each frame once a pass."""
    indices = []
    for i in range(step * cfg.batch, (step + 1) * cfg.batch):  # counted over the whole run
        pass_number, index = divmod(i, len(train))
        indices.append(pass_order(cfg.seed, len(train), pass_number)[index])
    return train[indices]


# ---- Flow-matching head: the idea ----------------------------------------------------------------

TIME_SCALE = 0.999  # s of FlowHead.draw()


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a FlowHead, in a checkpoint's run.json; in brackets those of GR00T N1.5. DiT: the
    blocks over state and actions; VL (vision-language): those over the features before it."""

    vl_dim: int  # width of the features
    dim: int  # width of the DiT (1536)
    layers: int  # DiT blocks (16)
    heads: int  # attention heads of DiT and VL blocks (32)
    vl_layers: int  # self-attention blocks over the features, 0 = LayerNorm alone (4)
    state_dim: int  # proprioceptive dimensions S
    action_dim: int  # action dimensions A
    horizon: int  # steps K of an action chunk (16)
    future_tokens: int  # learned tokens between state and actions, 0 = none (32)
    buckets: int = 1000  # time is rounded down to 1/buckets
    steps: int = 4  # Euler steps when sampling
    dropout: float = 0.0  # after each attention and MLP of the DiT and VL blocks (0.2)

    def __post_init__(self):
        check_width("head width", self.dim, self.heads)
        check_width("backbone width", self.vl_dim, self.heads)


class Context(NamedTuple):
    """What the DiT reads of the features, computed once for all Euler steps and draws."""

    keys_values: list[tuple[torch.Tensor, torch.Tensor]]  # (B, T, D) each, for blocks 0, 2, 4, ...
    mask: torch.Tensor | None  # (B, 1, 1, T); None: all tokens count


class Draws(NamedTuple):
    """R (noise, time) pairs of each frame."""

    noise: torch.Tensor  # (B, R, K, A), standard normal
    time: torch.Tensor  # (B, R) in [0, 1]: 0 is pure noise, 1 the action

    def rows(self, indices: slice | np.ndarray) -> "Draws":
        """The draws of these frames of the batch."""
        return Draws(self.noise[indices], self.time[indices])


def sinusoid(bucket: torch.Tensor, dim: int) -> torch.Tensor:
    """Sines and cosines of time (...,), in buckets, at dim / 2 frequencies -> (..., dim) fp32."""
    rate = torch.exp(torch.arange(dim // 2, device=bucket.device) * (-2 * np.log(1e4) / dim))
    angle = bucket.float()[..., None] * rate  # (..., D / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class FlowBlock(nn.Module):
    """Pre-norm attention and MLP. `ada`: scale and shift of the first norm come from the time, the
    second has none, nothing is gated (N1.5's AdaLayerNorm). `cross`: keys and values are given, and
    qkv makes queries alone.

    The R draws of a frame stand one behind the other: B = 2 frames with R = 2 draws of Q = 3 tokens
    are four rows. Tokens of one draw may not see another draw's, but all of a frame read the same
    features, and a query does not know of other queries. So cross-attention makes one row of a
    frame, and its keys and values (B, T, D) serve all of its draws without a copy:

        self-attention   (B*R, Q, D)    a0 a1 a2 | b0 b1 b2 | c0 c1 c2 | d0 d1 d2
        cross-attention  (B, R*Q, D)    a0 a1 a2 b0 b1 b2   | c0 c1 c2 d0 d1 d2
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, ada=False, cross=False):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=not ada)
        self.ada = nn.Linear(dim, 2 * dim) if ada else None
        self.qkv = nn.Linear(dim, dim if cross else 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=not ada)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Dropout(dropout), nn.Linear(4 * dim, dim)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x, time=None, kv=None, mask=None) -> torch.Tensor:
        """x (B*R, Q, D), time (B*R or 1, D), kv two (B, T, D), mask (B, 1, 1, T) -> like x."""
        # 1. norm, moved and scaled by the time
        normed = self.norm1(x)  # (B*R, Q, D)
        if self.ada is not None:
            scale, shift = self.ada(time)[:, None].chunk(2, dim=-1)  # (B*R or 1, 1, D) each
            normed = torch.addcmul(shift, normed, 1 + scale)
        # 2. queries, keys and values
        if kv is None:
            q, k, v = self.qkv(normed).chunk(3, dim=-1)  # (B*R, Q, D) each
        else:
            k, v = kv  # (B, T, D) each
            q = self.qkv(normed).view(len(k), -1, x.shape[-1])  # (B, R*Q, D)
        # 3. attention, by heads; of self-attention B is B*R below, and R*Q and T are Q
        q = self.by_head(q)  # (B, H, R*Q, d)
        k = self.by_head(k)  # (B, H, T, d)
        v = self.by_head(v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, R*Q, d)
        attended = attended.transpose(1, 2).reshape(x.shape)  # (B*R, Q, D)
        x = x + self.drop(self.proj(attended))
        # 4. MLP
        return x + self.drop(self.mlp(self.norm2(x)))

    def by_head(self, x):
        """(B, T, D) -> (B, H, T, d)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


# fork point: the action head. The rest calls draw(), loss() and sample(), and reads `cfg`.
class FlowHead(nn.Module):
    """Flow-matching action head after GR00T N1.5 (arXiv 2503.14734 and its released source): tokens
    pass a DiT (diffusion transformer) that reads the features of the backbone.

        tokens            state | F future tokens | K noised actions
        block 0, 2, ...   they read the features: cross-attention
        block 1, 3, ...   they read each other: self-attention
        decoder                                     K velocities

    Differences from N1.5: padding of the features is masked (its release leaves the mask unused);
    one embodiment; keys and values of all cross-attention blocks come from one matrix, once for all
    Euler steps and noise draws; no output projection of the DiT, which another linear map follows.
    """

    def __init__(self, cfg: HeadConfig):
        super().__init__()
        self.cfg = cfg
        dim = cfg.dim
        # Initial weights are drawn in this order: another order gives other weights.
        # Without VL blocks kv follows the norm, and does all that its affine part could.
        self.vl_norm = nn.LayerNorm(cfg.vl_dim, elementwise_affine=cfg.vl_layers > 0)
        self.vl_blocks = nn.ModuleList(
            FlowBlock(cfg.vl_dim, cfg.heads, cfg.dropout) for _ in range(cfg.vl_layers)
        )
        cross_blocks = (cfg.layers + 1) // 2
        self.kv = nn.Linear(cfg.vl_dim, cross_blocks * 2 * dim)
        self.state_in = nn.Sequential(nn.Linear(cfg.state_dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.action_in = nn.Linear(cfg.action_dim, dim)
        self.action_mix = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.position = nn.Parameter(torch.randn(cfg.horizon, dim) * 0.02)
        self.future = nn.Parameter(torch.randn(cfg.future_tokens, dim) * 0.02)
        self.time_in = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.blocks = nn.ModuleList(
            FlowBlock(dim, cfg.heads, cfg.dropout, ada=True, cross=i % 2 == 0)
            for i in range(cfg.layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False)
        self.ada_out = nn.Linear(dim, 2 * dim)
        self.decoder = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, cfg.action_dim))

    def context(self, feats: torch.Tensor, mask: torch.Tensor | None) -> Context:
        """Features (B, T, vl_dim) and mask (B, T), or None when all count."""
        if mask is not None:
            mask = mask.bool()[:, None, None]  # (B, 1, 1, T)
        x = self.vl_norm(feats.float())
        for block in self.vl_blocks:
            x = block(x, mask=mask)  # (B, T, vl_dim)
        kv = self.kv(x).split(self.cfg.dim, dim=-1)  # k of block 0, v of block 0, k of block 2, ...
        return Context(list(zip(kv[::2], kv[1::2], strict=True)), mask)

    def velocity(self, x_t, t, state_token, context: Context) -> torch.Tensor:
        """Noised actions x_t (B*R, K, A), time t (B*R or 1,) in [0, 1], state_token (B*R, 1, D),
        context of B frames -> velocity v_t (B*R, K, A)."""
        # 1. the time, in the type to which autocast takes the actions
        actions = self.action_in(x_t)  # (B*R, K, D)
        bucket = (t * self.cfg.buckets).long()  # (B*R or 1,)
        time_waves = sinusoid(bucket, self.cfg.dim).to(actions.dtype)  # (B*R or 1, D)
        time_embedding = self.time_in(time_waves)  # (B*R or 1, D)
        # 2. the tokens: each action knows the time and its place in the chunk
        waves_each = time_waves[:, None].expand(len(actions), actions.shape[1], -1)  # (B*R, K, D)
        actions = self.action_mix(torch.cat([actions, waves_each], dim=-1)) + self.position
        future = self.future.expand(len(actions), -1, -1)  # (B*R, F, D)
        x = torch.cat([state_token, future, actions], dim=1)  # (B*R, 1+F+K, D)
        # 3. the blocks
        for i, block in enumerate(self.blocks):
            if i % 2 == 0:
                x = block(x, time_embedding, context.keys_values[i // 2], context.mask)
            else:
                x = block(x, time_embedding)
        # 4. the velocity, of the action tokens alone
        x = self.norm_out(x[:, -x_t.shape[1] :])  # (B*R, K, D)
        scale, shift = self.ada_out(time_embedding)[:, None].chunk(2, dim=-1)  # (B*R or 1, 1, D)
        return self.decoder(torch.addcmul(shift, x, 1 + scale))  # (B*R, K, A)

    def draw(self, rng: np.random.Generator, batch: int, draws: int = 1) -> Draws:
        """Noise and time of `batch` frames, `draws` of each. Time is (s - u) / s, s = TIME_SCALE,
        u ~ Beta(1.5, 1) clamped at s, so that most of it lies near pure noise."""
        u = np.minimum(rng.beta(1.5, 1.0, (batch, draws)), TIME_SCALE)
        shape = (batch, draws, self.cfg.horizon, self.cfg.action_dim)
        noise = rng.standard_normal(shape, dtype=np.float32)
        t = (TIME_SCALE - u) / TIME_SCALE
        return Draws(torch.from_numpy(noise), torch.from_numpy(t).float())

    def loss(
        self, feats, mask, state, action, action_mask, drawn: Draws, divisor: float | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Masked flow-matching loss of one batch with R (noise, time) pairs a frame, which share
        the context: at small sizes it costs more than the DiT does. -> (loss fp32, {"sum": of the
        errors, "count": of the elements}).

        feats (B, T, vl_dim), mask (B, T) or None; state (B, S) and action (B, K, A) normalised;
        action_mask (B, K, A); drawn: as draw() gives it. divisor: of the summed error; None: the
        counted elements, at least 1."""
        noise, time = drawn
        noise = noise.to(action.device)
        time = time.to(action.device)
        draws_per_frame = time.shape[1]
        # fork point: the flow path, here straight from noise at t = 0 to the action at t = 1. The
        # distribution of t: draw().
        t = time[:, :, None, None]  # (B, R, 1, 1)
        x_t = (1 - t) * noise + t * action[:, None]  # (B, R, K, A)
        u_t = action[:, None] - noise  # its velocity, the target

        state_token = self.state_in(state)[:, None]  # (B, 1, D)
        state_token = state_token.repeat_interleave(draws_per_frame, dim=0)  # (B*R, 1, D)
        context = self.context(feats, mask)
        v_t = self.velocity(x_t.flatten(0, 1), time.flatten(), state_token, context)  # (B*R, K, A)
        error = (v_t.float().view_as(u_t) - u_t).square() * action_mask[:, None]  # (B, R, K, A)
        error_sum = error.sum()
        counted = action_mask.sum() * draws_per_frame
        if divisor is None:
            divisor = counted.clamp(min=1)
        return error_sum / divisor, {"sum": error_sum.detach(), "count": counted}

    @torch.no_grad()
    def sample(self, feats, mask, state, noise) -> torch.Tensor:
        """Features (B, T, vl_dim), mask (B, T) or None, normalised state (B, S), noise (B, K, A) ->
        normalised chunks (B, K, A) fp32, by `steps` Euler steps along the velocity."""
        context = self.context(feats, mask)
        state_token = self.state_in(state)[:, None]  # (B, 1, D)
        x_t = noise.float()
        for i in range(self.cfg.steps):
            t = torch.full((1,), i / self.cfg.steps, device=x_t.device)
            v_t = self.velocity(x_t, t, state_token, context).float()
            x_t = x_t + v_t / self.cfg.steps
        return x_t


# ---- Thoughts ------------------------------------------------------------------------------------
#
# A thought is an array of token ids (t,), see model.encode_thought().


def write_thoughts(backbone: Backbone, prompts: list[Row], max_thought: int) -> list[np.ndarray]:
    """The model's own thought about each prompt, by its most probable tokens, at least one and at
    most max_thought -> its token ids (t,) each. backbone: a whole one, not cut.

    It ends with the token that completes </think>; without one it is as far as the model got. Where
    </think> is several tokens (Qwen2.5) writing stops at the action that follows."""
    vocab = backbone.vocab
    end = backbone.tokenizer.convert_tokens_to_ids(THINK_END)  # None: it is several tokens
    stop = {vocab.eos, vocab.action_start, end} - {None}  # None: no action tokens, either
    samples = model.generate(backbone, prompts, max_new_tokens=max_thought, greedy=True, stop=stop)
    thoughts = []
    for ids, mask in zip(samples["ids"], samples["mask"].bool(), strict=True):
        written = ids[mask].cpu().numpy()
        thoughts.append(written[: thought_length(backbone, written)])
    return thoughts


def is_finished(backbone: Backbone, token_ids: np.ndarray) -> bool:
    return THINK_END in backbone.tokenizer.decode(token_ids)


def thought_length(backbone: Backbone, token_ids: np.ndarray) -> int:
    """Tokens up to the one that completes </think>, that one included; without it all of them. What
    is complete stays so with more tokens, so that a binary search decodes few beginnings."""
    return bisect.bisect_left(
        range(len(token_ids)), True, key=lambda length: is_finished(backbone, token_ids[:length])
    )


def thought_text(backbone: Backbone, token_ids: Sequence[int]) -> str:
    """What token ids say inside <think>, as far as they get. Where </think> is missing, no answer
    and no end of the turn belongs to it; nor does an image's tag, of which a prompt has its own."""
    thought = backbone.tokenizer.decode(token_ids).partition("<think>")[2]
    for end in (THINK_END, "<answer>", model.ACTION_START, "<image>", backbone.tokenizer.eos_token):
        thought = thought.partition(end)[0]
    return thought.strip()


def given_thoughts(backbone: Backbone, texts: list[str], n: int) -> list[np.ndarray]:
    """Thoughts in words for n prompts -> their token ids; "" is a thought that says nothing.
    ValueError for another number of them."""
    if len(texts) != n:
        raise ValueError(f"{len(texts)} thoughts for {n} observations; give one for each")
    return [encode_thought(backbone, text) for text in texts]


# ---- Features of the backbone --------------------------------------------------------------------


class Features(NamedTuple):
    """What the backbone puts out at --layer for each token that the head reads."""

    feats: torch.Tensor  # (B, T, vl_dim)
    mask: torch.Tensor | None  # (B, T); None: no row is padded

    def rows(self) -> list[torch.Tensor]:
        """The features of each prompt, without padding, (t, vl_dim)."""
        if self.mask is None:
            return list(self.feats)
        return [feats[mask.bool()] for feats, mask in zip(self.feats, self.mask, strict=True)]


def pad_features(rows: list[torch.Tensor]) -> Features:
    """The features (t, vl_dim) of B prompts as one batch."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)  # (B,)
    feats = pad_sequence(rows, batch_first=True)  # (B, T, vl_dim)
    mask = torch.arange(feats.shape[1], device=feats.device) < lengths[:, None]  # (B, T)
    return Features(feats, None if mask.all() else mask)


def selected(hidden: torch.Tensor, is_selected: torch.Tensor) -> Features:
    """Of the hidden states (B, T, D) those of the tokens that is_selected (B, T) marks."""
    return pad_features(Features(hidden, is_selected).rows())


def autocast(device: torch.device) -> torch.autocast:
    """For the head: matmuls in model.compute_dtype(), its weights and the flow in fp32. A backbone
    inside computes in that type by itself."""
    dtype = model.compute_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def truncate(net: nn.Module, layer: int) -> None:
    """Keeps the first `layer` LLM blocks. model.hidden_states() then gives what the last one puts
    out, without the final norm. ValueError when there are not so many."""
    layer = model.feature_layer(net, layer)
    language_model = net.model.language_model
    language_model.layers = language_model.layers[:layer]
    language_model.norm = nn.Identity()
    config = language_model.config
    config.num_hidden_layers = layer
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layer]


def whole_copy(backbone: Backbone) -> Backbone:
    """The same weights in modules of their own, which stay whole when the others are cut."""
    shared = {}  # id -> what is not to be copied
    for tensor in [*backbone.net.parameters(), *backbone.net.buffers()]:
        shared[id(tensor)] = tensor
    return replace(backbone, net=copy.deepcopy(backbone.net, shared))


def freeze_backbone(backbone: Backbone, layer: int) -> nn.Module:
    """Cuts the backbone after `layer` and freezes it. -> its final norm, which the features do
    without and save_policy() puts back."""
    final_norm = backbone.net.model.language_model.norm
    truncate(backbone.net, layer)
    backbone.net.requires_grad_(False).eval()
    return final_norm


def choose_trained(backbone: Backbone, layer: int, cfg: Config) -> nn.Module:
    """Cuts the backbone and freezes it as freeze_backbone(), unless cfg trains it: with --ce-weight
    all of it, uncut; by the flow loss alone (--backbone-lr) what the cut leaves, of which lm_head
    has no gradient unless it is the table of the input too. -> its final norm."""
    if cfg.ce_weight:
        return backbone.net.model.language_model.norm
    final_norm = freeze_backbone(backbone, layer)
    if cfg.backbone_lr:
        backbone.net.model.requires_grad_(True)
    return final_norm


def prompt_row(
    backbone: Backbone, images: Sequence[np.ndarray], instruction: str, think: bool
) -> Row:
    """The action prompt as a row, in training and evaluation alike."""
    messages = model.action_prompt(instruction, think, len(images))
    return model.encode(backbone, messages, images, prompt_only=True)


def asks_to_think(cfg: Config) -> bool:
    """Whether the prompt asks for a thought."""
    return cfg.think or cfg.condition != "prompt"


def encode_prompts(
    backbone: Backbone,
    prompts: list[Row],
    device: str | torch.device,
    condition: str = "prompt",
    train: bool = False,
) -> Features:
    """The features of all image and text tokens of the prompts, and of their thoughts where they
    have one; by the condition thought-only of these alone. train: with a gradient, unless the
    caller is under no_grad()."""
    batch = model.to_device(model.collate(prompts, backbone.vocab.pad), device)
    with torch.set_grad_enabled(train and torch.is_grad_enabled()):
        hidden = model.hidden_states(backbone.net, batch)  # (B, T, D)
    if condition == "thought-only":
        return selected(hidden, batch["target"])  # with_thought() marks a thought's tokens
    lengths = {len(prompt["ids"]) for prompt in prompts}
    return Features(hidden, None if len(lengths) == 1 else batch["mask"])


def frame_answers(backbone: Backbone, frames: FrameDataset, cfg: Config) -> list[np.ndarray]:
    """The right answer to each frame's prompt, as sft.py learns it, as token ids (t,) to the end of
    the turn; none where no chunk begins (chunk_starts). ValueError without a tokenizer of these
    actions."""
    action_tokenizer = backbone.action_tokenizer
    if action_tokenizer is None or action_tokenizer.stats is None:
        raise ValueError(
            f"--ce-weight {cfg.ce_weight}: {cfg.init} has no action tokenizer with statistics; "
            "train it on episodes with sft.py"
        )
    read_episodes(cfg.data, cfg.max_episodes, action_tokenizer)  # of another robot: it says so
    answers = []
    for episode, frame_range in zip(frames.episodes, frames.frame_ranges, strict=True):
        chunks = action_chunks(episode, action_tokenizer.horizon)  # (T, K, A)
        starts = chunk_starts(episode, action_tokenizer.horizon)
        all_action_ids = action_tokenizer.encode(chunks[starts.start : starts.stop])
        for frame_id in frame_range:
            _, step = frames.locate(frame_id)
            text = ""
            if step in starts:
                text = f"{model.action_answer(all_action_ids[step])}<|im_end|>"
            ids = backbone.tokenizer.encode(text, add_special_tokens=False)
            answers.append(np.array(ids, np.int64))
    return answers


class LiveFeatures:
    """Features by running the backbone on each batch (--cache none).

    read(frame_ids) is what a thread may do ahead of training, on the CPU; features(what it gave)
    is the rest. CachedFeatures has the same two.

    thoughts, answers: of each frame the token ids (t,) that stand behind its prompt; None: the
    prompt stands alone. There are never both. The head reads thoughts too. It does not read
    answers, which a whole backbone learns (--ce-weight): its features are those after `layer`."""

    def __init__(
        self,
        backbone: Backbone,
        frames: FrameDataset,
        cfg: Config,
        device: torch.device,
        thoughts: list[np.ndarray] | None = None,
        answers: list[np.ndarray] | None = None,
        layer: int = 0,
    ):
        self.backbone = backbone
        self.frames = frames
        self.think = asks_to_think(cfg)
        self.condition = cfg.condition
        self.device = device
        self.is_trained = cfg.backbone_lr > 0
        self.thoughts = thoughts
        self.answers = answers
        self.layer = layer

    def read(self, frame_ids: Iterable[int]) -> list[Row]:
        rows = []
        for frame_id in frame_ids:
            images, instruction = self.frames.observation(frame_id)
            row = prompt_row(self.backbone, images, instruction, self.think)
            if self.thoughts is not None:
                row = with_thought(row, self.thoughts[frame_id])
            if self.answers is not None:
                row = with_thought(row, self.answers[frame_id])
            rows.append(row)
        return rows

    def features(self, rows: list[Row]) -> Features:
        if self.answers is not None:  # evaluation has no use for their loss
            features, _ = self.features_and_answers(rows)
            return features
        return encode_prompts(
            self.backbone, rows, self.device, self.condition, train=self.is_trained
        )

    def features_and_answers(self, rows: list[Row]) -> tuple[Features, TokenSums]:
        """One forward of prompts and answers: the features of the prompts, which do not see the
        answers behind them, and the cross-entropy of the answers."""
        batch = model.to_device(model.collate(rows, self.backbone.vocab.pad), self.device)
        layer_outputs = []  # one, of the forward in token_loss()
        hook = model.keep_layer_output(self.backbone.net, self.layer, layer_outputs.append)
        token_sums = model.token_loss(self.backbone.net, batch)
        hook.remove()
        (hidden,) = layer_outputs  # (B, T, D)
        is_prompt = batch["mask"].bool() & ~batch["target"]
        return selected(hidden, is_prompt), token_sums


class CachedFeatures:
    """Features from disk (--cache features), fp16 on CPU, bf16 on GPU."""

    def __init__(self, files: "FrameFiles", device: torch.device):
        self.files = files
        self.device = device
        files.open()

    def read(self, frame_ids: Iterable[int]) -> list[torch.Tensor]:
        return [self.files.read(frame_id) for frame_id in frame_ids]

    def features(self, stored: list[torch.Tensor]) -> Features:
        feats, mask = pad_features(stored)
        return Features(feats.to(self.device), None if mask is None else mask.to(self.device))


FeatureSource = LiveFeatures | CachedFeatures

FRAMES_AT_ONCE = 64  # in a forward that fills the cache


class FrameFiles:
    """What is made of each frame once, features or thoughts, on disk: for each episode a file of
    its name with one tensor (frames, T, ...), read by slice. Where rows are of unequal length they
    are padded, and "length" (frames,) is beside them. fingerprint.json says what they were made
    from; it is written last: a folder without it is incomplete."""

    def __init__(self, folder: Path, name: str, frames: FrameDataset):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.name = name  # of the tensor
        self.frames = frames
        self.paths = [folder / f"{episode.name}.safetensors" for episode in frames.episodes]

    def are_complete(self, made_from: dict[str, str | int]) -> bool:
        """Whether all of them are there. ValueError when they were made from something else."""
        path = self.folder / "fingerprint.json"
        if not path.exists():
            return False
        stored = model.read_json(path)
        names = dict.fromkeys([*made_from, *stored])
        stale = [name for name in names if stored.get(name) != made_from.get(name)]
        if stale:
            raise ValueError(
                f"{self.folder}: {self.name} of other {', '.join(stale)} than this run's; "
                "delete the folder or name another --cache-dir"
            )
        return True

    def make(
        self,
        make_rows: Callable[[Sequence[int]], list[torch.Tensor]],
        groups: list[list[int]],
        made_from: dict[str, str | int],
        dist: Dist,
    ) -> None:
        """Makes and writes the rows of all frames. make_rows(frame_ids): of at most FRAMES_AT_ONCE
        frames -> a row (t, ...) each. groups: numbers of episodes that are made together, by one
        rank."""
        # 1. each rank makes those of its groups
        local_groups = groups[dist.rank :: dist.world_size]
        no_bar = None if dist.rank == 0 else True  # None: a bar where stderr is a terminal
        for group in tqdm(local_groups, self.name, disable=no_bar):
            frame_ids = []
            for number in group:
                frame_ids += self.frames.frame_ranges[number]
            rows = []
            for first in range(0, len(frame_ids), FRAMES_AT_ONCE):
                rows += make_rows(frame_ids[first : first + FRAMES_AT_ONCE])
            start = 0
            for number in group:
                end = start + len(self.frames.frame_ranges[number])
                self._save(self.paths[number], rows[start:end])
                start = end
        # 2. when all ranks are done, rank 0 writes what the folder holds
        if distributed.is_initialized():
            distributed.barrier()
        if dist.rank == 0:
            model.write_json(self.folder / "fingerprint.json", made_from)

    def _save(self, path, rows):
        tensors = {self.name: pad_sequence(rows, batch_first=True)}  # (frames, T, ...)
        lengths = torch.tensor([len(row) for row in rows])
        if lengths.min() < lengths.max():
            tensors["length"] = lengths
        save_file(tensors, path)

    def open(self) -> None:
        """Before the first read(). ValueError when a file cannot be read."""
        open_arrays.cache_clear()  # they may have been written anew
        for path in self.paths:
            try:
                open_arrays(path, "pt")
            except (SafetensorError, OSError) as e:
                raise ValueError(f"{path}: {e}; delete {self.folder} to compute it again") from e

    def read(self, frame_id: int) -> torch.Tensor:
        """-> the row (t, ...) of a frame."""
        number, step = self.frames.locate(frame_id)
        index = step // self.frames.stride
        file = open_arrays(self.paths[number], "pt")
        row = file.get_slice(self.name)[index : index + 1][0]
        names = file.keys()
        if "length" in names:
            row = row[: int(file.get_slice("length")[index : index + 1])]
        return row


def feature_folder(cfg: Config) -> Path:
    return Path(cfg.cache_dir or Path(cfg.out) / "features")


def episode_groups(frames: FrameDataset, most: int) -> list[list[int]]:
    """Numbers of consecutive episodes with at most `most` frames together; one with more is alone.
    Of 9, 5, 7 and 20 frames and at most 16: [[0, 1], [2], [3]]."""
    groups = []
    frames_in_group = 0
    for number, frame_range in enumerate(frames.frame_ranges):
        if not groups or frames_in_group + len(frame_range) > most:
            groups.append([])
            frames_in_group = 0
        groups[-1].append(number)
        frames_in_group += len(frame_range)
    return groups


def first_frames(frames: FrameDataset) -> list[int]:
    """The first frame of each episode."""
    return [frame_range[0] for frame_range in frames.frame_ranges]


def build_cache(
    backbone: Backbone,
    frames: FrameDataset,
    cfg: Config,
    dist: Dist,
    thoughts: list[np.ndarray] | None = None,
) -> CachedFeatures:
    """Runs the backbone over all frames, unless the folder holds the very same features already.
    thoughts: of each frame. ValueError when the folder holds other features or has no room, or when
    a feature is not finite."""
    folder = feature_folder(cfg)
    files = FrameFiles(folder, "features", frames)
    live = LiveFeatures(backbone, frames, cfg, dist.device, thoughts)
    first_prompts = live.read(first_frames(frames))

    # 1. are they there already?
    made_from = fingerprint(backbone, frames, first_prompts, cfg)
    if thoughts is not None:
        made_from["condition"] = cfg.condition
        made_from["thoughts"] = sha256_of(thought.tobytes() for thought in thoughts)
    if files.are_complete(made_from):
        return CachedFeatures(files, dist.device)

    # 2. is there room for them?
    tokens = 0
    for frame_range, prompt in zip(frames.frame_ranges, first_prompts, strict=True):
        length = 0
        if cfg.condition != "thought-only":
            length += int((~prompt["target"]).sum())  # the prompt, one length in all of an episode
        if thoughts is not None:
            length += max(len(thoughts[frame_id]) for frame_id in frame_range)
        tokens += len(frame_range) * length
    width = backbone.net.config.text_config.hidden_size
    needed_gb = tokens * width * 2 / 1e9  # 16 bits a number
    free_gb = shutil.disk_usage(folder).free / 1e9
    if needed_gb > free_gb:
        raise ValueError(
            f"{folder}: the features take {needed_gb:.1f} GB, {free_gb:.1f} are free; name "
            "another --cache-dir or use --cache none"
        )

    # 3. make them
    fp32 = backbone.net.dtype == torch.float32
    stored_dtype = torch.float16 if fp32 else backbone.net.dtype

    def make_rows(frame_ids):
        features = live.features(live.read(frame_ids))
        rows = [row.to(stored_dtype).cpu() for row in features.rows()]  # (t, vl_dim)
        if not all(row.isfinite().all() for row in rows):
            number, _ = frames.locate(frame_ids[0])
            raise ValueError(
                f"{frames.episodes[number]}: its features are not finite as {stored_dtype}; check "
                "the checkpoint, or use --cache none"
            )
        return rows

    each_alone = [[number] for number in range(len(frames.episodes))]  # without any padding
    files.make(make_rows, each_alone, made_from, dist)
    return CachedFeatures(files, dist.device)


def frame_thoughts(
    backbone: Backbone, frames: FrameDataset, cfg: Config, dist: Dist
) -> list[np.ndarray]:
    """The thought of each frame, as --thoughts says."""
    if cfg.thoughts == "recorded":
        return recorded_thoughts(backbone, frames)
    return own_thoughts(backbone, frames, cfg, dist)


def recorded_thoughts(backbone: Backbone, frames: FrameDataset) -> list[np.ndarray]:
    """Those that the episodes hold."""
    thoughts = []
    for episode, frame_range in zip(frames.episodes, frames.frame_ranges, strict=True):
        for frame_id in frame_range:
            _, step = frames.locate(frame_id)
            with reading(f"{episode}: thought of step {step}"):
                thoughts.append(encode_thought(backbone, episode.thoughts[step]))
    return thoughts


def own_thoughts(
    backbone: Backbone, frames: FrameDataset, cfg: Config, dist: Dist
) -> list[np.ndarray]:
    """The whole backbone writes a thought about each frame, once; the ranks share the episodes. All
    stay on disk beside the features, with --cache none too: to write them again in each pass costs
    more than all the rest of a step."""
    # 1. written, or there from an earlier run
    started = time.perf_counter()
    model.replicate(backbone.net, dist)
    live = LiveFeatures(backbone, frames, cfg, dist.device)
    made_from = fingerprint(backbone, frames, live.read(first_frames(frames)), cfg)
    made_from["lm_head"] = sha256_of(bytes_of([backbone.net.lm_head.weight]))
    made_from["max_thought"] = cfg.max_thought
    files = FrameFiles(feature_folder(cfg) / "thoughts", "thoughts", frames)

    def write(frame_ids):
        written = write_thoughts(backbone, live.read(frame_ids), cfg.max_thought)
        return [torch.from_numpy(thought) for thought in written]

    is_new = not files.are_complete(made_from)
    if is_new:
        # frames of many episodes together: to write takes as long for a few as for many
        files.make(write, episode_groups(frames, FRAMES_AT_ONCE), made_from, dist)
    files.open()
    thoughts = [files.read(frame_id).numpy() for frame_id in range(len(frames.state))]
    backbone.net.to(dist.build)  # out of the GPU's way, and as open_features() expects it
    backbone.net.tie_weights()  # to META tied ones went as two

    # 2. how it went
    if dist.rank == 0:
        tokens = np.mean([len(thought) for thought in thoughts])
        unfinished = sum(not is_finished(backbone, thought) for thought in thoughts)
        line = (
            f"{len(thoughts)} thoughts of {tokens:.1f} tokens on average, {unfinished} unfinished"
        )
        if is_new:
            seconds = time.perf_counter() - started
            line += f"; {1000 * seconds / len(thoughts):.1f} ms each"
        print(line, flush=True)
    return thoughts


def fingerprint(
    backbone: Backbone, frames: FrameDataset, first_prompts: list[Row], cfg: Config
) -> dict[str, str | int]:
    """What features and thoughts depend on. first_prompts: of each episode, for words, mode, image
    sizes."""
    weights = [weight for _, weight in sorted(backbone.net.model.state_dict().items())]
    files = []
    for path in sorted({episode.path for episode in frames.episodes}):
        stat = path.stat()
        files.append((path.name, stat.st_size, stat.st_mtime_ns))
    return {
        "backbone": sha256_of(bytes_of(weights)),
        "layer": len(backbone.net.model.language_model.layers),
        "type": str(backbone.net.dtype),
        "prompts": sha256_of(prompt["ids"].tobytes() for prompt in first_prompts),
        "images": repr(backbone.image_spec),
        "cameras": cfg.cameras,
        "stride": cfg.stride,
        "episodes": sha256_of([repr(files).encode()]),
    }


def bytes_of(tensors: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    for tensor in tensors:
        yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()


def sha256_of(pieces: Iterable[bytes | np.ndarray]) -> str:
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    return sha.hexdigest()


# ---- Policies ------------------------------------------------------------------------------------
#
# Policy acts by the head, TokenPolicy by the tokens that the model itself writes; load_policy()
# picks. What evaluate.py, the simulators and the server ask of either:
#   act, act_batch                 images, instruction, state -> chunks (K, A), dataset units
#   horizon, cameras, spec         K; camera names in their order; PolicySpec, as far as known
#   hold                           how ChunkExecutor holds still where there is no chunk; or None
#   thinks                         whether it acts after a thought
#   thoughts                       of each row of the last act_batch; None: it has none
#   count                          so far: chunks, forwards, seconds; of TokenPolicy retried, held;
#                                  of a head that reads thoughts thinking (seconds), unfinished
#   identity()                     bytes that tell it from any other policy


class PolicySpec(TypedDict):
    """What acting needs beside the weights: "policy" in a checkpoint's run.json. TokenPolicy.spec
    has cameras, stats and action_range alone."""

    head: dict  # HeadConfig
    layer: int  # blocks of the cut backbone
    think: bool  # asks_to_think(Config)
    cameras: list[str]  # in the order in which images are given
    stats: dict[str, Stats]  # of "state" and "action"; of a TokenPolicy of "action" alone
    # Older checkpoints lack these: nothing is compared then.
    image_sizes: NotRequired[dict[str, list[int]]]  # camera -> [H, W] of the images of training
    # "low", "high": least and largest training action, dataset units, (A,) each
    action_range: NotRequired[dict[str, list[float]]]
    # Of a head that reads thoughts: Config's. Of own ones the checkpoint holds the whole backbone.
    condition: NotRequired[str]
    thoughts: NotRequired[str]
    max_thought: NotRequired[int]


def checked_spec(folder: str | Path, spec: object) -> tuple[PolicySpec, HeadConfig]:
    """What run.json in `folder` says under "policy", and the sizes of the head in it. ValueError
    naming what is missing in it, or is none."""
    needed = set(PolicySpec.__required_keys__)
    try:
        if not isinstance(spec, dict):
            raise ValueError(f"it is {spec!r}")
        if spec.get("thoughts") == "own":
            needed.add("max_thought")
        if needed - set(spec):
            raise ValueError(f"{', '.join(sorted(needed - set(spec)))} is missing")
        head = HeadConfig(**spec["head"])
        sizes = [size for name, size in asdict(head).items() if name != "dropout"]
        if any(type(size) is not int for size in [*sizes, spec["layer"]]):
            raise ValueError("layer, or a size of the head, is no whole number")
        if not isinstance(spec["cameras"], list):
            raise ValueError("cameras is no list")
        for name, dims in (("state", head.state_dim), ("action", head.action_dim)):
            check_stats(spec["stats"].get(name), dims, f"stats.{name}")
    except (AttributeError, ArithmeticError, TypeError, ValueError) as e:
        raise ValueError(
            f'{folder}/run.json: "policy" is not as vla.py wrote it ({e}); copy the whole folder '
            "again"
        ) from e
    return spec, head


def pixels(size: Sequence[int]) -> str:
    """[H, W] in words."""
    return f"{size[0]} x {size[1]}"


def check_view(camera: str, image: np.ndarray, size: Sequence[int] | None = None) -> None:
    """ValueError unless a camera's image is uint8 (H, W, 3), and has, within a pixel, the aspect of
    `size` [H, W], that of training: only then can it be resized to it."""
    if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
        raise ValueError(f"{camera} is {image.dtype} {image.shape}; give uint8 (H, W, 3)")
    height, width = image.shape[:2]
    if size is not None and abs(height * size[1] / size[0] - width) >= 1:
        raise ValueError(
            f"{camera} is {pixels(image.shape)} (height x width), the policy was trained at "
            f"{pixels(size)}; give images of this size, or of another of the same aspect"
        )


class CameraViews:
    """What `act` takes -> a list with an image for each camera, of the size of training: at another
    size they would be other tokens, which were never trained on. Resizing is printed once.

    image_sizes: camera -> [H, W] of training; of one that is not in it any size goes."""

    def __init__(self, cameras: Sequence[str], image_sizes: dict[str, list[int]]):
        self.cameras = cameras
        self.image_sizes = image_sizes
        self.has_told_of_resizing = False

    def __call__(self, images: np.ndarray | list | Mapping) -> list[np.ndarray]:
        # 1. one for each camera
        if isinstance(images, Mapping):
            images = [images[camera] for camera in self.cameras if camera in images]
        is_one_image = getattr(images, "ndim", 0) == 3
        views = [images] if is_one_image else list(images)
        if len(views) != len(self.cameras):
            raise ValueError(
                f"{len(views)} images; the policy was trained with the cameras "
                f"{', '.join(self.cameras)}"
            )
        # 2. at its size
        for i, camera in enumerate(self.cameras):
            size = self.image_sizes.get(camera)
            check_view(camera, views[i], size)
            if size is None or list(views[i].shape[:2]) == size:
                continue
            if not self.has_told_of_resizing:
                given = pixels(views[i].shape)
                print(
                    f"{camera}: images of {given} pixels are resized to {pixels(size)}, "
                    "as in training",
                    flush=True,
                )
                self.has_told_of_resizing = True
            resized = Image.fromarray(views[i]).resize((size[1], size[0]), Image.BICUBIC)
            views[i] = np.asarray(resized)
        return views


def check_instructions(instructions: list[str], images: list) -> None:
    """ValueError unless there is one for each of the images, none of them blank."""
    if len(instructions) != len(images):
        raise ValueError(
            f"{len(images)} images, {len(instructions)} instructions; give as many of each"
        )
    for row, instruction in enumerate(instructions):
        if not instruction.strip():
            raise ValueError(f"instruction {row} is blank; say what the robot should do")


def check_thoughts(thoughts: list[str] | None, policy: "Policy | TokenPolicy") -> None:
    """ValueError for thoughts that are given to a policy that reads none."""
    if thoughts is not None and not policy.thinks:
        raise ValueError(
            "thoughts are given, but this policy reads none; give none, or a head trained with "
            "--condition thought, or a checkpoint of sft or grpo in the mode think"
        )


def counted(act_batch: Callable) -> Callable:
    """act_batch, which also adds to its policy's `count`: chunks, forwards and seconds."""

    @functools.wraps(act_batch)
    def timed(policy, *args, **kwargs):
        start = time.perf_counter()
        chunks = act_batch(policy, *args, **kwargs)
        seconds = time.perf_counter() - start
        policy.count.update(chunks=len(chunks), forwards=1, seconds=seconds)
        return chunks

    return timed


class Policy:
    """A trained checkpoint as a function (images, instruction, state) -> the next K actions.

    Attributes: horizon K, action_dim A, cameras (names, in the order in which images are given).
    Call n draws its noise from (seed, n), or act_batch() from the keys that it is given: row b of a
    batch gets the same at any batch size. For images of another size than in training see
    CameraViews.

    writer: the whole backbone of a head that reads its own thoughts (vla.py --condition), which
    writes one a chunk. backbone, which is cut, shares its weights."""

    hold = None  # a head always gives a chunk

    def __init__(
        self,
        backbone: Backbone,
        head: FlowHead,
        spec: PolicySpec,
        device,
        seed: int = 0,
        writer: Backbone | None = None,
    ):
        self.backbone = backbone
        self.writer = writer
        self.head = head.eval()
        self.spec = spec
        self.device = torch.device(device)
        self.seed = seed
        self.horizon = head.cfg.horizon
        self.action_dim = head.cfg.action_dim
        self.cameras = spec["cameras"]
        self.views = CameraViews(self.cameras, spec.get("image_sizes", {}))
        self.thinks = spec.get("condition", "prompt") != "prompt"
        self.thoughts = None
        self.calls = 0
        self.count = Counter()

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", seed: int = 0) -> "Policy":
        """path: a checkpoint of vla.py, or its run folder. ValueError for one of another stage."""
        folder = model.find_checkpoint(path)
        backbone = model.load(folder, device, model.compute_dtype(device), stages=("vla",))
        has_head = Path(folder, "head.safetensors").exists()
        if not backbone.run and has_head:
            raise ValueError(f"{folder}: has lost its run.json; copy the whole folder again")
        if "policy" not in backbone.run and not has_head:
            raise ValueError(f"{path}: no policy; train one from it with vla.py --init {path}")
        spec, head_config = checked_spec(folder, backbone.run.get("policy"))
        writer = whole_copy(backbone) if spec.get("thoughts") == "own" else None
        freeze_backbone(backbone, spec["layer"])
        head = FlowHead(head_config)
        with model.reading_checkpoint(folder):
            weights = load_file(folder / "head.safetensors")
        try:
            head.load_state_dict(weights)
        except RuntimeError as e:
            raise ValueError(
                f"{folder}: head.safetensors is not of the sizes that policy.head in run.json "
                "says; copy the whole folder again"
            ) from e
        return cls(backbone, head.to(device), spec, device, seed, writer)

    def identity(self) -> Iterator[np.ndarray]:
        return bytes_of(self.head.parameters())

    def act(self, images: np.ndarray | list, instruction: str, state: np.ndarray) -> np.ndarray:
        """One observation: uint8 image (H, W, 3), a list with one for each camera, or a dict of
        them by name; state (S,) in dataset units -> (K, A) float32 in dataset units."""
        return self.act_batch([images], [instruction], np.asarray(state)[None])[0]

    @counted
    @torch.no_grad()
    def act_batch(
        self,
        images: list,
        instructions: list[str],
        states: np.ndarray,
        keys: list | None = None,
        thoughts: list[str] | None = None,
    ) -> np.ndarray:
        """B observations: images what `act` takes for each, states (B, S) -> (B, K, A) float32, not
        clipped. keys: a list of integers for each row, by which its noise is drawn, whatever the
        batch. thoughts: in words, for a head that was trained on recorded ones, or in place of its
        own. ValueError when sizes or values do not fit."""
        # 1. check
        states = np.asarray(states, np.float32)
        expected_shape = (len(images), self.head.cfg.state_dim)
        if states.shape != expected_shape or len(instructions) != len(images):
            raise ValueError(
                f"{len(images)} images, {len(instructions)} instructions and states "
                f"{states.shape}; give as many of each, states {expected_shape}"
            )
        is_finite = np.isfinite(states).all(1)  # (B,)
        if not is_finite.all():
            row = np.flatnonzero(~is_finite)[0]
            raise ValueError(f"state {row} is not finite; repair the observation")
        check_instructions(instructions, images)
        check_thoughts(thoughts, self)
        # 2. prompts, states and noise
        think = self.spec["think"]
        prompts = []
        for row_images, instruction in zip(images, instructions, strict=True):
            views = self.views(row_images)
            prompts.append(prompt_row(self.backbone, views, instruction, think))
        state = torch.from_numpy(normalize(states, self.spec["stats"]["state"])).to(self.device)
        noise = torch.from_numpy(self._noise(len(prompts), keys)).to(self.device)  # (B, K, A)
        # 3. thoughts, where the head reads them
        condition = self.spec.get("condition", "prompt")
        if self.thinks:
            prompts = self._with_thoughts(prompts, thoughts)
        # 4. features, then the flow
        features = encode_prompts(self.backbone, prompts, self.device, condition)
        with autocast(self.device):
            chunks = self.head.sample(*features, state, noise)  # (B, K, A)
        return unnormalize(chunks.cpu().numpy(), self.spec["stats"]["action"])

    def _with_thoughts(self, prompts, given):
        """The prompts go on with the thoughts that are given, or else with the model's own."""
        if given is not None:
            thoughts = given_thoughts(self.backbone, given, len(prompts))
        elif self.writer is None:
            raise ValueError(
                "the head was trained on recorded thoughts and is given none here; train it with "
                "--thoughts own"
            )
        else:
            start = time.perf_counter()
            thoughts = write_thoughts(self.writer, prompts, self.spec["max_thought"])
            self.count["thinking"] += time.perf_counter() - start
            unfinished = [not is_finished(self.writer, thought) for thought in thoughts]
            self.count["unfinished"] += sum(unfinished)
        self.thoughts = [thought_text(self.backbone, thought) for thought in thoughts]
        return [with_thought(*pair) for pair in zip(prompts, thoughts, strict=True)]

    def _noise(self, batch, keys):
        """-> (B, K, A) float32; by the keys of each row, else by the number of the call."""
        shape = (self.horizon, self.action_dim)
        call = self.calls
        self.calls += 1
        if not keys:
            rng = model.rng(self.seed, "policy", call)
            return rng.standard_normal((batch, *shape), np.float32)
        rows = []
        for key in keys:
            rows.append(model.rng(self.seed, "row", *key).standard_normal(shape, np.float32))
        return np.stack(rows)


MODES = ("think", "direct")  # of a TokenPolicy


class TokenPolicy:
    """A checkpoint of sft or grpo as a policy: the model itself writes the chunk as FAST tokens.

    1. it answers the action prompt, thinking first or directly (mode), with the most probable
       tokens, or, if `sampled`, with tokens drawn at `temperature`, as RL draws them
    2. an answer whose FAST tokens are no chunk is written again, sampled at `temperature`, until
       there are `tries` answers
    3. where none of them is one the chunk is NaN, and ChunkExecutor holds still

    Beside a Policy's attributes: count["retried"] are chunks whose first answer was none,
    count["held"] those that stayed so. A chunk is what decodes; tags around it may be missing. The
    prompt has one image and no state, as in sft.py and grpo.py: states are not looked at.
    max_new_tokens: of an answer, as in the checkpoint's own run."""

    cameras = ("image",)  # what EpisodeFile.frame() gives where nobody names another

    def __init__(
        self,
        backbone: Backbone,
        mode: str,
        tries: int = 3,
        temperature: float = 1.0,
        seed: int = 0,
        sampled: bool = False,
    ):
        self.backbone = backbone
        self.mode = mode
        self.tries = tries
        self.temperature = temperature
        self.seed = seed
        self.sampled = sampled
        self.max_new_tokens = model.token_limit(None, backbone, 96)
        self.action_tokenizer = backbone.action_tokenizer
        self.horizon = self.action_tokenizer.horizon
        self.action_dim = self.action_tokenizer.action_dim
        stats = self.action_tokenizer.stats
        self.spec = {"cameras": self.cameras, "stats": {"action": stats}}
        if "min" in stats and "max" in stats:
            self.spec["action_range"] = {"low": stats["min"], "high": stats["max"]}
        self.views = CameraViews(self.cameras, {})
        self.hold = how_to_hold_still(stats)
        self.thinks = mode == "think"
        self.thoughts = None
        self.calls = 0
        self.count = Counter()

    @classmethod
    def load(
        cls,
        path: str | Path,
        mode: str = "think",
        tries: int = 3,
        temperature: float = 1.0,
        device: str | torch.device = "cpu",
        seed: int = 0,
        sampled: bool = False,
    ) -> "TokenPolicy":
        """ValueError for a checkpoint of another stage, or one that knows no actions."""
        backbone = model.load(path, device, model.compute_dtype(device), stages=("sft", "grpo"))
        if backbone.action_tokenizer is None or backbone.action_tokenizer.stats is None:
            raise ValueError(
                f"{path}: no action tokenizer with statistics; train it on episodes with sft.py"
            )
        return cls(backbone, mode, tries, temperature, seed, sampled)

    def identity(self) -> Iterator[np.ndarray | bytes]:
        settings = [self.mode, self.tries, self.temperature, self.max_new_tokens, self.sampled]
        yield json.dumps(settings).encode()
        yield from bytes_of(self.backbone.net.parameters())

    def act(self, images: np.ndarray | list, instruction: str, state: np.ndarray) -> np.ndarray:
        """As Policy.act; NaN where no answer is a chunk."""
        return self.act_batch([images], [instruction], np.asarray(state)[None])[0]

    @counted
    def act_batch(
        self,
        images: list,
        instructions: list[str],
        states: np.ndarray,
        keys: list | None = None,
        thoughts: list[str] | None = None,
    ) -> np.ndarray:
        """As Policy.act_batch. keys: a list of integers for each row, by which its answers are
        sampled, whatever the batch; without them, by the number of the call and of the row.
        thoughts: in words, after which it writes the answer; without them it thinks by itself."""
        # 1. prompts
        check_instructions(instructions, images)
        check_thoughts(thoughts, self)
        prompts = []
        for row_images, instruction in zip(images, instructions, strict=True):
            views = self.views(row_images)
            prompts.append(prompt_row(self.backbone, views, instruction, self.thinks))
        if thoughts is not None:
            given = given_thoughts(self.backbone, thoughts, len(prompts))
            prompts = [with_thought(*pair) for pair in zip(prompts, given, strict=True)]
        keys = keys or [[self.calls, b] for b in range(len(prompts))]
        self.calls += 1
        # 2. answers, and again where there is no chunk yet
        shape = (len(prompts), self.horizon, self.action_dim)
        chunks = np.full(shape, np.nan, np.float32)
        written = [""] * len(prompts)
        failed = list(range(len(prompts)))
        for attempt in range(self.tries):
            answers = self._write([prompts[b] for b in failed], [keys[b] for b in failed], attempt)
            action_ids = [model.parse_actions(self.backbone, ids).action_ids for ids in answers]
            decoded, decodes = self.action_tokenizer.decode(action_ids)  # NaN where it does not
            chunks[failed] = decoded
            for b, ids in zip(failed, answers, strict=True):
                written[b] = thought_text(self.backbone, ids)
            failed = [b for b, is_chunk in zip(failed, decodes, strict=True) if not is_chunk]
            if attempt == 0:
                self.count["retried"] += len(failed)
            if not failed:
                break
        self.count["held"] += len(failed)
        self.thoughts = (thoughts or written) if self.thinks else None
        return chunks

    def _write(self, prompts, keys, attempt):
        """Prompts -> a list of token ids each."""
        sample_keys = []
        for key in keys:
            rng = model.rng(self.seed, "answer", attempt, *key)
            sample_keys.append(int(rng.integers(2**31)))
        samples = model.generate(
            self.backbone,
            prompts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            greedy=attempt == 0 and not self.sampled,
            seed=self.seed,
            keys=sample_keys,
        )
        answers = []
        for ids, mask in zip(samples["ids"], samples["mask"].bool(), strict=True):
            answers.append(ids[mask].tolist())
        return answers


def policy_flags(add: Callable) -> None:
    """Flags of what loads a policy, for a checkpoint of sft or grpo; add is a parser's
    add_argument."""
    add("--mode", choices=MODES, help="of an sft or grpo checkpoint; think if not given")
    add("--tries", type=count, help="its answers to a prompt at most, then it holds still; 3")
    add("--temperature", type=positive, help="of its answers that are sampled; 1")
    add(
        "--sampled",
        action="store_true",
        default=None,
        help="its first answer is sampled too, as RL samples it; else it is the greedy one",
    )


def policy_of_flags(args: argparse.Namespace) -> Policy | TokenPolicy:
    """args: those of policy_flags(), and policy, device, seed; see load_policy()."""
    return load_policy(
        args.policy,
        args.mode,
        args.tries,
        args.temperature,
        args.device,
        args.seed,
        args.sampled,
    )


def load_policy(
    path: str | Path,
    mode: str | None = None,
    tries: int | None = None,
    temperature: float | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    sampled: bool | None = None,
) -> Policy | TokenPolicy:
    """A checkpoint of stage vla -> Policy; of sft or grpo -> TokenPolicy. path: it, or its run
    folder. What is None is as TokenPolicy has it. ValueError for one of another stage, or for what
    a head does not have: mode, tries, temperature, sampled."""
    record = Path(model.find_checkpoint(path)) / "run.json"
    stage = model.read_run(record.parent, "stage")["stage"] if record.exists() else "vla"
    of_tokens = {"mode": mode, "tries": tries, "temperature": temperature, "sampled": sampled}
    given = {name: value for name, value in of_tokens.items() if value is not None}
    if stage != "vla":
        return TokenPolicy.load(path, device=device, seed=seed, **given)
    for name, value in given.items():
        raise ValueError(
            f"--{name} {value}: the head of {path} writes no tokens; leave --{name} out"
        )
    return Policy.load(path, device, seed)


# ---- Carrying out chunks -------------------------------------------------------------------------


class Hold(NamedTuple):
    """How a robot holds still: 0 in the dimensions that are movements; a dimension of `keeps` gets
    what it was last told, at first `first`, NaN where nobody knows."""

    keeps: np.ndarray  # (A,) bool
    first: np.ndarray  # (A,) dataset units


def how_to_hold_still(stats: Stats) -> Hold | None:
    """By the statistics of the training actions; None when they lack mean or std.

    Which dimensions are movements the recordings may say (`deltas`). Where they do not it is
    guessed: a gripper is told one end of its range or the other, so its variance is nearly the
    largest that its mean allows, (max - mean) (mean - min), of which that of a movement is about a
    third. What lies on one side of 0 and is no gripper is a position. Positions on both sides of 0
    cannot be told from movements then.

    A gripper is told first the end that is nearer to its mean, the more frequent one; what a
    position is told first is not known. Without `deltas`:

        dimension   min   max   mean    std   share of largest variance   is told
        gripper     -1    1     0.2     0.95  0.90 / 0.96 = 0.94          the last one, first 1
        movement    -1    1     0       0.5   0.25 / 1    = 0.25          0
        height       0.1  0.4   0.25    0.1   0.01 / 0.0225 = 0.44        the last one, first NaN
    """
    if not {"mean", "std"} <= set(stats):
        return None
    low = np.array(stats.get("min", stats["q01"]))  # (A,)
    high = np.array(stats.get("max", stats["q99"]))
    mean = np.array(stats["mean"])
    largest_variance = (high - mean) * (mean - low)
    is_gripper = np.square(stats["std"]) > 0.75 * largest_variance
    is_constant = high - low < STILL
    if "deltas" in stats:
        keeps = np.arange(len(mean)) >= stats["deltas"]
    else:
        keeps = (is_gripper & ~is_constant) | (low > 0) | (high < 0)
    more_frequent = np.where(mean - low < high - mean, low, high)
    return Hold(keeps, np.where(is_gripper | is_constant, more_frequent, np.nan))


class ChunkExecutor:
    """What one robot carries out of the chunks predicted for it; in simulation and in the server.

    execute: actions of a chunk before the next forward; 0: half of the horizon. ensemble: 0, the
    newest chunk alone; m > 0, the mean of all chunks that reach a step, the oldest weighing 1, the
    next exp(-m), and so on: temporal ensembling, as in ACT (arXiv 2304.13705, section IV-A).

    Chunks a, b, c of K = 5 actions, execute = 2:

        step                   0    1    2    3    4    5
        a, predicted at 0      a0   a1   a2   a3   a4
        b, predicted at 2                b0   b1   b2   b3   ...
        c, predicted at 4                          c0   c1   ...
        ensemble 0             a0   a1   b0   b1   c0   c1
        ensemble m             a0   a1   w(a2, b0)   w(a3, b1)   w(a4, b2, c0)   w(b3, c1)

    where w(x, y, z) = (x + exp(-m) y + exp(-2m) z) / (1 + exp(-m) + exp(-2m)).

    hold: for a chunk of NaN (TokenPolicy) it holds still so, whatever earlier chunks say."""

    def __init__(
        self, horizon: int, execute: int = 0, ensemble: float = 0.0, hold: Hold | None = None
    ):
        self.execute = execute or max(1, horizon // 2)
        self.ensemble = ensemble
        self.hold = hold
        if ensemble and horizon == 1:
            raise ValueError(f"--ensemble {ensemble}: chunks of one action do not overlap; use 0")
        most = horizon - 1 if ensemble else horizon  # chunks must overlap for an ensemble
        if not 0 < self.execute <= most or ensemble < 0:
            raise ValueError(
                f"--execute {execute} --ensemble {ensemble}: execute 1 to {most} of the "
                f"{horizon} actions in a chunk; an ensemble is 0 or more"
            )
        self.reset()

    def reset(self) -> None:
        """Forgets all chunks, as at the start of an episode."""
        self.chunks = []  # what was left of the chunks at the last call; oldest first
        self.instruction = None
        self.last_action = None if self.hold is None else self.hold.first  # (A,)

    def interrupt(self, told: np.ndarray | None) -> None:
        """The rest of the last actions is not carried out, as where a subtask ends among them:
        forgets all chunks. told: (A,), what the robot was told last; None: nothing yet."""
        self.chunks = []
        if told is not None:
            self.last_action = told

    def __call__(self, chunk: np.ndarray, instruction: str) -> np.ndarray:
        """Chunk (K, A) predicted now -> the actions to carry out (execute, A). Chunks that were
        predicted for another instruction are forgotten. ValueError for a chunk that is not finite
        when it is not known how to hold still."""
        # 1. what earlier chunks say of the steps from now on
        earlier = []
        if self.ensemble and instruction == self.instruction:
            earlier = [old[self.execute :] for old in self.chunks if len(old) > self.execute]
        self.instruction = instruction
        if not np.isfinite(chunk).all():
            self.chunks = earlier
            return np.repeat(self._still_action()[None], self.execute, 0).astype(chunk.dtype)
        self.chunks = [*earlier, chunk]
        # 2. the weighted mean at each step
        actions = []
        for i in range(self.execute):
            predictions = [c[i] for c in self.chunks if i < len(c)]  # (A,) each
            weights = np.exp(-self.ensemble * np.arange(len(predictions)))
            actions.append(np.average(predictions, 0, weights))
        self.last_action = actions[-1]
        return np.stack(actions).astype(chunk.dtype)

    def _still_action(self):
        action = np.nan
        if self.hold is not None:
            action = np.where(self.hold.keeps, self.last_action, 0.0)  # (A,)
        if not np.isfinite(action).all():
            raise ValueError(
                f"stop the robot: the policy answers nan, and to hold still would be {action}"
            )
        return action


# ---- Training ------------------------------------------------------------------------------------


class Fetched(NamedTuple):
    """A step's frames, fetched while the step before it is computed."""

    frame_ids: np.ndarray  # (batch,), of all ranks
    local_inputs: list  # FeatureSource.read() of this rank's


def training_targets(frames: FrameDataset, frame_ids: np.ndarray, device) -> list[torch.Tensor]:
    """-> normalised state (B, S) and action (B, K, A), and action_mask (B, K, A)."""
    mask = np.repeat(frames.mask[frame_ids][..., None], frames.action.shape[2], axis=2)
    arrays = [frames.state[frame_ids], frames.action[frame_ids], mask]
    return [torch.from_numpy(array).to(device) for array in arrays]


def local_slice(cfg: Config, dist: Dist) -> slice:
    """This rank's part of a batch."""
    local_batch = cfg.batch // dist.world_size
    return slice(dist.rank * local_batch, (dist.rank + 1) * local_batch)


def flow_loss(
    head: FlowHead, source: FeatureSource, frames, cfg, step: int, fetched: Fetched, dist
) -> tuple[torch.Tensor, dict[str, torch.Tensor | TokenSums]]:
    """This rank's part of a step's loss, such that the average over ranks is the mean over the
    global batch. -> (loss, info), as FlowHead.loss(); with --ce-weight info has "answers", the
    TokenSums of this rank's frames."""
    frame_ids, local_inputs = fetched
    local = local_slice(cfg, dist)
    state, action, action_mask = training_targets(frames, frame_ids[local], dist.device)
    drawn = head.draw(model.rng(cfg.seed, "flow", step), cfg.batch, cfg.draws)  # of all ranks
    # Counted elements of the global batch: each rank knows them without asking the others.
    counted = int(frames.mask[frame_ids].sum()) * frames.action.shape[2] * cfg.draws
    divisor = counted / dist.world_size  # the gradient is averaged over ranks
    targets = (state, action, action_mask, drawn.rows(local), divisor)
    with autocast(dist.device):
        if not cfg.ce_weight:
            return head.loss(*source.features(local_inputs), *targets)
        features, answers = source.features_and_answers(local_inputs)
        loss, info = head.loss(*features, *targets)
    tokens_per_rank = max(model.all_sum(answers.tokens.item()), 1) / dist.world_size
    loss = loss + cfg.ce_weight * answers.loss / tokens_per_rank
    return loss, {**info, "answers": answers}


class StepSums(NamedTuple):
    """What is summed until the next line of the log; a checkpoint keeps it in this order."""

    flow_error: float
    flow_elements: float  # that were counted
    answer_loss: float  # TokenSums of the answers, with --ce-weight
    answer_tokens: float
    answer_correct: float


class StepInfo(NamedTuple):
    sums: StepSums  # of this rank
    metrics: dict[str, float]  # of all ranks: norms of gradients before clipping, learning rate


def train_step(
    head: FlowHead, optim, source: FeatureSource, frames, cfg, step: int, fetched: Fetched, dist
) -> StepInfo:
    """One optimizer step; all ranks call it. ValueError when a number is not finite."""
    local_ids = fetched.frame_ids[local_slice(cfg, dist)]
    check = functools.partial(  # check(name, value)
        model.stop_if_not_finite, cfg.out, f"step {step + 1}", dist, frames.replay(local_ids)
    )
    lr = model.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup_ratio)
    for group in optim.param_groups:
        group["lr"] = model.learning_rate(step, cfg.steps, group["initial_lr"], cfg.warmup_ratio)
    if cfg.dropout:  # what it drops is a function of (seed, step, rank): resume is exact
        torch.manual_seed(int(model.rng(cfg.seed, step, dist.rank).integers(2**31)))
    loss, info = flow_loss(head, source, frames, cfg, step, fetched, dist)
    check("loss", loss.item())
    loss.backward()
    # Each is clipped by its own norm: what the head learns does not depend on the other's size.
    grad_norm = model.clip_gradients(head.parameters(), cfg.max_grad_norm)
    check("gradient norm", grad_norm)
    metrics = {"grad_norm": grad_norm, "lr": lr}
    if cfg.backbone_lr:
        backbone_norm = model.clip_gradients(source.backbone.net.parameters(), cfg.max_grad_norm)
        check("gradient norm of the backbone", backbone_norm)
        metrics["backbone_grad_norm"] = backbone_norm
    optim.step()
    optim.zero_grad()
    answers = info.get("answers", torch.zeros(3))
    sums = [value.item() for value in (info["sum"], info["count"], *answers)]
    return StepInfo(StepSums(*sums), metrics)


@torch.no_grad()
def update_average(heads: dict[str, FlowHead], decay: float, step: int) -> None:
    """head <- decay * head + (1 - decay) * raw."""
    averaged = model.local_shards(heads["head"].parameters())
    raw = model.local_shards(heads["raw"].parameters())
    decay = min(decay, (1 + step) / (10 + step))  # at first raw still moves far
    torch._foreach_lerp_(averaged, raw, 1 - decay)


@torch.no_grad()
def evaluate(
    head: FlowHead, source: FeatureSource, frames: FrameDataset, cfg: Config, dist: Dist
) -> dict[str, float]:
    """Held-out frames, evenly spaced: flow loss, L1 and squared error of sampled chunks, each the
    mean over counted elements, in normalised units (q01 to q99 is 2). {} without held-out ones.

    Each rank makes as many forwards as any other, since FSDP needs it. So each has as many frames:
    where some are missing the last one fills in, and is not counted. Of 5 frames on 2 ranks,
    --batch 4:

        rank     0          1
        frames   0 1 | 2    3 4 | (4)     two forwards each
    """
    # 1. the frames, and their draws: the same at each evaluation
    frame_count = min(cfg.eval_rows, len(frames.held))
    if frame_count == 0:
        return {}
    frame_ids = frames.held[np.linspace(0, len(frames.held) - 1, frame_count).astype(int)]
    loss_draws = head.draw(model.rng(cfg.seed, "held"), frame_count)
    start_noise = head.draw(model.rng(cfg.seed, "sample"), frame_count).noise[:, 0]

    # 2. this rank's
    frames_each = -(-frame_count // dist.world_size)  # rounded up
    first_frame = dist.rank * frames_each
    local_batch = cfg.batch // dist.world_size
    sums = np.zeros(4)  # flow loss, counted elements, |error|, error squared
    head.eval()
    for start in range(0, frames_each, local_batch):
        end = min(start + local_batch, frames_each)
        indices = first_frame + np.arange(start, end)  # (B,)
        is_real = torch.from_numpy(indices < frame_count).to(dist.device)
        indices = np.minimum(indices, frame_count - 1)
        state, action, action_mask = training_targets(frames, frame_ids[indices], dist.device)
        action_mask = action_mask * is_real[:, None, None]
        drawn = loss_draws.rows(indices)
        noise = start_noise[indices].to(dist.device)  # (B, K, A)
        with autocast(dist.device):
            feats, mask = source.features(source.read(frame_ids[indices]))
            _, info = head.loss(feats, mask, state, action, action_mask, drawn)
            sampled = head.sample(feats, mask, state, noise)
        error = (sampled - action) * action_mask  # (B, K, A)
        totals = [info["sum"], info["count"], error.abs().sum(), error.square().sum()]
        sums += [total.item() for total in totals]
    head.train()
    if isinstance(head, FSDPModule):
        head.reshard()  # else the next evaluation reads the weights gathered for this one

    # 3. means over all ranks
    loss, count, l1, squared = model.all_sum(sums.tolist())
    return {"held_loss": loss / count, "held_l1": l1 / count, "held_mse": squared / count}


# ---- Main ----------------------------------------------------------------------------------------

ROOM_SHARE = 0.5  # of a rank's free memory that a whole backbone may take; the head needs the rest


def load_backbone(cfg: Config, newest: Path | None, dist: Dist) -> Backbone:
    """The backbone of --init, or of the checkpoint to resume (already cut, unless it writes
    thoughts or answers). One that is trained has fp32 masters."""
    backbone = model.load(
        newest or cfg.init,
        dist.build,  # open_features() gives it to all ranks
        torch.float32 if cfg.backbone_lr else model.compute_dtype(dist.device),
        stages=("vla",) if newest else ("base", "sft", "grpo"),
        seed=cfg.seed,
        max_pixels=cfg.max_pixels,
    )
    if newest and backbone.image_spec != model.ImageSpec.load(newest):
        raise ValueError(f"{newest}: was run with another --max-pixels; leave it out to go on")
    return backbone


def open_features(
    backbone: Backbone,
    frames: FrameDataset,
    cfg: Config,
    dist: Dist,
    thoughts: list[np.ndarray] | None,
    answers: list[np.ndarray] | None = None,
    layer: int = 0,
) -> FeatureSource:
    """Where the features come from, as --cache says. The backbone goes to where they are
    made, and back when all are in the cache."""
    if cfg.cache == "none":
        if cfg.backbone_lr or cfg.shard_backbone or not has_room(backbone.net, dist):
            model.shard(backbone.net, dist)
        else:
            model.replicate(backbone.net, dist)
        return LiveFeatures(backbone, frames, cfg, dist.device, thoughts, answers, layer)
    # Not sharded: the ranks fill the cache by unequal numbers of forwards.
    model.replicate(backbone.net, dist)
    source = build_cache(backbone, frames, cfg, dist, thoughts)
    backbone.net.to(dist.build)  # out of the GPU's way; rank 0 alone saves it
    return source


def has_room(net: nn.Module, dist: Dist) -> bool:
    """Whether a whole copy of the net takes at most ROOM_SHARE of the memory that each rank has
    free. Then it is not sharded: that gathers all of it in each step, 10.8 GB of a cut 7B."""
    needed = sum(p.numel() * p.itemsize for p in net.parameters())
    has_less = needed > ROOM_SHARE * free_memory(dist)
    return model.all_sum(has_less) == 0  # all ranks do the same


def free_memory(dist: Dist) -> float:
    """Bytes: of this rank's GPU, or its part of the whole memory of a CPU."""
    if dist.device.type == "cuda":
        torch.cuda.empty_cache()  # what own_thoughts() has freed, torch would keep
        return torch.cuda.mem_get_info(dist.device)[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory / int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size))


def make_heads(
    head_config: HeadConfig, newest: Path | None, cfg: Config, dist: Dist
) -> dict[str, FlowHead]:
    """-> {"head": the one that acts}, which is also trained; with --ema-decay it is the average of
    "raw", which is trained in its stead. The keys are the names of their files in a checkpoint."""
    torch.manual_seed(cfg.seed)
    heads = {"head": FlowHead(head_config).to(dist.device)}
    if cfg.ema_decay:
        heads["raw"] = copy.deepcopy(heads["head"])
    for name, head in heads.items():
        is_needed = name == "head" or not model.has_ended(newest)  # which kept no raw one
        if newest and is_needed:
            with model.reading_checkpoint(newest):
                head.load_state_dict(load_file(newest / f"{name}.safetensors"))
        # fp32: in bf16 FSDP would round the inputs, time among them. autocast() lowers the matmuls.
        model.shard(head, dist, torch.float32)
        for method in ("loss", "sample"):
            register_fsdp_forward_method(head, method)
    return heads


def make_optimizer(head: FlowHead, backbone: Backbone, cfg: Config) -> torch.optim.Optimizer:
    """Of the head, and of a backbone that is trained, which AdamW updates at a rate of its own.
    "initial_lr" of a group is its peak."""
    betas = (cfg.beta1, cfg.beta2)
    optim = model.make_optimizer(head, cfg.lr, cfg.weight_decay, betas, cfg.muon)
    if cfg.backbone_lr:
        of_backbone = model.make_optimizer(backbone.net, cfg.backbone_lr, cfg.weight_decay, betas)
        for group in of_backbone.param_groups:
            optim.add_param_group(group)
    for group in optim.param_groups:
        group["initial_lr"] = group["lr"]
    return optim


def save_policy(
    folder: Path, backbone: Backbone, final_norm: nn.Module, heads: dict, run: dict, optim=None
) -> None:
    """Self-contained: the cut backbone with its final norm (it loads in plain transformers), or the
    whole one that writes thoughts or learned its action tokens, the head in head.safetensors, and
    in run.json under "policy" all else that acting needs."""
    language_model = backbone.net.model.language_model
    norm = language_model.norm  # nn.Identity() of a net that truncate() has cut
    language_model.norm = final_norm
    model.save(folder, {"backbone": backbone, **heads}, run, optim)
    language_model.norm = norm


def make_head_config(cfg: Config, frames: FrameDataset, backbone: Backbone) -> HeadConfig:
    return HeadConfig(
        vl_dim=backbone.net.config.text_config.hidden_size,
        dim=cfg.dim,
        layers=cfg.layers,
        heads=cfg.heads,
        vl_layers=cfg.vl_layers,
        state_dim=frames.state.shape[1],
        action_dim=frames.action.shape[2],
        horizon=cfg.horizon,
        future_tokens=cfg.future_tokens,
        dropout=cfg.dropout,
    )


def policy_spec(
    cfg: Config, frames: FrameDataset, head_config: HeadConfig, layer: int
) -> PolicySpec:
    spec: PolicySpec = {
        "head": asdict(head_config),
        "layer": layer,
        "think": asks_to_think(cfg),
        "cameras": frames.cameras,
        "stats": frames.stats,
        "image_sizes": frames.image_sizes,
        "action_range": frames.action_range,
    }
    if cfg.condition != "prompt":
        spec |= {
            "condition": cfg.condition,
            "thoughts": cfg.thoughts,
            "max_thought": cfg.max_thought,
        }
    return spec


def training_metrics(local_sums: np.ndarray) -> dict[str, float]:
    """StepSums of this rank, as an array -> means over all ranks. The loss keeps a floor, the
    variance of the velocity: watch held_l1 instead."""
    sums = StepSums(*model.all_sum(local_sums.tolist()))
    metrics = {"loss": sums.flow_error / sums.flow_elements}
    if sums.answer_tokens:
        metrics["ce_loss"] = sums.answer_loss / sums.answer_tokens
        metrics["token_accuracy"] = sums.answer_correct / sums.answer_tokens
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    cfg = model.parse_config(Config, PRESETS, argv)
    check_config(cfg)
    model.keep_freed_memory()
    dist = model.setup(cfg.seed, cfg.shards, cfg.batch, cfg.timeout_hours)

    # 1. the backbone; it may think about each frame, then it is cut after a layer and frozen, if
    # nothing trains it
    frames = FrameDataset(cfg)
    if dist.rank == 0:
        for name, stats in frames.stats.items():
            for line in rare_lines(stats, name):
                print(f"{cfg.data}: {line}")
    newest = model.checkpoint_to_resume(cfg)
    data = {cfg.data: {"sha256": episodes_sha256(frames.episodes)}}
    if newest and not cfg.changed_data:
        model.check_unchanged(data, newest)
    backbone = load_backbone(cfg, newest, dist)
    if newest:
        layer = checked_spec(newest, backbone.run.get("policy"))[0]["layer"]
    else:
        layer = model.feature_layer(backbone.net, cfg.layer)
    # The head reads `backbone`. A checkpoint holds `saved_backbone`, with the `final_norm` that the
    # cut takes off:
    #
    #                       backbone         saved_backbone
    #     default           cut, frozen      backbone
    #     own thoughts      cut, frozen      a whole copy of the same weights, which writes them
    #     --backbone-lr     cut, trained     backbone
    #     and --ce-weight   whole, trained   backbone
    thoughts = None
    answers = None
    saved_backbone = backbone
    if cfg.condition != "prompt":
        thoughts = frame_thoughts(backbone, frames, cfg, dist)
        if cfg.thoughts == "own":
            saved_backbone = whole_copy(backbone)
    if cfg.ce_weight:
        answers = frame_answers(backbone, frames, cfg)
    final_norm = choose_trained(backbone, layer, cfg)
    head_config = make_head_config(cfg, frames, backbone)
    # 2. its features
    source = open_features(backbone, frames, cfg, dist, thoughts, answers, layer)

    # 3. the head, which reads them and the state:
    #
    #                       trained          acts                           saved
    #     default           heads["raw"]     heads["head"], its average     both; in final/ "head"
    #     --ema-decay 0     heads["head"]    heads["head"]                  "head"
    heads = make_heads(head_config, newest, cfg, dist)
    trained_name = "raw" if cfg.ema_decay else "head"
    trained = heads[trained_name].train()
    optim = make_optimizer(trained, backbone, cfg)
    in_train_state = {trained_name: trained, "backbone": backbone}  # as save_policy() names them
    start, unlogged = model.load_train_state(newest, in_train_state, optim)
    model.check_steps(newest, start, cfg.steps)
    unlogged = np.zeros(len(StepSums._fields)) + unlogged  # a new run gives 0

    split = [split_record(frames.episodes, frames.held_out_episodes)]
    if dist.rank == 0 and frames.held_out_episodes:
        warn_of_other_split(backbone.run.get("split", []), split)
    run = {
        "stage": "vla",
        "config": asdict(cfg),
        "parent": cfg.init,
        "command": model.command_line("vla.py", argv),
        "data": data,
        "split": join_splits(backbone.run.get("split", []), split),
        "policy": policy_spec(cfg, frames, head_config, layer),
        "trained": ["head", "backbone"] if cfg.backbone_lr else ["head"],
    }
    save = functools.partial(
        save_policy, backbone=saved_backbone, final_norm=final_norm, heads=heads, optim=optim
    )
    local = local_slice(cfg, dist)

    def fetch(step):
        frame_ids = sample_order(cfg, frames.train, step)
        return Fetched(frame_ids, source.read(frame_ids[local]))

    model.stop_on_sigterm()
    log = model.Log(cfg.out, cfg, dist)
    timed_step = start  # steps_per_s counts from it, and from clock, when it ended
    clock = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        next_fetched = pool.submit(fetch, start)
        for step in range(start, cfg.steps):
            fetched = next_fetched.result()
            next_fetched = pool.submit(fetch, step + 1)
            # 4. the error of the velocity, and an optimizer step
            info = train_step(trained, optim, source, frames, cfg, step, fetched, dist)
            if cfg.ema_decay:
                update_average(heads, cfg.ema_decay, step)
            unlogged += info.sums
            done = step + 1
            if done % cfg.log_every == 0 or done == cfg.steps:
                metrics = training_metrics(unlogged) | info.metrics
                speed = (done - timed_step) / (time.perf_counter() - clock)
                log.write(step=done, **metrics, steps_per_s=speed)
                timed_step = done
                clock = time.perf_counter()
                unlogged = np.zeros_like(unlogged)
            # 5. chunks of held-out frames, against the true ones
            if cfg.eval_every and done % cfg.eval_every == 0 and done < cfg.steps:
                metrics = evaluate(heads["head"], source, frames, cfg, dist)
                if metrics:
                    log.write(step=done, **metrics)
                timed_step = done
                clock = time.perf_counter()
            model.save_step(cfg, done, run, save, unlogged.tolist())

    final = Path(cfg.out) / "final"
    run |= {"step": cfg.steps}
    if not model.has_ended(newest):
        save_policy(final, saved_backbone, final_norm, {"head": heads["head"]}, run)
    model.end_on_sigterm()
    metrics = evaluate(heads["head"], source, frames, cfg, dist)
    if metrics:
        log.write(step=cfg.steps, **metrics)
    model.add_metrics(final, metrics)


if __name__ == "__main__":
    model.run_main(main, "--batch")
