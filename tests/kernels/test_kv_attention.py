"""Decode attention over the packed cache: the kernels, run by the emulator, against exact attention in float64."""

import math

import pytest
import torch

from flatq_cli.kernels.compiler import compile_kernel
from flatq_cli.kernels.device import LIMITS
from flatq_cli.kernels.kv_attention import (
    attend_cache,
    kv_attention,
    launch_kv_attention,
    plan_kv_attention,
    visible_keys,
)
from flatq_cli.kernels.kv_quant import kv_dequant, kv_quant_
from tests.cuda_emulator.device import EmulatedDevice, EmulatorError

ARCHS = (80, 86, 89, 90, 100, 120)
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 5e-3}  # of a row's norm: the weights' and the output's rounding


def random_cache(batch, heads, capacity, head_dim, bits=4, seed=0):
    """Codes, scales over four powers of two and zero points, all without structure."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (batch, heads, capacity, head_dim * bits // 8), generator=generator).to(torch.uint8)
    scale = 0.1 * 2 ** (4 * torch.rand(batch, heads, capacity, generator=generator) - 2)
    zero = torch.randint(0, 2**bits, (batch, heads, capacity), generator=generator).to(torch.uint8)
    return codes, scale, zero


def random_query(batch, heads, q_len, head_dim, dtype, seed=9):
    return torch.randn(batch, heads, q_len, head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def spoil_unseen(parts, lengths, first, window, q_len, mask):
    """NaN scales in every row that no query sees: what a cache holds there must not matter."""
    seen = visible_keys(lengths, first, window, q_len, parts[0].shape[2], mask).any(1)
    codes, scale, zero = parts
    return codes, scale.masked_fill(~seen.unsqueeze(1), math.nan), zero


def random_mask(batch, q_len, keys, seed=5):
    """Holes everywhere, and whole steps of the kernel that nobody sees."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, q_len, keys, generator=generator) < 0.6
    mask[:, :, 40:110] = False
    return mask


def check(device, query, k, v, lengths, first=None, window=0, mask=None):
    scale = query.shape[-1] ** -0.5
    k, v = (spoil_unseen(part, lengths, first, window, query.shape[2], mask) for part in (k, v))
    ours = launch_kv_attention(device, query, k, v, lengths, scale, first, window, mask).double()
    exact = attend_cache(query, k, v, lengths, scale, first, window, torch.float64, mask)
    error, norm = (ours - exact).norm(dim=-1), exact.norm(dim=-1)
    assert ours.isfinite().all()
    assert (error <= TOLERANCE[query.dtype] * norm).all(), (error / norm).max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_dim", "group", "q_len", "window"),
    [
        *[
            (64, 1, 1, 0),
            (80, 3, 5, 40),
            (96, 4, 1, 0),
            (128, 4, 16, 0),
            (128, 7, 1, 33),
            (256, 1, 5, 0),
            (256, 4, 16, 0),
        ],
        *[(16, 7, 5, 0), (192, 3, 1, 100)],
    ],
)
def test_attention_is_exact_to_its_roundings(head_dim, group, q_len, window, dtype):
    """A full sequence, one key, none, fewer keys than queries, and left padding, in spans that blocks merge."""
    capacity, lengths, first = 204, ints(204, 1, 0, 3, 150), ints(0, 0, 0, 0, 37)
    query = random_query(5, 2 * group, q_len, head_dim, dtype)
    k, v = random_cache(5, 2, capacity, head_dim, seed=1), random_cache(5, 2, capacity, head_dim, seed=2)
    check(EmulatedDevice(multiprocessors=40), query, k, v, lengths, first, window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_dim", "group", "q_len", "window"),
    [(64, 1, 1, 0), (64, 7, 1, 0), (80, 3, 5, 90), (128, 4, 1, 0), (128, 4, 16, 0), (256, 4, 3, 0)],
)
def test_any_mask_hides_what_it_hides(head_dim, group, q_len, window, dtype):
    """Of a cache with more rows than the mask has keys, in spans that blocks merge."""
    lengths, first = ints(204, 1, 0, 3, 150), ints(0, 0, 0, 0, 37)
    query = random_query(5, 2 * group, q_len, head_dim, dtype)
    k, v = random_cache(5, 2, 208, head_dim, seed=1), random_cache(5, 2, 208, head_dim, seed=2)
    device = EmulatedDevice(multiprocessors=40)
    check(device, query, k, v, lengths, first, window, random_mask(5, q_len, 204))
    check(
        device, query, k, v, ints(204, 190, 204, 204, 150), None, window, random_mask(1, q_len, 190).expand(5, -1, -1)
    )


def test_a_mask_may_have_any_strides():
    query = random_query(2, 4, 3, 64, torch.float16)
    k, v = random_cache(2, 2, 64, 64, seed=1), random_cache(2, 2, 64, 64, seed=2)
    mask = random_mask(2, 3, 130)
    for view in (mask[:, :, 7:60], mask.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 1:40]):
        assert not view.is_contiguous()
        check(EmulatedDevice(), query, k, v, ints(60, 33), mask=view)


@pytest.mark.parametrize("arch", [80, 89])
def test_many_spans_merge_to_one_result(arch):
    device = EmulatedDevice(arch=arch, multiprocessors=24)
    plan = plan_kv_attention(1, 1, 4, 64, 2500, 4, torch.float16, device.limits)
    assert plan.splits >= 5
    k, v = random_cache(1, 1, 2500, 64, seed=1), random_cache(1, 1, 2500, 64, seed=2)
    for length in (2500, 2049, 300):
        check(device, random_query(1, 4, 1, 64, torch.float16), k, v, ints(length), ints(length // 3))


def test_rows_beyond_one_blocks_tiles_are_attended_in_groups():
    query = random_query(1, 20, 16, 64, torch.float16)
    plan = plan_kv_attention(1, 1, 320, 64, 64, 4, torch.float16, LIMITS[80])
    assert plan.row_groups == 3
    check(EmulatedDevice(), query, random_cache(1, 1, 64, 64), random_cache(1, 1, 64, 64, seed=1), ints(50))


@pytest.mark.parametrize("capacity", [33, 34, 64])
def test_odd_capacities_and_lengths_at_the_edge(capacity):
    for head_dim in (64, 80):
        k, v = random_cache(2, 2, capacity, head_dim), random_cache(2, 2, capacity, head_dim, seed=1)
        check(EmulatedDevice(), random_query(2, 4, 2, head_dim, torch.float16), k, v, ints(capacity, capacity - 1))


def test_a_cache_may_begin_anywhere():
    def moved(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    k, v = random_cache(1, 2, 40, 64), random_cache(1, 2, 40, 64, seed=1)
    query = random_query(1, 4, 2, 64, torch.float16)
    for part in (0, 2):  # codes, zero points
        there = tuple(moved(tensor) if i == part else tensor for i, tensor in enumerate(v))
        check(EmulatedDevice(), moved(query), k, there, ints(39))


@pytest.mark.parametrize(("arch", "head_dim", "bits"), [(75, 64, 4), (80, 90, 4), (80, 64, 8), (80, 250, 8)])
def test_the_plain_kernel_takes_what_the_fast_one_does_not(arch, head_dim, bits):
    device = EmulatedDevice(arch=arch)
    assert not plan_kv_attention(2, 2, 6, head_dim, 41, bits, torch.float16, device.limits).fast
    k, v = random_cache(3, 2, 41, head_dim, bits), random_cache(3, 2, 41, head_dim, bits, seed=1)
    query = random_query(3, 6, 2, head_dim, torch.float16)
    check(device, query, k, v, ints(41, 0, 20), ints(3, 0, 0), 9)
    check(device, query, k, v, ints(41, 0, 20), mask=random_mask(3, 2, 39))


def test_weights_neither_overflow_nor_vanish_when_value_scales_differ_wildly():
    k, v = random_cache(1, 1, 96, 64), random_cache(1, 1, 96, 64, seed=1)
    query = random_query(1, 1, 1, 64, torch.bfloat16)
    for factor in (1e-27, 1e-9, 1.0, 1e9, 1e30):
        check(EmulatedDevice(), query, k, (v[0], v[1] * factor, v[2]), ints(96))
    spread = v[1] * 10 ** torch.linspace(-12, 12, 96)
    check(EmulatedDevice(), query, k, (v[0], spread, v[2]), ints(96))


def test_a_nan_key_spoils_the_queries_that_see_it_and_no_other():
    k, v = random_cache(2, 1, 40, 64), random_cache(2, 1, 40, 64, seed=1)
    v[1][0, 0, 38] = math.nan  # the last query but one of sequence 0 stands there
    ours = launch_kv_attention(EmulatedDevice(), random_query(2, 1, 3, 64, torch.float16), k, v, ints(40, 40), 0.1)
    assert ours.isnan().any(-1).tolist() == [[[False, True, True]], [[False, False, False]]]


@pytest.mark.parametrize("lanes", ["descending", 3])
def test_the_order_in_which_blocks_and_lanes_run_changes_nothing(lanes):
    k, v = random_cache(1, 2, 1100, 64), random_cache(1, 2, 1100, 64, seed=1)
    query = random_query(1, 2, 16, 64, torch.float16)
    one, other = (
        launch_kv_attention(EmulatedDevice(multiprocessors=8, lanes=order), query, k, v, ints(1100), 0.125)
        for order in ("ascending", lanes)
    )
    assert torch.equal(one, other)


def test_sanitizers_find_no_fault():
    k, v = random_cache(2, 1, 638, 80), random_cache(2, 1, 638, 80, seed=1)
    device = EmulatedDevice(sanitize=True)
    for query in (random_query(2, 2, 1, 80, torch.float16), random_query(2, 5, 4, 80, torch.bfloat16)):
        launch_kv_attention(device, query, k, v, ints(638, 45), 0.1)
        mask = random_mask(2, query.shape[2], 630)
        launch_kv_attention(device, query, k, v, ints(638, 45), 0.1, mask=mask)


@pytest.mark.parametrize("barrier", ["            warp_sync();\n", "    block_sync();  // from here on"])
def test_a_missing_barrier_is_found(barrier, tmp_path):
    text = (EmulatedDevice().folder / "kv_attention.cu").read_text()
    planted = text.replace(barrier, barrier.replace("warp_sync();", ";").replace("block_sync();", ""))
    assert planted != text
    (tmp_path / "kv_attention.cu").write_text(planted)
    query, length = random_query(1, 1, 1, 64, torch.float16), ints(400)
    k, v = random_cache(1, 1, 400, 64), random_cache(1, 1, 400, 64, seed=1)
    device = EmulatedDevice(multiprocessors=1, lanes="descending", folder=tmp_path)
    with pytest.raises((EmulatorError, AssertionError)):
        check(device, query, k, v, length)


@pytest.mark.parametrize("arch", ARCHS)
def test_fast_kernels_compile_without_spills(arch):
    for head_dim, rows, dtype in (
        (64, 4, torch.float16),
        (64, 20, torch.bfloat16),
        (80, 4, torch.float16),
        (96, 4, torch.bfloat16),
        (128, 4, torch.float16),
        (128, 4, torch.bfloat16),
        (128, 64, torch.float16),
        (256, 4, torch.float16),
        (256, 64, torch.bfloat16),
    ):
        for masked in (False, True):
            plan = plan_kv_attention(1, 8, rows, head_dim, 4096, 4, dtype, LIMITS[arch], masked=masked)
            compiled = compile_kernel(plan.kernel, arch)
            assert plan.fast
            assert (compiled.spill_bytes, compiled.stack_bytes) == (0, 0), (head_dim, rows, dtype, masked, compiled.log)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_cache_is_read_once_without_bank_conflicts(head_dim):
    keys, rows = 1024, 28  # two tiles of 16, padded
    device = EmulatedDevice(multiprocessors=1, races=False)
    k, v = random_cache(1, 1, keys, head_dim), random_cache(1, 1, keys, head_dim, seed=1)
    query = random_query(1, 7, 4, head_dim, torch.float16)
    launch_kv_attention(device, query, k, v, ints(keys), 0.1)
    read = device.counters.sectors_read - device.counters.argument_sectors[0][0]
    assert read <= 1.05 * keys * (head_dim + 10) / 32 + rows * head_dim * 2 / 32
    assert device.counters.wavefronts <= 1.15 * device.counters.wavefronts_min
    assert device.counters.mma == 2 * 2 * keys * head_dim / 128


def test_a_mask_costs_a_sector_for_each_query_and_step():
    device = EmulatedDevice(multiprocessors=1, races=False)
    k, v = random_cache(1, 1, 1024, 128), random_cache(1, 1, 1024, 128, seed=1)
    query, read = random_query(1, 4, 2, 128, torch.float16), []
    for mask in (None, torch.ones(1, 2, 1024, dtype=torch.bool)):
        device.reset()
        launch_kv_attention(device, query, k, v, ints(1024), 0.1, mask=mask)
        read.append(device.counters.sectors_read)
    assert read[1] - read[0] == 2 * 1024 / 32


def test_only_visible_keys_are_read():
    device = EmulatedDevice(multiprocessors=1, races=False)
    k, v = random_cache(1, 1, 1024, 128), random_cache(1, 1, 1024, 128, seed=1)
    launch_kv_attention(device, random_query(1, 1, 1, 128, torch.float16), k, v, ints(900), 0.1, ints(500), 128)
    assert device.counters.sectors_read <= 160 * 138 / 32 + 32


def test_the_definition_is_attention_over_what_was_quantized():
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 2, 2, 12, 64, generator=generator).half()
    query, scale, zeros = random_query(2, 4, 12, 64, torch.float16), 0.125, ints(0, 0)
    caches = []
    for x in (keys, values):
        shape = (2, 2, 12)
        cache = torch.zeros(*shape, 32, dtype=torch.uint8), torch.zeros(shape), torch.zeros(shape, dtype=torch.uint8)
        kv_quant_(x, None, torch.ones(2), *cache, zeros)
        caches.append(cache)
    k, v = (kv_dequant(*cache, torch.float32).repeat_interleave(2, 1) for cache in caches)
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), k, v, is_causal=True, scale=scale)
    ours = kv_attention(query, *caches[0], *caches[1], ints(12, 12), softmax_scale=scale)
    torch.testing.assert_close(ours, expected.half(), rtol=2e-3, atol=2e-3)


def test_the_op_passes_opcheck_and_compiles():
    k, v, query = (
        random_cache(1, 1, 20, 64),
        random_cache(1, 1, 20, 64, seed=1),
        random_query(1, 2, 3, 64, torch.float16),
    )
    mask = random_mask(1, 3, 17)
    for last in ((ints(2), 5, None), (None, 0, mask)):
        torch.library.opcheck(torch.ops.flatq.kv_attention.default, (query, *k, *v, ints(20), 0.1, *last))

    def attend(query):
        return kv_attention(query, *k, *v, ints(20), softmax_scale=0.1, window=7) * 2

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(query)
    assert torch.equal(compiled, attend(query))


def test_splits_fill_the_chip_once_and_never_depend_on_lengths():
    for arch, limits in LIMITS.items():
        for batch in (1, 64):
            plan = plan_kv_attention(batch, 8, 4, 128, 32768, 4, torch.float16, limits)
            assert plan.fast == (arch >= 80)
            assert plan.shared_bytes <= limits.shared_per_block
            assert plan.splits == 1 or plan.splits * batch * 8 <= limits.multiprocessors * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 4, 17, 64).half()}, "q_len must be 1 to 16, is 17"),
        ({"query": torch.zeros(1, 3, 1, 64).half()}, "3 heads are not a multiple of the cache's 2 KV heads"),
        ({"query": torch.zeros(1, 4, 1, 64)}, "query must be float16 or bfloat16"),
        ({"query": torch.zeros(1, 4, 1, 96).half()}, "48 .4 bits. or 96 .8 bits. bytes a row, have 32"),
        ({"lengths": torch.zeros(1)}, r"lengths must be int32 \[1\]"),
        ({"first": ints(0, 0)}, r"first must be int32 \[1\]"),
        ({"window": -1}, "window must be 0"),
        ({"v_scale": torch.zeros(1, 2, 9)}, "scale must be torch.float32"),
        ({"mask": torch.zeros(1, 1, 8)}, r"mask must be bool \[1, 1, keys\], at most 8 keys, is torch.float32"),
        ({"mask": torch.zeros(1, 1, 9, dtype=torch.bool)}, r"at most 8 keys, is torch.bool \[1, 1, 9\]"),
        ({"mask": torch.zeros(1, 8, dtype=torch.bool)}, r"is torch.bool \[1, 8\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    k, v = random_cache(1, 2, 8, 64), random_cache(1, 2, 8, 64)
    inputs = dict(zip(("k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero"), (*k, *v), strict=True))
    inputs |= {"query": torch.zeros(1, 4, 1, 64).half(), "lengths": ints(8), "softmax_scale": 0.125} | change
    with pytest.raises(ValueError, match=message):
        kv_attention(**inputs)
