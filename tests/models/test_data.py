"""Text: cleaned, split by document, nothing of the held-out part in training."""

from __future__ import annotations

from models import data, sources
from models.tokenizer import CHAT_TEMPLATE, train_tokenizer


def test_documents_are_split_by_name_and_shared_paragraphs_stay_in_training_only() -> None:
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy of this text, to use it."
    documents = [
        (f"doc{n}", f"{licence}\n\nThis is the paragraph number {n} of a long series of texts.") for n in range(400)
    ]
    train, held_out = data.split_documents("s", documents, set())
    assert len(train) + len(held_out) == 400
    assert 2 <= len(held_out) <= 20
    assert sum(licence in text for text in train) == 1
    assert not any(licence in text for text in held_out)
    assert not set(train) & set(held_out)


def test_glossary_keeps_short_plain_entries_one_per_word() -> None:
    lines = [
        'ant: a small social insect; "an ant hill"',
        "ant: another meaning of the word",
        "Ant: a capital letter word",
    ]
    assert data.glossary_of(lines) == {"ant": "a small social insect"}


def test_roff_macros_and_fonts_are_taken_out() -> None:
    text = sources._unroff('.TH X 3\n.\\" note\n.SH NAME\nx \\- does \\fIthings\\fP\n.BR "open (2)"\n')
    assert text == "NAME\nx - does things\nopen (2)\n"


def test_tokenizer_round_trips_splits_digits_and_writes_chats() -> None:
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1234\n"] * 50, vocab_size=300)
    text = "def g(y):\n\treturn 40 + 2 # é"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("12345").input_ids) == 5
    assert tokenizer.chat_template == CHAT_TEMPLATE
    chat = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "?"},
    ]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert written == "<|user|>1 + 1<|assistant|>2<|end|><|user|>?<|assistant|>"
