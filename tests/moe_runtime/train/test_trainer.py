"""One update: accumulated micro-batches give what one batch gives."""

import dataclasses

import pytest
from tiny_models import assert_equal_up_to_rounding
from training_runs import a_recipe, nats_per_label

from moe_runtime.hf.loading import load_causal_lm
from moe_runtime.train import run as run_module
from moe_runtime.train.model import prepare_model
from moe_runtime.train.run import run_training

pytestmark = pytest.mark.usefixtures("one_thread")

# one step of gradient descent with rate 1: the weights move by minus the gradient
ONE_STEP = {"steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0}
# gradients are differences of weights a thousand times as large
DIFFERENCE = 1e-10


@pytest.fixture
def _in_float64(monkeypatch):
    def prepare(recipe, checkpoint):
        prepared = prepare_model(recipe, checkpoint)
        return dataclasses.replace(prepared, model=prepared.model.double())

    monkeypatch.setattr(run_module, "prepare_model", prepare)


def one_step(model, file, folder, over, cut, /, packing=False, **moe):
    """What one update took off every weight, and the result of the run."""
    batch_size, accumulate = cut
    recipe = a_recipe(
        model,
        file,
        folder / f"{over}-{batch_size}-{accumulate}",
        train=ONE_STEP | {"batch_size": batch_size, "accumulate": accumulate},
        moe={"balance_loss": 0.5, "z_loss": 0.1, "balance_over": over} | moe,
        data={"packing": packing},
    )
    result = run_training(recipe)
    before, after = (load_causal_lm(where).state_dict() for where in (model, recipe.output))
    return {name: before[name].to(value) - value for name, value in after.items()}, result


@pytest.mark.parametrize(
    ("kind", "over", "packing"),
    [
        ("ours", "sequence", False),
        ("ours", "sequence", True),
        ("ours", "global_batch", False),
        ("mixtral", "sequence", False),
        ("mixtral", "global_batch", True),
    ],
)
@pytest.mark.usefixtures("_in_float64")
def test_micro_batches_give_the_gradients_of_one_batch(kind, over, packing, models, data, tmp_path):
    expected, whole = one_step(models[kind], data, tmp_path, over, (6, 1), packing)
    actual, cut = one_step(models[kind], data, tmp_path, over, (2, 3), packing)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_equal_up_to_rounding(name, actual[name], value, DIFFERENCE)
    for name in ("loss", "lm_loss", "balance_loss", "z_loss", "grad_norm"):
        assert cut.values(name) == pytest.approx(whole.values(name), rel=1e-6), name


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_the_loss_of_the_language_model_is_the_mean_over_the_labels_of_all_micro_batches(
    kind, models, data, tmp_path
):
    train = {"steps": 1, "batch_size": 9, "accumulate": 3}  # of 24 rows
    recipe = a_recipe(models[kind], data, tmp_path / "out", train=train, moe={"balance_loss": 0.5})
    (loss,) = run_training(recipe).values("lm_loss")
    assert loss == pytest.approx(nats_per_label(models[kind], recipe), rel=1e-5)


def test_the_balance_of_single_micro_batches_is_another_loss(models, data, tmp_path):
    _, whole = one_step(models["ours"], data, tmp_path, "micro_batch", (6, 1))
    _, cut = one_step(models["ours"], data, tmp_path, "micro_batch", (2, 3))
    assert cut.values("lm_loss") == pytest.approx(whole.values("lm_loss"), rel=1e-5)
    assert abs(cut.values("balance_loss")[0] - whole.values("balance_loss")[0]) > 1e-3


def test_the_counts_of_the_whole_batch_see_the_same_dropout(models, data, tmp_path):
    """The only micro-batch is the whole batch; dropout in the first layer decides routes in the second."""
    _, one = one_step(models["ours"], data, tmp_path, "micro_batch", (6, 1), expert_dropout=0.5)
    _, counted = one_step(models["ours"], data, tmp_path, "global_batch", (6, 1), expert_dropout=0.5)
    for name in ("loss", "balance_loss", "grad_norm"):
        assert counted.values(name) == one.values(name), name
