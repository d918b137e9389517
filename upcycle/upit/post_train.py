"""Train the assembled mixture, and write it (stage 4 of UpIT, second half).

    L = L_lm + c · Σ over layers of E · Σ_e f_e P_e

With `lora_experts: adapter` the adapters and the routers are trained, otherwise everything. The balance loss
is that of our own format for every target; transformers' own models would pool their layers first.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from moe_runtime.hf.loading import load_causal_lm
from moe_runtime.hf.lora import remove_expert_lora, save_expert_lora
from moe_runtime.hf.quiet import quiet_transformers
from moe_runtime.losses import load_balancing_loss
from moe_runtime.train.data.samples import Sample
from upcycle.checkpoint import read_json
from upcycle.provenance import RECORD_NAME, copy_file, model_name, write_text
from upcycle.provenance import write_json as write_synced_json
from upcycle.run import working_folder
from upcycle.sources import open_source
from upcycle.upit.assemble import ADAPTER_NAME, add_adapter
from upcycle.upit.files import write_json
from upcycle.upit.fit import Batch, Training, fit, steps_per_epoch
from upcycle.upit.models import language_loss
from upcycle.upit.recipe import UpitRecipe

# Epochs between two points at which the training can be resumed.
POINT = 0.25


def post_train(
    recipe: UpitRecipe,
    assembled: Path,
    experts: Sequence[str | Path],
    samples: Sequence[Sample],
    folder: Path,
    dtype: str,
    at_point: Callable[[int, float, float], None] = lambda step, epoch, loss: None,
) -> dict[str, Any]:
    """Train the mixture in `assembled` and write it to the recipe's output, going on where a run stopped.

    Args:
        experts: folders of the experts, which adapters are filled from.
        samples: of one epoch.
        folder: for the state of the training, and a copy of the output's record, by which it is known.
        dtype: of the output, as torch names it.
        at_point: called with step, epochs done and mean loss.

    Returns:
        The losses of the run, for the report.
    """
    settings = recipe.post_train
    model = None
    if settings.epochs or recipe.lora_experts == "adapter":
        model = load_causal_lm(assembled, dtype=torch.float32, device=recipe.device)
    if recipe.lora_experts == "adapter":
        add_adapter(model, experts)
    log = folder / "losses.json"
    losses: dict[str, float] = read_json(log) if log.is_file() else {}
    if settings.epochs:
        _train(recipe, model, samples, folder, losses, at_point)
    result = {"epochs": settings.epochs, "losses": losses}
    values = recipe.to_dict()
    for name in ("output", "work", "device"):
        del values[name]
    record = {**read_json(assembled / RECORD_NAME), "upit": values, "post_training": result}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD_NAME, record)
    _write(recipe, model, assembled, dtype, record)
    for path in folder.glob("state-*"):
        path.unlink()
    return result


def _train(
    recipe: UpitRecipe,
    model: Any,
    samples: Sequence[Sample],
    folder: Path,
    losses: dict[str, float],
    at_point: Callable[[int, float, float], None],
) -> None:
    """Train what requires a gradient; `losses` grows by one entry at each point."""

    def record(step: int, epoch: float, loss: float) -> None:
        losses[str(step)] = loss
        write_json(folder / "losses.json", losses)
        at_point(step, epoch, loss)

    folder.mkdir(parents=True, exist_ok=True)
    assert recipe.post_train.lr is not None
    model.train()
    fit(
        lambda batch, step: _loss(model, batch, recipe),
        [(recipe.post_train.lr, {name: p for name, p in model.named_parameters() if p.requires_grad})],
        samples,
        _training(recipe, len(samples)),
        states=folder,
        at_point=record,
    )


def _training(recipe: UpitRecipe, num_samples: int) -> Training:
    return Training(
        epochs=recipe.post_train.epochs,
        every=max(POINT, 1 / steps_per_epoch(num_samples, recipe.batch_size)),
        batch_size=recipe.batch_size,
        warmup=recipe.warmup,
        seed=recipe.seed,
        label="post_train",
        device=recipe.device,
        bfloat16=recipe.compute == "bfloat16",
    )


def _loss(model: Any, batch: Batch, recipe: UpitRecipe) -> Tensor:
    if model.config.model_type == "moe_runtime":  # adds the balance loss itself
        return language_loss(model, batch)
    model.router_aux_loss_coef = 0.0
    outputs = model(
        input_ids=batch.ids_BL,
        attention_mask=batch.mask_BL,
        labels=batch.labels_BL,
        use_cache=False,
        output_router_logits=True,
    )
    mask_T = batch.mask_BL.bool().flatten()
    balance = [
        _balance_loss(logits_TE, mask_T, recipe.experts_per_token) for logits_TE in outputs.router_logits
    ]
    return outputs.loss + recipe.post_train.aux_loss_coef * torch.stack(balance).sum()


def _balance_loss(logits_TE: Tensor, mask_T: Tensor, experts_per_token: int) -> Tensor:
    prob_TE = logits_TE.float().softmax(dim=-1)
    chosen_TK = prob_TE.topk(experts_per_token, dim=-1).indices
    chosen_TE = torch.zeros_like(prob_TE).scatter(1, chosen_TK, 1.0)
    count_E = (chosen_TE * mask_T[:, None]).sum(dim=0)
    return load_balancing_loss(prob_TE, count_E, experts_per_token, mask_T)


# --- the output ---


def _write(recipe: UpitRecipe, model: Any, assembled: Path, dtype: str, record: dict[str, Any]) -> None:
    """The mixture as assembled, with the weights that training has changed, rounded once."""
    output = Path(recipe.output).expanduser()
    adapter = recipe.lora_experts == "adapter"
    with working_folder(output) as folder:
        if adapter:
            save_expert_lora(model, folder / ADAPTER_NAME)
            remove_expert_lora(model)
        if recipe.post_train.epochs:
            with quiet_transformers():
                rounded = model.to(getattr(torch, dtype))
                rounded.save_pretrained(folder, max_shard_size=recipe.max_shard_size)
        for path in sorted(assembled.iterdir()):
            if not _is_weights(path, recipe):
                copy_file(path, folder / path.name)
        write_synced_json(folder / "config.json", {**read_json(assembled / "config.json"), "dtype": dtype})
        write_synced_json(folder / RECORD_NAME, record)
        write_text(folder / "README.md", _card(recipe, record["parameters"], record["upit"]))
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)


def _is_weights(path: Path, recipe: UpitRecipe) -> bool:
    """Whether a file of the assembled mixture holds weights that training has replaced."""
    return bool(recipe.post_train.epochs) and path.name.startswith("model") and ".safetensors" in path.name


def _card(recipe: UpitRecipe, parameters: int, values: dict[str, Any]) -> str:
    """README.md with the metadata that model hubs read."""
    front = {
        "base_model": [model_name(open_source(recipe.base))],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "upcycled", "upit"],
    }
    ours = recipe.target == "moe_runtime"
    remote_code = ", trust_remote_code=True" if ours else ""
    needs = "With the package `moe-runtime` installed:\n\n" if ours else ""
    adapter, imported = "", ""
    if recipe.lora_experts == "adapter":
        adapter = f'load_expert_lora(model, "path/to/this/folder/{ADAPTER_NAME}")\n'
        imported = "from moe_runtime.hf.lora import load_expert_lora\n"
    epochs = recipe.post_train.epochs
    trained = f"trained for {epochs:g} epochs since" if epochs else "not trained since"
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {recipe.target}, upcycled by upit

The experts are points of one fine-tuning of the base, and children of these (UpIT); assembled with
{recipe.route.init} routers, and {trained}. {parameters:,} parameters, {recipe.experts} experts,
{recipe.experts_per_token} per token. `{RECORD_NAME}` holds what was read, with hashes, and the losses.

{needs}```python
from transformers import AutoModelForCausalLM
{imported}
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{remote_code})
{adapter}```

## Recipe

```yaml
{yaml.safe_dump(values, sort_keys=False)}```
"""
