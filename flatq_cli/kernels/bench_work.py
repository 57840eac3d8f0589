"""What the benchmark runs: each kernel at the sizes of real models, and what it is compared with.

A `Work` makes calls on data of its own, so that a clock can rotate over copies. Baselines that stand for kernels which
are not installed are the best that such a kernel could be: a plain copy of the bytes that it must move ("ideal"). A
speed-up over those is one over every real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from flatq_cli.kernels.bench_timing import Call
from flatq_cli.kernels.codes import pack_codes, packed_width, quantize_rows

Maker: TypeAlias = Callable[[torch.device], Call]
"""Gives a call on data of its own."""

KRON_SIZES = ((24, 24), (32, 48), (64, 64), (64, 128), (112, 128), (128, 148), (128, 224), (256, 256))
TOKENS = (2048, 1, 16, 16384, 128)
"""In the order in which they are measured, should the time not suffice for all."""

OPS = ("kron_quant", "w4a4_gemm", "layer", "kv_attention", "kv_quant", "w4a8_gemm")


@dataclass(frozen=True)
class Shapes:
    """A decoder layer.

    Args:
        hidden, ffn: widths, each as the two factors of its transform. heads, kv_heads, head_dim: of attention.
    """

    name: str
    hidden: tuple[int, int]
    ffn: tuple[int, int]
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def linears(self) -> tuple[tuple[str, int, int], ...]:
        """Name, in and out features; q, k and v are one linear, gate and up another."""
        hidden, ffn = self.hidden[0] * self.hidden[1], self.ffn[0] * self.ffn[1]
        attention = self.heads * self.head_dim
        return (
            ("qkv", hidden, attention + 2 * self.kv_heads * self.head_dim),
            ("o", attention, hidden),
            ("gate_up", hidden, 2 * ffn),
            ("down", ffn, hidden),
        )


LLAMA_3_8B = Shapes("Llama-3-8B", (64, 64), (112, 128), heads=32, kv_heads=8, head_dim=128)


@dataclass(frozen=True)
class Work:
    """One kernel at one size; the fields are those of `bench_report.Row`.

    Args:
        make: gives the call, on fresh data. baselines: the same of what it is compared with.
    """

    op: str
    size: str
    tokens: int
    bytes: float
    operations: float
    unit: str
    make: Maker
    baselines: dict[str, Maker] = field(default_factory=dict)


def all_works(shapes: Shapes = LLAMA_3_8B, tokens: Sequence[int] = TOKENS, ops: Sequence[str] = OPS) -> list[Work]:
    """Everything, the first count of tokens of every op before the second."""
    return [work for count in tokens for op in ops for work in works_of(op, shapes, count)]


def works_of(op: str, shapes: Shapes, tokens: int) -> Iterable[Work]:
    """The works of one op at one count of tokens; those of attention come with one token."""
    if op == "kron_quant":
        return kron_works(KRON_SIZES, tokens)
    if op in ("w4a4_gemm", "w4a8_gemm"):
        return gemm_works(shapes, tokens, op)
    if op == "layer":
        return layer_works(shapes, tokens)
    if op == "kv_quant":
        return kv_quant_works(shapes, tokens)
    if op == "kv_attention":
        if tokens != 1:
            return ()
        masked = attention_works(shapes, batches=(1, 8), lengths=(8192,), masked=True)
        return (*attention_works(shapes, batches=(1, 8), lengths=(32768, 8192, 1024)), *masked)
    raise ValueError(f"'{op}' is not one of {', '.join(OPS)}")


# ---- Data. ----


def normal(device: torch.device, *shape: int) -> Tensor:
    """Random halves."""
    return torch.randn(shape, device=device, dtype=torch.float16)


def orthogonal(size: int, device: torch.device) -> Tensor:
    """A matrix that keeps lengths, as a learned transform nearly does."""
    return _orthogonal(size).to(device, torch.float16)


@lru_cache
def _orthogonal(size: int) -> Tensor:
    """Made once: on the CPU it takes longer than what is measured."""
    matrix: Tensor = torch.linalg.qr(torch.randn(size, size))[0]
    return matrix


def random_bytes(device: torch.device, *shape: int) -> Tensor:
    """Random packed codes."""
    return torch.randint(0, 256, shape, device=device, dtype=torch.uint8)


def copy_of(device: torch.device, moved: float) -> Call:
    """A plain copy that reads and writes `moved` bytes together."""
    source = torch.zeros(max(1, int(moved) // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def one_after_another(*calls: Call) -> Call:
    """A call that does all of them."""
    return lambda: [call() for call in calls]


def together(makers: Sequence[Maker], device: torch.device) -> Call:
    """What several makers give, done one after another."""
    return one_after_another(*(make(device) for make in makers))


# ---- kron_quant. ----


def kron_works(sizes: Sequence[tuple[int, int]], tokens: int) -> Iterator[Work]:
    """The fused transform and quantization, against its parts and against a copy of the same bytes."""
    for n1, n2 in sizes:
        n = n1 * n2
        if n * tokens > 2**29 and tokens > 2048:
            continue  # more than a gigabyte a copy of the data
        moved = tokens * (2 * n + packed_width(n, 4) + 4)
        products = partial(_cublas, n1=n1, n2=n2, tokens=tokens, quantize=False)
        copy = partial(copy_of, moved=moved)
        yield Work(
            "kron_quant",
            f"{n1}x{n2} int4",
            tokens,
            bytes=moved,
            operations=2.0 * tokens * n * (n1 + n2),
            unit="float16",
            make=partial(_kron, n1=n1, n2=n2, tokens=tokens),
            baselines={
                "cublas + ideal quantize": partial(together, (products, copy)),
                "cublas + torch quantize": partial(_cublas, n1=n1, n2=n2, tokens=tokens, quantize=True),
                "ideal hadamard + quantize": partial(together, (partial(copy_of, moved=4 * n * tokens), copy)),
                "copy": copy,
            },
        )


def _kron(
    device: torch.device, n1: int, n2: int, tokens: int, left: bool = True, right: bool = True, gate: bool = False
) -> Call:
    from flatq_cli.kernels.kron_quant import kron_quant, prepare_kron

    matrices = prepare_kron(
        orthogonal(n1, device) if left else None, orthogonal(n2, device) if right else None, torch.float16, n1 * n2
    )
    x, clip = normal(device, tokens, n1 * n2), torch.ones(2, device=device)
    beside = normal(device, tokens, n1 * n2) if gate else None
    return lambda: kron_quant(x, matrices, clip, gate=beside)


def _cublas(device: torch.device, n1: int, n2: int, tokens: int, quantize: bool = False) -> Call:
    left, right, x = orthogonal(n1, device), orthogonal(n2, device), normal(device, tokens, n1, n2)
    clip = torch.ones(2, device=device)

    def call() -> object:
        y: Tensor = left.mT @ (x @ right)
        if not quantize:
            return y
        codes, scale, _ = quantize_rows(y.reshape(tokens, -1), clip, 4, True)
        return pack_codes(codes, 4), scale

    return call


# ---- Linears. ----


def gemm_works(shapes: Shapes, tokens: int, op: str) -> Iterator[Work]:
    """The integer matrix product of each linear, against fp16's."""
    bits = 4 if op == "w4a4_gemm" else 8
    for name, width, out in shapes.linears:
        yield Work(
            op,
            f"{name} {width}x{out}",
            tokens,
            bytes=width * out / 2 + 4 * out + tokens * (packed_width(width, bits) + 4 + 2 * out),
            operations=2.0 * tokens * width * out,
            unit=f"int{bits}",
            make=partial(_gemm, tokens=tokens, width=width, out=out, op=op),
            baselines={"fp16": partial(_linear, tokens=tokens, width=width, out=out)},
        )


def _gemm(device: torch.device, tokens: int, width: int, out: int, op: str) -> Call:
    from flatq_cli.kernels import gemm
    from flatq_cli.kernels.kron_quant import Quantized

    bits = 4 if op == "w4a4_gemm" else 8
    codes, scale = random_bytes(device, tokens, packed_width(width, bits)), torch.rand(tokens, device=device)
    activations = Quantized(codes, scale, None)
    weight, weight_scale = random_bytes(device, out, packed_width(width, 4)), torch.rand(out, device=device)
    product = getattr(gemm, op)
    return lambda: product(activations, weight, weight_scale, in_features=width, dtype=torch.float16)


def _linear(device: torch.device, tokens: int, width: int, out: int) -> Call:
    x, weight = normal(device, tokens, width), normal(device, out, width)
    return lambda: linear(x, weight)


def layer_works(shapes: Shapes, tokens: int) -> Iterator[Work]:
    """All linears of a layer with their transforms and quantization, against fp16, and against no transforms at all.

    "no transforms" is the same with an ideal quantization (a copy of its bytes) in the place of each `kron_quant`: the
    difference is all that the transforms cost, and what our quantization costs beyond the least.
    """
    yield Work(
        "layer",
        shapes.name,
        tokens,
        bytes=sum(
            width * out / 2 + 4 * out + tokens * (2.5 * width + 4 + width / 2 + 2 * out)
            for _, width, out in shapes.linears
        ),
        operations=sum(2.0 * tokens * width * out for _, width, out in shapes.linears),
        unit="int4",
        make=partial(_packed_layer, shapes=shapes, tokens=tokens, transforms=True),
        baselines={
            "fp16": partial(_float_layer, shapes=shapes, tokens=tokens),
            "no transforms": partial(_packed_layer, shapes=shapes, tokens=tokens, transforms=False),
        },
    )


def _packed_layer(device: torch.device, shapes: Shapes, tokens: int, transforms: bool) -> Call:
    before = _transforms(device, shapes, tokens) if transforms else _ideal_quantizations(device, shapes, tokens)
    products = [_gemm(device, tokens, width, out, "w4a4_gemm") for _, width, out in shapes.linears]
    return one_after_another(*(call for pair in zip(before, products, strict=True) for call in pair))


def _transforms(device: torch.device, shapes: Shapes, tokens: int) -> list[Call]:
    return [
        _kron(device, *shapes.hidden, tokens),
        _kron(device, shapes.heads, shapes.head_dim, tokens, right=False),
        _kron(device, *shapes.hidden, tokens),
        _kron(device, *shapes.ffn, tokens, gate=True),
    ]


def _ideal_quantizations(device: torch.device, shapes: Shapes, tokens: int) -> list[Call]:
    """Copies of the bytes that a quantization moves; `down`'s reads a gate too."""
    moved = [(2.5 + (2.0 if name == "down" else 0.0)) * width + 4 for name, width, _ in shapes.linears]
    return [copy_of(device, tokens * bytes_of_one) for bytes_of_one in moved]


def _float_layer(device: torch.device, shapes: Shapes, tokens: int) -> Call:
    """fp16 linears, and the SiLU · up that `kron_quant` has in its read."""
    ffn = shapes.ffn[0] * shapes.ffn[1]
    gate, up = normal(device, tokens, ffn), normal(device, tokens, ffn)
    linears = [_linear(device, tokens, width, out) for _, width, out in shapes.linears]
    return one_after_another(*linears, lambda: silu(gate) * up)


# ---- The KV cache. ----


def kv_quant_works(shapes: Shapes, tokens: int) -> Iterator[Work]:
    """Transform, quantize and append the keys of one sequence; the copy moves the same bytes."""
    heads, width = shapes.kv_heads, shapes.head_dim
    moved = tokens * heads * (2 * width + width / 2 + 5)
    yield Work(
        "kv_quant",
        f"{heads}x{width} int4",
        tokens,
        bytes=moved,
        operations=2.0 * tokens * heads * width * width,
        unit="float16",
        make=partial(_kv_quant, heads=heads, width=width, tokens=tokens),
        baselines={"copy": partial(copy_of, moved=moved)},
    )


def _kv_quant(device: torch.device, heads: int, width: int, tokens: int) -> Call:
    from flatq_cli.kernels.kv_quant import kv_quant_

    x, matrix, clip = normal(device, 1, heads, tokens, width), orthogonal(width, device), torch.ones(2, device=device)
    codes, scale, zero = _cache(device, 1, heads, tokens, width)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    return lambda: kv_quant_(x, matrix, clip, codes, scale, zero, start)


def _cache(device: torch.device, batch: int, heads: int, capacity: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = random_bytes(device, batch, heads, capacity, width // 2)
    scale = torch.rand(batch, heads, capacity, device=device) / 8
    zero = torch.randint(0, 16, (batch, heads, capacity), device=device, dtype=torch.uint8)
    return codes, scale, zero


def attention_works(
    shapes: Shapes, batches: Sequence[int], lengths: Sequence[int], masked: bool = False
) -> Iterator[Work]:
    """One new token a sequence over a full cache, against sdpa over an fp16 cache; bytes are the packed cache's, and
    the mask's if there is one (`masked`), as decode steps over a static cache have it.
    """
    heads, kv_heads, width = shapes.heads, shapes.kv_heads, shapes.head_dim
    for length in lengths:
        for batch in batches:
            yield Work(
                "kv_attention",
                f"{batch} x {length} keys{', masked' if masked else ''}",
                batch,
                bytes=2.0 * batch * kv_heads * length * (width / 2 + 5)
                + 4.0 * batch * heads * width
                + batch * length * masked,
                operations=4.0 * batch * heads * width * length,
                unit="float16",
                make=partial(_attention, shapes=shapes, batch=batch, length=length, masked=masked),
                baselines={"sdpa fp16": partial(_sdpa, shapes=shapes, batch=batch, length=length, masked=masked)},
            )


def _attention(device: torch.device, shapes: Shapes, batch: int, length: int, masked: bool) -> Call:
    from flatq_cli.kernels.kv_attention import kv_attention

    query = normal(device, batch, shapes.heads, 1, shapes.head_dim)
    keys = _cache(device, batch, shapes.kv_heads, length, shapes.head_dim)
    values = _cache(device, batch, shapes.kv_heads, length, shapes.head_dim)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    mask = torch.ones(batch, 1, length, dtype=torch.bool, device=device) if masked else None
    return lambda: kv_attention(query, *keys, *values, lengths, softmax_scale=shapes.head_dim**-0.5, mask=mask)


def _sdpa(device: torch.device, shapes: Shapes, batch: int, length: int, masked: bool) -> Call:
    query = normal(device, batch, shapes.heads, 1, shapes.head_dim)
    keys = normal(device, batch, shapes.kv_heads, length, shapes.head_dim)
    values = normal(device, batch, shapes.kv_heads, length, shapes.head_dim)
    mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device) if masked else None
    return lambda: scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
