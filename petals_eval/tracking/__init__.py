"""Where results go besides the run folder: experiment trackers, under names that they take."""

from petals_eval.tracking.logged import logged_settings, logged_values
from petals_eval.tracking.trackers import TRACKERS, Tracker, log_results, trackers_of

__all__ = ["TRACKERS", "Tracker", "log_results", "logged_settings", "logged_values", "trackers_of"]
