"""The bytes each token adds to the text, learnt from the tokenizer's own decoder, one token at a time and kept.

Both decoders that language models use, byte-level BPE and sentencepiece with byte fallback, only concatenate. So a
token is decoded behind an anchor, an ordinary token, which keeps the space that a decoder strips from the beginning of
a text; and one that holds part of a character, which alone would decode to U+FFFD, is read from its spelling.
"""

import re

from tokenizers import Tokenizer as RawTokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE spells printable latin-1 bytes as themselves, the others as the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


class TokenBytes(dict[int, bytes]):
    """`table[token_id]`: what the token adds to the text; nothing for special tokens and for ids without a token.

    Filled as tokens are met, so that a start pays nothing; writes are idempotent, hence safe from several threads.
    """

    def __init__(self, tokenizer: RawTokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        anchor_ids = tokenizer.encode("a", add_special_tokens=False).ids
        self._anchor = anchor_ids[-1:]
        self._anchor_text = tokenizer.decode(self._anchor)
        self._showing: dict[tuple[int, ...], TokenBytes] = {}

    def showing(self, token_ids: tuple[int, ...]) -> "TokenBytes":
        """A table like this one, in which these tokens, special or not, add their spelling."""
        if not token_ids:
            return self
        if token_ids not in self._showing:
            table = TokenBytes(self._tokenizer)
            table.update({token_id: (self._tokenizer.id_to_token(token_id) or "").encode() for token_id in token_ids})
            self._showing[token_ids] = table
        return self._showing[token_ids]

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = found = self._derive(token_id)
        return found

    def at_start(self, token_id: int) -> bytes:
        """What the token adds to an empty text: sentencepiece decoders strip one space there."""
        following = self[token_id]
        alone = self._tokenizer.decode([token_id]).encode()
        return alone if following == b" " + alone else following

    def _derive(self, token_id: int) -> bytes:
        text = self._tokenizer.decode([*self._anchor, token_id])
        text = text.removeprefix(self._anchor_text)
        if _REPLACEMENT not in text:
            return text.encode()
        return _spelled_bytes(self._tokenizer.id_to_token(token_id) or "")


def _spelled_bytes(spelling: str) -> bytes:
    if match := _FALLBACK_BYTE.fullmatch(spelling):
        return bytes.fromhex(match[1])
    if all(character in _BYTE_OF_CHARACTER for character in spelling):
        return bytes(_BYTE_OF_CHARACTER[character] for character in spelling)
    return spelling.encode()  # the vocabulary holds U+FFFD itself
