"""Routing vectors: what their loss is, that it goes down, and where the vectors end up."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from upit_runs import experts_of, small_recipe

import upcycle.upit.route
from upcycle.upit.expert import open_expert
from upcycle.upit.feed_forward import router_inputs
from upcycle.upit.fit import collate
from upcycle.upit.models import ExpertInModel, load_dense, load_samples, log_perplexities
from upcycle.upit.route import RoutingVectors, mean_cosine, route


@pytest.fixture(scope="module")
def samples(base, data, tmp_path_factory):
    return load_samples(small_recipe(base, data, tmp_path_factory.mktemp("none"))).samples


def run(recipe, recording, samples, folder):
    rest = load_dense(recording.folder / recording.rest if recording.rest else recording.base, "cpu")
    return route(recipe, experts_of(recording)[:2], rest, samples, folder)


ORIGINAL = {name: getattr(upcycle.upit.route, name) for name in ("log_perplexities", "_train_vectors")}
OPTIONS = [{}, {"freeze_experts": True}, {"negatives": True}, {"freeze_experts": True, "negatives": True}]


@pytest.mark.parametrize("paradigm", ["full", "lora"])
@pytest.mark.parametrize("options", OPTIONS)
def test_vectors_come_to_score_their_own_samples_higher(
    options, paradigm, recording, low_rank_recording, samples, recipe, tmp_path
):
    """U6, and U5 on real perplexities."""
    of = recording if paradigm == "full" else low_rank_recording
    made = replace(recipe(route=options, paradigm=paradigm), experts=2)
    result = run(made, of, samples, tmp_path / "route")
    assert sum(result["bucket_sizes"]) == result["seed_samples"] == 12
    for report, size in zip(result["experts"], result["bucket_sizes"], strict=True):
        assert report["samples"] == size
        assert report["sigmoid_after"] > report["sigmoid_before"]
        assert report["losses"][-1] < report["losses"][0]
    trained = sorted(path.parent.name for path in (tmp_path / "route").glob("*/expert.json"))
    assert trained == ([] if options.get("freeze_experts") else ["expert-00", "expert-01"])


def test_negatives_lower_the_scores_of_other_samples(base, recording, samples, recipe, tmp_path):
    means = {}
    for negatives in (False, True):
        route_settings = {"freeze_experts": True, "negatives": negatives, "epochs": 6}
        made = replace(recipe(route=route_settings), experts=2)
        folder = tmp_path / f"{negatives}"
        run(made, recording, samples, folder)
        model = load_dense(recording.folder / recording.rest, "cpu")
        opened = open_expert(experts_of(recording)[0])
        vectors = load_file(folder / "expert-00" / "vectors.safetensors")["vectors"]
        with ExpertInModel(model, opened):
            scorer = RoutingVectors(model, router_inputs(opened), torch.from_numpy(vectors))
            means[negatives] = upcycle.upit.route._mean_sigmoid(made, model, scorer, samples)
            scorer.remove()
    # without them every score is pushed up
    assert means[False] > 0.6
    assert means[True] < means[False] - 0.05


def test_the_cosine_of_vectors_is_the_mean_over_pairs_and_layers():
    vector_LED = np.array([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [1.0, 1.0], [-2.0, -2.0]]])
    # the pairs' are 1, 0, 0 and 1, -1, -1
    assert mean_cosine(vector_LED) == pytest.approx((1 / 3 - 1 / 3) / 2)
    assert mean_cosine(vector_LED[:1]) == pytest.approx(1 / 3)


def test_the_score_is_the_routers_logit(base, recording, samples):
    """h = n · r with n what the feed-forward reads, padding left out."""
    model = load_dense(base, "cpu")
    expert = open_expert(experts_of(recording)[0])
    batch = collate(samples, range(4), "cpu")
    vector_LD = torch.randn(3, 32)
    read = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    vectors = RoutingVectors(model, router_inputs(expert), vector_LD)
    with torch.no_grad():
        model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL)
    scores = vectors.scores(batch.mask_BL)
    expected = torch.stack([n_BLD @ vector_LD[layer] for layer, n_BLD in enumerate(read)], dim=-1)
    expected = expected[batch.mask_BL.bool()]
    assert (scores - expected).abs().max() < 1e-4
    with torch.no_grad():
        model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL)
    loss = vectors.loss(batch.mask_BL, 1.0).item()
    assert loss == pytest.approx(-expected.sigmoid().log().mean().item(), rel=1e-5)
    vectors.remove()
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if "proj" in name)


def test_perplexity_is_that_of_what_counts(base, samples):
    model = load_dense(base, "cpu")
    found = log_perplexities(model, samples[:5], 2, "cpu", False)
    for sample, value in zip(samples[:5], found, strict=True):
        ids, labels = torch.from_numpy(sample.ids_L), torch.from_numpy(sample.labels_L)
        assert value == pytest.approx(model(input_ids=ids[None], labels=labels[None]).loss.item(), rel=1e-5)


def test_an_expert_in_a_model_is_the_expert(base, recording, low_rank_recording):
    tokens = torch.arange(20)[None]
    model = load_dense(base, "cpu")
    for folder in (*experts_of(low_rank_recording)[:2], *experts_of(recording)[:2]):
        expected = load_dense(folder, "cpu")(tokens).logits
        with ExpertInModel(model, open_expert(folder)) as parameters:
            assert (model(tokens).logits - expected).abs().max() < 1e-4
            assert {id(p) for p in model.parameters() if p.requires_grad} == {
                id(p) for p in parameters.values()
            }


def test_a_stopped_stage_does_no_expert_again(recording, samples, recipe, tmp_path, monkeypatch):
    made = replace(recipe(), experts=2)
    whole = run(made, recording, samples, tmp_path / "whole")
    done = []

    def count(name, function, stop):
        def counted(*arguments):
            done.append(name)
            if len(done) == stop:
                raise KeyboardInterrupt
            return function(*arguments)

        return counted

    for stop in (2, 4, 0):  # in the second expert's perplexities, in the second's training, nowhere
        for name in ("log_perplexities", "_train_vectors"):
            monkeypatch.setattr(upcycle.upit.route, name, count(name, ORIGINAL[name], stop))
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            result = run(made, recording, samples, tmp_path / "stopped")
    # each twice, and once more what was stopped
    assert [done.count(name) for name in ORIGINAL] == [3, 3]
    assert result == whole
    routers = [(tmp_path / name / "routers.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert routers[0] == routers[1]


def test_the_routers_file_stacks_the_trained_vectors(recording, samples, recipe, tmp_path):
    """U8, up to the file that assembly reads."""
    run(replace(recipe(), experts=2), recording, samples, tmp_path)
    routers = load_file(tmp_path / "routers.safetensors")
    assert [*routers] == [f"model.layers.{layer}.mlp.router" for layer in range(3)]
    for expert in range(2):
        vectors = load_file(tmp_path / f"expert-{expert:02}" / "vectors.safetensors")["vectors"]
        for layer, rows in enumerate(routers.values()):
            assert rows.shape == (2, 32)
            assert np.array_equal(rows[expert], vectors[layer])
    assert json.loads((tmp_path / "perplexities.json").read_text())["log_perplexity"]
