"""Load any causal LM and its tokenizer from a folder: our own models and every transformers family."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

import moe_runtime.hf  # noqa: F401  registers our model with the Auto classes


def load_causal_lm(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attention: str | None = None,
) -> PreTrainedModel:
    """The model in a checkpoint folder, in eval mode.

    Args:
        path: a folder with config.json and weights, as `save_pretrained` or `upcycle` writes it.
        dtype: of the weights; "auto" keeps the file's.
        device: where the model goes.
        attention: transformers' name of the attention implementation, such as "sdpa" or "flash_attention_2";
            None lets transformers choose one that computes the model.

    Raises:
        FileNotFoundError: if the folder, its config.json or its weights are missing.
        ValueError: if the model type is unknown, or the weights are not those that the config describes.
    """
    folder = _checkpoint_folder(path)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise FileNotFoundError(f"{folder} must hold model weights (*.safetensors), found none")
    if attention is None and json_object(folder / "config.json").get("attn_logit_softcapping"):
        attention = "eager"  # with its own choice, transformers 5.17 leaves out Gemma 2's cap
    try:
        with _progress_bar_on_terminals():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                local_files_only=True,
            )
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {folder} cannot be read, a file may be truncated: {error}"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # such as too little memory
            raise
        raise ValueError(
            f"the weights in {folder} do not have the shapes that its config.json describes"
        ) from error
    for what in ("missing_keys", "unexpected_keys"):
        if names := sorted(report[what]):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            kind = "lack tensors" if what == "missing_keys" else "hold tensors without a place in the model"
            raise ValueError(f"the weights in {folder} {kind}: {', '.join(names[:3])}{more}")
    return model.to(device).eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder.

    Raises:
        FileNotFoundError: if the folder or its tokenizer files are missing.
    """
    folder = _checkpoint_folder(path)
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        raise FileNotFoundError(f"{folder} must hold a tokenizer (tokenizer.json), found none")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def _progress_bar_on_terminals() -> Iterator[None]:
    """transformers draws its bar into pipes and log files too, where it tears other lines apart."""
    hide = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()


def _checkpoint_folder(path: str | Path) -> Path:
    """The folder, after checking that its config.json names a model type that can be built, and its index."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be a checkpoint folder, and there is no such folder")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} must hold a config.json, and has none")
    model_type = json_object(file).get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type in {file} must be one that transformers knows, got {model_type!r}")
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not isinstance(json_object(index).get("weight_map"), dict):
        raise ValueError(f"{index} must have a 'weight_map' from tensors to files, and has none")
    return folder


def json_object(file: Path) -> dict[str, Any]:
    """What the file holds. Raises ValueError, naming it, if that is not one JSON object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must be a JSON object, got {type(values).__name__}")
    return values
