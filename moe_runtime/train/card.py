"""README.md of a trained model, with the metadata that model hubs read."""

from pathlib import Path
from typing import Any

import yaml

from moe_runtime.publishing import MODEL_TYPE

from .recipe import TrainRecipe


def model_card(recipe: TrainRecipe, record: dict[str, Any]) -> str:
    result = record["result"]
    counts = record["parameters"].values()
    front = {
        "base_model": [Path(recipe.model).name],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fine-tuned", *(["moe"] if "experts" in record["parameters"] else [])],
    }
    losses = [entry["lm_loss"] for entry in result["log"] if "lm_loss" in entry]
    loss = f" The loss went from {losses[0]:.3f} to {losses[-1]:.3f} nats per label." if losses else ""
    evaluated = "".join(f"| {name} | {value:.4f} |\n" for name, value in result["metrics"].items())
    table = f"\n| evaluated | nats per label |\n|---|---|\n{evaluated}" if evaluated else ""
    imported = "import moe_runtime.hf  # knows the model\n" if record["model_type"] == MODEL_TYPE else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {Path(recipe.output).name}

{Path(recipe.model).name}, trained for {result["steps"]:,} steps on {result["tokens"]:,} tokens.{loss}
{sum(c["all"] for c in counts):,} parameters, {sum(c["trained"] for c in counts):,} of them trained.
`training.json` holds the recipe, the data with hashes, and the log.
{table}
```python
{imported}from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

## Recipe

```yaml
{yaml.safe_dump(recipe.to_dict(), sort_keys=False)}```
"""
