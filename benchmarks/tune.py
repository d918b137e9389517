"""Time the launches that a kernel could have and write the fastest into `_triton/tuned.py`.

For each kernel, shape and number of tokens: the closed form's choice and what differs from it in at most two
fields; those that the ahead-of-time gate refuses (spills, shared memory, 32-bit addresses) are never timed.
The rest are timed in turns, the best of them again; one whose results are not those of the closed form's
choice is refused, whatever its time. An entry is written where the winner is faster than the closed form by
more than WORTH_IT; entries for other keys stay. The result file names device, versions, commit, every time
and what was refused. Without a GPU it says so and does nothing; `--dry-run` searches with made-up times and
writes no table.
"""

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import combinations, product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shapes import EXPERTS, MIXES
from benchmarks.tunables import TUNABLES, Shape, Tunable, chosen

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).resolve().parent
TABLE_FILE = HERE.parent / "kernels" / "moe_runtime_kernels" / "_triton" / "tuned.py"
MARK = "# --- measured: written by `python -m benchmarks tune` "
WORTH_IT = 1.02
ROUNDS, FINAL_ROUNDS, FINALISTS = 5, 30, 4
GRAPH_LAUNCHES = 10
TOKENS = (1, 16, 128, 1024, 8192, 32768)
MODELS = ("qwen3-30b-a3b", "olmoe-1b-7b", "bam-4096-own-kv", "bam-4096-shared-kv")

# what a field may be; a kernel has some of them
SPACE: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 64, 128),
    "block_n": (64, 128, 256),
    "block_f": (64, 128, 256),
    "block_o": (64, 128, 256),
    "block_i": (64, 128, 256),
    "block_k": (32, 64, 128),
    "block_r": (32, 64, 128),
    "slices": (1, 2, 4),
    "tma": (False,),  # the closed form knows where there can be descriptors
    "group": (1, 4, 8, 16),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
OPTIONS = ("num_warps", "num_stages")

# --- candidates -------------------------------------------------------------------------


def fields_of(launch: Any) -> dict[str, Any]:
    """A launch as the table has it: the options' fields beside its own. PDL is not the table's matter."""
    fields = asdict(launch)
    options = fields.pop("options")
    return {**fields, **{name: options[name] for name in OPTIONS}}


def changed(launch: Any, changes: dict[str, Any], unused: tuple[str, ...] = ()) -> Any:
    """The launch with other fields; few rows are the narrow side of a transposed tile, as in all kernels."""
    options = replace(launch.options, **{name: v for name, v in changes.items() if name in OPTIONS})
    sizes = {name: v for name, v in changes.items() if name not in OPTIONS}
    if "block_m" in sizes and hasattr(launch, "swapped") and "swapped" not in unused:
        sizes["swapped"] = sizes["block_m"] < 64
    return replace(launch, **sizes, options=options)


def candidates(launch: Any, unused: tuple[str, ...] = ()) -> list[Any]:
    """The launch itself first, then all that differ from it in one field or two of SPACE."""
    now = fields_of(launch)
    names = [name for name in SPACE if name in now and name not in unused]
    found = {launch: None}
    for number in (1, 2):
        for some in combinations(names, number):
            others = [[value for value in SPACE[name] if value != now[name]] for name in some]
            for values in product(*others):
                found[changed(launch, dict(zip(some, values, strict=True)), unused)] = None
    return list(found)


def refusals(kernel: str, launch: Any, family: str) -> list[str]:
    """What the ahead-of-time gate says against a launch on the devices of a family."""
    from benchmarks import aot

    tunable = next(tunable for tunable in TUNABLES if tunable.kernel == kernel)
    (target,) = (target.name for target in aot.TARGETS.values() if target.family == family)
    path = str(aot.KERNEL_FILES / f"{tunable.file}.py")
    with chosen(tunable, launch):
        aot.compilations.cache_clear()
        jobs = [
            aot.Job(path, i, target, True)
            for i, made in enumerate(aot.compilations(path))
            if family in made.families and tunable.is_of(made)
        ]
        found = [sentence for job in jobs for sentence in aot.compile_job(job)[1]]
    aot.compilations.cache_clear()
    return found if jobs else [f"{kernel}: no compilation is of it"]


# --- search -----------------------------------------------------------------------------

# so many launches, so many rounds -> seconds of each
Timer = Callable[[Sequence[Any], int], list[float]]
# the closed form's launch, another one -> how its results differ from the first one's, "" if they do not
Check = Callable[[Any, Any], str]


@dataclass(frozen=True)
class Found:
    """The fastest launch, its seconds and those of the closed form's choice, measured in the same turns.

    `refused` are the launches that seemed fast and were wrong, and how their results differ.
    """

    launch: Any
    seconds: float
    closed_form_s: float
    refused: tuple[tuple[Any, str], ...] = ()

    def worth_it(self) -> bool:
        return self.closed_form_s > WORTH_IT * self.seconds


def search(launches: Sequence[Any], timer: Timer, check: Check) -> Found:
    """All launches in a few rounds, then the best right ones and the first, the closed form's, in many."""
    seconds = timer(launches, ROUNDS)
    right: list[int] = []
    refused = []
    for i in sorted(range(len(launches)), key=lambda i: seconds[i]):
        if len(right) == FINALISTS:
            break
        if i > 0 and (why := check(launches[0], launches[i])):
            refused.append((launches[i], why))
        else:
            right.append(i)
    finalists = list(dict.fromkeys([0, *right]))
    final = timer([launches[i] for i in finalists], FINAL_ROUNDS)
    best = min(range(len(finalists)), key=lambda i: final[i])
    return Found(launches[finalists[best]], final[best], final[0], tuple(refused))


def difference(name: str, actual: "Tensor", expected: "Tensor", inner: int) -> str:
    """How one launch's result differs from another's by more than the order of its sums; "" if it does not.

    Numbers are rounded to the operands' bfloat16 once or twice on the way, and each such rounding may fall
    the other way: one unit of the data's rms in the mean, some for the worst element, relative to its size.
    Sums of `inner` products in float32 add their own roundings. A part left out is far beyond that.
    """
    import torch

    is_now, must_be = ((tuple(result.shape), result.dtype) for result in (actual, expected))
    if is_now != must_be:
        return f"{name} is {is_now[0]} of {is_now[1]}, must be {must_be[0]} of {must_be[1]}"
    if torch.equal(actual, expected):
        return ""
    allowed = torch.finfo(torch.bfloat16).eps + inner**0.5 * torch.finfo(torch.float32).eps
    exact = expected.float()
    error, rms = (actual.float() - exact).abs(), exact.square().mean().sqrt()
    mean = (error.square().mean().sqrt() / rms).item()
    worst = (error / (rms + exact.abs())).max().item()
    # written so that NaN is a difference
    if mean <= allowed and worst <= 4 * allowed:
        return ""
    return (
        f"{name} differs by {mean:.1e} of its rms and {worst:.1e} at worst, "
        f"must be at most {allowed:.1e} and {4 * allowed:.1e}"
    )


def result_check(tunable: Tunable, call: Callable[[], Any], inner: int) -> Check:
    """Compare what the call gives with two launches."""
    import torch

    def results(launch: Any) -> Sequence[Any]:
        with chosen(tunable, launch):
            made = call()
        return (made,) if isinstance(made, torch.Tensor) else made

    def check(closed_form: Any, launch: Any) -> str:
        pairs = zip(results(launch), results(closed_form), strict=True)
        found = [difference(f"result {i}", *pair, inner) for i, pair in enumerate(pairs)]
        return "; ".join(filter(None, found))

    return check


def graph_timer(tunable: Tunable, call: Callable[[], Any]) -> Timer:
    """Medians of replayed CUDA graphs, one for each launch, in turns."""
    import torch

    from benchmarks.alternate import captured, time_alternately

    pool = torch.cuda.graph_pool_handle()
    graphs: dict[Any, Callable[[], object]] = {}

    def timer(launches: Sequence[Any], rounds: int) -> list[float]:
        for launch in launches:
            if launch not in graphs:
                with chosen(tunable, launch):
                    graphs[launch] = captured(call, GRAPH_LAUNCHES, pool)
        fns = {str(i): graphs[launch] for i, launch in enumerate(launches)}
        timings = time_alternately(fns, rounds, calls=GRAPH_LAUNCHES)
        return [timings[name].median_s for name in fns]

    return timer


def made_up_timer(launches: Sequence[Any], rounds: int) -> list[float]:
    """Seconds that depend on nothing but the launch, for a dry run."""
    return [1e-3 + 1e-3 * random.Random(repr(launch)).random() for launch in launches]


def measures(tunable: Tunable, shape: Shape, tokens: int) -> tuple[Timer, Check]:
    """Times and checks on the GPU, of one call on the same numbers."""
    call = tunable.call(shape, tokens)
    return graph_timer(tunable, call), result_check(tunable, call, tunable.sizes(shape, tokens)[0])


def made_up(tunable: Tunable, shape: Shape, tokens: int) -> tuple[Timer, Check]:
    """Of a dry run: nothing is run, so nothing is wrong."""
    return made_up_timer, lambda closed_form, launch: ""


# --- the table --------------------------------------------------------------------------

Table = dict[str, dict[Any, dict[str, Any]]]


def render(text: str, table: Table, origin: str) -> str:
    """The table's file with this table: sorted, one entry a line where it fits, as ruff would have it."""
    before, mark, _ = text.partition(MARK)
    if not mark:
        raise ValueError(f"the table's file must have the line {MARK!r}, got none")
    dashes = "-" * (90 - len(MARK))
    lines = [f"{before}{MARK}{dashes}", "", f"# {origin}"]
    if not table:
        return "\n".join([*lines, "TABLE: dict[str, dict[Key, Fields]] = {}"]) + "\n"
    lines.append("TABLE: dict[str, dict[Key, Fields]] = {")
    for kernel, entries in sorted(table.items()):
        lines.append(f'    "{kernel}": {{')
        for key, fields in sorted(entries.items()):
            lines.append(f'        Key("{key[0]}", {", ".join(map(str, key[1:]))}): {{')
            lines += [f'            "{name}": {value},' for name, value in fields.items()]
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "}"]) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def merged(table: Table, rows: Sequence[dict[str, Any]]) -> Table:
    """The table with what was measured now; a key whose closed form is as fast as anything has no entry."""
    result = {kernel: dict(entries) for kernel, entries in table.items()}
    for row in rows:
        entries = result.setdefault(row["kernel"], {})
        entries.pop(row["key"], None)
        if row["worth_it"]:
            entries[row["key"]] = row["fields"]
    return {kernel: entries for kernel, entries in result.items() if entries}


# --- the command ------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What to search: kernels by their names, and (shape, tokens), each key once."""

    kernels: tuple[str, ...]
    cases: tuple[tuple[str, int], ...]

    def points(self, family: str) -> Iterator[tuple[Tunable, Shape, int, Any]]:
        """Kernel, shape, tokens and key; a kernel has no point in shapes that are not its own."""
        from moe_runtime_kernels._triton.tuned import Case, make_key

        seen = set()
        for tunable in TUNABLES:
            if tunable.kernel not in self.kernels:
                continue
            for model, tokens in self.cases:
                if model not in tunable.shapes:
                    continue
                shape = tunable.shapes[model]
                key = make_key(family, 2, Case(tunable.kernel, *tunable.sizes(shape, tokens)))
                if (tunable.kernel, key) not in seen:
                    seen.add((tunable.kernel, key))
                    yield tunable, shape, tokens, key


Accept = Callable[[Tunable, list[Any]], list[Any]]


def gate(pool: Executor, family: str) -> Accept:
    """Those launches that the ahead-of-time gate accepts; each is compiled once, in a process of the pool."""
    known: dict[tuple[str, Any], list[str]] = {}

    def accept(tunable: Tunable, launches: list[Any]) -> list[Any]:
        new = [launch for launch in launches if (tunable.kernel, launch) not in known]
        found = pool.map(partial(refusals, tunable.kernel, family=family), new)
        known.update(zip(((tunable.kernel, launch) for launch in new), found, strict=True))
        # the first is the closed form's, which is shipped
        return launches[:1] + [launch for launch in launches[1:] if not known[tunable.kernel, launch]]

    return accept


def tune(
    plan: Plan,
    family: str,
    accept: Accept,
    measures_of: Callable[[Tunable, Shape, int], tuple[Timer, Check]],
) -> list[dict[str, Any]]:
    """A row per kernel and key: the winner's fields, both times, and what was refused for its results."""
    rows = []
    for tunable, shape, tokens, key in plan.points(family):
        launches = accept(tunable, candidates(tunable.closed_form(shape, tokens, family), tunable.unused))
        found = search(launches, *measures_of(tunable, shape, tokens))
        rows.append(
            {
                "kernel": tunable.kernel,
                "key": key,
                "tokens": tokens,
                "candidates": len(launches),
                "fields": fields_of(found.launch),
                "seconds": found.seconds,
                "closed_form_s": found.closed_form_s,
                "worth_it": found.worth_it(),
                "refused": [{"fields": fields_of(one), "why": why} for one, why in found.refused],
            }
        )
        gain = found.closed_form_s / found.seconds
        print(f"{tunable.kernel} {tuple(key)}: {gain:.2f} times the closed form's speed", flush=True)
        for one, why in found.refused:
            print(f"  refused {fields_of(one)}: {why}", flush=True)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [tunable.kernel for tunable in TUNABLES]
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the result file")
    parser.add_argument("--kernels", nargs="+", choices=names, default=names, metavar="KERNEL")
    parser.add_argument(
        "--models", nargs="+", choices=[*EXPERTS, *MIXES], default=list(MODELS), metavar="MODEL"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--dry-run", action="store_true", help="made-up times, on a CPU too; writes no table")


def main(arguments: argparse.Namespace) -> int:
    """Search, write the result file and, but for a dry run, the table."""
    import torch

    if not torch.cuda.is_available() and not arguments.dry_run:
        print("There is no CUDA or ROCm GPU here, so nothing was tuned; --dry-run shows the search.")
        return 0
    plan = Plan(tuple(arguments.kernels), tuple(product(arguments.models, arguments.tokens)))
    if arguments.dry_run:
        print("A dry run: all times are made up.")
        rows = tune(plan, "cuda90", lambda tunable, launches: launches, made_up)
    else:
        from moe_runtime_kernels._triton.launch import device_family

        family = device_family(torch.device("cuda"))
        with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
            rows = tune(plan, family, gate(pool, family), measures)
    from moe_runtime_kernels._triton.tuned import TABLE

    from moe_runtime.machine import describe_machine, device_folder

    machine = describe_machine()
    name = f"{datetime.now(UTC):%Y-%m-%d}_{(machine['commit'] or 'nocommit')[:7]}_tune.json"
    path = arguments.output / device_folder(machine) / name
    origin = "made up" if arguments.dry_run else f"measured on {machine['device']}, {path.name}"
    text = render(TABLE_FILE.read_text(encoding="utf-8"), merged(TABLE, rows), origin)
    if arguments.dry_run:
        print(text.partition(MARK)[2])
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"suite": "tune", "machine": machine, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_atomically(TABLE_FILE, text)
    print(f"wrote {path} and {TABLE_FILE}; now run `python -m benchmarks aot`")
    return 0
