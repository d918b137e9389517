"""A training run from its recipe to a folder that `from_pretrained` loads."""

import math
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments

from moe_runtime.config import ModelConfig
from moe_runtime.errors import RunError
from moe_runtime.families import model_config
from moe_runtime.hf.loading import load_tokenizer
from moe_runtime.hf.quiet import quiet_transformers
from moe_runtime.profile.roof import measure_product
from moe_runtime.progress import StageProgress

from . import checkpoints
from .data.load import TrainData, load_train_data
from .figures import Yardstick, as_line
from .model import Prepared, prepare_model
from .output import TrainResult, finished, write_output
from .packages import check_packages
from .recipe import TrainRecipe
from .trainer import MoeTrainer

NEVER = 10**9  # steps
_roof = cache(measure_product)  # once per process, for several runs


def run_training(recipe: TrainRecipe, resume: bool = False, *, console: Console | None = None) -> TrainResult:
    """Train, or go on from the newest checkpoint, and write the model.

    Args:
        recipe: what to do.
        resume: go on with an output that exists; one that is finished is only read.
        console: where progress is shown; None: nowhere.

    Raises:
        RunError: the recipe, the model, its data or the disk does not allow the run, or a loss is not finite.
    """
    check_packages(recipe.train)
    parallel = _start(recipe)
    output = Path(recipe.output)
    checkpoint = _check_output(output, resume)
    if parallel is not None:
        torch.distributed.barrier()  # all have looked before one writes
    with quiet_transformers():
        prepared, data, steps = _load(recipe, checkpoint)
        stored = finished(output, steps) if checkpoint is not None else None
        if stored is not None:
            return stored
        if parallel is not None:
            parallel.prepare(prepared.model, recipe.parallel)
        trainer = _make_trainer(recipe, prepared, data, steps, parallel)
        if not trainer.is_world_process_zero():
            console = None
        if resume and checkpoint is None and console is not None:
            console.print(f"no checkpoint in {output} yet: begins anew", highlight=False, soft_wrap=True)
        return _train(trainer, recipe, checkpoint, prepared, data, console)


def plan_training(recipe: TrainRecipe, resume: bool = False) -> dict[str, Any]:
    """What a run would do, after all checks, loading model and data; nothing is written.

    Raises:
        RunError: as `run_training`.
    """
    check_packages(recipe.train)
    checkpoint = _check_output(Path(recipe.output), resume)
    with quiet_transformers():
        prepared, data, steps = _load(recipe, checkpoint)
    return {
        "model": recipe.model,
        "output": recipe.output,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "steps": steps,
        "rows_per_step": rows_per_step(recipe),
        "parameters": prepared.parameters,
        "data": data.summary,
    }


def rows_per_step(recipe: TrainRecipe) -> int:
    return recipe.train.batch_size * recipe.train.accumulate * _world_size()


def num_steps(recipe: TrainRecipe, data: TrainData) -> int:
    """Updates of the run; an epoch's last one may have fewer rows."""
    section = recipe.train
    if section.steps is not None:
        return section.steps
    if recipe.data.streaming:
        raise RunError("train.steps must be given with data.streaming, whose length is not known, got epochs")
    assert section.epochs is not None
    rows = len(data.dataset)  # type: ignore[arg-type]  # has a length: streams are refused above
    batches = math.ceil(math.ceil(rows / section.batch_size) / _world_size())
    steps = math.ceil(section.epochs * math.ceil(batches / section.accumulate))
    if section.restarts and section.restarts[-1] >= steps:
        raise RunError(
            f"train.restarts must lie below the {steps} steps of {section.epochs:g} epochs, got "
            f"{section.restarts[-1]}"
        )
    return steps


def _start(recipe: TrainRecipe) -> Any:
    """The module that spreads the run over processes, or None for one process."""
    if recipe.parallel.data == "none":
        if _world_size() > 1:
            raise RunError(
                f"parallel.data must be 'ddp' or 'fsdp' with {_world_size()} processes, got 'none'"
            )
        return None
    from . import parallel

    parallel.start(recipe.parallel)
    return parallel


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_output(output: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from."""
    if output.exists() and not output.is_dir():
        raise RunError(f"output must be a folder, and {output} is a file")
    if resume:
        newest = checkpoints.newest(output)
        others = output.is_dir() and any(path.name != checkpoints.FOLDER for path in output.iterdir())
        if newest is None and others:
            raise RunError(
                f"output must hold a run to go on with, got {output}, which has files but no checkpoint"
            )
        return newest
    if output.is_dir() and any(output.iterdir()):
        raise RunError(
            f"output must be a new or empty folder, got {output}, which has files; --resume goes "
            "on with its run"
        )
    return None


def _load(recipe: TrainRecipe, checkpoint: Path | None) -> tuple[Prepared, TrainData, int]:
    """The model, the data, and how many steps there are."""
    prepared = prepare_model(recipe, checkpoint)
    longest = getattr(prepared.model.config, "max_position_embeddings", None)
    data = load_train_data(recipe.data, load_tokenizer(recipe.model), recipe.seed, longest)
    steps = num_steps(recipe, data)
    if checkpoint is not None:
        checkpoints.check_same_run(checkpoint, recipe, steps, rows_per_step(recipe), data.summary)
    return prepared, data, steps


def _make_trainer(
    recipe: TrainRecipe, prepared: Prepared, data: TrainData, steps: int, parallel: Any
) -> MoeTrainer:
    section, output = recipe.train, Path(recipe.output)
    arguments = TrainingArguments(
        output_dir=str(output / checkpoints.FOLDER),
        max_steps=steps,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.batch_size,
        gradient_accumulation_steps=section.accumulate,
        learning_rate=section.learning_rate,
        max_grad_norm=section.max_grad_norm,
        optim=section.optimizer,
        bf16=section.precision == "bfloat16",
        logging_steps=section.log_every,
        logging_nan_inf_filter=False,  # such a loss stops the run
        save_strategy="steps",
        save_steps=section.save_every or NEVER,
        eval_strategy="steps" if section.eval_every and data.eval else "no",
        eval_steps=section.eval_every,
        report_to=list(section.report_to) or "none",
        seed=recipe.seed,
        data_seed=recipe.seed,
        remove_unused_columns=False,  # "sample" is read by the trainer
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = MoeTrainer(
        recipe=recipe,
        output=output,
        about_data=data.summary,
        yardstick=_yardstick(recipe, prepared.model),
        parallel=parallel,
        model=prepared.model,
        args=arguments,
        train_dataset=data.dataset,
        eval_dataset=data.eval,
        data_collator=data.collator,
    )
    return trainer


def _yardstick(recipe: TrainRecipe, model: Any) -> Yardstick:
    try:
        config: ModelConfig | None = model_config(model.config.to_dict())
    except ValueError:  # a family whose sizes are not known
        return Yardstick(None, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    roof = _roof(device, getattr(torch, recipe.train.precision))
    return Yardstick(config, roof * _world_size())


def _train(
    trainer: MoeTrainer,
    recipe: TrainRecipe,
    checkpoint: Path | None,
    prepared: Prepared,
    data: TrainData,
    console: Console | None,
) -> TrainResult:
    output = Path(recipe.output)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    _tell_left_out(data.summary, console)
    progress = StageProgress(console or Console(quiet=True))
    progress.expect([1.0])
    with progress.stage("training", 1.0) as on_share:
        trainer.add_callback(_Shown(console, on_share))
        trainer.started = time.perf_counter()
        # of a finished run Trainer would do one more step
        if trainer.state.global_step < trainer.args.max_steps:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = trainer.seconds()
    state = trainer.state
    metrics = _metrics_at(state.global_step, state.log_history)
    if data.eval and not metrics:
        metrics = trainer.evaluate()
    result = TrainResult(
        output=str(output),
        steps=state.global_step,
        log=state.log_history,
        metrics=metrics,
        tokens=state.num_input_tokens_seen,
        flops=int(state.total_flos),
        seconds=seconds,
    )
    read = data.read()
    _tell_left_out(read, console)
    write_output(trainer, prepared, data.summary | ({"read": read} if read else {}), result)
    return result


def _tell_left_out(tally: dict[str, Any], console: Console | None) -> None:
    """Say what was cut, dropped or left out, if anything was; a stream is told of after it was read."""
    left_out = {name: tally[name] for name in ("cut", "dropped", "nothing_counts") if tally.get(name)}
    if left_out and console is not None:
        words = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in left_out.items())
        console.print(f"samples read {tally['samples']:,}, {words}", highlight=False, soft_wrap=True)


def _metrics_at(step: int, log: list[dict[str, Any]]) -> dict[str, float]:
    """What was evaluated after a step, if anything was."""
    of_step = (entry.items() for entry in log if entry["step"] == step)
    return {name: value for items in of_step for name, value in items if name.startswith("eval_")}


class _Shown(TrainerCallback):
    """Shows how far the run is, and its log entries."""

    def __init__(self, console: Console | None, on_share: Any) -> None:
        self.console, self.on_share = console, on_share

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_share(state.global_step / max(1, state.max_steps))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.console is not None and logs and "lm_loss" in logs:
            line = as_line(logs, state.global_step, state.max_steps)
            self.console.print(line, highlight=False, soft_wrap=True)
