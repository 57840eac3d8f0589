"""Exports through the kernels on a GPU: what a model gives, and decode steps that CUDA graphs repeat.

These need all of flatq and not torch and CuPy only: on a bare GPU machine they are skipped.
"""

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers")
pytest.importorskip("pydantic")

DEVICE = "cuda"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# At 4 bits a rounding at another place makes another code; two ways of computing are compared at 8.
EIGHT = {"activations": {"bits": 8}, "kv_cache": {"bits": 8}}
PROMPT, STEPS, ROOM = 7, 8, 24


def exported(folder, family, **sections):
    from flatq_cli.stages.export import export
    from flatq_cli.store.progress import SilentProgress
    from tests.tiny import fused_run

    return Path(export(fused_run(folder, family, **sections), "flatq", None, SilentProgress())["path"])


@pytest.fixture(scope="module", params=FAMILIES)
def eight(request, tmp_path_factory):
    return exported(tmp_path_factory.mktemp("run"), request.param, **EIGHT)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """At 4 bits."""
    return exported(tmp_path_factory.mktemp("run"), "llama")


@pytest.fixture(scope="module")
def llama_at_eight(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("run"), "llama", **EIGHT)


def loaded(directory, backend="cuda"):
    from transformers import AutoModelForCausalLM

    from flatq_cli.runtime.backends import set_backend

    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float16).to(DEVICE).eval()
    assert set_backend(model, backend) == backend
    return model


def tokens():
    from tests.tiny import tiny_tokens

    return tiny_tokens(2, PROMPT + STEPS).to(DEVICE)


def static_cache(model):
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=ROOM)


def growing_cache(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@torch.no_grad()
def decoded(model, cache, forward=None):
    """Logits of a prompt through the model, and of each further token through `forward`."""
    ids = tokens()
    found = [model(ids[:, :PROMPT], cache=cache, use_cache=True).logits.clone()]
    for at in range(PROMPT, ids.shape[1]):
        found.append((forward or model)(input_ids=ids[:, at : at + 1], cache=cache, use_cache=True).logits.clone())
    return torch.cat(found, 1)


def assert_near(ours, wanted, tolerance=0.1):
    """16-bit models that round at other places: a code here and there differs by one."""
    error = (ours.float() - wanted.float()).norm() / wanted.float().norm()
    assert float(error) < tolerance


@pytest.mark.parametrize("make_cache", [growing_cache, static_cache])
def test_every_family_gives_what_reference_gives(eight, make_cache):
    model, reference = loaded(eight), loaded(eight, "reference")
    assert_near(decoded(model, make_cache(model)), decoded(reference, make_cache(reference)))


@torch.no_grad()
def test_a_captured_decode_step_replays_what_eager_steps_give(llama):
    model, ids = loaded(llama), tokens()
    expected = decoded(model, static_cache(model))[:, PROMPT:]
    cache, token = static_cache(model), ids[:, PROMPT : PROMPT + 1].clone()
    model(ids[:, :PROMPT], cache=cache, use_cache=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first run allocates and loads is no part of the graph
        model(input_ids=token, cache=cache, use_cache=True)
    torch.cuda.current_stream().wait_stream(side)
    cache.crop(-1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(input_ids=token, cache=cache, use_cache=True).logits
    assert cache.layers[0].lengths.tolist() == [PROMPT] * 2  # a capture runs nothing
    for at in range(STEPS):
        token.copy_(ids[:, PROMPT + at : PROMPT + at + 1])
        graph.replay()
        torch.testing.assert_close(logits, expected[:, at : at + 1])
    assert cache.layers[0].lengths.tolist() == [PROMPT + STEPS] * 2


def test_compiled_steps_in_cuda_graphs_give_what_eager_steps_give(llama):
    model = loaded(llama)
    expected = decoded(model, static_cache(model))
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="cudagraphs", fullgraph=True)
    torch.testing.assert_close(decoded(model, static_cache(model), compiled), expected)


def test_steps_as_generate_compiles_them_stay_near(llama_at_eight):
    pytest.importorskip("triton")
    model = loaded(llama_at_eight)
    expected = decoded(model, static_cache(model))
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, mode="reduce-overhead")
    assert_near(decoded(model, static_cache(model), compiled), expected)


def test_generate_with_a_static_cache_runs_to_its_end(llama):
    pytest.importorskip("triton")
    model, ids = loaded(llama), tokens()[:, :PROMPT]
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS, "pad_token_id": 0}
    torch._dynamo.reset()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **options)
    assert out.shape == (2, PROMPT + STEPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_gpu_sums_codes_exactly(dtype, bits):
    from flatq_cli.runtime.backends.reference import exact_product

    generator = torch.Generator().manual_seed(0)
    end = 2 ** (bits - 1)
    a = torch.randint(-end, end, (70, 2048), generator=generator)
    b = torch.randint(-8, 8, (96, 2048), generator=generator)
    found = exact_product(a.to(DEVICE, dtype), b.to(DEVICE, dtype), end * 8)
    assert torch.equal(found.cpu(), (a @ b.T).float())
