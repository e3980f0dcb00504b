"""A tiny Qwen2.5-VL by the recipe of tiny-vlm, and every stage behind it: the commands of
assets/tiny-vlm/README.md, "Another family", with toy sizes behind them."""

import json
import re
import shlex
from pathlib import Path

import pytest

import fast_tokenizer
import grpo
import model
import sft
import vla
from benchmarks import tabletop_data
from tools import backbones

README = Path(__file__).parents[1] / "assets/tiny-vlm/README.md"
TOY = {
    "benchmarks.tabletop_data": "--episodes 12 --conversations 40 --thought-actions 12 --workers 1",
    "tools.backbones": "",
    "sft.py": "--steps 2 --batch 4 --holdout-rows 8 --eval-rows 4 --max-new-tokens 8",
}
MAIN = {
    "benchmarks.tabletop_data": tabletop_data.main,
    "tools.backbones": backbones.main,
    "sft.py": sft.main,
}


def commands():
    """Of the README's section: what each runs -> its words."""
    section = README.read_text().partition("## Another family")[2]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    for line in block.splitlines():
        words = shlex.split(line)
        (place,) = [i for i, word in enumerate(words) if word in TOY]
        yield words[place], words[place + 1 :]


def run(main, command):
    main(shlex.split(command))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README's commands have run."""
    folder = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in commands():
            MAIN[name]([*words, *shlex.split(TOY[name])])
    return folder


def test_the_recipe_makes_a_base_of_the_other_family_and_of_tiny_vlms_size(folder):
    base = model.load(folder / "runs/base-qwen2.5")
    assert base.run["stage"] == "base" and base.run["step"] == 2
    assert base.net.config.model_type == "qwen2_5_vl"
    sizes = {}
    for name in ("tiny-vlm", "tiny-vlm-qwen2.5"):
        backbone = backbones.random_backbone(name, device="meta")
        sizes[name] = sum(p.numel() for p in backbone.net.parameters())
    assert sizes["tiny-vlm-qwen2.5"] == pytest.approx(sizes["tiny-vlm"], rel=0.05)
    without_texts = backbone.tokenizer.encode("centimetres")  # no word of backbones.SENTENCES
    assert len(base.tokenizer.encode("centimetres")) < len(without_texts)
    start = model.load(folder / "runs/tiny-vlm-qwen2.5").net.state_dict()
    trained = base.net.state_dict()
    assert trained.keys() == start.keys()
    assert all((trained[name] != start[name]).any() for name in trained if "weight" in name)


def test_every_stage_runs_behind_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run(
        fast_tokenizer.main,
        "fit --data data/base --out fast --horizon 5 --scale 1.5 --vocab-size 64",
    )
    data = "data/base/conversations.jsonl:1,data/base/episodes:2,data/base/thought_actions.jsonl:1"
    run(
        sft.main,
        f"tabletop --init runs/base-qwen2.5 --data {data} --action-tokenizer fast --out runs/sft "
        "--steps 1 --batch 4 --holdout-rows 4 --eval-rows 2 --probe-prompts 1 --max-new-tokens 8",
    )
    run(
        grpo.main,
        "tabletop --init runs/sft --data data/base/episodes --out runs/grpo --steps 1 --prompts 2 "
        "--batch 2 --group 2 --max-new-tokens 8 --eval-prompts 1 --no-skip-zero-std "
        "--anchor-coef 1",
    )
    run(
        vla.main,
        "tabletop --init runs/grpo --data data/base/episodes --out runs/vla --steps 1 --batch 4 "
        "--dim 32 --layers 2 --heads 2 --max-episodes 3 --eval-rows 2",
    )
    last = (folder / "runs/grpo/log.jsonl").read_text()
    assert '"anchor": 0.0' in last and '"kl": ' in last
    policy = vla.Policy.load(folder / "runs/vla")
    assert policy.backbone.net.config.model_type == "qwen2_5_vl"
    run_json = json.loads((folder / "runs/vla/final/run.json").read_text())
    assert run_json["stage"] == "vla" and run_json["policy"]["layer"] == 3
