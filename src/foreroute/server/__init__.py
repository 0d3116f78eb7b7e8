"""An OpenAI-compatible server: it accepts what existing clients send, and answers in the format they expect."""
