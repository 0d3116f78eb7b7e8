"""Formats of checkpoints that were published quantised: those supported, and the errors for others.

    mxfp4                 blocks of 32 four-bit floats with a power of two each (gpt-oss)
    fp8                   eight-bit floats with a scale per block of 128 x 128 (DeepSeek-V3, Qwen3-*-FP8)
    compressed-tensors    pack-quantized: four-bit integers in groups; float-quantized: eight-bit floats
    gptq                  four-bit integers in groups with zero points, eight to a word along the input
    awq                   the same along the output, and in another order within a word

Only names and settings are handled: no tensor is read. Stored names tell which matrices are quantised, so that lists of
exceptions (modules_to_not_convert, ignore, lm_head) are not needed. docs/formats.md has the table for users.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from foreroute.checkpoint.assembly import Coding
from foreroute.checkpoint.declared import Declaration, read_declaration
from foreroute.checkpoint.index import CheckpointIndex
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError

MXFP4, FP8, FP8_SCALED, PACKED_INT4 = "mxfp4", "fp8", "fp8-scaled", "packed-int4"
GPTQ_INT4, AWQ_INT4 = "gptq-int4", "awq-int4"
# GPTQ whose columns belong to groups by g_idx, not by position.
GPTQ_REORDERED = "gptq-int4-reordered"

# Alternatives to an unsupported format, part of every refusal.
_INSTEAD = (
    "Take the checkpoint in bf16 (`foreroute pack --quant q4_k` makes its experts small), or one in MXFP4, FP8 with "
    "block scales, GPTQ or AWQ int4, or compressed-tensors (docs/formats.md)."
)
# Keys of a module's rule that change nothing: stored tensors do not depend on them, or record them themselves (order of
# columns, zero points).
_MEANS_NOTHING = frozenset({
    "desc_act", "sym", "static_groups", "act_group_aware", "damp_percent", "damp_auto_increment", "true_sequential",
    "mse", "hyb_act", "fallback", "failsafe", "gptaq", "v2", "v2_alpha",
})  # fmt: skip


@dataclass(frozen=True)
class ModuleRule:
    """Settings of modules whose name begins with `pattern`: GPTQModel's `dynamic`; the first match applies.

    is_plain: they are not quantised. bits, group: theirs; None for the general setting.
    """

    pattern: re.Pattern[str]
    is_plain: bool = False
    bits: int | None = None
    group: int | None = None


@dataclass(frozen=True)
class QuantisedFormat:
    """How a checkpoint's quantised matrices are stored.

    name: for users and stats. coding: how a matrix is dequantised.
    components: suffixes of a matrix's tensors, in the coding's order.
    base: replaces the first component's suffix in the model's name of the matrix.
    optional: suffixes that may exist and are ignored.
    is_transposed: the model's fused tensor is the matrices' transposition.
    rules: settings of single modules.
    needs_order: g_idx must be stored, as columns are declared to be reordered (desc_act).
    notes: declared settings that are ignored here, for users.
    """

    name: str
    coding: Coding
    components: tuple[str, ...]
    base: str
    optional: tuple[str, ...] = ()
    is_transposed: bool = False
    rules: tuple[ModuleRule, ...] = ()
    needs_order: bool = False
    notes: tuple[str, ...] = ()

    def coding_of(self, name: str) -> Coding:
        """The coding of the matrix with the model's name `name`: the format's, unless a rule applies.

        Raises:
            UnsupportedModelError: its rule has other bits, which are not supported.
            CorruptCheckpointError: its rule says that it is not quantised.
        """
        module = name.removesuffix(self.base).rstrip(".")
        rule = next((rule for rule in self.rules if rule.pattern.match(module)), None)
        if rule is None:
            return self.coding
        if rule.is_plain:
            raise CorruptCheckpointError(
                f"{module} is stored quantised, though a rule of the quantisation's `dynamic` says that it is not: "
                f"{rule.pattern.pattern!r}. The config and the weights are of different models."
            )
        if rule.bits not in (None, 4):
            raise UnsupportedModelError(
                f"{module} is {self.name} with {rule.bits} bits, by the rule {rule.pattern.pattern!r} of the "
                f"quantisation's `dynamic`, which is not read. {_INSTEAD}"
            )
        return self.coding if rule.group is None else replace(self.coding, block=(1, rule.group))

    def split(self, index: CheckpointIndex) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
        """Group stored names by quantised matrix.

        Returns:
            The stored names of each quantised matrix's components, by its name in the model; and all stored names that
            belong to one.
        Raises:
            CheckpointError: a matrix lacks one of its components.
            CorruptCheckpointError: an eight-bit float that is no component: it would be taken for a plain weight.
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
    """Read the format that the checkpoint `index` in `folder` declares; None if its weights are not quantised.

    Raises:
        UnsupportedModelError: an unsupported format or variant; named, with alternatives.
        CheckpointError: the declaration makes no sense.
    """
    declared = read_declaration(folder, index)
    if declared is None:
        return None
    method = declared.text("quant_method")
    makers = {"mxfp4": _mxfp4, "fp8": _fp8, "compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}
    if method not in makers:
        what = f"its weights are quantised with {method}" if method else "it declares a quantisation without a method"
        raise UnsupportedModelError(f"{folder}: {what}, which foreroute does not read. {_INSTEAD}")
    made = makers[method](declared)
    if isinstance(made, str):
        raise UnsupportedModelError(f"{folder}: its weights are {method} with {made}, which is not read. {_INSTEAD}")
    return made


def _mxfp4(declared: Declaration) -> QuantisedFormat | str:
    return QuantisedFormat("mxfp4", Coding(MXFP4, (1, 32)), ("_blocks", "_scales"), "", is_transposed=True)


def _fp8(declared: Declaration) -> QuantisedFormat | str:
    block = declared.pair("weight_block_size")
    if block is None:
        return "one scale per tensor"
    fmt, scale_fmt = declared.text("fmt", "e4m3"), declared.text("scale_fmt", "float")
    if fmt not in ("e4m3", "float8_e4m3fn"):
        return f"{fmt} numbers"
    if scale_fmt not in ("float", "none", "ue8m0"):
        return f"{scale_fmt} scales"
    scheme = declared.text("activation_scheme")
    notes = (_activations_note(f"activation_scheme {scheme}"),) if scheme else ()
    components = ("weight", "weight_scale_inv")
    return QuantisedFormat(
        "fp8", Coding(FP8, block), components, "weight", ("activation_scale", "input_scale"), notes=notes
    )


def _activations_note(declared: str) -> str:
    return f"The checkpoint asks for activations rounded to few bits ({declared}): here they stay in the compute dtype."


def _compressed_tensors(declared: Declaration) -> QuantisedFormat | str | None:
    if declared.content.get("transform_config"):
        return "a transform_config (rotated weights)"
    sparse = declared.within("sparsity_config").text("format", "dense")
    if sparse != "dense":
        return f"sparse weights ({sparse})"
    status = declared.text("quantization_status", "compressed")
    if status != "compressed":
        return f"status {status}"
    groups = declared.within("config_groups")
    named = [groups.within(name) for name in groups.content]
    weights = [(group, group.within("weights")) for group in named if group.within("weights").content]
    if not named and declared.within("kv_cache_scheme").content:
        return None  # only the KV cache is quantised
    if len(weights) != 1:
        return f"{len(weights)} kinds of weights"
    ((group, weight),) = weights
    layout = group.text("format") or declared.text("format", "none")
    made = _compressed_weights(layout, weight)
    rounded = [
        key for key in ("input_activations", "output_activations") if any(one.within(key).content for one in named)
    ]
    if isinstance(made, str) or not rounded:
        return made
    return replace(made, notes=(_activations_note(" and ".join(rounded)),))


def _compressed_weights(layout: str, weight: Declaration) -> QuantisedFormat | str:
    kind, bits, strategy = weight.text("type", "int"), weight.whole("num_bits", 8), weight.text("strategy", "none")
    idle = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "weight_shape")
    if layout == "float-quantized" and (kind, bits) == ("float", 8):
        block = weight.pair("block_structure") if strategy == "block" else {"channel": (1, 0), "tensor": (0, 0)}.get(
            strategy
        )  # fmt: skip
        if block is None:
            return f"a scale per {strategy}"
        return QuantisedFormat(
            "float-quantized", Coding(FP8_SCALED, block), ("weight", "weight_scale"), "weight", idle
        )  # fmt: skip
    if layout == "pack-quantized" and (kind, bits) == ("int", 4):
        if not weight.flag("symmetric", default=True):
            return "zero points"
        # "weight" is an order of rounding alone: columns keep their places, and no g_idx is stored.
        if weight.content.get("actorder") not in (None, False, "weight", "static"):
            return "columns in another order (actorder)"
        if strategy not in ("group", "channel"):
            return f"a scale per {strategy}"
        columns = weight.whole("group_size") if strategy == "group" else 0
        return QuantisedFormat(
            "pack-quantized", Coding(PACKED_INT4, (1, columns)), ("weight_packed", "weight_scale"), "weight", idle
        )
    return f"format {layout} ({bits}-bit {kind})"


def _gptq(declared: Declaration) -> QuantisedFormat | str:
    bits = declared.whole("bits")
    if bits != 4:
        return f"{bits} bits"
    # Later versions of GPTQModel use the key "format".
    layout = declared.text("checkpoint_format") or declared.text("format") or "gptq"
    if declared.flag("is_marlin_format", default=False):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        return f"checkpoint format {layout}"
    group = _group_size(declared)
    coding = Coding(GPTQ_INT4, (1, group), is_zero_shifted=layout == "gptq")
    components = ("qweight", "scales", "qzeros")
    needs_order = declared.flag("desc_act", default=False) and group > 0
    return _more_than_numbers(declared) or QuantisedFormat(
        "gptq", coding, components, "weight", ("g_idx",), rules=_module_rules(declared), needs_order=needs_order
    )


def _awq(declared: Declaration) -> QuantisedFormat | str:
    bits = declared.whole("bits", 4)
    if bits != 4:
        return f"{bits} bits"
    for key in ("version", "format", "checkpoint_format"):
        if declared.text(key, "gemm") != "gemm":
            return f"{key} {declared.text(key)}"
    if declared.text("backend") == "llm-awq":
        return "backend llm-awq"
    if not declared.flag("zero_point", default=True):
        return "no zero points"
    coding = Coding(AWQ_INT4, (1, _group_size(declared)))
    return _more_than_numbers(declared) or QuantisedFormat(
        "awq", coding, ("qweight", "scales", "qzeros"), "weight", rules=_module_rules(declared)
    )


def _more_than_numbers(declared: Declaration) -> str:
    """Settings of GPTQModel that need more than the stored words; "" if none."""
    word = declared.text("pack_dtype", "int32")
    if word.removeprefix("torch.") != "int32":
        return f"words of another size (pack_dtype {word})"
    for key, what in (("adapter", "an adapter beside the weights"), ("rotation", "rotated weights")):
        if declared.content.get(key) or declared.within("meta").content.get(key):
            return f"{what} ({key})"
    return ""


def _group_size(declared: Declaration) -> int:
    """Columns per group; -1 in GPTQ and AWQ, 0 here, is the whole row."""
    return max(declared.whole("group_size", 128, others=(-1,)), 0)


def _module_rules(declared: Declaration) -> tuple[ModuleRule, ...]:
    """Read GPTQModel's `dynamic`: "-:pattern" for unquantised modules, "+:pattern" for those quantised otherwise.

    Raises:
        CheckpointError: a pattern is not a regular expression, or a value makes no sense.
        UnsupportedModelError: a rule has an unknown setting.
    """
    dynamic, rules = declared.within("dynamic"), list[ModuleRule]()
    for key in dynamic.content:
        try:
            pattern = re.compile(key.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise dynamic.nonsense(key, f"under a regular expression ({error})") from None
        settings = dynamic.within(key)
        unknown = sorted(settings.content.keys() - {"bits", "group_size"} - _MEANS_NOTHING)
        if key.startswith("-:"):
            rules.append(ModuleRule(pattern, is_plain=True))
        elif unknown:
            raise UnsupportedModelError(
                f"{dynamic.file}: {settings.path} sets {unknown[0]} for single modules, which foreroute does not know. "
                f"{_INSTEAD}"
            )
        else:
            bits = settings.whole("bits") if "bits" in settings.content else None
            group = _group_size(settings) if "group_size" in settings.content else None
            rules.append(ModuleRule(pattern, bits=bits, group=group))
    return tuple(rules)
