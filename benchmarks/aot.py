"""Compile every configuration of every Triton kernel for GPUs that are not here, and check what comes out.

    python -m benchmarks aot

A configuration is one `Compilation` of a kernel file under `_triton/`. Each is compiled for every target with
nothing known of pointers and sizes but what the launch promises, and for sm_90 also with all of them
divisible by 16. What is checked:

- registers suffice: nothing is spilled to memory;
- shared memory is within the target's limit;
- no atomics, so that sums have one order;
- no address arithmetic that overflows 32 bits (`addressing.py`);
- programmatic dependent launch is in the code where it was asked for, and nowhere else;
- products of 16-bit types use Hopper's own instructions (wgmma) there;
- what a descriptor describes is loaded by the tensor memory accelerator (TMA), into shared memory, from which
  the loop that loads it does not load it into registers.
"""

import argparse
import ast
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.addressing import overflows

HERE = Path(__file__).resolve().parent
KERNEL_FILES = HERE.parent / "kernels" / "moe_runtime_kernels" / "_triton"


@dataclass(frozen=True)
class Target:
    """A GPU by Triton's names; the launches meant for it; shared memory per block in bytes."""

    name: str
    family: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    pdl: bool  # has programmatic dependent launch


TARGETS = {
    target.name: target
    for target in (
        # 99 KB, as sm_86 and sm_89 have, which use the same launches; sm_80 itself has 163 KB
        Target("sm_80", "cuda80", "cuda", 80, 32, 101376, False),
        Target("sm_90", "cuda90", "cuda", 90, 32, 232448, True),
        Target("sm_100", "cuda100", "cuda", 100, 32, 232448, True),
        Target("gfx942", "hip", "hip", "gfx942", 64, 65536, False),
    )
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one compilation gave: `spilled` bytes per thread, `shared` bytes per block, else instructions."""

    file: str
    kernel: str
    label: str
    target: str
    divisible: bool
    warps: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    products: int = 0  # of the tensor or matrix cores
    async_copies: int = 0
    tma: int = 0
    atomics: int = 0


@dataclass(frozen=True)
class Job:
    """The `index`-th compilation of a kernel file, for one target."""

    path: str
    index: int
    target: str
    divisible: bool


_DOT_16 = re.compile(r"tt\.dot .*: tensor<\d+x\d+x(?:bf16|f16)>")

# --- what there is to compile ---


@cache
def load(path: str) -> ModuleType:
    """A kernel file as a module: those of the package by name, others from where they lie."""
    file = Path(path)
    if file.parent == KERNEL_FILES:
        return importlib.import_module(f"moe_runtime_kernels._triton.{file.stem}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def compilations(path: str) -> list[Any]:
    module = load(path)
    return module.compilations() if hasattr(module, "compilations") else []


def kernel_name(compilation: Any) -> str:
    return compilation.kernel.fn.__name__


def unlisted_kernels(path: str) -> list[str]:
    """A sentence per kernel of the file that no compilation names; kernels are called `_…_kernel`."""
    module = load(path)
    kernels = {name: value for name, value in vars(module).items() if re.fullmatch(r"_\w+_kernel", name)}
    own = {name for name, value in kernels.items() if getattr(value, "__module__", "") == module.__name__}
    listed = {kernel_name(compilation) for compilation in compilations(path)}
    return [f"{Path(path).name}: {name} is in no compilation" for name in sorted(own - listed)]


def jobs_of(path: str, targets: Iterable[str], share: float = 1.0) -> list[Job]:
    """Every configuration of every target, see the module; equal ones are compiled once.

    Programmatic dependent launch, which changes two instructions, is compiled with one of each kernel's. With
    a `share` below 1 so many of each kernel's are compiled, at even distances and at least one.
    """
    groups: dict[tuple[str, str, bool], dict[str, Job]] = {}
    with_pdl: set[tuple[str, str]] = set()
    for i, compilation in enumerate(compilations(path)):
        name = kernel_name(compilation)
        same = repr(
            (compilation.signature, compilation.constexprs, compilation.options, compilation.divisible)
        )
        for target in targets:
            pdl = compilation.options.pdl
            if (pdl and not TARGETS[target].pdl) or TARGETS[target].family not in compilation.families:
                continue
            if pdl and (name, target) in with_pdl:
                continue
            if pdl:
                with_pdl.add((name, target))
            for divisible in (True, False) if target == "sm_90" else (False,):
                group = groups.setdefault((name, target, divisible), {})
                group.setdefault(same, Job(path, i, target, divisible))
    chosen = []
    for group in groups.values():
        jobs, number = list(group.values()), max(math.ceil(share * len(group)), 1)
        chosen += [jobs[(2 * i + 1) * len(jobs) // (2 * number)] for i in range(number)]
    return chosen


def has_descriptor(compilation: Any) -> bool:
    """Whether an argument is a TMA descriptor."""
    return any(type_.startswith("tensordesc") for type_ in compilation.signature.values())


# --- one compilation, in a process of its own ---


def compile_job(job: Job) -> tuple[Row, list[str]]:
    """The numbers of a job and a sentence per violation."""
    compilation, target = compilations(job.path)[job.index], TARGETS[job.target]
    row = Row(
        file=Path(job.path).name,
        kernel=kernel_name(compilation),
        label=compilation.label,
        target=job.target,
        divisible=job.divisible,
        warps=compilation.options.num_warps,
    )
    try:
        compiled = _compile(compilation, target, job.divisible)
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        return row, [f"{_title(row)}: does not compile: {type(error).__name__}: {reason}"]
    resources = _amd_resources if target.backend == "hip" else _nvidia_resources
    row = Row(**{**asdict(row), **_counts(compiled.asm), **resources(compiled)})
    return row, [f"{_title(row)}: {what}" for what in _violations(row, compilation, target, compiled.asm)]


def _compile(compilation: Any, target: Target, divisible: bool) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    options = compilation.options.keywords()
    constexprs = {**compilation.constexprs, "PDL": options.pop("PDL")}
    names = compilation.kernel.arg_names
    unknown = [name for name in names if name not in compilation.signature and name not in constexprs]
    if unknown:
        raise ValueError(f"the compilation says nothing of {', '.join(unknown)}")
    source = ASTSource(
        fn=compilation.kernel,
        signature={name: compilation.signature.get(name, "constexpr") for name in names},
        constexprs=constexprs,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name in compilation.divisible
            or (divisible and compilation.signature.get(name, "").startswith(("*", "i")))
        },
    )
    return compile_source(
        source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options
    )


def _title(row: Row) -> str:
    known = "divisible by 16" if row.divisible else "any divisibility"
    return f"{row.file} {row.kernel} [{row.label}] for {row.target}, {known}"


def _counts(asm: dict[str, str]) -> dict[str, int]:
    """Instructions of the target's assembly by kind; atomics as Triton's own operations."""
    text = asm.get("ptx") or asm["amdgcn"]
    return {
        "products": len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_s?mfmac?_)", text)),
        "async_copies": len(re.findall(r"\bcp\.async\.c[ag]\.", text)),
        "tma": len(re.findall(r"\bcp\.async\.bulk\.tensor", text)),
        "atomics": len(re.findall(r"\btt\.atomic_(?:rmw|cas)", asm["ttgir"])),
    }


def _nvidia_resources(compiled: Any) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    spilled = found["STACK"] + found["LOCAL"]
    return {"registers": found["REG"], "spilled": spilled, "shared": compiled.metadata.shared}


def _amd_resources(compiled: Any) -> dict[str, int]:
    pattern = r"^\s+\.(\w+(?:_count|_fixed_size)):\s+(\d+)$"
    found = {name: int(value) for name, value in re.findall(pattern, compiled.asm["amdgcn"], re.MULTILINE)}
    # scalar registers are spilled to lanes of vector registers; what does reach memory is the private segment
    return {
        "registers": found["vgpr_count"],
        "spilled": max(4 * found["vgpr_spill_count"], found["private_segment_fixed_size"]),
        "shared": max(compiled.metadata.shared, found["group_segment_fixed_size"]),
    }


def _loaded_in_a_loop(ttgir: str) -> bool:
    """Whether some loop loads by TMA and loads from shared memory into registers."""
    for loop in re.findall(r"^( *)(?:%.*= )?scf\.for (.*?)^\1}", ttgir, re.MULTILINE | re.DOTALL):
        if "async_tma_copy_global_to_local" in loop[1] and "ttg.local_load" in loop[1]:
            return True
    return False


def _violations(row: Row, compilation: Any, target: Target, asm: dict[str, str]) -> list[str]:
    found = []
    if row.spilled:
        found.append(f"{row.spilled} bytes per thread are spilled, must be 0")
    if row.shared > target.shared_limit:
        found.append(f"{row.shared} bytes of shared memory, must be at most {target.shared_limit}")
    if row.atomics:
        found.append(f"{row.atomics} atomics, must be 0")
    found += overflows(asm["ttir"])
    if row.target == "sm_90" and _DOT_16.search(asm["ttir"]) and "wgmma.mma_async" not in asm["ptx"]:
        found.append("a product of a 16-bit type does not use wgmma")
    if has_descriptor(compilation):
        if not row.tma:
            found.append("what a descriptor describes is not loaded by TMA")
        if _loaded_in_a_loop(asm["ttgir"]):
            found.append("a loop that loads by TMA also loads shared memory into registers")
    for word in ("griddepcontrol.wait", "griddepcontrol.launch_dependents"):
        if (word in asm.get("ptx", "")) != compilation.options.pdl:
            found.append(f"{word} {'is missing' if compilation.options.pdl else 'was not asked for'}")
    return found


# --- the whole run ---


def compile_all(
    paths: Iterable[str], targets: Iterable[str], processes: int, share: float
) -> tuple[list[Row], list[str]]:
    """Rows and violations of all kernel files; TRITON_INTERPRET must not be set when Triton is imported."""
    rows, violations, jobs = [], [], []
    for path in paths:
        try:
            violations += unlisted_kernels(path)
            jobs += jobs_of(path, targets, share)
        except Exception as error:
            violations.append(f"{Path(path).name}: compilations() failed: {type(error).__name__}: {error}")
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for row, found in pool.map(compile_job, jobs, chunksize=4):
            rows.append(row)
            violations += found
    return rows, violations


def kernel_files() -> list[Path]:
    return sorted(path for path in KERNEL_FILES.glob("*.py") if path.stem != "__init__")


def source_hashes() -> dict[str, str]:
    """Of each kernel file's code, whatever its comments and line breaks are."""
    return {
        path.name: sha256(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode()).hexdigest()
        for path in kernel_files()
    }


def unchanged_rows(folder: Path, compiled: set[str]) -> list[list[Any]]:
    """Rows of the newest result for files that were not compiled now and are what they were then."""
    import triton

    contents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("aot/*.json")]
    contents = [content for content in contents if content["triton"] == triton.__version__]
    newest = max(contents, key=lambda content: content["machine"]["time"], default=None)
    if newest is None:
        return []
    now, then = source_hashes(), newest["sources"]
    # every kernel is made with these
    if any(now[name] != then.get(name) for name in ("launch.py", "tiles.py", "tuned.py")):
        return []
    file = newest["columns"].index("file")
    return [
        row for row in newest["rows"] if row[file] not in compiled and now.get(row[file]) == then[row[file]]
    ]


def write_result(folder: Path, rows: list[Row], compiled: set[str]) -> Path:
    """`aot/<date>_<commit>_triton-<version>.json`, one line per row, unchanged ones of `folder` included."""
    import triton

    from moe_runtime.machine import describe_machine

    machine = describe_machine()
    commit = (machine["commit"] or "nocommit")[:7]
    path = folder / "aot" / f"{datetime.now(UTC):%Y-%m-%d}_{commit}_triton-{triton.__version__}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [column.name for column in fields(Row)]
    every = [list(asdict(row).values()) for row in rows] + unchanged_rows(folder, compiled)
    lines = ",\n".join(json.dumps(row) for row in sorted(every, key=str))
    head = json.dumps(
        {
            "suite": "aot",
            "triton": triton.__version__,
            "machine": machine,
            "sources": source_hashes(),
            "columns": columns,
        }
    )
    path.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the result file")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument(
        "--files", nargs="+", type=Path, help="only these kernel files; rows of unchanged others are kept"
    )
    parser.add_argument("--share", type=float, default=1.0, help="so much of each kernel's configurations")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))


def main(arguments: argparse.Namespace) -> int:
    """Compile, write the result file, print one sentence per violation; 1 if there is any."""
    if "triton" in sys.modules:
        raise RuntimeError("the ahead-of-time gate must run in a process that has not imported Triton yet")
    os.environ.pop("TRITON_INTERPRET", None)
    start = time.monotonic()
    paths = [str(path.resolve()) for path in arguments.files or kernel_files()]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # nothing of an earlier run is reused
        rows, violations = compile_all(paths, arguments.targets, arguments.processes, arguments.share)
    path = write_result(arguments.output, rows, {Path(path).name for path in paths})
    for violation in violations:
        print(violation)
    seconds = time.monotonic() - start
    print(f"{len(rows)} compilations in {seconds:.0f} s, {len(violations)} violations; wrote {path}")
    return 1 if violations else 0
