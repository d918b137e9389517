"""Sources whose tokens mean different things cannot become experts of one model."""

import json

import pytest

from upcycle import UpcycleError, make_plan_for, recipe_from_dict


@pytest.fixture
def branches(dense_copy):
    """`branches(name, values, others)` -> two sources, each with its content in a file of that name."""
    folders = [dense_copy(name=name) for name in ("a", "b")]

    def make(name, *contents):
        for folder, content in zip(folders, contents, strict=True):
            path = folder / name
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return make_plan_for(
            recipe_from_dict({"method": "btx", "output": "x", "sources": [str(folder) for folder in folders]})
        )

    return make


def tokenizer(vocabulary, added=(), **more):
    return {"model": {"vocab": vocabulary}, "added_tokens": list(added), **more}


BPE = {"x": 0, "y": 1}
DIFFERENT = [
    pytest.param(
        "tokenizer.json",
        tokenizer(BPE),
        tokenizer({"y": 0, "x": 1}),
        "token 'x' is number 0 and number 1 in .*a and .*b$",
        id="order",
    ),
    pytest.param(
        "tokenizer.json",
        tokenizer(BPE),
        tokenizer(BPE, [{"id": 2, "content": "<new>"}]),
        "token '<new>' is missing and number 2 in",
        id="an-added-token",
    ),
    pytest.param(
        "tokenizer.json",
        tokenizer([["x", 0.5], ["y", 1.0]]),
        tokenizer([["x", 0.5]]),
        "token 'y' is number 1 and missing in",
        id="unigram",
    ),
    pytest.param("vocab.json", BPE, {"x": 0}, "token 'y' is number 1 and missing", id="vocab.json"),
    pytest.param(
        "tokenizer.model", "one", "other", r"tokenizer\.model differs in .*a and .*b", id="sentencepiece"
    ),
]


@pytest.mark.parametrize(("name", "first", "second", "message"), DIFFERENT)
def test_different_vocabularies_are_named(name, first, second, message, branches):
    with pytest.raises(UpcycleError, match=f"the sources must share one vocabulary, but {message}"):
        branches(name, first, second)


SAME = [
    pytest.param(
        "tokenizer.json", tokenizer(BPE), tokenizer({"y": 1, "x": 0}, other="settings"), id="settings"
    ),
    pytest.param("tokenizer.json", tokenizer(BPE), tokenizer([["x", 0], ["y", 0]]), id="kind"),
    pytest.param("tokenizer.model", "same", "same", id="sentencepiece"),
]


@pytest.mark.parametrize(("name", "first", "second"), SAME)
def test_equal_vocabularies_pass(name, first, second, branches):
    assert len(branches(name, first, second).sources) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {}),
        ("tokenizer.json", tokenizer({"x": "one"})),
        ("vocab.json", {"x": None}),
    ],
)
def test_a_damaged_tokenizer_is_named(name, content, branches):
    with pytest.raises(
        UpcycleError, match=rf"b.{name} is no tokenizer that transformers wrote; fetch it again"
    ):
        branches(name, tokenizer(BPE) if name == "tokenizer.json" else BPE, content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            r"rope_parameters is \{.*10000.*\} in",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            r"rope_parameters is \{.*'rope_type': 'default'\} in .* and \{.*'factor': 2.0.*\} in",
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is False in .* and True in"),
    ],
    ids=["base", "scaling", "tied"],
)
def test_positions_and_heads_of_another_kind_are_named(changes, message, dense, dense_copy):
    other = dense_copy()
    path = other / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))
    recipe = recipe_from_dict({"method": "btx", "output": "x", "sources": [str(dense("llama")), str(other)]})
    with pytest.raises(UpcycleError, match=f"the sources must be branches of one dense model, but {message}"):
        make_plan_for(recipe)
