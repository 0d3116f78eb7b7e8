"""Describe a pool for assertions, errors and debuggers."""

from collections.abc import Collection, Sequence

from foreroute.residency.states import STATE_NAMES

# Above this number of slots, they are counted by state instead of listed.
_MOST_SLOTS = 32


def picture_of(
    slots: range, borrowed: Collection[int], slot_of: Sequence[int], state: Sequence[int], prefetched: Collection[int]
) -> str:
    """Describe what each of `slots` holds; for a large pool, count the slots per state.

    Args:
        slots: their numbers. borrowed: those of them that are. prefetched: keys.
        slot_of, state: by key; -1 for a key without a slot.
    """
    pictures = ["free"] * len(slots)
    for slot in borrowed:
        pictures[slot - slots.start] = "borrowed"
    for key, slot in enumerate(slot_of):
        if slot >= 0:
            pictures[slot - slots.start] = (
                f"{key} {'prefetched ' if key in prefetched else ''}{STATE_NAMES[state[key]]}"
            )
    if len(slots) > _MOST_SLOTS:
        states = [picture.split()[-1] for picture in pictures]
        pictures = [f"{states.count(name)} {name}" for name in STATE_NAMES if name in states]
    return ", ".join(pictures)
