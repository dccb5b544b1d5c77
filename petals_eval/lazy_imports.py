"""What libraries import for things that an evaluation never asks of them, put off until somebody does ask.

hivemind imports `scipy.optimize` for averaging gradients, and transformers 5 imports its activation functions, with
torch's compiler and distributed tensors behind them, to check the name of one in a config. Each takes longer than a
small run. Python's own way to put off an import, `importlib.util.LazyLoader`, does not do here: any look at the module
loads it, and torch looks at every module that there is.

hivemind also uses deprecated names of torch while it is imported, which would end a program under `python -W error`.
"""

import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["put_off_imports"]

_PUT_OFF = {
    "scipy.optimize": "hivemind.averaging.load_balancing",
    "transformers.activations": "transformers.utils.type_validators",
}
"""Modules that may wait, each with the one module whose import of it does not count."""
_NAMED = {"transformers.activations": "ACT2FN"}
"""The mapping that this module takes out of it by name (`from ..activations import ACT2FN`)."""
_loading = threading.RLock()


def put_off_imports() -> None:
    """From now on load these modules when they are first used, where it is the libraries above that import them.

    Whoever else imports one gets it at once, as ever. Does nothing the second time.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds a module that may wait while the module whose import of it does not count is being imported."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "hivemind":
            kind: type[_LateLoader | _QuietLoader] = _QuietLoader
        elif name in _PUT_OFF and _is_asked_by_the_one(name):
            kind = _LateLoader
        else:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = kind(spec.loader)
        return spec


def _is_asked_by_the_one(name: str) -> bool:
    importer = sys.modules.get(_PUT_OFF[name])
    return bool(getattr(getattr(importer, "__spec__", None), "_initializing", False))


class _QuietLoader(Loader):
    """Imports a library whose own use of deprecated names must not end a program that makes errors of warnings."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._loader.exec_module(module)


class _LateLoader(Loader):
    """Makes a module that is empty until something is asked of it."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _LateModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing yet."""

    def load(self, module: ModuleType) -> None:
        """Run the module's own code in it."""
        with _loading:
            if isinstance(module, _LateModule):
                # Before: its code may look at the module itself.
                module.__class__ = ModuleType  # type: ignore[assignment]
                self._loader.exec_module(module)


class _LateModule(ModuleType):
    """A module whose code runs when the first of its names is used; what every module has, it has before."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == _NAMED.get(self.__name__) and _is_asked_by_the_one(self.__name__):
            return _LateMapping(self.__name__, name)
        loader = self.__loader__
        if isinstance(loader, _LateLoader):
            loader.load(self)
        return getattr(self, name)


class _LateMapping(Mapping[str, Any]):
    """A mapping of a module that is loaded when the mapping is used."""

    def __init__(self, module: str, name: str):
        self._home = module, name

    def _mapping(self) -> Mapping[str, Any]:
        module, name = self._home
        found: Mapping[str, Any] = getattr(import_module(module), name)
        return found

    def __getitem__(self, key: str) -> Any:
        return self._mapping()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping())

    def __len__(self) -> int:
        return len(self._mapping())
