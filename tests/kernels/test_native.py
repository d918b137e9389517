"""The compiled products of a few rows: right for every shape, in every build, and missed by nobody."""

import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from moe_runtime_kernels import _cpu, _native
from moe_runtime_kernels._cpu import native_product, product
from moe_runtime_kernels._native import BLOCK_ROWS, grouped_rows, load, rows_function
from moe_runtime_kernels.grouped_gemm import grouped_gemm_reference
from moe_runtime_kernels.plan import MAX_EXPERTS, TILE_HEIGHTS, make_plan_reference
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.skipif(
    rows_function(torch.bfloat16) is None, reason="needs an x86 processor with AVX2, Linux and a C compiler"
)
DTYPES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float32, id="fp32")]
BUILDS = [
    pytest.param("-march=haswell", id="avx2"),
    pytest.param(
        "-march=skylake-avx512",
        id="avx512",
        marks=pytest.mark.skipif("avx512bw" not in _native.processor_flags(), reason="needs AVX-512"),
    ),
]


@pytest.fixture(autouse=True)
def fresh_functions():
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch, tmp_path_factory):
    """The code compiled for one kind of processor, once."""
    flags = [request.param if flag.startswith("-march") else flag for flag in _native.FLAGS]
    monkeypatch.setattr(_native, "FLAGS", tuple(flags))
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path_factory.getbasetemp() / "builds"))


def random(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_is_the_product(actual, x, weight, bias=None):
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    # sums in float32, in lanes; then one rounding
    eps = torch.finfo(torch.float32).eps
    terms = x.double().abs() @ weight.double().abs().t()
    allowed = eps * terms * 2 + torch.finfo(actual.dtype).eps / 2 * exact.abs() + 1e-30
    assert actual.dtype == x.dtype
    assert ((actual.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 31, 32, 33, 70])
def test_products_of_any_shape(rows, dtype, build):
    for outputs, inner in [(1, 1), (3, 31), (4, 32), (5, 33), (37, 100), (64, 64), (130, 7), (33, 257)]:
        x, weight = random(rows, inner, dtype=dtype), random(outputs, inner, seed=1, dtype=dtype)
        assert_is_the_product(native_product(x, weight), x, weight)
        bias = random(outputs, seed=2, dtype=dtype)
        assert_is_the_product(native_product(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_lie_at_any_distance(dtype, build):
    x, weight = random(6, 50, dtype=dtype)[:, 3:43], random(20, 64, seed=1, dtype=dtype)[::2, 5:45]
    assert_is_the_product(native_product(x, weight), x, weight)
    one = x[:1].expand(5, -1)
    assert_is_the_product(native_product(one, weight), one, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_written_and_nothing_else(dtype):
    x, weight = random(100, 40, dtype=dtype), random(5, 18, 40, seed=1, dtype=dtype)
    bias, out = random(5, 18, seed=2, dtype=dtype), torch.full((100, 30), 7, dtype=dtype)
    parts = [(3, 2, 1), (0, 3, BLOCK_ROWS + 9), (4, 60, 5)]
    grouped_rows(x, weight, bias, parts, out[:, 6:24])
    untouched = torch.ones(100, 30, dtype=torch.bool)
    for expert, first, rows in parts:
        mine = slice(first, first + rows)
        assert_is_the_product(out[mine, 6:24], x[mine], weight[expert], bias[expert])
        untouched[mine, 6:24] = False
    assert (out[untouched] == 7).all()
    grouped_rows(x, weight, bias, [], out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_products_of_few_and_many_rows(dtype):
    counts = [3, 0, 300, 1, 40]
    offset = torch.tensor(counts).cumsum(0).int()
    x, weight = random(sum(counts) + 6, 40, dtype=dtype), random(5, 18, 40, seed=1, dtype=dtype)
    bias = random(5, 18, seed=2, dtype=dtype)
    out = grouped_gemm_reference(x, weight, offset, bias)
    for e, (end, count) in enumerate(zip(offset.tolist(), counts, strict=True)):
        rows = slice(end - count, end)
        assert_is_the_product(out[rows], x[rows], weight[e], bias[e])
    assert (out[sum(counts) :] == 0).all()
    assert (grouped_gemm_reference(x, weight, offset * 0) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_row_depend_on_no_other(dtype, build):
    x, weight = random(41, 300, dtype=dtype), random(23, 300, seed=1, dtype=dtype)
    together = native_product(x, weight)
    for r in range(41):
        assert torch.equal(native_product(x[r : r + 1], weight)[0], together[r])
    assert torch.equal(native_product(x, weight[5:9]), together[:, 5:9])


def test_vmap_multiplies_through_pytorch():
    x, weight = random(3, 4, 32), random(8, 32)
    torch.testing.assert_close(torch.vmap(lambda x_MI: product(x_MI, weight))(x), x @ weight.t())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    x, weight = random(40, 300), random(230, 300, seed=1)
    expected, before = native_product(x, weight), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(native_product(x, weight), expected)
    finally:
        torch.set_num_threads(before)


def test_sums_are_rounded_as_pytorch_rounds(build):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    halves = torch.stack([every.view(torch.bfloat16), torch.zeros(2**16, dtype=torch.bfloat16)], 1)
    for low in (0x7FFF, 0x8000, 0x8001, 0xFFFF):  # to the nearest, halves to even
        last = torch.tensor([low << 16 >> 16], dtype=torch.int32)
        wide = ((every.int() << 16) | (last & 0xFFFF)).view(torch.float32)
        rest = (wide - every.view(torch.bfloat16).float()).bfloat16()
        halves[:, 1] = rest
        sums = halves[:, :1].float() + halves[:, 1:].float()
        out = native_product(halves, torch.ones(1, 2, dtype=torch.bfloat16))
        expected = sums.bfloat16()
        assert torch.equal(out.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(out[numbers], expected[numbers])


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_stay_in_their_rows(dtype, build):
    x, weight = random(5, 70, dtype=dtype), random(9, 70, seed=1, dtype=dtype)
    x[1, 69], x[3, 4] = torch.inf, torch.nan
    out = native_product(x, weight)
    assert out[[0, 2, 4]].isfinite().all()
    assert out[1].isinf().all()
    assert out[3].isnan().all()


def test_only_what_it_can_is_taken():
    x, weight = random(4, 32), random(8, 32)
    assert _cpu.native_takes(x, weight)
    assert not _cpu.native_takes(x.half(), weight.half())
    assert not _cpu.native_takes(x, weight.bfloat16())
    assert not _cpu.native_takes(x, random(32, 8).t())  # values of a row lie apart
    assert not _cpu.native_takes(random(32, 4).t(), weight)
    assert not _cpu.native_takes(x[:0], weight)
    with FakeTensorMode() as mode:
        assert not _cpu.native_takes(mode.from_tensor(x), mode.from_tensor(weight))
    with FlopCounterMode(display=False) as counter:  # which sees PyTorch's operations
        product(x, weight)
    assert counter.get_total_flops() == 2 * 4 * 32 * 8
    assert not _cpu.native_takes(x, weight, random(8).bfloat16())
    assert not _cpu.native_takes(x, weight.clone().requires_grad_())
    with torch.no_grad():
        assert _cpu.native_takes(x, weight.clone().requires_grad_())
    with torch.no_grad():
        assert not _cpu.native_takes(x, weight.to("meta"))
        assert not _cpu.native_takes(x, torch._neg_view(weight))
        assert not _cpu.native_takes(x, random(8, 64))  # longer rows than x has
        assert not _cpu.native_takes(x, weight.to_sparse())
    assert not _cpu.native_takes(x, weight, random(1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        product(x, random(8, 64))
    assert not _cpu.is_few(random(_cpu.MOST_NATIVE_ROWS[torch.float32] + 1, 32), weight)


@pytest.mark.parametrize("rows", [3, 300])
def test_a_bfloat16_product_is_widened_where_that_is_faster(rows, monkeypatch):
    monkeypatch.setattr(_cpu, "MOST_NATIVE_ROWS", {})
    monkeypatch.setattr(_cpu, "BF16_IS_WIDENED", True)
    monkeypatch.setattr(_cpu, "WIDENED", 2**10)  # several parts of the matrix
    monkeypatch.setattr(_cpu, "FEWEST_OUTPUTS", 8)
    x, weight, bias = (random(*size, dtype=torch.bfloat16) for size in ((rows, 96), (50, 96), (50,)))
    assert_is_the_product(product(x, weight), x, weight)
    assert_is_the_product(product(x, weight, bias), x, weight, bias)
    across = random(96, 50, dtype=torch.bfloat16).t()
    assert_is_the_product(product(x, across), x, across)
    gradient = _cpu.weight_grad(x[:, :20], x)
    assert_is_the_product(gradient, x[:, :20].t(), x.t())
    unrounded = _cpu.weight_grad(x[:, :20], x, torch.float32)
    torch.testing.assert_close(unrounded, x[:, :20].float().t() @ x.float())
    assert torch.equal(unrounded.bfloat16(), gradient)


def in_new_process(code, **environment):
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", f"import torch\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert run.returncode == 0, run.stderr
    return run


ASK = "from moe_runtime_kernels import _native; print(_native.rows_function(torch.bfloat16) is not None)"


def test_it_can_be_turned_off():
    run = in_new_process(ASK, MOE_RUNTIME_NATIVE="0")
    assert run.stdout.strip() == "False"
    assert "Warning" not in run.stderr


def test_without_a_compiler_pytorch_multiplies():
    run = in_new_process(ASK, PATH="/nonexistent", CC="")
    assert run.stdout.strip() == "False"
    assert "Warning" not in run.stderr
    code = "from moe_runtime_kernels._cpu import product; print(product(torch.ones(2, 3), torch.ones(4, 3)))"
    assert in_new_process(code, PATH="/nonexistent", CC="").stdout.count("3.") == 8


@pytest.mark.parametrize("breaks", ["compiler", "cache"])
def test_a_build_that_fails_is_told_once(breaks, tmp_path, monkeypatch):
    if breaks == "compiler":
        fake = tmp_path / "broken-cc"
        fake.write_text(
            '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho this compiler is broken >&2; exit 1\n'
        )
        fake.chmod(0o755)
        monkeypatch.setenv("CC", str(fake))
        monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path / "cache"))
        said = "this compiler is broken"
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path / "file" / "folder"))
        said = "Not a directory"
    with pytest.warns(UserWarning, match=said):
        assert rows_function(torch.bfloat16) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, weight = (random(*size, dtype=torch.bfloat16) for size in ((2, 40), (6, 40)))
        assert not _cpu.native_takes(x, weight)
        assert_is_the_product(product(x, weight), x, weight)
    assert not list((tmp_path / "cache").glob("*"))


def test_it_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path / "cache"))
    log = tmp_path / "log"
    real, recorder = shutil.which("gcc") or shutil.which("cc"), tmp_path / "recorder"
    recorder.write_text(f'#!/bin/sh\necho "$1" >> {log}\nexec {real} "$@"\n')
    recorder.chmod(0o755)
    monkeypatch.setenv("CC", str(recorder))
    for _ in range(2):
        assert rows_function(torch.float32) is not None
        load.cache_clear()
    assert log.read_text().splitlines() == ["--version", _native.FLAGS[0], "--version"]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


def test_a_damaged_or_foreign_file_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path))
    x, weight = random(2, 40), random(6, 40)
    native_product(x, weight)
    (kept,) = tmp_path.iterdir()
    foreign = tmp_path / "foreign.so"
    subprocess.run(["gcc", "-shared", "-o", foreign, "-x", "c", "/dev/null"], check=True)
    for content in (b"", foreign.read_bytes()):
        kept.unlink()
        kept.write_bytes(content)
        load.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_is_the_product(native_product(x, weight), x, weight)


def test_a_cache_beside_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_RUNTIME_CACHE", ".")
    assert rows_function(torch.float32) is not None


def test_no_home_is_no_exception(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("MOE_RUNTIME_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.warns(UserWarning, match="home directory"):
        assert rows_function(torch.float32) is None


def test_it_runs_on_pytorchs_openmp_whatever_else_is_loaded(tmp_path):
    code = f"""
import ctypes, shutil
first = ctypes.CDLL({str(tmp_path / "libgomp-other.so")!r})
{ASK}
print(_native._pytorchs_openmp())"""
    theirs = Path(_native._pytorchs_openmp())
    if not theirs.name.startswith("libgomp"):
        pytest.skip("PyTorch runs on another OpenMP")
    shutil.copy(theirs, tmp_path / "libgomp-other.so")
    answer, used = in_new_process(code).stdout.split()
    assert answer == "True"
    assert Path(used).resolve() == theirs.resolve()
    for path in Path("/proc/self/maps").read_text().split():
        if "grouped_rows" in path:
            needed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
            assert "libgomp-other" not in needed


def test_threads_that_end_leave_no_memory():
    x, weight = random(4, 8192), random(8, 8192)
    native_product(x, weight)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def run(count):
        for _ in range(count):
            thread = threading.Thread(target=native_product, args=(x, weight))
            thread.start()
            thread.join()

    run(20)
    before = resident()
    run(100)  # of which each would keep 1 MiB
    assert resident() - before < 30 * 2**20


def test_the_source_has_the_same_blocks():
    assert f"BLOCK_ROWS = {BLOCK_ROWS}," in (_native.FOLDER / "grouped_rows.c").read_text()
    assert f"MOST_EXPERTS = {MAX_EXPERTS} " in (_native.FOLDER / "plan.c").read_text()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("T", "K", "E"), [(0, 2, 3), (1, 1, 1), (1, 8, 64), (7, 3, 5), (300, 4, 20), (50, 2, MAX_EXPERTS)]
)
def test_plans_are_the_reference(T, K, E, dtype):
    g = torch.Generator().manual_seed(0)
    for low, high in [(0, E), (-2, E + 3), (E, E + 1)]:  # all kept, some dropped, all dropped
        expert = torch.randint(low, high, (K, T), generator=g, dtype=dtype).t()
        if dtype == torch.int64 and T:
            expert[0, 0] = 2**40
        parts = _native.plan(expert, E, TILE_HEIGHTS)
        for actual, expected in zip(parts, make_plan_reference(expert, E), strict=True):
            assert actual.dtype == torch.int32
            assert torch.equal(actual, expected)


def test_more_experts_than_it_has_places_for_are_not_counted():
    assert _native.plan(torch.zeros(1, 1, dtype=torch.int64), MAX_EXPERTS + 1, TILE_HEIGHTS) is None
