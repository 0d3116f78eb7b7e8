"""Every family of the installed transformers whose experts are behind the seam: the same tokens and the same bits."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from foreroute.errors import ForerouteError
from tests.families.checks import answer, assert_same, load_tight, resident_answer, save_tiny
from tests.families.installed import Family, families
from tests.families.shrink import tiny_config
from tests.families.special import CANNOT, ROUTE_THEMSELVES, UNGUESSED, UNTESTED, WRITE_NO_TEXT

WORKING = [family for family in families() if family.model_type not in CANNOT | UNTESTED]
REFUSED = [family for family in families() if family.model_type in CANNOT]


def by_name(family: Family) -> str:
    return family.model_type


@pytest.mark.usefixtures("_torch_setup")
@pytest.mark.parametrize("family", WORKING, ids=by_name)
def test_family(tmp_path: Path, family: Family, record_property: Callable[[str, object], None]) -> None:
    """Exact with experts evicted, and guessed where its routers can be run ahead."""
    folder = save_tiny(family, tmp_path / family.model_type)
    expected = resident_answer(family, folder)
    model = load_tight(folder)
    try:
        assert_same(answer(model), expected)
        stats, layers = model.foreroute.stats(), model.foreroute.layers
    finally:
        model.foreroute.close()
    assert stats.evictions > 0, "nothing was evicted: the budget is too wide to prove anything"
    routes_itself = all(layer.router is None for layer in layers)
    assert not routes_itself or family.model_type in ROUTE_THEMSELVES, "the probe finds no router"
    if not routes_itself and family.model_type not in UNGUESSED:
        assert stats.decode.prefetch_loads > 0, "no expert was prefetched"
    record_property("family", family.module)


@pytest.mark.usefixtures("_torch_setup")
@pytest.mark.parametrize("family", REFUSED, ids=by_name)
def test_refused(tmp_path: Path, family: Family) -> None:
    """Refused before work starts: by its class, for which a config is enough, or by how its experts are stored."""
    folder = tmp_path / family.model_type
    if family.model_type in WRITE_NO_TEXT:
        tiny_config(family.model_type).save_pretrained(folder)
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    else:
        save_tiny(family, folder)
    with pytest.raises(
        ForerouteError, match="not a causal language model" if family.model_type in WRITE_NO_TEXT else None
    ):
        load_tight(folder)


@pytest.mark.usefixtures("_torch_setup")
def test_hash_routed_layers_are_guessed_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their experts go by token ids alone, which are known: every guess is the router's choice, of layer 0 too."""
    family = next(family for family in WORKING if family.model_type == "deepseek_v4")
    model = load_tight(save_tiny(family, tmp_path / "hashed"))
    engine = model.foreroute.engine
    hashed = [layer.index for layer in model.foreroute.layers if layer.router.by_tokens]
    assert hashed == [0, 1, 2]
    guessed: dict[int, set[int]] = {}
    pairs: list[tuple[int, set[int], set[int]]] = []
    prefetch = engine.prefetcher.prefetch

    def noting(layer: int, experts: Sequence[int]) -> None:
        guessed[layer] = set(experts)
        prefetch(layer, experts)

    def observe(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        if layer in hashed and layer in guessed:
            pairs.append((layer, guessed.pop(layer), set(ids.flatten().tolist())))

    monkeypatch.setattr(engine.prefetcher, "prefetch", noting)
    engine.routing_listener = observe
    answer(model)
    model.foreroute.close()
    assert {layer for layer, _, _ in pairs} == set(hashed)
    assert [pair for pair in pairs if pair[1] != pair[2]] == []


@pytest.mark.usefixtures("_torch_setup")
def test_a_broken_family_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert's output off by a millionth, in one family: the comparison says so."""
    family = next(family for family in WORKING if family.model_type == "mixtral")
    folder = save_tiny(family, tmp_path / "broken")
    expected = resident_answer(family, folder)
    model = load_tight(folder)
    compute = model.foreroute.engine.compute
    monkeypatch.setattr(model.foreroute.engine, "compute", lambda *args: compute(*args) * (1 + 1e-6))
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same(answer(model), expected)
    model.foreroute.close()
