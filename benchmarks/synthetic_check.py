"""How a synthetic store routes: measured in one pass of its own model over a sequence of tokens.

The tokens go through as one block with the phase "decode", in which the model also says what it guesses
for the next layer; each record is read once, into one buffer, so that any store can be checked.

T tokens, H hidden, E experts, K chosen per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from synthetic_recipe import tokens_of
from torch import Tensor

from qmix.config import DTYPES, ExpertKey, Step
from qmix.forward.run_eager import Guesses
from qmix.forward.runner import Runner
from qmix.forward.weights import compute_dtype, load_dense
from qmix.kernels.table import KernelTable, select
from qmix.store import Store


@dataclass
class Recorder:
    """The experts callable: computes from one buffer, and keeps ids and guesses [T, K] of each layer."""

    store: Store
    kernels: KernelTable
    buffer: Tensor
    ids: list[Tensor] = field(default_factory=list)
    ahead: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, step: Step,
                 ahead: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        self.ids.append(ids.clone())
        if ahead is not None:
            self.ahead.append(ahead[:, 0].clone())  # of the next layer
        total = torch.zeros(x.shape, dtype=torch.float32)
        for expert in ids.unique().tolist():
            key = ExpertKey(layer, expert)
            self.store.read_record(key, self.buffer, verify=False)
            token, rank = (ids == expert).nonzero(as_tuple=True)
            out = self.kernels.expert(x[token], *self.store.expert(key, self.buffer))
            total.index_add_(0, token, out.float() * weights[token, rank, None])
        return total if wanted is None else total[wanted]


def route(store: Store, tokens: list[int]) -> Recorder:
    """Run `tokens` as one sequence through the model."""
    config, quant = store.model, store.quant
    kernels = select({quant.experts, quant.dense, DTYPES[config.dtype]}, {quant.block})
    recorder = Recorder(store, kernels, torch.empty(store.layout.record_bytes, dtype=torch.uint8))
    weights = load_dense(config, compute_dtype(config, quant), store.dense)
    model = Runner(config, weights, kernels, recorder, Guesses(1, config.top_k))
    count = len(tokens)
    model.forward(torch.tensor(tokens), torch.arange(count), [model.new_cache(count)], Step("decode", (0,) * count))
    return recorder


def figures(ids: Tensor, guess: Tensor | None) -> list[float]:
    """Percent: largest share of an expert, first choice repeated by the next token, first or second repeated,
    and of the chosen those that were guessed one layer early (NaN in the first layer)."""
    share = torch.bincount(ids.flatten()).max() / ids.numel()
    first = (ids[1:, 0] == ids[:-1, 0]).float().mean()
    both = (ids[1:, :, None] == ids[:-1, None, :]).any(2).any(1).float().mean()
    recall = float("nan") if guess is None else (ids[:, :, None] == guess[:, None, :]).any(2).float().mean()
    return [100 * float(value) for value in (share, first, both, recall)]


def report(folder: Path, kinds: list[str], count: int, seed: int) -> None:
    """A markdown table a sequence, a row a layer."""
    with Store.open(folder) as store:
        for kind in kinds:
            seen = route(store, tokens_of(kind, count, seed))
            guesses = [None, *seen.ahead]
            rows = [figures(ids, guess) for ids, guess in zip(seen.ids, guesses, strict=True)]
            print(f"\n{kind}, {count} tokens, percent\n\n| layer | largest share | first repeats | first or second "
                  "repeats | recall one layer early |\n|---|---|---|---|---|")
            for layer, row in enumerate(rows):
                print(f"| {layer} | " + " | ".join(f"{value:.1f}" for value in row) + " |")
            largest, means = max(row[0] for row in rows), torch.tensor(rows).nanmean(0).tolist()
            print(f"| all | {largest:.1f} | " + " | ".join(f"{value:.1f}" for value in means[1:]) + " |")
