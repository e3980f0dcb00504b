"""Backbones with random weights: tiny ones to learn on and to test with, and the published
configurations of Qwen2.5-VL and Qwen3-VL, to try a machine before weights are there.

    python -m tools.backbones tiny-vlm --texts data/base/conversations.jsonl --out runs/tiny-vlm
    python -m tools.backbones qwen2.5-vl-7b --out runs/qwen2.5-vl-7b

A tiny one is written whole. Of a published size the folder gets configuration and tokenizer alone;
model.load fills such a folder at random. Either is an `--init` of every stage.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

import model
import sft

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [  # enough English for tests; main() trains the tokenizer on data instead
    model.THINK,
    model.DIRECT,
    model.action_question("put the red block to the left of the blue bowl"),
    "Where is the green block? It is on the table, at d5, behind the gripper.",
    "The robot moves down, closes the gripper around the yellow cube and lifts it up.",
    "What is here? A small purple cube is near the front edge, and nothing else is on the right.",
]


@dataclass(frozen=True)
class Size:
    family: str = "qwen3_vl"
    vocab: int = 1024  # byte-pair entries of the tokenizer, bytes included
    rows: int = 0  # of the embedding table; 0: as the tokenizer needs, to a multiple of 64
    tied: bool = True  # one table for both ends
    hidden: int = 64
    layers: int = 2
    heads: int = 2
    kv: int = 1
    head: int = 32  # width
    mlp: int = 128
    theta: float = 1e4  # of the rotary positions, over `context` tokens
    mrope: tuple = (6, 5, 5)  # frequencies of time, row and column
    context: int = 4096
    vision: int = 64
    depth: int = 2
    vision_heads: int = 4
    vision_mlp: int = 256
    taps: tuple = (0,)  # vision blocks: those fed to the LLM too (Qwen3), or without a window (2.5)
    places: int = 64  # learned positions of Qwen3-VL
    window: int = 32  # pixels, of Qwen2.5-VL
    patch: int = 8
    merge: int = 2
    temporal: int = 2
    mean: tuple = (0.5, 0.5, 0.5)  # colour that becomes 0
    std: tuple = (0.5, 0.5, 0.5)
    pixels: tuple = ()  # fewest and most of an image; none: 4 and 1024 image tokens


_QWEN2_5 = {
    "family": "qwen2_5_vl",
    "head": 128,
    "theta": 1e6,
    "mrope": (16, 24, 24),
    "context": 128000,
    "vision": 1280,
    "depth": 32,
    "vision_heads": 16,
    "vision_mlp": 3420,
    "taps": (7, 15, 23, 31),
    "window": 112,
    "patch": 14,
    "pixels": (3136, 12845056),
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
_QWEN3 = {
    "rows": 151936,
    "head": 128,
    "kv": 8,
    "theta": 5e6,
    "mrope": (24, 20, 20),
    "context": 262144,
    "vision": 1024,
    "depth": 24,
    "vision_heads": 16,
    "vision_mlp": 4096,
    "taps": (5, 11, 17),
    "places": 2304,
    "patch": 16,
    "pixels": (65536, 16777216),
}
SIZES = {
    # the mean is Tabletop's background: else its constant drowns what differs between patches
    "tiny-vlm": Size(
        hidden=128,
        layers=4,
        heads=4,
        kv=2,
        mlp=384,
        vision=96,
        vision_mlp=384,
        merge=1,
        temporal=1,
        mean=(0.81, 0.75, 0.67),
    ),
    "tiny-qwen3-vl": Size(vocab=384),
    "tiny-qwen2.5-vl": Size("qwen2_5_vl", vocab=384, taps=(1,)),
    # the published configurations, with a tokenizer of our own in the padded table
    "qwen2.5-vl-3b": Size(
        **_QWEN2_5, rows=151936, hidden=2048, layers=36, heads=16, kv=2, mlp=11008
    ),
    "qwen2.5-vl-7b": Size(
        **_QWEN2_5, rows=152064, hidden=3584, layers=28, heads=28, kv=4, mlp=18944, tied=False
    ),
    "qwen3-vl-2b": Size(hidden=2048, layers=28, heads=16, mlp=6144, **_QWEN3),
    "qwen3-vl-4b": Size(hidden=2560, layers=36, heads=32, mlp=9728, **_QWEN3),
    "qwen3-vl-8b": Size(
        hidden=4096,
        layers=36,
        heads=32,
        mlp=12288,
        tied=False,
        **{**_QWEN3, "vision": 1152, "depth": 27, "vision_mlp": 4304, "taps": (8, 16, 24)},
    ),
}


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE with the Qwen2 pre-tokenizer and ChatML tokens, a function of the texts."""
    blank, bpe = Qwen2Tokenizer().backend_tokenizer, Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    marks = [*model.TAGS, *model.SPECIAL_TOKENS, "<image>", "<ACTION>"]  # never inside a merge
    cut = re.compile("|".join(map(re.escape, marks)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        (piece for text in texts for piece in cut.split(text)),
        trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False),
    )
    made = json.loads(bpe.to_str())["model"]
    tok = Qwen2Tokenizer(
        made["vocab"],
        [tuple(m) for m in made["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tok.add_special_tokens({"additional_special_tokens": model.SPECIAL_TOKENS})
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in model.TAGS])
    tok.chat_template = CHAT
    return tok


def random_backbone(size, seed=0, texts=(), device="cpu"):
    """A backbone of SIZES (ValueError for another) with random weights; on "meta" shapes alone.
    texts: what its tokenizer learns besides SENTENCES. Std 1/sqrt(width): about the usual 0.02 at
    real widths, with which a narrow network does not begin to learn."""
    if size not in SIZES:
        raise ValueError(f"{size}: unknown size; choose one of {', '.join(SIZES)}")
    s, tok = SIZES[size], train_tokenizer([*SENTENCES, *texts], SIZES[size].vocab)
    text = {
        "vocab_size": s.rows or -(-len(tok) // 64) * 64,
        "hidden_size": s.hidden,
        "intermediate_size": s.mlp,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv,
        "initializer_range": s.hidden**-0.5,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": s.context,
        "dtype": "float32",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": s.theta,
            "mrope_section": list(s.mrope),
        },
    }
    vision = {
        "hidden_size": s.vision,
        "depth": s.depth,
        "num_heads": s.vision_heads,
        "intermediate_size": s.vision_mlp,
        "patch_size": s.patch,
        "spatial_merge_size": s.merge,
        "temporal_patch_size": s.temporal,
        "out_hidden_size": s.hidden,
        "dtype": "float32",
        "initializer_range": s.vision**-0.5,
    }
    ids = tok.convert_tokens_to_ids
    marks = {
        f"{k.removesuffix('_pad')}_token_id": ids(f"<|{k}|>")
        for k in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    if s.family == "qwen3_vl":
        family, text["head_dim"] = transformers.Qwen3VLConfig, s.head
        vision |= {"num_position_embeddings": s.places, "deepstack_visual_indexes": list(s.taps)}
    else:
        family = transformers.Qwen2_5_VLConfig
        text |= {"bos_token_id": None, "eos_token_id": tok.eos_token_id}
        vision |= {
            "window_size": s.window,
            "fullatt_block_indexes": list(s.taps),
            "tokens_per_second": 2,
        }
        tok.chat_template = (
            "{% if messages[0].role != 'system' %}<|im_start|>system\n"
            + model.SYSTEM_PROMPT
            + "<|im_end|>\n{% endif %}"
            + CHAT
        )
    config = family(
        text_config=text, vision_config=vision, tie_word_embeddings=s.tied, dtype="float32", **marks
    )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        net = transformers.AutoModelForImageTextToText.from_config(config)
        if s.family == "qwen3_vl":  # places must weigh as much as colours from the start
            torch.nn.init.normal_(net.model.visual.pos_embed.weight, std=0.5)
    net.generation_config.update(eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    token = (s.patch * s.merge) ** 2  # pixels of one
    spec = model.ImageSpec(
        s.patch, s.merge, s.temporal, s.mean, s.std, *(s.pixels or (4 * token, 1024 * token))
    )
    return model.Backbone(net, tok, spec, model.vocab(net, tok))


def texts_of(path, rows=20000):
    """The texts of the first `rows` conversations of a .jsonl file, as a stage reads them."""
    with open(path) as file:
        for line, _ in zip(file, range(rows), strict=False):
            messages = sft.add_mode_lines(json.loads(line)["messages"])
            yield "\n".join(message["content"] for message in messages)


def write(size, folder, seed=0, texts=()):
    """A backbone of SIZES -> folder, in the Hugging Face layout."""
    published = SIZES[size].rows > 0 if size in SIZES else False
    backbone = random_backbone(size, seed, texts, "meta" if published else "cpu")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if published:
        backbone.net.config.save_pretrained(folder)
        backbone.net.generation_config.save_pretrained(folder)
    else:
        backbone.net.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    backbone.image_spec.save(folder)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.backbones",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("size", choices=SIZES, help="which configuration")
    add("--out", required=True, help="folder to write")
    add("--texts", default="", help="conversations, .jsonl, that the tokenizer is trained on")
    add("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args(argv)
    write(args.size, args.out, args.seed, texts_of(args.texts) if args.texts else ())
    print(f"{args.out}: {args.size}")


if __name__ == "__main__":
    model.run_main(main, "the size")
