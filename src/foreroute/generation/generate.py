"""Timed generation of one answer: text as it comes, and then the figures.

`generate` calls back with each piece and runs in the caller's thread, so that Ctrl-C stops it at once; `stream` is an
iterator over the pieces and runs in a separate thread. transformers' generate() prepares and checks everything; the
loop is ours (decode_loop.py) where it does the same, else transformers' own. The report says which.
"""

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.stopping_criteria import StoppingCriteriaList

from foreroute.drafting.draft import GovernedDraft, draft_for
from foreroute.engine.interfaces import EngineStats
from foreroute.errors import PromptError, RefusedError
from foreroute.generation.decode_loop import LeanLoop, serves
from foreroute.generation.graph_decoder import decoder_of, is_paged
from foreroute.generation.prefix_cache import PromptCache
from foreroute.generation.recorder import StopWhen, TokenRecorder
from foreroute.loading.offloaded_model import OffloadedModel, handle_of
from foreroute.model.caches import cache_argument, can_be_continued, has_linear_states, is_ordinary, new_cache
from foreroute.model.generation_settings import stop_strings
from foreroute.system.memory import peak_resident_bytes


@dataclass(frozen=True)
class GenerationReport:
    """One answer and its costs.

    token_ids: the new tokens. text: their text, without an incomplete character at the end.
    finish_reason: "stop" (an end token, or a stop string), "length", "stopped" (should_stop) or "interrupted"
        (Ctrl-C).
    ttft_s: from the start of generate() to the first token. tpot_s: (last - first) / (n - 1). None: too few tokens.
    stats: the engine's counts of this answer alone. expert_bytes: stored bytes of one expert.
    peak_rss_bytes: of the process so far, loading included.
    loop: "lean", or "generate" for transformers' own loop, which reuses nothing.
    prefetch_share: of the full width of guesses, the share that the governor prefetches now (0: off); prefetch_why: its
        reason, or "trying". None and "" without a governor.
    prompt_tokens_reused: prompt tokens that were not computed again. prompt_cache_bytes: kept for later prompts.
    verify_steps: steps that verified drafted tokens, of which `accepted` were the answer's. draft_length: tokens that
        the governor lets draft now; None without a draft.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    ttft_s: float | None
    tpot_s: float | None
    total_s: float
    stats: EngineStats
    expert_bytes: int
    peak_rss_bytes: int
    loop: str
    prompt_tokens_reused: int
    prompt_cache_bytes: int
    prefetch_share: float | None
    prefetch_why: str
    drafted: int = 0
    accepted: int = 0
    verify_steps: int = 0
    draft_length: int | None = None

    def figures(self) -> dict[str, float | int | None]:
        """Every figure by a name with its unit; rates are 0 to 1, and None where nothing was measured.

        Hits, loads, bytes and stalls are those of the tokens after the first: a forward pass each, or for several of
        them where some were drafted; what was drafted and not accepted is in them. Prefetched bytes are used
        (demanded), wasted (evicted before), or, for the rest, resident and unused so far.
        """
        decode, prefill, mb = self.stats.answers, self.stats.prefill, self.expert_bytes / 1e6
        tokens = self.stats.decode.tokens + self.verify_steps + self.accepted
        demanded = decode.hits + decode.late_hits + decode.misses + decode.substituted
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_reused": self.prompt_tokens_reused,
            "prompt_cache_bytes": self.prompt_cache_bytes,
            "new_tokens": len(self.token_ids),
            "total_s": self.total_s,
            "ttft_s": self.ttft_s,
            "tpot_ms": None if self.tpot_s is None else self.tpot_s * 1e3,
            "tokens_per_s": _ratio(1, self.tpot_s),
            "prefill_tokens_per_s": _ratio(self.prompt_tokens - self.prompt_tokens_reused, self.ttft_s),
            "prefill_read_mb": prefill.demand_bytes / 1e6,
            "hits": decode.hits,
            "late_hits": decode.late_hits,
            "misses": decode.misses,
            "hit_rate": _ratio(decode.hits, demanded),
            "late_hit_rate": _ratio(decode.late_hits, demanded),
            "miss_rate": _ratio(decode.misses, demanded),
            "substituted": decode.substituted,
            "substituted_rate": _ratio(decode.substituted, demanded),
            "stalled_layer_rate": _ratio(decode.stalled_layers, decode.layers),
            "deferred_mb_per_token": _ratio(decode.deferred_bytes / 1e6, tokens),
            "demand_mb_per_token": _ratio(decode.demand_bytes / 1e6, tokens),
            "prefetch_mb_per_token": _ratio(decode.prefetch_bytes / 1e6, tokens),
            "prefetch_used_mb_per_token": _ratio(decode.prefetch_used * mb, tokens),
            "prefetch_wasted_mb_per_token": _ratio(decode.prefetch_wasted * mb, tokens),
            "stall_ms_per_token": _ratio(decode.stall_s * 1e3, tokens),
            "prefill_stall_s": prefill.stall_s,
            "prefill_prefetch_mb": prefill.prefetch_bytes / 1e6,
            "evictions": self.stats.evictions,
            "prefetch_loads": decode.prefetch_loads,
            "prefetch_used": decode.prefetch_used,
            "prefetch_wasted": decode.prefetch_wasted,
            "prefetch_share": self.prefetch_share,
            "steps_without_prefetch": decode.steps_without_prefetch,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "verify_steps": self.verify_steps,
            "acceptance_rate": _ratio(self.accepted, self.drafted),
            "tokens_per_step": _ratio(tokens, decode.steps),
            "draft_length": self.draft_length,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def generate(
    model: OffloadedModel,
    tokenizer: Any,
    prompt_ids: torch.Tensor,
    *,
    on_text: Callable[[str], None] = lambda piece: None,
    should_stop: Callable[[], bool] | None = None,
    max_new_tokens: int = 128,
    reuse: PromptCache | None = None,
    prefill_chunk: int | None = None,
    draft: str | Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> GenerationReport:
    """Generate one answer with a model of `foreroute.load`.

    Args:
        prompt_ids: [1, tokens] int64; see `model.text.encode_prompt`.
        on_text: called with each piece of text, whole characters only, as soon as it is complete.
        should_stop: called after every token; True ends the answer.
        max_new_tokens: fewer if the model's context ends before.
        reuse: KV caches of earlier prompts; the longest shared beginning is not computed again, and this answer's
            cache is kept there. Bits are those of the same tokens computed in the same chunks.
        prefill_chunk: most prompt tokens computed at once; the model's own (EngineConfig) when None.
        draft: drafts tokens that the model verifies, so that the answer is the same and comes sooner: "prompt-lookup",
            or the path or hub id of a small model with the same tokenizer, which is loaded once. None: EngineConfig's.
        options: transformers' own (do_sample, temperature, top_p, top_k, repetition_penalty, ...). Stop strings
            (stop_strings, or else the model's own) are not part of the text.
    Returns:
        The report. Ctrl-C ends the answer too, at once: finish_reason is then "interrupted", the model stays usable.
        Waits while another thread uses the model; that time does not count as the answer's.
    Raises:
        PromptError: the prompt is empty or leaves no room in the context. RefusedError: not a model of `load`; or a
        draft for what only transformers' own loop does. PolicyError, CheckpointError: no draft, see drafting/draft.py.
        ReadError, ChecksumError: an expert could not be read.
    """
    handle = handle_of(model)
    prompt_ids = prompt_ids.to(model.device)
    room = _room_in_context(model, prompt_ids.shape[1])
    if prefill_chunk is not None and prefill_chunk < 2:
        raise PromptError(f"prefill_chunk is {prefill_chunk}: choose 8 tokens or more (512 to 8192 are usual).")
    most_new = max_new_tokens if room is None else min(max_new_tokens, room)
    stop = _stop_strings(model, options)
    with handle.lock:
        chunk = prefill_chunk or handle.plan.prefill_chunk
        answer = _Answer(model, prompt_ids, options, reuse, chunk, draft_for(model, draft))
        return _timed(answer, TokenRecorder(tokenizer, on_text, clock, stop), clock, should_stop, most_new)


def _timed(
    answer: "_Answer",
    recorder: TokenRecorder,
    clock: Callable[[], float],
    should_stop: Callable[[], bool] | None,
    most_new: int,
) -> GenerationReport:
    """Run the answer, and report on it."""
    model, reuse, handle = answer.model, answer.reuse, answer.model.foreroute
    before, started_s = handle.stats(), clock()
    is_interrupted = False
    try:
        answer.run(recorder, should_stop, most_new)
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        answer.keep(recorder.ids)
    ended_s = clock()
    # Ctrl-C may fall between the two.
    times_s = recorder.times_s[: len(recorder.ids)]
    governor = handle.governor if model.foreroute.is_exact else None
    steps = None if answer.loop is None else answer.loop.steps
    return GenerationReport(
        text="".join(recorder.written),
        token_ids=tuple(recorder.ids),
        prompt_tokens=answer.prompt_ids.shape[1],
        finish_reason="interrupted" if is_interrupted else _finish_reason(answer, recorder, most_new),
        ttft_s=times_s[0] - started_s if times_s else None,
        tpot_s=(times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else None,
        total_s=ended_s - started_s,
        stats=handle.stats().minus(before),
        expert_bytes=handle.plan.expert_bytes,
        peak_rss_bytes=peak_resident_bytes(),
        loop="generate" if answer.loop is None else "lean",
        prompt_tokens_reused=answer.num_reused,
        prompt_cache_bytes=0 if reuse is None else reuse.nbytes,
        prefetch_share=None if governor is None else governor.chosen,
        prefetch_why="" if governor is None else "trying" if governor.is_trying else governor.why,
        drafted=0 if steps is None else steps.drafted,
        accepted=0 if steps is None else steps.accepted,
        verify_steps=0 if steps is None else steps.verify_steps,
        draft_length=answer.draft_length,
    )


class _Answer:
    """One answer's loop, cache and chunks, and what is kept of them.

    Attributes:
        loop: ours, once it runs; None for transformers' own.
        num_reused: prompt tokens whose keys and values are reused.
    """

    def __init__(
        self,
        model: OffloadedModel,
        prompt_ids: torch.Tensor,
        options: dict[str, Any],
        reuse: PromptCache | None,
        chunk: int,
        draft: GovernedDraft | None = None,
    ) -> None:
        self.model = model
        self.prompt_ids = prompt_ids
        self.options = options
        self.reuse = reuse
        self.loop: LeanLoop | None = None
        self.num_reused = 0
        cache = new_cache(model)
        self._is_lean = serves(model, cache, options)
        self._can_continue = cache is not None and is_ordinary(model) and can_be_continued(model, cache)
        self._chunk = chunk if self._can_continue else None
        self._cache: DynamicCache | None = cache if self._is_lean else None
        # A substitute changes all later keys and values: after one, the answer's are not those of an exact prompt.
        self._is_exact = model.foreroute.is_exact
        # A decoder has its own cache, which is not kept.
        self._keeps = not is_paged(model)
        self._draft = draft
        if draft is not None and (not self._is_lean or len(prompt_ids) != 1):
            raise RefusedError(
                "A draft is for one row whose tokens are sampled or the likeliest: not beside beams, several prompts "
                "or settings of transformers' own loop. Leave the draft out, or these "
                "(model.generate(assistant_model=...) is transformers' own)."
            )

    @property
    def draft_length(self) -> int | None:
        """Tokens that are drafted from now on; None without a draft."""
        return None if self._draft is None else self._draft.governor.chosen

    def run(self, recorder: TokenRecorder, should_stop: Callable[[], bool] | None, max_new_tokens: int) -> None:
        """Generate, and pass tokens to the recorder."""

        def is_over() -> bool:
            return recorder.is_over or (should_stop is not None and should_stop())

        told: dict[str, Any] = {
            "attention_mask": torch.ones_like(self.prompt_ids),
            "max_new_tokens": max_new_tokens,
            "num_beams": 1,
            "disable_compile": True,
            # The recorder looks for stop strings, as it has the text anyway.
            "stop_strings": None,
            **self.options,
        }
        if not self._is_lean:
            told["stopping_criteria"] = StoppingCriteriaList([*told.get("stopping_criteria", ()), StopWhen(is_over)])
            has_cache = told.get("use_cache") is not False
            if has_cache and self._chunk is not None and self.prompt_ids.shape[1] > self._chunk:
                told.setdefault("prefill_chunk_size", _without_a_single_one(self.prompt_ids.shape[1], self._chunk))
            self.model.generate(self.prompt_ids, streamer=recorder, **told)
            return
        if self.reuse is not None and self._can_continue and self._keeps:
            # Two tokens, not the last alone, for the bits of a chunk: a product of one row can be rounded otherwise.
            at_most = self.prompt_ids.shape[1] - 2
            cache, self.num_reused = self.reuse.take(self.model, self.prompt_ids[0].tolist(), at_most)
            self._cache = cache or self._cache
        decoder = decoder_of(self.model, self.prompt_ids.shape[1] + max_new_tokens)
        self.loop = LeanLoop(recorder.add, is_over, self._chunk, decoder, self._draft)
        self.model.generate(self.prompt_ids, **cache_argument(self._cache), custom_generate=self.loop, **told)
        recorder.end()

    def keep(self, new_ids: list[int]) -> None:
        """Keep the KV cache for later prompts; after an error or Ctrl-C, only what finished steps have added."""
        has_reuse = self.reuse is not None and self._keeps and self._can_continue
        if not has_reuse or self.reuse is None or self.loop is None or self._cache is None:
            return
        if self.loop.is_in_step and has_linear_states(self.model):
            return
        ids = self.prompt_ids[0].tolist()
        if self._is_exact and self.model.foreroute.is_exact:
            ids += new_ids
        self.reuse.keep(self.model, ids[: self.loop.num_computed], self._cache)


def _without_a_single_one(num_tokens: int, chunk: int) -> int:
    """Return a chunk length of at most `chunk` that leaves no single token over.

    transformers' own loop does not announce its steps: a single token would be taken for a decoded one.
    """
    while num_tokens % chunk == 1 and chunk > 2:
        chunk -= 1
    return chunk


def stream(
    model: OffloadedModel, tokenizer: Any, prompt_ids: torch.Tensor, **options: Any
) -> Generator[str, None, GenerationReport]:
    """Like `generate`, as an iterator over the pieces: `report = yield from stream(...)`.

    The model runs in another thread. Closing the iterator ends the answer after the current token, and waits for it.
    """
    pieces: SimpleQueue[str | None] = SimpleQueue()
    is_closed = threading.Event()
    outcome: list[GenerationReport | BaseException] = []

    def work() -> None:
        try:
            outcome.append(
                generate(model, tokenizer, prompt_ids, on_text=pieces.put, should_stop=is_closed.is_set, **options)
            )
        except BaseException as error:  # noqa: BLE001  raised again in the thread that asked
            outcome.append(error)
        finally:
            pieces.put(None)

    worker = threading.Thread(target=work, name="foreroute-generate", daemon=True)
    worker.start()
    try:
        while (piece := pieces.get()) is not None:
            yield piece
    finally:
        is_closed.set()
        worker.join()
    (result,) = outcome
    if isinstance(result, BaseException):
        raise result
    return result


def _room_in_context(model: OffloadedModel, prompt_tokens: int) -> int | None:
    """Number of tokens that still fit the model's context; None if its length is not known.

    An encoder-decoder's answer does not follow its prompt: each has the context for itself, and starts with one token.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not context:
        return None
    if prompt_tokens >= context:
        raise PromptError(f"The prompt has {prompt_tokens} tokens; the model's context holds {context}. Shorten it.")
    return int(context) - (1 if model.config.is_encoder_decoder else prompt_tokens)


def _stop_strings(model: OffloadedModel, options: dict[str, Any]) -> tuple[str, ...]:
    """Remove stop strings from the options, and return them, or else the model's own."""
    asked = options.pop("stop_strings", None)
    given = options.get("generation_config")
    if asked is not None:
        return (asked,) if isinstance(asked, str) else tuple(asked)
    return (() if given is None else stop_strings(given)) or stop_strings(model.generation_config)


def _finish_reason(answer: _Answer, recorder: TokenRecorder, most_new: int) -> str:
    """Why an answer ended that was not interrupted; "stopped": by should_stop, or by a criterion of the caller."""
    ids = recorder.ids
    eos = answer.options.get("eos_token_id", answer.model.generation_config.eos_token_id)
    ends = eos if isinstance(eos, list) else [eos]
    if recorder.is_over or (ids and ids[-1] in ends):
        return "stop"
    return "length" if len(ids) >= most_new else "stopped"
