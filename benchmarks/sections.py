"""The sections of docs/performance.md, one function per kind of suite: result file -> parts of a page."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import expert_load, flan, memory, packing, upcycling
from benchmarks.ablation.section import ablation_rows, explained
from benchmarks.ablation.summary import conclude, summarise
from benchmarks.bars import BARS, MODEL
from benchmarks.result_file import Result

NOTES = Path(__file__).resolve().parent / "notes"  # <suite>.md: what a reader must know beside the numbers
# written for GPUs: their sections say where there is no result of one
FOR_GPUS = ("expert_ffn", "grouped_gemm", "attention_mix", "route", "plan", "permute", "combine")


def notes(suite: str) -> list[str]:
    """The hand-written part of a suite's section, where there is one; it holds no measured number."""
    path = NOTES / f"{suite}.md"
    return [path.read_text(encoding="utf-8").strip()] if path.exists() else []


# --- parts of sections ---


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _origin(content: dict[str, Any], path: Path, root: Path) -> str:
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    link = path.relative_to(root).as_posix()
    state = " with uncommitted changes" if machine["dirty"] else ""
    return (
        f"{machine['kind'].upper()} time on {machine['device']}, {machine['threads']} threads; {versions}; "
        f"commit {machine['commit'][:7]}{state}; `{link}`."
    )


def _demo_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, entry in report["models"].items():
        cost, timed = report["cost"].get(name), report["latency"].get(name)
        rows.append(
            [
                entry["title"],
                *(f"{value:.2f}" for value in entry["perplexity"].values()),
                f"{entry['mean_perplexity']:.2f}",
                f"{cost['total_parameters'] / 1e6:.0f} / {cost['active_parameters'] / 1e6:.0f} M"
                if cost
                else "",
                f"{cost['forward_flops'] / 1e6:.0f} M" if cost else "",
                _milliseconds(timed, "prefill_s") if timed else "",
                _milliseconds(timed, "decode_s") if timed else "",
            ]
        )
    return rows


def _milliseconds(timed: list[dict[str, Any]], kind: str) -> str:
    medians = [1e3 * measured[kind]["median"] for measured in timed]
    return f"{sum(medians) / len(medians):.0f} ms"


def _demo_table(report: dict[str, Any]) -> str:
    domains = [domain["name"] for domain in report["domains"]]
    header = ["held-out perplexity", *domains, "mean", "parameters, total / active", "FLOPs / token"]
    prompt = report["settings"]["latency_prompt"]
    return _table([*header, f"prefill of {prompt} tokens", "one decoded token"], _demo_rows(report))


def _caveat(report: dict[str, Any]) -> str:
    rows, settings = report["settings"]["heldout_rows"], report["settings"]
    return (
        f"Read with care: one run and {rows} held-out rows of {settings['row_length']} tokens per domain, "
        f"cut with seed {settings['seed']} from documents of their own. Learning rates, the router start and "
        "whether the seed model is an expert were chosen with seed 0, over more settings for the mixtures "
        "than for the dense baseline (two rates)."
    )


def readme_table(report: dict[str, Any], path: Path, root: Path) -> list[str]:
    return [
        "`make demo`: SmolLM2-135M, specialists trained and mixtures tuned in "
        f"{report['seconds'] / 60:.1f} minutes on {len(report['domains'])} domains of real text.",
        _demo_table(report),
        _caveat(report),
        _origin(report, path, root),
    ]


def _demo_section(report: dict[str, Any], path: Path, root: Path) -> list[str]:
    sentences = "\n".join(f"- {sentence}" for sentence in report["conclusions"])
    return [
        "## The demonstration",
        _demo_table(report),
        sentences,
        _caveat(report),
        _origin(report, path, root),
    ]


def _ablation_section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
    sentences = "\n".join(f"- {sentence}" for sentence in conclude(summarise(content)))
    return [
        "## Upcycling methods on a small model",
        explained(content),
        _table(*ablation_rows(content)),
        sentences,
        _origin(content, path, root),
    ]


def _ratio_section(title: str, explained: str) -> Any:
    """Of layers; which implementations there are may depend on the case."""

    def section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
        rows = content["rows"]
        names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
        first = rows[0]["ratio_to"]
        columns = list(dict.fromkeys(key for row in rows for key in row["case"]))
        has_floor = "floor_share" in rows[0]
        table = _table(
            [
                *columns,
                *(f"{name} (ms, middle half{'' if name == first else f'; times {first}'})" for name in names),
                *(["of the floor"] if has_floor else []),
                "FLOPs",
            ],
            [
                [
                    *(str(row["case"].get(key, "")) for key in columns),
                    *(_spread_and_ratio(row, name) for name in names),
                    *([", ".join(map("{:.0%}".format, row["floor_share"].values()))] if has_floor else []),
                    ", ".join(f"{flops / 1e6:,.1f} M" for flops in dict.fromkeys(row["flops"].values())),
                ]
                for row in rows
            ],
        )
        return [f"## {title}", explained, table, *_reasons(rows), _origin(content, path, root)]

    return section


def _spread_and_ratio(row: dict[str, Any], name: str) -> str:
    if name not in row["timings"]:
        return ""
    spread = _spread(row["timings"][name])
    return spread if name == row["ratio_to"] else f"{spread}; {row['ratios'][name]:.2f}"


def _spread(timing: dict[str, float], unit: float = 1e3) -> str:
    median, q1, q3 = (unit * timing[name] for name in ("median_s", "q1_s", "q3_s"))
    return f"{median:.2f} ({q1:.2f} to {q3:.2f})"


def _moving_section(title: str, explained: str) -> Any:
    """Of operations that move data; which implementations there are depends on the case."""

    def section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
        rows = content["rows"]
        names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
        first = rows[0]["ratio_to"]
        table = _table(
            [
                *rows[0]["case"],
                *(f"{name} (µs, middle half)" for name in names),
                f"{first}: GB/s",
                "of a copy",
            ],
            [
                [
                    *(str(value) for value in row["case"].values()),
                    *(_microseconds(row, name) for name in names),
                    f"{row['bytes_per_s'][first] / 1e9:.1f}",
                    f"{row['copy_share'][first]:.0%}",
                ]
                for row in rows
            ],
        )
        how = ["Replayed from CUDA graphs."] if content["machine"]["kind"] == "gpu" else []
        return [f"## {title}", explained, table, *_reasons(rows), *how, _origin(content, path, root)]

    return section


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """A line per implementation that has no time in some rows, and why; none where all have one."""
    why: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, reason in row["not_timed"].items():
            why.setdefault(name, {})[reason] = None
    if not why:
        return []
    return ["Not timed:", "\n".join(f"- {name}: {'; '.join(reasons)}" for name, reasons in why.items())]


def _product_section(title: str, explained: str) -> Any:
    """Of products: speed, share of the floor, error; other implementations relative to the first."""

    def section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
        rows = content["rows"]
        first = rows[0]["ratio_to"]
        others = list(dict.fromkeys(name for row in rows for name in row["timings"] if name != first))
        gpu = content["machine"]["kind"] == "gpu"
        table = _table(
            [
                *rows[0]["case"],
                f"{first} (ms, middle half)",
                "TFLOP/s",
                "of the floor",
                "error",
                *(["peak MiB"] if gpu else []),
                *others,
            ],
            [
                [
                    *(str(value) for value in row["case"].values()),
                    _spread(row["timings"][first]),
                    f"{row['flops_per_s'][first] / 1e12:.3g}",
                    f"{row['floor_share'][first]:.0%}",
                    _worst(row, first),
                    *([f"{row['peak_bytes'][first] / 2**20:,.0f}"] if gpu else []),
                    *(_relative(row, name) for name in others),
                ]
                for row in rows
            ],
        )
        speeds = _measured_speeds(rows)
        return [
            f"## {title}",
            explained,
            table,
            *_reasons(rows),
            *(_timed_by(rows, first) if gpu else []),
            speeds,
            _origin(content, path, root),
        ]

    return section


def _measured_speeds(rows: list[dict[str, Any]]) -> str:
    """What the shares are of."""
    products = {row["case"].get("dtype", "bfloat16"): row["product_flops_per_s"] for row in rows}
    made = (f"a large {dtype} product makes {speed / 1e12:,.2f} TFLOP/s" for dtype, speed in products.items())
    copied = f"a copy moves {rows[0]['copy_bytes_per_s'] / 1e9:,.0f} GB/s"
    return f"Measured in the same run: {', '.join((copied, *made))}."


def _timed_by(rows: list[dict[str, Any]], first: str) -> list[str]:
    """How the first one was timed, where that is not the same in all rows or not by a graph."""
    by_call = [row["case"] for row in rows if row["timed_by"][first] == "call"]
    if not by_call:
        return ["Replayed from CUDA graphs unless said."]
    cases = "; ".join(" ".join(map(str, case.values())) for case in by_call)
    return [f"Replayed from CUDA graphs unless said; {first} was timed with the host's part in: {cases}."]


def _worst(row: dict[str, Any], name: str) -> str:
    """The largest error; none of what computes something else, such as a dense layer."""
    return f"{max(row['errors'][name].values()):.1e}" if name in row["errors"] else ""


def _relative(row: dict[str, Any], name: str) -> str:
    """Time as a multiple of the first one's, worst error, and memory where it was measured."""
    if name not in row["timings"]:
        return ""
    parts = [f"{row['ratios'][name]:.2f} times"]
    if name in row["errors"]:
        parts.append(f"error {_worst(row, name)}")
    if "peak_bytes" in row:
        parts.append(f"{row['peak_bytes'][name] / 2**20:,.0f} MiB")
    if row["timed_by"][name] != row["timed_by"][row["ratio_to"]]:
        parts.append(_BY[row["timed_by"][name]])
    return ", ".join(parts)


_BY = {"graph": "from a graph", "call": "with the host's part"}


def _models_section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
    """Whole models: a line per case and implementation."""
    rows = content["rows"]
    first = rows[0]["ratio_to"]
    gpu = content["machine"]["kind"] == "gpu"
    header = [*rows[0]["case"], "", "ms (middle half)", f"time / {first}", "TFLOP/s", "GB/s", "of the floor"]
    header += [
        "error",
        "MFLOPs by formula",
        "by counter",
        "p50 / p90 / p99 (ms)",
        *(["peak MiB"] if gpu else []),
    ]
    lines = [
        [
            *(str(value) for value in row["case"].values()),
            name,
            _spread(timing),
            f"{row['ratios'][name]:.2f}",
            f"{row['flops_per_s'][name] / 1e12:.3g}",
            f"{row['bytes_per_s'][name] / 1e9:.1f}",
            f"{row['floor_share'][name]:.0%}",
            _worst(row, name),
            f"{row['formula_flops'][name] / 1e6:,.1f}",
            f"{row['flops'][name] / 1e6:,.1f}" if name in row["flops"] else "",
            _percentiles(row, name),
            *([f"{row['peak_bytes'][name] / 2**20:,.0f}"] if gpu else []),
        ]
        for row in rows
        for name, timing in row["timings"].items()
    ]
    explained = (
        "A training step (forward, backward, AdamW) of one row, a prefill of it with the logits of its last "
        "token, and the decoding of that token alone, batch 1. `moe_runtime` is this project's causal LM, "
        '`transformers_moe_runtime` transformers\' own with `experts_implementation="moe_runtime"`, '
        "`transformers_accelerated` the same after `accelerate_model`, which swaps its routers; all of "
        "them have the same weights. The dense models are matched on active FLOPs and on the width of one "
        f"expert. Timed in turns, as they are called; medians. {_FLOOR_OF_MODELS} Peak memory is measured on "
        "GPUs only."
    )
    parts = ["## Whole models", explained, _table(header, lines), *_reasons(rows)]
    return [*parts, _measured_speeds(rows), _origin(content, path, root)]


def _percentiles(row: dict[str, Any], name: str) -> str:
    found = row.get("percentiles", {}).get(name)
    return " / ".join(f"{1e3 * seconds:.2f}" for seconds in found.values()) if found else ""


def bars_section(measured: dict[str, Result], root: Path) -> list[str]:
    """What the kernels are held to, whatever has been measured; `measured` is of one H100."""
    rows = {suite: result.content["rows"] for suite, result in measured.items()}
    return [
        "## What the kernels are held to",
        f"On one H100, bfloat16, with the shapes of {MODEL} (D 2048, F 768, E 128, K 8) unless more are "
        "named. Useful FLOPs: 6·T·K·D·F forward, twice that backward.",
        _table(["", "wanted", "measured", "holds"], [bar.line(rows) for bar in BARS]),
        *(_origin(result.content, result.path, root) for result in measured.values()),
    ]


def _microseconds(row: dict[str, Any], name: str) -> str:
    if name in row["timings"]:
        return _spread(row["timings"][name], unit=1e6)
    return "not timed" if name in row["not_timed"] else ""


def compiled_section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
    """One line per kernel and target: the worst of its configurations."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for values in content["rows"]:
        row = dict(zip(content["columns"], values, strict=True))
        groups.setdefault((row["file"], row["kernel"], row["target"]), []).append(row)
    table = _table(
        ["kernel", "target", "compiled", "registers", "spilled (B)", "shared (B)", "atomics"],
        [
            [
                f"`{kernel}`",
                target,
                str(len(rows)),
                *(f"{max(row[name] for row in rows):,}" for name in ("registers", "spilled", "shared")),
                str(max(row["atomics"] for row in rows)),
            ]
            for (_, kernel, target), rows in sorted(groups.items())
        ],
    )
    machine = content["machine"]
    state = " with uncommitted changes" if machine["dirty"] else ""
    return [
        "## Compiled kernels",
        "Every configuration a launch can choose, compiled ahead of time for each target without a GPU: the "
        "most registers per thread, spilled bytes per thread, shared memory per block and atomics of any.",
        table,
        f"Triton {content['triton']}; commit {(machine['commit'] or 'none')[:7]}{state}; "
        f"`{path.relative_to(root).as_posix()}`.",
    ]


def _tuned_section(content: dict[str, Any], path: Path, root: Path) -> list[str]:
    """What `python -m benchmarks tune` found: the key of the table, the closed form's time, the winner's."""
    table = _table(
        ["kernel", "key", "launches timed", "closed form (µs)", "fastest (µs)", "in the table"],
        [
            [
                row["kernel"],
                " ".join(map(str, row["key"])),
                str(row["candidates"]),
                *(f"{1e6 * row[name]:.1f}" for name in ("closed_form_s", "seconds")),
                "yes" if row["worth_it"] else "no",
            ]
            for row in content["rows"]
        ],
    )
    explained = (
        "Launches by `python -m benchmarks tune`, by family of the device, bytes of an element, inner width, "
        "outer width, groups and rows in all. Replayed from CUDA graphs, in turns; medians."
    )
    refused = [f"- {row['kernel']}: {one['why']}" for row in content["rows"] for one in row["refused"]]
    wrong = ["Refused, because their results are not the closed form's:", "\n".join(refused)]
    return ["## Tuned launches", explained, table, *(wrong if refused else []), _origin(content, path, root)]


_FLOOR_OF_MODELS = (
    "FLOPs are those of all matrix products, every query times every key; bytes are those of weights, caches "
    "and, in training, of gradients and AdamW's two states; the floor is the larger of both over the "
    "measured speeds of a large product and a copy. In training the counter has one product of attention "
    "more, because backward makes the scores again. Errors are rms against transformers' eager path in "
    "float32, of the worst result; what bfloat16 changes in the choice of experts is part of them."
)
_FLOOR = (
    "The floor is the larger of useful FLOPs over the speed of a large product and the bytes that must move "
    "over the speed of a copy (`benchmarks/floor.py`); errors are rms against float64, of the worst result."
)


SECTIONS = {  # in the order of the page
    "experts_cpu": _ratio_section(
        "Experts on a CPU",
        "`expert_ffn` from the chosen experts on, planning included, against transformers' expert layers "
        "from the same choices, and against a dense layer of the same active FLOPs. Timed in turns; medians.",
    ),
    "end_to_end": _models_section,
    "train_step": _ratio_section(
        "A training step on a CPU",
        "Forward, backward and fused AdamW of SmolLM2-135M upcycled to 4 experts, 2 per token, in our model "
        "and in transformers' Mixtral of the same weights. Timed in turns; medians.",
    ),
    "expert_lora": _ratio_section(
        "LoRA of experts",
        "Low-rank adapters as grouped products, against PEFT's, which adds them to the weights in each "
        "forward. Timed in turns; medians.",
    ),
    "moe_layer": _ratio_section(
        "Mixture-of-Experts layer against dense",
        "Three layers that compute the same function: dense of equal active FLOPs, dense of one expert's "
        "width, and the mixture. Timed in turns; medians; ratios to the dense layer of equal active FLOPs.",
    ),
    "expert_ffn": _product_section(
        "Expert layer",
        "`expert_ffn` from the chosen experts on, planning included, against other expert layers from the "
        f"same choices. Timed in turns; medians. {_FLOOR}",
    ),
    "grouped_gemm": _product_section(
        "Products of the experts",
        "`grouped_gemm` on rows in expert order, the up-projection of gate and up together and the "
        f"down-projection. Timed in turns; medians. {_FLOOR}",
    ),
    "attention_mixture": _ratio_section(
        "Soft mixture of attention",
        "One attention call over the heads of all attention experts, against a loop over the experts that "
        "computes the same. Timed in turns; medians.",
    ),
    "attention_mix": _product_section(
        "Output projection of a mixture of attention",
        "`attention_mix` against gates times outputs and one product in PyTorch, and against a loop over the "
        f"experts. {_FLOOR}",
    ),
    "route": _moving_section(
        "Routing",
        "`route_topk` from float32 logits, which also gives the load and both auxiliary losses, against "
        "routers that give gates and experts only. Timed in turns; medians.",
    ),
    "plan": _moving_section(
        "Planning",
        "`make_plan`, which also gives the schedule of tiles, against a plan by sorting. Timed in "
        "turns; medians.",
    ),
    "permute": _moving_section(
        "Moving rows to expert order and back",
        "`gather_rows` and `scatter_rows` against `index_select`, its sum and `index_add`; planning and "
        "gathering together against sorting and `index_select`. bfloat16. Timed in turns; medians.",
    ),
    "combine": _moving_section(
        "Combining expert outputs",
        "Gate-weighted sum of each token's rows plus the residual, in one pass, against compositions in "
        "PyTorch. bfloat16. Timed in turns; medians.",
    ),
    "linear": _ratio_section(
        "Float32 products on the CPU",
        'The linear layer of the models after `torch.set_float32_matmul_precision("high")`, against '
        "`torch.nn.functional.linear`, which it is without. On AMD processors with AVX-512 it then goes "
        "through oneDNN, elsewhere it stays the same function. Timed in turns; medians.",
    ),
    "tune": _tuned_section,
    "packing": packing.section,
    "expert_load": expert_load.section,
    "memory": memory.section,
    "upcycling": upcycling.section,
    "ablation": _ablation_section,
    "flan": flan.section,
    "demo": _demo_section,
}
