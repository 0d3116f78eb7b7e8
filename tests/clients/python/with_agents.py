"""openai-agents: its loop of calls and results over chat completions (argument `chat`) or Responses (`responses`)."""

import asyncio
import json
import sys
from typing import Any

import agents
import openai
from job import Job, Person, run, user


async def talk(job: Job) -> dict[str, Any]:
    agents.set_tracing_disabled(True)
    own = openai.AsyncOpenAI(base_url=job.base, api_key="none", max_retries=0)
    kind = agents.OpenAIChatCompletionsModel if sys.argv[1] == "chat" else agents.OpenAIResponsesModel
    model = kind(model=job.model, openai_client=own)
    settings = agents.ModelSettings(max_tokens=job.limit)
    plain = agents.Agent(name="Plain", model=model, model_settings=settings)
    first = await agents.Runner.run(plain, job.question)
    stream = agents.Runner.run_streamed(plain, job.question)
    streamed = [
        event.data.delta
        async for event in stream.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    again = await agents.Runner.run(plain, [*first.to_input_list(), user(job.again)])

    made: list[Any] = []

    def tool(given: dict[str, Any]) -> agents.FunctionTool:
        async def call(context: Any, arguments: str) -> str:
            made.append([given["name"], json.loads(arguments)])
            return job.result

        return agents.FunctionTool(
            given["name"], given["description"], given["parameters"], call, strict_json_schema=False
        )

    acting = agents.Agent(
        name="Acting",
        model=model,
        tools=[tool(one) for one in job.tools],
        model_settings=agents.ModelSettings(max_tokens=job.limit, tool_choice=job.choice or "auto"),
    )
    last = await agents.Runner.run(acting, job.call, max_turns=3)
    calls, made = made, []
    stream = agents.Runner.run_streamed(acting, job.call, max_turns=3)
    async for _ in stream.stream_events():
        pass
    asked = agents.Agent(name="Asked", model=model, output_type=Person, model_settings=settings)
    person = await agents.Runner.run(asked, job.person)
    await own.close()
    return {
        "text": first.final_output,
        "streamed": "".join(streamed),
        "again": again.final_output,
        "calls": calls,
        "streamed_calls": made,
        "after": last.final_output,
        "streamed_after": stream.final_output,
        "person": person.final_output.plain(),
    }


run(lambda job: asyncio.run(talk(job)))
