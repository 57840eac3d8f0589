"""The static report: what counts, what is said of it, and that making it twice gives the same."""

import json
from dataclasses import replace

import pytest

from flatq_cli.kernels import static
from flatq_cli.kernels.cases import Case, Least
from flatq_cli.kernels.device import LIMITS, Kernel
from tests.kernels import report

ROW = {
    **dict.fromkeys(static.FIELDS, 0),
    "name": "kron_quant[int4,f16]",
    "n1": 64,
    "n2": 64,
    "arch": 80,
    "hmma": 48,
    "issue_per_mma": 4.0,
    "ctas_per_sm": 2,
    "warps_per_sm": 12,
    "sectors_read": 256.0,
    "sectors_written": 64.0,
    "sectors_min": 320.0,
    "wavefronts": 331.0,
    "wavefronts_min": 320.0,
    "mma": 256.0,
    "mma_min": 256.0,
    "moved": 320.0,
}
CASE = Case("kron_quant[int4,f16]", 64, 64, Kernel("k.cu", "k"), 32, 0, True, Least(320, 256), 1, lambda device: None)
A100 = next(chip for chip in report.CHIPS if chip.name == "A100")


def test_the_slowest_of_the_four_limits_is_the_prediction():
    assert report.predicted(ROW, A100) == {
        "memory": 320 * A100.sector,
        "L2": 160.0,
        "tensor cores": 512.0,
        "shared memory": 331.0,
        "issue": 256.0,
    }
    assert report.of_a_copy(ROW, A100) == "1.00 memory"
    assert report.of_a_copy({**ROW, "wavefronts": 640 * A100.sector}, A100) == "0.50 shared memory"
    assert report.of_a_copy({**ROW, "sectors_read": None}, A100) == "–"


def test_what_is_read_again_comes_from_l2():
    again = {**ROW, "sectors_read": 6400.0}
    assert report.predicted(again, A100)["memory"] == 320 * A100.sector
    assert report.of_a_copy(again, A100) == f"{320 * A100.sector / 3232:.2f} L2"


def test_the_file_is_json_with_a_line_for_each_row():
    text = report.as_json({"kernels": [ROW, ROW]})
    assert json.loads(text) == {"kernels": [ROW, ROW]}
    assert text.count("\n") == 4


def test_integer_kernels_are_held_to_the_integer_rate():
    chip = replace(A100, hmma=100.0, imma=1.0)
    assert report.predicted({**ROW, "hmma": 0, "imma": 9}, chip)["tensor cores"] == 256


def test_a_shortcoming_is_one_line_with_its_architectures_and_reason():
    rows = [{**ROW, "arch": arch, "wavefronts": 640.0} for arch in (80, 86)]
    (line,) = report._shortcomings([(80, CASE), (86, CASE)], rows)
    assert line == (
        "- kron_quant[int4,f16], 64 × 64: wavefronts 2.00 times the least (limit 1.15), on sm_80, sm_86: not explained"
    )
    page = report.page([(80, CASE)], [ROW], [])
    assert "Nowhere." in page
    assert "| kron_quant[int4,f16] | 64 × 64 | 80 |" in page
    assert "256 + 64 | 1.00 | 331 | 1.03 | 256 | 1.00 |" in page


def test_parameters_are_named_by_the_source(tmp_path, monkeypatch):
    (tmp_path / "k.cu").write_text(
        'extern "C" __global__ void __launch_bounds__(32)\nk(const u16* x, uint4 *left,\n  int n, float* out) {}\n'
    )
    monkeypatch.setattr("flatq_cli.kernels.sources.kernels_dir", lambda: tmp_path)
    assert report.parameter_names(Kernel("k.cu", "k")) == ["x", "left", "n", "out"]


def test_shared_arguments_are_named_as_in_the_sources():
    """A renamed parameter would silently count as a token's."""
    cases = [case for case in static.all_cases(LIMITS[80]) if case.kernel.source.startswith(tuple(report.SHARED))]
    names = {name for case in cases for name in report.parameter_names(case.kernel)}
    assert names >= {name for shared in report.SHARED.values() for name in shared}


@pytest.mark.parametrize("op", ["kv_quant"])
def test_the_emulator_counts_a_case_the_same_each_time(op):
    case = next(case for case in static.all_cases(LIMITS[80], [op]) if case.fast and case.n1 == 64)
    counted = report.count(case, 80)
    assert counted == report.count(case, 80)
    assert set(counted) <= {*static.FIELDS, "moved"}
    assert counted["mma"] >= case.least.mma
    assert counted["sectors_read"] + counted["sectors_written"] >= counted["moved"] >= 0.99 * case.least.sectors


def test_plans_that_architectures_share_are_run_once_and_a_plan_that_fails_is_named(monkeypatch):
    def broken(device):
        raise RuntimeError("out of bounds\nmore")

    other = replace(CASE, n1=32, run=broken)
    monkeypatch.setattr(report, "count", lambda case, arch: case.run(None) or {"mma": arch})
    counted, failures = report.count_all([(80, CASE), (86, CASE), (80, other)], processes=1)
    assert counted == {report.plan_key((80, CASE)): {"mma": 80}}
    assert failures == ["kron_quant[int4,f16] 32x64: out of bounds"]
