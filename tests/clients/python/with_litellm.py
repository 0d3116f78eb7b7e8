"""litellm, with its provider for servers that speak OpenAI's API."""

import json
from typing import Any

import litellm
from job import Job, Person, run, user


def calls_of(message: Any) -> list[Any]:
    return [[call.function.name, json.loads(call.function.arguments)] for call in message.tool_calls]


def client(job: Job) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "model": f"hosted_vllm/{job.model}",
        "api_base": job.base,
        "api_key": "none",
        "num_retries": 0,
        "max_tokens": job.limit,
    }
    choice = {"type": "function", "function": {"name": job.choice}} if job.choice else "auto"
    first = litellm.completion(messages=[user(job.question)], **asked).choices[0].message
    pieces = litellm.completion(messages=[user(job.question)], stream=True, **asked)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    again = litellm.completion(messages=[user(job.question), first, user(job.again)], **asked).choices[0].message

    with_tools = {**asked, "tools": job.functions}
    called = litellm.completion(messages=[user(job.call)], tool_choice=choice, **with_tools).choices[0].message
    pieces = litellm.completion(messages=[user(job.call)], tool_choice=choice, stream=True, **with_tools)
    streamed_call = litellm.stream_chunk_builder(list(pieces)).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": job.result} for call in called.tool_calls]
    last = litellm.completion(messages=[user(job.call), called, *results], **with_tools).choices[0].message
    person = litellm.completion(messages=[user(job.person)], response_format=Person, **asked).choices[0].message
    return {
        "text": first.content,
        "streamed": streamed,
        "reasoning": getattr(first, "reasoning_content", ""),
        "again": again.content,
        "calls": calls_of(called),
        "streamed_calls": calls_of(streamed_call),
        "after": last.content,
        "person": Person.model_validate_json(person.content).plain(),
    }


run(client)
