from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flatq_cli.calibration.learnable import transforms_from_plain
from flatq_cli.errors import UsageError
from flatq_cli.models.source import BlockSource, run_block
from flatq_cli.runtime.fused import dequantized, open_fused
from flatq_cli.runtime.layout import block_layout
from flatq_cli.runtime.sites import ATTENTION, attach_sites, online_sites
from flatq_cli.stages.calibrate import block_name
from flatq_cli.stages.fuse import fuse, fuse_block
from flatq_cli.store.atomic import file_sha256
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run
from tests.calibration.prepare import CPU, prepare
from tests.reference import array, dense, quantize_rows
from tests.tiny import (
    FAMILIES,
    FLOAT,
    RECIPES,
    calibrated_run,
    fused_run,
    source_of,
    tiny_model_dir,
    tiny_recipe,
)

SILENT = SilentProgress()
QUANTIZED = {name: sections for name, sections in RECIPES.items() if sections.get("weights", {}).get("bits") != 16}


def shard(run: Run, index: int) -> dict[str, torch.Tensor]:
    (file,) = (run.path / "fuse").glob(f"model-{index + 1:05d}-of-*.safetensors")
    return load_file(file)


def hashes(run: Run) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in (run.path / "fuse").iterdir() if file.name != "manifest.json"}


def folded_by_hand(source: BlockSource, index: int, run: Run) -> dict[str, np.ndarray]:
    """Every float parameter of a block after folding: dense algebra in float64, from what calibrate stored."""
    family, shapes = source.family, source.shapes
    layouts = block_layout(run.config.recipe, family, shapes)
    plain = run.stage("calibrate").load(block_name(index))
    stored = transforms_from_plain(plain, layouts, torch.float64)
    T = {site.name: dense(stored.get(site.name), shapes.linears(family)[site.readers[0]][1]) for site in family.sites}
    value = dense(stored.get("value"), shapes.head_dim)
    left = plain.get("attn_out.left")
    T["attn_out"] = np.kron(np.eye(shapes.heads) if left is None else array(left), value)
    p = {name: array(tensor) for name, tensor in source.block_tensors(index).items()}
    every_kv_head = np.kron(np.eye(shapes.kv_heads), value)
    p["self_attn.v_proj.weight"] = every_kv_head.T @ p["self_attn.v_proj.weight"]
    if "self_attn.v_proj.bias" in p:
        p["self_attn.v_proj.bias"] = p["self_attn.v_proj.bias"] @ every_kv_head
    for site in family.sites:
        diag = plain.get(f"{site.name}.diag")
        diag = np.ones(1) if diag is None else array(diag)
        for reader in site.readers:
            p[f"{reader}.weight"] = np.linalg.solve(T[site.name], p[f"{reader}.weight"].T).T  # W T⁻ᵀ
        if site.diag_into is not None:
            name = f"{site.diag_into}.weight"
            p[name] = p[name] * (diag if p[name].ndim == 1 else diag[:, None])
            if f"{site.diag_into}.bias" in p:
                p[f"{site.diag_into}.bias"] = p[f"{site.diag_into}.bias"] * diag
    return p


def check_block(source: BlockSource, index: int, run: Run) -> float:
    """Compare a fused block with a fold and rounding by hand; the share of codes that are not near a tie."""
    spec = run.config.recipe.weights
    plain = run.stage("calibrate").load(block_name(index))
    fused = {name.removeprefix(f"model.layers.{index}."): t for name, t in shard(run, index).items()}
    firm_codes = codes_seen = 0
    expected_names = {name for name in fused if name.startswith("sites.")}
    for name, values in folded_by_hand(source, index, run).items():
        linear = name.removesuffix(".weight")
        if linear not in source.family.linears or not name.endswith(".weight"):
            np.testing.assert_allclose(fused[name], values, rtol=1e-6, atol=1e-6 * np.abs(values).max(), err_msg=name)
            expected_names.add(name)
            continue
        clip = plain.get(f"{linear}.weight_clip")
        out, width = values.shape
        grouped = values.reshape(out, -1, spec.group or width)
        factors = None if clip is None else array(clip)
        ratio, codes, scale, zero = quantize_rows(grouped, spec.bits, spec.symmetric, factors)
        got = fused[f"{linear}.weight_codes"]
        assert got.dtype == (torch.uint8 if spec.bits == 8 and not spec.symmetric else torch.int8)
        np.testing.assert_allclose(fused[f"{linear}.weight_scale"], scale[..., 0], rtol=1e-5, err_msg=name)
        expected_names |= {f"{linear}.weight_codes", f"{linear}.weight_scale"}
        if not spec.symmetric:
            assert fused[f"{linear}.weight_zero"].dtype == torch.int32
            np.testing.assert_array_equal(fused[f"{linear}.weight_zero"], zero[..., 0], err_msg=name)
            expected_names.add(f"{linear}.weight_zero")
        firm = (np.abs(ratio % 1 - 0.5) > 1e-4).reshape(out, width)
        np.testing.assert_array_equal(got.numpy()[firm], codes.reshape(out, width)[firm], err_msg=name)
        # within rounding of a tie, one of its two sides
        assert np.abs(got.numpy().astype(int) - codes.reshape(out, width)).max() <= 1
        firm_codes, codes_seen = firm_codes + firm.sum(), codes_seen + firm.size
    assert fused.keys() == expected_names
    return firm_codes / codes_seen


@pytest.mark.parametrize("sections", QUANTIZED.values(), ids=QUANTIZED)
def test_codes_are_those_of_a_fold_and_rounding_by_hand(tmp_path: Path, sections: dict[str, Any]):
    run = fused_run(tmp_path, "llama", epochs=1, **sections)
    assert check_block(source_of(tmp_path / "tiny llama"), 0, run) > 0.999


@pytest.mark.parametrize("name", [*FAMILIES, "llama with biases", "llama with odd widths", "qwen3 with prime widths"])
def test_codes_norms_and_biases_of_every_family_are_those_by_hand(tmp_path: Path, name: str):
    run = fused_run(tmp_path, name, epochs=1)
    source = source_of(tmp_path / f"tiny {name}")
    for index in range(source.num_blocks):
        assert check_block(source, index, run) > 0.999


def test_online_matrices_and_clips_are_what_calibrate_learned(tmp_path: Path):
    run = fused_run(tmp_path, "llama", epochs=1)
    plain = run.stage("calibrate").load(block_name(0))
    fused = {name.removeprefix("model.layers.0.sites."): t for name, t in shard(run, 0).items() if ".sites." in name}
    query = fused.pop("query.right")
    np.testing.assert_allclose(query, np.linalg.inv(array(plain["key.right"])).T, rtol=1e-4, atol=1e-6)
    learned = {n: t for n, t in plain.items() if not n.endswith((".diag", ".weight_clip")) and n != "value.right"}
    assert fused.keys() == learned.keys()
    assert all(torch.equal(fused[name], tensor) for name, tensor in learned.items())


def test_weights_that_stay_floating_point_keep_the_models_dtype_and_are_folded(tmp_path: Path):
    run = fused_run(tmp_path, "llama", epochs=1, dtype=torch.bfloat16, weights=FLOAT)
    fused, expected = shard(run, 0), folded_by_hand(source_of(tmp_path / "tiny llama"), 0, run)
    for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        weight = fused[f"model.layers.0.{linear}.weight"]
        assert weight.dtype == torch.bfloat16
        np.testing.assert_allclose(weight.float(), expected[f"{linear}.weight"], rtol=2**-8, atol=1e-6)
    assert fused["model.layers.0.input_layernorm.weight"].dtype == torch.float32


@pytest.mark.parametrize("sections", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_was_trained_is_what_runs_after_fuse(tmp_path: Path, family: str, sections: dict[str, Any]):
    """The calibrated block folds in float32, fuse in float64: a few codes next to a tie may differ, no more."""
    ready, recipe = prepare(tmp_path, family), tiny_recipe(tmp_path, epochs=2, **sections)
    learnable, quantized, source = ready.learnable(recipe), ready.quantized(recipe), ready.source
    ready.fit(recipe, learnable)
    layouts = ready.layouts(recipe)
    tensors, _ = fuse_block(source, 0, learnable.plain(), recipe, layouts, CPU)
    plain = {name.removeprefix("model.layers.0."): tensor for name, tensor in dequantized(tensors).items()}
    block = attach_sites(source.block(0, attention=ATTENTION), source.family, online_sites(layouts))
    block.load_state_dict(plain, strict=True)
    with torch.no_grad():
        trained = quantized.tensors(learnable)
    assert trained.keys() == plain.keys()
    for linear in source.family.linears:
        name = f"{linear}.weight"
        same = torch.isclose(plain[name], trained[name], rtol=1e-4, atol=1e-4 * float(trained[name].abs().max()))
        assert same.float().mean() > 0.999
        trained[name] = torch.where(same, trained[name], plain[name])  # of a tiny block one code is much of the output
    with torch.no_grad():
        expected = quantized.run(trained, ready.hidden, ready.kwargs)
        actual = run_block(block, ready.hidden, ready.kwargs)
    error = float((actual - expected).norm() / expected.norm())
    assert error < 0.005
    assert float((actual - expected).abs().median()) < 1e-4 * float(expected.abs().max())


def test_the_rounding_error_is_that_of_the_weights(tmp_path: Path):
    run = fused_run(tmp_path, "llama", epochs=1)
    folded, block = folded_by_hand(source_of(tmp_path / "tiny llama"), 0, run), open_fused(run).block(0)
    linears = source_of(tmp_path / "tiny llama").family.linears
    error = sum(((array(block.get_submodule(n).dequantize()) - folded[f"{n}.weight"]) ** 2).sum() for n in linears)
    power = sum((folded[f"{name}.weight"] ** 2).sum() for name in linears)
    items = run.stage("fuse").manifest.items
    assert items[block_name(0)].metrics["rounding_error"] == pytest.approx(error / power, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_index_names_every_tensor_of_every_shard_once(tmp_path: Path, family: str):
    """Llama has a head of its own, this Qwen2 has it tied."""
    run = fused_run(tmp_path, family)
    index = json.loads((run.path / "fuse/model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    for file in sorted((run.path / "fuse").glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                assert name not in found
                found[name] = file.name
    assert index["weight_map"] == found
    assert ("lm_head.weight" in found) == (family == "llama")
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= found.keys()
    assert index["metadata"]["total_size"] == sum(item.bytes for item in run.stage("fuse").manifest.items.values())


def test_embedding_final_norm_and_head_are_untouched(tmp_path: Path):
    run = fused_run(tmp_path, "llama", dtype=torch.bfloat16)
    original = load_file(Path(run.config.model.location) / "model.safetensors")
    edges = shard(run, 2)
    assert edges.keys() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all(torch.equal(tensor, original[name]) for name, tensor in edges.items())
    assert edges["lm_head.weight"].dtype == torch.bfloat16


def test_fuse_again_touches_nothing(tmp_path: Path):
    run = fused_run(tmp_path, "llama")
    before = {file: file.stat().st_mtime_ns for file in (run.path / "fuse").iterdir()}
    fuse(run, "cpu", SILENT)
    assert {file: file.stat().st_mtime_ns for file in (run.path / "fuse").iterdir()} == before


def test_another_calibration_makes_every_fused_block_stale(tmp_path: Path):
    run = fused_run(tmp_path, "llama")
    before = hashes(run)
    stage = run.stage("calibrate")
    stage.begin()
    changed = stage.load(block_name(1))
    changed["mlp_in.left"] = changed["mlp_in.left"] * 1.5
    changed["mlp_in.right"] = changed["mlp_in.right"].flip(1)
    stage.save(block_name(1), "block-00001.safetensors", changed)
    stage.finish()
    times = {file.name: file.stat().st_mtime_ns for file in (run.path / "fuse").iterdir()}
    fuse(run, "cpu", SILENT)
    after = hashes(run)
    assert {name for name in before if before[name] != after[name]} == {"model-00002-of-00003.safetensors"}
    # none is taken over: what it was made from is another stage's result as a whole
    assert all(file.stat().st_mtime_ns > times[file.name] for file in (run.path / "fuse").glob("*.safetensors"))
    assert run.stage("fuse").manifest.inputs == {"calibrate": run.stage("calibrate").digest()}


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_shard_that_was_damaged_is_made_again(tmp_path: Path, damage: str):
    run = fused_run(tmp_path, "llama")
    before = hashes(run)
    file = run.path / "fuse/model-00002-of-00003.safetensors"
    content = file.read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes(content[:-8])
    fuse(run, "cpu", SILENT)
    assert hashes(run) == before


def test_an_unfinished_calibration_is_refused(tmp_path: Path):
    run = calibrated_run(tiny_model_dir(tmp_path, "llama"), tiny_recipe(tmp_path), tmp_path / "run")
    stage = run.stage("calibrate")
    stage.begin({"other": "inputs"})
    with pytest.raises(UsageError, match=r"no finished calibrate stage.*`flatq fuse`"):
        fuse(run, "cpu", SILENT)


class Interrupted(SilentProgress):
    """Stops a stage as Ctrl-C would, after `blocks` blocks."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def track(self, items: Iterable[Any], title: str) -> Iterator[Any]:
        for item in items:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield item


@pytest.mark.parametrize("blocks", [1, 2])
def test_gptq_goes_on_where_it_was_stopped_with_the_same_prefix(tmp_path: Path, blocks: int):
    sections = {"weights": {"rounding": "gptq"}}
    model = tiny_model_dir(tmp_path, "llama", num_hidden_layers=3)
    whole, part = (calibrated_run(model, tiny_recipe(tmp_path, **sections), tmp_path / name) for name in ("a", "b"))
    fuse(whole, "cpu", SILENT)
    with pytest.raises(KeyboardInterrupt):
        fuse(part, "cpu", Interrupted(blocks))
    assert part.stage("fuse").complete(block_name(blocks - 1))
    fuse(part, "cpu", SILENT)
    assert hashes(part) == hashes(whole)


def test_gptq_of_a_later_block_depends_on_how_the_first_was_quantized(tmp_path: Path):
    """Its codes are not those of the full-precision prefix, which calibrate saw."""
    runs = {}
    for bits in (4, 16):
        (folder := tmp_path / str(bits)).mkdir()
        runs[bits] = fused_run(folder, "llama", weights={"rounding": "gptq"}, activations={"bits": bits})
    codes = {bits: shard(run, 1)["model.layers.1.mlp.down_proj.weight_codes"] for bits, run in runs.items()}
    assert not torch.equal(codes[4], codes[16])
