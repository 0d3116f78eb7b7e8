"""Decide which misses decoding waits for: each policy's rule on plain lists, the reference for tests.

A token's *misses* are the experts that its router chose and that are not resident then. A miss is either waited for,
or substituted by its default vector, the expert's mean output. The router always decides, except under `paper`, where
the guess made one layer earlier replaces its choice (arXiv 2603.19289).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foreroute.errors import PolicyError

EXACT, TOLERANCE, SPECULATIVE, PAPER = "exact", "tolerance", "speculative", "paper"
NAMES = (EXACT, TOLERANCE, SPECULATIVE, PAPER)


@dataclass(frozen=True)
class Policy:
    """One way to treat misses; `parse` reads its `str()`.

    name: of NAMES. tau: of `tolerance`, the gate mass that may be substituted, as a share of the token's; else 0.
    """

    name: str = EXACT
    tau: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NAMES or (self.tau and self.name != TOLERANCE):
            raise PolicyError(
                f"Policy {self.name!r} with tau {self.tau:g} is not known. Choose one of {', '.join(NAMES)}."
            )
        if not 0.0 <= self.tau <= 1.0:
            raise PolicyError(f"Policy {self}: tau is a share of the gate mass, from 0 to 1.")

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """Parse `exact`, `tolerance:0.1`, `speculative` or `paper`.

        Raises:
            PolicyError: anything else, or a tau outside [0, 1].
        """
        name, colon, rest = text.partition(":")
        if name not in NAMES or (name == TOLERANCE) != bool(colon):
            raise PolicyError(
                f"Policy {text!r} is not known. Choose exact, tolerance:TAU (as tolerance:0.1), speculative or paper."
            )
        if not colon:
            return cls(name)
        try:
            tau = float(rest)
        except ValueError:
            raise PolicyError(f"Policy {text!r}: {rest!r} is not a number. Write it as tolerance:0.1.") from None
        return cls(name, tau)

    def __str__(self) -> str:
        if self.name != TOLERANCE:
            return self.name
        short = f"{self.tau:g}"
        return f"{self.name}:{short if float(short) == self.tau else repr(self.tau)}"

    @property
    def substitutes(self) -> bool:
        """Whether some misses are substituted."""
        return self.name in (TOLERANCE, SPECULATIVE)

    @property
    def replaces_route(self) -> bool:
        """Whether the guess is executed instead of the router's choice."""
        return self.name == PAPER

    @property
    def is_exact(self) -> bool:
        """Whether it changes nothing of what is computed."""
        return not (self.substitutes or self.replaces_route)


def misses_to_substitute(policy: Policy, weights: Sequence[float], misses: Sequence[int]) -> list[int]:
    """Return which of a token's misses its policy substitutes.

    Greedy: the smallest first, while their gate mass is at most tau of the token's; ties by position.

    Args:
        weights: the token's gate weights, by position. misses: positions of the misses.
    Returns:
        Positions, smallest weight first.
    """
    if policy.name == SPECULATIVE:
        return sorted(misses, key=lambda at: (weights[at], at))
    if policy.name != TOLERANCE:
        return []
    # Added one by one, as tensors do: sum() of newer Pythons is more exact.
    total = mass = 0.0
    for weight in weights:
        total += weight
    allowed = policy.tau * total
    dropped: list[int] = []
    for at in sorted(misses, key=lambda at: (weights[at], at)):
        mass += weights[at]
        if mass > allowed:
            break
        dropped.append(at)
    return dropped


def waited_for(
    policies: Sequence[Policy],
    routed: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    is_resident: Callable[[int], bool],
) -> set[int]:
    """Return the missing experts that a step waits for. The other missing ones are substituted, in every token.

    An expert that one token waits for is loaded for all: a miss is substituted only if no token's policy waits for it.

    Args:
        policies: one per token. routed: the keys that each token's router chose; negative ones are no expert.
        weights: their gate weights. is_resident: whether a key is resident.
    """
    waited: set[int] = set()
    for policy, keys, row in zip(policies, routed, weights, strict=True):
        misses = [at for at, key in enumerate(keys) if key >= 0 and not is_resident(key)]
        masses = [weight if key >= 0 else 0.0 for key, weight in zip(keys, row, strict=True)]
        dropped = misses_to_substitute(policy, masses, misses)
        waited.update(keys[at] for at in misses if at not in dropped)
    return waited
