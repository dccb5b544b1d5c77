"""What a person reads: the terminal, the Markdown report, the progress of a run."""

from petals_eval.report.comparison import print_comparison
from petals_eval.report.errors import print_errors
from petals_eval.report.markdown import markdown_report
from petals_eval.report.progress import ProgressDisplay
from petals_eval.report.terminal import print_group, print_result
from petals_eval.text import console_for, printable

__all__ = [
    "ProgressDisplay",
    "console_for",
    "markdown_report",
    "print_comparison",
    "print_errors",
    "print_group",
    "print_result",
    "printable",
]
