"""lm-eval on the model that ships: the same likelihoods and answers as lm-eval's own `hf` model type gives."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foreroute.cli.commands import demo
from foreroute.errors import EvaluationError, ForerouteError
from foreroute.evals.lm_eval import register_when_lm_eval_runs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: pip install foreroute[eval]"
)
TASKS = ("local_choice", "local_sums")
CHOICES = [
    {"text": "import os\nimport", "options": ["sys", "the", "banana"], "right": 0},
    {"text": "<|user|>12 + 34<|assistant|>2+4+0=", "options": ["5 c1", "6 c0"], "right": 1},
    {"text": "A list of the names of all", "options": ["of", "files"], "right": 0},
]
SUMS = [
    {"text": "<|user|>12 + 34<|assistant|>", "answer": "2+4+0=6 c0\n1+3+0=4 c0\n= 46"},
    {"text": "<|user|>50 + 49<|assistant|>", "answer": "0+9+0=9 c0\n5+4+0=9 c0\n= 99"},
    {"text": "<|user|>7 + 8<|assistant|>", "answer": "wrong"},
]
CHOICE_YAML = """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
SUMS_YAML = """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|end|>"], max_gen_toks: 48, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of two tasks: one that compares likelihoods, one that generates."""
    for name, rows, text in zip(TASKS, (CHOICES, SUMS), (CHOICE_YAML, SUMS_YAML), strict=True):
        rows_path = tmp_path / f"{name}.jsonl"
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"cache_dir": str(tmp_path / "cache"), "data_files": {"test": str(rows_path)}}
        head = f"task: {name}\ntest_split: test\ndataset_path: json\ndataset_kwargs: {json.dumps(source)}"
        (tmp_path / f"{name}.yaml").write_text(head + text)
    return tmp_path


@pytest.fixture
def module(_torch_setup: None) -> Any:
    return importlib.import_module("foreroute.evals.lm_eval_model")


def evaluated(tasks: Path, model: Any, **options: Any) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Metrics by task, and every answer (text, or likelihood and whether it is the greedy one) by task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks), include_defaults=False), **options
    )
    return found["results"], {task: [row["resps"] for row in found["samples"][task]] for task in TASKS}


def test_the_same_as_the_resident_model(module: Any, tasks: Path) -> None:
    ours = module.ForerouteLM.create_from_arg_string(
        f"pretrained={demo.find_model()},dtype=float32,memory=50%,max_length=512", {"batch_size": 2, "device": "cpu"}
    )
    results, answers = evaluated(tasks, ours)
    assert ours.max_length == 512
    assert ours.model.foreroute.stats().evictions > 0
    args = {"pretrained": str(demo.find_model()), "dtype": "float32", "max_length": 512}
    # Without grouped matmuls, transformers adds in the same order as foreroute: the same bits.
    resident = {"model_args": {**args, "experts_implementation": "eager"}, "batch_size": 2, "device": "cpu"}
    expected_results, expected = evaluated(tasks, "hf", **resident)
    assert answers == expected
    assert results == expected_results
    assert len({score for document in answers["local_choice"] for ((score, _),) in document}) == 7
    # The model was trained to add; the third answer that is asked for is wrong.
    assert results["local_sums"]["exact_match,none"] == pytest.approx(2 / 3)
    ours.model.foreroute.close()


def test_a_model_that_is_loaded(module: Any, tasks: Path, load: Any) -> None:
    from foreroute.model.text import load_tokenizer

    model, tokenizer = load(demo.find_model(), "50%"), load_tokenizer(demo.find_model())
    scores = module.run_lm_eval(model, tokenizer, TASKS, module.check_tasks(TASKS, tasks), limit=2, batch=2)
    assert scores.primary == {"local_choice": 1.0, "local_sums": 1.0}
    assert scores.metrics["local_choice"].keys() >= {"acc,none", "acc_norm,none", "acc_stderr,none"}
    assert scores.metrics["local_choice"]["acc,none"] == 1.0
    with pytest.raises(EvaluationError, match="no task called local_chess"):
        module.check_tasks(["local_chess"], tasks)
    manager = module.check_tasks(["local_sums"], tasks)
    (tasks / "local_sums.jsonl").unlink()
    with pytest.raises(EvaluationError, match="local_sums cannot be loaded"):
        module.run_lm_eval(model, tokenizer, ["local_sums"], manager)


@pytest.fixture
def code_tasks(tasks: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task that says that it runs what the model writes, a group of it, a tag, and lm-eval's own; no others."""
    import lm_eval.tasks

    head = (tasks / "local_sums.yaml").read_text()
    code = head.replace("task: local_sums", "task: local_code\ntag: local_tag\nunsafe_code: true")
    (tasks / "local_code.yaml").write_text(code)
    (tasks / "local_group.yaml").write_text("group: local_group\ntask: [local_sums, {task: local_code}]")
    (tasks / "safe_group.yaml").write_text("group: safe_group\ntask: [local_sums, local_choice]")
    monkeypatch.setattr(
        module,
        "TaskManager",
        lambda include_path: lm_eval.tasks.TaskManager(
            include_path=[include_path, Path(lm_eval.tasks.__file__).parent / "humaneval"], include_defaults=False
        ),
    )
    return tasks


def test_a_models_code_is_run_only_when_that_is_confirmed(module: Any, code_tasks: Path) -> None:
    for asked in ("local_code", "local_group", "local_tag", "humaneval"):
        with pytest.raises(EvaluationError, match=f"{asked} runs code .* without a sandbox.*--confirm-run-unsafe-code"):
            module.check_tasks(["local_sums", asked], code_tasks)
        module.check_tasks([asked], code_tasks, allow_code=True)
    module.check_tasks(["local_sums", "safe_group"], code_tasks)


def test_lm_eval_is_told_what_was_confirmed(
    module: Any, code_tasks: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foreroute.model.text import load_tokenizer

    model, tokenizer = load(demo.find_model(), "50%"), load_tokenizer(demo.find_model())
    manager = module.check_tasks(["local_code"], code_tasks, allow_code=True)
    scores = module.run_lm_eval(model, tokenizer, ["local_code"], manager, limit=1, allow_code=True)
    assert scores.primary == {"local_code": 1.0}
    # Where a task hid what it does from `check_tasks`, lm-eval itself refuses it.
    with pytest.raises(ValueError, match="unsafe"):
        module.run_lm_eval(model, tokenizer, ["local_code"], manager, limit=1)
    warning = "set HF_ALLOW_CODE_EVAL to 1"
    monkeypatch.setattr(module, "simple_evaluate", lambda *args, **options: (_ for _ in ()).throw(ValueError(warning)))
    with pytest.raises(EvaluationError, match="HF_ALLOW_CODE_EVAL=1 in the environment"):
        module.run_lm_eval(model, tokenizer, ["local_code"], manager, allow_code=True)


@pytest.mark.parametrize(
    ("command", "autoload"), [("lm_eval", "1"), ("foreroute.evals.lm_eval", "0")], ids=["lm_eval", "ours"]
)
def test_the_command_line(tasks: Path, command: str, autoload: str) -> None:
    """lm-eval's own command finds the model type through torch; where torch calls none, ours registers it."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    model_args = f"pretrained={demo.find_model()},dtype=float32,memory=50%,prefetch=none"
    done = subprocess.run(
        [sys.executable, "-m", command, "--model", "foreroute", "--model_args", model_args, "--tasks", "local_sums",
         "--include_path", str(tasks), "--batch_size", "3", "--output_path", str(tasks / "found.json")],
        env={**os.environ, **offline, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (written,) = tasks.rglob("found*.json")
    found = json.loads(written.read_text())
    assert found["results"]["local_sums"]["exact_match,none"] == pytest.approx(2 / 3)
    assert found["config"]["model"] == "foreroute"
    assert found["config"]["model_args"]["memory"] == "50%"


def test_every_field_is_an_argument(module: Any) -> None:
    given = {"memory": "25%", "cache": "off", "governor": False, "reader_threads": "2", "prefetch_width": "None"}
    config = module.engine_config(given)
    assert (config.memory, config.cache, config.governor, config.reader_threads) == ("25%", False, False, 2)
    assert config.prefetch_width is None
    assert module.engine_config({"memory": 2**30, "packed": "no"}) == module.EngineConfig(memory=2**30, packed="no")
    assert module.engine_config({}) == module.EngineConfig()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"memroy": "25%"}, "no argument memroy"),
        ({"load_in_8bit": True}, "no argument load_in_8bit"),
        ({"cache": "maybe"}, "cache=maybe is neither true nor false"),
        ({"reader_threads": "two"}, "reader_threads=two is not possible; it takes: int"),
        ({"reader_threads": True}, "reader_threads=True is not possible"),
        ({"packed": False}, "packed=False is not possible; it takes: str"),
        ({"eviction": "fifo"}, "Choose one of lfu"),
    ],
)
def test_what_is_not_known_is_named(module: Any, given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ForerouteError, match=complaint):
        module.engine_config(given)


def test_another_device_is_refused(module: Any) -> None:
    with pytest.raises(EvaluationError, match="not on cuda:1"):
        module.ForerouteLM(str(demo.find_model()), device="cuda:1")


def test_torch_alone_brings_no_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    register_when_lm_eval_runs()
    assert "lm_eval" not in sys.modules


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    register_when_lm_eval_runs()
    monkeypatch.delitem(sys.modules, "foreroute.evals.lm_eval_model", raising=False)
    with pytest.raises(EvaluationError, match="pip install 'foreroute\\[eval\\]'"):
        importlib.import_module("foreroute.evals.lm_eval_model")


def test_eval_asks_lm_eval_under_every_policy(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a cache every position is under the policy; with one, likelihoods would be exact, and that is refused."""
    import torch

    import foreroute
    from foreroute.checkpoint.locate import read_index
    from foreroute.cli.main import main
    from foreroute.model.text import load_tokenizer
    from foreroute.prepare.corpus import Corpus
    from foreroute.prepare.fit import FitSettings, fit

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    folder, sidecar = demo.find_model(), tmp_path / "tiny.safetensors"
    model = foreroute.load(folder, "100%", config=foreroute.EngineConfig(predictor="no"))
    ids = load_tokenizer(folder)(Path(__file__).read_text(), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    fit(model, read_index(folder).fingerprint(), Corpus(windows, "this"), sidecar, settings=FitSettings())
    model.foreroute.close()
    asked = [
        "eval",
        str(folder),
        "--lm-eval",
        *TASKS,
        "--include-path",
        str(tasks),
        "--predictor",
        str(sidecar),
        "--json",
    ]
    assert main([*asked, "--policies", "exact", "paper", "--memory", "none"]) == 0
    exact, paper = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert exact["accuracy"].keys() == paper["accuracy"].keys() == set(TASKS)
    assert exact["accuracy"]["local_sums"] == pytest.approx(2 / 3), "the third sum's answer is wrong on purpose"
    assert 0 < paper["stalled_layers"] < exact["stalled_layers"]
    assert paper["bytes_per_token"] > 0
    assert main([*asked, "--policies", "exact", "--memory", "25%"]) == 2
    assert "--memory none" in capfd.readouterr().err
    assert main(asked) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["tasks"] == exact["accuracy"]
