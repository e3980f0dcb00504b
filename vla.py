"""Stage 3 of RoboAlign (arXiv 2603.21341): a flow-matching action head, as GR00T N1.5's, on the
features of one layer of the frozen backbone.

In: a checkpoint of stage base, sft or grpo, and episodes (images, state, actions, instruction).
Out: a policy (images, instruction, state) -> the next K actions. It writes no text at run time:
reasoning acts through the features that RL shaped.
1. cut the frozen backbone after layer 0.64 L (18 of 28)
2. its hidden states over all image and text tokens of the action prompt condition the head
3. the normalised state enters the head alone, as one token
4. x_t = (1 - t) noise + t action; the head learns the velocity action - noise, masked past the end
5. 4 Euler steps from seeded noise give the chunk; q01/q99 statistics turn it into dataset units
Our deviations: the features of all frames are computed once and memory-mapped (--cache features);
several (time, noise) draws share a frame's features (--draws); averaged weights act (--ema-decay).

Reads --init, --data. Writes runs/vla/{log.jsonl, features/, step_*/, final/}.
OMP_NUM_THREADS=1 python vla.py speedrun            # one CPU core, 0.1 s a step
torchrun --nproc_per_node 1 vla.py --batch 256     # one GPU
torchrun --nproc_per_node 8 vla.py paper --init runs/grpo-paper --data data/libero     # 8 GPUs"""

import copy
import functools
import hashlib
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import model
from fast_tokenizer import (
    action_chunks,
    read_stats,
    read_episodes,
    normalize,
    split_episodes,
    unnormalize,
)


@dataclass(frozen=True)
class Config:
    preset: str = ""
    init: str = "runs/grpo"  # checkpoint of stage base, sft or grpo; or hub name
    data: str = "data/tabletop/episodes"  # folder of episodes and stats.json
    max_episodes: int = 0  # only the first episodes; 0: all
    stride: int = 1  # use every stride-th frame of an episode: neighbours say nearly the same
    out: str = "runs/vla"  # run folder
    seed: int = 0  # order of the frames, noise, initial weights of the head
    layer: int = 0  # LLM layer whose output conditions the head; 0: 0.64 of the depth
    think: bool = False  # mode line of the prompt: think first, or answer directly
    cameras: str = "image"  # camera names of the episodes, separated by commas
    max_pixels: int = 0  # larger images are shrunk to so many pixels; 0: as the backbone says
    shards: int = 0  # ranks that share one copy of the weights, more nodes mirror it; 0: all ranks
    horizon: int = 8  # actions in a chunk, K
    dim: int = 128  # width of the head
    layers: int = 4  # blocks of the head; even ones read the features
    heads: int = 4  # attention heads
    vl_layers: int = 1  # self-attention blocks over the features; 0: none
    future_tokens: int = 4  # learned tokens between state and actions
    dropout: float = 0.0  # in the head
    cache: str = "features"  # features: the backbone runs once, before training; none: in each step
    cache_dir: str = ""  # folder of the cached features; empty: features/ in --out
    steps: int = 2000  # optimizer steps
    batch: int = 64  # frames a step, over all ranks
    draws: int = 2  # (time, noise) pairs a frame and step, which share its features
    lr: float = 1e-3  # peak learning rate
    warmup_ratio: float = 0.05  # share of the steps; cosine to 0 after it
    beta1: float = 0.95  # AdamW
    beta2: float = 0.999  # AdamW
    weight_decay: float = 1e-5  # AdamW, not on norms and biases
    max_grad_norm: float = 1.0  # gradient norm; 0: no clipping
    muon: bool = False  # inner matrices by orthogonalised momentum (Muon) instead of AdamW
    ema_decay: float = 0.999  # decay of the averaged weights that the policy uses; 0: no average
    holdout_share: float = (
        0.05  # share of the episodes, the last ones, kept for evaluation; 0: none
    )
    eval_rows: int = 256  # held-out frames of one evaluation
    eval_every: int = 500  # steps; 0: only at the end
    save_every: int = 1000  # steps; 0: only at the end
    keep: int = 0  # newest checkpoints step_* that stay; 0: all
    log_every: int = 50  # steps
    resume: bool = False  # continue from the newest step_* in --out


PRESETS = {
    "tabletop": {},
    "speedrun": {
        "stride": 2,
        "horizon": 5,
        "vl_layers": 0,
        "future_tokens": 0,
        "steps": 2200,
        "lr": 4e-3,
        "muon": True,
        "save_every": 0,
    },
    "paper": {
        "init": "runs/grpo-paper",
        "data": "data/libero",
        "out": "runs/vla-paper",
        "horizon": 16,
        "dim": 1536,
        "layers": 16,
        "heads": 32,
        "vl_layers": 4,
        "future_tokens": 32,
        "dropout": 0.2,
        "cache": "none",
        "steps": 60000,
        "batch": 32,
        "draws": 1,
        "lr": 1e-4,
        "ema_decay": 0.0,
        "eval_every": 2000,
        "save_every": 10000,
    },
}


# Data: numbers in memory, frames on disk


class FrameDataset:
    """All frames of a folder of episodes, each with its state and the K actions that follow it.

    state (N, S) and action (N, K, A) are normalised by q01/q99 -> [-1, 1], not clipped; mask (N, K)
    is 0 past the end of the episode. train and held are ranges of frame numbers 0..N-1.
    ValueError naming what does not fit; FileNotFoundError without episodes."""

    def __init__(self, cfg):
        self.files, self.cameras = read_episodes(cfg.data, cfg.max_episodes), cfg.cameras.split(",")
        self.stats = read_stats(cfg.data, self.files)
        for f in self.files:
            if missing := [c for c in self.cameras if c not in f.cameras]:
                raise ValueError(
                    f"{f.path}: no camera {missing[0]!r}; choose --cameras among "
                    f"{', '.join(f.cameras)}"
                )
        longest = max(map(len, self.files))
        if not 0 < cfg.horizon <= longest:
            raise ValueError(
                f"--horizon {cfg.horizon} is not in 1..{longest}, the length of the "
                f"longest episode of {cfg.data}"
            )
        left = [np.arange(len(f), 0, -cfg.stride) for f in self.files]  # steps to the episode's end
        self.stride, self.ends = cfg.stride, np.cumsum([len(x) for x in left])
        self.numbers = [range(end - len(x), end) for x, end in zip(left, self.ends.tolist())]
        state = np.concatenate([f.state[:: cfg.stride] for f in self.files])
        action = np.concatenate([action_chunks(f, cfg.horizon)[:: cfg.stride] for f in self.files])
        self.state = normalize(state, self.stats["state"]).astype(np.float32)  # (N, S)
        self.action = normalize(action, self.stats["action"]).astype(np.float32)  # (N, K, A)
        self.mask = np.arange(cfg.horizon) < np.concatenate(left)[:, None]  # (N, K)
        kept = (
            split_episodes(self.files, cfg.holdout_share)[0]
            if cfg.holdout_share > 0
            else self.files
        )
        cut = int(self.ends[len(kept) - 1])
        self.train, self.held = range(cut), range(cut, len(self.mask))

    def at(self, i):
        """Frame number -> (episode number, step)."""
        e = int(np.searchsorted(self.ends, i, side="right"))
        return e, (int(i) - self.numbers[e][0]) * self.stride

    def batch(self, ids):
        """FrameDataset as model.stop_if_not_finite saves them; what was seen in them follows from their numbers."""
        where = [f"{self.files[e].path}:{t}" for e, t in map(self.at, ids)]
        yield {
            "sample_id": where,
            "frame": ids,
            "state": self.state[ids],
            "action": self.action[ids],
        }


@functools.lru_cache(2)
def shuffled(seed, n, number):
    """The order of pass `number` over n frames."""
    return model.rng(seed, "pass", number).permutation(n)


def sample_order(cfg, n, step):
    """The `batch` frame numbers of a step: a function of (seed, step), each frame once a pass."""
    at = range(step * cfg.batch, (step + 1) * cfg.batch)
    return np.array([shuffled(cfg.seed, n, i // n)[i % n] for i in at])


# Features of the frozen backbone


def prompt_row(backbone, images, instruction, think, memo):
    """The action prompt as a row of model.collate, in training and evaluation alike. The same words
    and image sizes give the same tokens, which `memo` (a dict) keeps; then only pixels are cut."""
    key = (instruction, think, *(image.shape for image in images))
    if key in memo:
        patches = np.concatenate(
            [model.patchify(image, backbone.image_spec)[0] for image in images]
        )
        return {**memo[key], "patches": patches}
    messages = model.action_prompt(instruction, think, len(images))
    row = model.encode(backbone, messages, images, prompt_only=True)
    memo[key] = {**row, "patches": None}
    return row


def compute_dtype(device):
    """The one place that names the compute type of backbone and head."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def truncate(net, layer):
    """Keeps the first `layer` LLM blocks; hidden() then gives what the last puts out, unnormed."""
    lm = net.model.language_model
    if not 0 < layer <= len(lm.layers):
        raise ValueError(f"layer {layer} is not in 1..{len(lm.layers)}; choose one of these")
    lm.layers, lm.norm = lm.layers[:layer], nn.Identity()
    lm.config.num_hidden_layers = layer
    if getattr(lm.config, "layer_types", None):
        lm.config.layer_types = lm.config.layer_types[:layer]


def freeze_backbone(backbone, layer):
    """Cuts the backbone after `layer` of its L blocks (0: round(0.64 L)) and freezes it. -> its
    final norm, which the features do without and save_policy() puts back."""
    lm = backbone.net.model.language_model
    norm = lm.norm
    truncate(backbone.net, layer or round(0.64 * len(lm.layers)))
    backbone.net.requires_grad_(False).eval()
    return norm


@torch.no_grad()
def encode_prompts(backbone, rows, device):
    """Rows -> features (B, T, D), mask (B, T), or None where no row is padded."""
    batch = model.to_device(model.collate(rows, backbone.vocab.pad), device)
    same = all(len(r["ids"]) == len(rows[0]["ids"]) for r in rows)
    return model.hidden_states(backbone.net, batch), None if same else batch["mask"]


class LiveFeatures:
    """Features by running the backbone on each batch (--cache none)."""

    def __init__(self, backbone, frames, cfg, device):
        self.backbone, self.frames, self.think, self.device, self.memo = (
            backbone,
            frames,
            cfg.think,
            device,
            {},
        )

    def read(self, ids):
        """Frame numbers -> prompts."""
        seen = [(self.frames.files[e], t) for e, t in map(self.frames.at, ids)]
        return [
            prompt_row(
                self.backbone,
                [file.frame(t, camera) for camera in self.frames.cameras],
                file.task,
                self.think,
                self.memo,
            )
            for file, t in seen
        ]

    def features(self, rows):
        return encode_prompts(self.backbone, rows, self.device)


class CachedFeatures:
    """Features from disk (--cache features): for each episode a file of its name with the tensor
    "features" (frames, T, D), read by slice. fp16 on CPU; bf16 on GPU, the type they come in."""

    def __init__(self, folder, frames, device):
        self.frames, self.device, self.files = frames, device, []
        for episode in frames.files:
            path = folder / episode.path.name
            try:
                self.files.append(safe_open(path, "pt").get_slice("features"))
            except (SafetensorError, OSError) as e:
                raise ValueError(f"{path}: {e}; delete {folder} to compute it again") from e

    def read(self, ids):
        places = ((e, t // self.frames.stride) for e, t in map(self.frames.at, ids))
        return [self.files[e][t : t + 1][0] for e, t in places]  # (T, D) each

    def features(self, feats):
        length = torch.tensor([len(f) for f in feats])
        feats = pad_sequence(feats, batch_first=True)  # (B, T, D)
        mask = torch.arange(feats.shape[1]) < length[:, None]  # (B, T)
        return feats.to(self.device), None if mask.all() else mask.to(self.device)


def digest(items):
    sha = hashlib.sha256()
    for item in items:
        sha.update(item)
    return sha.hexdigest()


def fingerprint(backbone, frames, rows, cfg):
    """What the features depend on: weights, prompts (words, mode, images), layer, files."""
    stat = [(f.path.name, f.path.stat().st_size, f.path.stat().st_mtime_ns) for f in frames.files]
    weights = sorted(backbone.net.model.state_dict().items())
    return {
        "backbone": digest(
            w.contiguous().reshape(-1).view(torch.uint8).cpu().numpy() for _, w in weights
        ),
        "layer": len(backbone.net.model.language_model.layers),
        "type": str(backbone.net.dtype),
        "prompts": digest(row["ids"].tobytes() for row in rows),
        "images": repr(backbone.image_spec),
        "cameras": cfg.cameras,
        "stride": cfg.stride,
        "episodes": digest([repr(stat).encode()]),
    }


def build_cache(backbone, frames, cfg, dist, size=64):
    """Runs the backbone over all frames, split over the ranks by episodes, unless the folder holds
    the very same features already. -> CachedFeatures. ValueError when it holds other ones."""
    folder, numbers = Path(cfg.cache_dir or Path(cfg.out) / "features"), frames.numbers
    folder.mkdir(parents=True, exist_ok=True)
    loop = LiveFeatures(backbone, frames, cfg, dist.device)
    rows = loop.read([n[0] for n in numbers])  # the others of an episode are as long
    made_from, path = fingerprint(backbone, frames, rows, cfg), folder / "fingerprint.json"
    if path.exists():
        stored = model.read_json(path)
        if stale := [k for k in made_from if stored.get(k) != made_from[k]]:
            raise ValueError(
                f"{folder}: features of other {', '.join(stale)} than this run's; "
                "delete the folder or name another --cache-dir"
            )
        return CachedFeatures(folder, frames, dist.device)
    need = sum(len(n) * len(r["ids"]) for n, r in zip(numbers, rows)) * 2 / 1e9
    need, free = (
        need * backbone.net.config.text_config.hidden_size,
        shutil.disk_usage(folder).free / 1e9,
    )
    if need > free:
        raise ValueError(
            f"{folder}: the features take {need:.1f} GB, {free:.1f} are free; name "
            "another --cache-dir or use --cache none"
        )
    kind = torch.float16 if backbone.net.dtype == torch.float32 else backbone.net.dtype
    mine = list(zip(frames.files, numbers))[dist.rank :: dist.world_size]
    for file, n in tqdm(mine, "features", unit="episode", disable=None if dist.rank == 0 else True):
        parts = (n[k : k + size] for k in range(0, len(n), size))
        feats = torch.cat([loop.features(loop.read(part))[0].to(kind).cpu() for part in parts])
        if not feats.isfinite().all():
            raise ValueError(
                f"{file.path}: its features are not finite as {kind}; check the "
                "checkpoint, or use --cache none"
            )
        save_file({"features": feats}, folder / file.path.name)
    if distributed.is_initialized():
        distributed.barrier()
    if dist.rank == 0:  # last and atomically: a folder without it is incomplete, and computed again
        model.write_json(path, made_from)
    return CachedFeatures(folder, frames, dist.device)


# The policy


class Policy:
    """A trained checkpoint as a function (images, instruction, state) -> the next K actions.

    Attributes: horizon K, action_dim A, cameras (names, in the order in which images are given).
    Call n draws its noise from (seed, n): row b of a batch gets the same at any batch size."""

    def __init__(self, backbone, head, spec, device, seed=0):
        self.backbone, self.head, self.spec, self.device = (
            backbone,
            head.eval(),
            spec,
            torch.device(device),
        )
        self.horizon, self.action_dim = head.cfg.horizon, head.cfg.action_dim
        self.cameras, self.seed, self.calls, self.memo = spec["cameras"], seed, 0, {}

    @classmethod
    def load(cls, path, device="cpu", seed=0):
        """path: a checkpoint of vla.py, or its run folder. ValueError for one of another stage."""
        folder = model.find_checkpoint(path)
        backbone = model.load(folder, device, compute_dtype(device), stages=("vla",))
        if "policy" not in backbone.run:
            raise ValueError(f"{path}: no policy; train one from it with vla.py --init {path}")
        spec = backbone.run["policy"]
        freeze_backbone(backbone, spec["layer"])
        head = FlowHead(HeadConfig(**spec["head"]))
        head.load_state_dict(load_file(folder / "head.safetensors"))
        return cls(backbone, head.to(device), spec, device, seed)

    def act(self, images, instruction, state):
        """One observation: uint8 image (H, W, 3), or a list with one for each camera; state (S,) in
        dataset units -> (K, A) float32 in dataset units."""
        return self.act_batch([images], [instruction], np.asarray(state)[None])[0]

    @torch.no_grad()
    def act_batch(self, images, instructions, states, keys=None):
        """B observations: images a list of what `act` takes, instructions a list of texts, states
        (B, S) -> (B, K, A) float32, not clipped. keys: numbers for each row, by which its noise is
        drawn, whatever the batch. ValueError when sizes or values do not fit."""
        states, size = np.asarray(states, np.float32), (len(images), self.head.cfg.state_dim)
        if states.shape != size or len(instructions) != len(images):
            raise ValueError(
                f"{len(images)} images, {len(instructions)} instructions and states "
                f"{states.shape}; give as many of each, states {size}"
            )
        if not np.isfinite(states).all():
            row = np.flatnonzero(~np.isfinite(states).all(1))[0]
            raise ValueError(f"state {row} is not finite; repair the observation")
        rows = []
        for views, instruction in zip(images, instructions):
            views = [views] if getattr(views, "ndim", 0) == 3 else list(views)
            if len(views) != len(self.cameras):
                raise ValueError(
                    f"{len(views)} images; the policy was trained with the cameras "
                    f"{', '.join(self.cameras)}"
                )
            rows.append(
                prompt_row(self.backbone, views, instruction, self.spec["think"], self.memo)
            )
        state = torch.from_numpy(normalize(states, self.spec["stats"]["state"]))  # (B, S)
        shape = (len(rows), self.horizon, self.action_dim)
        noise = (
            np.stack(
                [
                    model.rng(self.seed, "row", *key).standard_normal(shape[1:], np.float32)
                    for key in keys
                ]
            )
            if keys
            else model.rng(self.seed, "policy", self.calls).standard_normal(shape, np.float32)
        )
        self.calls += 1
        feats, mask = encode_prompts(self.backbone, rows, self.device)
        with autocast(self.device):
            x = self.head.sample(
                feats, mask, state.to(self.device), torch.from_numpy(noise).to(self.device)
            )  # (B, K, A)
        return unnormalize(x.cpu().numpy(), self.spec["stats"]["action"])


class ChunkExecutor:
    """What one robot carries out of the chunks predicted for it; in simulation and in the server.

    execute: actions of a chunk before the next forward; 0: half of the horizon. ensemble: 0, the
    newest chunk alone; m > 0, the mean of all chunks that reach a step, the oldest weighing 1, the
    next exp(-m), and so on: temporal ensembling, as in ACT (arXiv 2304.13705, section IV-A).
    """

    def __init__(self, horizon, execute=0, ensemble=0.0):
        self.execute, self.ensemble = execute or max(1, horizon // 2), ensemble
        most = horizon - 1 if ensemble else horizon  # chunks must overlap for an ensemble
        if not 0 < self.execute <= most or ensemble < 0:
            raise ValueError(
                f"--execute {execute} --ensemble {ensemble}: execute 1 to {most} of the "
                f"{horizon} actions in a chunk; an ensemble is 0 or more"
            )
        self.reset()

    def reset(self):
        self.past, self.task = [], None

    def __call__(self, chunk, task):
        """Chunk (K, A) predicted now -> the actions to carry out (execute, A). ChunkExecutor that were
        predicted for another instruction are forgotten."""
        past = self.past if self.ensemble and task == self.task else []  # oldest first
        past = [c[self.execute :] for c in past if len(c) > self.execute]
        self.past, self.task = [*past, chunk], task
        said = [[c[i] for c in self.past if i < len(c)] for i in range(self.execute)]
        return np.stack(
            [np.average(x, 0, np.exp(-self.ensemble * np.arange(len(x)))) for x in said]
        ).astype(chunk.dtype)


def autocast(device):
    return torch.autocast(
        device.type, torch.bfloat16, enabled=compute_dtype(device) != torch.float32
    )


# Training


def training_targets(frames, ids, device):
    """Frame numbers (B,) -> state (B, S), action (B, K, A), action mask (B, K, A)."""
    mask = np.repeat(frames.mask[ids][..., None], frames.action.shape[2], axis=2)
    return [torch.from_numpy(x).to(device) for x in (frames.state[ids], frames.action[ids], mask)]


def flow_loss(head, source, frames, cfg, step, fetched, dist):
    """This rank's part of a step's loss, such that the average over ranks is the mean over the
    global batch. fetched: (global ids (batch,), source.read of this rank's) -> (loss, info)."""
    ids, rows = fetched
    part = slice(
        dist.rank * cfg.batch // dist.world_size, (dist.rank + 1) * cfg.batch // dist.world_size
    )
    drawn = head.draw(model.rng(cfg.seed, "flow", step), cfg.batch, cfg.draws)
    state, action, mask = training_targets(frames, ids[part], dist.device)
    count = int(frames.mask[ids].sum()) * action.shape[2] * cfg.draws  # known without asking ranks
    with autocast(dist.device):
        return head.loss(
            *source.features(rows),
            state,
            action,
            mask,
            drawn=[x[part] for x in drawn],
            count=count / dist.world_size,
        )


@torch.no_grad()
def evaluate(head, source, frames, cfg, dist):
    """Held-out frames, evenly spaced: flow loss, L1 and squared error of sampled chunks, in
    normalised units (range 2) a counted element. -> {name: value}, {} without held-out episodes."""
    n = min(cfg.eval_rows, len(frames.held))
    if n == 0:
        return {}
    ids = np.linspace(frames.held[0], frames.held[-1], n).astype(int)
    drawn = head.draw(model.rng(cfg.seed, "held"), n)  # the same at each evaluation
    first = head.draw(model.rng(cfg.seed, "sample"), n)[0][:, 0]  # (n, K, A)
    share, size, total = -(-n // dist.world_size), cfg.batch // dist.world_size, np.zeros(4)
    head.eval()
    for k in range(0, share, size):  # the same number of forwards on each rank
        at = dist.rank * share + np.arange(k, min(k + size, share))
        real, at = torch.from_numpy(at < n).to(dist.device), np.minimum(at, n - 1)
        state, action, mask = training_targets(frames, ids[at], dist.device)
        mask = mask * real[:, None, None]
        with autocast(dist.device):
            seen = source.features(source.read(ids[at]))
            info = head.loss(*seen, state, action, mask, drawn=[x[at] for x in drawn])[1]
            x = head.sample(*seen, state, first[at].to(dist.device))
        error = (x - action) * mask
        total += [
            float(v) for v in (info["sum"], info["count"], error.abs().sum(), error.square().sum())
        ]
    head.train()
    if isinstance(head, FSDPModule):
        head.reshard()  # else the gathered weights of before the next update would stay
    loss, count, l1, mse = model.all_sum(total.tolist())
    return {"held_loss": loss / count, "held_l1": l1 / count, "held_mse": mse / count}


# Flow-matching action head

TIME_SCALE = 0.999  # s of t = (s - u) / s, u ~ Beta(1.5, 1)


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a FlowHead; the numbers in the comments are GR00T N1.5's own."""

    vl_dim: int  # width of the vision-language features
    dim: int  # width of the DiT (N1.5: 1536)
    layers: int  # DiT blocks; even ones cross-attend the features, odd ones self-attend (16)
    heads: int  # attention heads of the DiT and of the VL path (32)
    vl_layers: int  # self-attention blocks over the features, 0 = LayerNorm alone (4)
    state_dim: int  # proprioceptive dimensions S
    action_dim: int  # action dimensions A
    horizon: int  # steps K of an action chunk (16)
    future_tokens: int  # learned tokens between state and actions, 0 = none (32)
    buckets: int = 1000  # time is rounded down to 1/buckets
    steps: int = 4  # Euler steps when sampling
    dropout: float = 0.0  # after each attention and MLP of the DiT and VL blocks (0.2)


def sinusoid(time, dim):
    """Sines and cosines of `time` (...,), in buckets, at dim / 2 frequencies -> (..., dim) fp32."""
    rate = torch.exp(torch.arange(dim // 2, device=time.device) * (-2 * np.log(1e4) / dim))
    angle = time.float()[..., None] * rate  # (..., D / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class FlowBlock(nn.Module):
    """Pre-norm attention and MLP. `ada`: scale and shift of the first norm come from the time, with
    no gates (N1.5's AdaLayerNorm). `cross`: keys and values are given, not made from x."""

    def __init__(self, dim, heads, dropout=0.0, ada=False, cross=False):
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

    def forward(self, x, time=None, kv=None, mask=None):
        """x (B*R, N, D), time (B*R or 1, D), kv two (B, T, D), mask (B, 1, 1, T) -> like x."""
        h = self.norm1(x)
        if self.ada is not None:
            scale, shift = self.ada(time)[:, None].chunk(2, dim=-1)  # (B*R, 1, D) each
            h = torch.addcmul(shift, h, 1 + scale)
        # The R draws of a sample stand one behind the other on the query axis: attention treats
        # queries independently, so one K/V serves them all without a copy.
        q = self.qkv(h)
        parts = q.chunk(3, dim=-1) if kv is None else (q.view(len(kv[0]), -1, q.shape[-1]), *kv)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, R*N, d)
        x = x + self.drop(self.proj(h.transpose(1, 2).reshape(x.shape)))
        return x + self.drop(self.mlp(self.norm2(x)))


class FlowHead(nn.Module):
    """Flow-matching action head after GR00T N1.5 (arXiv 2503.14734 and its released source): tokens
    [state | future tokens | noised actions] pass a DiT that reads the features of the backbone.

    Differences from N1.5: padding of the features is masked (its release leaves the mask unused);
    one embodiment; keys and values of all cross-attention blocks come from one matrix, once for all
    Euler steps and noise draws; no output projection of the DiT, which another linear map follows.
    """

    def __init__(self, cfg):
        super().__init__()
        for name, width in (("dim", cfg.dim), ("vl_dim", cfg.vl_dim)):
            if width % cfg.heads or width % 2:
                raise ValueError(f"{name} {width} must be even and a multiple of {cfg.heads} heads")
        self.cfg, dim = cfg, cfg.dim
        self.vl_norm = nn.LayerNorm(cfg.vl_dim, elementwise_affine=cfg.vl_layers > 0)  # else: kv
        self.vl_blocks = nn.ModuleList(
            FlowBlock(cfg.vl_dim, cfg.heads, cfg.dropout) for _ in range(cfg.vl_layers)
        )
        self.kv = nn.Linear(cfg.vl_dim, (cfg.layers + 1) // 2 * 2 * dim)
        self.state_in = nn.Sequential(nn.Linear(cfg.state_dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.action_in = nn.Linear(cfg.action_dim, dim)
        self.action_mix = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.position = nn.Parameter(torch.randn(cfg.horizon, dim) * 0.02)
        self.future = nn.Parameter(torch.randn(cfg.future_tokens, dim) * 0.02)
        self.time_in = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.blocks = nn.ModuleList(
            FlowBlock(dim, cfg.heads, cfg.dropout, True, i % 2 == 0) for i in range(cfg.layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False)
        self.ada_out = nn.Linear(dim, 2 * dim)
        self.decoder = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, cfg.action_dim))

    def context(self, feats, mask):
        """Features (B, T, D) and mask (B, T), or None when all count -> what each block and Euler
        step reads of them: k, v (B, T, dim) for each cross-attention block, mask (B, 1, 1, T)."""
        mask = None if mask is None else mask.bool()[:, None, None]  # (B, 1, 1, T)
        x = self.vl_norm(feats.float())
        for block in self.vl_blocks:
            x = block(x, mask=mask)  # (B, T, vl_dim)
        kv = self.kv(x).split(self.cfg.dim, dim=-1)  # k of block 0, v of block 0, k of block 2, ...
        return list(zip(kv[::2], kv[1::2])), mask

    def velocity(self, noised, time, state, context):
        """noised (B*R, K, A), time (B*R or 1,) in [0, 1], state token (B*R, 1, D), context of B
        samples -> velocity (B*R, K, A)."""
        kv, mask = context
        bucket = (time * self.cfg.buckets).long()  # (B*R,)
        h = self.action_in(noised)  # (B*R, K, D)
        pace = sinusoid(bucket, self.cfg.dim).to(h.dtype)  # (B*R, D)
        paces = pace[:, None].expand(len(h), h.shape[1], -1)
        h = self.action_mix(torch.cat([h, paces], dim=-1)) + self.position
        x = torch.cat([state, self.future.expand(len(h), -1, -1), h], dim=1)  # (B*R, 1+F+K, D)
        t = self.time_in(pace)  # (B*R, D)
        for i, block in enumerate(self.blocks):
            x = block(x, t) if i % 2 else block(x, t, kv[i // 2], mask)
        scale, shift = self.ada_out(t)[:, None].chunk(2, dim=-1)
        x = torch.addcmul(shift, self.norm_out(x[:, -noised.shape[1] :]), 1 + scale)
        return self.decoder(x)  # (B*R, K, A)

    def draw(self, rng, batch, draws=1):
        """Noise (B, R, K, A) ~ N(0, 1) and time (B, R) from a numpy generator; time is (s - u) / s
        with u ~ Beta(1.5, 1) clamped at s, so that most of it lies near pure noise."""
        u = np.minimum(rng.beta(1.5, 1.0, (batch, draws)), TIME_SCALE)
        shape = (batch, draws, self.cfg.horizon, self.cfg.action_dim)
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        return noise, torch.from_numpy((TIME_SCALE - u) / TIME_SCALE).float()

    def loss(self, feats, mask, state, action, action_mask, drawn, count=None):
        """Masked flow-matching loss of one batch with R (noise, time) pairs a sample, which share
        the VL path: at small sizes it costs more than the DiT. -> (loss fp32, {"sum", "count"}).

        feats (B, T, D), mask (B, T) or None; state (B, S) and action (B, K, A) normalised;
        action_mask (B, K, A) 0 past an episode's end and in padded dimensions. drawn: as draw()
        gives it. count: the divisor, None = the number of counted elements here (at least 1)."""
        noise, time = (x.to(action.device) for x in drawn)
        t, draws = time[:, :, None, None], time.shape[1]  # (B, R, 1, 1)
        noised = (1 - t) * noise + t * action[:, None]  # (B, R, K, A)
        target = action[:, None] - noise  # fork point: the path and its velocity
        start = self.state_in(state)[:, None].repeat_interleave(draws, dim=0)  # (B*R, 1, D)
        context = self.context(feats, mask)
        v = self.velocity(noised.flatten(0, 1), time.flatten(), start, context)  # (B*R, K, A)
        error = (v.float().view_as(target) - target).square() * action_mask[:, None]
        total, here = error.sum(), action_mask.sum() * draws
        loss = total / (here.clamp(min=1) if count is None else count)
        return loss, {"sum": total.detach(), "count": here}

    @torch.no_grad()
    def sample(self, feats, mask, state, noise):
        """Features (B, T, D), mask (B, T), normalised state (B, S), noise (B, K, A) -> normalised
        chunks (B, K, A) fp32, by `steps` Euler steps."""
        context, start = self.context(feats, mask), self.state_in(state)[:, None]  # (B, 1, D)
        x = noise.float()
        for i in range(self.cfg.steps):
            time = torch.full((1,), i / self.cfg.steps, device=x.device)
            x = x + self.velocity(x, time, start, context).float() / self.cfg.steps
        return x


def make_heads(sizes, newest, cfg, dist):
    """-> {"head": the head that acts, and with --ema-decay "raw": the one that is trained}."""
    torch.manual_seed(cfg.seed)
    heads = {"head": FlowHead(sizes).to(dist.device)}
    if cfg.ema_decay:
        heads["raw"] = copy.deepcopy(heads["head"])
    for name, head in heads.items():
        if newest:
            head.load_state_dict(load_file(newest / f"{name}.safetensors"))
        # fp32 gathers: autocast does the mixing, as inputs (time!) must not be rounded to bf16
        model.shard(head, dist, torch.float32)
        for method in ("loss", "sample"):
            register_fsdp_forward_method(head, method)
    return heads


@torch.no_grad()
def update_average(heads, decay, step):
    """head <- decay * head + (1 - decay) * raw; faster at first, when raw still changes much."""
    ours, new = (
        [p.to_local() if hasattr(p, "to_local") else p for p in heads[k].parameters()]
        for k in ("head", "raw")
    )
    torch._foreach_lerp_(ours, new, 1 - min(decay, (1 + step) / (10 + step)))


def save_policy(folder, backbone, norm, heads, run, **state):
    """Self-contained: the cut backbone with its final norm (it loads in plain transformers), the
    head in head.safetensors, and in run.json under "policy" all else that acting needs."""
    lm = backbone.net.model.language_model
    lm.norm, bare = norm, lm.norm
    model.save(folder, {"backbone": backbone, **heads}, run, **state)
    lm.norm = bare


def prepare(cfg, dist):
    """-> FrameDataset, frozen Backbone, its final norm, feature source, checkpoint to resume or None."""
    if cfg.cache not in ("features", "none"):
        raise ValueError(f"--cache {cfg.cache}: choose features or none")
    if min(cfg.draws, cfg.layers, cfg.stride) < 1 or not 0 <= cfg.ema_decay < 1:
        raise ValueError(
            f"--draws {cfg.draws}, --layers {cfg.layers}, --stride {cfg.stride}, "
            f"--ema-decay {cfg.ema_decay}; the first three start at 1, ema lies in [0, 1)"
        )
    frames, newest = FrameDataset(cfg), model.checkpoint_to_resume(cfg)
    backbone = model.load(
        newest or cfg.init,
        dist.build if cfg.cache == "none" else dist.device,
        compute_dtype(dist.device),
        ("vla",) if newest else ("base", "sft", "grpo"),
        cfg.seed,
        max_pixels=cfg.max_pixels,
    )
    norm = freeze_backbone(backbone, backbone.run["policy"]["layer"] if newest else cfg.layer)
    if cfg.cache == "none":
        model.shard(backbone.net, dist, compute_dtype(dist.device))
        return frames, backbone, norm, LiveFeatures(backbone, frames, cfg, dist.device), newest
    # Whole on each rank, which run unequal numbers of batches; then out of the GPU's way.
    source = build_cache(backbone, frames, cfg, dist)
    backbone.net.cpu()
    return frames, backbone, norm, source, newest


def main(argv=None):
    cfg = model.parse_config(Config, PRESETS, argv)
    dist = model.setup(cfg.seed, cfg.shards, cfg.batch)
    frames, backbone, norm, source, newest = prepare(cfg, dist)
    sizes = HeadConfig(
        backbone.net.config.text_config.hidden_size,
        cfg.dim,
        cfg.layers,
        cfg.heads,
        cfg.vl_layers,
        frames.state.shape[1],
        frames.action.shape[2],
        cfg.horizon,
        cfg.future_tokens,
        dropout=cfg.dropout,
    )
    heads = make_heads(sizes, newest, cfg, dist)
    trained = "raw" if cfg.ema_decay else "head"
    head = heads[trained].train()
    optim = model.make_optimizer(head, cfg.lr, cfg.weight_decay, (cfg.beta1, cfg.beta2), cfg.muon)
    start, unlogged = model.load_train_state(newest, {trained: head}, optim)
    run = {
        "stage": "vla",
        "config": asdict(cfg),
        "parent": cfg.init,
        "policy": {
            "head": asdict(sizes),
            "layer": len(backbone.net.model.language_model.layers),
            "think": cfg.think,
            "cameras": frames.cameras,
            "stats": frames.stats,
        },
    }
    write = functools.partial(save_policy, backbone=backbone, norm=norm, heads=heads, optim=optim)
    log = model.Log(cfg.out, cfg, dist)
    part = slice(
        dist.rank * cfg.batch // dist.world_size, (dist.rank + 1) * cfg.batch // dist.world_size
    )
    seconds, since, total = time.perf_counter(), start, np.zeros(2) + unlogged

    def fetch(step):
        ids = sample_order(cfg, len(frames.train), step)
        return ids, source.read(ids[part])

    with ThreadPoolExecutor(1) as pool:  # frames or features of the next step
        ahead = pool.submit(fetch, start)
        for step in range(start, cfg.steps):
            fetched, ahead = ahead.result(), pool.submit(fetch, step + 1)
            lr = model.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup_ratio)
            for group in optim.param_groups:
                group["lr"] = lr
            if cfg.dropout:
                torch.manual_seed(int(model.rng(cfg.seed, step, dist.rank).integers(2**31)))
            loss, info = flow_loss(head, source, frames, cfg, step, fetched, dist)
            guard = functools.partial(
                model.stop_if_not_finite,
                cfg.out,
                f"step {step + 1}",
                dist,
                frames.batch(fetched[0][part]),
            )
            guard("loss", loss.item())
            loss.backward()
            norm_g = model.clip_gradients(head.parameters(), cfg.max_grad_norm)
            guard("gradient norm", norm_g)
            optim.step()
            optim.zero_grad()
            if cfg.ema_decay:
                update_average(heads, cfg.ema_decay, step)
            total += [float(info["sum"]), float(info["count"])]
            done = step + 1
            if done % cfg.log_every == 0 or done == cfg.steps:
                # The loss keeps a floor, the variance of the velocity: watch held_l1 instead.
                summed, count = model.all_sum(total.tolist())
                now = time.perf_counter()
                log.write(
                    step=done,
                    loss=summed / count,
                    grad_norm=norm_g,
                    lr=lr,
                    steps_per_s=(done - since) / (now - seconds),
                )
                seconds, since, total = now, done, np.zeros(2)
            if cfg.eval_every and done % cfg.eval_every == 0 and done < cfg.steps:
                log.write(step=done, **evaluate(heads["head"], source, frames, cfg, dist))
                seconds, since = time.perf_counter(), done
            model.save_step(cfg, done, run, write, total.tolist())
    metrics = evaluate(heads["head"], source, frames, cfg, dist)
    log.write(step=cfg.steps, **metrics)
    save_policy(
        Path(cfg.out) / "final",
        backbone,
        norm,
        {"head": heads["head"]},
        {**run, "step": cfg.steps, "metrics": metrics},
    )


if __name__ == "__main__":
    model.run_main(main, "--batch")
