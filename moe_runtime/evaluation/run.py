"""Texts and tasks through a model: one report."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from moe_runtime.generate import evaluating
from moe_runtime.machine import describe_machine

from .perplexity import perplexity
from .scoring import score
from .shared_prompts import score_endings
from .tasks import Example, read_examples

ROW_LENGTH = 1024
# Tokens that an answer may be longer than the longest right one, in which a model can say that it ends.
_MORE_TOKENS = 8
_GENERATED_AT_ONCE = 16


def evaluate_folder(
    path: Path,
    texts: Mapping[str, str],
    tasks: Sequence[str],
    *,
    max_tokens: int,
    device: str,
    console: Console,
    dtype: torch.dtype | str = "auto",
) -> dict[str, Any]:
    """The report of a checkpoint folder as JSON values.

    Args:
        path: a checkpoint folder with its tokenizer.
        texts: files by the name of their domain.
        tasks: files of JSON lines.
        max_tokens: of each text.
        device: where the model runs.
        console: where progress goes, if it is a terminal.
        dtype: of the weights; "auto" keeps the file's.

    Raises:
        OSError, ValueError: the model, a text or a task is not usable.
    """
    from moe_runtime.hf.loading import load_causal_lm, load_tokenizer
    from moe_runtime.hf.quiet import quiet_transformers

    with quiet_transformers():
        tokenizer = load_tokenizer(path)
        model = load_causal_lm(path, dtype=dtype, device=device)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("Evaluating", total=None)
            results = evaluate_model(
                model,
                tokenizer,
                texts,
                tasks,
                max_tokens=max_tokens,
                on_tokens=lambda tokens: progress.advance(bar, tokens),
            )
    return {
        "model": str(path),
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": describe_machine(),
        **results,
    }


def evaluate_model(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, str],
    tasks: Sequence[str],
    *,
    max_tokens: int = 65536,
    on_tokens: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """`texts` and `tasks`, the figures of each by name; a model in training is left in it.

    Raises:
        OSError, ValueError: a text or a task is not usable.
    """
    longest = _positions(model)
    examples = examples_by_task(tasks, tokenizer, longest)
    length = min(ROW_LENGTH, longest or ROW_LENGTH)
    return {
        "texts": {
            name: perplexity(
                model, tokenizer, file, max_tokens=max_tokens, length=length, on_tokens=on_tokens
            )
            for name, file in texts.items()
        },
        "tasks": {
            name: {
                "kind": of_task[0].kind,
                "examples": len(of_task),
                **_FIGURES[of_task[0].kind](model, tokenizer, of_task, on_tokens),
            }
            for name, of_task in examples.items()
        },
    }


def _positions(model: Any) -> int | None:
    """Tokens that a model takes at most; None if it does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def examples_by_task(files: Sequence[str], tokenizer: Any, longest: int | None) -> dict[str, list[Example]]:
    """The examples of all files by their tasks, for a model of `longest` positions.

    Raises:
        OSError, ValueError: a file or a line is not usable.
    """
    by_task: dict[str, list[Example]] = {}
    for file in files:
        examples = list(read_examples(Path(file), tokenizer))
        if not examples:
            raise ValueError(f"{file} must have a line, and is empty")
        for example in examples:
            said = len(example.prompt_ids) + example.answer_tokens + (example.kind == "exact")  # its end
            tokens = max([said, *(len(ending.ids) for ending in example.endings)])
            if longest is not None and tokens > longest:
                raise ValueError(
                    f"{example.where}: has {tokens} tokens, more than the model takes ({longest})"
                )
            of_task = by_task.setdefault(example.task, [])
            if of_task and of_task[0].kind != example.kind:
                raise ValueError(
                    f"{example.where}: must ask as the other lines of task {example.task!r} do "
                    f"({of_task[0].kind}), got {example.kind}"
                )
            of_task.append(example)
    return by_task


def _choice(
    model: Any, tokenizer: Any, examples: list[Example], on_tokens: Callable[[int], None] | None
) -> dict[str, float]:
    """Share of right choices: by log-likelihood, and by that per byte."""
    scores = score_endings(model, [example.endings for example in examples], on_tokens)
    right = right_per_byte = chance = 0.0
    for example, of_choices in zip(examples, scores, strict=True):
        likely = [choice.log_likelihood for choice in of_choices]
        per_byte = [value / size for value, size in zip(likely, example.lengths, strict=True)]
        right += likely.index(max(likely)) == example.answer
        right_per_byte += per_byte.index(max(per_byte)) == example.answer
        chance += 1 / len(likely)
    n = len(examples)
    return {"accuracy": right / n, "accuracy_per_byte": right_per_byte / n, "chance": chance / n}


def _completion(
    model: Any, tokenizer: Any, examples: list[Example], on_tokens: Callable[[int], None] | None
) -> dict[str, float]:
    """Of the completions' tokens, their end included."""
    scores = score(model, [example.endings[0] for example in examples], on_tokens)
    tokens = sum(s.tokens for s in scores)
    nats = -sum(s.log_likelihood for s in scores) / tokens
    return {
        "tokens": tokens,
        "nats_per_token": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": nats * tokens / sum(example.lengths[0] for example in examples) / math.log(2),
        "token_accuracy": sum(s.right for s in scores) / tokens,
    }


def _exact(
    model: Any, tokenizer: Any, examples: list[Example], on_tokens: Callable[[int], None] | None
) -> dict[str, float]:
    """Share of examples in which the model says a right answer: greedy, blanks at both ends aside, up to the
    end of a line unless a right answer has several.
    """
    right = 0
    for batch in _batches(examples, _positions(model)):
        for example, said in zip(batch, _say(model, tokenizer, batch), strict=True):
            if not any("\n" in answer.strip() for answer in example.answers):
                said = said.strip().partition("\n")[0]
            right += said.strip() in [answer.strip() for answer in example.answers]
        if on_tokens is not None:
            on_tokens(sum(len(example.prompt_ids) for example in batch))
    return {"exact_match": right / len(examples)}


def _batches(examples: list[Example], longest: int | None) -> Iterator[list[Example]]:
    """Examples by the length of their prompts, so many that the positions are enough for all answers."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda example: len(example.prompt_ids)):
        new = max(other.answer_tokens for other in [*batch, example]) + 1
        too_long = longest is not None and len(example.prompt_ids) + new > longest
        if batch and (too_long or len(batch) == _GENERATED_AT_ONCE):
            yield batch
            batch = []
        batch.append(example)
    yield batch


def _say(model: Any, tokenizer: Any, batch: list[Example]) -> list[str]:
    rows = [torch.tensor(example.prompt_ids).flip(0) for example in batch]
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BL = pad(rows, batch_first=True).flip(1)  # padded in front
    mask_BL = pad([torch.ones_like(row) for row in rows], batch_first=True).flip(1)
    new = max(example.answer_tokens for example in batch) + _MORE_TOKENS
    longest = _positions(model)
    if longest is not None:
        new = min(new, longest - ids_BL.shape[1])
    end = tokenizer.eos_token_id
    with evaluating(model):
        said_BL = model.generate(
            input_ids=ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0 if end is None else end,
        )[:, ids_BL.shape[1] :]
    return tokenizer.batch_decode(said_BL, skip_special_tokens=True)


_FIGURES = {"choice": _choice, "completion": _completion, "exact": _exact}
