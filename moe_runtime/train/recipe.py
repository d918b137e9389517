"""The recipe of `moe-runtime train`: frozen sections, checked when built, read from YAML. Torch-free."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from moe_runtime.config import Gate
from moe_runtime.distributed.recipe import ParallelRecipe
from moe_runtime.errors import RecipeError
from moe_runtime.recipe_checks import check_choice, check_not_negative, check_share, check_type, check_whole
from moe_runtime.recipe_file import build, read_yaml
from moe_runtime.train.data import DataRecipe

BalanceOver = Literal["micro_batch", "sequence", "global_batch"]
Freeze = Literal["none", "gate", "experts", "moe", "non_expert"]
Precision = Literal["float32", "bfloat16"]
Schedule = Literal["constant", "linear", "cosine"]
Target = Literal["gate_up_proj", "down_proj"]
# of Trainer's, those that take groups of parameters; 8-bit and paged ones need bitsandbytes
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")  # can be in shards
OPTIMIZERS = (
    *ELEMENTWISE,
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "adafactor",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
)


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """The section `train.lora`: adapters of every expert; nothing else is trained but `target_modules`."""

    rank: int = 8
    alpha: int = 16  # the scaling is alpha / rank
    targets: tuple[Target, ...] = ("gate_up_proj", "down_proj")
    target_modules: tuple[str, ...] = ()  # linear layers that get adapters of PEFT

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            check_whole(f"train.lora.{name}", getattr(self, name), 1)
        for name in ("targets", "target_modules"):
            check_type(f"train.lora.{name}", getattr(self, name), tuple)
            for value in getattr(self, name):
                check_type(f"train.lora.{name}", value, str)
        if not self.targets:
            raise RecipeError("train.lora.targets must name gate_up_proj, down_proj or both, got none")
        for target in self.targets:
            check_choice("train.lora.targets", target, get_args(Target))


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The section `train`. A step updates the weights once, by processes · accumulate · batch_size rows."""

    steps: int | None = None
    epochs: float | None = None  # instead of steps
    batch_size: int = 8  # rows of one process in one micro-batch
    accumulate: int = 1  # micro-batches of a step
    learning_rate: float = 2e-5
    router_learning_rate: float | None = None  # None: learning_rate
    expert_learning_rate: float | None = None  # None: learning_rate
    warmup_steps: int = 0  # of each cycle
    schedule: Schedule = "cosine"
    restarts: tuple[int, ...] = ()  # steps at which a new cycle begins: warm-up, full rate, decay
    weight_decay: float = 0.0  # of matrices only
    max_grad_norm: float = 1.0  # 0: gradients are not clipped
    optimizer: str = "adamw_torch_fused"  # a name of Trainer's `optim`
    precision: Precision = "float32"  # bfloat16: of products; weights and their updates stay float32
    gradient_checkpointing: bool = False
    recompute_experts: bool = False
    freeze: Freeze = "none"
    lora: LoraRecipe | None = None
    save_every: int | None = 500  # steps; None: only at the end
    keep: int = 2  # checkpoints, besides the trained model
    log_every: int = 10  # steps
    eval_every: int | None = None  # steps; None: only at the end
    report_to: tuple[str, ...] = ()  # names that Trainer knows, such as tensorboard or wandb

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else f"steps {self.steps} and epochs {self.epochs}"
            raise RecipeError(f"exactly one of train.steps and train.epochs must be given, got {given}")
        for name in ("batch_size", "accumulate", "keep", "log_every"):
            check_whole(f"train.{name}", getattr(self, name), 1)
        for name in ("steps", "save_every", "eval_every"):
            if getattr(self, name) is not None:
                check_whole(f"train.{name}", getattr(self, name), 1)
        check_whole("train.warmup_steps", self.warmup_steps, 0)
        for name in ("learning_rate", "router_learning_rate", "expert_learning_rate", "epochs"):
            if getattr(self, name) is not None:
                _check_above_zero(f"train.{name}", getattr(self, name))
        for name in ("weight_decay", "max_grad_norm"):
            check_not_negative(f"train.{name}", getattr(self, name))
        for name in ("gradient_checkpointing", "recompute_experts"):
            check_type(f"train.{name}", getattr(self, name), bool)
        check_type("train.report_to", self.report_to, tuple)
        for name in self.report_to:
            check_type("train.report_to", name, str)
        self._check_choices()
        self._check_restarts()

    def _check_choices(self) -> None:
        check_choice("train.precision", self.precision, get_args(Precision))
        check_choice("train.schedule", self.schedule, get_args(Schedule))
        check_choice("train.freeze", self.freeze, get_args(Freeze))
        check_choice("train.optimizer", self.optimizer, OPTIMIZERS)
        if self.lora is not None and self.freeze != "none":
            raise RecipeError(
                f"train.freeze must be 'none' with train.lora, which freezes all but its adapters, got "
                f"{self.freeze!r}"
            )

    def _check_restarts(self) -> None:
        check_type("train.restarts", self.restarts, tuple)
        for step in self.restarts:
            check_whole("train.restarts", step, 1)
        if list(self.restarts) != sorted(set(self.restarts)):
            raise RecipeError(f"train.restarts must be steps in rising order, got {list(self.restarts)}")
        if self.restarts and self.steps is not None and self.restarts[-1] >= self.steps:
            raise RecipeError(
                f"train.restarts must lie below train.steps ({self.steps}), got {self.restarts[-1]}"
            )


@dataclass(frozen=True, kw_only=True)
class MoeSection:
    """The section `moe`: what only a Mixture of Experts has. Losses are per layer and summed over layers."""

    balance_loss: float = 0.01
    # the tokens over which shares and mean probabilities are taken
    balance_over: BalanceOver = "micro_batch"
    z_loss: float = 0.0
    bias_update: float = 0.0  # step of the selection bias after each update of the weights; 0: off
    expert_dropout: float | None = None  # None: as the checkpoint says
    gate: Gate | None = None  # None: as the checkpoint says

    def __post_init__(self) -> None:
        for name in ("balance_loss", "z_loss", "bias_update"):
            check_not_negative(f"moe.{name}", getattr(self, name))
        check_choice("moe.balance_over", self.balance_over, get_args(BalanceOver))
        if self.expert_dropout is not None:
            check_share("moe.expert_dropout", self.expert_dropout)
            if self.expert_dropout == 1:
                raise RecipeError("moe.expert_dropout must be below 1, got 1")
        if self.gate is not None:
            check_choice("moe.gate", self.gate, get_args(Gate))


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """What is trained, on what, how, and where the result goes.

    `moe` is None where the recipe has no such section: then a model with experts is trained with the
    section's defaults, and one without experts is allowed.
    """

    model: str  # a checkpoint folder
    output: str
    data: DataRecipe
    train: TrainSection
    moe: MoeSection | None = None
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    seed: int = 0

    def __post_init__(self) -> None:
        check_type("model", self.model, str)
        check_type("output", self.output, str)
        check_whole("seed", self.seed, 0)
        if self.seed >= 1 << 32:
            raise RecipeError(f"seed must be below {1 << 32}, got {self.seed}")
        for name, kind in (("data", DataRecipe), ("train", TrainSection), ("parallel", ParallelRecipe)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise RecipeError(f"{name} must be a section of 'key: value' lines, got {value!r}")
        if self.parallel.data != "none" and self.train.optimizer not in ELEMENTWISE:
            raise RecipeError(
                f"train.optimizer must be one of {', '.join(map(repr, ELEMENTWISE))} with parallel.data "
                f"{self.parallel.data!r}, got {self.train.optimizer!r}"
            )
        if self.moe is not None and self.moe.bias_update and self.train.lora is not None:
            raise RecipeError(
                "moe.bias_update must be 0 with train.lora, whose checkpoints hold adapters only, got "
                f"{self.moe.bias_update}"
            )
        if Path(self.output).resolve() == Path(self.model).resolve():
            raise RecipeError(f"output must be another folder than model, got {self.output!r} for both")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; `recipe_from_dict` reads them back."""
        return {name: value for name, value in _plain(asdict(self)).items() if value is not None}


def load_recipe(path: str | Path) -> TrainRecipe:
    """Read a recipe from a YAML file. Relative paths in it start at the current folder.

    Raises:
        RecipeError: the file is missing or no YAML, a key is unknown, or a value is not allowed.
    """
    return recipe_from_dict(read_yaml(path), where=str(path))


def recipe_from_dict(values: Mapping[str, Any], *, where: str = "recipe") -> TrainRecipe:
    """Build a recipe from plain values; `where` begins every message.

    Raises:
        RecipeError: a key is unknown or missing, or a value is not allowed.
    """
    return build(TrainRecipe, values, where)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(element) for name, element in value.items()}
    return [_plain(element) for element in value] if isinstance(value, list | tuple) else value


def _check_above_zero(name: str, value: object) -> None:
    check_not_negative(name, value)
    if value == 0:
        raise RecipeError(f"{name} must be above 0, got 0")
