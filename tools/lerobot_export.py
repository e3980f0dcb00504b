"""Episodes as a LeRobot dataset, v3.0, for what trains on such datasets or shows them.

    python -m tools.lerobot export --data data/x --out lerobot/x --image-format video

The camera `image` becomes observation.images.image, `image_NAME` observation.images.NAME; the
numbers are `action` and `observation.state`, float32 as they are. What else an episode may hold
(objects, targets, thoughts, deltas) has no place there and stays behind, which is said.
tools/lerobot.py reads such a folder back, deltas by its flag.

One pass over the episodes: 1. check that they are of one robot, rate and image size 2. each
becomes rows of data/ (and with videos frames of videos/) 3. meta/ says where each begins, and what
the numbers and the pixels are like.
"""

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fast_tokenizer import (
    EpisodeFile,
    encode_frames,
    natural,
    non_negative,
    read_episodes,
    statistics,
    unfinished_folder,
)
from tools.extras import require

IMAGE_FORMATS = {"png": "png", "jpeg": "jpeg 95", "video": None}  # -> fast_tokenizer's codec
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{FILE}.mp4"
EPISODES_PATH = f"meta/episodes/{FILE}.parquet"

# LeRobot's own limits: a file that has reached its size is followed by a new one.
FILES_A_CHUNK = 1000
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200
MB = 1 << 20  # bytes
# LeRobot looks a frame up by its time as float32, within 0.1 ms: from 1,024 s on that cannot hold.
LONGEST_VIDEO = 1000  # s
EPISODES_A_FILE = 10_000  # rows of meta/episodes
FPS_RANGE = (0.01, 1000)

# A key frame every two, so that training can read frames in any order; none that is shown before
# one that is decoded later.
VIDEO_CODEC = "libx264"
VIDEO_OPTIONS = {"crf": "18", "g": "2", "bf": "0", "sc_threshold": "0"}
PIXEL_FORMAT = "yuv420p"

INDEX_COLUMNS = ("frame_index", "episode_index", "index", "task_index")
QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)


def key_of(camera: str) -> str:
    """What LeRobot calls a camera of ours: "image_wrist" -> "observation.images.wrist"."""
    return "observation.images." + camera.removeprefix("image_")


def numbers_of(file: EpisodeFile) -> dict[str, np.ndarray]:
    """LeRobot's names of an episode's numbers -> (T, D). A state of no dimensions is left out."""
    numbers = {"action": file.action}
    if file.state.shape[1]:
        numbers["observation.state"] = file.state
    return numbers


# ---- Checks -------------------------------------------------------------------------------------


def require_packages(image_format: str) -> None:
    """ValueError naming the pip install when a package is missing, or what to use instead when PyAV
    was built without the encoder."""
    require("-r requirements-extras.txt", "pyarrow.parquet")
    if image_format == "video":
        (av,) = require("-r requirements-extras.txt", "av")
        if VIDEO_CODEC not in av.codecs_available:
            raise ValueError(f"av was built without {VIDEO_CODEC}; use --image-format png")


def common_fps(files: list[EpisodeFile], given_fps: float) -> float:
    """The rate of all episodes, given_fps where they do not say it (0: not given). ValueError
    naming the file that has none or another one."""
    fps = files[0].fps or given_fps
    for file in files:
        if not file.fps and not given_fps:
            raise ValueError(f"{file}: its rate is not recorded; give it as --fps")
        if given_fps and file.fps not in (0, given_fps):
            raise ValueError(f"{file}: recorded at {file.fps:g} fps; leave --fps {given_fps:g} out")
        if (file.fps or given_fps) != fps:
            raise ValueError(
                f"{file}: {file.fps:g} fps, {files[0]} has {fps:g}; a dataset has one rate, export "
                "them from folders of their own"
            )
    low, high = FPS_RANGE
    if not low <= fps <= high:
        raise ValueError(f"{files[0]}: {fps:g} fps; {low:g} to {high:g} can be exported")
    return fps


def check_cameras(files: list[EpisodeFile], image_format: str) -> None:
    """ValueError unless all episodes have the same cameras, of sizes that image_format can have."""
    sizes = files[0].image_sizes
    for file in files:
        if file.image_sizes != sizes:
            raise ValueError(
                f"{file}: cameras (height, width) {file.image_sizes}, {files[0]} has {sizes}; a "
                "dataset has one size for each, export them from folders of their own"
            )
    keys = [key_of(camera) for camera in sizes]
    if len(set(keys)) < len(keys) or "/" in "".join(keys):  # as LeRobot wants them
        raise ValueError(
            f"{files[0]}: cameras {', '.join(sizes)} would be {', '.join(keys)}; name them so that "
            "these differ, without a slash"
        )
    for camera, (height, width) in sizes.items():
        if image_format == "video" and (height % 2 or width % 2):
            raise ValueError(
                f"{files[0]}: {camera} is {height} x {width}, videos have even sizes; use "
                "--image-format png"
            )


def left_out(files: list[EpisodeFile]) -> list[str]:
    """Names of what episodes hold that is not exported."""
    names = []
    for name in ("objects", "targets", "thoughts", "object_position", "object_pixel", "hand_pixel"):
        # objects is an empty list, the others None where nothing is known
        if any(getattr(file, name) is not None and len(getattr(file, name)) for file in files):
            names.append(name)
    if any(file.deltas is not None for file in files):
        names.append("deltas")
    return names


# ---- Statistics ---------------------------------------------------------------------------------


def number_stats(values: np.ndarray) -> dict[str, list]:
    """Of values (N, D), those that LeRobot has: lists of D numbers, and the count N."""
    stats = {**statistics(values), "count": [len(values)]}
    for share, row in zip(QUANTILES, np.quantile(values, QUANTILES, axis=0), strict=True):
        stats[f"q{round(100 * share):02d}"] = row.tolist()
    return stats


def count_values(frames: np.ndarray) -> np.ndarray:
    """Frames (T, H, W, 3) -> how often each value occurs in each channel (3, 256)."""
    channels = np.moveaxis(frames, -1, 0).reshape(3, -1)
    return np.stack([np.bincount(channel, minlength=256) for channel in channels])


def pixel_stats(value_counts: np.ndarray, frames: int) -> dict[str, list]:
    """Of so many frames whose values occur so often (3, 256); pixels as 0 .. 1, (3, 1, 1) each."""
    values = np.arange(256) / 255
    pixels = value_counts[0].sum()
    mean = value_counts @ values / pixels  # (3,)
    variance = (value_counts * (values - mean[:, None]) ** 2).sum(1) / pixels
    reached = value_counts.cumsum(1) / pixels  # (3, 256): share of the pixels up to each value
    of_channels = {
        "min": values[(reached > 0).argmax(1)],
        "max": values[(reached >= 1).argmax(1)],
        "mean": mean,
        "std": np.sqrt(variance),
    }
    for share in QUANTILES:
        of_channels[f"q{round(100 * share):02d}"] = values[(reached >= share).argmax(1)]
    stats = {name: row.reshape(3, 1, 1).tolist() for name, row in of_channels.items()}
    return {**stats, "count": [frames]}


# ---- Files --------------------------------------------------------------------------------------


class FileNumber:
    """Counts the files of one kind: chunk-000/file-000 and so on."""

    def __init__(self):
        self.files = 0  # begun

    def begin(self) -> None:
        self.files += 1

    @property
    def columns(self) -> dict[str, int]:
        """Of the file that was begun last."""
        chunk, file = divmod(self.files - 1, FILES_A_CHUNK)
        return {"chunk_index": chunk, "file_index": file}

    def path(self, folder: Path, template: str, **names: str) -> Path:
        path = folder / template.format(**self.columns, **names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class DataFiles:
    """data/: rows of one episode after the other."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.number = FileNumber()
        self.writer = None  # of the file that is being written
        self.size = 0  # of it, bytes before compression

    def add(self, table) -> dict[str, int]:
        """Rows of an episode, a pyarrow.Table -> columns of meta/ that say where they stand."""
        import pyarrow.parquet

        if self.writer is None or self.size + table.nbytes > DATA_FILE_MB * MB:
            self.close()
            self.number.begin()
            path = self.number.path(self.folder, DATA_PATH)
            self.writer = pyarrow.parquet.ParquetWriter(path, table.schema)
            self.size = 0
        self.writer.write_table(table)
        self.size += table.nbytes
        return {f"data/{name}": value for name, value in self.number.columns.items()}

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class VideoFiles:
    """videos/KEY/: frames of one episode after the other."""

    def __init__(self, folder: Path, key: str, fps: float):
        self.folder = folder
        self.key = key
        self.fps = fps
        self.number = FileNumber()
        self.container = None  # of the file that is being written
        self.frames = 0  # in it
        self.size = 0  # of it, bytes

    def add(self, frames: np.ndarray) -> dict[str, float]:
        """Frames (T, H, W, 3) -> columns of meta/ that say where they stand."""
        import av

        if self.container is None or self._is_full(len(frames)):
            self.close()
            self._begin(frames)
        first = self.frames
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts = self.frames
            if self.frames == first:  # so that an episode can be cut out
                frame.pict_type = av.video.frame.PictureType.I
            self._write(self.stream.encode(frame))
            self.frames += 1
        columns = {
            **self.number.columns,
            "from_timestamp": first / self.fps,
            "to_timestamp": self.frames / self.fps,
        }
        return {f"videos/{self.key}/{name}": value for name, value in columns.items()}

    def _is_full(self, more):
        is_long = (self.frames + more) / self.fps > LONGEST_VIDEO
        return is_long or self.size >= VIDEO_FILE_MB * MB

    def _begin(self, frames):
        import av

        self.number.begin()
        path = self.number.path(self.folder, VIDEO_PATH, video_key=self.key)
        self.container = av.open(str(path), "w")
        rate = Fraction(self.fps).limit_denominator(10_000)  # 59.94006: 60000 / 1001
        self.stream = self.container.add_stream(VIDEO_CODEC, rate=rate, options=VIDEO_OPTIONS)
        self.stream.height, self.stream.width = frames.shape[1:3]
        self.stream.pix_fmt = PIXEL_FORMAT
        self.stream.codec_context.time_base = 1 / rate
        self.frames = 0
        self.size = 0

    def _write(self, packets):
        for packet in packets:
            self.size += packet.size
            self.container.mux(packet)

    def close(self) -> None:
        if self.container is not None:
            self._write(self.stream.encode())
            self.container.close()
            self.container = None


# ---- Description of the dataset (meta/) ---------------------------------------------------------


def describe_features(file: EpisodeFile, fps: float, image_format: str) -> dict[str, dict]:
    """ "features" of meta/info.json, as those of `file`."""
    features = {}
    for key, values in numbers_of(file).items():
        dims = values.shape[1]
        name = key.split(".")[-1]
        names = [f"{name}_{i}" for i in range(dims)]
        features[key] = {"dtype": "float32", "shape": [dims], "names": names}
    for camera, (height, width) in file.image_sizes.items():
        feature = {
            "dtype": "video" if image_format == "video" else "image",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
        }
        if image_format == "video":
            feature["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": PIXEL_FORMAT,
                "video.is_depth_map": False,
                "video.fps": fps,
                "video.channels": 3,
                "has_audio": False,
            }
        features[key_of(camera)] = feature
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for key in INDEX_COLUMNS:
        features[key] = {"dtype": "int64", "shape": [1], "names": None}
    return features


def write_tasks(path: Path, tasks: dict[str, int]) -> None:
    """tasks: instruction -> its number. The column `task` is the index of pandas' table, which
    LeRobot asks for the sentence."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"task_index": list(tasks.values()), "task": list(tasks)})
    described = {"name": "task", "field_name": "task", "metadata": None}
    described |= {"pandas_type": "unicode", "numpy_type": "object"}
    numbers = {"name": "task_index", "field_name": "task_index", "metadata": None}
    numbers |= {"pandas_type": "int64", "numpy_type": "int64"}
    pandas_metadata = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [numbers, described],
        "pandas_version": "2.3.0",
    }
    table = table.replace_schema_metadata({"pandas": json.dumps(pandas_metadata)})
    pyarrow.parquet.write_table(table, path)


def write_episode_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """meta/episodes: a row an episode."""
    import pyarrow
    import pyarrow.parquet

    number = FileNumber()
    for start in range(0, len(rows), EPISODES_A_FILE):
        number.begin()
        place = {f"meta/episodes/{name}": value for name, value in number.columns.items()}
        part = [{**row, **place} for row in rows[start : start + EPISODES_A_FILE]]
        path = number.path(folder, EPISODES_PATH)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path)


def write_json(path: Path, record: dict) -> None:
    path.write_text(json.dumps(record, indent=4, ensure_ascii=False), encoding="utf-8")


# ---- Export -------------------------------------------------------------------------------------


def to_table(numbers: dict[str, np.ndarray], images: dict[str, list[bytes]]):
    """An episode's numbers (T, D) and image files (T) -> pyarrow.Table of T rows."""
    import pyarrow

    columns = {}
    for key, values in numbers.items():
        column = pyarrow.array(values.ravel())
        if values.shape[1] > 1:  # LeRobot has single numbers in a plain column
            column = pyarrow.FixedSizeListArray.from_arrays(column, values.shape[1])
        columns[key] = column
    for key, contents in images.items():
        cells = [{"bytes": content, "path": None} for content in contents]
        kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        columns[key] = pyarrow.array(cells, kind)
    return pyarrow.table(columns)


def image_files(frames: np.ndarray, codec: str) -> list[bytes]:
    """Frames (T, H, W, 3) -> each as the content of an image file."""
    arrays, _ = encode_frames(frames, "image", codec)
    content = arrays["image"].tobytes()
    ends = arrays["image.ends"].tolist()
    return [content[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def write_dataset(folder: Path, files: list[EpisodeFile], fps: float, image_format: str) -> None:
    """Fills the new folder. The episodes fit together, see common_fps() and check_cameras()."""
    # 1. where rows and frames go
    (folder / "meta").mkdir(parents=True)
    codec = IMAGE_FORMATS[image_format]
    cameras = files[0].cameras
    data_files = DataFiles(folder)
    video_files = {}
    if codec is None:
        video_files = {camera: VideoFiles(folder, key_of(camera), fps) for camera in cameras}
    tasks = {}
    rows = []  # of meta/episodes
    value_counts = {camera: np.zeros((3, 256), np.int64) for camera in cameras}
    steps = 0

    # 2. episode by episode
    for episode_index, file in enumerate(tqdm(files, "episodes", disable=None)):
        length = len(file)
        task_index = tasks.setdefault(file.task, len(tasks))
        frame_index = np.arange(length)
        columns = {
            **numbers_of(file),
            "timestamp": (frame_index / fps).astype(np.float32)[:, None],
            "frame_index": frame_index[:, None],
            "episode_index": np.full((length, 1), episode_index),
            "index": (steps + frame_index)[:, None],
            "task_index": np.full((length, 1), task_index),
        }
        stats = {key: number_stats(values) for key, values in columns.items()}
        images = {}
        place = {}
        for camera in cameras:
            frames = np.stack([file.frame(t, camera) for t in range(length)])  # (T, H, W, 3)
            counts = count_values(frames)
            value_counts[camera] += counts
            stats[key_of(camera)] = pixel_stats(counts, length)
            if codec is None:
                place |= video_files[camera].add(frames)
            else:
                images[key_of(camera)] = image_files(frames, codec)
        place |= data_files.add(to_table(columns, images))
        row = {"episode_index": episode_index, "tasks": [file.task], "length": length, **place}
        row |= {"dataset_from_index": steps, "dataset_to_index": steps + length}
        for key, of_key in stats.items():
            row |= {f"stats/{key}/{name}": value for name, value in of_key.items()}
        rows.append(row)
        steps += length
    for written in (data_files, *video_files.values()):
        written.close()

    # 3. meta/
    stats = {}
    for key in numbers_of(files[0]):
        values = np.concatenate([numbers_of(file)[key] for file in files])  # (steps, D)
        stats[key] = number_stats(values)
    for camera, counts in value_counts.items():
        stats[key_of(camera)] = pixel_stats(counts, steps)
    info = {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": len(files),
        "total_frames": steps,
        "total_tasks": len(tasks),
        "chunks_size": FILES_A_CHUNK,
        "data_files_size_in_mb": DATA_FILE_MB,
        "video_files_size_in_mb": VIDEO_FILE_MB,
        "fps": int(fps) if fps == int(fps) else fps,
        "splits": {"train": f"0:{len(files)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if codec is None else None,
        "features": describe_features(files[0], fps, image_format),
    }
    write_json(folder / "meta/info.json", info)
    write_json(folder / "meta/stats.json", stats)
    write_tasks(folder / "meta/tasks.parquet", tasks)
    write_episode_rows(folder, rows)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when all went well, and is gone otherwise."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already holds data; name another --out or delete it")
    unfinished = unfinished_folder(folder)
    if unfinished.exists():
        raise ValueError(f"{unfinished}: another export writes there, or delete it")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.replace(folder.resolve())
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.lerobot export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", required=True, help="folder of episodes, or holding episodes/")
    add("--out", required=True, help="folder for meta/, data/ and perhaps videos/")
    add(
        "--image-format",
        choices=IMAGE_FORMATS,
        default="png",
        help="png: loses nothing; jpeg: quality 95; video: H.264, the smallest (png)",
    )
    add("--fps", type=non_negative, default=0, help="rate of episodes that do not record it")
    add("--max-episodes", type=natural, default=0, help="only the first ones; 0: all")
    args = parser.parse_args(argv)

    try:
        require_packages(args.image_format)
        files = read_episodes(args.data, args.max_episodes)
        fps = common_fps(files, args.fps)
        check_cameras(files, args.image_format)
        with new_folder(Path(args.out)) as folder:
            write_dataset(folder, files, fps, args.image_format)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    names = left_out(files)
    if names:
        print(f"left out, LeRobot has no place for it: {', '.join(names)}")
    print(f"{args.out}: {len(files)} episodes of {sum(len(file) for file in files)} steps")
