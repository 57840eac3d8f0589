"""What `reference` defines: sums of codes that are exact, so that nothing depends on their order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from flatq_cli.quantization.quantizers import fake_quantize
from flatq_cli.runtime.backends import QuantizedActivation
from flatq_cli.runtime.backends.reference import REFERENCE, exact_product
from flatq_cli.runtime.fused import open_fused
from flatq_cli.runtime.layout import SiteLayout
from flatq_cli.runtime.linear import PackedLinear
from flatq_cli.runtime.sites import OnlineSite
from tests.runtime.test_linear import LAYOUTS, rounded_linear
from tests.tiny import FAMILIES, fused_run, tiny_tokens


@settings(deadline=None, max_examples=60)
@given(
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    sizes=st.tuples(st.integers(0, 5), st.integers(1, 3000), st.integers(1, 4)),
    greatest=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_of_codes_are_those_of_integers_rounded_once(bits, sizes, greatest, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, width, out = sizes
    ends = [2**count for count in bits]
    a, b = (
        torch.full(shape, end) if greatest else torch.randint(-end, end + 1, shape, generator=generator)
        for end, shape in zip(ends, ((rows, width), (out, width)), strict=True)
    )
    exact = a @ b.T
    found = exact_product(a.float(), b.float(), ends[0] * ends[1])
    assert torch.equal(found, exact.float())
    assert torch.equal(exact_product(a.double(), b.double(), ends[0] * ends[1]), exact.double())


def site_of(bits: int, symmetric: bool, width: int = 24) -> OnlineSite:
    site = OnlineSite(SiteLayout("mlp_in", width, 1, width, False, False, False, bits, symmetric, clip=True))
    site.clip.copy_(torch.tensor([0.8, 0.9]))
    site.feeds_packed = True
    return site


@pytest.mark.parametrize(("bits", "group", "symmetric"), LAYOUTS)
@pytest.mark.parametrize("activations", [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_linear_on_codes_is_the_fake_quant_linear_up_to_rounding(bits, group, symmetric, activations, dtype):
    packed, plain = rounded_linear(bits, group, symmetric)
    x = torch.randn(3, 5, 24).to(dtype)
    site = site_of(*activations)
    codes = REFERENCE.site(site, x)
    assert isinstance(codes, QuantizedActivation)
    # Of 16 bits, the scale of x is rounded in the dequantized numbers and is not in the codes'.
    wide = fake_quantize(x if dtype == torch.float64 else x.float(), *activations, site.clip)
    wanted = functional.linear(wide.double(), plain.weight.double(), plain.bias.double())
    found = packed(codes)
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    # A double's quantizer computes in doubles; the weight's scale is a float32 all the same.
    precision = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-8 * (2 if group else 1)}[dtype]
    assert float((found - wanted).abs().max()) <= precision * float(wanted.abs().max())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_order_of_the_inputs_changes_nothing(bits):
    generator = torch.Generator().manual_seed(bits)
    width = 1536
    codes = torch.randint(-8, 8, (64, width), generator=generator)
    scale = torch.rand(64, 1, generator=generator)
    x = torch.randn(9, width, generator=generator)
    found = []
    for order in (torch.arange(width), torch.randperm(width, generator=generator)):
        linear = PackedLinear.from_codes(codes[:, order], scale, None, None, 4, True)
        found.append(REFERENCE.linear(linear, REFERENCE.site(site_of(bits, True, width), x[:, order].contiguous())))
    assert torch.equal(*found)


def test_gradients_flow_through_a_site_that_feeds_packed_linears():
    site, x = site_of(4, True), torch.randn(3, 24, requires_grad=True)
    y = REFERENCE.site(site, x)
    assert type(y) is torch.Tensor
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        assert isinstance(REFERENCE.site(site, x), QuantizedActivation)


def test_what_is_kept_under_inference_mode_is_of_use_outside_it():
    packed, _ = rounded_linear(4, 0, True)
    packed.stays_unpacked = True
    x = torch.randn(3, 24)
    with torch.inference_mode():
        expected = packed(x)
    x.requires_grad_()
    y = packed(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("activations", [(4, True), (16, True)])
def test_a_weight_that_stays_unpacked_is_unpacked_once_and_gives_the_same(activations, monkeypatch):
    packed, _ = rounded_linear(4, 0, False)
    x = REFERENCE.site(site_of(*activations), torch.randn(3, 24))
    expected, unpack, calls = packed(x), PackedLinear.codes, []
    monkeypatch.setattr(PackedLinear, "codes", lambda self: calls.append(self) or unpack(self))
    packed.stays_unpacked = True
    assert torch.equal(packed(x), expected)
    assert torch.equal(packed(x), expected)
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sections", [{}, {"weights": {"symmetric": False}, "activations": {"symmetric": False}}])
def test_a_model_is_the_one_with_dequantized_weights_and_plain_linears(tmp_path: Path, family, sections):
    """In float64, where no code falls on the other side of a tie."""
    model = open_fused(fused_run(tmp_path, family, **sections)).assemble(dtype=torch.float64)
    found = model(tiny_tokens()).logits
    replaced = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, PackedLinear):
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, dtype=torch.float64)
                plain.weight.copy_(child.dequantize())
                if child.bias is not None:
                    plain.bias.copy_(child.bias)
                plain._forward_pre_hooks = child._forward_pre_hooks  # sites in front of a linear
                setattr(parent, name, plain)
                replaced += 1
    assert replaced == 7 * model.config.num_hidden_layers
    for site in (module for module in model.modules() if isinstance(module, OnlineSite)):
        site.feeds_packed = False
    wanted = model(tiny_tokens()).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
