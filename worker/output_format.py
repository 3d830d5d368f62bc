"""The form that a job asks of its output, as a grammar for the engine. Knows neither tokens nor how one is compiled."""

import json

from engine.grammar_spec import GrammarSpec
from producer.contract import JobRequest


def grammar_spec(request: JobRequest) -> GrammarSpec | None:
    """The grammar of the job's `response_format`, `regex`, `choice` or `grammar`; None for free text.

    A schema is enforced whole, whatever `strict` says: an output that ends by itself validates.
    """
    if request.regex is not None:
        return GrammarSpec("regex", request.regex)
    if request.choice is not None:
        return GrammarSpec("choice", json.dumps(request.choice))
    if request.grammar is not None:
        return GrammarSpec("lark", request.grammar)
    response_format = request.response_format or {"type": "text"}
    if response_format["type"] == "json_object":
        return GrammarSpec("json_object")
    if response_format["type"] == "json_schema":
        return GrammarSpec("json_schema", json.dumps(response_format["json_schema"]["schema"]))
    return None
