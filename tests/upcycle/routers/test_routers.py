"""Every way a router can start, through a whole run."""

import json
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from dense_models import tensors_of
from safetensors.torch import load_file, save_file
from tiny_models import assert_equal_up_to_rounding, randn
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcycle
from moe_runtime.cli import main
from upcycle import RecipeError, UpcycleError, recipe_from_dict
from upcycle.plan import make_plan_for
from upcycle.routers.compute import compute

RUN = sys.modules["upcycle.run"]  # the package's attribute of that name may be the function
D = 32
MLP, ATTENTION = "model.layers.{}.mlp.router", "model.layers.{}.self_attn.router"


def routers_of(folder):
    return {name: tensor for name, tensor in tensors_of(folder).items() if ".router." in name}


def recipe(branches, texts=None, method="btx", **router):
    values = {"method": method, "sources": [str(folder) for folder in branches], "output": "never-written"}
    return recipe_from_dict({**values, "router": router | ({"data": texts} if texts else {})})


# --- drawn ---


def test_orthogonal_rows_are_at_right_angles_and_of_one_length(run, branches):
    routers = routers_of(run(method="bam", sources=branches, router={"init": "orthogonal", "row_norm": 0.5}))
    assert len(routers) == 6
    for name, weight_ED in routers.items():
        gram_EE = weight_ED.double() @ weight_ED.double().t()
        assert_equal_up_to_rounding(name, gram_EE, 0.25 * torch.eye(3).double(), 1e-6)
    for first, second in zip(routers.values(), [*routers.values()][1:], strict=False):
        assert not torch.equal(first, second)


def test_more_experts_than_the_model_is_wide_cannot_be_orthogonal(run, dense):
    with pytest.raises(UpcycleError, match=r"as many different rows as the model is wide \(32\), got 33"):
        run(method="copy", base=dense("llama"), experts=33, router={"init": "orthogonal"})
    shared_rows = {"method": "granular", "experts": 48, "granular": {"shards": 4}}
    folder = run(base=dense("llama"), router={"init": "orthogonal"}, **shared_rows)
    row_ED = tensors_of(folder)["model.layers.0.mlp.router.weight"]
    assert len(row_ED.unique(dim=0)) == 12


# --- from a file ---


@pytest.fixture
def weights():
    """Routers of three layers of a mixture of both kinds, not rounded to anything."""
    return {
        kind.format(layer): randn(3, D, seed=7 * layer) for layer in range(3) for kind in (MLP, ATTENTION)
    }


def test_a_file_gives_the_rows_bit_by_bit(run, branches, weights, tmp_path):
    path = tmp_path / "routers.safetensors"
    save_file(weights, path)
    folder = run(method="bam", sources=branches, router={"init": "file", "path": str(path)})
    for name, weight in routers_of(folder).items():
        assert torch.equal(weight, weights[name.removesuffix(".weight")]), name
    record = json.loads((folder / "upcycle.json").read_text())
    assert record["routers"] == {"path": str(path), "sha256": sha256(path.read_bytes()).hexdigest()}
    assert "its routers are given" in (folder / "README.md").read_text()


def test_a_file_for_the_names_of_another_format(run, branches, weights, tmp_path):
    path = tmp_path / "routers.safetensors"
    save_file({name: weight for name, weight in weights.items() if "mlp" in name}, path)
    folder = run(
        method="btx",
        sources=branches,
        target="mixtral",
        dtype="bfloat16",
        router={"init": "file", "path": str(path)},
    )
    for layer in range(3):
        gate = tensors_of(folder)[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert torch.equal(gate, weights[MLP.format(layer)].bfloat16())


FILES = [
    pytest.param(
        lambda w: w.pop(MLP.format(1)),
        r"model\.layers\.1\.mlp.router is missing; every layer with experts",
        id="missing",
    ),
    pytest.param(
        lambda w: w.update({MLP.format(1): randn(4, D)}),
        r"model\.layers\.1\.mlp\.router must have shape \(3, 32\), got \(4, 32\)",
        id="shape",
    ),
    pytest.param(
        lambda w: w.update({MLP.format(1): torch.ones(3, D).long()}),
        r"model\.layers\.1\.mlp\.router must be of type F32, F16, BF16, got I64",
        id="type",
    ),
    pytest.param(lambda w: w.update(more=randn(2)), "more is no router of this model", id="more"),
    pytest.param(
        lambda w: w[MLP.format(1)][0].fill_(float("nan")),
        r"model\.layers\.1\.mlp.router must be finite, and holds NaN",
        id="nan",
    ),
    pytest.param(
        lambda w: w[MLP.format(1)].zero_(),
        r"model\.layers\.1\.mlp\.router must not be all zeros, with which every token",
        id="zeros",
    ),
]


@pytest.mark.parametrize(("damage", "message"), FILES)
def test_a_file_that_does_not_fit_is_refused(damage, message, run, branches, weights, tmp_path):
    damage(weights)
    path = tmp_path / "routers.safetensors"
    save_file(weights, path)
    with pytest.raises(UpcycleError, match=f"routers.safetensors: tensor {message}"):
        run(method="bam", sources=branches, router={"init": "file", "path": str(path)})
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(run, branches):
    with pytest.raises(UpcycleError, match=r"router\.path: there is no file nowhere\.safetensors"):
        run(method="btx", sources=branches, router={"init": "file", "path": "nowhere.safetensors"})


# --- from text ---


def mlp_inputs(folder, text):
    """What the norm before each feed-forward gives for the text in one piece, [3, T, D]."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    outputs = []
    for block in model.model.layers:
        block.post_attention_layernorm.register_forward_hook(
            lambda *args: outputs.append(args[2][0].double())
        )
    with torch.no_grad():
        model(tokenizer(text, return_tensors="pt")["input_ids"])
    return torch.stack(outputs)


@pytest.mark.parametrize("init", ["centroid", "ridge"])
def test_routers_are_solved_from_what_the_base_gives_its_feed_forwards(init, run, branches, texts):
    """64 tokens are one row of a base with 64 positions; the rest of a text is not read."""
    folder = run(method="bam", sources=branches, router={"init": init, "data": texts, "max_tokens": 64})
    routers = routers_of(folder)
    assert len(routers) == 6
    x_ELTD = torch.stack([mlp_inputs(branches[0], Path(path).read_text()[:64]) for path in texts])
    for layer in range(3):
        x_ETD = x_ELTD[:, layer]
        mean_ED = x_ETD.mean(1)
        if init == "centroid":
            rows_ED, length = mean_ED - mean_ED.mean(0), 1.0
        else:
            moment_DD = torch.einsum("etd,etc->dc", x_ETD, x_ETD) / 64
            shift = 0.01 * x_ETD.square().sum() / 64 / D
            rows_ED, length = torch.linalg.solve(moment_DD + shift * torch.eye(D), mean_ED.t()).t(), 10.0
        expected = (length * torch.nn.functional.normalize(rows_ED, dim=1)).float()
        name = f"{MLP.format(layer)}.weight"
        assert_equal_up_to_rounding(name, routers[name], expected)


def test_long_texts_are_read_in_rows_of_the_models_length(branches, texts):
    """Their means are those of all rows, the short last one included."""
    plan = make_plan_for(recipe(branches, texts, init="centroid", max_tokens=100))
    seen = [[mlp_inputs(branches[0], part) for part in (text[:64], text[64:100])] for text in read(texts)]
    mean_ELD = torch.stack([torch.cat(parts, 1).mean(1) for parts in seen])
    expected = torch.nn.functional.normalize(mean_ELD - mean_ELD.mean(0), dim=2)
    shares = []
    with TemporaryDirectory() as folder:
        weights = compute(plan, Path(folder) / "routers.safetensors", on_share=shares.append)
        routers = load_file(Path(folder) / "routers.safetensors")
    for layer in range(3):
        name = MLP.format(layer)
        assert_equal_up_to_rounding(name, routers[name], expected[:, layer].float())
    assert [text["tokens"] for text in weights.record["texts"]] == [100, 75, 100]
    assert shares == pytest.approx([64 / 275, 100 / 275, 164 / 275, 175 / 275, 239 / 275, 1.0])


def read(texts):
    return [Path(path).read_text() for path in texts]


def test_upcycle_json_names_the_texts(run, branches, texts):
    folder = run(method="btx", sources=branches, router={"init": "ridge", "data": dict(enumerate(texts))})
    record = json.loads((folder / "upcycle.json").read_text())
    assert record["recipe"]["router"]["data"] == texts
    hashes = [sha256(Path(path).read_bytes()).hexdigest() for path in texts]
    assert [text["sha256"] for text in record["routers"]["texts"]] == hashes
    assert 1 < record["routers"]["largest_condition"] < 1e6
    assert "its routers are a ridge regression" in (folder / "README.md").read_text()


def test_prompts_stand_in_the_recipe_itself(run, branches):
    """Every prompt is a row of its own; the mean is over the tokens of all."""
    prompts = [["abc", "defg"], ["0123456"], ["!?", "?!"]]
    folder = run(method="btx", sources=branches, router={"init": "centroid", "data": prompts})
    parts = [[mlp_inputs(branches[0], prompt) for prompt in of_expert] for of_expert in prompts]
    mean_ELD = torch.stack([torch.cat(of_expert, 1).mean(1) for of_expert in parts])
    expected = torch.nn.functional.normalize(mean_ELD - mean_ELD.mean(0), dim=2)
    for layer in range(3):
        name = f"{MLP.format(layer)}.weight"
        assert_equal_up_to_rounding(name, routers_of(folder)[name], expected[:, layer].float())
    record = json.loads((folder / "upcycle.json").read_text())
    assert record["recipe"]["router"]["data"] == prompts
    assert [text["name"] for text in record["routers"]["texts"]] == [
        "2 prompt(s)",
        "1 prompt(s)",
        "2 prompt(s)",
    ]
    assert [text["tokens"] for text in record["routers"]["texts"]] == [7, 7, 4]


def test_empty_prompts_are_refused(run, branches):
    with pytest.raises(UpcycleError, match=r"prompts of router\.data must not be empty, got \[''\]"):
        run(method="btx", sources=branches, router={"init": "centroid", "data": [["a"], [""], ["b"]]})


def test_only_layers_with_experts_get_routers(run, branches, texts):
    routers = routers_of(
        run(method="btx", sources=branches, layers=[1], router={"init": "ridge", "data": texts})
    )
    assert [*routers] == [f"{MLP.format(1)}.weight"]


def test_a_dry_run_says_what_would_be_computed_and_computes_nothing(branches, texts, monkeypatch):
    monkeypatch.setattr("upcycle.run.open_routers", None)
    result = upcycle.upcycle(recipe(branches, texts, init="ridge"), dry_run=True)
    assert result.to_dict()["routers"] == (
        "ridge of the routers' inputs when the base reads at most 8,192 tokens of each of "
        f"{', '.join(texts)}; computed before anything is written"
    )


def test_the_command_shows_the_texts_as_one_more_source(branches, texts, tmp_path, capsys):
    values = {**recipe(branches, texts, init="ridge").to_dict(), "output": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["upcycle", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "copy of mlp.router from source 3" in out
    assert "source 3: ridge of the routers' inputs when the base reads at most 8,192 tokens of each of" in out


def test_a_change_of_the_routers_starts_an_interrupted_run_anew(branches, texts, tmp_path, monkeypatch):
    """Whatever the tasks say: the numbers are not in them."""
    monkeypatch.setattr(RUN, "write_side_files", interrupt)
    first = recipe(branches, texts, init="ridge")
    with pytest.raises(KeyboardInterrupt):
        upcycle.upcycle(replace(first, output=str(tmp_path / "out")))
    monkeypatch.undo()
    longer = replace(first, output=str(tmp_path / "out"), router=replace(first.router, row_norm=7.0))
    routers = routers_of(upcycle.upcycle(longer).output)
    for name, weight_ED in routers.items():
        assert weight_ED.norm(dim=1).allclose(torch.full((3,), 7.0)), name


def interrupt(*_):
    raise KeyboardInterrupt


def test_another_process_gets_the_same_bits(run, branches, texts, tmp_path):
    """Whatever ran before in this one."""
    starts = {"ridge": {"data": texts}, "orthogonal": {"seed": 3}, "normal": {"seed": 3}}
    recipes = [
        {
            "method": "bam",
            "sources": [*map(str, branches)],
            "output": str(tmp_path / f"there-{init}"),
            "router": {"init": init, **more},
        }
        for init, more in starts.items()
    ]
    code = (
        "import json, sys, torch, upcycle\n"
        f"torch.set_num_threads({torch.get_num_threads()})  # products of another number round differently\n"
        "for recipe in json.loads(sys.argv[1]):\n    upcycle.upcycle(upcycle.recipe_from_dict(recipe))"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(recipes)], check=True, capture_output=True)
    for init, more in starts.items():
        here = run(f"here-{init}", method="bam", sources=branches, router={"init": init, **more})
        there = tmp_path / f"there-{init}"
        assert (here / "upcycle.json").read_bytes() == (there / "upcycle.json").read_bytes()
        mine, other = routers_of(here), routers_of(there)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine), init


TEXT_ERRORS = [
    pytest.param(None, r"router\.data: there is no file .*2\.txt", id="missing"),
    pytest.param(b"too short", r"2\.txt must give at least 64 tokens, got 9", id="short"),
    pytest.param(b"\xff\xfe" * 99, r"2\.txt must be UTF-8 text, and is not: invalid start byte", id="bytes"),
]


@pytest.mark.parametrize(("content", "message"), TEXT_ERRORS)
def test_an_unusable_text_is_named(content, message, run, branches, texts, tmp_path):
    path = tmp_path / "2.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UpcycleError, match=message):
        run(method="btx", sources=branches, router={"init": "ridge", "data": [*texts[:2], str(path)]})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["centroid", "ridge"])
def test_texts_that_do_not_differ_are_refused(init, run, branches, texts):
    message = rf"router\.init '{init}': router\.data must have another text .* expert 2 is that of expert 0"
    data = [texts[0], texts[1], texts[0]]
    with pytest.raises(UpcycleError, match=message):
        run(method="btx", sources=branches, router={"init": init, "data": data})


def test_a_base_without_a_tokenizer_is_refused(run, dense, texts):
    with pytest.raises(UpcycleError, match=r"router.init 'centroid': .* must hold a tokenizer"):
        run(method="copy", base=dense("llama"), experts=3, router={"init": "centroid", "data": texts})


# --- recipes ---

WRONG = [
    ({"init": "kmeans"}, "router.init must be one of 'normal', 'orthogonal', .*, got 'kmeans'"),
    ({"init": "file"}, "router.path must name the file of router weights that init 'file' reads"),
    ({"init": "ridge"}, "router.data must name one text file for each expert, got none"),
    ({"init": "ridge", "data": "a.txt"}, "router.data must be a list, got 'a.txt'"),
    (
        {"init": "ridge", "data": ["a.txt", 3, "c"]},
        "must hold a text file or a list of prompts for each expert, got 3",
    ),
    ({"init": "ridge", "data": ["a.txt", [], "c"]}, r"or a list of prompts for each expert, got \(\)"),
    ({"init": "ridge", "data": ["a", "b"]}, "one text file for each of the 3 experts, got 2"),
    ({"init": "ridge", "data": {0: "a", 2: "b", 3: "c"}}, r"must name experts 0 to 2, got \[0, 2, 3\]"),
    ({"init": "ridge", "data": [*"abc"], "lam": 0}, "router.lam must be finite and above 0, got 0"),
    ({"init": "ridge", "data": [*"abc"], "max_tokens": 0}, "router.max_tokens must be at least 1, got 0"),
    (
        {"init": "centroid", "data": [*"abc"], "lam": 0.1},
        "router.lam belongs to router.init 'ridge', got it with",
    ),
    ({"data": [*"abc"]}, "router.data belongs to router.init 'centroid' or 'ridge', got it with 'normal'"),
    (
        {"init": "orthogonal", "std": 0.1},
        "router.std belongs to router.init 'normal', got it with 'orthogonal'",
    ),
    ({"init": "orthogonal", "row_norm": -1}, "router.row_norm must be finite and above 0, got -1"),
    ({"init": "orthogonal", "row_norm": "long"}, "router.row_norm must be a number, got 'long'"),
]


@pytest.mark.parametrize(("router", "message"), WRONG, ids=str)
def test_what_is_wrong_with_a_router_section_is_named(router, message):
    with pytest.raises(RecipeError, match=message):
        recipe("abc", **router)


@pytest.mark.parametrize(
    "router",
    [
        {},
        {"init": "orthogonal"},
        {"init": "file", "path": "p"},
        {"init": "ridge", "data": [*"abc"], "lam": 0.5},
    ],
    ids=lambda router: router.get("init", "normal"),
)
def test_a_recipe_with_a_router_reads_back_what_it_writes(router):
    built = recipe("abc", **router)
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(built.to_dict()))) == built
