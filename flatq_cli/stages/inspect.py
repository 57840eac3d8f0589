"""`flatq inspect`: what an artifact holds, from its headers and manifests alone; no tensor's data is read.

a run                    model, recipe, stages, losses block by block
a stage's directory      status, figures, tensors of its files
an exported directory    quantization, sizes, tensors
a model directory, a safetensors file, a GGUF file, or a preset or hub id that is on this machine
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from flatq_cli.errors import UsageError
from flatq_cli.models.gguf_header import read_header
from flatq_cli.stages.calibrate import STAGE as CALIBRATE
from flatq_cli.store.run import Run
from flatq_cli.store.stage import Stage

Tensors = list[dict[str, Any]]

MANIFEST, RUN_FILE, CONFIG = "manifest.json", "run.yaml", "config.json"

# Bits of safetensors' dtypes (the names are the format's own).
DTYPE_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}


def inspect(path: str) -> dict[str, Any]:
    """Describe what lies at `path`.

    Returns:
        `kind` (run, stage, export, model, safetensors, gguf), `summary` (plain data that depends on it), and
        `tensors`: a list of {name, dtype, shape, bytes}, empty for a run.
    Raises:
        UsageError: nothing there, nothing that flatq knows, or a damaged file.
    """
    place = Path(path).expanduser()
    if not place.exists():
        from flatq_cli.models.locate import locate

        try:
            place = locate(path).path
        except UsageError as error:
            raise UsageError(str(error).removeprefix("--model: ")) from error
    if place.is_file():
        return _file(place)
    if (place / RUN_FILE).is_file():
        return _run(place)
    quantization = _quantization(place)
    if quantization.get("quant_method") == "flatq":
        return _export(place, quantization)
    if (place / MANIFEST).is_file():
        return _stage(place)
    if (place / CONFIG).is_file() or any(place.glob("*.safetensors")):
        return _model(place, quantization)
    raise UsageError(f"{place}: neither a run, nor a stage, an export, a model directory, a safetensors or a GGUF file")


def tensors_of(file: Path) -> Tensors:
    """The tensors of a safetensors file, in the order of their names, from its header.

    Raises:
        UsageError: the file is missing, truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            return [_row(name, part.get_dtype(), part.get_shape()) for name, part in sorted(slices.items())]
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such file") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{file}: truncated or corrupt safetensors file ({error})") from error


def _row(name: str, dtype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape), "bytes": -(-prod(shape) * dtype_bits(dtype) // 8)}


def dtype_bits(dtype: str) -> int:
    """Bits of an element of a safetensors dtype: the number in its name (`BF16`, `F8_E4M3`), but for a few."""
    if dtype in DTYPE_BITS:
        return DTYPE_BITS[dtype]
    return int("".join(character for character in dtype.split("_")[0] if character.isdigit()))


def _run(path: Path) -> dict[str, Any]:
    run = Run.open(path)
    places = sorted(file.parent for file in [*path.glob(f"*/{MANIFEST}"), *path.glob(f"*/*/{MANIFEST}")])
    stages = [run.stage(place.relative_to(path).as_posix()) for place in places]
    losses = [{"block": name, **item.metrics} for name, item in sorted(run.stage(CALIBRATE).manifest.items.items())]
    config = run.config.model_dump(mode="json", by_alias=True)
    summary = {
        "model": config["model"],
        "recipe": config["recipe"],
        "data": config["data"],
        "versions": config["versions"],
        "stages": {stage.name: _stage_summary(stage) for stage in stages},
        "blocks": losses,
    }
    return {"kind": "run", "summary": summary, "tensors": []}


def _stage(path: Path) -> dict[str, Any]:
    stage = Stage(path.parent, path.name)
    return {"kind": "stage", "summary": _stage_summary(stage), "tensors": _tensors_in(path)}


def _stage_summary(stage: Stage) -> dict[str, Any]:
    manifest = stage.manifest
    return {
        "stage": manifest.stage,
        "status": manifest.status,
        "items": len(manifest.items),
        "bytes": sum(item.bytes for item in manifest.items.values()),
        "seconds": manifest.seconds,
        "metrics": dict(manifest.metrics),
    }


def _export(path: Path, quantization: dict[str, Any]) -> dict[str, Any]:
    summary = {**_config_summary(path), "quantization": quantization}
    if (path / MANIFEST).is_file():
        summary["export"] = _stage_summary(Stage(path.parent, path.name))
    tensors = _tensors_in(path)
    return {"kind": "export", "summary": summary | _totals(tensors), "tensors": tensors}


def _model(path: Path, quantization: dict[str, Any]) -> dict[str, Any]:
    tensors = _tensors_in(path)
    summary = _config_summary(path) | ({"quantization": quantization} if quantization else {}) | _totals(tensors)
    return {"kind": "model", "summary": summary, "tensors": tensors}


def _file(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".gguf":
        return _gguf(path)
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"{path}: a file must be .safetensors or .gguf")
    tensors = tensors_of(path)
    return {"kind": "safetensors", "summary": {"file": path.name, **_totals(tensors)}, "tensors": tensors}


def _gguf(path: Path) -> dict[str, Any]:
    """The reader maps the file into memory: data is not read."""
    try:
        reader = read_header(path)
        tensors = [
            {
                "name": tensor.name,
                "dtype": tensor.tensor_type.name,
                # GGUF counts from the innermost axis.
                "shape": [int(size) for size in reversed(tensor.shape)],
                "bytes": int(tensor.n_bytes),
            }
            for tensor in reader.tensors
        ]
        header = {name: field.contents() for name, field in reader.fields.items() if name.startswith("general.")}
    except Exception as error:
        # The reader validates nothing: what a damaged file provokes in it is arbitrary.
        raise UsageError(f"{path}: truncated or corrupt GGUF file ({type(error).__name__}: {error})") from error
    return {"kind": "gguf", "summary": {"file": path.name, **header, **_totals(tensors)}, "tensors": tensors}


def _tensors_in(path: Path) -> Tensors:
    return [tensor for file in sorted(path.glob("*.safetensors")) for tensor in tensors_of(file)]


def _totals(tensors: Tensors) -> dict[str, int]:
    return {"tensors": len(tensors), "bytes": sum(tensor["bytes"] for tensor in tensors)}


def _config_summary(path: Path) -> dict[str, Any]:
    config = _config(path)
    keys = ("model_type", "architectures", "dtype", "num_hidden_layers", "hidden_size", "vocab_size")
    return {"directory": path.resolve().name, **{key: config[key] for key in keys if key in config}}


def _quantization(path: Path) -> dict[str, Any]:
    quantization = _config(path).get("quantization_config")
    return quantization if isinstance(quantization, dict) else {}


def _config(path: Path) -> dict[str, Any]:
    """config.json of a directory; {} where there is none."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path / CONFIG}: cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path / CONFIG}: not a JSON object")
    return config
