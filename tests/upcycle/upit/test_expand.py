"""Children of experts: their arithmetic, their parents, and how alike experts are."""

import json
import shutil
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from safetensors.numpy import load_file
from upit_runs import experts_of, record_low_rank, record_shifted

import upcycle.provenance
import upcycle.upit.similarity
from upcycle.errors import UpcycleError
from upcycle.upit.expand import Origin, dare, expand, read_origins, write_child
from upcycle.upit.expert import open_expert, write_expert
from upcycle.upit.feed_forward import feed_forward_tensors
from upcycle.upit.files import generator
from upcycle.upit.recipe import ExpandRecipe
from upcycle.upit.similarity import similarities, similarity_matrix

NAME = "model.layers.1.mlp.down_proj.weight"


def deltas(folder):
    """What an expert adds to its base, by tensor."""
    expert = open_expert(folder)
    own = load_file(expert.folder / "expert.safetensors")
    if expert.kind == "delta":
        return own
    return {name: own[name + ".lora_B"] @ own[name + ".lora_A"] for name in expert.changed}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_without_mutation_a_child_is_the_weighted_sum(kind, recording, low_rank_recording, tmp_path):
    """U2: theta0 + a · delta_j + b · delta_k."""
    one, other = experts_of(recording if kind == "full" else low_rank_recording)[:2]
    write_child(tmp_path / "child", open_expert(one), open_expert(other), (0.3, 0.7), 0.0, 0, 2)
    first, second, child = deltas(one), deltas(other), deltas(tmp_path / "child")
    for name, delta in child.items():
        assert np.abs(delta - (0.3 * first[name] + 0.7 * second[name])).max() < 1e-6


@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
def test_mutation_keeps_the_expectation(drop):
    """U2: the mean over masks is delta; its error falls as 1 / sqrt(draws)."""
    delta = generator(1, "delta").standard_normal(50).astype(np.float32)
    draws = 4000
    total = sum(dare(delta, drop, generator(seed, "mask")).astype(np.float64) for seed in range(draws))
    deviation = np.abs(delta) * np.sqrt(drop / (1 - drop) / draws)
    assert (np.abs(total / draws - delta) <= 5 * deviation + 1e-6).all()
    kept = np.mean([(dare(delta, drop, generator(seed, "mask")) != 0).mean() for seed in range(200)])
    assert abs(kept - (1 - drop)) < 0.02


def test_parents_are_mutated_independently(recording, tmp_path):
    """Of one delta twice, half and half: each element is dropped twice, once or never."""
    one = open_expert(experts_of(recording)[0])
    write_child(tmp_path / "child", one, one, (0.5, 0.5), 0.5, 0, 2)
    delta, child = deltas(one.folder)[NAME], deltas(tmp_path / "child")[NAME]
    shares = [np.isclose(child, times * delta, rtol=1e-5).mean() for times in (0, 1, 2)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.05)


def test_mutation_of_factors_keeps_the_expectation(low_rank_recording, tmp_path):
    """U2 for low-rank experts: both factors have masks of their own."""
    parents = []
    for folder in experts_of(low_rank_recording)[:2]:  # of one matrix, which is enough
        own = load_file(folder / "expert.safetensors")
        factors = {name: own[name] for name in (NAME + ".lora_A", NAME + ".lora_B")}
        shapes = {name: value.shape for name, value in factors.items()}
        made = tmp_path / folder.name
        write_expert(made, open_expert(folder).base, "lora", "F32", shapes, factors.values())
        parents.append(open_expert(made))
    one, other = parents
    expected = 0.4 * deltas(one.folder)[NAME] + 0.6 * deltas(other.folder)[NAME]
    samples = []
    for seed in range(60):
        write_child(tmp_path / f"{seed}", one, other, (0.4, 0.6), 0.3, seed, 2)
        samples.append(deltas(tmp_path / f"{seed}")[NAME])
    samples = np.array(samples)
    deviation = samples.std(axis=0) / np.sqrt(len(samples))
    z = (samples.mean(axis=0) - expected) / np.maximum(deviation, 1e-9)
    assert abs(z.mean()) < 0.5
    assert 0.7 < z.std() < 1.4  # exactly what 60 unbiased draws give


def test_weights_sum_to_one_and_runs_are_equal_under_a_seed(recording, tmp_path):
    """U3 and U4."""
    runs = {}
    for label, seed in (("one", 5), ("again", 5), ("other", 6)):
        origins = expand(experts_of(recording), 6, tmp_path / label, ExpandRecipe(), seed)
        assert origins == read_origins(tmp_path / label)
        for origin in origins[3:]:
            assert sum(origin.weights) == 1.0
            assert all(0 < weight < 1 for weight in origin.weights)
        files = sorted((tmp_path / label).glob("*/expert.safetensors"))
        runs[label] = [origin.weights for origin in origins], [path.read_bytes() for path in files]
        assert len(files) == 3
    assert runs["one"] == runs["again"]
    assert runs["one"][0] != runs["other"][0]


def pool(tmp_path, base_expert, vectors):
    """Experts whose deltas of one matrix are multiples of given directions."""
    folders = []
    for number, vector in enumerate(vectors):
        delta = np.outer(np.ones(32, np.float32), np.resize(np.array(vector, np.float32), 48))
        folder = tmp_path / f"made-{number}"
        write_expert(folder, base_expert.base, "delta", "F32", {NAME: (32, 48)}, [delta])
        folders.append(folder)
    return folders


def test_parents_are_the_least_similar_pair_without_a_child(recording, tmp_path):
    directions = [(1, 0), (1, 0.1), (0, 1)]  # 0 and 2 are the farthest, then 1 and 2
    folders = pool(tmp_path, open_expert(experts_of(recording)[0]), directions)
    settings = ExpandRecipe(drop=0.0)
    origins = expand(folders, 5, tmp_path / "excluded", settings, 0)
    assert [origin.parents for origin in origins[3:]] == [(0, 2), (1, 2)]
    assert origins[3].similarity == 0.0
    repeated = expand(folders, 5, tmp_path / "repeated", ExpandRecipe(drop=0.0, exclude_used=False), 0)
    assert [origin.parents for origin in repeated[3:]] == [(0, 2), (0, 2)]
    random = [
        expand(folders, 4, tmp_path / f"random-{seed}", ExpandRecipe(parents="random"), seed)[3]
        for seed in range(12)
    ]
    assert {origin.parents for origin in random} == {(0, 1), (0, 2), (1, 2)}
    assert random[0].similarity is None


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("measure", ["cosine", "l2", "cka"])
def test_similarities_are_those_of_whole_deltas(measure, kind, recording, low_rank_recording):
    folders = experts_of(recording if kind == "full" else low_rank_recording)
    experts = [open_expert(folder) for folder in folders]
    layers = feed_forward_tensors(experts[0].base)
    pairs = list(combinations(range(3), 2))
    found = similarities(experts, pairs, layers, measure)
    for pair in pairs:
        one, other = (deltas(folders[place]) for place in pair)
        expected = np.mean([plain_similarity(measure, one, other, names) for names in layers])
        assert abs(found[pair] - expected) < 1e-5
    matrix = similarity_matrix(experts, layers, measure)
    assert matrix[2][0] == matrix[0][2] == found[0, 2]
    assert matrix[1][1] == (0.0 if measure == "l2" else 1.0)


@pytest.mark.parametrize("width", [16, 32])
def test_cka_takes_hidden_neurons_as_samples_however_many_there_are(width, dense, tmp_path):
    """Fewer than channels, or as many: the tensor's role decides, not its shape."""
    base = dense("llama", intermediate_size=width)
    folders = experts_of(record_shifted(tmp_path / "recording", base, 2)[0])
    experts = [open_expert(folder) for folder in folders]
    layers = feed_forward_tensors(experts[0].base)
    one, other = map(deltas, folders)
    expected = np.mean([plain_similarity("cka", one, other, names) for names in layers])
    assert abs(similarities(experts, [(0, 1)], layers, "cka")[0, 1] - expected) < 1e-5


def plain_similarity(measure, one, other, names):
    if measure == "cka":
        return np.mean(
            [
                linear_cka(*(of[name].T if "down_" in name else of[name] for of in (one, other)))
                for name in names
            ]
        )
    a, b = (np.concatenate([of[name].ravel() for name in names]).astype(np.float64) for of in (one, other))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b) if measure == "cosine" else -np.linalg.norm(a - b)


def linear_cka(a, b):
    """By the Gram matrices of the hidden neurons, the other way to compute it."""
    a, b = (x.astype(np.float64) for x in (a, b))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    gram_a, gram_b = a @ a.T, b @ b.T
    return (gram_a * gram_b).sum() / np.linalg.norm(gram_a) / np.linalg.norm(gram_b)


@pytest.mark.parametrize("measure", ["cosine", "cka"])
def test_experts_are_read_in_slices(measure, dense, tmp_path, monkeypatch):
    """Never an expert's deltas at once, and the slices change no bit of a child."""
    base = dense("llama", hidden_size=64, intermediate_size=256, num_hidden_layers=8)
    recording, _ = record_shifted(tmp_path / "recording", base, 2)
    settings = ExpandRecipe(similarity=measure)
    whole = expand(experts_of(recording), 4, tmp_path / "whole", settings, 0)
    monkeypatch.setattr(upcycle.upit.similarity, "_SLICE", 5000)
    monkeypatch.setattr(upcycle.provenance, "_HASH_BLOCK", 5000)
    tracemalloc.start()
    sliced = expand(experts_of(recording), 4, tmp_path / "sliced", settings, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [origin.parents for origin in sliced] == [origin.parents for origin in whole]
    for child in ("child-02", "child-03"):
        files = [tmp_path / folder / child / "expert.safetensors" for folder in ("sliced", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()
    of_expert = (tmp_path / "sliced" / "child-02" / "expert.safetensors").stat().st_size
    assert peak < of_expert / 2


def test_a_stopped_expansion_keeps_its_children(recording, tmp_path):
    whole = expand(experts_of(recording), 5, tmp_path / "whole", ExpandRecipe(), 0)
    folder = tmp_path / "stopped"
    expand(experts_of(recording), 4, folder, ExpandRecipe(), 0)
    (folder / "experts.json").unlink()
    (folder / ".child-04.part").mkdir()
    (folder / ".child-04.part" / "expert.safetensors").write_bytes(b"half")
    first = (folder / "child-03" / "expert.safetensors").stat()
    origins = expand(experts_of(recording), 5, folder, ExpandRecipe(), 0)
    assert (folder / "child-03" / "expert.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    assert [origin.weights for origin in origins] == [origin.weights for origin in whole]
    for child in ("child-03", "child-04"):
        of_whole = (tmp_path / "whole" / child / "expert.safetensors").read_bytes()
        assert (folder / child / "expert.safetensors").read_bytes() == of_whole
    assert json.loads((folder / "experts.json").read_text())["experts"][4]["folder"] == str(
        folder / "child-04"
    )


def test_children_of_other_experts_or_settings_are_refused(recording, tmp_path):
    """What experts.json says is what the children were made from."""
    experts, folder = experts_of(recording), tmp_path / "expand"
    settings = ExpandRecipe()
    origins = expand(experts, 4, folder, settings, 0)
    sentence = "child-03 was made from other experts or with other settings; remove .*expand or choose"
    for other in (
        (experts, 4, folder, settings, 5),
        (experts, 4, folder, ExpandRecipe(drop=0.0), 0),
        (experts[:0:-1] + experts[:1], 4, folder, settings, 0),
    ):
        with pytest.raises(UpcycleError, match=sentence):
            expand(*other)
    assert read_origins(folder) == origins
    # a checkpoint that another training has replaced
    own = [shutil.copytree(path, tmp_path / path.name) for path in experts]
    assert expand(own, 4, folder, settings, 0)[3] == origins[3]
    for path in own:
        shutil.copy(experts[1] / "expert.safetensors", path)
    with pytest.raises(UpcycleError, match=sentence):
        expand(own, 4, folder, settings, 0)


def test_enough_checkpoints_have_no_children(recording, tmp_path):
    folders = experts_of(recording)
    assert expand(folders, 3, tmp_path, ExpandRecipe(), 0) == tuple(Origin(str(folder)) for folder in folders)


def test_values_and_bfloat16_make_children_too(base, tmp_path):
    recording, _ = record_shifted(tmp_path / "recording", base, 2, kind="value", dtype="bfloat16")
    expand(experts_of(recording), 3, tmp_path / "expand", ExpandRecipe(drop=0.0), 0)
    child = open_expert(tmp_path / "expand" / "child-02")
    assert child.kind == "delta"
    assert child.own.tensors[NAME].dtype == "BF16"


def test_what_cannot_be_expanded_is_refused(recording, base, tmp_path):
    full = experts_of(recording)
    low_rank = experts_of(record_low_rank(tmp_path / "lora", base, 1))
    with pytest.raises(UpcycleError, match="needs two or more checkpoints to make 4 experts from, got 1"):
        expand(full[:1], 4, tmp_path / "one", ExpandRecipe(), 0)
    with pytest.raises(UpcycleError, match=r"must be of one kind and base, but .* is delta on .* is lora on"):
        expand([full[0], low_rank[0]], 4, tmp_path / "two", ExpandRecipe(), 0)
