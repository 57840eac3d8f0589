"""The backend `cuda` without a GPU: what each kernel is given and when, and that a model gives what it gives through
`reference`; once with the ops' torch definitions, once with the kernels themselves on the emulator.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.nn import functional
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticSlidingWindowLayer

from flatq_cli.kernels.device import Kernel
from flatq_cli.kernels.gemm import launch_w4_gemm
from flatq_cli.kernels.kron_quant import launch_kron_quant
from flatq_cli.kernels.kv_attention import launch_kv_attention
from flatq_cli.kernels.kv_quant import launch_kv_quant
from flatq_cli.runtime.backends import BACKENDS, QuantizedActivation, available, cuda, set_backend
from flatq_cli.runtime.layout import SiteLayout
from flatq_cli.runtime.sites import OnlineSite
from flatq_cli.stages.export import export
from flatq_cli.stages.fuse import fuse
from flatq_cli.store.progress import SilentProgress
from tests.cuda_emulator.device import EmulatedDevice
from tests.runtime.tape import Tape
from tests.tiny import (
    FAMILIES,
    calibrated_run,
    first_words,
    fused_run,
    lesson,
    tiny_model_dir,
    tiny_recipe,
    tiny_tokens,
)

EIGHT: dict[str, Any] = {"activations": {"bits": 8}, "kv_cache": {"bits": 8}}
OPS = ("kron_quant", "w4a4_gemm", "w4a8_gemm", "kv_quant_", "kv_attention")
PROLOGUES = ("norm_weight", "gate")
IN_FRONT = {f"kron_quant, {prologue}" for prologue in PROLOGUES}
BLOCKS = 2
PROMPT = 7


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Let the backend work here, where its ops compute their definitions, and count the ops."""
    monkeypatch.setattr(cuda.Cuda, "why_not", lambda *_: None)
    counted: Counter[str] = Counter()

    def count(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            counted[name] += 1
            counted.update(f"{name}, {prologue}" for prologue in PROLOGUES if prologue in options)
            return op(*arguments, **options)

        return counting

    for name in OPS:
        monkeypatch.setattr(cuda, name, count(name, getattr(cuda, name)))
    return counted


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, calls: Counter[str]) -> EmulatedDevice:
    """The same with the kernels in place of the definitions."""
    device = EmulatedDevice(arch=90)

    def launched(bits: int) -> Callable[..., Any]:
        def gemm(a: Any, weight: Any, scale: Any, *, in_features: int, weight_sum: Any, bias: Any, dtype: Any) -> Any:
            calls[f"w4a{bits}_gemm"] += 1
            return launch_w4_gemm(device, *a, weight, scale, weight_sum, bias, in_features, bits, dtype)

        return gemm

    def attend(query: Any, *tensors: Any, softmax_scale: float, first: Any, mask: Any) -> Any:
        calls["kv_attention"] += 1
        k, v, lengths = tensors[:3], tensors[3:6], tensors[6]
        return launch_kv_attention(device, query, k, v, lengths, softmax_scale, first, mask=mask)

    def counted(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            calls.update(f"{name}, {prologue}" for prologue in PROLOGUES if prologue in options)
            return launch(device, *arguments, **options)

        return counting

    monkeypatch.setattr(cuda, "kron_quant", counted("kron_quant", launch_kron_quant))
    monkeypatch.setattr(cuda, "w4a4_gemm", launched(4))
    monkeypatch.setattr(cuda, "w4a8_gemm", launched(8))
    monkeypatch.setattr(cuda, "kv_quant_", counted("kv_quant_", launch_kv_quant))
    monkeypatch.setattr(cuda, "kv_attention", attend)
    return device


def exported(folder: Path, family: str, **options: Any) -> Path:
    return Path(export(fused_run(folder, family, **options), "flatq", None, SilentProgress())["path"])


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("run"), request.param, taught=True, **EIGHT)


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("run"), "llama", taught=True, **EIGHT)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("run"), "llama", taught=True)


def loaded(directory: Path, backend: str, dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype).eval()
    assert set_backend(model, backend) == backend
    return model


@torch.no_grad()
def logits(directory: Path, backend: str, dtype: torch.dtype = torch.float16, **inputs: Any) -> torch.Tensor:
    found: torch.Tensor = loaded(directory, backend, dtype)(tiny_tokens(2, PROMPT), **inputs).logits.float()
    return found


def both(directory: Path, dtype: torch.dtype = torch.float16, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits through `cuda` and through `reference`."""
    return logits(directory, "cuda", dtype, **inputs), logits(directory, "reference", dtype, **inputs)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    """16-bit models that round at other places: a code here and there differs by one."""
    return float((found - wanted).norm() / wanted.norm()) < tolerance


def generated(
    model: PreTrainedModel, tokens: int = 6, ids: torch.Tensor | None = None, **options: Any
) -> list[list[int]]:
    ids = tiny_tokens(2, PROMPT) if ids is None else ids
    # Said outright: a token that happens to be the padding's would be taken for it.
    options = {"attention_mask": torch.ones_like(ids), **options}
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)
    rows: list[list[int]] = out[:, PROMPT:].tolist()
    return rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_family_gives_what_reference_gives(directory: Path, calls: Counter[str], dtype: torch.dtype):
    found, wanted = both(directory, dtype)
    assert close(found, wanted, 0.05)
    assert calls["w4a8_gemm"] == 7 * BLOCKS


def test_a_prompt_and_its_continuation_go_through_the_kernels(llama: Path, calls: Counter[str]):
    model = loaded(llama, "cuda")
    steps = 6
    generated(model, steps)
    # The first forward reads the prompt, and each other one a token.
    assert calls["kron_quant"] == 4 * BLOCKS * steps
    assert calls["kron_quant, norm_weight"] == 2 * BLOCKS * steps
    assert calls["kron_quant, gate"] == BLOCKS * steps
    assert calls["w4a4_gemm"] == 7 * BLOCKS * steps
    assert calls["kv_quant_"] == 2 * BLOCKS * steps
    assert calls["kv_attention"] == BLOCKS * steps
    assert calls["w4a8_gemm"] == 0


@pytest.mark.parametrize(
    ("sections", "used"),
    [
        ({"activations": {"bits": 8, "symmetric": False}}, {"kron_quant", "w4a8_gemm", "kv_quant_", "kv_attention"}),
        ({"weights": {"group": 8}}, {"kron_quant", "w4a8_gemm", "kv_quant_", "kv_attention"}),
        ({"activations": {"bits": 16}, "kv_cache": {"bits": 16}}, set()),
        ({"weights": {"bits": 3}}, {"kron_quant", "kv_quant_", "kv_attention"}),
        ({"weights": {"symmetric": False}}, {"kron_quant", "kv_quant_", "kv_attention"}),
        ({"kv_cache": {"bits": 8, "symmetric": True}}, {"kron_quant", "w4a8_gemm"}),
        ({"transform": {"kind": "none", "diagonal": "none"}}, {"kv_quant_", "kv_attention"}),
    ],
    ids=["asymmetric", "groups", "w4a16", "w3", "asymmetric weights", "symmetric cache", "no transform"],
)
def test_what_has_no_kernel_is_computed_as_reference_does(
    tmp_path: Path, calls: Counter[str], sections: dict[str, Any], used: set[str]
):
    found, wanted = both(exported(tmp_path, "llama", **{**EIGHT, **sections}))
    assert close(found, wanted, 0.05)
    assert {name for name, count in calls.items() if count} - IN_FRONT == used


@pytest.mark.parametrize(("width", "n1", "kernels"), [(263, 1, 0), (2 * 263, 2, 0), (256, 1, 1), (24, 4, 1)])
def test_a_factor_that_is_too_large_for_the_kernel_is_multiplied_by_torch(
    width: int, n1: int, kernels: int, calls: Counter[str]
):
    sizes = {"width": width, "n1": n1, "n2": width // n1, "left": True, "right": True}
    site = OnlineSite(SiteLayout("attn_in", **sizes, diag=False, bits=8, symmetric=True, clip=False))
    site.feeds_packed = True
    x = torch.randn(3, width, dtype=torch.float16, generator=torch.Generator().manual_seed(0))
    wanted = site(x)
    site.backend = BACKENDS["cuda"]
    found = site(x)
    assert calls["kron_quant"] == kernels
    assert close(found.float(), wanted.float(), 0.01)


def test_a_norm_gives_codes_itself_until_another_backend_is_chosen(llama: Path, calls: Counter[str]):
    model = loaded(llama, "cuda")
    norm = model.get_submodule("model.layers.0.input_layernorm")
    x = torch.randn(1, 3, norm.weight.shape[0], dtype=torch.float16)
    assert isinstance(norm(x), QuantizedActivation)
    assert calls["kron_quant"] == 1
    twin = copy.deepcopy(model)
    set_backend(model, "reference")
    assert type(norm(x)) is torch.Tensor
    assert isinstance(twin.get_submodule("model.layers.0.input_layernorm")(x), QuantizedActivation)


def test_silu_and_its_product_are_taken_into_the_launch_and_change_nothing_but_a_rounding(
    eight: Path, calls: Counter[str]
):
    model = loaded(eight, "cuda")
    mlp = model.get_submodule("model.layers.0.mlp")
    x = torch.randn(2, 5, 32, dtype=torch.float16, generator=torch.Generator().manual_seed(0))
    gated = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    site = model.get_submodule("model.layers.0.sites.mlp_out")
    together = site(gated)
    apart = site(functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert calls == {"kron_quant": 2, "kron_quant, gate": 1}
    assert close(together.values(), apart.values(), 0.01)
    assert close(mlp(x), mlp.down_proj(apart), 0.01)
    set_backend(model, "reference")
    assert type(mlp.act_fn(x)) is torch.Tensor


def test_another_activation_function_stays_in_front_of_the_launch(tmp_path: Path, calls: Counter[str]):
    run = calibrated_run(tiny_model_dir(tmp_path, "llama", hidden_act="gelu"), tiny_recipe(tmp_path, **EIGHT), tmp_path)
    fuse(run, "cpu", SilentProgress())
    found, wanted = both(Path(export(run, "flatq", None, SilentProgress())["path"]))
    assert close(found, wanted, 0.05)
    assert (calls["kron_quant"], calls["kron_quant, gate"]) == (4 * BLOCKS, 0)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.1), (8, 0.02)])
def test_the_kernels_on_the_emulator_give_what_their_definitions_give(
    bits: int, tolerance: float, llama: Path, eight: Path, calls: Counter[str], request: pytest.FixtureRequest
):
    directory = llama if bits == 4 else eight
    model = loaded(directory, "cuda")
    wanted = logits(directory, "cuda")
    generated(model)
    defined = dict(calls)
    calls.clear()
    request.getfixturevalue("emulated")
    assert close(logits(directory, "cuda"), wanted, tolerance)
    generated(model)
    assert calls == defined
    assert {f"w4a{bits}_gemm", "kron_quant", "kv_quant_", "kv_attention"} | IN_FRONT == calls.keys()


@pytest.mark.parametrize("bits", [4, 8])
def test_generation_on_the_emulator_is_that_of_reference_token_for_token(
    bits: int, llama: Path, eight: Path, emulated: EmulatedDevice, calls: Counter[str]
):
    ids = first_words(3, torch.Generator().manual_seed(2), PROMPT)
    tokens = [generated(loaded(llama if bits == 4 else eight, name), 8, ids) for name in ("cuda", "reference")]
    assert calls["kv_attention"] == BLOCKS * 8
    assert tokens[0] == tokens[1]
    # What it learned needs its attention: nothing but the whole way through the cache gives this.
    assert tokens[0] == lesson(ids, PROMPT + 8)[:, PROMPT:].tolist()


@torch.no_grad()
def test_decoding_on_the_emulator_stays_close_to_reference(eight: Path, emulated: EmulatedDevice):
    found, wanted = (decoded(model, growing_cache(model)) for model in map(loaded, (eight,) * 2, ("cuda", "reference")))
    for ours, theirs in zip(found, wanted, strict=True):
        assert close(ours.float(), theirs.float(), 0.05)


# ---- Caches and masks; decode steps that are captured or compiled. ----


def static_cache(model: PreTrainedModel, room: int = 24) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=room)


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


@torch.no_grad()
def decoded(model: PreTrainedModel, cache: Cache, forward: Any = None, tokens: int = 4, **inputs: Any) -> list[Any]:
    """Logits of a prompt through the model and of further tokens through `forward`, all given."""
    ids, forward = tiny_tokens(2, PROMPT + tokens), forward or model
    found = [model(ids[:, :PROMPT], cache=cache, use_cache=True, **inputs).logits]
    for at in range(PROMPT, PROMPT + tokens):
        if "attention_mask" in inputs:
            inputs["attention_mask"] = functional.pad(inputs["attention_mask"], (0, 1), value=1)
        found.append(forward(input_ids=ids[:, at : at + 1], cache=cache, use_cache=True, **inputs).logits)
    return found


PADDINGS = {
    "none": None,
    "left": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * PROMPT]),
    "holes": torch.tensor([[1, 1, 0, 1, 1, 1, 1], [1] * PROMPT]),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("make_cache", [static_cache, growing_cache])
def test_every_mask_goes_to_the_attention_kernel(
    padding: str, make_cache: Callable[[Any], Cache], directory: Path, calls: Counter[str]
):
    mask = PADDINGS[padding]
    inputs = {} if mask is None else {"attention_mask": mask}
    cuda_model, reference = loaded(directory, "cuda"), loaded(directory, "reference")
    cache = make_cache(cuda_model)
    found = decoded(cuda_model, cache, **inputs)
    packed = sum(not isinstance(layer, StaticSlidingWindowLayer) for layer in cache.layers)
    assert calls["kv_attention"] == packed * 5
    assert calls["kv_quant_"] == 2 * packed * 5
    wanted = decoded(reference, make_cache(reference), **inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        seen = slice(2 if padding == "left" and ours.shape[1] > 1 else 0, None)
        assert close(ours[:, seen].float(), theirs[:, seen].float(), 0.05)


def test_static_and_growing_caches_give_the_same_tokens_on_the_emulator(llama: Path, emulated: EmulatedDevice):
    model = loaded(llama, "cuda")
    assert generated(model, cache=static_cache(model)) == generated(model, cache=growing_cache(model))


@torch.no_grad()
@pytest.mark.parametrize("make_cache", [static_cache, growing_cache])
def test_a_mask_of_the_caller_s_that_is_not_causal_is_followed(
    make_cache: Callable[[Any], Cache], eight: Path, calls: Counter[str]
):
    found = []
    for backend in ("cuda", "reference"):
        model = loaded(eight, backend)
        cache = make_cache(model)
        rows = cache.get_mask_sizes(PROMPT, 0)[0]
        mask = torch.zeros(2, 1, PROMPT, rows, dtype=torch.bool)
        mask[..., :PROMPT] = True
        mask[0, :, 3, 5] = False
        found.append(model(tiny_tokens(2, PROMPT), attention_mask=mask, cache=cache, use_cache=True).logits.float())
    assert calls["kv_attention"] == BLOCKS
    assert close(*found, 0.05)


class Launch(NamedTuple):
    """What a CUDA graph records of a launch, but for where activations lie: a captured graph has memory of its own."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    arguments: tuple[Any, ...]


def recorded(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, kept: set[int]) -> list[Launch]:
    """The launches from now on; of a tensor its sizes, and its address if it is `kept` from step to step."""
    launches: list[Launch] = []
    launch = device.launch

    def argument(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        address = value.data_ptr()
        return value.shape, value.stride(), value.dtype, address if address in kept else None

    def recording(kernel: Kernel, grid: Any, block: int, shared_bytes: int, arguments: Any) -> None:
        launches.append(Launch(kernel, grid, block, shared_bytes, tuple(map(argument, arguments))))
        launch(kernel, grid, block, shared_bytes, arguments)

    monkeypatch.setattr(device, "launch", recording)
    return launches


@torch.no_grad()
def test_every_decode_step_launches_the_same_on_the_same_memory(
    llama: Path, emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
):
    model = loaded(llama, "cuda")
    cache, ids = static_cache(model), tiny_tokens(2, PROMPT + 3)
    model(ids[:, :PROMPT], cache=cache, use_cache=True)
    owned = [*model.parameters(), *model.buffers()]
    for layer in cache.layers:
        owned += [*layer.key_rows.parts, *layer.value_rows.parts, layer.lengths]
    kept = {tensor.data_ptr() for tensor in owned}
    launches = recorded(emulated, monkeypatch, kept)
    steps = []
    for at in range(PROMPT, PROMPT + 3):
        model(ids[:, at : at + 1], cache=cache, use_cache=True)
        steps.append(list(launches))
        launches.clear()
    assert len(steps[0]) == (4 + 7 + 2 + 1) * BLOCKS
    assert steps[0] == steps[1] == steps[2]
    found = {argument[3] for launch in steps[0] for argument in launch.arguments if isinstance(argument, tuple)}
    for layer in cache.layers:
        parts = (*layer.key_rows.parts, *layer.value_rows.parts, layer.lengths)
        assert {part.data_ptr() for part in parts} <= found
        assert layer.lengths.tolist() == [PROMPT + 3] * 2


@torch.no_grad()
def test_a_recorded_decode_step_goes_on_when_it_is_repeated_on_the_same_memory(llama: Path, calls: Counter[str]):
    model, ids = loaded(llama, "cuda"), tiny_tokens(2, PROMPT + 4)
    expected = decoded(model, static_cache(model))
    cache, token, tape = static_cache(model), ids[:, PROMPT : PROMPT + 1].clone(), Tape()
    model(ids[:, :PROMPT], cache=cache, use_cache=True)
    with tape:
        logits = model(input_ids=token, cache=cache, use_cache=True).logits
    calls.clear()
    for at in range(1, 4):
        token.copy_(ids[:, PROMPT + at : PROMPT + at + 1])
        tape.replay()
        assert torch.equal(logits, expected[1 + at])
    assert not calls  # no Python of ours ran


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_one_graph_of_kernels_and_gives_the_same(
    backend: str, llama: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cuda.Cuda, "why_not", lambda *_: None)
    model = loaded(llama, "cuda")
    expected = decoded(model, static_cache(model))
    called: Counter[str] = Counter()

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph if backend == "eager" else lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    counters.clear()
    found = decoded(model, static_cache(model), torch.compile(model.forward, backend=compiler, fullgraph=True))
    assert counters["stats"]["unique_graphs"] == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    ops = {name.split(".")[1]: count for name, count in called.items() if name.startswith("flatq.")}
    wanted = {"kron_quant": 4, "w4a4_gemm": 7, "kv_quant_": 2, "kv_attention": 1}
    assert ops == {name: count * BLOCKS for name, count in wanted.items()}
    # What is prepared for the kernels is made before, and not in every step.
    assert not any("permute" in name for name in called)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_why_not():
    assert "no CUDA GPU" in str(available()["cuda"])
