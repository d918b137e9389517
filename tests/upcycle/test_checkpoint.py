"""Reading: all damage to a checkpoint is told by name. Writing: what safetensors itself reads back."""

import json
import os
import re
import stat
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from upcycle import UpcycleError
from upcycle.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    RowReader,
    index_json,
    make_shards,
    open_checkpoint,
    read_header,
    write_shard,
)
from upcycle.dtypes import STORAGE
from upcycle.tasks import TensorTask, Zeros


def shards_of(folder):
    return sorted(folder.glob("model-*.safetensors"))


def edit_header(path, change):
    """Replace the JSON header by `change(header)`, keeping the tensors' bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def edit_index(folder, change):
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


# --- reading ---


def test_tensors_lie_where_safetensors_finds_them(dense):
    folder = dense("llama")
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.files) > 2
    with RowReader(checkpoint) as reader:
        for file in checkpoint.files:
            for name, tensor in load_file(folder / file).items():
                width = tensor.shape[-1]
                read = reader.rows(name, width, 0, tensor.numel() // width)
                assert checkpoint.tensors[name].shape == tuple(tensor.shape)
                assert np.array_equal(read.reshape(tensor.shape), tensor.numpy())


def test_rows_may_start_anywhere(tmp_path):
    save_file({"a": torch.zeros(3), "b": torch.arange(24.0).view(6, 4)}, tmp_path / SINGLE_NAME)
    (tmp_path / "config.json").write_text("{}")
    with RowReader(open_checkpoint(tmp_path)) as reader:
        assert reader.rows("b", 4, 2, 3).tolist() == torch.arange(8.0, 20.0).view(3, 4).tolist()


def test_missing_things_are_named(dense_copy, tmp_path):
    with pytest.raises(UpcycleError, match="nowhere: there is no such checkpoint folder"):
        open_checkpoint(tmp_path / "nowhere")
    folder = dense_copy()
    shards_of(folder)[1].unlink()
    with pytest.raises(
        UpcycleError, match=r"model-00002-of-\d+\.safetensors is missing, but .*index.json lists it"
    ):
        open_checkpoint(folder)
    (folder / INDEX_NAME).unlink()
    with pytest.raises(
        UpcycleError, match=r"holds neither model\.safetensors nor .*save the model as safetensors"
    ):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UpcycleError, match=r"config\.json is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "keep", [0, 4, 100, -1], ids=["empty", "half-a-length", "half-a-header", "one-byte-short"]
)
def test_a_truncated_file_is_named(keep, dense_copy):
    folder = dense_copy()
    path = shards_of(folder)[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UpcycleError, match=rf"{path.name} is truncated .*fetch it again"):
        open_checkpoint(folder)


def test_bytes_after_the_last_tensor_are_refused(dense_copy):
    path = shards_of(dense_copy())[0]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UpcycleError, match=rf"by its header it must have {size} bytes, got {size + 1}"):
        read_header(path)


def grow_shape(header):
    first = next(name for name in header if name != "__metadata__")
    header[first]["shape"] = [*header[first]["shape"], 2]
    return header


HEADERS = [
    pytest.param(grow_shape, "has a damaged entry in the header", id="shape"),
    pytest.param(lambda header: [1], "damaged safetensors header", id="not-an-object"),
    pytest.param(
        lambda header: {"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}},
        "damaged safetensors header",
        id="fraction",
    ),
    pytest.param(
        lambda header: {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]}},
        "damaged safetensors header",
        id="infinite",
    ),
    pytest.param(lambda header: {"a": {"dtype": "F32"}}, "damaged safetensors header", id="no-offsets"),
    pytest.param(
        lambda header: {"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}},
        "damaged safetensors header",
        id="no-shape",
    ),
    pytest.param(
        lambda header: {"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}},
        "damaged entry",
        id="a-gap",
    ),
    pytest.param(
        lambda header: {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        "damaged safetensors header",
        id="negative",
    ),
    pytest.param(
        lambda header: {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
        "damaged entry",
        id="wraps-to-zero",
    ),
    pytest.param(
        lambda header: {"a": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}},
        "damaged safetensors header",
        id="huge",
    ),
    pytest.param(
        lambda header: {"a": {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]}},
        "damaged safetensors header",
        id="many-dimensions",
    ),
    pytest.param(
        lambda header: {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
        "tensor b has a damaged entry",
        id="overlap",
    ),
    pytest.param(
        lambda header: {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        "tensor a has a damaged entry",
        id="of-another-type",
    ),
]


@pytest.mark.parametrize(("change", "message"), HEADERS)
def test_a_damaged_header_is_named(change, message, dense_copy):
    path = shards_of(dense_copy())[0]
    edit_header(path, change)
    with pytest.raises(UpcycleError, match=message) as error:
        read_header(path)
    assert path.name in str(error.value)


@pytest.mark.parametrize(
    "file", [["a"], 3, None, "", ".", "..", "a\0b", "deep/model.safetensors", "/etc/passwd"], ids=repr
)
def test_an_index_that_names_no_file_of_its_folder_is_refused(file, dense_copy):
    folder = dense_copy()
    edit_index(folder, lambda weights: weights.update({"model.norm.weight": file}))
    message = f"{INDEX_NAME} places tensor model.norm.weight in {file!r}, which must be a file of that folder"
    with pytest.raises(UpcycleError, match=re.escape(message)):
        open_checkpoint(folder)


def test_a_file_that_cannot_be_read_is_named(dense_copy):
    folder = dense_copy()
    path = shards_of(folder)[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(UpcycleError, match=rf"{path.name} cannot be read: it is no ordinary file"):
        open_checkpoint(folder)


def test_json_that_programs_read_differently_is_refused(dense_copy):
    folder = dense_copy()
    path = shards_of(folder)[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length]
    name = json.dumps(next(name for name in json.loads(text) if name != "__metadata__")).encode()
    for forged in (b"{" + name + b":{}," + text.lstrip()[1:], b"[" * 10**6, text.decode().encode("utf-16")):
        path.write_bytes(len(forged).to_bytes(8, "little") + forged + data[8 + length :])
        with pytest.raises(UpcycleError, match=f"{path.name} has a damaged safetensors header"):
            read_header(path)
    (folder / "config.json").write_text('{"hidden_size": 1, "hidden_size": 2}')
    with pytest.raises(
        UpcycleError, match=r"config\.json cannot be read as JSON: the name 'hidden_size' stands twi"
    ):
        open_checkpoint(folder)
    (folder / "config.json").write_text("[" * 10**6)
    with pytest.raises(
        UpcycleError, match=r"config\.json cannot be read as JSON: its brackets are nested too"
    ):
        open_checkpoint(folder)


def test_a_link_out_of_the_folder_is_refused(dense_copy, tmp_path):
    folder = dense_copy()
    path = shards_of(folder)[1]
    outside = path.rename(tmp_path / "outside.safetensors")
    path.symlink_to(outside)
    message = f"{path.name} is a link to {outside}, outside its folder; put the file itself there"
    with pytest.raises(UpcycleError, match=re.escape(message)):
        open_checkpoint(folder)
    path.unlink()
    outside.rename(folder / "inside.safetensors")
    path.symlink_to("inside.safetensors")
    assert open_checkpoint(folder).tensors
    single = dense_copy(name="single", shard="1GB") / SINGLE_NAME
    single.rename(tmp_path / "outside.safetensors")
    single.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UpcycleError, match=r"model\.safetensors is a link to .*, outside its folder"):
        open_checkpoint(single.parent)


def test_the_links_of_a_hub_cache_are_followed(dense_copy, tmp_path):
    """models--OWNER--NAME/snapshots/COMMIT holds links into models--OWNER--NAME/blobs."""
    folder = dense_copy()
    home = tmp_path / "models--someone--dense"
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for path in folder.iterdir():
        path.rename(home / "blobs" / f"of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/of-{path.name}")
    assert len(open_checkpoint(snapshot).files) > 2
    (home / "other").mkdir()
    path = shards_of(snapshot)[0]
    path.resolve().rename(home / "other" / "x")
    path.unlink()
    path.symlink_to(home / "other" / "x")
    with pytest.raises(UpcycleError, match="outside its folder"):
        open_checkpoint(snapshot)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
def test_a_pipe_in_the_place_of_a_file_does_not_hang(dense_copy):
    folder = dense_copy()
    path = shards_of(folder)[0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UpcycleError, match=f"{path.name} cannot be read: it is no ordinary file"):
        open_checkpoint(folder)


def test_shards_that_disagree_with_the_index_are_named(dense_copy):
    folder = dense_copy()
    first, second = (path.name for path in shards_of(folder)[:2])
    name = next(iter(read_header(folder / first)))
    edit_index(folder, lambda weights: weights.update({name: second}))
    with pytest.raises(
        UpcycleError, match=rf"{first} holds tensor {name}, which .*index.json places in {second}"
    ):
        open_checkpoint(folder)
    edit_index(folder, lambda weights: weights.pop(name))
    with pytest.raises(
        UpcycleError, match=rf"{first} holds tensor {name}, which .*index.json places in no file"
    ):
        open_checkpoint(folder)
    edit_index(folder, lambda weights: weights.update({name: first, "extra": second}))
    with pytest.raises(UpcycleError, match=rf"{second} lacks tensor extra, which .*index.json places there"):
        open_checkpoint(folder)
    (folder / INDEX_NAME).write_text('{"weight_map": {}}')
    with pytest.raises(UpcycleError, match=r"index\.json has no 'weight_map'"):
        open_checkpoint(folder)
    (folder / INDEX_NAME).write_text("{")
    with pytest.raises(UpcycleError, match=r"index\.json cannot be read as JSON"):
        open_checkpoint(folder)
    (folder / INDEX_NAME).write_text("[]")
    with pytest.raises(UpcycleError, match=r"index\.json must hold a JSON object, got list"):
        open_checkpoint(folder)


def test_a_file_that_shrinks_while_it_is_read_is_named(dense_copy):
    folder = dense_copy()
    checkpoint = open_checkpoint(folder)
    name, tensor = max(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].start))
    path = folder / tensor.file
    path.write_bytes(path.read_bytes()[: tensor.start + 4])
    with (
        RowReader(checkpoint) as reader,
        pytest.raises(UpcycleError, match=f"tensor {name}: the file became shorter while it was read"),
    ):
        reader.rows(name, 1, 0, 8)


# --- writing ---


def zeros(name, dtype, *shape):
    return TensorTask(name, dtype, shape, Zeros())


def test_shards_hold_tensors_in_order_up_to_their_size():
    tasks = [zeros("a", "F32", 10), zeros("b", "F32", 10), zeros("c", "F32", 50), zeros("d", "F32", 10)]
    shards = make_shards(tasks, max_bytes=80)
    assert [[task.name for task in shard.tasks] for shard in shards] == [["a", "b"], ["c"], ["d"]]
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert index_json(shards) == {
        "metadata": {"total_size": 320},
        "weight_map": {"a": shards[0].name, "b": shards[0].name, "c": shards[1].name, "d": shards[2].name},
    }
    assert [shard.name for shard in make_shards(tasks, max_bytes=320)] == [SINGLE_NAME]


def test_a_written_file_is_read_by_safetensors_and_by_others(tmp_path):
    (shard,) = make_shards([zeros("half", "BF16", 3), zeros("whole", "F32", 2, 2)], max_bytes=1000)
    values = {"half": np.array([1, 2, 3], np.uint16), "whole": np.arange(4, dtype=np.float32)}
    path = tmp_path / shard.name
    write_shard(path, shard, (values[task.name].astype(STORAGE[task.dtype]) for task in shard.tasks))
    loaded = load_file(path)
    assert loaded["whole"].tolist() == [[0, 1], [2, 3]]
    assert loaded["half"].view(torch.int16).tolist() == [1, 2, 3]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for tensor in read_header(path).values():
        assert tensor.start % STORAGE[tensor.dtype].itemsize == 0


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_stored_bytes_are_copied_from_file_to_file(platform, tmp_path, monkeypatch):
    if platform == "linux" and sys.platform != "linux":
        pytest.skip("needs Linux's sendfile")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("upcycle.checkpoint._COPY_BYTES", 5)
    save_file({"a": torch.zeros(3), "b": torch.arange(24.0).view(6, 4)}, tmp_path / SINGLE_NAME)
    (tmp_path / "config.json").write_text("{}")
    (shard,) = make_shards([zeros("x", "F32", 2, 4), zeros("y", "F32", 1)], max_bytes=1000)
    path = tmp_path / "out.safetensors"
    with RowReader(open_checkpoint(tmp_path)) as reader:
        span = reader.span("b", 4, 3, 2)
        write_shard(path, shard, [span, np.array([7], np.float32)])
        assert load_file(path)["x"].tolist() == [[12, 13, 14, 15], [16, 17, 18, 19]]
        assert load_file(path)["y"].tolist() == [7]
        os.truncate(tmp_path / SINGLE_NAME, span.start + 6)
        with pytest.raises(UpcycleError, match="tensor b: the file became shorter while it was read"):
            write_shard(tmp_path / "cut.safetensors", shard, [span])
    assert not (tmp_path / "cut.safetensors").exists()
