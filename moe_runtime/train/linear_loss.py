"""Cross-entropy of a language model's head without the logits of all tokens.

    z[t] = x[t] @ weight.T + bias,  with a cap: z <- cap · tanh(z / cap)
    loss = sum over counted t of  logsumexp(z[t]) - z[t, target[t]]

Rows go through in chunks. Forward already makes the gradients, so that a chunk's logits are made once and are
kept by nobody; backward multiplies what is there by the one number that it is given. The arithmetic between
the products is float32 (float64 for float64).

PyTorch's own `linear_cross_entropy` with options is not used: it returns the loss rounded to the dtype of the
products, knows no cap, counts rows that no label counts, and is not in every PyTorch that this project takes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from moe_runtime_kernels._cpu import is_widened, onednn_takes, product, weight_grad
from moe_runtime_kernels._dispatch import accumulator, cast_for_autocast
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import BaseModelOutputWithPast

from moe_runtime.linear import Linear

IGNORED = -100


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None = None,
    *,
    cap: float | None = None,
    ignore_index: int = IGNORED,
) -> Tensor:
    """The sum of the tokens' losses, see above; 0 over no counted token. One backward pass only.

    On a CPU rows that do not count are left out of all products; elsewhere that would wait for the device.

    Args:
        x_TD: hidden states that the head reads.
        weight_VD: the head's matrix; x is cast to its dtype, and both to autocast's.
        target_T: the token to predict in each row, int64, or `ignore_index`.
        bias_V: added to the logits.
        cap: of the logits, as Gemma 2 caps them.
        ignore_index: rows with this target do not count.

    Returns:
        A scalar of float32 (float64 for float64).
    """
    (x_TD,) = cast_for_autocast(x_TD.to(weight_VD.dtype))
    if x_TD.device.type == "cpu" and not _is_traced(x_TD):
        counted = (target_T != ignore_index).nonzero().squeeze(1)
        if len(counted) < len(target_T):
            x_TD, target_T = x_TD.index_select(0, counted), target_T[counted]
    operands: tuple[Tensor | None, ...] = (x_TD, weight_VD, bias_V)
    if not torch.is_grad_enabled():  # or gradients would be made for nobody
        operands = tuple(None if operand is None else operand.detach() for operand in operands)
    return _LinearCrossEntropy.apply(*operands, target_T, cap, ignore_index)


def _is_traced(x: Tensor) -> bool:
    """Whether this is no computation but a description of one, in which labels cannot decide sizes."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_VD, bias_V, target_T, cap, ignore_index):
        T, D = x_TD.shape
        acc = accumulator(x_TD.dtype)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        ctx.dtypes = x_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        # cast here and not before: autograd would round the sums in dweight and widen them again
        with torch.autocast(x_TD.device.type, enabled=False):
            if not is_widened(x_TD, weight_VD, bias_V):
                weight_VD = weight_VD.to(x_TD.dtype)
                bias_V = None if bias_V is None else bias_V.to(x_TD.dtype)
        dx_TD = torch.empty_like(x_TD) if needs_x else None
        dweight_VD = None
        dbias_V = torch.zeros_like(bias_V, dtype=acc) if needs_bias else None
        loss = x_TD.new_zeros((), dtype=acc)
        with torch.autocast(x_TD.device.type, enabled=False):
            # as many rows as the width: a chunk's logits are no larger than the gradient of the weight
            for start in range(0, T, D):
                rows = slice(start, start + D)
                z_MV = product(x_TD[rows], weight_VD, bias_V).to(acc)
                part, dz_MV = _chunk(z_MV, target_T[rows], cap, ignore_index, any(ctx.needs_input_grad))
                loss += part
                if dbias_V is not None:
                    dbias_V += dz_MV.sum(0)
                dz_MV = dz_MV.to(x_TD.dtype)
                if dx_TD is not None:
                    dx_TD[rows] = product(dz_MV, weight_VD.t())
                if dweight_VD is not None:
                    _add_product(dweight_VD, dz_MV, x_TD[rows])
                elif needs_weight:
                    dweight_VD = weight_grad(dz_MV, x_TD[rows], acc)
        if needs_weight and dweight_VD is None:
            dweight_VD = torch.zeros_like(weight_VD, dtype=acc)
        ctx.save_for_backward(dx_TD, dweight_VD, dbias_V)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # in place: a second pass through these gradients is an error, which autograd finds
        scaled = (None if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors)
        grads = (None if d is None else d.to(dtype) for d, dtype in zip(scaled, ctx.dtypes, strict=True))
        return *grads, None, None, None


def _add_product(dweight_VD: Tensor, dz_MV: Tensor, x_MD: Tensor) -> None:
    if dweight_VD.dtype == x_MD.dtype and not onednn_takes(dz_MV, x_MD.t()):
        dweight_VD.addmm_(dz_MV.t(), x_MD)
    else:
        dweight_VD += weight_grad(dz_MV, x_MD, dweight_VD.dtype)


def _chunk(
    z_MV: Tensor, target_M: Tensor, cap: float | None, ignore_index: int, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """The sum of a chunk's losses, and the gradient of its logits, in their place if it is needed."""
    slope_MV = None
    if cap is not None:
        z_MV.div_(cap).tanh_()
        slope_MV = 1 - z_MV.square() if needs_grad else None
        z_MV.mul_(cap)
    counted_M = (target_M != ignore_index).to(z_MV.dtype)
    # of the rows that do not count; any other target outside of the vocabulary is an error
    target_M1 = target_M.where(target_M != ignore_index, 0)[:, None]
    z_MV -= z_MV.amax(dim=1, keepdim=True)
    chosen_M = z_MV.gather(1, target_M1).squeeze(1)
    total_M = z_MV.exp_().sum(1)
    loss = ((total_M.log() - chosen_M) * counted_M).sum()
    if needs_grad:
        z_MV *= (counted_M / total_M)[:, None]
        z_MV.scatter_(1, target_M1, z_MV.gather(1, target_M1) - counted_M[:, None])
        if slope_MV is not None:
            z_MV *= slope_MV
    return loss, z_MV


# --- in a model of transformers ---


def linear_loss_obstacle(model: Any) -> str | None:
    """Why `use_linear_loss` cannot serve this causal LM; None if it can."""
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, Linear):
        return f"its head is a {type(head).__name__}, not a Linear"
    if model.loss_function.__name__ != "ForCausalLMLoss":
        return f"its loss is {model.loss_function.__name__}, not that of a causal language model"
    config = model.config.get_text_config()
    scales = (getattr(config, name, 1.0) for name in ("logit_scale", "logits_scaling"))
    if head.bias is not None and any(scale not in (1.0, None) for scale in scales):
        return "it scales logits to which its head has added a bias"
    if model.base_model is model:
        return "it has no base model below its head"
    return _difference(model)


def use_linear_loss(model: Any) -> None:
    """Let a causal LM compute its loss from hidden states where labels are given, in place.

    The loss is that of the model's own forward, `num_items_in_batch` and `shift_labels` included. The output
    then has no `logits`. Without labels, and with return_dict=False, the model is what it was.

    It works by what all of transformers' causal LMs do: call `lm_head`, scale or cap, call `loss_function`.
    The head passes hidden states on, which are scaled in the place of logits, and the loss applies the head.

    Args:
        model: before it is wrapped, as by adapters or for several processes. The head's weight must be whole
            when the loss is computed, so the head is no unit of its own in a sharded model.

    Raises:
        ValueError: the model's head or loss is another; `linear_loss_obstacle` says so before.
    """
    obstacle = linear_loss_obstacle(model)
    if obstacle is not None:
        raise ValueError(f"model must be a causal LM with a linear head: {obstacle}")
    model.forward = _without_logits(model)


def _without_logits(model: Any) -> Callable[..., Any]:
    """The model's forward, but with the loss from hidden states."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    plain_forward, plain_loss = model.forward, model.loss_function
    cap = getattr(config, "final_logit_softcapping", None)

    def loss(logits, labels, vocab_size, **options):
        return _causal_loss(logits, labels, head, cap, **options)

    @wraps(plain_forward)
    def forward(*arguments, **named):
        if named.get("labels") is None or named.get("return_dict") is False:
            return plain_forward(*arguments, **named)
        head.forward, model.loss_function = _passed_on, loss
        if cap is not None:
            config.final_logit_softcapping = None
        try:
            output = plain_forward(*arguments, **named)
        finally:
            del head.forward
            model.loss_function = plain_loss
            if cap is not None:
                config.final_logit_softcapping = cap
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    return forward


def _passed_on(x: Tensor) -> Tensor:
    return x


def _causal_loss(
    x_BLD: Tensor,
    labels: Tensor,
    head: nn.Linear,
    cap: float | None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """What transformers' ForCausalLMLoss is of the head's logits."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target_T = shift_labels.to(x_BLD.device).flatten()
    total = linear_cross_entropy(
        x_BLD.flatten(0, -2), head.weight, target_T, head.bias, cap=cap, ignore_index=ignore_index
    )
    count = (target_T != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


# --- what a model does between its head and its loss ---


def _difference(model: Any) -> str | None:
    """Try the model's own code from hidden states to the loss, once with logits and once without.

    The base model and the head are not run: others stand in, so that this takes no time, and works where the
    weights are fake. Logits are large, so that a cap shows.
    """
    vocab = model.get_output_embeddings().weight.shape[0]
    with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids_BL = torch.arange(8)[None] % vocab
        with _stand_ins(model, 300 * torch.randn(1, 8, 2), torch.randn(vocab, 2)):
            try:
                with_logits = model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
                without = _without_logits(model)(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
            except Exception as error:  # its code is not ours, and the plain loss serves it all the same
                return f"its forward needs more than hidden states: {error}"
        if torch.allclose(with_logits, without, rtol=1e-4):
            return None
    return f"{type(model).__name__} changes logits in a way that is not known here"


@contextmanager
def _stand_ins(model: Any, x_BLD: Tensor, weight_VD: Tensor) -> Iterator[None]:
    """Inside, the base model returns these hidden states, and the head has this weight."""
    head, base, was_training = model.get_output_embeddings(), model.base_model, model.training
    stand_in = type(head)(*weight_VD.t().shape, bias=False)
    stand_in.weight = nn.Parameter(weight_VD)
    before = vars(base).get("forward")
    base.forward = lambda *_, **__: _BaseOutput(last_hidden_state=x_BLD)
    model.set_output_embeddings(stand_in)
    model.training = False  # not train(False), which is for all modules
    try:
        yield
    finally:
        model.training = was_training
        model.set_output_embeddings(head)
        del base.forward
        if before is not None:
            base.forward = before


class _BaseOutput(BaseModelOutputWithPast):
    """Without what some models have besides."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
