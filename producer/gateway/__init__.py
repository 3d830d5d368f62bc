"""OpenAI's API on top of the queues: one more producer, which holds no model and no state of its own."""
