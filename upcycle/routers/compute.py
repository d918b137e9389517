"""Routers from text: run the base over every expert's text, sum up what routers would read, solve, write."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from upcycle.checkpoint import Checkpoint
from upcycle.errors import UpcycleError
from upcycle.provenance import hash_file, write_json
from upcycle.recipe import RouterRecipe
from upcycle.routers.file import Shapes, check_values, open_routers_file, router_shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from upcycle.plan import UpcyclePlan
    from upcycle.routers.inputs import InputSums
    from upcycle.routers.texts import Text


@dataclass(frozen=True)
class RouterWeights:
    """A file of router weights, and what upcycle.json says about it."""

    checkpoint: Checkpoint
    record: dict[str, Any]


@contextmanager
def open_routers(plan: "UpcyclePlan") -> Iterator[RouterWeights | None]:
    """The router weights that the plan reads as its last source; None if it draws them.

    Computes them where the recipe asks for it, with a progress bar on a terminal, into a temporary file.
    """
    recipe = plan.recipe.router
    if plan.routers is not None:
        path = plan.routers.folder / plan.routers.files[0]
        check_values(plan.routers)
        yield RouterWeights(plan.routers, {"path": str(path.resolve()), "sha256": hash_file(path)})
    elif recipe.data:
        console = Console(stderr=True)
        with TemporaryDirectory(prefix="moe-runtime-routers-") as folder:
            with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
                bar = progress.add_task("Reading the routers' texts", total=1.0)
                weights = compute(
                    plan,
                    Path(folder) / "routers.safetensors",
                    on_share=lambda share: progress.update(bar, completed=share),
                )
            yield weights
    else:
        yield None


def compute(
    plan: "UpcyclePlan", path: Path, *, on_share: Callable[[float], object] = lambda _: None
) -> RouterWeights:
    """Compute the routers of a plan whose recipe has `router.data`, and write them to `path` in float32.

    The base runs over the text of every expert; its attention, norms and embeddings are those of the output,
    or the nearest to them that exist before it. One model is in memory, and for `ridge` a matrix [D, D] in
    float64 per router. On a GPU if there is one.

    Raises:
        UpcycleError: a text is unusable, or transformers cannot run the base.
    """
    import torch
    from safetensors.torch import save_file

    shapes = router_shapes(plan.tasks, len(plan.sources))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = plan.recipe.router
    try:
        texts = _read_texts(plan)
        model = _load(plan, device)
        sums = _sum_inputs(model, shapes, texts, second_moment=recipe.init == "ridge", on_share=on_share)
        del model
        rows, conditions = _solve(recipe, sums)
    except UpcycleError:
        raise
    except (OSError, ValueError) as error:
        raise UpcycleError(f"router.init {recipe.init!r}: {error}") from error
    save_file({name: weight.float().cpu().contiguous() for name, weight in rows.items()}, path)
    record: dict[str, Any] = {
        "sha256": hash_file(path),
        "texts": [{"name": text.name, "sha256": text.sha256, "tokens": text.num_tokens} for text in texts],
    }
    if conditions:
        record["largest_condition"] = float(f"{max(conditions.values()):.0e}")
    return RouterWeights(open_routers_file(path, shapes), record)


def _read_texts(plan: "UpcyclePlan") -> "list[Text]":
    from upcycle.routers.texts import read_text

    tokenizer = _tokenizer(plan.base)
    texts = [
        read_text(
            text,
            tokenizer,
            max_tokens=plan.recipe.router.max_tokens,
            longest_row=plan.dense.max_position_embeddings,
        )
        for text in plan.recipe.router.data
    ]
    first: dict[str, int] = {}
    for expert, text in enumerate(texts):
        other = first.setdefault(text.sha256, expert)
        if other != expert:
            raise ValueError(
                f"router.data must have another text for each expert, but that of expert {expert} is that of "
                f"expert {other} ({text.name}), and their rows would be equal"
            )
    return texts


def _tokenizer(base: Checkpoint) -> Any:
    from moe_runtime.hf.loading import load_tokenizer

    if base.file is None:
        return load_tokenizer(base.folder)
    from moe_runtime.hf.gguf_source import save_gguf_tokenizer

    with TemporaryDirectory(prefix="moe-runtime-tokenizer-") as folder:
        save_gguf_tokenizer(base.location, Path(folder))
        write_json(Path(folder) / "config.json", base.config_json)  # names the kind of tokenizer
        return load_tokenizer(folder)


def _load(plan: "UpcyclePlan", device: Any) -> Any:
    from moe_runtime.hf.loading import load_causal_lm
    from upcycle.sources import open_source
    from upcycle.sources.plain import plain_folder

    # not the plan's view of it, whose tensors have other names than its family's
    with plain_folder(open_source(plan.recipe.base)) as folder:
        return load_causal_lm(folder, device=device)


def _sum_inputs(
    model: Any,
    shapes: Shapes,
    texts: "list[Text]",
    *,
    second_moment: bool,
    on_share: Callable[[float], object],
) -> "dict[str, InputSums]":
    """Sums of the inputs of every router; `model` is any causal LM of transformers."""
    import torch

    from upcycle.routers.inputs import InputSums, input_modules, watch

    modules: dict[str, nn.Module] = input_modules(model, shapes)
    sums = {
        name: InputSums(len(texts), width, second_moment=second_moment, device=model.device)
        for name, (_, width) in shapes.items()
    }
    done, total = 0, sum(text.num_tokens for text in texts)
    for expert, text in enumerate(texts):

        def add(name: str, x_TD: "Tensor", expert: int = expert, num_tokens: int = text.num_tokens) -> None:
            sums[name].add(expert, x_TD, num_tokens)

        with watch(modules, add), torch.inference_mode():
            for row_1L in text.rows:
                model.base_model(input_ids=row_1L.to(model.device), use_cache=False)
                done += row_1L.shape[1]
                on_share(done / total)
    return sums


def _solve(
    recipe: RouterRecipe, sums: "dict[str, InputSums]"
) -> "tuple[dict[str, Tensor], dict[str, float]]":
    """The rows of every router, and for ridge the condition numbers of what was solved."""
    from upcycle.routers.solve import centroid_rows, ridge_rows

    assert recipe.row_norm is not None
    rows: dict[str, Tensor] = {}
    conditions: dict[str, float] = {}
    for name, of_router in sums.items():
        if of_router.moment_DD is None:
            rows[name] = centroid_rows(of_router.mean_ED, recipe.row_norm)
        else:
            rows[name], conditions[name] = ridge_rows(
                of_router.mean_ED, of_router.moment_DD, lam=recipe.lam, row_norm=recipe.row_norm
            )
    return rows, conditions
