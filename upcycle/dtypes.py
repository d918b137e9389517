"""bfloat16 in NumPy, which lacks it: numbers travel as their 16 bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

STORAGE: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def to_float32(stored: NDArray, dtype: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Exact, for every stored type. Written to `out` if that is given, which spares fresh memory."""
    if dtype != "BF16":
        if out is None:
            return stored.astype(np.float32, copy=False)
        out[...] = stored
        return out
    if out is None:
        out = np.empty(stored.shape, np.float32)
    bits = out.view(np.uint32)
    bits[...] = stored
    bits <<= 16
    return out


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray:
    """Rounded to nearest, ties to even; a finite value too large for the type becomes infinite."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        return rounded.astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(STORAGE[dtype], copy=False)


def all_finite(stored: NDArray, dtype: str) -> bool:
    """True if no element is NaN or infinite."""
    if dtype == "BF16":
        # All eight exponent bits set.
        return stored.size == 0 or int((stored & 0x7FFF).max()) < 0x7F80
    return bool(np.isfinite(stored).all())
