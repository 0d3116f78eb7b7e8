"""`foreroute eval --policies`: what each policy costs in accuracy, and what it saves in bytes and in stalls."""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.cli import figures
from foreroute.config import EngineConfig
from foreroute.errors import EvaluationError

if TYPE_CHECKING:
    from foreroute.evals.builtin import SuiteSettings
    from foreroute.evals.policies import Material, OtherTasks
    from foreroute.evals.text import HeldOut
    from foreroute.loading.offloaded_model import OffloadedModel
    from foreroute.types import NamedProgress

_NOTES = """\
nats: loss per token beside exact decoding. same: likeliest token is exact's.
MB: moved per token. stall: MoE layers that waited. wait: misses past layer 0
that were waited for. ms: TPOT, by the clock only. tasks: mean accuracy."""


def run(
    args: argparse.Namespace,
    folder: Path,
    config: EngineConfig,
    tokenizer: Any,
    material: "Material",
    about: Mapping[str, Any],
    show: "NamedProgress",
) -> int:
    """Compute the rows that an earlier run did not finish, and show all; return the exit code.

    folder: of the model. args, config, about, show: the command's. tokenizer, material: see `run_policies`.
    """
    import torch
    import transformers

    import foreroute
    from foreroute.checkpoint.locate import read_index
    from foreroute.evals import plot
    from foreroute.evals.policies import FinishedRows, Rows, run_policies
    from foreroute.policy import Policy
    from foreroute.predict.build import open_sidecar

    memories = tuple(args.memory or (("none",) if args.lm_eval else ("25%",)))
    rows = Rows(tuple(map(Policy.parse, args.policies)), memories, args.deterministic)
    if args.png is not None:
        plot.check(args.png)
        if not len(material.windows) and Policy() not in rows.policies:
            raise EvaluationError("--png draws what is lost beside exact: add exact to --policies, or text.")
    # Without prefetch, a policy's default vectors are read only where such a policy is asked for.
    standing = next((str(policy) for policy in rows.policies if policy.substitutes), config.policy)
    config = dataclasses.replace(config, policy=standing if config.prefetch == "none" else config.policy)
    index = read_index(folder)
    sidecar = open_sidecar(folder, index, config)
    everything = {
        **about, "model": index.fingerprint(), "config": dataclasses.asdict(config), "dtype": args.dtype,
        "threads": torch.get_num_threads(), "sidecar": None if sidecar is None else sidecar.about,
        "material": material.digest(), "chat": getattr(tokenizer, "chat_template", None),
        "versions": [torch.__version__, transformers.__version__, foreroute.__version__],
    }  # fmt: skip
    finished = FinishedRows(args.cache / "eval", everything)
    wanted = {f"{policy} at {memory}" for policy, memory in rows.pairs()}
    if done := len(wanted & finished.rows.keys()):
        figures.stderr_console().print(f"Going on after {done} of {len(wanted)} rows.", style="dim")

    def load(memory: str) -> "OffloadedModel":
        model = foreroute.load(folder, memory, args.dtype, config=config)
        model.foreroute.set_policy("exact")
        return model

    with tempfile.TemporaryDirectory(prefix="foreroute-eval-") as scratch:
        made = run_policies(load, tokenizer, sidecar, rows, material, finished, Path(scratch), show)
    if args.json:
        print(json.dumps(made, ensure_ascii=False), flush=True)
    else:
        _print(made)
    if args.png is not None:
        plot.draw(made, args.png, f"{folder.name}: what each policy costs")
    finished.forget()
    return 0


def material_of(
    tokenizer: Any,
    texts: Mapping[str, str],
    shares: Mapping[str, float],
    held_out: "HeldOut | None",
    settings: "SuiteSettings",
    others: "OtherTasks | None",
    *,
    others_in_prompts: bool,
) -> "Material":
    """Cut windows from the texts, and draw the suite's items where `held_out` is given, as `settings` say.

    Args:
        tokenizer: of transformers. texts, shares: by source. others, others_in_prompts: see `Material`.
    Raises:
        EvaluationError: too little text, or nothing to evaluate on.
    """
    import torch

    from foreroute.evals.policies import Material
    from foreroute.evals.tasks import held_out_suite
    from foreroute.evals.text import cut_windows

    windows = torch.empty(0, settings.context + 1, dtype=torch.int64)
    if texts and settings.windows:
        cut = cut_windows(texts, shares, tokenizer, settings.context, settings.windows)
        windows = torch.cat([one.ids for one in cut])
    items = []
    if held_out is not None and settings.per_kind:
        items = held_out_suite(settings.per_kind, settings.seed, held_out.glossary, settings.only)
    if not len(windows) and not items and others is None:
        raise EvaluationError("There is nothing to evaluate on: no text, no items. Raise --windows or --per-kind.")
    return Material(windows, tuple(items), settings.batch, others, others_in_prompts)


def _print(rows: list[dict[str, Any]]) -> None:
    from foreroute.evals.policies import mean_accuracy

    def cell(row: Mapping[str, Any], name: str, form: str, scale: float = 1.0) -> str:
        value = row.get(name)
        return "–" if value is None else form.format(value * scale)

    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("memory", lambda row: row["memory"]),
        ("nats", lambda row: cell(row, "delta_nats", "{:+.5f}")),
        ("same %", lambda row: cell(row, "agreement", "{:.1f}", 100)),
        ("MB", lambda row: cell(row, "bytes_per_token", "{:.2f}", 1e-6)),
        ("stall %", lambda row: cell(row, "stalled_layers", "{:.1f}", 100)),
        ("wait %", lambda row: cell(row, "waited_misses", "{:.1f}", 100)),
        ("ms", lambda row: cell(row, "tpot_ms", "{:.1f}")),
        ("tasks %", lambda row: cell({"mean": mean_accuracy(row)}, "mean", "{:.1f}", 100)),
    ]
    shown = [(head, of) for head, of in columns if any(of(row) != "–" for row in rows)]
    console = figures.stdout_console()
    numbered = list(enumerate(rows, 1))
    grid = [[f"{number} {_name(row)}", *(of(row) for _, of in shown)] for number, row in numbered]
    figures.print_grid(console, ("  policy", *(head for head, _ in shown)), grid)
    tasks = sorted({task for row in rows for task in row["accuracy"]})
    if tasks:
        console.print()
        heads = ("right, %", *(str(number) for number, _ in numbered))
        figures.print_grid(console, heads, [[task, *(_task(row, task) for row in rows)] for task in tasks])
    console.print()
    console.print(_NOTES, style="dim")


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['policy']} {row['tau']:g}" if row["policy"] == "tolerance" else str(row["policy"])


def _task(row: Mapping[str, Any], task: str) -> str:
    share = row["accuracy"].get(task)
    return "–" if share is None else f"{100 * share:.0f}"
