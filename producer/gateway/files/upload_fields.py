"""The fields beside an upload's file: their names, their rules, and the lifetime that they give the file."""

from producer.gateway.errors import invalid_request

PURPOSE = "purpose"
ANCHOR = "expires_after[anchor]"
SECONDS = "expires_after[seconds]"
FIELDS = (PURPOSE, ANCHOR, SECONDS)

MIN_LIFETIME_SECONDS, MAX_LIFETIME_SECONDS = 3600, 30 * 24 * 3600  # OpenAI's; the longest is the default, too

UPLOAD_SCHEMA = {
    "type": "object",
    "required": ["file", PURPOSE],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        PURPOSE: {"type": "string", "enum": ["batch"]},
        ANCHOR: {"type": "string", "enum": ["created_at"]},
        SECONDS: {"type": "integer", "minimum": MIN_LIFETIME_SECONDS, "maximum": MAX_LIFETIME_SECONDS},
    },
}


def check_field(name: str, value: str) -> None:
    """Check one field as soon as it is read. Raises ApiError (400)."""
    if name == PURPOSE and value != "batch":
        why = "batches write those themselves" if value == "batch_output" else f"got {value[:60]!r}"
        raise invalid_request(f"purpose: must be 'batch'; {why}", name)
    if name == ANCHOR and value != "created_at":
        raise invalid_request(f"{name}: must be 'created_at'; got {value[:60]!r}", name)
    if name == SECONDS:
        is_number = value.isascii() and value.isdigit() and len(value) < 10
        if not is_number or not MIN_LIFETIME_SECONDS <= int(value) <= MAX_LIFETIME_SECONDS:
            limits = f"from {MIN_LIFETIME_SECONDS} to {MAX_LIFETIME_SECONDS}"
            raise invalid_request(f"{name}: must be a whole number {limits}; got {value[:60]!r}", name)


def lifetime_seconds(fields: dict[str, str]) -> int:
    """The lifetime of a file with these fields. Raises ApiError (400) for what is missing."""
    if PURPOSE not in fields:
        raise invalid_request("purpose: is needed, and must be 'batch'", PURPOSE)
    for name, other in ((ANCHOR, SECONDS), (SECONDS, ANCHOR)):
        if name in fields and other not in fields:
            raise invalid_request(f"{other}: is missing; {name} needs it", other)
    return int(fields.get(SECONDS, MAX_LIFETIME_SECONDS))
