"""What a draft gains: the same answers without and with one, in turns on one machine.

    python -m benchmarks.drafts models/foreroute-tiny --draft models/foreroute-draft --memory 100% [--prompts 100]

Prompts are windows of a held-out text (`foreroute eval` names where it lies, --text gives another). Each is answered
without, with, with and without the draft, likeliest tokens, and the tokens are compared before any time is believed.
The governor chooses the lengths and remembers, as in a server; `--prompts` answers come after some that are not
counted.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from benchmarks import _harness
from foreroute import EngineConfig
from foreroute.cli.commands.evaluate import default_held_out
from foreroute.evals.text import read_held_out
from foreroute.generation.generate import GenerationReport, generate
from foreroute.model.draft_model import PROMPT_LOOKUP
from foreroute.model.text import load_tokenizer


def windows(texts: list[str], tokenizer: Any, count: int, length: int) -> list[torch.Tensor]:
    """`count` prompts [1, length], from places spread over the texts."""
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    ids = torch.cat([row[:, : row.shape[1] // length * length].view(-1, length) for row in rows])
    places = torch.linspace(0, len(ids) - 1, count).long()
    return list(ids[places].split(1))


def figures(reports: list[GenerationReport]) -> dict[str, float]:
    """Means over answers: TPOT of each has the same weight, counts are of all tokens."""
    tokens = sum(len(one.token_ids) - 1 for one in reports)
    answers = [one.stats.answers for one in reports]
    return {
        "tpot_ms": 1e3 * statistics.mean(one.tpot_s or 0.0 for one in reports),
        "mb_per_token": sum(one.demand_bytes + one.prefetch_bytes for one in answers) / tokens / 1e6,
        "tokens_per_step": tokens / sum(one.steps for one in answers),
        "acceptance": sum(one.accepted for one in reports) / max(sum(one.drafted for one in reports), 1),
        "drafted_per_token": sum(one.drafted for one in reports) / tokens,
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", default=PROMPT_LOOKUP)
    parser.add_argument("--memory", default="100%")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--packed", default="auto")
    parser.add_argument("--text", type=Path, nargs="+", help="default: the held-out text of foreroute eval")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=4, help="answers that are not counted")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--tokens-only", action="store_true", help="compare tokens, each prompt once with and without")
    parser.add_argument("--no-record", action="store_true")
    asked = parser.parse_args()
    texts = (
        [path.read_text(encoding="utf-8") for path in asked.text]
        if asked.text
        else list(read_held_out(default_held_out()).texts.values())
    )
    model = foreroute.load(
        asked.model, asked.memory, asked.dtype, config=EngineConfig(draft=asked.draft, packed=asked.packed)
    )
    tokenizer = load_tokenizer(asked.model)
    prompts = windows(texts, tokenizer, asked.prompts + asked.warm_up, asked.prompt_tokens)

    def answer(prompt: torch.Tensor, *, is_drafted: bool) -> GenerationReport:
        draft, model.foreroute.draft = model.foreroute.draft, None
        if is_drafted:
            model.foreroute.draft = draft
        try:
            return generate(model, tokenizer, prompt, max_new_tokens=asked.tokens, do_sample=False, eos_token_id=None)
        finally:
            model.foreroute.draft = draft

    turns = (False, True) if asked.tokens_only else (False, True, True, False)
    reports: dict[bool, list[GenerationReport]] = {False: [], True: []}
    ratios, num_differing = [], 0
    for at, prompt in enumerate(prompts):
        made = [(is_drafted, answer(prompt, is_drafted=is_drafted)) for is_drafted in turns]
        times = ", ".join(f"{1e3 * (one.tpot_s or 0):.2f} {'with' if has else 'without'}" for has, one in made)
        print(f"{at}: ms a token {times}; {made[1][1].accepted} of {made[1][1].drafted} accepted", flush=True)
        num_differing += len({one.token_ids for _, one in made}) > 1
        if at < asked.warm_up:
            continue
        for is_drafted, one in made:
            reports[is_drafted].append(one)
        ratios.append(figures([one for is_drafted, one in made if is_drafted])["tpot_ms"]
                      / figures([one for is_drafted, one in made if not is_drafted])["tpot_ms"])  # fmt: skip
    drafts = next(iter(model.foreroute.drafts.values()))
    result = {
        "model": asked.model.name,
        "draft": Path(asked.draft).name,
        "memory": asked.memory,
        "math": model.foreroute.plan.math,
        "prompts": asked.prompts,
        "tokens": asked.tokens,
        "threads": torch.get_num_threads(),
        "differing_answers": num_differing,
        "without": figures(reports[False]),
        "with": figures(reports[True]),
        "time_of_without": statistics.median(ratios),
        "length_now": drafts.governor.chosen,
    }
    _harness.record(
        f"drafts-{asked.model.name}-{asked.memory.rstrip('%')}-{Path(asked.draft).name}",
        _harness.rounded(result, 4),
        {"ratios": _harness.rounded(ratios, 4)},
        keep=not asked.no_record,
    )
    if num_differing:
        sys.exit(f"{num_differing} answers differ: no time above is worth reading")


if __name__ == "__main__":
    main()
