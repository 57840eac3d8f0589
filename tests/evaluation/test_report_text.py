from __future__ import annotations

import pytest

from flatq_cli.config.recipe_files import load_recipe, recipe_names
from flatq_cli.evaluation.report_text import (
    bits_name,
    block_sentences,
    duration,
    figure,
    report_markdown,
    results,
    running_mean,
    settings,
    site_figures,
    site_sentence,
    sites,
    size,
    stages,
    tuning_sentence,
)
from tests.evaluation.report_data import bare_data, report_data, untuned


def words_of(**sections: dict[str, object]) -> dict[str, str]:
    """The settings in words of the default recipe with other sections."""
    data = report_data("x")
    recipe = {
        name: {**value, **sections.get(name, {})} for name, value in data["recipe"].items() if name != "description"
    }
    return {row[0]: row[1] for row in settings({**data, "recipe": recipe}).rows}


def test_settings_say_what_the_recipe_says():
    words = words_of()
    assert words["weights"].startswith("4 bits, symmetric, one scale for each output channel, rounded by GPTQ on 128 ×")
    assert words["KV cache"] == "4 bits, asymmetric, one scale for each token and head, clips searched"
    assert "no training" in words["calibration"]
    assert words["tuning after rounding"].startswith(f"{load_recipe('flatq').tune.steps} steps")


def test_settings_of_a_recipe_without_the_parts():
    words = words_of(
        weights={"bits": 16},
        activations={"clip": "none"},
        transform={"kind": "none", "diagonal": "none"},
        tune={"steps": 0},
        calibration={"epochs": 3},
        kv_cache={"bits": 8},
    )
    assert words["weights"] == "left in floating point"
    assert words["activations"].endswith("no clipping")
    assert (words["transform"], words["tuning after rounding"]) == ("none", "none")
    assert "3 epochs a block" in words["calibration"]
    assert words["KV cache"].endswith("clips learned")


def test_a_learned_form_and_a_fixed_clip_are_named():
    words = words_of(transform={"parametrization": "svd", "init": "orthogonal"}, calibration={"clip_start": "fixed"})
    assert "two orthogonal factors" in words["transform"]
    assert "start random orthogonal" in words["transform"]
    assert words["activations"].endswith("clips at a fixed factor")


@pytest.mark.parametrize("name", recipe_names())
def test_every_bundled_recipe_has_words(name: str):
    recipe = load_recipe(name).model_dump(mode="json")
    assert all(row[1] for row in settings(report_data("x", recipe=recipe)).rows)


def test_bits_have_the_name_that_papers_use():
    assert bits_name(load_recipe("w4a8kv8").model_dump(mode="json")) == "W4A8KV8"


def test_results_have_a_column_for_each_figure_perplexity_first():
    data = report_data("wiki")
    data["comparison"][1]["perplexity.other"] = 30.0
    table = results(data)
    assert table.header == [
        *(
            "run",
            "recipe",
            "perplexity of wiki",
            "perplexity of other",
            "wiki acc",
            "size",
            "compression",
            "time",
            "memory",
        )
    ]
    assert table.rows[0] == ["wiki", "wiki", "21.5", "–", "0.25", "50.0 MiB", "2.50 ×", "1 min 30 s", "300.0 MiB"]
    assert table.rows[1][3] == "30"
    assert table.rows[1][-1] == "–"


def test_stages_say_their_memory_and_a_gpus_where_one_was_used():
    data = report_data()
    assert stages(data).rows == [["calibrate", "done", "2.9 KiB", "1 min 15 s", "300.0 MiB"]]
    data["stages"][0]["peak_gpu_memory_bytes"] = 2**30
    assert stages(data).header[-2:] == ["memory", "GPU memory"]
    assert stages(data).rows[0][-1] == "1.0 GiB"


def test_sentences_name_the_worst_block_and_what_tuning_did():
    (worst,) = block_sentences(report_data())
    assert worst.startswith("Block 1 has the largest loss, 0.08: 80%")
    assert "from 0.3 to 0.25" in tuning_sentence(report_data())


def test_a_running_mean_is_that_of_a_tenth_and_steps_over_what_is_no_number():
    assert running_mean([1.0, 2.0, 6.0]) == [1.5, 3.0, 4.0]
    assert running_mean([1.0, None, 3.0]) == [1.0, 2.0, 3.0]
    assert running_mean([]) == []
    middle = running_mean([float(value) for value in range(100)])
    assert (middle[0], middle[50], middle[99]) == (2.5, 50.0, 96.5)
    # A single outlier weighs a tenth.
    assert running_mean([0.0] * 50 + [11.0] + [0.0] * 49)[50] == 1.0


def test_an_untrained_run_says_so():
    data = report_data(tuning=None)
    for row in data["blocks"]:
        row["steps"] = 0
    assert any("No block was trained" in sentence for sentence in block_sentences(data))


def test_a_loss_that_is_not_a_number_is_no_worst_block():
    data = report_data(tuning=None)
    data["blocks"][1]["loss_after"] = None
    assert block_sentences(data)[0].startswith("Block 0")


def test_figures_of_a_site_go_block_by_block():
    none = [None, None]
    name, peaks, errors = site_figures(report_data(), "key", "partner")
    assert (name, peaks, errors) == ("queries", [[20.0, 20.0], [1.5, 1.5], none], [none, none, none])
    name, peaks, errors = site_figures(report_data(), "key", "activation")
    assert (peaks[2], errors) == ([1.25, 1.25], [[0.004, 0.004], [0.004, 0.004], [0.002, 0.002]])


def test_sites_have_columns_for_tuned_where_the_run_is():
    data = report_data()
    assert sites(data).header == [*("site", "side", "peak before", "after", "tuned", "error before", "after", "tuned")]
    assert sites(data).rows[2] == ["key", "keys", "20", "1.5", "1.25", "0.004", "0.004", "0.002"]
    assert "the tuned block" in site_sentence(data)
    untuned(data)
    assert sites(data).header == ["site", "side", "peak before", "after", "error before", "after"]
    assert sites(data).rows[2] == ["key", "keys", "20", "1.5", "0.004", "0.004"]
    assert "tuned" not in site_sentence(data)


def test_markdown_holds_every_table_and_no_html():
    text = report_markdown(report_data("a <b>|\n# c"))
    assert "<b>" not in text
    assert "\n# c" not in text
    assert "a &lt;b&gt;\\| # c" in text
    for heading in ("## Results", "## What was done", "## Blocks", "## Tuning", "## Sites"):
        assert heading in text


def test_markdown_of_a_run_that_has_hardly_begun_says_what_is_missing():
    text = report_markdown(bare_data())
    assert "- tiny-run is missing" in text
    assert "## Sites" not in text
    assert "## Blocks" not in text
    assert "## Tuning" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (23.669, "23.67"), (1240.4, "1,240"), (0.00001234, "1.23e-5"), (3e7, "3e7"), (1, "1")],
)
def test_figures_are_short(value, text):
    assert figure(value) == text


def test_sizes_and_times_have_units():
    assert [size(value) for value in (None, 10, 1536, 3 * 2**30)] == ["–", "10 B", "1.5 KiB", "3.0 GiB"]
    assert [duration(value) for value in (None, 9.4, 130, 7500)] == ["–", "9 s", "2 min 10 s", "2 h 05 min"]
