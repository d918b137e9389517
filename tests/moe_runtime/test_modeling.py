"""The causal LM: it is the families of transformers; caches, padding, attention kernels, checkpoint keys."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import (
    BAM,
    BAM_SHARED_KV,
    BAM_SHARED_KV_TOP_K,
    BAM_TOP_K,
    DENSE,
    KINDS,
    MOE,
    VOCAB_SIZE,
    assert_equal_up_to_rounding,
    perturb,
    tiny_model,
    tokens,
)
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_runtime.block import Block
from moe_runtime.families import model_config
from moe_runtime.hf import MoeRuntimeConfig, MoeRuntimeForCausalLM

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}, id="llama3-rope"),
    pytest.param("mistral", {"sliding_window": 5}, id="mistral-window"),
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param(
        "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, id="qwen2-window"
    ),
    pytest.param("qwen3", {}, id="qwen3"),
    pytest.param("cohere", {"logit_scale": 0.25}, id="cohere"),
    pytest.param("cohere", {"use_qk_norm": True, "attention_bias": True}, id="cohere-qk-norm"),
    pytest.param("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}, id="mixtral"),
    pytest.param(
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 12, "norm_topk_prob": False},
        id="qwen2-moe",
    ),
    pytest.param("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "decoder_sparse_step": 2}, id="qwen3-moe"),
]


def family_model(family: str, options: dict):
    torch.manual_seed(0)
    sizes = dict(SIZES)
    if family in ("cohere", "qwen2", "qwen2_moe"):
        del sizes["head_dim"]  # these have no such key: hidden_size / num_attention_heads
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(sizes | options))).eval()
    perturb(model)
    return model


def ours_with_the_weights_of(theirs) -> MoeRuntimeForCausalLM:
    config = MoeRuntimeConfig.from_model_config(model_config(json.loads(theirs.config.to_json_string())))
    ours = MoeRuntimeForCausalLM(config).eval()
    wanted = ours.state_dict()
    given = {name.replace("mlp.gate.", "mlp.router."): value for name, value in theirs.state_dict().items()}
    assert given.keys() == wanted.keys()
    # Qwen3 stores one row of query-key norm for all heads, we one per head
    ours.load_state_dict({name: value.expand_as(wanted[name]) for name, value in given.items()})
    return ours


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_is_the_model_of_the_family(family, options):
    theirs = family_model(family, options)
    ours, ids = ours_with_the_weights_of(theirs), tokens(2, 13)
    with torch.no_grad():
        assert_equal_up_to_rounding("logits", ours(ids).logits, theirs(ids).logits)


LATER = {
    "gemma": {
        "norm": "offset_rms_norm",
        "norm_placement": "both",
        "qk_norm": "offset_rms_norm",
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 2.0,
        "embedding_multiplier": 3.0,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "others": {
        "norm_placement": "after",
        "qk_norm": "joint_rms_norm",
        "residual_multiplier": 0.5,
        "rope_layers": [1],
        "attention_multiplier": 0.3,
        "head_bias": True,
    },
}


# raised inside torch, where Dynamo makes an instance of every autograd.Function it meets
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("features", LATER.values(), ids=LATER)
def test_what_later_families_need_compiles_trains_and_runs_in_16_bits(features):
    model, ids = tiny_model(MOE, **features), tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_equal_up_to_rounding("logits", compiled(ids).logits, model(ids).logits)
    model.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    assert model.bfloat16().eval()(ids).logits.isfinite().all()


def test_a_norm_that_counts_from_one_starts_at_zero():
    model = MoeRuntimeForCausalLM(MoeRuntimeConfig(**DENSE, norm="offset_rms_norm"))
    assert not model.model.norm.weight.any()


def test_capped_scores_need_an_attention_that_can_cap_them():
    model = tiny_model(DENSE, attn_logit_softcapping=0.5)
    assert model.config._attn_implementation == "eager"
    assert tiny_model(DENSE).config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="does not support an attention implementation through torch"):
        model.set_attn_implementation("sdpa")
    config = model.config.model_config()
    alone = Block(config.block_config(0)).eval()
    alone.load_state_dict(model.model.layers[0].state_dict())
    x_BLD, positions = model.model.embed_tokens(tokens(1, 9)), torch.arange(9)[None]
    with torch.no_grad():
        rotary = model.model.rotary_emb(x_BLD, positions)
        hidden = model(tokens(1, 9), output_hidden_states=True).hidden_states
        assert_equal_up_to_rounding("x", alone(x_BLD, rotary).x_BLD, hidden[1])


def test_is_gpt_neox_with_partial_rotation_biases_and_two_parallel_norms():
    """Its fused projection is split here by hand. The block is Pythia's, and almost Phi's and GPT-J's."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gpt_neox"](
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        initializer_range=0.2,
    )
    theirs = AutoModelForCausalLM.from_config(config).eval()
    perturb(theirs)
    ours = MoeRuntimeForCausalLM(
        MoeRuntimeConfig(
            **(DENSE | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}),
            block="parallel",
            norm="layer_norm",
            norm_bias=True,
            norm_eps=config.layer_norm_eps,
            attention_bias=True,
            attention_output_bias=True,
            mlp_bias=True,
            gated_mlp=False,
            hidden_act="gelu",
            rope_parameters=config.rope_parameters,
        )
    ).eval()
    renamed = {}
    for name, value in theirs.state_dict().items():
        for old, new in {
            "gpt_neox.embed_in": "model.embed_tokens",
            "gpt_neox.final_layer_norm": "model.norm",
            "gpt_neox.": "model.",
            "embed_out": "lm_head",
            "attention.dense": "self_attn.o_proj",
            "attention.": "self_attn.",
            "dense_h_to_4h": "up_proj",
            "dense_4h_to_h": "down_proj",
        }.items():
            name = name.replace(old, new)
        if "query_key_value" in name:
            for letter, part in zip("qkv", value.unflatten(0, (3, 3, 8)).unbind(1), strict=True):
                renamed[name.replace("query_key_value", f"{letter}_proj")] = part.flatten(0, 1)
        else:
            renamed[name] = value
    ours.load_state_dict(renamed)
    ids = tokens(2, 13)
    with torch.no_grad():
        assert_equal_up_to_rounding("logits", ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_without_memory_on_the_meta_device(kind):
    ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
    with torch.device("meta"):
        model = MoeRuntimeForCausalLM(MoeRuntimeConfig(**KINDS[kind])).train()
    out = model(ids, labels=ids)
    assert out.logits.shape == (2, 9, VOCAB_SIZE)
    out.loss.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


# --- caches and generation ---


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_step_by_step_equals_the_whole(kind):
    model, ids = tiny_model(KINDS[kind]), tokens(2, 9)
    with torch.no_grad():
        whole = model(ids).logits
        cache, steps = None, []
        for position in range(9):
            out = model(ids[:, [position]], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "kv_heads"), [("dense", 2), ("bam", 3 * 2), ("bam-shared-kv", 2)], ids=lambda value: str(value)
)
def test_cache_bytes_per_token_and_layer(kind, kv_heads):
    model = tiny_model(KINDS[kind])
    cache = model(tokens(1, 7), use_cache=True).past_key_values
    for layer in cache.layers:
        assert layer.keys.nbytes + layer.values.nbytes == 7 * 2 * kv_heads * DENSE["head_dim"] * 4
    assert len(cache.layers) == DENSE["num_hidden_layers"]


def test_a_step_that_goes_on_from_a_cache_has_statistics_only_with_gradients():
    model, ids = tiny_model(), tokens(1, 6)
    for trains in (True, False):
        with torch.set_grad_enabled(trains):
            first = model(ids[:, :5], use_cache=True)
            step = model(ids[:, 5:], past_key_values=first.past_key_values)
        for name in ("aux_loss", "z_loss", "expert_count"):
            assert getattr(first, name) is not None
            assert (getattr(step, name) is not None) == trains


def test_padding_before_a_cached_step_is_not_taken_for_the_step():
    model, ids = tiny_model(), tokens(1, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    cache = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
    out = model(ids[:, 5:], attention_mask=mask, past_key_values=cache)
    assert out.expert_count.sum(1).tolist() == [MOE["num_experts_per_tok"]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_same_with_every_cache(kind):
    model, ids = tiny_model(KINDS[kind]), tokens(2, 5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    without = model.generate(ids, **settings, use_cache=False)
    assert without.shape == (2, 13)
    assert torch.equal(model.generate(ids, **settings), without)
    assert torch.equal(model.generate(ids, **settings, cache_implementation="static"), without)


def test_positions_of_padded_prompts_count_from_their_first_token():
    """generate() makes positions only for models whose forward names `position_ids`."""
    model, seen = tiny_model(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens(1, 6)], 1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert seen[0][0, 4:].tolist() == list(range(6))
    assert seen[1].tolist() == [[6]]


def test_generation_beyond_a_sliding_window():
    model = tiny_model(BAM, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    without = model.generate(tokens(2, 5), **settings, use_cache=False)
    assert torch.equal(model.generate(tokens(2, 5), **settings), without)
    assert torch.equal(model.generate(tokens(2, 5), **settings, cache_implementation="static"), without)
    unlimited = tiny_model(BAM)
    assert (unlimited(without).logits - model(without).logits).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind):
    model, ids = tiny_model(KINDS[kind]), tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits[:, 4:]
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(padded, attention_mask=mask, **settings)[:, 4:]
    assert torch.equal(generated, model.generate(ids, attention_mask=torch.ones_like(ids), **settings))


# --- attention kernels ---


@pytest.mark.parametrize("kind", KINDS)
def test_attention_implementations_agree(kind):
    model, ids = tiny_model(KINDS[kind]), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        by_sdpa = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        by_eager = model(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(by_eager[real], by_sdpa[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "heads"),
    [(BAM, 12), (BAM_SHARED_KV, 12), (BAM_TOP_K, 12), (BAM_SHARED_KV_TOP_K, 8)],
    ids=["bam", "bam-shared-kv", "bam-top-k", "bam-shared-kv-top-k"],
)
def test_flash_kernels_get_all_experts_in_one_call_per_layer(kind, heads):
    """flash-attn needs a GPU; a recording function sees what it would get, and hands it to SDPA.

    With a top-k and shared keys and values they are the experts of each token, here 2 of 3.
    """
    calls = []

    def recording(module, query, key, value, attention_mask, **arguments):
        calls.append((query.shape, key.shape, attention_mask, arguments))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **arguments)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", flash_attention_mask)
    model, ids = tiny_model(kind, sliding_window=50), tokens(2, 9)
    expected = model(ids).logits
    model.set_attn_implementation("recording")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == kind["num_hidden_layers"]
    query_shape, key_shape, mask, arguments = calls[0]
    assert query_shape == (2, heads, 9, kind["head_dim"])
    assert key_shape == (2, kind["num_key_value_heads"], 9, kind["head_dim"])
    assert mask is None
    assert arguments["scaling"] == kind["head_dim"] ** -0.5
    assert arguments["sliding_window"] == 50
    calls.clear()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    model(ids, attention_mask=mask)
    assert torch.equal(calls[0][2], mask.bool())  # flash kernels unpad by the two-dimensional mask


def test_transformers_sees_that_attention_can_be_chosen():
    assert MoeRuntimeForCausalLM._can_set_attn_implementation()
    for flag in (
        "_supports_sdpa",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_supports_attention_backend",
    ):
        assert getattr(MoeRuntimeForCausalLM, flag), flag


def test_outputs_of_every_layer_can_be_asked_for():
    model, ids = tiny_model(BAM, moe_layers=[1]), tokens(2, 9)
    model.set_attn_implementation("eager")
    out = model(ids, output_router_logits=True, output_hidden_states=True, output_attentions=True)
    assert [logits.shape for logits in out.router_logits] == [(18, BAM["num_experts"])]
    assert [state.shape for state in out.hidden_states] == [(2, 9, BAM["hidden_size"])] * 3
    assert [weights.shape for weights in out.attentions] == [(2, BAM["num_attention_heads"], 9, 9)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, BAM["num_attention_heads"], 9))
    assert model(ids).router_logits is None


def test_exactly_one_kind_of_input():
    model, ids = tiny_model(), tokens(1, 4)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)
    with pytest.raises(
        ValueError, match="exactly one of input_ids and inputs_embeds must be given, got neither"
    ):
        model()
    with pytest.raises(ValueError, match="got both"):
        model(ids, inputs_embeds=embeddings)


def test_only_the_last_logits_on_request():
    model, ids = tiny_model(logit_scale=0.25), tokens(2, 9)
    every = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, every[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([3])).logits, every[:, 3:4])
    unscaled = tiny_model()(ids).logits
    torch.testing.assert_close(every, 0.25 * unscaled)


def test_mixed_layers():
    model = tiny_model(BAM, moe_layers=[0], attention_mixture_layers=[1], block="sequential", num_norms=2)
    names = set(model.state_dict())
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert "model.layers.1.mlp.gate_proj.weight" in names
    assert "model.layers.0.self_attn.router.weight" not in names
    assert "model.layers.1.self_attn.router.weight" in names
    out = model(tokens(1, 4))
    assert out.logits.isfinite().all()
    assert out.expert_count.shape == (1, BAM["num_experts"])


def test_checkpoint_keys_are_those_of_the_design():
    model = tiny_model(
        MOE,
        num_attention_experts=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        qk_norm="rms_norm",
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        router_selection_bias=True,
        shared_expert_intermediate_size=12,
        shared_expert_gate=True,
        num_hidden_layers=1,
        norm="layer_norm",
        norm_bias=True,
    )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    D, P, layer = 24, 8, "model.layers.0"
    assert shapes == {
        "model.embed_tokens.weight": (VOCAB_SIZE, D),
        "model.norm.weight": (D,),
        "model.norm.bias": (D,),
        "lm_head.weight": (VOCAB_SIZE, D),
        f"{layer}.input_layernorm.weight": (D,),
        f"{layer}.input_layernorm.bias": (D,),
        f"{layer}.post_attention_layernorm.weight": (D,),
        f"{layer}.post_attention_layernorm.bias": (D,),
        f"{layer}.self_attn.q_proj.weight": (8 * P, D),
        f"{layer}.self_attn.q_proj.bias": (8 * P,),
        f"{layer}.self_attn.k_proj.weight": (4 * P, D),
        f"{layer}.self_attn.k_proj.bias": (4 * P,),
        f"{layer}.self_attn.v_proj.weight": (4 * P, D),
        f"{layer}.self_attn.v_proj.bias": (4 * P,),
        f"{layer}.self_attn.q_norm.weight": (8, P),
        f"{layer}.self_attn.k_norm.weight": (4, P),
        f"{layer}.self_attn.o_proj.weight": (D, 8 * P),
        f"{layer}.self_attn.o_proj.bias": (2, D),
        f"{layer}.self_attn.router.weight": (2, D),
        f"{layer}.mlp.router.weight": (5, D),
        f"{layer}.mlp.router.selection_bias": (5,),
        f"{layer}.mlp.experts.gate_up_proj": (5, 40, D),
        f"{layer}.mlp.experts.gate_up_bias": (5, 40),
        f"{layer}.mlp.experts.down_proj": (5, D, 20),
        f"{layer}.mlp.experts.down_bias": (5, D),
        f"{layer}.mlp.shared_expert.gate_proj.weight": (12, D),
        f"{layer}.mlp.shared_expert.gate_proj.bias": (12,),
        f"{layer}.mlp.shared_expert.up_proj.weight": (12, D),
        f"{layer}.mlp.shared_expert.up_proj.bias": (12,),
        f"{layer}.mlp.shared_expert.down_proj.weight": (D, 12),
        f"{layer}.mlp.shared_expert.down_proj.bias": (D,),
        f"{layer}.mlp.shared_expert_gate.weight": (1, D),
    }


@pytest.mark.parametrize("loaded", [False, True], ids=["made", "missing from a checkpoint"])
@pytest.mark.parametrize(
    "kind", [BAM, BAM_TOP_K, BAM_SHARED_KV_TOP_K], ids=["bam", "top-k", "shared-kv-top-k"]
)
def test_initial_weights_follow_the_configured_spread(kind, loaded, tmp_path):
    torch.manual_seed(0)
    biases = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
    model = MoeRuntimeForCausalLM(
        MoeRuntimeConfig(**(kind | biases | {"initializer_range": 0.05, "hidden_size": 128}))
    )
    if loaded:
        model.save_pretrained(tmp_path)
        (norm,) = (value for name, value in model.state_dict().items() if name == "model.norm.weight")
        save_file({"model.norm.weight": norm}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = MoeRuntimeForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif "bias" in name:
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.15), name


@pytest.mark.parametrize("rope_type", ["dynamic", "yarn", "linear", "longrope"])
def test_rope_types_of_transformers(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    if rope_type in ("yarn", "longrope"):
        rope["original_max_position_embeddings"] = 16
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    theirs = family_model("llama", {"rope_parameters": rope, "max_position_embeddings": 32})
    ours, ids = ours_with_the_weights_of(theirs), tokens(1, 40)
    with torch.no_grad():
        assert_equal_up_to_rounding("logits", ours(ids).logits, theirs(ids).logits)
