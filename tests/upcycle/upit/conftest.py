"""A base, its data, recordings and finished runs, each made once; treat them as read-only."""

import pytest
from upit_runs import record_low_rank, record_shifted, small_recipe, write_instructions

from upcycle.upit import run_upit


@pytest.fixture(scope="session")
def base(tiny_checkpoint):
    return tiny_checkpoint


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_instructions(tmp_path_factory.mktemp("data") / "instructions.jsonl")


@pytest.fixture(scope="session")
def recording(base, tmp_path_factory):
    """Three points of a full training."""
    return record_shifted(tmp_path_factory.mktemp("full") / "recording", base, 3)[0]


@pytest.fixture(scope="session")
def low_rank_recording(base, tmp_path_factory):
    return record_low_rank(tmp_path_factory.mktemp("lora") / "recording", base, 3)


@pytest.fixture
def recipe(base, data, tmp_path):
    """`recipe(**changes)` of a run in the test's own folder."""
    return lambda **changes: small_recipe(base, data, tmp_path, **changes)


@pytest.fixture(scope="session")
def finished(base, data, tmp_path_factory):
    """`finished(**changes)` -> recipe and results of a whole run, made once."""
    runs = {}

    def make(**changes):
        key = repr(changes)
        if key not in runs:
            made = small_recipe(base, data, tmp_path_factory.mktemp("upit"), **changes)
            runs[key] = made, run_upit(made)
        return runs[key]

    return make
