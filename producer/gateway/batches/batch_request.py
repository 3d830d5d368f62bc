"""The body of `POST /v1/batches`, checked field by field."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from producer.gateway.errors import invalid_request
from producer.openai.request import URLS

MAX_METADATA_PAIRS = 16
MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3600, 30 * 24 * 3600

MetadataKey = Annotated[StrictStr, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[StrictStr, Field(max_length=512)]

# Where pydantic's words for a rule say too little.
_RULES = {
    "endpoint": f"must be one of {', '.join(URLS)}",
    "completion_window": "must be '24h'",
    "output_expires_after.anchor": "must be 'created_at'",
}


class OutputExpiry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    anchor: Literal["created_at"]
    seconds: StrictInt = Field(ge=MIN_EXPIRY_SECONDS, le=MAX_EXPIRY_SECONDS, description="From the batch's end on.")


class BatchRequest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    input_file_id: StrictStr = Field(min_length=1, max_length=64, description="A file of purpose `batch`.")
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=MAX_METADATA_PAIRS)
    output_expires_after: OutputExpiry | None = None

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> "BatchRequest":
        """Raises ApiError (400) naming the field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            param = ".".join(str(part) for part in first["loc"] if part != "[key]")
            message = f"{param}: {_RULES.get(param, first['msg'])}; got {first['input']!r:.80}"
            if first["type"] == "missing":
                message = f"{param}: is required"
            raise invalid_request(message, param) from error


def batch_request_body() -> dict[str, Any]:
    """What the route passes as `openapi_extra`."""
    schema = BatchRequest.model_json_schema()
    definitions = schema.pop("$defs")
    schema["properties"]["output_expires_after"] = {"anyOf": [definitions["OutputExpiry"], {"type": "null"}]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
