"""The paper's recipe of the README, command by command, on toy files in the layouts of the public
data: LeRobot v2.0 with a blank instruction, LIBERO's HDF5, conversations with a system message, an
oversized, a gray and a CMYK picture. Each command is the README's with toy sizes behind it."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_libero
import untrained
from PIL import Image

import sft

pa = pytest.importorskip("pyarrow", reason="pip install pyarrow: see requirements-extras.txt")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("h5py", reason="pip install h5py: see requirements-extras.txt")

ROOT = Path(__file__).parents[1]
CAMERA = "observation.images.image_0"  # BridgeV2's first
INSTRUCTIONS = ["put the spoon in the pot", "", "open the drawer", "fold the cloth"] * 3

# What is added to each command of the README, by the file that it runs.
TOY = {
    "fast_tokenizer.py": "--vocab-size 64",
    "sft.py": f"--init {untrained.folder('tiny-qwen2.5-vl')} --steps 2 --batch 4 --micro-batch 2 "
    "--holdout-rows 2 --eval-rows 2 --probe-prompts 1 --max-new-tokens 8",
    "grpo.py": "--steps 1 --prompts 2 --batch 2 --group 2 --max-new-tokens 8 --eval-prompts 2",
    "vla.py": "--steps 2 --batch 4 --dim 32 --layers 2 --heads 2 --vl-layers 1 --future-tokens 2 "
    "--eval-rows 2",
}


def write_bridge(folder):
    """BridgeV2 as LeRobot v2.0 publishes it: one stats.json for all, no statistics a recording."""
    rng = np.random.default_rng(0)
    meta = folder / "meta"
    (folder / "data/chunk-000").mkdir(parents=True)
    meta.mkdir()
    states, actions, episodes = [], [], []
    for number, instruction in enumerate(INSTRUCTIONS):
        length = 8 + number
        states.append(rng.normal(size=(length, 8)).astype(np.float32))
        actions.append(rng.normal(0, 0.1, (length, 7)).astype(np.float32))
        images = []
        for level in range(length):
            file = io.BytesIO()
            Image.new("RGB", (56, 56), (level, 100, 9 * number)).save(file, "png")
            images.append({"bytes": file.getvalue(), "path": f"{level}.png"})
        columns = {
            "observation.state": states[-1].tolist(),
            "action": actions[-1].tolist(),
            CAMERA: images,
            "timestamp": (np.arange(length) / 5).astype(np.float32).tolist(),
            "frame_index": list(range(length)),
            "episode_index": [number] * length,
            "index": list(range(length)),
            "task_index": [INSTRUCTIONS.index(instruction)] * length,
        }
        pq.write_table(pa.table(columns), folder / f"data/chunk-000/episode_{number:06d}.parquet")
        episodes.append({"episode_index": number, "tasks": [instruction], "length": length})
    stats = {}
    for name, rows in (("observation.state", states), ("action", actions)):
        values = np.concatenate(rows).astype(np.float64)
        stats[name] = {
            "min": values.min(0).tolist(),
            "max": values.max(0).tolist(),
            "mean": values.mean(0).tolist(),
            "std": values.std(0).tolist(),
        }
    (meta / "stats.json").write_text(json.dumps(stats))
    write_lines(meta / "episodes.jsonl", episodes)
    tasks = [{"task_index": i, "task": text} for i, text in enumerate(INSTRUCTIONS[:4])]
    write_lines(meta / "tasks.jsonl", tasks)
    info = {
        "codebase_version": "v2.0",
        "fps": 5,
        "chunks_size": 1000,
        "total_episodes": len(INSTRUCTIONS),
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "features": {
            "observation.state": {"dtype": "float32", "shape": [8]},
            "action": {"dtype": "float32", "shape": [7]},
            CAMERA: {"dtype": "image", "shape": [56, 56, 3]},
        },
    }
    (meta / "info.json").write_text(json.dumps(info))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(image, question, answer, system=None):
    messages = [
        {"role": "user", "content": "<image>" + question},
        {"role": "assistant", "content": answer},
    ]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return {"images": [image], "messages": messages}


def write_questions(folder):
    """The ten files of the paper's mixture, with the pictures that public instruction sets hold."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    Image.new("RGB", (2400, 1600), "green").save(folder / "large.png")  # 3.84 megapixels
    Image.fromarray(rng.integers(0, 255, (60, 80), np.uint8)).save(folder / "gray.jpg")
    Image.new("CMYK", (80, 60), (0, 200, 200, 0)).save(folder / "print.jpg")
    pictures = ["large.png", "gray.jpg", "print.jpg"]
    questions, thoughts = [], []
    for i in range(12):
        system = "You see well." if i % 2 else None
        questions.append(row(pictures[i % 3], f"What is {i}?", f"It is {i}.", system))
        answer = "<think>I look.</think><answer>left</answer>"
        thoughts.append(row(pictures[i % 3], "Where?", answer))
    for item in sft.PAPER_MIXTURE.split(","):
        path = Path(item.strip().partition("#")[0])
        if path.suffix == ".jsonl":
            write_lines(folder / path.name, thoughts if path.stem == "reasoning" else questions)


def recipe():
    """The commands of the README's section, one a line, without torchrun."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("\n## The paper's recipe\n")[1].split("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    lines = block.replace("\\\n", " ").splitlines()
    lines = [line.split("#  ")[0].strip() for line in lines]
    return [re.sub(r"torchrun --nproc_per_node \d+", "python", line) for line in lines if line]


def test_the_readmes_recipe_runs_on_public_layouts(tmp_path):
    write_bridge(tmp_path / "bridge")
    write_questions(tmp_path / "data/paper")
    demonstrations = tmp_path / "LIBERO_DATASETS"
    demonstrations.mkdir()
    for name in ("first_demo.hdf5", "second_demo.hdf5"):
        test_libero.write(demonstrations / name, demos=3, steps=20)
    commands = recipe()
    files_run = []
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "python", command
        if words[1].endswith(".py"):
            files_run.append(words[1])
            words += shlex.split(TOY[words[1]])
            words[1] = str(ROOT / words[1])
        process = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
            check=False,
        )
        assert process.returncode == 0, (
            f"{command}\n{process.stdout[-2000:]}{process.stderr[-2000:]}"
        )
    assert files_run == ["fast_tokenizer.py", "sft.py", "grpo.py", "vla.py"]
    assert len(commands) == 6, "and the two converters"
    for stage in ("sft", "grpo", "vla"):
        run = json.loads((tmp_path / f"runs/{stage}-paper/final/run.json").read_text())
        assert run["stage"] == stage and run["config"]["preset"] == "paper"


def python_path():
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
