"""The loss of a head without its logits: the same numbers as with them, in functions and in whole models."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from close import assert_close_to_exact
from moe_families import tiny_family
from moe_runtime_kernels import _cpu
from tiny_models import DENSE, MOE, assert_equal_up_to_rounding, randn, tiny_model, tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainers import THEIR_WARNINGS
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from moe_runtime.train import linear_loss
from moe_runtime.train.linear_loss import linear_cross_entropy, linear_loss_obstacle, use_linear_loss

T, D, V = 37, 8, 53  # five chunks, the last one short
OPTIONS = {"plain": {}, "cap": {"cap": 2.0}, "bias": {"bias": True}, "both": {"cap": 0.7, "bias": True}}


def with_logits(x_TD, weight_VD, target_T, bias_V=None, *, cap=None):
    """The definition. Products in the operands' dtype, everything after them in float32, as transformers."""
    z_TV = linear(x_TD, weight_VD, bias_V)
    z_TV = z_TV if z_TV.dtype == torch.float64 else z_TV.float()
    if cap is not None:
        z_TV = cap * (z_TV / cap).tanh()
    return cross_entropy(z_TV, target_T, reduction="sum")


def make_target(num_ignored: int = 9):
    target_T = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1))
    target_T[torch.randperm(T, generator=torch.Generator().manual_seed(2))[:num_ignored]] = -100
    return target_T


def run(loss, dtype, *, cap=None, bias=False, compute=None, target_T=None):
    """The loss and all gradients, of inputs that are rounded to `dtype` and computed with in `compute`."""
    shapes = [(T, D), (V, D)] + ([(V,)] if bias else [])
    leaves = [
        randn(*shape, seed=i).to(dtype).to(compute or dtype).requires_grad_()
        for i, shape in enumerate(shapes)
    ]
    target_T = make_target() if target_T is None else target_T
    value = loss(*leaves[:2], target_T, *leaves[2:], cap=cap)
    (0.3 * value).backward()
    return {"loss": value.detach(), **{f"d{i}": leaf.grad for i, leaf in enumerate(leaves)}}


class TestFunction:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_equals_the_loss_of_logits(self, options, dtype):
        actual, same = run(linear_cross_entropy, dtype, **options), run(with_logits, dtype, **options)
        exact = run(with_logits, dtype, **options, compute=torch.float64)
        for name in exact:
            if dtype == torch.float64:
                assert_equal_up_to_rounding(name, actual[name], exact[name])
            else:
                assert_close_to_exact(name, actual[name], same[name], exact[name])

    @pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
    def test_products_through_onednn_are_the_same(self, monkeypatch):
        same, exact = (run(with_logits, torch.float32, compute=dtype) for dtype in (None, torch.float64))
        monkeypatch.setattr(_cpu, "ONEDNN_IS_FASTER", True)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            with Operations() as seen:
                actual = run(linear_cross_entropy, torch.float32)
        finally:
            torch.set_float32_matmul_precision(before)
        assert torch.ops.aten.addmm_.default not in seen.names
        for name in exact:
            assert_close_to_exact(name, actual[name], same[name], exact[name])

    @pytest.mark.parametrize("num_ignored", [0, T - 1])
    def test_counts_only_what_is_not_ignored(self, num_ignored):
        target_T = make_target(num_ignored)
        actual = run(linear_cross_entropy, torch.float64, target_T=target_T)
        expected = run(with_logits, torch.float64, target_T=target_T)
        for name, value in expected.items():
            assert_equal_up_to_rounding(name, actual[name], value)

    @pytest.mark.parametrize("rows", [0, 3])
    def test_nothing_counted_is_zero(self, rows):
        x_TD, weight_VD = randn(rows, D).requires_grad_(), randn(V, D).requires_grad_()
        loss = linear_cross_entropy(x_TD, weight_VD, torch.full((rows,), -100))
        loss.backward()
        assert loss.item() == 0.0
        assert not x_TD.grad.any()
        assert not weight_VD.grad.any()

    def test_a_label_that_is_no_token_is_an_error(self):
        target_T = make_target()
        target_T[0] = -1
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(randn(T, D), randn(V, D), target_T)

    def test_a_frozen_head_gets_no_gradient(self):
        x_TD, weight_VD, target_T = randn(T, D).requires_grad_(), randn(V, D), make_target()
        linear_cross_entropy(x_TD, weight_VD, target_T).backward()
        mine = x_TD.grad.clone()
        x_TD.grad = None
        with_logits(x_TD, weight_VD, target_T).backward()
        assert_equal_up_to_rounding("dx", mine, x_TD.grad)
        assert weight_VD.grad is None

    def test_evaluation_makes_no_gradients(self):
        x_TD, weight_VD, target_T = randn(T, D).requires_grad_(), randn(V, D).requires_grad_(), make_target()
        expected = linear_cross_entropy(x_TD, weight_VD, target_T)
        with torch.no_grad(), Operations() as seen:
            assert torch.equal(linear_cross_entropy(x_TD, weight_VD, target_T), expected.detach())
        assert (V, D) not in seen.shapes

    def test_a_second_backward_pass_is_an_error(self):
        x_TD = randn(T, D).requires_grad_()
        loss = linear_cross_entropy(x_TD, randn(V, D), make_target())
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_holds_no_logits_of_all_rows(self):
        x_TD, weight_VD = randn(16 * D, D).requires_grad_(), randn(V, D).requires_grad_()
        with Operations() as seen:
            linear_cross_entropy(x_TD, weight_VD, torch.zeros(16 * D, dtype=torch.long)).backward()
        assert (V, D) in seen.shapes
        assert (D, V) in seen.shapes
        assert max(map(math.prod, seen.shapes)) < 16 * D * V / 4


class Operations(TorchDispatchMode):
    """The operations, and the shapes of the tensors that they made."""

    def __init__(self):
        super().__init__()
        self.shapes, self.names = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func)
        self.shapes |= {
            tuple(leaf.shape)
            for leaf in tree_leaves(out)
            if isinstance(leaf, torch.Tensor) and not func.is_view
        }
        return out


# --- in models ---


def batch():
    labels = tokens(2, 11)
    labels[0, :5] = -100
    return {"input_ids": tokens(2, 11), "labels": labels}


def step(model, **more):
    """The loss and all gradients of a training step; and the output."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)  # some routers draw
    output = model(**batch(), **more)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), **grads}, output


def assert_same_step(model, **more):
    """In float64, so that only a wrong formula can differ."""
    model = model.double()
    linear_model = copy.deepcopy(model)
    use_linear_loss(linear_model)
    expected, _ = step(model, **more)
    actual, output = step(linear_model, **more)
    assert "logits" not in output
    assert actual.keys() == expected.keys()
    # transformers' loss rounds logits to float32
    assert_equal_up_to_rounding("loss", actual["loss"].float(), expected["loss"].float(), 1e-6)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        if name in expected:
            assert_equal_up_to_rounding(name, actual[name], expected[name], 1e-5)


OURS = {
    "dense": DENSE,
    "moe": MOE,
    "tied": MOE | {"tie_word_embeddings": True},
    "scaled": DENSE | {"logit_scale": 0.25},
    "capped": DENSE | {"final_logit_softcapping": 1.5, "logit_scale": 2.0},
    "bias": DENSE | {"head_bias": True},
}


class TestOurModel:
    @pytest.mark.parametrize("kind", OURS.values(), ids=OURS)
    def test_step_is_that_of_the_plain_loss(self, kind):
        assert_same_step(tiny_model(kind))

    @pytest.mark.parametrize("count", [31, torch.tensor(31)], ids=["number", "tensor"])
    def test_keeps_the_contract_of_accumulation(self, count):
        assert_same_step(tiny_model(MOE), num_items_in_batch=count)

    def test_takes_labels_that_are_shifted_already(self):
        assert_same_step(tiny_model(DENSE), shift_labels=tokens(2, 11, seed=5))

    def test_without_labels_nothing_changes(self):
        model = tiny_model(DENSE | {"final_logit_softcapping": 1.5})
        expected = model(tokens(2, 11)).logits
        use_linear_loss(model)
        step(model)
        assert torch.equal(model(tokens(2, 11)).logits, expected)
        assert torch.equal(model(tokens(2, 11), labels=tokens(2, 11), return_dict=False)[1], expected)

    def test_restores_the_model_when_its_forward_fails(self):
        model = tiny_model(DENSE)
        expected = model(tokens(2, 11)).logits
        use_linear_loss(model)
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            model(labels=tokens(2, 11))
        assert torch.equal(model(tokens(2, 11)).logits, expected)

    def test_autocast_has_its_products_in_half_precision(self):
        model = tiny_model(MOE)
        linear_model = copy.deepcopy(model)
        use_linear_loss(linear_model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, actual = model(**batch()).loss, linear_model(**batch()).loss
        exact = model(**batch()).loss
        assert actual.dtype == torch.float32
        assert actual.item() != pytest.approx(exact.item(), rel=1e-7)  # it did round
        assert actual.item() == pytest.approx(expected.item(), rel=1e-4)

    def test_autocast_leaves_the_sums_of_gradients_in_float32(self):
        weight_VD = torch.randn(7, 4, requires_grad=True)
        x_TD, target_T = torch.randn(64, 4), torch.randint(7, (64,))  # in chunks of 4 rows
        with torch.autocast("cpu", dtype=torch.bfloat16):
            linear_cross_entropy(x_TD, weight_VD, target_T).backward()
        assert (weight_VD.grad != weight_VD.grad.bfloat16().float()).any()

    @THEIR_WARNINGS
    def test_serves_adapters_of_peft(self):
        from peft import LoraConfig, get_peft_model

        model = tiny_model(DENSE)
        expected = model(**batch()).loss.item()
        use_linear_loss(model)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
        output = adapted(**batch())
        assert "logits" not in output
        assert output.loss.item() == pytest.approx(expected, rel=1e-6)


# one for each way to get from hidden states to the loss
FAMILIES = ["mixtral", "granitemoe", "cohere2_moe", "nemotron_h", "deepseek_v3", "phimoe"]


class TestFamilies:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_step_is_that_of_the_plain_loss(self, name):
        assert_same_step(tiny_family(name))

    def test_another_head_is_refused(self):
        model = tiny_model(DENSE)
        model.lm_head = torch.nn.Sequential(model.lm_head)
        assert linear_loss_obstacle(model) == "its head is a Sequential, not a Linear"
        with pytest.raises(
            ValueError, match="model must be a causal LM with a linear head: its head is a Seq"
        ):
            use_linear_loss(model)

    def test_another_loss_is_refused(self):
        model = tiny_model(DENSE)

        def my_loss(logits, labels, vocab_size):
            return logits.sum()

        model.loss_function = my_loss
        assert "its loss is my_loss" in linear_loss_obstacle(model)

    def test_a_scaled_bias_is_refused(self):
        model = tiny_model(DENSE | {"head_bias": True, "logit_scale": 0.5})
        assert "scales logits to which its head has added a bias" in linear_loss_obstacle(model)

    @pytest.mark.parametrize("fake", [False, True])
    def test_a_cap_by_another_name_is_refused(self, fake):
        config = RecurrentGemmaConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
        with FakeTensorMode() if fake else nullcontext():
            model = RecurrentGemmaForCausalLM(config)
            head, training = model.lm_head, model.training
            assert "changes logits in a way that is not known here" in linear_loss_obstacle(model)
        assert model.lm_head is head
        assert model.training is training
        assert "forward" not in vars(model.model)


def test_no_chunks_gradient_is_rounded_before_it_is_added(monkeypatch):
    dtypes = []

    def spy(grad_MO, x_MI, dtype=None):
        dtypes.append(dtype)
        return _cpu.weight_grad(grad_MO, x_MI, dtype)

    monkeypatch.setattr(linear_loss, "weight_grad", spy)
    draw = torch.Generator().manual_seed(0)
    x_TD, weight_VD = (torch.randn(*size, generator=draw).requires_grad_() for size in ((20, 8), (30, 8)))
    target_T = torch.randint(30, (20,), generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(x_TD, weight_VD, target_T).backward()
    assert dtypes == 3 * [torch.float32]
