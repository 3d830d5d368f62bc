"""A prompt job as it lies in the queue: the keyword arguments of the function label `promptmill.generate`."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from producer.contract.embedding import MAX_INPUTS, find_embedding_problem
from producer.contract.keys import TENANT_PATTERN
from producer.contract.message import Message
from producer.contract.output_format import OUTPUT_FORMAT_FIELDS, find_format_problem
from producer.contract.rules import (
    ContractModel,
    FirstFault,
    JsonObject,
    Number,
    SmallJsonObject,
    Text,
    TokenId,
    breaks_rule,
    check_unicode,
)
from producer.contract.tool import NamedToolChoice, ToolChoice, Tools, tool_names
from producer.contract.version import CONTRACT_VERSION, ContractVersion

MAX_MODEL_CHARS = 1024
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024  # of each: the matcher of a stop string takes 270 bytes a character
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20

# What a template is given by us: a job's chat_template_kwargs must not replace it.
RESERVED_TEMPLATE_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


def _check_bias_key(key: str) -> str:
    if not (key.isascii() and key.isdigit() and len(key) <= 10):
        raise breaks_rule("", f"keys are token ids; got {key!r:.60}")
    return key


def _with_text_keys(value: Any) -> Any:
    """JSON has no other keys; Python's own dicts may hold token ids as numbers."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIASES:
        raise breaks_rule("", f"must have at most {MAX_LOGIT_BIASES} items; got {len(value)}")
    return {str(key) if type(key) is int else key: item for key, item in value.items()}


StopString = Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_CHARS), AfterValidator(check_unicode)]
TokenIds = Annotated[list[TokenId], FirstFault]
BiasKey = Annotated[StrictStr, AfterValidator(_check_bias_key)]
Bias = Annotated[float, Field(strict=True, ge=-100.0, le=100.0)]


class JobRequest(ContractModel):
    """What a job asks for. Unknown fields are refused by name; one of `prompt`, `messages` and `inputs` is given.

    Validation raises `pydantic.ValidationError`; `producer.errors.InvalidJobError` is what callers of the client see.
    """

    v: ContractVersion = CONTRACT_VERSION
    task: Literal["generate", "embed"] = Field(default="generate", description="embed: a vector, and no text.")
    model: StrictStr | None = Field(
        default=None, max_length=MAX_MODEL_CHARS, description="Refused by a worker that serves another model."
    )

    prompt: Text | TokenIds | None = Field(default=None, description="Text or token ids.")
    messages: Annotated[list[Message], FirstFault] | None = Field(
        default=None, description="Rendered with the model's chat template."
    )
    inputs: Annotated[list[Text | TokenIds], FirstFault] | None = Field(
        default=None, max_length=MAX_INPUTS, description="With task embed: texts, or the token ids of each."
    )
    dimensions: StrictInt | None = Field(
        default=None, ge=1, description="With task embed: leading numbers of each vector that are kept."
    )

    max_tokens: StrictInt | None = Field(
        default=None, ge=0, description="None: until the context is full. 0 only with echo: score the prompt alone."
    )
    min_tokens: StrictInt = Field(default=0, ge=0, description="Tokens before a stop token or stop string may end it.")
    n: StrictInt = Field(default=1, ge=1, le=MAX_CHOICES, description="Independent choices.")
    stop: Annotated[list[StopString], FirstFault] = Field(default=[], max_length=MAX_STOP_STRINGS)
    stop_token_ids: TokenIds = Field(default=[])
    ignore_eos: StrictBool = False

    temperature: Number = Field(default=1.0, ge=0.0, le=2.0, allow_inf_nan=False, description="0 is greedy.")
    top_p: Number = Field(default=1.0, gt=0.0, le=1.0)
    top_k: StrictInt = Field(default=-1, ge=-1, description="-1 is off.")
    min_p: Number = Field(default=0.0, ge=0.0, le=1.0)
    seed: StrictInt | None = Field(
        default=None, ge=-(2**63), lt=2**64, description="None: derived from the job id, so that a job is reproducible."
    )
    presence_penalty: Number = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: Number = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: Number = Field(default=1.0, ge=0.01, le=100.0, description="Over prompt and output; 1 is off.")
    logit_bias: Annotated[dict[BiasKey, Bias], BeforeValidator(_with_text_keys)] | None = Field(
        default=None, max_length=MAX_LOGIT_BIASES, description="Token id as text to what is added to its logit."
    )
    logprobs: StrictBool = Field(default=False, description="Each token's log-probability under the model itself.")
    top_logprobs: StrictInt = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS, description="So many likeliest, beside it.")
    echo: StrictBool = Field(default=False, description="The prompt comes back; with logprobs, with its own.")

    response_format: JsonObject | None = Field(default=None, description="OpenAI's: text, JSON object or schema.")
    regex: Text | None = Field(default=None, description="The whole output matches it; no look-around.")
    choice: Annotated[list[Text], FirstFault] | None = Field(default=None, description="The output is one of these.")
    grammar: Text | None = Field(default=None, description="Lark, in llguidance's dialect.")
    tools: Tools | None = None
    tool_choice: ToolChoice | None = Field(default=None, description="None: auto, where there are tools.")
    parallel_tool_calls: StrictBool = Field(default=True, description="False: one call at most.")
    chat_template_kwargs: SmallJsonObject | None = Field(default=None, description="Such as enable_thinking.")

    priority: StrictInt = Field(
        default=0, ge=-(2**53), le=2**53, description="Among jobs a worker already holds; lower runs first."
    )
    deadline: Number | None = Field(default=None, gt=0, lt=1e18, allow_inf_nan=False, description="Epoch seconds.")
    tenant: Annotated[StrictStr, Field(pattern=f"^{TENANT_PATTERN}$")] | None = Field(
        default=None, description="Whose job it is: tenants take turns. The queue decides; the client derives it."
    )
    stream: StrictBool = Field(default=True, description="False skips PUBLISH; the stream is written all the same.")
    metadata: SmallJsonObject = Field(default={})
    idempotency_key: Annotated[StrictStr, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="Names one job of the tenant, for as long as it is kept; the client derives its id."
    )

    @property
    def to_embed(self) -> list[str | list[int]]:
        """What is to be embedded, in order: a text or token ids each; nothing where the task is another one."""
        if self.task != "embed":
            return []
        return self.inputs if self.inputs is not None else [self.prompt or ""]

    @property
    def num_choices(self) -> int:
        """Answers that its stream tells of."""
        return 0 if self.task == "embed" else self.n

    @property
    def callable_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is shown."""
        return None if self.tool_choice == "none" else self.tools

    @property
    def forces_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedToolChoice)

    @property
    def has_strict_tools(self) -> bool:
        return any(tool["function"].get("strict") for tool in self.callable_tools or ())

    @property
    def output_format_field(self) -> str | None:
        """The field that describes the form of the answer, if one does. Where a call is forced there is no answer."""
        free = (None, {"type": "text"})
        if self.forces_call:
            return None
        return next((name for name in OUTPUT_FORMAT_FIELDS if getattr(self, name) not in free), None)

    @model_validator(mode="before")
    @classmethod
    def _stop_may_be_one_string(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("stop"), str):
            return {**values, "stop": [values["stop"]]}
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        given = {name: getattr(self, name) for name in self.model_fields_set}
        defaults = {name: info.default for name, info in type(self).model_fields.items()}
        if problem := find_embedding_problem({n: value for n, value in given.items() if value != defaults[n]}):
            raise breaks_rule(*problem)
        if self.task == "generate":
            self._check_generation()
        if self.prompt is not None and len(self.prompt) == 0:
            raise breaks_rule("prompt", "prompt is empty; give at least one character or token id")
        return self

    def _check_generation(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            given = "neither was" if self.prompt is None else "both were"
            raise breaks_rule("prompt", f"give exactly one of prompt and messages; {given} given")
        if self.messages is not None and len(self.messages) == 0:
            raise breaks_rule("messages", "messages is empty; give at least one message")
        self._check_chat_fields()
        if self.top_k == 0:
            raise breaks_rule("top_k", "top_k must be at least 1, or -1 for off")
        if problem := find_format_problem({name: getattr(self, name) for name in OUTPUT_FORMAT_FIELDS}):
            raise breaks_rule(*problem)
        self._check_sampling()

    def _check_sampling(self) -> None:
        if self.max_tokens == 0 and not self.echo:
            raise breaks_rule("max_tokens", "max_tokens: must be at least 1, or 0 with echo to score the prompt; got 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            rule = f"min_tokens: must be at most max_tokens ({self.max_tokens}); got {self.min_tokens}"
            raise breaks_rule("min_tokens", rule)
        if self.min_tokens and (form := self.output_format_field) is not None:
            rule = f"min_tokens cannot be combined with {form}, which says where the output may end: leave one out"
            raise breaks_rule("min_tokens", rule)
        if self.min_tokens and (self.forces_call or self.has_strict_tools):
            cause = "a tool_choice that forces a call" if self.forces_call else "strict tools"
            rule = f"min_tokens cannot be combined with {cause}: the call's form says where it may end; leave one out"
            raise breaks_rule("min_tokens", rule)
        if self.top_logprobs and not self.logprobs:
            raise breaks_rule("top_logprobs", "top_logprobs needs logprobs: set logprobs to true, or leave it out")

    def _check_chat_fields(self) -> None:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(self, name) is not None and self.messages is None:
                raise breaks_rule(name, f"{name} go into a chat's template: give messages instead of a prompt")
        for name in self.chat_template_kwargs or ():
            if name in RESERVED_TEMPLATE_NAMES:
                raise breaks_rule("chat_template_kwargs", f"chat_template_kwargs must not set {name}; leave it out")
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise breaks_rule("tool_choice", "tool_choice needs tools to choose from; give tools, or leave it out")
        if self.callable_tools is not None:
            for name in OUTPUT_FORMAT_FIELDS:
                if name != "response_format" and getattr(self, name) is not None:
                    rule = f"tools and {name} exclude each other; give one of them, or a schema as response_format"
                    raise breaks_rule("tools", rule)
        if isinstance(self.tool_choice, NamedToolChoice):
            name, names = self.tool_choice.function.name, tool_names(self.tools or [])
            if name not in names:
                rule = f"tool_choice names the function {name!r}, which is not among the tools ({', '.join(names)})"
                raise breaks_rule("tool_choice", rule)
