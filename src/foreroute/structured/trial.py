"""The process that tries a grammar before it is used: `python -m foreroute.structured.trial BYTES SECONDS`.

A grammar comes from a user. A chain of 20,000 references overflows the stack where it is compiled, and ends the
process; others take gigabytes. Here it is compiled for single bytes, within limits of memory and time and on a smaller
stack, and some steps of it are taken. The grammar comes in on standard input; a JSON object goes out:

    {} or {"error": ...}
"""

import json
import random
import sys
import threading
from typing import Any

from foreroute.system.limits import limit_memory, limit_processor_time

_END, _STEPS = 256, 96
# Less than any thread has that uses the grammar after it.
_STACK_BYTES = 2**20


class _Bytes:
    """llguidance's interface of a tokenizer: a token for each byte, and one that ends."""

    is_tokenizer_wrapper = True
    eos_token_id, bos_token_id = _END, None
    tokens = (*(bytes([one]) for one in range(256)), b"<end>")
    special_token_ids = (_END,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def attempt(grammar: str) -> dict[str, str]:
    """Compile and take some steps; return {} or what is wrong."""
    from llguidance import LLMatcher, LLTokenizer

    from foreroute.structured.limits import limits

    wrapper: Any = _Bytes()
    tokenizer = LLTokenizer(wrapper, n_vocab=_END + 1, eos_token=[_END])
    matcher = LLMatcher(tokenizer, _without_tokens(grammar), log_level=0, limits=limits())
    chosen = random.Random(0)
    for _ in range(_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [one for one in range(_END) if mask >> one & 1]
        if not allowed or matcher.is_error():
            break
        matcher.consume_token(chosen.choice(allowed))
    return {"error": matcher.get_error()[:1000]} if matcher.is_error() else {}


def _without_tokens(grammar: str) -> str:
    """Replace ids of the model's special tokens, which there are none of here."""
    import re

    return re.sub(r"<\[[0-9]+\]>", f"<[{_END}]>", grammar)


def main() -> None:
    """Try the grammar on standard input."""
    most_bytes, most_s = int(sys.argv[1]), int(sys.argv[2])
    import llguidance  # noqa: F401 - imported before memory is limited

    limit_processor_time(most_s)
    limit_memory(most_bytes)
    grammar = sys.stdin.buffer.read().decode()
    found: list[dict[str, str]] = []
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=lambda: found.append(attempt(grammar)))
    thread.start()
    thread.join()
    print(json.dumps(found[0]))


if __name__ == "__main__":
    main()
