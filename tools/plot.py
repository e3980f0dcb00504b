"""Curves of runs and bars of results in one picture.

    python -m tools.plot runs/sft runs/grpo runs/vla --out curves.png
    python -m tools.plot results/speedrun.json --out bars.svg
    python -m tools.plot runs/speedrun results/speedrun.json --out all.png
    python -m tools.plot results/probe.json --columns 4 --out probe.png

A folder of a run gives curves from its log.jsonl, a folder above several runs those of each; a
results file of evaluate.py gives bars with 95% intervals, a colour for each model; of what
`evaluate.py probe` measured lines over the layers. A panel shows up when something has its numbers:
see CURVES and BARS (a results file with none of the latter's shows all that have an interval). Of
what is logged at each step a thin line is as it was, a thick one the mean over a twentieth of the
run; held-out evaluations are dots.

Needs matplotlib. In the order of the file: a run's log, curves, bars, layers, the command.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import evaluate
import model
from fast_tokenizer import count
from tools.board import is_new_run, read_record
from tools.extras import require

MATPLOTLIB = "matplotlib==3.11.2"
FORMATS = (".png", ".svg", ".pdf", ".jpg")

# ---- A run's log ---------------------------------------------------------------------------------


class RunLog(NamedTuple):
    """The numbers of a log.jsonl."""

    name: str
    series: dict[str, dict[int, float]]  # metric -> step -> value


def read_log(path: str | Path) -> RunLog:
    """Of the steps that a resumed run repeats the later ones; of a folder in which a new run was
    begun that run alone. A last line that is still being written is left out. ValueError naming
    the line."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    series = {}
    for number, line in enumerate(lines[:-1], 1):
        record = read_record(path, number, line)
        if is_new_run(record):
            series = {}
        if "config" in record:
            continue
        if "reward" in record:
            record.pop("loss", None)  # of GRPO: near 0 whatever the policy does
        step = record.pop("step")
        for key, value in record.items():
            if isinstance(value, int | float):
                series.setdefault(key, {})[step] = value
    if not series:
        raise ValueError(f"{path}: no step in it yet; name a run that has begun to learn")
    return RunLog(str(path.parent), series)


def logs_of(path: Path) -> list[RunLog]:
    """The run in a folder, or those in the folders below it."""
    if path.name == "log.jsonl":
        path = path.parent
    files = [path / "log.jsonl"] if (path / "log.jsonl").exists() else []
    files = files or sorted(path.rglob("log.jsonl"))
    if not files:
        raise FileNotFoundError(f"{path}: no log.jsonl in it or below; name the --out of a stage")
    return [read_log(file) for file in files]


def short_names(logs: list[RunLog]) -> list[RunLog]:
    """The same without the folders that all names begin with: runs/a/sft, runs/a/grpo -> sft, grpo;
    of one run its own folder."""
    parents = [str(Path(log.name).resolve().parent) for log in logs]
    if not parents:
        return []
    above = Path(os.path.commonpath(parents))
    return [log._replace(name=str(Path(log.name).resolve().relative_to(above))) for log in logs]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """(N,) -> (N,): the mean of each with its neighbours, window // 2 to each side where there are
    so many."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first = np.maximum(places - window // 2, 0)
    end = np.minimum(places + window // 2 + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


# ---- Curves --------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """A panel over the steps of runs."""

    title: str
    trained: str  # metric of each training step; "": none
    held_out: dict[str, str]  # metric of evaluations: what its dots are
    logarithmic: bool = False


CURVES = [
    Curves("loss", "loss", {"held_loss": "held out"}, logarithmic=True),
    Curves("token accuracy", "token_accuracy", {}),
    Curves("L1 of chunks", "", {"held_l1": "held out"}),
    Curves("reward", "reward", {"eval_greedy_reward": "greedy", "eval_sampled_reward": "sampled"}),
    Curves("r_a", "r_a", {"eval_greedy_r_a": "greedy", "eval_sampled_r_a": "sampled"}),
    Curves("r_f", "r_f", {"eval_greedy_r_f": "greedy", "eval_sampled_r_f": "sampled"}),
    Curves("groups without spread", "frac_reward_zero_std", {}),
    Curves("entropy, nats a token", "entropy", {}),
    Curves("KL to the start, nats a token", "kl", {}),
    Curves("length, tokens", "completion_length", {}),
    Curves("sampler gap, nats a token", "sampler_gap", {}, logarithmic=True),
    Curves("distinct actions of a group", "distinct_actions", {}),
]
DOTS = {"greedy": "o", "sampled": "^", "held out": "o"}


def draw_curves(axes, panel: Curves, logs: Sequence[RunLog], colours: dict[str, str]) -> None:
    for log in logs:
        colour = colours[log.name]
        if panel.trained in log.series:
            steps = sorted(log.series[panel.trained])
            values = np.array([log.series[panel.trained][step] for step in steps])
            window = len(values) // 20
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.4)
            axes.plot(steps, smooth(values, window), color=colour, linewidth=1.6, label=log.name)
        for metric, words in panel.held_out.items():
            if metric in log.series:
                steps = sorted(log.series[metric])
                values = [log.series[metric][step] for step in steps]
                label = f"{log.name}, {words}"
                axes.plot(steps, values, DOTS[words], ls=":", color=colour, ms=4, label=label)
    if panel.logarithmic:
        axes.set_yscale("log")
    else:
        low, high = axes.get_ylim()
        lines = len(axes.get_legend_handles_labels()[1])
        axes.set_ylim(low, high + 0.12 * lines * (high - low))  # room for the legend
    axes.set_xlabel("step", fontsize=8)


# ---- Bars ----------------------------------------------------------------------------------------


class Bars(NamedTuple):
    """A panel of results: metrics of evaluate.py side by side."""

    title: str
    metrics: dict[str, str]  # metric: what stands below its bars
    scale: float = 1.0  # what values are multiplied by


BARS = [
    Bars(
        "success, %",
        {
            "success spatial": "spatial",
            "success object": "object",
            "success goal": "goal",
            "success long": "long",
            "success": "average",
            "think success": "own tokens,\nthink",
            "direct success": "own tokens,\ndirect",
        },
        100,
    ),
    Bars(
        "sampled thinking rollouts",
        {
            "think sampled r_f": "format, r_f",
            "think sampled reward": "reward",
            "think sampled r_a": "action, r_a",
            "think sampled thought true": "true in\nthoughts",
        },
    ),
    Bars("chain length", {"chain length": "of 5"}),
]
BAR_GROUP = 0.8  # width of the bars of one metric


def bars_of(variants: dict[str, dict]) -> list[Bars]:
    """The panels of BARS that they have numbers of; else, as of questions, whose metrics are named
    by their kinds, one of all their metrics. Of the probe none. variants: name -> metrics."""
    of_all = [name for metrics in variants.values() for name in metrics]
    names = [name for name in dict.fromkeys(of_all) if "probe" not in name.split()]
    panels = [panel for panel in BARS if set(panel.metrics) & set(names)]
    if not panels and names:
        return [Bars("mean", {name: name.replace(" ", "\n", 1) for name in names})]
    return panels


def draw_bars(axes, panel: Bars, variants: dict[str, dict], colours: dict[str, str]) -> None:
    """variants: name -> metrics; each gives a bar to each metric that it has."""
    shown = [m for m in panel.metrics if any(m in metrics for metrics in variants.values())]
    width = BAR_GROUP / len(variants)
    for i, (name, metrics) in enumerate(variants.items()):
        places, means, errors = [], [], []
        for place, metric in enumerate(shown):
            if metric not in metrics:
                continue
            value = metrics[metric]
            mean, low, high = (panel.scale * value[key] for key in ("mean", "low", "high"))
            places.append(place - BAR_GROUP / 2 + width * (i + 0.5))
            means.append(mean)
            errors.append((mean - low, high - mean))
        if places:
            below_above = np.transpose(errors)  # (2, bars)
            axes.bar(places, means, width * 0.92, color=colours[name], label=name)
            axes.errorbar(places, means, below_above, fmt="none", ecolor="black", capsize=2, lw=0.8)
    axes.set_xticks(range(len(shown)), [panel.metrics[metric] for metric in shown], fontsize=8)
    axes.set_ylim(0, axes.get_ylim()[1] * (1 + 0.1 * len(variants)))  # room for the legend


# ---- Layers --------------------------------------------------------------------------------------

PROBE = re.compile(
    r"((?:think )?probe) (knn|linear) (one-task|progress|phase|displacement) layer .+"
)
PROBE_WORDS = {  # parts of a metric's name, in the order of panels: what titles call them
    "probe": "",
    "think probe": ", thinking prompt",
    "knn": "k-NN",
    "linear": "linear",
    "one-task": "progress in one task, accuracy",
    "progress": "progress in many tasks, accuracy",
    "phase": "phase, accuracy",
    "displacement": "way to the target, R2",
}


class Layers(NamedTuple):
    """A panel of `evaluate.py probe`: one probe of one target, layer by layer."""

    start: str  # what its metrics begin with
    probe: str
    target: str

    @property
    def title(self) -> str:
        words = PROBE_WORDS
        return f"{words[self.target]}: {words[self.probe]}{words[self.start]}"


def layers_of(variants: dict[str, dict]) -> list[Layers]:
    """The panels that variants (name -> metrics) have numbers of: of k-NN, then linear."""
    panels = set()
    for metrics in variants.values():
        for match in map(PROBE.fullmatch, metrics):
            if match:
                panels.add(Layers(*match.groups()))
    order = list(PROBE_WORDS)
    return sorted(panels, key=lambda panel: [order.index(word) for word in panel])


def draw_layers(axes, panel: Layers, variants: dict[str, dict], colours: dict[str, str]) -> None:
    """A solid line with 95% intervals of the mean over all tokens, a dashed one of the last token;
    dotted what the raw inputs give, and who sees nothing. Models that are named first have thicker
    lines, so that those of two that agree are both seen."""
    # 1. models
    name = f"{panel.probe} {panel.target}"
    widths = np.linspace(3.5, 1.2, len(variants))
    for width, (variant, metrics) in zip(widths, variants.items(), strict=True):
        for pool, style in (("mean", "-"), ("last", "--")):
            values = []
            while f"{panel.start} {name} layer {len(values)} {pool}" in metrics:
                values.append(metrics[f"{panel.start} {name} layer {len(values)} {pool}"])
            if not values:
                continue
            means, lows, highs = (
                [value[key] for value in values] for key in ("mean", "low", "high")
            )
            layers = range(len(values))
            colour = colours[variant]
            label = variant if pool == "mean" else None
            axes.plot(layers, means, style, color=colour, linewidth=width, label=label)
            if pool == "mean":
                axes.fill_between(layers, lows, highs, color=colour, alpha=0.12, linewidth=0)

    # 2. without a backbone, the same for all models
    of_any = {}
    for metrics in variants.values():
        of_any |= metrics
    raw = {
        "state": f"{name} state",
        "pixels": f"{name} pixels",
        "nothing": f"majority {panel.target}",
    }
    right_ends = (0.98, 0.86, 0.72)  # of the words, which may be at one height
    for x, (words, metric) in zip(right_ends, raw.items(), strict=True):
        value = of_any.get(f"{panel.start} {metric}")
        if value:
            axes.axhline(value["mean"], color="grey", linestyle=":", linewidth=1)
            across = axes.get_yaxis_transform()
            axes.text(
                x, value["mean"], words, transform=across, fontsize=7, ha="right", va="bottom"
            )

    # 3. axes
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.08 * (len(variants) + 1) * (high - low))  # room for the legend
    axes.set_xlabel("layer (solid: mean of all tokens, dashed: last token)", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)


def read_variants(path: Path, chosen: str) -> dict[str, dict]:
    """The models of a results file -> their metrics that have a value and an interval, which counts
    have not; chosen: which models, as evaluate.named_variants() has it."""
    arms = evaluate.read_results(path)["arms"]
    variants = {}
    for name in evaluate.named_variants(chosen, list(arms), path):
        variants[name] = {}
        try:
            for metric, value in arms[name]["metrics"].items():
                interval = [value[key] for key in ("mean", "low", "high")]
                if None not in interval and np.isfinite(interval).all():
                    variants[name][metric] = value
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(
                f"{path}: {name} is not as evaluate.py writes it ({e!r}); make the file anew"
            ) from e
    return variants


# ---- Command -------------------------------------------------------------------------------------

PALETTE = ["#1769aa", "#d1495b", "#2e933c", "#edae49", "#6a4c93", "#0b7a75", "#8d5524", "#52606d"]


def colour_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each of them; more than there are colours begin again."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(dict.fromkeys(names))}


def figure_of(paths: Sequence[str], chosen: str = "", columns: int = 3):
    """A matplotlib Figure of runs and results files. chosen: variants of the latter. ValueError or
    FileNotFoundError naming what cannot be drawn."""
    (figures,) = require(MATPLOTLIB, "matplotlib.figure")
    # 1. what there is
    logs = []
    results = {}  # path -> variants
    for path in map(Path, paths):
        if path.suffix == ".json":
            results[path] = read_variants(path, chosen)
        else:
            logs += logs_of(path)
    if chosen and not results:
        raise ValueError("--variants: of results files, and none is named; leave it out")
    logs = short_names(logs)
    # 2. the panels that it fills
    panels = []  # (title, function that draws it on axes)
    run_colours = colour_of([log.name for log in logs])
    for panel in CURVES:
        names = {panel.trained, *panel.held_out}
        if any(names & set(log.series) for log in logs):
            panels.append((panel.title, draw_curves, (panel, logs, run_colours)))
    for path, variants in results.items():
        colours = colour_of(list(variants))
        name = f" ({path.stem})" if len(results) > 1 else ""
        for panel in bars_of(variants):
            panels.append((panel.title + name, draw_bars, (panel, variants, colours)))
        for panel in layers_of(variants):
            panels.append((panel.title + name, draw_layers, (panel, variants, colours)))
    if not panels:
        raise ValueError(f"{', '.join(paths)}: no number that a panel shows")
    # 3. draw
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = figures.Figure(figsize=(4.4 * columns, 2.9 * rows), layout="constrained")
    for place, (title, draw, content) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        draw(axes, *content)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.legend(fontsize=7, framealpha=0.7, loc="upper right")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", help="folders of runs, results files of evaluate.py (.json)")
    add("--out", required=True, help=f"picture to write: {', '.join(FORMATS)}")
    add("--variants", default="", help="models of the results files, in this order; empty: all")
    add("--columns", type=count, default=3, help="panels side by side")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix not in FORMATS:
        raise ValueError(f"--out {out}: no picture; name it {', '.join(FORMATS)}")
    figure = figure_of(args.paths, args.variants, args.columns)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(f"{out}: {len(figure.axes)} panels, {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    model.run_main(main, "--columns")
