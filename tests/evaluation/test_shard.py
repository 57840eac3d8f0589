from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatq_cli.errors import UsageError
from flatq_cli.evaluation.shard import WHOLE, Shard


@given(of=st.integers(1, 12), number=st.integers(0, 500))
def test_every_question_is_in_exactly_one_shard(of: int, number: int):
    assert sum(number in Shard(part, of) for part in range(1, of + 1)) == 1
    assert number in WHOLE


def test_a_shard_takes_every_nth_question_counted_from_its_own():
    assert [number for number in range(10) if number in Shard(2, 3)] == [1, 4, 7]


@given(of=st.integers(1, 99), data=st.data())
def test_a_shard_is_read_as_it_is_written(of: int, data: st.DataObject):
    shard = Shard(data.draw(st.integers(1, of)), of)
    assert Shard.parse(str(shard)) == shard


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "a/b", "1/2/3", "-1/2", "0/2", "3/2", "0/0", "1.0/2"])
def test_what_is_no_shard_is_refused_by_name(text: str):
    with pytest.raises(UsageError, match=rf"^--shard {text}: "):
        Shard.parse(text)
