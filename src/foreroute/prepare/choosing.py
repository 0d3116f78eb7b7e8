"""Which experts of a store of mixed bits have more of them: those that are used most."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.errors import PredictorError, StoreError
from foreroute.model.blocks import probe
from foreroute.model.skeleton import Outline, load_skeleton, offloaded_modules
from foreroute.predict.sidecar import Sidecar, find_sidecar


def most_used(counts: Sequence[Sequence[int]], share: float) -> tuple[list[frozenset[int]], float]:
    """The share of all experts that is used most, over all layers together; the first ones where uses are equal.

    Every layer routes each token to as many experts, so that counts of layers are alike.

    Args:
        counts: per layer, how often each expert was used. share: of all experts, above 0 and below 1.
    Returns:
        Per layer the experts, and the share of all uses that they had.
    Raises:
        StoreError: the share is none of the experts, or all of them.
    """
    ranked = sorted((-count, layer, expert) for layer, row in enumerate(counts) for expert, count in enumerate(row))
    num_chosen = round(share * len(ranked))
    if not 0 < num_chosen < len(ranked):
        kind = "all" if num_chosen else "none"
        raise StoreError(
            f"{100 * share:g} % of {len(ranked)} experts is {kind} of them. Give another --int8-share, or --quant "
            f"{'int8' if num_chosen else 'int4'}."
        )
    chosen = ranked[:num_chosen]
    of_layer = [frozenset(e for _, at, e in chosen if at == layer) for layer in range(len(counts))]
    uses = -sum(count for count, _, _ in ranked)
    return of_layer, -sum(count for count, _, _ in chosen) / uses if uses else 0.0


def fitted_counts(folder: Path, sketch: Outline, asked: str) -> tuple[list[list[int]], str] | None:
    """How often the text of `foreroute fit` used each expert, per layer of the outline's table, and the file's name.

    Args:
        asked: the fit to look for, as EngineConfig.predictor has it.
    Returns:
        None where there is no fit.
    Raises:
        PredictorError: the file that is named is absent; or it is damaged, or fitted to another model.
    """
    path = find_sidecar(folder, asked)
    if path is None:
        return None
    sidecar = Sidecar.load(path, sketch.table.index.fingerprint())
    model: Any = load_skeleton(folder, sketch, "auto")
    # A fit counts layers in the order in which the model calls them.
    names = [layer.name for layer in probe(model, offloaded_modules(model))]
    if len(names) != len(sidecar.popularity):
        raise PredictorError(f"{path} was fitted to {len(sidecar.popularity)} MoE layers, not {len(names)}. Fit again.")
    by_name = dict(zip(names, sidecar.popularity, strict=True))
    return in_table_order({name: counts.tolist() for name, counts in by_name.items()}, sketch.table), path.name


def in_table_order(counts: dict[str, list[int]], table: ExpertTable) -> list[list[int]]:
    """Counts by a layer's name as counts per layer of the table.

    Raises:
        PredictorError: they are counts of other numbers of experts.
    """
    ordered = [counts[layer.name] for layer in table.layers]
    for layer, row in zip(table.layers, ordered, strict=True):
        if len(row) != layer.num_experts:
            raise PredictorError(f"{layer.name} has {layer.num_experts} experts, and uses of {len(row)} were counted.")
    return ordered
