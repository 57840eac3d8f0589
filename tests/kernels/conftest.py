"""What the kernels' tests share: they also run on a bare GPU machine, with torch, CuPy and pytest only.

There, modules that need hypothesis are left out (no test marked `gpu` stands in one). Where torch sees no GPU, tests
marked `gpu` are skipped. Compiled kernels are kept in a folder of the session: no test depends on what ran before it.
`FLATQ_TEST_PART=1/6` takes the second of six parts of the tests marked `gpu`.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

collect_ignore = []
if find_spec("hypothesis") is None:
    modules = Path(__file__).parent.glob("test_*.py")
    collect_ignore = [path.name for path in modules if "\nfrom hypothesis" in path.read_text(encoding="utf-8")]


def pytest_collection_modifyitems(config, items):
    if "FLATQ_TEST_PART" in os.environ:
        part, parts = map(int, os.environ["FLATQ_TEST_PART"].split("/"))
        marked = [item for item in items if item.get_closest_marker("gpu")]
        chosen = marked[len(marked) * part // parts : len(marked) * (part + 1) // parts]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory):
    """A cache of compiled kernels for this session, unless the caller of pytest names one."""
    if "FLATQ_CACHE_DIR" in os.environ:
        yield
        return
    os.environ["FLATQ_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["FLATQ_CACHE_DIR"]
