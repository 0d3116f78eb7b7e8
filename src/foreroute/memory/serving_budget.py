"""Compute the RAM that serving needs beside experts, and check that all fits, with errors that say what to change.

The KV cache is counted in tokens of all rows together; `kv_bytes_per_token` turns them into bytes.
"""

from dataclasses import dataclass, replace
from math import ceil

from foreroute.errors import BudgetError
from foreroute.units import format_memory

# The most positions scored at once: scoring needs logits of every position of a prompt, [tokens, vocabulary].
SCORED_AT_ONCE = 512
# The longest prompt that is scored where a model computes prompts in one step.
MOST_SCORED_WHOLE = 2048
# Tokens per row when several rows share the cache and the context is longer.
_USUAL_TOKENS = 4096
# Of earlier prompts, where nothing else is asked for: 20,000 tokens of a model of 30 billion parameters.
_MOST_KEPT_BYTES = 2 * 2**30
# Rows whose states of linear attention memory is left for: as many as serve computes at once unless told otherwise.
ROWS_WITH_STATES = 8
# States kept of earlier prompts, where nothing else is asked for.
_KEPT_STATES = 16
# Allocated after the model is loaded: the tokenizer, oneDNN's kernels, request buffers. An estimate: 100 MiB on a
# small model.
_LATER_BYTES = 256 * 2**20
_LEAST_TOKENS = 16
# Left free when the budget is chosen automatically: activations, Python, other programs; and the KV cache without
# --kv-tokens.
CHOSEN_RESERVE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class ServingNeeds:
    """RAM that a server needs; all in bytes except kv_tokens.

    dense_bytes: the dense part. expert_bytes: all slots. kv_tokens: of all rows together.
    working_bytes: the rest that does not grow with kv_tokens. keeps_prompts: whether the KV caches of earlier prompts
    are kept. working_bytes_per_token: computing per token of kv_tokens, beside its KV cache. prefix_cache: bytes for
    earlier prompts as asked (--prefix-cache); None: chosen by the KV cache. state_bytes: of a row's states that do not
    grow, 0 without linear attention, convolutions and Mamba.
    """

    dense_bytes: int
    expert_bytes: int
    kv_tokens: int
    kv_bytes_per_token: int
    working_bytes: int
    keeps_prompts: bool = True
    working_bytes_per_token: int = 0
    prefix_cache: int | None = None
    state_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        """KV cache of the running requests."""
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def kept_bytes(self) -> int:
        """KV cache of earlier prompts."""
        return kept_prompt_bytes(self.kv_bytes, self.prefix_cache, self.state_bytes) if self.keeps_prompts else 0

    @property
    def all_working_bytes(self) -> int:
        """Everything except weights and KV cache."""
        return self.working_bytes + self.kv_tokens * self.working_bytes_per_token

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.dense_bytes + self.expert_bytes + self.kv_bytes + self.kept_bytes + self.all_working_bytes

    @property
    def tokens_bytes(self) -> int:
        """Everything that grows with kv_tokens."""
        return self.total_bytes - self.dense_bytes - self.expert_bytes - self.working_bytes


def choose_kv_tokens(asked: int | None, context: int, rows: int) -> int:
    """Choose the tokens of KV cache: as asked, or per row the context or 4096, at least one row's whole context.

    Args:
        asked: as --kv-tokens. context: tokens of one request. rows: requests computed at once.
    Raises:
        BudgetError: it cannot hold the context of one request.
    """
    if asked is None:
        return max(context, rows * min(context, _USUAL_TOKENS))
    if context > asked:
        raise BudgetError(
            f"A request may have {context} tokens (--ctx-size, or the model's own context), and --kv-tokens {asked} "
            f"has room for {asked} of all requests together. Give --ctx-size {asked}, or --kv-tokens {context}."
        )
    return asked


def kept_prompt_bytes(kv_bytes: int, asked: int | None = None, state_bytes: int = 0) -> int:
    """The most bytes kept of earlier prompts: as `asked`, or as running requests have (`kv_bytes`), 2 GiB at most.

    state_bytes: of the states after some token, several of which are kept beside that.
    """
    return min(_MOST_KEPT_BYTES, kv_bytes + _KEPT_STATES * state_bytes) if asked is None else asked


def activation_bytes(tokens: int, hidden: int, itemsize: int) -> int:
    """Activations of `tokens` prompt tokens in one step, `hidden` wide, `itemsize` bytes each number. An estimate."""
    return 16 * hidden * tokens * itemsize


def attention_bytes(
    kind: str, tokens: int, context: int, heads: int, head_size: int, itemsize: int, block_bytes: int
) -> int:
    """Attention of `tokens` prompt tokens, in one step, to `context` ones: beside keys and values. An estimate.

    Args:
        kind: as model.decode.attention.PromptAttention. block_bytes: products of a block at most.
    """
    whole = heads * head_size * itemsize
    # Queries, outputs, and copies of both; keys and values for each head.
    own, repeated = 8 * tokens * whole, 2 * context * whole
    if kind == "joined":
        return own
    if kind == "blocks":
        return own + repeated + block_bytes
    if kind == "written":
        return own + repeated + 3 * heads * tokens * context * itemsize
    return own + repeated + tokens * context * (1 + itemsize)


def logit_bytes(tokens: int, vocabulary: int, itemsize: int) -> int:
    """Logits of `tokens` prompt tokens scored at once: `vocabulary` numbers of `itemsize` bytes each."""
    return vocabulary * tokens * itemsize


def moving_bytes(kv_bytes_per_token: int, num_layers: int) -> int:
    """Extra bytes per token while rows move: one of `num_layers` layers' share of `kv_bytes_per_token` exists twice."""
    return ceil(kv_bytes_per_token / num_layers)


def working_bytes(request_bytes: int) -> int:
    """Bytes to allocate beside weights and KV cache: `request_bytes` and libraries. An estimate."""
    return request_bytes + _LATER_BYTES


def check_serving(needs: ServingNeeds, available_bytes: int, least_expert_bytes: int) -> None:
    """Check that everything fits in the free RAM, `available_bytes`.

    Args:
        needs: of the server. least_expert_bytes: of one token's experts.
    Raises:
        BudgetError: it does not; names what to lower, and how far.
    """
    if needs.total_bytes <= available_bytes:
        return
    raise BudgetError(
        f"This takes {format_memory(needs.total_bytes, round_up=True)} of RAM, and {format_memory(available_bytes)} "
        f"are free: experts {format_memory(needs.expert_bytes)}, dense weights {format_memory(needs.dense_bytes)}, KV "
        f"cache {format_memory(needs.kv_bytes)} ({needs.kv_tokens} tokens), earlier prompts "
        f"{format_memory(needs.kept_bytes)}, the rest {format_memory(needs.all_working_bytes)}. "
        + _advice(needs, available_bytes, least_expert_bytes)
    )


def _advice(needs: ServingNeeds, available_bytes: int, least_expert_bytes: int) -> str:
    """Name every single change that is enough; else both together, or that even those are not."""
    experts_fit = available_bytes - (needs.total_bytes - needs.expert_bytes)
    left = available_bytes - needs.dense_bytes - needs.working_bytes
    tokens_fit = _tokens_within(left - needs.expert_bytes, needs)
    least_fit = _tokens_within(left - least_expert_bytes, needs)
    prefix_fit = available_bytes - (needs.total_bytes - needs.kept_bytes)
    ways = []
    if experts_fit >= least_expert_bytes:
        ways.append(f"--memory to {experts_fit // 2**20}MiB")
    if tokens_fit >= _LEAST_TOKENS:
        ways.append(f"--kv-tokens to {tokens_fit} (with --ctx-size; --max-num-seqs lowers it too)")
    if needs.kept_bytes and prefix_fit >= 0:
        ways.append(f"--prefix-cache to {prefix_fit // 2**20}MiB" if prefix_fit >= 2**20 else "--prefix-cache to 0")
    if not ways and least_fit >= _LEAST_TOKENS:
        ways.append(f"--memory, and --kv-tokens below {least_fit} (with --ctx-size)")
    return f"Lower {', or '.join(ways)}." if ways else "This model needs more RAM: close other programs."


def _tokens_within(room_bytes: int, needs: ServingNeeds) -> int:
    """Tokens whose KV cache, what is kept of earlier prompts, and working memory fit in `room_bytes`."""
    if needs.keeps_prompts and needs.prefix_cache is not None:
        return _tokens_within(room_bytes - needs.prefix_cache, replace(needs, keeps_prompts=False))
    if room_bytes <= 0 or needs.kv_bytes_per_token == 0:
        return 0
    each = needs.kv_bytes_per_token + needs.working_bytes_per_token
    tokens = room_bytes // each
    if needs.keeps_prompts:
        beside = room_bytes - _KEPT_STATES * needs.state_bytes
        tokens = max(beside // (each + needs.kv_bytes_per_token), (room_bytes - _MOST_KEPT_BYTES) // each)
    return min(tokens, needs.kv_tokens)
