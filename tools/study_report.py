"""The report of tools/study.py: `python -m tools.study report`.

Reads results/study/*.json, writes the tables into a page between its lines `<!-- study: NAME -->`
and `<!-- end -->`, so that the prose around them stays, and two figures beside it. A page may have
some of the TABLES alone.

Models are compared on what both were measured on: per seed the same prompts, trials or questions.
The interval of a difference resamples seeds, and within each drawn seed its items; p is that of the
same resamples, and Holm's correction is over all comparisons of the study. Of one seed the interval
knows nothing of other seeds, and says so.

In the order of the file: statistics, results, comparisons, tables, figures, the command.
"""

import argparse
import re
import shlex
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import evaluate
import model
from evaluate import Interval
from tools import plot, study
from tools.extras import require

# ---- Statistics ----------------------------------------------------------------------------------
#
# S seeds, N items (prompts, trials, questions) of a seed, R resamples.

# p is at least 2 / (R + 1): below 0.05 after a correction by 900 comparisons. Raise it beyond that.
RESAMPLES = 40_000

# Of few seeds p is too small. Simulated share of p < 0.05 where there is no difference, when seeds'
# true means have a standard deviation as large as the standard error of one of them over its items,
# and 3 times as large: 2 seeds 0.09 and 0.28, 3 seeds 0.06 and 0.19, 4 seeds 0.05 and 0.15, 5 seeds
# 0.05 and 0.12.
FEW_SEEDS = 5  # with fewer the captions say so
SEEDS_OF_BOLD = 3  # with fewer nothing is bold


class Estimate(NamedTuple):
    """A mean over seeds and items."""

    interval: Interval  # 95%; "n" counts the items of all seeds
    by_seed: dict[int, float]  # mean of each seed
    p: float  # two-sided, of the mean being 0


def hierarchical_bootstrap(by_seed: dict[int, Sequence[float]], resamples=RESAMPLES) -> Estimate:
    """Mean of the seeds' means, with a percentile interval: S seeds are drawn with replacement, and
    of each drawn seed its N items with replacement. by_seed: seed -> N values, at least one.

    Seeds of a single value each, 0 and 1: means of 0, 0.5 and 1 in 1/4, 1/2 and 1/4 of all
    resamples, so [0, 1]. p = 2 (1 + k) / (1 + R), at most 1: k of the R means are on the rarer side
    of 0 (0 itself counts on both); the 1 is the observed mean, so that p is never 0."""
    rng = np.random.default_rng(0)
    values = [np.asarray(items, np.float64) for items in by_seed.values()]
    count = len(values)
    drawn_seeds = rng.integers(0, count, (resamples, count))  # (R, S)
    drawn_means = np.empty((resamples, count))
    for s, items in enumerate(values):
        is_drawn = drawn_seeds == s
        drawn_means[is_drawn] = resampled_means(items, int(is_drawn.sum()), rng)
    means = drawn_means.mean(1)  # (R,)
    low, high = np.quantile(means, [0.025, 0.975])
    seed_means = {seed: float(items.mean()) for seed, items in zip(by_seed, values, strict=True)}
    mean = float(np.mean(list(seed_means.values())))
    n = sum(len(items) for items in values)
    rarer_side = min((means <= 0).sum(), (means >= 0).sum())
    p = min(2 * (1 + int(rarer_side)) / (1 + resamples), 1.0)
    interval: Interval = {"mean": mean, "low": float(low), "high": float(high), "n": n}
    return Estimate(interval, seed_means, p)


def resampled_means(items: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) -> (count,): means of N items each, drawn with replacement. How often each of the U
    values that differ is drawn is multinomial: of successes, with U = 2, much the faster way."""
    values, repeats = np.unique(items, return_counts=True)  # (U,), (U,)
    drawn = rng.multinomial(len(items), repeats / len(items), count)  # (count, U)
    return drawn @ values / len(items)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the smallest of m p-values times m, the next times m - 1, ..., never less
    than one before it, at most 1.

    0.01, 0.04, 0.03, 0.005 -> 0.03, 0.06, 0.06, 0.02."""
    m = len(p_values)
    corrected = [0.0] * m
    largest = 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min((m - rank) * p_values[i], 1.0))
        corrected[i] = largest
    return corrected


# ---- Results -------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """What models are compared in."""

    name: str  # in the results file
    title: str
    scale: float = 1.0
    digits: int = 3


METRICS = [  # of a model itself
    Metric("think greedy r_a", "greedy r_a"),
    Metric("think greedy l1", "greedy L1"),
    Metric("think sampled r_a", "sampled r_a"),
    Metric("think greedy thought true", "true in thoughts"),
    Metric("answers", "questions"),
    Metric("think success", "by its own tokens, %", 100, 1),
    Metric("think sampled success", "by them as sampled, %", 100, 1),
    Metric("think chain length", "chain, own tokens", 1, 2),
    Metric("direct success", "by them without a thought, %", 100, 1),
    Metric("direct chain length", "chain, without a thought", 1, 2),
]
WORTH_METRICS = [  # of its thoughts: the r_a that is to be expected behind them
    Metric("worth sampled", "behind a sampled thought"),
    Metric("worth own", "behind the most probable one"),
    Metric("worth best", "behind the best of those sampled"),
    Metric("worth true", "behind the true one"),
]
GAIN_METRICS = [  # over its parent: the parts of "worth sampled", which are differences already
    Metric("gain thoughts", "by its thoughts"),
    Metric("gain form", "of that by their form"),
    Metric("gain answers", "by its answers"),
]
HEAD_METRICS = [  # of a head on it
    Metric("success", "success, %", 100, 1),
    Metric("chain length", "chain length", 1, 2),
]

Results = dict[str, dict[int, dict]]  # model -> seed -> results file


def read_study(folder: str, matrix: study.Matrix) -> Results:
    """The results of all models of the matrix that have any. ValueError when none has."""
    found = {}
    for one in matrix.models:
        seeds = {}
        for path in Path(folder).glob(f"{one.name}_*.json"):
            seed = path.stem.removeprefix(f"{one.name}_")
            if seed.isdigit():
                seeds[int(seed)] = evaluate.read_results(path)
        if seeds:
            found[one.name] = dict(sorted(seeds.items()))
    if not found:
        raise ValueError(f"{folder}: no results of the study in it; run python -m tools.study")
    return found


def variant_of(results: Results, name: str, seed: int, head: str) -> dict:
    """What was measured of a model, or of a head on it; an empty one where nothing was."""
    empty = {"metrics": {}, "paired": {}}
    file = results.get(name, {}).get(seed, {"arms": {}})
    return file["arms"].get(study.variant_name(name, head), empty)


def items_of(results: Results, name: str, head: str, metric: str) -> dict[int, np.ndarray]:
    """Seed -> (N,) values of its prompts, trials or chains; NaN where one has none."""
    found = {}
    for seed in results.get(name, {}):
        items = variant_of(results, name, seed, head)["paired"].get(metric, [])
        if items:
            found[seed] = np.array(items, float)
    return found


def known(items: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The same without NaN, and without seeds that then have none."""
    kept = {seed: values[~np.isnan(values)] for seed, values in items.items()}
    return {seed: values for seed, values in kept.items() if len(values)}


# ---- Comparisons ---------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """The model `new` minus the model `old`, on what both were measured on."""

    new: str
    old: str
    head: str  # of both; "": the models themselves
    metric: Metric
    estimate: Estimate
    corrected_p: float  # by Holm, over all comparisons of the study


def compare(results: Results, matrix: study.Matrix, resamples: int = RESAMPLES) -> list[Comparison]:
    """All that the matrix declares by `against` and that has results."""
    estimates = []
    for one in matrix.models:
        ways = [("", metric) for metric in METRICS + WORTH_METRICS]
        ways += [(head, metric) for head in one.heads.split() for metric in HEAD_METRICS]
        for old in one.against.split():
            for head, metric in ways:
                differences = paired(results, one.name, old, head, metric.name)
                if differences:
                    estimate = hierarchical_bootstrap(differences, resamples)
                    estimates.append((one.name, old, head, metric, estimate))
        for metric in GAIN_METRICS:
            gains = known(items_of(results, one.name, "", metric.name))  # differences as they are
            if gains:
                estimate = hierarchical_bootstrap(gains, resamples)
                estimates.append((one.name, one.parent, "", metric, estimate))
    corrected = holm([estimate.p for *_, estimate in estimates])
    return [Comparison(*item, p) for item, p in zip(estimates, corrected, strict=True)]


def paired(results: Results, new: str, old: str, head: str, metric: str) -> dict[int, np.ndarray]:
    """Seed -> (N,) differences on the same items, of the seeds that both have. ValueError when of a
    seed the two were not measured on as many."""
    after = items_of(results, new, head, metric)
    before = items_of(results, old, head, metric)
    differences = {}
    for seed in after.keys() & before.keys():
        if len(after[seed]) != len(before[seed]):
            raise ValueError(
                f"{metric}, seed {seed}: {new} has {len(after[seed])} values and {old} "
                f"{len(before[seed])}; measure both by the same command (--redo)"
            )
        differences[seed] = after[seed] - before[seed]
    return known(dict(sorted(differences.items())))


# ---- Tables --------------------------------------------------------------------------------------


class Report(NamedTuple):
    """All that tables and figures are made from."""

    results: Results
    matrix: study.Matrix
    comparisons: list[Comparison]
    records: dict[str, dict]  # of tools.study: what each stage took


def cell(interval: Interval, metric: Metric) -> str:
    """mean [low, high] in the metric's unit."""
    ends = [f"{metric.scale * interval[key]:.{metric.digits}f}" for key in ("mean", "low", "high")]
    mean, low, high = ends
    return f"{mean} [{low}, {high}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, without columns of nothing but dashes."""
    shown = [i for i in range(len(head)) if i == 0 or any(row[i] != "-" for row in rows)]
    lines = ["| " + " | ".join(head[i] for i in shown) + " |", "|---" * len(shown) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row[i] for i in shown) + " |")
    return lines


def captioned_table(head: Sequence[str], rows: Sequence[Sequence[str]], words: str) -> list[str]:
    """A table and the words below it, without rows of nothing but dashes behind their name; a
    sentence in place of both where none is left."""
    rows = [row for row in rows if any(value != "-" for value in row[1:])]
    if not rows:
        return ["Not measured yet."]
    return [*table(head, rows), "", words]


def seeds_and_n(items: dict[int, np.ndarray]) -> str:
    """ "3 x 512": three seeds of 512 items; "2 x 512, 1 x 400" where they differ."""
    sizes = [len(values) for values in items.values()]
    return ", ".join(f"{sizes.count(size)} x {size}" for size in sorted(set(sizes)))


def plain_cell(report: Report, name: str, metric: str, digits: int = 3) -> str:
    """A metric that has no values of single items: mean of the seeds, and from where to where; of
    one seed its own interval, where it has one."""
    values = []
    for seed in report.results[name]:
        value = variant_of(report.results, name, seed, "")["metrics"].get(metric)
        if value and value["mean"] is not None:
            values.append(value)
    if not values:
        return "-"
    means = [value["mean"] for value in values]
    if len(values) > 1:
        return f"{np.mean(means):.{digits}f} ({min(means):.{digits}f} to {max(means):.{digits}f})"
    if values[0]["low"] is None:
        return f"{means[0]:.{digits}f}"
    return cell(values[0], Metric(metric, metric, digits=digits))


def models_table(report: Report) -> list[str]:
    """What each model is worth without a head."""
    head = ["model", "format", "distinct thoughts"]
    head += [metric.title for metric in METRICS] + ["seeds x n"]
    rows = []
    for one in report.matrix.models:
        if one.name not in report.results:
            continue
        row = [
            one.name,
            plain_cell(report, one.name, "think sampled r_f"),
            plain_cell(report, one.name, "think sampled distinct thoughts", 0),
        ]
        sizes = []
        for metric in METRICS:
            items = known(items_of(report.results, one.name, "", metric.name))
            row.append(cell(hierarchical_bootstrap(items).interval, metric) if items else "-")
            if items and seeds_and_n(items) not in sizes:
                sizes.append(seeds_and_n(items))
        rows.append([*row, "; ".join(sizes) or "-"])
    words = "Format and distinct thoughts of several seeds: mean (lowest to highest)."
    return captioned_table(head, rows, f"{caption(report)} {words}")


# Of what `evaluate.py thought`, `vqa` and `probe` measure, that which the page shows, under its
# title there: the raw files have all of it.
THOUGHTS = {
    "given kept r_a": "greedy r_a, own thought",
    "given removed r_a": "none",
    "given swapped r_a": "another scene's",
    "given shuffled r_a": "own, shuffled",
    "given true r_a": "the true one",
    "given swapped moved": "moved by another scene's",
    "edited object+cell+move before": "goes to another object unasked",
    "edited object+cell+move follows": "follows an edit to it of object, cell and move",
    "edited cell follows": "of the cell alone",
    "edited left-right follows": "of left and right",
}
WORTHS = {
    "worth drawn spread": "r_a of answers differs by",
    "worth spread": "what thoughts are worth by",
    "worth sampled": "a sampled thought is worth",
    "worth own": "the most probable one",
    "worth best": "the best of those sampled",
    "worth true": "the true one",
}
QUESTIONS = {
    "exact where": "where",
    "exact what": "what",
    "exact target": "target",
    "exact phase": "phase",
    "items direction": "direction",
    "items direction+think": "direction, thinking",
    "number point": "point",
    "path trajectory": "trajectory",
    "items caption": "caption",
}
LAYER = "layer 3 mean"  # what the heads read
PROBES = {
    f"probe knn one-task {LAYER}": "progress in one task, k-NN",
    f"probe knn progress {LAYER}": "in many, k-NN",
    f"probe linear progress {LAYER}": "in many, linear",
    f"probe linear phase {LAYER}": "phase, linear",
    f"probe knn displacement {LAYER}": "displacement R2, k-NN",
    f"probe linear displacement {LAYER}": "displacement R2, linear",
}


def metrics_table(report: Report, shown: dict[str, str], of: str) -> list[str]:
    """A row for each model that has one of these metrics, a column for each metric. of: of what
    intervals of one seed are."""
    head = ["model", *shown.values(), "seeds"]
    rows = []
    for name in report.results:
        asked = []  # seeds
        for seed in report.results[name]:
            metrics = variant_of(report.results, name, seed, "")["metrics"]
            if not shown.keys().isdisjoint(metrics):
                asked.append(seed)
        cells = [plain_cell(report, name, metric) for metric in shown]
        rows.append([name, *cells, str(len(asked)) if asked else "-"])
    words = f"Several seeds: their mean (lowest to highest); one: its interval over {of}."
    return captioned_table(head, rows, f"{words} {caption(report, 'Seeds')}")


def heads_table(report: Report) -> list[str]:
    """How each head drives."""
    head = ["model", "head reads", *[metric.title for metric in HEAD_METRICS]]
    head += ["seconds a chunk", "seeds x n"]
    rows = []
    for one in report.matrix.models:
        for way in one.heads.split():
            row = [one.name, way]
            sizes = []
            for metric in HEAD_METRICS:
                items = known(items_of(report.results, one.name, way, metric.name))
                row.append(cell(hierarchical_bootstrap(items).interval, metric) if items else "-")
                if items:
                    sizes.append(seeds_and_n(items))
            row += [seconds_a_chunk(report, one.name, way), "; ".join(sizes)]
            if sizes:
                rows.append(row)
    return captioned_table(head, rows, f"{caption(report)} Seconds: the mean alone.")


def seconds_a_chunk(report: Report, name: str, head: str) -> str:
    seconds = []
    for seed in report.results.get(name, {}):
        ways = variant_of(report.results, name, seed, head).get("seconds", {})
        if "tabletop" in ways:
            seconds.append(ways["tabletop"]["chunk"])
    return f"{np.mean(seconds):.3f}" if seconds else "-"


def difference_cell(one: Comparison) -> str:
    """The difference, bold where it holds after Holm's correction and is of SEEDS_OF_BOLD seeds or
    more; where p is below 0.05, also p before and after it."""
    text = cell(one.estimate.interval, one.metric)
    if one.corrected_p < 0.05 and len(one.estimate.by_seed) >= SEEDS_OF_BOLD:
        text = f"**{text}**"
    if one.estimate.p < 0.05:
        text += f", p {one.estimate.p:.2g} ({one.corrected_p:.2g})"
    return text


def differences_table(report: Report, metrics: list[Metric]) -> list[str]:
    of_heads = metrics is HEAD_METRICS
    by_row = {}  # (new, old, head) -> metric -> comparison
    for one in report.comparisons:
        if one.metric in metrics:
            by_row.setdefault((one.new, one.old, one.head), {})[one.metric.name] = one
    rows = []
    for (new, old, head), by_metric in by_row.items():
        row = [f"{new} - {old}"]
        if of_heads:
            row.append(head)
        sizes = []
        seed_counts = {len(one.estimate.by_seed) for one in by_metric.values()}
        for metric in metrics:
            one = by_metric.get(metric.name)
            if one is None:
                row.append("-")
                continue
            text = difference_cell(one)
            seeds = len(one.estimate.by_seed)
            if seeds == 1 and len(seed_counts) > 1:
                text += ", one seed"
            row.append(text)
            size = f"{seeds} x {one.estimate.interval['n'] / seeds:.0f}"
            if size not in sizes:
                sizes.append(size)
        rows.append([*row, "; ".join(sizes)])
    columns = ["difference"]
    if of_heads:
        columns.append("head reads")
    columns += [metric.title for metric in metrics] + ["seeds x n"]
    return captioned_table(columns, rows, f"{caption(report)} {correction(report)}")


def correction(report: Report) -> str:
    """What a table of differences needs to be read."""
    count = len(report.comparisons)
    words = (
        "Differences on the same prompts, trials, chains and questions; seeds and, within them, "
        f"items resampled {RESAMPLES:,} times. p is of a difference of 0, shown below 0.05, behind "
        f"it in brackets Holm's correction over all {count} comparisons of the study; bold: below "
        f"0.05 after it, of {SEEDS_OF_BOLD} seeds or more. One seed (1 x n): the interval knows "
        "nothing of other seeds."
    )
    if any(len(one.estimate.by_seed) < FEW_SEEDS for one in report.comparisons):
        words += (
            f" Of fewer than {FEW_SEEDS} seeds p is too small: without any difference it is below "
            "0.05 in 9 to 28% of all cases with 2 seeds, in 6 to 19% with 3, the more the further "
            "training runs differ."
        )
    return words


def caption(report: Report, of_seeds: str = "Mean [95% interval] over seeds") -> str:
    """What the numbers of these seeds are; hardware, hours."""
    files = [file for seeds in report.results.values() for file in seeds.values()]
    seeds = sorted({seed for by_seed in report.results.values() for seed in by_seed})
    hardware = "; ".join(sorted({file.get("hardware", "unknown") for file in files}))
    hours = sum(one["seconds"] * one["slots"] for one in ended(report.records)) / 3600
    presets = sorted({file["preset"] for file in files})
    words = f"{of_seeds} {', '.join(map(str, seeds))}; {hardware}; "
    words += f"the study so far took {hours:.1f} worker hours."
    if presets != ["study"]:
        words = f"**Preset {', '.join(presets)}: these numbers say nothing of the method.** {words}"
    return words


def ended(records: dict[str, dict]) -> list[dict]:
    return [one for one in records.values() if "seconds" in one]


def part_of_cost(rest: str) -> str:
    """The column of a stage, by what its key has behind MODEL_SEED: "" and "(1 of 2)" are training,
    "head prompt" is of heads, all else is measuring."""
    if not rest or rest.startswith("("):
        return "training"
    if rest.startswith("head "):
        return "heads"
    return "measuring"


def cost_table(report: Report) -> list[str]:
    """What each model took: of a seed, on average over those that have any stage of that part."""
    parts = ["training", "heads", "measuring"]
    rows = []
    for one in report.matrix.models:
        cost = {part: {} for part in parts}  # part -> seed -> worker seconds of its stages
        samples = "-"
        tokens = "-"
        for key, record in report.records.items():
            folder, _, rest = key.partition(" ")
            name, _, seed = folder.rpartition("_")
            if name != one.name or "seconds" not in record:
                continue
            if not rest:  # its last command, which writes the model
                samples = samples_of(record["command"])
                if "num_tokens" in record:
                    tokens = f"{record['num_tokens'] / 1e6:.1f}"
            of_part = cost[part_of_cost(rest)]
            of_part[seed] = of_part.get(seed, 0.0) + record["seconds"] * record["slots"]
        seeds = {seed for of_part in cost.values() for seed in of_part}
        minutes = []
        for of_part in cost.values():
            mean = sum(of_part.values()) / max(len(of_part), 1)
            minutes.append(f"{mean / 60:.1f}")
        if seeds:
            rows.append([one.name, samples, tokens, *minutes, str(len(seeds))])
    columns = ["model", "trained on", "million tokens", *parts, "seeds"]
    words = (
        "Tokens: of all samples or rollouts, prompts and images too. Worker minutes a seed, of the "
        f"seeds that ran that part, without data. {caption(report, 'Seeds')}"
    )
    return captioned_table(columns, rows, words)


def samples_of(command: str) -> str:
    """ "57,600 samples" of an SFT command; "2,560 prompts x 8 rollouts" of an RL command."""
    script, *flags = shlex.split(command)
    if script not in study.TRAINING:
        return "-"
    module = study.TRAINING[script]
    cfg = model.parse_config(module.Config, module.PRESETS, [f for f in flags if f != "--resume"])
    if script == "grpo.py":
        return f"{cfg.steps * cfg.prompts:,} prompts x {cfg.group} rollouts"
    return f"{cfg.steps * cfg.batch:,} samples"


def matrix_table(report: Report) -> list[str]:
    """What the study asks."""
    rows = []
    for one in report.matrix.models:
        parent = one.parent or "-"
        rows.append([one.name, parent, one.answers, one.heads or "-", str(one.seeds)])
    return table(["model", "starts from", "what it answers", "heads read", "seeds"], rows)


TABLES: dict[str, Callable[[Report], list[str]]] = {
    "matrix": matrix_table,
    "models": models_table,
    "differences": lambda report: differences_table(report, METRICS),
    "thoughts": lambda report: metrics_table(report, THOUGHTS, "prompts"),
    "worths": lambda report: metrics_table(report, WORTHS, "prompts"),
    "worth differences": lambda report: differences_table(report, WORTH_METRICS),
    "gains": lambda report: differences_table(report, GAIN_METRICS),
    "questions": lambda report: metrics_table(report, QUESTIONS, "questions"),
    "probe": lambda report: metrics_table(report, PROBES, "trajectories"),
    "heads": heads_table,
    "head differences": lambda report: differences_table(report, HEAD_METRICS),
    "cost": cost_table,
}

BEGIN = "<!-- study:"
# no block within another: without its end it would take all up to the end of the next one
BLOCK = re.compile(rf"({BEGIN} ([a-z ]+) -->\n)(?:(?!{BEGIN}).)*?(<!-- end -->)", re.DOTALL)


def fill(page: str, path: Path, report: Report) -> str:
    """The page with its tables made anew. ValueError for one that cannot be filled."""
    names = {match.start(): match[2] for match in BLOCK.finditer(page)}
    wrong = "" if names else "no place for a table"
    for match in re.finditer(rf"{BEGIN} *(.*?) *(-->|\n|$)", page):
        name = names.get(match.start(), "")
        if name not in TABLES:
            wrong = f"no table {match[1]}"
            if match[1] in TABLES:
                wrong = f"{match[1]} has no <!-- end -->, or does not stand on a line of its own"
            break
    if wrong:
        raise ValueError(
            f"{path}: {wrong}; write <!-- study: NAME --> and <!-- end -->, of {', '.join(TABLES)}"
        )

    def with_table(match: re.Match) -> str:
        begin, name, end = match.groups()
        lines = TABLES[name](report)
        return begin + "\n".join(lines) + f"\n{end}"

    return BLOCK.sub(with_table, page)


# ---- Figures -------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of a figure: a mean, its interval, and what each seed says."""

    label: str
    interval: Interval
    by_seed: list[float]


def draw_rows(axes, rows: list[Row], metric: Metric, colours: dict[str, str]) -> None:
    """Means with their intervals one below the other, seeds as small dots."""
    for place, row in enumerate(rows):
        mean, low, high = (metric.scale * row.interval[key] for key in ("mean", "low", "high"))
        low = min(low, mean)  # of equal items the resamples' mean may be 1e-17 beside it
        high = max(high, mean)
        colour = colours[row.label.split()[0]]
        errors = [[mean - low], [high - mean]]
        axes.errorbar([mean], [place], xerr=errors, fmt="o", ms=5, capsize=2, lw=1.4, color=colour)
        seeds = [metric.scale * value for value in row.by_seed]
        axes.plot(seeds, [place + 0.28] * len(seeds), ".", ms=4, color=colour, alpha=0.6)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    axes.set_title(metric.title, fontsize=10)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


SHOWN = {  # metric of a model itself -> title of its panel
    "think greedy r_a": "greedy r_a",
    "think greedy thought true": "true in thoughts",
    "worth sampled": "r_a to be expected behind a sampled thought",
    "think success": "by its own tokens, %",
}
SHOWN_HEADS = ("prompt", "thought")


def difference_rows(report: Report, head: str, metric_name: str) -> list[Row]:
    """Of the many comparisons those over SFT and over what a model starts from, and all of SFT and
    SFT+RL: the tables have more. Without those of a model that has nothing but 0, as r_a of the
    base, which writes no actions: beside these no other difference would be seen."""
    rows = []
    for one in report.comparisons:
        if one.head != head or one.metric.name != metric_name:
            continue
        parent = study.model_named(report.matrix.models, one.new).parent
        is_shown = one.old in ("SFT", parent) or one.new in ("SFT", "SFT+RL")
        if is_shown and all(has_any(report, name, one) for name in (one.new, one.old)):
            seeds = list(one.estimate.by_seed.values())
            rows.append(Row(f"{one.new} - {one.old}", one.estimate.interval, seeds))
    return rows


def has_any(report: Report, name: str, one: Comparison) -> bool:
    """Whether a model of a comparison has any value but 0."""
    items = known(items_of(report.results, name, one.head, one.metric.name))
    return any(np.any(values) for values in items.values())


def head_rows(report: Report, metric: Metric) -> list[Row]:
    rows = []
    for one in report.matrix.models:
        for head in one.heads.split():
            items = known(items_of(report.results, one.name, head, metric.name))
            if items:
                estimate = hierarchical_bootstrap(items)
                seeds = list(estimate.by_seed.values())
                rows.append(Row(f"{one.name} {head}", estimate.interval, seeds))
    return rows


def figures_of(report: Report) -> dict[str, object]:
    """Name -> matplotlib Figure: "differences", of models and of the two ways to the head, and
    "heads", how each drives; of what there is."""
    panels = {"differences": [], "heads": []}  # (title's metric, rows)
    by_name = {metric.name: metric for metric in METRICS + WORTH_METRICS}
    for name, title in SHOWN.items():
        titled = by_name[name]._replace(title=title)
        panels["differences"].append((titled, difference_rows(report, "", name)))
    success, _ = HEAD_METRICS
    for head in SHOWN_HEADS:
        titled = success._replace(title=f"success of the head that reads: {head}, %")
        panels["differences"].append((titled, difference_rows(report, head, success.name)))
    for metric in HEAD_METRICS:
        panels["heads"].append((metric, head_rows(report, metric)))
    figures = {}
    for name, content in panels.items():
        filled = [(metric, rows) for metric, rows in content if rows]
        if filled:
            figures[name] = draw_figure(report, filled, has_zero=name == "differences")
    return figures


def draw_figure(report: Report, panels: list[tuple[Metric, list[Row]]], has_zero: bool):
    (figures,) = require(plot.MATPLOTLIB, "matplotlib.figure")
    colours = plot.colour_of([one.name for one in report.matrix.models])
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    longest = max(len(rows) for _, rows in panels)
    size = (4.6 * columns, (0.8 + 0.24 * longest) * lines + 0.4)
    figure = figures.Figure(figsize=size, layout="constrained")
    for place, (metric, rows) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, place + 1)
        if has_zero:
            axes.axvline(0, color="black", lw=0.8)
        draw_rows(axes, rows, metric, colours)
    counts = [row.interval["n"] for _, rows in panels for row in rows]
    text = (
        f"{caption(report).replace('**', '')} n {min(counts)} to {max(counts)}; small dots: seeds"
    )
    figure.supxlabel(textwrap.fill(text, 60 * columns), fontsize=7)
    return figure


# ---- Command -------------------------------------------------------------------------------------


def main(argv: list[str], matrix: study.Matrix) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.study report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--results", default="results/study", help="folder of results files")
    add("--page", default="docs/study.md", help="its tables are made anew, its prose stays")
    add(
        "--figures",
        help="beginning of the pictures' names, as docs/study_, the page's; empty: none",
    )
    args = parser.parse_args(argv)
    path = Path(args.page)
    figures = f"{path.with_suffix('')}_" if args.figures is None else args.figures
    text = path.read_text()
    results = read_study(args.results, matrix)
    comparisons = compare(results, matrix)
    report = Report(results, matrix, comparisons, study.read_records(args.results))
    filled = fill(text, path, report)
    path.write_text(filled)
    print(f"{path}: {len(results)} models, {len(comparisons)} comparisons")
    if figures:
        for name, figure in figures_of(report).items():
            picture = f"{figures}{name}.png"
            figure.savefig(picture, dpi=110)
            print(picture)
