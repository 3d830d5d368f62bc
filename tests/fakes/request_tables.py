"""A request table whose child is played by hand."""

from collections.abc import Callable, Sequence

import numpy as np

from engine.finish_rule import FinishRule
from engine.messages import AddSequence, FinishCode, StepOutput
from engine.outputs import RequestOutput
from engine.request import Request
from engine.request_table import RequestTable
from engine.sampling_params import SamplingParams
from engine.token_bytes import TokenBytes
from tests.fakes.tiny_tokenizers import byte_level_tokenizer

EOS = 1


RAW = byte_level_tokenizer()


TOKEN_BYTES = TokenBytes(RAW)


def make_request(
    request_id: str,
    prompt: str = "hello",
    output_token_ids: Sequence[list[int]] = (),
    *,
    on_output: Callable[[RequestOutput], None],
    **params: object,
) -> Request:
    """`params` are fields of `SamplingParams`."""
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return Request(
        request_id,
        [ids(prompt)] * sampling.n,
        sampling,
        priority=0,
        finish_rule=FinishRule.of(sampling, len(ids(prompt)), max_len=1000, eos_token_ids=(EOS,)),
        output_token_ids=output_token_ids,
        on_output=on_output,
        token_bytes=TOKEN_BYTES,
    )


class Table:
    """A request table whose outputs are kept, by request id."""

    def __init__(self) -> None:
        self.table = RequestTable()
        self.outputs: dict[str, list[RequestOutput]] = {}

    def add(
        self, request_id: str, prompt: str = "hello", output_token_ids: Sequence[list[int]] = (), **params: object
    ) -> list[int]:
        """Adds a request beside a child that is ready; the ids of the sequences that are started."""
        self.wait(request_id, prompt, output_token_ids, **params)
        return self.started()

    def wait(
        self, request_id: str, prompt: str = "hello", output_token_ids: Sequence[list[int]] = (), **params: object
    ) -> None:
        """Adds a request while no child is ready."""
        assert self.table.reserve(request_id)
        outputs = self.outputs.setdefault(request_id, [])
        self.table.add(make_request(request_id, prompt, output_token_ids, on_output=outputs.append, **params))

    def started(self) -> list[int]:
        """The sequences that the child may be told of now."""
        return [message.sequence_id for message in self.table.start_more()]

    def tokens(self, *entries: tuple[int, int, FinishCode], **fields: object) -> None:
        """One step's message, and its delivery: (sequence id, token id, code)."""
        self.hold(*entries, **fields)
        self.table.deliver()

    def hold(self, *entries: tuple[int, int, FinishCode], **fields: object) -> None:
        """One step's message alone."""
        self.table.apply(
            StepOutput(
                np.array([entry[0] for entry in entries], np.int64),
                np.array([entry[1] for entry in entries], np.int32),
                np.array([entry[2] for entry in entries], np.int8),
                **fields,  # type: ignore[arg-type]
            )
        )

    def say(self, sequence_id: int, text: str) -> None:
        """A step a token."""
        for token_id in ids(text):
            self.tokens((sequence_id, token_id, FinishCode.NONE))

    def start_again(self) -> list[AddSequence]:
        """The child dies and another one starts."""
        self.table.note_death("killed by SIGSEGV")
        return list(self.table.start_more())

    def die(self) -> list[int]:
        """As `start_again`: the sequences that the child is told of."""
        return [message.sequence_id for message in self.start_again()]

    def text(self, request_id: str) -> str:
        return "".join(output.text for output in self.outputs[request_id])


def ids(text: str) -> list[int]:
    return list(RAW.encode(text, add_special_tokens=False).ids)
