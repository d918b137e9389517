"""The ablation's stages and its result file."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.ablation import methods
from benchmarks.ablation.methods import Spent, Workplace
from benchmarks.ablation.settings import TINY, AblationSettings
from benchmarks.ablation.summary import METHODS, conclude, raw_values, summarise
from benchmarks.result_file import write_result

# at the FLOPs of which methods the dense model is trained too
MATCHED = ("copy", "btx", "bam", "upit-routed-expanded")


def make_stages(settings: AblationSettings, folder: Path) -> list[Any]:
    """The base, then every method of every seed; each stage's result is kept."""
    from moe_runtime.demo.stages import Stage

    described = asdict(settings)
    stages = [
        Stage(
            name="base",
            title="Base: a model from scratch",
            work=lambda on_share: _base(settings, folder),
            settings=described,
            makes=(folder / "base", folder / "text"),
            cost=90.0,
        )
    ]
    for seed in settings.seeds:
        place = _workplace(settings, folder, seed)

        def add(name, title, work, inputs=(), makes=(), cost=20.0, prefix=f"seed{seed}-", seed=seed):
            needed = ("base", *(f"{prefix}{other}" for other in inputs))
            stages.append(
                Stage(
                    name=f"{prefix}{name}",
                    title=f"Seed {seed}: {title}",
                    work=lambda on_share: work(),
                    settings=described,
                    inputs=needed,
                    makes=makes,
                    cost=cost,
                )
            )

        folders = tuple(place.specialist(text) for text in place.texts)
        add("specialists", "specialists", partial(_specialists, place), makes=folders, cost=10.0)
        for name, title in METHODS.items():
            before = ("specialists",) if name in ("btx", "bam") else ()
            add(name, title, partial(_method, place, name), before)
        for name in MATCHED:
            title = f"dense at the FLOPs of {METHODS[name]}"
            add(f"dense-at-{name}", title, partial(_matched, place, name), ("dense", name), cost=30.0)
    return stages


def _workplace(settings: AblationSettings, folder: Path, seed: int) -> Workplace:
    from moe_runtime.demo.text import BUILT_IN

    texts = tuple(folder / "text" / f"{name}.txt" for name in BUILT_IN)
    return Workplace(settings, seed, folder / "base", texts, folder / f"seed{seed}")


def _base(settings: AblationSettings, folder: Path) -> dict[str, Any]:
    from benchmarks.ablation.text import domains, train_tokenizer, write_texts
    from moe_runtime.hf.loading import load_causal_lm

    texts = domains()
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    rows = write_texts(settings, tokenizer, folder / "text")
    methods.train_base(settings, tokenizer, rows.pop("base"), folder / "base")
    save_file(
        {name: part.contiguous() for name, part in rows.items()}, folder / "text" / "heldout.safetensors"
    )
    place = _workplace(settings, folder, settings.seeds[0])
    model = load_causal_lm(place.base, dtype=torch.float32)
    origins = {domain.name: f"{domain.title}, {domain.origin}, {domain.licence}" for domain in texts}
    samples = len(place.samples())
    return {**_evaluated(place, model, Spent()), "texts": origins, "samples": samples}


def _specialists(place: Workplace) -> dict[str, Any]:
    return _as_values(methods.specialists(place))


def _method(place: Workplace, name: str) -> dict[str, Any]:
    place.folder.mkdir(parents=True, exist_ok=True)
    match name.split("-"):
        case ["dense"]:
            model, spent = methods.dense(place)
        case ["copy"]:
            model, spent = methods.copy(place)
        case ["drop"]:
            model, spent = methods.drop(place)
        case ["btx" | "bam"]:
            before = _stored(place, "specialists")
            model, spent = methods.merged(place, name, Spent(before["tokens"], before["flops"]))
        case ["upit", router, experts]:
            model, spent = methods.upit(place, route=router == "routed", expand=experts == "expanded")
        case _:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return _evaluated(place, model, spent)


def _matched(place: Workplace, name: str) -> dict[str, Any]:
    more = _stored(place, name)["flops"] / _stored(place, "dense")["flops"]
    return _evaluated(place, *methods.dense(place, more))


def _stored(place: Workplace, name: str) -> dict[str, Any]:
    """The values of an earlier stage of the same seed."""
    path = place.folder.parent / "stages" / f"seed{place.seed}-{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["values"]


def _evaluated(place: Workplace, model: Any, spent: Spent) -> dict[str, Any]:
    from moe_runtime.demo.evaluate import evaluate

    heldout = load_file(place.folder.parent / "text" / "heldout.safetensors")
    found = evaluate(model, heldout)
    values = {
        "perplexity": found.perplexities,
        "mean_loss": sum(found.losses.values()) / len(found.losses),
        "expert_share": found.expert_share,
    }
    return values | _as_values(spent)


def _as_values(spent: Spent) -> dict[str, Any]:
    return {"tokens": spent.tokens, "flops": spent.flops, **spent.more}


def run(folder: Path, output: Path, *, tiny: bool) -> None:
    """Run what is not done yet and write the result file."""
    from rich.console import Console

    from moe_runtime.demo.stages import run_stages
    from moe_runtime.machine import describe_machine
    from moe_runtime.progress import StageProgress

    machine = describe_machine()  # before the run: a checkout may change meanwhile
    settings = TINY if tiny else AblationSettings()
    stages = make_stages(settings, folder)
    results = run_stages(stages, folder, StageProgress(Console(stderr=True)))
    values = {name: result.values for name, result in results.items()}
    content = {
        "suite": "ablation",
        "machine": machine,
        "settings": asdict(settings),
        "seconds": sum(result.seconds for result in results.values()),
        **raw_values(values, settings.seeds),
    }
    write_result(output, content)
    for sentence in conclude(summarise(content)):
        print(f"- {sentence}")
