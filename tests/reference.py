"""A decoder block in numpy and float64, written from the papers and not from flatq: what the tests compare with.

Transforms are dense matrices and every linear is computed in its unfolded form, y = (x T)(W T⁻ᵀ)ᵀ; nothing is folded
into anything. Covers the four families with plain RoPE: biases, norms on q and k, grouped heads, a sliding window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flatq_cli.transforms.kronecker import Transform

Array = NDArray[np.float64]


def array(tensor: Tensor) -> Array:
    """A tensor in float64."""
    return tensor.detach().double().numpy()


def dense(transform: Transform | None, width: int) -> Array:
    """T = diag(d) (L ⊗ R) as one matrix [width, width]."""
    if transform is None:
        return np.eye(width)
    n1, n2 = transform.sizes
    left = np.eye(n1) if transform.left is None else array(transform.left.matrix)
    right = np.eye(n2) if transform.right is None else array(transform.right.matrix)
    diag = np.ones(width) if transform.diag is None else array(transform.diag)
    return diag[:, None] * np.kron(left, right)


def rotate(x: Array, theta: float) -> Array:
    """RoPE of x [..., tokens, head_dim]: pairs (i, i + head_dim/2) turn by position · theta^(-2i/head_dim)."""
    tokens, dim = x.shape[-2:]
    angle = np.arange(tokens)[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def block_forward(
    parameters: Mapping[str, Tensor], config: Any, hidden: Tensor, transforms: Mapping[str, Transform] | None = None
) -> tuple[Array, dict[str, Array]]:
    """The block's output [batch, tokens, hidden], and what a quantizer would see at every site.

    Args:
        parameters: of the stock block, by name.
        transforms: by site; `value` and `key` for one head, `attn_out` without what `value` adds to it.
    Returns:
        The output, and by site the transformed activation: [batch, tokens, width], or [batch, heads, tokens, head_dim]
        of `query`, `key` (both after RoPE) and `value`.
    """
    p = {name: array(tensor) for name, tensor in parameters.items()}
    transforms = transforms or {}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    seen: dict[str, Array] = {}

    def norm(x: Array, name: str) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * p[f"{name}.weight"]

    def linear(x: Array, name: str, matrix: Array) -> Array:
        """x arrives transformed by `matrix`."""
        return x @ (p[f"{name}.weight"] @ np.linalg.inv(matrix).T).T + p.get(f"{name}.bias", 0.0)

    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, dim).swapaxes(1, 2)

    x = array(hidden)
    batch, tokens, width = x.shape
    attn_in = dense(transforms.get("attn_in"), width)
    seen["attn_in"] = norm(x, "input_layernorm") @ attn_in
    q, k, v = (split(linear(seen["attn_in"], f"self_attn.{name}_proj", attn_in)) for name in "qkv")
    if "self_attn.q_norm.weight" in p:
        q, k = norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm")
    theta = config.rope_parameters["rope_theta"]
    key, value = dense(transforms.get("key"), dim), dense(transforms.get("value"), dim)
    seen["query"] = rotate(q, theta) @ np.linalg.inv(key).T
    seen["key"] = rotate(k, theta) @ key
    seen["value"] = v @ value

    shared = heads // kv_heads
    scores = seen["query"] @ seen["key"].repeat(shared, 1).swapaxes(2, 3) / np.sqrt(dim)
    back = np.arange(tokens)[:, None] - np.arange(tokens)
    window = getattr(config, "sliding_window", None)
    visible = (back >= 0) & (back < (window or tokens))
    weights = np.exp(np.where(visible, scores - scores.max(-1, keepdims=True), -np.inf))
    attended = (weights / weights.sum(-1, keepdims=True)) @ seen["value"].repeat(shared, 1)
    attended = attended.swapaxes(1, 2).reshape(batch, tokens, heads * dim)
    mix = transforms.get("attn_out")
    mix = np.eye(heads) if mix is None or mix.left is None else array(mix.left.matrix)
    # The values carry P_v already; the heads matrix comes on top.
    seen["attn_out"] = attended @ np.kron(mix, np.eye(dim))
    x = x + linear(seen["attn_out"], "self_attn.o_proj", np.kron(mix, value))

    mlp_in = dense(transforms.get("mlp_in"), width)
    seen["mlp_in"] = norm(x, "post_attention_layernorm") @ mlp_in
    gate, up = (linear(seen["mlp_in"], f"mlp.{name}_proj", mlp_in) for name in ("gate", "up"))
    mlp_out = dense(transforms.get("mlp_out"), up.shape[-1])
    seen["mlp_out"] = (gate / (1 + np.exp(-gate)) * up) @ mlp_out
    return x + linear(seen["mlp_out"], "mlp.down_proj", mlp_out), seen


def quantize_rows(x: Array, bits: int, symmetric: bool, clip: Array | None = None) -> tuple[Array, Array, Array, Array]:
    """The numerics contract (docs/method.md) for groups along the last axis.

    Args:
        clip: [..., 2], factors of maximum and minimum.
    Returns:
        x / scale before rounding, codes like x, scale and zero point [..., 1].
    """
    c_max, c_min = (1.0, 1.0) if clip is None else (clip[..., :1], clip[..., 1:])
    high, low = c_max * np.maximum(x.max(-1, keepdims=True), 0), -c_min * np.minimum(x.min(-1, keepdims=True), 0)
    if symmetric:
        scale = np.maximum(high, low) / (2 ** (bits - 1) - 1)
        zero, bottom, top = np.zeros_like(scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        scale = (high + low) / (2**bits - 1)
        zero, bottom, top = np.rint(low / np.where(scale == 0, 1, scale)), 0, 2**bits - 1
    scale = np.where(scale == 0, 1, scale)
    return x / scale, np.clip(np.rint(x / scale) + zero, bottom, top), scale, zero
