"""flatq's data files are found in a checkout and in an installed package."""

from flatq_cli.config import locations
from flatq_cli.kernels import sources


def test_a_checkout_uses_its_own_folders():
    assert (locations.configs_dir() / "recipes" / "flatq.yaml").is_file()
    assert locations.kernels_dir().name in ("kernels_cuda", "_kernels_cuda")


def test_the_packaged_copy_wins_where_it_exists(tmp_path, monkeypatch):
    package = tmp_path / "flatq_cli"
    (package / "_configs").mkdir(parents=True)
    monkeypatch.setattr(locations, "PACKAGE", package)
    monkeypatch.setattr(sources, "PACKAGE", package)
    assert locations.configs_dir() == package / "_configs"
    assert locations.kernels_dir() == tmp_path / "kernels_cuda"
