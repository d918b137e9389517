"""Rows of samples as datasets that trainers read, and batches of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from moe_runtime.errors import RunError

from .packing import Numbered, OpenRows
from .samples import IGNORED
from .sources import Reader, Share, Tally


def make_row(numbered: Sequence[Numbered], *, packed: bool) -> dict[str, Any]:
    """Samples one after another: `input_ids` and `labels` [L], the samples' numbers, and with `packed`
    `position_ids` [L], which start at 0 in each.

    A sample's first token has no label: nothing of the sample comes before it.
    """
    labels, positions = [], []
    for _, sample in numbered:
        labels.append(sample.labels_L.copy())
        labels[-1][0] = IGNORED
        positions.append(np.arange(len(sample.ids_L)))
    row: dict[str, Any] = {
        "input_ids": torch.from_numpy(np.concatenate([sample.ids_L for _, sample in numbered])),
        "labels": torch.from_numpy(np.concatenate(labels)),
        "sample": tuple(number for number, _ in numbered),
    }
    if packed:
        row["position_ids"] = torch.from_numpy(np.concatenate(positions))
    return row


class Rows:
    """Rows in memory, by number."""

    def __init__(self, samples: Sequence[Numbered], places: Sequence[Sequence[int]], *, packed: bool) -> None:
        """`places`: of the samples of every row."""
        self._samples, self._places, self._packed = samples, places, packed

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return make_row([self._samples[place] for place in self._places[row]], packed=self._packed)


class RowsOfProcess(Dataset[dict[str, Any]]):
    """The rows that one process evaluates: every row is in one process, and all processes have equally many.

    Where the rows do not divide, some have the first row once more, without labels: it counts nowhere.
    """

    def __init__(self, rows: Rows, process: int, num_processes: int) -> None:
        self._rows, self._process, self._num_processes = rows, process, num_processes

    def __len__(self) -> int:
        return -(-len(self._rows) // self._num_processes)

    def __getitem__(self, row: int) -> dict[str, Any]:
        place = row * self._num_processes + self._process
        if place < len(self._rows):
            return self._rows[place]
        first = self._rows[0]
        return first | {"labels": torch.full_like(first["labels"], IGNORED)}


class StreamedRows(IterableDataset):
    """Rows without end, read while they are used: the files again and again, in their order.

    Every process of `torch.distributed` and every worker of a DataLoader reads the files and makes rows of
    its own samples, so nothing else may share the rows out. The same rows come in every run.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    @property
    def tally(self) -> Tally:
        """What became of the samples that this process has read so far."""
        return self._reader.tally

    def __iter__(self) -> Iterator[dict[str, Any]]:
        recipe, share = self._reader.recipe, _share()
        open_rows = OpenRows(recipe.max_length)
        while True:
            empty = True
            for numbered in self._reader.samples(recipe.train, share):
                empty = False
                row = open_rows.add(numbered) if recipe.packing else [numbered]
                if row is not None:
                    yield make_row(row, packed=recipe.packing)
            if empty:
                raise RunError(
                    f"data.train must hold samples with tokens that count for each of {share.count} readers "
                    f"(processes times workers), and number {share.index} found none"
                )


def _share() -> Share:
    rank, world = 0, 1
    if distributed.is_available() and distributed.is_initialized():
        rank, world = distributed.get_rank(), distributed.get_world_size()
    worker = get_worker_info()
    if worker is None:
        return Share(rank, world)
    return Share(rank * worker.num_workers + worker.id, world * worker.num_workers)


def collate_packed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row [1, T] of all tokens of a batch, without padding: samples are told apart by positions that
    start again, and by `cu_seq_lens_{q,k}` and `max_length_{q,k}`, as transformers names them for flash
    attention.
    """
    names = ("input_ids", "labels", "position_ids")
    batch: dict[str, Any] = {name: torch.cat([row[name] for row in rows])[None] for name in names}
    start_S = (batch["position_ids"][0] == 0).nonzero()[:, 0]
    end = start_S.new_tensor([batch["position_ids"].shape[1]])
    cu_seqlens = torch.cat([start_S, end]).int()
    longest = int(cu_seqlens.diff().max())
    for side in ("q", "k"):
        batch[f"cu_seq_lens_{side}"] = cu_seqlens
        batch[f"max_length_{side}"] = longest
    batch["sample"] = _numbers(rows)
    return batch


class PaddingCollator:
    """Rows [B, L] as long as the longest, padded behind, with the `attention_mask` that says so."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ones = [torch.ones_like(row["input_ids"]) for row in rows]
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], self._pad_id),
            "labels": _padded([row["labels"] for row in rows], IGNORED),
            "attention_mask": _padded(ones, 0),
            "sample": _numbers(rows),
        }


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _numbers(rows: Sequence[dict[str, Any]]) -> list[int]:
    return [number for row in rows for number in row["sample"]]
