"""One stage of a run: its directory, its manifest, and the order in which the two are written.

A file is complete and synced before the manifest names it, and the manifest is replaced atomically. So a stage that is
killed goes on where it was, and what a manifest names is whole. A stage records what it was made from (`inputs`,
usually another stage's digest); when that differs, its items are stale and it starts over. Whatever depends on time is
in the manifests only, so that two runs of one recipe give the same files bit for bit.

The memory that was needed since the last item, of whichever stage, is put down to the stage that gets the next one. So
a stage that works in the middle of another, as tuning does in fuse, has a peak of its own; and a stage that was killed
and goes on has the largest of its parts.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatq_cli.errors import UsageError
from flatq_cli.store import atomic
from flatq_cli.store.lock import lock_run
from flatq_cli.store.memory import Peak, take_peak
from flatq_cli.store.records import MANIFEST_SCHEMA, Item, Manifest, Metrics, inside_stage, read_record

if TYPE_CHECKING:
    from torch import Tensor


class Stage:
    """One stage's directory and manifest. `begin`, then `save` each item not yet `complete`, then `finish`."""

    def __init__(self, run_path: Path, name: str) -> None:
        """Use `Run.stage`."""
        self.run_path = run_path
        self.name = name
        self.path = run_path / name
        self._manifest = self._read()

    @property
    def manifest(self) -> Manifest:
        """What the stage has finished; empty where it has not begun."""
        return self._manifest or Manifest(stage=self.name)

    @property
    def done(self) -> bool:
        """Whether the stage finished."""
        return self.manifest.status == "done"

    def begin(self, inputs: dict[str, str] | None = None) -> list[str]:
        """Lock the run and make the stage ready to save items; what is finished already stays.

        Args:
            inputs: what the stage is made from, as hashes (an earlier stage's `digest`, …).
        Returns:
            Names of the items that were dropped because the stage was made from other inputs; usually none.
        Raises:
            UsageError: another process is at work on this run.
        """
        inputs = dict(inputs or {})
        atomic.make_directory(self.path)
        lock_run(self.run_path)
        atomic.clean_stale(self.run_path)
        atomic.clean_stale(self.path, below=True)
        self._manifest = self._read()
        stale: dict[str, Item] = {}
        if self._manifest is not None and self._manifest.inputs != inputs:
            stale = self._manifest.items
            # Not done from here on, and the manifest goes last: killed in between, the next `begin` starts over again.
            self._write(self._manifest.model_copy(update={"status": "running"}))
            for item in stale.values():
                (self.path / item.file).unlink(missing_ok=True)
            self._manifest = None
        if self._manifest is None:
            self._write(Manifest(stage=self.name, inputs=inputs))
        take_peak()  # what was needed before is not this stage's
        return sorted(stale)

    def complete(self, name: str, verify: bool = False) -> bool:
        """Whether item `name` is finished: in the manifest, and its file there in full size (`verify`: and hash)."""
        item = self.manifest.items.get(name)
        if item is None:
            return False
        file = self.path / item.file
        if not file.is_file() or file.stat().st_size != item.bytes:
            return False
        return not verify or atomic.file_sha256(file) == item.sha256

    def save(
        self,
        name: str,
        filename: str,
        tensors: dict[str, Tensor],
        metrics: Metrics | None = None,
        seconds: float = 0.0,
        metadata: dict[str, str] | None = None,
    ) -> Item:
        """Write tensors to `filename` and then add item `name` to the manifest, each atomically.

        Raises:
            WorkError: disk full or another failed write; nothing finished before is lost.
        """
        self._forget(name)
        file = self.path / inside_stage(filename)
        atomic.make_directory(file.parent)
        digest = atomic.save_tensors(file, tensors, metadata)
        item = Item(
            file=filename, sha256=digest, bytes=file.stat().st_size, metrics=dict(metrics or {}), seconds=seconds
        )
        self._add(name, item)
        return item

    def add_file(self, name: str, path: Path, metrics: Metrics | None = None, seconds: float = 0.0) -> Item:
        """Add a file that was written into the stage's directory by other means (a config, an index) as item `name`.

        Raises:
            ValueError: the file is not inside the stage's directory.
        """
        filename = path.resolve().relative_to(self.path.resolve()).as_posix()
        self._forget(name)
        atomic.fsync_path(path)
        atomic.fsync_path(path.parent)
        item = Item(
            file=filename,
            sha256=atomic.file_sha256(path),
            bytes=path.stat().st_size,
            metrics=dict(metrics or {}),
            seconds=seconds,
        )
        self._add(name, item)
        return item

    def drop(self, name: str) -> None:
        """Take item `name`, if there is one, out of the manifest and then delete its file."""
        item = self.manifest.items.get(name)
        if item is not None:
            self._forget(name)
            (self.path / item.file).unlink(missing_ok=True)

    @property
    def command(self) -> str:
        """The command that makes it: of `fuse/tune` that is `fuse`."""
        return self.name.split("/")[0]

    def verify(self) -> None:
        """Check every item's file against its SHA-256.

        Raises:
            UsageError: a file is missing or damaged; says what to do.
        """
        for name, item in self.manifest.items.items():
            if not self.complete(name, verify=True):
                raise UsageError(
                    f"{self.path / item.file} is missing or damaged (its SHA-256 is not the manifest's); delete it and "
                    f"run `flatq {self.command}` again, which makes it anew"
                )

    def load(self, name: str, device: str = "cpu") -> dict[str, Tensor]:
        """Read the tensors of item `name`, after checking the file against the manifest.

        Raises:
            UsageError: not in the manifest, missing, or damaged; says what to do.
        """
        item = self.manifest.items.get(name)
        again = f"run `flatq {self.command}` again, which makes it anew"
        if item is None:
            raise UsageError(f"{self.path} has no {name}; run `flatq {self.command}` first")
        file = self.path / item.file
        if not file.is_file():
            raise UsageError(f"{file} is missing; {again}")
        if atomic.file_sha256(file) == item.sha256:
            return atomic.load_tensors(file, device)
        reason = "its SHA-256 is not the manifest's"
        try:
            atomic.load_tensors(file)
        except UsageError as error:  # a truncated file: that one says where
            reason = str(error).removeprefix(f"{file} is damaged: ").split("; delete")[0]
        raise UsageError(f"{file} is damaged: {reason}; delete it and {again}")

    def finish(self, metrics: dict[str, Any] | None = None, seconds: float = 0.0) -> None:
        """Mark the stage as done."""
        done = {"status": "done", "metrics": dict(metrics or {}), "seconds": seconds}
        self._write(self._begun().model_copy(update={**done, **self._peak()}))

    def digest(self) -> str:
        """A hash over the names and hashes of the items: the input of the next stage. Equal for equal artifacts."""
        items = {name: item.sha256 for name, item in self.manifest.items.items()}
        return hashlib.sha256(json.dumps(items, sort_keys=True).encode("utf-8")).hexdigest()

    def require_done(self, next: str) -> None:
        """Check that the stage finished and its files are there, before `next` (`flatq fuse`) uses them.

        Raises:
            UsageError: it did not finish, or a file is gone; says what to run.
        """
        again = f"run `flatq {self.command} …` first"
        if not self.done:
            begun = f" ({len(self.manifest.items)} items so far)" if self.manifest.items else ""
            raise UsageError(f"{self.run_path} has no finished {self.name} stage{begun}, which `{next}` needs; {again}")
        for name, item in self.manifest.items.items():
            if not self.complete(name):
                raise UsageError(f"{self.path / item.file}, which `{next}` needs, is missing or cut off; {again}")

    def _begun(self) -> Manifest:
        if self._manifest is None:
            raise ValueError(f"stage {self.name} was not begun")
        return self._manifest

    def _add(self, name: str, item: Item) -> None:
        manifest = self._begun()
        items = {**manifest.items, name: item}
        self._write(manifest.model_copy(update={"items": items, "status": "running", **self._peak()}))

    def _peak(self) -> dict[str, int | None]:
        """The manifest's peaks, with what was needed since the last item."""
        manifest = self._begun()
        so_far = Peak(manifest.peak_memory_bytes, manifest.peak_gpu_memory_bytes)
        peak = so_far.or_larger(take_peak())
        return {"peak_memory_bytes": peak.resident, "peak_gpu_memory_bytes": peak.gpu}

    def _forget(self, name: str) -> None:
        """Take an item out of the manifest before its file is replaced, so that no entry ever names another's bytes."""
        manifest = self._begun()
        if name in manifest.items:
            items = {key: item for key, item in manifest.items.items() if key != name}
            self._write(manifest.model_copy(update={"items": items, "status": "running"}))

    def _read(self) -> Manifest | None:
        file = self.path / "manifest.json"
        remedy = f"delete it: the {self.name} stage then starts over"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, OSError) as error:
            raise UsageError(f"{file} is broken ({error}); {remedy}") from error
        return read_record(Manifest, content, file, MANIFEST_SCHEMA, remedy)

    def _write(self, manifest: Manifest) -> None:
        # pydantic writes a figure that is not a number as null: JSON has no NaN
        atomic.write_text(self.path / "manifest.json", manifest.model_dump_json(indent=2, by_alias=True) + "\n")
        self._manifest = manifest
