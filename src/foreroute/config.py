"""What was asked for (EngineConfig) and what was decided (Plan). Both frozen; unknown names fail by construction.

Command-line flags are made from the fields of EngineConfig: a field is declared here, once, with its help.
"""

from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any, get_args, get_type_hints

from foreroute.errors import ForerouteError
from foreroute.types import QUANTISED_TYPES
from foreroute.units import kept_bytes

# Reads up to this size take mostly latency, so that two at once take little longer than one.
_SMALL_EXPERT_BYTES = 2**19
# Fields whose text may be a path.
_PATHS = ("predictor", "packed", "trace", "prefix_cache_dir", "draft")


def _option(default: Any, help_text: str, choices: tuple[str, ...] = (), *, is_ablation: bool = False) -> Any:
    """Make a field with its flag's help; ablation switches are shown by --help-all only."""
    return field(default=default, metadata={"help": help_text, "choices": choices, "is_ablation": is_ablation})


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Check that a field has a value of its type; a path is accepted for its text."""
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        fits = bool in kinds
    else:
        fits = isinstance(value, kinds) or (name in _PATHS and isinstance(value, PathLike))
    if not fits:
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ForerouteError(f"{name}={value!r:.60} is a {type(value).__name__}; it must be {wanted}.")


@dataclass(frozen=True)
class EngineConfig:
    """How experts are kept, read and prefetched. Every default is the fast and exact choice.

    The ablation switches exist so that what each part is worth can be measured: cache off is on-demand loading,
    prefetch none is a cache alone, and so on up the ladder.
    """

    memory: int | str | None = _option(
        None,
        'memory budget for experts: "8GiB" (or "8G": 2**30 bytes a G; "8GB": 10**9), or "25%%" of the expert bytes; '
        "chosen from free RAM if omitted",
    )
    eviction: str = _option(
        "lfu",
        "which expert is evicted when the pool is full: the least frequently used or the least recently used",
        ("lfu", "lru"),
        is_ablation=True,
    )
    prefetch: str = _option(
        "lookahead",
        "where prefetches come from: the next layer's router run early (or fitted predictors), or none",
        ("lookahead", "none"),
        is_ablation=True,
    )
    predictor: str = _option(
        "auto",
        'fitted predictors (see fit): "auto" uses those beside the checkpoint, "no" uses the lookahead, or give a path',
    )
    prefetch_prefill: str = _option(
        "auto",
        "prefetch in prefill too, so that reads for the next layer overlap this one's compute: auto for long prompts "
        "only, where it pays",
        ("auto", "on", "off"),
        is_ablation=True,
    )
    prefill_chunk: int = _option(
        2048,
        "prompt tokens computed at once: a smaller chunk takes less memory, a larger one reads each expert less often "
        "(once per chunk)",
    )
    policy: str = _option(
        "exact",
        "how decoding treats expert misses: exact (wait for every expert), tolerance:TAU (substitute default vectors "
        "for at most that gate mass), speculative (substitute for every miss after the first layer), paper (use the "
        "predicted experts in place of the router's); see docs/policies.md",
    )
    deterministic: bool = _option(
        False,
        "let reads complete in logical time, so that the output of a policy other than exact is repeatable; for "
        "evaluations, slower",
        is_ablation=True,
    )
    prefetch_width: int | None = _option(
        None, "experts prefetched per token and layer; the model's top-k if omitted", is_ablation=True
    )
    governor: bool = _option(
        True,
        "widen, narrow or switch off prefetch by its measured gain; off prefetches at full width always",
        is_ablation=True,
    )
    cache: bool = _option(
        True, "keep experts resident across tokens; off loads each one every time it is routed to", is_ablation=True
    )
    hits_first: bool = _option(True, "compute resident experts while the missing ones load", is_ablation=True)
    reader_threads: int | None = _option(
        None,
        "threads that read experts; if omitted one, which nearly saturates a disk, and two for small experts",
        is_ablation=True,
    )
    direct_io: bool = _option(True, "read with O_DIRECT where the file system allows it", is_ablation=True)
    math: str = _option(
        "auto",
        "how weights stored in blocks (GGUF, pack --quant) are multiplied: as they lie, by ggml's kernels, or "
        "dequantised by torch, bit for bit as transformers; auto is ggml where it can be had",
        ("auto", "ggml", "torch"),
    )
    dense: str = _option(
        "stored",
        "quantise the dense weights of safetensors when they are loaded, for ggml's kernels: q8_0 makes them half as "
        "large as bfloat16 does (pack --dense does so once). The output changes (foreroute eval says how much); stored "
        "keeps them. One of "
        f"stored, {', '.join(kind.lower() for kind in QUANTISED_TYPES)}",
        ("stored", *(kind.lower() for kind in QUANTISED_TYPES)),
    )
    trace: str | None = _option(
        None,
        "write events to a file: .jsonl for foreroute replay, .json for Perfetto; see docs/trace.md",
    )
    device: str = _option(
        "cpu",
        "where the model is computed: cpu (experts on disk), or cuda (experts in pinned host memory; docs/gpu.md)",
        ("cpu", "cuda"),
    )
    control: str = _option(
        "host",
        "with --device cuda, who requests experts: the host, layer by layer, or the device itself within its graph",
        ("host", "device"),
        is_ablation=True,
    )
    host_memory: int | str | None = _option(
        None,
        'with --device cuda, host memory for experts that are not on the GPU: "48GiB", bytes, or "50%%"; the others '
        "stay on disk. All of them if omitted",
    )
    kv_tokens: int | None = _option(
        None,
        "tokens of KV cache, over all requests, to reserve memory for beside the experts; if omitted: serve reserves "
        "the context or 4096 for each request, and at least one whole context; elsewhere --device cuda reserves 4096",
    )
    prefix_cache: int | str | None = _option(
        None,
        'memory for the beginnings of earlier prompts, which are not computed again: "4GiB" or bytes, 0 for none; if '
        "omitted, serve takes as much as its KV cache has, 2 GiB at most",
    )
    prefix_cache_dir: str | None = _option(
        None,
        "with serve, a folder where these beginnings are kept when it stops, for its next start; bounded as "
        "--prefix-cache is",
    )
    packed: str = _option(
        "auto",
        'the packed store: "auto" uses the one beside the checkpoint, "no" ignores it; "q8_0", "q4_k" and so on use a '
        'quantised one there, "q4_k-dense-q8_0" or "dense-q8_0" one with quantised dense weights; or give a path',
    )

    draft: str | None = _option(
        None,
        'draft tokens that the model verifies several at once, for the same text sooner: "prompt-lookup" finds them in '
        "the text itself; or the folder or hub id of a small model with the same tokenizer. How many is measured",
    )

    def __post_init__(self) -> None:
        # A torch.device, known by its text, as this module imports no torch.
        if str(self.device) in ("cpu", "cpu:0", "cuda"):
            object.__setattr__(self, "device", str(self.device).partition(":")[0])
        hints = get_type_hints(type(self))
        for option in fields(self):
            _check_type(option.name, getattr(self, option.name), hints[option.name])
            choices = option.metadata["choices"]
            if choices and getattr(self, option.name) not in choices:
                raise ForerouteError(
                    f"{option.name}={getattr(self, option.name)!r} is not known. Choose one of {', '.join(choices)}."
                )
        if self.prefetch_width is not None and self.prefetch_width < 1:
            raise ForerouteError(
                f"prefetch_width is {self.prefetch_width}; it must be at least 1. prefetch=none is off."
            )
        if self.prefill_chunk < 8:
            raise ForerouteError(
                f"prefill_chunk is {self.prefill_chunk}; choose 8 tokens or more (512 to 8192 are usual)."
            )
        if self.kv_tokens is not None and self.kv_tokens < 16:
            raise ForerouteError(f"kv_tokens is {self.kv_tokens}; choose 16 tokens or more.")
        kept_bytes(self.prefix_cache)
        if self.reader_threads is not None and not 1 <= self.reader_threads <= 16:
            raise ForerouteError(f"reader_threads is {self.reader_threads}; choose 1 to 16 (1 or 2 are enough).")

    def readers(self, slot_bytes: int) -> int:
        """Number of threads that read experts of `slot_bytes`: as asked, else two for small ones and one for large."""
        return self.reader_threads or (2 if slot_bytes <= _SMALL_EXPERT_BYTES else 1)


@dataclass(frozen=True)
class Plan:
    """What `load` decided, all sizes in bytes.

    num_slots slots of slot_bytes hold experts; where layers' experts differ in size, slot_bytes is the longest, and
    slot_classes says (bytes of a slot, number of slots) by length. total_slots would hold them all, in all_slot_bytes;
    token_demand_slots is what one token uses, in token_slot_bytes. expert_bytes are stored of an expert that a token
    uses, on average. staging_slots: the most that prefetched experts take before they are used. source: where experts
    are read from. host_records: experts in host memory behind the slots; 0: only the disk is behind them. Memory is
    reserved for kv_tokens of KV cache; kv_bytes_per_token is None where it was not measured. prefix_cache is None
    where the memory for earlier prompts was not asked for; identity is what their files are held to, "" without
    such files. math is "ggml", torch's ("own"), or the "family"'s own forward; math_note: why not ggml's, where it
    might be. threads are torch's, of which usable_cpus can run at once (a container may limit them). layout:
    "interleaved" where a packed store has eight rows of its matrices side by side. dense: the type to which dense
    weights were quantised, by `pack` or at load; else "stored". draft: what drafts tokens, "" for nothing; draft_bytes:
    its weights in memory; draft_bytes_per_token: of each token in its own cache. num_parameters: numbers in all
    weights, experts too, of which num_embeddings are in embedding tables.
    """

    folder: str
    model_type: str
    num_layers: int
    num_experts: int
    top_k: tuple[int, ...]
    expert_bytes: int
    total_expert_bytes: int
    dense_bytes: int
    memory_bytes: int
    memory_was_chosen: bool
    slot_classes: tuple[tuple[int, int], ...]
    slot_bytes: int
    num_slots: int
    token_slot_bytes: int
    all_slot_bytes: int
    total_slots: int
    token_demand_slots: int
    staging_slots: int
    source: str
    stored_dtype: str
    compute_dtype: str
    predictor: str
    math: str
    prefill_chunk: int
    device: str = "cpu"
    host_records: int = 0
    kv_tokens: int = 0
    kv_bytes_per_token: int | None = None
    prefix_cache: int | None = None
    identity: str = ""
    threads: int = 1
    usable_cpus: int = 1
    math_note: str = ""
    layout: str = "plain"
    dense: str = "stored"
    draft: str = ""
    draft_bytes: int = 0
    draft_bytes_per_token: int = 0
    num_parameters: int = 0
    num_embeddings: int = 0

    @property
    def token_demand_bytes(self) -> int:
        """Stored bytes of the distinct experts that one token uses."""
        return self.token_demand_slots * self.expert_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of all slots of the pool."""
        return sum(slot_bytes * num_slots for slot_bytes, num_slots in self.slot_classes)

    @property
    def resident_share(self) -> float:
        """Share of the experts that the pool holds, 0 to 1."""
        return self.num_slots / self.total_slots
