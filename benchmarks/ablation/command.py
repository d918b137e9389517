"""`python -m benchmarks ablation` without what it runs: other commands need Triton not to be imported yet."""

import argparse
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"), help="of models and stages")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--tiny", action="store_true", help="a run of seconds, to show that it works")
    parser.set_defaults(call=main)


def main(arguments: argparse.Namespace) -> int:
    from benchmarks.ablation.run import run

    run(arguments.folder, arguments.output, tiny=arguments.tiny)
    return 0
