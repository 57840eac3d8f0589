"""`flatq export`: write the fused model as a directory that an engine loads, load it again, and compare.

    RUN/export/<format>/        the directory, with a manifest as every stage has one
    model-0000k-of-0000n.safetensors, model.safetensors.index.json, config.json, generation_config.json, tokenizer
    files, modeling_flatq.py (for transformers without flatq), README.md (the model card)

The format `flatq` is for transformers, after `import flatq_cli`; docs/format.md describes every byte of it. Its tensors
differ from those of RUN/fuse in one thing: codes are packed. Shards are made one at a time, and a killed export goes on
where it was. The card holds the figures that RUN/eval has; a finished export gets a new card, and nothing else, when
these have changed.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flatq_cli.errors import FlatqError, UsageError, WorkError
from flatq_cli.evaluation.perplexity import model_logits, streamed_logits
from flatq_cli.models.locate import load_tokenizer
from flatq_cli.quantization.weights import CODES
from flatq_cli.runtime.fused import FusedSource, open_fused
from flatq_cli.runtime.integrity import DIGESTS, digests
from flatq_cli.runtime.linear import PackedLinear, packed_tensors
from flatq_cli.runtime.transformers_plugin import FORMAT, UNLOADABLE, FlatqConfig
from flatq_cli.stages.fuse import INDEX
from flatq_cli.stages.fuse import STAGE as FUSE
from flatq_cli.stages.inspect import tensors_of
from flatq_cli.stages.model_card import CARD, license_of, model_card
from flatq_cli.stages.remote_code import FILE as REMOTE_CODE
from flatq_cli.stages.remote_code import auto_map, remote_code
from flatq_cli.store import atomic
from flatq_cli.store.progress import Progress, SilentProgress
from flatq_cli.store.records import RunConfig
from flatq_cli.store.run import Run
from flatq_cli.store.stage import Stage

STAGE = "export"
TOLERANCE = 1e-4
"""Greatest difference of a logit, relative to the greatest. Both models do the same arithmetic: usually it is 0."""
WINDOWS, SEQLEN, SEED = 2, 32, 0


def export(run: Run, format: str, out: Path | None, progress: Progress) -> dict[str, Any]:
    """Export the fused model of `run` for an engine and verify the result.

    Args:
        format: a key of `EXPORTERS`.
        out: where to; None is RUN/export/<format>.
    Returns:
        path, bytes (of the weights), float16_bytes (of the original in 16 bits), compression, and what was verified.
    Raises:
        UsageError: an unknown format, a run that is not fused, or an `out` that holds something else.
        WorkError: the export does not give what the fused model gives; names the tensor.
    """
    started = time.monotonic()
    if format not in EXPORTERS:
        raise UsageError(f"--format {format}: not one of {', '.join(EXPORTERS)}")
    fused = run.stage(FUSE)
    fused.require_done("flatq export")
    stage = run.stage(_place(run, format, out))
    _check_place(stage, out)
    stage.begin({FUSE: fused.digest(), "format": EXPORTERS[format].version})
    path = str(out or stage.path)
    if stage.done and all(stage.complete(name, verify=True) for name in stage.manifest.items):
        progress.log(f"export: {path} is done")
        metrics, seconds = dict(stage.manifest.metrics), stage.manifest.seconds
    else:
        metrics = EXPORTERS[format].write(run, stage, progress)
        seconds = time.monotonic() - started
    _write_card(run, stage, metrics, progress)
    if not stage.done:
        stage.finish(metrics, seconds)
    return {"path": path, **stage.manifest.metrics}


def renew_card(run: Run, format: str, out: Path | None, progress: Progress) -> None:
    """Let the model card of a finished export say what RUN/eval has by now. Others: as `export`."""
    stage = run.stage(_place(run, format, out))
    metrics, seconds = dict(stage.manifest.metrics), stage.manifest.seconds
    _write_card(run, stage, metrics, progress)
    if not stage.done:
        stage.finish(metrics, seconds)


def _place(run: Run, format: str, out: Path | None) -> str:
    """The name of the export's stage: its path from the run."""
    return f"{STAGE}/{format}" if out is None else os.path.relpath(out.resolve(), run.path.resolve())


def _check_place(stage: Stage, out: Path | None) -> None:
    """Refuse to write into a directory that holds something else: files of the same names would be replaced."""
    if out is None or not out.is_dir() or not any(out.iterdir()):
        return
    if "format" not in stage.manifest.inputs:
        raise UsageError(f"--out {out}: not empty, and not an export of flatq; give a new or an empty directory")


# The format `flatq`


def _write_flatq(run: Run, stage: Stage, progress: Progress) -> dict[str, Any]:
    source = open_fused(run)
    fused = run.stage(FUSE)
    bits = run.config.recipe.weights.bits
    for name in progress.track(list(fused.manifest.items), "export"):
        if not stage.complete(name, verify=True):
            started = time.monotonic()
            tensors = packed_tensors(fused.load(name), bits)
            file = fused.manifest.items[name].file
            stage.save(name, file, tensors, seconds=time.monotonic() - started, metadata={"format": "pt"})
    _add_text(stage, "config.json", _config(source, run.config).to_json_string())
    _add_text(stage, "generation_config.json", _generation_config(source))
    _add_text(stage, REMOTE_CODE, remote_code(_architecture(source), type(source.config).__name__))
    _write_tokenizer(stage, source)
    _write_index(stage)
    progress.log("export: loading it again and comparing")
    verified = verify(source, stage.path)
    size = sum(item.bytes for item in stage.manifest.items.values() if item.file.endswith(".safetensors"))
    float16 = 2 * _parameters(source)
    return {"bytes": size, "float16_bytes": float16, "compression": float16 / size, "verified": verified}


def _write_index(stage: Stage) -> None:
    """The index that says which shard holds a tensor, in the layout of the Hugging Face hub, and the digests of all."""
    weight_map: dict[str, str] = {}
    total = 0
    files = [stage.path / item.file for item in stage.manifest.items.values()]
    shards = [file for file in files if file.suffix == ".safetensors"]
    for shard in shards:
        tensors = tensors_of(shard)
        weight_map |= {tensor["name"]: shard.name for tensor in tensors}
        total += sum(tensor["bytes"] for tensor in tensors)
    metadata = {"total_size": total, DIGESTS: digests(shards, files)}
    atomic.write_json(stage.path / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    stage.add_file(INDEX, stage.path / INDEX)


def _write_card(run: Run, stage: Stage, metrics: dict[str, Any], progress: Progress) -> None:
    """Write the model card unless it is there and says the same."""
    file = stage.path / CARD
    card = model_card(run, metrics, license_of(Path(run.config.model.location), file))
    if not stage.complete(CARD, verify=True) or file.read_text(encoding="utf-8") != card:
        _add_text(stage, CARD, card)
        progress.log(f"export: {CARD} is written")


def _add_text(stage: Stage, name: str, content: str) -> None:
    atomic.write_text(stage.path / name, content)
    stage.add_file(name, stage.path / name)


def _config(source: FusedSource, run: RunConfig) -> Any:
    """The transformers config of the export: the original's; for a GGUF, what transformers reads in its header."""
    config = copy.deepcopy(source.config)
    # A GGUF's config carries the name from its header under this key.
    config.__dict__.pop("_model_name_or_path", None)
    config.architectures = [_architecture(source)]
    config.auto_map = auto_map(_architecture(source))
    config.dtype = source.checkpoint.read(f"{source.family.embedding}.weight").dtype
    config.tie_word_embeddings = source.tied
    config.quantization_config = FlatqConfig.of(run.recipe, run.recipe_name)
    config.attn_implementation = UNLOADABLE
    return config


def _architecture(source: FusedSource) -> str:
    """transformers' class of the model: `LlamaForCausalLM`."""
    return type(source.skeleton()).__name__


def _generation_config(source: FusedSource) -> str:
    """The original's file as it is; for a GGUF what its header says."""
    from transformers import GenerationConfig

    file = source.location.path / "generation_config.json"
    if source.location.kind == "directory" and file.is_file():
        return file.read_text(encoding="utf-8")
    return str(GenerationConfig.from_model_config(source.config).to_json_string())


def _write_tokenizer(stage: Stage, source: FusedSource) -> None:
    tokenizer = load_tokenizer(source.location)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            atomic.write_bytes(stage.path / file.name, file.read_bytes())
            stage.add_file(file.name, stage.path / file.name)


def _parameters(source: FusedSource) -> int:
    """Parameters of the original model; a tied head counts once."""
    parameters = dict(source.skeleton().named_parameters(remove_duplicate=False))
    if source.tied:
        del parameters[f"{source.family.head}.weight"]
    return sum(parameter.numel() for parameter in parameters.values())


@torch.no_grad()
def verify(source: FusedSource, directory: Path) -> dict[str, int | float]:
    """Load an export with transformers and compare it with the fused model it was made from.

    In memory are the export, as it is loaded, and one block of the fused model.

    Returns:
        `codes`: linears whose codes are equal bit for bit; `tensors`: other tensors that are (scales, norms,
        matrices, clips, …); `logits_max_difference`: greatest difference of a logit on a few random tokens, relative to
        the greatest logit.
    Raises:
        WorkError: on the first difference; names the tensor.
    """
    try:
        model = _load(directory)
    except (FlatqError, OSError, ValueError, RuntimeError) as error:
        raise WorkError(f"{directory}: the export does not load: {error}") from error
    counts = {"codes": 0, "tensors": 0}
    for name in sorted(source.checkpoint.names()):
        module_name, _, part = name.rpartition(".")
        module = model.get_submodule(module_name)
        is_codes = part == CODES and isinstance(module, PackedLinear)
        loaded = module.codes() if is_codes else getattr(module, part)
        stored = source.checkpoint.read(name)
        if not torch.equal(loaded, stored.float() if stored.is_floating_point() else stored):
            raise WorkError(
                f"{directory}: {name} of the export is not that of the fused model; run `flatq export` again"
            )
        counts["codes" if is_codes else "tensors"] += 1
    difference = _logits_difference(source, model)
    if not difference <= TOLERANCE:
        raise WorkError(
            f"{directory}: the export's logits differ from the fused model's by {difference:.1e} of the greatest "
            f"(tolerance {TOLERANCE:.0e}), though all tensors are equal; please report this"
        )
    return {**counts, "logits_max_difference": difference}


def _load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with _no_bars():
        return AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, local_files_only=True)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which would run through ours."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _logits_difference(source: FusedSource, model: Any) -> float:
    """Max |a − b| / max |b| over the logits of a few random tokens, a of the export, b of the fused model."""
    generator = torch.Generator().manual_seed(SEED)
    windows = torch.randint(source.config.vocab_size, (WINDOWS, SEQLEN), generator=generator)
    silent = SilentProgress()
    fused = torch.stack(list(streamed_logits(source, windows, silent, "cpu", torch.float32)))
    exported = torch.stack(list(model_logits(model, windows)))
    return float((exported - fused).abs().max() / fused.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


@dataclass(frozen=True)
class Exporter:
    """A format: its version, which goes into the manifest's inputs, and what writes it and returns the metrics."""

    version: str
    write: Callable[[Run, Stage, Progress], dict[str, Any]]


EXPORTERS = {"flatq": Exporter(FORMAT, _write_flatq)}
