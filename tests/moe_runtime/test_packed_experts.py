"""Packed layers and models compute what they computed, and say when their copy is out of date."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from inputs import normal
from moe_families import tiny_family
from moe_runtime_kernels import PackedExperts
from tiny_models import tiny_model, tokens
from torch import nn

import moe_runtime
from moe_runtime import FeedForwardConfig, MoEFeedForward, RouterConfig, pack_experts, unpack_experts
from moe_runtime.expert_lora import ExpertLoRA

IDS = tokens(2, 9)


@pytest.fixture
def calls(monkeypatch):
    """How many tokens each call of packed experts had."""
    seen = []
    original = PackedExperts.__call__

    def spy(self, x_TD, *rest):
        seen.append(x_TD.shape[0])
        return original(self, x_TD, *rest)

    monkeypatch.setattr(PackedExperts, "__call__", spy)
    return seen


def make_layer(**changes):
    router = RouterConfig(hidden_size=8, num_experts=4, experts_per_token=2)
    torch.manual_seed(0)
    return MoEFeedForward(FeedForwardConfig(hidden_size=8, intermediate_size=6, router=router, **changes))


def output(layer, x=None):
    y = layer(normal(5, 8) if x is None else x)
    return y if isinstance(y, torch.Tensor) else y[0]


def test_our_model_generates_the_same_packed(calls):
    model = tiny_model()
    expected, text = model(IDS).logits.detach(), model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert pack_experts(model) == tuple(f"model.layers.{n}.mlp.experts" for n in range(2))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected)
    assert calls == [18, 18]
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), text)
    assert calls[-1] == 2
    unpack_experts(model)
    calls.clear()
    with torch.no_grad():
        model(IDS)
    assert calls == []


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_models_of_transformers_are_the_same_packed(family, calls):
    model = tiny_family(family).eval()
    ids = IDS % model.config.vocab_size
    with pytest.raises(ValueError, match="experts_implementation is 'eager' instead of 'moe_runtime'"):
        pack_experts(model)
    moe_runtime.accelerate_model(model)
    with torch.no_grad():
        expected = model(ids).logits
        assert calls == []
        pack_experts(model)
        torch.testing.assert_close(model(ids).logits, expected)
    assert calls


def test_gradients_are_those_of_the_parameters(calls):
    layer = make_layer()
    pack_experts(layer)
    output(layer).sum().backward()
    assert calls == []
    assert layer.experts.down_proj.grad.abs().sum() > 0


def test_dropout_falls_without_gradients_too(calls):
    layer = make_layer(expert_dropout=0.5)
    pack_experts(layer)
    with torch.no_grad():
        output(layer)
        assert calls == []
        output(layer.eval())
    assert calls == [5]


@pytest.mark.parametrize("change", ["in place", "another tensor", "inference", "data", "fused optimizer"])
def test_weights_that_changed_are_refused(change):
    layer = make_layer().eval()
    pack_experts(layer)
    if change == "in place":
        with torch.no_grad():
            layer.experts.down_proj += 1
    elif change == "data":
        layer.experts.down_proj.data.mul_(1.5)
    elif change == "fused optimizer":
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        output(layer).sum().backward()
        optimizer.step()
    elif change == "another tensor":
        layer.experts.down_proj.data = layer.experts.down_proj.data.clone()
    else:
        with torch.inference_mode():
            layer.experts.down_proj = nn.Parameter(layer.experts.down_proj.clone(), requires_grad=False)
    message = "weights of Experts must be those that pack_experts packed, .* call pack_experts again"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        output(layer)
    pack_experts(layer)
    with torch.no_grad():
        packed = output(layer)
        unpack_experts(layer)
        torch.testing.assert_close(packed, output(layer))


def test_copies_and_files_are_of_the_parameters_alone(calls):
    layer = make_layer().eval()
    pack_experts(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with torch.no_grad():
        expected = output(layer)
        calls.clear()
        for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            torch.testing.assert_close(output(other), expected)
    assert calls == []
    assert list(layer.state_dict()) == list(make_layer().state_dict())


def test_autocast_to_another_dtype_uses_the_parameters(calls):
    model = tiny_family("mixtral").eval()
    moe_runtime.accelerate_model(model)
    pack_experts(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(IDS % model.config.vocab_size)
    assert calls == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_uses_the_parameters(calls):
    layer = make_layer().eval()
    pack_experts(layer)
    with torch.no_grad():
        x = normal(5, 8)
        torch.testing.assert_close(
            torch.compile(output, fullgraph=True, backend="aot_eager")(layer, x), output(layer, x)
        )
    assert calls == [5]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "model must be a torch.nn.Module, got int"),
        (nn.Linear(2, 2), "model must have experts of this project or on .* interface; Linear has none"),
        (make_layer().double(), "but of experts, .* got float64"),
    ],
    ids=["no-module", "no-experts", "float64"],
)
def test_what_cannot_be_packed_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        pack_experts(model)


def test_an_adapter_that_is_added_later_is_used(calls):
    layer = make_layer().eval()
    pack_experts(layer)
    lora = ExpertLoRA(layer.experts.gate_up_proj, layer.experts.down_proj, r=2, alpha=2)
    for weight in lora.lora_B.values():
        nn.init.normal_(weight)
    layer.experts.expert_lora = lora
    with torch.no_grad():
        adapted = output(layer)
        assert calls == []
        del layer.experts.expert_lora
        assert (output(layer) - adapted).abs().max() > 1e-3
    assert calls == [5]


def test_a_write_is_seen_that_the_sample_does_not_show():
    layer = make_layer().eval()
    pack_experts(layer)
    with torch.no_grad():
        layer.experts.down_proj[0, 1, 1] += 1  # within a tensor whose sample has every row and column
        layer.experts.down_proj[0, 1, 1] -= 1
        with pytest.raises(ValueError, match="have changed since"):
            output(layer)


def test_another_activation_is_refused():
    layer = make_layer().eval()
    pack_experts(layer)
    object.__setattr__(layer.experts, "config", replace(layer.experts.config, activation="relu"))
    with torch.no_grad(), pytest.raises(ValueError, match="have changed since"):
        output(layer)


def test_adapted_experts_and_other_layouts_are_refused():
    layer = make_layer()
    layer.experts.expert_lora = ExpertLoRA(layer.experts.gate_up_proj, layer.experts.down_proj, r=2, alpha=2)
    with pytest.raises(ValueError, match="but of experts, expert_lora adapts them; merge the adapter first"):
        pack_experts(layer)
    model = tiny_family("gpt_oss").eval()
    moe_runtime.accelerate_model(model)
    with pytest.raises(ValueError, match="they run on grouped_gemm instead of expert_ffn"):
        pack_experts(model)
