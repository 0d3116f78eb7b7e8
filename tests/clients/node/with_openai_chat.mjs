// The npm openai SDK at /v1/chat/completions.
import OpenAI from "openai";
import { PERSON, run, user } from "./job.mjs";

const callsOf = (message) => message.tool_calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]);

await run(async (job) => {
  const chat = new OpenAI({ baseURL: job.base, apiKey: "none", maxRetries: 0 }).chat.completions;
  const common = { model: job.model, max_completion_tokens: job.limit };
  const first = (await chat.create({ ...common, messages: [user(job.question)] })).choices[0].message;
  let streamed = "";
  for await (const piece of await chat.create({ ...common, messages: [user(job.question)], stream: true }))
    streamed += piece.choices[0]?.delta.content ?? "";
  const again = await chat.create({ ...common, messages: [user(job.question), first, user(job.again)] });

  const tools = job.tools.map((tool) => ({ type: "function", function: tool }));
  const choice = job.choice ? { type: "function", function: { name: job.choice } } : "auto";
  const asked = { ...common, messages: [user(job.call)], tools, tool_choice: choice };
  const called = (await chat.create(asked)).choices[0].message;
  const streamedCall = (await chat.stream(asked).finalChatCompletion()).choices[0].message;
  const results = called.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: job.result }));
  const last = await chat.create({ ...common, messages: [user(job.call), called, ...results], tools });
  const response_format = { type: "json_schema", json_schema: { name: "person", strict: true, schema: PERSON } };
  const person = await chat.parse({ ...common, messages: [user(job.person)], response_format });
  return {
    text: first.content,
    streamed,
    reasoning: first.reasoning_content ?? "",
    again: again.choices[0].message.content,
    calls: callsOf(called),
    streamed_calls: callsOf(streamedCall),
    after: last.choices[0].message.content,
    person: JSON.parse(person.choices[0].message.content),
  };
});
