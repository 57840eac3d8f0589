import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flatq_cli.calibration import divergence as module
from flatq_cli.calibration.divergence import divergence, head_gradient


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_divergence_is_kullback_leiblers_summed_over_tokens():
    student, teacher = randn(2, 3, 7, seed=0), randn(2, 3, 7, seed=1)
    p, q = functional.softmax(teacher, -1), functional.softmax(student, -1)
    found, _ = divergence(student, teacher)
    torch.testing.assert_close(found, (p * (p / q).log()).sum())
    assert float(divergence(teacher, teacher)[0]) == pytest.approx(0, abs=1e-6)


def test_its_gradient_is_autograds():
    student, teacher = randn(2, 3, 7, seed=0).requires_grad_(), randn(2, 3, 7, seed=1)
    functional.kl_div(
        student.log_softmax(-1).flatten(0, 1), teacher.log_softmax(-1).flatten(0, 1), reduction="sum", log_target=True
    ).backward()
    torch.testing.assert_close(divergence(student.detach(), teacher)[1], student.grad)


@pytest.mark.parametrize("logits_bytes", [1, 4 * 11 * 5, 1 << 20])
def test_a_heads_gradient_is_autograds_however_many_tokens_are_taken_at_once(
    monkeypatch: pytest.MonkeyPatch, logits_bytes: int
):
    monkeypatch.setitem(module.LOGITS_BYTES, "cpu", logits_bytes)
    torch.manual_seed(0)
    head = nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 11, bias=False)).requires_grad_(False)
    hidden, target = randn(2, 4, 6, seed=2).requires_grad_(), randn(2, 4, 6, seed=3)
    found, gradient = head_gradient(head, hidden, target)
    teacher, student = head(target).log_softmax(-1), head(hidden).log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    expected.backward()
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, hidden.grad)
