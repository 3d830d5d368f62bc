"""What the engine raises.

EngineError
├── ModelLoadError         the model folder is missing, damaged or of an untested architecture
├── InvalidRequestError    a request the engine can never serve; `param` names the field at fault
│   └── ContextLengthError the prompt (and max_tokens) do not fit the context or the KV cache
├── DeviceMemoryError      a step did not fit the device's memory; the engine runs it in smaller parts
├── DeviceLostError        the device refuses all further work; the child process must be replaced
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


class DeviceMemoryError(EngineError):
    """A step did not fit the memory that the device has left."""


class DeviceLostError(EngineError):
    """The device's context is broken: nothing more can run in this process."""


class EngineNotRunningError(EngineError):
    """The engine was not started, or has been stopped."""


class EngineDiedError(EngineError):
    """The engine's child process ended or hung and the request could not be carried on."""
