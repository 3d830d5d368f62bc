"""Which requests a child's deaths are blamed on, with a child that is played by hand."""

from engine.messages import Begun, FinishCode
from engine.request_table import MAX_DEATHS
from tests.fakes.request_tables import Table


def test_a_poisonous_request_fails_after_three_deaths_and_its_batch_mates_go_on(table: Table) -> None:
    sequences = {name: table.add(name)[0] for name in ("one", "poison", "three")}
    assert table.die() == list(sequences.values())
    assert table.die() == [sequences["one"]]  # two deaths without a token: one suspect at a time
    table.say(sequences["one"], "a")
    assert table.started() == [sequences["poison"]]
    assert table.started() == []
    assert table.die() == [sequences["three"]]  # "one" has proved harmless, and waits for the last suspect
    failed = table.outputs["poison"][-1]
    assert (failed.finish_reason, failed.error_kind, failed.finished) == ("error", "poison", True)
    assert failed.error is not None
    assert "SIGSEGV" in failed.error
    assert [output.finish_reason for output in table.outputs["one"]] == [None]
    assert table.outputs["three"] == []
    table.say(sequences["three"], "a")
    assert table.started() == [sequences["one"]]


def test_nothing_new_runs_beside_a_suspect(table: Table) -> None:
    """Else a death that is the newcomer's would be the suspect's third."""
    (suspect,) = table.add("suspect")
    table.die()
    assert table.die() == [suspect]
    newcomer = table.add("newcomer")
    assert newcomer == []
    assert table.table.is_child_busy, "it owes a step, though not everybody's"
    table.say(suspect, "a")
    assert len(table.started()) == 1


def test_a_request_that_only_waits_in_the_child_is_not_to_blame_for_its_deaths(table: Table) -> None:
    (worked_on,), (waiting,) = table.add("one"), table.add("two")
    for _ in range(2):
        table.table.note_begun(Begun([worked_on]))
        table.die()
    table.table.note_begun(Begun([worked_on]))
    assert table.die() == [waiting]
    assert [output.error_kind for output in table.outputs["one"]] == ["poison"]
    assert table.outputs["two"] == []


def test_what_an_earlier_child_worked_on_is_not_to_blame_before_a_later_one_does(table: Table) -> None:
    (early,), (worked_on,) = table.add("early"), table.add("one")
    table.table.note_begun(Begun([early]))
    table.die()
    for _ in range(MAX_DEATHS - 1):
        table.table.note_begun(Begun([worked_on]))
        started = table.die()
    assert started == [worked_on], "the only suspect"
    assert table.outputs["early"] == []


def test_a_request_that_waits_once_its_grammar_is_ready_is_not_to_blame_either(table: Table) -> None:
    (waiting,), (worked_on,) = table.add("two"), table.add("one")
    for _ in range(MAX_DEATHS):
        table.table.note_begun(Begun([waiting]))
        table.table.note_begun(Begun([worked_on], waiting=(waiting,)))
        table.die()
    assert [output.error_kind for output in table.outputs["one"]] == ["poison"]
    assert table.outputs["two"] == []


def test_a_suspect_that_is_aborted_makes_room_for_the_next(table: Table) -> None:
    (first,), (second,) = table.add("one"), table.add("two")
    table.die()
    assert table.die() == [first]
    table.table.abort("one")
    assert table.started() == [second]


def test_a_token_between_two_deaths_clears_a_request_of_suspicion(table: Table) -> None:
    (sequence,) = table.add("r")
    for _ in range(2 * MAX_DEATHS):
        table.say(sequence, "a")
        assert table.die() == [sequence]
    assert all(output.finish_reason is None for output in table.outputs["r"])


def test_a_token_of_another_choice_clears_none_that_has_got_none(table: Table) -> None:
    first, second = table.add("r", n=2)
    for _ in range(2):
        table.say(first, "a")
        assert table.die() == [first, second]
    table.say(first, "a")
    assert table.add("newcomer") == []  # the second one is on trial still
    assert len(table.die()) == 1
    assert [output.error_kind for output in table.outputs["r"][-2:]] == ["poison"] * 2
    assert table.outputs["newcomer"] == []


def test_a_child_that_dies_between_what_it_was_asked_for_is_nobodys_fault(table: Table) -> None:
    """As one that somebody kills."""
    done, waiting = table.add("done")[0], table.add("waiting")[0]
    for _ in range(MAX_DEATHS):
        table.table.note_begun(Begun([done]))
        table.tokens((done, 1, FinishCode.STOP))
        assert table.die() == [waiting]
        done = table.add("done")[0]
    assert table.outputs["waiting"] == []
