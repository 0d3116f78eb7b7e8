"""Hash what a model computes for a prompt, step by step: input and output of each MoE layer's experts, and the logits.

Works alike on transformers' resident model and on one from `foreroute.load`: it needs only the experts modules' names.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from foreroute.engine.interfaces import StepInfo
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.adapters.resident import ResidentBlock
from foreroute.model.caches import cache_argument, cache_of, decoder_call, encode, last_logits_only
from foreroute.model.experts import ExpertsForward
from foreroute.model.generation_settings import decoder_start
from foreroute.verification.slot_watch import SlotUse, SlotWatch, digest


class Exercise(NamedTuple):
    """A prompt [1, tokens], and the number of forward passes: its prefill, and one for each new token but the last."""

    prompt_ids: torch.Tensor
    num_steps: int


class LayerPass(NamedTuple):
    """One MoE layer's experts in one forward pass.

    module: the experts' name in the model.
    hidden, routing, output: hashes of their input [tokens, hidden], of ids and weights [tokens, k], of their output.
    experts: the routed ones, ascending. uses: the slots that they were computed from, in an offloaded model.
    """

    module: str
    hidden: bytes
    routing: bytes
    output: bytes
    experts: tuple[int, ...]
    uses: tuple[SlotUse, ...]


class ForwardPass(NamedTuple):
    """One forward pass: its MoE layers in call order, the last position's logits [vocabulary], the likeliest token.

    has_nan: some logit is NaN.
    """

    layers: tuple[LayerPass, ...]
    logits: bytes
    token: int
    has_nan: bool


@torch.no_grad()
def steps(
    model: PreTrainedModel,
    modules: Sequence[str],
    exercise: Exercise,
    *,
    fed: Sequence[int] | None = None,
    watch: SlotWatch | None = None,
    on_logits: Callable[[torch.Tensor], None] | None = None,
) -> Iterator[ForwardPass]:
    """Prefill the prompt of `exercise` with `model`, then continue token by token with the KV cache.

    An encoder-decoder encodes the prompt and computes its decoder's start token in the first step.

    Args:
        modules: names of the experts modules.
        fed: the tokens to continue with, one per step but the last; the likeliest ones when None.
        watch: records the slots used. on_logits: called with each step's logits [vocabulary].
    """
    options = last_logits_only(model)
    ids, cache, start = exercise.prompt_ids, None, decoder_start(model)
    encoded: Any = None
    with _tapped(model, modules, watch) as passes:
        for at in range(exercise.num_steps):
            if start is not None and encoded is None:
                encoded, ids = encode(model, ids), torch.full((1, 1), start)
            with _announced(model, StepInfo.of("decode" if at else "prefill", ids, is_start=not at)):
                given = {"input_ids": ids} if start is None else decoder_call(ids, encoded)
                out = model(**given, **cache_argument(cache), use_cache=True, **options)
            cache, logits = cache_of(out), out.logits[0, -1]
            token = int(logits.argmax())
            if on_logits is not None:
                on_logits(logits)
            yield ForwardPass(tuple(passes), digest([logits]), token, bool(logits.isnan().any()))
            passes.clear()
            ids = torch.tensor([[token if fed is None else fed[at]]])


def _announced(model: PreTrainedModel, info: StepInfo) -> AbstractContextManager[None]:
    """Announce the step to the model's engine, if it has one, for the call inside."""
    return model.foreroute.step(info) if isinstance(model, OffloadedModel) else nullcontext()


def _noting(name: str, block: ResidentBlock, passes: list[LayerPass]) -> Any:
    """A hook on a resident block with an adapter that adds the call of its experts to `passes`."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen = block.replay(args, kwargs, output)
        # Where the adapter does not give the family's bits, no output of its experts can be right.
        total = digest([seen.total]) if seen.is_same else b""
        routed = tuple(seen.ids.unique().tolist())
        passes.append(LayerPass(name, digest([seen.hidden]), digest([seen.ids, seen.weights]), total, routed, ()))

    return hook


@contextmanager
def _tapped(model: PreTrainedModel, modules: Sequence[str], watch: SlotWatch | None) -> Iterator[list[LayerPass]]:
    """While inside, record every call of an experts module in the list.

    Of our models the engine's call, which a graph that chooses experts makes too: with hooks on their modules it would
    leave the choice to the family's router, and never be looked at.
    """
    passes: list[LayerPass] = []
    inputs: dict[str, tuple[bytes, bytes, tuple[int, ...]]] = {}

    def before(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, ids, weights = (*args, *kwargs.values())
            # Hashed before the call, as the experts could modify their inputs.
            inputs[name] = digest([hidden]), digest([ids, weights]), tuple(ids.unique().tolist())
            if watch is not None:
                watch.take()

        return hook

    def after(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            hidden, routing, experts = inputs.pop(name)
            uses = () if watch is None else watch.take()
            passes.append(LayerPass(name, hidden, routing, digest([output]), experts, uses))

        return hook

    if isinstance(model, OffloadedModel):
        layers = model.foreroute.layers

        def wrapped(layer: int, compute: ExpertsForward) -> ExpertsForward:
            name = layers[layer].name
            hear, note = before(name), after(name)

            def tapped(*args: torch.Tensor) -> torch.Tensor:
                hear(None, args, {})
                output = compute(*args)
                note(None, args, {}, output)
                return output

            return tapped if name in modules else compute

        with model.foreroute.computing(wrapped):
            yield passes
        return
    handles = []
    try:
        for name in modules:
            block = ResidentBlock.of(model, name)
            if block is not None:
                handles.append(block.block.register_forward_hook(_noting(name, block, passes), with_kwargs=True))
                continue
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        yield passes
    finally:
        for handle in handles:
            handle.remove()
