"""`python -m benchmarks upcycling`: eight experts from a generated dense model, beside copying the output.

Every run is a process of its own whose files end on the disk: time from its first call to the last fsync,
imports aside, and the peak of its memory, pages of mapped files included. Ours and the copy take turns; other
programs, which run from an environment of theirs, follow with the settings that cost them least memory.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alternate import Timing
from benchmarks.result_file import RESULTS, write_result
from moe_runtime.families import model_config
from moe_runtime.machine import describe_machine
from upcycle.checkpoint import INDEX_NAME, index_json, make_shards, write_shard
from upcycle.names import dense_shapes
from upcycle.plan import UpcyclePlan, make_plan_for
from upcycle.recipe import recipe_from_dict
from upcycle.tasks import TensorTask, Zeros

EXPERTS = 8
FREE = 5 * 10**9  # of the disk, left to others
# About 2 GB in bfloat16, of which a third becomes experts; --tiny shows in seconds that everything runs.
SIZES = {
    "2 GB": {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 25, "vocab_size": 64000},
    "tiny": {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 4000},
}
SHARD = {"2 GB": "500MB", "tiny": "1MB"}

# What a child runs around a program: seconds to the last fsync, imports aside, and the peak of its memory.
MEASURED = """
import json, os, sys, time
from pathlib import Path
def memory(): return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
def flush(folder):
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with path.open("rb") as file: os.fsync(file.fileno())
{imports}
before = memory()
start, used = time.perf_counter(), time.process_time()
{work}
seconds, used = time.perf_counter() - start, time.process_time() - used
print("\\n" + json.dumps({{"seconds": seconds, "cpu": used, "peak": memory(), "imported": before}}))
"""
OURS = ("import upcycle", "upcycle.upcycle(sys.argv[1])")
COPY = (
    "import shutil",
    "shutil.copytree(sys.argv[1], sys.argv[2], copy_function=shutil.copyfile); flush(sys.argv[2])",
)


@dataclass(frozen=True)
class Run:
    """One process: seconds of the clock and of the CPU, bytes of memory at its peak and after its imports."""

    seconds: float
    cpu: float
    peak: int
    imported: int
    written: int = 0  # bytes of weights


def measured(python: str, code: tuple[str, str], *arguments: str) -> Run:
    os.sync()  # what earlier runs wrote is not this one's burden
    imports, work = code
    done = subprocess.run(
        [python, "-c", MEASURED.format(imports=imports, work=work), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


# --- what is upcycled ---


def make_source(folder: Path, size: str) -> None:
    """A dense Llama with a tokenizer: random numbers, a few megabytes of them over and over."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
        **SIZES[size],
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    tasks = [
        TensorTask(name, "BF16", shape, Zeros()) for name, shape in dense_shapes(model_config(config)).items()
    ]
    numbers = np.random.Generator(np.random.Philox(key=0)).standard_normal(4 * 2**20, dtype=np.float32)
    block = (0.02 * numbers).view(np.uint32).__rshift__(16).astype(np.uint16)
    shards = make_shards(tasks, max_bytes=10**6 * int(SHARD[size].removesuffix("MB")))
    for shard in shards:
        repeats = shard.num_bytes // block.nbytes + 1
        write_shard(folder / shard.name, shard, [np.tile(block, repeats)[: shard.num_bytes // 2]])
    if len(shards) > 1:
        (folder / INDEX_NAME).write_text(json.dumps(index_json(shards)))


def write_tokenizer(folder: Path) -> None:
    """Of words; other programs copy one, whatever it does."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def our_recipe(folder: Path, output: Path, **values: Any) -> Path:
    recipe = {"target": "mixtral", "output": str(output), "max_shard_size": "2GB", **values}
    path = folder / f"{output.name}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


# --- other programs ---


def mergekit(python: str, folder: Path, source: Path, output: Path) -> Run:
    """Small shards: it keeps the tensors of one in memory."""
    config = {
        "base_model": str(source),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts": [{"source_model": str(source)}] * EXPERTS,
    }
    path = folder / "mergekit.yaml"
    path.write_text(json.dumps(config))
    options = ["--lazy-unpickle", "--out-shard-size", "100M", "--quiet"]
    code = (
        "from mergekit.scripts.moe import main",
        f"main([*sys.argv[1:], *{options!r}], standalone_mode=False); flush(sys.argv[2])",
    )
    return measured(python, code, str(path), str(output))


def mixturekit(python: str, folder: Path, source: Path, output: Path) -> Run:
    """Streaming, its default; everything that is no expert is averaged."""
    config = {
        "moe_method": "traditional",
        "model_type": "mixture",
        "num_experts_per_tok": 2,
        "experts": [{"expert_name": f"e{n}", "model_id": str(source)} for n in range(EXPERTS)],
    }
    path = folder / "mixturekit.json"
    path.write_text(json.dumps(config))
    code = (
        "import torch\nfrom MixtureKit import build_moe",
        "build_moe(json.load(open(sys.argv[1])), torch_dtype=torch.bfloat16, output_dir=sys.argv[2]); "
        "flush(sys.argv[2])",
    )
    return measured(python, code, str(path), str(output))


# --- the comparison ---


@dataclass(frozen=True)
class Job:
    """What is made of the source, the other program that makes it too, and how often each runs."""

    title: str
    values: dict[str, Any]
    other: str
    call: Callable[[str, Path, Path, Path], Run]
    rounds: int
    rounds_of_other: int


def compare(folder: Path, size: str, peers: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of a result file: a copy of one model, and branches with the mean of all that is no expert."""
    source, first = folder / "source", folder / "first"
    make_source(source, size)
    same = {"method": "copy", "base": str(source), "experts": EXPERTS}
    branches = {"method": "btx", "sources": [str(source)] * EXPERTS}
    plan = make_plan_for(recipe_from_dict(json.loads(our_recipe(folder, first, **same).read_text())))
    check_room(folder, plan.num_bytes)
    measured(sys.executable, OURS, str(folder / "first.yaml"))
    jobs = [
        Job("copy of one model", same, "mergekit", mergekit, rounds=3, rounds_of_other=2),
        Job("branches and their mean", branches, "mixturekit", mixturekit, rounds=2, rounds_of_other=1),
    ]
    if size == "tiny":
        jobs = [replace(job, rounds=1, rounds_of_other=1) for job in jobs]
    return [row(job, size, *run_job(job, folder, peers), plan) for job in jobs]


def run_job(job: Job, folder: Path, peers: dict[str, str]) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """The runs of each program, and why one has none."""

    def ours(output: Path) -> Run:
        return measured(sys.executable, OURS, str(our_recipe(folder, output, **job.values)))

    def plain_copy(output: Path) -> Run:
        return measured(sys.executable, COPY, str(folder / "first"), str(output))

    def other(output: Path) -> Run:
        return job.call(peers[job.other], folder, folder / "source", output)

    runs: dict[str, list[Run]] = {"moe_runtime": [], "plain_copy": []}
    for number in range(job.rounds):
        pair = [("moe_runtime", ours), ("plain_copy", plain_copy)]
        for name, run in pair if number % 2 else reversed(pair):
            runs[name].append(once(folder, run))
    if job.other not in peers:
        return runs, {job.other: f"no --{job.other}-python"}
    try:
        runs[job.other] = [once(folder, other) for _ in range(job.rounds_of_other)]
    except RuntimeError as error:
        return runs, {job.other: str(error)}
    return runs, {}


def once(folder: Path, run: Callable[[Path], Run]) -> Run:
    """One run into a folder that is gone afterwards."""
    output = folder / "output"
    try:
        done = run(output)
        written = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
        return replace(done, written=written)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 2 * num_bytes + FREE:
        raise SystemExit(
            f"{folder} must have room for two outputs and {FREE / 1e9:.0f} GB more, "
            f"{(2 * num_bytes + FREE) / 1e9:.0f} GB, and has {free / 1e9:.0f} GB; choose another --folder"
        )


def row(
    job: Job, size: str, runs: dict[str, list[Run]], absent: dict[str, str], plan: UpcyclePlan
) -> dict[str, Any]:
    largest = max(task.num_bytes for task in plan.tasks)
    seconds = {name: [run.seconds for run in done] for name, done in runs.items()}
    median = {name: statistics.median(samples) for name, samples in seconds.items()}
    return {
        "case": {"job": job.title, "source": size, "experts": EXPERTS},
        "largest_tensor_bytes": largest,
        "bound_bytes": 2 * largest + 300 * 10**6,
        "timings": {name: summary(samples) for name, samples in seconds.items()},
        "samples_s": seconds,
        "cpu_s": {name: statistics.median(run.cpu for run in done) for name, done in runs.items()},
        "over_plain_copy": {name: value / median["plain_copy"] for name, value in median.items()},
        "written_bytes": {name: done[0].written for name, done in runs.items()},
        "peak_bytes": {name: max(run.peak for run in done) for name, done in runs.items()},
        "imported_bytes": {name: max(run.imported for run in done) for name, done in runs.items()},
        "not_timed": absent,
    }


def summary(samples: list[float]) -> dict[str, float]:
    """As of all suites; one run alone has no spread."""
    return Timing.of(samples if len(samples) > 1 else samples * 2).summary() | {"rounds": len(samples)}


def section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
    """Of docs/performance.md: time beside a plain copy, and memory."""
    from benchmarks.sections import _origin, _reasons, _spread, _table

    rows = content["rows"]
    header = ["job", "", "s (middle half)", "time / plain_copy", "CPU s", "GB written", "peak MB", "runs"]
    lines = [
        [
            row["case"]["job"],
            name,
            _spread(timing, 1.0),
            f"{row['over_plain_copy'][name]:.2f}",
            f"{row['cpu_s'][name]:.1f}",
            f"{row['written_bytes'][name] / 1e9:.2f}",
            f"{row['peak_bytes'][name] / 1e6:,.0f}",
            str(timing["rounds"]),
        ]
        for row in rows
        for name, timing in row["timings"].items()
    ]
    others = ", ".join(f"{name} {version}" for name, version in content["peers"].items())
    explained = (
        f"{rows[0]['case']['experts']} experts from a generated dense model of {rows[0]['case']['source']}; "
        "every run is a process of its own, timed from its first call to the last fsync, imports aside. "
        "`plain_copy` copies the output's files on the same disk. Peak memory has pages of mapped files in "
        f"it; an upcycling run must stay below {rows[0]['bound_bytes'] / 1e6:,.0f} MB here. Medians."
    )
    if others:
        explained += f" Other programs ran with the settings that cost them least memory: {others}."
    return ["## Upcycling", explained, _table(header, lines), *_reasons(rows), _origin(content, path, root)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder")
    parser.add_argument("--tiny", action="store_true", help="a model of megabytes, to show that all runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    for other in ("mergekit", "mixturekit"):
        parser.add_argument(f"--{other}-python", help=f"the Python of an environment with {other}")


def main(arguments: argparse.Namespace) -> int:
    peers = {name: getattr(arguments, f"{name}_python") for name in ("mergekit", "mixturekit")}
    peers = {name: python for name, python in peers.items() if python}
    size = "tiny" if arguments.tiny else "2 GB"
    with tempfile.TemporaryDirectory(prefix="upcycling-", dir=arguments.folder) as folder:
        rows = compare(Path(folder), size, peers)
    versions = {name: version(python, name) for name, python in peers.items()}
    for entry in rows:
        print(json.dumps(entry, indent=1))
    content = {"suite": "upcycling", "machine": describe_machine(), "peers": versions, "rows": rows}
    write_result(arguments.output, content)
    return 0


def version(python: str, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
