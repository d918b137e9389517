"""A run ends with a whole model under its name, or with one sentence and nothing."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import upcycle
from upcycle import UpcycleError, recipe_from_dict

# The modules, to replace what they call: the package offers functions of the same names.
RUN = sys.modules["upcycle.run"]
CHECKPOINT = sys.modules["upcycle.checkpoint"]
PROVENANCE = sys.modules["upcycle.provenance"]


def recipe_for(tmp_path, **values):
    return recipe_from_dict({"output": str(tmp_path / "out"), **values})


def copy_recipe(folder, tmp_path, **values):
    return recipe_for(tmp_path, **{"method": "copy", "base": str(folder), "experts": 2, **values})


def contents(folder):
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def fails(recipe, tmp_path, message):
    """Runs, expects the sentence, and that neither an output nor a trace of one is left."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UpcycleError, match=message) as error:
        upcycle.upcycle(recipe)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return error.value


# --- a run that works ---


def test_equal_recipes_give_equal_bytes(dense, tmp_path):
    sources = [str(dense("llama", seed=seed)) for seed in range(2)]
    values = {"method": "bam", "sources": sources, "max_shard_size": "50KB"}
    one, two, other = (
        upcycle.upcycle(
            recipe_for(tmp_path, **{**values, "output": str(tmp_path / name), "router": {"seed": seed}})
        )
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )
    assert contents(one.output) == contents(two.output)
    assert len(one.files) > 2
    tensors, others = (
        {name: tensor for file in result.files for name, tensor in load_file(result.output / file).items()}
        for result in (one, other)
    )
    differing = {name for name in tensors if not torch.equal(tensors[name], others[name])}
    assert differing == {name for name in tensors if "router" in name}


def test_routers_are_normal_and_none_equals_another(dense, tmp_path):
    source = str(dense("llama"))
    recipe = recipe_for(tmp_path, method="bam", sources=[source] * 4, router={"std": 0.5})
    tensors = load_file(upcycle.upcycle(recipe).output / "model.safetensors")
    routers = [tensor.flatten() for name, tensor in tensors.items() if "router" in name]
    assert len(routers) == 6
    together = torch.stack(routers)
    assert together.unique().numel() == together.numel()
    # Six standard errors of 768 numbers.
    assert abs(together.mean()) < 6 * 0.5 / 768**0.5
    assert abs(together.std() - 0.5) < 6 * 0.5 / (2 * 768) ** 0.5


def test_files_of_the_base_come_along_and_everyone_may_read(dense_copy, tmp_path):
    folder = dense_copy()
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_text('{"model": {}}')
        (folder / name).chmod(0o600)
    (folder / "optimizer.pt").write_text("no part of a model")
    umask = os.umask(0o077)
    try:
        output = upcycle.upcycle(copy_recipe(folder, tmp_path)).output
    finally:
        os.umask(umask)
    names = {path.name for path in output.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"} <= names
    assert "optimizer.pt" not in names
    assert {oct(path.stat().st_mode & 0o777) for path in output.iterdir()} == {"0o644"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")
def test_every_file_and_at_last_the_name_is_flushed_to_the_disk(dense, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}")))
    output = upcycle.upcycle(copy_recipe(dense("llama"), tmp_path, max_shard_size="40KB")).output
    *files, parent = flushed
    written = {os.path.basename(file).removesuffix(".part") for file in files} - {".run"}
    assert written == {path.name for path in output.iterdir()}
    assert parent == str(tmp_path)


def test_a_recipe_file_runs_from_its_path(dense, tmp_path):
    recipe = copy_recipe(dense("llama"), tmp_path / "deep" / "er")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    result = upcycle.upcycle(path)
    assert result.output == tmp_path / "deep" / "er" / "out"
    assert (result.output / "model.safetensors").exists()
    assert sorted(path.name for path in result.output.parent.iterdir()) == ["out"]


# --- a run that does not ---


def test_an_output_that_exists_is_left_alone(dense, tmp_path):
    recipe = copy_recipe(dense("llama"), tmp_path)
    (tmp_path / "out").mkdir()
    fails(recipe, tmp_path, "out exists already; choose another output or remove it")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    recipe = copy_recipe(dense("llama"), tmp_path, output=str(tmp_path / "file"))
    fails(recipe, tmp_path, "file exists already")
    recipe = copy_recipe(dense("llama"), tmp_path, output=str(tmp_path / "file" / "below"))
    fails(recipe, tmp_path, "below cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["copy", "btx"])
def test_weights_that_are_not_finite_are_named(bad, dtype, method, dense, dense_copy, tmp_path):
    folder = dense_copy(dtype=dtype, shard="1GB")
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][-1, -1] = bad
    save_file(tensors, folder / "model.safetensors")
    before = contents(folder)
    if method == "copy":
        recipe = copy_recipe(folder, tmp_path)
    else:
        whole = dense("llama", dtype=dtype, shard="1GB")
        recipe = recipe_for(tmp_path, method="btx", sources=[str(whole), str(folder)])
    message = rf"damaged.model\.safetensors: tensor {name} holds NaN or infinite values; use a checkpoint"
    fails(recipe, tmp_path, message)
    assert contents(folder) == before


def test_a_mean_whose_sum_is_too_large_is_named(dense_copy, tmp_path):
    """The numbers themselves are finite."""
    folder = dense_copy(shard="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 3e38
    save_file(tensors, folder / "model.safetensors")
    recipe = recipe_for(tmp_path, method="btx", sources=[str(folder)] * 2)
    fails(recipe, tmp_path, "a value of model.norm.weight is too large for F32")


def test_values_too_large_for_the_type_are_named(dense_copy, tmp_path):
    folder = dense_copy(shard="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, folder / "model.safetensors")
    recipe = copy_recipe(folder, tmp_path, dtype="float16")
    fails(recipe, tmp_path, "model.norm.weight is too large for F16; set 'dtype' to bfloat16 or float32")


@pytest.mark.parametrize("router", [{"std": 1e5}, {"init": "orthogonal", "row_norm": 1e6}], ids=str)
def test_a_drawn_value_that_does_not_fit_the_type_is_named(router, dense_copy, tmp_path):
    recipe = copy_recipe(dense_copy(shard="1GB"), tmp_path, dtype="float16", router=router)
    fails(recipe, tmp_path, "router.weight: a drawn value is too large for F16; draw smaller ones")


def test_a_head_of_its_own_under_a_tied_configuration_is_named(dense_copy, tmp_path):
    """transformers then uses the stored head, so that dropping it would change the model."""
    folder = dense_copy(shard="1GB")
    path, config = folder / "model.safetensors", folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    message = "damaged: lm_head.weight differs from model.embed_tokens.weight, though config.json ties them"
    fails(copy_recipe(folder, tmp_path), tmp_path, message)
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    assert upcycle.verify(upcycle.upcycle(copy_recipe(folder, tmp_path)).output).passed


def test_a_truncated_source_is_named(dense_copy, tmp_path):
    folder = dense_copy()
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-8])
    fails(copy_recipe(folder, tmp_path), tmp_path, f"{path.name} is truncated or damaged")


def test_a_missing_source_is_named(tmp_path):
    fails(
        copy_recipe(tmp_path / "nowhere", tmp_path), tmp_path, "nowhere: there is no such checkpoint folder"
    )


def test_the_home_of_nobody_is_named(dense, tmp_path):
    message = "~nobody-of-this-name/x: there is no home folder of that user"
    fails(copy_recipe("~nobody-of-this-name/x", tmp_path), tmp_path, message)
    fails(copy_recipe(dense("llama"), tmp_path, output="~nobody-of-this-name/x"), tmp_path, message)


def test_a_disk_without_room_is_seen_before_the_run(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(RUN.shutil, "disk_usage", lambda path: SimpleNamespace(free=50 * 10**6))
    recipe = copy_recipe(dense("llama"), tmp_path)
    fails(recipe, tmp_path, r"out needs 0.00 GB on disk, but .* has 0.05 GB free; make room")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "the disk became full while .*out was written; make room",
        ),
        (OSError(errno.EIO, "Input/output error"), "out could not be written: Input/output error"),
    ],
    ids=["full", "broken"],
)
def test_a_disk_that_fails_in_the_middle_leaves_nothing(error, message, dense, tmp_path, monkeypatch):
    written = []
    real = CHECKPOINT._write_all

    def write(file, data):
        if len(written) == 20:
            raise error
        written.append(len(data))
        real(file, data)

    monkeypatch.setattr(CHECKPOINT, "_write_all", write)
    folder = dense("llama")
    before = contents(folder)
    fails(copy_recipe(folder, tmp_path, max_shard_size="40KB"), tmp_path, message)
    assert len(written) == 20
    assert contents(folder) == before


def test_an_output_that_appears_during_the_run_is_left_alone(dense, tmp_path, monkeypatch):
    real = RUN.write_side_files

    def appear(folder, plan, hashes, routers):
        real(folder, plan, hashes, routers)
        (tmp_path / "out").mkdir()

    monkeypatch.setattr(RUN, "write_side_files", appear)
    with pytest.raises(UpcycleError, match="out exists already"):
        upcycle.upcycle(copy_recipe(dense("llama"), tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_the_folder_is_held_until_it_has_its_name(dense, tmp_path, monkeypatch):
    recipe = copy_recipe(dense("llama"), tmp_path)
    real, refused = RUN.Path.rename, []

    def rename(path, target):
        with pytest.raises(UpcycleError, match="out is being written by another run"):
            upcycle.upcycle(recipe)
        refused.append(path.name)
        return real(path, target)

    monkeypatch.setattr(RUN.Path, "rename", rename)
    output = upcycle.upcycle(recipe).output
    assert refused == [".out.incomplete"]
    assert ".lock" not in {path.name for path in output.iterdir()}


# --- a run that goes on ---


def written_files(monkeypatch):
    """Names of the weight files that are written from now on."""
    real, names = RUN.write_shard, []

    def write_shard(path, *arguments):
        names.append(path.name)
        real(path, *arguments)

    monkeypatch.setattr(RUN, "write_shard", write_shard)
    return names


def interrupt_after(shards, recipe, monkeypatch):
    """Runs the recipe, and presses Ctrl-C while it writes the file after so many."""
    real, left = CHECKPOINT._write_all, []

    def write_all(file, data):
        real(file, data)
        left.append(os.path.basename(file.name))
        if len(set(left)) > shards and left.count(left[-1]) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CHECKPOINT, "_write_all", write_all)
        with pytest.raises(KeyboardInterrupt):
            upcycle.upcycle(recipe)


def many_shards(folder, tmp_path, **values):
    return copy_recipe(folder, tmp_path, max_shard_size="40KB", **values)


def test_an_interrupted_run_goes_on_behind_its_last_whole_file(dense, tmp_path, monkeypatch):
    recipe = many_shards(dense("llama"), tmp_path)
    whole = contents(
        upcycle.upcycle(many_shards(dense("llama"), tmp_path, output=str(tmp_path / "b"))).output
    )
    interrupt_after(2, recipe, monkeypatch)
    incomplete = tmp_path / ".out.incomplete"
    assert not (tmp_path / "out").exists()
    left = sorted(path.name for path in incomplete.glob("*.safetensors"))
    assert left == [name for name in sorted(whole) if name.endswith(".safetensors")][:2]
    assert list(incomplete.glob("*.part"))
    names = written_files(monkeypatch)
    result = upcycle.upcycle(recipe)
    assert names == list(result.files)[2:]
    assert contents(result.output) == whole
    assert not incomplete.exists()


def change_seed(recipe, source, incomplete):
    return dataclasses.replace(recipe, router=dataclasses.replace(recipe.router, seed=1))


def touch_a_source(recipe, source, incomplete):
    os.utime(source / "model-00001-of-00005.safetensors")
    return recipe


def change_the_configuration(recipe, source, incomplete):
    path = source / "config.json"
    state = path.stat()
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size
    assert "1e-03" in path.read_text()
    return recipe


def cut_a_file(recipe, source, incomplete):
    path = sorted(incomplete.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    return recipe


def forget_the_run(recipe, source, incomplete):
    (incomplete / ".run").unlink()
    return recipe


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (change_seed, 0),
        (touch_a_source, 0),
        (change_the_configuration, 0),
        (forget_the_run, 0),
        (cut_a_file, 1),
    ],
)
def test_another_run_uses_nothing_that_is_left(change, kept, dense_copy, tmp_path, monkeypatch):
    source = dense_copy()
    recipe = many_shards(source, tmp_path)
    interrupt_after(2, recipe, monkeypatch)
    recipe = change(recipe, source, tmp_path / ".out.incomplete")
    names = written_files(monkeypatch)
    result = upcycle.upcycle(recipe)
    assert len(names) == len(result.files) - kept
    fresh = upcycle.upcycle(dataclasses.replace(recipe, output=str(tmp_path / "fresh")))
    assert contents(result.output) == contents(fresh.output)


def test_another_version_of_ours_begins_anew(dense, tmp_path, monkeypatch):
    recipe = many_shards(dense("llama"), tmp_path)
    interrupt_after(2, recipe, monkeypatch)
    monkeypatch.setattr(PROVENANCE, "_version", lambda package: "99.0" if package == "moe-runtime" else "1.0")
    names = written_files(monkeypatch)
    assert names == list(upcycle.upcycle(recipe).files)


def test_a_run_that_fails_when_it_goes_on_leaves_nothing(dense_copy, tmp_path, monkeypatch):
    source = dense_copy()
    recipe = many_shards(source, tmp_path)
    interrupt_after(2, recipe, monkeypatch)
    path = sorted(source.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UpcycleError, match="is truncated or damaged"):
        upcycle.upcycle(recipe)
    assert not (tmp_path / "out").exists()


STOPS_AFTER_A_SHARD = """
import sys, time, upcycle
run = sys.modules["upcycle.run"]
real = run.write_shard
def write_shard(*arguments):
    real(*arguments)
    print("written", flush=True)
    time.sleep(600)
run.write_shard = write_shard
upcycle.upcycle(sys.argv[1])
"""


def test_a_killed_run_leaves_no_output_and_the_next_one_goes_on(dense, tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(many_shards(dense("llama"), tmp_path).to_dict()))
    child = subprocess.Popen(
        [sys.executable, "-c", STOPS_AFTER_A_SHARD, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "written\n"
        with pytest.raises(UpcycleError, match="out is being written by another run; wait for it to end"):
            upcycle.upcycle(path)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.incomplete").is_dir()
    (tmp_path / ".out.incomplete" / "model-00001-of-00099.safetensors").write_text("of another run")
    names = written_files(monkeypatch)
    result = upcycle.upcycle(path)
    assert names == list(result.files)[1:]
    assert not (tmp_path / ".out.incomplete").exists()
    assert {path.name for path in result.output.glob("*.safetensors")} == set(result.files)
    assert upcycle.verify(result.output).passed


def test_progress_with_rate_and_time_left_on_a_terminal(dense, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(copy_recipe(dense("llama"), tmp_path).to_dict()))
    code = "import sys, upcycle; upcycle.upcycle(sys.argv[1])"
    environment = {**os.environ, "TTY_COMPATIBLE": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert "Reading the sources" in done.stderr
    assert "Writing" in done.stderr
    assert "/s" in done.stderr
    assert "0:00:00" in done.stderr
    path.write_text(
        yaml.safe_dump(copy_recipe(dense("llama"), tmp_path, output=str(tmp_path / "b")).to_dict())
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
