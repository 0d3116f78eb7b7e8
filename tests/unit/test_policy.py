"""The rules on plain lists: what is waited for, and that the rules on tensors are the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreroute.errors import PolicyError
from foreroute.evals.fetched_only import mask_to_substitute
from foreroute.policy import Policy, misses_to_substitute, waited_for

EXACT, SPECULATIVE, PAPER = Policy("exact"), Policy("speculative"), Policy("paper")


def tolerance(tau):
    return Policy("tolerance", tau)


@pytest.mark.parametrize("text", ["exact", "tolerance:0.1", "tolerance:0", "tolerance:1", "speculative", "paper"])
def test_a_policy_is_written_as_it_is_read(text):
    assert str(Policy.parse(text)) == text
    assert Policy.parse(text).is_exact == (text == "exact")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tolerance", "tolerance:TAU"),
        ("tolerance:", "not a number"),
        ("tolerance:much", "'much' is not a number"),
        ("tolerance:1.5", "from 0 to 1"),
        ("tolerance:-0.1", "from 0 to 1"),
        ("tolerance:nan", "from 0 to 1"),
        ("exact:0.1", "not known"),
        ("fast", "Choose exact"),
        ("", "Choose exact"),
    ],
)
def test_what_is_no_policy_is_named(text, says):
    with pytest.raises(PolicyError, match=says):
        Policy.parse(text)


def test_tolerance_drops_the_smallest_while_they_fit():
    weights = [0.5, 0.25, 0.125, 0.125]
    assert misses_to_substitute(tolerance(0.25), weights, [1, 2, 3]) == [2, 3]
    assert misses_to_substitute(tolerance(0.24), weights, [1, 2, 3]) == [2]
    assert misses_to_substitute(tolerance(0.25), weights, [0, 1]) == [1]
    assert misses_to_substitute(tolerance(0.0), weights, [1, 2, 3]) == []
    assert misses_to_substitute(tolerance(1.0), weights, [0, 1, 2, 3]) == [2, 3, 1, 0]


def test_it_stops_at_the_first_that_does_not_fit():
    """A larger one behind it is not tried: the loss is bounded by tau, and the order is by weight."""
    assert misses_to_substitute(tolerance(0.25), [0.2, 0.1, 0.7], [0, 1]) == [1]


def test_tau_is_a_share_whatever_the_weights_sum_to():
    weights = [4.0, 3.0, 2.0, 1.0]
    assert misses_to_substitute(tolerance(0.3), weights, [1, 2, 3]) == [3, 2]


def test_equal_weights_go_by_position():
    assert misses_to_substitute(tolerance(0.5), [0.25] * 4, [3, 1, 2]) == [1, 2]


def test_exact_and_paper_wait_and_speculative_does_not():
    assert misses_to_substitute(EXACT, [0.9, 0.1], [1]) == []
    assert misses_to_substitute(PAPER, [0.9, 0.1], [1]) == []
    assert misses_to_substitute(SPECULATIVE, [0.9, 0.1], [0, 1]) == [1, 0]
    # What weighs nothing is waited for too: the bits are those of the expert itself.
    assert misses_to_substitute(EXACT, [1.0, 0.0], [1]) == []


def test_a_step_waits_for_what_one_of_its_tokens_waits_for():
    routed = [[1, 2], [2, 3], [5, -1]]
    weights = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]]
    there = {1}.__contains__
    assert waited_for([SPECULATIVE] * 3, routed, weights, there) == set()
    assert waited_for([EXACT] * 3, routed, weights, there) == {2, 3, 5}
    # 2 is small for the first token, and large for the second.
    assert waited_for([tolerance(0.1)] * 3, routed, weights, there) == {2, 5}
    assert waited_for([SPECULATIVE, EXACT, SPECULATIVE], routed, weights, there) == {2, 3}


@pytest.mark.parametrize(("name", "tau"), [("fast", 0.0), ("tolerance", 7.0), ("exact", 0.1)])
def test_a_policy_made_by_hand_is_checked_too(name, tau):
    with pytest.raises(PolicyError):
        Policy(name, tau)


def test_two_policies_never_share_a_name():
    assert str(tolerance(0.1234567)) != str(tolerance(0.1234568))


def test_what_is_no_expert_has_no_mass():
    assert waited_for([tolerance(0.5)], [[4, -1]], [[0.4, 0.6]], lambda key: False) == {4}


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8),
    st.floats(0, 1),
    st.sampled_from(["tolerance", "speculative", "exact", "paper"]),
    st.data(),
)
def test_the_rule_on_tensors_is_the_rule(weights, tau, name, data):
    missing = data.draw(st.lists(st.booleans(), min_size=len(weights), max_size=len(weights)))
    policy = Policy(name, tau if name == "tolerance" else 0.0)
    plain = misses_to_substitute(policy, weights, [at for at, is_missing in enumerate(missing) if is_missing])
    rows = mask_to_substitute(policy, torch.tensor([weights], dtype=torch.float64), torch.tensor([missing]))
    assert rows[0].nonzero().flatten().tolist() == sorted(plain)
