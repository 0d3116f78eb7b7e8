"""From experts as the checkpoint stores them to experts as a quantised store holds them, one at a time."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from foreroute.checkpoint.codecs import BITS, CODECS, Codec, encoded_table
from foreroute.checkpoint.layouts import ExpertTable, Part
from foreroute.errors import UnsupportedModelError
from foreroute.kernels.slot_views import TORCH_DTYPES
from foreroute.kernels.torch.dequantise import Workspaces, decode_part
from foreroute.kernels.torch.quant import Matrix, decode, encode, order_of


@dataclass
class LayerError:
    """How far a layer's quantised matrices are from its own: sums of squares over what was measured.

    measured: experts that were; of each codec by itself.
    """

    lost: float = 0.0
    whole: float = 0.0
    measured: dict[str, int] = field(default_factory=dict)

    @property
    def relative(self) -> float:
        """The error of an output for inputs without a direction, as a share of the output: root mean square."""
        return (self.lost / self.whole) ** 0.5 if self.whole else 0.0


@dataclass
class Quantiser:
    """Encodes experts of `source` for a store.

    source: the experts as the checkpoint stores them. is_transposed: per layer, matrices are stored as [in, out].
    measured: of each layer, and of each codec in it, so many experts are turned back and compared.
    often: per layer the experts used most, for a codec that gives them more bits. choice: how they were chosen; kept in
    the store's header.

    Raises:
        StoreError: a matrix whose shape the codec cannot take.
        UnsupportedModelError: a family whose experts could be packed so, and not computed.
    """

    source: ExpertTable
    codec: Codec
    is_transposed: Sequence[bool]
    measured: int = 4
    often: Sequence[Collection[int]] = ()
    choice: Mapping[str, Any] = field(default_factory=dict)
    errors: list[LayerError] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_family(self.source)
        self.table = encoded_table(self.source, self.codec, self.is_transposed, self.often)
        self.order = order_of(self.codec.bits, self.codec.group)
        self.errors = [LayerError() for _ in self.table.layers]
        self._payload = bytearray(self.table.slot_bytes)
        self._workspaces = Workspaces()

    @property
    def is_measured(self) -> bool:
        """Every layer's error is known; not after a pack that went on in the middle of a layer or behind it."""
        return all(
            error.measured.get(codec.name, 0) == min(self.measured, self._num_experts(layer, codec))
            for layer, error in enumerate(self.errors)
            for codec in self._codecs
        )

    def encode(self, layer: int, expert: int, slot: memoryview) -> memoryview:
        """The record of the expert whose own bytes are in `slot`; good until the next call."""
        self._payload[:] = bytes(len(self._payload))
        described, codec = self.table.layers[layer], self._codec_of(layer, expert)
        target = iter(described.layout_of(expert).parts)
        if self.codec.often:
            assert described.layout.parts[0].name == BITS, "an expert of mixed bits begins with their number"
            self._put(next(target), torch.tensor([codec.bits], dtype=torch.uint8))
        is_measured = self._takes_measure(layer, codec)
        for tensor in self._family_tensors(layer, slot):
            if tensor.ndim == 1:
                self._put(next(target), tensor.bfloat16())
                continue
            weights = (tensor.t() if self.is_transposed[layer] else tensor).contiguous()
            values, scales = encode(weights, codec.bits, codec.group)
            self._put(next(target), values)
            self._put(next(target), scales)
            if is_measured:
                self._measure(layer, codec, weights, Matrix(values, scales, codec.bits, codec.group))
        return memoryview(self._payload)

    def _family_tensors(self, layer: int, slot: memoryview) -> Iterator[torch.Tensor]:
        """The family's tensors of the expert in `slot`, one at a time; of a quantised one its numbers in float32."""
        described = self.source.layers[layer]
        stored = [_tensor(slot, part) for part in described.layout.parts]
        if not described.parts:
            yield from stored
        for part in described.parts:
            yield decode_part(part, stored, torch.float32, self._workspaces)

    @property
    def _codecs(self) -> list[Codec]:
        return [self.codec, *([CODECS[self.codec.often]] if self.codec.often else [])]

    def _codec_of(self, layer: int, expert: int) -> Codec:
        return CODECS[self.codec.often] if expert in self.table.layers[layer].others else self.codec

    def _num_experts(self, layer: int, codec: Codec) -> int:
        described = self.table.layers[layer]
        num_others = len(described.others)
        return described.num_experts - num_others if codec is self.codec else num_others

    def _takes_measure(self, layer: int, codec: Codec) -> bool:
        counts = self.errors[layer].measured
        if counts.get(codec.name, 0) == self.measured:
            return False
        counts[codec.name] = counts.get(codec.name, 0) + 1
        return True

    def _put(self, part: Part, tensor: torch.Tensor) -> None:
        raw = tensor.contiguous().view(torch.uint8).flatten().numpy().tobytes()
        assert (tuple(tensor.shape), len(raw)) == (part.shape, part.nbytes), f"{part} is not {tuple(tensor.shape)}"
        self._payload[part.offset : part.offset + part.nbytes] = raw

    def _measure(self, layer: int, codec: Codec, weights: torch.Tensor, matrix: Matrix) -> None:
        back = decode(matrix).t().float()
        # Each codec counts by the experts that it stores, not by those that were measured.
        weight = max(1.0, self._num_experts(layer, codec) / self.measured)
        self.errors[layer].lost += weight * float((back - weights.float()).square().sum())
        self.errors[layer].whole += weight * float(weights.float().square().sum())


def _check_family(source: ExpertTable) -> None:
    """Raises UnsupportedModelError where experts have parts that no maths here knows: found at `load` otherwise."""
    for layer in source.layers:
        names = {part.name for part in layer.family_layout.parts}
        up = "gate_up_proj" if "gate_up_proj" in names else "up_proj"
        if not {up, "down_proj"} <= names <= {up, "down_proj", f"{up}_bias", "down_proj_bias"}:
            raise UnsupportedModelError(
                f"{layer.name}: how this family computes an expert of {', '.join(sorted(names))} is not known, so that "
                "a quantised store could not be used. Pack without --quant."
            )


def _tensor(slot: memoryview, part: Part) -> torch.Tensor:
    dtype = TORCH_DTYPES[part.dtype]
    return torch.frombuffer(slot, dtype=dtype, count=part.nbytes // dtype.itemsize, offset=part.offset).view(part.shape)
