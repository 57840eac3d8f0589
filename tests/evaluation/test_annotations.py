from __future__ import annotations

from flatq_cli.evaluation.annotations import workflow_commands
from tests.evaluation.judged import gate, judged_result


def test_a_failed_gate_is_an_error_and_one_let_through_with_a_reservation_a_warning():
    failed, let_through, broken = workflow_commands(judged_result())
    assert failed == (
        "::error title=flatq gate piqa.acc_drop::"
        "regression: 0.1 (0.06 to 0.14 at 0.95 confidence) is above the limit 0.02 by 0.08"
    )
    assert let_through == "::warning title=flatq gate piqa.acc::undecided: about 3,400 would do"
    assert broken.startswith("::error title=flatq gate broken::anomalous: ")


def test_what_the_runner_would_take_for_its_own_signs_is_escaped():
    (line,) = workflow_commands({"gates": [gate("a,b:c%", "regression", "100 %\nand: more, too")]})
    assert line == "::error title=flatq gate a%2Cb%3Ac%25::regression: 100 %25%0Aand: more, too"


def test_passed_gates_are_not_annotated():
    assert workflow_commands({"gates": [gate("a", "pass", "")]}) == []
