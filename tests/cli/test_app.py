"""The commands: what they hand to the stages, what they print where, and the exit codes. Stages are stand-ins here."""

import importlib
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

import flatq_cli
from flatq_cli.cli.app import app
from flatq_cli.config.gate_files import load_gates
from flatq_cli.config.recipe_files import load_recipe, recipe_from_mapping
from flatq_cli.config.yaml_text import parse_yaml
from flatq_cli.errors import GateError, UsageError, WorkError
from flatq_cli.evaluation.prompting import Prompting
from flatq_cli.evaluation.shard import Shard

FIGURES = {
    "schema": "flatq.eval/1",
    "target": "x",
    "kind": "fake-quant",
    "recipe": "flatq",
    "perplexity": {"wiki": {"value": 19.2612, "tokens": 16384, "seqlen": 2048}},
    "tasks": {"lastword": {"acc": 0.4375}},
    "gates": [],
    "versions": {},
    "seconds": 1.0,
}


@dataclass
class FakeRun:
    path: Path


@dataclass
class FakePlan:
    recipe: object

    def rows(self):
        return [{"site": "attn_in", "shape": "24 x 24", "parameters": 1728}]

    def totals(self):
        return {"memory_bytes": 3 * 2**20}


@dataclass
class FakeResult:
    data: dict

    def to_json(self):
        return self.data


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Stand-ins for everything a command imports when it runs; each call is recorded in order."""
    monkeypatch.chdir(tmp_path)
    calls = []
    last = []

    def module(package, name, **members):
        full = f"flatq_cli.{package}.{name}"
        fake = types.ModuleType(full)
        for key, value in members.items():
            setattr(fake, key, value)
        monkeypatch.setitem(sys.modules, full, fake)
        monkeypatch.setattr(getattr(__import__(f"flatq_cli.{package}"), package), name, fake, raising=False)
        return fake

    def record(name, result):
        def call(*arguments, **options):
            calls.append((name, arguments, options))
            return result(*arguments, **options)

        return call

    def last_run():
        if not last:
            raise UsageError("no run was used here yet")
        return last[-1]

    def calibrate(run, device, progress, **options):
        for _ in progress.track(range(2), "calibrating"):
            progress.note("loss 2 → 1")
        return {"blocks": 2, "loss_after": 0.5}

    fakes = types.SimpleNamespace(
        module=module, record=record, calls=calls, names=lambda: [name for name, _, _ in calls]
    )
    fakes.calibrate = module(
        "stages",
        "calibrate",
        calibrate=record("calibrate", calibrate),
        open_or_create_run=record("open", lambda model, recipe, path, *rest, **options: FakeRun(path)),
    )
    fakes.plan = module("stages", "plan", plan=record("plan", lambda model, recipe, *a, **k: FakePlan(recipe)))
    fakes.fuse = module("stages", "fuse", fuse=record("fuse", lambda *a, **k: {"bytes": 2**21}))
    fakes.export = module(
        "stages",
        "export",
        export=record("export", lambda *a, **k: {"path": "out", "seconds": 75.0}),
        renew_card=record("card", lambda *a, **k: None),
    )
    fakes.eval_request = module(
        "stages",
        "eval_request",
        EvalRequest=lambda **options: options,
    )
    fakes.evaluate = module(
        "stages",
        "evaluate",
        evaluate=record("eval", lambda *a, **k: FakeResult(FIGURES)),
        check_all=record("check", lambda request, progress: None),
    )
    fakes.inspect = module(
        "stages",
        "inspect",
        inspect=record(
            "inspect",
            lambda path: {
                "kind": "run",
                "summary": {"model": "smollm2-135m", "bytes": 1024},
                "tensors": [{"name": "key.right", "dtype": "F32", "shape": [64, 64], "bytes": 16384}],
            },
        ),
    )
    fakes.compare = module("evaluation", "compare", compare=lambda paths: [{"name": path.name} for path in paths])
    module("store", "last", last_run=last_run, remember_run=last.append)
    module("store", "run", Run=types.SimpleNamespace(open=FakeRun))
    # The real one, which takes its stages when it is imported: these. The stand-in before it has the old one put back.
    module("stages", "pipeline")
    del sys.modules["flatq_cli.stages.pipeline"]
    importlib.import_module("flatq_cli.stages.pipeline")
    return fakes


def flatq(*arguments):
    return CliRunner().invoke(app, list(arguments))


def failing(error):
    def stage(*arguments, **options):
        raise error

    return stage


def test_calibrate_needs_a_model_and_nothing_else(stages):
    result = flatq("calibrate", "--model", "llama-3-8b", "--device", "cpu")
    assert result.exit_code == 0, result.output
    (_, (model, recipe, path, trust), _), (_, (run, device, _), _) = stages.calls
    assert (model, recipe, path, trust) == ("llama-3-8b", load_recipe("flatq"), Path("runs/llama-3-8b-flatq"), False)
    assert (run.path, device) == (path, "cpu")


def test_a_presets_recipe_keys_apply_and_set_is_stronger(stages):
    flatq("calibrate", "-m", "smollm2-135m", "--set", "calibration.samples=3", "--device", "cpu")
    recipe = stages.calls[0][1][1]
    assert (recipe.calibration.samples, recipe.calibration.seqlen) == (3, 256)


@pytest.mark.parametrize(
    ("model", "recipe", "folder"),
    [
        ("owner/Some-Model", "rtn", "Some-Model-rtn"),
        ("models/tiny.gguf", "flatq", "tiny-flatq"),
        ("./tiny/", "mine.yaml", "tiny-mine"),
    ],
)
def test_the_runs_folder_is_named_after_model_and_recipe(stages, model, recipe, folder):
    Path("mine.yaml").write_text("weights: {bits: 3}")
    result = flatq("calibrate", "--model", model, "--recipe", recipe, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert stages.calls[0][1][2] == Path("runs") / folder


def test_remote_code_is_trusted_only_when_asked(stages):
    flatq("calibrate", "--model", "a/b", "--device", "cpu", "--trust-remote-code")
    (_, (_, _, _, trust), _), (_, _, options) = stages.calls
    assert trust is True
    assert options["trust_remote_code"] is True


def test_progress_and_the_runs_name_go_to_stderr_and_results_to_stdout(stages):
    result = flatq("calibrate", "--model", "a/b", "--device", "cpu")
    assert "run: runs/b-flatq" in result.stderr
    assert "calibrating 2/2  loss 2 → 1" in result.stderr
    assert "loss after" in result.stdout
    assert "calibrating" not in result.stdout


def test_quiet_leaves_stderr_empty(stages):
    result = flatq("calibrate", "--model", "a/b", "--device", "cpu", "--quiet")
    assert result.stderr == ""
    assert "loss after" in result.stdout


def test_json_output_is_json_and_nothing_else(stages):
    assert json.loads(flatq("calibrate", "-m", "a/b", "--device", "cpu", "--json").stdout)["blocks"] == 2
    assert json.loads(flatq("models", "--json").stdout)[0]["name"] == "llama-2-7b"
    assert json.loads(flatq("inspect", "x", "--json").stdout)["kind"] == "run"
    assert json.loads(flatq("compare", "runs/a", "--json").stdout) == [{"name": "a"}]
    assert json.loads(flatq("recipes", "rtn", "--json").stdout)["transform"]["kind"] == "none"


def test_dry_run_prints_the_plan_and_makes_no_run(stages):
    result = flatq("calibrate", "--model", "llama-3-8b", "--device", "cpu", "--dry-run")
    assert stages.names() == ["plan"]
    assert "attn_in" in result.stdout
    assert "3.0 MiB" in result.stdout
    plan = json.loads(flatq("calibrate", "--model", "a/b", "--device", "cpu", "--dry-run", "--json").stdout)
    assert plan == {
        "sites": [{"site": "attn_in", "shape": "24 x 24", "parameters": 1728}],
        "totals": {"memory_bytes": 3 * 2**20},
    }


def test_the_stages_after_calibrate_need_no_argument(stages):
    flatq("calibrate", "--model", "llama-3-8b", "--device", "cpu")
    for command in (
        ["fuse", "--device", "cpu"],
        ["export"],
        ["eval", "--ppl", "x.txt", "--device", "cpu"],
        ["inspect"],
    ):
        result = flatq(*command)
        assert result.exit_code == 0, result.output
        assert "run: runs/llama-3-8b-flatq" in result.stderr
    assert stages.names() == ["open", "calibrate", "fuse", "export", "eval", "inspect"]
    assert stages.calls[2][1][0].path == Path("runs/llama-3-8b-flatq")
    assert stages.calls[4][1][0]["target"] == "runs/llama-3-8b-flatq"


def test_a_run_that_is_named_becomes_the_last_one(stages):
    flatq("fuse", "runs/other", "--device", "cpu")
    assert "run: runs/other" in flatq("export").stderr


def test_without_a_last_run_the_error_is_one_line(stages):
    result = flatq("fuse", "--device", "cpu")
    assert result.exit_code == 2
    assert result.stderr == "flatq: no run was used here yet\n"


def test_export_passes_format_and_folder(stages):
    result = flatq("export", "runs/a", "--format", "gguf", "--out", "there")
    assert stages.calls[0][1][1:3] == ("gguf", Path("there"))
    assert "1m15s" in result.stdout


def test_eval_passes_everything_that_was_asked(stages):
    result = flatq(
        "eval", "runs/a", "--tasks", "piqa, arc_easy", "--tasks", "lastword", "--ppl", "a.txt", "--ppl", "wikitext2",
        "--seqlen", "512", "--limit", "8", "--baseline", "b/c", "--batch", "2", "--num-fewshot", "5", "--device", "cpu",
        "--data-dir", "mirror", "--backend", "cpu", "--apply-chat-template", "--system-instruction", "Be brief.",
        "--no-fewshot-as-multiturn", "--include-path", "mine", "--log-samples", "samples.jsonl", "--shard", "2/3",
        "--no-cache", "--gates", "tasks",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert stages.calls[0][1][0] == {
        "target": "runs/a", "tasks": ("piqa", "arc_easy", "lastword"), "ppl": ("a.txt", "wikitext2"), "seqlen": 512,
        "limit": 8, "baseline": "b/c", "batch": 2, "device": "cpu", "trust_remote_code": False,
        "prompting": Prompting(5, True, "Be brief.", False), "data_dir": Path("mirror"), "include_path": Path("mine"),
        "backend": "cpu", "cache": False, "shard": Shard(2, 3), "log_samples": Path("samples.jsonl"),
        "gates": load_gates(["tasks"]),
    }  # fmt: skip


@pytest.mark.parametrize(("given", "batch"), [([], 1), (["--batch", "auto"], "auto")])
def test_the_batch_of_eval_is_one_question_a_number_of_them_or_what_fits(stages, given, batch):
    flatq("eval", "runs/a", "--ppl", "a", "--device", "cpu", *given)
    assert stages.calls[0][1][0]["batch"] == batch


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--batch", "many", "give a number of questions, 1 or more, or auto"),
        ("--batch", "0", "give a number of questions, 1 or more, or auto"),
        ("--shard", "3", "give PART/PARTS, such as 1/4"),
        ("--shard", "0/3", "parts are counted from 1 to 3"),
        ("--shard", "4/3", "parts are counted from 1 to 3"),
        ("--log-samples", "/dev/null/samples", "cannot write a file there"),
    ],
)
def test_what_an_option_of_eval_cannot_take_is_refused_by_its_name(stages, option, value, words):
    result = flatq("eval", "runs/a", "--ppl", "a", "--device", "cpu", option, value)
    assert (result.exit_code, result.stderr) == (2, f"flatq: {option} {value}: {words}\n")
    assert stages.calls == []


def test_shards_are_merged_by_a_command_of_two_words(stages, monkeypatch):
    stages.module("stages", "merge", merge=stages.record("merge", lambda *a, **k: FakeResult(FIGURES)))
    result = flatq("eval", "merge", "1.json", "2.json", "--json", "whole.json")
    assert result.exit_code == 0, result.output
    assert stages.calls[0][1][0] == [Path("1.json"), Path("2.json")]
    assert json.loads(Path("whole.json").read_text()) == FIGURES
    assert "eval merge [OPTIONS]" in " ".join(flatq("eval", "merge", "--help").stdout.split())
    flatq("eval", "./merge", "--ppl", "a", "--device", "cpu")
    assert stages.calls[1][1][0]["target"] == "./merge"


def test_eval_prints_figures_as_a_table_and_writes_them_as_json(stages):
    result = flatq("eval", "x", "--ppl", "a.txt", "--device", "cpu", "--json", "figures.json")
    assert "19.26" in result.stdout
    assert "0.4375" in result.stdout
    assert json.loads(Path("figures.json").read_text()) == FIGURES


def test_eval_with_json_to_stdout_prints_only_json(stages):
    assert json.loads(flatq("eval", "x", "--ppl", "a", "--device", "cpu", "--json", "-").stdout) == FIGURES


def test_a_baselines_figures_stand_beside_the_targets(stages, monkeypatch):
    baseline = {**FIGURES, "perplexity": {"wiki": {"value": 18.5}}, "tasks": {"lastword": {"acc": 0.5}}}
    result = FakeResult({**FIGURES, "baseline": baseline})
    monkeypatch.setattr(stages.evaluate, "evaluate", lambda *a, **k: result)
    lines = flatq("eval", "x", "--ppl", "a", "--device", "cpu").stdout.splitlines()
    assert any(line.split()[:3] == ["wiki", "19.26", "18.50"] for line in lines)
    assert any(line.split()[:4] == ["lastword", "acc", "0.4375", "0.5"] for line in lines)


def test_a_place_that_cannot_take_the_json_is_refused_before_anything_is_measured(stages, tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "result.json"
    result = flatq("eval", "x", "--ppl", "a", "--device", "cpu", "--json", str(place))
    assert result.exit_code == 2
    assert result.stderr == f"flatq: --json {place}: cannot write a file there\n"
    assert stages.calls == []


def test_run_does_all_four_stages_on_one_run(stages):
    result = flatq("run", "--model", "llama-3-8b", "--recipe", "rtn", "--ppl", "a.txt", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert stages.names() == ["check", "open", "calibrate", "fuse", "export", "eval", "card"]
    assert stages.calls[-2][1][0]["target"] == "runs/llama-3-8b-rtn"
    assert "19.26" in result.stdout


def test_run_refuses_wrong_questions_before_it_works(stages, monkeypatch):
    monkeypatch.setattr(stages.evaluate, "check_all", failing(UsageError("piqa.jsonl:9: no field 'gold'")))
    result = flatq("run", "--model", "llama-3-8b", "--tasks", "piqa", "--data-dir", "mirror", "--device", "cpu")
    assert (result.exit_code, result.stderr) == (2, "flatq: piqa.jsonl:9: no field 'gold'\n")
    assert stages.calls == []


def test_run_hands_the_folder_of_questions_to_eval(stages):
    flatq("run", "--model", "llama-3-8b", "--tasks", "piqa", "--data-dir", "mirror", "--device", "cpu")
    assert stages.calls[-2][1][0]["data_dir"] == Path("mirror")
    assert stages.calls[-2][1][0]["tasks"] == ("piqa",)


def test_run_measures_something_even_if_nothing_was_asked(stages):
    flatq("run", "--model", "llama-3-8b", "--device", "cpu")
    assert stages.calls[-2][1][0]["ppl"] == ("auto",)


def test_inspect_shows_summary_and_tensors(stages):
    output = flatq("inspect", "runs/a").stdout
    assert "smollm2-135m" in output
    assert "[64, 64]" in output
    assert "16.0 KiB" in output


def test_models_and_recipes_are_listed_in_full(stages):
    models, recipes = flatq("models").stdout, flatq("recipes").stdout
    assert "smollm2-135m" in models
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in models
    assert "flatquant" in recipes


def test_a_printed_recipe_is_that_recipe_in_yaml(stages):
    printed = flatq("recipes", "flatquant", "--set", "weights.bits=3").stdout
    assert recipe_from_mapping(parse_yaml(printed, "x").data) == load_recipe("flatquant", ["weights.bits=3"])
    assert "# " in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-m", "llama-3-8"], "--model: there is no preset 'llama-3-8' (did you mean 'llama-3-8b'?)"),
        (["-m", "a/b", "-r", "flatqant"], "--recipe: there is no recipe 'flatqant' (did you mean 'flatquant'?)"),
        (["-m", "a/b", "--set", "weights.bit=4"], "--set weights.bit: unknown key 'bit' (did you mean 'bits'?)"),
        (["-m", "a/b", "--set", "weights.bits=7"], "--set weights.bits: 7 is not one of 2, 3, 4, 5, 6, 8, 16"),
        (["-m", "a/b", "-r", "none.yaml"], "none.yaml: cannot read this recipe (No such file or directory)"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(stages, arguments, line):
    for command in ("calibrate", "run"):
        result = flatq(command, *arguments, "--device", "cpu")
        assert result.exit_code == 2
        assert result.stderr.startswith(f"flatq: {line}")
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""
    assert stages.calls == []


@pytest.mark.parametrize(
    "arguments", [["calibrate"], ["fuse", "--device", "tpu"], ["eval", "--limit", "0"], ["unknown"], ["fuse", "--no"]]
)
def test_wrong_usage_is_exit_code_2(stages, arguments):
    assert flatq(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError("u"), 2), (WorkError("w"), 1), (GateError("g"), 3), (KeyboardInterrupt(), 130)]
)
def test_a_stages_error_gives_its_exit_code(stages, monkeypatch, error, code):
    monkeypatch.setattr(stages.fuse, "fuse", failing(error))
    result = flatq("fuse", "runs/a", "--device", "cpu")
    assert result.exit_code == code
    assert result.stderr.startswith("flatq: ")
    assert "Traceback" not in result.stderr


def test_debug_adds_the_traceback(stages, monkeypatch):
    monkeypatch.setattr(stages.fuse, "fuse", failing(RuntimeError("odd")))
    plain = flatq("fuse", "runs/a", "--device", "cpu")
    assert plain.stderr == "flatq: RuntimeError: odd (use --debug for the traceback)\n"
    assert plain.exit_code == 1
    detailed = flatq("fuse", "runs/a", "--device", "cpu", "--debug")
    assert "Traceback" in detailed.stderr
    assert detailed.exit_code == 1


def test_version_is_printed():
    assert flatq("--version").stdout == f"flatq {flatq_cli.__version__}\n"


def in_a_process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "flatq_cli", *arguments], capture_output=True, encoding="utf-8", check=False, **options
    )


def test_help_in_a_real_process_names_every_command():
    result = in_a_process("--help")
    assert result.returncode == 0
    commands = "calibrate fuse export eval generate run inspect compare models recipes doctor"
    for command in commands.split():
        assert f" {command} " in result.stdout
    assert "\x1b" not in result.stdout


def test_an_error_in_a_real_process_is_one_line_and_its_exit_code():
    result = in_a_process("calibrate", "--model", "lama-3-8b")
    assert result.returncode == 2
    assert result.stderr.startswith("flatq: --model: there is no preset 'lama-3-8b' (did you mean 'llama-3-8b'?)")
    assert result.stderr.count("\n") == 1


def test_a_reader_that_stops_early_sees_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-m", "flatq_cli", "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait()


def test_the_command_line_imports_neither_torch_nor_transformers():
    code = (
        "import sys, flatq_cli.cli.app;"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'datasets', 'lm_eval'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""
