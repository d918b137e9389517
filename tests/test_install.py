"""What `requirements/install.sh` asks pip for, with a pip that only writes it down."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "requirements" / "install.sh"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have one torch build each")


def script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def installs(tmp_path, *, gpu):
    """The arguments of every `pip install`, in order."""
    script(tmp_path / "venv" / "bin" / "python", f'echo "$@" >> {tmp_path}/calls')
    script(tmp_path / "path" / "nvidia-smi", "exit 0" if gpu else "exit 9")
    path = os.pathsep.join((str(tmp_path / "path"), os.environ["PATH"]))
    subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "venv")],
        env={**os.environ, "PATH": path, "PYTHON": sys.executable},
        check=True,
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    return [call for call in calls if " install " in call]


def test_without_a_gpu_torch_comes_from_where_only_cpu_builds_are(tmp_path):
    """Also where the environment has a torch already: it may not be the pinned one."""
    first, *others = installs(tmp_path, gpu=False)
    assert "--no-index --no-deps" in first
    assert "torch-cpu.txt" in first
    assert not any("torch-cuda.txt" in call for call in others)


def test_other_versions_go_into_folders_of_their_own(tmp_path):
    calls = installs(tmp_path, gpu=False)
    for name in ("triton-newest", "transformers-oldest"):
        (call,) = (call for call in calls if f"{name}.txt" in call)
        assert f"--no-deps --target {tmp_path / 'venv' / name} " in call


def test_with_a_gpu_torch_is_the_cuda_build(tmp_path):
    calls = installs(tmp_path, gpu=True)
    assert "torch-cuda.txt" in calls[0]
    assert not any("torch-cpu.txt" in call for call in calls)
