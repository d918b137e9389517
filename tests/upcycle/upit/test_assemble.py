"""The assembled mixture holds what the stages before it made."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dense_models import tensors_of
from safetensors.numpy import load_file
from upit_runs import experts_of, record_low_rank, small_recipe

from moe_runtime.hf.loading import load_causal_lm
from moe_runtime.hf.lora import load_expert_lora
from upcycle.errors import UpcycleError
from upcycle.upit import Run, open_expert
from upcycle.upit.assemble import add_adapter, assemble
from upcycle.upit.expert import whole_tensor
from upcycle.upit.route import write_routers

TOKENS = torch.arange(2, 26).view(2, 12)


def logits(model):
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("target", ["moe_runtime", "mixtral"])
def test_routers_and_experts_arrive_bit_for_bit(target, finished):
    """U8, and the experts of the routing stage."""
    recipe, _ = finished(post_train={"epochs": 0}, target=target)
    work, tensors = Path(recipe.work), tensors_of(Path(recipe.output))
    name = {"moe_runtime": "mlp.router.weight", "mixtral": "block_sparse_moe.gate.weight"}[target]
    for expert in range(4):
        vectors = load_file(work / "route" / f"expert-{expert:02}" / "vectors.safetensors")["vectors"]
        opened = open_expert(work / "route" / f"expert-{expert:02}")
        for layer, vector in enumerate(vectors):
            row = tensors[f"model.layers.{layer}.{name}"][expert].numpy()
            assert row.tobytes() == vector.tobytes()
            with opened.open_rows() as reader:
                down = whole_tensor(reader, f"model.layers.{layer}.mlp.down_proj.weight")
            if target == "mixtral":
                stored = tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"]
            else:
                stored = tensors[f"model.layers.{layer}.mlp.experts.down_proj"][expert]
            assert np.array_equal(stored.numpy(), down)


@pytest.mark.parametrize("family", ["llama", "phi3", "phi"])
def test_adapters_compute_what_merged_experts_compute(family, dense, data, tmp_path):
    """U7: for gates in one stored tensor or two or none, and experts of different ranks."""
    base = dense(family)
    folders = [
        experts_of(record_low_rank(tmp_path / f"rank-{rank}", base, 1, rank=rank))[0] for rank in (2, 3, 5)
    ]
    routers = tmp_path / "routers.safetensors"
    width = 3, 3, 32  # layers, experts, channels
    write_routers(routers, torch.randn(width, generator=torch.Generator().manual_seed(0)).numpy())
    outputs = {}
    for kind in ("merged", "adapter"):
        changes = {"paradigm": "lora", "lora_experts": kind, "experts": 3}
        recipe = small_recipe(base, data, tmp_path, **changes)
        assemble(recipe, folders, base, routers, tmp_path / kind, "float32")
        model = load_causal_lm(tmp_path / kind)
        if kind == "adapter":
            outputs["without"] = logits(model)
            add_adapter(model, folders)
        outputs[kind] = logits(model)
    assert (outputs["adapter"] - outputs["merged"]).abs().max() < 1e-4
    assert (outputs["adapter"] - outputs["without"]).abs().max() > 1e-2


def test_adapters_are_trained_with_their_routers_and_nothing_else(finished):
    recipe, results = finished(paradigm="lora", lora_experts="adapter")
    before = tensors_of(Path(recipe.work) / "assemble" / "model")
    after = tensors_of(Path(recipe.output))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.layers.{layer}.mlp.router.weight" for layer in range(3)}
    model = load_causal_lm(recipe.output)
    without = logits(model)
    load_expert_lora(model, Path(recipe.output) / "adapter")
    assert (logits(model) - without).abs().max() > 1e-3
    losses = [*results["post_train"]["losses"].values()]
    assert losses[-1] < losses[0]


def test_a_target_that_cannot_hold_it_is_refused_before_training(dense, data, tmp_path):
    recipe = small_recipe(dense("qwen3"), data, tmp_path, target="mixtral")
    with pytest.raises(UpcycleError, match=r"target 'mixtral' cannot hold this model: .* use target"):
        Run(recipe).assembly_plan()
