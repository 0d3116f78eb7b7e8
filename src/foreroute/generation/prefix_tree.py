"""Which beginnings of conversations are kept, and which are evicted: a radix tree over token ids, of bounded memory.

What is kept of the tokens (`KeptPart`) is opaque here, so that every decision can be tested without a tensor.
Conversations that begin alike share one node for their beginning. Some models can continue anywhere; others (a sliding
window, linear attention) only where their state was kept, at the end of a node (`State`).
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class KeptPart(Protocol):
    """What is kept of a node's tokens."""

    nbytes: int

    def split(self, at: int) -> tuple["KeptPart", "KeptPart"]:
        """The parts of the first `at` tokens and of the others, each in memory of its own."""


class State(Protocol):
    """What a model needs beside the parts to continue."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

    @property
    def least(self) -> int:
        """The fewest tokens that it can be cut to."""


@dataclass(frozen=True)
class NewState:
    """A state that is made once there is room for it, of at most `nbytes`; least: see State."""

    nbytes: int
    least: int
    make: Callable[[], State]


@dataclass(eq=False)
class Node:
    """Tokens `ids`, which follow those of `parent`; `end` tokens from the beginning.

    used: when they were last a part of a hit. state_used: when something last began from the state.
    """

    ids: tuple[int, ...] = ()
    start: int = 0
    part: Any = None
    parent: "Node | None" = None
    state: Any = None
    used: int = 0
    state_used: int = 0
    children: dict[int, "Node"] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Tokens from the beginning to this node's last."""
        return self.start + len(self.ids)

    def below(self) -> Iterator["Node"]:
        """This node, and all that follow it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


@dataclass(frozen=True)
class Found:
    """A kept beginning: `length` tokens, whose parts `nodes` have. state: the node whose state serves, if one must."""

    length: int
    nodes: tuple[Node, ...]
    state: Node | None


class PrefixTree:
    """Kept beginnings of several owners (models), together within `max_bytes`.

    The least recently used are evicted first, from the ends of conversations: a beginning stays while anything that
    follows it does. States within a conversation are evicted on their own.

    Args:
        least_hit: fewest tokens of a hit. A common token or two are none: they keep nothing from being evicted.
    """

    def __init__(self, max_bytes: int, least_hit: int) -> None:
        self.max_bytes, self.least_hit = max_bytes, least_hit
        self.nbytes = 0
        self._now = 0
        self._roots: dict[Hashable, Node] = {}
        self._needs_state: set[Hashable] = set()

    def __len__(self) -> int:
        """Number of ends that a prompt may follow: of conversations, and states within them."""
        return sum(1 for node in self._nodes() if not node.children or node.state is not None)

    def clear(self) -> None:
        """Drop everything."""
        self._roots.clear()
        self._needs_state.clear()
        self.nbytes = 0

    def owners(self) -> list[Hashable]:
        """Those of whom something may be kept."""
        return list(self._roots)

    def forget(self, owner: Hashable) -> None:
        """Drop what is kept of an owner."""
        root = self._roots.pop(owner, None)
        self._needs_state.discard(owner)
        if root is not None:
            self.nbytes -= sum(_nbytes(node) for node in root.below())

    def known(self, owner: Hashable, ids: Sequence[int]) -> int:
        """Number of tokens that `ids` share with something that is kept."""
        root = self._roots.get(owner)
        return 0 if root is None else _walk(root, ids)[1]

    def reusable(self, owner: Hashable, ids: Sequence[int], at_most: int) -> int:
        """Number of tokens that `find` would find; nothing counts as used."""
        found = self._look(owner, ids, at_most)
        return 0 if found is None else found.length

    def find(self, owner: Hashable, ids: Sequence[int], at_most: int) -> Found | None:
        """Find the longest beginning of `ids` that can be continued, of `at_most` tokens; it counts as used now."""
        found = self._look(owner, ids, at_most)
        if found is not None:
            self._touch(found.nodes, found.length)
            if found.state is not None:
                found.state.used = found.state.state_used = self._now
        return found

    def _look(self, owner: Hashable, ids: Sequence[int], at_most: int) -> Found | None:
        root = self._roots.get(owner)
        if root is None:
            return None
        path, length = _walk(root, ids, at_most)
        state = None
        if owner in self._needs_state:
            length, state = _best_state(root, path, length)
        if length < self.least_hit:
            return None
        return Found(length, tuple(node for node in path if node.start < length), state)

    def insert(
        self,
        owner: Hashable,
        ids: Sequence[int],
        token_bytes: int,
        part_of: Callable[[int, int], KeptPart],
        state: NewState | None = None,
    ) -> bool:
        """Keep `ids`, of which only what is not kept yet takes memory.

        Args:
            token_bytes: what a token takes. part_of: makes the part of tokens [start, end).
            state: after the last of them, for a model that needs one; always or never for one owner.
        Returns:
            False, and nothing is evicted, if they do not fit alone.
        """
        root = self._roots.setdefault(owner, Node())
        if state is not None:
            self._needs_state.add(owner)
        path, known = _walk(root, ids)
        if path and path[-1].end > known and (known < len(ids) or state is not None):
            path[-1] = self._split(path[-1], known - path[-1].start)
        last = path[-1] if path else root
        needed = (len(ids) - known) * token_bytes
        if state is not None and not _serves(last, len(ids), state):
            needed += state.nbytes
        else:
            state = None
        if sum(node.part.nbytes for node in path) + needed > self.max_bytes:
            return False
        self._touch(path, known)
        self._make_room(needed, path)
        if known < len(ids):
            added = Node(tuple(ids[known:]), known, part_of(known, len(ids)), last, used=self._now)
            self.nbytes += added.part.nbytes
            last.children[ids[known]] = added
            last = added
        if state is not None:
            self.nbytes -= 0 if last.state is None else last.state.nbytes
            last.state, last.state_used = state.make(), self._now
            self.nbytes += last.state.nbytes
        return True

    def nodes(self, owner: Hashable) -> list[tuple[tuple[int, ...], Node]]:
        """All nodes of an owner, each after the one that it follows, with the tokens from the beginning to its end."""
        root = self._roots.get(owner)
        found: list[tuple[tuple[int, ...], Node]] = []
        stack: list[tuple[tuple[int, ...], Node]] = [] if root is None else [((), root)]
        while stack:
            ids, node = stack.pop()
            found += [(ids, node)] if node is not root else []
            stack += [((*ids, *child.ids), child) for child in node.children.values()]
        return found

    def restore(
        self, owner: Hashable, ids: Sequence[int], start: int, part: KeptPart, state: State | None, used: int = 0
    ) -> bool:
        """Keep a node as `nodes` had it: `ids`, those from `start` on its own. False if it does not fit, or not follow.

        Nothing is evicted for it. used: when it was last used, by the tree that had it; new uses are later.
        """
        root = self._roots.setdefault(owner, Node())
        path, known = _walk(root, ids)
        parent = path[-1] if path else root
        nbytes = part.nbytes + (0 if state is None else state.nbytes)
        if known != start or parent.end != start or start == len(ids) or self.nbytes + nbytes > self.max_bytes:
            return False
        self._now = max(self._now, used)
        if state is not None:
            self._needs_state.add(owner)
        parent.children[ids[start]] = Node(tuple(ids[start:]), start, part, parent, state, used=used, state_used=used)
        self.nbytes += nbytes
        return True

    def prune(self, owner: Hashable) -> None:
        """Drop the ends that nothing can continue from, where an owner needs a state."""
        for _, node in reversed(self.nodes(owner)):
            if owner in self._needs_state and node.state is None and not node.children:
                self._drop(node, ())

    def _nodes(self) -> Iterator[Node]:
        for root in self._roots.values():
            yield from (node for node in root.below() if node is not root)

    def _touch(self, path: Sequence[Node], length: int) -> None:
        """Count these nodes, whose first `length` tokens are used, as used now."""
        self._now += 1
        for node in path:
            # The rest of a node of which a token or two are common is not in use.
            if node.end <= length or length - node.start >= self.least_hit:
                node.used = self._now

    def _split(self, node: Node, at: int) -> Node:
        """Make two nodes of one; return the first, of `at` tokens."""
        first, second = node.part.split(at)
        assert node.parent is not None, "the root has no tokens"
        head = Node(node.ids[:at], node.start, first, node.parent, used=node.used)
        node.parent.children[node.ids[0]] = head
        node.ids, node.start, node.part, node.parent = node.ids[at:], head.end, second, head
        head.children[node.ids[0]] = node
        return head

    def _make_room(self, nbytes: int, spared: Sequence[Node]) -> None:
        """Evict until `nbytes` more fit; of the nodes `spared` only states may go."""
        while self.nbytes + nbytes > self.max_bytes:
            ends = ((node.used, 0, node) for node in self._nodes() if not node.children and node not in spared)
            states = (
                (node.state_used, 1, node)
                for node in self._nodes()
                if node.state is not None and (node.children or node in spared)
            )
            _, is_state, victim = min((*ends, *states), key=lambda one: one[:2])
            if is_state:
                self.nbytes -= victim.state.nbytes
                victim.state = None
            else:
                self._drop(victim, spared)

    def _drop(self, node: Node, spared: Sequence[Node]) -> None:
        """Evict an end of a conversation, and what can no longer be continued without it."""
        owner, parent = self._owner_of(node), node.parent
        while parent is not None:
            self.nbytes -= _nbytes(node)
            del parent.children[node.ids[0]]
            node, parent = parent, parent.parent
            is_useless = owner in self._needs_state and node.state is None and not node.children
            if not is_useless or node in spared:
                return

    def _owner_of(self, node: Node) -> Hashable:
        while node.parent is not None:
            node = node.parent
        return next(owner for owner, root in self._roots.items() if root is node)


def _nbytes(node: Node) -> int:
    return sum(held.nbytes for held in (node.part, node.state) if held is not None)


def _walk(root: Node, ids: Sequence[int], at_most: int | None = None) -> tuple[list[Node], int]:
    """The nodes that `ids` go through, and how many tokens of them; the last node may go on otherwise.

    at_most: of `ids`; None: all. They are compared node by node, and not copied whole.
    """
    end = len(ids) if at_most is None else min(len(ids), at_most)
    path: list[Node] = []
    node, known = root, 0
    while known < end:
        following = node.children.get(ids[known])
        if following is None:
            break
        shared = common_length(following.ids, tuple(ids[known : min(known + len(following.ids), end)]))
        path.append(following)
        known += shared
        if shared < len(following.ids):
            break
        node = following
    return path, known


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of tokens with which both begin; they are of one type, list or tuple."""
    low, high = 0, min(len(left), len(right))
    # Comparing slices is some fifty times as fast as comparing tokens one by one.
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _serves(node: Node, end: int, state: NewState) -> bool:
    """Whether the node has a state of `end` tokens already that can be cut as far as this one."""
    return node.end == end and node.state is not None and node.state.least <= state.least


def _best_state(root: Node, path: Sequence[Node], known: int) -> tuple[int, Node | None]:
    """The most tokens of `known` on this path that some state serves, and its node; (0, None) if none does.

    Beside the states on the path these are states after it that can be cut to it.
    """
    best, found = 0, None
    for node in reversed((root, *path)):
        limit = min(node.end, known)
        if limit <= best:
            break
        for other in node.below():
            if other.state is not None and other.end >= limit >= other.state.least:
                best, found = limit, other
                break
    return best, found
