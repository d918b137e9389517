"""Everything that needs a GPU, in one command, in ten minutes: correctness, then the bars, then the peers.

    make gpu                                            in this checkout's own environment
    PYTHONPATH=.:kernels python -m benchmarks.gpu_round     in one that has torch, Triton and pytest

The tests of the kernels run side by side, because compiling takes most of their time; small cases run twice,
the second time under compute-sanitizer, where it is on the PATH. Benchmarks run one after the other: first
what docs/performance.md holds the kernels to, without other libraries, then comparisons, and last the
libraries that may tune themselves for minutes. A part that fails or runs out of its time does not stop the
others; the exit status is 1 then. Without a GPU it says so and does nothing. `--dry-run` runs the same parts
in tiny shapes on what there is.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL_TESTS = ("route", "plan", "permute", "combine", "grouped_gemm", "expert_ffn", "attention_mix")
# of single kernels, and of what they can do beyond forward and backward
OPTION_TESTS = ("aligned", "tma_kernels", "main_grad", "recompute", "memory", "capture")
TESTS_SECONDS = 150
# suite -> seconds; bars first
BARS = {"route": 30, "plan": 25, "combine": 30, "expert_ffn": 90}
COMPARISONS = {
    "grouped_gemm": 45,
    "permute": 30,
    "attention_mix": 40,
    "moe_layer": 25,
    "attention_mixture": 25,
}
PEERS = {"expert_ffn": 110}
DRY_SECONDS = 300  # a dry run may wait for a busy CPU
SANITIZER = "compute-sanitizer"
# pytest-timeout is not needed, because every part has its own limit; without it pytest warns of its setting
WITHOUT_TIMEOUT = ("-W", "ignore:Unknown config option:pytest.PytestConfigWarning")


@dataclass(frozen=True)
class Part:
    """One command and the seconds it may take.

    Neighbours with `together` run at the same time. `absent`: why it cannot run here; it has no command then.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    together: bool = False
    absent: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def parts(output: Path, *, dry_run: bool) -> list[Part]:
    """What is run; `longest` adds up to ten minutes, but for a dry run."""
    return [*_correctness(dry_run), *_benchmarks(output, dry_run)]


def _correctness(dry_run: bool) -> list[Part]:
    seconds = DRY_SECONDS if dry_run else TESTS_SECONDS
    pytest = (sys.executable, "-m", "pytest", "-q", *WITHOUT_TIMEOUT)
    tests = {"close": "tests/test_close.py"}
    if not dry_run:
        tests |= {name: f"tests/kernels/test_{name}.py" for name in KERNEL_TESTS + OPTION_TESTS}
    found = [Part(f"test {name}", (*pytest, path), seconds, together=True) for name, path in tests.items()]
    return [*found, *_small_cases(seconds, dry_run)]


def _small_cases(seconds: int, dry_run: bool) -> list[Part]:
    """Alone, then, when all kernels are compiled, under the memory checker, each tensor in its own memory.

    A dry run, or one without the checker, has the first only.
    """
    command = (sys.executable, "-m", "benchmarks.small_cases")
    tool = None if dry_run else shutil.which(SANITIZER)
    if tool is None:
        alone = Part("small cases", command, seconds, together=True)
        reason = f"{SANITIZER} is not on the PATH"
        return [alone] if dry_run else [alone, Part("memcheck", (), 0, together=True, absent=reason)]
    checked = (tool, "--tool", "memcheck", "--error-exitcode", "9", *command)
    both = ("sh", "-c", f"{shlex.join(command)} && {shlex.join(checked)}")
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [Part("small cases and memcheck", both, seconds, together=True, environment=environment)]


def _benchmarks(output: Path, dry_run: bool) -> list[Part]:
    """A process for each suite, so that one cannot take another's time; a dry run has one for each kind."""
    run = (sys.executable, "-m", "benchmarks", "run", "--output", str(output))
    kinds = {"bars": BARS, "compare": COMPARISONS, "peers": PEERS}
    found = []
    for kind, suites in kinds.items():
        options = ("--no-peers",) if kind == "bars" else ()
        if dry_run:
            only = " or ".join(f"bench_{suite}" for suite in suites)
            found.append(Part(kind, (*run, "--tiny", *options, "--only", only), DRY_SECONDS))
        else:
            found += [
                Part(f"{kind} {suite}", (*run, *options, "--only", f"bench_{suite}"), seconds)
                for suite, seconds in suites.items()
            ]
    return found


def longest(todo: list[Part]) -> int:
    """Seconds that all parts take at most; those that run together count as one."""
    groups = _groups(todo)
    return sum(max(part.seconds for part in group) for group in groups)


def _groups(todo: list[Part]) -> list[list[Part]]:
    """Parts that run at the same time."""
    groups: list[list[Part]] = []
    for together, neighbours in groupby(todo, key=lambda part: part.together):
        members = list(neighbours)
        groups += [members] if together else [[part] for part in members]
    return groups


def run_group(group: list[Part]) -> dict[str, str]:
    """Run them at the same time, print each one's output and say how each ended.

    "passed", "failed (exit status 1)", "stopped after 55 s" or "absent: " with the reason.
    """
    ends = {part.name: f"absent: {part.absent}" for part in group if part.absent}
    if len(group) == 1 and not ends:
        print(f"--- {group[0].name}", flush=True)  # its output is seen while it runs
    with tempfile.TemporaryDirectory() as folder:
        files = {part.name: Path(folder, str(i)) for i, part in enumerate(group) if not part.absent}
        started = {
            part.name: _start(part, files[part.name] if len(group) > 1 else None)
            for part in group
            if not part.absent
        }
        start = time.monotonic()
        for part in group:
            if part.absent:
                continue
            ends[part.name] = _end(started[part.name], part.seconds, start)
            if len(group) > 1:
                print(f"--- {part.name}", files[part.name].read_text(errors="replace"), sep="\n", flush=True)
    return ends


def _start(part: Part, output: Path | None) -> subprocess.Popen:
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path, **part.environment}
    if output is None:
        return subprocess.Popen(part.command, cwd=ROOT, env=environment, start_new_session=True)
    with output.open("w") as file:
        return subprocess.Popen(
            part.command, cwd=ROOT, env=environment, start_new_session=True, stdout=file, stderr=file
        )


def _end(process: subprocess.Popen, seconds: int, start: float) -> str:
    try:
        status = process.wait(max(start + seconds - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {seconds} s"
    return "passed" if status == 0 else f"failed (exit status {status})"


def run_parts(todo: list[Part]) -> int:
    """Run all of them, then list how each ended; 1 unless all that can run here passed."""
    ends: dict[str, str] = {}
    for group in _groups(todo):
        start = time.monotonic()
        found = run_group(group)
        seconds = time.monotonic() - start
        together = ", together" if len(group) > 1 else ""
        ends |= {
            name: end if end.startswith("absent") else f"{end}, {seconds:.0f} s{together}"
            for name, end in found.items()
        }
    print("--- summary")
    for name in (part.name for part in todo):
        print(f"{name}: {ends[name]}")
    return int(any(not end.startswith(("passed", "absent")) for end in ends.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result files"
    )
    arguments = parser.parse_args()
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        print(f"The GPU round needs {', '.join(missing)}; run: python -m pip install {' '.join(missing)}")
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
