"""The training loop: points, rates, and trainings that go on where they stopped."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import upcycle.upit.fit
from moe_runtime.train.data.samples import Sample
from upcycle.errors import UpcycleError
from upcycle.upit.fit import Training, collate, fit, last_state


def samples(count):
    made = []
    for number in range(count):
        ids = np.arange(number, number + 2 + number % 3, dtype=np.int64)
        made.append(Sample(ids, np.where(ids % 2, ids, -100)))
    return made


def training(**changes):
    values = {"epochs": 3.0, "batch_size": 4, "warmup": 0.25, "seed": 1, "label": "test", "every": 0.5}
    return Training(**{**values, **changes})


class Line(nn.Module):
    """A model that dropout makes random."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)

    def loss(self, batch, step):
        x = nn.functional.dropout(batch.ids_BL.float()[..., None], 0.3, training=True)
        return (self.layer(x) - 2 * batch.ids_BL[..., None]).abs().mean()


def run(model, **options):
    groups = [(0.1, dict(model.layer.named_parameters()))]
    return fit(model.loss, groups, samples(16), training(), **options)


@pytest.mark.parametrize("seconds", [0.0, 300.0])
def test_a_stopped_training_ends_with_the_same_bits(seconds, tmp_path, monkeypatch):
    """From its last state, or where none was due, from the beginning."""
    monkeypatch.setattr(upcycle.upit.fit, "STATE_SECONDS", seconds)
    whole, stopped = Line(), Line()
    points, again = [], []
    run(whole, at_point=lambda *point: points.append(point))
    steps = [(2, 0.5), (4, 1.0), (6, 1.5), (8, 2.0), (10, 2.5), (12, 3.0)]
    assert [point[:2] for point in points] == steps

    def stop(step, epoch, loss):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopped, states=tmp_path, at_point=stop)
    assert last_state(tmp_path) == (6 if seconds == 0.0 else 0)
    assert len([*tmp_path.iterdir()]) == (1 if seconds == 0.0 else 0)
    resumed = Line()
    run(resumed, states=tmp_path, at_point=lambda *point: again.append(point))
    assert again == points[3 if seconds == 0.0 else 0 :]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert torch.equal(resumed.layer.bias, whole.layer.bias)


def test_every_step_draws_anew():
    masks = []

    def loss_of(batch, step):
        masks.append(tuple(torch.rand(4).tolist()))
        return model.loss(batch, step)

    model = Line()
    fit(loss_of, [(0.1, dict(model.layer.named_parameters()))], samples(16), training())
    assert len(set(masks)) == 12


def test_the_callers_random_numbers_stay():
    model = Line()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(model)
    assert torch.equal(torch.rand(3), expected)


def test_rates_rise_then_follow_a_cosine(monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *arguments):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run(Line())
    warm = [0.1 / 3, 0.2 / 3, 0.1]
    cosine = [0.05 * (1 + math.cos(math.pi * done / 10)) for done in range(1, 10)]
    assert seen == pytest.approx(warm + cosine)


def test_batches_are_padded_on_the_right():
    batch = collate(samples(3), [0, 2], "cpu")
    assert batch.ids_BL.tolist() == [[0, 1, 0, 0], [2, 3, 4, 5]]
    assert batch.mask_BL.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels_BL.tolist() == [[-100, 1, -100, -100], [-100, 3, -100, 5]]


def test_points_closer_than_a_step_are_refused():
    sentence = r"but 0.5 of an epoch of 1 steps \(3 samples in batches of 4\) is less"
    with pytest.raises(UpcycleError, match=sentence):
        training().points(3)


def test_a_loss_that_is_not_finite_is_told(tmp_path: Path):
    model = Line()
    with torch.no_grad():
        model.layer.bias.fill_(torch.inf)
    with pytest.raises(UpcycleError, match="test: the loss is not finite after step 2; take a lower"):
        run(model, states=tmp_path)
    assert last_state(tmp_path) == 0
