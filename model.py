"""What the three stages share: backbone, vocabulary, images and prompts, losses, sampler, action
head, sharding and checkpoints. What could make training, RL and evaluation disagree is here.

Backbones: Qwen2.5-VL and Qwen3-VL of transformers, local folder or hub name.
The paper is RoboAlign, arXiv 2603.21341. A checkpoint is a folder that plain transformers loads,
plus fast/ (action tokenizer), run.json (stage, config, versions, parent) and train_state/ (resume).

Legend: B batch, T tokens, D width, H heads, P patches, G rollouts per prompt, K action-chunk
length, A action dimensions, V vocabulary, L layer. A mask is 1 where it counts. M-RoPE: a token's
position is (time, row, column); text advances all three together.
"""

import argparse
import contextlib
import ctypes
import functools
import inspect
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import threading
import time
import types
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed import fsdp, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from fast_tokenizer import FastTokenizer

transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of DCP in one process
META = torch.device("meta")

# Prompts and answers

ACTION_START, ACTION_END = "<ACTION_START>", "<ACTION_END>"
THINK = "Think in <think></think>, then answer in <answer></answer>."
DIRECT = "Answer in <answer></answer>."
fast_token = "<FAST_{}>".format  # of the i-th FAST token


def ask(question, think):
    """The one prompt function. think: True, False, or None to leave the question as it is."""
    return question if think is None else f"{question}\n{THINK if think else DIRECT}"


def action_question(instruction):
    return f"Instruction: {instruction}\nWhat should the robot do next?"


def action_prompt(instruction, think, images=1):
    """The conversation that asks for an action, after so many images."""
    question = "<image>" * images + ask(action_question(instruction), think)
    return [{"role": "user", "content": question}]


def action_answer(ids):
    """FAST ids (indices 0..n-1, not token ids) -> the answer text."""
    return f"<answer>{ACTION_START}{''.join(map(fast_token, ids))}{ACTION_END}</answer>"


def parse_actions(backbone, ids):
    """One sampled sequence of token ids -> (well_formed, has_think, FAST indices).

    Well formed: [<think>...</think>] <answer> START FAST+ END </answer> <|im_end|>, but for white
    space between the parts; has_think: and a thought that is not blank (r_f of paper section 3).
    The indices are the run of FAST tokens after the first START, also when the rest is malformed.
    Tags are matched as text: Qwen2.5 has no token for them."""
    v, ids = backbone.vocab, [int(i) for i in ids]
    ids = ids[: ids.index(v.eos) + 1] if v.eos in ids else ids
    if v.action_start not in ids:
        return False, False, []
    index, a = {t: i for i, t in enumerate(v.fast)}, ids.index(v.action_start)
    fast = [index[t] for t in itertools.takewhile(index.__contains__, ids[a + 1 :])]
    b = a + 1 + len(fast)  # where END should be
    head, tail = backbone.tokenizer.decode(ids[:a]), backbone.tokenizer.decode(ids[b + 1 :])
    tag = r"(?:(?!</?think>|</?answer>|<FAST_).)*"  # text without another tag in it
    match = re.fullmatch(rf"\s*(?:<think>({tag})</think>)?\s*<answer>\s*", head, re.DOTALL)
    closed = ids[b : b + 1] == [v.action_end] and re.fullmatch(r"\s*</answer>\s*<\|im_end\|>", tail)
    good = bool(match and closed and fast)
    return good, good and bool((match[1] or "").strip()), fast


def prefix_reward(gen, tgt):
    """r_a of the paper (section 3), in [0, 1]: longest common prefix of two id lists over the
    longer (our deviation: tokens after a full match cost something); 0 when either is empty."""
    same = next((i for i, (g, t) in enumerate(zip(gen, tgt)) if g != t), min(len(gen), len(tgt)))
    return same / max(len(gen), len(tgt), 1)


# Backbone and vocabulary

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SYSTEM_PROMPT = "You are a helpful assistant."  # Qwen2.5-VL opens with it, Qwen3-VL with nothing


@dataclass(frozen=True)
class ImageSpec:
    """How the image processor of a backbone cuts an image; sizes in pixels."""

    patch: int
    merge: int  # merge x merge patches are one token
    temporal: int  # a still image is repeated this often
    mean: tuple
    std: tuple
    min_pixels: int
    max_pixels: int

    @classmethod
    def load(cls, path):
        p = transformers.AutoImageProcessor.from_pretrained(path)
        return cls(
            p.patch_size,
            p.merge_size,
            p.temporal_patch_size,
            tuple(p.image_mean),
            tuple(p.image_std),
            p.size["shortest_edge"],
            p.size["longest_edge"],
        )

    def bounded(self, pixels):
        least = min(self.min_pixels, pixels or self.min_pixels)
        return replace(self, min_pixels=least, max_pixels=pixels or self.max_pixels)

    def save(self, folder):
        spec = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_resize": True,
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_convert_rgb": True,
            "patch_size": self.patch,
            "merge_size": self.merge,
            "temporal_patch_size": self.temporal,
            "image_mean": self.mean,
            "image_std": self.std,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
        }
        write_json(Path(folder) / "preprocessor_config.json", spec)


@dataclass
class Backbone:
    net: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    image_spec: ImageSpec
    vocab: types.SimpleNamespace  # of vocab()
    action_tokenizer: FastTokenizer | None = None
    run: dict = field(default_factory=dict)  # run.json of the checkpoint it came from


def vocab(net, tok):
    """Token ids by role; start and end are None and fast is empty before grow()."""
    known, fast = tok.get_vocab(), map(fast_token, itertools.count())
    if missing := [t for t in SPECIAL_TOKENS if t not in known]:
        raise ValueError(f"tokenizer lacks {missing}; use a Qwen2.5-VL or Qwen3-VL checkpoint")
    unused = range(len(tok), len(net.get_input_embeddings().weight))
    return types.SimpleNamespace(
        eos=known["<|im_end|>"],
        pad=known["<|endoftext|>"],
        image=known["<|image_pad|>"],
        action_start=known.get(ACTION_START),
        action_end=known.get(ACTION_END),
        fast=[known[t] for t in itertools.takewhile(known.__contains__, fast)],
        banned=[*(known[t] for t in SPECIAL_TOKENS if t != "<|im_end|>"), *unused],
    )  # never sampled


def find_checkpoint(path):
    """A folder with config.json: `path` itself, else its final/, else its newest step_*."""
    folder = Path(path)
    for place in (folder, folder / "final", latest_checkpoint(folder)):
        if place and (place / "config.json").exists():
            return place
    if folder.is_dir():
        raise FileNotFoundError(f"{path}: no checkpoint in this folder; run the stage before first")
    if str(path).count("/") != 1 or str(path).startswith(("runs/", "assets/", ".", "/")):
        raise FileNotFoundError(
            f"{path}: no such folder; run the stage that writes it, or name a hub model"
        )
    return path  # a hub name


def load(path, device="cpu", dtype=torch.float32, stages=None, seed=0, max_pixels=0):
    """-> Backbone. path: checkpoint or run folder, or hub name.

    A folder with configuration and tokenizer but no weights (tools/backbones.py writes such) is
    filled at random, a function of seed, and says so. stages: those that may have written it,
    ValueError for another one; what no stage has written always passes. device META: shapes alone,
    which shard() fills. max_pixels: of an image, 0: the backbone's own."""
    folder = find_checkpoint(path)
    local = Path(folder)  # of a hub model: there is none
    run = read_json(local / "run.json") if (local / "run.json").exists() else {}
    if stages and run and run["stage"] not in stages:
        raise ValueError(
            f"{folder}: a checkpoint of stage {run['stage']!r}, expected "
            f"{' or '.join(stages)}; give the folder that such a stage wrote"
        )
    weightless = local.is_dir() and not any(local.glob("*.safetensors"))
    if device == META or weightless:
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.random.fork_rng(devices=[]), torch.device("meta" if device == META else "cpu"):
            torch.manual_seed(seed)
            net = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        if device != META:
            print(f"{folder} has no weights: filled at random, seed {seed}", flush=True)
            net.to(device)
    else:
        net = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fast_folder = local / "fast"
    action_tokenizer = FastTokenizer.load(fast_folder) if fast_folder.exists() else None
    image_spec = ImageSpec.load(folder).bounded(max_pixels)
    words = vocab(net, tokenizer)
    if action_tokenizer is not None and action_tokenizer.vocab_size > len(words.fast):
        raise ValueError(
            f"{folder}: fast/ has {action_tokenizer.vocab_size} tokens but the text tokenizer "
            f"knows {len(words.fast)} <FAST_i>; copy the whole folder again"
        )
    return Backbone(net, tokenizer, image_spec, words, action_tokenizer, run)


# Images and rows


def patchify(image, spec):
    """image uint8 (H, W, 3) -> patches (P, 3 * temporal * patch * patch) float32, grid (1, h, w).
    Equals the Pillow image processor of transformers' Qwen2-VL, without its overhead."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}; give uint8 (H, W, 3)")
    p, m = spec.patch, spec.merge
    H, W = smart_resize(*image.shape[:2], p * m, spec.min_pixels, spec.max_pixels)
    if (H, W) != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize((W, H), Image.BICUBIC))
    mean, std = np.float32(spec.mean), np.float32(spec.std)
    x = image * (1 / (255 * std)) - mean / std
    h, w = H // p, W // p
    x = x.reshape(h // m, m, p, w // m, m, p, 3)
    x = x.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]  # (h/m, w/m, m, m, 3, 1, p, p)
    x = np.broadcast_to(x, (*x.shape[:5], spec.temporal, p, p)).reshape(h * w, -1)
    return np.ascontiguousarray(x, np.float32), (1, h, w)


def mrope_positions(ids, grid, image_id, merge):
    """M-RoPE positions (3, T) of ids (T,): equals get_rope_index of transformers for images."""
    pos = np.empty((3, len(ids)), np.int64)
    i = start = 0
    for _, h, w in grid:
        h, w = h // merge, w // merge
        j = i + int(np.argmax(ids[i:] == image_id))
        pos[:, i:j] = np.arange(start, start + j - i)
        start, i = start + j - i, j + h * w
        pos[0, j:i] = start
        pos[1, j:i] = start + np.repeat(np.arange(h), w)
        pos[2, j:i] = start + np.tile(np.arange(w), h)
        start += max(h, w)
    pos[:, i:] = np.arange(start, start + len(ids) - i)
    return pos


@functools.lru_cache(1 << 15)
def _token_ids(tok, size, text):
    """Most pieces of a conversation repeat. size: len(tok), because grow() changes the answer."""
    return tok.backend_tokenizer.encode(text, add_special_tokens=False).ids


def encode(backbone, messages, images=(), prompt_only=False):
    """Conversation -> row: dict of numpy arrays for `collate`.
    messages: [{"role", "content"}], "<image>" in a content stands for the next of `images` (uint8
    (H, W, 3)). prompt_only: opens the assistant's turn instead of ending.
    -> ids (T,) int64, target (T,) bool (the assistant's turns, <|im_end|> among them), pos (3, T),
    patches (P, .) float32 or None, grid (N, 3) int64. ValueError when tags and images disagree."""
    tags = sum(m["content"].count("<image>") for m in messages)
    if tags != len(images):
        raise ValueError(f'{tags} "<image>" but {len(images)} images; write one tag for each image')
    if backbone.net.config.model_type == "qwen2_5_vl" and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
    texts, opening, size = (
        [],
        ("<|im_start|>assistant\n", False),
        len(backbone.tokenizer),
    )  # (text, target?)
    for m in messages:
        text = m["content"].replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        if m["role"] == "assistant":  # split where generation starts, so that both see the same ids
            texts += [opening, (f"{text}<|im_end|>", True), ("\n", False)]
        else:
            texts.append((f"<|im_start|>{m['role']}\n{text}<|im_end|>\n", False))
    texts += [opening] * prompt_only
    parts = [(_token_ids(backbone.tokenizer, size, text), counts) for text, counts in texts]
    ids = np.array([i for part, _ in parts for i in part], np.int64)
    target = np.array([counts for part, counts in parts for _ in part])
    cut = [patchify(image, backbone.image_spec) for image in images]
    grid = np.array([g for _, g in cut], np.int64).reshape(-1, 3)  # (N, 3)
    at, times = ids == backbone.vocab.image, np.ones(len(ids), np.int64)
    if at.sum() != len(images):
        raise ValueError('"<|image_pad|>" in the text; write "<image>" for each image')
    times[at] = grid.prod(1) // backbone.image_spec.merge**2
    ids, target = ids.repeat(times), target.repeat(times)
    return {
        "ids": ids,
        "target": target,
        "patches": np.concatenate([p for p, _ in cut]) if cut else None,
        "grid": grid,
        "positions": mrope_positions(ids, grid, backbone.vocab.image, backbone.image_spec.merge),
    }


def collate(rows, pad_id, left=False, images=None):
    """Rows -> batch of tensors: ids (B, T), mask (B, T) long, target (B, T) bool, pos (3, B, T),
    patches (P, .) and grid (N, 3) of all images (of the rows `images`, if those are not the rows)
    in order, or None. Padded right, or left to sample."""
    B, T = len(rows), max(len(r["ids"]) for r in rows)
    ids, mask = np.full((B, T), pad_id), np.zeros((B, T), np.int64)
    target, pos = np.zeros((B, T), bool), np.zeros((3, B, T), np.int64)
    for b, r in enumerate(rows):
        at = slice(T - len(r["ids"]), T) if left else slice(len(r["ids"]))
        ids[b, at], mask[b, at] = r["ids"], 1
        target[b, at], pos[:, b, at] = r["target"], r["positions"]
    seen = [r for r in images or rows if r["patches"] is not None]
    batch = {"ids": ids, "mask": mask, "target": target, "positions": pos}
    batch |= {k: np.concatenate([r[k] for r in seen]) for k in ("patches", "grid") if seen}
    return {"patches": None, "grid": None, **{k: torch.from_numpy(v) for k, v in batch.items()}}


def to_device(batch, device):
    return {
        k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()
    }


# Forward and losses

LOGITS_AT_ONCE = 1 << 27  # with their gradients 16 bytes each: 2 GB; those of more tokens by slices


def _attention(module, q, k, v, attention_mask, lengths=None, sampled=None, **kw):
    """q, k, v (B, H, T, d) -> (B, T, H, d). With lengths, each row of a pack attends to itself;
    with sampled, rows in generate() to their prompts too."""
    if sampled is not None:
        return _attend_prompt(q, k, v, *sampled[module.layer_idx].prompt, **sampled[-1]), None
    if lengths is None or not module.is_causal:  # the vision tower cuts at its images by itself
        return sdpa_attention_forward(module, q, k, v, attention_mask, **kw)
    rows = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **kw)[0] for row in rows], 1), None


transformers.AttentionInterface.register("sdpa", _attention)  # as before without lengths


def hidden_states(net, batch, cache=None):
    """Last hidden states (B, T, D), after the final norm."""
    return getattr(net, "hidden_states", functools.partial(_hidden_states, net))(batch, cache)


def _hidden_states(net, batch, cache=None):
    ids, mask, more = batch["ids"], batch["mask"], {"input_ids": batch["ids"]}
    if batch.get("patches") is not None:
        more |= {"pixel_values": batch["patches"], "image_grid_thw": batch["grid"]}
    elif isinstance(net, fsdp.FSDPModule) and cache is None:
        # Every rank must gather and reduce the same parameters in the same order, so a batch
        # without images looks at a blank one, with weight 0.
        more = {"inputs_embeds": net.get_input_embeddings()(ids) + 0 * _blank(net, ids.device)}
    if batch.get("lengths"):
        mask, more["lengths"] = None, batch["lengths"]
    elif cache is None and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        mask = None  # padded right: the causal mask alone does it, with the faster kernel
    return net.model(
        attention_mask=mask,
        position_ids=batch["positions"],
        past_key_values=cache,
        use_cache=False,
        **more,
    ).last_hidden_state  # (B, T, D)


def _blank(net, device):
    c, m = net.config.vision_config, net.config.vision_config.spatial_merge_size
    width = c.in_channels * c.temporal_patch_size * c.patch_size**2
    grid = torch.tensor([[1, m, m]], device=device)
    seen = net.model.visual(torch.zeros(m * m, width, device=device), grid_thw=grid)
    parts = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])]
    return sum(p.sum() for p in parts)


def logits(net, rows):
    return net.lm_head(rows).float()  # (N, V)


def score_in_slices(net, score, rows, ids):
    """score(logits (n, V), ids (n,)) -> two tensors (n,), over slices of rows (N, D), ids (N,). A
    slice is computed again in backward: else logits would be most of a rank's memory."""
    head = net.lm_head
    return getattr(head, "score_in_slices", functools.partial(_score_in_slices, head))(
        score, rows, ids
    )


def _score_in_slices(head, score, rows, ids):
    def one(rows, ids):
        return score(head.forward(rows).float(), ids)  # not head(): FSDP has gathered it already

    n = max(1, LOGITS_AT_ONCE // len(head.weight))
    if len(rows) <= n:
        return one(rows, ids)
    parts = [
        torch.utils.checkpoint.checkpoint(one, *part, use_reentrant=False)
        for part in zip(rows.split(n), ids.split(n))
    ]
    return [torch.cat(x) for x in zip(*parts)]  # (N,) each


# Sampler


class SampleKV(DynamicLayer):
    """Keys and values of one layer: those of the prompts, (B, kv heads, T, head width), from the
    first update, and those of n samples of each, (rows, kv heads, room, head width), written in
    place at `at`, read up to `seen`: a DynamicLayer would copy all of K and V each time."""

    def __init__(self, n, room):
        super().__init__()
        self.n, self.room, self.at, self.seen, self.prompt = n, room, None, 0, None

    def update(self, k, v, *args, **kwargs):
        if self.prompt is None:
            self.prompt = k, v
            self.keys = k.new_zeros(len(k) * self.n, k.shape[1], self.room, k.shape[3])
            self.values = torch.zeros_like(self.keys)
            return k, v
        self.keys[:, :, self.at] = k
        self.values[:, :, self.at] = v
        return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]

    def get_seq_length(self):
        return 0 if self.prompt is None else self.prompt[0].shape[2] + self.seen

    def drop(self, hole, tail, left):
        """Rows `tail` take the places `hole` of finished ones, then the first `left` rows stay."""
        for kv in self.keys, self.values:
            kv[hole, :, : self.seen] = kv[tail, :, : self.seen]
        self.keys, self.values = self.keys[:left], self.values[:left]


def _attend_prompt(q, k, v, prompt_k, prompt_v, sample, N, bias, filled):
    """One new token of R samples, q (R, H, 1, d), attends to their own tokens, k, v (R, h, t, d),
    and to the B prompts, (B, h, T, d), which the n samples of each read together: a decoder is as
    fast as the keys it reads. sample (R,): b * n + g of each row; bias (B, 1, 1, T); filled (t,):
    which of their own tokens there are yet, None: all."""
    (R, H, _, d), (B, h, T, _) = q.shape, prompt_k.shape
    q = q.view(R, h, H // h, d) * d**-0.5

    def by_prompt(x):  # (R, h, H/h, .) -> (B, h, n * H/h, .), 0 for samples that have finished
        x = x if R == N else x.new_zeros(N, *x.shape[1:]).index_copy_(0, sample, x)
        return x.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)

    def by_sample(x):  # and back
        x = x.unflatten(2, (-1, H // h)).transpose(1, 2).flatten(0, 1)  # (N, h, H/h, .)
        return x if R == N else x[sample]

    score = by_sample(by_prompt(q) @ prompt_k.mT + bias)  # (R, h, H/h, T)
    own = q @ k.mT if filled is None else (q @ k.mT).masked_fill(~filled, -1e9)  # (R, h, H/h, t)
    p = torch.cat([score, own], -1).float().softmax(-1).to(v.dtype)
    x = by_sample(by_prompt(p[..., :T]) @ prompt_v) + p[..., T:] @ v  # (R, h, H/h, d)
    return x.reshape(R, 1, H, d)


def draw_tokens(logp, u, top_p=1.0, wait=True):
    """Inverse-CDF sampling: the first index whose cumulative probability reaches u. logp (N, V),
    u (N,) in (0, 1], fp32 -> (N,). Some 10x faster than torch.multinomial on a CPU at 152K tokens,
    and no row's draw depends on another. top_p < 1 leaves only the nucleus: the fewest most
    probable tokens that reach top_p together, and all ties of the last. wait: not in a graph."""
    p = logp.exp()
    if top_p < 1:
        ranked = p.sort(-1, descending=True).values
        outside = ranked.cumsum(-1) - ranked >= top_p
        p = p * (p >= ranked.masked_fill(outside, 2.0).amin(-1, keepdim=True))
    cdf = p.cumsum(-1)
    ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:])  # (N, 1); u > 0: not where p is 0 ...
    lost = p.gather(-1, ids) == 0  # ... but the parallel sum of a GPU can rise there by a rounding
    return (p.argmax(-1, True).where(lost, ids) if not wait or lost.any() else ids)[:, 0]


def record(step, device):
    """What step() launches on the GPU, as a CUDA graph: -> a function that does it again, on the
    same tensors, in one launch; at one token a row, launching would take longer than computing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def _decoding(net, loop):  # to FSDP a forward of the root: no block then waits for streams
    return loop()


def _decode(backbone, rows, n, at, out, choose, stop, graphs):
    """Samples n continuations of each row into the rows `at` (B*n,) of out: ids, mask, logp (N, T).
    choose(h (R, D), at (R,), t (1,)) -> token t of these samples and its logp, (R,) each."""
    net, lm, embed = (
        backbone.net,
        backbone.net.model.language_model,
        backbone.net.get_input_embeddings(),
    )
    batch, (ids, mask, logps) = (
        to_device(collate(rows, backbone.vocab.pad, left=True), at.device),
        out,
    )
    t = torch.zeros(1, dtype=torch.long, device=at.device)  # the token that is sampled next
    cache = Cache(layers=[SampleKV(n, ids.shape[1]) for _ in lm.layers])
    h = hidden_states(net, batch, cache)[:, -1].repeat_interleave(n, 0)  # (B*n, D)
    first = (batch["positions"].amax((0, 2)) + 1).repeat_interleave(
        n
    )  # (B*n,) M-RoPE of sampled token 0
    bias = ((batch["mask"] - 1)[:, None, None] * 1e9).to(h.dtype)  # (B, 1, 1, T) to attention
    N, row = len(at), torch.arange(len(at), device=at.device)  # row: the samples that go on
    new, alive = torch.zeros_like(row), torch.ones_like(row, dtype=torch.bool)

    def sample(h):  # (R, D); finished rows, which a graph keeps for a while, write padding
        token, logp = choose(h, place := at[row], t)
        ids[place, t] = new.copy_(token).masked_fill(~alive, backbone.vocab.pad)
        mask[place, t], logps[place, t] = alive.long(), logp.masked_fill(~alive, 0)
        alive.logical_and_((new[:, None] != stop).all(1))

    def step():
        filled = torch.arange(cache.layers[0].seen, device=t.device) <= t if graphs else None
        x = lm(
            inputs_embeds=embed(new[:, None]),
            past_key_values=cache,
            use_cache=True,
            position_ids=(first[row] + t)[None, :, None].expand(3, -1, -1),
            sampled=[*cache.layers, {"sample": row, "N": N, "bias": bias, "filled": filled}],
        )
        t.add_(1)
        sample(x.last_hidden_state[:, 0])

    def loop():
        nonlocal row, new, alive
        sample(h)
        # A graph is bound to its shapes: it reads the cache up to the end of a block, and loses
        # finished rows, looked for every `span` steps, when they are a quarter. It goes before the
        # next is recorded: with it go workspaces that another would share.
        (span, block, most), T, shape = (16, 128, 0.75) if graphs else (1, 1, 1), 1, None
        while T < ids.shape[1] and (left := int(alive.sum())):
            if left < len(row) and left <= most * len(row):
                hole, tail = (~alive[:left]).nonzero()[:, 0], alive[left:].nonzero()[:, 0] + left
                for layer in cache.layers:
                    layer.drop(hole, tail, left)
                order = torch.arange(left, device=at.device).index_copy_(0, hole, tail)
                row, new, alive = row[order], new[order], torch.ones_like(alive[:left])
            ahead = min(span, ids.shape[1] - T)
            for layer in cache.layers:
                layer.at = t if graphs else slice(T - 1, T)  # on a CPU the faster of the two
                layer.seen = min(-(-(T + ahead - 1) // block) * block, ids.shape[1])
            T += ahead
            if shape != (len(row), layer.seen):
                shape, ahead, replay = (len(row), layer.seen), ahead - 1, None
                step()  # also what a library does at its first call, which no graph may hold
                replay = record(step, at.device) if graphs and ahead else step
            for _ in range(ahead):
                replay()

    getattr(net, "decoding", functools.partial(_decoding, net))(loop)


@torch.no_grad()  # inference_mode would give tensors that the update cannot use
def generate(
    backbone,
    rows,
    n=1,
    max_new_tokens=128,
    temperature=1.0,
    top_p=1.0,
    greedy=False,
    seed=0,
    keys=None,
    stop=None,
    rollout_batch=0,
    cuda_graphs=None,
):
    """Samples n continuations of each prompt; a prompt and its images are forwarded once.

    rows: B prompt-only rows of `encode`. keys: one int a prompt (default 0..B-1); the sample of
    (seed, key, g) is the same in any batch and on any number of ranks, up to float noise. stop: ids
    that end a sample (default the end of the turn). backbone.vocab.banned ids have probability 0.
    rollout_batch: prompts at once, those of like length together; 0: all. cuda_graphs: replay decoding steps as
    CUDA graphs (default: on a GPU).
    -> ids (B*n, T), sample g of prompt b in row b*n + g, padded; mask (B*n, T) 1 on sampled tokens,
    the stop token among them; logp (B*n, T) fp32 nats at this temperature, before top_p, 0 where
    mask is 0. T <= max_new. ValueError for an impossible temperature or top_p.
    Gather sharded parameters first: `with unsharded(net)`."""
    if temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature} must be > 0 and top_p {top_p} in (0, 1]; "
            "for the most probable token pass greedy=True"
        )
    net, device, N = backbone.net, backbone.net.device, len(rows) * n
    ids = torch.full((N, max_new_tokens), backbone.vocab.pad, device=device)
    mask, logps = torch.zeros_like(ids), torch.zeros(N, max_new_tokens, device=device)
    u = [
        1 - rng(seed, k, g).random(max_new_tokens)
        for k in (range(len(rows)) if keys is None else keys)
        for g in range(n)
    ]
    u = torch.tensor(np.array(u, np.float32), device=device)  # (B*n, T) in (0, 1]
    stop = torch.tensor([backbone.vocab.eos] if stop is None else list(stop), device=device)
    banned = torch.tensor(backbone.vocab.banned, dtype=torch.long, device=device)
    graphs = device.type == "cuda" if cuda_graphs is None else cuda_graphs

    def choose(h, at, t):
        scaled = (logits(net, h) / temperature).index_fill_(-1, banned, -torch.inf)  # (R, V)
        logp = scaled.log_softmax(-1)
        new = logp.argmax(-1) if greedy else draw_tokens(logp, u[at, t], top_p, not graphs)  # (R,)
        return new, logp.gather(-1, new[:, None])[:, 0]

    rollout_batch, was_training = (
        rollout_batch or max(len(rows), 1),
        net.training,
    )  # a rank may have no prompt
    order = sorted(
        range(len(rows)), key=lambda b: rollout_batch < len(rows) and len(rows[b]["ids"])
    )
    net.eval()
    for k in range(0, len(rows), rollout_batch):
        some = order[k : k + rollout_batch]
        at = torch.tensor([b * n + g for b in some for g in range(n)], device=device)
        _decode(backbone, [rows[b] for b in some], n, at, (ids, mask, logps), choose, stop, graphs)
    net.train(was_training)
    T = int(mask.any(0).sum())
    return {"ids": ids[:, :T], "mask": mask[:, :T], "logp": logps[:, :T]}


@contextlib.contextmanager
def unsharded(net):
    """Gathers all parameters once, for rollouts: inside, forwards without gradient communicate
    nothing, so ranks may run different numbers of them. No-op when net is not sharded. All ranks
    enter and leave it together."""
    parts = [m for m in net.modules() if isinstance(m, fsdp.FSDPModule)]
    if not parts:
        yield
        return
    net._get_fsdp_state()._lazy_init()  # net is the root, also when no forward has run yet
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        # Reshards, and forgets the order of the forwards above. The next backward would prefetch by
        # it: a rank that had no prompt would then wait for another gather than the rest, forever.
        net.reset_iter_state()
        for part in parts:
            part.set_reshard_after_forward(part is not net, recurse=False)


# Flow-matching action head


# Distributed training

SMALL = 50_000_000  # parameters below which gathering all at once costs less than it saves memory


@dataclass(frozen=True)
class Dist:
    rank: int
    world_size: int
    device: torch.device
    shards: int = 0  # ranks that share one copy of the weights; 0: all

    @property
    def build(self):
        """Where a backbone is loaded before shard(): only rank 0 reads weights."""
        return torch.device("cpu") if self.rank == 0 else META


def setup(seed, shards=0, batch=0):
    """Starts nccl (GPU) or gloo (CPU) under torchrun, one process otherwise; seeds torch."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc: keep freed memory, a fifth faster on
        libc.mallopt(-3, 1 << 30)  # CPU than faulting the same pages in at every step
        libc.mallopt(-1, (1 << 31) - 1)
    cuda, torchrun = torch.cuda.is_available(), "RANK" in os.environ
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if (torchrun or cuda) and not distributed.is_initialized():  # one GPU: FSDP brings bf16
        kw = {} if torchrun else {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
        distributed.init_process_group("nccl" if cuda else "gloo", **kw)
    torch.manual_seed(seed)
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if batch % world:
        raise ValueError(f"--batch {batch} must be a multiple of {world} ranks")
    if shards and world % shards:
        raise ValueError(f"--shards {shards} must divide the {world} ranks")
    return Dist(_rank(), world, torch.device(device), shards)


def all_sum(x):
    """Sums a number (-> float) or a list of numbers (-> list of floats) over the ranks."""
    values = torch.tensor(x, dtype=torch.float64)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        values = values.cuda() if distributed.get_backend() == "nccl" else values
        distributed.all_reduce(values)
    return values.tolist()


def fsdp_units(net):
    """What is gathered at a time: each block, then each end of the vocabulary (unless both are one
    table), then the root with the rest; all of a SMALL model."""
    if (
        not isinstance(net, transformers.PreTrainedModel)
        or sum(p.numel() for p in net.parameters()) <= SMALL
    ):
        return [net]
    ends = [net.get_input_embeddings(), net.get_output_embeddings()]
    ends = ends if ends[0].weight is not ends[1].weight else []
    return [*net.model.visual.blocks, *net.model.language_model.layers, *ends, net]


def shard(net, dist, mp_dtype=None, offload=False):
    """FSDP2 in place: fp32 masters, compute in mp_dtype (bf16 on GPU by default), mean gradients.
    dist.shards: groups of so many ranks mirror each other (HSDP). Weights on META come from rank 0,
    one of the fsdp_units() after the other. offload: the shards stay in the CPU's memory, for a model
    without gradients. No-op for one CPU process."""
    if dist.world_size == 1 and dist.device.type == "cpu":
        return net
    cuda = dist.device.type == "cuda"
    mp_dtype = mp_dtype or (torch.bfloat16 if cuda else torch.float32)
    n = dist.shards or dist.world_size
    shape = (n,) if n == dist.world_size else (dist.world_size // n, n)
    names = ("replicate", "shard")[-len(shape) :]
    kw = {
        "mesh": init_device_mesh(dist.device.type, shape, mesh_dim_names=names),
        "mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=mp_dtype, reduce_dtype=torch.float32),
    }
    kw |= {"offload_policy": fsdp.CPUOffloadPolicy(pin_memory=cuda)} if offload else {}
    for unit in fsdp_units(net):
        _receive(unit, dist)
        fsdp.fully_shard(unit, reshard_after_forward=unit is not net, **kw)
    if isinstance(net, transformers.PreTrainedModel):  # which methods are called like forward()
        for part, method in (
            (net, _hidden_states),
            (net, _decoding),
            (net.lm_head, _score_in_slices),
        ):
            setattr(part, name := method.__name__[1:], types.MethodType(method, part))
            fsdp.register_fsdp_forward_method(part, name)
    return net


def _receive(unit, dist):
    """Moves what is not sharded yet to the device, with the values that rank 0 has."""
    new = {}  # a tied tensor stays one
    for part in unit.modules():
        for table in part._parameters, part._buffers:
            for name, t in table.items():
                if t is None or isinstance(t, DTensor):
                    continue
                if t not in new:
                    x = torch.empty_like(t, device=dist.device) if t.is_meta else t.to(dist.device)
                    if dist.world_size > 1:
                        distributed.broadcast(x.detach(), 0)
                    new[t] = (
                        nn.Parameter(x.detach(), t.requires_grad)
                        if isinstance(t, nn.Parameter)
                        else x
                    )
                table[name] = new[t]


def recompute_activations(net):
    """Activation checkpointing of every block: less memory, a third more time."""
    net.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for layer in net.model.language_model.layers:
        layer._can_checkpoint_with_cache = True  # a SharedKV may be updated twice


class Muon(torch.optim.AdamW):
    """AdamW, except that in the group marked "hidden" the momentum of a matrix is replaced by
    (nearly) the closest orthogonalize one before it is subtracted (kellerjordan.github.io/posts/muon),
    scaled so that learning rate and decay mean what AdamW's do (arXiv 2502.16982, section 2.2)."""

    @torch.no_grad()
    def step(self):
        group = next((g for g in self.param_groups if g["hidden"]), {"params": []})
        shapes, jobs = {}, []
        for p in group["params"]:
            if p.grad is not None:
                shapes.setdefault(p.shape, []).append(p)
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
        for params in shapes.values():
            means, grads = local(
                [self.state[p]["exp_avg"] for p in params], [p.grad for p in params]
            )
            torch._foreach_lerp_(means, grads, 1 - group["betas"][0])
            torch._foreach_lerp_(grads, means, group["betas"][0])  # Nesterov
            jobs.append((params, torch.stack([p.grad for p in params])))  # (N, out, in)
        whole = [m.full_tensor() if isinstance(m, DTensor) else m for _, m in jobs]
        for (params, m), u in zip(jobs, orthogonalize_shared(whole)):
            if isinstance(m, DTensor):
                u = distribute_tensor(u, m.device_mesh, m.placements, src_data_rank=None).to_local()
            torch._foreach_mul_(*local(params), 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(
                *local(params), u.unbind(), alpha=-group["lr"] * 0.2 * max(m.shape[1:]) ** 0.5
            )
            for p in params:
                p.grad = None  # AdamW passes over what has none
        super().step()


def local(*lists):
    """This rank's shards of lists of tensors."""
    return [[t.to_local() if isinstance(t, DTensor) else t for t in ts] for ts in lists]


def orthogonalize(x, steps=5):
    """Matrices (N, out, in) -> U V^T of their singular value decompositions, roughly: the singular
    values come to lie around 1 (0.7 to 1.2) by `steps` of a quintic Newton-Schulz iteration."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, steps).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram, product = x @ x.mT, None  # of the steps' factors: small, where x may be long
    for _ in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        gram, product = factor @ gram @ factor, factor if product is None else factor @ product
    return product @ x


def orthogonalize_shared(stacks):
    """orthogonalize() of stacks that are the same on all ranks, each of which computes its share."""
    if not distributed.is_initialized():
        return [orthogonalize(x) for x in stacks]
    flat = stacks[0].new_zeros(sum(x.numel() for x in stacks))
    out = [part.view_as(x) for x, part in zip(stacks, flat.split([x.numel() for x in stacks]))]
    mine = slice(distributed.get_rank(), None, distributed.get_world_size())
    for x, u in zip(stacks, out):
        if len(x[mine]):
            u[mine] = orthogonalize(x[mine])
    distributed.all_reduce(flat)
    return out


def muon_matrices(net):
    """What Muon updates: the weights of linear layers that train, but the last one's (lm_head)."""
    return {
        m.weight
        for name, m in net.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head" and m.weight.requires_grad
    }


def make_optimizer(net, lr, weight_decay, betas, muon=False):
    """AdamW over the trainable parameters of a module; norms and biases (1-D) are not decayed.
    muon: Muon for the muon_matrices() matrices."""
    hidden, kinds = muon_matrices(net) if muon else (), {}
    for p in net.parameters():
        if p.requires_grad:
            kinds.setdefault((p in hidden, p.ndim > 1), []).append(p)
    groups = [
        {"params": some, "weight_decay": weight_decay * matrix, "hidden": in_hidden}
        for (in_hidden, matrix), some in sorted(kinds.items(), reverse=True)
    ]
    return (Muon if muon else torch.optim.AdamW)(groups, lr=lr, betas=betas, fused=True)


def learning_rate(step, steps, lr, warmup_ratio, schedule="cosine"):
    """Learning rate of step 0..steps-1: linear warmup, then cosine to 0 or constant."""
    warmup = round(warmup_ratio * steps)
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup)))


def clip_gradients(params, max_norm):
    """Scales the gradients in place to a global norm of at most max_norm (0: not). -> old norm."""
    norm = nn.utils.clip_grad_norm_(params, max_norm if max_norm > 0 else float("inf"))
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def stop_if_not_finite(out, where, dist, batches, name, value):
    """Stops a run whose loss or gradient norm is not finite, after saving this rank's batches for
    replay: dicts of arrays, whose samples are named under "sample_id"."""
    if np.isfinite(value):
        return
    path = Path(out) / f"failed_{re.sub(r'[^0-9a-z]+', '_', where)}_rank_{dist.rank}.safetensors"
    batches = list(batches)  # from a generator: made only when there is something to save
    samples = [x for batch in batches for x in batch.get("sample_id", [])]
    arrays = {
        f"{i}.{k}": torch.as_tensor(x).detach().cpu().clone().contiguous()
        for i, batch in enumerate(batches)
        for k, x in batch.items()
        if k != "sample_id" and isinstance(x, (list, np.ndarray, torch.Tensor))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path, {"samples": json.dumps(samples), "sample_id": where})
    raise ValueError(
        f"{where}, rank {dist.rank}: the {name} is {value}; look at its samples "
        f"{', '.join(samples)}, which {path} holds, or lower --lr"
    )


def rng(seed, *keys):
    """The generator of (seed, step, sample, ...): no state to save, resume is exact."""
    keys = [zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in keys]
    return np.random.default_rng([seed, *keys])


# Checkpoints

STOP = threading.Event()  # SIGTERM has come
MAY_CHANGE_ON_RESUME = [  # flags that --resume may change
    "preset",
    "out",
    "steps",
    "epochs",
    "resume",
    "keep",
    "probe",
    "micro_batch",
    "chunk",
    "graphs",
    "recompute",
    "shards",
    "cpu_offload",
    "cache",
    "cache_dir",
    "eval_rows",
    "eval_prompts",
    "eval_every",
    "save_every",
    "log_every",
    "show_every",
]


def write_json(path, value):
    part = Path(path).with_suffix(".tmp")  # whoever reads meanwhile sees the old one
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def read_json(path):
    return json.loads(Path(path).read_text())


def _rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def _weights(module):
    """Name -> whole tensor on the CPU of rank 0 (elsewhere None); all ranks call it. Tied ones are
    gathered once and stay one tensor."""
    state, whole = module.state_dict(keep_vars=True), {}
    for t in dict.fromkeys(state.values()):
        full = t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()
        whole[t] = full.cpu().contiguous() if _rank() == 0 else None
    return {name: whole[t] for name, t in state.items()}


def _moments(module, optim):
    """ "parameter/exp_avg" and so on -> tensor of the optimizer, maybe sharded."""
    names = {p: name for name, p in module.named_parameters()}
    return dict(
        sorted(
            (f"{names[p]}/{k}", t if t.ndim else t[None])
            for p, state in optim.state.items()
            for k, t in state.items()
        )
    )


def _as_module(what):
    """The module whose parameters an optimizer may hold: the backbone's net, or a dict of parts."""
    if isinstance(what, dict):
        return nn.ModuleDict({k: _as_module(v) for k, v in what.items()})
    return what.net if isinstance(what, Backbone) else what


def save(folder, what, run, optim=None):
    """Writes a complete checkpoint, atomically; all ranks call it. ValueError if it cannot.
    what: a Backbone, or {name: Backbone or module}: the backbone goes into the folder in Hugging
    Face layout with fast/, each module into name.safetensors. run: {"stage", "step", "config",
    "parent"}, to which versions and commit are added. optim: with it, train_state/ for exact resume
    holds the optimizer, each rank its shard. safetensors and JSON only."""
    part = folder.with_name(folder.name + ".tmp")
    parts = what if isinstance(what, dict) else {"backbone": what}
    states, error = {k: _weights(_as_module(v)) for k, v in parts.items()}, None
    if _rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    try:
        if optim:  # as safetensors, where DCP's own format has a pickle; 64 tensors a file, as each
            moments = _moments(_as_module(what), optim)  # file is put together in memory
            dcp.save(
                moments,
                storage_writer=dcp.HuggingFaceStorageWriter(
                    part / "train_state",
                    {k: i // 64 + 1 for i, k in enumerate(moments)},
                    save_distributed=True,
                ),
            )
        if _rank() == 0:
            part.mkdir(parents=True, exist_ok=True)
            for name, v in parts.items():
                if isinstance(v, Backbone):
                    v.net.save_pretrained(part, state_dict=states[name])
                    v.tokenizer.save_pretrained(part)
                    v.image_spec.save(part)
                    if v.action_tokenizer is not None:
                        v.action_tokenizer.save(part / "fast")
                else:
                    save_file(states[name], part / f"{name}.safetensors")
            write_json(part / "run.json", {**run, "versions": versions(), "commit": commit()})
            _swap(part, folder)
    except dcp.api.CheckpointException as e:  # DCP tells all ranks what failed on one
        error = next(iter(e.failures.values()))[0]
    except (OSError, SafetensorError) as e:
        error = e
    if all_sum(error is not None):
        if _rank() > 0:
            raise SystemExit(1)  # rank 0 knows, and says it
        shutil.rmtree(part, ignore_errors=True)  # it may fill the disk
        raise ValueError(
            f"{part}: could not be written ({error}); what was saved before is whole: "
            "make room, then --resume"
        )


def _swap(part, folder):
    for path in [*part.rglob("*"), part]:  # on disk before the name is
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    old = part.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():  # at no moment there is none: RENAME_EXCHANGE (2), where Linux has it
        exchange = getattr(ctypes.CDLL(None), "renameat2", lambda *_: -1)
        if exchange(-100, os.fsencode(part), -100, os.fsencode(folder), 2) == 0:
            return shutil.rmtree(part)
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_step(cfg, step, run, write, unlogged=()):
    """All ranks call it at the end of each step. Every --save-every steps write(folder, run=...) is
    to save out/step_000123, of which the newest --keep stay; SIGTERM saves too, and ends the run.
    unlogged: this rank's sums since the last line of the log."""
    out, stop = Path(cfg.out), all_sum(STOP.is_set()) > 0
    folder = out / f"step_{step:06d}"
    if stop or (cfg.save_every and step % cfg.save_every == 0):
        write(folder, run={**run, "step": step, "unlogged": all_sum(unlogged)})
        if _rank() == 0:
            done = [p for p in _steps(out) if p.name <= folder.name]  # later ones: another run's
            for old in done[: -cfg.keep] if cfg.keep else []:
                old.rename(old.with_suffix(".tmp"))  # one half deleted must not pass for whole
            for part in out.glob("step_*.tmp"):
                shutil.rmtree(part)
    if stop:
        if _rank() == 0:
            print(f"SIGTERM: stopped after step {step}, saved {folder}; go on with --resume")
        raise SystemExit(128 + signal.SIGTERM)


def load_train_state(folder, what, optim):
    """Restores the AdamW moments of a Backbone or module (or dict of parts, as saved) in place, on
    as many ranks as there are now. The weights come from load(), the learning rate from the
    schedule. folder None: a new run. -> step, and the sums since the last line of the log."""
    if folder is None:
        return 0, 0
    if not (folder / "train_state").exists():
        raise FileNotFoundError(f"{folder}: no state to resume; start from the weights with --init")
    reader, module = dcp.HuggingFaceStorageReader(folder / "train_state"), _as_module(what)
    names = dict(module.named_parameters())
    for key in reader.read_metadata().state_dict_metadata:
        name, k = key.split("/")  # "model.layer.weight/exp_avg"
        p = names[name]
        optim.state[p][k] = (
            torch.zeros((), device=p.device)
            if k == "step"
            else torch.zeros_like(p, requires_grad=False)
        )
    dcp.load(_moments(module, optim), storage_reader=reader)
    run = read_json(folder / "run.json")
    return run["step"], np.array(run.get("unlogged", 0)) * (_rank() == 0)


def checkpoint_to_resume(cfg):
    """The newest checkpoint if the run is to --resume it, or None. ValueError when it goes on with
    another value of a flag that is not MAY_CHANGE_ON_RESUME to change, or would mix with an older run's files."""
    if not cfg.resume and (latest_checkpoint(cfg.out) or (Path(cfg.out) / "final").exists()):
        raise ValueError(
            f"{cfg.out}: already holds a run; go on with --resume, name another --out, or delete it"
        )
    newest, new = latest_checkpoint(cfg.out) if cfg.resume else None, asdict(cfg)
    old = read_json(newest / "run.json")["config"] if newest else new
    for k in [k for k in new if k not in MAY_CHANGE_ON_RESUME and old.get(k) != new[k]]:
        flag = "--" + k.replace("_", "-")
        raise ValueError(
            f"{newest}: was run with another {flag}; resume with {flag} {old.get(k)}, "
            "or start anew in another --out"
        )
    return newest


def _steps(out):
    """The complete checkpoints out/step_000123, oldest first."""
    found = [p for p in Path(out).glob("step_*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest_checkpoint(out):
    """The newest complete checkpoint out/step_000123, or None."""
    return next(reversed(_steps(out)), None)


# Command line and log


def parse_config(Config, PRESETS, argv=None):
    """`[PRESET] [--flag value]` from one flat dataclass: its trailing comments are the help. The
    first preset is the default; the field `preset` receives its name."""
    doc = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(Config), re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=inspect.getmodule(Config).__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("preset", nargs="?", choices=list(PRESETS), default=next(iter(PRESETS)))
    for f in fields(Config):
        if f.name != "preset":
            kind = (
                {"action": argparse.BooleanOptionalAction}
                if f.type is bool
                else {"type": f.type, "metavar": f.type.__name__.upper()}
            )
            text = f"{doc.get(f.name, '')} ({f.default})".replace("%", "%%")
            parser.add_argument(
                "--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind
            )
    args = vars(parser.parse_args(argv))
    return Config(**{**PRESETS[args["preset"]], **args})


def versions():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def commit():
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def run_main(main, lower):
    """Runs a script; what its user can cure ends it in one line. lower: the flag against OOM."""
    try:
        main()
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    except torch.OutOfMemoryError as e:
        raise SystemExit(f"error: out of GPU memory; lower {lower} ({str(e)[:80]})") from e


class Log:
    """Rank 0: one aligned line a record on stdout, the same record as JSON in out/log.jsonl."""

    def __init__(self, out, cfg, dist):
        self.file, self.start = None, time.time()
        STOP.clear()
        signal.signal(signal.SIGTERM, lambda *_: STOP.set())  # from here on, see save_step()
        if dist.rank == 0:
            Path(out).mkdir(parents=True, exist_ok=True)
            self.file = Path(out) / "log.jsonl"  # a checkpoint_to_resume run appends
            device = torch.cuda.get_device_name() if dist.device.type == "cuda" else "cpu"
            self._record(
                {
                    "config": asdict(cfg),
                    "commit": commit(),
                    **versions(),
                    "device": device,
                    "world": dist.world_size,
                }
            )

    def _record(self, record):
        with open(self.file, "a") as f:
            f.write(json.dumps(record) + "\n")

    def write(self, **metrics):
        if self.file is None:
            return
        metrics = {k: float(v) if hasattr(v, "item") else v for k, v in metrics.items()}
        self._record({**metrics, "seconds": round(time.time() - self.start, 1)})
        cells = (
            f"{k} {v:<9.4g}" if isinstance(v, float) else f"{k} {v!s:<6}"
            for k, v in metrics.items()
        )
        print("  ".join(cells).rstrip(), flush=True)
