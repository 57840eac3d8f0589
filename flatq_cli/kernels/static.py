"""What is known of the kernels' speed without running them: registers, spills, occupancy, instructions per mma.

`static_report` compiles every case of every kernel for every architecture, with the options used at run time, and gives
one row each in the schema of docs/benchmarks/kernels-static.json; the counters that only execution gives (sectors,
wavefronts, mma, barriers) are null here and are filled in by the tests' emulator (`make kernel-report`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeAlias

from flatq_cli.kernels.cases import Case
from flatq_cli.kernels.compiler import Compiled, compile_kernel
from flatq_cli.kernels.device import LIMITS, DeviceLimits, Kernel
from flatq_cli.kernels.sass import Counts, count_instructions

Target: TypeAlias = tuple[Kernel, int]
"""A kernel and the architecture that it is compiled for."""

ARCHS = (80, 86, 89, 90, 100, 120)
"""The architectures of the report; every kernel must compile for them."""

OPS = ("kron_quant", "gemm", "kv_quant", "kv_attention")
"""The modules with `report_cases`."""

FIELDS = (
    *(
        "name",
        "n1",
        "n2",
        "arch",
        "registers",
        "spill_bytes",
        "local_bytes",
        "shared_bytes",
        "ctas_per_sm",
        "warps_per_sm",
    ),
    *(
        "hmma",
        "imma",
        "issue_per_mma",
        "sectors_read",
        "sectors_written",
        "sectors_min",
        "wavefronts",
        "wavefronts_min",
    ),
    *("mma", "mma_min", "barriers"),
)
"""The keys of a row, in the order in which the file has them."""

_REGISTERS = 64 * 1024
_REGISTER_UNIT = 256  # registers are given to a warp in units
_PARTITIONS = 4  # of an SM, each with its own quarter of the registers
_SHARED_UNIT = 128


@dataclass(frozen=True)
class _Residency:
    """What an SM can hold. Source: CUDA C++ programming guide, "Technical Specifications per Compute Capability"."""

    warps: int
    blocks: int
    reserved_shared: int  # bytes that the system takes from each block


_RESIDENCY = {
    70: _Residency(64, 32, 0),
    75: _Residency(32, 16, 0),
    80: _Residency(64, 32, 1024),
    86: _Residency(48, 16, 1024),
    89: _Residency(48, 24, 1024),
    90: _Residency(64, 32, 1024),
    100: _Residency(64, 32, 1024),
    120: _Residency(48, 24, 1024),
}


def all_cases(limits: DeviceLimits, ops: Iterable[str] = OPS) -> list[Case]:
    """The report's cases of every op as it is planned for a device."""
    modules = [importlib.import_module(f"flatq_cli.kernels.{op}") for op in ops]
    return [case for module in modules for case in module.report_cases(limits)]


def static_report(archs: Sequence[int] = ARCHS, ops: Iterable[str] = OPS, threads: int = 2) -> list[dict[str, Any]]:
    """One row for each case and architecture; each distinct kernel is compiled once (NVRTC: one at a time).

    Raises:
        KernelError: a kernel does not compile, or CuPy is missing.
    """
    return static_rows([(arch, case) for arch in archs for case in all_cases(LIMITS[arch], ops)], threads)


def static_rows(planned: Sequence[tuple[int, Case]], threads: int = 2) -> list[dict[str, Any]]:
    """A row for each pair of architecture and case. Raises as `static_report`."""
    compiled = compile_all([(case.kernel, arch) for arch, case in planned], threads)
    counted = count_all(compiled, threads)
    return [static_row(case, arch, compiled[case.kernel, arch], counted[case.kernel, arch]) for arch, case in planned]


def compile_all(wanted: Iterable[Target], threads: int = 2) -> dict[Target, Compiled]:
    """Compile each distinct pair of kernel and architecture once."""
    distinct = list(dict.fromkeys(wanted))
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(distinct, pool.map(lambda target: compile_kernel(*target), distinct), strict=True))


def count_all(compiled: Mapping[Target, Compiled], threads: int = 2) -> dict[Target, Counts | None]:
    """Disassemble what was compiled, and count."""

    def count(target: Target) -> Counts | None:
        return count_instructions(compiled[target].cubin, target[0].entry)

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(compiled, pool.map(count, compiled), strict=True))


def static_row(case: Case, arch: int, compiled: Compiled, counted: Counts | None) -> dict[str, Any]:
    """A row of the report, its counters null."""
    shared = case.shared_bytes + compiled.shared_bytes
    blocks = blocks_per_multiprocessor(LIMITS[arch], case.block, compiled.registers, shared)
    row = {
        "name": case.name,
        "n1": case.n1,
        "n2": case.n2,
        "arch": arch,
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "local_bytes": compiled.stack_bytes,
        "shared_bytes": shared,
        "ctas_per_sm": blocks,
        "warps_per_sm": blocks * ceil(case.block / 32),
        "hmma": None if counted is None else counted.hmma,
        "imma": None if counted is None else counted.imma,
        "issue_per_mma": None if counted is None or counted.issue_per_mma is None else round(counted.issue_per_mma, 2),
        "sectors_min": case.least.sectors,
        "mma_min": case.least.mma,
    }
    return {field: row.get(field) for field in FIELDS}


def blocks_per_multiprocessor(limits: DeviceLimits, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks an SM holds at once; 0 where a block does not fit at all.

    Args:
        threads: of a block. registers: of a thread. shared_bytes: static and dynamic, of a block.
    Source: NVIDIA's cuda_occupancy.h.
    """
    residency = _RESIDENCY[limits.arch]
    if shared_bytes > limits.shared_per_block:
        return 0
    warps = ceil(threads / 32)
    register_unit = ceil(max(registers, 1) * 32 / _REGISTER_UNIT) * _REGISTER_UNIT
    warps_by_registers = _REGISTERS // _PARTITIONS // register_unit * _PARTITIONS
    if ceil(warps / _PARTITIONS) * _PARTITIONS * register_unit > _REGISTERS:
        return 0
    taken = ceil((shared_bytes + residency.reserved_shared) / _SHARED_UNIT) * _SHARED_UNIT
    by_shared = limits.shared_per_multiprocessor // taken if taken else residency.blocks
    return min(residency.blocks, residency.warps // warps, warps_by_registers // warps, by_shared)


def shortcomings(row: dict[str, Any], fast: bool) -> list[str]:
    """Where a row of a fast path misses the limits that it is built to; counters that are null are not judged.

    No spills and no local memory; sectors at most 1.05 times the least where the sizes are multiples of
    8 (else 1.3 times); wavefronts at most 1.15 times those without conflicts; mma the least where the sizes are
    multiples of 16 (else 1.35 times).
    """
    found: list[str] = []
    if not fast:
        return found
    if row["spill_bytes"] or row["local_bytes"]:
        found.append(f"{row['spill_bytes']} bytes of spills, {row['local_bytes']} of local memory")
    if row["ctas_per_sm"] == 0:
        found.append("a block does not fit on an SM")
    if row["sectors_read"] is not None:
        even = row["n1"] % 8 == 0 and row["n2"] % 8 == 0
        sectors = row["sectors_read"] + row["sectors_written"]
        found += _over("sectors", sectors, row["sectors_min"], 1.05 if even else 1.3)
        found += _over("wavefronts", row["wavefronts"], row["wavefronts_min"], 1.15)
        whole = row["n1"] % 16 == 0 and row["n2"] % 16 == 0
        found += _over("mma", row["mma"], row["mma_min"], 1.0 if whole else 1.35)
    return found


def _over(what: str, value: float, least: float, limit: float) -> list[str]:
    if least <= 0 or value <= least * limit * (1 + 1e-9):
        return []
    return [f"{what} {value / least:.2f} times the least (limit {limit:g})"]
