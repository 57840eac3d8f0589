"""The kernels on a real GPU, in one run and one report: whether they are right, and how near to what the chip can do.

    python -m flatq_cli.kernels.bench --out docs/benchmarks        (the same as `make gpu-check`, `flatq bench kernels`)

needs torch, CuPy and pytest, from a checkout. In this order: the chip's own rates are measured, the tests marked `gpu`
run, every kernel is timed, compute-sanitizer looks for wrong accesses and races where it is installed. The report is
written after each step, so a run that is cut off leaves what it had; where the budget gets short, measurements are
repeated less, then left out.

    bench_work     what is run             bench_timing    how it is timed
    bench_report   what it means           bench_smoke     what compute-sanitizer runs
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flatq_cli.kernels.bench_report import Rates, Row, goals, row_json, write_report
from flatq_cli.kernels.bench_timing import Budget, Clock, EventClock, time_calls
from flatq_cli.kernels.bench_work import OPS, Work, all_works, copy_of
from flatq_cli.kernels.compiler import cache_dir, compile_kernel, load_nvrtc
from flatq_cli.kernels.cuda import cuda_device
from flatq_cli.kernels.errors import KernelError

BUDGET_SECONDS = 450.0
"""Under the eight minutes that a run may take, with what starting Python costs."""

_CHECKOUT = Path(__file__).resolve().parents[2]
_TESTS_SECONDS, _SANITIZER_SECONDS = 150.0, 75.0
_SHARES = (0.02, 0.25)  # seconds that a measurement's replays may take: at least, at most


def run_bench(
    out: Path, seconds: float = BUDGET_SECONDS, ops: Sequence[str] = OPS, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Check and time the kernels on torch's current GPU, and write the report to `out`.

    Returns:
        The report's data. `failed` is true where a check found a fault.
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
    compile_ahead(limits.arch, log)
    clock = EventClock(device)
    report.rates = measure_rates(device, clock, budget, limits.arch)
    report.write()
    report.check("tests marked gpu", *run_tests(min(_TESTS_SECONDS, budget.left / 2)))
    log(f"tests: {report.data['checks'][-1]['result']}")
    timing = Budget(max(0.0, budget.left - 2 * _SANITIZER_SECONDS if find_sanitizer() else budget.left - 5))
    run_works(all_works(ops=ops), device, clock, timing, report, log)
    report.data["notes"] += sorted(set(clock.notes))
    for tool in ("memcheck", "racecheck"):
        report.check(f"compute-sanitizer {tool}", *run_sanitizer(tool, min(_SANITIZER_SECONDS, budget.left)))
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


def run_works(
    works: Sequence[Work],
    device: torch.device,
    clock: Clock,
    budget: Budget,
    report: Report,
    log: Callable[[str], None],
) -> None:
    """Time every work and its baselines, and add a row each; a work that fails is a row with its error."""
    for position, work in enumerate(works):
        share = min(_SHARES[1], max(_SHARES[0], budget.left / (len(works) - position) / 8))
        row = measure(work, device, clock, budget, share)
        report.rows.append(row)
        if row.seconds is not None:
            log(f"{position + 1}/{len(works)}  {row.op} {row.size}, {row.tokens} tokens: {row.seconds * 1e6:.1f} µs")
        else:
            log(f"{position + 1}/{len(works)}  {row.op} {row.size}, {row.tokens} tokens: {row.error}")
        if position % 10 == 9:
            report.write()
    report.write()


def measure(work: Work, device: torch.device, clock: Clock, budget: Budget, share: float) -> Row:
    """One row. A baseline that fails is left out."""
    row = Row(work.op, work.size, work.tokens, work.bytes, work.operations, work.unit)
    try:
        row.seconds = time_calls(lambda: work.make(device), work.bytes, clock, budget, share)
        if row.seconds is None:
            row.error = "no time left"
    except Exception as error:  # whatever it is, the other rows are still wanted
        row.error = next(iter(str(error).splitlines()), type(error).__name__)
    for name, make in work.baselines.items():
        with contextlib.suppress(RuntimeError):
            seconds = time_calls(lambda make=make: make(device), work.bytes, clock, budget, share)  # type: ignore[misc]
            if seconds is not None:
                row.baselines[name] = seconds
    return row


def measure_rates(device: torch.device, clock: Clock, budget: Budget, arch: int, size: int = 8192) -> Rates:
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


def compile_ahead(arch: int, log: Callable[[str], None]) -> None:
    """Compile the kernels of the report's cases into the cache, on all cores, so that timing does not wait for it."""
    from flatq_cli.kernels.device import LIMITS
    from flatq_cli.kernels.static import all_cases

    known = max(other for other in LIMITS if other <= arch)
    try:
        kernels = list(dict.fromkeys(case.kernel for case in all_cases(LIMITS[known])))
    except ImportError as error:
        log(f"not compiled ahead: {error}")
        return

    def compile_one(kernel: Any) -> None:
        with contextlib.suppress(KernelError):  # the row that needs it will say so
            compile_kernel(kernel, arch)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, kernels))
    log(f"{len(kernels)} kernels compiled")


# ---- Checking. ----


def run_tests(seconds: float) -> tuple[bool | None, str]:
    """The tests marked `gpu` in a process of their own: whether they passed, and pytest's last line."""
    if not (_CHECKOUT / "tests" / "kernels").is_dir():
        return None, "not run: no checkout here, only an installed package"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels",
        "-m",
        "gpu",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
    ]
    return _verdict(_run(command, seconds), lambda code, output: code == 0 and " passed" in output)


def run_sanitizer(tool: str, seconds: float) -> tuple[bool | None, str]:
    """Every kernel once under compute-sanitizer's `tool`."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return None, "not run: compute-sanitizer is not installed (it comes with the CUDA toolkit)"
    if seconds < 20:
        return None, "not run: no time left"
    command = [
        str(sanitizer),
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "flatq_cli.kernels.bench_smoke",
    ]
    return _verdict(_run(command, seconds), lambda code, output: code == 0 and "SUMMARY" in output)


def find_sanitizer() -> Path | None:
    """compute-sanitizer on PATH, in the CUDA toolkit, or among Python packages."""
    found = shutil.which("compute-sanitizer")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    places += [tool for entry in sys.path for tool in Path(entry or ".").glob("nvidia/*/bin/compute-sanitizer")]
    return Path(found) if found else next((place for place in places if os.access(place, os.X_OK)), None)


def _run(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit code (None: it took too long) and output of a command in the checkout; it shares the cache of kernels."""
    environment = {**os.environ, "FLATQ_CACHE_DIR": str(cache_dir().parent)}
    try:
        done = subprocess.run(
            command,
            cwd=_CHECKOUT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=max(1.0, seconds),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    except OSError as error:
        return 1, str(error)
    return done.returncode, done.stdout


def _verdict(done: tuple[int | None, str], passed: Callable[[int, str], bool]) -> tuple[bool | None, str]:
    code, output = done
    if code is None:
        return None, "did not end in its time"
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:5]
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
    chosen = parser.parse_args(arguments)
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
