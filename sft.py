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
Our deviations: the tabletop presets train the vision tower too (it is far too small to freeze).
A conversation whose answer is "<answer><ACTION></answer>", with the actions in the row's "chunk"
(K x A, dataset units), is an action sample that may carry a thought; mixture weights set its share.

Reads  --init, --data, --action-tokenizer. Writes runs/sft/{log.jsonl, step_*/, final/}.
torchrun --nproc_per_node 2 sft.py                     # tabletop; 15 minutes on 2 CPU cores
torchrun --nproc_per_node 2 sft.py speedrun --data D   # D as in speedrun.sh; 6 minutes, r_a 0.27
torchrun --nproc_per_node 8 sft.py paper --data vqa.jsonl,bridge/ --action-tokenizer fast/
                                         # 30 h on the authors' 8 H200s; not run here at full size

To read first: Config, "The idea", main. "Data" and "Evaluation" can wait.
"""

import functools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fast_tokenizer import (
    Count,
    FastTokenizer,
    Natural,
    NonNegative,
    Positive,
    Share,
    action_chunks,
    answer_help,
    chunk_ends,
    locate_step,
    read_episodes,
    read_image,
    split_episodes,
)

if __name__ == "__main__":
    answer_help(__file__)  # --help need not wait for torch

import torch
import torch.nn.functional as F
from transformers import AddedToken

import model
from model import all_sum

# ---- Config --------------------------------------------------------------------------------------

TABLETOP = "data/tabletop/conversations.jsonl:1,data/tabletop/episodes:3"


@dataclass(frozen=True)
class Config:
    preset: str = ""

    # what is trained
    init: str = "assets/tiny-vlm"  # checkpoint folder or hub name
    freeze_vision: bool = False  # keep the vision tower and its projector as they are

    # data
    data: str = TABLETOP  # path:weight,...: relative share of samples; no weight: number of rows
    action_tokenizer: str = ""  # FAST tokenizer folder; empty: the one inside --init, if any
    max_length: Count = 1024  # tokens; a longer row is an error
    max_pixels: Natural = 0  # larger images are shrunk to so many pixels; 0: as the backbone says
    holdout_rows: Natural = 256  # rows of each .jsonl kept for evaluation, the last; of episodes 5%

    # schedule
    seed: Natural = 0  # order of the samples
    steps: Natural = 0  # optimizer steps; 0: from --epochs
    epochs: Positive = 1.0  # passes over as many samples as there are rows
    batch: Count = 24  # samples a step, over all ranks

    # optimizer
    lr: Positive = 6e-4  # peak learning rate
    warmup_ratio: Share = 0.03  # share of the steps
    beta1: Share = 0.9  # AdamW
    beta2: Share = 0.98  # AdamW
    weight_decay: NonNegative = 0.01  # AdamW, not on norms and biases
    max_grad_norm: NonNegative = 1.0  # gradient norm; 0: no clipping
    muon: bool = False  # inner matrices by orthogonalised momentum (Muon) instead of AdamW

    # memory: the results are the same up to rounding
    micro_batch: Natural = 0  # samples a forward on one rank; 0: all of its share
    recompute: bool = False  # activation checkpointing: less memory, a third more time
    shards: Natural = 0  # ranks that share a copy of the weights, more nodes mirror it; 0: all

    # does not affect results
    out: str = "runs/sft"  # run folder
    resume: bool = False  # continue from the newest step_* in --out
    log_every: Count = 20  # steps
    eval_every: Natural = 500  # steps; 0: only at the end
    eval_rows: Natural = 128  # held-out rows of each source in one evaluation
    probe_prompts: Natural = 64  # held-out action prompts, 4 thoughts each, at the end; 0: none
    save_every: Natural = 1000  # steps; 0: only at the end
    keep: Natural = 0  # newest checkpoints step_* that stay; 0: all


PRESETS = {
    "tabletop": {"action_tokenizer": "runs/fast", "steps": 4000},
    "speedrun": {
        "action_tokenizer": "runs/fast",
        "steps": 1200,
        "lr": 2e-3,
        "muon": True,
        "eval_every": 0,
        "save_every": 0,
    },
    "base": {
        "init": "runs/tiny-vlm",
        "data": "data/base/conversations.jsonl",
        "out": "runs/base",
        "steps": 24000,
        "holdout_rows": 4000,
        "probe_prompts": 0,
    },
    "paper": {
        "init": "Qwen/Qwen2.5-VL-7B-Instruct",
        "lr": 2e-5,
        "beta2": 0.999,
        "batch": 128,
        "micro_batch": 2,
        "max_length": 4096,
        "freeze_vision": True,
        "recompute": True,
        "keep": 2,
    },
}

# ---- Data ----------------------------------------------------------------------------------------


# fork point: mixture. What to draw from and in which shares; sample_order() draws, and a new kind
# of source is a class like the two below.
class MixtureItem(NamedTuple):
    path: str  # .jsonl of conversations, or folder of episodes
    weight: float | None  # relative share of the samples; None: its number of rows to train on


def parse_mixture(spec: str) -> list[MixtureItem]:
    """The value of --data, "path:weight,path", whose files and folders must exist."""
    mixture = []
    for item in spec.split(","):
        path = item.strip()
        weight = None
        if ":" in path:
            path, weight_text = path.rsplit(":", 1)
            try:
                weight = float(weight_text)
            except ValueError as e:
                raise ValueError(
                    f"--data {item}: {weight_text!r} is no weight; write path:weight"
                ) from e
        if not Path(path).exists():
            raise FileNotFoundError(
                f"--data {path}: no such file or folder; generate or convert it first (python -m "
                "benchmarks.tabletop_data)"
            )
        mixture.append(MixtureItem(path, weight))
    return mixture


class Sample(NamedTuple):
    """What a source gives at an index."""

    messages: list[dict[str, str]]  # of "role" and "content", with their mode lines
    images: list[Path | np.ndarray]  # files, or frames (H, W, 3) uint8
    kind: str | None  # of question; greedy accuracy is told by kind
    sample_id: str  # "talk.jsonl:12", "episode_000003.safetensors:7": named by errors


class ConversationDataset:
    """Rows of a .jsonl file, checked when opened and read when asked for.

    name: in the log. train, held: indices to train on and to evaluate on. source[i] is a Sample.
    ValueError naming the file and the line on a malformed row or a missing image."""

    def __init__(self, path, action_tokenizer: FastTokenizer | None, holdout_rows: int):
        self.path = Path(path)
        self.action_tokenizer = action_tokenizer
        self.name = self.path.stem
        self.offsets = []  # byte at which each line begins, and that at which the last one ends
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                self._check(line, f"{path}:{number}")
                self.offsets.append(offset)
                offset += len(line)
        self.offsets.append(offset)

        n = len(self.offsets) - 1
        if n <= holdout_rows:
            raise ValueError(
                f"{path}: {n} rows, all of them held out; lower --holdout-rows {holdout_rows}"
            )
        self.train = range(n - holdout_rows)
        self.held = range(n - holdout_rows, n)

    def _check(self, line, sample_id):
        try:
            row = json.loads(line)
            roles = [message["role"] for message in row["messages"]]
            text = "".join(message["content"] for message in row["messages"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f'{sample_id}: not a row {{"images": [...], "messages": [{{"role", "content"}}, '
                f"...]}} ({e!r}); repair or delete the line"
            ) from e
        if "assistant" not in roles or not set(roles) <= {"system", "user", "assistant"}:
            raise ValueError(
                f"{sample_id}: roles {roles}; an assistant must answer, and only system, user and "
                "assistant may speak"
            )
        if "<ACTION>" in text and self.action_tokenizer is None:
            raise ValueError(
                f"{sample_id}: an <ACTION> but no FAST tokenizer; give --action-tokenizer"
            )
        if "<ACTION>" in text and "chunk" not in row:
            raise ValueError(f'{sample_id}: an <ACTION> but no "chunk"; add the K x A actions')

    def size(self, i: int) -> int:
        """About how long a row is: characters in the file."""
        return self.offsets[i + 1] - self.offsets[i]

    def row(self, i: int) -> dict:
        """Row i as it stands in the file."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return json.loads(file.readline())

    def __getitem__(self, i: int) -> Sample:
        row = self.row(i)
        sample_id = f"{self.path}:{i + 1}"
        images = [self.path.parent / name for name in row.get("images", [])]
        messages = add_mode_lines(row["messages"])
        if "chunk" in row:
            try:
                chunk = np.asarray(row["chunk"], np.float32)  # (K, A)
                action_ids = self.action_tokenizer.encode(chunk[None])[0]
            except ValueError as e:
                raise ValueError(f'{sample_id}: "chunk": {e}') from e
            answer = model.action_answer(action_ids)
            for message in messages:
                message["content"] = message["content"].replace("<answer><ACTION></answer>", answer)
        return Sample(messages, images, row.get("kind"), sample_id)


class EpisodeDataset:
    """Steps of the episodes in a folder, counted through. The answer to the frame of a step is the
    K actions from that step on, as FAST. name, train, held and source[i] as above."""

    def __init__(self, folder, action_tokenizer: FastTokenizer | None):
        if action_tokenizer is None:
            raise ValueError(
                f"{folder}: episodes but no FAST tokenizer; fit one (python fast_tokenizer.py fit) "
                "and give its folder as --action-tokenizer"
            )
        if action_tokenizer.stats is None:
            raise ValueError(
                "--action-tokenizer: a tokenizer without statistics; save it with those of the "
                f"episodes: fast_tokenizer.py report --data {folder} --out fast/"
            )
        self.name = "action"
        self.action_tokenizer = action_tokenizer
        all_episodes = read_episodes(folder, action_tokenizer=action_tokenizer)
        train_episodes, held_out = split_episodes(all_episodes)
        self.episodes = [*train_episodes, *held_out]
        self.ends = chunk_ends(self.episodes, action_tokenizer.horizon)

        n_train = int(self.ends[len(train_episodes) - 1])
        self.train = range(n_train)
        self.held = range(n_train, int(self.ends[-1]))

    def size(self, i: int) -> int:
        """About how long a row is, in characters: all are alike."""
        return 300

    def target_ids(self, i: int) -> list[int]:
        """The true FAST ids of the K actions from step i on."""
        episode, t = locate_step(self.episodes, self.ends, i)
        chunks = action_chunks(episode, self.action_tokenizer.horizon)  # (T, K, A)
        return self.action_tokenizer.encode(chunks[t : t + 1])[0]

    def question(self, i: int, think: bool = False) -> Sample:
        """The prompt alone."""
        episode, t = locate_step(self.episodes, self.ends, i)
        messages = model.action_prompt(episode.task, think)
        return Sample(messages, [episode.frame(t)], "action", f"{episode}:{t}")

    def __getitem__(self, i: int) -> Sample:
        question = self.question(i)
        answer = {"role": "assistant", "content": model.action_answer(self.target_ids(i))}
        return question._replace(messages=[*question.messages, answer])


def open_sources(mixture: list[MixtureItem], action_tokenizer, holdout_rows: int):
    """-> (sources, their weights). Of two that have the same name the later gets a number."""
    sources = []
    weights = []
    for item in mixture:
        if item.path.endswith(".jsonl"):
            source = ConversationDataset(item.path, action_tokenizer, holdout_rows)
        else:
            source = EpisodeDataset(item.path, action_tokenizer)
        if source.name in [earlier.name for earlier in sources]:
            source.name += str(len(sources))
        sources.append(source)
        weights.append(len(source.train) if item.weight is None else item.weight)
    return sources, weights


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
        out.append({"role": message["role"], "content": model.ask(message["content"], think)})
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


def load_row(backbone: model.Backbone, source, i: int, max_length: int) -> model.Row:
    """Sample i of a source, tokenized; "sample_id" says where it comes from. ValueError naming that
    when the row is malformed or longer than max_length tokens."""
    sample = source[i]
    images = open_images(sample)
    try:
        row = model.encode(backbone, sample.messages, images)
    except ValueError as e:
        raise ValueError(f"{sample.sample_id}: {e}") from e
    if len(row["ids"]) > max_length:
        raise ValueError(
            f"{sample.sample_id}: {len(row['ids'])} tokens; raise --max-length {max_length} or "
            "shorten the row"
        )
    row["sample_id"] = sample.sample_id
    return row


# ---- The idea: new words, packed rows, a loss by tokens ------------------------------------------


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


class TokenSums(NamedTuple):
    """Sums over the counted tokens of a batch; () each."""

    loss: torch.Tensor  # cross-entropy, nats
    tokens: torch.Tensor  # how many there are
    correct: torch.Tensor  # for how many the most probable token is the right one


def token_loss(net: torch.nn.Module, batch: model.Batch) -> TokenSums:
    """Cross-entropy on batch["target"]: divide its sum by the count over all ranks (see all_sum),
    not by this rank's. Logits are computed only where a target follows."""
    counted = batch["target"][:, 1:]  # (B, T - 1); token t is predicted from position t - 1
    hidden = model.hidden_states(net, batch)[:, :-1][counted]  # (N, D)
    target_ids = batch["ids"][:, 1:][counted]  # (N,)

    def score(logits, ids):  # (n, V), (n,) -> (n,), (n,)
        correct = logits.detach().argmax(-1) == ids
        return F.cross_entropy(logits, ids, reduction="none"), correct

    losses, correct = model.score_in_slices(net, score, hidden, target_ids)  # (N,) each
    return TokenSums(losses.sum(), counted.sum(), correct.sum())


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


def micro_batches(
    backbone: model.Backbone, sources: list, picks: np.ndarray, cfg: Config, dist: model.Dist
) -> list[model.Batch]:
    """This rank's share of the samples `picks` (batch, 2) of (source, row), packed. Each rank gets
    equally many; they are dealt out by length, as all wait for the one with the most tokens."""

    def size(pick):
        source, row = pick
        return sources[source].size(row)

    by_size = sorted(picks.tolist(), key=size)
    local_picks = by_size[dist.rank :: dist.world_size]
    rows = [load_row(backbone, sources[source], row, cfg.max_length) for source, row in local_picks]
    n = cfg.micro_batch or len(rows)
    return [pack(rows[k : k + n]) for k in range(0, len(rows), n)]


def prefetch(
    pool: ThreadPoolExecutor, load: Callable[[int], list], start: int, steps: int, ahead: int = 2
) -> Iterator[tuple[int, list]]:
    """(step, load(step)) of each step, while the pool reads images and tokenizes for the next."""
    pending = deque()
    for step in range(start, min(start + ahead, steps)):
        pending.append(pool.submit(load, step))
    for step in range(start, steps):
        loaded = pending.popleft().result()
        if step + ahead < steps:
            pending.append(pool.submit(load, step + ahead))
        yield step, loaded


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
        metrics[f"{source.name}_loss"] = loss / tokens
        metrics[f"{source.name}_token_accuracy"] = correct / tokens
    metrics |= greedy_accuracy(backbone, sources, cfg, dist)
    backbone.net.train()
    return metrics


def evenly_spaced(indices: Sequence[int], n: int) -> list[int]:
    """At most n of the indices, evenly spaced over them."""
    places = np.linspace(0, len(indices) - 1, min(n, len(indices)))
    return [indices[int(place)] for place in places]


def held_out_sums(backbone, source, cfg, dist) -> list[float]:
    """TokenSums of a source's held-out rows, over all ranks."""
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


def answer_text(text: str) -> str:
    """What stands in <answer></answer>, else the whole text."""
    after_tag = text.rpartition("<answer>")[2]
    return after_tag.partition("</answer>")[0].strip()


def greedy_answers(
    backbone: model.Backbone, samples: list[Sample], max_new_tokens: int = 128, size: int = 64
) -> list[str]:
    """Greedy answers, as text, to the first question of each sample; `size` of them at once."""
    answers = []
    for k in range(0, len(samples), size):
        rows = []
        for sample in samples[k : k + size]:
            images = open_images(sample)
            rows.append(model.encode(backbone, sample.messages[:1], images, prompt_only=True))
        generated = model.generate(backbone, rows, max_new_tokens=max_new_tokens, greedy=True)
        for ids in generated["ids"]:
            text = backbone.tokenizer.decode(ids, skip_special_tokens=True)
            answers.append(answer_text(text))
    return answers


def greedy_accuracy(backbone, sources, cfg, dist) -> dict[str, float]:
    """Exact-match accuracy of greedy answers to held-out single-turn rows, by their "kind"."""
    samples = []
    for source in sources:
        for i in evenly_spaced(source.held, cfg.eval_rows):
            sample = source[i]
            roles = [message["role"] for message in sample.messages]
            if sample.kind and roles == ["user", "assistant"]:
                samples.append(sample)
    kinds = sorted({sample.kind for sample in samples})
    local_samples = samples[dist.rank :: dist.world_size]
    with model.unsharded(backbone.net):
        answers = greedy_answers(backbone, local_samples)

    sums = np.zeros((len(kinds), 2))  # right answers, answers
    for sample, answer in zip(local_samples, answers, strict=True):
        kind = kinds.index(sample.kind)
        if answer == answer_text(sample.messages[1]["content"]):
            sums[kind, 0] += 1
        sums[kind, 1] += 1
    accuracy = {}
    for kind, (n_right, n) in zip(kinds, all_sum(sums.tolist()), strict=True):
        accuracy[f"greedy_{kind}"] = n_right / n
    return accuracy


def thinking_rollouts(backbone, sources, cfg, dist, n: int = 4) -> dict[str, float]:
    """What RL will start from: n thinking rollouts on each of some held-out action prompts, which
    SFT never showed. -> probe_format (share well formed, with a thought), probe_r_a (mean prefix
    reward, paper section 3), and how many of the n thoughts and actions differ: if they are all
    alike RL has no signal (Table 1 of the paper)."""
    # 1. the prompts, and this rank's share of them
    prompts = []
    for source in sources:
        if isinstance(source, EpisodeDataset):
            prompts += [(source, i) for i in evenly_spaced(source.held, cfg.probe_prompts)]
    prompts = prompts[: cfg.probe_prompts]
    if not prompts:
        return {}
    keys = range(dist.rank, len(prompts), dist.world_size)
    local_prompts = [prompts[key] for key in keys]

    # 2. the rollouts
    with model.unsharded(backbone.net):
        rows = []
        for source, i in local_prompts:
            question = source.question(i, think=True)
            rows.append(
                model.encode(backbone, question.messages, question.images, prompt_only=True)
            )
        generated = model.generate(
            backbone, rows, n=n, max_new_tokens=128, seed=cfg.seed, keys=keys
        )

    # 3. what they are worth
    sums = np.zeros(4)  # well-formed ones, rewards, different thoughts, different actions
    for b, (source, i) in enumerate(local_prompts):
        target_ids = source.target_ids(i)
        n_good = 0
        rewards = []
        thoughts = set()
        actions = set()
        for g, ids in enumerate(generated["ids"][b * n : (b + 1) * n]):
            text = backbone.tokenizer.decode(ids, skip_special_tokens=True)
            well_formed, has_thought, action_ids = model.parse_actions(backbone, ids)
            if well_formed and has_thought:
                n_good += 1
            rewards.append(model.prefix_reward(action_ids, target_ids))
            thoughts.add(text.split("</think>")[0])
            actions.add(tuple(action_ids))
            if dist.rank == 0 and b == 0 and g == 0:
                print(f"a thinking rollout: {text}", flush=True)
        sums += [n_good, sum(rewards), len(thoughts), len(actions)]
    n_good, reward, n_thoughts, n_actions = all_sum(sums.tolist())
    return {
        "probe_format": n_good / (len(prompts) * n),
        "probe_r_a": reward / (len(prompts) * n),
        "probe_distinct_thoughts": n_thoughts / len(prompts),
        "probe_distinct_actions": n_actions / len(prompts),
    }


# ---- Main ----------------------------------------------------------------------------------------


def load_backbone(cfg: Config, newest: Path | None, device: torch.device) -> model.Backbone:
    """The model of --init, or of the checkpoint to resume, with its vocabulary grown and with what
    --freeze-vision and --recompute ask for."""
    action_tokenizer = None
    if cfg.action_tokenizer and newest is None:  # a checkpoint holds its own
        action_tokenizer = FastTokenizer.load(cfg.action_tokenizer)
    backbone = model.load(
        newest or cfg.init,
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
    if cfg.recompute:
        model.recompute_activations(backbone.net)
    return backbone


class StepInfo(NamedTuple):
    micro_sums: list[list[float]]  # TokenSums of each micro-batch of this rank
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
    return StepInfo(micro_sums, grad_norm)


def main(argv: list[str] | None = None) -> None:
    cfg = model.parse_config(Config, PRESETS, argv)
    model.keep_freed_memory()
    dist = model.setup(cfg.seed, cfg.shards, cfg.batch)

    # 1. the backbone, its vocabulary grown, and its optimizer
    mixture = parse_mixture(cfg.data)
    newest = model.checkpoint_to_resume(cfg)
    backbone = load_backbone(cfg, newest, dist.build)
    sources, weights = open_sources(mixture, backbone.action_tokenizer, cfg.holdout_rows)
    net = model.shard(backbone.net, dist)
    net.train()
    optim = model.make_optimizer(net, cfg.lr, cfg.weight_decay, (cfg.beta1, cfg.beta2), cfg.muon)
    start, unlogged = model.load_train_state(newest, net, optim)
    unlogged = np.zeros(3) + unlogged  # TokenSums since the last line of the log

    # 2. the samples of the whole run, in order
    sizes = [len(source.train) for source in sources]
    steps = cfg.steps or math.ceil(cfg.epochs * sum(sizes) / cfg.batch)
    order = np.stack(sample_order(sizes, weights, steps * cfg.batch, cfg.seed), 1)  # (N, 2)

    def load_batches(step):
        picks = order[step * cfg.batch : (step + 1) * cfg.batch]  # (batch, 2)
        return micro_batches(backbone, sources, picks, cfg, dist)

    run = {
        "stage": "sft" if backbone.action_tokenizer else "base",
        "config": asdict(cfg),
        "parent": cfg.init,
    }
    save = functools.partial(model.save, what=backbone, optim=optim)
    model.stop_on_sigterm()
    log = model.Log(cfg.out, cfg, dist)
    clock = time.perf_counter()
    logged_step = start
    with ThreadPoolExecutor(1) as pool:
        # 3. rows, packed into micro-batches
        for step, batches in prefetch(pool, load_batches, start, steps):
            # 4. and 5. their loss, and an optimizer step
            lr = model.learning_rate(step, steps, cfg.lr, cfg.warmup_ratio)
            info = train_step(net, optim, batches, step, lr, cfg, dist)
            for sums in info.micro_sums:
                unlogged += sums
            done = step + 1
            if done % cfg.log_every == 0 or done == steps:
                loss, tokens, correct = all_sum(unlogged.tolist())
                now = time.perf_counter()
                log.write(
                    step=done,
                    loss=loss / tokens,
                    token_accuracy=correct / tokens,
                    grad_norm=info.grad_norm,
                    lr=lr,
                    samples_per_s=cfg.batch * (done - logged_step) / (now - clock),
                )
                clock = now
                logged_step = done
                unlogged = np.zeros(3)
            if cfg.eval_every and done % cfg.eval_every == 0 and done < steps:
                log.write(step=done, **evaluate(backbone, sources, cfg, dist))
                clock = time.perf_counter()
            model.save_step(cfg, done, run, save, unlogged.tolist())

    metrics = evaluate(backbone, sources, cfg, dist)
    metrics |= thinking_rollouts(backbone, sources, cfg, dist)
    log.write(step=steps, **metrics)
    model.save(Path(cfg.out) / "final", backbone, {**run, "step": steps, "metrics": metrics})


if __name__ == "__main__":
    model.run_main(main, "--micro-batch")
