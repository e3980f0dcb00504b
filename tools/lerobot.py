"""LeRobot datasets, v2.1 and v3.0, as episodes: BridgeV2, DROID and LIBERO are published so.

    python -m tools.lerobot --data FOLDER --out data/x --camera observation.images.front \\
        --action action --state observation.state --fps 5 --deltas 6

The first camera is `image`, a further one `image_<last part of its name>`; keys are put side by
side. --fps keeps the first image and state of each interval, and the last value of the action, but
the sum of its first --deltas dimensions. Where the task changes, a new episode begins.
"""

import argparse
import functools
import io
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from fast_tokenizer import reading, write_episodes
from tools.extras import require


@functools.lru_cache(2)  # a file of v3.0 holds many episodes
def parquet(path):
    import pyarrow.parquet

    with reading(path):
        return pyarrow.parquet.read_table(path)


def rows(path):
    """Rows of a file of meta/: .json (one), .jsonl or .parquet."""
    if path.suffix == ".parquet":
        return parquet(path).to_pylist()
    with reading(path):
        text = path.read_text()
        return [json.loads(x) for x in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def film(path, times, fps):
    """Frames of a video at ascending times, in seconds -> list of (H, W, 3) uint8."""
    import av

    images = []
    with reading(path, av.error.FFmpegError), av.open(str(path)) as file:
        stream = file.streams.video[0]
        file.seek(int(times[0] / stream.time_base), stream=stream)  # the key frame before it
        for frame in file.decode(stream):
            if abs(frame.time - times[len(images)]) < 0.25 / fps:
                images.append(frame.to_ndarray(format="rgb24"))
            if len(images) == len(times):
                return images
        raise ValueError(f"no frame at {times[len(images)]:.3f} s: cut short, or not {fps:g} fps")


def check(stats, values):
    """ValueError unless values {key: (N, D)} have the least, largest and mean ones of stats."""
    for key, x in values.items():
        for name in ("min", "max", "mean"):
            want, have = np.ravel(stats[key][name]), getattr(x.astype(np.float64), name)(0)  # (D,)
            if want.shape != have.shape or (abs(want - have) > 1e-3 * np.ptp(x, 0) + 1e-4).any():
                raise ValueError(f"{name} of {key} is {have.round(4)}, meta/ says {want.round(4)}")


def thin(action, every, deltas):
    """Actions (T, A) -> one for `every` steps: `deltas` dimensions added up, else the last."""
    starts = np.arange(0, len(action), every)
    last = action[np.minimum(starts + every, len(action)) - 1]  # (T / every, A)
    return np.concatenate([np.add.reduceat(action[:, :deltas], starts), last[:, deltas:]], 1)


def place(info, row, prefix):
    """Path of an episode's data ("data") or of a camera's video ("videos/KEY"), in its folder."""
    number, (kind, _, key) = row["episode_index"], prefix.partition("/")
    at = {k: row.get(f"{prefix}/{k}") for k in ("chunk_index", "file_index")}
    return info[f"{kind.rstrip('s')}_path"].format(
        video_key=key, episode_index=number, episode_chunk=number // info["chunks_size"], **at
    )


def recording(folder, info, row, cameras, keys, every):
    """One recorded episode -> {key: (T, D)}, [images of every n-th step] of each camera, tasks."""
    table, views = parquet(folder / place(info, row, "data")), []
    mine = np.flatnonzero(np.array(table["episode_index"]) == row["episode_index"])
    table = table.take(mine)
    if table["frame_index"].to_pylist() != list(range(row["length"])):
        raise ValueError(f"{len(mine)} rows, not frames 0 to {row['length'] - 1} as meta/ says")
    for key in cameras:
        if info["features"][key]["dtype"] == "video":
            start = row.get(f"videos/{key}/from_timestamp", 0)
            times = start + np.array(table["timestamp"], float)[::every]
            view = film(folder / place(info, row, f"videos/{key}"), times, info["fps"])
        else:
            files = [io.BytesIO(cell["bytes"]) for cell in table[key].to_pylist()[::every]]
            view = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        for t, image in enumerate(view):
            if sorted(image.shape) != sorted(info["features"][key]["shape"]):
                raise ValueError(f"image {t} of {key} is {image.shape}, not as info.json says")
        views.append(np.stack(view))
    values = {k: np.array(table[k].to_pylist(), np.float32).reshape(len(mine), -1) for k in keys}
    return values, views, table["task_index"].to_pylist()[::every]


def recordings(args):
    """A dataset's episodes as (arrays, header). Damaged, naming what is wrong with it."""
    require("-r requirements-extras.txt", "av", "pyarrow.parquet")
    folder, meta, seen = Path(args.data), Path(args.data) / "meta", []
    cameras, actions, states = (x.split(",") for x in (args.camera, args.action, args.state))
    keys = [*actions, *states]
    names = ["image", *("image_" + key.split(".")[-1] for key in cameras[1:])]
    with reading(meta / "info.json"):
        info = rows(meta / "info.json")[0]
        v3, fps = {"v2.1": False, "v3.0": True}[info["codebase_version"]], info["fps"]
        if missing := {*cameras, *keys} - set(info["features"]):
            raise ValueError(f"no {', '.join(missing)} among {', '.join(info['features'])}")
        every = round(fps / args.fps) if args.fps else 1
        if len(set(names)) < len(names) or every < 1 or args.fps and fps != every * args.fps:
            raise ValueError(f"--fps {args.fps:g} does not divide its {fps}, or cameras end alike")
    with reading(meta):
        end = "parquet" if v3 else "jsonl"
        tasks = {r.pop("task_index"): next(iter(r.values())) for r in rows(meta / f"tasks.{end}")}
        files = sorted(meta.glob("episodes/*/*.parquet" if v3 else "episodes.jsonl"))
        todo = [row for file in files for row in rows(file)][: args.limit or None]
        stats = (
            rows(meta / "stats.json")[0]
            if v3
            else {r["episode_index"]: r["stats"] for r in rows(meta / "episodes_stats.jsonl")}
        )
    for row in todo:
        source, end = f"{folder}: episode {row['episode_index']}", 0
        with reading(source):
            values, views, numbers = recording(folder, info, row, cameras, keys, every)
            seen.append(values)
            if not v3:
                check(stats[row["episode_index"]], values)
            state, action = (np.hstack([values[k] for k in part]) for part in (states, actions))
            arrays = {"state": state[::every], "action": thin(action, every, args.deltas)}
            arrays |= zip(names, views)
            texts = [tasks[number] for number in numbers]
            if not all(map(str.strip, texts)):
                raise ValueError("an empty instruction in meta/tasks")
        for text, steps in itertools.groupby(texts):
            start, end = end, end + len(list(steps))
            yield (
                {k: v[start:end] for k, v in arrays.items()},
                {"task": text, "fps": f"{fps / every:g}", "source": source},
            )
    if v3 and seen and not args.limit:
        with reading(folder):
            check(stats, {key: np.concatenate([v[key] for v in seen]) for key in seen[0]})


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.lerobot", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, help="folder with meta/, data/ and perhaps videos/")
    add("--out", required=True, help="folder for the episodes")
    add("--camera", required=True, help="image keys, separated by commas")
    add("--action", default="action", help="action keys, separated by commas")
    add("--state", default="observation.state", help="state keys, separated by commas")
    add("--fps", type=float, default=0, help="steps a second to keep; 0: all")
    add("--deltas", type=int, default=0, help="first action dimensions that are movements a step")
    add("--limit", type=int, default=0, help="first recordings only, global statistics unchecked")
    args = parser.parse_args(argv)
    write_episodes(args.out, recordings(args))


if __name__ == "__main__":
    main()
