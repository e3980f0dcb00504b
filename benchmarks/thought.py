"""Is the thought causal? What a model does after another thought than its own.

    python evaluate.py thought --policy runs/sft --data data/test --variant SFT
    python evaluate.py tabletop --policy runs/sft --mode think --thought removed    # swapped, true

1. at random steps the model thinks by itself and writes an action, by its most probable tokens
2. the thought is replaced as a whole (REPLACEMENTS) or one of its statements is edited (EDITS)
3. the model writes the action that follows: how it differs, how right it is, and for edits
   whether the motion turns the way that the edited thought says
4. what a thought is worth: the r_a to be expected behind the model's own, sampled and true ones

A thought that is only decoration can be removed or edited and the action stays. DeepThinkVLA
(arXiv 2511.15669), which thinks and then writes FAST tokens, succeeds on LIBERO in 97.0% with its
own thoughts, 96.5% with masked ones and 85.1% with random ones. Edits are Tabletop's, whose
thoughts parse_thought() reads; of other worlds they are left out, and a line says so.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import evaluate
import fast_tokenizer
import grpo
import model
import vla
from benchmarks import tabletop_data
from benchmarks.tabletop_data import UNREADABLE, ParsedThought
from model import Backbone

# ---- Whole thoughts ------------------------------------------------------------------------------


class Known(NamedTuple):
    """What may stand in the place of a thought about a prompt."""

    own: str
    other: str  # the model's own about another prompt
    true: str | None  # as recorded with the episode


def blank(known: Known, rng, backbone: Backbone) -> str:
    """Full stops, as many tokens as the own thought has."""
    ids = backbone.tokenizer.encode(known.own, add_special_tokens=False)
    return model.filler_thought(backbone, len(ids))


def half(known: Known, rng, backbone: Backbone) -> str:
    ids = backbone.tokenizer.encode(known.own, add_special_tokens=False)
    return backbone.tokenizer.decode(ids[: len(ids) // 2])


def shuffled(known: Known, rng, backbone: Backbone) -> str:
    return " ".join(rng.permutation(known.own.split()))


REPLACEMENTS: dict[str, Callable[[Known, np.random.Generator, Backbone], str | None]] = {
    "kept": lambda known, rng, backbone: known.own,
    "removed": lambda known, rng, backbone: "",
    "blank": blank,
    "half": half,
    "shuffled": shuffled,
    "swapped": lambda known, rng, backbone: known.other,
    "true": lambda known, rng, backbone: known.true,
}


def others(thoughts: list[str], rng) -> list[str]:
    """For each of two or more thoughts one about another prompt, each used once."""
    order = rng.permutation(len(thoughts)).tolist()
    chosen = [""] * len(thoughts)
    for i, giver in zip(order, order[-1:] + order[:-1], strict=True):
        chosen[i] = thoughts[giver]
    return chosen


# ---- Edited statements ---------------------------------------------------------------------------
#
# An edit is a function (the own thought, taken apart; the scene; rng) -> Edit, or None where it
# would say nothing: a move of less than LEAST cm has no side, two places in one direction no
# difference. Actions of Tabletop are x, y, z, three angles and the gripper, see its ACTION_NAMES.

LEAST = 3  # cm
GRIPPER = 6  # of an action


class Scene(NamedTuple):
    """What a recording knows of a step."""

    hand: np.ndarray  # (3,) m
    places: dict[str, np.ndarray]  # of each object, (3,) m


class Edit(NamedTuple):
    thought: ParsedThought
    turn: np.ndarray  # (7,): a motion that follows the edit has a positive product with it


def opposite(axis: int) -> Callable:
    """left <-> right, back <-> front, down <-> up."""

    def edit(own: ParsedThought, scene: Scene, rng) -> Edit | None:
        stated = own.move[axis]
        if abs(stated) < LEAST:
            return None
        move = list(own.move)
        move[axis] = -stated
        turn = np.zeros(7)
        turn[axis] = -np.sign(stated)
        return Edit(own._replace(move=tuple(move)), turn)

    return edit


def other_fingers(own: ParsedThought, scene: Scene, rng) -> Edit:
    closes = own.fingers == "open"
    turn = np.zeros(7)
    turn[GRIPPER] = 1 if closes else -1
    return Edit(own._replace(fingers="close" if closes else "open"), turn)


def other_target(name: bool, cell: bool, move: bool) -> Callable:
    """Another object of the scene, in what the thought says of its name, its cell and the way
    there; height and fingers stay."""

    def edit(own: ParsedThought, scene: Scene, rng) -> Edit | None:
        # 1. the object that it goes for, and the way there
        target = {"handle": "drawer handle"}.get(own.target, own.target)
        if own.phase not in ("reach", "carry") or target not in scene.places:
            return None
        old = (scene.places[target] - scene.hand)[:2]  # m

        # 2. another one, to which the way is another
        candidates = []
        for other, place in scene.places.items():
            new = (place - scene.hand)[:2]
            if other != target and are_apart(old, new):
                candidates.append((other, place, new))
        if not candidates:
            return None
        other, place, new = candidates[int(rng.integers(len(candidates)))]

        # 3. the thought that goes for that one
        changes = {}
        if name:
            changes["target"] = {"drawer handle": "handle"}.get(other, other)
        if cell:
            changes["target_cell"] = tabletop_data.cell(*place[:2])
        if move:
            changes["move"] = (*np.rint(100 * new).astype(int).tolist(), own.move[2])
        edited = own._replace(**changes)
        if edited == own:  # it was wrong, and says already what the edit would
            return None

        # 4. the turn: what the new direction has and the old one has not
        turn = np.zeros(7)
        turn[:2] = new / np.linalg.norm(new) - old / np.linalg.norm(old)
        return Edit(edited, turn)

    return edit


def are_apart(old: np.ndarray, new: np.ndarray) -> bool:
    """Whether two ways (2,), m, are no shorter than LEAST and at least 60 degrees apart."""
    lengths = np.linalg.norm(old), np.linalg.norm(new)
    return min(lengths) >= LEAST / 100 and float(old @ new) <= 0.5 * lengths[0] * lengths[1]


EDITS: dict[str, Callable[[ParsedThought, Scene, np.random.Generator], Edit | None]] = {
    "left-right": opposite(0),
    "back-front": opposite(1),
    "down-up": opposite(2),
    "fingers": other_fingers,
    "object": other_target(name=True, cell=False, move=False),
    "cell": other_target(name=False, cell=True, move=False),
    "object+cell": other_target(name=True, cell=True, move=False),
    "object+cell+move": other_target(name=True, cell=True, move=True),
}


def in_words(thought: ParsedThought) -> str:
    """The reverse of parse_thought()."""
    return tabletop_data.plan_words(
        thought.target,
        thought.target_cell,
        f"{thought.gripper_cell}, {thought.height}, {thought.doing}",
        thought.phase,
        tabletop_data.heading(
            np.array(thought.move) / 100, 1.0 if thought.fingers == "close" else -1.0
        ),
    )


def scene_at(episode: fast_tokenizer.EpisodeFile, step: int) -> Scene:
    places = dict(zip(episode.objects, episode.object_position[step], strict=True))
    return Scene(episode.state[step][:3], places)


def can_be_edited(episodes: list[fast_tokenizer.EpisodeFile]) -> bool:
    """Whether thoughts about them are Tabletop's, and they tell where the objects are. Of all that
    prompts are drawn from: each rank has to find the same."""
    is_tabletop = evaluate.statements_of(episodes) is tabletop_data.statements
    return is_tabletop and all(episode.object_position is not None for episode in episodes)


def edits_of(prompts: evaluate.Prompts, own: list[str], seed: int) -> dict[str, list[Edit | None]]:
    """Of each prompt each edit of the own thought; None where that says nothing."""
    edits = {name: [] for name in EDITS}
    for key, text, (episode, step) in zip(prompts.keys, own, prompts.steps, strict=True):
        parsed = tabletop_data.parse_thought(text)
        scene = scene_at(episode, step)
        for name, make in EDITS.items():
            edit = None
            if parsed is not UNREADABLE:
                rng = model.rng(seed, "edit", key)  # anew: the same object in all edits of a prompt
                edit = make(parsed, scene, rng)
            edits[name].append(edit)
    return edits


# ---- What follows --------------------------------------------------------------------------------


class After(NamedTuple):
    """What the model writes after a thought."""

    ids: tuple[int, ...]  # action ids
    chunk: np.ndarray  # (K, A), dataset units; NaN where it does not decode
    r_a: float
    l1: float  # to what was demonstrated, normalised units; NaN


def answer_after(
    backbone: Backbone, prompts: evaluate.Prompts, thoughts: list[str], args
) -> list[After]:
    """The model's most probable answer to each prompt after that thought."""
    if not prompts.rows:  # a rank may have none
        return []
    given = vla.given_thoughts(backbone, thoughts, len(prompts.rows))
    rows = [model.with_thought(*pair) for pair in zip(prompts.rows, given, strict=True)]
    answers = evaluate.complete(backbone, prompts._replace(rows=rows), 1, True, args)
    completions = []
    for thought, answer in zip(given, answers, strict=True):
        completions.append([*thought.tolist(), *answer])
    # think=False: a removed thought is no fault
    scores = evaluate.score_completions(backbone, completions, 1, prompts, args.reward, False)
    action_ids = [model.parse_actions(backbone, ids).action_ids for ids in completions]
    chunks, _ = backbone.action_tokenizer.decode(action_ids)
    after = []
    for ids, chunk, score in zip(action_ids, chunks, scores, strict=True):
        after.append(After(tuple(ids), chunk, score.means["r_a"], score.means["l1"]))
    return after


def subset(prompts: evaluate.Prompts, chosen: list[int]) -> evaluate.Prompts:
    return evaluate.Prompts(
        keys=[prompts.keys[b] for b in chosen],
        rows=[prompts.rows[b] for b in chosen],
        targets=[prompts.targets[b] for b in chosen],
        chunks=prompts.chunks[chosen],
        steps=[prompts.steps[b] for b in chosen],
    )


def follows(after: After, edit: Edit) -> bool:
    """Whether the motion has the direction of the edit; one that does not decode has none."""
    return bool(after.chunk.sum(0) @ edit.turn > 0)


def distance(a: After, b: After, stats) -> float:
    """Mean distance of two chunks, normalised units (range 2); NaN where one does not decode."""
    chunks = np.stack([a.chunk, b.chunk])
    if stats is not None:
        chunks = fast_tokenizer.normalize(chunks, stats)
    return float(np.abs(chunks[0] - chunks[1]).mean())


# ---- What a thought is worth ---------------------------------------------------------------------
#
# A thought is worth the prefix reward that is to be expected behind it: the mean over all answers,
# from their probabilities (grpo.expected_prefix); 0 where the completion is not well formed until
# its answer. It counts ACTION_END as the target's last token and asks no more of the answer's form,
# so its mean is not that of a drawn r_a. Who chose among the thoughts that a model samples could
# gain what the best of them is worth beyond their mean; by taking what the model holds most
# probable anyway, what the own thought is worth beyond it.


class Worth(NamedTuple):
    """What thoughts about one prompt are worth."""

    own: float  # the most probable one
    true: float  # as recorded with the episode; NaN where it is not
    sampled: np.ndarray  # (n,) sampled as RL samples them
    drawn: np.ndarray  # (n,) r_a of the answers that were drawn behind those


def expected_r_a(
    backbone: Backbone, prompts: evaluate.Prompts, completions: list[list[int]], n: int, args
) -> np.ndarray:
    """B * n completions, those of a prompt side by side -> E[r_a] behind the thought of each,
    (B, n)."""
    if not prompts.rows:  # a rank may have none
        return np.zeros((0, n))
    targets = [target for target in prompts.targets for _ in range(n)]
    longest = max(map(len, completions))
    unused_logp = torch.zeros(len(completions), longest, device=args.device)  # of the sampler
    ids, mask, _, is_target = grpo.with_targets(backbone, unused_logp, completions, targets, True)
    at_once = max(args.batch // n, 1)  # prompts a forward, each with its n completions
    logp = grpo.measured_logp(backbone, prompts.rows, ids, mask, at_once)
    return grpo.expected_prefix(logp, is_target).view(-1, n).cpu().numpy()


def worths(
    backbone: Backbone,
    prompts: evaluate.Prompts,
    own: list[list[int]],
    true: list[str | None],
    args,
) -> list[Worth]:
    """own: the most probable completions, true: the recorded thoughts, one a prompt each."""
    n = args.samples
    # 1. the most probable ones
    of_own = expected_r_a(backbone, prompts, own, 1, args)[:, 0]
    # 2. the true ones, before any answer; an empty one is none
    of_true = np.full(len(own), np.nan)
    known = [b for b, text in enumerate(true) if text]
    completions = []
    for b in known:
        text = f"<think>{true[b]}</think>{model.action_answer([0])}<|im_end|>"  # as SFT reads it
        completions.append(backbone.tokenizer.encode(text, add_special_tokens=False))
    of_true[known] = expected_r_a(backbone, subset(prompts, known), completions, 1, args)[:, 0]
    # 3. sampled ones, and what their own answers earned
    completions = evaluate.complete(backbone, prompts, n, False, args)
    of_sampled = expected_r_a(backbone, prompts, completions, n, args)
    targets = [target for target in prompts.targets for _ in range(n)]
    _, parts = grpo.reward(backbone, completions, targets)
    drawn = parts["r_a"].reshape(-1, n)
    return [Worth(*values) for values in zip(of_own, of_true, of_sampled, drawn, strict=True)]


def worth_metrics(
    values: list[Worth],
) -> tuple[dict[str, evaluate.Interval], dict[str, list[float | None]]]:
    """What the thoughts about all prompts are worth -> metrics, and their values of each prompt."""
    of_prompts = {
        "own": [value.own for value in values],
        "true": [value.true for value in values],
        "sampled": [value.sampled.mean() for value in values],
        "best": [value.sampled.max() for value in values],
        "spread": [value.sampled.std() for value in values],
        "drawn spread": [value.drawn.std() for value in values],
    }
    metrics = {}
    paired = {}
    for name, each in of_prompts.items():
        finite = [float(value) for value in each if np.isfinite(value)]
        if finite:
            metrics[f"worth {name}"] = evaluate.bootstrap(finite)
            rounded = [round(float(value), 5) if np.isfinite(value) else None for value in each]
            paired[f"worth {name}"] = rounded
    return metrics, paired


# ---- Command -------------------------------------------------------------------------------------


def load_acting(policy: str, device: str) -> Backbone:
    """The checkpoint of a model that writes actions."""
    backbone = evaluate.load_backbone(policy, device)
    if backbone.action_tokenizer is None:
        raise ValueError(f"{policy}: no action tokenizer; give a checkpoint of sft or grpo")
    return backbone


def arguments(add):
    evaluate.writing_flags(add)
    evaluate.episode_flags(add)
    evaluate.reward_flag(add)
    add(
        "--samples",
        type=fast_tokenizer.count,
        default=8,
        help="sampled thoughts a prompt, of which it is measured what they are worth",
    )


def measure(args):
    """`evaluate.py thought`. Metrics "given NAME ..." of each replacement: "r_a", "l1", "decodes",
    "changed" (share of actions whose tokens differ from those after the own thought), "moved" (how
    far the decoded motion is from that one, normalised units); "edited NAME follows": how often
    the motion has the direction of the edit, and "... before": how often it had it already; "worth
    NAME": of the prefix reward, whatever --reward: E[r_a] behind the "own" thought, the "true" one,
    "sampled" ones (mean) and the "best" of those, its "spread" (std) among those of a prompt, and
    the "drawn spread", of their answers' r_a.

    1. own thoughts   2. replaced   3. edited   4. their worth   5. metrics of all ranks"""
    started = time.time()
    if args.prompts < 2:
        raise ValueError("--prompts 1: there is no other thought to give; ask for two or more")
    dist = evaluate.start_ranks(args)
    local = evaluate.local_share(dist)
    backbone = load_acting(args.policy, args.device)
    args.max_new_tokens = model.token_limit(args.max_new_tokens, backbone, 96)
    episodes, words = evaluate.episodes_to_ask(backbone, args.data, args.split)
    if dist.rank == 0:
        print(f"{args.prompts} prompts from {words}")

    # 1. own thoughts
    prompts = evaluate.draw_prompts(backbone, episodes, args, True, local)
    written = evaluate.complete(backbone, prompts, 1, True, args)
    own = [vla.thought_text(backbone, ids) for ids in written]
    other = others(evaluate.gather(own, dist), model.rng(args.seed, "swap"))[local]

    true = []  # as recorded; None: not
    for episode, step in prompts.steps:
        true.append(episode.thoughts[step] if episode.thoughts else None)

    # 2. replaced
    after = {}  # name -> of each prompt what follows
    for name, replace in REPLACEMENTS.items():
        thoughts = []
        for b, known in enumerate(map(Known, own, other, true)):
            rng = model.rng(args.seed, name, prompts.keys[b])
            thoughts.append(replace(known, rng, backbone))
        if None in evaluate.gather(thoughts, dist):
            if dist.rank == 0:
                print(f"{name}: left out, as not all episodes hold thoughts")
            continue
        after[name] = answer_after(backbone, prompts, thoughts, args)

    # 3. edited
    followed = {}  # edit -> of each prompt that it applies to: did it with the own thought, now
    edits = {}
    if can_be_edited(episodes):
        edits = edits_of(prompts, own, args.seed)
    elif dist.rank == 0:
        print("edits: left out, as these are not Tabletop's episodes with their objects")
    for name, of_prompts in edits.items():
        chosen = [b for b, edit in enumerate(of_prompts) if edit is not None]
        texts = [in_words(of_prompts[b].thought) for b in chosen]
        answers = answer_after(backbone, subset(prompts, chosen), texts, args)
        followed[name] = []
        for b, answer in zip(chosen, answers, strict=True):
            did_before = follows(after["kept"][b], of_prompts[b])
            does_now = follows(answer, of_prompts[b])
            followed[name].append((did_before, does_now))

    # 4. their worth
    local_worths = worths(backbone, prompts, written, true, args)

    # 5. metrics, of all ranks' prompts
    steps = evaluate.steps_of(prompts, dist)
    all_worths = evaluate.gather(local_worths, dist)
    after = {name: evaluate.gather(values, dist) for name, values in after.items()}
    shares = {name: shares_of_all_ranks(values, dist) for name, values in followed.items()}
    if dist.rank == 0:
        metrics, paired = replacement_metrics(after, backbone.action_tokenizer.stats)
        metrics |= edit_metrics(shares)
        worth, worth_paired = worth_metrics(all_worths)
        metrics |= worth
        paired |= worth_paired
        print_table(metrics)
        items = dict.fromkeys(paired, steps)
        words = f"{args.prompts} from {words}"
        evaluate.write_metrics(metrics, paired, args, started, items, words)


def shares_of_all_ranks(followed: list[tuple[bool, bool]], dist: model.Dist) -> tuple[int, ...]:
    """(did before, does now) of this rank's prompts -> how many did, how many do, of how many."""
    n_before = sum(did_before for did_before, _ in followed)
    n_now = sum(does_now for _, does_now in followed)
    return tuple(int(count) for count in model.all_sum([n_before, n_now, len(followed)]))


def replacement_metrics(
    after: dict[str, list[After]], stats
) -> tuple[dict[str, evaluate.Interval], dict[str, list[float | None]]]:
    """What follows each replacement, of all prompts -> metrics, and r_a and l1 of each prompt."""
    metrics = {}
    paired = {}
    for name, values in after.items():
        kept = after["kept"]
        of_prompts = {
            "r_a": [value.r_a for value in values],
            "l1": [value.l1 for value in values],
            "moved": [distance(*pair, stats) for pair in zip(values, kept, strict=True)],
        }
        for metric, each in of_prompts.items():
            finite = [value for value in each if np.isfinite(value)]
            metrics[f"given {name} {metric}"] = evaluate.bootstrap(finite)
            if metric != "moved":
                rounded = [round(value, 5) if np.isfinite(value) else None for value in each]
                paired[f"given {name} {metric}"] = rounded
        differ = sum(value.ids != before.ids for value, before in zip(values, kept, strict=True))
        decode = sum(bool(np.isfinite(value.chunk).all()) for value in values)
        metrics[f"given {name} changed"] = evaluate.wilson(differ, len(values))
        metrics[f"given {name} decodes"] = evaluate.wilson(decode, len(values))
    return metrics, paired


def edit_metrics(shares: dict[str, tuple[int, ...]]) -> dict[str, evaluate.Interval]:
    metrics = {}
    for name, (before, now, n) in shares.items():
        if n:  # else no thought could be edited so
            metrics[f"edited {name} before"] = evaluate.wilson(before, n)
            metrics[f"edited {name} follows"] = evaluate.wilson(now, n)
    return metrics


def print_table(metrics: dict[str, evaluate.Interval]):
    """A line a replacement, then a line an edit."""
    names = dict.fromkeys(name.split()[1] for name in metrics if name.startswith("given "))
    for name in names:
        cells = []
        for metric in ("changed", "moved", "r_a", "l1", "decodes"):
            mean = metrics[f"given {name} {metric}"]["mean"]
            cells.append(f"{metric} -" if mean is None else f"{metric} {mean:.3f}")
        print(f"{name:18s} {'  '.join(cells)}")
    for name, value in metrics.items():
        if name.endswith(" follows"):
            edit = name.removesuffix(" follows").removeprefix("edited ")
            before = metrics[f"edited {edit} before"]["mean"]
            interval = "{mean:.3f} [{low:.3f}, {high:.3f}], n {n}".format(**value)
            print(f"{edit:18s} follows {interval}; before {before:.3f}")
    for name in [name for name in metrics if name.startswith("worth ")]:
        value = metrics[name]
        print(f"{name:18s} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
