"""Turns one choice's token ids into text as they come. Knows nothing of requests or stop strings.

The text is a pure function of the prompt's last tokens and the output's: bytes are joined and decoded as UTF-8, and a
character is released by the token that completes it. Bytes that can never become one give U+FFFD, one for each maximal
invalid part, as the tokenizers do. `tokenizers.DecodeStream` is not used: after an invalid byte it withholds text
for as long as the decoded tail ends in U+FFFD, at quadratic cost, and loses what byte fallback reads in one run.
"""

from codecs import utf_8_decode

from engine.token_bytes import TokenBytes

_MAX_CHARACTER_BYTES = 4


class Detokenizer:
    """Incremental; special tokens add nothing. Bytes of a character that the output never completes are dropped."""

    __slots__ = ("_at_start", "_rest", "_table")

    def __init__(self, table: TokenBytes, prompt_token_ids: list[int]) -> None:
        self._table = table
        self._at_start = not any(table[token_id] for token_id in prompt_token_ids)
        tail = self._prompt_tail(prompt_token_ids)
        self._rest = tail[utf_8_decode(tail, "replace")[1] :]  # a character the prompt began is completed by the output

    def push(self, token_id: int) -> str:
        """The characters this token completes."""
        if self._at_start:
            data = self._table.at_start(token_id)
            self._at_start = not data
        else:
            data = self._table[token_id]
        data = self._rest + data
        text, num_decoded = utf_8_decode(data, "replace")
        self._rest = data[num_decoded:]
        return text

    def _prompt_tail(self, prompt_token_ids: list[int]) -> bytes:
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._table[token_id] + tail
            if len(tail) >= _MAX_CHARACTER_BYTES:
                break
        return tail
