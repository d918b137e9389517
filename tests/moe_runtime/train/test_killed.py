import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_a_training_killed_ten_times_ends_with_the_same_bits(tmp_path):
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "kill_training.py", tmp_path, "ours", "10"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "10 kills" in done.stdout
