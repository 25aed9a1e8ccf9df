"""`fedpost partition`, `plan`, `strategies` and `schema`: what one wants to know before a run."""

from typing import Annotated

import typer

from experiments.cli.command import Changes, Debug, RecipePath, guarded


@guarded
def partition(recipe: RecipePath, changes: Changes = None, debug: Debug = False) -> None:
    """Assign a recipe's rows to clients and show how uneven the result is."""
    from experiments.cli.partition import show_partition
    from experiments.config.recipe import load_recipe

    show_partition(load_recipe(recipe, changes))


@guarded
def plan(
    recipe: RecipePath,
    changes: Changes = None,
    device_gib: Annotated[
        float | None, typer.Option(help="Memory of a device; by default that of this machine.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many such devices there are.")] = 1,
    debug: Debug = False,
) -> None:
    """Estimate the memory that a recipe needs, and which gangs would fit; exit code 1 if it does not fit."""
    from experiments.config.recipe import load_recipe, located
    from experiments.preflight.plan import show_plan

    if not show_plan(located(load_recipe(recipe, changes)), device_gib, devices):
        raise SystemExit(1)


@guarded
def strategies(
    check: Annotated[
        str | None, typer.Option(metavar="MODULE:CLASS", help="Check a strategy of your own against the contract.")
    ] = None,
    debug: Debug = False,
) -> None:
    """List the strategies with what each reads, needs and allows, its paper and its keys; or check one of your own."""
    if check is None:
        from experiments.cli.listing import show_strategies

        show_strategies()
        return
    from experiments.cli.contract import show_check

    if not show_check(check):
        raise SystemExit(1)


@guarded
def schema() -> None:
    """Print the JSON schema of a recipe."""
    import json

    from experiments.config.recipe import schema as recipe_schema
    from experiments.report.terminal import say

    say(json.dumps(recipe_schema(), indent=1))
