from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from flatq_cli.quantization.quantizers import fake_quantize, quantize
from flatq_cli.runtime.backends import BACKENDS, QuantizedActivation, cpu, set_backend
from flatq_cli.runtime.backends.cpu import FEW_ROWS, Weights, round_row, round_rows
from flatq_cli.runtime.kv_cache import PackedStates
from flatq_cli.runtime.layout import SiteLayout
from flatq_cli.runtime.linear import PackedLinear
from flatq_cli.runtime.sites import OnlineSite
from flatq_cli.stages.export import export
from flatq_cli.store.progress import SilentProgress
from tests.runtime.test_linear import LAYOUTS, rounded_linear
from tests.tiny import FAMILIES, fused_run, tiny_tokens

CPU = BACKENDS["cpu"]
pytestmark = pytest.mark.skipif(CPU.why_not() is not None, reason=f"backend cpu: {CPU.why_not()}")
ROWS = (1, 2, FEW_ROWS, FEW_ROWS + 1, 40)


def rows_of_all_kinds(width: int = 24) -> torch.Tensor:
    """Random rows; zeros, one sign only, ties, tiny numbers, one loud entry."""
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2] = x[2].abs() + 0.1
    x[3] = -x[3].abs() - 0.1
    x[4] = torch.arange(width) / 2 - 3.5
    x[5] *= 1e-38
    x[6, 3] = 1e6
    x[7] = -0.0
    return x


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [None, (0.75, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_the_quantizer_bit_for_bit(bits, symmetric, clip, dtype):
    x = rows_of_all_kinds().to(dtype)
    clip = None if clip is None else torch.tensor(clip)
    factors = (1.0, 1.0) if clip is None else tuple(clip.tolist())
    expected, got = quantize(x, bits, symmetric, clip), round_rows(x, bits, symmetric, factors)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scale, expected.scale)
    assert (got.zero is None) == symmetric
    if not symmetric:
        assert torch.equal(got.zero, expected.zero)


def test_a_row_that_is_not_finite_stays_visible_and_harms_no_other():
    x = rows_of_all_kinds()
    x[8, 0], x[9, 1] = float("nan"), float("inf")
    site, (linear, _) = plain_site(4, True), rounded_linear(4, 0, True)
    result = CPU.linear(linear, CPU.site(site, x))
    finite = result.isfinite().all(-1)
    assert finite.logical_not().nonzero().flatten().tolist() == [8, 9]


def plain_site(bits: int, symmetric: bool, width: int = 24) -> OnlineSite:
    layout = SiteLayout("attn_in", width, 4, width // 4, False, False, False, bits=bits, symmetric=symmetric, clip=True)
    site = OnlineSite(layout)
    site.clip.copy_(torch.tensor([0.8, 0.9]))
    site.feeds_packed = True
    return site


@pytest.mark.parametrize(("bits", "group", "symmetric"), LAYOUTS)
@pytest.mark.parametrize("activations", [(4, True), (4, False), (8, True), (8, False), (16, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_float32_output_is_that_of_float64_up_to_rounding(bits, group, symmetric, activations, bias):
    linear, plain = rounded_linear(bits, group, symmetric, bias)
    site = plain_site(*activations)
    for rows in ROWS:
        x = rows_of_all_kinds()[:rows].clone()
        x[:, 3].clamp_(max=10)
        values = fake_quantize(x, *activations, site.clip)
        expected = plain.double()(values.double()).detach()
        got = CPU.linear(linear, CPU.site(site, x.view(1, rows, 24)))
        assert got.shape == (1, rows, 10)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got[0].double(), expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (4, False), (8, True)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation_bits", [4, 16])
def test_16_bit_output_is_that_of_float64_up_to_the_rounding_of_16_bits(dtype, bits, symmetric, bias, activation_bits):
    """With sizes that the int4 kernel takes: 64 inputs, 16 outputs."""
    generator = torch.Generator().manual_seed(1)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if symmetric else (0, 2**bits)
    codes = torch.randint(low, high, (16, 64), generator=generator)
    scale = torch.rand(16, 1, generator=generator) + 0.5
    zero = None if symmetric else torch.randint(0, 2**bits, (16, 1), generator=generator)
    offset = torch.randn(16, generator=generator) if bias else None
    linear = PackedLinear.from_codes(codes, scale, zero, offset, bits, symmetric)
    assert Weights(linear).int4_fits == (bits <= 4)
    site = plain_site(activation_bits, True, 64)
    for rows in ROWS:
        x = torch.randn(rows, 64, generator=generator).to(dtype)
        values = fake_quantize(x, activation_bits, True, site.clip)
        weight = scale.double() * (codes - (0 if zero is None else zero))
        expected = values.double() @ weight.T + (0 if offset is None else offset)
        got = CPU.linear(linear, CPU.site(site, x))
        assert got.dtype == dtype
        precision = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2 * precision * float(expected.abs().max()))


def test_a_site_of_integer_linears_gives_codes_and_others_give_floats():
    x = torch.randn(2, 3, 24)
    result = CPU.site(plain_site(4, False), x)
    assert isinstance(result, QuantizedActivation)
    assert result.codes.dtype == torch.int8
    assert torch.equal(result.values(), fake_quantize(x, 4, False, torch.tensor([0.8, 0.9])))
    for layout in ("key", "value"):
        site = OnlineSite(SiteLayout(layout, 24, 1, 24, False, False, False, bits=4, symmetric=True, clip=False))
        assert type(CPU.site(site, x)) is torch.Tensor
        assert torch.equal(CPU.site(site, x), fake_quantize(x, 4, True))
    assert type(CPU.site(plain_site(16, True), x)) is torch.Tensor


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_go_into_the_cache_as_torch_puts_them_there(symmetric):
    from flatq_cli.runtime.kv_cache import packed_rows

    layout = SiteLayout("key", 24, 1, 24, False, True, False, bits=4, symmetric=symmetric, clip=True)
    site, x = OnlineSite(layout), torch.randn(2, 3, 5, 24)
    site.right.copy_(torch.randn(24, 24))
    site.clip.copy_(torch.tensor([0.8, 0.9]))
    expected = packed_rows(site, x)
    parts = tuple(torch.zeros(2, 3, 9, *part.shape[3:], dtype=part.dtype) for part in expected)
    assert CPU.store(site, x, parts, 2)
    for part, rows in zip(parts, expected, strict=True):
        assert torch.equal(part[:, :, 2:7], rows)
        assert not part[:, :, :2].any()
        assert not part[:, :, 7:].any()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("width", [1, 24, 576])
def test_one_row_is_rounded_as_many_are(bits, width):
    generator = torch.Generator().manual_seed(width)
    inf, nan = float("inf"), float("nan")
    rows = [torch.randn(1, 1, width, generator=generator) * 10.0**power for power in range(-6, 7)]
    rows += [torch.zeros(1, 1, width), *(rows[6].clone() for _ in range(3))]
    for row, bad in zip(rows[-3:], (nan, inf, -inf), strict=True):
        row[..., 0] = bad
    for row in (*rows, *(row.abs() for row in rows), *(-row.abs() for row in rows)):
        for clip in ((1.0, 1.0), (0.7, 0.95), (0.95, 0.7)):
            one, many = round_row(row.clone(), bits, clip), round_rows(row.clone(), bits, True, clip)
            assert torch.equal(one.codes.nan_to_num(), many.codes.nan_to_num())
            assert torch.equal(one.scale.nan_to_num(), many.scale.nan_to_num())


@torch.no_grad()
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("start", [0, 5])
def test_a_token_attends_to_packed_keys_as_sdpa_does_to_their_numbers(heads, start):
    generator = torch.Generator().manual_seed(heads)

    def states() -> PackedStates:
        codes = torch.randint(256, (3, 2, 40, 8), dtype=torch.uint8, generator=generator)
        scale = torch.rand(3, 2, 40, generator=generator)
        zero = torch.randint(16, (3, 2, 40), dtype=torch.uint8, generator=generator)
        return PackedStates(codes, scale, zero, start, 33, 4, 16)

    keys, values = states(), states()
    query = torch.randn(3, heads, 1, 16, generator=generator).bfloat16()
    found = CPU.attend(query, keys, values, None, 0.3)
    numbers = (states.dequantize(torch.float64) for states in (keys, values))
    wanted = functional.scaled_dot_product_attention(query.double(), *numbers, scale=0.3, enable_gqa=True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-4)
    assert CPU.attend(query.float(), keys, values, None, 0.3) is None  # as `reference`, to the last digit
    assert CPU.attend(query.expand(3, heads, 2, 16), keys, values, None, 0.3) is None
    assert CPU.attend(query, keys, values, torch.ones(3, 1, 1, 33 - start, dtype=torch.bool), 0.3) is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_any_layout_and_no_rows_at_all_are_fine(dtype, rows):
    (linear, _), site = rounded_linear(4, 0, True), plain_site(4, True)
    x = torch.randn(24, rows, 2, dtype=dtype).permute(2, 1, 0)
    assert not x.is_contiguous() or rows == 0
    assert torch.equal(CPU.linear(linear, CPU.site(site, x)), CPU.linear(linear, CPU.site(site, x.contiguous())))
    assert CPU.linear(linear, CPU.site(site, x)).shape == (2, rows, 10)


def test_weights_are_kept_only_while_the_machine_has_room(monkeypatch):
    linear, _ = rounded_linear(4, 0, True)
    x = CPU.site(plain_site(4, True), rows_of_all_kinds())
    first = CPU.linear(linear, x)
    assert list(linear.prepared(Weights)._kept) == ["int8"]
    monkeypatch.setattr(cpu, "has_room", lambda size: False)
    linear.drop_prepared()
    assert torch.equal(CPU.linear(linear, x), first)
    assert linear.prepared(Weights)._kept == {}


def test_gradients_flow_as_through_the_reference():
    site, x = plain_site(4, True), torch.randn(3, 24, requires_grad=True)
    CPU.site(site, x).sum().backward()
    assert x.grad.abs().sum() > 0


# ---- Models. ----


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = fused_run(tmp_path_factory.mktemp("run"), request.param, epochs=1)
    return Path(export(run, "flatq", None, SilentProgress())["path"])


def load(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@torch.no_grad()
def test_logits_are_those_of_the_reference_bit_for_bit(directory: Path):
    model, ids = load(directory), tiny_tokens()
    expected = model(ids).logits
    assert set_backend(model, "cpu") == "cpu"
    got = model(ids).logits
    assert torch.equal(got, expected)
    assert set_backend(model, "reference") == "reference"
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_that_is_moved_to_float64_is_computed_as_the_reference_does(directory: Path, batch: int):
    model, ids = load(directory).double(), tiny_tokens(batch)
    expected = model(ids).logits
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = CPU
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_generation_is_that_of_the_reference(directory: Path):
    model, ids = load(directory), tiny_tokens(batch=1, length=6)
    options = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    set_backend(model, "auto")
    assert model.model.layers[0].mlp.up_proj.backend is CPU
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    # In float32 to the last bit, over the packed cache too: what is measured does not depend on the backend.
    assert all(torch.equal(one, other) for one, other in zip(found.logits, expected.logits, strict=True))


@torch.no_grad()
def test_an_activation_is_quantized_once_and_read_by_all_its_linears(directory: Path, monkeypatch):
    model = load(directory)
    set_backend(model, "cpu")
    sites, read = [], []
    site, linear = type(CPU).site, type(CPU).linear

    def counted_site(self, module, x):
        result = site(self, module, x)
        sites.append(result)
        return result

    def counted_linear(self, module, x):
        read.append(x)
        return linear(self, module, x)

    monkeypatch.setattr(type(CPU), "site", counted_site)
    monkeypatch.setattr(type(CPU), "linear", counted_linear)
    model(tiny_tokens(), use_cache=False)
    codes = [result for result in sites if isinstance(result, QuantizedActivation)]
    layers = model.config.num_hidden_layers
    assert len(codes) == 4 * layers
    assert len(read) == 7 * layers
    assert [sum(x is one for x in read) for one in codes] == [3, 1, 2, 1] * layers


@torch.no_grad()
def test_the_state_and_what_is_saved_do_not_change(directory: Path, tmp_path: Path):
    model = load(directory)
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    set_backend(model, "cpu")
    model(tiny_tokens())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path / "after")
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[1][name], tensor) for name, tensor in saved[0].items())


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_reference_in_bfloat16(directory: Path):
    exact = load(directory)(tiny_tokens()).logits
    model = load(directory, torch.bfloat16)
    reference = float((model(tiny_tokens()).logits - exact).square().mean())
    set_backend(model, "cpu")
    assert float((model(tiny_tokens()).logits - exact).square().mean()) < 2 * reference


def test_products_are_exact_on_a_cpu_without_vnni():
    """There oneDNN adds pairs of products in 16 bits, in which those of 8-bit weights do not fit."""
    code = """
import torch
from flatq_cli.runtime.backends import BACKENDS, QuantizedActivation
from tests.runtime.test_linear import rounded_linear
assert BACKENDS["cpu"].why_not() is None
for bits in (4, 8):
    linear, plain = rounded_linear(bits, 0, True, False)
    codes = torch.full((9, linear.in_features), 127, dtype=torch.int8)
    x = QuantizedActivation(codes, torch.ones(9, 1), None, codes.shape, torch.float32, 8, None)
    exact = codes.double() @ plain.weight.double().T
    torch.testing.assert_close(BACKENDS["cpu"].linear(linear, x).double(), exact, rtol=1e-4, atol=1e-3)
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
