"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464) over the tokens of one session, in torch: token by token,
or in chunks of CHUNK at the speed of matrix products.

Of a value head, with state S [K, V] before a chunk, G[t] the sum of the chunk's log decays up to token t:

    u[t] = beta[t] * (v[t] - exp(G[t]) S^T k[t] - sum over s < t of exp(G[t] - G[s]) (k[t] . k[s]) u[s])
    out[t] = exp(G[t]) S^T q[t] + sum over s <= t of exp(G[t] - G[s]) (q[t] . k[s]) u[s]
    S after = exp(G[-1]) S + sum over s of exp(G[-1] - G[s]) k[s] u[s]^T

The first line is a unit triangular system in u; its inverse is taken once a chunk (the WY form of Yang et al. 2024,
arXiv 2406.06484, section 3). Its entries are at most 1, since what lies between two tokens is a product of
contractions, so that the inverse does not enlarge roundings. Relative to outputs, values and states together, in the
norm, a result of n chunks lies within sqrt(n (2 K + 2 C + 8) / 3) 2^-24 of exact arithmetic on the same Rows: 1.9e-6
for 512 tokens of K = 128. tests/bounds.py derives it.

Chunks are counted from the first token of a call, and each is computed by itself: two calls that meet at a multiple of
CHUNK give the bits of one.

T tokens, C of a chunk, A key heads, R value heads of each, K and V their sizes. Value head h reads key head h // R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.kernels.ops import CHUNK

FORGOTTEN = -128.0  # a log decay behind which nothing is left in fp32; differences of lower ones could be inf - inf


@dataclass(frozen=True, slots=True)
class Rows:
    """Of T tokens: q, k [T, A, K] of length 1, q divided by sqrt(K) as well; v [T, A * R, V]; log_decay, beta
    [T, A * R]; all fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.q[part], self.k[part], self.v[part], self.log_decay[part], self.beta[part])


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def stepwise(rows: Rows, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(out [T, A * R, V], the state after); decay [T, A * R], exp(log_decay); state [A * R, K, V]."""
    each = rows.v.shape[1] // rows.k.shape[1]
    q, k = rows.q.repeat_interleave(each, 1), rows.k.repeat_interleave(each, 1)
    out = torch.empty_like(rows.v, memory_format=torch.contiguous_format)
    for t in range(len(q)):
        state = state * decay[t, :, None, None]
        wrong = rows.v[t] - (state * k[t, :, :, None]).sum(1)
        state = state + k[t, :, :, None] * (rows.beta[t, :, None] * wrong)[:, None]
        out[t] = (state * q[t, :, :, None]).sum(1)
    return out, state


def chunked(rows: Rows, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `stepwise`."""
    out = torch.empty_like(rows.v, memory_format=torch.contiguous_format)
    for at in range(0, len(out), CHUNK):
        part = slice(at, at + CHUNK)
        out[part], state = _chunk(rows[part], state)
    return out, state


def _chunk(rows: Rows, state: Tensor) -> tuple[Tensor, Tensor]:
    count, heads, key_dim = rows.k.shape
    each = rows.v.shape[1] // heads
    # Sums in fp64: a difference of two large ones counts where it is small. exp(-x) then errs by x exp(-x) ulps < 1.
    total = rows.log_decay.clamp(min=FORGOTTEN).double().cumsum(0).T.reshape(heads, each, count)
    later = torch.ones(count, count, dtype=torch.bool, device=state.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).float().masked_fill_(later, -torch.inf).exp_()
    since, until = total.float().exp()[..., None], (total[..., -1:] - total).float().exp()[..., None]
    beta = rows.beta.T.reshape(heads, each, count, 1)

    k, q = rows.k.transpose(0, 1).contiguous(), rows.q.transpose(0, 1).contiguous()  # [A, C, K]
    upright = k.mT.contiguous()
    past = torch.matmul(torch.cat((k, q), 1)[:, None], state.view(heads, each, key_dim, -1))  # [A, R, 2 C, V]
    known, read = past[..., :count, :], past[..., count:, :]
    system = (between * torch.bmm(k, upright)[:, None]).mul_(beta)  # what lies on or above its diagonal is not read
    inverse = torch.linalg.solve_triangular(system, torch.eye(count, device=state.device), upper=False,
                                            unitriangular=True)
    v = rows.v.transpose(0, 1).reshape(heads, each, count, -1)
    u = torch.matmul(inverse, (v - known * since) * beta)
    seen = between.mul_(torch.bmm(q, upright)[:, None])
    out = torch.matmul(seen, u).add_(read.mul_(since))
    kept = state.view(heads, each, key_dim, -1) * since[..., -1:, :]
    after = torch.matmul(upright[:, None], u.mul_(until)).add_(kept)
    return out.flatten(0, 1).transpose(0, 1), after.view(state.shape)
