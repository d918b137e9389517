"""Recipes: what to upcycle, from what, into what. Frozen, checked when built, read from YAML."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from moe_runtime.config import BlockKind, Gate, KeyValue, Score
from upcycle.errors import RecipeError

Method = Literal["copy", "btx", "bam"]
TargetName = Literal["moe_runtime", "mixtral", "qwen2_moe", "qwen3_moe"]
NonExpert = Literal["mean", "base"]
Dtype = Literal["float32", "bfloat16", "float16"]
RouterInit = Literal["normal", "orthogonal", "file", "centroid", "ridge"]

# The settings of each router.init; the others must be left out.
_OF_INIT: dict[str, tuple[str, ...]] = {
    "normal": ("std", "seed"),
    "orthogonal": ("row_norm", "seed"),
    "file": ("path",),
    "centroid": ("row_norm", "data", "max_tokens"),
    "ridge": ("row_norm", "data", "max_tokens", "lam"),
}
_ROW_NORM = {"orthogonal": 1.0, "centroid": 1.0, "ridge": 10.0}

_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class RouterRecipe:
    """The feed-forward router: how it scores, what a gate is, and how its first weights are drawn."""

    score: Score = "softmax"
    gate: Gate | None = None  # None: renorm for copy and btx, raw for bam
    scale: float = 1.0
    selection_bias: bool = False
    init: RouterInit = "normal"
    std: float = 0.02  # of the normal distribution that every router's weights are drawn from
    seed: int = 0
    row_norm: float | None = None  # length of every row; None: 10 for ridge, 1 for orthogonal and centroid
    data: tuple[str, ...] = ()  # one text file per expert
    max_tokens: int = 8192  # of each file
    lam: float = 0.01  # of ridge, times the mean square of a router input
    path: str = ""  # of a file with the weights
    aux_loss_coef: float = 0.01
    z_loss_coef: float | None = None  # None: 0 for copy and btx, 0.001 for bam

    def __post_init__(self) -> None:
        _check_choice("router.score", self.score, get_args(Score))
        if self.gate is not None:
            _check_choice("router.gate", self.gate, get_args(Gate))
        _check_type("router.selection_bias", self.selection_bias, bool)
        _check_type("router.seed", self.seed, int)
        for name in ("scale", "std", "aux_loss_coef", "z_loss_coef"):
            value = getattr(self, name)
            if value is not None:
                _check_type(f"router.{name}", value, (int, float))
                if not math.isfinite(value):
                    raise RecipeError(f"router.{name} must be finite, got {value}")
                if value < 0 and name.endswith("_coef"):
                    raise RecipeError(f"router.{name} must not be negative, got {value}")
        # A router of zeros scores all experts alike, so that top-k sends every token to the same ones.
        for name in ("scale", "std"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"router.{name} must be above 0, got {getattr(self, name)}")
        self._check_init()

    def _check_init(self) -> None:
        _check_choice("router.init", self.init, get_args(RouterInit))
        used = _OF_INIT[self.init]
        defaults = {f.name: f.default for f in fields(self)}
        for name in sorted({name for names in _OF_INIT.values() for name in names}):
            if name not in used and getattr(self, name) != defaults[name]:
                belongs = [init for init, names in _OF_INIT.items() if name in names]
                raise RecipeError(
                    f"router.{name} belongs to router.init {' or '.join(map(repr, belongs))}, "
                    f"got it with {self.init!r}"
                )
        if "row_norm" in used:
            row_norm = _ROW_NORM[self.init] if self.row_norm is None else self.row_norm
            object.__setattr__(self, "row_norm", row_norm)
            _check_above_zero("router.row_norm", row_norm)
        if "data" in used:
            object.__setattr__(self, "data", _data_in_order(self.data))
            _check_above_zero("router.lam", self.lam)
            _check_type("router.max_tokens", self.max_tokens, int)
            if self.max_tokens < 1:
                raise RecipeError(f"router.max_tokens must be at least 1, got {self.max_tokens}")
        _check_type("router.path", self.path, str)
        if self.init == "file" and not self.path:
            raise RecipeError("router.path must name the file of router weights that init 'file' reads")

    def to_dict(self) -> dict[str, Any]:
        """What has an effect, as plain values."""
        values = asdict(self)
        for name in {name for names in _OF_INIT.values() for name in names} - {*_OF_INIT[self.init]}:
            del values[name]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class AttentionRecipe:
    """The mixture of attention (bam only): own or shared keys and values, all experts or the best `top_k`."""

    kv: KeyValue = "expert"
    top_k: int | None = None
    renormalise_top_k: bool = False

    def __post_init__(self) -> None:
        _check_choice("attention.kv", self.kv, get_args(KeyValue))
        if self.top_k is not None:
            _check_type("attention.top_k", self.top_k, int)
        _check_type("attention.renormalise_top_k", self.renormalise_top_k, bool)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One upcycling run.

    `copy` reads `base` alone. `btx` and `bam` read `sources`, one expert from each; `base`, the first source
    unless named, then gives tokenizer and configuration, and with `non_expert: base` also every tensor that
    is no expert. Values left out are filled with the method's own: a built recipe says all that will happen.
    """

    method: Method
    output: str
    base: str = ""
    sources: tuple[str, ...] = ()
    target: TargetName = "moe_runtime"
    experts: int | None = None  # None: one per source
    experts_per_token: int | None = None  # None: 2 for copy and btx, 1 for bam
    router: RouterRecipe = field(default_factory=RouterRecipe)
    attention: AttentionRecipe | None = None  # bam only
    block: BlockKind | None = None  # None: as in the sources
    layers: Literal["all", "every_other"] | tuple[int, ...] = "all"  # every_other: the second, the fourth …
    non_expert: NonExpert = "mean"
    dtype: Dtype | None = None  # None: as in the base
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        self._check_values()
        self._check_sources()
        self._fill_in()
        self._check_routing()

    def _check_values(self) -> None:
        _check_choice("method", self.method, get_args(Method))
        _check_choice("target", self.target, get_args(TargetName))
        _check_choice("non_expert", self.non_expert, get_args(NonExpert))
        if self.block is not None:
            _check_choice("block", self.block, get_args(BlockKind))
        if self.dtype is not None:
            _check_choice("dtype", self.dtype, get_args(Dtype))
        for name in ("output", "base", "max_shard_size"):
            _check_type(name, getattr(self, name), str)
        if not self.output:
            raise RecipeError("output must name the folder to write, got an empty text")
        for name in ("experts", "experts_per_token"):
            value = getattr(self, name)
            if value is not None:
                _check_type(name, value, int)
                if value < 1:
                    raise RecipeError(f"{name} must be at least 1, got {value}")
        _check_layers(self.layers)
        parse_size(self.max_shard_size)

    def _check_sources(self) -> None:
        _check_type("sources", self.sources, tuple)
        for source in self.sources:
            _check_type("sources", source, str)
        if self.method == "copy":
            if self.sources or not self.base:
                raise RecipeError("method 'copy' has one dense model under 'base' and no 'sources'")
            if self.experts is None:
                raise RecipeError("method 'copy' needs 'experts', the number of copies of each feed-forward")
        else:
            if len(self.sources) < 2:
                raise RecipeError(
                    f"method {self.method!r} needs two or more 'sources', got {len(self.sources)}"
                )
            if self.experts not in (None, len(self.sources)):
                raise RecipeError(
                    f"experts must be left out or be the {len(self.sources)} sources, got {self.experts}"
                )
            if self.base and self.base not in self.sources and self.non_expert == "mean":
                raise RecipeError(
                    f"base must be one of the sources unless non_expert is 'base', got {self.base!r}"
                )
        if self.method != "bam" and self.attention is not None:
            raise RecipeError(f"attention belongs to method 'bam', got it with method {self.method!r}")

    def _fill_in(self) -> None:
        bam = self.method == "bam"
        filled: dict[str, Any] = {
            "base": self.base or self.sources[0],
            "experts": self.experts or len(self.sources),
            "experts_per_token": self.experts_per_token or (1 if bam else 2),
            "router": _replace_none(
                self.router, gate="raw" if bam else "renorm", z_loss_coef=0.001 if bam else 0.0
            ),
            "attention": (self.attention or AttentionRecipe()) if bam else None,
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)

    def _check_routing(self) -> None:
        assert self.experts is not None
        assert self.experts_per_token is not None
        if self.experts_per_token > self.experts:
            raise RecipeError(
                f"experts_per_token must be at most the number of experts ({self.experts}), "
                f"got {self.experts_per_token}"
            )
        if self.router.gate == "renorm" and self.experts_per_token == 1:
            raise RecipeError(
                "router.gate 'renorm' with experts_per_token 1 makes every gate 1 and no router learns; "
                "use 'straight_through' for the same function with a router that learns, or 'raw'"
            )
        if self.router.gate == "straight_through" and self.experts_per_token != 1:
            raise RecipeError(
                f"router.gate 'straight_through' needs experts_per_token 1, got {self.experts_per_token}; "
                "use 'renorm'"
            )
        if self.router.data and len(self.router.data) != self.experts:
            raise RecipeError(
                f"router.data must name one text file for each of the {self.experts} experts, "
                f"got {len(self.router.data)}"
            )
        top_k = self.attention.top_k if self.attention else None
        if top_k is not None and not 1 <= top_k <= self.experts:
            raise RecipeError(
                f"attention.top_k must be between 1 and the number of experts ({self.experts}), got {top_k}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; `recipe_from_dict` reads them back."""
        values = asdict(self)
        values["router"] = self.router.to_dict()
        if self.method == "copy":
            del values["sources"], values["attention"]
        elif self.method == "btx":
            del values["attention"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file. Relative paths in it start at the current folder.

    Raises:
        RecipeError: the file is missing or no YAML, a key is unknown, or a value is not allowed.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: the recipe is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise RecipeError(f"{path}: a recipe must be a list of 'key: value' lines")
    return recipe_from_dict(values, where=str(path))


def recipe_from_dict(values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a recipe from plain values; `where` begins every message.

    Raises:
        RecipeError: a key is unknown or missing, or a value is not allowed.
    """
    try:
        return _build(Recipe, values, "")
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def parse_size(text: str) -> int:
    """Bytes of a size such as '500MB', '5GB' or '4GiB'."""
    digits = text.rstrip("BGIKMbgikm ")
    unit = text[len(digits) :].strip().upper()
    if not digits.isdigit() or unit not in _SIZE_UNITS or int(digits) == 0:
        raise RecipeError(
            f"max_shard_size must be a whole number with a unit, such as 5GB or 500MB, got {text!r}"
        )
    return int(digits) * _SIZE_UNITS[unit]


def _build(kind: type, values: Mapping[str, Any], section: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    under = f" under {section!r}" if section else ""
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
            raise RecipeError(f"unknown key {name!r}{under}{hint}")
    for name, f in known.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in values:
            raise RecipeError(f"key {name!r} is missing{under}")
    built = {}
    for name, value in values.items():
        section_kind = {"router": RouterRecipe, "attention": AttentionRecipe}.get(name)
        if section_kind is not None:
            if value is None:  # a section whose lines are all commented out
                continue
            if not isinstance(value, Mapping):
                raise RecipeError(f"{name} must be a section of 'key: value' lines, got {value!r}")
            value = _build(section_kind, value, name)
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)


def _replace_none(router: RouterRecipe, **defaults: Any) -> RouterRecipe:
    values = asdict(router)
    return RouterRecipe(**{**values, **{n: v for n, v in defaults.items() if values[n] is None}})


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_type(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    words = {str: "a text", int: "a whole number", bool: "true or false", tuple: "a list"}
    wanted_bool = kind is bool
    if not isinstance(value, kind) or (isinstance(value, bool) and not wanted_bool):
        expected = words.get(kind, "a number") if isinstance(kind, type) else "a number"
        raise RecipeError(f"{name} must be {expected}, got {value!r}")


def _check_above_zero(name: str, value: object) -> None:
    _check_type(name, value, (int, float))
    assert isinstance(value, int | float)
    if not (math.isfinite(value) and value > 0):
        raise RecipeError(f"{name} must be finite and above 0, got {value}")


def _data_in_order(data: object) -> tuple[str, ...]:
    """The text files of experts 0, 1, 2 …, from a list or from lines 'expert: file'."""
    if isinstance(data, Mapping):
        if sorted(data, key=str) != sorted(range(len(data)), key=str):
            raise RecipeError(f"router.data must name experts 0 to {len(data) - 1}, got {[*data]}")
        data = tuple(data[expert] for expert in range(len(data)))
    _check_type("router.data", data, tuple)
    assert isinstance(data, tuple)
    if not data:
        raise RecipeError("router.data must name one text file for each expert, got none")
    for path in data:
        _check_type("router.data", path, str)
    return data


def _check_layers(layers: object) -> None:
    if layers in ("all", "every_other"):
        return
    are_numbers = isinstance(layers, tuple) and all(
        isinstance(n, int) and not isinstance(n, bool) for n in layers
    )
    if not are_numbers or not layers:
        raise RecipeError(f"layers must be 'all', 'every_other' or a list of layer numbers, got {layers!r}")
