"""Decoder layers of usual form in graphs beside experts, where a model's bits need not be transformers'.

The form: h = x + attention(norm(x)); h + experts(norm(h)), where attention makes q, k and v by a product each, turns q
and k by their positions, and asks transformers' interface for its function. Whether a family has it is seen by numbers.
One row's token that sees all before it is one graph up to its experts; several rows, masks that hide tokens, and
several tokens of one row that are verified are two graphs and attention in between.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import NoneType
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foreroute.kernels.ggml.decoder.layer import AfterGraph, BeforeGraph, Chosen, LayerGraph
from foreroute.kernels.ggml.decoder.parts import AfterAttention, Attention, BeforeAttention, Buffers, Norm
from foreroute.kernels.ggml.linear import BlockLinear, BlockProducts, RouterWeight
from foreroute.model.blocks import MoeLayer
from foreroute.model.decode.as_made import AsMade
from foreroute.model.decode.attention import attends_by_interface, function_of, sees_all
from foreroute.model.decode.kept_tokens import room_of
from foreroute.model.decode.norms import fused_norm
from foreroute.model.decode.positions import NAME as BY_POSITION
from foreroute.model.decode.positions import attend as attend_by_position
from foreroute.model.decode.routes import RoutedExperts, routed_experts
from foreroute.model.hooks import ResidualHook

# Products of blocks round their inputs to 8 bits: what differs in the last bit before may differ by this after.
_MOST_DIFFERENCE = 5e-3
_STEPS, _ROWS = 3, 3
# Graphs kept of a layer: one for each number of rows.
_MOST_GRAPHS = 32
_NORMS = ("input_layernorm", "post_attention_layernorm")
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")


def fuse_layers(model: PreTrainedModel, products: BlockProducts) -> int:
    """Let graphs compute the decoder layers of `model` that have the form, while tokens are decoded.

    One layer of each class and settings is compared with transformers' own on random rows.

    Returns:
        how many layers.
    """
    if not attends_by_interface(model):
        return 0
    decoder, is_alike, num_fused, shared = model.get_decoder(), dict[object, bool](), 0, _Shared(products)
    for layer in getattr(decoder, "layers", ()):
        parts = _parts(layer)
        if parts is None:
            continue
        fused = _FusedLayer(layer, *parts, shared)
        form = (type(layer), parts[0].bias is None, *_settings(layer), *_settings(layer.self_attn))
        if form not in is_alike:
            is_alike[form] = _is_alike(model, decoder, layer, fused)
        if is_alike[form]:
            # In the instance's own table, where nn.Module looks first.
            layer.__dict__["forward"] = fused
            num_fused += 1
    return num_fused


def _settings(module: Any) -> tuple[object, ...]:
    """What a module is set to, but for its number: whether it turns by positions, its window, its scales."""
    return tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str, NoneType)) and name != "layer_idx"
    )


def fuse_routers(model: PreTrainedModel, layers: Sequence[MoeLayer]) -> None:
    """Let the graphs of fused layers compute the one `RouterWeight` of their experts too, and choose where they can."""
    by_experts = {id(one.experts): one for one in layers}
    for layer in getattr(model.get_decoder(), "layers", ()):
        fused = layer.__dict__.get("forward")
        if isinstance(fused, _FusedLayer):
            weights = [one for one in layer.mlp.parameters() if isinstance(one, RouterWeight)]
            found = [by_experts[id(one)] for one in layer.mlp.modules() if id(one) in by_experts]
            if len(weights) == 1:
                routed = routed_experts(layer.mlp, found[0], weights[0]) if len(found) == 1 else None
                fused.take_router(weights[0], routed)


class _Shared:
    """What the fused layers of a model have in common: products, memory, and the angles of the current step."""

    def __init__(self, products: BlockProducts) -> None:
        self.products, self.buffers = products, Buffers()
        self._given: Any = None
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def angles(self, given: Any, num_rows: int, num_positions: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [rows or 1, positions, width] as [rows x positions, width] each; layers are given the
        same."""
        if self._angles is None or given is not self._given or len(self._angles[0]) != num_rows * num_positions:
            cosine, sine = (one.expand(num_rows, -1, -1).flatten(0, 1).float().contiguous() for one in given)
            self._given, self._angles = given, (cosine, sine)
        return self._angles


class _FusedLayer:
    """Computes one decoder layer: by graphs while tokens are decoded, else by transformers' own code."""

    def __init__(self, layer: Any, before: BeforeAttention, after: AfterAttention, shared: _Shared) -> None:
        # Without a cycle, the layer's memory is freed with the model.
        self._layer = weakref.ref(layer)
        self._attention, self._norm, self._mlp = layer.self_attn, layer.post_attention_layernorm, layer.mlp
        self._before, self._after, self._shared = before, after, shared
        self._graphs: dict[tuple[int, int], tuple[BeforeGraph, AfterGraph]] = {}
        self._whole: dict[int, LayerGraph] = {}
        self._router: RouterWeight | None = None
        self._routed: RoutedExperts | None = None
        attention = layer.self_attn
        replaced = [layer.input_layernorm, *attention.modules()]
        self._is_as_made = AsMade(replaced)
        self._own = [(layer._modules, name, child) for name, child in layer._modules.items()]
        self._own += [(self._norm._parameters, name, one) for name, one in self._norm._parameters.items()]
        self._own.append((self._norm.__dict__, "forward", self._norm.__dict__.get("forward")))
        self._usual = {
            "dropout": 0.0,
            "scaling": attention.scaling,
            "sliding_window": getattr(attention, "sliding_window", None),
            **({"s_aux": attention.sinks} if hasattr(attention, "sinks") else {}),
        }
        sinks = attention.sinks.detach().float().contiguous() if hasattr(attention, "sinks") else None
        self._scores = Attention(attention.scaling, sinks)

    def take_router(self, weight: RouterWeight, routed: RoutedExperts | None) -> None:
        """From now on compute the product of the layer's router too; and its choice, if `routed` says how."""
        self._router, self._routed = weight, routed
        self._after = replace(self._after, router=weight.matrix, route=None if routed is None else routed.route)
        self._graphs.clear()
        self._whole.clear()

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own `forward`."""
        is_decoded = not args and self._shared.products.decodes()
        if hidden_states.shape[1] > 1:
            # The one way that computes several tokens of one row, which are verified.
            is_decoded = is_decoded and self._attention.config._attn_implementation == BY_POSITION
        if not is_decoded or hidden_states.dtype != torch.float32 or self._is_changed():
            layer: Any = self._layer()
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        return self.compute(hidden_states, **kwargs)

    def _is_changed(self) -> bool:
        """Whether modules that graphs stand for were changed, or have hooks: transformers adds some where attention's
        weights are asked for. The residual tap's is called here."""
        for table, name, value in self._own:
            if table.get(name) is not value:
                return True
        hooks = self._norm._forward_pre_hooks
        return (
            not self._is_as_made()
            or bool(self._norm._forward_hooks)
            or (bool(hooks) and not all(isinstance(hook, ResidualHook) for hook in hooks.values()))
        )

    def compute(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute [rows, 1, width], or [1, positions, width], by graphs. Arguments: of transformers' decoder layers."""
        num_rows, num_positions, width = hidden_states.shape
        residual = hidden_states.contiguous().view(-1, 1, width)
        cosine, sine = self._shared.angles(position_embeddings, num_rows, num_positions)
        cache = past_key_values if cache is None else cache
        chosen = self._compute_whole(residual, attention_mask, cache, cosine, sine)
        if chosen is None:
            chosen = self._compute_parts(residual, attention_mask, cache, cosine, sine, kwargs, num_positions)
        if num_positions > 1:
            chosen = chosen.of_positions()
        for hook in self._norm._forward_pre_hooks.values():
            hook(self._norm, (chosen.stream,))
        if self._routed is not None and self._routed.is_plain():
            return chosen.stream + self._routed(chosen.normed, chosen.ids, chosen.weights)
        if self._router is not None and self._routed is None:
            self._router.ready = (chosen.normed, chosen.scores)
        out = self._mlp(chosen.normed)
        return chosen.stream + (out[0] if isinstance(out, tuple) else out)

    def _compute_whole(
        self, x: torch.Tensor, mask: Any, cache: Any, cosine: torch.Tensor, sine: torch.Tensor
    ) -> Chosen | None:
        """The same up to its experts, as one graph; None where there are several rows, or a mask that hides
        tokens."""
        attention = self._attention
        queries, shared, _ = self._before.heads
        found = room_of(cache, attention.layer_idx, 1) if len(x) == 1 and queries > shared else None
        if found is None or not sees_all(attention, mask):
            return None
        layer, room = found
        cosines = cosine.shape[1]
        graph = self._whole.get(cosines)
        if graph is None:
            graph = self._whole[cosines] = LayerGraph(
                self._shared.products.runner, self._before, self._scores, self._after, cosines, self._shared.buffers
            )
        chosen = graph.run(x, cosine, sine, room.tokens())
        room.written(layer)
        return chosen

    def _compute_parts(
        self,
        x: torch.Tensor,
        mask: Any,
        cache: Any,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        given: Any,
        num_positions: int,
    ) -> Chosen:
        """The same as two graphs, with attention's own function in between; x: [rows x positions, 1, width]."""
        attention = self._attention
        before, after = self._graphs_of(len(x), cosine.shape[1])
        query, keys, values = before.run(x, cosine, sine)
        if num_positions > 1:
            # The row's positions, as attention takes them.
            query, keys, values = (one.permute(2, 1, 0, 3) for one in (query, keys, values))
        found = room_of(cache, attention.layer_idx, len(keys), num_positions)
        if found is not None:
            keys, values = found[1].append(found[0], keys, values)
        elif cache is not None:
            keys, values = cache.update(keys, values, attention.layer_idx)
        name = attention.config._attn_implementation
        if num_positions > 1:
            attend: Any = attend_by_position
        else:
            attend = function_of(attention, name) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        attended, _ = attend(attention, query, keys, values, mask, **self._usual, **given)
        return after.run(attended.contiguous(), x)

    def _graphs_of(self, num_rows: int, cosines: int) -> tuple[BeforeGraph, AfterGraph]:
        graphs = self._graphs.get((num_rows, cosines))
        if graphs is None:
            if len(self._graphs) >= _MOST_GRAPHS:
                self._graphs.clear()
            runner, buffers = self._shared.products.runner, self._shared.buffers
            graphs = (
                BeforeGraph(runner, self._before, num_rows, cosines, buffers),
                AfterGraph(runner, self._after, num_rows, buffers),
            )
            self._graphs[num_rows, cosines] = graphs
        return graphs


def _parts(layer: Any) -> tuple[BeforeAttention, AfterAttention] | None:
    """What the layer's graphs compute; None where it lacks the form's modules."""
    attention = getattr(layer, "self_attn", None)
    matrices = [one for name in _MATRICES if type(one := getattr(attention, name, None)) is BlockLinear]
    norms = [norm for name in _NORMS if (norm := _norm_of(getattr(layer, name, None))) is not None]
    size = getattr(attention, "head_dim", None)
    if len(matrices) < len(_MATRICES) or len(norms) < len(_NORMS) or not hasattr(layer, "mlp"):
        return None
    if not isinstance(size, int) or size % 2 or not hasattr(attention, "scaling"):
        return None
    q, k, v, o = matrices
    heads = (q.out_features // size, k.out_features // size, v.out_features // size)
    head_norm, is_usual = _head_norm(attention, heads, size)
    biases = [one.bias.detach().float() for one in (q, k, v) if one.bias is not None]
    if not is_usual or o.in_features != heads[0] * size or len(biases) not in (0, len(heads)):
        return None
    bias = torch.cat(biases) if biases else None
    before = BeforeAttention(norms[0], (q.matrix, k.matrix, v.matrix), bias, heads, size, head_norm)
    return before, AfterAttention(o.matrix, None if o.bias is None else o.bias.detach().float(), norms[1])


def _norm_of(module: Any) -> Norm | None:
    found = fused_norm(module)
    return None if found is None else Norm(*found)


def _head_norm(attention: Any, heads: tuple[int, int, int], size: int) -> tuple[Norm | None, bool]:
    """The norm of the heads of q and k, if there is one; and whether it is of the usual form, or absent."""
    modules = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if modules == [None, None]:
        return None, True
    query, key = (_norm_of(one) for one in modules)
    if query is None or key is None or query.epsilon != key.epsilon:
        return None, False
    if query.weight.shape != (size,) or key.weight.shape != (size,):
        return None, False
    weights = [one.weight.expand(num, size) for one, num in zip((query, key), heads, strict=False)]
    return Norm(torch.cat(weights).contiguous(), query.epsilon), True


@torch.no_grad()
def _is_alike(model: PreTrainedModel, decoder: Any, layer: Any, fused: _FusedLayer) -> bool:
    """Whether graphs give what the layer's own code gives."""
    for has_scores in (False, True):
        try:
            with _without_experts(layer, has_scores):
                return _is_near(model, decoder, layer, fused)
        except (TypeError, ValueError, AttributeError, RuntimeError):
            continue  # router scores are wanted beside experts' outputs; or other arguments, other shapes
    return False


def _is_near(model: PreTrainedModel, decoder: Any, layer: Any, fused: _FusedLayer) -> bool:
    """The same for tokens of one row and of some, one after the other. Raises what the layer's code may raise."""
    # More rows than a pair: what unpacks one must not unpack them.
    return all(_is_near_in(model, decoder, layer, fused, num_rows) for num_rows in (1, _ROWS))


def _is_near_in(model: PreTrainedModel, decoder: Any, layer: Any, fused: _FusedLayer, num_rows: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    caches = [DynamicCache(config=model.config.get_text_config(decoder=True)) for _ in range(2)]
    for at in range(_STEPS):
        hidden = torch.randn(num_rows, 1, layer.self_attn.o_proj.out_features, generator=generator, dtype=torch.float32)
        angles = decoder.rotary_emb(hidden, at + torch.arange(num_rows)[:, None])
        given = {"attention_mask": None, "position_embeddings": angles, "use_cache": True}
        theirs = type(layer).forward(layer, hidden, cache=caches[0], **given)
        ours = fused.compute(hidden, cache=caches[1], **given)
        if not isinstance(theirs, torch.Tensor) or theirs.shape != ours.shape:
            return False
        if not float((theirs - ours).norm()) < _MOST_DIFFERENCE * float(theirs.norm()):
            return False
    return True


@contextmanager
def _without_experts(layer: Any, has_scores: bool) -> Iterator[None]:
    """Inside, the layer's experts return their inputs, and router scores beside them if `has_scores`."""
    table = layer.mlp.__dict__
    own = {name: table.pop(name) for name in ("forward",) if name in table}
    table["forward"] = lambda x, *args, **kwargs: (x, None) if has_scores else x
    try:
        yield
    finally:
        table.pop("forward")
        table.update(own)
