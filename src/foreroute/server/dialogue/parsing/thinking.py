"""Reasoning between two tags at an answer's start: <think> ... </think>, and other models' names for them."""

from foreroute.server.dialogue.parsing.draft import Draft
from foreroute.server.dialogue.parsing.reader import Steps
from foreroute.structured.reasoning import ThinkTags


def reasoning(draft: Draft, tags: ThinkTags, *, is_open: bool) -> Steps[None]:
    """Take the reasoning that an answer begins with, if it does."""
    reader, (start, end) = draft.reader, tags
    # Models repeat the tag at times that the prompt ends with.
    found = yield from reader.next_is(start, skip_space=True)
    if found is None and not is_open:
        return
    draft.reasoning.cut()
    found = yield from reader.until((end,), draft.reasoning.write)
    if found is not None:
        reader.take(len(found))
        draft.reasoning.cut()
        draft.content.cut()
