"""The embeddings of one job as they come, in the form in which they travel. Knows neither streams nor results."""

from engine.outputs import RequestOutput
from producer.contract.embedding import encode_vector


class JobVectors:
    """Of a job of task `embed`; a later attempt begins anew, and comes to the same."""

    def __init__(self, num_inputs: int) -> None:
        self._encoded: list[str | None] = [None] * num_inputs
        self.num_missing = num_inputs

    def take(self, output: RequestOutput) -> None:
        """What came of one input; nothing but its end, if that was an error or a cancel."""
        self.num_missing -= 1
        if output.embedding is not None:
            self._encoded[output.index] = encode_vector(output.embedding.astype("<f4").tobytes())

    @property
    def encoded(self) -> list[str]:
        """One an input; all of them must be there."""
        whole = [vector for vector in self._encoded if vector is not None]
        assert len(whole) == len(self._encoded), "a job that has finished has all its vectors"
        return whole
