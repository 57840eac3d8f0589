"""The benchmark without a GPU: its whole path on the CPU up to the launches, its checks and its commands."""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from flatq_cli.kernels import bench, bench_processes, bench_smoke, bench_work
from flatq_cli.kernels.bench_timing import Budget, WallClock
from flatq_cli.kernels.bench_work import Work
from flatq_cli.kernels.device import LIMITS
from flatq_cli.kernels.errors import KernelError
from tests.kernels.bench_parts import CPU, RATES, device

# ---- The path up to the launches, on the CPU. ----

NEEDED = {"kron_quant": "kron_quant", "w4a4_gemm": "gemm", "w4a8_gemm": "gemm", "layer": "gemm"}


def present(work: Work) -> bool:
    return find_spec(f"flatq_cli.kernels.{NEEDED.get(work.op, work.op)}") is not None


def test_every_work_runs_with_its_baselines_on_data_of_its_own():
    shapes = bench_smoke.SMALL
    works = [
        *bench_work.kron_works(((4, 6),), 3),
        *bench_work.gemm_works(shapes, 3, "w4a4_gemm"),
        *bench_work.gemm_works(shapes, 3, "w4a8_gemm"),
        *bench_work.layer_works(shapes, 2),
        *bench_work.kv_quant_works(shapes, 3),
        *bench_work.attention_works(shapes, batches=(2,), lengths=(9,)),
        *bench_work.attention_works(shapes, batches=(2,), lengths=(9,), masked=True),
    ]
    rows = [bench.measure(work, CPU, WallClock(), Budget(60), 0.0) for work in works if present(work)]
    assert [(one.op, one.error) for one in rows] == [(one.op, None) for one in rows]
    assert all(one.seconds and one.seconds > 0 for one in rows)
    assert all(
        set(one.baselines) == set(work.baselines) for one, work in zip(rows, filter(present, works), strict=True)
    )


def test_the_sizes_are_those_of_real_models_and_the_first_tokens_come_first():
    works = bench_work.all_works()
    assert {work.tokens for work in works if work.op == "kron_quant"} == {1, 16, 128, 2048, 16384}
    assert [work.tokens for work in works[:8]] == [2048] * 8
    assert ("gate_up 4096x28672", 1) in {(work.size, work.tokens) for work in works if work.op == "w4a4_gemm"}
    assert {work.size for work in works if work.op == "kv_attention"} >= {
        "1 x 32768 keys",
        "8 x 1024 keys",
        "8 x 8192 keys, masked",
    }
    kron = next(work for work in works if work.op == "kron_quant" and work.size.startswith("64x64"))
    assert kron.bytes == 2048 * (2.5 * 4096 + 4)
    assert kron.operations == 2048 * 2 * 4096 * 128


def test_a_kernel_that_fails_is_a_row_with_its_error_and_the_rest_goes_on(tmp_path):
    def broken(device):
        raise KernelError("kernel f does not compile: x\nmore")

    works = [
        Work("kron_quant", "1x1", 1, 1, 1, "float16", broken, {"copy": lambda device: lambda: None}),
        Work("kron_quant", "2x2", 1, 1, 1, "float16", lambda device: lambda: None),
    ]
    report = bench.Report(tmp_path, device())
    assert bench.run_works(works, CPU, WallClock(), Budget(60), report.add)
    assert report.data["failed"]
    assert report.rows[0].error == "kernel f does not compile: x"
    assert report.rows[0].baselines["copy"] > 0
    assert report.rows[1].seconds is not None
    assert report.files[0].exists()


def test_a_spent_budget_leaves_rows_that_say_so(tmp_path):
    works = [Work("kron_quant", "1x1", 1, 1, 1, "float16", lambda device: lambda: None)]
    report = bench.Report(tmp_path, device())
    bench.run_works(works, CPU, WallClock(), Budget(0), report.add)
    report.finish()
    assert report.rows[0].error == "no time left"
    assert not report.data["failed"]
    assert not report.data["complete"]


def test_memory_that_does_not_suffice_is_no_fault_of_a_kernel(tmp_path):
    def large(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    report = bench.Report(tmp_path, device())
    bench.run_works([work("kron_quant", large)], CPU, WallClock(), Budget(9), report.add)
    assert report.rows[0].error == "out of memory"
    assert not report.data["failed"]


def work(op="kron_quant", make=lambda device: lambda: None, tokens=1):
    return Work(op, "1x1", tokens, 1.0, 1.0, "float16", make)


def test_a_lost_context_ends_the_works_behind_it_and_is_the_rows_fault():
    class Lost(WallClock):
        def wait(self):
            raise RuntimeError("CUDA error: an illegal memory access")

    rows = []
    assert not bench.run_works([work(), work()], CPU, Lost(), Budget(9), rows.append)
    assert [row.error for row in rows] == ["CUDA error: an illegal memory access"]


CHILD = """
import json, os, sys, time
rows = [int(row) for row in sys.argv[sys.argv.index("--rows") + 1].split(",")]
for row in rows:
    if row == 1:
        os.abort()
    print("warning of a library", flush=True)
    said = {"op": "a", "size": str(row), "tokens": 1, "bytes": 1, "operations": 1, "unit": "int8"}
    print(json.dumps({"row": {**said, "seconds": 1.0}, "notes": [f"note {row}"]}), flush=True)
    if row == 3:
        raise SystemExit(3)
    if row == 4:
        time.sleep(60)
"""


def test_a_work_that_takes_its_process_down_costs_its_row_and_the_next_process_goes_on_behind_it():
    works = [work(op) for op in ("kron_quant", "kron_quant", "layer", "layer", "kv_quant", "gemm", "gemm")]
    told = []
    bench_processes.rows_apart(
        works, [sys.executable, "-c", CHILD], Budget(100), lambda row, notes: told.append((row, notes)), silence=4.0
    )
    assert [row.error for row, _ in told] == [
        None,
        "took its process down (exit code -6)",
        None,
        None,
        None,
        "took its process down (nothing for 4 s)",
        None,
    ]
    assert told[0][0].size == "0"
    assert told[0][1] == ["note 0"]


def test_an_op_that_takes_two_processes_down_is_left_out():
    works = [work("a"), work("a"), work("b"), work("a")]
    told = []
    code = "import sys; sys.exit(5)"
    bench_processes.rows_apart(works, [sys.executable, "-c", code], Budget(60), lambda row, notes: told.append(row))
    assert [(row.op, row.error.partition(" (")[0]) for row in told] == [
        ("a", "took its process down"),
        ("a", "took its process down"),
        ("a", "left out: works of this op took their processes down"),
        ("b", "took its process down"),
    ]


def test_no_process_is_started_without_time():
    told = []
    bench_processes.rows_apart([work()], ["/nowhere"], Budget(0), lambda row, notes: told.append(row.error))
    assert told == ["no time left"]


def test_what_the_works_need_is_compiled_ahead_in_other_processes(monkeypatch, tmp_path):
    pytest.importorskip("cupy")
    from contextlib import contextmanager

    from flatq_cli.kernels.compiler import cache_dir
    from flatq_cli.kernels.gemm import gemm_kernel
    from flatq_cli.kernels.gemm_plan import plain_plan

    monkeypatch.setenv("FLATQ_CACHE_DIR", str(tmp_path))
    kernels = [gemm_kernel(plain_plan(1, 1), bits, False, False, torch.float16) for bits in (4, 8)]
    planned = []

    @contextmanager
    def planning():
        yield planned

    made = [work(make=lambda device, kernel=kernel: lambda: planned.append(kernel)) for kernel in kernels]
    monkeypatch.setattr(bench, "cuda_device", lambda where: SimpleNamespace(limits=LIMITS[90], planning=planning))
    lines = []
    bench.compile_ahead([*made, made[0]], CPU, lines.append)
    assert lines == ["2 of 2 kernels compiled"]
    assert len(list(cache_dir().glob("*.bin"))) == 2


def test_rates_are_operations_over_time(monkeypatch):
    monkeypatch.setattr(bench, "time_calls", lambda make, moved, clock, budget, share: make()() is None or 0.5)
    rates = bench.measure_rates(CPU, WallClock(), Budget(10), arch=89, size=32, warm=0)
    assert rates.copy == 16 * 32 * 32 / 0.5
    assert rates.float16 == rates.int8 == 2 * 32**3 / 0.5
    assert rates.int4 == 2 * rates.int8
    assert bench.measure_rates(CPU, WallClock(), Budget(10), arch=90, size=32, warm=0).int4 == rates.int8


# ---- Checks and commands. ----


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ((0, "..\n12 passed in 3s\n"), (True, "24 passed")),
        (
            (1, "x\nFAILED tests/a.py::b - wrong\n1 failed, 2 passed\n"),
            (False, "FAILED tests/a.py::b - wrong; 1 failed, 2 passed; 14 passed, 1 failed"),
        ),
        ((5, "no tests ran\n"), (False, "no tests ran; 12 passed")),
        ((0, "12 skipped in 3s\n"), (False, "12 skipped in 3s; 12 passed, 12 skipped")),
        ((None, "a PASSED\nb \n"), (None, "did not end in its time; b ; 12 passed")),
    ],
)
def test_the_verdict_of_the_tests_is_that_of_all_parts_and_what_is_wrong_is_shown(monkeypatch, done, expected):
    def run(command, seconds, environment):
        return (0, "12 passed in 2s\n") if environment["FLATQ_TEST_PART"] == "0/2" else done

    shown = []
    monkeypatch.setattr(bench, "run_command", run)
    passed, said = bench.run_tests(10, shown.append, parts=2)
    assert (passed, said) == expected
    assert bool(shown) == (passed is not True)


def test_the_parts_of_the_tests_are_all_of_them_once():
    found = []
    for part in range(2):
        command = [sys.executable, "-m", "pytest", "tests/kernels/test_gpu.py", "-m", "gpu", "--collect-only", "-q"]
        code, output = bench.run_command([*command, "-o", "addopts="], 60, {"FLATQ_TEST_PART": f"{part}/2"})
        assert code == 0, output
        found += [line for line in output.splitlines() if "::" in line]
    assert len(found) == len(set(found))
    assert sum("test_gpu.py" in line for line in found) > 90


@pytest.mark.parametrize(
    ("done", "passed"),
    [
        ((0, "========= ERROR SUMMARY: 0 errors\n"), True),
        ((9, "========= ERROR SUMMARY: 2 errors\n"), False),
        ((0, "nothing was checked\n"), False),
        ((None, ""), None),
    ],
)
def test_the_sanitizer_passes_only_if_it_says_so(monkeypatch, tmp_path, done, passed):
    monkeypatch.setattr(bench, "find_sanitizer", lambda: tmp_path / "compute-sanitizer")
    asked = []
    monkeypatch.setattr(bench, "run_command", lambda command, seconds, environment: asked.append(command) or done)
    assert bench.run_sanitizer("memcheck", 60, lambda line: None)[0] is passed
    assert {"kns=kron_quant", "kns=w4_gemm", "kns=kv_attention"} < set(asked[0])


def test_the_sanitizer_looks_at_every_kernel():
    pytest.importorskip("cupy")
    from flatq_cli.kernels.static import all_cases

    entries = {case.kernel.entry for case in all_cases(LIMITS[90])}
    assert all(entry.startswith(bench._OUR_KERNELS) for entry in entries)


def test_without_the_sanitizer_or_time_it_is_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "find_sanitizer", lambda: None)
    assert bench.run_sanitizer("memcheck", 60, print) == (
        None,
        "not run: compute-sanitizer is not installed (it comes with the CUDA toolkit)",
    )
    monkeypatch.setattr(bench, "find_sanitizer", lambda: tmp_path)
    assert bench.run_sanitizer("memcheck", 3, print) == (None, "not run: no time left")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as `run_bench` looks; kernels run on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(bench, "cuda_device", lambda where: SimpleNamespace(limits=LIMITS[89]))
    monkeypatch.setattr(bench, "about", lambda where: device())
    monkeypatch.setattr(bench, "compile_ahead", lambda works, where, log: None)
    monkeypatch.setattr(bench, "EventClock", lambda where: WallClock())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def rows_apart(works, command, budget, tell):
        bench.run_works(works, CPU, WallClock(), budget, lambda row: tell(row, ["not captured: x"]))

    monkeypatch.setattr(bench, "rows_apart", rows_apart)
    monkeypatch.setattr(bench, "measure_rates", lambda *args: RATES)
    monkeypatch.setattr(bench, "run_tests", lambda seconds, log: (True, "3 passed"))
    monkeypatch.setattr(bench, "run_sanitizer", lambda tool, seconds, log: (None, "not installed"))
    works = [
        Work("kron_quant", f"{n}x{n} int4", 2048, 8.0, 8.0, "float16", lambda where: lambda: None) for n in (64, 128)
    ]
    monkeypatch.setattr(bench, "all_works", lambda ops: works)
    return monkeypatch


def test_a_whole_run_is_a_complete_report_and_exit_code_0(gpu, tmp_path):
    assert bench.main(["--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "kernels-nvidia-geforce-rtx-4090.json").read_text())
    assert data["complete"]
    assert [check["name"] for check in data["checks"]] == [
        "tests marked gpu",
        "compute-sanitizer memcheck",
        "compute-sanitizer racecheck",
    ]
    assert len(data["rows"]) == 2
    assert data["notes"] == ["not captured: x"]
    assert data["rates"]["copy"] == RATES.copy


def test_failed_tests_are_exit_code_1_and_the_figures_are_kept(gpu, tmp_path):
    gpu.setattr(bench, "run_tests", lambda seconds, log: (False, "FAILED x; 1 failed"))
    assert bench.main(["--out", str(tmp_path)]) == 1
    page = (tmp_path / "kernels-nvidia-geforce-rtx-4090.md").read_text()
    assert "- tests marked gpu: FAILED x; 1 failed" in page
    assert "| 64x64 int4 | 2,048 |" in page


def test_a_run_that_is_cut_off_leaves_what_it_had(gpu, tmp_path):
    def interrupt(seconds, log):
        raise KeyboardInterrupt

    gpu.setattr(bench, "run_tests", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--out", str(tmp_path)])
    data = json.loads((tmp_path / "kernels-nvidia-geforce-rtx-4090.json").read_text())
    assert (data["complete"], data["rates"]["copy"]) == (False, RATES.copy)


def test_a_command_that_takes_too_long_is_ended():
    grandchild = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    assert bench.run_command([sys.executable, "-c", f"print('begun', flush=True); {grandchild}"], 2.0) == (
        None,
        "begun\n",
    )
    assert time.monotonic() - start < 20
    assert bench.run_command([sys.executable, "-c", "print('out'); raise SystemExit(3)"], 30) == (3, "out\n")
    assert bench.run_command(["/nowhere"], 30)[0] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_both_commands_say_so_in_one_line_and_exit_2(capsys):
    assert bench.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "needs a GPU" in said
    cli = subprocess.run(
        [sys.executable, "-m", "flatq_cli", "bench", "kernels"], capture_output=True, encoding="utf-8", check=False
    )
    assert (cli.returncode, cli.stdout) == (2, "")
    assert cli.stderr == said


def test_compile_only_needs_no_gpu_and_writes_the_schema(tmp_path, monkeypatch):
    pytest.importorskip("cupy")
    from flatq_cli.cli.app import app
    from flatq_cli.kernels import static

    monkeypatch.setattr(static, "static_report", lambda archs, ops: [dict.fromkeys(static.FIELDS, next(iter(archs)))])
    file = tmp_path / "new" / "static.json"
    done = CliRunner().invoke(app, ["bench", "kernels", "--compile-only", "--arch", "86", "--json", str(file)])
    assert done.exit_code == 0, done.output
    (written,) = json.loads(file.read_text())["kernels"]
    assert list(written) == list(static.FIELDS)
    assert written["arch"] == 86


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--arch", "81"], "--arch 81: not one of"), (["--op", "x"], "--op x: not one of kron_quant")],
)
def test_a_wrong_option_is_named(options, message, capsys):
    from flatq_cli.cli.app import app

    done = CliRunner().invoke(app, ["bench", "kernels", "--compile-only", *options])
    assert done.exit_code == 2
    assert message in done.output


def test_the_benchmark_imports_nothing_of_flatq_but_the_kernels():
    code = (
        "import sys, flatq_cli.kernels.bench, flatq_cli.kernels.bench_smoke;"
        "print(sorted(m for m in sys.modules if m.startswith('flatq_cli.') and not m.startswith('flatq_cli.kernels')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"
