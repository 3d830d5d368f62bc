"""A tokenizer without a vocabulary: one token a word, whose text is its number."""

VOCAB_SIZE = 1000
POISON_TOKEN = 666  # in a prompt: the process is killed by its first step


def text_of(token_ids: list[int]) -> str:
    return "".join(f" {token_id}" for token_id in token_ids)


class FakeTokenBytes(dict[int, bytes]):
    """As `engine.token_bytes.TokenBytes`."""

    def __missing__(self, token_id: int) -> bytes:
        return f" {token_id}".encode()

    def showing(self, token_ids: tuple[int, ...]) -> "FakeTokenBytes":
        return self

    def at_start(self, token_id: int) -> bytes:
        return self[token_id]


class FakeTokenizer:
    """One token a word."""

    token_bytes = FakeTokenBytes()
    bos_token: str | None = None
    eos_token: str | None = None

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template
        self.tool_chat_template: str | None = None
        self.special_tokens: dict[str, str] = {}

    def token_id(self, token: str) -> int | None:
        return None

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return text_of(token_ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        token_ids = [sum(word.encode()) % VOCAB_SIZE for word in text.split()]
        return [0 if token_id == POISON_TOKEN else token_id for token_id in token_ids]  # no text kills by chance
