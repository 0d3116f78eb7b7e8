"""The anthropic SDK at /v1/messages."""

from typing import Any

import anthropic
from job import Job, Person, run, user


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def calls_of(message: Any) -> list[Any]:
    return [block for block in message.content if block.type == "tool_use"]


def client(job: Job) -> dict[str, Any]:
    messages = anthropic.Anthropic(base_url=job.url, api_key="none", max_retries=0).messages
    asked: dict[str, Any] = {"model": job.model, "max_tokens": job.limit}
    first = messages.create(messages=[user(job.question)], **asked)
    with messages.stream(messages=[user(job.question)], **asked) as stream:
        streamed = "".join(stream.text_stream)
    talk = [user(job.question), {"role": "assistant", "content": first.content}, user(job.again)]
    again = messages.create(messages=talk, **asked)
    counted = messages.count_tokens(model=job.model, messages=talk).input_tokens
    assert counted == again.usage.input_tokens + (again.usage.cache_read_input_tokens or 0), (counted, again.usage)

    tools = [
        {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}
        for tool in job.tools
    ]
    choice = {"type": "tool", "name": job.choice} if job.choice else {"type": "auto"}
    called = messages.create(messages=[user(job.call)], tools=tools, tool_choice=choice, **asked)
    with messages.stream(messages=[user(job.call)], tools=tools, tool_choice=choice, **asked) as stream:
        streamed_call = stream.get_final_message()
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": job.result} for call in calls_of(called)]
    talk = [user(job.call), {"role": "assistant", "content": called.content}, {"role": "user", "content": results}]
    last = messages.create(messages=talk, tools=tools, **asked)
    parsed = messages.parse(messages=[user(job.person)], output_format=Person, **asked)
    return {
        "text": text_of(first),
        "streamed": streamed,
        "reasoning": "".join(block.thinking for block in first.content if block.type == "thinking"),
        "again": text_of(again),
        "calls": [[call.name, call.input] for call in calls_of(called)],
        "streamed_calls": [[call.name, call.input] for call in calls_of(streamed_call)],
        "after": text_of(last),
        "person": parsed.parsed_output.plain(),
    }


run(client)
