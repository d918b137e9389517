"""Tiny dense checkpoints, made once per run, and runs into a folder of the test's own."""

import shutil

import pytest
from dense_models import save_dense

import upcycle


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """`dense(family, seed=…, …)` -> folder of a checkpoint; treat it as read-only."""
    made = {}

    def make(family, **options):
        key = (family, *sorted(options.items(), key=str))
        if key not in made:
            made[key] = save_dense(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return make


@pytest.fixture
def dense_copy(dense, tmp_path):
    """Like `dense`, but the test may damage it."""

    def make(family="llama", name="damaged", **options):
        return shutil.copytree(dense(family, **options), tmp_path / name)

    return make


@pytest.fixture
def run(tmp_path):
    """`run(method=…, sources=[…], …)` -> folder of the upcycled model."""

    def make(name="out", **recipe):
        recipe = {key: str(value) if key == "base" else value for key, value in recipe.items()}
        if "sources" in recipe:
            recipe["sources"] = [str(source) for source in recipe["sources"]]
        values = {"output": str(tmp_path / name), **recipe}
        return upcycle.upcycle(upcycle.recipe_from_dict(values)).output

    return make


@pytest.fixture(scope="session")
def smollm2():
    """The real dense checkpoint, converted once and kept in `.cache`."""
    from moe_runtime.demo.checkpoint import smollm2_checkpoint

    return smollm2_checkpoint()
