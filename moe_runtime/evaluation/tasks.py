"""Tasks from JSON lines: what to choose, to say, or to find likely.

A line has a `prompt`, or `messages` that a chat template turns into one, and

- `choices` and as `answer` the place of the right one: multiple choice, by log-likelihood;
- `answer` alone, a text or a list of texts: the model's own words must be one of them;
- else `completion`: how likely it is.

`task` names the task of a line; without it the file's name does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_runtime.train.data.samples import encode, encode_parts, json_objects, prompt_text
from moe_runtime.train.data.sources import read_lines

from .scoring import Scored

Kind = Literal["choice", "exact", "completion"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One line, as tokens."""

    where: str
    task: str
    kind: Kind
    prompt_ids: list[int]
    endings: tuple[Scored, ...]  # the prompt with each choice, or with the completion, which is scored
    lengths: tuple[int, ...]  # bytes of UTF-8 of each ending
    answer: int = 0  # which of the choices
    answers: tuple[str, ...] = ()  # kind exact
    answer_tokens: int = 0  # of the longest of `answers`


def read_examples(path: Path, tokenizer: Any) -> Iterator[Example]:
    """The examples of a file.

    Raises:
        RunError, ValueError: a line is malformed; the message names it.
        OSError: the file cannot be read.
    """
    for where, values in json_objects(path, read_lines(path)):
        task = values.get("task", path.stem)
        if not isinstance(task, str):
            raise ValueError(f"{where}: 'task' must be a text, got {task!r}")
        prompt, is_chat = prompt_text(where, values, tokenizer)
        prompt_ids = encode(tokenizer, prompt, more=is_chat)
        if not prompt_ids:
            raise ValueError(f"{where}: 'prompt' must have a token, got an empty text")
        kind, endings, rest = _asked(where, values)
        scored = []
        for ending in endings:
            ids, part_of = encode_parts(tokenizer, [prompt, ending], more=is_chat)
            if kind == "completion" and tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
            start = part_of.index(1) if 1 in part_of else len(part_of)
            scored.append(Scored(ids, max(1, start)))
        answers = [encode_parts(tokenizer, [prompt, a], more=is_chat)[1] for a in rest.get("answers", ())]
        yield Example(
            where=where,
            task=task,
            kind=kind,
            prompt_ids=prompt_ids,
            endings=tuple(scored),
            lengths=tuple(len(ending.encode()) for ending in endings),
            answer_tokens=max((sum(part_of) for part_of in answers), default=0),
            **rest,
        )


def _asked(where: str, values: dict[str, Any]) -> tuple[Kind, list[str], dict[str, Any]]:
    """What kind a line is, the texts to score, and what else an Example holds."""
    choices, answer, completion = (values.get(key) for key in ("choices", "answer", "completion"))
    if choices is not None:
        if not _texts(choices) or len(choices) < 2:
            raise ValueError(f"{where}: 'choices' must be two or more texts, none empty, got {choices!r}")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError(
                f"{where}: 'answer' must be the place of the right choice, 0 to {len(choices) - 1}, got "
                f"{answer!r}"
            )
        return "choice", choices, {"answer": answer}
    if answer is not None:
        answers = [answer] if isinstance(answer, str) else answer
        if not _texts(answers):
            raise ValueError(
                f"{where}: 'answer' must be a text or a list of texts, none empty, got {answer!r}"
            )
        return "exact", [], {"answers": tuple(answers)}
    if not isinstance(completion, str) or not completion.strip():
        raise ValueError(f"{where}: must have 'choices' and 'answer', 'answer', or 'completion'")
    return "completion", [completion], {}


def _texts(values: Any) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(value, str) and value.strip() for value in values)
    )
