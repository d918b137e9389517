"""Recipes: what to upcycle, from what, into what. Frozen, checked when built, read from YAML."""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from moe_runtime.config import BlockKind, Gate, KeyValue, Score
from moe_runtime.recipe_checks import MAX_EXPERTS, check_choice, check_finite, check_type
from moe_runtime.recipe_file import build, read_yaml
from upcycle.errors import RecipeError
from upcycle.method_sections import (
    SECTIONS,
    DropRecipe,
    GranularRecipe,
    LayersRecipe,
    NoiseRecipe,
    ReplicateRecipe,
    SharedExpertRecipe,
)
from upcycle.sources import AdapterSource

Method = Literal["copy", "btx", "bam", "noise", "drop", "granular", "shared_expert", "replicate", "upit"]
TargetName = Literal["moe_runtime", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe"]
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

# Every expert comes from the feed-forward of one dense model; of replicate, from those of one mixture.
FROM_BASE = ("copy", "noise", "drop", "granular", "shared_expert", "replicate")

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
    data: tuple[str | tuple[str, ...], ...] = ()  # for each expert a text file, or prompts
    max_tokens: int = 8192  # of each file or prompt
    lam: float = 0.01  # of ridge, times the mean square of a router input
    path: str = ""  # of a file with the weights
    aux_loss_coef: float = 0.01
    z_loss_coef: float | None = None  # None: 0 for copy and btx, 0.001 for bam

    def __post_init__(self) -> None:
        check_choice("router.score", self.score, get_args(Score))
        if self.gate is not None:
            check_choice("router.gate", self.gate, get_args(Gate))
        check_type("router.selection_bias", self.selection_bias, bool)
        check_type("router.seed", self.seed, int)
        for name in ("scale", "std", "aux_loss_coef", "z_loss_coef"):
            value = getattr(self, name)
            if value is not None or name != "z_loss_coef":
                check_finite(f"router.{name}", value)
                if value < 0 and name.endswith("_coef"):
                    raise RecipeError(f"router.{name} must not be negative, got {value}")
        # A router of zeros scores all experts alike, so that top-k sends every token to the same ones.
        for name in ("scale", "std"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"router.{name} must be above 0, got {getattr(self, name)}")
        self._check_init()

    def _check_init(self) -> None:
        check_choice("router.init", self.init, get_args(RouterInit))
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
            check_type("router.max_tokens", self.max_tokens, int)
            if self.max_tokens < 1:
                raise RecipeError(f"router.max_tokens must be at least 1, got {self.max_tokens}")
        check_type("router.path", self.path, str)
        if self.init == "file" and not self.path:
            raise RecipeError("router.path must name the file of router weights that init 'file' reads")

    @property
    def is_drawn(self) -> bool:
        """At random, from the seed; else the weights come from a file."""
        return self.init in ("normal", "orthogonal")

    def describe(self) -> str:
        """How the first weights are made, in words."""
        match self.init:
            case "normal":
                return f"normal, std {self.std}, seed {self.seed}"
            case "orthogonal":
                return f"orthogonal rows of length {self.row_norm}, seed {self.seed}"
            case "file":
                return f"router weights of {self.path}"
        return (
            f"{self.init} of the routers' inputs when the base reads at most {self.max_tokens:,} tokens of "
            f"each of {', '.join(map(name_of_data, self.data))}; computed before anything is written"
        )

    def to_dict(self) -> dict[str, Any]:
        """What has an effect, as plain values."""
        values = asdict(self)
        for name in {name for names in _OF_INIT.values() for name in names} - {*_OF_INIT[self.init]}:
            del values[name]
        if "data" in values:
            values["data"] = [text if isinstance(text, str) else list(text) for text in self.data]
        return values


@dataclass(frozen=True, kw_only=True)
class AttentionRecipe:
    """The mixture of attention (bam only): own or shared keys and values, all experts or the best `top_k`."""

    kv: KeyValue = "expert"
    top_k: int | None = None
    renormalise_top_k: bool = False

    def __post_init__(self) -> None:
        check_choice("attention.kv", self.kv, get_args(KeyValue))
        if self.top_k is not None:
            check_type("attention.top_k", self.top_k, int)
        check_type("attention.renormalise_top_k", self.renormalise_top_k, bool)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One upcycling run.

    `btx` and `bam` read `sources`, one expert from each; `base`, the first source unless named, then gives
    tokenizer and configuration, and with `non_expert: base` also every tensor that is no expert. The other
    methods read `base` alone, a dense model, or for `replicate` a mixture, whose routing is kept. Values left
    out are filled with the method's own: a built recipe says all that will happen.
    """

    method: Method
    output: str
    base: str | AdapterSource = ""
    sources: tuple[str | AdapterSource, ...] = ()
    target: TargetName = "moe_runtime"
    experts: int | None = None  # None: one per source; replicate: as many as its counts make
    experts_per_token: int | None = None  # None: 1 for bam, the shards for granular, else 2; replicate: kept
    router: RouterRecipe = field(default_factory=RouterRecipe)
    attention: AttentionRecipe | None = None  # bam only
    drop: DropRecipe | None = None  # drop, and if given granular
    noise: NoiseRecipe | None = None
    granular: GranularRecipe | None = None
    shared_expert: SharedExpertRecipe | None = None
    replicate: ReplicateRecipe | None = None
    block: BlockKind | None = None  # None: as in the sources
    # every_other: the second, the fourth …
    layers: Literal["all", "every_other"] | tuple[int, ...] | LayersRecipe = "all"
    non_expert: NonExpert = "mean"
    dtype: Dtype | None = None  # None: as in the base
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        self._check_values()
        self._check_sections()
        self._check_sources()
        self._fill_in()
        if self.method == "replicate":
            self._check_replicate()
        else:
            self._check_routing()

    def _check_values(self) -> None:
        check_choice("method", self.method, get_args(Method))
        check_choice("target", self.target, get_args(TargetName))
        check_choice("non_expert", self.non_expert, get_args(NonExpert))
        if self.block is not None:
            check_choice("block", self.block, get_args(BlockKind))
        if self.dtype is not None:
            check_choice("dtype", self.dtype, get_args(Dtype))
        for name in ("output", "max_shard_size"):
            check_type(name, getattr(self, name), str)
        _check_source("base", self.base)
        if not self.output:
            raise RecipeError("output must name the folder to write, got an empty text")
        for name in ("experts", "experts_per_token"):
            value = getattr(self, name)
            if value is not None:
                check_type(name, value, int)
                if value < 1:
                    raise RecipeError(f"{name} must be at least 1, got {value}")
        _check_layers(self.layers)
        parse_size(self.max_shard_size)

    def _check_sections(self) -> None:
        for name, kind in SECTIONS.items():
            section = getattr(self, name)
            methods = [name, "granular"] if name == "drop" else [name]
            if section is not None and self.method not in methods:
                raise RecipeError(
                    f"{name} belongs to method {' or '.join(map(repr, methods))}, "
                    f"got it with method {self.method!r}"
                )
            if section is None and self.method == name:
                needed = [f.name for f in fields(kind) if f.default is MISSING]
                if needed:
                    raise RecipeError(f"method {name!r} needs a section {name!r} with {needed[0]!r}")
                object.__setattr__(self, name, kind())

    def _check_sources(self) -> None:
        check_type("sources", self.sources, tuple)
        for source in self.sources:
            _check_source("sources", source)
        if self.method in FROM_BASE:
            kind = "mixture" if self.method == "replicate" else "dense model"
            if self.sources or not self.base:
                raise RecipeError(f"method {self.method!r} has one {kind} under 'base' and no 'sources'")
            if self.experts is None and self.method != "replicate":
                raise RecipeError(f"method {self.method!r} needs 'experts', the number of them in each layer")
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
        if self.replicate is not None:
            on = self.replicate.noise_on or ("selection_bias" if self.target == "moe_runtime" else "weights")
            object.__setattr__(self, "replicate", replace(self.replicate, noise_on=on))
            return
        bam = self.method == "bam"
        experts_per_token = self.granular.shards if self.granular else 1 if bam else 2
        filled: dict[str, Any] = {
            "base": self.base or self.sources[0],
            "experts": self.experts or len(self.sources),
            "experts_per_token": self.experts_per_token or experts_per_token,
            "router": _replace_none(
                self.router, gate="raw" if bam else "renorm", z_loss_coef=0.001 if bam else 0.0
            ),
            "attention": (self.attention or AttentionRecipe()) if bam else None,
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)

    def _check_replicate(self) -> None:
        kept = {"experts": None, "router": RouterRecipe(), "layers": "all", "block": None}
        for name, default in kept.items():
            if getattr(self, name) != default:
                raise RecipeError(
                    f"{name} must be left out with method 'replicate', which keeps the mixture's own"
                )

    def _check_routing(self) -> None:
        assert self.experts is not None
        assert self.experts_per_token is not None
        if self.experts > MAX_EXPERTS:
            raise RecipeError(f"experts must be at most {MAX_EXPERTS}, got {self.experts}")
        if self.experts_per_token > self.experts:
            raise RecipeError(
                f"experts_per_token must be at most the number of experts ({self.experts}), "
                f"got {self.experts_per_token}"
            )
        if self.granular is not None:
            self._check_virtual_groups(self.granular)
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

    def _check_virtual_groups(self, granular: GranularRecipe) -> None:
        for name in ("experts", "experts_per_token"):
            if getattr(self, name) % granular.shards:
                raise RecipeError(
                    f"{name} must be a multiple of granular.shards ({granular.shards}), so that a token gets "
                    f"every shard of a copy, got {getattr(self, name)}"
                )
        if not self.router.is_drawn:
            raise RecipeError(
                "router.init must be 'normal' or 'orthogonal' with method 'granular', where the shards of "
                f"a copy share one row, got {self.router.init!r}"
            )
        raw_sigmoid = self.router.gate == "raw" and self.router.score == "sigmoid"
        if raw_sigmoid and granular.scale_mode != "none":
            raise RecipeError(
                "granular.scale_mode must be 'none' with router.gate 'raw' and router.score 'sigmoid', whose "
                f"gates have no known sum, got {granular.scale_mode!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; `recipe_from_dict` reads them back."""
        values = asdict(self)
        values["router"] = self.router.to_dict()
        unused = ["sources"] if self.method in FROM_BASE else []
        unused += [name for name in ("attention", *SECTIONS) if values[name] is None]
        unused += ["router", "experts"] if self.method == "replicate" else []
        for name in unused:
            del values[name]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file. Relative paths in it start at the current folder.

    Raises:
        RecipeError: the file is missing or no YAML, a key is unknown, or a value is not allowed.
    """
    return recipe_from_dict(read_yaml(path), where=str(path))


def recipe_from_dict(values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a recipe from plain values; `where` begins every message.

    Raises:
        RecipeError: a key is unknown or missing, or a value is not allowed.
    """
    return build(Recipe, values, where)


def parse_size(text: str) -> int:
    """Bytes of a size such as '500MB', '5GB' or '4GiB'."""
    digits = text.rstrip("BGIKMbgikm ")
    unit = text[len(digits) :].strip().upper()
    if not digits.isdigit() or unit not in _SIZE_UNITS or int(digits) == 0:
        raise RecipeError(
            f"max_shard_size must be a whole number with a unit, such as 5GB or 500MB, got {text!r}"
        )
    return int(digits) * _SIZE_UNITS[unit]


def _check_source(name: str, source: object) -> None:
    if isinstance(source, AdapterSource):
        check_type(f"base of an adapter under {name!r}", source.base, str)
        check_type(f"adapter under {name!r}", source.adapter, str)
    else:
        check_type(name, source, str)


def _replace_none(router: RouterRecipe, **defaults: Any) -> RouterRecipe:
    values = asdict(router)
    return RouterRecipe(**{**values, **{n: v for n, v in defaults.items() if values[n] is None}})


def _check_above_zero(name: str, value: object) -> None:
    check_type(name, value, (int, float))
    assert isinstance(value, int | float)
    if not 0 < value <= sys.float_info.max:
        raise RecipeError(f"{name} must be finite and above 0, got {value}")


def name_of_data(text: str | tuple[str, ...]) -> str:
    """The path of a file; prompts are only counted."""
    return text if isinstance(text, str) else f"{len(text)} prompt(s)"


def _data_in_order(data: object) -> tuple[str | tuple[str, ...], ...]:
    """The texts of experts 0, 1, 2 …, from a list or from lines 'expert: text'."""
    if isinstance(data, Mapping):
        if sorted(data, key=str) != sorted(range(len(data)), key=str):
            raise RecipeError(f"router.data must name experts 0 to {len(data) - 1}, got {[*data]}")
        data = tuple(data[expert] for expert in range(len(data)))
    check_type("router.data", data, tuple)
    assert isinstance(data, tuple)
    if not data:
        raise RecipeError("router.data must name one text file for each expert, got none")
    texts = tuple(tuple(text) if isinstance(text, list) else text for text in data)
    for text in texts:
        prompts = text if isinstance(text, tuple) else (text,)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise RecipeError(
                f"router.data must hold a text file or a list of prompts for each expert, got {text!r}"
            )
    return texts


def _check_layers(layers: object) -> None:
    if layers in ("all", "every_other") or isinstance(layers, LayersRecipe):
        return
    are_numbers = isinstance(layers, tuple) and all(
        isinstance(n, int) and not isinstance(n, bool) for n in layers
    )
    if not are_numbers or not layers:
        raise RecipeError(
            "layers must be 'all', 'every_other' or a list of layer numbers, or have first_dense or "
            f"moe_every below it, got {layers!r}"
        )
