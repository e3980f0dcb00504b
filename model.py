"""What two stages or more share. What could make training, RL and evaluation disagree is here.

Backbones are Qwen2.5-VL and Qwen3-VL of transformers, from a local folder or by hub name. The paper
is RoboAlign, arXiv 2603.21341. A checkpoint is a folder that plain transformers loads, plus fast/
(action tokenizer), run.json (stage, config, versions, parent), README.md (the same for readers) and
train_state/ (resume).

| section                 | who needs it on a first reading                                  |
|-------------------------|------------------------------------------------------------------|
| Prompts and answers     | all stages                                                       |
| Backbone and vocabulary | all stages                                                       |
| Images and rows         | all stages; `cut_patches`, `mrope_positions` may be skipped      |
| Sources                 | sft.py and grpo.py                                               |
| Forward                 | all stages                                                       |
| Sampler                 | grpo.py; `generate`, then `Decoder`; CUDA graphs may be skipped  |
| Sharding                | who runs on several GPUs                                         |
| Adapters                | who trains with --lora                                           |
| Optimizers              | all stages                                                       |
| Muon                    | nobody: the presets `speedrun` and `base` use it                 |
| Plumbing                | nobody: checkpoints, command line, log                           |

Legend for shapes: B batch, T tokens, D width, H heads, h key-value heads, d head width, P patches,
N rows of any kind, R samples that go on, G completions a prompt, K action-chunk length, A action
dimensions, V vocabulary, L layer. A mask is 1 where it counts.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import hashlib
import inspect
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

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
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils import cached_file

from fast_tokenizer import (
    Damaged,
    FastTokenizer,
    action_chunks,
    action_question,
    chunk_ends,
    config_parser,
    count,
    episodes_sha256,
    image_size,
    locate_step,
    non_negative,
    read_episodes,
    read_image,
    require_instructions,
    split_episodes,
    split_record,
)

META = torch.device("meta")  # tensors with shapes but without values


# ---- Prompts and answers -------------------------------------------------------------------------

ACTION_START = "<ACTION_START>"
ACTION_END = "<ACTION_END>"
THINK = "Think in <think></think>, then answer in <answer></answer>."
DIRECT = "Answer in <answer></answer>."


def fast_token(index: int) -> str:
    """Name of the FAST token `index` (0 .. n-1) in the text vocabulary."""
    return f"<FAST_{index}>"


def ask(question: str, think: bool | None) -> str:
    """The one function that renders a prompt. think: None leaves the question as it is."""
    # fork point: the prompt format. Training, RL and evaluation all come here. How an instruction
    # becomes a question: fast_tokenizer.action_question(), as writers of rows import no torch.
    if think is None:
        return question
    return f"{question}\n{THINK if think else DIRECT}"


def action_prompt(instruction: str, think: bool | None, images: int = 1) -> list[dict]:
    """The conversation that asks for an action, after so many images."""
    question = "<image>" * images + ask(action_question(instruction), think)
    return [{"role": "user", "content": question}]


def action_answer(action_ids: Iterable[int]) -> str:
    """Action ids (0 .. n-1, not token ids) -> the answer text."""
    tokens = "".join(fast_token(index) for index in action_ids)
    return f"<answer>{ACTION_START}{tokens}{ACTION_END}</answer>"


class ParsedAnswer(NamedTuple):
    """What one sampled sequence says; see parse_actions."""

    well_formed: bool
    has_thought: bool  # well formed, with a thought that is not blank
    action_ids: list[int]  # the run of FAST tokens behind ACTION_START, also of a malformed answer


TAGLESS = r"(?:(?!</?think>|</?answer>|<ACTION_|<FAST_).)*"  # no tag, no action token in it
BEFORE_ACTIONS = re.compile(rf"\s*(?:<think>({TAGLESS})</think>)?\s*<answer>\s*", re.DOTALL)
AFTER_ACTIONS = re.compile(r"\s*</answer>\s*<\|im_end\|>")


def parse_actions(backbone: "Backbone", token_ids: Sequence[int]) -> ParsedAnswer:
    """One sampled sequence of token ids -> ParsedAnswer. The one place that decides on the format.

    Well formed is, but for white space between the parts (r_f of the paper, section 3):

        [<think>words</think>] <answer> ACTION_START FAST+ ACTION_END </answer> <|im_end|>

    The words hold no tag and no action token. Tags are compared as text, since Qwen2.5 has no token
    for them."""
    vocab = backbone.vocab
    decode = backbone.tokenizer.decode
    token_ids = [int(token) for token in token_ids]
    if vocab.eos in token_ids:
        token_ids = token_ids[: token_ids.index(vocab.eos) + 1]
    if vocab.action_start not in token_ids:
        return ParsedAnswer(False, False, [])
    start = token_ids.index(vocab.action_start)
    action_index = {token: index for index, token in enumerate(vocab.fast)}
    action_ids = []
    for token in token_ids[start + 1 :]:
        if token not in action_index:
            break
        action_ids.append(action_index[token])
    end = start + 1 + len(action_ids)  # where ACTION_END should be
    before = BEFORE_ACTIONS.fullmatch(decode(token_ids[:start]))
    after = AFTER_ACTIONS.fullmatch(decode(token_ids[end + 1 :]))
    closed = token_ids[end : end + 1] == [vocab.action_end]
    well_formed = bool(before and action_ids and closed and after)
    has_thought = well_formed and bool((before[1] or "").strip())
    return ParsedAnswer(well_formed, has_thought, action_ids)


class ParsedWords(NamedTuple):
    """What one sampled sequence says in words; see parse_words."""

    well_formed: bool
    has_thought: bool  # well formed, with a thought that is not blank
    thought: str
    answer: str  # what stands in <answer></answer>; of a malformed sequence both are ""


WORDS = re.compile(
    rf"\s*(?:<think>({TAGLESS})</think>)?\s*<answer>({TAGLESS})</answer>\s*<\|im_end\|>", re.DOTALL
)


def parse_words(backbone: "Backbone", token_ids: Sequence[int]) -> ParsedWords:
    """One sampled sequence of token ids -> ParsedWords. Well formed is, but for white space between
    the parts, and with no tag or action token in them:

        [<think>words</think>] <answer> words </answer> <|im_end|>"""
    token_ids = [int(token) for token in token_ids]
    if backbone.vocab.eos in token_ids:
        token_ids = token_ids[: token_ids.index(backbone.vocab.eos) + 1]
    parts = WORDS.fullmatch(backbone.tokenizer.decode(token_ids))
    if parts is None:
        return ParsedWords(False, False, "", "")
    thought = (parts[1] or "").strip()
    return ParsedWords(True, thought != "", thought, parts[2].strip())


def prefix_reward(generated: Sequence[int], target: Sequence[int]) -> float:
    """r_a of the paper (section 3), in [0, 1]: length of the common prefix of two lists of action
    ids over the length of the longer one; 0 when either is empty.

        generated 4 9 2 7 7, target 4 9 5 7  ->  common prefix 4 9, longer list 5  ->  0.4

    The paper divides by the target's length; here tokens after a full match cost something."""
    return common_prefix(generated, target) / max(len(generated), len(target), 1)


def common_prefix(generated: Sequence[int], target: Sequence[int]) -> int:
    """How many ids two lists begin with in common."""
    common = 0
    for generated_id, target_id in zip(generated, target, strict=False):
        if generated_id != target_id:
            break
        common += 1
    return common


# ---- Backbone and vocabulary ---------------------------------------------------------------------

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
THINK_END = TAGS[1]
FAMILIES = ("qwen2_5_vl", "qwen3_vl")  # model_type in config.json
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
    def load(cls, path: str | Path) -> "ImageSpec":
        processor = transformers.AutoImageProcessor.from_pretrained(path)
        return cls(
            patch=processor.patch_size,
            merge=processor.merge_size,
            temporal=processor.temporal_patch_size,
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
        )

    def bounded(self, max_pixels: int) -> "ImageSpec":
        """The same, where an image has so many pixels at most; 0: as it is."""
        if not max_pixels:
            return self
        return replace(self, min_pixels=min(self.min_pixels, max_pixels), max_pixels=max_pixels)

    def save(self, folder: str | Path) -> None:
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
class Vocabulary:
    """Token ids by role."""

    eos: int  # the end of a turn
    pad: int
    image: int
    action_start: int | None  # None before the vocabulary has grown
    action_end: int | None
    fast: list[int]  # of the FAST tokens 0 .. n-1; empty before the vocabulary has grown
    banned: list[int]  # never sampled: special tokens, and rows of the table without a token

    @classmethod
    def read(cls, net: nn.Module, tokenizer) -> "Vocabulary":
        """ValueError when the tokenizer is of another family."""
        known = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in known]
        if missing:
            raise ValueError(f"tokenizer lacks {missing}; use a Qwen2.5-VL or Qwen3-VL checkpoint")
        fast = []
        while fast_token(len(fast)) in known:
            fast.append(known[fast_token(len(fast))])
        special = [known[token] for token in SPECIAL_TOKENS if token != "<|im_end|>"]
        unused_rows = range(len(tokenizer), len(net.get_input_embeddings().weight))
        return cls(
            eos=known["<|im_end|>"],
            pad=known["<|endoftext|>"],
            image=known["<|image_pad|>"],
            action_start=known.get(ACTION_START),
            action_end=known.get(ACTION_END),
            fast=fast,
            banned=[*special, *unused_rows],
        )


@dataclass
class Backbone:
    net: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    image_spec: ImageSpec
    vocab: Vocabulary
    action_tokenizer: FastTokenizer | None = None
    run: dict = field(default_factory=dict)  # run.json of the checkpoint it came from

    def __post_init__(self):
        self.net.image_spec = self.image_spec  # by which a forward cuts and normalises images


def find_checkpoint(path: str | Path) -> str | Path:
    """A folder with config.json: `path` itself, else its final/, else its newest step_*; or `path`
    as it is when it can be a hub name. FileNotFoundError otherwise."""
    folder = Path(path)
    for candidate in (folder, folder / "final", latest_checkpoint(folder)):
        if candidate and (candidate / "config.json").exists():
            return candidate
    if folder.is_dir():
        raise FileNotFoundError(f"{path}: no checkpoint in this folder; run the stage before first")
    if str(path).count("/") != 1 or str(path).startswith(("runs/", "assets/", ".", "/")):
        raise FileNotFoundError(
            f"{path}: no such folder; run the stage that writes it, or name a hub model"
        )
    return path


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stages: Sequence[str] | None = None,
    seed: int = 0,
    max_pixels: int = 0,
) -> Backbone:
    """Reads a checkpoint, run folder or hub model.

    A folder with configuration and tokenizer alone, as tools/backbones.py writes for a published
    size, is filled at random, a function of seed, and that is printed. stages: those that may have
    written the checkpoint, ValueError for another one; what no stage has written always passes.
    device META: shapes alone, which shard() fills. max_pixels: of an image, 0: the backbone's
    own."""
    # fork point: the backbone family, a name more in FAMILIES. What is asked of another one:
    # `net.model.visual`, `net.model.language_model.layers`, `net.lm_head`, M-RoPE positions,
    # Qwen2-VL's patches.
    folder = find_checkpoint(path)
    local_folder = Path(folder)  # of a hub model: there is none
    run = {}
    if (local_folder / "run.json").exists():
        run = read_run(local_folder, "stage")
    if stages and run and run["stage"] not in stages:
        raise ValueError(
            f"{folder}: a checkpoint of stage {run['stage']!r}, expected "
            f"{' or '.join(stages)}; give the folder that such a stage wrote"
        )
    # without it the tokenizer loads, and ends its texts by another token
    for names in (
        ("tokenizer_config.json",),
        ("preprocessor_config.json", "processor_config.json"),
    ):
        if local_folder.is_dir() and not any((local_folder / name).exists() for name in names):
            raise ValueError(f"{folder}: has lost its {names[0]}; copy the whole folder again")
    with reading_checkpoint(folder):
        family = transformers.AutoConfig.from_pretrained(folder).model_type
    if family not in FAMILIES:  # its prompts, patches or positions may be other ones
        raise ValueError(
            f"{path}: of family {family}, not {' or '.join(FAMILIES)}; choose one of these, or see "
            '"A new backbone family" in docs/change-one-thing.md'
        )
    with reading_checkpoint(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        net = _load_net(folder, device, dtype, seed)
        image_spec = ImageSpec.load(folder).bounded(max_pixels)
    vocab = Vocabulary.read(net, tokenizer)
    # without tokenizer.json transformers makes one of the special tokens alone
    if vocab.image != net.config.image_token_id:
        raise ValueError(
            f"{folder}: <|image_pad|> is token {vocab.image} of the tokenizer, "
            f"{net.config.image_token_id} of config.json; copy the whole folder again"
        )
    action_tokenizer = None
    if (local_folder / "fast").exists():
        action_tokenizer = FastTokenizer.load(local_folder / "fast")
        if action_tokenizer.vocab_size > len(vocab.fast):
            raise ValueError(
                f"{folder}: fast/ has {action_tokenizer.vocab_size} tokens but the text tokenizer "
                f"knows {len(vocab.fast)} <FAST_i>; copy the whole folder again"
            )
    return Backbone(net, tokenizer, image_spec, vocab, action_tokenizer, run)


@contextlib.contextmanager
def reading_checkpoint(folder: str | Path) -> Iterator[None]:
    """`with reading_checkpoint(folder): ...`: a file in it that is damaged or missing, as a copy
    that was cut off leaves it, is a ValueError in one line that names the folder."""
    try:
        yield
    except dcp.api.CheckpointException as e:  # DCP tells all ranks what failed on one
        error = next(iter(e.failures.values()))[0]
        raise ValueError(f"{folder}: damaged ({error}); copy the whole folder again") from e
    except (SafetensorError, json.JSONDecodeError) as e:
        raise ValueError(f"{folder}: damaged ({e}); copy the whole folder again") from e
    except OSError as e:
        if isinstance(e, PermissionError) or not Path(folder).is_dir():  # or of the hub
            raise
        raise ValueError(f"{folder}: not whole ({e}); copy the whole folder again") from e


def _load_net(folder, device, dtype, seed):
    # of a checkpoint that has lost its weights, from_pretrained says what is missing
    traces = ("run.json", "*.safetensors", "*.bin", "*.index.json")
    is_bare = Path(folder).is_dir() and not any(any(Path(folder).glob(name)) for name in traces)
    if device != META and not is_bare:
        net = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    else:
        config = transformers.AutoConfig.from_pretrained(folder)
        build_device = META if device == META else torch.device("cpu")
        with torch.random.fork_rng(devices=[]), build_device:
            torch.manual_seed(seed)
            net = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        if is_bare and device != META:
            if (Path(folder) / "generation_config.json").exists():
                net.generation_config = transformers.GenerationConfig.from_pretrained(folder)
            print(f"{folder} has no weights: filled at random, seed {seed}", flush=True)
    use_own_attention(net)
    return net.to(device) if device != META else net


# ---- Images and rows -----------------------------------------------------------------------------


class Row(TypedDict):
    """One conversation as numpy arrays, before it is batched."""

    ids: np.ndarray  # (T,) int64
    target: np.ndarray  # (T,) bool: the assistant's turns, <|im_end|> among them
    positions: np.ndarray  # (3, T) int64, M-RoPE
    pixels: np.ndarray | None  # (N,) uint8, of all its images one after the other
    grid: np.ndarray  # (images, 3) int64: time, rows and columns of patches
    sample_id: NotRequired[str]  # where it comes from, "file:row"


class Batch(TypedDict):
    """Rows as tensors: padded (collate), or one behind the other with B = 1 (sft.pack)."""

    ids: torch.Tensor  # (B, T) long
    mask: torch.Tensor  # (B, T) long
    target: torch.Tensor  # (B, T) bool
    positions: torch.Tensor  # (3, B, T) long
    pixels: torch.Tensor | None  # (N,) uint8, of all images of all rows
    grid: torch.Tensor | None  # (images, 3) long
    lengths: NotRequired[list[int]]  # of the rows in a pack, which do not see each other
    sample_id: NotRequired[list[str]]


def image_grid(height: int, width: int, spec: ImageSpec) -> tuple[int, int, int]:
    """Size of an image in pixels -> its grid (1, h, w) of patches, once resized to whole tokens."""
    unit = spec.patch * spec.merge  # pixels of a token's side
    height, width = smart_resize(height, width, unit, spec.min_pixels, spec.max_pixels)
    return 1, height // spec.patch, width // spec.patch


def fit_image(image: np.ndarray, spec: ImageSpec) -> tuple[np.ndarray, tuple[int, int, int]]:
    """image uint8 (H, W, 3) -> its pixels (N,) uint8, resized to whole tokens, and grid (1, h, w).
    The rest is left to the GPU, which receives an eighth of the bytes: cut_patches()."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}; give uint8 (H, W, 3)")
    grid = image_grid(*image.shape[:2], spec)
    height, width = grid[1] * spec.patch, grid[2] * spec.patch
    if (height, width) != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))
    return image.reshape(-1), grid


def cut_patches(pixels: torch.Tensor, grid: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """Pixels (N,) uint8 of images of grid (images, 3) -> patches (P, 3 * temporal * patch * patch)
    fp32, on the same device. Equals the Pillow image processor of transformers' Qwen2-VL.

    The m x m patches of a token come one behind the other. Of an image of 4 x 4 patches, m = 2,
    which makes 4 tokens, each patch comes at the place that stands in it:

         0  1 |  4  5
         2  3 |  6  7
        ------+------
         8  9 | 12 13
        10 11 | 14 15
    """
    # 1. cut into patches of p x p pixels; neighbours of one size at once
    p, m = spec.patch, spec.merge
    cut = []
    start = 0
    for (_, h, w), same_size in itertools.groupby(grid.tolist()):
        n = len(list(same_size))
        end = start + n * h * w * p * p * 3
        # image; row of tokens, patch in it, pixel in that; column of tokens, ..., ...; colour
        x = pixels[start:end].view(n, h // m, m, p, w // m, m, p, 3)
        # image; row and column of tokens; of patches; colour; of pixels
        x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)  # (n, h/m, w/m, m, m, 3, p, p)
        cut.append(x.reshape(n * h * w, 3, p * p))
        start = end
    # 2. normalise
    mean, std = np.float32(spec.mean), np.float32(spec.std)
    scale = torch.from_numpy(1 / (255 * std)).to(pixels.device)
    shift = torch.from_numpy(mean / std).to(pixels.device)
    patches = torch.cat(cut) * scale[:, None] - shift[:, None]  # (P, 3, p * p)
    # 3. repeat a still image in time
    return patches[:, :, None].expand(-1, -1, spec.temporal, -1).flatten(1)


def mrope_positions(ids: np.ndarray, grid: np.ndarray, image_id: int, merge: int) -> np.ndarray:
    """Positions (3, T) of ids (T,): time, row and column of each token. Equals transformers'
    get_rope_index for images. Text counts on in all three, an image holds the time and spans rows
    and columns, and the text behind it goes on after the largest of these:

        ids     a  b  [2 x 3 image tokens]  c
        time    0  1  2  2  2  2  2  2      5
        row     0  1  2  2  2  3  3  3      5
        column  0  1  2  3  4  2  3  4      5
    """
    positions = np.empty((3, len(ids)), np.int64)
    done = 0  # tokens that have a position
    start = 0  # the next position
    for _, patch_rows, patch_columns in grid:
        rows, columns = patch_rows // merge, patch_columns // merge
        image = done + int(np.argmax(ids[done:] == image_id))  # its first token
        positions[:, done:image] = np.arange(start, start + image - done)
        start += image - done
        done = image + rows * columns
        positions[0, image:done] = start
        positions[1, image:done] = start + np.repeat(np.arange(rows), columns)
        positions[2, image:done] = start + np.tile(np.arange(columns), rows)
        start += max(rows, columns)
    positions[:, done:] = np.arange(start, start + len(ids) - done)
    return positions


def check_text(text: str) -> None:
    """ValueError when a string is no Unicode text and cannot be tokenized: JSON may hold half of an
    emoji, a lone surrogate. All other characters are kept (in the tokenizer's NFC)."""
    half = re.search("[\ud800-\udfff]", text)
    if half:
        raise ValueError(
            f"half a character, {half[0]!r}, in {text[max(0, half.start() - 20) :][:40]!r}; write "
            "the whole one, or delete it"
        )


@functools.lru_cache(1 << 12)  # most pieces of a conversation repeat; a server keeps all its life
def _token_ids(tokenizer, vocabulary_size, text):
    """vocabulary_size: part of the key, because a vocabulary that grows changes the answer."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def check_messages(messages: Sequence[dict], n_images: int) -> None:
    """ValueError unless all contents are text, with one "<image>" for each image."""
    for message in messages:
        check_text(message["content"])
    tags = sum(message["content"].count("<image>") for message in messages)
    if tags != n_images:
        raise ValueError(f'{tags} "<image>" but {n_images} images; write one tag for each image')
    if any("<|image_pad|>" in message["content"] for message in messages):
        raise ValueError('"<|image_pad|>" in the text; write "<image>" for each image')


def encode(
    backbone: Backbone,
    messages: Sequence[dict],
    images: Sequence[np.ndarray] = (),
    prompt_only: bool = False,
    max_pixels: int = 0,
) -> Row:
    """Conversation -> Row.

    messages: [{"role", "content"}], "<image>" in a content stands for the next of `images` (uint8
    (H, W, 3)). prompt_only: opens the assistant's turn behind the last message. max_pixels: larger
    images are shrunk to so many; 0: as the backbone says.
    ValueError when tags and images disagree, or a content is no text."""
    # 1. check, and open as the family does
    check_messages(messages, len(images))
    if backbone.net.config.model_type == "qwen2_5_vl" and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
    # 2. pieces of text, each with whether it is learned. The assistant's turns are split where
    # generation starts, so that training and sampling see the same ids.
    opening = ("<|im_start|>assistant\n", False)
    pieces = []
    for message in messages:
        text = message["content"].replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        if message["role"] == "assistant":
            pieces += [opening, (f"{text}<|im_end|>", True), ("\n", False)]
        else:
            pieces.append((f"<|im_start|>{message['role']}\n{text}<|im_end|>\n", False))
    if prompt_only:
        pieces.append(opening)
    # 3. token ids
    id_list = []
    target_list = []
    for text, is_target in pieces:
        piece_ids = _token_ids(backbone.tokenizer, len(backbone.tokenizer), text)
        id_list += piece_ids
        target_list += [is_target] * len(piece_ids)
    ids = np.array(id_list, np.int64)
    target = np.array(target_list)
    # 4. images: the one token of each becomes as many as it has merged patches
    spec = backbone.image_spec.bounded(max_pixels)
    fitted = [fit_image(image, spec) for image in images]
    grid = np.array([grid_of_image for _, grid_of_image in fitted], np.int64).reshape(-1, 3)
    is_image = ids == backbone.vocab.image
    repeats = np.ones(len(ids), np.int64)
    repeats[is_image] = grid.prod(1) // spec.merge**2
    ids, target = ids.repeat(repeats), target.repeat(repeats)
    return {
        "ids": ids,
        "target": target,
        "positions": mrope_positions(ids, grid, backbone.vocab.image, spec.merge),
        "pixels": np.concatenate([pixels for pixels, _ in fitted]) if fitted else None,
        "grid": grid,
    }


def encode_thought(backbone: Backbone, text: str) -> np.ndarray:
    """A thought in words -> its token ids (t,), <think> and </think> among them, which follow the
    thinking prompt. ValueError for text that stands for an image."""
    check_messages([{"content": text}], 0)
    ids = backbone.tokenizer.encode(f"<think>{text}{THINK_END}", add_special_tokens=False)
    return np.array(ids, np.int64)


def filler_thought(backbone: Backbone, length: int) -> str:
    """Full stops, `length` tokens of them: a thought that says nothing and takes as long.
    ValueError where the tokenizer joins them."""
    for stop in (".", " ."):
        text = stop * length
        if len(backbone.tokenizer.encode(text, add_special_tokens=False)) == length:
            return text
    raise ValueError("the tokenizer joins full stops, so that no filler has a length of its own")


def with_thought(prompt: Row, thought: np.ndarray) -> Row:
    """The prompt goes on with a thought (t,), which is its target: the assistant's turn."""
    length = len(thought)
    first = prompt["positions"].max() + 1  # text counts on in time, row and column
    positions = np.tile(np.arange(first, first + length), (3, 1))
    return {
        **prompt,
        "ids": np.concatenate([prompt["ids"], thought]),
        "target": np.pad(prompt["target"], (0, length), constant_values=True),
        "positions": np.concatenate([prompt["positions"], positions], axis=1),
    }


def collate(
    rows: Sequence[Row],
    pad_id: int,
    left: bool = False,
    images: Sequence[Row] | None = None,
) -> Batch:
    """Rows -> padded Batch; right for a forward, left to sample. images: the rows whose images go
    in, if not `rows` themselves."""
    B, T = len(rows), max(len(row["ids"]) for row in rows)
    ids = np.full((B, T), pad_id)
    mask = np.zeros((B, T), np.int64)
    target = np.zeros((B, T), bool)
    positions = np.zeros((3, B, T), np.int64)
    for b, row in enumerate(rows):
        length = len(row["ids"])
        columns = slice(T - length, T) if left else slice(length)
        ids[b, columns] = row["ids"]
        mask[b, columns] = 1
        target[b, columns] = row["target"]
        positions[:, b, columns] = row["positions"]
    arrays = {"ids": ids, "mask": mask, "target": target, "positions": positions}
    with_images = [row for row in images or rows if row["pixels"] is not None]
    if with_images:
        arrays["pixels"] = np.concatenate([row["pixels"] for row in with_images])
        arrays["grid"] = np.concatenate([row["grid"] for row in with_images])
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {"pixels": None, "grid": None, **tensors}


def to_device(batch: Batch, device: str | torch.device) -> Batch:
    moved = {}
    for name, value in batch.items():
        is_tensor = torch.is_tensor(value)
        moved[name] = value.to(device, non_blocking=True) if is_tensor else value
    return moved


# ---- Sources: conversations and episodes as samples ----------------------------------------------


# fork point: mixture. What to draw from and in which shares; sft.sample_order() draws what is
# trained on, grpo.draw_prompts() what is asked, and a new kind of source is a class like the two
# below.
class MixtureItem(NamedTuple):
    path: str  # .jsonl of conversations, or folder of episodes
    weight: float | None = None  # relative share of the samples
    samples: int | None = None  # in an epoch; with neither: its rows to train on


def parse_mixture(spec: str) -> list[MixtureItem]:
    """The value of --data, "path:weight,path:weight" or "path#samples,path", whose paths must
    exist."""
    mixture = [parse_mixture_item(text.strip()) for text in spec.split(",")]
    weights = [item.weight for item in mixture if item.weight is not None]
    if weights and any(item.samples for item in mixture):
        raise ValueError(
            f"--data {spec}: weights (:) and counts (#); a weight is no number of samples, write "
            "path#samples for all of them, or path:weight"
        )
    if weights and len(weights) < len(mixture):
        bare = next(item.path for item in mixture if item.weight is None)
        raise ValueError(
            f"--data {spec}: {bare} has no weight, and its number of rows is none beside those of "
            "the others; write path:weight for all"
        )
    if weights and not sum(weights):
        raise ValueError(f"--data {spec}: all weights are 0; give one that is not")
    return mixture


def parse_mixture_item(text: str) -> MixtureItem:
    item = MixtureItem(text)
    if not text:
        raise ValueError("--data: a path is empty; write path,path without a comma at the end")
    try:
        if Path(text).exists():  # a name may hold : and #
            pass
        elif "#" in text:
            path, _, samples = text.rpartition("#")
            item = MixtureItem(path, samples=count(samples))
        elif ":" in text:
            path, _, weight = text.rpartition(":")
            item = MixtureItem(path, weight=non_negative(weight))
    except argparse.ArgumentTypeError as e:
        raise ValueError(f"--data {text}: {e}; write path:weight or path#samples") from e
    if not Path(item.path).exists():
        raise FileNotFoundError(
            f"--data {item.path}: no such file or folder; generate or convert it first "
            "(docs/data.md; for Tabletop: python -m benchmarks.tabletop_data)"
        )
    return item


def mixture_shares(mixture: list[MixtureItem], sizes: list[int]) -> tuple[list[float], int]:
    """-> by which weights to draw from the sources, which have so many rows to train on; and how
    many samples are an epoch. With counts each source gives so many samples of it:

        qa.jsonl#1876000,bridge#400000  ->  400,000 / 2,276,000 = 17.6% actions
    """
    samples = [item.samples or size for item, size in zip(mixture, sizes, strict=True)]
    weights = []
    for item, n in zip(mixture, samples, strict=True):
        weights.append(n if item.weight is None else item.weight)
    return weights, sum(samples)


class Sample(NamedTuple):
    """What a source gives at an index."""

    messages: list[dict[str, str]]  # of "role" and "content", with their mode lines
    images: list[Path | np.ndarray]  # files, or frames (H, W, 3) uint8
    kind: str | None  # of question; greedy accuracy is told by kind
    sample_id: str  # "talk.jsonl:12", "episode_000003.safetensors:7": named by errors
    max_pixels: int = 0  # bound on its images under --too-long shrink; 0: none


class Outline(NamedTuple):
    """The longest sample of a unit, without pixels. A unit is what is checked and measured once: a
    row of a .jsonl, an episode of a folder."""

    messages: list[dict[str, str]]
    image_sizes: list[tuple[int, int]]  # (H, W)


ACTION_ANSWER = re.compile(r"<answer>\s*<ACTION>\s*</answer>")


class ConversationDataset:
    """Rows of a .jsonl file, each checked when it is asked for; check_rows() asks for all of them.

    name: in the log. train, held: indices to train on and to evaluate on. source[i] is a Sample,
    of a row that is none a ValueError naming the file and the line."""

    def __init__(
        self,
        path: str | Path,
        action_tokenizer: FastTokenizer | None,
        holdout_rows: int,
        outside_images: bool = False,
    ):
        self.path = Path(path)
        self.action_tokenizer = action_tokenizer
        self.outside_images = outside_images
        self.name = self.path.stem
        offsets = [0]  # byte at which each line begins, and that at which the last one ends
        content = hashlib.sha256()
        with open(path, "rb") as file:
            for line in file:
                offsets.append(offsets[-1] + len(line))
                content.update(line)
        self.offsets = np.array(offsets)
        self.fingerprint = content.hexdigest()
        self.max_pixels = {}  # row -> bound on its images; set by check_rows()

        n = len(offsets) - 1
        if n == 0:
            raise ValueError(f"{path}: no rows; write one a line")
        if n <= holdout_rows:
            raise ValueError(
                f"{path}: {n} rows, all of them held out; lower --holdout-rows {holdout_rows}"
            )
        self.units = n
        self.train = range(n - holdout_rows)
        self.held = range(n - holdout_rows, n)

    def unit(self, i: int) -> int:
        return i

    def sample_id(self, i: int) -> str:
        return f"{self.path}:{i + 1}"

    def row(self, i: int) -> dict:
        """Row i as it stands in the file, with a list "images". ValueError if it is no row."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            line = file.readline()
        sample_id = self.sample_id(i)
        try:
            row = json.loads(line)
            fault = row_fault(row)
        except (ValueError, RecursionError) as e:
            fault = f"not JSON ({e})"
        if fault:
            raise ValueError(
                f'{sample_id}: not a row {{"images": [...], "messages": [{{"role", "content"}}, '
                f"...]}}: {fault}; repair or delete the line"
            )
        row["images"] = row.get("images") or []
        return row

    def __getitem__(self, i: int) -> Sample:
        row = self.row(i)
        sample_id = self.sample_id(i)
        images = [self.image_path(name, sample_id) for name in row["images"]]
        messages = add_mode_lines(row["messages"])
        ids = self.action_ids(row, sample_id)
        answer = action_answer(ids) if ids else ""
        for message in messages:
            if message["role"] == "assistant" and answer:
                message["content"] = ACTION_ANSWER.sub(answer, message["content"])
            if "<ACTION>" in message["content"]:
                raise ValueError(
                    f"{sample_id}: an <ACTION> that is not the whole answer of the assistant; "
                    "write <answer><ACTION></answer>"
                )
        return Sample(messages, images, row.get("kind"), sample_id, self.max_pixels.get(i, 0))

    def question(self, i: int, think: bool | None = None) -> Sample:
        """All that stands before the first answer, a system message too, asked to think or not;
        None: as the row's own answer begins. ValueError when that is no question."""
        sample = first_question(self[i])
        if not sample.messages or sample.messages[-1]["role"] != "user":
            raise ValueError(f"{sample.sample_id}: an answer without a question before it")
        if think is None:
            return sample
        *before, last = self.row(i)["messages"][: len(sample.messages)]
        question = {"role": "user", "content": ask(last["content"], think)}
        return sample._replace(messages=[*before, question])

    def outline(self, unit: int) -> Outline:
        sample = self[unit]
        sizes = [image_size(path, f"{sample.sample_id}: {path}") for path in sample.images]
        return Outline(sample.messages, sizes)

    def action_ids(self, row: dict, sample_id: str) -> list[int]:
        """The "chunk" (K x A) of a row as action ids; none for a row without actions."""
        has_action = any("<ACTION>" in message["content"] for message in row["messages"])
        if not has_action and "chunk" not in row:
            return []
        if self.action_tokenizer is None:
            raise ValueError(
                f"{sample_id}: an <ACTION> but no FAST tokenizer; give --action-tokenizer"
            )
        if "chunk" not in row:
            raise ValueError(f'{sample_id}: an <ACTION> but no "chunk"; add the K x A actions')
        if not has_action:
            raise ValueError(
                f'{sample_id}: a "chunk" but no <ACTION>; write <answer><ACTION></answer> where '
                "its tokens belong, or delete it"
            )
        tokenizer = self.action_tokenizer
        try:
            chunk = np.asarray(row["chunk"], np.float32)  # (K, A)
            if chunk.ndim != 2 or not chunk.size:
                raise ValueError(f"its shape is {chunk.shape}")
        except (ValueError, TypeError, OverflowError) as e:
            raise ValueError(
                f'{sample_id}: "chunk": {e}; give (K, A), a list of {tokenizer.horizon} lists of '
                f"{tokenizer.action_dim} numbers"
            ) from e
        try:
            return tokenizer.encode(chunk[None])[0]
        except ValueError as e:
            raise ValueError(f'{sample_id}: "chunk": {e}') from e

    def image_path(self, name: str, sample_id: str) -> Path:
        """Where an image of a row lies. Damaged outside the file's folder, unless allowed."""
        inside = os.path.normpath(name)
        is_outside = os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir
        if is_outside and not self.outside_images:
            raise Damaged(
                f"{sample_id}: image {name} lies outside {self.path.parent}; move it below that "
                "folder, or trust this file with --outside-images"
            )
        return self.path.parent / name


def row_fault(row: object) -> str:
    """What makes the JSON of a line no row; "" when it is one."""
    if not isinstance(row, dict):
        return f"it is a {type(row).__name__}"
    messages = row.get("messages")
    if not isinstance(messages, list):
        return '"messages" is no list'
    for message in messages:
        if not isinstance(message, dict):
            return f"a message is a {type(message).__name__}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                return f'"{key}" of a message is no text'
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or not set(roles) <= {"system", "user", "assistant"}:
        return (
            f"roles {roles}; an assistant must answer, and only system, user and assistant may "
            "speak"
        )
    images = row.get("images")
    if images is not None and not isinstance(images, list):
        return '"images" is no list'
    if not all(isinstance(name, str) and name for name in images or []):
        return '"images" holds what is no path'
    if not isinstance(row.get("kind"), str | None):
        return '"kind" is no text'
    return ""


class EpisodeDataset:
    """Steps of the episodes in a folder, counted through. The answer to the frame of a step is the
    K actions from that step on, as FAST. name, train, held, source[i] and units as above."""

    def __init__(self, folder, action_tokenizer: FastTokenizer | None):
        if action_tokenizer is None:
            raise ValueError(
                f"{folder}: episodes but no FAST tokenizer; fit one (python fast_tokenizer.py fit) "
                "and give its folder as --action-tokenizer"
            )
        if action_tokenizer.stats is None:
            raise ValueError(
                f"{folder}: an action tokenizer without statistics; save it with those of the "
                f"episodes: fast_tokenizer.py report --data {folder} --out fast/"
            )
        self.path = Path(folder)
        self.name = "action"
        self.action_tokenizer = action_tokenizer
        all_episodes = read_episodes(folder, action_tokenizer=action_tokenizer)
        require_instructions(all_episodes)
        train_episodes, held_out = split_episodes(all_episodes)
        self.episodes = [*train_episodes, *held_out]
        self.ends = chunk_ends(self.episodes, action_tokenizer.horizon)
        self.units = len(self.episodes)
        self.max_pixels = {}  # episode -> bound on its images; set by check_rows()
        self.fingerprint = episodes_sha256(self.episodes)
        self.split = split_record(all_episodes, held_out)

        n_train = int(self.ends[len(train_episodes) - 1])
        self.train = range(n_train)
        self.held = range(n_train, int(self.ends[-1]))

    def unit(self, i: int) -> int:
        """The index of the episode to which step i belongs."""
        return int(np.searchsorted(self.ends, i, side="right"))

    def sample_id(self, unit: int) -> str:
        return str(self.episodes[unit])

    def target_ids(self, i: int) -> list[int]:
        """The true FAST ids of the K actions from step i on."""
        episode, t = locate_step(self.episodes, self.ends, i)
        chunks = action_chunks(episode, self.action_tokenizer.horizon)  # (T, K, A)
        return self.action_tokenizer.encode(chunks[t : t + 1])[0]

    def question(self, i: int, think: bool = False) -> Sample:
        """The prompt alone."""
        episode, t = locate_step(self.episodes, self.ends, i)
        messages = action_prompt(episode.task, think)
        max_pixels = self.max_pixels.get(self.unit(i), 0)
        return Sample(messages, [episode.frame(t)], "action", f"{episode}:{t}", max_pixels)

    def __getitem__(self, i: int) -> Sample:
        question = self.question(i)
        answer = {"role": "assistant", "content": action_answer(self.target_ids(i))}
        return question._replace(messages=[*question.messages, answer])

    def outline(self, unit: int) -> Outline:
        episode = self.episodes[unit]
        longest_ids = [0] * self.action_tokenizer.max_ids
        answer = {"role": "assistant", "content": action_answer(longest_ids)}
        messages = [*action_prompt(episode.task, think=False), answer]
        return Outline(messages, [episode.image_sizes["image"]])


Source = ConversationDataset | EpisodeDataset


def open_sources(
    mixture: list[MixtureItem],
    action_tokenizer: FastTokenizer | None,
    holdout_rows: int,
    outside_images: bool,
) -> list[Source]:
    """A dataset for each item. Of two that have the same name the later gets a number, of its place
    among all or the next that is free."""
    sources = []
    names = set()
    for item in mixture:
        if item.path.endswith(".jsonl"):
            source = ConversationDataset(item.path, action_tokenizer, holdout_rows, outside_images)
        else:
            source = EpisodeDataset(item.path, action_tokenizer)
        name = source.name
        number = len(sources)
        while source.name in names:
            source.name = f"{name}{number}"
            number += 1
        names.add(source.name)
        sources.append(source)
    return sources


def add_mode_lines(messages: list[dict]) -> list[dict]:
    """Adds the mode line (think first, or answer at once) to each question whose reply begins with
    <think> or <answer>; a plain reply gets none."""
    out = []
    for k, message in enumerate(messages):
        reply = messages[k + 1]["content"] if k + 1 < len(messages) else ""
        think = None
        if message["role"] == "user":
            if reply.startswith("<think>"):
                think = True
            elif reply.startswith("<answer>"):
                think = False
        out.append({"role": message["role"], "content": ask(message["content"], think)})
    return out


def open_images(sample: Sample) -> list[np.ndarray]:
    """The images of a sample, (H, W, 3) uint8 each: those in memory as they are, files opened."""
    images = []
    for image in sample.images:
        if isinstance(image, np.ndarray):
            images.append(image)
        else:
            images.append(read_image(image, f"{sample.sample_id}: {image}"))
    return images


def encode_sample(backbone: Backbone, sample: Sample, prompt_only: bool = False) -> Row:
    """A sample as numbers. ValueError naming it when its text and images do not go together."""
    images = open_images(sample)
    try:
        return encode(backbone, sample.messages, images, prompt_only, sample.max_pixels)
    except ValueError as e:
        raise ValueError(f"{sample.sample_id}: {e}") from e


def first_question(sample: Sample) -> Sample:
    """All that stands before the first answer, a system message too, with the images in it."""
    roles = [message["role"] for message in sample.messages]
    answered = roles.index("assistant") if "assistant" in roles else len(roles)
    prompt = sample.messages[:answered]
    n_images = sum(message["content"].count("<image>") for message in prompt)
    if answered == len(roles) - 1:
        n_images = len(sample.images)  # all, so that tags and images that disagree are noticed
    return sample._replace(messages=prompt, images=sample.images[:n_images])


def answer_text(text: str) -> str:
    """What stands in <answer></answer>, else the whole text."""
    after_tag = text.rpartition("<answer>")[2]
    return after_tag.partition("</answer>")[0].strip()


def evenly_spaced(indices: Sequence[int], n: int) -> list[int]:
    """At most n of the indices, evenly spaced over them."""
    places = np.linspace(0, len(indices) - 1, min(n, len(indices)))
    return [indices[int(place)] for place in places]


# ---- Forward -------------------------------------------------------------------------------------

ATTENTION = "robo_align"  # our names beside transformers' "sdpa" and "eager"
# A vision tower hands over its segments (images, or Qwen2.5-VL's windows) one by one, unless there
# is "flash" in the name: then all of them, and where each ends.
VISION_ATTENTION = "robo_align_flash"
LOGITS_AT_ONCE = 1 << 27  # with their gradients 16 bytes each: 2 GB; those of more tokens by slices


def use_own_attention(net: nn.Module) -> None:
    """Lets the net attend by `_attention` and `_vision_attention`: sdpa, but for packs, the sampler
    and segments."""
    transformers.AttentionInterface.register(ATTENTION, _attention)
    transformers.AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    transformers.AttentionInterface.register(VISION_ATTENTION, _vision_attention)
    net.set_attn_implementation(
        {"": ATTENTION, "text_config": ATTENTION, "vision_config": VISION_ATTENTION}
    )


def _attention(module, q, k, v, attention_mask, lengths=None, decoding=None, **kwargs):
    """q (B, H, T, d), k and v (B, h, T, d) -> (B, T, H, d), None. lengths: of the rows of a pack,
    each of which attends to itself alone. decoding: what the sampler's step hands through."""
    if decoding is not None:
        prompt_keys, prompt_values = decoding.layers[module.layer_idx].prompt
        return attend_with_prompt(q, k, v, prompt_keys, prompt_values, decoding), None
    if lengths is None:
        return sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)
    outputs = []
    for row in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True):
        outputs.append(sdpa_attention_forward(module, *row, None, **kwargs)[0])
    return torch.cat(outputs, 1), None


def _vision_attention(module, q, k, v, attention_mask, cu_seq_lens_q, scaling, **kwargs):
    """q, k, v (1, H, P, d) of P patches -> (1, P, H, d), None. A segment attends to itself alone,
    those of one length as one batch. cu_seq_lens_q (segments + 1,): where they begin and end."""
    segments = _segments(cu_seq_lens_q)
    outputs = []
    if segments.order is not None:
        q, k, v = (x[:, :, segments.order] for x in (q, k, v))
    sizes = [n * length for n, length in segments.batches]
    split = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    for (n, length), same_length in zip(segments.batches, split, strict=True):
        # (1, H, n * length, d) -> (n, H, length, d)
        batch = (x[0].unflatten(1, (n, length)).transpose(0, 1) for x in same_length)
        output, _ = sdpa_attention_forward(module, *batch, None, scaling=scaling, is_causal=False)
        outputs.append(output.flatten(0, 1))  # (n * length, H, d)
    joined = torch.cat(outputs)
    if segments.order is not None:
        joined = joined[segments.back]
    return joined[None], None


class Segments(NamedTuple):
    """Segments of patches, sorted by their length; see _segments()."""

    batches: list[tuple[int, int]]  # of each length: how many, and the length
    order: torch.Tensor | None  # (P,) patches in this order; None: they are
    back: torch.Tensor | None  # (P,) and the way back


def _segments(ends: torch.Tensor) -> Segments:
    """Of segments of 4, 2 and 4 patches, ends (segments + 1,) = 0 4 6 10:

        batches  (1, 2), (2, 4)
        order    4 5  0 1 2 3  6 7 8 9

    The blocks share `ends`, which keeps the answer: a GPU is waited for once, not in each."""
    if not hasattr(ends, "segments"):
        lengths = torch.diff(ends.cpu()).long()  # (segments,)
        distinct, counts = lengths.unique(return_counts=True)
        batches = list(zip(counts.tolist(), distinct.tolist(), strict=True))
        order = back = None
        if len(batches) > 1:
            length_of_patch = lengths.repeat_interleave(lengths)  # (P,)
            order = length_of_patch.argsort(stable=True)
            back = order.argsort().to(ends.device)
            order = order.to(ends.device)
        ends.segments = Segments(batches, order, back)
    return ends.segments


def as_forward(function: Callable, module: nn.Module, *args):
    """function(module, *args), which FSDP treats as a forward of the module.

    FSDP gathers parameters in hooks around `module.forward`. What enters a sharded module by
    another door would meet shards, so such a function becomes a method of the module and is
    registered with FSDP. Without FSDP it is a plain call."""
    if not isinstance(module, fsdp.FSDPModule):
        return function(module, *args)
    name = function.__name__
    if not hasattr(module, name):
        setattr(module, name, types.MethodType(function, module))
        fsdp.register_fsdp_forward_method(module, name)
    return getattr(module, name)(*args)


def hidden_states(net: nn.Module, batch: Batch, cache: Cache | None = None) -> torch.Tensor:
    """Last hidden states (B, T, D), after the final norm."""
    hidden = as_forward(_hidden_states, net, batch, cache)
    if isinstance(net, fsdp.FSDPModule) and not torch.is_grad_enabled():
        forget_forwards(net)
    return hidden


def forget_forwards(net: nn.Module) -> None:
    """Empties FSDP's record of forwards, which only a backward does: that of a frozen net grew by
    44 bytes a unit and forward, 150 MB in 60,000 steps. A backward that comes prefetches by the
    record of its own forward; without one it gathers each unit when it gets there."""
    for module in fsdp_modules(net):
        state = module._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()
        for group in state._fsdp_param_groups:
            group._post_forward_indices.clear()


def _hidden_states(net, batch, cache):
    # 1. what is seen
    ids = batch["ids"]
    is_beginning = cache is None or cache.get_seq_length() == 0  # of rows
    if batch.get("pixels") is not None:
        inputs = {
            "input_ids": ids,
            "pixel_values": cut_patches(batch["pixels"], batch["grid"], net.image_spec),
            "image_grid_thw": batch["grid"],
        }
    elif is_beginning and (isinstance(net, fsdp.FSDPModule) or _trains(net.model.visual)):
        # A batch without images looks at a blank one, with weight 0. FSDP's ranks must gather and
        # reduce the same parameters in the same order. And AdamW's averages decay by a gradient of
        # 0, not by none: the vision tower has one of 0 then, on any number of ranks.
        embeddings = net.get_input_embeddings()(ids)
        inputs = {"inputs_embeds": embeddings + 0 * _blank(net, ids.device)}
    else:
        inputs = {"input_ids": ids}
    # 2. who sees whom
    mask = batch["mask"]
    if batch.get("lengths"):
        mask = None
        inputs["lengths"] = batch["lengths"]
    elif cache is None and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        mask = None  # padded right: the causal mask alone does it, with the faster kernel
    output = net.model(
        attention_mask=mask,
        position_ids=batch["positions"],
        past_key_values=cache,
        use_cache=False,
        **inputs,
    )
    return output.last_hidden_state  # (B, T, D)


def _trains(module):
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


def _blank(net, device):
    """A sum over all that the vision tower says about one blank image."""
    config = net.config.vision_config
    merge = config.spatial_merge_size
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    grid = torch.tensor([[1, merge, merge]], device=device)
    seen = net.model.visual(torch.zeros(merge * merge, width, device=device), grid_thw=grid)
    outputs = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])]
    return sum(output.sum() for output in outputs)


def feature_layer(net: nn.Module, layer: int) -> int:
    """The layer that the head of vla.py reads, where 0 means 0.64 L of the L blocks: 18 of 28.
    ValueError when there are not so many."""
    # fork point: the feature layer. Which tokens of it are read: vla.encode_prompts().
    L = len(net.model.language_model.layers)
    if not 0 <= layer <= L:
        raise ValueError(f"layer {layer} is not in 1..{L}; choose one of these")
    return layer or round(0.64 * L)


def keep_layer_output(net: nn.Module, layer: int, keep: Callable[[torch.Tensor], None]):
    """Calls keep at each forward of a whole net with what it hands on after `layer`, (B, T, D), as
    one that is cut there puts it out. -> the hook, to be removed."""
    # what the next block reads: between blocks Qwen3-VL adds more of the image (deepstack)
    language_model = net.model.language_model
    reader = [*language_model.layers, language_model.norm][layer]
    return reader.register_forward_pre_hook(lambda module, inputs: keep(inputs[0]))


def logits(net: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states (N, D) -> logits (N, V) fp32."""
    return net.lm_head(hidden).float()


def score_in_slices(
    net: nn.Module, score: Callable, rows: torch.Tensor, ids: torch.Tensor
) -> Sequence[torch.Tensor]:
    """score(logits (n, V), ids (n,)) -> tensors (n,), over slices of rows (N, D), ids (N,): -> as
    many tensors (N,). Of several slices each is computed again in backward: else logits would be
    most of a rank's memory."""
    return as_forward(_score_in_slices, net.lm_head, score, rows, ids)


def _score_in_slices(head, score, rows, ids):
    def score_slice(slice_rows, slice_ids):
        # head.forward, not head(): FSDP has gathered it already
        return score(head.forward(slice_rows).float(), slice_ids)

    at_once = max(1, LOGITS_AT_ONCE // len(head.weight))
    if len(rows) <= at_once:
        return score_slice(rows, ids)
    scores = []
    for part in zip(rows.split(at_once), ids.split(at_once), strict=True):
        scores.append(torch.utils.checkpoint.checkpoint(score_slice, *part, use_reentrant=False))
    return [torch.cat(slices) for slices in zip(*scores, strict=True)]  # (N,) each


class TokenSums(NamedTuple):
    """Sums over the counted tokens of a batch; () each."""

    loss: torch.Tensor  # cross-entropy, nats
    tokens: torch.Tensor  # how many there are
    correct: torch.Tensor  # for how many the most probable token is the right one


def token_loss(net: nn.Module, batch: Batch) -> TokenSums:
    """Cross-entropy on batch["target"]: divide its sum by the count over all ranks (see all_sum),
    not by this rank's. Logits are computed only where a target follows."""
    counted = batch["target"][:, 1:]  # (B, T - 1); token t is predicted from position t - 1
    hidden = hidden_states(net, batch)[:, :-1][counted]  # (N, D)
    target_ids = batch["ids"][:, 1:][counted]  # (N,)

    def score(logits, ids):  # (n, V), (n,) -> (n,), (n,)
        correct = logits.detach().argmax(-1) == ids
        return nn.functional.cross_entropy(logits, ids, reduction="none"), correct

    losses, correct = score_in_slices(net, score, hidden, target_ids)  # (N,) each
    return TokenSums(losses.sum(), counted.sum(), correct.sum())


# ---- Sampler -------------------------------------------------------------------------------------


class Samples(TypedDict):
    """What generate() returns; sample g of prompt b is row b * n + g. T <= max_new_tokens."""

    ids: torch.Tensor  # (B*n, T) long, padded right
    mask: torch.Tensor  # (B*n, T) long, 1 on sampled tokens, the stop token among them
    logp: torch.Tensor  # (B*n, T) fp32 nats at the temperature, before top_p; 0 where mask is 0


class SampleKV(DynamicLayer):
    """Keys and values of one layer while it samples: those of the prompts, (B, h, T, d), from the
    first update, and those of n samples of each, (R, h, room, d), written in place. A DynamicLayer
    would copy all of them at each step; here they are copied when the room grows."""

    def __init__(self, n: int, room: int):
        super().__init__()
        self.n = n
        self.room = room  # tokens of a sample that can be written
        self.prompt = None  # (keys, values)
        self.write_index = None  # where a step's token goes: slice, or a tensor in a CUDA graph
        self.readable = 0  # tokens of a sample that a step reads

    def update(self, k, v, *args, **kwargs):
        if self.prompt is None:
            self.prompt = k, v
            if k.dtype != torch.float32:  # multiply() takes heads as a batch, and would copy these
                self.prompt = k.contiguous(), v.contiguous()
            B, h, _, d = k.shape
            self.keys = k.new_zeros(B * self.n, h, self.room, d)
            self.values = torch.zeros_like(self.keys)
            return k, v
        self.keys[:, :, self.write_index] = k
        self.values[:, :, self.write_index] = v
        return self.keys[:, :, : self.readable], self.values[:, :, : self.readable]

    def get_seq_length(self):
        return 0 if self.prompt is None else self.prompt[0].shape[2] + self.readable

    def grow(self, room: int) -> None:
        """Room for so many tokens of a sample. Samples that have left take none of it."""
        if room > self.room:
            self.keys = nn.functional.pad(self.keys, (0, 0, 0, room - self.room))
            self.values = nn.functional.pad(self.values, (0, 0, 0, room - self.room))
            self.room = room

    def compact(self, holes: torch.Tensor, movers: torch.Tensor, going: int) -> None:
        """The rows `movers` take the places `holes` of finished ones; the first `going` stay."""
        for cached in (self.keys, self.values):
            cached[holes, :, : self.readable] = cached[movers, :, : self.readable]
        self.keys, self.values = self.keys[:going], self.values[:going]


@dataclass
class Decoding:
    """What attention must know of a step of the sampler."""

    layers: list[SampleKV]
    active: torch.Tensor  # (R,) which samples go on, b * n + g
    total: int  # B * n
    prompt_bias: torch.Tensor  # (B, 1, 1, T) fp32, 0 where the prompt has a token, else -1e9
    filled: torch.Tensor | None  # (t,) which own tokens there are yet; None: all


def multiply(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """a (B, h, N, K) @ b (B, h, K, M) * scale -> fp32, also of bf16: sums are not rounded."""
    if a.device.type == "cuda" and a.dtype != torch.float32:  # no other device can do so
        product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return product.unflatten(0, a.shape[:2]) * scale
    return (a.float() * scale) @ b.float()


def attend_with_prompt(q, k, v, prompt_keys, prompt_values, decoding: Decoding) -> torch.Tensor:
    """One new token of R samples attends to its prompt's tokens and to its sample's own.

    A decoder is as fast as the keys it reads, so the n samples of a prompt read the prompt's keys
    together: their queries stand side by side as if they were more heads.

        q (R, H, 1, d), k and v (R, h, t, d) own tokens, prompt_keys and prompt_values (B, h, T, d)
        -> (R, 1, H, d)

    H query heads share h key heads, m = H / h to each. Of B = 2 prompts with n = 3 samples each,
    H = 4 and h = 2 (so m = 2) the six samples' queries for one key head are

        by sample   (R, h, m, .)        a1 a2 | b1 b2 | c1 c2 | d1 d2 | e1 e2 | f1 f2
        by prompt   (B, h, n * m, .)    a1 a2 b1 b2 c1 c2     | d1 d2 e1 e2 f1 f2

    and where sample b has finished, so that R = 5, its two places are 0 by prompt.

    The update attends by SDPA, which in bf16 rounds twice: exp(score) before it weighs the values,
    and the result. So does this function, and nowhere else: Qwen2.5's keys are so large that scores
    rounded to bf16 gave every fourth sampled token another probability than the update's, by 20%
    and more."""
    R, H, _, d = q.shape
    B, h, T, _ = prompt_keys.shape
    m = H // h
    all_go_on = decoding.total == R

    def by_prompt(x):  # (R, h, m, .) -> (B, h, n * m, .)
        if not all_go_on:
            with_finished = x.new_zeros(decoding.total, *x.shape[1:])
            x = with_finished.index_copy_(0, decoding.active, x)  # (B*n, h, m, .)
        x = x.unflatten(0, (B, -1))  # (B, n, h, m, .)
        return x.transpose(1, 2).flatten(2, 3)

    def by_sample(x):  # (B, h, n * m, .) -> (R, h, m, .)
        x = x.unflatten(2, (-1, m))  # (B, h, n, m, .)
        x = x.transpose(1, 2).flatten(0, 1)  # (B*n, h, m, .)
        return x if all_go_on else x[decoding.active]

    # 1. scores in fp32: of the prompt's tokens, and of the own ones
    scale = d**-0.5
    q = q.view(R, h, m, d)
    prompt_scores = multiply(by_prompt(q), prompt_keys.mT, scale)  # (B, h, n * m, T)
    prompt_scores = by_sample(prompt_scores + decoding.prompt_bias)  # (R, h, m, T)
    own_scores = multiply(q, k.mT, scale)  # (R, h, m, t)
    if decoding.filled is not None:
        own_scores = own_scores.masked_fill(~decoding.filled, -1e9)
    # 2. one softmax over both; of bf16 its sum divides at the end
    scores = torch.cat([prompt_scores, own_scores], -1)  # (R, h, m, T + t)
    if v.dtype == torch.float32:
        weights = scores.softmax(-1)
        total = 1.0
    else:
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        total = weights.sum(-1, keepdim=True)
        weights = weights.to(v.dtype)
    # 3. values: of the prompt's tokens, and of the own ones
    of_prompt = multiply(by_prompt(weights[..., :T]), prompt_values)  # (B, h, n * m, d)
    of_own = multiply(weights[..., T:], v)  # (R, h, m, d)
    values = by_sample(of_prompt) + of_own
    return (values / total).to(v.dtype).reshape(R, 1, H, d)


def draw_tokens(
    logp: torch.Tensor, u: torch.Tensor, top_p: float = 1.0, may_wait: bool = True
) -> torch.Tensor:
    """Inverse-CDF sampling: the first index whose cumulative probability reaches u. logp (N, V),
    u (N,) in (0, 1], fp32 -> (N,).

    Some 10x faster than torch.multinomial on a CPU at 152K tokens, and no row's draw depends on
    another. top_p < 1 leaves only the nucleus: the fewest most probable tokens that reach top_p
    together, and all ties of the last. may_wait: False in a CUDA graph, which asks for no value."""
    p = logp.exp()
    if top_p < 1:
        ranked = p.sort(-1, descending=True).values
        is_outside = ranked.cumsum(-1) - ranked >= top_p
        least = ranked.masked_fill(is_outside, 2.0).amin(-1, keepdim=True)  # p of the last inside
        p = p * (p >= least)
    cdf = p.cumsum(-1)
    ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:])  # (N, 1)
    # u > 0, so that no token of probability 0 is drawn; but the parallel sum of a GPU can rise
    # there by a rounding
    is_lost = p.gather(-1, ids) == 0
    if not may_wait or is_lost.any():
        ids = torch.where(is_lost, p.argmax(-1, True), ids)
    return ids[:, 0]


class Decoder:
    """Samples n continuations of each of B prompts into the rows `slots` (B*n,) of `samples`.

    1. prefill: the prompts and their images are forwarded once, each layer keeps their keys
    2. choose the first token of each sample from its prompt's last hidden state
    3. a step forwards the newest token of the samples that go on, and chooses the next one
    4. samples that have ended leave; stop when none is left or there is no more room

    choose(hidden (R, D), slots (R,), position (1,)) -> token and its logp, (R,) each. A sample ends
    with a token of `stop`."""

    CACHE_BLOCK = 128  # tokens by which the cache grows: few completions reach max_new_tokens
    # A CUDA graph is bound to its shapes. It reads the cache up to the end of a block; and finished
    # rows, which are looked for every few steps, leave when they are a quarter.
    GRAPH_STEPS = 16
    GRAPH_FULLNESS = 0.75

    def __init__(self, backbone, rows, n, slots, samples, choose, stop, cuda_graphs):
        net = backbone.net
        device = slots.device
        self.net = net
        self.device = device
        self.pad = backbone.vocab.pad
        self.slots = slots
        self.samples = samples
        self.choose = choose
        self.stop = stop
        self.cuda_graphs = cuda_graphs
        self.max_new_tokens = samples["ids"].shape[1]
        # prefill
        batch = to_device(collate(rows, backbone.vocab.pad, left=True), device)
        layer_count = len(net.model.language_model.layers)
        self.cache = Cache(layers=[SampleKV(n, self.room_for(1)) for _ in range(layer_count)])
        last = hidden_states(net, batch, self.cache)[:, -1]  # (B, D)
        self.prompt_hidden = last.repeat_interleave(n, 0)  # (B*n, D)
        self.first_position = (batch["positions"].amax((0, 2)) + 1).repeat_interleave(n)  # (B*n,)
        self.prompt_bias = (batch["mask"] - 1)[:, None, None] * 1e9  # (B, 1, 1, T) fp32
        # the samples that go on, and what each step changes in place
        self.active = torch.arange(len(slots), device=device)  # (R,)
        self.newest = torch.zeros_like(self.active)  # (R,) token
        self.alive = torch.ones_like(self.active, dtype=torch.bool)  # (R,)
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the newest token

    def choose_next(self, hidden):
        """The next token of each active sample from hidden (R, D). Finished rows, which a graph
        keeps for a while, write padding."""
        slots = self.slots[self.active]
        token, logp = self.choose(hidden, slots, self.position)
        self.newest.copy_(token).masked_fill_(~self.alive, self.pad)
        self.samples["ids"][slots, self.position] = self.newest
        self.samples["mask"][slots, self.position] = self.alive.long()
        self.samples["logp"][slots, self.position] = logp.masked_fill(~self.alive, 0)
        self.alive.logical_and_((self.newest[:, None] != self.stop).all(1))

    def step(self):
        """Forwards the newest token of each active sample and chooses the next. Reads and writes
        tensors that keep their place and never asks for a value, so that a GPU can replay it."""
        language_model = self.net.model.language_model
        filled = None
        if self.cuda_graphs:
            readable = self.cache.layers[0].readable
            filled = torch.arange(readable, device=self.device) <= self.position
        decoding = Decoding(
            self.cache.layers, self.active, len(self.slots), self.prompt_bias, filled
        )
        positions = self.first_position[self.active] + self.position  # (R,)
        output = language_model(
            inputs_embeds=self.net.get_input_embeddings()(self.newest[:, None]),  # (R, 1, D)
            past_key_values=self.cache,
            use_cache=True,
            position_ids=positions[None, :, None].expand(3, -1, -1),
            decoding=decoding,
        )
        self.position.add_(1)
        self.choose_next(output.last_hidden_state[:, 0])

    def drop_finished(self, going):
        """The `going` samples that go on move to the front, and the rest leaves."""
        holes = (~self.alive[:going]).nonzero()[:, 0]
        movers = self.alive[going:].nonzero()[:, 0] + going
        for layer in self.cache.layers:
            layer.compact(holes, movers, going)
        order = torch.arange(going, device=self.device).index_copy_(0, holes, movers)
        self.active, self.newest = self.active[order], self.newest[order]
        self.alive = torch.ones_like(self.alive[:going])

    def room_for(self, tokens):
        """Room of the cache for so many tokens of a sample: whole blocks."""
        blocks = -(-tokens // self.CACHE_BLOCK)
        return min(blocks * self.CACHE_BLOCK, self.max_new_tokens)

    def set_cache(self, write_index, readable):
        for layer in self.cache.layers:
            layer.grow(self.room_for(readable))
            layer.write_index, layer.readable = write_index, readable

    def run(self):
        self.choose_next(self.prompt_hidden)
        length = 1  # tokens of a sample
        if self.cuda_graphs:
            length = self.run_as_graphs(length)
        self.run_plainly(length)

    def run_plainly(self, length):
        """Finished samples leave at once."""
        while length < self.max_new_tokens:
            going = int(self.alive.sum())
            if going == 0:
                return
            if going < len(self.active):
                self.drop_finished(going)
            self.set_cache(slice(length - 1, length), length)
            self.step()
            length += 1

    def run_as_graphs(self, length):
        """The same loop for a GPU, where launching a step's kernels one by one would take longer
        than to compute one token a row: a step is recorded once for each shape, then replayed. ->
        tokens of a sample at the end, or when recording has failed. Of a new shape, from token 1:

            1. finished samples leave
            2. to where with one shape    token 17, as GRAPH_STEPS says
            3. a plain step               token 2
            4. record a step              no token
            5. replay it                  tokens 3 .. 17"""
        current_shape = None
        replay = None
        while length < self.max_new_tokens:
            # 1. finished samples leave, where they are many
            going = int(self.alive.sum())
            if going == 0:
                break
            if going < len(self.active) and going <= self.GRAPH_FULLNESS * len(self.active):
                self.drop_finished(going)
            # 2. to where with one shape
            end = min(length + self.GRAPH_STEPS, self.max_new_tokens)
            readable = self.room_for(end - 1)
            shape = len(self.active), readable
            if shape != current_shape:
                # 3. a plain step, as no graph may hold what libraries do at a first call. The old
                # graph goes before it: with it go workspaces that another would share.
                current_shape = shape
                replay = None
                self.set_cache(self.position, readable)
                self.step()
                length += 1
            while length < end:
                # 4. record a step
                if replay is None:
                    replay = self.record_step()
                if replay is None:
                    return length
                # 5. replay
                replay()
                length += 1
        return length

    def record_step(self) -> Callable | None:
        """A step as a CUDA graph. Where it cannot be recorded: None, a line that says so, and no
        more graphs."""
        try:
            return record(self.step, self.device)
        except RuntimeError as e:
            RECORDING_FAILED.set()
            reason = str(e).partition("\n")[0]
            print(f"warning: no CUDA graphs, they cannot be recorded: {reason}")
            self.cuda_graphs = False
            return None


RECORDING_FAILED = threading.Event()  # set by the first failure: it would be the same again


def can_record(device: torch.device) -> bool:
    return device.type == "cuda" and not RECORDING_FAILED.is_set()


def record(step: Callable, device: torch.device) -> Callable:
    """What step() launches on the GPU, as a CUDA graph: -> a function that does it again, on the
    same tensors, in one launch."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream(device)
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # torch stays on the graph's own when its end fails too
        raise
    return graph.replay


def _run_decoder(net, decoder):  # to FSDP a forward of the root: no block then waits for streams
    decoder.run()


def token_limit(given: int | None, backbone: Backbone, default: int) -> int:
    """Tokens of a completion at most: as many as a flag says, else as the checkpoint's own run
    allowed, else the default."""
    return given or backbone.run.get("config", {}).get("max_new_tokens") or default


@torch.no_grad()  # inference_mode would give tensors that the update cannot use
def generate(
    backbone: Backbone,
    rows: Sequence[Row],
    n: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    keys: Sequence[int] | None = None,
    stop: Iterable[int] | None = None,
    rollout_batch: int = 0,
    cuda_graphs: bool = True,
) -> Samples:
    """Samples n continuations of each of B prompt-only rows.

    keys: one int a prompt (default 0..B-1); the sample of (seed, key, g) is the same in any batch
    and on any number of ranks, up to float noise. stop: ids that end a sample (default the end of
    the turn). backbone.vocab.banned ids have probability 0. rollout_batch: prompts at once, those
    of like length together; 0: all. cuda_graphs: on a GPU, replay decoding steps as CUDA graphs;
    where recording one fails a line says so, and this process samples without them from there on.
    ValueError for an impossible temperature or top_p.
    Gather sharded parameters first: `with unsharded(net)`."""
    if temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature} must be > 0 and top_p {top_p} in (0, 1]; "
            "for the most probable token pass greedy=True"
        )
    # 1. what is to be filled, and the random numbers of each sample
    net = backbone.net
    device = net.device
    B = len(rows)
    ids = torch.full((B * n, max_new_tokens), backbone.vocab.pad, device=device)
    mask = torch.zeros_like(ids)
    logps = torch.zeros(B * n, max_new_tokens, device=device)
    samples = {"ids": ids, "mask": mask, "logp": logps}
    keys = range(B) if keys is None else keys
    uniform = [1 - rng(seed, key, g).random(max_new_tokens) for key in keys for g in range(n)]
    u = torch.tensor(np.array(uniform, np.float32), device=device)  # (B*n, T) in (0, 1]
    # 2. how a token is chosen
    stop = torch.tensor([backbone.vocab.eos] if stop is None else list(stop), device=device)
    banned = torch.tensor(backbone.vocab.banned, dtype=torch.long, device=device)
    may_record = cuda_graphs and can_record(device)

    def choose(hidden, slots, position):
        scaled = (logits(net, hidden) / temperature).index_fill_(-1, banned, -torch.inf)  # (R, V)
        logp = scaled.log_softmax(-1)
        if greedy:
            token = logp.argmax(-1)  # (R,)
        else:
            token = draw_tokens(logp, u[slots, position], top_p, not may_record)
        return token, logp.gather(-1, token[:, None])[:, 0]

    # 3. sample, so many prompts at once
    rollout_batch = rollout_batch or max(B, 1)  # a rank may have no prompt
    order = list(range(B))
    if rollout_batch < B:
        order.sort(key=lambda b: len(rows[b]["ids"]))
    was_training = net.training
    net.eval()
    for start in range(0, B, rollout_batch):
        prompts = order[start : start + rollout_batch]
        slots = torch.tensor([b * n + g for b in prompts for g in range(n)], device=device)
        prompt_rows = [rows[b] for b in prompts]
        may_record = may_record and can_record(device)  # it may have failed with those before
        decoder = Decoder(backbone, prompt_rows, n, slots, samples, choose, stop, may_record)
        as_forward(_run_decoder, net, decoder)
        del decoder  # its cache, before the next prompts are forwarded
    net.train(was_training)
    # 4. cut to the longest
    T = int(mask.any(0).sum())
    return {"ids": ids[:, :T], "mask": mask[:, :T], "logp": logps[:, :T]}


@contextlib.contextmanager
def unsharded(net: nn.Module) -> Iterator[None]:
    """Gathers all parameters once, for rollouts: inside, forwards without gradient communicate
    nothing, so ranks may run different numbers of them. No-op when net is not sharded. All ranks
    enter and leave it together."""
    shards = fsdp_modules(net)
    if not shards:
        yield
        return
    net._get_fsdp_state()._lazy_init()  # net is the root, also when no forward has run yet
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        # Reshards, and forgets the order of the forwards above. The next backward would prefetch by
        # it: a rank that had no prompt would then wait for another gather than the rest, forever.
        net.reset_iter_state()
        for module in shards:
            module.set_reshard_after_forward(module is not net, recurse=False)


# ---- Sharding ------------------------------------------------------------------------------------

SMALL = 50_000_000  # parameters below which gathering all at once costs less than it saves memory


@dataclass(frozen=True)
class Dist:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device
    shards: int = 0  # ranks that share one copy of the weights; 0: all
    timeout: datetime.timedelta = datetime.timedelta(hours=6)  # that ranks wait for the slowest

    @property
    def build(self) -> torch.device:
        """Where a backbone is loaded before shard(): only rank 0 reads weights."""
        return torch.device("cpu") if self.rank == 0 else META


def device_name(text: str) -> str:
    """A device as a flag names it; the parser's error unless this machine has it."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, ValueError) as e:
        why = str(e).split("\n")[0][:80]
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine ({why})") from e
    return text


def setup(seed: int, shards: int = 0, batch: int = 0, timeout_hours: float = 6.0) -> Dist:
    """Starts nccl (GPU) or gloo (CPU) under torchrun, one process otherwise; seeds torch.
    timeout_hours: that ranks wait for the slowest. NCCL's 10 minutes would end a job while rank 0
    downloads 16 GB or writes 33 GB.
    ValueError when batch or shards do not fit the number of ranks."""
    quiet_libraries()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    has_gpu = torch.cuda.is_available()
    under_torchrun = "RANK" in os.environ
    timeout = datetime.timedelta(hours=timeout_hours)
    device = torch.device("cpu")
    if has_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        backend = "nccl" if has_gpu else "gloo"
        if under_torchrun:
            distributed.init_process_group(backend, timeout=timeout)
        elif has_gpu:  # one GPU alone: FSDP brings bf16
            store = distributed.HashStore()
            distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    torch.manual_seed(seed)
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    if batch % world_size:
        raise ValueError(f"--batch {batch} must be a multiple of {world_size} ranks")
    if shards and world_size % shards:
        raise ValueError(f"--shards {shards} must divide the {world_size} ranks")
    return Dist(_rank(), world_size, device, shards, timeout)


def quiet_libraries() -> None:
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of DCP in one process


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, for the whole process: on a CPU a fifth faster than to
    fault the same pages in at every step. No-op with another C library, and with a GPU, where it
    would only keep the weights that rank 0 has read or gathered: 33 GB."""
    if torch.cuda.is_available():
        return
    M_TRIM_THRESHOLD = -1  # of malloc.h
    M_MMAP_THRESHOLD = -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def all_sum(x: float | Sequence[float]) -> float | list[float]:
    """Sums a number, or each of a list of numbers, over the ranks; in float64."""
    values = torch.tensor(x, dtype=torch.float64)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        if distributed.get_backend() == "nccl":
            values = values.cuda()
        distributed.all_reduce(values)
    return values.tolist()


def fsdp_modules(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, fsdp.FSDPModule)]


def fsdp_units(net: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: each block, then each end of the vocabulary (unless both are one
    table), then the root with the rest; all of a SMALL model."""
    size = sum(p.numel() for p in net.parameters())
    if not isinstance(net, transformers.PreTrainedModel) or size <= SMALL:
        return [net]
    ends = [net.get_input_embeddings(), net.get_output_embeddings()]
    if ends[0].weight is ends[1].weight:
        ends = []
    return [*net.model.visual.blocks, *net.model.language_model.layers, *ends, net]


def compute_dtype(device: str | torch.device) -> torch.dtype:
    """The type in which backbones and heads compute; no other place names it."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def uses_fsdp(dist: Dist) -> bool:
    """One GPU alone does: FSDP keeps fp32 masters of weights that compute in bf16."""
    return dist.world_size > 1 or dist.device.type == "cuda"


def shard(
    net: nn.Module, dist: Dist, dtype: torch.dtype | None = None, offload: bool = False
) -> nn.Module:
    """FSDP2 in place: fp32 masters, compute in dtype (compute_dtype() by default), mean gradients.
    No-op for one CPU process.

    dist.shards: groups of so many ranks mirror each other (HSDP). Weights on META come from rank 0,
    one of the fsdp_units() after the other. offload: the shards stay in the CPU's memory, for a
    model without gradients. Frozen weights that a rank has whole and in dtype stay as they are:
    gathering would only copy them."""
    if not uses_fsdp(dist):
        return net
    for p in net.parameters():
        if not p.numel():  # FSDP cannot reduce its gradient: of a head without future tokens
            p.requires_grad_(False)
    dtype = dtype or compute_dtype(dist.device)
    shards = dist.shards or dist.world_size
    if shards == dist.world_size:
        shape = (shards,)
        names = ("shard",)
    else:
        shape = (dist.world_size // shards, shards)
        names = ("replicate", "shard")
    mesh = init_device_mesh(dist.device.type, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():  # new ones would wait for 10 minutes
        distributed.distributed_c10d._set_pg_timeout(dist.timeout, group)
    options = {
        "mesh": mesh,
        "mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    }
    if offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=dist.device.type == "cuda")
    left_whole = set()  # weights of the units so far that FSDP leaves as they are
    for unit in fsdp_units(net):  # the last unit is net: it holds the others, which are done then
        _receive(unit, dist, received=left_whole)
        if shards == 1 and not offload:  # the rank has all of them
            left_whole = left_whole | frozen_weights(unit, dtype)
        fsdp.fully_shard(
            unit, reshard_after_forward=unit is not net, ignored_params=left_whole, **options
        )
    return net


def frozen_weights(net: nn.Module, dtype: torch.dtype) -> set[nn.Parameter]:
    """Its frozen weights in dtype. Where dtype is that of compute, a rank that has all of them can
    compute with them as they are: gathering would only copy them."""
    return {p for p in net.parameters() if not p.requires_grad and p.dtype == dtype}


def replicate(net: nn.Module, dist: Dist) -> None:
    """All of a net on the device of each rank, with the weights that rank 0 has read. For one that
    is not trained: its gradients would stay each rank's own."""
    _receive(net, dist)


def _receive(unit, dist, received=()):
    """Weights and buffers come to the device, with the values that rank 0 has; but for those that
    have come with a unit inside: they are sharded (a DTensor), or among `received`."""
    new_tensors = {}  # old tensor -> new one: a tied tensor stays one
    for module in unit.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None or isinstance(old, DTensor) or old in received:
                    continue
                if old not in new_tensors:
                    new_tensors[old] = _receive_tensor(old, dist)
                table[name] = new_tensors[old]


def _receive_tensor(old, dist):
    new = torch.empty_like(old, device=dist.device) if old.is_meta else old.to(dist.device)
    if dist.world_size > 1:
        distributed.broadcast(new.detach(), 0)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new.detach(), old.requires_grad)
    return new


def recompute_activations(net: nn.Module) -> None:
    """Activation checkpointing of every block: less memory, a third more time."""
    net.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for layer in net.model.language_model.layers:
        layer._can_checkpoint_with_cache = True  # grpo.SharedKV may be updated twice


# ---- Adapters ------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685): beside some frozen matrices W (out, in) two thin ones are trained, A (R,
# in) and B (out, R). A checkpoint holds W + alpha / R * B A in the place of W, so that what loads
# it knows nothing of adapters; train_state/ holds A and B.

ADAPTERS = ("lora_a", "lora_b", "rows")  # parameters that save() merges


class LoraLinear(nn.Linear):
    """A frozen linear layer with an adapter: y = x W^T + b + scale * (x A^T) B^T.

    lora_a: A (R, in), which begins uniform in +-1 / sqrt(in), as a linear layer does. lora_b: B
    (out, R), which begins as zeros, so that training begins with the layer as it was."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, has_bias, device=META)
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        self.is_on = True
        bound = linear.in_features**-0.5
        a = bound * (2 * torch.rand(rank, linear.in_features, generator=generator) - 1)
        b = torch.zeros(linear.out_features, rank)
        self.lora_a = nn.Parameter(a.to(linear.weight.device))
        self.lora_b = nn.Parameter(b.to(linear.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)  # (..., out)
        if not self.is_on:
            return y
        inner = nn.functional.linear(x, self.lora_a)  # (..., R)
        return y + self.scale * nn.functional.linear(inner, self.lora_b)

    def merged(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """W, A and B, whole -> the weight (out, in) of a plain layer that computes the same."""
        return weight + self.scale * (b @ a)


class EmbeddingWithRows(nn.Embedding):
    """A frozen table (V, D) of which the rows of `row_ids` are trained: `rows` (N, D) takes their
    place."""

    def __init__(self, table: nn.Embedding, row_ids: torch.Tensor, rows: nn.Parameter):
        V, D = table.weight.shape
        super().__init__(V, D, table.padding_idx, device=META)
        self.weight = table.weight
        self.rows = rows
        self.register_buffer("row_ids", row_ids, persistent=False)  # (N,) ascending

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        row = torch.searchsorted(self.row_ids, ids.contiguous()).clamp(max=len(self.row_ids) - 1)
        is_trained = (self.row_ids[row] == ids)[..., None]
        trained = nn.functional.embedding(row, self.rows)
        return torch.where(is_trained, trained, super().forward(ids))  # (..., D)

    def merged(self, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The table (V, D) and its trained rows (N, D), whole -> the table of a plain layer."""
        return weight.index_copy(0, self.row_ids.cpu(), rows)


class HeadWithRows(nn.Linear):
    """The same of the last layer (V, D), which makes logits of hidden states."""

    def __init__(self, head: nn.Linear, row_ids: torch.Tensor, rows: nn.Parameter):
        super().__init__(head.in_features, head.out_features, bias=False, device=META)
        self.weight = head.weight
        self.rows = rows
        self.register_buffer("row_ids", row_ids, persistent=False)  # (N,) ascending

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = nn.functional.linear(x, self.rows)  # (..., N)
        return super().forward(x).index_copy_(-1, self.row_ids, scores)  # (..., V)

    merged = EmbeddingWithRows.merged


def check_adapters(cfg, dist: Dist) -> None:
    """ValueError naming the cure when a flag of adapters does not go with the others."""
    for name in ("lora_alpha", "lora_targets", "bf16_base"):
        if not cfg.lora and getattr(cfg, name) != getattr(type(cfg), name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: goes with adapters; give --lora 16 too, or leave it out")
    if cfg.bf16_base and not uses_fsdp(dist):
        raise ValueError(
            "--bf16-base: one process on a CPU computes in the type of its weights, and in bf16 "
            "slowly; leave it out, or start two by torchrun"
        )


def add_adapters(net: nn.Module, cfg, row_ids: Sequence[int] = ()) -> None:
    """Freezes the net in place, and puts adapters beside linear layers of its language model; call
    it before shard().

    cfg: of a stage: .lora (the rank R), .lora_alpha, .lora_targets, .bf16_base, .seed. row_ids:
    tokens whose rows of the vocabulary train too. ValueError for a target that is no such layer."""
    generator = torch.Generator().manual_seed(cfg.seed)
    net.requires_grad_(False)
    # 1. the rows, one parameter where both tables are one
    if row_ids:
        row_ids = torch.tensor(sorted(row_ids), device=net.device)  # (N,)
        table = net.get_input_embeddings()
        head = net.get_output_embeddings()
        rows = nn.Parameter(table.weight[row_ids].float())
        head_rows = rows
        if head.weight is not table.weight:
            head_rows = nn.Parameter(head.weight[row_ids].float())
        net.set_input_embeddings(EmbeddingWithRows(table, row_ids, rows))
        # not the same row_ids: what two FSDP units share would not reach all ranks as one
        net.set_output_embeddings(HeadWithRows(head, row_ids.clone(), head_rows))
    # 2. the adapters
    language_model = net.model.language_model
    linear_layers = {}
    for name, module in language_model.named_modules():
        if isinstance(module, nn.Linear):
            linear_layers[name] = module
    kinds = sorted({name.rpartition(".")[2] for name in linear_layers})
    targets = kinds
    if cfg.lora_targets:
        targets = [target.strip() for target in cfg.lora_targets.split(",")]
    for target in targets:
        if target not in kinds:
            raise ValueError(f"--lora-targets {target!r}: choose of {', '.join(kinds)}")
    for name, linear in linear_layers.items():
        if name.rpartition(".")[2] in targets:
            adapted = LoraLinear(linear, cfg.lora, cfg.lora_alpha, generator)
            language_model.set_submodule(name, adapted)
    # 3. the type of what is frozen
    if cfg.bf16_base:
        for p in net.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()


@contextlib.contextmanager
def adapters_off(net: nn.Module) -> Iterator[None]:
    """Inside, the net is the one that its adapters began with: GRPO's reference. No-op on a net
    without adapters."""
    adapted = [module for module in net.modules() if isinstance(module, LoraLinear)]
    for module in adapted:
        module.is_on = False
    try:
        yield
    finally:
        for module in adapted:
            module.is_on = True


def frozen_sha256(net: nn.Module) -> str:
    """What a run with adapters stands on, told on all ranks by rank 0, which has read it: 12 hex
    digits of every 997th frozen number. Any other training would have moved those too."""
    digest = hashlib.sha256()
    if _rank() == 0:
        for p in net.parameters():
            if not p.requires_grad:
                digest.update(p.detach().flatten()[::997].float().numpy().tobytes())
    value = int(digest.hexdigest()[:12], 16)  # a float64 holds all of its 48 bits
    return f"{int(all_sum(value if _rank() == 0 else 0)):012x}"


def _adapter_values(module):
    """Name -> parameter, of those that a checkpoint's weights do not hold as they are."""
    values = {}
    for name, p in module.named_parameters():
        if name.rpartition(".")[2] in ADAPTERS:
            values[name] = p.detach()
    return values


def _merge(module, state):
    """Whole weights of a module by name -> those of the same module without adapters, in fp32."""
    merged = {}  # (tensor, rows) -> table: a tied one stays one
    for name, part in module.named_modules():
        if isinstance(part, LoraLinear):
            a, b = state.pop(f"{name}.lora_a"), state.pop(f"{name}.lora_b")
            state[f"{name}.weight"] = part.merged(state[f"{name}.weight"], a, b)
        elif isinstance(part, EmbeddingWithRows | HeadWithRows):
            key = state[f"{name}.weight"], state.pop(f"{name}.rows")
            if key not in merged:
                merged[key] = part.merged(*key)
            state[f"{name}.weight"] = merged[key]
    return state


# ---- Optimizers ----------------------------------------------------------------------------------


def rng(seed: int, *keys: int | str) -> np.random.Generator:
    """The generator of (seed, step, sample, ...): no state to save, resume is exact."""
    numbers = [zlib.crc32(key.encode()) if isinstance(key, str) else int(key) for key in keys]
    return np.random.default_rng([seed, *numbers])


def make_optimizer(
    net: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], muon: bool = False
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of a module; norms and biases (1-D) are not decayed.
    muon: the muon_matrices() by Muon instead."""
    by_muon = {id(p) for p in muon_matrices(net)} if muon else set()
    muon_params = []
    matrices = []
    vectors = []
    for p in net.parameters():
        if not p.requires_grad:
            continue
        if id(p) in by_muon:
            muon_params.append(p)
        elif p.ndim > 1:
            matrices.append(p)
        else:
            vectors.append(p)
    groups = [
        {"params": muon_params, "weight_decay": weight_decay, "muon": True},
        {"params": matrices, "weight_decay": weight_decay, "muon": False},
        {"params": vectors, "weight_decay": 0.0, "muon": False},
    ]
    groups = [group for group in groups if group["params"]]
    kind = Muon if muon else torch.optim.AdamW
    return kind(groups, lr=lr, betas=betas, fused=True)


def learning_rate(
    step: int, steps: int, lr: float, warmup_ratio: float, schedule: str = "cosine"
) -> float:
    """Learning rate of step 0..steps-1: linear warmup, then cosine to 0 or "constant"."""
    warmup_steps = round(warmup_ratio * steps)
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    angle = np.pi * (step - warmup_steps) / max(1, steps - warmup_steps)  # 0 .. pi
    return lr * 0.5 * (1 + np.cos(angle))


def clip_gradients(params: Iterable[nn.Parameter], max_grad_norm: float) -> float:
    """Scales the gradients in place to a global norm of at most max_grad_norm (0: not). -> the norm
    before."""
    limit = max_grad_norm if max_grad_norm > 0 else float("inf")
    norm = nn.utils.clip_grad_norm_(params, limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def stop_if_not_finite(
    out: str | Path, when: str, dist: Dist, batches: Iterable[dict], name: str, value: float
) -> None:
    """ValueError when `value` (the loss, a gradient norm) is not finite, after saving this rank's
    batches, to replay them: dicts of arrays, whose samples are named under "sample_id"."""
    if np.isfinite(value):
        return
    batches = list(batches)  # from a generator: made only when there is something to save
    sample_ids = []
    arrays = {}
    for i, batch in enumerate(batches):
        for key, array in batch.items():
            if key == "sample_id":
                sample_ids += array
            elif isinstance(array, (list, np.ndarray, torch.Tensor)):
                tensor = torch.as_tensor(array).detach().cpu().clone()
                arrays[f"{i}.{key}"] = tensor.contiguous()
    label = re.sub(r"[^0-9a-z]+", "_", when)
    path = Path(out) / f"failed_{label}_rank_{dist.rank}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path, {"samples": json.dumps(sample_ids), "where": when})
    raise ValueError(
        f"{when}, rank {dist.rank}: the {name} is {value}; look at its samples "
        f"{', '.join(sample_ids)}, which {path} holds, or lower --lr"
    )


# ---- Muon ----------------------------------------------------------------------------------------
# Not torch.optim.Muon: on two ranks it works on shards through DTensor operations, one matrix after
# the other and in bf16. That took 7.7 times as long, and after six steps the weights differed by
# 2e-3 from those of one rank, where ours differ by 1.5e-5 (docs/log.md).


def muon_matrices(net: nn.Module) -> list[nn.Parameter]:
    """What Muon updates: the weights of linear layers that train, but the last one's (lm_head)."""
    chosen = set()
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head" and module.weight.requires_grad:
            chosen.add(id(module.weight))
    return [p for p in net.parameters() if id(p) in chosen]


class Muon(torch.optim.AdamW):
    """AdamW, except that in the group marked "muon" the momentum of a matrix is replaced by
    (nearly) the closest orthogonal one before it is subtracted (kellerjordan.github.io/posts/muon),
    scaled so that learning rate and decay mean what AdamW's do (arXiv 2502.16982, section 2.2).

    1. momentum, on each rank's shards
    2. whole matrices, equal shapes stacked; each rank orthogonalises its share of them
    3. decay and subtract, on the shards again"""

    @torch.no_grad()
    def step(self):
        group = next((group for group in self.param_groups if group["muon"]), {"params": []})
        # 1. momentum, of matrices of equal shape at once
        by_shape = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            by_shape.setdefault(p.shape, []).append(p)
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        stacks = []
        for params in by_shape.values():
            momenta = local_shards([self.state[p]["exp_avg"] for p in params])
            grads = local_shards([p.grad for p in params])
            torch._foreach_lerp_(momenta, grads, 1 - group["betas"][0])
            # in place: p.grad is Nesterov's momentum from here on
            torch._foreach_lerp_(grads, momenta, group["betas"][0])
            stacks.append(torch.stack([p.grad for p in params]))  # (N, out, in)
        # 2. whole matrices, orthogonalised
        gathered = [s.full_tensor() if isinstance(s, DTensor) else s for s in stacks]
        updates = orthogonalize_shared(gathered)
        # 3. decay and subtract, of each matrix this rank's shard
        for params, stack, whole_update in zip(by_shape.values(), stacks, updates, strict=True):
            update = _shard_like(stack, whole_update)
            weights = local_shards(params)
            scale = 0.2 * max(stack.shape[1:]) ** 0.5
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, update.unbind(), alpha=-group["lr"] * scale)
            for p in params:
                p.grad = None  # AdamW passes over what has none
        super().step()


def _shard_like(stack, whole):
    """This rank's shard of a whole tensor that all ranks have, as `stack` is sharded."""
    if not isinstance(stack, DTensor):
        return whole
    mesh, placements = stack.device_mesh, stack.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()


def local_shards(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's shards."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def orthogonalize(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices (N, out, in) -> U V^T of their singular value decompositions, roughly: the singular
    values come to lie around 1 (0.7 to 1.2) by `steps` of a quintic Newton-Schulz iteration."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, steps).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # A step is x <- (a + b G + c G^2) x with G = x x^T. The factors are multiplied up first: they
    # are small, where x may be long.
    gram = x @ x.mT
    product = None
    for _ in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)  # b G + c G^2
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)  # a
        gram = factor @ gram @ factor
        product = factor if product is None else factor @ product
    return product @ x


def orthogonalize_shared(stacks: list[torch.Tensor]) -> list[torch.Tensor]:
    """orthogonalize() of stacks that all ranks have; each rank computes its share."""
    if not stacks or not distributed.is_initialized():
        return [orthogonalize(stack) for stack in stacks]
    sizes = [stack.numel() for stack in stacks]
    flat = stacks[0].new_zeros(sum(sizes))
    results = [part.view_as(stack) for part, stack in zip(flat.split(sizes), stacks, strict=True)]
    share = slice(distributed.get_rank(), None, distributed.get_world_size())
    for stack, result in zip(stacks, results, strict=True):
        if len(stack[share]):
            result[share] = orthogonalize(stack[share])
    distributed.all_reduce(flat)
    return results


# ---- Plumbing: checkpoints -----------------------------------------------------------------------

SIGTERM_CAME = threading.Event()  # set by the handler of stop_on_sigterm()
MAY_CHANGE_ON_RESUME = [
    "preset", "out", "steps", "epochs", "resume", "keep", "micro_batch", "rollout_batch",
    "max_length", "max_pixels", "too_long", "outside_images", "changed_data", "loader_threads",
    "cuda_graphs", "recompute", "shards", "cpu_offload", "cache", "cache_dir", "probe_prompts",
    "eval_rows", "eval_prompts", "eval_every", "save_every", "log_every", "show_every",
    "timeout_hours", "shard_backbone",
]  # fmt: skip
TENSORS_A_FILE = 64  # of train_state/: DCP puts each file together in memory
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def write_json(path: str | Path, value) -> None:
    """Atomically: whoever reads meanwhile sees the old file."""
    unfinished = Path(path).with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(path)


def read_json(path: str | Path):
    """What stands in a JSON file. ValueError naming it, and the line, when it is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: not JSON ({e.msg}); repair or delete the file") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not JSON ({e}); repair or delete the file") from e


def read_run(folder: str | Path, key: str) -> dict:
    """run.json of a checkpoint. ValueError naming it when it holds no `key`."""
    path = Path(folder) / "run.json"
    run = read_json(path)
    if not isinstance(run, dict) or key not in run:
        raise ValueError(f'{path}: holds no "{key}"; copy the whole folder again')
    return run


def _whole_weights(module):
    """Name -> whole tensor on the CPU of rank 0, adapters merged (elsewhere None); all ranks call
    it. Tied ones are gathered once and stay one tensor."""
    state = module.state_dict(keep_vars=True)
    has_adapters = bool(_adapter_values(module))
    whole = {}
    for tensor in dict.fromkeys(state.values()):
        full = tensor.detach()
        if isinstance(tensor, DTensor):
            full = full.full_tensor()
        whole[tensor] = full.cpu().contiguous() if _rank() == 0 else None
        if has_adapters and _rank() == 0:
            whole[tensor] = whole[tensor].float()  # of --bf16-base
    state = {name: whole[tensor] for name, tensor in state.items()}
    del whole  # so that each is freed as it is merged
    return _merge(module, state) if has_adapters and _rank() == 0 else state


def _optimizer_tensors(module, optim):
    """ "parameter/exp_avg" and so on -> tensor of the optimizer, maybe sharded; of an adapter
    "parameter/value" too."""
    names = {p: name for name, p in module.named_parameters()}
    tensors = {f"{name}/value": p for name, p in _adapter_values(module).items()}
    for p, state in optim.state.items():
        for key, tensor in state.items():
            tensors[f"{names[p]}/{key}"] = tensor if tensor.ndim else tensor[None]
    return dict(sorted(tensors.items()))


def _as_module(what):
    """The module whose parameters an optimizer may hold: the backbone's net, or a dict of parts."""
    if isinstance(what, dict):
        return nn.ModuleDict({name: _as_module(part) for name, part in what.items()})
    return what.net if isinstance(what, Backbone) else what


def save(
    folder: Path,
    what: "Backbone | dict[str, Backbone | nn.Module]",
    run: dict,
    optim: torch.optim.Optimizer | None = None,
) -> None:
    """Writes a complete checkpoint, atomically; all ranks call it. ValueError if it cannot.

    what: a Backbone, or {name: Backbone or module}: the backbone goes into the folder in Hugging
    Face layout with fast/, each module into name.safetensors. run: {"stage", "step", "config",
    "parent", "command"}, to which base, versions and commit are added. optim: with it, train_state/
    for exact resume holds the optimizer, each rank its shard. safetensors and JSON only, and the
    model_card()."""
    unfinished = folder.with_name(folder.name + ".tmp")
    parts = what if isinstance(what, dict) else {"backbone": what}
    # 1. gather the weights on rank 0
    states = {name: _whole_weights(_as_module(part)) for name, part in parts.items()}
    if _rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    error = None
    record = dict(run)
    try:
        # 2. each rank writes its shard of the optimizer, in safetensors: DCP's own format pickles
        if optim:
            tensors = _optimizer_tensors(_as_module(what), optim)
            file_numbers = {name: i // TENSORS_A_FILE + 1 for i, name in enumerate(tensors)}
            writer = dcp.HuggingFaceStorageWriter(
                unfinished / "train_state", file_numbers, save_distributed=True
            )
            dcp.save(tensors, storage_writer=writer)
            record["state_tensors"] = len(tensors)  # as many as load_train_state() must find
        # 3. rank 0 writes the rest, and gives the folder its name
        if _rank() == 0:
            unfinished.mkdir(parents=True, exist_ok=True)
            base = base_model("unknown")  # of modules without a backbone
            for name, part in parts.items():
                if isinstance(part, Backbone):
                    part.net.save_pretrained(unfinished, state_dict=states[name])
                    if _adapter_values(part.net):  # the net may hold bf16, what is merged is fp32
                        config = read_json(unfinished / "config.json")
                        write_json(unfinished / "config.json", {**config, "dtype": "float32"})
                    part.tokenizer.save_pretrained(unfinished)
                    part.image_spec.save(unfinished)
                    origin = part.run.get("parent") or run.get("parent") or "unknown"
                    base = part.run.get("base") or base_model(origin)  # older ones name none
                    if part.action_tokenizer is not None:
                        part.action_tokenizer.save(unfinished / "fast")
                else:
                    save_file(states[name], unfinished / f"{name}.safetensors")
            record |= {"base": base, "versions": versions(), "commit": commit()}
            write_json(unfinished / "run.json", record)
            (unfinished / "README.md").write_text(model_card(record), "utf-8")
            _swap_in(unfinished, folder)
    except dcp.api.CheckpointException as e:  # DCP tells all ranks what failed on one
        error = next(iter(e.failures.values()))[0]
    except (OSError, SafetensorError) as e:
        error = e
    # 4. all ranks end together when one has failed
    if all_sum(error is not None):
        if _rank() > 0:
            raise SystemExit(1)  # rank 0 knows, and says it
        shutil.rmtree(unfinished, ignore_errors=True)  # it may fill the disk
        raise ValueError(
            f"{unfinished}: could not be written ({error}); what was saved before is whole: "
            "make room, then --resume"
        )


def add_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """Writes what a finished run was worth into run.json and README.md of its saved checkpoint, on
    rank 0."""
    if _rank() == 0:
        path = folder / "run.json"
        record = {**read_json(path), "metrics": metrics}
        write_json(path, record)
        (folder / "README.md").write_text(model_card(record), "utf-8")


def _swap_in(unfinished, folder):
    """Gives the finished folder its name. At no moment is there none of that name, where the system
    exchanges names (Linux)."""
    for path in [*unfinished.rglob("*"), unfinished]:  # on disk before the name is
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
    old = unfinished.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "renameat2"):  # Linux: both change names in one moment
            names = AT_FDCWD, os.fsencode(unfinished), AT_FDCWD, os.fsencode(folder)
            if libc.renameat2(*names, RENAME_EXCHANGE) == 0:
                shutil.rmtree(unfinished)
                return
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def stop_on_sigterm() -> None:
    """From here on SIGTERM does not end this process: save_step() saves, and ends the run."""
    SIGTERM_CAME.clear()
    signal.signal(signal.SIGTERM, lambda *_: SIGTERM_CAME.set())


def end_on_sigterm() -> None:
    """What was trained is saved: from here on SIGTERM ends this process again; all ranks at once if
    it has come to one of them since the last step."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if all_sum(SIGTERM_CAME.is_set()):
        raise SystemExit(128 + signal.SIGTERM)


def save_step(cfg, step: int, run: dict, write: Callable, unlogged: Sequence[float] = ()) -> None:
    """All ranks call it at the end of each step. Every --save-every steps write(folder, run=...) is
    to save out/step_000123, of which the newest --keep stay; SIGTERM saves too, and ends the
    process. unlogged: this rank's sums that the log goes on from: since its last line, or of the
    whole run."""
    out = Path(cfg.out)
    folder = out / f"step_{step:06d}"
    must_stop = all_sum(SIGTERM_CAME.is_set()) > 0
    is_due = cfg.save_every and step % cfg.save_every == 0
    if must_stop or is_due:
        write(folder, run={**run, "step": step, "unlogged": all_sum(unlogged)})
        if _rank() == 0:
            of_this_run = [path for path in _saved_steps(out) if _step_of(path) <= step]
            surplus = of_this_run[: -cfg.keep] if cfg.keep else []
            for old in surplus:
                old.rename(old.with_suffix(".tmp"))  # one half deleted must not pass for whole
            for unfinished in out.glob("step_*.tmp"):
                shutil.rmtree(unfinished)
    if must_stop:
        if _rank() == 0:
            print(f"SIGTERM: stopped after step {step}, saved {folder}; go on with --resume")
        raise SystemExit(128 + signal.SIGTERM)


def load_train_state(
    folder: Path | None, what, optim: torch.optim.Optimizer
) -> tuple[int, np.ndarray]:
    """Restores the optimizer's tensors of a Backbone or module (or dict of parts, as saved) in
    place, on as many ranks as there are now. The weights come from load(), the learning rate from
    the schedule. folder None: a new run; final/: one that has ended, and needs none of them.
    ValueError when some of them are missing or damaged: they would begin at 0 again.
    -> step, and the sums that the log goes on from."""
    if folder is None:
        return 0, np.zeros(())
    if has_ended(folder):
        return read_run(folder, "step")["step"], np.zeros(())
    if not (folder / "train_state").exists():
        raise FileNotFoundError(f"{folder}: no state to resume; start from the weights with --init")
    run = read_run(folder, "step")
    module = _as_module(what)
    params = dict(module.named_parameters())
    with reading_checkpoint(folder / "train_state"):
        reader = dcp.HuggingFaceStorageReader(folder / "train_state")
        keys = list(reader.read_metadata().state_dict_metadata)
        n_saved = run.get("state_tensors", len(keys))  # checkpoints of before do not say it
        if len(keys) != n_saved:
            raise ValueError(
                f"{folder}/train_state: holds {len(keys)} of {n_saved} tensors; copy the whole "
                "folder again"
            )
        for key in keys:
            name, kind = key.split("/")  # "model.layer.weight/exp_avg"
            p = params[name]
            if kind == "value":  # of an adapter: read into the parameter itself
                continue
            if kind == "step":
                optim.state[p][kind] = torch.zeros((), device=p.device)
            else:
                optim.state[p][kind] = torch.zeros_like(p, requires_grad=False)
        dcp.load(_optimizer_tensors(module, optim), storage_reader=reader)
    unlogged = np.array(run.get("unlogged", 0))
    if _rank() > 0:  # they are sums over all ranks
        unlogged = np.zeros_like(unlogged)
    return run["step"], unlogged


def has_ended(newest: Path | None) -> bool:
    """Whether the checkpoint to resume is that of a run that has ended, of which nothing is left to
    train or to save."""
    return newest is not None and newest.name == "final"


def check_steps(newest: Path | None, start: int, steps: int) -> None:
    """ValueError when the run to resume, which goes on at `start`, is past the steps asked for: its
    weights would be saved as those of a shorter run. And when it has ended before them, and kept
    no optimizer to go on with."""
    if has_ended(newest) and start != steps:
        raise ValueError(
            f"{newest}: the run ended at step {start}, with no step_* of that to go on from; give "
            f"--steps {start}, or start from it by --init in another --out"
        )
    if start > steps:
        raise ValueError(f"{newest}: is past --steps {steps}; give {start} or more")


def checkpoint_to_resume(cfg, may_change: Sequence[str] = ()) -> Path | None:
    """The newest checkpoint if the run is to --resume it. ValueError when it goes on with another
    value of a flag that may not change, or would mix with an older run's files. may_change: fields
    that decide no number of this stage, beside those of MAY_CHANGE_ON_RESUME.

    Of a run that has ended it is final/, unless it kept the step_* of its end or is asked for more
    steps than it had: nothing is trained or saved, and the last evaluation is made again. With
    --lora a ValueError: in final/ the adapters are in the weights."""
    newest = latest_checkpoint(cfg.out)
    final = Path(cfg.out) / "final"
    if not cfg.resume:
        if newest or final.exists():
            raise ValueError(
                f"{cfg.out}: already holds a run; go on with --resume, name another --out, "
                "or delete it"
            )
        return None
    ended_at = read_run(final, "step")["step"] if final.exists() else 0
    kept_its_end = newest is not None and _step_of(newest) >= ended_at
    goes_on = newest is not None and cfg.steps > ended_at  # --steps 0 of sft.py: as --epochs say
    if ended_at and not kept_its_end and not goes_on:
        if getattr(cfg, "lora", 0):
            raise ValueError(
                f"{final}: the run has ended, and its adapters are in the weights; delete it to "
                "train again"
            )
        newest = final
    if newest is None:
        return None
    old_config = read_run(newest, "config")["config"]
    for name, value in asdict(cfg).items():
        if name in MAY_CHANGE_ON_RESUME or name in may_change:
            continue
        flag = "--" + name.replace("_", "-")
        if name not in old_config:
            raise ValueError(f"{newest}: of a version without {flag}; start anew in another --out")
        if old_config[name] != value:
            raise ValueError(
                f"{newest}: was run with another {flag}; resume with {flag} "
                f"{old_config[name]}, or start anew in another --out"
            )
    return newest


def check_unchanged(data: dict[str, dict], newest: Path) -> None:
    """ValueError naming a source that is not what the checkpoint `newest` was trained on: another
    file, or (sft.py) other rows of it, which would come in another order."""
    old = read_json(newest / "run.json").get("data", {})
    for path, record in data.items():
        if path not in old:
            continue
        if old[path]["sha256"] != record["sha256"]:
            raise ValueError(
                f"{path}: has changed since {newest}; put the old one back, or go on with the new "
                "one by --changed-data"
            )
        n_before = old[path].get("train")  # None: not of sft.py
        n_now = record.get("train")
        if None not in (n_before, n_now) and n_before != n_now:
            raise ValueError(
                f"{path}: {n_now} samples to train on, {n_before} before {newest}; resume with its "
                "--max-length, --max-pixels and --too-long, or go on with other samples by "
                "--changed-data"
            )


def _saved_steps(out):
    """The complete checkpoints out/step_000123, oldest first."""
    folders = [path for path in Path(out).glob("step_*") if path.name[5:].isdigit()]
    return sorted(folders, key=_step_of)


def _step_of(folder):
    return int(folder.name.removeprefix("step_"))


def latest_checkpoint(out: str | Path) -> Path | None:
    """The newest complete checkpoint out/step_000123."""
    saved = _saved_steps(out)
    return saved[-1] if saved else None


# ---- Plumbing: model card ------------------------------------------------------------------------

ABOUT = {  # stage -> the hub's word for what such a checkpoint does, and what it is
    "base": ("image-text-to-text", "A vision-language model, trained further on questions."),
    "sft": ("image-text-to-text", "A vision-language model that writes robot actions as tokens."),
    "grpo": ("image-text-to-text", "A vision-language model that thinks, then writes actions."),
    "vla": ("robotics", "A flow-matching action head on a vision-language model."),
}
LOADING = {  # stage -> how to load it; those that are not here as "sft"
    "sft": """import transformers
net = transformers.AutoModelForImageTextToText.from_pretrained("FOLDER")

import model  # of this repository: with prompts and action tokens
backbone = model.load("FOLDER")""",
    "vla": """import vla  # of this repository
policy = vla.Policy.load("FOLDER")
chunk = policy.act(images, "what to do", state)  # (K, A), in the units of the dataset""",
}
CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [robo-align]
{base_lines}---
# RoboAlign, stage {stage}

{about} Trained by an open implementation of RoboAlign
([arXiv 2603.21341](https://arxiv.org/abs/2603.21341)), not by the paper's authors.

| | |
|---|---|
{origin}

```bash
{command}
```

## What it is worth

{metrics}

## How to load it

```python
{loading}
```
"""


@functools.cache
def base_model(name: str) -> dict:
    """Of the folder or hub model that training began from: {"name", "on_hub", "license": what the
    head of its README.md says in lines of that word}."""
    on_hub = name.count("/") == 1 and not Path(name).exists()
    text = ""
    if on_hub or Path(name).is_dir():
        with contextlib.suppress(OSError):  # no card, or no network
            # whatever stands in it, training goes on
            text = Path(cached_file(name, "README.md")).read_text("utf-8", errors="replace")
    head = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^(license\w*): *(.+)$", head[1], re.MULTILINE) if head else []
    return {"name": name, "on_hub": on_hub, "license": dict(lines)}


def model_card(run: dict) -> str:
    """README.md of a checkpoint, from its run.json. The lines between --- are for the hub."""
    base = run["base"]
    # 1. the base, whose licence what is derived from it keeps
    base_lines = [f"base_model: {base['name']}"] if base["on_hub"] else []
    base_lines += [f"{key}: {value}" for key, value in base["license"].items()]
    license_words = ", ".join(base["license"].values()) or "unknown: look before you publish this"
    # 2. where it comes from
    origin = [
        f"| base model | {base['name']} (licence: {license_words}) |",
        f"| trained from | {run.get('parent', 'unknown')} |",
        f"| steps | {run.get('step', 'unknown')} |",
    ]
    if "trained" in run:
        origin.append(f"| trained | {' and '.join(run['trained'])} |")
    for path, source in run.get("data", {}).items():
        if path == run.get("config", {}).get("init"):  # the weights that adapters stand on
            continue
        origin.append(f"| data | {path} (sha256 {source['sha256'][:12]}) |")
    for split in run.get("split", []):
        held_out = f"{split['held_out']} of {split['episodes']} episodes of {split['folder']}"
        origin.append(f"| held out | {held_out} |")
    packages = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    origin.append(f"| code | commit {run['commit']}, {packages} |")
    # 3. what it is worth
    metrics = ["No metrics were taken of it."]
    if run.get("metrics"):
        metrics = ["| held-out metric, at the end of the run | value |", "|---|---|"]
        metrics += [f"| {name} | {value:.4g} |" for name, value in run["metrics"].items()]
    stage = run["stage"]
    task, about = ABOUT[stage]
    return CARD.format(
        task=task,
        base_lines="".join(line + "\n" for line in base_lines),
        stage=stage,
        about=about,
        origin="\n".join(origin),
        command=run.get("command", "unknown"),
        metrics="\n".join(metrics),
        loading=LOADING.get(stage, LOADING["sft"]),
    )


# ---- Plumbing: command line and log --------------------------------------------------------------


def command_line(script: str, argv: Sequence[str] | None) -> str:
    """The command that started this process, torchrun's words among them. argv: as main got it."""
    words = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun sets it
        local, world = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        words = ["torchrun", "--nproc_per_node", str(local)]
        if world > local:
            words += ["--nnodes", str(world // local)]
    return shlex.join([*words, script, *(sys.argv[1:] if argv is None else argv)])


def parse_config(Config: type, PRESETS: dict[str, dict], argv: Sequence[str] | None = None):
    """`[PRESET] [--flag value]` -> Config. The first preset is the default; a flag goes before the
    preset's value, that before the field's. The field `preset` receives its name."""
    parser = config_parser(inspect.getfile(Config))
    given = vars(parser.parse_args(argv))
    return Config(**{**PRESETS[given["preset"]], **given})


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip() or "unknown"


def run_main(main: Callable[[], None], lower: str) -> None:
    """Runs a script; what its user can cure ends the process in one line. When it has ended, its
    process group is destroyed. lower: the flag to lower when a GPU's memory runs out."""
    try:
        main()
        # left to Python's exit, gloo's threads now and then abort the process
        if distributed.is_initialized():
            distributed.destroy_process_group()
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    except torch.OutOfMemoryError as e:
        raise SystemExit(f"error: out of GPU memory; lower {lower} ({str(e)[:80]})") from e
    except RuntimeError as e:
        if "by peer" not in str(e):  # gloo's words: the connection was closed or reset
            raise
        raise SystemExit(f"error: rank {_rank()} ended since another did, which says why") from e


class Log:
    """Rank 0: one aligned line a record on stdout, the same record as JSON in out/log.jsonl. A
    resumed run appends. shown: what the lines hold of a record; empty: all of it."""

    def __init__(self, out: str | Path, cfg, dist: Dist, shown: Sequence[str] = ()):
        self.shown = shown
        self.start = time.time()
        self.file = None  # of other ranks: nothing is written
        if dist.rank == 0:
            Path(out).mkdir(parents=True, exist_ok=True)
            self.file = Path(out) / "log.jsonl"
            on_gpu = dist.device.type == "cuda"
            head = {
                "config": asdict(cfg),
                "commit": commit(),
                **versions(),
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
                "world": dist.world_size,
            }
            self._append(head)

    def _append(self, record):
        with open(self.file, "a") as file:
            file.write(json.dumps(record) + "\n")

    def write(self, **metrics) -> None:
        if self.file is None:
            return
        for name, value in metrics.items():
            if hasattr(value, "item"):  # of numpy or torch
                metrics[name] = float(value)
        self._append({**metrics, "seconds": round(time.time() - self.start, 1)})
        cells = []
        for name, value in metrics.items():
            if self.shown and name not in self.shown:
                continue
            text = f"{value:<9.4g}" if isinstance(value, float) else f"{value!s:<6}"
            cells.append(f"{name} {text}")
        print("  ".join(cells).rstrip(), flush=True)
