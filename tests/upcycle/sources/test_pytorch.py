"""PyTorch files: the numbers torch.load finds, and nothing in a file is ever called."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from dense_models import tensors_of

import upcycle
from upcycle import UpcycleError
from upcycle.sources import open_source


def save_as_bin(folder, *, shards=1):
    """Replace a checkpoint's safetensors by PyTorch files."""
    tensors = tensors_of(folder)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    names = list(tensors)
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in names[number::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_lie_where_torch_finds_them(shards, dtype, dense_copy):
    expected = tensors_of(dense_copy(name="same", dtype=dtype))
    source = open_source(save_as_bin(dense_copy(dtype=dtype), shards=shards))
    assert len(source.files) == shards
    assert source.tensors.keys() == expected.keys()
    with source.open_rows() as reader:
        for name, tensor in expected.items():
            width = tensor.shape[-1]
            rows = reader.rows(name, width, 1, tensor.numel() // width - 1)
            same = tensor.view(-1, width)[1:]
            assert source.tensors[name].shape == tuple(tensor.shape)
            assert rows.tobytes() == same.contiguous().view(torch.uint8).numpy().tobytes()


def test_a_run_gives_the_bytes_it_gives_of_safetensors(dense, dense_copy, run):
    other = dense("llama", seed=1)
    of_bin = run("bin", method="btx", sources=[save_as_bin(dense_copy(), shards=2), other])
    expected = run("expected", method="btx", sources=[dense("llama"), other])
    assert (of_bin / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    record = json.loads((of_bin / "upcycle.json").read_text())
    assert list(record["sources"][0]["files"]) == [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    assert upcycle.verify(of_bin).finite


def test_parameters_and_shared_storages_are_read(tmp_path):
    storage = torch.arange(12.0)
    values = {"whole": torch.nn.Parameter(storage.view(3, 4)), "part": storage[4:8], "ids": torch.arange(3)}
    torch.save(values, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    source = open_source(tmp_path)
    assert source.tensors["ids"].dtype == "I64"
    with source.open_rows() as reader:
        assert reader.rows("whole", 4, 0, 3).tolist() == storage.view(3, 4).tolist()
        assert reader.rows("part", 4, 0, 1).tolist() == [[4, 5, 6, 7]]


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


class Evil:
    pass


BAD_VALUES = [
    pytest.param(
        {"a": RunsCode()}, r"asks to run \w+\.system, and a file of tensors needs no code", id="code"
    ),
    pytest.param({"a": Evil()}, r"asks to run .*Evil, and a file", id="a-class"),
    pytest.param(torch.nn.Linear(2, 2), "asks to run torch.nn.modules.linear.Linear", id="a-module"),
    pytest.param([torch.zeros(2)], "must hold a dictionary of tensors, got list", id="a-list"),
    pytest.param(
        {"model": {"a": torch.zeros(2)}}, "must hold tensors only, got dict under 'model'", id="nested"
    ),
    pytest.param({"a": torch.zeros(2, 3).T}, "tensor a is stored as a view; save it after", id="transposed"),
    pytest.param({"a": torch.zeros(2).to_sparse()}, "asks to run torch._utils._rebuild_sparse", id="sparse"),
]


@pytest.mark.parametrize(("values", "message"), BAD_VALUES)
def test_what_is_no_dictionary_of_tensors_is_refused(values, message, tmp_path):
    torch.save(values, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UpcycleError, match=message) as error:
        open_source(tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in str(error.value)


def archive(pickled, data=b"\0" * 16, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as members:
        members.writestr("x/data.pkl", pickled)
        members.writestr("x/data/0", data)
    return file.getvalue()


def pickled_tensor(shape, strides, offset=0):
    """The pickle of {"a": tensor of storage 0}, with numbers that torch would not write."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, Storage) else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, OrderedDict())

    file = io.BytesIO()
    Pickler(file, protocol=2).dump({"a": Tensor()})
    return file.getvalue()


FORGED = [
    pytest.param((2, 3), (3, 1), 0, id="longer-than-its-storage"),
    pytest.param((2, 2), (2, 1), 1, id="starts-too-late"),
    pytest.param((-2, -2), (2, 1), 0, id="negative"),
    pytest.param((2**70,), (1,), 0, id="huge"),
    pytest.param((2, 2), (1,), 0, id="strides-of-another-shape"),
]


@pytest.mark.parametrize(("shape", "strides", "offset"), FORGED)
def test_forged_sizes_are_refused(shape, strides, offset, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(archive(pickled_tensor((2, 2), (2, 1))))
    assert open_source(tmp_path).tensors["a"].shape == (2, 2)
    path.write_bytes(archive(pickled_tensor(shape, strides, offset)))
    with pytest.raises(UpcycleError, match=r"is truncated or no file that torch\.save wrote; fetch it"):
        open_source(tmp_path)


def test_damaged_compressed_and_old_files_are_named(dense_copy, tmp_path):
    folder = save_as_bin(dense_copy())
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"no zip at all"):
        path.write_bytes(damaged)
        with pytest.raises(
            UpcycleError, match=r"pytorch_model\.bin is truncated or no file that torch\.save"
        ):
            open_source(folder)
    path.write_bytes(archive(pickled_tensor((2, 2), (2, 1)), compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UpcycleError, match="is compressed; unpack it"):
        open_source(folder)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        UpcycleError, match=r"is in the format of PyTorch before 1\.6; load it with a PyTorch"
    ):
        open_source(folder)
    big_endian = io.BytesIO(archive(pickled_tensor((2, 2), (2, 1)), struct.pack(">4f", 1, 2, 3, 4)))
    with zipfile.ZipFile(big_endian, "a") as members:
        members.writestr("x/byteorder", "big")
    path.write_bytes(big_endian.getvalue())
    with pytest.raises(UpcycleError, match="has its numbers in big-endian order"):
        open_source(folder)
