"""A training step on a CPU: SmolLM2-135M upcycled to 4 experts, of which a token passes 2, in our model and
in transformers' Mixtral with `experts_implementation="grouped_mm"`.

Both are made by the recipe `copy`, from one router seed, so that they have the same weights; both step with
PyTorch's fused AdamW, with the precision of float32 products that the case names set for the whole process.
Ours has what `moe-runtime train` gives: the loss from hidden states. The loss and the gradients of the first
layer's experts must agree with transformers' in the first step after the one whose FLOPs are counted.

Every step has other tokens, the same ones for both: a router sends experts other numbers of rows in every
batch, and a library that compiles a product for each of them pays for it.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.whole_models import SHAPES, described, our_model, rms_error, train_work, transformers_model
from moe_runtime.hf.loading import load_causal_lm, load_tokenizer
from moe_runtime.train.linear_loss import use_linear_loss

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / ".cache" / "smollm2-135m"
TOKENS = 256
TARGETS = ("moe_runtime", "mixtral")
EXPERTS, CHOSEN = 4, 2
# one step of AdamW moves a weight by its rate, whatever the gradient: small, so that all steps see one model
RATE = 1e-7
PRECISION = {"float32": 1e-3, "bfloat16": 0.1}  # the largest error of a gradient, of its rms


def write_upcycled(target: str, folder: Path) -> None:
    from upcycle import recipe_from_dict, upcycle

    recipe = {
        "method": "copy",
        "base": str(SOURCE),
        "output": str(folder / target),
        "target": target,
        "experts": EXPERTS,
        "experts_per_token": CHOSEN,
    }
    upcycle(recipe_from_dict(recipe))


@pytest.fixture(scope="module")
def upcycled(request, tmp_path_factory) -> Path | None:
    """A folder with both, made once; None for the tiny models, which need none."""
    if torch.cuda.is_available():
        pytest.skip("bench_end_to_end.py is that of a GPU")
    if request.config.getoption("--tiny"):
        return None
    if not SOURCE.exists():
        pytest.skip(f"{SOURCE} does not exist; `make demo` makes it")
    folder = tmp_path_factory.mktemp("upcycled")
    for target in TARGETS:
        write_upcycled(target, folder)
    return folder


def make_models(folder: Path | None) -> tuple[nn.Module, nn.Module]:
    """Ours and transformers', of the same weights; tiny ones without a folder."""
    if folder is None:
        theirs = transformers_model(SHAPES["tiny"]["mixtral, tiny"], "grouped_mm", torch.float32, "cpu")
        return our_model(theirs, "cpu").float(), theirs
    ours, theirs = (load_causal_lm(folder / target, dtype=torch.float32) for target in TARGETS)
    theirs.config.router_aux_loss_coef = ours.config.router_aux_loss_coef = 0.0
    return ours, theirs


def make_batches(tiny: bool) -> tuple[Tensor, ...]:
    """Rows of this project's own documentation, as batches of one; every token counts."""
    if tiny:
        return torch.randint(61, (8, 16), generator=torch.Generator().manual_seed(0)).split(1)
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    ids = load_tokenizer(SOURCE)(text).input_ids
    return torch.tensor(ids[: len(ids) // TOKENS * TOKENS]).view(-1, TOKENS).split(1)


def step(model: nn.Module, batches: Sequence[Tensor], dtype: str) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, backward, AdamW on the next batch; gives the loss and the first layer's experts' gradients.

    The last batch is the first call's, which counts FLOPs; what is checked and timed begins with the first.
    """
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    following = cycle((*batches[-1:], *batches[:-1]))
    experts = [p for name, p in model.named_parameters() if "layers.0.mlp.experts.down_proj" in name]

    def call() -> tuple[Tensor, ...]:
        optimiser.zero_grad()
        ids_BL = next(following)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=ids_BL, labels=ids_BL).loss
        loss.backward()
        optimiser.step()
        return (loss.detach(), *(weight.grad for weight in experts))

    return call


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "high"), ("bfloat16", "highest")])
def bench_train_step(compare, tiny, set_precision, upcycled, dtype, precision):
    set_precision(precision)
    ours, theirs = make_models(upcycled)
    theirs.set_experts_implementation("grouped_mm")
    use_linear_loss(ours)
    batches, config = make_batches(tiny), described(theirs.config)
    tokens = batches[0].shape[1]
    expected: dict[str, Tensor] = {}

    def check(name: str, out: tuple[Tensor, ...]) -> dict[str, float]:
        if not expected:
            expected["loss"], expected["ddown"] = (tensor.clone() for tensor in out)
        errors = {
            key: rms_error(value, exact) for value, (key, exact) in zip(out, expected.items(), strict=True)
        }
        assert all(error <= PRECISION[dtype] for error in errors.values()), f"{name} is off by {errors}"
        return errors

    work = train_work(config, tokens)
    compare(
        "train_step",
        {
            "model": "smollm2-135m, 4 experts",
            "tokens": tokens,
            "dtype": dtype,
            "precision": precision,
        },
        {"moe_runtime": step(ours, batches, dtype), "transformers_grouped_mm": step(theirs, batches, dtype)},
        check=check,
        rounds=7,
        work={"moe_runtime": work, "transformers_grouped_mm": work},
    )
