"""lm-eval's model type `foreroute`: its own transformers model, around a model with offloaded experts.

    lm_eval --model foreroute --model_args pretrained=MODEL,memory=25%,dtype=float32 --tasks arc_easy --batch_size 8

How the command line finds it: lm_eval.py. Importing this module needs the extra `eval`.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from foreroute.checkpoint.locate import locate
from foreroute.config import EngineConfig
from foreroute.errors import EvaluationError
from foreroute.evals.lm_eval import NAME
from foreroute.loading.load import load
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.text import load_tokenizer

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise EvaluationError(f"{error}. Install lm-eval: pip install 'foreroute[eval]'") from error

# Options of lm-eval's own model type that apply to a model that is already loaded.
_HARNESS_OPTIONS = (
    "batch_size", "max_batch_size", "max_length", "add_bos_token", "prefix_token_id", "truncation", "logits_cache",
    "softmax_dtype", "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip
# lm-eval passes a GPU by default.
_DEVICES = (None, "cpu", "cuda:0")
_SWITCHES = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


@register_model(NAME)
class ForerouteLM(HFLM):
    """A checkpoint under lm-eval with offloaded experts: likelihoods and generation work as for the `hf` type.

    Args:
        pretrained: folder of a checkpoint, or a hub id. revision: of the hub id.
        dtype: compute dtype; "auto" is the stored one.
        tokenizer: folder of another tokenizer.
        device: experts are computed on the CPU; other devices are refused, except lm-eval's own default.
        options: fields of EngineConfig, as text or values, and the model_args of `hf` listed above.
    Raises:
        ForerouteError: an argument is unknown or has a wrong value, or the model cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if device not in _DEVICES:
            raise EvaluationError(f"foreroute computes on the CPU, not on {device}. Leave --device out.")
        harness = {name: options.pop(name) for name in _HARNESS_OPTIONS if name in options}
        config = engine_config(options)
        folder = locate(pretrained, revision=revision)
        if config.policy != "exact":
            logging.getLogger(__name__).warning(
                "policy=%s shows in what is generated; likelihoods are computed as a prompt is, exactly.", config.policy
            )
        model = load(folder, dtype=dtype, config=config)
        super().__init__(pretrained=model, tokenizer=load_tokenizer(tokenizer or folder), **harness)
        # The model's name in lm-eval's reports.
        self.pretrained, self.revision = str(pretrained), revision


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """Build the EngineConfig from model_args, given as text ("25%", "off", "4") or as values.

    Raises:
        ForerouteError: an unknown name, or a value that its field does not accept.
    """
    hints = get_type_hints(EngineConfig)
    unknown = [name for name in options if name not in hints]
    if unknown:
        known = ("pretrained", "revision", "dtype", "tokenizer", *hints, *_HARNESS_OPTIONS)
        raise EvaluationError(
            f"The model type foreroute has no argument {unknown[0]}. Its model_args: {', '.join(known)}."
        )
    return EngineConfig(**{name: _value(name, given, hints[name]) for name, given in options.items()})


def _value(name: str, given: Any, hint: Any) -> Any:
    """Convert `given` to the type of a field."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    text = str(given)
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds:
        if text.lower() in _SWITCHES:
            return _SWITCHES[text.lower()]
        raise EvaluationError(f"{name}={given} is neither true nor false.")
    if type(given) in kinds:
        return given
    # YAML and lm-eval turn no, true and none into a bool or None.
    if str in kinds and given is None:
        return "none"
    if str in kinds and not isinstance(given, bool):
        return text
    for kind in (int, float):
        try:
            if kind in kinds and not isinstance(given, bool):
                return kind(text)
        except ValueError:
            continue
    wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
    raise EvaluationError(f"{name}={given} is not possible; it takes: {wanted}.")


@dataclass(frozen=True)
class LmEvalScores:
    """primary: the first metric of each task and group. metrics: all metrics of each, under lm-eval's names.

    A name is metric,filter ("acc,none", "exact_match,strict-match"); standard errors are "acc_stderr,none".
    """

    primary: dict[str, float]
    metrics: dict[str, dict[str, float]]


def check_tasks(tasks: Sequence[str], include_path: Path | None, *, allow_code: bool = False) -> TaskManager:
    """Return lm-eval's tasks after checking that they include the named ones.

    Args:
        include_path: folder with more tasks.
        allow_code: let tasks such as humaneval run code that the model wrote, on this machine and without a sandbox.
    Raises:
        EvaluationError: an unknown task, a missing folder, or a task that runs code without being allowed to.
    """
    if include_path is not None and not include_path.is_dir():
        raise EvaluationError(f"--include-path {include_path} is not a folder.")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        what = f"lm-eval has no task called {unknown[0]}." if unknown else "No task is named."
        raise EvaluationError(f"{what} `lm_eval ls tasks` lists them.")
    runs_code = [name for name in tasks if _runs_code(manager, name)]
    if runs_code and not allow_code:
        raise EvaluationError(
            f"{runs_code[0]} runs code that the model wrote: on this machine, as this user, without a sandbox. Allow "
            "it, best in a virtual machine: --confirm-run-unsafe-code, and HF_ALLOW_CODE_EVAL=1 in the environment."
        )
    return manager


def _runs_code(manager: TaskManager, name: str) -> bool:
    """Whether the task, or one of its group or tag, is marked as running the model's code; reads only its YAML."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    config = entry.cfg or {}
    children = config.get("task", []) if "group" in config else entry.tags if entry.cfg is None else []
    names = [child if isinstance(child, str) else child.get("task", "") for child in children]
    return bool(config.get("unsafe_code")) or any(_runs_code(manager, child) for child in names)


def run_lm_eval(
    model: OffloadedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    manager: TaskManager,
    limit: int | None = None,
    batch: int = 1,
    *,
    allow_code: bool = False,
) -> LmEvalScores:
    """Run lm-eval's tasks on a loaded model.

    Args:
        model: from `foreroute.load`. tokenizer: of transformers.
        tasks: names of tasks and groups, as `lm_eval ls tasks` lists them.
        manager: the result of `check_tasks` for these tasks. allow_code: as it was told.
        limit: first documents of each task; all when None. batch: requests computed together.
    Raises:
        EvaluationError: a task's data cannot be loaded, or it runs code and the environment does not allow it.
    """
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    try:
        found = simple_evaluate(
            wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False,
            confirm_run_unsafe_code=allow_code,
        )  # fmt: skip
    except OSError as error:
        raise EvaluationError(f"The data of {', '.join(tasks)} cannot be loaded: {error}") from error
    except ValueError as error:
        # Required besides by the metric of tasks that run code.
        if "HF_ALLOW_CODE_EVAL" not in str(error):
            raise
        raise EvaluationError(
            f"{', '.join(tasks)} runs code that the model wrote. Allow it: HF_ALLOW_CODE_EVAL=1 in the environment."
        ) from error
    metrics = {
        task: {name: float(value) for name, value in row.items() if isinstance(value, (int, float)) and "," in name}
        for task, row in found["results"].items()
    }
    # A group without an average has no metric.
    primary = {
        task: next(value for name, value in row.items() if "_stderr," not in name)
        for task, row in metrics.items()
        if row
    }
    return LmEvalScores(primary, metrics)
