"""The kernels on a real GPU, in one run and one report: whether they are right, and how near to what the chip can do.

    python -m flatq_cli.kernels.bench --out docs/benchmarks        (the same as `make gpu-check`, `flatq bench kernels`)

needs torch, CuPy and pytest, from a checkout. In this order: the chip's own rates are measured, the tests marked `gpu`
run, every kernel is timed, compute-sanitizer looks for wrong accesses and races where it is installed. The report is
written after each step and row, so a run that is cut off leaves what it had; where the budget gets short, measurements
are repeated less, then left out.

    bench_work        what is run             bench_timing    how it is timed
    bench_report      what it means           bench_smoke     what compute-sanitizer runs
    bench_processes   what runs apart, so that a kernel that hangs or faults does not end the run
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flatq_cli.kernels.bench_processes import CHECKOUT, LOST_CONTEXT, NO_TIME, python, rows_apart, run_command
from flatq_cli.kernels.bench_report import Rates, Row, goals, row_json, write_report
from flatq_cli.kernels.bench_timing import Budget, Clock, EventClock, time_calls
from flatq_cli.kernels.bench_work import OPS, Work, all_works, copy_of
from flatq_cli.kernels.compiler import compile_kernel, load_nvrtc
from flatq_cli.kernels.cuda import cuda_device
from flatq_cli.kernels.device import Kernel
from flatq_cli.kernels.errors import KernelError

BUDGET_SECONDS = 450.0
"""Under the eight minutes that a run may take, with what starting Python costs."""

_TESTS_SECONDS, _SANITIZER_SECONDS, _COMPILE_SECONDS = 150.0, 75.0, 60.0
_HANG_SECONDS = 60  # after which a test's stack is printed
_TEST_PARTS = 6
_SHOWN_LINES = 120  # of the output of a check that failed
_OUR_KERNELS = ("kron_quant", "w4_gemm", "kv_quant", "kv_dequant", "kv_attention")  # how their names begin
_WARM_SECONDS = 0.5  # of work until the clocks of an idle GPU are up
_NO_FAULT = (NO_TIME, "out of memory")  # errors of rows that say nothing against a kernel
_SHARES = (0.02, 0.25)  # seconds that a measurement's replays may take: at least, at most


def run_bench(
    out: Path, seconds: float = BUDGET_SECONDS, ops: Sequence[str] = OPS, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Check and time the kernels on torch's current GPU, and write the report to `out`.

    Returns:
        The report's data. `failed` is true where a check found a fault or a kernel could not be run.
    Raises:
        KernelError: there is no GPU, or CuPy is missing.
    """
    budget = Budget(seconds)
    if not torch.cuda.is_available():
        raise KernelError(no_gpu())
    device = torch.device("cuda", torch.cuda.current_device())
    limits = cuda_device(device).limits
    report = Report(out, about(device))
    log(f"{report.data['device']['name']}, sm_{limits.arch}")
    report.write()
    works = all_works(ops=ops)
    compile_ahead(works, device, log)
    report.rates = measure_rates(device, EventClock(device), budget, limits.arch)
    report.write()
    torch.cuda.empty_cache()  # for the processes that follow
    report.check("tests marked gpu", *run_tests(min(_TESTS_SECONDS, budget.left / 2), log))
    log(f"tests: {report.data['checks'][-1]['result']}")
    timing = Budget(max(0.0, budget.left - 2 * _SANITIZER_SECONDS if find_sanitizer() else budget.left - 5))
    time_works(works, ops, timing, report, log)
    for tool in ("memcheck", "racecheck"):
        report.check(f"compute-sanitizer {tool}", *run_sanitizer(tool, min(_SANITIZER_SECONDS, budget.left), log))
    report.finish()
    log(f"wrote {' and '.join(str(path) for path in report.files)}")
    return report.data


class Report:
    """The report's data as it grows; `write` may be called at any time."""

    def __init__(self, out: Path, device: dict[str, Any]) -> None:
        self._out = out
        self.rates: Rates | None = None
        self.rows: list[Row] = []
        self.files: tuple[Path, ...] = ()
        self.data: dict[str, Any] = {
            "schema": "flatq.bench.kernels/1",
            "device": device,
            "complete": False,
            "failed": False,
            "rates": None,
            "checks": [],
            "goals": [],
            "rows": [],
            "notes": [],
        }

    def check(self, name: str, passed: bool | None, result: str) -> None:
        """Add a check: passed, failed, or None where it could not be run; then write."""
        self.data["checks"].append({"name": name, "passed": passed, "result": result})
        self.data["failed"] = self.data["failed"] or passed is False
        self.write()

    def add(self, row: Row, notes: Sequence[str] = ()) -> None:
        """Add a row and write. An error that speaks against a kernel fails the report."""
        self.rows.append(row)
        self.data["failed"] = self.data["failed"] or row.error not in (None, *_NO_FAULT)
        self.data["notes"] = sorted({*self.data["notes"], *notes})
        self.write()

    def write(self) -> None:
        """Write what there is."""
        self.data["rates"] = None if self.rates is None else asdict(self.rates)
        order = {op: position for position, op in enumerate(OPS)}
        rows = sorted(self.rows, key=lambda row: order.get(row.op, len(order)))  # stable: sizes stay together
        self.data["rows"] = [row_json(row, self.rates) for row in rows]
        self.data["goals"] = goals(self.data["rows"])
        self.files = write_report(self._out, self.data)

    def finish(self) -> None:
        """Mark the report complete if every row was measured, and write it."""
        self.data["complete"] = all(row.seconds is not None for row in self.rows)
        self.write()


# ---- Measuring. ----


def time_works(
    works: Sequence[Work], ops: Sequence[str], budget: Budget, report: Report, log: Callable[[str], None]
) -> None:
    """Time every work and its baselines in processes of their own, and add a row each."""

    def tell(row: Row, notes: Sequence[str]) -> None:
        report.add(row, notes)
        measured = row.error if row.seconds is None else f"{row.seconds * 1e6:.1f} µs"
        log(f"{len(report.rows)}/{len(works)}  {row.op} {row.size}, {row.tokens} tokens: {measured}")

    chosen = [word for op in ops for word in ("--op", op)]
    rows_apart(works, python("flatq_cli.kernels.bench", *chosen), budget, tell)


def run_works(
    works: Sequence[Work], device: torch.device, clock: Clock, budget: Budget, tell: Callable[[Row], None]
) -> bool:
    """Time every work and its baselines, and tell a row each; a work that fails is a row with its error.

    Returns:
        False where the device's context was lost: the works behind the last row were not run.
    """
    for position, work in enumerate(works):
        share = min(_SHARES[1], max(_SHARES[0], budget.left / (len(works) - position) / 8))
        row = measure(work, device, clock, budget, share)
        try:
            clock.wait()
        except RuntimeError as error:
            row.error = row.error or _first_line(error)
            tell(row)
            return False
        tell(row)
    return True


def print_rows(positions: Sequence[int], seconds: float, ops: Sequence[str]) -> int:
    """What a child of the benchmark does (`rows_apart`): measure these works and print a line for each row."""
    budget, device = Budget(seconds), torch.device("cuda", torch.cuda.current_device())
    clock, works = EventClock(device), all_works(ops=ops)

    def tell(row: Row) -> None:
        print(json.dumps({"row": asdict(row), "notes": sorted(set(clock.notes))}), flush=True)
        clock.notes.clear()

    done = run_works([works[position] for position in positions], device, clock, budget, tell)
    return 0 if done else LOST_CONTEXT


def measure(work: Work, device: torch.device, clock: Clock, budget: Budget, share: float) -> Row:
    """One row. A baseline that fails is left out."""
    row = Row(work.op, work.size, work.tokens, work.bytes, work.operations, work.unit)
    try:
        row.seconds = time_calls(lambda: work.make(device), work.bytes, clock, budget, share)
        if row.seconds is None:
            row.error = NO_TIME
    except torch.OutOfMemoryError:
        row.error = "out of memory"
    except Exception as error:  # whatever it is, the other rows are still wanted
        row.error = _first_line(error)
    for name, make in work.baselines.items():
        with contextlib.suppress(RuntimeError):
            seconds = time_calls(lambda make=make: make(device), work.bytes, clock, budget, share)  # type: ignore[misc]
            if seconds is not None:
                row.baselines[name] = seconds
    return row


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def measure_rates(
    device: torch.device, clock: Clock, budget: Budget, arch: int, size: int = 8192, warm: float = _WARM_SECONDS
) -> Rates:
    """The chip's copy bandwidth and matrix rates, by a large copy and large matrix products of torch's."""
    moved = 16 * size * size

    def rate(make: Callable[[], Callable[[], object]], amount: float) -> float:
        seconds = time_calls(make, moved, clock, budget, 0.3)
        if seconds is None:
            raise KernelError("no time left to measure the chip's own rates: give more --seconds")
        return amount / seconds

    def halves() -> Callable[[], object]:
        a, b = (torch.randn(size, size, device=device, dtype=torch.float16) for _ in range(2))
        return lambda: a @ b

    def integers() -> Callable[[], object]:
        a, b = (torch.randint(-128, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b.mT)

    warming, product = Budget(warm), halves()
    while warming.left > 0:
        clock.once(product)
    operations = 2.0 * size**3
    float16 = rate(halves, operations)
    try:
        int8 = rate(integers, operations)
    except RuntimeError as error:  # torch has no int8 product for this chip
        if isinstance(error, KernelError):
            raise
        int8 = 2 * float16
    return Rates(
        copy=rate(lambda: copy_of(device, moved), moved),
        float16=float16,
        int8=int8,
        int4=2 * int8 if arch in (80, 86, 87, 89) else int8,
    )


def compile_ahead(works: Sequence[Work], device: torch.device, log: Callable[[str], None]) -> None:
    """Compile what the works need into the cache, so that timing does not wait for it.

    In processes, because NVRTC compiles one kernel at a time in each; they are forked, and touch no GPU.
    """
    own = cuda_device(device)
    with own.planning() as planned:
        for work in works:
            with contextlib.suppress(Exception):  # the row will say what it is
                work.make(device)()
    torch.cuda.empty_cache()
    kernels = list(dict.fromkeys(planned))
    load_nvrtc()
    workers = max(1, min(len(kernels), os.cpu_count() or 1))
    try:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            wanted = [(kernel, own.limits.arch) for kernel in kernels]
            done = pool.starmap_async(_compile_one, wanted, chunksize=1).get(_COMPILE_SECONDS)
    except (OSError, ValueError, multiprocessing.TimeoutError) as error:
        log(f"not compiled ahead: {type(error).__name__} {error}")
        return
    log(f"{sum(done)} of {len(kernels)} kernels compiled")


def _compile_one(kernel: Kernel, arch: int) -> bool:
    try:
        compile_kernel(kernel, arch)
    except KernelError:  # the row that needs it will say so
        return False
    return True


# ---- Checking. ----


def run_tests(seconds: float, log: Callable[[str], None], parts: int | None = None) -> tuple[bool | None, str]:
    """The tests marked `gpu`: whether they passed, what failed, and how many.

    In several processes at once, each with a part of the tests: they compile side by side, and one that loses its
    context takes only its own part along.
    """
    if not (CHECKOUT / "tests" / "kernels").is_dir():
        return None, "not run: no checkout here, only an installed package"
    parts = parts or max(1, min(_TEST_PARTS, (os.cpu_count() or 1) // 2))
    options = ("-m", "gpu", "-v", "--tb=short", "--no-header", "-p", "no:cacheprovider")
    command = [*python("pytest", "tests/kernels", *options), "-o", f"faulthandler_timeout={_HANG_SECONDS}"]

    def run(part: int) -> tuple[int | None, str]:
        return run_command(command, seconds, {"FLATQ_TEST_PART": f"{part}/{parts}"})

    with ThreadPoolExecutor(parts) as pool:
        done = list(pool.map(run, range(parts)))
    verdicts = [_verdict(one, lambda code, output: code == 0 and " passed" in output) for one in done]
    for (_, output), (passed, _) in zip(done, verdicts, strict=True):
        if passed is not True:
            log("\n".join(output.splitlines()[-_SHOWN_LINES:]))
    results = [passed for passed, _ in verdicts]
    total = False if False in results else None if None in results else True
    said = [result for passed, result in verdicts if passed is not True]
    return total, "; ".join([*said, _counts([output for _, output in done])])


def _counts(outputs: Sequence[str]) -> str:
    """The sums of what pytest's last lines count."""
    found: Counter[str] = Counter()
    for output in outputs:
        for count, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", output.strip().rpartition("\n")[2]):
            found[what.replace("errors", "error")] += int(count)
    return ", ".join(f"{count} {what}" for what, count in found.items()) or "no test ended"


def run_sanitizer(tool: str, seconds: float, log: Callable[[str], None]) -> tuple[bool | None, str]:
    """Every kernel once under compute-sanitizer's `tool`, which looks at our kernels only.

    Each tensor is allocated by itself then: inside torch's cached blocks no access is out of bounds. Errors that torch
    itself meets and handles are not ours.
    """
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return None, "not run: compute-sanitizer is not installed (it comes with the CUDA toolkit)"
    if seconds < 20:
        return None, "not run: no time left"
    options = [*("--tool", tool), *("--error-exitcode", "9"), *("--print-limit", "20")]
    options += [word for name in _OUR_KERNELS for word in ("--kernel-name", f"kns={name}")]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [str(sanitizer), *options, *python("flatq_cli.kernels.bench_smoke")]
    done = run_command(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    passed, result = _verdict(done, lambda code, output: code == 0 and "SUMMARY" in output)
    if passed is not True:
        log("\n".join(done[1].splitlines()[-_SHOWN_LINES:]))
    return passed, result


def find_sanitizer() -> Path | None:
    """compute-sanitizer on PATH, in the CUDA toolkit, or among Python packages."""
    found = shutil.which("compute-sanitizer")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    places += [tool for entry in sys.path for tool in Path(entry or ".").glob("nvidia/*/bin/compute-sanitizer")]
    return Path(found) if found else next((place for place in places if os.access(place, os.X_OK)), None)


def _verdict(done: tuple[int | None, str], passed: Callable[[int, str], bool]) -> tuple[bool | None, str]:
    code, output = done
    if code is None:
        return None, "; ".join(["did not end in its time", *[line for line in output.splitlines() if line][-1:]])
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    failures = [line for line in lines if line.startswith(("FAILED ", "ERROR tests"))][:5]
    return passed(code, output), "; ".join([*failures, *lines[-1:]]) or f"exit code {code}"


# ---- The machine. ----


def no_gpu() -> str:
    """Why nothing can be run here, and what can be."""
    why = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no NVIDIA GPU"
    return f"the kernels' benchmark needs a GPU ({why}); `flatq bench kernels --compile-only` needs none"


def about(device: torch.device) -> dict[str, Any]:
    """The chip and the versions that figures depend on."""
    found: Any = torch.cuda.get_device_properties(device)
    version = load_nvrtc().getVersion()
    return {
        "name": found.name,
        "arch": found.major * 10 + found.minor,
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "driver": _driver(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cupy": metadata.version(cupy) if (cupy := _cupy_package()) else None,
        "nvrtc": f"{version[0]}.{version[1]}",
    }


def _cupy_package() -> str | None:
    names = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            return name
    return None


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of a bare machine; exit code 0, 1 where a check failed, 2 where nothing can be run."""
    parser = argparse.ArgumentParser(
        prog="python -m flatq_cli.kernels.bench", description="Check and time the kernels."
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the report")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="time to spend, all in all")
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; repeatable")
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # what a child measures
    chosen = parser.parse_args(arguments)
    if chosen.rows is not None:
        return print_rows([int(row) for row in chosen.rows.split(",")], chosen.seconds, chosen.op or OPS)
    try:
        data = run_bench(
            chosen.out, chosen.seconds, chosen.op or OPS, lambda line: print(line, file=sys.stderr, flush=True)
        )
    except KernelError as error:
        print(f"flatq: {error}", file=sys.stderr)
        return 2
    return 1 if data["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
