// The npm openai SDK at /v1/responses.
import OpenAI from "openai";
import { PERSON, run, user } from "./job.mjs";

const callsOf = (response) => response.output.filter((item) => item.type === "function_call");
const plain = (calls) => calls.map((call) => [call.name, JSON.parse(call.arguments)]);

await run(async (job) => {
  const responses = new OpenAI({ baseURL: job.base, apiKey: "none", maxRetries: 0 }).responses;
  const common = { model: job.model, max_output_tokens: job.limit };
  const first = await responses.create({ ...common, input: [user(job.question)] });
  let streamed = "";
  for await (const event of await responses.create({ ...common, input: [user(job.question)], stream: true }))
    if (event.type === "response.output_text.delta") streamed += event.delta;
  const again = await responses.create({ ...common, input: [user(job.question), ...first.output, user(job.again)] });

  const tools = job.tools.map((tool) => ({ type: "function", strict: false, ...tool }));
  const choice = job.choice ? { type: "function", name: job.choice } : "auto";
  const asked = { ...common, input: [user(job.call)], tools, tool_choice: choice };
  const called = await responses.create(asked);
  const streamedCall = await responses.stream(asked).finalResponse();
  const results = callsOf(called).map((call) => ({
    type: "function_call_output",
    call_id: call.call_id,
    output: job.result,
  }));
  const last = await responses.create({ ...common, input: [user(job.call), ...called.output, ...results], tools });
  const format = { type: "json_schema", name: "person", strict: true, schema: PERSON };
  const person = await responses.parse({ ...common, input: [user(job.person)], text: { format } });
  const thoughts = first.output.filter((item) => item.type === "reasoning").flatMap((item) => item.content);
  return {
    text: first.output_text,
    streamed,
    reasoning: thoughts.map((part) => part.text).join(""),
    again: again.output_text,
    calls: plain(callsOf(called)),
    streamed_calls: plain(callsOf(streamedCall)),
    after: last.output_text,
    person: JSON.parse(person.output_text),
  };
});
