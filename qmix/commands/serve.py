"""`qmix serve`: a model over HTTP. serve/ has the server itself."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Annotated

import typer

from qmix import render
from qmix.commands.loading import Loading, load_engine
from qmix.commands.options import (
    Activations,
    CachePolicy,
    Context,
    Device,
    Draft,
    Exact,
    KvCache,
    Margin,
    MinP,
    ModelArgument,
    NoPrefetch,
    Penalty,
    Pin,
    Prefetch,
    Ram,
    Temp,
    Threads,
    TopK,
    TopP,
    Verify,
    Vram,
    model_folder,
    sampling,
)
from qmix.errors import UsageError

PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "llguidance")


def serve(
    model: ModelArgument = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; one that other machines reach needs "
                                      "--api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 = any that is "
                                      "free.")] = 8080,
    api_key: Annotated[list[str] | None, typer.Option("--api-key", help="A key that requests must have; may be "
                                                      "repeated. QMIX_SERVE_API_KEY keeps it out of the list of "
                                                      "processes.", show_default=False)] = None,
    alias: Annotated[list[str] | None, typer.Option("--alias", help="Another name for the model, for clients that ask "
                                                    "for a fixed one; may be repeated.", show_default=False)] = None,
    cors: Annotated[list[str] | None, typer.Option("--cors", help="Web pages of this origin (https://example.org) may "
                                                   "use the server; may be repeated.", show_default=False)] = None,
    allow_host: Annotated[list[str] | None, typer.Option("--allow-host", help="Another name that the Host header of a "
                                                         "request may have; may be repeated.",
                                                         show_default=False)] = None,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Requests that may wait; more are told to try again "
                                       "(429).")] = 64,
    sessions: Annotated[int, typer.Option("--sessions", min=1, help="Conversations whose KV cache is kept for their "
                                          "next turn, as far as the memory budget has room.")] = 4,
    grace: Annotated[float, typer.Option("--grace", min=0, help="Seconds that the answer in hand may still take after "
                                         "SIGTERM.")] = 30.0,
    temp: Temp = 0.7, top_p: TopP = 0.95, top_k: TopK = 0, min_p: MinP = 0.0, repeat_penalty: Penalty = 1.0,
    ctx_size: Context = 0, threads: Threads = None,
    ram: Ram = "auto", margin: Margin = None, cache_policy: CachePolicy = "auto", prefetch: Prefetch = "auto",
    no_prefetch: NoPrefetch = False, verify: Verify = "first", activations: Activations = "auto",
    draft: Draft = 7, kv_cache: KvCache = "bf16",
    device: Device = "auto", vram: Vram = "auto", pin: Pin = "auto", exact: Exact = False,
) -> None:
    """Serve a model over HTTP to clients of OpenAI's, Anthropic's and ollama's APIs. Needs pip install 'qmix[serve]'.

    Sampling flags are for requests that do not say it themselves. Ctrl-C or SIGTERM stops; the exit code is then 0."""
    check_packages()
    from qmix.serve.engine_thread import EngineThread, Options
    from qmix.serve.server import LOOPBACK, Server, is_loopback, listen, url_of
    from qmix.serve.service import ServerOptions

    defaults = sampling(temp, top_p, top_k, min_p, repeat_penalty, None, -1, None)
    keys = tuple(api_key or ())
    if not all(keys):
        raise UsageError("--api-key: got an empty one, want a text that is hard to guess")
    local = is_loopback(host)
    if not local and not keys:
        raise UsageError(f"--host {host}: other machines reach this address, and no --api-key is given",
                         "give an --api-key, or leave --host out")
    folder = model_folder(model)
    hosts = tuple(name.lower() for name in (*LOOPBACK, host.strip("[]"), *(allow_host or ()))) if local or allow_host \
        else ()
    options = ServerOptions(names=tuple(dict.fromkeys((folder.resolve().name, *(alias or ())))), keys=keys, hosts=hosts,
                            origins=tuple(cors or ()))
    how = Loading(ctx_size, threads, ram, margin, cache_policy, prefetch, no_prefetch, verify, activations, kv_cache,
                  None, device, vram, pin, exact)
    with listen(host, port) as bound:
        url = url_of(bound)
        engine = EngineThread(partial(load_engine, folder, how), Options(queue, sessions, draft))
        server = Server(engine, options, defaults, grace)

        def said(state: str) -> None:
            if state == "ready":
                render.say(f"{options.names[0]} is served at {url}; OpenAI clients: {url}/v1; Ctrl-C stops")
            server.engine_says(state)  # type: ignore[arg-type]

        engine.on_state(said)
        render.say(f"listening on {url}; loading the model")
        server.serve_on(bound)


def check_packages() -> None:
    """UsageError where the extra is not installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UsageError(f"qmix serve needs {' and '.join(missing)}", "pip install 'qmix[serve]'")
