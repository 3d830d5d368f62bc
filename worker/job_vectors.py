"""Collects the embeddings of one job, encoded as in results. Knows neither streams nor results."""

from engine.outputs import RequestOutput
from producer.contract.embedding import encode_vector


class JobVectors:
    """The vectors of a job of task `embed`. A later attempt computes them again, with the same values."""

    def __init__(self, num_inputs: int) -> None:
        self._encoded: list[str | None] = [None] * num_inputs
        self.num_missing = num_inputs

    def take(self, output: RequestOutput) -> None:
        """Add the output of one input, which has no vector if it ended by an error or a cancel."""
        self.num_missing -= 1
        if output.embedding is not None:
            self._encoded[output.index] = encode_vector(output.embedding.astype("<f4").tobytes())

    @property
    def encoded(self) -> list[str]:
        """The encoded vectors, one per input; all must be there."""
        whole = [vector for vector in self._encoded if vector is not None]
        assert len(whole) == len(self._encoded), "a job that has finished has all its vectors"
        return whole
