"""What privacy asks of the rest of a recipe, checked before a run."""

from engine.config.sections import Sections
from engine.messages.errors import RunError
from strategies.core.base import named
from strategies.core.cohort import UniformCohort
from strategies.core.protocol import NO_LAYOUT
from strategies.privacy.checks import check_dp
from strategies.secagg.ring import Sum


def check_privacy(recipe: Sections) -> None:
    """Raises RunError or StrategyError for the first demand of privacy that the recipe does not meet."""
    _check_comparison(recipe)
    if recipe.privacy.dp.unit is not None:
        _check_noise(recipe)
    if recipe.privacy.secure:
        _check_reads(recipe)
    if recipe.privacy.public_weights:
        _check_weights(recipe)
        _check_coordinates(recipe)
    if recipe.privacy.secure:
        _check_sampling(recipe)
        _check_bounds(recipe)
        _check_cohort(recipe)


def _check_comparison(recipe: Sections) -> None:
    if not recipe.evaluate.without_privacy:
        return
    if recipe.keeps_state:
        why = "clients' state belongs to the one run"
    elif not recipe.privacy.on:
        why = "there is no privacy to do without"
    else:
        return
    raise RunError(f"evaluate.without_privacy plays all rounds twice, but {why}: leave it out")


def _check_noise(recipe: Sections) -> None:
    dp, strategy, peft = recipe.privacy.dp, recipe.strategy, recipe.model.peft
    assert dp.unit is not None
    mixed_ranks = peft.kind == "lora" and any(share.r != peft.r for share in peft.ranks)
    check_dp(dp, strategy, strategy.beside(NO_LAYOUT), recipe.privacy.secagg.mode, mixed_ranks=mixed_ranks)
    if recipe.clients.min_share > 0 or recipe.clients.on_too_few == "skip":
        raise RunError(
            "a round that has no result because few clients took part tells how many did, which noise would have "
            "hidden: leave clients.min_share and clients.on_too_few out, or privacy.dp"
        )


def _check_reads(recipe: Sections) -> None:
    """Secure aggregation gives one sum of all updates."""
    strategy, name = recipe.strategy, named(recipe.strategy)
    if strategy.reads != "sum":
        what = "each update" if strategy.reads == "each" else "several sums of the same updates"
        raise RunError(
            f"{name} reads {what}, and secure aggregation gives the server one sum a round: take a rule that reads "
            f'the sum ("centred_clipping", or the transform "clip", bound what a liar can do), or set '
            f'privacy.secagg.mode = "off"'
        )
    if not strategy.sends_update:
        raise RunError(f"{name} sends nothing that could be summed: leave privacy.secagg out")


def _check_weights(recipe: Sections) -> None:
    """Clients multiply their updates by their weights, which must be bounded and tell nothing of other clients."""
    strategy, name = recipe.strategy, named(recipe.strategy)
    if not strategy.bounded_weights:
        raise RunError(
            f"{name} weighs clients without a bound (bounded_weights), so that one of them may move a sum by any "
            f'amount: take a rule with bounded weights, such as "fedavg", or "hetlora" with weighting = "uniform"'
        )
    if recipe.privacy.rows_cap is None and not strategy.weighs_alike:
        raise RunError(
            f"{name} weighs clients by their rows, which needs a public number of rows from which on all clients "
            f'count the same: set privacy.rows_cap, or strategy.weighting = "uniform"'
        )


def _check_coordinates(recipe: Sections) -> None:
    """Which coordinates a client sends must follow from public numbers, as a sum's number of clients does."""
    secure, strategy = recipe.privacy.secure, recipe.strategy
    if strategy.picks_coordinates:
        why = (
            "a sum may show what one client alone sends"
            if secure
            else ("clients that have not trained shrink what they leave out")
        )
        raise RunError(
            f"clients of {named(strategy)} leave out coordinates by their own data (picks_coordinates), so that {why}: "
            f'take a rule that leaves none out, such as "fedavg", or "hetlora" with gamma = 1'
        )
    picking = next((transform.kind for transform in recipe.transforms if transform.picks_coordinates), None)
    if secure and picking is not None:
        raise RunError(
            f"{picking!r} sends the coordinates that each client picks by its own data, so that a sum may show what "
            f'one client alone sends: take "projection", whose choice all clients share, or leave privacy.secagg out'
        )


def _check_sampling(recipe: Sections) -> None:
    dp = recipe.privacy.dp
    varies = not isinstance(recipe.cohort, UniformCohort)
    if varies and dp.adds_to == "sum" and dp.claims(recipe.cohort) == "poisson":
        raise RunError(
            "a Poisson cohort that is too small for secure aggregation has no sum, which tells how many came, so that "
            'its sampling hides nothing: set privacy.dp.sampling = "none"'
        )


def _check_bounds(recipe: Sections) -> None:
    secagg, name, beside = recipe.privacy.secagg, named(recipe.strategy), recipe.strategy.beside(NO_LAYOUT)
    missing = [extra for extra in beside if extra not in secagg.bounds]
    if missing and recipe.privacy.dp.adds_to != "ring":
        raise RunError(
            f"{name} sends the sum {missing[0]!r} beside the update, and a ring needs to know how large its "
            f"coordinates may be: set privacy.secagg.bounds.{missing[0]}, above which they are clipped"
        )
    if unknown := [extra for extra in secagg.bounds if extra not in beside]:
        raise RunError(f"privacy.secagg.bounds names {unknown[0]!r}, but {name} sends no such sum: take it out")


def _check_cohort(recipe: Sections) -> None:
    """The largest cohort must fit the graph and the ring; without one, the driver checks it by the population."""
    secagg, cohort = recipe.privacy.secagg, recipe.cohort
    largest = cohort.size if isinstance(cohort, UniformCohort) else cohort.cap
    if largest is None:
        return
    secagg.parameters(largest)
    secagg.sums((Sum("delta", 1, secagg.bound, "weighted"),), largest)
    if secagg.min_contributors > largest:
        raise RunError(
            f"privacy.secagg.min_contributors is {secagg.min_contributors}, more than the {largest} clients of a "
            f"cohort: lower it, or raise cohort.size"
        )
    peft = recipe.model.peft
    if peft.kind != "lora" or not peft.ranks or recipe.strategy.sends_products:
        return
    # Rows of an adapter that only clients of a high rank have are a block of their own in the sum.
    expected = largest * sum(share.share for share in peft.ranks if share.r == peft.r)
    if expected < secagg.min_contributors:
        raise RunError(
            f"of a cohort of {largest}, {expected:g} clients are expected to have rank {peft.r}, and "
            f"privacy.secagg.min_contributors asks for {secagg.min_contributors} for each coordinate: raise "
            f'cohort.size or the share, or take "flexlora", whose sums hold everybody\'s products'
        )
