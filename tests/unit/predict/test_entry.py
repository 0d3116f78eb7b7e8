"""The guess from before attention reads directions, not lengths, and finds a planted map of them."""

import torch

from foreroute.predict.entry import EntryFit, normalised


def test_a_planted_map_of_the_normalised_stream_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.randn(8, 5, generator=generator)
    entry = torch.randn(400, 8, generator=generator) * torch.rand(400, 1, generator=generator) * 50
    fit = EntryFit(8, 5)
    assert fit.solve(1e-6) is None
    fit.add(entry[:300], normalised(entry[:300]) @ linear)
    layer = fit.solve(1e-9)
    assert layer is not None
    truth = (normalised(entry[300:]) @ linear).topk(3).indices
    guess = layer.guess(entry[300:], 3)
    assert (guess.ids == truth).float().mean() > 0.98
    assert layer.guess(1000 * entry[300:], 3).ids.tolist() == guess.ids.tolist()


def test_the_norm_is_a_root_mean_square_of_one() -> None:
    rows = normalised(torch.full((2, 4), 7.0, dtype=torch.bfloat16))
    torch.testing.assert_close(rows, torch.ones(2, 4))
