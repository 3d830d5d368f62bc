"""The routers of a mixture of experts, watched, and made to choose what another model's routers chose."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


class Routers:
    """What a model's routers gave in its last forward, by their names in order; a model may have none."""

    def __init__(self, model: nn.Module) -> None:
        modules = {name: part for name, part in model.named_modules() if type(part).__name__.endswith("Router")}
        for name, module in modules.items():
            module.register_forward_hook(partial(self._note, name))
        self.names = list(modules)
        self.logits: dict[str, Tensor] = {}  # [num_tokens, num_experts]
        self._choices: dict[str, list[Tensor]] = {}  # weights and experts, [num_tokens, num_experts_per_tok] each
        self._leader: Routers | None = None

    @contextmanager
    def following(self, leader: "Routers") -> Iterator[None]:
        """Choose what those chose in their last forward, of the same tokens."""
        self._leader = leader
        yield
        self._leader = None

    def margins(self, name: str) -> Tensor:
        """By how much each token's last chosen expert is ahead of the first one not chosen, `[num_tokens]`."""
        ordered = self.logits[name].sort(-1, descending=True).values
        num_chosen = self._choices[name][1].shape[1]
        return ordered[:, num_chosen - 1] - ordered[:, num_chosen]

    def differ_from(self, others: "Routers", name: str) -> Tensor:
        """The tokens for which those chose other experts, `[num_tokens]`; they may have padding behind."""
        mine = self._choices[name][1].sort(-1).values
        return (mine != others._choices[name][1][: len(mine)].sort(-1).values).any(-1)

    def _note(self, name: str, module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, *choice = output
        self.logits[name], self._choices[name] = logits, choice
        if self._leader is None:
            return output
        weights, experts = self._leader._choices[name]
        if len(experts) == 1:  # a row alone is computed twice
            weights, experts = (part.expand(len(logits), -1) for part in (weights, experts))
        return logits, weights.to(choice[0].dtype), experts
