"""What a client sends and reads: OpenAI's requests, answers, errors and streams."""
