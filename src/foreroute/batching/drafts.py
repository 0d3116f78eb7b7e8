"""Drafts for requests that share steps: each row has its own, of any length, and a step verifies all of them."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from foreroute.batching.answer import Answer
from foreroute.drafting.draft import GovernedDraft, draft_for
from foreroute.drafting.governor import DraftGovernor
from foreroute.engine.interfaces import MOST_VERIFIED
from foreroute.errors import RefusedError
from foreroute.loading.offloaded_model import OffloadedModel

_LOG = logging.getLogger(__name__)


class BatchDrafts:
    """Drafts for the rows of each step, and measures what that gains, by number of rows.

    Attributes:
        drafted, accepted, verify_steps: since the engine was made.
    """

    def __init__(
        self, model: OffloadedModel, draft: GovernedDraft, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._model, self._draft, self._clock = model, draft, clock
        self._governors: dict[int, DraftGovernor] = {}
        self._limit = 0
        self._began_s = 0.0
        self.drafted = self.accepted = self.verify_steps = 0

    def think(self, answers: Sequence[Answer]) -> list[list[int]]:
        """Begin a step: draft for each of `answers`, whose order is that of the rows."""
        self._began_s = self._clock()
        governor = self._governor(len(answers))
        longest = MOST_VERIFIED if self._draft.most is None else min(MOST_VERIFIED, self._draft.most)
        self._limit = min(governor.length, longest - 1) if self._model.foreroute.is_exact else 0
        return [self._of(answer, governor) for answer in answers]

    @contextmanager
    def alike(self, num_rows: int) -> Iterator[None]:
        """What gives the tokens of a row that is verified alone the bits that they have one by one.

        Other threads may call the model between steps: inside, they wait, as its attention is replaced.
        """
        if num_rows > 1:
            yield
            return
        with self._model.foreroute.lock, self._draft.alike.running():
            yield

    def ended(self, rows: Sequence[tuple[int, int] | None]) -> None:
        """Count a step: for each row the tokens that were drafted and those that were accepted; None: it failed."""
        counted = [row for row in rows if row is not None]
        if not counted:
            return
        num_drafted, num_accepted = (sum(counts) for counts in zip(*counted, strict=True))
        self.drafted += num_drafted
        self.accepted += num_accepted
        self.verify_steps += num_drafted > 0
        if len(counted) == len(rows):
            # A step with a row that failed says nothing of the time of one without.
            self._governor(len(rows)).step_rows(counted, self._clock() - self._began_s, self._limit)

    def _governor(self, num_rows: int) -> DraftGovernor:
        return self._governors.setdefault(num_rows, DraftGovernor())

    def _of(self, answer: Answer, governor: DraftGovernor) -> list[int]:
        most = min(self._limit, answer.num_left - 1)
        if most <= 0:
            return []
        if answer.drafter is None:
            answer.drafter = self._draft.make()
        try:
            return list(answer.drafter.draft(answer.ids, most, governor.least_confidence))
        except Exception:  # noqa: BLE001  reported in the log; its tokens are the same without
            _LOG.exception("drafting failed for a request, which goes on without a draft")
            answer.drafter = _NothingDrafted()
            return []


class _NothingDrafted:
    """In place of a drafter that failed, which would fail at each token."""

    def draft(self, ids: Sequence[int], most: int, least_confidence: float) -> Iterator[int]:
        """See `Drafter`."""
        return iter(())


def drafts_of(model: OffloadedModel, why_one_row: str, *, can_pad: bool) -> BatchDrafts | None:
    """What drafts for the requests to `model`; None where EngineConfig asks for nothing.

    Raises:
        RefusedError: one was asked for, and what is not chosen could not be taken back.
    """
    if model.foreroute.draft is None:
        return None
    draft = draft_for(model, None)
    if why_one_row or not can_pad:
        raise RefusedError(
            "--draft: requests of this model cannot be verified several tokens at a time, as "
            f"{why_one_row or 'padding cannot be kept from its experts'}. Leave it out."
        )
    return None if draft is None else BatchDrafts(model, draft)
