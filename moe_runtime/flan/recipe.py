"""The recipe of `moe-runtime flan`: two models, instructions, tasks, and how both are tuned. Torch-free."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from moe_runtime.errors import RecipeError
from moe_runtime.recipe_checks import check_choice, check_type, check_whole
from moe_runtime.recipe_file import build, read_yaml
from moe_runtime.train.data import DataRecipe
from moe_runtime.train.recipe import MoeSection, Precision, TrainRecipe, TrainSection


@dataclass(frozen=True, kw_only=True)
class FlanTask:
    """A task of its own: files of JSON lines to tune on and to be measured with; see docs/eval.md."""

    name: str
    train: str
    test: str

    def __post_init__(self) -> None:
        for key in ("name", "train", "test"):
            check_type(f"tasks.{key}", getattr(self, key), str)
        if not self.name or set(self.name) & set("/\\.") or self.name.startswith("-"):
            raise RecipeError(f"tasks.name must be fit for a folder's name, got {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class FlanRecipe:
    """Two models that are tuned alike.

    `instruction_tuning` and `task_tuning` are sections `train` of `moe-runtime train`, with `steps`. Those
    are the mixture's; its twin gets as many as cost the same FLOPs.
    """

    mixture: str  # a checkpoint folder with experts
    dense: str  # its dense twin
    output: str
    instructions: tuple[str, ...]  # files to tune on, of which `tasks` are no part
    tasks: tuple[FlanTask, ...]
    instruction_tuning: TrainSection
    task_tuning: TrainSection
    moe: MoeSection = field(default_factory=lambda: MoeSection(expert_dropout=0.2))
    max_length: int = 512
    shots: int = 2  # worked examples in front of a question, for models that are not tuned on the task
    measure_precision: Precision = "float32"  # of weights and products while both models are measured
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mixture", "dense", "output"):
            check_type(name, getattr(self, name), str)
        for name in ("instructions", "tasks"):
            check_type(name, getattr(self, name), tuple)
            if not getattr(self, name):
                raise RecipeError(f"{name} must name at least one, got none")
        for task in self.tasks:
            if not isinstance(task, FlanTask):
                raise RecipeError(f"tasks must be sections with name, train and test, got {task!r}")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise RecipeError(f"tasks.name must be another for each task, got {names}")
        for name in ("instruction_tuning", "task_tuning"):
            _check_tuning(name, getattr(self, name))
        check_whole("max_length", self.max_length, 2)
        check_whole("shots", self.shots, 0)
        check_choice("measure_precision", self.measure_precision, get_args(Precision))
        check_whole("seed", self.seed, 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def training(
        self,
        model: str,
        output: Path,
        files: tuple[str, ...],
        section: TrainSection,
        steps: int,
        *,
        mixes: bool,
    ) -> TrainRecipe:
        """The recipe of one tuning; `mixes` says whether the model has experts."""
        if not mixes:
            section = replace(
                section, router_learning_rate=None, expert_learning_rate=None, recompute_experts=False
            )
        return TrainRecipe(
            model=model,
            output=str(output),
            data=DataRecipe(train=files, max_length=self.max_length, too_long="drop"),
            train=replace(section, steps=steps),
            moe=self.moe if mixes else None,
            seed=self.seed,
        )


def _check_tuning(name: str, section: object) -> None:
    if not isinstance(section, TrainSection):
        raise RecipeError(f"{name} must be a section of 'key: value' lines, got {section!r}")
    if section.steps is None:
        raise RecipeError(f"{name}.steps must be given, because the twin's follow from it, got epochs")
    if section.lora is not None or section.freeze != "none":
        raise RecipeError(f"{name} must have neither lora nor freeze, which a dense twin has not")


def load_recipe(path: str | Path) -> FlanRecipe:
    """Read a recipe from a YAML file. Relative paths in it start at the current folder.

    Raises:
        RecipeError: the file is missing or no YAML, a key is unknown, or a value is not allowed.
    """
    return build(FlanRecipe, read_yaml(path), str(path))
