"""What Trainer's optimizers keep for each parameter, by their names in its `optim`."""

import math
from collections.abc import Iterable

from moe_runtime.errors import RunError

# float32 numbers for each element
FLOAT32_STATES = {
    "sgd": 0,  # Trainer's has no momentum
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adagrad": 1,
    "rmsprop": 1,
    "lion_32bit": 1,
    "paged_lion_32bit": 1,
    "rmsprop_bnb": 1,
    "rmsprop_bnb_32bit": 1,
    "paged_adamw_32bit": 2,
    "ademamix": 3,
    "paged_ademamix_32bit": 3,
}
# 8-bit numbers for each element, with a float32 scale for each block
EIGHT_BIT_STATES = {
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "ademamix_8bit": 3,
    "paged_ademamix_8bit": 3,
}
BLOCK = 256
LEAST = 4096  # elements; bitsandbytes keeps float32 for smaller parameters
KNOWN = (*FLOAT32_STATES, *EIGHT_BIT_STATES, "adafactor")


def optimizer_bytes(name: str, shapes: Iterable[tuple[bool, tuple[int, ...]]]) -> int:
    """Bytes of all states of the optimizer.

    Args:
        name: of Trainer's `optim`.
        shapes: of each parameter that is trained, after whether it is an embedding, which Trainer has
            bitsandbytes keep in float32.

    Raises:
        RunError: the optimizer is not one whose states are known here.
    """
    if name not in KNOWN:
        raise RunError(f"train.optimizer must be one of {', '.join(KNOWN)} for a plan, got {name!r}")
    if name == "adafactor":
        return sum(_factored(shape) for _, shape in shapes)
    if name in FLOAT32_STATES:
        return sum(4 * FLOAT32_STATES[name] * math.prod(shape) for _, shape in shapes)
    total = 0
    for is_embedding, shape in shapes:
        numel = math.prod(shape)
        small = is_embedding or numel < LEAST
        total += EIGHT_BIT_STATES[name] * (4 * numel if small else numel + 4 * math.ceil(numel / BLOCK))
    return total


def _factored(shape: tuple[int, ...]) -> int:
    """A mean square for each row and each column; of vectors for each element."""
    if len(shape) < 2:
        return 4 * math.prod(shape)
    *stack, rows, columns = shape
    return 4 * math.prod(stack) * (rows + columns)
