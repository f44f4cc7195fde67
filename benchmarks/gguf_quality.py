"""How far a quantized GGUF file is from the model that it was made of, in llama.cpp and carried into a store of qmix.

    python benchmarks/gguf_quality.py CHECKPOINT TEXT Q4_K_M.gguf Q8_0.gguf --peer-python PEER/bin/python

CHECKPOINT: the unquantized model in Hugging Face layout, which transformers computes in fp32 (a small one: it and all
its logits are held in memory); the files were quantized from it (llama-quantize). PEER: an environment with
llama-cpp-python. The same windows of the text go through all three; KL divergence of the next token's distribution from
the fp32 model's, in nats, the mean over all tokens. The difference between the programs is taken window by window, with
its standard error.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peers_report import table
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.engine import load
from qmix.quantize import quantize_checkpoint
from qmix.quantize.carried import carry_all
from qmix.tokenizer import load as load_tokenizer

# Run by the peer's interpreter: model, windows [W, T], where to put the logits [W, T, V].
PEER = """
import sys
import llama_cpp, numpy
model, windows, out = sys.argv[1:]
windows = numpy.load(windows)
llama = llama_cpp.Llama(model, n_ctx=windows.shape[1], n_batch=windows.shape[1], logits_all=True, verbose=False)
found = []
for window in windows:
    llama.reset()
    llama.eval(window.tolist())
    found.append(numpy.array(llama.scores[:len(window)], dtype=numpy.float32))
numpy.save(out, numpy.stack(found))
"""


def divergence(reference: Tensor, logits: Tensor) -> NDArray[np.float64]:
    """Mean of each window [W], of log-probabilities [W, T, V] and logits [W, T, V]."""
    other = torch.log_softmax(logits.double(), -1)
    return (reference.exp() * (reference - other)).sum(-1).mean(-1).numpy()


def of_transformers(checkpoint: Path, windows: NDArray[np.int32]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        found = [model(torch.tensor(window[None]), use_cache=False).logits[0] for window in windows]
    return torch.log_softmax(torch.stack(found).double(), -1)


def of_qmix(file: Path, folder: Path, windows: NDArray[np.int32], activations: str) -> Tensor:
    store = folder / file.stem
    if not store.exists():
        with Checkpoint.open(file) as checkpoint:
            quantize_checkpoint(checkpoint, store, carry_all(checkpoint, QuantConfig(), None))
    found = []
    with load(store, context=windows.shape[1], activations=activations, scoring=True) as engine:
        for window in windows:
            session = engine.session()
            found.append(torch.cat([*session.read(window.tolist())]).float())
            del session
    return torch.stack(found)


def of_llama(file: Path, folder: Path, windows: Path, python: str) -> Tensor:
    out = folder / "logits.npy"
    subprocess.run([python, "-c", PEER, str(file), str(windows), str(out)], check=True, stdout=sys.stderr)
    return torch.from_numpy(np.load(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--peer-python", required=True, help="interpreter with llama-cpp-python")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chars", type=int, default=400_000, help="of the text that the windows are spread over")
    args = parser.parse_args()
    with Checkpoint.open(args.checkpoint) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.folder, checkpoint.model.vocab)
    ids, first = tokenizer.encode(args.text.read_text()[:args.chars], bos=False), tokenizer.encode("", bos=True)
    inner = args.length - len(first)
    starts = [i * (len(ids) // args.windows) for i in range(args.windows)]
    windows = np.array([[*first, *ids[start:start + inner]] for start in starts], dtype=np.int32)
    reference, rows = of_transformers(args.checkpoint, windows), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "windows.npy", windows)
        for file in args.files:
            peer = divergence(reference, of_llama(file, folder, folder / "windows.npy", args.peer_python))
            for activations in ("int8", "bf16"):
                own = divergence(reference, of_qmix(file, folder, windows, activations))
                apart = own - peer
                error = apart.std(ddof=1) / len(apart) ** 0.5
                rows.append([file.name, activations, f"{peer.mean():.5f}", f"{own.mean():.5f}",
                             f"{apart.mean():+.5f} ± {error:.5f}"])
    print(f"{args.windows} windows of {args.length} tokens\n")
    print(table(["file", "activations of qmix", "llama.cpp", "qmix", "difference"], rows))


if __name__ == "__main__":
    main()
