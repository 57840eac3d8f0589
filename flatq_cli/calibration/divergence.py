"""How far a quantized model's next-token distribution is from the full-precision model's, and the gradient of that.

The measure is the Kullback-Leibler divergence of the student's distribution from the teacher's, in nats, a mean over
tokens. A vocabulary is wide, so logits of a few tokens are in memory at once, and the gradient (student's
probabilities minus the teacher's) is written out: a few passes over the logits in place of autograd's dozen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatq_cli.calibration.precision import fast_matmuls

LOGITS_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}
"""So much of a float32 tensor of logits is in memory at once: on a CPU, what stays in its cache; and malloc keeps
blocks of this size (cli/process.py).
"""


def divergence(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student), summed over tokens, and its gradient in the student's logits.

    Args:
        student, teacher: logits [..., vocabulary], any float dtype.
    Returns:
        A float32 scalar, and float32 [..., vocabulary].
    """
    wanted = teacher.float().log_softmax(-1)
    found = student.float().log_softmax(-1)
    probability = wanted.exp()
    total = torch.dot(probability.flatten(), wanted.sub_(found).flatten())
    return total, found.exp_().sub_(probability)


def head_gradient(head: nn.Module, hidden: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """The mean divergence over tokens, and its gradient in what the last block puts out.

    Args:
        head: final norm and head, [1, tokens, hidden] → logits [1, tokens, vocabulary].
        hidden: [batch, tokens, hidden], of the quantized model; target: of the full-precision model. float32.
    Returns:
        The divergence, and a gradient like `hidden`.
    """
    width, tokens = hidden.shape[-1], hidden.shape[0] * hidden.shape[1]
    size = _tokens_at_once(head, hidden)
    total, gradients = 0.0, []
    pieces = (torch.split(x.detach().reshape(1, tokens, width), size, 1) for x in (hidden, target))
    for sample, goal in zip(*pieces, strict=True):
        sample.requires_grad_()
        with fast_matmuls(hidden.device):
            with torch.no_grad():
                teacher = head(goal)
            with torch.enable_grad():
                student = head(sample)
        found, gradient = divergence(student.detach(), teacher)
        student.backward(gradient.div_(tokens).to(student.dtype))
        assert sample.grad is not None
        gradients.append(sample.grad)
        total += float(found)
    return total / tokens, torch.cat(gradients, 1).view_as(hidden)


@torch.no_grad()
def _tokens_at_once(head: nn.Module, hidden: Tensor) -> int:
    with fast_matmuls(hidden.device):
        vocabulary = int(head(hidden[:1, :1]).shape[-1])
    return max(1, LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"]) // (4 * vocabulary))
