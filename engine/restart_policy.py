"""How often and how soon a child that has ended is started again. Counts only; knows neither clock nor process."""

_MAX_FAILED_STARTS = 3  # in a row
_FIRST_BACKOFF_SECONDS = 0.25  # before the second start in a row without a token; doubled for each further one
_MAX_BACKOFF_SECONDS = 10.0
_MAX_DOUBLINGS = 16


class RestartPolicy:
    """A child that generates between its deaths is always started again, and at once; one that cannot start is not."""

    def __init__(self) -> None:
        self._num_deaths = 0  # in a row, without a token
        self._num_failed_starts = 0  # in a row
        self._is_refused = False
        self.num_restarts = 0

    @property
    def can_start(self) -> bool:
        return not self._is_refused and self._num_failed_starts < _MAX_FAILED_STARTS

    @property
    def backoff_seconds(self) -> float:
        """How long to wait before the next start."""
        num_attempts = self._num_deaths + self._num_failed_starts
        if num_attempts <= 1:
            return 0.0
        return min(_MAX_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2.0 ** min(num_attempts - 2, _MAX_DOUBLINGS))

    def note_token(self) -> None:
        self._num_deaths = 0

    def note_ready(self) -> None:
        self._num_failed_starts = 0

    def note_death(self) -> None:
        """A child that was ready has ended."""
        self._num_deaths += 1

    def note_failed_start(self, *, is_refused: bool) -> None:
        """A child ended before it was ready; `is_refused`: it gave a reason that trying again does not change."""
        self._num_failed_starts += 1
        self._is_refused = is_refused
