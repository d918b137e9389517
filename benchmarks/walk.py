"""`python -m benchmarks.walk` rewrites the table in docs/kernels.md of the way from a layer to its kernels.

    module -> public function -> registered operation -> launcher -> kernel

It is read from the source alone: which public functions a module's methods name, which operations a function
reaches in its file, which launcher `register_kernel` names, which kernels that launcher reaches. A gradient's
operation belongs to the function whose autograd calls it.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "moe_runtime_kernels"
PAGE = ROOT / "docs" / "kernels.md"
BEGIN = "<!-- written by `python -m benchmarks.walk` -->"
END = "<!-- end of the walk -->"


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One operation, and who is before and behind it; `kernels` are named with their file."""

    modules: tuple[str, ...]
    function: str
    operation: str
    launcher: str
    kernels: tuple[str, ...]


@dataclass(kw_only=True)
class Source:
    """What a file defines at its top level, and what it imports from files of this project."""

    path: Path
    definitions: dict[str, ast.AST] = field(default_factory=dict)
    imports: dict[str, tuple[Path, str]] = field(default_factory=dict)
    operations: dict[str, str] = field(default_factory=dict)  # variable -> registered operation
    launchers: dict[str, tuple[str, str]] = field(default_factory=dict)  # operation -> file, launcher


@cache
def read(path: Path) -> Source:
    source = Source(path=path)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            source.definitions[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            home = _home(path, node)
            for alias in node.names if home else ():
                source.imports[alias.asname or alias.name] = (home, alias.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = ast.unparse(node.value)
            if text.startswith("torch.ops.moe_runtime."):
                source.operations[node.targets[0].id] = "moe_runtime::" + text.split(".")[3]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            if isinstance(call.func, ast.Name) and call.func.id == "register_kernel":
                operation, file, launcher = map(ast.literal_eval, call.args)
                source.launchers[operation] = (file, launcher)
    return source


def _home(path: Path, node: ast.ImportFrom) -> Path | None:
    """The file that an import takes its names from; None if it is another project's."""
    parts = (node.module or "").split(".")
    if node.level:
        folder = path.parents[node.level - 1]
    elif parts[0] in ("moe_runtime", "moe_runtime_kernels"):
        folder = {"moe_runtime": ROOT, "moe_runtime_kernels": ROOT / "kernels"}[parts[0]]
    else:
        return None
    target = folder.joinpath(*filter(None, parts))
    return target / "__init__.py" if target.is_dir() else target.with_suffix(".py")


def reached(path: Path, name: str, seen: set[tuple[Path, str]] | None = None) -> Iterator[tuple[Path, str]]:
    """(file, name) of all that a definition names, and what those name, each once, in order."""
    seen = set() if seen is None else seen
    source = read(path)
    if name in source.imports:
        yield from reached(*source.imports[name], seen)
        return
    if (path, name) in seen or name not in source.definitions.keys() | source.operations.keys():
        return
    seen.add((path, name))
    yield path, name
    definition = source.definitions.get(name)
    # a kernel is the end of the way: what it names are its parts
    if definition is None or is_kernel(path, name):
        return
    for named in _names(definition):
        yield from reached(path, named, seen)


def _names(node: ast.AST) -> Iterator[str]:
    """The names in a definition, as one reads it; `ast.walk` would go level by level."""
    if isinstance(node, ast.Name):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _names(child)


def is_kernel(path: Path, name: str) -> bool:
    """Whether it is a function that Triton compiles."""
    definition = read(path).definitions.get(name)
    return isinstance(definition, ast.FunctionDef) and any(
        ast.unparse(decorator).startswith("triton.jit") for decorator in definition.decorator_list
    )


def public_functions() -> dict[str, Path]:
    """Public function -> its file, in the order of `moe_runtime_kernels`; classes are left out."""
    imports = read(KERNELS / "__init__.py").imports
    return {
        name: path
        for name, (path, _) in imports.items()
        if isinstance(read(path).definitions.get(name), ast.FunctionDef)
    }


def modules_of(function: str) -> tuple[str, ...]:
    """The modules of `moe_runtime` whose methods name the function."""
    found = []
    for path in sorted((ROOT / "moe_runtime").glob("*.py")):
        for name, node in read(path).definitions.items():
            is_module = isinstance(node, ast.ClassDef) and "nn.Module" in map(ast.unparse, node.bases)
            if is_module and function in read(path).imports and function in _names(node):
                found.append(name)
    return tuple(found)


def walks() -> list[Walk]:
    """Every operation that has kernels, once for each public function that reaches it."""
    launchers = {
        operation: launcher
        for path in sorted(KERNELS.glob("*.py"))
        for operation, launcher in read(path).launchers.items()
    }
    found = []
    for function, home in public_functions().items():
        for path, name in reached(home, function):
            operation = read(path).operations.get(name)
            if operation is None:
                continue
            file, launcher = launchers[operation]
            triton_file = KERNELS / "_triton" / f"{file}.py"
            kernels = tuple(
                f"{kernel_path.stem}.{kernel}"
                for kernel_path, kernel in reached(triton_file, launcher)
                if is_kernel(kernel_path, kernel) and kernel.endswith("_kernel")
            )
            found.append(
                Walk(
                    modules=modules_of(function),
                    function=function,
                    operation=operation,
                    launcher=f"{file}.{launcher}",
                    kernels=kernels,
                )
            )
    return found


def table() -> str:
    """The Markdown table; a cell that repeats the one above is left empty."""
    lines = ["| module | public function | operation | launcher | kernels |", "|---|---|---|---|---|"]
    above = ""
    for walk in walks():
        new = walk.function != above
        above = walk.function
        cells = (
            ", ".join(walk.modules) if new else "",
            f"`{walk.function}`" if new else "",
            f"`{walk.operation.removeprefix('moe_runtime::')}`",
            f"`{walk.launcher}`",
            ", ".join(f"`{kernel}`" for kernel in walk.kernels),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_page() -> str:
    """What docs/kernels.md must say by the source."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
