"""Execute a plan: stream every tensor into a folder beside the output, then rename it.

Whatever happens on the way, the output's name holds a whole model or nothing. A run that is interrupted or
killed leaves its finished files in the folder, and the same run goes on behind them.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from upcycle import names
from upcycle.checkpoint import INDEX_NAME, Reader, Shard, expanded, index_json, make_shards, write_shard
from upcycle.errors import UpcycleError
from upcycle.estimate import Estimate, estimate
from upcycle.plan import UpcyclePlan, make_plan_for
from upcycle.provenance import check_tokenizer, hash_file, record, write_json, write_side_files, write_text
from upcycle.recipe import Recipe, load_recipe, parse_size
from upcycle.routers.compute import RouterWeights, open_routers
from upcycle.stream import are_equal, chunks

try:
    import fcntl
except ImportError:  # Windows: two runs into one output at once are then not noticed
    fcntl = None  # type: ignore[assignment]  # a module elsewhere; every use asks for None first

# Room for everything that is no weight: configuration, tokenizer, card.
_SIDE_FILES_BYTES = 100 * 10**6
_LOCK_NAME = ".lock"
_RUN_NAME = ".run"


@dataclass(frozen=True)
class UpcycleResult:
    """What was written, or with `dry_run` what would be."""

    output: Path
    plan: UpcyclePlan
    files: tuple[str, ...]
    dry_run: bool
    seconds: float
    estimate: Estimate | None = None  # of a dry run

    @property
    def rounded_types(self) -> tuple[str, ...]:
        """Types of tensors of the sources whose numbers the output's type need not hold."""
        plan = self.plan
        found = {tensor.dtype for source in plan.sources for tensor in source.tensors.values()}
        return () if plan.dtype == "F32" else tuple(sorted(found - {plan.dtype}))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "output": str(self.output),
            "dry_run": self.dry_run,
            "method": self.plan.recipe.method,
            "target": self.plan.recipe.target,
            "sources": [source.title for source in self.plan.sources],
            "files": list(self.files),
            "tensors": len(self.plan.tasks),
            "parameters": self.plan.num_parameters,
            "bytes": self.plan.num_bytes,
            "dtype": self.plan.dtype,
            "rounded_types": list(self.rounded_types),
            "routers": self.plan.recipe.router.describe(),
            "seconds": self.seconds,
            **({"estimate": asdict(self.estimate)} if self.estimate else {}),
        }


def upcycle(recipe: Recipe | str | Path, *, dry_run: bool = False) -> UpcycleResult:
    """Make the model that a recipe describes.

    Args:
        recipe: a recipe, or the path of a YAML file.
        dry_run: check everything that can be checked without reading weights, and estimate what the run will
            cost from a short copy to the output's disk, of which nothing is left.

    Raises:
        UpcycleError: with one sentence; the sources are then untouched, and nothing has the output's name.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    start = time.monotonic()
    output = expanded(recipe.output)
    _check_free(output)
    plan = make_plan_for(recipe)
    check_tokenizer(plan.base)
    shards = make_shards(plan.tasks, parse_size(recipe.max_shard_size))
    if dry_run:
        cost = estimate(plan, _existing_parent(output))
    else:
        cost = None
        _check_disk(output, plan.num_bytes)
        with open_routers(plan) as routers, working_folder(output, resumable=True) as folder:
            _write(folder, plan, shards, routers)
    files = tuple(shard.name for shard in shards)
    return UpcycleResult(output, plan, files, dry_run, time.monotonic() - start, cost)


def _check_free(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise UpcycleError(f"{output} exists already; choose another output or remove it")


def _check_disk(output: Path, num_bytes: int) -> None:
    parent = _existing_parent(output)
    free = shutil.disk_usage(parent).free + _num_bytes(_incomplete(output))
    if free < num_bytes + _SIDE_FILES_BYTES:
        raise UpcycleError(
            f"{output} needs {num_bytes / 1e9:.2f} GB on disk, but {parent} has {free / 1e9:.2f} GB free; "
            "make room or choose another output"
        )


def _existing_parent(output: Path) -> Path:
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _num_bytes(folder: Path) -> int:
    """Of what an earlier run left, which this one goes on with or removes."""
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


# --- the folder that becomes the output ---


def _incomplete(output: Path) -> Path:
    return output.with_name(f".{output.name}.incomplete")


@contextmanager
def working_folder(output: Path, *, resumable: bool = False) -> Iterator[Path]:
    """A folder beside the output, renamed to it when the body ends and removed when the body fails.

    A `resumable` one begins with what an earlier run left there, and stays when the body is interrupted.
    """
    folder = _incomplete(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        release = lock_folder(folder, output)
    except OSError as error:
        raise UpcycleError(f"{output} cannot be written: {error.strerror}: {error.filename}") from error
    try:
        if not resumable:
            _empty(folder)
        yield folder
        _check_free(output)
        folder.rename(output)
        # Not before: a run that starts in between would take the folder for a killed run's.
        (output / _LOCK_NAME).unlink(missing_ok=True)
        _sync_folder(output.parent)
    except BaseException as error:
        if isinstance(error, Exception) or not resumable:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise _as_upcycle_error(error, output) from error
        raise
    finally:
        release()


def _empty(folder: Path, keep: frozenset[str] = frozenset()) -> None:
    for path in folder.iterdir():
        if path.name in keep | {_LOCK_NAME}:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def lock_folder(folder: Path, output: Path) -> Callable[[], None]:
    """Hold the folder until the returned function is called or the process ends, however it ends."""
    if fcntl is None:
        return lambda: None
    lock = (folder / _LOCK_NAME).open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UpcycleError(f"{output} is being written by another run; wait for it to end") from None
    except OSError:  # a file system without locks
        pass
    return lock.close


def _sync_folder(folder: Path) -> None:
    """Put the new name itself on the disk; only POSIX can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _as_upcycle_error(error: OSError, output: Path) -> UpcycleError:
    if error.errno == errno.ENOSPC:
        return UpcycleError(
            f"the disk became full while {output} was written; make room or choose another output"
        )
    where = f": {error.filename}" if error.filename else ""
    return UpcycleError(f"{output} could not be written: {error.strerror or error}{where}")


# --- writing ---


def _write(folder: Path, plan: UpcyclePlan, shards: tuple[Shard, ...], routers: RouterWeights | None) -> None:
    run = _identity(plan, shards, routers)
    finished = _finished(folder, shards, run)
    _empty(folder, keep=finished)
    write_text(folder / _RUN_NAME, run)
    with ExitStack() as stack:
        progress = stack.enter_context(_progress())
        readers = [stack.enter_context(source.open_rows()) for source in plan.sources]
        for reader in readers:
            _check_tied_head(plan, reader)
        if routers is not None:
            readers.append(stack.enter_context(routers.checkpoint.open_rows()))
        hashes = stack.enter_context(_hashing(plan, progress))
        writing = progress.add_task(f"Writing {plan.recipe.output}", total=plan.num_bytes)
        for shard in shards:
            if shard.name in finished:
                progress.advance(writing, shard.num_bytes)
                continue
            pieces = (chunk for task in shard.tasks for chunk in chunks(task, readers))
            write_shard(
                folder / shard.name, shard, pieces, lambda num_bytes: progress.advance(writing, num_bytes)
            )
        if len(shards) > 1:
            write_json(folder / INDEX_NAME, index_json(shards))
        write_side_files(folder, plan, hashes(), routers.record if routers is not None else None)
    (folder / _RUN_NAME).unlink()


def _identity(plan: UpcyclePlan, shards: tuple[Shard, ...], routers: RouterWeights | None) -> str:
    """A text that is equal for runs whose files are equal, as far as sizes and times of the weights tell.

    It covers all that upcycle.json would say: configurations and versions too.
    """
    states = {path: path.stat() for path in _source_files(plan)}
    as_hashes = {path: f"{state.st_size} {state.st_mtime_ns}" for path, state in states.items()}
    said = record(plan, as_hashes, routers.record if routers is not None else None)
    digest = sha256(json.dumps(said).encode())
    for shard in shards:
        digest.update(repr(shard).encode())
    return digest.hexdigest()


def _finished(folder: Path, shards: tuple[Shard, ...], run: str) -> frozenset[str]:
    """Files that an earlier run of this identity left whole: a file gets its name when it is on the disk."""
    left = folder / _RUN_NAME
    if not left.is_file() or left.read_text(encoding="utf-8") != run:
        return frozenset()
    sizes = {shard.name: len(shard.header()) + shard.num_bytes for shard in shards}
    return frozenset(path.name for path in folder.iterdir() if sizes.get(path.name) == path.stat().st_size)


def _check_tied_head(plan: UpcyclePlan, reader: Reader) -> None:
    """A stored head wins over `tie_word_embeddings` where the two differ; a tied output would lose it."""
    source = reader.checkpoint
    if not plan.dense.tie_word_embeddings or names.HEAD not in source.tensors:
        return
    if not are_equal(names.HEAD, names.EMBEDDING, reader):
        raise UpcycleError(
            f"{source.folder}: {names.HEAD} differs from {names.EMBEDDING}, though config.json ties them; "
            "set tie_word_embeddings to false there, or remove the tensor"
        )


def _source_files(plan: UpcyclePlan) -> tuple[Path, ...]:
    """All weight files, each once."""
    read_from = [source for source in plan.sources]
    read_from += [source.adapter for source in plan.sources if source.adapter is not None]
    return tuple(dict.fromkeys(source.folder / name for source in read_from for name in source.files))


@contextmanager
def _hashing(plan: UpcyclePlan, progress: Progress) -> Iterator[Callable[[], dict[Path, str]]]:
    """Hash the sources beside what the body does; the yielded function waits for the sha256 of each file."""
    paths = _source_files(plan)
    reading = progress.add_task("Reading the sources", total=sum(path.stat().st_size for path in paths))
    left = threading.Event()

    def advance(num_bytes: int) -> None:
        if left.is_set():
            raise InterruptedError
        progress.advance(reading, num_bytes)

    with ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(lambda: {path: hash_file(path, advance) for path in paths})
        try:
            yield hashes.result
        finally:
            left.set()


def _progress() -> Progress:
    """Rate and time left on a terminal; silent elsewhere."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
