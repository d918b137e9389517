"""Everything that needs a GPU, in one command: the kernels' tests, then the benchmarks, in ten minutes.

    make gpu                                            in this checkout's own environment
    PYTHONPATH=.:kernels python -m benchmarks.gpu_round     in one that has torch, Triton and pytest

A part that fails or runs out of its time does not stop the others; the exit status is 1 then. Without a GPU
it says so and does nothing. `--dry-run` runs the same parts in tiny shapes on what there is.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL_TESTS = ("test_route", "test_plan", "test_permute", "test_combine")
SUITES = ("route", "plan", "permute", "combine", "moe_layer", "attention_mixture")


@dataclass(frozen=True)
class Part:
    """One command and the seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: int


def parts(output: Path, *, dry_run: bool) -> list[Part]:
    """What is run: 270 seconds of tests and 330 of benchmarks at most; a dry run may wait for a busy CPU."""
    tests_seconds, suite_seconds = (300, 300) if dry_run else (270, 55)
    pytest = (sys.executable, "-m", "pytest", "-q")
    files = () if dry_run else tuple(f"tests/kernels/{name}.py" for name in KERNEL_TESTS)
    tests = Part("tests", (*pytest, "tests/test_close.py", *files), tests_seconds)
    bench = (sys.executable, "-m", "benchmarks", "run", "--output", str(output))
    tiny = ("--tiny",) if dry_run else ()
    return [
        tests,
        *(
            Part(f"bench {suite}", (*bench, *tiny, "--only", f"bench_{suite}"), suite_seconds)
            for suite in SUITES
        ),
    ]


def run_part(part: Part) -> str:
    """Run it and say how it ended: "passed", "failed (exit status 1)" or "stopped after 55 s"."""
    print(f"--- {part.name}", flush=True)
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    process = subprocess.Popen(
        part.command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, start_new_session=True
    )
    try:
        status = process.wait(part.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {part.seconds} s"
    return "passed" if status == 0 else f"failed (exit status {status})"


def run_parts(todo: list[Part]) -> int:
    """Run all of them, then list how each ended; 1 unless all passed."""
    ends = {}
    for part in todo:
        start = time.monotonic()
        ends[part.name] = (run_part(part), time.monotonic() - start)
    print("--- summary")
    for name, (end, seconds) in ends.items():
        print(f"{name}: {end}, {seconds:.0f} s")
    return int(any(end != "passed" for end, _ in ends.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result files"
    )
    arguments = parser.parse_args()
    missing = [name for name in ("pytest", "hypothesis", "pytest_timeout") if find_spec(name) is None]
    if missing:
        names = " ".join(name.replace("_", "-") for name in missing)
        print(f"The GPU round needs {', '.join(missing)}; run: python -m pip install {names}")
        return 2
    import torch

    if not torch.cuda.is_available() and not arguments.dry_run:
        print("There is no CUDA or ROCm GPU here, so nothing was run; --dry-run shows the parts on the CPU.")
        return 0
    gpu = torch.cuda.is_available()
    print(
        torch.cuda.get_device_name() if gpu else "a dry run on the CPU",
        f"torch {torch.__version__}",
        sep=", ",
    )
    return run_parts(parts(arguments.output.resolve(), dry_run=arguments.dry_run))


if __name__ == "__main__":
    sys.exit(main())
