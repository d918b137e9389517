"""Other models' experts and routers in the oldest transformers that is supported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLDEST = Path(sys.prefix) / "transformers-oldest"

pytestmark = [
    pytest.mark.skipif(not OLDEST.exists(), reason=f"{OLDEST} is missing; requirements/install.sh makes it"),
    pytest.mark.timeout(600),
]


def run(*arguments):
    folders = (OLDEST, ROOT, ROOT / "kernels")
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def pinned():
    text = (ROOT / "requirements" / "transformers-oldest.txt").read_text()
    return re.search(r"transformers==(\S+)", text).group(1)


def test_the_oldest_is_the_pinned_one_and_the_oldest_of_setup():
    result = run("-c", "import transformers; print(transformers.__version__)")
    assert result.stdout.strip() == pinned(), result.stderr
    major, minor, _ = pinned().split(".")
    assert f'"transformers>={major}.{minor},' in (ROOT / "setup.py").read_text()


def test_families_and_routers_equal_eager_in_the_oldest():
    files = [
        ROOT / "tests" / "moe_runtime" / f"test_{name}.py" for name in ("experts_interface", "accelerate")
    ]
    chosen = "families or swapped_router or (accelerated_model_is_the_model and (mixtral or granitemoe))"
    result = run("-m", "pytest", "-q", "-k", chosen, *files)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


def test_dense_families_equal_their_copies_in_the_oldest():
    """Its Gemma 2 leaves out the cap of scores unless it is loaded with an attention that has one."""
    chosen = "copy_is and (gemma2 or cohere2 or phi3-long)"
    result = run("-m", "pytest", "-q", "-k", chosen, ROOT / "tests" / "upcycle" / "test_families.py")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert "3 passed" in result.stdout


def test_a_training_that_was_stopped_goes_on_in_the_oldest():
    chosen = "(stopped_ends or falls) and mixtral"
    result = run("-m", "pytest", "-q", "-k", chosen, ROOT / "tests" / "moe_runtime" / "train" / "test_run.py")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert "2 passed" in result.stdout
