"""By how much one method leads another when several models answer the same questions."""

from typing import Any

import numpy as np

from fastmmoe.study.accuracy import paired_difference


def lead_over(right: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """The mean lead, its standard error, and the lead with each model; right or wrong answers, [models, questions].

    A question's mean over the models is one draw. What the training's seed adds shows in the leads themselves.
    """
    lead, error = paired_difference(right.mean(0), other.mean(0))
    return {"lead": lead, "standard_error": error, "leads": (right - other).mean(1).tolist()}


def shown(found: dict[str, Any]) -> str:
    """A lead in words."""
    one_by_one = " ".join(f"{lead:+.4f}" for lead in found["leads"])
    return f"{found['lead']:+.4f} +- {found['standard_error']:.4f} ({one_by_one})"
