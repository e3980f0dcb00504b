"""Stage 1 of RoboAlign (arXiv 2603.21341): fine-tune a multimodal LLM on questions, reasoning and
robot actions written as FAST tokens.

In: a backbone, a mixture of conversations (.jsonl) and episodes (folders), a FAST tokenizer.
Out: a checkpoint that sees, reasons in <think></think> and answers with words or action tokens.
1. grow the vocabulary by the FAST tokens and the two tokens around them
2. draw samples of the mixture: a conversation, or a frame with its instruction -> the FAST tokens
   of the next K actions, with no thought: thoughts reach actions only by transfer
3. pack the rows of a micro-batch one after the other, without padding
4. cross-entropy on the assistant's tokens, divided by their count over all ranks
5. AdamW, warmup, cosine; repeat from 3
Our deviations: the tabletop presets train the vision tower too (it is far too small to freeze);
base and speedrun take Muon in the place of AdamW.
A conversation whose answer is "<answer><ACTION></answer>", with the actions in the row's "chunk"
(K x A, dataset units), is an action sample that may carry a thought; mixture weights set its share.

Reads  --init, --data, --action-tokenizer. Writes runs/sft/{log.jsonl, step_*/, final/}.
torchrun --nproc_per_node 2 sft.py                     # tabletop; 15 minutes on 2 CPU cores
torchrun --nproc_per_node 2 sft.py speedrun --data D   # D as in speedrun.sh; 23 minutes, sampled
                                         # r_a 0.16 [0.15, 0.18]
torchrun --nproc_per_node 8 sft.py paper --action-tokenizer fast/   # on PAPER_MIXTURE; 17.8K steps,
                                         # 30 h on the authors' 8 H200s; not run here at full size

To read first: Config, "The idea", main. "Data" and "Evaluation" can wait.
"""

import bisect
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fast_tokenizer import (
    BelowOne,
    Count,
    FastTokenizer,
    Natural,
    NonNegative,
    Positive,
    Share,
    answer_help,
    join_splits,
    warn_of_other_split,
)

if __name__ == "__main__":
    answer_help(__file__)  # --help need not wait for torch

import torch
from transformers import AddedToken

import model
from model import (
    EpisodeDataset,
    Outline,
    Sample,
    all_sum,
    answer_text,
    encode_sample,
    evenly_spaced,
    first_question,
    mixture_shares,
    open_sources,
    parse_mixture,
    token_loss,
)

# ---- Config --------------------------------------------------------------------------------------

TABLETOP = "data/tabletop/conversations.jsonl:1,data/tabletop/episodes:3"
PAPER_MIXTURE = """
    data/paper/llava_onevision.jsonl#100000, data/paper/refspatial.jsonl#300000,
    data/paper/robopoint.jsonl#200000, data/paper/egoplan_it.jsonl#50000,
    data/paper/multi_view.jsonl#500000, data/paper/sharerobot.jsonl#100000,
    data/paper/robotvqa.jsonl#100000, data/paper/roboalign_vqa.jsonl#150000,
    data/paper/bridge_droid_qa.jsonl#300000, data/paper/reasoning.jsonl#76000,
    data/bridge#400000
"""
TOO_LONG = ("error", "skip", "shrink")  # what --too-long takes
MAY_CHANGE_ON_RESUME = ["max_new_tokens"]  # of evaluations alone, unlike in grpo.py


@dataclass(frozen=True)
class Config:
    preset: str = ""

    # what is trained
    init: str = "assets/tiny-vlm"  # checkpoint folder or hub name
    freeze_vision: bool = False  # keep the vision tower and its projector as they are
    lora: Natural = 0  # rank of adapters that train in place of the weights; 0: the weights train
    lora_alpha: Positive = 32.0  # adapters count alpha / rank
    lora_targets: str = ""  # linear layers of the LLM to adapt, as q_proj,v_proj; empty: all
    bf16_base: bool = False  # with --lora: what is frozen is kept in bf16, in half the memory

    # data
    data: str = TABLETOP  # path:weight,... (relative shares) or path#samples,... (in an epoch)
    action_tokenizer: str = ""  # FAST tokenizer folder; empty: the one inside --init, if any
    max_length: Count = 1024  # tokens of a row
    too_long: str = "error"  # longer rows: error, skip, or shrink (images; skip what is still long)
    max_pixels: Natural = 0  # larger images are shrunk to so many pixels; 0: as the backbone says
    outside_images: bool = False  # images of a .jsonl may lie outside its folder
    holdout_rows: Natural = 256  # rows of each .jsonl kept for evaluation, the last; of episodes 5%

    # schedule
    seed: Natural = 0  # order of the samples
    steps: Natural = 0  # optimizer steps; 0: from --epochs
    epochs: Positive = 1.0  # one: as many samples as --data says by #, else as there are rows
    batch: Count = 24  # samples a step, over all ranks

    # optimizer
    lr: Positive = 6e-4  # peak learning rate
    warmup_ratio: Share = 0.03  # share of the steps
    beta1: BelowOne = 0.9  # AdamW
    beta2: BelowOne = 0.98  # AdamW
    weight_decay: NonNegative = 0.01  # AdamW, not on norms and biases
    max_grad_norm: NonNegative = 1.0  # gradient norm; 0: no clipping
    muon: bool = False  # inner matrices by orthogonalised momentum (Muon) instead of AdamW

    # memory: the results are the same up to rounding
    micro_batch: Natural = 0  # samples a forward on one rank; 0: all of its share
    recompute: bool = False  # activation checkpointing: less memory, a third more time
    shards: Natural = 0  # ranks that share a copy of the weights, more nodes mirror it; 0: all

    # does not affect results
    out: str = "runs/sft"  # run folder
    timeout_hours: Positive = 6.0  # ranks wait so long for the slowest, as when it downloads
    resume: bool = False  # continue from the newest step_* in --out
    log_every: Count = 20  # steps
    eval_every: Natural = 500  # steps; 0: only at the end
    eval_rows: Natural = 128  # held-out rows of each source in one evaluation
    probe_prompts: Natural = 64  # held-out action prompts, 4 thoughts each, at the end; 0: none
    max_new_tokens: Count = 96  # longest answer in an evaluation, as in GRPO
    cuda_graphs: bool = True  # on a GPU, replay the sampler's steps as CUDA graphs
    loader_threads: Count = 2  # of each rank, which read images and tokenize
    changed_data: bool = False  # --resume although --data, or --init of --lora, has changed
    save_every: Natural = 1000  # steps; 0: only at the end
    keep: Natural = 0  # newest checkpoints step_* that stay; 0: all


PRESETS = {
    "tabletop": {"action_tokenizer": "runs/fast", "steps": 4000},
    "speedrun": {
        "action_tokenizer": "runs/fast",
        "steps": 4800,
        "lr": 2e-3,
        "muon": True,
        "shards": 1,  # a tenth less CPU time
        "eval_every": 0,
        "save_every": 0,
    },
    "base": {
        "init": "runs/tiny-vlm",
        "data": "data/base/conversations.jsonl",
        "out": "runs/base",
        "steps": 16000,
        "batch": 48,
        "lr": 2e-3,
        "muon": True,
        "holdout_rows": 4000,
        "probe_prompts": 0,
    },
    "paper": {
        "init": "Qwen/Qwen2.5-VL-7B-Instruct",
        "data": PAPER_MIXTURE,
        "out": "runs/sft-paper",
        "lr": 2e-5,
        "beta2": 0.999,
        "batch": 128,
        "micro_batch": 2,
        "max_length": 4096,
        "too_long": "shrink",
        "max_pixels": 1280 * 28 * 28,  # 1,280 tokens of Qwen2.5-VL; 3.2 megapixels would be 4,096
        "max_new_tokens": 2048,
        "freeze_vision": True,
        "recompute": True,
        "loader_threads": 8,
        "keep": 2,
    },
}

# ---- Data ----------------------------------------------------------------------------------------


def load_row(backbone: model.Backbone, source, i: int, max_length: int) -> model.Row:
    """Sample i of a source, tokenized; "sample_id" says where it comes from. ValueError naming that
    when the row is malformed or longer than max_length tokens."""
    sample = source[i]
    row = encode_sample(backbone, sample)
    if len(row["ids"]) > max_length:
        raise ValueError(
            f"{sample.sample_id}: {len(row['ids'])} tokens; raise --max-length {max_length} or "
            "shorten the row"
        )
    row["sample_id"] = sample.sample_id
    return row


# ---- Data: all rows are checked before the first step --------------------------------------------

HEADER_THREADS = 8  # threads that open images at once
ROWS_A_TASK = 256  # rows that a thread looks at before it tells how far it is
TURN_TOKENS = 16  # at most, around the text of a message: "<|im_start|>assistant\n", "<|im_end|>\n"
NEVER_FITS = -1  # in RowSize.max_pixels


class RowSize(NamedTuple):
    """How long a row is, as the sizes of its images tell."""

    tokens: int  # exactly when it is near max_length or over it, else roughly
    max_pixels: int  # of each image, for the row to keep to max_length; 0: as they are; NEVER_FITS


def image_tokens(spec: model.ImageSpec, height: int, width: int) -> int:
    """Tokens of an image of so many pixels."""
    _, rows, columns = model.image_grid(height, width, spec)  # of patches
    return rows * columns // spec.merge**2


def row_size(backbone: model.Backbone, outline: Outline, max_length: int) -> RowSize:
    """How long a row is. ValueError when its tags and images disagree, or it cannot be encoded."""
    messages, image_sizes = outline
    spec = backbone.image_spec
    model.check_messages(messages, len(image_sizes))

    def tokens_of_images(of_spec):
        return sum(image_tokens(of_spec, *size) for size in image_sizes)

    # 1. no token is shorter than a byte, so that most rows need not be tokenized
    text_bytes = 0
    for message in messages:
        text = message["content"]
        longest = 1 if text.isascii() else 3  # Unicode normalisation may lengthen it so much
        text_bytes += longest * len(text.encode()) + TURN_TOKENS
    text_bytes += len(model.SYSTEM_PROMPT) + TURN_TOKENS
    if text_bytes + tokens_of_images(spec) <= max_length:
        return RowSize(text_bytes // 4 + tokens_of_images(spec), 0)  # English: 4 bytes a token

    # 2. the others are, with blank images
    unit = spec.patch * spec.merge  # pixels of a token's side
    blanks = [np.zeros((unit, unit, 3), np.uint8)] * len(image_sizes)
    blank_tokens = len(blanks) * image_tokens(spec, unit, unit)
    text_tokens = len(model.encode(backbone, messages, blanks)["ids"]) - blank_tokens
    tokens = text_tokens + tokens_of_images(spec)
    if tokens <= max_length:
        return RowSize(tokens, 0)

    # 3. too long: how many tokens may each image have at most?
    def tokens_bounded(per_image):
        return tokens_of_images(spec.bounded(per_image * unit**2))

    if not blanks:
        return RowSize(tokens, NEVER_FITS)
    choices = range(1, spec.max_pixels // unit**2 + 1)
    room = max_length - text_tokens
    # the choices are 1, 2, 3, ...: how many of them fit is the largest that fits
    largest = bisect.bisect_right(choices, room, key=tokens_bounded)
    return RowSize(tokens, largest * unit**2 if largest else NEVER_FITS)


def measure_rows(backbone: model.Backbone, source, max_length: int, dist: model.Dist) -> np.ndarray:
    """Looks at all of a source as training will see it, but for pixels: of images the headers.
    -> its RowSizes (units, 2). ValueError naming a row that cannot be used. Each rank looks at its
    share, and all get the same numbers."""
    sizes = np.zeros((source.units, 2))
    local_units = range(dist.rank, source.units, dist.world_size)
    tasks = [local_units[k : k + ROWS_A_TASK] for k in range(0, len(local_units), ROWS_A_TASK)]

    def measure(units):
        for unit in units:
            outline = source.outline(unit)
            try:
                sizes[unit] = row_size(backbone, outline, max_length)
            except ValueError as e:
                raise ValueError(f"{source.sample_id(unit)}: {e}") from e
        return len(units)

    is_quiet = None if dist.rank == 0 else True  # None: quiet unless on a terminal
    bar = tqdm(desc=f"checking {source.path}", total=len(local_units), disable=is_quiet)
    error = None
    with bar, ThreadPoolExecutor(HEADER_THREADS) as pool:
        try:
            for n_measured in pool.map(measure, tasks):
                bar.update(n_measured)
        except ValueError as e:
            error = e
    if all_sum(error is not None):
        if error is None:
            raise SystemExit(1)  # the rank that knows says it
        raise error
    return np.reshape(all_sum(sizes.ravel().tolist()), sizes.shape)


def check_rows(backbone: model.Backbone, source, cfg: Config, dist: model.Dist) -> dict:
    """Checks all of a source, and does with rows over cfg.max_length tokens what --too-long says;
    rank 0 tells how many there are. All ranks come to the same rows.

    Sets source.tokens (units,) and source.max_pixels, takes indices from source.train and
    source.held. -> what run.json says of the source."""
    sizes = measure_rows(backbone, source, cfg.max_length, dist)
    source.tokens, max_pixels = sizes.T
    too_long = np.flatnonzero(source.tokens > cfg.max_length).tolist()
    left_out = set()
    for unit in too_long:
        if cfg.too_long == "shrink" and max_pixels[unit] != NEVER_FITS:
            source.max_pixels[unit] = int(max_pixels[unit])
        else:
            left_out.add(unit)
    if too_long:
        first = too_long[0]
        text = (
            f"{source.sample_id(first)}: {source.tokens[first]:.0f} tokens, and {len(too_long) - 1}"
            f" more over --max-length {cfg.max_length}"
        )
        if cfg.too_long == "error":
            raise ValueError(f"{text}; raise it, or --too-long skip or shrink")
        if dist.rank == 0:
            n_shrunk = len(source.max_pixels)
            print(f"{text}: {n_shrunk} with smaller images, {len(left_out)} left out", flush=True)
    if left_out:
        source.train = [i for i in source.train if source.unit(i) not in left_out]
        source.held = [i for i in source.held if source.unit(i) not in left_out]
        if not source.train:
            raise ValueError(
                f"{source.path}: nothing is left to train on; raise --max-length {cfg.max_length}"
            )
    return {
        "sha256": source.fingerprint,
        "train": len(source.train),
        "held_out": len(source.held),
        "shrunk": len(source.max_pixels),
        "left_out": len(left_out),
    }


# ---- The idea: new words, packed rows; their loss is model.token_loss() --------------------------


@torch.no_grad()
def grow_vocabulary(backbone: model.Backbone, n_fast: int) -> None:
    """Adds the two tokens around actions and n_fast FAST tokens in place, each once; call it before
    shard(). Embeddings grow only where the (padded) table has no row left; they never shrink and
    stay tied. New rows: the mean of the old ones plus a tenth of their spread, so that no two
    tokens are alike."""
    net = backbone.net
    tokenizer = backbone.tokenizer

    # 1. the words that the tokenizer does not know yet
    n_old = len(tokenizer)
    known = tokenizer.get_vocab()
    words = [model.ACTION_START, model.ACTION_END]
    words += [model.fast_token(i) for i in range(n_fast)]
    new_words = []
    for word in words:
        if word not in known:  # not special: decoding without special tokens must keep actions
            new_words.append(AddedToken(word, special=False, normalized=False))
    if tokenizer.add_tokens(new_words) == 0:
        return

    # 2. rows of the tables for them: those up to n_new are filled anew
    n_new = len(tokenizer)
    if n_new > len(net.get_input_embeddings().weight):
        net.resize_token_embeddings(n_new, pad_to_multiple_of=64, mean_resizing=False)
        n_new = len(net.get_input_embeddings().weight)  # with the padding

    # 3. their values
    noise = torch.Generator().manual_seed(0)
    tables = [net.get_input_embeddings().weight, net.get_output_embeddings().weight]  # (V, D) each
    for table in dict.fromkeys(tables):  # one when they are tied
        mean = table[:n_old].mean(0)  # (D,)
        std = table[:n_old].std(0)  # (D,)
        drawn = torch.randn(n_new - n_old, table.shape[1], generator=noise).to(table)
        table[n_old:n_new] = mean + 0.1 * std * drawn
    backbone.vocab = model.Vocabulary.read(net, tokenizer)


def pack(rows: list[model.Row]) -> model.Batch:
    """Rows one after the other in a single sequence: what training uses, as rows differ much in
    length and padding would cost as much as tokens. -> a batch as of model.collate() with B = 1,
    and the lengths of its rows. Of three rows a, b, c of 4, 2 and 3 tokens, T = 9:

        ids        a0 a1 a2 a3 b0 b1 c0 c1 c2
        positions   0  1  2  3  0  1  0  1  2    each row counts from 0
        target      .  .  x  x  .  x  .  .  x    the assistant's tokens
        lengths    [4, 2, 3]

    By the lengths model.hidden_states() lets no row look at another: b1 sees b0 and b1. And
    token_loss() never asks a3 for b0: what opens a row is no target."""
    joined = {}
    for key in ("ids", "target", "positions"):
        joined[key] = np.concatenate([row[key] for row in rows], -1)  # (T,), (T,), (3, T)
    batch = model.collate([joined], pad_id=0, images=rows)  # nothing is padded
    batch["lengths"] = [len(row["ids"]) for row in rows]
    batch["sample_id"] = [row.get("sample_id", "") for row in rows]
    return batch


# ---- Schedule: which samples, and when -----------------------------------------------------------


def sample_order(
    sizes: list[int], weights: list[float], n_samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """-> (source (N,), row (N,)) of the N samples of a run. Sources are drawn by weight; each is
    shuffled anew once all its rows were seen. A function of the seed, and a longer run begins like
    a shorter one, so that resuming needs no state."""
    p = np.asarray(weights, float) / sum(weights)
    source = model.rng(seed, "mixture").choice(len(sizes), n_samples, p=p)  # (N,)
    row = np.empty(n_samples, np.int64)
    for s, size in enumerate(sizes):
        indices = np.flatnonzero(source == s)  # when this source is drawn
        n_passes = math.ceil(len(indices) / size)
        passes = [model.rng(seed, s, k).permutation(size) for k in range(n_passes)]
        if passes:
            row[indices] = np.concatenate(passes)[: len(indices)]
    return source, row


def load_batches(
    pool: ThreadPoolExecutor,
    backbone: model.Backbone,
    sources: list,
    picks: np.ndarray,
    cfg: Config,
    dist: model.Dist,
) -> list[Future]:
    """This rank's share of the samples `picks` (batch, 2) of (source, row): a packed batch for each
    micro-batch. Each rank gets equally many samples; they are dealt out by length, as all wait for
    the one with the most tokens. Of six samples of 9, 2, 7, 3, 8 and 4 tokens on two ranks:

        by length   2 3 4 7 8 9
        rank 0      2   4   8      14 tokens;  --micro-batch 2: packs of 2 4 and of 8
        rank 1        3   7   9    19                                    3 7        9

    Which thread loads a row does not matter for what is in a batch."""

    def length(sample):  # as check_rows() has measured it; of an episode's frame the episode's
        source, i = sample
        return source.tokens[source.unit(i)]

    def pack_loaded(loading):
        return pack([future.result() for future in loading])

    # 1. the samples, by length
    samples = []  # (source, index)
    for s, row in picks.tolist():
        samples.append((sources[s], sources[s].train[row]))
    samples.sort(key=length)
    # 2. this rank's are loaded, each as a task of the pool
    loading = []
    for source, i in samples[dist.rank :: dist.world_size]:
        loading.append(pool.submit(load_row, backbone, source, i, cfg.max_length))
    # 3. and packed. A task that packs waits for such as load. The pool begins tasks in their order,
    # so all of these have begun before it: threads that wait never keep them from a thread.
    batches = []
    n = cfg.micro_batch or len(loading)
    for first in range(0, len(loading), n):
        batches.append(pool.submit(pack_loaded, loading[first : first + n]))
    return batches


def prefetch(
    load: Callable[[int], list[Future]], start: int, steps: int, ahead: int = 2
) -> Iterator[tuple[int, list[model.Batch]]]:
    """(step, its micro-batches) of each step, while those of the next ones are loaded."""
    pending = deque()
    for step in range(start, min(start + ahead, steps)):
        pending.append(load(step))
    for step in range(start, steps):
        batches = [future.result() for future in pending.popleft()]
        if step + ahead < steps:
            pending.append(load(step + ahead))
        yield step, batches


def set_gradient_sync(net: torch.nn.Module, last: bool) -> None:
    """Call before each micro-batch. A small sharded model gathers and reduces once a step; a large
    one has no memory for that and does so for each micro-batch."""
    if model.fsdp_modules(net) == [net]:  # a small model is one unit, see model.fsdp_units()
        net.set_requires_gradient_sync(last)
        net.set_reshard_after_backward(last)


# ---- Evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    backbone: model.Backbone, sources: list, cfg: Config, dist: model.Dist
) -> dict[str, float]:
    """Held-out token loss and accuracy of each source, greedy accuracy of each kind of question."""
    metrics = {}
    backbone.net.eval()
    for source in sources:
        loss, tokens, correct = held_out_sums(backbone, source, cfg, dist)
        if not tokens:  # nothing is held out, or asked for
            continue
        metrics[f"{source.name}_loss"] = loss / tokens
        metrics[f"{source.name}_token_accuracy"] = correct / tokens
    metrics |= greedy_accuracy(backbone, sources, cfg, dist)
    backbone.net.train()
    return metrics


def held_out_sums(backbone, source, cfg, dist) -> list[float]:
    """model.TokenSums of a source's held-out rows, over all ranks."""
    held = evenly_spaced(source.held, cfg.eval_rows)
    local_held = held[dist.rank :: dist.world_size]
    most = math.ceil(len(held) / dist.world_size)  # rows on the rank that has the most
    n = cfg.micro_batch or 16
    sums = np.zeros(3)
    for k in range(0, most, n):  # as many forwards on each rank: sharded weights are gathered
        indices = local_held[k : k + n]
        rows = [load_row(backbone, source, i, cfg.max_length) for i in indices or held[:1]]
        batch = model.to_device(pack(rows), dist.device)
        if not indices:  # this rank has no rows left; it goes along with one that does not count
            batch["target"] = torch.zeros_like(batch["target"])
        sums += [x.item() for x in token_loss(backbone.net, batch)]
    return all_sum(sums.tolist())


class GreedyAnswer(NamedTuple):
    text: str  # what stands in <answer></answer>, else all
    truncated: bool  # cut off by the limit of tokens


def greedy_answers(
    backbone: model.Backbone,
    samples: list[Sample],
    max_new_tokens: int,
    size: int = 64,
    cuda_graphs: bool = True,
) -> list[GreedyAnswer]:
    """Greedy answers to the first question of each sample; `size` of them at once."""
    answers = []
    for k in range(0, len(samples), size):
        rows = []
        for sample in samples[k : k + size]:
            rows.append(encode_sample(backbone, first_question(sample), prompt_only=True))
        generated = model.generate(
            backbone,
            rows,
            max_new_tokens=max_new_tokens,
            greedy=True,
            cuda_graphs=cuda_graphs,
        )
        for ids in generated["ids"].tolist():
            text = backbone.tokenizer.decode(ids, skip_special_tokens=True)
            answers.append(GreedyAnswer(answer_text(text), backbone.vocab.eos not in ids))
    return answers


def greedy_accuracy(backbone, sources, cfg, dist) -> dict[str, float]:
    """Exact-match accuracy of greedy answers to held-out single-turn rows, by their "kind"; and
    greedy_truncated, the share cut off at cfg.max_new_tokens."""
    samples = []
    for source in sources:
        for i in evenly_spaced(source.held, cfg.eval_rows):
            sample = source[i]
            roles = [message["role"] for message in sample.messages]
            if sample.kind and roles == ["user", "assistant"]:
                samples.append(sample)
    if not samples:
        return {}
    kinds = sorted({sample.kind for sample in samples})
    local_samples = samples[dist.rank :: dist.world_size]
    with model.unsharded(backbone.net):
        answers = greedy_answers(
            backbone, local_samples, cfg.max_new_tokens, cuda_graphs=cfg.cuda_graphs
        )

    n_truncated = all_sum(sum(answer.truncated for answer in answers))
    sums = np.zeros((len(kinds), 2))  # right answers, answers
    for sample, answer in zip(local_samples, answers, strict=True):
        kind = kinds.index(sample.kind)
        if answer.text == answer_text(sample.messages[1]["content"]):
            sums[kind, 0] += 1
        sums[kind, 1] += 1
    accuracy = {"greedy_truncated": n_truncated / len(samples)}
    for kind, (n_right, n) in zip(kinds, all_sum(sums.tolist()), strict=True):
        accuracy[f"greedy_{kind}"] = n_right / n
    return accuracy


def thinking_rollouts(backbone, sources, cfg, dist, n: int = 4) -> dict[str, float]:
    """What RL will start from: n thinking rollouts on each of some held-out action prompts, which
    SFT never showed. -> probe_format (share well formed, with a thought), probe_r_a (mean prefix
    reward, paper section 3, here also of malformed answers), probe_truncated (share cut off at
    cfg.max_new_tokens, which is not well formed), and how many of the n thoughts and actions
    differ: if they are all alike RL has no signal (Table 1 of the paper)."""
    # 1. the prompts, and this rank's share of them
    prompts = []
    for source in sources:
        if isinstance(source, EpisodeDataset):
            prompts += [(source, i) for i in source.held]
    prompts = evenly_spaced(prompts, cfg.probe_prompts)
    if not prompts:
        return {}
    keys = range(dist.rank, len(prompts), dist.world_size)
    local_prompts = [prompts[key] for key in keys]

    # 2. the rollouts
    with model.unsharded(backbone.net):
        rows = []
        for source, i in local_prompts:
            question = source.question(i, think=True)
            rows.append(encode_sample(backbone, question, prompt_only=True))
        generated = model.generate(
            backbone,
            rows,
            n=n,
            max_new_tokens=cfg.max_new_tokens,
            seed=cfg.seed,
            keys=keys,
            cuda_graphs=cfg.cuda_graphs,
        )

    # 3. what they are worth
    sums = np.zeros(5)  # well-formed ones, rewards, cut off, different thoughts and actions
    for b, (source, i) in enumerate(local_prompts):
        target_ids = source.target_ids(i)
        n_good = 0
        n_truncated = 0
        rewards = []
        thoughts = set()
        actions = set()
        for g, ids in enumerate(generated["ids"][b * n : (b + 1) * n]):
            text = backbone.tokenizer.decode(ids, skip_special_tokens=True)
            well_formed, has_thought, action_ids = model.parse_actions(backbone, ids)
            if well_formed and has_thought:
                n_good += 1
            n_truncated += backbone.vocab.eos not in ids
            rewards.append(model.prefix_reward(action_ids, target_ids))
            thoughts.add(text.split("</think>")[0])
            actions.add(tuple(action_ids))
            if dist.rank == 0 and b == 0 and g == 0:
                print(f"a thinking rollout: {text}", flush=True)
        sums += [n_good, sum(rewards), n_truncated, len(thoughts), len(actions)]
    n_good, reward, n_truncated, n_thoughts, n_actions = all_sum(sums.tolist())
    return {
        "probe_format": n_good / (len(prompts) * n),
        "probe_r_a": reward / (len(prompts) * n),
        "probe_truncated": n_truncated / (len(prompts) * n),
        "probe_distinct_thoughts": n_thoughts / len(prompts),
        "probe_distinct_actions": n_actions / len(prompts),
    }


# ---- Main ----------------------------------------------------------------------------------------


def check_config(cfg: Config) -> None:
    """ValueError naming a flag that has no such value, or does not go with another."""
    if cfg.too_long not in TOO_LONG:
        raise ValueError(f"--too-long {cfg.too_long}: give one of {', '.join(TOO_LONG)}")
    if cfg.steps and cfg.epochs != Config.epochs:
        raise ValueError(
            f"--epochs {cfg.epochs} --steps {cfg.steps}: the steps count, not the epochs; give "
            "--steps 0 too, or leave --epochs out"
        )
    if cfg.muon and cfg.lora:
        raise ValueError("--muon --lora: Muon is for whole matrices; give --no-muon")


def load_backbone(cfg: Config, newest: Path | None, device: torch.device) -> model.Backbone:
    """The model of --init, or of the checkpoint to resume, with its vocabulary grown and with what
    --freeze-vision, --recompute and --lora ask for. Adapters stand on --init also after --resume:
    load_train_state() restores them."""
    action_tokenizer = None
    if newest and (newest / "fast").exists():  # a checkpoint holds its own
        action_tokenizer = FastTokenizer.load(newest / "fast")
    elif cfg.action_tokenizer and newest is None:
        action_tokenizer = FastTokenizer.load(cfg.action_tokenizer)
    weights = cfg.init
    if newest and not cfg.lora:
        weights = newest
    backbone = model.load(
        weights,
        device,
        stages=("base", "sft"),
        seed=cfg.seed,
        max_pixels=cfg.max_pixels,
    )
    if action_tokenizer is not None:
        backbone.action_tokenizer = action_tokenizer
    if backbone.action_tokenizer is not None:
        grow_vocabulary(backbone, backbone.action_tokenizer.vocab_size)
    if cfg.freeze_vision:
        backbone.net.model.visual.requires_grad_(False)
    if cfg.lora:
        model.add_adapters(backbone.net, cfg, action_rows(backbone.vocab))
    if cfg.recompute:
        model.recompute_activations(backbone.net)
    return backbone


def action_rows(vocab: model.Vocabulary) -> list[int]:
    """Tokens that no published model knows, whose rows train fully under --lora; none where there
    are no actions."""
    if vocab.action_start is None:
        return []
    return [vocab.action_start, vocab.action_end, *vocab.fast]


class StepInfo(NamedTuple):
    micro_sums: list[list[float]]  # model.TokenSums of each micro-batch of this rank
    num_tokens: int  # in all rows of this rank, prompts and images too
    grad_norm: float  # before clipping


def train_step(net, optim, batches: list[model.Batch], step: int, lr: float, cfg, dist) -> StepInfo:
    """One optimizer step on this rank's micro-batches; all ranks call it."""
    stop_if_not_finite = functools.partial(
        model.stop_if_not_finite, cfg.out, f"step {step + 1}", dist, batches
    )
    # 4. cross-entropy, divided by the count of tokens of all micro-batches and ranks
    local_tokens = sum(int(batch["target"][:, 1:].sum()) for batch in batches)
    tokens = all_sum(local_tokens)
    micro_sums = []
    for k, batch in enumerate(batches):
        set_gradient_sync(net, last=k == len(batches) - 1)
        sums = token_loss(net, model.to_device(batch, dist.device))
        loss = sums.loss * dist.world_size / tokens  # FSDP averages gradients over the ranks
        loss.backward()
        stop_if_not_finite("loss", sums.loss.item())
        micro_sums.append([x.item() for x in sums])

    # 5. AdamW
    for group in optim.param_groups:
        group["lr"] = lr
    grad_norm = model.clip_gradients(net.parameters(), cfg.max_grad_norm)
    stop_if_not_finite("gradient norm", grad_norm)
    optim.step()
    optim.zero_grad()
    num_tokens = sum(int(batch["mask"].sum()) for batch in batches)
    return StepInfo(micro_sums, num_tokens, grad_norm)


def main(argv: list[str] | None = None) -> None:
    cfg = model.parse_config(Config, PRESETS, argv)
    check_config(cfg)
    model.keep_freed_memory()
    dist = model.setup(cfg.seed, cfg.shards, cfg.batch, cfg.timeout_hours)
    model.check_adapters(cfg, dist)

    # 1. the backbone, its vocabulary grown, its data, and its optimizer
    mixture = parse_mixture(cfg.data)
    newest = model.checkpoint_to_resume(cfg, MAY_CHANGE_ON_RESUME)
    backbone = load_backbone(cfg, newest, dist.build)
    sources = open_sources(mixture, backbone.action_tokenizer, cfg.holdout_rows, cfg.outside_images)
    data = {}  # what run.json says of it
    for source in sources:
        data[str(source.path)] = check_rows(backbone, source, cfg, dist)
    if cfg.lora:
        data[cfg.init] = {"sha256": model.frozen_sha256(backbone.net)}
    if newest and not cfg.changed_data:
        model.check_unchanged(data, newest)
    splits = [source.split for source in sources if isinstance(source, EpisodeDataset)]
    if dist.rank == 0:
        warn_of_other_split(backbone.run.get("split", []), splits)
    net = model.shard(backbone.net, dist)
    net.train()
    optim = model.make_optimizer(net, cfg.lr, cfg.weight_decay, (cfg.beta1, cfg.beta2), cfg.muon)
    start, saved = model.load_train_state(newest, net, optim)
    unlogged = np.zeros(3)  # model.TokenSums since the last line of the log
    num_tokens = 0.0  # so far, of this rank; of all where rank 0 resumes
    if saved.ndim:
        unlogged, num_tokens = saved[:3], float(saved[3:].sum())

    # 2. the samples of the whole run, in order
    sizes = [len(source.train) for source in sources]
    weights, epoch_samples = mixture_shares(mixture, sizes)
    steps = cfg.steps or math.ceil(cfg.epochs * epoch_samples / cfg.batch)
    model.check_steps(newest, start, steps)
    order = np.stack(sample_order(sizes, weights, steps * cfg.batch, cfg.seed), 1)  # (N, 2)

    run = {
        "stage": "sft" if backbone.action_tokenizer else "base",
        "config": asdict(cfg),
        "parent": cfg.init,
        "command": model.command_line("sft.py", argv),
        "data": data,
        "split": join_splits(backbone.run.get("split", []), splits),
    }
    save = functools.partial(model.save, what=backbone, optim=optim)
    model.stop_on_sigterm()
    log = model.Log(cfg.out, cfg, dist)
    timed_step = start  # samples_per_s counts from it, and from clock, when it ended
    clock = time.perf_counter()
    with ThreadPoolExecutor(cfg.loader_threads) as pool:
        # 3. rows, packed into micro-batches
        def load_step(step):
            picks = order[step * cfg.batch : (step + 1) * cfg.batch]  # (batch, 2)
            return load_batches(pool, backbone, sources, picks, cfg, dist)

        for step, batches in prefetch(load_step, start, steps):
            # 4. and 5. their loss, and an optimizer step
            lr = model.learning_rate(step, steps, cfg.lr, cfg.warmup_ratio)
            info = train_step(net, optim, batches, step, lr, cfg, dist)
            for sums in info.micro_sums:
                unlogged += sums
            num_tokens += info.num_tokens
            done = step + 1
            if done % cfg.log_every == 0 or done == steps:
                loss, tokens, correct, all_tokens = all_sum([*unlogged.tolist(), num_tokens])
                seconds = time.perf_counter() - clock
                log.write(
                    step=done,
                    loss=loss / tokens,
                    token_accuracy=correct / tokens,
                    grad_norm=info.grad_norm,
                    lr=lr,
                    samples_per_s=cfg.batch * (done - timed_step) / seconds,
                    num_tokens=int(all_tokens),
                )
                timed_step = done
                clock = time.perf_counter()
                unlogged = np.zeros(3)
            if cfg.eval_every and done % cfg.eval_every == 0 and done < steps:
                log.write(step=done, **evaluate(backbone, sources, cfg, dist))
                timed_step = done
                clock = time.perf_counter()
            model.save_step(cfg, done, run, save, [*unlogged.tolist(), num_tokens])

    # what was trained is on disk before the last evaluation, which may fail or be killed
    final = Path(cfg.out) / "final"
    if not model.has_ended(newest):
        model.save(final, backbone, {**run, "step": steps})
    model.end_on_sigterm()
    metrics = evaluate(backbone, sources, cfg, dist)
    metrics |= thinking_rollouts(backbone, sources, cfg, dist)
    log.write(step=steps, **metrics)
    model.add_metrics(final, metrics)


if __name__ == "__main__":
    model.run_main(main, "--micro-batch")
