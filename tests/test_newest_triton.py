"""The kernels' tests in the interpreter of the newest Triton, and an ahead-of-time pass with it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEWEST = Path(sys.prefix) / "triton-newest"
TESTS = ROOT / "tests" / "kernels"

pytestmark = [
    pytest.mark.skipif(not NEWEST.exists(), reason=f"{NEWEST} is missing; requirements/install.sh makes it"),
    pytest.mark.timeout(900),
]


def run(*arguments):
    folders = (NEWEST, ROOT, ROOT / "kernels")
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def version_of(requirements):
    text = (ROOT / "requirements" / requirements).read_text()
    return re.search(r"triton==(\S+)", text).group(1)


def test_the_newest_is_the_pinned_one():
    result = run("-c", "import triton; print(triton.__version__)")
    assert result.stdout.strip() == version_of("triton-newest.txt") != version_of("triton.txt")


def test_kernels_pass_their_tests_in_the_newest_interpreter():
    files = sorted(TESTS.glob("test_*_kernels.py"))
    assert files
    # every kernel in one dtype, with several tiles, and descriptors; the pinned Triton runs everything
    chosen = "every_loop or several_tiles or every_routing or (expert_layers and gated and (16 or 128))"
    chosen = f"not fp16 and not every_tile and (({chosen}) or (match and not odd_sizes))"
    result = run("-m", "pytest", "-q", "-k", chosen, *files)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 80


def test_kernels_compile_ahead_of_time_with_the_newest(tmp_path):
    result = run(
        "-m", "benchmarks", "aot", "--output", tmp_path, "--targets", "sm_90", "gfx942", "--share", "0.01"
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    (path,) = tmp_path.glob("aot/*.json")
    assert path.stem.endswith(f"_triton-{version_of('triton-newest.txt')}")
