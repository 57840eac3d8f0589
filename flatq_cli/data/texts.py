"""Texts to calibrate and to evaluate on: a few by name, and any UTF-8 file.

A text is identified by the SHA-256 of its UTF-8 bytes (of a file: its bytes as they are), which the run records.
Why these names: `docs/decisions/0002-calibration-text.md`.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatq_cli.errors import UsageError

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
NAMES = {
    "auto": "wikitext2 where the Hugging Face hub or its cache gives it, otherwise pydoc",
    "wikitext2": "WikiText-2 raw from the Hugging Face hub: the train split; in an evaluation the test split",
    "wikitext2-test": "WikiText-2 raw from the Hugging Face hub: the test split",
    "pydoc": "the language reference that comes with Python (pydoc_data.topics), needs no network: the first two "
    "thirds of its paragraphs; in an evaluation the last third",
    "pydoc-test": "the last third of the paragraphs of the language reference",
}
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Text:
    """A text: its resolved name or the path it was asked for by, its content, and the SHA-256 that identifies it."""

    name: str
    content: str
    sha256: str


def load_text(spec: str, *, evaluation: bool = False, warn: Callable[[str], None] | None = None) -> Text:
    """Find a text.

    Args:
        spec: a name of `NAMES`, or the path of a UTF-8 text file (`./pydoc` for a file with such a name).
        evaluation: take the test split of `wikitext2`, and of `pydoc`.
        warn: told in one line when `auto` had to fall back.
    Raises:
        UsageError: no such name or file, a file that is not UTF-8 or empty, or the hub gave nothing.
    """
    if spec in ("pydoc", "pydoc-test"):
        return _pydoc(test=evaluation or spec == "pydoc-test")
    if spec in ("wikitext2", "wikitext2-test"):
        return _wikitext(test=evaluation or spec == "wikitext2-test")
    if spec == "auto":
        try:
            return _wikitext(test=evaluation)
        except UsageError as error:
            text = _pydoc(test=evaluation)
            if warn is not None:
                warn(f"{error}. Using the text pydoc instead")
            return text
    return _file(spec)


def _pydoc(test: bool) -> Text:
    """Python's language reference in plain text. Its content depends on the version of Python.

    Topics contain others, so about a fifth of the reference is there twice: a paragraph counts once, and the two parts
    have none in common.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(
            "the text pydoc is not in this Python (no module pydoc_data): give the path of a UTF-8 text file"
        ) from error
    pieces = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    paragraphs = list(dict.fromkeys(piece.rstrip() for piece in pieces if piece.strip()))
    cut = len(paragraphs) * 2 // 3
    name, part = ("pydoc-test", paragraphs[cut:]) if test else ("pydoc", paragraphs[:cut])
    return _text(name, "\n\n".join(part))


def _wikitext(test: bool) -> Text:
    """WikiText-2 raw, its lines joined by blank lines. Source: https://github.com/IST-DASLab/gptq, datautils.py."""
    name, split = ("wikitext2-test", "test") if test else ("wikitext2", "train")
    rows = _hub_split(*WIKITEXT, split)
    return _text(name, "\n\n".join(rows))


def _hub_split(repository: str, configuration: str, split: str) -> list[str]:
    """The column `text` of a dataset of the hub, or of its cache where the hub does not answer."""
    import datasets
    from huggingface_hub import constants

    unreachable = None if datasets.config.HF_HUB_OFFLINE else _why_unreachable(constants.ENDPOINT, repository)
    try:
        with _quiet(datasets), _offline(datasets, unreachable is not None):
            return list(datasets.load_dataset(repository, configuration, split=split)["text"])
    except Exception as error:  # the libraries raise a dozen kinds, down to bare OSError and ValueError
        if datasets.config.HF_HUB_OFFLINE:
            reason = "offline mode is on (HF_HUB_OFFLINE) and the cache does not have it"
        elif unreachable:
            reason = f"{unreachable}, and the cache does not have it"
        else:
            reason = _first_line(error)
        raise UsageError(
            f"cannot get {repository} ({configuration}, {split}) from the Hugging Face hub {constants.ENDPOINT}: "
            f"{reason}; connect, or give the path of a UTF-8 text file instead of the name"
        ) from error


def _why_unreachable(endpoint: str, repository: str) -> str | None:
    """Ask the hub once, with a short timeout: the libraries would retry for half a minute before they give up."""
    from huggingface_hub import get_session

    try:
        response = get_session().head(f"{endpoint}/api/datasets/{repository}", timeout=_PROBE_SECONDS)
    except Exception as error:  # whatever the HTTP client of this version of huggingface_hub raises
        return f"the hub does not answer ({_first_line(error)})"
    return f"the hub answers {response.status_code}" if response.status_code >= 500 else None


@contextlib.contextmanager
def _offline(datasets: Any, offline: bool) -> Iterator[None]:
    """Keep `datasets` to its cache: the variable HF_HUB_OFFLINE is read once, at import."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No bars and no log lines of the libraries: what went wrong is in the error."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = datasets.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _file(spec: str) -> Text:
    path = Path(spec).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        names = ", ".join(NAMES)
        raise UsageError(f"no text {spec!r}: it is neither a file nor one of {names}{_nearest(path)}") from error
    except IsADirectoryError as error:
        raise UsageError(f"{spec} is a directory: give the path of a UTF-8 text file") from error
    except OSError as error:
        raise UsageError(f"cannot read the text {spec}: {error.strerror}") from error
    mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        decoded = content[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = mark + error.start
        raise UsageError(
            f"{spec} is not UTF-8 text: byte {at:,} is 0x{content[at]:02x}; convert it, or give another file"
        ) from error
    if not decoded.strip():
        raise UsageError(f"{spec} is empty: give a text")
    return Text(spec, decoded, hashlib.sha256(content).hexdigest())


def _nearest(path: Path) -> str:
    """Names near to one that does not exist: of the named texts, and of the files beside it."""
    files: dict[str, str] = {}
    with contextlib.suppress(OSError):
        files = {file.name: str(path.parent / file.name) for file in path.parent.iterdir() if file.is_file()}
    near = difflib.get_close_matches(path.name, [*files, *NAMES], n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(files.get(name, name) for name in near)}?)" if near else ""


def _text(name: str, content: str) -> Text:
    return Text(name, content, hashlib.sha256(content.encode("utf-8")).hexdigest())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
