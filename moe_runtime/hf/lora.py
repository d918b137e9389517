"""Per-expert LoRA for whole models, in the files that PEFT writes and reads.

The adapters of experts are `ExpertLoRA` modules, computed as grouped products; those of linear layers in the
same file are PEFT's own. An adapter of PEFT with `target_parameters` loads here, and one saved here in PEFT.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moe_runtime.expert_lora import TARGETS, ExpertLoRA
from moe_runtime.experts import Experts
from moe_runtime.hf.experts_interface import NAME, served_by

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."  # of every key of PEFT's
ADAPTER = "default"  # PEFT's name for an only adapter; not in its files
# what PEFT refuses for stacked weights, or what adapts some modules or tokens otherwise than others
PLAIN = {
    "peft_type": "LORA",
    "lora_dropout": 0,
    "bias": "none",
    "use_dora": False,
    "alora_invocation_tokens": None,
    "layers_to_transform": None,
    "exclude_modules": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def add_expert_lora(
    model: PreTrainedModel,
    r: int = 8,
    alpha: int = 16,
    targets: Sequence[str] = TARGETS,
    *,
    use_rslora: bool = False,
    target_modules: Sequence[str] | str = (),
) -> None:
    """Add adapters to every layer's experts; all other parameters but those of `target_modules` are frozen.

    Args:
        model: our causal LM, or any MoE model of transformers with experts_implementation="moe_runtime".
        r: rank of every expert's adapters.
        alpha: their scaling is alpha / r, or alpha / sqrt(r) with `use_rslora`.
        targets: the experts' weights, "gate_up_proj", "down_proj" or both.
        use_rslora: see `alpha`.
        target_modules: linear layers that get adapters of PEFT, as in its LoraConfig: ["q_proj", "v_proj"].

    Raises:
        ValueError: the model has no experts, experts that the runtime does not compute, or adapters already.
        ModuleNotFoundError: `target_modules` are given and PEFT is not installed.
    """
    chosen = dict.fromkeys(_layers(model), tuple(targets))
    _check_bare(model)
    with _undone_on_failure(model):
        _attach(model, chosen, target_modules, r=r, alpha=alpha, use_rslora=use_rslora)


def save_expert_lora(model: PreTrainedModel, folder: str | Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT does, each replaced when whole."""
    adapted = _adapted(model)
    parameters = [
        f"{name}.{target}" for name, layer in adapted.items() for target in layer.expert_lora.lora_A
    ]
    short = sorted({".".join(name.split(".")[-2:]) for name in parameters})
    exact = {
        f"{name}.{target}" for name, found in _matched(_layers(model), short).items() for target in found
    }
    lora = next(iter(adapted.values())).expert_lora
    modules = model.peft_config[ADAPTER].target_modules if hasattr(model, "peft_config") else []
    config = PLAIN | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path or None,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.use_rslora,
        "target_modules": modules if isinstance(modules, str) else sorted(modules),
        "target_parameters": short if exact == set(parameters) else sorted(parameters),
        "inference_mode": True,
    }
    tensors = {
        key: view.detach().reshape(_file_shape(view)).contiguous().cpu()
        for key, view in _views(model).items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{WEIGHTS_NAME}.part"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / WEIGHTS_NAME)
    unfinished = folder / f"{CONFIG_NAME}.part"
    unfinished.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    os.replace(unfinished, folder / CONFIG_NAME)


def load_expert_lora(model: PreTrainedModel, folder: str | Path) -> None:
    """Add the adapters in a folder that `save_expert_lora` or PEFT wrote, ready to be trained further.

    Raises:
        FileNotFoundError: a file of the adapter is not there.
        ValueError: the adapter is not of a kind that is computed here, or not made for this model; the model
            then has no adapters.
        ModuleNotFoundError: the adapter is also one of linear layers, and PEFT is not installed.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    chosen = _matched(_layers(model), config["target_parameters"])
    _check_bare(model)
    modules = config.get("target_modules") or ()
    settings = {"r": config["r"], "alpha": config["lora_alpha"], "use_rslora": bool(config.get("use_rslora"))}
    with _undone_on_failure(model):
        _attach(model, chosen, modules, **settings)
        views = _views(model)
        _check_tensors(folder, config, tensors, views)
    with torch.no_grad():
        for key, view in views.items():
            view.copy_(tensors[key].view(view.shape))


def merge_expert_lora(model: PreTrainedModel) -> None:
    """Add every adapter to the weights it adapts, in place, and remove it."""
    _adapted(model)
    _detach(model, merge=True)


def remove_expert_lora(model: PreTrainedModel) -> None:
    """Remove the adapters; the weights are as they were before."""
    _adapted(model)
    _detach(model, merge=False)


# --- the model's side ---


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    """The experts of every layer by the name of their module, after checking that all are computed here."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            module.check_takes_lora()
        elif hasattr(module, "is_transposed") and hasattr(module, "down_proj"):
            _check_served(name, module)
        else:
            continue
        layers[name] = module
    if not layers:
        raise ValueError(
            f"model must have experts for per-expert LoRA, got {type(model).__name__} without any"
        )
    return layers


def _refuse_other_implementations(module: Any, _: Any) -> None:
    """A hook before the forward of experts with adapters, which another implementation would leave out."""
    implementation = module.config._experts_implementation
    if implementation != NAME:
        raise ValueError(
            f"experts_implementation must be {NAME!r} for per-expert LoRA, got {implementation!r}; call "
            f"model.set_experts_implementation({NAME!r})"
        )


def _check_served(name: str, module: Any) -> None:
    _refuse_other_implementations(module, None)
    if not module.has_gate or served_by(module) != "expert_ffn":
        raise ValueError(
            "experts must have gate_up_proj [E, 2F, D] and down_proj [E, D, F] and run as one expert_ffn for "
            f"per-expert LoRA, got others in {name} ({type(module).__name__})"
        )


def _adapted(model: PreTrainedModel) -> dict[str, Any]:
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "expert_lora", None), ExpertLoRA)
    }
    if not layers:
        raise ValueError("model must have adapters from add_expert_lora or load_expert_lora, got none")
    return layers


def _check_bare(model: PreTrainedModel) -> None:
    if any(isinstance(module, ExpertLoRA) for module in model.modules()):
        raise ValueError("model must have no per-expert LoRA yet, got one that has; remove or merge it first")
    if hasattr(model, "peft_config"):
        raise ValueError(
            "model must have no adapters of PEFT yet, got one that has; name the linear layers to adapt in "
            "target_modules of add_expert_lora"
        )


@contextmanager
def _undone_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """An exception inside leaves a model that had no adapters as it was."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        yield
    except Exception:
        _detach(model, merge=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        raise


def _attach(
    model: PreTrainedModel,
    chosen: Mapping[str, Sequence[str]],
    target_modules: Sequence[str] | str,
    *,
    r: int,
    alpha: int,
    use_rslora: bool,
) -> None:
    model.requires_grad_(False)
    # what transformers renames and splits on saving: nothing, since Trainer does not undo it on resuming
    model._conversions_without_lora = getattr(model, "_weight_conversions", None)
    model._weight_conversions = []
    if target_modules:
        _inject_peft(model, target_modules, r=r, alpha=alpha, use_rslora=use_rslora)
    for name, targets in chosen.items():
        layer: Any = model.get_submodule(name)
        weights = layer.gate_up_proj, layer.down_proj
        lora = ExpertLoRA(*weights, r=r, alpha=alpha, targets=targets, use_rslora=use_rslora)
        layer.expert_lora = lora
        if not isinstance(layer, Experts):
            lora.guard = layer.register_forward_pre_hook(_refuse_other_implementations)


def _inject_peft(
    model: PreTrainedModel, target_modules: Sequence[str] | str, *, r: int, alpha: int, use_rslora: bool
) -> None:
    """PEFT's LoRA in the linear layers of the model, without wrapping the model; float32 as PEFT has it."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ModuleNotFoundError(
            "target_modules need PEFT, which is not installed; run: pip install 'moe-runtime[train]'",
            name="peft",
        ) from None
    modules = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=modules, use_rslora=use_rslora)
    inject_adapter_in_model(config, model, ADAPTER)
    if config.target_parameters:  # PEFT knows experts by the names they had before they were stacked
        raise ValueError(
            f"target_modules must name linear layers outside the experts, got {target_modules!r}, which PEFT "
            f"takes for {', '.join(sorted(config.target_parameters))}"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _detach(model: PreTrainedModel, *, merge: bool) -> None:
    # inner modules first: PEFT wraps its own wrappers
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, ExpertLoRA):
            layer: Any = model.get_submodule(name.rpartition(".")[0])
            if merge:
                module.merge(layer.gate_up_proj, layer.down_proj)
            guard: Any = getattr(module, "guard", None)
            if guard is not None:
                guard.remove()
            del layer.expert_lora
        elif hasattr(module, "get_base_layer"):
            if merge:
                module.merge()
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    if hasattr(model, "_conversions_without_lora"):
        model._weight_conversions = model._conversions_without_lora
        del model._conversions_without_lora


# --- the files' side ---


def _matched(layers: Mapping[str, Any], target_parameters: Sequence[str]) -> dict[str, list[str]]:
    """Which experts' weights PEFT's target_parameters name: whole names, or their ends."""
    names = {f"{name}.{target}": (name, target) for name in layers for target in TARGETS}
    chosen: dict[str, list[str]] = {}
    for parameter in target_parameters:
        found = [place for name, place in names.items() if f".{name}".endswith(f".{parameter}")]
        if not found:
            raise ValueError(
                f"target_parameters in {CONFIG_NAME} must name weights of the model's experts, such as "
                f"{next(iter(names))}, got {parameter!r}"
            )
        for name, target in found:
            chosen.setdefault(name, []).append(target)
    return chosen


def _views(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters' parameters by PEFT's keys, as views whose rows are those of PEFT's matrices.

    PEFT keeps A as [E·R, I] and B as [O, R·E], experts innermost. It wraps a module once per adapted
    parameter, in the order of the parameters, and the last of them is outermost.
    """
    views = {}
    for name, layer in _adapted(model).items():
        lora = layer.expert_lora
        order = [target for target, _ in layer.named_parameters(recurse=False) if target in lora.lora_A]
        for depth, target in enumerate(reversed(order)):
            stem = f"{PREFIX}{name}." + "base_layer." * depth
            views[f"{stem}lora_A.weight"] = lora.lora_A[target].data.flatten(0, 1)
            views[f"{stem}lora_B.weight"] = lora.lora_B[target].data.permute(1, 2, 0)
    for name, parameter in model.named_parameters():
        if name.endswith((f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")):
            views[PREFIX + name.replace(f".{ADAPTER}.", ".")] = parameter.data
    return views


def _file_shape(view: Tensor) -> tuple[int, int]:
    return view.shape[0], view.numel() // view.shape[0]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter that is LoRA of experts' weights and nothing else."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} must hold {name}, and has none")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_NAME)
    except (ValueError, SafetensorError) as error:
        raise ValueError(
            f"the adapter in {folder} cannot be read, a file may be truncated: {error}"
        ) from error
    for key, wanted in PLAIN.items():
        if config.get(key) not in (wanted, None, [], {}):  # layers_to_transform may be 0
            raise ValueError(
                f"{key} in {CONFIG_NAME} must be {wanted!r} for per-expert LoRA, got {config[key]!r}"
            )
    kinds: dict[str, tuple[type, ...]] = {
        "r": (int,),
        "lora_alpha": (int, float),
        "target_parameters": (list,),
    }
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise ValueError(
                f"{key} in {CONFIG_NAME} must be given for per-expert LoRA, got {config.get(key)!r}"
            )
    return config, tensors


def _check_tensors(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], views: Mapping[str, Tensor]
) -> None:
    made_for = (
        f"; the adapter was made for {config.get('base_model_name_or_path') or 'a model without a name'}"
    )
    if missing := sorted(views.keys() - tensors.keys()):
        raise ValueError(f"{folder / WEIGHTS_NAME} must hold {missing[0]}, and does not{made_for}")
    if unknown := sorted(tensors.keys() - views.keys()):
        raise ValueError(
            f"{folder / WEIGHTS_NAME} must hold nothing that has no place in the model, got {unknown[0]}"
            f"{made_for}"
        )
    for key, view in views.items():
        if tuple(tensors[key].shape) != _file_shape(view):
            raise ValueError(
                f"{key} in {folder / WEIGHTS_NAME} must have shape {_file_shape(view)}, as r = {config['r']} "
                f"and the model say, got {tuple(tensors[key].shape)}{made_for}"
            )
