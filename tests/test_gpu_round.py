"""`make gpu` on a machine without one, its parts in a dry run, and what it says of those that fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_round import KERNEL_TESTS, SUITES, Part, parts, run_parts

ROOT = Path(__file__).resolve().parent.parent
TEN_MINUTES = 600


def gpu_round(*options):
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_round", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_succeeds():
    result = gpu_round()
    assert result.returncode == 0
    assert result.stdout.startswith("There is no CUDA or ROCm GPU here, so nothing was run; ")
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.timeout(900)
def test_a_dry_run_passes_all_parts(tmp_path):
    result = gpu_round("--dry-run", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    _, _, summary = result.stdout.partition("--- summary\n")
    names = [line.partition(": passed, ")[0] for line in summary.splitlines()]
    assert names == ["tests", *(f"bench {suite}" for suite in SUITES)]
    assert {path.stem.split("_", 2)[2] for path in tmp_path.glob("*/*.json")} == set(SUITES)


def test_the_round_fits_into_ten_minutes_and_names_what_exists(tmp_path):
    todo = parts(tmp_path, dry_run=False)
    assert sum(part.seconds for part in todo) <= TEN_MINUTES
    for name in KERNEL_TESTS:
        assert f"tests/kernels/{name}.py" in todo[0].command
    for suite in SUITES:
        assert (ROOT / "benchmarks" / f"bench_{suite}.py").exists()


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(capfd):
    todo = [
        Part("failing", (sys.executable, "-c", "raise SystemExit(3)"), 60),
        Part("hanging", (sys.executable, "-c", "import time; time.sleep(60)"), 1),
        Part("good", (sys.executable, "-c", "print('ran')"), 60),
    ]
    assert run_parts(todo) == 1
    shown = capfd.readouterr().out
    assert "failing: failed (exit status 3), " in shown
    assert "hanging: stopped after 1 s, " in shown
    assert "ran\n" in shown
    assert "good: passed, " in shown
    assert run_parts(todo[2:]) == 0
