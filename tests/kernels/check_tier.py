"""The device tier with Triton's planner, fetch and experts, interpreted: tokens and decisions of the references.

Run by test_tier.py in a process of its own.
"""

import pytest
import torch

from foreroute.device import triton_paging
from foreroute.device.slot_math import KernelSlotMath, form_of
from foreroute.generation.graph_decoder import GraphDecoder
from foreroute.kernels.triton import experts as triton_experts
from foreroute.loading.expert_math import describe_math
from tests.support.runs import ONE_PROMPT, decode_greedily

NEW_TOKENS = 5


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_tokens_and_decisions(checkpoints, references, load, family):
    folder = checkpoints.get(family)
    found = []
    for has_kernels in (False, True):
        model = load(folder, "50%", control="device")
        tier = model.foreroute.engine
        if has_kernels:
            tier._paging = triton_paging
            forms = [
                form_of(layer.experts, described.layout, describe_math(layer.experts), torch.float32)
                for layer, described in zip(model.foreroute.layers, tier.table.layers, strict=True)
            ]
            tier._slot_math = KernelSlotMath(triton_experts.experts, tier._pool, forms)
        tokens = decode_greedily(GraphDecoder(model, 1, 32), ONE_PROMPT.ids, NEW_TOKENS).tolist()
        found.append((tokens, tier.state.counts(), tier.state.key_of_slot.tolist()))
    length = ONE_PROMPT.ids.shape[1]
    assert found[0][0] == references.output(folder).tokens[:, length : length + NEW_TOKENS].tolist()
    assert found[0] == found[1]
    assert found[0][1]["misses"] > 0
    assert found[0][1]["prefetched"] > 0
