"""The folder that a finished run leaves: a model that `from_pretrained` loads, and the record of the run."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moe_runtime.errors import RunError
from moe_runtime.hf.loading import json_object, load_tokenizer
from moe_runtime.hf.lora import merge_expert_lora, save_expert_lora
from moe_runtime.machine import describe_machine

from . import checkpoints
from .card import model_card
from .model import Prepared, prepare_model, save_whole
from .recipe import MoeSection, TrainRecipe
from .trainer import MoeTrainer

RECORD_NAME = "training.json"  # written last: its presence says that the output is whole
ADAPTER_NAME = "adapter"


@dataclass(frozen=True)
class TrainResult:
    """What a finished run did; also in training.json of its output.

    `log` has one entry per `log_every` steps, `metrics` what was evaluated at the end, `flops` is by formula
    (0 for a family without one). `seconds` are those of training, over all calls that the run took.
    """

    output: str
    steps: int
    log: list[dict[str, Any]]
    metrics: dict[str, float]
    tokens: int
    flops: int
    seconds: float

    def values(self, name: str) -> list[float]:
        """One figure of the log, such as "lm_loss", at all steps that have it."""
        return [entry[name] for entry in self.log if name in entry]


def finished(output: Path, steps: int) -> TrainResult | None:
    """The result of a run of so many steps whose output is whole."""
    if not (output / RECORD_NAME).is_file():
        return None
    result = TrainResult(**json_object(output / RECORD_NAME)["result"])
    return result if result.steps == steps else None


def write_output(trainer: MoeTrainer, prepared: Prepared, about_data: Any, result: TrainResult) -> None:
    """Write the model, its tokenizer and adapters, the card, and last the record. Adapters are merged.

    Raises:
        RunError: they could not be written; the last checkpoint is still there.
    """
    output, model = trainer.output, prepared.model
    state = None if trainer.parallel is None else trainer.parallel.whole_state_dict(model)
    if trainer.is_world_process_zero():
        unfinished = output / checkpoints.FOLDER / checkpoints.UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            if state is not None:
                model = prepare_model(trainer.recipe).model
                load_whole(model, state)
            fill(unfinished, trainer.recipe, model)
            _put_in_place(unfinished, output)
            record = _record(trainer, prepared, about_data, result)
            (output / "README.md").write_text(model_card(trainer.recipe, record), encoding="utf-8")
            checkpoints.write_json(output / RECORD_NAME, record)
        except Exception as error:
            text = " ".join(str(error).split())
            raise RunError(
                f"the trained model could not be written to {output} ({text}); its last checkpoint, "
                f"{checkpoints.newest(output)}, is whole, and --resume writes the model again"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load every tensor; a tied one may be there under one of its names only.

    Raises:
        RunError: naming a tensor that is missing, or that the model has not.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    own = model.state_dict()
    loaded = {own[name].data_ptr() for name in state.keys() & own.keys()}
    lost = [name for name in missing if own[name].data_ptr() not in loaded]
    if lost or unexpected:
        raise RunError(f"state must hold the tensors of the model, and differs in {(lost + unexpected)[0]}")


def fill(folder: Path, recipe: TrainRecipe, model: Any) -> None:
    """Write a trained model and its tokenizer into a new folder. Adapters are written apart and merged."""
    folder.mkdir(parents=True)
    if recipe.train.lora is not None:
        save_expert_lora(model, folder / ADAPTER_NAME)
        merge_expert_lora(model)
    save_whole(model, folder, recipe.moe or MoeSection())
    load_tokenizer(recipe.model).save_pretrained(folder)


def _put_in_place(folder: Path, output: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            place = output / path.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            path.replace(place)


def _record(trainer: MoeTrainer, prepared: Prepared, about_data: Any, result: TrainResult) -> dict[str, Any]:
    load_LE = trainer.last_load_LE
    return {
        "recipe": trainer.recipe.to_dict(),
        "model_type": prepared.model.config.model_type,
        "result": asdict(result),
        "data": about_data,
        "parameters": prepared.parameters,
        "load": None if load_LE is None else load_LE.tolist(),
        "logits": prepared.linear_loss or "not made in training",
        "machine": describe_machine(),
    }
