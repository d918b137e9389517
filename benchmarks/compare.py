"""`python -m benchmarks compare OLD NEW`: what became slower between two result files of one suite.

A timing is slower, or faster, when its median changed by more than the threshold and the middle halves of the
samples do not overlap: a difference within the spread of either run is noise. The exit status is 1 when an
implementation of this project became slower, and 2 when the files cannot be compared. Baselines and other
libraries are shown and decide nothing.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OURS = ("moe", "one_call", "transformers_accelerated")  # beside every name with "moe_runtime" in it
CANNOT = 2


@dataclass(frozen=True)
class Change:
    """One implementation of one case; seconds are medians, `ratio` is new over old."""

    case: dict[str, Any]
    name: str
    old_s: float
    new_s: float
    ratio: float
    verdict: str  # slower, faster, same

    @property
    def regression(self) -> bool:
        return self.verdict == "slower" and ("moe_runtime" in self.name or self.name in OURS)

    def line(self) -> str:
        case = " ".join(f"{key}={value}" for key, value in self.case.items())
        times = f"{1e3 * self.old_s:.4g} -> {1e3 * self.new_s:.4g} ms"
        return f"{self.verdict:6} {self.ratio:6.2f} times  {times}  {self.name}  {case}"


@dataclass(frozen=True)
class Comparison:
    """All implementations that both files timed, the worst first, and the others' names."""

    suite: str
    device: str
    threshold: float
    changes: list[Change]
    only_old: list[str]
    only_new: list[str]
    versions: dict[str, list[str | None]]  # those that differ: old, new

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regression]


def read_result(path: Path) -> dict[str, Any]:
    """A result file with timings.

    Raises:
        ValueError: the file is not there, or is none.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be a result file of the benchmarks, and is not there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        timed = bool(content["suite"] and content["machine"]["device"] and content["rows"][0]["timings"])
    except (ValueError, KeyError, TypeError, IndexError):
        timed = False
    if not timed:
        raise ValueError(
            f"{path} must be a result file with timings, as `python -m benchmarks run` writes them"
        )
    return content


def device(content: dict[str, Any]) -> str:
    machine = content["machine"]
    return f"{machine['device']} ({machine['kind']}, {machine['cores']} cores, {machine['threads']} threads)"


def timings(content: dict[str, Any]) -> dict[tuple[str, str], tuple[dict[str, Any], dict[str, float]]]:
    """(case as text, implementation) -> the case and its timing."""
    return {
        (json.dumps(row["case"], sort_keys=True), name): (row["case"], timing)
        for row in content["rows"]
        for name, timing in row["timings"].items()
    }


def judge(old: dict[str, float], new: dict[str, float], threshold: float) -> str:
    """ "slower" or "faster" where the change is larger than threshold and spread, else "same"."""
    if new["median_s"] > old["median_s"] * (1 + threshold) and new["q1_s"] > old["q3_s"]:
        return "slower"
    if old["median_s"] > new["median_s"] * (1 + threshold) and old["q1_s"] > new["q3_s"]:
        return "faster"
    return "same"


def compare_results(old_path: Path, new_path: Path, threshold: float = 0.1) -> Comparison:
    """Compare two files.

    Args:
        old_path, new_path: result files of the same suite, device and number of threads.
        threshold: how much a median may change, as a share; above 0.

    Raises:
        ValueError: a file is no result file, or they are not of the same suite and device, or have no case in
            common.
    """
    old, new = read_result(old_path), read_result(new_path)
    if old["suite"] != new["suite"]:
        raise ValueError(
            f"both files must be of one suite: {old_path} is of {old['suite']}, {new_path} of {new['suite']}"
        )
    if device(old) != device(new):
        raise ValueError(
            f"both files must be of one device: {old_path} was measured on {device(old)}, {new_path} on "
            f"{device(new)}"
        )
    before, after = timings(old), timings(new)
    changes = []
    for key in before.keys() & after.keys():
        (case, was), (_, now) = before[key], after[key]
        ratio = now["median_s"] / was["median_s"]
        verdict = judge(was, now, threshold)
        changes.append(Change(case, key[1], was["median_s"], now["median_s"], ratio, verdict))
    if not changes:
        raise ValueError(f"{old_path} and {new_path} must have timed the same cases, and have none in common")
    versions = {name: content["machine"]["versions"] for name, content in (("old", old), ("new", new))}
    return Comparison(
        suite=new["suite"],
        device=device(new),
        threshold=threshold,
        changes=sorted(changes, key=lambda change: (-change.ratio, change.line())),
        only_old=sorted(" ".join(key) for key in before.keys() - after.keys()),
        only_new=sorted(" ".join(key) for key in after.keys() - before.keys()),
        versions={
            name: [versions["old"].get(name), versions["new"].get(name)]
            for name in sorted(versions["old"].keys() | versions["new"].keys())
            if versions["old"].get(name) != versions["new"].get(name)
        },
    )


def show(found: Comparison) -> str:
    lines = [f"{found.suite} on {found.device}, threshold {found.threshold:.0%}"]
    lines += [f"{name} {old} -> {new}" for name, (old, new) in found.versions.items()]
    lines += [change.line() for change in found.changes if change.verdict != "same"]
    lines += [f"only in the old file: {key}" for key in found.only_old]
    lines += [f"only in the new file: {key}" for key in found.only_new]
    count = {
        name: sum(change.verdict == name for change in found.changes) for name in ("slower", "faster", "same")
    }
    lines.append(
        f"{len(found.changes)} timings: {count['slower']} slower, {count['faster']} faster, {count['same']} "
        f"within the threshold or the spread; {len(found.regressions)} regressions of this project"
    )
    return "\n".join(lines)


# --- the command ---


def share(text: str) -> float:
    """ "10%" or "0.1" as 0.1."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a share above 0 such as 10% or 0.1, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, help="result file to compare with")
    parser.add_argument("new", type=Path, help="result file of the same suite and device")
    parser.add_argument(
        "--threshold", type=share, default=0.1, help="how much a median may change; 10%% if not given"
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def main(arguments: argparse.Namespace) -> int:
    try:
        found = compare_results(arguments.old, arguments.new, arguments.threshold)
    except ValueError as reason:
        print(f"compare: {reason}", file=sys.stderr)
        return CANNOT
    print(json.dumps(asdict(found), indent=1) if arguments.json else show(found))
    return int(bool(found.regressions))
