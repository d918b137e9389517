"""The benchmark of packing: every way trains on the same tokens, and the result is a section of the page."""

import json
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks import packing


@pytest.mark.checkpoint
def test_packed_and_padded_train_on_the_same_tokens(tmp_path, monkeypatch):
    words = ["packing", "--tiny", "--rounds", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    assert command.main() == 0
    (path,) = tmp_path.rglob("*_packing.json")
    content = json.loads(path.read_text())
    (row,) = content["rows"]
    assert row["samples"] == 10
    work = row["work"]
    assert len({worked["counted_tokens"] for worked in work.values()}) == 1
    assert work["packed"]["padding_share"] == work["packed, block mask"]["padding_share"] == 0
    assert work["padded"]["padding_share"] > work["padded, sorted by length"]["padding_share"] > 0
    ratio = row["timings"]["padded"]["median_s"] / row["timings"]["packed"]["median_s"]
    assert row["ratios"]["packed"] == pytest.approx(ratio)
    text = "\n".join(packing.section(content, path, tmp_path))
    assert "## Packing" in text
    assert "| packed |" in text
    assert "over 10 instructions of 2 tasks" in text
