"""What each policy costs an encoder-decoder: hidden text and tasks, with caches of a share of the experts.

    python -m benchmarks.policies_seq2seq models/foreroute-tiny-switch [--memory none 25% 50%] [--windows 28]

As benchmarks.policies does for decoders: predictors are fitted to the first half of the held-out text, and policies are
priced on the second; by logical time, in fp32. The encoder reads a window with gaps, which is exact under every policy;
the decoder is fed what was in the gaps token by token. What exact decoding moves under LRU without guesses stands
beside the rows. Memory "none" is the paper's case: only what was guessed for a layer is there.
"""

import argparse
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from benchmarks import _harness
from benchmarks.policies import POLICIES, SHOWN
from benchmarks.predictors import halves
from foreroute import EngineConfig
from foreroute.checkpoint.locate import read_index
from foreroute.cli.commands.evaluate import default_held_out
from foreroute.cli.commands.fit import context_of
from foreroute.engine.interfaces import summed
from foreroute.evals.fetched_only import fetched_only
from foreroute.evals.pricing import Cost, Divergence
from foreroute.evals.tasks import Item, accuracy_by_kind, held_out_suite
from foreroute.evals.text import read_held_out
from foreroute.model.caches import cache_argument, cache_of
from foreroute.model.generation_settings import decoder_start
from foreroute.model.text import load_tokenizer
from foreroute.policy import Policy
from foreroute.predict.sidecar import Sidecar
from foreroute.prepare.corpus import read_corpus
from foreroute.prepare.fit import fit
from models.seq2seq import figures
from models.seq2seq.rows import Batch

Window = tuple[torch.Tensor, torch.Tensor]  # what the encoder reads and what the decoder writes, [tokens] each


def windows_of(files: list[Path], tokenizer: Any, per_source: int) -> list[Window]:
    """Windows of `files` with gaps, as the models were trained and are evaluated on."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in files}
    hidden = figures.hide_text(texts, dict.fromkeys(texts, 1.0), tokenizer, per_source)
    batches: list[Batch] = [batch for one in hidden for batch in one.batches]
    return [pair for batch in batches for pair in zip(batch.ids, batch.labels, strict=True)]


@torch.no_grad()
def decoded(model: Any, window: Window, start: int) -> torch.Tensor:
    """Logits [tokens, vocabulary] of the decoder, fed token by token."""
    reads, writes = window
    encoded = model.get_encoder()(input_ids=reads[None])
    said, cache = [], {}
    for token in (torch.tensor(start), *writes[:-1]):
        step = model(encoder_outputs=encoded, decoder_input_ids=token[None, None], **cache, use_cache=True)
        said.append(step.logits[0, -1:])
        cache = cache_argument(cache_of(step))
    return torch.cat(said).float()


def price(model: Any, policy: Policy, windows: list[Window], exact: list[torch.Tensor]) -> dict[str, Any]:
    """A policy's figures on windows, beside the `exact` logits."""
    start, difference, costs = decoder_start(model), Divergence(), []
    model.foreroute.set_policy(policy)
    for window, theirs in zip(windows, exact, strict=True):
        before = model.foreroute.stats()
        difference.add(decoded(model, window, start), theirs, window[1])
        costs.append(model.foreroute.stats().minus(before).decode)
    cost = Cost.of_stats(summed(costs), None)
    return {**difference.figures(), **cost.figures(), "scored_tokens": difference.tokens}


def without_cache(
    model: Any, policy: Policy, fitted: Sidecar, windows: list[Window], exact: list[torch.Tensor]
) -> dict[str, Any]:
    """The same where only the experts that were guessed for a layer are there. model: decodes exactly, all resident."""
    start, difference = decoder_start(model), Divergence()
    with fetched_only(model, fitted, policy, in_prompts=False) as tally:
        for window, theirs in zip(windows, exact, strict=True):
            difference.add(decoded(model, window, start), theirs, window[1])
    cost = Cost.of_tally(tally, model.foreroute.plan.expert_bytes)
    return {**difference.figures(), **cost.figures(), "scored_tokens": difference.tokens}


def named(policy: Policy, memory: str) -> dict[str, Any]:
    """What a row is of."""
    return {"policy": policy.name, "tau": policy.tau, "memory": memory}


def with_answers(row: dict[str, Any], model: Any, tokenizer: Any, items: list[Item]) -> dict[str, Any]:
    """A row with accuracy by kind, one item at a time: a batch would share its experts, a different case."""
    accuracy = accuracy_by_kind(items, [figures.answer(model, tokenizer, [item])[0] for item in items])
    shares = accuracy.values()
    row |= {"accuracy": accuracy, "accuracy_mean": sum(shares) / len(shares) if shares else None}
    print({key: row.get(key) for key in SHOWN}, flush=True)
    return row


def main() -> None:
    """Price, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--memory", nargs="+", default=["none", "25%", "50%"])
    parser.add_argument("--windows", type=int, default=28, help="per source")
    parser.add_argument("--per-kind", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=65536, help="fitted to")
    parser.add_argument("--held-out", type=Path, default=default_held_out())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tokenizer = load_tokenizer(asked.model)
    load = partial(foreroute.load, asked.model, dtype="float32")
    held_out = read_held_out(asked.held_out)
    items = held_out_suite(asked.per_kind, 0, held_out.glossary) if asked.per_kind else []
    rows, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        first, second = halves(asked.held_out, Path(folder))
        windows = windows_of(second, tokenizer, asked.windows)
        sidecar, fingerprint = Path(folder) / "sidecar.safetensors", read_index(asked.model).fingerprint()
        resident = load("100%", config=EngineConfig(prefetch="none"))
        with closing(resident.foreroute):
            start = decoder_start(resident)
            corpus = read_corpus(tokenizer, first, asked.tokens, context_of(resident.config, None), start)
            fit(resident, fingerprint, corpus, sidecar)
            exact = [decoded(resident, window, start) for window in windows]
        if "none" in asked.memory:
            fitted = Sidecar.load(sidecar, fingerprint)
            whole = load("100%", config=EngineConfig(predictor=str(sidecar), deterministic=True))
            with closing(whole.foreroute):
                for policy in map(Policy.parse, asked.policies):
                    row = without_cache(whole, policy, fitted, windows, exact)
                    with fetched_only(whole, fitted, policy, in_prompts=False):
                        rows.append(with_answers({**named(policy, "none"), **row}, whole, tokenizer, items))
        for memory in (one for one in asked.memory if one != "none"):
            alone = load(memory, config=EngineConfig(prefetch="none", eviction="lru", deterministic=True))
            with closing(alone.foreroute):
                plain.append({"memory": memory, **price(alone, Policy(), windows, exact)})
            for name in asked.policies:
                model = load(memory, config=EngineConfig(predictor=str(sidecar), deterministic=True))
                with closing(model.foreroute):
                    policy = Policy.parse(name)
                    row = {**named(policy, memory), **price(model, policy, windows, exact)}
                    row["bytes_beside_lru"] = row["bytes_per_token"] / plain[-1]["bytes_per_token"]
                    rows.append(with_answers(row, model, tokenizer, items))
    result = {"model": asked.model.name, "fitted_to": asked.tokens, "rows": rows, "lru_without_prefetch": plain}
    name = f"policies-{asked.model.name}-{'-'.join(memory.strip('%') for memory in asked.memory)}"
    _harness.record(name, _harness.rounded(result, 6), {})


if __name__ == "__main__":
    main()
