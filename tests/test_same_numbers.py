"""tools/same_numbers.py finds one changed digit, and nothing where only clocks and names differ."""

import json

import pytest

from tools import same_numbers


def tree(folder, r_a=0.25, log_key="grad_norm", grad_norm=1.5, seconds=3.0, expert=0.99, **more):
    """What a speedrun leaves, as far as it is compared."""
    metrics = {"think sampled r_a": {"mean": r_a, "low": 0.1, "high": 0.4, "n": 8}}
    results = {
        "arms": {"SFT": {"metrics": metrics, "paired": {"success": [1, 0]}}},
        "tokens": {"metrics": {"success": {"mean": expert, "low": 0.9, "high": 1, "n": 200}}},
    }
    (folder / "results").mkdir(parents=True)
    (folder / "results/speedrun.json").write_text(json.dumps(results))
    for name in same_numbers.LOGS:
        path = folder / "runs/speedrun" / name / "log.jsonl"
        path.parent.mkdir(parents=True)
        head = {"config": {"out": str(folder)}}
        record = {"step": 1, log_key: grad_norm, "seconds": seconds, **more}
        path.write_text(f"{json.dumps(head)}\n{json.dumps(record)}\n")
    return str(folder)


def test_clocks_and_renamed_keys_are_no_difference(tmp_path, capsys):
    before = tree(tmp_path / "a", log_key="norm")
    after = tree(tmp_path / "b", seconds=9.0)
    assert same_numbers.main([before, after, "--renamed", "norm=grad_norm"]) == 0
    assert "the same: 8 metrics and records" in capsys.readouterr().out  # 3 and 5 logs of one
    assert same_numbers.main([before, after]) == 1


def test_a_key_that_was_added_is_named(tmp_path, capsys):
    before, after = tree(tmp_path / "a"), tree(tmp_path / "b", num_tokens=7)
    assert same_numbers.main([before, after]) == 1
    assert "log.jsonl: step 1: num_tokens differ" in capsys.readouterr().out
    assert same_numbers.main([before, after, "--added", "num_tokens"]) == 0
    other = tree(tmp_path / "c", num_tokens=7, grad_norm=1.6)
    assert same_numbers.main([before, other, "--added", "num_tokens"]) == 1


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"r_a": 0.25000001}, "results/speedrun.json: SFT: metrics: think sampled r_a was"),
        ({"expert": 0.98}, "results/speedrun.json: tokens: success was"),
        ({"grad_norm": 1.5000001}, "runs/speedrun/grpo/log.jsonl: step 1: grad_norm differ"),
    ],
)
def test_one_digit_is_found(tmp_path, capsys, change, line):
    before, after = tree(tmp_path / "a"), tree(tmp_path / "b", **change)
    assert same_numbers.main([before, after]) == 1
    assert line in capsys.readouterr().out


def test_what_cannot_be_compared_is_said_in_one_line(tmp_path, capsys):
    """Both were tracebacks."""
    before = tree(tmp_path / "a")
    with pytest.raises(SystemExit, match=r"error: .*b/results/speedrun.json.*run speedrun.sh in"):
        same_numbers.main([before, str(tmp_path / "b")])
    with pytest.raises(SystemExit):
        same_numbers.main([before, before, "--renamed", "norm"])
    assert "--renamed norm: write OLD=NEW" in capsys.readouterr().err
