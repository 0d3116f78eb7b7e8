"""langchain-openai: bind_tools and with_structured_output, by a schema and by a call."""

from functools import reduce
from operator import add
from typing import Any

from job import Job, Person, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI


def client(job: Job) -> dict[str, Any]:
    chat = ChatOpenAI(base_url=job.base, api_key="none", model=job.model, max_retries=0, max_tokens=job.limit)
    first = chat.invoke(job.question)
    streamed = "".join(str(piece.content) for piece in chat.stream(job.question))
    again = chat.invoke([HumanMessage(job.question), first, HumanMessage(job.again)])

    bound = chat.bind_tools(job.functions, tool_choice=job.choice or "auto")
    called = bound.invoke(job.call)
    streamed_call = reduce(add, bound.stream(job.call))
    results = [ToolMessage(job.result, tool_call_id=call["id"]) for call in called.tool_calls]
    last = chat.bind_tools(job.functions).invoke([HumanMessage(job.call), called, *results])
    person = chat.with_structured_output(Person).invoke(job.person)
    return {
        "text": first.content,
        "streamed": streamed,
        "again": again.content,
        "calls": [[call["name"], call["args"]] for call in called.tool_calls],
        "streamed_calls": [[call["name"], call["args"]] for call in streamed_call.tool_calls],
        "after": last.content,
        "person": person.plain(),
    }


run(client)
