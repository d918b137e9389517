"""The `moe-runtime` command. What a command needs is imported when it runs, so that help is there at once."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from upcycle.cli import replicas_command, upcycle_command, verify_command
from upcycle.upit.cli import upit_command

from .config import ModelConfig
from .demo.cli import demo_command
from .evaluation.cli import eval_command
from .flan.cli import flan_command
from .profile.cli import profile_command
from .shapes import SHAPES, named_shape
from .stats.cli import stats_command
from .train.cli import train_command
from .train.data.instructions_cli import instructions_command
from .train.export_cli import export_command
from .train.plan_cli import plan_command

app = typer.Typer(
    name="moe-runtime",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 success; 2 a mistake of the user, told in one sentence on stderr; 1 a fault of ours; 130 an interrupt.
    `--debug`, anywhere among the arguments, lets the exception through with its traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        code = app(
            [word for word in words if word != "--debug"], prog_name="moe-runtime", standalone_mode=False
        )
    except Exception as error:
        if debug:
            raise
        sentence, code = _explain(error)
        print(f"moe-runtime: {sentence}", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> tuple[str, int]:
    """What to tell the user about an exception, on one line, and the exit code."""
    if hasattr(error, "format_message"):  # a usage error; its class has another home in every typer
        return f"{' '.join(error.format_message().split()).rstrip('.')}. See --help.", 2
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError):
        return text, 2
    return f"{type(error).__name__}: {text or 'no message'} (run again with --debug for the traceback)", 1


@app.callback(invoke_without_command=True)
def _global_options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Mixture-of-Experts models that start from dense checkpoints."""
    # `debug` is here for the help only: main() reads it, wherever it stands
    if version:
        from importlib import metadata

        print(metadata.version("moe-runtime"))
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2))


# --- flops ---


def _read_config(source: str) -> ModelConfig:
    """The model in a checkpoint folder or a config.json, or a named shape."""
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir() or path.suffix == ".json" or len(path.parts) > 1:
            raise FileNotFoundError(f"CONFIG: there is no file {file}")
        return named_shape(source)
    from .families import model_config

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold one JSON object, got {type(values).__name__}")
    try:
        return model_config(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


@app.command("flops", epilog="Example: moe-runtime flops mixtral-8x7b --context 4096 --convention causal")
def flops_command(
    config: Annotated[
        str,
        typer.Argument(help=f"A checkpoint folder, a config.json, or one of: {', '.join(SHAPES)}."),
    ],
    context: Annotated[int, typer.Option(help="Tokens of a sequence; attention grows with it.")] = 2048,
    convention: Annotated[
        str,
        typer.Option(
            help="Attention counted causal (exact mean), full (as PyTorch does) or half (as BAM does)."
        ),
    ] = "causal",
    batch_size: Annotated[int, typer.Option(help="Sequences that a decode step serves.")] = 1,
    bytes_per_value: Annotated[
        int, typer.Option(help="Of weights and cache: 2 for bfloat16, 4 for float32.")
    ] = 2,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count parameters, FLOPs and bytes of a model, beside dense models of equal FLOPs and of equal width."""
    from .flops_report import flops_report, print_flops_report

    report = flops_report(
        _read_config(config),
        context=context,
        convention=convention,  # type: ignore[arg-type]  # checked where it is used
        batch_size=batch_size,
        bytes_per_value=bytes_per_value,
    )
    if json_output:
        _print_json({"config": config, **report})
    else:
        print_flops_report(config, report)


# --- generate ---


@app.command("generate", epilog='Example: moe-runtime generate runs/copy --prompt "In the beginning"')
def generate_command(
    path: Annotated[Path, typer.Argument(help="A checkpoint folder with its tokenizer.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token; above, tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    static_cache: Annotated[
        bool, typer.Option("--static-cache", help="Reserve the whole cache at once.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
) -> None:
    """Continue a prompt; the text appears as it is made."""
    import torch

    from .generate import generate_text
    from .hf.loading import load_causal_lm, load_tokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be cpu where there is no CUDA GPU, got {device!r}")
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(path, device=device)
    unprinted = prompt  # until there is something to print after it: a refused prompt prints nothing

    def show(text: str) -> None:
        nonlocal unprinted
        print(unprinted + text, end="", flush=True)
        unprinted = ""

    result = generate_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        static_cache=static_cache,
        on_text=None if json_output else show,
    )
    if json_output:
        _print_json({**asdict(result), "tokens_per_second": result.new_tokens / result.seconds})
        return
    print(unprinted)
    rate = result.new_tokens / result.seconds
    print(
        f"{result.new_tokens} tokens, {rate:.1f} per second, stopped by {result.stopped_by}", file=sys.stderr
    )


# --- commands of other parts ---

app.command("demo", epilog="Example: moe-runtime demo --text contracts=my/contracts.txt")(demo_command)
app.command("eval", epilog="Example: moe-runtime eval runs/copy --text prose.txt --json")(eval_command)
app.command("flan", epilog="Example: moe-runtime flan flan.yaml")(flan_command)
app.command("instructions", epilog="Example: moe-runtime instructions tasks --samples 2000")(
    instructions_command
)
app.command("export", epilog="Example: moe-runtime export runs/tuned/checkpoints/checkpoint-50 runs/at-50")(
    export_command
)
app.command("plan", epilog="Example: moe-runtime plan recipe.yaml --processes 4")(plan_command)
app.command("profile", epilog="Example: moe-runtime profile runs/copy --html")(profile_command)
app.command("replicas", epilog="Example: moe-runtime replicas runs/copy --text code.txt --experts 12")(
    replicas_command
)
app.command("stats", epilog="Example: moe-runtime stats runs/copy --text code.txt --text prose.txt")(
    stats_command
)
app.command("train", epilog="Example: moe-runtime train recipe.yaml --dry-run")(train_command)
app.command("upcycle", epilog="Example: moe-runtime upcycle upcycle/recipes/btx.yaml --dry-run")(
    upcycle_command
)
app.command("upit", epilog="Example: moe-runtime upit upcycle/upit/example.yaml --dry-run")(upit_command)
app.command("verify", epilog="Example: moe-runtime verify runs/btx --json")(verify_command)


if __name__ == "__main__":
    sys.exit(main())
