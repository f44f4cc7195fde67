"""The gated delta net of one layer: a token through the native kernel, GB/s of its state beside the rate at which
memory is read; and a prompt in chunks beside the same token by token, and beside the layer's projections.

    python benchmarks/delta_net.py                            # Qwen3.6-35B-A3B's heads, 512 tokens
    python benchmarks/delta_net.py -t 1 --cpu-time            # where other programs run
    python benchmarks/delta_net.py --heads 16,64 --tokens 128

States of several layers are larger together than the last cache. What is compared alternates; ratios are taken within a
turn, then their median. A state's bytes count once as read and once as written.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from cpu_turns import bare_read, bytes_of, clock_of, level_of, make_parser, ratios, take_turns
from peers_report import cell, table

from qmix.hardware.cores import cpu_model
from qmix.kernels import native, ops
from qmix.kernels.delta_rule import Rows, chunked, stepwise, unit
from qmix.kernels.layer import TORCH
from qmix.kernels.native import jobs
from qmix.kernels.op import FEW
from qmix.kernels.table import select
from qmix.quantize.methods import quantize
from qmix.sizes import MatrixSpec
from qmix.spec import DeltaNet, Norm

Works = dict[str, Callable[[], object]]


def inputs_of(d: DeltaNet, tokens: int) -> list[torch.Tensor]:
    """q, k, v, a, b; a_log, dt_bias."""
    random = torch.Generator().manual_seed(0)
    keys, values = d.key_heads * d.key_dim, d.value_heads * d.value_dim
    rows = [torch.randn(tokens, width, generator=random) for width in (keys, keys, values, *[d.value_heads] * 2)]
    return rows + [torch.randn(d.value_heads, generator=random) for _ in range(2)]


def token_works(d: DeltaNet, level: str, threads: int, layers: int) -> tuple[Works, Callable[[], object]]:
    """A token through so many layers; a bare read of their states."""
    own = native.NativeLayerOps(level)
    own.threads = threads
    *rows, a_log, dt_bias = inputs_of(d, 1)
    kept = [torch.randn(d.value_heads, d.key_dim, d.value_dim) for _ in range(2 * layers)]
    out = torch.empty(1, d.value_heads * d.value_dim)
    packed = [jobs.delta(d, now, after, [*rows, a_log, dt_bias], out)
              for now, after in zip(kept[::2], kept[1::2], strict=True)]

    def token(*_: object) -> None:
        for job in packed:
            own._library.qmix_delta_rule(own._number, job, threads)

    reads = [now.view(-1).view(torch.float64) for now in kept[::2]]
    return {"token": partial(token, kept, rows, a_log, dt_bias, out)}, bare_read(reads, threads)


def prompt_works(d: DeltaNet, tokens: int, hidden: int) -> Works:
    *rows, a_log, dt_bias = inputs_of(d, tokens)
    q, k, v, a, b = rows
    state = torch.zeros(d.value_heads, d.key_dim, d.value_dim)
    log_decay = -a_log.exp() * torch.nn.functional.softplus(a + dt_bias)
    whole = Rows(unit(q.view(tokens, d.key_heads, -1)) * d.key_dim**-0.5, unit(k.view(tokens, d.key_heads, -1)),
                 v.view(tokens, d.value_heads, -1), log_decay, b.sigmoid())
    kernels, x = select({"int4", "bf16"}, say=print), torch.randn(tokens, hidden).bfloat16()
    values = d.value_heads * d.value_dim
    wide = quantize(torch.randn(2 * q.shape[1] + 2 * values, hidden), MatrixSpec(
        "int4", 2 * q.shape[1] + 2 * values, hidden, group_size=64, block=64), "rtn")
    back = quantize(torch.randn(hidden, values), MatrixSpec("int4", hidden, values, group_size=64, block=64), "rtn")
    heads = torch.randn(tokens, values).bfloat16()
    return {"token by token": lambda: stepwise(whole, log_decay.exp(), state),
            "in chunks": lambda: chunked(whole, state),
            "whole Delta": lambda: TORCH.delta(d, a_log, dt_bias, state, *rows),
            "projections": lambda: (kernels.linear(x, wide), kernels.linear(heads, back))}


def main() -> None:
    parser = make_parser(__doc__, "states")
    parser.add_argument("--heads", default="16,32", metavar="KEYS,VALUES")
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=512, help=f"of a prompt, more than {FEW}")
    args = parser.parse_args()
    level, clock, nbytes = level_of(parser, args), clock_of(parser, args), bytes_of(args)
    heads = [int(word) if word.isdigit() and int(word) else 0 for word in args.heads.split(",")]
    if len(heads) != 2 or 0 in heads or heads[1] % heads[0] or args.tokens <= FEW:
        parser.error(f"--heads {args.heads} --tokens {args.tokens}: want VALUES a multiple of KEYS, over {FEW} tokens")
    d = DeltaNet(heads[0], heads[1], args.size, args.size, 4, Norm(1e-6))
    layers = max(2, nbytes // (4 * heads[1] * args.size**2))
    print(f"{cpu_model(Path('/'))}; level {level}, {heads[0]} key heads, {heads[1]} value heads of {args.size}; chunks "
          f"of {ops.CHUNK}\n")
    rows = []
    with torch.inference_mode():
        for threads in args.threads:
            works, read = token_works(d, level, threads, layers)
            took, reads = take_turns(works, read, args.turns, clock)
            moved = 2 * 4 * layers * heads[1] * args.size**2
            rates = [moved / s / 1e9 for s in took["token"]]
            rows.append([str(threads), f"{1e6 * statistics.median(took['token']) / layers:.0f}", cell(rates),
                         cell([moved / 2 / s / 1e9 for s in reads])])
        print(table(["threads", "us a token and layer", "GB/s, read and written", "read GB/s"], rows) + "\n")
        rows = []
        for threads in args.threads:
            torch.set_num_threads(threads)
            took, _ = take_turns(prompt_works(d, args.tokens, args.hidden), lambda: None, args.turns, clock)
            rows += [[str(threads), name, cell([1e3 * s for s in each]), ratios(took["token by token"], each),
                      ratios(each, took["projections"])] for name, each in took.items()]
    print(table(["threads", f"{args.tokens} tokens", "ms", "times token by token", "of the projections"], rows))


if __name__ == "__main__":
    main()
