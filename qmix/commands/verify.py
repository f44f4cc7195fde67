"""`qmix verify`: whether a store is whole."""

from __future__ import annotations

from typing import Annotated

import typer

from qmix import render
from qmix.commands.options import ModelArgument, model_folder
from qmix.errors import StoreError


def verify(model: ModelArgument = None,
           deep: Annotated[bool, typer.Option("--deep", help="Also read every byte and check its checksum.")] = False,
           ) -> None:
    """Check a store; exit 4 names what is damaged."""
    from qmix.store import Store

    folder = model_folder(model)
    with Store.open(folder) as store, render.byte_bar("verify") as progress:
        problems = store.verify(deep, progress)
    for problem in problems:
        render.say(f"damaged: {problem}")
    if problems:
        raise StoreError(f"{folder}: {len(problems)} of its parts are damaged", "quantize it again, or copy it again")
    depth = "every checksum agrees" if deep else "structure agrees; --deep also checks every byte"
    print(f"{folder}: {depth}")
