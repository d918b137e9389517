"""`python -m benchmarks compare`: regressions, noise, and files that cannot be compared."""

import json
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks.compare import compare_results


def result(path, medians, *, spread=0.01, suite="expert_ffn", **machine):
    """A file with one row per number of tokens; {tokens: {implementation: milliseconds}}."""
    rows = [
        {
            "case": {"model": "m", "tokens": tokens},
            "timings": {
                name: {"median_s": ms / 1e3, "q1_s": ms * (1 - spread) / 1e3, "q3_s": ms * (1 + spread) / 1e3}
                for name, ms in timed.items()
            },
        }
        for tokens, timed in medians.items()
    ]
    described = {"device": "CPU X", "kind": "cpu", "cores": 2, "threads": 2, "versions": {"torch": "2.13.0"}}
    path.write_text(json.dumps({"suite": suite, "machine": described | machine, "rows": rows}))
    return path


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks", "compare", *map(str, words)])
    return command.main()


def test_a_slower_implementation_of_ours_is_a_regression(tmp_path, monkeypatch, capsys):
    old = result(tmp_path / "old.json", {16: {"moe_runtime": 1.0, "eager": 2.0}, 64: {"moe_runtime": 3.0}})
    new = result(tmp_path / "new.json", {16: {"moe_runtime": 1.2, "eager": 1.0}, 64: {"moe_runtime": 3.1}})
    assert run(monkeypatch, old, new) == 1
    assert capsys.readouterr().out.splitlines() == [
        "expert_ffn on CPU X (cpu, 2 cores, 2 threads), threshold 10%",
        "slower   1.20 times  1 -> 1.2 ms  moe_runtime  model=m tokens=16",
        "faster   0.50 times  2 -> 1 ms  eager  model=m tokens=16",
        "3 timings: 1 slower, 1 faster, 1 within the threshold or the spread; 1 regressions of this project",
    ]
    assert run(monkeypatch, old, new, "--threshold", "25%") == 0
    assert run(monkeypatch, old, new, "--threshold", "0.19") == 1
    assert run(monkeypatch, new, old) == 0


def test_what_lies_within_the_spread_is_noise(tmp_path):
    old = result(tmp_path / "old.json", {16: {"moe_runtime": 1.0}}, spread=0.15)
    new = result(tmp_path / "new.json", {16: {"moe_runtime": 1.3}}, spread=0.15)
    (change,) = compare_results(old, new).changes
    assert (change.verdict, round(change.ratio, 6)) == ("same", 1.3)
    new = result(tmp_path / "new.json", {16: {"moe_runtime": 1.4}}, spread=0.15)  # 1.15 < 1.19
    assert compare_results(old, new).regressions


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("moe_runtime", 1),
        ("transformers_moe_runtime", 1),
        ("one_call", 1),
        ("moe", 1),
        ("liger", 0),
        ("loop", 0),
    ],
)
def test_other_libraries_and_baselines_decide_nothing(tmp_path, name, ours):
    old = result(tmp_path / "old.json", {16: {name: 1.0}})
    new = result(tmp_path / "new.json", {16: {name: 9.0}})
    assert len(compare_results(old, new).regressions) == ours
    assert compare_results(old, new).changes[0].verdict == "slower"


def test_json_has_every_timing_and_what_only_one_file_has(tmp_path, monkeypatch, capsys):
    old = result(tmp_path / "old.json", {16: {"moe_runtime": 1.0}, 32: {"moe_runtime": 1.0}})
    new = result(
        tmp_path / "new.json",
        {16: {"moe_runtime": 1.0, "liger": 1.0}},
        versions={"torch": "2.14.0", "triton": "3.9"},
    )
    assert run(monkeypatch, old, new, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    case = {"model": "m", "tokens": 16}
    same = {
        "case": case,
        "name": "moe_runtime",
        "old_s": 1e-3,
        "new_s": 1e-3,
        "ratio": 1.0,
        "verdict": "same",
    }
    assert found["changes"] == [same]
    assert found["only_old"] == ['{"model": "m", "tokens": 32} moe_runtime']
    assert found["only_new"] == ['{"model": "m", "tokens": 16} liger']
    assert found["versions"] == {"torch": ["2.13.0", "2.14.0"], "triton": [None, "3.9"]}
    run(monkeypatch, old, new)
    shown = capsys.readouterr().out
    assert "torch 2.13.0 -> 2.14.0\n" in shown
    assert 'only in the old file: {"model": "m", "tokens": 32} moe_runtime\n' in shown


def test_files_that_cannot_be_compared_are_refused_with_a_sentence(tmp_path, monkeypatch, capsys):
    good = result(tmp_path / "good.json", {16: {"moe_runtime": 1.0}})

    def refusal(other):
        assert run(monkeypatch, good, other) == 2
        return capsys.readouterr().err

    other = result(tmp_path / "suite.json", {16: {"moe_runtime": 1.0}}, suite="plan")
    assert refusal(other) == (
        f"compare: both files must be of one suite: {good} is of expert_ffn, {other} of plan\n"
    )
    other = result(tmp_path / "device.json", {16: {"moe_runtime": 1.0}}, device="CPU Y")
    assert refusal(other) == (
        f"compare: both files must be of one device: {good} was measured on CPU X (cpu, 2 cores, 2 threads), "
        f"{other} on CPU Y (cpu, 2 cores, 2 threads)\n"
    )
    other = result(tmp_path / "threads.json", {16: {"moe_runtime": 1.0}}, threads=1)
    assert "on CPU X (cpu, 2 cores, 1 threads)" in refusal(other)
    other = result(tmp_path / "cases.json", {17: {"moe_runtime": 1.0}})
    assert refusal(other) == (
        f"compare: {good} and {other} must have timed the same cases, and have none in common\n"
    )
    missing = tmp_path / "missing.json"
    assert (
        refusal(missing) == f"compare: {missing} must be a result file of the benchmarks, and is not there\n"
    )
    for text in ("{", "[]", '{"suite": "demo", "machine": {"device": "X"}}', '{"suite": 1, "machine": 2}'):
        missing.write_text(text)
        sentence = "must be a result file with timings, as `python -m benchmarks run` writes them"
        assert refusal(missing) == f"compare: {missing} {sentence}\n"


@pytest.mark.parametrize("threshold", ["0", "-5%", "ten", "inf", "nan"])
def test_a_threshold_that_is_no_share_is_refused(tmp_path, monkeypatch, capsys, threshold):
    good = result(tmp_path / "good.json", {16: {"moe_runtime": 1.0}})
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, good, good, f"--threshold={threshold}")
    assert stopped.value.code == 2
    assert f"must be a share above 0 such as 10% or 0.1, got '{threshold}'" in capsys.readouterr().err
