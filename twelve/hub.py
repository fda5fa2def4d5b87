"""One repository of a Hugging Face hub: what files it has, with their hashes, and fetching one, for `twelve pull`."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from twelve import __version__
from twelve.errors import InputError
from twelve.files import sha256

TIMEOUT = 20.0  # seconds without a byte
TRIES = 5  # in a row that bring none
MISSING = "pull needs the package huggingface_hub, version 2 or newer: pip install 'twelve[pull]'"


@dataclass(frozen=True)
class Remote:
    """A file of the repository. Large ones are known by their SHA-256, small ones by the SHA-1 of their git blob."""

    path: str
    size: int  # bytes
    sha256: str | None
    blob: str | None

    def __post_init__(self) -> None:
        """ValueError for what is no hash: `partial` makes the name of a file of it."""
        for stated, digits in ((self.sha256, 64), (self.blob, 40)):
            if stated is not None and not re.fullmatch(f"[0-9a-f]{{{digits}}}", stated):
                raise ValueError(f"the hash of {self.path!r} is {stated!r}")

    @property
    def name(self) -> str:
        return Path(self.path).name

    def partial(self, folder: Path) -> Path:
        """Where it lies until it is whole; another content has another place."""
        return folder / f".{self.name}.{(self.sha256 or self.blob)[:16]}.part"

    def is_right(self, path: Path) -> bool:
        """Whether `path` is this file, whole."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256:
            return sha256(path) == self.sha256
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % self.size)).hexdigest() == self.blob


class Hub:
    """The repository `name`. commit: of the revision, known after `files`; fetched: bytes that came over the network.

    InputError where huggingface_hub is not installed or too old, or the endpoint is no address.
    """

    def __init__(self, name: str, revision: str, endpoint: str | None) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read by the import
        try:
            import huggingface_hub.constants
            import huggingface_hub.errors
            import huggingface_hub.utils
        except ImportError:
            raise InputError(MISSING) from None
        if int(huggingface_hub.__version__.split(".")[0]) < 2:  # tokenizers brings one, of any age
            raise InputError(MISSING)
        try:
            huggingface_hub.utils.validate_repo_id(name)
        except ValueError as error:
            raise InputError(f"{name!r} is no name of a model: {str(error).splitlines()[0]}") from error
        self.endpoint = (endpoint or huggingface_hub.constants.ENDPOINT).rstrip("/")
        try:
            address = urlsplit(self.endpoint)
        except ValueError:
            address = urlsplit("")
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InputError(f"{self.endpoint!r} is no address: an endpoint is like https://huggingface.co")
        self.name, self.revision, self.commit, self.fetched = name, revision, "", 0
        self._package, self._host = huggingface_hub, address.netloc
        self._token = os.environ.get("HF_TOKEN") or None
        self._settings = {"token": self._token or False, "library_name": "twelve", "library_version": __version__}

    def files(self) -> dict[str, Remote]:
        """The files of the revision, by their paths. InputError where the endpoint does not state their hashes."""
        api = self._package.HfApi(endpoint=self.endpoint, **self._settings)
        try:
            info = api.model_info(self.name, revision=self.revision, files_metadata=True, timeout=TIMEOUT)
            self.commit = str(info.sha)
            listed = [
                Remote(one.rfilename, int(one.size), one.lfs and one.lfs["sha256"], one.blob_id)
                for one in info.siblings
                if one.rfilename.isprintable()  # messages name files, and a terminal obeys control characters
            ]
        except self._package.errors.HfHubHTTPError:  # some of which are ValueErrors
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = "does not answer as a Hugging Face hub does, with the sizes and hashes of files"
            raise InputError(f"{self.endpoint} {what} ({error!r})") from error
        if not all(remote.sha256 or remote.blob for remote in listed):
            raise InputError(f"{self.endpoint} states no hashes, so that nothing that it sends can be checked")
        return {remote.path: remote for remote in listed}

    def fetch(self, remote: Remote, path: Path, bar: tqdm | None) -> None:
        """Append to `path` what it lacks of the file. A connection that breaks is taken up again where it did."""
        url = self._package.hf_hub_url(self.name, remote.path, revision=self.commit, endpoint=self.endpoint)
        have, failures = path.stat().st_size if path.exists() else 0, 0
        with open(path, "ab") as file:
            while have < remote.size:
                before = have
                try:
                    for start, chunk in self._stream(url, have):
                        if start != have:  # the server cannot go on half-way
                            file.truncate(start)
                            self._count(bar, start - have)
                        file.write(chunk)
                        self._count(bar, len(chunk))
                        have = start + len(chunk)
                        if have > remote.size:
                            break
                except self._package.errors.HTTPError as error:
                    if failures == TRIES or isinstance(error, self._package.errors.HfHubHTTPError):
                        raise
                failures = 0 if have > before else failures + 1
                if failures > TRIES:
                    raise InputError(f"{url} ends after {have:,} of {remote.size:,} bytes")
                time.sleep(0.1 * 2**failures)
            file.flush()
            os.fsync(file.fileno())

    def _stream(self, url: str, have: int) -> Iterator[tuple[int, bytes]]:
        """Pieces of a file from byte `have` on, or from where the server begins, each with its place."""
        headers = self._package.utils.build_hf_headers(**self._settings) | {"accept-encoding": "identity"}
        headers |= {"range": f"bytes={have}-"} if have else {}
        session = self._package.utils.get_session()  # it keeps the token from addresses that a file is redirected to
        with session.stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            self._package.utils.hf_raise_for_status(response)
            place = have if response.status_code == 206 else 0
            for chunk in response.iter_bytes():
                yield place, chunk
                place += len(chunk)

    def _count(self, bar: tqdm | None, count: int) -> None:
        self.fetched += max(0, count)
        if bar is not None:
            bar.update(count)

    @contextmanager
    def explained(self, folder: Path) -> Iterator[None]:
        """One line, an InputError, for what can go wrong on the way from the hub into the folder."""
        errors = self._package.errors
        key = "the token in HF_TOKEN gives no access" if self._token else "put a token of yours into HF_TOKEN"
        again = "run the same command again, which goes on from here"
        try:
            yield
        except errors.GatedRepoError as error:
            where = f"{self.endpoint}/{self.name}"
            raise InputError(f"{self.name} is gated: accept its terms at {where}; {key}") from error
        except errors.RevisionNotFoundError as error:
            raise InputError(f"{self.name} has no revision {self.revision!r}") from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status not in (401, 403, 404):
                raise InputError(f"{self._host} answered {status} for {self.name}: {again}") from error
            what = f"{self._host} has no model {self.name}, or does not show it to everyone"
            raise InputError(f"{what} ({status}): check the name; if it is right, {key}") from error
        except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"no connection to {self._host} ({reason}): check the network, then {again}") from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(f"no space left in {folder}: free some, then {again}") from error
