"""First router weights that know the experts (stage 3 of UpIT; Hui et al. 2024).

A share of the data is split among the experts by perplexity. Then for expert i, with n^l the input of its
feed-forward in layer l and r^l a vector per layer, drawn small,

    h^l = n^l · r^l        L = α · L_lm + (1 - α) · mean BCE(sigmoid(h^l), 1)

is minimised on its samples, in r and, unless the experts are frozen, in its feed-forwards. Row i of layer l's
router is r^l.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from upcycle import names
from upcycle.checkpoint import read_json
from upcycle.upit.buckets import Buckets, assign_buckets
from upcycle.upit.data import Sample, draw_seed_set
from upcycle.upit.expert import Expert, open_expert, save_expert
from upcycle.upit.feed_forward import router_inputs
from upcycle.upit.files import HEADER_DTYPE, generator, write_json
from upcycle.upit.fit import Batch, Training, collate, fit
from upcycle.upit.models import ExpertInModel, language_loss, log_perplexities
from upcycle.upit.recipe import UpitRecipe

ROUTERS_NAME = "routers.safetensors"
_VECTORS_NAME = "vectors.safetensors"
_REPORT_NAME = "report.json"


class RoutingVectors(nn.Module):
    """One vector per layer, multiplied with the inputs of the model's feed-forwards while it runs."""

    def __init__(self, model: Any, modules: Sequence[str], vector_LD: Tensor) -> None:
        super().__init__()
        self.vector_LD = nn.Parameter(vector_LD)
        self.inputs: list[Tensor] = []
        self.hooks = [model.get_submodule(name).register_forward_pre_hook(self._keep) for name in modules]

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.inputs.append(inputs[0])

    def loss(self, mask_BL: Tensor, target: float) -> Tensor:
        """Mean binary cross-entropy of sigmoid(h) over layers and the tokens that are no padding."""
        h_TE = self.scores(mask_BL)
        return functional.binary_cross_entropy_with_logits(h_TE, torch.full_like(h_TE, target))

    def scores(self, mask_BL: Tensor) -> Tensor:
        """h of the last forward pass: a row per token that is no padding, a column per layer."""
        real = mask_BL.bool()
        columns = [
            n_BLD[real].float() @ vector_D
            for n_BLD, vector_D in zip(self.inputs, self.vector_LD, strict=True)
        ]
        self.inputs.clear()
        return torch.stack(columns, dim=-1)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def route(
    recipe: UpitRecipe,
    experts: Sequence[str | Path],
    model: Any,
    samples: Sequence[Sample],
    folder: Path,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the stage, going on where an earlier run stopped; writes routers.safetensors last.

    Args:
        experts: folders of the experts.
        model: the dense model with all tensors that are no feed-forward; its feed-forwards are overwritten.
        samples: all of the data.
        folder: of the stage. Of experts that are trained on, the new ones come below it.
        tell: called with a line for each expert that is done.

    Returns:
        What happened, for the report: bucket sizes and for each expert its losses and mean sigmoid(h).
    """
    settings = recipe.route
    places = draw_seed_set(
        len(samples), settings.seed_fraction, recipe.seed, len(experts), settings.min_per_expert
    )
    seed_set = [samples[place] for place in places]
    opened = [open_expert(path) for path in experts]
    folder.mkdir(parents=True, exist_ok=True)
    log_perplexity_ES = _perplexities(recipe, opened, model, seed_set, folder)
    buckets = assign_buckets(
        log_perplexity_ES, center=recipe.route.normalise == "center", quota=recipe.route.min_per_expert
    )
    tell(f"  samples per expert: {', '.join(map(str, buckets.sizes))} ({buckets.moved} moved)")
    reports = []
    for number, expert in enumerate(opened):
        of_expert = expert_folder(folder, number)
        if not (of_expert / _REPORT_NAME).is_file():
            _train_vectors(recipe, number, expert, model, seed_set, buckets, of_expert)
        report = read_json(of_expert / _REPORT_NAME)
        tell(
            f"  expert {number}: {report['samples']} samples, mean sigmoid {report['sigmoid_before']:.3f} -> "
            f"{report['sigmoid_after']:.3f}"
        )
        reports.append(report)
    vectors = [
        load_file(expert_folder(folder, number) / _VECTORS_NAME)["vectors"] for number in range(len(opened))
    ]
    vector_LED = np.stack(vectors, axis=1)
    write_routers(folder / ROUTERS_NAME, vector_LED)
    return {
        "seed_samples": len(seed_set),
        "mean_log_perplexity": log_perplexity_ES.mean(axis=1).tolist(),
        "chosen": list(buckets.chosen_E),
        "bucket_sizes": list(buckets.sizes),
        "moved": buckets.moved,
        "vector_cosine": mean_cosine(vector_LED),
        "experts": reports,
    }


def expert_folder(folder: Path, number: int) -> Path:
    return folder / f"expert-{number:02}"


def mean_cosine(vector_LED: NDArray) -> float:
    """Between the vectors of two experts, the mean over layers and pairs; at 1 all experts score alike."""
    unit_LED = vector_LED / np.linalg.norm(vector_LED, axis=2, keepdims=True)
    E = vector_LED.shape[1]
    cosine_LEE = unit_LED @ unit_LED.transpose(0, 2, 1)
    return float(cosine_LEE[:, ~np.eye(E, dtype=bool)].mean())


def write_routers(path: Path, vector_LED: NDArray) -> None:
    """The routers of all layers in the file that `router: {init: file}` reads."""
    rows = {
        f"{names.layer(layer)}.mlp.router": np.ascontiguousarray(of_layer)
        for layer, of_layer in enumerate(vector_LED)
    }
    unfinished = path.with_name(f".{path.name}.part")
    save_file(rows, unfinished)
    unfinished.replace(path)


def _perplexities(
    recipe: UpitRecipe, experts: Sequence[Expert], model: Any, seed_set: Sequence[Sample], folder: Path
) -> NDArray[np.float64]:
    """log-perplexity of every sample under every expert; experts that are done are read from the folder."""
    path = folder / "perplexities.json"
    done: list[list[float]] = read_json(path)["log_perplexity"] if path.is_file() else []
    for expert in experts[len(done) :]:
        with ExpertInModel(model, expert):
            bfloat16 = recipe.compute == "bfloat16"
            done.append(log_perplexities(model, seed_set, recipe.batch_size, recipe.device, bfloat16))
        write_json(path, {"log_perplexity": done})
    return np.array(done)


def _train_vectors(
    recipe: UpitRecipe,
    number: int,
    expert: Expert,
    model: Any,
    seed_set: Sequence[Sample],
    buckets: Buckets,
    folder: Path,
) -> None:
    """Train one expert's vectors and write them, the expert if it was trained too, and a report."""
    own = [sample for sample, bucket in zip(seed_set, buckets.bucket_S, strict=True) if bucket == number]
    others = [sample for sample, bucket in zip(seed_set, buckets.bucket_S, strict=True) if bucket != number]
    modules = router_inputs(expert)
    drawn = generator(recipe.seed, f"vectors {number}").standard_normal((len(modules), _width(model)))
    vector_LD = torch.from_numpy((drawn * recipe.route.std).astype(np.float32)).to(recipe.device)
    with ExpertInModel(model, expert) as parameters:
        vectors = RoutingVectors(model, modules, vector_LD)
        try:
            before = _mean_sigmoid(recipe, model, vectors, own)
            losses = _fit_vectors(recipe, number, model, vectors, parameters, own, others)
            after = _mean_sigmoid(recipe, model, vectors, own)
        finally:
            vectors.remove()
        folder.mkdir(parents=True, exist_ok=True)
        if not recipe.route.freeze_experts:
            kind = "delta" if expert.kind == "value" else expert.kind
            save_expert(folder, expert.base, kind, HEADER_DTYPE[recipe.prepare.dtype], parameters)
    save_file({"vectors": vectors.vector_LD.detach().cpu().numpy()}, folder / _VECTORS_NAME)
    report = {"samples": len(own), "losses": losses, "sigmoid_before": before, "sigmoid_after": after}
    write_json(folder / _REPORT_NAME, report)


def _fit_vectors(
    recipe: UpitRecipe,
    number: int,
    model: Any,
    vectors: RoutingVectors,
    parameters: dict[str, nn.Parameter],
    own: Sequence[Sample],
    others: Sequence[Sample],
) -> list[float]:
    settings = recipe.route
    training = Training(
        epochs=settings.epochs,
        batch_size=recipe.batch_size,
        warmup=recipe.warmup,
        seed=recipe.seed,
        label=f"route {number}",
        device=recipe.device,
        bfloat16=recipe.compute == "bfloat16",
    )

    def loss_of(batch: Batch, step: int) -> Tensor:
        with torch.set_grad_enabled(not settings.freeze_experts):
            language = language_loss(model, batch)
        routing = vectors.loss(batch.mask_BL, 1.0)
        if settings.negatives and others:
            count = len(batch.places)
            negative = _negative_loss(recipe, number, model, vectors, others, count, step)
            routing = 0.5 * (routing + negative)
        return settings.alpha * language + (1 - settings.alpha) * routing

    assert recipe.prepare.lr is not None
    groups: list[tuple[float, dict[str, nn.Parameter]]] = [(settings.lr, {"vectors": vectors.vector_LD})]
    if settings.freeze_experts:
        model.requires_grad_(False)
    else:
        groups.append((recipe.prepare.lr, parameters))
    model.train()
    return fit(loss_of, groups, own, training)


def _negative_loss(
    recipe: UpitRecipe,
    number: int,
    model: Any,
    vectors: RoutingVectors,
    others: Sequence[Sample],
    count: int,
    step: int,
) -> Tensor:
    """The routing loss with target 0 on samples of other experts; it trains the vectors only."""
    places = generator(recipe.seed, f"negatives {number} {step}").integers(len(others), size=count)
    batch = collate(others, places.tolist(), recipe.device)
    with torch.no_grad():
        language_loss(model, batch)
    return vectors.loss(batch.mask_BL, 0.0)


@torch.no_grad()
def _mean_sigmoid(
    recipe: UpitRecipe, model: Any, vectors: RoutingVectors, samples: Sequence[Sample]
) -> float:
    """Of sigmoid(h) over all layers and tokens."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(samples), recipe.batch_size):
        places = range(start, min(start + recipe.batch_size, len(samples)))
        batch = collate(samples, places, recipe.device)
        language_loss(model, batch)
        scores = vectors.scores(batch.mask_BL)
        total, count = total + scores.sigmoid().sum().item(), count + scores.numel()
    return total / count


def _width(model: Any) -> int:
    return model.get_input_embeddings().embedding_dim
