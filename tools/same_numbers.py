"""The proof that a refactoring changed no number: two trees in which speedrun.sh has run.

    git worktree add --detach ../before main && (cd ../before && bash speedrun.sh)
    bash speedrun.sh
    python -m tools.same_numbers ../before .

Compared are all metrics of results/speedrun.json and all records of each stage's log.jsonl but for
clocks, to the last digit. --renamed old=new: a log key that has another name now. --added: log keys
that were not there before.
Ends with 1 and the first difference of each file when one differs.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

CLOCKS = {"seconds", "samples_per_s", "steps_per_s", "tokens_per_s", "rollout_s", "update_s"}
LOGS = ["sft", "grpo", "vla/base", "vla/SFT", "vla/SFT+RL"]  # folders of a speedrun


def result_records(tree: Path) -> dict[str, dict]:
    """ "model: metric" -> its interval, or the values that differences are made from; "tokens:
    metric" of the expert through the action tokens."""
    results = json.loads((tree / "results/speedrun.json").read_text())
    records = {}
    for metric, value in results.get("tokens", {"metrics": {}})["metrics"].items():
        records[f"tokens: {metric}"] = value
    for name, variant in results["arms"].items():
        for kind in ("metrics", "paired"):
            for metric, value in variant[kind].items():
                records[f"{name}: {kind}: {metric}"] = value
    return records


def log_records(path: Path, renamed: dict[str, str]) -> Iterator[dict]:
    """The records of a log.jsonl without its head, which holds configuration and versions."""
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if "config" not in record:
            named = {renamed.get(key, key): value for key, value in record.items()}
            yield {key: value for key, value in named.items() if key not in CLOCKS}


def differences(
    before: Path, after: Path, renamed: dict[str, str], added: list[str]
) -> tuple[int, list[str]]:
    """-> how many numbers and records were compared, a line for each file that differs."""
    old_results, new_results = result_records(before), result_records(after)
    compared = len(old_results)
    lines = []
    for name in [*old_results, *(new_results.keys() - old_results.keys())]:
        old, new = old_results.get(name), new_results.get(name)
        if old != new:
            lines.append(f"results/speedrun.json: {name} was {old}, is {new}")
            break
    for folder in LOGS:
        name = f"runs/speedrun/{folder}/log.jsonl"
        old_log = list(log_records(before / name, renamed))
        new_log = list(log_records(after / name, {}))
        for record in new_log:
            for key in added:
                record.pop(key, None)
        compared += len(old_log)
        if len(old_log) != len(new_log):
            lines.append(f"{name}: had {len(old_log)} records, has {len(new_log)}")
            continue
        for old, new in zip(old_log, new_log, strict=True):
            if old != new:
                keys = [key for key in old | new if old.get(key) != new.get(key)]
                lines.append(f"{name}: step {old.get('step')}: {', '.join(keys)} differ")
                break
    return compared, lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.same_numbers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, help="tree before the change")
    parser.add_argument("after", type=Path, help="tree after it")
    parser.add_argument("--renamed", nargs="*", default=[], metavar="OLD=NEW", help="log keys")
    parser.add_argument("--added", nargs="*", default=[], metavar="NEW", help="log keys")
    args = parser.parse_args(argv)
    renamed = {}
    for pair in args.renamed:
        old, _, new = pair.partition("=")
        if not old or not new:
            parser.error(f"--renamed {pair}: write OLD=NEW, as norm=grad_norm")
        renamed[old] = new
    try:
        compared, lines = differences(args.before, args.after, renamed, args.added)
    except OSError as e:
        raise SystemExit(f"error: {e}; run speedrun.sh in both trees first") from e
    print("\n".join(lines) or f"the same: {compared} metrics and records")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
