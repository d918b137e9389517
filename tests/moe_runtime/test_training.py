"""Training the causal LM: auxiliary losses, checkpointing, autocast, compilation, other people's trainers."""

import copy

import pytest
import torch
from tiny_models import BAM, BAM_SHARED_KV, DENSE, KINDS, MOE, tiny_model, tokens
from trainers import THEIR_WARNINGS, examples, logged, number_tokenizer, settings
from transformers import DynamicCache

from moe_runtime.hf import MoeRuntimeForCausalLM
from moe_runtime.losses import load_balancing_loss, z_loss

COEFFICIENTS = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.05}


def batch(padded: bool = True):
    ids = tokens(2, 11)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestAuxiliaryLosses:
    def test_are_sums_over_layers_without_padding(self):
        model, inputs = tiny_model(MOE), batch()
        out = model(**inputs, output_router_logits=True)
        kept = inputs["attention_mask"].flatten().bool()
        balance = z = 0.0
        for layer, logits_TE in enumerate(out.router_logits):
            logits_TE = logits_TE[kept]
            expert_TK = logits_TE.topk(MOE["num_experts_per_tok"]).indices
            count_E = torch.bincount(expert_TK.flatten(), minlength=MOE["num_experts"])
            assert torch.equal(out.expert_count[layer].long(), count_E)
            balance += load_balancing_loss(logits_TE.softmax(-1), count_E, MOE["num_experts_per_tok"]).item()
            z += z_loss(logits_TE).item()
        assert out.aux_loss.item() == pytest.approx(balance, rel=1e-5)
        assert out.z_loss.item() == pytest.approx(z, rel=1e-5)

    def test_are_part_of_the_loss_in_training_only(self):
        model, inputs = tiny_model(MOE, **COEFFICIENTS), batch()
        evaluated, trained = model.eval()(**inputs), model.train()(**inputs)
        logits, labels = evaluated.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
        assert evaluated.loss.item() == pytest.approx(nll.item(), rel=1e-5)
        expected = nll + 0.3 * trained.aux_loss + 0.05 * trained.z_loss
        assert trained.loss.item() == pytest.approx(expected.item(), rel=1e-5)

    @torch.no_grad()
    def test_are_absent_where_a_cache_is_given_but_not_in_training(self):
        model, inputs = tiny_model(MOE, **COEFFICIENTS), batch()
        out = model.eval()(**inputs, past_key_values=DynamicCache(config=model.config))
        assert out.aux_loss is out.z_loss is out.expert_count is None
        assert model(**inputs).aux_loss is not None
        expected = model.train()(**inputs).loss
        given = model(**inputs, past_key_values=DynamicCache(config=model.config)).loss
        assert given.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_are_absent_without_experts(self):
        out = tiny_model(DENSE).train()(**batch())
        assert out.aux_loss is out.z_loss is out.expert_count is None

    def test_micro_batches_sum_to_the_whole(self):
        """Trainers pass the labels of the accumulated batch; these micro-batches differ in number."""
        model = tiny_model(MOE, **COEFFICIENTS).train()
        parts = [batch(), batch(padded=False)]
        shares = [(part["labels"][:, 1:] != -100).sum() for part in parts]
        total = sum(shares)
        losses = [model(**part, num_items_in_batch=total).loss for part in parts]
        alone = [model(**part).loss for part in parts]
        mean = sum(share / total * loss for share, loss in zip(shares, alone, strict=True))
        assert sum(losses).item() == pytest.approx(mean.item(), rel=1e-5)

    def test_selection_biases_move_by_the_counts_of_a_step(self):
        model = tiny_model(MOE, router_selection_bias=True)
        count = model(**batch()).expert_count
        model.update_selection_bias(count, gamma=0.5)
        for layer, count_E in zip(model.model.layers, count, strict=True):
            expected_E = 0.5 * torch.sign(count_E.float().mean() - count_E)
            assert torch.equal(layer.mlp.router.selection_bias, expected_E)
        with pytest.raises(ValueError, match="selection_bias must be True"):
            tiny_model(MOE).update_selection_bias(count)

    def test_constant_gate_is_refused(self):
        model = tiny_model(MOE, num_experts_per_tok=1)
        model(**batch())
        with pytest.raises(
            ValueError, match="gate must not be 'renorm' with experts_per_token = 1 in training"
        ):
            model.train()(**batch())


@THEIR_WARNINGS
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind, reentrant):
    """Those of the auxiliary losses included, which reach the routers."""
    model, inputs = tiny_model(KINDS[kind], **COEFFICIENTS).train(), batch()
    model(**inputs, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(**inputs, use_cache=False).loss.backward()
    actual = gradients(model)
    assert actual.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(actual[name], grad, msg=name)


@THEIR_WARNINGS
@pytest.mark.parametrize("checkpointing", [False, True], ids=["alone", "with-checkpointing"])
def test_recomputing_experts_is_switched_on_when_loading_and_changes_no_bit(checkpointing, tmp_path):
    tiny_model(MOE, **COEFFICIENTS).save_pretrained(tmp_path)
    results, kept = [], []
    for options in ({}, {"recompute_experts": True}):
        model = MoeRuntimeForCausalLM.from_pretrained(tmp_path, **options).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.update({x.data_ptr(): x.nbytes}), x)[1], lambda x: x
        ):
            out = model(**batch(), use_cache=False)
        kept.append(sum(sizes.values()))
        out.loss.backward()
        results.append({"loss": out.loss.detach(), **gradients(model)})
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name
    hidden = 2 * 11 * MOE["num_experts_per_tok"] * 2 * MOE["moe_intermediate_size"]
    assert kept[0] - kept[1] == (0 if checkpointing else 4 * MOE["num_hidden_layers"] * hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind):
    model, inputs = tiny_model(KINDS[kind]).train(), batch()
    plain = model(**inputs)
    with torch.autocast("cpu"):
        cast = model(**inputs)
    assert 0 < abs(cast.loss.item() - plain.loss.item()) < 0.05
    cast.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # by torch's own tracing
@pytest.mark.parametrize("kind", ["dense", "moe", "bam-shared-kv", "bam-top-k", "bam-shared-kv-top-k"])
def test_compiles_to_one_graph(kind):
    torch.compiler.reset()
    model, inputs = tiny_model(KINDS[kind]).train(), batch()
    expected = model(**inputs, use_cache=False)
    expected.loss.backward()
    grads = gradients(model)
    model.zero_grad()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    actual = compiled(**inputs, use_cache=False)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    actual.loss.backward()
    for name, grad in gradients(compiled._orig_mod).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-5, msg=name)


# --- other people's trainers ---


@THEIR_WARNINGS
@pytest.mark.parametrize("kind", ["moe", "bam"])
def test_trainer(kind, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_model(KINDS[kind])
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(**settings(tmp_path), gradient_checkpointing=True, bf16=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=examples(), eval_dataset=examples(4))
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), name


@THEIR_WARNINGS
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_sft_trainer_logs_the_auxiliary_loss(kind, tmp_path):
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**settings(tmp_path), max_length=12, bf16=False)
    trainer = SFTTrainer(
        model=tiny_model(KINDS[kind]),
        args=arguments,
        train_dataset=examples().remove_columns("labels"),
        processing_class=number_tokenizer(),
    )
    trainer.train()
    losses = logged(trainer, "aux_loss")
    # transformers' function, which this trainer calls on the router's logits, gives K when balanced
    assert len(losses) == (4 if kind == "moe" else 0)
    assert all(1.5 < value <= MOE["num_experts"] * 2 for value in losses)


@THEIR_WARNINGS
@pytest.mark.parametrize("kind", [MOE, BAM, BAM_SHARED_KV], ids=["moe", "bam", "bam-shared-kv"])
def test_low_rank_adapters(kind):
    """On all projections of attention and on the stacked experts; merged, they are the same model."""
    from peft import LoraConfig, get_peft_model

    mixture = "num_attention_experts" in kind
    # the mixture's output projection is no Linear, because it also mixes: adapt its weight as a parameter
    modules = ["q_proj", "k_proj", "v_proj"] + ([] if mixture else ["o_proj"])
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] + (
        ["self_attn.o_proj.weight"] if mixture else []
    )
    model = tiny_model(kind)
    base = model(tokens(2, 9)).logits
    config = LoraConfig(r=2, lora_alpha=4, target_modules=modules, target_parameters=parameters)
    adapted = get_peft_model(model, config)
    torch.testing.assert_close(adapted(tokens(2, 9)).logits, base, rtol=1e-5, atol=1e-5)
    adapted.train()(**batch()).loss.backward()
    trained = {
        name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert trained
    assert all("lora_B" in name for name in trained)  # lora_A's gradient is zero while lora_B is
    for part in (*modules, "experts", *(["o_proj"] if mixture else [])):
        assert any(part in name for name in trained), part
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    changed = adapted.eval()(tokens(2, 9)).logits
    assert (changed - base).abs().max() > 0.01
    torch.testing.assert_close(adapted.merge_and_unload()(tokens(2, 9)).logits, changed, rtol=1e-4, atol=1e-4)
