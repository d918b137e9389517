"""Drop-Upcycling: which hidden units of a copy are drawn anew, and what they become."""

import json

import numpy as np
import pytest
import torch
from dense_models import tensors_of
from safetensors.torch import save_file

from upcycle import verify
from upcycle.checkpoint import Checkpoint, RowReader, read_header
from upcycle.stream import chunks, numbers
from upcycle.tasks import Band, Piece, Redraw, Shuffled, TensorTask

EXPERTS = "model.layers.1.mlp.experts"


def hidden_units(folder, expert=None, layer=1, width=48):
    """[F, 3 D]: gate row, up row and down column of every hidden unit of a dense layer or of one expert."""
    tensors = tensors_of(folder)
    mlp = f"model.layers.{layer}.mlp"
    if expert is None:
        gate, up, down = (tensors[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    else:
        gate, up = tensors[f"{mlp}.experts.gate_up_proj"][expert].split(width)
        down = tensors[f"{mlp}.experts.down_proj"][expert]
    return torch.stack([gate, up, down.T], dim=1)


def origins(expert_F3D, dense_F3D):
    """[F, 3]: the dense hidden unit that gate, up and down of an expert's are copies of, or -1."""
    same = (expert_F3D[:, None] == dense_F3D).all(-1)
    return torch.where(same.any(1), same.int().argmax(1), -1)


@pytest.mark.parametrize("target", ["moe_runtime", "mixtral"])
def test_without_a_drop_experts_are_reordered_copies(target, dense, run):
    """D1: another order of the hidden units is the same function."""
    folder = run(method="drop", base=dense("llama"), experts=4, drop={"ratio": 0}, target=target)
    result = verify(folder)
    assert result.must_be_equal
    assert result.passed
    if target == "moe_runtime":
        found = origins(hidden_units(folder, 0), hidden_units(dense("llama")))
        assert not torch.equal(found[:, 0], torch.arange(48))
        assert torch.equal(found[:, 0].sort().values, torch.arange(48))
        assert torch.equal(found[:, :1].expand(-1, 3), found)
        others = origins(hidden_units(folder, 1), hidden_units(dense("llama")))
        assert not torch.equal(others, found)


def test_exactly_the_ratio_of_each_expert_is_new_and_each_expert_loses_others(dense, run):
    """D2 and D3, and biases go with their rows."""
    source = dense("llama", mlp_bias=True)
    folder = run(method="drop", base=source, experts=3, drop={"ratio": 0.3})
    lost, places = [], []
    for expert in range(3):
        found = origins(hidden_units(folder, expert), hidden_units(source))
        assert ((found == -1).sum(0) == 14).all()  # floor(0.3 · 48)
        assert torch.equal(found[:, :1].expand(-1, 3), found)
        kept = found[:, 0] >= 0
        bias = tensors_of(folder)[f"{EXPERTS}.gate_up_bias"][expert, :48]
        dense_bias = tensors_of(source)["model.layers.1.mlp.gate_proj.bias"]
        assert torch.equal(bias[kept], dense_bias[found[kept, 0]])
        assert not torch.isin(bias[~kept], dense_bias).any()
        lost.append(frozenset(range(48)) - frozenset(found[kept, 0].tolist()))
        places.append(tuple(kept.tolist()))
    assert len(set(lost)) == len(set(places)) == 3
    assert verify(folder).not_equal_because == ("drop draws 30% of each expert's hidden units anew",)
    section = json.loads((folder / "upcycle.json").read_text())["recipe"]["drop"]
    assert section == {"ratio": 0.3, "shared_indices": True, "seed": 0}


def test_each_matrix_can_lose_units_of_its_own(dense, run):
    """D2 with the released code's reading."""
    folder = run(method="drop", base=dense("llama"), experts=2, drop={"shared_indices": False})
    found = origins(hidden_units(folder, 1), hidden_units(dense("llama")))
    assert ((found == -1).sum(0) == 24).all()
    gate, up, down = (set((found[:, matrix] == -1).nonzero().flatten().tolist()) for matrix in range(3))
    assert gate != up != down != gate


def test_new_numbers_have_the_mean_and_deviation_of_those_they_replace(dense, run):
    """D4."""
    source = dense("llama", intermediate_size=512, num_hidden_layers=1)
    folder = run(method="drop", base=source, experts=2, drop={"ratio": 0.25, "seed": 3})
    dense_F3D = hidden_units(source, layer=0)
    expert_F3D = hidden_units(folder, 0, layer=0, width=512)
    found = origins(expert_F3D, dense_F3D)
    for matrix in range(3):
        new = expert_F3D[found[:, matrix] == -1, matrix]
        gone = torch.ones(512, dtype=torch.bool)
        gone[found[found[:, matrix] >= 0, matrix]] = False
        old = dense_F3D[gone, matrix]
        assert new.shape == old.shape == (128, 32)
        assert (new.mean() - old.mean()).abs() < 4 * old.std() / old.numel() ** 0.5
        assert (new.std() / old.std() - 1).abs() < 4 / (2 * old.numel()) ** 0.5


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_the_mean_and_deviation_are_those_of_the_replaced_numbers_alone(axis, tmp_path):
    """D4, where the hidden units differ so much that those of the whole matrix would show."""
    units, width = 8, 256
    values_FD = torch.randn(units, width, generator=torch.Generator().manual_seed(0))
    unit_F1 = torch.arange(units)[:, None]
    values_FD = values_FD * 2.0**unit_F1 + 20.0 * unit_F1
    matrix = values_FD if axis == "rows" else values_FD.T.contiguous()
    save_file({"w": matrix}, tmp_path / "model.safetensors")
    tensors = read_header(tmp_path / "model.safetensors")
    entries = Shuffled(units, 0, 3, 2, "chosen")
    piece = Piece("w", (0,), matrix.shape[1], changes=(Redraw(axis, entries, 1, "drawn"),))
    task = TensorTask("w", "F32", tuple(matrix.shape), (Band(len(matrix), (piece,)),))
    with RowReader(Checkpoint(tmp_path, {}, tensors, ())) as reader:
        written = np.concatenate([chunk.reshape(-1) for chunk in chunks(task, [reader])])
    out_FD = torch.from_numpy(written.reshape(matrix.shape))
    out_FD = out_FD if axis == "rows" else out_FD.T
    changed = (out_FD != values_FD).any(1)
    assert changed.nonzero().flatten().tolist() == sorted(numbers(entries).tolist())
    old, new = values_FD[changed], out_FD[changed]
    mean_error, std_error = old.std() / old.numel() ** 0.5, old.std() / (2 * old.numel()) ** 0.5
    assert (new.mean() - old.mean()).abs() < 4 * mean_error
    assert (new.std() - old.std()).abs() < 4 * std_error
    assert (new.mean() - values_FD.mean()).abs() > 8 * mean_error
    assert (new.std() - values_FD.std()).abs() > 8 * std_error


def test_units_that_stay_keep_their_bits_in_16_bits(dense, run):
    source = dense("llama", dtype=torch.bfloat16)
    folder = run(method="drop", base=source, experts=2)
    found = origins(hidden_units(folder, 1), hidden_units(source))
    assert ((found == -1).sum(0) == 24).all()
    assert tensors_of(folder)[f"{EXPERTS}.down_proj"].dtype == torch.bfloat16
