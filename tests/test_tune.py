"""The search for launches with made-up times, the table's file, and that the ahead-of-time gate covers it."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreter import interpreted, needs_interpreter

from benchmarks import tunables, tune

if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from moe_runtime_kernels._triton import tuned
from moe_runtime_kernels._triton.grouped_gemm import GroupedLaunch, choose_launch

ROOT = Path(__file__).resolve().parent.parent
NAMES = [tunable.kernel for tunable in tunables.TUNABLES]


def run_tune(*options):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "tune", *options],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    before = tune.TABLE_FILE.read_text()
    result = run_tune("--output", str(tmp_path))
    assert result.returncode == 0
    assert result.stdout == (
        "There is no CUDA or ROCm GPU here, so nothing was tuned; --dry-run shows the search.\n"
    )
    assert not list(tmp_path.iterdir())
    assert tune.TABLE_FILE.read_text() == before


def test_a_dry_run_searches_every_kernel_and_writes_nothing(tmp_path):
    before = tune.TABLE_FILE.read_text()
    result = run_tune("--dry-run", "--output", str(tmp_path), "--tokens", "128")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("A dry run: all times are made up.\n")
    assert "\n# made up\nTABLE: " in result.stdout
    assert "measured on" not in result.stdout
    for name in NAMES:
        assert f"\n{name} ('cuda90', 2, " in result.stdout
        assert f'\n    "{name}": {{\n' in result.stdout
    assert not list(tmp_path.iterdir())
    assert tune.TABLE_FILE.read_text() == before


def launch(**changes):
    return tune.changed(choose_launch(2, 4096, 8, aligned=True, family="cuda90"), changes)


def all_right(closed_form, one):
    return ""


def test_the_fastest_launch_wins_and_only_where_it_is_worth_it():
    launches = [launch(), launch(block_n=64), launch(num_stages=2), launch(group=1)]
    asked = []

    def timer(seconds):
        def measure(some, rounds):
            asked.append((len(some), rounds))
            return [seconds[launches.index(one)] for one in some]

        return measure

    found = tune.search(launches, timer([1.0, 2.0, 0.5, 3.0]), all_right)
    assert (found.launch, found.seconds, found.closed_form_s) == (launches[2], 0.5, 1.0)
    assert found.worth_it()
    assert asked == [(4, tune.ROUNDS), (4, tune.FINAL_ROUNDS)]
    assert not tune.search(launches, timer([1.0, 0.99, 3.0, 3.0]), all_right).worth_it()
    assert tune.search(launches, timer([1.0, 2.0, 2.0, 2.0]), all_right).launch == launches[0]
    assert found.refused == ()


def test_the_closed_form_is_timed_again_even_if_it_came_last():
    launches = [launch(), *(launch(group=group, block_n=n) for group in (1, 4) for n in (64, 128))]
    finals = []

    def timer(some, rounds):
        if rounds == tune.FINAL_ROUNDS:
            finals.extend(some)
        return [9.0 if one == launches[0] else 1.0 for one in some]

    tune.search(launches, timer, all_right)
    assert finals[0] == launches[0]
    assert len(finals) == tune.FINALISTS + 1


def faulty(tensor, fault):
    """What a launch may give in place of a result, by name."""
    wrong = tensor.clone()
    if fault == "a lost tile":
        wrong[-16:, -16:] = 0
    elif fault == "a lost step of the sum":
        wrong *= 1 - 64 / 2048
    elif fault == "nothing written":
        wrong[0, 0] = torch.nan
    elif fault == "another dtype":
        wrong = wrong.float()
    elif fault == "other roundings":  # one unit in the last place, everywhere
        wrong = (wrong.view(torch.int16) + 1).view(torch.bfloat16)
    return wrong


def check_of(fault):
    """The check of a kernel whose launch "wrong" has a fault in its second result."""
    torch.manual_seed(0)
    results = torch.randn(0, 4), torch.randn(128, 256).bfloat16()
    module = SimpleNamespace(choose=None)
    tunable = SimpleNamespace(module=lambda: module, choice="choose")

    def call():
        return results[0], faulty(results[1], fault if module.choose(2) == "wrong" else "none")

    return tune.result_check(tunable, call, inner=2048)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("a lost tile", r"result 1 differs by \S+ of its rms and \S+ at worst, must be at most \S+ and \S+"),
        ("a lost step of the sum", r"result 1 differs by 3.\de-02 of its rms .*"),
        ("nothing written", r"result 1 differs by nan of its rms and nan at worst, .*"),
        (
            "another dtype",
            r"result 1 is \(128, 256\) of torch.float32, must be \(128, 256\) of torch.bfloat16",
        ),
    ],
)
def test_a_launch_with_wrong_results_is_refused_however_fast(fault, said):
    check = check_of(fault)
    assert re.fullmatch(said, check("closed form", "wrong"))
    assert check("closed form", "right") == ""
    seconds = {"closed form": 3.0, "wrong": 1.0, "right": 2.0}
    finals = []

    def timer(launches, rounds):
        if rounds == tune.FINAL_ROUNDS:
            finals.extend(launches)
        return [seconds[one] for one in launches]

    found = tune.search(list(seconds), timer, check)
    assert (found.launch, found.seconds) == ("right", 2.0)
    assert finals == ["closed form", "right"]
    assert found.refused == (("wrong", check("closed form", "wrong")),)


def test_results_may_differ_in_their_last_place():
    assert check_of("other roundings")("closed form", "wrong") == ""


def test_what_was_refused_is_in_the_row(capsys):
    def measures(tunable, shape, tokens):
        return tune.made_up_timer, lambda closed_form, one: "it is wrong"

    plan = tune.Plan(("grouped_gemm plain",), (("qwen3-30b-a3b", 128),))
    (row,) = tune.tune(plan, "cuda90", lambda tunable, launches: launches[:3], measures)
    assert [one["why"] for one in row["refused"]] == ["it is wrong"] * 2
    assert row["seconds"] == row["closed_form_s"]
    assert not row["worth_it"]
    assert capsys.readouterr().out.count("  refused {'block_m': ") == 2


@pytest.mark.parametrize("tunable", tunables.TUNABLES, ids=NAMES)
@pytest.mark.parametrize("tokens", [16, 8192])
def test_candidates_are_launches_that_differ_in_at_most_two_fields(tunable, tokens):
    model = "qwen3-30b-a3b" if "qwen3-30b-a3b" in tunable.shapes else "bam-4096-own-kv"
    first = tunable.closed_form(tunable.shapes[model], tokens, "cuda90")
    found = tune.candidates(first, tunable.unused)
    assert found[0] == first
    assert len(found) == len(set(found)) > 20
    start = tune.fields_of(first)
    for one in found:
        fields = tune.fields_of(one)
        different = {name for name, value in fields.items() if value != start[name]} - {"swapped"}
        assert len(different) <= 2
        assert not different & set(tunable.unused)
        if "swapped" in fields and "swapped" not in tunable.unused:
            assert fields["swapped"] == (fields["block_m"] < 64)
        assert tuned.as_launch(type(first), fields) == one


@pytest.mark.parametrize("tunable", tunables.TUNABLES, ids=NAMES)
def test_what_is_timed_runs_and_goes_through_the_launch_choice(tunable):
    """On a CPU the references run, so that a schema that has changed is seen there."""
    call = tunable.call(tunable.shapes["tiny"], 24)
    results = call()
    for result in (results,) if isinstance(results, torch.Tensor) else results:
        assert result.isfinite().all()
    assert tunable.function in vars(tunable.module())
    first = tunable.closed_form(tunable.shapes["tiny"], 24, "cuda90")
    choose = getattr(tunable.module(), tunable.choice)
    with tunables.chosen(tunable, "this"):
        assert getattr(tunable.module(), tunable.choice)(2, 3, aligned=True) == "this"
    assert getattr(tunable.module(), tunable.choice) is choose
    made = [one for one in tunable.module().compilations() if tunable.is_of(one)]
    assert made
    assert any(one.options.num_warps == first.options.num_warps and "cuda90" in one.families for one in made)


@needs_interpreter
@pytest.mark.parametrize("tunable", tunables.TUNABLES, ids=NAMES)
def test_a_launcher_looks_up_what_was_measured(tunable, monkeypatch):
    class LookedUpError(Exception):
        pass

    def choose(*sizes, case, **keywords):
        raise LookedUpError(case)

    shape = tunable.shapes["tiny"]
    call = tunable.call(shape, 24)
    monkeypatch.setattr(tunable.module(), tunable.choice, choose)
    with interpreted(), pytest.raises(LookedUpError) as looked_up:
        call()
    assert looked_up.value.args == (tuned.Case(tunable.kernel, *tunable.sizes(shape, 24)),)


@needs_interpreter
def test_the_kernel_that_is_timed_for_dh_writes_all_it_can(monkeypatch):
    class LaunchedError(Exception):
        pass

    def launch_tiles(kernel, one, operands, *arguments, **constexprs):
        raise LaunchedError(*operands[-3:])

    (tunable,) = (one for one in tunables.TUNABLES if one.kernel == "expert_ffn dh")
    call = tunable.call(tunable.shapes["tiny"], 24)
    monkeypatch.setattr(tunable.module(), "_launch_tiles", launch_tiles)
    with interpreted(), pytest.raises(LaunchedError) as launched:
        call()
    assert all(isinstance(written, torch.Tensor) for written in launched.value.args)


def test_each_key_is_searched_once():
    plan = tune.Plan(
        ("grouped_gemm plain",), (("qwen3-30b-a3b", 15), ("qwen3-30b-a3b", 16), ("olmoe-1b-7b", 8192))
    )
    keys = [key for *_, key in plan.points("cuda90")]
    assert keys == [("cuda90", 2, 768, 2048, 128, 128), ("cuda90", 2, 1024, 2048, 64, 65536)]


@pytest.mark.parametrize("tunable", tunables.TUNABLES, ids=NAMES)
def test_every_number_of_tokens_and_every_model_has_a_key_of_its_own(tunable):
    """One token and sixteen, widths 768 and 1024, mixtures with and without shared keys and values."""
    cases = [(model, tokens) for model in tune.MODELS for tokens in tune.TOKENS]
    found = [(tokens, key) for *_, tokens, key in tune.Plan((tunable.kernel,), tuple(cases)).points("cuda90")]
    assert sorted(tokens for tokens, _ in found) == sorted([*tune.TOKENS, *tune.TOKENS])


@pytest.mark.parametrize(("size", "rounded"), [(1, 1), (2, 2), (3, 4), (512, 512), (513, 1024)])
def test_keys_hold_rows_as_a_power_of_two_and_the_rest_exactly(size, rounded):
    case = tuned.Case("grouped_gemm plain", size, 2048, 3, size)
    assert tuned.make_key("hip", 2, case) == ("hip", 2, size, 2048, 3, rounded)


def test_the_gate_is_asked_once_about_each_launch_and_ships_the_closed_form(monkeypatch):
    asked = []

    class Inline:
        def map(self, fn, launches):
            return [fn(launch) for launch in launches]

    def refusals(kernel, one, family):
        asked.append((kernel, one, family))
        return ["spills"] if one.block_n == 64 else []

    monkeypatch.setattr(tune, "refusals", refusals)
    accept = tune.gate(Inline(), "cuda90")
    first, narrow, flat = launch(), launch(block_n=64), launch(group=1)
    assert accept(tunables.TUNABLES[0], [first, narrow, flat]) == [first, flat]
    assert accept(tunables.TUNABLES[0], [narrow, flat, narrow]) == [narrow, flat]
    assert asked == [("grouped_gemm plain", one, "cuda90") for one in (first, narrow, flat)]
    accept(tunables.TUNABLES[1], [first, flat])
    assert len(asked) == 5


KEY = tuned.Key("cuda90", 2, 768, 2048, 128, 512)


CASE = tuned.Case("grouped_gemm plain", 768, 2048, 128, 500)


def test_the_table_is_looked_up_by_kernel_and_key(monkeypatch):
    fields = tune.fields_of(launch(block_n=64, num_warps=4))
    monkeypatch.setattr(tuned, "TABLE", {"grouped_gemm plain": {KEY: fields}})
    assert tuned.make_key("cuda90", 2, CASE) == KEY
    assert tuned.tuned("grouped_gemm plain", KEY) == fields
    assert tuned.tuned("grouped_gemm plain", KEY._replace(family="cuda80")) is None
    assert tuned.tuned("grouped_gemm gathered", KEY) is None
    assert tuned.as_launch(GroupedLaunch, fields) == launch(block_n=64, num_warps=4)


def test_a_measured_launch_comes_before_the_closed_form(monkeypatch):
    closed = [launch()]
    choose = tuned.measured_first(lambda itemsize, N, *, aligned, family, flag=0: closed[0])
    measured = launch(block_n=64)
    monkeypatch.setattr(tuned, "TABLE", {CASE.kernel: {KEY: tune.fields_of(measured)}})
    for_it = {"aligned": True, "family": "cuda90", "flag": 1, "case": CASE}
    assert choose(2, 8, **for_it) == measured
    for other in (
        {"aligned": False},
        {"family": "cuda80"},
        {"case": None},
        {"case": CASE._replace(rows=4096)},
        {"case": CASE._replace(groups=64)},
        {"case": CASE._replace(inner=1024)},
        {"case": CASE._replace(kernel="grouped_gemm gathered")},
    ):
        assert choose(2, 8, **{**for_it, **other}) == closed[0], other
    assert choose(4, 8, **for_it) == closed[0]
    # descriptors are taken only where the closed form has some
    assert measured.tma
    closed[0] = launch(block_n=256, tma=False)
    assert choose(2, 8, **for_it) == closed[0]
    monkeypatch.setattr(tuned, "TABLE", {CASE.kernel: {KEY: tune.fields_of(launch(block_n=64, tma=False))}})
    assert choose(2, 8, **for_it) == launch(block_n=64, tma=False)


def compiled_as(made, fields, family):
    """Whether a compilation is what a launch with these fields is compiled to."""
    options = {"num_warps": made.options.num_warps, "num_stages": made.options.num_stages}
    has_tma = any(kind.startswith("tensordesc") for kind in made.signature.values())
    known = {"TMA": has_tma, **{name.upper(): value for name, value in options.items()}, **made.constexprs}
    differs = [name for name, value in fields.items() if known.get(name.upper(), value) != value]
    return not differs and family in made.families


def entry(tunable, T=8192):
    """(shape, key, closed form, another launch) of a kernel at a size that is in the table below."""
    model = "qwen3-30b-a3b" if "qwen3-30b-a3b" in tunable.shapes else "bam-4096-own-kv"
    shape = tunable.shapes[model]
    closed = tunable.closed_form(shape, T, "cuda90")
    other = tune.changed(closed, {"group": 16, "num_stages": 2}, tunable.unused)
    return (
        shape,
        tuned.make_key("cuda90", 2, tuned.Case(tunable.kernel, *tunable.sizes(shape, T))),
        closed,
        other,
    )


@pytest.mark.parametrize("tunable", tunables.TUNABLES, ids=NAMES)
def test_an_entry_is_chosen_for_its_key_and_nothing_else(tunable, monkeypatch):
    shape, key, closed, other = entry(tunable)
    assert tunable.choose(shape, 8192, "cuda90") == closed != other
    monkeypatch.setattr(tuned, "TABLE", {tunable.kernel: {key: tune.fields_of(other)}})
    assert tunable.choose(shape, 8192, "cuda90") == other
    assert tunable.choose(shape, 8191, "cuda90") == other
    for T, family in ((8193, "cuda90"), (128, "cuda90"), (8192, "cuda100"), (8192, "hip")):
        assert tunable.choose(shape, T, family) == tunable.closed_form(shape, T, family)


@pytest.mark.parametrize("tunable", tunables.TUNABLES, ids=NAMES)
def test_an_entry_is_compiled_ahead_of_time_for_its_devices(tunable, monkeypatch):
    _, key, _, other = entry(tunable)
    fields = tune.fields_of(other)
    before = list(map(repr, tunable.module().compilations()))
    monkeypatch.setattr(tuned, "TABLE", {tunable.kernel: {key: fields}})
    added = [made for made in tunable.module().compilations() if repr(made) not in before]
    assert added
    for made in added:
        assert compiled_as(made, fields, "cuda90")
        assert made.families == ("cuda90",)
        assert made.kernel.fn.__name__ == tunable.function
    assert {made.label.split()[0] for made in added} >= {"bf16"}
    assert not compiled_as(added[0], {**fields, "group": 8}, "cuda90")
    assert not compiled_as(added[0], fields, "cuda80")


def test_every_entry_of_the_shipped_table_is_compiled_ahead_of_time():
    by_name = {tunable.kernel: tunable for tunable in tunables.TUNABLES}
    for kernel, entries in tuned.TABLE.items():
        compilations = by_name[kernel].module().compilations()
        for key, fields in entries.items():
            assert any(
                by_name[kernel].is_of(made) and compiled_as(made, fields, key.family) for made in compilations
            )


def test_the_tables_file_is_what_is_rendered_from_it():
    text = tune.TABLE_FILE.read_text()
    origin = text.partition(tune.MARK)[2].splitlines()[2].removeprefix("# ")
    assert tune.render(text, tuned.TABLE, origin) == text


def test_a_rendered_table_is_formatted_and_reads_back(tmp_path):
    fields = tune.fields_of(launch(block_n=64))
    table = {"b": {KEY: fields}, "a": {KEY._replace(rows=1024): fields, KEY: fields}}
    text = tune.render(tune.TABLE_FILE.read_text(), table, "measured on a test")
    names: dict = {}
    exec(
        compile(text.replace("from .launch", "from moe_runtime_kernels._triton.launch"), "tuned", "exec"),
        names,
    )
    assert names["TABLE"] == table
    assert list(names["TABLE"]) == ["a", "b"]
    path = tmp_path / "tuned.py"
    tune.write_atomically(path, text)
    assert path.read_text() == text
    ruff = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "format",
            "--check",
            "--config",
            str(ROOT / "pyproject.toml"),
            str(path),
        ]
    )
    assert ruff.returncode == 0
    with pytest.raises(
        ValueError, match=r"the table's file must have the line '# --- measured: .*', got none"
    ):
        tune.render("nothing", table, "")


def test_a_row_replaces_its_key_and_one_that_is_not_worth_it_removes_it():
    fields = {"block_m": 64}
    row = {"kernel": "k", "key": KEY, "fields": {"block_m": 128}, "worth_it": True}
    other = KEY._replace(rows=1)
    table = {"k": {KEY: fields, other: fields}}
    assert tune.merged(table, [row]) == {"k": {KEY: {"block_m": 128}, other: fields}}
    assert tune.merged(table, [{**row, "worth_it": False}]) == {"k": {other: fields}}
    assert tune.merged({"k": {KEY: fields}}, [{**row, "worth_it": False}]) == {}
    assert table == {"k": {KEY: fields, other: fields}}


def test_launches_that_the_gate_refuses_are_not_timed():
    """128 rows by 256 columns in 4 warps do not fit the registers; the closed form's choice does."""
    code = (
        "from benchmarks import tune; t = tune.TUNABLES[0]\n"
        "first = t.closed_form(t.shapes['qwen3-30b-a3b'], 8192, 'cuda90')\n"
        "print(tune.refusals(t.kernel, first, 'cuda90'))\n"
        "print(tune.refusals(t.kernel, tune.changed(first, {'num_warps': 4}), 'cuda90'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    shipped, refused = result.stdout.splitlines()
    assert shipped == "[]"
    assert "bytes per thread are spilled, must be 0" in refused
