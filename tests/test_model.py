"""model.py against transformers, hand-worked numbers, and itself (1 process against 2)."""

import copy
import dataclasses
import json
import re
import sys
import time
import types
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import untrained
from huggingface_hub import ModelCard
from ranks import on_ranks, start
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLConfig,
)
from transformers.cache_utils import DynamicCache
from transformers.utils import hub
from transformers.vision_utils import get_vision_window_index

import grpo
import model
import sft
import vla
from fast_tokenizer import FastTokenizer
from tools import backbones

SIZES = ["tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-vlm", "tiny-vlm-qwen2.5"]


@pytest.fixture(scope="module", params=SIZES)
def backbone(request):
    backbone = backbones.random_backbone(request.param, seed=1)
    backbone.run["size"] = request.param
    return backbone


def image(height, width, seed=0):
    return model.rng(seed, height, width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def talk(seed=0, words=5):
    return [
        {"role": "user", "content": "<image>Where is it?" + " block" * words},
        {"role": "assistant", "content": "<think>It is near.</think><answer>d5</answer>"},
        {"role": "user", "content": "And<image> this <image>?"},
        {"role": "assistant", "content": "to the left" + " of" * seed},
    ]


def rows_of(backbone, n=3):
    sizes = [(64, 64), (48, 80), (96, 32)]
    return [
        model.encode(backbone, talk(k, 3 * k), [image(*size, k) for size in sizes])
        for k in range(n)
    ]


def patches_of(backbone, batch):
    return model.cut_patches(batch["pixels"], batch["grid"], backbone.image_spec)


def extra(backbone, batch):
    """The arguments of transformers' own forward."""
    return {
        "input_ids": batch["ids"],
        "attention_mask": batch["mask"],
        "pixel_values": patches_of(backbone, batch),
        "image_grid_thw": batch["grid"],
        "mm_token_type_ids": (batch["ids"] == backbone.vocab.image).int(),
    }


@pytest.mark.parametrize("left", [False, True])
def test_positions_equal_get_rope_index(backbone, left):
    batch = model.collate(rows_of(backbone), backbone.vocab.pad, left)
    theirs, _ = backbone.net.model.get_rope_index(
        batch["ids"],
        (batch["ids"] == backbone.vocab.image).int(),
        batch["grid"],
        attention_mask=batch["mask"],
    )
    assert torch.equal(batch["positions"], theirs)


@pytest.mark.parametrize("size", [(64, 64), (37, 101), (250, 31), (16, 16), (9, 300), (700, 650)])
def test_patches_equal_those_of_the_image_processor(backbone, size, tmp_path):
    backbone.image_spec.save(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert model.ImageSpec.load(tmp_path) == backbone.image_spec
    theirs = processor(images=[image(*size)], return_tensors="np")
    pixels, grid = model.fit_image(image(*size), backbone.image_spec)
    assert tuple(theirs["image_grid_thw"][0]) == grid
    assert pixels.dtype == np.uint8
    patches = model.cut_patches(
        torch.from_numpy(pixels), torch.tensor([grid]), backbone.image_spec
    ).numpy()
    np.testing.assert_allclose(patches, theirs["pixel_values"], atol=1e-6)
    # and to the bit what numpy gave when it did this on the CPU
    mean, std = np.float32(backbone.image_spec.mean), np.float32(backbone.image_spec.std)
    by_numpy = pixels.reshape(-1, 3) * (1 / (255 * std)) - mean / std
    assert np.array_equal(np.unique(by_numpy), np.unique(patches))


def test_patches_come_in_the_order_of_the_docstring():
    """The picture in cut_patches(): 4 x 4 patches of 2 x 2 pixels, 2 x 2 of them a token; each is
    filled with its place."""
    places = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    spec = model.ImageSpec(2, 2, 1, (0.0,) * 3, (1 / 255,) * 3, 1, 64)  # leaves pixels as they are
    picture = np.kron(places, np.ones((2, 2)))[..., None].repeat(3, -1).astype(np.uint8)
    pixels = torch.from_numpy(picture.reshape(-1))
    patches = model.cut_patches(pixels, torch.tensor([[1, 4, 4]]), spec)  # (16, 3 * 2 * 2)
    assert patches.round().tolist() == [[place] * 12 for place in range(16)]


def test_images_of_several_sizes_are_cut_as_one_by_one(backbone):
    spec = backbone.image_spec
    images = [image(*size, seed) for seed, size in enumerate([(64, 64), (64, 64), (48, 80)])]
    fitted = [model.fit_image(one, spec) for one in images]
    grid = torch.tensor([grid for _, grid in fitted])
    alone = [
        model.cut_patches(torch.from_numpy(pixels), grid[i : i + 1], spec)
        for i, (pixels, _) in enumerate(fitted)
    ]
    pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in fitted]))
    assert torch.equal(model.cut_patches(pixels, grid, spec), torch.cat(alone))


def test_images_travel_as_bytes(backbone):
    """They went to the GPU as float32, repeated in time: eight times the bytes, and rank 0's thread
    took 20 ms a megapixel to cut them."""
    batch = model.collate(rows_of(backbone), backbone.vocab.pad)
    patch = backbone.image_spec.patch
    assert batch["pixels"].dtype == torch.uint8
    assert batch["pixels"].nbytes == 3 * patch**2 * int(batch["grid"].prod(1).sum())


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 4)])
def test_fit_image_rejects_other_arrays(backbone, shape):
    with pytest.raises(ValueError, match="give uint8"):
        model.fit_image(np.zeros(shape, np.uint8), backbone.image_spec)


# The templates that the families publish, but for their branches about tools and videos.
IMAGE = (
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% if add_vision_id %}Picture 1: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
)
PUBLISHED = {
    "qwen2_5_vl": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
        "{{ message['content'] }}<|im_end|>\n{% else %}"
        "{% for content in message['content'] %}" + IMAGE + "{% endfor %}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "qwen3_vl": (
        "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' }}"
        "{%- if messages[0].content is string %}{{- messages[0].content }}{%- else %}"
        "{%- for content in messages[0].content %}{%- if 'text' in content %}{{- content.text }}"
        "{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}"
        "{%- for message in messages %}"
        "{%- if message.role == 'user' or message.role == 'assistant' %}"
        "{{- '<|im_start|>' + message.role + '\n' }}{%- if message.content is string %}"
        "{{- message.content }}{%- else %}{%- for content in message.content %}"
        + IMAGE
        + "{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
}


@pytest.mark.parametrize("prompt_only", [False, True])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("published", [False, True])
def test_encode_equals_the_chat_template(backbone, prompt_only, system, published, monkeypatch):
    """The one in a folder that we wrote, and the one that comes with the family."""
    if published:
        monkeypatch.setattr(
            backbone.tokenizer, "chat_template", PUBLISHED[backbone.net.config.model_type]
        )
    messages = talk(2)[:3] if prompt_only else talk(2)
    if system:
        messages = [{"role": "system", "content": "Be brief."}, *messages]
    row = model.encode(backbone, messages, [image(64, 64)] * 3, prompt_only)
    parts = []
    for message in messages:
        before, *after_images = message["content"].split("<image>")
        content = [{"type": "text", "text": before}]
        for text in after_images:
            content += [{"type": "image"}, {"type": "text", "text": text}]
        parts.append({"role": message["role"], "content": content})
    text = backbone.tokenizer.apply_chat_template(
        parts, tokenize=False, add_generation_prompt=prompt_only
    )
    tokens = 64 // backbone.image_spec.patch // backbone.image_spec.merge
    text = text.replace("<|image_pad|>", "<|image_pad|>" * tokens**2)
    assert row["ids"].tolist() == backbone.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "text",
    [
        "emoji \U0001f600\U0001f469\u200d\U0001f680",
        "\u628a\u7ea2\u8272\u7684\u79ef\u6728\u653e\u597d",  # Chinese
        "e\u0301 a\u0308\u0323",  # letters and combining marks
        "a\u200bb\ufeffc\u2028d\x85",  # zero width, separators
        "a\x00b\x7f\x1b[0m",  # control characters
        "\ufffd\ufffe\U0010ffff\ue000",  # replacement, not characters, private use
    ],
)
def test_every_text_is_kept(backbone, text):
    """As NFC, which Qwen's tokenizers write: a letter and its accent become one character."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    row = model.encode(backbone, messages)
    kept = unicodedata.normalize("NFC", text)
    assert backbone.tokenizer.decode(row["ids"][row["target"]]) == kept + "<|im_end|>"
    assert backbone.tokenizer.decode(row["ids"]).count(kept) == 2


@pytest.mark.parametrize("text", ["a \ud83d b", "\ude00", "\ude00\ud83d"])
def test_half_a_character_is_one_line(backbone, text, tmp_path):
    """The tokenizer ended in a TypeError, "TextInputSequence must be str", whatever the row."""
    with pytest.raises(ValueError, match=r"half a character, '\\ud"):
        model.encode(backbone, [{"role": "user", "content": text}])
    lines = []
    for content in ["Go", "Go", text, "Go"]:
        question = {"role": "user", "content": content}
        row = {"messages": [question, {"role": "assistant", "content": "Yes"}]}
        lines.append(json.dumps(row))
    data = tmp_path / "talk.jsonl"
    data.write_text("\n".join(lines) + "\n")
    init = untrained.folder(backbone.run["size"])
    argv = ["base", "--init", init, "--data", str(data), "--out", str(tmp_path / "out")]
    argv += ["--steps", "2", "--batch", "3", "--holdout-rows", "1"]
    with pytest.raises(ValueError, match=r"talk\.jsonl:3: .*half a character, '\\ud"):
        sft.main(argv)


def test_targets_are_the_assistants_turns_with_their_end(backbone):
    row = model.encode(backbone, talk(1), [image(64, 64)] * 3)
    assert backbone.tokenizer.decode(row["ids"][row["target"]]) == (
        "<think>It is near.</think><answer>d5</answer><|im_end|>to the left of<|im_end|>"
    )


def test_encode_names_the_disagreement(backbone):
    with pytest.raises(ValueError, match='3 "<image>" but 2 images'):
        model.encode(backbone, talk(), [image(64, 64)] * 2)
    for contents in (["<|image_pad|>"], ["Where?", "<|image_pad|>"]):
        messages = [{"role": "user", "content": content} for content in contents]
        with pytest.raises(ValueError, match="image_pad"):
            model.encode(backbone, messages)


def three_steps(argv):
    """AdamW on a batch with images, one of text alone, and one with images again; every rank has
    the same rows. Saves the weights."""
    size, folder = argv
    dist = model.setup(0)
    backbone = backbones.random_backbone(size, seed=1)
    net = model.shard(backbone.net, dist)
    optim = model.make_optimizer(net, 1e-3, 0.01, (0.9, 0.95))
    with_images = sft.pack(rows_of(backbone, 2))
    text = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "world"}]
    for batch in with_images, sft.pack([model.encode(backbone, text)]), with_images:
        sums = sft.token_loss(net, batch)
        (sums.loss / sums.tokens).backward()
        optim.step()
        optim.zero_grad()
    model.save(Path(folder) / str(dist.world_size), backbone, {"stage": "base", "step": 3})


@pytest.mark.parametrize("size", SIZES[:2])
def test_a_batch_of_text_alone_trains_alike_on_one_rank_and_two(size, tmp_path):
    """The vision tower had no gradient on one rank and a gradient of 0 on two, so that AdamW moved
    it on two alone: a held-out loss of 5.1585 against 5.1632 after two steps."""
    argv = [size, str(tmp_path)]
    on_ranks(three_steps, argv, 1)
    on_ranks(three_steps, argv, 2)
    one, two = (model.load(tmp_path / n).net.named_parameters() for n in "12")
    for (name, p), (_, q) in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5, msg=name)


def test_token_loss_equals_transformers_labels(backbone):
    batch = model.collate(rows_of(backbone), backbone.vocab.pad)
    labels = batch["ids"].masked_fill(~batch["target"], -100)
    theirs = backbone.net(**extra(backbone, batch), labels=labels).loss
    loss, count, right = sft.token_loss(backbone.net, batch)
    assert count == batch["target"].sum() and 0 <= right <= count
    torch.testing.assert_close(loss / count, theirs, rtol=1e-5, atol=1e-6)


def test_logits_by_slices_are_the_logits(backbone, monkeypatch):
    """Losses of both stages and their gradients, from 7 tokens at a time; backward makes them
    again, and at no time are there those of more. In fp64: sums in another order round by
    processor, in fp32 by up to 3e-5."""
    net = copy.deepcopy(backbone.net).double()
    backbone = dataclasses.replace(backbone, net=net)
    batch = model.collate(rows_of(backbone), backbone.vocab.pad)
    V = len(backbone.net.lm_head.weight)
    forward = backbone.net.lm_head.forward
    results = []
    seen = []  # tokens of each forward

    def watched(x):
        seen.append(len(x))
        return forward(x)

    monkeypatch.setattr(backbone.net.lm_head, "forward", watched)
    for at_once in 10**9, 7 * V + 1:
        monkeypatch.setattr(model, "LOGITS_AT_ONCE", at_once)
        values = list(sft.token_loss(backbone.net, batch))
        h = model.hidden_states(backbone.net, batch).flatten(0, 1)
        ids = batch["ids"].flatten()
        values.append(grpo.token_logp(backbone.net, h, ids, 0.7, backbone.vocab.banned))
        weight = torch.linspace(-1, 1, len(h))
        backbone.net.zero_grad()
        (values[0] + (weight * values[3]).sum()).backward()
        results.append(values + [p.grad.clone() for p in backbone.net.parameters()])
        backbone.net.zero_grad()
    whole, sliced = seen[:2], seen[2:]
    assert whole == [int(values[1]), len(h)] and max(sliced) == 7
    assert sum(sliced) == 2 * sum(whole), "once forward and once backward"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_packed_rows_equal_padded_rows(backbone):
    rows = rows_of(backbone, 4)
    without_images = model.encode(backbone, [{"role": "user", "content": "Hello"}])
    rows.insert(1, without_images)
    results = []
    for batch in (model.collate(rows, backbone.vocab.pad), sft.pack(rows)):
        backbone.net.zero_grad()
        loss, count, right = sft.token_loss(backbone.net, batch)
        (loss / count).backward()
        results.append((loss.detach(), count, right, [p.grad for p in backbone.net.parameters()]))
        backbone.net.zero_grad()
    padded, packed = results
    assert padded[1:3] == packed[1:3]
    torch.testing.assert_close(padded[0], packed[0], rtol=1e-5, atol=1e-4)
    for a, b in zip(padded[3], packed[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


SQUARES = [(64, 64)] * 5
MIXED = [(64, 64), (250, 96), (48, 80), (64, 64), (250, 96)]


@pytest.mark.parametrize("sizes", [SQUARES, MIXED])
def test_vision_segments_of_one_length_are_one_batch(backbone, sizes, monkeypatch):
    """transformers' sdpa ran once for each window of Qwen2.5-VL, 2,804 times for an image of 1,024
    pixels, and asked the GPU for their lengths in each block."""
    calls = []
    asked = []
    forward, diff = model.sdpa_attention_forward, torch.diff
    monkeypatch.setattr(
        model, "sdpa_attention_forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw)
    )
    monkeypatch.setattr(torch, "diff", lambda ends: asked.append(1) or diff(ends))
    images = [image(*size, seed) for seed, size in enumerate(sizes)]
    row = model.encode(backbone, [{"role": "user", "content": "<image>" * len(images)}], images)
    batch = model.collate([row], backbone.vocab.pad)
    visual = backbone.net.model.visual

    def outputs_and_gradients():
        visual.zero_grad()
        seen = visual(patches_of(backbone, batch), grid_thw=batch["grid"])
        seen.pooler_output.square().sum().backward()
        gradients = [p.grad for p in visual.parameters() if p.grad is not None]
        return [seen.pooler_output, *gradients]

    ours = outputs_and_gradients()
    lengths = [batch["grid"].prod(1)] * len(visual.blocks)  # of the segments, for each block
    if hasattr(visual, "fullatt_block_indexes"):
        sides = visual.spatial_merge_size, visual.window_size, visual.patch_size
        _, ends = get_vision_window_index(batch["grid"], *sides)
        of_windows = diff(ends)
        for i in set(range(len(visual.blocks))) - set(visual.fullatt_block_indexes):
            lengths[i] = of_windows
    assert len(calls) == sum(len(of_block.unique()) for of_block in lengths)
    assert len(asked) == len({id(of_block) for of_block in lengths}), "not in each block"
    for theirs in "sdpa", "eager":
        backbone.net.set_attn_implementation(theirs)
        rtol = 1e-4 if theirs == "eager" else 0
        for a, b in zip(ours, outputs_and_gradients(), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 10)
    model.use_own_attention(backbone.net)


def test_hidden_does_not_depend_on_padding_or_on_the_cache(backbone):
    rows = rows_of(backbone)
    with torch.no_grad():
        right = model.hidden_states(backbone.net, model.collate(rows, backbone.vocab.pad))
        left = model.hidden_states(backbone.net, model.collate(rows, backbone.vocab.pad, True))
    for k, row in enumerate(rows):
        T = len(row["ids"])
        torch.testing.assert_close(right[k, :T], left[k, -T:], rtol=1e-4, atol=1e-4)
    # the last 5 tokens, which are text, through a cache
    whole = model.collate(rows[:1], backbone.vocab.pad)
    cache = DynamicCache(config=backbone.net.config.text_config)
    head = {k: v[..., :-5] if k in ("ids", "mask", "positions") else v for k, v in whole.items()}
    tail = {
        **whole,
        "ids": whole["ids"][:, -5:],
        "positions": whole["positions"][..., -5:],
        "pixels": None,
    }
    with torch.no_grad():
        parts = (
            model.hidden_states(backbone.net, head, cache),
            model.hidden_states(backbone.net, tail, cache),
        )
        whole = model.hidden_states(backbone.net, whole)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_logp_by_hand(backbone):
    rows = torch.randn(4, backbone.net.config.text_config.hidden_size)
    logits = backbone.net.lm_head(rows) / 0.7
    logits[:, backbone.vocab.banned] = -torch.inf
    p = logits.softmax(-1)
    got = grpo.token_logp(
        backbone.net, rows, torch.tensor([1, 2, 3, 4]), 0.7, backbone.vocab.banned
    )
    torch.testing.assert_close(got, p[range(4), [1, 2, 3, 4]].log(), rtol=1e-4, atol=1e-5)


def test_truncated_features_are_the_hidden_states_of_that_layer():
    backbone = backbones.random_backbone("tiny-vlm")
    batch = model.collate(rows_of(backbone), backbone.vocab.pad)
    with torch.no_grad():
        theirs = backbone.net(**extra(backbone, batch), output_hidden_states=True).hidden_states[2]
        vla.truncate(backbone.net, 2)
        ours = model.hidden_states(backbone.net, batch)
    mask = batch["mask"].bool()
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"1\.\.2"):
        vla.truncate(backbone.net, 3)


@pytest.mark.parametrize(("blocks", "layer"), [(28, 18), (36, 23), (4, 3), (24, 15)])
def test_the_feature_layer_is_the_nearest_to_0_64_of_all(blocks, layer):
    """The paper's 18th of 28, where cutting off would read the 17th."""
    language_model = types.SimpleNamespace(layers=[None] * blocks)
    net = types.SimpleNamespace(model=types.SimpleNamespace(language_model=language_model))
    assert model.feature_layer(net, 0) == layer
    assert model.feature_layer(net, blocks) == blocks
    with pytest.raises(ValueError, match=rf"layer {blocks + 1} is not in 1\.\.{blocks}"):
        model.feature_layer(net, blocks + 1)


def test_grow_adds_once_keeps_old_rows_and_ties():
    backbone = backbones.random_backbone(SIZES[0])
    table = backbone.net.get_input_embeddings().weight
    rows = len(table)
    old = len(backbone.tokenizer)
    before = table[:old].clone()
    answer = {"role": "assistant", "content": model.action_answer([0, 99, 1])}
    in_letters = model.encode(backbone, [answer])["ids"]  # which is remembered, and must not be
    assert backbone.vocab.action_start is None and backbone.vocab.fast == []
    sft.grow_vocabulary(backbone, 3)  # fits into the padding rows: the table stays
    assert len(backbone.net.get_input_embeddings().weight) == rows
    sft.grow_vocabulary(backbone, 100)
    table = backbone.net.get_input_embeddings().weight
    assert len(table) >= len(backbone.tokenizer) == old + 102 and len(table) % 64 == 0
    assert backbone.net.lm_head.weight is table
    assert backbone.net.config.text_config.vocab_size == len(table)
    assert torch.equal(table[:old], before)
    assert backbone.vocab.action_start == backbone.tokenizer.convert_tokens_to_ids("<ACTION_START>")
    assert backbone.tokenizer.convert_ids_to_tokens(backbone.vocab.fast) == [
        f"<FAST_{i}>" for i in range(100)
    ]
    assert set(range(len(backbone.tokenizer), len(table))) <= set(backbone.vocab.banned)
    new = table[old:]  # near the mean of the old rows, and no two alike
    assert (new - before.mean(0)).abs().max() < before.std()
    assert torch.pdist(new).min() > 0
    same = table.clone()
    sft.grow_vocabulary(backbone, 100)
    assert torch.equal(backbone.net.get_input_embeddings().weight, same)
    ids = model.encode(backbone, [answer])["ids"]
    assert len(ids) < len(in_letters)
    assert [backbone.vocab.fast.index(i) for i in ids if i in backbone.vocab.fast] == [0, 99, 1]


def test_untied_models_grow_both_tables():
    backbone = backbones.random_backbone(SIZES[1])
    backbone.net.config.tie_word_embeddings = False
    backbone.net.lm_head.weight = torch.nn.Parameter(torch.randn_like(backbone.net.lm_head.weight))
    sft.grow_vocabulary(backbone, 200)
    assert backbone.net.lm_head.weight is not backbone.net.get_input_embeddings().weight
    assert (
        len(backbone.net.lm_head.weight)
        == len(backbone.net.get_input_embeddings().weight)
        >= len(backbone.tokenizer)
    )


@pytest.mark.parametrize(
    ("size", "total", "rows", "tied", "text", "vision"),
    [
        ("qwen2.5-vl-3b", 3_754_622_976, 151_936, True, (36, 16, 2), (32, 1280, (7, 15, 23, 31))),
        ("qwen2.5-vl-7b", 8_292_166_656, 152_064, False, (28, 28, 4), (32, 1280, (7, 15, 23, 31))),
        ("qwen3-vl-2b", 2_127_532_032, 151_936, True, (28, 16, 8), (24, 1024, (5, 11, 17))),
        ("qwen3-vl-4b", 4_437_815_808, 151_936, True, (36, 32, 8), (24, 1024, (5, 11, 17))),
        ("qwen3-vl-8b", 8_767_123_696, 151_936, False, (36, 32, 8), (27, 1152, (8, 16, 24))),
    ],
)
def test_real_sizes_have_the_published_parameters_and_need_no_memory(
    size, total, rows, tied, text, vision
):
    """Totals as the published safetensors indices give them. On the meta device, as all ranks but
    the first build a model; the vocabulary grows inside the padding and the table stays."""
    backbone = backbones.random_backbone(size, device="meta")
    parameters = list(backbone.net.parameters())
    assert all(p.is_meta for p in parameters) and sum(p.numel() for p in parameters) == total
    config = backbone.net.config
    t, v = config.text_config, config.vision_config
    assert (t.num_hidden_layers, t.num_attention_heads, t.num_key_value_heads) == text
    taps = getattr(v, "deepstack_visual_indexes", None) or v.fullatt_block_indexes
    assert (v.depth, v.hidden_size, tuple(taps)) == vision
    sft.grow_vocabulary(backbone, 2048)
    tables = backbone.net.get_input_embeddings().weight, backbone.net.get_output_embeddings().weight
    assert [len(w) for w in tables] == [rows, rows] and (tables[0] is tables[1]) == tied
    assert len(backbone.vocab.fast) == 2048 and backbone.vocab.banned[-1] == rows - 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_table_neither_shrinks_nor_loses_its_padding(tmp_path, monkeypatch, tied):
    sizes = {
        **backbones.SIZES,
        "padded": dataclasses.replace(backbones.SIZES[SIZES[0]], embedding_rows=640, tied=tied),
    }
    monkeypatch.setattr(backbones, "SIZES", sizes)
    backbone = backbones.random_backbone("padded")
    tables = [
        backbone.net.get_input_embeddings().weight,
        backbone.net.get_output_embeddings().weight,
    ]
    old = len(backbone.tokenizer)
    with torch.no_grad():
        for w in tables:  # what nobody trained says nothing of how words lie
            w[old:] = 9.0
    before = [w.detach().clone() for w in tables]
    sft.grow_vocabulary(backbone, 20)
    for w, was in zip(tables, before, strict=True):
        assert len(w) == 640 and torch.equal(w[:old], was[:old])
        assert torch.equal(w[old + 22 :], was[old + 22 :])  # 2 markers and 20 tokens
        assert (w[old : old + 22] - was[:old].mean(0)).abs().max() < was[:old].std()
    assert backbone.net.lm_head.weight is tables[1] and (tables[0] is tables[1]) == tied
    model.save(tmp_path / "a", backbone, {"stage": "sft", "step": 0})
    again = model.load(tmp_path / "a")
    sft.grow_vocabulary(again, 20)  # knows them all
    model.save(tmp_path / "b", again, {"stage": "sft", "step": 0})
    saved = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert saved == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert (again.net.lm_head.weight is again.net.get_input_embeddings().weight) == tied
    shapes = model.load(tmp_path / "a", device=model.META)  # and without weights it is the same net
    same = {k: p.shape for k, p in shapes.net.named_parameters()}
    assert same == {k: p.shape for k, p in again.net.named_parameters()}
    assert all(p.is_meta for p in shapes.net.parameters()) and shapes.vocab == again.vocab


def test_a_bare_folder_is_filled_at_random_and_says_so(tmp_path, monkeypatch, capsys):
    """As tools.backbones leaves that of a published size."""
    small = dataclasses.replace(backbones.SIZES[SIZES[0]], embedding_rows=640)
    monkeypatch.setitem(backbones.SIZES, "bare", small)
    backbones.write("bare", tmp_path / "bare")
    assert not list((tmp_path / "bare").glob("*.safetensors"))
    first, again = (model.load(tmp_path / "bare", seed=3) for _ in range(2))
    other = model.load(tmp_path / "bare", seed=4)
    weights = [one.net.get_input_embeddings().weight for one in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.net.generation_config.eos_token_id == first.vocab.eos
    assert "has no weights: filled at random, seed 3" in capsys.readouterr().out


def test_another_family_is_refused(tmp_path):
    """Qwen2-VL has the special tokens of Qwen2.5-VL, so it was taken, and asked without the system
    turn with which its template opens."""
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 640}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [6, 5, 5],
    }
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
    Qwen2VLConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    backbone = backbones.random_backbone("tiny-qwen2.5-vl")
    backbone.tokenizer.save_pretrained(tmp_path)
    backbone.image_spec.save(tmp_path)
    with pytest.raises(ValueError, match="of family qwen2_vl, not qwen2_5_vl or qwen3_vl; choose"):
        model.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "qwen3vl"}, "family is one of qwen2_5_vl, qwen3_vl"),
        ({"head_dim": 64}, "mrope_section sums to head_dim / 2, 32"),
        ({"heads": 4, "kv_heads": 3}, "heads is a multiple of kv_heads"),
        ({"family": "qwen2_5_vl", "hidden": 96}, "of qwen2_5_vl, heads x head_dim is hidden"),
        ({"vision_heads": 5}, "vision_heads divides vision_hidden"),
        ({"special_layers": (2,)}, "special_layers lie below vision_layers"),
    ],
)
def test_a_size_that_cannot_be_is_refused(monkeypatch, change, message):
    """A family with a typo was Qwen2.5-VL, deepstack behind the last block was none; the others
    were written, and ended the first forward in shapes that do not fit."""
    size = dataclasses.replace(backbones.SIZES["tiny-qwen3-vl"], **change)
    monkeypatch.setitem(backbones.SIZES, "mine", size)
    with pytest.raises(ValueError, match=f"mine: change its line in SIZES, so that {message}"):
        backbones.random_backbone("mine")


def test_a_new_backbone_takes_no_other_s_place(tmp_path, monkeypatch):
    """Random weights were written over trained ones; a published size's configuration beside the
    weights of a tiny one, which would then be loaded."""
    backbones.write(SIZES[0], tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds weights of another backbone; name another --out"):
        backbones.write("qwen3-vl-2b", tmp_path)
    backbones.write(SIZES[0], tmp_path, seed=1)  # nothing of it was learned
    assert (tmp_path / "model.safetensors").read_bytes() != weights
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="holds what a stage has trained; name another --out"):
        backbones.write(SIZES[0], tmp_path)


def test_texts_of_a_tokenizer_are_those_of_the_first_rows(tmp_path):
    """A line that is no row ended in a traceback, or in "Expecting value" without file or line."""
    path = tmp_path / "texts.jsonl"
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "<answer>here</answer>"},
    ]
    good = json.dumps({"messages": messages}) + "\n"
    path.write_text(good * 3)
    text = f"Where?\n{model.DIRECT}\n<answer>here</answer>"
    assert list(backbones.training_texts(path)) == [text] * 3
    assert list(backbones.training_texts(path, 2)) == [text] * 2
    for bad in ('{"messages": 3}', '{"messages": 3', ""):
        path.write_text(f"{good}{bad}\n")
        with pytest.raises(ValueError, match=r"texts\.jsonl:2: not a row"):
            list(backbones.training_texts(path))


def test_a_checkpoint_that_lost_its_weights_is_refused(backbone, tmp_path):
    """It was taken for a bare folder and filled at random."""
    run = {"stage": "sft", "step": 1, "config": {}, "parent": ""}
    model.save(tmp_path / "sft", backbone, run)
    (tmp_path / "sft" / "model.safetensors").unlink()
    message = "^.*/sft: not whole .*no file named model.safetensors.*; copy the whole folder again$"
    with pytest.raises(ValueError, match=message):
        model.load(tmp_path / "sft")
    # of several files one: it was "No such file or directory" alone
    backbone.net.save_pretrained(tmp_path / "sft", max_shard_size="1MB")
    next((tmp_path / "sft").glob("model-00001-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="^.*/sft: not whole .*model-00001-of-.*; copy the whole"):
        model.load(tmp_path / "sft")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_a_checkpoint_that_lost_a_small_file_is_refused(backbone, tmp_path, name):
    """Without tokenizer_config.json it loaded, and eos_token was <|endoftext|>, not <|im_end|>."""
    model.save(tmp_path / "sft", backbone, {"stage": "sft", "step": 1, "config": {}, "parent": ""})
    (tmp_path / "sft" / name).unlink()
    with pytest.raises(ValueError, match=f"^{tmp_path}/sft: has lost its {name}; copy the whole"):
        model.load(tmp_path / "sft")


def test_what_the_hub_says_of_a_name_is_left_as_it_is(tmp_path, monkeypatch):
    """There is no folder to copy."""

    def refuse(*args, **more):
        raise OSError("no network")

    monkeypatch.setattr(model.transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(OSError, match="^no network$"):
        model.load("someone/model")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_checkpoint_whose_copy_was_cut_off_is_one_line(backbone, tmp_path, name):
    """The weights ended in a traceback, the tokenizer in a line that named no file."""
    model.save(tmp_path / "sft", backbone, {"stage": "sft", "step": 1, "config": {}, "parent": ""})
    path = tmp_path / "sft" / name
    path.write_bytes(path.read_bytes()[:-60])
    fault = "not whole" if name == "config.json" else "damaged"
    with pytest.raises(ValueError, match=f"^{tmp_path}/sft: {fault} .*; copy the whole folder"):
        model.load(tmp_path / "sft")


def test_a_checkpoint_that_lost_its_tokenizer_is_refused(backbone, tmp_path):
    """transformers makes one of the special tokens that tokenizer_config.json names: every text was
    encoded as no tokens, and the first image was said not to match its tokens."""
    model.save(tmp_path / "sft", backbone, {"stage": "sft", "step": 1, "config": {}, "parent": ""})
    (tmp_path / "sft" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"^{tmp_path}/sft: <.image_pad.> is .*; copy the whole"):
        model.load(tmp_path / "sft")


def test_an_optimizer_that_lost_a_file_is_not_resumed(tmp_path, monkeypatch):
    """The parameters of that file went on as if training had just begun, without a word."""
    monkeypatch.setattr(model, "TENSORS_A_FILE", 3)  # of one parameter: step and two averages
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optim = model.make_optimizer(net, 0.1, 0.0, (0.9, 0.99))
    net(torch.ones(1, 2)).sum().backward()
    optim.step()
    folder = tmp_path / "step_000001"
    model.save(folder, {"head": net}, {"stage": "vla", "step": 1, "config": {}}, optim)

    def resume():
        new = model.make_optimizer(net, 0.1, 0.0, (0.9, 0.99))
        return model.load_train_state(folder, {"head": net}, new)[0]

    assert resume() == 1
    file, *_, last = sorted((folder / "train_state").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="train_state: damaged .*; copy the whole folder again"):
        resume()
    file.write_bytes(content)
    last.unlink()
    with pytest.raises(ValueError, match="train_state: holds 9 of 12 tensors; copy the whole"):
        resume()


@pytest.mark.parametrize("pixels", [0, 100, 5000])
def test_max_pixels_bounds_images_and_stays_in_the_checkpoint(backbone, tmp_path, pixels):
    one = model.load(untrained.folder(backbone.run["size"]), max_pixels=pixels)
    _, (_, h, w) = model.fit_image(image(90, 120), one.image_spec)
    # one token is the least that an image has
    unit = (one.image_spec.patch * one.image_spec.merge) ** 2
    if pixels:
        assert h * w * one.image_spec.patch**2 <= max(pixels, unit) < 90 * 120
    else:
        assert one.image_spec == backbone.image_spec
    assert model.encode(one, talk()[:1], [image(90, 120)])["grid"].tolist() == [[1, h, w]]
    one.image_spec.save(tmp_path)
    assert model.ImageSpec.load(tmp_path) == one.image_spec


def test_a_bound_is_one_of_small_images_too():
    """The least that an image has is no more than the most: one of 16 x 16, enlarged to that
    least, would be larger than --max-pixels allows."""
    spec = model.ImageSpec(
        8, 2, 2, (0.5,) * 3, (0.5,) * 3, min_pixels=64 * 64, max_pixels=128 * 128
    )
    assert model.image_grid(16, 16, spec) == (1, 8, 8)
    assert model.image_grid(16, 16, spec.bounded(32 * 32)) == (1, 4, 4)
    assert model.image_grid(16, 16, spec.bounded(96 * 96)) == (1, 8, 8)
    assert spec.bounded(0) is spec


def action_tokenizer(dim=3):
    chunks = model.rng(0).uniform(-1, 1, (50, 4, dim)).astype(np.float32)
    return FastTokenizer.fit(chunks, 64, 4)


def test_an_action_tokenizer_of_another_checkpoint_is_refused(backbone, tmp_path):
    """One token more than the text tokenizer knows, which no <FAST_i> would stand for."""
    one = backbones.random_backbone(backbone.run["size"])
    one.action_tokenizer = action_tokenizer()
    known = one.action_tokenizer.vocab_size - 1
    sft.grow_vocabulary(one, known)
    model.save(tmp_path / "a", one, {"stage": "sft", "step": 1, "config": {}, "parent": "random"})
    with pytest.raises(ValueError, match=f"fast/ has {known + 1} tokens but .* knows {known} <FA"):
        model.load(tmp_path / "a")


def test_save_load_save_is_bit_identical_and_loads_in_plain_transformers(backbone, tmp_path):
    one = backbones.random_backbone(backbone.run["size"])
    one.action_tokenizer = action_tokenizer()
    sft.grow_vocabulary(one, one.action_tokenizer.vocab_size)
    optim = model.make_optimizer(one.net, 1e-3, 0.1, (0.9, 0.95))
    batch = model.collate(rows_of(one), one.vocab.pad)
    sft.token_loss(one.net, batch)[0].backward()
    optim.step()
    run = {"stage": "sft", "step": 1, "config": {}, "parent": "random"}
    model.save(tmp_path / "a" / "step_000001", one, run, optim=optim)
    assert model.find_checkpoint(tmp_path / "a") == tmp_path / "a" / "step_000001"
    two = model.load(tmp_path / "a", stages=("sft",))
    assert two.run["parent"] == "random"
    assert two.vocab == one.vocab and two.image_spec == one.image_spec
    new = model.make_optimizer(two.net, 1e-3, 0.1, (0.9, 0.95))
    assert model.load_train_state(tmp_path / "a" / "step_000001", two.net, new) == (1, 0)
    model.save(tmp_path / "b", two, run, optim=new)
    for name in "model.safetensors", "config.json", "tokenizer.json", "fast/fast.json", "run.json":
        a = tmp_path / "a" / "step_000001" / name
        assert a.read_bytes() == (tmp_path / "b" / name).read_bytes(), name

    def train_state(folder):
        tensors = {}
        for file in sorted((folder / "train_state").iterdir()):
            tensors.update(load_file(file))
        return tensors

    first = train_state(tmp_path / "a" / "step_000001")
    second = train_state(tmp_path / "b")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert sum(k.endswith("/exp_avg") for k in first) == len(list(one.net.parameters()))
    assert {p.suffix for p in tmp_path.rglob("*.*") if p.is_file()} <= {
        ".safetensors",
        ".json",
        ".jinja",
        ".md",
    }, "no pickle, nothing unfinished"
    # plain transformers: the same weights, ids and patches
    net = AutoModelForImageTextToText.from_pretrained(tmp_path / "b")
    assert all(
        torch.equal(p, q) for p, q in zip(net.parameters(), one.net.parameters(), strict=True)
    )
    text = "Where is it?<think></think>" + model.action_answer([3, 1])
    assert AutoTokenizer.from_pretrained(tmp_path / "b")(text) == one.tokenizer(text)
    with pytest.raises(ValueError, match="stage 'sft', expected base"):
        model.load(tmp_path / "b", stages=("base",))


HUB_CARD = """---
license: other
license_name: qwen-research
license_link: https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE
language:
- en
---

license: of the text, not of the model
"""


def test_a_card_has_the_licence_of_the_hub_model_it_began_from(tmp_path, monkeypatch):
    """As the hub reads it: what is derived from a model is under its licence, also two stages on,
    when nobody looks at the hub again."""
    (tmp_path / "README.md").write_text(HUB_CARD)
    asked = []

    def download(name, filename):
        asked.append(name)
        return tmp_path / filename

    monkeypatch.setattr(model, "cached_file", download)
    backbone = backbones.random_backbone("tiny-vlm")
    name = "Qwen/test-card-3B"
    model.save(tmp_path / "sft", backbone, {"stage": "sft", "step": 7, "parent": name})
    loaded = model.load(tmp_path / "sft")
    model.save(tmp_path / "grpo", loaded, {"stage": "grpo", "step": 9, "parent": "runs/sft"})
    assert asked == [name]
    for stage in ("sft", "grpo"):
        card = ModelCard.load(tmp_path / stage / "README.md")
        assert card.data.base_model == name and card.data.library_name == "transformers"
        assert (card.data.license, card.data.license_name) == ("other", "qwen-research")
        assert card.data.license_link.endswith("/LICENSE")
        assert f"| base model | {name} (licence: other, qwen-research, https" in card.text
    assert "| trained from | runs/sft |" in card.text
    # checkpoints of before there were cards name their parent alone
    loaded.run = {"stage": "sft", "parent": name}
    model.save(tmp_path / "later", loaded, {"stage": "grpo", "step": 9, "parent": "runs/sft"})
    assert ModelCard.load(tmp_path / "later" / "README.md").data.base_model == name


def test_a_card_of_an_unknown_base_says_so(tmp_path, monkeypatch):
    """Without a network, or from a folder without a card, training goes on."""

    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name = "Qwen/test-card-offline"
    assert model.base_model(name) == {"name": name, "on_hub": True, "license": {}}
    # a card in Latin-1 ended the first save, and a link with --- in it was cut there
    card = "---\nlicense: other\nlicense_link: https://a.org/b---c\n---\nlicense: t\xe9l\xe9\n"
    latin = tmp_path / "latin"
    latin.mkdir()
    (latin / "README.md").write_text(card, "latin-1")
    licence = {"license": "other", "license_link": "https://a.org/b---c"}
    assert model.base_model(str(latin))["license"] == licence
    assert model.base_model(str(tmp_path))["on_hub"] is False
    base = {"name": "somewhere", "on_hub": False, "license": {}}
    run = {"stage": "vla", "base": base, "versions": {}, "commit": "abc"}
    card = ModelCard(model.model_card(run))
    assert card.data.license is None and card.data.base_model is None
    assert card.data.pipeline_tag == "robotics"
    assert "somewhere (licence: unknown: look before you publish this)" in card.text
    assert "No metrics were taken of it." in card.text


@pytest.mark.parametrize(
    ("ranks", "start"),
    [
        ({}, "python"),
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}, "torchrun --nproc_per_node 8"),
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"}, "torchrun --nproc_per_node 8 --nnodes 2"),
    ],
)
def test_the_command_of_a_run(ranks, start, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["/any/where/sft.py", "--data", "my data:1"])
    assert model.command_line("sft.py", None) == f"{start} sft.py --data 'my data:1'"
    assert model.command_line("sft.py", ["paper"]) == f"{start} sft.py paper"


def test_modules_are_saved_beside_the_backbone_and_overwritten_atomically(backbone, tmp_path):
    head = torch.nn.Linear(3, 2)
    optim = model.make_optimizer(head, 1e-3, 0.1, (0.9, 0.95))
    head(torch.ones(3)).sum().backward()
    optim.step()
    for _ in range(2):  # the second time over the first
        model.save(
            tmp_path / "v",
            {"backbone": backbone, "head": head},
            {"stage": "vla", "step": 1},
            optim=optim,
        )
    state = load_file(tmp_path / "v" / "head.safetensors")
    assert torch.equal(state["weight"], head.weight)
    new = model.make_optimizer(head, 1e-3, 0.1, (0.9, 0.95))
    model.load_train_state(tmp_path / "v", {"backbone": backbone, "head": head}, new)
    a, b = (o.state[head.weight]["exp_avg"] for o in (optim, new))
    assert torch.equal(a, b) and a.abs().sum() > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v"]


def test_a_head_without_a_backbone_is_saved(tmp_path):
    """Such parts name no base; looking for one was a NameError once, when cards were new."""
    head = torch.nn.Linear(3, 2)
    model.save(tmp_path / "v", {"head": head}, {"stage": "vla", "step": 1})
    assert torch.equal(load_file(tmp_path / "v" / "head.safetensors")["weight"], head.weight)
    assert "| base model | unknown" in (tmp_path / "v" / "README.md").read_text()


def test_an_unfinished_checkpoint_is_not_found(tmp_path):
    (tmp_path / "step_000007.tmp").mkdir()
    assert model.latest_checkpoint(tmp_path) is None
    (tmp_path / "step_000009").mkdir()
    (tmp_path / "step_000010").mkdir()
    assert model.latest_checkpoint(tmp_path).name == "step_000010"
    for name in ("step_000010", "final"):  # of a run that has ended: its end, not its last step_*
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").touch()
        assert model.find_checkpoint(tmp_path).name == name
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        model.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        model.load("runs/nowhere")
    with pytest.raises(ValueError, match="unknown size"):
        backbones.random_backbone("huge")


def test_other_data_is_named_in_either_direction(tmp_path):
    """More rows come in another order too; a source that is new, or of a stage that does not count
    its rows, is no change."""
    model.write_json(
        tmp_path / "run.json", {"data": {"a": {"sha256": "x", "train": 5}, "b": {"sha256": "y"}}}
    )
    for n in (4, 6):
        with pytest.raises(ValueError, match=f"a: {n} samples to train on, 5 before"):
            model.check_unchanged({"a": {"sha256": "x", "train": n}}, tmp_path)
    with pytest.raises(ValueError, match="b: has changed since"):
        model.check_unchanged({"b": {"sha256": "z"}}, tmp_path)
    same = {"a": {"sha256": "x", "train": 5}, "b": {"sha256": "y", "train": 7}}
    model.check_unchanged(same | {"new": {"sha256": "n", "train": 1}}, tmp_path)


def test_a_run_is_not_resumed_for_fewer_steps(tmp_path):
    """One that has ended, and kept nothing to go on from, not for more either."""
    model.check_steps(None, 0, 0)
    model.check_steps(tmp_path / "step_000005", 5, 5)
    with pytest.raises(ValueError, match="is past --steps 4; give 5 or more"):
        model.check_steps(tmp_path / "step_000005", 5, 4)
    model.check_steps(tmp_path / "final", 5, 5)
    for steps in (4, 6):
        with pytest.raises(ValueError, match="ended at step 5, .* give --steps 5"):
            model.check_steps(tmp_path / "final", 5, steps)


@dataclass
class Resumable:
    out: str = ""
    steps: int = 2
    resume: bool = True


def test_an_ended_run_goes_on_from_what_it_kept(tmp_path):
    """Its end, if it kept the step_* of that; final/ else; and the last step_* there is for more
    steps than it had."""

    def resumed(**change):
        return model.checkpoint_to_resume(Resumable(out=str(tmp_path), **change))

    for name, step in (("final", 2), ("step_000001", 1)):
        (tmp_path / name).mkdir()
        run = {"step": step, "config": vars(Resumable())}
        model.write_json(tmp_path / name / "run.json", run)
    assert resumed(steps=2).name == "final"
    assert resumed(steps=3).name == "step_000001"
    (tmp_path / "step_000002").mkdir()
    model.write_json(tmp_path / "step_000002" / "run.json", {**run, "step": 2})
    assert resumed(steps=2).name == resumed(steps=3).name == "step_000002"
    with pytest.raises(ValueError, match="already holds a run; go on with --resume"):
        resumed(resume=False)


def test_sums_of_ranks_are_exact():
    """fp32 holds no whole number beyond 2^24: tokens of a run, the digest of its base."""
    assert model.all_sum(2**24 + 1) == 2**24 + 1 and model.all_sum([2**48 - 1, 0.1]) == [
        2**48 - 1,
        0.1,
    ]


def test_the_tokenizer_is_a_function_of_its_texts():
    texts = ["the red block is at d5", "the blue bowl is at e6"] * 3
    a, b = (backbones.train_tokenizer(texts, 300).get_vocab() for _ in range(2))
    assert a == b and "Ġblock" in a
    tok = backbones.train_tokenizer(texts, 300)
    for text in ("<think>the red bowl</think> ünï\n\n  \t42", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tok.decode(tok(text)["input_ids"]) == text
    assert tok.eos_token == "<|im_end|>" and tok.pad_token == "<|endoftext|>"
    assert tok.tokenize("<think>") == ["<think>"] and not tok.all_special_tokens.count("<think>")


GOOD = "<think>left, then down</think>" + model.action_answer([4, 0, 7]) + "<|im_end|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, (True, True, [4, 0, 7])),
        (
            "\n<think>a\nb</think>\n"
            "<answer> <ACTION_START><FAST_1><ACTION_END>\n</answer>\n<|im_end|>",
            (True, True, [1]),
        ),
        (GOOD + "<|endoftext|>" * 3, (True, True, [4, 0, 7])),
        (GOOD + "<|im_end|>" * 3, (True, True, [4, 0, 7])),  # the first one ends it
        ("<think>a</think><|im_end|>" + GOOD, (False, False, [])),
        (model.action_answer([2]) + "<|im_end|>", (True, False, [2])),  # no thought
        ("<think> </think>" + model.action_answer([2]) + "<|im_end|>", (True, False, [2])),
        (GOOD.replace("<|im_end|>", ""), (False, False, [4, 0, 7])),  # cut off
        (GOOD.replace("<ACTION_END>", ""), (False, False, [4, 0, 7])),
        (GOOD.replace("</think>", ""), (False, False, [4, 0, 7])),
        (GOOD.replace("</answer>", "</answer> and more"), (False, False, [4, 0, 7])),
        (GOOD.replace("<FAST_0>", "up"), (False, False, [4])),
        (GOOD.replace("left", "<FAST_3>"), (False, False, [4, 0, 7])),
        (GOOD.replace("left", "<ACTION_END>"), (False, False, [4, 0, 7])),  # it was well formed
        (GOOD.replace("left", "<think>"), (False, False, [4, 0, 7])),
        (model.action_answer([]) + "<|im_end|>", (False, False, [])),
        ("<think>left</think><answer>d5</answer><|im_end|>", (False, False, [])),
        ("", (False, False, [])),
    ],
)
def test_parse_actions(text, expected):
    backbone = backbones.random_backbone(SIZES[0])
    # before growth there is no START
    assert model.parse_actions(backbone, []) == (False, False, [])
    sft.grow_vocabulary(backbone, 8)
    assert model.parse_actions(backbone, backbone.tokenizer(text)["input_ids"]) == expected


@pytest.mark.parametrize(
    ("generated", "target", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], 1),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([1, 2, 3, 4], [1, 2], 0.5),
        ([9, 2, 3], [1, 2, 3], 0),
        ([1, 9, 3], [1, 2, 3], 1 / 3),
        ([], [1], 0),
        ([], [], 0),
    ],
)
def test_prefix_reward(generated, target, expected):
    assert model.prefix_reward(generated, target) == pytest.approx(expected)


def test_evenly_spaced_by_hand():
    assert model.evenly_spaced(range(100, 111), 3) == [100, 105, 110]
    assert model.evenly_spaced("abcde", 4) == ["a", "b", "c", "e"]  # 0, 1.3, 2.7 and 4
    assert model.evenly_spaced([7, 8], 9) == [7, 8] and model.evenly_spaced([7, 8], 1) == [7]
    assert model.evenly_spaced([], 3) == model.evenly_spaced([7], 0) == []


def test_learning_rate_by_hand():
    rates = [model.learning_rate(s, 10, 1.0, 0.2) for s in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[6] == pytest.approx(0.5) and 0 < rates[9] < 0.05
    assert [model.learning_rate(s, 10, 1.0, 0.0, "constant") for s in (0, 9)] == [1, 1]


def test_clip_and_groups():
    net = torch.nn.Linear(2, 1)
    net.weight.grad = torch.tensor([[3.0, 0.0]])
    net.bias.grad = torch.tensor([4.0])
    assert model.clip_gradients(net.parameters(), 0) == pytest.approx(5)
    assert net.bias.grad.item() == 4
    assert model.clip_gradients(net.parameters(), 1.0) == pytest.approx(5)
    assert net.bias.grad.item() == pytest.approx(0.8, rel=1e-4)
    groups = model.make_optimizer(net, 1e-3, 0.1, (0.9, 0.95)).param_groups
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [
        (0.1, [2]),
        (0.0, [1]),
    ]


def test_muon_without_inner_matrices_is_adamw():
    """It used to end in a StopIteration when nothing was left for Muon."""
    nets = [torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)]
    for net, muon in zip(nets, (True, False), strict=True):
        optim = model.make_optimizer(net, 0.01, 0.1, (0.9, 0.95), muon)
        net(torch.arange(8.0).view(2, 4) ** 2).sum().backward()
        optim.step()
    assert torch.equal(nets[0].weight, nets[1].weight) and (nets[0].weight != 1).any()


def test_muon_by_hand():
    """One step on a matrix whose singular vectors are known; everything else is AdamW's."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(6, 6))
    v, _ = torch.linalg.qr(torch.randn(9, 6))
    near = model.orthogonalize((u * torch.tensor([9, 5, 4, 3, 2, 1.5]) @ v.T)[None])[0]
    core = u.T @ near @ v  # the same singular vectors, all values near 1
    assert (core - core.diag().diag()).abs().max() < 1e-5 and (core.diag() - 1).abs().max() < 0.35
    torch.testing.assert_close(near, u @ core @ v.T)
    nets = [
        nn.ModuleDict(
            {"inner": nn.Linear(9, 6), "words": nn.Embedding(3, 9), "lm_head": nn.Linear(6, 3)}
        )
        for _ in range(2)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    before = nets[0]["inner"].weight.detach().clone()
    for net, muon in zip(nets, (True, False), strict=True):
        optim = model.make_optimizer(net, 0.01, 0.1, (0.9, 0.95), muon)
        net["lm_head"](net["inner"](net["words"](torch.tensor([0, 2])))).square().sum().backward()
        grad = net["inner"].weight.grad.clone()
        optim.step()
    for name, p in nets[0].named_parameters():  # the second net had AdamW alone
        assert torch.equal(p, nets[1].get_parameter(name)) == (name != "inner.weight")
    # momentum 0.1 g, Nesterov 0.9 * 0.1 g + 0.1 g; its length does not matter
    by_hand = before * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 3 * model.orthogonalize(grad[None])[0]
    torch.testing.assert_close(nets[0]["inner"].weight.detach(), by_hand)


def test_muons_momentum_by_hand():
    """Two steps with gradients of other directions: of the first alone, whose momentum points where
    its gradient does, one cannot tell whether there is any."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"inner": nn.Linear(5, 4, bias=False)})
    weight = net["inner"].weight
    wanted = weight.detach().clone()
    optim = model.make_optimizer(net, 0.01, 0.1, (0.9, 0.95), muon=True)
    momentum = torch.zeros(4, 5)
    for _ in range(2):
        grad = torch.randn(4, 5)
        weight.grad = grad.clone()
        optim.step()
        momentum = 0.9 * momentum + 0.1 * grad
        nesterov = 0.9 * momentum + 0.1 * grad
        update = model.orthogonalize(nesterov[None])[0]
        wanted = wanted * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 5**0.5 * update
        torch.testing.assert_close(weight.detach(), wanted)


def muon_step_of_a_norm(_argv):
    model.setup(0)
    net = torch.nn.LayerNorm(4)
    optim = model.make_optimizer(net, 0.01, 0.1, (0.9, 0.95), muon=True)
    net(torch.arange(8.0).view(2, 4) ** 2).sum().backward()
    optim.step()
    assert (net.weight != 1).any()


def test_muon_without_inner_matrices_on_two_ranks():
    """Under a process group it ended in an IndexError: there was no stack to take the type of."""
    on_ranks(muon_step_of_a_norm, [], 2)


def test_rng_is_a_function_of_its_keys():
    keys = [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, "a"), (0, "b")]
    draw = {k: model.rng(*k).random() for k in keys}
    assert len(set(draw.values())) == 5 and model.rng(0, "a").random() == draw[(0, "a")]


@dataclass(frozen=True)
class Config:
    preset: str = ""
    lr: float = 1e-3  # learning rate, 100% of it
    big_batch: int = 4  # samples
    fix: bool = False  # keep it
    out: str = "runs"


PRESETS = {"small": {}, "large": {"lr": 1e-5, "fix": True}}


def test_parse(capsys):
    assert model.parse_config(Config, PRESETS, []) == Config("small")
    got = model.parse_config(Config, PRESETS, ["large", "--big-batch", "8", "--no-fix"])
    assert got == Config("large", 1e-5, 8, False)
    for argv in (["--nope", "1"], ["huge"], ["--big", "3"]):
        with pytest.raises(SystemExit):
            model.parse_config(Config, PRESETS, argv)
    with pytest.raises(SystemExit):
        model.parse_config(Config, PRESETS, ["--help"])
    assert "learning rate, 100% of it (0.001)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            r"error: out of GPU memory; lower --batch \(CUDA out of memory",
        ),
        (ValueError("--batch 3 must be even"), "error: --batch 3 must be even"),
    ],
)
def test_what_the_user_can_cure_is_one_line(error, line):
    def fail():
        raise error

    with pytest.raises(SystemExit, match=line):
        model.run_main(fail, "--batch")


def test_an_ended_script_leaves_no_process_group():
    """Left to Python's exit, gloo's threads aborted a rank that had done its work: "terminate
    called without an active exception", once in some hundred runs on a busy machine."""

    def script():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)

    model.run_main(script, "--batch")
    assert not distributed.is_initialized()


def other_file_on_rank_1(argv):
    """Rank 1 reads a file that is still being copied; rank 0, a moment later, all of it."""
    dist = model.setup(0)
    if dist.rank == 1:
        raise ValueError("data/episode.safetensors: is cut off")
    model.all_sum(1)


def test_ranks_that_end_with_another_say_so_in_one_line(capfd):
    """The cause stood above a traceback of gloo."""
    on_ranks(lambda argv: model.run_main(lambda: other_file_on_rank_1(argv), ""), [], 2, code=1)
    assert sorted(capfd.readouterr().err.splitlines()) == [
        "error: data/episode.safetensors: is cut off",
        "error: rank 0 ended since another did, which says why",
    ]


def slow_rank_0(argv):
    """Rank 0 reads its model for three seconds, and the rest waits for its weights: once with
    limits of hours, once with one of a second."""
    hours = float(argv[0])
    dist = model.setup(0, shards=1, timeout_hours=hours)

    def limit(group):
        return group._get_backend(dist.device).options._timeout.total_seconds()

    limits = [limit(distributed.group.WORLD)]
    net = model.shard(nn.Linear(2, 2), dist)  # one of its mesh's groups is not that of all ranks
    limits += [limit(group) for group in net.weight.device_mesh.get_all_groups()]
    assert limits == pytest.approx([hours * 3600] * 3)
    if dist.rank == 0:
        time.sleep(3)
    model.all_sum(1)


def test_ranks_wait_for_the_slowest():
    """NCCL's 10 minutes (gloo's 30) ended a job while rank 0 downloaded 16 GB."""
    on_ranks(slow_rank_0, [6], 2)
    ranks = start(slow_rank_0, [1 / 3600], 2)
    for rank in ranks:
        rank.join(60)
    assert ranks[1].exitcode == 1, "after a second rank 1 has waited enough"


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        (sft, "beta1 beta2"),
        (grpo, "beta2"),
        (vla, "beta1 beta2 dropout ema-decay holdout-share"),
    ],
)
def test_a_decay_of_1_is_refused_before_anything_is_loaded(stage, names, capsys):
    """torch's optimizer refused it, after minutes of reading weights and rows."""
    for name in names.split():
        with pytest.raises(SystemExit):
            model.parse_config(stage.Config, stage.PRESETS, [f"--{name}", "1"])
        assert f"argument --{name}: 1 is not a number from 0 to below 1" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [sft, grpo, vla])
def test_what_affects_no_result_may_change_on_resume(stage):
    """sft.py refused another --max-new-tokens, the limit of its evaluations."""
    source = Path(stage.__file__).read_text().partition("class Config")[2].partition("PRESETS")[0]
    free = re.findall(
        r"^    (\w+): ", source.partition("# does not affect results")[2], re.MULTILINE
    )
    assert len(free) > 8
    own = getattr(stage, "MAY_CHANGE_ON_RESUME", [])
    assert not set(free) - {*model.MAY_CHANGE_ON_RESUME, *own}


def test_timeout_is_a_flag_of_all_stages():
    for stage in sft, grpo, vla:
        cfg = model.parse_config(stage.Config, stage.PRESETS, ["--timeout-hours", "0.5"])
        assert cfg.timeout_hours == 0.5 and stage.Config().timeout_hours == 6
    assert "timeout_hours" in model.MAY_CHANGE_ON_RESUME


@pytest.mark.parametrize("has_gpu", [False, True])
def test_freed_memory_is_kept_on_a_cpu_alone(has_gpu, monkeypatch):
    """With a GPU glibc kept the 33 GB that rank 0 had gathered to save."""
    options = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    libc = SimpleNamespace(mallopt=lambda option, value: options.append(option))
    monkeypatch.setattr(model.ctypes, "CDLL", lambda _: libc)
    model.keep_freed_memory()
    assert options == ([] if has_gpu else [-3, -1])


def record_lengths(net):
    """What FSDP notes of the forwards since the last backward."""
    groups = []
    for module in model.fsdp_modules(net):
        groups += module._get_fsdp_state()._fsdp_param_groups
    order = net._get_fsdp_state()._comm_ctx.post_forward_order
    return [len(order), *(len(group._post_forward_indices) for group in groups)]


def forwards_without_backward(argv):
    dist = model.setup(0)
    model.SMALL = 0  # every block is a unit
    backbone = backbones.random_backbone(argv[0], seed=1)
    rows = rows_of(backbone, 2)
    batch = sft.pack(rows)
    sft.token_loss(backbone.net, batch).loss.backward()
    grads = {name: p.grad.clone() for name, p in backbone.net.named_parameters()}
    backbone.net.zero_grad()
    net = model.shard(backbone.net, dist)

    # 1. as of a frozen backbone, and of the model that RL started from
    lengths = []
    for _ in range(4):
        with torch.no_grad():
            sft.token_loss(net, batch)
        lengths.append(record_lengths(net))
    assert lengths[0] == lengths[3], "nothing grows"

    # 2. after a rollout all is sharded again, and nothing is noted of it
    with model.unsharded(net):
        prompts = [model.encode(backbone, talk()[:1], [image(64, 64)], prompt_only=True)]
        model.generate(backbone, prompts, 2, 5)
        assert not any(isinstance(p, DTensor) for p in net.parameters())
    assert all(isinstance(p, DTensor) for p in net.parameters())
    assert set(record_lengths(net)) == {0}

    # 3. and a backward is right between such forwards
    loss = sft.token_loss(net, batch).loss
    with torch.no_grad():
        sft.token_loss(net, batch)
    loss.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), grads[name], rtol=1e-4, atol=1e-4)
    distributed.destroy_process_group()


@pytest.mark.parametrize("size", SIZES[:2])
def test_forwards_without_a_backward_leave_nothing(size):
    """FSDP noted every forward until a backward came. That of the frozen backbone and of the
    reference never comes: 150 MB a rank in 60,000 steps."""
    on_ranks(forwards_without_backward, [size], 2)


def test_shards_divide_the_ranks():
    with pytest.raises(ValueError, match="--shards 3 must divide the 1 ranks"):
        model.setup(0, 3)


def test_log(tmp_path, capsys):
    dist = model.Dist(0, 1, torch.device("cpu"))
    log = model.Log(tmp_path, Config("small"), dist)
    log.write(step=3, loss=np.float32(0.5))
    model.Log(tmp_path / "quiet", Config(), model.Dist(1, 2, torch.device("cpu"))).write(step=1)
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["config"]["preset"] == "small" and {"commit", "torch", "device"} <= set(first)
    assert second["step"] == 3 and second["loss"] == 0.5
    assert capsys.readouterr().out == "step 3       loss 0.5\n"
    model.Log(tmp_path, Config(), dist, ["step", "kl"]).write(step=4, loss=0.25, kl=0.5)
    assert capsys.readouterr().out == "step 4       kl 0.5\n"
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == 0.25, "the file holds what the terminal does not show"
    assert not (tmp_path / "quiet").exists()


@pytest.mark.parametrize("content", [b'{"stage":\n "sft"', b"\xff\xfe"])
def test_a_damaged_json_file_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json.*: not JSON .*repair or delete the file"):
        model.read_json(tmp_path / "run.json")


@pytest.mark.parametrize("run", [{}, [], None, {"stage": "sft"}])
def test_a_record_without_a_key_is_one_line(tmp_path, run):
    """--resume ended in a KeyError or a TypeError."""
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match='run.json: holds no "config"; copy the whole folder'):
        model.read_run(tmp_path, "config")
