"""bfloat16 arithmetic on bits equals torch's, for every value there is."""

import numpy as np
import pytest
import torch

from upcycle.dtypes import all_finite, from_float32, to_float32

EVERY_BF16 = np.arange(2**16, dtype=np.uint16)


def as_torch(bits):
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def test_every_bfloat16_widens_as_in_torch():
    expected = as_torch(EVERY_BF16).float().numpy()
    assert np.array_equal(to_float32(EVERY_BF16, "BF16"), expected, equal_nan=True)


def test_rounding_to_bfloat16_is_torchs():
    random_bits = np.random.default_rng(0).integers(2**32, size=100_000, dtype=np.uint32)
    # Exactly between two neighbours, and one bit to either side.
    ties = (EVERY_BF16.astype(np.uint32) << 16) + np.array([[0x7FFF], [0x8000], [0x8001]], np.uint32)
    values = np.concatenate([random_bits, ties.ravel()]).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(from_float32(values, "BF16"), expected)


def test_float16_is_numpys_own():
    values = np.array([1.0, -2.5, 65504.0, 1e6, 1e-8], np.float32)
    stored = from_float32(values, "F16")
    assert stored.tolist() == torch.from_numpy(values).half().tolist()
    assert to_float32(stored, "F16").tolist() == torch.from_numpy(values).half().float().tolist()


def test_finite_bfloat16_is_known_by_its_exponent():
    expected = as_torch(EVERY_BF16).isfinite().numpy()
    assert [all_finite(EVERY_BF16[i : i + 1], "BF16") for i in range(2**16)] == expected.tolist()
    assert not all_finite(EVERY_BF16, "BF16")
    assert all_finite(EVERY_BF16[:0], "BF16")


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_finite_floats(dtype, bad):
    values = np.ones(5, np.float32)
    assert all_finite(from_float32(values, dtype), dtype)
    values[3] = bad
    assert not all_finite(from_float32(values, dtype), dtype)
