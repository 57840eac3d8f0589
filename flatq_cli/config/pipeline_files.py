"""Pipeline files: all that `flatq run` does with a model, from its recipe to the gates it must pass, in one YAML file.

    model: smollm2-135m
    recipe: flatq
    set: {tune: {steps: 64}}
    run: runs/nightly
    eval: {ppl: [wikitext2], tasks: [arc_easy], baseline: smollm2-135m, junit: gates.xml}
    gates:
      - {metric: perplexity_ratio.wikitext2, max: 1.3}

Every key is what the option of its name is; options given beside a file replace what it says. Paths are from the folder
that the command is started in, as they are on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from flatq_cli.config.gate_files import Gate, GateEntry, GateFile, distinct, read_gates, settle
from flatq_cli.config.recipe import Frozen, Recipe
from flatq_cli.config.validation import Layer, file_layer, plain_layer, validate

Count = Annotated[int, Field(ge=1)]


class ExportStep(Frozen):
    """How the fused model is packed."""

    format: str = Field("flatq", description="format of the exported directory")
    out: str | None = Field(None, description="where to; RUN/export/FORMAT if it is not said")


class EvalStep(Frozen):
    """What is measured, and where results are written."""

    ppl: list[str] = Field(default=[], description="texts for perplexity, by name or file")
    tasks: list[str] = Field(default=[], description="lm-eval tasks, and lastword:TEXT")
    seqlen: Annotated[int, Field(ge=2)] = Field(2048, description="tokens in a window of perplexity")
    limit: Count | None = Field(None, description="at most so many windows, and questions of a task")
    baseline: str | None = Field(None, description="a model to compare with")
    batch: Count | Literal["auto"] = Field(1, description="questions in a forward pass; auto: as many as fit")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="examples before each question")
    apply_chat_template: bool = Field(False, description="put questions into the model's chat template")
    system_instruction: str | None = Field(None, description="text before every question")
    data_dir: str | None = Field(None, description="a folder with the tasks' questions as JSON lines")
    include_path: str | None = Field(None, description="a folder with lm-eval task files")
    log_samples: str | None = Field(None, description="a file for every question and answer, as JSON lines")
    json_file: str | None = Field(None, alias="json", description="a file for the result in schema flatq.eval/1")
    junit: str | None = Field(None, description="a file for the gates as JUnit XML")
    markdown: str | None = Field(None, description="a file for figures and gates as Markdown")


class Pipeline(Frozen):
    """A model, what is made of it, and what it is judged by."""

    model: Annotated[str, Field(min_length=1)] = Field(
        description="a preset, a hub id, a model directory, a .gguf file"
    )
    recipe: str = Field("flatq", description="a bundled recipe or a YAML file")
    set: Recipe = Field(default_factory=Recipe, description="recipe keys that are changed, nested as in a recipe")
    run: str | None = Field(None, description="the run's directory; ./runs/MODEL-RECIPE if it is not said")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    trust_remote_code: bool = Field(False, description="run Python code that the model's repository brings")
    export: ExportStep = Field(default_factory=ExportStep)
    eval: EvalStep = Field(default_factory=EvalStep)
    gate_files: list[str] = Field(default=[], description="gate files, by name or path")
    gates: list[GateEntry] = Field(default=[], description="gates, as a gate file has them")

    @field_validator("set")
    @classmethod
    def _changes_something(cls, changed: Recipe) -> Recipe:
        if not changed.model_fields_set:
            raise PydanticCustomError("no_change", "Input changes nothing; leave it out")
        return changed

    @property
    def changes(self) -> dict[str, Any]:
        """What `set` says and nothing else, nested as in a recipe."""
        return self.set.model_dump(exclude_unset=True)


def load_pipeline(file: Path | None, given: Mapping[str, Any]) -> tuple[Pipeline, tuple[Gate, ...]]:
    """Read a pipeline file, with the options that were given beside it; and all of its gates.

    Args:
        file: None: the options are all there is.
        given: nested as in a file.
    Raises:
        UsageError: the file or a gate file cannot be read, a key is unknown, missing or wrong, with its line; or two
            gates have one name.
    """
    layers = [] if file is None else [file_layer(file, "pipeline")]
    pipeline = validate(Pipeline, [*layers, plain_layer(given, "the command line")])
    gates = [gate for name in pipeline.gate_files for gate in read_gates(name)]
    if pipeline.gates:
        gates += settle(GateFile(gates=pipeline.gates), layers[0] if layers else Layer({}, "gates", {}))
    return pipeline, distinct(gates)
