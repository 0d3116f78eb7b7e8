"""Hold calls back until they are known to be valid, so that a stream says of an answer what the whole answer says."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from foreroute.server.dialogue.parsing.events import CallArguments, CallBegan, CallEnded, Content, Event, Reasoning


class HeldCalls:
    """Passes the events of an answer on. Calls that are passed on are numbered without a gap.

    Args:
        are_certain: a grammar holds every call to its form: they are passed on as they are written, and only the end of
            the answer can break one. Else a call is passed on once it has ended, and as text where it is none.
    """

    def __init__(self, *, are_certain: bool = False) -> None:
        self._are_certain = are_certain
        self._held: list[CallBegan | CallArguments] = []
        self._num_calls = 0

    def pass_on(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events of which the client is told now."""
        for event in events:
            if isinstance(event, (Content, Reasoning)):
                yield event
            elif self._are_certain:
                yield replace(event, index=self._num_calls)
                self._num_calls += isinstance(event, CallEnded)
            elif not isinstance(event, CallEnded):
                self._held.append(event)
            else:
                yield from self._settled(event)
                self._held = []

    def _settled(self, end: CallEnded) -> Iterator[Event]:
        """The call that was held back, or the text that it is."""
        if not end.is_valid:
            if end.raw:
                yield Content(end.raw)
            return
        arguments = "".join(one.text for one in self._held if isinstance(one, CallArguments))
        (began,) = [one for one in self._held if isinstance(one, CallBegan)]
        yield replace(began, index=self._num_calls)
        yield CallArguments(self._num_calls, arguments)
        yield CallEnded(self._num_calls, True, "")
        self._num_calls += 1
