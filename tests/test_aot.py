"""Every kernel compiles for GPUs that are not here and passes the gate; the gate sees each kind of fault."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.aot import (
    TARGETS,
    Row,
    _amd_resources,
    _violations,
    compilations,
    has_descriptor,
    jobs_of,
    kernel_files,
    kernel_name,
    source_hashes,
)

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def compile_ahead(folder, *options, paths=()):
    """(exit status, sentences, content of the result file) of `python -m benchmarks aot`."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((*map(str, paths), str(ROOT), str(ROOT / "kernels")))
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "aot", "--output", str(folder), *map(str, options)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode in (0, 1), result.stderr
    (path,) = (folder / "aot").glob("*.json")
    return result.returncode, result.stdout.splitlines()[:-1], json.loads(path.read_text())


def rows_of(content):
    return [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]


@needs_triton
@pytest.mark.timeout(900)
def test_every_kernel_passes_the_gate_on_every_target(tmp_path):
    """A share of each kernel's configurations; `python -m benchmarks aot` compiles all of them."""
    status, sentences, content = compile_ahead(tmp_path, "--share", 0.02)
    assert not sentences, "\n".join(sentences)
    assert status == 0
    files = {path.name for path in (ROOT / "kernels/moe_runtime_kernels/_triton").glob("*.py")}
    kernels = {row["kernel"] for row in rows_of(content)}
    assert {row["file"] for row in rows_of(content)} <= files
    assert kernels >= {"_combine_kernel", "_gather_rows_kernel", "_place_kernel"}
    for kernel in kernels:
        assert {row["target"] for row in rows_of(content) if row["kernel"] == kernel} == set(TARGETS)


@needs_triton
def test_the_committed_result_holds_every_configuration_of_these_kernels():
    """The gate on all of them takes too long for every test run, so its result must be of today's code."""
    paths = sorted((ROOT / "benchmarks/results/aot").glob("*.json"))
    contents = [json.loads(path.read_text()) for path in paths]
    content = max(contents, key=lambda content: content["machine"]["time"])
    again = "; run `python -m benchmarks aot` and commit its file"
    assert content["sources"] == source_hashes(), f"a kernel has changed since{again}"
    expected = Counter(
        (Path(job.path).name, compilations(job.path)[job.index].label, job.target, job.divisible)
        for path in kernel_files()
        for job in jobs_of(str(path), TARGETS)
    )
    rows = rows_of(content)
    found = Counter((row["file"], row["label"], row["target"], row["divisible"]) for row in rows)
    assert found == expected, f"configurations have changed since{again}"
    limits = {name: target.shared_limit for name, target in TARGETS.items()}
    assert not [row for row in rows if row["spilled"] or row["atomics"]]
    assert not [row for row in rows if row["shared"] > limits[row["target"]]]


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    faulty = Path(__file__).with_name("faulty_kernels.py")
    return compile_ahead(tmp_path_factory.mktemp("faulty"), "--files", faulty, "--targets", "sm_90", "gfx942")


FAULTS = {
    "_atomic_kernel": "1 atomics, must be 0",
    "_row_times_size_kernel": "an offset contains a product in 32 bits",
    "_flat_index_kernel": "a 32-bit offset contains a multiple of a program id",
    "_loaded_times_constant_kernel": "an offset contains a product in 32 bits",
    "_carried_product_kernel": "an offset contains a product in 32 bits",
    "_uncompilable_kernel": "does not compile: ",
}


@needs_triton
@pytest.mark.parametrize("kernel", FAULTS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_fault_is_reported_on_every_target(faults, kernel, target):
    status, sentences, _ = faults
    assert status == 1
    for known in ("divisible by 16", "any divisibility") if target == "sm_90" else ("any divisibility",):
        where = f"faulty_kernels.py {kernel} [plain] for {target}, {known}: "
        found = [sentence for sentence in sentences if sentence.startswith(where)]
        assert len(found) == 1
        assert FAULTS[kernel] in found[0]


@needs_triton
def test_spilled_registers_are_reported(faults):
    _, sentences, _ = faults
    found = [sentence for sentence in sentences if "_spilling_kernel" in sentence]
    assert len(found) == 2
    for sentence in found:
        assert re.search(r"for sm_90, .*: [1-9]\d* bytes per thread are spilled, must be 0$", sentence)


@pytest.mark.parametrize(
    ("vector", "scalar", "private", "spilled"), [(0, 0, 0, 0), (3, 0, 0, 12), (0, 2, 0, 0), (3, 0, 64, 64)]
)
def test_what_amd_spills_is_read_from_the_metadata(vector, scalar, private, spilled):
    listing = f"""
    .group_segment_fixed_size: 512
    .private_segment_fixed_size: {private}
    .sgpr_spill_count: {scalar}
    .vgpr_count:     32
    .vgpr_spill_count: {vector}
"""
    compiled = SimpleNamespace(asm={"amdgcn": listing}, metadata=SimpleNamespace(shared=0))
    assert _amd_resources(compiled) == {"registers": 32, "spilled": spilled, "shared": 512}


@needs_triton
def test_a_kernel_that_never_waits_and_one_that_is_not_listed_are_reported(faults):
    _, sentences, _ = faults
    where = "faulty_kernels.py _never_waiting_kernel [pdl] for sm_90, divisible by 16: "
    assert f"{where}griddepcontrol.wait is missing" in sentences
    assert f"{where}griddepcontrol.launch_dependents is missing" in sentences
    assert "faulty_kernels.py: _forgotten_kernel is in no compilation" in sentences


@needs_triton
def test_nothing_is_said_of_a_kernel_without_faults(faults):
    _, sentences, content = faults
    assert not [sentence for sentence in sentences if "_faultless_kernel" in sentence]
    rows = [row for row in rows_of(content) if row["kernel"] == "_faultless_kernel"]
    compiled = {(row["target"], row["label"]) for row in rows}
    assert compiled == {("sm_90", "plain"), ("sm_90", "pdl"), ("gfx942", "plain")}
    for row in rows:
        assert row["registers"] > 0
        assert row["spilled"] == row["atomics"] == 0


@pytest.mark.parametrize(
    ("numbers", "pdl", "asm", "said"),
    [
        ({}, False, {}, []),
        ({"shared": 232448}, False, {}, []),
        (
            {"shared": 232449},
            False,
            {},
            ["232449 bytes of shared memory, must be at most 232448"],
        ),
        ({}, False, {"ptx": "griddepcontrol.wait;"}, ["griddepcontrol.wait was not asked for"]),
        (
            {},
            False,
            {"ttir": "%y = tt.dot %a, %b, %c : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>"},
            ["a product of a 16-bit type does not use wgmma"],
        ),
    ],
)
def test_limits_that_no_small_kernel_breaks(numbers, pdl, asm, said):
    row = Row(file="", kernel="", label="", target="sm_90", divisible=True, warps=4, **numbers)
    compilation = SimpleNamespace(options=SimpleNamespace(pdl=pdl), signature={"x_ptr": "*bf16"})
    assert _violations(row, compilation, TARGETS["sm_90"], {"ttir": "", "ptx": "", **asm}) == said


LOOP = """
    %acc = scf.for %k = %c0 to %K step %c64 iter_args(%x = %y) -> (tensor<64x64xf32>) {
      ttng.async_tma_copy_global_to_local %desc[%k] %tile, %barrier, %true
      scf.if %first {
        BODY
      }
    } loc(#loc)
    %z = ttg.local_load %tile
"""


@pytest.mark.parametrize(
    ("tma", "body", "said"),
    [
        (1, "ttng.warp_group_dot %x, %tile, %acc", []),
        (0, "", ["what a descriptor describes is not loaded by TMA"]),
        (
            1,
            "%w = ttg.local_load %tile",
            ["a loop that loads by TMA also loads shared memory into registers"],
        ),
    ],
)
def test_what_is_said_of_descriptors(tma, body, said):
    row = Row(file="", kernel="", label="", target="sm_90", divisible=True, warps=4, tma=tma)
    signature = {"x_ptr": "*bf16", "weight_desc": "tensordesc<bf16[1, 128, 64]>"}
    compilation = SimpleNamespace(options=SimpleNamespace(pdl=False), signature=signature)
    asm = {"ttir": "", "ptx": "", "ttgir": LOOP.replace("BODY", body)}
    assert _violations(row, compilation, TARGETS["sm_90"], asm) == said


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("file", ["grouped_gemm.py", "expert_ffn.py"])
def test_descriptors_are_given_for_aligned_matrices_of_16_bits(file, target):
    """On Hopper and Blackwell, and nowhere else; that TMA then loads them is the gate's to say."""
    (path,) = (path for path in kernel_files() if path.name == file)
    given = set()
    for job in jobs_of(str(path), [target]):
        compilation = compilations(job.path)[job.index]
        product = kernel_name(compilation) in ("_grouped_gemm_kernel", "_up_kernel", "_dh_kernel")
        aligned = bool(compilation.divisible) and not compilation.label.startswith("fp32")
        wanted = product and target in ("sm_90", "sm_100") and aligned
        assert has_descriptor(compilation) == wanted, compilation.label
        given.add(wanted)
    assert given == ({True, False} if target in ("sm_90", "sm_100") else {False})
