"""What a recipe fills in and what it refuses."""

from pathlib import Path

import pytest

import upcycle.upit
from upcycle.errors import RecipeError
from upcycle.upit import load_upit_recipe, upit_recipe_from_dict

EXAMPLE = Path(upcycle.upit.__file__).with_name("example.yaml")
LEAST = {"base": "b", "data": ["d"], "output": "o", "experts": 4}


def test_the_example_is_a_recipe_and_reads_back():
    recipe = load_upit_recipe(EXAMPLE)
    assert upit_recipe_from_dict(recipe.to_dict()) == recipe


def test_what_is_left_out_follows_the_paradigm():
    full = upit_recipe_from_dict(LEAST)
    assert (full.work, full.non_expert) == ("o.work", "mean")
    assert (full.prepare.lr, full.post_train.lr) == (2e-5, 2e-5)
    lora = upit_recipe_from_dict({**LEAST, "paradigm": "lora"})
    assert (lora.non_expert, lora.prepare.lr, lora.post_train.lr) == ("base", 2e-4, 2e-5)
    adapter = upit_recipe_from_dict({**LEAST, "paradigm": "lora", "lora_experts": "adapter"})
    assert adapter.post_train.lr == 2e-4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"expert": 3}, "unknown key 'expert'; did you mean 'experts'"),
        ({"route": {"epoch": 3}}, "unknown key 'epoch' under 'route'; did you mean 'epochs'"),
        ({"route": 3}, "route must be a section of 'key: value' lines, got 3"),
        ({"data": []}, "data must name one or more files, got none"),
        ({"data": "d"}, "data must be a list, got 'd'"),
        ({"base": ""}, "base must not be empty"),
        ({"experts": 1}, "experts must be at least 2, got 1"),
        ({"experts_per_token": 5}, "experts_per_token must be at most the number of experts"),
        ({"experts_per_token": 1}, "makes every gate 1 and no router learns"),
        ({"gate": "straight_through"}, "needs experts_per_token 1, got 2"),
        ({"lora_experts": "adapter"}, "lora_experts 'adapter' needs paradigm 'lora', got 'full'"),
        (
            {"paradigm": "lora", "lora_experts": "adapter", "target": "mixtral"},
            "needs target 'moe_runtime', got 'mixtral'",
        ),
        ({"paradigm": "lora", "non_expert": "mean"}, "non_expert must be 'base' with paradigm 'lora'"),
        (
            {"prepare": {"epochs": 1.1}},
            r"must be a multiple of prepare.every \(0.25\), got 1.1",
        ),
        ({"prepare": {"lr": 0}}, "prepare.lr must be finite and above 0, got 0"),
        ({"prepare": {"rank": 0}}, "prepare.rank must be at least 1, got 0"),
        ({"expand": {"drop": 1}}, "expand.drop must be below 1, got 1"),
        ({"expand": {"drop": -0.1}}, "expand.drop must be between 0 and 1, got -0.1"),
        (
            {"expand": {"similarity": "dot"}},
            "expand.similarity must be one of 'cosine', 'l2', 'cka'",
        ),
        ({"route": {"seed_fraction": 0}}, "route.seed_fraction must be finite and above 0, got 0"),
        ({"route": {"seed_fraction": 2}}, "route.seed_fraction must be at most 1, got 2"),
        ({"route": {"min_per_expert": 0}}, "route.min_per_expert must be at least 1, got 0"),
        ({"route": {"alpha": 1}}, "the routing vectors would not be trained"),
        ({"post_train": {"epochs": -1}}, "post_train.epochs must be finite and not negative, got -1"),
        ({"max_shard_size": "5"}, "max_shard_size must be a whole number with a unit"),
        ({"warmup": 1.5}, "warmup must be between 0 and 1, got 1.5"),
    ],
)
def test_what_is_not_allowed_is_told(changes, sentence):
    with pytest.raises(RecipeError, match=sentence):
        upit_recipe_from_dict({**LEAST, **changes})
