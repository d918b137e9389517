import re
from pathlib import Path

import pytest
import yaml
from training_runs import recipe_values

from moe_runtime.errors import RecipeError
from moe_runtime.train.recipe import load_recipe, recipe_from_dict

EVERYTHING = {
    "train": {
        "lora": {"rank": 4, "target_modules": ["q_proj"]},
        "restarts": [2],
        "report_to": ["tensorboard"],
    },
    "moe": {"balance_over": "sequence", "gate": "raw"},
    "parallel": {"data": "fsdp", "experts": 2},
    "seed": 3,
}


def values(**changes):
    model = changes.pop("model", "model")
    return recipe_values(Path(model), Path("data.jsonl"), Path("out"), **changes)


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["short", "everything"])
def test_a_recipe_survives_yaml_and_back(changes, tmp_path):
    recipe = recipe_from_dict(values(**changes))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": {}}, "unknown key 'trains'; did you mean 'train'?"),
        ({"train": {"stepps": 1}}, "unknown key 'stepps' under 'train'; did you mean 'steps'?"),
        ({"moe": {"balance": 1}}, "unknown key 'balance' under 'moe'; did you mean 'balance_over'?"),
        ({"train": {"lora": {"r": 1}}}, "unknown key 'r' under 'lora'; known keys: rank, alpha"),
        (
            {"train": {"steps": None}},
            "exactly one of train.steps and train.epochs must be given, got neither",
        ),
        ({"train": {"epochs": 1}}, "must be given, got steps 4 and epochs 1"),
        (
            {"train": {"precision": "float16"}},
            "train.precision must be one of 'float32', 'bfloat16', got 'float16'",
        ),
        ({"train": {"optimizer": "lomo"}}, "train.optimizer must be one of 'adamw_torch',"),
        (
            {"train": {"freeze": "all"}},
            "train.freeze must be one of 'none', 'gate', 'experts', 'moe', 'non_expert'",
        ),
        ({"train": {"batch_size": 0}}, "train.batch_size must be at least 1, got 0"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate must be above 0, got 0"),
        ({"train": {"restarts": [3, 2]}}, "train.restarts must be steps in rising order, got [3, 2]"),
        ({"train": {"restarts": [4]}}, "train.restarts must lie below train.steps (4), got 4"),
        ({"train": {"freeze": "gate", "lora": {}}}, "train.freeze must be 'none' with train.lora"),
        (
            {"train": {"lora": {"targets": ["up"]}}},
            "train.lora.targets must be one of 'gate_up_proj', 'down_proj'",
        ),
        ({"moe": {"balance_over": "batch"}}, "moe.balance_over must be one of 'micro_batch', 'sequence'"),
        ({"moe": {"expert_dropout": 1}}, "moe.expert_dropout must be below 1, got 1"),
        ({"moe": {"bias_update": -1}}, "moe.bias_update must be finite and not negative, got -1"),
        (
            {"moe": {"bias_update": 0.1}, "train": {"lora": {}}},
            "moe.bias_update must be 0 with train.lora, whose checkpoints hold adapters only, got 0.1",
        ),
        ({"parallel": {"data": "dp"}}, "parallel.data must be one of 'none', 'ddp', 'fsdp', got 'dp'"),
        ({"model": "out"}, "output must be another folder than model, got 'out' for both"),
        (
            {"parallel": {"data": "fsdp"}, "train": {"optimizer": "adafactor"}},
            "'adamw_torch_fused', 'sgd', 'adagrad', 'rmsprop' with parallel.data 'fsdp', got 'adafactor'",
        ),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**32}, "seed must be below 4294967296, got 4294967296"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(changes, message):
    with pytest.raises(RecipeError, match=f"^recipe: .*{re.escape(message)}"):
        recipe_from_dict(values(**changes))
