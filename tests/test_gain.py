"""What a gain is by: two models whose thoughts and answers are known, and an untrained one whose
answers are, from its probabilities."""

import json
import types

import numpy as np
import pytest
import torch
from ranks import on_ranks
from test_thought import acting_backbone, data  # noqa: F401, a fixture

import evaluate
import model
from benchmarks import gain, thought
from fast_tokenizer import FastTokenizer


def crossed(table, well_formed=((1,), (1,))):
    """Of one prompt: a sampled thought of each model."""
    return gain.Crossed(np.array(table)[..., None], np.array(well_formed, bool))


def test_the_parts_of_a_gain_by_hand():
    """The table of the module's head; the same where the new thought alone is well formed, so that
    the old one is worth 0 to both; and where none is."""

    def parts(table, well_formed=((1,), (1,))):
        return {name: round(float(value), 9) for name, value in of(table, well_formed).items()}

    def of(table, well_formed):
        return gain.gains(crossed(table, well_formed))

    table = [[0.20, 0.22], [0.21, 0.24]]
    assert parts(table) == {"all": 0.04, "thoughts": 0.015, "form": 0, "answers": 0.025}
    table = [[0, 0], [0.2, 0.4]]
    parts_by_form = {"all": 0.4, "thoughts": 0.3, "form": 0.3, "answers": 0.1}
    assert parts(table, [[0], [1]]) == parts_by_form
    nothing = {"all": 0, "thoughts": 0, "form": 0, "answers": 0}
    assert parts([[0, 0], [0, 0]], [[0], [0]]) == nothing


def test_form_counts_at_what_thoughts_about_that_prompt_are_worth():
    """Half of the old thoughts are well formed, and worth 0.2, all of the new ones, worth 0.4: of
    the 0.3 that they gain, (1 - 1/2) * (0.2 + 0.4) / 2 is by form. Valued by the mean of all
    prompts, a form that is mended where little is to be had counted for more than thoughts did."""
    worth = np.array([[[0.2, 0.0]] * 2, [[0.4, 0.4]] * 2])
    parts = gain.gains(gain.Crossed(worth, np.array([[True, False], [True, True]])))
    assert parts["form"] == pytest.approx(0.15) and parts["thoughts"] == pytest.approx(0.3)
    assert parts["answers"] == 0


def test_samples_are_averaged_before_anything_is_compared():
    """Sampled thoughts of two models are not pairs: only their means are compared."""
    worth = np.array([[[0.1, 0.3], [0.1, 0.5]], [[0.3, 0.1], [0.5, 0.3]]])
    parts = gain.gains(gain.Crossed(worth, np.ones((2, 2), bool)))
    assert [round(float(parts[name]), 6) for name in ("thoughts", "answers")] == [0.05, 0.15]


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
    each = gain.cross([two_models["old"], two_models["new"]], [prompts, prompts], args)
    parts = [gain.gains(one) for one in each]
    gains = {name: np.array([of_prompt[name] for of_prompt in parts]) for name in parts[0]}

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


@pytest.mark.parametrize("name", ["old", "new"])
def test_both_have_to_write_actions(two_models, data, tmp_path, name):  # noqa: F811
    two_models[name].action_tokenizer = None
    with pytest.raises(ValueError, match=f"{name}: no action tokenizer; give a checkpoint of sft"):
        measured(data, tmp_path / "r.json")


def test_a_model_of_another_robot(two_models, data, tmp_path):  # noqa: F811
    """It was "cannot reshape array" from the middle of the prompts."""
    chunks = np.random.default_rng(0).uniform(-1, 1, (300, 5, 6)).astype(np.float32)
    two_models["old"].action_tokenizer = FastTokenizer.fit(chunks, 128, scale=4)
    with pytest.raises(ValueError, match="--over old: writes with other tokens than new; give the"):
        measured(data, tmp_path / "r.json")


def test_each_reads_images_at_its_own_size(two_models, data, tmp_path):  # noqa: F811
    """After `grpo.py --max-pixels` a prompt has fewer tokens than before it."""
    new = two_models["new"]
    new.image_spec = new.image_spec.bounded(32 * 32)
    assert measured(data, tmp_path / "r.json")["metrics"]["gain all"]["n"] == 5
