import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatq_cli.transforms.factorize import factor


@given(st.integers(1, 20000))
def test_any_width_splits_into_two_ordered_factors(width):
    n1, n2 = factor(width)
    assert 1 <= n1 <= n2
    assert n1 * n2 == width


@pytest.mark.parametrize(
    ("width", "sizes"),
    [
        (576, (24, 24)),
        (1536, (32, 48)),
        (4096, (64, 64)),
        (11008, (86, 128)),
        (14336, (112, 128)),
        (18944, (128, 148)),
        (13824, (108, 128)),
        (4864, (64, 76)),
        (53248, (208, 256)),
        (6, (2, 3)),  # ≡ 2 (mod 4)
        (2050, (41, 50)),
        (49, (7, 7)),
        (1, (1, 1)),
        (4099, (1, 4099)),  # a prime: dense
    ],
)
def test_widths_of_real_models_split_near_the_square(width, sizes):
    assert factor(width) == sizes


@given(st.integers(1, 5000))
def test_no_other_pair_is_cheaper_on_tiles_of_16_or_as_cheap_and_more_square(width):
    def cost(pair):
        return sum((size + 15) // 16 for size in pair), pair[1] - pair[0]

    assert factor(width) == min(
        ((n, width // n) for n in range(1, width + 1) if width % n == 0 and n <= width // n), key=cost
    )


@pytest.mark.parametrize("width", [0, -4])
def test_a_width_below_one_is_refused(width):
    with pytest.raises(ValueError, match="at least 1"):
        factor(width)
