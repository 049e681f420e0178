"""From a model and a few batches to a plan and the frames of its groups."""

from .analysis import Analysis, SearchOptions, analyse, check_budget, search_groups
from .calibration import Statistics, collect_statistics

__all__ = ["Analysis", "SearchOptions", "Statistics", "analyse", "check_budget", "collect_statistics", "search_groups"]
