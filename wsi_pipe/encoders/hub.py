"""Where weights lie: a local folder, the Hugging Face cache, or the Hugging Face hub."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_pipe.encoders.base import encoder_slug
from wsi_pipe.encoders.pins import recorded_revision
from wsi_pipe.errors import WeightsError

__all__ = [
    "WEIGHTS_FOLDER_VARIABLE",
    "HubState",
    "download",
    "find_local",
    "has_token",
    "hub_state",
    "obstacle",
    "reachable",
]

WEIGHTS_FOLDER_VARIABLE = "WSI_PIPE_WEIGHTS"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def find_local(
    name: str, repo_id: str, filenames: Sequence[str], *, repo_type: str = "model", revision: str = ""
) -> Path | None:
    """The weights' file if it lies on this machine, without any network.

    Looked for in this order: ``$WSI_PIPE_WEIGHTS/<slug>.safetensors`` (or .pt, .pth, .bin), ``$WSI_PIPE_WEIGHTS/<slug>/
    <file name on the hub>``, then the Hugging Face cache: the pinned commit, else ``revision``, else the newest.
    """
    folder = os.environ.get(WEIGHTS_FOLDER_VARIABLE)
    if folder:
        slug = encoder_slug(name)
        candidates = [Path(folder) / f"{slug}{suffix}" for suffix in SUFFIXES]
        candidates += [Path(folder) / slug / Path(filename).name for filename in filenames]
        for path in candidates:
            if path.is_file():
                return path
    if repo_id:
        from huggingface_hub import try_to_load_from_cache

        wanted = recorded_revision(repo_id, revision)
        for commit in [wanted, None] if wanted else [None]:
            for filename in filenames:
                found = try_to_load_from_cache(repo_id, filename, repo_type=repo_type, revision=commit)
                if isinstance(found, str):
                    return Path(found)
    return None


def has_token() -> bool:
    """True where a Hugging Face login is stored or in the environment."""
    from huggingface_hub import get_token

    return get_token() is not None


def download(
    name: str,
    repo_id: str,
    filenames: Sequence[str],
    *,
    gated: bool = False,
    repo_type: str = "model",
    revision: str = "",
    newest: bool = False,
) -> Path:
    """The weights' file from this machine or, where it is not there yet, from the hub.

    filenames: in order of preference; the first that the hub has is taken. revision: the commit to take where none is
    pinned, empty for the newest. newest: ask the hub for its newest, whatever lies here or is pinned. Raises
    WeightsError that says what is in the way: no network, no login, a licence not yet accepted, a file, revision or
    repository that does not exist.
    """
    found = None if newest else find_local(name, repo_id, filenames, repo_type=repo_type, revision=revision)
    if found is not None:
        return found
    if not repo_id:
        raise WeightsError(f"encoder {name} has no weights to download", remedy=_by_hand(name, ""))
    import huggingface_hub as hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    if not reachable():
        raise _no_network(name, page)
    commit = None if newest else recorded_revision(repo_id, revision) or None
    for filename in filenames:
        try:
            return Path(hub.hf_hub_download(repo_id, filename, repo_type=repo_type, revision=commit))
        except errors.RevisionNotFoundError as error:
            raise WeightsError(
                f"encoder {name}: {page} has no revision {commit} any more, which is the one that is pinned",
                remedy=f"look at what its authors changed, then accept the newest: wsi-pipe encoders --pin {name}",
            ) from error
        except errors.GatedRepoError as error:
            raise _gated(name, page) from error
        except errors.RepositoryNotFoundError as error:
            # The hub answers so for private and for some gated repositories when nobody is logged in.
            if gated or not has_token():
                raise _gated(name, page) from error
            raise WeightsError(f"encoder {name}: {page} does not exist", remedy=_by_hand(name, page)) from error
        except errors.LocalEntryNotFoundError as error:
            # So it reports also a server that answers, with an error, and keeps that as the cause.
            if _status(error.__cause__) is None:
                raise _no_network(name, page) from error
            raise _refused(name, page, error.__cause__ or error) from error
        except errors.EntryNotFoundError:
            continue
        except (errors.HfHubHTTPError, OSError) as error:
            raise _refused(name, page, error) from error
    raise WeightsError(f"encoder {name}: {page} has no file {' or '.join(filenames)}", remedy=_by_hand(name, page))


def obstacle(
    name: str,
    repo_id: str,
    filenames: Sequence[str],
    *,
    gated: bool = False,
    repo_type: str = "model",
    revision: str = "",
) -> WeightsError | None:
    """What would keep ``download`` from giving the file, as far as it shows without downloading; None if nothing."""
    if find_local(name, repo_id, filenames, repo_type=repo_type, revision=revision) is not None:
        return None
    if not repo_id:
        return WeightsError(f"encoder {name} has no weights to download", remedy=_by_hand(name, ""))
    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    if not reachable():
        return _no_network(name, page)
    return _gated(name, page) if gated and not has_token() else None


def reachable(timeout_s: float = 10.0) -> bool:
    """False where the hub's host does not answer, or HF_HUB_OFFLINE is set.

    huggingface_hub tries for half a minute before it gives up; this finds out at once. Behind a proxy the host itself
    cannot be asked, and True is returned.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=timeout_s):
            return True
    except OSError:
        return False


@dataclass(frozen=True)
class HubState:
    """How the hub would be reached. cache: where downloads lie. proxy: the host itself cannot be asked."""

    endpoint: str
    offline: bool
    proxy: bool
    token: bool
    cache: Path


def hub_state() -> HubState:
    """What the environment says of the hub, without any network."""
    from huggingface_hub import constants

    return HubState(
        constants.ENDPOINT,
        bool(constants.HF_HUB_OFFLINE),
        bool(urllib.request.getproxies()),
        has_token(),
        Path(constants.HF_HUB_CACHE),
    )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error holds, None where no server answered."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _refused(name: str, page: str, error: BaseException) -> WeightsError:
    if _status(error) in (401, 403):
        return _gated(name, page)
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return WeightsError(
        f"weights of encoder {name} cannot be downloaded from {page}: {first}",
        remedy=f"try again later, or {_by_hand(name, page)}",
    )


def _no_network(name: str, page: str) -> WeightsError:
    return WeightsError(
        f"weights of encoder {name} are not on this machine, and {page} cannot be reached",
        remedy=f"connect to the network (and unset HF_HUB_OFFLINE), or {_by_hand(name, page)}",
    )


def _gated(name: str, page: str) -> WeightsError:
    if has_token():
        return WeightsError(
            f"weights of encoder {name} are gated and this login has no access",
            remedy=f"accept the licence at {page} with the account of your token, then run again",
        )
    return WeightsError(
        f"weights of encoder {name} are gated and nobody is logged in",
        remedy=f"accept the licence at {page}, then run 'hf auth login' (or set HF_TOKEN)",
    )


def _by_hand(name: str, page: str) -> str:
    source = f"download the file from {page} elsewhere and " if page else ""
    return (
        f"{source}put it into the folder that {WEIGHTS_FOLDER_VARIABLE} names as {encoder_slug(name)}.safetensors "
        f"(or .pt, .pth, .bin), or give it as {name}@FILE"
    )
