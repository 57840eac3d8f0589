"""The block source: how stages see a model.

A stage asks for the embedding of some text, block i as a module, or the head; each is read from the checkpoint when
it is asked for and belongs to the caller, so a model of any size needs the memory of one block and its activations.
What surrounds the blocks (masks, rotary embeddings, scaling of embeddings and logits) is never rewritten here: the
source keeps a skeleton of the model, parameters on the meta device, and runs transformers' own forward with the parts
that do not matter replaced.

Replacing is done with `copy.deepcopy` and its memo, which maps the id of an object to what shall stand for it in the
copy. The skeleton itself never changes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flatq_cli.errors import UsageError
from flatq_cli.models.checkpoint import Checkpoint, open_checkpoint
from flatq_cli.models.families import Shapes, family_of
from flatq_cli.models.locate import ModelLocation, load_config
from flatq_cli.models.own_dtype import OwnDtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Checkpoints of old transformers versions hold this buffer in every block; it is computed from the config.
OLD_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")


def open_source(location: ModelLocation, trust_remote_code: bool = False) -> BlockSource:
    """Open a model for the stages: reads the config and the headers of the weights, no tensor.

    Raises:
        UsageError: an architecture that no family describes, a quantized model, or damaged files.
    """
    config = load_config(location, trust_remote_code)
    family_of(config)
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        settings = quantized if isinstance(quantized, dict) else quantized.to_dict()
        raise UsageError(
            f"{location.path}: the weights are quantized already ({settings.get('quant_method', 'unknown method')}); "
            "flatq starts from the floating-point model"
        )
    return BlockSource(location, config, open_checkpoint(location, config), trust_remote_code)


class BlockSource:
    """A model as embedding, blocks and head, each read when it is needed. Build it with `open_source`.

    Every module it returns is in eval mode with frozen parameters, belongs to the caller and is not kept.
    """

    attention = "sdpa"
    """The attention implementation its blocks run with."""

    def __init__(
        self, location: ModelLocation, config: PreTrainedConfig, checkpoint: Checkpoint, trust_remote_code: bool = False
    ) -> None:
        self.location = location
        self.config = config
        self.checkpoint = checkpoint
        self.family = family_of(config)
        self.shapes = Shapes.of(config)
        self.num_blocks = int(config.num_hidden_layers)
        self._trust_remote_code = trust_remote_code

    def skeleton(self) -> PreTrainedModel:
        """The whole model with parameters on the meta device and real buffers. It is cached: copy before changing."""
        return self._skeleton

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(self.config),
                dtype=torch.float32,
                attn_implementation="sdpa",
                trust_remote_code=self._trust_remote_code,
            )
        return model.eval().requires_grad_(False)

    def _copy(self, part: nn.Module, attention: str, replaced: Iterable[tuple[nn.Module, nn.Module]] = ()) -> Any:
        """A deep copy of a part of the skeleton under a config of its own, with some of its modules replaced."""
        memo: dict[int, Any] = {id(self._skeleton.config): self._config(attention)}
        memo.update((id(old), new) for old, new in replaced)
        return copy.deepcopy(part, memo)

    def _config(self, attention: str) -> PreTrainedConfig:
        from transformers import AttentionInterface

        if attention != "eager" and attention not in AttentionInterface().valid_keys():
            raise ValueError(f"attention {attention!r} is not registered in transformers.AttentionInterface")
        config = copy.deepcopy(self._skeleton.config)
        config._attn_implementation = attention
        return config

    def _part(self, path: str) -> Any:
        return self._skeleton.get_submodule(path)

    # Tensors

    def block_tensors(self, i: int) -> dict[str, Tensor]:
        """The tensors of block i as stored, named relative to the block (`self_attn.q_proj.weight`)."""
        return self._tensors(f"{self.family.layers}.{self._checked(i)}.")

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        names = sorted(
            name for name in self.checkpoint.names() if name.startswith(prefix) and not OLD_BUFFERS.search(name)
        )
        return {name[len(prefix) :]: self.checkpoint.read(name) for name in names}

    def _checked(self, i: int) -> int:
        if not 0 <= i < self.num_blocks:
            raise IndexError(f"block {i} of a model with {self.num_blocks}")
        return i

    def _load(self, module: nn.Module, path: str, dtype: torch.dtype, device: torch.device | str) -> None:
        """Give `module`, a copy of the skeleton's module `path`, its weights."""
        kept = {
            f"{prefix}.{name}"
            for prefix, part in module.named_modules()
            if isinstance(part, OwnDtype)
            for name in part.state_dict()
        }
        tensors = {
            name: tensor.to(device=device, dtype=None if name in kept else dtype)
            for name, tensor in self._tensors(f"{path}.").items()
        }
        expected = module.state_dict()
        for name in sorted(expected.keys() - tensors.keys()):
            raise UsageError(f"{self.location.path}: the weights have no tensor {path}.{name}")
        for name in sorted(tensors.keys() - expected.keys()):
            raise UsageError(f"{self.location.path}: tensor {path}.{name} has no place in the architecture")
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                raise UsageError(
                    f"{self.location.path}: tensor {path}.{name} is {list(tensor.shape)}, but the config says "
                    f"{list(expected[name].shape)}"
                )
        module.load_state_dict(tensors, assign=True, strict=True)
        # Buffers that no checkpoint holds (rotary frequencies) are real in the skeleton, and keep their dtype.
        module.to(device=device)

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding: the config says so, and the weights hold no other head."""
        if not getattr(self.config, "tie_word_embeddings", False):
            return False
        names = self.checkpoint.names()
        head, embedding = f"{self.family.head}.weight", f"{self.family.embedding}.weight"
        # transformers unties in this case, too.
        return head not in names or torch.equal(self.checkpoint.read(head), self.checkpoint.read(embedding))

    # Modules

    def block(
        self,
        i: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str | None = None,
    ) -> nn.Module:
        """Block i: the stock transformers module with its weights in `dtype`.

        Raises:
            UsageError: a tensor is missing, superfluous, damaged or of another shape than the config says; it is named.
        """
        path = f"{self.family.layers}.{self._checked(i)}"
        block: nn.Module = self._prepared(self._copy(self._part(path), attention or self.attention))
        self._load(block, path, dtype, device)
        return block

    def empty_block(self, i: int, device: torch.device | str = "cpu", attention: str | None = None) -> nn.Module:
        """Block i without its weights: parameters on the meta device, for a caller who brings all of them."""
        path = f"{self.family.layers}.{self._checked(i)}"
        block: nn.Module = self._copy(self._part(path), attention or self.attention)
        for module in block.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        return block

    def _prepared(self, block: nn.Module) -> nn.Module:
        """What a source adds to a stock block before its weights are read."""
        return block

    def edge_tensors(self) -> dict[str, Tensor]:
        """Embedding, final norm and head (unless tied) by their full names; matrices in the checkpoint's dtype."""
        paths = [self.family.embedding, self.family.final_norm, *([] if self.tied else [self.family.head])]
        tensors = {f"{path}.{name}": t for path in paths for name, t in self._tensors(f"{path}.").items()}
        return {name: t.to(self.checkpoint.dtype) if t.dim() > 1 else t for name, t in tensors.items()}

    def read_embedding(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        """The embedding module, token ids [b, s] → [b, s, hidden]; what the model does to its output is not in it."""
        embedding: nn.Module = copy.deepcopy(self._part(self.family.embedding))
        self._load(embedding, self.family.embedding, dtype, device)
        return embedding

    def embed(
        self, input_ids: Tensor, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """What block 0 receives for some token ids; the embedding is read and dropped.

        Args:
            input_ids: [b, s], integer.
        Returns:
            [b, s, hidden] in `dtype` on `device`.
        """
        return self.embedder(dtype, device)(input_ids)

    def embedder(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Callable[[Tensor], Tensor]:
        """`embed` for several texts: keeps the embedding."""
        recorder = _Recorder(self._part(f"{self.family.layers}.0"))
        decoder = self._decoder([recorder], "sdpa", embedding=self.read_embedding(dtype, device)).to(device)

        @torch.no_grad()
        def embed(input_ids: Tensor) -> Tensor:
            hidden = torch.empty(*input_ids.shape, self.shapes.hidden, dtype=dtype, device=device)
            # Row by row: the forward builds masks for its whole batch, and nobody looks at them here.
            for row, ids in enumerate(input_ids.to(device).chunk(len(input_ids))):
                decoder(input_ids=ids, use_cache=False)
                hidden[row] = recorder.hidden[0]
            return hidden

        return embed

    def head(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        """Final norm and head as one module: output [b, s, hidden] of the last block → logits [b, s, vocabulary]."""
        norm: nn.Module = copy.deepcopy(self._part(self.family.final_norm))
        self._load(norm, self.family.final_norm, dtype, device)
        return _Head(
            self._copy(
                self._skeleton,
                "sdpa",
                [
                    (self._part(self.family.base), _OnlyNorm(norm)),
                    (self._part(self.family.head), self._read_head(dtype, device)),
                ],
            )
        )

    def _read_head(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        head = self._part(self.family.head)
        # Tied parameters are one object in the skeleton: the memo hands the copy its own.
        copied: nn.Module = copy.deepcopy(head)
        self._load(copied, self.family.embedding if self.tied else self.family.head, dtype, device)
        return copied

    def block_kwargs(self, hidden: Tensor, attention: str = "sdpa") -> list[dict[str, Any]]:
        """The keyword arguments that the model's own forward hands to each block.

        Args:
            hidden: [b, s, hidden]; only length, dtype and device matter. The arguments are made for a batch of one and
                broadcast over any batch.
            attention: name of the attention implementation; masks differ between them.
        Returns:
            One dict a block: attention mask, position ids, rotary embeddings, …; blocks given the same object share it.
        """
        recorders = [_Recorder(self._part(f"{self.family.layers}.{i}")) for i in range(self.num_blocks)]
        decoder = self._decoder(recorders, attention, embedding=nn.Identity()).to(hidden.device)
        with torch.no_grad():
            decoder(inputs_embeds=hidden[:1], use_cache=False)
        return [recorder.kwargs for recorder in recorders]

    def _decoder(self, blocks: list[_Recorder], attention: str, embedding: nn.Module) -> nn.Module:
        """The decoder around other blocks, with nothing after them."""
        family = self.family
        decoder = self._copy(
            self._part(family.base),
            attention,
            [
                (self._part(family.layers), nn.ModuleList(blocks)),
                (self._part(family.embedding), embedding),
                (self._part(family.final_norm), nn.Identity()),
            ],
        )
        decoder.config.num_hidden_layers = len(blocks)
        module: nn.Module = decoder
        return module

    def assemble(
        self,
        make_block: Callable[[int], nn.Module] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str | None = None,
    ) -> PreTrainedModel:
        """The whole model with its weights, ready for `generate` and for lm-eval.

        Args:
            make_block: block i by its index; `self.block` where it is None.
            dtype: of embedding, head and the blocks read here; what `make_block` returns keeps its own.
            device: where embedding, head and the blocks read here go.
        """
        family = self.family
        attention = attention or self.attention
        make = make_block or (lambda i: self.block(i, dtype, device, attention))
        blocks = nn.ModuleList(make(i) for i in range(self.num_blocks))
        norm: nn.Module = copy.deepcopy(self._part(family.final_norm))
        self._load(norm, family.final_norm, dtype, device)
        embedding, head = self.read_embedding(dtype, device), self._part(family.head)
        if self.tied:
            head = copy.deepcopy(head)
            head.weight = embedding.weight
        else:
            head = self._read_head(dtype, device)
        model: PreTrainedModel = self._copy(
            self._skeleton,
            attention,
            [
                (self._part(family.layers), blocks),
                (self._part(family.embedding), embedding),
                (self._part(family.final_norm), norm),
                (self._part(family.head), head),
            ],
        )
        for module in blocks.modules():
            # Blocks come with configs of their own; one config lets `model.set_attn_implementation` reach them all.
            if hasattr(module, "config"):
                module.config = model.config
        model.config.dtype = dtype
        model.config.tie_word_embeddings = self.tied
        model.config.name_or_path = str(self.location.path)
        model.generation_config = self._generation_config(model)
        return model.eval().to(device)

    def _generation_config(self, model: PreTrainedModel) -> Any:
        from transformers import GenerationConfig

        if self.location.kind == "directory" and (self.location.path / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(str(self.location.path), local_files_only=True)
        else:
            generation = GenerationConfig.from_model_config(model.config)
        if generation.pad_token_id is None:
            # Without one, generate() warns at every call and then does the same.
            end = generation.eos_token_id
            generation.pad_token_id = end[0] if isinstance(end, list) else end
        return generation


class _Recorder(nn.Module):
    """Stands for a block: notes what it is called with and returns its input. Its attributes are those of the block."""

    hidden: Tensor
    kwargs: dict[str, Any]

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Not as a submodule: the block's parameters are on the meta device and must not be moved.
        self.__dict__["block"] = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Some decoders ask the block which mask it wants.
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.hidden, self.kwargs = hidden, kwargs
        return hidden


class _OnlyNorm(nn.Module):
    """Stands for the decoder of a model whose blocks ran already: the final norm is left."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.norm(inputs_embeds))


class _Head(nn.Module):
    """Hidden states → logits, by the model's own forward: scaling and capping of logits stay transformers' own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
        return logits


def run_block(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Run a block on hidden states [b, s, hidden] → [b, s, hidden], whether it returns a tensor or a tuple."""
    output = block(hidden, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@torch.no_grad()
def run_in_batches(
    block: nn.Module,
    hidden: Tensor,
    kwargs: dict[str, Any],
    batch: int,
    device: torch.device | str,
    into: Tensor | None = None,
) -> Tensor:
    """Run a block on many sequences, `batch` of them on `device` at a time.

    Args:
        hidden: [samples, tokens, hidden], on any device. kwargs: on `device`.
        into: where the output goes, like `hidden` and perhaps it; None: a new tensor.
    Returns:
        [samples, tokens, hidden], where `hidden` is and in its dtype.
    """
    output = torch.empty_like(hidden) if into is None else into
    for first in range(0, hidden.shape[0], batch):
        rows = slice(first, first + batch)
        output[rows] = run_block(block, hidden[rows].to(device), kwargs).to(output)
    return output
