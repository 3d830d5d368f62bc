"""A model's tokenizer as its folder gives it: `tokenizer.json` through `tokenizers`, without transformers or torch.

Also holds what the folder says about chats (template text, the special tokens' spelling); rendering is the caller's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as RawTokenizer

from engine.errors import InvalidRequestError, ModelLoadError
from engine.token_bytes import TokenBytes

_REMEDY = "fetch the model again, or point model_path at a folder saved by transformers' save_pretrained"


_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back. Thread-safe."""

    def __init__(
        self,
        raw: RawTokenizer,
        *,
        chat_template: str | None = None,
        tool_chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`special_tokens`: spellings by what templates call them, such as `bos_token`."""
        raw.no_truncation()
        raw.no_padding()
        self._raw = raw
        self.token_bytes = TokenBytes(raw)
        self.chat_template = chat_template
        self.tool_chat_template = tool_chat_template  # for chats with tools, where a model has one of its own for them
        self.special_tokens = dict(special_tokens or {})

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Reads `tokenizer.json`, and `tokenizer_config.json` and `chat_template.jinja` where they are.

        Raises `ModelLoadError` naming the file and the remedy.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        templates = _chat_templates(folder, config)
        tokens = {name: _token_text(config.get(name)) for name in _SPECIAL_TOKENS}
        return cls(
            _read_tokenizer(folder / "tokenizer.json"),
            chat_template=templates.get("default"),
            tool_chat_template=templates.get("tool_use"),
            special_tokens={name: text for name, text in tokens.items() if text is not None},
        )

    @property
    def vocab_size(self) -> int:
        """Tokens with a spelling; the model's own vocabulary may be padded beyond it."""
        return self._raw.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with the special tokens the model wants around a plain text, unless the text (a chat) has them."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """One list of ids a text, on several threads. Raises `InvalidRequestError` for text that is not Unicode."""
        try:
            encodings = self._raw.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError) as error:
            raise InvalidRequestError(
                "prompt is not valid Unicode (a lone surrogate?): send text that encodes as UTF-8", param="prompt"
            ) from error
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; `engine.detokenizer` does it token by token."""
        return str(self._raw.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def spelling(self, token_id: int) -> str:
        """How the vocabulary writes a token, special ones too; nothing for an id without a token."""
        return self._raw.id_to_token(token_id) or ""

    def token_id(self, token: str) -> int | None:
        """The id of a token's spelling, e.g. of `eos_token`."""
        return self._raw.token_to_id(token)


def _read_tokenizer(path: Path) -> RawTokenizer:
    if not path.is_file():
        raise ModelLoadError(f"{path} is missing: {_REMEDY}")
    try:
        return RawTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(f"{path} is damaged ({error}): {_REMEDY}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is damaged ({error}): {_REMEDY}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} is damaged (not a JSON object): {_REMEDY}")
    return content


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name; the newer files win over the configuration's field."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        more = folder / "additional_chat_templates"
        return {path.stem: _read_text(path) for path in more.glob("*.jinja")} | {"default": _read_text(file)}
    found = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(found, list):
        named = [(entry.get("name"), entry.get("template")) for entry in found if isinstance(entry, dict)]
    else:
        named = [("default", found)]
    return {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is damaged ({error}): {_REMEDY}") from error


def _token_text(token: object) -> str | None:
    """A special token is spelled as text, or as an object with its `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
