"""One update: accumulated micro-batches against one batch, what is frozen, biases, and what the log says."""

import pytest
from training_runs import a_recipe

from moe_runtime.hf.loading import load_causal_lm
from moe_runtime.train.run import run_training

pytestmark = pytest.mark.usefixtures("one_thread")

# one step of gradient descent with rate 1: the weights move by minus the gradient
ONE_STEP = {
    "steps": 1,
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0,
    "weight_decay": 0,
}
AUXILIARY = {"balance_loss": 0.5, "z_loss": 0.1}


def gradients(model, data, output, /, **changes):
    """What one update takes off every weight, and the result of the run."""
    recipe = a_recipe(model, data, output, **changes)
    result = run_training(recipe)
    before, after = (load_causal_lm(folder).state_dict() for folder in (model, output))
    return {name: before[name] - value for name, value in after.items()}, result


def one_step(models, data, folder, kind, over, cut, /, **changes):
    batch_size, accumulate = cut
    train = ONE_STEP | {"batch_size": batch_size, "accumulate": accumulate} | changes.pop("train", {})
    output = folder / f"{kind}-{over}-{batch_size}-{accumulate}"
    moe = AUXILIARY | {"balance_over": over} | changes.pop("moe", {})
    return gradients(models[kind], data, output, train=train, moe=moe, **changes)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("over", ["sequence", "global_batch"])
@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_micro_batches_give_the_gradients_of_one_batch(kind, over, packing, models, data, tmp_path):
    form = {"data": {"packing": packing}}
    expected, whole = one_step(models, data, tmp_path, kind, over, (6, 1), **form)
    actual, cut = one_step(models, data, tmp_path, kind, over, (2, 3), **form)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # float32 weights of size 1 minus small gradients: rounding of the difference, not of the gradient
        assert (actual[name] - value).abs().max() < 2e-6, name
        assert value.abs().max() > 1e-4 or "selection_bias" in name, name
    for name in ("loss", "lm_loss", "balance_loss", "z_loss", "grad_norm"):
        assert cut.values(name) == pytest.approx(whole.values(name), rel=2e-5), name


def test_the_balance_of_single_micro_batches_is_another_loss(models, data, tmp_path):
    _, whole = one_step(models, data, tmp_path, "ours", "micro_batch", (6, 1))
    _, cut = one_step(models, data, tmp_path, "ours", "micro_batch", (2, 3))
    assert cut.values("lm_loss") == pytest.approx(whole.values("lm_loss"), rel=1e-5)
    assert abs(cut.values("balance_loss")[0] - whole.values("balance_loss")[0]) > 1e-3
