"""kron_quant's CUDA text, run by the emulator (and, where there is one, by a GPU), against float64."""

import shutil
from dataclasses import replace

import pytest
import torch

from flatq_cli.kernels.codes import quantize_rows, unpack_codes
from flatq_cli.kernels.kron_plan import KronSize, kron_plans, plain_plan
from flatq_cli.kernels.kron_quant import kron_quant, kron_quant_reference, launch_kron_quant, prepare_kron
from flatq_cli.kernels.sources import kernels_dir

F16, BF16 = torch.float16, torch.bfloat16
# Of int4 codes, those that rounding U to 16 bits may move by one; int8 steps are 18 times as fine.
SCALE_ERROR = 1e-3
SHARE = {4: 0.0006, 8: 0.008}
WHERE = ["emulator", pytest.param("gpu", marks=pytest.mark.gpu)]

SIZES = [
    (16, 16), (24, 24), (32, 48), (64, 64), (48, 96), (64, 128), (112, 128), (128, 148), (128, 224), (208, 256),
    (86, 128), (37, 53), (1, 7), (3, 1), (1, 1), (9, 130), (100, 20), (16, 255),
]  # fmt: skip


def emulator(**options):
    from tests.cuda_emulator.device import EmulatedDevice

    return EmulatedDevice(**{"arch": 80, "multiprocessors": 2} | options)


def normal(*shape, seed=0, dtype=F16):
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


class Problem:
    """Random tokens of a size, run on a device and compared with float64."""

    def __init__(self, n1, n2, tokens, *, dtype=F16, left=True, right=True, prologue="none", **options):
        self.n, self.dtype, self.options = n1 * n2, dtype, {"bits": 4, "symmetric": True} | options
        self.kron = prepare_kron(
            normal(n1, n1, seed=1) / n1**0.5 if left else None, normal(n2, n2, seed=2) / n2**0.5 if right else None,
            dtype, self.n,
        )  # fmt: skip
        self.x = normal(tokens, self.n, dtype=dtype)
        self.clip = torch.tensor([0.85, 0.95])
        self.prologue = prologue
        self.extra = {
            "none": {},
            "norm": {"norm_weight": normal(self.n, seed=3, dtype=dtype)},
            "gate": {"gate": normal(tokens, self.n, seed=4, dtype=dtype)},
        }[prologue]

    @property
    def size(self):
        kron, options = self.kron, self.options
        name = "F16" if self.dtype == F16 else "BF16"
        return KronSize(
            kron.n1, kron.n2, kron.left is not None, kron.right is not None, name, options["bits"],
            options["symmetric"], self.prologue,
        )  # fmt: skip

    def run(self, where="emulator", plan=None):
        if where != "gpu":
            device = emulator() if where == "emulator" else where
            return launch_kron_quant(device, self.x, self.kron, self.clip, plan=plan, **self.options, **self.extra)
        left, right = (None if m is None else m.cuda() for m in (self.kron.left, self.kron.right))
        kron = prepare_kron(left, right, self.dtype, self.n)
        extra = {name: tensor.cuda() for name, tensor in self.extra.items()}
        found = kron_quant(self.x.cuda(), kron, self.clip.cuda(), **self.options, **extra)
        return type(found)(*(tensor if tensor is None else tensor.cpu() for tensor in found))

    def values(self, round_u=False):
        """The transformed rows in float64, the prologue (and U = leftᵀ X, as on tensor cores) rounded to 16 bits."""
        x = self.x.double()
        if self.prologue == "norm":
            x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.extra["norm_weight"].double()
        if self.prologue == "gate":
            gate = self.extra["gate"].double()
            x = gate * gate.sigmoid() * x
        rows = x.to(self.dtype).double().reshape(-1, self.kron.n1, self.kron.n2)
        rows = rows if self.kron.left is None else self.kron.left.double().mT @ rows
        rows = (rows / 4).half().double() * 4 if round_u else rows  # bf16 passes through fp16, too
        rows = rows if self.kron.right is None else rows @ self.kron.right.double()
        return rows.reshape(self.x.shape)

    def check(self, found, share=None, rounds_u=True):
        """Codes, scales and zero points are those of float64 but for what the kernel's rounding may move."""
        bits, symmetric = self.options["bits"], self.options["symmetric"]
        rounded = rounds_u and self.kron.left is not None and self.kron.right is not None
        share = SHARE[bits] if share is None else share
        codes, scale, zero = quantize_rows(self.values(), self.clip, bits, symmetric)
        sound = scale.isfinite()
        assert torch.equal(found.scale.isfinite(), sound)
        error = SCALE_ERROR if rounded else 1e-5
        torch.testing.assert_close(found.scale[sound].double(), scale[sound], rtol=error, atol=0)
        self._check_codes(found, sound, codes, zero, share)
        if rounded:
            # Nothing but that rounding is at work: against float64 with U rounded, next to nothing is left (a U on the
            # border of two halves, a value on the border of two codes).
            codes, scale, zero = quantize_rows(self.values(round_u=True), self.clip, bits, symmetric)
            errors = (found.scale[sound] / scale[sound] - 1).abs()
            assert errors.median() < 2e-6
            self._check_codes(found, sound, codes, zero, share / 10)

    def _check_codes(self, found, sound, codes, zero, share):
        steps = unpack_codes(found.codes, self.options["bits"], self.n, self.options["symmetric"]) - codes
        if found.zero is not None:
            shift = found.zero - zero
            assert shift[sound].abs().max() <= 1
            assert (shift[sound] != 0).sum() <= 0.1 * sound.sum() + 1
            steps = steps - shift.unsqueeze(-1)
        steps = steps[sound]
        assert steps.abs().max() <= 1
        expected = share * steps.numel()
        assert (steps != 0).sum() <= expected + 4 * expected**0.5 + 1


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("n1", "n2"), SIZES)
def test_codes_are_float64s(where, n1, n2):
    problem = Problem(n1, n2, 3 if n1 * n2 > 8000 else 19)
    problem.check(problem.run(where))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("n1", "n2", "prologue", "symmetric"),
    [
        (64, 64, "none", False), (24, 24, "norm", True), (32, 48, "gate", False), (37, 53, "norm", False),
        (28, 44, "norm", True), (21, 33, "gate", True),
    ],
)  # fmt: skip
def test_every_kind_of_codes_and_prologue(where, n1, n2, dtype, bits, prologue, symmetric):
    problem = Problem(n1, n2, 18, dtype=dtype, bits=bits, prologue=prologue, symmetric=symmetric)
    problem.check(problem.run(where))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("n1", "n2"), [(9, 64), (24, 40), (168, 176)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_factor_alone(where, n1, n2, side):
    problem = Problem(n1, n2, 2 if n1 > 100 else 18, left=side == "left", right=side == "right")
    problem.check(problem.run(where), share=1e-5)  # no U is rounded


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_of_many_codes_no_more_than_the_promised_share_moves(where, dtype):
    problem = Problem(64, 64, 100, dtype=dtype)
    codes = unpack_codes(problem.run(where).codes, 4, problem.n, True)
    expected, _, _ = quantize_rows(problem.values(), problem.clip, 4, True)
    assert ((codes - expected).abs() <= 1).all()
    assert (codes != expected).double().mean() <= SHARE[4]


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 17, 31])
def test_any_number_of_tokens(tokens):
    problem = Problem(24, 24, tokens)
    problem.check(problem.run())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n1", "n2"), [(24, 24), (37, 53)])
def test_zero_rows_have_scale_one_and_unsound_rows_spoil_no_other(where, n1, n2, symmetric):
    problem = Problem(n1, n2, 20, symmetric=symmetric)
    clean = problem.run(where)
    problem.x[3] = 0
    problem.x[5, -1], problem.x[11, 0], problem.x[17, 30] = torch.nan, torch.inf, -torch.inf
    found = problem.run(where)
    assert found.scale[3] == 1
    assert (unpack_codes(found.codes[3], 4, problem.n, symmetric) == 0).all()
    assert found.scale[[5, 11, 17]].isnan().all()
    others = [i for i in range(20) if i not in (3, 5, 11, 17)]
    assert torch.equal(found.codes[others], clean.codes[others])
    assert torch.equal(found.scale[others], clean.scale[others])


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_the_least_numbers_keep_their_codes(symmetric):
    problem = Problem(16, 16, 18, dtype=BF16, symmetric=symmetric)
    problem.x = (problem.x.double() * 2.0**-11).to(BF16)
    problem.check(problem.run())


@pytest.mark.parametrize("where", WHERE)
def test_bf16_keeps_more_than_fp16s_range_and_what_is_beyond_is_marked(where):
    problem = Problem(16, 16, 18, dtype=BF16)
    problem.x = problem.x * 2.0**15
    problem.check(problem.run(where))
    problem.x = problem.x * 2.0**10
    assert problem.run(where).scale.isnan().all()


@pytest.mark.parametrize("where", WHERE)
def test_a_view_may_begin_anywhere(where):
    problem = Problem(8, 16, 5)
    x = torch.cat([torch.zeros(3, dtype=F16), problem.x.flatten()])
    problem.x = x[3:].reshape(5, 128)
    assert problem.x.data_ptr() % 16 != 0
    problem.clip = torch.tensor([[0.85, 9.0], [0.95, 9.0]])[:, 0]
    problem.check(problem.run(where))


def test_prepared_matrices_may_begin_anywhere():
    problem = Problem(16, 32, 3)
    clean = problem.run()

    def moved(tensor):
        return torch.cat([torch.zeros(1, dtype=F16), tensor.flatten()])[1:].reshape(tensor.shape)

    kron = problem.kron
    problem.kron = replace(kron, prepared_left=moved(kron.prepared_left), prepared_right=moved(kron.prepared_right))
    assert torch.equal(problem.run().codes, clean.codes)


def test_every_plan_gives_the_same_codes():
    problem = Problem(40, 100, 4)
    limits = emulator().limits
    plans = [plan for plan in kron_plans(problem.size, limits, 10**6) if plan.fast]
    # One of each kind of build; blocks of more groups differ by a number.
    kinds = {tuple(v for k, v in plan.kernel.defines if k in ("ROW_TILES", "WARP_TOKENS", "PANEL", "SLOTS",
             "STREAM_RIGHT", "PASSES")): plan for plan in plans}  # fmt: skip
    first, second = None, None
    for kind, plan in list(kinds.items())[:: max(1, len(kinds) // 8)]:
        found = problem.run(plan=plan)
        if kind[-1] == 2:  # half of the rows pass through 16-bit integers
            problem.check(found, share=0.0012)
            second = found
        else:
            first = found if first is None else first
            assert torch.equal(found.codes, first.codes), kind
            assert torch.equal(found.scale, first.scale), kind
    assert first is not None
    assert second is not None


@pytest.mark.parametrize("arch", [86, 90])
@pytest.mark.parametrize(("n1", "n2", "prologue"), [(128, 224, "none"), (128, 148, "gate"), (96, 160, "norm")])
def test_large_sizes_on_other_chips(arch, n1, n2, prologue):
    problem = Problem(n1, n2, 3, prologue=prologue)
    plans = kron_plans(problem.size, emulator(arch=arch).limits, 10**6)
    problem.check(problem.run(emulator(arch=arch), plan=plans[0]))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("n1", "n2", "options"),
    [
        (24, 24, {"prologue": "norm"}), (7, 13, {"symmetric": False, "prologue": "gate"}), (5, 256, {"bits": 8}),
        (12, 20, {"left": False}), (12, 21, {"right": False, "dtype": BF16, "symmetric": False}),
    ],
)  # fmt: skip
def test_the_plain_kernel_is_float32s_definition(where, n1, n2, options):
    problem = Problem(n1, n2, 3, **options)
    if where == "gpu":
        from flatq_cli.kernels.cuda import cuda_device

        device = cuda_device(torch.device("cuda"))
        arguments = {name: tensor.cuda() for name, tensor in problem.extra.items()}
        kron = prepare_kron(
            *(m and m.cuda() for m in (problem.kron.left, problem.kron.right)), problem.dtype, problem.n
        )
        found = launch_kron_quant(
            device, problem.x.cuda(), kron, problem.clip.cuda(), plan=plain_plan(problem.size, device.limits),
            **problem.options, **arguments,
        )  # fmt: skip
        found = type(found)(*(tensor if tensor is None else tensor.cpu() for tensor in found))
    else:
        found = problem.run(emulator(arch=75))
    problem.check(found, share=1e-4, rounds_u=False)
    expected = kron_quant_reference(problem.x, problem.kron, problem.clip, **problem.options, **problem.extra)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0)


ORDERS = ["ascending", "descending", 1, 2]


def test_the_order_of_lanes_and_warps_changes_nothing():
    for size, prologue in (((32, 48), "norm"), ((37, 53), "gate"), ((64, 64), "none")):
        problem = Problem(*size, 17, prologue=prologue, symmetric=False)
        results = [problem.run(emulator(lanes=order)) for order in ORDERS]
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


FAULTS = {
    "the token's barrier": ("kron_quant_output.cuh", "    group_sync(at.group);\n"),
    "the ring's barrier": ("kron_quant.cu", "                block_sync();  // the slot is there"),
    "the wait for copies": ("kron_quant.cu", "                cp_async_wait<LEAD - 1>();\n"),
    "the stage's barrier": ("kron_quant_output.cuh", "        warp_sync();\n        copy_out_unit"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_barrier_left_out_is_found(fault, tmp_path):
    file, text = FAULTS[fault]
    folder = shutil.copytree(kernels_dir(), tmp_path / "kernels")
    source = (folder / file).read_text(encoding="utf-8")
    assert source.count(text) == 1
    without = text.replace("group_sync(at.group);", "").replace("block_sync();", "").replace("warp_sync();", "")
    without = without.replace("cp_async_wait<LEAD - 1>();", "")
    (folder / file).write_text(source.replace(text, without), encoding="utf-8")
    problem = Problem(64, 48, 40)

    def found(order, races):
        return problem.run(emulator(lanes=order, races=races, folder=folder)).codes

    from tests.cuda_emulator.device import EmulatorError

    for order in ORDERS:
        with pytest.raises(EmulatorError, match=r"no barrier between|no cp_async_wait covers it"):
            found(order, races=True)
    if fault != "the wait for copies":  # which the emulator's copies, being done at once, do not need
        assert len({found(order, races=False).numpy().tobytes() for order in ORDERS}) > 1


@pytest.mark.parametrize(
    ("arch", "n1", "n2", "options"),
    [(80, 37, 53, {"prologue": "norm"}), (86, 40, 100, {"prologue": "gate", "bits": 8}), (75, 7, 13, {})],
)
def test_sanitizers_find_nothing(arch, n1, n2, options):
    problem = Problem(n1, n2, 5, symmetric=False, **options)
    problem.check(
        problem.run(emulator(arch=arch, sanitize=True)), rounds_u=arch >= 80, share=None if arch >= 80 else 1e-4
    )
