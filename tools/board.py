"""Follows the logs of runs into TensorBoard, under the names that TRL's users know.

    python -m tools.board runs                 # goes on as long as runs do; Ctrl-C stops it
    python -m tools.board runs --once          # what there is, then ends
    tensorboard --logdir runs/board

Each log.jsonl below the folder, also of runs that begin later, becomes event files in a folder of
the same name below --out: numbers, GRPO's shown rollouts and the configuration as text. What was
there of an earlier call is written anew. A resumed run goes on where it was resumed; a new run in
the folder of an old one takes its place. docs/glossary.md says what the names mean; tag() gives
them. A number of ours that TRL does not have keeps its name, below "train" or "eval".

Needs the package tensorboard, not torch: it only reads log.jsonl.
"""

import argparse
import json
import re
import time
from pathlib import Path

from fast_tokenizer import positive
from tools.extras import require

TENSORBOARD = "tensorboard==2.21.0"
SUFFIX = ".roboalign"  # of the event files that are ours

# ---- Names ---------------------------------------------------------------------------------------

TRL_NAMES = {  # ours: TRL's
    "r_f": "rewards/r_f/mean",
    "r_a": "rewards/r_a/mean",
    "completion_length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "clip_fraction": "clip_ratio/region_mean",
    "sampler_gap": "sampling/sampling_logp_difference/mean",
    "lr": "learning_rate",
    "token_accuracy": "mean_token_accuracy",
}
HELD_OUT = {  # what names of evaluations begin with: the folder of the rest
    "eval_sampled_": "eval/",  # TRL evaluates sampled completions
    "eval_greedy_": "eval_greedy/",
    "held_": "eval/",
}
OF_SFT = r"(greedy|probe)_.*|.*_(loss|token_accuracy)"  # its evaluations; the latter of each source


def tag(name: str) -> str:
    """The board's name of a key of log.jsonl.

    lr: train/learning_rate;  eval_sampled_r_a: eval/rewards/r_a/mean;  held_l1: eval/l1"""
    for beginning, folder in HELD_OUT.items():
        if name.startswith(beginning):
            rest = name.removeprefix(beginning)
            return folder + TRL_NAMES.get(rest, rest)
    if re.fullmatch(OF_SFT, name) and name not in TRL_NAMES:
        return f"eval/{name}"
    return f"train/{TRL_NAMES.get(name, name)}"


# ---- Following a log -----------------------------------------------------------------------------


def read_record(log: Path, number: int, line: bytes | str) -> dict:
    """A line of log.jsonl: the head of a run ("config") or what it logs at a "step". ValueError
    naming the line when it is neither."""
    try:
        record = json.loads(line)
    except ValueError as e:  # also bytes that are no text
        raise ValueError(f"{log}:{number}: not JSON ({e}); delete the line") from e
    is_head = isinstance(record, dict) and isinstance(record.get("config"), dict)
    is_step = isinstance(record, dict) and isinstance(record.get("step"), int)
    if not is_head and not is_step:
        raise ValueError(f'{log}:{number}: neither "config" nor a "step" in it; delete the line')
    return record


def is_new_run(record: dict) -> bool:
    """Whether what the log has before this record is of a run that no longer counts."""
    return "config" in record and not record["config"].get("resume")


def start_times(records: list[dict], ended: float) -> list[float]:
    """Of each record the time.time() at which its run's "seconds" were 0, if the last record was
    written at `ended` and each run right after the one before it."""
    times = []
    start = None  # of the run of the records at hand
    for record in reversed(records):
        if start is None:
            start = ended - record.get("seconds", 0)
        times.append(start)
        if "config" in record:
            ended = start
            start = None
    return times[::-1]


class Follower:
    """A log.jsonl that grows, and its event files in `folder`."""

    def __init__(self, log: Path, folder: Path):
        """ValueError when the package is missing."""
        (self.files, self.events, self.summaries, self.texts) = require(
            TENSORBOARD,
            "tensorboard.summary.writer.event_file_writer",
            "tensorboard.compat.proto.event_pb2",
            "tensorboard.compat.proto.summary_pb2",
            "tensorboard.plugins.text.summary_v2",
        )
        self.log = log
        self.folder = folder
        self.writer = None
        self.begin()

    def begin(self) -> None:
        """From the first byte of the log on."""
        self.read = 0  # bytes of the log
        self.line = 0
        self.empty_folder()

    def empty_folder(self) -> None:
        """New event files in the place of any that are ours."""
        if self.writer is not None:
            self.writer.close()
        for old in self.folder.glob(f"*{SUFFIX}"):
            old.unlink()
        self.writer = self.files.EventFileWriter(str(self.folder), filename_suffix=SUFFIX)
        self.started = None  # time.time() at which the run's "seconds" are 0
        self.is_resumed = False  # and has logged nothing since

    def follow(self) -> int:
        """Writes what the log has more than at the last call -> how many records that were.

        A line that is still being written waits. ValueError naming a line that is no record."""
        # 1. the new lines
        size = self.log.stat().st_size
        if size < self.read:  # another log, in the place of the one that was read
            self.begin()
        with open(self.log, "rb") as file:
            file.seek(self.read)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self.read += len(new)
        records = []
        for line in new.splitlines():
            self.line += 1
            records.append(read_record(self.log, self.line, line))

        # 2. as events; the last record was written just now
        times = start_times(records, self.log.stat().st_mtime)
        for record, started in zip(records, times, strict=True):
            if "config" in record:
                if is_new_run(record):
                    self.empty_folder()
                self.started = started
                self.is_resumed = True
                self.write_config(record)
                continue
            if self.started is None:  # a log without a head
                self.started = started
            if self.is_resumed:
                self.forget_from(record["step"])
                self.is_resumed = False
            self.write_record(record)
        self.writer.flush()
        return len(records)

    def forget_from(self, step: int) -> None:
        """TensorBoard leaves out what it has of this step and later ones: they are repeated."""
        start = self.events.SessionLog(status=self.events.SessionLog.START)
        self.writer.add_event(
            self.events.Event(session_log=start, step=step, wall_time=self.started)
        )

    def write_record(self, record: dict) -> None:
        """A summary of all numbers of a step; what is text, GRPO's rollout, stands beside."""
        step = record["step"]
        wall_time = self.started + record.get("seconds", 0)
        values = []
        for name, value in record.items():
            if isinstance(value, str):
                self.write_text(name, value, step, wall_time)
            elif name != "step" and isinstance(value, int | float):
                values.append(self.summaries.Summary.Value(tag=tag(name), simple_value=value))
        self.add(self.summaries.Summary(value=values), step, wall_time)

    def write_config(self, head: dict) -> None:
        """The configuration and what stands beside it, as a table."""
        settings = {**head["config"], **{k: v for k, v in head.items() if k != "config"}}
        rows = [f"| {name} | {value} |" for name, value in settings.items()]
        table = "\n".join(["| setting | value |", "|---|---|", *rows])
        self.write_text("config", table, 0, self.started)

    def write_text(self, name: str, text: str, step: int, wall_time: float) -> None:
        self.add(self.texts.text_pb(name, text), step, wall_time)

    def add(self, summary, step: int, wall_time: float) -> None:
        self.writer.add_event(self.events.Event(summary=summary, step=step, wall_time=wall_time))


# ---- Command -------------------------------------------------------------------------------------


def follow_all(runs: Path, out: Path, followers: dict[Path, Follower]) -> int:
    """One round over all logs below `runs`, new ones too -> how many records were new."""
    new = 0
    for log in sorted(runs.rglob("log.jsonl")):
        if log not in followers:
            followers[log] = Follower(log, out / log.parent.relative_to(runs))
        new += followers[log].follow()
    return new


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.board",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", help="folder of a run, or one above several")
    add("--out", default="", help="folder of the event files; empty: board/ in RUNS")
    add("--every", type=positive, default=10.0, help="seconds between two looks at the logs")
    add("--once", action="store_true", help="end after the first look")
    args = parser.parse_args(argv)
    runs = Path(args.runs)
    out = Path(args.out) if args.out else runs / "board"
    if not runs.is_dir():
        raise SystemExit(f"error: {runs}: no such folder; name the --out of a stage, or one above")
    followers = {}
    try:
        new = follow_all(runs, out, followers)
        if args.once and not followers:
            raise FileNotFoundError(f"{runs}: no log.jsonl in it or below")
        print(
            f"{out}: {len(followers)} runs, {new} records; tensorboard --logdir {out}", flush=True
        )
        while not args.once:
            time.sleep(args.every)
            follow_all(runs, out, followers)
    except KeyboardInterrupt:
        pass
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    finally:
        for follower in followers.values():
            follower.writer.close()


if __name__ == "__main__":
    main()
