"""The emulator is the GPU of the kernels' tests, so it is proven first: against numpy, by hand, by planted faults."""

from __future__ import annotations

import re
import unittest
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flatq_cli.kernels.device import Kernel
from tests.cuda_emulator import device as emulator
from tests.cuda_emulator.device import EmulatedDevice, EmulatorError

KERNELS = Path(__file__).parent / "kernels"
NAMES = re.findall(r"^    ([A-Z_]+),$", (KERNELS / "faults.cu").read_text(), re.MULTILINE)
FAULTS = {name: number for number, name in enumerate(NAMES)}
ORDERS = ("ascending", "descending", 1, 2)


def device(**options) -> EmulatedDevice:
    return EmulatedDevice(folder=KERNELS, **options)


def run(source: str, entry: str, *arguments, on=None, grid=1, block=32, shared=0) -> None:
    (on or device()).launch(Kernel(source, entry), (grid, 1, 1), block, shared, arguments)


def words(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).view(np.int32).copy())


def random_halves(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Bit patterns (uint16) and their values."""
    values = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    halves = values.to(torch.float16 if kind == "f16" else torch.bfloat16)
    return halves.view(torch.int16).numpy().view(np.uint16), halves.double().numpy()


# ---- Tensor cores: the fragments as the PTX ISA writes them, element i of lane l. ----


def fragments(k: int, per_register: int):
    """Row and column of every element of A [16, k], B [k, 8] and D [16, 8]: arrays [32 lanes, elements]."""
    lane = np.arange(32)[:, None]
    group, thread = lane >> 2, lane % 4
    e = per_register
    i = np.arange(4 * e)[None]
    a_row = np.where((i < e) | ((i >= 2 * e) & (i < 3 * e)), group, group + 8)
    a_col = np.where(i < 2 * e, thread * e + (i & (e - 1)), thread * e + (i & (e - 1)) + k // 2)
    i = np.arange(2 * e)[None]
    b_row = np.where(i < e, thread * e + (i & (e - 1)), thread * e + (i & (e - 1)) + k // 2)
    b_col = np.broadcast_to(group, b_row.shape)
    i = np.arange(4)[None]
    d_row, d_col = np.where(i < 2, group, group + 8), thread * 2 + (i & 1)
    return (a_row, a_col), (b_row, b_col), (d_row, d_col)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float_mma_is_the_matrix_product_of_ptx_fragments(kind):
    rng = np.random.default_rng(0)
    (a_bits, a), (b_bits, b) = random_halves(rng, (16, 16), kind), random_halves(rng, (16, 8), kind)
    c = rng.normal(size=(16, 8)).astype(np.float32)
    at_a, at_b, at_d = fragments(16, 2)
    d = words(c[at_d])
    on = device()
    run("collectives.cu", "mma", ["f16", "bf16"].index(kind), words(a_bits[at_a]), words(b_bits[at_b]), d, on=on)
    np.testing.assert_array_equal(d.numpy().view(np.float32), (a @ b + c).astype(np.float32)[at_d])
    assert on.counters.mma == 1


INTEGER_MMA = [(2, 8, True), (3, 8, False), (4, 4, True), (5, 4, False)]


@pytest.mark.parametrize(("kind", "bits", "signed"), INTEGER_MMA, ids=["s8", "u8s8", "s4", "u4s4"])
def test_integer_mma_is_the_matrix_product_of_ptx_fragments(kind, bits, signed):
    rng = np.random.default_rng(kind)
    k, e = 256 // bits, 32 // bits
    half = 2 ** (bits - 1)
    a = rng.integers(-half, half, (16, k)) if signed else rng.integers(0, 2 * half, (16, k))
    b = rng.integers(-half, half, (k, 8))
    c = rng.integers(-(2**31), 2**31, (16, 8))
    at_a, at_b, at_d = fragments(k, e)

    def registers(elements: np.ndarray) -> Tensor:
        fields = (elements.reshape(32, -1, e) & (2 * half - 1)) << (bits * np.arange(e))
        return words(fields.sum(-1).astype(np.uint32))

    d = words(c[at_d].astype(np.int32))
    run("collectives.cu", "mma", kind, registers(a[at_a]), registers(b[at_b]), d)
    np.testing.assert_array_equal(d.numpy(), (a @ b + c)[at_d].astype(np.int64).astype(np.int32))


def test_ldmatrix_gives_each_lane_its_elements_plain_and_transposed():
    matrices = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    d = torch.zeros(4, 32, 4, dtype=torch.int32)
    run("collectives.cu", "matrices", words(matrices), d, shared=512)
    for transposed in (False, True):
        rows = matrices.swapaxes(1, 2) if transposed else matrices
        pairs = np.ascontiguousarray(rows).view(np.uint32)  # [4, 8, 4]: lane l has word l % 4 of row l // 4
        expected = pairs.reshape(4, 32).T.view(np.int32)
        np.testing.assert_array_equal(d[0 + transposed].numpy(), expected)
        np.testing.assert_array_equal(d[2 + transposed, :, :2].numpy(), expected[:, :2])


@pytest.mark.parametrize("lanes", ORDERS)
def test_shuffles_carry_values_in_every_order_of_lanes(lanes):
    x, y = torch.randn(32), torch.zeros(5, 32)
    run("collectives.cu", "shuffles", x, y, on=device(lanes=lanes))
    lane = torch.arange(32)
    torch.testing.assert_close(y[0], x[lane ^ 5], rtol=0, atol=0)
    torch.testing.assert_close(y[1], x[10].expand(32), rtol=0, atol=0)
    torch.testing.assert_close(y[2], x[(lane + 1) % 32], rtol=0, atol=0)
    torch.testing.assert_close(y[3], x.sum().expand(32))
    assert y[3].unique().numel() == 1
    torch.testing.assert_close(y[4], x.max().expand(32), rtol=0, atol=0)
    x[13] = torch.nan
    run("collectives.cu", "shuffles", x, y, on=device(lanes=lanes))
    assert y[4].isnan().all()


@pytest.mark.parametrize("lanes", ORDERS)
def test_a_ballot_tells_every_lane_of_all_votes(lanes):
    x, y = torch.randn(32), torch.zeros(32, dtype=torch.int32)
    run("collectives.cu", "ballots", x, y, on=device(lanes=lanes))
    votes = sum(1 << lane for lane in range(32) if x[lane] > 0)
    assert {value & 0xFFFFFFFF for value in y.tolist()} == {votes}


# ---- Numbers. ----

TYPES = [(0, torch.float16), (1, torch.bfloat16)]


def same_values(a: Tensor, b: Tensor) -> None:
    """Equal bits, any NaN equal to any other."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


@pytest.mark.parametrize(("kind", "dtype"), TYPES)
def test_every_half_widens_and_comes_back(kind, dtype):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    floats, back = torch.zeros(2**16), torch.zeros(2**16, dtype=dtype)
    run("arithmetic.cu", "widen", kind, halves, floats, 2**16, grid=64, block=1024)
    same_values(floats, halves.float())
    run("arithmetic.cu", "narrow", kind, floats, back, 2**16, grid=64, block=1024)
    same_values(back, halves)


@pytest.mark.parametrize(("kind", "dtype"), TYPES)
def test_floats_round_to_the_nearest_even_half(kind, dtype):
    rng = np.random.default_rng(kind)
    halves = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()]
    ties = ((halves[1:].double() + halves[:-1].double()) / 2).float().numpy()
    any_bits = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    edges = np.float32([65504, 65519.996, 65520, 3.3895314e38, np.inf, -np.inf, np.nan, 2.0**-25, 2.0**-24, 1e-45])
    up, down = np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0))
    floats = torch.from_numpy(np.concatenate([ties, up, down, -ties, any_bits, edges]))
    rounded = torch.zeros(len(floats), dtype=dtype)
    run("arithmetic.cu", "narrow", kind, floats, rounded, len(floats), grid=len(floats) // 1024 + 1, block=1024)
    same_values(rounded, floats.to(dtype))


def nearest_half(exact: int, scale: int) -> np.float16:
    """exact / 2^scale, in integers: the nearest half, ties to even."""
    guess = np.float16(exact / 2**scale)
    candidates = [np.nextafter(guess, np.float16(-np.inf)), guess, np.nextafter(guess, np.float16(np.inf))]

    def distance(half: np.float16) -> tuple[int, int]:
        return abs(int(float(half) * 2**24) * 2 ** (scale - 24) - exact), half.view(np.uint16) & 1

    return min((half for half in candidates if np.isfinite(half)), key=distance)


def test_fused_multiply_add_of_halves_rounds_once():
    rng = np.random.default_rng(0)
    a, b, c = (np.float16(rng.normal(size=4000) * 2.0 ** rng.integers(-12, 7, 4000)) for _ in range(3))
    # A product that decides a tie of c from 2^-40 away: a double's sum would lose it, and round the tie to even.
    a[:2], b[:2], c[:2] = np.float16(2**-20), np.float16([2**-20, -(2**-20)]), np.float16(0)
    a[2:4], b[2:4], c[2:4] = np.float16([1 + 2**-10, 1 - 2**-11]), np.float16(2**-11), np.float16(1)
    d = torch.zeros(2000, dtype=torch.int32)
    run("arithmetic.cu", "pairs", 0, words(a), words(b), words(c), d, 2000, grid=2, block=1024)

    def whole(x: np.float16) -> int:
        return int(float(x) * 2**24)

    expected = [nearest_half(whole(x) * whole(y) + whole(z) * 2**24, 48) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(d.numpy().view(np.float16), np.array(expected))
    run("arithmetic.cu", "pairs", 2, words(a), words(b), words(c), d, 2000, grid=2, block=1024)
    np.testing.assert_array_equal(d.numpy().view(np.float16), a - b)


def test_fused_multiply_add_of_bfloat16_rounds_once():
    rng = np.random.default_rng(0)
    (a_bits, a), (b_bits, b), (c_bits, c) = (random_halves(rng, (4000,), "bf16") for _ in range(3))
    d = torch.zeros(2000, dtype=torch.int32)
    run("arithmetic.cu", "pairs", 1, words(a_bits), words(b_bits), words(c_bits), d, 2000, grid=2, block=1024)
    # 53 bits hold the exact results; torch rounds a double to bfloat16 by way of a float, so the last step is ours.
    bits = (a * b + c).view(np.uint64)
    kept, rest = bits >> np.uint64(45), bits & np.uint64(2**45 - 1)
    kept += (rest > 2**44) | ((rest == 2**44) & (kept & np.uint64(1) == 1))
    expected = (kept << np.uint64(45)).view(np.float64)
    np.testing.assert_array_equal(d.view(torch.bfloat16).double().numpy(), expected)


def test_bytes_are_permuted_and_bits_combined():
    rng = np.random.default_rng(0)
    n = 1000
    abc = rng.integers(0, 2**32, (n, 3), dtype=np.uint32)
    abc[:, 2] &= 0xFFFF
    d = torch.zeros(3, n, dtype=torch.int32)
    run("arithmetic.cu", "words", words(abc), d, n, block=1024)
    a, b, c = abc.T
    source = np.stack([a, b], 1).copy().view(np.uint8)
    permuted = np.zeros((n, 4), np.uint8)
    for i in range(4):
        nibble = (c >> (4 * i)) & 0xF
        byte = source[np.arange(n), nibble & 7]
        permuted[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    expected = np.stack([permuted.view(np.uint32)[:, 0], a & b | c, a ^ b ^ c])
    np.testing.assert_array_equal(d.numpy().view(np.uint32), expected)


# ---- What accesses cost, counted by hand. ----

GLOBAL = [
    pytest.param(0, 1, 4, id="32 floats in a row are 4 sectors"),
    pytest.param(0, 0, 1, id="one float for all lanes is 1"),
    pytest.param(0, 2, 8, id="every other float: 8"),
    pytest.param(0, 8, 32, id="a stride of a sector: 32"),
    pytest.param(1, 1, 16, id="16 bytes a lane: 16"),
    pytest.param(1, 2, 32, id="16 bytes every 32: 32"),
    pytest.param(3, 0, 12, id="three times in a loop: 3 x 4"),
    pytest.param(4, 0, 31, id="lanes leave a loop one by one: the n-th passes belong together"),
    pytest.param(12, 0, 4, id="two half-warps with a meeting between: 2 + 2"),
    pytest.param(11, 32, 16, id="cp.async reads its 16 bytes a lane"),
    pytest.param(11, 8, 4, id="and nothing where it fills with zeros"),
]


@pytest.mark.parametrize(("pattern", "pitch", "sectors"), GLOBAL)
@pytest.mark.parametrize("lanes", ["ascending", 5])
def test_sectors_read(pattern, pitch, sectors, lanes):
    on = device(lanes=lanes)
    x = torch.zeros(32 * 8)
    run("accesses.cu", "accesses", pattern, pitch, x, torch.zeros(1, dtype=torch.int32), on=on, shared=512)
    assert (on.counters.sectors_read, on.counters.sectors_written) == (sectors, 0)
    assert on.counters.argument_sectors == [(sectors, 0), (0, 0)]


def test_sectors_written_by_stores_and_atomics():
    on, x, counter = device(), torch.ones(32 * 8), torch.zeros(1, dtype=torch.int32)
    run("accesses.cu", "accesses", 2, 1, x, counter, on=on)
    assert (on.counters.sectors_read, on.counters.sectors_written) == (0, 2)
    on.reset()
    run("accesses.cu", "accesses", 5, 1, x, counter, on=on)
    assert (on.counters.sectors_read, on.counters.sectors_written, counter.item()) == (1, 1, 32)


SHARED = [
    pytest.param(6, 1, 1, 1, id="a word a lane, in a row"),
    pytest.param(6, 0, 1, 1, id="one word for all lanes: broadcast"),
    pytest.param(6, 2, 2, 1, id="every other word: 2-way conflicts"),
    pytest.param(6, 33, 1, 1, id="an odd pitch: none"),
    pytest.param(6, 32, 32, 1, id="one bank: 32-way"),
    pytest.param(7, 1, 2, 2, id="8 bytes a lane go by half-warps"),
    pytest.param(7, 2, 4, 2, id="8 bytes every 16: 2-way in each half-warp"),
    pytest.param(8, 1, 4, 4, id="16 bytes a lane go by quarter-warps"),
    pytest.param(8, 2, 8, 4, id="16 bytes every 32: 2-way in each quarter"),
    pytest.param(9, 1, 1, 1, id="bytes in a row: 8 words"),
    pytest.param(10, 16, 4, 4, id="ldmatrix: rows in a row"),
    pytest.param(10, 144, 4, 4, id="ldmatrix: pitch of an odd multiple of 16 bytes"),
    pytest.param(10, 32, 8, 4, id="ldmatrix: pitch of 2 x 16 bytes, 2-way"),
    pytest.param(10, 128, 32, 4, id="ldmatrix: pitch of 8 x 16 bytes, 8-way"),
    pytest.param(11, 8, 4, 4, id="cp.async writes all of its 16 bytes"),
]


@pytest.mark.parametrize(("pattern", "pitch", "wavefronts", "least"), SHARED)
def test_wavefronts_of_shared_memory(pattern, pitch, wavefronts, least):
    on = device()
    x, counter = torch.zeros(256), torch.zeros(1, dtype=torch.int32)
    run("accesses.cu", "accesses", pattern, pitch, x, counter, on=on, shared=4800)
    assert (on.counters.wavefronts, on.counters.wavefronts_min) == (wavefronts, least)


def test_barriers_are_averaged_over_blocks_and_counters_add_up_until_reset():
    on = device()
    arguments = (13, 1, torch.zeros(256), torch.zeros(1, dtype=torch.int32))
    for _ in range(2):
        run("accesses.cu", "accesses", *arguments, on=on, shared=128, grid=3)
    assert (on.counters.barriers, on.counters.blocks, on.counters.wavefronts) == (2, 6, 6)
    on.reset()
    assert (on.counters.barriers, on.counters.blocks, on.counters.argument_sectors) == (0, 0, [])


def test_counting_can_be_switched_off():
    on = device(count=False)
    run("accesses.cu", "accesses", 0, 1, torch.zeros(256), torch.zeros(1, dtype=torch.int32), on=on)
    assert on.counters.sectors_read == 0


# ---- Asynchronous copies, barriers, order. ----


@pytest.mark.parametrize("waited", [0, 1, 2])
def test_a_copy_is_seen_when_its_wait_covers_it_and_no_earlier(waited):
    x, y = torch.randn(32), torch.zeros(2, 32)
    run("faults.cu", "lateness", waited, x, y, on=device(races=False), shared=256)
    filled = torch.where(torch.arange(32) < 16, x, torch.zeros(32))
    for group, expected in enumerate((x, filled)):
        if waited > group:
            torch.testing.assert_close(y[group], expected, rtol=0, atol=0)
        else:
            assert y[group].isnan().all()


@pytest.mark.parametrize("lanes", ORDERS)
def test_named_barriers_order_the_warps_that_meet_there_and_no_others(lanes):
    x, y = torch.randn(128), torch.zeros(128)
    run("faults.cu", "named", 32, x, y, on=device(lanes=lanes), block=128, shared=512)
    torch.testing.assert_close(y, x.view(2, 2, 32).flip(1).flatten(), rtol=0, atol=0)
    with pytest.raises(EmulatorError, match="race"):
        run("faults.cu", "named", 64, x, y, on=device(lanes=lanes), block=128, shared=512)


def test_blocks_run_in_the_order_asked_for_and_shared_memory_is_fresh():
    tickets = {}
    for lanes in ORDERS:
        tickets[lanes], statics = torch.zeros(40, dtype=torch.int32), torch.zeros(40 * 64)
        counter = torch.zeros(1, dtype=torch.int32)
        run("faults.cu", "order", counter, tickets[lanes], statics, on=device(lanes=lanes), grid=40, block=64)
        assert (statics == 2.5).all()
    assert tickets["ascending"].tolist() == list(range(40))
    assert tickets["descending"].tolist() == list(range(40))[::-1]
    assert sorted(tickets[1].tolist()) == list(range(40))
    assert tickets[1].tolist() != tickets[2].tolist()


# ---- Planted faults. ----


def run_fault(name: str, on: EmulatedDevice | None = None) -> Tensor:
    x, y = torch.arange(1, 65, dtype=torch.float32), torch.zeros(64)
    run("faults.cu", "faults", FAULTS[name], x, y, on=on, block=64, shared=256)
    return y


CAUGHT = {
    "READ_PAST_END": "load of 4 bytes outside of every tensor: at byte 256 of tensor 0, which has 256 bytes",
    "WRITE_PAST_END": "store of 4 bytes outside of every tensor: at byte 256 of tensor 1",
    "SHARED_PAST_END": "shared_store of 4 bytes outside of shared memory: at byte 256 of 256",
    "MISALIGNED": "the address is not a multiple of 16",
    "NO_BLOCK_SYNC": r"race: writes byte \d+ of shared memory, which thread 0 read \(faults.cu:\d+\) with no barrier",
    "NO_WARP_SYNC": r"race: writes byte 4 of shared memory, which thread 0 read",
    "NO_COPY_WAIT": "cp_async .* may still be writing: no cp_async_wait covers it",
    "WAIT_TOO_SHORT": "may still be writing",
    "BARRIER_FOR_SOME_WARPS": "deadlock: threads 0-31 wait at block_sync .*; threads 32-63 have ended",
    "BARRIER_FOR_SOME_LANES": "block_sync: 16 lanes of the warp wait here and 16 have ended",
    "SHUFFLE_AFTER_EXIT": "shuffle: .*ended, thread 7 among them",
    "LANES_PART": "the lanes of a warp part: this one is at shuffle, others wait at warp_sync",
    "WRITE_AFTER_READ": r"race: reads byte 0 of shared memory, which thread 0 wrote \(faults.cu:\d+\) with no barrier",
    "LOAD_OF_WRITTEN": "load of bytes that this launch has written",
    "NAMED_SYNC_OF_DIFFERENT_SIZES": "barrier 2 for 32 threads, but others wait there for 64 threads",
    "BUFFER_REUSED_TOO_EARLY": r"race: reads byte 0 of shared memory, which thread 0 wrote",
}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_planted_fault_is_found_and_its_line_named(name):
    with pytest.raises(EmulatorError, match=rf"faults.cu:\d+, block \(0, 0, 0\), thread \d+: .*{CAUGHT[name]}"):
        run_fault(name)


@pytest.mark.parametrize("name", ["SOUND", "SAME_VALUE"])
@pytest.mark.parametrize("lanes", ORDERS)
def test_a_sound_kernel_passes_in_every_order(name, lanes):
    y = run_fault(name, device(lanes=lanes))
    expected = torch.arange(1, 65).view(2, 32).flip(0).flatten() if name == "SOUND" else torch.full((64,), 5)
    assert torch.equal(y, expected.float())


@pytest.mark.parametrize("name", ["NO_BLOCK_SYNC", "NO_WARP_SYNC", "WRITE_AFTER_READ"])
def test_a_missing_barrier_shows_in_the_results_of_some_order(name):
    results = {str(run_fault(name, device(lanes=lanes, races=False)).nan_to_num(-1).tolist()) for lanes in ORDERS}
    assert len(results) > 1


SANITIZED = {
    "READ_PAST_END": "AddressSanitizer: heap-buffer-overflow .*\nREAD of size 4",
    "RAW_READ_PAST_END": "AddressSanitizer: heap-buffer-overflow .*\nREAD of size 4",
    "WRITE_PAST_END": "AddressSanitizer: heap-buffer-overflow .*\nWRITE of size 4",
    "SHARED_PAST_END": "AddressSanitizer: heap-buffer-overflow .*\nWRITE of size 4",
    "MISALIGNED": "runtime error: .*misaligned address",
}


@pytest.mark.parametrize("name", SANITIZED)
def test_the_sanitizers_find_a_planted_fault(name):
    with pytest.raises(EmulatorError, match=SANITIZED[name]):
        run_fault(name, device(sanitize=True))


def test_the_sanitizers_pass_a_sound_kernel_and_its_results_come_back():
    assert torch.equal(run_fault("SOUND", device(sanitize=True)), run_fault("SOUND"))


# ---- Launches that do not fit. ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, torch.zeros(256)), "has 4 parameters, 3 arguments"),
        ((0, 1, 1.0, torch.zeros(1)), "parameter 2 is a pointer, the argument a float"),
        ((0, torch.zeros(1), torch.zeros(256), torch.zeros(1)), "parameter 1 is an int, the argument a Tensor"),
        ((0, 2**31, torch.zeros(256), torch.zeros(1)), "does not fit 32 bits"),
        ((0, 1, torch.zeros(256, device="meta"), torch.zeros(1)), "is on meta"),
        ((0, 1, None, torch.zeros(1)), "no tensor is there"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(EmulatorError, match=message):
        run("accesses.cu", "accesses", *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 40}, "multiple of 32"),
        ({"block": 2048}, "up to 1024"),
        ({"grid": 0}, "a grid of"),
        ({"shared": 200 * 1024}, "sm_80 has 166912"),
    ],
)
def test_launches_that_a_gpu_refuses_are_refused(options, message):
    with pytest.raises(EmulatorError, match=message):
        run("accesses.cu", "accesses", 99, 1, torch.zeros(1), torch.zeros(1), **options)


def test_a_kernel_that_does_not_compile_says_where(tmp_path):
    (tmp_path / "bad.cu").write_text('#include "ptx.cuh"\nextern "C" __global__ void bad(int n) { nonsense(n); }\n')
    with pytest.raises(EmulatorError, match=r"bad.cu:2:\d+: error: .nonsense. was not declared"):
        EmulatedDevice(folder=tmp_path).launch(Kernel("bad.cu", "bad"), (1, 1, 1), 32, 0, [1])


def test_without_a_compiler_a_test_is_skipped(monkeypatch):
    emulator.compiler.cache_clear()
    monkeypatch.setattr(emulator.shutil, "which", lambda name: None)
    with pytest.raises(unittest.SkipTest, match="needs g"):
        EmulatedDevice()


def test_a_changed_header_and_other_macros_compile_anew(tmp_path):
    kernel = 'extern "C" __global__ void f(int* y) { store(y, VALUE * FACTOR + __CUDA_ARCH__); }\n'
    (tmp_path / "f.cu").write_text(f'#include "ptx.cuh"\n#include "own.cuh"\n{kernel}')
    y = torch.zeros(1, dtype=torch.int32)

    def value(factor: int, arch: int) -> int:
        kernel = Kernel(str(tmp_path / "f.cu"), "f", (("FACTOR", factor),))  # an absolute path needs no folder
        EmulatedDevice(arch=arch).launch(kernel, (1, 1, 1), 32, 0, [y])
        return int(y.item())

    (tmp_path / "own.cuh").write_text("#define VALUE 3\n")
    assert (value(1, 80), value(2, 80), value(1, 90)) == (803, 806, 903)
    (tmp_path / "own.cuh").write_text("#define VALUE 4\n")
    assert value(1, 80) == 804
