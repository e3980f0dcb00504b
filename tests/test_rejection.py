"""Own thoughts that led to right answers: which are kept, and that sft.py reads them."""

import argparse
import json

import numpy as np
import pytest
import torch
import untrained
from PIL import Image

import evaluate
import grpo
import model
import sft
from benchmarks import rejection
from fast_tokenizer import FastTokenizer, read_episodes, split_episodes, write_episodes

K, A = 4, 3


def make_backbone():
    backbone = model.load(untrained.folder("tiny-vlm"))
    unit = {"q01": [-1.0] * A, "q99": [1.0] * A, "mean": [0.0] * A, "std": [1.0] * A}
    chunks = np.random.default_rng(0).normal(0, 0.5, (200, K, A)).astype(np.float32)
    backbone.action_tokenizer = FastTokenizer.fit(chunks, 48, scale=2, stats=unit)
    sft.grow_vocabulary(backbone, backbone.action_tokenizer.vocab_size)
    return backbone


def test_the_diverse_ones_first():
    """Words and pairs: "a b c" has a, b, c, "a b", "b c"."""
    thoughts = ["a b c", "a b c", "a b d", "e f", "c b a"]
    assert rejection.diverse(thoughts, 1) == [0]
    assert rejection.diverse(thoughts, 2) == [0, 3]  # nothing shared
    # "a b d" shares 3 of 7 with the first, "c b a" 3 of 7 too: the earlier one
    assert rejection.diverse(thoughts, 3) == [0, 3, 2]
    assert rejection.diverse(thoughts, 9) == [0, 3, 2, 4], "no thought twice"
    assert rejection.diverse([], 2) == []


def write_rows(folder):
    (folder / "images").mkdir(parents=True)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "images/0.png")
    lines = []
    for kind, answer, more in (
        ("where", "d5", {"score": "exact"}),
        ("far", "10", {"score": "number", "tolerance": 2}),
        ("what", "nothing", {"score": "exact"}),
    ):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"<image>{kind}?"},
            {"role": "assistant", "content": f"<answer>{answer}</answer>"},
            {"role": "user", "content": "<image>And then?"},  # not asked, nor is its image kept
            {"role": "assistant", "content": "The end."},
        ]
        row = {"images": ["images/0.png"] * 2, "messages": messages, "kind": kind, **more}
        lines.append(json.dumps(row) + "\n")
    (folder / "d.jsonl").write_text("".join(lines))
    return folder / "d.jsonl"


def scripted_samples(monkeypatch, backbone, texts):
    """The sampler says these, in turn."""
    left = list(texts)

    def generate(backbone, rows, n=1, *args, **kwargs):
        ids = [backbone.tokenizer(left.pop(0)).input_ids for _ in range(len(rows) * n)]
        longest = max(map(len, ids))
        padded = [row + [backbone.vocab.pad] * (longest - len(row)) for row in ids]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
        return {"ids": torch.tensor(padded), "mask": torch.tensor(mask)}

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(model, "load", lambda *args, **kwargs: backbone)


def said(thought, answer):
    return f"<think>{thought}</think><answer>{answer}</answer><|im_end|>"


def vqa(data, *flags):
    evaluate.main(["vqa", "--policy", "x", "--device", "cpu", "--data", str(data), *flags])


def test_right_thoughts_become_rows_that_sft_reads(tmp_path, monkeypatch, capsys):
    backbone = make_backbone()
    data = write_rows(tmp_path / "data/set")
    samples = [
        said("It is there.", "d5"),
        said("The cube lies right of it.", "d5"),
        said("It is there.", "d5"),  # again
        said("There it is, so <image>.", "d5"),  # sft.py would look for a second image
        said("far off", "11"),
        said("farther", "13"),  # 1 beyond the tolerance of 2: e^-0.5
        said(" ", "10"),  # no thought
        "far<answer>10</answer><|im_end|>",
        said("a", "cube"),
        said("b", "cube"),
        said("c", "plate"),
        said("d", "<FAST_1>"),
    ]
    scripted_samples(monkeypatch, backbone, [*["<answer>d5</answer><|im_end|>"] * 3, *samples])
    file = tmp_path / "data/own.jsonl"  # a folder up: paths are as seen from there
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines, lines[0]]))  # the last is held out: it is not asked
    flags = ["--score", "row", "--prompt", "think", "--samples", "4", "--holdout-rows", "1"]
    vqa(data, *flags, "--keep-right", str(file), "--out", str(tmp_path / "r.json"))
    assert "own.jsonl: 3 rows, of 2 of 3 questions" in capsys.readouterr().out
    source = model.ConversationDataset(file, None, 0)
    answers = []
    for i in source.train:
        sample = source[i]
        assert model.open_images(sample)[0].shape == (32, 32, 3)
        assert [message["role"] for message in sample.messages] == ["system", "user", "assistant"]
        assert sample.messages[1]["content"].endswith(model.THINK)
        right = grpo.right_answer(source, i)
        assert grpo.answer_score(right.text, right) == 1 and right.text in ("d5", "11")
        answers.append(sample.messages[2]["content"] + "<|im_end|>")
    assert answers == [samples[0], samples[1], samples[4]], "diverse first, each once, 2 a question"
    assert source.row(2)["tolerance"] == 2
    sft.load_row(backbone, source, 0, 1024)

    flags += ["--keep", "1", "--least", "0.6", "--out", str(tmp_path / "s.json")]
    scripted_samples(monkeypatch, backbone, [*["<answer>d5</answer><|im_end|>"] * 3, *samples])
    vqa(data, *flags, "--keep-right", str(tmp_path / "data/near.jsonl"))
    assert (tmp_path / "data/near.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "4"], "--samples: of answers to be kept; name a file by --keep-right"),
        (["--keep", "4"], "--keep: of answers to be kept"),
        (["--holdout-rows", "4"], "--holdout-rows: of answers to be kept"),
        (["--keep-right", "data/own.jsonl"], "give --prompt think, not row"),
        (["--keep-right", "data", "--prompt", "think"], "name a file that ends in .jsonl"),
        (["--keep-right", "data/d.jsonl", "--prompt", "think"], "is --data itself"),
        (["--keep-right", "other/own.jsonl", "--prompt", "think"], "does not hold the images of"),
    ],
)
def test_flags_that_do_nothing_and_files_that_sft_would_refuse(
    tmp_path, monkeypatch, flags, message
):
    data = write_rows(tmp_path / "data").relative_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        vqa(data, *flags)


def test_nothing_kept_is_one_line(tmp_path):
    """Of a model without the format "no answer was worth 0; lower --least" was said."""
    args = argparse.Namespace(keep_right=str(tmp_path / "own.jsonl"), least=0.0)
    with pytest.raises(ValueError, match="own.jsonl: no answer had a thought, its format and a"):
        rejection.write([[], []], args)
    assert not (tmp_path / "own.jsonl").exists()


def test_a_step_drawn_twice_is_one_question(tmp_path):
    """Prompts are drawn with replacement: --keep 1 kept a step's thought once a draw."""
    image = np.zeros((3, 8, 8, 3), np.uint8)
    arrays = {"image": image, "state": np.zeros((3, 2)), "action": np.zeros((3, A))}
    header = {"task": "go", "fps": "5", "source": "test"}
    write_episodes(tmp_path / "episodes", [(arrays, header)])
    (episode,) = read_episodes(tmp_path / "episodes")
    kept = []
    for text, step in (("a", 0), ("b", 1), ("c", 0)):
        kept.append([rejection.KeptThought(text, episode, step, np.zeros((K, A)))])
    file = tmp_path / "own.jsonl"
    rejection.write_actions(kept, argparse.Namespace(keep_right=str(file), least=0.5))
    answers = [json.loads(line)["messages"][1]["content"][:8] for line in file.open()]
    assert answers == ["<think>a", "<think>b"]


def test_links_stay_as_they_are(tmp_path):
    """sft.py looks at the words of a path, and refused what lay behind a link in its folder."""
    (tmp_path / "store").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/images").symlink_to(tmp_path / "store")
    file = str(tmp_path / "set/own.jsonl")
    assert rejection.relative(tmp_path / "set/images/0.png", file) == "images/0.png"
    (tmp_path / "big/deep").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "big/deep")  # from it ".." is big
    way = rejection.relative(tmp_path / "store/0.png", str(tmp_path / "out/own.jsonl"))
    assert (tmp_path / "out" / way).resolve() == tmp_path / "store/0.png"


@pytest.mark.parametrize("split", ["auto", "held-out", "all"])
def test_held_out_episodes_do_not_become_rows_to_train_on(split):
    """By the default, auto, the held-out episodes of a folder that was trained on were asked."""
    flags = ["--data", "episodes", "--split", split, "--keep-right", "own.jsonl"]
    with pytest.raises(ValueError, match=f"--keep-right of --split {split}: .* --split train"):
        evaluate.main(["actions", "--policy", "x", *flags])


def test_thoughts_before_actions(tmp_path, monkeypatch):
    """The best of a group, at least half right, with the recorded actions and not those that were
    nearly right; of the training episodes alone."""
    backbone = make_backbone()
    rng = np.random.default_rng(1)
    recordings = []
    for e in range(3):
        arrays = {
            "image": rng.integers(0, 255, (9, 32, 32, 3), np.uint8),
            "state": np.zeros((9, 2), np.float32),
            "action": rng.normal(0, 0.5, (9, A)).astype(np.float32),
        }
        recordings.append((arrays, {"task": f"go {e}", "fps": "5", "source": "test"}))
    write_episodes(tmp_path / "episodes", recordings)
    train, _ = split_episodes(read_episodes(tmp_path / "episodes"))
    asked, words = evaluate.episodes_to_ask(backbone, str(tmp_path / "episodes"), "train")
    assert [episode.name for episode in asked] == [episode.name for episode in train]
    assert words.startswith("the 2 of 3 episodes")

    args = argparse.Namespace(seed=0, prompts=2)
    prompts = evaluate.draw_prompts(backbone, train, args, True, slice(None))
    first, second = prompts.targets
    episode, step = prompts.steps[0]

    def acted(thought, ids):
        return f"<think>{thought}</think>{model.action_answer(ids)}<|im_end|>"

    near = [[*first[:-1], last] for last in range(48) if last != first[-1]]
    _, decodes = backbone.action_tokenizer.decode(near)
    near = near[int(decodes.argmax())]
    assert decodes.any() and 0.5 < model.prefix_reward(near, first) < 1
    texts = [
        acted("near", near),
        acted("right", first),
        model.action_answer(first) + "<|im_end|>",  # no thought
        acted("right, so <ACTION>", second),  # sft.py would look for its actions there
        *[acted("wrong", first)] * 2,  # of the second prompt, whose target is another
    ]
    assert model.prefix_reward(first, second) < 0.5
    direct = [model.action_answer(first) + "<|im_end|>"] * 2
    scripted_samples(monkeypatch, backbone, [*texts, *direct, *texts, *direct])
    file = tmp_path / "own.jsonl"
    flags = ["--device", "cpu", "--data", str(tmp_path / "episodes"), "--split", "train"]
    flags += [
        "--prompts",
        "2",
        "--samples",
        "3",
        "--out",
        str(tmp_path / "r.json"),
        "--keep-right",
        str(file),
    ]
    evaluate.main(["actions", "--policy", "x", *flags, "--keep", "1"])
    source = model.ConversationDataset(file, backbone.action_tokenizer, 0)
    (row,) = [source.row(i) for i in source.train]
    assert np.allclose(row["chunk"], episode.action[step : step + K], atol=1e-6)
    assert np.array_equal(model.open_images(source[0])[0], episode.frame(step))
    question, answer = source[0].messages
    assert question["content"] == model.action_prompt(episode.task, think=True)[0]["content"]
    assert answer["content"] + "<|im_end|>" == acted("right", first)
    scripted_samples(monkeypatch, backbone, [*texts, *direct, *texts, *direct])
    evaluate.main(["actions", "--policy", "x", *flags])  # two of each
    both = model.ConversationDataset(file, backbone.action_tokenizer, 0)
    assert [both.row(i)["messages"][1]["content"].partition("</think>")[0] for i in both.train] == [
        "<think>right",
        "<think>near",
    ]
    assert both.row(1)["chunk"] == row["chunk"], "a near miss teaches no error"
