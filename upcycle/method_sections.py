"""Sections of a recipe that one method reads, and the rule for the layers that get experts."""

from dataclasses import dataclass
from typing import Literal, get_args

from moe_runtime.recipe_checks import check_choice, check_not_negative, check_share, check_type, check_whole
from upcycle.errors import RecipeError

ScaleMode = Literal["exact", "cuberoot", "none"]
NoiseOn = Literal["selection_bias", "weights"]


@dataclass(frozen=True, kw_only=True)
class LayersRecipe:
    """Layer n gets experts if n >= first_dense and n + 1 is a multiple of moe_every."""

    first_dense: int = 0
    moe_every: int = 1

    def __post_init__(self) -> None:
        check_whole("layers.first_dense", self.first_dense, 0)
        check_whole("layers.moe_every", self.moe_every, 1)


@dataclass(frozen=True, kw_only=True)
class DropRecipe:
    """Which share of each expert's hidden units is drawn anew."""

    ratio: float = 0.5
    shared_indices: bool = True  # gate, up and down lose the same units; False: each matrix its own
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("drop.ratio", self.ratio)
        check_type("drop.shared_indices", self.shared_indices, bool)
        check_type("drop.seed", self.seed, int)


@dataclass(frozen=True, kw_only=True)
class NoiseRecipe:
    """Normal noise on each expert's weights."""

    std: float
    share: float = 1.0  # of the weights that get it
    seed: int = 0

    def __post_init__(self) -> None:
        check_not_negative("noise.std", self.std)
        check_share("noise.share", self.share)
        check_type("noise.seed", self.seed, int)


@dataclass(frozen=True, kw_only=True)
class GranularRecipe:
    """Into how many experts one copy of the feed-forward is cut, and how the parts are scaled."""

    shards: int
    scale_mode: ScaleMode = "exact"
    shuffle: bool = False  # cut each copy's hidden units in an order of its own
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("granular.shards", self.shards, 1)
        check_choice("granular.scale_mode", self.scale_mode, get_args(ScaleMode))
        check_type("granular.shuffle", self.shuffle, bool)
        check_type("granular.seed", self.seed, int)


@dataclass(frozen=True, kw_only=True)
class SharedExpertRecipe:
    """Width of the routed experts beside the dense feed-forward, and how loud they start."""

    expert_width: int
    residual_scale: float = 0.0  # of the routed experts' down projection
    seed: int = 0  # of the hidden units that each routed expert takes from the dense feed-forward

    def __post_init__(self) -> None:
        check_whole("shared_expert.expert_width", self.expert_width, 1)
        check_not_negative("shared_expert.residual_scale", self.residual_scale)
        check_type("shared_expert.seed", self.seed, int)


@dataclass(frozen=True, kw_only=True)
class ReplicateRecipe:
    """How often each expert of a mixture is copied, and the noise that tells its copies apart."""

    counts: int | tuple[int | tuple[int, ...], ...]  # for all experts; for each; or for each of every layer
    noise: float = 0.001  # uniform between -noise and noise, on every copy of an expert but its first
    noise_on: NoiseOn | None = None  # None: selection_bias where the target has one, else router weights
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.counts, tuple):
            by_layer = any(isinstance(count, tuple) for count in self.counts)
            if by_layer and not all(isinstance(counts, tuple) for counts in self.counts):
                raise RecipeError("replicate.counts must be numbers or one list per layer, got both")
            layers = self.counts if by_layer else (self.counts,)
            for counts in layers:
                assert isinstance(counts, tuple)
                for count in counts:
                    check_whole("replicate.counts", count, 1)
            if not all(layers) or not layers:
                raise RecipeError("replicate.counts must be a number or one number per expert, got none")
        else:
            check_whole("replicate.counts", self.counts, 1)
        check_not_negative("replicate.noise", self.noise)
        if self.noise_on is not None:
            check_choice("replicate.noise_on", self.noise_on, get_args(NoiseOn))
        check_type("replicate.seed", self.seed, int)

    def of_layer(self, place: int) -> int | tuple[int, ...]:
        """The counts of the `place`-th layer with experts."""
        if isinstance(self.counts, int):
            return self.counts
        of_layers = [counts for counts in self.counts if isinstance(counts, tuple)]
        return (
            of_layers[place] if of_layers else tuple(count for count in self.counts if isinstance(count, int))
        )


SECTIONS = {
    "drop": DropRecipe,
    "noise": NoiseRecipe,
    "granular": GranularRecipe,
    "shared_expert": SharedExpertRecipe,
    "replicate": ReplicateRecipe,
}
