"""What each client is to tell of a job."""

_CHAT = frozenset({"text", "streamed", "again", "calls", "streamed_calls", "after", "person"})
_THINKS = _CHAT | {"reasoning"}
_AGENT = _CHAT | {"streamed_after"}
_LOOPS = _CHAT | {"again_after_stream", "looped"}
# By how it is started: its script and arguments.
CLIENTS: dict[str, frozenset[str]] = {
    "with_openai_chat.py": _THINKS,
    "with_openai_responses.py": _THINKS,
    "with_anthropic.py": _THINKS,
    "with_langchain.py": _CHAT,
    "with_litellm.py": _THINKS,
    "with_instructor.py": frozenset({"text", "streamed", "person", "streamed_person"}),
    "with_agents.py chat": _AGENT,
    "with_agents.py responses": _AGENT,
    "with_openai_chat.mjs": _THINKS,
    "with_openai_responses.mjs": _THINKS,
    "with_ai_sdk.mjs compatible": _LOOPS | {"reasoning"},
    "with_ai_sdk.mjs chat": _LOOPS,
    "with_ai_sdk.mjs responses": _LOOPS | {"refused"},
}
# Told only where a call is enforced.
_BY_CALL = {"with_instructor.py": frozenset({"called_person"})}
# To a client that takes its items for stored.
REFUSED = (
    "item_reference is not supported here: nothing is stored. Send whole items: clients do with `store: false` in "
    "their settings."
)


def wanted_of(client: str, *, is_enforced: bool = False) -> frozenset[str]:
    """The names of what a client is to tell of a job, neither more nor less. is_enforced: of one that has a choice."""
    return CLIENTS[client] | (_BY_CALL.get(client, frozenset()) if is_enforced else frozenset())
