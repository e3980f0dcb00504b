"""Stage 2 of RoboAlign (arXiv 2603.21341): GRPO. Think in words, then act; learn from both.

In: a checkpoint of sft.py (with its FAST tokenizer) and recorded episodes.
Out: the same model with all weights trained, whose thoughts lead to better action tokens.
1. draw prompts (image, instruction) at recorded steps; target: the FAST ids of the next K actions
2. sample G completions of each: <think>words</think><answer>action tokens</answer>
3. reward (r_f + r_a) / 2: r_f well-formed and decodable, r_a common prefix with target / max(m, n)
4. advantage of a completion: (r - mean) / (std + 1e-6) in its group of G (GRPO, 2402.03300)
5. a few updates a rollout, each on its own prompts: clipped ratio, dual clip, mean over tokens
6. + 0.01 x KL (k3) to the model that RL started from, in the loss; repeat
Our deviations: r_a is over max(m, n), the paper's over the target's m, so surplus tokens cost.
Groups whose rewards tie are not forwarded (--no-skip-ties does), but their tokens are in the mean.
The G completions of a prompt share its keys and values, in sampling and update: same gradients.

Reads --init, --data. Writes runs/grpo/{log.jsonl, step_*/, final/}.
python grpo.py                                   # tabletop, one CPU process
torchrun --nproc_per_node 2 grpo.py              # 2 CPU processes, 2 s a step; or 2 GPUs
torchrun --nproc_per_node 8 grpo.py paper        # 8 GPUs; took the authors about 1 h"""

import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

import model
from fast_tokenizer import action_chunks, read_episodes, locate_step, normalize, split_episodes
from model import all_sum


@dataclass(frozen=True)
class Config:
    preset: str = ""
    init: str = "runs/sft/final"  # checkpoint of stage sft, or grpo to go on from it as a new run
    data: str = (
        "data/tabletop/episodes"  # folder of episodes; the last 5% are held out, as in sft.py
    )
    out: str = "runs/grpo"  # folder of checkpoints and log
    seed: int = 0  # prompts and samples are a function of (seed, step, index)
    steps: int = 100  # rollout steps
    prompts: int = 32  # prompts a rollout step, all ranks together
    batch: int = (
        16  # prompts an optimiser update, all ranks together; prompts / batch updates a step
    )
    group: int = 8  # completions a prompt (G)
    micro_batch: int = (
        8  # prompts a rank forwards and backwards at once; lower it when memory runs out
    )
    rollout_batch: int = (
        0  # prompts a rank samples at once, those of like length together; 0: all it has
    )
    cuda_graphs: bool = True  # on a GPU, replay decoding steps as CUDA graphs
    recompute: bool = False  # activation checkpointing: less memory, a third more time an update
    cpu_offload: bool = False  # keep the reference model in the CPU's memory
    shards: int = 0  # ranks that share one copy of the weights, more nodes mirror it; 0: all ranks
    max_pixels: int = 0  # larger images are shrunk to so many pixels; 0: as the backbone says
    max_new_tokens: int = 96  # longest completion, tokens
    temperature: float = 1.0  # of sampling and of the log-probabilities in the loss
    reward: str = "prefix"  # r_a: prefix (paper), l1 (decoded actions) or lcs (common subsequence)
    advantage: str = "grpo"  # grpo, or drgrpo: no std, and a constant in place of the token count
    clip_low: float = 0.2  # ratio at least 1 - this
    clip_high: float = 0.3  # ratio at most 1 + this
    dual_clip: float = 3.0  # bound of the loss at negative advantages, in advantages; 0: off
    kl_coef: float = 0.01  # weight of the KL to the initial model; 0: no reference model is kept
    skip_zero_std: bool = True  # do not forward groups whose rewards are all equal
    dynamic_sampling: int = (
        0  # rounds in which fresh prompts take the place of groups that tie, as in DAPO
    )
    lr: float = 3e-5  # AdamW, constant
    warmup_ratio: float = 0.0  # fraction of the steps
    weight_decay: float = 0.01  # not on norms and biases
    beta2: float = 0.999  # of AdamW; beta1 is 0.9
    max_grad_norm: float = 1.0  # gradients are clipped to this global norm; 0: not
    eval_every: int = 25  # steps between held-out evaluations, also at the end; 0: never
    eval_prompts: int = 64  # held-out prompts, fixed over the run
    show_every: int = 10  # steps between printed rollouts; 0: never
    save_every: int = 50  # steps between checkpoints with optimizer; 0: only the final one
    keep: int = 0  # newest of these that stay; 0: all
    resume: bool = False  # go on from the newest checkpoint in OUT


PRESETS = {
    "tabletop": {},
    "speedrun": {"steps": 80, "lr": 2e-5, "save_every": 0},
    # Paper section "RL": 12.8K samples, 1 epoch = 25 rollout steps of 4 updates of 640 completions.
    "paper": {
        "init": "runs/sft-paper/final",
        "data": "data/bridge",
        "out": "runs/grpo-paper",
        "steps": 25,
        "prompts": 512,
        "batch": 128,
        "group": 5,
        "micro_batch": 1,
        "rollout_batch": 16,
        "recompute": True,
        "max_new_tokens": 2048,
        "lr": 1e-6,
        "eval_every": 5,
        "eval_prompts": 512,
        "show_every": 1,
        "save_every": 5,
        "keep": 2,
    },
}


# Data


def prompt_rows(backbone, files, steps):
    """Thinking prompts at flat step indices over all files -> rows, targets (FAST ids of K actions)."""
    ends = np.cumsum([len(f) for f in files])
    rows, chunks = [], []
    for i in steps:
        file, t = locate_step(files, ends, i)
        prompt = model.action_prompt(file.task, think=True)
        row = model.encode(backbone, prompt, [file.frame(t)], prompt_only=True)
        rows.append(row | {"sample_id": f"{file.path}:{t}"})
        chunks.append(action_chunks(file, backbone.action_tokenizer.horizon)[t])  # (K, A)
    return rows, backbone.action_tokenizer.encode(np.stack(chunks)) if chunks else []


def sample_order(seed, n, numbers):
    """Which of n recorded steps the prompts `numbers` of the run are about: each step once, shuffled,
    before any comes again, as in an epoch of the paper."""
    shuffled = {e: model.rng(seed, "prompts", e).permutation(n) for e in {i // n for i in numbers}}
    return [int(shuffled[i // n][i % n]) for i in numbers]


# Reward


def common_subsequence(a, b):
    """Length of the longest common subsequence of two lists."""
    best = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            up = best[j + 1]
            best[j + 1] = diagonal + 1 if x == y else max(up, best[j])
            diagonal = up
    return best[-1]


def action_closeness(fast, made, targets):
    """exp(-L1 / 0.1) of decoded actions, L1 the mean over K x A in normalised units (range 2): (N,)."""
    made, ok = fast.decode(made)
    gold, _ = fast.decode(targets)  # (N, K, A)
    if fast.stats is not None:
        made, gold = normalize(made, fast.stats), normalize(gold, fast.stats)
    return np.where(ok, np.exp(-np.abs(made - gold).mean((1, 2)) / 0.1), 0.0)


def reward(backbone, ids, targets, kind="prefix", think=True):
    """r = (r_f + r_a) / 2 in [0, 1] (2603.21341, "Reward").

    ids: N lists of sampled token ids, without padding. targets: N lists of FAST ids. kind: prefix,
    l1 or lcs. think=False scores direct answers, where r_f asks for no thought.
    -> (r (N,) float64, {"r_f", "r_a", "tags", "markers", "decodes": (N,) float64}): tags are in
    place, one run of FAST tokens stands between the marks, and it decodes to K x A coefficients;
    r_f is all of them (and that nothing stands around them). r_a is 0 where r_f is 0."""
    tags, markers, form, made = [], [], [], []
    shape = re.compile(
        r"\s*<think>.*\S.*</think>\s*<answer>.*</answer>\s*<\|im_end\|>"
        if think
        else r".*<answer>.*</answer>\s*<\|im_end\|>",
        re.DOTALL,
    )
    v = backbone.vocab
    known = {*v.fast, v.action_start, v.action_end}
    for row in ids:
        good, thought, fast_ids = model.parse_actions(backbone, row)
        at = [j for j, t in enumerate(row) if t in known]
        tags.append(
            bool(shape.fullmatch(backbone.tokenizer.decode(row, skip_special_tokens=False)))
        )
        markers.append(
            len(at) == len(fast_ids) + 2 > 2
            and at[-1] - at[0] == len(at) - 1
            and row[at[0]] == v.action_start
            and row[at[-1]] == v.action_end
        )
        form.append(good and (thought or not think))
        made.append(fast_ids)
    _, decodes = backbone.action_tokenizer.decode(made)
    r_f = np.array(form, bool) & decodes
    # fork point: another measure of how close an action is. The prefix is the paper's, and brittle:
    # one early coefficient off by a rounding step and nothing after it counts.
    if kind == "prefix":
        near = [model.prefix_reward(a, b) for a, b in zip(made, targets)]
    elif kind == "lcs":
        near = [common_subsequence(a, b) / max(len(a), len(b), 1) for a, b in zip(made, targets)]
    elif kind == "l1":
        near = action_closeness(backbone.action_tokenizer, made, targets)
    else:
        raise ValueError(f"reward {kind!r} is unknown; choose prefix, l1 or lcs")
    r_a = np.where(r_f, np.asarray(near, np.float64), 0.0)
    info = {"r_f": r_f, "r_a": r_a, "tags": tags, "markers": markers, "decodes": decodes}
    return (r_f + r_a) / 2, {k: np.asarray(x, np.float64) for k, x in info.items()}


def advantage(r, kind="grpo"):
    """r (B, G) -> advantages (B, G), and which groups tie (B,) bool.

    grpo: (r - mean) / (std + 1e-6), std over G - 1 as in the paper's framework; drgrpo: r - mean
    (2503.20783), since the std weighs up groups that are nearly all right or all wrong."""
    ties = r.amax(1) - r.amin(1) < 1e-6
    adv = r - r.mean(1, keepdim=True)
    if kind == "grpo":
        adv = adv / ((adv.square().sum(1, keepdim=True) / max(r.shape[1] - 1, 1)).sqrt() + 1e-6)
    return adv.masked_fill(ties[:, None], 0.0), ties  # rounding is no signal


# Loss


def policy_loss(
    logp,
    old_logp,
    adv,
    mask,
    ref_logp=None,
    clip_low=0.2,
    clip_high=0.3,
    dual_clip=3.0,
    kl_coef=0.01,
):
    """Clipped policy gradient with KL, summed over tokens; fp32.

    logp, old_logp (at sampling), ref_logp (None: no KL), mask (1 on sampled tokens) (N, T); adv (N, 1)
    or (N, T). -> (loss summed over counted tokens, {"clip_fraction": tokens whose gradient is clipped away,
    "kl": summed k3}), to be divided by the token count of all ranks."""
    mask = mask.bool()
    log_ratio = (logp - old_logp).clamp(-20, 20)  # e^20 is finite, and long since clipped
    ratio = log_ratio.exp()
    free, bound = ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv
    loss = -torch.minimum(free, bound)
    clipped = bound < free
    if (
        dual_clip > 0
    ):  # a token grown likely though bad: its loss, and gradient, is bounded (1912.09729)
        worst = torch.where(adv < 0, -dual_clip * adv, torch.inf)
        clipped = clipped | (loss > worst)
        loss = torch.minimum(loss, worst)
    k3 = torch.zeros_like(loss)
    if ref_logp is not None:  # E[k3] = KL(policy || reference), and never negative
        gap = (ref_logp - logp).clamp(-20, 20)
        k3 = gap.exp() - gap - 1
    loss = torch.where(mask, loss + kl_coef * k3, 0.0).sum()
    return loss, {
        "clip_fraction": (clipped & mask).sum(),
        "kl": torch.where(mask, k3.detach(), 0.0).sum(),
    }


class SharedKV(DynamicLayer):
    """Keys and values of one layer in an update with gradient: a pass over the prompts keeps
    theirs, a second one (given `prompt`) lets the n completions of each see them. Nothing else is
    stored, so that activation checkpointing may call update() again."""

    def __init__(self, prompt=None, n=1):
        super().__init__()
        self.prompt, self.n = prompt, n

    def update(self, k, v, *args, **kwargs):
        if self.prompt is None:
            if self.keys is None:  # later ones are a recomputation's, which has no graph
                self.keys, self.values = k, v
            return k, v
        pairs = (self.prompt.keys, k), (self.prompt.values, v)
        return tuple(torch.cat([old.repeat_interleave(self.n, 0), x], 2) for old, x in pairs)

    def get_seq_length(self):
        return 0 if self.prompt is None else self.prompt.keys.shape[2]


def token_logp(net, rows, ids, temperature=1.0, banned=()):
    """rows (N, D) hidden states, ids (N,) -> logp (N,), entropy (N,), fp32 nats, no gradient in the
    entropy. banned: ids of probability 0, as in `generate`."""

    def score(logits, ids):  # logits (n, V): each pass over them that can be spared is
        logits = logits if temperature == 1 else logits / temperature
        if len(banned):
            logits.index_fill_(-1, torch.as_tensor(banned, device=logits.device), -1e9)
        all_logp = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(all_logp.exp() * all_logp).sum(-1)
        return all_logp.gather(-1, ids[:, None])[:, 0], entropy

    return model.score_in_slices(net, score, rows, ids)


def completion_logp(backbone, rows, ids, mask, temperature=1.0):
    """Log-probabilities of G completions of each of B prompts, a prompt forwarded once, with gradient.

    rows: B prompts; ids, mask (B*G, T) padded right, completion g of prompt b in row b*G + g.
    -> logp, entropy (B*G, T) fp32, 0 where mask is 0. Equals forwarding B*G full rows."""
    device, (N, T), G = ids.device, ids.shape, len(ids) // len(rows)
    batch = model.to_device(model.collate(rows, backbone.vocab.pad, left=True), device)
    kv = [SharedKV() for _ in backbone.net.model.language_model.layers]
    last = model.hidden_states(backbone.net, batch, Cache(layers=kv))[
        :, -1
    ]  # (B, D), predicts the first token
    first = (batch["positions"].amax((0, 2)) + 1).repeat_interleave(G)  # (B*G,) M-RoPE of token 0
    S = max(T - 1, 1)  # the last token predicts nothing, but all ranks forward something
    after = {
        "ids": ids[:, :S],
        "positions": (first[:, None] + torch.arange(S, device=device)).expand(3, N, S),
        "mask": torch.cat([batch["mask"].repeat_interleave(G, 0), mask[:, :S]], 1),
    }
    seen = Cache(layers=[SharedKV(prompt, G) for prompt in kv])
    h = model.hidden_states(backbone.net, after, seen)  # (B*G, S, D)
    h = torch.cat([last.repeat_interleave(G, 0)[:, None], h[:, : T - 1]], 1)  # (B*G, T, D)
    on = mask.bool()
    logp, entropy = token_logp(backbone.net, h[on], ids[on], temperature, backbone.vocab.banned)
    zero = torch.zeros(N, T, device=device)
    return zero.masked_scatter(on, logp), zero.masked_scatter(on, entropy)


# Rollout and update

METRICS = (
    "reward",
    "r_f",
    "r_a",
    "tags",
    "markers",
    "decodes",
    "frac_reward_zero_std",
    "completion_length",
    "truncated",
    "distinct_thoughts",
    "distinct_actions",
)


@dataclass
class Group:
    """One prompt and its G completions, padded right to the longest."""

    row: dict
    ids: torch.Tensor  # (G, T) long
    mask: torch.Tensor  # (G, T) long
    logp: torch.Tensor  # (G, T) fp32, at sampling
    adv: torch.Tensor  # (G,) fp32
    zero_std: bool


def rollout(backbone, cfg, rows, targets, keys, seed, G, greedy=False):
    """Samples and scores G completions of each of this rank's prompts; keys: one int a prompt.

    -> groups, {metric: [sum, count]} over completions or groups, a text to show. Distinct thoughts
    and actions: different ones / G, 1 when all differ: falling, they show a collapse."""
    if not rows:
        return [], {k: [0.0, 0] for k in METRICS}, ""
    out = model.generate(
        backbone,
        rows,
        G,
        cfg.max_new_tokens,
        cfg.temperature,
        greedy=greedy,
        seed=seed,
        keys=keys,
        rollout_batch=cfg.rollout_batch,
        cuda_graphs=None if cfg.cuda_graphs else False,
    )
    ids = [i[m].tolist() for i, m in zip(out["ids"].cpu(), out["mask"].bool().cpu())]
    gold = [t for t in targets for _ in range(G)]
    r, info = reward(backbone, ids, gold, cfg.reward)
    adv, ties = advantage(torch.tensor(r, dtype=torch.float32).view(-1, G), cfg.advantage)
    texts, known, groups = [backbone.tokenizer.decode(i) for i in ids], set(backbone.vocab.fast), []
    for b, row in enumerate(rows):
        mine = slice(b * G, b * G + G)
        T = int(out["mask"][mine].sum(1).max())
        groups.append(
            Group(
                row,
                *(out[k][mine, :T] for k in ("ids", "mask", "logp")),
                adv[b].to(out["ids"].device),
                bool(ties[b]),
            )
        )
    kinds = {
        "distinct_thoughts": [t.split("<answer>")[0] for t in texts],
        "distinct_actions": [tuple(t for t in i if t in known) for i in ids],
    }
    values = {
        "reward": r,
        **info,
        "frac_reward_zero_std": ties.tolist(),
        "completion_length": [len(i) for i in ids],
        "truncated": [i[-1] != backbone.vocab.eos for i in ids],
        **{k: [len(set(x[i : i + G])) / G for i in range(0, len(x), G)] for k, x in kinds.items()},
    }
    sums = {k: [float(np.sum(values[k])), len(values[k])] for k in METRICS}
    return groups, sums, f"{texts[0]!r} r {r[0]:.3f}, target {model.action_answer(gold[0])}"


def means(sums):
    """{metric: [sum, count]} of this rank -> means over all ranks."""
    total = all_sum([x for pair in sums.values() for x in pair])
    return {k: total[2 * i] / max(total[2 * i + 1], 1) for i, k in enumerate(sums)}


def group_loss(backbone, ref, groups, cfg):
    """Loss of some groups summed over their tokens, and the sums that are logged."""
    T = max(g.ids.shape[1] for g in groups)
    ids, mask, old = (
        torch.cat([pad(getattr(g, k), (0, T - g.ids.shape[1])) for g in groups])
        for k in ("ids", "mask", "logp")
    )  # (B*G, T)
    adv = torch.cat([g.adv for g in groups])[:, None]  # (B*G, 1)
    rows, ref_logp = [g.row for g in groups], None
    if ref is not None:
        with torch.no_grad():
            ref_logp, _ = completion_logp(ref, rows, ids, mask, cfg.temperature)
    logp, entropy = completion_logp(backbone, rows, ids, mask, cfg.temperature)
    # fork point: the objective. `old` is what the sampler said, so the first update is on-policy.
    loss, sums = policy_loss(
        logp, old, adv, mask, ref_logp, cfg.clip_low, cfg.clip_high, cfg.dual_clip, cfg.kl_coef
    )
    return loss, {**sums, "entropy": entropy.sum(), "forwarded": mask.sum()}


def update(backbone, ref, optim, groups, cfg, dist, where):
    """One optimiser step on this rank's groups of an update batch. -> sums over all ranks.

    All ranks run as many forwards as the one with the most groups left: a rank that has none
    forwards one token that does not count, since under FSDP each pass is collective."""
    live = [g for g in groups if not (g.zero_std and cfg.skip_zero_std)]
    rounds = -(-len(live) // cfg.micro_batch)
    tokens, *rounds = all_sum(
        [
            sum(int(g.mask.sum()) for g in groups),
            *(rounds * (r == dist.rank) for r in range(dist.world_size)),
        ]
    )
    # Token mean, or (Dr. GRPO) a constant, so that long completions are not weighed down.
    count = tokens if cfg.advantage == "grpo" else cfg.batch * cfg.group * cfg.max_new_tokens
    first, sums = groups[0], Counter()
    idle = replace(
        first,
        ids=first.ids[:, :1],
        logp=first.logp[:, :1],
        mask=torch.zeros_like(first.mask[:, :1]),
    )
    guard = partial(
        model.stop_if_not_finite,
        cfg.out,
        where,
        dist,
        (
            vars(g)
            | {f"prompt_{k}": x for k, x in g.row.items()}
            | {"sample_id": [g.row.get("sample_id", "")]}
            for g in groups
        ),
    )
    for i in range(int(max(rounds))):
        some = live[i * cfg.micro_batch : (i + 1) * cfg.micro_batch] or [idle]
        loss, info = group_loss(backbone, ref, some, cfg)
        guard("loss", loss.item())
        (loss * dist.world_size / count).backward()  # FSDP averages over ranks
        sums.update({k: float(x.detach()) for k, x in {"loss": loss, **info}.items()})
    if (
        not sums
    ):  # every group of every rank tied: nothing to learn from, and no weight decay either
        return {}
    norm = model.clip_gradients(backbone.net.parameters(), cfg.max_grad_norm)
    guard("gradient norm", norm)
    optim.step()
    optim.zero_grad()
    total = dict(zip(sums, all_sum(list(sums.values()))))
    return {**total, "loss": total["loss"] / count, "grad_norm": norm, "updates": 1}


def evaluate(backbone, cfg, rows, targets, dist):
    """Held-out reward, greedy and sampled; the same prompts and draws each time."""
    keys, found = range(dist.rank, cfg.eval_prompts, dist.world_size), {}
    for name, G in (("greedy", 1), ("sampled", cfg.group)):
        _, sums, _ = rollout(
            backbone, cfg, rows, targets, keys[: len(rows)], cfg.seed + 1, G, G == 1
        )
        mean = means(sums)
        found |= {f"eval_{name}_{k}": mean[k] for k in ("reward", "r_f", "r_a")}
    return found


# Main


def check_config(cfg):
    """ValueError naming the cure when the settings do not fit together."""
    if cfg.batch < 1 or cfg.prompts % cfg.batch:
        raise ValueError(f"--prompts {cfg.prompts} must be a multiple of --batch {cfg.batch}")
    if cfg.group < 2 or cfg.micro_batch < 1:
        raise ValueError(
            f"--group {cfg.group}; an advantage needs at least 2 completions, and "
            f"--micro-batch {cfg.micro_batch} at least 1 prompt"
        )
    if cfg.advantage not in ("grpo", "drgrpo") or cfg.reward not in ("prefix", "l1", "lcs"):
        raise ValueError(
            f"--advantage {cfg.advantage} --reward {cfg.reward}; choose grpo or drgrpo, and prefix, l1 or lcs"
        )


def prepare(cfg, dist):
    """-> Backbone and reference (sharded), optimizer, episode files (trained on, held out), first
    step. ValueError when checkpoint and data do not fit."""
    newest = model.checkpoint_to_resume(cfg)
    backbone = model.load(
        newest or cfg.init, dist.build, stages=("sft", "grpo"), max_pixels=cfg.max_pixels
    )
    if backbone.action_tokenizer is None:
        raise ValueError(
            f"{newest or cfg.init}: no fast/ in this checkpoint, so it knows no action "
            "tokens; run sft.py on episodes with --fast"
        )
    files, unseen = split_episodes(
        read_episodes(cfg.data, fast=backbone.action_tokenizer)
    )  # unseen by sft.py too
    if cfg.recompute:
        model.recompute_activations(backbone.net)
    model.shard(backbone.net, dist)
    ref = None
    if cfg.kl_coef > 0:  # always the model RL started from, also after --resume
        ref = model.load(cfg.init, dist.build)
        model.shard(ref.net.requires_grad_(False).eval(), dist, offload=cfg.cpu_offload)
    optim = model.make_optimizer(backbone.net, cfg.lr, cfg.weight_decay, (0.9, cfg.beta2))
    start, _ = model.load_train_state(newest, backbone.net, optim)
    return backbone, ref, optim, files, unseen, start


def main(argv=None):
    cfg = model.parse_config(Config, PRESETS, argv)
    dist = model.setup(cfg.seed, cfg.shards, cfg.batch)
    check_config(cfg)
    backbone, ref, optim, files, unseen, start = prepare(cfg, dist)
    n, n_unseen = sum(map(len, files)), sum(map(len, unseen))
    spaced = np.linspace(0, n_unseen - 1, cfg.eval_prompts).astype(int)
    eval_rows, eval_targets = prompt_rows(backbone, unseen, spaced[dist.rank :: dist.world_size])
    run = {"stage": "grpo", "config": asdict(cfg), "parent": cfg.init}
    write = partial(model.save, what=backbone, optim=optim)
    log = model.Log(cfg.out, cfg, dist)

    for step in range(start, cfg.steps + 1):
        if cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps):
            with model.unsharded(backbone.net):
                log.write(step=step, **evaluate(backbone, cfg, eval_rows, eval_targets, dist))
        if step == cfg.steps:
            break
        began = time.perf_counter()
        at = range(step * cfg.prompts + dist.rank, (step + 1) * cfg.prompts, dist.world_size)
        rows, targets = prompt_rows(backbone, files, sample_order(cfg.seed, n, at))
        with model.unsharded(backbone.net):
            groups, sums, shown = rollout(backbone, cfg, rows, targets, at, cfg.seed, cfg.group)
            for again in range(
                1, cfg.dynamic_sampling + 1
            ):  # dynamic sampling: 2503.14476, section 3.2
                tied = [k for k, g in enumerate(groups) if g.zero_std]
                fresh = [at[k] + (again << 40) for k in tied]  # numbers that no step comes to
                new, more, _ = rollout(
                    backbone,
                    cfg,
                    *prompt_rows(backbone, files, sample_order(cfg.seed, n, fresh)),
                    fresh,
                    cfg.seed,
                    cfg.group,
                )
                for k, group in zip(tied, new):
                    groups[k] = group
                sums = {k: [a + b for a, b in zip(sums[k], more[k])] for k in sums}
        rolled = time.perf_counter()

        for params in optim.param_groups:
            params["lr"] = model.learning_rate(
                step, cfg.steps, cfg.lr, cfg.warmup_ratio, "constant"
            )
        backbone.net.train()
        total, share = Counter(), cfg.batch // dist.world_size
        for u in range(0, len(groups), share):
            total.update(
                update(
                    backbone,
                    ref,
                    optim,
                    groups[u : u + share],
                    cfg,
                    dist,
                    f"step {step}, update {u // share}",
                )
            )
        ended, done, mean = time.perf_counter(), step + 1, means(sums)
        # The loss is no sign of progress: at the first update of a rollout it is near 0 whatever the
        # policy does. Watch held-out r_a; and ties, entropy and distinct actions for a collapse.
        updates, seen = max(total["updates"], 1), max(total["forwarded"], 1)
        log.write(
            step=done,
            **mean,
            **{k: total[k] / seen for k in ("clip_fraction", "kl", "entropy")},
            loss=total["loss"] / updates,
            grad_norm=total["grad_norm"] / updates,
            updates=total["updates"],
            lr=optim.param_groups[0]["lr"],
            rollout_s=rolled - began,
            update_s=ended - rolled,
            tokens_per_s=all_sum(sums["completion_length"][0]) / (ended - began),
        )
        if cfg.show_every and done % cfg.show_every == 0:
            log.write(step=done, rollout=shown)
        model.save_step(cfg, done, run, write)
    model.save(Path(cfg.out) / "final", backbone, {**run, "step": cfg.steps})


if __name__ == "__main__":
    model.run_main(main, "--micro-batch, or --rollout-batch if it was in a rollout")
