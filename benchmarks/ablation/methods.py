"""Each method of the ablation: from the base's folder to a trained model, with its tokens and FLOPs."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.ablation.settings import AblationSettings
from moe_runtime.config import ModelConfig
from moe_runtime.families import model_config
from moe_runtime.flops import model_flops, training_flops
from moe_runtime.hf.loading import load_causal_lm, load_tokenizer
from upcycle import Recipe, upcycle
from upcycle.method_sections import DropRecipe
from upcycle.recipe import RouterRecipe
from upcycle.upit.data import Sample, load_data
from upcycle.upit.fit import Training, fit
from upcycle.upit.models import language_loss
from upcycle.upit.pipeline import run_upit
from upcycle.upit.recipe import ExpandRecipe, PostTrainRecipe, PrepareRecipe, RouteRecipe, UpitRecipe


@dataclass
class Spent:
    """What a method's training took, and what else is to be told of it."""

    tokens: int = 0
    flops: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    def train(self, config: ModelConfig, tokens: int, length: int) -> None:
        self.tokens += tokens
        self.flops += tokens * training_flops(config, length)


@dataclass(frozen=True)
class Workplace:
    """Folders and samples of one seed."""

    settings: AblationSettings
    seed: int
    base: Path
    texts: tuple[Path, ...]
    folder: Path

    def specialist(self, text: Path) -> Path:
        """Folder of the model that is trained on one text."""
        return self.folder / f"specialist-{text.stem}"

    def samples(self, texts: Sequence[Path] | None = None) -> tuple[Sample, ...]:
        tokenizer = load_tokenizer(self.base)
        length = self.settings.length
        samples = load_data(self.texts if texts is None else texts, tokenizer, length).samples
        return tuple(sample for sample in samples if len(sample.ids_L) == length)


def config_of(folder: Path) -> ModelConfig:
    return model_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def train_base(settings: AblationSettings, tokenizer: Any, rows_NL: Tensor, folder: Path) -> None:
    """A Llama from scratch, one epoch."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=None,
        **settings.model,
    )
    model = LlamaForCausalLM(config)
    samples = [Sample(row.numpy(), row.numpy()) for row in rows_NL]
    _train(model, samples, settings, (1.0,), settings.base_lr, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(
    model: Any,
    samples: Sequence[Sample],
    settings: AblationSettings,
    rounds: Sequence[float],
    lr: float,
    seed: int,
) -> int:
    """Train all parameters in place; returns the tokens seen. One seed gives every method the same order.

    Args:
        rounds: epochs of each round, which begins with a warm-up and ends at a rate of zero.
    """
    steps = 0
    model.train()
    for number, epochs in enumerate(rounds):
        training = Training(
            epochs=epochs,
            batch_size=settings.batch_size,
            warmup=settings.warmup,
            seed=seed,
            label=f"ablation, round {number}",
        )
        parameters = [(lr, dict(model.named_parameters()))]
        fit(lambda batch, step: language_loss(model, batch), parameters, samples, training)
        steps += training.num_steps(len(samples))
    model.eval()
    return steps * settings.batch_size * settings.length


def dense(place: Workplace, more: float = 1.0) -> tuple[Any, Spent]:
    """Continued training of the base, `more` times as long as the mixtures are trained."""
    settings, spent = place.settings, Spent()
    rounds = [more * epochs for epochs in settings.rounds]
    model = load_causal_lm(place.base, dtype=torch.float32)
    tokens = _train(model, place.samples(), settings, rounds, settings.lr, place.seed)
    spent.train(config_of(place.base), tokens, settings.length)
    return model, spent


def _upcycled(place: Workplace, name: str, **recipe: Any) -> Path:
    folder = place.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    upcycle(Recipe(output=str(folder), router=RouterRecipe(seed=place.seed), **recipe))
    return folder


def _tuned(place: Workplace, folder: Path, rounds: Sequence[float], spent: Spent) -> tuple[Any, Spent]:
    settings = place.settings
    model = load_causal_lm(folder, dtype=torch.float32)
    tokens = _train(model, place.samples(), settings, rounds, settings.lr, place.seed)
    spent.train(config_of(folder), tokens, settings.length)
    return model, spent


def copy(place: Workplace) -> tuple[Any, Spent]:
    settings = place.settings
    folder = _upcycled(place, "copy", method="copy", base=str(place.base), experts=settings.experts)
    return _tuned(place, folder, settings.rounds, Spent())


def drop(place: Workplace) -> tuple[Any, Spent]:
    settings = place.settings
    section = DropRecipe(ratio=settings.drop_ratio, seed=place.seed)
    folder = _upcycled(
        place, "drop", method="drop", base=str(place.base), experts=settings.experts, drop=section
    )
    return _tuned(place, folder, settings.rounds, Spent())


def specialists(place: Workplace) -> Spent:
    """A model per domain, for BTX and BAM."""
    settings, spent = place.settings, Spent()
    for text in place.texts:
        model = load_causal_lm(place.base, dtype=torch.float32)
        samples = place.samples([text])
        tokens = _train(model, samples, settings, settings.rounds[:1], settings.lr, place.seed)
        spent.train(config_of(place.base), tokens, settings.length)
        folder = place.specialist(text)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        load_tokenizer(place.base).save_pretrained(folder)
    return spent


def merged(place: Workplace, method: str, spent: Spent) -> tuple[Any, Spent]:
    """BTX or BAM of the specialists, whose cost is `spent`."""
    sources = tuple(str(place.specialist(text)) for text in place.texts)
    folder = _upcycled(place, method, method=method, sources=sources)
    return _tuned(place, folder, place.settings.rounds[1:], spent)


def upit(place: Workplace, *, route: bool, expand: bool) -> tuple[Any, Spent]:
    """UpIT with routers trained or drawn, and experts expanded from half as many checkpoints or recorded."""
    settings, seed = place.settings, place.seed
    name = f"upit-{'routed' if route else 'drawn'}-{'expanded' if expand else 'recorded'}"
    output, work = place.folder / name, place.folder / f"{name}.work"
    for folder in (output, work):
        shutil.rmtree(folder, ignore_errors=True)
    checkpoints = settings.experts // 2 if expand else settings.experts
    recipe = UpitRecipe(
        base=str(place.base),
        data=tuple(map(str, place.texts)),
        output=str(output),
        work=str(work),
        experts=settings.experts,
        max_length=settings.length,
        batch_size=settings.batch_size,
        warmup=settings.warmup,
        seed=seed,
        prepare=PrepareRecipe(
            epochs=settings.expert_epochs, every=settings.expert_epochs / checkpoints, lr=settings.lr
        ),
        expand=ExpandRecipe(),
        route=RouteRecipe(
            init="trained" if route else "normal",
            seed_fraction=settings.seed_fraction,
            epochs=settings.route_epochs,
        ),
        post_train=PostTrainRecipe(epochs=settings.mixture_epochs, lr=settings.lr),
    )
    results = run_upit(recipe)
    return load_causal_lm(output, dtype=torch.float32), _spent_by_upit(place, recipe, results)


def _spent_by_upit(place: Workplace, recipe: UpitRecipe, results: dict[str, Any]) -> Spent:
    settings, spent = place.settings, Spent()
    dense_model, mixture = config_of(place.base), config_of(Path(recipe.output))
    count = results["prepare"]["samples"]
    length = settings.length
    spent.train(dense_model, round(count * settings.expert_epochs) * length, length)
    cosine = results["expand"]["cosine"]
    pairs = [cosine[i][j] for i in range(len(cosine)) for j in range(i)]
    spent.more["expert_cosine"] = sum(pairs) / len(pairs)
    if "route" in results:
        sizes = results["route"]["bucket_sizes"]
        spent.more["bucket_sizes"] = sizes
        seeds = round(count * settings.seed_fraction)
        spent.train(dense_model, sum(sizes) * settings.route_epochs * length, length)
        # every expert reads every seed sample once, forward
        spent.flops += settings.experts * seeds * length * model_flops(dense_model, length).total()
    spent.train(mixture, round(count * settings.mixture_epochs) * length, length)
    return spent
