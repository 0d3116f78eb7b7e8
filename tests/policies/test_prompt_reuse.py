"""Prompts are exact under every policy, whatever of them an earlier answer has left."""

import pytest
import torch

from foreroute.generation.prefix_cache import PromptCache
from tests.policies.conftest import FAMILIES
from tests.support.conversations import PROMPT, answer, assert_same, empty_cache, fed, longer


@pytest.mark.parametrize("policy", ["speculative", "paper"])
@pytest.mark.parametrize("family", FAMILIES)
def test_substitutes_leave_no_trace_in_the_next_prompt(family, policy, checkpoints, sidecars, load, references):
    """Of an answer that was not exact, the prompt alone is kept: where a window has slid, nothing."""
    folder = checkpoints.get(family)
    model = load(folder, predictor=str(sidecars(family)), policy=policy, deterministic=True)
    kept = PromptCache()
    report, _ = answer(model, PROMPT, reuse=kept)
    approximate = report.token_ids
    reference = references.model(folder)
    tokens, _ = fed(reference, [PROMPT], empty_cache(reference))
    following = longer(PROMPT, report)
    model.foreroute.set_policy("exact")
    ours = answer(model, following, reuse=kept)
    known = 0 if family == "gpt_oss" else PROMPT.shape[1]
    assert ours[0].prompt_tokens_reused == known
    pieces = [piece for piece in torch.tensor_split(following, [known], dim=1) if piece.shape[1]]
    assert_same(ours, *fed(reference, pieces, empty_cache(reference)))
    assert family == "gpt_oss" or list(approximate) != tokens, "substitutes changed nothing: the test shows nothing"
