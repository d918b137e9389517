"""Bytes that are alive while a model takes a step: counted from the storages that operations return.

A storage counts once, however many tensors view it, from the operation that returns it until the last tensor
lets it go. With fake tensors nothing is allocated. What an operation uses inside and frees again cannot be
seen, and is counted where `workspace` knows it.
"""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from moe_runtime.train.kernels import Kernels
from moe_runtime.train.workspace import workspace


class LiveBytes(TorchDispatchMode):
    """Inside, `current` bytes are alive, and `peak` is the most that were; `kernels` has seen all products.

    What was there before is not counted once `ignore` has seen it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0.0
        self.kernels = Kernels()
        self._size: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of the storages that count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inside = workspace(func, args)
        self.kernels.see(func, args)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self.peak = max(self.peak, self.current + inside)
        return out

    def ignore(self, tensors: Any) -> None:
        """Tensors that were there before."""
        for tensor in tensors:
            self._size[tensor.untyped_storage()] = [0.0]

    def keep_part(self, tensor: Tensor, parts: int) -> None:
        """From here on, all but one of so many parts of a tensor is elsewhere."""
        storage = tensor.untyped_storage()
        size = self._size[storage]
        kept = min(size[0], storage.nbytes() / parts)
        self.current -= size[0] - kept
        size[0] = kept

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._size:
            return
        size = [float(storage.nbytes())]
        self._size[storage] = size
        weakref.finalize(storage, self._free, size)
        self.current += size[0]

    def _free(self, size: list[float]) -> None:
        self.current -= size[0]
