"""docs/format.md is enough: a loader and a forward pass that use numpy and that page, and nothing of flatq or torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatq_cli.stages.export import export
from flatq_cli.store.progress import SilentProgress
from tests.tiny import fused_run

F32 = np.float32
DTYPES = {"U8": np.uint8, "I32": np.dtype("<i4"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[8 + length + begin : 8 + length + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(F32)
        else:
            values = np.frombuffer(raw, DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def read_export(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"]["format"] == "flatq/1"
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: read_safetensors(directory / name) for name in set(index.values())}
    return config, {name: files[file][name] for name, file in index.items()}


def unpack(packed: np.ndarray, bits: int, width: int, symmetric: bool) -> np.ndarray:
    row = np.unpackbits(packed, axis=1, bitorder="little")[:, : width * bits].reshape(-1, width, bits)
    codes = row.astype(np.int64) @ (1 << np.arange(bits))
    return np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes) if symmetric else codes


Settle = Callable[[str, np.ndarray, np.ndarray], np.ndarray]


def near_tie(x: np.ndarray) -> np.ndarray:
    """Where rounding may go either way, because two implementations differ in their last bits."""
    return np.abs(x - np.floor(x) - 0.5) < 1e-3


class Model:
    """The forward pass of the page, in float32.

    `settle(site, quantized, ties)` sees what every quantizer puts out, and where it is at a tie, and may change it.
    """

    def __init__(self, directory: Path, settle: Settle) -> None:
        self.settle = settle
        self.config, self.tensors = read_export(directory)
        self.recipe = self.config["quantization_config"]["recipe"]
        self.A = self.config["num_attention_heads"]
        self.K = self.config.get("num_key_value_heads") or self.A
        self.D = self.config.get("head_dim") or self.config["hidden_size"] // self.A

    def get(self, name: str) -> np.ndarray | None:
        tensor = self.tensors.get(name)
        return None if tensor is None else tensor.astype(F32)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        spec = self.recipe["weights"]
        if spec["bits"] == 16:
            weight = self.get(f"{name}.weight")
        else:
            codes = unpack(self.tensors[f"{name}.weight_packed"], spec["bits"], x.shape[-1], spec["symmetric"])
            scale = self.tensors[f"{name}.weight_scale"]
            zero = self.tensors.get(f"{name}.weight_zero", np.zeros(scale.shape, np.int32))
            rows, groups = scale.shape
            weight = scale[:, :, None] * (codes.reshape(rows, groups, -1) - zero[:, :, None]).astype(F32)
            weight = weight.reshape(rows, -1)
        bias = self.get(f"{name}.bias")
        return x @ weight.T + (0 if bias is None else bias)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        mean = np.mean(x**2, axis=-1, keepdims=True, dtype=F32)
        return self.get(f"{name}.weight") * (x / np.sqrt(mean + F32(self.config["rms_norm_eps"])))

    def quantize(self, name: str, x: np.ndarray, spec: dict[str, Any], clip: np.ndarray | None) -> np.ndarray:
        bits = spec["bits"]
        if bits == 16:
            return x
        clip = np.ones(2, F32) if clip is None else clip
        high = clip[0] * np.maximum(x.max(-1, keepdims=True), F32(0))
        low = clip[1] * np.minimum(x.min(-1, keepdims=True), F32(0))
        if spec["symmetric"]:
            scale = np.maximum(high, -low) / F32(2 ** (bits - 1) - 1)
            scale = np.where(scale == 0, F32(1), scale)
            quantized = np.clip(np.rint(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
            return self.settle(name, quantized, near_tie(x / scale))
        scale = (high - low) / F32(2**bits - 1)
        scale = np.where(scale == 0, F32(1), scale)
        zero = np.rint(-low / scale)
        quantized = (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale
        return self.settle(name, quantized, near_tie(x / scale) | near_tie(-low / scale))

    def site(self, name: str, x: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
        left, right, clip = (self.get(f"{name}.{part}") for part in ("left", "right", "clip"))
        n = x.shape[-1]
        n1 = len(left) if left is not None else n // len(right) if right is not None else 1
        X = x.reshape(*x.shape[:-1], n1, n // n1)
        if right is not None:
            X = X @ right
        if left is not None:
            X = left.T @ X
        return self.quantize(name, X.reshape(x.shape), spec, clip)

    def rope(self, x: np.ndarray) -> np.ndarray:
        half = self.D // 2
        theta = self.config["rope_parameters"]["rope_theta"]
        frequencies = F32(theta) ** (-2 * np.arange(half, dtype=F32) / F32(self.D))
        angle = (np.arange(len(x), dtype=F32)[:, None] * frequencies)[:, None, :]
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(F32)

    def window(self, layer: int) -> int | None:
        kinds = self.config.get("layer_types")
        if self.config["model_type"] != "mistral" and (not kinds or kinds[layer] != "sliding_attention"):
            return None
        return self.config.get("sliding_window")

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
        k, v = (np.repeat(part, self.A // self.K, axis=1) for part in (k, v))
        scores = np.einsum("tad,uad->atu", q, k) / np.sqrt(F32(self.D))
        t, u = np.indices(scores.shape[1:])
        allowed = (u <= t) if window is None else (u <= t) & (u > t - window)
        scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("atu,uad->tad", weights, v).reshape(len(q), -1)

    def block(self, layer: int, h: np.ndarray) -> np.ndarray:
        p = f"model.layers.{layer}."
        acts, cache, none = self.recipe["activations"], self.recipe["kv_cache"], {"bits": 16}
        x = self.site(f"{p}sites.attn_in", self.norm(f"{p}input_layernorm", h), acts)
        q = self.linear(f"{p}self_attn.q_proj", x).reshape(-1, self.A, self.D)
        k = self.linear(f"{p}self_attn.k_proj", x).reshape(-1, self.K, self.D)
        v = self.linear(f"{p}self_attn.v_proj", x).reshape(-1, self.K, self.D)
        if self.config["model_type"] == "qwen3":
            q, k = self.norm(f"{p}self_attn.q_norm", q), self.norm(f"{p}self_attn.k_norm", k)
        q = self.site(f"{p}sites.query", self.rope(q), none)
        k = self.site(f"{p}sites.key", self.rope(k), cache)
        v = self.site(f"{p}sites.value", v, cache)
        o = self.site(f"{p}sites.attn_out", self.attention(q, k, v, self.window(layer)), acts)
        h = h + self.linear(f"{p}self_attn.o_proj", o)
        x = self.site(f"{p}sites.mlp_in", self.norm(f"{p}post_attention_layernorm", h), acts)
        gate = self.linear(f"{p}mlp.gate_proj", x)
        m = gate / (1 + np.exp(-gate)) * self.linear(f"{p}mlp.up_proj", x)
        return h + self.linear(f"{p}mlp.down_proj", self.site(f"{p}sites.mlp_out", m, acts))

    def logits(self, tokens: list[int]) -> np.ndarray:
        h = self.get("model.embed_tokens.weight")[tokens]
        for layer in range(self.config["num_hidden_layers"]):
            h = self.block(layer, h)
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        return self.norm("model.norm", h) @ self.get(f"{head}.weight").T


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("llama", {}),
        ("mistral", {"weights": {"symmetric": False, "group": 8}, "activations": {"symmetric": False}}),
        ("qwen2", {"weights": {"bits": 2}, "kv_cache": {"symmetric": True, "clip": "none"}}),
        ("qwen3", {"weights": {"bits": 3}, "transform": {"kind": "none", "diagonal": "none"}}),
        ("llama", {"weights": {"bits": 16}, "kv_cache": {"bits": 16}, "activations": {"bits": 8}}),
    ],
)
def test_numpy_alone_reproduces_the_logits_of_a_loaded_export(tmp_path, family, sections):
    run = fused_run(tmp_path, family, **sections)
    directory = Path(export(run, "flatq", None, SilentProgress())["path"])
    tokens = [5, 17, 2, 40, 33, 17, 8, 21, 11, 30, 44, 3]
    expected, outputs = loaded(directory, tokens)
    ties = []

    def settle(site: str, quantized: np.ndarray, at_tie: np.ndarray) -> np.ndarray:
        """Codes must be equal but for ties, where the loaded model's choice is taken over."""
        theirs = outputs[site]
        differs = np.abs(quantized - theirs) > 1e-3 * np.abs(theirs).max()
        assert not (differs & ~at_tie).any(), site
        ties.append((differs.sum(), differs.size))
        return np.where(differs, theirs, quantized)

    found = Model(directory, settle).logits(tokens)
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
    assert np.abs(expected).max() > 0.1
    different, codes = np.sum(ties, axis=0)
    assert codes > 3000
    assert different < 0.01 * codes


def loaded(directory: Path, tokens: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [tokens, vocabulary] of the export as transformers loads it, and what each of its sites puts out."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    outputs = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            # Keys and values are [batch, heads, tokens, head_dim].
            outputs[name] = (output[0] if output.ndim == 3 else output[0].transpose(0, 1)).numpy().copy()

        return hook

    for name, module in model.named_modules():
        if ".sites." in name:
            module.register_forward_hook(record(name))
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    return logits, outputs


def test_the_example_of_the_page_unpacks():
    assert unpack(np.array([[0x78, 0x03]], np.uint8), 4, 3, symmetric=True).tolist() == [[-8, 7, 3]]
