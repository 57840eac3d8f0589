"""What a CUDA graph does, on the CPU: operations are recorded once with their tensors, and repeated on the same memory.

A step that was recorded goes on giving what it gives eagerly only if nothing that changes from step to step reached the
host: a number read from a tensor, a Python counter, a tensor allocated anew in place of one that is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

READING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item")


class Tape(TorchDispatchMode):
    """Records while it is entered; the recorded operations run then, too. Refuses what reads a value back.

    A custom op is one operation: what its definition does inside is the kernel's business.
    """

    def __init__(self) -> None:
        super().__init__()
        self._played: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in READING, f"{func} makes the host wait for the device"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._played.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        """Everything once more, results into the memory that they went to when they were recorded."""
        with torch.no_grad():
            for func, args, kwargs, recorded in self._played:
                places = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if _is_tensor(t)}
                before = [t for t in pytree.tree_leaves(recorded) if _is_tensor(t)]
                aliased = [t.untyped_storage().data_ptr() in places and t.numel() > 0 for t in before]
                if before and all(aliased) and not func._schema.is_mutable:
                    continue  # a view of memory that is kept
                again = [t for t in pytree.tree_leaves(func(*args, **kwargs)) if _is_tensor(t)]
                for old, new, same in zip(before, again, aliased, strict=True):
                    if not same:
                        old.copy_(new)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
