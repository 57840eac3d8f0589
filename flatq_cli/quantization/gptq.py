"""GPTQ: rounding a weight so that the layer's output moves least, not the weight itself.

Rounded to nearest, the errors of a row add up blindly. GPTQ goes through the inputs one by one: it rounds a column of
the weight and lets the columns that are not rounded yet take up the error, as far as the inputs' second moment H =
E[xᵀx] says that they can. Scales and zero points are fixed beforehand, from the clipped range of the weight as it
came, so that what is stored looks like any other rounded weight.

Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1: with U the upper Cholesky factor of H⁻¹, rounding column j
with error e = (w_j - q_j) / U_jj subtracts e · U_jk from every later column k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flatq_cli.errors import WorkError
from flatq_cli.quantization.quantizers import code_range, quantize_grouped
from flatq_cli.quantization.weights import CODES, SCALE, ZERO, code_dtype

COLUMNS = 128  # columns rounded before the rest of the weight is updated by one matmul
DAMPING_LIMIT = 1.0  # a share of the mean diagonal at which a moment is given up as no moment at all


class _Order(NamedTuple):
    """The order in which columns are rounded, and how to undo it."""

    forward: Tensor
    back: Tensor


@torch.no_grad()
def gptq_weight(
    weight: Tensor,
    moment: Tensor,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    clip: Tensor | None,
    damping: float = 0.01,
    act_order: bool = True,
) -> dict[str, Tensor]:
    """Round a weight to codes by GPTQ.

    Args:
        weight: float32 or float64 [out, in].
        moment: [in, in], second moment of what the linear reads, up to a factor; computed with in its own dtype.
        group: inputs that share a scale; 0 for one scale a row.
        clip: [out, groups, 2], factors of max and min; None for no clipping.
        damping: added to the moment's diagonal, as a share of its mean; raised tenfold while the moment has no
            Cholesky factor.
        act_order: round the inputs of largest moment first.
    Returns:
        `weight_codes`, `weight_scale`, and `weight_zero` where asymmetric, as `round_weight` gives them.
    Raises:
        WorkError: a moment that has no Cholesky factor however damped (NaN, not positive).
    """
    _, scale, zero = quantize_grouped(weight.float(), bits, group, symmetric, clip)
    diagonal = moment.diagonal()
    order = _order(diagonal, act_order)
    factor = inverse_factor(moment[order.forward][:, order.forward], damping)

    # Columns as rows: what one step touches is contiguous.
    columns = weight.to(moment.dtype).T[order.forward].contiguous()
    columns[(diagonal == 0)[order.forward]] = 0  # an input that is always 0: its weights are free, 0 rounds best
    groups = order.forward // (group or weight.shape[1])
    codes = _round_columns(columns, factor, scale.T.to(moment.dtype), zero, groups, code_range(bits, symmetric))

    rounded = {CODES: codes[order.back].T.contiguous().to(code_dtype(bits, symmetric)), SCALE: scale.float()}
    return rounded if zero is None else {**rounded, ZERO: zero.to(torch.int32)}


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """U, upper triangular [n, n], with UᵀU = (moment + d·I)⁻¹; d is `damping` times the mean diagonal, or more if
    need be.

    Raises:
        WorkError: as in `gptq_weight`.
    """
    identity = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    mean = moment.diagonal().mean()
    while damping <= DAMPING_LIMIT:
        lower, failed = torch.linalg.cholesky_ex(moment + damping * mean * identity)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                factor: Tensor = upper
                return factor
        damping = max(10 * damping, 1e-6)
    raise WorkError(
        f"GPTQ: the second moment of a linear's input ({moment.shape[0]} wide) has no Cholesky factor, not even with "
        f"damping {DAMPING_LIMIT:g}: the calibration text gives values that are not numbers, or all zero; use another "
        "calibration.data or weights.rounding=nearest"
    )


def _order(diagonal: Tensor, act_order: bool) -> _Order:
    forward = (
        diagonal.argsort(descending=True, stable=True)
        if act_order
        else torch.arange(len(diagonal), device=diagonal.device)
    )
    return _Order(forward, forward.argsort())


def _round_columns(
    columns: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, groups: Tensor, codes_from_to: tuple[int, int]
) -> Tensor:
    """The loop of algorithm 1.

    Args:
        columns: [in, out], changed in place. factor: [in, in].
        scale: [groups, out]. zero: [out, groups] or None. groups: [in], the group of each column.
    Returns:
        codes [in, out], integral, in columns' dtype.
    """
    width = columns.shape[0]
    zeros = torch.zeros_like(scale) if zero is None else zero.T.to(scale.dtype)
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    group_list = groups.tolist()
    for first in range(0, width, COLUMNS):
        last = min(first + COLUMNS, width)
        for j in range(first, last):
            s, z = scale[group_list[j]], zeros[group_list[j]]
            torch.clamp((columns[j] / s).round_().add_(z), *codes_from_to, out=codes[j])
            torch.div(columns[j] - (codes[j] - z) * s, factor[j, j], out=errors[j])
            if j + 1 < last:
                columns[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j], alpha=-1)
        columns[last:].addmm_(factor[first:last, last:].T, errors[first:last], alpha=-1)
    return codes
