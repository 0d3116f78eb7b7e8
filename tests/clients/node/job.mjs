// What a client is asked to do, and how it tells what came of it: as python/job.py has it.
import { readFileSync } from "node:fs";

export const PERSON = {
  type: "object",
  properties: { name: { type: "string", enum: ["Ada", "Grace"] }, is_old: { type: "boolean" } },
  required: ["name", "is_old"],
  additionalProperties: false,
};

export const user = (text) => ({ role: "user", content: text });

// Some print advice there.
console.info = console.log = console.error;

export async function run(client) {
  const results = [];
  for (const job of JSON.parse(readFileSync(0, "utf8"))) results.push(await client({ ...job, base: `${job.url}/v1` }));
  process.stdout.write(JSON.stringify(results));
}
