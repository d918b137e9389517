"""Packed batches: documents in one row are as each document alone, by a mask and by kernels of flash-attn."""

import sys
from types import ModuleType

import flash_attention
import pytest
import torch
from attention_layers import D, mixture
from flash_attention import HALF
from tiny_models import (
    BAM,
    KINDS,
    assert_equal_up_to_rounding,
    assert_same_function,
    outcome,
    perturb,
    randn,
    tiny_model,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DataCollatorWithFlattening, DynamicCache, modeling_flash_attention_utils
from transformers.utils import is_flash_attn_2_available, is_kernels_available

from moe_runtime import packing
from moe_runtime.attention import CausalAttention, MixtureOfAttention, rotary_tables
from moe_runtime.config import AttentionConfig
from moe_runtime.hf import MoeRuntimeForCausalLM
from moe_runtime.packing import packed_positions

LENGTHS = (4, 1, 7)
L, LONGEST = sum(LENGTHS), max(LENGTHS)
MIXTURES = [
    pytest.param({"kv": kv, "top_k": top_k}, id=f"{kv}-kv-{'soft' if top_k is None else 'top-2'}")
    for kv in ("expert", "shared")
    for top_k in (None, 2)
]
WIDE = torch.float64  # no kernel of flash-attn takes it; the fake does where a test compares gradients


def ends(lengths=LENGTHS):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def rotary(position_BL, dtype, width):
    wide = torch.promote_types(dtype, torch.float32)
    return tuple(table.to(wide) for table in rotary_tables(position_BL, width))


def in_one_row(layer, x_BLD):
    width = layer.config.head_dim
    tables = rotary(packed_positions(ends(), L), x_BLD.dtype, width)
    return layer(x_BLD, tables, cu_seqlens=ends(), max_seqlen=LONGEST)


def one_by_one(layer, x_BLD):
    """The definition: each document by itself, at positions from 0."""
    width = layer.config.head_dim
    return torch.cat(
        [
            layer(x_BnD, rotary(torch.arange(x_BnD.shape[1])[None], x_BnD.dtype, width))
            for x_BnD in x_BLD.split(LENGTHS, 1)
        ],
        1,
    )


@pytest.fixture
def flash(monkeypatch):
    """A function that installs fake kernels, and lets tensors of a CPU go to them."""

    def install(version, dtypes=HALF):
        monkeypatch.setattr(packing, "FLASH_DEVICES", ("cpu",))
        monkeypatch.setattr(packing, "FLASH_DTYPES", dtypes)
        monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
        monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: version == 2)
        monkeypatch.setattr(packing, "FLASH_VERSION", version)
        return flash_attention.install(monkeypatch, version, dtypes)

    return install


def flash_mixture(**options) -> MixtureOfAttention:
    """Its heads have a width that flash-attn takes, which `mixture`'s have not."""
    torch.manual_seed(0)
    made = MixtureOfAttention(
        AttentionConfig(hidden_size=D, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=3, **options)
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


# --- layers ---


ALONE = [
    *MIXTURES,
    pytest.param({"sliding_window": 3}, id="window"),
    pytest.param({"scale": 0.9, "logit_cap": 0.5}, id="capped"),
]


@pytest.mark.parametrize("options", ALONE)
def test_a_packed_row_equals_its_documents(options):
    layer = mixture(**options, qk_norm="rms_norm")
    assert_same_function(in_one_row, one_by_one, layer, randn(1, L, D))


@pytest.mark.parametrize("options", ALONE)
def test_flash_kernels_give_the_documents_too(options, flash):
    layer = flash_mixture(**options)
    fake = flash(2, (torch.float32, WIDE))
    assert_same_function(in_one_row, one_by_one, layer, randn(1, L, D))
    assert len(fake.calls) == 2  # float32 and float64
    assert {call.softcap for call in fake.calls} == {options.get("logit_cap", 0.0)}


@pytest.mark.parametrize(
    ("options", "heads", "kv_heads", "window", "version"),
    [({}, 12, 6, None, 2), ({"kv": "shared", "top_k": 2}, 8, 2, 3, 2), ({}, 12, 6, 3, 3)],
)
def test_what_flash_kernels_are_given(options, heads, kv_heads, window, version, flash):
    fake = flash(version)
    layer = flash_mixture(**options, sliding_window=window).bfloat16()
    results = outcome(in_one_row, layer, randn(1, L, D).bfloat16())
    (call,) = fake.calls
    assert call.q.shape == (L, heads, 8)
    assert call.k.shape == call.v.shape == (L, kv_heads, 8)
    assert call.q.dtype == torch.bfloat16
    assert call.cu.tolist() == [0, 4, 5, 12]
    assert call.max == LONGEST
    assert call.scale == 8**-0.5
    assert call.causal
    assert call.window == ((-1, -1) if window is None else (2, 0))
    assert all(torch.isfinite(value).all() for value in results.values())


def test_half_precision_by_flash_kernels_is_that_of_the_mask(flash):
    query, key, value = (randn(1, heads, L, 8, seed=heads).bfloat16() for heads in (4, 2, 2))
    by_mask, _ = CausalAttention(3)(query, key, value, ends(), LONGEST)
    fake = flash(2)
    by_flash, _ = CausalAttention(3)(query, key, value, ends(), LONGEST)
    assert len(fake.calls) == 1
    assert by_flash.shape == by_mask.shape
    assert (by_flash - by_mask).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * by_mask.abs().max()


@pytest.mark.parametrize("version", [2, 3])
def test_flash_kernels_are_deterministic_where_torch_is(version, flash):
    fake = flash(version)
    query = randn(1, 2, L, 8).half()
    for enabled in (False, True):
        torch.use_deterministic_algorithms(enabled, warn_only=True)
        CausalAttention()(query, query, query, ends(), LONGEST)
    assert [call.deterministic for call in fake.calls] == [False, True]


def test_early_kernels_return_logarithms_too(flash):
    fake = flash(3)
    query = randn(1, 2, L, 8).half()
    attended, _ = CausalAttention()(query, query, query, ends(), LONGEST)
    fake.early = True
    by_early, _ = CausalAttention()(query, query, query, ends(), LONGEST)
    assert torch.equal(by_early, attended)


@pytest.mark.parametrize(
    ("dtype", "width", "length"),
    [(torch.float32, 8, L), (torch.float16, 12, L), (torch.float16, 264, L), (torch.float16, 8, 0)],
)
def test_what_flash_kernels_cannot_take_gets_a_mask(dtype, width, length, flash):
    fake = flash(2)
    query = randn(1, 2, length, width).to(dtype)
    attended, _ = CausalAttention()(query, query, query, ends() if length else ends(()), LONGEST)
    assert attended.shape == (1, length, 2, width)
    assert fake.calls == []


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ([], None),
        (["flash_attn/__init__.py", "flash_attn/flash_attn_interface.py"], 2),
        (["flash_attn/cute/__init__.py"], None),  # version 4
        (["flash_attn/cute/__init__.py", "flash_attn/flash_attn_interface.py"], 2),
        (["flash_attn_interface.py"], 3),
        (["flash_attn_interface.py", "flash_attn/flash_attn_interface.py"], 3),
    ],
    ids=str,
)
def test_which_version_is_installed(files, version, tmp_path, monkeypatch):
    for name in files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise AssertionError('nothing is imported to find out')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert packing._flash_version() == version


def test_stubs_of_flash_attn_are_no_installation(monkeypatch):
    """Programs put them in place of a real one to import models that want it."""
    for name in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert packing._flash_version() is None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside torch
def test_packed_rows_compile_as_one_graph():
    layer, x_BLD = mixture(), randn(1, L, D)
    compiled = torch.compile(in_one_row, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_equal_up_to_rounding("y", compiled(layer, x_BLD), in_one_row(layer, x_BLD))


def test_rows_that_are_not_packed_never_go_to_flash_kernels(flash):
    fake = flash(2)
    layer, x_BLD = flash_mixture().half(), randn(2, 5, D).half()
    layer(x_BLD)
    assert fake.calls == []


def test_empty_documents_and_no_documents():
    assert packed_positions(ends((2, 0, 3, 0)), 5).tolist() == [[0, 1, 0, 1, 2]]
    assert packed_positions(ends(()), 0).shape == (1, 0)
    layer = mixture()
    whole = torch.cat([layer(part) for part in randn(1, 5, D).split((2, 3), 1)], 1)
    packed = layer(randn(1, 5, D), cu_seqlens=ends((2, 0, 3, 0)), max_seqlen=3)
    assert_equal_up_to_rounding("y", packed, whole)
    assert layer(randn(1, 0, D), cu_seqlens=ends(()), max_seqlen=0).shape == (1, 0, D)


class Created(TorchDispatchMode):
    """Notes the form of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.forms = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.forms += [(x.dtype, tuple(x.shape)) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result


@pytest.mark.parametrize("window", [None, 3])
def test_a_mask_is_made_as_bools(window):
    """Ages of tokens in int64 would be eight times its size."""
    with Created() as created:
        CausalAttention(window)._mask(randn(1, 2, L, 8), ends())
    assert {dtype for dtype, shape in created.forms if shape == (L, L)} == {torch.bool}


def test_no_value_is_read_on_the_host():
    """The meta device has none."""
    layer = mixture(top_k=2).to("meta")
    x_BLD, cu_seqlens = torch.empty(1, L, D, device="meta"), ends().to("meta")
    tables = rotary_tables(packed_positions(cu_seqlens, L), 6)
    assert layer(x_BLD, tables, cu_seqlens=cu_seqlens, max_seqlen=LONGEST).shape == (1, L, D)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_seqlen": 7}, r"cu_seqlens must be given with max_seqlen \(7\), got None"),
        ({"cu_seqlens": ends()}, "max_seqlen must be .* on the host, .*; got None"),
        ({"cu_seqlens": ends(), "max_seqlen": torch.tensor(7)}, "max_seqlen must be .*; got Tensor"),
        (
            {"cu_seqlens": ends().long(), "max_seqlen": 7},
            r"cu_seqlens must be int32 of shape \(documents \+ 1,\), got int64 of shape \(4,\)",
        ),
        ({"cu_seqlens": ends()[None], "max_seqlen": 7}, r"got int32 of shape \(1, 4\)"),
        ({"cu_seqlens": ends()[:0], "max_seqlen": 7}, r"got int32 of shape \(0,\)"),
    ],
)
def test_arguments_that_no_packed_row_has(given, message):
    with pytest.raises(ValueError, match=message):
        mixture()(randn(1, L, D), **given)


@pytest.mark.parametrize("by_flash", [False, True])
def test_ends_that_lie_apart_in_memory(by_flash, flash):
    if by_flash:
        flash(2, (torch.float32,))
    layer, x_BLD = flash_mixture(), randn(1, L, D)
    apart = ends().repeat_interleave(2)[::2]
    y_BLD = layer(x_BLD, cu_seqlens=apart, max_seqlen=LONGEST)
    assert torch.equal(y_BLD, layer(x_BLD, cu_seqlens=ends(), max_seqlen=LONGEST))
    assert torch.equal(packed_positions(apart, L), packed_positions(ends(), L))


def test_two_packed_rows_are_refused():
    with pytest.raises(ValueError, match=r"x must be one row \[1, L, D\] .* with cu_seqlens, got 2 rows"):
        mixture()(randn(2, L, D), cu_seqlens=ends(), max_seqlen=LONGEST)


# --- the causal LM ---

POSITIONS = packed_positions(ends(), L)
FLASH_KEYS = {
    "cu_seq_lens_q": ends(),
    "cu_seq_lens_k": ends(),
    "max_length_q": LONGEST,
    "max_length_k": LONGEST,
}
WAYS = [
    pytest.param({"position_ids": POSITIONS}, id="positions"),
    pytest.param(FLASH_KEYS, id="flash-keys"),
    pytest.param({"position_ids": POSITIONS, **FLASH_KEYS}, id="both"),
]


def logits_of_documents(model: MoeRuntimeForCausalLM, x_BLD):
    return torch.cat([model(inputs_embeds=part).logits for part in x_BLD.split(LENGTHS, 1)], 1)


def assert_packs(model: MoeRuntimeForCausalLM, **way):
    """Logits and the gradients of all parameters, in float64."""
    model, x_BLD = model.double(), randn(1, L, BAM["hidden_size"]).double()
    actual = outcome(lambda m, x: m(inputs_embeds=x, **way).logits, model, x_BLD)
    expected = outcome(logits_of_documents, model, x_BLD)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_equal_up_to_rounding(name, actual[name], value)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("bam")])
def test_a_model_of_a_packed_row_equals_its_documents(kind, implementation):
    model = tiny_model(KINDS[kind])
    model.set_attn_implementation(implementation)
    assert_packs(model, position_ids=POSITIONS)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_say_where_documents_end(way):
    assert_packs(tiny_model(sliding_window=3, layer_types=["sliding_attention", "full_attention"]), **way)


@pytest.mark.parametrize(
    ("kind", "way", "version"),
    [
        pytest.param("bam", {"position_ids": POSITIONS}, 2, id="bam-positions-2"),
        pytest.param("bam-shared-kv-top-k", FLASH_KEYS, 3, id="bam-shared-kv-top-k-flash-keys-3"),
    ],
)
def test_a_model_by_flash_kernels_equals_its_documents(kind, way, version, flash):
    model = tiny_model(KINDS[kind]).double()
    x_BLD = randn(1, L, BAM["hidden_size"]).double()
    expected = outcome(logits_of_documents, model, x_BLD)
    fake = flash(version, (WIDE,))
    model.config._attn_implementation = f"flash_attention_{version}"  # set_attn_implementation wants a GPU
    actual = outcome(lambda m, x: m(inputs_embeds=x, **way).logits, model, x_BLD)
    for name, value in expected.items():
        assert_equal_up_to_rounding(name, actual[name], value)
    heads = {"bam": 12, "bam-shared-kv-top-k": 8}[kind]
    assert [call.q.shape for call in fake.calls] == [(L, heads, 8)] * 2
    assert all(call.causal and call.scale == 8**-0.5 for call in fake.calls)
    assert all(call.cu.tolist() == [0, 4, 5, 12] for call in fake.calls)


def test_ends_of_the_documents_of_two_rows():
    """They go on from row to row."""
    model, ids = tiny_model(), tokens(2, L)
    packed = model(ids, cu_seq_lens_q=ends((*LENGTHS, 5, 7))).logits
    documents = [*ids[:1].split(LENGTHS, 1), *ids[1:].split((5, 7), 1)]
    alone = torch.cat([model(document).logits for document in documents], 1)
    assert_equal_up_to_rounding("logits", packed.flatten(0, 1), alone[0])


def test_batches_of_the_flattening_collator():
    documents = [tokens(length, seed=length) for length in LENGTHS]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": ids.tolist()} for ids in documents]
    )
    model = tiny_model().train()
    for parameter in ("router_aux_loss_coef", "router_z_loss_coef"):
        setattr(model.config, parameter, 0.0)
    sums = [
        model(ids[None], labels=ids[None]).loss * (len(ids) - 1) for ids in documents if len(ids) > 1
    ]  # a loss is the mean over predicted tokens
    expected = sum(sums) / sum(len(ids) - 1 for ids in documents)
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"cu_seq_lens_q": ends().long()},
            r"cu_seq_lens_q must be int32 of shape \(documents \+ 1,\), got int64 of shape \(4,\)",
        ),
        ({"cu_seq_lens_q": ends()[:0]}, r"cu_seq_lens_q must be .*, got int32 of shape \(0,\)"),
        (
            {"cu_seq_lens_q": ends(), "past_key_values": DynamicCache()},
            "past_key_values must be None with cu_seq_lens_q and no position_ids, .*, got DynamicCache",
        ),
    ],
)
def test_ends_that_a_model_does_not_take(given, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(tokens(1, L), **given)


def test_a_mask_hides_documents():
    """As in transformers' own models; the page on layers says so."""
    model, ids = tiny_model(), tokens(1, L)
    packed = model(ids, position_ids=POSITIONS).logits
    masked = model(ids, position_ids=POSITIONS, attention_mask=torch.ones_like(ids)).logits
    assert (packed - masked)[:, LENGTHS[0] :].abs().max() > 0.01


@pytest.mark.parametrize("use_cache", [False, True])
def test_positions_that_do_not_go_up_by_one_part_documents(use_cache):
    """As the page on layers says; a mask of ones makes them one document."""
    model, ids = tiny_model(), tokens(1, L)
    position_ids = torch.arange(0, 2 * L, 2)[None]
    parted = model(ids, position_ids=position_ids, use_cache=use_cache).logits
    assert_equal_up_to_rounding("logits", parted, model(ids.view(L, 1)).logits.view(parted.shape))
    whole = model(ids, position_ids=position_ids, attention_mask=torch.ones_like(ids)).logits
    assert (parted - whole)[:, 1:].abs().max() > 0.01


@pytest.mark.skipif(is_flash_attn_2_available() or is_kernels_available(), reason="flash-attn is here")
def test_flash_kernels_that_are_not_installed():
    message = "FlashAttention2 .* the package for FlashAttention2 doesn't seem to be installed"
    with pytest.raises(ImportError, match=message):
        tiny_model().set_attn_implementation("flash_attention_2")


def test_flash_kernels_and_float32(flash):
    flash(2)
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"'flash_attention_2' needs a model in float16 or bfloat16, .* got float32"
    ):
        model(tokens(1, L), position_ids=POSITIONS)


def test_flash_kernels_under_autocast(flash):
    fake = flash(2)
    model = tiny_model()
    perturb(model)
    model.config._attn_implementation = "flash_attention_2"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(1, L), position_ids=POSITIONS)
    assert [call.q.dtype for call in fake.calls] == [torch.bfloat16] * 2
