import pytest
import torch

from flatq_cli.quantization.quantizers import fake_quantize_grouped
from flatq_cli.quantization.weights import CODES, SCALE, ZERO, dequantize_weight, groups_of, round_weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [0, 4])
def test_stored_codes_give_the_fake_quantized_weight_to_the_bit(bits, symmetric, group):
    g = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 12, generator=g)
    clip = 0.6 + 0.4 * torch.rand(6, groups_of(12, group), 2, generator=g)
    stored = round_weight(weight, bits, group, symmetric, clip)
    assert stored[CODES].dtype == (torch.uint8 if bits == 8 and not symmetric else torch.int8)
    assert stored[SCALE].dtype == torch.float32
    assert (ZERO in stored) != symmetric
    assert torch.equal(dequantize_weight(stored), fake_quantize_grouped(weight, bits, group, symmetric, clip))
