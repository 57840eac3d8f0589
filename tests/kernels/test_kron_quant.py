"""The definition of kron_quant, its operator, how matrices are prepared, and how launches are planned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatq_cli.kernels.codes import packed_width, unpack_codes
from flatq_cli.kernels.device import LIMITS
from flatq_cli.kernels.kron_plan import KronSize, kron_plan, kron_plans
from flatq_cli.kernels.kron_quant import (
    column_order,
    fragments_of_left,
    fragments_of_right,
    kron_quant,
    kron_quant_reference,
    prepare_kron,
    report_cases,
)
from flatq_cli.quantization.packing import pack_int4
from flatq_cli.quantization.quantizers import quantize
from flatq_cli.transforms.kronecker import kronecker_matmul

CLIP = torch.tensor([0.9, 0.8])


def normal(*shape, seed=0, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def matrices(n1, n2, left=True, right=True, dtype=torch.float16):
    return prepare_kron(
        normal(n1, n1, seed=1) / n1**0.5 if left else None, normal(n2, n2, seed=2) / n2**0.5 if right else None,
        dtype, n1 * n2,
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    n1=st.integers(1, 40), n2=st.integers(1, 40), left=st.booleans(), bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
)  # fmt: skip
def test_the_definition_is_the_transform_and_the_quantizer_of_the_package(n1, n2, left, bits, symmetric):
    kron = matrices(n1, n2, left=left)
    x = normal(3, n1 * n2).double()
    found = kron_quant_reference(x, kron, CLIP, bits=bits, symmetric=symmetric)
    rows = kronecker_matmul(x, kron.left.double() if left else None, kron.right.double())
    expected = quantize(rows, bits, symmetric, CLIP.double())
    codes = unpack_codes(found.codes, bits, n1 * n2, signed=symmetric)
    # The order of the two products differs, by float64's rounding: a code may differ at a tie only.
    assert ((codes - expected.codes).abs() <= 1).all()
    assert (codes != expected.codes).sum() <= ((rows / expected.scale % 1 - 0.5).abs() < 1e-9).sum()
    torch.testing.assert_close(found.scale, expected.scale.squeeze(-1), rtol=1e-12, atol=0)
    if not symmetric:
        assert torch.equal(found.zero, expected.zero.squeeze(-1).int())


def test_codes_are_packed_as_the_package_packs_them():
    kron, x = matrices(5, 6), normal(4, 30)
    packed = kron_quant(x, kron, CLIP).codes
    assert torch.equal(packed, pack_int4(unpack_codes(packed, 4, 30, signed=True).to(torch.int8)).view(torch.uint8))


def test_norm_and_gate_are_rounded_once():
    kron, x, weight, gate = matrices(8, 16), normal(5, 128), normal(128, seed=3), normal(5, 128, seed=4)
    wide = x.double()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()).half()
    gated = (gate.double() * gate.double().sigmoid() * wide).half()
    for found, changed in (
        (kron_quant(x, kron, CLIP, norm_weight=weight), normed),
        (kron_quant(x, kron, CLIP, gate=gate), gated),
    ):
        expected = kron_quant(changed, kron, CLIP)
        # float32 against float64 before the one rounding: a unit in the last place here and there.
        assert (unpack_codes(found.codes, 4, 128, True) != unpack_codes(expected.codes, 4, 128, True)).sum() <= 1
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("n1", [1, 5, 16, 24, 37])
def test_fragments_of_left_are_the_ptx_isas_a_operands(n1):
    left = normal(n1, n1)
    fragments = fragments_of_left(left)
    size = -(-n1 // 16) * 16
    transposed = torch.zeros(size, size, dtype=left.dtype)
    transposed[:n1, :n1] = left.mT
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register in range(4):
            row, column = g + 8 * (register % 2), 2 * t + 8 * (register // 2)
            for element in range(2):
                expected = transposed[row::16, column + element :: 16]
                assert torch.equal(fragments[:, :, lane, 2 * register + element], expected)


@pytest.mark.parametrize("n2", [1, 7, 24, 48, 53, 64, 148])
def test_fragments_of_right_are_the_ptx_isas_b_operands_in_column_order(n2):
    right = normal(n2, n2)
    fragments = fragments_of_right(right)
    order = column_order(n2)
    size = -(-n2 // 16) * 16
    permuted = torch.zeros(size, size, dtype=right.dtype)
    for place, column in enumerate(order):
        if column < n2:
            permuted[:n2, place] = right[:, column]
    for lane in range(32):
        g, t = divmod(lane, 4)
        for tile in range(2):
            for register in range(2):
                for element in range(2):
                    expected = permuted[2 * t + 8 * register + element :: 16, 8 * tile + g :: 16]
                    assert torch.equal(fragments[:, :, lane, 4 * tile + 2 * register + element], expected)


@given(n2=st.integers(1, 256))
def test_column_order_is_a_permutation_in_which_a_lanes_codes_are_neighbours(n2):
    order = column_order(n2)
    tiles = len(order) // 8
    assert sorted(order) == list(range(8 * -(-n2 // 8)))
    run = 8 if n2 % 64 == 0 else 4
    for first in range(0, tiles // run * run, run):
        for t in range(4):
            held = [order[8 * (first + tile) + 2 * t + e] for tile in range(run) for e in range(2)]
            assert held == list(range(held[0], held[0] + 2 * run))


def test_a_row_with_a_nan_or_an_infinity_has_scale_nan_and_spoils_no_other():
    kron, x = matrices(6, 8), normal(5, 48)
    clean = kron_quant(x, kron, CLIP)
    x[1, 7], x[3, 40] = torch.nan, torch.inf
    found = kron_quant(x, kron, CLIP)
    assert found.scale.isnan().tolist() == [False, True, False, True, False]
    assert torch.equal(found.codes[::2], clean.codes[::2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": normal(2, 47)}, "rows of 6 · 8 = 48"),
        ({"x": normal(2, 48).float()}, "float16 or bfloat16"),
        ({"x": normal(2, 48).bfloat16()}, "prepared for torch.float16"),
        ({"bits": 3}, "bits must be 4 or 8"),
        ({"clip": torch.ones(2, dtype=torch.float64)}, r"clip must be float32 \[2\]"),
        ({"clip": torch.ones(1)}, r"clip must be float32 \[2\]"),
        ({"norm_weight": normal(48), "gate": normal(2, 48)}, "exclude each other"),
        ({"norm_weight": normal(47)}, "norm_weight must be"),
        ({"gate": normal(3, 48)}, "gate must be like x"),
        ({"x": normal(2, 48).to("meta")}, "move it there first"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(change, message):
    arguments = {"x": normal(2, 48), "clip": CLIP} | change
    with pytest.raises(ValueError, match=message) as error:
        kron_quant(arguments.pop("x"), matrices(6, 8), arguments.pop("clip"), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("left", "right", "width", "message"),
    [
        (None, None, 6, "at least one"),
        (torch.ones(2, 3), None, 6, "square"),
        (torch.ones(2, 2), torch.ones(4, 4), 6, "do not make a width of 6"),
        (None, torch.ones(4, 4), 6, "do not make a width of 6"),
        (None, torch.ones(2, 2), 1024, "goes up to 256"),
    ],
)
def test_factors_that_make_no_transform_are_refused(left, right, width, message):
    with pytest.raises(ValueError, match=message):
        prepare_kron(left, right, torch.float16, width)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_operator_keeps_torchs_rules(symmetric):
    kron = matrices(4, 6)
    arguments = (
        normal(2, 3, 24), kron.left, kron.right, kron.prepared_left, kron.prepared_right, CLIP, [4, 6], 4, symmetric,
        None, 1e-6, normal(2, 3, 24, seed=5),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.flatq.kron_quant, arguments)


def test_compiled_without_a_graph_break_it_gives_the_same():
    kron, x, weight = matrices(4, 6), normal(2, 3, 24), normal(24, seed=3)

    def run(x):
        return kron_quant(x, kron, CLIP, symmetric=False, norm_weight=weight)

    for backend in ("eager", "aot_eager"):
        for found, expected in zip(torch.compile(run, fullgraph=True, backend=backend)(x), run(x), strict=True):
            assert torch.equal(found, expected)


def test_leading_axes_stay_and_may_be_empty():
    kron = matrices(4, 5)
    found = kron_quant(normal(2, 0, 3, 20), kron, CLIP, symmetric=False)
    assert (found.codes.shape, found.scale.shape, found.zero.shape) == ((2, 0, 3, 10), (2, 0, 3), (2, 0, 3))
    assert kron_quant(normal(20), kron, CLIP).codes.shape == (10,)


@settings(max_examples=100, deadline=None)
@given(
    n1=st.integers(1, 256), n2=st.integers(1, 256), arch=st.sampled_from(sorted(LIMITS)),
    tokens=st.sampled_from([1, 16, 17, 10**6]), prologue=st.sampled_from(["none", "norm", "gate"]),
)  # fmt: skip
def test_every_size_has_a_plan_within_the_devices_limits(n1, n2, arch, tokens, prologue):
    limits = LIMITS[arch]
    for plan in kron_plans(KronSize(n1, n2, prologue=prologue), limits, tokens):
        assert plan.shared_bytes <= limits.shared_per_block
        assert plan.block <= 512
        assert plan.block % 32 == 0
        assert 1 <= plan.grid(tokens) <= -(-tokens // plan.tokens_per_block)
    assert kron_plan(KronSize(n1, n2), limits, tokens).fast == (arch >= 80)


def test_few_tokens_are_spread_over_as_many_blocks():
    assert kron_plan(KronSize(64, 64), LIMITS[90], 16).grid(16) == 16


@pytest.mark.parametrize("arch", sorted(LIMITS))
def test_the_reports_cases_have_names_of_their_own_and_a_floor(arch):
    cases = report_cases(LIMITS[arch])
    assert len({(case.name, case.n1, case.n2) for case in cases}) == len(cases)
    case = next(case for case in cases if (case.n1, case.n2) == (64, 64))
    assert case.least.sectors == (64 * 64 * 2 + packed_width(64 * 64, 4) + 4) / 32
    assert case.least.mma == (256 if arch >= 80 else 0)
