"""How flat a block is, site by site: the largest magnitude of each channel before and after the transform, and what
rounding costs there.

One scale serves all channels of a token, and all inputs of an output channel. So a channel that is much larger than the
rest takes the resolution from all others, on either side of the product. A transform is good where the curve of the
channels' maxima is low and level for the activation *and* for what is multiplied with it: the weights that read it, for
keys the queries.

What a site lets through is watched while the full-precision block runs; the rest follows from the block's weights.
Of a tuned run the block that tuning left is watched too, on the same input: tuning moves norms, scales and matrices, so
what comes to its sites is no longer the full-precision activation times one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatq_cli.config.recipe import WeightSpec
from flatq_cli.models.families import Family, InputSite, Shapes
from flatq_cli.quantization.quantizers import fake_quantize, fake_quantize_grouped
from flatq_cli.runtime.folding import fold, input_transform
from flatq_cli.runtime.layout import ATTN_OUT, KEY, QUERY, VALUE, SiteLayout
from flatq_cli.runtime.linear import weight_of
from flatq_cli.transforms.kronecker import Transform, kronecker_matmul

POINTS = 192
"""Numbers that a curve of channels is reduced to; more than a small picture can show."""
SAMPLE_ROWS = 128
"""Rows of a forward pass that errors are measured on."""
DIGITS = 5
"""Significant digits of what is reported."""

ACTIVATION_NAMES = {KEY: "keys", VALUE: "values"}

Map = Callable[[Tensor], Tensor]


class Watch(nn.Module):
    """A site that lets x through unchanged, and notes max |x| of each channel before and after a map.

    `before`, `after`: float32 [width]. `rows`: float32 [n, width], some of what came by, before the map.
    """

    def __init__(self, width: int, map: Map) -> None:
        super().__init__()
        self.width, self.map = width, map
        self.before, self.after = torch.zeros(width), torch.zeros(width)
        self._rows: list[Tensor] = []

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, self.width).float()
        self.before = torch.maximum(self.before.to(x.device), rows.abs().amax(0))
        self.after = torch.maximum(self.after.to(x.device), self.map(rows).abs().amax(0))
        # An odd stride meets every position of a sequence, the first token too, whose activations often are massive.
        self._rows.append(rows[:: (rows.shape[0] // SAMPLE_ROWS) | 1].clone())
        return x

    @property
    def rows(self) -> Tensor:
        return torch.cat(self._rows)


class Calibrated(NamedTuple):
    """What calibration left for a block.

    `layouts`: by site. `transforms`: float32, by site; sites without one are left out. `clips`: clip factors [2] by
    site. `weight_clips`: [out, groups, 2] by linear.
    """

    layouts: Mapping[str, SiteLayout]
    transforms: Mapping[str, Transform]
    clips: Mapping[str, Tensor]
    weight_clips: Mapping[str, Tensor]


class Tuned(NamedTuple):
    """A tuned block, and the watches in front of its sites. The block's weights are what its codes stand for."""

    block: nn.Module
    watched: Mapping[str, Watch]


class _Errors(NamedTuple):
    """What rounding one side alone adds; None for a side that is not rounded."""

    activation: float | None
    partner: float | None


def watches(family: Family, shapes: Shapes, calibrated: Calibrated) -> dict[str, Watch]:
    """A watch for every site before linears, and for keys, queries and values where the recipe touches them."""
    linears, transforms = shapes.linears(family), calibrated.transforms
    found = {
        site.name: Watch(linears[site.readers[0]][1], _face(input_transform(site.name, transforms, shapes)))
        for site in family.sites
    }
    for name in (KEY, VALUE):
        if name in calibrated.layouts:
            found[name] = Watch(shapes.head_dim, _face(transforms.get(name)))
    if KEY in calibrated.layouts:
        found[QUERY] = Watch(shapes.head_dim, _other_face(transforms.get(KEY)))
    return found


def watch_tuned(block: nn.Module, family: Family, shapes: Shapes) -> Tuned:
    """Put a watch in front of each site of a fused block, in place: it sees what the site rounds."""
    linears = shapes.linears(family)
    widths = {site.name: linears[site.readers[0]][1] for site in family.sites}
    sites: Any = block.get_submodule("sites")
    if KEY in sites and QUERY not in sites:
        sites[QUERY] = nn.Identity()  # what the keys meet
    watched = {}
    for name, site in sites.items():
        watch = Watch(widths.get(name, shapes.head_dim), _online_map(site))
        site.register_forward_pre_hook(_looking(watch))
        watched[name] = watch
    return Tuned(block, watched)


@torch.no_grad()
def measure_block(
    parameters: Mapping[str, Tensor],
    watched: Mapping[str, Watch],
    calibrated: Calibrated,
    family: Family,
    shapes: Shapes,
    spec: WeightSpec,
    curves: bool,
    tuned: Tuned | None = None,
) -> list[dict[str, Any]]:
    """What the sites of a block show, after it has run with `watched` attached.

    Args:
        parameters: the block's own, float32, on the device of the watches.
        watched: what `watches` gave.
        curves: whether the channels are wanted, or only what sums them up.
        tuned: what `watch_tuned` gave for the block as tuning left it, after that has run too.
    Returns:
        For each site `{"site", "width", "activation": SIDE, "partner": SIDE}`, where the partner is what the activation
        is multiplied with, and a side is `{"name", "before", "after", "tuned"}`: before and after the transform, and in
        the tuned block, each as `summarize` gives it. Its `error` is what rounding this side alone adds to the product.
        `tuned` is None for the partner, and without a tuned block.
    """
    folded = fold(parameters, calibrated.transforms, family, shapes)
    reports = [_linear_site(site, parameters, folded, watched, calibrated, spec, curves) for site in family.sites]
    if KEY in calibrated.layouts:
        queries = watched[QUERY]
        rows = (queries.rows, queries.map(queries.rows))
        reports.append(_head_site(KEY, "queries", rows, (queries.before, queries.after), watched, calibrated, curves))
    if VALUE in calibrated.layouts:
        readers = parameters[f"{family.output_proj}.weight"].reshape(-1, shapes.head_dim)
        rows = (readers, _other_face(calibrated.transforms.get(VALUE))(readers))
        maxima = (_channel_maxima([rows[0]]), _channel_maxima([rows[1]]))
        reports.append(_head_site(VALUE, "weights", rows, maxima, watched, calibrated, curves))
    if tuned is not None:
        for report in reports:
            name = report["site"]
            if name in tuned.watched:
                report["activation"]["tuned"] = _tuned(name, tuned, calibrated.layouts[name], family, shapes, curves)
    return reports


def summarize(maxima: Tensor, error: float | None, curves: bool) -> dict[str, Any]:
    """The maxima of channels [width] as plain numbers: `largest`, `mean`, and `error` as it is given.

    With `curves` also `by_channel` and `sorted`, at most `POINTS` numbers each; of more channels `by_channel` has the
    largest of neighbours, so that no outlier is lost.
    """
    summary: dict[str, Any] = {
        "largest": _number(float(maxima.max())),
        "mean": _number(float(maxima.double().mean())),
        "error": None if error is None else _number(error),
    }
    if curves:
        summary["by_channel"] = [_number(value) for value in _largest_of_neighbours(maxima).tolist()]
        summary["sorted"] = [_number(value) for value in _evenly(maxima.sort(descending=True).values).tolist()]
    return summary


def _linear_site(
    site: InputSite,
    parameters: Mapping[str, Tensor],
    folded: Mapping[str, Tensor],
    watched: Mapping[str, Watch],
    calibrated: Calibrated,
    spec: WeightSpec,
    curves: bool,
) -> dict[str, Any]:
    """A site before linears: `before` is the model's own activation and weights, `after` what is rounded."""
    watch, layout = watched[site.name], calibrated.layouts.get(site.name)
    own = [parameters[f"{reader}.weight"] for reader in site.readers]
    changed = [folded[f"{reader}.weight"] for reader in site.readers]
    clips = [calibrated.weight_clips.get(reader) for reader in site.readers]
    errors = (
        _errors(watch.rows, own, layout, None, [None] * len(own), spec),
        _errors(watch.map(watch.rows), changed, layout, calibrated.clips.get(site.name), clips, spec),
    )
    maxima = (_channel_maxima(own), _channel_maxima(changed))
    return _report(site.name, "weights", watch, maxima, errors, curves)


def _head_site(
    name: str,
    partner: str,
    readers: tuple[Tensor, Tensor],
    maxima: tuple[Tensor, Tensor],
    watched: Mapping[str, Watch],
    calibrated: Calibrated,
    curves: bool,
) -> dict[str, Any]:
    """`key` or `value`: rows of one head; what they meet, before and after in `readers`, is not rounded here."""
    watch, layout = watched[name], calibrated.layouts[name]
    errors = (
        _errors(watch.rows, [readers[0]], layout, None, [None], None),
        _errors(watch.map(watch.rows), [readers[1]], layout, calibrated.clips.get(name), [None], None),
    )
    return _report(name, partner, watch, maxima, errors, curves)


def _report(
    site: str,
    partner: str,
    watch: Watch,
    partner_maxima: tuple[Tensor, Tensor],
    errors: tuple[_Errors, _Errors],
    curves: bool,
) -> dict[str, Any]:
    before, after = errors
    return {
        "site": site,
        "width": watch.width,
        "activation": {
            "name": ACTIVATION_NAMES.get(site, "activation"),
            "before": summarize(watch.before, before.activation, curves),
            "after": summarize(watch.after, after.activation, curves),
            "tuned": None,
        },
        "partner": {
            "name": partner,
            "before": summarize(partner_maxima[0], before.partner, curves),
            "after": summarize(partner_maxima[1], after.partner, curves),
            "tuned": None,
        },
    }


def _tuned(name: str, tuned: Tuned, layout: SiteLayout, family: Family, shapes: Shapes, curves: bool) -> dict[str, Any]:
    """The activation that a tuned site rounds. Its error compares the tuned block's product with and without that
    rounding: the tuned matrix is not the inverse of what is in the weights, on purpose, so a difference from the
    full-precision product would blame rounding for what tuning moved.
    """
    watch = tuned.watched[name]
    site: Any = tuned.block.get_submodule(f"sites.{name}")
    weights = _tuned_partners(name, tuned, family, shapes)
    error = _errors(watch.map(watch.rows), weights, layout, site.clip, [None] * len(weights), None).activation
    return summarize(watch.after, error, curves)


def _tuned_partners(name: str, tuned: Tuned, family: Family, shapes: Shapes) -> list[Tensor]:
    """What the activation of a tuned site is multiplied with, each [out, width]."""
    if name == KEY:
        queries = tuned.watched[QUERY]
        return [queries.map(queries.rows)]
    if name == VALUE:
        # A head's output meets o_proj behind the heads matrix: a (P_o ⊗ I) Wᵀ.
        output = weight_of(tuned.block.get_submodule(family.output_proj))
        site: Any = getattr(tuned.block.get_submodule("sites"), ATTN_OUT, None)
        heads = None if site is None or site.left is None else site.left.T
        met = output if heads is None else kronecker_matmul(output, heads, None)
        return [met.reshape(-1, shapes.head_dim)]
    readers = next(site.readers for site in family.sites if site.name == name)
    return [weight_of(tuned.block.get_submodule(reader)) for reader in readers]


def _errors(
    rows: Tensor,
    weights: list[Tensor],
    layout: SiteLayout | None,
    clip: Tensor | None,
    weight_clips: list[Tensor | None],
    spec: WeightSpec | None,
) -> _Errors:
    """What rounding the rows, or the weights [out, in], adds to the products of the two: the mean over rows of the
    squared error, relative to the row's own products. A token of massive activations so counts as one token.
    """
    rounds_rows = layout is not None and layout.bits < 16
    rounds_weights = spec is not None and spec.bits < 16
    off = rows - fake_quantize(rows, layout.bits, layout.symmetric, clip) if layout is not None else rows
    power = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    of_rows, of_weights = torch.zeros_like(power), torch.zeros_like(power)
    for weight, weight_clip in zip(weights, weight_clips, strict=True):
        power += _power(rows @ weight.T)
        if rounds_rows:
            of_rows += _power(off @ weight.T)
        if spec is not None and rounds_weights:
            rounded = fake_quantize_grouped(weight, spec.bits, spec.group, spec.symmetric, weight_clip)
            of_weights += _power(rows @ (weight - rounded).T)
    return _Errors(
        _mean_ratio(of_rows, power) if rounds_rows else None,
        _mean_ratio(of_weights, power) if rounds_weights else None,
    )


def _power(products: Tensor) -> Tensor:
    """‖row‖² of each row, float64 [rows]."""
    norms: Tensor = torch.linalg.vector_norm(products, dim=-1)
    return norms.double().square()


def _mean_ratio(error: Tensor, power: Tensor) -> float:
    """The mean of error / power, without rows whose product is zero."""
    counted = power > 0
    return float((error[counted] / power[counted]).mean()) if bool(counted.any()) else 0.0


def _channel_maxima(weights: list[Tensor]) -> Tensor:
    """Max |w| of each input over all rows of the weights, [in]."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float()


def _face(transform: Transform | None) -> Map:
    return _same if transform is None else transform.apply


def _other_face(transform: Transform | None) -> Map:
    return _same if transform is None else transform.apply_inverse_transpose


def _same(x: Tensor) -> Tensor:
    return x


def _online_map(site: Any) -> Map:
    """What an online site does before it rounds."""
    left, right = getattr(site, "left", None), getattr(site, "right", None)
    return _same if left is None and right is None else lambda rows: kronecker_matmul(rows, left, right)


def _looking(watch: Watch) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A forward pre-hook that shows the watch what a module reads."""

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        watch(args[0])

    return look


def _largest_of_neighbours(values: Tensor) -> Tensor:
    """At most `POINTS` numbers: the largest of each stretch of channels, so that no outlier is lost."""
    width = values.shape[0]
    if width <= POINTS:
        return values
    place = torch.arange(width, device=values.device) * POINTS // width
    return torch.zeros(POINTS, device=values.device).scatter_reduce(0, place, values, "amax")


def _evenly(values: Tensor) -> Tensor:
    """At most `POINTS` of `values`, evenly spaced, the first and the last among them."""
    width = values.shape[0]
    if width <= POINTS:
        return values
    return values[torch.linspace(0, width - 1, POINTS, dtype=torch.float64).round().long().to(values.device)]


def _number(value: float) -> float | None:
    """With fewer digits; None for what is not a number, which JSON does not have."""
    return float(f"{value:.{DIGITS}g}") if isfinite(value) else None
