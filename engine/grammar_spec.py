"""What an output must look like: values, on their way to the child, which compiles them."""

from dataclasses import dataclass
from typing import Any, Literal

# JSON as Python's json.dumps writes it. One style, because every place where white space may stand is one where a model
# can go on for ever, and because what must follow then follows without a forward. A schema's own `x-guidance` comes
# first; a schema within a Lark grammar has no style but what stands there.
JSON_STYLE: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """One grammar. Equal specs are compiled once.

    `source` is, by kind: `json_schema`: the schema as JSON text, the properties in the order in which they are to be
    written; `json_object`: nothing, any object will do; `regex`: a regular expression that the whole output matches
    (Rust's syntax, without look-around); `choice`: a JSON list of strings; `lark`: a grammar in llguidance's dialect of
    Lark, which may hold `%json {…}`, `%regex {…}` and special tokens such as `<|end|>`.
    """

    kind: GrammarKind
    source: str = ""
