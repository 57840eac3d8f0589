import pytest


@pytest.fixture(autouse=True)
def _environment_as_before(monkeypatch):
    """Commands set defaults of the libraries' variables for their process; the test process forgets them."""
    for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
