"""What a figure of the benchmark means, and what the report says of it."""

import json

import pytest

from flatq_cli.kernels import bench, bench_report
from flatq_cli.kernels.bench_report import Row
from tests.kernels.bench_parts import RATES, device


def row(**changes) -> Row:
    values = {
        "op": "kron_quant",
        "size": "64x64 int4",
        "tokens": 2048,
        "bytes": 2e6,
        "operations": 1e8,
        "unit": "float16",
    }
    return Row(**{**values, "seconds": 4e-6, "baselines": {"copy": 3e-6}, **changes})


def test_the_roofline_is_the_slower_of_memory_and_tensor_cores():
    assert bench_report.roofline_seconds(row(), RATES) == pytest.approx(2e-6)
    assert bench_report.roofline_seconds(row(operations=1e9), RATES) == pytest.approx(1e-5)
    assert bench_report.roofline_seconds(row(operations=1e9, unit="int4"), RATES) == pytest.approx(2.5e-6)


def test_a_row_says_bandwidth_fraction_bound_and_speedups():
    data = bench_report.row_json(row(), RATES)
    assert data["bytes_per_second"] == pytest.approx(5e11)
    assert data["roofline_fraction"] == pytest.approx(0.5)
    assert data["bound"] == "memory"
    assert data["speedups"] == {"copy": pytest.approx(0.75)}


def test_a_row_that_was_not_measured_has_no_figures():
    data = bench_report.row_json(row(seconds=None, error="no time left"), RATES)
    assert (data["bytes_per_second"], data["roofline_fraction"], data["speedups"]) == (None, None, {})


def goal(rows, part):
    found = [
        one for one in bench_report.goals([bench_report.row_json(one, RATES) for one in rows]) if part in one["goal"]
    ]
    assert len(found) == 1
    return found[0]["value"], found[0]["met"]


def test_a_goal_takes_the_worst_figure_of_the_sizes_it_speaks_of():
    rows = [
        row(seconds=2.2e-6),
        row(seconds=2.1e-6),
        row(seconds=9e-6, tokens=16),
        row(seconds=9e-6, size="128x224 int4"),
    ]
    value, met = goal(rows, "n 1536 to 8192")
    assert value == pytest.approx(2 / 2.2)
    assert met
    assert goal(rows, "larger n") == (pytest.approx(2 / 9), False)
    assert goal(rows, "kv_attention") == (None, None)


def test_the_transforms_cost_is_the_speedup_that_a_layer_loses():
    layer = row(op="layer", size="L", seconds=1.25e-3, baselines={"fp16": 2.5e-3, "no transforms": 1e-3})
    assert goal([layer], "lost to the transforms") == (pytest.approx(0.5), False)
    assert goal([row(op="layer", tokens=16, seconds=1.0, baselines={"fp16": 1.8})], "1 to 16 tokens") == (
        pytest.approx(1.8),
        True,
    )


def test_the_report_is_written_under_the_gpus_name_and_says_if_it_is_not_complete(tmp_path):
    report = bench.Report(tmp_path, device())
    report.rates = RATES
    report.rows += [row(), row(seconds=None, error="no time left", tokens=1)]
    report.check("tests", True, "3 passed")
    report.finish()
    assert [path.name for path in report.files] == [
        "kernels-nvidia-geforce-rtx-4090.json",
        "kernels-nvidia-geforce-rtx-4090.md",
    ]
    data, page = json.loads(report.files[0].read_text()), report.files[1].read_text()
    assert data["rows"][0]["roofline_fraction"] == pytest.approx(0.5)
    assert not data["complete"]
    assert "**not complete**" in page
    assert "| 64x64 int4 | 2,048 | 4.0 | 500 | 0.50 | memory | 0.75 |" in page
    assert "| 64x64 int4 | 1 | no time left |" in page
    assert "- tests: 3 passed" in page
    assert not list(tmp_path.glob(".partial*"))


def test_a_failed_check_fails_the_report_and_one_that_could_not_run_does_not(tmp_path):
    report = bench.Report(tmp_path, device())
    report.check("sanitizer", None, "not run")
    assert not report.data["failed"]
    report.check("tests", False, "1 failed")
    assert report.data["failed"]
