"""Filling the K/V cache: the kernels, run by the emulator, against the definition and against float64."""

import pytest
import torch

from flatq_cli.kernels import kv_quant as module
from flatq_cli.kernels.codes import unpack_codes
from flatq_cli.kernels.compiler import compile_kernel
from flatq_cli.kernels.device import LIMITS
from flatq_cli.kernels.kv_quant import (
    dequantize_cache,
    kv_dequant,
    kv_quant_,
    launch_kv_dequant,
    launch_kv_quant,
    plan_kv_quant,
    quantize_into_cache,
)
from tests.cuda_emulator.device import EmulatedDevice, EmulatorError

ARCHS = (80, 86, 89, 90, 100, 120)
CLIP = torch.tensor([0.9, 0.8])


def empty_cache(batch, heads, capacity, head_dim, bits=4):
    """A cache whose rows are recognizable when nothing writes them."""
    return (
        torch.full((batch, heads, capacity, head_dim * bits // 8), 0xA5, dtype=torch.uint8),
        torch.full((batch, heads, capacity), -3.0),
        torch.full((batch, heads, capacity), 77, dtype=torch.uint8),
    )


def rows(batch, heads, tokens, head_dim, dtype, seed=0):
    """As transformers hands them over: `[batch, tokens, heads, head_dim]` seen transposed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)


def square(head_dim, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(head_dim, head_dim, generator=generator) * head_dim**-0.5).to(dtype)


def starts(*values):
    return torch.tensor(values, dtype=torch.int32)


def far_from_ties(cache, y):
    """Codes that differ from float64's only where y / scale is within rounding of a tie, or nowhere at all."""
    codes, scale, zero = cache
    exact = y / scale.double().unsqueeze(-1)
    code = unpack_codes(codes, module.code_bits(codes, y.shape[-1]), y.shape[-1], signed=False)
    top = 15 if codes.shape[-1] < y.shape[-1] else 255
    expected = (exact.round() + zero.double().unsqueeze(-1)).clamp(0, top)
    near_tie = ((exact - exact.floor()) - 0.5).abs() < 1e-4
    return bool(((code == expected) | near_tie).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_dim", "transformed", "bits"),
    [
        *[(64, True, 4), (80, True, 4), (96, True, 4), (128, True, 4), (256, True, 4), (64, True, 8), (192, True, 4)],
        *[(64, False, 4), (80, False, 4), (128, False, 8), (256, False, 4)],
        *[(30, True, 4), (250, False, 4), (66, True, 8)],
    ],
)
def test_cache_rows_equal_float64s_and_nothing_else_is_written(head_dim, transformed, bits, dtype):
    batch, heads, tokens, capacity = 2, 3, 13, 20
    x, matrix = rows(batch, heads, tokens, head_dim, dtype), square(head_dim, dtype) if transformed else None
    start = starts(2, 11)  # the second sequence's last 4 tokens do not fit
    cache = empty_cache(batch, heads, capacity, head_dim, bits)
    launch_kv_quant(EmulatedDevice(), x, matrix, CLIP, *cache, start)

    y = x.double() if matrix is None else x.double() @ matrix.double()
    exact = empty_cache(batch, heads, capacity, head_dim, bits)
    quantize_into_cache(x, matrix, CLIP, *exact, start)
    for b, (first, count) in enumerate([(2, 13), (11, 9)]):
        written = torch.zeros(capacity, dtype=torch.bool)
        written[first : first + count] = True
        for ours, untouched in zip(cache, empty_cache(batch, heads, capacity, head_dim, bits), strict=True):
            assert torch.equal(ours[b, :, ~written], untouched[b, :, ~written])
        torch.testing.assert_close(cache[1][b], exact[1][b], rtol=1e-3, atol=0)
        assert torch.equal(cache[2][b], exact[2][b])
        assert far_from_ties([part[b, :, written] for part in cache], y[b, :, :count])


@pytest.mark.parametrize("transformed", [True, False])
def test_many_rows_are_taken_by_few_persistent_warps(transformed):
    x, matrix = rows(1, 2, 150, 64, torch.float16), square(64, torch.float16) if transformed else None
    cache, exact = empty_cache(1, 2, 150, 64), empty_cache(1, 2, 150, 64)
    device = EmulatedDevice(arch=89, multiprocessors=1)
    if not transformed:
        plan = plan_kv_quant(300, 64, 4, x.dtype, False, device.limits)
        assert ("WARP_ROWS", 32) in plan.kernel.defines
    launch_kv_quant(device, x, matrix, CLIP, *cache, starts(0))
    quantize_into_cache(x, matrix, CLIP, *exact, starts(0))
    for ours, theirs in zip(cache, exact, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("arch", [75, 80])
def test_a_row_with_nan_or_infinity_gets_scale_nan_and_harms_no_other(arch):
    x, matrix = rows(1, 2, 9, 64, torch.float16).clone(), square(64, torch.float16)
    cache, clean = empty_cache(1, 2, 9, 64), empty_cache(1, 2, 9, 64)
    launch_kv_quant(EmulatedDevice(arch=arch), x, matrix, CLIP, *clean, starts(0))
    x[0, 0, 3, 5], x[0, 1, 7, 63] = float("nan"), float("-inf")
    launch_kv_quant(EmulatedDevice(arch=arch), x, matrix, CLIP, *cache, starts(0))
    bad = torch.zeros(1, 2, 9, dtype=torch.bool)
    bad[0, 0, 3] = bad[0, 1, 7] = True
    assert torch.equal(cache[1].isnan(), bad)
    for ours, theirs in zip(cache, clean, strict=True):
        assert torch.equal(ours[~bad], theirs[~bad])


def test_rows_of_zeros_and_of_one_sign_follow_the_contract():
    x = rows(1, 1, 3, 128, torch.bfloat16).clone()
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2] = 0, x[0, 0, 1].abs(), -x[0, 0, 2].abs()
    for matrix in (None, torch.eye(128, dtype=torch.bfloat16)):
        cache = empty_cache(1, 1, 3, 128)
        launch_kv_quant(EmulatedDevice(), x, matrix, torch.ones(2), *cache, starts(0))
        assert cache[1][0, 0, 0] == 1
        assert cache[0][0, 0, 0].eq(0).all()
        assert cache[2].tolist() == [[[0, 0, 15]]]


def test_strides_that_a_kernel_cannot_follow_are_copied_first():
    wide = rows(1, 2, 5, 136, torch.float16)
    for x in (wide[..., 3:67], wide[..., :128:2], wide.transpose(2, 3)[:, :, :64].transpose(2, 3)):
        cache, exact = empty_cache(1, 2, 5, 64), empty_cache(1, 2, 5, 64)
        launch_kv_quant(EmulatedDevice(), x, square(64, x.dtype), CLIP, *cache, starts(0))
        quantize_into_cache(x, square(64, x.dtype), CLIP, *exact, starts(0))
        torch.testing.assert_close(cache[1], exact[1])
        assert torch.equal(cache[2], exact[2])


def moved(tensor):
    """The same, contiguous, but beginning one element behind a multiple of 16 bytes."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("transformed", [True, False])
def test_views_may_begin_anywhere(transformed):
    x, matrix = rows(1, 2, 5, 64, torch.float16).contiguous(), square(64, torch.float16) if transformed else None
    plain, exact = empty_cache(1, 2, 5, 64), empty_cache(1, 2, 5, 64)
    quantize_into_cache(x, matrix, CLIP, *exact, starts(0))
    places = [(moved(x), matrix, plain), (x, matrix, [moved(part) for part in empty_cache(1, 2, 5, 64)])]
    if transformed:
        places.append((x, moved(matrix), empty_cache(1, 2, 5, 64)))
    for rows_there, matrix_there, cache in places:
        launch_kv_quant(EmulatedDevice(), rows_there, matrix_there, CLIP, *cache, starts(0))
        torch.testing.assert_close(cache[1], exact[1])
        assert torch.equal(cache[0], exact[0])
    out = torch.empty(1, 2, 5, 64, dtype=torch.float16)
    launch_kv_dequant(EmulatedDevice(), *(moved(part) for part in exact), 64, out)
    assert torch.equal(out, dequantize_cache(*exact, 64, torch.float16))


def test_starts_beyond_the_cache_write_nothing():
    for matrix in (None, square(64, torch.float16)):
        cache = empty_cache(3, 1, 4, 64)
        launch_kv_quant(EmulatedDevice(), rows(3, 1, 2, 64, torch.float16), matrix, CLIP, *cache, starts(4, -7, 3))
        assert cache[1][:2].eq(-3).all()
        assert cache[1][2, 0].eq(-3).tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("head_dim", "bits"), [(64, 4), (80, 8), (90, 4), (6, 8)])
def test_dequantizing_equals_the_definition_bit_for_bit(head_dim, bits, dtype):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (2, 1, 7, head_dim * bits // 8), generator=generator).to(torch.uint8)
    scale = torch.rand(2, 1, 7, generator=generator)
    scale[0, 0, 1] = torch.nan
    zero = torch.randint(0, 2**bits, (2, 1, 7), generator=generator).to(torch.uint8)
    out = torch.empty(2, 1, 7, head_dim, dtype=dtype)
    launch_kv_dequant(EmulatedDevice(), codes, scale, zero, head_dim, out)
    torch.testing.assert_close(
        out, dequantize_cache(codes, scale, zero, head_dim, dtype), rtol=0, atol=0, equal_nan=True
    )


def test_what_is_written_comes_back_within_half_a_step():
    x, cache = rows(2, 2, 6, 96, torch.float16), empty_cache(2, 2, 6, 96)
    kv_quant_(x, None, torch.ones(2), *cache, starts(0, 0))
    error = (kv_dequant(*cache, torch.float32) - x.float()).abs()
    assert (error <= cache[1].unsqueeze(-1) * 1.001).all()  # half a step, and half a step of the zero point
    assert error.mean() < cache[1].mean() * 0.3


@pytest.mark.parametrize("lanes", ["descending", 5])
def test_the_order_in_which_lanes_run_changes_nothing(lanes):
    x, matrix = rows(1, 2, 40, 256, torch.float16), square(256, torch.float16)
    one, other = empty_cache(1, 2, 40, 256), empty_cache(1, 2, 40, 256)
    launch_kv_quant(EmulatedDevice(multiprocessors=1), x, matrix, CLIP, *one, starts(0))
    launch_kv_quant(EmulatedDevice(multiprocessors=1, lanes=lanes), x, matrix, CLIP, *other, starts(0))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_sanitizers_find_no_fault():
    device = EmulatedDevice(sanitize=True)
    launch_kv_quant(
        device,
        rows(1, 2, 17, 80, torch.float16),
        square(80, torch.float16),
        CLIP,
        *empty_cache(1, 2, 17, 80),
        starts(3),
    )
    launch_kv_quant(device, rows(1, 2, 17, 64, torch.bfloat16), None, CLIP, *empty_cache(1, 2, 17, 64), starts(0))


def test_a_missing_barrier_is_found(tmp_path):
    text = (EmulatedDevice().folder / "kv_quant_tensor.cu").read_text()
    planted = text.replace("        cp_async_wait<0>();\n        block_sync();\n", "        cp_async_wait<0>();\n", 1)
    assert planted != text
    (tmp_path / "kv_quant_tensor.cu").write_text(planted)
    x, matrix, cache = rows(1, 1, 16, 64, torch.float16), square(64, torch.float16), empty_cache(1, 1, 16, 64)
    with pytest.raises(EmulatorError):
        launch_kv_quant(EmulatedDevice(folder=tmp_path), x, matrix, CLIP, *cache, starts(0))


@pytest.mark.parametrize("arch", ARCHS)
def test_fast_kernels_compile_without_spills(arch):
    for head_dim in (64, 80, 96, 128, 256):
        for transformed in (True, False):
            plan = plan_kv_quant(1 << 16, head_dim, 4, torch.bfloat16, transformed, LIMITS[arch])
            compiled = compile_kernel(plan.kernel, arch)
            assert plan.fast
            assert (compiled.spill_bytes, compiled.stack_bytes) == (0, 0), (head_dim, compiled.log)


@pytest.mark.parametrize("transformed", [True, False])
def test_each_byte_is_moved_once(transformed):
    device = EmulatedDevice(multiprocessors=1, races=False)
    x, matrix = rows(1, 1, 256, 128, torch.float16), square(128, torch.float16) if transformed else None
    launch_kv_quant(device, x, matrix, CLIP, *empty_cache(1, 1, 256, 128), starts(0))
    sectors = device.counters.argument_sectors
    least = 256 * (2 * 128 + 64 + 5) / 32
    shared = sum(sectors[1]) if matrix is not None else 0
    clip = sum(sectors[2 if transformed else 1])
    assert sum(map(sum, sectors)) - shared - clip <= 1.05 * least
    assert device.counters.wavefronts == device.counters.wavefronts_min
    assert device.counters.mma == (256 // 16 * 8 * 16 if transformed else 0)


def test_the_ops_pass_opcheck_and_compile():
    x, matrix, cache = rows(2, 2, 3, 64, torch.float16), square(64, torch.float16), empty_cache(2, 2, 8, 64)
    torch.library.opcheck(torch.ops.flatq.kv_quant_.default, (x, matrix, CLIP, *cache, starts(0, 5)))
    torch.library.opcheck(torch.ops.flatq.kv_dequant.default, (*cache, 64, torch.float16))
    expected = empty_cache(2, 2, 8, 64)
    kv_quant_(x, matrix, CLIP, *expected, starts(0, 5))
    fresh = empty_cache(2, 2, 8, 64)
    torch.compile(kv_quant_, backend="aot_eager", fullgraph=True)(x, matrix, CLIP, *fresh, starts(0, 5))
    assert all(torch.equal(a, b) for a, b in zip(fresh, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 2, 3, 64)}, "x must be float16 or bfloat16"),
        ({"x": torch.zeros(1, 2, 3, 63).half()}, "head_dim must be even"),
        ({"matrix": torch.zeros(64, 32).half()}, r"matrix must be torch.float16 \[64, 64\]"),
        ({"clip": torch.ones(3)}, r"clip must be float32 \[2\]"),
        ({"codes": torch.zeros(1, 2, 4, 48, dtype=torch.uint8)}, "32 .4 bits. or 64 .8 bits. bytes a row, have 48"),
        ({"scale": torch.zeros(1, 2, 5)}, "scale must be torch.float32"),
        ({"zero": torch.zeros(1, 4, 2, dtype=torch.uint8).transpose(1, 2)}, "zero must be contiguous"),
        ({"start": torch.zeros(1)}, r"start must be int32 \[1\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    codes, scale, zero = empty_cache(1, 2, 4, 64)
    inputs = {"x": torch.zeros(1, 2, 3, 64).half(), "matrix": None, "clip": torch.ones(2), "codes": codes}
    inputs |= {"scale": scale, "zero": zero, "start": starts(0)} | change
    with pytest.raises(ValueError, match=message):
        kv_quant_(**inputs)
