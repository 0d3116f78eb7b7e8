"""OpenAI's Responses: a conversation in items, answered by items, whole or streamed; nothing is stored."""
