import subprocess
import sys

import pytest

from flatq_cli.cli.process import keep_freed_memory

FREED_AND_TAKEN_AGAIN = """
import resource, sys
from flatq_cli.cli.process import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for i in range(40):
    if i == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytes(8 << 20) for _ in range(8)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_memory_that_was_freed_is_taken_again_without_page_faults():
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FREED_AND_TAKEN_AGAIN, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert 10 * faults("kept") < faults("as it is")


def test_it_does_nothing_on_other_systems(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("no glibc here"))
    keep_freed_memory()
