"""The demonstration's stages: branch, train specialists, upcycle, tune, evaluate, time, continue texts."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from upcycle import Recipe, upcycle, verify
from upcycle.recipe import Method, RouterRecipe

from ..families import model_config
from ..flops import model_cost
from ..generate import generate_text, measure_latency
from .evaluate import evaluate
from .router_start import start_routers
from .settings import DemoSettings
from .stages import Stage
from .text import Domain, DomainRows, cut_rows, interleave
from .train import TrainSettings, train

OnShare = Callable[[float], None]
MIXTURES = ("btx", "bam")

# Rough seconds of one token on two cores; they shape the time left, nothing else.
TRAIN_SECONDS, EVALUATE_SECONDS, MIXTURE_FACTOR = 1 / 240, 1 / 850, 1.8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run works on: the dense source, the rows of each domain, and where files go."""

    source: Path
    folder: Path
    domains: tuple[Domain, ...]
    rows: Mapping[str, DomainRows]
    settings: DemoSettings

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains)

    @property
    def specialists(self) -> tuple[str, ...]:
        return tuple(f"specialist-{name}" for name in self.names)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is evaluated, in the order of the report."""
        mixtures = [name for mixture in MIXTURES for name in (f"{mixture}-untuned", mixture)]
        return ("dense", *self.specialists, "average", "dense-tuned", "copy", "copy-tuned", *mixtures)

    def model_folder(self, name: str) -> Path:
        return self.source if name == "dense" else self.folder / "models" / name

    def text_fingerprints(self) -> dict[str, str]:
        return {domain.name: domain.fingerprint for domain in self.domains}


def make_plan(
    source: Path, folder: Path, domains: Sequence[Domain], settings: DemoSettings, tokenizer: Any
) -> Plan:
    """Cut the rows of every domain.

    Raises:
        ValueError: a domain has too little text, or two share a name.
    """
    names = [domain.name for domain in domains]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--text {name}: two texts have this name; give each its own")
    rows = {
        domain.name: cut_rows(
            domain,
            tokenizer,
            length=settings.row_length,
            train=settings.specialist_rows,
            tune=settings.tune_rows,
            heldout=settings.heldout_rows,
            seed=settings.seed,
        )
        for domain in domains
    }
    return Plan(source=source, folder=folder, domains=tuple(domains), rows=rows, settings=settings)


def make_stages(plan: Plan) -> list[Stage]:
    """Every stage in its order; later ones name the earlier ones that they read."""
    return [
        _source_stage(plan),
        *(_specialist_stage(plan, name) for name in plan.names),
        _dense_stage(plan),
        _upcycle_stage(plan, "copy"),
        *(_upcycle_stage(plan, f"{mixture}-untuned") for mixture in MIXTURES),
        _tune_stage(plan, "copy-tuned", start="copy"),
        *(_tune_stage(plan, mixture, start=f"{mixture}-untuned") for mixture in MIXTURES),
        *(_evaluate_stage(plan, name) for name in plan.models),
        _cost_stage(plan),
        _latency_stage(plan),
        _continuation_stage(plan),
    ]


# --- training ---


def _source_stage(plan: Plan) -> Stage:
    """Only a fingerprint: whatever is made from the source is made again when its weights change."""
    files = {path.name: path.stat().st_size for path in sorted(plan.source.iterdir()) if path.is_file()}
    return Stage(
        name="source",
        title="read the dense source",
        settings={"files": files, "texts": plan.text_fingerprints(), "seed": plan.settings.seed},
        work=lambda on_share: {"folder": str(plan.source)},
        cost=0.1,
    )


def _specialist_stage(plan: Plan, name: str) -> Stage:
    rows_NL = plan.rows[name].train_NL
    return _train_stage(
        plan,
        f"specialist-{name}",
        title=f"train the specialist for {name}",
        start="dense",
        settings=plan.settings.specialist,
        rows_NL=rows_NL,
    )


def _dense_stage(plan: Plan) -> Stage:
    return _train_stage(
        plan,
        "dense-tuned",
        title="train the dense source on the same tokens",
        start="dense",
        settings=plan.settings.dense,
        rows_NL=interleave(
            [part for rows in plan.rows.values() for part in (rows.train_NL, rows.tune_NL)],
            seed=plan.settings.seed,
        ),
    )


def _tune_stage(plan: Plan, mixture: str, *, start: str) -> Stage:
    settings = plan.settings
    first_rows = {name: rows.tune_NL[: settings.router_start_rows] for name, rows in plan.rows.items()}
    return _train_stage(
        plan,
        mixture,
        title=f"tune {mixture}",
        start=start,
        settings=settings.mixture,
        rows_NL=interleave([rows.tune_NL for rows in plan.rows.values()], seed=settings.seed),
        prepare=lambda model: start_routers(model, first_rows, settings.router_sharpness),
        extra_settings=[settings.router_start_rows, settings.router_sharpness],
    )


def _train_stage(
    plan: Plan,
    name: str,
    *,
    title: str,
    start: str,
    settings: TrainSettings,
    rows_NL: Tensor,
    prepare: Callable[[Any], None] = lambda model: None,
    extra_settings: Any = None,  # of `prepare`
) -> Stage:
    """Train the model `start` on rows and write it as `name`; `prepare` changes it first."""
    output = plan.model_folder(name)
    num_steps = -(-len(rows_NL) // settings.rows_per_step)

    def work(on_share: OnShare) -> dict[str, Any]:
        from ..hf.loading import load_causal_lm, load_tokenizer

        model = load_causal_lm(plan.model_folder(start), dtype=torch.float32)
        prepare(model)
        log = train(model, rows_NL, settings, on_step=lambda step, loss: on_share(step / num_steps))
        model.to(torch.bfloat16).save_pretrained(output)
        load_tokenizer(plan.source).save_pretrained(output)
        return asdict(log)

    factor = MIXTURE_FACTOR if _is_mixture(name) else 1.0
    return Stage(
        name=f"train-{name}",
        title=title,
        settings={"train": asdict(settings), "rows": list(rows_NL.shape), "extra": extra_settings},
        inputs=("source",) if start == "dense" else ("source", f"upcycle-{start}"),
        makes=(output,),
        work=work,
        cost=rows_NL.numel() * TRAIN_SECONDS * factor,
    )


# --- upcycling ---


def recipe_for(plan: Plan, name: str) -> Recipe:
    """copy: as many copies of the dense source as there are domains; btx and bam: one expert per specialist.

    The papers add the source itself as one more expert, which keeps what the domains do not hold. No such
    text is measured here, and the source's weights would dilute what specialists learned from little text.
    Both mixtures take two feed-forward experts per token with gates that sum to 1, so that they differ in
    attention only. BAM's paper takes one with its raw gate, which starts the layer at a fraction of its
    output and needs more training than a demonstration has.
    """
    output = str(plan.model_folder(name))
    source = str(plan.source)
    if name == "copy":
        return Recipe(method="copy", base=source, experts=len(plan.names), output=output)
    sources = tuple(str(plan.model_folder(specialist)) for specialist in plan.specialists)
    # no balance loss: each batch holds all domains alike, and a domain shall have its own expert
    router = RouterRecipe(gate="renorm", aux_loss_coef=0.0, z_loss_coef=0.0)
    method: Method = "btx" if name == "btx-untuned" else "bam"
    return Recipe(method=method, sources=sources, output=output, experts_per_token=2, router=router)


def _upcycle_stage(plan: Plan, name: str) -> Stage:
    recipe = recipe_for(plan, name)
    file = plan.folder / "recipes" / f"{name}.yaml"

    def work(on_share: OnShare) -> dict[str, Any]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
        made = upcycle(file)
        values = {"recipe": str(file), "upcycle": made.to_dict()}
        if name == "copy":  # the only one that computes the dense function before it is trained
            on_share(0.4)
            values["verify"] = verify(made.output).to_dict()
        return values

    of_specialists = tuple(f"train-{specialist}" for specialist in plan.specialists)
    return Stage(
        name=f"upcycle-{name}",
        title=f"upcycle: {name}",
        settings=recipe.to_dict(),
        inputs=("source",) if name == "copy" else ("source", *of_specialists),
        makes=(plan.model_folder(name),),
        work=work,
        cost=6.0,
    )


# --- measuring ---


def _is_mixture(name: str) -> bool:
    return name.startswith(("copy", *MIXTURES))


def _input_of(plan: Plan, name: str) -> tuple[str, ...]:
    """The stages that made a model."""
    if name == "dense":
        return ("source",)
    if name == "average":
        return ("source", *(f"train-{specialist}" for specialist in plan.specialists))
    upcycled = name == "copy" or name.endswith("-untuned")
    return ("source", f"upcycle-{name}" if upcycled else f"train-{name}")


def _evaluate_stage(plan: Plan, name: str) -> Stage:
    heldout = {domain: rows.heldout_NL for domain, rows in plan.rows.items()}
    num_tokens = sum(rows_NL.numel() for rows_NL in heldout.values())

    def work(on_share: OnShare) -> dict[str, Any]:
        from ..hf.loading import load_causal_lm

        if name == "average":
            model = average_model([plan.model_folder(specialist) for specialist in plan.specialists])
        else:
            model = load_causal_lm(plan.model_folder(name), dtype=torch.float32)
        values = asdict(evaluate(model, heldout, on_share=on_share))
        del model
        gc.collect()
        return values

    return Stage(
        name=f"evaluate-{name}",
        title=f"evaluate {name}",
        settings={"heldout": plan.settings.heldout_rows, "length": plan.settings.row_length},
        inputs=_input_of(plan, name),
        work=work,
        cost=num_tokens * EVALUATE_SECONDS * (MIXTURE_FACTOR if _is_mixture(name) else 1.0),
    )


def average_model(folders: Sequence[Path]) -> Any:
    """The plain average of the weights of dense models, in float32."""
    from ..hf.loading import load_causal_lm

    model = load_causal_lm(folders[0], dtype=torch.float32)
    others = [load_causal_lm(folder, dtype=torch.float32) for folder in folders[1:]]
    with torch.no_grad():
        for parameter, *rest in zip(
            model.parameters(), *(other.parameters() for other in others), strict=True
        ):
            for value in rest:
                parameter += value
            parameter /= len(folders)
    return model


def _cost_stage(plan: Plan) -> Stage:
    shown = ("dense", "copy", *MIXTURES)

    def work(on_share: OnShare) -> dict[str, Any]:
        costs = {}
        for name in shown:
            values = json.loads((plan.model_folder(name) / "config.json").read_text(encoding="utf-8"))
            costs[name] = asdict(model_cost(model_config(values), plan.settings.row_length))
        return costs

    return Stage(
        name="cost",
        title="count parameters and FLOPs",
        settings={"context": plan.settings.row_length},
        inputs=tuple(dict.fromkeys(stage for name in shown for stage in _input_of(plan, name))),
        work=work,
        cost=0.1,
    )


def _latency_stage(plan: Plan) -> Stage:
    settings = plan.settings
    shown = ("dense", *MIXTURES)
    # once in each order, so that a machine that warms up or slows down favours none
    order = (*shown, *reversed(shown))

    def work(on_share: OnShare) -> dict[str, Any]:
        from ..hf.loading import load_causal_lm

        models = {name: load_causal_lm(plan.model_folder(name)) for name in shown}
        reports: dict[str, list[dict[str, Any]]] = {name: [] for name in shown}
        for done, name in enumerate(order, start=1):
            report = measure_latency(
                models[name], settings.latency_prompt, settings.latency_new_tokens, settings.latency_repeats
            )
            reports[name].append(asdict(report))
            on_share(done / len(order))
        return reports

    return Stage(
        name="latency",
        title="time prefill and decoding",
        settings=[settings.latency_prompt, settings.latency_new_tokens, settings.latency_repeats],
        inputs=tuple(dict.fromkeys(stage for name in shown for stage in _input_of(plan, name))),
        work=work,
        cost=25.0,
    )


def _continuation_stage(plan: Plan) -> Stage:
    shown = ("dense", *MIXTURES)

    def work(on_share: OnShare) -> dict[str, Any]:
        from ..hf.loading import load_causal_lm, load_tokenizer

        tokenizer = load_tokenizer(plan.source)
        texts: dict[str, dict[str, str]] = {name: {} for name in plan.names}
        for done, model_name in enumerate(shown):
            model = load_causal_lm(plan.model_folder(model_name))
            for number, name in enumerate(plan.names, start=1):
                generation = generate_text(
                    model, tokenizer, plan.rows[name].prompt, max_new_tokens=plan.settings.new_tokens
                )
                texts[name][model_name] = generation.text
                on_share((done + number / len(plan.names)) / len(shown))
        return texts

    return Stage(
        name="continuations",
        title="continue held-out text",
        settings={"new_tokens": plan.settings.new_tokens},
        inputs=tuple(dict.fromkeys(stage for name in shown for stage in _input_of(plan, name))),
        work=work,
        cost=20.0,
    )
