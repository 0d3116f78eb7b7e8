"""What serving takes of the RAM beside the experts, and whether all of it fits: said so that the user can act on it.

Keys and values are counted in tokens of all rows together; `kv_bytes_per_token` turns them into bytes.
"""

from dataclasses import dataclass
from math import ceil

from foreroute.errors import BudgetError
from foreroute.units import format_memory

# Scores want the logits of every position of a prompt, [tokens, vocabulary]: no more at once.
SCORED_AT_ONCE = 512
# Of a model that computes a prompt at once, no longer one is scored.
MOST_SCORED_WHOLE = 2048
# Tokens that each of several requests has room for, where the context is longer.
_USUAL_TOKENS = 4096
_MOST_KEPT_BYTES = 2**30
# Of what comes after the model: the tokenizer, oneDNN's kernels, buffers of requests. An estimate: on a small model
# it was 100 MiB.
_LATER_BYTES = 256 * 2**20
_LEAST_TOKENS = 16
# Left free when the budget is chosen: activations, Python itself, other programs; and keys and values where no memory
# is kept for them by --kv-tokens.
CHOSEN_RESERVE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class ServingNeeds:
    """What a server takes of the RAM; all in bytes but for kv_tokens.

    dense_bytes: weights that are no experts. expert_bytes: all slots. kv_tokens: of all rows together.
    working_bytes: everything else that does not go with kv_tokens. keeps_prompts: whether keys and values of earlier
    prompts are kept. working_bytes_per_token: what computing takes for each of kv_tokens, beside keys and values.
    """

    dense_bytes: int
    expert_bytes: int
    kv_tokens: int
    kv_bytes_per_token: int
    working_bytes: int
    keeps_prompts: bool = True
    working_bytes_per_token: int = 0

    @property
    def kv_bytes(self) -> int:
        """Keys and values of the requests that are computed."""
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def kept_bytes(self) -> int:
        """Keys and values of earlier prompts."""
        return kept_prompt_bytes(self.kv_bytes) if self.keeps_prompts else 0

    @property
    def all_working_bytes(self) -> int:
        """Everything beside weights, keys and values."""
        return self.working_bytes + self.kv_tokens * self.working_bytes_per_token

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.dense_bytes + self.expert_bytes + self.kv_bytes + self.kept_bytes + self.all_working_bytes

    @property
    def tokens_bytes(self) -> int:
        """What goes with kv_tokens."""
        return self.total_bytes - self.dense_bytes - self.expert_bytes - self.working_bytes


def choose_kv_tokens(asked: int | None, context: int, rows: int) -> int:
    """Tokens of keys and values: what was asked for, or for each row the context or 4096, and for one row the context.

    Args:
        asked: as --kv-tokens. context: tokens of one request. rows: requests computed at once.
    Raises:
        BudgetError: one request alone could not have its context.
    """
    if asked is None:
        return max(context, rows * min(context, _USUAL_TOKENS))
    if context > asked:
        raise BudgetError(
            f"A request may have {context} tokens (--ctx-size, or the model's own context), and --kv-tokens {asked} "
            f"has room for {asked} of all requests together. Give --ctx-size {asked}, or --kv-tokens {context}."
        )
    return asked


def kept_prompt_bytes(kv_bytes: int) -> int:
    """The most that is kept of earlier prompts, beside the keys and values of those that are computed."""
    return min(_MOST_KEPT_BYTES, kv_bytes)


def activation_bytes(tokens: int, hidden: int, itemsize: int) -> int:
    """Of so many prompt tokens computed at once. An estimate."""
    return 16 * hidden * tokens * itemsize


def logit_bytes(tokens: int, vocabulary: int, itemsize: int) -> int:
    """Of so many prompt tokens scored at once."""
    return vocabulary * tokens * itemsize


def moving_bytes(kv_bytes_per_token: int, num_layers: int) -> int:
    """For each token of keys and values: one layer's are there twice while rows move."""
    return ceil(kv_bytes_per_token / num_layers)


def working_bytes(request_bytes: int, learning_bytes: int) -> int:
    """What will be taken beside weights, experts, keys and values, before anything of it is there. An estimate."""
    return request_bytes + learning_bytes + _LATER_BYTES


def check_serving(needs: ServingNeeds, available_bytes: int, least_expert_bytes: int) -> None:
    """See that everything fits the RAM that is free.

    Args:
        least_expert_bytes: of one token's experts.
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
    """Every single step that is enough, or both together; where they are not, that."""
    experts_fit = available_bytes - (needs.total_bytes - needs.expert_bytes)
    left = available_bytes - needs.dense_bytes - needs.working_bytes
    tokens_fit = _tokens_within(left - needs.expert_bytes, needs)
    least_fit = _tokens_within(left - least_expert_bytes, needs)
    ways = []
    if experts_fit >= least_expert_bytes:
        ways.append(f"--memory to {experts_fit // 2**20}MiB")
    if tokens_fit >= _LEAST_TOKENS:
        ways.append(f"--kv-tokens to {tokens_fit} (with --ctx-size; --max-num-seqs lowers it too)")
    if not ways and least_fit >= _LEAST_TOKENS:
        ways.append(f"--memory, and --kv-tokens below {least_fit} (with --ctx-size)")
    return f"Lower {', or '.join(ways)}." if ways else "This model needs more RAM: close other programs."


def _tokens_within(room_bytes: int, needs: ServingNeeds) -> int:
    """Tokens that take at most so much: keys and values, as much again for earlier prompts, working memory."""
    if room_bytes <= 0 or needs.kv_bytes_per_token == 0:
        return 0
    each = needs.kv_bytes_per_token + needs.working_bytes_per_token
    tokens = room_bytes // each
    if needs.keeps_prompts:
        tokens = max(room_bytes // (each + needs.kv_bytes_per_token), (room_bytes - _MOST_KEPT_BYTES) // each)
    return min(tokens, needs.kv_tokens)
