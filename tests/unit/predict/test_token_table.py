"""Layer 0's table: a token seen often by its mean, one never seen by what its embedding says."""

import torch

from foreroute.predict.token_table import TokenTable, TokenTableFit

VOCABULARY, HIDDEN, EXPERTS = 40, 6, 5


def test_seen_tokens_read_their_mean_and_unseen_ones_their_embedding() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    linear = torch.randn(HIDDEN, EXPERTS, generator=generator)
    truth = embeddings @ linear
    truth[3] += 4.0  # what no linear map knows
    tokens = torch.arange(30).repeat(50)
    fit = TokenTableFit(VOCABULARY, HIDDEN, EXPERTS)
    fit.add(tokens, embeddings[tokens], truth[tokens])
    table = fit.solve(embeddings, 1e-6)
    assert table.dtype == torch.float16
    torch.testing.assert_close(table[3].float(), truth[3], atol=0.15, rtol=0)
    # Never seen: off by what the odd token did to the map, and in the right order all the same.
    assert float((table[30:].float() - truth[30:]).abs().mean()) < 0.4 * float(truth.abs().mean())
    guess = TokenTable(table).guess(torch.tensor([3, 7]), 2)
    assert guess.ids.tolist() == truth[[3, 7]].topk(2).indices.tolist()
