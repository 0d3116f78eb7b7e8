"""instructor: an object by a schema, the same streamed in parts, and by a call of a tool where one can be enforced."""

from typing import Any

import instructor
import openai
from job import Job, Person, run, user


def client(job: Job) -> dict[str, Any]:
    own = openai.OpenAI(base_url=job.base, api_key="none", max_retries=0)
    by_schema = instructor.from_openai(own, mode=instructor.Mode.JSON_SCHEMA)
    plain: dict[str, Any] = {"model": job.model, "messages": [user(job.question)], "response_model": None}
    text = by_schema.create(**plain).choices[0].message.content
    streamed = "".join(piece.choices[0].delta.content or "" for piece in by_schema.create(stream=True, **plain))
    asked: dict[str, Any] = {
        "model": job.model,
        "messages": [user(job.person)],
        "max_retries": 0,
        "max_tokens": job.limit,
    }
    found: dict[str, Any] = {"text": text, "streamed": streamed}
    found["person"] = by_schema.create(response_model=Person, **asked).plain()
    found["streamed_person"] = list(by_schema.create_partial(response_model=Person, **asked))[-1].plain()
    if job.choice:
        by_call = instructor.from_openai(own, mode=instructor.Mode.TOOLS)
        found["called_person"] = by_call.create(response_model=Person, **asked).plain()
    return found


run(client)
