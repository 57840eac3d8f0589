"""A GPU as a `Device`, on a CuPy that writes down what it is told: arguments, attributes, streams, errors."""

import builtins
import ctypes
import struct
import threading
from types import SimpleNamespace

import pytest
import torch

from flatq_cli.kernels import cuda
from flatq_cli.kernels.compiler import Compiled
from flatq_cli.kernels.cuda import CudaDevice, cuda_device, pack_arguments
from flatq_cli.kernels.device import DeviceLimits, Kernel
from flatq_cli.kernels.errors import KernelError

KERNEL = Kernel("scale.cu", "scale", (("N", 3),))
CPU = torch.device("cpu")


class FakeError(Exception):
    pass


class FakeDriver:
    """CuPy's driver bindings; a launch's arguments are read from memory as the real driver reads them."""

    CUDADriverError = FakeError
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self):
        self.attributes, self.launches, self.refuse = [], [], None
        self.contexts = threading.local()  # as in the driver, each thread has its own

    def ctxGetCurrent(self):  # noqa: N802
        return getattr(self.contexts, "current", 0)

    def ctxSetCurrent(self, context):  # noqa: N802
        self.contexts.current = context

    def funcSetAttribute(self, function, attribute, value):  # noqa: N802
        self.attributes.append((function, attribute, value))

    def launchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):  # noqa: N802
        if self.refuse:
            raise FakeError(self.refuse)
        if not self.ctxGetCurrent():
            raise FakeError("CUDA_ERROR_INVALID_CONTEXT")
        first = ctypes.string_at(ctypes.c_uint64.from_address(arguments).value, 8)
        self.launches.append(
            SimpleNamespace(
                function=function,
                grid=(gx, gy, gz),
                block=(bx, by, bz),
                shared=shared,
                stream=stream,
                first=struct.unpack("<Q", first)[0],
                extra=extra,
            )
        )


class FakeModule:
    loads: list = []  # noqa: RUF012
    driver: FakeDriver

    def load(self, cubin):
        if cubin == b"unloadable":
            raise FakeError("CUDA_ERROR_NO_BINARY_FOR_GPU")
        self.loads.append(cubin)
        self.driver.ctxSetCurrent(55)  # CuPy makes the primary context current before it loads

    def get_function(self, name):
        return SimpleNamespace(ptr=100 + len(self.loads), name=name)


@pytest.fixture
def world(monkeypatch):
    """A fake CuPy, a fake compiler, and torch's CUDA functions on a machine with none."""
    FakeModule.loads.clear()
    driver = FakeModule.driver = FakeDriver()
    world = SimpleNamespace(driver=driver, compiled=[], capturing=False, stream=7, cubin=b"cubin", static_shared=0)
    properties = SimpleNamespace(
        major=8,
        minor=9,
        multi_processor_count=128,
        shared_memory_per_block_optin=101376,
        shared_memory_per_multiprocessor=102400,
    )

    def compile_kernel(kernel, arch):
        world.compiled.append((kernel, arch))
        return Compiled(world.cubin, "", 32, 0, 0, world.static_shared)

    class Nothing:
        def __init__(self, device):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    monkeypatch.setattr(cuda, "compile_kernel", compile_kernel)
    monkeypatch.setattr(cuda, "_load_cupy", lambda: cuda._Cupy(driver, FakeModule))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", Nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=world.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: world.capturing)
    return world


def unpack(arguments, kinds):
    """The values that a driver finds, following the list of addresses."""
    packed = pack_arguments(arguments, CPU, KERNEL)
    found = []
    for position, kind in enumerate(kinds):
        address = ctypes.c_uint64.from_address(packed.list + 8 * position).value
        found.append(struct.unpack(kind, ctypes.string_at(address, struct.calcsize(kind)))[0])
    return found


def test_the_driver_finds_every_argument_in_its_type():
    tensor = torch.zeros(4)
    assert unpack([tensor, None, -5, 0.1, 2**31 - 1], ["<Q", "<Q", "<i", "<f", "<i"]) == [
        tensor.data_ptr(),
        0,
        -5,
        struct.unpack("<f", struct.pack("<f", 0.1))[0],
        2**31 - 1,
    ]
    assert unpack([tensor[2:]], ["<Q"]) == [tensor.data_ptr() + 8]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (2**31, "argument 1: .*2147483647"),
        ("text", "argument 1: str is not a tensor"),
        (torch.empty(1, device="meta"), "argument 1: a tensor on meta, the kernel runs on cpu"),
    ],
)
def test_a_wrong_argument_is_named_by_kernel_and_position(argument, message):
    with pytest.raises(KernelError, match=rf"kernel scale \(scale\.cu\), {message}"):
        pack_arguments([None, argument], CPU, KERNEL)


def test_limits_are_those_of_the_gpu(world):
    assert CudaDevice(CPU).limits == DeviceLimits(89, 128, 101376, 102400)


def test_a_launch_goes_to_torchs_current_stream_with_torchs_pointers(world):
    tensor = torch.zeros(4)
    CudaDevice(CPU).launch(KERNEL, (3, 2, 1), 128, 1024, [tensor, 1])
    (launch,) = world.driver.launches
    assert (launch.grid, launch.block, launch.shared, launch.stream) == ((3, 2, 1), (128, 1, 1), 1024, 7)
    assert launch.first == tensor.data_ptr()
    assert launch.extra == 0


def test_a_kernel_is_compiled_for_the_gpu_and_loaded_once(world):
    device = CudaDevice(CPU)
    for _ in range(3):
        device.launch(KERNEL, (1, 1, 1), 32, 0, [])
    device.launch(Kernel("scale.cu", "scale", (("N", 4),)), (1, 1, 1), 32, 0, [])
    assert world.compiled == [(KERNEL, 89), (Kernel("scale.cu", "scale", (("N", 4),)), 89)]
    assert len(FakeModule.loads) == 2
    assert [launch.function for launch in world.driver.launches] == [101, 101, 101, 102]


def test_threads_that_meet_a_new_kernel_load_it_once(world):
    device = CudaDevice(CPU)
    threads = [threading.Thread(target=device.launch, args=(KERNEL, (1, 1, 1), 32, 0, [])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(FakeModule.loads) == 1
    assert len(world.driver.launches) == 8


def test_a_thread_that_has_no_context_yet_launches_in_that_of_the_kernel(world):
    device = CudaDevice(CPU)
    device.launch(KERNEL, (1, 1, 1), 32, 0, [])
    seen = []

    def launch():
        seen.append(world.driver.ctxGetCurrent())
        device.launch(KERNEL, (1, 1, 1), 32, 0, [])
        seen.append(world.driver.ctxGetCurrent())

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert seen == [0, 55]
    assert len(world.driver.launches) == 2


def test_planning_notes_kernels_and_neither_compiles_nor_launches(world):
    device = CudaDevice(CPU)
    with device.planning() as planned:
        device.launch(KERNEL, (1, 1, 1), 32, 0, [torch.zeros(1)])
    assert planned == [KERNEL]
    assert not world.compiled
    assert not world.driver.launches
    device.launch(KERNEL, (1, 1, 1), 32, 0, [])
    assert len(world.driver.launches) == 1
    assert planned == [KERNEL]


def test_shared_memory_beyond_48_kb_is_asked_for_when_it_grows(world):
    device = CudaDevice(CPU)
    for shared in (0, 48 * 1024, 50_000, 49_500, 90_000):
        device.launch(KERNEL, (1, 1, 1), 32, shared, [])
    assert world.driver.attributes == [(101, 8, 50_000), (101, 8, 90_000)]


def test_static_shared_memory_counts_towards_the_48_kb(world):
    world.static_shared = 1024
    CudaDevice(CPU).launch(KERNEL, (1, 1, 1), 32, 48 * 1024 - 512, [])
    assert world.driver.attributes == [(101, 8, 48 * 1024 - 512)]


def test_an_empty_grid_launches_nothing(world):
    CudaDevice(CPU).launch(KERNEL, (0, 1, 1), 32, 0, [])
    assert not world.driver.launches


def test_a_refused_launch_says_which_and_how_large(world):
    world.driver.refuse = "CUDA_ERROR_INVALID_VALUE: invalid argument"
    with pytest.raises(KernelError, match=r"kernel scale .*N=3\) for sm_89: CUDA_ERROR_INVALID_VALUE.*64 threads, 9 b"):
        CudaDevice(CPU).launch(KERNEL, (1, 1, 1), 64, 9, [])


def test_machine_code_that_does_not_load_is_named(world):
    world.cubin = b"unloadable"
    with pytest.raises(KernelError, match=r"kernel scale .* cannot be loaded: CUDA_ERROR_NO_BINARY"):
        CudaDevice(CPU).launch(KERNEL, (1, 1, 1), 64, 0, [])


def test_capture_takes_loaded_kernels_and_refuses_new_ones_with_the_remedy(world):
    device = CudaDevice(CPU)
    world.capturing = True
    with pytest.raises(KernelError, match="captured: run the op once at this size before"):
        device.launch(KERNEL, (1, 1, 1), 32, 0, [])
    world.capturing = False
    device.launch(KERNEL, (1, 1, 1), 32, 0, [])
    world.capturing = True
    device.launch(KERNEL, (1, 1, 1), 32, 0, [])
    assert len(world.driver.launches) == 2


def test_a_device_is_made_once_and_only_for_cuda(world, monkeypatch):
    with pytest.raises(KernelError, match="not on 'cpu'"):
        cuda_device(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cuda._device_of.cache_clear()
    assert cuda_device(torch.device("cuda")) is cuda_device(torch.device("cuda:1"))
    assert cuda_device(torch.device("cuda:0")) is not cuda_device(torch.device("cuda:1"))
    cuda._device_of.cache_clear()


def test_without_cupy_a_device_says_what_to_install(monkeypatch):
    def without_cupy(name, *args, **kwargs):
        if name.partition(".")[0] == "cupy":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_cupy)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(KernelError, match=r"pip install cupy-cuda12x \(or 'flatq\[cuda12\]'\)"):
        cuda._load_cupy()


def test_what_is_used_of_cupy_is_there():
    """The real package, as far as a machine without a GPU can tell: names and the launch's eleven arguments."""
    pytest.importorskip("cupy")
    driver, module = cuda._load_cupy()
    assert issubclass(driver.CUDADriverError, Exception)
    assert driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8
    assert driver.funcSetAttribute
    assert driver.ctxGetCurrent
    assert driver.ctxSetCurrent
    assert {"load", "get_function"} <= set(dir(module))
    if driver.launchKernel.__doc__:
        assert driver.launchKernel.__doc__.count(",") == 10
