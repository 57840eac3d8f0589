from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flatq_cli.cli.app import app
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.targets import open_target
from flatq_cli.stages.bench_generate import BenchRequest, bench_generate, linear_bytes
from flatq_cli.stages.export import export
from flatq_cli.store.progress import SilentProgress
from tests.tiny import fused_run, tiny_model_dir

PROMPT, NEW = 12, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(export(fused_run(tmp_path_factory.mktemp("run"), "llama"), "flatq", None, SilentProgress())["path"])


def measured(exported: Path, **options: Any) -> dict[str, Any]:
    request = BenchRequest(str(exported), prompt=PROMPT, new=NEW, turns=2, dtype=torch.float32, **options)
    return bench_generate(request, SilentProgress())


def test_the_float_model_and_every_backend_that_works_here_are_measured(model: Path, exported: Path):
    data = measured(exported, baseline=str(model))
    names = [row["model"] for row in data["rows"]]
    assert names[:2] == ["float", "reference"]
    for row in data["rows"]:
        assert row["prefill_tokens_per_second"] > 0
        assert row["decode_tokens_per_second"] > 0
    assert (data["rows"][0]["prefill_ratio"], data["rows"][0]["decode_ratio"]) == (1, 1)
    reference = data["rows"][1]
    speeds = [row["decode_tokens_per_second"] for row in data["rows"]]
    assert reference["decode_ratio"] == pytest.approx(speeds[1] / speeds[0])


def test_without_a_float_model_there_is_nothing_to_divide_by(exported: Path):
    rows = measured(exported, backends=("reference",))["rows"]
    assert [row["model"] for row in rows] == ["reference"]
    assert "decode_ratio" not in rows[0]


def test_bytes_are_those_of_the_packed_linears_and_of_the_allocated_cache(model: Path, exported: Path):
    packed = open_target(str(exported), "cpu").model()
    stored, weights = linear_bytes(packed)
    files = [module for name, module in packed.named_modules() if hasattr(module, "weight_packed")]
    assert stored == sum(tensor.nbytes for module in files for tensor in module.buffers())
    assert (0, weights) == linear_bytes(open_target(str(model), "cpu").model())
    cache = measured(exported, backends=("reference",))["cache"]
    assert cache["tokens"] == PROMPT + NEW
    # Tiny: 64 rows are the least that is allocated. K and V, 2 blocks, 2 heads of 8: 4 bytes of codes, scale and zero.
    assert cache["bytes"] == 2 * 2 * 2 * 64 * (4 + 4 + 1)
    assert cache["bf16_bytes"] == 2 * 2 * 2 * (PROMPT + NEW) * 8 * 2


def test_a_float_model_is_no_export(model: Path):
    with pytest.raises(UsageError, match="is float; this measures an exported directory"):
        measured(model)


def test_the_command_writes_its_figures(model: Path, exported: Path, tmp_path: Path):
    file = tmp_path / "figures.json"
    arguments = ["bench", "generate", str(exported), "--baseline", str(model), "--backend", "reference"]
    sizes = ["--prompt-tokens", "8", "--new-tokens", "3", "--turns", "1", "--dtype", "float32", "--json", str(file)]
    result = CliRunner().invoke(app, [*arguments, *sizes])
    assert result.exit_code == 0, result.output
    assert "prefill" in result.stdout
    data = json.loads(file.read_text())
    assert data["schema"] == "flatq.bench-generate/1"
    assert [row["model"] for row in data["rows"]] == ["float", "reference"]
