"""A kernel's text: macros first, own headers once, and file names and line numbers that survive."""

import re

import pytest

from flatq_cli.kernels import sources
from flatq_cli.kernels.device import Kernel
from flatq_cli.kernels.errors import KernelError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "main.cu").write_text('#include "a.cuh"\n#include "b.cuh"  // twice: a includes it\nint here;\n')
    (tmp_path / "a.cuh").write_text('#pragma once\n#include "b.cuh"\nint a;\n')
    (tmp_path / "b.cuh").write_text("#pragma once\n#include <from_elsewhere.h>\nint b;\n")
    return tmp_path


def positions(text: str) -> dict[str, tuple[str, int]]:
    """Where the compiler thinks each line of a text stands."""
    found, file, number = {}, "", 0
    for line in text.splitlines():
        directive = re.fullmatch(r'#line (\d+) "(.*)"', line)
        if directive:
            number, file = int(directive[1]), directive[2]
        else:
            found[line] = (file, number)
            number += 1
    return found


def test_each_header_stands_in_the_text_once_before_its_first_use(folder):
    text = sources.kernel_text(Kernel("main.cu", "f"), folder)
    assert text.index("int b;") < text.index("int a;") < text.index("int here;")
    assert text.count("int b;") == 1
    assert "pragma once" not in text


def test_every_line_keeps_its_file_and_number(folder):
    where = positions(sources.kernel_text(Kernel("main.cu", "f"), folder))
    assert where["int b;"] == ("b.cuh", 3)
    assert where["int a;"] == ("a.cuh", 3)
    assert where["int here;"] == ("main.cu", 3)
    assert where["#include <from_elsewhere.h>"] == ("b.cuh", 2)


def test_macros_come_first_in_their_order(folder):
    text = sources.kernel_text(Kernel("main.cu", "f", (("N1", 64), ("TYPE", "F16"))), folder)
    assert text.startswith("#define N1 64\n#define TYPE F16\n#line 1 ")


def test_a_copy_of_one_source_uses_the_installed_headers(tmp_path):
    (tmp_path / "main.cu").write_text('#include "ptx.cuh"\n')
    assert "DEVICE void block_sync()" in sources.kernel_text(Kernel("main.cu", "f"), tmp_path)


def test_a_missing_header_is_named_with_the_line_that_asks_for_it(tmp_path):
    (tmp_path / "main.cu").write_text('int x;\n#include "gone.cuh"\n')
    with pytest.raises(KernelError, match=r"main\.cu:2: no CUDA source 'gone\.cuh'"):
        sources.kernel_text(Kernel("main.cu", "f"), tmp_path)


def test_own_includes_of_the_kernels_are_unconditional():
    """The one rule of `kernel_text` that a compiler would not notice."""
    for file in sources.kernels_dir().glob("*.cu*"):
        depth = 0
        for line in file.read_text(encoding="utf-8").splitlines():
            depth += bool(re.match(r"\s*#\s*if", line)) - bool(re.match(r"\s*#\s*endif", line))
            assert not (depth and re.match(r'\s*#\s*include\s+"', line)), f"{file.name}: {line}"
