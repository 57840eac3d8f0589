"""One process at a time writes to a run."""

import os
import shutil
import subprocess
import sys

import pytest

from flatq_cli.errors import UsageError
from flatq_cli.store import lock
from flatq_cli.store.lock import lock_run, unlock_run
from flatq_cli.store.run import Run, open_or_create
from tests.store.prepare import config

# The lock ------------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from flatq_cli.store.lock import lock_run
lock_run(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_and_reading_is_not(run):
    unlock_run(run.path)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        for attempt in (lambda: open_or_create(run.path, config()), lambda: run.stage("calibrate").begin()):
            with pytest.raises(UsageError, match=rf"in use by another flatq process \(process {holder.pid} on "):
                attempt()
        assert Run.open(run.path).config == run.config
    finally:
        holder.kill()
        holder.communicate()
    run.stage("calibrate").begin()  # a killed holder holds nothing


def test_one_process_takes_its_lock_as_often_as_it_likes(run):
    lock_run(run.path)
    open_or_create(run.path, config()).stage("fuse").begin()
    run.stage("calibrate").begin()


def test_a_run_removed_and_made_again_is_locked_again(run):
    shutil.rmtree(run.path)
    again = open_or_create(run.path, config())
    held = os.fstat(lock._held[run.path.resolve()])
    assert os.path.samestat(held, (again.path / ".lock").stat())
