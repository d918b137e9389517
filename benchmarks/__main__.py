"""`python -m benchmarks run` times the suites, `… aot` compiles the kernels for GPUs that are not here,
`… tune` measures launches on one that is, `… upcycling` times whole upcycling runs, `… packing` trains on
packed rows and on padded ones, `… expert_load` shows how evenly a training uses its experts, `… flan` keeps a
comparison's report among the results, `… compare` says what became slower between two result files, and
`… report` rewrites the tables and plots made from the results."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent


def lacks(package: str) -> bool:
    """Whether a package of the extra "bench" is missing, which is then said."""
    if find_spec(package) is not None:
        return False
    print(f"The benchmarks need {package}, of the extra bench; run: python -m pip install '.[bench]'")
    return True


def run(arguments: argparse.Namespace) -> int:
    if lacks("pytest"):
        return 2
    import pytest

    # a suite's own name is that suite alone; others have names that begin with it
    suite = HERE / f"{arguments.only}.py"
    options = [
        str(suite if suite.exists() else HERE),
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",  # another library's warnings are no errors of a comparison
        f"--rootdir={HERE.parent}",
        f"--results={arguments.output}",
    ]
    if find_spec("pytest_benchmark") is not None:
        options.append("--benchmark-columns=median,iqr,rounds")
    if arguments.tiny:
        options.append("--tiny")
    if arguments.no_peers:
        options.append("--no-peers")
    if arguments.only and not suite.exists():
        options += ["-k", arguments.only]
    return int(pytest.main(options))


def report(arguments: argparse.Namespace) -> int:
    if lacks("matplotlib"):
        return 2
    from benchmarks.report import write_pages

    for path in write_pages(HERE.parent):
        print(f"wrote {path}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("run", help="time the suites and write result files")
    timing.add_argument("--output", type=Path, default=HERE / "results", help="folder of the result files")
    timing.add_argument("--tiny", action="store_true", help="shapes of a second, to show that the suites run")
    timing.add_argument("--only", help="run the benchmarks whose name contains this")
    timing.add_argument(
        "--no-peers",
        action="store_true",
        help="leave out other libraries, some of which tune themselves for minutes",
    )
    timing.set_defaults(call=run)
    from benchmarks import aot, compare, expert_load, flan, memory, packing, tune, upcycling
    from benchmarks.ablation import command as ablation

    compiling = commands.add_parser("aot", help="compile every kernel without a GPU and check the result")
    aot.add_arguments(compiling)
    compiling.set_defaults(call=aot.main)
    ablating = commands.add_parser("ablation", help="compare upcycling methods on a small model trained here")
    ablation.add_arguments(ablating)
    tuning = commands.add_parser("tune", help="measure launches on a GPU and write the table of the fastest")
    tune.add_arguments(tuning)
    tuning.set_defaults(call=tune.main)
    writing = commands.add_parser("upcycling", help="time upcycling against copying its output's bytes")
    upcycling.add_arguments(writing)
    writing.set_defaults(call=upcycling.main)
    packed = commands.add_parser("packing", help="train on packed rows and on padded ones, in turns")
    packing.add_arguments(packed)
    packed.set_defaults(call=packing.main)
    loading = commands.add_parser("expert_load", help="how evenly experts are used while they are trained")
    expert_load.add_arguments(loading)
    loading.set_defaults(call=expert_load.main)
    planned = commands.add_parser("memory", help="a training run's peak of memory beside its plan")
    memory.add_arguments(planned)
    planned.set_defaults(call=memory.main)
    keeping = commands.add_parser("flan", help="keep the report of `moe-runtime flan` among the results")
    flan.add_arguments(keeping)
    keeping.set_defaults(call=flan.main)
    comparing = commands.add_parser("compare", help="what became slower between two result files")
    compare.add_arguments(comparing)
    comparing.set_defaults(call=compare.main)
    tables = commands.add_parser(
        "report", help="rewrite README's table, docs/performance.md and its plots from the results"
    )
    tables.set_defaults(call=report)
    arguments = parser.parse_args()
    return arguments.call(arguments)


if __name__ == "__main__":
    sys.exit(main())
