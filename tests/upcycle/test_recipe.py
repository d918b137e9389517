"""Recipes: what is filled in, and the sentence for everything that is wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import upcycle
import upcycle.recipe
from upcycle import RecipeError, load_recipe, recipe_from_dict
from upcycle.recipe import parse_size

COPY = {"method": "copy", "base": "a", "output": "out", "experts": 4}
BTX = {"method": "btx", "sources": ["a", "b", "c"], "output": "out"}
BAM = {**BTX, "method": "bam"}
EXAMPLES = sorted(Path(upcycle.recipe.__file__).with_name("recipes").glob("*.yaml"))


def test_methods_fill_in_their_own_routing():
    copy, btx, bam = (recipe_from_dict(values) for values in (COPY, BTX, BAM))
    assert (copy.experts, copy.experts_per_token, copy.router.gate, copy.router.z_loss_coef) == (
        4,
        2,
        "renorm",
        0.0,
    )
    assert (btx.experts, btx.experts_per_token, btx.router.gate, btx.base) == (3, 2, "renorm", "a")
    assert (bam.experts, bam.experts_per_token, bam.router.gate, bam.router.z_loss_coef) == (
        3,
        1,
        "raw",
        0.001,
    )
    assert (copy.attention, btx.attention) == (None, None)
    assert (bam.attention.kv, bam.attention.top_k) == ("expert", None)


@pytest.mark.parametrize(
    "values", [COPY, BTX, BAM, {**BTX, "layers": [2, 0]}], ids=["copy", "btx", "bam", "layers"]
)
def test_a_recipe_reads_back_what_it_writes(values):
    recipe = recipe_from_dict(values)
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_a_section_without_lines_is_the_default():
    """What is left when every line of a section is commented out."""
    assert recipe_from_dict({**BAM, "router": None, "attention": None}) == recipe_from_dict(BAM)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_valid_and_one_per_method(path):
    assert load_recipe(path).method == path.stem
    assert [example.stem for example in EXAMPLES] == ["bam", "btx", "copy"]


@pytest.mark.checkpoint
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run_on_the_model_of_the_demo(path, smollm2):
    assert Path(smollm2) == Path(".cache/smollm2-135m")
    recipe = replace(load_recipe(path), output="never-written")
    assert upcycle.upcycle(recipe, dry_run=True).plan.num_parameters > 200_000_000


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("4GiB", 2**32), ("30 kb", 30_000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


WRONG = [
    pytest.param(
        {**BTX, "router": {"expert_per_token": 2}},
        "recipe: unknown key 'expert_per_token' under 'router'; known keys: score, gate",
        id="unknown-key",
    ),
    pytest.param(
        {**BTX, "expert_per_token": 2},
        "recipe: unknown key 'expert_per_token'; did you mean 'experts_per_token'\\?",
        id="misspelt-key",
    ),
    pytest.param(
        {**BTX, "router": {"sede": 2}},
        "recipe: unknown key 'sede' under 'router'; did you mean 'seed'\\?",
        id="misspelt-key-in-section",
    ),
    pytest.param({"method": "copy"}, "key 'output' is missing", id="missing-key"),
    pytest.param(
        {**COPY, "method": "split"},
        "method must be one of 'copy', 'btx', 'bam', .*, got 'split'",
        id="method",
    ),
    pytest.param(
        {**COPY, "target": "llama"}, "target must be one of .*'mixtral'.*, got 'llama'", id="target"
    ),
    pytest.param({**COPY, "dtype": "int8"}, "dtype must be one of .*, got 'int8'", id="dtype"),
    pytest.param({**COPY, "output": ""}, "output must name the folder", id="no-output"),
    pytest.param({**COPY, "output": 3}, "output must be a text, got 3", id="output-type"),
    pytest.param({**COPY, "experts": "4"}, "experts must be a whole number, got '4'", id="experts-type"),
    pytest.param({**COPY, "experts": True}, "experts must be a whole number, got True", id="experts-bool"),
    pytest.param({**COPY, "experts": 0}, "experts must be at least 1, got 0", id="no-experts"),
    pytest.param(
        {"method": "copy", "base": "a", "output": "o"}, "method 'copy' needs 'experts'", id="copy-experts"
    ),
    pytest.param(
        {**COPY, "sources": ["a"]}, "one dense model under 'base' and no 'sources'", id="copy-sources"
    ),
    pytest.param({**BTX, "sources": ["a"]}, "needs two or more 'sources', got 1", id="one-source"),
    pytest.param({**BTX, "sources": "a"}, "sources must be a list, got 'a'", id="sources-type"),
    pytest.param({**BTX, "sources": ["a", 2]}, "sources must be a text, got 2", id="source-type"),
    pytest.param(
        {**BTX, "experts": 5}, "experts must be left out or be the 3 sources, got 5", id="experts-sources"
    ),
    pytest.param({**BTX, "base": "d"}, "base must be one of the sources unless non_expert", id="base"),
    pytest.param({**BTX, "attention": {}}, "attention belongs to method 'bam'", id="btx-attention"),
    pytest.param(
        {**BAM, "attention": {"kv": "own"}}, "attention.kv must be one of 'expert', 'shared'", id="kv"
    ),
    pytest.param(
        {**BAM, "attention": {"top_k": 4}}, "attention.top_k must be between 1 and .*3.*, got 4", id="top-k"
    ),
    pytest.param({**BAM, "attention": "shared"}, "attention must be a section", id="section"),
    pytest.param(
        {**BTX, "experts_per_token": 4}, "at most the number of experts \\(3\\), got 4", id="too-many"
    ),
    pytest.param({**BTX, "experts_per_token": 1}, "makes every gate 1 and no router learns", id="renorm-1"),
    pytest.param(
        {**BTX, "router": {"gate": "straight_through"}},
        "'straight_through' needs experts_per_token 1",
        id="st-2",
    ),
    pytest.param({**BTX, "router": {"std": 0}}, "router.std must be above 0, got 0", id="zero-router"),
    pytest.param({**BTX, "router": {"std": "big"}}, "router.std must be a number, got 'big'", id="std-type"),
    pytest.param(
        {**BTX, "router": {"std": float("nan")}}, "router.std must be finite, got nan", id="nan-router"
    ),
    pytest.param(
        {**BTX, "router": {"scale": float("inf")}}, "router.scale must be finite, got inf", id="scale-inf"
    ),
    pytest.param({**BTX, "router": {"scale": 0}}, "router.scale must be above 0, got 0", id="scale-zero"),
    pytest.param(
        {**BTX, "router": {"z_loss_coef": -1e-3}},
        "router.z_loss_coef must not be negative, got -0.001",
        id="negative-loss",
    ),
    pytest.param({**BTX, "layers": []}, "layers must be 'all', 'every_other' or a list", id="no-layers"),
    pytest.param({**BTX, "layers": [1.5]}, "layers must be 'all', 'every_other' or a list", id="layers-type"),
    pytest.param({**BTX, "block": "serial"}, "block must be one of 'sequential', 'parallel'", id="block"),
    pytest.param({**BTX, "max_shard_size": "5"}, "whole number with a unit, such as 5GB", id="shard-size"),
    pytest.param({**BTX, "max_shard_size": "0GB"}, "whole number with a unit, such as 5GB", id="shard-zero"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict(values)


FILES = [
    pytest.param(None, "there is no such recipe", id="missing"),
    pytest.param("method: [copy", "not valid YAML", id="not-yaml"),
    pytest.param("- copy", "must be a list of 'key: value' lines", id="a-list"),
    pytest.param(
        "method: copy\nbse: a\noutput: o\n", "unknown key 'bse'; did you mean 'base'", id="unknown-key"
    ),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_messages_name_the_file(text, message, tmp_path):
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=rf"r\.yaml: .*{message}"):
        load_recipe(path)


def test_a_recipe_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RecipeError, match=r"r\.yaml: the recipe cannot be read"):
        load_recipe(path)
