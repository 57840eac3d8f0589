"""The recipe: everything that decides what a quantization is, as closed, typed, immutable models.

A recipe is read from YAML (`configs/recipes/*.yaml` or a user's file), may be overridden key by key (`--set a.b=v`),
and is written resolved into the run. Unknown keys are refused. Loading and error messages: `recipe_files.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Bits = Literal[2, 3, 4, 5, 6, 8, 16]
ClipKind = Literal["none", "learned"]


class Frozen(BaseModel):
    """A closed, immutable model: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WeightSpec(Frozen):
    """How the weights of every linear layer of a block are quantized (embedding and head stay as they are)."""

    bits: Bits = Field(4, description="bits of a weight; 16 leaves weights in floating point")
    group: Annotated[int, Field(ge=0)] = Field(
        0, description="weights that share a scale, along the input; 0: one scale for each output channel"
    )
    symmetric: bool = Field(True, description="codes symmetric around zero, or codes with a zero point")
    clip: ClipKind = Field("learned", description="learned weight clipping (LWC), or none")
    rounding: Literal["nearest", "gptq"] = Field(
        "gptq", description="how a weight becomes a code: the nearest, or GPTQ on the quantized prefix's inputs"
    )


class ActivationSpec(Frozen):
    """How the input of every linear layer is quantized, one scale for each token."""

    bits: Bits = Field(4, description="bits of an activation; 16 leaves them as they are")
    symmetric: bool = Field(True, description="codes symmetric around zero, or codes with a zero point")
    clip: ClipKind = Field("learned", description="learned activation clipping (LAC), or none")


class KVCacheSpec(Frozen):
    """How keys (after RoPE) and values are quantized, one scale for each token and head."""

    bits: Bits = Field(4, description="bits of a cached key or value; 16 leaves them as they are")
    symmetric: bool = Field(False, description="codes symmetric around zero, or codes with a zero point")
    clip: ClipKind = Field("learned", description="learned clipping of keys and values, or none")


class TransformSpec(Frozen):
    """The invertible map before each linear layer, and where its learning starts."""

    kind: Literal["none", "kronecker"] = Field(
        "kronecker", description="none (a diagonal may still be there), or a Kronecker product of two matrices"
    )
    parametrization: Literal["direct", "svd", "orthogonal"] = Field(
        "direct",
        description="direct: a free matrix and its inverse; svd: two orthogonal factors, a diagonal (paper); "
        "orthogonal: one orthogonal matrix",
    )
    init: Literal["identity", "orthogonal", "hadamard", "balanced"] = Field(
        "balanced",
        validate_default=True,
        description="where the matrices start: identity, random orthogonal (paper), Hadamard, or balanced",
    )
    diagonal: Literal["none", "smooth", "balanced"] = Field(
        "balanced",
        description="per-channel scale: none, smooth (from maxima) or balanced (from second moments)",
    )
    smooth_alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        0.3, description="exponent of the activation's maxima in the SmoothQuant-style diagonal"
    )

    @field_validator("init")
    @classmethod
    def _fits_the_form(cls, init: str, info: ValidationInfo) -> str:
        if init == "balanced" and info.data.get("parametrization") == "orthogonal":
            raise PydanticCustomError(
                "not_orthogonal",
                "Input is not orthogonal, as transform.parametrization is: one of identity, orthogonal, hadamard",
            )
        return init


class CalibrationSpec(Frozen):
    """The text, and how the transforms and clips of a block learn from it."""

    data: str = Field("auto", description="a named text (auto, wikitext2, pydoc) or the path of a UTF-8 text file")
    samples: Annotated[int, Field(ge=1)] = Field(128, description="sequences")
    seqlen: Annotated[int, Field(ge=2)] = Field(2048, description="tokens in a sequence")
    epochs: Annotated[int, Field(ge=0)] = Field(
        0, description="passes over the sequences for each block; 0: no training"
    )
    batch: Annotated[int, Field(ge=1)] = Field(4, description="sequences in a step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-3, description="AdamW's rate for transforms")
    clip_learning_rate: Annotated[float, Field(gt=0)] = Field(5e-2, description="AdamW's rate for clips")
    loss: Literal["token", "relative", "log"] = Field(
        "token",
        description="squared output error relative to each token's own output (token), to all outputs (relative), "
        "or the logarithm of that (log: the paper's L / L.detach())",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's weight decay")
    clip_start: Literal["searched", "fixed"] = Field(
        "searched", description="where clips start: the factors of least output error, or the same one everywhere"
    )
    clip_init: float = Field(4.0, description="a fixed start, before the sigmoid: sigmoid(4) = 0.982 of the range")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything random")
    rounding_samples: Annotated[int, Field(ge=0)] = Field(
        0, description="sequences that GPTQ rounds against; 0: as many as `samples`"
    )
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads; 0: as torch chooses")


class TuneSpec(Frozen):
    """Tuning after rounding: with the weight codes fixed, all the rest learns end to end to give the full-precision
    model's next-token distribution. Sequences and batches are those of `calibration`, as many as the text has.
    """

    steps: Annotated[int, Field(ge=0)] = Field(28, description="steps of tuning after rounding; 0: none")
    learning_rate: Annotated[float, Field(gt=0)] = Field(4e-4, description="AdamW's rate")
    clip_rate: Annotated[float, Field(gt=0)] = Field(20.0, description="how many times faster clips learn")
    warmup: Annotated[int, Field(ge=0)] = Field(8, description="steps over which the rate rises")


class Recipe(Frozen):
    """A whole recipe. Every section and key has a default; the defaults are the recipe `flatq`."""

    description: str = Field("", description="one line for `flatq recipes`")
    weights: WeightSpec = Field(default_factory=WeightSpec)
    activations: ActivationSpec = Field(default_factory=ActivationSpec)
    kv_cache: KVCacheSpec = Field(default_factory=KVCacheSpec)
    transform: TransformSpec = Field(default_factory=TransformSpec)
    calibration: CalibrationSpec = Field(default_factory=CalibrationSpec)
    tune: TuneSpec = Field(default_factory=TuneSpec)
