"""Own parallelism: several processes train as one does, and go on with each other's checkpoints."""

import copy
import sys
from functools import cache
from pathlib import Path

import parallel_runs
import pytest
import torch
import transformers
from parallel_runs import (
    AUXILIARY,
    DTYPES,
    EXCHANGES,
    FAMILIES,
    HALF_WAY,
    MAX_NORM,
    MODELS,
    RECIPES,
    STEPS,
    TRAINED,
    backward,
    exchange_rows,
    family,
    groups_of,
    make_optimizer,
    make_scheduler,
    rows,
    train,
)
from tiny_models import MOE, assert_equal_up_to_rounding, tiny_model

from moe_runtime.distributed.checkpoint import load_model
from moe_runtime.distributed.mesh import start
from moe_runtime.distributed.recipe import ParallelRecipe
from moe_runtime.errors import RunError

# float32 sums that several processes add in another order, through two layers and back
BOUND = 5e-5
LOSSES = 1e-5  # of 20 steps
BFLOAT16 = 2**-8  # distance of 1 from the next number
OLDEST = Path(sys.prefix) / "transformers-oldest"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the processes are forks"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def seen(folder):
    return parallel_runs.run(folder, ("two", "one", "two-again", "four", "families"))


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    if not OLDEST.exists():
        pytest.skip(f"{OLDEST} is missing; requirements/install.sh makes it")
    return parallel_runs.run(tmp_path_factory.mktemp("oldest"), ("families",), OLDEST)


def clipped(model):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)


@cache
def alone(name, experts=AUXILIARY["num_experts"]):
    """Gradients, losses and norms of one process that has all rows."""
    if name in FAMILIES:
        model = family(name)
    else:
        model = tiny_model(MOE, **AUXILIARY | {"num_experts": experts}) if name == "own" else MODELS[name]()
    model.train()
    backward(model, rows(0))
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    losses, norms = train(model, make_optimizer(groups_of(model)), clipped, range(STEPS))
    return grads, losses, norms


@cache
def scheduled_alone():
    model = MODELS["own"]().train()
    optimizer = make_optimizer(groups_of(model))
    scheduler = make_scheduler(optimizer)
    losses, weights = [], {}
    for step in range(STEPS):
        if step == HALF_WAY:
            weights = copy.deepcopy(dict(model.named_parameters()))
        losses += train(model, optimizer, clipped, [step])[0]
        scheduler.step()
    return losses, weights


def assert_same_training(processes, case, expected):
    grads, losses, norms = expected
    steps = len(processes[0][case]["losses"])
    for process in processes:
        assert process[case]["losses"] == pytest.approx(losses[:steps], rel=LOSSES)
        assert process[case]["norms"] == pytest.approx(norms[:steps], rel=1e-4)
    actual = processes[0][case]["grads"]
    assert grads.keys() <= actual.keys()  # buffers are among the tensors
    for name, grad in grads.items():
        assert_equal_up_to_rounding(name, actual[name], grad, BOUND)
    assert max(norms) > MAX_NORM


class TestExchange:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", EXCHANGES)
    def test_rows_pass_their_expert_and_come_back(self, name, dtype, seen):
        for rank, process in enumerate(seen["two"]):
            expert_N = torch.tensor(EXCHANGES[name][rank], dtype=torch.int64)
            x_ND = exchange_rows(name, rank).to(dtype)
            factor_N1 = (expert_N + 1).to(dtype)[:, None]
            result = process[name, dtype]
            assert torch.equal(result["rows"], x_ND * factor_N1)
            assert torch.equal(result["grad"], factor_N1.expand_as(x_ND))

    def test_rows_come_to_the_process_of_their_expert(self, seen):
        for name, by_rank in EXCHANGES.items():
            expert_N = sum(by_rank, ())
            for rank, process in enumerate(seen["two"]):
                result = process[name, torch.float32]
                assert result["received"] == sum(expert // 2 == rank for expert in expert_N)
                assert sum(result["sent"]) == len(by_rank[rank])


@pytest.mark.parametrize(("model", "recipe"), TRAINED)
def test_two_processes_train_as_one(model, recipe, seen):
    """Up to twenty steps of AdamW with two learning rates, clipped, auxiliary losses included."""
    assert_same_training(seen["two"], f"{model}-{recipe}", alone(model))


@pytest.mark.parametrize("version", ["newest", "oldest"])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_transformers_train_as_in_one_process(name, version, request):
    """With experts by two processes and everything else in parts."""
    if version == "newest":
        processes = request.getfixturevalue("seen")["families"]
        assert processes[0]["version"] == transformers.__version__
    else:
        processes = request.getfixturevalue("oldest")["families"]
        assert processes[0]["version"].startswith("5.17.")
    assert_same_training(processes, name, alone(name))


def test_gradients_of_copies_are_summed_over_processes_once(seen):
    for process in seen["two"]:
        assert process["summed-later"]["kept"]
    for name, grad in alone("own")[0].items():
        # of sums over two rows in the place of means over four
        assert_equal_up_to_rounding(name, seen["two"][0]["summed-later"]["grads"][name], 2 * grad, BOUND)


def test_autocast_is_that_of_one_process(seen):
    with torch.autocast("cpu", torch.bfloat16):
        model = MODELS["own"]().train()
        losses, _ = train(model, make_optimizer(groups_of(model)), clipped, range(3))
    actual = seen["two"][0]["autocast"]["losses"]
    assert actual == pytest.approx(losses, rel=BFLOAT16)
    assert actual != pytest.approx(alone("own")[1][:3], rel=LOSSES)


@pytest.mark.parametrize("experts", [6, 8])
@pytest.mark.parametrize("recipe", ["experts", "experts-and-fsdp"])
def test_four_processes_of_which_two_hold_the_same_experts_train_as_one(recipe, experts, seen):
    assert_same_training(seen["four"], f"{recipe}-{experts}", alone("own", experts))


def test_each_process_holds_its_part(seen):
    total = sum(parameter.numel() for parameter in MODELS["own"]().parameters())
    held = {recipe: [process[f"own-{recipe}"]["held"] for process in seen["two"]] for recipe in RECIPES}
    experts = sum(p.numel() for name, p in MODELS["own"]().named_parameters() if ".experts." in name)
    assert held["ddp"] == [total, total]
    assert held["experts"] == [total - experts // 2] * 2
    for recipe in ("fsdp", "experts-and-fsdp"):
        assert sum(held[recipe]) == total
        assert max(held[recipe]) < 0.52 * total
    # three experts in two processes: no process holds two of them
    held_by_four = [process["experts-and-fsdp-6"]["held"] for process in seen["four"]]
    assert sum(held_by_four) == total
    assert max(held_by_four) < 0.27 * total


class TestCheckpoints:
    def test_run_that_saves_is_the_run_of_one_process(self, seen):
        losses, _ = scheduled_alone()
        for world in ("two", "one"):
            assert seen[world][0]["straight"]["losses"] == pytest.approx(losses, rel=LOSSES)

    @pytest.mark.parametrize(("writer", "reader"), [("two", "one"), ("one", "two-again")])
    def test_goes_on_with_another_number_of_processes(self, writer, reader, seen):
        written = seen[writer][0]["straight"]
        for process in seen[reader]:
            assert process["resumed"]["losses"] == pytest.approx(written["losses"][HALF_WAY:], rel=LOSSES)
        read = seen[reader][0]["resumed"]["weights"]
        assert written["weights"].keys() == read.keys()
        for name, weight in written["weights"].items():
            assert torch.equal(read[name], weight), name

    def test_goes_on_with_the_same_bits_and_random_numbers(self, seen):
        for straight, resumed in zip(seen["two"], seen["two-again"], strict=True):
            assert resumed["dropout"]["losses"] == straight["dropout"]["losses"][HALF_WAY:]
        assert seen["two"][0]["dropout"]["losses"] != seen["two"][0]["straight"]["losses"]

    @pytest.mark.parametrize("writer", ["of-two", "of-four"])
    def test_is_read_without_processes(self, writer, seen, folder):
        """Four processes hold rows of experts; what they read from two they write again."""
        model = tiny_model(MOE, seed=1, **AUXILIARY)
        load_model(folder / writer, model)
        weights = seen["two"][0]["straight"]["weights"]
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name]), name

    def test_of_another_model_is_refused(self, seen, folder, tmp_path):
        with pytest.raises(RunError, match=r"must hold this model, and holds another: see model\.layers\.0"):
            load_model(folder / "of-two", tiny_model(MOE))
        with pytest.raises(RunError, match="must be a checkpoint of several processes, and holds none"):
            load_model(tmp_path, tiny_model(MOE))

    def test_of_one_process_may_be_refused(self, seen):
        assert seen["two"][0]["factored-whole"] == (
            "train.optimizer must keep numbers, and tensors in the shape of a parameter, on several "
            "processes, got one that keeps exp_avg_sq_row of model.embed_tokens.weight in the shape (3,)"
        )

    def test_is_whole_or_not_there(self, seen, folder):
        assert seen["two"][0]["factored"] == (
            "train.optimizer must keep numbers, and tensors in the shape of a parameter, on several "
            "processes, got SGD, which keeps exp_avg_sq_row of lm_head.weight"
        )
        assert not (folder / "factored").exists()
        assert not (folder / "of-two" / "old").exists()
        assert not (folder / ".of-two.incomplete").exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("recipe", "processes", "message"),
        [
            (ParallelRecipe(), "2", "parallel.data must be 'ddp' or 'fsdp' with 2 processes, got 'none'"),
            (
                ParallelRecipe(data="fsdp", experts=2),
                "3",
                "parallel.experts must divide the number of processes, which is 3, got 2",
            ),
            (
                ParallelRecipe(data="ddp"),
                None,
                "parallel.data must be 'none' in a process that torchrun did not start, got 'ddp'",
            ),
        ],
        ids=["none", "experts", "no-torchrun"],
    )
    def test_number_of_processes(self, recipe, processes, message, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if processes is not None:
            monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(RunError, match=message):
            start(recipe)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"data": "zero"}, "^parallel.data must be one of 'none', 'ddp', 'fsdp', got 'zero'"),
            ({"data": "fsdp", "experts": 0}, "^parallel.experts must be at least 1, got 0"),
            (
                {"experts": 2},
                "^parallel.data must be 'ddp' or 'fsdp' with parallel.experts above 1.*got 'none' with",
            ),
        ],
        ids=["data", "experts", "both"],
    )
    def test_recipe(self, values, message):
        with pytest.raises(ValueError, match=message):
            ParallelRecipe(**values)

    def test_models_that_cannot_be_cut(self, seen):
        messages = seen["two"][0]["refused"]
        assert messages["indivisible"] == (
            "parallel.experts must divide the number of experts, which is 5 in model.layers.0.mlp.experts, "
            "got 2"
        )
        assert messages["dense"] == "parallel.experts must be 1 for a model without experts, got 2"
