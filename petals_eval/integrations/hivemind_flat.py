"""Give hivemind 1.1.12 the flat namespace back that petals 2.2.0 was written for.

petals says `from hivemind import PeerID, get_logger`; hivemind 1.1.12, the first release whose wheel runs today, keeps
such names in its submodules only. One line before `import petals` puts them back:

    import petals_eval.integrations.hivemind_flat

It may come before or after the first `import hivemind`, and where hivemind has the names already it changes nothing. A
Petals server starts processes of its own, which need the line, too: the environment that `scripts/petals_peer.sh` makes
has it in a .pth file, which Python runs at every start. Importing this module is cheap: hivemind itself is touched when
somebody imports it.
"""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["restore"]

# The packages that used to repeat the public names of everything below them.
FLAT = ("hivemind.utils", "hivemind.p2p", "hivemind.dht", "hivemind")
# Never part of the flat namespace: generated protobuf messages, command lines, and a library kept inside hivemind.
APART = ("hivemind.proto", "hivemind.hivemind_cli", "hivemind.utils.multiaddr")


def restore() -> None:
    """Set on hivemind's packages the public names of their submodules. A name that is there already is left alone."""
    for target in FLAT:
        package = importlib.import_module(target)
        for module in _modules_below(package):
            for name, value in _public(module):
                vars(package).setdefault(name, value)


def _modules_below(package: ModuleType) -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if found.name in APART:
            continue
        module = importlib.import_module(found.name)
        yield module
        if found.ispkg:
            yield from _modules_below(module)


def _public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Yield what `from module import *` would give, less the modules.

    Names that hivemind itself took from elsewhere are among them on purpose: `get_dht_time` is the standard library's
    `time.time`, `DHTExpiration` is `float`.
    """
    for name in getattr(module, "__all__", None) or list(vars(module)):
        value = getattr(module, name)
        if not name.startswith("_") and not isinstance(value, ModuleType):
            yield name, value


class _WaitForHivemind:
    """A finder that stands aside for all imports but the first one of hivemind, which `restore` then follows."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "hivemind":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_restore(module: ModuleType) -> None:
                execute(module)
                restore()

            spec.loader.exec_module = execute_and_restore  # type: ignore[method-assign]
        return spec


if "hivemind" in sys.modules:
    restore()
else:
    sys.meta_path.insert(0, _WaitForHivemind())
