"""The API's formats: OpenAI's requests, answers, errors and streams."""
