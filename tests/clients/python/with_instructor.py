"""instructor: an object by a schema, the same streamed in parts, and by a call of a tool where one can be enforced."""

from typing import Any

import instructor
import openai
from job import Job, Person, run, user


def client(job: Job) -> dict[str, Any]:
    own = openai.OpenAI(base_url=job.base, api_key="none", max_retries=0)
    by_schema = instructor.from_openai(own, mode=instructor.Mode.JSON_SCHEMA)
    asked: dict[str, Any] = {"model": job.model, "messages": [user(job.person)], "max_retries": 0}
    found = {"person": by_schema.create(response_model=Person, **asked).plain()}
    found["streamed_person"] = list(by_schema.create_partial(response_model=Person, **asked))[-1].plain()
    if job.forced:
        by_call = instructor.from_openai(own, mode=instructor.Mode.TOOLS)
        found["called_person"] = by_call.create(response_model=Person, **asked).plain()
    return found


run(client)
