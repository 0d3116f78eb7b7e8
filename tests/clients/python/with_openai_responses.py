"""The openai SDK at /v1/responses."""

import json
from typing import Any

import openai
from job import Job, Person, run, user


def calls_of(response: Any) -> list[Any]:
    return [item for item in response.output if item.type == "function_call"]


def client(job: Job) -> dict[str, Any]:
    responses = openai.OpenAI(base_url=job.base, api_key="none", max_retries=0).responses
    asked: dict[str, Any] = {"model": job.model, "max_output_tokens": job.limit}
    choice = {"type": "function", "name": job.choice} if job.choice else "auto"
    first = responses.create(input=[user(job.question)], **asked)
    with responses.stream(input=[user(job.question)], **asked) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    again = responses.create(input=[user(job.question), *first.output, user(job.again)], **asked)

    tools = [{"type": "function", "strict": False, **tool} for tool in job.tools]
    called = responses.create(input=[user(job.call)], tools=tools, tool_choice=choice, **asked)
    with responses.stream(input=[user(job.call)], tools=tools, tool_choice=choice, **asked) as stream:
        for _ in stream:
            pass
        streamed_call = stream.get_final_response()
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": job.result} for call in calls_of(called)
    ]
    last = responses.create(input=[user(job.call), *called.output, *results], tools=tools, **asked)
    parsed = responses.parse(input=[user(job.person)], text_format=Person, **asked)
    thoughts = [part.text for item in first.output if item.type == "reasoning" for part in item.content]
    return {
        "text": first.output_text,
        "streamed": streamed,
        "reasoning": "".join(thoughts),
        "again": again.output_text,
        "calls": [[call.name, json.loads(call.arguments)] for call in calls_of(called)],
        "streamed_calls": [[call.name, json.loads(call.arguments)] for call in calls_of(streamed_call)],
        "after": last.output_text,
        "person": parsed.output_parsed.plain(),
    }


run(client)
