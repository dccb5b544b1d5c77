"""Where files come from: a local folder, or a repository of the hub. Both give one file at a time, when asked."""

import re
import socket
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit
from urllib.request import getproxies

from petals_eval.environment import local_path
from petals_eval.errors import CallerError
from petals_eval.validation import closest_beside

__all__ = ["Folder", "HubRepository", "Source", "first_found", "open_source"]

_KNOCK_SECONDS = 3.0
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Folder:
    """A folder on this machine. `error` is what a missing or unsafe file raises."""

    revision: str | None = None

    def __init__(self, path: Path, error: type[CallerError]):
        self.path = path
        self.name = path.resolve().name
        self.error = error

    def __str__(self) -> str:
        return str(self.path)

    def find(self, filename: str) -> Path | None:
        """Return the path of a file, or None if the folder has no such file."""
        path = self.path / _inside(filename, self.error, self)
        return path if path.is_file() else None

    def filenames(self) -> list[str]:
        """Return the names of the files in the folder itself, sorted."""
        return sorted(path.name for path in self.path.iterdir() if path.is_file())

    def for_transformers(self) -> tuple[str, dict[str, str | None]]:
        """Return the name and the options that transformers' `from_pretrained` takes for this source."""
        return str(self.path), {}


class HubRepository:
    """A repository of the Hugging Face hub. Only files asked for are downloaded, into the hub's cache.

    `revision` is the commit once a first file was found: all files then come from the same commit.
    """

    def __init__(
        self,
        name: str,
        revision: str | None,
        token: str | None,
        cache_dir: str | Path | None,
        error: type[CallerError],
    ):
        self.name = name
        self.revision = revision
        self.token = token
        self.cache_dir = None if cache_dir is None else str(cache_dir)
        self.error = error

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} at {self.revision}"

    def find(self, filename: str) -> Path | None:
        """Return the path of a file in the cache, downloaded if need be, or None if the repository has no such file."""
        import huggingface_hub
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

        try:
            found = huggingface_hub.hf_hub_download(
                self.name,
                _inside(filename, self.error, self),
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=not _hub_answers(),
            )
        except LocalEntryNotFoundError as error:  # also an EntryNotFoundError: the hub could not be asked
            raise self._unreachable(filename, error) from error
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._unreachable(filename, error) from error
        path = Path(found)
        commit = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
        if commit:
            self.revision = commit.group(1)
        return path

    def filenames(self) -> list[str]:
        """Return the names of the files at the top of the repository, sorted."""
        import huggingface_hub

        if not _hub_answers():
            raise self._unreachable("its list of files", ConnectionError())
        try:
            files = huggingface_hub.HfApi().list_repo_files(self.name, revision=self.revision, token=self.token)
        except (OSError, ValueError) as error:
            raise self._unreachable("its list of files", error) from error
        return sorted(name for name in files if "/" not in name)

    def for_transformers(self) -> tuple[str, dict[str, str | None]]:
        """Return the name and the options that transformers' `from_pretrained` takes for this source."""
        return self.name, {"revision": self.revision, "token": self.token, "cache_dir": self.cache_dir}

    def _unreachable(self, what: str, error: Exception) -> CallerError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not _hub_answers():
            reason = "it cannot be reached, and the cache of an earlier download does not have it"
        meant = closest_beside(local_path(self.name))
        told = [
            f"there is no {self.name} on this machine.{meant}",
            f"cannot get {what} of {self} from the hub: {reason}",
        ]
        if not meant and "/" in self.name:  # a hub name, and meant as one
            told.reverse()
        return self.error(
            "\n  ".join(told) + "\n"
            "  Expected a local folder or the name of a hub repository. Check the name and the revision, the token if "
            "the repository is gated or private, and the network."
        )


Source = Folder | HubRepository


def _hub_answers() -> bool:
    """Return whether somebody answers at the hub's address. Its own client asks for twenty seconds before it gives up.

    True where a proxy stands between, and where the client is told to stay offline: then it knows better.
    """
    import huggingface_hub

    address = urlsplit(huggingface_hub.constants.ENDPOINT)
    if huggingface_hub.constants.HF_HUB_OFFLINE or getproxies():
        return True
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=_KNOCK_SECONDS).close()
    except OSError:
        return False
    return True


def open_source(
    place: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    error: type[CallerError],
) -> Source:
    """Return the folder at the path `place`, or the hub repository of that name. Nothing is read yet.

    Raises `error` if it is neither.
    """
    place, path = str(place), local_path(place)
    if path.is_dir():
        return Folder(path, error)
    if not _HUB_NAME.fullmatch(place):
        raise error(
            f"no folder {place}, and that is not a hub name (owner/name) either.{closest_beside(path)} Check the path."
        )
    return HubRepository(place, revision, token, cache_dir, error)


def first_found(source: Source, filenames: Iterable[str]) -> Path | None:
    """Return the first of these files that the source has.

    Without a network the hub's cache cannot tell a file that is missing from one not fetched yet: the others are tried
    before that becomes an error.
    """
    problem: CallerError | None = None
    for filename in filenames:
        try:
            path = source.find(filename)
        except source.error as error:
            problem = problem or error
            continue
        if path is not None:
            return path
    if problem is not None:
        raise problem
    return None


def _inside(filename: str, error: type[CallerError], source: object) -> str:
    """Return `filename` if it lies inside the source: an index file, which others wrote, must not lead elsewhere."""
    path = PurePosixPath(filename)
    if path.is_absolute() or ".." in path.parts:
        raise error(f"{source} names a file outside itself: {filename}. Expected names of files beside the index.")
    return filename
