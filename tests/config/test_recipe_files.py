"""Recipes from files and options: what wins, what comes back, and what the error line says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatq_cli.config import recipe as recipe_module
from flatq_cli.config.recipe import CalibrationSpec, KVCacheSpec, Recipe, WeightSpec
from flatq_cli.config.recipe_files import (
    describe_recipe,
    dump_recipe,
    load_recipe,
    recipe_from_mapping,
    recipe_names,
    recipe_stem,
)
from flatq_cli.config.validation import leaf_fields
from flatq_cli.config.yaml_text import parse_yaml
from flatq_cli.errors import UsageError

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"


def recipe_file(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(*arguments, **options):
    with pytest.raises(UsageError) as caught:
        load_recipe(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_bundled_recipes_are_the_documented_ones_and_the_default_is_first():
    assert recipe_names()[0] == "flatq"
    assert set(recipe_names()) == {
        "flatq", "flatq-best", "flatquant", "balanced", "hadamard", "rtn", "smoothquant", "spin",
        "w4a8kv8", "w4a16", "w3a16", "w8a8",
    }  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_a_bundled_recipe_loads_and_says_what_it_is(name):
    assert 20 < len(load_recipe(name).description) < 90


def test_the_models_own_defaults_are_the_recipe_flatq():
    assert load_recipe("flatq").model_copy(update={"description": ""}) == Recipe()


def test_flatquant_is_the_papers_setting():
    recipe = load_recipe("flatquant")
    assert (recipe.transform.init, recipe.transform.parametrization) == ("orthogonal", "svd")
    assert (recipe.transform.diagonal, recipe.transform.smooth_alpha) == ("smooth", 0.3)
    calibration = recipe.calibration
    assert (calibration.epochs, calibration.batch, calibration.samples, calibration.seqlen) == (15, 4, 128, 2048)
    assert (calibration.learning_rate, calibration.clip_learning_rate) == (5e-3, 5e-2)
    assert calibration.weight_decay == 0.01
    assert (recipe.weights.bits, recipe.activations.bits, recipe.kv_cache.bits) == (4, 4, 4)


def test_smoothquant_is_a_diagonal_from_maxima_and_no_matrix():
    recipe = load_recipe("smoothquant")
    assert (recipe.transform.kind, recipe.transform.diagonal, recipe.transform.smooth_alpha) == ("none", "smooth", 0.5)
    assert (recipe.weights.rounding, recipe.tune.steps) == ("nearest", 0)


def test_spin_learns_orthogonal_matrices_from_hadamards_and_rounds_by_gptq():
    recipe = load_recipe("spin")
    transform = recipe.transform
    assert (transform.parametrization, transform.init, transform.diagonal) == ("orthogonal", "hadamard", "none")
    assert recipe.calibration.epochs > 0
    assert (recipe.weights.rounding, recipe.tune.steps) == ("gptq", 0)


@pytest.mark.parametrize("name", ["balanced", "hadamard", "rtn", "smoothquant", "w8a8"])
def test_an_untrained_recipe_trains_nothing(name):
    assert load_recipe(name).calibration.epochs == 0


@pytest.mark.parametrize("name", ["hadamard", "rtn", "smoothquant"])
def test_a_baseline_clips_nothing(name):
    recipe = load_recipe(name)
    assert {recipe.weights.clip, recipe.activations.clip, recipe.kv_cache.clip} == {"none"}


def test_a_preset_is_stronger_than_a_bundled_recipe():
    preset = {"calibration": {"samples": 2, "epochs": 1}}
    found = load_recipe("flatq", ["calibration.epochs=3"], preset).calibration
    assert (found.samples, found.epochs) == (2, 3)


def test_a_file_is_stronger_than_a_preset_and_set_stronger_than_both(tmp_path):
    path = recipe_file(tmp_path, "calibration: {samples: 1, seqlen: 10, epochs: 100}")
    preset = {"calibration": {"samples": 2, "seqlen": 20}}
    found = load_recipe(path, ["calibration.samples=3"], preset).calibration
    assert (found.samples, found.seqlen, found.epochs) == (3, 10, 100)


def test_the_last_set_of_a_key_wins():
    assert load_recipe("flatq", ["weights.bits=3", "weights.bits=8"]).weights.bits == 8


def test_exponents_without_a_point_are_numbers(tmp_path):
    path = recipe_file(tmp_path, "calibration: {learning_rate: 3e-3}")
    found = load_recipe(path, ["calibration.clip_learning_rate=4e-2"]).calibration
    assert (found.learning_rate, found.clip_learning_rate) == (0.003, 0.04)


def test_set_reads_its_value_as_yaml_and_may_set_a_section():
    found = load_recipe("flatq", ["kv_cache={bits: 8, symmetric: true}", "calibration.data=texts/a=b.txt"])
    assert found.kv_cache == KVCacheSpec(bits=8, symmetric=True)
    assert found.calibration.data == "texts/a=b.txt"


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load_recipe(recipe_file(tmp_path, "# nothing yet\n")) == Recipe()


RECIPES = st.builds(
    Recipe,
    description=st.text(),
    weights=st.builds(
        WeightSpec, bits=st.sampled_from([2, 4, 16]), group=st.integers(0, 10**6), symmetric=st.booleans()
    ),
    calibration=st.builds(
        CalibrationSpec,
        data=st.text(),
        seed=st.integers(min_value=0),
        learning_rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        clip_init=st.floats(allow_nan=False, allow_infinity=False),
    ),
)


@settings(max_examples=40, deadline=None)
@given(RECIPES)
def test_a_dumped_recipe_reads_back_equal(recipe):
    assert recipe_from_mapping(parse_yaml(dump_recipe(recipe), "x").data) == recipe


@settings(max_examples=40, deadline=None)
@given(RECIPES)
def test_a_described_recipe_is_the_same_recipe_with_comments(recipe):
    assert recipe_from_mapping(parse_yaml(describe_recipe(recipe), "x").data) == recipe


def test_a_described_recipe_explains_every_key():
    text = describe_recipe(Recipe())
    for path in leaf_fields(Recipe):
        assert re.search(rf"^ *{path[-1]}: .*  # \w", text, re.MULTILINE), path


def test_every_key_is_documented_with_its_default():
    text = DOCS.read_text(encoding="utf-8")
    for path in leaf_fields(Recipe):
        default = Recipe()
        for part in path:
            default = getattr(default, part)
        row = re.search(rf"^\| `{re.escape('.'.join(path))}` \| `(.*?)` \| .+ \| .+ \|$", text, re.MULTILINE)
        assert row, f"{path}: not in {DOCS.name}"
        assert parse_yaml(row[1], "x").data == default, path


def test_every_bundled_recipe_is_documented():
    text = DOCS.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in recipe_names())


def test_a_wrong_choice_is_reported_with_file_line_key_choices_and_the_nearest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text("\n\n\n\n\nactivations:\n  clip: learn\n")
    assert error_of("recipes/mine.yaml") == (
        "recipes/mine.yaml:7: activations.clip: 'learn' is not one of none, learned (did you mean 'learned'?)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", ":1: a: unknown key 'a' (the keys here are description, weights, "),
        ("weights:\n  bit: 4", ":2: weights.bit: unknown key 'bit' (did you mean 'bits'?)"),
        ("bits: 4", ":1: bits: unknown key 'bits' (did you mean weights.bits or activations.bits or kv_cache.bits?)"),
        ("weights: {bits: 7}", ":1: weights.bits: 7 is not one of 2, 3, 4, 5, 6, 8, 16"),
        ("weights: {bits: '4'}", ":1: weights.bits: '4' is not one of 2, 3, 4, 5, 6, 8, 16"),
        ("calibration:\n  batch: 0", ":2: calibration.batch: 0 should be greater than or equal to 1"),
        ("transform: {smooth_alpha: 1.5}", ":1: transform.smooth_alpha: 1.5 should be less than or equal to 1"),
        ("calibration: {learning_rate: -2e-3}", ":1: calibration.learning_rate: -0.002 should be greater than 0"),
        ("calibration: {samples: many}", ":1: calibration.samples: 'many' should be a valid integer"),
        ("activations: {symmetric: perhaps}", ":1: activations.symmetric: 'perhaps' should be a valid boolean"),
        ("tune: {steps: -1}", ":1: tune.steps: -1 should be greater than or equal to 0"),
        (
            "weights:",
            ":1: weights: this is a section with the keys bits, group, symmetric, clip, rounding; found an empty",
        ),
        ("weights: 4", ":1: weights: this is a section with the keys bits, group, symmetric, clip, rounding; found 4"),
        ("- weights", ":1: a recipe is a list of `key: value` lines, found ['weights']"),
        ("weights: [", ":1: not valid YAML: "),
        ("seed: 1\nseed: 2", ":2: seed: this key is there twice (first on line 1)"),
    ],
)
def test_a_wrong_file_is_reported_with_line_and_remedy(tmp_path, text, message):
    assert message in error_of(recipe_file(tmp_path, text))


def test_more_errors_than_the_one_shown_are_counted(tmp_path):
    path = recipe_file(tmp_path, "weights: {bits: 7, group: -1}\ncalibration: {epochs: -1}")
    assert error_of(path).endswith("(and 2 more)")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "activations.clip=learn",
            "--set activations.clip: 'learn' is not one of none, learned (did you mean 'learned'?)",
        ),
        (
            "activation.clip=none",
            "--set activation.clip: activation: unknown key 'activation' (did you mean 'activations'?)",
        ),
        ("calibration.epoch=1", "--set calibration.epoch: unknown key 'epoch' (did you mean 'epochs'?)"),
        ("calibration.epochs=-1", "--set calibration.epochs: -1 should be greater than or equal to 0"),
        ("weights={bits: 7}", "--set weights: weights.bits: 7 is not one of 2, 3, 4, 5, 6, 8, 16"),
        ("weights.bits", "--set weights.bits: expected KEY=VALUE, such as --set weights.bits=4"),
        ("=4", "--set =4: expected KEY=VALUE, such as --set weights.bits=4"),
        ("weights..bits=4", "--set weights..bits=4: expected KEY=VALUE, such as --set weights.bits=4"),
        ("weights.bits=", "--set weights.bits: an empty value is not one of 2, 3, 4, 5, 6, 8, 16"),
    ],
)
def test_a_wrong_set_is_reported_as_the_option_it_was(option, message):
    assert error_of("flatq", [option]) == message


def test_an_orthogonal_form_takes_no_start_that_is_not_orthogonal_not_even_by_default(tmp_path):
    wrong = "'balanced' is not orthogonal, as transform.parametrization is: one of identity, orthogonal, hadamard"
    path = recipe_file(tmp_path, "transform:\n  init: balanced\n  parametrization: orthogonal\n")
    assert error_of(path).endswith(f"mine.yaml:2: transform.init: {wrong}")
    path = recipe_file(tmp_path, "transform:\n  parametrization: orthogonal\n")
    assert error_of(path).endswith(f"mine.yaml:1: transform.init: {wrong}")
    assert error_of("spin", ["transform.init=balanced"]) == f"--set transform.init: {wrong}"
    both = ["transform.parametrization=orthogonal", "transform.init=orthogonal"]
    assert load_recipe("flatq", both).transform.init == "orthogonal"


def test_a_set_that_is_not_yaml_is_reported():
    assert error_of("flatq", ["weights.bits=["]).startswith("--set weights.bits: not valid YAML: ")


def test_an_unknown_recipe_is_reported_with_the_nearest_name_and_all_names():
    message = error_of("hadamrd")
    assert message.startswith(
        "--recipe: there is no recipe 'hadamrd' (did you mean 'hadamard'?); the recipes are flatq, "
    )
    assert message.endswith("or the path of a YAML file")


def test_a_missing_unreadable_or_binary_file_is_reported(tmp_path):
    assert error_of(str(tmp_path / "none.yaml")).endswith(
        "none.yaml: cannot read this recipe (No such file or directory)"
    )
    assert "cannot read this recipe (Is a directory)" in error_of(f"{tmp_path}/")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert error_of(str(binary)).endswith("binary.yaml: not a YAML file (not UTF-8 text)")


def test_a_mapping_that_is_no_recipe_is_reported_with_its_source():
    with pytest.raises(UsageError, match=r"^run\.yaml: weights\.bits: 7 is not one of"):
        recipe_from_mapping({"weights": {"bits": 7}}, "run.yaml")


def test_a_recipes_short_name_is_its_own_or_its_files():
    assert recipe_stem("w4a16") == "w4a16"
    assert recipe_stem("some/where/mine.yaml") == "mine"


def test_config_imports_neither_torch_nor_transformers():
    code = (
        f"import sys, {recipe_module.__name__}, flatq_cli.config.recipe_files, flatq_cli.config.presets;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
