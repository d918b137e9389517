"""Uninitialised memory is NaN (or the largest integer) in every test, so a row nobody wrote cannot pass."""

import os

import pytest
import torch

# `make test` runs two workers on two cores; what a test starts shares them too, and is no worker itself
THREADS = max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(THREADS)
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.pop("PYTEST_XDIST_WORKER", None)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _default_precision():
    """Commands set it for their process, which tests share."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def autocast_rounds(monkeypatch):
    """As on a processor with instructions for bfloat16; on others autocast does not round float32 weights."""
    from moe_runtime_kernels import _cpu

    monkeypatch.setattr(_cpu, "BF16_IS_WIDENED", False)


@pytest.fixture(scope="module")
def one_thread():
    """For steps so small that two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Folder of a tiny random Llama with a tokenizer of bytes."""
    from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
    from dense_models import save_dense

    folder = tmp_path_factory.mktemp("tiny-llama")
    byte_tokenizer().save_pretrained(folder)
    return save_dense(folder, "llama", vocab_size=VOCAB_SIZE)
