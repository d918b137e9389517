"""More experts for a mixture: which are copied, and what tells the copies apart."""

import pytest
import torch
import transformers
from dense_models import SIZES, tensors_of
from safetensors.torch import load_file, save_file

from upcycle import UpcycleError, verify

MLP = "model.layers.1.mlp"


@pytest.fixture
def mixture(dense, run):
    """`mixture(target=…)` -> a mixture of three different experts."""

    def make(family="llama", target="moe_runtime", name="mixture", **values):
        sources = [dense(family, seed=seed) for seed in range(3)]
        return run(name, method="btx", sources=sources, target=target, **values)

    return make


def grow(run, base, counts, name="out", target="moe_runtime", **values):
    section = {"counts": counts, **values.pop("replicate", {})}
    return run(name, method="replicate", base=base, target=target, replicate=section, **values)


def test_experts_and_rows_are_copied_and_added_ones_get_a_noisy_selection_bias(mixture, run):
    source = mixture()
    folder = grow(run, source, [1, 3, 2], replicate={"seed": 5})
    before, after = tensors_of(source), tensors_of(folder)
    made_from = [0, 1, 1, 1, 2, 2]
    for name in ("experts.gate_up_proj", "experts.down_proj", "router.weight"):
        assert torch.equal(after[f"{MLP}.{name}"], before[f"{MLP}.{name}"][made_from])
    bias_E = after[f"{MLP}.router.selection_bias"]
    assert (bias_E.abs() <= 1e-3).all()
    assert (bias_E != 0).tolist() == [False, False, True, True, False, True]
    others = {name for name in before if ".mlp." not in name}
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert "its routers are those of the mixture" in (folder / "README.md").read_text()
    result = verify(folder)
    assert result.not_equal_because == (
        "copies of one expert take the places of others among the chosen ones",
    )
    assert result.max_abs_diff > 1e-3
    assert result.divergence > 1e-6
    assert result.passed


def test_a_selection_bias_that_is_there_is_copied(mixture, run):
    source = mixture(router={"selection_bias": True})
    path = next(path for path in source.glob("*.safetensors"))
    tensors = load_file(path)
    tensors[f"{MLP}.router.selection_bias"] = torch.tensor([0.5, -0.25, 0.125])
    save_file(tensors, path)
    bias_E = tensors_of(grow(run, source, 2))[f"{MLP}.router.selection_bias"]
    assert torch.equal(bias_E[::2], tensors[f"{MLP}.router.selection_bias"])
    difference_E = bias_E[1::2] - bias_E[::2]
    assert ((difference_E != 0) & (difference_E.abs() <= 1e-3)).all()


@pytest.mark.parametrize(
    ("family", "target"), [("llama", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe")]
)
def test_native_mixtures_get_their_noise_on_the_rows(family, target, mixture, run):
    source = mixture(family, target)
    native = grow(run, source, 2, "native", target)
    before, after = tensors_of(source), tensors_of(native)
    router = next(name for name in before if "layers.1" in name and name.endswith(".gate.weight"))
    noise_ED = after[router] - before[router].repeat_interleave(2, 0)
    assert not noise_ED[::2].any()
    assert (noise_ED[1::2].abs() <= 1.001e-3).all()
    assert noise_ED[1::2].unique().numel() > 50
    down = next(name for name in before if "layers.1" in name and ".experts.2." in name)
    assert torch.equal(after[down.replace(".experts.2.", ".experts.5.")], before[down])


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", "mixtral"),
        ("qwen2", "qwen2_moe"),
        ("qwen3", "qwen3_moe"),
        ("granite", "granitemoe"),
    ],
)
def test_as_many_copies_for_each_expert_and_token_keep_renormalised_gates(family, target, mixture, run):
    """Every chosen expert is chosen with all its copies, whose gates add up to its own."""
    folder = grow(run, mixture(family, target), 2, experts_per_token=4, replicate={"noise": 0})
    assert "model.layers.0.mlp.router.selection_bias" not in tensors_of(folder)
    result = verify(folder)
    assert result.max_abs_diff < 1e-4
    assert abs(result.divergence) < 1e-8


def test_both_layouts_that_transformers_writes_are_read(run, tmp_path):
    """Experts one by one, and stacked as in memory; of OLMoE, which no dense family here becomes."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True}
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert "model.layers.0.mlp.experts.down_proj" in tensors_of(tmp_path / "stacked")
    same = {"target": "olmoe", "experts_per_token": 4, "replicate": {"noise": 0}}
    apart, stacked = (grow(run, tmp_path / name, 2, f"{name}-out", **same) for name in ("apart", "stacked"))
    assert verify(apart).max_abs_diff < 1e-4
    expected, written = tensors_of(apart), tensors_of(stacked)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_dense_layers_and_shared_experts_stay(dense, run):
    source = run(
        "mixture",
        method="shared_expert",
        base=dense("llama"),
        experts=2,
        layers={"first_dense": 1},
        shared_expert={"expert_width": 16, "residual_scale": 1.0},
    )
    same = grow(run, source, 2, "ours", experts_per_token=4, replicate={"noise": 0})
    theirs = grow(run, source, 2, "theirs", "qwen2_moe", experts_per_token=4, replicate={"noise": 0})
    for folder in (same, theirs):
        assert verify(folder).max_abs_diff < 1e-4
    back = grow(run, theirs, 1, "back", "qwen2_moe", replicate={"noise": 0})
    assert verify(back).max_abs_diff == 0


def test_what_cannot_be_replicated_is_named(dense, mixture, run):
    with pytest.raises(UpcycleError, match=r"model_type must be one of mixtral, .*moe_runtime, got 'llama'"):
        grow(run, dense("llama"), 2)
    ours = mixture()
    with pytest.raises(UpcycleError, match="counts must make at most 1024 experts, got 3000000000"):
        grow(run, ours, 10**9)
    with pytest.raises(UpcycleError, match="one number for each of the 3 experts, got 2"):
        grow(run, ours, [1, 2])
    with pytest.raises(UpcycleError, match=r"experts_per_token must be at most the number .*6.*, got 7"):
        grow(run, ours, 2, experts_per_token=7)
    with pytest.raises(UpcycleError, match="router_selection_bias would be False instead of True"):
        grow(run, ours, 2, target="mixtral", replicate={"noise_on": "selection_bias"})
    bam = run("bam", method="bam", sources=[dense("llama")] * 2)
    with pytest.raises(UpcycleError, match=r"'replicate' copies the experts of feed-forwards, .*attention"):
        grow(run, bam, 2)
    heads = run("heads", method="copy", base=dense("qwen3"), experts=2)
    with pytest.raises(UpcycleError, match="query and key norms have a row for each head"):
        grow(run, heads, 2, target="qwen3_moe")
