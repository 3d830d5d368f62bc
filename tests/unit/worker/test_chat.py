"""Chat rendering: equal to transformers' own, and safe with templates that are broken, hostile or missing."""

from datetime import datetime
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel

from producer.contract import ErrorCode, Message
from tests.fakes.chat_templates import HERMES, LLAMA, QWEN3
from worker.chat import ChatRenderer
from worker.errors import JobRefusedError

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}
    {{- 'tools: ' + tools | tojson }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {{- '\\n<tool_call>\\n' + tool_call.function.arguments | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- set ns = namespace(system='', first=true) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set ns.system = message['content'] | trim %}
        {%- continue %}
    {%- endif %}
{%- endfor %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" + ns.system + "<|eot_id|>" }}
{%- for message in messages if message['role'] != 'system' %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {% generation %}
        {{- " " + message["content"] | trim + eos_token}}
        {% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": 'Name three <rivers> & "lakes" - größte?\n  '}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": " The Rhine. "}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"ü": "<b>"}}}]}
CHATS: list[list[dict[str, Any]]] = [[USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER], [USER, ANSWER]]


def messages(*plain: dict[str, Any]) -> list[Message]:
    return [Message.model_validate(message) for message in plain]


def reference() -> Any:
    """The judge."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = RawTokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


@pytest.mark.parametrize("template", [SMOLLM2, QWEN, LLAMA3, MISTRAL], ids=["smollm2", "qwen", "llama3", "mistral"])
@pytest.mark.parametrize("chat", CHATS, ids=["user", "system", "turns", "answered"])
def test_a_chat_is_rendered_as_transformers_renders_it(template: str, chat: list[dict[str, Any]]) -> None:
    expected = reference().apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
    renderer = ChatRenderer(template, special_tokens=SPECIAL_TOKENS)
    assert renderer.render(messages(*chat)) == expected


WEATHER = {
    "type": "function",
    "function": {
        "parameters": {"properties": {"city": {"type": "string", "description": "<Köln> & 'co'"}}, "type": "object"},
        "name": "get_weather",
        "description": "The weather in a city",
    },
}
CALLING = [
    {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Köln", "b": 1.0}'}}
]
GIVEN = {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees": 7}'}
TOOL_CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [SYSTEM, USER],
    [USER, {"role": "assistant", "content": None, "tool_calls": CALLING}, GIVEN],
    [USER, {"role": "assistant", "content": "Let me see.", "tool_calls": CALLING, "reasoning_content": "So?"}, GIVEN],
]


@pytest.mark.parametrize("template", [HERMES, QWEN, QWEN3, LLAMA], ids=["hermes", "qwen", "qwen3", "llama"])
@pytest.mark.parametrize("chat", TOOL_CHATS, ids=["user", "system", "called", "thought"])
@pytest.mark.parametrize("tools", [[WEATHER], None], ids=["tools", "none"])
@pytest.mark.parametrize("template_kwargs", [{}, {"enable_thinking": False}], ids=["", "unthinking"])
def test_tools_are_rendered_as_transformers_renders_them(
    template: str, chat: list[dict[str, Any]], tools: Any, template_kwargs: dict[str, Any]
) -> None:
    parsed = [
        message | {"tool_calls": [call | {"function": call["function"] | {"arguments": {"city": "Köln", "b": 1.0}}}
                                  for call in message["tool_calls"]]} if "tool_calls" in message else message
        for message in chat
    ]  # fmt: skip
    expected = reference().apply_chat_template(
        parsed, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=True, **template_kwargs
    )
    renderer = ChatRenderer(template, special_tokens=SPECIAL_TOKENS)
    assert renderer.render(messages(*chat), tools=tools, template_kwargs=template_kwargs) == expected


def test_a_template_of_its_own_for_tools_is_used_for_chats_with_tools_alone() -> None:
    renderer = ChatRenderer(SMOLLM2, tool_template=HERMES, special_tokens=SPECIAL_TOKENS)
    assert renderer.render(messages(USER)) == ChatRenderer(SMOLLM2).render(messages(USER))
    text = renderer.render(messages(USER), tools=[WEATHER])
    assert text == ChatRenderer(HERMES, special_tokens=SPECIAL_TOKENS).render(messages(USER), tools=[WEATHER])


def test_tools_are_refused_by_a_template_that_has_no_place_for_them() -> None:
    with pytest.raises(JobRefusedError, match=r"model 'tiny' takes no tools.*leave tools out") as caught:
        ChatRenderer(SMOLLM2, model="tiny").render(messages(USER), tools=[WEATHER])
    assert (caught.value.info.code, caught.value.info.param) == (ErrorCode.UNSUPPORTED, "tools")


@pytest.mark.parametrize("template", [HERMES, QWEN3, LLAMA])
@pytest.mark.parametrize(
    "parameters", [{}, {"parameters": None}, {"parameters": {}}, {"parameters": {"type": "object"}}]
)
def test_a_tool_that_takes_no_parameters_may_leave_them_out(template: str, parameters: dict[str, Any]) -> None:
    renderer = ChatRenderer(template)
    message = Message.model_validate(USER)
    bare, spelled_out = (
        {"type": "function", "function": {"name": "ping", **given}}
        for given in (parameters, {"parameters": {"type": "object", "properties": {}}})
    )
    assert renderer.render([message], tools=[bare]) == renderer.render([message], tools=[spelled_out])


def test_calls_of_earlier_turns_are_refused_by_a_template_that_has_no_place_for_them() -> None:
    """It would write None into the prompt, or fail with words of Python's."""
    renderer = ChatRenderer(SMOLLM2, model="tiny")
    with pytest.raises(JobRefusedError, match="'tiny' has no place for tool calls: leave messages") as error:
        renderer.render([Message.model_validate(message) for message in (USER, CALL)])
    assert (error.value.info.code, error.value.info.param) == (ErrorCode.UNSUPPORTED, "messages")
    said = Message.model_validate({**CALL, "content": "I look."})
    assert "I look." in renderer.render([said])


def test_a_job_cannot_replace_what_a_template_is_given() -> None:
    text = ChatRenderer("{{ bos_token }}{{ messages | length }}{{ x }}").render(
        messages(USER), template_kwargs={"messages": [], "x": 5, "bos_token": "B"}
    )
    assert text == "B15"


def test_a_tool_call_is_rendered_as_plain_json() -> None:
    tool = {"role": "tool", "content": "42", "tool_call_id": "1"}
    text = ChatRenderer(QWEN).render(messages(USER, CALL, tool))
    assert '<tool_call>\n{"ü": "<b>"}\n</tool_call>' in text
    assert "<tool_response>\n42\n" in text


def test_text_parts_are_joined() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert "user\nab<|im_end|>" in ChatRenderer(SMOLLM2).render(messages(parts))


def test_the_developer_role_is_the_system_role_where_a_template_does_not_know_it() -> None:
    developer = {"role": "developer", "content": "Be brief."}
    assert ChatRenderer(SMOLLM2).render(messages(developer, USER)).startswith("<|im_start|>system\nBe brief.")
    knowing = "{{ messages[0].role }}{# knows developer #}"
    assert ChatRenderer(knowing).render(messages(developer)) == "developer"


def test_a_template_can_ask_for_the_date() -> None:
    assert ChatRenderer("{{ strftime_now('%Y') }}").render(messages(USER)) == datetime.now().strftime("%Y")


def test_what_a_template_raises_refuses_the_messages() -> None:
    with pytest.raises(JobRefusedError, match="roles must alternate") as caught:
        ChatRenderer(MISTRAL, special_tokens=SPECIAL_TOKENS, model="m").render(messages(USER, USER))
    assert caught.value.info.code == ErrorCode.INVALID_REQUEST
    assert caught.value.info.param == "messages"


@pytest.mark.parametrize("template", [None, "{% for %}", "{% if x %}"])
def test_a_missing_or_damaged_template_refuses_messages_and_names_the_remedy(template: str | None) -> None:
    with pytest.raises(JobRefusedError, match=r"model 'tiny'.*send a prompt instead") as caught:
        ChatRenderer(template, model="tiny").render(messages(USER))
    assert caught.value.info.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__class__ }}",
        "{{ namespace(__init__=1) }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str) -> None:
    with pytest.raises(JobRefusedError) as caught:
        ChatRenderer(template + "{{ missing.attribute }}").render(messages(USER))
    assert caught.value.info.param == "messages"


def test_special_tokens_a_model_lacks_are_left_out() -> None:
    assert ChatRenderer("[{{ bos_token }}]").render(messages(USER)) == "[]"
