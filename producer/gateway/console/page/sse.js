// Server-sent events out of a stream of bytes, in pieces however they come. Knows nothing of what is in them.

/** The data of each event of a response's body, as text. Comments and other fields are passed over. */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
