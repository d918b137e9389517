"""Statistics of routers whose choices are known, of every kind of layer, and through the command."""

import json
import math

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from moe_families import tiny_family
from tiny_models import BAM, BAM_SHARED_KV, BAM_TOP_K, MOE, tiny_model, tokens
from torch import nn

from moe_runtime.cli import main
from moe_runtime.config import FeedForwardConfig, RouterConfig
from moe_runtime.feed_forward import MoEFeedForward
from moe_runtime.stats.measure import expert_stats

D = V = 6


class KnownRouter(nn.Module):
    """Token v is the v-th unit vector, so that column v of the router holds its logits."""

    def __init__(self, logits_EV, experts_per_token=1, **router):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.eye(V))
        E = len(logits_EV)
        described = RouterConfig(
            hidden_size=D, num_experts=E, experts_per_token=experts_per_token, **{"gate": "raw", **router}
        )
        self.mlp = MoEFeedForward(FeedForwardConfig(hidden_size=D, intermediate_size=8, router=described))
        with torch.no_grad():
            self.mlp.router.weight.copy_(torch.as_tensor(logits_EV))

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return self.mlp(self.embed(input_ids))[0]


# token:       0     1     2     3     4     5
TO_EXPERT = [
    [3.0, 3.0, 0.0, 1.0, 0.0, 0.0],
    [0.0, 1.0, 2.0, 2.0, 4.0, 5.0],
    [0.0, 0.0, -9.0, 0.0, 1.0, 0.0],
]


def only(stats):
    (router,) = stats.routers
    return router


def ids(*rows):
    return torch.tensor(rows)


def softmax(column):
    exps = [math.exp(value) for value in column]
    return [value / sum(exps) for value in exps]


def entropy(column):
    return -sum(p * math.log(p) for p in softmax(column))


# --- known choices ---


def test_one_expert_per_token():
    """Tokens 0 and 1 go to expert 0, token 2 to expert 1; expert 2 is dead."""
    router = only(expert_stats(KnownRouter(TO_EXPERT), [ids([0, 1, 2, 0])]))
    assert router.load == (0.75, 0.25, 0.0)
    assert (router.num_experts, router.experts_per_token, router.dead) == (3, 1, (2,))
    assert router.max_over_mean == pytest.approx(2.25)
    assert router.variation == pytest.approx(torch.tensor(router.load).std(correction=0).item() * 3)
    columns = [[row[v] for row in TO_EXPERT] for v in (0, 1, 2, 0)]
    expected = sum(map(entropy, columns)) / 4
    assert router.entropy == pytest.approx(expected, rel=1e-6)
    assert router.normalised_entropy == pytest.approx(expected / math.log(3), rel=1e-6)
    margins = [sorted(softmax(column))[2] - sorted(softmax(column))[1] for column in columns]
    assert router.margin == pytest.approx(sum(margins) / 4, rel=1e-6)


def test_two_experts_per_token():
    router = only(expert_stats(KnownRouter(TO_EXPERT, 2), [ids([1, 4], [3, 2])]))
    assert router.load == (3 / 8, 4 / 8, 1 / 8)
    columns = [sorted(softmax([row[v] for row in TO_EXPERT])) for v in (1, 4, 3, 2)]
    assert router.margin == pytest.approx(sum(column[1] - column[0] for column in columns) / 4, rel=1e-6)


def test_a_balanced_router():
    balanced = torch.eye(3).repeat(1, 2)
    router = only(expert_stats(KnownRouter(balanced), [ids([0, 1, 2], [5, 4, 3])]))
    assert (router.max_over_mean, router.variation) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))


def test_all_experts_for_every_token_leave_no_margin():
    router = only(expert_stats(KnownRouter(TO_EXPERT, 3), [ids([0, 1])]))
    assert router.load == (1 / 3, 1 / 3, 1 / 3)
    assert router.margin is None


def test_one_expert_in_all():
    router = only(expert_stats(KnownRouter(TO_EXPERT[:1]), [ids([0, 1])]))
    assert (router.load, router.normalised_entropy, router.margin) == ((1.0,), 0.0, None)
    assert router.to_dict()["mean_weight_cosine"] is None


def test_a_sigmoid_router_is_scored_by_its_normalised_sigmoids():
    router = only(expert_stats(KnownRouter(TO_EXPERT, score="sigmoid"), [ids([3])]))
    scores = [1 / (1 + math.exp(-row[3])) for row in TO_EXPERT]
    scores = [score / sum(scores) for score in scores]
    assert router.entropy == pytest.approx(-sum(p * math.log(p) for p in scores), rel=1e-6)
    assert router.margin == pytest.approx(sorted(scores)[2] - sorted(scores)[1], rel=1e-6)


def test_a_selection_bias_that_overrules_scores_makes_the_margin_negative():
    model = KnownRouter(TO_EXPERT, selection_bias=True)
    model.mlp.router.selection_bias.copy_(torch.tensor([0.0, 0.0, 2.0]))
    router = only(expert_stats(model, [ids([0])]))
    score = softmax([3.0, 0.0, 0.0])
    assert router.load == (0.0, 0.0, 1.0)
    assert router.margin == pytest.approx(score[2] - score[0], rel=1e-6)


def test_padding_counts_nowhere():
    model = KnownRouter(TO_EXPERT)
    padded = {"input_ids": ids([4, 4, 0, 2], [0, 1, 5, 5]), "attention_mask": ids([0, 0, 1, 1], [1, 1, 0, 0])}
    with_padding, without = expert_stats(model, [padded]), expert_stats(model, [ids([0, 2, 0, 1])])
    assert with_padding.tokens == {"all": 4}
    mine, expected = only(with_padding), only(without)
    assert (mine.load, mine.load_by_domain) == (expected.load, expected.load_by_domain)
    assert (mine.entropy, mine.margin) == (pytest.approx(expected.entropy), pytest.approx(expected.margin))
    assert torch.tensor(mine.output_cosine).allclose(torch.tensor(expected.output_cosine))


def test_domains_are_also_counted_apart():
    batches = {"first": [ids([0, 1]), ids([2])], "second": [ids([4, 5, 5, 2, 0])]}
    stats = expert_stats(KnownRouter(TO_EXPERT), batches)
    assert stats.tokens == {"first": 3, "second": 5}
    router = only(stats)
    assert router.load == (3 / 8, 5 / 8, 0.0)
    assert router.load_by_domain == {"first": (2 / 3, 1 / 3, 0.0), "second": (0.2, 0.8, 0.0)}


def test_how_text_is_cut_into_batches_changes_nothing():
    model = tiny_model(MOE)
    rows_BL = tokens(6, 11)
    at_once = expert_stats(model, [rows_BL], output_tokens=30)
    one_by_one = expert_stats(model, rows_BL.split(1), output_tokens=30)
    assert at_once.tokens == one_by_one.tokens
    for whole, parts in zip(at_once.routers, one_by_one.routers, strict=True):
        assert whole.load == pytest.approx(parts.load)
        assert whole.entropy == pytest.approx(parts.entropy, rel=1e-5)
        assert torch.tensor(whole.output_cosine).allclose(torch.tensor(parts.output_cosine), atol=1e-5)


# --- how alike experts are ---


def test_cosines_of_known_experts():
    """Expert 1 is expert 0 with the opposite output, expert 2 shares nothing with them."""
    model = KnownRouter(TO_EXPERT)
    experts = model.mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[1] = experts.gate_up_proj[0]
        experts.down_proj[1] = -experts.down_proj[0]
        experts.gate_up_proj[2].zero_()
        experts.down_proj[0, :3], experts.down_proj[1, :3] = 0.0, 0.0
        experts.down_proj[2, 3:] = 0.0
    router = only(expert_stats(model, [ids([0, 1, 2, 3, 4, 5] * 6)]))
    up, down = experts.gate_up_proj[0].square().sum().item(), experts.down_proj[0].square().sum().item()
    assert router.weight_cosine[0][1] == pytest.approx((up - down) / (up + down), rel=1e-5)
    assert router.weight_cosine[0][2] == pytest.approx(0.0, abs=1e-7)
    assert router.output_cosine[0][1] == pytest.approx(-1.0, rel=1e-5)
    assert (router.output_cosine[0][2], router.output_cosine[0][0]) == (0.0, pytest.approx(1.0))


def test_outputs_are_those_of_every_expert_for_the_same_first_tokens():
    torch.manual_seed(0)
    model = KnownRouter(TO_EXPERT, 2)
    experts = model.mlp.experts
    nn.init.normal_(experts.gate_up_proj), nn.init.normal_(experts.down_proj)
    x_TD = torch.eye(V)[[0, 1, 2, 3, 4] * 4 + [5, 1]]
    gate_ETF, up_ETF = (x_TD @ experts.gate_up_proj.transpose(1, 2)).chunk(2, -1)
    y_ETD = (nn.functional.silu(gate_ETF) * up_ETF) @ experts.down_proj.transpose(1, 2)
    y_ETD = nn.functional.normalize(y_ETD, dim=-1)
    expected_EE = torch.einsum("etd,ftd->ef", y_ETD, y_ETD) / 22
    seen = [ids([0, 1, 2, 3, 4] * 4 + [5, 1] + [2] * 9)]
    actual = only(expert_stats(model, seen, output_tokens=22)).output_cosine
    assert torch.tensor(actual).allclose(expected_EE, atol=1e-5)
    assert only(expert_stats(model, seen, output_tokens=0)).output_cosine is None


# --- kinds of layers ---


@pytest.mark.parametrize("kind", [BAM, BAM_SHARED_KV], ids=["own", "shared"])
def test_a_soft_mixture_of_attention_loads_by_its_mean_gates(kind):
    model = tiny_model(kind)
    gates = []
    router = model.model.layers[0].self_attn.router
    router.register_forward_hook(lambda module, args, output: gates.append(output))
    attention, feed_forward = expert_stats(model, [tokens(2, 9)]).routers[:2]
    assert (attention.kind, feed_forward.kind) == ("attention", "feed_forward")
    assert attention.load == pytest.approx(gates[0].mean(0).tolist(), rel=1e-6)
    assert attention.entropy == pytest.approx(torch.special.entr(gates[0]).sum(1).mean().item(), rel=1e-5)
    assert (attention.experts_per_token, attention.margin, attention.dead) == (3, None, ())


@pytest.mark.parametrize("kind", [BAM, BAM_SHARED_KV], ids=["own", "shared"])
def test_equal_attention_experts_are_alike(kind):
    """Copies of one expert's heads, in the order in which each layout stores them."""
    model = tiny_model(kind)
    attention = model.model.layers[1].self_attn
    S = 1 if kind is BAM else 2
    with torch.no_grad():
        for weight, axis in ((attention.q_proj.weight, 0), (attention.o_proj.weight, 1)):
            heads = weight.unflatten(axis, (S, 3, -1))
            heads.copy_(heads.narrow(axis + 1, 0, 1).expand_as(heads))
        if kind is BAM:
            for projection in (attention.k_proj, attention.v_proj):
                heads = projection.weight.unflatten(0, (3, -1))
                heads.copy_(heads[:1].expand_as(heads))
    router = expert_stats(model, [tokens(2, 9)]).routers[2]
    assert router.name == "model.layers.1.self_attn"
    for matrix in (router.weight_cosine, router.output_cosine):
        assert torch.tensor(matrix).allclose(torch.ones(3, 3), atol=1e-5)


def test_weights_of_attention_experts_are_all_their_projections():
    """With keys and values of their own an expert's heads are neighbours in every projection."""
    model = tiny_model(BAM)
    attention = model.model.layers[0].self_attn
    parts = [getattr(attention, f"{name}_proj").weight.chunk(3) for name in "qkv"]
    parts.append(attention.o_proj.weight.chunk(3, dim=1))
    whole = torch.stack([torch.cat([part[a].flatten() for part in parts]) for a in range(3)])
    whole = nn.functional.normalize(whole.detach(), dim=1)
    actual = expert_stats(model, [tokens(1, 5)]).routers[0].weight_cosine
    assert torch.tensor(actual).allclose(whole @ whole.t(), atol=1e-5)


def test_a_mixture_of_attention_that_chooses():
    model = tiny_model(BAM_TOP_K)
    chosen = []
    router = model.model.layers[0].self_attn.router
    router.register_forward_hook(lambda module, args, output: chosen.append((args[0], output[1])))
    attention = expert_stats(model, [tokens(2, 9)]).routers[0]
    ((x_TD, expert_TK),) = chosen
    assert attention.load == pytest.approx((expert_TK.long().flatten().bincount(minlength=3) / 36).tolist())
    score_TA = (x_TD @ router.weight.t()).softmax(-1)
    expected = score_TA.sort(1).values
    assert attention.margin == pytest.approx((expected[:, 1] - expected[:, 0]).mean().item(), rel=1e-4)
    assert (attention.experts_per_token, attention.output_cosine) == (2, None)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_models_of_transformers(family):
    """Against the logits that the model itself gives out."""
    model = tiny_family(family)
    input_ids = torch.arange(1, 61).view(3, 20)  # 0 is padding, whose embedding is zero
    logits = model(input_ids=input_ids, output_router_logits=True).router_logits
    stats = expert_stats(model, [input_ids])
    assert len(stats.routers) == len(logits) == 2
    for router, logits_TE in zip(stats.routers, logits, strict=True):
        count_E = logits_TE.topk(2).indices.flatten().bincount(minlength=8)
        assert router.load == pytest.approx((count_E / 120).tolist())
        score_TE = logits_TE.float().softmax(-1)
        assert router.entropy == pytest.approx(torch.special.entr(score_TE).sum(1).mean().item(), rel=1e-5)
        assert torch.tensor(router.output_cosine).diagonal().allclose(torch.ones(8))
        assert torch.tensor(router.weight_cosine).diagonal().allclose(torch.ones(8))


def test_sigmoid_routers_of_transformers_are_known():
    model = tiny_family("deepseek_v3")
    input_ids = torch.arange(40).view(2, 20)
    logits_TE = model(input_ids=input_ids, output_router_logits=True).router_logits[0]
    score_TE = logits_TE.sigmoid() / logits_TE.sigmoid().sum(-1, keepdim=True)
    expected = torch.special.entr(score_TE).sum(1).mean().item()
    assert expert_stats(model, [input_ids]).routers[0].entropy == pytest.approx(expected, rel=1e-5)


def test_the_model_is_left_as_it_was():
    """Dropout would draw random numbers; it is off while the model runs."""
    model = tiny_model(MOE, expert_dropout=0.5).train()
    model.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    random_state = torch.get_rng_state()
    expert_stats(model, [tokens(1, 8)])
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


# --- what is refused ---


class NoTuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.gate, self.experts = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids, **_):
        return self.experts(self.gate(self.embed(input_ids)))


BAD_CALLS = [
    (lambda: expert_stats(tiny_model(MOE), []), "batches must hold at least one token that is no padding"),
    (lambda: expert_stats(tiny_model(MOE), [tokens(2, 0)]), "batches must hold at least one token"),
    (lambda: expert_stats(tiny_model(MOE), {"input_ids": tokens(1, 2)}), "lists by domain, got one batch"),
    (lambda: expert_stats(nn.Linear(2, 2), []), "model must have experts with a router, and Linear has none"),
    (
        lambda: expert_stats(NoTuple(), [ids([1, 2])]),
        r"router  \(Linear\) must give \(logits \[T, E\], gates \[T, K\], experts \[T, K\]\), got Tensor",
    ),
]


@pytest.mark.parametrize(
    ("call", "message"), BAD_CALLS, ids=["none", "empty", "one-batch", "dense", "router"]
)
def test_bad_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the command ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bam")
    byte_tokenizer().save_pretrained(folder)
    tiny_model(BAM, vocab_size=VOCAB_SIZE, max_position_embeddings=64).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def two_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, words in {"prose": "the quick brown fox ", "code": "if x == y: "}.items():
        (folder / f"{name}.txt").write_text(words * 9)
    return [str(folder / "prose.txt"), f"python={folder / 'code.txt'}"]


def test_the_command_prints_json_and_writes_a_page(checkpoint, two_texts, tmp_path, capsys):
    page = tmp_path / "made" / "stats.html"
    arguments = ["stats", checkpoint, "--text", two_texts[0], "--text", two_texts[1], "--max-tokens", "70"]
    assert main([*arguments, "--json", "--html", str(page)]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["tokens"] == {"prose": 70, "python": 70}
    assert [router["kind"] for router in report["routers"]] == ["attention", "feed_forward"] * 2
    assert all(sum(router["load"]) == pytest.approx(1.0) for router in report["routers"])
    assert "model.layers.1.self_attn" in captured.err
    text = page.read_text()
    assert text.count("<svg") == 5  # two loads, the layers, two kinds of cosines
    assert text.count("<tr><td>python</td>") == 4  # loads of this domain as numbers, one row per router
    assert [path.name for path in page.parent.iterdir()] == ["stats.html"]


def test_the_command_prints_a_table(checkpoint, two_texts, capsys):
    assert main(["stats", checkpoint, "--text", two_texts[0]]) == 0
    out = capsys.readouterr().out
    assert "entropy / ln E" in out
    assert "Tokens: 180 of prose." in out


COMMANDS = [
    (["--text", "nowhere.txt"], "--text: there is no file nowhere.txt"),
    (["--text", "{prose}", "--text", "{prose}"], "each domain once, got 'prose' twice; write NAME="),
    (["--text", "{prose}", "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
    (["--text", "{prose}", "--html", "{folder}"], "--html must be a file, and"),
    (["--text", "{prose}", "--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMANDS)
def test_mistakes_are_told_in_one_sentence(arguments, message, checkpoint, two_texts, capsys):
    places = {"prose": two_texts[0], "folder": checkpoint}
    assert main(["stats", checkpoint, *(argument.format(**places) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_text_is_named(checkpoint, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    assert main(["stats", checkpoint, "--text", str(tmp_path / "empty.txt")]) == 2
    assert "empty.txt must give at least 1 tokens, got 0" in capsys.readouterr().err


def test_a_dense_model_is_refused(tiny_checkpoint, two_texts, capsys):
    assert main(["stats", str(tiny_checkpoint), "--text", two_texts[0]]) == 2
    assert "model must have experts with a router, and LlamaForCausalLM has none" in capsys.readouterr().err
