"""All that is known of the kernels without a GPU, as files: `make kernel-report`, `python -m tests.kernels.report`.

The compile part comes from `flatq_cli.kernels.static`; the emulator runs each distinct plan once and counts, and a
model of three chips turns the counts into a time. Nothing in the files depends on when or where they were made.

A counter is per token: what a run of a case counts, over its tokens. Matrices of transforms, which all tokens share and
which are loaded once for many, count 0 on both sides (`SHARED`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatq_cli.kernels import static
from flatq_cli.kernels.bench_report import replace_text, table
from flatq_cli.kernels.cases import Case
from flatq_cli.kernels.device import LIMITS, Argument, DeviceLimits, Kernel
from flatq_cli.kernels.sources import kernel_text

CHECKOUT = Path(__file__).resolve().parents[2]

Planned = tuple[int, Case]


@dataclass(frozen=True)
class Chip:
    """A GPU as the time model sees it: cycles of an SM for one of each.

    Args:
        sector: 32 bytes at the memory's nominal bandwidth, shared out to the SMs at the boost clock.
        hmma: m16n8k16 with float32 sums; imma: an integer mma of the same operand bytes.
    """

    name: str
    arch: int
    sector: float
    hmma: float
    imma: float


# Bandwidth ÷ (SMs · boost clock): 1,008 GB/s ÷ (128 · 2.52 GHz), 1,555 GB/s ÷ (108 · 1.41 GHz) and 3,352 GB/s ÷ (132 ·
# 1.755 GHz). Dense float16 products with float32 sums a clock and SM: 256 (AD102: half rate), 1,024, and on H100 62 %
# of 2,048, which is what mma.sync reaches there (wgmma reaches all; arXiv 2402.13499).
L2_SECTOR = 0.5  # cycles of an SM, which takes 64 bytes a clock from L2
CHIPS = (
    Chip("RTX 4090", 89, sector=10.24, hmma=8.0, imma=4.0),
    Chip("A100", 80, sector=3.13, hmma=2.0, imma=2.0),
    Chip("H100", 90, sector=2.21, hmma=1.61, imma=1.61),
)


# Arguments that all tokens share, by the source they belong to; a linear's weights do count, they are its input.
SHARED = {"kron_quant": ("left_matrix", "left", "right", "weight", "clip"), "kv_quant": ("matrix", "clip")}


class CountingDevice:
    """A device of the tests' emulator that leaves out the sectors of what all tokens share.

    `moved` are the sectors that come from memory: what a launch reads again it finds in L2.
    """

    def __init__(self, arch: int) -> None:
        from tests.cuda_emulator.device import EmulatedDevice

        self._device = EmulatedDevice(arch=arch, races=False)
        self.read = self.written = 0
        self.moved = 0.0

    @property
    def limits(self) -> DeviceLimits:
        return self._device.limits

    @property
    def counters(self) -> Any:
        return self._device.counters

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], block: int, shared_bytes: int, arguments: Sequence[Argument]
    ) -> None:
        self._device.launch(kernel, grid, block, shared_bytes, arguments)
        shared = next((names for prefix, names in SHARED.items() if kernel.source.startswith(prefix)), ())
        names = zip(parameter_names(kernel), arguments, strict=True)
        tensors = [(name, argument) for name, argument in names if isinstance(argument, Tensor)]
        for (name, tensor), (read, written) in zip(tensors, self.counters.argument_sectors, strict=True):
            if name not in shared:
                whole = tensor.numel() * tensor.element_size() / 32
                self.read += read
                self.written += written
                self.moved += min(read, whole) + min(written, whole)


def parameter_names(kernel: Kernel) -> list[str]:
    """The names of a kernel's parameters, from its source."""
    found = re.search(rf"__global__[^;{{]*?\b{kernel.entry}\s*\(([^)]*)\)", kernel_text(kernel))
    assert found is not None, f"no kernel {kernel.entry} in {kernel.source}"
    return [re.split(r"[\s*]+", parameter.strip())[-1] for parameter in found[1].split(",")]


def count(case: Case, arch: int) -> dict[str, float]:
    """A case's counters, per token; `moved` is for the time model and no field of the report."""
    device = CountingDevice(arch)
    case.run(device)
    counters = device.counters
    return {
        "sectors_read": _figure(device.read / case.tokens),
        "sectors_written": _figure(device.written / case.tokens),
        "wavefronts": _figure(counters.wavefronts / case.tokens),
        "wavefronts_min": _figure(counters.wavefronts_min / case.tokens),
        "mma": _figure(counters.mma / case.tokens),
        "barriers": _figure(counters.barriers / case.tokens),
        "moved": _figure(device.moved / case.tokens),
    }


def _figure(value: float) -> float:
    return round(value, 2)


def plan_key(planned: Planned) -> tuple[Any, ...]:
    """Cases with equal keys run alike: architectures that share a plan share its counters."""
    _, case = planned
    return (case.name, case.n1, case.n2, case.kernel, case.block, case.shared_bytes, case.tokens)


_PLANNED: list[Planned] = []


def _count_planned(index: int) -> dict[str, float] | str:
    """In a forked process, which finds the cases (they hold functions) where they are."""
    torch.set_num_threads(1)
    arch, case = _PLANNED[index]
    try:
        return count(case, arch)
    except Exception as error:  # one plan that cannot run must not hide the others
        return f"{case.name} {case.n1}x{case.n2}: {str(error).splitlines()[0]}"


def count_all(planned: Sequence[Planned], processes: int) -> tuple[dict[tuple[Any, ...], dict[str, float]], list[str]]:
    """The counters of every distinct plan, and what could not be run."""
    distinct = list({plan_key(one): one for one in reversed(planned)}.values())
    _PLANNED[:] = distinct
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(_count_planned, range(len(distinct))))
    counted = {plan_key(one): result for one, result in zip(distinct, found, strict=True) if isinstance(result, dict)}
    return counted, [result for result in found if isinstance(result, str)]


def make_report(archs: Sequence[int], ops: Sequence[str], processes: int) -> tuple[dict[str, Any], str]:
    """The data of `kernels-static.json`, and the page beside it."""
    planned = [(arch, case) for arch in archs for case in static.all_cases(LIMITS[arch], ops)]
    counted, failures = count_all(planned, processes)
    rows = [
        {**row, **counted.get(plan_key(one), {})}
        for one, row in zip(planned, static.static_rows(planned, processes), strict=True)
    ]
    data = {"kernels": [{field: row[field] for field in static.FIELDS} for row in rows]}
    return data, page(planned, rows, failures)


# ---- The page. ----


def predicted(row: dict[str, Any], chip: Chip) -> dict[str, float] | None:
    """What each limit allows, in cycles of an SM per token; None without counters."""
    if row["sectors_read"] is None:
        return None
    issued = (row["issue_per_mma"] or 0.0) * row["mma"]
    rate = chip.imma if row["imma"] and not row["hmma"] else chip.hmma
    return {
        "memory": row["moved"] * chip.sector,
        "L2": (row["sectors_read"] + row["sectors_written"]) * L2_SECTOR,
        "tensor cores": row["mma"] * rate,
        "shared memory": float(row["wavefronts"]),
        "issue": issued / 4,
    }


def of_a_copy(row: dict[str, Any], chip: Chip) -> str:
    """The predicted share of a plain copy's speed, and what bounds it: `0.87 tensor cores`."""
    cycles = predicted(row, chip)
    if cycles is None or not row["sectors_min"]:
        return "–"
    bound = max(cycles, key=lambda name: cycles[name])
    share = row["sectors_min"] * chip.sector / cycles[bound] if cycles[bound] else 0.0
    return f"{share:.2f} {bound}"


def page(planned: Sequence[Planned], rows: Sequence[dict[str, Any]], failures: Sequence[str]) -> str:
    """The Markdown page: one table a kernel, and what falls short."""
    lines = [HEAD]
    names = dict.fromkeys(row["name"] for row in rows)
    for op in dict.fromkeys(name.partition("[")[0] for name in names):
        lines += [f"## {op}", "", *_op_table([row for row in rows if row["name"].partition("[")[0] == op]), ""]
    lines += ["## Predicted speed", "", PREDICTION, "", *_prediction_table(rows), ""]
    lines += ["## Where a plan falls short", "", *(_shortcomings(planned, rows) or ["Nowhere."]), ""]
    if failures:
        lines += ["## Not counted", "", *(f"- {failure}" for failure in failures), ""]
    return "\n".join(lines)


def _op_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    header = (
        *("kernel", "n1 × n2", "sm", "registers", "spills", "local", "shared", "CTAs × warps", "hmma", "imma"),
        *("issue/mma", "sectors read + written", "of the least", "wavefronts", "of the least", "mma", "of the least"),
        "barriers",
    )
    return table(header, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    sectors = None if row["sectors_read"] is None else row["sectors_read"] + row["sectors_written"]
    warps = row["warps_per_sm"] // row["ctas_per_sm"] if row["ctas_per_sm"] else 0
    both = "–" if sectors is None else f"{row['sectors_read']:g} + {row['sectors_written']:g}"
    return [
        row["name"],
        f"{row['n1']} × {row['n2']}",
        str(row["arch"]),
        *(f"{row[key]:,}" for key in ("registers", "spill_bytes", "local_bytes", "shared_bytes")),
        f"{row['ctas_per_sm']} × {warps}",
        *(_text(row[key]) for key in ("hmma", "imma", "issue_per_mma")),
        both,
        _ratio(sectors, row["sectors_min"]),
        _text(row["wavefronts"]),
        _ratio(row["wavefronts"], row["wavefronts_min"]),
        _text(row["mma"]),
        _ratio(row["mma"], row["mma_min"]),
        _text(row["barriers"]),
    ]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:g}" if value < 1e5 else f"{value:.0f}"


def _ratio(value: float | None, least: float | None) -> str:
    return "–" if value is None or not least else f"{value / least:.2f}"


def _prediction_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    by_place: dict[tuple[str, int, int], dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_place.setdefault((row["name"], row["n1"], row["n2"]), {})[row["arch"]] = row
    cells = [
        [name, f"{n1} × {n2}", *(of_a_copy(found[chip.arch], chip) if chip.arch in found else "–" for chip in CHIPS)]
        for (name, n1, n2), found in by_place.items()
    ]
    return table(["kernel", "n1 × n2", *(chip.name for chip in CHIPS)], cells)


def _shortcomings(planned: Sequence[Planned], rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each kernel, size and shortcoming, with the architectures that it is found on."""
    found: dict[tuple[str, str], list[int]] = {}
    for (arch, case), row in zip(planned, rows, strict=True):
        reason = case.reason or "not explained"
        for what in static.shortcomings(row, case.fast):
            place = f"{case.name}, {case.n1} × {case.n2}"
            found.setdefault((f"{place}: {what}", reason), []).append(arch)
    return [
        f"- {what}, on {', '.join(f'sm_{arch}' for arch in archs)}: {reason}" for (what, reason), archs in found.items()
    ]


HEAD = """# The kernels without a GPU

Made by `make kernel-report`: each kernel is compiled with NVRTC for every architecture, and the tests' emulator runs
the same source and counts. The same figures are in `kernels-static.json`. Per token: 32-byte sectors of global memory
(without the matrices of transforms, which all tokens share), wavefronts of shared memory (passes; the least is without
bank conflicts), tensor-core instructions of a warp, barriers that a warp meets. `issue/mma`: machine instructions for
each tensor-core instruction in the innermost loops that have one (a lower bound where loops are not unrolled whole).
`CTAs × warps`: blocks that an SM holds, and the warps of each. A token of `kv_attention` is a key.
"""

PREDICTION = """The share of a plain copy's speed that the slowest of five limits allows, in cycles of an SM per token:
sectors from memory at the nominal bandwidth ({sectors} cycles each), all sectors from L2 (half
a cycle each), mma at the tensor cores' rate ({hmma} cycles for a float16 one), a wavefront a
cycle, four instructions a cycle. What one launch reads again comes from L2, not from memory. Latency and what a loop's
start and end cost are left out: this tells which limit comes first, not the last tenth.""".format(
    sectors=", ".join(f"{chip.name} {chip.sector:g}" for chip in CHIPS),
    hmma=", ".join(f"{chip.name} {chip.hmma:g}" for chip in CHIPS),
)


def as_json(data: dict[str, Any]) -> str:
    """JSON with a line for each row, so that a change of one kernel is a change of its lines."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in data["kernels"])
    return f'{{"kernels": [\n{rows}\n]}}\n'


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; exit code 1 where a plan could not be run."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=CHECKOUT / "docs" / "benchmarks", help="folder of the files")
    parser.add_argument(
        "--arch", type=int, action="append", choices=sorted(LIMITS), help="repeatable; default: all six"
    )
    parser.add_argument("--op", action="append", choices=static.OPS, help="repeatable; default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(arguments)
    data, text = make_report(chosen.arch or static.ARCHS, chosen.op or static.OPS, chosen.processes)
    chosen.out.mkdir(parents=True, exist_ok=True)
    replace_text(chosen.out / "kernels-static.json", as_json(data))
    replace_text(chosen.out / "kernels-static.md", text)
    print(f"{len(data['kernels'])} rows in {chosen.out}")
    return 1 if "## Not counted" in text else 0


if __name__ == "__main__":
    sys.exit(main())
