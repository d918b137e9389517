"""Text and latency on a tiny random Llama with a tokenizer of single bytes."""

import json
from dataclasses import asdict

import pytest
import torch
from byte_tokenizer import END, VOCAB_SIZE, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from moe_runtime import generate
from moe_runtime.generate import generate_text, measure_latency


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.5,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


def script(model, tokenizer, text):
    """Make the model say `text` and then end, whatever it is asked."""
    reply = iter([*tokenizer(text)["input_ids"], END])

    def force(_module, _inputs, output):
        output.logits[:] = 0.0
        output.logits[:, -1, next(reply)] = 100.0

    model.register_forward_hook(force)


def test_greedy_text_is_the_argmax_of_full_forward_passes(model, tokenizer):
    model.eval()
    token_ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            token_ids = torch.cat([token_ids, model(token_ids).logits[:, -1:].argmax(-1)], dim=1)
    result = generate_text(model, tokenizer, "ab", max_new_tokens=8)
    assert result.text == tokenizer.decode(token_ids[0, 2:])
    assert (result.prompt_tokens, result.new_tokens, result.stopped_by) == (2, 8, "length")
    assert result.seconds > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_static_and_dynamic_caches_give_the_same_text(model, tokenizer, temperature):
    texts = [
        generate_text(
            model, tokenizer, "ab", max_new_tokens=12, temperature=temperature, seed=3, static_cache=static
        ).text
        for static in (False, True)
    ]
    assert texts[0] == texts[1] != ""


def test_draws_depend_on_the_seed_alone_and_leave_the_random_state(model, tokenizer):
    def draw(seed):
        return generate_text(model, tokenizer, "ab", max_new_tokens=16, temperature=1.0, seed=seed).text

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert draw(1) == first != draw(2)


def test_streamed_pieces_join_to_the_text_and_never_show_half_a_character(model, tokenizer):
    script(model, tokenizer, "é € 漢字")
    pieces = []
    result = generate_text(model, tokenizer, "x", max_new_tokens=40, on_text=pieces.append)
    assert result.text == "é € 漢字"
    assert pieces == ["é", " ", "€", " ", "漢", "字"]
    assert result.stopped_by == "end_of_text"


def test_a_character_cut_off_by_the_length_is_shown_at_the_end(model, tokenizer):
    script(model, tokenizer, "漢字")
    pieces = []
    result = generate_text(model, tokenizer, "x", max_new_tokens=4, on_text=pieces.append)
    assert pieces == ["漢", generate.UNFINISHED]
    assert result.text == "".join(pieces)


def test_the_model_stays_in_training_mode_and_dropout_is_off_meanwhile(model, tokenizer):
    model.train()
    texts = {generate_text(model, tokenizer, "ab", max_new_tokens=16).text for _ in range(3)}
    assert len(texts) == 1
    assert model.training


def test_text_errors_name_the_argument(model, tokenizer):
    with pytest.raises(ValueError, match="prompt must hold at least one token, got ''"):
        generate_text(model, tokenizer, "")
    with pytest.raises(ValueError, match=r"temperature must be at least 0, got -0\.1"):
        generate_text(model, tokenizer, "a", temperature=-0.1)
    with pytest.raises(ValueError, match="number of new tokens must be at least 1, got 0"):
        generate_text(model, tokenizer, "a", max_new_tokens=0)
    with pytest.raises(ValueError, match=r"must fit the model's 64 positions, got 3 and 62"):
        generate_text(model, tokenizer, "abc", max_new_tokens=62)


# --- latency ---


@pytest.mark.parametrize("static", [False, True])
def test_latency_times_each_forward_pass(model, monkeypatch, static):
    """With a clock that ticks once per reading every time is one tick; shapes are prefill, then decoding."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(generate.time, "perf_counter", lambda: float(next(ticks)))
    shapes, cache_types = [], set()

    def note(_module, _inputs, keywords, output):
        shapes.append(tuple(keywords["input_ids"].shape))
        cache_types.add(type(output.past_key_values).__name__)

    model.register_forward_hook(note, with_kwargs=True)
    report = measure_latency(model, 7, 3, 2, batch_size=2, static_cache=static)
    assert shapes == 3 * [(2, 7), (2, 1), (2, 1), (2, 1)]  # a warm-up and two repeats
    assert cache_types == {"StaticCache" if static else "DynamicCache"}
    assert report.cache == ("static" if static else "dynamic")
    assert report.prefill_s == report.decode_s == generate.Seconds(median=1.0, p10=1.0, p90=1.0)
    assert report.decode_tokens_per_s == 2.0


def test_latency_quantiles():
    seconds = [float(i) for i in range(11)]
    assert generate._quantiles(seconds) == generate.Seconds(median=5.0, p10=1.0, p90=9.0)
    assert generate._quantiles([3.0]) == generate.Seconds(median=3.0, p10=3.0, p90=3.0)


def test_latency_report_is_json_and_names_the_machine(model):
    values = json.loads(json.dumps(asdict(measure_latency(model, 4, 2, 1))))
    assert (values["device"], values["dtype"], values["prompt_length"]) == ("cpu", "float32", 4)
    assert values["threads"] == torch.get_num_threads()
    assert values["machine"]["versions"]["torch"]
    assert 0 < values["decode_s"]["p10"] <= values["decode_s"]["median"] <= values["decode_s"]["p90"]


def test_latency_errors_name_the_argument(model):
    with pytest.raises(ValueError, match="prompt_length must be at least 1, got 0"):
        measure_latency(model, 0, 1, 1)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure_latency(model, 4, 1, 0)
    with pytest.raises(ValueError, match=r"must fit the model's 64 positions, got 60 and 5"):
        measure_latency(model, 60, 5, 1)
