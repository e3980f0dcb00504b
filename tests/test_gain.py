"""What a gain is by: two models whose thoughts and answers are known, and an untrained one whose
answers are, from its probabilities."""

import json
import types

import numpy as np
import pytest
import torch
import untrained
from ranks import on_ranks
from test_thought import acting_backbone, data  # noqa: F401, a fixture

import evaluate
import model
from benchmarks import gain, thought


def crossed(table, well_formed=((1,), (1,))):
    """Of one prompt: a sampled thought of each model."""
    return gain.Crossed(np.array(table)[..., None], np.array(well_formed, bool))


def test_the_parts_of_a_gain_by_hand():
    """The table of the module's head; a prompt with the same in another order, where nothing is
    gained; one whose new thought alone is well formed: the old one is worth 0 to both."""
    same = crossed([[0.3, 0.3], [0.3, 0.3]])
    gains = gain.gains([crossed([[0.20, 0.22], [0.21, 0.24]]), same])
    np.testing.assert_allclose(gains["thoughts"], [0.015, 0], atol=1e-9)
    np.testing.assert_allclose(gains["answers"], [0.025, 0], atol=1e-9)
    np.testing.assert_allclose(gains["all"], [0.04, 0], atol=1e-9)
    np.testing.assert_array_equal(gains["form"], 0)

    formed = crossed([[0, 0], [0.2, 0.4]], [[0], [1]])
    gains = gain.gains([same, formed])
    np.testing.assert_allclose(gains["thoughts"], [0, 0.3])
    np.testing.assert_allclose(gains["answers"], [0, 0.1], atol=1e-9)
    np.testing.assert_allclose(gains["all"], [0, 0.4])
    # 3 of 4 are well formed, read by two models: (4 * 0.3 + 0.2 + 0.4) / 6
    np.testing.assert_allclose(gains["form"], [0, 0.3])
    assert gain.gains([crossed([[0, 0], [0, 0]], [[0], [0]])])["form"] == 0, "none well formed"


def test_samples_are_averaged_before_anything_is_compared():
    """Sampled thoughts of two models are not pairs: only their means are compared."""
    worth = np.array([[[0.1, 0.3], [0.1, 0.5]], [[0.3, 0.1], [0.5, 0.3]]])
    gains = gain.gains([gain.Crossed(worth, np.ones((2, 2), bool))])
    assert [round(float(gains[name][0]), 6) for name in ("thoughts", "answers")] == [0.05, 0.15]


# ---- The whole, with thoughts by script ----------------------------------------------------------


@pytest.fixture
def two_models(monkeypatch):
    """Checkpoints "old" and "new" that differ in their weights, and in what they think: "left", and
    "right" with every second thought not well formed."""
    models = {}
    for name in ("old", "new"):
        models[name] = acting_backbone()[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in models["new"].net.model.language_model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))

    def completions(backbone, prompts, n, greedy, args):
        assert not greedy and n == 2
        texts = ["<think>left</think>", "<think>left</think>"]
        if backbone is models["new"]:
            texts = ["<think>right</think>", ""]
        ends = [f"{text}{model.action_answer([9])}<|im_end|>" for text in texts]
        ids = [backbone.tokenizer.encode(text, add_special_tokens=False) for text in ends]
        return ids * len(prompts.rows)

    monkeypatch.setattr(model, "load", lambda path, *args, **kwargs: models[path])
    monkeypatch.setattr(evaluate, "complete", completions)
    return models


def measured(data, out, policy="new", over="old", world=1):  # noqa: F811
    argv = ["gain", "--policy", policy, "--over", over, "--data", str(data), "--prompts", "5"]
    argv += ["--samples", "2", "--out", str(out)]
    if world == 1:
        evaluate.main(argv)
    else:
        on_ranks(evaluate.main, argv, world)
    return json.loads(out.read_text())["arms"]["policy"]


def test_each_model_reads_both_models_thoughts(two_models, data):  # noqa: F811
    """Against the four means, each by a call of its own."""
    args = types.SimpleNamespace(seed=0, prompts=5, batch=64, device="cpu", samples=2)
    episodes, _ = evaluate.episodes_to_ask(two_models["new"], str(data), "auto")
    prompts = evaluate.draw_prompts(two_models["new"], episodes, args, True, slice(None))
    gains = gain.gains(gain.cross([two_models["old"], two_models["new"]], prompts, args))

    def worth(thinker, answerer):
        completions = evaluate.complete(two_models[thinker], prompts, 2, False, args)
        return thought.expected_r_a(two_models[answerer], prompts, completions, 2, args).mean(1)

    at = {(a, b): worth(a, b) for a in ("old", "new") for b in ("old", "new")}
    everything = at["new", "new"] - at["old", "old"]
    by_thoughts = (at["new", "new"] - at["old", "new"] + at["new", "old"] - at["old", "old"]) / 2
    least = 100 * (tolerance := 1e-8)  # an untrained model gives the right tokens about 1e-4
    assert np.abs(everything).min() > least and np.abs(by_thoughts - everything).min() > least
    np.testing.assert_allclose(gains["all"], everything, atol=tolerance)
    np.testing.assert_allclose(gains["thoughts"], by_thoughts, atol=tolerance)
    np.testing.assert_allclose(gains["answers"], everything - by_thoughts, atol=tolerance)
    assert gains["form"].max() < 0, "half of the new thoughts are not well formed"


def test_nothing_is_gained_over_itself(two_models, data, tmp_path):  # noqa: F811
    metrics = measured(data, tmp_path / "r.json", over="new")["metrics"]
    assert len(metrics) == 4
    for name, value in metrics.items():
        assert value == {"mean": 0, "low": 0, "high": 0, "n": 5}, name


def test_ranks_equal_one(two_models, data, tmp_path, monkeypatch):  # noqa: F811
    """The file has five digits, and what an untrained model expects is about 1e-4: times 1,000."""
    expected_r_a = thought.expected_r_a
    monkeypatch.setattr(thought, "expected_r_a", lambda *args: 1000 * expected_r_a(*args))
    one, two = (measured(data, tmp_path / f"{world}.json", world=world) for world in (1, 2))
    assert two["items"] == one["items"] and two["prompts"] == one["prompts"]
    for name in one["paired"]:
        assert np.abs(one["paired"][name]).max() > 1e-3, name
        np.testing.assert_allclose(two["paired"][name], one["paired"][name], atol=3e-5)


def test_a_checkpoint_of_other_tokens(two_models, data, tmp_path):  # noqa: F811
    """What it reads would be other words than the other one wrote."""
    two_models["old"].action_tokenizer.scale /= 2
    with pytest.raises(ValueError, match="--over old: writes with other tokens than new; give the"):
        measured(data, tmp_path / "r.json")


def test_both_have_to_write_actions(data, tmp_path):  # noqa: F811
    base = untrained.folder("tiny-vlm")
    with pytest.raises(ValueError, match="no action tokenizer; give a checkpoint of sft or grpo"):
        measured(data, tmp_path / "r.json", policy=base, over=base)
