"""What a training run will hold in memory, from its recipe and the checkpoint's configuration alone.

Nothing is loaded. The model is made of fake tensors, which have shapes and no memory, is prepared as for
training, and takes one step forward and backward; `LiveBytes` counts what that step would have kept alive at
each moment. So what is saved for backward, checkpointed or computed again is what the code does, for our
model and every other. The states of the optimizer are arithmetic on the shapes of what is trained.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

import moe_runtime.hf  # noqa: F401  registers our model with the Auto classes
from moe_runtime.errors import RunError
from moe_runtime.experts import Experts
from moe_runtime.hf.accelerate import is_experts
from moe_runtime.hf.loading import json_object
from moe_runtime.train.data.load import check_max_length
from moe_runtime.train.kernels import BYTES as KERNEL_BYTES
from moe_runtime.train.live_bytes import LiveBytes
from moe_runtime.train.model import set_up_model
from moe_runtime.train.optimizer_bytes import optimizer_bytes
from moe_runtime.train.recipe import TrainRecipe


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one device, and numbers of parameters of the whole model.

    `peak` is weights + optimizer + gathered + kernels + `step_peak`, the most that gradients, activations and
    temporary tensors take together; they are largest at different moments.
    """

    processes: int
    tokens: int  # of a micro-batch of one process
    total_parameters: int
    trained_parameters: int
    weights: int
    optimizer: int
    gradients: int
    activations: int  # alive between forward and backward, the loss's own gradients among them
    loss: int  # of the activations, gradients that the loss has made; 0 where it makes logits
    logits: int  # what the logits of all tokens would take in float32
    gathered: int  # whole weights and gradients of the largest layers, with fsdp
    kernels: int  # that oneDNN compiles and keeps, about; 0 for float32 and on a GPU
    step_peak: int
    peak: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def plan_memory(recipe: TrainRecipe, processes: int = 1) -> MemoryPlan:
    """The memory of one of so many processes while it trains by this recipe.

    Every row is full and every token counts, which is the most that rows of `max_length` can need.

    Raises:
        RunError: the checkpoint has no configuration or takes no such rows, the optimizer is not known here,
            or `processes` does not fit the section `parallel`.
        ValueError: the configuration is of a model that transformers does not know.
    """
    _check_processes(recipe, processes)
    with FakeTensorMode():
        model, obstacle = _prepared(recipe)
        shares = _shares(model, recipe, processes)
        named = dict(model.named_parameters())
        live = LiveBytes()
        live.ignore([*named.values(), *model.buffers()])
        for name, parameter in named.items():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_keeping_part(live, shares[name]))
        with live:  # the second micro-batch finds the gradients of the first
            seen = [
                _micro_batch(model, recipe, live, obstacle) for _ in range(min(recipe.train.accumulate, 2))
            ]
    weights = sum(_local_bytes(p, shares[name]) for name, p in named.items())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    states = optimizer_bytes(
        recipe.train.optimizer,
        ((id(p) in embeddings, _local_shape(p, shares[name])) for name, p in trained.items()),
    )
    gathered, kernels = _gathered(model, recipe, processes), live.kernels.number * KERNEL_BYTES
    return MemoryPlan(
        processes=processes,
        tokens=recipe.train.batch_size * recipe.data.max_length,
        total_parameters=sum(p.numel() for p in named.values()),
        trained_parameters=sum(p.numel() for p in trained.values()),
        weights=weights,
        optimizer=states,
        gradients=sum(_local_bytes(p, shares[name]) for name, p in trained.items()),
        gathered=gathered,
        kernels=kernels,
        step_peak=round(live.peak),
        peak=weights + states + gathered + kernels + round(live.peak),
        **seen[-1],
    )


# --- the fake model and its step ---


def _prepared(recipe: TrainRecipe) -> tuple[Any, str | None]:
    """The model, and why its loss makes logits of all tokens."""
    file = Path(recipe.model) / "config.json"
    if not file.is_file():
        raise RunError(f"{recipe.model} must be a checkpoint folder with a config.json, and has none")
    json_object(file)
    config = AutoConfig.from_pretrained(recipe.model)
    check_max_length(recipe.data, getattr(config, "max_position_embeddings", None))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    prepared = set_up_model(model, recipe)
    return model.train(), prepared.linear_loss


def _micro_batch(model: Any, recipe: TrainRecipe, live: LiveBytes, obstacle: str | None) -> dict[str, int]:
    """Forward and backward of a full micro-batch; what is alive between them."""
    before = live.current
    B, L = recipe.train.batch_size, recipe.data.max_length
    tokens = B * L
    if recipe.data.packing:  # one row of them all, a document for each that is full
        ids_BL = torch.zeros(1, tokens, dtype=torch.int64)
        ends = _Ends([L] * B)
        inputs: dict[str, Any] = {"position_ids": torch.arange(L).repeat(B)[None]}
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": L, "max_length_k": L}
    else:
        ids_BL = torch.zeros(B, L, dtype=torch.int64)
        inputs = {"attention_mask": torch.ones_like(ids_BL)}
    inputs |= {"input_ids": ids_BL, "labels": ids_BL.clone()}
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bfloat16"):
        loss = model(**inputs, num_items_in_batch=tokens, use_cache=False).loss
    activations = round(live.current - before)
    loss.backward()
    head = model.get_output_embeddings()
    made = _gradients_of_loss(head, tokens) if obstacle is None else 0
    return {"activations": activations, "loss": made, "logits": 4 * tokens * head.weight.shape[0]}


def _gradients_of_loss(head: Any, tokens: int) -> int:
    """Of hidden states, and of the head where it is trained."""
    return 4 * tokens * head.weight.shape[1] + 4 * sum(
        p.numel() for p in head.parameters() if p.requires_grad
    )


class _Ends:
    """What attention by document asks `cu_seq_lens_q`; a fake tensor has no numbers to tell."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def diff(self) -> "_Ends":
        return self

    def tolist(self) -> list[int]:
        return self.lengths


def _keeping_part(live: LiveBytes, parts: int) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.keep_part(parameter.grad, parts)

    return hook


# --- processes ---


def _check_processes(recipe: TrainRecipe, processes: int) -> None:
    parallel = recipe.parallel
    if processes < 1:
        raise RunError(f"--processes must be at least 1, got {processes}")
    if parallel.data == "none" and processes > 1:
        raise RunError(f"parallel.data must be 'ddp' or 'fsdp' with {processes} processes, got 'none'")
    if processes % parallel.experts:
        raise RunError(
            f"parallel.experts must divide the number of processes, which is {processes}, got "
            f"{parallel.experts}"
        )


def _shares(model: nn.Module, recipe: TrainRecipe, processes: int) -> dict[str, int]:
    """Among how many processes each parameter is divided."""
    X, is_sharded = recipe.parallel.experts, recipe.parallel.data == "fsdp"
    experts = _stacked_experts(model)
    return {
        name: processes if is_sharded else X if id(parameter) in experts else 1
        for name, parameter in model.named_parameters()
    }


def _stacked_experts(model: nn.Module) -> set[int]:
    """Parameters that expert parallelism divides."""
    found = (module for module in model.modules() if is_experts(module) or isinstance(module, Experts))
    return {id(parameter) for module in found for parameter in module.parameters()}


def _gathered(model: Any, recipe: TrainRecipe, processes: int) -> int:
    """With fsdp: weights that are whole for a time. Those outside the layers, and of two layers, of which one
    is fetched while the other computes; experts as their process has them.
    """
    if recipe.parallel.data != "fsdp" or processes == 1:
        return 0
    experts, X = _stacked_experts(model), recipe.parallel.experts

    def whole(module: nn.Module) -> int:
        return sum(p.numel() * p.itemsize // (X if id(p) in experts else 1) for p in module.parameters())

    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    outside = whole(model) - sum(map(whole, layers))
    return outside + sum(sorted(map(whole, layers))[-2:])


def _local_shape(parameter: Tensor, share: int) -> tuple[int, ...]:
    """Split along the first axis, as in most cases."""
    first, *others = parameter.shape
    return (-(-first // share), *others)


def _local_bytes(parameter: Tensor, share: int) -> int:
    return -(-parameter.numel() // share) * parameter.itemsize
