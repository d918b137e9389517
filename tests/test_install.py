"""What `requirements/install.sh` asks pip for, with a pip that only writes it down; what a wheel holds."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "requirements" / "install.sh"
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


def test_a_wheel_holds_every_file_of_the_packages(tmp_path):
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kernels", "moe_runtime", "upcycle"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
        )
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [
        *((tmp_path / "kernels").rglob("*")),
        *(path for name in ("moe_runtime", "upcycle") for path in (tmp_path / name).rglob("*")),
    ]
    expected = {
        path.relative_to(tmp_path).as_posix().removeprefix("kernels/") for path in files if path.is_file()
    }
    assert held == expected
