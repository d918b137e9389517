"""The recipe of UpIT: one section per stage. Frozen, checked when built, read from YAML."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from moe_runtime.config import Gate
from moe_runtime.recipe_checks import check_choice, check_not_negative, check_share, check_type, check_whole
from moe_runtime.recipe_file import build, read_yaml
from upcycle.errors import RecipeError
from upcycle.recipe import Dtype, NonExpert, Recipe, RouterRecipe, TargetName
from upcycle.upit.record import RecordDtype
from upcycle.upit.similarity import Similarity

Paradigm = Literal["full", "lora"]
Compute = Literal["float32", "bfloat16"]
LEARNING_RATE = {"full": 2e-5, "lora": 2e-4}


@dataclass(frozen=True, kw_only=True)
class PrepareRecipe:
    """Stage 1: fine-tune the base and record an expert every `every` of an epoch."""

    epochs: float = 2.0
    every: float = 0.25
    lr: float | None = None  # None: 2e-5 for full, 2e-4 for lora
    store: Literal["delta", "value"] = "delta"  # full only
    dtype: RecordDtype = "float32"  # of what is stored
    rank: int = 16  # lora only
    alpha: float = 32.0  # lora only; the scaling is alpha / rank

    def __post_init__(self) -> None:
        check_choice("prepare.store", self.store, ("delta", "value"))
        check_choice("prepare.dtype", self.dtype, get_args(RecordDtype))
        check_whole("prepare.rank", self.rank, 1)
        for name in ("epochs", "every", "alpha"):
            _check_above_zero(f"prepare.{name}", getattr(self, name))
        if self.lr is not None:
            _check_above_zero("prepare.lr", self.lr)
        points = self.epochs / self.every
        if points < 1 or abs(points - round(points)) > 1e-6:
            raise RecipeError(
                f"prepare.epochs must be a multiple of prepare.every ({self.every}), got {self.epochs}"
            )


@dataclass(frozen=True, kw_only=True)
class ExpandRecipe:
    """Stage 2: where the checkpoints are fewer than the experts, make children of pairs of them."""

    parents: Literal["farthest", "random"] = "farthest"
    similarity: Similarity = "cosine"
    drop: float = 0.5  # share of a delta's elements that mutation sets to zero
    exclude_used: bool = True  # a pair has one child only

    def __post_init__(self) -> None:
        check_choice("expand.parents", self.parents, ("farthest", "random"))
        check_choice("expand.similarity", self.similarity, get_args(Similarity))
        check_type("expand.exclude_used", self.exclude_used, bool)
        check_share("expand.drop", self.drop)
        if self.drop == 1:
            raise RecipeError("expand.drop must be below 1, got 1; nothing of a parent would be left")


@dataclass(frozen=True, kw_only=True)
class RouteRecipe:
    """Stage 3: one routing vector per expert and layer, trained on the samples that the expert knows best."""

    init: Literal["trained", "normal"] = "trained"  # normal: skip the stage, draw the routers
    std: float = 0.02  # of the vectors before they are trained
    seed_fraction: float = 0.01  # of the data
    normalise: Literal["center", "none"] = "center"
    min_per_expert: int = 1
    alpha: float = 0.5  # of the language loss; 1 - alpha of the routing loss
    epochs: int = 4
    lr: float = 1e-3  # of the vectors; the experts have that of stage 1
    freeze_experts: bool = False
    negatives: bool = False  # target 0 on the samples of the other experts

    def __post_init__(self) -> None:
        check_choice("route.init", self.init, ("trained", "normal"))
        check_choice("route.normalise", self.normalise, ("center", "none"))
        check_share("route.alpha", self.alpha)
        check_whole("route.min_per_expert", self.min_per_expert, 1)
        check_whole("route.epochs", self.epochs, 1)
        for name in ("freeze_experts", "negatives"):
            check_type(f"route.{name}", getattr(self, name), bool)
        for name in ("std", "seed_fraction", "lr"):
            _check_above_zero(f"route.{name}", getattr(self, name))
        if self.seed_fraction > 1:
            raise RecipeError(f"route.seed_fraction must be at most 1, got {self.seed_fraction}")
        if self.alpha == 1:
            raise RecipeError("route.alpha must be below 1, got 1; the routing vectors would not be trained")


@dataclass(frozen=True, kw_only=True)
class PostTrainRecipe:
    """Stage 4, after assembly: train the mixture with the language loss and the balance loss."""

    epochs: float = 2.0  # 0: write the mixture as assembled
    lr: float | None = None  # None: 2e-5; 2e-4 for adapters
    aux_loss_coef: float = 0.01

    def __post_init__(self) -> None:
        check_not_negative("post_train.epochs", self.epochs)
        check_not_negative("post_train.aux_loss_coef", self.aux_loss_coef)
        if self.lr is not None:
            _check_above_zero("post_train.lr", self.lr)


@dataclass(frozen=True, kw_only=True)
class UpitRecipe:
    """One run of UpIT: a dense base and data in, a trained mixture of experts out.

    Values left out are filled with the paradigm's own: a built recipe says all that will happen.
    """

    base: str
    data: tuple[str, ...]
    output: str
    experts: int
    work: str = ""  # folder of the stages; "": the output's name with .work
    checkpoints: str = ""  # a recording, in place of stage 1
    paradigm: Paradigm = "full"
    experts_per_token: int = 2
    gate: Gate = "renorm"
    lora_experts: Literal["merged", "adapter"] = "merged"  # lora only
    non_expert: NonExpert | None = None  # None: mean for full, base for lora
    target: TargetName = "moe_runtime"
    dtype: Dtype | None = None  # of the output; None: as in the base
    max_shard_size: str = "5GB"
    max_length: int = 512  # tokens of a sample
    batch_size: int = 16
    warmup: float = 0.03  # share of a training's steps
    device: str = "cpu"
    compute: Compute = "float32"  # bfloat16: autocast, the weights that are trained stay float32
    seed: int = 0
    prepare: PrepareRecipe = field(default_factory=PrepareRecipe)
    expand: ExpandRecipe = field(default_factory=ExpandRecipe)
    route: RouteRecipe = field(default_factory=RouteRecipe)
    post_train: PostTrainRecipe = field(default_factory=PostTrainRecipe)

    def __post_init__(self) -> None:
        self._check_values()
        self._fill_in()
        # the rules that all methods share: gates and numbers of experts, formats, sizes
        self.assembly(self.output, ["expert"] * self.experts, "rest", "routers.safetensors")

    def _check_values(self) -> None:
        for name in ("base", "output", "work", "checkpoints", "device"):
            check_type(name, getattr(self, name), str)
        for name in ("base", "output", "device"):
            if not getattr(self, name):
                raise RecipeError(f"{name} must not be empty")
        check_type("data", self.data, tuple)
        if not self.data:
            raise RecipeError("data must name one or more files, got none")
        for path in self.data:
            check_type("data", path, str)
        check_choice("paradigm", self.paradigm, get_args(Paradigm))
        check_choice("lora_experts", self.lora_experts, ("merged", "adapter"))
        check_choice("compute", self.compute, get_args(Compute))
        check_whole("experts", self.experts, 2)
        check_whole("max_length", self.max_length, 2)
        check_whole("batch_size", self.batch_size, 1)
        check_share("warmup", self.warmup)
        check_type("seed", self.seed, int)
        if self.paradigm == "full" and self.lora_experts == "adapter":
            raise RecipeError("lora_experts 'adapter' needs paradigm 'lora', got 'full'")
        if self.lora_experts == "adapter" and self.target != "moe_runtime":
            raise RecipeError(f"lora_experts 'adapter' needs target 'moe_runtime', got {self.target!r}")
        if self.paradigm == "lora" and self.non_expert == "mean":
            raise RecipeError("non_expert must be 'base' with paradigm 'lora': nothing else is trained")

    def _fill_in(self) -> None:
        full = self.paradigm == "full"
        adapter = self.lora_experts == "adapter"
        filled: dict[str, Any] = {
            "work": self.work or f"{self.output}.work",
            "non_expert": self.non_expert or ("mean" if full else "base"),
            "prepare": _with_lr(self.prepare, LEARNING_RATE[self.paradigm]),
            "post_train": _with_lr(self.post_train, LEARNING_RATE["lora" if adapter else "full"]),
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)

    def assembly(
        self, output: str, experts: list[str], rest: str, routers: str, dtype: Dtype | None = None
    ) -> Recipe:
        """The recipe of the upcycling run that puts the experts together.

        Args:
            output: the folder to write.
            experts: folders of the experts.
            rest: folder that everything else comes from.
            routers: file of the routers' weights; "": they are drawn.
            dtype: of the weights; None: the recipe's, or that of `rest`.
        """
        start = {"init": "file", "path": routers} if routers else {"std": self.route.std, "seed": self.seed}
        return Recipe(
            method="upit",
            output=output,
            base=rest,
            sources=tuple(experts),
            target=self.target,
            experts_per_token=self.experts_per_token,
            router=RouterRecipe(gate=self.gate, aux_loss_coef=self.post_train.aux_loss_coef, **start),
            non_expert="base",
            dtype=dtype or self.dtype,
            max_shard_size=self.max_shard_size,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; `upit_recipe_from_dict` reads them back."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def load_upit_recipe(path: str | Path) -> UpitRecipe:
    """Read a recipe from a YAML file. Relative paths in it start at the current folder.

    Raises:
        RecipeError: the file is missing or no YAML, a key is unknown, or a value is not allowed.
    """
    return build(UpitRecipe, read_yaml(path), str(path))


def upit_recipe_from_dict(values: Mapping[str, Any], *, where: str = "recipe") -> UpitRecipe:
    """Build a recipe from plain values; `where` begins every message."""
    return build(UpitRecipe, values, where)


def _with_lr(section: Any, lr: float) -> Any:
    values = asdict(section)
    return type(section)(**{**values, "lr": lr if values["lr"] is None else values["lr"]})


def _check_above_zero(name: str, value: object) -> None:
    check_type(name, value, (int, float))
    assert isinstance(value, int | float)
    if not (math.isfinite(value) and value > 0):
        raise RecipeError(f"{name} must be finite and above 0, got {value}")
