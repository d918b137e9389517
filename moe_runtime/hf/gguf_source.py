"""A GGUF file as an ordinary checkpoint folder: safetensors, config and tokenizer."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .quiet import quiet_transformers


def save_gguf_tokenizer(source: Path, output: Path) -> list[Path]:
    """Write the tokenizer of a GGUF file to a folder; returns the files."""
    before = set(output.iterdir())
    # one of transformers' progress bars heeds no setting; tokenizer files beside the GGUF file would win
    with TemporaryDirectory() as alone, quiet_transformers(), redirect_stderr(io.StringIO()):
        (Path(alone) / "model.gguf").symlink_to(source.resolve())
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", local_files_only=True)
        tokenizer.save_pretrained(output)
    return sorted(set(output.iterdir()) - before)


def convert_gguf(source: Path, output: Path) -> None:
    """Write the model and tokenizer of a GGUF file to a folder, de-quantized to bfloat16.

    transformers refuses to save a model that came from GGUF, so its weights move to a fresh one.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package `gguf` is not installed.
    """
    if not source.is_file():
        raise FileNotFoundError(f"source must be a GGUF file, and there is no {source}")
    place = {"gguf_file": source.name, "local_files_only": True}
    # one of transformers' progress bars heeds no setting
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **place)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **place)
        values = loaded.config.to_dict()
        for name in ("quantization_config", "_name_or_path"):
            values.pop(name, None)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
