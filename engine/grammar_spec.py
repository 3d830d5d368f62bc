"""What an output must look like: a value, on its way to the child, which compiles it. Imports nothing."""

from dataclasses import dataclass
from typing import Literal

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
