"""LeRobot folders of both versions, written here as the public format says, become our episodes."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import fast_tokenizer
from tools import lerobot

pa = pytest.importorskip("pyarrow", reason="pip install pyarrow: see requirements-extras.txt")
pq = pytest.importorskip("pyarrow.parquet")
av = pytest.importorskip("av", reason="pip install av: see requirements-extras.txt")

FPS, LENGTHS, SIDE = 10, (9, 12), 32
CAMERA, WRIST = "observation.images.front", "observation.images.wrist"
TASKS = ["put the cup down", "close the drawer"]


def pictures(episode):
    """Frames that show their own number: a grey level per step."""
    levels = 20 + 15 * np.arange(LENGTHS[episode]) + 5 * episode
    return np.tile(levels[:, None, None, None], (1, SIDE, SIDE, 3)).astype(np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return {"bytes": file.getvalue(), "path": "x.png"}


def columns(episode, first, video):
    n, rng = LENGTHS[episode], np.random.default_rng(episode)
    made = {
        "observation.state": rng.normal(size=(n, 3)).astype(np.float32).tolist(),
        "action": rng.normal(size=(n, 4)).astype(np.float32).tolist(),
        "gripper": rng.integers(0, 2, n).astype(np.float32).tolist(),
        "timestamp": (np.arange(n) / FPS).astype(np.float32).tolist(),
        "frame_index": list(range(n)),
        "episode_index": [episode] * n,
        "index": list(range(first, first + n)),
        "task_index": [1 - episode] * n,
    }
    if not video:
        made[CAMERA] = [png(x) for x in pictures(episode)]
    made[WRIST] = [png(255 - x) for x in pictures(episode)]
    return made


def encode(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.bit_rate, stream.gop_size = "yuv420p", 4_000_000, 4
        for image in images:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        file.mux(stream.encode())


def numbers_of(made):
    stats = {}
    for key in ("observation.state", "action", "gripper"):
        x = np.array(made[key], np.float64).reshape(len(made[key]), -1)
        stats[key] = {
            "min": x.min(0).tolist(),
            "max": x.max(0).tolist(),
            "mean": x.mean(0).tolist(),
            "std": x.std(0).tolist(),
            "count": [len(x)],
        }
    return stats


def table_to(path, made):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(made), path)


def lines_to(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write(folder, version, video=True, both=None):
    """A dataset of two recordings. both: a function that changes the columns of the second."""
    meta = folder / "meta"
    meta.mkdir(parents=True)
    made = [columns(e, 9 * e, video) for e in (0, 1)]
    stats = [numbers_of(m) for m in made]
    whole = numbers_of({k: made[0][k] + made[1][k] for k in made[0]})
    if both:
        both(made[1])
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
    heads = [{"episode_index": e, "tasks": [TASKS[1 - e]], "length": LENGTHS[e]} for e in (0, 1)]
    if version == "v2.1":
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = (
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        )
        for e in (0, 1):
            table_to(folder / f"data/chunk-000/episode_{e:06d}.parquet", made[e])
            if video:
                encode(folder / f"videos/chunk-000/{CAMERA}/episode_{e:06d}.mp4", pictures(e))
        lines_to(meta / "tasks.jsonl", [{"task_index": i, "task": t} for i, t in enumerate(TASKS)])
        lines_to(meta / "episodes.jsonl", heads)
        lines_to(
            meta / "episodes_stats.jsonl", [{"episode_index": e, "stats": stats[e]} for e in (0, 1)]
        )
    else:
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        table_to(
            folder / "data/chunk-000/file-000.parquet",
            {k: made[0][k] + made[1][k] for k in made[0]},
        )
        for e, head in enumerate(heads):
            head |= {"data/chunk_index": 0, "data/file_index": 0}
            if video:
                head |= {
                    f"videos/{CAMERA}/chunk_index": 0,
                    f"videos/{CAMERA}/file_index": 0,
                    f"videos/{CAMERA}/from_timestamp": e * LENGTHS[0] / FPS,
                }
        if video:
            encode(
                folder / f"videos/{CAMERA}/chunk-000/file-000.mp4",
                np.concatenate([pictures(0), pictures(1)]),
            )
        table_to(meta / "tasks.parquet", {"task_index": [0, 1], "__index_level_0__": TASKS})
        table_to(
            meta / "episodes/chunk-000/file-000.parquet",
            {k: [h[k] for h in heads] for k in heads[0]},
        )
        (meta / "stats.json").write_text(json.dumps(whole))
    (meta / "info.json").write_text(json.dumps(info))
    return made


def convert(folder, out, *flags):
    lerobot.main(["--data", str(folder), "--out", str(out), "--camera", CAMERA, *flags])
    return fast_tokenizer.read_episodes(out)


@pytest.mark.parametrize("video", [True, False], ids=["mp4", "png"])
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_episodes_hold_what_the_folder_holds(tmp_path, version, video):
    made = write(tmp_path / "in", version, video)
    files = convert(
        tmp_path / "in",
        tmp_path / "out",
        "--camera",
        f"{CAMERA},{WRIST}",
        "--action",
        "action,gripper",
    )
    assert [f.task for f in files] == TASKS[::-1] and [f.fps for f in files] == [FPS, FPS]
    for e, file in enumerate(files):
        want = np.column_stack([made[e]["action"], made[e]["gripper"]])
        assert (file.action == want.astype(np.float32)).all() and file.cameras == (
            "image",
            "image_wrist",
        )
        assert (file.state == np.array(made[e]["observation.state"], np.float32)).all()
        for t, image in enumerate(pictures(e)):  # mp4 loses a little; neighbours are 15 apart
            assert abs(file.frame(t).astype(int) - image).max() <= (5 if video else 0)
            assert (file.frame(t, "image_wrist") == 255 - image).all()
    actions = np.concatenate([f.action for f in files])
    stats = fast_tokenizer.read_stats(tmp_path / "out", files)
    assert stats["action"] == fast_tokenizer.statistics(actions)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_resampling_keeps_first_frames_and_adds_movements_up(tmp_path, version):
    made = write(tmp_path / "in", version)
    files = convert(tmp_path / "in", tmp_path / "out", "--fps", "5", "--deltas", "3")
    assert [len(f) for f in files] == [5, 6] and files[0].fps == 5
    action, state = np.array(made[0]["action"]), np.array(made[0]["observation.state"])
    # nine steps: (0, 1) (2, 3) (4, 5) (6, 7) and 8 alone
    want = [
        [*action[a:b, :3].sum(0), action[b - 1, 3]]
        for a, b in ((0, 2), (2, 4), (4, 6), (6, 8), (8, 9))
    ]
    assert np.allclose(files[0].action, want, atol=1e-6)
    assert np.allclose(files[0].state, state[::2], atol=1e-7)
    assert abs(files[1].frame(3).astype(int) - pictures(1)[6]).max() <= 5


def test_a_change_of_task_begins_a_new_episode(tmp_path):
    def change(made):
        made["task_index"] = [0] * 7 + [1] * 5

    write(tmp_path / "in", "v2.1", False, change)
    files = convert(tmp_path / "in", tmp_path / "out")
    assert [(f.task, len(f)) for f in files] == [(TASKS[1], 9), (TASKS[0], 7), (TASKS[1], 5)]
    assert (files[2].frame(0) == pictures(1)[7]).all()


def cut(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def info_with(folder, **new):
    path = folder / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))


def wrong_action(made):
    made["action"][3] = [9.0] * 4


def one_nan(made):
    made["action"][3][0] = float("nan")


def shuffled(made):
    made["frame_index"] = made["frame_index"][::-1]


def no_image(made):
    made[CAMERA][2] = {"bytes": b"no image at all", "path": None}


def other_size(made):
    made[CAMERA][2] = png(np.zeros((16, 16, 3), np.uint8))


V2, V3 = "data/chunk-000/episode_000001.parquet", "data/chunk-000/file-000.parquet"
MP4 = f"videos/chunk-000/{CAMERA}/episode_000001.mp4"
BAD = {
    "no dataset": (
        "v2.1",
        True,
        None,
        lambda f: (f / "meta/info.json").unlink(),
        "info.json: FileNotFoundError",
    ),
    "info cut": (
        "v2.1",
        True,
        None,
        lambda f: cut(f / "meta/info.json"),
        "info.json: JSONDecodeError",
    ),
    "old version": (
        "v2.1",
        True,
        None,
        lambda f: info_with(f, codebase_version="v1.6"),
        "info.json: KeyError: 'v1.6'",
    ),
    "no fps": (
        "v3.0",
        True,
        None,
        lambda f: (f / "meta/info.json").write_text('{"codebase_version": "v3.0", "features": {}}'),
        "info.json: KeyError: 'fps'",
    ),
    "parquet cut": ("v2.1", True, None, lambda f: cut(f / V2), f"{V2}: ArrowInvalid"),
    "parquet cut, v3": ("v3.0", True, None, lambda f: cut(f / V3), f"{V3}: ArrowInvalid"),
    "parquet gone": ("v2.1", True, None, lambda f: (f / V2).unlink(), f"{V2}: FileNotFoundError"),
    "mp4 cut": ("v2.1", True, None, lambda f: cut(f / MP4), f"{MP4}: \\w+Error: "),
    "mp4 gone": ("v2.1", True, None, lambda f: (f / MP4).unlink(), f"{MP4}: FileNotFoundError"),
    "mp4 too short": (
        "v2.1",
        True,
        None,
        lambda f: encode(f / MP4, pictures(1)[:8]),
        f"{MP4}: no frame at 0.800 s",
    ),
    "wrong numbers": ("v2.1", False, wrong_action, None, "of action is .* meta/ says"),
    "wrong numbers, v3": ("v3.0", False, wrong_action, None, "of action is .* meta/ says"),
    "NaN": ("v3.0", False, one_nan, None, "episode 1: action of step 3 is not finite"),
    "order": ("v3.0", False, shuffled, None, "episode 1: 12 rows, not frames 0 to 11 as"),
    "image": ("v2.1", False, no_image, None, r"episode 1: .*cannot identify image"),
    "size": ("v3.0", False, other_size, None, r"episode 1: .*image 2 of .* is \(16, 16, 3\)"),
    "rows gone": (
        "v2.1",
        False,
        None,
        lambda f: (f / V2).write_bytes((f / V2.replace("1.", "0.")).read_bytes()),
        "episode 1: 0 rows, not frames 0 to 11 as",
    ),
    "task unknown": (
        "v2.1",
        False,
        None,
        lambda f: lines_to(f / "meta/tasks.jsonl", [{"task_index": 1, "task": "x"}]),
        "episode 1: KeyError: 0",
    ),
    "no recordings": (
        "v3.0",
        False,
        None,
        lambda f: (f / "meta/episodes/chunk-000/file-000.parquet").unlink(),
        "no episodes for .*out",
    ),
    "task empty": (
        "v2.1",
        False,
        None,
        lambda f: lines_to(f / "meta/tasks.jsonl", [{"task_index": 1, "task": " "}]),
        "empty instruction",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_ends_in_one_line_and_leaves_nothing(tmp_path, case):
    version, video, change, damage, message = BAD[case]
    write(tmp_path / "in", version, video, change)
    if damage:
        damage(tmp_path / "in")
    with pytest.raises(SystemExit, match=message) as stop:
        convert(tmp_path / "in", tmp_path / "out")
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


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
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(SystemExit, match="package av: pip install -r requirements-extras.txt"):
        convert(tmp_path / "in", tmp_path / "out")
