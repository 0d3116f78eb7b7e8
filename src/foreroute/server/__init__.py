"""An OpenAI-compatible server: what existing clients send, answered in the shapes that they read."""
