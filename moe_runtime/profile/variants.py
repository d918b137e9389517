"""What is compared: one model on several implementations of its experts, and a dense model of equal FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import ModelConfig
from ..flops import Convention, match_dense
from ..publishing import MODEL_TYPE
from ..shapes import named_shape

Phase = Literal["prefill", "decode"]
OURS, THEIRS, DENSE = "moe_runtime", "transformers", "dense"
DEFAULT = ("moe_runtime", "grouped_mm", "dense")  # grouped_mm is what transformers takes by itself
CONVENTION: Convention = "causal"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model and the implementation its experts run on; None leaves the model as it is."""

    name: str
    title: str
    model: Any
    config: ModelConfig | None  # None where FLOPs cannot be counted
    implementation: str | None = None

    def enter(self, phase: Phase) -> None:
        """Switch the model, which other variants share, to this variant."""
        if self.implementation is None:
            return
        name = self.implementation
        # as transformers' generate() does
        if phase == "decode" and name == "grouped_mm" and self.model.device.type != "cpu":
            name = "batched_mm"
        self.model.set_experts_implementation(name)

    @property
    def weight_bytes(self) -> int:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def load_subject(source: str, *, dtype: str, device: torch.device, seed: int) -> tuple[Any, str]:
    """The model in a checkpoint folder, or one with random weights; and where its weights are from.

    Args:
        source: a checkpoint folder, a config.json, or a named shape.
        dtype: a key of `DTYPES`, or "auto": the file's, and float32 where it names none.
        device: where the model goes.
        seed: of random weights.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or no room for it.
    """
    from ..hf.loading import load_causal_lm
    from ..hf.profiled import random_causal_lm, read_config, shape_config

    path = Path(source)
    if path.is_dir():
        return load_causal_lm(path, dtype=DTYPES.get(dtype, "auto"), device=device), "the checkpoint's"
    if path.is_file():
        config = read_config(path)
    elif path.suffix == ".json" or len(path.parts) > 1:
        raise FileNotFoundError(f"MODEL: there is no folder or file {path}")
    else:
        config = shape_config(named_shape(source))
    named = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    chosen = DTYPES.get(dtype, named)
    _check_room(source, config, chosen, device)
    return random_causal_lm(config, dtype=chosen, device=device, seed=seed), f"random, seed {seed}"


def make_variants(
    model: Any, compare: Sequence[str] | None, *, context: int, seed: int
) -> tuple[list[Variant], list[str]]:
    """The variants in the order in which they are shown, and sentences on what a reader must know of them.

    Args:
        model: a causal LM of transformers.
        compare: names of experts implementations, and "dense"; None takes those of `DEFAULT` that exist.
        context: tokens at which FLOPs of the dense model are made equal.
        seed: of the dense model's weights.

    Raises:
        ValueError: a name is unknown or does not apply to this model, or there is no room for a dense model.
    """
    from ..hf.profiled import described, experts_implementations, experts_run_on

    try:
        config, reason = described(model.config), ""
    except ValueError as error:
        config, reason = None, str(error)
    known = experts_implementations(model)
    own = model.config.model_type == MODEL_TYPE
    mixture = bool(known) or (own and config is not None and _is_mixture(config))
    implementations = known or [OURS if own else THEIRS]
    names = _chosen_names(compare, implementations, dense=config is not None and mixture, reason=reason)
    notes = [] if config is not None else [f"No FLOPs and no dense model: {reason}."]
    variants = []
    for name in names:
        if name == DENSE:
            assert config is not None
            variants.append(_dense_variant(model, config, context, seed, notes))
            continue
        implementation = name if known else None
        title = f"{name} experts" if known else f"{name}, as it is"
        variants.append(
            Variant(name=name, title=title, model=model, config=config, implementation=implementation)
        )
    if known and OURS in names:
        notes.append(f"The experts of the variant {OURS} run on {' and '.join(experts_run_on(model))}.")
    return variants, notes


def _chosen_names(
    compare: Sequence[str] | None, implementations: list[str], *, dense: bool, reason: str
) -> list[str]:
    possible = [*implementations, *([DENSE] if dense else [])]
    if compare is None:
        return [name for name in (THEIRS, *DEFAULT) if name in possible]
    for name in compare:
        if name == DENSE and not dense:
            why = reason or "the model has neither experts nor attention experts"
            raise ValueError(f"--compare dense needs a mixture whose FLOPs can be counted: {why}")
        if name not in possible:
            raise ValueError(
                f"--compare must name some of {', '.join(possible)} for this model, got {name!r}"
            )
    return list(dict.fromkeys(compare))


def _is_mixture(config: ModelConfig) -> bool:
    return config.num_experts > 0 or config.num_attention_experts > 1


def _dense_variant(model: Any, config: ModelConfig, context: int, seed: int, notes: list[str]) -> Variant:
    from ..hf.profiled import dense_twin, random_causal_lm

    match = match_dense(config, "active_flops", context=context, convention=CONVENTION)
    twin = dense_twin(model.config, match.config)
    _check_room("--compare dense", twin, model.dtype, model.device)
    dense = random_causal_lm(twin, dtype=model.dtype, device=model.device, seed=seed)
    notes.append(
        f"The dense model is a {twin.model_type} with random weights and a feed-forward of "
        f"{match.config.intermediate_size:,}: the active FLOPs of the mixture at {context:,} tokens but for "
        f"{match.residual:+,} per token."
    )
    return Variant(name=DENSE, title="dense of equal active FLOPs", model=dense, config=match.config)


# --- room ---


def _check_room(what: str, config: Any, dtype: torch.dtype, device: torch.device) -> None:
    from ..hf.profiled import parameter_count

    needed, free = parameter_count(config) * dtype.itemsize, _free_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"{what} needs {needed / 1e9:.1f} GB for its weights in {str(dtype).removeprefix('torch.')}, and "
            f"{device} has {free / 1e9:.1f} GB free"
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    for line in info.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
