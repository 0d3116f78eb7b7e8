"""Layer 0's table: a token seen often by its mean, one never seen by its embedding, and both shifted by the context."""

import torch

from foreroute.predict.fitted import RunningContext, context_before
from foreroute.prepare.solvers import TokenTableFit

VOCABULARY, EMBEDDING, HIDDEN, EXPERTS = 40, 6, 3, 5


def test_tokens_and_contexts_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(VOCABULARY, EMBEDDING, generator=generator)
    linear = torch.randn(EMBEDDING, EXPERTS, generator=generator)
    by_token = embeddings @ linear
    by_token[3] += 4.0  # what no linear map knows
    from_context = torch.randn(HIDDEN, EXPERTS, generator=generator)
    tokens = torch.arange(30).repeat(500)
    context = 2 + torch.randn(len(tokens), HIDDEN, generator=generator)
    fit = TokenTableFit(VOCABULARY, EMBEDDING, HIDDEN, EXPERTS)
    fit.add(tokens, embeddings[tokens], context, by_token[tokens] + context @ from_context)
    table = fit.solve(embeddings, 1e-6)
    assert table.scores.dtype == torch.float16
    usual = by_token + 2 * from_context.sum(0)
    torch.testing.assert_close(table.scores[3].float(), usual[3], atol=0.3, rtol=0)
    # Never seen: off by what the odd token did to the map, and in the right order all the same.
    assert float((table.scores[30:].float() - usual[30:]).abs().mean()) < 0.4 * float(usual.abs().mean())
    torch.testing.assert_close(table.from_context, from_context, atol=0.1, rtol=0)
    asked, far = torch.tensor([3, 7, 3]), torch.tensor([[9.0, 0, 0], [0, -9, 0], [0, 0, 9]])
    guess = table.guess(asked, far, 2)
    assert guess.ids.tolist() == (by_token[asked] + far @ from_context).topk(2).indices.tolist()
    assert table.guess(asked, None, 2).ids.tolist() == usual[asked].topk(2).indices.tolist()
    # A usual context is the mean one.
    mean = table.mean_context.expand(3, -1)
    torch.testing.assert_close(table.guess(asked, mean, 5).weights, table.guess(asked, None, 5).weights)


def test_a_context_is_of_the_tokens_before_and_of_the_recent_ones_most() -> None:
    hidden = torch.zeros(1, 4, 1)
    hidden[0, 1] = 10.0
    torch.testing.assert_close(context_before(hidden)[0, :, 0], torch.tensor([0.0, 0.0, 2.0, 1.6]))


def test_decoding_token_by_token_has_the_context_of_the_whole_text() -> None:
    hidden = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(1))
    whole = context_before(hidden)
    running = RunningContext()
    assert running.of_rows(2) is None
    running.see(hidden[:, :7].flatten(0, 1), num_rows=2)
    for position in range(7, 12):
        found = running.of_rows(2)
        assert found is not None
        torch.testing.assert_close(found, whole[:, position])
        running.see(hidden[:, position], num_rows=2)
    assert running.of_rows(3) is None
    # Another number of rows is another text.
    running.see(hidden[:1, 0], num_rows=1)
    found = running.of_rows(1)
    assert found is not None
    torch.testing.assert_close(found, 0.2 * hidden[:1, 0])
