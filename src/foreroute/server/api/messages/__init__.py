"""Anthropic's API: messages, whole or streamed, and how many tokens they are."""
