"""FAST action tokenizer (arXiv 2501.09747): action chunks <-> short lists of token ids. And what
all stages read: episodes on disk and the question that asks for their actions, normalisation, the
command line of a stage. Free of torch.

In: episodes (folder/*.safetensors: image (T, H, W, 3) uint8, state (T, S), action (T, A) float32).
Out: fast.json, one file that holds all that decoding needs, and report.json beside it.
1. normalise each action dimension: its 1% / 99% quantiles -> -1 / +1 (of one that hardly moves its
   least and largest value); outliers go beyond, to at most -3 / +3 (--clip), and are counted
2. orthonormal DCT-II along time: K actions -> K frequencies a dimension
3. quantise: round(scale * c); clipped to the range met in fitting, and counted
4. flatten (K, A) row-major, low frequencies first; one character chr(c - min_coef) a coefficient
5. byte-pair encoding over those characters: a token is a run of coefficients
Our deviations: dimensions that hardly move and outliers, as above; no byte level and no regex under
the BPE; ids that do not decode to exactly K x A coefficients are reported (ok False, NaN rows),
never zeros; horizon and dimensions are stored.

Read "FAST tokenizer" first, for numbers see the docstring of its class, then "Statistics and
normalisation". A first reader may skip the rest: episodes on disk are arrays with a header, checked
as they are read and written, and the last two sections are command lines.

python fast_tokenizer.py fit --data data/tabletop --out fast/ --horizon 5 --scale 2 --vocab-size 64
python fast_tokenizer.py report --tokenizer fast/ --data data/tabletop
Seconds on one CPU core. Legend: B batch, K chunk length, A action dims, S state dims, T steps.
"""

import argparse
import ast
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import traceback
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import itemgetter, length_hint
from pathlib import Path
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders, models, trainers
from tqdm import tqdm

# ---- Episodes on disk: reading -------------------------------------------------------------------

# A process may hold some 65,000 memory maps, and DROID has more episodes: files are opened again.
OPEN_FILES = 256


SHAPES = {  # of an episode's arrays beside its frames, float32; all but the first two are optional
    "action": "(T, A)",
    "state": "(T, S)",
    "object_position": "(T, N, 3)",
    "object_pixel": "(T, N, 2)",
    "hand_pixel": "(T, 2)",
}


IMAGE_TAGS = ("<image>", "<|image_pad|>")  # where model.encode() puts images: of no instruction


@functools.lru_cache(OPEN_FILES)
def open_arrays(path: Path, framework: str = "numpy") -> safe_open:
    """A safetensors file to read slices from ("numpy" or "pt"); the last OPEN_FILES stay open."""
    return safe_open(path, framework)


@dataclass(eq=False)
class EpisodeFile:
    """One recorded episode; frames stay on disk (memory-mapped) until they are asked for."""

    path: Path  # a file holds one episode or several
    name: str  # its own in the folder, the same each time: "episode_000003", "pack_000000_0003"
    task: str  # the instruction
    fps: float  # 0: not recorded
    source: str  # where it comes from
    action: np.ndarray  # (T, A) float32, dataset units
    state: np.ndarray  # (T, S) float32
    image_sizes: dict[str, tuple[int, int]]  # camera, "image" and any "image_<name>" -> (H, W)
    ends: dict[str, np.ndarray]  # camera with encoded frames -> where each ends in the file's blob
    first_row: int  # of the file's arrays
    # What a recorder may know beside; pixels as shares of width and height of "image".
    objects: list[str]  # N names, each its own, as instructions say them
    object_position: np.ndarray | None  # (T, N, 3) m, in the frame of the state; NaN: not there
    object_pixel: np.ndarray | None  # (T, N, 2) x, y from the top left; NaN: unknown
    hand_pixel: np.ndarray | None  # (T, 2)
    targets: list[int] | None  # T: the object that the expert is going for; -1: none
    thoughts: list[str] | None  # T: the expert's reasoning
    # How this robot holds still. None: not known.
    deltas: int | None  # the first so many dimensions of an action are movements, which 0 stops

    def __len__(self) -> int:
        return len(self.action)

    def __str__(self) -> str:
        return str(self.path.with_name(self.name))

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self.image_sizes)

    def frame(self, t: int, name: str = "image") -> np.ndarray:
        """Frame of a camera at step t (0 .. T-1): (H, W, 3) uint8. ValueError if there is none."""
        if name not in self.cameras or not 0 <= t < len(self):
            raise ValueError(
                f"{self}: no frame {t} of {name!r}; it has {len(self)} steps of "
                f"{', '.join(self.cameras)}"
            )
        on_disk = open_arrays(self.path).get_slice(name)  # (rows, H, W, 3), or (bytes,)
        row = self.first_row + t
        if name not in self.ends:
            return on_disk[row : row + 1][0]
        ends = self.ends[name]
        start = int(ends[row - 1]) if row else 0
        image = read_image(on_disk[start : int(ends[row])].tobytes(), f"{self}: step {t}, {name}")
        if image.shape[:2] != self.image_sizes[name]:
            raise ValueError(f"{self}: step {t} of {name} is {image.shape}; convert it again")
        return image


def read_episode_file(path: str | Path) -> list[EpisodeFile]:
    """Open and check the episodes of a file. ValueError naming the file, the row, the cure."""
    path = Path(path)
    open_arrays.cache_clear()  # the file may be a new one of the same name
    # 1. arrays, frames left on disk
    header, arrays, shapes = _open_episodes(path)
    for name in ("image", "state", "action"):
        if name not in shapes:
            raise ValueError(f"{path}: {name} is missing; convert or record the episode again")
    # 2. encoded frames
    image_sizes = {}
    ends = {}
    for name in sorted(set(shapes) - set(SHAPES)):
        if len(shapes[name]) == 4:
            image_sizes[name] = tuple(shapes[name][1:3])
            continue
        image_sizes[name], ends[name] = _encoded_frames(path, name, header, arrays, shapes[name])
        shapes[name] = [len(ends[name])]
    # 3. all have the same steps
    lengths = {shape[0] for shape in shapes.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"{path}: steps differ or are none ({shapes}); record it again")
    # 4. the numbers are finite
    for name in SHAPES:
        bad_rows = _bad_rows(arrays, name)
        if len(bad_rows):
            raise ValueError(
                f"{path}: {name} row {bad_rows[0]} is not finite; "
                "repair that row or delete the episode"
            )
    # 5. which rows are whose
    files = []
    end = 0
    for entry in _episode_entries(path, header, lengths.pop()):
        start = end
        end = start + entry["steps"]
        file = EpisodeFile(
            path=path,
            name=f"{path.stem}_{len(files):04d}" if "episodes" in header else path.stem,
            task=entry["task"],
            fps=float(entry.get("fps", "0")),
            source=entry.get("source", ""),
            action=arrays["action"][start:end],
            state=arrays["state"][start:end],
            image_sizes=image_sizes,
            ends=ends,
            first_row=start,
            **_known_objects(path, entry, arrays, start, end),
            deltas=_deltas(path, entry, arrays["action"].shape[1]),
        )
        files.append(file)
    return files


def _open_episodes(path):
    """-> header {key: text}, {name: array} of all but frames, {name: shape} of SHAPES and the
    cameras. Other arrays of the file are passed over."""
    arrays = {}
    shapes = {}
    try:
        with safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            for name in sorted(file.keys()):
                if name.endswith(".ends"):
                    arrays[name] = file.get_tensor(name)
                    continue
                is_camera = name == "image" or name.startswith("image_")
                if not is_camera and name not in SHAPES:
                    continue
                on_disk = file.get_slice(name)
                dtype = on_disk.get_dtype()
                shape = on_disk.get_shape()
                if not is_camera:
                    wanted = f"F32 {SHAPES[name]}"
                    fits = dtype == "F32" and _has_shape(shape, SHAPES[name])
                elif f"{name}.codec" in header:
                    wanted = "U8 (N,), as its codec says"
                    fits = dtype == "U8" and len(shape) == 1
                else:
                    wanted = "U8 (T, H, W, 3)"
                    fits = dtype == "U8" and _has_shape(shape, wanted.removeprefix("U8 "))
                    fits = fits and 0 not in shape[1:3]
                if not fits:
                    raise ValueError(
                        f"{path}: {name} is {dtype} {shape}, not {wanted}; convert it again"
                    )
                shapes[name] = shape
                if not is_camera:
                    arrays[name] = file.get_tensor(name)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path}: no such episode; give the path of a recording") from e
    except (SafetensorError, OSError) as e:
        raise ValueError(
            f"{path}: not a complete safetensors file ({e}); record it again or delete it"
        ) from e
    return header, arrays, shapes


def _has_shape(shape, wanted):
    """Is the shape [7, 4, 3] a "(T, N, 3)"? Letters stand for any size."""
    sizes = wanted.strip("()").split(", ")
    if len(shape) != len(sizes):
        return False
    return all(
        not text.isdigit() or int(text) == size for text, size in zip(sizes, shape, strict=True)
    )


def _bad_rows(arrays, name):
    """The rows of an array, if it is there, that hold what is no number. Of objects, NaN says that
    they are not there."""
    if name not in arrays:
        return []
    is_bad = ~np.isfinite(arrays[name]) if name in ("action", "state") else np.isinf(arrays[name])
    return np.flatnonzero(is_bad.any(axis=tuple(range(1, is_bad.ndim))))


def _encoded_frames(path, name, header, arrays, shape):
    """Of a camera whose frames are a blob of `shape` (N,) -> (H, W), where each frame ends (T,)."""
    ends = arrays.get(f"{name}.ends", np.empty(0))
    size = header.get(f"{name}.shape", "").split()
    ascends = ends.ndim == 1 and ends.dtype.kind == "i" and (np.diff(ends, prepend=0) > 0).all()
    fills_the_blob = ends.tolist()[-1:] == list(shape)
    is_size = len(size) == 2 and all(text.isdecimal() and int(text) > 0 for text in size)
    if not (ascends and fills_the_blob and is_size):
        raise ValueError(f"{path}: {name}.ends or {name}.shape do not fit it; convert it again")
    return (int(size[0]), int(size[1])), ends


def _episode_entries(path, header, rows):
    """Task, fps, source and steps of each episode in a file of so many rows."""
    try:
        entries = json.loads(header["episodes"]) if "episodes" in header else []
        if not entries:  # a file of one episode: the header is its own
            entries = [{**header, "steps": rows}]
        for entry in entries:
            task = entry["task"]
            steps = entry["steps"]
            if not isinstance(task, str) or type(steps) is not int or steps < 1:
                raise ValueError(f"task {task!r} of {steps!r} steps")
            if not isinstance(entry.get("source", ""), str):
                raise ValueError(f"source {entry['source']!r} is no text")
            task.encode()  # JSON may hold half a character: UnicodeEncodeError, a ValueError
            if any(tag in task for tag in IMAGE_TAGS):
                raise ValueError(f"the instruction {task!r} has a tag that stands for an image")
            if not 0 <= float(entry.get("fps", "0")) < np.inf:
                raise ValueError(f"fps {entry['fps']!r} is not a number")
        if sum(entry["steps"] for entry in entries) != rows:
            raise ValueError(f"its episodes have not {rows} steps")
    except KeyError as e:
        raise ValueError(f"{path}: {e} is missing; convert or record the episode again") from e
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: {e}; convert the episode again") from e
    return entries


def _deltas(path, entry, action_dim):
    """`deltas` of EpisodeFile. ValueError when it is no number of dimensions."""
    text = entry.get("deltas")
    if text is None:
        return None
    if not isinstance(text, str) or not text.isdecimal() or int(text) > action_dim:
        raise ValueError(
            f"{path}: deltas {text!r} of {action_dim} action dimensions; give 0 to {action_dim} or "
            "none, and record the episode again"
        )
    return int(text)


def _known_objects(path, entry, arrays, start, end):
    """What the recorder knew of objects in the episode `entry`, rows start .. end of the file: the
    fields of EpisodeFile that it fills. ValueError when lists and arrays do not fit together."""
    known = {"objects": [], "targets": None, "thoughts": None}
    # 1. lists: names; what belongs to each of T steps
    for key, kind, length in (
        ("objects", str, None),
        ("targets", int, end - start),
        ("thoughts", str, end - start),
    ):
        if key not in entry:
            continue
        try:
            values = json.loads(entry[key])
        except (json.JSONDecodeError, TypeError) as e:
            raise ValueError(f"{path}: {key} is no JSON ({e}); record the episode again") from e
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError(
                f"{path}: {key} is no JSON list of {kind.__name__}; record the episode again"
            )
        if length is not None and len(values) != length:
            raise ValueError(
                f"{path}: {len(values)} {key} of {length} steps; record the episode again"
            )
        known[key] = values
    names = known["objects"]
    if len(set(names)) != len(names) or not all(name.strip() for name in names):
        raise ValueError(f"{path}: objects {names}: each needs a name of its own; name them anew")
    for t, target in enumerate(known["targets"] or []):
        if not -1 <= target < len(names):
            raise ValueError(
                f"{path}: targets: {target} in step {t} is none of {len(names)} objects, nor -1; "
                "record the episode again"
            )
    # 2. arrays
    for name in ("object_position", "object_pixel", "hand_pixel"):
        known[name] = arrays[name][start:end] if name in arrays else None
        if name in arrays and name != "hand_pixel" and arrays[name].shape[1] != len(names):
            raise ValueError(
                f"{path}: {name} holds {arrays[name].shape[1]} objects, the header names "
                f"{len(names)}; record the episode again"
            )
    return known


def _episode_folder(folder):
    """folder/episodes where there is one, else folder itself."""
    folder = Path(folder)
    return folder / "episodes" if (folder / "episodes").is_dir() else folder


def read_episodes(
    folder: str | Path, max_episodes: int = 0, action_tokenizer: "FastTokenizer | None" = None
) -> list[EpisodeFile]:
    """The first `max_episodes` (0: all) of folder or folder/episodes, in the order of their names.

    FileNotFoundError when there are none; ValueError when A, S or deltas differ between files, or
    A from that of `action_tokenizer`."""
    files = []
    for path in sorted(_episode_folder(folder).glob("*.safetensors")):
        files += read_episode_file(path)
        if max_episodes and len(files) >= max_episodes:
            files = files[:max_episodes]
            break
    if not files:
        raise FileNotFoundError(f"{folder}: no episode_*.safetensors here; record or convert some")
    first = None
    for file in files:
        first = _check_same_robot(first, _robot_of(file))
    action_dim = files[0].action.shape[1]
    if action_tokenizer is not None and action_dim != action_tokenizer.action_dim:
        raise ValueError(
            f"{folder}: actions have {action_dim} dimensions, the action "
            f"tokenizer {action_tokenizer.action_dim}; give the episodes of its robot"
        )
    return files


class _Robot(NamedTuple):
    """What all episodes of a folder have in common, and which episode says so."""

    episode: str
    action: int  # dimensions
    state: int
    deltas: int | None  # as of EpisodeFile


def _robot_of(file):
    return _Robot(str(file.path), file.action.shape[1], file.state.shape[1], file.deltas)


def _check_same_robot(first, other):
    """ValueError when they differ. -> what the next one is compared with: the first that says its
    `deltas`, and of several that do not, or where `first` is None, the first of all."""
    if first is None:
        return other
    for name in ("action", "state"):
        dims = getattr(other, name)
        first_dims = getattr(first, name)
        if dims != first_dims:
            raise ValueError(
                f"{other.episode}: {dims} {name} dimensions, {first.episode} has {first_dims}; "
                "keep different robots in different folders"
            )
    known = other.deltas is not None and first.deltas is not None
    if known and other.deltas != first.deltas:
        raise ValueError(
            f"{other.episode}: deltas {other.deltas}, {first.episode} has {first.deltas}; "
            "keep different robots in different folders"
        )
    return first if first.deltas is not None or other.deltas is None else other


def action_question(instruction: str) -> str:
    """What an instruction is asked by. Rows on disk with a thought before an action hold it too."""
    # fork point: the prompt format, with model.ask()
    return f"Instruction: {instruction}\nWhat should the robot do next?"


def require_instructions(files: list[EpisodeFile]) -> None:
    """ValueError naming the first episode whose instruction is blank."""
    for file in files:
        if not file.task.strip():
            raise ValueError(f"{file}: its instruction is blank; write one, or delete the episode")


def locate_step(files: list[EpisodeFile], ends: np.ndarray, i: int) -> tuple[EpisodeFile, int]:
    """Step i of those that `ends` counts through all files, see chunk_ends -> (file, its step)."""
    index = int(np.searchsorted(ends, i, side="right"))
    first = int(ends[index - 1]) if index else 0
    return files[index], int(i) - first


SPLIT_SEED = 0  # one for all stages of all runs: what one holds out no other trains on


def split_episodes(
    files: list[EpisodeFile], share: float = 0.05, seed: int = SPLIT_SEED
) -> tuple[list[EpisodeFile], list[EpisodeFile]]:
    """Episodes -> (to train on, held out), each in the order of `files`.

    Held out is a share of them drawn at random, at least one: neighbours by name are often of the
    same scene. ValueError when none would be left to train on."""
    held_count = max(1, int(share * len(files) + 1e-9))
    if held_count >= len(files):
        raise ValueError(
            f"{files[0].path.parent}: {len(files)} episodes, all of them held out; record more"
        )
    shuffled = np.random.default_rng(seed).permutation(len(files))
    is_held = np.zeros(len(files), bool)
    is_held[shuffled[:held_count]] = True
    return list(compress(files, ~is_held)), list(compress(files, is_held))


def episodes_sha256(files: Sequence[EpisodeFile]) -> str:
    """SHA-256 of the names, instructions, actions, states, and thoughts and deltas (where they are
    known) of episodes, in their order."""
    content = hashlib.sha256()
    for file in files:
        content.update(f"{file.name}\n{file.task}\n".encode())
        content.update(np.ascontiguousarray(file.action))
        content.update(np.ascontiguousarray(file.state))
        if file.thoughts is not None:
            content.update(json.dumps(file.thoughts).encode())
        if file.deltas is not None:
            content.update(f"deltas {file.deltas}".encode())
    return content.hexdigest()


def split_record(files: list[EpisodeFile], held_out: list[EpisodeFile]) -> dict[str, str | int]:
    """What a stage writes into run.json of a folder's episodes and those that it held out."""
    names = "\n".join(file.name for file in held_out)
    return {
        "folder": str(files[0].path.parent),
        "episodes": len(files),
        "held_out": len(held_out),
        "sha256": hashlib.sha256(names.encode()).hexdigest(),
    }


def warn_of_other_split(earlier: list[dict], records: list[dict]) -> None:
    """One line for each folder of which an `earlier` stage held out other episodes than this one.

    Both are lists of split_record()."""
    for record in records:
        for other in earlier:
            if other["folder"] == record["folder"] and other["sha256"] != record["sha256"]:
                print(
                    f"warning: {record['folder']}: {record['held_out']} of {record['episodes']} "
                    f"episodes are held out, an earlier stage held out others ({other['held_out']} "
                    f"of {other['episodes']}): it may have trained on them",
                    file=sys.stderr,
                )


def join_splits(earlier: list[dict], records: list[dict]) -> list[dict]:
    """What run.json keeps: split_record()s of this stage's folders and of all stages before it, so
    that an evaluation knows every folder that the weights have seen."""
    return [*[other for other in earlier if other not in records], *records]


def hold_still(action: np.ndarray, deltas: int) -> np.ndarray:
    """What follows an action (..., A) while the robot holds still: the same without its movements,
    which are the first `deltas` dimensions."""
    still = action.copy()
    still[..., :deltas] = 0
    return still


def action_chunks(episode: EpisodeFile, horizon: int) -> np.ndarray:
    """The `horizon` actions from each step (T, K, A) float32.

    Past the end the robot holds still. Where nobody knows which dimensions are movements
    (`deltas`), the last action repeats."""
    if horizon < 1:
        raise ValueError(f"horizon {horizon}; a chunk has at least 1 step")
    still = hold_still(episode.action[-1:], episode.deltas or 0)  # (1, A)
    after = np.repeat(still, horizon - 1, 0)  # (K - 1, A)
    actions = np.concatenate([episode.action, after])  # (T + K - 1, A)
    steps = np.arange(len(episode))[:, None] + np.arange(horizon)  # (T, K)
    return actions[steps]  # (T, K, A)


def chunk_starts(episode: EpisodeFile, horizon: int) -> range:
    """The steps at which the chunks begin that action tokens are made of: all of them.

    Of a robot of which nobody knows how it holds still (`deltas`) those whose `horizon` actions lie
    inside the episode: a chunk that goes on past the end would repeat the last movement, and
    whoever learned from it would move on after the task is done. But no chunk begins with the
    task's last movements then. An episode that is shorter has step 0 alone."""
    if episode.deltas is not None:
        return range(len(episode))
    return range(max(1, len(episode) - horizon + 1))


def chunk_ends(files: Sequence[EpisodeFile], horizon: int) -> np.ndarray:
    """How many chunk_starts() there are up to the end of each file (files,); see locate_step."""
    return np.cumsum([len(chunk_starts(file, horizon)) for file in files])


# ---- Images --------------------------------------------------------------------------------------


def read_image(file: str | Path | bytes, source: object = None) -> np.ndarray:
    """Any image that Pillow opens, a path or the bytes of one -> (H, W, 3) uint8.

    It becomes what to_rgb() says. Damaged naming `source` (default the path) when it does not
    open."""
    with _opened_image(file, source) as opened:
        return to_rgb(opened)


def image_size(file: str | Path, source: object = None) -> tuple[int, int]:
    """(H, W) of an image by its header alone, in tens of microseconds; not turned by EXIF.
    Damaged as read_image()."""
    with _opened_image(file, source) as opened:
        return opened.height, opened.width


@contextlib.contextmanager
def _opened_image(file, source):
    """An image that is open; whatever goes wrong with it inside is Damaged."""
    source = source or file
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with Image.open(stream) as opened:
            yield opened
    except (*DAMAGE, SyntaxError, RuntimeError, Image.DecompressionBombError) as e:
        why = str(e).replace(f" {stream!r}", "").replace("\n", " ")  # an address, or the path
        raise Damaged(f"{source}: image does not open ({why}); replace or delete it") from e


def to_rgb(opened: Image.Image) -> np.ndarray:
    """An image of any mode -> (H, W, 3) uint8, turned as its EXIF tag says; 16 bits become 8, what
    is transparent becomes white. ValueError for values that are neither 8 nor 16 bits."""
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):  # one channel of 16 bits or more
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"mode {image.mode}, not 8 or 16 bits")
        # 32 bits do not say how many are meant: 0 .. 255 are 8
        is_8_bits = image.mode == "I" and values.max() <= 255
        image = Image.fromarray((values // (1 if is_8_bits else 257)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return np.asarray(image.convert("RGB"))


# ---- Statistics and normalisation ----------------------------------------------------------------

STILL = 1e-6  # a dimension whose range is below this never moves: it maps to 0 and back to q01
# A gripper that closes in 0.8% of the steps has q01 = q99, and would decode to "open" for ever. In
# BridgeV2 least and largest value lie up to 39 times as far apart as q01 and q99.
RARE = 50
LOST = 0.005  # share of actions beyond the clip from which on a dimension is named

Array = TypeVar("Array")  # np.ndarray or torch.Tensor


class Stats(TypedDict):
    """Statistics of N actions or states, one number a dimension; units of the dataset."""

    q01: list[float]  # 1% quantile
    q99: list[float]  # 99% quantile
    min: list[float]  # old files and published statistics may lack these two
    max: list[float]
    mean: list[float]
    std: list[float]
    count: int  # N
    deltas: int  # of actions, where known: EpisodeFile.deltas


def statistics(x: np.ndarray) -> Stats:
    """Statistics of x (N, A). ValueError when x is empty or not finite."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"statistics need a finite, non-empty (N, A) array, got shape {x.shape}")
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)  # (A,) each
    return {
        "q01": q01.tolist(),
        "q99": q99.tolist(),
        "min": x.min(0).tolist(),
        "max": x.max(0).tolist(),
        "mean": x.mean(0).tolist(),
        "std": x.std(0).tolist(),
        "count": len(x),
    }


def value_range(stats: Stats) -> tuple[np.ndarray, np.ndarray]:
    """The values (A,) that are -1 and +1 when normalised: q01 and q99, but least and largest value
    of a dimension that moves so rarely that its quantiles say nothing of it."""
    low = np.array(stats["q01"], np.float64)
    high = np.array(stats["q99"], np.float64)
    rare = rare_dimensions(stats)
    low[rare] = np.asarray(stats.get("min", low))[rare]
    high[rare] = np.asarray(stats.get("max", high))[rare]
    return low, high


def rare_dimensions(stats: Stats) -> list[int]:
    """Those whose least and largest value lie over RARE times as far apart as q01 and q99."""
    if "min" not in stats or "max" not in stats:
        return []
    reach = np.subtract(stats["max"], stats["min"])
    quantile_reach = np.subtract(stats["q99"], stats["q01"])
    return np.flatnonzero((reach >= STILL) & (reach > RARE * quantile_reach)).tolist()


def rare_lines(stats: Stats, name: str) -> list[str]:
    """A line for each of the rare_dimensions() of `name`, "action" or "state"."""
    lines = []
    for i in rare_dimensions(stats):
        q01, q99, low, high = (stats[key][i] for key in ("q01", "q99", "min", "max"))
        lines.append(
            f"{name} dimension {i} hardly moves (q01 {q01:g}, q99 {q99:g}) and then reaches "
            f"{low:g} .. {high:g}: normalised by least and largest value; if these are faults of "
            "the recorder, repair them: nearly nothing is left of -1 .. 1 for the other steps"
        )
    return lines


def clipped_lines(tokenizer: "FastTokenizer", shares: Sequence[float]) -> list[str]:
    """A line for each dimension of which more than LOST of the actions lie beyond the clip: a
    gripper whose open state trembles is not rare by RARE, and would decode to "open" for ever."""
    lines = []
    for i, clipped_share in enumerate(shares):
        if clipped_share > LOST:
            lines.append(
                f"action dimension {i}: {clipped_share:.2%} of the actions lie beyond the clip "
                f"({tokenizer.clip:g} times q01 .. q99) and are lost; where they are no faults of "
                "the recorder, raise --clip"
            )
    return lines


def normalize(x: Array, stats: Stats) -> Array:
    """x (..., A) in dataset units -> value_range(stats) at -1 and +1, not clipped. numpy, torch."""
    x = _floating(x)
    line = _line(x, stats)
    return (x - line.low) * line.gain - line.one


def unnormalize(x: Array, stats: Stats) -> Array:
    """Inverse of normalize: x (..., A) -> dataset units; dimensions that never move give q01."""
    x = _floating(x)
    line = _line(x, stats)
    return (x + line.one) * line.half_width + line.low


class _Line(NamedTuple):
    """The straight line between dataset units and -1 .. 1, each (A,), in the type of the data."""

    low: Array  # what is -1
    half_width: Array  # half of what lies between -1 and +1; 0 where nothing moves
    gain: Array  # 1 / half_width; 0 where nothing moves
    one: Array  # 1; 0 where nothing moves, so that low is 0 there


def _line(x, stats):
    low, high = value_range(stats)
    moves = high - low >= STILL  # (A,)
    half_width = np.where(moves, (high - low) / 2, 0.0)
    gain = np.divide(1, half_width, out=np.zeros_like(half_width), where=moves)
    columns = (low, half_width, gain, moves.astype(np.float64))
    if hasattr(x, "new_tensor"):  # torch: the type and the device of x
        return _Line(*[x.new_tensor(column) for column in columns])
    return _Line(*[column.astype(x.dtype) for column in columns])


def _floating(x):
    """Torch tensors and float arrays as they are; whole numbers and lists as float64."""
    if hasattr(x, "new_tensor"):
        return x
    x = np.asarray(x)
    return x if x.dtype.kind == "f" else x.astype(np.float64)


def check_stats(stats: Stats, dims: int, source: str | Path = "stats") -> Stats:
    """A copy of stats as plain lists. ValueError naming `source` unless it fits so many dims."""
    if not isinstance(stats, dict) or not {"q01", "q99"} <= set(stats):
        raise ValueError(f"{source}: no q01 and q99; make it with fast_tokenizer.statistics")
    try:
        stats = {name: np.asarray(value).tolist() for name, value in stats.items()}
    except ValueError as e:  # lists of unequal length
        raise ValueError(f"{source}: no statistics ({e}); recompute the statistics") from e
    for name in ("mean", "q01", "q99", "min", "max", "std"):
        if name not in stats:  # all but the quantiles may be missing
            continue
        if np.shape(stats[name]) != (dims,) or not np.isfinite(stats[name]).all():
            raise ValueError(
                f"{source}: {name} is not {dims} finite numbers; recompute the statistics"
            )
    if not isinstance(stats.get("count", 0), int | float | None):
        raise ValueError(
            f"{source}: count is {stats['count']}, no number; recompute the statistics"
        )
    deltas = stats.get("deltas", 0)
    if type(deltas) is not int or not 0 <= deltas <= dims:
        raise ValueError(f"{source}: deltas is {deltas!r}; give 0 to {dims}, or leave it out")
    for low, high in (("q01", "q99"), ("min", "max")):
        if low in stats and high in stats and (np.asarray(stats[high]) < stats[low]).any():
            raise ValueError(f"{source}: {high} lies below {low}; recompute the statistics")
    return stats


def read_stats(folder: str | Path, files: list[EpisodeFile]) -> dict[str, Stats]:
    """{"action", "state"} -> statistics: stats.json beside the episodes, else made from files.

    ValueError when it counts other steps than the folder has. Least and largest value and deltas,
    which old ones lack, are those of files."""
    path = _episode_folder(folder) / "stats.json"
    computed = _statistics_of(files)
    if not path.exists():
        return computed
    stats = {}
    try:
        stored = json.loads(path.read_text())
        for name, of_files in computed.items():
            lacking = {key: of_files[key] for key in ("min", "max", "deltas") if key in of_files}
            complete = lacking | stored[name]
            stats[name] = check_stats(complete, len(of_files["q01"]), f"{path}: {name}")
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: no statistics ({e!r}); delete it to have them computed") from e
    counts = {name: stats[name].get("count") for name in stats}
    if set(counts.values()) - {None, computed["action"]["count"]}:
        steps = sum(len(file) for file in read_episodes(folder))  # files may be the first of many
        if set(counts.values()) - {None, steps}:
            raise ValueError(
                f"{path} counts {counts} steps, the episodes there have {steps}; delete it to have "
                "the statistics computed"
            )
    return stats


def _statistics_of(files):
    stats = {}
    for name in ("action", "state"):
        stats[name] = statistics(np.concatenate([getattr(file, name) for file in files]))
    deltas = {file.deltas for file in files}
    if len(deltas) == 1 and deltas != {None}:
        stats["action"]["deltas"] = deltas.pop()
    return stats


# ---- Episodes on disk: writing -------------------------------------------------------------------

# What a converter yields for an episode: its arrays ("action" (T, A), "state" (T, S), "image" and
# any "image_<name>" (T, H, W, 3) uint8 or what encode_frames() makes of it; the others of SHAPES
# where it knows them), and its header ("task", "fps", "source", and what encode_frames() adds, all
# text; where it knows them "deltas", and "objects", "targets" and "thoughts" as JSON: EpisodeFile).
Recording = tuple[dict[str, np.ndarray], dict[str, str]]

CODECS = {  # codec -> how Pillow writes it
    "jpeg 95": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "png": {"format": "PNG", "compress_level": 1},  # loses nothing; 6: a third of the speed, -8%
}


def encode_frames(
    frames: np.ndarray, name: str, codec: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Frames (T, H, W, 3) uint8 of camera `name` -> what takes their place in a recording: arrays
    {name: all files in a row (N,) uint8, name.ends: where each ends (T,) int64}, and its header."""
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r}; choose among {', '.join(CODECS)}")
    pieces = []
    for frame in frames:
        stream = io.BytesIO()
        Image.fromarray(frame).save(stream, **CODECS[codec])
        pieces.append(stream.getvalue())
    arrays = {
        name: np.frombuffer(b"".join(pieces), np.uint8),  # (N,)
        f"{name}.ends": np.cumsum([len(piece) for piece in pieces], dtype=np.int64),  # (T,)
    }
    return arrays, {f"{name}.shape": f"{frames.shape[1]} {frames.shape[2]}", f"{name}.codec": codec}


def write_episodes(
    folder: str | Path,
    recordings: Iterable[Recording | None],
    episodes_per_file: int = 1,
    resume: bool = False,
) -> None:
    """Write recordings, as they come, into the new folder `folder`, with its stats.json.

    Data that cannot be used ends the process in one line (SystemExit) and leaves nothing behind.
    With resume, complete files stay in unfinished_folder(folder) whatever ends the process, and the
    next call goes on there: it passes over as many recordings as unfinished_episodes(folder) has.
    A converter need not read those again: it may yield None for each."""
    folder = Path(folder)
    if not folder.name:
        raise SystemExit(f"error: {folder} is no folder to write; name a new one, as data/mine")
    unfinished = unfinished_folder(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"error: {folder} already holds data; name another --out or delete it")
    with _only_writer(unfinished, resume):
        # 1. what a run that was stopped has written
        for partial in unfinished.glob("*.tmp"):
            partial.unlink()
        written = unfinished_episodes(folder)
        kind = "episode" if episodes_per_file == 1 else "pack"
        if any(not file.name.startswith(kind) for file in written):
            raise ValueError(f"{unfinished}: begun with other episodes a file; ask for as many")
        file_count = len({file.path for file in written})
        # 2. a file at a time
        total = length_hint(recordings) or None
        bar = tqdm(_located(recordings), "episodes", total, disable=None)
        missing = _missing_recordings(bar, list(written))
        for group in _groups(missing, episodes_per_file):
            files = _write_file(unfinished, f"{kind}_{file_count:06d}", group)
            written += files
            file_count += 1
        if not written:
            raise ValueError(f"no episodes for {folder}; give a folder with some as --data")
        # 3. statistics of all
        stats = _statistics_of(written)
        (unfinished / "stats.json").write_text(json.dumps(stats, indent=1))
        unfinished.replace(folder.resolve())
    for name in stats:
        for line in rare_lines(stats[name], name):
            print(f"{folder}: {line}")
    print(f"{folder}: {len(written)} episodes of {stats['action']['count']} steps")


def unfinished_folder(folder: str | Path) -> Path:
    """The folder beside `folder` that takes its name when all is written. Of a link: beside what it
    leads to, perhaps a larger disk, since a folder takes the place of a folder alone."""
    folder = Path(folder)
    if folder.is_symlink():
        folder = folder.resolve()
    return folder.with_name(folder.name + ".part")


def unfinished_episodes(folder: str | Path) -> list[EpisodeFile]:
    """The episodes that a write_episodes(folder, ..., resume=True) wrote before it was stopped."""
    paths = sorted(unfinished_folder(folder).glob("*.safetensors"))
    return [file for path in paths for file in read_episode_file(path)]


@contextlib.contextmanager
def _only_writer(unfinished, resume):
    """Makes and locks the folder. Bad data inside ends the process in a line; what was written is
    kept for the next run with resume, else deleted."""
    try:
        unfinished.mkdir(parents=True, exist_ok=resume)
        lock = os.open(unfinished, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise SystemExit(
            f"error: {unfinished}: {e.strerror}; another command writes there, or delete it"
        ) from e
    try:
        yield
    except ValueError as e:
        kept = f" (what was written stays in {unfinished})" if resume else ""
        raise SystemExit(f"error: {e}{kept}") from e
    finally:
        if not resume:
            shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)


def _located(recordings):
    """The same recordings. What numpy says of a fault in the code that makes them, or Python, names
    no recording: a ValueError that is not Damaged gets the one before it, and a line of that code.
    """
    count = 0
    recording = None
    try:
        for recording in recordings:
            yield recording
            count += 1
    except Damaged:
        raise
    except ValueError as e:
        when = f"after recording {count - 1}" if count else "before recording 0"
        if recording is not None:  # else it was written before
            when = f"after {_recording_name(count - 1, recording[1])}"
        calls = traceback.extract_tb(e.__traceback__)[1:]  # the first is here
        theirs = [call for call in calls if call.filename == calls[0].filename]  # not numpy's
        if theirs:
            when += f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})"
        why = str(e).replace("\n", " ")
        raise ValueError(f"{when}: {why}") from e


def _recording_name(number, header):
    source = str(header.get("source", "without source"))
    source = source.encode(errors="backslashreplace").decode()  # a path may be any bytes
    return f"recording {number}, {source}"


def _missing_recordings(recordings, written):
    """Passes over the first recordings, which are `written`. ValueError if they are other ones."""
    passed = 0
    first = None
    for file in written:
        first = _check_same_robot(first, _robot_of(file))
    for number, recording in enumerate(recordings):
        if passed == len(written):
            if recording is None:
                raise ValueError("None comes in place of a recording that is not written yet")
            arrays, header = _checked_recording(number, recording)
            # before it is on disk, where --resume would keep it
            source = _recording_name(number, header)
            deltas = _deltas(source, header, arrays["action"].shape[1])
            robot = _Robot(source, arrays["action"].shape[1], arrays["state"].shape[1], deltas)
            first = _check_same_robot(first, robot)
            yield arrays, header
            continue
        file = written[passed]
        passed += 1
        if recording is None:
            continue
        arrays, header = recording
        steps = len(arrays["action"])
        given = (header["task"], header.get("source", ""), steps, header.get("deltas"))
        deltas = None if file.deltas is None else str(file.deltas)
        had = (file.task, file.source, len(file), deltas)
        if given != had:
            raise ValueError(
                f"{file} was written from {had}, now {given} comes in its place; delete "
                f"{file.path.parent} to begin again"
            )
    if passed < len(written):
        raise ValueError(
            f"{written[0].path.parent} has {len(written)} episodes, now only {passed} recordings "
            "come; delete it to begin again"
        )


def _groups(recordings, size):
    """Yields lists of at most `size` recordings that one file can hold."""
    group = []
    for recording in recordings:
        if group and _layout(*recording) != _layout(*group[0]):
            yield group
            group = []
        group.append(recording)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _checked_recording(number, recording):
    """A recording, numbers as float32. ValueError naming its number among those that come, its
    source, and the step or the array that is wrong."""
    is_pair = isinstance(recording, tuple | list) and len(recording) == 2
    if not is_pair or not all(isinstance(part, dict) for part in recording):
        raise ValueError(f"recording {number} is no pair of dicts; yield (arrays, header)")
    arrays, header = recording
    source = _recording_name(number, header)
    try:
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
    except ValueError as e:  # frames of unequal size
        raise ValueError(f"{source}: {e}; give arrays whose steps have one shape") from e
    for key, text in header.items():
        if not isinstance(text, str):
            raise ValueError(f"{source}: {key} is {text!r}; give it as text")
        try:
            text.encode()
        except UnicodeEncodeError as e:  # JSON may hold half of an emoji, a path any byte
            what = "the instruction" if key == "task" else key
            raise ValueError(
                f"{source}: half a character in {what} {text!r}; write the whole one, or delete it"
            ) from e
    for name, shape in SHAPES.items():
        if name not in arrays and name not in ("action", "state"):
            continue
        numbers = arrays.get(name)
        is_empty = name == "action" and np.shape(numbers)[1:] == (0,)
        if is_empty or not _has_shape(np.shape(numbers), shape):
            raise ValueError(f"{source}: {name} is no array {shape}; give a row of numbers a step")
        try:
            with np.errstate(over="ignore"):  # infinity, which is no number either
                arrays[name] = np.asarray(numbers).astype(np.float32)
        except (ValueError, TypeError) as e:
            raise ValueError(f"{source}: {name}: {e}; give numbers") from e
        bad_rows = _bad_rows(arrays, name)
        if len(bad_rows):
            raise ValueError(
                f"{source}: {name} of step {bad_rows[0]} is not finite; "
                "repair it or copy the dataset again"
            )
    _check_other_arrays(source, arrays, header)
    lengths = {}
    for name, array in arrays.items():
        if f"{name}.ends" not in arrays:  # else a blob, whose steps are its ends
            lengths[name] = len(array)
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{source}: steps differ ({lengths}); copy the dataset again")
    # what is said of it, as the file will be read: in a pack nobody would know of which recording
    _episode_entries(source, header, len(arrays["action"]))
    _deltas(source, header, arrays["action"].shape[1])
    _known_objects(source, header, arrays, 0, len(arrays["action"]))
    return arrays, header


def _check_other_arrays(source, arrays, header):
    """Of a recording, all arrays but SHAPES. ValueError unless cameras are frames, what looks like
    frames is called a camera, and the rest can be written."""
    if "image" not in arrays:
        raise ValueError(f"{source}: image is missing; call the frames of the first camera so")
    for name, array in arrays.items():
        is_camera = name == "image" or name.startswith("image_")
        is_camera = is_camera and not name.endswith(".ends")
        if is_camera and f"{name}.codec" not in header:
            if array.dtype != np.uint8 or not _has_shape(array.shape, "(T, H, W, 3)"):
                raise ValueError(
                    f"{source}: {name} is {array.dtype} {array.shape}, not uint8 (T, H, W, 3); "
                    "give colours of 0 to 255, the channels last"
                )
            if 0 in array.shape[1:3]:
                raise ValueError(
                    f"{source}: {name} {array.shape} has frames without a pixel; give whole ones"
                )
        elif array.ndim == 0 or array.dtype.kind not in "biuf":
            raise ValueError(
                f"{source}: {name} is {array.dtype} {array.shape}, no array of numbers; "
                "leave it out"
            )
        elif not is_camera and name not in SHAPES and _has_shape(array.shape, "(T, H, W, 3)"):
            raise ValueError(
                f"{source}: {name} {array.shape} looks like frames, which no stage would find; "
                f"call it image_{name}, or leave it out"
            )


def _layout(arrays, header):
    """What recordings of one file have in common: arrays that can be joined, and their codecs."""
    shapes = {name: array.shape[1:] for name, array in arrays.items()}
    codecs = {key: text for key, text in header.items() if "." in key}
    return shapes, codecs


def _write_file(folder, name, recordings):
    """Writes recordings of one layout as folder/name.safetensors, complete or not at all; several
    are joined, and what is said of each stands in the header's list "episodes". -> its episodes."""
    # 1. one set of arrays, one header
    arrays, header = recordings[0]
    if name.startswith("pack"):
        joined = {key: [] for key in arrays}
        entries = []
        blob_ends = dict.fromkeys(arrays, 0)
        for one_arrays, one_header in recordings:
            for key, array in one_arrays.items():
                joined[key].append(array + blob_ends[key] if key.endswith(".ends") else array)
                if key.endswith(".ends"):
                    blob_ends[key] += array[-1]
            entry = {key: text for key, text in one_header.items() if "." not in key}
            entries.append(entry | {"steps": len(one_arrays["action"])})
        arrays = {key: np.concatenate(pieces) for key, pieces in joined.items()}
        codecs = {key: text for key, text in header.items() if "." in key}
        header = codecs | {"episodes": json.dumps(entries, ensure_ascii=False)}
    # 2. the file takes its name when it is complete and can be read
    path = folder / f"{name}.safetensors"
    partial = path.with_suffix(".tmp")
    partial.write_bytes(_safetensors(arrays, header))
    try:
        files = read_episode_file(partial)
    except ValueError as e:
        raise ValueError(f"{recordings[0][1].get('source', '')}: {e}") from e
    partial.replace(path)
    for file in files:
        file.path = path
    return files


def _safetensors(arrays, header):
    """The bytes of a file, the header's keys sorted: the library leaves them in random order, and
    the same episode should be the same file. It writes memory as it lies, and views such as
    frames[:, ::-1] or rows.T lie in another order than they read."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data = save(arrays, header)  # 8 bytes: length of the JSON; the JSON; the arrays
    arrays_start = 8 + int.from_bytes(data[:8], "little")
    record = json.loads(data[8:arrays_start])
    record["__metadata__"] = dict(sorted(header.items()))
    text = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(arrays_start - 8) + data[arrays_start:]


class Damaged(ValueError):
    """One line about data, or flags, that cannot be used: where, what is wrong, the cure."""


DAMAGE = (  # what readers of files raise when a file is not what it should be
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    ArithmeticError,
    NotImplementedError,
    OSError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


@contextlib.contextmanager
def reading(source: object, *more_errors: type[Exception]) -> Iterator[None]:
    """`with reading(path): ...`: an error inside becomes Damaged, in one line that names the path.

    more_errors: kinds of errors beside DAMAGE, as those of a library that reads videos."""
    try:
        yield
    except Damaged:
        raise
    except (*DAMAGE, *more_errors) as e:
        kind = "" if type(e) is ValueError else f"{type(e).__name__}: "
        why = str(e).replace("\n", " ")
        raise Damaged(f"{source}: {kind}{why}; repair it or copy the dataset again") from e


# ---- FAST tokenizer ------------------------------------------------------------------------------

BROKEN = "\ufffd"  # what bytes that are no UTF-8 decode as; no coefficient is written so
CLIP = 3.0  # normalised actions beyond -3 .. 3 cost ids that hardly occur, see docs/data.md
LAST_CODE = 0xD7FF  # the largest character code below the surrogates, which no text can hold


# fork point: action tokenizer
class FastTokenizer:
    """FAST: (B, K, A) action chunks <-> token ids 0 .. vocab_size - 1 (arXiv 2501.09747).

    One chunk of K = 4 steps and A = 2 dimensions, a slide to the right with an open gripper:

              x  gripper                  x  gripper                  x  gripper
        t 0  -0.5   1         frequency 0   0.00   2                   0   4
        t 1  -0.4   1    DCT            1  -0.95   0     round(2 c)   -2   0
        t 2   0.2   1    --->           2   0.20   0     --------->    0   0
        t 3   0.7   1                   3   0.07   0                   0   0

    Read row by row that is 0 4 -2 0 0 0 0 0. A movement is smooth, so what follows the first rows
    is mostly zeros, and BPE finds a token for five of them:

    >>> slide = np.array([[-0.5, 1], [-0.4, 1], [0.2, 1], [0.7, 1]])  # (K, A)
    >>> quantize(slide[None], scale=2).astype(int).tolist()
    [[[0, 4], [-2, 0], [0, 0], [0, 0]]]
    >>> chunks = np.stack([slide, slide, -slide, -slide])  # (B, K, A): what it is fitted to
    >>> tokenizer = FastTokenizer.fit(chunks, vocab_size=12, scale=2)
    >>> tokenizer.min_coef, tokenizer.max_coef  # 9 coefficients have the ids 0 .. 8; 9 .. 11: runs
    (-4, 4)
    >>> tokenizer.encode(slide[None])  # 0 is id 4, 4 is id 8, -2 is id 2, five zeros are id 11
    [[4, 8, 2, 11]]
    >>> chunk, ok = tokenizer.decode([[4, 8, 2, 11]])  # a finer scale comes closer
    >>> chunk[0].astype(float).round(2).tolist()
    [[-0.65, 1.0], [-0.27, 1.0], [0.27, 1.0], [0.65, 1.0]]
    >>> chunk, ok = tokenizer.decode([[4, 8, 2]])  # 3 coefficients are no chunk
    >>> ok.tolist(), bool(np.isnan(chunk).all())
    ([False], True)

    vocab_size: the true number of ids, at most what fit was asked for. min_coef .. max_coef: range
    of the quantised coefficients. stats: statistics of the dataset units, None when chunks come
    normalised to about [-1, 1]. clip: normalised actions go to at most -clip and +clip; None as far
    as they may. pieces: id -> its characters as UTF-8 bytes. Of the last encode, how many it had to
    move: clipped_actions (A,) of each dimension, clipped coefficients."""

    def __init__(
        self,
        bpe: Tokenizer,
        scale: float,
        horizon: int,
        action_dim: int,
        min_coef: int,
        max_coef: int,
        stats: Stats | None = None,
        clip: float | None = None,
    ):
        self.bpe = bpe
        self.scale = float(scale)
        self.horizon = int(horizon)
        self.action_dim = int(action_dim)
        self.min_coef = int(min_coef)
        self.stats = stats
        self.clip = clip
        self.clipped_actions = np.zeros(self.action_dim, int)
        self.clipped = 0

        # 1. what each id spells
        vocabulary = bpe.get_vocab()  # {token: id}
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        # The published vocabulary is spelled in bytes; one token may hold a part of a character.
        self.byte_level = isinstance(bpe.decoder, decoders.ByteLevel)
        self.pieces = {i: _piece_bytes(token, self.byte_level) for token, i in vocabulary.items()}
        self._texts = self._text_of_each_id()

        # 2. which coefficients it can write. A published vocabulary may lack bytes and then drops
        # characters silently: encode goes to the nearest coefficient that can be written instead.
        # Our own vocabulary can write the whole range.
        codes = _writable_codes(vocabulary, int(max_coef - min_coef), self.byte_level)
        if not codes:
            raise ValueError("the BPE vocabulary can write no coefficient; fit the tokenizer again")
        self.max_coef = codes[-1] + self.min_coef
        self._nearest_code = _nearest_writable(codes)

    @property
    def max_ids(self) -> int:
        """No chunk takes more ids: one a coefficient, but one a byte in a published vocabulary."""
        largest = chr(self.max_coef - self.min_coef)
        ids_each = len(largest.encode()) if self.byte_level else 1
        return self.horizon * self.action_dim * ids_each

    def _text_of_each_id(self):
        """{id: what it spells}, and -1, which stands for all ids out of range: BROKEN.

        Byte level: a token may end inside a character, so a text has one Latin-1 character a byte,
        and _spell() puts the bytes together."""
        texts = dict.fromkeys(range(-1, self.vocab_size), BROKEN)
        for i, piece in self.pieces.items():
            texts[i] = piece.decode("latin-1" if self.byte_level else "utf-8")
        return texts

    @classmethod
    def fit(
        cls,
        chunks: np.ndarray,
        vocab_size: int,
        scale: float,
        stats: Stats | None = None,
        clip: float | None = CLIP,
    ) -> "FastTokenizer":
        """Learn range and merges from chunks (B, K, A): dataset units with stats, else normalised.

        scale: quantisation steps a unit (10 in the paper); more is finer and longer. The same
        chunks give the same file. ValueError on NaN, wrong shapes, or vocab_size < alphabet."""
        # 1. coefficients, and the range of them
        chunks = _check_chunks(chunks)
        if len(chunks) == 0 or not (np.isfinite(scale) and scale > 0):
            raise ValueError(f"fit got {len(chunks)} chunks, scale {scale}; both must be positive")
        _, horizon, action_dim = chunks.shape
        if stats is not None:
            stats = check_stats(stats, action_dim)
            chunks = normalize(chunks, stats)
        if clip is not None:
            chunks = np.clip(chunks, -clip, clip)
        coefs = quantize(chunks, float(scale))  # (B, K, A)
        low = coefs.min()
        high = coefs.max()
        if not high - low + 1 <= min(vocab_size, LAST_CODE + 1):
            raise ValueError(
                f"vocab_size {vocab_size} is smaller than the alphabet of {high - low + 1:.0f} "
                f"coefficients ({low:.0f} .. {high:.0f}); raise --vocab-size or lower --scale"
            )
        # 2. merges. All characters of the range get an id, also those that were not met. There is
        # no pre-tokenizer, so that a token may span steps and dimensions.
        bpe = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=int(vocab_size),
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=[chr(code) for code in range(int(high - low) + 1)],
        )
        bpe.train_from_iterator(_codes_to_texts(coefs - low), trainer)
        return cls(bpe, scale, horizon, action_dim, low, high, stats, clip)

    def encode(self, chunks: np.ndarray) -> list[list[int]]:
        """chunks (B, K, A) -> B lists of ids. Sets .clipped_actions and .clipped. ValueError on NaN
        or another shape."""
        chunks = _check_chunks(chunks, self.horizon, self.action_dim)
        if self.stats is not None:
            chunks = normalize(chunks, self.stats)
        if self.clip is not None:
            self.clipped_actions = (np.abs(chunks) > self.clip).sum((0, 1))  # (A,)
            chunks = np.clip(chunks, -self.clip, self.clip)
        coefs = quantize(chunks, self.scale)  # (B, K, A)
        # both ends are clipped; the reference clips the low end only, and counts nothing
        codes = np.clip(coefs, self.min_coef, self.max_coef).astype(int) - self.min_coef
        codes = self._nearest_code[codes]
        self.clipped = int((codes + self.min_coef != coefs).sum())
        # _fast: without the place of each token in the text, which nobody asks for
        return [encoding.ids for encoding in self.bpe.encode_batch_fast(_codes_to_texts(codes))]

    def decode(
        self, ids: Sequence[Sequence[int]], partial: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """B lists of ids -> (chunks (B, K, A) float32, ok (B,) bool).

        ok is False for a sequence that is empty, holds an id out of range or gives no K x A
        coefficients (byte level: or no valid text); its chunk is NaN. partial: coefficients that
        are missing are 0, those too many are left out."""
        # 1. ids -> texts, one character a coefficient; a chunk has K x A
        texts = self._spell(ids)
        chunk_size = self.horizon * self.action_dim
        if partial:
            zero = chr(max(0, min(0, self.max_coef) - self.min_coef))  # 0, or what is nearest to it
            texts = [text[:chunk_size].ljust(chunk_size, zero) for text in texts]
        ok = np.array([len(text) == chunk_size and BROKEN not in text for text in texts], bool)
        # 2. the texts of chunks -> coefficients -> actions
        chunks = np.full((len(ids), self.horizon, self.action_dim), np.nan, np.float32)
        if ok.any():
            codes = _texts_to_codes(compress(texts, ok))  # (ok.sum() * K * A,)
            coefs = (codes + float(self.min_coef)).reshape(-1, self.horizon, self.action_dim)
            actions = idct(coefs / self.scale, axis=1, norm="ortho", overwrite_x=True)
            chunks[ok] = actions if self.stats is None else unnormalize(actions, self.stats)
        return chunks, ok

    def _spell(self, ids):
        """B lists of ids -> the B texts they spell, with BROKEN in those that spell none. With the
        ids of the class's example, a text written as its codes:

            4 8 2 11          4 8 2 44444
            4 99              4 BROKEN        99 is no id
            (none)            ""
        """
        texts = []
        for row in ids:
            is_array = hasattr(row, "tolist")
            texts.append(self._spell_row(row.tolist() if is_array else row))
        return texts

    def _spell_row(self, row):
        if not row:
            return ""
        # 1. what each id spells. itemgetter looks all of them up at once, in two thirds of the time
        # of a loop; of several ids it gives a tuple, of one the text itself, and join takes both.
        try:
            text = "".join(itemgetter(*row)(self._texts))
        except KeyError:  # an id out of range
            known = [i if i in self._texts else -1 for i in row]  # -1 spells BROKEN
            text = "".join(itemgetter(*known)(self._texts))
        # 2. byte level: one character a byte so far, and a coefficient may have several
        if self.byte_level and BROKEN not in text:
            text = text.encode("latin-1").decode("utf-8", errors="replace")
        return text

    def save(self, folder: str | Path) -> None:
        """Write folder/fast.json, complete or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "scale": self.scale,
            "horizon": self.horizon,
            "dim": self.action_dim,
            "min_coef": self.min_coef,
            "max_coef": self.max_coef,
            "vocab_size": self.vocab_size,
            "clip": self.clip,
            "stats": self.stats,
            "bpe": json.loads(self.bpe.to_str()),
        }
        unfinished = folder / "fast.tmp"
        unfinished.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        unfinished.replace(folder / "fast.json")

    @classmethod
    def load(
        cls, folder: str | Path, horizon: int | None = None, action_dim: int | None = None
    ) -> "FastTokenizer":
        """Read our fast.json, or a folder of the published processor (physical-intelligence/fast).

        horizon, action_dim: needed for published folders that do not store them; ValueError when
        missing or not the stored ones, or on a damaged file. FileNotFoundError without either
        layout."""
        folder = Path(folder)
        is_ours = (folder / "fast.json").exists()
        path = folder / ("fast.json" if is_ours else "processor_config.json")
        try:
            record = _read_ours(path) if is_ours else _read_published(path, horizon, action_dim)
            _require_size(path, "horizon", stored=record["horizon"], given=horizon)
            _require_size(path, "action_dim", stored=record["dim"], given=action_dim)
            stats = record["stats"]
            if stats:
                stats = check_stats(stats, record["dim"], path)
            return cls(
                _read_bpe(path, record["bpe"]),
                record["scale"],
                record["horizon"],
                record["dim"],
                record["min_coef"],
                record["max_coef"],
                stats,
                record["clip"],
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}: not a FAST tokenizer ({e!r}); fit or save it again") from e


def quantize(chunks: np.ndarray, scale: float) -> np.ndarray:
    """Normalised chunks (B, K, A) -> whole-numbered coefficients (B, K, A), frequency by dimension.

    The orthonormal DCT-II along time: for a frequency f > 0 it is
    c_f = sqrt(2 / K) sum_t x_t cos(pi f (t + 1/2) / K), and c_0 = sqrt(1 / K) sum_t x_t."""
    return np.rint(dct(chunks, axis=1, norm="ortho") * scale)


def _check_chunks(chunks, horizon=None, action_dim=None):
    """chunks as a float array (B, K, A). ValueError on NaN, or when K or A is not the one given."""
    chunks = np.asarray(chunks)
    if chunks.dtype not in (np.float32, np.float64):  # those stay: ties in rounding depend on it
        chunks = chunks.astype(np.float64)
    if chunks.ndim != 3 or 0 in chunks.shape[1:]:
        raise ValueError(f"chunks have shape {chunks.shape}, not (B, K, A); give one as x[None]")
    _, K, A = chunks.shape
    if horizon not in (None, K):
        raise ValueError(
            f"chunk horizon {K}, tokenizer was fitted for {horizon}; refit with "
            f"--horizon {K} or cut chunks of {horizon} steps"
        )
    if action_dim not in (None, A):
        raise ValueError(
            f"chunk has {A} action dimensions, tokenizer was fitted for {action_dim}; refit"
        )
    bad = np.argwhere(~np.isfinite(chunks))
    if len(bad):
        b, k, a = bad[0]
        raise ValueError(
            f"chunk {b}, step {k}, dimension {a} is not finite; repair or drop that action"
        )
    return chunks


# A code is a coefficient counted from min_coef: 0, 1, ... A text has the character chr(code).


def _codes_to_texts(codes):
    """Codes (B, K, A), whole numbers from 0 to LAST_CODE -> B strings of K * A characters."""
    all_text = codes.astype("<u4").tobytes().decode("utf-32-le")
    size = codes.shape[1] * codes.shape[2]
    return [all_text[start : start + size] for start in range(0, len(all_text), size)]


def _texts_to_codes(texts):
    """Texts of the same length -> their codes in a row (B * K * A,)."""
    return np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")


def _byte_characters():
    """The 256 printable characters by which byte-level BPE (GPT-2) spells the bytes 0 .. 255.

    Printable bytes stand for themselves; the others take the characters from 256 on, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()  # byte -> character
BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def _piece_bytes(token, byte_level):
    """A token as the vocabulary spells it -> the UTF-8 bytes of the characters it stands for."""
    if byte_level and all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()


def _writable_codes(vocabulary, last, byte_level):
    """The codes 0 .. last that tokens can write, ascending: those all of whose parts are tokens."""
    writable = []
    for code in range(last + 1):
        parts = [chr(code)]
        if byte_level:
            parts = [BYTE_CHARACTERS[byte] for byte in chr(code).encode()]
        if all(part in vocabulary for part in parts):
            writable.append(code)
    return writable


def _nearest_writable(writable):
    """Ascending codes -> array: code 0 .. the last of them -> the nearest of them; of two as near,
    the lower."""
    writable = np.array(writable)
    midpoints = (writable[1:] + writable[:-1]) / 2
    every_code = np.arange(writable[-1] + 1)
    return writable[np.searchsorted(midpoints, every_code)]


def _read_ours(path):
    """fast.json -> its record, see FastTokenizer.save; old ones may lack stats, and clip."""
    record = json.loads(path.read_text())
    clip = record.get("clip")
    above_0 = {name: record[name] for name in ("scale", "horizon", "dim")}
    if clip is not None:
        above_0["clip"] = clip
    for name, number in above_0.items():
        if type(number) not in (int, float) or not 0 < number < np.inf:
            raise ValueError(f"{path}: {name} is {number!r}, not above 0; fit the tokenizer again")
    return {**record, "stats": record.get("stats"), "clip": clip}


def _read_bpe(path, record):
    """What a fast.json or a tokenizer.json says of the vocabulary and the merges."""
    try:
        return Tokenizer.from_str(json.dumps(record))
    except Exception as e:  # the library raises no narrower one
        raise ValueError(f"{path}: no BPE vocabulary ({e}); fit or save it again") from e


def _read_published(path, horizon, action_dim):
    """processor_config.json of a published folder, and the tokenizer.json that belongs to it -> a
    record like that of fast.json. It stores no largest coefficient: any that has a character."""
    bpe_path = path.parent / "tokenizer.json"
    if not bpe_path.exists():  # transformers 5 puts the tokenizer into a folder of its own
        bpe_path = path.parent / "bpe_tokenizer" / "tokenizer.json"
    if not path.exists() or not bpe_path.exists():
        raise FileNotFoundError(
            f"{path.parent}: neither fast.json nor processor_config.json "
            "with tokenizer.json; run fast_tokenizer.py fit"
        )
    config = json.loads(path.read_text())
    bpe = json.loads(bpe_path.read_text())
    if bpe["decoder"]["type"] != "ByteLevel":
        raise ValueError(f"{bpe_path}: not a byte-level BPE; fit the tokenizer again")
    return {
        "scale": config["scale"],
        "horizon": config.get("time_horizon") or horizon,
        "dim": config.get("action_dim") or action_dim,
        "min_coef": config["min_token"],
        "max_coef": config["min_token"] + LAST_CODE,
        "stats": None,
        "clip": None,
        "bpe": bpe,
    }


def _require_size(path, name, stored, given):
    if stored is None or given not in (None, stored):
        raise ValueError(
            f"{path}: {name} is {stored}, load was given {given}; "
            f"pass the {name} that the tokenizer was fitted for"
        )


# ---- Command line of the stages ------------------------------------------------------------------

# What a field of a Config may be, beside int, str and bool. The flags of all commands read their
# numbers by the functions below, so that one out of range ends the process before anything starts.
Count = int  # at least 1
Natural = int  # at least 0; often 0 means none, or all
Positive = float  # above 0
NonNegative = float
Share = float  # 0 .. 1
BelowOne = float  # 0 .. 1 without 1, as the decay of an average, which at 1 would never learn


def _number(text, kind, is_allowed, range_text):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not np.isfinite(value) or not is_allowed(value):
        raise argparse.ArgumentTypeError(f"{text} is not {range_text}")
    return value


def count(text: str) -> Count:
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def natural(text: str) -> Natural:
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def positive(text: str) -> Positive:
    return _number(text, float, lambda value: value > 0, "a number above 0")


def non_negative(text: str) -> NonNegative:
    return _number(text, float, lambda value: value >= 0, "a number of at least 0")


def share(text: str) -> Share:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def below_one(text: str) -> BelowOne:
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


FLAG_TYPES = {  # annotation of a field -> type of its flag
    "int": int,
    "float": float,
    "str": str,
    "Count": count,
    "Natural": natural,
    "Positive": positive,
    "NonNegative": non_negative,
    "Share": share,
    "BelowOne": below_one,
}


def config_parser(path: str | Path) -> argparse.ArgumentParser:
    """The command line `[PRESET] [--flag value ...]` of the stage file at `path`, from its source.

    A field of its `class Config` is a flag, the comment behind the field its help; a bool is a pair
    --flag and --no-flag. The keys of its dict PRESETS are the presets, the first is the default.
    Where a field has a dict of its choices, as `reward` has REWARDS, the help shows the keys.
    parse_args() returns the preset and the flags that were given, no others.

    The source is parsed, not imported: torch takes seconds, and --help should not. ValueError when
    Config holds what can be no flag."""
    # 1. what the file says: its constants, the fields of Config, the comments behind them
    source = Path(path).read_text(encoding="utf-8")
    module = ast.parse(source)
    constants = {}  # of the module: name -> syntax tree of its value
    for node in module.body:
        if isinstance(node, ast.Assign):
            constants[ast.unparse(node.targets[0])] = node.value
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            config_lines = source.split("\n")[node.lineno : node.end_lineno]
    comments = {}  # field -> the comment behind it
    for line in config_lines:
        match = re.match(r"    (\w+): .*?  # (.+)", line)
        if match:
            comments[match[1]] = match[2]

    # 2. a parser, which takes a preset
    parser = argparse.ArgumentParser(
        description=ast.get_docstring(module),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    presets = _keys(path, "PRESETS", constants["PRESETS"])
    parser.add_argument("preset", nargs="?", choices=presets, default=presets[0])

    # 3. a flag for each field
    for field in fields:
        name = ast.unparse(field.target)
        annotation = ast.unparse(field.annotation)
        if name == "preset":
            continue
        if annotation == "bool":
            kind = {"action": argparse.BooleanOptionalAction}
        elif annotation in FLAG_TYPES:
            read = FLAG_TYPES[annotation]
            kind = {"type": read, "metavar": read.__name__.upper()}
        else:
            allowed = ", ".join(FLAG_TYPES)
            raise ValueError(f"{path}: Config.{name} is {annotation}; use bool or one of {allowed}")
        dict_name = f"{name.upper()}S"
        if dict_name in constants:
            choices = _keys(path, dict_name, constants[dict_name])
            kind["metavar"] = "{" + ",".join(choices) + "}"
        written = ast.unparse(field.value) if field.value else ""
        try:
            default = ast.literal_eval(constants.get(written, field.value))
        except ValueError as e:
            raise ValueError(
                f"{path}: the default of Config.{name} is {written or 'missing'}; write a number, "
                "a text, True or False, or a constant of this file that is one"
            ) from e
        text = f"{comments.get(name, '')} ({default})"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, help=text.replace("%", "%%"), **kind)
    return parser


def _keys(path, name, node):
    """The keys of a dict in the source. ValueError where they do not stand there as text."""
    keys = getattr(node, "keys", [None])
    if not all(isinstance(key, ast.Constant) for key in keys):
        raise ValueError(f"{path}: {name} is no {{...}} with each key in it; write it so")
    return [key.value for key in keys]


def answer_help(path: str | Path) -> None:
    """If -h or --help is on the command line: print the help of the stage file, end the process.

    A stage calls this before it imports torch, so that the help comes at once."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser = config_parser(path)
        parser.print_help()
        parser.exit()


# ---- Commands fit and report ---------------------------------------------------------------------


def round_trip_report(tokenizer: FastTokenizer, chunks: np.ndarray) -> dict:
    """What chunks (B, K, A) lose on the way to ids and back, and how long they are on the way.

    Of each dimension, in the chunks' units: mse (squared), max_error, and naive_mse (squared), that
    of one token of 256 bins a number; outside: share of the actions beyond what normalises to
    -1 .. 1; clipped_actions: share beyond the tokenizer's clip.
    Of all: clipped, share of the coefficients; tokens_*: ids of a chunk, mean and 95% quantile;
    cover: coefficients that an id covers; first_cover: that the first id of a chunk does;
    first_entropy: of the first id, in nats."""
    # 1. ours
    ids = tokenizer.encode(chunks)
    per_dimension = chunks.size / tokenizer.action_dim
    clipped_actions = tokenizer.clipped_actions / per_dimension  # (A,)
    clipped = tokenizer.clipped / chunks.size
    decoded, ok = tokenizer.decode(ids)
    error = (decoded - chunks)[ok].astype(np.float64)  # (B, K, A)
    # 2. naive: a bin decodes to its centre
    stats = tokenizer.stats
    if not stats:  # chunks come normalised
        stats = {"q01": [-1] * tokenizer.action_dim, "q99": [1] * tokenizer.action_dim}
    low, high = value_range(stats)
    outside = ((chunks < low - STILL) | (chunks > high + STILL)).mean((0, 1))  # (A,)
    bins = np.clip(np.floor((normalize(chunks, stats) + 1) * 128), 0, 255)  # (B, K, A)
    naive_error = unnormalize((bins + 0.5) / 128 - 1, stats) - chunks
    # 3. tokens
    lengths = np.array([len(row) for row in ids])  # (B,)
    first_ids = np.array([row[0] for row in ids])  # (B,)
    _, counts = np.unique(first_ids, return_counts=True)
    shares = counts / len(first_ids)
    first_cover = [_characters(tokenizer.pieces[i]) for i in first_ids]
    return {
        "chunks": len(ids),
        "malformed": int((~ok).sum()),
        "outside": outside.tolist(),
        "clipped_actions": clipped_actions.tolist(),
        "clipped": clipped,
        "mse": (error**2).mean((0, 1)).tolist(),
        "max_error": np.abs(error).max((0, 1)).tolist(),
        "naive_mse": (naive_error**2).mean((0, 1)).tolist(),
        "naive_tokens": chunks[0].size,
        "tokens_mean": float(lengths.mean()),
        "tokens_p95": float(np.percentile(lengths, 95)),
        "first_entropy": float(shares @ np.log(1 / shares)),
        "first_cover": float(np.mean(first_cover)),
        "cover": chunks.size / float(lengths.sum()),
    }


def _characters(piece):
    """Characters in UTF-8 bytes that may begin or end inside one: the bytes that begin one."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)


def all_chunks(files: list[EpisodeFile], horizon: int, stride: int) -> np.ndarray:
    """Every `stride`-th chunk of each episode (B, K, A), of those that SFT and GRPO learn from."""
    chunks = []
    for file in files:
        starts = chunk_starts(file, horizon)[::stride]
        chunks.append(action_chunks(file, horizon)[starts])
    return np.concatenate(chunks)


def fit_command(args: argparse.Namespace) -> None:
    """fast_tokenizer.py fit: every 10th episode is held out of the fit, for the report."""
    if not args.out:
        raise ValueError("--out is empty; name a folder for the tokenizer")
    if Path(args.out).is_file():
        raise ValueError(f"--out {args.out}: a file; name a folder for the tokenizer")
    files = read_episodes(args.data, args.max_episodes)
    stats = read_stats(args.data, files)["action"]
    kept = [file for i, file in enumerate(files) if i % 10 != 9]
    chunks = all_chunks(kept, args.horizon, args.stride)  # (B, K, A)
    clip = args.clip if args.clip > 0 else None
    tokenizer = FastTokenizer.fit(chunks, args.vocab_size, args.scale, stats, clip)
    tell(tokenizer, files, args.stride, args.out, ("held-out chunks", "fitted chunks"))


def report_command(args: argparse.Namespace) -> None:
    """fast_tokenizer.py report: the round trip of a tokenizer that is there already."""
    files = read_episodes(args.data, args.max_episodes)
    stats = read_stats(args.data, files)["action"]
    action_dim = files[0].action.shape[1]
    tokenizer = FastTokenizer.load(args.tokenizer, args.horizon, action_dim)
    if not tokenizer.stats:  # published processors expect normalised chunks
        tokenizer.stats = stats
    names = ("chunks of every 10th episode", "chunks of all episodes")
    tell(tokenizer, files, args.stride, args.out, names)


def tell(
    tokenizer: FastTokenizer,
    files: list[EpisodeFile],
    stride: int,
    out: str | None,
    names: tuple[str, str],
) -> None:
    """Print the report on every 10th episode, on all when there are fewer; save both to `out`.
    names: what the chunks of either are called."""
    held_out = files[9::10]
    chunks = all_chunks(held_out or files, tokenizer.horizon, stride)  # (B, K, A)
    result = round_trip_report(tokenizer, chunks)
    result["held_out"] = bool(held_out)
    print(
        f"horizon {tokenizer.horizon}, {tokenizer.action_dim} dimensions, "
        f"scale {tokenizer.scale:g}, vocabulary {tokenizer.vocab_size}, "
        f"coefficients {tokenizer.min_coef} .. {tokenizer.max_coef}, "
        f"actions {'not clipped' if tokenizer.clip is None else f'clipped to {tokenizer.clip:g}'}"
    )
    for line in rare_lines(tokenizer.stats or {}, "action"):
        print(line)
    unknown = [file for file in files if file.deltas is None]
    short = sum(len(file) < tokenizer.horizon for file in unknown)
    if len(unknown) > short and tokenizer.horizon > 1:
        print(
            f"the last {tokenizer.horizon - 1} steps of {len(unknown) - short} of {len(files)} "
            "episodes begin no chunk: their headers do not say which dimensions move (deltas in "
            "docs/data.md)"
        )
    if short:
        print(
            f"{short} of {len(files)} episodes are shorter than {tokenizer.horizon} steps and say "
            "no deltas: only their first step begins a chunk, in which the last action repeats; "
            "write deltas, or fit a smaller --horizon"
        )
    name_of_chunks = names[0] if held_out else names[1]
    print(f"round trip of {result['chunks']} {name_of_chunks}, in dataset units")
    for line in clipped_lines(tokenizer, result["clipped_actions"]):
        print(line)
    for name, value in result.items():  # what they are: see round_trip_report()
        numbers = value if isinstance(value, list) else [value]
        print(f"  {name:14s}" + "".join(f" {number:10.4g}" for number in numbers))
    if out:
        tokenizer.save(out)
        (Path(out) / "report.json").write_text(json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fit a FAST action tokenizer, or report on one.")
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit")
    fit.set_defaults(run=fit_command)
    report = commands.add_parser("report")
    report.set_defaults(run=report_command)
    for command in (fit, report):
        add = command.add_argument
        add("--data", required=True, help="folder of episodes, or holding episodes/")
        add("--stride", type=count, default=1, help="a chunk every this many steps")
        add("--max-episodes", type=natural, default=0, help="first N episodes only; 0: all")

    add = fit.add_argument
    add("--out", required=True, help="folder for fast.json and report.json")
    add("--horizon", type=count, default=5, help="actions a chunk (K)")
    add("--scale", type=positive, default=2, help="quantisation steps a unit coefficient")
    add("--vocab-size", type=count, default=64, help="number of FAST tokens, at most")
    add("--clip", type=non_negative, default=CLIP, help="bound of normalised actions; 0: none")

    add = report.add_argument
    add("--tokenizer", required=True, help="folder: fast.json, or a published processor")
    add("--horizon", type=count, help="for published folders that do not store it")
    add(
        "--out",
        help="save it here too, with the statistics of --data: what sft.py "
        "needs of a published processor",
    )

    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
