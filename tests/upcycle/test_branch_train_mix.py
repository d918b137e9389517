"""One expert per source; everything else the float32 mean, or the base's."""

import pytest
import torch
from dense_models import tensors_of

from upcycle import verify


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_no_expert_is_the_float32_mean(dtype, dense, run):
    """B1 and T9, bit by bit: sum in float32, divide, round once."""
    sources = [dense("qwen2", seed=seed, dtype=dtype) for seed in range(3)]
    parts = [tensors_of(source) for source in sources]
    mixed = tensors_of(run(method="btx", sources=sources))
    shared = [name for name in parts[0] if ".mlp." not in name]
    assert len(shared) == len([name for name in mixed if ".mlp." not in name]) == 30
    for name in shared:
        total = parts[0][name].float() + parts[1][name].float() + parts[2][name].float()
        assert torch.equal(mixed[name], (total / 3).to(dtype)), name


def test_expert_j_is_the_feed_forward_of_source_j(dense, run):
    sources = [dense("llama", seed=seed) for seed in range(3)]
    mixed = tensors_of(run(method="btx", sources=sources))
    for number in range(3):
        mlp = f"model.layers.{number}.mlp"
        for expert, source in enumerate(sources):
            part = tensors_of(source)
            gate_up = torch.cat([part[f"{mlp}.gate_proj.weight"], part[f"{mlp}.up_proj.weight"]])
            assert torch.equal(mixed[f"{mlp}.experts.gate_up_proj"][expert], gate_up)
            assert torch.equal(mixed[f"{mlp}.experts.down_proj"][expert], part[f"{mlp}.down_proj.weight"])


@pytest.mark.parametrize(
    ("family", "target"), [("llama", "mixtral"), ("qwen3", "qwen3_moe"), ("cohere", "moe_runtime")]
)
def test_equal_sources_keep_the_function(family, target, dense, run):
    """B2."""
    result = verify(run(method="btx", sources=[dense(family)] * 3, target=target))
    assert result.must_be_equal
    assert result.max_abs_diff < 1e-4


def test_different_sources_are_no_identity(dense, run):
    result = verify(run(method="btx", sources=[dense("llama", seed=seed) for seed in range(2)]))
    assert result.not_equal_because == ("the sources differ",)
    assert result.max_abs_diff > 1e-2
    assert result.passed


def test_a_base_gives_the_rest_if_asked(dense, run):
    sources, base = [dense("llama", seed=seed) for seed in (1, 2)], dense("llama")
    mixed = tensors_of(run(method="btx", sources=sources, base=base, non_expert="base"))
    for name, tensor in tensors_of(base).items():
        if ".mlp." not in name:
            assert torch.equal(mixed[name], tensor), name


def test_layers_without_experts_are_averaged_whole(dense, run):
    sources = [dense("llama", seed=seed) for seed in range(2)]
    mixed = tensors_of(run(method="btx", sources=sources, layers=[1]))
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = (tensors_of(source)[name] for source in sources)
    assert torch.equal(mixed[name], (first + second) / 2)
    assert "model.layers.1.mlp.experts.down_proj" in mixed


def test_sources_of_different_types_meet_in_float32(dense, run):
    sources = [dense("llama"), dense("llama", seed=1, dtype=torch.bfloat16)]
    mixed = tensors_of(run(method="btx", sources=sources))
    first, second = (tensors_of(source)["model.norm.weight"] for source in sources)
    assert mixed["model.norm.weight"].dtype == torch.float32
    assert torch.equal(mixed["model.norm.weight"], (first + second.float()) / 2)
