"""Cohorts: many slides through one engine, here or on a Ray cluster."""

from .pipeline import Job, Outcome, Settings
from .run import Totals, read_cohort, run_cohort

__all__ = ["Job", "Outcome", "Settings", "Totals", "read_cohort", "run_cohort"]
