"""flatq inside transformers: `AutoModelForCausalLM.from_pretrained(dir)` loads what `flatq export` wrote.

`config.json` names the method `flatq` in its `quantization_config`; transformers then asks `FlatqHfQuantizer` to turn
the stock model, still empty on the meta device, into the quantized one: packed linears, sites, the attention function
`flatq`. All of that follows from the recipe and the model's own config, so an export holds tensors and no model code.

transformers only warns when a checkpoint lacks a tensor, and goes on with a random one. Here the headers of the files
are compared with the model before anything is read, and every difference is an error; so is every bit that is not what
`flatq export` wrote (`runtime/integrity.py`). Where flatq has no say, because it was not imported or config.json no
longer names it, `UNLOADABLE` in config.json makes transformers refuse.

Importing this module registers the quantizer. It runs while transformers is being imported (`flatq_cli/__init__.py`):
at module level it may import only what transformers has ready by then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

import flatq_cli
from flatq_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from flatq_cli.config.recipe import Recipe

METHOD = "flatq"
FORMAT = "flatq/1"
SECTIONS = ("weights", "activations", "kv_cache", "transform")
UNLOADABLE = "import flatq_cli first; if it is imported, config.json is damaged"
"""`attn_implementation` in the config.json of an export. A quantization method that transformers does not know it skips
with a warning, and the linears are random then; an attention it does not know is an error, which quotes it. Here it is
replaced by flatq's own."""

logger = logging.get_logger(__name__)


class FlatqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of an export (docs/format.md, "config.json").

    Args:
        recipe: the sections of the recipe that a loader needs: weights, activations, kv_cache, transform.
        format: the version of the format.
        recipe_name: the name of the recipe, where it has one; for people.
        flatq_version: the flatq that wrote it.
    Raises:
        UsageError: a format that this flatq does not read, or a recipe with unknown keys or values.
    """

    def __init__(
        self,
        recipe: dict[str, dict[str, Any]],
        format: str = FORMAT,
        recipe_name: str | None = None,
        flatq_version: str = flatq_cli.__version__,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format = format
        self.recipe = recipe
        self.recipe_name = recipe_name
        self.flatq_version = flatq_version
        if format != FORMAT:
            raise UsageError(
                f"config.json: quantization_config has format '{format}' (written by flatq {flatq_version}); "
                f"this flatq ({flatq_cli.__version__}) reads {FORMAT}"
            )
        if unknown:
            raise UsageError(f"config.json: quantization_config has unknown keys: {', '.join(sorted(unknown))}")
        self.parsed()

    @classmethod
    def of(cls, recipe: Recipe, recipe_name: str | None = None) -> FlatqConfig:
        """The config of an export that `recipe` made."""
        return cls(recipe.model_dump(mode="json", include=set(SECTIONS)), recipe_name=recipe_name)

    def parsed(self) -> Recipe:
        """The recipe; what a loader does not need has its defaults."""
        from pydantic import ValidationError

        from flatq_cli.config.recipe import Recipe

        try:
            if missing := [section for section in SECTIONS if section not in self.recipe]:
                raise UsageError(f"config.json: quantization_config.recipe lacks {', '.join(missing)}")
            return Recipe.model_validate(self.recipe)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise UsageError(f"config.json: quantization_config.recipe.{key}: {first['msg']}") from error


class FlatqHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Turns a stock model on the meta device into the quantized one that the tensors of an export fit."""

    requires_calibration = True  # a float model cannot be quantized while loading: `flatq calibrate` does that
    quantization_config: FlatqConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Choose the attention function `flatq`, where keys and values pass through their sites."""
        from flatq_cli.runtime.integrity import check_files
        from flatq_cli.runtime.sites import ATTENTION

        if os.path.isdir(config.name_or_path):  # the earliest that a damaged config or index can be told
            check_files(Path(config.name_or_path))
        asked = config._attn_implementation
        if asked not in (None, ATTENTION, UNLOADABLE, "sdpa"):
            logger.warning(
                f"attn_implementation='{asked}' is not used: flatq's own attention function quantizes keys and values"
            )
        config._attn_implementation = ATTENTION
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from flatq_cli.runtime.integrity import check_files, check_shards

        if checkpoint_files is None:
            raise UsageError("a flatq model loads from its directory: from_pretrained(dir), without state_dict")
        if type(model).__module__.startswith("transformers."):
            # Not loaded through the module that `auto_map` names, so `save_pretrained` will not bring it along.
            model.config.__dict__.pop("auto_map", None)
        files = [Path(file) for file in checkpoint_files]
        check_files(files[0].parent)
        quantize_skeleton(model, self.quantization_config.parsed())
        check_tensors(model, files)
        check_shards(files)

    def is_serializable(self) -> bool:
        """`save_pretrained` writes what `from_pretrained` reads."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` with a static cache may compile its decode steps, as it does on a GPU unless told not to."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def quantize_skeleton(model: PreTrainedModel, recipe: Recipe) -> None:
    """Replace the linears of every block by packed ones, attach the sites and let the cache be packed, in place.

    Args:
        model: a stock model of a family, with the head (`…ForCausalLM`) or without; may be on the meta device.
    Raises:
        UsageError: an architecture that no family describes.
    """
    from flatq_cli.models.families import Shapes, family_of
    from flatq_cli.runtime.layout import block_layout
    from flatq_cli.runtime.linear import pack_linears
    from flatq_cli.runtime.pack_cache import use_packed_cache
    from flatq_cli.runtime.sites import attach_sites, online_sites

    family = family_of(model.config)
    layouts = block_layout(recipe, family, Shapes.of(model.config))
    blocks = model.get_submodule(family.layers.removeprefix(_missing_prefix(model)))
    for block in blocks.children():
        pack_linears(block, family.linears, recipe.weights)
        device = next(block.parameters()).device
        with torch.device(device):
            sites = online_sites(layouts)
        attach_sites(block, family, sites)
    if recipe.kv_cache.bits < 16:
        use_packed_cache(model.base_model, blocks.children())


def _missing_prefix(model: PreTrainedModel) -> str:
    """What the names of an export have and this model's have not: `model.` for a decoder without its head."""
    prefix: str = model.base_model_prefix
    return "" if hasattr(model, prefix) else f"{prefix}."


def check_tensors(model: PreTrainedModel, files: Iterable[Path]) -> None:
    """Compare the headers of safetensors `files` with the tensors `model` expects; no data is read.

    Raises:
        UsageError: a tensor that is missing, has no place in the model, or has another shape or kind; a damaged file.
            Names both.
    """
    from flatq_cli.runtime.integrity import home_of

    prefix = _missing_prefix(model)
    tied = getattr(model, "all_tied_weights_keys", {})
    expected: dict[str, Tensor] = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    optional = {prefix + name for name in tied}
    found: dict[str, Path] = {}
    for file in files:
        for name, (dtype, shape) in _header(file).items():
            if not name.startswith(prefix):
                continue  # the head, which a model without one does not read
            found[name] = file
            if name not in expected:
                raise UsageError(f"{file}: tensor {name} has no place in the model that config.json describes")
            want = expected[name]
            if shape != list(want.shape):
                raise UsageError(f"{file}: tensor {name} is {shape}, but config.json says {list(want.shape)}")
            if dtype not in _stored_as(want.dtype):
                raise UsageError(f"{file}: tensor {name} is {dtype}, not {' or '.join(_stored_as(want.dtype))}")
    missing = sorted(expected.keys() - found.keys() - optional)
    if missing:
        where = home_of(missing[0], next((file.parent for file in found.values()), Path("the checkpoint")))
        more = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise UsageError(
            f"{where}: tensor {missing[0]}{more} is missing; export the run again, or copy the directory again"
        )


def _header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Name → (safetensors' dtype, shape)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            return {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{file}: truncated or corrupt safetensors file ({error}); copy or export it again") from error


def _stored_as(dtype: torch.dtype) -> tuple[str, ...]:
    """Safetensors' names of the dtypes that may hold a tensor: any float for a float, an integer's own."""
    if dtype.is_floating_point:
        return ("F32", "BF16", "F16", "F64")
    return ({torch.uint8: "U8", torch.int32: "I32", torch.int8: "I8"}[dtype],)


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(FlatqConfig)
    register_quantizer(METHOD)(FlatqHfQuantizer)
