"""`model.foreroute`: who has one, what it refuses to give, and what it puts back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.batching.engine import BatchEngine
from foreroute.errors import RefusedError
from foreroute.evals.fetched_only import fetched_only
from foreroute.generation.generate import generate
from foreroute.loading.offloaded_model import OffloadedModel, handle_of
from foreroute.policy import Policy
from foreroute.prepare.corpus import Corpus
from foreroute.prepare.fit import fit
from foreroute.prepare.score import score
from foreroute.verification.compare import verify

IDS = torch.ones(1, 4, dtype=torch.int64)


def _enter(model: Any) -> None:
    with fetched_only(model, None, Policy(), in_prompts=True):
        pass


# Where callers hand in a model of their own.
DOORS = {
    "generate": lambda model: generate(model, None, IDS),
    "batches": lambda model: BatchEngine(model, None, 64),
    "fit": lambda model: fit(model, "", Corpus(IDS, ""), Path("nowhere")),
    "score": lambda model: score(model, IDS, None, rows=1),
    "verify": lambda model: verify(model, [], None, lambda done, total: None),
    "fetched only": _enter,
}


@pytest.mark.parametrize("door", DOORS)
def test_a_model_that_is_not_ours_is_refused_by_name(door: str, references: Any, checkpoints: Any) -> None:
    resident = references.model(checkpoints.get("olmoe"))
    with pytest.raises(RefusedError, match=r"OlmoeForCausalLM was not loaded by foreroute\.load.* Load it with"):
        DOORS[door](resident)


def test_ours_is_told_by_its_class_and_its_handle(load: Any, references: Any, checkpoints: Any) -> None:
    folder = checkpoints.get("olmoe")
    model = load(folder)
    assert handle_of(model) is model.foreroute
    assert isinstance(model, OffloadedModel)
    assert not isinstance(references.model(folder), OffloadedModel)


def test_there_is_no_host_engine_where_the_device_pages_for_itself(load: Any, checkpoints: Any) -> None:
    folder = checkpoints.get("olmoe")
    host = load(folder)
    assert host.foreroute.host_engine is host.foreroute.engine
    with pytest.raises(RefusedError, match=r"control=\"host\""):
        _ = load(folder, control="device").foreroute.host_engine


def test_what_computes_in_the_experts_place_is_taken_away_again(load: Any, checkpoints: Any) -> None:
    model = load(checkpoints.get("olmoe"))
    handle = model.foreroute
    before = [layer.experts.engine_forward for layer in handle.layers]
    layers: list[int] = []

    def wrapped(layer: int, compute: Any) -> Any:
        if layer == len(handle.layers) - 1:
            raise KeyError(layer)
        layers.append(layer)
        return compute

    with pytest.raises(KeyError), handle.computing(wrapped):
        pass
    assert layers == list(range(len(handle.layers) - 1))
    assert [layer.experts.engine_forward for layer in handle.layers] == before
    handle.close()
    with pytest.raises(RefusedError, match="load the model again"), handle.computing(wrapped):
        pass
