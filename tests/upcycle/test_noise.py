"""Copies with noise: how much, where, and the same in every format."""

import pytest
import torch
from dense_models import tensors_of

from upcycle import verify

UP = "model.layers.0.mlp.up_proj.weight"


def ups(folder):
    """[E, F, D]: the up projections of layer 0 of a Mixtral."""
    names = (f"model.layers.0.block_sparse_moe.experts.{expert}.w3.weight" for expert in range(3))
    return torch.stack([tensors_of(folder)[name] for name in names])


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_noise_has_its_deviation_on_its_share_of_the_weights(share, dense, run):
    source = dense("llama", intermediate_size=512, num_hidden_layers=1)
    folder = run(
        method="noise", base=source, experts=3, noise={"std": 0.02, "share": share}, target="mixtral"
    )
    noise_EFD = ups(folder) - tensors_of(source)[UP]
    count = noise_EFD[0].numel()
    for expert in range(3):
        changed = noise_EFD[expert] != 0
        assert abs(changed.float().mean() - share) <= 4 * (share * (1 - share) / count) ** 0.5 + 1e-3
        added = noise_EFD[expert][changed]
        assert abs(added.mean()) < 4 * 0.02 / added.numel() ** 0.5
        assert abs(added.std() / 0.02 - 1) < 4 / (2 * added.numel()) ** 0.5
    assert not torch.equal(noise_EFD[0], noise_EFD[1])
    assert verify(folder).not_equal_because == ("noise of std 0.02 is added to the experts",)


def test_layers_get_noise_of_their_own(dense, run):
    folder = run(method="noise", base=dense("llama"), experts=2, noise={"std": 0.02})
    noise = [
        tensors_of(folder)[f"model.layers.{layer}.mlp.experts.down_proj"][0]
        - tensors_of(dense("llama"))[f"model.layers.{layer}.mlp.down_proj.weight"]
        for layer in range(2)
    ]
    assert (noise[0] - noise[1]).abs().max() > 0.01


def test_formats_get_the_same_noise_and_none_is_a_copy(dense, run):
    values = {"method": "noise", "base": dense("llama"), "experts": 3, "noise": {"std": 0.1}}
    ours = tensors_of(run("ours", **values))["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(ours[:, 48:], ups(run("theirs", target="mixtral", **values)))
    values["noise"] = {"std": 0}
    still = run("still", **values)
    assert verify(still).must_be_equal
    assert torch.equal(
        tensors_of(still)["model.layers.0.mlp.experts.down_proj"][2],
        tensors_of(dense("llama"))["model.layers.0.mlp.down_proj.weight"],
    )
