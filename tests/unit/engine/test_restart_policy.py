"""When a child that has ended is started again."""

from engine.restart_policy import RestartPolicy


def test_the_first_restart_is_at_once_and_later_ones_wait_longer_up_to_a_bound() -> None:
    policy = RestartPolicy()
    waits = []
    for _ in range(2000):  # more doublings than a float takes
        policy.note_death()
        waits.append(policy.backoff_seconds)
    assert waits[:4] == [0.0, 0.25, 0.5, 1.0]
    assert waits == sorted(waits)
    assert waits[-1] == 10.0
    assert policy.can_start


def test_a_token_between_deaths_makes_the_next_restart_immediate_again() -> None:
    policy = RestartPolicy()
    for _ in range(5):
        policy.note_death()
    policy.note_token()
    policy.note_death()
    assert policy.backoff_seconds == 0.0


def test_three_failed_starts_in_a_row_are_the_last() -> None:
    policy = RestartPolicy()
    for _ in range(2):
        policy.note_failed_start(is_refused=False)
    policy.note_ready()
    for _ in range(2):
        policy.note_failed_start(is_refused=False)
        assert policy.can_start
    policy.note_failed_start(is_refused=False)
    assert not policy.can_start


def test_a_start_refused_with_a_reason_is_not_tried_again() -> None:
    policy = RestartPolicy()
    policy.note_failed_start(is_refused=True)
    assert not policy.can_start
