"""The ablation's texts: a tokenizer, the base's samples, a file per domain to go on with, held-out rows."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.ablation.settings import AblationSettings
from moe_runtime.demo.text import BUILT_IN, Domain

END = "<|end|>"
TOKENIZER_CHARACTERS = 300_000  # of each domain


def domains() -> tuple[Domain, ...]:
    return tuple(make() for make in BUILT_IN.values())


def shuffled(domain: Domain) -> list[str]:
    """The domain's documents, always in the same drawn order."""
    return random.Random(f"ablation {domain.name}").sample(domain.documents, len(domain.documents))


def train_tokenizer(texts: Sequence[Domain], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of bytes, trained on as much of each domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ("\n".join(shuffled(domain))[:TOKENIZER_CHARACTERS] for domain in texts)
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


class Cut:
    """Samples of one domain's documents, taken in their order; no document gives to two takings."""

    def __init__(self, domain: Domain, tokenizer: Any, length: int) -> None:
        self.domain, self.tokenizer, self.length = domain, tokenizer, length
        self._documents = iter(shuffled(domain))

    def take(self, count: int) -> Tensor:
        """Token rows [count, L].

        Raises:
            ValueError: the domain has too little text.
        """
        ids: list[int] = []
        while len(ids) < count * self.length:
            document = next(self._documents, None)
            if document is None:
                raise ValueError(
                    f"the text {self.domain.name!r} must give {count} samples of {self.length} tokens more, "
                    f"and ended at {len(ids) // self.length}"
                )
            ids += self.tokenizer(document, verbose=False)["input_ids"]
        return torch.tensor(ids[: count * self.length]).view(count, self.length)


def write_texts(settings: AblationSettings, tokenizer: Any, folder: Path) -> dict[str, Tensor]:
    """Write `<domain>.txt` for everything after the base; returns the base's rows as "base" and each domain's
    held-out ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Tensor] = {}
    base = []
    for domain in domains():
        cut = Cut(domain, tokenizer, settings.length)
        rows[domain.name] = cut.take(settings.heldout)
        text = tokenizer.decode(cut.take(settings.samples).flatten().tolist())
        (folder / f"{domain.name}.txt").write_text(text, encoding="utf-8")
        base.append(cut.take(settings.base_samples))
    return {"base": torch.cat(base), **rows}
