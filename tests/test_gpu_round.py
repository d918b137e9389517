"""`make gpu` on a machine without one, its parts in a dry run, and what it says of those that fail."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_round as round_of_parts
from benchmarks import small_cases
from benchmarks.gpu_round import (
    BARS,
    COMPARISONS,
    KERNEL_TESTS,
    OPTION_TESTS,
    PEERS,
    Part,
    longest,
    parts,
    run_parts,
)

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
    assert names == ["test close", "small cases", "bars", "compare", "peers"]
    assert {path.stem.split("_", 2)[2] for path in tmp_path.glob("*/*.json")} == {*BARS, *COMPARISONS}


def test_the_round_fits_into_ten_minutes_and_names_what_exists(tmp_path):
    todo = parts(tmp_path, dry_run=False)
    assert longest(todo) <= TEN_MINUTES
    commands = [" ".join(part.command) for part in todo]
    for name in KERNEL_TESTS + OPTION_TESTS:
        assert (ROOT / f"tests/kernels/test_{name}.py").exists()
        assert any(f"tests/kernels/test_{name}.py" in command for command in commands)
    marked = {
        path.stem for path in (ROOT / "tests/kernels").glob("*.py") if "pytest.mark.gpu" in path.read_text()
    }
    assert marked <= {f"test_{name}" for name in KERNEL_TESTS + OPTION_TESTS}, "the round leaves out a test"
    for suite in {*BARS, *COMPARISONS, *PEERS}:
        assert (ROOT / "benchmarks" / f"bench_{suite}.py").exists()
    operations = {path.stem for path in (ROOT / "kernels/moe_runtime_kernels/_triton").glob("[a-z]*.py")}
    assert operations & {
        path.stem.removeprefix("test_") for path in (ROOT / "tests/kernels").glob("*.py")
    } == set(KERNEL_TESTS), "an operation with kernels is not tested on a GPU"


def test_correctness_comes_first_then_bars_then_peers(tmp_path):
    kinds = [part.name.split()[0] for part in parts(tmp_path, dry_run=False) if not part.absent]
    order = ["test", "small", "bars", "compare", "peers"]
    assert list(dict.fromkeys(kinds)) == order
    assert kinds == sorted(kinds, key=order.index)


def test_small_cases_run_without_a_memory_checker(tmp_path, monkeypatch):
    monkeypatch.setattr(round_of_parts.shutil, "which", lambda name: None)
    todo = {part.name: part for part in parts(tmp_path, dry_run=False)}
    assert todo["small cases"].command == (sys.executable, "-m", "benchmarks.small_cases")
    assert todo["memcheck"].command == ()
    assert todo["memcheck"].absent == "compute-sanitizer is not on the PATH"


@pytest.mark.parametrize("failing", [None, 1, 2])
def test_small_cases_run_under_the_memory_checker_after_they_ran_without(
    tmp_path, monkeypatch, failing, capfd
):
    """Stand-ins for Python and for the checker, which say what they are given; one of the runs may fail."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    count = f"echo run >> '{folder}/runs'; test $(wc -l < '{folder}/runs') != {failing or 0}"
    python, checker = folder / "python", folder / "compute-sanitizer"
    python.write_text(f'#!/bin/sh\necho "python $@ caching=$PYTORCH_NO_CUDA_MEMORY_CACHING"\n{count}\n')
    checker.write_text('#!/bin/sh\necho "checker $1 $2 $3 $4"\nshift 4\n"$@"\n')
    for path in (python, checker):
        path.chmod(0o755)
    monkeypatch.setattr(round_of_parts.shutil, "which", lambda name: str(checker))
    monkeypatch.setattr(round_of_parts.sys, "executable", str(python))
    todo = [part for part in parts(tmp_path, dry_run=False) if "memcheck" in part.name]
    assert [part.name for part in todo] == ["small cases and memcheck"]
    assert run_parts(todo) == int(failing is not None)
    cases = "python -m benchmarks.small_cases caching=1"
    shown = [line for line in capfd.readouterr().out.splitlines() if line.startswith(("python", "checker"))]
    checked = ["checker --tool memcheck --error-exitcode 9", cases]
    assert shown == [cases, *(checked if failing != 1 else [])]


def test_the_tests_run_where_pytest_timeout_is_absent(tmp_path):
    (command,) = (part.command for part in parts(tmp_path, dry_run=False) if part.name == "test close")
    result = subprocess.run(
        [*command, "-p", "no:timeout"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout


def test_parts_run_together_and_an_absent_tool_fails_nothing(capfd):
    def meet(mine, other):  # each waits for the other, so that one after the other would never end
        code = f"import os, time; open({mine!r}, 'w')\nwhile not os.path.exists({other!r}): time.sleep(0.01)"
        return (sys.executable, "-c", f"{code}\nprint('met')")

    with tempfile.TemporaryDirectory() as folder:
        first, second = f"{folder}/first", f"{folder}/second"
        todo = [
            Part("first", meet(first, second), 60, together=True),
            Part("second", meet(second, first), 60, together=True),
            Part("checker", (), 0, together=True, absent="no such tool"),
        ]
        assert run_parts(todo) == 0
    shown = capfd.readouterr().out
    assert shown.count("met\n") == 2
    assert "checker: absent: no such tool\n" in shown
    assert "first: passed, " in shown


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, the cases themselves are run")
@pytest.mark.parametrize("wrong", [None, "one element", "not finite", "gradient"])
def test_small_cases_find_a_wrong_result(monkeypatch, capsys, wrong):
    """What `scatter_rows` gives in each case's first run, which is the device's."""
    scatter_rows, calls = small_cases.scatter_rows, []

    def scatter(y_ND, plan):
        calls.append(y_ND.dtype)
        out = scatter_rows(y_ND, plan)
        if len(calls) % 3 != 1 or wrong is None:
            return out
        if wrong == "gradient":  # twice what it is
            return 2 * out - out.detach()
        change = torch.zeros_like(out)
        change[3, 5] = 1 if wrong == "one element" else torch.nan
        return out + change

    monkeypatch.setattr(small_cases, "scatter_rows", scatter)
    assert small_cases.main() == int(wrong is not None)
    said = capsys.readouterr().out.splitlines()
    if wrong is None:
        assert said == ["all small cases are right"]
    else:
        assert said[0] == "wrong:"
        assert len(said) == 5
        place = "gradient 0" if wrong == "gradient" else "output"
        assert all(
            line.startswith("scatter_rows in ") and f": {place} is off by " in line for line in said[1:]
        )
    assert calls == 2 * [torch.bfloat16] + [torch.float64] + calls[3:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, the cases themselves are run")
def test_small_cases_find_a_wrong_main_gradient(monkeypatch, capsys):
    expert_ffn, calls = small_cases.expert_ffn, []

    def ffn(*inputs, down_main_grad=None, **options):
        if down_main_grad is not None:
            calls.append(1)
            if len(calls) % 2:
                down_main_grad += 1  # the first of each case's two runs with one
        return expert_ffn(*inputs, down_main_grad=down_main_grad, **options)

    monkeypatch.setattr(small_cases, "expert_ffn", ffn)
    assert small_cases.main() == 1
    said = capsys.readouterr().out.splitlines()[1:]
    assert len(said) == 4
    assert all(line.startswith("expert_ffn with main") and ": gradient 2 is" in line for line in said)
