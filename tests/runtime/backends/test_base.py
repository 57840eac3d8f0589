from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from flatq_cli.runtime.linear import PackedLinear
from flatq_cli.runtime.sites import OnlineSite
from tests.runtime.test_linear import rounded_linear


def counted() -> tuple[Callable[[PackedLinear], torch.Tensor], list[PackedLinear]]:
    calls: list[PackedLinear] = []

    def make(linear: PackedLinear) -> torch.Tensor:
        calls.append(linear)
        return linear.codes().float()

    return make, calls


def test_what_is_prepared_is_made_once():
    make, calls = counted()
    linear, _ = rounded_linear(4, 0, True)
    first = linear.prepared(make)
    assert linear.prepared(make) is first
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.to(torch.bfloat16),
        lambda linear: linear.load_state_dict(linear.state_dict()),
        lambda linear: setattr(linear, "weight_scale", linear.weight_scale * 2),
        lambda linear: linear.drop_prepared(),
        lambda linear: linear.prepared(lambda other: None),
    ],
)
def test_it_is_made_again_when_the_module_changes(change):
    make, calls = counted()
    linear, _ = rounded_linear(4, 0, True)
    linear.prepared(make)
    change(linear)
    linear.prepared(make)
    assert len(calls) == 2


def test_a_module_that_holds_this_one_makes_it_forget_too():
    make, calls = counted()
    linear, _ = rounded_linear(4, 0, True)
    model = nn.Sequential(nn.ModuleDict({"inner": linear}))
    linear.prepared(make)
    model.load_state_dict(model.state_dict())
    linear.prepared(make)
    model.to(torch.float16)
    linear.prepared(make)
    assert len(calls) == 3


def test_a_copy_prepares_for_itself():
    make, calls = counted()
    linear, _ = rounded_linear(4, 0, True)
    linear.prepared(make)
    twin = copy.deepcopy(linear)
    assert twin.backend is linear.backend
    twin.weight_packed.zero_()
    assert not torch.equal(twin.prepared(make), linear.prepared(make))
    assert calls == [linear, twin]


def test_what_is_prepared_is_no_part_of_the_state():
    make, _ = counted()
    linear, _ = rounded_linear(4, 8, False)
    before = list(linear.state_dict())
    linear.prepared(make)
    assert list(linear.state_dict()) == before
    assert isinstance(linear.prepared(make), torch.Tensor)
    assert len(list(linear.buffers())) == len(before)


def test_sites_and_linears_are_what_a_backend_runs():
    from flatq_cli.runtime.backends import BackendModule

    assert issubclass(PackedLinear, BackendModule)
    assert issubclass(OnlineSite, BackendModule)
