"""sft.py: samples, errors that name the row, exact resume, 1 rank against 2 and 4, and learning."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import on_ranks
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import model
import sft
from tools import backbones
from fast_tokenizer import FastTokenizer, action_chunks, read_episodes
import untrained

SIZE = untrained.folder("tiny-qwen3-vl")
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "grey": (90, 90, 90),
}


def conversations(folder, n=8, extra=()):
    """n rows: a coloured square, every third one text only, then `extra` rows; held-out copies."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        name = list(COLOURS)[i % 4]
        picture = np.full((32, 32, 3), COLOURS[name], np.uint8)
        picture[: 8 * (i // 4 % 4)] = 255
        Image.fromarray(picture).save(folder / f"{i}.png")
        answer = f"<answer>{name} {i}</answer>"
        if i % 2:
            answer = f"<think>It is {name}.</think>" + answer
        images, question = ([], f"Number {i}?") if i % 3 == 2 else ([f"{i}.png"], "<image>Which?")
        rows.append(
            {
                "images": images,
                "kind": "colour",
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ],
            }
        )
    rows += extra
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "talk.jsonl").write_text(text + text)
    return folder / "talk.jsonl", len(rows)


@pytest.fixture
def robot(tmp_path):
    """Three episodes and a FAST tokenizer for them."""
    (tmp_path / "episodes").mkdir()
    for e in range(3):
        r = model.rng(7, e)
        action = np.cumsum(r.normal(size=(9, 2)), 0).astype(np.float32)
        save_file(
            {
                "image": r.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8),
                "action": action,
                "state": action,
            },
            tmp_path / "episodes" / f"episode_{e:06d}.safetensors",
            {"task": f"push block {e}", "fps": "5", "source": "test"},
        )
    files = read_episodes(tmp_path / "episodes")
    chunks = np.concatenate([action_chunks(e, 4) for e in files])
    fast = FastTokenizer.fit(chunks / np.abs(chunks).max(), 64, 3)
    fast.stats = {k: [v] * 2 for k, v in {"q01": -3.0, "q99": 3.0, "mean": 0.0, "std": 1.0}.items()}
    fast.save(tmp_path / "fast")
    return tmp_path


def args(out, data, *more, steps=6, holdout=8):
    return [
        "base",
        "--init",
        SIZE,
        "--data",
        str(data),
        "--out",
        str(out),
        "--steps",
        str(steps),
        "--batch",
        "4",
        "--holdout-rows",
        str(holdout),
        "--log-every",
        "1",
        "--micro-batch",
        "2",
        "--save-every",
        "0",
        "--eval-every",
        "0",
        "--eval-rows",
        "5",
        *map(str, more),
    ]


def log(out):
    return [
        json.loads(line)
        for line in (Path(out) / "log.jsonl").read_text().splitlines()
        if "step" in json.loads(line)
    ]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_overfits_eight_samples(tmp_path):
    data, n = conversations(tmp_path)
    sft.main(
        args(
            tmp_path / "o",
            data,
            "--lr",
            3e-3,
            "--batch",
            8,
            "--micro-batch",
            0,
            "--eval-rows",
            n,
            steps=50,
        )
    )
    last = log(tmp_path / "o")[-1]
    assert (
        last["talk_token_accuracy"] == 1 and last["talk_loss"] < 0.1 and last["greedy_colour"] == 1
    )
    run = json.loads((tmp_path / "o" / "final" / "run.json").read_text())
    assert (run["stage"], run["config"]["lr"], run["metrics"]["talk_token_accuracy"]) == (
        "base",
        3e-3,
        1,
    )


def test_resume_equals_the_uninterrupted_run(tmp_path):
    data, _ = conversations(tmp_path)
    sft.main(args(tmp_path / "a", data, "--save-every", 3))
    shutil.copytree(tmp_path / "a" / "step_000003", tmp_path / "b" / "step_000003")
    sft.main(args(tmp_path / "b", data, "--save-every", 3, "--resume"))
    a, b = weights(tmp_path / "a" / "final"), weights(tmp_path / "b" / "final")
    assert all(np.array_equal(a[k], b[k]) for k in a)
    old, new = log(tmp_path / "a")[3:6], log(tmp_path / "b")[:3]
    assert [r["loss"] for r in old] == [r["loss"] for r in new]
    with pytest.raises(ValueError, match="another --seed"):
        sft.main(args(tmp_path / "b", data, "--resume", "--seed", 1))


@pytest.mark.parametrize(
    ("world", "small", "more"),
    [
        (2, 10**9, []),  # one FSDP unit
        (4, 0, ["--shards", 2, "--recompute"]),
    ],
)  # one a block and end; two copies of the weights
def test_ranks_equal_one(tmp_path, monkeypatch, world, small, more):
    """The sum of the loss is divided by the global count: rank means would differ from this, as the
    ranks count different numbers of tokens; and one may have images where the other has none. Only
    rank 0 reads or draws weights, the others get theirs from it."""
    monkeypatch.setattr(model, "SMALL", small)
    data, _ = conversations(tmp_path, 12)
    if small == 0:
        untied = dataclasses.replace(backbones.SIZES["tiny-qwen3-vl"], tied=False)
        monkeypatch.setitem(backbones.SIZES, "tiny-qwen3-vl", untied)
        backbones.write("tiny-qwen3-vl", tmp_path / "untied")
        monkeypatch.setitem(globals(), "SIZE", str(tmp_path / "untied"))
    sft.main(args(tmp_path / "one", data, "--save-every", 3, holdout=12))
    if small == 0:
        monkeypatch.setattr(model, "LOGITS_AT_ONCE", 9 * 448)  # ranks have unequally many slices
    on_ranks(sft.main, args(tmp_path / "two", data, *more, "--save-every", 3, holdout=12), world)
    back = args(tmp_path / "back", data, "--resume", holdout=12)
    if world == 2:  # the state that two ranks left goes on on one ...
        shutil.copytree(tmp_path / "two" / "step_000003", tmp_path / "back" / "step_000003")
        sft.main(back)
    else:  # ... and that of one rank on four
        shutil.copytree(tmp_path / "one" / "step_000003", tmp_path / "back" / "step_000003")
        on_ranks(sft.main, [*back, *map(str, more)], world)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    for a, b in itertools.chain(zip(one, two), zip(one[3:], log(tmp_path / "back"))):
        for key in set(a) - {"seconds", "samples_per_s"}:
            # Adam divides by sqrt(v): rounding differences grow from step to step
            assert a[key] == pytest.approx(b[key], rel=1e-5 if a["step"] < 3 else 1e-3), (key, a, b)
    a, b, c = (weights(tmp_path / k / "final") for k in ("one", "two", "back"))
    for k in a:
        np.testing.assert_allclose(a[k], b[k], atol=1e-4)
        np.testing.assert_allclose(a[k], c[k], atol=1e-4)


def test_a_loss_that_is_not_finite_stops_with_its_batch(tmp_path, monkeypatch):
    data, _ = conversations(tmp_path)
    with pytest.raises(ValueError, match=r"step 2, rank 0: the loss is (nan|inf).*talk\.jsonl:\d"):
        sft.main(args(tmp_path / "o", data, "--lr", 1e25, "--max-grad-norm", 0))
    saved = tmp_path / "o" / "failed_step_2_rank_0.safetensors"
    with safe_open(saved, "np") as f:
        where = json.loads(f.metadata()["samples"])
    # its samples are those of the second step; the first of its micro-batches is there to run again
    source = sft.ConversationDataset(data, None, 8)
    order = sft.sample_order([8], [8], 24, 0)[1][4:8]
    assert sorted(where) == sorted(source[i][3] for i in order)
    backbone, kept = model.load(SIZE), load_file(saved)
    rows = [sft.load_row(backbone, source, int(x.rpartition(":")[2]) - 1, 999) for x in where[:2]]
    for k, x in sft.pack(rows).items():
        assert k == "sample_id" or np.array_equal(kept[f"0.{k}"], x), k
    monkeypatch.setattr(model, "clip_gradients", lambda *_: float("inf"))
    with pytest.raises(ValueError, match="step 1, rank 0: the gradient norm is inf"):
        sft.main(args(tmp_path / "o", data))


def test_micro_batches_do_not_change_the_loss(tmp_path):
    data, _ = conversations(tmp_path)
    for size in (0, 1):
        sft.main(args(tmp_path / str(size), data, "--micro-batch", size, steps=3))
    a, b = log(tmp_path / "0"), log(tmp_path / "1")
    assert [r["grad_norm"] for r in a[:3]] == pytest.approx(
        [r["grad_norm"] for r in b[:3]], rel=1e-4
    )


def test_actions_thoughts_and_frozen_vision(tmp_path, robot, capsys):
    chunk = action_chunks(read_episodes(robot / "episodes")[0], 4)[2]
    thought = {
        "images": [],
        "chunk": chunk.tolist(),
        "messages": [
            {"role": "user", "content": "Push."},
            {"role": "assistant", "content": "<think>Left.</think><answer><ACTION></answer>"},
        ],
    }
    data, n = conversations(tmp_path / "talk", 3, [thought])
    fast = FastTokenizer.load(robot / "fast")
    told, shown = (
        sft.ConversationDataset(data, fast, n),
        sft.EpisodeDataset(robot / "episodes", fast),
    )
    messages = told[3][0]
    assert messages[0]["content"] == "Push.\n" + model.THINK
    assert messages[1]["content"] == "<think>Left.</think>" + shown[2][0][1]["content"]
    assert shown[2][0][0]["content"] == "<image>" + model.ask(
        model.action_question("push block 0"), False
    )
    assert shown[2][0][1]["content"] == model.action_answer(fast.encode(chunk[None])[0])
    assert len(shown.train) == 18 and list(shown.held) == list(range(18, 27))  # the last episode
    assert np.array_equal(shown[13][1][0], read_episodes(robot / "episodes")[1].frame(4))
    sft.main(
        args(
            tmp_path / "o",
            f"{data}:1,{robot}/episodes:3",
            "--action-tokenizer",
            robot / "fast",
            "--probe-prompts",
            3,
            "--freeze-vision",
            "--lr",
            1e-2,
            holdout=n,
        )
    )
    backbone = model.load(tmp_path / "o", stages=("sft",))
    assert (
        backbone.action_tokenizer.vocab_size == len(backbone.vocab.fast)
        and backbone.action_tokenizer.horizon == 4
    )
    last = log(tmp_path / "o")[-1]
    assert (
        0 <= last["probe_format"] <= 1
        and 0 <= last["probe_r_a"] <= 1
        and 1 <= last["probe_distinct_thoughts"] <= 4
    )
    assert "a thinking rollout" in capsys.readouterr().out
    start = model.load(SIZE)
    for name, p in start.net.named_parameters():
        same = np.array_equal(p.detach(), backbone.net.get_parameter(name).detach())
        assert same == ("visual" in name) or "embed_tokens" in name or "norm" in name, name


def test_the_order_shuffles_each_source_in_passes():
    source, row = sft.sample_order([5, 50], [3, 1], 400, seed=4)
    assert np.mean(source == 0) == pytest.approx(0.75, abs=0.07)
    first = row[source == 0]
    for k in range(0, 100, 5):  # every row once before any row again
        assert sorted(first[k : k + 5]) == [0, 1, 2, 3, 4]
    assert len({tuple(first[k : k + 5]) for k in range(0, 100, 5)}) > 10
    again = sft.sample_order([5, 50], [3, 1], 100, seed=4)  # a longer run begins like a shorter one
    assert np.array_equal(again[0], source[:100]) and np.array_equal(again[1], row[:100])
    assert not np.array_equal(sft.sample_order([5, 50], [3, 1], 100, seed=5)[1], row[:100])


def test_each_question_gets_the_mode_of_its_answer():
    turns = [
        ("user", "a"),
        ("assistant", "<think>b</think><answer>c</answer>"),
        ("user", "d"),
        ("assistant", "<answer>e</answer>"),
        ("user", "f"),
        ("assistant", "g"),
        ("user", "h"),
    ]
    out = sft.add_mode_lines([{"role": r, "content": c} for r, c in turns])
    assert [m["content"] for m in out if m["role"] == "user"] == [
        "a\n" + model.THINK,
        "d\n" + model.DIRECT,
        "f",
        "h",
    ]


def row(images=(), text="<image>Which?", role="assistant", **more):
    return json.dumps(
        {
            "images": list(images),
            "messages": [
                {"role": "user", "content": text},
                {"role": role, "content": "<answer>x</answer>"},
            ],
            **more,
        }
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"images": [', r"talk\.jsonl:9: not a row"),
        ('{"images": []}', r"talk\.jsonl:9: not a row .*messages"),
        (row(role="robot"), r"talk\.jsonl:9: roles \['user', 'robot'\]"),
        (row(["gone.png"]), r"talk\.jsonl:9: image .*gone\.png does not open"),
        (row([]), r'talk\.jsonl:9: 1 "<image>" but 0 images'),
        (
            row([], "<|image_pad|>"),
            r'talk\.jsonl:9: "<\|image_pad\|>" in the text; write "<image>"',
        ),
        (
            row([], "<ACTION>"),
            r"talk\.jsonl:9: an <ACTION> but no FAST tokenizer; give --action-tokenizer",
        ),
        (
            row(["0.png"], "<image>" + "word " * 900),
            r"talk\.jsonl:9: 4536 tokens; raise --max-length",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, message):
    data, _ = conversations(tmp_path)
    data.write_text("".join(data.read_text().splitlines(True)[:8]) + line + "\n")
    with pytest.raises(ValueError, match=message):
        sft.main(args(tmp_path / "o", data, "--max-length", 900, steps=3, holdout=0))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--data", "nowhere.jsonl"], FileNotFoundError, "nowhere.jsonl: no such file"),
        (["--holdout-rows", 16], ValueError, "16 rows, all of them held out; lower --holdout-rows"),
        (["--action-tokenizer", "nowhere"], FileNotFoundError, "nowhere"),
        (["--init", "runs/nowhere"], FileNotFoundError, "runs/nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_with_a_cure(tmp_path, more, error, message):
    data, _ = conversations(tmp_path)
    with pytest.raises(error, match=message):
        sft.main(args(tmp_path / "o", data, *more))


def test_action_data_needs_a_fast_tokenizer_and_the_right_chunk(tmp_path, robot):
    with pytest.raises(ValueError, match="give its folder as --action-tokenizer"):
        sft.main(args(tmp_path / "o", robot / "episodes"))
    bare = FastTokenizer.load(robot / "fast")  # as a published processor: knows no dataset
    bare.stats = None
    with pytest.raises(ValueError, match="without statistics; save it with those of the episodes"):
        sft.EpisodeDataset(robot / "episodes", bare)
    with pytest.raises(ValueError, match="'x' is no weight"):
        sft.main(args(tmp_path / "o", f"{robot}/episodes:x"))
    bad = json.loads(row([], "Push."))
    bad["messages"][1]["content"] = "<answer><ACTION></answer>"
    data, n = conversations(tmp_path / "talk", 1, [{**bad, "chunk": [[1.0, 2.0]]}])
    source = sft.ConversationDataset(data, FastTokenizer.load(robot / "fast"), n)
    with pytest.raises(ValueError, match=r'talk\.jsonl:2: "chunk": '):
        source[1]
    data, n = conversations(tmp_path / "talk", 1, [bad])
    with pytest.raises(ValueError, match=r'talk\.jsonl:2: an <ACTION> but no "chunk"'):
        sft.ConversationDataset(data, FastTokenizer.load(robot / "fast"), n)
