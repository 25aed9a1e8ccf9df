"""What the report shows of rollouts: some evaluations, a few prompts, all of it escaped."""

import json

import pytest

from engine.messages.errors import RunError
from engine.records.metrics import ROLLOUTS
from experiments.report.page import write_report
from experiments.report.rollouts import read_rollouts


@pytest.fixture
def folder(tmp_path):
    (tmp_path / ROLLOUTS).mkdir()
    (tmp_path / "recipe.toml").write_text('name = "small"')
    for round_ in range(0, 90, 10):
        content = [
            {
                "prompt": f"<b>prompt {number}",
                "sampled": {"text": f"<i>{round_}", "reward": round_ / 100, "ended": True},
                "greedy": {"text": "same", "reward": None, "ended": False},
            }
            for number in range(7)
        ]
        (tmp_path / ROLLOUTS / f"{round_:06d}.json").write_text(json.dumps(content))
    return tmp_path


def test_the_first_the_last_and_some_evaluations_between(folder):
    shown = read_rollouts(folder)
    assert [each.prompt for each in shown] == [f"<b>prompt {number}" for number in range(5)]
    for each in shown:
        assert [round_ for round_, _ in each.answers] == [0, 20, 40, 60, 80]
        assert each.answers[1] == (20, [("<i>20", "0.2"), ("same", "none")])
    for file in sorted((folder / ROLLOUTS).iterdir())[1:]:
        file.unlink()
    assert [len(each.answers) for each in read_rollouts(folder)] == [1] * 5
    assert read_rollouts(folder / "nowhere") == []


def test_the_page_escapes_them(folder):
    page = write_report([folder], folder / "report.html").read_text()
    assert "What the model writes" in page and "&lt;i&gt;20" in page and "<i>20" not in page and "<b>prompt" not in page


@pytest.mark.parametrize(
    "content", ["{", "[1]", '[{"prompt": "a"}]', '[{"prompt": "a", "sampled": 1, "greedy": 2}]', "3"]
)
def test_a_damaged_file_is_named(folder, content):
    (folder / ROLLOUTS / "000000.json").write_text(content)
    with pytest.raises(RunError, match=r"000000.json is not a file of rollouts"):
        read_rollouts(folder)
