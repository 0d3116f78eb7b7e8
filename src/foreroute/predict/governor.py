"""Choose how many experts are predicted by measuring what prefetch gains. Pure: times are passed in, no clock is read.

Prefetch can lose: where experts are small, a prediction costs more than the read that it hides, and where the disk is
always busy, a wrong one delays a demand load. So the governor runs trials: some decode steps at full width, some at
half, some without prefetch, in an order that runs there and back, so that a drift (a cache that warms up, another
program) affects all alike, and keeps the quickest. It tries again after a while, more rarely while the answer stays the
same, and at once when step times change.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

FULL, HALF, OFF = 1.0, 0.5, 0.0
SHARES = (FULL, HALF, OFF)

# Steps of a trial that count, after one that does not: it still has reads of the trial before.
_BLOCK_STEPS = 7
# Trials per share before a decision, at most: two, and more while the means are close.
_MOST_TRIALS = 6
# Another share must be this much quicker to be chosen; among closer ones the narrowest, which reads least, stays.
_CLEARLY = 0.97
# Differences above this number of standard errors are not chance.
_CHANCE = 2.5
# Steps that the first decision holds, and the most that any holds: it doubles each time it is confirmed.
_FIRST_HOLD, _LAST_HOLD = 128, 2048
# Steps over which a change of step time is noticed, and the ratio that counts as one.
_WATCHED_STEPS, _CHANGED = 48, 1.3
# If less than this share of a step is stall, prefetch has nothing to gain.
_NOTHING_WAITED = 0.02


@dataclass
class _Tried:
    """Step times at one share, in seconds."""

    steps: list[float] = field(default_factory=list)
    trials: int = 0

    @property
    def mean(self) -> float:
        return _typical(self.steps)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        kept = _usual(self.steps)
        mean = sum(kept) / len(kept)
        return (sum((one - mean) ** 2 for one in kept) / (len(kept) - 1) / len(kept)) ** 0.5


class Governor:
    """Call `step` after each decode step; read `share` before the next.

    Args:
        shares: of the guess's full width, to choose from, widest first.
        trusted_steps: steps at full width before the first trial: where guesses are known to pay, a short answer need
            not be spent on trials.

    Attributes:
        share: of the full width in the next step, in a trial too; 0 is off.
        chosen: the share decided on last; full width before any decision.
        changes: decisions that changed `chosen`; trials not counted.
        why: reason for the last decision.
    """

    def __init__(self, shares: Sequence[float] = SHARES, trusted_steps: int = 0) -> None:
        assert shares, "there is nothing to choose from"
        self._shares = tuple(shares)
        self.share = self._shares[0]
        self.changes = 0
        self.why = "not tried yet"
        self.chosen = self._shares[0]
        self._trusted_steps = trusted_steps
        self._hold = _FIRST_HOLD
        self._left = 0
        self._settled_s = 0.0
        self._recent: list[float] = []
        self._plan: list[float] = []
        self._tried: dict[float, _Tried] = {}
        self._block: list[float] = []
        self._waited_s = 0.0
        self._is_first = True
        self._left = trusted_steps
        if not trusted_steps:
            self._begin_trials(self._shares)

    @property
    def is_trying(self) -> bool:
        """Whether trials are under way."""
        return bool(self._plan)

    def step(self, seconds: float, waited_s: float) -> bool:
        """Record a decode step of `seconds`, of which `waited_s` were stall.

        Returns:
            True when `share` changed or a decision ended the trials.
        """
        before = self.share, self.is_trying
        if self._plan:
            self._try(seconds, waited_s)
        else:
            self._watch(seconds)
        return (self.share, self.is_trying) != before

    def fresh(self) -> "Governor":
        """A new governor with the same settings and no measurements."""
        return Governor(self._shares, self._trusted_steps)

    def pause(self) -> None:
        """Note a prompt between decode steps: the next step does not count, earlier ones still do."""
        self._is_first = True

    def _begin_block(self) -> None:
        self._block, self._waited_s, self._is_first = [], 0.0, True

    def _begin_trials(self, shares: Sequence[float]) -> None:
        self._tried = {share: _Tried() for share in shares}
        self._plan = [*shares, *reversed(shares)]
        self._begin_block()
        self.share = self._plan[0]

    def _try(self, seconds: float, waited_s: float) -> None:
        if self._is_first:
            self._is_first = False
            return
        self._block.append(seconds)
        self._waited_s += waited_s
        if len(self._block) < _BLOCK_STEPS:
            return
        self._tried[self.share].steps += self._block
        self._tried[self.share].trials += 1
        waits_little = self._waited_s < _NOTHING_WAITED * sum(self._block)
        self._begin_block()
        del self._plan[0]
        if self.share == OFF and waits_little and self._is_quickest(OFF):
            self._settle(OFF, "without prefetch nothing waits")
        elif self._plan:
            self.share = self._plan[0]
        else:
            self._decide()

    def _is_quickest(self, share: float) -> bool:
        """Whether `share` is the quickest tried so far."""
        return all(self._tried[share].mean <= tried.mean for tried in self._tried.values() if tried.steps)

    def _decide(self) -> None:
        quickest = min(self._tried.values(), key=lambda tried: tried.mean)
        open_still = [share for share, tried in self._tried.items() if not _is_slower(tried, quickest)]
        if len(open_still) > 1 and quickest.trials < _MOST_TRIALS:
            self._plan = [*open_still, *reversed(open_still)]
            self.share = self._plan[0]
            return
        # Among those that are near the quickest the narrowest reads least.
        near = [share for share in open_still if self._tried[share].mean * _CLEARLY <= quickest.mean]
        # The current choice is left only for a clearly better one.
        chosen = self.chosen if self._settled_s and self.chosen in near else min(near)
        told = ", ".join(
            f"{_name(share)} {1e3 * tried.mean:.2f}" for share, tried in sorted(self._tried.items(), reverse=True)
        )
        self._settle(chosen, f"ms a step: {told}")

    def _settle(self, share: float, why: str) -> None:
        self._hold = min(2 * self._hold, _LAST_HOLD) if share == self.chosen and self._settled_s else _FIRST_HOLD
        self.changes += share != self.chosen
        self.chosen = self.share = share
        self.why = why
        self._settled_s = self._tried[share].mean
        self._left, self._recent, self._plan = self._hold, [], []

    def _watch(self, seconds: float) -> None:
        self._left -= 1
        self._recent.append(seconds)
        if self._left <= 0:
            # Try its neighbours first, to see whether it is still the best; all shares where nothing was tried yet.
            self._begin_trials(self._neighbours() if self._settled_s else self._shares)
        elif len(self._recent) >= _WATCHED_STEPS:
            recent, self._recent = _typical(self._recent), []
            if self._settled_s and not 1 / _CHANGED < recent / self._settled_s < _CHANGED:
                self._hold = _FIRST_HOLD
                self._begin_trials(self._shares)

    def _neighbours(self) -> list[float]:
        at = self._shares.index(self.chosen)
        return list(self._shares[max(0, at - 1) : at + 2])


def _usual(seconds: Sequence[float]) -> list[float]:
    """Drop the slowest seventh: one slow step says more about the machine than about prefetch."""
    return sorted(seconds)[: len(seconds) - len(seconds) // _BLOCK_STEPS]


def _typical(seconds: Sequence[float]) -> float:
    kept = _usual(seconds)
    return sum(kept) / len(kept)


def _is_slower(tried: _Tried, quickest: _Tried) -> bool:
    """Slower by more than a little, and by more than chance."""
    apart = tried.mean - quickest.mean
    return apart > (1 - _CLEARLY) * quickest.mean and apart > _CHANCE * (tried.error**2 + quickest.error**2) ** 0.5


def _name(share: float) -> str:
    return "off" if share == OFF else f"{share:.0%} width"
