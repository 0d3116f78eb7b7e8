"""What is waited for? The rules of each policy, on plain lists. And how much is guessed: the governor."""

from foreroute.policy.governor import Governor
from foreroute.policy.rules import Policy, stood_in, waited_for

__all__ = ["Governor", "Policy", "stood_in", "waited_for"]
