"""Other people's trainers and adapters on models whose experts are `experts_implementation="moe_runtime"`."""

import copy

import pytest
import torch
from moe_families import tiny_family
from tiny_models import assert_equal_up_to_rounding, tokens
from trainers import THEIR_WARNINGS, examples, logged, number_tokenizer, settings
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import moe_runtime

moe_runtime.register()

BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
BFLOAT16 = 2**-8  # distance of 1 from the next number
pytestmark = [THEIR_WARNINGS, pytest.mark.usefixtures("one_thread")]


def train(model, folder, *, resume=None, **changes):
    """The Trainer after training, with gradient checkpointing."""
    arguments = TrainingArguments(**settings(folder, gradient_checkpointing=True, **changes))
    trainer = Trainer(model=model, args=arguments, train_dataset=examples())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("accelerated", [False, True], ids=["experts", "experts-and-routers"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_trainer_follows_the_default_experts(family, accelerated, tmp_path):
    expected = train(tiny_family(family, "grouped_mm", **BALANCED), tmp_path)
    model = tiny_family(family, "moe_runtime", **BALANCED)
    if accelerated:
        moe_runtime.accelerate_model(model)
    trainer = train(model, tmp_path)
    assert len(logged(trainer, "loss")) == 4
    for name in ("loss", "grad_norm"):
        # float32, but four steps of a rate that lets differences grow
        assert logged(trainer, name) == pytest.approx(logged(expected, name), rel=1e-3), name


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_trainer_in_mixed_precision_follows_the_default_experts(family, tmp_path):
    """Up to bfloat16: under autocast the default multiplies in the weights' float32, the kernels do not."""
    expected = train(tiny_family(family, "grouped_mm", **BALANCED), tmp_path, bf16=True)
    model = tiny_family(family, "moe_runtime", **BALANCED)
    before = copy.deepcopy(model.state_dict())
    losses = logged(train(model, tmp_path, bf16=True), "loss")
    assert losses == pytest.approx(logged(expected, "loss"), rel=2 * BFLOAT16)
    assert losses[-1] < 0.9 * losses[0]
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_trainer_resumes_to_the_same_bits(tmp_path):
    """From a model loaded from the checkpoint. Into another one transformers loads no experts: the checkpoint
    has a key for each, the model one for all (huggingface/transformers#48805).
    """
    straight = train(tiny_family("olmoe", "moe_runtime"), tmp_path, save_strategy="steps", save_steps=2)
    half_way = tmp_path / "checkpoint-2"
    model = AutoModelForCausalLM.from_pretrained(half_way, experts_implementation="moe_runtime")
    resumed = train(model, tmp_path, resume=half_way)
    assert logged(resumed, "loss") == logged(straight, "loss")
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_checkpoint_of_the_trainer_loads_with_the_default_experts(tmp_path):
    model = tiny_family("mixtral", "moe_runtime")
    train(model, tmp_path, save_strategy="steps", save_steps=4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert saved.config._experts_implementation == "grouped_mm"
    for name, value in model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name
    with torch.no_grad():
        logits = model.eval()(tokens(2, 9)).logits
        assert_equal_up_to_rounding("logits", saved(tokens(2, 9)).logits, logits)


def test_sft_trainer_logs_the_auxiliary_loss_of_the_default_experts(tmp_path):
    from trl import SFTConfig, SFTTrainer

    losses, auxiliary = {}, {}
    for implementation in ("grouped_mm", "moe_runtime"):
        trainer = SFTTrainer(
            model=tiny_family("mixtral", implementation, **BALANCED),
            args=SFTConfig(**settings(tmp_path), max_length=12, bf16=False),
            train_dataset=examples().remove_columns("labels"),
            processing_class=number_tokenizer(),
        )
        trainer.train()
        losses[implementation] = logged(trainer, "loss")
        auxiliary[implementation] = logged(trainer, "aux_loss")
    assert len(auxiliary["moe_runtime"]) == 4
    assert losses["moe_runtime"] == pytest.approx(losses["grouped_mm"], rel=1e-4)
    assert auxiliary["moe_runtime"] == pytest.approx(auxiliary["grouped_mm"], rel=1e-4)


# --- adapters of PEFT, which hand the experts weights that are no parameters -------------


def adapted(family, implementation):
    """A model with low-rank adapters on attention and on the stacked experts, none of them zero."""
    from peft import LoraConfig, get_peft_model

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], target_parameters=targets)
    torch.manual_seed(1)
    model = get_peft_model(tiny_family(family, implementation), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_low_rank_adapters_follow_the_default_experts(family):
    results = []
    for implementation in ("grouped_mm", "moe_runtime"):
        model = adapted(family, implementation)
        output = model(input_ids=tokens(2, 9), labels=tokens(2, 9))
        output.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": output.logits.detach()} | grads)
    expected, actual = results
    assert actual.keys() == expected.keys()
    for part in ("experts", "q_proj", "v_proj"):
        for matrix in ("lora_A", "lora_B"):
            assert any(part in name and matrix in name for name in actual), (part, matrix)
    for name, value in expected.items():
        # gradients of float32 sums in another order, through two layers and back
        assert_equal_up_to_rounding(name, actual[name], value, None if name == "logits" else 5e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_low_rank_adapters_are_saved_loaded_and_merged(family, tmp_path):
    from peft import PeftModel

    def logits_of(model):
        with torch.no_grad():
            return model(tokens(2, 9)).logits

    model = adapted(family, "moe_runtime")
    expected = logits_of(model)
    assert (expected - logits_of(tiny_family(family))).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_family(family, "moe_runtime"), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), expected)
    merged = loaded.merge_and_unload()
    assert_equal_up_to_rounding("merged", logits_of(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_equal_up_to_rounding("merged and saved", logits_of(saved), expected)
