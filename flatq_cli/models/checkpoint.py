"""Checkpoints: one tensor at a time from safetensors or GGUF, under the names transformers gives them.

Opening a checkpoint reads headers only, and all of them, so that a missing shard or a truncated file is found before
the work starts and not in its last hour. A read holds the memory of one tensor.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flatq_cli.errors import UsageError
from flatq_cli.models.gguf_header import read_header
from flatq_cli.models.locate import INDEX, ModelLocation, read_index, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Safetensors' names of the dtypes that hold unquantized weights.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# GGUF tensors that hold rope factors: transformers computes those from the config.
GGUF_ROPE = ("rope_freqs.", "rope_factors_long.", "rope_factors_short.")

# Bytes of a quantized GGUF tensor that gguf dequantizes fastest as one row: 16 of them, as floats, fit a cache.
ROW_BYTES = 1 << 13


class Checkpoint(Protocol):
    """The tensors of a model by their transformers names."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model's unquantized weights are stored."""
        ...

    def names(self) -> frozenset[str]:
        """Every tensor there is."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype it is stored in; raises UsageError if it is missing or damaged."""
        ...


def open_checkpoint(location: ModelLocation, config: PreTrainedConfig) -> Checkpoint:
    """Open the weights of a model.

    Raises:
        UsageError: naming the file (and the tensor) that is missing, truncated or corrupt.
    """
    if location.kind == "gguf":
        return GgufCheckpoint(location.path, config)
    return SafetensorsCheckpoint(location.path)


class SafetensorsCheckpoint:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        files = weight_files(directory)
        if not files:
            raise UsageError(f"{directory}: no safetensors weights")
        self._files: dict[str, Path] = {}
        sizes: Counter[torch.dtype] = Counter()
        for file in files:
            for name, (dtype, size) in _read_header(file).items():
                self._files[name] = file
                if dtype in FLOATS:
                    sizes[FLOATS[dtype]] += size
        if not sizes:
            raise UsageError(f"{directory}: no tensor is in floating point; flatq starts from unquantized weights")
        self._dtype = sizes.most_common(1)[0][0]
        if (directory / INDEX).is_file():
            index = read_index(directory)
            for name, file_name in index.items():
                if self._files.get(name) != directory / file_name:
                    raise UsageError(
                        f"{directory / file_name}: tensor {name} is missing, though {INDEX} places it there"
                    )

    @property
    def dtype(self) -> torch.dtype:
        """The float dtype that holds most of the weights."""
        return self._dtype

    def names(self) -> frozenset[str]:
        """Every tensor of every file."""
        return frozenset(self._files)

    def read(self, name: str) -> Tensor:
        """The tensor as stored."""
        from safetensors import SafetensorError, safe_open

        if name not in self._files:
            raise UsageError(f"{self._directory}: the weights have no tensor {name}")
        file = self._files[name]
        try:
            with safe_open(file, framework="pt", device="cpu") as handle:
                tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"{file}: cannot read tensor {name}: {error}") from error
        return tensor


def _read_header(file: Path) -> dict[str, tuple[str, int]]:
    """Name → (safetensors' dtype, elements); the library also checks that the file is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            return {name: (part.get_dtype(), prod(part.get_shape())) for name, part in slices.items()}
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such file") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{file}: truncated or corrupt safetensors file ({error}); fetch it again") from error


class GgufCheckpoint:
    """A GGUF file, dequantized tensor by tensor exactly as transformers does it for a whole model.

    Names and layout (llama.cpp permutes the rows of q and k) come from transformers' own table and processors, so
    that what is read here is bit for bit what `AutoModelForCausalLM.from_pretrained(…, gguf_file=…)` holds.
    """

    def __init__(self, path: Path, config: PreTrainedConfig) -> None:
        self._path = path
        try:
            # Memory-mapped: tensors are not read here.
            reader = read_header(path)
            self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
            architecture = str(reader.fields["general.architecture"].contents())
        except Exception as error:
            # The reader validates nothing: what a damaged file provokes in it is arbitrary.
            raise UsageError(f"{path}: truncated or corrupt GGUF file ({type(error).__name__}: {error})") from error
        self._processor, self._gguf_to_hf = _transformers_mapping(path, architecture, config)
        self._hf_to_gguf = {hf: gguf for gguf, hf in self._gguf_to_hf.items() if gguf in self._tensors}
        self._refuse_unknown_tensors()

    def _refuse_unknown_tensors(self) -> None:
        """A tensor that no parameter takes (a bias that the config denies) would make another model in silence."""
        unknown = sorted(name for name in self._tensors if name not in self._gguf_to_hf)
        rope = [name for name in unknown if name.startswith(GGUF_ROPE)]
        if rope:
            logger.warning(
                "%s: transformers ignores the rope factors of a GGUF (%s): long inputs differ from the original's; "
                "prefer the safetensors of this model",
                self._path.name,
                rope[0],
            )
        others = [name for name in unknown if name not in rope]
        if others:
            raise UsageError(f"{self._path}: tensor {others[0]} has no place in the architecture ({len(others)} such)")

    @property
    def dtype(self) -> torch.dtype:
        """float16: a GGUF's own unquantized form, whatever its tensors are quantized to."""
        return torch.float16

    def names(self) -> frozenset[str]:
        """Every tensor, by its transformers name."""
        return frozenset(self._hf_to_gguf)

    def read(self, name: str) -> Tensor:
        """The tensor, dequantized to float32."""
        import numpy as np

        if name not in self._hf_to_gguf:
            raise UsageError(f"{self._path}: the weights have no tensor {name}")
        stored = self._tensors[self._hf_to_gguf[name]]
        try:
            values = _dequantized(stored)
        except (NotImplementedError, ValueError) as error:
            raise UsageError(f"{self._path}: cannot read tensor {stored.name}: {error}") from error
        processed = self._processor.process(
            weights=values, name=stored.name, tensor_key_mapping=self._gguf_to_hf, parsed_parameters={"tensors": {}}
        )
        # What was not quantized is still the file's own memory, which nobody may write to: that is copied.
        return torch.from_numpy(np.require(processed.weights, requirements=("C", "W")))


def _dequantized(stored: Any) -> Any:
    """A GGUF's tensor as float32 numpy array. gguf works on 16 rows at a time, which are few numbers where rows are
    short: several of them are shown to it as one.
    """
    from gguf import dequantize

    data = stored.data
    if data.dtype != "uint8" or data.ndim != 2:
        return dequantize(data, stored.tensor_type)
    rows, width = data.shape
    joined = next(n for n in range(max(1, ROW_BYTES // width), 0, -1) if rows % n == 0)
    return dequantize(data.reshape(rows // joined, -1), stored.tensor_type).reshape(rows, -1)


def _transformers_mapping(path: Path, architecture: str, config: PreTrainedConfig) -> tuple[Any, dict[str, str]]:
    """Transformers' tensor processor for a GGUF architecture, and its map from GGUF names to its own."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )
    except ImportError as error:
        raise UsageError(
            f"{path}: this version of transformers reads GGUF in another way; install transformers<=5.23"
        ) from error

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    with init_empty_weights():
        # A copy: building a model writes to its config.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    try:
        # The map's function walks into every submodule, for checkpoints of models without a head, and builds gguf's
        # table anew in each: seconds for nothing. Shown no children, it maps the names of the whole model.
        flat = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=tuple)
        return processor, get_gguf_hf_weights_map(flat, processor)
    except NotImplementedError as error:
        raise UsageError(f"{path}: GGUF architecture '{architecture}' is not supported ({error})") from error
