"""The sdist and the wheel: all that the package needs is in them, and they work where the checkout is not.

The wheel goes into an environment that sees the libraries of the one that the tests run in, and nothing else of it;
scripts/soak.sh installs it with libraries of its own.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path, seconds: float = 200, code: int = 0) -> str:
    """What a command said, far from the checkout and from whatever the tests are told by the environment."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    ended = subprocess.run([*map(str, command)], cwd=cwd, env=kept, text=True, timeout=seconds, capture_output=True)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    run("bash", "-c", '. scripts/environment.sh; build_packages "$1"', "build", folder, cwd=ROOT)
    return folder


def environment(folder: Path, *what: str | Path) -> Path:
    """The programs of an environment there, with what pip is told to install."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    [libraries] = folder.glob("lib/python*/site-packages")
    # A path that is added by a .pth file has its own .pth files passed over, and with them an editable checkout.
    (libraries / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # --ignore-installed: of the checkout in the tests' own environment.
    install = ("install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", *what)
    run(sys.executable, "-m", "pip", "--python", folder, *install, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def installed(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel."""
    return environment(tmp_path_factory.mktemp("environment"), *packages.glob("*.whl"))


def test_every_file_of_the_package_is_in_both(packages: Path) -> None:
    package = ROOT / "petals_eval"
    there = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    wanted = {name for name in there if "__pycache__" not in name}
    [wheel], [sdist] = packages.glob("*.whl"), packages.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        assert {name for name in file.namelist() if not name.split("/")[0].endswith(".dist-info")} == wanted
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted | {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names
    assert wheel.name.endswith("-py3-none-any.whl")


def metadata(packages: Path) -> Message:
    [wheel] = packages.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        [name] = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(file.read(name).decode())


def test_an_index_is_told_what_it_asks_for(packages: Path) -> None:
    told = metadata(packages)
    assert (told["Name"], told["License-Expression"], told["License-File"]) == ("petals-eval", "MIT", "LICENSE")
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert told["Summary"] and told["Requires-Python"] == ">=3.11"
    classifiers = told.get_all("Classifier")
    assert "Typing :: Typed" in classifiers and "Operating System :: POSIX :: Linux" in classifiers
    assert not [each for each in classifiers if each.startswith("License ::")], "the licence's expression says it"


def test_the_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import petals_eval; print(petals_eval.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert run(installed / "petals-eval", "--version", cwd=tmp_path) == run(
        installed / "python", "-m", "petals_eval", "--version", cwd=tmp_path
    )
    said = run(installed / "petals-eval", "demo", cwd=tmp_path)
    assert "accuracy           0.9750" in said and (tmp_path / "runs").is_dir()


CONSUMER = """
from petals_eval import RemoteModel, RunResult, check_health, evaluate

def accuracy(model: RemoteModel) -> float:
    result: RunResult = evaluate(model, task="sst2", limit=100)
    reveal_type(result.metrics["accuracy"].ci95)
    return result.metrics["accuracy"].value

evaluate(task=3)
"""


@pytest.mark.parametrize("how", ["the wheel", "the README's way"])
def test_a_type_checker_sees_the_types(how: str, installed: Path, tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER)
    # The libraries' types take a minute, and are not what is asked.
    settings = "[mypy]\nfollow_imports = skip\n[mypy-petals_eval.*]\nfollow_imports = silent\n"
    (tmp_path / "mypy.ini").write_text(settings)
    if how == "the README's way":
        (tmp_path / "environment").mkdir()
        installed = environment(tmp_path / "environment", *("--config-settings", "editable_mode=compat", "-e", ROOT))
    command = ("-m", "mypy", "--python-executable", installed / "python", "consumer.py")
    said = run(sys.executable, *command, cwd=tmp_path, code=1)
    assert 'Revealed type is "tuple[float, float] | None"' in said
    assert 'Incompatible return value type (got "float | None", expected "float")' in said
    assert 'No overload variant of "evaluate" matches argument type "int"' in said


def completion(installed: Path, **asked: str) -> str:
    return subprocess.run(
        [installed / "petals-eval"], env={**os.environ, **asked}, stdout=subprocess.PIPE, text=True, timeout=60
    ).stdout


@pytest.mark.sample(1)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(installed: Path, shell: str) -> None:
    assert "_PETALS_EVAL_COMPLETE" in completion(installed, _PETALS_EVAL_COMPLETE=f"source_{shell}")


@pytest.mark.parametrize(
    ("typed", "found"), [("petals-eval he", ["health"]), ("petals-eval run --local", ["--local-swarm"])]
)
def test_what_is_completed(installed: Path, typed: str, found: list[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    assert completion(installed, _PETALS_EVAL_COMPLETE="complete_bash", **words).split() == found
