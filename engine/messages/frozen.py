"""Models that are read and never trained, beside the one that is, such as a teacher."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FrozenModel:
    """The folder of a model or of an adapter, or a model's name on the hub at a `revision`.

    An adapter is that of `base`, which then has the revision. A model that `scores` gives each text one number.
    """

    model: str
    revision: str | None = None
    base: str | None = None
    scores: bool = False
