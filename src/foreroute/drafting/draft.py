"""What drafts for a model: a drafter, and the governor that measures what it gains."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from foreroute.checkpoint.locate import read_index
from foreroute.drafting.drafters import Drafter, ModelDrafter, PromptLookup
from foreroute.drafting.governor import DraftGovernor
from foreroute.errors import PolicyError, RefusedError
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.adapters.block import AdaptedExperts
from foreroute.model.blocks import MoeLayer
from foreroute.model.caches import can_be_continued, has_linear_states, is_ordinary, new_cache
from foreroute.model.decode.positions import PositionsAlike, can_attend_by_position
from foreroute.model.draft_model import PROMPT_LOOKUP, DraftModel, find_draft
from foreroute.model.rewind import most_rewound


@dataclass
class GovernedDraft:
    """A drafter with its governor, both kept from answer to answer.

    make: makes a drafter of the same kind, for a text beside others.
    alike: gives a verify step's tokens the bits that they have alone.
    most: tokens that can be taken back of a step; None: any number.
    """

    make: Callable[[], Drafter]
    alike: PositionsAlike
    most: int | None
    governor: DraftGovernor = field(default_factory=DraftGovernor)

    def __post_init__(self) -> None:
        self.drafter = self.make()


def draft_for(model: OffloadedModel, asked: str | Path | None) -> GovernedDraft | None:
    """Return what drafts for `model`, made on first use.

    Args:
        asked: PROMPT_LOOKUP, the path or hub id of a draft, or None for what EngineConfig.draft says.
    Returns:
        None if nothing drafts.
    Raises:
        RefusedError: the model's tokens cannot be taken back, or another loop computes them. PolicyError: the model's
        policy is not exact. CheckpointError: see `find_draft`.
    """
    handle = model.foreroute
    source = handle.draft if asked is None else str(asked)
    if source is None:
        return None
    _check(model)
    name = str(source.folder) if isinstance(source, DraftModel) else source
    if name not in handle.drafts:
        handle.drafts[name] = _made(model, source)
    made: GovernedDraft = handle.drafts[name]
    return made


def _made(model: OffloadedModel, source: DraftModel | str) -> GovernedDraft:
    make: Callable[[], Drafter]
    if source == PROMPT_LOOKUP:
        make = PromptLookup
    else:
        vocabulary = model.get_input_embeddings().num_embeddings
        if not isinstance(source, DraftModel):
            folder = Path(model.foreroute.plan.folder)
            source = find_draft(source, folder, read_index(folder)).load()
        make = partial(ModelDrafter, source, vocabulary)
    cache = new_cache(model)
    assert cache is not None, "a model that can be drafted for"
    # With ggml's kernels all rows are alike.
    layers = () if model.foreroute.plan.math == "ggml" else model.foreroute.layers
    routers = [layer.router.module for layer in layers if layer.router is not None]
    return GovernedDraft(make, PositionsAlike(model, routers), most_rewound(cache))


def _computes_all_rows(layer: MoeLayer) -> bool:
    """Whether each expert multiplies all rows of a step: what a row gets depends on how many there are."""
    experts = layer.experts
    return isinstance(experts, AdaptedExperts) and experts.held.math.computes_all_rows


def _check(model: OffloadedModel) -> None:
    plan, cache = model.foreroute.plan, new_cache(model)
    refusals: tuple[tuple[Callable[[], bool], str], ...] = (
        (
            lambda: bool(getattr(model.config, "is_encoder_decoder", False)),
            "nothing is drafted for encoder-decoders yet. Leave --draft out.",
        ),
        (lambda: plan.device != "cpu", "drafts are verified on the CPU alone so far. Leave --device or --draft out."),
        (
            lambda: has_linear_states(model),
            "states of linear attention, convolutions and Mamba cannot be taken back to an earlier token. Leave "
            "--draft out.",
        ),
        (
            lambda: cache is None or not is_ordinary(model) or not can_be_continued(model, cache),
            "the family's state is not an ordinary KV cache, and what is not chosen could not be taken back. Leave "
            "--draft out.",
        ),
        (
            lambda: not can_attend_by_position(model) or any(map(_computes_all_rows, model.foreroute.layers)),
            "a token that is verified with others would not have the bits that it has alone (attention in chunks or of "
            "its own, or experts computed for all tokens of a step). Leave --draft out.",
        ),
        (
            lambda: cache is not None and most_rewound(cache) == 0,
            "its window has room for one token, or a layer keeps none. Leave --draft out.",
        ),
    )
    for is_so, why in refusals:
        if is_so():
            raise RefusedError(f"No draft for a {model.config.model_type} model here: {why}")
    if not model.foreroute.is_exact:
        raise PolicyError(
            "A draft needs the policy exact: under another one, drafted tokens would decide which experts are "
            "resident, and so the output. Set the policy to exact, or leave the draft out."
        )
