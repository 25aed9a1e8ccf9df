"""Every strategy against every kind of differential privacy: refused where the epsilon would be false."""

from typing import get_args

import pytest

from strategies import Strategies
from strategies.averaging.fedavg import FedAvg
from strategies.lora.products import FlexLora
from strategies.personalized.personal_models import LocalOnly
from strategies.privacy.budget import ExampleDp
from strategies.privacy.central import AdaptiveDp, CentralDp
from strategies.privacy.checks import check_dp
from strategies.privacy.distributed import DistributedDp

KINDS = [kind(noise_multiplier=0.1) for kind in (CentralDp, AdaptiveDp, DistributedDp)]
UNIFORM = FedAvg(weighting="uniform")


@pytest.mark.parametrize("dp", KINDS, ids=lambda dp: dp.kind)
@pytest.mark.parametrize("strategy", get_args(Strategies), ids=lambda strategy: strategy.__name__)
def test_rules_that_read_more_than_a_sum_are_refused(dp: CentralDp, strategy: type) -> None:
    if strategy.reads == "sum":
        return
    what = "each update" if strategy.reads == "each" else "several sums"
    with pytest.raises(ValueError, match=f"the strategy {strategy.kind!r} reads {what}"):
        check_dp(dp, strategy(), (), "full")


@pytest.mark.parametrize("dp", KINDS, ids=lambda dp: dp.kind)
def test_sums_that_nothing_clips_are_refused(dp: CentralDp) -> None:
    flex = FlexLora(weighting="uniform")
    with pytest.raises(ValueError, match=r"'flexlora' sends product beside the update.*privacy\.dp\.joint = true"):
        check_dp(dp, flex, ("product",), "full")


def test_changes_that_are_clipped_together_pass() -> None:
    check_dp(CentralDp(noise_multiplier=1.0, joint=True), FlexLora(weighting="uniform"), ("product",), "off")


def test_distributed_noise_needs_secure_aggregation() -> None:
    with pytest.raises(ValueError, match="hides nothing where the server sees single updates"):
        check_dp(DistributedDp(noise_multiplier=1.0), UNIFORM, (), "off")
    check_dp(DistributedDp(noise_multiplier=1.0), UNIFORM, (), "ideal")


def test_nothing_sent_is_nothing_to_protect() -> None:
    with pytest.raises(ValueError, match="the strategy 'local' sends nothing"):
        check_dp(KINDS[0], LocalOnly(), (), "off")


def test_noise_within_the_client_goes_with_all_that_sends_no_loss() -> None:
    for strategy in get_args(Strategies):
        dp = ExampleDp(noise_multiplier=1.0)
        if strategy.loss_before:
            with pytest.raises(ValueError, match="sends the loss before training"):
                check_dp(dp, strategy(), ("c",), "off")
        else:
            check_dp(dp, strategy(), ("c",), "off")
