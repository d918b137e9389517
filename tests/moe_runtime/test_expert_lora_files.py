"""Per-expert LoRA of whole models: PEFT's function, gradients and files, in both directions."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from moe_families import tiny_family
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import BAM, DENSE, tiny_model, tokens
from torch import nn
from trainers import THEIR_WARNINGS, examples, settings
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moe_runtime.expert_lora import ExpertLoRA
from moe_runtime.hf import lora
from moe_runtime.hf.experts_interface import register
from moe_runtime.hf.lora import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    add_expert_lora,
    load_expert_lora,
    merge_expert_lora,
    remove_expert_lora,
    save_expert_lora,
)

register()
# PEFT asks transformers by a name that transformers gives up
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FAMILIES = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "moe_runtime"]
ATTENTION = {"deepseek_v3": ["q_b_proj", "o_proj"]}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = tokens(2, 9)


def base_model(family="moe_runtime", **options):
    if family == "moe_runtime":
        return tiny_model(num_hidden_layers=2, **options)
    return tiny_family(family, "moe_runtime", **options)


def fill(model):
    """Adapters as after training: large enough to change what the model says."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def peft_adapter(model, folder, target_parameters=BOTH, target_modules=(), **options):
    """PEFT's model with a filled adapter, which is also in the folder."""
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(target_modules),
        target_parameters=target_parameters,
        **options,
    )
    theirs = fill(get_peft_model(copy.deepcopy(model), config).eval())
    theirs.save_pretrained(folder)
    return theirs


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_equal_logits(actual, expected):
    error = (logits(actual) - logits(expected)).abs().max().item()
    assert error <= 1e-5, f"logits differ by {error:.1e}"


def saved(folder):
    return load_file(folder / WEIGHTS_NAME), json.loads((folder / CONFIG_NAME).read_text())


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | changes))


CASES = [
    *((family, {"target_modules": ATTENTION.get(family, ["q_proj", "v_proj"])}) for family in FAMILIES),
    ("mixtral", {}),
    ("olmoe", {"target_parameters": ["experts.down_proj"]}),
    ("olmoe", {"target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True}),
    ("moe_runtime", {"target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"]}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_an_adapter_of_peft_loads_and_is_saved_as_peft_saves_it(family, options, tmp_path):
    base = base_model(family)
    theirs = peft_adapter(base, tmp_path / "theirs", **options)
    ours = copy.deepcopy(base)
    load_expert_lora(ours, tmp_path / "theirs")
    assert (logits(ours) - logits(base)).abs().max() > 0.1
    assert_equal_logits(ours, theirs)

    save_expert_lora(ours, tmp_path / "ours")
    (tensors, config), (expected, described) = saved(tmp_path / "ours"), saved(tmp_path / "theirs")
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensors[key], tensor), key
        assert tensors[key].dtype == tensor.dtype
    for key in config.keys() - {"task_type", "target_parameters", "target_modules"}:
        assert config[key] == described[key], key
    assert config.keys() <= described.keys()
    assert sorted(config["target_modules"]) == sorted(described["target_modules"])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_made_here_loads_in_peft(family, tmp_path):
    base = base_model(family)
    ours = copy.deepcopy(base)
    add_expert_lora(ours, r=2, alpha=5, use_rslora=True, target_modules=ATTENTION.get(family, ["q_proj"]))
    assert_equal_logits(ours, base)
    save_expert_lora(fill(ours), tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert (logits(ours) - logits(base)).abs().max() > 0.1
    assert_equal_logits(theirs, ours)


@pytest.mark.parametrize("family", ["olmoe", "moe_runtime"])
def test_gradients_are_those_of_peft(family, tmp_path):
    base = base_model(family)
    theirs = peft_adapter(base, tmp_path, target_modules=["q_proj"])
    ours = copy.deepcopy(base)
    load_expert_lora(ours, tmp_path)
    for model in (ours, theirs):
        model(IDS, labels=IDS).loss.backward()
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == {
        name for name, p in ours.named_parameters() if "lora_" in name
    }
    expected = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    for parameter in ours.parameters():
        if parameter.grad is not None:
            parameter.data = parameter.grad  # laid out by the code that saves
    save_expert_lora(ours, tmp_path)
    found, _ = saved(tmp_path)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (found[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key


@pytest.mark.parametrize("family", ["qwen3_moe", "moe_runtime"])
def test_checkpointed_layers_give_the_same_gradients(family):
    model = base_model(family)
    add_expert_lora(model, r=4)
    fill(model).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(plain, checkpointed)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph():
    model = base_model("olmoe")
    add_expert_lora(model, target_modules=["q_proj"])
    fill(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, logits(model))


@pytest.mark.parametrize("family", ["mixtral", "moe_runtime"])
def test_merged_weights_are_the_same_model(family):
    base = base_model(family)
    adapted = copy.deepcopy(base)
    add_expert_lora(adapted, r=2, target_modules=["q_proj"])
    merged = copy.deepcopy(fill(adapted))
    merge_expert_lora(merged)
    assert_equal_logits(merged, adapted)
    assert (logits(merged) - logits(base)).abs().max() > 0.1
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]

    remove_expert_lora(adapted)
    assert torch.equal(logits(adapted), logits(base))
    assert adapted.state_dict().keys() == base.state_dict().keys()
    assert not any(module._forward_pre_hooks for model in (merged, adapted) for module in model.modules())
    add_expert_lora(adapted, target_modules=["q_proj"])  # as if there had been none


def train_adapters(folder, *, resume=None):
    """Mixtral after four steps of Trainer, adapters and routers trained, with a checkpoint after two."""
    model = base_model("mixtral")
    torch.manual_seed(0 if resume is None else 1)
    add_expert_lora(model, r=2, target_modules=["q_proj"])
    for layer in model.model.layers:
        layer.mlp.gate.requires_grad_(True)
    arguments = TrainingArguments(**settings(folder, save_strategy="steps", save_steps=2))
    trainer = Trainer(model=model, args=arguments, train_dataset=examples())
    trainer.train(resume_from_checkpoint=resume)
    return model


@THEIR_WARNINGS
@pytest.mark.usefixtures("one_thread")
def test_trainer_resumes_the_adapters(tmp_path):
    """Mixtral's modules have other names than its published files, under which Trainer would save them."""
    straight = train_adapters(tmp_path)
    resumed = train_adapters(tmp_path, resume=tmp_path / "checkpoint-2")
    before, after = base_model("mixtral").state_dict(), resumed.state_dict()
    for name, value in straight.state_dict().items():
        assert torch.equal(after[name], value), name
        if "mlp.gate." in name:
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("end", [merge_expert_lora, remove_expert_lora])
def test_without_adapters_it_is_saved_as_before(end, tmp_path):
    base = base_model("mixtral")
    base.save_pretrained(tmp_path / "before")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "before", experts_implementation="moe_runtime")
    add_expert_lora(model)
    end(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_adapters_are_float32_beside_half_precision():
    model = base_model("olmoe").bfloat16()
    add_expert_lora(model, target_modules=["q_proj"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16


def test_targets_choose_the_weights():
    model = base_model("olmoe")
    add_expert_lora(model, targets=["down_proj"])
    layers = [module for module in model.modules() if isinstance(module, ExpertLoRA)]
    assert [list(layer.lora_A) for layer in layers] == [["down_proj"]] * 2


def test_a_save_that_fails_leaves_the_earlier_adapter(tmp_path, monkeypatch):
    model = base_model()
    add_expert_lora(model)
    save_expert_lora(fill(model), tmp_path)
    before, _ = saved(tmp_path)

    def full(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(lora, "save_file", full)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.expert_lora.lora_B["down_proj"].zero_()
    with pytest.raises(OSError, match="no space"):
        save_expert_lora(model, tmp_path)
    after, _ = saved(tmp_path)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/lora.md", "exec"), {"__name__": "example"})


# --- what is refused ---


def refused(call, message, kind=ValueError):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model(DENSE), "model must have experts for per-expert LoRA, got MoeRuntimeForCausalLM"),
        (
            lambda: tiny_family("olmoe", "grouped_mm"),
            "experts_implementation must be 'moe_runtime' for per-expert LoRA, got 'grouped_mm'; call model",
        ),
        (lambda: base_model("gpt_oss"), r"run as one expert_ffn .* got others in .* \(GptOssExperts\)"),
        (
            lambda: base_model("nemotron_h"),
            r"must have gate_up_proj .*, got others in .* \(NemotronHExperts\)",
        ),
        (lambda: base_model(expert_dropout=0.1), "expert_dropout must be 0.0 with expert_lora, got 0.1"),
        (
            lambda: base_model(recompute_experts=True),
            "recompute_experts must be False with expert_lora, got True",
        ),
    ],
    ids=["dense", "another-implementation", "other-layout", "no-gate", "dropout", "recompute"],
)
def test_a_model_that_cannot_have_adapters(model, message):
    refused(lambda: add_expert_lora(model()), message)


def test_adapters_are_not_left_out_silently():
    model = base_model("olmoe")
    add_expert_lora(model)
    model.set_experts_implementation("grouped_mm")
    refused(
        lambda: model(IDS),
        "experts_implementation must be 'moe_runtime' for per-expert LoRA, got 'grouped_mm'",
    )
    remove_expert_lora(model)
    model(IDS)


def test_a_second_adapter():
    model = base_model()
    add_expert_lora(model)
    refused(
        lambda: add_expert_lora(model), "must have no per-expert LoRA yet, got one that has; remove or merge"
    )
    model = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"]))
    refused(lambda: add_expert_lora(model), "must have no adapters of PEFT yet, .* in target_modules")


@pytest.mark.parametrize("call", [merge_expert_lora, remove_expert_lora, lambda m: save_expert_lora(m, "x")])
def test_a_model_without_adapters(call):
    refused(
        lambda: call(base_model()), "model must have adapters from add_expert_lora or load_expert_lora, got"
    )


def test_missing_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = base_model()
    before = [parameter.requires_grad for parameter in model.parameters()]
    refused(
        lambda: add_expert_lora(model, target_modules=["q_proj"]),
        r"target_modules need PEFT, which is not installed; run: pip install 'moe-runtime\[train\]'",
        ModuleNotFoundError,
    )
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    add_expert_lora(model)


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
def test_target_modules_that_are_no_linear_layers():
    """PEFT takes the names that Mixtral's projections once had for the stacked weights."""
    model = base_model("mixtral")
    refused(
        lambda: add_expert_lora(model, target_modules=["q_proj", "w1", "w2", "w3"]),
        "target_modules must name linear layers outside the experts, .* takes for down_proj, gate_up_proj",
    )
    assert model.state_dict().keys() == base_model("mixtral").state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = base_model()
    add_expert_lora(model, r=3)
    save_expert_lora(fill(model), folder)
    return folder


@pytest.fixture
def broken(adapter, tmp_path):
    """A copy of an adapter, to be spoilt."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "IA3"},
            "peft_type in adapter_config.json must be 'LORA' for per-expert LoRA, got 'IA3'",
        ),
        ({"use_dora": True}, "use_dora in adapter_config.json must be False"),
        ({"lora_dropout": 0.1}, "lora_dropout in adapter_config.json must be 0 "),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens in adapter_config.json must be None"),
        ({"layers_to_transform": 0}, "layers_to_transform in adapter_config.json must be None .* got 0"),
        ({"exclude_modules": ["layers.1"]}, "exclude_modules in .* must be None .* got .'layers.1'"),
        ({"alpha_pattern": {"down_proj": 3}}, "alpha_pattern in adapter_config.json must be {}"),
        ({"target_parameters": None}, "target_parameters in adapter_config.json must be given .* got None"),
        (
            {"target_parameters": ["mlp.router.weight"]},
            "must name weights of the model's experts, such as .*router",
        ),
        (
            {"r": 4},
            r"lora_A.weight in .* must have shape \(20, \d+\), as r = 4 and the model say, got \(15, \d+\)",
        ),
        (
            {"target_parameters": ["experts.down_proj"], "base_model_name_or_path": "some/base"},
            "must hold nothing that has no place in the model, got base_model.* was made for some/base",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_of_something_else(broken, changes, message):
    edit_config(broken, **changes)
    refused(lambda: load_expert_lora(base_model(), broken), message)


def test_an_adapter_of_another_model_leaves_this_one_as_it_was(broken):
    tensors, _ = saved(broken)
    key = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, broken / WEIGHTS_NAME)
    model = base_model()
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    refused(
        lambda: load_expert_lora(model, broken), f"must hold {key}, and does not; the adapter was made for"
    )
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    refused(
        lambda: load_expert_lora(base_model(num_experts=4), broken), "must hold|must have shape"
    )  # 5 experts in the file


def test_files_that_cannot_be_read(broken):
    weights = (broken / WEIGHTS_NAME).read_bytes()
    (broken / WEIGHTS_NAME).write_bytes(weights[: len(weights) // 2])
    refused(lambda: load_expert_lora(base_model(), broken), "cannot be read, a file may be truncated")
    (broken / WEIGHTS_NAME).write_bytes(weights)
    (broken / CONFIG_NAME).write_text("{")
    refused(lambda: load_expert_lora(base_model(), broken), "cannot be read, a file may be truncated")
    (broken / CONFIG_NAME).unlink()
    refused(
        lambda: load_expert_lora(base_model(), broken), "must hold adapter_config.json", FileNotFoundError
    )


def test_beside_mixtures_of_attention():
    base = tiny_model(BAM, num_hidden_layers=1)
    model = copy.deepcopy(base)
    add_expert_lora(model)
    assert_equal_logits(model, base)
    assert (logits(fill(model)) - logits(base)).abs().max() > 0.1
