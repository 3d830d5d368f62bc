"""What the engine raises.

EngineError
├── ModelLoadError         the model folder is missing, damaged or of an untested architecture
├── InvalidRequestError    a request the engine can never serve; `param` names the field at fault
│   └── ContextLengthError the prompt (and max_tokens) do not fit the context or the KV cache
├── EngineNotRunningError  used before start() or after stop()
└── EngineDiedError        the child process ended or hung; retryable
"""


class EngineError(Exception):
    """Base of everything the engine raises."""


class ModelLoadError(EngineError):
    """The model cannot be loaded; the message says what is wrong and how to mend it."""


class InvalidRequestError(EngineError):
    """A request that can never be served as it stands."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """Prompt and output do not fit the model's context or the KV cache."""


class EngineNotRunningError(EngineError):
    """The engine was not started, or has been stopped."""


class EngineDiedError(EngineError):
    """The engine's child process ended or hung and the request could not be carried on."""
