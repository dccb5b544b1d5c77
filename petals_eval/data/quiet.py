"""Keep the progress bars of `datasets` off our screen, and give them back to whoever had them on."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["no_progress_bars"]


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
