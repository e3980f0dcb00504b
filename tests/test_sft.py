"""sft.py: samples, errors that name the row, exact resume, 1 rank against 2 and 4, and learning."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import untrained
from PIL import Image
from ranks import on_ranks
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import model
import sft
from fast_tokenizer import FastTokenizer, action_chunks, read_episodes, split_episodes
from tools import backbones

INIT = untrained.folder("tiny-qwen3-vl")
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "grey": (90, 90, 90),
}


# ---- Toy data and runs ---------------------------------------------------------------------------


def question_row(images, question, answer, role="assistant", **more):
    """A row of a .jsonl with one question and its answer."""
    messages = [{"role": "user", "content": question}, {"role": role, "content": answer}]
    return {"images": images, "messages": messages, **more}


def conversations(folder, n=8, extra=()):
    """Writes n rows, then `extra` rows, then all of them again, to hold out. Row i asks for a
    colour, by a picture, or in every third row by text alone; odd rows answer after a thought.
    -> (the .jsonl, rows of one half)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        name = list(COLOURS)[i % 4]
        picture = np.full((32, 32, 3), COLOURS[name], np.uint8)
        white_lines = 8 * (i // 4 % 4)  # no two pictures of a colour are alike
        picture[:white_lines] = 255
        Image.fromarray(picture).save(folder / f"{i}.png")
        answer = f"<answer>{name} {i}</answer>"
        if i % 2 == 1:
            answer = f"<think>It is {name}.</think>" + answer
        if i % 3 == 2:
            rows.append(question_row([], f"Number {i}?", answer, kind="colour"))
        else:
            rows.append(question_row([f"{i}.png"], "<image>Which?", answer, kind="colour"))
    rows += extra
    half = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / "talk.jsonl"
    path.write_text(half + half)
    return path, len(rows)


@pytest.fixture
def robot(tmp_path):
    """A folder with three episodes in episodes/ and a FAST tokenizer for them in fast/."""
    (tmp_path / "episodes").mkdir()
    for e in range(3):
        r = model.rng(7, e)
        action = np.cumsum(r.normal(size=(9, 2)), 0).astype(np.float32)
        arrays = {
            "image": r.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8),
            "action": action,
            "state": action,
        }
        header = {"task": f"push block {e}", "fps": "5", "source": "test"}
        save_file(arrays, tmp_path / "episodes" / f"episode_{e:06d}.safetensors", header)

    episodes = read_episodes(tmp_path / "episodes")
    chunks = np.concatenate([action_chunks(episode, 4) for episode in episodes])
    tokenizer = FastTokenizer.fit(chunks / np.abs(chunks).max(), 64, 3)
    tokenizer.stats = {"q01": [-3.0] * 2, "q99": [3.0] * 2, "mean": [0.0] * 2, "std": [1.0] * 2}
    tokenizer.save(tmp_path / "fast")
    return tmp_path


def args(out, data, *more, steps=6, holdout=8):
    """The command line of a short run; flags in `more` come last, so they win."""
    flags = {
        "--init": INIT,
        "--data": data,
        "--out": out,
        "--steps": steps,
        "--batch": 4,
        "--micro-batch": 2,
        "--holdout-rows": holdout,
        "--log-every": 1,
        "--save-every": 0,
        "--eval-every": 0,
        "--eval-rows": 5,
    }
    argv = ["base"]
    for flag, value in flags.items():
        argv += [flag, str(value)]
    return argv + [str(x) for x in more]


def log(out):
    """The records of a run's log but its first, which holds the settings."""
    records = []
    for line in (Path(out) / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "step" in record:
            records.append(record)
    return records


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(folder, other):
    a, b = weights(folder), weights(other)
    assert all(np.array_equal(a[name], b[name]) for name in a)


# ---- Whole runs ----------------------------------------------------------------------------------


def test_overfits_eight_samples(tmp_path):
    data, n = conversations(tmp_path)
    out = tmp_path / "o"
    flags = ["--lr", 3e-3, "--batch", 8, "--micro-batch", 0, "--eval-rows", n]
    sft.main(args(out, data, *flags, steps=50))
    last = log(out)[-1]
    assert last["talk_token_accuracy"] == 1
    assert last["talk_loss"] < 0.1
    assert last["greedy_colour"] == 1
    run = json.loads((out / "final" / "run.json").read_text())
    assert run["stage"] == "base"
    assert run["config"]["lr"] == 3e-3
    assert run["metrics"]["talk_token_accuracy"] == 1


def test_resume_equals_the_uninterrupted_run(tmp_path):
    data, _ = conversations(tmp_path)
    whole, resumed = tmp_path / "a", tmp_path / "b"
    sft.main(args(whole, data, "--save-every", 3))
    shutil.copytree(whole / "step_000003", resumed / "step_000003")
    sft.main(args(resumed, data, "--save-every", 3, "--resume"))
    assert_same_weights(whole / "final", resumed / "final")
    old, new = log(whole)[3:6], log(resumed)[:3]
    assert [record["loss"] for record in old] == [record["loss"] for record in new]
    with pytest.raises(ValueError, match="another --seed"):
        sft.main(args(resumed, data, "--resume", "--seed", 1))


def assert_close_logs(records, others):
    """Rounding differences grow from step to step, as Adam divides by sqrt(v)."""
    for a, b in zip(records, others, strict=True):
        rel = 1e-5 if a["step"] < 3 else 1e-3
        for key in a.keys() - {"seconds", "samples_per_s"}:
            assert a[key] == pytest.approx(b[key], rel=rel), (key, a, b)


def assert_close_weights(folder, other):
    a, b = weights(folder), weights(other)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-4)


# The sum of the loss is divided by the global count: rank means would differ from this, as the
# ranks count different numbers of tokens; and one may have images where the other has none. Only
# rank 0 reads or draws weights, the others get theirs from it.


def test_ranks_equal_one_whole_model(tmp_path, monkeypatch):
    """Two ranks, one FSDP unit; and the state that two ranks left goes on on one."""
    one, two, back = tmp_path / "one", tmp_path / "two", tmp_path / "back"
    monkeypatch.setattr(model, "SMALL", 10**9)
    data, _ = conversations(tmp_path, 12)
    sft.main(args(one, data, "--save-every", 3, holdout=12))
    on_ranks(sft.main, args(two, data, "--save-every", 3, holdout=12), 2)
    shutil.copytree(two / "step_000003", back / "step_000003")
    sft.main(args(back, data, "--resume", holdout=12))
    assert_close_logs(log(one), log(two))
    assert_close_logs(log(one)[3:], log(back))
    assert_close_weights(one / "final", two / "final")
    assert_close_weights(one / "final", back / "final")


def test_ranks_equal_one_by_blocks(tmp_path, monkeypatch):
    """Four ranks in two copies of the weights, an FSDP unit for each block and each end of the
    vocabulary (two tables here); and the state that one rank left goes on on four."""
    one, four, back = tmp_path / "one", tmp_path / "four", tmp_path / "back"
    monkeypatch.setattr(model, "SMALL", 0)
    data, _ = conversations(tmp_path, 12)
    untied = dataclasses.replace(backbones.SIZES["tiny-qwen3-vl"], tied=False)
    monkeypatch.setitem(backbones.SIZES, "tiny-qwen3-vl", untied)
    backbones.write("tiny-qwen3-vl", tmp_path / "untied")
    flags = ["--init", tmp_path / "untied"]
    sft.main(args(one, data, *flags, "--save-every", 3, holdout=12))

    flags += ["--shards", 2, "--recompute"]
    monkeypatch.setattr(model, "LOGITS_AT_ONCE", 9 * 448)  # ranks have unequally many slices
    on_ranks(sft.main, args(four, data, *flags, "--save-every", 3, holdout=12), 4)
    shutil.copytree(one / "step_000003", back / "step_000003")
    on_ranks(sft.main, args(back, data, *flags, "--resume", holdout=12), 4)
    assert_close_logs(log(one), log(four))
    assert_close_logs(log(one)[3:], log(back))
    assert_close_weights(one / "final", four / "final")
    assert_close_weights(one / "final", back / "final")


def test_a_loss_that_is_not_finite_stops_with_its_batch(tmp_path, monkeypatch):
    data, _ = conversations(tmp_path)
    with pytest.raises(ValueError, match=r"step 2, rank 0: the loss is (nan|inf).*talk\.jsonl:\d"):
        sft.main(args(tmp_path / "o", data, "--lr", 1e25, "--max-grad-norm", 0))
    saved = tmp_path / "o" / "failed_step_2_rank_0.safetensors"
    with safe_open(saved, "np") as file:
        sample_ids = json.loads(file.metadata()["samples"])

    # its samples are those of the second step
    source = sft.ConversationDataset(data, None, 8)
    _, row = sft.sample_order([8], [8], 24, 0)
    assert sorted(sample_ids) == sorted(source[i].sample_id for i in row[4:8])

    # the first of its micro-batches is there to run again
    backbone = model.load(INIT)
    rows = []
    for sample_id in sample_ids[:2]:
        line = int(sample_id.rpartition(":")[2])
        rows.append(sft.load_row(backbone, source, line - 1, 999))
    kept = load_file(saved)
    for key, value in sft.pack(rows).items():
        if key != "sample_id":
            assert np.array_equal(kept[f"0.{key}"], value), key

    monkeypatch.setattr(model, "clip_gradients", lambda *_: float("inf"))
    with pytest.raises(ValueError, match="step 1, rank 0: the gradient norm is inf"):
        sft.main(args(tmp_path / "o", data))


def test_micro_batches_do_not_change_the_loss(tmp_path):
    data, _ = conversations(tmp_path)
    norms = []
    for size in (0, 1):
        out = tmp_path / str(size)
        sft.main(args(out, data, "--micro-batch", size, steps=3))
        norms.append([record["grad_norm"] for record in log(out)[:3]])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def thought_row(chunk):
    """A thought and then an action, (K, A)."""
    answer = "<think>Left.</think><answer><ACTION></answer>"
    return question_row([], "Push.", answer, chunk=chunk.tolist())


def test_actions_with_and_without_a_thought(tmp_path, robot):
    """A row's "chunk" becomes the same answer as that step of an episode, behind its thought."""
    tokenizer = FastTokenizer.load(robot / "fast")
    shown = sft.EpisodeDataset(robot / "episodes", tokenizer)
    first, second, third = shown.episodes
    chunk = action_chunks(first, 4)[2]
    data, n = conversations(tmp_path / "talk", 3, [thought_row(chunk)])
    told = sft.ConversationDataset(data, tokenizer, n)

    question, answer = shown[2].messages
    prompt = model.ask(model.action_question(first.task), False)
    assert question["content"] == "<image>" + prompt
    assert answer["content"] == model.action_answer(tokenizer.encode(chunk[None])[0])
    told_question, told_answer = told[3].messages
    assert told_question["content"] == "Push.\n" + model.THINK
    assert told_answer["content"] == "<think>Left.</think>" + answer["content"]

    # of 9 steps 6 begin a chunk of 4 that lies inside
    assert len(shown.train) == 12
    assert list(shown.held) == list(range(12, 18))  # an episode
    assert [third.name] == [e.name for e in split_episodes(read_episodes(robot / "episodes"))[1]]
    assert np.array_equal(shown[10].images[0], second.frame(4))
    last = second.action[None, 5:9]
    assert shown.target_ids(11) == tokenizer.encode(last)[0]


def test_actions_are_learned_and_vision_stays(tmp_path, robot, capsys):
    chunk = action_chunks(read_episodes(robot / "episodes")[0], 4)[2]
    data, n = conversations(tmp_path / "talk", 3, [thought_row(chunk)])
    mixture = f"{data}:1,{robot}/episodes:3"
    flags = ["--action-tokenizer", robot / "fast", "--probe-prompts", 3]
    flags += ["--freeze-vision", "--lr", 1e-2]
    sft.main(args(tmp_path / "o", mixture, *flags, holdout=n))

    trained = model.load(tmp_path / "o", stages=("sft",))
    assert trained.action_tokenizer.vocab_size == len(trained.vocab.fast)
    assert trained.action_tokenizer.horizon == 4
    last = log(tmp_path / "o")[-1]
    assert 0 <= last["probe_format"] <= 1
    assert 0 <= last["probe_r_a"] <= 1
    assert 1 <= last["probe_distinct_thoughts"] <= 4
    assert "a thinking rollout" in capsys.readouterr().out

    for name, before in model.load(INIT).net.named_parameters():
        if "embed_tokens" in name or "norm" in name:
            continue  # the table has grown; norms start at a value that a few steps may keep
        after = trained.net.get_parameter(name)
        stays = np.array_equal(before.detach(), after.detach())
        assert stays == ("visual" in name), name


# ---- Samples and their order ---------------------------------------------------------------------


def test_the_order_shuffles_each_source_in_passes():
    source, row = sft.sample_order([5, 50], [3, 1], 400, seed=4)
    assert np.mean(source == 0) == pytest.approx(0.75, abs=0.07)
    first = row[source == 0]  # of the source with 5 rows
    passes = [tuple(first[k : k + 5]) for k in range(0, 100, 5)]
    for rows in passes:  # every row once before any row again
        assert sorted(rows) == [0, 1, 2, 3, 4]
    assert len(set(passes)) > 10

    shorter_source, shorter_row = sft.sample_order([5, 50], [3, 1], 100, seed=4)
    assert np.array_equal(shorter_source, source[:100])
    assert np.array_equal(shorter_row, row[:100])
    _, other_row = sft.sample_order([5, 50], [3, 1], 100, seed=5)
    assert not np.array_equal(other_row, row[:100])


def test_pack_by_hand():
    """The three rows of its docstring; text has M-RoPE positions of three equal parts."""

    def row(ids, target):
        n = len(ids)
        return {
            "ids": np.array(ids),
            "target": np.array(target),
            "positions": np.tile(np.arange(n), (3, 1)),
            "patches": None,
            "grid": np.zeros((0, 3), np.int64),
        }

    a = row([10, 11, 12, 13], [False, False, True, True])
    b = row([20, 21], [False, True])
    c = row([30, 31, 32], [False, False, True])
    batch = sft.pack([a, b, c])
    assert batch["ids"].tolist() == [[10, 11, 12, 13, 20, 21, 30, 31, 32]]
    assert batch["positions"][0].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch["target"].int().tolist() == [[0, 0, 1, 1, 0, 1, 0, 0, 1]]
    assert batch["lengths"] == [4, 2, 3]


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
    out = sft.add_mode_lines([{"role": role, "content": content} for role, content in turns])
    questions = [message["content"] for message in out if message["role"] == "user"]
    assert questions == ["a\n" + model.THINK, "d\n" + model.DIRECT, "f", "h"]


# ---- Bad input: one line that says what, where, and the cure -------------------------------------


def bad_line(images, question="<image>Which?", role="assistant"):
    return json.dumps(question_row(images, question, "<answer>x</answer>", role))


BAD_ROWS = [
    ('{"images": [', "not a row"),
    ('{"images": []}', "not a row .*messages"),
    (bad_line([], role="robot"), r"roles \['user', 'robot'\]"),
    (bad_line(["gone.png"]), r".*gone\.png: image does not open"),
    (bad_line([]), '1 "<image>" but 0 images'),
    (bad_line([], "<|image_pad|>"), r'"<\|image_pad\|>" in the text; write "<image>"'),
    (bad_line([], "<ACTION>"), "an <ACTION> but no FAST tokenizer; give --action-tokenizer"),
    (bad_line(["0.png"], "<image>" + "word " * 900), "4536 tokens; raise --max-length"),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, line, message):
    data, _ = conversations(tmp_path)
    good_lines = data.read_text().splitlines(keepends=True)[:8]
    data.write_text("".join(good_lines) + line + "\n")
    with pytest.raises(ValueError, match=r"talk\.jsonl:9: " + message):
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


def test_episodes_need_a_tokenizer_of_their_dataset(tmp_path, robot):
    with pytest.raises(ValueError, match="give its folder as --action-tokenizer"):
        sft.main(args(tmp_path / "o", robot / "episodes"))
    bare = FastTokenizer.load(robot / "fast")  # as a published processor: knows no dataset
    bare.stats = None
    with pytest.raises(ValueError, match="without statistics; save it with those of the episodes"):
        sft.EpisodeDataset(robot / "episodes", bare)
    with pytest.raises(ValueError, match="'x' is no weight"):
        sft.main(args(tmp_path / "o", f"{robot}/episodes:x"))


def test_an_action_row_needs_the_right_chunk(tmp_path, robot):
    tokenizer = FastTokenizer.load(robot / "fast")
    answer = "<answer><ACTION></answer>"
    short = question_row([], "Push.", answer, chunk=[[1.0, 2.0]])
    data, n = conversations(tmp_path / "talk", 1, [short])
    source = sft.ConversationDataset(data, tokenizer, n)
    with pytest.raises(ValueError, match=r'talk\.jsonl:2: "chunk": '):
        source[1]
    data, n = conversations(tmp_path / "talk", 1, [question_row([], "Push.", answer)])
    with pytest.raises(ValueError, match=r'talk\.jsonl:2: an <ACTION> but no "chunk"'):
        sft.ConversationDataset(data, tokenizer, n)
