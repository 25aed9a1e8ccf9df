"""Policies against licences and cards, and federations that some clients do not join."""

import json

import pytest
from safetensors.numpy import load_file

import experiments
from engine.config.access import Access
from engine.messages.errors import RunError
from engine.messages.events import Started
from engine.records.metrics import read_log
from experiments.openness.card import FIRST, PARAMETERS, THIRD, Card
from experiments.openness.gate import notice
from experiments.openness.licences import licences
from experiments.openness.policy import Policy, read_policies, refusal

HOME = Access()
# Twelve policies, and the licences (by a part of their ids) that each refuses, by hand.
POLICIES = {
    "anything": (Policy(), ()),
    "permissive": (
        Policy(licences=("Apache-2.0", "MIT")),
        ("BSD", "MDW", "NC", "llama", "gemma", "qwen", "bigcode"),
    ),
    "commercial": (Policy(commercial=True), ("NC", "qwen-research")),
    "a billion users": (Policy(users=10**9), ("llama", "qwen-2024")),
    "many users": (Policy(users=2 * 10**8), ("qwen-2024",)),
    "few users": (Policy(users=1000), ()),
    "distillers": (Policy(train_others=True), ("llama-2", "llama-3-")),
    "class III": (Policy(mof="III"), ("NC", "llama", "gemma", "qwen", "bigcode")),
    "open corpus": (Policy(corpus="open"), ("",)),
    "disclosed corpus": (Policy(corpus="disclosed"), ()),
    "small": (Policy(max_parameters=10**6), ("",)),
    "at home": (Policy(levels=("weights", "weights_data")), ()),
}


@pytest.mark.parametrize("licence", licences())
@pytest.mark.parametrize("name", POLICIES)
def test_policies_and_licences(name, licence):
    policy, refused = POLICIES[name]
    base = Card("base", dict.fromkeys(FIRST, licence), 10**9, "disclosed")
    why = refusal(policy, "base", base, HOME)
    assert (why is not None) == any(part in licence for part in refused), why


def test_the_first_reason_is_a_sentence():
    base = Card("base", dict.fromkeys(THIRD, "MIT"), None, "none", ("EU",))
    assert refusal(Policy(jurisdiction="EU"), "base", base, HOME) == "base may not be used in EU"
    assert refusal(Policy(mof="II"), "base", base, HOME) == "base is of class III, and it accepts class II or better"
    assert refusal(Policy(corpus="disclosed"), "base", base, HOME) == (
        "the training data of base are undisclosed, and it asks for disclosed data"
    )
    assert "does not say how many parameters" in refusal(Policy(max_parameters=5), "base", base, HOME)
    assert refusal(Policy(commercial=True), "hub/name", None, HOME).startswith("hub/name has no card.yml")
    unknown = Card("base", {PARAMETERS: "Mine-1.0"})
    assert refusal(Policy(commercial=True), "base", unknown, HOME).startswith(
        "the licence 'Mine-1.0' of base is not known"
    )


def test_the_terms_of_a_provider_are_gated():
    api = Access(level="api_text", retain_days=30)
    assert refusal(Policy(levels=("weights",)), "x", None, api) == 'the level is "api_text", and it accepts weights'
    assert refusal(Policy(max_retain_days=7), "x", None, api) == "the provider keeps rows for 30 days, and it accepts 7"
    assert refusal(Policy(max_retain_days=30), "x", None, api) is None
    assert "does not say how long" in refusal(Policy(max_retain_days=7), "x", None, Access(level="api_text"))
    assert refusal(Policy(max_retain_days=0), "x", None, HOME) is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[all", "cannot be read"),
        ("[some]", "has a table 'some'"),
        ('[all]\nmof = "IV"', "Input should be 'I', 'II' or 'III'"),
        ('[clients.ada]\nlicense = ["MIT"]', "a policy takes licences, mof"),
    ],
)
def test_a_faulty_policy_is_refused_with_the_way_out(tmp_path, text, what):
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(RunError) as refused:
        read_policies(tmp_path / "policy.toml")
    assert what in str(refused.value)


def test_a_clients_table_changes_what_holds_for_all(tmp_path):
    (tmp_path / "policy.toml").write_text('[all]\nmof = "III"\ncommercial = true\n[clients.ada]\nmof = "I"\n')
    policies = read_policies(tmp_path / "policy.toml")
    assert policies.of("bob") == Policy(mof="III", commercial=True)
    assert policies.of("ada") == Policy(mof="I", commercial=True)


def test_a_notice_says_what_the_licence_asks_for():
    said = notice(Card("base", {PARAMETERS: "LicenseRef-scancode-llama-3-license-2024"}))
    assert "Built with Meta Llama 3" in said and "No legal advice" in said
    assert notice(None) is None and notice(Card("base", {PARAMETERS: "Mine-1.0"})) is None


@pytest.fixture
def gated(small_recipe, tmp_path, rows_file):
    """A recipe, and the names of two clients that refuse its base."""
    names = sorted({json.loads(line)["client"] for line in rows_file.read_text().splitlines()})
    refusing, policy = names[2:4], tmp_path / "policy.toml"
    tables = "".join(f'[clients."{name}"]\nlevels = ["weights_data"]\n' for name in refusing)
    policy.write_text(tables)
    short = ("rounds=1", "evaluate.every=0", "cohort.size=4", "data.splits.unseen=0.0")
    return lambda *changes: small_recipe(*short, *changes), policy, refusing


def test_who_refuses_is_named_and_never_trains(ray_session, gated, rows_file, tmp_path, full):
    recipe, policy, refusing = gated
    events, changes = [], (f"gate.policy='{policy}'", "gate.bases=['tiny']")
    run = experiments.run(recipe(*changes), out=tmp_path / "run", on_event=events.append)
    (note,) = next(event for event in events if isinstance(event, Started)).notes
    assert "2 of 10 clients with" in note and "tiny would be refused by 2 of 10" in note
    faults = [row for row in read_log(run.folder / "faults").to_pylist() if row["kind"] == "policy"]
    assert [row["who"] for row in faults] == refusing
    facts = json.loads((run.folder / "openness.json").read_text())
    assert facts["refused_clients"] == 2 and [*facts["refused"]] == refusing and facts["refused_rows"] > 0
    seen = {row["client"] for row in read_log(run.folder / "metrics").to_pylist() if row["client"]}
    assert seen and not seen & {*refusing}
    if not full:
        return
    # As if they had never been in the data.
    fewer = tmp_path / "rows.jsonl"
    kept = [line for line in rows_file.read_text().splitlines() if json.loads(line)["client"] not in refusing]
    fewer.write_text("\n".join(kept) + "\n")
    without = experiments.run(recipe(f"data.source.path='{fewer}'"), out=tmp_path / "without")
    ours, theirs = (load_file(each.model / "adapter_model.safetensors") for each in (run, without))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_federation_that_nobody_joins_is_refused(gated, tmp_path):
    recipe, policy, _ = gated
    policy.write_text('[all]\nlevels = ["weights_data"]\n')
    with pytest.raises(RunError, match="all 10 clients refuse the base by their policies"):
        experiments.run(recipe(f"gate.policy='{policy}'"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    policy.write_text("[clients.nobody]\ncommercial = true\n")
    with pytest.raises(RunError, match="is for a client 'nobody', which the data lack"):
        experiments.run(recipe(f"gate.policy='{policy}'"), out=tmp_path / "run")
    with pytest.raises(RunError, match=r"set data\.splits\.server = 0"):
        recipe(f"gate.policy='{policy}'", "data.splits.server=0.2")
