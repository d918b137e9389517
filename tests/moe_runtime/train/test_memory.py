"""The plan of a run's memory against what PyTorch's allocator gives out in a step."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from allocated import peak_of
from moe_families import tiny_family
from moe_runtime_kernels import _cpu
from moe_runtime_kernels._cpu import onednn_has_bf16
from tiny_models import DENSE, MOE, tiny_model, tokens
from trainers import THEIR_WARNINGS
from transformers import Trainer, TrainingArguments

from moe_runtime.cli import main
from moe_runtime.train import model as model_module
from moe_runtime.train.data.rows import collate_packed
from moe_runtime.train.kernels import BYTES as KERNEL_BYTES
from moe_runtime.train.memory import plan_memory
from moe_runtime.train.model import prepare_model
from moe_runtime.train.optimizer_bytes import optimizer_bytes
from moe_runtime.train.recipe import recipe_from_dict

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "max_position_embeddings": 256,
}
LENGTH = 256


def make_recipe(folder, **train):
    data = {"train": ["none.jsonl"], "max_length": LENGTH, "packing": train.pop("packing", False)}
    parallel = train.pop("parallel", {})
    section = {"steps": 1, "batch_size": 2, "optimizer": "adamw_torch_fused", **train}
    values = {"model": str(folder), "output": str(folder / "out"), "data": data, "train": section}
    return recipe_from_dict(values | ({"parallel": parallel} if parallel else {}))


def measured(recipe) -> int:
    """The allocator's peak in the second update by this recipe, with full rows."""

    def prepare():
        model = prepare_model(recipe).model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        ids_BL = tokens(2, LENGTH)
        if recipe.data.packing:
            position_L = torch.arange(LENGTH)
            rows = [{"input_ids": i, "labels": i, "position_ids": position_L, "sample": ()} for i in ids_BL]
            inputs = collate_packed(rows)
            inputs.pop("sample")
        else:
            mask_BL = torch.ones_like(ids_BL)
            mask_BL[0, -1] = 0  # without padding transformers makes no mask
            inputs = {"input_ids": ids_BL, "labels": ids_BL, "attention_mask": mask_BL}

        def step():
            for _ in range(recipe.train.accumulate):
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bfloat16"):
                    loss = model(**inputs, num_items_in_batch=2 * LENGTH, use_cache=False).loss
                loss.backward()
                del loss
            optimizer.step()
            optimizer.zero_grad()

        step()
        return step

    return peak_of(prepare)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {"ours": tmp_path_factory.mktemp("ours"), "mixtral": tmp_path_factory.mktemp("mixtral")}
    tiny_model(
        MOE, **{name: value for name, value in SIZES.items() if name != "num_local_experts"}
    ).save_pretrained(made["ours"])
    tiny_family("mixtral", **SIZES).save_pretrained(made["mixtral"])
    return made


SETTINGS = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "packed": {"packing": True},
    "checkpointed": {"gradient_checkpointing": True},
    "recomputed": {"recompute_experts": True},
    "bfloat16": {"precision": "bfloat16"},
    "experts frozen": {"freeze": "experts"},
    "adapters": {"lora": {"rank": 4}},
}


CASES = [("ours", name) for name in SETTINGS] + [("mixtral", "plain"), ("mixtral", "checkpointed")]


@pytest.mark.parametrize(("kind", "name"), CASES)
@THEIR_WARNINGS
def test_the_peak_is_within_a_tenth_of_the_plan(folders, kind, name):
    recipe = make_recipe(folders[kind], **SETTINGS[name])
    plan, peak = plan_memory(recipe), measured(recipe)
    assert peak == pytest.approx(plan.peak - plan.kernels, rel=0.1)  # oneDNN's are not PyTorch's allocator's


@pytest.mark.skipif(not onednn_has_bf16(), reason="needs a processor with products of bfloat16")
@pytest.mark.parametrize("adapters", [None, {"rank": 8}])
@pytest.mark.parametrize("widened", [False, True])
def test_kernels_are_those_that_onednn_makes(folders, capfd, monkeypatch, widened, adapters):
    monkeypatch.setattr(_cpu, "BF16_IS_WIDENED", widened)
    monkeypatch.setitem(_cpu.MOST_NATIVE_ROWS, torch.bfloat16, 256 if widened else 8)
    recipe = make_recipe(folders["ours"], precision="bfloat16", **({"lora": adapters} if adapters else {}))
    planned = plan_memory(recipe).kernels // KERNEL_BYTES
    model = prepare_model(recipe).model.train()
    made = []
    for seed in range(4):
        ids_BL = tokens(2, LENGTH, seed=seed)
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
            loss.backward()
        lines = [line.split(",") for line in capfd.readouterr().out.splitlines() if ",create:" in line]
        made.append({(*line[8:9], line[-2]) for line in lines})
    first, all_of_them = len(made[0]), len(set().union(*made))
    assert first == all_of_them if widened else first < all_of_them  # other rows of experts in every batch
    # where they are widened, shapes of linear layers are counted that oneDNN sees in other models only
    assert all_of_them <= planned <= (16 if widened else 3 * all_of_them)


def test_what_a_plan_says_of_the_model(folders):
    plan = plan_memory(make_recipe(folders["ours"], freeze="experts"))
    model = prepare_model(make_recipe(folders["ours"])).model
    numel = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(count for name, count in numel.items() if ".experts." in name)
    assert plan.total_parameters == sum(numel.values())
    assert plan.trained_parameters == plan.total_parameters - experts
    assert plan.weights == 4 * plan.total_parameters
    assert plan.gradients == 4 * plan.trained_parameters
    assert plan.logits == 4 * 2 * LENGTH * 1000
    assert plan.kernels == 0  # in float32
    assert plan.peak == plan.weights + plan.optimizer + plan.step_peak
    of_x = 4 * 2 * LENGTH * 64
    assert plan.loss == of_x + 4 * 1000 * 64
    assert plan_memory(make_recipe(folders["ours"], lora={"rank": 4})).loss == of_x  # the head is frozen


def test_processes_share(folders):
    alone = plan_memory(make_recipe(folders["ours"]))
    sharded = plan_memory(make_recipe(folders["ours"], parallel={"data": "fsdp"}), processes=4)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(sharded, name) == pytest.approx(getattr(alone, name) / 4, rel=0.01)
    assert sharded.step_peak < alone.step_peak
    assert sharded.gathered > 0
    spread = plan_memory(make_recipe(folders["ours"], parallel={"data": "ddp", "experts": 2}), processes=2)
    experts = 4 * SIZES["num_hidden_layers"] * 4 * 3 * 64 * 128
    assert spread.weights == alone.weights - experts // 2
    assert spread.gathered == 0


@pytest.mark.parametrize(
    ("parallel", "processes", "message"),
    [
        ({}, 2, "parallel.data must be 'ddp' or 'fsdp' with 2 processes, got 'none'"),
        ({"data": "fsdp", "experts": 4}, 6, "must divide the number of processes, which is 6, got 4"),
        ({"data": "fsdp"}, 0, "--processes must be at least 1, got 0"),
    ],
)
def test_processes_that_do_not_fit_are_refused(folders, parallel, processes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_memory(make_recipe(folders["ours"], parallel=parallel), processes)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a checkpoint folder with a config\.json, and has none"):
        plan_memory(make_recipe(tmp_path))


def test_a_loss_of_logits_makes_no_gradients_in_forward(folders, monkeypatch):
    monkeypatch.setattr(model_module, "linear_loss_obstacle", lambda _: "of this test")
    assert plan_memory(make_recipe(folders["ours"])).loss == 0


def test_rows_longer_than_the_model_takes_are_refused(folders):
    recipe = make_recipe(folders["ours"])
    longer = replace(recipe, data=replace(recipe.data, max_length=257))
    with pytest.raises(
        ValueError, match=r"data\.max_length must be at most 256, which the model takes, got 257"
    ):
        plan_memory(longer)


def test_the_command(folders, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    recipe = make_recipe(folders["ours"])
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    assert main(["plan", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == plan_memory(recipe).to_dict()
    assert main(["plan", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "571,968 parameters, 571,968 of them trained; 512 tokens in a micro-batch" in shown
    assert re.search(r"step peak .*0\.0\d\d", shown)


# --- optimizers ---


def states_of(optimizer) -> int:
    tensors = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in tensors if t.dim())  # the number of steps aside


@pytest.mark.parametrize(
    "name", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"]
)
def test_states_are_those_of_trainers_optimizer(name, tmp_path):
    model = tiny_model(DENSE)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), optim=name, use_cpu=True, report_to="none"))
    optimizer = trainer.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    shapes = [(False, tuple(parameter.shape)) for parameter in model.parameters()]
    assert optimizer_bytes(name, shapes) == states_of(optimizer)


def test_eight_bits_have_a_scale_per_block():
    shapes = [(True, (100, 64)), (False, (100, 64)), (False, (64,))]
    # embeddings and small parameters keep float32
    assert optimizer_bytes("adamw_8bit", shapes) == 2 * (4 * 6400 + (6400 + 4 * 25) + 4 * 64)
    with pytest.raises(ValueError, match=r"train.optimizer must be one of sgd, .* for a plan, got 'lomo'"):
        optimizer_bytes("lomo", shapes)
