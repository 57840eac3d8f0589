"""NVRTC without a GPU: machine code, figures, errors, and a cache that processes share."""

import builtins
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatq_cli.kernels import compiler
from flatq_cli.kernels.compiler import compile_kernel
from flatq_cli.kernels.device import Kernel
from flatq_cli.kernels.errors import KernelError

pytest.importorskip("cupy", reason="compiling needs CuPy")

SCALE = Kernel("scale.cu", "scale", (("FACTOR", 3),))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATQ_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "scale.cu").write_text(
        '#include "ptx.cuh"\n'
        'extern "C" __global__ void scale(float* x, int n) {\n'
        "    if (threadIdx.x < n) x[threadIdx.x] *= FACTOR;\n"
        "}\n"
    )
    (tmp_path / "heavy.cu").write_text(
        '#include "ptx.cuh"\n'
        'extern "C" __global__ void __launch_bounds__(1024) heavy(float* x, int n) {\n'
        "    __shared__ float kept[64];\n"
        "    float held[120];\n"
        "    for (int i = 0; i < 120; ++i) held[i] = x[i * 1024 + threadIdx.x];\n"
        "    kept[threadIdx.x % 64] = held[3];\n"
        "    block_sync();\n"
        "    for (int i = 0; i < 120; ++i) x[i * 1024 + threadIdx.x] = held[i] * held[119 - i] + kept[i % 64];\n"
        "}\n"
        'extern "C" __global__ void light(float* x) { x[0] = 0; }\n'
    )
    return tmp_path


@pytest.fixture
def compilations(monkeypatch):
    """The architectures that NVRTC was called for."""
    calls, real = [], compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *args: (calls.append(args[2]), real(*args))[1])
    return calls


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_a_kernel_compiles_to_a_whole_elf_file(folder, arch):
    cubin = compile_kernel(SCALE, arch, folder).cubin
    assert cubin[:4] == b"\x7fELF"
    assert compiler._whole(cubin) == cubin
    assert compiler._whole(cubin[:-1]) == cubin


def test_the_figures_are_those_of_the_kernel_asked_for(folder):
    heavy = compile_kernel(Kernel("heavy.cu", "heavy"), 80, folder)
    light = compile_kernel(Kernel("heavy.cu", "light"), 80, folder)
    assert heavy.registers == 64
    assert heavy.shared_bytes == 256
    assert heavy.spill_bytes > 0
    assert heavy.stack_bytes > 0
    assert light.registers < 64
    assert (light.spill_bytes, light.stack_bytes, light.shared_bytes) == (0, 0, 0)


def test_a_kernel_is_compiled_once(folder, compilations):
    first = compile_kernel(SCALE, 80, folder)
    assert compile_kernel(SCALE, 80, folder) == first
    assert compilations == [80]


def test_another_macro_text_option_or_architecture_is_another_entry(folder, compilations, monkeypatch):
    compile_kernel(SCALE, 80, folder)
    compile_kernel(Kernel("scale.cu", "scale", (("FACTOR", 4),)), 80, folder)
    compile_kernel(SCALE, 90, folder)
    (folder / "scale.cu").write_text((folder / "scale.cu").read_text() + "// changed\n")
    compile_kernel(SCALE, 80, folder)
    monkeypatch.setattr(compiler, "compile_options", lambda arch: ("--gpu-architecture=sm_80", "--ptxas-options=-v"))
    compile_kernel(SCALE, 80, folder)
    assert len(compilations) == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no json", "folder"])
def test_a_damaged_entry_is_compiled_again(folder, compilations, damage):
    good = compile_kernel(SCALE, 80, folder)
    (entry,) = compiler.cache_dir().iterdir()
    content = entry.read_bytes()
    broken = {
        "cut": content[:-9],
        "flipped": content[:-9] + b"\x55" + content[-8:],
        "empty": b"",
        "no json": b"{\n" * 9,
    }
    if damage == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        entry.write_bytes(broken[damage])
    assert compile_kernel(SCALE, 80, folder) == good
    assert len(compilations) == 2
    if damage != "folder":
        assert entry.read_bytes() == content


def test_a_cache_that_cannot_be_written_costs_time_only(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("FLATQ_CACHE_DIR", str(folder / "file"))
    assert compile_kernel(SCALE, 80, folder).registers > 0


def test_processes_share_the_cache_and_leave_no_litter(folder):
    code = (
        "import sys; from pathlib import Path; from flatq_cli.kernels.device import Kernel;"
        "from flatq_cli.kernels.compiler import compile_kernel;"
        "[compile_kernel(Kernel('scale.cu', 'scale', (('FACTOR', n),)), 80, Path(sys.argv[1])) for n in range(3)]"
    )
    command = [sys.executable, "-c", code, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(compiler.__file__).parents[2])}
    running = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    names = sorted(path.name for path in compiler.cache_dir().iterdir())
    assert len(names) == 3
    assert all(name.startswith("scale-sm80-") for name in names)


def test_the_cache_is_in_the_users_cache_folder_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("FLATQ_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_dir() == tmp_path / "flatq" / "kernels"
    monkeypatch.setenv("FLATQ_CACHE_DIR", str(tmp_path / "own"))
    assert compiler.cache_dir() == tmp_path / "own" / "kernels"


def test_a_text_that_does_not_compile_is_one_line_with_kernel_file_and_line(folder):
    (folder / "bad.cu").write_text('#include "ptx.cuh"\n\nextern "C" __global__ void f(float* x) { x[0] = WRONG; }\n')
    with pytest.raises(KernelError) as caught:
        compile_kernel(Kernel("bad.cu", "f", (("N", 7),)), 90, folder)
    message = str(caught.value)
    assert message.startswith("kernel f (bad.cu, N=7) for sm_90 does not compile: bad.cu(3): error: ")
    assert "WRONG" in message
    assert "\n" not in message


def test_a_missing_entry_point_is_named(folder):
    with pytest.raises(KernelError, match=r"scale\.cu has no kernel named other"):
        compile_kernel(Kernel("scale.cu", "other", (("FACTOR", 3),)), 80, folder)


def test_a_chip_newer_than_nvrtc_runs_the_code_of_its_generation():
    assert compiler.code_arch(89, (75, 80, 86)) == 86
    assert compiler.code_arch(90, (75, 80, 90)) == 90
    with pytest.raises(KernelError, match=r"does not compile for sm_130 \(only sm_75, sm_120\)"):
        compiler.code_arch(130, (75, 120))


@pytest.mark.parametrize(
    ("cuda", "package"), [("12.8", "cupy-cuda12x"), ("13.0", "cupy-cuda13x"), (None, "cupy-cuda13x")]
)
def test_without_cupy_the_error_says_what_to_install(monkeypatch, cuda, package):
    def without_cupy(name, *args, **kwargs):
        if name.partition(".")[0] in ("cupy", "cupy_backends"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_cupy)
    monkeypatch.setattr(compiler, "_torch_cuda", lambda: cuda)
    with pytest.raises(KernelError, match=f"pip install {package}"):
        compiler.load_nvrtc.__wrapped__()


def test_without_nvrtc_the_error_says_so(monkeypatch):
    from cupy_backends.cuda.libs import nvrtc

    def absent():
        raise RuntimeError("libnvrtc.so.13: cannot open\nmore")

    monkeypatch.setattr(nvrtc, "getVersion", absent)
    monkeypatch.setattr(compiler, "_preload_nvrtc", lambda: None)
    with pytest.raises(KernelError, match=r"need NVRTC.*\(libnvrtc\.so\.13: cannot open\).*CUDA_PATH"):
        compiler.load_nvrtc.__wrapped__()
