"""LeRobot folders of all versions, written here as the public format says, become our episodes."""

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

import fast_tokenizer
from tools import lerobot

pa = pytest.importorskip("pyarrow", reason="pip install pyarrow: see requirements-extras.txt")
pq = pytest.importorskip("pyarrow.parquet")
av = pytest.importorskip("av", reason="pip install av: see requirements-extras.txt")

FPS = 10
LENGTHS = (9, 12)  # of the two recordings, steps
SIDE = 32  # of the images, pixels
CAMERA = "observation.images.front"
WRIST = "observation.images.wrist"
NUMBERS = ("observation.state", "action", "gripper")
TASKS = ["put the cup down", "close the drawer"]


# ---- A dataset ----------------------------------------------------------------------------------


def pictures(episode):
    """Frames that show their own number: a grey level per step."""
    levels = 20 + 15 * np.arange(LENGTHS[episode]) + 5 * episode
    return np.tile(levels[:, None, None, None], (1, SIDE, SIDE, 3)).astype(np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return {"bytes": file.getvalue(), "path": "x.png"}


def columns_of(episode, video):
    """The table of a recording; its front camera stands in a video, or in it as PNG."""
    length = LENGTHS[episode]
    first = sum(LENGTHS[:episode])
    rng = np.random.default_rng(episode)
    columns = {
        "observation.state": rng.normal(size=(length, 3)).astype(np.float32).tolist(),
        "action": rng.normal(size=(length, 4)).astype(np.float32).tolist(),
        "gripper": rng.integers(0, 2, length).astype(np.float32).tolist(),
        "timestamp": (np.arange(length) / FPS).astype(np.float32).tolist(),
        "frame_index": list(range(length)),
        "episode_index": [episode] * length,
        "index": list(range(first, first + length)),
        "task_index": [1 - episode] * length,
    }
    if not video:
        columns[CAMERA] = [png(image) for image in pictures(episode)]
    columns[WRIST] = [png(255 - image) for image in pictures(episode)]
    return columns


def joined(tables):
    """Two recordings in one table."""
    return {key: tables[0][key] + tables[1][key] for key in tables[0]}


def statistics_of(columns):
    stats = {}
    for key in NUMBERS:
        values = np.array(columns[key], np.float64).reshape(len(columns[key]), -1)
        stats[key] = {
            "min": values.min(0).tolist(),
            "max": values.max(0).tolist(),
            "mean": values.mean(0).tolist(),
            "std": values.std(0).tolist(),
            "count": [len(values)],
        }
    return stats


def write_video(path, images, codec="mpeg4", options=None, gop=4, times=None):
    """times: when each image is shown, in frames; by default 0, 1, 2, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=FPS, options=options or {})
        stream.width = SIDE
        stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        stream.gop_size = gop  # a key frame every so many: reading must seek
        for t, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts = t if times is None else times[t]
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def write_table(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(folder, version, video=True, change=None):
    """A dataset of two recordings. change: a function that changes the columns of the second, of
    which meta/ knows nothing. -> the columns of both."""
    meta = folder / "meta"
    meta.mkdir(parents=True)
    tables = [columns_of(episode, video) for episode in (0, 1)]
    stats = [statistics_of(columns) for columns in tables]
    stats_of_both = statistics_of(joined(tables))
    if change:
        change(tables[1])
    image = {"dtype": "image", "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channel"]}
    info = {
        "codebase_version": version,
        "fps": FPS,
        "chunks_size": 1000,
        "total_episodes": 2,
        "features": {
            "observation.state": {"dtype": "float32", "shape": [3]},
            "action": {"dtype": "float32", "shape": [4]},
            "gripper": {"dtype": "float32", "shape": [1]},
            CAMERA: {**image, "dtype": "video" if video else "image"},
            WRIST: image,
        },
    }
    episodes = []
    for e in (0, 1):
        labels = sorted({TASKS[number] for number in tables[e]["task_index"]})
        episodes.append({"episode_index": e, "tasks": labels, "length": LENGTHS[e]})
    if version.startswith("v2"):
        write_v2(folder, info, tables, episodes, stats, video)
        if version == "v2.0":  # one statistics of the whole, as v3.0 has again
            (meta / "episodes_stats.jsonl").unlink()
            (meta / "stats.json").write_text(json.dumps(stats_of_both))
    else:
        write_v3(folder, info, tables, episodes, stats_of_both, video)
    (meta / "info.json").write_text(json.dumps(info))
    return tables


def write_v2(folder, info, tables, episodes, stats, video):
    """A file a recording; meta/ in lines of JSON. Adds its paths to info."""
    meta = folder / "meta"
    chunk = "chunk-{episode_chunk:03d}"
    info["data_path"] = f"data/{chunk}/episode_{{episode_index:06d}}.parquet"
    info["video_path"] = f"videos/{chunk}/{{video_key}}/episode_{{episode_index:06d}}.mp4"
    for e in (0, 1):
        write_table(folder / f"data/chunk-000/episode_{e:06d}.parquet", tables[e])
        if video:
            write_video(folder / f"videos/chunk-000/{CAMERA}/episode_{e:06d}.mp4", pictures(e))
    tasks = [{"task_index": number, "task": text} for number, text in enumerate(TASKS)]
    write_lines(meta / "tasks.jsonl", tasks)
    write_lines(meta / "episodes.jsonl", episodes)
    stats_rows = [{"episode_index": e, "stats": stats[e]} for e in (0, 1)]
    write_lines(meta / "episodes_stats.jsonl", stats_rows)


def write_v3(folder, info, tables, episodes, stats, video):
    """Both recordings in one file; meta/ in parquet. Adds its paths to info."""
    meta = folder / "meta"
    file = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    info["data_path"] = f"data/{file}.parquet"
    info["video_path"] = f"videos/{{video_key}}/{file}.mp4"
    write_table(folder / "data/chunk-000/file-000.parquet", joined(tables))
    for e, episode in enumerate(episodes):
        episode["data/chunk_index"] = 0
        episode["data/file_index"] = 0
        if video:
            episode[f"videos/{CAMERA}/chunk_index"] = 0
            episode[f"videos/{CAMERA}/file_index"] = 0
            episode[f"videos/{CAMERA}/from_timestamp"] = e * LENGTHS[0] / FPS
    if video:
        images = np.concatenate([pictures(0), pictures(1)])
        write_video(folder / f"videos/{CAMERA}/chunk-000/file-000.mp4", images)
    write_table(meta / "tasks.parquet", {"task_index": [0, 1], "__index_level_0__": TASKS})
    rows = {key: [episode[key] for episode in episodes] for key in episodes[0]}
    write_table(meta / "episodes/chunk-000/file-000.parquet", rows)
    (meta / "stats.json").write_text(json.dumps(stats))


# ---- What is converted --------------------------------------------------------------------------


def convert(folder, out, *flags):
    lerobot.main(["--data", str(folder), "--out", str(out), "--camera", CAMERA, *flags])
    return fast_tokenizer.read_episodes(out)


@pytest.mark.parametrize("video", [True, False], ids=["mp4", "png"])
@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_episodes_hold_what_the_folder_holds(tmp_path, version, video):
    tables = write(tmp_path / "in", version, video)
    flags = ["--camera", f"{CAMERA},{WRIST}", "--action", "action,gripper"]
    files = convert(tmp_path / "in", tmp_path / "out", *flags)
    assert [f.task for f in files] == TASKS[::-1] and [f.fps for f in files] == [FPS, FPS]
    assert [f.deltas for f in files] == [None, None], "nobody said it"
    for e, file in enumerate(files):
        actions = np.column_stack([tables[e]["action"], tables[e]["gripper"]])
        states = np.array(tables[e]["observation.state"], np.float32)
        assert (file.action == actions.astype(np.float32)).all()
        assert (file.state == states).all()
        assert file.cameras == ("image", "image_wrist")
        for t, image in enumerate(pictures(e)):  # mp4 loses a little; neighbours are 15 apart
            assert abs(file.frame(t).astype(int) - image).max() <= (5 if video else 0)
            assert (file.frame(t, "image_wrist") == 255 - image).all()
    actions = np.concatenate([f.action for f in files])
    stats = fast_tokenizer.read_stats(tmp_path / "out", files)
    assert stats["action"] == fast_tokenizer.statistics(actions)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_resampling_keeps_first_frames_and_adds_movements_up(tmp_path, version):
    tables = write(tmp_path / "in", version)
    files = convert(tmp_path / "in", tmp_path / "out", "--fps", "5", "--deltas", "3")
    assert [len(f) for f in files] == [5, 6] and files[0].fps == 5 and files[0].deltas == 3
    action = np.array(tables[0]["action"])
    state = np.array(tables[0]["observation.state"])
    expected = []
    for start, end in ((0, 2), (2, 4), (4, 6), (6, 8), (8, 9)):  # of nine steps the last is alone
        expected.append([*action[start:end, :3].sum(0), action[end - 1, 3]])
    assert np.allclose(files[0].action, expected, atol=1e-6)
    assert np.allclose(files[0].state, state[::2], atol=1e-7)
    assert convert(tmp_path / "in", tmp_path / "none", "--deltas", "0")[0].deltas == 0
    assert abs(files[1].frame(3).astype(int) - pictures(1)[6]).max() <= 5


def test_a_change_of_task_begins_a_new_episode(tmp_path):
    def change(columns):
        columns["task_index"] = [0] * 7 + [1] * 5

    write(tmp_path / "in", "v2.1", False, change)
    files = convert(tmp_path / "in", tmp_path / "out")
    assert [(f.task, len(f)) for f in files] == [(TASKS[1], 9), (TASKS[0], 7), (TASKS[1], 5)]
    assert (files[2].frame(0) == pictures(1)[7]).all()


def test_only_the_first_recordings(tmp_path):
    write(tmp_path / "in", "v3.0", False)
    files = convert(tmp_path / "in", tmp_path / "out", "--max-episodes", "1")
    assert [len(f) for f in files] == [9]


# ---- Damage -------------------------------------------------------------------------------------

TABLE_V2 = "data/chunk-000/episode_000001.parquet"
TABLE_V3 = "data/chunk-000/file-000.parquet"
VIDEO_V2 = f"videos/chunk-000/{CAMERA}/episode_000001.mp4"


def cut(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def scramble(path):
    """Overwrites bytes in the middle of the sixth frame of a video."""
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    middle = packets[5].pos + packets[5].size // 2
    data[middle : middle + 6] = bytes(range(200, 206))
    path.write_bytes(data)


def change_info(folder, **new):
    path = folder / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))


def drop_fps(folder):
    path = folder / "meta/info.json"
    path.write_text('{"codebase_version": "v3.0", "features": {}}')


def drop_shapes(folder):
    info = json.loads((folder / "meta/info.json").read_text())
    features = {key: {"dtype": feature["dtype"]} for key, feature in info["features"].items()}
    change_info(folder, features=features)


def first_table_for_second(folder):
    first = folder / "data/chunk-000/episode_000000.parquet"
    (folder / TABLE_V2).write_bytes(first.read_bytes())


def only_task_1(folder, text):
    write_lines(folder / "meta/tasks.jsonl", [{"task_index": 1, "task": text}])


def wrong_action(columns):
    columns["action"][3] = [9.0] * 4


def one_nan(columns):
    columns["action"][3][0] = float("nan")


def backwards(columns):
    columns["frame_index"] = columns["frame_index"][::-1]


def no_image(columns):
    columns[CAMERA][2] = {"bytes": b"no image at all", "path": None}


def other_size(columns):
    columns[CAMERA][2] = png(np.zeros((16, 16, 3), np.uint8))


@dataclass
class Case:
    """A dataset with one damage, and what is said of it."""

    version: str
    message: str  # regular expression
    video: bool = False
    change: Callable | None = None  # of the second recording's columns
    damage: Callable | None = None  # of the folder


CASES = {
    "no dataset": Case(
        "v2.1",
        "info.json: FileNotFoundError",
        damage=lambda folder: (folder / "meta/info.json").unlink(),
    ),
    "info cut": Case(
        "v2.1",
        "info.json: JSONDecodeError",
        damage=lambda folder: cut(folder / "meta/info.json"),
    ),
    "old version": Case(
        "v2.1",
        "info.json: codebase_version is 'v1.6'; v2.0, v2.1, v3.0 are supported",
        damage=lambda folder: change_info(folder, codebase_version="v1.6"),
    ),
    "no version": Case(
        "v2.1",
        "info.json: codebase_version is None; v2.0, v2.1, v3.0 are supported",
        damage=lambda folder: change_info(folder, codebase_version=None),
    ),
    "no fps": Case("v3.0", "info.json: KeyError: 'fps'", damage=drop_fps),
    "fps 0": Case("v3.0", "info.json: fps is 0", damage=lambda folder: change_info(folder, fps=0)),
    "no shape": Case("v3.0", "info.json: KeyError: 'shape'", damage=drop_shapes),
    "parquet cut": Case(
        "v2.1",
        f"{TABLE_V2}: ArrowInvalid",
        video=True,
        damage=lambda folder: cut(folder / TABLE_V2),
    ),
    "parquet cut, v3": Case(
        "v3.0",
        f"{TABLE_V3}: ArrowInvalid",
        video=True,
        damage=lambda folder: cut(folder / TABLE_V3),
    ),
    "parquet gone": Case(
        "v2.1",
        f"{TABLE_V2}: FileNotFoundError",
        video=True,
        damage=lambda folder: (folder / TABLE_V2).unlink(),
    ),
    "mp4 cut": Case(
        "v2.1",
        f"{VIDEO_V2}: no frame;",
        video=True,
        damage=lambda folder: cut(folder / VIDEO_V2),
    ),
    "mp4 gone": Case(
        "v2.1",
        f"{VIDEO_V2}: FileNotFoundError",
        video=True,
        damage=lambda folder: (folder / VIDEO_V2).unlink(),
    ),
    "mp4 too short": Case(
        "v2.1",
        f"{VIDEO_V2}: no frame at 0.800 s",
        video=True,
        damage=lambda folder: write_video(folder / VIDEO_V2, pictures(1)[:8]),
    ),
    # the decoder guesses what it cannot read, and says so of the frame
    "mp4 scrambled": Case(
        "v2.1",
        f"{VIDEO_V2}: the frame at 0.\\d00 s is damaged",
        video=True,
        damage=lambda folder: scramble(folder / VIDEO_V2),
    ),
    "wrong numbers": Case("v2.1", "of action is .* meta/ says", change=wrong_action),
    "wrong numbers, v3": Case("v3.0", "of action is .* meta/ says", change=wrong_action),
    "wrong numbers, v2.0": Case("v2.0", "of action is .* meta/ says", change=wrong_action),
    "NaN": Case("v3.0", "episode 1: action of step 3 is not finite", change=one_nan),
    "order": Case("v3.0", "episode 1: 12 rows, not frames 0 to 11 as", change=backwards),
    "image": Case("v2.1", r"episode 1: .*cannot identify image", change=no_image),
    "size": Case("v3.0", r"episode 1: .*image 2 of .* is \(16, 16, 3\)", change=other_size),
    "rows gone": Case(
        "v2.1", "episode 1: 0 rows, not frames 0 to 11 as", damage=first_table_for_second
    ),
    "task unknown": Case(
        "v2.1",
        "episode 1: task_index 0 does not stand",
        damage=lambda folder: only_task_1(folder, TASKS[1]),
    ),
    "task empty": Case("v2.1", "empty instruction", damage=lambda folder: only_task_1(folder, " ")),
    "no recordings": Case(
        "v3.0",
        "no episodes for .*out",
        damage=lambda folder: (folder / "meta/episodes/chunk-000/file-000.parquet").unlink(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_damage_ends_in_one_line_and_leaves_nothing(tmp_path, name):
    case = CASES[name]
    write(tmp_path / "in", case.version, case.video, case.change)
    if case.damage:
        case.damage(tmp_path / "in")
    with pytest.raises(SystemExit, match=case.message) as stop:
        convert(tmp_path / "in", tmp_path / "out")
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_numbers_are_checked_before_any_image(tmp_path):
    """Statistics of the whole were compared after the last video: a mismatch ended the conversion
    of 50 thousand recordings in its last second."""
    write(tmp_path / "in", "v2.0", True, wrong_action)
    (tmp_path / "in" / VIDEO_V2.replace("000001", "000000")).unlink()
    with pytest.raises(SystemExit, match="stats.json: .*of action is .* meta/ says"):
        convert(tmp_path / "in", tmp_path / "out")


# ---- Valid recordings that were refused ---------------------------------------------------------


def mean_one_by_one(values):
    """float32 mean (N, D) -> (D,), as torch and numpy add up along the first axis."""
    total = np.zeros_like(values[0])
    for row in values:
        total += row
    return total / np.float32(len(values))


@pytest.mark.parametrize("steps", [300, 3000, 30_000])
def test_a_joint_that_stands_still_in_degrees(steps):
    """Its float32 mean is -87.4498 over 300 steps where the exact one is -87.45: the tolerance of
    1e-3 of the range and 1e-4 refused the recording. It must grow with |x| and N."""
    values = np.full((steps, 1), -87.45, np.float32)
    stored = {"count": [steps], "mean": mean_one_by_one(values).tolist()}
    stored |= {"min": values[0].tolist(), "max": values[0].tolist()}
    assert abs(stored["mean"][0] + 87.45) > 1e-4  # what was refused
    found = {"state": lerobot.moments_of(values)}
    lerobot.check_stats({"state": stored}, found)
    limit = 87.5 * steps / 2**24  # what all roundings can add up to
    for name, change in (("mean", 2 * limit + 3e-4), ("min", 3e-4), ("max", 3e-4)):
        with pytest.raises(ValueError, match=f"{name} of state"):
            lerobot.check_stats({"state": {**stored, name: [stored[name][0] + change]}}, found)
    with pytest.raises(ValueError, match=f"{steps} steps of state, meta/ counts 120"):
        lerobot.check_stats({"state": {**stored, "count": [120]}}, found)
    with pytest.raises(ValueError, match="mean of state"):  # NaN is as far as any number
        lerobot.check_stats({"state": {**stored, "mean": [float("nan")]}}, found)


OPEN_GOPS = {
    "libx265": {
        "x265-params": "log-level=none:pools=1:keyint=12:min-keyint=12:scenecut=0:b-adapt=0"
    },
    "libx264": {"x264-params": "keyint=12:min-keyint=12:scenecut=0:b-adapt=0:open-gop=1"},
    "mpeg2video": {"bf": "2"},
}


@pytest.mark.parametrize("codec", OPEN_GOPS)
def test_open_gops(tmp_path, codec):
    """A seek goes to the key frame that is decoded last before a time. With open GOPs it may be
    shown after it, and 9 (x265), 27 (x264) and 79 (MPEG-2) of these 120 starts were refused."""
    if codec not in av.codecs_available:
        pytest.skip(f"av was built without {codec}")
    frames = 120
    levels = (np.arange(frames) * 37) % 220 + 10  # neighbours are far apart
    images = np.tile(levels[:, None, None, None], (1, SIDE, SIDE, 3)).astype(np.uint8)
    path = tmp_path / "x.mp4"
    write_video(path, images, codec, OPEN_GOPS[codec], gop=12)
    refused = 0
    for start in range(frames):
        numbers = np.arange(start, min(start + 3, frames))
        found = lerobot.read_frames(path, numbers)
        for number, image in zip(numbers, found, strict=True):
            assert abs(image.mean() - levels[number]) < 6
        with av.open(str(path)) as file:  # is it the case of the story?
            stream = file.streams.video[0]
            file.seek(round(start / FPS / stream.time_base), stream=stream)
            refused += next(file.decode(stream)).time > (start + 0.25) / FPS
    assert refused > 0


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_text_in_meta_may_hold_any_character_of_json(tmp_path, separator):
    """str.splitlines() cut lines there, and half of one was no JSON."""
    text = f"close{separator}the drawer"
    write(tmp_path / "in", "v2.1", False)
    for name in ("tasks", "episodes"):
        path = tmp_path / f"in/meta/{name}.jsonl"
        rows = path.read_text().replace(TASKS[1], text)
        path.write_text(rows + "\n", encoding="utf-8")  # and an empty line does no harm
    assert convert(tmp_path / "in", tmp_path / "out")[0].task == text


# ---- Which frame is a step's --------------------------------------------------------------------


def change_starts(folder, change):
    """Changes from_timestamp of both recordings, in frames: change(number, frames) -> frames."""
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pydict()
    key = f"videos/{CAMERA}/from_timestamp"
    rows[key] = [change(e, start * FPS) / FPS for e, start in enumerate(rows[key])]
    write_table(path, rows)


def assert_right_frames(files):
    for e, file in enumerate(files):
        for t, image in enumerate(pictures(e)):
            assert abs(file.frame(t).astype(int) - image).max() <= 5


@pytest.mark.parametrize("drift", [0.05, -0.3, 0.4, -0.6, 0.9, -0.95])
@pytest.mark.parametrize("both", [True, False])
def test_from_timestamp_may_drift_by_less_than_a_frame(tmp_path, capsys, drift, both):
    """0.3 frames off ended the conversion, 0.9 frames took each step's neighbour, 15 grey levels
    away, without a word. Frames are counted instead, and the drift is told."""
    write(tmp_path / "in", "v3.0")
    change_starts(tmp_path / "in", lambda e, start: start + drift * (both or e == 1))
    assert_right_frames(convert(tmp_path / "in", tmp_path / "out"))
    told = (
        f"{1 + both} recordings begin up to {abs(drift):.2f} frames away" in capsys.readouterr().out
    )
    assert told == (abs(drift) >= 0.1)


@pytest.mark.parametrize("drift", [1.2, -1.2, 1.9])
def test_from_timestamp_that_is_a_frame_away_is_damage(tmp_path, drift):
    write(tmp_path / "in", "v3.0")
    change_starts(tmp_path / "in", lambda e, start: start + drift * e)
    with pytest.raises(SystemExit, match="step 0 is at .* s, by count of the frames at 0.900 s"):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_video_may_hold_what_is_no_recording(tmp_path):
    """Where recordings were deleted from meta/ and not from the video."""
    write(tmp_path / "in", "v3.0")
    images = np.concatenate([pictures(1)[:5], pictures(0), pictures(0)[:7], pictures(1)])
    write_video(tmp_path / f"in/videos/{CAMERA}/chunk-000/file-000.mp4", images)
    change_starts(tmp_path / "in", lambda e, start: start + 5 + 7 * e + 0.2)
    assert_right_frames(convert(tmp_path / "in", tmp_path / "out"))


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("lost", [0, 3, 15])
def test_a_frame_that_is_missing_is_damage(tmp_path, version, lost):
    """Counting must not hide it. lost: of both videos together; 3 is in the first recording."""
    folder = tmp_path / "in"
    write(folder, version)
    images = np.concatenate([pictures(0), pictures(1)])
    if version == "v3.0":
        kept = [t for t in range(len(images)) if t != lost]
        write_video(folder / f"videos/{CAMERA}/chunk-000/file-000.mp4", images[kept], times=kept)
    else:
        e = int(lost >= LENGTHS[0])
        kept = [t for t in range(LENGTHS[e]) if t != lost - e * LENGTHS[0]]
        path = folder / f"videos/chunk-000/{CAMERA}/episode_{e:06d}.mp4"
        write_video(path, pictures(e)[kept], times=kept)
    missing = {
        0: "step 0 is at 0.000 s",
        3: "no frame at 0.300 s",
        15: r"no frame at [01].[56]00 s",
    }
    with pytest.raises(SystemExit, match=rf"mp4: {missing[lost]}"):
        convert(folder, tmp_path / "out")
    # the other recording is whole, wherever it stands in the video
    (file,) = convert(folder, tmp_path / "out", "--skip-damaged")
    damaged = int(lost >= LENGTHS[0])
    for t, image in enumerate(pictures(1 - damaged)):
        assert abs(file.frame(t).astype(int) - image).max() <= 5


# ---- Instructions -------------------------------------------------------------------------------


def write_tasks_table(folder, columns):
    write_table(folder / "meta/tasks.parquet", {"task_index": [0, 1], **columns})


@pytest.mark.parametrize(
    "columns",
    [
        {"task": TASKS},
        {"task_name": ["Cup-v0", "Drawer-v0"], "task": TASKS},
        {"task_name": ["Cup-v0", "Drawer-v0"], "__index_level_0__": TASKS},
        {"instruction": TASKS},
    ],
)
def test_the_instruction_is_the_column_task_or_the_index(tmp_path, columns):
    """The first further column was taken, "Cup-v0" for a sentence."""
    write(tmp_path / "in", "v3.0", False)
    write_tasks_table(tmp_path / "in", columns)
    assert [file.task for file in convert(tmp_path / "in", tmp_path / "out")] == TASKS[::-1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"task_name": ["a", "b"], "text": TASKS}, "no column task, and task_name, text beside"),
        ({"task": [7, 8]}, "task 0 is 7, not a sentence"),
        ({"task": TASKS, "task_index": [1, 1]}, "task 1 is both 'put the cup down' and 'close"),
        ({"task": TASKS[::-1]}, "labelled 'put the cup down' .* meta/episodes says 'close"),
    ],
)
def test_a_table_of_tasks_that_is_not_clear_is_damage(tmp_path, columns, message):
    """The last: episodes and steps that name different sentences were converted by the steps'."""
    write(tmp_path / "in", "v3.0", False)
    write_tasks_table(tmp_path / "in", columns)
    with pytest.raises(SystemExit, match=message):
        convert(tmp_path / "in", tmp_path / "out")


def test_an_episode_may_list_more_sentences_than_its_steps_use(tmp_path):
    write(tmp_path / "in", "v2.1", False)
    path = tmp_path / "in/meta/episodes.jsonl"
    path.write_text(path.read_text().replace('"tasks": [', '"tasks": ["another way to say it", '))
    assert len(convert(tmp_path / "in", tmp_path / "out")) == 2


# ---- What is left out ---------------------------------------------------------------------------


def skipped_rows(out):
    path = out / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_blank_instructions_can_be_left_out(tmp_path, capsys, version):
    """BridgeV2 and DROID have many: one ended the conversion, and no flag helped."""
    folder = tmp_path / "in"
    write(folder, version, False, lambda columns: columns.update(task_index=[0] * 7 + [1] * 5))
    if version == "v3.0":
        write_tasks_table(folder, {"task": [TASKS[0], None]})
    else:
        rows = [{"task_index": 0, "task": TASKS[0]}, {"task_index": 1, "task": "  "}]
        write_lines(folder / "meta/tasks.jsonl", rows)
    with pytest.raises(SystemExit, match="episode 0: an empty instruction .*: --skip-blank"):
        convert(folder, tmp_path / "out")
    files = convert(folder, tmp_path / "out", "--skip-blank")
    assert [(file.task, len(file)) for file in files] == [(TASKS[0], 7)]
    rows = skipped_rows(tmp_path / "out")
    assert [(row["episode"], row["kind"], row["steps"]) for row in rows] == [
        (0, "blank", 9),
        (1, "blank", 5),
    ]
    assert "left out as blank: 2 recordings or parts, 14 steps" in capsys.readouterr().out


@pytest.mark.parametrize("blank", [None, float("nan"), "", " \u00a0\t", "\u200b", "\ufeff "])
def test_whatever_shows_no_instruction_is_blank(tmp_path, blank):
    """pandas writes NaN for a sentence that is missing: "nan, not a sentence" ended the conversion,
    and --skip-blank did not help. A lone BOM or zero-width space was an instruction."""
    write(tmp_path / "in", "v2.1", False)
    rows = [{"task_index": 0, "task": blank}, {"task_index": 1, "task": TASKS[1]}]
    write_lines(tmp_path / "in/meta/tasks.jsonl", rows)
    files = convert(tmp_path / "in", tmp_path / "out", "--skip-blank")
    assert [file.task for file in files] == [TASKS[1]]
    assert [row["kind"] for row in skipped_rows(tmp_path / "out")] == ["blank"]


def test_spaces_around_a_sentence_are_no_other_sentence(tmp_path):
    """ "close the drawer " in one file of meta/ and "close the drawer" in another: mislabelled."""
    write(tmp_path / "in", "v2.1", False)
    rows = [{"task_index": number, "task": text + " "} for number, text in enumerate(TASKS)]
    write_lines(tmp_path / "in/meta/tasks.jsonl", rows)
    files = convert(tmp_path / "in", tmp_path / "out")
    assert [file.task.strip() for file in files] == TASKS[::-1]


def test_a_recording_that_meta_lists_twice_is_named(tmp_path):
    """Recorders that were stopped append a line again: the recording became two episodes."""
    write(tmp_path / "in", "v2.1", False)
    path = tmp_path / "in/meta/episodes.jsonl"
    path.write_text(path.read_text() + path.read_text().split("\n")[0] + "\n")
    with pytest.raises(SystemExit, match="episode 0 stands 2 times in meta/episodes"):
        convert(tmp_path / "in", tmp_path / "out")


SKIPPABLE = ["parquet cut", "parquet gone", "mp4 cut", "mp4 gone", "mp4 too short", "wrong numbers"]
SKIPPABLE += ["NaN", "order", "mp4 scrambled", "image", "size", "rows gone", "task unknown"]


@pytest.mark.parametrize("name", SKIPPABLE)
def test_damaged_recordings_can_be_left_out(tmp_path, capsys, name):
    case = CASES[name]
    write(tmp_path / "in", case.version, case.video, case.change)
    if case.damage:
        case.damage(tmp_path / "in")
    with pytest.raises(SystemExit, match="leave such recordings out: --skip-damaged"):
        convert(tmp_path / "in", tmp_path / "out")
    files = convert(tmp_path / "in", tmp_path / "out", "--skip-damaged")
    assert [(file.task, len(file)) for file in files] == [(TASKS[1], 9)]
    (row,) = skipped_rows(tmp_path / "out")
    assert (row["episode"], row["kind"], row["steps"]) == (1, "damaged", 12)
    assert "left out as damaged: 1 recordings or parts, 12 steps" in capsys.readouterr().out
    # a stop at a damaged one, then on with the flag
    with pytest.raises(SystemExit):
        convert(tmp_path / "in", tmp_path / "again", "--resume")
    convert(tmp_path / "in", tmp_path / "again", "--resume", "--skip-damaged")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_what_has_no_statistics_is_said(tmp_path, capsys):
    """openpi wrote LIBERO in v2.0 without statistics."""
    write(tmp_path / "in", "v2.0", False)
    (tmp_path / "in/meta/stats.json").unlink()
    convert(tmp_path / "in", tmp_path / "out")
    assert "meta/ has no statistics of action" in capsys.readouterr().out


# ---- Size and time ------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("image_format", lerobot.CODECS)
@pytest.mark.parametrize("episodes_per_file", ["1", "2"])
def test_several_workers_write_the_same_bytes(tmp_path, image_format, episodes_per_file):
    write(tmp_path / "in", "v3.0")
    flags = ["--camera", f"{CAMERA},{WRIST}", "--image-format", image_format]
    flags += ["--episodes-per-file", episodes_per_file]
    files = convert(tmp_path / "in", tmp_path / "one", *flags)
    convert(tmp_path / "in", tmp_path / "two", *flags, "--workers", "2")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 2 / int(episodes_per_file)
    assert_right_frames(files)
    assert (files[1].frame(3, "image_wrist") == 255 - pictures(1)[3]).all()  # one grey: exact


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(ValueError, match="a worker was killed.*lower --workers"):
        with lerobot.processes(2) as run:
            list(run(os._exit, [1, 1, 1]))


def test_a_conversion_goes_on_after_a_stop(tmp_path, monkeypatch):
    write(tmp_path / "in", "v3.0")
    convert(tmp_path / "in", tmp_path / "whole")
    converted = []
    convert_one = lerobot.convert

    def stop_at_the_second(job, plan):
        if converted:
            raise KeyboardInterrupt
        converted.append(plan.entry.number)
        return convert_one(job, plan)

    monkeypatch.setattr(lerobot, "convert", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", tmp_path / "out", "--resume")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="begun with --image-format raw, not png; give the same"):
        convert(tmp_path / "in", tmp_path / "out", "--resume", "--image-format", "png")
    # begun by a version that kept --deltas to itself: half of the episodes would not say it
    flags = tmp_path / "out.part/conversion.json"
    kept = flags.read_text()
    flags.write_text(json.dumps(json.loads(kept) | {"deltas": 3}))
    with pytest.raises(SystemExit, match="with deltas None, --deltas says 3; delete .*out.part"):
        convert(tmp_path / "in", tmp_path / "out", "--resume", "--deltas", "3")
    flags.write_text(kept)

    def only_the_second(job, plan):
        converted.append(plan.entry.number)
        return convert_one(job, plan)

    monkeypatch.setattr(lerobot, "convert", only_the_second)
    convert(tmp_path / "in", tmp_path / "out", "--resume")
    assert converted == [0, 1]  # the first was not read again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("flag", ["camera", "action", "deltas"])
def test_flags_that_never_worked_are_not_kept(tmp_path, flag):
    """The one that stopped it ended --resume for good: "out.part was begun with --camera cma, not
    ..." when it was corrected. The second is found out in the first recording."""
    write(tmp_path / "in", "v3.0", False)
    wrong = {"camera": "cma", "action": f"action,{WRIST}", "deltas": "9"}[flag]
    with pytest.raises(SystemExit):
        convert(tmp_path / "in", tmp_path / "out", "--resume", f"--{flag}", wrong)
    assert not list((tmp_path / "out.part").glob("*.safetensors"))
    assert len(convert(tmp_path / "in", tmp_path / "out", "--resume")) == 2
    kept = json.loads((tmp_path / "out/conversion.json").read_text())
    assert kept["camera"] == CAMERA and kept["action"] == "action" and kept["deltas"] is None


# ---- Command line -------------------------------------------------------------------------------


def test_flags_that_do_not_fit_are_named(tmp_path):
    """They, and not info.json, which was to be repaired or copied again: it was whole."""
    write(tmp_path / "in", "v3.0")
    for flags, message in (
        (("--camera", "front"), "--camera: no front in .*info.json; name one of .*images.front"),
        (("--fps", "3"), "--fps 3 does not divide its 10"),
        (("--fps", "20"), "--fps 20 does not divide its 10"),
        (("--action", "action,act"), "--action: no act in"),
        (("--state", "pose"), "--state: no pose in"),
        (("--deltas", "5"), "--deltas 5: an action has 4 dimensions"),  # all were added up
        (("--fps", "1e-320"), "--fps 9.99989e-321 does not divide its 10"),  # was a traceback
    ):
        with pytest.raises(SystemExit, match=message) as stop:
            convert(tmp_path / "in", tmp_path / "out", *flags)
        assert str(stop.value).startswith("error: --") and "\n" not in str(stop.value)
        assert "copy the dataset" not in str(stop.value)
    convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(SystemExit, match="already holds data"):
        convert(tmp_path / "in", tmp_path / "out")
    assert len(fast_tokenizer.read_episodes(tmp_path / "out")) == 2


def test_cameras_that_would_have_one_name(tmp_path):
    """Of them it was said that --fps 0 does not divide 10."""
    write(tmp_path / "in", "v3.0")
    info = json.loads((tmp_path / "in/meta/info.json").read_text())
    keys = [f"observation.images.{side}.rgb" for side in ("left", "right")]
    change_info(tmp_path / "in", features=info["features"] | {key: {} for key in keys})
    cameras = ",".join([CAMERA, *keys])
    with pytest.raises(SystemExit, match="--camera: 2 of .* would be called image_rgb") as stop:
        convert(tmp_path / "in", tmp_path / "out", "--camera", cameras)
    assert "copy the dataset" not in str(stop.value) and "--fps" not in str(stop.value)


def test_thinning_asks_which_dimensions_are_movements(tmp_path):
    """Without --deltas --fps dropped half of all movements: of none was it known to be one, and
    each kept the last value, without a word."""
    write(tmp_path / "in", "v3.0", False)
    with pytest.raises(SystemExit, match="--fps thins actions; say --deltas N"):
        convert(tmp_path / "in", tmp_path / "out", "--fps", "5")
    (first, _) = convert(tmp_path / "in", tmp_path / "out", "--fps", "5", "--deltas", "0")
    assert first.deltas == 0 and len(first) == 5
    # nothing is thinned: nothing is asked
    (first, _) = convert(tmp_path / "in", tmp_path / "all", "--fps", "10")
    assert first.deltas is None and len(first) == 9


def test_a_missing_package_names_its_installation(tmp_path, monkeypatch):
    write(tmp_path / "in", "v2.1")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit, match="package av: pip install -r requirements-extras.txt"):
        convert(tmp_path / "in", tmp_path / "out")
