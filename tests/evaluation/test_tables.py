from __future__ import annotations

from typing import Any

from flatq_cli.evaluation.tables import comparison_rows, evaluation_markdown
from tests.evaluation.judged import judged_result


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_gates_come_first_and_failed_ones_stand_out():
    page = evaluation_markdown(judged_result())
    assert page.startswith("# runs/mine\n\n**2 of 4 gates failed**\n")
    rows = cells(page)
    assert ["piqa.acc_drop", "max 0.02", "0.1", "regression", "**failed**"] in rows
    assert ["piqa.acc", "min 0.02 × baseline", "0.1", "undecided", "passed"] in rows
    assert ["broken", "max 0.02", "not a number", "anomalous", "**failed**"] in rows
    assert "- piqa.acc_drop: 0.1 (0.06 to 0.14 at 0.95 confidence) is above the limit 0.02 by 0.08\n" in page
    assert "- perplexity.prose" not in page


def test_differences_beyond_noise_are_marked():
    rows = cells(evaluation_markdown(judged_result()))
    assert ["prose: perplexity ratio", "1.2", "1.1 to 1.3", "**worse**"] in rows
    assert ["prose: kl divergence", "0.2", "", ""] in rows
    assert ["piqa: acc drop", "0.1", "0.06 to 0.14", "within noise"] in rows


def test_figures_stand_beside_those_of_the_baseline():
    rows = cells(evaluation_markdown(judged_result()))
    assert ["", "fake-quant flatq", "float"] in rows
    assert ["piqa: acc", "0.6", "0.6"] in rows


def test_a_result_without_gates_and_baseline_is_a_table_of_figures():
    alone: dict[str, Any] = {**judged_result(), "gates": []}
    del alone["comparison"], alone["baseline"]
    assert evaluation_markdown(alone) == (
        "# runs/mine\n\n"
        "|  | fake-quant flatq |\n| --- | ---: |\n"
        "| perplexity of prose (256 tokens in windows of 32) | 20 |\n"
        "| piqa: acc | 0.6 |\n"
        "\n12 seconds\n"
    )
    assert comparison_rows(alone) == []


def test_all_passed_is_said():
    passed = {**judged_result(), "gates": judged_result()["gates"][:1]}
    assert "**All 1 gates passed**" not in evaluation_markdown(passed)
    assert "**The gate passed**" in evaluation_markdown(passed)
