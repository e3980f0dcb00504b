"""The study: every model of the paper at small scale, its controls, and what each is measured by.

    python -m tools.study --dry-run        # what is missing, and about how many hours it takes
    python -m tools.study --hours 8        # runs it; starts nothing that would not end in time
    python -m tools.study --only base,SFT,SFT+RL --seeds 0,1
    python -m tools.study --measures actions,think --heads none   # what needs no head, first
    python -m tools.study report           # tables and figures of what there is

Run again, it goes on where it was: a stage that ended is not run again, one that was killed resumes
from its own checkpoints. A stage is known by its command and by those of all that it starts from:
when one that is needed has changed, nothing runs until --redo says that what rests on it is to be
run again. A stage that fails names its log; what does not depend on it goes on.

Writes results/study/MODEL_SEED.json, as evaluate.py does, results/study/stages.json (which commands
ended, in how many seconds), checkpoints and logs below runs/study, data below data/study.

In the order of the file: the matrix, which is all that a reader of the report needs; stages made
from it; what has been done; estimates; the runner; the command. tools/study_report.py has the
statistics and the report.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import evaluate
import grpo
import model
import sft
import vla
from fast_tokenizer import natural, positive
from tools import plot

# ---- The matrix: data ----------------------------------------------------------------------------
#
# Commands name what they read and write: {train}, {kinds}, {fast}, {test}, {one_task}, {questions},
# {words}, {scenes}, {qwen} are the folders below, {path} that of the entry itself; {init} is the
# parent's checkpoint, {out} the model's own; {seed} is a number. A command depends on those that
# write what it names. Data, SFT, RL and the head `prompt` are those of speedrun.sh.


class Data(NamedTuple):
    """What models are trained or measured on, or begin with."""

    path: str
    command: str
    quick: str  # what --quick adds


RECORD = "-m benchmarks.tabletop_data --out {path}"
DATA = [
    Data(
        "{test}",
        f"{RECORD} --seed 1000 --episodes 120 --conversations 0",
        "--episodes 40",
    ),
    Data(
        "{one_task}",  # the paper's probe: 20 trajectories of one long task
        f"{RECORD} --seed 1000 --episodes 20 --tasks long:0 --conversations 0",
        "",
    ),
    Data(
        "{questions}",
        f"{RECORD} --seed 2000 --episodes 0 --conversations 1500 --single",
        "--conversations 20",
    ),
    Data(
        "{train}",
        f"{RECORD} --seed {{seed}} --single "
        "--episodes 3200 --conversations 6000 --thought-actions 36000 --carried-on 0.5",
        "--episodes 80 --conversations 120 --thought-actions 240",
    ),
    Data(
        "{train}/no_thoughts.jsonl",  # the questions that are answered without a thought
        "awk '!/<think>/ {{print > \"{path}\"}}' {train}/conversations.jsonl",
        "",
    ),
    Data(
        "{kinds}",  # {train}/thought_actions.jsonl, but a third of the thoughts plan
        f"{RECORD} --seed {{seed}} --episodes 0 --conversations 0 "
        "--thought-actions 36000 --carried-on 0.5 --thought-kinds plan,scene,task",
        "--thought-actions 240",
    ),
    Data(
        "{words}",  # questions that no SFT has seen, for RL
        f"{RECORD} --seed 10{{seed}} --episodes 0 --conversations 4000 --single",
        "--conversations 200",
    ),
    Data(
        "{fast}",
        "fast_tokenizer.py fit --data {train} --out {path} "
        "--horizon 5 --scale 2.5 --vocab-size 64 --max-episodes 400",
        "",
    ),
    # another architecture, by the recipe of tiny-vlm: one for all seeds, as tiny-vlm is
    Data(
        "{scenes}",
        f"{RECORD} --seed 1 --episodes 0 --conversations 100000 --single",
        "--conversations 200",
    ),
    Data(
        "{qwen}_random",
        "-m tools.backbones tiny-vlm-qwen2.5 --texts {scenes}/conversations.jsonl --out {path}",
        "",
    ),
    Data(
        "{qwen}",
        "sft.py base --init {qwen}_random --data {scenes}/conversations.jsonl --out {path}",
        "--steps 24 --batch 8 --holdout-rows 16 --eval-rows 8",
    ),
]

# ---- The matrix: what is measured ----------------------------------------------------------------
#
# Each gets --policy, --variant, --out, --preset and --seed. 400 trials and 100 chains a model and
# seed.

TRIALS = "--execute 2 --trials 10 --chains 100"
MEASURES = {
    "actions": "evaluate.py actions --data {test} --action-tokenizer {fast} --prompts 512",
    "think": f"evaluate.py tabletop --mode think {TRIALS}",  # by its own thought and tokens
    "sampled": f"evaluate.py tabletop --mode think --sampled {TRIALS}",  # as RL samples them
    "direct": f"evaluate.py tabletop --mode direct {TRIALS}",  # by its own tokens, no thought
    "removed": f"evaluate.py tabletop --mode think --thought removed {TRIALS}",
    "swapped": f"evaluate.py tabletop --mode think --thought swapped {TRIALS}",
    "true": f"evaluate.py tabletop --mode think --thought true {TRIALS}",
    "vqa": "evaluate.py vqa --data {questions}/conversations.jsonl --score row --prompt think",
    "thought": "evaluate.py thought --data {test}",  # is the thought causal?
    "gain": "evaluate.py gain --over {init} --data {test}",  # over its parent: by thoughts?
    "probe": "evaluate.py probe --data {test} --one-task {one_task}",  # what the features hold
}
ALL_MEASURES = " ".join(MEASURES)
BUT_GAIN = " ".join(name for name in MEASURES if name != "gain")  # as its parent writes no actions
DRIVE = f"evaluate.py tabletop {TRIALS}"  # by a head

HEAD = "vla.py speedrun"
HEADS = {  # ways to the head: what HEAD is told beside data, checkpoint and seed
    "prompt": "",  # the paper's, and the speedrun's
    "prompt-long": "--stride 4 --steps 4400",  # twice its frames and steps
    "thought": "--condition thought",  # prompt and thought
    "thought-only": "--condition thought-only",
    "think": "--think",
    "layer1": "--layer 1",
    "layer2": "--layer 2",
    "layer4": "--layer 4",  # the last; the others read 3, 0.64 of the depth
    # upper bounds, as their backbone is not frozen: the flow loss trains it too; in the second also
    # the loss of its own action tokens
    "flow": "--cache none --backbone-lr 1e-4",
    "flow+tokens": "--cache none --backbone-lr 1e-4 --ce-weight 0.1",
}
FROZEN_HEADS = "prompt prompt-long thought thought-only think layer1 layer2 layer4"
ALL_HEADS = " ".join(HEADS)

# ---- The matrix: models --------------------------------------------------------------------------


BASE = "assets/tiny-vlm"


class Model(NamedTuple):
    """A row of the study."""

    name: str
    parent: str  # the model that it starts from; "": none, and it has no commands
    commands: list[str]  # one after the other; the last writes its checkpoint
    answers: str  # which question
    against: str = "base SFT"  # models that it is compared with
    heads: str = ""  # names of HEADS; for none no head is trained
    measures: str = "actions think vqa thought gain probe"  # names of MEASURES
    seeds: int = 3
    checkpoint: str = BASE  # of a model without commands


MIXTURE = "{train}/conversations.jsonl:0.5,{train}/episodes:3,{train}/thought_actions.jsonl:0.3"
SFT = "sft.py speedrun"
SHORT_SFT = "sft.py speedrun --steps 2400"  # half as many samples
ON_SFT = "sft.py speedrun --lr 2e-4 --probe-prompts 0"  # a little more SFT
REJECTION = [  # the right ones of RL's rollouts, then SFT on those
    "evaluate.py actions --policy {init} --data {train}/episodes --split train "
    "--prompts 2560 --samples 8 --keep 2 --keep-right {out}_rows/thoughts.jsonl "
    "--out {out}_rows/results.json --seed {seed}",
    f"{ON_SFT} --steps 116 --holdout-rows 0 --data {{out}}_rows/thoughts.jsonl",
]
ECOT = [f"{ON_SFT} --steps 107 --data {{train}}/thought_actions.jsonl"]  # RL's number of prompts
RL = "grpo.py speedrun --data {train}/episodes"  # 80 steps of 32 prompts: 2,560 prompts
# 8% of SFT's samples think before they act. In the paper none do; here nearly none, many, or half:
FEW_THOUGHTS = "{train}/conversations.jsonl:1,{train}/episodes:3,{train}/thought_actions.jsonl:0.04"
MANY_THOUGHTS = "{train}/conversations.jsonl:.5,{train}/episodes:2,{train}/thought_actions.jsonl:1"
HALF_THOUGHTS = (
    "{train}/conversations.jsonl:0.5,{train}/episodes:1.5,{train}/thought_actions.jsonl:2"
)
KINDS_OF_THOUGHTS = (
    "{train}/conversations.jsonl:0.5,{train}/episodes:1.5,{kinds}/thought_actions.jsonl:2"
)
ON_THOUGHTS = "sft.py speedrun --lr 5e-4 --steps 240 --probe-prompts 0"  # enough to mix the kinds
ON_KINDS = {"heads": "thought", "measures": "actions think direct thought gain"}
SCREENING = {"against": "SFT SFT+RL", "measures": "actions", "seeds": 1}
ON_HALF = {
    "against": "base half",
    "heads": "thought",
    "measures": "actions think thought gain",
    "seeds": 1,
}

MODELS = [
    # the paper's
    Model(
        "base", "", [], "the pretrained model under the head",
        against="", heads="thought prompt prompt-long", measures="actions vqa probe", seeds=5,
    ),
    Model(
        "language-SFT", "base", [f"{SHORT_SFT} --data {{train}}/conversations.jsonl"],
        "language alone, as many samples as action-SFT",
        heads="thought prompt", measures="actions vqa probe",
    ),
    Model(
        "action-SFT", "base", [f"{SHORT_SFT} --data {{train}}/episodes"],
        "actions alone, as many samples as language-SFT",
        against="base language-SFT SFT", heads="prompt", measures="actions direct vqa probe",
    ),
    Model(
        "action-SFT-long", "base", [f"{SFT} --data {{train}}/episodes"],
        "actions alone, as many samples as SFT (the paper's is not matched with it)",
        heads="prompt", measures="actions direct vqa probe",
    ),
    Model(
        "SFT", "base", [f"{SFT} --data {MIXTURE}"], "RoboAlign without RL",
        against="base", heads=ALL_HEADS, measures=BUT_GAIN, seeds=5,
    ),
    Model(
        "SFT-no-reasoning", "base",
        [f"{SFT} --data {{train}}/no_thoughts.jsonl:1,{{train}}/episodes:1"],
        "Table 1: without the reasoning rows, how well formed and how different are the thoughts?",
        heads="prompt", measures="actions think vqa thought probe",
    ),
    Model(
        "SFT+RL", "SFT", [RL], "RoboAlign",
        against="base SFT rejection ECoT-SFT no-thought-SFT more-SFT language-RL visual-RL",
        heads=FROZEN_HEADS, measures=ALL_MEASURES, seeds=5,
    ),
    Model(
        "language-RL", "SFT", ["grpo.py language --data {words}/conversations.jsonl"],
        "Table 6: RL on answers in words", heads="thought prompt",
    ),
    Model(
        "visual-RL", "SFT", ["grpo.py visual --data {words}/conversations.jsonl"],
        "Table 6: RL on points and paths", heads="thought prompt",
    ),
    Model(
        "ECoT-SFT", "SFT", ECOT,
        "Table 7: thought + action of the expert on as many samples as RL has prompts",
        heads="thought prompt",
    ),
    # controls
    Model(
        "no-thought-SFT", "SFT", [f"{ON_SFT} --steps 107 --data {{train}}/episodes"],
        "actions without thoughts on as many samples as RL has prompts",
        heads="thought prompt",
    ),
    Model(
        "rejection", "SFT", REJECTION,
        "rejection sampling at RL's rollouts: what a gain of RL must beat",
        heads="thought prompt",
    ),
    Model(
        "more-SFT", "SFT", [f"{ON_SFT} --steps 800 --data {MIXTURE}"],
        "more SFT for as long as RL takes", heads="thought prompt",
    ),
    Model(
        "RL-no-thought", "SFT", [f"{RL} --thought none"], "RL without thinking",
        against="SFT SFT+RL", heads="prompt", measures="actions direct",
    ),
    Model(
        "RL-filler", "SFT", [f"{RL} --thought filler"], "RL behind a thought that says nothing",
        against="SFT SFT+RL", heads="prompt", measures="actions direct thought",
    ),
    Model(
        "RL-anchor", "SFT", [f"{RL} --anchor-coef 10"],
        "RL that keeps the features that the head reads", against="SFT SFT+RL",
        heads="thought prompt", measures="actions think",
    ),
    # the paper's regime: thoughts reach actions by transfer and by RL, hardly by SFT
    Model(
        "few", "base", [f"{SFT} --data {FEW_THOUGHTS}"],
        "SFT where 1% of the samples think before they act (the paper: none)",
        against="base SFT", heads="thought prompt",
        measures="actions think direct vqa thought probe",
    ),
    Model(
        "few+RL", "few", [RL], "does RL teach what SFT left out?",
        against="base few few-rejection few-ECoT few-more", heads="thought prompt",
        measures="actions think direct vqa thought gain probe",
    ),
    Model(
        "few+RL-3x", "few", [f"{RL} --steps 240"], "and three times as much of it?",
        against="few few+RL", heads="thought prompt", measures="actions think",
    ),
    Model(
        "few+RL-l1", "few", [f"{RL} --reward l1"], "the distance of decoded actions there",
        against="few few+RL", measures="actions think", seeds=1,
    ),
    Model(
        "few+RL-expected", "few", [f"{RL} --credit expected"],
        "the reward that is to be expected behind a thought, in place of a drawn one",
        against="base few few+RL few-rejection few-ECoT few-more", heads="thought prompt",
        measures="actions think direct vqa thought gain probe",
    ),
    Model(
        "few+RL-expected-3x", "few", [f"{RL} --credit expected --steps 240"],
        "and three times as much of it?",
        against="few few+RL few+RL-3x few+RL-expected", heads="thought prompt",
        measures="actions think thought gain",
    ),
    Model(
        "few+RL-expected-thought", "few", [f"{RL} --credit expected-thought"],
        "its half: the thought learns, the answer does not",
        against="few few+RL few+RL-expected", measures="actions think", seeds=1,
    ),
    Model(
        "few+RL-expected-answer", "few", [f"{RL} --credit expected-answer"],
        "the other half",
        against="few few+RL few+RL-expected", measures="actions think", seeds=1,
    ),
    Model(
        "few-rejection", "few", REJECTION, "rejection sampling at RL's rollouts",
        against="few", heads="thought prompt", measures="actions think",
    ),
    Model(
        "few-ECoT", "few", ECOT,
        "thought + action of the expert on as many samples as RL has prompts",
        against="few", heads="thought prompt", measures="actions think thought gain",
    ),
    Model(
        "few-more", "few", [f"{ON_SFT} --steps 800 --data {FEW_THOUGHTS}"],
        "more SFT for as long as RL takes",
        against="few", heads="thought prompt", measures="actions think",
    ),
    # SFTs that think before they act more often, until the motion follows the thought
    Model(
        "many", "base", [f"{SFT} --data {MANY_THOUGHTS}"],
        "SFT where 29% of the samples think before they act",
        against="base SFT", heads="thought prompt",
        measures="actions think direct vqa thought probe",
    ),
    Model(
        "half", "base", [f"{SFT} --data {HALF_THOUGHTS}"],
        "SFT where 50% of the samples think before they act",
        against="base SFT", heads="thought prompt", measures=BUT_GAIN, seeds=5,
    ),
    Model(
        "half+RL", "half", [RL], "does RL help where the thought is the cause?",
        against="base half half-rejection half-ECoT half-no-thought half-more half-language-RL "
        "half-visual-RL",
        heads="thought prompt", measures=ALL_MEASURES, seeds=5,
    ),
    Model(
        "half+RL-expected", "half", [f"{RL} --credit expected"],
        "the reward that is to be expected behind a thought, where thoughts differ in it",
        against="base half half+RL", heads="thought", measures="actions think thought gain",
    ),
    Model(
        "half-language-RL", "half", ["grpo.py language --data {words}/conversations.jsonl"],
        "RL on answers in words there", **ON_HALF,
    ),
    Model(
        "half-visual-RL", "half", ["grpo.py visual --data {words}/conversations.jsonl"],
        "RL on points and paths there", **ON_HALF,
    ),
    Model("half-ECoT", "half", ECOT, "thought + action of the expert there", **ON_HALF),
    Model(
        "half-no-thought", "half", [f"{ON_SFT} --steps 107 --data {{train}}/episodes"],
        "actions without thoughts there", **ON_HALF,
    ),
    Model("half-rejection", "half", REJECTION, "rejection sampling there", **ON_HALF),
    Model(
        "half-more", "half", [f"{ON_SFT} --steps 800 --data {HALF_THOUGHTS}"],
        "more SFT there", **ON_HALF,
    ),
    # thoughts of several kinds, of which one plans the move: all learned alike from the start; or
    # the plan learned well before, so that RL has better and worse ones to choose among
    Model(
        "kinds", "base", [f"{SFT} --data {KINDS_OF_THOUGHTS}"],
        "half, of whose thoughts a third plan, a third name places, a third repeat the task",
        against="base half", heads="thought", measures="actions think direct thought", seeds=1,
    ),
    Model(
        "kinds+RL", "kinds", [RL], "does RL choose, where all kinds have been learned alike?",
        against="base kinds half half+RL", seeds=1, **ON_KINDS,
    ),
    Model(
        "half-kinds", "half", [f"{ON_THOUGHTS} --data {{kinds}}/thought_actions.jsonl"],
        "half, which plans, after a little SFT on all three kinds: a positive control of RL",
        against="half", heads="thought", measures="actions think direct thought",
    ),
    Model(
        "half-plans", "half", [f"{ON_THOUGHTS} --data {{train}}/thought_actions.jsonl"],
        "the same steps on plans alone: what of the difference is by the kinds?",
        against="half half-kinds half-kinds+RL", heads="thought", measures="actions think thought",
        seeds=1,
    ),
    Model(
        "half-kinds+RL", "half-kinds", [RL], "does RL choose, where one kind helps?",
        against="half half-kinds half-kinds-rejection half+RL", **ON_KINDS,
    ),
    Model(
        "half-kinds+RL-format", "half-kinds", [f"{RL} --reward format"],
        "does it by the form of answers alone, whatever they say?",
        against="half-kinds half-kinds+RL", heads="thought", measures="actions think gain", seeds=1,
    ),
    Model(
        "half-kinds-rejection", "half-kinds", REJECTION,
        "does rejection sampling at RL's rollouts?", against="half-kinds", **ON_KINDS,
    ),
    # another architecture
    Model(
        "base-qwen", "", [], "a tiny Qwen2.5-VL in place of the Qwen3-VL",
        against="base", heads="thought prompt", measures="actions vqa probe",
        checkpoint="{qwen}",
    ),
    Model(
        "SFT-qwen", "base-qwen", [f"{SFT} --data {MIXTURE}"], "its SFT",
        against="base-qwen SFT", heads="thought prompt",
        measures="actions think vqa thought probe",
    ),
    Model(
        "SFT+RL-qwen", "SFT-qwen", [RL], "does RL do for it what it does for the other?",
        against="base-qwen SFT-qwen SFT+RL", heads="thought prompt",
    ),
    # rewards and credit: by r_a and one seed first
    Model("RL-l1", "SFT", [f"{RL} --reward l1"], "the distance of decoded actions", **SCREENING),
    Model("RL-lcs", "SFT", [f"{RL} --reward lcs"], "the longest common subsequence", **SCREENING),
    Model("RL-ladder", "SFT", [f"{RL} --reward ladder"], "each decoded prefix pays", **SCREENING),
    Model("RL-format", "SFT", [f"{RL} --reward format"], "form alone pays", **SCREENING),
    Model(
        "RL-credit", "SFT", [f"{RL} --credit prefix"], "credit to the first wrong token",
        **SCREENING,
    ),
    Model(
        "RL-expected", "SFT", [f"{RL} --credit expected"], "the expected reward, not a drawn one",
        **SCREENING,
    ),
    Model("RL-drgrpo", "SFT", [f"{RL} --advantage drgrpo"], "no std, no length", **SCREENING),
    Model("RL-clip", "SFT", [f"{RL} --clip-low 0.1"], "a tighter lower clip", **SCREENING),
    Model("RL-hot", "SFT", [f"{RL} --temperature 1.3"], "more varied rollouts", **SCREENING),
    Model("RL-lr", "SFT", [f"{RL} --lr 1e-4"], "larger steps", **SCREENING),
    Model(
        "RL-batch", "SFT", [f"{RL} --prompts 128 --batch 128 --steps 20 --lr 4e-5"],
        "fewer and surer steps, on as many prompts", **SCREENING,
    ),
    Model("RL-lora", "SFT", [f"{RL} --lora 8 --lr 2e-4"], "adapters of rank 8", **SCREENING),
    # budgets
    Model(
        "RL-3x", "SFT", [f"{RL} --steps 240"], "does more RL reach the head?",
        against="SFT SFT+RL", heads="thought prompt", measures="actions think",
    ),
    Model(
        "RL-10x", "SFT", [f"{RL} --steps 800"], "does ten times the RL reach the head?",
        against="SFT SFT+RL", heads="thought prompt", measures="actions think",
    ),
    Model(
        "RL-l1-10x", "SFT", [f"{RL} --reward l1 --steps 800"],
        "and with the reward that every sample has a part of?",
        against="SFT SFT+RL RL-10x", heads="thought prompt", measures="actions think",
    ),
]  # fmt: skip


class Matrix(NamedTuple):
    """All that is declared."""

    data: list[Data]
    models: list[Model]
    heads: dict[str, str]
    measures: dict[str, str]


MATRIX = Matrix(DATA, MODELS, HEADS, MEASURES)

QUICK = {  # what --quick adds to the commands of a script, or of a command of evaluate.py
    "sft.py": "--steps 24 --holdout-rows 16 --probe-prompts 4 --eval-rows 8",
    "grpo.py": "--steps 2 --prompts 8 --batch 8 --eval-prompts 8",
    "vla.py": "--steps 20 --max-episodes 40 --eval-rows 16",
    "actions": "--prompts 16",
    "tabletop": "--trials 1 --chains 2",
    "vqa": "--rows 40",
}

# ---- Stages --------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """One command of the study."""

    key: str  # as "SFT_0 vqa"
    command: str  # without the launcher, and without --resume
    output: str  # file or folder that it writes; other commands name it
    kind: str  # stages of a kind take about as long, a step or as a whole
    slots: int = 1  # workers that it takes: its ranks
    variant: str = ""  # of a measure: its model in the results file `output`
    way: str = ""  # what evaluate.py keeps a measure's checkpoint under, as "tabletop think"
    inputs: tuple[str, ...] = ()  # keys of the stages that it starts from
    digest: str = ""  # of its command and of all that it starts from


class Folders(NamedTuple):
    runs: str
    data: str
    results: str


TRAINING = {"sft.py": sft, "grpo.py": grpo, "vla.py": vla}  # they --resume


def folder_name(name: str, seed: int) -> str:
    return f"{name}_{seed}"


def variant_name(name: str, head: str = "") -> str:
    """What a model is called in its results file: "SFT", and "SFT prompt" of that head."""
    return f"{name} {head}".strip()


def model_named(models: list[Model], name: str) -> Model:
    for one in models:
        if one.name == name:
            return one
    names = ", ".join(one.name for one in models)
    raise ValueError(f"no model {name}; the study has {names}")


def checkpoint_of(models: list[Model], name: str, folders: Folders, seed: int) -> str:
    one = model_named(models, name)
    if one.commands:
        return f"{folders.runs}/{folder_name(name, seed)}"
    return one.checkpoint.format(**places_of(folders, seed))


def with_ancestors(models: list[Model], name: str) -> list[str]:
    """The model's name, its parent's, ..."""
    names = [name]
    parent = model_named(models, name).parent
    while parent:
        names.append(parent)
        parent = model_named(models, parent).parent
    return names


def all_stages(
    matrix: Matrix, wanted: dict[str, list[int]], folders: Folders, ranks: int, quick: bool = False
) -> dict[str, Stage]:
    """The stages of the wanted models (name -> seeds), seed by seed, with all that they start from.
    Only what is wanted is measured. ranks: of a stage that torchrun starts."""
    stages = {}
    for seed in sorted({seed for seeds in wanted.values() for seed in seeds}):
        measured = [name for name in wanted if seed in wanted[name]]
        trained = set()
        for name in measured:
            trained.update(with_ancestors(matrix.models, name))
        places = places_of(folders, seed)
        for data in matrix.data:
            path = data.path.format(**places)
            command = f"{data.command} {data.quick if quick else ''}".strip()
            command = command.format(path=path, **places)
            slots = slots_of(command, ranks)
            stages.setdefault(path, Stage(path, command, path, kind_of(command), slots))
        for one in matrix.models:
            if one.name in trained:
                is_measured = one.name in measured
                for stage in stages_of(matrix, one, is_measured, folders, seed, ranks, quick):
                    stages[stage.key] = stage
    return with_inputs(stages)


def places_of(folders: Folders, seed: int) -> dict[str, str]:
    """What the braces in the matrix stand for."""
    return {
        "seed": str(seed),
        "test": f"{folders.data}/test",
        "one_task": f"{folders.data}/one_task",
        "questions": f"{folders.data}/questions",
        "train": f"{folders.data}/{seed}/train",
        "kinds": f"{folders.data}/{seed}/kinds",
        "words": f"{folders.data}/{seed}/words",
        "fast": f"{folders.data}/{seed}/fast",
        "scenes": f"{folders.data}/scenes",
        "qwen": f"{folders.runs}/qwen",
    }


def stages_of(
    matrix: Matrix,
    one: Model,
    is_measured: bool,
    folders: Folders,
    seed: int,
    ranks: int,
    quick: bool,
) -> Iterator[Stage]:
    """1. training   2. what the model itself is measured by   3. heads, and driving by them"""
    name = folder_name(one.name, seed)
    checkpoint = checkpoint_of(matrix.models, one.name, folders, seed)
    results = f"{folders.results}/{name}.json"
    places = places_of(folders, seed)
    places["out"] = checkpoint
    if one.parent:
        places["init"] = checkpoint_of(matrix.models, one.parent, folders, seed)

    def complete(command: str, added: str) -> str:
        quick_key = kind_of(command).split()[0]
        words = [command, QUICK.get(quick_key, "") if quick else "", added]
        return " ".join(word for word in words if word).format(**places)

    def measure(label: str, command: str, policy: str, variant: str, kind: str = "") -> Stage:
        preset = "quick" if quick else "study"
        added = (
            f"--policy {policy} --variant {shlex.quote(variant)} --out {results} "
            f"--preset {preset} --seed {seed}"
        )
        way = kind_of(command)
        if way.split()[0] not in METRIC_NAMES:
            raise ValueError(f"{name} {label}: say in METRIC_NAMES what {way} writes")
        full = complete(command, added)
        return Stage(f"{name} {label}", full, results, kind or way, 1, variant, way)

    # 1. training
    for number, command in enumerate(one.commands, 1):
        is_last = number == len(one.commands)
        key = name if is_last else f"{name} ({number} of {len(one.commands)})"
        script = command.split()[0]
        added = ""
        if script in TRAINING:
            added = "--init {init} --out {out} --seed {seed}"
        if script == "sft.py":
            added += " --action-tokenizer {fast}"
        full = complete(command, added)
        output = output_of(full, checkpoint)
        yield Stage(key, full, output, kind_of(command), slots_of(command, ranks))
    if not is_measured:
        return

    # 2. what the model itself is measured by
    for label in one.measures.split():
        yield measure(label, matrix.measures[label], checkpoint, variant_name(one.name))

    # 3. heads, and driving by them
    for head in one.heads.split():
        out = f"{folders.runs}/heads/{name}/{head}"
        command = f"{HEAD} {matrix.heads[head]}".strip()
        added = f"--init {checkpoint} --data {{train}}/episodes --out {out} --seed {seed}"
        yield Stage(f"{name} head {head}", complete(command, added), out, kind_of(command))
        kind = "tabletop thought" if kind_of(command) == "vla.py thought" else "tabletop"
        yield measure(f"drives {head}", DRIVE, out, variant_name(one.name, head), kind)


def slots_of(command: str, ranks: int) -> int:
    return ranks if command.startswith(("sft.py ", "grpo.py ")) else 1


def kind_of(command: str) -> str:
    """The script; of evaluate.py its command, with the mode in which a model drives, "sampled", and
    the thought that it is given.

    "sft.py speedrun ...": "sft.py";  "evaluate.py tabletop --mode think": "tabletop think"."""
    words = shlex.split(command)
    if "--keep-right" in words:
        return f"{words[1]} kept"
    if words[0] == "evaluate.py":
        way = [words[1]]
        if "--mode" in words:
            way.append(words[words.index("--mode") + 1])
        if "--sampled" in words:
            way.append("sampled")
        if "--thought" in words:
            way.append(words[words.index("--thought") + 1])
        return " ".join(way)
    if words[0] == "-m":
        return words[1]
    if words[:2] == ["sft.py", "base"]:
        return "sft.py base"  # twice as many samples a step
    if "--backbone-lr" in words:
        return "vla.py trained"
    if words[0] == "vla.py" and "--condition" in words:
        return "vla.py thought"  # it takes time to write them
    return words[0]


def output_of(command: str, checkpoint: str) -> str:
    """What a training command writes: the checkpoint, or the rows that it keeps."""
    words = shlex.split(command)
    if "--keep-right" in words:
        return words[words.index("--keep-right") + 1]
    return checkpoint


def with_inputs(stages: dict[str, Stage]) -> dict[str, Stage]:
    """The same, each with the stages that write what its command names, and with its digest.
    ValueError for a stage that does not stand behind what it starts from."""
    writer = {Path(stage.output): stage.key for stage in stages.values() if not stage.variant}
    complete = {}
    for stage in stages.values():
        inputs = []
        for path in named_paths(stage.command):
            for place in (path, *path.parents):
                key = writer.get(place, stage.key)
                if key == stage.key or key in inputs:  # what it writes itself is no input
                    continue
                if key not in complete:
                    raise ValueError(
                        f"{stage.key}: starts from {key}, which the matrix lists behind it; list "
                        "what it starts from first"
                    )
                inputs.append(key)
        digests = [complete[key].digest for key in sorted(inputs)]
        text = "\n".join([stage.command, *digests])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        complete[stage.key] = stage._replace(inputs=tuple(inputs), digest=digest)
    return complete


def named_paths(command: str) -> list[Path]:
    """What may be paths in a command, of a mixture each: "a.jsonl:1,b:2" names a.jsonl and b."""
    paths = []
    for word in shlex.split(command):
        for item in word.split(","):
            paths.append(Path(item.partition("#")[0].partition(":")[0]))
    return paths


# ---- What has been done --------------------------------------------------------------------------
#
# results/study/stages.json: key -> {"command", "digest", "kind", "slots", "spent": seconds before a
# stop, from which it resumes} of a stage that was begun; of one that has ended "seconds" in place
# of "spent", the "commit" that it ran at, and of SFT and RL the "num_tokens" that went through it.


def read_records(results: str) -> dict[str, dict]:
    path = Path(results) / "stages.json"
    return model.read_json(path) if path.exists() else {}


def is_done(stage: Stage, records: dict[str, dict]) -> bool:
    """Whether it has ended with this command and its output is there."""
    record = records.get(stage.key, {})
    return "seconds" in record and record["digest"] == stage.digest and has_output(stage)


def has_output(stage: Stage) -> bool:
    """Whether what it writes is there: of a measure its metrics in the results file."""
    path = Path(stage.output)
    if not stage.variant or not path.exists():
        return path.exists()
    variant = evaluate.read_results(path)["arms"].get(stage.variant, {})
    return stage.way in variant.get("checkpoints", {})


def changed(stages: dict[str, Stage], records: dict[str, dict]) -> list[str]:
    """Keys of stages that were run, or begun, with another command or from another parent."""
    return [
        key
        for key, stage in stages.items()
        if key in records and records[key]["digest"] != stage.digest
    ]


def needed_for(targets: list[str], stages: dict[str, Stage]) -> set[str]:
    """Keys of the targets and of all that they start from, whether it has been done or not."""
    needed = set(targets)
    for stage in reversed(stages.values()):
        if stage.key in needed:
            needed.update(stage.inputs)
    return needed


def resting_on(keys: list[str], stages: dict[str, Stage]) -> set[str]:
    """These keys and those of all stages that start from them, or from what starts from them."""
    resting = set(keys)
    for stage in stages.values():
        if resting.intersection(stage.inputs):
            resting.add(stage.key)
    return resting


def why_changed(key: str, stages: dict[str, Stage], records: dict[str, dict]) -> str:
    """One line for the first of the changed stages."""
    old = records[key]["command"]
    new = stages[key].command
    if old == new:
        inputs = ", ".join(stages[key].inputs)
        reason = f"something that it starts from has changed ({inputs})"
    else:
        reason = f"was run as `{old}`, is now `{new}`"
    return f"{key}: {reason}; --redo runs it again, with all that rests on it"


def forget(keys: list[str], stages: dict[str, Stage], records: dict[str, dict]) -> None:
    """Of changed stages: deletes what they wrote, and their records. Results that another command
    would give of the same model stay until they are replaced; those of another model, or on other
    data, do not."""
    for key in keys:
        stage = stages[key]
        # Its digest is another by its command or by what it starts from: by the latter where the
        # command is the same, and, beside a command that is another, where that is forgotten too.
        has_same_command = records[key]["command"] == stage.command
        is_of_another_model = has_same_command or not set(stage.inputs).isdisjoint(keys)
        if not stage.variant:
            delete(stage.output)
        elif is_of_another_model and Path(stage.output).exists():
            delete_results(stage)
        del records[key]


DRIVEN = r"(success|chain|retried|held still|thoughts unfinished)\b"  # behind its mode
METRIC_NAMES = {  # a command of evaluate.py -> how the names of its metrics begin
    "actions": rf"(think|direct) (sampled|greedy) (?!{DRIVEN})",
    "vqa": rf"(answers|truncated)$|({'|'.join(grpo.SCORES)})(_graded)? ",
    "thought": r"(given|edited|worth) ",
    "gain": r"gain ",
    "probe": r"probe ",
}
METRIC_NAMES |= dict.fromkeys(evaluate.SIMULATORS, DRIVEN)


def is_metric_of(way: str, name: str) -> bool:
    """Whether evaluate.py writes a metric of this name when it measures that way: "think success
    goal" by "tabletop think"."""
    command, *mode = way.split()
    return re.match(" ".join([*mode, METRIC_NAMES[command]]), name) is not None


def delete_results(stage: Stage) -> None:
    """What a measure wrote about its variant; what other measures wrote about it stays."""
    results = evaluate.read_results(stage.output)
    variant = results["arms"].get(stage.variant, {})
    for part in variant.values():
        if not isinstance(part, dict):
            continue  # "prompts", in older files
        for name in list(part):  # of a metric, or of the way as that of "checkpoints"
            if name == stage.way or is_metric_of(stage.way, name):
                del part[name]
    if not variant.get("checkpoints"):
        results["arms"].pop(stage.variant, None)
    model.write_json(stage.output, results)


def delete(path: str) -> None:
    if Path(path).is_dir():
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def missing(stages: dict[str, Stage], records: dict[str, dict], targets: list[str]) -> list[Stage]:
    """What is to be run for the targets, each behind what it starts from. A checkpoint is not
    missing when all is measured that was to be measured of it."""
    needed = set()

    def need(key: str) -> None:
        if key not in needed and not is_done(stages[key], records):
            needed.add(key)
            for other in stages[key].inputs:
                need(other)

    for key in targets:
        need(key)
    return [stage for stage in stages.values() if stage.key in needed]


def check_outputs(plan: list[Stage], records: dict[str, dict]) -> None:
    """ValueError for a file or folder that is in the way and was not written by this study."""
    for stage in plan:
        if not stage.variant and stage.key not in records and Path(stage.output).exists():
            raise ValueError(
                f"{stage.output}: exists, but this study has not written it; delete it, or name "
                "other folders by --runs and --data"
            )


# ---- Estimates -----------------------------------------------------------------------------------

# Of each kind, on two cores of a 2026 server: seconds a step of training, seconds in all of others.
SECONDS = {
    "sft.py": 0.3,
    "sft.py base": 0.5,
    "grpo.py": 2.5,
    "vla.py": 0.25,
    "vla.py thought": 0.35,
    "vla.py trained": 1.0,
    "benchmarks.tabletop_data": 90,
    "fast_tokenizer.py": 10,
    "awk": 1,
    "actions": 40,
    "actions kept": 240,
    "vqa": 220,
    "thought": 130,
    "gain": 130,
    "probe": 70,
    "tabletop": 90,
    "tabletop thought": 400,
    "tabletop think": 400,
    "tabletop think sampled": 400,
    "tabletop direct": 200,
    "tabletop think removed": 300,
    "tabletop think swapped": 300,
    "tabletop think true": 300,
}


def steps_of(command: str) -> int:
    """Optimizer steps of a training command, of which the last --steps counts; 1 of any other."""
    script, *flags = shlex.split(command)
    if script not in TRAINING:
        return 1
    given = [value for flag, value in itertools.pairwise(flags) if flag == "--steps"]
    return int(given[-1]) if given else TRAINING[script].PRESETS[flags[0]]["steps"]


def seconds_a_step(kind: str, records: dict[str, dict]) -> float:
    """Of a kind: the mean of what this study has measured, else of SECONDS, else a minute."""
    ended = [one for one in records.values() if one["kind"] == kind and "seconds" in one]
    if ended:
        steps = sum(steps_of(one["command"]) for one in ended)
        return sum(one["seconds"] for one in ended) / steps
    return SECONDS.get(kind, 60.0)


def seconds_spent(stage: Stage, records: dict[str, dict]) -> float:
    """Of training that was stopped: what the checkpoint that it resumes from took; else 0."""
    record = records.get(stage.key, {})
    resumes = stage.command.split()[0] in TRAINING and Path(stage.output).exists()
    if not resumes or record.get("digest") != stage.digest:
        return 0.0
    return record.get("spent", 0.0)


def estimate(stage: Stage, records: dict[str, dict]) -> float:
    """Seconds that a stage will take, from where it is."""
    whole = steps_of(stage.command) * seconds_a_step(stage.kind, records)
    return max(whole - seconds_spent(stage, records), 0.0)


def print_plan(plan: list[Stage], records: dict[str, dict], workers: int) -> None:
    worker_seconds = 0.0
    for number, stage in enumerate(plan, 1):
        seconds = estimate(stage, records)
        worker_seconds += seconds * stage.slots
        record = records.get(stage.key, {})
        has_ended = "seconds" in record  # with this command, but its output is not there
        is_begun = record.get("digest") == stage.digest and not has_ended
        begun = ", was begun" if is_begun else ""
        words = "worker" if stage.slots == 1 else "workers"
        print(f"{number:4d}  {stage.key:36s} {seconds / 60:6.1f} min, {stage.slots} {words}{begun}")
    hours = worker_seconds / 3600
    print(
        f"{len(plan)} stages to run: {hours:.1f} worker hours, "
        f"about {hours / workers:.1f} hours on {workers} workers"
    )


# ---- Runner --------------------------------------------------------------------------------------

GRACE = 60.0  # seconds that a stage has to save and end after SIGTERM; torchrun gives its ranks 30


class Running(NamedTuple):
    stage: Stage
    process: subprocess.Popen
    slots: list[str]  # names of the workers that it holds: numbers of cores, or of GPUs
    started: float  # time.time()


def launch_words(stage: Stage) -> list[str]:
    """The command as it is started: by torchrun where it has several ranks."""
    words = shlex.split(stage.command)
    script = words[0]
    if script in TRAINING:
        words.append("--resume")
    if script in TRAINING and stage.slots > 1:
        ranks = ["--standalone", "--nproc_per_node", str(stage.slots)]
        return [sys.executable, "-m", "torch.distributed.run", *ranks, *words]
    if script.startswith("-") or script.endswith(".py"):
        return [sys.executable, *words]
    return words


class Runner:
    """Runs a plan on workers. A worker is a core, or a GPU; each stage starts as soon as what it
    needs is there, workers are free and, with a deadline, it would end in time. Of several that
    could start the one of most ranks does, which finds its workers free least often; of as many,
    the first of the plan."""

    def __init__(
        self,
        plan: list[Stage],
        records: dict[str, dict],
        folders: Folders,
        workers: list[str],
        deadline: float = float("inf"),
        on_gpus: bool = False,
    ):
        self.waiting = list(plan)
        self.records = records
        self.folders = folders
        self.free = list(workers)
        self.deadline = deadline  # time.time()
        self.on_gpus = on_gpus
        self.running: list[Running] = []
        self.failed: list[str] = []
        self.late: list[str] = []  # not started, as they would not end in time
        self.blocked: list[str] = []  # not started, as what they need has failed or is late
        self.stop = threading.Event()  # set by SIGTERM and Ctrl-C

    def run(self, lock: int) -> int:
        """-> exit status: 0, 1 when a stage failed, 143 when it was stopped by SIGTERM or Ctrl-C,
        which do not end this process while it runs. lock: an open file that the stages hold too."""
        (Path(self.folders.runs) / "logs").mkdir(parents=True, exist_ok=True)
        Path(self.folders.results).mkdir(parents=True, exist_ok=True)
        earlier = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            earlier[number] = signal.signal(number, lambda *_: self.stop.set())
        try:
            self.start_what_can(lock)
            while self.running and not self.stop.wait(0.1):
                if self.collect():
                    self.start_what_can(lock)
        finally:
            self.stop_all()  # those that still run
            for number, handler in earlier.items():
                signal.signal(number, handler)
        if self.stop.is_set():
            say("stopped; the same command goes on from here")
            return 128 + signal.SIGTERM
        self.say_what_is_left()
        return 1 if self.failed else 0

    def start_what_can(self, lock: int) -> None:
        """Starts stages, and takes those that cannot run any more from the waiting ones."""
        for stage in sorted(self.waiting, key=lambda one: -one.slots):
            inputs = set(stage.inputs)
            will_never_be = {*self.failed, *self.late, *self.blocked}
            still_to_come = {one.key for one in self.waiting}
            still_to_come |= {one.stage.key for one in self.running}
            if inputs & will_never_be:
                self.waiting.remove(stage)
                self.blocked.append(stage.key)
            elif inputs & still_to_come:
                continue
            elif time.time() + estimate(stage, self.records) > self.deadline:
                self.waiting.remove(stage)
                self.late.append(stage.key)
            elif stage.slots <= len(self.free):
                self.waiting.remove(stage)
                self.start(stage, lock)

    def log_of(self, stage: Stage) -> Path:
        name = stage.key.strip("/").replace("/", "-").replace(" ", "-")
        return Path(self.folders.runs) / "logs" / f"{name}.txt"

    def start(self, stage: Stage, lock: int) -> None:
        # 1. half of an output is deleted, unless the stage resumes from it
        is_begun = stage.key in self.records
        resumes = stage.command.split()[0] in TRAINING
        if is_begun and not resumes and not stage.variant:
            delete(stage.output)
        # 2. the record, before the process: whoever stops it finds that it was begun
        self.records[stage.key] = {
            "command": stage.command,
            "digest": stage.digest,
            "kind": stage.kind,
            "slots": stage.slots,
            "spent": seconds_spent(stage, self.records),
        }
        self.write_records()
        # 3. the process, in a group of its own: Ctrl-C reaches it through stop_all() alone
        slots = [self.free.pop(0) for _ in range(stage.slots)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.on_gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(slots)
        Path(stage.output).parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_of(stage), "w") as log:
            process = subprocess.Popen(
                launch_words(stage),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                pass_fds=[lock],  # as long as it lives no other study begins
            )
        self.running.append(Running(stage, process, slots, time.time()))
        minutes = estimate(stage, self.records) / 60
        say(f"started {stage.key} (about {minutes:.1f} min), log {self.log_of(stage)}")

    def collect(self) -> bool:
        """Takes the stages that have ended from the running ones; their workers are free again. ->
        whether there were any."""
        before = len(self.running)
        for one in list(self.running):
            status = one.process.poll()
            if status is None:
                continue
            self.running.remove(one)
            self.free = sorted([*self.free, *one.slots])
            if status == 0 and has_output(one.stage):
                self.record_end(one)
                continue
            self.failed.append(one.stage.key)
            reason = f"exit {status}" if status else f"it has not written {one.stage.output}"
            log = self.log_of(one.stage)
            say(f"FAILED  {one.stage.key}: {reason}: {last_line(log)} (all of it in {log})")
        return len(self.running) < before

    def record_end(self, one: Running) -> None:
        record = self.records[one.stage.key]
        record["seconds"] = round(record.pop("spent") + time.time() - one.started, 1)
        record["commit"] = model.commit()
        if num_tokens := logged_tokens(one.stage.output):
            record["num_tokens"] = num_tokens
        self.write_records()
        shutil.rmtree(Path(one.stage.output) / "features", ignore_errors=True)  # large, of a head
        say(f"ended   {one.stage.key} after {record['seconds'] / 60:.1f} min")

    def stop_all(self) -> None:
        """SIGTERM to all, which save where they can; SIGKILL to those that have not ended by then.
        What is half done stays in the records as begun."""
        for one in self.running:
            say(f"stopping {one.stage.key}")
            signal_group(one.process, signal.SIGTERM)
        latest = time.time() + GRACE
        for one in self.running:
            try:
                one.process.wait(max(latest - time.time(), 0.1))
            except subprocess.TimeoutExpired:
                signal_group(one.process, signal.SIGKILL)
                one.process.wait()
            if one.process.returncode == 0 and has_output(one.stage):
                self.record_end(one)
            else:
                self.records[one.stage.key]["spent"] += round(time.time() - one.started, 1)
        if self.running:
            self.write_records()
        self.running = []

    def write_records(self) -> None:
        model.write_json(Path(self.folders.results) / "stages.json", self.records)

    def say_what_is_left(self) -> None:
        if self.late:
            words = ", ".join(self.late)
            say(f"{len(self.late)} stages not started, as they would not end in time: {words}")
        if self.blocked:
            words = ", ".join(self.blocked)
            say(f"{len(self.blocked)} stages not started, as what they need is not there: {words}")
        if self.failed:
            say(f"{len(self.failed)} stages failed: {', '.join(self.failed)}")


def logged_tokens(folder: str) -> int:
    """The last num_tokens of a training run's log; 0 where there is none, as of a head."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        return 0
    of_steps = plot.read_log(path).series.get("num_tokens", {})
    return int(of_steps[max(of_steps)]) if of_steps else 0


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def last_line(log: Path) -> str:
    """The last line that a stage itself wrote, before torchrun's report of how its ranks ended."""
    lines = []
    for line in log.read_text(errors="replace").replace("\r", "\n").splitlines():
        if "torch/distributed/elastic" in line:
            break
        if line.strip():
            lines.append(line.strip())
    return lines[-1] if lines else "it said nothing"


def signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have just ended
        os.killpg(process.pid, number)


@contextlib.contextmanager
def only_one(folder: str) -> Iterator[int]:
    """Holds a lock on a folder; the number of its open file is for the processes that share it.
    ValueError while another study, or a stage that has outlived one, holds it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / "study.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ValueError(
                f"{folder}: a study runs there, or a stage of one that was killed; wait for it, "
                "or end it"
            ) from e
        yield lock.fileno()


# ---- Command -------------------------------------------------------------------------------------


def wanted_models(matrix: Matrix, only: str, seeds: str) -> dict[str, list[int]]:
    """--only and --seeds -> the seeds of each model that is wanted. Without --seeds as many as it
    declares, from 0."""
    names = only.split(",") if only else [one.name for one in matrix.models]
    try:
        given = [natural(seed) for seed in seeds.split(",")] if seeds else []
    except (ValueError, argparse.ArgumentTypeError) as e:
        raise ValueError(f"--seeds {seeds}: {e}; give numbers, as 0,1,2") from e
    if given and max(given) >= 1000:
        raise ValueError(f"--seeds {seeds}: from 1000 on they are of what is measured on")
    wanted = {}
    for name in names:
        wanted[name] = given or list(range(model_named(matrix.models, name).seeds))
    return wanted


def narrowed(matrix: Matrix, measures: str, heads: str) -> Matrix:
    """--measures and --heads -> the matrix with these alone. Empty: all; "none": none. What is left
    away is not run, and not forgotten where it was (unless --redo runs again what it rests on)."""
    models = []
    for one in matrix.models:
        of_model = names_kept(one.measures, measures, matrix.measures, "--measures")
        heads_of_model = names_kept(one.heads, heads, matrix.heads, "--heads")
        models.append(one._replace(measures=of_model, heads=heads_of_model))
    return matrix._replace(models=models)


def names_kept(declared: str, given: str, known: dict[str, str], flag: str) -> str:
    """Of a model's declared names (separated by spaces) those that a flag gives (by commas)."""
    if not given:
        return declared
    wanted = [] if given == "none" else given.split(",")
    for name in wanted:
        if name not in known:
            raise ValueError(f"{flag}: no {name!r}; give some of {', '.join(known)}, or none")
    return " ".join(name for name in declared.split() if name in wanted)


def targets_of(
    matrix: Matrix,
    wanted: dict[str, list[int]],
    stages: dict[str, Stage],
    only_checkpoints: bool = False,
) -> list[str]:
    """What a study is for: all measures among the stages. Checkpoints alone of models for which the
    matrix, as it is before it is narrowed, declares neither measures nor heads; or of all wanted
    ones, where only_checkpoints says so."""
    checkpoints = set()
    for name, seeds in wanted.items():
        one = model_named(matrix.models, name)
        is_only_trained = not one.measures and not one.heads
        if is_only_trained or only_checkpoints:
            checkpoints.update(folder_name(name, seed) for seed in seeds)
    return [key for key, stage in stages.items() if stage.variant or key in checkpoints]


def checked_folder(flag: str, folder: str) -> str:
    """Its path as commands name it: "./runs/" is runs. ValueError for characters that would take a
    command apart, or the list of a mixture."""
    if re.search(r"""[\s,:#'"\\{}]""", folder):
        raise ValueError(
            f"{flag} {folder}: name a folder without spaces, commas, colons, #, quotes, "
            "backslashes and braces: commands could not name it"
        )
    return str(Path(folder))


def main(argv: list[str] | None = None, matrix: Matrix = MATRIX) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        from tools import study_report

        study_report.main(argv[1:], matrix)
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m tools.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", default="", help="models, separated by commas; empty: all of the matrix")
    add("--seeds", default="", help="as 0,1,2; empty: as many as each model declares")
    add("--measures", default="", help="as actions,think; empty: all that it declares; or none")
    add("--heads", default="", help="as prompt,thought-only; empty: all that it declares; or none")
    add("--hours", type=positive, help="start nothing that would not end in this time")
    add("--dry-run", action="store_true", help="print what is missing, and end")
    add("--redo", action="store_true", help="run again what has changed, and all that rests on it")
    add("--workers", type=natural, default=0, help="stages at once; 0: one a GPU, else one a core")
    add(
        "--quick", action="store_true", help="tiny sizes: shows that all runs, not what it is worth"
    )
    add("--runs", default="", help="checkpoints and logs; runs/study, or runs/study-quick")
    add("--data", default="", help="data/study, or data/study-quick")
    add("--results", default="", help="results/study, or runs/study-quick/results")
    args = parser.parse_args(argv)

    # 1. the stages, and where they run
    runs = args.runs or ("runs/study-quick" if args.quick else "runs/study")
    data = args.data or ("data/study-quick" if args.quick else "data/study")
    results = args.results or (f"{runs}/results" if args.quick else "results/study")
    folders = Folders(
        checked_folder("--runs", runs),
        checked_folder("--data", data),
        checked_folder("--results", results),
    )
    names, on_gpus = worker_names(args.workers)
    ranks = 1 if on_gpus else min(2, len(names))
    wanted = wanted_models(matrix, args.only, args.seeds)
    stages = all_stages(matrix, wanted, folders, ranks, args.quick)
    narrowed_matrix = narrowed(matrix, args.measures, args.heads)
    asked = all_stages(narrowed_matrix, wanted, folders, ranks, args.quick)  # some of the stages
    only_checkpoints = args.measures == args.heads == "none"
    targets = targets_of(matrix, wanted, asked, only_checkpoints)

    # 2. what is missing
    records = read_records(folders.results)
    all_changed = changed(stages, records)
    needed = needed_for(targets, stages)
    stale = [key for key in all_changed if key in needed]
    if stale and not args.redo:
        raise ValueError(why_changed(stale[0], stages, records))
    plan = missing(stages, records, targets)
    check_outputs(plan, records)
    print_plan(plan, records, len(names))
    if args.dry_run or not plan:
        return 0

    # 3. run it
    deadline = time.time() + 3600 * args.hours if args.hours else float("inf")
    outdated = resting_on(stale, stages)
    with only_one(folders.runs) as lock:
        forget([key for key in all_changed if key in outdated], stages, records)
        return Runner(plan, records, folders, names, deadline, on_gpus).run(lock)


def worker_names(wanted: int) -> tuple[list[str], bool]:
    """-> a name for each worker, and whether they are GPUs, of which CUDA_VISIBLE_DEVICES may name
    some. ValueError for more workers than GPUs."""
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(i) for i in range(gpus)]
        if wanted > len(names):
            raise ValueError(
                f"--workers {wanted}: a worker is a GPU, of which there are {len(names)}; give at "
                f"most {len(names)}, or set CUDA_VISIBLE_DEVICES= for workers on cores"
            )
        return names[: wanted or gpus], True
    return [str(i) for i in range(wanted or os.cpu_count())], False


if __name__ == "__main__":
    model.run_main(lambda: sys.exit(main()), "--workers")
