"""What a model can be made from: folders of safetensors or PyTorch files, GGUF files, adapters on a base."""

from pathlib import Path

from upcycle.checkpoint import Checkpoint, expanded, files_of, open_checkpoint, read_config, read_tensors
from upcycle.errors import UpcycleError
from upcycle.sources.adapter import ADAPTER_CONFIG, AdapterSource, open_adapter, read_adapter_config
from upcycle.sources.gguf_file import open_gguf
from upcycle.sources.plain import plain_folder
from upcycle.sources.pytorch import SINGLE_BIN, read_pickled

__all__ = ["AdapterSource", "open_source", "plain_folder"]


def open_source(spec: str | Path | AdapterSource) -> Checkpoint:
    """Read the configuration and all headers of a source; weights are not read.

    Args:
        spec: a folder with config.json and weights as safetensors or, where there are none, PyTorch files; a
            GGUF file; a folder of a LoRA adapter whose adapter_config.json names a base that is a folder
            here, or of an expert of UpIT.

    Raises:
        UpcycleError: a file is missing or damaged, or holds what is not opened.
    """
    if isinstance(spec, AdapterSource):
        return open_adapter(open_source(spec.base), expanded(spec.adapter))
    folder = expanded(spec)
    if folder.suffix == ".gguf" and not folder.is_dir():
        return open_gguf(folder)
    if (folder / "expert.json").is_file():
        from upcycle.upit.expert import open_expert

        return open_expert(folder)
    if (folder / ADAPTER_CONFIG).exists():
        if any(folder.glob("model.safetensors*")) or any(folder.glob(f"{SINGLE_BIN}*")):
            raise UpcycleError(
                f"{folder} holds a model and an adapter ({ADAPTER_CONFIG}); put the adapter into a folder of "
                "its own, and write the source as {base: FOLDER, adapter: FOLDER} if it is to be applied"
            )
        return open_adapter(open_source(_declared_base(folder)), folder)
    if (folder / "config.json").exists() and not any(folder.glob("model.safetensors*")):
        tensors = read_tensors(folder, SINGLE_BIN, read_pickled)
        if tensors is not None:
            return Checkpoint(folder, read_config(folder), tensors, files_of(tensors))
    return open_checkpoint(folder)


def _declared_base(folder: Path) -> Path:
    declared = read_adapter_config(folder).get("base_model_name_or_path")
    base = expanded(str(declared))
    if not declared or not base.is_dir():
        raise UpcycleError(
            f"{folder}: the adapter's base {declared!r} is no folder here; "
            f"write the source as {{base: FOLDER, adapter: {folder}}}"
        )
    return base
