"""Stages whose results are kept: a run that was cut off goes on where it stopped."""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..progress import StageProgress

SOURCE_FOLDERS = ("moe_runtime", "moe_runtime_kernels", "upcycle")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run.

    `work` gets a callback that takes the share done so far and returns JSON values. The stage is done again
    only if its `settings`, a stage in `inputs` or the code has changed, or a folder in `makes` is gone.
    """

    name: str
    title: str
    work: Callable[[Callable[[float], None]], dict[str, Any]]
    settings: Any = None  # JSON values
    inputs: tuple[str, ...] = ()
    makes: tuple[Path, ...] = ()
    cost: float = 1.0  # rough seconds on two cores, for the time left


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a finished stage returned, how long it took when it ran, and whether that was now."""

    values: dict[str, Any]
    seconds: float
    fingerprint: str
    ran: bool


def run_stages(stages: Sequence[Stage], folder: Path, progress: StageProgress) -> dict[str, StageResult]:
    """Do the stages in their order, or take over their results from `folder`/stages/NAME.json.

    A result is written when its stage is whole, by renaming a finished file.
    """
    kept = folder / "stages"
    kept.mkdir(parents=True, exist_ok=True)
    results: dict[str, StageResult] = {}
    progress.expect([stage.cost for stage in stages])
    for stage in stages:
        fingerprint = _fingerprint(stage, [results[name].fingerprint for name in stage.inputs])
        file = kept / f"{stage.name}.json"
        stored = _stored(file, fingerprint, stage.makes)
        if stored is not None:
            progress.skip(stage.title, stage.cost)
            results[stage.name] = stored
            continue
        file.unlink(missing_ok=True)
        for path in stage.makes:
            shutil.rmtree(path, ignore_errors=True)
        started = time.perf_counter()
        with progress.stage(stage.title, stage.cost) as on_share:
            values = stage.work(on_share)
        seconds = time.perf_counter() - started
        unfinished = file.with_suffix(".part")
        record = {"fingerprint": fingerprint, "seconds": seconds, "values": values}
        unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(unfinished, file)
        # what the file says, so that a later run computes with the same values
        values = json.loads(file.read_text(encoding="utf-8"))["values"]
        results[stage.name] = StageResult(values=values, seconds=seconds, fingerprint=fingerprint, ran=True)
    return results


def _stored(file: Path, fingerprint: str, makes: tuple[Path, ...]) -> StageResult | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        same = record["fingerprint"] == fingerprint
        values, seconds = record["values"], record["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not same or not all(path.is_dir() for path in makes):
        return None
    return StageResult(values=values, seconds=seconds, fingerprint=fingerprint, ran=False)


def _fingerprint(stage: Stage, inputs: list[str]) -> str:
    described = json.dumps([stage.name, stage.settings, inputs, _code_fingerprint()], sort_keys=True)
    return sha256(described.encode()).hexdigest()


@cache
def _code_fingerprint() -> str:
    """Of the source of this project and the versions of torch and transformers."""
    from importlib import metadata
    from importlib.util import find_spec

    digest = sha256()
    for name in ("torch", "transformers"):
        digest.update(metadata.version(name).encode())
    for name in SOURCE_FOLDERS:
        found = find_spec(name)
        assert found is not None
        assert found.origin is not None
        root = Path(found.origin).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
