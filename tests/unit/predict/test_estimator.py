"""The estimator learns the routes, layer by layer, in turns or at once, and the same way every time."""

from dataclasses import replace

import torch

from foreroute.predict.base import RouterSample
from foreroute.predict.fitted import Estimator, estimate
from foreroute.prepare.estimator_training import EstimatorSettings, EstimatorTraining

HIDDEN, EXPERTS, TOKENS = 16, [8, 8, 6], 1200
SETTINGS = EstimatorSettings(shrink=1, epochs=6, batch=64, peak_rate=1e-2)


def layers_of(seed: int, tokens: int = TOKENS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer, inputs and the next layer's distribution: a linear map that differs from layer to layer."""
    maps = torch.Generator().manual_seed(1)
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(HIDDEN, 8, generator=maps)
    made = []
    for num_experts in EXPERTS[1:]:
        inputs = torch.randn(tokens, HIDDEN, generator=generator)
        logits = inputs @ shared[:, :num_experts] + 2 * torch.randn(num_experts, generator=maps)
        made.append((inputs, torch.softmax(logits, -1)))
    return made


def trained(settings: EstimatorSettings = SETTINGS, stop_after: int | None = None) -> EstimatorTraining:
    """Shown all tokens in four passes; taken up by a fresh object in between when asked."""
    training = EstimatorTraining(HIDDEN, EXPERTS, TOKENS, settings)
    for index in range(4):
        if index == stop_after:
            after = EstimatorTraining(HIDDEN, EXPERTS, TOKENS, settings)
            for name, tensor in after.tensors().items():
                tensor.copy_(training.tensors()[name])
            training = after
        rows = slice(index * TOKENS // 4, (index + 1) * TOKENS // 4)
        for layer, (inputs, target) in enumerate(layers_of(0)):
            training.add(layer, inputs[rows], target[rows])
    training.train()
    return training


def recall(training: EstimatorTraining) -> list[float]:
    """Of the fresh tokens' best two experts, per layer."""
    found = []
    for layer, (inputs, target) in enumerate(layers_of(seed=5, tokens=300)):
        predictor = Estimator(training.weights, lambda layer, seen: seen.hidden, EXPERTS)
        nothing = torch.zeros(300, 1)
        guess = predictor.guess(layer, RouterSample(inputs, nothing.long(), nothing), 2)
        assert guess is not None
        truth = target.topk(2).indices
        found.append(float((guess.ids[:, :, None] == truth[:, None, :]).sum()) / truth.numel())
    return found


def test_it_learns_both_layers_and_names_no_expert_that_a_layer_lacks() -> None:
    training = trained()
    assert min(recall(training)) > 0.85
    assert max(recall(EstimatorTraining(HIDDEN, EXPERTS, TOKENS, SETTINGS))) < 0.6
    predictor = Estimator(training.weights, lambda layer, seen: seen.hidden, EXPERTS)
    inputs, nothing = layers_of(0)[1][0], torch.zeros(TOKENS, 1)
    guess = predictor.guess(1, RouterSample(inputs, nothing.long(), nothing), 8)
    assert guess is not None
    assert guess.ids.shape[1] == int(guess.ids.max()) + 1 == EXPERTS[2]
    assert predictor.guess(2, RouterSample(inputs, nothing.long(), nothing), 2) is None


def test_a_buffer_that_holds_a_part_trains_in_turns() -> None:
    per_token = 2 * (HIDDEN + 8) * 2
    in_turns = trained(replace(SETTINGS, buffer_bytes=700 * per_token))
    assert in_turns.tensors()["inputs"].shape[1] == 700
    assert int(in_turns.tensors()["counts"][1]) == TOKENS
    assert min(recall(in_turns)) > 0.75


def test_taken_up_again_it_ends_the_same() -> None:
    once, resumed = trained(), trained(stop_after=2)
    for name, weight in once.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name


def test_the_layer_tells_layers_apart() -> None:
    weights = trained().weights
    inputs = torch.zeros(2, HIDDEN)
    assert not torch.allclose(estimate(weights, inputs, 0)[0], estimate(weights, inputs, 1)[0], atol=0.1)
    mixed = estimate(weights, inputs, torch.tensor([0, 1]))
    torch.testing.assert_close(mixed[1], estimate(weights, inputs, 1)[0])
