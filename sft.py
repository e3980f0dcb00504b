"""Stage 1 of RoboAlign (arXiv 2603.21341): fine-tune a multimodal LLM on questions, reasoning and
robot actions written as FAST tokens.

In: a backbone, a mixture of conversations (.jsonl) and episodes (folders), a FAST tokenizer.
Out: a checkpoint that sees, reasons in <think></think> and answers with words or action tokens.
1. the vocabulary grows by the action marks and the FAST tokens
2. a sample of the mixture is a conversation, or a frame with its instruction -> the FAST tokens of
   the next K actions, with no thought: thoughts reach actions only by transfer
3. cross-entropy on the assistant's tokens, divided by their count over all ranks
4. AdamW, warmup, cosine
Our deviations: the tabletop preset trains the vision tower too (it is far too small to freeze).
A conversation whose answer is "<answer><ACTION></answer>", with the actions in the row's "chunk"
(K x A, dataset units), is an action sample that may carry a thought; mixture weights set its share.

Reads  --init, --data, --action-tokenizer. Writes runs/sft/{log.jsonl, step_*/, final/}.
python sft.py                                        # tabletop, one CPU process
torchrun --nproc_per_node 2 sft.py                   # 2 CPU processes, 190 ms a step; or 2 GPUs
torchrun --nproc_per_node 8 sft.py paper --data vqa.jsonl,bridge/ --action-tokenizer fast/    # 8 GPUs, 30 h"""

import functools
import itertools
import json
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributed import fsdp
from transformers import AddedToken

import model
from fast_tokenizer import FastTokenizer, action_chunks, read_episodes, locate_step, split_episodes
from model import all_sum, ask

TABLETOP = "data/tabletop/conversations.jsonl:1,data/tabletop/episodes:3"


@dataclass(frozen=True)
class Config:
    preset: str = ""
    init: str = "assets/tiny-vlm"  # checkpoint folder or hub name
    data: str = TABLETOP  # path:weight,...: relative share of samples; no weight: number of rows
    action_tokenizer: str = ""  # FAST tokenizer folder; empty: the one inside --init, if any
    out: str = "runs/sft"  # run folder
    seed: int = 0  # order of the samples
    steps: int = 0  # optimizer steps; 0: from --epochs
    epochs: float = 1.0  # passes over as many samples as there are rows
    batch: int = 24  # samples a step, over all ranks
    micro_batch: int = 0  # samples a forward on one rank; 0: all of its share
    max_length: int = 1024  # tokens; a longer row is an error
    lr: float = 6e-4  # peak learning rate
    warmup_ratio: float = 0.03  # share of the steps
    beta1: float = 0.9  # AdamW
    beta2: float = 0.98  # AdamW
    weight_decay: float = 0.01  # AdamW, not on norms and biases
    max_grad_norm: float = 1.0  # gradient norm; 0: no clipping
    muon: bool = False  # inner matrices by orthogonalised momentum (Muon) instead of AdamW
    max_pixels: int = 0  # larger images are shrunk to so many pixels; 0: as the backbone says
    freeze_vision: bool = False  # keep the vision tower and its projector as they are
    recompute: bool = False  # activation checkpointing: less memory, a third more time
    shards: int = 0  # ranks that share one copy of the weights, more nodes mirror it; 0: all ranks
    holdout_rows: int = 256  # last rows of each .jsonl kept for evaluation; of episodes the last 5%
    eval_rows: int = 128  # held-out rows of each source in one evaluation
    eval_every: int = 500  # steps; 0: only at the end
    save_every: int = 1000  # steps; 0: only at the end
    keep: int = 0  # newest checkpoints step_* that stay; 0: all
    log_every: int = 20  # steps
    probe_prompts: int = (
        64  # held-out action prompts for 4 thinking rollouts each at the end; 0: none
    )
    resume: bool = False  # continue from the newest step_* in --out


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


class ConversationDataset:
    """Rows of a .jsonl file, checked when opened and read when asked for.

    source[i] -> (messages with their mode lines, images, kind or None, where). ValueError naming
    the file and the line on a malformed row or a missing image."""

    def __init__(self, path, fast, holdout):
        self.path, self.action_tokenizer, self.offset = Path(path), fast, []
        self.name = self.path.stem
        with open(path, "rb") as f:
            for line in f:
                self.offset.append(f.tell() - len(line))
                self._check(line, f"{path}:{len(self.offset)}")
            self.offset.append(f.tell())
        n = len(self.offset) - 1
        if n <= holdout:
            raise ValueError(
                f"{path}: {n} rows, all of them held out; lower --holdout-rows {holdout}"
            )
        self.train, self.held = range(n - holdout), range(n - holdout, n)

    def _check(self, line, where):
        try:
            row = json.loads(line)
            roles = [m["role"] for m in row["messages"]]
            text = "".join(m["content"] for m in row["messages"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f'{where}: not a row {{"images": [...], "messages": [{{"role", '
                f'"content"}}, ...]}} ({e!r}); repair or delete the line'
            ) from e
        if not {"assistant"} <= set(roles) <= {"system", "user", "assistant"}:
            raise ValueError(
                f"{where}: roles {roles}; an assistant must answer, and only system, "
                "user and assistant may speak"
            )
        if "<ACTION>" in text and self.action_tokenizer is None:
            raise ValueError(f"{where}: an <ACTION> but no FAST tokenizer; give --action-tokenizer")
        if "<ACTION>" in text and "chunk" not in row:
            raise ValueError(f'{where}: an <ACTION> but no "chunk"; add the K x A actions')

    def size(self, i):
        """About how long a row is: characters in the file."""
        return self.offset[i + 1] - self.offset[i]

    def row(self, i):
        with open(self.path, "rb") as f:
            f.seek(self.offset[i])
            return json.loads(f.readline())

    def __getitem__(self, i):
        row, where = self.row(i), f"{self.path}:{i + 1}"
        images = [self.path.parent / name for name in row.get("images", [])]
        messages = add_mode_lines(row["messages"])
        if "chunk" in row:
            try:
                target = self.action_tokenizer.encode(np.asarray(row["chunk"], np.float32)[None])[0]
            except ValueError as e:
                raise ValueError(f'{where}: "chunk": {e}') from e
            for m in messages:
                m["content"] = m["content"].replace(
                    "<answer><ACTION></answer>", model.action_answer(target)
                )
        return messages, images, row.get("kind"), where


class EpisodeDataset:
    """Steps of the episodes in a folder: source[i] as above, the K actions from step t as FAST."""

    name = "action"

    def __init__(self, folder, fast):
        if fast is None:
            raise ValueError(
                f"{folder}: episodes but no FAST tokenizer; fit one (python "
                "fast_tokenizer.py fit) and give its folder as --action-tokenizer"
            )
        if fast.stats is None:
            raise ValueError(
                "--action-tokenizer: a tokenizer without statistics; save it with those of the "
                f"episodes: fast_tokenizer.py report --data {folder} --out fast/"
            )
        self.files, self.action_tokenizer = read_episodes(folder, fast=fast), fast
        self.ends = np.cumsum([len(e) for e in self.files])
        cut, end = sum(map(len, split_episodes(self.files)[0])), int(self.ends[-1])
        self.train, self.held = range(cut), range(cut, end)

    def size(self, i):
        return 300  # characters, about; all are alike

    def target(self, i):
        episode, t = locate_step(self.files, self.ends, i)
        return self.action_tokenizer.encode(
            action_chunks(episode, self.action_tokenizer.horizon)[t : t + 1]
        )[0]

    def question(self, i, think=False):
        """-> (messages with the question alone, images, where)."""
        episode, t = locate_step(self.files, self.ends, i)
        where = f"{episode.path}:{t}"
        return model.action_prompt(episode.task, think), [episode.frame(t)], where

    def __getitem__(self, i):
        messages, images, where = self.question(i)
        answer = {"role": "assistant", "content": model.action_answer(self.target(i))}
        return [*messages, answer], images, "action", where


def add_mode_lines(messages):
    """Adds the mode line to each question, by how the assistant's next turn begins."""
    out = []
    for m, reply in itertools.zip_longest(messages, messages[1:]):
        think = None
        if m["role"] == "user" and reply and reply["content"].startswith(("<think>", "<answer>")):
            think = reply["content"].startswith("<think>")
        out.append({"role": m["role"], "content": ask(m["content"], think)})
    return out


def read_image(image, where):
    if isinstance(image, np.ndarray):
        return image
    try:
        return np.asarray(Image.open(image).convert("RGB"))
    except (OSError, ValueError) as e:
        raise ValueError(
            f"{where}: image {image} does not open ({e}); add the file or delete the row"
        ) from e


def load_row(backbone, source, i, max_length):
    messages, images, _, where = source[i]
    images = [read_image(image, where) for image in images]
    try:
        row = model.encode(backbone, messages, images)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e
    if len(row["ids"]) > max_length:
        raise ValueError(
            f"{where}: {len(row['ids'])} tokens; raise --max-length {max_length} or shorten the row"
        )
    return {**row, "sample_id": where}


def parse_mixture(spec):
    """ "path:weight,path" -> [(path, weight or None)]."""
    out = []
    for item in spec.split(","):
        path, *weight = item.strip().rsplit(":", 1)
        try:
            out.append((path, float(weight[0]) if weight else None))
        except ValueError as e:
            raise ValueError(f"--data {item}: {weight[0]!r} is no weight; write path:weight") from e
        if not Path(path).exists():
            raise FileNotFoundError(
                f"--data {path}: no such file or folder; generate or convert "
                "it first (python -m benchmarks.tabletop)"
            )
    return out


def sample_order(sizes, weights, draws, seed):
    """The sample order: (source (N,), row (N,)) of draws 0..N-1, where each source is shuffled anew
    once all its rows were seen. A function of the seed; a longer run begins like a shorter one."""
    p = np.asarray(weights, float) / sum(weights)
    source = model.rng(seed, "mixture").choice(len(sizes), draws, p=p)  # (N,)
    row = np.empty(draws, np.int64)
    for s, size in enumerate(sizes):
        at = np.flatnonzero(source == s)
        passes = [model.rng(seed, s, k).permutation(size) for k in range(-(-len(at) // size))]
        row[at] = np.concatenate(passes)[: len(at)] if passes else 0
    return source, row


def pack(rows):
    """Rows -> a batch as of collate with B = 1, one row after the other and no padding; its lengths
    keep model.hidden_states() from looking across rows. What training uses: rows differ much in length."""
    whole = {k: np.concatenate([r[k] for r in rows], -1) for k in ("ids", "target", "positions")}
    return {
        **model.collate([whole], 0, images=rows),
        "lengths": [len(r["ids"]) for r in rows],
        "sample_id": [r.get("sample_id", "") for r in rows],
    }


def micro_batches(backbone, sources, picks, cfg, dist):
    """This rank's micro-batches of the samples `picks` [(source, row)], equally many on each rank,
    dealt out by length, as ranks wait for the one with the most tokens."""
    picks = sorted(picks.tolist(), key=lambda p: sources[p[0]].size(p[1]))
    mine = picks[dist.rank :: dist.world_size]
    rows = [load_row(backbone, sources[s], int(i), cfg.max_length) for s, i in mine]
    micro = cfg.micro_batch or len(rows)
    return [pack(rows[k : k + micro]) for k in range(0, len(rows), micro)]


def evenly_spaced(some, n):
    """n indices evenly spaced over a range."""
    return [some[int(k)] for k in np.linspace(0, len(some) - 1, min(n, len(some)))]


def token_loss(net, batch):
    """-> (summed cross-entropy, number of counted tokens, number right by argmax). Logits are
    computed only where a target follows; divide by the global count (see all_sum)."""

    def score(logits, ids):
        right = logits.detach().argmax(-1) == ids
        return F.cross_entropy(logits, ids, reduction="none"), right  # (n,) each

    counts = batch["target"][:, 1:]  # token t is predicted from position t - 1
    h = model.hidden_states(net, batch)[:, :-1][counts]  # (N, D)
    losses, right = model.score_in_slices(net, score, h, batch["ids"][:, 1:][counts])
    return losses.sum(), counts.sum(), right.sum()


def set_gradient_sync(net, last):
    """Call before each micro-batch. A small sharded model gathers and reduces once a step; a large
    one has no memory for that and does so for each micro-batch."""
    if [m for m in net.modules() if isinstance(m, fsdp.FSDPModule)] == [net]:
        net.set_requires_gradient_sync(last)
        net.set_reshard_after_backward(last)


@torch.no_grad()
def evaluate(backbone, sources, cfg, dist):
    """Held-out token loss and accuracy of each source, greedy accuracy of each kind of question.
    -> {name: value}."""
    metrics, size = {}, cfg.micro_batch or 16
    backbone.net.eval()
    for source in sources:
        held = evenly_spaced(source.held, cfg.eval_rows)
        mine, total = held[dist.rank :: dist.world_size], np.zeros(3)
        for k in range(0, -(-len(held) // dist.world_size), size):  # as many forwards on each rank
            some = mine[k : k + size]
            rows = [load_row(backbone, source, i, cfg.max_length) for i in some or held[:1]]
            batch = model.to_device(pack(rows), dist.device)
            batch["target"] &= bool(some)
            total += [x.item() for x in token_loss(backbone.net, batch)]
        loss, count, right = all_sum(total.tolist())
        metrics |= {
            f"{source.name}_loss": loss / count,
            f"{source.name}_token_accuracy": right / count,
        }
    metrics |= greedy_accuracy(backbone, sources, cfg, dist)
    backbone.net.train()
    return metrics


def answer_text(text):
    """What stands in <answer></answer>, else the whole text."""
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def greedy_answers(backbone, items, max_new_tokens=128, size=64):
    """Greedy answers, as text, to the first question of each item (as source[i] gives it)."""
    texts = []
    for k in range(0, len(items), size):
        rows = [
            model.encode(
                backbone, messages[:1], [read_image(x, where) for x in images], prompt_only=True
            )
            for messages, images, _, where in items[k : k + size]
        ]
        ids = model.generate(backbone, rows, max_new_tokens=max_new_tokens, greedy=True)["ids"]
        texts += [
            answer_text(backbone.tokenizer.decode(one, skip_special_tokens=True)) for one in ids
        ]
    return texts


def greedy_accuracy(backbone, sources, cfg, dist):
    """Exact-match accuracy of greedy answers to held-out single-turn rows, by their "kind"."""
    items = [source[i] for source in sources for i in evenly_spaced(source.held, cfg.eval_rows)]
    items = [x for x in items if x[2] and [m["role"] for m in x[0]] == ["user", "assistant"]]
    mine, kinds = items[dist.rank :: dist.world_size], sorted({kind for _, _, kind, _ in items})
    found = np.zeros((len(kinds), 2))  # right answers, answers
    with model.unsharded(backbone.net):
        for (messages, _, kind, _), text in zip(mine, greedy_answers(backbone, mine)):
            found[kinds.index(kind)] += text == answer_text(messages[1]["content"]), 1
    return {f"greedy_{k}": r / n for k, (r, n) in zip(kinds, all_sum(found.tolist()))}


def thinking_rollouts(backbone, sources, cfg, dist, n=4):
    """What RL will start from: thinking rollouts on held-out prompts, which SFT never showed. ->
    format rate, mean r_a (paper section 3), and how many of the n thoughts and actions differ: if
    thoughts are all alike RL has no signal (Table 1 of the paper)."""
    prompts = [
        (s, i)
        for s in sources
        if isinstance(s, EpisodeDataset)
        for i in evenly_spaced(s.held, cfg.probe_prompts)
    ][: cfg.probe_prompts]
    if not prompts:
        return {}
    keys, total = range(dist.rank, len(prompts), dist.world_size), np.zeros(4)
    mine = [prompts[k] for k in keys]
    with model.unsharded(backbone.net):
        rows = [
            model.encode(backbone, *source.question(i, think=True)[:2], prompt_only=True)
            for source, i in mine
        ]
        ids = model.generate(backbone, rows, n=n, max_new_tokens=128, seed=cfg.seed, keys=keys)[
            "ids"
        ]
    for b, (source, i) in enumerate(mine):
        group, target = ids[b * n : (b + 1) * n], source.target(i)
        texts = [backbone.tokenizer.decode(one, skip_special_tokens=True) for one in group]
        read = [model.parse_actions(backbone, one) for one in group]
        total += [
            sum(good and thinks for good, thinks, _ in read),
            sum(model.prefix_reward(fast, target) for *_, fast in read),
            len({t.split("</think>")[0] for t in texts}),
            len({tuple(a) for *_, a in read}),
        ]
        if dist.rank == b == 0:
            print(f"a thinking rollout: {texts[0]}", flush=True)
    good, reward, thoughts, actions = all_sum(total.tolist())
    return {
        "probe_format": good / (len(prompts) * n),
        "probe_r_a": reward / (len(prompts) * n),
        "probe_distinct_thoughts": thoughts / len(prompts),
        "probe_distinct_actions": actions / len(prompts),
    }


@torch.no_grad()
def grow_vocabulary(backbone, n_fast):
    """Adds the two action marks and n_fast FAST tokens in place, each once; call it before shard().
    Embeddings grow only where the (padded) table has no row left; they never shrink and stay tied.
    New rows: mean of the old ones plus a tenth of their spread, so that no two tokens are alike."""
    names, old, known = (
        map(model.fast_token, range(n_fast)),
        len(backbone.tokenizer),
        backbone.tokenizer.get_vocab(),
    )
    if not backbone.tokenizer.add_tokens(
        [
            AddedToken(t, special=False, normalized=False)
            for t in (model.ACTION_START, model.ACTION_END, *names)
            if t not in known
        ]
    ):
        return
    end = len(backbone.tokenizer)
    if end > len(backbone.net.get_input_embeddings().weight):
        backbone.net.resize_token_embeddings(end, pad_to_multiple_of=64, mean_resizing=False)
        end = len(backbone.net.get_input_embeddings().weight)
    tables = backbone.net.get_input_embeddings().weight, backbone.net.get_output_embeddings().weight
    noise = torch.Generator().manual_seed(0)
    for w in dict.fromkeys(tables):  # one when tied
        mean, std = w[:old].mean(0), w[:old].std(0)  # (D,)
        new = torch.randn(end - old, w.shape[1], generator=noise).to(w)
        w[old:end] = mean + 0.1 * std * new
    backbone.vocab = model.vocab(backbone.net, backbone.tokenizer)


def prepare(cfg, dist):
    """-> Backbone with its vocabulary, sources, their weights, the checkpoint to resume or None."""
    paths = parse_mixture(cfg.data)
    newest = model.checkpoint_to_resume(cfg)
    fast = FastTokenizer.load(cfg.action_tokenizer) if cfg.action_tokenizer and not newest else None

    def read(fast):
        return [
            ConversationDataset(p, fast, cfg.holdout_rows)
            if p.endswith(".jsonl")
            else EpisodeDataset(p, fast)
            for p, _ in paths
        ]

    backbone = model.load(
        newest or cfg.init,
        dist.build,
        stages=("base", "sft"),
        seed=cfg.seed,
        max_pixels=cfg.max_pixels,
    )
    backbone.action_tokenizer = fast or backbone.action_tokenizer
    if backbone.action_tokenizer is not None:
        grow_vocabulary(backbone, backbone.action_tokenizer.vocab_size)
    sources = read(backbone.action_tokenizer)
    for k, s in enumerate(sources):
        if s.name in [other.name for other in sources[:k]]:
            s.name += str(k)
    weights = [len(s.train) if w is None else w for s, (_, w) in zip(sources, paths)]
    if cfg.freeze_vision:
        backbone.net.model.visual.requires_grad_(False)
    if cfg.recompute:
        model.recompute_activations(backbone.net)
    return backbone, sources, weights, newest


def main(argv=None):
    cfg = model.parse_config(Config, PRESETS, argv)
    dist = model.setup(cfg.seed, cfg.shards, cfg.batch)
    backbone, sources, weights, newest = prepare(cfg, dist)
    net = model.shard(backbone.net, dist)
    net.train()
    optim = model.make_optimizer(net, cfg.lr, cfg.weight_decay, (cfg.beta1, cfg.beta2), cfg.muon)
    start, unlogged = model.load_train_state(newest, net, optim)
    sizes = [len(s.train) for s in sources]
    steps = cfg.steps or math.ceil(cfg.epochs * sum(sizes) / cfg.batch)
    picks = np.stack(sample_order(sizes, weights, steps * cfg.batch, cfg.seed), 1)
    run = {
        "stage": "sft" if backbone.action_tokenizer else "base",
        "config": asdict(cfg),
        "parent": cfg.init,
    }
    write = functools.partial(model.save, what=backbone, optim=optim)
    log = model.Log(cfg.out, cfg, dist)
    seconds, logged, total = time.perf_counter(), start, np.zeros(3) + unlogged

    def fetch(step):
        some = picks[step * cfg.batch : (step + 1) * cfg.batch]
        return micro_batches(backbone, sources, some, cfg, dist)

    with ThreadPoolExecutor(1) as pool:  # images and tokens of the next two steps
        ahead = deque(pool.submit(fetch, s) for s in range(start, min(start + 2, steps)))
        for step in range(start, steps):
            micro = ahead.popleft().result()
            if step + 2 < steps:
                ahead.append(pool.submit(fetch, step + 2))
            lr = model.learning_rate(step, steps, cfg.lr, cfg.warmup_ratio)
            for group in optim.param_groups:
                group["lr"] = lr
            count = all_sum(sum(int(b["target"][:, 1:].sum()) for b in micro))
            guard = functools.partial(
                model.stop_if_not_finite, cfg.out, f"step {step + 1}", dist, micro
            )
            for k, batch in enumerate(micro):
                set_gradient_sync(net, last=k == len(micro) - 1)
                loss, n, right = token_loss(net, model.to_device(batch, dist.device))
                (loss * dist.world_size / count).backward()  # FSDP averages over ranks
                guard("loss", loss.item())
                total += [loss.item(), n.item(), right.item()]
            norm = model.clip_gradients(net.parameters(), cfg.max_grad_norm)
            guard("gradient norm", norm)
            optim.step()
            optim.zero_grad()
            done = step + 1
            if done % cfg.log_every == 0 or done == steps:
                loss, n, right = all_sum(total.tolist())
                now = time.perf_counter()
                log.write(
                    step=done,
                    loss=loss / n,
                    token_accuracy=right / n,
                    grad_norm=norm,
                    lr=lr,
                    samples_per_s=cfg.batch * (done - logged) / (now - seconds),
                )
                seconds, logged, total = now, done, np.zeros(3)
            if cfg.eval_every and done % cfg.eval_every == 0 and done < steps:
                log.write(step=done, **evaluate(backbone, sources, cfg, dist))
                seconds = time.perf_counter()
            model.save_step(cfg, done, run, write, total.tolist())
    metrics = evaluate(backbone, sources, cfg, dist) | thinking_rollouts(
        backbone, sources, cfg, dist
    )
    log.write(step=steps, **metrics)
    model.save(Path(cfg.out) / "final", backbone, {**run, "step": steps, "metrics": metrics})


if __name__ == "__main__":
    model.run_main(main, "--micro-batch")
