"""The tokenizer of a model folder, and what is wrong with a damaged one."""

import json
from pathlib import Path

import pytest
from tokenizers import processors

from engine.errors import InvalidRequestError, ModelLoadError
from engine.tokenizer import Tokenizer
from tests.fakes.tiny_tokenizers import END_TOKEN, START_TOKEN, byte_level_tokenizer, write_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path)


def write_config(folder: Path, **fields: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def test_text_survives_the_way_there_and_back(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    text = "The capital of France is Paris. 你好 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_added_to_plain_text_and_not_to_rendered_chats(folder: Path) -> None:
    raw = byte_level_tokenizer()
    start = raw.token_to_id(START_TOKEN)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{START_TOKEN} $A", special_tokens=[(START_TOKEN, start)]
    )
    tokenizer = Tokenizer.from_folder(write_tokenizer(folder, raw))
    plain, rendered = tokenizer.encode("hello"), tokenizer.encode(f"{START_TOKEN}hello", add_special_tokens=False)
    assert plain == rendered
    assert plain[0] == start


def test_a_batch_is_encoded_like_its_parts_and_never_padded_or_cut(folder: Path) -> None:
    raw = byte_level_tokenizer()
    raw.enable_padding()
    raw.enable_truncation(3)
    tokenizer = Tokenizer.from_folder(write_tokenizer(folder, raw))
    texts = ["hello", "the quick brown fox jumps over the lazy dog"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


def test_text_that_is_no_unicode_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate") as caught:
        Tokenizer.from_folder(folder).encode("broken \ud83d")
    assert caught.value.param == "prompt"


def test_special_tokens_are_read_as_text_and_as_objects(folder: Path) -> None:
    write_config(folder, bos_token={"content": START_TOKEN, "lstrip": False}, eos_token=END_TOKEN)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.special_tokens == {"bos_token": START_TOKEN, "eos_token": END_TOKEN}
    assert tokenizer.token_id(END_TOKEN) == byte_level_tokenizer().token_to_id(END_TOKEN)


def test_a_folder_without_configuration_has_no_template_and_no_special_tokens(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.chat_template, tokenizer.tool_chat_template, tokenizer.special_tokens) == (None, None, {})


def test_the_chat_template_comes_from_its_own_file_before_the_configuration(folder: Path) -> None:
    write_config(folder, chat_template="configured")
    assert Tokenizer.from_folder(folder).chat_template == "configured"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "older file"}))
    assert Tokenizer.from_folder(folder).chat_template == "older file"
    (folder / "chat_template.jinja").write_text("own file")
    assert Tokenizer.from_folder(folder).chat_template == "own file"


def test_of_several_named_templates_the_default_one_is_taken(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    write_config(folder, chat_template=named)
    assert Tokenizer.from_folder(folder).chat_template == "chat"


def test_a_missing_tokenizer_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is missing: fetch the model again"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("chat_template.json", "no json"),
        ("chat_template.jinja", b"\xff\xfe\xff"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelLoadError, match=f"{name} is damaged .*fetch the model again"):
        Tokenizer.from_folder(folder)
