"""Rows of whole documents: which share one, what a batch holds, and streams."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from torch import distributed
from torch.utils.data import DataLoader

from moe_runtime.errors import RunError
from moe_runtime.train.data import DataRecipe
from moe_runtime.train.data import packing as packing_module
from moe_runtime.train.data import rows as rows_module
from moe_runtime.train.data.load import load_train_data
from moe_runtime.train.data.packing import OpenRows, pack_best_fit
from moe_runtime.train.data.samples import IGNORED, Sample

LENGTHS = np.random.default_rng(0).integers(2, 40, 500).tolist()


@pytest.fixture
def file(tmp_path):
    """`file(lengths)`: a sample of so many tokens on each line, half of them the prompt's."""

    def write(lengths):
        path = tmp_path / "data.jsonl"
        lines = []
        for number, length in enumerate(lengths):
            text = f"{number:03}" + "x" * (length - 4)
            lines.append({"prompt": text[: length // 2], "completion": text[length // 2 :]})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def load(path, **changes):
    recipe = DataRecipe(train=(path,), **({"max_length": 64} | changes))
    return load_train_data(recipe, byte_tokenizer(), seed=3)


# --- packing ---


def test_best_fit_keeps_every_sample_once_and_fills_rows():
    rows = pack_best_fit(LENGTHS, 64, seed=0)
    assert sorted(itertools.chain(*rows)) == list(range(500))
    assert all(sum(LENGTHS[place] for place in row) <= 64 for row in rows)
    assert len(rows) <= 1.02 * sum(LENGTHS) / 64 + 1


def test_best_fit_depends_on_its_seed_alone(monkeypatch):
    monkeypatch.setattr(packing_module, "WINDOW", 100)
    assert pack_best_fit(LENGTHS, 64, seed=0) == pack_best_fit(LENGTHS, 64, seed=0)
    assert pack_best_fit(LENGTHS, 64, seed=0) != pack_best_fit(LENGTHS, 64, seed=1)


def test_best_fit_leaves_least_room():
    """3 goes to 5, which leaves no room, and not to 4, which would leave 1."""
    assert [sorted(row) for row in pack_best_fit([5, 4, 3, 1], 8, seed=0)] == [[0, 2], [1, 3]]


def test_best_fit_takes_the_longest_first():
    """3 or 2 before 5 would leave no room for it beside the other."""
    for seed in range(8):
        rows = pack_best_fit([6, 5, 3, 2], 8, seed)
        assert sorted(sorted(row) for row in rows) == [[0, 3], [1, 2]]


def test_open_rows_close_the_oldest(monkeypatch):
    monkeypatch.setattr(packing_module, "OPEN_ROWS", 2)
    rows = OpenRows(10)

    def add(number, length):
        closed = rows.add((number, Sample(np.zeros(length, np.int64), np.zeros(length, np.int64))))
        return closed and [number for number, _ in closed]

    assert [add(0, 6), add(1, 7), add(2, 3)] == [None, None, None]  # 2 fills the row of 1
    assert add(3, 5) == [0]
    assert add(4, 4) is None  # into the row of 3
    assert add(5, 8) == [1, 2]


# --- batches ---


def test_a_packed_batch_is_one_row_without_padding(file):
    data = load(file([10, 20, 30, 40, 50, 63]))
    rows = [data.dataset[row] for row in range(len(data.dataset))]
    batch = data.collator(rows)
    T = 10 + 20 + 30 + 40 + 50 + 63
    assert all(batch[name].shape == (1, T) for name in ("input_ids", "labels", "position_ids"))
    assert "attention_mask" not in batch
    ends = batch["cu_seq_lens_q"].tolist()
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 63
    assert sorted(np.diff(ends).tolist()) == [10, 20, 30, 40, 50, 63]
    for number, start, end in zip(batch["sample"], ends, ends[1:], strict=False):
        text = byte_tokenizer().decode(batch["input_ids"][0, start:end])
        assert int(text[:3]) == number
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
        assert batch["labels"][0, start] == IGNORED  # nothing of the row before predicts it


def test_first_tokens_that_count_have_no_label(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    data = load(str(tmp_path / "a.txt"), max_length=4)
    labels = torch.cat([data.dataset[row]["labels"] for row in range(2)])
    assert (labels == IGNORED).tolist() == [True, False, False, False] * 2
    assert data.summary["counted_tokens"] == 6
    assert data.summary["tokens"] == 8


def test_a_padded_batch_says_what_is_padding(file):
    data = load(file([10, 20]), packing=False)
    batch = data.collator([data.dataset[0], data.dataset[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 20)
    assert batch["attention_mask"].sum(1).tolist() == [10, 20]
    assert (batch["labels"][0, 10:] == IGNORED).all()
    assert batch["sample"] == [0, 1]
    assert "position_ids" not in batch
    assert data.summary["counted_tokens"] == (batch["labels"] != IGNORED).sum()


def test_counted_tokens_are_the_labels(file):
    data = load(file([5 + number % 50 for number in range(80)]))
    labels = torch.cat([data.dataset[row]["labels"] for row in range(len(data.dataset))])
    assert data.summary["counted_tokens"] == (labels != IGNORED).sum()
    assert data.summary["tokens"] == len(labels)


# --- streams ---


def first(data, rows, **options):
    loader = DataLoader(data.dataset, batch_size=None, **options)
    return list(itertools.islice(loader, rows))


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_goes_on_without_end_and_comes_again(file, packing):
    data = load(file([5 + number % 50 for number in range(80)]), streaming=True, packing=packing)
    rows = first(data, 200)
    numbers = [number for row in rows for number in row["sample"]]
    assert len(numbers) > 160
    assert set(numbers) == set(range(80))
    assert all(len(row["input_ids"]) <= 64 for row in rows)
    again = first(data, 200)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True))


def test_a_stream_fills_its_rows(file):
    rows = first(load(file(LENGTHS_OF_LINES), streaming=True), 100)
    assert sum(len(row["input_ids"]) for row in rows) / (100 * 64) > 0.95


LENGTHS_OF_LINES = [max(4, length) for length in LENGTHS]


def test_a_stream_is_read_as_far_as_it_is_used(file, monkeypatch):
    data = load(file([60] * 500), streaming=True, packing=False)
    lines = []
    reader = data.dataset._reader
    encode = reader._encode
    monkeypatch.setattr(reader, "_encode", lambda where, values: lines.append(where) or encode(where, values))
    assert len(first(data, 3)) == 3
    assert len(lines) <= 4


def test_workers_share_a_stream(file):
    data = load(file([60] * 40), streaming=True, packing=False)
    loader = DataLoader(data.dataset, batch_size=2, collate_fn=data.collator, num_workers=2)
    batches = list(itertools.islice(loader, 20))
    assert sorted(number for batch in batches for number in batch["sample"]) == list(range(40))


def test_a_stream_with_nothing_for_a_reader_is_refused(file):
    data = load(file([60]), streaming=True)
    loader = DataLoader(data.dataset, batch_size=None, num_workers=2)
    with pytest.raises(
        RunError, match=r"for each of 2 readers \(processes times workers\), and number 1 found"
    ):
        list(itertools.islice(loader, 300))


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_a_stream(file, monkeypatch, workers):
    data = load(file([60] * 30), streaming=True, packing=False)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    readers = 3 * max(1, workers)
    for reader in range(readers):
        rank, worker = divmod(reader, max(1, workers))
        info = SimpleNamespace(num_workers=workers, id=worker) if workers else None
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(rows_module, "get_worker_info", lambda info=info: info)
        rows = itertools.islice(iter(data.dataset), 30 // readers)
        assert [row["sample"] for row in rows] == [(number,) for number in range(reader, 30, readers)]
