"""Checkpoints that were published quantised: which formats are read as they are, and what the others are told.

    mxfp4                 blocks of 32 four-bit floats with a power of two each (gpt-oss)
    fp8                   eight-bit floats with a scale per block of 128 x 128 (DeepSeek-V3, Qwen3-*-FP8)
    compressed-tensors    pack-quantized: four-bit integers in groups; float-quantized: eight-bit floats
    gptq                  four-bit integers in groups with zero points, eight to a word along the input
    awq                   the same along the output, and in another order within a word

Everything here is names and settings: no tensor is read. docs/formats.md is the table for people.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreroute.checkpoint.index import CheckpointIndex
from foreroute.checkpoint.stored_parts import Coding
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError

MXFP4, FP8, FP8_SCALED, PACKED_INT4 = "mxfp4", "fp8", "fp8-scaled", "packed-int4"
GPTQ_INT4, AWQ_INT4 = "gptq-int4", "awq-int4"

# What to take in place of a format that is not read, said in every refusal.
_INSTEAD = (
    "Take the checkpoint in bf16 (`foreroute pack --quant int4` makes its experts small), or one in MXFP4, FP8 with "
    "block scales, GPTQ or AWQ int4, or compressed-tensors (docs/formats.md)."
)


@dataclass(frozen=True)
class QuantisedFormat:
    """How a checkpoint's quantised matrices are stored.

    name: for people and stats. coding: how a matrix becomes numbers.
    components: suffixes of the tensors that make up one matrix, in the order that the coding wants them.
    base: what stands in place of the first component's suffix in the name that the model knows.
    optional: suffixes that may be there and mean nothing here.
    is_transposed: the model's fused tensor is the matrices' transposition.
    """

    name: str
    coding: Coding
    components: tuple[str, ...]
    base: str
    optional: tuple[str, ...] = ()
    is_transposed: bool = False

    def split(self, index: CheckpointIndex) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
        """Sort the stored names.

        Returns:
            For every quantised matrix its name in the model, with the stored names of its components; and all stored
            names that belong to one.
        Raises:
            CheckpointError: a matrix lacks one of its components.
            CorruptCheckpointError: an eight-bit float that is no component: it would be taken for a number.
        """
        first, *others = self.components
        matrices: dict[str, tuple[str, ...]] = {}
        used: set[str] = set()
        for name in index.tensors:
            if not name.endswith(first) or name.removesuffix(first) + others[0] not in index.tensors:
                continue
            stem = name.removesuffix(first)
            names = tuple(stem + suffix for suffix in self.components)
            absent = [one for one in names if one not in index.tensors]
            if absent:
                raise CheckpointError(f"{index.folder}: {name} has no {absent[0]} beside it. A shard is missing.")
            matrices[stem + self.base] = names
            used.update(names, (stem + suffix for suffix in self.optional if stem + suffix in index.tensors))
        for name in index.tensors.keys() - used:
            if index.tensors[name].dtype.startswith("F8"):
                raise CorruptCheckpointError(
                    f"{index.folder}: {name} is stored as {index.tensors[name].dtype} and has no {others[0]} beside it "
                    "that says what it stands for."
                )
        return matrices, frozenset(used)


def read_format(folder: Path, index: CheckpointIndex) -> QuantisedFormat | None:
    """The format that config.json declares; None for a checkpoint that is not quantised.

    Raises:
        UnsupportedModelError: a format, or a variant of one, that is not read; named, with what would do.
        CheckpointError: the declaration makes no sense.
    """
    declared = _declared(folder)
    if declared is None:
        return None
    method = str(declared.get("quant_method", "")).lower()
    makers = {"mxfp4": _mxfp4, "fp8": _fp8, "compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}
    if method not in makers:
        what = f"its weights are quantised with {method}" if method else "it declares a quantisation without a method"
        raise UnsupportedModelError(f"{folder}: {what}, which foreroute does not read. {_INSTEAD}")
    try:
        made = makers[method](declared)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: config.json declares {method} in a way that makes no sense: {error!r}."
        ) from None
    if isinstance(made, str):
        raise UnsupportedModelError(f"{folder}: its weights are {method} with {made}, which is not read. {_INSTEAD}")
    return made


def _declared(folder: Path) -> Mapping[str, Any] | None:
    config = json.loads((folder / "config.json").read_text())
    for holder in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key):
                found: Mapping[str, Any] = holder[key]
                return found
    if (folder / "hf_quant_config.json").is_file():
        return {"quant_method": "modelopt"}
    return None


def _mxfp4(declared: Mapping[str, Any]) -> QuantisedFormat | str:
    return QuantisedFormat("mxfp4", Coding(MXFP4, (1, 32)), ("_blocks", "_scales"), "", is_transposed=True)


def _fp8(declared: Mapping[str, Any]) -> QuantisedFormat | str:
    block = declared.get("weight_block_size")
    if block is None:
        return "one scale per tensor"
    if declared.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        return f"{declared['fmt']} numbers"
    if str(declared.get("scale_fmt", "float")) not in ("float", "None", "ue8m0"):
        return f"{declared['scale_fmt']} scales"
    rows, cols = (int(extent) for extent in block)
    if min(rows, cols) < 1:
        raise ValueError(f"weight_block_size {block}")
    return QuantisedFormat(
        "fp8", Coding(FP8, (rows, cols)), ("weight", "weight_scale_inv"), "weight", ("activation_scale", "input_scale")
    )


def _compressed_tensors(declared: Mapping[str, Any]) -> QuantisedFormat | str:
    if declared.get("transform_config"):
        return "a transform_config (rotated weights)"
    groups = list(declared.get("config_groups", {}).values())
    weights = [group["weights"] for group in groups if group.get("weights")]
    if len(weights) != 1:
        return f"{len(weights)} kinds of weights"
    (weight,) = weights
    layout = str(groups[0].get("format") or declared.get("format"))
    kind, bits = weight.get("type"), weight.get("num_bits")
    if declared.get("quantization_status", "compressed") != "compressed":
        return f"status {declared['quantization_status']}"
    if layout == "float-quantized" and (kind, bits) == ("float", 8):
        if weight.get("strategy") not in ("tensor", "channel", "block"):
            return f"a scale per {weight.get('strategy')}"
        rows, cols = weight.get("block_structure") or ((1, 0) if weight["strategy"] == "channel" else (0, 0))
        return QuantisedFormat(
            "float-quantized", Coding(FP8_SCALED, (int(rows), int(cols))), ("weight", "weight_scale"), "weight",
            ("input_scale",),
        )  # fmt: skip
    if layout == "pack-quantized" and (kind, bits) == ("int", 4):
        # "weight" is an order of rounding alone: the columns lie as ever, and no g_idx is stored.
        if not weight.get("symmetric", True) or weight.get("actorder") not in (None, False, "weight", "static"):
            return "zero points" if not weight.get("symmetric", True) else "columns in another order (actorder)"
        if weight.get("strategy") not in ("group", "channel"):
            return f"a scale per {weight.get('strategy')}"
        group = int(weight.get("group_size") or 0) if weight["strategy"] == "group" else 0
        return QuantisedFormat(
            "pack-quantized", Coding(PACKED_INT4, (1, group)), ("weight_packed", "weight_scale"), "weight",
            ("weight_shape",),
        )  # fmt: skip
    return f"format {layout} ({bits}-bit {kind})"


def _gptq(declared: Mapping[str, Any]) -> QuantisedFormat | str:
    if int(declared.get("bits", 0)) != 4:
        return f"{declared.get('bits')} bits"
    if declared.get("desc_act"):
        return "columns in another order (desc_act)"
    # GPTQModel's later versions say "format".
    layout = declared.get("checkpoint_format") or declared.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        return f"checkpoint format {layout}"
    return QuantisedFormat(
        "gptq", Coding(GPTQ_INT4, (1, _group_size(declared)), is_zero_shifted=layout == "gptq"),
        ("qweight", "scales", "qzeros"), "weight", ("g_idx",),
    )  # fmt: skip


def _awq(declared: Mapping[str, Any]) -> QuantisedFormat | str:
    if int(declared.get("bits", 0)) != 4:
        return f"{declared.get('bits')} bits"
    if str(declared.get("version", "gemm")).lower() != "gemm":
        return f"version {declared['version']}"
    if not declared.get("zero_point", True):
        return "no zero points"
    coding = Coding(AWQ_INT4, (1, _group_size(declared)))
    return QuantisedFormat("awq", coding, ("qweight", "scales", "qzeros"), "weight")


def _group_size(declared: Mapping[str, Any]) -> int:
    """Columns of a group, as GPTQ and AWQ say it: -1, here 0, is the whole row."""
    group = int(declared["group_size"])
    if group < 1 and group != -1:
        raise ValueError(f"group_size {group}")
    return max(group, 0)
