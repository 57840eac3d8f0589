"""A shard: every n-th question and window of an evaluation, for one of n machines."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flatq_cli.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """Part `part` of `of`, counted from 1: of questions and windows 0, 1, 2, … those from part - 1 in steps of `of`."""

    part: int
    of: int

    @staticmethod
    def parse(text: str) -> Shard:
        """Read `2/3`.

        Raises:
            UsageError: another form, or a part that there is not.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None:
            raise UsageError(f"--shard {text}: give PART/PARTS, such as 1/4")
        part, of = int(match[1]), int(match[2])
        if not 1 <= part <= of:
            raise UsageError(f"--shard {text}: parts are counted from 1 to {max(of, 1)}")
        return Shard(part, of)

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and number % self.of == self.part - 1

    def __str__(self) -> str:
        return f"{self.part}/{self.of}"


WHOLE = Shard(1, 1)
