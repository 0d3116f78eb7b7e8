"""What is waited for? The rules of each policy, on plain lists: exact, tolerance, speculative, paper."""

from foreroute.policy.rules import Policy, stood_in, waited_for

__all__ = ["Policy", "stood_in", "waited_for"]
