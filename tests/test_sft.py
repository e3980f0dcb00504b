"""sft.py: samples, errors that name the row, exact resume, 1 rank against 2 and 4, and learning."""

import dataclasses
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import untrained
from PIL import Image
from ranks import on_ranks
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import grpo
import model
import sft
import vla
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


def test_resume_equals_the_uninterrupted_run(tmp_path, monkeypatch):
    data, _ = conversations(tmp_path)
    whole, resumed = tmp_path / "a", tmp_path / "b"
    lengths = []
    load_row = sft.load_row

    def load_and_count(*of_row):
        row = load_row(*of_row)
        lengths.append(len(row["ids"]))
        return row

    monkeypatch.setattr(sft, "load_row", load_and_count)
    sft.main(args(whole, data, "--save-every", 3))
    assert log(whole)[5]["num_tokens"] == sum(lengths[:24])  # then come the held-out ones
    shutil.copytree(whole / "step_000003", resumed / "step_000003")
    sft.main(args(resumed, data, "--save-every", 3, "--resume"))
    assert_same_weights(whole / "final", resumed / "final")
    old, new = log(whole)[3:6], log(resumed)[:3]
    for name in ("loss", "num_tokens"):
        assert [record[name] for record in old] == [record[name] for record in new]
    with pytest.raises(ValueError, match="another --seed"):
        sft.main(args(resumed, data, "--resume", "--seed", 1))
    with pytest.raises(ValueError, match="step_000006: is past --steps 5; give 6 or more"):
        sft.main(args(resumed, data, "--resume", steps=5))  # was saved as final, of "step 5"


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
    source = model.ConversationDataset(data, None, 8)
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
    shown = model.EpisodeDataset(robot / "episodes", tokenizer)
    first, second, third = shown.episodes
    chunk = action_chunks(first, 4)[2]
    data, n = conversations(tmp_path / "talk", 3, [thought_row(chunk)])
    told = model.ConversationDataset(data, tokenizer, n)

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


def test_a_tasks_last_actions_are_learned_where_it_is_known_how_to_hold_still(robot):
    """Both dimensions are movements: all 9 steps of an episode begin a chunk, padded with 0."""
    tokenizer = FastTokenizer.load(robot / "fast")
    for path in (robot / "episodes").glob("*.safetensors"):
        header = {"task": "push", "fps": "5", "source": "test", "deltas": "2"}
        save_file(load_file(path), path, header)
    shown = model.EpisodeDataset(robot / "episodes", tokenizer)
    assert len(shown.train) == 18 and list(shown.held) == list(range(18, 27))
    for i, episode in ((8, shown.episodes[0]), (17, shown.episodes[1])):
        last = np.zeros((1, 4, 2), np.float32)
        last[0, 0] = episode.action[8]
        assert shown.target_ids(i) == tokenizer.encode(last)[0]
        assert np.array_equal(shown[i].images[0], episode.frame(8))


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


def test_thinking_rollouts_are_of_held_out_steps(tmp_path, robot, monkeypatch):
    """Of 3 of the held-out episode's 6 chunks: those of its steps 0, 2 and 5."""
    generate = model.generate
    asked = {}

    def watched(backbone, rows, **settings):
        if settings.get("n") == 4:
            asked.update(zip(settings["keys"], rows, strict=True))
        return generate(backbone, rows, **settings)

    monkeypatch.setattr(model, "generate", watched)
    flags = ["--action-tokenizer", robot / "fast", "--probe-prompts", 3, "--holdout-rows", 0]
    sft.main(args(tmp_path / "o", f"{robot}/episodes", *flags, steps=1))
    backbone = model.load(tmp_path / "o", stages=("sft",))
    source = model.EpisodeDataset(robot / "episodes", backbone.action_tokenizer)
    assert sorted(asked) == [0, 1, 2]
    for key, step in enumerate((0, 2, 5)):
        question = source.question(source.held[step], think=True)
        expected = sft.encode_sample(backbone, question, prompt_only=True)
        assert np.array_equal(asked[key]["pixels"], expected["pixels"])
        assert np.array_equal(asked[key]["ids"], expected["ids"])


def test_an_answer_without_an_end_is_cut_off(monkeypatch):
    """greedy_truncated of sft.py and truncated of evaluate.py vqa count these. Asked is the first
    question, two at once; what follows it is not shown."""
    backbone = model.load(INIT)
    texts = ["<answer>red</answer><|im_end|>", "<answer>blue", "green<|im_end|>"]
    asked = []

    def generate(backbone, rows, **flags):
        batch = texts[len(asked) : len(asked) + len(rows)]
        asked.extend(backbone.tokenizer.decode(row["ids"]) for row in rows)
        assert flags["greedy"] and flags["max_new_tokens"] == 9
        ids = [torch.tensor(backbone.tokenizer.encode(text)) for text in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, True, backbone.vocab.pad)
        return {"ids": padded}

    monkeypatch.setattr(model, "generate", generate)
    messages = []
    for role, content in (("user", "Which?"), ("assistant", "never shown"), ("user", "And?")):
        messages.append({"role": role, "content": content})
    answers = sft.greedy_answers(backbone, [model.Sample(messages, [], None, "")] * 3, 9, size=2)
    assert answers == [("red", False), ("blue", True), ("green", False)]
    assert len(asked) == 3 and all("Which?" in prompt for prompt in asked)
    assert not any("never shown" in prompt or "And?" in prompt for prompt in asked)


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


def test_ranks_get_rows_of_like_length():
    """All wait for the rank with the most tokens: of eight rows of 1 to 8 words, whatever their
    order, rank 0 gets the shortest, the third, ..., and both get all of them once."""
    backbone = model.load(INIT)
    lengths = [5, 1, 8, 3, 7, 2, 6, 4]

    class Words:
        """A source whose row i has lengths[i] words."""

        train = range(8)
        tokens = lengths

        def unit(self, i):
            return i

        def __getitem__(self, i):
            messages = [{"role": "user", "content": "a" + " a" * lengths[i]}]
            return model.Sample(messages, [], None, f"words:{lengths[i]}")

    picks = np.stack([np.zeros(8, int), np.arange(8)], 1)
    cfg = sft.Config(micro_batch=2)
    for rank, want in ((0, [[1, 3], [5, 7]]), (1, [[2, 4], [6, 8]])):
        dist = model.Dist(rank, 2, torch.device("cpu"))
        with ThreadPoolExecutor(2) as pool:
            futures = sft.load_batches(pool, backbone, [Words()], picks, cfg, dist)
            batches = [future.result() for future in futures]
        assert [batch["sample_id"] for batch in batches] == [
            [f"words:{length}" for length in lengths_of_batch] for lengths_of_batch in want
        ]


def test_pack_by_hand():
    """The three rows of its docstring; text has M-RoPE positions of three equal parts."""

    def row(ids, target):
        n = len(ids)
        return {
            "ids": np.array(ids),
            "target": np.array(target),
            "positions": np.tile(np.arange(n), (3, 1)),
            "pixels": None,
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
    out = model.add_mode_lines([{"role": role, "content": content} for role, content in turns])
    questions = [message["content"] for message in out if message["role"] == "user"]
    assert questions == ["a\n" + model.THINK, "d\n" + model.DIRECT, "f", "h"]
    only_a_user_asks = [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "<answer>e</answer>"},
    ]
    assert model.add_mode_lines(only_a_user_asks) == only_a_user_asks


def test_the_first_question_alone_is_asked(tmp_path):
    """With the images in it and what the system says; as its own answer begins, or as is asked."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    turns = [
        ("system", "Be brief."),
        ("user", "<image>Which?"),
        ("assistant", "<think>b</think><answer>c</answer>"),
        ("user", "And <image>?"),
        ("assistant", "<answer>d</answer>"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = {"images": ["a.png", "b.png"], "messages": messages}
    (tmp_path / "talk.jsonl").write_text(json.dumps(row))
    source = model.ConversationDataset(tmp_path / "talk.jsonl", None, 0)
    for think, line in ((None, model.THINK), (True, model.THINK), (False, model.DIRECT)):
        sample = source.question(0, think)
        assert [message["content"] for message in sample.messages] == [
            "Be brief.",
            f"<image>Which?\n{line}",
        ]
        assert sample.images == [tmp_path / "a.png"]


def test_steps_of_episodes_are_counted_through(robot):
    """Three episodes of 6 chunks: step 6 is the first of the second, whose images are bounded."""
    source = model.EpisodeDataset(robot / "episodes", FastTokenizer.load(robot / "fast"))
    assert [source.unit(i) for i in (0, 5, 6, 11, 12, 17)] == [0, 0, 1, 1, 2, 2]
    assert (source.train, source.held) == (range(12), range(12, 18))
    source.max_pixels[1] = 1024
    bounds = [source.question(i).max_pixels for i in range(18)]
    assert bounds == [0] * 6 + [1024] * 6 + [0] * 6
    longest = source.outline(0).messages[-1]["content"]
    assert longest.count("<FAST_") == source.action_tokenizer.max_ids == 4 * 2


# ---- Bad input: one line that says what, where, and the cure -------------------------------------


def bad_line(images, question="<image>Which?", role="assistant"):
    return json.dumps(question_row(images, question, "<answer>x</answer>", role))


def bad_content(content):
    return json.dumps({"messages": [{"role": "user", "content": content}]})


# A line of a file, and what is said of it. Before they were told at the step that drew them, and
# of those with a star as a traceback.
BAD_ROWS = [
    ('{"images": [', "not a row .*not JSON"),
    ('{"images": []}', 'not a row .*"messages" is no list'),
    ("[1, 2]", "not a row .*it is a list"),  # *
    ('"text"', "not a row .*it is a str"),  # *
    ("7", "not a row .*it is a int"),  # *
    ("[" * 100_000, "not a row .*not JSON"),  # *
    ('{"messages": {"role": "user"}}', 'not a row .*"messages" is no list'),
    ('{"messages": ["Which?"]}', "not a row .*a message is a str"),
    (bad_content(None), 'not a row .*"content" of a message is no text'),
    (bad_content([{"type": "text"}]), 'not a row .*"content" of a message is no text'),
    (bad_line("0.png"), 'not a row .*"images" is no list'),  # *
    (bad_line([None]), 'not a row .*"images" holds what is no path'),  # *
    (bad_line([], role="robot"), r"not a row .*roles \['user', 'robot'\]"),
    (
        json.dumps({"messages": [{"role": who, "content": "a"} for who in ("assistant", "robot")]}),
        r"not a row .*roles \['assistant', 'robot'\]",
    ),
    (bad_line(["0.png"]).replace('"images"', '"kind": ["a"], "images"'), 'not a row .*"kind"'),  # *
    (bad_line(["gone.png"]), r".*gone\.png: image does not open"),
    (bad_line(["talk.jsonl"]), r".*talk\.jsonl: image does not open"),
    (bad_line(["../0.png"]), r"image \.\./0\.png lies outside .*--outside-images"),
    (bad_line(["a/../../0.png"]), ".*lies outside"),
    (bad_line(["/etc/passwd"]), ".*lies outside"),
    (bad_line([]), '1 "<image>" but 0 images'),
    (bad_line(None), '1 "<image>" but 0 images'),  # * "images": null
    (bad_line(["0.png"], "Which?"), '0 "<image>" but 1 images'),
    (bad_line([], "<|image_pad|>"), r'"<\|image_pad\|>" in the text; write "<image>"'),
    (bad_line([], "<ACTION>"), "an <ACTION> but no FAST tokenizer; give --action-tokenizer"),
    (
        bad_line(["0.png"], "<image>" + "word " * 900),
        "4536 tokens, and 0 more over --max-length 900; raise it, or --too-long",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS)
def test_a_bad_row_is_named_before_the_first_step(tmp_path, monkeypatch, line, message):
    """A row was looked at when it was drawn: a held-out one at step 500, before the first
    checkpoint. Here it is held out, and training itself would fail."""
    monkeypatch.setattr(sft, "train_step", None)
    data, _ = conversations(tmp_path)
    good_lines = data.read_text().splitlines(keepends=True)[:8]
    data.write_text("".join(good_lines) + line + "\n")
    with pytest.raises(ValueError, match=r"talk\.jsonl:9: " + message):
        sft.main(args(tmp_path / "o", data, "--max-length", 900, steps=3, holdout=1))


def test_images_outside_the_folder_need_a_flag(tmp_path):
    """A .jsonl from elsewhere could have any file of the machine read as an image."""
    data, _ = conversations(tmp_path / "inner", extra=[question_row(["../a.png"], "<image>?", "b")])
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"talk\.jsonl:9: image \.\./a\.png lies outside"):
        sft.main(args(tmp_path / "o", data))
    sft.main(args(tmp_path / "o", data, "--outside-images", steps=1))


def test_an_image_over_pillows_limit_is_one_line(tmp_path, monkeypatch):
    data, _ = conversations(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(
        ValueError, match=r"talk\.jsonl:1: .*0\.png: image does not open \(Image size"
    ):
        sft.main(args(tmp_path / "o", data))


def test_null_images_are_none(tmp_path):
    """{"images": null} of a text row ended in a TypeError."""
    data, n = conversations(tmp_path, 3, [question_row(None, "Why?", "Because.")])
    assert model.ConversationDataset(data, None, n)[3].images == []


# ---- Rows that are too long ----------------------------------------------------------------------


@pytest.fixture
def long_rows(tmp_path):
    """A .jsonl whose row 9 has a large picture, whose row 10 two of them, and whose row 11 is long
    as a text alone; the same again is held out."""
    Image.effect_noise((512, 512), 9).convert("RGB").save(tmp_path / "large.png")
    rows = [
        question_row(["large.png"], "<image>Which?", "this"),
        question_row(["large.png", "0.png", "large.png"], "<image><image><image>Which?", "that"),
        question_row([], "word " * 300, "them"),
    ]
    return conversations(tmp_path, 8, rows)


def test_a_row_is_measured_by_the_headers_of_its_images(long_rows):
    """Where it is near the limit as long as the row that training makes of it; a bound then makes
    it as long as it may be."""
    data, n = long_rows
    backbone = model.load(INIT)
    source = model.ConversationDataset(data, None, n)
    for i in range(n):
        length = len(sft.load_row(backbone, source, i, 10**6)["ids"])
        for limit in (length - 1, length, length + 1):
            size = sft.row_size(backbone, source.outline(i), limit)
            assert (size.tokens > limit) == (length > limit)
            if size.tokens > limit:
                assert size.tokens == length
        assert size.max_pixels == 0
    assert sft.row_size(backbone, source.outline(10), 300).max_pixels == sft.NEVER_FITS
    for i, limit in ((8, 100), (9, 160), (9, 400)):
        source.max_pixels[i] = sft.row_size(backbone, source.outline(i), limit).max_pixels
        fitted = len(sft.load_row(backbone, source, i, limit)["ids"])
        assert limit - 60 < fitted <= limit
    assert backbone.net.image_spec is backbone.image_spec, "the bound of a row was the net's too"


def test_too_long_rows_are_left_out_or_shrunk(tmp_path, long_rows, capsys):
    data, n = long_rows
    flags = ["--max-length", 400, "--too-long"]
    with pytest.raises(
        ValueError, match=r"talk\.jsonl:9: \d+ tokens, and 5 more over --max-length"
    ):
        sft.main(args(tmp_path / "o", data, *flags[:2], holdout=n))
    counts = {}
    for kind in ("skip", "shrink"):
        sft.main(args(tmp_path / kind, data, *flags, kind, steps=4, holdout=n))
        run = json.loads((tmp_path / kind / "final" / "run.json").read_text())
        record = run["data"][str(data)]
        counts[kind] = [record[key] for key in ("train", "held_out", "shrunk", "left_out")]
    assert counts == {"skip": [8, 8, 0, 6], "shrink": [10, 10, 4, 2]}
    printed = capsys.readouterr().out
    assert "5 more over --max-length 400: 0 with smaller images, 6 left out" in printed
    assert "5 more over --max-length 400: 4 with smaller images, 2 left out" in printed
    with pytest.raises(ValueError, match="--too-long cut: give one of error, skip, shrink"):
        sft.main(args(tmp_path / "o", data, "--too-long", "cut"))
    with pytest.raises(ValueError, match="nothing is left to train on; raise --max-length 9"):
        sft.main(args(tmp_path / "o", data, "--max-length", 9, "--too-long", "skip"))


def test_ranks_leave_out_the_same_rows(tmp_path, long_rows):
    """Each looks at its share of the rows, in several tasks; and the rank that finds a bad one ends
    all of them."""
    data, n = long_rows
    flags = ["--max-length", 400, "--too-long", "skip"]
    sft.main(args(tmp_path / "one", data, *flags, holdout=n))
    on_ranks(sft.main, args(tmp_path / "two", data, *flags, holdout=n), 2)
    assert_close_logs(log(tmp_path / "one"), log(tmp_path / "two"))
    records = []
    for name in ("one", "two"):
        records.append(json.loads((tmp_path / name / "final" / "run.json").read_text())["data"])
    assert records[0] == records[1]
    (tmp_path / "large.png").unlink()
    on_ranks(sft.main, args(tmp_path / "three", data, *flags, holdout=n), 2, code=1)


def test_too_long_episodes(tmp_path, robot):
    source = model.EpisodeDataset(robot / "episodes", FastTokenizer.load(robot / "fast"))
    backbone = model.load(INIT)
    sft.grow_vocabulary(backbone, source.action_tokenizer.vocab_size)
    dist = model.Dist(0, 1, model.torch.device("cpu"), 0)
    cfg = sft.Config(max_length=40)
    with pytest.raises(ValueError, match=r"episode_00000\d: \d+ tokens, and 2 more over"):
        sft.check_rows(backbone, source, cfg, dist)
    assert sft.row_size(backbone, source.outline(0), 40).max_pixels == sft.NEVER_FITS

    longest = sft.row_size(backbone, source.outline(0), 1).tokens
    whole = len(sft.load_row(backbone, source, 3, longest)["ids"])
    cfg = sft.Config(max_length=longest - 2, too_long="shrink")
    assert sft.check_rows(backbone, source, cfg, dist)["shrunk"] == 3
    assert len(sft.load_row(backbone, source, 3, longest - 2)["ids"]) < whole


def test_max_length_and_pixels_may_change_on_resume(tmp_path, long_rows):
    """A row too long for the run was met at step 500, and --resume refused the --max-length that
    the error had advised."""
    data, n = long_rows
    out = tmp_path / "o"
    flags = ["--max-length", 1700, "--too-long", "shrink", "--save-every", 3]
    sft.main(args(out, data, *flags, steps=3, holdout=n))
    flags = ["--max-length", 2000, "--max-pixels", 4096, "--max-new-tokens", 8, "--resume"]
    sft.main(args(out, data, *flags, steps=4, holdout=n))
    assert model.load(out).image_spec.max_pixels == 4096


def test_a_max_length_that_leaves_other_rows_is_told_on_resume(tmp_path, long_rows):
    """They came in another order: some again, some not at all."""
    data, n = long_rows
    flags = ["--too-long", "skip", "--save-every", 3]
    sft.main(args(tmp_path / "o", data, *flags, "--max-length", 400, steps=3, holdout=n))
    resumed = args(
        tmp_path / "o", data, *flags, "--max-length", 2000, "--resume", steps=4, holdout=n
    )
    with pytest.raises(ValueError, match=r"talk\.jsonl: 10 samples to train on, 8 before .*step_0"):
        sft.main(resumed)
    sft.main([*resumed, "--changed-data"])


def test_changed_data_is_named_on_resume(tmp_path, robot):
    """A run went on with another file of the same name, and its rows in another order, as if
    nothing had happened."""
    data, _ = conversations(tmp_path / "talk")
    mixture = f"{data},{robot}/episodes"
    flags = ["--action-tokenizer", robot / "fast", "--probe-prompts", 0, "--save-every", 3]
    sft.main(args(tmp_path / "o", mixture, *flags, steps=3))

    def resumed(steps):  # from step_000003: the others are not saved
        return args(tmp_path / "o", mixture, *flags, "--resume", steps=steps)

    sft.main(resumed(4))
    data.write_text(data.read_text().replace("red", "rot", 1))
    with pytest.raises(ValueError, match=r"talk\.jsonl: has changed since .*final; put"):
        sft.main(resumed(4))  # which would be evaluated again
    with pytest.raises(ValueError, match=r"talk\.jsonl: has changed since .*step_000003; put"):
        sft.main(resumed(5))
    shutil.copytree(tmp_path / "o", tmp_path / "other")
    sft.main([*resumed(5), "--out", str(tmp_path / "other"), "--changed-data"])
    data.write_text(data.read_text().replace("rot", "red", 1))
    sft.main(resumed(5))
    path = robot / "episodes" / "episode_000001.safetensors"
    arrays = load_file(path)
    save_file(arrays, path, {"task": "push another block"})
    with pytest.raises(ValueError, match="episodes: has changed since"):
        sft.main(resumed(5))


# ---- Other bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--data", "nowhere.jsonl"], FileNotFoundError, "nowhere.jsonl: no such file"),
        (["--holdout-rows", 16], ValueError, "16 rows, all of them held out; lower --holdout-rows"),
        (["--action-tokenizer", "nowhere"], FileNotFoundError, "nowhere"),
        (["--init", "runs/nowhere"], FileNotFoundError, "runs/nowhere: no such folder"),
        (["--epochs", 2], ValueError, "--epochs 2.0 --steps 6: the steps count, not the epochs"),
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
        model.EpisodeDataset(robot / "episodes", bare)


def test_episodes_without_an_instruction_are_refused(tmp_path, robot):
    """SFT and RL trained on them; the head's stage, hours later, and the server refused them."""
    path = robot / "episodes/episode_000001.safetensors"
    save_file(load_file(path), path, {"task": " \n", "fps": "5", "source": "test"})
    tokenizer = FastTokenizer.load(robot / "fast")
    with pytest.raises(ValueError, match="episode_000001: its instruction is blank; write one"):
        model.EpisodeDataset(robot / "episodes", tokenizer)
    with pytest.raises(ValueError, match="episode_000001: its instruction is blank; write one"):
        vla.FrameDataset(vla.Config(data=str(robot / "episodes")))


def test_an_action_row_needs_the_right_chunk(tmp_path, robot):
    tokenizer = FastTokenizer.load(robot / "fast")
    right = [[1.0, 2.0]] * 4
    answer = "<answer><ACTION></answer>"
    cure = r".*; give \(K, A\), a list of 4 lists of 2 numbers$"
    cases = [
        (question_row([], "Push.", answer, chunk=right[:1]), '"chunk": '),
        (question_row([], "Push.", answer, chunk="right"), '"chunk": ' + cure),
        (question_row([], "Push.", answer, chunk=[[1.0, "a"]] * 4), '"chunk": ' + cure),
        (question_row([], "Push.", answer, chunk=[[1.0, 10**400]] * 4), '"chunk": ' + cure),
        # "give one as x[None]", a programmer's cure
        *[
            (question_row([], "Push.", answer, chunk=chunk), '"chunk": its shape is ' + cure)
            for chunk in ([1.0, 2.0, 3.0], None, [], [[]], 5, [right])
        ],
        (question_row([], "Push.", answer, chunk=[[1.0, 2.0], [3.0]]), '"chunk": ' + cure),
        (question_row([], "Push.", answer), 'an <ACTION> but no "chunk"'),
        (question_row([], "Push.", "Done.", chunk=right), 'a "chunk" but no <ACTION>'),
        (question_row([], "Push.", "I do <ACTION>.", chunk=right), "not the whole answer"),
        (question_row([], f"Write {answer}", answer, chunk=right), "not the whole answer"),
    ]
    for row, message in cases:
        data, n = conversations(tmp_path / "talk", 1, [row])
        source = model.ConversationDataset(data, tokenizer, n)
        with pytest.raises(ValueError, match=r"talk\.jsonl:2: .*" + message):
            source[1]


def test_white_space_around_an_action(tmp_path, robot):
    """ "<answer>\n<ACTION>\n</answer>" was not replaced: the model learned to say <ACTION>."""
    tokenizer = FastTokenizer.load(robot / "fast")
    chunk = [[1.0, 2.0]] * 4
    rows = []
    for answer in ("<answer><ACTION></answer>", "<think>a</think>\n<answer>\n<ACTION>\n </answer>"):
        rows.append(question_row([], "Push.", answer, chunk=chunk))
    data, n = conversations(tmp_path / "talk", 1, rows)
    source = model.ConversationDataset(data, tokenizer, n)
    plain, spaced = (source[i].messages[1]["content"] for i in (1, 2))
    assert plain == model.action_answer(tokenizer.encode(np.float32([chunk]))[0])
    assert spaced == "<think>a</think>\n" + plain


# ---- The mixture ---------------------------------------------------------------------------------


def test_the_papers_mixture(tmp_path, monkeypatch):
    """Without counts BridgeV2 weighed its 1.89M frames: 50% actions, and an epoch of 29K steps. The
    preset says how many samples of each source an epoch has, as does the command in docs/data.md,
    and writes where stage 2 reads."""
    preset = sft.PRESETS["paper"]
    docs = (Path(sft.__file__).parent / "docs" / "data.md").read_text()
    command = re.search(r"sft\.py paper --data \"(.*?)\"", docs, re.DOTALL)[1].replace("\\\n", "")
    assert grpo.PRESETS["paper"]["init"] == preset["out"] + "/final"
    assert grpo.PRESETS["paper"]["data"] == "data/bridge"

    monkeypatch.chdir(tmp_path)
    for item in preset["data"].split(","):
        path = Path(item.strip().partition("#")[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    mixture = model.parse_mixture(preset["data"])
    assert model.parse_mixture(command) == mixture
    sizes = [item.samples for item in mixture]
    sizes[-1] = 1_890_000  # frames of BridgeV2
    weights, epoch_samples = model.mixture_shares(mixture, sizes)
    assert weights[-1] / sum(weights) == pytest.approx(0.175, abs=0.001)
    assert epoch_samples / preset["batch"] == pytest.approx(17.8e3, abs=50)
    assert weights == [item.samples for item in mixture]

    bare = [model.MixtureItem(item.path) for item in mixture]  # what it was
    weights, epoch_samples = model.mixture_shares(bare, sizes)
    assert weights[-1] / sum(weights) > 0.5
    assert epoch_samples / preset["batch"] > 29e3


def test_counts_make_the_epoch(tmp_path):
    """8 rows, 12 samples of them an epoch: 3 steps of 4."""
    data, _ = conversations(tmp_path)
    sft.main(args(tmp_path / "o", f"{data}#12", steps=0))
    assert log(tmp_path / "o")[-1]["step"] == 3


def test_a_mixture_names_its_shares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b", "odd:3", "odd#3"):
        Path(name).touch()
    parse = model.parse_mixture
    assert parse("a.jsonl:2, b:0.5") == [("a.jsonl", 2, None), ("b", 0.5, None)]
    assert parse("a.jsonl#7,\n b#1") == [("a.jsonl", None, 7), ("b", None, 1)]
    assert parse("odd:3,odd#3") == [("odd:3", None, None), ("odd#3", None, None)]
    assert parse("odd:3:2") == [("odd:3", 2, None)] and parse("odd#3#2") == [("odd#3", None, 2)]
    for spec, message in (
        ("b:x", "b:x: x is not a number of at least 0; write path:weight or path#samples"),
        ("b:-1", "-1 is not a number of at least 0"),
        ("b:nan", "nan is not"),
        ("b#0", "b#0: 0 is not a whole number of at least 1"),
        ("b#1.5", "1.5 is not a whole number"),
        ("b:0", "all weights are 0"),
        ("a.jsonl, b:0.5", "a.jsonl has no weight, and its number of rows is none"),
        ("b:1,a.jsonl#5", r"weights \(:\) and counts \(#\)"),
        ("a.jsonl,", "a path is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(spec)


def test_sources_of_one_name_get_numbers(tmp_path):
    """By its place the third was "qa2" too, and one wrote over the other's metrics."""
    data, n = conversations(tmp_path)
    names = ("x/qa", "x/qa2", "y/qa", "z/qa")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(data, tmp_path / f"{name}.jsonl")
        for picture in tmp_path.glob("*.png"):
            shutil.copy(picture, (tmp_path / name).parent)
    mixture = model.parse_mixture(",".join(f"{tmp_path}/{name}.jsonl" for name in names))
    sources = model.open_sources(mixture, None, n, False)
    assert [source.name for source in sources] == ["qa", "qa2", "qa3", "qa4"]


# ---- Edges of settings ---------------------------------------------------------------------------


@pytest.mark.parametrize("edges", [[("--holdout-rows", 0)], [("--eval-rows", 0)]])
def test_nothing_held_out_is_no_end(tmp_path, robot, edges):
    """The last evaluation divided by zero before anything was saved: the run was lost."""
    data, _ = conversations(tmp_path / "talk")
    flags = ["--action-tokenizer", robot / "fast", "--probe-prompts", 0, "--eval-every", 1]
    for edge in edges:
        flags += edge
    for name, mixture in (("a", data), ("b", f"{data},{robot}/episodes")):
        sft.main(args(tmp_path / name, mixture, *flags, "--micro-batch", 99, steps=2))
        run = json.loads((tmp_path / name / "final" / "run.json").read_text())
        assert "talk_loss" not in run["metrics"]


def test_final_is_saved_before_the_last_evaluation(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("killed here")

    data, _ = conversations(tmp_path)
    monkeypatch.setattr(sft, "evaluate", fail)
    with pytest.raises(ValueError, match="killed here"):
        sft.main(args(tmp_path / "o", data, steps=2))
    run = json.loads((tmp_path / "o" / "final" / "run.json").read_text())
    assert run["step"] == 2 and "metrics" not in run
    assert model.load(tmp_path / "o").run["stage"] == "base"


def test_to_resume_an_ended_run_evaluates_it_and_no_more(tmp_path, monkeypatch):
    """Without a step_* it trained all over again, and wrote over final/."""
    data, _ = conversations(tmp_path)
    out = tmp_path / "o"
    sft.main(args(out, data, steps=2))
    before, metrics = weights(out / "final"), log(out)[-1]
    monkeypatch.setattr(sft, "train_step", None)
    sft.main(args(out, data, "--resume", steps=2))
    assert all(
        np.array_equal(before[name], value) for name, value in weights(out / "final").items()
    )
    again = log(out)[-1]
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0} and len(log(out)) == 4
    run = json.loads((out / "final" / "run.json").read_text())
    assert run["step"] == 2 and run["metrics"].items() <= metrics.items()
    for steps in (1, 3):
        with pytest.raises(
            ValueError, match="final: the run ended at step 2, .* give --steps 2, or"
        ):
            sft.main(args(out, data, "--resume", steps=steps))
    with pytest.raises(ValueError, match="another --seed"):
        sft.main(args(out, data, "--resume", "--seed", 1, steps=2))
    # nor is an older step_* taken, unless the run is to be longer
    shutil.copytree(out / "final", out / "step_000001")
    record = json.loads((out / "step_000001" / "run.json").read_text())
    (out / "step_000001" / "run.json").write_text(json.dumps({**record, "step": 1}))
    sft.main(args(out, data, "--resume", steps=2))
    assert run == json.loads((out / "final" / "run.json").read_text())
    with pytest.raises(ValueError, match="the run ended at step 2"):
        sft.main(args(out, data, "--resume", steps=1))
    with pytest.raises(FileNotFoundError, match="step_000001: no state to resume"):
        sft.main(args(out, data, "--resume", steps=3))

    monkeypatch.undo()
    lora = ["--lora", 2, "--no-muon"]
    sft.main(args(tmp_path / "adapted", data, *lora, steps=1))
    with pytest.raises(ValueError, match="final: the run has ended, and its adapters are in"):
        sft.main(args(tmp_path / "adapted", data, *lora, "--resume", steps=1))


def test_samples_per_s_leave_evaluations_out(tmp_path, monkeypatch):
    """The clock began anew behind each, the count of samples did not: twice as many a second."""
    clock = [0.0]

    def takes(seconds, function):
        def timed(*args, **kwargs):
            clock[0] += seconds
            return function(*args, **kwargs)

        return timed

    data, _ = conversations(tmp_path)
    monkeypatch.setattr(sft, "train_step", takes(2.0, sft.train_step))
    monkeypatch.setattr(sft, "evaluate", takes(100.0, sft.evaluate))
    monkeypatch.setattr(sft.time, "perf_counter", lambda: clock[0])
    sft.main(args(tmp_path / "o", data, "--log-every", 2, "--eval-every", 3, steps=8))
    speeds = [record["samples_per_s"] for record in log(tmp_path / "o") if "loss" in record]
    assert speeds == [2.0] * 4  # 4 samples a step


def test_the_probe_samples_as_long_as_grpo(tmp_path, robot, monkeypatch):
    """Thoughts over 128 tokens counted as malformed, whatever GRPO then allowed (paper: 2,048), and
    nothing said that they had been cut off."""
    for name in ("tabletop", "speedrun", "paper"):
        in_grpo = grpo.Config(**grpo.PRESETS[name]).max_new_tokens
        assert sft.Config(**sft.PRESETS[name]).max_new_tokens == in_grpo

    seen = []
    generate = model.generate

    def recorded(*given, **flags):
        seen.append((flags["max_new_tokens"], flags["cuda_graphs"]))
        samples = generate(*given, **flags)
        samples["ids"][0, 2] = model.load(INIT).vocab.eos  # of all one sample ends by itself
        return samples

    monkeypatch.setattr(model, "generate", recorded)
    flags = ["--action-tokenizer", robot / "fast", "--probe-prompts", 2, "--eval-rows", 0]
    flags += ["--max-new-tokens", 3, "--no-cuda-graphs"]
    sft.main(args(tmp_path / "o", robot / "episodes", *flags, steps=1))
    last = log(tmp_path / "o")[-1]
    assert seen == [(3, False)]
    assert last["probe_truncated"] == 7 / 8
    assert last["probe_format"] == 0


def test_run_json_records_the_split(tmp_path, robot, capsys):
    """Stages that hold out other episodes would evaluate on what an earlier one was trained on."""
    flags = ["--action-tokenizer", robot / "fast", "--probe-prompts", 0]
    sft.main(args(tmp_path / "o", robot / "episodes", *flags, steps=1))
    path = tmp_path / "o" / "final" / "run.json"
    run = json.loads(path.read_text())
    assert [(split["episodes"], split["held_out"]) for split in run["split"]] == [(3, 1)]
    again = args(tmp_path / "p", robot / "episodes", *flags, "--init", tmp_path / "o", steps=1)
    sft.main(again)
    assert "warning" not in capsys.readouterr().err
    run["split"][0]["sha256"] = "another"
    path.write_text(json.dumps(run))
    again[again.index(str(tmp_path / "p"))] = str(tmp_path / "q")
    sft.main(again)
    assert "an earlier stage held out others" in capsys.readouterr().err


# ---- Loading -------------------------------------------------------------------------------------


def test_threads_do_not_change_what_is_loaded(tmp_path, monkeypatch):
    """Rows that take longer come later from their thread, and stand in the batch all the same."""
    data, _ = conversations(tmp_path)
    sft.main(args(tmp_path / "one", data, "--loader-threads", 1, steps=4))
    load_row = sft.load_row

    def slow(backbone, source, i, max_length):
        time.sleep(0.05 * (i % 3))
        return load_row(backbone, source, i, max_length)

    monkeypatch.setattr(sft, "load_row", slow)
    sft.main(args(tmp_path / "five", data, "--loader-threads", 5, steps=4))
    assert_same_weights(tmp_path / "one" / "final", tmp_path / "five" / "final")
