// The ai SDK with one of its providers: `compatible` (@ai-sdk/openai-compatible), or `chat` or `responses` (@ai-sdk/openai).
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import { PERSON, run, user } from "./job.mjs";

const kind = process.argv[2];
// Nothing is stored here: without this, a later turn names items that a server with a store would have.
const providerOptions = { openai: { store: false } };

function modelOf(job) {
  if (kind === "compatible")
    return createOpenAICompatible({
      name: "foreroute", baseURL: job.base, apiKey: "none", supportsStructuredOutputs: true,
    })(job.model);
  const openai = createOpenAI({ baseURL: job.base, apiKey: "none" });
  return kind === "chat" ? openai.chat(job.model) : openai.responses(job.model);
}

const callsOf = (calls) => calls.map((call) => [call.toolName, call.input]);

await run(async (job) => {
  const common = { model: modelOf(job), maxRetries: 0, maxOutputTokens: job.limit, providerOptions };
  const first = await generateText({ ...common, messages: [user(job.question)] });
  const stream = streamText({ ...common, messages: [user(job.question)] });
  let streamed = "";
  for await (const piece of stream.textStream) streamed += piece;
  // What a chat in a browser sends back is what was streamed, reasoning and all.
  const talk = (response) => [user(job.question), ...response.messages, user(job.again)];
  const again = await generateText({ ...common, messages: talk(first.response) });
  const afterStream = await generateText({ ...common, messages: talk(await stream.response) });
  const asStored = { ...common, providerOptions: {}, messages: talk(first.response) };
  const refused = kind === "responses" ? { refused: await generateText(asStored).catch((error) => error.message) } : {};

  const tools = Object.fromEntries(
    job.tools.map((one) => [
      one.name, tool({ description: one.description, inputSchema: jsonSchema(one.parameters) }),
    ]),
  );
  const asked = { ...common, messages: [user(job.call)], tools, toolChoice: job.choice ? { type: "tool", toolName: job.choice } : "auto" };
  const called = await generateText(asked);
  const streamedCall = streamText(asked);
  for await (const _ of streamedCall.fullStream);
  const results = called.toolCalls.map((call) => ({
    type: "tool-result",
    toolCallId: call.toolCallId,
    toolName: call.toolName,
    output: { type: "text", value: job.result },
  }));
  const last = await generateText({
    ...common, tools, messages: [user(job.call), ...called.response.messages, { role: "tool", content: results }],
  });
  // The SDK's own loop: calls, results and the next turn.
  const acting = Object.fromEntries(
    Object.entries(tools).map(([name, one]) => [name, { ...one, execute: async () => job.result }]),
  );
  const looped = await generateText({ ...common, messages: [user(job.call)], tools: acting, stopWhen: stepCountIs(2) });
  const person = await generateText({
    ...common, messages: [user(job.person)], output: Output.object({ schema: jsonSchema(PERSON) }),
  });
  return {
    text: first.text,
    streamed,
    // @ai-sdk/openai reads no reasoning of a chat, and of Responses summaries alone.
    ...(kind === "compatible" ? { reasoning: first.reasoningText ?? "" } : {}),
    again: again.text,
    again_after_stream: afterStream.text,
    calls: callsOf(called.toolCalls),
    streamed_calls: callsOf(await streamedCall.toolCalls),
    after: last.text,
    looped: looped.text,
    ...refused,
    person: person.output,
  };
});
