"""The words of the model card, by what sort of model it is about."""

from __future__ import annotations

CARD = """---
library_name: transformers
tags: [{tag}]
language: en
---
# {name}

{what} {parameters:.2f} M parameters, {class_name}: {routing}.
Trained from random weights on {cpu} in {minutes:.0f} minutes of wall time
({tokens:.1f} M tokens, {steps} steps). {knows}

```python
{example}
```

![curves](curves.png)
{acceptance}
## Exercises

Held out: no item was seen in training, in any wording. Greedy; right means that the whole answer, steps included,
is exact.

{accuracy}

## Text

{text_intro}

{text}
{routers}
## Made by

`python models/train.py {name}` (resumable; data from Debian packages through apt and the
running Python {python}). Evaluated by `python models/evaluate.py models/{name} --work build/models`. Muon for matrices,
Adam for the rest, warm-up, constant rate, then a fall to zero{balance};
{text_share:.0%} of the rows are text, the others exercises; seed {seed}.
{note}
## A few answers

{samples}
"""

SHIPS = "that ships with foreroute, so that {purpose} can be tried, tested and measured\nwithout a download."
MOE = f"A small Mixture-of-Experts model {SHIPS.format(purpose='the engine')}"
DRAFT = (
    f"A small dense model {SHIPS.format(purpose='drafting')} It drafts tokens that {{target}}\n"
    "verifies; they share the tokenizer."
)
SWITCH = f"A small encoder-decoder with experts {SHIPS.format(purpose='the engine')}"
KNOWS = "It answers short generated exercises and continues technical English and\nPython; it knows nothing else."
SWITCH_KNOWS = (
    "It answers short generated exercises, asked without a chat\n"
    "template, and fills in what `<extra_id_0>`, `<extra_id_1>` .. stand for in technical English and Python."
)
EXAMPLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("models/{name}")
model = AutoModelForCausalLM.from_pretrained("models/{name}")
messages = [{{"role": "user", "content": "4735 + 281"}}]
chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**chat, max_new_tokens=60)[0]))"""
DRAFT_EXAMPLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("models/{target}")
model = AutoModelForCausalLM.from_pretrained("models/{target}")
draft = AutoModelForCausalLM.from_pretrained("models/{name}")
messages = [{{"role": "user", "content": "4735 + 281"}}]
chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**chat, assistant_model=draft, max_new_tokens=60)[0]))"""
SWITCH_EXAMPLE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("models/{name}")
model = AutoModelForSeq2SeqLM.from_pretrained("models/{name}")
for prompt in ("4735 + 281", "def __init__(self, name):\\n    self.<extra_id_0> = name\\n    return <extra_id_1>"):
    print(tokenizer.decode(model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=60)[0]))"""

TEXT = """Bits per character over {scored} held-out tokens: nats / ln 2 / characters; windows of {window} tokens, each
without context before it; documents that no model trained on, without paragraphs that training has too."""
SWITCH_TEXT = """Bits per hidden character: nats of the hidden tokens / ln 2 / their characters, over {scored} tokens
that the decoder writes; a quarter of a window of {window} tokens hidden as {spans} spans, or its last {tail} tokens
as one. Documents that no model trained on, without paragraphs that training has too."""
ROUTERS = """
## Routers

Over held-out text and exercises. Reuse: share of a token's experts that the token before it used too.{layers}

{table}
"""
SWITCH_LAYERS = "\nThe encoder's layers first, then the decoder's."
ACCEPTANCE = """
## Acceptance

Share of tokens whose greedy choice is the same, every token given what really came before it; both models in bf16.
On text: eight held-out windows of {window} tokens of each source, the sources weighted as in training. On exercises:
the tokens of right answers, all kinds alike.

{table}
"""
