"""Build a model's predictor of the next layer's experts, its online learner, and the policies that it supports."""

from dataclasses import dataclass
from typing import Any

from foreroute.config import EngineConfig
from foreroute.engine.approximation import Approximation
from foreroute.loading.policies import approximation
from foreroute.memory.plan import MemoryPlan
from foreroute.model.expert_set import ExpertSet
from foreroute.policy import Policy
from foreroute.predict.build import check_layout, lookahead, prefetch_guesses
from foreroute.predict.learner import Learner
from foreroute.predict.prefetch import PrefetchGuesses
from foreroute.predict.sidecar import Sidecar


@dataclass(frozen=True)
class Guidance:
    """predictor: of prefetches; None: prefetch is off. learner: trains the predictor while running; None: not."""

    predictor: PrefetchGuesses | None
    learner: Learner | None
    policies: Approximation


def guidance_for(
    asked: EngineConfig, model: Any, experts: ExpertSet, memory: MemoryPlan, sidecar: Sidecar | None
) -> Guidance:
    """Predictor, learner and policies of a model, with the asked policy set.

    Raises:
        PredictorError: the fitted predictors have other shapes than the model.
        PolicyError: this model does not support the policy.
    """
    hidden = model.config.get_text_config().hidden_size
    check_layout(sidecar, experts.layers, hidden, model.config.get_text_config().vocab_size)
    learner = _learner(asked, experts, hidden, memory) if sidecar is None else None
    predictor = prefetch_guesses(asked, experts.layers, experts.dtype, sidecar, learner)
    policies = approximation(experts.layers, experts.dtype, sidecar, asked, predictor, own_math=experts.has_own_math)
    policies.set([Policy.parse(asked.policy)])
    return Guidance(predictor, learner, policies)


def _learner(asked: EngineConfig, experts: ExpertSet, hidden: int, memory: MemoryPlan) -> Learner | None:
    """Make the online learner, bounded by a share of the budget; None if not even one layer fits that."""
    is_on = asked.learn and asked.prefetch != "none" and not asked.deterministic
    is_on_host = experts.device.type == "cpu" and asked.control == "host"
    if not is_on or not is_on_host or not memory.staging_slots:
        return None
    first = lookahead(experts.layers, experts.dtype)
    learner = Learner(experts.layers, hidden, experts.dtype, first, memory.learning_bytes)
    return learner if learner.is_learning else None
