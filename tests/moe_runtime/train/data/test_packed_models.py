"""A packed batch through a model equals its documents one by one, in logits and gradients."""

import itertools

import numpy as np
import pytest
import torch
from moe_families import tiny_family
from tiny_models import MOE, assert_equal_up_to_rounding, tiny_model
from training_runs import a_recipe

from moe_runtime.errors import RunError
from moe_runtime.hf.document_attention import NAME, attend_by_document
from moe_runtime.train.data.apart import keeps_samples_apart
from moe_runtime.train.data.rows import PaddingCollator, Rows, collate_packed
from moe_runtime.train.data.samples import IGNORED, Sample
from moe_runtime.train.model import prepare_model

LENGTHS = (4, 2, 9, 5, 13, 7)
PLACES = ((0, 2, 1), (3,), (4, 5))  # rows of a batch
# Sums over documents in two orders; a token that sees its neighbours is off by 1e-1.
GRADIENTS = 3e-5


def model_of(family, **options):
    if family == "moe_runtime":
        return tiny_model(MOE, router_aux_loss_coef=0.0, router_z_loss_coef=0.0, **options)
    return tiny_family(family, **options)


def samples(vocab_size):
    draw = np.random.default_rng(0)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = draw.integers(0, vocab_size, length)
        labels = np.where(np.arange(length) >= length // 2, ids, IGNORED)
        made.append((number, Sample(ids, labels)))
    return made


def gradients(model, losses):
    """Of the sum of losses that are means over so many tokens."""
    model.zero_grad()
    sum(loss * count for loss, count in losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def counted(labels):
    return (labels[..., 1:] != IGNORED).sum()


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *itertools.product(("moe_runtime", "mixtral"), ("sdpa", NAME)),
        ("moe_runtime", "eager"),
    ],
)
def test_documents_do_not_see_each_other(family, attention):
    model = model_of(family)
    if attention == NAME:
        assert attend_by_document(model)
    else:
        model.set_attn_implementation(attention)
    numbered = samples(model.config.vocab_size)
    rows = Rows(numbered, PLACES, packed=True)
    batch = collate_packed([rows[row] for row in range(len(rows))])
    order = batch.pop("sample")
    packed = model(**batch, use_cache=False)
    alone = [model(input_ids=torch.from_numpy(numbered[n][1].ids_L)[None], use_cache=False) for n in order]
    expected = torch.cat([output.logits for output in alone], 1)
    assert_equal_up_to_rounding("logits", packed.logits, expected)

    actual = gradients(model, [(packed.loss, counted(batch["labels"]))])
    losses = []
    for _, sample in numbered:
        labels = torch.from_numpy(sample.labels_L)[None]
        output = model(input_ids=torch.from_numpy(sample.ids_L)[None], labels=labels, use_cache=False)
        losses.append((output.loss, counted(labels)))
    for name, value in gradients(model, losses).items():
        assert_equal_up_to_rounding(name, actual[name], value, GRADIENTS)
    assert counted(batch["labels"]) == sum(count for _, count in losses)


def test_documents_in_padded_rows_have_the_same_logits():
    model = model_of("moe_runtime")
    numbered = samples(model.config.vocab_size)
    rows = Rows(numbered, [[place] for place in range(len(numbered))], packed=False)
    batch = PaddingCollator(0)([rows[row] for row in range(len(rows))])
    batch.pop("sample")
    logits = model(**batch).logits
    for row, (_, sample) in enumerate(numbered):
        alone = model(input_ids=torch.from_numpy(sample.ids_L)[None]).logits
        assert_equal_up_to_rounding("logits", logits[row : row + 1, : len(sample.ids_L)], alone)


def test_windows_end_within_documents():
    options = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
    model = model_of("moe_runtime", **options)
    numbered = samples(model.config.vocab_size)
    rows = Rows(numbered, PLACES, packed=True)
    batch = collate_packed([rows[row] for row in range(len(rows))])
    batch.pop("sample")
    expected = model(**batch).logits
    assert attend_by_document(model)
    assert_equal_up_to_rounding("logits", model(**batch).logits, expected)


def test_other_batches_attend_as_before():
    model = model_of("mixtral")
    ids = torch.randint(model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = model(input_ids=ids, attention_mask=mask).logits
    said = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert attend_by_document(model)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert_equal_up_to_rounding("logits", logits[0, 2:], expected[0, 2:])
    assert_equal_up_to_rounding("logits", logits[1], expected[1])
    again = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(said, again)


def test_models_that_need_another_attention_keep_it():
    model = tiny_model(MOE)
    model.set_attn_implementation("eager")
    assert not attend_by_document(model)
    assert model.config._attn_implementation == "eager"
    chunks = tiny_model(MOE)
    chunks.config.attention_chunk_size = 8
    assert not attend_by_document(chunks)


@pytest.mark.parametrize("family", ["gpt_oss", "jamba"])
def test_a_model_that_mixes_packed_samples_is_refused(family, tmp_path):
    folder = tmp_path / "model"
    model = model_of(family)
    model.save_pretrained(folder)
    recipe = a_recipe(folder, tmp_path / "missing.jsonl", tmp_path / "out", data={"packing": True})
    sentence = f"data.packing must be false for {type(model).__name__}, whose attention does not keep packed"
    with pytest.raises(RunError, match=sentence):
        prepare_model(recipe)
    prepare_model(a_recipe(folder, tmp_path / "missing.jsonl", tmp_path / "out", data={"packing": False}))


@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("family", ["moe_runtime", "mixtral", "olmoe"])
def test_models_that_keep_packed_samples_apart(family, by_document):
    model = model_of(family)
    if by_document:
        assert attend_by_document(model)
    assert keeps_samples_apart(model.train(), 64)
    assert model.training
    model.config.index_topk = 32  # tokens that are attended to, of a row that has more
    assert not keeps_samples_apart(model, 64)
    assert keeps_samples_apart(model, 32)
