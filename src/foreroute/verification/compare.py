"""Feed the engine its reference's tokens and compare both bit by bit.

The first difference is located as closely as hashes allow: the prompt and step, the MoE layer, whether its input or
output differs, and which expert's slot held other bytes than the checkpoint, or which dense tensor differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.loading.offloaded_model import OffloadedModel, handle_of
from foreroute.types import Progress
from foreroute.verification.reference import Reference, dense_digests
from foreroute.verification.slot_watch import SlotUse, SlotWatch
from foreroute.verification.transcript import Exercise, ForwardPass, LayerPass, steps

# The part where a step first differs: a MoE layer's input, its routing, its experts' output, or the logits. Or, before
# all steps, a packed store's dense weights, where they are not what packing the checkpoint again makes.
DENSE, ROUTER, EXPERTS, HEAD, PACKED_DENSE = "dense", "router", "experts", "head", "packed dense"
# Number of dense tensors that are named; the rest is counted.
_MOST_NAMED = 3


@dataclass(frozen=True)
class FirstDifference:
    """The first place where engine and reference differ.

    prompt, step: counted from 1; step 1 is the prompt's prefill, each later one feeds one new token.
    position: of the step's last token, from 0.
    part: DENSE, ROUTER, EXPERTS, HEAD or PACKED_DENSE.
    moe_layer, module: the MoE layer whose input, routing or output differs; None for HEAD and PACKED_DENSE.
    experts: experts of that layer that were computed with other bytes than the checkpoint's.
    tensors: dense parameters and buffers with other values.
    reasons: sentences that explain the difference.
    """

    prompt: int
    step: int
    position: int
    part: str
    moe_layer: int | None
    module: str | None
    experts: tuple[int, ...]
    tensors: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """tokens: steps compared. same_tokens: those with the same likeliest token. layers_compared: MoE layer passes.

    first_difference: None when all bits are equal.
    """

    tokens: int
    same_tokens: int
    layers_compared: int
    first_difference: FirstDifference | None

    @property
    def same(self) -> bool:
        """Whether all bits and all tokens are equal."""
        return self.first_difference is None and self.same_tokens == self.tokens


def verify(model: OffloadedModel, exercises: Sequence[Exercise], reference: Reference, progress: Progress) -> Verdict:
    """Run the model through the reference's steps and compare each of them.

    Args:
        model: from `foreroute.load`, and not used yet.
        exercises: the reference's. progress: called with (steps done, all).
    """
    handle = handle_of(model)
    watch, table = SlotWatch(handle.host_engine), handle.table
    names = [layer.name for layer in table.layers]
    first: FirstDifference | None = None
    done = same_tokens = layers_compared = 0
    if reference.is_of_store and _other_tensors(model, reference):
        first = _describe(model, reference, table, None, (PACKED_DENSE, 0), 1, 1, exercises[0].prompt_ids.shape[1] - 1)
    for number, (exercise, transcript) in enumerate(zip(exercises, reference.transcripts, strict=True), start=1):
        fed = [step.token for step in transcript]
        ours = steps(model, names, exercise, fed=fed, watch=watch)
        for at, (left, right) in enumerate(zip(transcript, ours, strict=True)):
            place = (
                None if first is not None else differing(left, right, names) or _misread(right, names, table, reference)
            )
            if place is not None:
                position = exercise.prompt_ids.shape[1] - 1 + at
                first = _describe(model, reference, table, right, place, number, at + 1, position)
            same_tokens += left.token == right.token
            layers_compared += len(right.layers)
            done += 1
            progress(done, reference.num_steps)
    return Verdict(done, same_tokens, layers_compared, first)


def differing(reference: ForwardPass, ours: ForwardPass, names: Sequence[str]) -> tuple[str, int] | None:
    """Return (part, MoE layer) where `ours` first differs from `reference`, in compute order; None for equal bits.

    The layer of HEAD is the number of MoE layers. names: of all MoE layers; a step of a decoder passes some of them.
    """
    for left, right in zip(reference.layers, ours.layers, strict=True):
        assert left.module == right.module, f"{right.module} was called where {left.module} should be"
        layer = names.index(left.module)
        if left.hidden != right.hidden:
            return DENSE, layer
        if left.routing != right.routing:
            return ROUTER, layer
        if left.output != right.output:
            return EXPERTS, layer
    return None if reference.logits == ours.logits else (HEAD, len(names))


def _misread(
    step: ForwardPass, names: Sequence[str], table: ExpertTable, reference: Reference
) -> tuple[str, int] | None:
    """As `differing`: the first MoE layer with experts of other bytes, where equal outputs do not show it."""
    if not reference.is_of_store:
        return None
    faulty = (at for one in step.layers if expert_faults(one, at := names.index(one.module), table, reference))
    return next(((EXPERTS, at) for at in faulty), None)


def _describe(
    model: OffloadedModel,
    reference: Reference,
    table: ExpertTable,
    step: ForwardPass | None,
    place: tuple[str, int],
    prompt: int,
    number: int,
    position: int,
) -> FirstDifference:
    part, layer = place
    experts: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()
    if part == EXPERTS:
        assert step is not None, "a step's experts differ"
        at = [one.module for one in step.layers].index(table.layers[layer].name)
        faults = expert_faults(step.layers[at], layer, table, reference)
        experts = tuple(sorted(faults))
        reasons = tuple(faults[expert] for expert in experts) or (_NO_FAULT,)
    else:
        tensors = _other_tensors(model, reference)
        reasons = (_tensors_sentence(tensors),)
    is_of_no_layer = part in (HEAD, PACKED_DENSE)
    module = None if is_of_no_layer else table.layers[layer].name
    moe_layer = None if is_of_no_layer else layer
    return FirstDifference(prompt, number, position, part, moe_layer, module, experts, tensors, reasons)


def _other_tensors(model: OffloadedModel, reference: Reference) -> tuple[str, ...]:
    """Names of the dense weights and buffers with other values than the reference's."""
    ours = dense_digests(model)
    return tuple(name for name, bits in ours.items() if reference.dense.get(name, bits) != bits)


_NO_FAULT = (
    "Each of its experts had the checkpoint's bytes in its slot: the maths differs, or a slot changed meanwhile."
)


def expert_faults(layer_pass: LayerPass, layer: int, table: ExpertTable, reference: Reference) -> dict[int, str]:
    """Explain, for each expert in layer_pass (MoE layer `layer`), bytes other than `table` and `reference` have."""
    base, name = table.keys.key(layer, 0), layer_pass.module
    faults: dict[int, str] = {}
    for use in layer_pass.uses:
        expert = use.computed_as - base
        expected = reference.experts.get((name, expert))
        if use.computed_as != use.loaded:
            loaded = "none" if use.loaded < 0 else table.label(use.loaded)
            label = _label(table, use.computed_as)
            faults[expert] = f"{label}: it was computed from a slot that was loaded for {loaded}."
        elif expected is not None and use.digest != expected:
            owner = _owner(use, table, reference)
            label = _label(table, use.computed_as)
            faults[expert] = f"{label}: its slot holds other bytes than the checkpoint; {owner}"
    computed = {use.computed_as - base for use in layer_pass.uses}
    for expert in layer_pass.experts:
        if expert < table.layers[layer].num_experts and expert not in computed:
            faults[expert] = f"{_label(table, base + expert)}: no slot was read for it."
    return faults


def _label(table: ExpertTable, key: int) -> str:
    label = table.label(key)
    return label[0].upper() + label[1:]


def _owner(use: SlotUse, table: ExpertTable, reference: Reference) -> str:
    """Name the expert that these bytes belong to."""
    layer_of = {layer.name: at for at, layer in enumerate(table.layers)}
    owners = sorted(
        (layer_of[name], expert) for (name, expert), bits in reference.experts.items() if bits == use.digest
    )
    if owners:
        layer, expert = owners[0]
        return f"they are those of expert {expert} of MoE layer {layer}."
    return "they belong to no expert." if reference.has_all_experts else "they are of none that was used."


def _tensors_sentence(tensors: Sequence[str]) -> str:
    if not tensors:
        return "Every dense tensor has the reference's values: the maths differs."
    more = len(tensors) - _MOST_NAMED
    named = ", ".join(tensors[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"The dense part has other values than the reference: {named}."
