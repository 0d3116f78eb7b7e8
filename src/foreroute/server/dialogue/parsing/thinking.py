"""Reasoning between two tags at an answer's start: <think> ... </think>, and other models' names for them."""

from foreroute.server.dialogue.parsing.draft import Draft
from foreroute.server.dialogue.parsing.reader import Steps

ThinkTags = tuple[str, str]
# In the order in which a template is searched for them.
KNOWN: tuple[ThinkTags, ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
    # Gemma 4: a channel's token and its name.
    ("<|channel>thought", "<channel|>"),
)


def tags_of(template: str) -> ThinkTags | None:
    """The tags that a chat template knows; None: it knows none."""
    return next((tags for tags in KNOWN if tags[0] in template or tags[1] in template), None)


def is_open(prompt: str, tags: ThinkTags) -> bool:
    """Whether a prompt ends within reasoning: its template opened it, and the model goes on."""
    return prompt.rstrip().endswith(tags[0])


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
