"""The header of a GGUF file, parsed once and quickly.

A header holds the vocabulary, token by token. gguf's reader slices a memory map for each of them, which takes seconds,
and transformers has it parse the file anew for the config and for the tokenizer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader


def read_header(path: Path) -> GGUFReader:
    """The reader of the file at `path`: its fields, and its tensors as memory maps; shared, so not to be changed.

    Raises:
        Exception: of any kind, for a damaged file: gguf validates nothing.
    """
    return _read(path, path.stat().st_mtime_ns)


@contextlib.contextmanager
def shared_headers() -> Iterator[None]:
    """Inside, whoever constructs a `gguf.GGUFReader` gets `read_header`'s."""
    import gguf

    own = gguf.GGUFReader
    gguf.GGUFReader = lambda path, *_: read_header(Path(path))
    try:
        yield
    finally:
        gguf.GGUFReader = own


@functools.lru_cache(maxsize=4)
def _read(path: Path, modified: int) -> GGUFReader:
    return _reader_class()(path)


@functools.cache
def _reader_class() -> type[GGUFReader]:
    import numpy as np
    from gguf.constants import GGUFValueType
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]  # gguf has no types
        """Slices the file through a plain view, which takes a tenth of the time of a slice of the memory map, and
        reads the items of an array in a loop, in place of a call for each.
        """

        _plain: np.ndarray[Any, Any] | None = None

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if self._plain is None:
                self._plain = self.data.view(np.ndarray)
            ordered = _ordered(dtype, override_order or self.byte_order)
            if int(offset) + ordered.itemsize * int(count) > self._plain.size:
                raise ValueError(f"the file ends before byte {int(offset) + ordered.itemsize * int(count)}")
            return np.frombuffer(self._plain, ordered, int(count), int(offset))

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            start = int(orig_offs)
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(start, raw_type)  # type: ignore[no-any-return]
            of, count = self._get(start, np.uint32), self._get(start + 4, np.uint64)
            kind, items, offset = GGUFValueType(of[0]), int(count[0]), start + 12
            types = [GGUFValueType.ARRAY, kind] if items else [GGUFValueType.ARRAY]
            parts: list[Any] = [of, count]
            if kind == GGUFValueType.STRING:
                for _ in range(items):
                    length = self._get(offset, np.uint64)
                    text = self._get(offset + 8, np.uint8, length[0])
                    parts += (length, text)
                    offset += 8 + len(text)
                return offset - start, parts, list(range(3, len(parts), 2)), types
            if (scalar := self.gguf_scalar_to_np.get(kind)) is None:
                return super()._get_field_parts(start, raw_type)  # type: ignore[no-any-return]
            values = self._get(offset, scalar, items)
            parts.extend(values.reshape(-1, 1))
            return offset + values.nbytes - start, parts, list(range(2, len(parts))), types

    @functools.cache
    def _ordered(dtype: Any, order: str) -> np.dtype[Any]:
        plain: np.dtype[Any] = np.dtype(dtype)
        return plain.newbyteorder(order)  # type: ignore[arg-type]

    return Reader
