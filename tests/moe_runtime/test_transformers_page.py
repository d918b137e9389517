"""The page on transformers: its examples run, and its tables say what the tests of the families found."""

import re
from pathlib import Path

import pytest
import transformers
from moe_families import FAMILIES, is_at_least

PAGE = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
EXPERTS = re.compile(r"^@use_experts_implementation(?:\((.*)\))?\nclass (\w+)\(", re.MULTILINE)
SERVED = {"has_bias=True", "has_gate=False"}  # by expert_ffn


def experts_classes():
    """Model folder of each experts class of transformers, and whether it runs from the parts."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for flags, name in EXPERTS.findall(text):
            own = "def _apply_gate" in text.split(f"class {name}(")[1].split("\nclass ")[0]
            yield path.parent.name, own or bool(set(flags.split(", ")) - SERVED - {""})


@pytest.mark.parametrize("code", CODE, ids=["one-argument", "routers-too"])
def test_the_example_runs(code):
    exec(compile(code, "docs/transformers.md", "exec"), {"__name__": "example"})


def test_the_table_has_every_family():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\S+) \|$", PAGE, re.MULTILINE)
    assert rows == [
        (name, family.experts, "`route_topk`" if family.router else "unchanged")
        for name, family in sorted(FAMILIES.items())
    ]


@pytest.mark.skipif(not is_at_least("5.23"), reason="the page counts the classes of transformers 5.23")
def test_the_experts_that_run_from_parts_are_named():
    classes = list(experts_classes())
    assert f"The {len(classes)} experts classes of transformers 5.23 " in PAGE
    (sentence,) = re.findall(r"From the parts run those of (.*?):", PAGE)
    assert re.findall(r"`(\w+)`", sentence) == [name for name, from_parts in classes if from_parts]
