"""`python -m benchmarks packing`: training on real instructions of mixed length, packed and padded.

All ways train the same small mixture on the same samples, forward and backward in micro-batches and one
optimizer step, and take turns. Speed is in tokens that count for the loss, which are the same in all.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.alternate import time_alternately
from benchmarks.result_file import RESULTS, write_result
from moe_runtime.demo.checkpoint import smollm2_checkpoint
from moe_runtime.machine import describe_machine
from moe_runtime.train.data import DataRecipe
from moe_runtime.train.data.instructions import TASKS, write_instructions
from moe_runtime.train.data.load import TrainData, load_train_data

MAX_LENGTH = 1024
PADDED_ROWS, PACKED_ROWS = 8, 2  # of a micro-batch
SAMPLES_PER_TASK = 8
TINY_TASKS = ("define", "continue_verse")  # reading the Python library takes long
# SmolLM2's widths; the experts are copies of one in shape, not in weight.
SMALL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
}
TINY = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_hidden_layers": 1,
}


def model_for(tiny: bool) -> Any:
    from moe_runtime.hf import MoeRuntimeConfig, MoeRuntimeForCausalLM

    torch.manual_seed(0)
    return MoeRuntimeForCausalLM(MoeRuntimeConfig(**(TINY if tiny else SMALL))).train()


def batches(data: TrainData, rows: int, order: list[int]) -> list[dict[str, Any]]:
    made = []
    for start in range(0, len(order), rows):
        batch = data.collator([data.dataset[row] for row in order[start : start + rows]])
        batch.pop("sample")
        made.append(batch)
    return made


def step(model: Any, optimizer: torch.optim.Optimizer, made: list[dict[str, Any]], counted: int) -> None:
    for batch in made:
        model(**batch, use_cache=False, num_items_in_batch=counted).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def ways(
    folder: Path, tokenizer: Any, tiny: bool
) -> Iterator[tuple[str, Callable[[], None], dict[str, Any]]]:
    """Name, one training step over all samples, and what it works on."""
    from moe_runtime.hf.document_attention import attend_by_document

    tasks = TINY_TASKS if tiny else tuple(TASKS)
    write_instructions(folder, tasks, samples=5 if tiny else SAMPLES_PER_TASK, heldout=1, seed=0)
    files = tuple(str(folder / f"{name}.train.jsonl") for name in tasks)
    load = {
        packing: load_train_data(
            DataRecipe(train=files, max_length=MAX_LENGTH, packing=packing, too_long="drop"), tokenizer, 0
        )
        for packing in (True, False)
    }
    lengths = [len(load[False].dataset[row]["input_ids"]) for row in range(len(load[False].dataset))]
    drawn = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    packed_order = list(range(len(load[True].dataset)))
    cases = {
        "packed": (True, packed_order, True),
        "packed, block mask": (True, packed_order, False),
        "padded": (False, drawn, False),
        "padded, sorted by length": (False, sorted(drawn, key=lambda row: lengths[row]), False),
    }
    for name, (packing, order, by_document) in cases.items():
        model = model_for(tiny)
        if by_document and not attend_by_document(model):
            raise RuntimeError("the model must be able to attend document by document on this machine")
        data = load[packing]
        made = batches(data, PACKED_ROWS if packing else PADDED_ROWS, order)
        counted = data.summary["counted_tokens"]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the same work in every round
        positions = sum(batch["input_ids"].numel() for batch in made)
        worked = {
            "samples": data.summary["samples"],
            "positions": positions,
            "counted_tokens": counted,
            "padding_share": 1 - data.summary["tokens"] / positions,
        }
        yield name, lambda m=model, o=optimizer, b=made, c=counted: step(m, o, b, c), worked


def compare(tiny: bool, rounds: int) -> dict[str, Any]:
    """The row of a result file."""
    from moe_runtime.hf.loading import load_tokenizer

    tokenizer = load_tokenizer(smollm2_checkpoint())
    with tempfile.TemporaryDirectory(prefix="packing-") as folder:
        found = list(ways(Path(folder) / "instructions", tokenizer, tiny))
    timings = time_alternately({name: call for name, call, _ in found}, rounds, warmup=1)
    speed = {name: worked["counted_tokens"] / timings[name].median_s for name, _, worked in found}
    return {
        "case": {
            "model": "tiny" if tiny else "4 experts of SmolLM2's widths, 4 layers",
            "length": MAX_LENGTH,
        },
        "tasks": len(TINY_TASKS if tiny else TASKS),
        "samples": found[0][2]["samples"],
        "timings": {name: timing.summary() for name, timing in timings.items()},
        "ratio_to": "padded",
        "counted_tokens_per_s": speed,
        "ratios": {name: value / speed["padded"] for name, value in speed.items()},
        "work": {name: worked for name, _, worked in found},
        "not_timed": {},
    }


def section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
    """Of docs/performance.md."""
    from benchmarks.sections import _origin, _spread, _table

    (row,) = content["rows"]
    header = ["", "counted tokens / s", "times padded", "s for a step (middle half)", "padding"]
    lines = [
        [
            name,
            f"{row['counted_tokens_per_s'][name]:,.1f}",
            f"{row['ratios'][name]:.2f}",
            _spread(timing, 1.0),
            f"{row['work'][name]['padding_share']:.0%}",
        ]
        for name, timing in row["timings"].items()
    ]
    explained = (
        f"One training step of a mixture ({row['case']['model']}) over {row['samples']} instructions of "
        f"{row['tasks']} tasks (`moe-runtime instructions`); rows have up to {row['case']['length']} tokens. "
        "Packed rows attend document by document, or by a mask over the row. Counted tokens are those of the "
        "completions. float32; timed in turns; medians."
    )
    return ["## Packing", explained, _table(header, lines), _origin(content, path, root)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiny", action="store_true", help="a model of seconds, to show that all runs")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of every way")
    parser.add_argument("--output", type=Path, default=RESULTS)


def main(arguments: argparse.Namespace) -> int:
    row = compare(arguments.tiny, arguments.rounds)
    print(json.dumps(row, indent=1))
    write_result(arguments.output, {"suite": "packing", "machine": describe_machine(), "rows": [row]})
    return 0
