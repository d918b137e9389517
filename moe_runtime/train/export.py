"""The model of any checkpoint of a training run as a folder that `from_pretrained` loads."""

import shutil
from pathlib import Path

from moe_runtime.errors import RunError
from moe_runtime.hf.quiet import quiet_transformers

from . import checkpoints
from .model import prepare_model
from .output import fill
from .recipe import recipe_from_dict
from .trainer import SHARDS_NAME


def export_checkpoint(checkpoint: str | Path, output: str | Path) -> None:
    """Write the model, its tokenizer, and adapters merged and apart, in one process.

    Args:
        checkpoint: a `checkpoint-…` folder of a run; the model that the run began with must still be there.
        output: a folder that does not exist yet.

    Raises:
        RunError: the output exists or cannot be written, or the folder is no checkpoint of a run.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if output.exists():
        raise RunError(f"output must be a new folder, and {output} exists")
    recipe = recipe_from_dict(checkpoints.read_run(checkpoint)["recipe"], where=str(checkpoint))
    shards = checkpoint / SHARDS_NAME
    with quiet_transformers():
        if shards.is_dir():
            from moe_runtime.distributed.checkpoint import load_model

            model = prepare_model(recipe).model
            load_model(shards, model)
        else:
            model = prepare_model(recipe, checkpoint).model
        unfinished = output.with_name(f".{output.name}.incomplete")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            fill(unfinished, recipe, model)
            unfinished.rename(output)
        except Exception as error:  # of the disk by many names, as for checkpoints
            raise RunError(f"{output} could not be written ({' '.join(str(error).split())})") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
