"""The hub's library names files in the cache by their checksums, as the server sends them, unchecked: one with a slash
in it would lead out of the cache, to a file of a stranger's choice."""

from __future__ import annotations

from typing import Any

from qmix.errors import CheckpointError

HEADERS = ("X-Linked-Etag", "ETag")


def check_etags() -> None:
    """From now on have the library's client refuse such answers, with CheckpointError. Once in a process."""
    import huggingface_hub
    from huggingface_hub.utils import _http

    make = _http._GLOBAL_CLIENT_FACTORY
    if isinstance(make, _Checked):
        return
    huggingface_hub.set_client_factory(_Checked(make))


class _Checked:
    """Makes clients as `make` does, with the check; the library makes a new one after some faults."""

    def __init__(self, make: Any):
        self._make = make

    def __call__(self) -> Any:
        client = self._make()
        client.event_hooks = {**client.event_hooks, "response": [*client.event_hooks["response"], _check]}
        return client


def _check(response: Any) -> None:
    if response.request.method != "HEAD":  # what the library asks for checksums; of others' it takes none
        return
    for header in HEADERS:
        tag = response.headers.get(header, "").removeprefix("W/").strip('"')
        if tag in (".", "..") or {"/", "\\", "\0"} & {*tag}:
            raise CheckpointError(f"{response.request.url.path}: the hub's checksum is no name of a file: {tag!r:.80}",
                                  "the hub, or what is between, is broken or hostile: check HF_ENDPOINT and the proxy")
