"""Conversations with a model, in no API's wire format: messages to a prompt, and an answer's text to its parts."""
