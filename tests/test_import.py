"""What may import what, and that the folder `kernels/` never shadows the package transformers imports."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("kernels/moe_runtime_kernels", "moe_runtime", "upcycle")
OF_TRANSFORMERS = ("moe_runtime/hf/", "moe_runtime/train/")


def run_python(code: str, **environment: str) -> str:
    """Run `code` in a fresh interpreter at the root of the checkout, as `python -c` of a user there would."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def imported_names(path: Path) -> set[str]:
    """Top-level names of absolute imports anywhere in a file, lazy ones included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def files_importing(package: str) -> set[str]:
    found = set()
    for folder in SOURCE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if any(name.split(".")[0] == package for name in imported_names(path)):
                found.add(path.relative_to(ROOT).as_posix())
    return found


def test_transformers_is_imported_only_under_hf_and_train():
    assert {name for name in files_importing("transformers") if not name.startswith(OF_TRANSFORMERS)} == set()


def test_triton_is_imported_only_by_kernel_files():
    allowed = "kernels/moe_runtime_kernels/_triton/"
    assert {name for name in files_importing("triton") if not name.startswith(allowed)} == set()


def test_upcycle_imports_no_kernels():
    assert {name for name in files_importing("moe_runtime_kernels") if name.startswith("upcycle/")} == set()


def test_kernels_import_nothing_of_the_runtime():
    for package in ("moe_runtime", "upcycle", "transformers"):
        assert {n for n in files_importing(package) if n.startswith("kernels/")} == set()


@pytest.mark.parametrize("module", ["moe_runtime.config", "moe_runtime.families", "moe_runtime.flops"])
def test_descriptions_load_without_torch(module):
    loaded = run_python(
        f"import sys, {module}; print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert loaded == "False"


@pytest.mark.parametrize("package", ["moe_runtime_kernels", "moe_runtime", "upcycle"])
def test_import_needs_neither_triton_nor_a_gpu(package):
    code = f"import sys; sys.modules['triton'] = None; import {package}; print('transformers' in sys.modules)"
    assert run_python(code, CUDA_VISIBLE_DEVICES="") == "False"


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_moe_models_import_from_the_checkout():
    code = "from transformers import MixtralForCausalLM; print(MixtralForCausalLM.__name__)"
    assert run_python(code) == "MixtralForCausalLM"


def test_an_installed_kernels_distribution_wins(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("OWNER = 'installed'\n")
    code = "import kernels; print(kernels.OWNER)"
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    assert run_python(code, PYTHONPATH=path) == "installed"
