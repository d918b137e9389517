"""Granular upcycling: parts of a feed-forward that are chosen together add up to it."""

import json

import pytest
import torch
from dense_models import tensors_of
from transformers import AutoModelForCausalLM

from moe_runtime.hf.loading import load_causal_lm
from upcycle import UpcycleError, verify

MLP = "model.layers.1.mlp"


def granular(experts=8, **values):
    return {"method": "granular", "experts": experts, "granular": {"shards": 4, **values}}


EXACT = [
    pytest.param(
        "llama",
        {"target": "mixtral", "experts": 16},
        {"shuffle": True},
        id="mixtral-shuffled",
    ),
    pytest.param("qwen2", {"target": "qwen2_moe", "layers": {"moe_every": 2}}, {}, id="qwen2-moe"),
    pytest.param("qwen3", {"target": "qwen3_moe", "dtype": "bfloat16"}, {}, id="qwen3-moe-16-bits"),
    pytest.param("llama", {"router": {"gate": "raw"}, "experts_per_token": 8}, {}, id="raw-over-all"),
    pytest.param("granite", {"target": "granitemoe"}, {}, id="granitemoe-stacked"),
    pytest.param(
        "phi", {"router": {"init": "orthogonal", "score": "sigmoid"}}, {}, id="not-gated-orthogonal-sigmoid"
    ),
]


@pytest.mark.parametrize(("family", "recipe", "section"), EXACT)
def test_logits_equal_the_dense_models(family, recipe, section, dense, run):
    """G1."""
    folder = run(base=dense(family), **{**granular(**section), **recipe})
    result = verify(folder)
    assert result.must_be_equal
    assert result.passed


def test_a_factor_that_16_bits_round_is_a_reason_for_differences(dense, run):
    values = {"method": "granular", "base": dense("llama"), "experts": 6, "granular": {"shards": 3}}
    result = verify(run("rounded", **values, dtype="bfloat16"))
    assert result.not_equal_because == ("weights scaled by 3 round in BF16",)
    assert result.max_abs_diff > 1e-4
    assert verify(run("exact", **values)).must_be_equal


def test_biases_of_the_output_are_whole_in_every_shard(dense, run):
    """G1 with biases."""
    assert verify(run(base=dense("llama", mlp_bias=True), **granular())).passed


@pytest.mark.parametrize("copies", [1, 2])
def test_every_token_gets_every_shard_equally_often(copies, dense, run):
    """G2."""
    folder = run(base=dense("llama"), **granular(experts=12), experts_per_token=4 * copies)
    x_TD = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    expert_TK = load_causal_lm(folder).model.layers[1].mlp.router(x_TD).expert_TK.long()
    count_TG = torch.nn.functional.one_hot(expert_TK % 4, 4).sum(1)
    assert (count_TG == copies).all()
    assert (expert_TK // 4).unique().numel() == 3


@pytest.mark.parametrize(
    ("mode", "raw", "factors"),
    [
        ("none", False, (1, 1, 1)),
        ("exact", False, (1, 1, 4)),
        ("exact", True, (1, 1, 8)),  # E · G / K
        ("cuberoot", False, (4 ** (1 / 3),) * 3),
    ],
)
def test_shards_are_scaled_as_the_mode_says(mode, raw, factors, dense, run):
    """G3: what the cube root leaves is reported, not asserted to be nothing."""
    router = {"gate": "raw" if raw else "renorm"}
    folder = run(base=dense("llama"), **granular(scale_mode=mode), router=router)
    before, after = tensors_of(dense("llama")), tensors_of(folder)
    for expert in range(8):
        rows = slice(12 * (expert % 4), 12 * (expert % 4) + 12)
        gate, up = after[f"{MLP}.experts.gate_up_proj"][expert].split(12)
        down = after[f"{MLP}.experts.down_proj"][expert]
        dense_parts = (
            before[f"{MLP}.gate_proj.weight"][rows],
            before[f"{MLP}.up_proj.weight"][rows],
            before[f"{MLP}.down_proj.weight"][:, rows],
        )
        for part, dense_part, factor in zip((gate, up, down), dense_parts, factors, strict=True):
            assert torch.equal(part, dense_part * torch.tensor(factor, dtype=torch.float32))
    if mode == "cuberoot":
        result = verify(folder)
        assert result.not_equal_because == ("granular.scale_mode 'cuberoot' is not exact",)
        assert result.max_abs_diff > 1e-2
        assert result.passed
    recorded = json.loads((folder / "upcycle.json").read_text())["scaled"]
    assert recorded.get("model.layers.*.mlp.experts.down_proj", 1) == factors[2]


def test_formats_hold_the_same_experts_and_transformers_saves_what_it_loaded(dense, run, tmp_path):
    """G4: stacked in our format and in memory, one by one in the file of a Mixtral."""
    ours = tensors_of(run("ours", base=dense("llama"), **granular()))
    folder = run("theirs", base=dense("llama"), target="mixtral", **granular())
    theirs = tensors_of(folder)
    for expert in range(8):
        moe = f"model.layers.1.block_sparse_moe.experts.{expert}"
        stacked = torch.cat([theirs[f"{moe}.w1.weight"], theirs[f"{moe}.w3.weight"]])
        assert torch.equal(ours[f"{MLP}.experts.gate_up_proj"][expert], stacked)
        assert torch.equal(ours[f"{MLP}.experts.down_proj"][expert], theirs[f"{moe}.w2.weight"])
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_rows_of_the_router_repeat_within_a_copy_only(dense, run):
    folder = run(base=dense("llama"), **granular(experts=12), target="mixtral")
    router_ED = tensors_of(folder)["model.layers.0.block_sparse_moe.gate.weight"]
    assert torch.equal(router_ED, router_ED[::4].repeat_interleave(4, 0))
    assert len(router_ED.unique(dim=0)) == 3


def test_each_copy_can_be_cut_in_an_order_of_its_own_and_partly_drawn_anew(dense, run):
    """G5."""
    folder = run("whole", base=dense("llama"), **granular(shuffle=True))
    dense_FD = tensors_of(dense("llama"))[f"{MLP}.up_proj.weight"]
    up_EFD = tensors_of(folder)[f"{MLP}.experts.gate_up_proj"][:, 12:]
    orders = []
    for copy in range(2):
        rows = up_EFD[4 * copy : 4 * copy + 4].flatten(0, 1)
        order = (rows[:, None] == dense_FD).all(-1).int().argmax(1)
        assert torch.equal(dense_FD[order], rows)
        assert torch.equal(order.sort().values, torch.arange(48))
        orders.append(order)
    assert not torch.equal(*orders)
    dropped = run("dropped", base=dense("llama"), **granular(shuffle=True), drop={"ratio": 0.5})
    new_EFD = tensors_of(dropped)[f"{MLP}.experts.gate_up_proj"][:, 12:]
    assert new_EFD.shape == up_EFD.shape
    assert ((new_EFD != up_EFD).all(-1).sum(1) == 6).all()
    assert ((new_EFD != up_EFD).any(-1).sum(1) == 6).all()
    assert verify(dropped).not_equal_because == ("drop draws 50% of each expert's hidden units anew",)


def test_shards_that_do_not_divide_the_feed_forward_are_refused(dense, run):
    with pytest.raises(
        UpcycleError, match=r"granular.shards must divide the width of the dense feed-forward \(48\), got 5"
    ):
        run(base=dense("llama"), method="granular", experts=10, granular={"shards": 5})
