"""What a frozen backbone's features tell of the state of the world, layer by layer (Table 8).

    python evaluate.py probe --policy runs/sft --data data/test --one-task data/long --variant SFT

At each step of recorded trajectories the backbone reads the action prompt and writes nothing. From
its features a simple model that has seen other trajectories tells:

  one-task      the segment of progress, in trajectories of one task (the paper's probe)
  progress      the same in trajectories of many tasks
  phase         what the expert is doing there, of its recorded thoughts: reach, grasp, ...
  displacement  the way from the hand to what it is going for, in cm along x, y and the height

1. inputs: features after each block (layer 0: the embeddings, images among them; layer L: the last
   block, before the final norm), of all tokens of the prompt (mean) or of its last token (last).
   Beside them what is there without a backbone: the robot's state, a small picture
2. targets, as far as the recordings know them
3. probes: knn, the mean of the 5 nearest by cosine; linear, ridge regression. A class is one-hot,
   and told is the class with the largest value
4. each trajectory is told by probes that saw others alone (5 folds); 95% intervals by bootstrap
   over trajectories

The paper does not say how many classes it had, nor which tokens or layer were read, nor how frames
were split; its figures (39.06, 43.23, 69.79) are 75, 83 and 134 of 192.
"""

import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.linalg import solve
from tqdm import tqdm

import evaluate
import model
import vla
from fast_tokenizer import EpisodeFile, count
from tools.motion import axes_path, read_axes

# N frames of G trajectories, C numbers of a target, L blocks, D width, S state dimensions, T and U
# steps of two trajectories.

# ---- Flags ---------------------------------------------------------------------------------------

RECORD = (
    "python -m benchmarks.tabletop_data --out data/long --tasks long:0 --episodes 20 "
    "--conversations 0 --seed 1000"
)


TRAJECTORIES = 20  # of one task, the paper's


def arguments(add):
    add("--data", required=True, help="folder of episodes, of many tasks")
    evaluate.split_flag(add)
    add("--one-task", default="", help="folder with episodes of one task; empty: left out")
    add("--task", default="", help="the instruction, where that folder has several")
    add("--trajectories", type=count, help=f"of one task, the first so many; {TRAJECTORIES}")
    add("--classes", type=count, default=8, help="segments of progress")
    add("--stride", type=count, default=1, help="take every so-many-th frame")
    add("--think", action="store_true", help="with the prompt that asks for a thought")
    add("--axes", default="", help="what the state means, .json; empty: by the episodes' source")
    add("--batch", type=count, default=64, help="prompts a forward")


# ---- Trajectories --------------------------------------------------------------------------------


LEAST = 3  # trajectories: some to learn from, others to choose by, others to tell of


class Frames(NamedTuple):
    """Every stride-th frame of G trajectories."""

    episodes: list[EpisodeFile]  # G
    trajectory: np.ndarray  # (N,) which of them
    step: np.ndarray  # (N,) of it

    def take(self, of_episodes: Sequence[np.ndarray]) -> np.ndarray:
        """An array (T, ...) for each trajectory -> (N, ...) of the frames."""
        pairs = zip(self.trajectory, self.step, strict=True)
        return np.array([of_episodes[g][t] for g, t in pairs])


def frames_of(episodes: list[EpisodeFile], stride: int) -> Frames:
    """ValueError when there are too few."""
    if len(episodes) < LEAST:
        raise ValueError(
            f"{episodes[0].path.parent}: {len(episodes)} trajectories to ask about, a probe needs "
            f"{LEAST}; say which of them by --split, or record more"
        )
    steps = [np.arange(0, len(episode), stride) for episode in episodes]
    trajectory = np.repeat(np.arange(len(episodes)), [len(of_one) for of_one in steps])
    return Frames(episodes, trajectory, np.concatenate(steps))


def trajectories_of_one_task(
    episodes: list[EpisodeFile], task: str, wanted: int
) -> list[EpisodeFile]:
    """The first `wanted` episodes of a task, the only one there if no instruction is given.
    ValueError that says what to record."""
    folder = episodes[0].path.parent
    counts = Counter(episode.task for episode in episodes)
    if not task and len(counts) > 1:
        raise ValueError(
            f"{folder}: {len(counts)} tasks, as {episodes[0].task!r}; name one, --task"
        )
    if task and task not in counts:
        raise ValueError(f"{folder}: no episode of --task {task!r}, but of {', '.join(counts)}")
    task = task or episodes[0].task
    if counts[task] < wanted:
        raise ValueError(
            f"{folder}: {counts[task]} trajectories of {task!r}, fewer than --trajectories "
            f"{wanted}; record more, as by {RECORD}"
        )
    return [episode for episode in episodes if episode.task == task][:wanted]


# ---- Inputs --------------------------------------------------------------------------------------

POOLS = ("mean", "last")
PICTURE = 16  # side of the small picture, in pixels


@torch.no_grad()
def pooled_features(backbone: model.Backbone, prompts: list[model.Row], device) -> np.ndarray:
    """B prompts -> (B, L + 1, 2, D) fp32: after each of L blocks, by POOLS. Those of layer l are
    what the head reads by --layer l (vla.truncate), pooled."""
    batch = model.to_device(model.collate(prompts, backbone.vocab.pad), device)
    mask = batch["mask"]  # (B, T), padded right
    lengths = mask.sum(1)  # (B,)
    rows = torch.arange(len(prompts), device=mask.device)
    pooled = []

    def pool(hidden):
        hidden = hidden.float()  # (B, T, D)
        mean = (hidden * mask[..., None]).sum(1) / lengths[:, None]  # (B, D)
        last = hidden[rows, lengths - 1]  # (B, D)
        pooled.append(torch.stack([mean, last], 1))

    L = len(backbone.net.model.language_model.layers)
    hooks = [model.keep_layer_output(backbone.net, layer, pool) for layer in range(L + 1)]
    try:
        model.hidden_states(backbone.net, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(pooled, 1).cpu().numpy()


def read_inputs(
    backbone: model.Backbone, frames: Frames, args, dist: model.Dist
) -> dict[str, np.ndarray]:
    """-> {"layer 0 mean", "layer 0 last", ...: features (N, D); "state": (N, S), standardised;
    "pixels": (N, 768) in [0, 1]}. Ranks share the forwards."""
    # 1. features
    local_frames = range(len(frames.step))[evaluate.local_share(dist)]
    local_features = []  # (L + 1, 2, D) each
    no_bar = None if dist.rank == 0 else True  # None: a bar where stderr is a terminal
    for first in tqdm(range(0, len(local_frames), args.batch), "features", disable=no_bar):
        prompts = []
        for i in local_frames[first : first + args.batch]:
            episode = frames.episodes[frames.trajectory[i]]
            image = episode.frame(int(frames.step[i]))
            prompts.append(vla.prompt_row(backbone, [image], episode.task, args.think))
        local_features += list(pooled_features(backbone, prompts, args.device))
    features = np.array(evaluate.gather(local_features, dist))  # (N, L + 1, 2, D)
    inputs = {}
    for layer in range(features.shape[1]):
        for p, pool in enumerate(POOLS):
            inputs[f"layer {layer} {pool}"] = features[:, layer, p]

    # 2. what is there without a backbone
    inputs["state"] = frames.take(standardised_states(frames.episodes))
    pictures = []
    for g, t in zip(frames.trajectory, frames.step, strict=True):
        image = Image.fromarray(frames.episodes[g].frame(int(t)))
        small = image.resize((PICTURE, PICTURE), Image.Resampling.BOX)
        pictures.append(np.asarray(small, np.float32).reshape(-1) / 255)
    inputs["pixels"] = np.array(pictures)
    return inputs


def standardised_states(episodes: list[EpisodeFile]) -> list[np.ndarray]:
    """(T, S) of each: every dimension with mean 0 and standard deviation 1 over all of them; one
    that does not move is 0."""
    together = np.concatenate([episode.state for episode in episodes]).astype(np.float64)
    centre, scale = centre_and_scale(together)
    return [(episode.state - centre) / scale for episode in episodes]


def centre_and_scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) -> mean and standard deviation (D,), infinite of a dimension that does not move but
    for rounding."""
    centre = values.mean(0)
    scale = values.std(0)
    scale[scale <= 1e-6 * np.abs(values).max(0)] = np.inf
    return centre, scale


# ---- Targets -------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What is to be told of each frame."""

    name: str
    values: np.ndarray  # (N, C): C classes as 0 and 1, or C numbers; NaN: not known of this frame
    classes: list[str]  # C of them; none of numbers


def one_hot(labels: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels (N,), "" where none is known -> (N, C), the C classes in the order of their names; of
    no label at all (N, 1), NaN."""
    classes = sorted(set(labels) - {""})
    values = np.full((len(labels), max(len(classes), 1)), np.nan)
    for row, label in zip(values, labels, strict=True):
        if label:
            row[:] = [label == name for name in classes]
    return values, classes


def aligned_steps(states: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Dynamic time warping of (T, S) to (U, S) -> the step of the reference (T,) at which each
    state is, by the path of least summed distance; of several steps the middle one.

    0 0 1 2 against 0 1 1 2 gives 0 0 1 3: the path is (0, 0) (1, 0) (2, 1) (2, 2) (3, 3)."""
    # 1. least cost of a path to each pair; row and column 0 of cost stand before the start
    T, U = len(states), len(reference)
    distance = np.linalg.norm(states[:, None] - reference[None], axis=2)  # (T, U)
    cost = np.full((T + 1, U + 1), np.inf)
    cost[0, 0] = 0
    for t in range(1, T + 1):
        for u in range(1, U + 1):
            cheapest = min(cost[t - 1, u - 1], cost[t - 1, u], cost[t, u - 1])
            cost[t, u] = distance[t - 1, u - 1] + cheapest
    # 2. back along the cheapest, diagonally where that is as good
    partners = [[] for _ in range(T)]  # of each state, the last first
    t, u = T, U
    while t > 0:
        partners[t - 1].append(u - 1)
        earlier = [(t - 1, u - 1), (t - 1, u), (t, u - 1)]
        t, u = min(earlier, key=lambda indices: cost[indices])
    return np.array([of_step[len(of_step) // 2] for of_step in partners])


def progress(episodes: list[EpisodeFile], classes: int) -> list[list[str]]:
    """The segment of progress (T,) at each step of trajectories, within the task of each: all of a
    task are aligned to that of median length, which is cut into equal segments. "" for the only
    one of its task."""
    states = standardised_states(episodes)
    segments = [[""] * len(episode) for episode in episodes]
    for task in {episode.task for episode in episodes}:
        of_task = [g for g, episode in enumerate(episodes) if episode.task == task]
        if len(of_task) < 2:
            continue
        by_length = sorted(of_task, key=lambda g: len(episodes[g]))
        reference = states[by_length[len(by_length) // 2]]
        for g in of_task:
            steps = aligned_steps(states[g], reference)
            segments[g] = [str(u * classes // len(reference)) for u in steps]
    return segments


PHASE = re.compile(r"\bNow ([a-z ]+):")  # as benchmarks.tabletop_data.plan_words() writes thoughts


def phases(episode: EpisodeFile) -> list[str]:
    """What the expert is doing at each step (T,), by its thought; "" where that does not say."""
    matches = [PHASE.search(thought) for thought in episode.thoughts]
    return [match.group(1) if match else "" for match in matches]


def displacements(episode: EpisodeFile, position: Sequence[int], metres: float) -> np.ndarray:
    """(T, 3) cm, from the hand to the object that the expert is going for; NaN where it goes for
    none, or its place is not known. position: of the hand in the state, in units of `metres`."""
    hand = episode.state[:, position] * metres  # (T, 3)
    way = np.full((len(episode), 3), np.nan)
    for t, target in enumerate(episode.targets):
        if target >= 0:
            way[t] = 100 * (episode.object_position[t, target] - hand[t])
    return way


def read_targets(frames: Frames, args) -> tuple[list[Target], list[str]]:
    """-> what the recordings know of the frames; a line for each thing that they do not."""
    episodes = frames.episodes
    targets = []
    missing = []
    # 1. progress
    segments = progress(episodes, args.classes)
    alone = sum(not of_one[0] for of_one in segments)
    targets.append(Target("progress", *one_hot(frames.take(segments).tolist())))
    if alone:
        missing.append(
            f"progress of {alone} of {len(episodes)} trajectories: the only ones of their tasks"
        )
    # 2. phase
    if all(episode.thoughts is not None for episode in episodes):
        labels = frames.take([phases(episode) for episode in episodes]).tolist()
        values, classes = one_hot(labels)
        targets.append(Target("phase", values, classes))
    else:
        missing.append("phase: these recordings hold no thoughts")
    # 3. displacement
    if all(e.targets is not None and e.object_position is not None for e in episodes):
        first = episodes[0]
        path = axes_path(args.axes, episodes)
        axes = read_axes(path, first.state.shape[1], first.action.shape[1])
        ways = [displacements(episode, axes.position, axes.metres) for episode in episodes]
        values = frames.take(ways)
        known = values[np.isfinite(values).all(1)]  # of too few trajectories: see probe_all()
        if len(known) and np.isinf(centre_and_scale(known)[1]).all():
            missing.append("displacement: no hand moves relative to its target")
        else:
            targets.append(Target("displacement", values, []))
    else:
        missing.append("displacement: these recordings do not say where the target is")
    return targets, missing


# ---- Probes --------------------------------------------------------------------------------------

NEIGHBOURS = 5
FOLDS = 5
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of ridge, among which a fold chooses


def unit_length(values: np.ndarray) -> np.ndarray:
    """(N, D) -> (N, D): each row over its length."""
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def knn(inputs: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(N, D) with their values (N, C) -> (n, C) for those asked (n, D): the mean over the nearest
    NEIGHBOURS by cosine, and over any that are as near as the last of these: where all inputs are
    equal, over all."""
    similarity = unit_length(asked) @ unit_length(inputs).T  # (n, N)
    k = min(NEIGHBOURS, len(inputs))
    kth_best = np.sort(similarity, axis=1)[:, -k]  # (n,)
    is_near = similarity >= kth_best[:, None] - 1e-12  # (n, N), but for rounding
    return is_near @ values / is_near.sum(1, keepdims=True)


def ridge(
    inputs: np.ndarray, values: np.ndarray, asked: np.ndarray, strengths: Sequence[float]
) -> list[np.ndarray]:
    """The same by ridge regression, once for each strength -> (n, C) each. With x (N, D)
    standardised and y (N, C) about their mean

        weights = (x'x / N + strength)^-1 x'y / N = x' (xx' / N + strength)^-1 y / N

    of which the smaller matrix is solved."""
    centre, scale = centre_and_scale(inputs)
    N = len(inputs)
    x = (inputs - centre) / scale
    y = values - values.mean(0)
    has_few_rows = N < x.shape[1]
    if has_few_rows:
        matrix = x @ x.T / N  # (N, N)
        right_side = y / N  # (N, C)
    else:
        matrix = x.T @ x / N  # (D, D)
        right_side = x.T @ y / N  # (D, C)
    told = []
    for strength in strengths:
        solved = solve(matrix + strength * np.eye(len(matrix)), right_side, assume_a="pos")
        weights = solved  # (D, C)
        if has_few_rows:
            weights = x.T @ solved
        told.append((asked - centre) / scale @ weights + values.mean(0))
    return told


def folds_of(tasks: list[str]) -> np.ndarray:
    """Which fold holds each of G trajectories out (G,): those of a task take turns."""
    folds = np.empty(len(tasks), int)
    folds[np.argsort(tasks, kind="stable")] = np.arange(len(tasks)) % FOLDS
    return folds


def tell(probe: str, inputs: np.ndarray, values: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """What a probe tells of each of N frames (N, C) that has learned from the other folds. fold:
    (N,) of each frame. How strong ridge is, one of these decides: that after the one held out."""
    inputs = inputs.astype(np.float64)
    told = np.empty_like(values)
    numbers = np.unique(fold)
    for number, other in zip(numbers, np.roll(numbers, -1), strict=True):
        held_out = fold == number
        learned = ~held_out
        x, y = inputs[learned], values[learned]
        if probe == "knn":
            told[held_out] = knn(x, y, inputs[held_out])
            continue
        chooses = fold == other
        fits = learned & ~chooses
        candidates = ridge(inputs[fits], values[fits], inputs[chooses], STRENGTHS)
        errors = [np.square(candidate - values[chooses]).sum() for candidate in candidates]
        best = STRENGTHS[int(np.argmin(errors))]
        (told[held_out],) = ridge(x, y, inputs[held_out], [best])
    return told


def most_frequent(values: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """As tell(), by who sees no input: the mean of the other folds, of classes their shares."""
    told = np.empty_like(values)
    for number in np.unique(fold):
        told[fold == number] = values[fold != number].mean(0)
    return told


# ---- Scores --------------------------------------------------------------------------------------


def by_trajectory(scores: np.ndarray, trajectory: np.ndarray) -> list[float]:
    """Scores (N,) -> the mean of each trajectory that has any."""
    return [float(scores[trajectory == g].mean()) for g in np.unique(trajectory)]


def r2_intervals(
    told: np.ndarray, true: np.ndarray, trajectory: np.ndarray
) -> dict[str, evaluate.Interval]:
    """(N, 3) told and true -> R2 of all frames, 1 - squared errors / squared distances from the
    mean, of each axis (" x") that varies and ("") their mean. Intervals: bootstrap over
    trajectories, as evaluate.bootstrap(). read_targets() sees to it that an axis varies."""
    _, scale = centre_and_scale(true)
    varies = np.isfinite(scale)  # (3,)
    told, true = told[:, varies], true[:, varies]
    axes = np.array([" x", " y", " z"])[varies]
    # 1. sums of each trajectory
    error = np.square(told - true)  # (N, axes)
    spread = np.square(true - true.mean(0))
    known = np.unique(trajectory)
    errors = np.array([error[trajectory == g].sum(0) for g in known])  # (G, axes)
    spreads = np.array([spread[trajectory == g].sum(0) for g in known])
    # 2. of all, and of trajectories drawn anew
    r2 = 1 - errors.sum(0) / spreads.sum(0)  # (axes,)
    drawn = np.random.default_rng(0).integers(0, len(known), (2000, len(known)))
    r2_drawn = 1 - errors[drawn].sum(1) / spreads[drawn].sum(1)  # (2000, axes)
    # 3. each axis, and their mean
    columns = {axis: (r2[i], r2_drawn[:, i]) for i, axis in enumerate(axes.tolist())}
    columns[""] = (r2.mean(), r2_drawn.mean(1))
    intervals = {}
    for name, (mean, resampled) in columns.items():
        low, high = (float(end) for end in np.quantile(resampled, [0.025, 0.975]))
        intervals[name] = {"mean": float(mean), "low": low, "high": high, "n": len(known)}
    return intervals


class Scores(NamedTuple):
    """As evaluate.write_metrics() takes them."""

    metrics: dict[str, evaluate.Interval]
    paired: dict[str, list[float]]  # of features, which models differ in: of each trajectory


def score(
    scores: Scores,
    told: np.ndarray,
    target: Target,
    trajectory: np.ndarray,
    name: str,
    input_name: str,
):
    """Adds to scores what was told of the known frames of a target (N, C). The metrics are called
    `name input_name`: of classes the accuracy; of numbers R2 (`name x input_name` of an axis), and
    the mean distance in cm (`name cm input_name`)."""
    if target.classes:
        right = told.argmax(1) == target.values.argmax(1)
        measured = {f"{name} {input_name}": right}
    else:
        distance = np.linalg.norm(told - target.values, axis=1)  # cm
        measured = {f"{name} cm {input_name}": distance}
        for axis, interval in r2_intervals(told, target.values, trajectory).items():
            scores.metrics[f"{name}{axis} {input_name}".strip()] = interval
    for metric, values in measured.items():
        of_trajectories = by_trajectory(values, trajectory)
        scores.metrics[metric.strip()] = evaluate.bootstrap(of_trajectories)
        if input_name.startswith("layer"):
            scores.paired[metric] = [round(value, 3) for value in of_trajectories]


PROBES = ("knn", "linear")


def probe_all(
    scores: Scores, inputs: dict[str, np.ndarray], target: Target, frames: Frames, start: str
):
    """Adds each probe on each input, and who sees none, and prints them. start: what the names of
    the metrics begin with. A target that is known of too few trajectories is left out."""
    # 1. the frames of which it is known, and which fold holds each out
    known = np.isfinite(target.values).all(1)  # (N,)
    target = target._replace(values=target.values[known])
    trajectory = frames.trajectory[known]
    numbers, of_frame = np.unique(trajectory, return_inverse=True)
    if len(numbers) < LEAST:
        print(f"left out: {target.name}: known of {len(numbers)} trajectories, needed are {LEAST}")
        return
    fold = folds_of([frames.episodes[g].task for g in numbers])[of_frame]

    # 2. probes
    told = most_frequent(target.values, fold)
    score(scores, told, target, trajectory, f"{start} majority {target.name}", "")
    for probe in PROBES:
        for input_name, values in inputs.items():
            told = tell(probe, values[known], target.values, fold)
            score(scores, told, target, trajectory, f"{start} {probe} {target.name}", input_name)

    # 3. a table of their means
    metrics = scores.metrics
    majority = f"{start} majority {target.name}"
    if target.classes:
        words = f"accuracy, {len(target.classes)} classes; the most frequent one "
        words += f"{metrics[majority]['mean']:.3f}"
    else:
        words = f"R2; always the mean is {metrics[f'{majority} cm']['mean']:.1f} cm off"
    print(f"{target.name}: {words}; {len(trajectory)} frames of {len(numbers)} trajectories")
    print(" " * 14 + "".join(f"{probe:>8s}" for probe in PROBES))
    for input_name in inputs:
        names = [f"{start} {probe} {target.name} {input_name}" for probe in PROBES]
        print(f"{input_name:14s}" + "".join(f"{metrics[name]['mean']:8.3f}" for name in names))


# ---- Command -------------------------------------------------------------------------------------


def measure(args):
    """`evaluate.py probe`.

    1. the model   2. trajectories of many tasks and of one, and what is to be told of them
    3. of each of the two: features; each probe of each target"""
    # 1. the model
    started = time.time()
    if (args.task or args.trajectories) and not args.one_task:
        raise ValueError("--task and --trajectories are of a folder that --one-task names")
    if args.axes and not Path(args.axes).is_file():
        raise ValueError(f"--axes {args.axes}: no such file")
    args.trajectories = args.trajectories or TRAJECTORIES
    dist = evaluate.start_ranks(args)
    backbone = model.load(args.policy, args.device, model.compute_dtype(args.device))
    backbone.net.eval()

    # 2. trajectories of many tasks and of one, and what is to be told of them
    episodes, words = evaluate.episodes_to_ask(backbone, args.data, args.split)
    many_frames = frames_of(episodes, args.stride)
    many_targets, missing = read_targets(many_frames, args)
    parts = [(many_frames, many_targets)]
    lines = [f"many tasks: {words}"]
    if args.one_task:
        episodes, words = evaluate.episodes_to_ask(backbone, args.one_task, args.split)
        episodes = trajectories_of_one_task(episodes, args.task, args.trajectories)
        one_frames = frames_of(episodes, args.stride)
        segments = one_frames.take(progress(episodes, args.classes)).tolist()
        parts.append((one_frames, [Target("one-task", *one_hot(segments))]))
        lines.append(f"one task: {len(episodes)} of {episodes[0].task!r}, from {words}")
    else:
        missing.append(f"one-task: give --one-task a folder, recorded as by {RECORD}")
    if dist.rank == 0:
        print("\n".join([*lines, *[f"left out: {line}" for line in missing]]))

    # 3. of each of the two: features; each probe of each target
    start = "think probe" if args.think else "probe"
    scores = Scores({}, {})
    for frames, targets in parts:
        inputs = read_inputs(backbone, frames, args, dist)
        if dist.rank == 0:
            for target in targets:
                probe_all(scores, inputs, target, frames, start)
    if dist.rank == 0:
        evaluate.write_metrics(scores.metrics, scores.paired, args, started, record_as=start)
