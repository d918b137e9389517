"""Experts on the disk are whole dense checkpoints, whatever kind they are and however they are read."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from upit_runs import experts_of, record_low_rank, record_shifted

import upcycle
from moe_runtime.hf.loading import load_causal_lm
from upcycle.errors import UpcycleError
from upcycle.sources import open_source, plain_folder
from upcycle.upit import open_expert
from upcycle.upit.models import load_dense

FAMILIES = ["llama", "qwen3", "cohere", "phi", "phi3", "gpt_neox"]
NAME = "model.layers.1.mlp.down_proj.weight"


def logits(model):
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("width", [1, 6, 48])
def test_rows_may_have_any_width(kind, width, recording, low_rank_recording):
    expert = open_source(experts_of(recording if kind == "full" else low_rank_recording)[0])
    own = load_file(expert.folder / "expert.safetensors")
    with expert.open_rows() as reader, expert.base.open_rows() as of_base:
        change = own[NAME] if kind == "full" else own[NAME + ".lora_B"] @ own[NAME + ".lora_A"]
        expected = (of_base.rows(NAME, 48, 0, 32) + change).reshape(-1, width)
        count = len(expected)
        assert np.abs(reader.rows(NAME, width, 0, count) - expected).max() < 1e-6
        first = count // 3
        part = reader.rows(NAME, width, first, count // 2)
        assert np.abs(part - expected[first : first + count // 2]).max() < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_one_expert_compute_what_it_computes(family, dense, tmp_path):
    """U1: E copies of one checkpoint, any router, gates that sum to 1."""
    base = dense(family)
    recording, trained = record_shifted(tmp_path / "recording", base, 1)
    folder = experts_of(recording)[0]
    rest = recording.folder / recording.rest
    values = {"method": "upit", "sources": [str(folder)] * 3, "base": str(rest), "non_expert": "base"}
    output = upcycle.upcycle(upcycle.recipe_from_dict({**values, "output": str(tmp_path / "out")})).output
    assert (logits(load_causal_lm(output)) - logits(trained)).abs().max() < 1e-4
    # the expert alone has the base's other tensors: another function
    assert (logits(load_dense(folder, "cpu")) - logits(trained)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_low_rank_copies_compute_what_the_expert_computes(family, dense, tmp_path):
    """U1 for low-rank experts."""
    recording = record_low_rank(tmp_path / "recording", dense(family), 1)
    folder = str(experts_of(recording)[0])
    values = {"method": "upit", "sources": [folder] * 3, "base": recording.base, "non_expert": "base"}
    output = upcycle.upcycle(upcycle.recipe_from_dict({**values, "output": str(tmp_path / "out")})).output
    assert (logits(load_causal_lm(output)) - logits(load_dense(folder, "cpu"))).abs().max() < 1e-4
    assert (logits(load_causal_lm(output)) - logits(load_dense(dense(family), "cpu"))).abs().max() > 1e-2


def test_an_expert_can_be_written_as_an_ordinary_checkpoint(recording):
    expert = open_source(experts_of(recording)[0])
    with plain_folder(expert) as folder, expert.open_rows() as reader:
        plain = open_source(folder)
        assert plain.tensors.keys() == expert.tensors.keys()
        with plain.open_rows() as of_plain:
            assert np.array_equal(of_plain.rows(NAME, 48, 0, 32), reader.rows(NAME, 48, 0, 32))


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"kind": "sum", "base": "x"}, "must name a base and a kind, one of delta, value, lora"),
        ({"kind": "delta"}, "must name a base and a kind"),
        ({"kind": "delta", "base": "nowhere"}, "nowhere"),
    ],
)
def test_a_damaged_record_is_named(record, sentence, recording, tmp_path):
    folder = shutil.copytree(experts_of(recording)[0], tmp_path / "expert")
    (folder / "expert.json").write_text(json.dumps(record))
    with pytest.raises(UpcycleError, match=sentence):
        open_expert(folder)


def test_the_record_belongs_to_what_an_output_was_made_from(recording, tmp_path):
    expert = shutil.copytree(experts_of(recording)[0], tmp_path / "expert")
    recipe = {"method": "copy", "base": str(expert), "experts": 2, "output": str(tmp_path / "out")}
    output = upcycle.upcycle(upcycle.recipe_from_dict(recipe)).output
    path = expert / "expert.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "value"}))
    with pytest.raises(UpcycleError, match=r"expert\.json has changed since"):
        upcycle.verify(output)


def test_an_expert_of_another_base_is_refused(recording, low_rank_recording, dense, tmp_path):
    wide = str(dense("llama", intermediate_size=56))
    for number, of in enumerate((recording, low_rank_recording)):
        folder = shutil.copytree(experts_of(of)[0], tmp_path / f"expert-{number}")
        kind = json.loads((folder / "expert.json").read_text())["kind"]
        (folder / "expert.json").write_text(json.dumps({"kind": kind, "base": wide}))
        with pytest.raises(UpcycleError, match=r"does not fit .* the expert was made from another base"):
            open_expert(folder)
