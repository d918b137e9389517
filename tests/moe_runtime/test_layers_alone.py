"""The page on layers: its examples run, each by itself, and its table has the forwards as they are."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from moe_runtime import layers
from moe_runtime.config import AttentionConfig, BlockConfig, FeedForwardConfig, RouterConfig

PAGE = (Path(__file__).parents[2] / "docs" / "layers.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^## ([^\n]*)\n((?:(?!^## ).)*)", PAGE, re.MULTILINE | re.DOTALL)
CODE = [
    pytest.param(code, id=f"{title}-{number}")
    for title, section in EXAMPLES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
]
ROWS = re.findall(r"^\| `(\w+)\(([^`]*)\)` \| `layer\(([^`]*)\)` \| `", PAGE, re.MULTILINE)


@pytest.mark.parametrize("code", CODE)
def test_the_example_runs(code):
    exec(compile(code, "docs/layers.md", "exec"), {"__name__": "example"})


def test_there_are_examples_and_a_table():
    assert len(CODE) == 6
    assert [name for name, _, _ in ROWS] == ["MoEFeedForward", "MixtureOfAttention", "ParallelBlock"]


@pytest.mark.parametrize(("name", "made_with", "called_with"), ROWS, ids=[row[0] for row in ROWS])
def test_the_table_has_the_arguments(name, made_with, called_with):
    layer = getattr(layers, name)
    configured = list(inspect.signature(layer).parameters.values())
    assert made_with.split(", ") == [
        parameter.annotation.__name__ if parameter.default is parameter.empty else f"{parameter.name}=None"
        for parameter in configured
    ]
    _, *arguments = inspect.signature(layer.forward).parameters.values()
    written = [re.sub(r" \[.*\]$", "", word) for word in re.split(r", (?![^\[]*\])", called_with)]
    assert [word.lstrip("*") for word in written] == [
        re.sub(r"^x_\w+$", "x", parameter.name)
        + ("" if parameter.default is parameter.empty else f"={parameter.default}")
        for parameter in arguments
    ]


@pytest.mark.parametrize("options", [{}, {"kv": "shared", "top_k": 2}], ids=["soft", "top-2"])
def test_no_tokens_through_a_parallel_block(options):
    router = RouterConfig(hidden_size=12, num_experts=4, experts_per_token=2)
    attention = AttentionConfig(
        hidden_size=12, num_heads=2, num_kv_heads=1, head_dim=6, num_experts=3, **options
    )
    feed_forward = FeedForwardConfig(hidden_size=12, intermediate_size=10, router=router)
    block = layers.ParallelBlock(
        BlockConfig(attention=attention, feed_forward=feed_forward, kind="parallel", num_norms=1)
    )
    x_BLD = torch.zeros(2, 0, 12, requires_grad=True)
    out = block(x_BLD, layers.rotary_tables(torch.arange(0)[None], 6))
    (out.x_BLD.sum() + out.balance_loss + out.z_loss).backward()
    assert out.x_BLD.shape == x_BLD.grad.shape == (2, 0, 12)
    assert (out.balance_loss, out.z_loss, out.count_E.sum()) == (0, 0, 0)
