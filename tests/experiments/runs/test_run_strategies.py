"""Rules that need more of the engine than a sum, in whole runs: memory, single updates, a changed base, transforms."""

import math

import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file

import experiments
from engine.messages.events import RoundDone, Started

SGD = 'train.optimizer={kind="sgd", lr=0.3}'
RANKS = 'model.peft={kind="lora", r=4, alpha=8, ranks=[{r=2, share=0.5}, {r=4, share=0.5}]}'
EVERYBODY = "cohort.size=8"
CASES = {
    "scaffold": ["strategy=scaffold", SGD, "train.clip=0.0"],
    "flora with mixed ranks": ["strategy=flora", RANKS],
    "krum": ["strategy={kind='multi_krum', f=1}"],
    "fedsa, compressed and private": [
        "strategy={kind='fedsa', weighting='uniform'}",
        "transforms=[{kind='int8'}]",
        "privacy.secagg.mode=ideal",
        "privacy.dp={kind='adaptive', noise_multiplier=0.3}",
        "clients.availability.dropout=0.1",
    ],
    "diloco": ["strategy=diloco", "train.state=keep", "train.over_rounds={kind='cosine', end=0.1}"],
    "ditto": ["strategy=ditto", "train.accumulate=2", "train.batch=2"],
    "feddpa": ["strategy=feddpa"],
    "rfa": ["strategy=rfa"],
    "hetlora": ["strategy=hetlora", RANKS],
    "fedex": ["strategy=fedex"],
    "feddyn": ["strategy=feddyn", "train.optimizer={kind='torch', name='RAdam', lr=0.01}"],
}


class Stop(Exception):
    """The caller goes away in the middle of a run."""


def weights(run):
    return {
        name: tensor for path in sorted(run.model.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


@pytest.mark.slow
def test_slots_and_an_interruption_change_no_bit(ray_session, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("two runs each; a plain run is interrupted elsewhere")
    for case, changes in CASES.items():
        whole_and_in_two_parts(small_recipe, tmp_path / case, [*changes, EVERYBODY, "rounds=3", "evaluate.every=0"])


def whole_and_in_two_parts(small_recipe, folder, changes):
    run = experiments.run(small_recipe(*changes), out=folder / "whole")
    assert all(math.isfinite(loss) for column in run.losses.values() for loss in column.values())

    def stop(event):
        if isinstance(event, RoundDone) and event.round == 2:
            raise Stop

    # The checkpoint of round 1 is whole; that of round 2 may be, while its memories are written already.
    once = small_recipe(*changes, "clients.slots=1")
    with pytest.raises(Stop):
        experiments.run(once, out=folder / "parts", on_event=stop)
    events = []
    resumed = experiments.run(once, out=folder / "parts", resume=True, on_event=events.append)
    assert next(event for event in events if isinstance(event, Started)).resumed in (1, 2)
    assert run.losses == resumed.losses
    ours, theirs = weights(run), weights(resumed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_a_changed_base_leaves_is_a_whole_model_of_the_same_loss(ray_session, small_recipe, tiny_base, tmp_path):
    from transformers import AutoModelForCausalLM

    run = experiments.run(small_recipe("strategy=flora", EVERYBODY, "rounds=2"), out=tmp_path / "run")
    assert run.losses["end"]["heldout"] < run.losses["round 0"]["heldout"]
    assert not (run.model / "adapter_config.json").exists()
    assert "A whole model: merged products and adapters" in (run.model / "README.md").read_text()
    model, base = (AutoModelForCausalLM.from_pretrained(path) for path in (run.model, tiny_base))
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert changed and all("_proj" in name for name in changed)


def test_personal_models_are_judged_beside_the_global_one(ray_session, small_recipe, tmp_path):
    changes = ("strategy=ditto", EVERYBODY, "rounds=2", "evaluate.finetune=3")
    run = experiments.run(small_recipe(*changes), out=tmp_path / "run")
    assert set(run.losses) == {"round 0", "personal", "fine-tuned", "end"}
    assert run.losses["personal"]["heldout"] < run.losses["round 0"]["heldout"]
    assert run.losses["fine-tuned"]["heldout"] != run.losses["end"]["heldout"]
    personal = run.metrics.filter(pc.equal(run.metrics["name"], "loss_personal")).to_pylist()
    assert {row["client"] for row in personal if row["round"] == 2} > {None}
    memories = list((run.folder / "client_state").rglob("*.safetensors"))
    assert len({path.parent for path in memories}) == 8


@pytest.mark.slow
def test_a_transform_shortens_what_is_sent(ray_session, small_recipe, tmp_path, full):
    if not full:
        pytest.skip("several runs: transforms are tried without one")

    def sent(name, *changes):
        run = experiments.run(small_recipe(*changes, "rounds=1", "evaluate.every=0"), out=tmp_path / name)
        rows = run.metrics.filter(pc.equal(run.metrics["name"], "protocol_bytes_up")).to_pylist()
        return next(row["value"] for row in rows if row["client"] is None), run.losses["end"]["heldout"]

    (plain, loss), (short, squeezed) = sent("plain"), sent("short", "transforms=[{kind='int8'}]")
    assert plain / 4.5 < short < plain / 3.5
    assert squeezed == pytest.approx(loss, abs=0.02) and squeezed != loss


def test_an_empty_cohort_moves_nothing_and_the_run_goes_on(ray_session, small_recipe, tmp_path):
    events = []
    changes = ("cohort={kind='poisson', rate=0.1}", "rounds=6", "evaluate.every=1")
    run = experiments.run(small_recipe(*changes), out=tmp_path / "run", on_event=events.append)
    counts = {event.round: event.clients for event in events if isinstance(event, RoundDone)}
    assert len(counts) == 6 and 0 in counts.values() and max(counts.values()) > 0
    rows = run.metrics.filter(pc.equal(run.metrics["name"], "loss")).to_pylist()
    losses = {row["round"]: row["value"] for row in rows if row["split"] == "heldout" and row["client"] is None}
    for round_, clients in counts.items():
        assert (losses[round_] == losses[round_ - 1]) == (clients == 0)
