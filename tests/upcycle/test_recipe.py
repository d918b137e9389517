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
NOISE = {**COPY, "method": "noise", "noise": {"std": 0.1}}
DROP = {**COPY, "method": "drop"}
GRANULAR = {**COPY, "method": "granular", "granular": {"shards": 2}}
SHARED = {**COPY, "method": "shared_expert", "shared_expert": {"expert_width": 8}}
REPLICATE = {"method": "replicate", "base": "a", "output": "out", "replicate": {"counts": [1, 2]}}
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


def test_sections_are_filled_in():
    drop, granular, replicate = (recipe_from_dict(values) for values in (DROP, GRANULAR, REPLICATE))
    assert (drop.drop.ratio, drop.drop.shared_indices, drop.experts_per_token) == (0.5, True, 2)
    four = recipe_from_dict({**GRANULAR, "granular": {"shards": 4}})
    assert (granular.experts_per_token, four.experts_per_token) == (2, 4)
    assert (granular.drop, granular.granular.scale_mode) == (None, "exact")
    assert (replicate.experts, replicate.experts_per_token, replicate.router.gate) == (None, None, None)
    assert replicate.replicate.noise_on == "selection_bias"
    native = recipe_from_dict({**REPLICATE, "target": "mixtral"})
    assert native.replicate.noise_on == "weights"


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(COPY, id="copy"),
        pytest.param(BTX, id="btx"),
        pytest.param(BAM, id="bam"),
        pytest.param(NOISE, id="noise"),
        pytest.param(DROP, id="drop"),
        pytest.param({**GRANULAR, "drop": {"ratio": 0.25}}, id="granular"),
        pytest.param(SHARED, id="shared-expert"),
        pytest.param(REPLICATE, id="replicate"),
        pytest.param({**REPLICATE, "replicate": {"counts": [[1, 2], [2, 1]]}}, id="replicate-by-layer"),
        pytest.param({**BTX, "layers": [2, 0]}, id="layers"),
        pytest.param({**COPY, "layers": {"first_dense": 1, "moe_every": 2}}, id="rule-for-layers"),
    ],
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
    methods = ["bam", "btx", "copy", "drop", "granular", "replicate", "shared_expert"]
    assert [example.stem for example in EXAMPLES] == methods


def test_the_example_of_replication_runs_on_what_the_one_of_copies_writes(dense, run):
    (path,) = (path for path in EXAMPLES if path.stem == "replicate")
    recipe = load_recipe(path)
    copied = next(load_recipe(path) for path in EXAMPLES if path.stem == "copy")
    assert recipe.base == copied.output
    mixture = run(method="copy", base=dense("llama"), experts=2, target=copied.target)
    recipe = replace(recipe, base=str(mixture), output="never-written")
    assert upcycle.upcycle(recipe, dry_run=True).plan.model.num_experts == 4


@pytest.mark.checkpoint
@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem != "replicate"], ids=lambda path: path.stem
)
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
    pytest.param({**COPY, "experts": 1025}, "experts must be at most 1024, got 1025", id="most-experts"),
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
    pytest.param(
        {**COPY, "drop": {}},
        "drop belongs to method 'drop' or 'granular', got it with method 'copy'",
        id="drop",
    ),
    pytest.param({**DROP, "noise": {"std": 1}}, "noise belongs to method 'noise'", id="noise-in-drop"),
    pytest.param(
        {**COPY, "method": "noise"}, "method 'noise' needs a section 'noise' with 'std'", id="no-section"
    ),
    pytest.param({**DROP, "drop": {"ratio": 1.5}}, "drop.ratio must be between 0 and 1, got 1.5", id="ratio"),
    pytest.param({**DROP, "drop": {"ratio": float("nan")}}, "drop.ratio must be between", id="ratio-nan"),
    pytest.param(
        {**DROP, "drop": {"seed": 0.5}}, "drop.seed must be a whole number, got 0.5", id="drop-seed"
    ),
    pytest.param(
        {**DROP, "drop": {"shared_indices": 1}}, "drop.shared_indices must be true or false", id="shared-one"
    ),
    pytest.param(
        {**NOISE, "noise": {"std": -0.1}}, "noise.std must be finite and not negative, got -0.1", id="std"
    ),
    pytest.param(
        {**NOISE, "noise": {"std": 1, "share": 2}}, "noise.share must be between 0 and 1", id="share"
    ),
    pytest.param(
        {**GRANULAR, "granular": {"shards": 3}},
        r"experts must be a multiple of granular.shards \(3\), .*got 4",
        id="experts-shards",
    ),
    pytest.param(
        {**GRANULAR, "experts_per_token": 3},
        r"experts_per_token must be a multiple of granular.shards \(2\), .*got 3",
        id="k-shards",
    ),
    pytest.param(
        {**GRANULAR, "granular": {"shards": 1}},
        "makes every gate 1 and no router learns; use 'straight_through'",
        id="one-shard",
    ),
    pytest.param({**GRANULAR, "granular": {"shards": 0}}, "granular.shards must be at least 1", id="shards"),
    pytest.param(
        {**GRANULAR, "granular": {"shards": 2, "scale_mode": "root"}},
        "granular.scale_mode must be one of 'exact', 'cuberoot', 'none', got 'root'",
        id="scale-mode",
    ),
    pytest.param(
        {**GRANULAR, "router": {"gate": "raw", "score": "sigmoid"}},
        "granular.scale_mode must be 'none' with router.gate 'raw' and router.score 'sigmoid'",
        id="raw-sigmoid",
    ),
    pytest.param(
        {**GRANULAR, "router": {"init": "file", "path": "x"}},
        "router.init must be 'normal' or 'orthogonal' with method 'granular', .*got 'file'",
        id="granular-init",
    ),
    pytest.param(
        {**SHARED, "shared_expert": {"expert_width": 8, "residual_scale": -1}},
        "shared_expert.residual_scale must be finite and not negative, got -1",
        id="residual-scale",
    ),
    pytest.param(
        {**REPLICATE, "replicate": {"counts": [1, 0]}},
        "replicate.counts must be at least 1, got 0",
        id="counts",
    ),
    pytest.param(
        {**REPLICATE, "replicate": {"counts": []}}, "replicate.counts must be a number or one", id="no-counts"
    ),
    pytest.param(
        {**REPLICATE, "replicate": {"counts": 2, "noise": float("inf")}},
        "replicate.noise must be finite",
        id="noise-inf",
    ),
    pytest.param(
        {**REPLICATE, "experts": 4},
        "experts must be left out with method 'replicate'",
        id="replicate-experts",
    ),
    pytest.param(
        {**REPLICATE, "router": {"gate": "raw"}},
        "router must be left out with method 'replicate', which keeps the mixture's own",
        id="replicate-router",
    ),
    pytest.param(
        {**REPLICATE, "sources": ["a"]},
        "has one mixture under 'base' and no 'sources'",
        id="replicate-source",
    ),
    pytest.param(
        {**COPY, "layers": {"first_dense": -1}},
        "layers.first_dense must be at least 0, got -1",
        id="first-dense",
    ),
    pytest.param(
        {**COPY, "layers": {"every": 2}},
        "unknown key 'every' under 'layers'; did you mean 'moe_every'|known keys: first_dense, moe_every",
        id="layers-key",
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
