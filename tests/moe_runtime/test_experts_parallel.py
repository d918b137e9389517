"""Two processes equal one: transformers' parallel models on our experts, and our own model."""

import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
import two_processes
from moe_families import COMMON
from tiny_models import KINDS, assert_equal_up_to_rounding, tiny_model
from two_processes import (
    DATA,
    EXPERTS_AND_DATA,
    NEWEST_CASES,
    OLDEST_CASES,
    OWN,
    OWN_KINDS,
    OWN_WAYS,
    STEP,
    batch,
    share_of,
    trained,
)

OLDEST = Path(sys.prefix) / "transformers-oldest"
OLDEST_PIN = Path(__file__).resolve().parents[2] / "requirements" / "transformers-oldest.txt"
# float32 sums that two processes add in another order, through two layers and back
BOUND = 5e-5
E, K = COMMON["num_experts"], COMMON["num_experts_per_tok"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the two processes are forks"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    two_processes.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def newest(models, saved):
    return two_processes.run(models, saved)


@pytest.fixture(scope="module")
def oldest(models, tmp_path_factory):
    if not OLDEST.exists():
        pytest.skip(f"{OLDEST} is missing; requirements/install.sh makes it")
    return two_processes.run(models, tmp_path_factory.mktemp("oldest"), OLDEST)


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def in_one_process(model, layout):
    """What `trained` returns in each process, with the gradients of the mean of their losses."""
    alone = []
    for rank in range(2):
        model.zero_grad()
        alone.append(trained(model, share_of(rank, layout)))
    first, second = (process["grads"] for process in alone)
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    return [process | {"grads": mean} for process in alone]


@cache
def eager(path, own_sequences):
    """`in_one_process` of transformers' own loop over experts, and the tokens it generates."""
    model = load(path, experts_implementation="eager")
    generated = model.generate(batch(), max_new_tokens=4, do_sample=False)
    return in_one_process(model, DATA if own_sequences else {}), generated


def assert_same_training(actual, alone):
    for name in ("training_logits", "loss"):
        assert_equal_up_to_rounding(name, actual[name], alone[name], BOUND)
    assert actual["grads"].keys() == alone["grads"].keys()
    for name, grad in alone["grads"].items():
        assert_equal_up_to_rounding(name, actual["grads"][name], grad, BOUND)


def assert_equals_one_process(processes, case, path, layout):
    """Logits with and without gradients, loss, every gradient and greedy tokens; also with our routers."""
    expected, generated = eager(path, "fsdp_size" in layout)
    for process, alone in zip(processes, expected, strict=True):
        seen = process[case]
        assert_same_training(seen, alone)
        assert_same_training(seen["accelerated"], alone)
        assert_equal_up_to_rounding("logits", seen["logits"], alone["training_logits"], BOUND)
        assert ("generated" in seen) == ("fsdp_size" not in layout)
        if "generated" in seen:
            assert torch.equal(seen["generated"], generated)


def layers_of(processes, case):
    """What the experts of each layer were asked for in training: (tokens, experts, choices elsewhere)."""
    calls = list(zip(*(process[case]["training_calls"] for process in processes), strict=True))
    assert len(calls) == COMMON["num_hidden_layers"]
    return calls


class TestModelsOfTransformers:
    @pytest.mark.parametrize("case", NEWEST_CASES)
    def test_equal_one_process(self, case, models, newest):
        model, layout = NEWEST_CASES[case]
        assert_equals_one_process(newest, case, models / model, layout)

    @pytest.mark.parametrize("case", OLDEST_CASES)
    def test_equal_one_process_with_the_oldest_transformers(self, case, models, oldest):
        model, layout = OLDEST_CASES[case]
        assert_equals_one_process(oldest, case, models / model, layout)

    def test_versions_are_the_pinned_ones(self, newest, oldest):
        pinned = re.search(r"transformers==(\S+)", OLDEST_PIN.read_text()).group(1)
        assert newest[0]["version"] == transformers.__version__
        assert oldest[0]["version"] == pinned

    @pytest.mark.parametrize("case", ["olmoe-experts-and-data", "olmoe-experts-and-tensors"])
    def test_processes_exchange_rows_of_their_halves_of_the_experts(self, case, newest):
        """With an all-to-all each row comes to the process that holds its expert, as a choice of its own."""
        T = batch().numel()
        for calls in layers_of(newest, case):
            assert [experts for _, experts, _ in calls] == [E // 2, E // 2]
            assert [elsewhere for *_, elsewhere in calls] == [0, 0]
            assert sum(rows for rows, *_ in calls) == T * K

    @pytest.mark.parametrize(
        ("version", "case"), [("newest", "olmoe-all-reduce"), ("oldest", "olmoe-experts")]
    )
    def test_processes_mark_choices_of_experts_elsewhere(self, version, case, request):
        """With an all-reduce both see every token, and every choice is elsewhere for one of them."""
        T = batch().numel()
        for calls in layers_of(request.getfixturevalue(version), case):
            assert [tokens_experts for *tokens_experts, _ in calls] == [[T, E // 2]] * 2
            assert sum(elsewhere for *_, elsewhere in calls) == T * K
            assert all(0 < elsewhere < T * K for *_, elsewhere in calls)

    def test_processes_without_a_row_take_part(self, newest):
        """An all-to-all that brings nothing leaves a row of zeros; otherwise all choices are elsewhere."""
        T = batch().numel()
        for _, second in layers_of(newest, "lopsided-all-reduce"):
            assert second == (T, E // 2, T * K)
        for case in ("lopsided-experts-and-data", "lopsided-experts-and-tensors"):
            for _, second in layers_of(newest, case):
                assert second == (1, E // 2, 0), case

    @pytest.mark.parametrize(
        "case", [case for case in NEWEST_CASES if NEWEST_CASES[case][1] == EXPERTS_AND_DATA]
    )
    def test_saved_after_a_step_are_the_model_of_one_process(self, case, models, saved, newest):
        """Loaded with transformers' default experts."""
        model = load(models / NEWEST_CASES[case][0], experts_implementation="eager")
        (alone, _), _ = eager(models / NEWEST_CASES[case][0], own_sequences=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= STEP * alone["grads"][name]
            expected = model(batch()).logits
            assert (expected[:1] - alone["training_logits"]).abs().max() > 1e-2
            actual = load(saved / f"{case}-saved")(batch()).logits
        assert_equal_up_to_rounding("logits", actual, expected, BOUND)


@pytest.mark.parametrize("way", OWN_WAYS)
@pytest.mark.parametrize("kind", OWN_KINDS)
def test_own_model_equals_one_process(kind, way, newest):
    """Auxiliary losses included, which each process takes over its own sequence."""
    for process, alone in zip(newest, in_one_process(tiny_model(KINDS[kind], **OWN), DATA), strict=True):
        assert_same_training(process[f"{kind}-{way}"], alone)
