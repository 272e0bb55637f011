"""How a report says its numbers."""

from __future__ import annotations

import math

from .statistics import Estimate


def percent(share: float) -> str:
    """Whole percent, which says 0% and 100% only of what is exactly that."""
    if 0 < share < 0.005:
        return "under 1%"
    return "over 99%" if 0.995 <= share < 1 else f"{share:.0%}"


def interval(estimate: Estimate) -> str:
    """A share with its 95 % interval."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return percent(estimate.value)
    return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"


def duration(seconds: float) -> str:
    """Seconds, or minutes from two of them on."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
