"""The guides for users: one page a subject, as plain Markdown, and the files that their examples name."""

import re
from importlib.resources import files

from petals_eval.errors import ConfigError
from petals_eval.validation import closest

__all__ = ["example_files", "guide_titles", "read_guide"]


def guide_titles() -> dict[str, str]:
    """Return the title of each page, by its name."""
    return {name: text.partition("\n")[0].removeprefix("# ") for name, text in _pages().items()}


def read_guide(name: str) -> str:
    """Return a page as Markdown. Raises ConfigError, with the nearest name, where there is none of that name."""
    pages = _pages()
    if name not in pages:
        raise ConfigError(f"there is no guide {name}.{closest(name, pages)} There are: {', '.join(pages)}.")
    return pages[name]


def example_files() -> dict[str, str]:
    """Return the text of each YAML file that the pages show, by the name in its first line."""
    shown = (
        re.findall(r"^```yaml\n(# (\S+\.yaml)\n.*?)^```$", text, re.DOTALL | re.MULTILINE) for text in _pages().values()
    )
    return {name: text for found in shown for text, name in found}


def _pages() -> dict[str, str]:
    pages = [page for page in files(__name__).iterdir() if page.name.endswith(".md")]
    return {
        page.name.removesuffix(".md"): page.read_text(encoding="utf-8")
        for page in sorted(pages, key=lambda page: page.name)
    }
