"""What a user installs: a wheel built from a clean checkout, in an environment that does not see the checkout.

The wheel is built from an sdist, the sdist from the files that git tracks or would track: what a fresh clone holds, so
no empty folder and nothing ignored. The fresh environment borrows the packages of this one through a .pth file, and an
editable installation does not come along, because its own .pth file is not read there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import flatq_cli
from tests.tiny import tiny_model_dir, tiny_text

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
SMALL = ("--set", "calibration.data=text.txt", "--set", "calibration.samples=4", "--set", "calibration.seqlen=16")


def run(command: list[str], folder: Path) -> str:
    """Run a command outside the checkout; its stdout."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout's files as a fresh clone has them."""
    tree = tmp_path_factory.mktemp("clone") / "flatq"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (CHECKOUT / name).is_file():  # deleted but still in the index
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def wheel(clean_tree: Path) -> Path:
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."], clean_tree)
    assert len(list((clean_tree / "dist").glob("*.tar.gz"))) == 1
    (built,) = (clean_tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    run([sys.executable, "-m", "pip", "--python", str(python), *install], folder)
    # Only now: pip would take an editable flatq of the borrowed packages for an installed one.
    site_packages = Path(
        run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    )
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return folder / "bin"


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, outside the checkout."""
    folder = tmp_path_factory.mktemp("user")
    tiny_model_dir(folder, "llama").rename(folder / "tiny")
    tiny_text(folder)
    return folder


def test_the_wheel_holds_the_package_its_configs_and_its_kernels_and_nothing_else(wheel, clean_tree):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"flatq_cli", f"flatq-{flatq_cli.__version__}.dist-info"}
    for inside, beside in (("_configs", "configs"), ("_kernels_cuda", "kernels_cuda")):
        packed = {
            name.removeprefix(f"flatq_cli/{inside}/") for name in names if name.startswith(f"flatq_cli/{inside}/")
        }
        there = {file.relative_to(clean_tree / beside).as_posix() for file in (clean_tree / beside).rglob("*.*")}
        assert packed == there
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {file.relative_to(clean_tree).as_posix() for file in (clean_tree / "flatq_cli").rglob("*.py")}
    assert "flatq_cli/py.typed" in names
    assert not [name for name in names if "__pycache__" in name]


def test_the_installed_package_is_not_the_checkout_and_finds_its_files(installed, user):
    code = (
        "import flatq_cli; from flatq_cli.config.locations import configs_dir, kernels_dir;"
        "print(flatq_cli.__file__, configs_dir(), kernels_dir(), *sorted(p.name for p in configs_dir().iterdir()),"
        "kernels_dir().is_dir(), sep='\\n')"
    )
    module, configs, kernels, *folders, has_kernels = run([str(installed / "python"), "-c", code], user).splitlines()
    package = Path(module).parent
    assert package.is_relative_to(installed.parent.resolve())
    assert (Path(configs), Path(kernels)) == (package / "_configs", package / "_kernels_cuda")
    assert folders == ["gates", "models", "recipes", "tasks"]
    assert has_kernels == "True"


def test_the_installed_command_lists_recipes_and_models(installed, user):
    flatq = str(installed / "flatq")
    recipes = run([flatq, "recipes"], user)
    assert {path.stem for path in (CHECKOUT / "configs" / "recipes").glob("*.yaml")} <= set(recipes.split())
    models = run([flatq, "models"], user)
    assert {path.stem for path in (CHECKOUT / "configs" / "models").glob("*.yaml")} <= set(models.split())


def test_the_installed_command_plans_and_runs_a_calibration(installed, user):
    flatq = str(installed / "flatq")
    assert "attn_in" in run([flatq, "calibrate", "--model", "tiny", "--dry-run"], user)
    assert not (user / "runs").exists()
    run([flatq, "calibrate", "--model", "tiny", *SMALL, "--set", "calibration.epochs=1"], user)
    run([flatq, "fuse"], user)
    assert (user / "runs" / "tiny-flatq" / "calibrate" / "block-00001.safetensors").is_file()
    assert (user / "runs" / "tiny-flatq" / "fuse" / "model.safetensors.index.json").is_file()
