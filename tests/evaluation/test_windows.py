from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flatq_cli.evaluation import windows as module
from flatq_cli.evaluation.answers import Answers
from flatq_cli.evaluation.perplexity import window_divergence, window_loss
from flatq_cli.evaluation.targets import Target, open_target
from flatq_cli.evaluation.windows import measure_pair, measure_windows
from flatq_cli.store.progress import SilentProgress
from tests.tiny import tiny_model_dir

SILENT = SilentProgress()
ALL = tuple(range(5))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one vocabulary."""
    return tuple(tiny_model_dir(tmp_path_factory.mktemp(name), name) for name in ("llama", "qwen3"))  # type: ignore[return-value]


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 48, (5, 16), generator=torch.Generator().manual_seed(0))


def kept(file: Path, identity: str) -> Answers:
    return Answers(file, identity, pytest.fail)


def not_kept() -> Answers:
    return Answers(None, "", pytest.fail)


class Reads(Target):
    """A target that counts the windows it reads, and stops after so many."""

    read: int
    most: int

    def logits(self, windows: Tensor, progress: Any) -> Iterator[Tensor]:
        for scores in super().logits(windows, progress):
            if self.read == self.most:
                raise KeyboardInterrupt
            self.read += 1
            yield scores


def reading(directory: Path, most: int = 1000) -> Reads:
    target = open_target(str(directory), "cpu")
    target.__class__ = Reads
    target.read, target.most = 0, most  # type: ignore[attr-defined]
    return target  # type: ignore[return-value]


def test_every_window_has_the_loss_that_the_whole_model_gives_it(two, windows: Tensor):
    evidence = measure_windows(open_target(str(two[0]), "cpu"), not_kept(), windows, ALL, SILENT)
    model = open_target(str(two[0]), "cpu").model()
    with torch.no_grad():
        wanted = [window_loss(model(input_ids=window[None]).logits[0], window) for window in windows]
    assert evidence.losses == pytest.approx(wanted, rel=1e-5)
    assert (evidence.indices, evidence.tokens, evidence.seqlen) == (ALL, 5 * 16, 16)


def test_the_windows_of_a_shard_have_the_very_losses_that_they_have_among_all(two, windows: Tensor):
    whole = measure_windows(open_target(str(two[0]), "cpu"), not_kept(), windows, ALL, SILENT)
    part = measure_windows(open_target(str(two[0]), "cpu"), not_kept(), windows, [1, 4], SILENT)
    assert part.indices == (1, 4)
    assert part.losses == (whole.losses[1], whole.losses[4])


def test_slices_change_nothing(two, windows: Tensor, monkeypatch: pytest.MonkeyPatch):
    whole = measure_windows(open_target(str(two[0]), "cpu"), not_kept(), windows, ALL, SILENT)
    monkeypatch.setitem(module._SLICE_TOKENS, "cpu", 32)
    assert measure_windows(open_target(str(two[0]), "cpu"), not_kept(), windows, ALL, SILENT) == whole


def test_a_window_that_is_kept_is_not_read_again_and_a_killed_measurement_goes_on(two, windows: Tensor, tmp_path: Path):
    whole = measure_windows(open_target(str(two[0]), "cpu"), not_kept(), windows, ALL, SILENT)
    file = tmp_path / "answers.sqlite"
    with pytest.raises(KeyboardInterrupt):
        measure_windows(reading(two[0], most=3), kept(file, "it"), windows, ALL, SILENT)
    second = reading(two[0])
    assert measure_windows(second, kept(file, "it"), windows, ALL, SILENT) == whole
    assert second.read == 2
    third = reading(two[0], most=0)
    assert measure_windows(third, kept(file, "it"), windows, ALL, SILENT) == whole


def test_a_pair_has_the_losses_of_each_model_alone_and_the_divergence_of_their_logits(two, windows: Tensor):
    targets = tuple(open_target(str(directory), "cpu") for directory in two)
    ours, theirs, pair = measure_pair(targets, (not_kept(), not_kept()), windows, ALL, SILENT)
    for directory, evidence in zip(two, (ours, theirs), strict=True):
        assert evidence == measure_windows(open_target(str(directory), "cpu"), not_kept(), windows, ALL, SILENT)
    logits = [list(target.logits(windows, SILENT)) for target in targets]
    wanted = [window_divergence(*scores) for scores in zip(*logits, strict=True)]
    assert list(zip(pair.kl, pair.agreement, strict=True)) == wanted
    assert all(kl > 0 for kl in pair.kl)


def test_a_pair_is_kept_under_both_models(two, windows: Tensor, tmp_path: Path):
    def measure(names: tuple[str, str], most: int = 1000) -> tuple[Any, int]:
        targets = (reading(two[0], most), reading(two[1], most))
        answers = tuple(kept(tmp_path / f"{name}.sqlite", name) for name in names)
        return measure_pair(targets, answers, windows, ALL, SILENT), targets[0].read

    first, read = measure(("ours", "theirs"))
    assert read == 5
    assert measure(("ours", "theirs"), most=0) == (first, 0)
    assert measure(("ours", "another"))[1] == 5


def test_logits_of_one_window_of_each_model_are_in_memory_at_a_time(two, windows: Tensor):
    """The second window's are made only after the first one's were used."""
    made: list[str] = []

    class Watched(Reads):
        def logits(self, windows: Tensor, progress: Any) -> Iterator[Tensor]:
            for scores in super().logits(windows, progress):
                made.append(self.spec)
                yield scores

    targets = []
    for directory in two:
        target = reading(directory)
        target.__class__ = Watched
        targets.append(target)
    measure_pair(tuple(targets), (not_kept(), not_kept()), windows, ALL, SILENT)
    assert made == [str(directory) for _ in ALL for directory in two]
