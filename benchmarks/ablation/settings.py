"""What the ablation trains, on how much text. Frozen; two sets: the whole run and one of seconds."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """Sizes of the model and the texts, and one schedule for every method.

    All methods see the same samples in two rounds, of `expert_epochs` and `mixture_epochs`, each with its own
    warm-up and its end at a rate of zero. Those that train experts before there is a mixture (BTX, BAM, UpIT)
    do so in the first round.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    vocab_size: int = 1024
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
        }
    )
    length: int = 128  # tokens of a sample
    base_samples: int = 3000  # of each domain, for the base
    samples: int = 416  # of each domain, for everything after it
    heldout: int = 48  # of each domain
    batch_size: int = 16
    base_lr: float = 2e-3
    lr: float = 1e-3
    warmup: float = 0.05
    expert_epochs: float = 1.0
    mixture_epochs: float = 1.0
    experts: int = 4  # of copy, drop and UpIT; BTX and BAM have one per domain
    drop_ratio: float = 0.5
    seed_fraction: float = 0.1  # of the samples, for UpIT's routers
    route_epochs: int = 4

    @property
    def rounds(self) -> tuple[float, float]:
        return self.expert_epochs, self.mixture_epochs


TINY = AblationSettings(
    seeds=(0,),
    vocab_size=300,
    model={
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    length=16,
    base_samples=16,
    samples=16,
    heldout=4,
    batch_size=8,
    seed_fraction=0.2,
    route_epochs=1,
)
