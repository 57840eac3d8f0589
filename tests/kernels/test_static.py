"""What compiling tells: every kernel on every architecture, occupancy, and machine code read rightly."""

import shutil
from importlib.util import find_spec

import pytest

from flatq_cli.kernels import sass, static
from flatq_cli.kernels.cases import Case, Least
from flatq_cli.kernels.compiler import compile_kernel
from flatq_cli.kernels.device import LIMITS, Kernel
from flatq_cli.kernels.errors import KernelError

pytest.importorskip("cupy", reason="compiling needs CuPy")

SASS = """
	.section	.text.other,"ax",@progbits
        /*0000*/                   HMMA.16816.F32 R12, R12, R2, R4 ;
	.section	.text.mine,"ax",@progbits
mine:
.text.mine:
        /*0000*/                   S2R R7, SR_TID.X ;
        /*0010*/               @P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   LDS.128 R8, [UR5] ;
.L_x_2:
        /*0030*/                   HMMA.16816.F32 R12, R12, R2, R4 ;
        /*0040*/             @!UPT UIADD3 URZ, URZ, URZ, URZ ;
        /*0050*/                   IMMA.16832.S8.S8 R4, R16, R2.reuse, R4 ;
        /*0060*/              @!P2 BRA `(.L_x_2) ;
        /*0070*/                   STG.E desc[UR16][R24.64], RZ ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""


def test_the_main_loop_is_the_innermost_one_with_tensor_core_instructions():
    counts = sass.counts(sass.parse(SASS, "mine"))
    assert (counts.hmma, counts.imma) == (1, 1)
    assert counts.issue_per_mma == 4 / 2


def test_a_loop_left_and_continued_at_several_places_is_one_loop():
    text = SASS.replace(
        "/*0070*/                   STG.E", "/*0070*/               @P1 BRA `(.L_x_2) ;\n        /*0078*/ STG.E"
    )
    assert sass.counts(sass.parse(text, "mine")).issue_per_mma == 5 / 2


def test_without_a_loop_the_whole_kernel_counts():
    text = SASS.replace("BRA `(.L_x_2)", "NOP").replace("BRA `(.L_x_1)", "NOP")
    assert sass.counts(sass.parse(text, "mine")).issue_per_mma == 11 / 2


def test_other_functions_and_kernels_without_mma_do_not_count():
    assert sass.counts(sass.parse(SASS, "other")).hmma == 1
    assert sass.counts(sass.parse(SASS, "absent")) is None
    assert sass.counts(sass.parse(SASS.replace("HMMA", "FFMA").replace("IMMA", "IMAD"), "mine")).issue_per_mma is None


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        (80, 192, 164, 60_000, 2),  # registers
        (80, 192, 164, 90_000, 1),  # shared memory
        (80, 256, 125, 0, 2),
        (86, 448, 126, 90_000, 1),
        (86, 64, 32, 0, 16),  # blocks
        (80, 1024, 32, 0, 2),  # warps
        (86, 1024, 32, 0, 1),
        (90, 128, 255, 0, 2),
        (90, 1024, 128, 0, 0),  # more registers than an SM has
        (86, 128, 32, 100 * 1024, 0),  # more shared memory than a block may have
        (86, 128, 32, 49 * 1024, 2),  # two, with the kilobyte that the system takes of each
        (86, 128, 32, 49 * 1024 + 1, 1),
        (80, 96, 255, 0, 2),
    ],
)
def test_occupancy_is_what_nvidias_calculator_says(arch, threads, registers, shared, blocks):
    assert static.blocks_per_multiprocessor(LIMITS[arch], threads, registers, shared) == blocks


SCHEMA = """
    name n1 n2 arch registers spill_bytes local_bytes shared_bytes ctas_per_sm warps_per_sm hmma imma issue_per_mma
    sectors_read sectors_written sectors_min wavefronts wavefronts_min mma mma_min barriers
"""


@pytest.fixture
def case(tmp_path, monkeypatch):
    """A small kernel of its own, in a folder that takes the place of the sources."""
    shutil.copy(static_sources() / "ptx.cuh", tmp_path)
    (tmp_path / "toy.cu").write_text(
        '#include "ptx.cuh"\n'
        'extern "C" __global__ void __launch_bounds__(128) toy(const u32* x, float* y, int n) {\n'
        "    FLATQ_SHARED(buffer);\n"
        "    float d[4] = {};\n"
        "    for (int i = 0; i < n; ++i) {\n"
        "        u32 a[4] = {load(x + i), 1, 2, 3}, b[2] = {load(x + i + 32), 5};\n"
        "        mma_m16n8k16(F16{}, d, a, b);\n"
        "    }\n"
        "    y[threadIdx.x] = d[0] + d[1] + d[2] + d[3] + buffer[n];\n"
        "}\n"
    )
    monkeypatch.setattr("flatq_cli.kernels.sources.kernels_dir", lambda: tmp_path)
    return Case("toy", 16, 8, Kernel("toy.cu", "toy"), 128, 50_000, True, Least(10.0, 1.0), 1, lambda device: None)


def static_sources():
    from flatq_cli.kernels.sources import kernels_dir

    return kernels_dir()


@pytest.fixture
def only_toy(case, monkeypatch):
    monkeypatch.setattr(static, "all_cases", lambda limits, ops: [case, case])


def test_a_row_has_the_schemas_keys_and_no_counters_yet(only_toy):
    rows = static.static_report(archs=(80, 90))
    assert len(rows) == 4
    row = rows[0]
    assert list(row) == SCHEMA.split()
    assert (row["name"], row["n1"], row["n2"], row["arch"], row["shared_bytes"]) == ("toy", 16, 8, 80, 50_000)
    assert (row["spill_bytes"], row["local_bytes"]) == (0, 0)
    assert (row["ctas_per_sm"], row["warps_per_sm"]) == (3, 12)
    assert (row["sectors_min"], row["mma_min"], row["sectors_read"], row["barriers"]) == (10.0, 1.0, None, None)


@pytest.mark.skipif(sass.find_nvdisasm() is None, reason="nvdisasm is not installed")
@pytest.mark.parametrize("arch", static.ARCHS)
def test_the_real_disassembler_is_understood_on_every_architecture(case, arch):
    compiled = compile_kernel(case.kernel, arch)
    counts = sass.count_instructions(compiled.cubin, "toy")
    assert counts.hmma >= 1
    assert counts.imma == 0
    assert 3 <= counts.issue_per_mma <= 40


def test_without_nvdisasm_its_fields_are_null(only_toy, monkeypatch):
    monkeypatch.setattr(sass, "find_nvdisasm", lambda: None)
    row = static.static_report(archs=(80,))[0]
    assert (row["hmma"], row["imma"], row["issue_per_mma"]) == (None, None, None)
    assert row["registers"] > 0


def test_each_distinct_kernel_is_compiled_once_per_architecture(only_toy, monkeypatch):
    seen = []
    monkeypatch.setattr(static, "compile_kernel", lambda *pair: (seen.append(pair), compile_kernel(*pair))[1])
    static.static_report(archs=(80, 86))
    assert len(seen) == 2


ROW = {
    "n1": 64,
    "n2": 64,
    "ctas_per_sm": 2,
    "spill_bytes": 0,
    "local_bytes": 0,
    "sectors_read": 256.0,
    "sectors_written": 64.0,
    "sectors_min": 320.0,
    "wavefronts": 576.0,
    "wavefronts_min": 576.0,
    "mma": 256.0,
    "mma_min": 256.0,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"sectors_read": 272.0}, []),
        ({"sectors_read": 273.0}, ["sectors 1.05 times the least (limit 1.05)"]),
        ({"sectors_read": 320.0, "n1": 62}, []),
        ({"sectors_read": 420.0, "n1": 62, "mma": 300.0}, ["sectors 1.51 times the least (limit 1.3)"]),
        ({"wavefronts": 700.0}, ["wavefronts 1.22 times the least (limit 1.15)"]),
        ({"mma": 257.0}, ["mma 1.00 times the least (limit 1)"]),
        ({"mma": 340.0, "n1": 56}, []),
        ({"spill_bytes": 8, "local_bytes": 16}, ["8 bytes of spills, 16 of local memory"]),
        ({"ctas_per_sm": 0}, ["a block does not fit on an SM"]),
        ({"sectors_read": None, "sectors_written": None}, []),
    ],
)
def test_a_plan_is_judged_by_the_limits_it_is_built_to(change, expected):
    assert static.shortcomings({**ROW, **change}, fast=True) == expected
    assert static.shortcomings({**ROW, **change}, fast=False) == []


# ---- Every kernel there is. ----

OPS = [op for op in static.OPS if find_spec(f"flatq_cli.kernels.{op}")]


@pytest.mark.parametrize("arch", static.ARCHS)
def test_every_kernel_compiles_and_fast_ones_neither_spill_nor_use_local_memory(arch):
    cases = static.all_cases(LIMITS[arch], OPS)
    compiled = static.compile_all([(case.kernel, arch) for case in cases])
    problems = []
    for case in cases:
        found = compiled[case.kernel, arch]
        if case.fast and (found.spill_bytes or found.stack_bytes):
            problems.append((case.name, case.n1, case.n2, found.spill_bytes, found.stack_bytes))
        shared = case.shared_bytes + found.shared_bytes
        if not static.blocks_per_multiprocessor(LIMITS[arch], case.block, found.registers, shared):
            problems.append((case.name, case.n1, case.n2, "does not fit on an SM"))
    assert not problems


@pytest.mark.parametrize("arch", [75])
def test_the_plain_kernels_compile_for_older_gpus(arch):
    static.compile_all([(case.kernel, arch) for case in static.all_cases(LIMITS[arch], OPS)])


def test_a_kernel_that_does_not_compile_fails_the_report(case, monkeypatch):
    broken = Case("x", 1, 1, Kernel("gone.cu", "f"), 32, 0, True, Least(1, 1), 1, lambda device: None)
    monkeypatch.setattr(static, "all_cases", lambda limits, ops: [case, broken])
    with pytest.raises(KernelError, match=r"gone\.cu"):
        static.static_report(archs=(80,))
