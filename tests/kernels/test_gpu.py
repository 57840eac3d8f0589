"""The ops on a real GPU against their definitions on the CPU, and the ways in which torch runs them.

Needs torch, CuPy and pytest only: `python -m pytest tests/kernels -m gpu` from a checkout.
"""

import pytest
import torch

from flatq_cli.kernels.codes import packed_width, unpack_codes

pytestmark = pytest.mark.gpu

HALVES = [torch.float16, torch.bfloat16]
SHARE = {torch.float16: 6e-4, torch.bfloat16: 4e-3}
"""How many codes may differ by one: the first product is rounded to 16 bits on tensor cores."""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cuda(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def normal(*shape, dtype=torch.float16):
    """Heavy-tailed, as activations are."""
    x = torch.randn(shape)
    return (x * (1 + 20 * (torch.rand(shape[-1]) > 0.98))).to(dtype)


def orthogonal(size, dtype):
    return torch.linalg.qr(torch.randn(size, size))[0].to(dtype)


def matrices_of(n1, n2, dtype, device):
    from flatq_cli.kernels.kron_quant import prepare_kron

    return prepare_kron(orthogonal(n1, dtype).to(device), orthogonal(n2, dtype).to(device), dtype, n1 * n2)


def both_matrices(n1, n2, dtype):
    from flatq_cli.kernels.kron_quant import prepare_kron

    left, right = orthogonal(n1, dtype), orthogonal(n2, dtype)
    return [prepare_kron(left.to(device), right.to(device), dtype, n1 * n2) for device in ("cpu", "cuda")]


def assert_codes_close(ours, reference, bits, width, signed, share, zeros=None):
    """`zeros`: where a zero point rounds the other way at a tie, its row's codes move with it and mean the same."""
    a, b = (unpack_codes(codes.cpu(), bits, width, signed) for codes in (ours, reference))
    if zeros is not None:
        a, b = a - zeros[0].cpu().int().unsqueeze(-1), b - zeros[1].int().unsqueeze(-1)
    difference = (a - b).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= share + 3 / difference.numel()


def assert_quantized_close(ours, reference, bits, width, symmetric, share):
    torch.testing.assert_close(ours.scale.cpu(), reference.scale, rtol=1e-3, atol=0)
    zeros = None if symmetric else (ours.zero, reference.zero)
    if symmetric:
        assert ours.zero is None
    else:
        assert (ours.zero.cpu() - reference.zero).abs().max() <= 1
    assert_codes_close(ours.codes, reference.codes, bits, width, symmetric, share, zeros)


# ---- kron_quant. ----


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("n1", "n2", "tokens"),
    [
        (24, 24, 1),
        (32, 48, 17),
        (64, 64, 300),
        (64, 128, 33),
        (112, 128, 40),
        (128, 148, 7),
        (128, 224, 9),
        (256, 256, 3),
        (37, 53, 11),
    ],
)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, False)])
def test_kron_quant_equals_its_definition(n1, n2, tokens, dtype, bits, symmetric):
    from flatq_cli.kernels.kron_quant import kron_quant

    on_cpu, on_gpu = both_matrices(n1, n2, dtype)
    x, clip = normal(tokens, n1 * n2, dtype=dtype), torch.tensor([0.9, 0.8])
    options = {"bits": bits, "symmetric": symmetric}
    share = SHARE[dtype] * (1 if bits == 4 else 16)
    ours, reference = kron_quant(cuda(x), on_gpu, cuda(clip), **options), kron_quant(x, on_cpu, clip, **options)
    assert_quantized_close(ours, reference, bits, n1 * n2, symmetric, share)


@pytest.mark.parametrize("prologue", ["norm_weight", "gate"])
@pytest.mark.parametrize("dtype", HALVES)
def test_kron_quant_with_a_norm_or_a_gate_in_front_equals_its_definition(prologue, dtype):
    from flatq_cli.kernels.kron_quant import kron_quant

    on_cpu, on_gpu = both_matrices(64, 64, dtype)
    x, clip = normal(50, 4096, dtype=dtype), torch.ones(2)
    extra = {prologue: normal(4096, dtype=dtype) if prologue == "norm_weight" else normal(50, 4096, dtype=dtype)}
    ours = kron_quant(cuda(x), on_gpu, cuda(clip), **{name: cuda(value) for name, value in extra.items()})
    # The prologue's own rounding may differ in the last bit of an input here and there.
    assert_quantized_close(ours, kron_quant(x, on_cpu, clip, **extra), 4, 4096, True, 4 * SHARE[dtype])


def test_rows_that_are_not_finite_have_no_scale_and_harm_no_other():
    from flatq_cli.kernels.kron_quant import kron_quant

    on_cpu, on_gpu = both_matrices(64, 64, torch.float16)
    x = normal(9, 4096)
    x[2, 5], x[7, 4000] = torch.nan, torch.inf
    x[4] = 0
    ours, reference = (
        kron_quant(value, m, clip)
        for value, m, clip in ((cuda(x), on_gpu, torch.ones(2).cuda()), (x, on_cpu, torch.ones(2)))
    )
    good = [0, 1, 3, 4, 5, 6, 8]
    assert ours.scale[[2, 7]].isnan().all()
    torch.testing.assert_close(ours.scale.cpu()[good], reference.scale[good], rtol=1e-3, atol=0)
    assert_codes_close(ours.codes[good], reference.codes[good], 4, 4096, True, SHARE[torch.float16])


# ---- Linears. ----


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("op", ["w4a4_gemm", "w4a8_gemm"])
@pytest.mark.parametrize(
    ("tokens", "width", "out"),
    [(1, 4096, 1024), (7, 512, 384), (16, 1024, 4096), (33, 320, 200), (300, 1024, 512), (3, 333, 77)],
)
def test_a_product_of_codes_equals_its_definition(op, dtype, tokens, width, out):
    from flatq_cli.kernels import gemm
    from flatq_cli.kernels.kron_quant import Quantized

    bits = 4 if op == "w4a4_gemm" else 8
    codes = torch.randint(0, 256, (tokens, packed_width(width, bits)), dtype=torch.uint8)
    weight = torch.randint(0, 256, (out, packed_width(width, 4)), dtype=torch.uint8)
    scale, weight_scale, bias = torch.rand(tokens) / 50, torch.rand(out) / 50, torch.randn(out)
    if width % 2:
        weight[:, -1] &= 15
        codes[:, -1] &= 15 if bits == 4 else 255
    weight_sum = unpack_codes(weight, 4, width, True).sum(-1, dtype=torch.int32)
    product = getattr(gemm, op)
    for zero in (None, torch.randint(0, 2**bits, (tokens,), dtype=torch.int32)):
        sums = {} if zero is None else {"weight_sum": weight_sum}
        options = {"bias": bias, **sums}
        reference = product(
            Quantized(codes, scale, zero), weight, weight_scale, in_features=width, dtype=dtype, **options
        )
        ours = product(
            Quantized(cuda(codes), cuda(scale), cuda(zero)),
            cuda(weight),
            cuda(weight_scale),
            in_features=width,
            dtype=dtype,
            **{name: cuda(value) for name, value in options.items()},
        )
        torch.testing.assert_close(ours.cpu(), reference, rtol=1.6e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-2)


# ---- The KV cache. ----


def cache(batch, heads, capacity, head_dim, device="cpu"):
    return (
        torch.zeros(batch, heads, capacity, head_dim // 2, dtype=torch.uint8, device=device),
        torch.zeros(batch, heads, capacity, device=device),
        torch.zeros(batch, heads, capacity, dtype=torch.uint8, device=device),
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("transformed", [True, False])
def test_the_cache_is_written_and_read_as_its_definition_says(dtype, head_dim, transformed):
    from flatq_cli.kernels.kv_quant import kv_dequant, kv_quant_

    x, clip = normal(2, 3, 21, head_dim, dtype=dtype), torch.tensor([1.0, 0.9])
    matrix = orthogonal(head_dim, dtype) if transformed else None
    start = torch.tensor([0, 5], dtype=torch.int32)
    on_cpu, on_gpu = cache(2, 3, 40, head_dim), cache(2, 3, 40, head_dim, "cuda")
    kv_quant_(x, matrix, clip, *on_cpu, start)
    kv_quant_(cuda(x), cuda(matrix), cuda(clip), *on_gpu, cuda(start))
    torch.testing.assert_close(on_gpu[1].cpu(), on_cpu[1], rtol=1e-3, atol=0)
    assert (on_gpu[2].cpu().int() - on_cpu[2].int()).abs().max() <= 1
    assert_codes_close(on_gpu[0], on_cpu[0], 4, head_dim, False, 4 * SHARE[dtype], (on_gpu[2], on_cpu[2]))
    torch.testing.assert_close(kv_dequant(*on_gpu, dtype).cpu(), kv_dequant(*(part.cpu() for part in on_gpu), dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "q_len", "window"),
    [(64, 4, 4, 1, 0), (128, 8, 2, 1, 0), (128, 8, 2, 4, 0), (96, 6, 2, 16, 0), (80, 4, 2, 2, 30), (256, 4, 1, 3, 0)],
)
def test_attention_over_the_packed_cache_equals_its_definition(dtype, head_dim, heads, kv_heads, q_len, window):
    from flatq_cli.kernels.kv_attention import kv_attention

    parts = []
    for _ in range(2):
        codes = torch.randint(0, 256, (2, kv_heads, 1500, head_dim // 2), dtype=torch.uint8)
        zero = torch.randint(5, 11, (2, kv_heads, 1500), dtype=torch.uint8)
        parts += [codes, torch.rand(2, kv_heads, 1500) / 4, zero]
    query = torch.randn(2, heads, q_len, head_dim).to(dtype)
    lengths = torch.tensor([1500, 77], dtype=torch.int32)
    first = torch.tensor([3, 0], dtype=torch.int32)
    options = {"softmax_scale": head_dim**-0.5, "window": window}
    reference = kv_attention(query, *parts, lengths, first=first, **options)
    ours = kv_attention(cuda(query), *map(cuda, parts), cuda(lengths), first=cuda(first), **options)
    torch.testing.assert_close(ours.cpu(), reference, rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "q_len", "bits"),
    [(64, 4, 4, 1, 4), (128, 8, 2, 1, 4), (128, 8, 2, 5, 4), (80, 6, 2, 16, 4), (256, 4, 1, 1, 4), (64, 4, 2, 2, 8)],
)
def test_attention_with_a_mask_equals_its_definition(dtype, head_dim, heads, kv_heads, q_len, bits):
    from flatq_cli.kernels.kv_attention import kv_attention

    parts = []
    for _ in range(2):
        codes = torch.randint(0, 256, (2, kv_heads, 1520, head_dim * bits // 8), dtype=torch.uint8)
        zero = torch.randint(5, 11, (2, kv_heads, 1520), dtype=torch.uint8)
        parts += [codes, torch.rand(2, kv_heads, 1520) / 4 ** (bits - 3), zero]
    query = torch.randn(2, heads, q_len, head_dim).to(dtype)
    lengths = torch.tensor([1500, 77], dtype=torch.int32)
    mask = torch.rand(2, q_len, 1511) < 0.5
    mask[:, :, 200:700] = False
    for shown in (mask, mask[:1].expand(2, -1, -1)):
        reference = kv_attention(query, *parts, lengths, softmax_scale=head_dim**-0.5, mask=shown)
        on_gpu = map(cuda, (query, *parts, lengths))
        ours = kv_attention(*on_gpu, softmax_scale=head_dim**-0.5, mask=shown.cuda())
        torch.testing.assert_close(ours.cpu(), reference, rtol=3e-2, atol=2e-2)


# ---- How torch runs them. ----


def quantize_then_multiply():
    """A function of x made of two ops, and inputs for it."""
    from flatq_cli.kernels.gemm import w4a4_gemm
    from flatq_cli.kernels.kron_quant import kron_quant

    matrices, clip = matrices_of(64, 64, torch.float16, "cuda"), torch.ones(2, device="cuda")
    weight = torch.randint(0, 256, (512, 2048), dtype=torch.uint8, device="cuda")
    weight_scale = torch.rand(512, device="cuda") / 100

    def run(x):
        return w4a4_gemm(kron_quant(x, matrices, clip), weight, weight_scale, in_features=4096, dtype=torch.float16)

    return run


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_a_captured_graph_replays_on_new_inputs(tokens):
    run = quantize_then_multiply()
    x, other = normal(tokens, 4096).cuda(), normal(tokens, 4096).cuda()
    expected = run(other)
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    x.copy_(other)
    for _ in range(3):  # kernels that count arrivals must be ready again
        graph.replay()
        torch.testing.assert_close(captured, expected, rtol=0, atol=0)


def test_a_captured_graph_goes_on_writing_and_reading_a_cache_whose_length_the_device_knows():
    from flatq_cli.kernels.kv_attention import kv_attention
    from flatq_cli.kernels.kv_quant import kv_quant_

    heads, capacity, head_dim, clip = 2, 1600, 64, torch.ones(2, device="cuda")
    places, x = torch.arange(capacity, device="cuda"), torch.empty(2, heads, 1, head_dim, device="cuda").half()

    def step(keys, values, lengths):
        for part in (keys, values):
            kv_quant_(x, None, clip, *part, lengths)
        lengths.add_(1)
        mask = ((places < lengths.unsqueeze(1)) & (places % 3 > 0)).unsqueeze(1)
        return kv_attention(x, *keys, *values, lengths, softmax_scale=0.125, mask=mask)

    def state():
        keys, values = (cache(2, heads, capacity, head_dim, "cuda") for _ in range(2))
        return keys, values, torch.tensor([1200, 7], dtype=torch.int32, device="cuda")

    inputs = [torch.randn(x.shape, device="cuda").half() for _ in range(6)]
    eager, expected = state(), []
    for value in inputs:
        x.copy_(value)
        expected.append(step(*eager))
    kept, graph = state(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*kept)
    for value, wanted in zip(inputs, expected, strict=True):
        x.copy_(value)
        graph.replay()
        torch.testing.assert_close(captured, wanted, rtol=0, atol=0)
    assert kept[2].tolist() == [1206, 13]
    for ours, wanted in zip((*kept[0], *kept[1]), (*eager[0], *eager[1]), strict=True):
        assert torch.equal(ours, wanted)


def test_a_kernel_that_was_never_run_cannot_be_captured_and_the_error_says_so():
    from flatq_cli.kernels.errors import KernelError
    from flatq_cli.kernels.kron_quant import kron_quant

    matrices, clip = matrices_of(16, 24, torch.float16, "cuda"), torch.ones(2, device="cuda")
    x = normal(3, 384).cuda()
    torch.cuda.synchronize()
    with pytest.raises(KernelError, match="run the op once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        kron_quant(x, matrices, clip)


def test_compiled_code_gives_the_same_without_a_graph_break():
    run = quantize_then_multiply()
    x = normal(33, 4096).cuda()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), run(x), rtol=0, atol=0)


def test_ops_run_on_the_current_stream_in_its_order():
    run = quantize_then_multiply()
    x, other = normal(16, 4096).cuda(), normal(16, 4096).cuda()
    expected = run(other)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what is launched on another stream would now run first, on the old x
        x.copy_(other)
        result = run(x)
    stream.synchronize()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_no_tokens_give_an_empty_result():
    run = quantize_then_multiply()
    assert run(torch.empty(0, 4096, dtype=torch.float16, device="cuda")).shape == (0, 512)


def test_every_work_of_the_benchmark_runs_small():
    from flatq_cli.kernels.bench_smoke import smoke_works

    for work in smoke_works():
        work.make(torch.device("cuda"))()
    torch.cuda.synchronize()
