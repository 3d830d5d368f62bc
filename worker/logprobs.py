"""Converts log-probabilities and prompts into the contract's types: adds each token's text and bytes, which depend on
its id only."""

from engine.detokenizer import Detokenizer
from engine.outputs import TokenLogprob
from engine.tokenizer import Tokenizer
from producer import contract
from producer.contract.logprob import MIN_LOGPROB


class LogprobWriter:
    """A converter for one tokenizer. Caches the tokens that it has met, at most the vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def write(self, logprob: TokenLogprob) -> contract.TokenLogprob:
        token, token_bytes = self._read(logprob.token_id)
        return contract.TokenLogprob.model_construct(
            token_id=logprob.token_id,
            token=token,
            bytes=token_bytes,
            logprob=_finite(logprob.logprob),
            top=[self._write_top(token_id, value) for token_id, value in logprob.top],
        )

    def echo(self, token_ids: list[int]) -> contract.PromptEcho:
        """The prompt, with its tokens' texts joined as its text."""
        detokenizer = Detokenizer(self._tokenizer.token_bytes, [])
        text = "".join(detokenizer.push(token_id) for token_id in token_ids)
        return contract.PromptEcho(text=text, token_ids=token_ids)

    def with_logprobs(self, echo: contract.PromptEcho, logprobs: list[TokenLogprob | None]) -> contract.PromptEcho:
        written = [None if logprob is None else self.write(logprob) for logprob in logprobs]
        return echo.model_copy(update={"logprobs": written})

    def _write_top(self, token_id: int, logprob: float) -> contract.TopLogprob:
        token, token_bytes = self._read(token_id)
        return contract.TopLogprob.model_construct(
            token_id=token_id, token=token, bytes=token_bytes, logprob=_finite(logprob)
        )

    def _read(self, token_id: int) -> tuple[str, list[int]]:
        known = self._known.get(token_id)
        if known is None:
            data = self._tokenizer.token_bytes[token_id]
            text = data.decode(errors="replace") if data else self._tokenizer.spelling(token_id)
            known = self._known[token_id] = text, list(data)
        return known


def _finite(logprob: float) -> float:
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB  # NaN, too: JSON cannot hold it
