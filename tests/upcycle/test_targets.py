"""config.json of each format: read back, it describes the model that was planned."""

import json

import pytest

from moe_runtime.families import model_config
from upcycle import make_plan_for, recipe_from_dict

EXACT = [
    ("llama", "mixtral"),
    ("llama", "qwen2_moe"),
    ("mistral", "mixtral"),
    ("mistral-layers", "qwen2_moe"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
    ("cohere", "moe_runtime"),
    ("llama", "granitemoe"),
    ("granite", "granitemoe"),
    ("olmo2", "flex_olmo"),
]


def plan_of(folder, target, **values):
    values = {
        "method": "copy",
        "base": str(folder),
        "experts": 4,
        "output": "unused",
        "target": target,
        **values,
    }
    return make_plan_for(recipe_from_dict(values))


@pytest.mark.parametrize(("family", "target"), EXACT)
def test_the_file_describes_the_plan(family, target, dense):
    plan = plan_of(dense(family), target, router={"aux_loss_coef": 0.02})
    config_json = json.loads(json.dumps(plan.config_json))
    assert model_config(config_json) == plan.model
    assert config_json["model_type"] == target
    assert config_json["router_aux_loss_coef"] == 0.02
    assert config_json["dtype"] == "float32"


def test_dense_layers_and_raw_gates_of_qwen2_moe(dense):
    plan = plan_of(dense("qwen2"), "qwen2_moe", layers="every_other", router={"gate": "raw"})
    config = plan.config_json
    assert (config["mlp_only_layers"], config["decoder_sparse_step"], config["norm_topk_prob"]) == (
        [0, 2],
        1,
        False,
    )
    assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert model_config(config) == plan.model


def test_token_ids_of_the_base_are_carried_and_nothing_foreign(dense_copy):
    folder = dense_copy()
    config = json.loads((folder / "config.json").read_text())
    changed = {
        **config,
        "eos_token_id": [2, 5],
        "pad_token_id": 7,
        "pretraining_tp": 3,
        "auto_map": {"x": "y"},
    }
    (folder / "config.json").write_text(json.dumps(changed))
    config = plan_of(folder, "mixtral").config_json
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [2, 5], 7)
    assert not {"pretraining_tp", "auto_map", "transformers_version", "mlp_bias"} & set(config)


def test_readers_of_either_file_style_find_the_rotary_base(dense):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0}
    config = plan_of(dense("llama", rope_parameters=Frozen(rope)), "mixtral").config_json
    assert config["rope_parameters"] == rope
    assert config["rope_scaling"] == rope
    assert config["rope_theta"] == 700.0
    assert plan_of(dense("llama"), "mixtral").config_json["rope_scaling"] is None


class Frozen(dict):
    """A dictionary that can be part of the key of a fixture's cache."""

    def __hash__(self):
        return hash(tuple(self.items()))
