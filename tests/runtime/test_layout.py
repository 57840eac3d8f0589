from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatq_cli.config.recipe import Recipe
from flatq_cli.models.families import LLAMA, Shapes
from flatq_cli.runtime.layout import SiteLayout, block_layout

SMOLLM2 = Shapes(hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536)
FLOAT = {"bits": 16}
NO_TRANSFORM = {"kind": "none", "diagonal": "none"}


def layout(shapes: Shapes = SMOLLM2, **sections: Any) -> dict[str, SiteLayout]:
    return block_layout(Recipe.model_validate(sections), LLAMA, shapes)


def parts(site: SiteLayout) -> tuple[bool, bool, bool]:
    return site.left, site.right, site.diag


def test_the_six_sites_of_the_default_recipe():
    sites = layout()
    assert {name: (site.width, site.n1, site.n2, *parts(site)) for name, site in sites.items()} == {
        "attn_in": (576, 24, 24, True, True, True),
        "attn_out": (576, 9, 64, True, False, False),
        "mlp_in": (576, 24, 24, True, True, True),
        "mlp_out": (1536, 32, 48, True, True, True),
        "key": (64, 1, 64, False, True, False),
        "value": (64, 1, 64, False, True, False),
    }
    for name, site in sites.items():
        assert (site.name, site.bits, site.symmetric, site.clip) == (name, 4, name not in ("key", "value"), True)


def test_the_heads_matrix_fits_heads_that_are_wider_than_the_hidden_states():
    site = layout(Shapes(hidden=32, heads=4, kv_heads=2, head_dim=12, intermediate=56))["attn_out"]
    assert (site.width, site.n1, site.n2) == (48, 4, 12)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"weights": FLOAT, "activations": FLOAT, "kv_cache": FLOAT}, {}),
        # only weights: nothing before attention scores needs a transform
        (
            {"activations": FLOAT, "kv_cache": FLOAT},
            {
                "attn_in": (True, True, True),
                "attn_out": (True, False, False),
                "mlp_in": (True, True, True),
                "mlp_out": (True, True, True),
                "value": (False, True, False),
            },
        ),
        # only the cache
        ({"weights": FLOAT, "activations": FLOAT}, {"key": (False, True, False), "value": (False, True, False)}),
        # round to nearest: sites that only quantize
        ({"transform": NO_TRANSFORM}, dict.fromkeys(layout(), (False, False, False))),
        ({"transform": NO_TRANSFORM, "activations": FLOAT, "kv_cache": FLOAT}, {}),
        # SmoothQuant: a diagonal where something can absorb it
        (
            {"transform": {"kind": "none", "diagonal": "smooth"}, "kv_cache": FLOAT},
            {
                "attn_in": (False, False, True),
                "attn_out": (False, False, False),
                "mlp_in": (False, False, True),
                "mlp_out": (False, False, True),
            },
        ),
    ],
    ids=["nothing", "weights", "cache", "rtn", "rtn-weights", "smooth"],
)
def test_a_site_has_what_its_recipe_needs_and_no_more(sections: dict[str, Any], expected: dict[str, Any]):
    assert {name: parts(site) for name, site in layout(**sections).items()} == expected


def test_clips_are_learned_only_where_something_is_quantized_and_the_recipe_says_so():
    assert not any(site.clip for site in layout(activations=FLOAT, kv_cache=FLOAT).values())
    fixed = layout(activations={"clip": "none"}, kv_cache={"bits": 8, "symmetric": True})
    assert {name: (site.bits, site.symmetric, site.clip) for name, site in fixed.items()} == {
        **dict.fromkeys(("attn_in", "attn_out", "mlp_in", "mlp_out"), (4, True, False)),
        **dict.fromkeys(("key", "value"), (8, True, True)),
    }


@given(
    st.builds(
        lambda hidden, kv, shared, half, intermediate: Shapes(hidden, kv * shared, kv, 2 * half, intermediate),
        *(st.integers(1, high) for high in (5000, 8, 8, 64, 15000)),
    )
)
def test_every_width_splits_into_its_two_sizes(shapes: Shapes):
    sites = layout(shapes)
    assert all(site.n1 * site.n2 == site.width for site in sites.values())
    assert {name: site.width for name, site in sites.items()} == {
        "attn_in": shapes.hidden,
        "attn_out": shapes.heads * shapes.head_dim,
        "mlp_in": shapes.hidden,
        "mlp_out": shapes.intermediate,
        "key": shapes.head_dim,
        "value": shapes.head_dim,
    }


def test_parameters_and_flop_count_the_parts_that_exist():
    sites = layout()
    assert sites["attn_in"].parameters == 24 * 24 + 24 * 24 + 576 + 2
    assert sites["attn_out"].parameters == 9 * 9 + 2
    assert sites["key"].parameters == 64 * 64 + 2
    # 2·n·(n1 + n2): every number takes part in n1 products of the left factor and n2 of the right one
    assert sites["attn_in"].online_flops == 2 * 576 * (24 + 24)
    assert sites["attn_out"].online_flops == 2 * 576 * 9
    assert sites["key"].online_flops == 2 * 64 * 64
    assert sites["value"].online_flops == 0  # folded
