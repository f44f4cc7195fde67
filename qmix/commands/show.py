"""`qmix show`: what a store holds."""

from __future__ import annotations

from typing import Annotated

import typer

from qmix import render
from qmix.commands.options import Json, ModelArgument, model_folder


def show(model: ModelArgument = None,
         experts: Annotated[bool, typer.Option(
             "--experts", help="Also every expert's errors and, of a calibrated store, tokens.")] = False,
         json: Json = False) -> None:
    """Print a store's shape, formats, sizes and quantization errors."""
    from qmix.store import Store, describe, expert_rows

    with Store.open(model_folder(model)) as store:
        found = describe(store)
        if experts:
            found["all_experts"] = expert_rows(store.manifest)
        print(render.document(found, as_json=json))
