"""What would stop a run before its first step, found without loading weights."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from moe_runtime.hf.loading import load_tokenizer

from .data.load import load_train_data
from .model import set_up_model
from .packages import check_packages
from .recipe import TrainRecipe


def positions(folder: str) -> int | None:
    """Tokens that the model of a folder takes at most; None if it does not say."""
    return getattr(_configuration(folder), "max_position_embeddings", None)


def check_run(recipe: TrainRecipe) -> None:
    """Refuse what `run_training` would refuse of packages, data and options, but packing.

    Raises:
        RunError: as `run_training`.
    """
    check_packages(recipe.train)
    load_train_data(recipe.data, load_tokenizer(recipe.model), recipe.seed, positions(recipe.model))
    config = _configuration(recipe.model)
    with FakeTensorMode():
        set_up_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), recipe)


def _configuration(folder: str) -> Any:
    return AutoConfig.from_pretrained(folder, local_files_only=True)
