"""tools/plot.py: what its panels hold, by matplotlib's own objects."""

import json

import numpy as np
import pytest
from PIL import Image

from tools import plot


def write_log(folder, *records, resume=False):
    folder.mkdir(parents=True, exist_ok=True)
    head = {"config": {"resume": resume}, "commit": "x"}
    with open(folder / "log.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in (head, *records))


def rl(step, reward, **more):
    return {"step": step, "reward": reward, "loss": 0.001, "kl": 0.1 * step, "seconds": 1.0, **more}


def test_a_log_is_the_run_that_counts(tmp_path):
    write_log(tmp_path, rl(1, 0.9), rl(2, 0.9), rl(3, 0.9))
    write_log(tmp_path, {"step": 0, "eval_greedy_r_a": 0.3}, rl(1, 0.1), rl(2, 0.2), rl(3, 0.3))
    write_log(tmp_path, rl(3, 0.35), {"step": 3, "rollout": "text"}, rl(4, 0.4), resume=True)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "rew')  # being written
    log = plot.read_log(tmp_path / "log.jsonl")
    assert log.series["reward"] == {1: 0.1, 2: 0.2, 3: 0.35, 4: 0.4}
    assert log.series["eval_greedy_r_a"] == {0: 0.3}
    assert "loss" not in log.series and "rollout" not in log.series
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"log\.jsonl:14: not JSON"):
        plot.read_log(tmp_path / "log.jsonl")


@pytest.mark.parametrize("line", ["3", "[1]", '{"loss": 1.0}', '{"config": 3}', '{"step": [1]}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    """It ended in a KeyError, or another traceback."""
    write_log(tmp_path, rl(1, 0.1))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl:3: neither .* delete the line"):
        plot.read_log(tmp_path / "log.jsonl")


def test_smoothing_by_hand():
    values = np.array([0.0, 3.0, 6.0, 0.0])
    np.testing.assert_allclose(plot.smooth(values, 3), [1.5, 3, 3, 3])
    np.testing.assert_allclose(plot.smooth(values, 0), values)


def test_names_of_runs_are_short(tmp_path):
    logs = [plot.RunLog(str(tmp_path / name), {}) for name in ("sft", "vla/SFT", "vla/base")]
    assert [log.name for log in plot.short_names(logs)] == ["sft", "vla/SFT", "vla/base"]
    assert plot.short_names(logs[1:2])[0].name == "SFT"


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


def test_panels_hold_the_numbers(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extras.txt")
    evaluations = [{"step": step, "eval_greedy_r_a": 0.1 + step / 100} for step in (0, 40)]
    write_log(tmp_path / "runs/grpo", *[rl(step, step / 40) for step in range(1, 41)], *evaluations)
    write_log(tmp_path / "runs/sft", {"step": 20, "loss": 2.0}, {"step": 40, "loss": 0.5})
    value = {"mean": 0.5, "low": 0.4, "high": 0.7, "n": 9}
    results = {"arms": {"SFT": {"metrics": {"success": value}}, "base": {"metrics": {}}}}
    results["arms"]["base"]["metrics"] = {"success": {**value, "mean": 0.6}, "success goal": value}
    (tmp_path / "r.json").write_text(json.dumps(results))
    figure = plot.figure_of([str(tmp_path / "runs"), str(tmp_path / "r.json")], "base,SFT")
    found = panels(figure)
    assert list(found) == ["loss", "reward", "r_a", "KL to the start, nats a token", "success, %"]
    raw, mean = found["reward"].get_lines()
    np.testing.assert_allclose(raw.get_ydata(), np.arange(1, 41) / 40)
    np.testing.assert_allclose(mean.get_ydata()[:2], [1.5 / 40, 2 / 40])
    (dots,) = found["r_a"].get_lines()
    assert dots.get_xdata().tolist() == [0, 40] and dots.get_label() == "grpo, greedy"
    assert [line.get_label() for line in found["loss"].get_lines()][1] == "sft", "not GRPO's"
    assert found["loss"].get_yscale() == "log"
    bars = found["success, %"]
    heights = [bar.get_height() for bar in bars.patches]
    assert heights == pytest.approx([50, 60, 50]), "base: goal, average; SFT: average"
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["goal", "average"]
    low, high = bars.collections[0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((40, 70)), "the interval, not twice its width"


def test_results_of_questions_are_bars_too(tmp_path):
    """Their metrics are named by kinds, which no panel knows; one without an answer has no bar, and
    neither has a count, whose lack of an interval ended in a TypeError."""
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extras.txt")
    value = {"mean": 0.5, "low": 0.4, "high": 0.7, "n": 9}
    none = {"mean": None, "low": None, "high": None, "n": 0}
    number = {"mean": 344, "low": None, "high": None, "n": 512}
    metrics = {"exact colour": value, "exact shape": none, "answers": value}
    metrics["direct greedy distinct actions"] = number
    (tmp_path / "vqa.json").write_text(json.dumps({"arms": {"SFT": {"metrics": metrics}}}))
    found = panels(plot.figure_of([str(tmp_path / "vqa.json")]))
    labels = [tick.get_text() for tick in found["mean"].get_xticklabels()]
    assert labels == ["exact\ncolour", "answers"]
    assert [bar.get_height() for bar in found["mean"].patches] == [0.5, 0.5]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_command_writes_a_picture(tmp_path, suffix):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extras.txt")
    write_log(tmp_path / "run", rl(1, 0.1), rl(2, 0.2))
    out = tmp_path / f"new/picture{suffix}"
    plot.main([str(tmp_path / "run"), "--out", str(out)])
    if suffix == ".png":
        assert np.asarray(Image.open(out)).std() > 5
    else:
        assert "<svg" in out.read_text()


def test_what_cannot_be_drawn_is_one_line(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extras.txt")
    with pytest.raises(ValueError, match="name it .png"):
        plot.main([str(tmp_path), "--out", "picture.gif"])
    with pytest.raises(FileNotFoundError, match=r"no log\.jsonl in it or below"):
        plot.figure_of([str(tmp_path)])
    write_log(tmp_path / "empty")
    with pytest.raises(ValueError, match="no step in it yet"):
        plot.figure_of([str(tmp_path / "empty")])
    (tmp_path / "r.json").write_text('{"arms": {"SFT": {"metrics": {}}}}')
    with pytest.raises(ValueError, match="no variant RL; it has SFT"):
        plot.figure_of([str(tmp_path / "r.json")], "RL")
    with pytest.raises(ValueError, match="no number that a panel shows"):
        plot.figure_of([str(tmp_path / "r.json")])
    write_log(tmp_path / "run", rl(1, 0.1))
    with pytest.raises(ValueError, match="--variants: of results files, and none is named"):
        plot.main([str(tmp_path / "run"), "--out", "picture.png", "--variants", "SFT"])


@pytest.mark.parametrize(
    "arm", [{}, {"metrics": []}, {"metrics": {"success": 3}}, {"metrics": {"success": {"mean": 1}}}]
)
def test_results_of_another_shape_are_named(tmp_path, arm):
    """They were tracebacks."""
    (tmp_path / "r.json").write_text(json.dumps({"arms": {"SFT": arm}}))
    with pytest.raises(ValueError, match=r"r\.json: SFT is not as evaluate\.py writes it"):
        plot.read_variants(tmp_path / "r.json", "")


def test_panels_of_two_files_tell_them_apart(tmp_path):
    """Those of the probe had one title."""
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extras.txt")
    value = {"mean": 0.5, "low": 0.4, "high": 0.7, "n": 9}
    metrics = {"success": value, "probe knn progress layer 0 mean": value}
    for name in ("a", "b"):
        results = {"arms": {"SFT": {"metrics": metrics}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    found = panels(plot.figure_of([str(tmp_path / "a.json"), str(tmp_path / "b.json")]))
    titles = ["success, %", "progress in many tasks, accuracy: k-NN"]
    assert list(found) == [f"{title} ({name})" for name in "ab" for title in titles]
