"""The lines of Python that the README gives for saving prompts from a training loop."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def saving_lines(folder: Path) -> list[str]:
    """Two for Petals (all that was tuned, the prompts alone) and one for PEFT, which save to this folder."""
    lines = re.findall(r"^- `((?:torch\.save|model\.save_pretrained)\(.*\))`$", README.read_text(), re.MULTILINE)
    return [re.sub(r'"(prompts(?:\.pt)?)"', lambda found: repr(str(folder / found[1])), line) for line in lines]
