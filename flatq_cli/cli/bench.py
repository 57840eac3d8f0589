"""`flatq bench`: how fast the kernels are, on this GPU or by what compiling them tells, and how fast exports run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flatq_cli.cli.console import log, open_progress
from flatq_cli.cli.devices import Device, resolve_device
from flatq_cli.cli.errors import command_errors
from flatq_cli.cli.options import Debug, DeviceOption, Dtype, check_writable, write_json
from flatq_cli.cli.tables import show_mapping, show_rows
from flatq_cli.errors import UsageError

bench_app = typer.Typer(help="Measure the kernels, and how fast exports run.", no_args_is_help=True)

_SHOWN = (
    *("name", "n1", "n2", "arch", "registers", "spill_bytes", "shared_bytes", "ctas_per_sm", "warps_per_sm"),
    "issue_per_mma",
)


@bench_app.callback()
def _bench() -> None:
    """Measure the kernels, and how fast exports run."""


@bench_app.command()
def kernels(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.")] = Path("docs/benchmarks"),
    seconds: Annotated[float, typer.Option("--seconds", min=10, help="Time to spend, all in all.")] = 450,
    op: Annotated[list[str], typer.Option("--op", help="Only this op. Repeatable.")] = [],  # noqa: B006
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Compile for each architecture and report; needs no GPU.")
    ] = False,
    arch: Annotated[
        list[int], typer.Option("--arch", metavar="80", help="With --compile-only: this architecture. Repeatable.")
    ] = [],  # noqa: B006
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON; - is stdout.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Check the CUDA kernels on this GPU, time them, and write a report.

    Without a GPU, --compile-only tells registers, spills, occupancy and instructions of every kernel.
    """
    with command_errors(debug):
        from flatq_cli.kernels.errors import KernelError

        try:
            data = _compile_only(arch, op) if compile_only else _run(out, seconds, op)
        except KernelError as error:
            raise UsageError(str(error)) from error
        if json_file is not None:
            write_json(data, json_file)
        if json_file != "-":
            _show(data)
        if data.get("failed"):
            raise typer.Exit(1)


@bench_app.command()
def generate(
    target: Annotated[str, typer.Argument(metavar="DIR", help="An exported directory.")],
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="The float model to compare with.")
    ] = None,
    backend: Annotated[
        list[str], typer.Option("--backend", help="Only this backend. Repeatable. (default: all that work here)")
    ] = [],  # noqa: B006
    prompt: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens after it.")] = 64,
    turns: Annotated[int, typer.Option("--turns", min=1, help="How often each model is measured.")] = 3,
    device: DeviceOption = Device.auto,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What to compute in.")] = Dtype.bfloat16,
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: as torch chooses.")] = 0,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON; - is stdout.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Time an export through each backend, beside the model it was made from, in turns."""
    with command_errors(debug):
        check_writable(json_file)
        import torch

        from flatq_cli.stages.bench_generate import BenchRequest, bench_generate

        request = BenchRequest(
            target=target,
            baseline=baseline,
            backends=tuple(backend),
            prompt=prompt,
            new=new,
            turns=turns,
            device=resolve_device(device),
            dtype=getattr(torch, dtype.value),
            threads=threads,
        )
        with open_progress(quiet=False) as progress:
            data = bench_generate(request, progress)
        if json_file is not None:
            write_json(data, json_file)
        if json_file != "-":
            show_rows(data["rows"])
            show_mapping(data["cache"])


def _compile_only(archs: list[int], ops: list[str]) -> dict[str, Any]:
    from flatq_cli.kernels import static
    from flatq_cli.kernels.device import LIMITS

    chosen = archs or list(static.ARCHS)
    unknown = sorted(set(chosen) - set(LIMITS))
    if unknown:
        raise UsageError(f"--arch {unknown[0]}: not one of {', '.join(map(str, LIMITS))}")
    _check_ops(ops, static.OPS)
    return {"kernels": static.static_report(chosen, ops or static.OPS)}


def _run(out: Path, seconds: float, ops: list[str]) -> dict[str, Any]:
    from flatq_cli.kernels.bench import run_bench
    from flatq_cli.kernels.bench_work import OPS

    _check_ops(ops, OPS)
    return run_bench(out, seconds, ops or OPS, log)


def _check_ops(ops: list[str], known: tuple[str, ...]) -> None:
    for op in ops:
        if op not in known:
            raise UsageError(f"--op {op}: not one of {', '.join(known)}")


def _show(data: dict[str, Any]) -> None:
    if "kernels" in data:
        show_rows([{key: row[key] for key in _SHOWN} for row in data["kernels"]])
        return
    show_rows(data["checks"], "Checks")
    show_rows(data["goals"], "Goals")
