"""Our episodes as LeRobot datasets, read back by tools/lerobot.py and, where it is installed, by
the package lerobot-dataset, whose own datasets we read too."""

import importlib.machinery
import json
import sys
import types

import numpy as np
import pytest
import torch

import fast_tokenizer
from tools import lerobot, lerobot_export

pa = pytest.importorskip("pyarrow", reason="pip install pyarrow: see requirements-extras.txt")
pq = pytest.importorskip("pyarrow.parquet")
av = pytest.importorskip("av", reason="pip install av: see requirements-extras.txt")

FPS = 10
TASKS = ["put the cup down", "close the drawer", "put the cup down"]
LENGTHS = (5, 8, 3)
KEYS = {"image": "observation.images.image", "image_wrist": "observation.images.wrist"}


# ---- Episodes -----------------------------------------------------------------------------------


def views(episode):
    """Camera -> frames (T, H, W, 3): one shows its step as a grey level, the other is smooth."""
    length = LENGTHS[episode]
    levels = 20 + 15 * np.arange(length) + 5 * episode
    plain = np.tile(levels[:, None, None, None], (1, 32, 48, 3)).astype(np.uint8)
    slope = np.linspace(0, 60, 32)[:, None] + np.linspace(0, 60, 32)  # (H, W)
    colours = np.array([1.0, 0.5, 1.5])
    frames = [(slope[..., None] * colours + 6 * t + episode) for t in range(length)]
    return {"image": plain, "image_wrist": np.stack(frames).astype(np.uint8)}


def recordings(state_dim=1, fps=FPS, change=None):
    """change: a function that changes the arrays and the header of the second."""
    result = []
    for episode, length in enumerate(LENGTHS):
        rng = np.random.default_rng(episode)
        arrays = {
            "action": rng.normal(size=(length, 4)).astype(np.float32),
            "state": rng.normal(size=(length, state_dim)).astype(np.float32),
            **views(episode),
        }
        header = {"task": TASKS[episode], "fps": f"{fps}", "source": f"recording {episode}"}
        if change and episode == 1:
            change(arrays, header)
        result.append((arrays, header))
    return result


def write(folder, **flags):
    fast_tokenizer.write_episodes(folder, recordings(**flags))
    return fast_tokenizer.read_episodes(folder)


def export(folder, out, *flags):
    lerobot.main(["export", "--data", str(folder), "--out", str(out), *flags])


def read_back(folder, out):
    cameras = ",".join(KEYS.values())
    lerobot.main(["--data", str(folder), "--out", str(out), "--camera", cameras])
    return fast_tokenizer.read_episodes(out)


def assert_same(files, originals, tolerance):
    """tolerance: of a pixel, 0 .. 255. Frames of neighbouring steps are 6 apart or more."""
    assert [file.task for file in files] == [file.task for file in originals]
    for file, original in zip(files, originals, strict=True):
        assert np.array_equal(file.action, original.action)
        assert np.array_equal(file.state, original.state)
        assert (file.fps, file.image_sizes) == (original.fps, original.image_sizes)
        for t in range(len(original)):
            for camera in original.cameras:
                difference = file.frame(t, camera).astype(int) - original.frame(t, camera)
                assert abs(difference).max() <= tolerance and abs(difference.mean()) < 2


# ---- There and back -----------------------------------------------------------------------------


@pytest.mark.parametrize(("image_format", "tolerance"), [("png", 0), ("jpeg", 4), ("video", 8)])
@pytest.mark.parametrize("files", ["one", "many"])
def test_what_is_exported_is_read_back(tmp_path, monkeypatch, image_format, tolerance, files):
    """In one file of each kind, or in many of few bytes and half a second, two a chunk."""
    if files == "many":
        monkeypatch.setattr(lerobot_export, "DATA_FILE_MB", 1e-4)
        monkeypatch.setattr(lerobot_export, "LONGEST_VIDEO", 1.1)
        monkeypatch.setattr(lerobot_export, "FILES_A_CHUNK", 2)
        monkeypatch.setattr(lerobot_export, "EPISODES_A_FILE", 2)
    originals = write(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "lerobot", "--image-format", image_format)
    assert_same(read_back(tmp_path / "lerobot", tmp_path / "out"), originals, tolerance)
    folder = tmp_path / "lerobot"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    data = {"data/chunk-000/file-000.parquet"}
    episodes = {"meta/episodes/chunk-000/file-000.parquet"}
    videos = {f"videos/{key}/chunk-000/file-000.mp4" for key in KEYS.values()}
    if files == "many":
        data |= {"data/chunk-000/file-001.parquet", "data/chunk-001/file-000.parquet"}
        episodes |= {"meta/episodes/chunk-000/file-001.parquet"}
        # the first episode alone, the others are 1.1 s together
        videos |= {f"videos/{key}/chunk-000/file-001.mp4" for key in KEYS.values()}
    meta = {"meta/info.json", "meta/stats.json", "meta/tasks.parquet"}
    assert names == data | episodes | meta | (videos if image_format == "video" else set())


@pytest.mark.parametrize("fps", [0.5, 29.97, 59.94005994])
def test_rates_that_are_no_whole_numbers(tmp_path, fps):
    """The last was more digits than a video's header holds."""
    originals = write(tmp_path / "in", fps=fps)
    export(tmp_path / "in", tmp_path / "lerobot", "--image-format", "video")
    files = read_back(tmp_path / "lerobot", tmp_path / "out")
    assert files[0].fps == pytest.approx(fps, rel=1e-6)
    for file, original in zip(files, originals, strict=True):
        file.fps = original.fps
    assert_same(files, originals, 12)


def test_a_robot_without_a_state(tmp_path):
    """It ended in "Column 1 named observation.state expected length 5 but got length 0"."""
    (original, *_) = write(tmp_path / "in", state_dim=0)
    export(tmp_path / "in", tmp_path / "lerobot")
    info = json.loads((tmp_path / "lerobot/meta/info.json").read_text())
    assert "action" in info["features"] and "observation.state" not in info["features"]
    table = pq.read_table(tmp_path / "lerobot/data/chunk-000/file-000.parquet")
    assert "observation.state" not in table.column_names
    actions = np.array(table["action"].to_pylist()[: len(original)], np.float32)
    assert np.array_equal(actions, original.action)


def test_frames_of_a_video_can_be_read_in_any_order(tmp_path):
    """A key frame every two, and one where an episode begins."""
    write(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "lerobot", "--image-format", "video")
    path = tmp_path / f"lerobot/videos/{KEYS['image']}/chunk-000/file-000.mp4"
    index = lerobot.frame_index(path)
    assert np.allclose(index.times, np.arange(16) / FPS)
    keys = np.searchsorted(index.pts, index.key_pts).tolist()
    assert {0, 5, 13} <= set(keys) and max(np.diff(keys)) == 2
    rows = lerobot.read_rows(tmp_path / "lerobot/meta/episodes/chunk-000/file-000.parquet")
    column = f"videos/{KEYS['image']}/"
    assert [row[column + "from_timestamp"] for row in rows] == [0, 0.5, 1.3]
    assert [row[column + "to_timestamp"] for row in rows] == [0.5, 1.3, 1.6]


def test_statistics_are_those_of_the_numbers_and_the_pixels(tmp_path):
    originals = write(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "lerobot")
    stats = json.loads((tmp_path / "lerobot/meta/stats.json").read_text())
    rows = lerobot.read_rows(tmp_path / "lerobot/meta/episodes/chunk-000/file-000.parquet")
    pixels = [views(episode)["image_wrist"] / 255 for episode in range(3)]
    for name, function in (("min", np.min), ("max", np.max), ("mean", np.mean), ("std", np.std)):
        actions = np.concatenate([file.action for file in originals]).astype(float)
        assert np.allclose(stats["action"][name], function(actions, 0), atol=1e-7)
        of_all = function(np.concatenate(pixels), (0, 1, 2))
        assert np.allclose(np.ravel(stats[KEYS["image_wrist"]][name]), of_all)
        of_second = rows[1][f"stats/{KEYS['image_wrist']}/{name}"]
        assert np.shape(of_second) == (3, 1, 1)
        assert np.allclose(np.ravel(of_second), function(pixels[1], (0, 1, 2)))
    for share in lerobot_export.QUANTILES:
        of_all = np.quantile(np.concatenate(pixels), share, (0, 1, 2), method="inverted_cdf")
        assert np.allclose(np.ravel(stats[KEYS["image_wrist"]][f"q{100 * share:02.0f}"]), of_all)
    assert stats["action"]["count"] == stats[KEYS["image"]]["count"] == [16]
    assert [row["stats/index/min"] for row in rows] == [[0], [5], [13]]


def test_what_stays_behind_is_said(tmp_path, capsys):
    def thinks(arrays, header):
        header["thoughts"] = json.dumps(["left"] * LENGTHS[1])
        header["deltas"] = "3"

    write(tmp_path / "in", change=thinks)
    export(tmp_path / "in", tmp_path / "lerobot", "--max-episodes", "2")
    said = capsys.readouterr().out
    assert "left out, LeRobot has no place for it: thoughts, deltas\n" in said
    assert "lerobot: 2 episodes of 13 steps" in said
    export(tmp_path / "in", tmp_path / "first", "--max-episodes", "1")
    assert "left out" not in capsys.readouterr().out


# ---- What cannot be exported --------------------------------------------------------------------


def other_rate(arrays, header):
    header["fps"] = "20"


def no_rate(arrays, header):
    header["fps"] = "0"


def other_size(arrays, header):
    arrays["image"] = arrays["image"][:, :16]


def other_cameras(arrays, header):
    del arrays["image_wrist"]


def test_what_does_not_fit_together_is_one_line(tmp_path):
    cases = [
        (other_rate, (), "000001: 20 fps, .*000000 has 10; a dataset has one rate"),
        (no_rate, (), "000001: its rate is not recorded; give it as --fps"),
        (no_rate, ("--fps", "20"), "000000: recorded at 10 fps; leave --fps 20 out"),
        (other_size, (), r"000001: cameras .*'image': \(16, 48\).*one size for each"),
        (other_cameras, (), "000001: cameras .*000000 has .*image_wrist.*"),
    ]
    for number, (change, flags, message) in enumerate(cases):
        write(tmp_path / f"{number}", change=change)
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            export(tmp_path / f"{number}", tmp_path / "lerobot", *flags)
    fast_tokenizer.write_episodes(tmp_path / "slow", recordings(fps=1e-9))
    with pytest.raises(SystemExit, match="000000: 1e-09 fps; 0.01 to 1000 can be exported"):
        export(tmp_path / "slow", tmp_path / "lerobot")
    export(tmp_path / "1", tmp_path / "lerobot", "--fps", "10")
    with pytest.raises(SystemExit, match="lerobot already holds data; name another --out"):
        export(tmp_path / "1", tmp_path / "lerobot", "--fps", "10")
    with pytest.raises(SystemExit, match="error: .*nowhere: no episode"):
        export(tmp_path / "nowhere", tmp_path / "out")


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    """A folder does not take a link's place, so that at the end all that was written was lost."""
    write(tmp_path / "in")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export(tmp_path / "in", tmp_path / "link")
    assert (tmp_path / "disk/meta/info.json").exists() and (tmp_path / "link").is_symlink()


def test_names_and_sizes_that_lerobot_cannot_have(tmp_path):
    """H.264 with half the colour resolution has even sizes; of two cameras one would be lost."""
    rows = np.zeros((2, 1), np.float32)
    for name, shape, message in (
        ("image_wrist", (2, 31, 32, 3), "image_wrist is 31 x 32, videos have even sizes; use"),
        ("image_image", (2, 8, 8, 3), "cameras image, image_image would be .*these differ"),
        ("image_a/b", (2, 8, 8, 3), "image_a/b would be .*without a slash"),
    ):
        arrays = {"image": np.zeros((2, 32, 32, 3), np.uint8), name: np.zeros(shape, np.uint8)}
        header = {"task": "go", "fps": "10"}
        folder = tmp_path / str(shape[1]) / name.replace("/", "_")
        fast_tokenizer.write_episodes(folder, [({**arrays, "action": rows, "state": rows}, header)])
        with pytest.raises(SystemExit, match=message):
            export(folder, tmp_path / "out", "--image-format", "video")


def test_an_export_that_stops_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "in")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(lerobot_export, "write_episode_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "in", tmp_path / "lerobot", "--image-format", "video")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    (tmp_path / "lerobot.part").mkdir()
    with pytest.raises(SystemExit, match="lerobot.part: another export writes there, or delete"):
        export(tmp_path / "in", tmp_path / "lerobot")
    assert (tmp_path / "lerobot.part").exists()


def test_what_videos_need_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_export, "VIDEO_CODEC", "nonesuch")
    with pytest.raises(SystemExit, match="av was built without nonesuch; use --image-format png"):
        export(tmp_path, tmp_path / "lerobot", "--image-format", "video")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit, match="package av: pip install -r requirements-extras"):
        export(tmp_path, tmp_path / "lerobot", "--image-format", "video")
    write(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "lerobot")  # images need no av


# ---- The package ledataset, LeRobot's datasets by themselves -------------------------------------


def to_tensor(image):
    """What torchvision.transforms.ToTensor makes of a Pillow image: (3, H, W) float, 0 .. 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class VideoReader:
    """torchvision.io.VideoReader as far as the package asks it, by PyAV."""

    def __init__(self, path, stream):
        self.container = av.open(path)

    def seek(self, seconds, keyframes_only):
        self.container.seek(int(seconds * av.time_base))

    def __iter__(self):
        for frame in self.container.decode(video=0):
            image = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            yield {"pts": frame.time, "data": image.permute(2, 0, 1)}


@pytest.fixture
def LeRobotDataset(tmp_path, monkeypatch):
    """The package's class. It imports torchvision, which nothing else here needs, and of whose
    functions it calls those above; with them no second build of torch comes along."""
    datasets = pytest.importorskip("datasets", reason="see requirements-extras.txt")
    pytest.importorskip("ledataset", reason="pip install --no-deps lerobot-dataset==0.4.4")
    pytest.importorskip("jsonlines", reason="see requirements-extras.txt")
    parts = {
        "torchvision": {"set_video_backend": lambda backend: None},
        "torchvision.transforms": {"ToTensor": lambda: to_tensor},
        "torchvision.io": {"VideoReader": VideoReader},
    }
    modules = {}
    for name, attributes in parts.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(attributes)
        modules[name] = module
        monkeypatch.setitem(sys.modules, name, module)
    modules["torchvision"].transforms = modules["torchvision.transforms"]
    modules["torchvision"].io = modules["torchvision.io"]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    from ledataset.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset


@pytest.mark.parametrize(("image_format", "tolerance"), [("png", 0), ("jpeg", 4), ("video", 8)])
@pytest.mark.parametrize("files", ["one", "many"])
def test_the_package_reads_what_we_wrote(
    tmp_path, monkeypatch, LeRobotDataset, image_format, tolerance, files
):
    if files == "many":
        monkeypatch.setattr(lerobot_export, "DATA_FILE_MB", 1e-4)
        monkeypatch.setattr(lerobot_export, "LONGEST_VIDEO", 1.1)
        monkeypatch.setattr(lerobot_export, "EPISODES_A_FILE", 2)
    originals = write(tmp_path / "in")
    folder = tmp_path / "lerobot"
    export(tmp_path / "in", folder, "--image-format", image_format)
    dataset = LeRobotDataset("local/x", root=folder)
    assert (dataset.fps, dataset.num_episodes, len(dataset)) == (FPS, 3, 16)
    assert dataset.meta.total_tasks == 2 and dataset.meta.get_task_index(TASKS[1]) == 1
    assert sorted(dataset.meta.camera_keys) == sorted(KEYS.values())
    assert dataset.meta.stats[KEYS["image"]]["mean"].shape == (3, 1, 1)
    steps = [(file, t) for file in originals for t in range(len(file))]
    for i, (file, t) in enumerate(steps):
        item = dataset[i]
        assert item["task"] == file.task
        assert np.array_equal(item["action"], file.action[t])
        assert np.array_equal(np.ravel(item["observation.state"]), file.state[t])
        assert (item["index"], item["frame_index"]) == (i, t)
        assert item["episode_index"] == originals.index(file)
        assert item["timestamp"] == np.float32(t / FPS)
        for camera, key in KEYS.items():
            image = item[key].permute(1, 2, 0).numpy() * 255
            assert abs(image - file.frame(t, camera)).max() <= tolerance + 1e-4
    # chunks of actions, which stop at the end of an episode
    chunks = LeRobotDataset("local/x", root=folder, delta_timestamps={"action": [0, 0.1, 0.2]})
    assert np.array_equal(chunks[11]["action"][:2], originals[1].action[6:])
    assert chunks[11]["action_is_pad"].tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", ["image", "video"])
def test_we_read_what_the_package_wrote(tmp_path, LeRobotDataset, dtype):
    # 2 dimensions: with numpy 2.4 the package writes no column of single numbers
    originals = write(tmp_path / "in", state_dim=2)
    features = {
        "action": {"dtype": "float32", "shape": (4,), "names": None},
        "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
    }
    names = ["height", "width", "channels"]
    for camera, key in KEYS.items():
        size = originals[0].image_sizes[camera]
        features[key] = {"dtype": dtype, "shape": (*size, 3), "names": names}
    dataset = LeRobotDataset.create(
        "local/y",
        FPS,
        features,
        root=tmp_path / "lerobot",
        use_videos=dtype == "video",
        vcodec="h264",
    )
    for file in originals:
        for t in range(len(file)):
            frame = {"action": file.action[t], "observation.state": file.state[t]}
            frame |= {key: file.frame(t, camera) for camera, key in KEYS.items()}
            dataset.add_frame({**frame, "task": file.task})
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    tolerance = 0 if dtype == "image" else 20  # they lose more, by crf 30
    assert_same(read_back(tmp_path / "lerobot", tmp_path / "out"), originals, tolerance)
