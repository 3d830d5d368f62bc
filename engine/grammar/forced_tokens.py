"""After a step: moves the matchers on by what was sampled, and appends what their grammars force.

Knows nothing of blocks or of who runs; the recorder does.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from engine.messages import FinishCode, StepOutput
from engine.runner.slots import SequenceSlots, SlotRows


@dataclass(slots=True)
class ForcedTokens:
    """What the grammars made of a step."""

    output: StepOutput  # the step's, with the forced tokens behind the sampled ones
    extended: list[int] = field(default_factory=list)  # slots that have more than one token to compute
    ended: list[int] = field(default_factory=list)  # slots whose sequences are over with a forced token, or failed


def append_forced_tokens(slots: SequenceSlots, rows: SlotRows, output: StepOutput) -> ForcedTokens:
    """Go on with the tokens that `output` says were sampled, entry i for row i, just written into the slots.

    Mutates matchers and slots. A sequence that is over already is left alone; one whose grammar fails loses the token.
    """
    forced = ForcedTokens(output)
    followers: list[StepOutput] = []
    failed: dict[int, str] = {}  # by row
    for row in rows.constrained.tolist():
        slot = int(rows.slots[row])
        matcher = slots.sequences[slot].grammar
        assert matcher is not None, f"slot {slot} has no grammar"
        token_ids: list[int] = []
        if matcher.error is None and output.finish_codes[row] == FinishCode.NONE:
            token_ids = matcher.accept(int(output.token_ids[row]))
        if matcher.error is not None:
            failed[row] = matcher.error
            forced.ended.append(slot)
        elif token_ids:
            followers.append(slots.extend(slot, token_ids))
            is_over = followers[-1].finish_codes.any()
            (forced.ended if is_over else forced.extended).append(slot)
    if failed:
        forced.output = _without(output, failed)
    for follower in followers:
        forced.output = forced.output.then(follower)
    return forced


def _without(output: StepOutput, failed: dict[int, str]) -> StepOutput:
    keep = np.ones(len(output.sequence_ids), np.bool_)
    keep[list(failed)] = False
    return replace(
        output,
        sequence_ids=output.sequence_ids[keep],
        token_ids=output.token_ids[keep],
        finish_codes=output.finish_codes[keep],
        logprobs=output.logprobs and output.logprobs.of_rows(keep),
        grammar_errors={int(output.sequence_ids[row]): reason for row, reason in failed.items()},
    )
