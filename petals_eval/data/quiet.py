"""Keep what `datasets` prints off our screen, and give it back to whoever had it on."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["no_log_lines", "no_progress_bars"]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """No progress bars of `datasets` inside the block; afterwards they are as they were."""
    from datasets.utils import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


@contextmanager
def no_log_lines() -> Iterator[None]:
    """No lines of `datasets` on stderr inside the block: it logs each error that it raises, with the whole path."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
