"""Learning while running: the same tokens, guesses as good as a fit's, within bounds, and off when it is done."""

import dataclasses
from typing import Any

import pytest
import torch

from foreroute.predict.base import RouterSample, TokenGuess
from foreroute.predict.build import lookahead
from foreroute.predict.learner import Learner, _groups, learning_bytes, solving_bytes
from tests.support.runs import assert_same_bits, generate

ENOUGH = 1500


def learner_of(model: Any, max_bytes: int = 2**26) -> Learner:
    layers, hidden = model.foreroute.layers, model.config.hidden_size
    return Learner(layers, hidden, model.dtype, lookahead(layers, model.dtype), max_bytes, ENOUGH)


def show(model: Any, learner: Learner, passes: int) -> None:
    """Tokens pass, and after each pass there is time to work."""
    model.foreroute.engine.routing_listener = learner.see
    generator = torch.Generator().manual_seed(3)
    for _ in range(passes):
        model(input_ids=torch.randint(5, 250, (4, 64), generator=generator), use_cache=False)
        while learner.work():
            pass
        if learner._thread is not None:
            learner._thread.join()
    model.foreroute.engine.routing_listener = None


def recall(model: Any, predictor: Any) -> list[float]:
    """Per layer, of tokens not shown."""
    seen: list[RouterSample] = []
    model.foreroute.engine.routing_listener = lambda layer, *now: seen.append(RouterSample(*now))
    model(input_ids=torch.arange(256).view(4, 64).flip(1) % 250, use_cache=False)
    model.foreroute.engine.routing_listener = None
    found = []
    for layer in range(len(seen) - 1):
        guess = predictor.guess(layer, seen[layer], seen[layer + 1].ids.shape[1])
        found.append((guess.ids[:, :, None] == seen[layer + 1].ids[:, None, :]).any(1).float().mean().item())
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_what_is_learnt_is_kept_where_it_is_better(family: str, dtype: str, checkpoints: Any, load: Any) -> None:
    model = load(checkpoints.get(family), "50%", dtype=dtype, learn=False)
    assert model.foreroute.engine.learner is None
    learner = learner_of(model)
    before = recall(model, learner)
    show(model, learner, passes=12)
    assert not learner.is_learning
    assert 0 < learner.num_learnt <= len(model.foreroute.layers) - 1
    after = recall(model, learner)
    assert sum(after) > sum(before) + 0.02
    # A layer that kept the lookahead guesses as before.
    for layer, ridge in enumerate(learner._ridge[:-1]):
        assert (after[layer] == before[layer]) == (ridge is None)


def test_what_is_not_better_is_not_taken(checkpoints: Any, load: Any) -> None:
    model = load(checkpoints.get("qwen3_moe"), "50%", learn=False)

    class NamesAll:
        """Finds every expert; no fit is better."""

        def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess:
            ids = torch.arange(model.foreroute.layers[layer + 1].experts.num_offloaded).expand(len(seen.ids), -1)
            return TokenGuess(ids, ids.float())

    layers = model.foreroute.layers
    learner = Learner(layers, model.config.hidden_size, model.dtype, NamesAll(), 2**26, ENOUGH)
    show(model, learner, passes=12)
    assert not learner.is_learning
    assert learner.num_learnt == 0
    assert learner._ridge == [None] * len(layers)


def test_it_listens_only_while_it_learns(checkpoints: Any, load: Any) -> None:
    model = load(checkpoints.get("qwen3_moe"), "50%", learn=False)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    learner = learner_of(model)
    assert sum(len(module._forward_hooks) for module in model.modules()) > hooks
    show(model, learner, passes=12)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert not learner.work()


def test_rows_that_were_cut_off_midway_are_forgotten(checkpoints: Any, load: Any) -> None:
    model = load(checkpoints.get("qwen3_moe"), "50%", learn=False)
    rows = next(iter(learner_of(model)._group.values()))
    layers = model.foreroute.layers
    seen = RouterSample(
        torch.randn(200, model.config.hidden_size), torch.randint(0, 16, (200, layers[0].top_k)),
        torch.rand(200, layers[0].top_k),
    )  # fmt: skip
    rows._num_aside = 256
    rows.keep(seen, torch.rand(200, 16))
    parts = rows.add_buffered()
    next(parts)
    with pytest.raises(KeyboardInterrupt):
        parts.throw(KeyboardInterrupt)
    assert rows.num_added == 0
    assert not rows.equations.gram.any()
    for _ in rows.add_buffered():
        pass
    assert rows.num_added == rows.equations.num_rows == 200


def test_layers_are_learnt_in_groups_that_fit(checkpoints: Any, load: Any) -> None:
    assert _groups([10, 10, 10, 5], max_bytes=20) == [[0, 1], [2, 3]]
    assert _groups([10, 30], max_bytes=20) == []
    model = load(checkpoints.get("qwen3_moe"), "50%", learn=False)
    needed = learning_bytes(model.foreroute.layers, model.config.hidden_size)
    solving = solving_bytes(model.foreroute.layers, model.config.hidden_size)
    alone = learner_of(model, max_bytes=max(needed) + solving)
    assert list(alone._group) == [0]
    show(model, alone, passes=24)
    assert not alone.is_learning
    assert not learner_of(model, max_bytes=max(needed) + solving - 1).is_learning
    # What it says it takes is what it allocates.
    (rows,) = learner_of(model, max_bytes=max(needed) + solving)._group.values()
    tensors = [rows.equations.gram, rows.equations.cross]
    tensors += [tensor for block in (rows._buffer, rows._aside) for tensor in dataclasses.astuple(block)]
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(needed[0], rel=0.02)


def test_the_engine_learns_while_it_waits_and_its_tokens_stay(checkpoints: Any, load: Any, references: Any) -> None:
    folder = checkpoints.get("qwen3_moe")
    model = load(folder, "25%", governor=False)
    learner = model.foreroute.engine.learner
    assert learner is not None
    learner._enough_tokens = 200
    rows = dict(learner._group)
    for _ in range(12):
        output = generate(model)
        assert_same_bits(output, references.output(folder))
        if learner._thread is not None:
            learner._thread.join()
    assert max(one.num_added for one in rows.values()) >= 200
    assert any(one.is_solved for one in rows.values())
    model.foreroute.close()
    assert learner._thread is None
