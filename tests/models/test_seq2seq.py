"""The encoder-decoder's rows lose nothing, and its training form computes what transformers computes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from foreroute.evals import tasks
from models import loop
from models.families import SMOKE_SWITCH
from models.seq2seq import figures, rows, training
from models.tokenizer import VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of one source, as data.prepare leaves it."""
    folder = tmp_path_factory.mktemp("work")
    train_tokenizer(["def f(x):\n    return x + 1234\n"] * 50, 300).backend_tokenizer.save(
        str(folder / "tokenizer.json")
    )
    (folder / "sources.json").write_text(json.dumps({"python": 1.0}))
    words = {f"w{chr(97 + n)}rd": "a word for tests of this" for n in range(26)}
    (folder / "glossary.json").write_text(json.dumps({"train": words, "held_out": words}))
    np.random.default_rng(0).integers(5, 300, 5000, dtype=np.uint16).tofile(folder / "python.train.u16")
    return folder


@pytest.fixture
def model() -> PreTrainedModel:
    """A small one in its training form, with routers that choose."""
    made = loop.build(SMOKE_SWITCH)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data *= 8
    return made


def batches() -> list[rows.Batch]:
    rng = random.Random(0)
    window = [rng.randrange(5, 300) for _ in range(rows.WINDOW)]
    items = [([7, 8, 9, 4], [11, 4]), ([5] * 13 + [4], [12, 13, 14, 4]), ([6, 4], [4])]
    return [rows.padded([rows.hide_spans(rng, window)] * 2), rows.padded(items)]


def put_back(encoder: list[int], labels: list[int]) -> list[int]:
    """The text of a row, every sentinel replaced by what the decoder writes after it."""
    spans: dict[int, list[int]] = {}
    for token in labels[:-1]:
        if token >= VOCAB_SIZE:
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    return [one for token in encoder[:-1] for one in spans.get(token, [token])]


def test_hidden_spans_put_back_give_the_window() -> None:
    rng = random.Random(3)
    window = [rng.randrange(5, 4096) for _ in range(rows.WINDOW)]
    for encoder, labels in (rows.hide_spans(rng, window), rows.hide_tail(window + window)):
        assert (len(encoder), len(labels)) == (rows.ENCODER_LENGTH, rows.DECODER_LENGTH)
        text = put_back(encoder, labels)
        assert text == (window + window)[: len(text)]
        assert len(text) >= rows.WINDOW
        assert encoder[-1] == labels[-1] == rows.END_ID


def test_rows_are_drawn_by_step_and_part_alone_and_of_every_sort(work: Path) -> None:
    first, again = (rows.Rows(work, 0, 0.5, 0.5, {"add": 1.0}) for _ in range(2))
    drawn = [first.batch(step, 0, 2) for step in range(24)]
    assert all(torch.equal(one.ids, again.batch(step, 0, 2).ids) for step, one in reversed(list(enumerate(drawn))))
    assert not torch.equal(first.batch(0, 1, 2).ids, drawn[0].ids)
    sorts = {"items" if one.kept is not None else (one.labels[0] >= VOCAB_SIZE).sum().item() for one in drawn}
    assert sorts == {"items", 2, rows.SPANS + 1}
    limit = 2 * (rows.ENCODER_LENGTH + rows.DECODER_LENGTH)
    assert all(one.ids.numel() <= limit for one in drawn)


def test_the_decoder_reads_labels_one_place_later_behind_the_start_token() -> None:
    batch = rows.padded([([7, 4], [11, 12, 4]), ([7, 8, 4], [4])])
    assert batch.decoder_ids[:, :4].tolist() == [[0, 11, 12, 4], [0, 4, 0, 0]]
    assert batch.kept is not None
    assert batch.kept.sum(1).tolist() == [2, 3]


@pytest.mark.parametrize("number", [0, 1])
def test_the_training_form_has_the_logits_and_gradients_of_transformers_own(
    model: PreTrainedModel, number: int
) -> None:
    batch = batches()[number]
    published = training.published(model)
    fast = training.states(model, batch) @ model.shared.weight.t()
    plain = figures.transformers_logits(published)(batch)
    scored = batch.labels >= 0
    assert plain[scored].std() > 0.1
    torch.testing.assert_close(fast[scored], plain[scored], atol=1e-4, rtol=1e-4)
    for logits in (fast, plain):
        torch.nn.functional.cross_entropy(logits[scored], batch.labels[scored]).backward()
    grads = {name: one.grad for name, one in published.named_parameters()}
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            stem, which = name.rsplit(".", 1)
            each = [grads[f"{stem}.expert_{number}.{which}.weight"] for number in range(len(parameter))]
            right = torch.stack([torch.zeros_like(parameter[0]) if one is None else one for one in each])
        else:
            right = grads[name]
            right = right * training.query_scale(model.config) if name.endswith("Attention.q.weight") else right
        torch.testing.assert_close(parameter.grad, right, atol=1e-4, rtol=1e-3, msg=name)


def test_published_queries_lose_no_bit(model: PreTrainedModel) -> None:
    scale = training.query_scale(model.config)
    narrow = model.to(torch.bfloat16)
    query = "decoder.block.1.layer.0.SelfAttention.q.weight"
    assert scale == 0.25
    assert torch.equal(training.published(narrow).state_dict()[query] / scale, narrow.state_dict()[query])


def test_router_statistics_leave_padding_out(model: PreTrainedModel) -> None:
    batch = batches()[1]
    stats = figures.router_stats(training.published(model), [batch])
    assert len(stats) == 2
    assert all(0 <= one.reuse <= 1 for one in stats)
    assert batch.kept is not None
    # The encoder's layer saw 20 real tokens of 48 places; the most loaded of 4 experts has at most all of them.
    assert stats[0].max_over_mean * int(batch.kept.sum()) / 4 == pytest.approx(
        round(stats[0].max_over_mean * int(batch.kept.sum()) / 4)
    )


def test_bits_of_a_model_that_knows_nothing_are_those_of_the_vocabulary(work: Path) -> None:
    tokenizer = rows.with_sentinels(work)
    text = "".join(f"return {n} + x\n" for n in range(400))
    hidden = figures.hide_text({"python": text}, {"python": 1.0}, tokenizer, 2)
    found = figures.bits_per_hidden_char(lambda batch: torch.zeros(*batch.labels.shape, 4128), hidden)
    tokens = 2 * rows.HIDDEN
    assert found["all"] == pytest.approx(math.log2(4128) * tokens / hidden[0].chars)


def test_sentinels_stand_behind_the_vocabulary_and_encoded_text_ends(work: Path) -> None:
    tokenizer = rows.with_sentinels(work)
    ids = tokenizer("x <extra_id_0> y").input_ids
    assert ids[-1] == tokenizer.eos_token_id == rows.END_ID
    assert tokenizer.convert_tokens_to_ids("<extra_id_31>") - tokenizer.convert_tokens_to_ids("<extra_id_0>") == 31
    assert tokenizer.chat_template is None


def test_answers_come_in_the_items_order(work: Path, model: PreTrainedModel) -> None:
    tokenizer = rows.with_sentinels(work)
    items = [item for item in tasks.held_out_suite(2, 0) if item.kind in ("add", "copy")]
    published = training.published(model)
    together = figures.answer(published, tokenizer, items)
    alone = [figures.answer(published, tokenizer, [item])[0] for item in items]
    assert all(text.startswith(one) for text, one in zip(together, alone, strict=True))
    assert len(set(together)) > 1
