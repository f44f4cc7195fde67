"""What the hub's client raises, as one line of qmix's own."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from qmix.errors import CheckpointError, DoesNotFit, QmixError

AGAIN = "run the same command again: it goes on where it stopped"
BUSY = (429, 500, 502, 503, 504)  # answers after which a later try may succeed
LOGIN = "`hf auth login` or set HF_TOKEN"


def status_of(e: BaseException) -> int | None:
    """The HTTP status that an exception of the hub's client is about."""
    found = getattr(getattr(e, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def hub_error(where: str, e: Exception, offline: bool = False) -> QmixError:
    """where: the repository, with its revision."""
    from huggingface_hub import errors

    for own in _causes(e):
        if isinstance(own, QmixError):
            return own
    undelivered = f"{where}: the hub did not deliver it"
    if isinstance(e, RuntimeError) and "home directory" in str(e):
        return CheckpointError(f"{where.partition('@')[0]}: no home folder for the hub's cache: HOME is not set, and "
                               "this user has no entry in the system's list",
                               "set HF_HOME to a folder that can be written")
    if _caused_by(e, UnicodeEncodeError):  # of a header, and no other has what a user gave
        return CheckpointError(f"{undelivered}: HF_TOKEN, or the token of `hf auth login`, holds a character that no "
                               "token has", f"copy the token again, letters and digits alone: {LOGIN}")
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DoesNotFit(f"{where}: the disk is full: {e.filename or ''} {e.strerror}".replace("  ", " "),
                          f"make room, or set HF_HOME to a folder on another disk; then {AGAIN}")
    if isinstance(e, OSError) and e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CheckpointError(f"{where}: {e.filename or 'the cache'}: {e.strerror}",
                               "set HF_HOME to a folder that can be written")
    gone = offline or _caused_by(e, errors.OfflineModeIsEnabled)
    if gone and isinstance(e, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return CheckpointError(f"{where}: not in the hub's cache, or not all of it, and the hub must not be asked "
                               "(--offline, HF_HUB_OFFLINE)", "fetch it once without --offline")
    status = status_of(e) or status_of(e.__cause__ or e)
    if isinstance(e, errors.GatedRepoError):
        return CheckpointError(f"{undelivered}: access is granted on request only (gated)",
                               f"ask for access on the model's page, then {LOGIN}")
    if isinstance(e, errors.RevisionNotFoundError):
        return CheckpointError(f"{undelivered}: it has no such revision", "check the branch, tag or commit")
    if isinstance(e, errors.RepositoryNotFoundError) or status in (401, 403):
        return CheckpointError(f"{undelivered}: there is no such repository, or it is private ({status})",
                               f"check the name; for a private one {LOGIN}; a local folder needs no hub")
    if isinstance(e, errors.EntryNotFoundError) and status == 404:
        return CheckpointError(f"{undelivered}: a file is not there (404)", "check the name and the revision")
    if status in BUSY:
        return CheckpointError(f"{undelivered}: it answers {status}: too busy or broken for now", f"later {AGAIN}")
    return CheckpointError(f"{undelivered}: {reason(e)}",
                           "check the name, the network and `hf auth login`; a local folder needs no hub")


def reason(e: BaseException) -> str:
    """Its first line; of a line that only says that something failed, what it was."""
    if e.__cause__ is not None and str(e).startswith(("An error happened while", "Got: ")):
        e = e.__cause__
    text = str(e).strip()
    return text.splitlines()[0] if text else type(e).__name__


def _caused_by(e: BaseException, kind: type[BaseException]) -> bool:
    return any(isinstance(cause, kind) for cause in _causes(e))


def _causes(e: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that it comes of."""
    while e is not None:
        yield e
        e = e.__cause__
