"""Timed generation of one answer: text as it comes, and afterwards the figures.

`generate` calls back with each piece and runs in the caller's thread, so that Ctrl-C stops it at once; `stream` gives
the pieces to iterate over and runs in a thread of its own. Decoding itself is transformers' generate().
"""

import resource
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from foreroute.engine.stats import EngineStats
from foreroute.engine.text import TextPieces
from foreroute.errors import PromptError


@dataclass(frozen=True)
class GenerationReport:
    """One answer and what it took.

    token_ids: the new tokens, as the model chose them; `text` is what they say, without a half character at the end.
    finish_reason: "stop" (the model ended), "length", "stopped" (should_stop) or "interrupted" (Ctrl-C).
    ttft_s: from the start of generate() to the first token. tpot_s: (last - first) / (n - 1). None: too few tokens.
    stats: the engine's counts of this answer alone. expert_bytes: stored bytes of one expert.
    peak_rss_bytes: of the process so far, loading included.
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

    def figures(self) -> dict[str, float | int | None]:
        """Every figure by a name with its unit; rates are 0 to 1, and None stands where nothing was measured.

        Hits, loads, bytes and stalls per token are those of decode: one forward pass per token after the first.
        Guessed bytes are used (demanded later), wasted (given up first), or, for the rest, still there undecided.
        """
        decode, prefill, mb = self.stats.decode, self.stats.prefill, self.expert_bytes / 1e6
        demanded = decode.hits + decode.late + decode.misses + decode.stood_in
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.token_ids),
            "total_s": self.total_s,
            "ttft_s": self.ttft_s,
            "tpot_ms": None if self.tpot_s is None else self.tpot_s * 1e3,
            "tokens_per_s": _ratio(1, self.tpot_s),
            "prefill_tokens_per_s": _ratio(self.prompt_tokens, self.ttft_s),
            "prefill_read_mb": prefill.demand_bytes / 1e6,
            "hits": decode.hits,
            "late_hits": decode.late,
            "misses": decode.misses,
            "hit_rate": _ratio(decode.hits, demanded),
            "late_hit_rate": _ratio(decode.late, demanded),
            "miss_rate": _ratio(decode.misses, demanded),
            "stood_in": decode.stood_in,
            "stood_in_rate": _ratio(decode.stood_in, demanded),
            "stalled_layer_rate": _ratio(decode.stalled_layers, decode.layers),
            "fill_mb_per_token": _ratio(decode.fill_bytes / 1e6, decode.tokens),
            "demand_mb_per_token": _ratio(decode.demand_bytes / 1e6, decode.tokens),
            "speculative_mb_per_token": _ratio(decode.prefetch_bytes / 1e6, decode.tokens),
            "speculative_used_mb_per_token": _ratio(decode.prefetch_used * mb, decode.tokens),
            "speculative_wasted_mb_per_token": _ratio(decode.prefetch_wasted * mb, decode.tokens),
            "stall_ms_per_token": _ratio(decode.stall_s * 1e3, decode.tokens),
            "prefill_stall_s": prefill.stall_s,
            "prefill_speculative_mb": prefill.prefetch_bytes / 1e6,
            "evictions": self.stats.evictions,
            "prefetch_loads": decode.prefetch_loads,
            "prefetch_used": decode.prefetch_used,
            "prefetch_wasted": decode.prefetch_wasted,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


class _Recorder(BaseStreamer):
    """What transformers calls with the prompt and then with every token: notes the time, hands the text on."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], clock: Callable[[], float]) -> None:
        self.ids: list[int] = []
        self.times_s: list[float] = []
        self.written: list[str] = []
        self._pieces = TextPieces(tokenizer)
        self._on_text = on_text
        self._clock = clock
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.times_s.append(self._clock())
        self.ids.append(int(value))
        self._write(self._pieces.push(self.ids[-1]))

    def end(self) -> None:
        self._write(self._pieces.finish())

    def _write(self, piece: str) -> None:
        if piece:
            self.written.append(piece)
            self._on_text(piece)


class _StopWhen(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self._should_stop(), dtype=torch.bool, device=input_ids.device)


def generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: torch.Tensor,
    *,
    on_text: Callable[[str], None] = lambda piece: None,
    should_stop: Callable[[], bool] | None = None,
    max_new_tokens: int = 128,
    clock: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> GenerationReport:
    """Generate one answer with a model of `foreroute.load`.

    Args:
        prompt_ids: [1, tokens] int64; see `engine.text.encode_prompt`.
        on_text: called with each piece of text, whole characters only, as soon as it is there.
        should_stop: asked after every token; True ends the answer.
        max_new_tokens: fewer where the model's context ends before.
        options: transformers' own (do_sample, temperature, top_p, top_k, repetition_penalty, ...).
    Returns:
        The report. Ctrl-C ends the answer too, at once: finish_reason is then "interrupted", the model stays usable.
    Raises:
        PromptError: the prompt is empty or leaves no room in the context.
        ReadError, ChecksumError: an expert could not be read.
    """
    room = _room_in_context(model, prompt_ids.shape[1])
    recorder = _Recorder(tokenizer, on_text, clock)
    criteria = StoppingCriteriaList([] if should_stop is None else [_StopWhen(should_stop)])
    before = model.foreroute.stats()
    started_s = clock()
    is_interrupted = False
    try:
        model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room),
            num_beams=1,
            streamer=recorder,
            stopping_criteria=criteria,
            disable_compile=True,
            **options,
        )
    except KeyboardInterrupt:
        is_interrupted = True
    ended_s = clock()
    # Ctrl-C may fall between the two.
    times_s = recorder.times_s[: len(recorder.ids)]
    return GenerationReport(
        text="".join(recorder.written),
        token_ids=tuple(recorder.ids),
        prompt_tokens=prompt_ids.shape[1],
        finish_reason="interrupted" if is_interrupted else _finish_reason(model, recorder.ids, should_stop),
        ttft_s=times_s[0] - started_s if times_s else None,
        tpot_s=(times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else None,
        total_s=ended_s - started_s,
        stats=model.foreroute.stats().minus(before),
        expert_bytes=model.foreroute.plan.expert_bytes,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def stream(
    model: Any, tokenizer: Any, prompt_ids: torch.Tensor, **options: Any
) -> Generator[str, None, GenerationReport]:
    """Like `generate`, as an iterator over the pieces: `report = yield from stream(...)`.

    The model runs in another thread: use it nowhere else meanwhile. Closing the iterator ends the answer after the
    token at hand, and waits for that.
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


def _room_in_context(model: Any, prompt_tokens: int) -> int | None:
    """Tokens that still fit the model's context; None where it has no known end."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not context:
        return None
    if prompt_tokens >= context:
        raise PromptError(f"The prompt has {prompt_tokens} tokens; the model's context holds {context}. Shorten it.")
    return int(context) - prompt_tokens


def _finish_reason(model: Any, ids: list[int], should_stop: Callable[[], bool] | None) -> str:
    eos = model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    if ids and ids[-1] in ends:
        return "stop"
    return "stopped" if should_stop is not None and should_stop() else "length"
