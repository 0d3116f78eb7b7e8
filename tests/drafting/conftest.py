"""Models whose tokens are drafted, and drafters that know the answer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from foreroute.drafting.draft import GovernedDraft, draft_for
from foreroute.generation.generate import GenerationReport, generate
from foreroute.model.draft_model import PROMPT_LOOKUP
from tests.cli.harness import make_tokenizer


class Fixed:
    """In a governor's place: drafts are of these lengths, one after the other."""

    least_confidence, chosen = 0.0, 3

    def __init__(self, *lengths: int) -> None:
        self._lengths, self.steps = lengths, list[tuple[int, int]]()

    @property
    def length(self) -> int:
        return self._lengths[len(self.steps) % len(self._lengths)]

    def begin(self) -> None:
        pass

    def step(self, drafted: int, accepted: int, seconds: float, limit: int | None = None) -> None:
        self.steps.append((drafted, accepted))

    def step_rows(self, rows: Sequence[tuple[int, int]], seconds: float, limit: int | None = None) -> None:
        self.steps.append((sum(drafted for drafted, _ in rows), sum(accepted for _, accepted in rows)))


class Knowing:
    """Drafts an answer that is known, with every `wrong_every`-th token of the text changed."""

    def __init__(self, wrong_every: int = 5) -> None:
        self.text: Sequence[int] = ()
        self._wrong_every = wrong_every

    def draft(self, ids: Sequence[int], most: int, least_confidence: float) -> Iterator[int]:
        for at in range(len(ids), min(len(ids) + most, len(self.text))):
            token = self.text[at]
            yield token if at % self._wrong_every else (token + 1) % 200


class Compared:
    """Answers with and without a draft by one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.draft: GovernedDraft = draft_for(model, PROMPT_LOOKUP)
        self.knowing = Knowing()
        self.draft.drafter = self.knowing
        self.draft.governor = Fixed(1, 3, 7, 2, 15)
        self._tokenizer = make_tokenizer()

    def answer(self, ids: Sequence[int], draft: str | None, count: int = 48, **options: Any) -> GenerationReport:
        """One answer to `ids`; the same seed each time."""
        torch.manual_seed(5)
        options = {"do_sample": False, "eos_token_id": None, **options}
        return generate(
            self.model, self._tokenizer, torch.tensor([list(ids)]), draft=draft, max_new_tokens=count, **options
        )

    def both(self, ids: Sequence[int], **options: Any) -> tuple[GenerationReport, GenerationReport]:
        """Without, and with a draft that is right but for some tokens."""
        without = self.answer(ids, None, **options)
        self.knowing.text = [*ids, *without.token_ids]
        return without, self.answer(ids, PROMPT_LOOKUP, **options)


@pytest.fixture
def compared(load: Any) -> Callable[..., Compared]:
    """Load a model, and compare its answers with and without a draft."""

    def of(folder: Any, memory: str = "25%", **settings: Any) -> Compared:
        return Compared(load(folder, memory, **settings))

    return of
