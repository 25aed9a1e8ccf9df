"""The yardstick itself: runs that must lead to the same bits have the same digests, and others have not."""

import pytest

from tests import golden


@pytest.mark.slow
def test_slots_and_resumes_lead_to_the_same_digests(tmp_path, ray_session, full):
    if not full:
        pytest.skip("five runs; tests of runs compare single pairs")
    golden.make_inputs(tmp_path / "inputs")
    names = ("plain", "two_slots", "resumed", "secagg", "secagg_full")
    for name in names:
        golden.keep(name, tmp_path / "inputs", tmp_path / "results")
    plain, two_slots, resumed, secagg, secagg_full = (golden.digest_of(tmp_path / "results", name) for name in names)
    assert plain == two_slots == resumed
    assert secagg == secagg_full != plain


def test_a_difference_is_named_with_its_size(tmp_path):
    for folder, value, loss in (("a", 1.0, 2.5), ("b", 1.25, 2.5), ("c", 1.0, 3.0)):
        golden.write_result(tmp_path / folder, "plain", {"model:w": golden.np.array([value, 2.0])}, [f"loss {loss}"])
    a, b, c = (tmp_path / folder for folder in "abc")
    assert golden.largest_difference(a, a, "plain") == ""
    assert golden.largest_difference(a, b, "plain") == "model:w differs by up to 0.25"
    assert golden.largest_difference(a, c, "plain") == "2 lines of metrics differ, such as loss 2.5"


def test_keys_that_were_renamed_are_written_in_the_old_words_too(tmp_path):
    assert golden.recipe_text(tmp_path, ["clients.lanes=3"], golden.RENAMED)[1] == ["clients.pack=3"]
    assert golden.recipe_text(tmp_path, ["clients.lanes=3"], {})[1] == ["clients.lanes=3"]
