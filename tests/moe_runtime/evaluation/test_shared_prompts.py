"""Endings of prompts that are computed once get the scores of whole sequences; not all models can."""

import inspect
import random

import pytest
import torch
from moe_families import tiny_family
from tiny_models import BAM, MOE, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from moe_runtime.evaluation import scoring, shared_prompts
from moe_runtime.evaluation.scoring import Scored, score
from moe_runtime.evaluation.shared_prompts import score_endings, shared_tokens, shares_prompts

VOCAB = 61


def groups(count=7, longest=24):
    """Prompts of 1 to `longest` tokens with one to four endings each, which may begin alike too."""
    draw = random.Random(0)

    def ids(n):
        return [draw.randrange(VOCAB) for _ in range(n)]

    made = []
    for number in range(count):
        prompt = ids(1 + number * (longest - 1) // (count - 1))
        begins = ids(number % 2)
        endings = [begins + ids(draw.randint(1, 5)) for _ in range(1 + number % 4)]
        made.append([Scored(prompt + ending, len(prompt)) for ending in endings])
    return made


def gpt2(**options):
    torch.manual_seed(0)
    positions = max(len(sequence.ids) for group in groups() for sequence in group)
    config = GPT2Config(vocab_size=VOCAB, n_positions=positions, n_embd=32, n_layer=2, n_head=2, **options)
    return GPT2LMHeadModel(config).eval()


def mistral(window):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=VOCAB, num_key_value_heads=2, sliding_window=window, initializer_range=0.3, **sizes
    )
    return MistralForCausalLM(config).eval()


MODELS = {
    "moe_runtime": lambda: tiny_model(MOE),
    "moe_runtime sliding": lambda: tiny_model(
        MOE, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "bam": lambda: tiny_model(BAM),
    "mixtral": lambda: tiny_family("mixtral"),
    "mistral sliding": lambda: mistral(6),
    "gpt2": gpt2,  # positions that are learned end with the longest sequence
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_those_of_whole_sequences(name, monkeypatch):
    model, asked = MODELS[name](), groups()
    expected = score(model, [sequence for group in asked for sequence in group])
    whole = []
    monkeypatch.setattr(shared_prompts, "score", lambda *args: whole.append(args[1]) or score(*args))
    tokens = []
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 150)  # several batches
    found = score_endings(model, asked, tokens.append)
    assert [len(scores) for scores in found] == [len(group) for group in asked]
    for mine, theirs in zip([s for scores in found for s in scores], expected, strict=True):
        assert mine.log_likelihood == pytest.approx(theirs.log_likelihood, rel=1e-5, abs=1e-5)
        assert (mine.tokens, mine.right) == (theirs.tokens, theirs.right)
    assert [len(sequences) for sequences in whole] == [1]  # only the prompt of one token, which is needed
    assert len(tokens) > 2
    assert sum(tokens) == sum(len(sequence.ids) for group in asked for sequence in group)


def test_a_prompt_is_computed_once(monkeypatch):
    model, seen = tiny_model(MOE), []
    model.register_forward_pre_hook(
        lambda _module, _args, options: seen.append(options["input_ids"].shape), with_kwargs=True
    )
    prompt = list(range(20))
    endings = [Scored([*prompt, 30, 31], 20), Scored([*prompt, 40, 41, 42], 20)]
    score_endings(model, [endings])
    assert seen == [
        (1, 1),
        (1, 19),
        (2, 3),
    ]  # which cache it has, the prompt, its last token with the endings


def test_logits_are_made_where_they_are_scored():
    model, seen = tiny_model(MOE), []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[:2]))
    score(model, [Scored(list(range(30)), 25), Scored(list(range(20)), 18)])
    assert seen == [(2, 13)]
    seen.clear()
    score_endings(model, [[Scored(list(range(20)), 18), Scored([*range(18), 7, 8], 18)]])
    assert seen[1:] == [(1, 1), (2, 2)]


def test_tokens_are_shared_as_far_as_all_are_alike():
    assert shared_tokens([Scored([1, 2, 3, 4], 3), Scored([1, 2, 3, 5], 3)]) == 2
    assert shared_tokens([Scored([1, 2, 3, 4], 3), Scored([1, 9, 3, 5], 3)]) == 1
    assert shared_tokens([Scored([1, 2, 3, 4], 3), Scored([1, 2], 2)]) == 1
    assert shared_tokens([Scored([1, 2, 3], 1)]) == 0


def test_nothing_scored_is_a_score_of_nothing():
    ids = list(range(9))
    ((found, other),) = score_endings(tiny_model(MOE), [[Scored(ids, 9), Scored([*ids, 3], 9)]])
    assert (found.log_likelihood, found.tokens, found.right) == (0.0, 0, 0)
    assert other.tokens == 1


def test_models_that_need_more_of_a_prompt_are_computed_whole(monkeypatch):
    assert shares_prompts(tiny_model(MOE))
    assert shares_prompts(tiny_family("mixtral"))
    assert not shares_prompts(tiny_family("minimax"))  # linear attention keeps a state
    assert not shares_prompts(tiny_family("jamba"))
    model = tiny_family("mixtral")
    monkeypatch.setattr(model.config, "rope_parameters", {"rope_type": "dynamic", "factor": 2.0})
    assert not shares_prompts(model)
    model = gpt2(use_cache=False)
    forward = model.forward

    def without_positions(input_ids, attention_mask=None, **options):
        return forward(input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(model, "forward", without_positions)
    assert "position_ids" not in inspect.signature(model.forward).parameters
    assert not shares_prompts(model)


def test_such_models_get_the_same_scores():
    model, asked = tiny_family("minimax"), groups()
    for mine, group in zip(score_endings(model, asked), asked, strict=True):
        for found, expected in zip(mine, score(model, group), strict=True):
            assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-5, abs=1e-5)


def test_endings_that_fit_no_batch_together_are_computed_whole(monkeypatch):
    model, whole = tiny_model(MOE), []
    monkeypatch.setattr(shared_prompts, "score", lambda *args: whole.append(args[1]) or score(*args))
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 60)
    asked = [[Scored([*range(20), last], 20) for last in range(n)] for n in (2, 3)]
    score_endings(model, asked)
    assert whole == [asked[1]]


def test_no_batch_is_longer_than_the_model_takes():
    model, seen = gpt2(), []
    longest = model.config.n_positions
    asked = [
        [Scored([*range(longest - 1), last], longest - 1) for last in (1, 2)],
        [Scored([1, 2, 3, *range(longest - 3)], 3), Scored([1, 2, 3, 4], 3)],
    ]
    model.register_forward_pre_hook(
        lambda _module, _args, options: seen.append(
            options.get("attention_mask", options["input_ids"]).shape[1]
        ),
        with_kwargs=True,
    )
    score_endings(model, asked)
    assert max(seen) <= longest
