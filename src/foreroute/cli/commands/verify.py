"""`foreroute verify`: check that the engine computes your checkpoint bit for bit as the whole model does."""

import argparse
import math
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.cli import figures, options
from foreroute.config import EngineConfig, Plan
from foreroute.errors import BudgetError, ForerouteError, PromptError
from foreroute.units import format_memory

if TYPE_CHECKING:
    import torch

    from foreroute.engine.interfaces import EngineStats
    from foreroute.verification.compare import FirstDifference, Verdict
    from foreroute.verification.distance import Distance
    from foreroute.verification.reference import Reference
    from foreroute.verification.transcript import Exercise

DEFAULT_MEMORY = "25%"
_PROMPTS = (
    "Once upon a time, a ship came into the harbour with nobody on board.",
    "def factorial(n):\n    ",
    "The three largest cities of the country are, in this order,",
    "Q: If 17 apples cost 51 crowns, what do 5 cost?\nA:",
    "Der Zug nach Zürich fährt um 7:45 Uhr ab, und wer ihn verpasst,",
)
# Characters of a prompt that are shown.
_SHOWN = 48

_EPILOG = """\
examples:
  foreroute verify MODEL                      with a quarter of the experts in
                                              memory
  foreroute verify MODEL --memory 8GiB --prompts my-prompts.txt --tokens 128
  foreroute verify MODEL --packed no          not the packed store: which is at
                                              fault, the store or the rest?
  foreroute verify MODEL --reference on-demand --json

The reference continues each prompt greedily. Then the engine, with the flags
that you give, is fed the same tokens, and every step is compared by its bits:
what goes into each MoE layer's experts (hidden states, routing), what comes
out, and the logits. Each prompt runs alone.

the reference:
  resident    plain transformers, every expert in memory, eager experts
              (experts_implementation="eager"), the same dtype and threads.
              Taken when the model fits the free RAM. Equal bits prove that
              exact mode changes nothing at all. Where ggml's kernels multiply
              (--math), a second model with the same kernels and every expert
              in memory, loaded from the checkpoint's own files
  on-demand   every expert read from the checkpoint's own files each time it is
              needed, nothing kept, nothing prefetched. Equal bits prove that
              cache, eviction, prefetches and packed store change nothing; that
              the maths is transformers' own is tested at load, on random
              numbers
Where ggml's kernels multiply, some steps are compared with torch's math too:
its bits differ, as ggml rounds activations inside a product, but the
distributions of the next token must be near (--beside-torch). Of a packed
store with eight rows side by side, whose products have other last bits, the
reference is a model of that store, and every expert's bytes are compared with
the checkpoint's; of one in blocks that the checkpoint does not have (pack
--quant, --dense), its experts that were used and all its dense weights with
what packing the checkpoint again makes.
A difference is named: prompt, step, MoE layer; then the expert whose slot held
other bytes than the checkpoint, or the dense tensor that has other values.

Exit code 0: everything is the same. 1: something differs, or is far from
torch. 2: it could not run."""


def add_parser(commands: Any) -> None:
    """Add `verify` to the commands."""
    parser = commands.add_parser(
        "verify",
        help="check that your model gives the same bits as the resident one",
        usage="foreroute verify MODEL [flags]",
        description="Compare a model run from disk with the whole model, bit for bit.",
        epilog=_EPILOG,
    )
    options.add_model(parser)
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="UTF-8 text, one prompt a line (default: five that are built in)"
    )
    parser.add_argument(
        "--tokens", type=options.at_least(1), default=32, metavar="N", help="new tokens after each (default: 32)"
    )
    parser.add_argument(
        "--reference",
        choices=("auto", "resident", "on-demand"),
        default="auto",
        help="what to compare with (default: auto, the resident model if it fits)",
    )
    parser.add_argument(
        "--beside-torch",
        type=options.at_least(0),
        default=20,
        metavar="N",
        help="with ggml's kernels, steps that are compared with torch's math too; 0: none (default: 20)",
    )
    options.add_common_options(parser)
    options.add_model_options(parser)
    options.add_engine_options(parser, without=("trace", "dense", "draft", *options.GPU_FIELDS), memory=DEFAULT_MEMORY)


@dataclass(frozen=True)
class _Outcome:
    """Everything that is shown."""

    reference: "Reference"
    verdict: "Verdict"
    plan: Plan
    stats: "EngineStats"
    beside_torch: "Distance | None" = None

    @property
    def is_right(self) -> bool:
        return self.verdict.same and (self.beside_torch is None or self.beside_torch.agrees)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    config = options.engine_config(args)
    if getattr(args, "policy", "exact") != "exact":
        raise ForerouteError("verify compares exact mode with its reference. Leave --policy out.")
    texts = read_prompts(args.prompts)
    folder = options.find_model(args)
    options.quiet_libraries(args)
    outcome = _verify(args, config, folder, texts)
    verdict, stats = outcome.verdict, outcome.stats
    # Where the family's own code computes experts, nothing is prefetched.
    complaints = figures.inert_features(
        outcome.plan, stats.evictions, stats.prefetch_used or outcome.plan.math == "family"
    )
    if args.json:
        figures.print_json(
            same=verdict.same,
            reference=outcome.reference.kind,
            prompts=len(texts),
            tokens=verdict.tokens,
            same_tokens=verdict.same_tokens,
            layers_compared=verdict.layers_compared,
            first_difference=verdict.first_difference,
            complaints=complaints,
            beside_torch=outcome.beside_torch,
            evictions=stats.evictions,
            prefetch_used=stats.prefetch_used,
            plan=outcome.plan,
        )
    else:
        _show(outcome, texts, complaints)
    return 0 if outcome.is_right else 1


def read_prompts(path: Path | None) -> list[str]:
    """Read the prompts of a file, one a line, without empty lines; the built-in ones when there is no file.

    Raises:
        PromptError: the file cannot be read, is not UTF-8, or holds no prompt.
    """
    if path is None:
        return list(_PROMPTS)
    lines = options.read_prompt(None, path.expanduser()).split("\n")
    return [line.removesuffix("\r") for line in lines if line.strip()]


def _verify(args: argparse.Namespace, config: EngineConfig, folder: Path, texts: list[str]) -> _Outcome:
    with figures.busy("Looking at the model", args.json):
        import foreroute
        from foreroute.checkpoint.locate import read_index
        from foreroute.model.build.skeleton import outline
        from foreroute.model.text import encode_prompt, load_tokenizer
        from foreroute.verification.compare import verify
        from foreroute.verification.distance import distance, logits_of, shortened
        from foreroute.verification.reference import RESIDENT, choose_reference, record_reference, torch_model

        options.apply_threads(args)
        # Errors are reported before the reference runs, which can take long.
        index = read_index(folder)
        sketch = outline(folder, index)
        tokenizer = load_tokenizer(folder)
        prompts = [encode_prompt(tokenizer, text, chat=False) for text in texts]
        exercises = within_context(prompts, args.tokens, sketch.config.get_text_config())
        plan = settle(folder, args.dtype, config)
        kind = choose_reference(args.reference, index, sketch, args.dtype, plan)
    what = "the resident model" if kind == RESIDENT else "on-demand loading"
    with figures.counting_bar(what, sum(exercise.num_steps for exercise in exercises), "tokens", args.json) as show:
        reference = record_reference(kind, folder, sketch, args.dtype, plan, exercises, show, config)
    with figures.loading(args.json) as progress:
        model = foreroute.load(folder, plan.memory_bytes, args.dtype, config=config, progress=progress)
    with closing(model.foreroute):
        with figures.counting_bar("from disk", reference.num_steps, "tokens", args.json) as show:
            verdict = verify(model, exercises, reference, show)
        outcome = _Outcome(reference, verdict, model.foreroute.plan, model.foreroute.stats())
        if not _computes_blocks(plan, config) or not args.beside_torch:
            return outcome
        short, fed = shortened(exercises, args.beside_torch), reference.tokens
        names = [layer.name for layer in model.foreroute.table.layers]
        ours = logits_of(model, names, short, fed, lambda done, total: None)
    with (
        figures.counting_bar("torch's math", len(ours), "tokens", args.json) as show,
        torch_model(folder, sketch, outcome.plan, config.packed) as model,
    ):
        theirs = logits_of(model, names, short, fed, show)
    return replace(outcome, beside_torch=distance(ours, theirs))


def _computes_blocks(plan: Plan, config: EngineConfig) -> bool:
    """Whether ggml multiplies: experts, or a packed store's dense weights."""
    return plan.math == "ggml" or (plan.dense != "stored" and config.math != "torch")


def within_context(prompts: "list[torch.Tensor]", num_tokens: int, config: Any) -> "list[Exercise]":
    """Pair prompts (each [1, tokens]) with num_tokens steps each, fewer where the context of `config` ends before.

    Raises:
        PromptError: a prompt is longer than the context.
    """
    from foreroute.verification.transcript import Exercise

    context = getattr(config, "max_position_embeddings", None) or math.inf
    for number, prompt in enumerate(prompts, start=1):
        if prompt.shape[1] > context:
            raise PromptError(
                f"Prompt {number} has {prompt.shape[1]} tokens; the model's context holds {context}. Shorten it."
            )
    return [Exercise(prompt, int(min(num_tokens, context - prompt.shape[1] + 1))) for prompt in prompts]


def settle(folder: Path, dtype: str, config: EngineConfig) -> Plan:
    """Return the plan with the budget of `config`; the default budget is raised to what one token needs.

    The model in `folder` is loaded in `dtype` and closed again for this, which also finds whatever is wrong with it.

    Raises:
        ForerouteError: as `foreroute.load`.
    """
    try:
        return _plan(folder, dtype, config)
    except BudgetError:
        if config.memory != DEFAULT_MEMORY:
            raise
    plan = _plan(folder, dtype, replace(config, memory="100%"))
    return _plan(folder, dtype, replace(config, memory=str(plan.token_slot_bytes)))


def _plan(folder: Path, dtype: str, config: EngineConfig) -> Plan:
    import foreroute

    model = foreroute.load(folder, dtype=dtype, config=config)
    model.foreroute.close()
    return model.foreroute.plan


def _show(outcome: _Outcome, texts: list[str], complaints: list[str]) -> None:
    console = figures.stdout_console()
    figures.print_rows(console, _account(outcome, len(texts)))
    console.print()
    first = outcome.verdict.first_difference
    console.print(f"the same, bit for bit: {'yes' if outcome.verdict.same else 'no'}", style="bold")
    if first is not None:
        console.print(where(first, texts[first.prompt - 1]), markup=False)
        figures.print_list(console, [*first.reasons, *_remedies(first, outcome.plan)])
    else:
        console.print(_proof(outcome.reference.kind, outcome.plan), markup=False)
    if outcome.beside_torch is not None and not outcome.beside_torch.agrees:
        console.print(_far(outcome.beside_torch), markup=False)
    for complaint in complaints:
        console.print(complaint, markup=False)


def _account(outcome: _Outcome, num_prompts: int) -> list[figures.Row]:
    plan, stats, verdict = outcome.plan, outcome.stats, outcome.verdict
    sources = {"safetensors": "the checkpoint", "gguf": "the GGUF file", "packed": "the packed store"}
    kinds = {"resident": "plain transformers, eager", "on-demand": "each expert read when needed"}
    if plan.math == "ggml" or plan.dense != "stored":
        kinds["resident"] = "the same kernels, all experts in memory"
    rows: list[figures.Row] = [
        ("reference", outcome.reference.kind, f"{kinds[outcome.reference.kind]}, {plan.compute_dtype}"),
        ("engine", f"{plan.num_slots} of {plan.total_slots} experts fit",
         f"{format_memory(plan.pool_bytes)}, read from {sources[plan.source]}"),
        ("evictions", f"{stats.evictions:,}", "experts that lost their place in memory"),
        ("prefetches used", f"{stats.prefetch_used:,}", "experts that were prefetched and then demanded"),
        ("compared", f"{verdict.layers_compared:,} MoE layers",
         f"in {verdict.tokens:,} steps, after {num_prompts} {'prompt' if num_prompts == 1 else 'prompts'}"),
        ("tokens", f"{verdict.same_tokens:,} of {verdict.tokens:,}", "the same"),
    ]  # fmt: skip
    apart = outcome.beside_torch
    if apart is not None:
        rows.append(
            ("beside torch", f"KL {apart.median_kl:.2g} nats",
             f"median of {apart.steps:,} steps, at most {apart.worst_kl:.2g}; same top token in {apart.same_top:,}")
        )  # fmt: skip
    return rows


def where(first: "FirstDifference", text: str) -> str:
    """Describe the place of the difference `first` in one sentence; `text` is the prompt."""
    from foreroute.verification.compare import DENSE, EXPERTS, PACKED_DENSE, ROUTER

    if first.part == PACKED_DENSE:
        return "First difference: the packed store's dense weights are not what packing the checkpoint again makes."
    shown = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    step = "in its prefill" if first.step == 1 else f"at new token {first.step - 1} (position {first.position})"
    layer = f"MoE layer {first.moe_layer} ({first.module})"
    what = {
        DENSE: f"what goes into {layer} differs, and all experts before it gave the same",
        ROUTER: f"the same goes into {layer}, and its router chooses otherwise",
        EXPERTS: f"the same goes into the experts of {layer}, and what comes out differs",
    }.get(first.part, "every MoE layer gives the same, and the logits differ")
    return f"First difference: prompt {first.prompt} ({shown!r}), {step}: {what}."


def _remedies(first: "FirstDifference", plan: Plan) -> list[str]:
    from foreroute.verification.compare import PACKED_DENSE

    if plan.source != "packed" or not (first.experts or first.part == PACKED_DENSE):
        return []
    what = "Experts" if first.experts else "They"
    return [f"{what} came from a packed store: pack again (foreroute pack MODEL --force), or verify with --packed no."]


def _far(apart: "Distance") -> str:
    from foreroute.verification.distance import MOST_KL

    return (
        f"But torch's math gives other distributions: a median KL of {apart.median_kl:.2g} nats, where rounding gives "
        f"less than {MOST_KL}. Take --math torch, and report it with the file's name."
    )


def _proof(kind: str, plan: Plan) -> str:
    if plan.dense != "stored":
        how = "with every expert in memory" if kind == "resident" else "where each expert is read when it is needed"
        return (
            f"Exact mode gives what the same store gives {how}; its dense weights, and its experts that were used, are "
            "what packing the checkpoint again makes."
        )
    if plan.math == "ggml":
        what = "" if kind == "resident" else "; --reference resident would prove it of every byte, in enough RAM"
        return f"Exact mode gives what the same kernels give with every expert in memory{what}."
    if kind == "resident":
        return "Exact mode gives what transformers gives with every expert in memory."
    return (
        "Cache, eviction, prefetches and packed store change nothing. That the maths is transformers' own was tested "
        "at load; --reference resident would prove it, in enough RAM."
    )
