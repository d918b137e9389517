"""Plans: names, shapes and sources of every tensor, and what is refused before a weight is read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import upcycle
from upcycle import UpcycleError, recipe_from_dict
from upcycle.plan import make_plan_for
from upcycle.tasks import Band, Normal, Piece, Zeros


def plan_of(**values):
    values = {"output": "never-written", **values}
    return make_plan_for(recipe_from_dict(values))


def copy_plan(folder, **values):
    return plan_of(method="copy", base=str(folder), **{"experts": 4, **values})


def by_name(plan):
    return {task.name: task for task in plan.tasks}


# --- what is planned ---


def test_stacked_experts_are_gate_rows_above_up_rows(dense):
    plan = plan_of(method="btx", sources=[str(dense("llama")), str(dense("llama", seed=1))])
    task = by_name(plan)["model.layers.1.mlp.experts.gate_up_proj"]
    mlp = "model.layers.1.mlp"
    assert task.shape == (2, 96, 32)
    assert task.content == tuple(
        Band(48, (Piece(f"{mlp}.{kind}_proj.weight", (source,), width=32),))
        for source in (0, 1)
        for kind in ("gate", "up")
    )
    assert by_name(plan)[f"{mlp}.experts.down_proj"].shape == (2, 32, 48)
    assert by_name(plan)["model.norm.weight"].content == (
        Band(32, (Piece("model.norm.weight", (0, 1), width=1),)),
    )


@pytest.mark.parametrize(
    ("kv", "runs"),
    [
        ("expert", [(0, 0, 4), (1, 0, 4), (2, 0, 4)]),
        ("shared", [(0, 0, 2), (1, 0, 2), (2, 0, 2), (0, 2, 2), (1, 2, 2), (2, 2, 2)]),
    ],
)
def test_query_heads_are_stored_so_that_a_key_value_heads_queries_are_neighbours(kv, runs, dense):
    plan = plan_of(method="bam", sources=[str(dense("llama"))] * 3, attention={"kv": kv})
    weight, output = (by_name(plan)[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qo")
    assert [(b.pieces[0].sources[0], b.pieces[0].first_row // 8, b.rows // 8) for b in weight.content] == runs
    (band,) = output.content
    assert [(p.sources[0], p.first_column // 8, p.columns // 8) for p in band.pieces] == runs


def test_a_router_depends_on_seed_layer_and_kind_alone(dense):
    folder = dense("llama")
    ours, theirs = copy_plan(folder), copy_plan(folder, target="mixtral", layers="all", max_shard_size="1KB")
    router = by_name(ours)["model.layers.2.mlp.router.weight"].content
    assert router == by_name(theirs)["model.layers.2.block_sparse_moe.gate.weight"].content
    assert router == Normal(0.02, 0, "model.layers.2.mlp.router")
    seeded = copy_plan(folder, router={"seed": 7, "std": 0.5})
    assert by_name(seeded)["model.layers.2.mlp.router.weight"].content == Normal(0.5, 7, router.label)


def test_chosen_layers_get_experts_and_the_others_stay_dense(dense):
    source = str(dense("llama"))
    for layers, chosen in (("every_other", {1}), ([0, 2], {0, 2})):
        plan = plan_of(method="bam", sources=[source] * 2, layers=layers)
        names = set(by_name(plan))
        for number in range(3):
            prefix = f"model.layers.{number}"
            assert (f"{prefix}.mlp.experts.gate_up_proj" in names) == (number in chosen)
            assert (f"{prefix}.self_attn.router.weight" in names) == (number in chosen)
            assert (f"{prefix}.mlp.gate_proj.weight" in names) == (number not in chosen)
    assert copy_plan(source, layers=[0, 1, 2]).model.moe_layers is None


def test_selection_bias_starts_at_zero(dense):
    task = by_name(copy_plan(dense("llama"), router={"selection_bias": True}))[
        "model.layers.0.mlp.router.selection_bias"
    ]
    assert (task.dtype, task.shape, task.content) == ("F32", (4,), Zeros())


def test_sizes_of_heads_are_totals_in_the_configuration(dense):
    for kv, kv_heads in (("expert", 6), ("shared", 2)):
        config = plan_of(method="bam", sources=[str(dense("llama"))] * 3, attention={"kv": kv}).config_json
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (12, kv_heads)
        assert (config["num_attention_experts"], config["attention_kv"]) == (3, kv)


def test_tied_embeddings_stay_tied(dense):
    tied, untied = copy_plan(dense("qwen3")), copy_plan(dense("qwen2"))
    assert "lm_head.weight" not in by_name(tied)
    assert "lm_head.weight" in by_name(untied)


def test_a_base_that_is_no_expert_gives_the_rest(dense):
    sources = [str(dense("llama", seed=seed)) for seed in (1, 2)]
    base = str(dense("llama"))
    plan = plan_of(method="btx", sources=sources, base=base, non_expert="base")
    assert [str(source.folder) for source in plan.sources] == [*sources, base]
    assert not any(task.is_averaged for task in plan.tasks)
    assert by_name(plan)["model.norm.weight"].content[0].pieces[0].sources == (2,)


def test_a_dry_run_reads_no_weights_and_writes_nothing(dense_copy, tmp_path):
    folder = dense_copy()
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(8 + int.from_bytes(file.read(8), "little"))
            file.truncate(size)
    before = sorted(path.name for path in tmp_path.iterdir())
    recipe = recipe_from_dict(
        {"method": "copy", "base": str(folder), "experts": 2, "output": str(tmp_path / "out")}
    )
    result = upcycle.upcycle(recipe, dry_run=True)
    assert result.dry_run
    assert result.plan.num_bytes == 4 * result.plan.num_parameters
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# --- formats that cannot say it ---

REFUSED = [
    pytest.param(
        "llama", {}, "qwen3_moe", "qk_norm would be 'rms_norm' instead of None; use target 'mixtral'"
    ),
    pytest.param(
        "qwen2", {}, "mixtral", "attention_bias would be False instead of True; use target 'qwen2_moe'"
    ),
    pytest.param(
        "qwen3", {}, "qwen2_moe", "qk_norm would be None instead of 'rms_norm'; use target 'qwen3_moe'"
    ),
    pytest.param(
        "cohere", {}, "mixtral", "block would be 'sequential' instead of 'parallel'; use target 'moe_runtime'"
    ),
    pytest.param(
        "llama",
        {"router": {"gate": "raw"}},
        "mixtral",
        "router_gate would be 'renorm' instead of 'raw'; use target 'qwen2_moe'",
    ),
    pytest.param(
        "llama",
        {"router": {"gate": "straight_through"}, "experts_per_token": 1},
        "mixtral",
        "router_gate would be 'renorm' instead of 'straight_through'; use target 'moe_runtime'",
    ),
    pytest.param(
        "llama",
        {"layers": [1]},
        "mixtral",
        "moe_layers would be None instead of .1,.; use target 'qwen2_moe'",
    ),
    pytest.param("llama", {"router": {"score": "sigmoid"}}, "qwen2_moe", "router_score would be 'softmax'"),
    pytest.param(
        "llama", {"router": {"selection_bias": True}}, "mixtral", "router_selection_bias would be False"
    ),
    pytest.param("llama", {"router": {"scale": 2.5}}, "mixtral", "router_scale would be 1.0 instead of 2.5"),
]


@pytest.mark.parametrize(("family", "values", "target", "message"), REFUSED)
def test_a_format_that_cannot_hold_the_model_is_refused_with_the_next_one(
    family, values, target, message, dense
):
    with pytest.raises(UpcycleError, match=f"target '{target}' cannot hold this model: .*{message}"):
        copy_plan(dense(family), target=target, **values)


def test_attention_experts_fit_our_own_format_only(dense):
    message = "num_attention_experts would be 1 instead of 2; use target 'moe_runtime'"
    for target in ("mixtral", "qwen2_moe", "qwen3_moe"):
        with pytest.raises(UpcycleError, match=f"target '{target}' cannot hold this model: {message}"):
            plan_of(method="bam", sources=[str(dense("llama"))] * 2, target=target, router={"z_loss_coef": 0})


def test_biases_that_a_format_lacks_are_refused(dense):
    with pytest.raises(
        UpcycleError, match="attention_bias would be False instead of True; use target 'granitemoe'"
    ):
        copy_plan(dense("llama", attention_bias=True), target="mixtral")
    with pytest.raises(
        UpcycleError, match="mlp_bias would be False instead of True; use target 'moe_runtime'"
    ):
        copy_plan(dense("llama", mlp_bias=True), target="mixtral")


def test_a_parallel_block_cannot_be_made_from_sequential_sources(dense):
    with pytest.raises(UpcycleError, match=r"block 'parallel' cannot be made from llama sources: .*cohere"):
        plan_of(method="bam", sources=[str(dense("llama"))] * 2, block="parallel")
    with pytest.raises(UpcycleError, match="block 'sequential' cannot be made from cohere sources"):
        plan_of(method="bam", sources=[str(dense("cohere"))] * 2, block="sequential")
    assert (
        plan_of(method="bam", sources=[str(dense("cohere"))] * 2, block="parallel").model.block == "parallel"
    )


# --- sources that do not fit ---


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensor(folder, name, change):
    """`change` a tensor of the only shard."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors.pop(name))
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


def test_sources_of_other_shapes_and_vocabularies_are_named(dense):
    base = str(dense("llama"))
    for changes, field in (
        ({"vocab_size": 96}, "vocab_size is 64"),
        ({"intermediate_size": 40}, "intermediate_size is 48"),
    ):
        other = str(dense("llama", **changes))
        with pytest.raises(
            UpcycleError, match=f"branches of one dense model, but {field} in {base} and .* in {other}"
        ):
            plan_of(method="btx", sources=[base, other])
    with pytest.raises(UpcycleError, match=r"attention_bias is False in .* and True in"):
        plan_of(method="btx", sources=[base, str(dense("qwen2"))])


def test_a_longer_context_in_a_branch_is_no_difference(dense, dense_copy):
    longer = dense_copy()
    change_config(longer, max_position_embeddings=128)
    assert len(plan_of(method="btx", sources=[str(dense("llama")), str(longer)]).sources) == 2


def test_families_without_a_plan_are_named(dense_copy):
    folder = dense_copy()
    change_config(folder, model_type="mixtral")
    with pytest.raises(
        UpcycleError, match=r"model_type must be one of llama, mistral, .*, falcon, got 'mixtral'"
    ):
        copy_plan(folder)
    change_config(folder, model_type="llama", hidden_act="gelu_10")
    with pytest.raises(UpcycleError, match=r"config\.json: hidden_act must be one of .*, got 'gelu_10'"):
        copy_plan(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 0 to 1000, got 10{9}"),
        ({"n_layer": 10**9}, "n_layer must be a whole number from 0 to 1000"),
        ({"num_local_experts": 10**9}, "num_local_experts must be a whole number from 0 to 4096"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers must be a whole number from 0 to 1000, got 2\.0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a whole number from 0 to 1000, got -1"),
        ({"model_type": ["llama"]}, r"model_type must be a text, got \['llama'\]"),
    ],
)
def test_a_configuration_that_counts_beyond_any_model_is_refused(changes, message, dense_copy):
    folder = dense_copy()
    change_config(folder, **changes)
    with pytest.raises(UpcycleError, match=r"damaged/config\.json: " + message):
        copy_plan(folder)


TENSORS = [
    pytest.param("model.norm.weight", lambda t: None, "tensor model.norm.weight is missing", id="missing"),
    pytest.param(
        "model.norm.weight",
        lambda t: t[:5],
        r"must have shape \(32,\) by config.json, got \(5,\)",
        id="shape",
    ),
    pytest.param(
        "model.norm.weight",
        lambda t: t.to(torch.int8),
        "must be of type F32, BF16, F16, got I8; de-quantise",
        id="type",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), TENSORS)
def test_tensors_that_do_not_fit_the_configuration_are_named(name, change, message, dense_copy):
    folder = dense_copy(shard="1GB")
    change_tensor(folder, name, change)
    with pytest.raises(UpcycleError, match=message):
        copy_plan(folder)


def test_tensors_without_a_place_are_named(dense_copy):
    folder = dense_copy(shard="1GB")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    assert copy_plan(folder).num_parameters > 0
    save_file({**tensors, "model.layers.0.adapter.weight": torch.ones(4)}, path)
    with pytest.raises(
        UpcycleError, match=r"tensor model\.layers\.0\.adapter\.weight has no place in a llama model"
    ):
        copy_plan(folder)


def test_every_other_of_one_layer_is_none(dense):
    with pytest.raises(
        UpcycleError, match="layers 'every_other' leaves no layer with experts; the model has 1"
    ):
        copy_plan(dense("llama", num_hidden_layers=1), layers="every_other")


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        ({"first_dense": 2}, (2, 3, 4)),
        ({"moe_every": 2}, (1, 3)),
        ({"first_dense": 2, "moe_every": 2}, (3,)),
        ({"first_dense": 0}, None),
        ("every_other", (1, 3)),
    ],
)
def test_a_rule_chooses_layers(rule, chosen, dense):
    assert copy_plan(dense("llama", num_hidden_layers=5), layers=rule).model.moe_layers == chosen


def test_a_rule_that_chooses_no_layer_is_refused(dense):
    for rule, said in (({"first_dense": 3}, "3 dense"), ({"moe_every": 4}, "0 dense, then every 4")):
        with pytest.raises(UpcycleError, match=f"{said}.* leaves no layer with experts; the model has 3"):
            copy_plan(dense("llama"), layers=rule)


def test_layers_outside_the_model_are_named(dense):
    with pytest.raises(UpcycleError, match="layers must lie between 0 and 2, got 3"):
        copy_plan(dense("llama"), layers=[3])
