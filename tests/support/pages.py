"""README and guides as tests read them: their blocks of code, and the commands in these."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIVE = "# Needs a running swarm."
"""The first line of a block that a person tries with a swarm of real servers, and a test with a stand-in."""


@dataclass(frozen=True)
class Page:
    """README ("README") or a guide, by its name."""

    name: str

    @property
    def path(self) -> Path:
        folder = ROOT if self.name == "README" else ROOT / "petals_eval" / "guides"
        return folder / f"{self.name}.md"

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, re.DOTALL | re.MULTILINE)

    def typed(self) -> list["Typed"]:
        """Every command, in order."""
        found = []
        for block in self.blocks("console"):
            for part in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
                command, *shown = part.rstrip("\n").split("\n")
                words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]
                found.append(Typed(tuple(words), tuple(shown), block.startswith(f"{LIVE}\n")))
        return found


@dataclass(frozen=True)
class Typed:
    """A command, the output shown below it, and whether it needs a running swarm."""

    words: tuple[str, ...]
    shown: tuple[str, ...]
    is_live: bool

    @property
    def is_ours(self) -> bool:
        return Path(self.words[0]).name == "petals-eval"


GUIDES = [Page(path.stem) for path in sorted((ROOT / "petals_eval" / "guides").glob("*.md"))]
PAGES = [Page("README"), *GUIDES]
