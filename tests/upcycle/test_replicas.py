"""Which experts of a mixture are copied: from gradients known by hand, of real models, and by the command."""

import json

import pytest
import torch
import yaml
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from dense_models import tensors_of
from moe_families import tiny_family
from tiny_models import DENSE, MOE, tiny_model, tokens

from moe_runtime.cli import main
from upcycle import UpcycleError
from upcycle.replicas import gradient_norms, replica_counts


@pytest.mark.parametrize(
    ("norms", "num_experts", "most", "counts"),
    [
        ([5.0, 1.0, 1.0], 3, 3, (1, 1, 1)),
        ([5.0, 1.0, 1.0], 4, 3, (2, 1, 1)),
        ([5.0, 1.0, 1.0], 5, 3, (3, 1, 1)),  # 5 / 2 is still the largest
        ([5.0, 1.0, 2.0], 6, 3, (3, 1, 2)),  # as 3 is the bound
        ([5.0, 3.0, 1.0], 6, 4, (3, 2, 1)),  # 5, 3, 5 / 2
        ([1.0, 1.0], 3, 3, (2, 1)),  # a tie goes to the lowest
        ([0.0, 0.0], 4, 2, (2, 2)),
    ],
)
def test_copies_go_where_gradients_are_largest(norms, num_experts, most, counts):
    assert replica_counts(norms, num_experts, most) == counts


def test_what_cannot_be_counted_is_named():
    for num_experts in (1, 7):
        with pytest.raises(UpcycleError, match=rf"experts must be from 2 to 6, .* got {num_experts}"):
            replica_counts([1.0, 2.0], num_experts)
    with pytest.raises(UpcycleError, match="gradients of the experts must be finite"):
        replica_counts([1.0, float("nan")], 3)


def models():
    ours = tiny_model(MOE, moe_layers=(1,), moe_intermediate_size=16)
    return {"ours": ours.eval(), "olmoe": tiny_family("olmoe", "grouped_mm").eval()}


@pytest.mark.parametrize("name", ["ours", "olmoe"])
def test_norms_are_those_of_plain_backward_passes(name):
    model = models()[name]
    batches = [tokens(2, 9, seed=seed) for seed in range(3)]
    found = gradient_norms(model, batches)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    model.requires_grad_(True)
    expected = {number: 0.0 for number in found}
    for ids in batches:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for number in found:
            experts = model.model.layers[number].mlp.experts
            expected[number] += sum(p.grad.flatten(1).square().sum(1) for p in experts.parameters())
    assert list(found) == ([1] if name == "ours" else [0, 1])
    for number, norms in found.items():
        torch.testing.assert_close(torch.tensor(norms), expected[number], rtol=1e-4, atol=0)
        assert len(set(norms)) > 1


def test_a_dense_model_has_no_experts():
    with pytest.raises(ValueError, match="model must have experts with a router"):
        gradient_norms(tiny_model(DENSE), [])


@pytest.fixture
def mixture(tmp_path):
    """A checkpoint folder with a tokenizer, and a text."""
    folder = tmp_path / "mixture"
    model = tiny_family("mixtral", vocab_size=VOCAB_SIZE, num_experts=3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("A mixture of experts learns where its gradients are. " * 30, encoding="utf-8")
    return folder, text


def test_the_command_prints_the_section_of_a_recipe_that_runs(mixture, run, capsys):
    folder, text = mixture
    capsys.readouterr()
    words = ["replicas", str(folder), "--text", str(text), "--experts", "5", "--max-tokens", "600"]
    assert main(words) == 0
    section = yaml.safe_load(capsys.readouterr().out)["replicate"]
    assert [sum(of_layer) for of_layer in section["counts"]] == [5, 5]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == section

    section["counts"] = [[2, 1, 2], [1, 3, 1]]  # another choice in each layer
    grown = run("grown", method="replicate", base=folder, target="mixtral", replicate=section)
    before, after = tensors_of(folder), tensors_of(grown)
    for layer, made_from in enumerate([[0, 0, 1, 2, 2], [0, 1, 1, 1, 2]]):
        prefix = next(name for name in before if f"layers.{layer}." in name and ".experts." in name)
        prefix = prefix[: prefix.index("experts.")]
        for expert, original in enumerate(made_from):
            assert torch.equal(
                after[f"{prefix}experts.{expert}.w2.weight"], before[f"{prefix}experts.{original}.w2.weight"]
            )
        router = after[f"{prefix}gate.weight"] - before[f"{prefix}gate.weight"][made_from]
        added = [e > 0 and made_from[e] == made_from[e - 1] for e in range(5)]
        assert (router != 0).any(1).tolist() == added


def test_bad_input_is_named(mixture, capsys, tmp_path):
    folder, text = mixture
    for words, sentence in (
        (["--experts", "10"], "experts must be from 3 to 9"),
        (["--experts", "5", "--most", "0"], "--most must be at least 1, got 0"),
        (["--experts", "5", "--text", str(tmp_path / "none.txt")], "none.txt"),
    ):
        assert main(["replicas", str(folder), "--text", str(text), *words]) == 2
        assert sentence in capsys.readouterr().err


def test_counts_of_layers_must_fit_the_mixture(mixture, run):
    folder, _ = mixture
    for counts, sentence in (
        ([[1, 1, 2]], "one list for each of the 2 layers with experts, got 1"),
        ([[1, 1, 2], [2, 2, 1]], "as many experts in every layer, got from 4 to 5"),
        ([[1, 1, 2], [2, 2]], "one number for each of the 3 experts, got 2"),
        ([[1, 1, 2], 2], "must be numbers or one list per layer, got both"),
        ([[], []], "must be a number or one number per expert, got none"),
    ):
        with pytest.raises(UpcycleError, match=sentence):
            run("out", method="replicate", base=folder, target="mixtral", replicate={"counts": counts})
