"""Ask a model questions, one after the other; what was said before is not computed again.

python examples/chat.py [MODEL] [QUESTION ...]
"""

import sys

import foreroute
from foreroute.generation.generate import generate
from foreroute.generation.prefix_cache import PromptCache
from foreroute.model.text import chat_ids

name = sys.argv[1] if len(sys.argv) > 1 else "foreroute-tiny"
questions = sys.argv[2:] or ["Mon 3 Jul + 2 days", "12 + 30"]

with foreroute.load(name, memory="25%") as model:
    tokenizer = model.foreroute.tokenizer()
    chat: list[dict[str, str]] = []
    kept = PromptCache()
    for question in questions:
        chat.append({"role": "user", "content": question})
        print(f"> {question}")
        report = generate(
            model,
            tokenizer,
            chat_ids(tokenizer, chat),
            reuse=kept,
            max_new_tokens=128,
            on_text=lambda piece: print(piece, end="", flush=True),
        )
        print(f"\n({report.prompt_tokens_reused} of {report.prompt_tokens} tokens of the prompt were kept)")
        chat.append({"role": "assistant", "content": report.text})
