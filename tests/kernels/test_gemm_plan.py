"""The layouts of 4-bit GEMMs: every output once, within a chip's limits, on every chip."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatq_cli.kernels.device import LIMITS
from flatq_cli.kernels.gemm_plan import (
    DECODE_TOKENS,
    GREATEST_FAST_IN,
    STEP,
    DecodePlan,
    PlainPlan,
    TiledPlan,
    code_bytes,
    decode_plan,
    form_of,
    gemm_plan,
    plain_plan,
    tiled_plan,
)

FAST_ARCHS = [arch for arch in LIMITS if arch >= 80]
archs = st.sampled_from(FAST_ARCHS)
widths = st.integers(1, GREATEST_FAST_IN // 32).map(lambda n: 32 * n)
outs = st.integers(1, 40000)
bits = st.sampled_from([4, 8])
# Llama-3-8B: qkv, o, gate and up, down.
LLAMA = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]


def covers(steps, plan):
    """The splits take every step of `in` once and none of them is empty."""
    return (plan.splits - 1) * plan.split_steps < steps <= plan.splits * plan.split_steps


@given(tokens=st.integers(1, DECODE_TOKENS), out=outs, width=widths, bits=bits, arch=archs)
def test_a_decode_plan_covers_every_row_and_step_within_the_limits(tokens, out, width, bits, arch):
    limits = LIMITS[arch]
    plan = gemm_plan(tokens, out, width, bits, 1, limits)
    assert isinstance(plan, DecodePlan)
    assert covers(-(-width // STEP), plan)
    rows = 16 * plan.warps_out
    assert (plan.row_blocks - 1) * rows < out <= plan.row_blocks * rows
    assert 1 <= plan.stays <= plan.row_blocks
    assert 8 * plan.token_tiles >= tokens
    assert plan.shared_bytes >= tokens * code_bytes(plan.form) * plan.split_steps
    assert plan.shared_bytes <= limits.shared_per_block
    assert 2 * (plan.shared_bytes + 1024) <= limits.shared_per_multiprocessor, "two blocks are resident"
    assert plan.grid <= 2 * limits.multiprocessors or plan.stays == 1, "all blocks are resident at once"


@given(tokens=st.integers(DECODE_TOKENS + 1, 70000), out=outs, width=widths, bits=bits, arch=archs)
def test_a_tiled_plan_covers_every_output_and_step_within_the_limits(tokens, out, width, bits, arch):
    limits = LIMITS[arch]
    plan = gemm_plan(tokens, out, width, bits, 1, limits)
    assert isinstance(plan, TiledPlan)
    assert covers(-(-width // STEP), plan)
    assert plan.tiles == -(-tokens // plan.tile_tokens) * -(-out // plan.tile_out)
    assert plan.grid < 2**31
    assert 2 <= plan.stages <= 4
    assert plan.shared_bytes <= limits.shared_per_block
    assert plan.blocks * (plan.shared_bytes + 1024) <= limits.shared_per_multiprocessor


def test_int4_tensor_cores_are_used_where_silicon_has_them():
    assert {arch for arch in FAST_ARCHS if form_of(4, arch) == "FORM_S4"} == {80, 86, 89}
    assert {form_of(8, arch) for arch in FAST_ARCHS} == {"FORM_A8"}


@pytest.mark.parametrize(
    ("arch", "width", "groups"), [(75, 4096, 1), (90, 4096, 32), (90, 4100, 1), (90, 2 * GREATEST_FAST_IN, 1)]
)
def test_old_chips_groups_and_odd_sizes_take_the_plain_kernel(arch, width, groups):
    assert gemm_plan(5, 64, width, 4, groups, LIMITS[arch]) == plain_plan(5, 64)
    assert isinstance(gemm_plan(500, 64, width, 8, groups, LIMITS[arch]), PlainPlan)


@pytest.mark.parametrize(("width", "out"), LLAMA)
@pytest.mark.parametrize("arch", FAST_ARCHS)
def test_decode_of_one_token_reads_at_most_five_percent_more_than_the_weights(arch, width, out):
    plan = decode_plan(1, out, width, form_of(4, arch), LIMITS[arch])
    read = out * width // 2 + plan.grid * plan.split_steps * code_bytes(plan.form)
    assert read <= 1.05 * (out * width // 2 + width // 2)
    assert plan.splits == 1, "no workspace where rows are many"


@pytest.mark.parametrize("arch", FAST_ARCHS)
def test_few_rows_are_split_along_the_inputs(arch):
    plan = decode_plan(1, 256, 14336, form_of(4, arch), LIMITS[arch])
    assert plan.grid >= LIMITS[arch].multiprocessors // 4
    assert plan.splits > 1


@pytest.mark.parametrize(("width", "out"), LLAMA)
@pytest.mark.parametrize("arch", FAST_ARCHS)
def test_a_long_prefill_takes_the_largest_tile_unsplit(arch, width, out):
    for bits in (4, 8):
        plan = tiled_plan(16384, out, width, form_of(bits, arch), LIMITS[arch])
        assert (plan.tile_tokens, plan.tile_out, plan.splits) == (128, 128, 1)
