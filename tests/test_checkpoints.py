"""Checkpoints against what ends runs: SIGTERM, kill -9 at random moments, a full disk; and exact
resume from where it left them, at any step."""

import contextlib
import ctypes
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from ranks import on_ranks, start
from safetensors.numpy import load_file
from test_sft import args, conversations, log, weights

import model
import sft

TIMES = {"seconds", "samples_per_s"}


@pytest.fixture
def data(tmp_path):
    return conversations(tmp_path)[0]


def at_step(monkeypatch, step, do):
    """do() in the middle of the given step of a run to come: each step clips its gradient once."""
    clip_gradients = model.clip_gradients
    calls = []

    def watched(*a):
        calls.append(a)
        if len(calls) == step:
            do()
        return clip_gradients(*a)

    monkeypatch.setattr(model, "clip_gradients", watched)


def terminate():
    """SIGTERM to this process, if it is rank 1 or the only one."""
    if os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), signal.SIGTERM)


def records(out):
    """{(step, is of training): record} of a run without what a clock says; an interrupted step's
    may stand twice in the log."""
    by_step = {}
    for record in log(out):
        timeless = {k: v for k, v in record.items() if k not in TIMES}
        by_step[record["step"], "loss" in record] = timeless
    return by_step


def assert_same_weights(folder, other):
    ours = weights(folder)
    theirs = weights(other)
    assert all(np.array_equal(ours[k], theirs[k]) for k in ours)


def whole(folder):
    """Fails unless everything in a checkpoint can be read; -> its step."""
    files = list((folder / "train_state").iterdir())
    assert files and weights(folder)
    for file in files:
        load_file(file)
    run = json.loads((folder / "run.json").read_text())
    assert folder.name == f"step_{run['step']:06d}"
    return run["step"]


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_saves_and_the_next_records_are_those_of_the_whole_run(
    tmp_path, data, monkeypatch, capfd, world
):
    """The signal comes between two lines of the log, so that a part of the next one is before it.
    On two ranks only one gets it: they must agree on the step, and not wait for each other
    forever."""
    on_ranks(sft.main, args(tmp_path / "a", data, "--log-every", 4), world)
    with monkeypatch.context() as patch:
        at_step(patch, 3, terminate)
        on_ranks(sft.main, args(tmp_path / "b", data, "--log-every", 4), world, 143)
    out = capfd.readouterr().out.splitlines()
    line = f"SIGTERM: stopped after step 3, saved {tmp_path}/b/step_000003; go on with --resume"
    assert out.count(line) == 1 and len(log(tmp_path / "b")) == 0
    assert whole(model.latest_checkpoint(tmp_path / "b")) == 3
    if world == 2:
        shutil.copytree(tmp_path / "b", tmp_path / "c")
    on_ranks(sft.main, args(tmp_path / "b", data, "--log-every", 4, "--resume"), world)
    a = records(tmp_path / "a")
    assert a == records(tmp_path / "b") and len(a) == 3  # steps 4 and 6, and the evaluation
    assert_same_weights(tmp_path / "a" / "final", tmp_path / "b" / "final")
    if world == 2:  # what two ranks left, one takes up
        sft.main(args(tmp_path / "c", data, "--log-every", 4, "--resume"))
        c = records(tmp_path / "c")
        assert c[4, True] == pytest.approx(a[4, True], rel=1e-5)


def unfinished(out, since):
    """Folders that a save after the time `since` has not given their names yet."""
    folders = []
    for folder in out.glob("step_*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it got its name in this moment
            if folder.stat().st_mtime > since:
                folders.append(folder)
    return folders


def series(out, data, monkeypatch, kills, world, seed):
    """Kills a run, which saves at every third step, `kills` times and lets it go on: in turn in a
    step, in a save, and while it starts. At the end it must be where a run that was never killed is
    at that step. -> (kills that left a save unfinished, steps done)."""
    moment = random.Random(seed)
    saving = 0  # kills that left a save unfinished
    newest = 0  # step of the last checkpoint

    def argv(out, *more):
        return args(out, data, "--resume", *more, steps=2000)

    def records_so_far():
        return len(log(out)) if (out / "log.jsonl").exists() else 0

    for k in range(kills):
        during = ("step", "save", "start")[k % 3]
        records_before = records_so_far()
        began = time.time()
        ranks = start(sft.main, argv(out, "--save-every", 3, "--keep", 2), world)
        enough = records_before + moment.randint(4, 7)

        def there(during=during, enough=enough, began=began):
            if during == "step":
                return records_so_far() >= enough
            if during == "save":
                return bool(unfinished(out, began))
            return True

        while not there():
            assert all(p.exitcode is None for p in ranks), "the run did not go on"
            time.sleep(0.005)
        time.sleep(moment.random() * (0.1 if during == "save" else 0.4))
        for p in moment.sample(ranks, world):
            p.kill()
            p.join()
        saving += bool(unfinished(out, began))
        steps = [whole(folder) for folder in sorted(out.glob("step_??????"))]
        assert max(steps, default=0) >= newest and len(steps) <= 3, (steps, newest)
        newest = max(steps, default=0)
    never_killed = out.with_name("never_killed")
    for step, folder in (1, out), (newest + 1, never_killed):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            on_ranks(sft.main, argv(folder, "--save-every", 0, "--keep", 2), world, 143)
    assert not list(out.glob("step_*.tmp")) and len(list(out.glob("step_*"))) == 2
    assert newest
    assert_same_weights(model.latest_checkpoint(out), model.latest_checkpoint(never_killed))
    return saving, newest


@pytest.mark.parametrize("world", [1, 2])
def test_kill_9(tmp_path, data, monkeypatch, world):
    series(tmp_path / "o", data, monkeypatch, 3, world, world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_kill_9_thirty_times(tmp_path, data, monkeypatch, capsys, world):
    saving, newest = series(tmp_path / "o", data, monkeypatch, 30, world, 0)
    with capsys.disabled():
        print(f"{world} ranks, 30 kills, {saving} left a save unfinished; {newest} steps done")
    assert saving >= 5


@pytest.mark.parametrize("what", ["train_state", "weights", "rank 1"])
def test_a_full_disk_stops_with_the_old_checkpoint_intact(tmp_path, data, monkeypatch, capfd, what):
    """A limit on the size of a file stands for the disk: writing fails in the same places, for
    real."""
    out = tmp_path / "o"
    world = 2 if what == "rank 1" else 1
    more = ["--save-every", 2]
    on_ranks(sft.main, args(out, data, *more, steps=6), world)
    whole_run = weights(out / "final")
    for folder in "final", "step_000004", "step_000006":
        shutil.rmtree(out / folder)
    size = (out / "step_000002" / "model.safetensors").stat().st_size
    limit = size - 1 if what == "weights" else 30000

    def fill():
        if os.environ.get("RANK", "1") == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with monkeypatch.context() as patch:
        at_step(patch, 2, fill)
        on_ranks(
            lambda argv: model.run_main(lambda: sft.main(argv), ""),
            args(out, data, *more, "--resume"),
            world,
            1,
        )
    error = capfd.readouterr().err.strip()
    assert error.startswith(f"error: {out}/step_000004.tmp: could not be written (")
    assert "File too large" in error and error.endswith("--resume") and "\n" not in error
    assert sorted(p.name for p in out.iterdir()) == ["log.jsonl", "step_000002"]
    assert whole(model.latest_checkpoint(out)) == 2
    on_ranks(sft.main, args(out, data, *more, "--resume"), world)
    again = weights(out / "final")
    assert all(np.array_equal(again[k], whole_run[k]) for k in again)


def test_sigterm_ends_a_run_whose_weights_are_saved():
    """In the last evaluation, of minutes, it was noted and never looked at."""
    default = signal.getsignal(signal.SIGTERM)
    model.stop_on_sigterm()
    model.end_on_sigterm()  # none has come
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    model.stop_on_sigterm()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        model.end_on_sigterm()
    assert ended.value.code == 143
    model.SIGTERM_CAME.clear()
    signal.signal(signal.SIGTERM, default)


def test_keep_deletes_what_is_older_and_unfinished(tmp_path):
    """And not the folders of another run that went further, nor what it has just written
    instead."""
    for name in "step_000100", "step_000001.tmp", "features":
        (tmp_path / name).mkdir()
    cfg = types.SimpleNamespace(out=tmp_path, save_every=2, keep=2)
    model.SIGTERM_CAME.clear()
    for step in range(1, 8):
        model.save_step(cfg, step, {}, lambda folder, run: folder.mkdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "features",
        "step_000004",
        "step_000006",
        "step_000100",
    ]
    for step in range(10**6 - 2, 10**6 + 3):  # names are no longer of one length
        model.save_step(cfg, step, {}, lambda folder, run: folder.mkdir())
    assert [p.name for p in model._saved_steps(tmp_path)] == ["step_1000000", "step_1000002"]


def test_a_checkpoint_is_written_over_without_a_moment_without_one(tmp_path, monkeypatch):
    """Also where two names cannot be exchanged, and where an earlier such attempt was killed."""
    for libc in ctypes.CDLL(None), None:
        monkeypatch.setattr(ctypes, "CDLL", lambda _, libc=libc: libc)
        for text in "old", "new":
            (tmp_path / "final.tmp").mkdir()
            (tmp_path / "final.tmp" / "run.json").write_text(text)
            model._swap_in(tmp_path / "final.tmp", tmp_path / "final")
        assert (tmp_path / "final" / "run.json").read_text() == "new"
        assert [p.name for p in tmp_path.iterdir()] == ["final"]
        (tmp_path / "final.old").mkdir()


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path, data):
    """A small file system in memory, where mounting one is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    sft_py = Path(__file__).parents[1] / "sft.py"
    argv = args(disk / "o", data, "--save-every", 1, steps=9)
    command = [sys.executable, sft_py, *argv]
    script = (
        f"mount -t tmpfs -o size=8m none {disk} && {shlex.join(map(str, command))}; ls {disk}/o"
    )
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"mounting is not allowed here: {e}")
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and "o space left on device" in error, done.stderr
    names = done.stdout.split()
    assert "step_000001" in names and "final" not in names and not [x for x in names if "tmp" in x]
