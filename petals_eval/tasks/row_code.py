"""The function that prepares a task's rows: where it comes from, and whether it may run."""

import hashlib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from petals_eval.data.prepared import PreparedRows, RowFunction
from petals_eval.data.rows import Rows
from petals_eval.errors import TaskError

__all__ = ["RowCode", "load_row_code"]

OWN = "petals_eval.tasks."
"""Functions below it came with the package, and no task file can bring one there."""


@dataclass(frozen=True, slots=True)
class RowCode:
    """A function for rows. name: "module:function". sha256: of its module's source; None for the package's own, which
    the hash of the package's code covers."""

    name: str
    function: RowFunction
    sha256: str | None

    def of(self, rows: Rows) -> Rows:
        """Return the rows as the function makes them. Raises DataError where it fails on the first one."""
        return PreparedRows(rows, self.function, self.name)


def load_row_code(name: str, *, task: str, folder: str | Path | None, is_allowed: bool) -> RowCode:
    """Return the function "module:function".

    task: whose it is, for messages. folder: of the task's file, where a module of that name is looked for first.
    is_allowed: whether code may run that did not come with the package.
    Raises TaskError where that is not allowed, before anything of it has run, and for a module that cannot be imported
    or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    beside = None if folder is None else Path(folder) / f"{module_name.replace('.', '/')}.py"
    is_own = module_name.startswith(OWN)
    if not is_own and not is_allowed:
        place = f" of {beside}" if beside is not None and beside.is_file() else ""
        raise TaskError(
            f"task {task}: prepare would run Python code that did not come with petals-eval on each row: the function "
            f"{function_name} in the module {module_name}{place}. Nothing of it has run. Read it first; if you trust "
            "it, allow it with --allow-task-code (in Python: allow_task_code=True)."
        )
    module = _module(module_name, None if is_own else beside, task)
    function = getattr(module, function_name, None)
    if not callable(function) or (is_own and getattr(function, "__module__", None) != module_name):
        raise TaskError(f"task {task}: prepare: the module {module_name} has no function {function_name}.")
    return RowCode(name, function, None if is_own else _source_hash(module))


def _module(name: str, file: Path | None, task: str) -> ModuleType:
    try:
        if file is None or not file.is_file():
            return importlib.import_module(name)
        # Under a name of its own, for two tasks may have files of one name.
        unique = f"petals_eval_rows_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
        spec = importlib.util.spec_from_file_location(unique, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is no Python module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[unique] = module  # where dataclasses, for one, look for the module of their class
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[unique]
            raise
        return module
    except Exception as error:
        looked = f"{file} or " if file is not None else ""
        raise TaskError(
            f"task {task}: prepare: the module {name} cannot be imported ({type(error).__name__}: {error}). It is "
            f"looked for as {looked}a module that Python finds."
        ) from error


def _source_hash(module: ModuleType) -> str | None:
    file = getattr(module, "__file__", None)
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
