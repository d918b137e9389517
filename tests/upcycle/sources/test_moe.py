"""Every layout of a mixture, seen under one set of names."""

import pytest
import torch
from safetensors.torch import save_file

from upcycle import UpcycleError
from upcycle.sources import open_source
from upcycle.sources.moe import per_expert

E, F, D = 3, 4, 5


def layouts():
    """Name of a layout -> the same router and experts in it."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(E, 2 * F, D, generator=generator)
    down = torch.randn(E, D, F, generator=generator)
    router = torch.randn(E, D, generator=generator)
    layer = "model.layers.7"
    norm = {f"{layer}.input_layernorm.weight": torch.ones(D)}

    def apart(prefix, gate, up, to):
        projections = {gate: gate_up[:, :F], up: gate_up[:, F:], to: down}
        return {
            f"{layer}.{prefix}.{e}.{name}.weight": stack[e].contiguous()
            for name, stack in projections.items()
            for e in range(E)
        }

    stacked = {f"{layer}.mlp.experts.gate_up_proj": gate_up, f"{layer}.mlp.experts.down_proj": down}
    mixtral = apart("block_sparse_moe.experts", "w1", "w3", "w2")
    qwen = apart("mlp.experts", "gate_proj", "up_proj", "down_proj")
    granite = {
        f"{layer}.block_sparse_moe.input_linear.weight": gate_up,
        f"{layer}.block_sparse_moe.output_linear.weight": down,
    }
    return {
        "mixtral": norm | mixtral | {f"{layer}.block_sparse_moe.gate.weight": router},
        "qwen": norm | qwen | {f"{layer}.mlp.gate.weight": router},
        "fused": norm | stacked | {f"{layer}.mlp.gate.weight": router},
        "ours": norm | stacked | {f"{layer}.mlp.router.weight": router},
        "granite": norm | granite | {f"{layer}.block_sparse_moe.router.layer.weight": router},
    }


def read_all(source):
    with source.open_rows() as reader:
        return {
            name: (
                tensor.shape,
                reader.rows(name, tensor.shape[-1], 0, len(tensor.shape) and tensor.shape[0]),
            )
            for name, tensor in source.tensors.items()
            if len(tensor.shape) == 2
        }


def saved(folder, tensors):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return open_source(folder)


def test_all_layouts_read_alike(tmp_path):
    expected = layouts()["qwen"]
    prefix = "model.layers.7"
    names = {
        **{f"{prefix}.mlp.router.weight": expected[f"{prefix}.mlp.gate.weight"]},
        **{name: tensor for name, tensor in expected.items() if ".experts." in name},
    }
    for layout, tensors in layouts().items():
        source = per_expert(saved(tmp_path / layout, tensors))
        read = read_all(source)
        assert read.keys() == names.keys(), layout
        assert f"{prefix}.input_layernorm.weight" in source.tensors
        for name, tensor in names.items():
            shape, rows = read[name]
            assert shape == tuple(tensor.shape)
            assert torch.equal(torch.from_numpy(rows), tensor), (layout, name)


def test_biases_of_stacks_are_read(tmp_path):
    prefix = "model.layers.0.mlp.experts"
    gate_up, down = torch.randn(E, 2 * F), torch.randn(E, D)
    stacks = {f"{prefix}.gate_up_bias": gate_up, f"{prefix}.down_bias": down}
    source = per_expert(saved(tmp_path / "x", stacks))
    with source.open_rows() as reader:
        assert reader.rows(f"{prefix}.1.up_proj.bias", 1, 0, F).ravel().tolist() == gate_up[1, F:].tolist()
        assert reader.rows(f"{prefix}.2.down_proj.bias", 1, 0, D).ravel().tolist() == down[2].tolist()


def test_a_stack_that_is_none_and_two_layouts_at_once_are_named(tmp_path):
    both = layouts()["fused"] | layouts()["ours"]
    with pytest.raises(UpcycleError, match=r"tensor model\.layers\.7\.mlp\.\w+\.weight is there in a second"):
        per_expert(saved(tmp_path / "both", both))
    flat = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(E, 2 * F)}
    with pytest.raises(UpcycleError, match=r"must be a stack of the experts' matrices, got shape \(3, 8\)"):
        per_expert(saved(tmp_path / "flat", flat))
    odd = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(E, 2 * F + 1, D)}
    with pytest.raises(UpcycleError, match=r"got shape \(3, 9, 5\)"):
        per_expert(saved(tmp_path / "odd", odd))
    quantised = {"model.layers.0.mlp.experts.down_proj": torch.zeros(E, D, F, dtype=torch.int8)}
    with pytest.raises(UpcycleError, match="must be of type F32, F16, BF16, got I8"):
        per_expert(saved(tmp_path / "quantised", quantised))
