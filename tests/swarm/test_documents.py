"""The documents beside the code: what they name is there, the code leads to them, and they travel with the package."""

import re
import tomllib
from pathlib import Path

import pytest

import petals_eval

PACKAGE = Path(petals_eval.__file__).parent
ROOT = PACKAGE.parent
DOCUMENTS = {"swarm/README.md": PACKAGE / "swarm", "swarm/wire/PROTOCOL.md": PACKAGE}
"""Each with the folder below which it names files; files of tests and scripts are named from the root."""


def text_of(document: str) -> str:
    return (PACKAGE / document).read_text(encoding="utf-8")


def find(document: str, name: str) -> Path | None:
    places = [DOCUMENTS[document] / name, (PACKAGE / document).parent / name, ROOT / name]
    return next((place for place in places if place.exists()), None)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_is_there(document):
    text = text_of(document)
    names = re.findall(r"`([\w./-]+/[\w.-]+|[\w-]+\.(?:py|md|txt))`", text) + re.findall(r"\]\(([^)]+)\)", text)
    paths = [name for name in names if not name.startswith(("owner/", "."))]
    assert len(paths) > 20
    assert [name for name in paths if find(document, name) is None] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_is_in_the_file_that_it_is_said_to_be_in(document):
    named = re.findall(r"`([\w.]+)`(?:, `([\w.]+)`)?\s+in\s+`([\w./]+\.py)`", text_of(document))
    assert named
    for *names, path in named:
        source = find(document, path).read_text(encoding="utf-8")
        for name in filter(None, names):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), (name, path)


def test_every_section_that_the_code_cites_is_there():
    sections = set(re.findall(r"^## (\d+)\.", text_of("swarm/wire/PROTOCOL.md"), re.MULTILINE))
    assert sections == {str(number) for number in range(1, 12)}
    cited = []
    for path in PACKAGE.rglob("*.py"):
        source = " ".join(path.read_text(encoding="utf-8").split())
        for numbers in re.findall(r"PROTOCOL\.md[^.;]{0,30}?,? sections? ([\d, and]+)", source):
            cited += re.findall(r"\d+", numbers)
        assert "wire's description" not in source, path
    assert len(cited) >= 6 and set(cited) <= sections


def test_they_travel_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["petals_eval"]
    carried = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert {PACKAGE / document for document in DOCUMENTS} <= carried
