import assert from "node:assert/strict";
import { test } from "node:test";
import { readEvents } from "../../../../producer/gateway/console/page/sse.js";

const TEXT = 'data: {"text":"Grüße 🙂"}\n\n: keep-alive\ndata: {"text":"zwei"}\n\ndata: [DONE]\n\n';

async function read(size) {
  const bytes = new TextEncoder().encode(TEXT);
  const body = new ReadableStream({
    start(controller) {
      for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
      controller.close();
    },
  });
  const events = [];
  for await (const event of readEvents(body)) events.push(event);
  return events;
}

test("events are whole, however the bytes come in pieces", async () => {
  for (const size of [1, 2, 3, 7, 1000]) {
    assert.deepEqual(await read(size), ['{"text":"Grüße 🙂"}', '{"text":"zwei"}', "[DONE]"]);
  }
});
