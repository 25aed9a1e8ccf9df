"""Sections that do not go together: each pair is refused with the nearest that works, which is then accepted."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from strategies.averaging.fedavg import FedAvg

SGD = 'train.optimizer={kind="sgd", lr=0.1}'
GANGS = "clients.zero={stage=3, ranks=2}"
LIKE_RANKS = 'model.peft={kind="lora", r=8, ranks=[{r=4, share=0.5}, {r=8, share=0.5}]}'


@pytest.mark.parametrize(
    ("changes", "said", "mended"),
    [
        (["strategy=ffa", "model.peft=none"], r"'ffa' works on adapters, .*\"fedavg\"", ["strategy=fedavg"]),
        (
            ["strategy=ffa", "model.peft=ia3"],
            r"'ffa' works on adapters, but model.peft is \"ia3\"",
            ["strategy=fedavg"],
        ),
        (
            ["strategy=ffa", 'model.peft={kind="lora", rank_pattern={q_proj=2}}'],
            r"'ffa' needs one rank in all layers, .* or use \"fedavg\"",
            ["strategy=fedavg"],
        ),
        (
            ["model.peft=ln_tuning", 'model.dtype="bfloat16"'],
            r'kind = "ln_tuning" trains weights of the base, which needs model.dtype = "float32"',
            ['model.dtype="float32"'],
        ),
        (
            ['model.peft={kind="lora", bias="all"}', 'model.dtype="bfloat16"'],
            r"model.peft.bias trains weights of the base",
            ['model.dtype="float32"'],
        ),
        (["model.peft=vera", GANGS], r'model.peft.kind = "vera" does not work with gangs', ["model.peft=lora"]),
        ([LIKE_RANKS], r"'fedavg' needs one rank .* use 'flora' or 'flexlora' or 'hetlora'", ["strategy=hetlora"]),
        (
            ["strategy=feddpa", "model.peft={kind='lora', r=3}"],
            r"2 equal parts, .* 3: set it to 4",
            ["model.peft.r=4"],
        ),
        (["strategy={kind='krum', f=2}"], r"needs at least 7 clients .* is 5: raise it to 7", ["cohort.size=7"]),
        (["strategy=scaffold"], r"counts on what plain SGD does: .*momentum = 0 }", [SGD]),
        (["strategy={kind='fednova', momentum=0.5}", SGD], r"momentum = 0.5 }", ["strategy.momentum=0.0"]),
        (["strategy=fednova", SGD, "train.over_steps={kind='linear'}"], "leave train.over_steps", ["strategy=fedavg"]),
        (
            [
                "strategy={kind='fednova', momentum=0.5}",
                "train={steps=3, state='keep', optimizer={kind='sgd', momentum=0.5}}",
            ],
            "'fednova' counts on a momentum that starts at zero in each round",
            ["train.state=reset"],
        ),
        (["train.over_steps.warmup=4"], "warmup is 4, and a round has 3 steps: set it to 3 or", ["train.steps=4"]),
        (["train.over_rounds.warmup=5"], "warmup is 5, and the run has 4 rounds: set it to 4 or", ["rounds=5"]),
        (["strategy=qfedavg"], r"holds for SGD alone", ["strategy.lipschitz=10.0"]),
        (["strategy=fedsb"], r"span of its basis.*\"ffa\"", [SGD]),
        (["strategy=rolora", "train.state=keep"], r"another meaning", ["train.state=reset"]),
        (["strategy=ffa", "train.optimizer={kind='adamw', weight_decay=0.1}"], "weight decay would shrink", [SGD]),
        (["strategy=ffa", "train.optimizer={kind='torch', name='Adam', options={weight_decay=0.1}}"], "shrink", [SGD]),
        (
            ["strategy=ffa", "train.optimizer={kind='torch', name='AdamW'}"],  # 0.01 without a word
            r"shrink: set train\.optimizer\.options\.weight_decay = 0",
            ["train.optimizer.options.weight_decay=0"],
        ),
        (
            ["strategy=ffa", "train.optimizer={kind='torch', name='ASGD'}"],
            r"shrink: set train\.optimizer\.options\.lambd = 0",
            ["train.optimizer.options.lambd=0"],
        ),
        (["strategy=local", "transforms=[{kind='int8'}]"], "sends nothing that could be", ["strategy=fedavg"]),
        (["transforms=[{kind='projection'}, {kind='projection'}]"], "has several projections", ["transforms=[]"]),
        (["strategy=fedex", "transforms=[{kind='int8'}]"], "sends products beside its update", ["strategy=fedavg"]),
        (["strategy=scaffold", "train.optimizer={kind='sgd', lr=0}"], "divides by the learning rate", [SGD]),
        (["strategy=ffa", "transforms=[{kind='projection'}]"], "noise would move", ["transforms=[{kind='topk'}]"]),
    ],
)
def test_what_does_not_go_together_is_refused_and_the_way_out_works(small_recipe, changes, said, mended):
    with pytest.raises(ValueError, match=said):
        small_recipe(*changes)
    small_recipe(*changes, *mended)


def test_gangs_hide_no_sums_that_are_shorter_than_the_update(small_recipe):
    private = "privacy={rows_cap=8, secagg={mode='ideal', bounds={weights=8.0}}}"
    changes = ("strategy=fednova", SGD, private)
    small_recipe(*changes)
    with pytest.raises(ValueError, match=r"'fednova' sends 'weights' .* leave privacy\.secagg, or clients\.zero, out"):
        small_recipe(*changes, GANGS)
    small_recipe(*changes, GANGS, "privacy.secagg={mode='off'}")
    small_recipe("strategy=scaffold", SGD, private.replace("weights", "c"), GANGS)


@dataclass(frozen=True)
class Beside(FedAvg):
    """Sends one change beside the update, or a vector of them."""

    short: bool = True
    extras_are_changes: ClassVar[bool] = True

    def beside(self, layout):
        return {"change": 1 if self.short else layout.size}


def test_gangs_add_no_noise_to_sums_that_are_shorter_than_the_update(small_recipe):
    private = "privacy={rows_cap=8, dp={kind='central', noise_multiplier=1, clip=1, delta=0.1, joint=true}}"
    recipe = small_recipe(private, GANGS)
    with pytest.raises(ValueError, match=r"'Beside' sends 'change' .* leave privacy\.dp, or clients\.zero, out"):
        replace(recipe, strategy=Beside())
    replace(recipe, strategy=Beside(short=False))
    replace(small_recipe(private), strategy=Beside())


@pytest.mark.parametrize(
    "rule", ["{kind='flexlora', weighting='examples'}", "{kind='hetlora', weighting='examples', gamma=1.0}"]
)
def test_private_clients_of_mixed_ranks_leave_each_others_ranks_alone(small_recipe, rule):
    private = "privacy={rows_cap=8, dp={kind='central', noise_multiplier=1, clip=1, delta=0.1, joint=true}}"
    with pytest.raises(ValueError, match=r'take "flora", or leave model\.peft\.ranks out'):
        small_recipe(private, LIKE_RANKS, f"strategy={rule}")
    small_recipe(private, LIKE_RANKS, "strategy=flora")
    small_recipe(private, f"strategy={rule}")


def test_ranks_are_drawn_by_their_shares(small_recipe):
    recipe = small_recipe(LIKE_RANKS, "strategy=flora")
    ranks = [recipe.model.peft.lora_rank_of(client, recipe.seed) for client in range(400)]
    assert set(ranks) == {4, 8} and 160 < ranks.count(4) < 240
    assert ranks == [recipe.model.peft.lora_rank_of(client, recipe.seed) for client in range(400)]
    assert small_recipe().model.peft.lora_rank_of(3, 1) is None
    for wrong in ("[{r=4, share=0.5}, {r=8, share=0.4}]", "[{r=4, share=1.0}]"):
        with pytest.raises(ValueError, match=r"shares that sum to 1, and 8 \(model\.peft\.r\) as largest r"):
            small_recipe(f'model.peft={{kind="lora", r=8, ranks={wrong}}}', "strategy=flora")
