"""LeRobot datasets, v2.1 and v3.0, as episodes: BridgeV2, DROID and LIBERO are published so.

    python -m tools.lerobot --data FOLDER --out data/x --camera observation.images.front \\
        --action action --state observation.state --fps 5 --deltas 6

The first camera is `image`, a further one `image_<last part of its name>`; keys are put side by
side. --fps keeps the first image and state of each interval, and the last value of the action, but
the sum of its first --deltas dimensions. Where the task changes, a new episode begins.

A dataset is a folder: meta/ describes it, data/ holds all numbers (and images, if they are PNG) as
parquet, videos/ the images as MP4. v2.1 has a file a recording, v3.0 joins recordings to files.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fast_tokenizer import read_image, reading, write_episodes
from tools.extras import require

IS_V3 = {"v2.1": False, "v3.0": True}


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
        further = ["image_" + key.split(".")[-1] for key in self.cameras[1:]]
        return ["image", *further]


@dataclass(frozen=True)
class Dataset:
    """What meta/ says of a dataset."""

    folder: Path
    info: dict  # meta/info.json
    is_v3: bool
    tasks: dict[int, str]  # task number -> instruction
    episodes: list[dict]  # a row for each recording that is converted
    # v3.0: key -> {"min", "max", "mean"} over the whole dataset; v2.1: the same for each recording,
    # by its number
    stats: dict


@dataclass(frozen=True)
class Recording:
    """One recorded episode of T steps, of which every n-th is looked at."""

    numbers: dict[str, np.ndarray]  # key -> (T, D) float32, at all steps
    views: list[np.ndarray]  # for each camera (T / n, H, W, 3) uint8
    task_numbers: list[int]  # T / n


# ---- Files --------------------------------------------------------------------------------------


@functools.lru_cache(2)  # a file of v3.0 holds many episodes
def read_parquet(path: Path):
    """-> pyarrow.Table."""
    import pyarrow.parquet

    with reading(path):
        return pyarrow.parquet.read_table(path)


def read_rows(path: Path) -> list[dict]:
    """Rows of a file of meta/: .json (one), .jsonl or .parquet."""
    if path.suffix == ".parquet":
        return read_parquet(path).to_pylist()
    with reading(path):
        text = path.read_text()
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return [json.loads(text)]


def read_video(path: Path, times: np.ndarray, fps: float) -> list[np.ndarray]:
    """Frames of a video at ascending times, in seconds -> list of (H, W, 3) uint8."""
    import av

    images = []
    with reading(path, av.error.FFmpegError), av.open(str(path)) as file:
        stream = file.streams.video[0]
        file.seek(int(times[0] / stream.time_base), stream=stream)  # the key frame before it
        for frame in file.decode(stream):
            wanted = times[len(images)]
            if abs(frame.time - wanted) < 0.25 / fps:
                images.append(frame.to_ndarray(format="rgb24"))
            if len(images) == len(times):
                return images
        missing = times[len(images)]
        raise ValueError(f"no frame at {missing:.3f} s: cut short, or not {fps:g} fps")


def read_images(cells: list[dict]) -> list[np.ndarray]:
    """Cells of an image column, each a PNG or JPEG -> list of (H, W, 3) uint8."""
    images = []
    for cell in cells:
        images.append(read_image(cell["bytes"], cell.get("path") or "image"))
    return images


def file_of(dataset: Dataset, episode: dict, column: str = "data") -> Path:
    """Where the rows of a recording stand, or the video of a camera (column "videos/KEY").

    info.json has a template for each version:
    v2.1: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    v3.0: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", whose numbers stand in the
    row of the recording as "data/chunk_index", "data/file_index"."""
    kind, _, key = column.partition("/")
    template = dataset.info["data_path" if kind == "data" else "video_path"]
    number = episode["episode_index"]
    path = template.format(
        video_key=key,
        episode_index=number,
        episode_chunk=number // dataset.info["chunks_size"],
        chunk_index=episode.get(f"{column}/chunk_index"),
        file_index=episode.get(f"{column}/file_index"),
    )
    return dataset.folder / path


# ---- Description of the dataset (meta/) ---------------------------------------------------------


def read_dataset(folder: Path, columns: Columns, fps: float, max_episodes: int) -> Dataset:
    """Reads meta/ and checks the flags against it. Damaged, naming what does not fit."""
    meta = folder / "meta"
    with reading(meta / "info.json"):
        info = read_rows(meta / "info.json")[0]
        is_v3 = IS_V3[info["codebase_version"]]
        check_flags(info, columns, fps)
    with reading(meta):
        if is_v3:
            tasks = read_tasks(meta / "tasks.parquet")
            paths = sorted(meta.glob("episodes/*/*.parquet"))
            stats = read_rows(meta / "stats.json")[0]
        else:
            tasks = read_tasks(meta / "tasks.jsonl")
            paths = sorted(meta.glob("episodes.jsonl"))
            rows = read_rows(meta / "episodes_stats.jsonl")
            stats = {row["episode_index"]: row["stats"] for row in rows}
        episodes = []
        for path in paths:
            episodes += read_rows(path)
    if max_episodes:
        episodes = episodes[:max_episodes]
    return Dataset(folder, info, is_v3, tasks, episodes, stats)


def read_tasks(path: Path) -> dict[int, str]:
    """Task number -> instruction, whose column the two versions name differently."""
    tasks = {}
    for row in read_rows(path):
        number = row.pop("task_index")
        tasks[number] = next(iter(row.values()))
    return tasks


def steps_apart(recorded_fps: float, fps: float) -> int:
    """How many recorded steps lie between two that are kept; fps 0: all are."""
    return round(recorded_fps / fps) if fps else 1


# ---- Checks -------------------------------------------------------------------------------------


def check_flags(info: dict, columns: Columns, fps: float) -> None:
    """ValueError when the dataset lacks a column, or --fps does not divide its own."""
    recorded_fps = info["fps"]
    missing = {*columns.cameras, *columns.numbers} - set(info["features"])
    if missing:
        raise ValueError(f"no {', '.join(missing)} among {', '.join(info['features'])}")
    every = steps_apart(recorded_fps, fps)
    divides = every >= 1 and (not fps or recorded_fps == every * fps)
    names = columns.image_names
    if not divides or len(set(names)) < len(names):
        raise ValueError(f"--fps {fps:g} does not divide its {recorded_fps}, or cameras end alike")


def check_stats(stats: dict, numbers: dict[str, np.ndarray]) -> None:
    """ValueError unless numbers {key: (N, D)} have the least, largest and mean ones of stats."""
    for key, values in numbers.items():
        tolerance = 1e-3 * np.ptp(values, 0) + 1e-4  # (D,)
        exact = values.astype(np.float64)
        found = {"min": exact.min(0), "max": exact.max(0), "mean": exact.mean(0)}  # (D,) each
        for name, have in found.items():
            want = np.ravel(stats[key][name])
            if want.shape != have.shape or (abs(want - have) > tolerance).any():
                raise ValueError(f"{name} of {key} is {have.round(4)}, meta/ says {want.round(4)}")


def check_view(view: list[np.ndarray], key: str, info: dict) -> None:
    """ValueError for an image of another shape than info.json says, which may name it (C, H, W)."""
    for t, image in enumerate(view):
        if sorted(image.shape) != sorted(info["features"][key]["shape"]):
            raise ValueError(f"image {t} of {key} is {image.shape}, not as info.json says")


# ---- Recordings ---------------------------------------------------------------------------------


def read_recording(dataset: Dataset, episode: dict, columns: Columns, every: int) -> Recording:
    """One recording, images and tasks at every `every`-th step. ValueError if frames are missing,
    out of order or of another shape than meta/ says."""
    # 1. its rows, of a table that may hold others too
    table = read_parquet(file_of(dataset, episode))
    is_ours = np.array(table["episode_index"]) == episode["episode_index"]
    table = table.take(np.flatnonzero(is_ours))
    T = len(table)
    if table["frame_index"].to_pylist() != list(range(episode["length"])):
        raise ValueError(f"{T} rows, not frames 0 to {episode['length'] - 1} as meta/ says")

    # 2. images
    views = []
    for key in columns.cameras:
        if dataset.info["features"][key]["dtype"] == "video":
            column = f"videos/{key}"
            start = episode.get(f"{column}/from_timestamp", 0)  # v3.0: within the joined video
            times = start + np.array(table["timestamp"], float)[::every]
            path = file_of(dataset, episode, column)
            view = read_video(path, times, dataset.info["fps"])
        else:
            view = read_images(table[key].to_pylist()[::every])
        check_view(view, key, dataset.info)
        views.append(np.stack(view))  # (T / every, H, W, 3)

    # 3. numbers and tasks
    numbers = {}
    for key in columns.numbers:
        numbers[key] = np.array(table[key].to_pylist(), np.float32).reshape(T, -1)  # (T, D)
    return Recording(numbers, views, table["task_index"].to_pylist()[::every])


def thin(actions: np.ndarray, every: int, deltas: int) -> np.ndarray:
    """Actions (T, A) -> one for `every` steps (ceil(T / every), A): the first `deltas` dimensions
    added up, of the others the last value.

    Two dimensions, the first a movement, every 2: [[1, 5], [2, 6], [3, 7]] -> [[3, 6], [3, 7]]."""
    starts = np.arange(0, len(actions), every)
    ends = np.minimum(starts + every, len(actions))
    sums = np.add.reduceat(actions[:, :deltas], starts)
    last = actions[ends - 1]
    return np.concatenate([sums, last[:, deltas:]], 1)


def episode_arrays(
    recording: Recording, columns: Columns, every: int, deltas: int
) -> dict[str, np.ndarray]:
    """The arrays of an episode, T / every steps of each, as fast_tokenizer.py describes them."""
    state = np.hstack([recording.numbers[key] for key in columns.states])  # (T, S)
    action = np.hstack([recording.numbers[key] for key in columns.actions])  # (T, A)
    views = dict(zip(columns.image_names, recording.views, strict=True))
    return {"state": state[::every], "action": thin(action, every, deltas), **views}


def episodes_of(
    folder: Path, columns: Columns, fps: float = 0, deltas: int = 0, max_episodes: int = 0
) -> Iterator[tuple[dict, dict]]:
    """A dataset's episodes as (arrays, header), for write_episodes. The flags are those of main().
    Damaged, naming what is wrong with it."""
    require("-r requirements-extras.txt", "av", "pyarrow.parquet")
    dataset = read_dataset(folder, columns, fps, max_episodes)
    every = steps_apart(dataset.info["fps"], fps)
    all_numbers = []
    for episode in dataset.episodes:
        source = f"{folder}: episode {episode['episode_index']}"
        # 1. read
        with reading(source):
            recording = read_recording(dataset, episode, columns, every)
            all_numbers.append(recording.numbers)
            if not dataset.is_v3:
                check_stats(dataset.stats[episode["episode_index"]], recording.numbers)
            arrays = episode_arrays(recording, columns, every, deltas)
            instructions = [dataset.tasks[number] for number in recording.task_numbers]
            if not all(text.strip() for text in instructions):
                raise ValueError("an empty instruction in meta/tasks")

        # 2. cut where the instruction changes
        end = 0
        for instruction, steps in itertools.groupby(instructions):
            start = end
            end = start + len(list(steps))
            header = {"task": instruction, "fps": f"{dataset.info['fps'] / every:g}"}
            piece = {name: array[start:end] for name, array in arrays.items()}
            yield piece, header | {"source": source}

    # 3. the statistics of v3.0 are those of the whole dataset
    if dataset.is_v3 and all_numbers and not max_episodes:
        with reading(folder):
            whole = {}
            for key in columns.numbers:
                whole[key] = np.concatenate([numbers[key] for numbers in all_numbers])
            check_stats(dataset.stats, whole)


# ---- Command line -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
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
    add("--fps", type=float, default=0, help="steps a second to keep; 0: all")
    add("--deltas", type=int, default=0, help="first action dimensions that are movements a step")
    add(
        "--max-episodes",
        type=int,
        default=0,
        help="only the first recordings, global statistics unchecked; 0: all",
    )
    args = parser.parse_args(argv)
    columns = Columns(args.camera.split(","), args.action.split(","), args.state.split(","))
    write_episodes(
        args.out,
        episodes_of(Path(args.data), columns, args.fps, args.deltas, args.max_episodes),
    )


if __name__ == "__main__":
    main()
