"""Branches of one tiny Llama that share a tokenizer of bytes, and a text for each."""

import pytest
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from dense_models import save_dense

TEXTS = ("the quick brown fox jumps over the lazy dog. ", "0123 4567 89+- ", "\n\tif x == y: return (x)\n")


@pytest.fixture(scope="session")
def branches(tmp_path_factory):
    """Three folders; treat them as read-only."""
    folders = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp(f"branch-{seed}")
        byte_tokenizer().save_pretrained(folder)
        folders.append(save_dense(folder, "llama", seed=seed, vocab_size=VOCAB_SIZE, shard="1GB"))
    return folders


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Three files of 90 to 300 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / f"{number}.txt" for number in range(3)]
    for number, (path, words) in enumerate(zip(paths, TEXTS, strict=True)):
        path.write_text(words * (3 + 2 * number))
    return [str(path) for path in paths]
