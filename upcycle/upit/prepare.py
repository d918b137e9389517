"""Fine-tune the base and record its feed-forwards on the way (stage 1 of UpIT)."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from moe_runtime.train.data.samples import Sample
from upcycle.upit.feed_forward import feed_forward_tensors
from upcycle.upit.fit import Training, fit, last_state
from upcycle.upit.low_rank import LowRankModel
from upcycle.upit.models import language_loss, load_dense, new_factors
from upcycle.upit.recipe import UpitRecipe
from upcycle.upit.record import Recorder, Recording


def training_of(recipe: UpitRecipe) -> Training:
    return Training(
        epochs=recipe.prepare.epochs,
        every=recipe.prepare.every,
        batch_size=recipe.batch_size,
        warmup=recipe.warmup,
        seed=recipe.seed,
        label="prepare",
        device=recipe.device,
        bfloat16=recipe.compute == "bfloat16",
    )


def prepare(
    recipe: UpitRecipe,
    samples: Sequence[Sample],
    folder: Path,
    at_point: Callable[[int, float, float], None] = lambda step, epoch, loss: None,
) -> Recording:
    """Run the stage, going on after the last checkpoint that an earlier run recorded.

    Args:
        samples: of one epoch.
        folder: of the recording, and below it the state of the training.
        at_point: called with step, epochs done and mean loss after each checkpoint.
    """
    model = load_dense(recipe.base, recipe.device)
    settings = recipe.prepare
    kind: Any = settings.store if recipe.paradigm == "full" else "lora"
    recorder = Recorder(folder, recipe.base, every=settings.every, kind=kind, dtype=settings.dtype)
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    if recipe.paradigm == "lora":
        layers = feed_forward_tensors(recorder.base)
        factors = new_factors(model, layers, settings.rank, recipe.seed)
        parameters = LowRankModel(model, factors, settings.alpha / settings.rank).parameters()
    recorder.start(model)

    def record(step: int, epoch: float, loss: float) -> None:
        recorder.record(model, step=step, epoch=epoch, loss=loss)
        at_point(step, epoch, loss)

    assert settings.lr is not None
    training = training_of(recipe)
    states = folder / "state"
    if recorder.recording.last_step == max(training.points(len(samples))):
        return recorder.recording
    if last_state(states) > recorder.recording.last_step:  # of a recording that was removed
        shutil.rmtree(states)
    model.train()
    fit(
        lambda batch, step: language_loss(model, batch),
        [(settings.lr, parameters)],
        samples,
        training,
        states=states,
        at_point=record,
    )
    shutil.rmtree(states, ignore_errors=True)
    return recorder.recording
