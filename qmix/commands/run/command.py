"""`qmix run`: a model by its name, from wherever it is to a chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qmix import hub, paths, render, streams
from qmix.commands.chat import run_chat
from qmix.commands.loading import Loading, known_speeds, load_engine
from qmix.commands.options import (
    Activations,
    Context,
    Device,
    DiscardSource,
    Draft,
    KvCache,
    Margin,
    MaxTokens,
    MinP,
    Offline,
    Penalty,
    Ram,
    Reasoning,
    Revision,
    Seed,
    Stop,
    System,
    Temp,
    Think,
    Threads,
    TopK,
    TopP,
    Vram,
    Yes,
    agreed,
    hub_access,
    margin_bytes,
    reasoning_effort,
    sampling,
    size_or_auto,
)
from qmix.commands.quantization import Flags
from qmix.commands.quantize.source import Source, fetch, fetched_name, say_left
from qmix.commands.run import library
from qmix.errors import CheckpointError, QmixError, UsageError
from qmix.models.consolidated import is_consolidated

MANIFEST = "qmix.json"


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id (org/name, org/name:Q4_K_M, @revision), a "
                                         "GGUF file, a checkpoint's folder, or a store.")],
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Answer this and exit, instead of a chat.",
                                               show_default=False)] = None,
    yes: Yes = False, revision: Revision = None, offline: Offline = False, discard_source: DiscardSource = False,
    format: Annotated[str | None, typer.Option("--format", show_default=False,
                                               help="How to quantize it, as of qmix quantize.")] = None,
    dense: Annotated[str | None, typer.Option("--dense", show_default=False, help="The same for attention.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Make the store again where its source has "
                                         "changed.")] = False,
    system: System = None, think: Think = None, reasoning: Reasoning = None,
    temp: Temp = 0.7, top_p: TopP = 0.95, top_k: TopK = 0, min_p: MinP = 0.0, repeat_penalty: Penalty = 1.0,
    seed: Seed = None, stop: Stop = None, max_tokens: MaxTokens = -1, ctx_size: Context = 0, threads: Threads = None,
    ram: Ram = "auto", margin: Margin = None, activations: Activations = "auto", draft: Draft = 7,
    kv_cache: KvCache = "bf16", device: Device = "auto", vram: Vram = "auto",
) -> None:
    """Chat with a model, whatever it is: fetched and quantized first where that was not done yet, after a question."""
    params = sampling(temp, top_p, top_k, min_p, repeat_penalty, seed, max_tokens, stop)
    effort = reasoning_effort(reasoning)
    if prompt is None and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("run needs a terminal to chat", 'for pipes and scripts: qmix run MODEL -y -p "..."')
    streams.check_stdout()
    how = Loading(ctx_size, threads, ram, margin, activations=activations, kv_cache=kv_cache, device=device, vram=vram,
                  mtp=draft > 0)
    folder = _store(model, Flags(format, dense), how, hub_access(revision, offline), yes, update,
                    discard_source)
    if prompt is None:
        run_chat(folder, folder.name, params, system, None, False, how, draft, think, effort)
        return
    from qmix.commands import oneshot

    with load_engine(folder, how) as engine:
        raise typer.Exit(oneshot.run(engine, prompt, params, system=system, draft=draft, thinking=think,
                                     effort=effort))


def _store(text: str, flags: Flags, how: Loading, access: hub.Access, yes: bool, update: bool,
           discard: bool) -> Path:
    """The store of that name, made now where there is none yet."""
    from qmix.gguf.header import is_gguf

    found = paths.locate(text, render.say)
    if isinstance(found, Path):
        if access.revision is not None or discard:
            flag = "--discard-source" if discard else f"--revision {access.revision}"
            raise UsageError(f"{flag}: {text} is here, not on the hub", f"drop {flag}")
        if (found / MANIFEST).is_file():
            if flags != Flags() or update:
                raise UsageError(f"{text}: is a store already", "drop --format, --dense and --update")
            return found
        if not is_gguf(found) and not (found / "config.json").is_file() and not is_consolidated(found):
            raise CheckpointError(f"{found}: neither a store nor a checkpoint nor a GGUF file",
                                  "name a hub id (org/name), a GGUF file, a checkpoint's folder or a store")
        name, source = None, str(found.resolve())
    else:
        name = found.at(access.revision)
        source = str(name)
    options = library.options_of(flags)
    entry = library.find(source, options, render.say)
    if entry is not None and entry.is_made:
        state = _state(name, Path(source), access)
        if state in (None, entry.state):
            if name is not None:
                say_left(name)
            return entry.folder
        what = f"{source}: has changed since {entry.folder} was made of it"
        if not update:
            render.say(f"{what}: this is still the old one (--update makes it again)")
            return entry.folder
        render.say(what)
    return _made(name, Path(source), source, flags, entry, how, access, yes, update, discard)


def _state(name: hub.HubName | None, path: Path, access: hub.Access) -> str | None:
    """What the source is now; None where that cannot be found out, which is said."""
    if name is None:
        return library.local_state(path)
    if access.offline or hub.is_commit(name.revision):
        return None
    try:
        return hub.newest_commit(name)
    except QmixError as e:
        render.say(f"{name}: not asked whether it has changed: {e.message}")
        return None


def _made(name: hub.HubName | None, path: Path, source: str, flags: Flags, entry: library.Entry | None, how: Loading,
          access: hub.Access, yes: bool, update: bool, discard: bool) -> Path:
    from qmix.commands.plan import report as planning
    from qmix.commands.run import proposal as proposals
    from qmix.commands.run.making import make_store

    found = None if name is None else hub.find(name, "either", render.say, access)
    if found is not None and found.is_store:
        if flags != Flags() or update or discard:
            raise UsageError(f"{name}: is a store already", "drop --format, --dense, --update and --discard-source")
        found.check_room(render.say)
        if found.missing and not yes:
            agreed("fetch it?")
        found.fetch(render.say)
        return found.path
    flags = proposals.choose_format(flags)
    looked_at = path if found is None else found.preview()
    said: list[str] = []
    machine = planning.Machine(size_or_auto("--ram", how.ram), margin_bytes(how.margin),
                               size_or_auto("--vram", how.vram),
                               gpu=planning.known_gpu(paths.if_any(paths.gpu_memory_file), render.say))
    proposal = proposals.propose(looked_at, _source_bytes(path) if found is None else found.nbytes, flags,
                                 how.ctx_size, how.kv_cache, machine, how.device,
                                 known_speeds(paths.if_any(paths.hardware_file), render.say), said.append)
    options = library.options_of(flags)
    stored = entry.name if entry is not None else library.free_name(source, name is not None, options, proposal.kind)
    out = paths.models_folder() / stored
    said = [line.replace(str(looked_at), source) for line in said]
    for line in (*said, *proposals.lines(proposal, found, out, proposals.load_rates(render.say), discard)):
        render.say(line)
    proposals.check_room(proposal, None if discard else found, out)
    if not yes:
        agreed("go on?")
    was_made = entry is not None and entry.is_made
    with library.own_name(stored, source, name is not None, options, proposal.kind, render.say) as (stored, now):
        new = library.Entry(stored, source, library.local_state(path) if found is None else found.commit or "",
                            options, name is not None)
        if now is not None and now.is_made and not (was_made and now == entry):
            return now.folder  # another run made it meanwhile
        if now is None or not now.is_made:
            library.save(new)
        with _source(path, found, access, discard) as source_now:
            make_store(source_now, new.folder, flags, how.threads,
                       partial(_say_new, source_now.path, source, frozenset(said)))
        library.save(new)
    return new.folder


def _say_new(path: Path, source: str, said: frozenset[str], line: str) -> None:
    """Say a line of the quantizer's unless it stood in the proposal."""
    if (line := line.replace(str(path), source)) not in said:
        render.say(line)


@contextmanager
def _source(path: Path, found: hub.Found | None, access: hub.Access, discard: bool) -> Iterator[Source]:
    """The source, fetched."""
    if found is None:
        yield Source(path)
    elif discard:
        with fetched_name(found.name, access, discard) as source:
            yield source
    else:
        yield fetch(found)


def _source_bytes(path: Path) -> int:
    """Of a local checkpoint's weights."""
    try:
        if path.is_file():
            return path.stat().st_size
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    except OSError:
        return 0
