"""Encode experts from the checkpoint's layout to that of a quantised store, one at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from foreroute.checkpoint.codecs import Codec, encoded_table
from foreroute.checkpoint.layouts import ExpertTable, Part
from foreroute.errors import UnsupportedModelError
from foreroute.kernels.slot_views import TORCH_DTYPES
from foreroute.kernels.torch.dequantise import Workspaces, decode_part
from foreroute.kernels.torch.quant import Matrix, decode, encode, order_of


@dataclass
class LayerError:
    """Quantisation error of a layer's matrices: sums of squares over the measured experts."""

    lost: float = 0.0
    whole: float = 0.0
    measured: int = 0

    @property
    def relative(self) -> float:
        """Root mean square error of an output, as a share of the output, for inputs with no preferred direction."""
        return (self.lost / self.whole) ** 0.5 if self.whole else 0.0


@dataclass
class Quantiser:
    """Encodes experts of `source` for a store.

    source: the experts as the checkpoint stores them. is_transposed: per layer, matrices are stored as [in, out].
    measured: experts per layer that are decoded again and compared.

    Raises:
        StoreError: a matrix whose shape the codec cannot take.
        UnsupportedModelError: a family whose quantised experts could be packed, but not computed.
    """

    source: ExpertTable
    codec: Codec
    is_transposed: Sequence[bool]
    measured: int = 4
    errors: list[LayerError] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_family(self.source)
        self.table = encoded_table(self.source, self.codec, self.is_transposed)
        self.order = order_of(self.codec.bits, self.codec.group)
        self.errors = [LayerError() for _ in self.table.layers]
        self._payload = bytearray(self.table.slot_bytes)
        self._workspaces = Workspaces()

    @property
    def is_measured(self) -> bool:
        """Whether every layer's error is known; not after a resumed pack that skipped a measured expert."""
        return all(
            error.measured == min(self.measured, layer.num_experts)
            for error, layer in zip(self.errors, self.table.layers, strict=True)
        )

    def encode(self, layer: int, slot: memoryview) -> memoryview:
        """Encode the expert of `layer` whose stored bytes are in `slot`; the record is valid until the next call."""
        self._payload[:] = bytes(len(self._payload))
        codec, error = self.codec, self.errors[layer]
        target = iter(self.table.layers[layer].layout.parts)
        is_measured = error.measured < self.measured
        error.measured += is_measured
        for tensor in self._family_tensors(layer, slot):
            if tensor.ndim == 1:
                self._put(next(target), tensor.bfloat16())
                continue
            weights = (tensor.t() if self.is_transposed[layer] else tensor).contiguous()
            values, scales = encode(weights, codec.bits, codec.group)
            self._put(next(target), values)
            self._put(next(target), scales)
            if is_measured:
                self._measure(error, weights, Matrix(values, scales, codec.bits, codec.group))
        return memoryview(self._payload)

    def _family_tensors(self, layer: int, slot: memoryview) -> Iterator[torch.Tensor]:
        """The family's tensors of the expert in `slot`, one at a time; quantised ones are decoded to float32."""
        described = self.source.layers[layer]
        stored = [_tensor(slot, part) for part in described.layout.parts]
        if not described.parts:
            yield from stored
        for part in described.parts:
            yield decode_part(part, stored, torch.float32, self._workspaces)

    def _put(self, part: Part, tensor: torch.Tensor) -> None:
        raw = tensor.contiguous().view(torch.uint8).flatten().numpy().tobytes()
        assert (tuple(tensor.shape), len(raw)) == (part.shape, part.nbytes), f"{part} is not {tuple(tensor.shape)}"
        self._payload[part.offset : part.offset + part.nbytes] = raw

    def _measure(self, error: LayerError, weights: torch.Tensor, matrix: Matrix) -> None:
        error.lost += float((decode(matrix).t().float() - weights.float()).square().sum())
        error.whole += float(weights.float().square().sum())


def _check_family(source: ExpertTable) -> None:
    """Raises UnsupportedModelError where experts have parts unknown to our kernels, before `load` would."""
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
