"""Tiny models, data and recipes of training runs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from moe_families import tiny_family
from tiny_models import BAM_SHARED_KV_TOP_K, DENSE, MOE, tiny_model

from moe_runtime.hf.loading import load_causal_lm, load_tokenizer
from moe_runtime.train import checkpoints
from moe_runtime.train.data.load import load_train_data
from moe_runtime.train.recipe import TrainRecipe, recipe_from_dict
from moe_runtime.train.run import run_training

KINDS: dict[str, Any] = {
    "ours": lambda: tiny_model(MOE, vocab_size=VOCAB_SIZE),
    "dense": lambda: tiny_model(DENSE, vocab_size=VOCAB_SIZE),
    # a mixture of attention, and dense feed-forwards
    "attention": lambda: tiny_model(
        BAM_SHARED_KV_TOP_K | {"num_experts": 0, "num_experts_per_tok": None, "moe_intermediate_size": None},
        vocab_size=VOCAB_SIZE,
    ),
    "mixtral": lambda: tiny_family("mixtral", vocab_size=VOCAB_SIZE),
    "deepseek_v3": lambda: tiny_family("deepseek_v3", vocab_size=VOCAB_SIZE),
}


def save_model(kind: str, folder: Path, **options: Any) -> Path:
    """A tiny checkpoint with the tokenizer of bytes; `options` change our own model."""
    model = tiny_model(MOE, vocab_size=VOCAB_SIZE, **options) if options else KINDS[kind]()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_data(path: Path, count: int = 24) -> Path:
    """Instructions of several lengths."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(count):
        length = int(torch.randint(3, 14, (), generator=generator))
        word = "".join(chr(97 + int(torch.randint(26, (), generator=generator))) for _ in range(length))
        lines.append(json.dumps({"prompt": f"{number}: {word} ", "completion": word[::-1]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe_values(model: Path, data: Path, output: Path, /, **changes: Any) -> dict[str, Any]:
    """Plain values of a recipe of four steps; `changes` has sections, whose keys replace these."""
    values: dict[str, Any] = {
        "model": str(model),
        "output": str(output),
        "data": {"train": [str(data)], "max_length": 64, "packing": False},
        "train": {
            "steps": 4,
            "batch_size": 2,
            "accumulate": 2,
            "learning_rate": 1e-2,
            "schedule": "constant",
            "log_every": 1,
        },
    }
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else copy.copy(change)
    return {name: value for name, value in values.items() if value is not None}


def a_recipe(model: Path, data: Path, output: Path, /, **changes: Any) -> TrainRecipe:
    return recipe_from_dict(recipe_values(model, data, output, **changes))


def nats_per_label(folder: Path, recipe: TrainRecipe) -> float:
    """Of a checkpoint over all rows that a recipe trains on, one at a time."""
    model = load_causal_lm(folder)
    rows = load_train_data(recipe.data, load_tokenizer(recipe.model), 0).dataset
    nats = labels = 0.0
    for row in (rows[number] for number in range(len(rows))):
        with torch.no_grad():
            logits_LV = model(row["input_ids"][None]).logits[0]
        nats += functional.cross_entropy(logits_LV[:-1], row["labels"][1:], reduction="sum").item()
        labels += (row["labels"] != -100).sum().item()
    return nats / labels


def stopped_at(step: int, recipe: TrainRecipe) -> None:
    """Run until the checkpoint of a step is written, as if the process ended there."""

    class EndedError(Exception):
        pass

    write = checkpoints.write

    def write_and_end(output, at, *others):
        write(output, at, *others)
        if at == step:
            raise EndedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "write", write_and_end)
        with pytest.raises(EndedError):
            run_training(recipe)
