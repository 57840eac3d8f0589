"""Every exception is one line that says what to do, with the right exit code."""

import errno

import pytest
import torch
import typer
from safetensors.torch import load

from flatq_cli.cli.errors import command_errors, explain
from flatq_cli.errors import UsageError
from flatq_cli.kernels.errors import missing_cupy


def line_and_code(capsys, error, debug=False):
    with pytest.raises(typer.Exit) as caught, command_errors(debug):
        raise error
    return capsys.readouterr().err, caught.value.exit_code


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "runs/a/block-00000.safetensors"),
        OSError(errno.EDQUOT, "Quota exceeded"),
    ],
)
def test_a_full_disk_is_named_and_nothing_is_lost(capsys, error):
    line, code = line_and_code(capsys, error)
    assert line.startswith("flatq: the disk is full")
    assert line.endswith("free some space; the same command goes on where it was\n")
    assert (error.filename or "") in line
    assert code == 1


def test_a_full_disk_is_seen_through_safetensors():
    class SafetensorError(Exception):
        pass

    line, code = explain(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert line.startswith("the disk is full")
    assert code == 1


def test_out_of_memory_says_what_to_lower(capsys):
    errors = [MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
    with pytest.raises(RuntimeError) as from_torch:
        torch.empty(2**62, dtype=torch.uint8)
    for error in [*errors, from_torch.value]:
        line, code = line_and_code(capsys, error)
        assert line.startswith("flatq: out of memory: lower calibration.batch, .samples or .seqlen"), error
        assert line.count("\n") == 1
        assert code == 1


def test_a_corrupt_safetensors_file_is_wrong_input(capsys):
    with pytest.raises(Exception, match="header") as corrupt:
        load(b"\x08\0\0\0\0\0\0\0garbage!")
    line, code = line_and_code(capsys, corrupt.value)
    assert line.startswith("flatq: a safetensors file is corrupt or truncated: ")
    assert code == 2


def test_an_interrupted_command_can_go_on(capsys):
    line, code = line_and_code(capsys, KeyboardInterrupt())
    assert line == "flatq: interrupted; the same command goes on where it was\n"
    assert code == 130


def test_anything_else_is_one_line_that_points_to_debug(capsys):
    line, code = line_and_code(capsys, ValueError("first\n  second\n"))
    assert line == "flatq: ValueError: first second (use --debug for the traceback)\n"
    assert code == 1


def test_debug_shows_the_traceback_before_the_line(capsys):
    text, code = line_and_code(capsys, UsageError("wrong"), debug=True)
    assert text.startswith("Traceback")
    assert text.endswith("flatq: wrong\n")
    assert code == 2


def test_a_command_that_ends_by_itself_is_left_alone():
    with pytest.raises(typer.Exit) as caught, command_errors():
        raise typer.Exit(3)
    assert caught.value.exit_code == 3


def test_a_command_that_works_is_left_alone(capsys):
    with command_errors():
        pass
    assert capsys.readouterr().err == ""


def test_a_missing_piece_of_the_kernels_is_said_as_it_is(capsys):
    line, code = line_and_code(capsys, missing_cupy("13.0"))
    assert line == f"flatq: {missing_cupy('13.0')}\n"
    assert "pip install cupy-cuda13x" in line
    assert code == 2
