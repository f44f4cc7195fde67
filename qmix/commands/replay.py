"""`qmix replay`: recorded routing against other caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmix import paths, render
from qmix.errors import UsageError


def replay(
    trace: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Recorded with --trace.")],
    train: Annotated[list[Path] | None, typer.Option("--train", help="A trace of other prompts, whose statistics the "
                                                     "caches start with; may be repeated.", show_default=False)] = None,
    slots: Annotated[str | None, typer.Option("--slots", help="Slot counts, as 16,32; default: shares of all records.",
                                              show_default=False)] = None,
    cache_policy: Annotated[str | None, typer.Option("--cache-policy", help="Policies, as lru,lfu:64,static (lfu:64 "
                                                     "forgets half in 64 tokens).", show_default=False)] = None,
    quotas: Annotated[bool, typer.Option("--quotas", help="Also with a fixed share of slots for each layer.")] = False,
    model: Annotated[str | None, typer.Option("--model", help="The store, for bytes per token.",
                                              show_default=False)] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="table, md, csv, jsonl or json.")] = "table",
) -> None:
    """Replay recorded routing against caches of other sizes and policies, beside Belady's optimum."""
    from qmix.commands import routing
    from qmix.store import Store

    if output not in ("table", "md", "csv", "jsonl", "json"):
        raise UsageError(f"-o {output}: want table, md, csv, jsonl or json")
    record, identity = 0, ""
    if model is not None:
        with Store.open(paths.resolve(model, render.say, "store")) as store:
            sizes = [store.layout.record(key).nbytes for key in store.model.expert_keys]
            record, identity = round(sum(sizes) / len(sizes)), store.identity
            if len(store.layout.kinds) > 1:
                render.say(f"{store.path}: a mixed store; replayed as though any record fitted any slot")
    policies = [policy.strip() for policy in (cache_policy or "").split(",") if policy.strip()]
    report = routing.replay_report(trace, train or [], render.say, slots=_numbers(slots), policies=policies,
                                   quotas=quotas, record=record, store=identity)
    if output in ("json", "table"):
        print(render.document(report, as_json=output == "json"))
    else:
        print(render.table(report["policies"], output))


def _numbers(text: str | None) -> list[int]:
    try:
        values = [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        values = [0]
    if any(not 1 <= value <= 10**6 for value in values):
        raise UsageError(f"--slots {text}: want whole numbers, as 16,32")
    return values
