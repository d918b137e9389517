"""Small recordings and recipes of UpIT for its tests."""

import json

import torch
from safetensors.torch import load_file, save_file

from upcycle.sources import open_source
from upcycle.upit import Recorder, upit_recipe_from_dict
from upcycle.upit.feed_forward import feed_forward_tensors
from upcycle.upit.models import load_dense


def write_instructions(path, count=24):
    """Three kinds of questions with an answer each; a model learns to tell them apart."""
    kinds = (("abc ", "abcabc"), ("12 ", "1212"), ("x y ", "z z z"))
    lines = []
    for number in range(count):
        prompt, completion = kinds[number % 3]
        values = {"prompt": prompt * (1 + number % 2), "completion": completion * (1 + number % 4 // 2)}
        lines.append(json.dumps(values))
    path.write_text("\n".join(lines) + "\n")
    return path


def small_recipe(base, data, folder, **changes):
    """A recipe of four experts from two checkpoints; sections in `changes` are merged."""
    values = {
        "base": str(base),
        "data": [str(data)],
        "output": str(folder / "out"),
        "work": str(folder / "work"),
        "experts": 4,
        "batch_size": 6,
        "max_length": 64,
        "prepare": {"epochs": 1.0, "every": 0.5, "lr": 1e-3, "rank": 4, "alpha": 8},
        "route": {"seed_fraction": 0.5, "epochs": 2, "lr": 1e-2},
        "post_train": {"epochs": 1, "lr": 3e-3},
    }
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return upit_recipe_from_dict(values)


def change_tensor(folder, name):
    """Add 1 to one tensor of a checkpoint."""
    path = folder / open_source(folder).tensors[name].file
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name] + 1}, path, metadata={"format": "pt"})


def shifted(model, amount, seed):
    """Add noise to every parameter of a model."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))


def record_shifted(folder, base, count, **options):
    """A recording of `count` random walks from the base, and the model after the last."""
    model = load_dense(base, "cpu")
    recorder = Recorder(folder, base, **options)
    recorder.start(model)
    for number in range(1, count + 1):
        shifted(model, 0.02, seed=number)
        recorder.record(model, step=number, epoch=number / 4, loss=1.0 / number)
    return recorder.recording, model


def record_low_rank(folder, base, count, rank=3):
    """The same with random low-rank factors on every feed-forward matrix."""
    from upcycle.upit.low_rank import LowRankModel

    model = load_dense(base, "cpu")
    recorder = Recorder(folder, base, kind="lora")
    for number in range(1, count + 1):
        torch.manual_seed(number)
        factors = {}
        for name in (name for layer in feed_forward_tensors(recorder.base) for name in layer):
            shape = model.get_parameter(name).shape
            if len(shape) == 2:  # biases have no factors
                O, I = shape
                factors[name] = torch.randn(rank, I) * 0.1, torch.randn(O, rank) * 0.1
        adapted = LowRankModel(model, factors, scaling=2.0)
        recorder.start(model)
        recorder.record(model, step=number, epoch=number / 4)
        adapted.remove()
    return recorder.recording


def experts_of(recording):
    return [recording.folder / checkpoint.folder for checkpoint in recording.checkpoints]
