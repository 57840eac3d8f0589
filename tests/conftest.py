"""The suite runs on one core: figures then do not depend on the machine's cores, and others may use them.

Set in the environment, before anything imports torch, so that tests without torch stay quick and the processes that
tests start follow it too.
"""

import os

import pytest

try:
    from hypothesis import settings
except ImportError:  # a bare GPU machine, which runs the tests marked `gpu` only
    settings = None

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# A shared core makes single examples slow now and then; the same examples in every run, nothing kept between runs.
if settings is not None:
    settings.register_profile("flatq", deadline=None, derandomize=True, database=None)
    settings.load_profile("flatq")


@pytest.fixture(scope="session", autouse=True)
def _float32_matmuls():
    """In this process matmuls are in float32, also on a CPU that has bf16 (calibration/precision.py): figures do not
    depend on the machine. Tests of what bf16 does turn it on themselves.
    """
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_answers_of_another_session(tmp_path_factory: pytest.TempPathFactory):
    """`flatq eval` keeps answers in the user's cache: none of another session is taken, none is left. Compiled kernels
    are taken from where the caller of pytest says, if he does. In the environment, for the processes that tests start.
    """
    from flatq_cli.kernels.compiler import cache_dir

    own = tmp_path_factory.mktemp("cache")
    if "FLATQ_CACHE_DIR" in os.environ:
        kernels = cache_dir()
        kernels.mkdir(parents=True, exist_ok=True)
        (own / "kernels").symlink_to(kernels.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLATQ_CACHE_DIR", str(own))
        yield
