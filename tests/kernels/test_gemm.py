"""4-bit GEMMs: what they mean, and that every kernel, run by the emulator, computes exactly that."""

import itertools
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from flatq_cli.kernels.codes import pack_codes, packed_width, quantize_rows, unpack_codes
from flatq_cli.kernels.compiler import compile_kernel
from flatq_cli.kernels.device import LIMITS
from flatq_cli.kernels.gemm import (
    gemm_kernel,
    launch_w4_gemm,
    report_cases,
    w4_gemm_reference,
    w4a4_gemm,
    w4a8_gemm,
)
from flatq_cli.kernels.gemm_plan import TILES, decode_layout, form_of, plain_plan, tiled_layout
from flatq_cli.kernels.sass import count_instructions, find_nvdisasm
from tests.cuda_emulator.device import EmulatedDevice, EmulatorError

F16, BF16 = torch.float16, torch.bfloat16
OPS = {4: w4a4_gemm, 8: w4a8_gemm}
FORMS = [(80, 4), (90, 4), (90, 8)]  # one arch for each form: int4 mma, int4 as int8, int8 activations
SOURCES = Path(__file__).parents[2] / "kernels_cuda"


def inputs(tokens, out, width, bits, zero=False, groups=0, bias=True, seed=0):
    """Arguments of `w4_gemm_reference` up to the activation bits: random bytes are random codes."""
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.rand, generator=generator)
    codes = torch.randint(0, 256, (tokens, packed_width(width, bits)), dtype=torch.uint8, generator=generator)
    weight = torch.randint(0, 256, (out, packed_width(width, 4)), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 2**bits, (tokens,), dtype=torch.int32, generator=generator)
    scales = random(out, groups) if groups else random(out)
    weight_sum = unpack_codes(weight, 4, width, True).sum(1, dtype=torch.int32)
    biases = 100 * random(out) - 50 if bias else None
    return codes, random(tokens) / 64, zeros if zero else None, weight, scales / 64, weight_sum, biases, width, bits


def check(device, arguments, dtype=F16, plan=None, repeat=1):
    """The kernel's result is the definition's, to the rounding of float32 (none differs in the emulator)."""
    expected = w4_gemm_reference(*arguments, dtype)
    for _ in range(repeat):
        y = launch_w4_gemm(device, *arguments, dtype, plan=plan)
        torch.testing.assert_close(y, expected, rtol=2**-10 if dtype == F16 else 2**-7, atol=1e-6, equal_nan=True)
    return y


def decode(device, arguments, warps_out, splits):
    form = form_of(arguments[-1], device.limits.arch)
    tokens, out = arguments[0].shape[0], arguments[3].shape[0]
    return decode_layout(tokens, out, arguments[-2], form, warps_out, splits, device.limits)


def tiled(device, arguments, tile, splits):
    form = form_of(arguments[-1], device.limits.arch)
    tokens, out = arguments[0].shape[0], arguments[3].shape[0]
    return tiled_layout(tokens, out, arguments[-2], form, tile, splits, device.limits)


# ---- What the ops mean. ----


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [0, 3])
def test_a_gemm_of_codes_is_the_matmul_of_what_they_stand_for(bits, symmetric, groups):
    torch.manual_seed(0)
    x, bias = torch.randn(2, 5, 66), torch.randn(7)
    codes, scale, zero = quantize_rows(x, torch.ones(2), bits, symmetric)
    weight_codes, weight_scale = torch.randint(-8, 8, (7, 66)), torch.rand(7, groups or 1)
    y = OPS[bits](
        (pack_codes(codes, bits), scale, None if symmetric else zero),
        pack_codes(weight_codes, 4),
        weight_scale if groups else weight_scale[:, 0],
        in_features=66,
        weight_sum=weight_codes.sum(1).int(),
        bias=bias,
        dtype=F16,
    )
    a = (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1).double()
    w = weight_codes * weight_scale.repeat_interleave(66 // weight_scale.shape[1], dim=1).double()
    assert y.shape == (2, 5, 7)
    torch.testing.assert_close(y.double(), a @ w.T + bias, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_ops_pass_torchs_own_checks_and_compile(bits):
    a = inputs(3, 6, 32, bits, zero=True)
    arguments = (*a[:-1], F16)
    torch.library.opcheck(getattr(torch.ops.flatq, f"w4a{bits}_gemm"), arguments)
    call = partial(OPS[bits], a[:3], *a[3:5], in_features=32, weight_sum=a[5], bias=a[6], dtype=F16)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(), call())


def test_no_tokens_or_no_rows_make_an_empty_result():
    for tokens, out in ((0, 5), (4, 0)):
        a = inputs(tokens, out, 64, 4)
        assert w4a4_gemm(a[:3], *a[3:5], in_features=64, dtype=BF16).shape == (tokens, out)
        assert launch_w4_gemm(EmulatedDevice(arch=90), *a, BF16).shape == (tokens, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 66}, r"codes must be torch.uint8 \[3, 33\], not torch.uint8 \[3, 32\] \(in_features = 66\)"),
        ({"in_features": 0}, "in_features must be 1 to 1048576, not 0"),
        ({"dtype": torch.float32}, "dtype must be torch.float16 or torch.bfloat16, not torch.float32"),
        ({"bias": torch.zeros(5, dtype=F16)}, r"bias must be torch.float32 \[5\], not torch.float16 \[5\]"),
        ({"weight_scale": torch.zeros(5, 7)}, "7 groups of weight_scale do not divide in_features = 64"),
        ({"weight_scale": torch.zeros(4)}, r"weight_scale must be torch.float32 \[5\], not torch.float32 \[4\]"),
        ({"weight_sum": None}, "codes with a zero point need weight_sum"),
        ({"bias": torch.zeros(5, device="meta")}, "bias is on meta but codes on cpu"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    codes, scale, zero, weight, weight_scale, weight_sum, bias, width, _ = inputs(3, 5, 64, 4, zero=True)
    arguments = {
        "weight_scale": weight_scale,
        "in_features": width,
        "weight_sum": weight_sum,
        "bias": bias,
        "dtype": F16,
    }
    with pytest.raises(ValueError, match=message):
        w4a4_gemm((codes, scale, zero), weight, **{**arguments, **change})


# ---- Every kernel computes it. ----


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("arch", "bits"), FORMS)
@pytest.mark.parametrize(
    ("tile", "shape"),
    list(zip((t[:2] for t in TILES), [(130, 140, 416), (65, 264, 32), (64, 67, 128), (17, 128, 1056)], strict=True)),
)
def test_tiles_are_exact_with_ragged_edges_and_with_splits(tile, shape, arch, bits, zero):
    device, a = EmulatedDevice(arch=arch), inputs(*shape, bits, zero)
    for splits in (1, 3):
        check(device, a, BF16 if zero else F16, tiled(device, a, tile, splits))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("arch", "bits"), FORMS)
@pytest.mark.parametrize(
    ("warps_out", "shape"),
    [(1, (1, 48, 2080)), (1, (16, 33, 4384)), (2, (5, 70, 1056)), (4, (11, 130, 160)), (8, (16, 258, 576))],
)
def test_decode_is_exact_with_ragged_edges_and_with_splits(warps_out, shape, arch, bits, zero):
    device, a = EmulatedDevice(arch=arch), inputs(*shape, bits, zero, bias=zero)
    for splits in (1, 2, 5):
        check(device, a, BF16 if zero else F16, decode(device, a, warps_out, splits))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_plain_kernel_is_exact_at_any_size_and_with_groups(bits, zero):
    device = EmulatedDevice(arch=70)
    for shape, groups in (((1, 3, 1), 0), ((9, 5, 77), 0), ((8, 2, 66), 0), ((9, 4, 75), 5), ((3, 4, 64), 2)):
        check(device, inputs(*shape, bits, zero, groups, bias=not groups), plan=plain_plan(*shape[:2]))


@pytest.mark.parametrize(("arch", "bits"), FORMS)
@pytest.mark.parametrize("tokens", [1, 9, 16, 17, 40])
def test_the_plan_that_is_found_is_exact(arch, bits, tokens):
    check(EmulatedDevice(arch=arch, multiprocessors=8), inputs(tokens, 96, 1184, bits))


@pytest.mark.parametrize(("arch", "bits"), FORMS)
def test_the_greatest_codes_do_not_overflow_at_the_greatest_width(arch, bits):
    device, width = EmulatedDevice(arch=arch), 65536
    for tokens, zero in itertools.product((1, 17), (None, 0)):
        byte = (0x88 if bits == 4 else 0x80) if zero is None else 0xFF
        scale, weight_scale = torch.full((tokens,), 2.0**-15), torch.full((16,), 2.0**-8)
        codes = torch.full((tokens, packed_width(width, bits)), byte, dtype=torch.uint8)
        weight = torch.full((16, width // 2), 0x88, dtype=torch.uint8)
        zeros = None if zero is None else torch.full((tokens,), zero, dtype=torch.int32)
        weight_sum = torch.full((16,), -8 * width, dtype=torch.int32)
        a = (codes, scale, zeros, weight, weight_scale, weight_sum, None, width, bits)
        y = check(device, a)
        code = {(4, None): -8, (8, None): -128, (4, 0): 15, (8, 0): 255}[bits, zero]
        assert y.float().unique().tolist() == [torch.tensor(code * -8 * width * 2.0**-23).half().item()]


@pytest.mark.parametrize("tokens", [7, 33])
def test_a_row_that_is_not_a_number_harms_no_other(tokens):
    device, a = EmulatedDevice(arch=90), inputs(tokens, 40, 160, 4)
    a[1][3] = torch.nan
    y = check(device, a)
    assert y[3].isnan().all()
    assert y.isnan().sum() == 40


def test_tensors_that_are_views_are_taken_as_they_are():
    a = inputs(4, 32, 64, 4)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), a[3].flatten()])[1:].view(32, 32)
    wide = torch.cat([a[0], a[0]], dim=1)[:, :32]
    check(EmulatedDevice(arch=90), (wide, *a[1:3], shifted, *a[4:]))


def test_leading_sizes_are_kept():
    a = inputs(6, 24, 64, 4)
    y = launch_w4_gemm(EmulatedDevice(arch=90), a[0].view(2, 3, 32), a[1].view(2, 3), *a[2:], F16)
    torch.testing.assert_close(y.view(6, 24), w4_gemm_reference(*a, F16))


# ---- Faults are found, and what is counted. ----

SMALL = [(4, 40, 160), (20, 70, 416)]  # decode, tiled


@pytest.mark.parametrize(("arch", "bits"), FORMS)
def test_the_order_of_threads_and_blocks_changes_nothing(arch, bits):
    a = inputs(5, 40, 1184, bits, zero=True)
    b = inputs(40, 70, 416, bits, zero=True)
    for lanes in ("descending", 1):
        device = EmulatedDevice(arch=arch, lanes=lanes)
        check(device, a, plan=decode(device, a, 2, 2))
        check(device, b, plan=tiled(device, b, (32, 64), 2))


@pytest.mark.parametrize("shape", SMALL)
def test_sanitizers_find_nothing(shape):
    device, a = EmulatedDevice(arch=90, sanitize=True), inputs(*shape, 8, zero=True)
    check(device, a, plan=decode(device, a, 2, 2) if shape[0] <= 16 else tiled(device, a, (32, 64), 2))
    odd = inputs(3, 5, 33, 4)
    check(device, odd)


def planted(folder, name, pattern, replacement):
    """A copy of a source with a fault at the one place that `pattern` matches."""
    text, count = re.subn(pattern, replacement, (SOURCES / name).read_text(encoding="utf-8"))
    assert count == 1
    (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "pattern", "replacement"),
    [
        ("w4_gemm_decode.cu", r"block_sync\(\);  // the place is free.*", ""),
        ("w4_gemm_decode.cu", r"cp_async_wait<0>\(\);\s*block_sync\(\);", "cp_async_wait<0>();"),
        ("w4_gemm_tiled.cu", r"block_sync\(\);  // this step has come.*", ""),
        ("w4_gemm_tiled.cu", r"cp_async_wait<STAGES - 2>\(\);", "cp_async_wait<STAGES - 1>();"),
    ],
)
def test_a_missing_barrier_or_wait_is_found(tmp_path, name, pattern, replacement):
    device = EmulatedDevice(arch=90, folder=planted(tmp_path, name, pattern, replacement))
    a = inputs(*((5, 200, 1184) if "decode" in name else (40, 70, 800)), 4)
    plan = decode(device, a, 2, 1) if "decode" in name else tiled(device, a, (32, 64), 1)
    with pytest.raises((EmulatorError, AssertionError)):
        check(device, a, plan=plan)


def test_a_read_past_the_end_is_found(tmp_path):
    folder = planted(tmp_path, "w4_gemm_decode.cu", r"inside && rows > 1 \?", "inside ?")
    device, a = EmulatedDevice(arch=90, folder=folder), inputs(1, 33, 160, 4)
    with pytest.raises(EmulatorError):
        check(device, a)


@pytest.mark.parametrize(("arch", "bits"), FORMS)
def test_shared_memory_is_free_of_conflicts(arch, bits):
    device = EmulatedDevice(arch=arch)
    for tokens in (1, 2, 5, 8, 11, 16):
        a = inputs(tokens, 80, 1184, bits, zero=True)
        for warps_out in (1, 4):
            check(device, a, plan=decode(device, a, warps_out, 2))
    for tile in (t[:2] for t in TILES):
        a = inputs(70, 130, 288, bits)
        check(device, a, plan=tiled(device, a, tile, 2))
    assert device.counters.wavefronts == device.counters.wavefronts_min


@pytest.mark.parametrize(("arch", "bits"), FORMS)
def test_decode_reads_each_byte_of_weights_once_and_no_mma_is_wasted(arch, bits):
    for tokens in (1, 16):
        device, a = EmulatedDevice(arch=arch), inputs(tokens, 160, 2048, bits, zero=True)
        plan = decode(device, a, 2, 2)
        check(device, a, plan=plan)
        counters = device.counters
        weight, codes, y = (counters.argument_sectors[i] for i in (3, 0, 7))
        assert weight == (160 * 1024 // 32, 0)
        assert codes[0] == plan.stays * tokens * a[0].shape[1] // 32, "every block reads the codes once"
        assert y[1] == tokens * 160 * 2 // 32
        depth = 64 if plan.form == "FORM_S4" else 32
        assert counters.mma == 160 // 16 * -(-tokens // 8) * 2048 // depth


@pytest.mark.parametrize(("arch", "bits"), FORMS)
def test_tiles_store_whole_sectors_and_waste_no_mma(arch, bits):
    device, a = EmulatedDevice(arch=arch), inputs(128, 128, 512, bits, zero=True)
    plan = tiled(device, a, (128, 128), 1)
    check(device, a, plan=plan)
    sectors = device.counters.argument_sectors
    assert sectors[7] == (0, 128 * 128 * 2 // 32)
    assert sectors[3] == (128 * 256 // 32, 0)
    assert sectors[0] == (a[0].numel() // 32, 0)
    depth = 64 if plan.form == "FORM_S4" else 32
    assert device.counters.mma == 128 // 16 * 128 // 8 * 512 // depth


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_the_kernels_that_need_most_registers_compile_without_spills(arch):
    limits, device = LIMITS[arch], EmulatedDevice(arch=arch)
    for bits, zero in ((4, False), (4, True), (8, True)):
        form = form_of(bits, arch)
        plans = [
            tiled_layout(4096, 4096, 4096, form, (128, 128), 1, limits),
            tiled_layout(64, 4096, 4096, form, (64, 64), 1, limits),
            decode_layout(16, 4096, 4096, form, 1, 1, limits),
        ]
        for plan in plans:
            compiled = compile_kernel(gemm_kernel(plan, bits, zero, False, F16), device.limits.arch)
            assert (compiled.spill_bytes, compiled.stack_bytes) == (0, 0), plan


@pytest.mark.skipif(find_nvdisasm() is None, reason="nvdisasm is not installed")
@pytest.mark.parametrize("arch", [80, 90])
def test_no_mma_is_copied_into_the_sides_of_a_branch(arch):
    # All lanes must meet at the same one, and which codes a lane loads depends on its token.
    plan = decode_layout(1, 4096, 4096, form_of(4, arch), 1, 1, LIMITS[arch])
    kernel = gemm_kernel(plan, 4, False, False, F16)
    found = count_instructions(compile_kernel(kernel, arch).cubin, kernel.entry)
    steps, parts = 4, 2 if arch == 80 else 4
    assert found.imma == steps * parts


def test_report_cases_run_and_read_little_more_than_the_weights():
    for case in report_cases(LIMITS[90]):
        if case.n1 > 2000 or case.tokens > 1:
            continue
        device = EmulatedDevice(arch=90, multiprocessors=LIMITS[90].multiprocessors)
        case.run(device)
        counters = device.counters
        assert (counters.sectors_read + counters.sectors_written) / case.tokens <= 1.1 * case.least.sectors
        assert counters.mma / case.tokens <= 1.35 * case.least.mma


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_a_gpu_computes_what_the_definition_says_also_in_a_graph(bits):
    for tokens, out, width in ((1, 4096, 4096), (7, 960, 576), (16, 256, 14336), (200, 1000, 1056), (5, 30, 77)):
        a = inputs(tokens, out, width, bits, zero=True)
        expected = w4_gemm_reference(*a, F16)
        b = [t.cuda() if isinstance(t, torch.Tensor) else t for t in a]
        call = partial(OPS[bits], b[:3], *b[3:5], in_features=width, weight_sum=b[5], bias=b[6], dtype=F16)
        torch.testing.assert_close(call().cpu(), expected, rtol=2**-9, atol=1e-3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        for _ in range(3):
            y.zero_()
            graph.replay()
            torch.testing.assert_close(y.cpu(), expected, rtol=2**-9, atol=1e-3)
