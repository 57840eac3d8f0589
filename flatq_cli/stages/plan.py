"""`flatq calibrate --dry-run`: what a calibration will learn, hold and take, from the model's configuration alone;
and how long fuse will take after it.

Sites, shapes and parameters are exact. Memory counts the large tensors that are alive at once; time divides the FLOP
of the stage by the rate of a short float32 matmul on this machine, so it is an estimate for planning, within a factor
of two or so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from flatq_cli.calibration.clips import SAMPLE_ROWS
from flatq_cli.calibration.moments import gptq_stride, row_stride
from flatq_cli.config.recipe import Recipe
from flatq_cli.models.families import Family, Shapes, family_of
from flatq_cli.models.locate import load_config, locate
from flatq_cli.quantization.weights import groups_of
from flatq_cli.runtime.layout import KEY, VALUE, SiteLayout, block_layout

BFLOAT16, FLOAT32, FLOAT64 = 2, 4, 8
# Copies of a block's weights alive in a training step: its own, folded, quantized, and the gradients of the last two.
WEIGHT_COPIES = 5
# Copies of a site's rows alive while they are transformed: as floats, scaled, multiplied by one factor.
TRANSFORM_COPIES = 3
# Copies of a site's sampled rows alive while its clip is searched.
SEARCH_COPIES = 5
# A step costs forward, backward to inputs and backward to weights: three forwards.
PASSES_PER_STEP = 3
# GPTQ runs a block site by site and keeps what is settled; only what stands before attention and before the MLP's
# product runs again with rounded weights.
PASSES_OF_ROUNDING = 1.5
# A token of tuning passes the full-precision model once, the quantized one forward, forward again and backward.
PASSES_OF_TUNING = 4


@dataclass(frozen=True)
class CalibrationPlan:
    """What a calibration of `model` by `recipe` is made of."""

    model: str
    recipe: Recipe
    shapes: Shapes
    layouts: dict[str, SiteLayout]
    linears: dict[str, tuple[int, int]]
    blocks: int
    vocabulary: int
    flops_per_second: float

    def rows(self) -> list[dict[str, Any]]:
        """One row a site: its sizes, what its transform is made of, its quantizer and its costs."""
        return [
            {
                "site": layout.name,
                "width": layout.width,
                "n1": layout.n1,
                "n2": layout.n2,
                "transform": _transform_text(layout),
                "bits": layout.bits,
                "parameters": layout.parameters,
                "online_flops_per_token": layout.online_flops,
            }
            for layout in self.layouts.values()
        ]

    def totals(self) -> dict[str, Any]:
        """Sums over sites and blocks, memory in bytes, time in seconds."""
        spec = self.recipe.calibration
        return {
            "model": self.model,
            "blocks": self.blocks,
            "tokens": spec.samples * spec.seqlen,
            "steps_per_block": spec.epochs * -(-spec.samples // spec.batch),
            "parameters_per_block": self.parameters_per_block,
            "memory_bytes": self.memory_bytes,
            "artifact_bytes": self.blocks * self.parameters_per_block * FLOAT32,
            "seconds": self.seconds,
            "fuse_memory_bytes": self.fuse_memory_bytes,
            "fuse_seconds": self.fuse_seconds,
        }

    @property
    def block_weights(self) -> int:
        """Weights of a block's linears."""
        return sum(out * width for out, width in self.linears.values())

    @property
    def parameters_per_block(self) -> int:
        """Numbers that are learned for a block: transforms, activation clips, weight clips."""
        weights = self.recipe.weights
        learned = weights.bits < 16 and weights.clip == "learned"
        clips = sum(2 * out * groups_of(width, weights.group) for out, width in self.linears.values()) if learned else 0
        return sum(layout.parameters for layout in self.layouts.values()) + clips

    @property
    def memory_bytes(self) -> int:
        """Peak: the larger of the embedding alone, and a block with its hidden states and either one step's activations
        or what its start is found from: some rows of every site, and second moments.
        """
        spec, shapes = self.recipe.calibration, self.shapes
        hidden = 2 * spec.samples * spec.seqlen * shapes.hidden * FLOAT32
        widest = max(self._widths, default=0)
        # All sites' rows; of the widest also those being transformed, two moments, and the search's copies.
        start = sum(layout.width * self._rows_kept(layout) for layout in self.layouts.values())
        start += widest * (TRANSFORM_COPIES * self._tokens_kept(widest) + 2 * widest + SEARCH_COPIES * SAMPLE_ROWS)
        per_token = 16 * shapes.hidden + 8 * shapes.intermediate + 8 * shapes.heads * shapes.head_dim
        step = spec.batch * spec.seqlen * per_token * FLOAT32
        block = WEIGHT_COPIES * self.block_weights * FLOAT32
        embedding = self.vocabulary * shapes.hidden * FLOAT32
        return max(embedding + hidden // 2, block + hidden + max(step, start * FLOAT32))

    @property
    def fuse_memory_bytes(self) -> int:
        """Peak of fuse: of rounding (a block in float64, folded and not; for GPTQ also the text's hidden states, twice,
        and for all of the text what o_proj and what down_proj reads) or of tuning (hidden states of the text before and
        after the full-precision model, one dequantized block). Tuning takes more where it can: it is faster then.
        """
        spec, shapes = self.recipe.calibration, self.shapes
        rounding = 2 * self.block_weights * FLOAT64
        if self._gptq:
            kept = 2 * shapes.hidden + shapes.heads * shapes.head_dim + shapes.intermediate
            moments = 3 * max(width for _, width in self.linears.values()) ** 2
            rounding += (self._rounding_tokens * kept + moments) * FLOAT32
        if not self.recipe.tune.steps:
            return rounding
        text = self.recipe.tune.steps * spec.batch * spec.seqlen
        step = spec.batch * spec.seqlen * self.blocks * shapes.hidden * FLOAT32
        head = self.vocabulary * shapes.hidden * BFLOAT16
        tuning = 2 * text * shapes.hidden * FLOAT32 + step + head + self.block_weights * (FLOAT32 + BFLOAT16)
        return max(rounding, tuning)

    @property
    def _gptq(self) -> bool:
        return self.recipe.weights.bits < 16 and self.recipe.weights.rounding == "gptq"

    @property
    def _rounding_tokens(self) -> int:
        spec = self.recipe.calibration
        return (spec.rounding_samples or spec.samples) * spec.seqlen

    @property
    def seconds(self) -> float:
        """Estimated time of calibrate: the forward passes, the moments, and the training steps."""
        spec = self.recipe.calibration
        forward = spec.samples * spec.seqlen * self.flops_per_token
        training = spec.epochs * PASSES_PER_STEP * forward
        return self.blocks * (3 * forward + self._some_moments() + training) / self.flops_per_second

    @property
    def fuse_seconds(self) -> float:
        """Estimated time of fuse: GPTQ's passes and moments, and tuning with the head's logits; folding and rounding
        to nearest are quick. Of a text that is shorter than tuning reads, some is read again.
        """
        spec, tuning = self.recipe.calibration, self.recipe.tune
        flops = 0.0
        if self._gptq:
            tokens = self._rounding_tokens
            flops += self.blocks * (PASSES_OF_ROUNDING * tokens * self.flops_per_token + self._gptq_moments())
        tokens = tuning.steps * spec.batch * spec.seqlen
        head = 2 * self.vocabulary * self.shapes.hidden
        flops += PASSES_OF_TUNING * tokens * (self.blocks * self.flops_per_token + head)
        return flops / self.flops_per_second

    @property
    def flops_per_token(self) -> float:
        """Of a block's forward pass."""
        attention = 2 * self.recipe.calibration.seqlen * self.shapes.heads * self.shapes.head_dim
        return 2 * (self.block_weights + attention)

    def _some_moments(self) -> float:
        """FLOP of calibrate's moments, which of many tokens take some."""
        return sum(2 * self._rows_kept(layout) * layout.width**2 for layout in self.layouts.values())

    def _rows_kept(self, layout: SiteLayout) -> int:
        """Rows that calibrate keeps of a site; with keys also queries, a row a head."""
        shapes = self.shapes
        rows = {KEY: shapes.kv_heads + shapes.heads, VALUE: shapes.kv_heads}.get(layout.name, 1)
        return rows * self._tokens_kept(layout.width)

    def _tokens_kept(self, width: int) -> int:
        spec = self.recipe.calibration
        return spec.samples * spec.seqlen // row_stride(spec.samples, spec.seqlen, width)

    @property
    def _widths(self) -> list[int]:
        return [layout.width for layout in self.layouts.values()]

    def _gptq_moments(self) -> float:
        """FLOP of GPTQ's moments, which of many tokens take some."""
        tokens, length = self._rounding_tokens, self.recipe.calibration.seqlen
        strides = {width: gptq_stride(tokens // length, length, width) for width in self._widths}
        return sum(2 * tokens / strides[width] * width**2 for width in self._widths)


def plan(model: str, recipe: Recipe, device: str, trust_remote_code: bool = False) -> CalibrationPlan:
    """Read the model's configuration and measure the machine; fetches and loads no weights."""
    config = load_config(locate(model, weights=False), trust_remote_code=trust_remote_code)
    family: Family = family_of(config)
    shapes = Shapes.of(config)
    if recipe.calibration.threads:
        torch.set_num_threads(recipe.calibration.threads)
    return CalibrationPlan(
        model=model,
        recipe=recipe,
        shapes=shapes,
        layouts=block_layout(recipe, family, shapes),
        linears=shapes.linears(family),
        blocks=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        flops_per_second=_matmul_rate(torch.device(device)),
    )


def _transform_text(layout: SiteLayout) -> str:
    factors = [f"{size}×{size}" for size, present in ((layout.n1, layout.left), (layout.n2, layout.right)) if present]
    parts = (["diag"] if layout.diag else []) + ([" ⊗ ".join(factors)] if factors else [])
    return " · ".join(parts) or "none"


def _matmul_rate(device: torch.device, size: int = 1024, repeats: int = 8) -> float:
    """FLOP a second of float32 matmuls (bf16 on CUDA, as training runs there)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    _ = matrix @ matrix
    started = time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    float(product[0, 0])  # waits for a GPU
    return repeats * 2 * size**3 / (time.perf_counter() - started)
