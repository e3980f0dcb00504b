"""tools/board.py against TensorBoard's own reader of event files."""

import json
import os

import pytest

pytest.importorskip("tensorboard", reason="pip install -r requirements-extras.txt")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tools import board

HEAD = {"config": {"preset": "speedrun", "lr": 2e-5}, "commit": "abc", "world": 1}


def append(path, *records, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write("\n".join(json.dumps(record) for record in records) + end)


def scalars(folder):
    """-> tag -> [(step, value, time)]"""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value, event.wall_time) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def texts(folder, name):
    events = EventAccumulator(str(folder)).Reload()
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(name)]


def test_names_are_trls():
    assert board.tag("reward") == "train/reward"
    assert board.tag("r_a") == "train/rewards/r_a/mean"
    assert board.tag("r_a_path") == "train/r_a_path"
    assert board.tag("frac_reward_zero_std") == "train/frac_reward_zero_std"
    assert board.tag("eval_sampled_reward") == "eval/reward"
    assert board.tag("eval_greedy_r_f") == "eval_greedy/rewards/r_f/mean"
    assert board.tag("held_loss") == "eval/loss"
    assert board.tag("greedy_where+think") == "eval/greedy_where+think"
    assert board.tag("greedy_truncated") == "eval/greedy_truncated"
    assert board.tag("loss") == "train/loss" and board.tag("action_loss") == "eval/action_loss"
    assert board.tag("token_accuracy") == "train/mean_token_accuracy"
    assert board.tag("action_token_accuracy") == "eval/action_token_accuracy"


def test_a_run_is_followed_while_it_goes_on(tmp_path):
    log = tmp_path / "runs/grpo/log.jsonl"
    append(log, HEAD, {"step": 1, "reward": 0.25, "lr": 1e-3, "seconds": 4.0})
    os.utime(log, (1000, 1000))
    followers = {}
    runs, out = tmp_path / "runs", tmp_path / "out"
    assert board.follow_all(runs, out, followers) == 2
    found = scalars(out / "grpo")
    assert found["train/reward"] == [(1, 0.25, 1000.0)]
    assert found["train/learning_rate"] == [(1, pytest.approx(1e-3), 1000.0)]
    assert set(found) == {"train/reward", "train/learning_rate", "train/seconds"}
    assert "| lr | 2e-05 |" in texts(out / "grpo", "config")[0]
    # a line that is half written waits; a run that begins later is found
    append(log, {"step": 2, "reward": 0.5, "seconds": 6.5})
    append(log, {"step": 2, "rollout": "'<think>so</think>' r 0.5", "seconds": 6.5})
    append(log, {"step": 3, "reward": 0.75, "seconds": 9.0}, end="")
    append(tmp_path / "runs/vla/SFT/log.jsonl", {"step": 5, "held_l1": 0.1, "seconds": 1.0})
    assert board.follow_all(runs, out, followers) == 3
    found = scalars(out / "grpo")
    assert found["train/reward"] == [(1, 0.25, 1000.0), (2, 0.5, 1002.5)]
    assert texts(out / "grpo", "rollout") == ["'<think>so</think>' r 0.5"]
    assert [value[:2] for value in scalars(out / "vla/SFT")["eval/l1"]] == [(5, pytest.approx(0.1))]
    append(log, end="")
    with open(log, "a") as file:
        file.write("\n")
    assert board.follow_all(runs, out, followers) == 1
    assert [step for step, *_ in scalars(out / "grpo")["train/reward"]] == [1, 2, 3]
    # another log in its place is read from its first line on
    log.unlink()
    append(log, HEAD, {"step": 9, "reward": 0.0, "seconds": 1.0})
    board.follow_all(runs, out, followers)
    assert [step for step, *_ in scalars(out / "grpo")["train/reward"]] == [9]


def test_runs_that_share_a_log(tmp_path):
    """A new run replaces the old one, a resumed one what it repeats; both stood there twice. Times
    are of each run: the old one's lay after the log was last written."""
    log = tmp_path / "runs/grpo/log.jsonl"
    append(log, HEAD, {"step": 7, "reward": 0.9, "seconds": 99.0})
    append(log, HEAD, *({"step": s, "reward": 0.1, "seconds": 10.0 * s} for s in (1, 2, 3)))
    append(log, {"config": {"resume": True}}, {"step": 2, "reward": 0.2, "seconds": 5.0})
    append(log, {"step": 3, "reward": 0.3, "seconds": 8.0})
    os.utime(log, (1000, 1000))
    followers = {}
    board.follow_all(tmp_path / "runs", tmp_path / "out", followers)
    found = scalars(tmp_path / "out/grpo")["train/reward"]
    tenths = [(step, round(10 * value), time) for step, value, time in found]
    assert tenths == [(1, 1, 1000 - 8 - 20), (2, 2, 1000 - 3), (3, 3, 1000)]
    # while it is followed
    append(log, HEAD)
    board.follow_all(tmp_path / "runs", tmp_path / "out", followers)
    append(log, {"step": 1, "reward": 0.5, "seconds": 4.0}, {"step": 2, "reward": 0.5})
    board.follow_all(tmp_path / "runs", tmp_path / "out", followers)
    found = scalars(tmp_path / "out/grpo")["train/reward"]
    assert [(step, value) for step, value, _ in found] == [(1, 0.5), (2, 0.5)]


def test_a_second_call_writes_each_number_once(tmp_path, capsys):
    append(tmp_path / "sft/log.jsonl", HEAD, {"step": 1, "loss": 2.0, "seconds": 1.0})
    for _ in range(2):
        board.main([str(tmp_path), "--once"])
    assert "board: 1 runs, 2 records" in capsys.readouterr().out
    assert [value[:2] for value in scalars(tmp_path / "board/sft")["train/loss"]] == [(1, 2.0)]


def test_what_cannot_be_followed_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no such folder"):
        board.main([str(tmp_path / "nowhere"), "--once"])
    with pytest.raises(SystemExit, match=r"no log\.jsonl in it or below"):
        board.main([str(tmp_path), "--once"])
    append(tmp_path / "sft/log.jsonl", HEAD)
    with open(tmp_path / "sft/log.jsonl", "a") as file:
        file.write("{oops\n")
    with pytest.raises(SystemExit, match=r"log\.jsonl:2: not JSON"):
        board.main([str(tmp_path), "--once"])
    append(tmp_path / "other/log.jsonl", HEAD, {"loss": 1.0})
    with pytest.raises(SystemExit, match=r"log\.jsonl:2: neither"):
        board.main([str(tmp_path / "other"), "--once"])
