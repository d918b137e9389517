"""Files of an output that are not weights: upcycle.json, the model card, and what is copied from the base."""

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from moe_runtime.publishing import AUTO_MAP, published_files
from upcycle.checkpoint import Checkpoint
from upcycle.errors import UpcycleError
from upcycle.plan import TORCH_DTYPE, UpcyclePlan
from upcycle.sources import AdapterSource, open_source
from upcycle.sources.adapter import ADAPTER_CONFIG
from upcycle.targets import eager_experts_note
from upcycle.tasks import Scale

RECORD_NAME = "upcycle.json"

# What belongs to the base's tokenizer and its way of generating, and the terms it came under.
_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
_HASH_BLOCK = 2**20

# What the model card says about each router.init.
_ROUTERS = {
    "normal": "random",
    "orthogonal": "random, with rows at right angles",
    "file": "given",
    "centroid": "the centroids of the experts' texts",
    "ridge": "a ridge regression from inputs to the experts' texts",
}


def hash_file(path: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """sha256 of a file; `advance` is called with the number of bytes after every block."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def record(plan: UpcyclePlan, hashes: Mapping[Path, str], routers: dict[str, Any] | None) -> dict[str, Any]:
    """The content of upcycle.json. The same run gives the same text: no times, no output path.

    Args:
        hashes: sha256 of each weight file.
        routers: where the routers' weights come from, if they are not drawn.
    """
    recipe = plan.recipe.to_dict()
    del recipe["output"]
    return {
        "method": plan.recipe.method,
        "recipe": recipe,
        "seed": plan.recipe.router.seed,
        "dtype": TORCH_DTYPE[plan.dtype],
        **({"routers": routers} if routers is not None else {}),
        "sources": [_source_record(source, hashes) for source in plan.sources],
        "base": plan.sources.index(plan.base),
        "assignment": {
            "feed_forward": list(plan.assignment.feed_forward),
            "attention": list(plan.assignment.attention) if plan.assignment.attention else None,
            "rest": list(plan.assignment.rest),
        },
        "averaged": sorted({re.sub(r"\.\d+\.", ".*.", task.name) for task in plan.tasks if task.is_averaged}),
        "scaled": {
            re.sub(r"\.\d+\.", ".*.", task.name): change.factor
            for task in plan.tasks
            for change in task.changes
            if isinstance(change, Scale)
        },
        "parameters": plan.num_parameters,
        "versions": {
            "moe-runtime": _version("moe-runtime"),
            "numpy": _version("numpy"),
            "python": platform.python_version(),
            **({"gguf": _version("gguf")} if any(source.file for source in plan.sources) else {}),
        },
    }


def _source_record(source: Checkpoint, hashes: Mapping[Path, str]) -> dict[str, Any]:
    entry = {
        "path": str(source.location.resolve()),
        "model_type": source.config_json["model_type"],
        "dtypes": sorted({TORCH_DTYPE.get(tensor.dtype, tensor.dtype) for tensor in source.tensors.values()}),
        **({"config": hash_values(source.config_json)} if source.file is None else {}),
        "files": {name: hashes[source.folder / name] for name in source.files},
    }
    if source.adapter is not None:
        folder = source.adapter.folder
        files = {name: hashes[folder / name] for name in source.adapter.files}
        config = hash_values(source.adapter.config_json)
        entry["adapter"] = {"path": str(folder.resolve()), "config": config, "files": files}
    return entry


def hash_values(config_json: Mapping[str, Any]) -> str:
    """sha256 of what a JSON file says, however it is laid out."""
    return sha256(json.dumps(config_json, sort_keys=True).encode()).hexdigest()


def recorded_hashes(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the weights of a source of upcycle.json, and of the adapter on it; equal for equal models."""
    adapter = entry.get("adapter")
    of_adapter = [adapter.get("config"), *sorted(adapter["files"].values())] if adapter is not None else []
    return (*sorted(entry["files"].values()), *of_adapter)


def open_recorded(entry: Mapping[str, Any], output: Path) -> Checkpoint:
    """A source of upcycle.json, as it was when the output was made from it.

    Raises:
        UpcycleError: one of its files is gone or has changed.
        KeyError, TypeError, AttributeError: this is no entry of such a file.
    """
    path, hashes = entry["path"], dict(entry["files"])
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    expected = {folder / name: value for name, value in hashes.items()}
    adapter = entry.get("adapter")
    if adapter is not None:
        expected |= {Path(adapter["path"]) / name: value for name, value in adapter["files"].items()}
    source = open_source(path if adapter is None else AdapterSource(path, adapter["path"]))
    for file, value in expected.items():
        if not file.is_file() or hash_file(file) != value:
            raise _has_changed(file, output)
    _check_config(folder / "config.json", source, entry, output)
    if adapter is not None and source.adapter is not None:
        _check_config(source.adapter.folder / ADAPTER_CONFIG, source.adapter, adapter, output)
    return source


def _check_config(file: Path, source: Checkpoint, entry: Mapping[str, Any], output: Path) -> None:
    """A GGUF file has none, and records of before did not say."""
    if "config" in entry and entry["config"] != hash_values(source.config_json):
        raise _has_changed(file, output)


def _has_changed(file: Path, output: Path) -> UpcycleError:
    return UpcycleError(f"{file} has changed since {output} was made from it")


def write_side_files(
    folder: Path, plan: UpcyclePlan, hashes: Mapping[Path, str], routers: dict[str, Any] | None
) -> None:
    """Everything but the weights and their index."""
    config_json = dict(plan.config_json)
    if plan.recipe.target == "moe_runtime":
        config_json["auto_map"] = AUTO_MAP
        for path in published_files():
            copy_file(path, folder / path.name)
    write_json(folder / "config.json", config_json)
    write_json(folder / RECORD_NAME, record(plan, hashes, routers))
    write_text(folder / "README.md", model_card(plan))
    if plan.base.file is None:
        copy_side_files(plan.base.folder, folder)
    else:
        _write_gguf_tokenizer(plan.base.location, folder)


def check_tokenizer(base: Checkpoint) -> None:
    """Refuse a GGUF file whose tokenizer `write_side_files` could not write, before anything is."""
    if base.file is None:
        return
    with TemporaryDirectory(prefix="upcycle-") as folder:
        try:
            _write_gguf_tokenizer(base.location, Path(folder))
        # whatever transformers raises for a kind that it does not know
        except Exception as error:
            why = str(error).partition("\n")[0]
            raise UpcycleError(
                f"{base.location}: the tokenizer in it cannot be read: {why}; use the model as safetensors"
            ) from error


def _write_gguf_tokenizer(path: Path, folder: Path) -> None:
    from moe_runtime.hf.gguf_source import save_gguf_tokenizer

    for file in save_gguf_tokenizer(path, folder):
        _finish(file)


def copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer, ways of generating and terms of a model."""
    for name in _COPIED_FILES:
        if (source / name).is_file():
            copy_file(source / name, folder / name)


def model_card(plan: UpcyclePlan) -> str:
    """README.md with the metadata that model hubs read."""
    method = plan.recipe.method
    front = {
        "base_model": list(dict.fromkeys(model_name(source) for source in plan.sources)),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "upcycled", method],
    }
    recipe = plan.recipe.to_dict()
    del recipe["output"]
    ours = plan.recipe.target == "moe_runtime"
    remote_code = ", trust_remote_code=True" if ours else ""
    eager_note = eager_experts_note(plan.recipe.target, plan.model, plan.dtype)
    experts = "" if eager_note is None else ', experts_implementation="eager"'
    needs = f"{eager_note}\n\n" if eager_note else ""
    needs += "With the package `moe-runtime` installed:\n\n" if ours else ""
    made = {
        "copy": "Every expert starts as a copy of the dense feed-forward (sparse upcycling).",
        "btx": "Feed-forward experts come from one source each (Branch-Train-MiX).",
        "bam": "Feed-forward and attention experts come from one source each (BAM).",
        "upit": "Feed-forward experts come from points of one fine-tuning, and children of these (UpIT).",
        "noise": "Every expert starts as a copy of the dense feed-forward plus noise.",
        "drop": "Every expert starts as the dense feed-forward, partly drawn anew (Drop-Upcycling).",
        "granular": "Every expert starts as a part of the dense feed-forward (granular upcycling).",
        "shared_expert": "The dense feed-forward is the shared expert, with routed experts beside it.",
        "replicate": "Every expert starts as a copy of an expert of a smaller mixture.",
    }[method]
    routers = "those of the mixture" if method == "replicate" else _ROUTERS[plan.recipe.router.init]
    own_block = method != "bam" or plan.model.block == "parallel"
    note = (
        "" if own_block else "\nIts blocks are sequential, as its sources': not the block of the BAM paper.\n"
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {plan.config_json["model_type"]}, upcycled by {method}

{made} {plan.num_parameters:,} parameters, {plan.model.num_experts} experts,
{plan.model.num_experts_per_tok} per token.
{note}
It has not been trained since: its routers are {routers}.
`{RECORD_NAME}` holds the sources' hashes.

{needs}```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{remote_code}{experts})
```

## Recipe

```yaml
{yaml.safe_dump(recipe, sort_keys=False)}```
"""


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _finish(path)


def copy_file(source: Path, to: Path) -> None:
    shutil.copyfile(source, to)
    _finish(to)


def _finish(path: Path) -> None:
    """Readable for everyone, whatever the source or the umask, and on the disk."""
    path.chmod(0o644)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def model_name(source: Checkpoint) -> str:
    """The name it was published under, where its config.json has one; else that of its file or folder."""
    if source.adapter is not None:
        return source.adapter.folder.resolve().name
    name = source.config_json.get("_name_or_path")
    return name if name and not Path(name).is_absolute() else source.location.resolve().name


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
