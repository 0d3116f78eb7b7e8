"""Build predictors from a model's layers and its sidecar; shared by `load`, `fit` and `score`."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from foreroute.checkpoint.index import CheckpointIndex
from foreroute.config import EngineConfig
from foreroute.errors import PredictorError
from foreroute.model.blocks import MoeLayer, Router, first_decoded
from foreroute.model.hooks import ResidualTap
from foreroute.policy import EXACT
from foreroute.predict.base import Predictor, RouterSample, Select, guess_from_scores
from foreroute.predict.fitted import Estimator, Hybrid, Inputs, Ridge, Selection, TokenTable, selection_of
from foreroute.predict.lookahead import DefaultVectors, NextRouter, QuasiHiddenLayer, RouterLookahead, with_no_expert
from foreroute.predict.prefetch import PrefetchGuesses, no_residual
from foreroute.predict.sidecar import Sidecar, find_sidecar

# Where the held-out text of the fit says that two more experts are worth predicting. Chosen on foreroute-tiny.
_GOOD_RECALL, _MUCH_MISSED = 0.95, 0.07
_FIT_AGAIN = "Fit again (`foreroute fit --force`), or ignore them: --predictor no."
LOOKAHEAD, DEFAULT_VECTORS, RIDGE, HYBRID = "lookahead", "default vectors", "ridge", "hybrid"
ESTIMATOR, TOKEN_TABLE = "estimator", "token table"


def open_sidecar(folder: Path, index: CheckpointIndex, asked: EngineConfig) -> Sidecar | None:
    """Open the sidecar that `asked` names, or the one in `folder`; None without one. It must fit `index`'s checkpoint.

    Raises:
        PredictorError: the file is absent, damaged, or fitted to another model.
    """
    if asked.prefetch == "none" and asked.policy == EXACT:
        return None
    path = find_sidecar(folder, asked.predictor)
    return None if path is None else Sidecar.load(path, index.fingerprint())


def check_layout(sidecar: Sidecar | None, layers: Sequence[MoeLayer], hidden: int, vocabulary: int) -> None:
    """Check that the sidecar's tensors fit `layers` as this transformers builds them.

    Args:
        hidden: width of the router's input. vocabulary: tokens of the model.
    Raises:
        PredictorError: some shape differs, or a layer's choice is an unknown predictor.
    """
    if sidecar is None:
        return
    fitted_to = [len(counts) for counts in sidecar.popularity]
    here = [layer.experts.num_offloaded for layer in layers]
    widths = {entry.from_hidden.shape[0] for entry in sidecar.ridge if entry is not None}
    if fitted_to != here or not widths <= {hidden}:
        raise PredictorError(
            f"The fitted predictors are of {len(fitted_to)} MoE layers with {sorted(set(fitted_to))} experts and a "
            f"hidden width of {sorted(widths)}; as this transformers builds the model it has {len(here)} with "
            f"{sorted(set(here))} and {hidden}. {_FIT_AGAIN}"
        )
    unknown = set(sidecar.choice) - {
        None,
        LOOKAHEAD,
        DEFAULT_VECTORS,
        RIDGE,
        *([ESTIMATOR] if sidecar.estimator else []),
    }
    if unknown:
        raise PredictorError(
            f"The fitted predictors choose {min(map(str, unknown))!r:.40}, which is unknown. {_FIT_AGAIN}"
        )
    stored = {name: tuple(tensor.shape) for name, tensor in sidecar.tensors().items()}
    wanted = _shapes(here, hidden, vocabulary, stored, min(first_decoded(layers), len(here) - 1))
    for name, shape in stored.items():
        if wanted.get(name, shape) != shape:
            raise PredictorError(
                f"The fitted predictors' {name} is {list(shape)}; this model needs {list(wanted[name])}. {_FIT_AGAIN}"
            )


def _shapes(
    experts: Sequence[int], hidden: int, vocabulary: int, stored: Mapping[str, tuple[int, ...]], first: int
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a sidecar of this model may have; the estimator sets its inner widths itself.

    first: the layer that the token table predicts.
    """
    wanted: dict[str, tuple[int, ...]] = {
        "token_table.scores": (vocabulary, experts[first]),
        "token_table.from_context": (hidden, experts[first]),
        "token_table.mean_context": (hidden,),
    }
    for layer, here in enumerate(experts):
        wanted |= {f"popularity.{layer}": (here,), f"default_vectors.{layer}": (here, hidden)}
        after = experts[min(layer + 1, len(experts) - 1)]
        wanted[f"ridge.{layer}.from_hidden"] = (hidden, after)
        wanted[f"ridge.{layer}.from_gates"], wanted[f"ridge.{layer}.bias"] = (here + 1, after), (after,)
    inner, wide = stored.get("estimator.down", (0,))[-1], stored.get("estimator.up", (0,))[-1]
    own = {
        "down": (hidden, inner), "layer": (len(experts) - 1, inner), "up": (inner, wide), "up_bias": (wide,),
        "back": (wide, inner), "back_bias": (inner,), "norm": (inner,), "norm_bias": (inner,),
        "head": (inner, max(experts)), "head_bias": (max(experts),),
    }  # fmt: skip
    return wanted | {f"estimator.{name}": shape for name, shape in own.items()}


def prefetch_guesses(
    asked: EngineConfig,
    layers: Sequence[MoeLayer],
    dtype: torch.dtype,
    sidecar: Sidecar | None,
) -> PrefetchGuesses | None:
    """Build the source of the engine's guesses; None when prefetch is off.

    Args:
        asked: the configuration. layers: the MoE layers. dtype: of compute.
        sidecar: its choice per layer is used; without one, the lookahead.
    Raises:
        PredictorError: a guess is to be wider than a router without logits can rank.
    """
    if asked.prefetch == "none":
        return None
    _check_width(asked.prefetch_width, layers)
    predictor: Predictor = lookahead(layers, dtype)
    table: TokenTable | None = None
    select: Select = guess_from_scores
    first = min(first_decoded(layers), len(layers) - 1)
    residual_of: Callable[[int], torch.Tensor | None] = no_residual
    if sidecar is not None:
        predictor = hybrid(layers, dtype, sidecar)
        table, select = sidecar.token_table, selections(layers[first : first + 1], dtype)[0]
        if not {DEFAULT_VECTORS, ESTIMATOR}.isdisjoint(sidecar.choice):
            residual_of = ResidualTap([layer.norm for layer in layers])
    widths = [asked.prefetch_width or layer.top_k for layer in layers]
    without_waiting = (
        None if sidecar is None or asked.prefetch_width else _widths_without_waiting(sidecar, widths, first)
    )
    return PrefetchGuesses(
        predictor,
        [layer.experts.num_offloaded for layer in layers],
        widths,
        table,
        residual_of,
        select,
        without_waiting,
        _choice_by_tokens(layers[first].router),
        first,
    )


def _check_width(width: int | None, layers: Sequence[MoeLayer]) -> None:
    for layer in layers:
        if width is not None and layer.router is not None and layer.router.logits_at < 0 and width > layer.top_k:
            raise PredictorError(
                f"--prefetch-width {width}: the router of {layer.name} gives no logits, so that its guesses hold the "
                f"{layer.top_k} that it chooses, and no further expert can be ranked. Choose {layer.top_k} at most."
            )


def _choice_by_tokens(router: Router | None) -> Callable[[torch.Tensor], torch.Tensor | None] | None:
    """A function that gives the router's choice for token ids; None where the router reads the hidden state too."""
    if router is None or router.last_call is None or not router.by_tokens:
        return None
    ids_at, run = router.ids_at, router.last_call.run_on_tokens

    def choice(token_ids: torch.Tensor) -> torch.Tensor | None:
        outputs = run(token_ids)
        return None if outputs is None else outputs[ids_at]

    return choice


def _widths_without_waiting(sidecar: Sidecar, widths: Sequence[int], first: int) -> list[int]:
    """Two more than `widths` where the held-out text says that guesses miss much: of layer `first`, which always waits,
    in experts; of the others in gate mass."""
    held_out = sidecar.about.get("held_out", {})
    wider = []
    for layer, width in enumerate(widths):
        name = TOKEN_TABLE if layer == first else sidecar.choice[layer - 1]
        scores = held_out.get(name, {})
        recall, missed = (scores.get(figure, [None] * len(widths))[layer] for figure in ("recall_k", "missed_mass"))
        is_poor = (recall or 1.0) < _GOOD_RECALL if layer == first else (missed or 0.0) > _MUCH_MISSED
        wider.append(width + 2 if is_poor else width)
    return wider


def fitted(layers: Sequence[MoeLayer], dtype: torch.dtype, sidecar: Sidecar) -> dict[str, Predictor]:
    """Every predictor that `layers` (in `dtype`) and `sidecar` allow, by name, simplest first. Those that read the
    residual need a `ResidualTap`."""
    known: dict[str, Predictor] = {
        LOOKAHEAD: lookahead(layers, dtype),
        DEFAULT_VECTORS: default_vectors(layers, sidecar),
        RIDGE: Ridge(sidecar.ridge, selections(layers, dtype)[1:]),
    }
    if sidecar.estimator:
        inputs = estimator_inputs(layers, sidecar.default_vectors)
        known[ESTIMATOR] = Estimator(sidecar.estimator, inputs, [layer.experts.num_offloaded for layer in layers])
    return known


def hybrid(layers: Sequence[MoeLayer], dtype: torch.dtype, sidecar: Sidecar) -> Hybrid:
    """Build, per layer, the predictor of `fitted(layers, dtype, sidecar)` that was best on held-out tokens."""
    return Hybrid(fitted(layers, dtype, sidecar), sidecar.choice)


def lookahead(layers: Sequence[MoeLayer], dtype: torch.dtype) -> RouterLookahead:
    """Run each next layer's router on this layer's router input, for `layers` that compute in `dtype`."""
    following: list[NextRouter | None] = []
    inputs: dict[int, Callable[[], torch.Tensor | None]] = {}
    for layer, after in itertools.pairwise(layers):
        if layer.in_encoder != after.in_encoder or not _same_width(layer.router, after.router):
            following.append(None)
            continue
        assert layer.router is not None, "its input has a width"
        if not layer.router.reads_experts_input:
            inputs[layer.index] = _last_input(layer.router)
        scale = None
        if layer.norm_weight is not None and after.norm_weight is not None:
            # Norms may be kept in fp32 where the router is not.
            scale = (after.norm_weight / layer.norm_weight).to(dtype)
        following.append(own_router(after, scale) or _router_as_last_called(after, scale))
    return RouterLookahead(following, inputs)


def _same_width(router: Router | None, after: Router | None) -> bool:
    return router is not None and after is not None and router.input_width == after.input_width


def _last_input(router: Router) -> Callable[[], torch.Tensor | None]:
    def read() -> torch.Tensor | None:
        return None if router.last_call is None else router.last_call.hidden

    return read


def _router_as_last_called(layer: MoeLayer, scale: torch.Tensor | None) -> NextRouter | None:
    """The layer's router where it takes more than the hidden state: its other arguments are those of its last call."""
    if layer.router is None or layer.router.last_call is None:
        return None
    last_call = layer.router.last_call
    route = last_call.run_on_step if layer.router.by_tokens else last_call.run_ahead
    return _next_router(layer, layer.router, route, scale)


def own_router(layer: MoeLayer, scale: torch.Tensor | None = None) -> NextRouter | None:
    """The layer's router, to run ahead on inputs times `scale` [hidden]; None where it needs more than its input."""
    router = layer.router
    if router is None or router.takes_more_than_hidden:
        return None
    return _next_router(layer, router, router.module.forward, scale)


def _next_router(
    layer: MoeLayer,
    router: Router,
    route: Callable[[torch.Tensor], tuple[torch.Tensor, ...] | None],
    scale: torch.Tensor | None,
) -> NextRouter:
    return NextRouter(
        route,
        router.ids_at,
        router.weights_at,
        router.logits_at,
        layer.experts.num_offloaded,
        scale,
        router.is_sorted,
    )


def selections(layers: Sequence[MoeLayer], dtype: torch.dtype) -> list[Selection]:
    """Decide for each of `layers` how a linear guess in `dtype` is fitted and read."""
    return [selection_of(own_router(layer), layer.router.input_width if layer.router else 0, dtype) for layer in layers]


def default_vectors(layers: Sequence[MoeLayer], sidecar: Sidecar) -> DefaultVectors:
    """The paper's predictor with `sidecar`'s vectors, for `layers` where both residuals after attention are known."""
    states = [quasi_hidden(layers, layer, vectors) for layer, vectors in enumerate(sidecar.default_vectors)]
    return DefaultVectors(states, [*(own_router(layer) for layer in layers[1:]), None])


def quasi_hidden(layers: Sequence[MoeLayer], layer: int, vectors: torch.Tensor | None) -> QuasiHiddenLayer | None:
    """Build the quasi-hidden state of `layers[layer + 1]`; None after a stack's last, or without a norm or `vectors`.

    Args:
        vectors: [experts, hidden] default vectors of `layer`.
    """
    if vectors is None or layer + 1 >= len(layers) or layers[layer].norm is None:
        return None
    after = layers[layer + 1].norm
    if after is None or layers[layer].in_encoder != layers[layer + 1].in_encoder:
        return None
    # `forward` itself, without hooks: the tap on the norm must not take this call for the residual.
    return QuasiHiddenLayer(with_no_expert(vectors), after.forward)


def estimator_inputs(layers: Sequence[MoeLayer], vectors: Sequence[torch.Tensor | None]) -> Inputs:
    """What the estimator reads, [tokens, hidden]: the quasi-hidden state of `layers`, else the router's input.

    vectors: per MoE layer [experts, hidden] default vectors, or None.
    """
    states = [quasi_hidden(layers, layer, entry) for layer, entry in enumerate(vectors)]

    def inputs(layer: int, seen: RouterSample) -> torch.Tensor:
        state = states[layer]
        return seen.hidden if state is None else state(seen)

    return inputs
