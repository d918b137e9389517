"""The base as a torch model, and an expert's feed-forwards in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_runtime.hf.loading import load_causal_lm, load_tokenizer
from moe_runtime.train.data.samples import IGNORED, Sample
from upcycle.sources import open_source, plain_folder
from upcycle.upit.data import Data, load_data
from upcycle.upit.expert import LORA_A, LORA_B, Expert, ExpertReader, whole_tensor
from upcycle.upit.files import generator
from upcycle.upit.fit import Batch, collate
from upcycle.upit.low_rank import LowRankModel
from upcycle.upit.recipe import UpitRecipe


def load_dense(path: str | Path, device: str) -> Any:
    """The dense model in a folder, or of an expert's, in float32."""
    with plain_folder(open_source(str(path))) as folder:
        return load_causal_lm(folder, dtype=torch.float32, device=device)


def load_samples(recipe: UpitRecipe) -> Data:
    return load_data(recipe.data, load_tokenizer(Path(recipe.base).expanduser()), recipe.max_length)


def language_loss(model: Any, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the tokens that count; a mixture in training adds its balance loss."""
    return model(
        input_ids=batch.ids_BL, attention_mask=batch.mask_BL, labels=batch.labels_BL, use_cache=False
    ).loss


def new_factors(
    model: nn.Module, layers: Sequence[Sequence[str]], rank: int, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """First factors of every feed-forward matrix: A as PEFT draws it, B zero."""
    factors = {}
    for name in (name for layer in layers for name in layer):
        weight_OI = model.get_parameter(name)
        if weight_OI.dim() == 2:
            O, I = weight_OI.shape
            drawn = generator(seed, f"lora {name}").uniform(-(I**-0.5), I**-0.5, (rank, I))
            A_RI = torch.from_numpy(drawn.astype(np.float32)).to(weight_OI.device)
            factors[name] = A_RI, torch.zeros(O, rank, device=weight_OI.device)
    return factors


class ExpertInModel:
    """A dense model with an expert's feed-forwards, whose own parameters can be trained; use it in a `with`.

    The model keeps the tensors of a full expert afterwards: the next one of its kind replaces them all.
    """

    def __init__(self, model: Any, expert: Expert) -> None:
        self.model, self.expert = model, expert
        self.low_rank: LowRankModel | None = None

    def __enter__(self) -> dict[str, nn.Parameter]:
        """The expert's parameters: its feed-forwards, or its low-rank factors."""
        self.model.requires_grad_(False)
        with ExpertReader(self.expert) as reader:
            if self.expert.kind == "lora":
                factors = {
                    name: (self._factor(reader, name + LORA_A), self._factor(reader, name + LORA_B))
                    for name in self.expert.changed
                }
                self.low_rank = LowRankModel(self.model, factors, scaling=1.0)
                return self.low_rank.parameters()
            parameters = {}
            for name in self.expert.changed:
                parameter = self.model.get_parameter(name)
                with torch.no_grad():
                    parameter.copy_(torch.from_numpy(whole_tensor(reader, name)))
                parameters[name] = parameter.requires_grad_()
        return parameters

    def __exit__(self, *_: object) -> None:
        if self.low_rank is not None:
            self.low_rank.remove()

    def _factor(self, reader: ExpertReader, name: str) -> Tensor:
        return torch.from_numpy(reader.factor(name)).to(self.model.device)


@torch.no_grad()
def log_perplexities(
    model: Any, samples: Sequence[Sample], batch_size: int, device: str, bfloat16: bool
) -> list[float]:
    """Mean negative log-likelihood of the counted tokens of every sample."""
    model.eval()
    means = []
    for start in range(0, len(samples), batch_size):
        batch = collate(samples, range(start, min(start + batch_size, len(samples))), device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
            logits_BLV = model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL, use_cache=False).logits
        next_BL = batch.labels_BL[:, 1:]
        loss_BL = nn.functional.cross_entropy(
            logits_BLV[:, :-1].float().transpose(1, 2), next_BL, ignore_index=IGNORED, reduction="none"
        )
        means.append(loss_BL.sum(dim=1) / (next_BL != IGNORED).sum(dim=1))
    return torch.cat(means).tolist()
