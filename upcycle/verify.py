"""Load an output and its base, and compare what they compute."""

from dataclasses import asdict, dataclass
from math import frexp
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.config import ModelConfig
from moe_runtime.families import model_config
from upcycle.checkpoint import expanded, open_checkpoint, read_json
from upcycle.errors import UpcycleError
from upcycle.method_sections import SECTIONS
from upcycle.plan import TORCH_DTYPE
from upcycle.planned import other_tensors
from upcycle.provenance import RECORD_NAME, open_recorded, recorded_hashes
from upcycle.sources import plain_folder

if TYPE_CHECKING:
    from torch import Tensor

# Largest difference of a logit that counts as equal. In float32 it cannot hold for every router: gates g and
# 1 - g of two equal expert outputs a give g a + (1 - g) a, which rounds to a neighbour of a, and products of
# fewer rows may sum in another order. Both change a layer's output by half a unit in the last place, which
# 30 layers with logits of 36 amplify to 1e-4 to 2e-4; the base itself is as far from its float64 self. So
# 1e-4 holds in float32 where gates are exactly equal, and in float64 (5e-5 for the same model, from what
# architectures compute in float32 anyhow) for every router. A wrong tensor changes logits by 1e-2 and more.
TOLERANCE = 1e-4
_TIMES_ROUNDING = 4

_SEQUENCES, _LENGTH = 4, 32

# Parameters of routers in loaded models, ours and transformers'.
_ROUTERS = (".router.weight", ".mlp.gate.weight", ".router.layer.weight")


@dataclass(frozen=True)
class Verification:
    """Comparison of an output with its base, both run on the same tokens, in float32 and in float64.

    The base's weights are rounded to the output's type first. `not_equal_because` is empty where the method
    keeps the function; then `max_abs_diff_float64` must be below 1e-4, `max_abs_diff` and
    `max_abs_diff_equal_gates` below `tolerance`. Elsewhere the differences are only reported. The logits must
    be finite, and the tensors those that the recipe makes of the sources, bit by bit, unless the mixture was
    trained since.
    """

    path: str
    base: str
    method: str
    target: str
    max_abs_diff: float  # over all logits, in float32
    max_abs_diff_equal_gates: float  # the same with routers of zeros, whose gates are exactly equal
    max_abs_diff_float64: float  # in float64: what is not rounding
    divergence: float  # mean KL(base || output) of the next token, in nats: what text like the base's loses
    max_abs_logit: float  # of the base
    rounding: float  # largest difference between the base's logits in float32 and in float64
    finite: bool
    not_equal_because: tuple[str, ...]
    other_tensors: tuple[str, ...] | None  # that are not what the recipe makes; None: trained since

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE, _TIMES_ROUNDING * self.rounding)

    @property
    def must_be_equal(self) -> bool:
        return not self.not_equal_because

    @property
    def passed(self) -> bool:
        in_float32 = max(self.max_abs_diff, self.max_abs_diff_equal_gates)
        equal = in_float32 < self.tolerance and self.max_abs_diff_float64 < TOLERANCE
        return self.finite and not self.other_tensors and (not self.must_be_equal or equal)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        verdict = {"must_be_equal": self.must_be_equal, "tolerance": self.tolerance, "passed": self.passed}
        return {**asdict(self), **verdict}


def verify(path: str | Path) -> Verification:
    """Compare an upcycled model's tensors with its recipe, and its logits with its base's on fixed tokens.

    Raises:
        UpcycleError: the folder is not an upcycled model, or its base is gone or has changed.
        ValueError: the weights do not fit the config.json.
    """
    folder = expanded(path)
    if not folder.is_dir():
        raise UpcycleError(f"{folder}: there is no such folder")
    if not (folder / RECORD_NAME).exists():
        raise UpcycleError(f"{folder} holds no {RECORD_NAME}; verify takes a folder that upcycle wrote")
    record = read_json(folder / RECORD_NAME)
    output = open_checkpoint(folder)
    model = model_config(output.config_json)
    try:
        reasons = differences(record, model)
        method = record["method"]
        base = open_recorded(record["sources"][record["base"]], folder)
        scaled = record.get("scaled", {}).values()
        others = None if _was_trained(record) else other_tensors(record, output)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UpcycleError(f"{folder / RECORD_NAME} is damaged; run the recipe again") from None
    dtype = next(
        tensor.dtype for name, tensor in output.tensors.items() if name.endswith("embed_tokens.weight")
    )
    if dtype != "F32" and any(frexp(factor)[0] != 0.5 for factor in scaled):  # no power of two
        reasons += (f"weights scaled by {', '.join(f'{factor:g}' for factor in scaled)} round in {dtype}",)
    tokens = _tokens(model)
    with plain_folder(base) as dense_folder:
        expected, _, expected_exact = _logits(dense_folder, tokens, dtype)
    logits, logits_equal_gates, logits_exact = _logits(folder, tokens, "F32")
    if method == "granular":  # the shards of a copy are chosen together by the routers that were drawn only
        logits_equal_gates = logits
    base_exact = expected_exact.log_softmax(-1)
    divergence = (base_exact.exp() * (base_exact - logits_exact.log_softmax(-1))).sum(-1).mean()
    return Verification(
        path=str(folder),
        base=str(base.location),
        method=method,
        target=output.config_json["model_type"],
        max_abs_diff=(logits - expected).abs().max().item(),
        max_abs_logit=expected.abs().max().item(),
        max_abs_diff_equal_gates=(logits_equal_gates - expected).abs().max().item(),
        max_abs_diff_float64=(logits_exact - expected_exact).abs().max().item(),
        divergence=divergence.item(),
        rounding=(expected - expected_exact).abs().max().item(),
        finite=bool(logits.isfinite().all()),
        not_equal_because=reasons,
        other_tensors=others,
    )


def _was_trained(record: dict[str, Any]) -> bool:
    return bool(record.get("post_training", {}).get("epochs"))


def differences(record: dict[str, Any], model: ModelConfig) -> tuple[str, ...]:
    """Why an output need not compute what its base computes; empty if it must.

    Args:
        record: upcycle.json of the output.
        model: its description.
    """
    reasons = _method_differences(record.get("recipe", {}))
    if _was_trained(record):
        reasons.append("it was trained after it was assembled")
    assignment = record["assignment"]
    used = {
        *assignment["feed_forward"],
        *(assignment["attention"] or ()),
        *assignment["rest"],
        record["base"],
    }
    if len({recorded_hashes(record["sources"][number]) for number in used}) > 1:
        reasons.append("the sources differ")
    all_chosen = model.num_experts_per_tok == model.num_experts and model.router_score == "softmax"
    # The experts of method shared_expert add nothing, and replicate keeps the gates.
    gates_count = record.get("method") not in ("shared_expert", "replicate")
    if gates_count and model.router_gate == "raw" and not all_chosen:
        reasons.append("router.gate 'raw' scales each expert's output by its score")
    if gates_count and model.router_scale != 1.0:
        reasons.append(f"router.scale multiplies every gate by {model.router_scale}")
    some_heads = model.attention_top_k not in (None, model.num_attention_experts)
    if some_heads and not model.attention_top_k_renorm:
        reasons.append("attention.top_k leaves out experts without renormalising the gates of the others")
    return tuple(reasons)


def _method_differences(recipe: dict[str, Any]) -> list[str]:
    """Why a method's experts do not add up to the dense feed-forward."""
    sections = {name: recipe.get(name) or {} for name in SECTIONS}
    reasons = []
    if sections["drop"].get("ratio", 0) > 0:
        reasons.append(f"drop draws {sections['drop']['ratio']:.0%} of each expert's hidden units anew")
    if sections["noise"].get("std", 0) > 0 and sections["noise"]["share"] > 0:
        reasons.append(f"noise of std {sections['noise']['std']} is added to the experts")
    if sections["granular"].get("scale_mode", "exact") != "exact" and sections["granular"]["shards"] > 1:
        reasons.append(f"granular.scale_mode {sections['granular']['scale_mode']!r} is not exact")
    if sections["shared_expert"].get("residual_scale", 0) > 0:
        reasons.append("shared_expert.residual_scale lets the routed experts add to the dense feed-forward")
    if sections["replicate"]:
        reasons.append("copies of one expert take the places of others among the chosen ones")
    return reasons


def _tokens(model: ModelConfig) -> "Tensor":
    import torch

    length = min(_LENGTH, model.max_position_embeddings)
    drawn = np.random.Generator(np.random.Philox(key=0)).integers(model.vocab_size, size=(_SEQUENCES, length))
    return torch.from_numpy(drawn)


def _logits(folder: Path, tokens: "Tensor", dtype: str) -> tuple["Tensor", "Tensor", "Tensor"]:
    """In float32, in float32 with equal gates, and in float64, of weights rounded to `dtype` (of safetensors
    headers).

    One model at a time: this drops its own before it returns.
    """
    import torch

    from moe_runtime.hf.loading import load_causal_lm
    from moe_runtime.linear import precise_products

    with torch.inference_mode(), precise_products():
        model = load_causal_lm(folder, dtype=getattr(torch, TORCH_DTYPE[dtype])).float()
        # transformers' faster experts have no float64 and not every width; dense models have nothing to set
        model.set_experts_implementation("eager")
        logits = model(tokens, use_cache=False).logits
        routers = [weight for name, weight in model.named_parameters() if name.endswith(_ROUTERS)]
        drawn = [weight.clone() for weight in routers]
        for weight in routers:
            weight.zero_()
        equal_gates = model(tokens, use_cache=False).logits if routers else logits
        for weight, values in zip(routers, drawn, strict=True):
            weight.copy_(values)
        return logits, equal_gates, model.double()(tokens, use_cache=False).logits
