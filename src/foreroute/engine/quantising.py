"""From experts as the checkpoint stores them to experts as a quantised store holds them, one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from foreroute.checkpoint.codecs import Codec, encoded_table
from foreroute.checkpoint.layouts import ExpertTable, Part
from foreroute.engine.memory import TORCH_DTYPES
from foreroute.errors import StoreError, UnsupportedModelError
from foreroute.kernels.cpu import ExpertMath
from foreroute.kernels.quant import Matrix, QuantisedMath, decode, encode, order_of, quantised


@dataclass
class LayerError:
    """How far a layer's quantised matrices are from its own: sums of squares over what was measured."""

    lost: float = 0.0
    whole: float = 0.0

    @property
    def relative(self) -> float:
        """The error of an output for inputs without a direction, as a share of the output: root mean square."""
        return (self.lost / self.whole) ** 0.5 if self.whole else 0.0


@dataclass
class Quantiser:
    """Encodes experts of `source` for a store.

    source: the experts as the checkpoint stores them. is_transposed: per layer, matrices are stored as [in, out].
    measured: of each layer so many experts are turned back and compared.
    """

    source: ExpertTable
    codec: Codec
    is_transposed: Sequence[bool]
    measured: int = 4
    errors: list[LayerError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = encoded_table(self.source, self.codec, self.is_transposed)
        self.order = order_of(self.codec.bits, self.codec.group)
        self.errors = [LayerError() for _ in self.table.layers]
        self._payload = bytearray(self.table.slot_bytes)

    @property
    def is_measured(self) -> bool:
        """Every layer's error is known; not after a pack that went on in the middle of a layer or behind it."""
        return all(error.whole for error in self.errors)

    def encode(self, layer: int, expert: int, slot: memoryview) -> memoryview:
        """The record of the expert whose own bytes are in `slot`; good until the next call."""
        self._payload[:] = bytes(len(self._payload))
        target = iter(self.table.layers[layer].layout.parts)
        for part in self.source.layers[layer].layout.parts:
            tensor = _tensor(slot, part)
            if len(part.shape) == 1:
                self._put(next(target), tensor.bfloat16())
                continue
            weights = (tensor.t() if self.is_transposed[layer] else tensor).contiguous()
            values, scales = encode(weights, self.codec.bits, self.codec.group)
            self._put(next(target), values)
            self._put(next(target), scales)
            if expert < self.measured:
                self._measure(layer, weights, Matrix(values, scales, self.codec.bits, self.codec.group))
        return memoryview(self._payload)

    def _put(self, part: Part, tensor: torch.Tensor) -> None:
        raw = tensor.contiguous().view(torch.uint8).flatten().numpy().tobytes()
        assert (tuple(tensor.shape), len(raw)) == (part.shape, part.nbytes), f"{part} is not {tuple(tensor.shape)}"
        self._payload[part.offset : part.offset + part.nbytes] = raw

    def _measure(self, layer: int, weights: torch.Tensor, matrix: Matrix) -> None:
        back = decode(matrix).t().float()
        self.errors[layer].lost += float((back - weights.float()).square().sum())
        self.errors[layer].whole += float(weights.float().square().sum())


def _tensor(slot: memoryview, part: Part) -> torch.Tensor:
    dtype = TORCH_DTYPES[part.dtype]
    return torch.frombuffer(slot, dtype=dtype, count=part.nbytes // dtype.itemsize, offset=part.offset).view(part.shape)


def math_of(
    codec: Codec, order: str, math: Sequence[ExpertMath | None], source: ExpertTable, compute_dtype: torch.dtype
) -> list[QuantisedMath]:
    """Each layer's maths over quantised parts.

    Args:
        order: of the store. math: the families' own. source: the experts as the checkpoint stores them.
    Raises:
        UnsupportedModelError: a family whose maths is not known here.
        StoreError: the store was packed on another kind of CPU, or the compute dtype is not bfloat16.
    """
    if order != order_of(codec.bits, codec.group):
        raise StoreError(
            f"The {codec.name} store was packed on another kind of CPU, whose kernels want another order of numbers. "
            "Pack again here: `foreroute pack --force`."
        )
    if compute_dtype != torch.bfloat16:
        raise StoreError(
            f"A store of {codec.name} experts is computed in bfloat16, and the model in "
            f"{str(compute_dtype).removeprefix('torch.')}. Give --dtype bfloat16, or --packed no."
        )
    made = []
    for layer, entry in zip(source.layers, math, strict=True):
        if entry is None:
            raise UnsupportedModelError(
                f"{layer.name}: how this family computes an expert is not known. Use --packed no."
            )
        made.append(quantised(entry, [min(len(part.shape), 2) for part in layer.layout.parts], codec.bits, codec.group))
    return made
