"""The ablation compares every method on the same samples, and says no more than its seeds do."""

import json
import subprocess
import sys

import pytest

from benchmarks.ablation import section
from benchmarks.ablation.run import MATCHED
from benchmarks.ablation.settings import TINY
from benchmarks.ablation.summary import METHODS, conclude, raw_values, statistic, summarise
from moe_runtime.config import ModelConfig
from moe_runtime.flops import training_flops

UPIT = [name for name in METHODS if name.startswith("upit")]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    command = [sys.executable, "-m", "benchmarks", "ablation", "--tiny"]
    subprocess.run([*command, "--folder", folder / "work", "--output", folder / "results"], check=True)
    (path,) = folder.glob("results/*/*_ablation.json")
    return json.loads(path.read_text())


def test_every_method_sees_as_many_tokens_and_its_own_flops(content):
    rows = {row["method"]: row for row in summarise(content)["rows"]}
    assert set(rows) == {*METHODS, *(f"dense-at-{name}" for name in MATCHED)}
    tokens = 2 * 3 * TINY.samples * TINY.length
    for name in ("dense", "copy", "drop", "btx", "bam"):
        assert rows[name]["tokens"] == pytest.approx(tokens, rel=0.1), name
    for name in UPIT:  # and the routers' seed samples
        assert tokens * 0.9 <= rows[name]["tokens"] <= tokens * (1.1 + TINY.seed_fraction * TINY.route_epochs)
    sizes = {**TINY.model, "head_dim": 8, "vocab_size": TINY.vocab_size}
    per_token = training_flops(ModelConfig(**sizes, tie_word_embeddings=True), TINY.length)
    assert rows["dense"]["flops"] == rows["dense"]["tokens"] * per_token
    assert rows["btx"]["flops"] < rows["copy"]["flops"] == rows["drop"]["flops"]
    for name in MATCHED:
        assert rows[f"dense-at-{name}"]["flops"] == pytest.approx(rows[name]["flops"], rel=0.15), name
    assert all(-1 <= rows[name]["expert_cosine"]["mean"] <= 1 for name in UPIT)
    assert all(row["loss"]["mean"] < content["base"]["mean_loss"] for row in rows.values())


def test_its_page_shows_every_row_and_the_picture_every_method(content):
    head, rows = section.ablation_rows(content)
    assert all(len(row) == len(head) for row in rows)
    assert [row[0] for row in rows] == ["base", *(row["title"] for row in summarise(content)["rows"])]
    assert f"{3 * TINY.base_samples:,} samples of {TINY.length} tokens" in section.explained(content)
    assert section.draw_ablation(content).startswith("<svg")
    assert len(conclude(summarise(content))) == len(METHODS) - 1 + 2


def of_seeds(**losses):
    """Stage values in which each method's loss in seed s is the s-th number given."""
    values = {"base": {"perplexity": {"a": 2.0}, "mean_loss": 9.0, "texts": {}, "samples": 1}}
    for name in METHODS:
        for seed, loss in enumerate(losses.get(name.replace("-", "_"), (3.0, 3.1))):
            found = {"mean_loss": loss, "perplexity": {"a": loss}, "tokens": 10, "flops": 20}
            values[f"seed{seed}-{name}"] = found | ({"expert_cosine": 0.5} if name in UPIT else {})
    return raw_values(values, (0, 1))


def test_differences_are_paired_and_told_apart_by_their_spread():
    values = of_seeds(copy=(2.9, 3.0), drop=(2.5, 3.6), upit_routed_recorded=(2.8, 2.9))
    found = summarise(values)
    assert found["against_dense"]["copy"]["tokens"] == pytest.approx(
        {"mean": -0.1, "std": 0.0, "error": 0.0, "n": 2}
    )
    assert found["factors"]["router"]["mean"] == pytest.approx(-0.1)
    assert found["factors"]["expansion"]["mean"] == pytest.approx(0.1)
    sentences = conclude(found)
    told = "not told apart (+0.0000 ± 0.5000 nats per token) at equal tokens."
    assert sentences[1] == f"drop against continued dense training: {told}"


def test_equal_flops_are_those_of_the_nearest_dense_training():
    content = of_seeds(copy=(2.9, 3.0))
    for found in content["seeds"].values():
        for name, flops, loss in (("copy", 20.2, 2.5), ("btx", 30, 2.0)):
            found[f"dense-at-{name}"] = found["dense"] | {"flops": flops, "mean_loss": loss}
        found["bam"]["flops"] = 26
    against = summarise(content)["against_dense"]
    assert against["drop"]["flops"]["mean"] == pytest.approx(3.05 - 2.5)
    assert "flops" not in against["bam"]


def test_a_clear_difference_is_better_or_worse():
    values = of_seeds(copy=(2.9, 3.002), btx=(3.5, 3.602), drop=(2.9, 3.03))
    sentences = conclude(summarise(values))
    assert "copy against continued dense training: better (-0.0990 ± 0.0010" in sentences[0]
    assert "BTX against continued dense training: worse (+0.5010 ± 0.0010" in sentences[2]
    # four standard errors of two seeds are chance
    assert "drop against continued dense training: not told apart (-0.0850 ± 0.0150" in sentences[1]


def test_statistics_are_those_of_the_sample():
    assert statistic([1.0, 3.0]) == pytest.approx({"mean": 2.0, "std": 2**0.5, "error": 1.0, "n": 2})
