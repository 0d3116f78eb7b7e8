"""Choose how many tokens are drafted by measuring what drafts gain. Pure: times are passed in, no clock is read.

A draft can lose: a verify step takes longer than a decode step, and what the model does not choose was computed for
nothing. So the governor keeps three measurements: the time of a plain step; the time of a drafted step, as a line over
the number of drafted tokens; and the share of drafted tokens that the model accepts. From these follows the length with
the least time per token, or none.

What a draft has cost beyond plain steps is kept as a debt, and trials wait while it is above a small share of the time:
over an answer of some length, drafting is never slower than not drafting by more than that share.

Rows that share a step share its time: tokens, drafted and accepted, are then those of a row on average.
"""

from collections.abc import Sequence

# Of the time, the most that drafting may have lost; and the plain steps' time that it may lose before.
_MOST_LOST, _FIRST_LOST_STEPS = 0.012, 4.0
# Time gained before counts for as many plain steps at most: a text that turns bad is noticed soon.
_MOST_GAINED_STEPS = 8.0
# A draft must be this much quicker than none; among lengths that are near the best, the shortest reads least.
_CLEARLY, _NEAR = 1.03, 1.01
# Plain steps that are measured before the first draft; the first after a prompt does not count.
_FIRST_PLAIN = 3
# While nothing is drafted, plain steps between two decisions: each takes 1 to 2 % of a quick step.
_DECIDED_EVERY = 8
# A plain step is measured at least once in as many steps.
_PLAIN_EVERY = 96
# Weights of earlier measurements at each new one: of times, and of acceptance, which changes with the text.
_TIMES_KEPT, _ACCEPTANCE_KEPT = 0.97, 0.96
# One slow step says more about the machine than about drafts: it counts as no more than this multiple of what is usual.
_MOST_UNUSUAL = 3.0
# Assumed before any measurement: acceptance, and a drafted step's time in plain steps; and how many measurements that
# counts as.
_ACCEPTED_BEFORE, _BEFORE_WEIGHT = 0.7, 2.0
_STEP_BEFORE, _TOKEN_BEFORE, _TIME_WEIGHT = 1.3, 0.2, 0.5
# A trial is as long as this.
_TRIAL = 3
# Bounds of the confidence below which a draft ends.
_LEAST_CONFIDENT, _MOST_CONFIDENT = 0.03, 0.7


class DraftGovernor:
    """Read `length` before a step, and call `step` after it.

    Args:
        most: tokens of the longest draft.

    Attributes:
        length: tokens to draft before the next step; 0 is a plain step.
        chosen: the length decided on last, trials and measurements of plain steps left out.
        least_confidence: a draft may end where its tokens, all together, are less likely than this to be accepted.
        drafted, accepted, drafted_steps: counts of all steps.
    """

    def __init__(self, most: int = 7) -> None:
        assert most > 0, "no draft needs no governor"
        self.most = most
        self.length = self.chosen = 0
        self.least_confidence = 0.1
        self.drafted = self.accepted = self.drafted_steps = 0
        self._num_plain = 0
        self._plain = _Mean()
        # Steps before which a draft was asked for, and none was made.
        self._asked = _Mean()
        self._since_plain = 0
        self._line = _Line()
        self._accepted, self._tried = _ACCEPTED_BEFORE * _BEFORE_WEIGHT, _BEFORE_WEIGHT
        # By position: drafts that could have reached it, and those that did.
        self._could = [_BEFORE_WEIGHT] * most
        self._reached = [_BEFORE_WEIGHT] * most
        self._debt_s = self._spent_s = 0.0
        self._is_first = True

    @property
    def plain_s(self) -> float:
        """Seconds of a plain step; 0 before any was measured."""
        return self._plain.value

    @property
    def acceptance(self) -> float:
        """Share of recent drafted tokens that the model accepted, of those whose predecessors were."""
        return self._accepted / self._tried

    def begin(self) -> None:
        """Begin an answer: the step after a prompt does not count."""
        self._is_first = True

    def step(self, drafted: int, accepted: int, seconds: float, limit: int | None = None) -> None:
        """Record a step of `seconds`, drafting included, that gave `accepted` + 1 tokens.

        Args:
            drafted: tokens that were drafted; 0: a plain step. limit: tokens that could have been; `length` if None.
        """
        self.step_rows([(drafted, accepted)], seconds, limit)

    def step_rows(self, rows: Sequence[tuple[int, int]], seconds: float, limit: int | None = None) -> None:
        """Record a step that several rows shared, always as many: all of its times are of the whole step.

        Args:
            rows: for each row the tokens that were drafted and those of them that were accepted. seconds, limit: see
                `step`; the limit is that of each row.
        """
        could = self.length if limit is None else limit
        if any(drafted for drafted, _ in rows):
            self._record_draft(rows, seconds)
        elif could:
            self._record_asked(seconds)
        elif not self._is_first:
            self._num_plain += 1
            self._since_plain = 0
            self._plain.add(seconds)
            self._spent_s += self._plain.value
        self._is_first = False
        for at in range(min(could, self.most)):
            reached = sum(drafted > at for drafted, _ in rows) / len(rows)
            self._could[at] = _ACCEPTANCE_KEPT * self._could[at] + 1
            self._reached[at] = _ACCEPTANCE_KEPT * self._reached[at] + reached
        if could or self.chosen or self._num_plain <= _FIRST_PLAIN or not self._num_plain % _DECIDED_EVERY:
            self._decide()

    def seconds_per_token(self, length: int) -> float:
        """Expected seconds of a token where `length` are drafted at most; 0: none."""
        return self._times()[length]

    def _record_asked(self, seconds: float) -> None:
        """A step before which nothing was likely enough to be drafted."""
        self._asked.add(seconds)
        self._count(min(seconds, _MOST_UNUSUAL * self._asked.value), 1)

    def _record_draft(self, rows: Sequence[tuple[int, int]], seconds: float) -> None:
        drafted, accepted = (sum(counts) for counts in zip(*rows, strict=True))
        self.drafted_steps += 1
        self.drafted += drafted
        self.accepted += accepted
        each = drafted / len(rows)
        usual = self._line.at(each, self._plain.value)
        seconds = min(seconds, _MOST_UNUSUAL * usual)
        self._line.add(each, seconds)
        # Positions behind the first that was not accepted say nothing.
        tried = accepted + sum(chosen < most for most, chosen in rows)
        self._accepted = _ACCEPTANCE_KEPT * self._accepted + accepted / len(rows)
        self._tried = _ACCEPTANCE_KEPT * self._tried + tried / len(rows)
        self._count(seconds, 1 + accepted / len(rows))

    def _count(self, seconds: float, tokens: float) -> None:
        """Count what a step has lost, or gained, beside plain steps for as many tokens of each row."""
        alone_s = self._plain.value * tokens
        self._since_plain += 1
        self._spent_s += alone_s
        self._debt_s = max(self._debt_s + seconds - alone_s, -_MOST_GAINED_STEPS * self._plain.value)

    def _times(self) -> list[float]:
        """Expected seconds of a token by the most that are drafted, from none on. Runs in every step: one pass."""
        plain_s = self._plain.value
        slope, mean_tokens, mean_s = self._line.fitted(plain_s)
        asked_s, acceptance = self._asked.value or plain_s, self.acceptance
        drafts = self._reached[0] / self._could[0]
        times, tokens, in_a_row, reached = [plain_s], 1.0, 1.0, 0.0
        for at in range(self.most):
            share = self._reached[at] / self._could[at]
            in_a_row *= acceptance
            tokens += share * in_a_row
            reached += share
            draft_s = mean_s + slope * (reached / drafts - mean_tokens) if drafts else 0.0
            times.append((drafts * draft_s + (1 - drafts) * asked_s) / tokens)
        return times

    def _decide(self) -> None:
        plain_s = self._plain.value
        if self._num_plain < _FIRST_PLAIN:
            self.length = self.chosen = 0
            return
        times = self._times()
        least = min(times[1:])
        best = next(length for length in range(1, self.most + 1) if times[length] <= _NEAR * least)
        self.chosen = best if _CLEARLY * times[best] < plain_s else 0
        self.length = self.chosen
        slope = self._line.slope(plain_s)
        # One more token pays where it is accepted more often than this share. A draft says so too rarely: of what one
        # gave 40 %, the model chose 99 %, of 20 % four fifths.
        share = slope / max(times[best], 1e-9)
        self.least_confidence = min(max(share * share, _LEAST_CONFIDENT), _MOST_CONFIDENT)
        may_lose_s = _MOST_LOST * self._spent_s + _FIRST_LOST_STEPS * plain_s
        if not self.chosen:
            trial = min(_TRIAL, self.most)
            costs_s = self._line.at(trial, plain_s) - plain_s
            self.length = trial if self._debt_s + costs_s < may_lose_s else 0
        elif self._debt_s > may_lose_s or self._since_plain >= _PLAIN_EVERY:
            self.length = 0


class _Mean:
    """A mean in which earlier values count less and less, and unusual ones no more than others."""

    def __init__(self) -> None:
        self.value, self.weight = 0.0, 0.0

    def add(self, value: float) -> None:
        if self.weight > 1:
            value = min(value, _MOST_UNUSUAL * self.value)
        self.weight = _TIMES_KEPT * self.weight + 1
        self.value += (value - self.value) / self.weight


class _Line:
    """Seconds of a drafted step over the number of its drafted tokens: a weighted least-squares line."""

    def __init__(self) -> None:
        # Weights, and weighted sums of tokens, their squares, seconds, and tokens x seconds.
        self._sums = [0.0] * 5

    def add(self, tokens: float, seconds: float) -> None:
        """Add a measurement."""
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self._sums = [_TIMES_KEPT * held + one for held, one in zip(self._sums, new, strict=True)]

    def at(self, tokens: float, plain_s: float) -> float:
        """Seconds for a step of `tokens` drafted tokens, where a plain step takes `plain_s`."""
        slope, mean_tokens, mean_s = self.fitted(plain_s)
        return mean_s + slope * (tokens - mean_tokens)

    def slope(self, plain_s: float) -> float:
        """Seconds of one more drafted token."""
        return self.fitted(plain_s)[0]

    def fitted(self, plain_s: float) -> tuple[float, float, float]:
        """The slope, and the means of tokens and seconds, through which the line goes."""
        weight, tokens, squares, seconds, products = self._sums
        for usual in (1, 7):
            time_s = plain_s * (_STEP_BEFORE + _TOKEN_BEFORE * usual)
            weight += _TIME_WEIGHT
            tokens += _TIME_WEIGHT * usual
            squares += _TIME_WEIGHT * usual * usual
            seconds += _TIME_WEIGHT * time_s
            products += _TIME_WEIGHT * usual * time_s
        mean_tokens, mean_s = tokens / weight, seconds / weight
        slope = (products / weight - mean_tokens * mean_s) / (squares / weight - mean_tokens**2)
        return max(slope, 0.0), mean_tokens, mean_s
