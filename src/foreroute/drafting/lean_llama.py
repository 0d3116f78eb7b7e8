"""A small Llama's next-token scores with few calls: of a model that the processor's caches hold, calls are the cost.

transformers' forward of two layers takes 1.3 ms a token, most of it Python's; this takes a quarter. Whether a model is
of this form is seen by numbers.
"""

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

# Tokens that the two forwards are compared on, and the most that they may differ by, as a share.
_COMPARED, _MOST_DIFFERENCE = 12, 1e-3
# Tokens by which the cache grows.
_MORE_TOKENS = 256


class _Layer:
    """One layer's weights, with those of one input in one matrix."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.projections = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out, self.down = attention.o_proj.weight, mlp.down_proj.weight
        self.gate_up = _joined(mlp.gate_proj, mlp.up_proj)
        self.norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight


def _joined(*projections: Any) -> torch.Tensor:
    """The weights of layers with one input, in one matrix. Theirs are parts of it from now on: memory has them once."""
    joined = torch.cat([one.weight.data for one in projections])
    parts = joined.split([len(one.weight) for one in projections])
    for one, part in zip(projections, parts, strict=True):
        one.weight.data = part
    return joined


class LeanLlama:
    """Computes tokens after those before, keeping keys and values.

    Args:
        model: a Llama of transformers in float32, without biases, with the usual rotary embedding.

    Attributes:
        length: tokens held; to lower it takes the last ones back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        inner: Any = model.get_decoder()
        self._rotary = inner.rotary_emb
        self._layers = [_Layer(layer) for layer in inner.layers]
        self._embedding, self._head = inner.embed_tokens.weight, model.get_output_embeddings().weight
        self._norm, self._epsilon = inner.norm.weight, config.rms_norm_eps
        self._size = config.head_dim
        self._heads, self._shared = config.num_attention_heads, config.num_key_value_heads
        self._scale = self._size**-0.5
        self.length = 0
        self._kept: list[torch.Tensor]  # of each layer: keys and values [2, heads, tokens, numbers of a head]
        self._angles: tuple[torch.Tensor, torch.Tensor]
        self.begin()

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        """Add `tokens`; return the scores [vocabulary] after the last."""
        count, start = len(tokens), self.length
        end = start + count
        if end > self._kept[0].shape[2]:
            self._grow(end + _MORE_TOKENS)
        cosine, sine = (one[start:end, None] for one in self._angles)
        x = F.embedding(torch.tensor(tokens), self._embedding)
        mask = None
        if count > 1:
            mask = torch.ones(count, end, dtype=torch.bool).tril(start)
        for layer, kept in zip(self._layers, self._kept, strict=True):
            made = F.linear(self._normed(x, layer.norms[0]), layer.projections).view(count, -1, self._size)
            turned = made[:, : self._heads + self._shared]
            first, second = turned.chunk(2, -1)
            turned = turned * cosine + torch.cat((-second, first), -1) * sine
            kept[0, :, start:end] = turned[:, self._heads :].transpose(0, 1)
            kept[1, :, start:end] = made[:, self._heads + self._shared :].transpose(0, 1)
            attended = F.scaled_dot_product_attention(
                turned[:, : self._heads].transpose(0, 1)[None], kept[None, 0, :, :end], kept[None, 1, :, :end],
                attn_mask=mask, scale=self._scale, enable_gqa=self._heads != self._shared,
            )  # fmt: skip
            x = x + F.linear(attended[0].transpose(0, 1).reshape(count, -1), layer.out)
            gate, up = F.linear(self._normed(x, layer.norms[1]), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        self.length = end
        return F.linear(self._normed(x[-1], self._norm), self._head)

    def another(self) -> "LeanLlama":
        """The same weights, for another text."""
        other = copy.copy(self)
        other.begin()
        return other

    def begin(self) -> None:
        """Empty the cache."""
        self.length = 0
        self._kept = [torch.empty(2, self._shared, 0, self._size, dtype=torch.float32) for _ in self._layers]
        self._angles = self._angles_of(0)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self._epsilon)

    def _grow(self, tokens: int) -> None:
        for at, old in enumerate(self._kept):
            # One layer after the other: what exists twice is a layer's.
            self._kept[at] = torch.empty(2, self._shared, tokens, self._size, dtype=torch.float32)
            self._kept[at][:, :, : self.length] = old[:, :, : self.length]
        self._angles = self._angles_of(tokens)

    def _angles_of(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        cosine, sine = self._rotary(self._embedding, torch.arange(tokens)[None])
        return cosine[0], sine[0]


# A model's weights are put together and compared once, however many texts it drafts.
_MADE: "WeakKeyDictionary[PreTrainedModel, LeanLlama | None]" = WeakKeyDictionary()


def lean_llama(model: PreTrainedModel) -> LeanLlama | None:
    """A lean forward of `model` for one text; None where it is of another form, or gives other scores."""
    if model not in _MADE:
        _MADE[model] = _compared(model)
    made = _MADE[model]
    return None if made is None else made.another()


@torch.no_grad()
def _compared(model: PreTrainedModel) -> LeanLlama | None:
    if model.config.model_type != "llama" or model.dtype != torch.float32:
        return None
    try:
        lean = LeanLlama(model)
        tokens = torch.arange(_COMPARED) * 7 % model.config.vocab_size
        theirs = model(tokens[None]).logits[0, -1]
        lean(tokens[:-2].tolist())
        lean(tokens[-2:-1].tolist())
        ours = lean(tokens[-1:].tolist())
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    is_near = float((ours - theirs).norm()) < _MOST_DIFFERENCE * float(theirs.norm())
    return lean if is_near else None
