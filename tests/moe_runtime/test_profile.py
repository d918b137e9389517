"""`moe-runtime profile`: what it measures, what it refuses, and what it writes."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import BAM, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DbrxConfig,
    GraniteMoeSharedConfig,
    JetMoeConfig,
    MambaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
)

from moe_runtime import shapes
from moe_runtime.cli import main
from moe_runtime.hf.loading import load_causal_lm
from moe_runtime.hf.profiled import dense_twin, described, random_causal_lm
from moe_runtime.profile import measure, roof, run, variants
from moe_runtime.profile.breakdown import _decoder_layers, model_parts, timed_parts
from moe_runtime.profile.page import render_page
from moe_runtime.profile.settings import Cell, ProfileSettings, parse_sizes

ROOT = Path(__file__).resolve().parents[2]
LAYERS, STEPS = 2, 3
SMALL = ("--prompt", 4, "--output", 2, "--rounds", 2)
SETTINGS = ProfileSettings(batches=(1,), prompts=(6,), outputs=(STEPS + 1,), rounds=2)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Two threads only wait for each other over such small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _small_roof(monkeypatch):
    monkeypatch.setitem(roof.PRODUCT, "cpu", 64)
    monkeypatch.setitem(roof.COPIED, "cpu", 2**20)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Folder of a tiny Mixtral without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(mixtral):
    return load_causal_lm(mixtral)


@pytest.fixture
def profiled(capsys):
    """`profiled("MODEL", …)` -> (exit code, stdout, stderr) of the command, in this process."""

    def call(*words):
        code = main(["profile", *map(str, words)])
        return code, *capsys.readouterr()

    return call


# --- one whole run ---


@pytest.fixture(scope="module")
def files(mixtral, tmp_path_factory):
    """Folder of the report, the page and the trace of a run over two batch sizes."""
    folder = tmp_path_factory.mktemp("profile")
    words = [mixtral, "--batch", "1,2", "--prompt", "6", "--output", STEPS + 1, "--rounds", "2"]
    words += ["--output-dir", folder / "out", "--html", "--trace", folder / "out" / "trace.json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(roof.PRODUCT, "cpu", 64)
        patch.setitem(roof.COPIED, "cpu", 2**20)
        assert main(["profile", *map(str, words)]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def report(files):
    return json.loads((files / "report.json").read_text())


def test_only_whole_files_are_left(files):
    assert {path.name for path in files.iterdir()} == {"report.json", "report.html", "trace.json"}


def test_every_cell_has_every_variant_and_says_how_often_it_ran(report):
    assert [(cell["batch"], cell["prompt"], cell["output"]) for cell in report["cells"]] == [
        (1, 6, STEPS + 1),
        (2, 6, STEPS + 1),
    ]
    for cell in report["cells"]:
        assert list(cell["variants"]) == ["moe_runtime", "grouped_mm", "dense"]
        for entry in cell["variants"].values():
            assert entry["time_to_first_token_s"]["count"] == len(entry["samples"]["prefill"]) == 2
            assert entry["time_per_output_token_s"]["count"] == len(entry["samples"]["decode"]) == 2 * STEPS
            step = entry["time_per_output_token_s"]
            assert 0 < step["p50"] <= step["p90"] <= step["p99"] <= max(entry["samples"]["decode"])
            made = cell["batch"] * cell["output"]
            assert entry["tokens_per_s"] == pytest.approx(made / entry["request_s"]["p50"])
            assert sum(entry["samples"]["run"]) == pytest.approx(
                sum(entry["samples"]["prefill"] + entry["samples"]["decode"])
            )


def test_variants_of_one_model_were_compared(report):
    (name, found), *others = report["agreement"].items()
    assert (name, found["reference"], others) == ("moe_runtime", "grouped_mm", [])
    assert found["difference"] < 1e-5
    assert found["same_top_token"] == 1.0


def test_the_dense_model_has_the_flops_of_the_mixture(report):
    mixture, dense = report["variants"]["moe_runtime"], report["variants"]["dense"]
    assert dense["model_type"] == "mistral"
    assert dense["parameters"] < mixture["parameters"]
    # one unit of width is 3 * 2 * D FLOPs per layer
    assert abs(dense["forward_flops_per_token"] - mixture["forward_flops_per_token"]) <= 3 * 32 * LAYERS
    assert any("active FLOPs of the mixture" in note for note in report["notes"])


def test_the_report_names_machine_weights_and_settings(report):
    assert {"commit", "versions", "threads"} <= report["machine"].keys()
    assert (report["dtype"], report["device"], report["weights"]) == ("float32", "cpu", "the checkpoint's")
    assert report["settings"]["rounds"] == 2
    assert "The experts of the variant moe_runtime run on expert_ffn." in report["notes"]


def test_breakdowns_add_up_to_the_step(report):
    for cell in report["cells"]:
        for name, entry in cell["variants"].items():
            breakdown = entry["breakdown"]
            assert (breakdown["prefills"], breakdown["steps"]) == (2, STEPS)
            for phase in ("prefill", "decode"):
                step = breakdown[phase]
                assert sum(step["components"].values()) == pytest.approx(step["total"])
                assert min(step["components"].values()) > 0
                assert len(step["layers"]) == LAYERS
                assert 0 < sum(step["layers"]) < step["total"]
                assert ("experts" in step["components"]) == ("router" in step["components"])
                assert ("experts" in step["components"]) == (name != "dense")
                assert {"attention", "feed-forward", "norms", "head"} <= step["components"].keys()


def test_operations_name_ours_where_they_run(report):
    ours = report["operations"]["variants"]["moe_runtime"]
    theirs = report["operations"]["variants"]["grouped_mm"]
    for phase in ("prefill", "decode"):
        assert "moe_runtime::expert_ffn" in [row["name"] for row in ours[phase]]
        assert not any(row["name"].startswith("moe_runtime::") for row in theirs[phase])
        assert all(row["calls"] > 0 and row["self_s"] <= row["total_s"] + 1e-9 for row in ours[phase])
        assert 0 < sum(row["share"] for row in ours[phase]) <= 1 + 1e-9
    calls = {row["name"]: row["calls"] for row in ours["decode"]}
    assert calls["moe_runtime::expert_ffn"] == LAYERS * STEPS


def test_shares_of_the_roof_follow_from_flops_and_time(report):
    entry = report["cells"][0]["variants"]["grouped_mm"]
    speed = entry["prefill_flops"] / entry["time_to_first_token_s"]["p50"]
    assert entry["prefill_share_of_product"] == pytest.approx(speed / report["roof"]["flops_per_s"])
    speed = entry["decode_bytes"] / entry["time_per_output_token_s"]["p50"]
    assert entry["decode_share_of_copy"] == pytest.approx(speed / report["roof"]["bytes_per_s"])


def test_the_trace_names_steps_layers_and_parts(files):
    events = json.loads((files / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    for variant in ("moe_runtime", "grouped_mm", "dense"):
        assert names.count(f"{variant}: prefill of 2 x 6") == 1
        assert names.count(f"{variant}: decode step {STEPS} of 2") == 1
    assert names.count("layer 1: experts") == 2 * (1 + STEPS)  # two variants have experts
    assert names.count("layer 0") == 3 * (1 + STEPS)


def test_the_page_stands_alone_and_shows_the_figures(files, report):
    text = (files / "report.html").read_text()
    assert text.count("<svg") == 3 + len(report["cells"])
    assert "http-equiv" not in text
    assert "<script" not in text
    for name in report["variants"]:
        assert name in text
    assert "moe_runtime::expert_ffn" in text
    assert "the process held" in text


# --- other models ---


def profile_of(source, **changes):
    return run.run_profile(str(source), settings=changes.pop("settings", SETTINGS), **changes)


def test_a_model_of_ours_stands_beside_a_dense_one(tmp_path):
    tiny_model(BAM).save_pretrained(tmp_path)
    found = profile_of(tmp_path)
    assert list(found["variants"]) == ["moe_runtime", "dense"]
    assert found["variants"]["dense"]["model_type"] == "moe_runtime"
    assert found["agreement"] == {}
    parts = found["cells"][0]["variants"]["moe_runtime"]["breakdown"]["decode"]["components"]
    assert {"attention router", "router", "experts"} <= parts.keys()


def test_a_dense_model_is_measured_as_it_is(tiny_checkpoint):
    found = profile_of(tiny_checkpoint)
    assert list(found["variants"]) == ["transformers"]
    with pytest.raises(
        ValueError, match=r"--compare dense needs a mixture .*: the model has neither experts"
    ):
        profile_of(tiny_checkpoint, compare=["dense"])
    with pytest.raises(ValueError, match="must name some of transformers for this model, got 'grouped_mm'"):
        profile_of(tiny_checkpoint, compare=["grouped_mm"])


def test_a_config_of_a_family_without_flops_gets_random_weights_and_no_dense_model(tmp_path):
    config = GraniteMoeSharedConfig(**SIZES)
    config.save_pretrained(tmp_path)
    settings = ProfileSettings(prompts=(6,), outputs=(1,), rounds=2)
    found = profile_of(tmp_path / "config.json", settings=settings, dtype="bfloat16")
    assert list(found["variants"]) == ["moe_runtime", "grouped_mm"]
    assert (found["weights"], found["dtype"]) == ("random, seed 0", "bfloat16")
    assert any(note.startswith("No FLOPs and no dense model: model_type") for note in found["notes"])
    entry = found["cells"][0]["variants"]["moe_runtime"]
    assert entry["time_per_output_token_s"] is None
    assert "prefill_flops" not in entry
    assert "of decode steps" not in render_page(found)


@pytest.mark.parametrize("output", [1, 3])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1), "MambaForCausalLM"),
        (BertConfig(**SIZES), "BertLMHeadModel"),  # returns past_key_values=None: it is no decoder
    ],
)
def test_models_without_a_cache_are_refused(tmp_path, config, name, output):
    config.save_pretrained(tmp_path)
    settings = ProfileSettings(prompts=(6,), outputs=(output,), rounds=2)
    with pytest.raises(ValueError, match=rf"must decode with a cache \(past_key_values\), got {name}$"):
        profile_of(tmp_path / "config.json", settings=settings)


def test_random_weights_come_from_the_seed(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny_model().config.model_config())
    state = torch.random.get_rng_state()
    place = torch.device("cpu")

    def weights(seed):
        model, origin = variants.load_subject("tiny", dtype="auto", device=place, seed=seed)
        assert origin == f"random, seed {seed}"
        return model.lm_head.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("family", "dense_family"),
    [("qwen2_moe", "qwen2"), ("qwen3_moe", "qwen3"), ("flex_olmo", "olmo2"), ("granitemoe", "granite")],
)
def test_dense_twins_are_of_the_dense_family_and_the_width_asked_for(family, dense_family):
    from transformers import AutoConfig

    sizes = {**SIZES, "num_experts": 5, "moe_intermediate_size": 24, "head_dim": 8}
    if family == "flex_olmo":
        sizes["pad_token_id"] = None
    config = AutoConfig.for_model(family, **sizes, shared_expert_intermediate_size=40, norm_topk_prob=True)
    dense = variants.match_dense(described(config), context=16).config
    twin = dense_twin(config, dense)
    assert twin.model_type == dense_family
    assert described(twin).to_dict() | {"router_aux_loss_coef": 0} == dense.to_dict() | {
        "router_aux_loss_coef": 0
    }
    model = random_causal_lm(twin, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    assert not any("experts" in name for name, _ in model.named_parameters())


def test_the_documented_commands_run(mixtral, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "copy").symlink_to(mixtral)
    text = (ROOT / "docs" / "profile.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("moe-runtime profile ")]
    assert len(commands) == 2
    for command in commands:  # in smaller sizes: of an option that is given twice the last one counts
        assert main([*command.split()[1:], "--batch", "1", *map(str, SMALL)]) == 0
    found = {path.name for path in (tmp_path / "runs" / "profile").iterdir()}
    assert found == {"report.json", "report.html", "trace.json"}


# --- correctness comes first ---


def test_nothing_is_timed_when_logits_differ(profiled, mixtral, monkeypatch, tmp_path):
    from moe_runtime.hf import experts_interface

    right = experts_interface.expert_ffn
    monkeypatch.setattr(experts_interface, "expert_ffn", lambda *args, **kw: 0.5 * right(*args, **kw))
    monkeypatch.setattr(run, "time_cell", lambda *args: pytest.fail("it was timed"))
    code, _, err = profiled(mixtral, *SMALL, "--output-dir", tmp_path / "out")
    assert (code, (tmp_path / "out").exists()) == (1, False)
    assert "moe_runtime and grouped_mm compute different logits: the rms of the difference is" in err
    assert "may be 0.001 in float32; nothing was timed" in err


def test_logits_that_are_not_finite_are_refused(model):
    model.lm_head.weight.data[0, 0] = math.nan
    found, _ = variants.make_variants(model, ["eager"], context=8, seed=0)
    with pytest.raises(RuntimeError, match="the logits of eager are not finite; nothing was timed"):
        measure.check_agreement(found, Cell(batch=1, prompt=4, output=2), 0)


def test_an_implementation_without_its_package_is_named(model, monkeypatch):
    def needs_more(*args, **kwargs):
        raise ImportError("it needs a package")

    monkeypatch.setattr(model, "forward", needs_more)
    found, _ = variants.make_variants(model, ["sonicmoe"], context=8, seed=0)
    with pytest.raises(ValueError, match="--compare sonicmoe cannot run here: it needs a package"):
        measure.check_agreement(found, Cell(batch=1, prompt=4, output=2), 0)


def test_the_reference_is_not_ours_in_any_order(model):
    names = ["dense", "moe_runtime", "eager", "grouped_mm"]
    found, _ = variants.make_variants(model, names, context=8, seed=0)
    assert [variant.name for variant in found] == names
    with torch.no_grad():
        agreement = measure.check_agreement(found, Cell(batch=1, prompt=4, output=2), 0)
    assert {name: value.reference for name, value in agreement.items()} == {
        "moe_runtime": "eager",
        "grouped_mm": "eager",
    }


# --- parts ---


def test_variants_take_turns_in_a_rotating_order():
    assert measure.in_turns(["a", "b", "c"], 3) == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_every_variant_runs_on_its_own_implementation(model):
    found, _ = variants.make_variants(model, ["eager", "moe_runtime"], context=8, seed=0)
    for variant in found:
        variant.enter("prefill")
        assert model.config._experts_implementation == variant.name
        variant.enter("decode")
        assert model.config._experts_implementation == variant.name


@pytest.mark.parametrize(("device", "decodes_on"), [("cpu", "grouped_mm"), ("cuda", "batched_mm")])
def test_grouped_mm_decodes_as_generate_has_it(device, decodes_on):
    entered = []
    model = SimpleNamespace(device=torch.device(device), set_experts_implementation=entered.append)
    variant = variants.Variant(name="a", title="a", model=model, config=None, implementation="grouped_mm")
    variant.enter("prefill")
    variant.enter("decode")
    variant.enter("prefill")
    assert entered == ["grouped_mm", decodes_on, "grouped_mm"]


def test_time_is_charged_to_the_part_and_the_layer_that_spend_it(model):
    experts = model.model.layers[1].mlp.experts
    right = experts.forward

    def slow(*args):
        time.sleep(0.2)
        return right(*args)

    experts.forward = slow
    with torch.no_grad(), timed_parts(model) as read:
        for _ in range(2):  # what was read is not read again
            model(input_ids=torch.zeros(1, 3, dtype=torch.long))
            times = read()
    assert 0.2 <= times.layers[1] <= times.total
    assert 0.2 <= times.components["experts"] <= times.total
    assert sum(times.components.values()) == pytest.approx(times.total)
    assert times.components["feed-forward"] < 0.2


def test_parts_are_found_in_groups_and_behind_one_name_for_all_of_them():
    names = {
        "norm_attn_norm": None,
        "norm_attn_norm.norm_1": "norms",
        "norm_attn_norm.attn": "attention",
        "ffn": "feed-forward",
        "ffn.router": "router",
        "ffn.experts": "experts",
    }
    attention = {"kv_n_heads": 2, "rope_theta": 1e4}
    feed_forward = {"moe_num_experts": 4, "hidden_size": 32}
    config = DbrxConfig(d_model=32, n_heads=4, n_layers=1, attn_config=attention, ffn_config=feed_forward)
    assert _components_of(config, 0, names) == names

    config = NemotronHConfig(**SIZES, layers_block_type=["mamba", "attention", "moe", "mlp"])
    mixers = [_components_of(config, number, ["norm", "mixer", "mixer.norm"]) for number in (0, 1, 2, 3)]
    assert [found["mixer"] for found in mixers] == [
        "state space",
        "attention",
        "feed-forward",
        "feed-forward",
    ]
    assert [found["norm"] for found in mixers] == ["norms"] * 4
    assert mixers[0]["mixer.norm"] is None
    in_mixer = {"mixer.gate": "router", "mixer.experts": "experts", "mixer.shared_experts": "shared expert"}
    assert _components_of(config, 2, in_mixer) == in_mixer


def _components_of(config, number, names):
    """What modules of a layer are counted as, by their names."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parts, layer = model_parts(model), _decoder_layers(model)[number]
    found = {name: parts[module].component for name, module in layer.named_modules() if module in parts}
    return {name: found.get(name) for name in names}


def test_routers_in_attention_stand_by_themselves():
    config = JetMoeConfig(**SIZES)
    names = {"self_attention.experts.router": "attention router", "mlp.router": "router"}
    assert _components_of(config, 0, names) == names


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(ValueError, match="stopped"), timed_parts(model):
        raise ValueError("stopped")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model_parts(model))


@pytest.mark.parametrize(("enough", "rounds"), [(60.0, 1 + roof.ROUNDS), (0.01, 1)])
def test_slow_products_are_not_repeated(monkeypatch, enough, rounds):
    monkeypatch.setattr(roof, "ENOUGH_S", enough)
    calls = []

    def product():
        calls.append(None)
        time.sleep(0.02)

    assert roof._median_seconds(product, torch.device("cpu")) >= 0.02
    assert len(calls) == rounds


def test_added_memory_is_that_of_the_run():
    place = torch.device("cpu")
    nothing = measure.added_memory(place, lambda: None)
    if nothing is None:
        pytest.skip("this system cannot reset the high-water mark")
    size = 2**26
    assert nothing < size / 4
    assert 0.9 * size < measure.added_memory(place, lambda: torch.ones(size // 4)) < 1.5 * size


def test_quantiles_are_linear_between_neighbours():
    assert run.summarize([3.0, 1.0, 2.0]) == pytest.approx({"p50": 2.0, "p90": 2.8, "p99": 2.98, "count": 3})


def test_sizes():
    assert parse_sizes("--batch", "4, 1,4") == (4, 1)
    assert [str(cell) for cell in ProfileSettings(batches=(1, 2), prompts=(8,), outputs=(4,)).cells] == [
        "1 x 8 + 4",
        "2 x 8 + 4",
    ]


# --- bad input ---


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--batch 0", "--batch must be whole numbers of at least 1, joined by commas, got '0'"),
        ("--prompt 1,x", "--prompt must be whole numbers of at least 1, joined by commas, got '1,x'"),
        ("--output -1", "--output must be whole numbers of at least 1, joined by commas, got '-1'"),
        ("--output 2.5", "--output must be whole numbers of at least 1, joined by commas, got '2.5'"),
        ("--rounds 1", "rounds must be at least 2, so that there is a spread, got 1"),
        ("--prompt 250 --output 8", "must fit the model's 256 positions, got 250 and 8"),
        ("--compare nope", "--compare must name some of moe_runtime, eager, "),
        ("--device tpu", "--device must be cpu or cuda, got 'tpu'"),
        ("--dtype int8", "--dtype must be auto, float32, bfloat16, float16, got 'int8'"),
        ("--output-dir FILE", "--output-dir must be a folder, and FILE is a file"),
        ("--output-dir FILE/x", "--output-dir must be a folder, and FILE is a file"),
        ("--trace FOLDER", "--trace must be a file, and FOLDER is a folder"),
        (
            "--trace FOLDER/../out/report.json",
            "--trace must be another file than report.json and report.html",
        ),
        ("--trace FOLDER/../out/report.html --html", "of --output-dir, got FOLDER/../out/report.html"),
        ("--trace FILE/trace.json", "--trace must be in a folder, and FILE is a file"),
    ],
)
def test_mistakes_exit_with_2_and_one_sentence(profiled, mixtral, tmp_path, words, sentence):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("kept")
    folder.mkdir()

    def named(text):
        return text.replace("FILE", str(file)).replace("FOLDER", str(folder))

    words = [] if "--output-dir" in words else ["--output-dir", tmp_path / "out"], named(words).split()
    code, out, err = profiled(mixtral, *words[0], *words[1])
    last = err.splitlines()[-1]
    assert (code, out) == (2, "")
    assert last.startswith("moe-runtime: ")
    assert named(sentence) in last
    assert file.read_text() == "kept"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("no/such", "MODEL: there is no folder or file no/such"),
        ("mixtral", "no shape is named 'mixtral'; did you mean 'mixtral-8x7b'?"),
        ("empty", "empty must hold a config.json, and has none"),
        ("config.json", "model_type in config.json must be one that transformers knows, got 'nope'"),
    ],
)
def test_models_that_are_not_there_are_named(profiled, monkeypatch, tmp_path, model, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "nope"}')
    code, _, err = profiled(model)
    assert code == 2
    assert sentence in err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_a_gpu_that_is_not_there_is_refused(profiled, mixtral):
    code, _, err = profiled(mixtral, "--device", "cuda")
    assert code == 2
    assert "--device must be cpu where there is no CUDA GPU, got 'cuda'" in err


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(monkeypatch, mixtral):
    monkeypatch.setattr(variants, "_free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"mixtral-8x7b needs 186\.8 GB .* in float32, and cpu has 0\.0 GB"):
        profile_of("mixtral-8x7b")
    with pytest.raises(ValueError, match=r"--compare dense needs 0\.0 GB for its weights"):
        profile_of(mixtral)


def test_missing_plots_are_told_before_anything_is_measured(profiled, mixtral, monkeypatch, tmp_path):
    monkeypatch.setattr("moe_runtime.profile.cli.find_spec", lambda name: None)
    code, _, err = profiled(mixtral, "--html", "--output-dir", tmp_path / "out")
    assert code == 2
    assert err == (
        "moe-runtime: --html needs matplotlib for its plots; run: pip install 'moe-runtime[demo]'\n"
    )


def test_an_interrupt_leaves_nothing(profiled, mixtral, monkeypatch, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "time_cell", interrupt)
    code, out, err = profiled(mixtral, *SMALL, "--output-dir", tmp_path / "out", "--json")
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_json_is_alone_on_stdout(profiled, mixtral, tmp_path):
    code, out, err = profiled(mixtral, *SMALL, "--compare", "eager", "--json", "--output-dir", tmp_path)
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "report.json").read_text())
    assert "profile operations" in err
    assert not (tmp_path / "report.html").exists()
