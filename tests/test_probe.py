"""benchmarks/probe.py: alignment and probes by hand, no trajectory on both sides, the command."""

import argparse
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import untrained
from ranks import on_ranks

import evaluate
import fast_tokenizer
import model
import vla
from benchmarks import probe, tabletop_data
from tools import plot


def column(*values):
    return np.array(values, float)[:, None]


def test_alignment_by_hand():
    steps = probe.aligned_steps(column(0, 0, 1, 2), column(0, 1, 1, 2))
    assert steps.tolist() == [0, 0, 1, 3]
    # a pause, a skip, a detour that the reference does not take
    assert probe.aligned_steps(column(0, 1, 1, 1, 2), column(0, 1, 2)).tolist() == [0, 1, 1, 1, 2]
    assert probe.aligned_steps(column(0, 3), column(0, 1, 2, 3)).tolist() == [0, 2]
    assert probe.aligned_steps(column(0, 1, 9, 1, 2), column(0, 1, 2)).tolist()[::2] == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_alignment_is_the_cheapest(seed):
    """Against all paths, tried one by one."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(5, 2)), rng.normal(size=(4, 2))

    def paths(t, u):
        if (t, u) == (4, 3):
            yield [(t, u)]
            return
        for dt, du in ((1, 1), (1, 0), (0, 1)):
            if t + dt < 5 and u + du < 4:
                for rest in paths(t + dt, u + du):
                    yield [(t, u), *rest]

    best = min(paths(0, 0), key=lambda path: sum(np.linalg.norm(a[t] - b[u]) for t, u in path))
    partners = [[u for s, u in best if s == t] for t in range(5)]
    middle = [of_step[(len(of_step) - 1) // 2] for of_step in partners]
    assert probe.aligned_steps(a, b).tolist() == middle


def episode(task, states, **known):
    """As fast_tokenizer.EpisodeFile, as far as targets are read from it."""
    states = np.array(states, np.float32)
    fields = {"task": task, "state": states, "action": states, "source": "tabletop goal task 0"}
    fields |= {"thoughts": None, "targets": None, "object_position": None} | known

    class Episode(types.SimpleNamespace):
        def __len__(self):
            return len(self.state)

    return Episode(**fields)


def test_progress_is_that_of_the_state_not_of_the_clock():
    """Half as fast is as far at the same place; the only trajectory of a task has none."""
    way = np.arange(8.0)
    quick = episode("a", way[:, None])
    slow = episode("a", way.repeat(2)[:, None])
    late = episode("a", np.concatenate([np.zeros(5), way])[:, None])
    other = episode("b", way[:, None])
    segments = probe.progress([quick, slow, late, other], 4)
    # the reference is `late`, of median length: 13 steps, of which the first six are at 0
    assert segments[1][2:] == np.array(segments[0][1:]).repeat(2).tolist()
    assert segments[2][-7:] == segments[0][-7:] == ["1", "2", "2", "2", "3", "3", "3"]
    assert set(segments[3]) == {""}


def test_displacement_and_phase_by_hand():
    hands = [[0.1, 0, 0.2, 7]] * 3
    objects = np.array([[[0.13, 0.04, 0.2], [0, 0, 0]]] * 3, np.float32)
    thoughts = ["The cup is at a1. Now reach: right 3, open.", "Now let go: open.", "Hm."]
    known = episode("a", hands, targets=[0, -1, 1], object_position=objects, thoughts=thoughts)
    way = probe.displacements(known, [0, 1, 2], 1)
    np.testing.assert_allclose(way, [[3, 4, 0], [np.nan] * 3, [-10, 0, -20]], atol=1e-4)
    known.state *= 1000  # a robot that tells its hand in mm, where objects are in m
    np.testing.assert_allclose(probe.displacements(known, [0, 1, 2], 0.001), way, atol=1e-4)
    assert probe.phases(known) == ["reach", "let go", ""]
    values, classes = probe.one_hot(probe.phases(known))
    assert classes == ["let go", "reach"]
    np.testing.assert_array_equal(values, [[0, 1], [1, 0], [np.nan, np.nan]])
    np.testing.assert_array_equal(probe.one_hot(["", ""])[0], [[np.nan], [np.nan]])


def test_phase_of_tabletop_is_what_its_own_parser_reads():
    texts = []
    for number in range(60):
        env = tabletop_data.random_state(np.random.default_rng(number))
        texts.append(tabletop_data.thought(env, env.expert()[1]))
    parsed = [tabletop_data.parse_thought(text).phase for text in texts]
    assert probe.phases(argparse.Namespace(thoughts=texts)) == parsed
    assert len(set(parsed)) > 4


def test_nearest_neighbours_by_hand():
    """By angle, not by distance: five at 0, 10, .. 40 degrees, however long, and far ones at 90."""
    degrees = np.radians([0, 10, 20, 30, 40, 90, 90, 180])
    inputs = np.stack([np.cos(degrees), np.sin(degrees)], 1) * column(9, 1, 3, 1, 7, 50, 1, 1)
    values = column(1, 1, 1, 6, 6, 100, 100, 100)
    assert probe.knn(inputs, values, np.array([[0.1, 0.02]])) == pytest.approx(3)
    assert probe.knn(inputs[:2], values[:2], np.array([[1.0, 0]])) == 1, "fewer than five"
    # the last token's embedding is one in all prompts: rounding chose five of them, and accuracy
    # was anything from 0.08 to 0.21, below the 0.46 of who sees nothing
    assert probe.knn(inputs[:1].repeat(8, 0), values, inputs[:1]) == pytest.approx(values.mean())


def test_ridge_by_hand():
    """x of -1 and 1 with y of -2 and 2: weight 2 / (1 + strength); a dimension that does not move
    is left out."""
    x = np.array([[-1.0, 5], [1, 5]])
    told = probe.ridge(x, column(-2, 2) + 7, np.array([[3.0, 4]]), [1e-9, 1.0, 3.0])
    np.testing.assert_allclose(np.ravel(told), [13, 10, 8.5], rtol=1e-6)
    # the same row twice weighs the same, and another dimension that says the same halves the weight
    (twice,) = probe.ridge(x.repeat(2, 0), column(-2, 2).repeat(2, 0), np.array([[3.0, 5]]), [1.0])
    assert twice == pytest.approx(3)
    both = np.array([[-1.0, -1, 1], [1, 1, -1]])  # more dimensions than rows: the other formula
    told = probe.ridge(both, column(-2, 2), np.array([[3.0, 3, -3]]), [3.0])
    assert told[0] == pytest.approx(3 * 3 * 2 / (3 + 3))


def test_no_trajectory_is_told_by_itself():
    """Inputs name the trajectory, and values are its number: whoever saw a frame of it knows."""
    trajectory = np.arange(12).repeat(7)
    inputs = np.eye(12)[trajectory]
    own = np.eye(12)[trajectory]
    fold = probe.folds_of(["a"] * 12)[trajectory]
    told = probe.tell("knn", inputs, own, fold)
    assert told[own == 1].max() == 0
    told = probe.tell("linear", inputs, own, fold)
    assert (told.argmax(1) != trajectory).all()
    told = probe.most_frequent(own, fold)
    assert told[own == 1].max() == 0


def test_the_strength_is_chosen_by_trajectories_apart(monkeypatch):
    """Five folds: with one held out, the next one chooses among probes that saw neither; then all
    but the one held out are learned from. Chosen by the ones that it is fitted to, the weakest
    would always win; by the one held out, it would be told what it is tested on."""
    calls = []

    def ridge(inputs, values, asked, strengths):
        calls.append(({*inputs[:, 0].tolist()}, {*asked[:, 0].tolist()}, list(strengths)))
        return [np.full((len(asked), 1), strength) for strength in strengths]

    monkeypatch.setattr(probe, "ridge", ridge)
    fold = np.arange(5).repeat(3)
    told = probe.tell("linear", column(*fold), column(*[0.012] * 15), fold)
    assert (told == 1e-2).all(), "the candidate that is nearest to the truth"
    for held_out in range(5):
        other = (held_out + 1) % 5
        choosing, telling = calls[2 * held_out : 2 * held_out + 2]
        assert choosing == ({*range(5)} - {held_out, other}, {other}, list(probe.STRENGTHS))
        assert telling == ({*range(5)} - {held_out}, {held_out}, [1e-2])


def test_trajectories_of_a_task_take_turns():
    folds = probe.folds_of(["b", "a", "b", "a", "a", "b"])
    assert folds.tolist() == [3, 0, 4, 1, 2, 0]
    assert np.unique(probe.folds_of(["x", "x", "x"])).tolist() == [0, 1, 2]


def test_a_linear_fact_is_found_and_noise_is_not():
    """R2 of about 1 for what is in the inputs, about 0 for what is not; ridge is chosen so that 80
    dimensions of noise do not hurt."""
    rng = np.random.default_rng(0)
    trajectory = np.arange(20).repeat(10)
    inputs = rng.normal(size=(200, 80))
    there = inputs[:, :3] * [1, 2, 3]
    absent = rng.normal(size=(200, 3))
    fold = probe.folds_of(["a"] * 20)[trajectory]
    found = probe.r2_intervals(probe.tell("linear", inputs, there, fold), there, trajectory)
    assert all(interval["low"] > 0.99 for interval in found.values())
    found = probe.r2_intervals(probe.tell("linear", inputs, absent, fold), absent, trajectory)
    assert -0.6 < found[""]["mean"] < 0.1


def test_r2_by_hand():
    """Axis x: errors 1 and 0, spread 4 + 4; y is told as its mean, z exactly. Drawn are
    trajectories: of two with errors 1 and 0, both, either or none twice."""
    true = np.array([[0.0, 1, 5], [4, 3, 9]])
    told = np.array([[1.0, 2, 5], [4, 2, 9]])
    found = probe.r2_intervals(told, true, np.array([0, 1]))
    assert [found[axis]["mean"] for axis in (" x", " y", " z")] == [1 - 1 / 8, 0, 1]
    assert found[""]["mean"] == pytest.approx((0.875 + 0 + 1) / 3)
    assert (found[" x"]["low"], found[" x"]["high"], found[" x"]["n"]) == (0.75, 1, 2)
    twice = probe.r2_intervals(told.repeat(2, 0), true.repeat(2, 0), np.array([0, 0, 1, 1]))
    assert twice == found, "two frames each: n counts trajectories"


def test_r2_of_axes_that_vary():
    """Of one that does not it was minus infinity, or -1e28, and so was the mean."""
    true = np.array([[0.0, 1, -7.1], [4, 3, -7.1]])
    told = np.array([[1.0, 2, -7], [4, 2, -7.2]])
    found = probe.r2_intervals(told, true, np.array([0, 1]))
    assert found.keys() == {" x", " y", ""}
    assert found[""]["mean"] == pytest.approx((0.875 + 0) / 2)


def test_accuracy_is_by_trajectory():
    """Trajectories of 1 and 3 frames with 1 and 0 right: 0.5 of two, not 0.25 of four."""
    values = np.array([[1.0, 0], [1, 0], [1, 0], [1, 0]])
    told = np.array([[0.9, 0], [0, 1], [0, 1], [0.4, 0.6]])
    scores = probe.Scores({}, {})
    target = probe.Target("phase", values, ["grasp", "reach"])
    probe.score(scores, told, target, np.array([0, 1, 1, 1]), "probe knn phase", "layer 0 mean")
    (interval,) = scores.metrics.values()
    assert (interval["mean"], interval["low"], interval["high"], interval["n"]) == (0.5, 0, 1, 2)
    assert scores.paired == {"probe knn phase layer 0 mean": [1.0, 0.0]}


def test_frames_of_which_nothing_is_known_are_left_out(monkeypatch, capsys):
    """Of the first three of eight frames: no frame of the first of four trajectories is left, and
    one of the second. Folds are dealt to the trajectories that are left, by their tasks."""
    folds = []

    def tell(probe_name, inputs, values, fold):
        folds.append((inputs[:, 0].tolist(), fold.tolist()))
        told = values.copy()
        told[2] = told[2, ::-1]  # the second frame of the third trajectory is told wrongly
        return told

    monkeypatch.setattr(probe, "tell", tell)
    episodes = [episode(task, [[0.0]] * 2) for task in ("b", "a", "b", "a")]
    frames = probe.Frames(episodes, np.arange(4).repeat(2), np.arange(8) % 2)
    target = probe.Target("phase", *probe.one_hot(["", "", "", "a", "b", "a", "b", "a"]))
    scores = probe.Scores({}, {})
    probe.probe_all(scores, {"layer 0 mean": column(*range(8))}, target, frames, "probe")
    assert folds == [([3, 4, 5, 6, 7], [0, 2, 2, 1, 1])] * 2
    assert scores.paired["probe knn phase layer 0 mean"] == [1.0, 0.5, 1.0]
    assert scores.metrics["probe linear phase layer 0 mean"]["n"] == 3
    capsys.readouterr()
    fewer = target._replace(values=np.where(frames.trajectory[:, None] < 2, np.nan, target.values))
    probe.probe_all(scores, {}, fewer, frames, "probe")
    assert capsys.readouterr().out == "left out: phase: known of 2 trajectories, needed are 3\n"


@pytest.mark.parametrize("size", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_features_are_those_that_the_head_reads(size):
    """By --layer of vla.py; prompts of unequal length in a batch, whose padding counts for nothing.
    Of Qwen3-VL the first blocks add what the vision tower saw to their output (deepstack)."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    backbone = model.load(untrained.folder(size))
    prompts = [vla.prompt_row(backbone, [image], words, False) for words in ("go", "go up there")]
    pooled = probe.pooled_features(backbone, prompts, "cpu")  # (B, L + 1, 2, D)
    L = len(backbone.net.model.language_model.layers)
    assert pooled.shape[:3] == (2, L + 1, 2)
    ids = torch.from_numpy(prompts[0]["ids"])
    embeddings = backbone.net.get_input_embeddings()(ids).detach().numpy()
    np.testing.assert_allclose(pooled[0, 0, 1], embeddings[-1], rtol=1e-5)
    for layer in range(L, 0, -1):
        vla.truncate(backbone.net, layer)
        for b, prompt in enumerate(prompts):
            (feats,) = vla.encode_prompts(backbone, [prompt], "cpu").rows()
            expected = torch.stack([feats.mean(0), feats[-1]]).numpy()
            np.testing.assert_allclose(pooled[b, layer], expected, rtol=1e-3, atol=1e-4)


# ---- the command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two tasks in turn, four trajectories each."""
    folder = tmp_path_factory.mktemp("probe") / "data"
    tabletop_data.main(
        [
            *("--out", str(folder), "--episodes", "8", "--conversations", "0"),
            *("--tasks", "object:1,goal:0", "--workers", "1"),
        ]
    )
    return folder


def argv(data, out, *more):
    return [
        *("probe", "--policy", untrained.folder("tiny-vlm"), "--data", str(data)),
        *("--out", str(out), "--variant", "base", "--stride", "6", *more),
    ]


def test_tasks_are_recorded_as_named(data, capsys):
    episodes = fast_tokenizer.read_episodes(data)
    sources = [episode.source for episode in episodes]
    assert sources == ["tabletop object task 1", "tabletop goal task 0"] * 4
    assert tabletop_data.ALL_TASKS[:5] == [
        *[(suite, 0) for suite in tabletop_data.SUITES],
        ("spatial", 1),
    ]
    assert len(set(tabletop_data.ALL_TASKS)) == 40
    for text in ("long", "long:10", "short:1", "long:0,", ":3", "goal:-1"):
        with pytest.raises(SystemExit):
            tabletop_data.main(["--out", "x", "--tasks", text])
        assert "is no task; name them as long:0" in capsys.readouterr().err


def test_the_command_measures_every_layer(data, tmp_path, capsys):
    out = tmp_path / "r.json"
    task = fast_tokenizer.read_episodes(data)[0].task
    one = ["--one-task", str(data), "--task", task, "--trajectories", "4"]
    evaluate.main(argv(data, out, *one, "--think"))
    evaluate.main(argv(data, out))
    printed = capsys.readouterr().out
    assert f"one task: 4 of '{task}'" in printed
    assert printed.count("left out: ") == 1 and "left out: one-task: give --one-task" in printed
    variant = json.loads(out.read_text())["arms"]["base"]
    metrics = variant["metrics"]
    for start in ("probe", "think probe"):
        for kind in ("knn", "linear"):
            for place in [f"layer {n} {pool}" for n in range(5) for pool in probe.POOLS] + [
                "state",
                "pixels",
            ]:
                for target in ("progress", "phase"):
                    assert 0 <= metrics[f"{start} {kind} {target} {place}"]["mean"] <= 1
                for axis in ("", " x", " y", " z"):
                    assert metrics[f"{start} {kind} displacement{axis} {place}"]["mean"] <= 1
                assert metrics[f"{start} {kind} displacement cm {place}"]["n"] == 8
    assert metrics["think probe knn one-task layer 4 last"]["n"] == 4
    assert "probe knn one-task layer 4 last" not in metrics
    # the two prompts are others; what needs no backbone is the same
    assert metrics["probe linear phase state"] == metrics["think probe linear phase state"]
    last = "linear displacement cm layer 2 last"
    assert variant["paired"][f"probe {last}"] != variant["paired"][f"think probe {last}"]
    assert set(variant["checkpoints"]) == {"probe", "think probe"}


def test_ranks_equal_one(data, tmp_path):
    found = []
    for world in (1, 2):
        out = tmp_path / f"{world}.json"
        on_ranks(evaluate.main, argv(data, out, "--batch", "7"), world)
        found.append(json.loads(out.read_text())["arms"]["base"]["metrics"])
    assert found[0].keys() == found[1].keys()
    # batches are other ones, and rounding may turn single frames
    for name, one in found[0].items():
        assert found[1][name]["mean"] == pytest.approx(one["mean"], abs=0.02), name


def test_what_was_not_recorded_is_left_out(data, tmp_path, capsys):
    """No zeros, and no metrics of that name."""
    bare = []
    for episode in fast_tokenizer.read_episodes(data)[::2]:
        frames = np.stack([episode.frame(t) for t in range(len(episode))])
        arrays = {"image": frames, "state": episode.state, "action": episode.action}
        header = {"task": f"task {len(bare) // 3}", "fps": "5", "source": "a lab"}
        if len(bare) < 2:
            header["thoughts"] = json.dumps(["Now reach: open."] * len(episode))
        else:
            header["thoughts"] = json.dumps(["Hm."] * len(episode))
        bare.append((arrays, header))
    fast_tokenizer.write_episodes(tmp_path / "bare", bare)
    evaluate.main(argv(tmp_path / "bare", tmp_path / "r.json"))
    printed = capsys.readouterr().out
    assert "left out: phase: known of 2 trajectories, needed are 3" in printed
    assert "left out: displacement: these recordings do not say" in printed
    assert "left out: progress of 1 of 4 trajectories: the only ones of their tasks" in printed
    metrics = json.loads((tmp_path / "r.json").read_text())["arms"]["base"]["metrics"]
    assert {name.split()[2] for name in metrics} == {"progress"}
    assert metrics["probe majority progress"]["n"] == 3


def test_thoughts_and_places_that_are_missing_are_named():
    frames = probe.frames_of([episode("a", np.eye(4))] * 3, 1)
    targets, missing = probe.read_targets(frames, argparse.Namespace(classes=2, axes=""))
    assert [target.name for target in targets] == ["progress"]
    assert missing[0] == "phase: these recordings hold no thoughts"
    assert missing[1].startswith("displacement: these recordings do not say")


@pytest.mark.parametrize("moves", [False, True])
def test_a_displacement_must_vary(moves):
    """It was found out after the features had been read, on rank 0 alone, where the others wait."""
    hand = np.full((4, 7), 7.0)
    hand[3, 1] += moves
    places = np.zeros((4, 1, 3), np.float32)
    known = episode("a", hand, targets=[0] * 4, object_position=places)
    frames = probe.frames_of([known] * 3, 1)
    targets, missing = probe.read_targets(frames, argparse.Namespace(classes=2, axes=""))
    assert (targets[-1].name == "displacement") == moves
    assert ("displacement: no hand moves relative to its target" in missing) == (not moves)


def test_what_cannot_be_probed_is_one_line(data, tmp_path):
    out = tmp_path / "r.json"
    with pytest.raises(ValueError, match="2 tasks, as '.+'; name one, --task"):
        evaluate.main(argv(data, out, "--one-task", str(data)))
    with pytest.raises(ValueError, match="no episode of --task 'fly', but of "):
        evaluate.main(argv(data, out, "--one-task", str(data), "--task", "fly"))
    task = fast_tokenizer.read_episodes(data)[0].task
    with pytest.raises(ValueError, match="4 traj.* fewer than --trajectories 20; record more, as"):
        evaluate.main(argv(data, out, "--one-task", str(data), "--task", task))
    with pytest.raises(ValueError, match="of a folder that --one-task names"):
        evaluate.main(argv(data, out, "--task", task))
    # of 20 episodes that a model was trained on one is held out: "1 trajectories; record more"
    few = "2 trajectories to ask about, a probe needs 3; say which of them by --split, or record"
    with pytest.raises(ValueError, match=few):
        probe.frames_of(fast_tokenizer.read_episodes(data)[:2], 1)
    assert not out.exists()


def test_the_first_trajectories_of_a_task_are_taken():
    """As many as are asked for, of the task that is named, or of the only one."""
    episodes = []
    for number, task in enumerate("abaab"):
        episodes.append(episode(task, [[0.0]], path=Path("data/e"), number=number))

    def chosen(of_all, task, wanted):
        return [one.number for one in probe.trajectories_of_one_task(of_all, task, wanted)]

    assert chosen(episodes, "a", 2) == [0, 2] and chosen(episodes, "b", 2) == [1, 4]
    assert chosen(episodes[2:4], "", 1) == [2]


def test_a_figure_over_the_layers(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-extras.txt")

    def value(mean):
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.2, "n": 9}

    metrics = {"probe majority phase": value(0.2), "probe knn phase state": value(0.4)}
    for layer in range(3):
        metrics[f"probe knn phase layer {layer} mean"] = value(0.5 + layer / 10)
        metrics[f"probe knn phase layer {layer} last"] = value(0.3)
        metrics[f"probe linear phase layer {layer} mean"] = value(0.6)
        metrics[f"probe linear displacement cm layer {layer} mean"] = value(6)
    variants = {"SFT": {"metrics": metrics}, "base": {"metrics": metrics}}
    (tmp_path / "probe.json").write_text(json.dumps({"arms": variants}))
    figure = plot.figure_of([str(tmp_path / "probe.json")])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["phase, accuracy: k-NN", "phase, accuracy: linear"]
    mean, last, *_ = figure.axes[0].get_lines()
    np.testing.assert_allclose(mean.get_xydata(), [[0, 0.5], [1, 0.6], [2, 0.7]])
    np.testing.assert_allclose(last.get_ydata(), [0.3] * 3)
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.4, 0.9))
    assert [text.get_text() for text in figure.axes[0].texts] == ["state", "nothing"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["SFT", "base"]
