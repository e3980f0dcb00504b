"""Backbones with random weights: tiny ones to learn on and to test with, and the published
configurations of Qwen2.5-VL and Qwen3-VL, to try a machine before weights are there.

    python -m tools.backbones tiny-vlm --texts data/base/conversations.jsonl --out runs/tiny-vlm
    python -m tools.backbones qwen2.5-vl-7b --out runs/qwen2.5-vl-7b

A tiny one is written whole. Of a published size the folder gets configuration and tokenizer alone;
model.load fills such a folder at random. Either is an `--init` of every stage.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

import model
from fast_tokenizer import natural

# ---- Sizes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A configuration; by default a tiny Qwen3-VL."""

    # both halves
    family: str = "qwen3_vl"  # or qwen2_5_vl
    merge: int = 2  # merge x merge patches are one token of the language model
    patch: int = 8  # side, pixels
    temporal: int = 2  # a still image is repeated this often

    # language model
    vocab_size: int = 1024  # byte-pair entries of our tokenizer, bytes included
    embedding_rows: int = 0  # 0: as many as the tokenizer needs, to a multiple of 64
    tied: bool = True  # one table for both ends
    hidden: int = 64  # width
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    mlp: int = 128  # inner width
    rope_theta: float = 1e4
    mrope_section: tuple[int, int, int] = (6, 5, 5)  # frequencies of time, row and column
    context: int = 4096  # tokens

    # vision tower
    vision_hidden: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    vision_mlp: int = 256
    # Qwen3-VL: blocks whose output is added to layers of the language model too (deepstack).
    # Qwen2.5-VL: blocks that attend to the whole image, where the others see a window.
    special_layers: tuple[int, ...] = (0,)
    position_rows: int = 64  # learned positions, Qwen3-VL
    window: int = 32  # side, pixels, Qwen2.5-VL

    # images
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # colour that becomes 0
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_bounds: tuple[int, int] | None = None  # fewest and most; None: 4 and 1024 image tokens

    @property
    def is_published(self) -> bool:
        """Whether its authors publish weights for it; only then the table is padded."""
        return self.embedding_rows > 0


# What the published models of a family share; they have a tokenizer of our own in the padded table.
QWEN2_5_VL = Size(
    family="qwen2_5_vl",
    patch=14,
    head_dim=128,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
    context=128000,
    vision_hidden=1280,
    vision_layers=32,
    vision_heads=16,
    vision_mlp=3420,
    special_layers=(7, 15, 23, 31),
    window=112,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    pixel_bounds=(3136, 12845056),
)
QWEN3_VL = Size(
    family="qwen3_vl",
    patch=16,
    embedding_rows=151936,
    head_dim=128,
    kv_heads=8,
    rope_theta=5e6,
    mrope_section=(24, 20, 20),
    context=262144,
    vision_hidden=1024,
    vision_layers=24,
    vision_heads=16,
    vision_mlp=4096,
    special_layers=(5, 11, 17),
    position_rows=2304,
    pixel_bounds=(65536, 16777216),
)

TINY_VLM = Size(
    merge=1,
    temporal=1,
    hidden=128,
    layers=4,
    heads=4,
    kv_heads=2,
    mlp=384,
    vision_hidden=96,
    vision_mlp=384,
    # Tabletop's background: else its constant drowns what differs between patches
    mean=(0.81, 0.75, 0.67),
)

SIZES = {
    "tiny-vlm": TINY_VLM,
    # as many parameters: its vision blocks have three matrices in the MLP, not two
    "tiny-vlm-qwen2.5": replace(TINY_VLM, family="qwen2_5_vl", vision_mlp=256, special_layers=(1,)),
    "tiny-qwen3-vl": Size(vocab_size=384),
    "tiny-qwen2.5-vl": Size(family="qwen2_5_vl", vocab_size=384, special_layers=(1,)),
    "qwen2.5-vl-3b": replace(
        QWEN2_5_VL,
        embedding_rows=151936,
        hidden=2048,
        layers=36,
        heads=16,
        kv_heads=2,
        mlp=11008,
    ),
    "qwen2.5-vl-7b": replace(
        QWEN2_5_VL,
        embedding_rows=152064,
        tied=False,
        hidden=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        mlp=18944,
    ),
    "qwen3-vl-2b": replace(QWEN3_VL, hidden=2048, layers=28, heads=16, mlp=6144),
    "qwen3-vl-4b": replace(QWEN3_VL, hidden=2560, layers=36, heads=32, mlp=9728),
    "qwen3-vl-8b": replace(
        QWEN3_VL,
        tied=False,
        hidden=4096,
        layers=36,
        heads=32,
        mlp=12288,
        vision_hidden=1152,
        vision_layers=27,
        vision_mlp=4304,
        special_layers=(8, 16, 24),
    ),
}


# ---- Tokenizer ----------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2.5-VL opens a conversation without a system message by one of its own.
QWEN2_5_CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    + model.SYSTEM_PROMPT
    + "<|im_end|>\n{% endif %}"
    + CHAT_TEMPLATE
)
SENTENCES = [  # enough English for tests; main() trains the tokenizer on data instead
    model.THINK,
    model.DIRECT,
    model.action_question("put the red block to the left of the blue bowl"),
    "Where is the green block? It is on the table, at d5, behind the gripper.",
    "The robot moves down, closes the gripper around the yellow cube and lifts it up.",
    "What is here? A small purple cube is near the front edge, and nothing else is on the right.",
]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Byte-level BPE with the Qwen2 pre-tokenizer and ChatML tokens, a function of the texts.

    vocab_size: byte-pair entries, to which the special tokens and tags are added."""
    # 1. learn merges; special tokens and tags are cut out, so that none is part of a merge
    blank = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = blank.normalizer
    bpe.pre_tokenizer = blank.pre_tokenizer
    never_merged = [*model.TAGS, *model.SPECIAL_TOKENS, "<image>", "<ACTION>"]
    separator = re.compile("|".join(re.escape(token) for token in never_merged))
    pieces = itertools.chain.from_iterable(separator.split(text) for text in texts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(pieces, trainer)

    # 2. a tokenizer of transformers from them
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        learned["vocab"],
        [tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": model.SPECIAL_TOKENS})
    tags = [AddedToken(tag, special=False, normalized=False) for tag in model.TAGS]
    tokenizer.add_tokens(tags)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def training_texts(path: str, rows: int = 20000) -> Iterator[str]:
    """The texts of the first `rows` conversations of a .jsonl file, as a stage reads them.
    ValueError naming the line of one that is none."""
    source = model.ConversationDataset(path, None, 0)
    for i in source.train[:rows]:
        messages = model.add_mode_lines(source.row(i)["messages"])
        yield "\n".join(message["content"] for message in messages)


# ---- Backbone -----------------------------------------------------------------------------------


def check_size(name: str, size: Size) -> None:
    """ValueError naming what does not fit together: transformers would build it."""
    half_head = size.head_dim // 2
    for fits, rule in (
        (size.family in model.FAMILIES, f"family is one of {', '.join(model.FAMILIES)}"),
        (size.heads % size.kv_heads == 0, "heads is a multiple of kv_heads"),
        (sum(size.mrope_section) == half_head, f"mrope_section sums to head_dim / 2, {half_head}"),
        (
            size.family != "qwen2_5_vl" or size.heads * size.head_dim == size.hidden,
            "of qwen2_5_vl, heads x head_dim is hidden",
        ),
        (size.vision_hidden % size.vision_heads == 0, "vision_heads divides vision_hidden"),
        (
            max(size.special_layers, default=0) < size.vision_layers,
            "special_layers lie below vision_layers",
        ),
    ):
        if not fits:
            raise ValueError(f"{name}: change its line in SIZES, so that {rule}")


def configuration(size: Size, tokenizer: Qwen2Tokenizer) -> transformers.PretrainedConfig:
    """The configuration of transformers. Weights begin with std 1 / sqrt(width): about the usual
    0.02 at real widths, with which a narrow network does not begin to learn."""
    multiple_of_64 = -(-len(tokenizer) // 64) * 64
    text = {
        "vocab_size": size.embedding_rows or multiple_of_64,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "initializer_range": size.hidden**-0.5,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": size.context,
        "dtype": "float32",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": size.rope_theta,
            "mrope_section": list(size.mrope_section),
        },
    }
    vision = {
        "hidden_size": size.vision_hidden,
        "depth": size.vision_layers,
        "num_heads": size.vision_heads,
        "intermediate_size": size.vision_mlp,
        "patch_size": size.patch,
        "spatial_merge_size": size.merge,
        "temporal_patch_size": size.temporal,
        "out_hidden_size": size.hidden,
        "dtype": "float32",
        "initializer_range": size.vision_hidden**-0.5,
    }
    if size.family == "qwen3_vl":
        family = transformers.Qwen3VLConfig
        text["head_dim"] = size.head_dim
        vision["num_position_embeddings"] = size.position_rows
        vision["deepstack_visual_indexes"] = list(size.special_layers)
    else:
        family = transformers.Qwen2_5_VLConfig
        text["bos_token_id"] = None
        text["eos_token_id"] = tokenizer.eos_token_id
        vision["window_size"] = size.window
        vision["fullatt_block_indexes"] = list(size.special_layers)
        vision["tokens_per_second"] = 2
    token_id = tokenizer.convert_tokens_to_ids
    return family(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=size.tied,
        dtype="float32",
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def image_spec(size: Size) -> model.ImageSpec:
    """How images are cut for a size."""
    pixels_a_token = (size.patch * size.merge) ** 2
    fewest, most = size.pixel_bounds or (4 * pixels_a_token, 1024 * pixels_a_token)
    return model.ImageSpec(
        patch=size.patch,
        merge=size.merge,
        temporal=size.temporal,
        mean=size.mean,
        std=size.std,
        min_pixels=fewest,
        max_pixels=most,
    )


def random_backbone(
    name: str,
    seed: int = 0,
    texts: Iterable[str] = (),
    device: str | torch.device = "cpu",
) -> model.Backbone:
    """A backbone of SIZES with random weights, a function of seed; on "meta" shapes alone.

    texts: what its tokenizer learns besides SENTENCES. ValueError for a name not in SIZES, or a
    size that cannot be."""
    if name not in SIZES:
        raise ValueError(f"{name}: unknown size; choose one of {', '.join(SIZES)}")
    size = SIZES[name]
    check_size(name, size)
    tokenizer = train_tokenizer([*SENTENCES, *texts], size.vocab_size)
    if size.family == "qwen2_5_vl":
        tokenizer.chat_template = QWEN2_5_CHAT_TEMPLATE
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        config = configuration(size, tokenizer)
        net = transformers.AutoModelForImageTextToText.from_config(config)
        if size.family == "qwen3_vl":  # where a patch is must weigh as much as its colour
            torch.nn.init.normal_(net.model.visual.pos_embed.weight, std=0.5)
    model.use_own_attention(net)
    net.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    vocab = model.Vocabulary.read(net, tokenizer)
    return model.Backbone(net, tokenizer, image_spec(size), vocab)


def write(name: str, folder: str | Path, seed: int = 0, texts: Iterable[str] = ()) -> None:
    """Writes a backbone of SIZES in the Hugging Face layout: a tiny one with weights, a published
    size without. ValueError for a name not in SIZES, or a folder whose content would be lost."""
    folder = Path(folder)
    weightless = name in SIZES and SIZES[name].is_published
    if (folder / "run.json").exists():
        raise ValueError(f"{folder}: holds what a stage has trained; name another --out")
    if weightless and any(folder.glob("*.safetensors")):  # which would be loaded in place of none
        raise ValueError(f"{folder}: holds weights of another backbone; name another --out")
    backbone = random_backbone(name, seed, texts, device="meta" if weightless else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    if weightless:
        backbone.net.config.save_pretrained(folder)
        backbone.net.generation_config.save_pretrained(folder)
    else:
        backbone.net.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    backbone.image_spec.save(folder)


# ---- Command line -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.backbones",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("size", choices=SIZES, help="which configuration")
    add("--out", required=True, help="folder to write")
    add(
        "--texts",
        default="",
        help="conversations, .jsonl: the tokenizer learns from the first 20,000 rows",
    )
    add("--seed", type=natural, default=0, help="of the weights")
    args = parser.parse_args(argv)
    model.quiet_libraries()
    texts = training_texts(args.texts) if args.texts else ()
    write(args.size, args.out, args.seed, texts)
    print(f"{args.out}: {args.size}")


if __name__ == "__main__":
    model.run_main(main, "the size")
