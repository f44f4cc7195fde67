"""The same work by others, for gpu.py: transformers with accelerate's offload, bitsandbytes, llama.cpp.

Random weights of Mixtral's shapes in few layers, since all 32 would be 93 GB in bf16: of these the same share lies on
the card as of 32 would with `max_memory` of the budget, rounded up in the peer's favour, and the seconds of a token are
scaled by the layers (embedding and head then count too often, half a percent of it). Tokens are given one a step,
behind a short prompt.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_sections import emit
from offload_side import timed
from synthetic_recipe import Recipe, local_tokens
from torch import Tensor, nn

from qmix.hardware import physical_cores
from qmix.sizes import GIB

SIDE = Path(__file__).with_name("offload_side.py")
LAYERS = 32
PROMPT = 16
LLAMA_VRAM = (24, 12)  # GiB; it loads in seconds
BLOCK = 2**26  # random weights that are repeated to fill a model: drawing all of them would take minutes
Q4_LAYER, Q4_REST = 0.83, 1.2  # GB of a layer in llama.cpp's Q4_0, and of what else must be on the card


def on_card(budget: float, layer: float, rest: float, layers: int) -> tuple[int, int]:
    """(of 32, of `layers`) how many lie on the card: budget, bytes of one and of what else is there, in one unit.
    24 GB, layers of 2.9, 3.4 for the rest: 7 of 32, and so 1 of 4."""
    of_all = max(0, min(LAYERS, int((budget - rest) / layer)))
    return of_all, min(layers, -(-of_all * layers // LAYERS))


def mixtral(recipe: Recipe) -> nn.Module:
    """transformers' Mixtral in bf16, in host memory, of random weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    raw = {k: v for k, v in recipe.raw_config().items() if k not in ("architectures", "model_type", "torch_dtype")}
    rope = raw.pop("rope_theta")
    config = MixtralConfig(**raw, rope_parameters={"rope_type": "default", "rope_theta": rope})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = MixtralForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.to_empty(device="cpu")
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)  # its buffers are computed, not loaded
    noise = torch.randn(BLOCK).mul_(0.02).bfloat16()
    with torch.no_grad():
        for weight in model.parameters():
            _fill(weight.data.view(-1), noise)
    return model.eval()


def _fill(flat: Tensor, noise: Tensor) -> None:
    for piece in flat.split(len(noise)):
        piece.copy_(noise[:len(piece)])


def decode(model: nn.Module, device: str, task: dict[str, Any], warm: int) -> dict[str, Any]:
    """Tokens a second of one token a step."""
    from transformers import DynamicCache

    tokens = local_tokens(PROMPT + warm + task["timed"], task["seed"])
    cache = DynamicCache()

    @torch.inference_mode()
    def step(*ids: int) -> None:
        logits = model(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True).logits
        int(logits[0, -1].argmax())  # waits for it

    start = time.perf_counter()
    step(*tokens[:PROMPT])
    prompt = time.perf_counter() - start
    timed(step, tokens[PROMPT:PROMPT + warm], task["seconds"] / 6)
    done, seconds = timed(step, tokens[PROMPT + warm:], task["seconds"] / 3)
    return {"prompt_seconds": prompt, "tokens": done, "seconds": seconds}


def scaled(found: dict[str, Any], layers: int) -> dict[str, Any]:
    """With the rate that 32 layers would have."""
    rate = found["tokens"] / found["seconds"]
    return {**found, "layers": layers, "rate_measured": rate, "rate": rate * layers / LAYERS}


def transformers(task: dict[str, Any]) -> None:
    """transformers + accelerate, bf16: layers that do not fit lie in RAM and come up whole, for each token."""
    missing = _missing("transformers") or _missing("accelerate")
    if missing:
        emit(unavailable=missing)
        return
    recipe = Recipe(task["peer_layers"], hidden=task["hidden"], inner=task["inner"])
    start = time.perf_counter()
    model = mixtral(recipe)
    emit(made_seconds=time.perf_counter() - start, versions=_versions("transformers", "accelerate"))
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    outside = sum(p.nbytes for p in model.parameters()) - recipe.layers * layer
    # accelerate keeps room for the layer that comes; 1 GiB for activations and the context is little.
    of_all, here = on_card(task["vram"] * GIB, layer, outside + layer + GIB, recipe.layers)
    if task["stand_in"]:
        emit(row={"what": "peer", "peer": "transformers, on the CPU, without offload",
                  **scaled(decode(model, "cpu", task, 1), recipe.layers)})
        return
    from accelerate import dispatch_model

    torch.cuda.set_per_process_memory_fraction(min(1.0, task["vram"] * GIB / torch.cuda.mem_get_info()[1]))
    device_map: dict[str, Any] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    device_map |= {f"model.layers.{i}": 0 if i < here else "cpu" for i in range(recipe.layers)}
    start = time.perf_counter()
    model = dispatch_model(model, device_map=device_map, main_device=0)
    emit(dispatched_seconds=time.perf_counter() - start, device_map=device_map, on_card_of_32=of_all,
         on_card_of_measured=here)
    emit(row={"what": "peer", "peer": "transformers + accelerate, bf16", "on_card": of_all,
              **scaled(decode(model, "cuda", task, 1), recipe.layers)})


def bitsandbytes(task: dict[str, Any]) -> None:
    """transformers with bitsandbytes' 4-bit weights, from a checkpoint written here, in two layers. How many bytes it
    really takes says whether the experts were quantized: versions differ."""
    missing = _missing("transformers") or _missing("accelerate") or _missing("bitsandbytes")
    if missing:
        emit(unavailable=missing)
        return
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    recipe = Recipe(2, hidden=task["hidden"], inner=task["inner"])
    with tempfile.TemporaryDirectory(dir=task["work"]) as folder:
        model = mixtral(recipe)
        layer = sum(p.nbytes for p in model.model.layers[0].parameters())
        model.save_pretrained(folder)
        del model
        emit(versions=_versions("transformers", "accelerate", "bitsandbytes"))
        device = "cpu" if task["stand_in"] else "cuda"
        quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                   bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quant, dtype=torch.bfloat16,
                                                     device_map={"": "cpu" if task["stand_in"] else 0})
        stored = sum(p.nbytes for p in model.model.layers[0].parameters())
        emit(row={"what": "peer", "peer": "transformers + bitsandbytes nf4, all on the card",
                  "bytes_of_bf16": stored / layer, "fits": stored * LAYERS <= task["vram"] * GIB,
                  **scaled(decode(model.eval(), device, task, 2), recipe.layers)})


def llama(task: dict[str, Any]) -> None:
    """llama.cpp: whole layers on the card, the others computed by the CPU."""
    python = task["peer_python"]
    code = ("import llama_cpp, gguf, pathlib; print(int(llama_cpp.llama_supports_gpu_offload()), "
            "llama_cpp.__version__, pathlib.Path(gguf.__file__).parents[1])")
    try:
        asked = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as e:
        emit(unavailable=f"{python}: {e}")
        return
    if asked.returncode:
        emit(unavailable=f"{python}: {asked.stderr.strip().splitlines()[-1]}")
        return
    offloads, version, folder = asked.stdout.split(maxsplit=2)
    if offloads == "0" and not task["stand_in"]:
        emit(unavailable=f"llama-cpp-python {version} was built without a GPU")
        return
    sys.path.append(folder.strip())  # gguf is pure Python
    from synthetic_gguf import write_gguf

    layers = task["peer_layers"]
    with tempfile.TemporaryDirectory(dir=task["work"]) as folder:
        model = Path(folder) / "model.gguf"
        write_gguf(Recipe(layers, hidden=task["hidden"], inner=task["inner"]), model, "q4_0")
        emit(version=f"llama-cpp-python {version}")
        file = Path(folder) / "task.json"
        for vram in LLAMA_VRAM:
            of_all, here = on_card(vram * GIB / 1e9, Q4_LAYER, Q4_REST, layers)
            file.write_text(json.dumps({
                "model": str(model), "tokens": local_tokens(8 + 8 * task["timed"], task["seed"]), "warm": 8,
                "seconds": task["seconds"] / 10, "threads": task["threads"] or physical_cores(), "context": 512,
                "gpu_layers": here, "repack": True, "load_mode": "auto"}))
            done = subprocess.run([python, str(SIDE), "llama", str(file)], stdout=subprocess.PIPE, text=True,
                                  check=True)
            emit(row={"what": "peer", "peer": f"llama.cpp Q4_0, static placement, {vram} GB", "vram": vram,
                      "on_card": of_all, "on_card_of_measured": here,
                      **scaled(json.loads(done.stdout.strip().splitlines()[-1]), layers)})


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in packages if importlib.util.find_spec(package)}


RUN: dict[str, Callable[[dict[str, Any]], None]] = {
    "transformers": transformers, "bitsandbytes": bitsandbytes, "llama": llama}
