"""Documentation that is run: links resolve, README's code works, README's commands do what they say."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from dense_models import save_dense

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [body for name, body in BLOCK.findall(text) if name == language]


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def heading_anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in heading_anchors(path), (
                f"{page.name} links to {target}, but there is no such heading"
            )


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_readme_python_runs(number, tmp_path):
    code = blocks("python")[number]
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_readme_has_code_and_commands():
    assert blocks("python")
    assert commands()


@pytest.mark.parametrize("target", [c.removeprefix("make ") for c in commands() if c.startswith("make ")])
def test_readme_make_targets_exist(target):
    result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_readme_commands_run(tmp_path):
    """README's `moe-runtime` commands, in their order, on a tiny checkpoint in the place of the real one."""
    checkpoint = tmp_path / ".cache" / "smollm2-135m"
    checkpoint.mkdir(parents=True)
    byte_tokenizer().save_pretrained(checkpoint)
    save_dense(checkpoint, "llama", vocab_size=VOCAB_SIZE, max_position_embeddings=512)
    for folder in ("upcycle", "moe_runtime"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    ours = [shlex.split(line) for line in commands() if line.startswith("moe-runtime ")]
    assert ours
    for words in ours:
        if words[1] == "demo":
            continue  # minutes long; tests/moe_runtime/test_demo.py runs it on a tiny checkpoint
        result = subprocess.run(
            [sys.executable, "-m", "moe_runtime.cli", *words[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}\n{result.stderr}"


def test_every_command_is_of_a_known_kind():
    known = ("make ", "moe-runtime ", "git clone ", "cd ", "pip install ", "source ", ". ")
    assert [line for line in commands() if not line.startswith(known)] == []


def test_the_example_of_the_comparison_is_a_recipe():
    """README runs the other one."""
    from moe_runtime.flan.recipe import load_recipe

    recipe = load_recipe(ROOT / "moe_runtime" / "flan" / "example.yaml")
    assert recipe.mixture == "runs/granular"
    assert [task.name for task in recipe.tasks] == ["find_word", "find_book"]
