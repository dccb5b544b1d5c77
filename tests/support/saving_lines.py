"""The lines of Python that the guide gives for saving prompts from a training loop."""

import re
from pathlib import Path

from tests.support.pages import Page


def saving_lines(folder: Path) -> list[str]:
    """Two for Petals (all that was tuned, the prompts alone) and one for PEFT, which save to this folder."""
    lines = re.findall(r"^- `((?:torch\.save|model\.save_pretrained)\(.*\))`$", Page("prompts").text, re.MULTILINE)
    return [re.sub(r'"(prompts(?:\.pt)?)"', lambda found: repr(str(folder / found[1])), line) for line in lines]
