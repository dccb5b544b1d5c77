"""The image: linted by hadolint, pinned, not root, and with nothing in it that does not belong there."""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments), with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


INSTRUCTIONS = instructions(DOCKERFILE.read_text(encoding="utf-8"))
LAST_STAGE = INSTRUCTIONS[max(at for at, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM") :]


def of(name: str, among: list[tuple[str, str]] = INSTRUCTIONS) -> list[str]:
    return [rest for each, rest in among if each == name]


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HADOLINT, "--no-color", "--failure-threshold", "style", path], capture_output=True, text=True, timeout=60
    )


def test_hadolint_finds_nothing() -> None:
    linted = lint(DOCKERFILE)
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("USER 10001:10001", "USER root", "DL3002"),
        ('ENTRYPOINT ["petals-eval"]', "ENTRYPOINT petals-eval", "DL3025"),
        ("# hadolint ignore=DL3013\n", "", "DL3013"),
        ("--no-install-recommends ca-certificates python3 python3-venv", "python3", "DL3015"),
    ],
)
def test_hadolint_would_find_it(tmp_path: Path, old: str, new: str, rule: str) -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert old in text
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(text.replace(old, new))
    linted = lint(wrong)
    assert linted.returncode == 1
    assert rule in linted.stdout


def test_every_stage_is_on_one_pinned_base() -> None:
    stages = of("FROM")
    assert len(stages) == 2
    assert all(stage.split()[0] == "${BASE}" for stage in stages)
    [base] = [rest for rest in of("ARG") if rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=docker\.io/library/debian:\d+\.\d+-slim(@sha256:[0-9a-f]{64})?", base)


def test_the_image_is_not_root() -> None:
    [user] = of("USER", LAST_STAGE)
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)  # numbers, as Kubernetes' runAsNonRoot wants them
    after = LAST_STAGE[LAST_STAGE.index(("USER", user)) :]
    assert of("RUN", after) == of("COPY", after) == of("ADD") == []
    assert of("ENTRYPOINT", LAST_STAGE) == ['["petals-eval"]']


def test_packages_are_those_that_were_tested() -> None:
    build = INSTRUCTIONS[: -len(LAST_STAGE)]
    assert any("PIP_CONSTRAINT=/src/constraints.txt" in rest for rest in of("ENV", build))
    constrained = next(at for at, (name, _) in enumerate(build) if name == "ENV")
    installs = [at for at, (_, rest) in enumerate(build) if "pip install" in rest]
    assert installs and min(installs) > constrained
    assert not any("pip install" in rest for _, rest in LAST_STAGE)
    pinned = {
        re.split(r"[=<>\[]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {re.split(r"[=<>\[]", name)[0].lower() for name in project["dependencies"]} <= pinned


def test_torch_is_for_the_cpu_unless_the_build_says_otherwise() -> None:
    [index] = [rest for rest in of("ARG") if rest.startswith("TORCH_INDEX=")]
    assert index == "TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    assert any('--extra-index-url "${TORCH_INDEX}" torch' in rest for rest in of("RUN"))


def test_no_secret_is_written_down() -> None:
    for name, rest in INSTRUCTIONS:
        if name in ("ARG", "ENV"):
            assert not re.search(r"token|secret|password|passwd|api_?key|credential", rest, re.IGNORECASE)


def test_what_is_copied_is_there_and_all_that_the_context_holds() -> None:
    ignored = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert ignored[0] == "*"
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        word for rest in of("COPY") if "--from=" not in rest for word in rest.split()[:-1] if not word.startswith("--")
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert any(fnmatch("petals_eval/cli/__pycache__", line.replace("**", "*")) for line in ignored)
