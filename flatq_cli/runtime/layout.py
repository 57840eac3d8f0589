"""What a block of a recipe holds: for each site, its sizes, which factors its transform has, and how it is quantized.

One description, derived from recipe, family and shapes, that calibration initializes, `--dry-run` counts, fuse writes
and the loader of an export rebuilds. Sites are named as in the design: `attn_in`, `attn_out`, `mlp_in`, `mlp_out`,
`key`, `value`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flatq_cli.config.recipe import ActivationSpec, KVCacheSpec, Recipe, WeightSpec
from flatq_cli.errors import UsageError
from flatq_cli.models.families import Family, InputSite, Shapes
from flatq_cli.transforms.factorize import factor

KEY, VALUE, QUERY = "key", "value", "query"
ATTN_OUT = "attn_out"


@dataclass(frozen=True)
class SiteLayout:
    """One site of a block: T = diag(d)(L ⊗ R) of `width` = n1 · n2, and the quantizer behind it.

    `left`, `right` and `diag` say which parts exist; a part that does not is the identity. `bits` 16 means no
    quantizer.
    """

    name: str
    width: int
    n1: int
    n2: int
    left: bool
    right: bool
    diag: bool
    bits: int
    symmetric: bool
    clip: bool

    @property
    def parameters(self) -> int:
        """Numbers that calibration learns here: matrices, diagonal, the two clips."""
        return self.n1**2 * self.left + self.n2**2 * self.right + self.width * self.diag + 2 * self.clip

    @property
    def online_flops(self) -> int:
        """FLOP a token (of one head, for `key`) that the online transform costs: 2·n·(n1 + n2); `value`'s is folded."""
        if self.name == VALUE:
            return 0
        return 2 * self.width * (self.n1 * self.left + self.n2 * self.right)


def block_layout(recipe: Recipe, family: Family, shapes: Shapes) -> dict[str, SiteLayout]:
    """The sites of a block under `recipe`, by name; a site that neither transforms nor quantizes is left out.

    Raises:
        UsageError: `weights.group` does not divide the rows of every linear.
    """
    _check_group(recipe.weights, family, shapes)
    quantizes_linears = recipe.weights.bits < 16 or recipe.activations.bits < 16
    sites = [_input_site(recipe, family, site, shapes, quantizes_linears) for site in family.sites]
    quantizes_cache = recipe.kv_cache.bits < 16
    sites.append(_head_site(recipe, KEY, shapes, quantizes_cache))
    sites.append(_head_site(recipe, VALUE, shapes, quantizes_cache or quantizes_linears))
    return {s.name: s for s in sites if s.left or s.right or s.diag or s.bits < 16}


def _check_group(spec: WeightSpec, family: Family, shapes: Shapes) -> None:
    if spec.bits == 16 or not spec.group:
        return
    for name, (_, width) in shapes.linears(family).items():
        if width % spec.group:
            raise UsageError(
                f"weights.group: {spec.group} does not divide the {width} inputs of {name}; "
                "choose one that divides every width, or 0 for one scale a row"
            )


def _input_site(recipe: Recipe, family: Family, site: InputSite, shapes: Shapes, quantized: bool) -> SiteLayout:
    """A site before linears. `attn_out` has the heads matrix alone: its right factor is folded into v_proj."""
    width = shapes.linears(family)[site.readers[0]][1]
    heads = site.name == ATTN_OUT
    n1, n2 = (shapes.heads, shapes.head_dim) if heads else factor(width)
    transformed = quantized and recipe.transform.kind == "kronecker"
    return SiteLayout(
        name=site.name,
        width=width,
        n1=n1,
        n2=n2,
        left=transformed,
        right=transformed and not heads,
        diag=quantized and site.diag_into is not None and recipe.transform.diagonal != "none",
        **_quantizer(recipe.activations),
    )


def _head_site(recipe: Recipe, name: str, shapes: Shapes, transformed: bool) -> SiteLayout:
    """`key` or `value`: one [head_dim, head_dim] matrix for all heads."""
    return SiteLayout(
        name=name,
        width=shapes.head_dim,
        n1=1,
        n2=shapes.head_dim,
        left=False,
        right=transformed and recipe.transform.kind == "kronecker",
        diag=False,
        **_quantizer(recipe.kv_cache),
    )


def _quantizer(spec: ActivationSpec | KVCacheSpec) -> dict[str, Any]:
    return {
        "bits": spec.bits,
        "symmetric": spec.symmetric,
        "clip": spec.bits < 16 and spec.clip == "learned",
    }
