"""LeRobot folders of both versions, written here as the public format says, become our episodes."""

import io
import json
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


def write_video(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=FPS)
        stream.width = SIDE
        stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        stream.gop_size = 4  # a key frame every 4: reading must seek
        for image in images:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
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
        episodes.append({"episode_index": e, "tasks": [TASKS[1 - e]], "length": LENGTHS[e]})
    if version == "v2.1":
        write_v2(folder, info, tables, episodes, stats, video)
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
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_episodes_hold_what_the_folder_holds(tmp_path, version, video):
    tables = write(tmp_path / "in", version, video)
    flags = ["--camera", f"{CAMERA},{WRIST}", "--action", "action,gripper"]
    files = convert(tmp_path / "in", tmp_path / "out", *flags)
    assert [f.task for f in files] == TASKS[::-1] and [f.fps for f in files] == [FPS, FPS]
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
    assert [len(f) for f in files] == [5, 6] and files[0].fps == 5
    action = np.array(tables[0]["action"])
    state = np.array(tables[0]["observation.state"])
    expected = []
    for start, end in ((0, 2), (2, 4), (4, 6), (6, 8), (8, 9)):  # of nine steps the last is alone
        expected.append([*action[start:end, :3].sum(0), action[end - 1, 3]])
    assert np.allclose(files[0].action, expected, atol=1e-6)
    assert np.allclose(files[0].state, state[::2], atol=1e-7)
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


def change_info(folder, **new):
    path = folder / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))


def drop_fps(folder):
    path = folder / "meta/info.json"
    path.write_text('{"codebase_version": "v3.0", "features": {}}')


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
        "info.json: KeyError: 'v1.6'",
        damage=lambda folder: change_info(folder, codebase_version="v1.6"),
    ),
    "no fps": Case("v3.0", "info.json: KeyError: 'fps'", damage=drop_fps),
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
        f"{VIDEO_V2}: \\w+Error: ",
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
    "wrong numbers": Case("v2.1", "of action is .* meta/ says", change=wrong_action),
    "wrong numbers, v3": Case("v3.0", "of action is .* meta/ says", change=wrong_action),
    "NaN": Case("v3.0", "episode 1: action of step 3 is not finite", change=one_nan),
    "order": Case("v3.0", "episode 1: 12 rows, not frames 0 to 11 as", change=backwards),
    "image": Case("v2.1", r"episode 1: .*cannot identify image", change=no_image),
    "size": Case("v3.0", r"episode 1: .*image 2 of .* is \(16, 16, 3\)", change=other_size),
    "rows gone": Case(
        "v2.1", "episode 1: 0 rows, not frames 0 to 11 as", damage=first_table_for_second
    ),
    "task unknown": Case(
        "v2.1", "episode 1: KeyError: 0", damage=lambda folder: only_task_1(folder, "x")
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


def test_flags_that_do_not_fit_are_named(tmp_path):
    write(tmp_path / "in", "v3.0")
    for flags, message in (
        (("--camera", "front"), "info.json: no front among .*images.front"),
        (("--fps", "3"), "--fps 3 does not divide its 10"),
        (("--action", "act"), "no act among"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert(tmp_path / "in", tmp_path / "out", *flags)
    convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(SystemExit, match="already holds data"):
        convert(tmp_path / "in", tmp_path / "out")
    assert len(fast_tokenizer.read_episodes(tmp_path / "out")) == 2


def test_a_missing_package_names_its_installation(tmp_path, monkeypatch):
    write(tmp_path / "in", "v2.1")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit, match="package av: pip install -r requirements-extras.txt"):
        convert(tmp_path / "in", tmp_path / "out")
