"""LeRobot datasets, v2.0, v2.1 and v3.0, as episodes: BridgeV2, DROID and LIBERO are published so.

    python -m tools.lerobot --data FOLDER --out data/x --camera observation.images.front \\
        --action action --state observation.state --fps 5 --deltas 6 --skip-blank --skip-damaged
    python -m tools.lerobot export --help          # the other way round: tools/lerobot_export.py

The first camera is `image`, a further one `image_<last part of its name>` (`wrist_image`, as
in LIBERO's copies, gives `image_wrist`, as our recordings have it); keys are put side by
side. --deltas says how many first dimensions of an action are movements, for the episodes' headers.
--fps keeps the first image and state of each interval, and the last value of the action, but the
sum of movements. Where the task changes, a new episode begins. All numbers and instructions are
checked first, then images are read. What --skip-blank and --skip-damaged leave out is counted, and
stands in skipped.jsonl beside the episodes.

A dataset is a folder: meta/ describes it, data/ holds all numbers (and images, if they are PNG) as
parquet, videos/ the images as MP4. v2.0 and v2.1 have a file a recording, v3.0 joins recordings to
files. Which frame of a video belongs to a step: see "Videos".
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from fast_tokenizer import (
    Damaged,
    count,
    encode_frames,
    natural,
    non_negative,
    read_image,
    reading,
    unfinished_episodes,
    unfinished_folder,
    write_episodes,
)
from tools import lerobot_export
from tools.extras import require

IS_V3 = {"v2.0": False, "v2.1": False, "v3.0": True}  # the versions that are read
CODECS = {"raw": None, "png": "png", "jpeg": "jpeg 95"}  # --image-format -> fast_tokenizer's codec


@dataclass(frozen=True)
class Columns:
    """What of a dataset is converted: keys as info.json names them."""

    cameras: list[str]
    actions: list[str]
    states: list[str]

    @property
    def numbers(self) -> list[str]:
        return [*self.actions, *self.states]

    @property
    def image_names(self) -> list[str]:
        """What the cameras are called in an episode."""
        last_parts = [key.split(".")[-1] for key in self.cameras[1:]]
        further = ["image_" + part.removesuffix("_image") for part in last_parts]
        return ["image", *further]


@dataclass(frozen=True)
class Job:
    """How recordings are converted; the same for all of a dataset."""

    folder: Path
    info: dict  # meta/info.json
    columns: Columns
    every: int  # recorded steps from one that is kept to the next
    deltas: int | None  # first dimensions of the action that are movements; None: not said
    codec: str | None  # of the images in an episode; None: as they are

    @property
    def fps(self) -> float:
        """As recorded."""
        return self.info["fps"]

    @property
    def videos(self) -> list[str]:
        """Those of the cameras that are videos."""
        features = self.info["features"]
        return [key for key in self.columns.cameras if features[key]["dtype"] == "video"]


class VideoStart(NamedTuple):
    """Where a recording begins in a video: so many frames after the one that is shown at anchor."""

    anchor: float  # s
    frames: int
    begin: float  # s, as meta/ says (from_timestamp)


@dataclass(frozen=True)
class RecordingEntry:
    """What meta/ says of one recording of T steps."""

    source: str  # its name in messages
    row: dict  # of meta/episodes
    length: int  # T
    video_starts: dict[str, VideoStart]  # camera -> where it begins in the video
    stats: dict[str, dict]  # key -> {"min", "max", "mean", "count"}; {}: not for single recordings

    @property
    def number(self) -> int:
        return self.row["episode_index"]


@dataclass(frozen=True)
class Dataset:
    """What meta/ says of a dataset."""

    tasks: dict[int, str]  # task number -> instruction
    entries: list[RecordingEntry]
    is_whole: bool  # entries are all that there are
    stats: dict[str, dict]  # as those of a recording, but of the whole; {}: none


# ---- Files --------------------------------------------------------------------------------------


@functools.lru_cache(2)  # a file of v3.0 holds many recordings
def read_parquet(path: Path, columns: tuple[str, ...] | None = None):
    """-> pyarrow.Table."""
    import pyarrow.parquet

    with reading(path), pyarrow.parquet.ParquetFile(path) as file:
        missing = set(columns or ()) - set(file.schema_arrow.names)
        if missing:
            raise ValueError(f"no column {', '.join(sorted(missing))}")
        return file.read(columns)


def read_rows(path: Path) -> list[dict]:
    """Rows of a file of meta/: .json (one), .jsonl or .parquet."""
    if path.suffix == ".parquet":
        return read_parquet(path).to_pylist()
    with reading(path):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return [json.loads(text)]
    rows = []
    # not splitlines(): a string in JSON may hold U+2028, at which that would cut it
    for number, line in enumerate(text.split("\n"), start=1):
        with reading(f"{path}: line {number}"):
            if line.strip():
                rows.append(json.loads(line))
    return rows


def read_images(cells: list[dict], source: str) -> list[np.ndarray]:
    """Cells of an image column, each a PNG or JPEG -> list of (H, W, 3) uint8."""
    images = []
    for t, cell in enumerate(cells):
        images.append(read_image(cell["bytes"], f"{source}: image {t}"))
    return images


def file_of(job: Job, row: dict, column: str = "data") -> Path:
    """Where the rows of a recording stand, or the video of a camera (column "videos/KEY").

    info.json has a template for each version:
    v2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    v3.0: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", whose numbers stand in the
    row of the recording as "data/chunk_index", "data/file_index"."""
    kind, _, key = column.partition("/")
    template = job.info["data_path" if kind == "data" else "video_path"]
    number = row["episode_index"]
    path = template.format(
        video_key=key,
        episode_index=number,
        episode_chunk=number // job.info["chunks_size"],
        chunk_index=row.get(f"{column}/chunk_index"),
        file_index=row.get(f"{column}/file_index"),
    )
    return job.folder / path


# ---- Videos -------------------------------------------------------------------------------------

# Which frame belongs to a step: they are counted. Step k of a recording is the frame k after its
# first one, and no frame may be missing between. In a file that joins recordings, one begins with
# the frame after the last of the one before it, and the first with frame 0; from_timestamp must be
# less than a frame away from there. It drifts where durations were added up that the video does not
# have; from DRIFT on that is counted. Only where there is a gap before a recording, of two frames
# or more in from_timestamp (something that is no recording) or in the video (frames are lost), does
# it begin with the frame nearest to from_timestamp, which must be less than half a frame away.

DRIFT = 0.1  # frames


def video_starts(rows: list[dict], key: str, fps: float) -> dict[int, VideoStart]:
    """Of the recordings of a dataset of v3.0: episode_index -> where it begins in its video."""
    column = f"videos/{key}"
    starts = {}
    last_file = None

    def position(row):
        file = (row[f"{column}/chunk_index"], row[f"{column}/file_index"])
        return file, row[f"{column}/from_timestamp"]

    for row in sorted(rows, key=position):
        file, begin = position(row)
        if file != last_file:
            last_file = file
            anchor = 0.0
            frames = 0
            expected = 0.0  # s, where the recording before it ends
        if abs(begin - expected) * fps >= 2:
            anchor = begin
            frames = 0
        starts[row["episode_index"]] = VideoStart(anchor, frames, begin)
        frames += row["length"]
        expected = begin + row["length"] / fps
    return starts


class FrameIndex(NamedTuple):
    """The F frames of a video in the order in which they are shown, and its key frames."""

    pts: np.ndarray  # (F,) int, when they are shown, in units of the video
    times: np.ndarray  # (F,) the same in seconds
    key_pts: np.ndarray  # ascending
    key_dts: np.ndarray  # when a key frame is decoded, which is what a seek asks for


@functools.lru_cache(2)  # a video of v3.0 holds many recordings
def frame_index(path: Path) -> FrameIndex:
    import av

    pts = []
    keys = []
    with reading(path, av.error.FFmpegError), av.open(str(path)) as file:
        stream = file.streams.video[0]
        for packet in file.demux(stream):
            if packet.pts is None or packet.is_discard:
                continue
            pts.append(packet.pts)
            if packet.is_keyframe:
                keys.append((packet.pts, packet.dts))
        pts = np.array(sorted(pts), np.int64)
        key_pts, key_dts = np.array(sorted(keys), np.int64).reshape(-1, 2).T
        return FrameIndex(pts, pts * float(stream.time_base), key_pts, key_dts)


def frame_numbers(
    times: np.ndarray, start: VideoStart, timestamps: np.ndarray, fps: float
) -> tuple[np.ndarray, float]:
    """Times (F,) of the frames of a video, timestamps (T,) of a recording's steps, in seconds ->
    number of the frame of each step (T,), and how far the first is from where meta/ has it, in
    frames. ValueError where the two do not belong to each other."""
    if not len(times):
        raise ValueError("no frame")
    # 1. the first one, by count from the anchor, by time if frames are missing there
    anchor_index = abs(times - start.anchor).argmin()
    first = anchor_index + start.frames
    before_anchor = start.anchor - 1 / fps  # s; so that the anchor has a gap of its own
    gaps = np.diff(times[anchor_index : first + 1], prepend=before_anchor) * fps  # 1 each
    tolerance = 1.0
    if (abs(gaps - 1) >= 0.5).any():
        first = abs(times - start.begin).argmin()
        tolerance = 0.5

    # 2. the others, and what their times say
    found = times[first : first + len(timestamps)]  # as many as there are
    expected = start.begin + timestamps  # (T,)
    drift = (found - expected[: len(found)]) * fps  # 0 each
    if len(found) and not abs(drift[0]) < tolerance:  # so that NaN does not pass
        raise ValueError(
            f"step 0 is at {expected[0]:.3f} s, by count of the frames at {found[0]:.3f} s"
        )
    lost = np.flatnonzero(~(abs(drift - drift[:1]) < 0.5))
    if len(lost):
        raise ValueError(f"no frame at {expected[lost[0]]:.3f} s: lost, or not {fps:g} fps")
    if len(found) < len(expected):
        raise ValueError(f"no frame at {expected[len(found)]:.3f} s: cut short")
    return np.arange(first, first + len(found)), float(abs(drift[0]))


def read_frames(path: Path, numbers: np.ndarray) -> list[np.ndarray]:
    """Frames of a video by their ascending numbers -> list of (H, W, 3) uint8."""
    import av

    index = frame_index(path)
    wanted = index.pts[numbers]
    images = []
    with reading(path, av.error.FFmpegError), av.open(str(path)) as file:
        stream = file.streams.video[0]
        # The last key frame that is shown before. A seek to the time itself lands on the last one
        # decoded before it, which in an open GOP (x265's default) may be shown after it.
        key = np.searchsorted(index.key_pts, wanted[0], side="right") - 1
        if key < 0:
            raise ValueError("no key frame before its first frame")
        file.seek(int(index.key_dts[key]), stream=stream)
        for frame in file.decode(stream):
            if frame.is_corrupt and frame.pts >= index.key_pts[key]:
                raise ValueError(f"the frame at {frame.time:.3f} s is damaged")
            if frame.pts == wanted[len(images)]:
                images.append(frame.to_ndarray(format="rgb24"))
            if len(images) == len(wanted):
                return images
            if frame.pts > wanted[len(images)]:
                break
        missing = index.times[numbers[len(images)]]
        raise ValueError(f"the frame at {missing:.3f} s cannot be decoded")


# ---- Description of the dataset (meta/) ---------------------------------------------------------


def read_info(folder: Path) -> dict:
    """meta/info.json. Damaged naming the versions that are read when it is of another one."""
    path = folder / "meta/info.json"
    with reading(path):
        info = read_rows(path)[0]
        version = info.get("codebase_version")
    if str(version) not in IS_V3:
        raise Damaged(f"{path}: codebase_version is {version!r}; {', '.join(IS_V3)} are supported")
    return info


def read_dataset(job: Job, max_episodes: int) -> Dataset:
    """Reads meta/. Damaged, naming what does not fit."""
    meta = job.folder / "meta"
    is_v3 = IS_V3[job.info["codebase_version"]]
    with reading(meta):
        # 1. rows
        kind = "parquet" if is_v3 else "jsonl"
        tasks = read_tasks(meta / f"tasks.{kind}")
        rows = []
        for path in sorted(meta.glob("episodes/*/*.parquet" if is_v3 else "episodes.jsonl")):
            rows += read_rows(path)
        starts = {}
        if is_v3:
            starts = {key: video_starts(rows, key, job.fps) for key in job.videos}

        # 2. statistics: v2.1 has those of each recording, the others of the whole
        stats = {}
        stats_of = {}
        if (meta / "episodes_stats.jsonl").exists():
            for row in read_rows(meta / "episodes_stats.jsonl"):
                stats_of[row["episode_index"]] = row["stats"]
        elif (meta / "stats.json").exists():
            stats = read_rows(meta / "stats.json")[0]

        # 3. an entry a recording
        entries = []
        for number, times in Counter(row["episode_index"] for row in rows).items():
            if times > 1:
                raise ValueError(f"episode {number} stands {times} times in meta/episodes")
        for row in rows[: max_episodes or None]:
            number = row["episode_index"]
            entry = RecordingEntry(
                source=f"{job.folder}: episode {number}",
                row={key: value for key, value in row.items() if not key.startswith("stats/")},
                length=int(row["length"]),
                video_starts={
                    key: starts[key][number] if is_v3 else VideoStart(0, 0, 0) for key in job.videos
                },
                stats=stats_of.get(number, {}),
            )
            entries.append(entry)
    return Dataset(tasks, entries, len(entries) == len(rows), stats)


def read_tasks(path: Path) -> dict[int, str]:
    """Task number -> instruction.

    It is the column `task`, else the index of the table (v3.0), else the only further column.
    Damaged when it is none of these, or a number has two."""
    rows = read_rows(path)
    tasks = {}
    with reading(path):
        for row in rows:
            number = row["task_index"]
            names = [name for name in row if name != "task_index"]
            for name in ("task", "__index_level_0__"):
                if name in names:
                    names = [name]
            if len(names) != 1:
                raise ValueError(f"no column task, and {', '.join(names)} beside task_index")
            task = row[names[0]]
            if is_blank(task):
                task = ""
            if not isinstance(task, str):
                raise ValueError(f"task {number} is {task!r}, not a sentence")
            if tasks.setdefault(number, task) != task:
                raise ValueError(f"task {number} is both {tasks[number]!r} and {task!r}")
    return tasks


def steps_apart(recorded_fps: float, fps: float) -> int:
    """Recorded steps from one that is kept to the next; fps 0: all are kept. Damaged when fps
    does not divide the recorded rate."""
    if not fps:
        return 1
    ratio = recorded_fps / fps
    every = round(ratio) if ratio < np.inf else 0
    if every < 1 or recorded_fps != every * fps:
        raise Damaged(
            f"--fps {fps:g} does not divide its {recorded_fps}; give one that does, or leave it out"
        )
    return every


# ---- Checks -------------------------------------------------------------------------------------


def check_flags(path: Path, info: dict, columns: Columns, fps: float, deltas: int | None) -> None:
    """Damaged, naming the flag, where one does not fit the dataset, or naming info.json, which is
    `path`, where that does not say what they must fit: the two have different cures."""
    with reading(path):
        recorded_fps = info["fps"]
        if not 0 < recorded_fps < np.inf:
            raise ValueError(f"fps is {recorded_fps}")
        features = dict(info["features"])
    # 1. keys
    for flag, keys in (
        ("camera", columns.cameras),
        ("action", columns.actions),
        ("state", columns.states),
    ):
        missing = [key for key in keys if key not in features]
        if missing:
            raise Damaged(
                f"--{flag}: no {', '.join(missing)} in {path}; name one of {', '.join(features)}"
            )
    for name, times in Counter(columns.image_names).items():
        if times > 1:
            raise Damaged(
                f"--camera: {times} of {', '.join(columns.cameras)} would be called {name}, by the "
                "last part of the key; leave one out, or name it first"
            )
    # 2. movements
    with reading(path):
        dims = sum(int(np.prod(features[key]["shape"])) for key in columns.actions)
    if deltas is not None and deltas > dims:
        raise Damaged(f"--deltas {deltas}: an action has {dims} dimensions; give at most {dims}")
    # 3. rate
    if steps_apart(recorded_fps, fps) > 1 and deltas is None:
        raise Damaged(
            "--fps thins actions; say --deltas N, the first dimensions that are movements (0: none)"
        )


class Moments(NamedTuple):
    """What is known of N rows of numbers (N, D)."""

    count: int  # N
    low: np.ndarray  # (D,)
    high: np.ndarray  # (D,)
    total: np.ndarray  # (D,)


def moments_of(values: np.ndarray) -> Moments:
    """Of values (N, D), in float64."""
    values = values.astype(np.float64)
    return Moments(len(values), values.min(0), values.max(0), values.sum(0))


def join_moments(parts: list[Moments]) -> Moments:
    """Those of all rows together."""
    return Moments(
        sum(part.count for part in parts),
        np.min([part.low for part in parts], 0),
        np.max([part.high for part in parts], 0),
        np.sum([part.total for part in parts], 0),
    )


def check_stats(stats: dict[str, dict], found: dict[str, Moments]) -> None:
    """ValueError unless the numbers of each key that stats describes are as many, and their least,
    largest and mean ones the same, as stats says.

    Their tolerance: 1e-4, 1e-3 of the range, and what float32 rounds off, |x| / 2^24 a time. To add
    up N numbers one after the other, as publishers do for the mean, rounds N times: where a joint
    stands still at -87 degrees for 300 steps, the mean is off by 0.0002."""
    for key, numbers in found.items():
        if key not in stats:
            continue
        stored_count = int(np.ravel(stats[key].get("count", numbers.count))[0])
        if stored_count != numbers.count:
            raise ValueError(f"{numbers.count} steps of {key}, meta/ counts {stored_count}")
        base = 1e-3 * (numbers.high - numbers.low) + 1e-4  # (D,)
        rounding = np.maximum(abs(numbers.low), abs(numbers.high)) / 2**24  # (D,)
        mean = numbers.total / numbers.count
        for name, have, roundings in (
            ("min", numbers.low, 1),
            ("max", numbers.high, 1),
            ("mean", mean, numbers.count),
        ):
            want = np.ravel(stats[key][name])
            tolerance = base + roundings * rounding
            if want.shape != have.shape or not (abs(want - have) <= tolerance).all():
                raise ValueError(f"{name} of {key} is {have.round(4)}, meta/ says {want.round(4)}")


def is_blank(task: str | float | None) -> bool:
    """No instruction: None, pandas' NaN, or text in which nothing is seen (spaces, a BOM)."""
    if isinstance(task, str):
        return not any(letter.isprintable() and not letter.isspace() for letter in task)
    return task is None or task != task


def check_tasks(numbers: list[int], row: dict, tasks: dict[int, str]) -> None:
    """ValueError unless the task numbers of a recording's steps are in tasks, and their sentences
    among those that the recording's row of meta/ lists: else its data are mislabelled."""
    listed = row.get("tasks") or []
    if isinstance(listed, str):
        listed = [listed]
    listed = [task.strip() if isinstance(task, str) else task for task in listed]
    listed = [task for task in listed if not is_blank(task)]
    for number in sorted(set(numbers)):
        if number not in tasks:
            raise ValueError(f"task_index {number} does not stand in meta/tasks")
        if is_blank(tasks[number]) or not listed:
            continue
        if tasks[number].strip() not in listed and number not in listed:
            raise ValueError(
                f"its steps are labelled {tasks[number]!r} (task_index {number}), but "
                f"meta/episodes says {', '.join(map(repr, listed))}"
            )


def check_view(view: list[np.ndarray], key: str, info: dict) -> None:
    """ValueError for an image of another shape than info.json says, which may name it (C, H, W)."""
    for t, image in enumerate(view):
        if sorted(image.shape) != sorted(info["features"][key]["shape"]):
            raise ValueError(f"image {t} of {key} is {image.shape}, not as info.json says")


# ---- Recordings ---------------------------------------------------------------------------------


def read_steps(job: Job, entry: RecordingEntry, columns: list[str]):
    """The rows of a recording, of a table that may hold others too -> pyarrow.Table of T rows.
    ValueError if some are missing or out of order."""
    names = ("episode_index", "frame_index", "timestamp", "task_index", *columns)
    table = read_parquet(file_of(job, entry.row), names)
    is_ours = np.array(table["episode_index"]) == entry.number
    table = table.take(np.flatnonzero(is_ours))
    if not entry.length or table["frame_index"].to_pylist() != list(range(entry.length)):
        raise ValueError(f"{len(table)} rows, not frames 0 to {entry.length - 1} as meta/ says")
    return table


def read_numbers(job: Job, table) -> dict[str, np.ndarray]:
    """key -> (T, D) float32. ValueError where one is not finite."""
    numbers = {}
    for key in job.columns.numbers:
        values = np.array(table[key].to_pylist(), np.float32).reshape(len(table), -1)  # (T, D)
        bad_rows = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad_rows):
            raise ValueError(f"{key} of step {bad_rows[0]} is not finite")
        numbers[key] = values
    return numbers


class Survey(NamedTuple):
    """What the rows of a recording say."""

    task_numbers: list[int]  # of the steps that are kept
    moments: dict[str, Moments]  # key -> of all steps


def survey(job: Job, entry: RecordingEntry) -> Survey:
    """Reads and checks all of a recording but its images. Damaged."""
    with reading(entry.source):
        table = read_steps(job, entry, job.columns.numbers)
        moments = {key: moments_of(values) for key, values in read_numbers(job, table).items()}
        check_stats(entry.stats, moments)
        return Survey(table["task_index"].to_pylist()[:: job.every], moments)


class Piece(NamedTuple):
    """Steps of a recording that become an episode; counted in those that are kept."""

    instruction: str
    start: int
    end: int


def cut_by_task(
    entry: RecordingEntry, task_numbers: list[int], tasks: dict[int, str]
) -> list[Piece]:
    """Where the instruction changes, a new piece begins. Damaged when meta/ has other ones."""
    with reading(entry.source):
        check_tasks(task_numbers, entry.row, tasks)
    pieces = []
    end = 0
    for instruction, steps in itertools.groupby(tasks[number] for number in task_numbers):
        start = end
        end = start + len(list(steps))
        pieces.append(Piece(instruction, start, end))
    return pieces


def read_views(job: Job, entry: RecordingEntry, table) -> tuple[list[np.ndarray], float]:
    """For each camera the images of the steps that are kept (T / every, H, W, 3), and how far
    meta/ has the recording from its first frame in a video, in frames."""
    views = []
    largest_drift = 0.0
    for key in job.columns.cameras:
        if key in job.videos:
            path = file_of(job, entry.row, f"videos/{key}")
            timestamps = np.array(table["timestamp"], float)
            times = frame_index(path).times
            with reading(path):
                numbers, drift = frame_numbers(times, entry.video_starts[key], timestamps, job.fps)
            largest_drift = max(largest_drift, drift)
            view = read_frames(path, numbers[:: job.every])
        else:
            cells = table[key].to_pylist()[:: job.every]
            view = read_images(cells, f"{entry.source}: {key}")
        check_view(view, key, job.info)
        views.append(np.stack(view))
    return views, largest_drift


def thin(actions: np.ndarray, every: int, deltas: int) -> np.ndarray:
    """Actions (T, A) -> one for `every` steps (ceil(T / every), A): the first `deltas` dimensions
    added up, of the others the last value.

    Two dimensions, the first a movement, every 2: [[1, 5], [2, 6], [3, 7]] -> [[3, 6], [3, 7]]."""
    starts = np.arange(0, len(actions), every)
    ends = np.minimum(starts + every, len(actions))
    sums = np.add.reduceat(actions[:, :deltas], starts)
    last = actions[ends - 1]
    return np.concatenate([sums, last[:, deltas:]], 1)


class Plan(NamedTuple):
    """A recording that is converted, and what of it."""

    entry: RecordingEntry
    pieces: list[Piece]

    @property
    def episodes(self) -> list[tuple[str, int]]:
        """Instruction and steps of each episode that it becomes."""
        return [(instruction, end - start) for instruction, start, end in self.pieces]


class Converted(NamedTuple):
    episodes: list[tuple[dict, dict]]  # (arrays, header) of each piece, for write_episodes
    drift: float  # frames


def convert(job: Job, plan: Plan) -> Converted:
    """Reads a recording with its images. Damaged."""
    entry = plan.entry
    columns = job.columns
    with reading(entry.source):
        # 1. read
        images = [key for key in columns.cameras if key not in job.videos]
        table = read_steps(job, entry, [*columns.numbers, *images])
        numbers = read_numbers(job, table)
        views, drift = read_views(job, entry, table)

        # 2. arrays of T / every steps, as fast_tokenizer.py describes them
        state = np.hstack([numbers[key] for key in columns.states])  # (T, S)
        action = np.hstack([numbers[key] for key in columns.actions])  # (T, A)
        arrays = {"state": state[:: job.every], "action": thin(action, job.every, job.deltas or 0)}
        arrays |= zip(columns.image_names, views, strict=True)

        # 3. an episode a piece
        episodes = []
        for instruction, start, end in plan.pieces:
            header = {
                "task": instruction,
                "fps": f"{job.fps / job.every:g}",
                "source": entry.source,
            }
            if job.deltas is not None:
                header["deltas"] = str(job.deltas)
            piece = {name: array[start:end] for name, array in arrays.items()}
            for name in columns.image_names if job.codec else ():
                blob, described = encode_frames(piece[name], name, job.codec)
                piece |= blob
                header |= described
            episodes.append((piece, header))
        return Converted(episodes, drift)


# ---- Processes ----------------------------------------------------------------------------------

Item = TypeVar("Item")
Result = TypeVar("Result")


# run(function, items) yields function(item) of each item, in their order, or the Damaged it raised.
Run = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result | Damaged]]


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Run]:
    """`with processes(2) as run`: run() has so many processes, and yields the same whatever their
    number. ValueError when one was killed."""
    if workers == 1:
        yield run_here
        return
    # spawn: pyarrow has threads, which a fork would not copy
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        # not more ahead, or they fill the memory where writing is slower
        yield functools.partial(run_in_pool, pool, 2 * workers)
    except BrokenProcessPool as e:
        raise Damaged("a worker was killed, perhaps for memory; lower --workers") from e
    finally:
        pool.shutdown(cancel_futures=True)


def run_here(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result | Damaged]:
    for item in items:
        yield result_or_damaged(function, item)


def run_in_pool(
    pool: ProcessPoolExecutor,
    ahead: int,
    function: Callable[[Item], Result],
    items: Iterable[Item],
) -> Iterator[Result | Damaged]:
    """ahead: items that are begun before the result of the first is taken."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(result_or_damaged, function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def result_or_damaged(function: Callable[[Item], Result], item: Item) -> Result | Damaged:
    try:
        return function(item)
    except Damaged as e:
        return e


# ---- Conversion ---------------------------------------------------------------------------------


# Flags that a run must have in common with the one that it goes on from.
SAME_ON_RESUME = (
    "data",
    "camera",
    "action",
    "state",
    "fps",
    "deltas",
    "max_episodes",
    "image_format",
    "episodes_per_file",
)


class Skipped:
    """What is left out: rows for skipped.jsonl. Without its flag the first ends the conversion."""

    def __init__(self, skip_blank: bool, skip_damaged: bool):
        self.allowed = {"blank": skip_blank, "damaged": skip_damaged}
        self.rows = []

    def add(self, kind: str, entry: RecordingEntry, steps: int, why: str) -> None:
        """kind: "blank" or "damaged". Damaged, naming the flag, unless that is allowed."""
        if not self.allowed[kind]:
            raise Damaged(f"{why}; or leave such recordings out: --skip-{kind}")
        self.rows.append({"episode": entry.number, "kind": kind, "steps": steps, "why": why})

    def write(self, folder: Path) -> None:
        """folder/skipped.jsonl, if anything was, and a line for each kind that says how much."""
        lines = [json.dumps(row) + "\n" for row in self.rows]
        if lines:
            (folder / "skipped.jsonl").write_text("".join(lines))
        for kind in self.allowed:
            steps = [row["steps"] for row in self.rows if row["kind"] == kind]
            if steps:
                print(f"left out as {kind}: {len(steps)} recordings or parts, {sum(steps)} steps")


def make_plans(job: Job, dataset: Dataset, skipped: Skipped, run: Run) -> list[Plan]:
    """Reads all numbers and instructions, before any image. Damaged where a recording is not as
    meta/ says, or its instruction is blank, and `skipped` does not allow it."""
    # 1. each recording
    plans = []
    all_moments = []
    surveys = run(functools.partial(survey, job), dataset.entries)
    surveys = tqdm(surveys, "checking", len(dataset.entries), disable=None)
    for entry, surveyed in zip(dataset.entries, surveys, strict=True):
        if isinstance(surveyed, Damaged):
            skipped.add("damaged", entry, entry.length, str(surveyed))
            continue
        all_moments.append(surveyed.moments)
        try:
            pieces = cut_by_task(entry, surveyed.task_numbers, dataset.tasks)
        except Damaged as e:
            skipped.add("damaged", entry, entry.length, str(e))
            continue
        kept = []
        for piece in pieces:
            if is_blank(piece.instruction):
                why = f"{entry.source}: an empty instruction in meta/tasks"
                skipped.add("blank", entry, piece.end - piece.start, why)
            else:
                kept.append(piece)
        if kept:
            plans.append(Plan(entry, kept))

    # 2. the whole, if it is the one that meta/ describes
    if dataset.is_whole and len(all_moments) == len(dataset.entries):
        path = job.folder / "meta/stats.json"
        whole = {}
        for key in job.columns.numbers if all_moments else ():
            whole[key] = join_moments([moments[key] for moments in all_moments])
        try:
            with reading(path):
                check_stats(dataset.stats, whole)
        except Damaged as e:
            raise Damaged(f"{e}; without this file the numbers are not checked") from e
    for key in job.columns.numbers:
        if key not in dataset.stats and not all(key in entry.stats for entry in dataset.entries):
            print(f"meta/ has no statistics of {key}, or not of all recordings: not checked")
    return plans


def begin(args: argparse.Namespace) -> dict[str, list[tuple[str, int]]]:
    """Writes the flags that make the episodes into conversion.json beside them. -> source of each
    recording that a run before this has written: its episodes. Damaged if its flags differ.
    Those of a run that wrote none may have been wrong, and need not be the same."""
    path = unfinished_folder(args.out) / "conversion.json"
    kept = {name: value for name, value in vars(args).items() if name in SAME_ON_RESUME}
    written = unfinished_episodes(args.out)
    if written and path.exists():
        with reading(path):
            before = json.loads(path.read_text())
        for name, value in kept.items():
            if before.get(name) != value:
                flag = name.replace("_", "-")
                raise Damaged(
                    f"{path.parent} was begun with --{flag} {before.get(name)}, not {value}; "
                    "give the same again, or delete it"
                )
    path.write_text(json.dumps(kept, indent=1) + "\n")
    episodes = {}
    for file in written:
        if file.deltas != args.deltas:  # of a version that did not write it
            raise Damaged(
                f"{file} was written with deltas {file.deltas}, --deltas says {args.deltas}; "
                f"delete {path.parent} to begin again"
            )
        episodes.setdefault(file.source, []).append((file.task, len(file)))
    return episodes


def episodes_of(args: argparse.Namespace) -> Iterator[tuple[dict, dict] | None]:
    """A dataset's episodes as (arrays, header), for write_episodes, None for one that stands there;
    args: flags of main(). Damaged, naming what is wrong with it, and the flag that leaves such
    recordings out."""
    require("-r requirements-extras.txt", "av", "pyarrow.parquet")
    # 1. meta/
    folder = Path(args.data)
    columns = Columns(args.camera.split(","), args.action.split(","), args.state.split(","))
    info = read_info(folder)
    check_flags(folder / "meta/info.json", info, columns, args.fps, args.deltas)
    every = steps_apart(info["fps"], args.fps)
    job = Job(folder, info, columns, every, args.deltas, CODECS[args.image_format])
    dataset = read_dataset(job, args.max_episodes)
    begun = begin(args)

    # 2. all numbers and instructions
    skipped = Skipped(args.skip_blank, args.skip_damaged)
    drifts = []
    with processes(args.workers) as run:
        plans = make_plans(job, dataset, skipped, run)

        # 3. images, a recording at a time, but for those that a run before this has written
        is_written = [plan.episodes == begun.get(plan.entry.source) for plan in plans]
        missing = [plan for plan, written in zip(plans, is_written, strict=True) if not written]
        conversions = run(functools.partial(convert, job), missing)
        for plan, written in zip(plans, is_written, strict=True):
            if written:
                yield from [None] * len(plan.pieces)
                continue
            converted = next(conversions)
            if isinstance(converted, Damaged):
                skipped.add("damaged", plan.entry, plan.entry.length, str(converted))
                continue
            drifts.append(converted.drift)
            yield from converted.episodes

    # 4. what was done otherwise than meta/ says
    skipped.write(unfinished_folder(args.out))
    moved = [drift for drift in drifts if drift >= DRIFT]
    if moved:
        print(
            f"{len(moved)} recordings begin up to {max(moved):.2f} frames away from where meta/ "
            "has them (from_timestamp); their frames were counted"
        )


# ---- Command line -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["export"]:
        lerobot_export.main(words[1:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m tools.lerobot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", required=True, help="folder with meta/, data/ and perhaps videos/")
    add("--out", required=True, help="folder for the episodes")
    add("--camera", required=True, help="image keys, separated by commas")
    add("--action", default="action", help="action keys, separated by commas")
    add("--state", default="observation.state", help="state keys, separated by commas")
    add(
        "--fps", type=non_negative, default=0, help="steps a second to keep, needs --deltas; 0: all"
    )
    add(
        "--deltas",
        type=natural,
        help="first action dimensions that are movements; 0: all are positions; default: not known",
    )
    add(
        "--max-episodes",
        type=natural,
        default=0,
        help="only the first recordings, global statistics unchecked; 0: all",
    )
    add("--skip-blank", action="store_true", help="leave out steps without an instruction")
    add("--skip-damaged", action="store_true", help="leave out recordings that do not read")
    add(
        "--image-format",
        choices=CODECS,
        default="raw",
        help="how episodes hold images; png: loses nothing; jpeg: quality 95, full colour (raw)",
    )
    add("--episodes-per-file", type=count, default=1, help="more where there are very many")
    add("--workers", type=count, default=1, help="processes that read; files are the same")
    add(
        "--resume",
        action="store_true",
        help="keep what is written when it stops, and go on there the next time",
    )
    args = parser.parse_args(words)
    write_episodes(args.out, episodes_of(args), args.episodes_per_file, args.resume)


if __name__ == "__main__":
    main()
