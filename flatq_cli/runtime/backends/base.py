"""What a backend is: how sites, packed linears and the packed cache compute, behind a few calls.

    site(site, x)        an activation through its site: what the linears that read it get
    linear(linear, x)    a packed linear on that
    store(…), attend(…)  keys and values into the packed cache, and attention over it, where it has its own way
    why_not(...)         why it does not work here, or None

`reference` defines every result; another backend gives the same up to float rounding. A backend that multiplies codes
returns a `QuantizedActivation` from `site` (`lazy.py`): the stock block passes it on to the linears as if it were the
float activation, so it is computed once and shared. Backends hold no state: what one prepares for a module
(codes laid out for its kernels) is kept by the module (`BackendModule.prepared`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from flatq_cli.models.own_dtype import OwnDtype

if TYPE_CHECKING:
    from flatq_cli.runtime.kv_cache import PackedStates
    from flatq_cli.runtime.linear import PackedLinear
    from flatq_cli.runtime.sites import OnlineSite

T = TypeVar("T")


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """For tensors that are kept: made under `torch.inference_mode`, they could not be written, or saved for a gradient,
    outside it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class Backend(ABC):
    """One way to run sites and packed linears."""

    name: ClassVar[str]

    @abstractmethod
    def why_not(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        """Why this backend does not run here, or not on `device` in `dtype` where they are given; None: it does."""

    @abstractmethod
    def site(self, site: OnlineSite, x: Tensor) -> Tensor:
        """`x` `[..., width]` transformed and quantized: a tensor of x's shape, dtype and device.

        A `QuantizedActivation` only where `site.feeds_packed`; attention computes with what the others return.
        """

    @abstractmethod
    def linear(self, linear: PackedLinear, x: Tensor) -> Tensor:
        """x Wᵀ + b: `[..., in]` → `[..., out]` in x's dtype. `x` comes from `site`, or is any float tensor."""

    def store(self, site: OnlineSite, x: Tensor, parts: Sequence[Tensor], row: int) -> bool:
        """Write keys or values into a packed cache (`runtime/kv_cache.py`); False: not done, torch does it.

        Args:
            x: `[batch, kv_heads, tokens, head_dim]`, before `site`. parts: codes, scale and, if any, zero of the cache.
            row: where the first token goes.
        """
        return False

    def store_at(self, site: OnlineSite, x: Tensor, parts: Sequence[Tensor], start: Tensor) -> bool:
        """`store` where only the device knows the row: into a cache of fixed size (`runtime/static_cache.py`).

        Args:
            start: int32 `[batch]`, on x's device, where each sequence's first token goes.
        """
        return False

    def attend(
        self, query: Tensor, keys: PackedStates, values: PackedStates, mask: Tensor | None, scaling: float | None
    ) -> Tensor | None:
        """Attention over a packed cache, `[batch, heads, tokens, head_dim]`; None: not done, torch does it.

        Args:
            query: `[batch, heads, tokens, head_dim]`, through its site. mask: as sdpa takes it; None: causal. There is
                one wherever the states have `lengths`.
            scaling: factor on the scores; None: head_dim ** -0.5.
        """
        return None

    def attach(self, model: nn.Module) -> None:
        """Change what `model` is made of as this backend likes it; `detach` undoes it."""
        return

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`."""
        return

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing to copy: a copied model runs with the same backend


class BackendModule(OwnDtype):
    """A module that computes through a backend and keeps what the backend prepared for it.

    The prepared form is made at the first forward and is no part of the state. It goes when the module moves, loads a
    state or gets other tensors; whoever changes a tensor in place calls `drop_prepared`.
    """

    backend: Backend

    def prepared(self, make: Callable[..., T], *arguments: Hashable) -> T:
        """`make(self, *arguments)`, kept until it is another that is asked for or a tensor of this module is another.

        `torch.compile` follows the comparisons (identity of functions and tensors, no closures or partial functions),
        and takes what is kept for a constant that they guard.
        """
        made_by, of, tensors, made = self.__dict__.get("_prepared", (None, (), (), None))
        if made_by is make and of == arguments and all(map(is_, tensors, self._buffers.values())):
            return made  # type: ignore[no-any-return]
        made = make(self, *arguments)
        # Not a submodule, a parameter or a buffer: past nn.Module's __setattr__.
        self.__dict__["_prepared"] = (make, arguments, list(self._buffers.values()), made)
        return made

    def drop_prepared(self) -> None:
        """Forget the prepared form; the next forward makes it again."""
        self.__dict__.pop("_prepared", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.drop_prepared()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_prepared()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module, or one on disk, prepares for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}
