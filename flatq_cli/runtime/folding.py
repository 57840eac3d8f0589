"""Folding: a block's transforms move into its weights, norms and biases, and its output does not change.

One pure function over tensors. Calibration calls it in float32 and differentiates through it at every step; fuse
calls it once in float64. What it returns are the parameters of the stock block that runs with its sites attached.

    attn_in, mlp_in, mlp_out   W → W T⁻ᵀ for every reader; diag into the norm's weight, or into the rows of up_proj
    value                      v_proj's rows and bias times P_v, head by head
    attn_out                   W_o → W_o (P_o ⊗ P_v)⁻ᵀ; P_o stays online
    key                        nothing: k P_h and q P_h⁻ᵀ happen after RoPE, online
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flatq_cli.models.families import Family, Shapes
from flatq_cli.runtime.layout import ATTN_OUT, KEY, QUERY, VALUE
from flatq_cli.transforms.kronecker import Transform


def fold(
    parameters: Mapping[str, Tensor], transforms: Mapping[str, Transform], family: Family, shapes: Shapes
) -> dict[str, Tensor]:
    """Fold `transforms` (by site) into `parameters` (by name inside the block).

    Args:
        parameters: the float block's parameters, all of one dtype.
        transforms: of the same dtype; sites that are missing are identities.
    Returns:
        New parameters by the same names; differentiable in both arguments.
    Source: FlatQuant (arXiv 2410.09426), section 3.1 and figure 4.
    """
    folded = dict(parameters)
    if VALUE in transforms:
        _transform_output_heads(folded, family.value_proj, transforms[VALUE], shapes.head_dim)
    for site in family.sites:
        transform = input_transform(site.name, transforms, shapes)
        if transform is None:
            continue
        for reader in site.readers:
            name = f"{reader}.weight"
            folded[name] = transform.apply_inverse_transpose(folded[name])
    for site in family.sites:
        transform = transforms.get(site.name)
        if transform is not None and transform.diag is not None and site.diag_into is not None:
            _scale_output(folded, site.diag_into, transform.diag)
    return folded


def input_transform(name: str, transforms: Mapping[str, Transform], shapes: Shapes) -> Transform | None:
    """What the readers of site `name` must undo; for `attn_out` the heads matrix and, as right factor, `value`'s."""
    if name != ATTN_OUT:
        return transforms.get(name)
    heads, value = transforms.get(ATTN_OUT), transforms.get(VALUE)
    if heads is None and value is None:
        return None
    return Transform(
        width=shapes.heads * shapes.head_dim,
        left=heads.left if heads is not None else None,
        right=value.right if value is not None else None,
        diag=None,
    )


def online_tensors(transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
    """What runs online, by `<site>.<left|right>`: all matrices but `value`'s; `query` gets the other face of `key`."""
    online: dict[str, Tensor] = {}
    for name, transform in transforms.items():
        if name == VALUE:
            continue
        if transform.left is not None:
            online[f"{name}.left"] = transform.left.matrix
        if transform.right is not None:
            online[f"{name}.right"] = transform.right.matrix
            if name == KEY:
                online[f"{QUERY}.right"] = transform.right.inverse_transpose
    return online


def _transform_output_heads(folded: dict[str, Tensor], linear: str, transform: Transform, head_dim: int) -> None:
    """Rows of `linear`, [heads · head_dim, in]: every head's output o becomes o P; the bias too."""
    if transform.right is None:
        return
    matrix = transform.right.matrix
    weight = folded[f"{linear}.weight"]
    rows = weight.view(-1, head_dim, weight.shape[1])
    folded[f"{linear}.weight"] = (matrix.T @ rows).reshape(weight.shape)
    bias = folded.get(f"{linear}.bias")
    if bias is not None:
        folded[f"{linear}.bias"] = (bias.view(-1, head_dim) @ matrix).reshape(bias.shape)


def _scale_output(folded: dict[str, Tensor], module: str, diag: Tensor) -> None:
    """Scale what `module` puts out by `diag`, channel by channel: a norm's weight, or a linear's rows and bias."""
    weight = folded[f"{module}.weight"]
    folded[f"{module}.weight"] = weight * (diag if weight.dim() == 1 else diag[:, None])
    bias = folded.get(f"{module}.bias")
    if bias is not None:
        folded[f"{module}.bias"] = bias * diag
