"""flatq: FlatQuant (arXiv 2410.09426) as a command-line toolchain.

Importing this package makes `AutoModelForCausalLM.from_pretrained` load what `flatq export` wrote. It imports neither
torch nor transformers for that (`flatq --help` must answer at once): flatq's quantizer is added to transformers' table
of quantizers when that table is imported, or now if it is there already.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_TABLE = "transformers.quantizers.auto"


def _register_quantizer() -> None:
    import flatq_cli.runtime.transformers_plugin  # noqa: F401  (registers itself)


class _AfterTable:
    """Import hook: registers flatq's quantizer right after transformers' table of quantizers was imported, once."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_quantizer()

            # On this one loader object, so that the module keeps its real loader and with it its source.
            setattr(spec.loader, "exec_module", execute_and_register)  # noqa: B010
        return spec


if _TABLE in sys.modules:
    _register_quantizer()
else:
    sys.meta_path.insert(0, _AfterTable())
