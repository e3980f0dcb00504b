"""LeRobot datasets, v2.1 and v3.0, as episodes: BridgeV2, DROID and LIBERO are published so.

    python -m benchmarks.lerobot --data FOLDER --out data/x --camera observation.images.front \\
        --action action --state observation.state --fps 5 --deltas 6

Images come from parquet columns or from mp4. Several cameras or keys are separated by commas: the
first camera is `image`, a further one `image_<last part of its name>`; keys are put side by side.
--fps thins the steps out: of each interval it keeps the first image and state, and the last value
of the action, but the sum of its first --deltas dimensions, which are movements. Where the task
changes within a recording, a new episode begins. Statistics are checked against those in meta/.
"""

import argparse
import functools
import importlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.tabletop import write_episodes

AGAIN = "download the dataset again"
PINS = {"pyarrow": "pyarrow==26.0.1", "av": "av==18.1.0"}


def extra(name):
    """An optional package. ImportError naming what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        pin = PINS[name.split(".")[0]]
        raise ImportError(f"{name} is not installed; pip install {pin}") from e


@functools.lru_cache(2)  # a file of v3.0 holds many episodes
def parquet(path):
    """A parquet file as a table. ValueError when it is none."""
    try:
        return extra("pyarrow.parquet").read_table(path)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path}: no such file; {AGAIN}") from e
    except (extra("pyarrow").ArrowException, OSError) as e:
        why = str(e).split("\n")[0]
        raise ValueError(f"{path}: not a complete parquet file ({why}); {AGAIN}") from e


def rows(path):
    """Rows of a .json (one), .jsonl or .parquet file of meta/."""
    if path.suffix == ".parquet":
        return parquet(path).to_pylist()
    try:
        text = path.read_text()
        return [json.loads(x) for x in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path}: no such file; give a LeRobot folder as --data") from e
    except ValueError as e:
        raise ValueError(f"{path}: not JSON ({e}); {AGAIN}") from e


def still(cell, folder):
    """A cell of an image column, {"bytes", "path"} -> (H, W, 3) uint8."""
    file = io.BytesIO(cell["bytes"]) if cell["bytes"] else folder / cell["path"]
    return np.asarray(Image.open(file).convert("RGB"))


def film(path, times, fps):
    """Frames of a video at ascending times, s -> list of (H, W, 3) uint8."""
    av, images = extra("av"), []
    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            file.seek(int(times[0] / stream.time_base), stream=stream)  # the key frame before it
            for frame in file.decode(stream):
                if abs(frame.time - times[len(images)]) < 0.25 / fps:
                    images.append(frame.to_ndarray(format="rgb24"))
                if len(images) == len(times):
                    return images
    except (av.error.FFmpegError, IndexError) as e:
        raise ValueError(f"{path}: does not decode after {len(images)} frames ({e}); {AGAIN}") from e
    raise ValueError(f"{path}: no frame at {times[len(images)]:.3f} s; it is cut short or not of "
                     f"{fps:g} frames a second, {AGAIN}")


def numbers(table, key):
    """A column -> (T, D) float32."""
    x = np.array(table[key].to_pylist(), np.float32)
    return x.reshape(len(x), -1)


def check(where, stats, key, x):
    """ValueError unless x (N, D) has the least, largest and mean values that stats[key] records."""
    for name in ("min", "max", "mean"):
        want, have = np.ravel(stats[key][name]), getattr(x.astype(np.float64), name)(0)  # (D,)
        if want.shape != have.shape or (abs(want - have) > 1e-3 * np.ptp(x, 0) + 1e-4).any():
            raise ValueError(f"{where}: {name} of {key} is {have.round(4)}, meta/ says "
                             f"{want.round(4)}; data and meta/ do not belong together, {AGAIN}")


def thin(action, every, deltas):
    """Actions (T, A) -> one an interval of `every` steps: `deltas` dimensions added up, else last."""
    starts = np.arange(0, len(action), every)
    last = action[np.minimum(starts + every, len(action)) - 1]  # (T / every, A)
    return np.concatenate([np.add.reduceat(action[:, :deltas], starts), last[:, deltas:]], 1)


def place(info, row, prefix):
    """Path of an episode's data ("data") or of a camera's video ("videos/KEY"), in its folder."""
    number, kind = row["episode_index"], prefix.split("/")[0].rstrip("s")
    at = {k: row[f"{prefix}/{k}"] for k in ("chunk_index", "file_index") if f"{prefix}/{k}" in row}
    return info[f"{kind}_path"].format(video_key=prefix.partition("/")[2], episode_index=number,
                                       episode_chunk=number // info.get("chunks_size", 1000), **at)


def recording(folder, info, row, cameras, keys, every):
    """One recorded episode -> {key: (T, D)}, {camera: images of each `every`-th step}, tasks (T,)."""
    path, number = folder / place(info, row, "data"), row["episode_index"]
    table, where = parquet(path), f"{path}: episode {number}"
    mine, views, t = np.flatnonzero(np.array(table["episode_index"]) == number), {}, 0
    if not len(mine) or len(mine) != row["length"]:
        raise ValueError(f"{where}: {len(mine)} rows, meta/ says {row['length']}; {AGAIN}")
    table = table.slice(mine[0], len(mine))
    if (np.array(table["frame_index"]) != np.arange(len(mine))).any():
        raise ValueError(f"{where}: its rows are not in order; {AGAIN}")
    try:
        values = {key: numbers(table, key) for key in keys}
        for key in cameras:
            if info["features"][key]["dtype"] == "video":
                start = row.get(f"videos/{key}/from_timestamp", 0)
                times = np.array(table["timestamp"], float)[::every] + start
                views[key] = film(folder / place(info, row, f"videos/{key}"), times, info["fps"])
            else:
                views[key] = [still(cell, folder) for cell in table[key].to_pylist()[::every]]
            for t, image in enumerate(views[key]):
                if sorted(image.shape) != sorted(info["features"][key]["shape"]):
                    raise ValueError(f"image {t} of {key} is {image.shape}")
    except (ValueError, TypeError, OSError) as e:
        where = "" if str(e).startswith(str(folder)) else f"{where}: not as meta/info.json says: "
        raise ValueError(f"{where}{e}" + (f"; {AGAIN}" if where else "")) from e
    return values, views, np.array(table["task_index"])


def recordings(args):
    """A dataset's episodes as (arrays, header). ValueError naming what is wrong with it."""
    folder, where = Path(args.data), Path(args.data) / "meta" / "info.json"
    actions, states = args.action.split(","), args.state.split(",")
    try:
        info = rows(where)[0]
        version, fps, features = info["codebase_version"], info["fps"], info["features"]
        if version not in ("v2.1", "v3.0"):
            raise ValueError(f"{where}: {version}; convert it to v2.1 or v3.0")
        v3, every = version == "v3.0", round(fps / args.fps) if args.fps else 1
        if every < 1 or args.fps and abs(fps - every * args.fps) > 1e-6:
            raise ValueError(f"--fps {args.fps:g} does not divide the {fps} of {folder}")
        cameras = args.camera.split(",") if args.camera else [
            k for k, v in features.items() if v["dtype"] in ("image", "video")][:1]
        if missing := [k for k in (*cameras, *actions, *states) if k not in features]:
            raise ValueError(f"{where}: no {missing[0]}; choose among {', '.join(features)}")
        where = folder / "meta" / ("tasks.parquet" if v3 else "tasks.jsonl")
        tasks = {r.pop("task_index"): next(iter(r.values())) for r in rows(where)}
        where = folder / "meta" / ("stats.json" if v3 else "episodes_stats.jsonl")
        stats = rows(where)[0] if v3 else {r["episode_index"]: r["stats"] for r in rows(where)}
        where = folder / "meta" / ("episodes" if v3 else "episodes.jsonl")
        files = sorted(where.glob("*/*.parquet")) if v3 else [where]
        todo = [row for file in files for row in rows(file)]
        seen = {key: [] for key in (*actions, *states)}
        for row in todo[: args.limit or None]:
            values, views, task = recording(folder, info, row, cameras, seen, every)
            where = f"{folder}: episode {row['episode_index']}"
            for key, x in values.items():
                seen[key].append(x)
                if not v3:
                    check(where, stats[row["episode_index"]], key, x)
            action = np.concatenate([values[k] for k in actions], 1)
            arrays = {"state": np.concatenate([values[k] for k in states], 1)[::every],
                      "action": thin(action, every, args.deltas)}
            for key, images in views.items():
                name = "image" if key == cameras[0] else "image_" + key.split(".")[-1]
                arrays[name] = np.stack(images)
            task = task[::every]
            for run in np.split(np.arange(len(task)), np.flatnonzero(np.diff(task)) + 1):
                if not str(text := tasks[int(task[run[0]])]).strip():
                    raise ValueError(f"{where}: an empty instruction; repair meta/tasks")
                yield ({k: v[run] for k, v in arrays.items()},
                       {"task": text, "fps": f"{fps / every:g}", "source": where})
        for key in seen if v3 and not args.limit else ():
            check(folder, stats, key, np.concatenate(seen[key]))
    except KeyError as e:
        raise ValueError(f"{where}: no {e} in it; {AGAIN}") from e


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lerobot", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, help="folder with meta/, data/ and perhaps videos/")
    add("--out", required=True, help="folder for the episodes")
    add("--camera", default="", help="image keys, separated by commas; empty: the first one")
    add("--action", default="action", help="action keys, separated by commas")
    add("--state", default="observation.state", help="state keys, separated by commas")
    add("--fps", type=float, default=0, help="steps a second to keep; 0: all")
    add("--deltas", type=int, default=0, help="first action dimensions that are movements a step")
    add("--limit", type=int, default=0, help="first recordings only, global statistics unchecked")
    args = parser.parse_args(argv)
    write_episodes(args.out, recordings(args))


if __name__ == "__main__":
    main()
