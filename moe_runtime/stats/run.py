"""Statistics of a checkpoint folder over text files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..machine import describe_machine
from ..text import ROW_LENGTH, token_rows
from .measure import expert_stats


def measure_model(
    path: Path, texts: Mapping[str, str], *, max_tokens: int, device: str, console: Console
) -> dict[str, Any]:
    """The report of a model as JSON values.

    Args:
        path: a checkpoint folder with its tokenizer.
        texts: files by the name of their domain.
        max_tokens: of each file.
        device: where the model runs.
        console: where progress goes, if it is a terminal.

    Raises:
        OSError, ValueError: the model or a text is not usable.
    """
    from ..hf.loading import load_causal_lm, load_tokenizer
    from ..hf.profiled import read_config
    from ..hf.quiet import quiet_transformers

    with quiet_transformers():
        tokenizer = load_tokenizer(path)
        longest = getattr(read_config(path / "config.json"), "max_position_embeddings", ROW_LENGTH)
        rows = {
            name: token_rows(file, tokenizer, max_tokens=max_tokens, longest_row=longest)
            for name, file in texts.items()
        }
        model = load_causal_lm(path, device=device)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            total = sum(row.numel() for of_text in rows.values() for row in of_text)
            bar = progress.add_task("Reading", total=total)
            stats = expert_stats(model, rows, on_batch=lambda tokens: progress.advance(bar, tokens))
    report = {
        "model": str(path),
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": describe_machine(),
        **stats.to_dict(),
    }
    # tuples become lists, so that the report in memory equals the one in the file
    return json.loads(json.dumps(report))
