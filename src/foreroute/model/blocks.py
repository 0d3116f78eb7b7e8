"""The probe: one tiny forward pass that finds every MoE block's router, outputs and inputs, never by name.

It starts from the call of the experts, which receives the expert ids: the module that returned that very tensor is the
router, and its other outputs are identified in the same call. What cannot be found is left out, which costs prediction
only: the engine starts at the experts' call in any case.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from foreroute.errors import CheckpointError, UnsupportedModelError, named
from foreroute.model.experts import OffloadedExperts
from foreroute.model.hooks import LastCall, StepTokens, chooses_by_tokens

# Odd, so that no other extent of the shapes below is mistaken for the number of tokens.
_PROBE_TOKENS = 5


@dataclass(frozen=True)
class Router:
    """A block's router and the positions of its outputs.

    ids_at, weights_at, logits_at: positions in the router's returned tuple; logits_at is -1 without logits.
    takes_more_than_hidden: the block passes further arguments, so that it cannot be run ahead by hidden state alone.
    input_width: of its input. reads_experts_input: its input is the tensor that the experts get.
    is_sorted: its choice came best first. by_tokens: it chooses by token ids alone, as hash routers do.
    last_call: its latest arguments; kept for routers that take more, or read another tensor than the experts.
    """

    name: str
    module: nn.Module
    ids_at: int
    weights_at: int
    logits_at: int
    takes_more_than_hidden: bool
    input_width: int
    reads_experts_input: bool
    is_sorted: bool
    by_tokens: bool = False
    last_call: LastCall | None = None


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer as the probe found it; layers are in the order of the model's calls.

    top_k: experts per token in a real routing, whatever the config says.
    router: None when the block computes its routing inline.
    norm_weight: [hidden] scale of the norm in front of the router, when that is a plain RMS norm.
    norm: that norm, of any kind, when it reads the residual stream that the block's output is added to.
    in_encoder: it belongs to the encoder of an encoder-decoder, which runs with the prompt and in no later step.
    """

    index: int
    name: str
    experts: OffloadedExperts
    top_k: int
    router: Router | None
    norm_weight: torch.Tensor | None
    norm: nn.Module | None = None
    in_encoder: bool = False


def first_decoded(layers: Sequence[MoeLayer]) -> int:
    """Index of the first of `layers` that a decoded token passes; their number where only the encoder has experts."""
    return sum(layer.in_encoder for layer in layers)


@dataclass
class _Calls:
    """Modules run since the last experts call, with their inputs and outputs, in order.

    norm, residual: the module that made the last router's input, and its own input; None without one.
    """

    records: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    norm: nn.Module | None = None
    residual: torch.Tensor | None = None


def probe(model: nn.Module, offloaded: dict[str, OffloadedExperts]) -> list[MoeLayer]:
    """Run a few tokens through the model without experts, and describe its MoE layers.

    Args:
        model: the loaded skeleton; its experts return zeros while the probe runs.
        offloaded: its experts modules by name.
    Returns:
        The layers in call order, which defines the order of MoE layers everywhere.
    Raises:
        UnsupportedModelError: some experts are never called by a plain forward, or several times.
        CheckpointError: the model cannot compute a token as its config has it, or chooses no expert.
    """
    calls = _Calls()
    layers: list[MoeLayer] = []

    def on_experts(name: str, module: OffloadedExperts) -> Callable[..., torch.Tensor]:
        def forward(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            if any(layer.name == name for layer in layers):
                raise UnsupportedModelError(
                    f"The model passes {name} several times for one token; foreroute plans memory and guesses for "
                    "layers that are passed once. Run it with transformers itself."
                )
            if layers:
                layers[-1] = _with_norm(layers[-1], calls)
            layers.append(_describe(len(layers), name, module, calls, hidden, ids, weights))
            calls.records.clear()
            return torch.zeros_like(hidden)

        return forward

    def on_module(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.records.append((name, module, args, kwargs, output))

        return hook

    handles = [m.register_forward_hook(on_module(name), with_kwargs=True) for name, m in model.named_modules()]
    try:
        for name, module in offloaded.items():
            module.engine_forward = on_experts(name, module)
        source = getattr(model, "name_or_path", "") or "The model"
        with (
            torch.no_grad(),
            named(f"{source}: a model as config.json describes it computes no token", CheckpointError),
        ):
            device = next(model.parameters()).device
            ids = _probe_ids().to(device).unsqueeze(0)
            decoder = {"decoder_input_ids": ids} if is_encoder_decoder(model) else {}
            logits = model(input_ids=ids, use_cache=False, **decoder).logits
            _check_numbers(logits, source)
        if layers:
            layers[-1] = _with_norm(layers[-1], calls)
    finally:
        for handle in handles:
            handle.remove()
        for module in offloaded.values():
            module.engine_forward = None
    silent = sorted(set(offloaded) - {layer.name for layer in layers})
    if silent:
        raise UnsupportedModelError(
            f"{silent[0]} is not called by a forward over text: its experts cannot be offloaded."
        )
    _check_choice(layers, source)
    return _with_last_calls(_with_encoder(layers, model), model)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether an encoder reads the prompt and a decoder of its own writes the answer."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _with_encoder(layers: list[MoeLayer], model: nn.Module) -> list[MoeLayer]:
    if not is_encoder_decoder(model):
        return layers
    encoder = model.get_encoder()  # type: ignore[operator]
    inside = {id(module) for module in encoder.modules()}
    return [replace(layer, in_encoder=id(layer.experts) in inside) for layer in layers]


def _check_numbers(logits: torch.Tensor, source: str) -> None:
    """Raises CheckpointError if logits [1, tokens, vocabulary] are not finite, though no expert took part."""
    if bool(logits.isnan().any()):
        raise CheckpointError(
            f"{source}: without its experts the model computes NaN: its dense weights are damaged, a number in "
            "config.json is wrong, or the compute dtype is too narrow for them (try --dtype float32)."
        )


def _check_choice(layers: list[MoeLayer], source: str) -> None:
    for layer in layers:
        num_experts = layer.experts.num_offloaded
        if not 0 < layer.top_k <= num_experts:
            raise CheckpointError(
                f"{source}: {layer.name} has {num_experts} experts; config.json chooses {layer.top_k} for a token."
            )


def _probe_ids() -> torch.Tensor:
    return torch.arange(1, _PROBE_TOKENS + 1)


def _with_last_calls(layers: list[MoeLayer], model: nn.Module) -> list[MoeLayer]:
    tokens: StepTokens | None = None
    made: list[MoeLayer] = []
    for layer in layers:
        router = layer.router
        if router is not None and (router.takes_more_than_hidden or not router.reads_experts_input):
            tokens = tokens or StepTokens(model.get_input_embeddings())  # type: ignore[operator]
            layer = replace(layer, router=replace(router, last_call=LastCall(router.module, tokens)))
        made.append(layer)
    return made


def on_device(layers: list[MoeLayer], device: torch.device) -> list[MoeLayer]:
    """Replace the weights that the probe kept in `layers` once the model has been moved to `device`."""
    return [
        layer if layer.norm_weight is None else replace(layer, norm_weight=layer.norm_weight.to(device))
        for layer in layers
    ]


def _describe(
    index: int,
    name: str,
    module: OffloadedExperts,
    calls: _Calls,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> MoeLayer:
    router = _find_router(calls, module, hidden, ids, weights)
    norm_weight = None
    calls.norm = calls.residual = None
    if router is not None:
        inputs = next(args for n, _, args, _, _ in calls.records if n == router.name)
        norm_weight = _find_norm_weight(calls, inputs[0] if inputs else hidden)
        _note_norm(calls, inputs[0] if inputs else hidden)
    return MoeLayer(index, name, module, int(ids.shape[-1]), router, norm_weight)


def _same(left: Any, right: torch.Tensor) -> bool:
    return isinstance(left, torch.Tensor) and left.data_ptr() == right.data_ptr() and left.dtype == right.dtype


def _find_router(
    calls: _Calls, experts: OffloadedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> Router | None:
    for name, module, args, kwargs, output in reversed(calls.records):
        if not isinstance(output, tuple):
            continue
        at = {_role(value, experts, ids, weights): position for position, value in enumerate(output)}
        if "ids" not in at:
            continue
        if "weights" not in at:
            return None
        more = len(args) != 1 or bool(kwargs)
        return Router(
            name,
            module,
            at["ids"],
            at["weights"],
            at.get("logits", -1),
            takes_more_than_hidden=more,
            input_width=int(args[0].shape[-1]) if args else hidden.shape[-1],
            reads_experts_input=_same((*args, None)[0], hidden),
            is_sorted=bool((weights.diff(dim=-1) <= 0).all()),
            by_tokens=more and chooses_by_tokens(module, args, kwargs, at["ids"], _probe_ids()),
        )
    return None


def _role(value: Any, experts: OffloadedExperts, ids: torch.Tensor, weights: torch.Tensor) -> str:
    if not isinstance(value, torch.Tensor):
        return "other"
    if value.dtype == torch.int64 and value.shape == ids.shape and torch.equal(value, ids):
        return "ids"
    if value.is_floating_point() and value.shape == weights.shape and torch.equal(value, weights):
        return "weights"
    if value.is_floating_point() and value.ndim == 2 and value.shape[-1] >= experts.num_offloaded:
        return "logits"
    return "other"


def _note_norm(calls: _Calls, router_input: torch.Tensor) -> None:
    """Remember the module that made the router's input; after the block it shows whether that read the residual."""
    for _, module, args, _, output in reversed(calls.records):
        if _same(output, router_input) and len(args) == 1 and args[0].shape[-1] == router_input.shape[-1]:
            calls.norm, calls.residual = module, args[0].clone()
            return


def _with_norm(layer: MoeLayer, calls: _Calls) -> MoeLayer:
    """Add the norm to `layer`, if the norm's input is what the block's output was added to."""
    if calls.norm is None or calls.residual is None:
        return layer
    residual, enclosing = calls.residual, []
    for name, _, _, _, output in calls.records:
        first = output[0] if isinstance(output, tuple) and output else output
        if layer.name.startswith(name + ".") and isinstance(first, torch.Tensor) and first.numel() == residual.numel():
            enclosing.append(first.reshape(residual.shape).float())
    if len(enclosing) < 2:
        return layer
    # Innermost first: the block's own output, then that of the enclosing layer.
    of_block, of_layer = enclosing[:2]
    is_added = torch.allclose(of_layer - residual.float(), of_block, rtol=2e-2, atol=1e-3)
    return replace(layer, norm=calls.norm) if is_added else layer


def _find_norm_weight(calls: _Calls, router_input: torch.Tensor) -> torch.Tensor | None:
    """The weight of the norm that made the router's input, if it is a plain RMS norm: x = r / rms(r) * weight."""
    for _, module, args, _, output in reversed(calls.records):
        weight = getattr(module, "weight", None)
        if not _same(output, router_input) or not isinstance(weight, torch.Tensor) or weight.ndim != 1 or not args:
            continue
        residual = args[0].float()
        scaled = residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()
        is_rms = torch.allclose(scaled, output.float(), rtol=2e-2, atol=1e-3)
        return weight.detach() if is_rms and bool((weight != 0).all()) else None
    return None
