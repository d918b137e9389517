"""The recorder, alone and in other people's trainers, and the choice among checkpoints."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from trainers import THEIR_WARNINGS, settings
from upit_runs import change_tensor, experts_of, record_shifted, shifted

from upcycle.errors import UpcycleError
from upcycle.provenance import hash_file
from upcycle.sources import open_source
from upcycle.upit import Recorder, files, open_expert, open_recording, select
from upcycle.upit.expert import whole_tensor
from upcycle.upit.models import load_dense
from upcycle.upit.record import Recorded, Recording, check_base


def tensors(folder):
    """Every tensor of an expert, as float32."""
    expert = open_expert(folder)
    with expert.open_rows() as reader:
        return {name: whole_tensor(reader, name) for name in expert.tensors}


def is_feed_forward(name):
    return ".mlp." in name


@pytest.mark.parametrize(("kind", "dtype", "bound"), [("value", "float32", 0), ("delta", "float32", 1e-7)])
def test_a_recorded_expert_has_the_models_feed_forwards(kind, dtype, bound, base, tmp_path):
    recording, model = record_shifted(tmp_path / "recording", base, 2, kind=kind, dtype=dtype)
    expert, dense = tensors(experts_of(recording)[1]), tensors_of_base(base)
    for name, parameter in model.named_parameters():
        expected = parameter.detach().numpy() if is_feed_forward(name) else dense[name]
        assert np.abs(expert[name] - expected).max() <= bound, name


def tensors_of_base(base):
    return {name: p.detach().numpy() for name, p in load_dense(base, "cpu").named_parameters()}


def test_bfloat16_deltas_keep_the_change_to_eight_bits(base, tmp_path):
    recording, model = record_shifted(tmp_path / "recording", base, 1, dtype="bfloat16")
    expert, dense = tensors(experts_of(recording)[0]), tensors_of_base(base)
    name = "model.layers.1.mlp.up_proj.weight"
    change = model.get_parameter(name).detach().numpy() - dense[name]
    error = np.abs(expert[name] - dense[name] - change)
    assert (error <= np.abs(change) * 2.0**-8 + 1e-7).all()


def test_everything_else_is_the_mean_of_all_checkpoints(base, tmp_path):
    model, recorder = load_dense(base, "cpu"), Recorder(tmp_path / "recording", base)
    recorder.start(model)
    total = {}
    for step in range(1, 4):
        shifted(model, 0.1, seed=step)
        recorder.record(model, step=step, epoch=step)
        for name, parameter in model.named_parameters():
            total[name] = total.get(name, 0.0) + parameter.detach().double().numpy() / 3
    assert recorder.recording.rest == "rest-0003"
    assert not (tmp_path / "recording" / "rest-0002").exists()
    mean, dense = tensors(tmp_path / "recording" / "rest-0003"), tensors_of_base(base)
    for name, expected in total.items():
        expected = dense[name] if is_feed_forward(name) else expected
        assert np.abs(mean[name] - expected).max() < 1e-6, name


def test_a_recording_goes_on_after_a_kill_before_its_index(base, tmp_path):
    """A checkpoint that the index does not name is written again, whatever lies there."""
    folder = tmp_path / "recording"
    recording, model = record_shifted(folder, base, 1)
    for name in ("0002", "rest-0002"):
        (folder / name).mkdir()
        (folder / name / "expert.safetensors").write_bytes(b"half a file")
    again = Recorder(folder, base)
    again.record(model, step=1, epoch=0.25)  # has it already
    assert again.recording == recording
    again.record(model, step=2, epoch=0.5)
    assert open_recording(folder).checkpoints[1] == Recorded("0002", 2, 0.5, None)
    assert np.array_equal(
        tensors(folder / "0002")["model.layers.0.mlp.up_proj.weight"],
        tensors(folder / "0001")["model.layers.0.mlp.up_proj.weight"],
    )


@THEIR_WARNINGS
def test_a_callback_records_in_transformers_trainer(base, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(250, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [{"input_ids": row, "labels": row} for row in rows]
    model, recorder = load_dense(base, "cpu").train(), Recorder(tmp_path / "recording", base, every=0.5)
    arguments = TrainingArguments(**settings(tmp_path / "out", max_steps=-1, num_train_epochs=2))
    Trainer(model, arguments, train_dataset=examples, callbacks=[recorder.callback()]).train()
    recording = open_recording(tmp_path / "recording")
    assert [(c.step, c.epoch) for c in recording.checkpoints] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    losses = [checkpoint.loss for checkpoint in recording.checkpoints]
    assert losses[0] is None  # logged after the first step's callbacks
    assert all(loss > 0 for loss in losses[1:])
    last = tensors(experts_of(recording)[-1])
    for name, parameter in model.named_parameters():
        if is_feed_forward(name):
            assert np.abs(last[name] - parameter.detach().numpy()).max() < 1e-6


def peft_model(base, *modules):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(modules), init_lora_weights=False)
    return get_peft_model(load_dense(base, "cpu"), config)


@THEIR_WARNINGS
def test_adapters_of_peft_are_recorded_as_what_they_merge_to(base, tmp_path):
    model = peft_model(base, "gate_proj", "up_proj", "down_proj")
    recorder = Recorder(tmp_path / "recording", base, kind="lora")
    recorder.start(model)
    recorder.record(model, step=1, epoch=0.25)
    assert recorder.recording.rest is None
    expert = tensors(tmp_path / "recording" / "0001")
    merged = dict(model.merge_and_unload().named_parameters())
    for name, parameter in merged.items():
        assert np.abs(expert[name] - parameter.detach().numpy()).max() < 1e-6, name


@THEIR_WARNINGS
def test_adapters_elsewhere_are_refused(base, tmp_path):
    recorder = Recorder(tmp_path / "recording", base, kind="lora")
    with pytest.raises(ValueError, match=r"adapters on its feed-forwards only, got one on .*q_proj"):
        recorder.start(peft_model(base, "q_proj", "up_proj"))
    with pytest.raises(
        ValueError, match="must have LoRA adapters on its feed-forwards for kind 'lora', got none"
    ):
        recorder.start(load_dense(base, "cpu"))


def test_a_model_that_is_not_the_base_is_refused(base, dense, tmp_path):
    model = load_dense(base, "cpu")
    recorder = Recorder(tmp_path / "recording", base)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(
        ValueError, match=r"must hold the weights of .* but model.layers.2.mlp.down_proj.weight"
    ):
        recorder.start(model)
    with pytest.raises(ValueError, match=r"it has no parameter gpt_neox.embed_in.weight"):
        Recorder(tmp_path / "other", dense("gpt_neox")).start(model)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every": 0}, "every must be above 0 epochs, got 0"),
        ({"kind": "sum"}, "kind must be one of delta, value, lora, got 'sum'"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
    ],
)
def test_arguments_are_checked(options, sentence, base, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        Recorder(tmp_path, base, **options)


def test_a_recording_of_another_kind_or_base_is_refused(recording, base, dense):
    with pytest.raises(UpcycleError, match="holds experts of kind delta in float32, not value in float32"):
        Recorder(recording.folder, base, kind="value")
    with pytest.raises(UpcycleError, match="but they were made from another base"):
        Recorder(recording.folder, dense("llama", seed=1))
    with pytest.raises(UpcycleError, match="must be trained from"):
        check_base(replace(recording, fingerprint="0"), open_expert(experts_of(recording)[0]).base)


def test_every_weight_of_the_base_counts(recording, base, tmp_path):
    """A base with the same feed-forwards, or the same first layer, is another base."""
    own = shutil.copytree(base, tmp_path / "base")
    check_base(recording, open_source(own))
    change_tensor(own, "model.layers.1.self_attn.v_proj.weight")
    with pytest.raises(UpcycleError, match="they were made from another base"):
        check_base(recording, open_source(own))


def test_a_base_is_read_once_until_it_changes(base, tmp_path, monkeypatch):
    own = shutil.copytree(base, tmp_path / "base")
    hashed = []
    monkeypatch.setattr(files, "hash_file", lambda path: hashed.append(path) or hash_file(path))
    assert files.fingerprint(open_source(own)) == files.fingerprint(open_source(own))
    assert hashed == [own / name for name in open_source(own).files]
    before = files.fingerprint(open_source(own))
    change_tensor(own, "model.norm.weight")
    assert files.fingerprint(open_source(own)) != before
    assert len(hashed) == len(open_source(own).files) + 1


def test_checkpoints_out_of_order_are_refused(recording, tmp_path):
    values = json.loads((recording.folder / "index.json").read_text())
    values["checkpoints"].reverse()
    (tmp_path / "index.json").write_text(json.dumps(values))
    with pytest.raises(UpcycleError, match="must be in the order of training, got steps 3, 2, 1"):
        open_recording(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UpcycleError, match=r"index.json is damaged; record the training again"):
        open_recording(tmp_path)
    with pytest.raises(UpcycleError, match=r"holds no index.json; name a folder that a Recorder wrote"):
        open_recording(tmp_path / "nothing")


def test_a_diverged_training_is_not_recorded(base, tmp_path):
    model, recorder = load_dense(base, "cpu"), Recorder(tmp_path / "recording", base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UpcycleError, match=r"up_proj.weight holds NaN or infinite values; the training has"):
        recorder.record(model, step=1, epoch=0.25)
    assert not (tmp_path / "recording" / "index.json").exists()


@pytest.mark.parametrize(
    ("available", "wanted", "steps"),
    [
        (8, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (8, 12, [1, 2, 3, 4, 5, 6, 7, 8]),
        (8, 6, [3, 4, 5, 6, 7, 8]),
        (8, 4, [5, 6, 7, 8]),
        (8, 2, [5, 8]),
        (16, 4, [9, 12, 14, 16]),
        (8, 1, [8]),
    ],
)
def test_checkpoints_are_chosen_from_the_later_half(available, wanted, steps):
    checkpoints = tuple(Recorded(f"{step:04}", step, step / 4, None) for step in range(1, available + 1))
    recording = Recording(None, "base", "", "delta", "float32", None, checkpoints)
    assert [checkpoint.step for checkpoint in select(recording, wanted)] == steps
