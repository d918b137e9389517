"""The named shapes that the expert kernels are measured in, those of published models."""

from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class ExpertShape:
    """A gated expert layer: model width D, width F of an expert, E experts, K of them per token."""

    D: int
    F: int
    E: int
    K: int


EXPERTS = {
    "smollm2-135m-8x": ExpertShape(576, 1536, 8, 2),
    "olmoe-1b-7b": ExpertShape(2048, 1024, 64, 8),
    "qwen3-30b-a3b": ExpertShape(2048, 768, 128, 8),
    "qwen3-next-80b-a3b": ExpertShape(2048, 512, 512, 10),
    "gpt-oss-20b": ExpertShape(2880, 2880, 32, 4),
    "mixtral-8x7b": ExpertShape(4096, 14336, 8, 2),
    "tiny": ExpertShape(32, 16, 4, 2),
}


@dataclass(frozen=True)
class MixShape:
    """Outputs of A attention experts in S slots of width Q each, as docs/design.md says, and width D."""

    S: int
    A: int
    Q: int
    D: int


MIXES = {
    "smollm2-135m-shared-kv": MixShape(3, 4, 192, 576),
    "bam-1024-own-kv": MixShape(1, 4, 1024, 1024),
    "bam-1024-shared-kv": MixShape(8, 4, 128, 1024),
    "bam-4096-own-kv": MixShape(1, 4, 4096, 4096),
    "bam-4096-shared-kv": MixShape(8, 4, 512, 4096),
    "tiny": MixShape(2, 3, 16, 32),
}

# what a run on each kind of device measures: every T of the shape that the bars are about, two of the others
_GPU = {"qwen3-30b-a3b": (1, 16, 128, 1024, 8192, 32768)} | dict.fromkeys(
    ("olmoe-1b-7b", "qwen3-next-80b-a3b", "gpt-oss-20b", "mixtral-8x7b"), (128, 8192)
)
ROUTINGS = ("uniform", "zipf", "one_hot")  # benchmarks/exact.py draws them
_SKEWED = ("qwen3-30b-a3b", 8192)
CASES = {  # model, tokens, routing
    "gpu": [(model, tokens, "uniform") for model, sizes in _GPU.items() for tokens in sizes]
    + [(*_SKEWED, routing) for routing in ROUTINGS[1:]],
    "cpu": [("smollm2-135m-8x", 1, "uniform")] + [("smollm2-135m-8x", 64, routing) for routing in ROUTINGS],
    "tiny": [("tiny", 24, routing) for routing in ROUTINGS],
}


def expert_cases():
    """Decorator: `model`, `tokens` and `routing` of every case; `skip_other_sizes` leaves those to be run."""
    every = [case for cases in CASES.values() for case in cases]
    ids = ["-".join(map(str, case)) for case in every]
    return pytest.mark.parametrize(("model", "tokens", "routing"), every, ids=ids)


def skip_other_sizes(model: str, tokens: int, routing: str, tiny: bool) -> None:
    """Only the cases of what there is: of a GPU, of a CPU, or the tiny ones that were asked for."""
    kind = "tiny" if tiny else "gpu" if torch.cuda.is_available() else "cpu"
    if (model, tokens, routing) not in CASES[kind]:
        pytest.skip("the sizes of another device were not asked for")
