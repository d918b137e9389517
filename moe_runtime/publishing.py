"""What a checkpoint folder needs besides weights to load with `trust_remote_code=True`. Torch-free.

The published code imports this package by name, so the reader needs it installed, but never imports it by
hand.
"""

from pathlib import Path

MODEL_TYPE = "moe_runtime"
ARCHITECTURE = "MoeRuntimeForCausalLM"
AUTO_MAP = {
    "AutoConfig": "configuration.MoeRuntimeConfig",
    "AutoModel": "modeling.MoeRuntimeModel",
    "AutoModelForCausalLM": f"modeling.{ARCHITECTURE}",
}


def published_files() -> list[Path]:
    """The source files that `AUTO_MAP` names and that those import from beside them; copy them into the
    checkpoint folder under their own names.
    """
    folder = Path(__file__).with_name("hf")
    return [folder / name for name in ("configuration.py", "modeling.py", "rotary.py")]
