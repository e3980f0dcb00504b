"""Stage 2 of RoboAlign (arXiv 2603.21341): GRPO. Think in words, then act; learn from both.

In: a checkpoint of sft.py (with its FAST tokenizer) and recorded episodes.
Out: the same model with all weights trained, whose thoughts lead to better action tokens.
1. draw prompts (image, instruction) at recorded steps; target: the FAST ids of the next K actions
2. sample G completions of each: <think>words</think><answer>action tokens</answer>
3. reward (r_f + r_a) / 2: r_f well formed and decodable, r_a common prefix with target / max(m, n)
4. advantage of a completion: (r - mean) / (std + 1e-6) in its group of G (GRPO, 2402.03300)
5. a few updates a rollout, each on its own prompts: clipped ratio, dual clip, mean over tokens
6. + 0.01 x KL (k3) to the model that RL started from, in the loss; repeat
Our deviations: r_a is over max(m, n), the paper's over the target's m, so surplus tokens cost; and
it is 0 where r_f is 0. Groups whose rewards are all equal are not forwarded (--no-skip-zero-std
does): they get no gradient of the KL either, while their tokens stay in the mean's divisor. The G
completions of a prompt share its keys and values, in sampling and update: same gradients. A first
reader may skip the section "Log-probabilities".

Reads --init, --data. Writes runs/grpo/{log.jsonl, step_*/, final/}.
python grpo.py                                   # tabletop, one CPU process
torchrun --nproc_per_node 2 grpo.py              # 2 CPU processes, 2 s a step; or 2 GPUs
torchrun --nproc_per_node 8 grpo.py paper        # 8 GPUs; took the authors about 1 h"""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fast_tokenizer import (
    BelowOne,
    Count,
    EpisodeFile,
    FastTokenizer,
    Natural,
    NonNegative,
    Positive,
    Share,
    action_chunks,
    answer_help,
    chunk_ends,
    episodes_sha256,
    join_splits,
    locate_step,
    normalize,
    read_episodes,
    split_episodes,
    split_record,
    warn_of_other_split,
)

if __name__ == "__main__":
    answer_help(__file__)  # --help ends here, before torch and transformers take their seconds

import torch
from torch import distributed, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer

import model
from model import Backbone, Dist, Row, all_sum


@dataclass(frozen=True)
class Config:
    preset: str = ""
    # what is read and written
    init: str = "runs/sft/final"  # checkpoint of stage sft, or grpo to go on from it as a new run
    data: str = "data/tabletop/episodes"  # folder of episodes; 5% of them are held out
    out: str = "runs/grpo"  # folder of checkpoints and log
    # rollouts
    seed: Natural = 0  # prompts and samples are a function of (seed, step, index)
    steps: Natural = 100  # rollout steps
    prompts: Count = 32  # prompts a rollout step, all ranks together
    group: Count = 8  # completions a prompt (G)
    max_new_tokens: Count = 96  # longest completion
    temperature: Positive = 1.0  # of sampling and of the log-probabilities in the loss
    dynamic_sampling: Natural = 0  # rounds of fresh prompts for groups with equal rewards (DAPO)
    max_pixels: Natural = 0  # larger images are shrunk to so many pixels; 0: as the backbone says
    # reward and objective
    reward: str = "prefix"  # r_a, one of REWARDS
    advantage: str = "grpo"  # grpo, or drgrpo: no std, and a constant in place of the token count
    credit: str = "all"  # tokens that r_a's advantage reaches: all, or prefix: to the first wrong
    clip_low: NonNegative = 0.2  # ratio at least 1 - this
    clip_high: NonNegative = 0.3  # ratio at most 1 + this
    dual_clip: NonNegative = 3.0  # loss at most this x |A| where the advantage A < 0; 0: off
    kl_coef: NonNegative = 0.01  # weight of the KL to the initial model; 0: none is kept
    recompute_old_logp: bool = False  # ratios to the update's own log-probs, not the sampler's
    skip_zero_std: bool = True  # do not forward groups whose rewards are all equal
    # optimizer
    batch: Count = 16  # prompts an update, all ranks together; prompts / batch updates a step
    lr: Positive = 3e-5  # AdamW, constant
    warmup_ratio: Share = 0.0  # share of the steps
    weight_decay: NonNegative = 0.01  # not on norms and biases
    beta2: BelowOne = 0.999  # of AdamW; beta1 is 0.9
    max_grad_norm: NonNegative = 1.0  # gradients are clipped to this global norm; 0: not
    # does not affect results, but for rounding
    micro_batch: Count = 8  # prompts a rank forwards and backwards at once; lower it for memory
    rollout_batch: Natural = 0  # prompts a rank samples at once, of like length; 0: all it has
    cuda_graphs: bool = True  # on a GPU, replay decoding steps as CUDA graphs
    recompute: bool = False  # activation checkpointing: less memory, a third more time an update
    cpu_offload: bool = False  # keep the reference model in the CPU's memory
    shards: Natural = 0  # ranks that share a copy of the weights, others mirror it; 0: all
    timeout_hours: Positive = 6.0  # ranks wait so long for the slowest, as when it downloads
    eval_every: Natural = 25  # steps between held-out evaluations, also at the end; 0: never
    eval_prompts: Count = 64  # held-out prompts, fixed over the run; at most one a step
    show_every: Natural = 10  # steps between printed rollouts; 0: never
    save_every: Natural = 50  # steps between checkpoints with optimizer; 0: only the final one
    keep: Natural = 0  # newest of these that stay; 0: all
    resume: bool = False  # go on from the newest checkpoint in OUT
    changed_data: bool = False  # --resume although the episodes have changed


PRESETS = {
    "tabletop": {},
    "speedrun": {"steps": 80, "lr": 2e-5, "save_every": 0},
    # Paper section "RL": 12.8K samples, 1 epoch = 25 rollout steps of 4 updates of 640 completions.
    "paper": {
        "init": "runs/sft-paper/final", "data": "data/bridge", "out": "runs/grpo-paper",
        "steps": 25, "prompts": 512, "batch": 128, "group": 5, "max_new_tokens": 2048, "lr": 1e-6,
        "micro_batch": 4, "rollout_batch": 32, "recompute": True,
        "eval_every": 5, "eval_prompts": 512, "show_every": 1, "save_every": 5, "keep": 2,
    },
}  # fmt: skip


# ---- Data ----------------------------------------------------------------------------------------


def prompt_rows(
    backbone: Backbone, episodes: Sequence[EpisodeFile], frames: Sequence[int]
) -> tuple[list[Row], list[list[int]]]:
    """Thinking prompts about `frames`, counted through all episodes -> rows, targets (action ids of
    the K actions that follow). No frames, no prompts: a rank may have none."""
    horizon = backbone.action_tokenizer.horizon
    episode_ends = chunk_ends(episodes, horizon)
    rows, chunks = [], []
    for frame in frames:
        episode, t = locate_step(episodes, episode_ends, frame)
        prompt = model.action_prompt(episode.task, think=True)
        row = model.encode(backbone, prompt, [episode.frame(t)], prompt_only=True)
        rows.append(row | {"sample_id": f"{episode}:{t}"})
        chunks.append(action_chunks(episode, horizon)[t])  # (K, A)
    if not rows:
        return [], []
    return rows, backbone.action_tokenizer.encode(np.stack(chunks))


def prompt_frames(seed: int, n: int, prompt_numbers: Sequence[int]) -> list[int]:
    """Which of n recorded frames each prompt is about. The prompts of a run are numbered: step *
    cfg.prompts + index in the step. Each frame comes once, shuffled, before any comes again, as in
    an epoch of the paper."""
    epochs = {number // n for number in prompt_numbers}
    shuffled = {epoch: model.rng(seed, "prompts", epoch).permutation(n) for epoch in epochs}
    return [int(shuffled[number // n][number % n]) for number in prompt_numbers]


# ---- Reward --------------------------------------------------------------------------------------


# fork point: the reward. r_a is a function (action tokenizer, N generated and N target lists of
# action ids) -> (N,) in [0, 1], with a name in REWARDS, which --reward and evaluate.py take.
IdLists = list[list[int]]


def prefix_rewards(_: FastTokenizer, generated: IdLists, targets: IdLists) -> np.ndarray:
    """Common prefix over the longer of the two (the paper: over the target). Brittle: one early
    coefficient that is off by a rounding step, and nothing after it counts."""
    return np.array([model.prefix_reward(a, b) for a, b in zip(generated, targets, strict=True)])


def action_closeness(
    action_tokenizer: FastTokenizer, generated: IdLists, targets: IdLists
) -> np.ndarray:
    """exp(-L1 / 0.1) of decoded actions, L1 the mean over K x A in normalised units (range 2); 0
    where they do not decode."""
    actions, decodes = action_tokenizer.decode(generated)
    target_actions, _ = action_tokenizer.decode(targets)  # (N, K, A)
    return np.where(decodes, closeness(action_tokenizer, actions, target_actions), 0.0)


def closeness(action_tokenizer: FastTokenizer, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(-L1 / 0.1) between chunks a and b (N, K, A) -> (N,); NaN where one is."""
    if action_tokenizer.stats is not None:
        a = normalize(a, action_tokenizer.stats)
        b = normalize(b, action_tokenizer.stats)
    return np.exp(-np.abs(a - b).mean((1, 2)) / 0.1)


def ladder_rewards(
    action_tokenizer: FastTokenizer, generated: IdLists, targets: IdLists
) -> np.ndarray:
    """The prefix reward with a soft "equal": the mean, over k up to the longer of the two, of
    exp(-L1 / 0.1) between what the first k tokens of each decode to, later coefficients 0. A rung
    for each token, low frequencies first (OAT, 2602.04215); a near miss early is not the end."""
    ours, theirs, counts = [], [], []
    for a, b in zip(generated, targets, strict=True):
        rungs = max(len(a), len(b))
        ours += [a[:k] for k in range(1, rungs + 1)]
        theirs += [b[:k] for k in range(1, rungs + 1)]
        counts.append(rungs)
    if not ours:
        return np.zeros(len(generated))
    our_actions, _ = action_tokenizer.decode(ours, partial=True)
    their_actions, _ = action_tokenizer.decode(theirs, partial=True)
    values = closeness(action_tokenizer, our_actions, their_actions)
    rungs_of_each = np.split(np.nan_to_num(values), np.cumsum(counts)[:-1])
    return np.array([rungs.mean() if len(rungs) else 0.0 for rungs in rungs_of_each])


def subsequence_rewards(_: FastTokenizer, generated: IdLists, targets: IdLists) -> np.ndarray:
    """Longest common subsequence over the longer of the two."""
    rewards = []
    for a, b in zip(generated, targets, strict=True):
        rewards.append(common_subsequence(a, b) / max(len(a), len(b), 1))
    return np.array(rewards)


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence of two lists."""
    best = [0] * (len(b) + 1)  # of what was read of a, with the first j of b
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            above = best[j + 1]
            best[j + 1] = diagonal + 1 if x == y else max(above, best[j])
            diagonal = above
    return best[-1]


REWARDS = {
    "prefix": prefix_rewards,
    "ladder": ladder_rewards,
    "l1": action_closeness,
    "lcs": subsequence_rewards,
}


def reward(
    backbone: Backbone,
    token_ids: list[list[int]],
    targets: list[list[int]],
    kind: str = "prefix",
    think: bool = True,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """r = (r_f + r_a) / 2 in [0, 1] (2603.21341, "Reward").

    token_ids: N sampled sequences, without padding. targets: N lists of action ids. kind: one of
    REWARDS. think=False scores direct answers (evaluate.py), where r_f asks for no thought.
    -> r (N,) float64, and {"r_f", "r_a", "tags", "markers", "decodes"}: (N,) float64 each."""
    if kind not in REWARDS:
        raise ValueError(f"reward {kind!r} is unknown; choose one of {', '.join(REWARDS)}")
    parsed = [model.parse_actions(backbone, sequence) for sequence in token_ids]
    generated = [answer.action_ids for answer in parsed]
    _, decodes = backbone.action_tokenizer.decode(generated)
    r_f = format_reward(parsed, decodes, think)
    r_a = np.asarray(REWARDS[kind](backbone.action_tokenizer, generated, targets), np.float64)
    r_a = np.where(r_f, r_a, 0.0)  # ours: a malformed answer earns nothing, whatever its tokens
    diagnostics = format_diagnostics(backbone, token_ids, parsed, think)
    diagnostics["decodes"] = decodes.astype(np.float64)
    return (r_f + r_a) / 2, {"r_f": r_f, "r_a": r_a, **diagnostics}


def format_reward(parsed: list[model.ParsedAnswer], decodes: np.ndarray, think: bool) -> np.ndarray:
    """r_f (N,), 0 or 1: well formed, with a thought if one was asked for, and tokens that decode to
    K x A coefficients."""
    # has_thought implies well_formed
    has_format = [answer.has_thought if think else answer.well_formed for answer in parsed]
    return (np.array(has_format, bool) & decodes).astype(np.float64)


WITH_THOUGHT = re.compile(
    r"\s*<think>.*\S.*</think>\s*<answer>.*</answer>\s*<\|im_end\|>", re.DOTALL
)
WITHOUT_THOUGHT = re.compile(r".*<answer>.*</answer>\s*<\|im_end\|>", re.DOTALL)


def format_diagnostics(backbone, token_ids, parsed, think) -> dict[str, np.ndarray]:
    """What a format that fails still has right: "tags" in place; "markers",
    one run of FAST tokens between ACTION_START and ACTION_END and none elsewhere. (N,) each."""
    vocab = backbone.vocab
    action_tokens = {*vocab.fast, vocab.action_start, vocab.action_end}
    tag_pattern = WITH_THOUGHT if think else WITHOUT_THOUGHT
    tags, markers = [], []
    for sequence, answer in zip(token_ids, parsed, strict=True):
        text = backbone.tokenizer.decode(sequence, skip_special_tokens=False)
        tags.append(bool(tag_pattern.fullmatch(text)))
        places = [i for i, token in enumerate(sequence) if token in action_tokens]
        is_one_run = len(places) > 2 and places[-1] - places[0] == len(places) - 1
        markers.append(
            is_one_run
            and len(places) == len(answer.action_ids) + 2
            and sequence[places[0]] == vocab.action_start
            and sequence[places[-1]] == vocab.action_end
        )
    return {"tags": np.array(tags, np.float64), "markers": np.array(markers, np.float64)}


def advantage(
    r: torch.Tensor, kind: str = "grpo", part: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """r (B, G) -> advantages (B, G), and which groups have no spread, zero_std (B,) bool.

    grpo: (r - mean) / (std + 1e-6), std over G - 1 as in the paper's framework; drgrpo: r - mean
    (2503.20783), since the std weighs up groups that are nearly all right or all wrong. part
    (B, G): what a summand of r adds to that, (part - its mean) / the std of r."""
    # fork point: the advantage. A new kind also goes into check_config().
    zero_std = r.amax(1) - r.amin(1) < 1e-6
    deviations = r - r.mean(1, keepdim=True)
    divisor = 1.0
    if kind == "grpo":
        degrees = max(r.shape[1] - 1, 1)  # G = 1: greedy evaluation
        variance = deviations.square().sum(1, keepdim=True) / degrees
        divisor = variance.sqrt() + 1e-6
    if part is not None:
        deviations = part - part.mean(1, keepdim=True)
    # else a rounding error over 1e-6 would pass for an advantage
    return (deviations / divisor).masked_fill(zero_std[:, None], 0.0), zero_std


def token_advantages(
    backbone: Backbone,
    token_ids: list[list[int]],
    targets: list[list[int]],
    advantages: torch.Tensor,
    format_part: torch.Tensor,
) -> list[torch.Tensor]:
    """--credit prefix: what follows the first wrong action token cannot change the prefix reward,
    so only the format's part of the advantage reaches it. Of a target 3 5 and advantage A:

        <think> ... <ACTION_START>  3  7  2  <ACTION_END></answer>
           A    ...       A         A  A  F    F           F        F: the format's part

    token_ids, targets: N sequences and lists of action ids; advantages, format_part (N,). -> N
    tensors, (T,) each. All of a malformed completion is credited."""
    result = []
    for i, (sequence, target) in enumerate(zip(token_ids, targets, strict=True)):
        answer = model.parse_actions(backbone, sequence)
        credited = len(sequence)
        if answer.well_formed:
            first_wrong = model.common_prefix(answer.action_ids, target)
            credited = sequence.index(backbone.vocab.action_start) + 1 + first_wrong + 1
        is_credited = torch.arange(len(sequence)) < credited
        result.append(torch.where(is_credited, advantages[i], format_part[i]))
    return result


# ---- Objective -----------------------------------------------------------------------------------


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ref_logp: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float = 3.0,
    kl_coef: float = 0.01,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy gradient with KL, summed over tokens; fp32.

    logp, old_logp (at sampling), ref_logp (None: no KL), mask (1 on sampled tokens) (N, T);
    advantages (N, 1) or (N, T). -> (loss summed over counted tokens, to be divided by their number
    on all ranks; {"clipped": number of tokens whose gradient is clipped away, "kl": summed k3})."""
    # fork point: the objective
    mask = mask.bool()
    # clipped surrogate
    log_ratio = (logp - old_logp).clamp(-20, 20)  # e^20 is finite
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -torch.minimum(unclipped, clipped)
    is_clipped = clipped < unclipped
    # dual clip (1912.09729): a token grown likely though bad has a bounded loss, and gradient
    if dual_clip > 0:
        bound = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        is_clipped = is_clipped | (loss > bound)
        loss = torch.minimum(loss, bound)
    # KL to the reference: E[k3] = KL(policy || reference), and k3 is never negative
    k3 = torch.zeros_like(loss)
    if ref_logp is not None:
        log_ref_ratio = (ref_logp - logp).clamp(-20, 20)
        k3 = log_ref_ratio.exp() - log_ref_ratio - 1
    loss = torch.where(mask, loss + kl_coef * k3, 0.0).sum()
    sums = {
        "clipped": (is_clipped & mask).sum(),
        "kl": torch.where(mask, k3.detach(), 0.0).sum(),
    }
    return loss, sums


# ---- Log-probabilities of completions ------------------------------------------------------------


class SharedKV(DynamicLayer):
    """Keys and values of one layer in an update with gradient. A pass over the prompts keeps
    theirs; in a second one (given `prompt`) the n completions of each see them, so that a prompt is
    forwarded once. What token 1 of a completion sees, of a prompt of 3 tokens padded to 4:

        prompt 0 1 1 1, own tokens 1 1 0

    Nothing else is stored, so that activation checkpointing may call update() again."""

    def __init__(self, prompt: "SharedKV | None" = None, n: int = 1):
        super().__init__()
        self.prompt = prompt
        self.n = n

    def update(self, k, v, *args, **kwargs):
        if self.prompt is None:
            if self.keys is None:  # the first pass's, through which gradients come back
                self.keys, self.values = k, v
            return k, v
        prompt_k = self.prompt.keys.repeat_interleave(self.n, 0)
        prompt_v = self.prompt.values.repeat_interleave(self.n, 0)
        return torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2)

    def get_seq_length(self):
        return 0 if self.prompt is None else self.prompt.keys.shape[2]


def token_logp(
    net: nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
) -> torch.Tensor:
    """hidden (N, D), ids (N,) -> log-probabilities (N,), fp32 nats. banned: ids of probability 0,
    as in model.generate."""

    def score(logits, ids):  # logits (n, V), in place where that spares a pass
        if temperature != 1:
            logits = logits / temperature
        if len(banned):
            logits.index_fill_(-1, torch.as_tensor(banned, device=logits.device), -torch.inf)
        return (logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0],)

    (logp,) = model.score_in_slices(net, score, hidden, ids)
    return logp


def completion_logp(
    backbone: Backbone,
    rows: list[Row],
    ids: torch.Tensor,
    mask: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-probabilities of G completions of each of B prompts, with gradient, a prompt forwarded
    once. Equals forwarding B * G full rows.

    rows: B prompts; ids, mask (B*G, T) padded right, completion g of prompt b in row b*G + g.
    -> (B*G, T) fp32, 0 where mask is 0."""
    (N, T), device = ids.shape, ids.device
    G = N // len(rows)
    # 1. the prompts; the last hidden state of each predicts the first token of its completions
    prompts = model.to_device(model.collate(rows, backbone.vocab.pad, left=True), device)
    prompt_kv = [SharedKV() for _ in backbone.net.model.language_model.layers]
    last = model.hidden_states(backbone.net, prompts, Cache(layers=prompt_kv))[:, -1]  # (B, D)
    # 2. the completions behind them
    S = max(T - 1, 1)  # the last token predicts nothing, but all ranks forward something
    first_position = (prompts["positions"].amax((0, 2)) + 1).repeat_interleave(G)  # (B*G,) M-RoPE
    positions = first_position[:, None] + torch.arange(S, device=device)  # (B*G, S)
    prompt_mask = prompts["mask"].repeat_interleave(G, 0)
    completions = {
        "ids": ids[:, :S],
        "positions": positions.expand(3, N, S),
        "mask": torch.cat([prompt_mask, mask[:, :S]], 1),
    }
    kv = Cache(layers=[SharedKV(layer, G) for layer in prompt_kv])
    hidden = model.hidden_states(backbone.net, completions, kv)  # (B*G, S, D)
    # 3. token t is predicted from position t - 1
    before = last.repeat_interleave(G, 0)[:, None]  # (B*G, 1, D)
    hidden = torch.cat([before, hidden[:, : T - 1]], 1)  # (B*G, T, D)
    counted = mask.bool()
    logp = token_logp(
        backbone.net, hidden[counted], ids[counted], temperature, backbone.vocab.banned
    )
    return torch.zeros(N, T, device=device).masked_scatter(counted, logp)


# ---- Rollout -------------------------------------------------------------------------------------


@dataclass
class Group:
    """One prompt and its G completions, padded right to the longest."""

    row: Row
    ids: torch.Tensor  # (G, T) long
    mask: torch.Tensor  # (G, T) long
    old_logp: torch.Tensor  # (G, T) fp32, at sampling; see recompute_old_logp
    advantages: torch.Tensor  # (G, T) fp32, of each token
    zero_std: bool  # all rewards are equal: no advantage


METRICS = [
    "reward", "r_f", "r_a", "tags", "markers", "decodes", "frac_reward_zero_std",
    "completion_length", "truncated", "distinct_thoughts", "distinct_actions", "entropy",
]  # fmt: skip
Sums = dict[str, list[float]]  # metric -> [sum, count] over completions, groups or tokens of a rank


def rollout(
    backbone: Backbone,
    cfg: Config,
    rows: list[Row],
    targets: list[list[int]],
    keys: Sequence[int],
    seed: int,
    G: int,
    greedy: bool = False,
) -> tuple[list[Group], Sums, str]:
    """Samples and scores G completions of each of this rank's prompts; keys: one int a prompt.
    -> groups, sums of METRICS, a text to show."""
    if not rows:
        return [], {name: [0.0, 0] for name in METRICS}, ""
    # 2. sample
    samples = model.generate(
        backbone,
        rows,
        G,
        cfg.max_new_tokens,
        cfg.temperature,
        greedy=greedy,
        seed=seed,
        keys=keys,
        rollout_batch=cfg.rollout_batch,
        cuda_graphs=cfg.cuda_graphs,
    )
    token_ids = []
    for ids, mask in zip(samples["ids"].cpu(), samples["mask"].bool().cpu(), strict=True):
        token_ids.append(ids[mask].tolist())
    # 3. and 4. score, compare within groups
    repeated_targets = [target for target in targets for _ in range(G)]
    r, diagnostics = reward(backbone, token_ids, repeated_targets, cfg.reward)
    by_group = torch.tensor(r, dtype=torch.float32).view(-1, G)
    advantages, zero_std = advantage(by_group, cfg.advantage)
    of_tokens = [a.expand(len(ids)) for a, ids in zip(advantages.flatten(), token_ids, strict=True)]
    if cfg.credit == "prefix":
        format_reward = torch.tensor(diagnostics["r_f"] / 2, dtype=torch.float32).view(-1, G)
        format_part, _ = advantage(by_group, cfg.advantage, format_reward)
        of_tokens = token_advantages(
            backbone, token_ids, repeated_targets, advantages.flatten(), format_part.flatten()
        )
    groups = []
    for b, row in enumerate(rows):
        completions = slice(b * G, b * G + G)
        T = int(samples["mask"][completions].sum(1).max())
        group = Group(
            row,
            ids=samples["ids"][completions, :T],
            mask=samples["mask"][completions, :T],
            old_logp=samples["logp"][completions, :T],
            advantages=pad_sequence(of_tokens[completions], True).to(samples["ids"].device),
            zero_std=bool(zero_std[b]),
        )
        groups.append(group)
    # -log p of what was sampled: its mean is the entropy, of all groups, and costs no forward
    surprise = -samples["logp"][samples["mask"].bool()].cpu()  # (tokens,)
    diagnostics["entropy"] = surprise.numpy()
    sums = rollout_metrics(backbone, token_ids, r, diagnostics, zero_std, G)
    text = backbone.tokenizer.decode(token_ids[0])
    target_text = model.action_answer(targets[0])
    return groups, sums, f"{text!r} r {r[0]:.3f}, target {target_text}"


def rollout_metrics(backbone, token_ids, r, diagnostics, zero_std, G) -> Sums:
    """Sums and counts of METRICS. Distinct thoughts and actions: different ones / G, 1 when all
    of a group differ; falling, they show a collapse."""
    fast = set(backbone.vocab.fast)
    thoughts, actions = [], []
    for sequence in token_ids:
        thoughts.append(backbone.tokenizer.decode(sequence).split("<answer>")[0])
        actions.append(tuple(token for token in sequence if token in fast))

    def distinct(items):
        groups = [items[i : i + G] for i in range(0, len(items), G)]
        return [len(set(group)) / G for group in groups]

    values = {
        "reward": r,
        **diagnostics,
        "frac_reward_zero_std": zero_std.tolist(),
        "completion_length": [len(sequence) for sequence in token_ids],
        "truncated": [sequence[-1] != backbone.vocab.eos for sequence in token_ids],
        "distinct_thoughts": distinct(thoughts),
        "distinct_actions": distinct(actions),
    }
    return {name: [float(np.sum(values[name])), len(values[name])] for name in METRICS}


def add_sums(a: Sums, b: Sums) -> Sums:
    return {name: [a[name][0] + b[name][0], a[name][1] + b[name][1]] for name in a}


def means(sums: Sums) -> dict[str, float]:
    """Sums of this rank -> means over all ranks."""
    flat = []
    for pair in sums.values():
        flat += pair
    total = all_sum(flat)
    return {name: total[2 * i] / max(total[2 * i + 1], 1) for i, name in enumerate(sums)}


def replace_zero_std_groups(backbone, cfg, episodes, groups, prompt_numbers, sums) -> Sums:
    """Dynamic sampling (DAPO, 2503.14476, section 3.2): fresh prompts take the place of groups
    with equal rewards, in `groups` itself, up to cfg.dynamic_sampling times. -> sums, in which the
    replaced groups count too."""
    frame_count = int(chunk_ends(episodes, backbone.action_tokenizer.horizon)[-1])
    for again in range(1, cfg.dynamic_sampling + 1):
        places = [i for i, group in enumerate(groups) if group.zero_std]
        # prompt numbers that no step reaches: other shuffles and draws, so a frame may come again
        fresh_numbers = [prompt_numbers[i] + (again << 40) for i in places]
        frames = prompt_frames(cfg.seed, frame_count, fresh_numbers)
        rows, targets = prompt_rows(backbone, episodes, frames)
        fresh, fresh_sums, _ = rollout(
            backbone, cfg, rows, targets, fresh_numbers, cfg.seed, cfg.group
        )
        for i, group in zip(places, fresh, strict=True):
            groups[i] = group
        sums = add_sums(sums, fresh_sums)
    return sums


# ---- Update --------------------------------------------------------------------------------------


class Stacked(NamedTuple):
    """B groups, padded right to the longest."""

    rows: list[Row]
    ids: torch.Tensor  # (B*G, T) long
    mask: torch.Tensor  # (B*G, T) long
    old_logp: torch.Tensor  # (B*G, T)
    advantages: torch.Tensor  # (B*G, T)


def stack_groups(groups: list[Group]) -> Stacked:
    T = max(group.ids.shape[1] for group in groups)

    def stack(name):  # -> (B*G, T)
        tensors = [getattr(group, name) for group in groups]
        return torch.cat([pad(tensor, (0, T - tensor.shape[1])) for tensor in tensors])

    rows = [group.row for group in groups]
    return Stacked(
        rows, stack("ids"), stack("mask"), stack("old_logp"), advantages=stack("advantages")
    )


def group_loss(
    backbone: Backbone, reference: Backbone | None, groups: list[Group], cfg: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of some groups summed over their tokens, and the sums that are logged."""
    rows, ids, mask, old_logp, advantages = stack_groups(groups)
    ref_logp = None
    if reference is not None:
        with torch.no_grad():
            ref_logp = completion_logp(reference, rows, ids, mask, cfg.temperature)
    logp = completion_logp(backbone, rows, ids, mask, cfg.temperature)
    # old_logp is what the sampler said, so the first update of a rollout is on-policy
    loss, logged = policy_loss(
        logp,
        old_logp,
        advantages,
        mask,
        ref_logp,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip,
        kl_coef=cfg.kl_coef,
    )
    return loss, {**logged, **gap_sums(logp.detach(), old_logp, mask, cfg)}


def gap_sums(
    logp: torch.Tensor, old_logp: torch.Tensor, mask: torch.Tensor, cfg: Config
) -> dict[str, torch.Tensor]:
    """Sums over tokens of |logp - old_logp|, "gap", of those whose ratio is "outside" the clip
    range, and their number, "forwarded". Before a rollout's first update the two are of the same
    weights, and what they differ by is the sampler's doing."""
    difference = torch.where(mask.bool(), logp - old_logp, 0.0)
    ratio = difference.exp()
    is_outside = (ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)
    return {"gap": difference.abs().sum(), "outside": is_outside.sum(), "forwarded": mask.sum()}


def micro_batches_of(groups: list[Group], cfg: Config) -> list[list[Group]]:
    """This rank's groups of an update that are forwarded, as many at once as memory allows. All
    ranks get as many micro-batches, since under FSDP each forward is collective: a rank that has
    none left forwards one token that does not count."""
    learning = [group for group in groups if not (group.zero_std and cfg.skip_zero_std)]
    micro_batches = [
        learning[i : i + cfg.micro_batch] for i in range(0, len(learning), cfg.micro_batch)
    ]
    idle = [idle_group(groups[0])]
    return micro_batches + [idle] * (all_max(len(micro_batches)) - len(micro_batches))


@torch.no_grad()
def recompute_old_logp(
    backbone: Backbone, batches: list[list[Group]], cfg: Config
) -> dict[str, float]:
    """Before the first update of a rollout: in the groups of its update batches the update's own
    log-probabilities take the place of the sampler's. -> gap_sums() between the two, over all
    ranks; {} when nothing is forwarded."""
    sums = Counter()
    for batch in batches:
        for micro_batch in micro_batches_of(batch, cfg):
            rows, ids, mask, old_logp, _ = stack_groups(micro_batch)
            logp = completion_logp(backbone, rows, ids, mask, cfg.temperature)
            for name, value in gap_sums(logp, old_logp, mask, cfg).items():
                sums[name] += float(value)
            for group, group_logp in zip(micro_batch, logp.split(cfg.group), strict=True):
                group.old_logp = group_logp[:, : group.ids.shape[1]]
    return dict(zip(sums, all_sum(list(sums.values())), strict=True))


LARGE_GAP = 0.01  # share of the sampled tokens


def gap_metrics(sums: dict[str, float], step: int, dist: Dist) -> dict[str, float]:
    """What is logged of gap_sums() at a rollout's first update; a line where they are too large."""
    if not sums:  # nothing was forwarded, so nothing was measured
        return {}
    gap = sums["gap"] / sums["forwarded"]
    outside = sums["outside"] / sums["forwarded"]
    if outside > LARGE_GAP and dist.rank == 0:
        print(
            f"warning: step {step}: {outside:.1%} of the sampled tokens are outside the clip range "
            f"before the first update (sampler and update differ by {gap:.2g} nats a token); try "
            "--recompute-old-logp"
        )
    return {"sampler_gap": gap, "sampler_outside_clip": outside}


def update_step(
    backbone: Backbone,
    reference: Backbone | None,
    optim: torch.optim.Optimizer,
    groups: list[Group],
    cfg: Config,
    dist: Dist,
    when: str,
) -> dict[str, float]:
    """One optimizer step on this rank's groups of an update batch. -> sums over the tokens of all
    ranks, and this update's loss, grad_norm and updates = 1; {} when every group of every rank has
    equal rewards: nothing to learn from, and no weight decay either.

    1. all tokens count in the mean, those of groups that are not forwarded too
    2. all ranks run as many forwards, since under FSDP each is collective
    3. forward, backward
    4. step"""
    # 1. what the sum of the loss is divided by: the token mean, or (Dr. GRPO) a constant, so that
    # long completions are not weighed down
    tokens = all_sum(sum(int(group.mask.sum()) for group in groups))
    divisor = tokens
    if cfg.advantage == "drgrpo":
        divisor = cfg.batch * cfg.group * cfg.max_new_tokens
    # 2. micro-batches
    micro_batches = micro_batches_of(groups, cfg)
    if not micro_batches:
        return {}
    # 3. forward and backward
    check = partial(model.stop_if_not_finite, cfg.out, when, dist, arrays_of(groups))
    sums = Counter()
    for micro_batch in micro_batches:
        loss, logged = group_loss(backbone, reference, micro_batch, cfg)
        check("loss", loss.item())
        (loss * dist.world_size / divisor).backward()  # FSDP averages over ranks
        for name, value in {"loss": loss, **logged}.items():
            sums[name] += float(value.detach())
    # 4. step
    grad_norm = model.clip_gradients(backbone.net.parameters(), cfg.max_grad_norm)
    check("gradient norm", grad_norm)
    optim.step()
    optim.zero_grad()
    total = dict(zip(sums, all_sum(list(sums.values())), strict=True))
    return {**total, "loss": total["loss"] / divisor, "grad_norm": grad_norm, "updates": 1}


def all_max(count: int) -> int:
    """The largest of the ranks' counts."""
    value = torch.tensor(count)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        if distributed.get_backend() == "nccl":
            value = value.cuda()
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return int(value)


def idle_group(group: Group) -> Group:
    """The same prompt with one token a completion, which does not count."""
    names = ("ids", "old_logp", "advantages")
    one_token = {name: getattr(group, name)[:, :1] for name in names}
    return replace(group, **one_token, mask=torch.zeros_like(group.mask[:, :1]))


def arrays_of(groups: list[Group]) -> Iterator[dict]:
    """Groups as model.stop_if_not_finite saves them."""
    for group in groups:
        prompt = {f"prompt_{name}": value for name, value in group.row.items()}
        yield {**vars(group), **prompt, "sample_id": [group.row.get("sample_id", "")]}


# ---- Evaluation ----------------------------------------------------------------------------------


def held_out_prompts(
    backbone: Backbone, cfg: Config, held_out: list[EpisodeFile], dist: Dist
) -> tuple[list[Row], list[list[int]]]:
    """This rank's share of --eval-prompts steps, spread evenly over the held-out episodes; each
    step once, also where there are fewer. -> rows, targets."""
    n = int(chunk_ends(held_out, backbone.action_tokenizer.horizon)[-1])
    frames = np.linspace(0, n - 1, min(cfg.eval_prompts, n)).astype(int)
    return prompt_rows(backbone, held_out, frames[dist.rank :: dist.world_size])


def evaluate(
    backbone: Backbone, cfg: Config, rows: list[Row], targets: list[list[int]], dist: Dist
) -> dict[str, float]:
    """Held-out reward, greedy and sampled; the same prompts and draws each time, other draws than
    in training (seed + 1). rows, targets: this rank's, as held_out_prompts() gives them."""
    keys = [dist.rank + i * dist.world_size for i in range(len(rows))]
    metrics = {}
    with model.unsharded(backbone.net):
        for style, G in (("greedy", 1), ("sampled", cfg.group)):
            is_greedy = style == "greedy"
            _, sums, _ = rollout(backbone, cfg, rows, targets, keys, cfg.seed + 1, G, is_greedy)
            mean = means(sums)
            for name in ("reward", "r_f", "r_a"):
                metrics[f"eval_{style}_{name}"] = mean[name]
    return metrics


# ---- Main ----------------------------------------------------------------------------------------


def check_config(cfg: Config) -> None:
    """ValueError naming the cure when the settings do not fit together."""
    if cfg.prompts % cfg.batch:
        raise ValueError(f"--prompts {cfg.prompts} must be a multiple of --batch {cfg.batch}")
    if cfg.group < 2:
        raise ValueError(f"--group {cfg.group}; an advantage needs at least 2 completions")
    if 0 < cfg.dual_clip <= 1:
        raise ValueError(
            f"--dual-clip {cfg.dual_clip} bounds tokens that have not changed; give more than 1, "
            "or 0 for none"
        )
    choices = {
        "advantage": ("grpo", "drgrpo"),
        "credit": ("all", "prefix"),
        "reward": tuple(REWARDS),
    }
    for name, allowed in choices.items():
        value = getattr(cfg, name)
        if value not in allowed:
            raise ValueError(f"--{name} {value}: choose one of {', '.join(allowed)}")


class Prepared(NamedTuple):
    backbone: Backbone  # sharded
    reference: Backbone | None  # sharded and frozen; None without KL
    optim: torch.optim.Optimizer
    episodes: list[EpisodeFile]
    held_out: list[EpisodeFile]
    data: dict[str, dict]  # what run.json says of them
    first_step: int  # 0, or where a resumed run goes on


def prepare(cfg: Config, dist: Dist) -> Prepared:
    """Loads policy and reference, shards them, and restores the optimizer of a run to resume.
    ValueError when checkpoint and data do not fit."""
    resume_from = model.checkpoint_to_resume(cfg)  # None: a new run
    path = resume_from or cfg.init
    backbone = model.load(path, dist.build, stages=("sft", "grpo"), max_pixels=cfg.max_pixels)
    if backbone.action_tokenizer is None:
        raise ValueError(
            f"{path}: no fast/ in this checkpoint, so it knows no action tokens; run sft.py on "
            "episodes with --action-tokenizer"
        )
    all_episodes = read_episodes(cfg.data, action_tokenizer=backbone.action_tokenizer)
    episodes, held_out = split_episodes(all_episodes)  # held out from sft.py too
    data = {cfg.data: {"sha256": episodes_sha256(all_episodes)}}
    if resume_from and not cfg.changed_data:
        model.check_unchanged(data, resume_from)
    if cfg.recompute:
        model.recompute_activations(backbone.net)
    model.shard(backbone.net, dist)
    reference = None
    if cfg.kl_coef > 0:  # always the model RL started from, also after --resume
        reference = model.load(cfg.init, dist.build)
        reference.net.requires_grad_(False).eval()
        model.shard(reference.net, dist, offload=cfg.cpu_offload)
    betas = (0.9, cfg.beta2)
    optim = model.make_optimizer(backbone.net, cfg.lr, cfg.weight_decay, betas)
    first_step, _ = model.load_train_state(resume_from, backbone.net, optim)
    model.check_steps(resume_from, first_step, cfg.steps)
    return Prepared(backbone, reference, optim, episodes, held_out, data, first_step)


def main(argv: Sequence[str] | None = None) -> None:
    cfg = model.parse_config(Config, PRESETS, argv)
    model.keep_freed_memory()
    dist = model.setup(cfg.seed, cfg.shards, cfg.batch, cfg.timeout_hours)
    check_config(cfg)
    backbone, reference, optim, episodes, held_out, data, first_step = prepare(cfg, dist)
    horizon = backbone.action_tokenizer.horizon
    frame_count = int(chunk_ends(episodes, horizon)[-1])  # steps with a whole chunk
    eval_rows, eval_targets = held_out_prompts(backbone, cfg, held_out, dist)
    split = [split_record([*episodes, *held_out], held_out)]
    if dist.rank == 0:
        warn_of_other_split(backbone.run.get("split", []), split)
    run = {
        "stage": "grpo",
        "config": asdict(cfg),
        "parent": cfg.init,
        "data": data,
        "split": join_splits(backbone.run.get("split", []), split),
    }
    save_checkpoint = partial(model.save, what=backbone, optim=optim)
    model.stop_on_sigterm()
    log = model.Log(cfg.out, cfg, dist)

    for step in range(first_step, cfg.steps):
        if cfg.eval_every and step % cfg.eval_every == 0:
            log.write(step=step, **evaluate(backbone, cfg, eval_rows, eval_targets, dist))
        start_time = time.perf_counter()

        # 1. draw this rank's prompts
        first_number = step * cfg.prompts
        prompt_numbers = range(first_number, first_number + cfg.prompts)
        local_numbers = prompt_numbers[dist.rank :: dist.world_size]
        frames = prompt_frames(cfg.seed, frame_count, local_numbers)
        rows, targets = prompt_rows(backbone, episodes, frames)

        # 2. to 4. sample, score, compare within groups
        with model.unsharded(backbone.net):
            groups, sums, shown = rollout(
                backbone, cfg, rows, targets, local_numbers, cfg.seed, cfg.group
            )
            if cfg.dynamic_sampling:
                sums = replace_zero_std_groups(backbone, cfg, episodes, groups, local_numbers, sums)
        rollout_time = time.perf_counter()

        # 5. and 6. update, each time on other prompts of the rollout
        for params in optim.param_groups:
            params["lr"] = model.learning_rate(
                step, cfg.steps, cfg.lr, cfg.warmup_ratio, "constant"
            )
        backbone.net.train()
        local_batch = cfg.batch // dist.world_size
        batches = [groups[i : i + local_batch] for i in range(0, len(groups), local_batch)]
        first = {}  # sums of the first update that forwarded something
        if cfg.recompute_old_logp:
            first = recompute_old_logp(backbone, batches, cfg)
        total = Counter()
        for i, batch in enumerate(batches):
            when = f"step {step}, update {i}"
            sums_of_update = update_step(backbone, reference, optim, batch, cfg, dist, when)
            first = first or sums_of_update
            total.update(sums_of_update)  # a Counter: it adds
        update_time = time.perf_counter()

        # The loss is no sign of progress: at the first update of a rollout it is near 0 whatever
        # the policy does. Watch held-out r_a; and frac_reward_zero_std, entropy and distinct
        # actions for a collapse.
        done = step + 1
        forwarded = max(total["forwarded"], 1)
        updates = max(total["updates"], 1)
        log.write(
            step=done,
            **means(sums),
            clip_fraction=total["clipped"] / forwarded,
            kl=total["kl"] / forwarded,
            **gap_metrics(first, step, dist),
            loss=total["loss"] / updates,
            grad_norm=total["grad_norm"] / updates,
            updates=total["updates"],
            lr=optim.param_groups[0]["lr"],
            rollout_s=rollout_time - start_time,
            update_s=update_time - rollout_time,
            tokens_per_s=all_sum(sums["completion_length"][0]) / (update_time - start_time),
        )
        if cfg.show_every and done % cfg.show_every == 0:
            log.write(step=done, rollout=shown)
        model.save_step(cfg, done, run, save_checkpoint)
    # a last evaluation that fails loses nothing
    final = Path(cfg.out) / "final"
    model.save(final, backbone, {**run, "step": cfg.steps})
    if cfg.eval_every:
        metrics = evaluate(backbone, cfg, eval_rows, eval_targets, dist)
        log.write(step=cfg.steps, **metrics)
        model.add_metrics(final, metrics)


if __name__ == "__main__":
    model.run_main(main, "--micro-batch, or --rollout-batch if it was in a rollout")
