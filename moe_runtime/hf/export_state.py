"""A checkpoint of several processes as a plain model folder, in one process."""

import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from moe_runtime.distributed.checkpoint import load_model
from moe_runtime.errors import RunError
from moe_runtime.hf.loading import load_causal_lm, load_tokenizer


def export_state(checkpoint: str | Path, base: str | Path, output: str | Path) -> None:
    """Write the model of a checkpoint as safetensors, with the configuration and tokenizer of `base`.

    Args:
        checkpoint: a folder that `save_state` or `save_checkpoint` wrote.
        base: the folder of the model that was trained.
        output: a folder that does not exist yet.

    Raises:
        RunError: the output exists, or the checkpoint is of another model than `base`.
    """
    output = Path(output)
    if output.exists():
        raise RunError(f"{output} must not exist yet, and it does")
    model = load_causal_lm(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_model(checkpoint, model)
    unfinished = output.with_name(f".{output.name}.incomplete")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    with suppress(FileNotFoundError):  # models may come without one
        load_tokenizer(base).save_pretrained(unfinished)
    unfinished.rename(output)
