import gc

import pytest
from training_runs import KINDS, save_data, save_model


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny models by kind."""
    gc.freeze()  # every run collects garbage, and would look at all that was imported
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("data") / "words.jsonl")
