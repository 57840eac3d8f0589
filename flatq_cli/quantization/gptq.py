"""GPTQ: rounding a weight so that the layer's output moves least, not the weight itself.

Rounded to nearest, the errors of a row add up blindly. GPTQ goes through the inputs one by one: before it rounds a
column of the weight, it moves it to where it makes up best for the errors of the columns rounded before, as far as the
inputs' second moment H = E[xᵀx] says that it can. Scales and zero points are fixed beforehand, from the clipped range
of the weight as it came, so that what is stored looks like any other rounded weight.

Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1, in the form of Babai's nearest plane (Chen et al., arXiv
2507.18553), which takes one factorization and no inverse: with H = L Lᵀ the output moves by ‖(w - q) L‖², and entry k
of that row is L_kk (w_k - q_k) + Σ_i>k L_ik (w_i - q_i). From the last column to the first, rounding
w_k + Σ_i>k (L_ik / L_kk) (w_i - q_i) makes each entry as small as the codes allow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatq_cli.errors import WorkError
from flatq_cli.quantization.quantizers import code_range, quantize_grouped
from flatq_cli.quantization.weights import CODES, SCALE, ZERO, code_dtype

COLUMNS = 64  # columns that make up for all errors before them by one matmul, and for each other's one by one
DAMPING_LIMIT = 1.0  # a share of the mean diagonal at which a moment is given up as no moment at all


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
    """Round a weight to codes by GPTQ. Its rows do not see each other: several linears that read the same input are
    rounded at once, by one factorization, as the rows of one weight.

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
    feedback = error_feedback(moment[order[:, None], order], damping)

    # Columns as rows: what one step touches is contiguous.
    columns = weight.to(moment.dtype).T[order].contiguous()
    columns[(diagonal == 0)[order]] = 0  # an input that is always 0: its weights are free, 0 rounds best
    groups = order // (group or weight.shape[1])
    codes = _round_columns(columns, feedback, scale.T.to(moment.dtype), zero, groups, code_range(bits, symmetric))

    stored = torch.empty(codes.shape, dtype=code_dtype(bits, symmetric), device=codes.device)
    stored[order] = codes.to(stored.dtype)
    rounded = {CODES: stored.T.contiguous(), SCALE: scale.float()}
    return rounded if zero is None else {**rounded, ZERO: zero.to(torch.int32)}


def error_feedback(moment: Tensor, damping: float) -> Tensor:
    """What each column takes up of the errors of those after it: [n, n], unit lower triangular, entry (i, k) is
    L_ik / L_kk with L Lᵀ = moment + d·I; d is `damping` times the mean diagonal, or more if need be.

    Raises:
        WorkError: as in `gptq_weight`.
    """
    mean = moment.diagonal().mean()
    while damping <= DAMPING_LIMIT:
        damped = moment.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.isfinite(lower.sum()):
            feedback: Tensor = lower.div_(lower.diagonal().clone())
            return feedback
        damping = max(10 * damping, 1e-6)
    raise WorkError(
        f"GPTQ: the second moment of a linear's input ({moment.shape[0]} wide) has no Cholesky factor, not even with "
        f"damping {DAMPING_LIMIT:g}: the calibration text gives values that are not numbers, or all zero; use another "
        "calibration.data or weights.rounding=nearest"
    )


def _order(diagonal: Tensor, act_order: bool) -> Tensor:
    """The inputs in the reverse of the order in which they are rounded."""
    if act_order:
        return diagonal.argsort(descending=True, stable=True).flip(0)
    return torch.arange(len(diagonal), device=diagonal.device).flip(0)


def _round_columns(
    columns: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    groups: Tensor,
    codes_from_to: tuple[int, int],
) -> Tensor:
    """Codes [in, out], integral, in columns' dtype, chosen from the last column to the first.

    Args:
        columns: [in, out]. feedback: [in, in].
        scale: [groups, out]. zero: [out, groups] or None. groups: [in], the group of each column.
    """
    zeros = torch.zeros_like(scale) if zero is None else zero.T.to(scale.dtype)
    # An error is (column + zero · scale) - code · scale.
    shifted = columns if zero is None else columns + (zeros * scale)[groups]
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    # Rows once and for all: taking them one by one costs as much as working on them.
    code_rows, error_rows, shifted_rows = codes.unbind(), errors.unbind(), shifted.unbind()
    zero_rows, scale_rows = zeros.unbind(), scale.unbind()
    group_list = groups.tolist()
    for last in range(len(columns), 0, -COLUMNS):
        first = max(0, last - COLUMNS)
        targets = torch.addmm(columns[first:last], feedback[last:, first:last].T, errors[last:])
        for k in range(last - 1, first - 1, -1):
            code, zero_row, scale_row = code_rows[k], zero_rows[group_list[k]], scale_rows[group_list[k]]
            target = targets[k - first].addmv_(errors[k + 1 : last].T, feedback[k + 1 : last, k])
            torch.addcdiv(zero_row, target, scale_row, out=code).round_().clamp_(*codes_from_to)
            torch.addcmul(shifted_rows[k], code, scale_row, value=-1, out=error_rows[k])
    return codes
