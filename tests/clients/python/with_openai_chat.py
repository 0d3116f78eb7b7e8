"""The openai SDK at /v1/chat/completions."""

import json
from typing import Any

import openai
from job import Job, Person, run, user


def client(job: Job) -> dict[str, Any]:
    chat = openai.OpenAI(base_url=job.base, api_key="none", max_retries=0).chat.completions
    asked: dict[str, Any] = {"model": job.model, "max_completion_tokens": job.limit}
    choice = {"type": "function", "function": {"name": job.choice}} if job.choice else "auto"
    first = chat.create(messages=[user(job.question)], **asked).choices[0].message
    with chat.stream(messages=[user(job.question)], **asked) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "content.delta")
    again = chat.create(messages=[user(job.question), first, user(job.again)], **asked).choices[0].message

    with_tools = {**asked, "tools": job.functions}
    called = chat.create(messages=[user(job.call)], tool_choice=choice, **with_tools).choices[0].message
    with chat.stream(messages=[user(job.call)], tool_choice=choice, **with_tools) as stream:
        for _ in stream:
            pass
        streamed_call = stream.get_final_completion().choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": job.result} for call in called.tool_calls]
    last = chat.create(messages=[user(job.call), called, *results], **with_tools).choices[0].message
    parsed = chat.parse(messages=[user(job.person)], response_format=Person, **asked).choices[0].message.parsed
    return {
        "text": first.content,
        "streamed": streamed,
        "reasoning": getattr(first, "reasoning_content", ""),
        "again": again.content,
        "calls": [[call.function.name, json.loads(call.function.arguments)] for call in called.tool_calls],
        "streamed_calls": [
            [call.function.name, json.loads(call.function.arguments)] for call in streamed_call.tool_calls
        ],
        "after": last.content,
        "person": parsed.plain(),
    }


run(client)
