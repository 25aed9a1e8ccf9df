"""What a run has unmasked: on disk before anybody is asked for shares, and what that forbids."""

import json

import pytest

from engine.records.journal import Journal, SumRefused


def anybody(clients):
    """Refuses no difference."""


def fewer_than_two(clients):
    if len(clients) < 2:
        raise SumRefused(f"{len(clients)} is there")


def reopened(journal, model=0):
    return Journal(journal.run, journal.elsewhere, model)


def entries(journal):
    """Which clients' sums were asked for, from which models, by round."""
    facts = [json.loads(path.read_text()) for path in (journal.run / "unmasked").iterdir()]
    return {entry["round"]: (entry["clients"], entry["models"]) for entry in facts}


def test_a_round_has_one_set_of_survivors_whatever_the_model(tmp_path):
    journal = Journal(tmp_path, None, 0)
    assert journal.clients(1) is None and not (journal.run / "unmasked").exists()
    journal.admit(1, [3, 1, 2], anybody)
    journal.admit(1, [1, 2, 3], anybody)
    again = reopened(journal, model=7)
    assert again.clients(1) == {1, 2, 3} and again.clients(2) is None
    for others in ([1, 2], [1, 2, 3, 4], [4, 5, 6]):
        with pytest.raises(SumRefused, match="a sum of 3 clients of this round was asked for before"):
            again.admit(1, others, anybody)
    again.admit(1, [1, 2, 3], anybody)
    assert entries(again) == {1: ([1, 2, 3], [0, 7])}


def test_sums_of_one_model_are_the_same_clients_or_differ_by_enough(tmp_path):
    journal = Journal(tmp_path, None, 4)
    journal.admit(5, [1, 2, 3], fewer_than_two)
    with pytest.raises(SumRefused, match=r"round 5 had a sum from the same model.* 1 is there"):
        journal.admit(6, [1, 2], fewer_than_two)
    assert journal.clients(6) is None
    journal.admit(6, [1, 2, 4], fewer_than_two)
    journal.summed(6)
    journal.admit(7, [1, 2], fewer_than_two)


def test_a_file_that_cannot_be_read_counts_as_asked(tmp_path):
    journal = Journal(tmp_path, None, 0)
    journal.admit(1, [1, 2, 3], anybody)
    file = tmp_path / "unmasked" / "round-00001.json"
    whole = file.read_bytes()
    for damaged in (b"", whole.replace(b"[1, 2, 3]", b"[1, 2, 4]"), whole.replace(b'"round": 1', b'"round": 2'), b"[]"):
        file.write_bytes(damaged)
        for round_ in (1, 2):  # and nobody knows whether the next one's clients are nearly the same
            with pytest.raises(SumRefused, match=r"round-00001\.json, which says of whom, cannot be read"):
                reopened(journal).admit(round_, [1, 2, 3], anybody)
    reopened(journal, model=1).admit(2, [1, 2, 3], anybody)


def test_a_copy_has_it_before_shares_are_asked_for_and_the_run_ends_where_it_cannot(tmp_path):
    there = (tmp_path / "there").as_uri()
    journal = Journal(tmp_path / "here", there, 0)
    journal.admit(1, [1, 2, 3], anybody)
    assert entries(Journal(tmp_path / "there")) == entries(journal) == {1: ([1, 2, 3], [0])}
    (tmp_path / "there" / "unmasked" / "round-00001.json").unlink()  # the driver died before it was copied
    reopened(journal).admit(1, [1, 2, 3], anybody)
    assert entries(Journal(tmp_path / "there")) == entries(journal)
    (tmp_path / "file").touch()
    lost = Journal(tmp_path / "here", (tmp_path / "file").as_uri(), 1)
    with pytest.raises(OSError, match=r"cannot be written .*run again with --resume"):
        lost.admit(2, [1, 2, 3], anybody)
