import pytest

from flatq_cli.store.lock import unlock_run
from flatq_cli.store.run import Run
from tests.store.prepare import config


@pytest.fixture
def run(tmp_path):
    yield Run.create(tmp_path / "run", config())
    unlock_run(tmp_path / "run")
