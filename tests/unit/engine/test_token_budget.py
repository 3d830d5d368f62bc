"""How many tokens of prompts a step may compute, after a memory shortage as well."""

from engine.token_budget import STEPS_TO_RECOVER, TokenBudget


def left(budget: TokenBudget, num_decodes: int = 0) -> int:
    return budget.prefill_tokens(num_decodes=num_decodes, num_prompts=1)


def recover(budget: TokenBudget, num_steps: int) -> None:
    for _ in range(num_steps):
        budget.recover()


def test_what_decodes_leave_is_for_prompts() -> None:
    budget = TokenBudget(100, None)
    assert [left(budget, num_decodes) for num_decodes in (0, 30, 100, 130)] == [100, 70, 0, 0]


def test_a_step_that_did_not_fit_is_halved_but_for_a_token_beside_its_decodes() -> None:
    budget = TokenBudget(100, None)
    budget.reduce(80, num_decodes=3)
    assert left(budget) == 40
    budget.reduce(12, num_decodes=11)
    assert left(budget, num_decodes=11) == 1


def test_a_reduced_budget_doubles_after_so_many_steps_without_a_shortage_up_to_what_it_was() -> None:
    budget = TokenBudget(100, None)
    budget.reduce(60, num_decodes=0)
    recover(budget, STEPS_TO_RECOVER - 1)
    assert left(budget) == 30
    budget.reduce(60, num_decodes=0)
    recover(budget, STEPS_TO_RECOVER - 1)
    assert left(budget) == 30, "counted from the last shortage on"
    recover(budget, 1)
    assert left(budget) == 60
    recover(budget, STEPS_TO_RECOVER)
    assert left(budget) == 100
