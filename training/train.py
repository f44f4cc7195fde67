"""Trains the demo model from nothing, on a CPU, within a given time.

The schedule follows the clock: the learning rate warms up, then falls along a cosine, and reaches
its end after `--minutes`. So a slower machine sees fewer tokens but always ends with a finished
model.

    python training/train.py --minutes 60 --out qmix/demo/checkpoint
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import experts
import torch
from checkpoint import write_checkpoint
from packing import COPY_WEIGHT, Batch, Batches
from tokenizer import ChatEncoder, train_tokenizer
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM

SAVE_EVERY = 600.0  # seconds
LOG_EVERY = 50  # steps


def new_model(vocab_size: int) -> MixtralForCausalLM:
    """A Mixtral with random weights: 6 layers, 8 experts, top-2, about 5.5 million weights."""
    config = MixtralConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=8,
        num_experts_per_tok=2, max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, sliding_window=None,
        tie_word_embeddings=True, router_aux_loss_coef=0.02, output_router_logits=True,
        initializer_range=0.05, bos_token_id=1, eos_token_id=2, pad_token_id=None, use_cache=False,
    )
    config._experts_implementation = experts.NAME
    config._attn_implementation = "eager"  # in rows this short faster than the flash kernel
    model = MixtralForCausalLM(config)
    prepare_to_copy(model)
    return model


@torch.no_grad()
def prepare_to_copy(model: MixtralForCausalLM) -> None:
    """Start with attention heads that pass on what they look at, and with quiet experts.

    The output projection of each head becomes the transpose of its value projection. As the
    embeddings are tied, a head that looks at a word then makes this word more likely, and all that
    is left to learn is where to look.
    """
    config = model.config
    model.model.embed_tokens.weight.normal_(std=config.hidden_size**-0.5)
    sharing = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        value = layer.self_attn.v_proj.weight  # (kv heads * head_dim, hidden)
        value.normal_(std=config.hidden_size**-0.5)
        heads = value.view(config.num_key_value_heads, config.head_dim, config.hidden_size)
        out = heads.repeat_interleave(sharing, dim=0).flatten(0, 1).t()
        layer.self_attn.o_proj.weight.copy_(0.3 * out)
        layer.mlp.experts.down_proj.mul_((2 * config.num_hidden_layers) ** -0.5)


@dataclass(frozen=True)
class Losses:
    """Scalars: the weighted mean cross-entropy in nats per token, the same for copied words alone,
    and the balance loss of the routers, which is 2.0 (the number of chosen experts) at best."""

    text: torch.Tensor
    copied: torch.Tensor
    balance: torch.Tensor


def losses(model: MixtralForCausalLM, batch: Batch) -> Losses:
    """One forward pass."""
    out = model(input_ids=batch.ids, position_ids=batch.positions, output_router_logits=True)
    weights = batch.weights[:, 1:].flatten()
    each = cross_entropy(out.logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(),
                         reduction="none")
    return Losses((each * weights).sum() / weights.sum(),
                  each.detach()[weights == COPY_WEIGHT].mean(), out.aux_loss)


def learning_rate(progress: float, peak: float) -> float:
    """The rate at a progress from 0 to 1: 2 % warm-up, then a cosine down to 2 % of the peak."""
    if progress < 0.02:
        return peak * (0.02 + progress / 0.02 * 0.98)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98)))
    return peak * (0.02 + 0.98 * fall)


def drill_share(progress: float) -> float:
    """The share of exercises among the batches: all at first, none after a quarter of the time."""
    return 1.0 if progress < 0.06 else max(0.0, 0.5 * (1 - progress / 0.25))


def optimizer_for(model: MixtralForCausalLM, rate: float) -> torch.optim.AdamW:
    """AdamW with decay on the matrices only; norms and embeddings keep their size."""
    decay = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), eps=1e-9, fused=True)


def fit(model: MixtralForCausalLM, encoder: ChatEncoder, args: argparse.Namespace,
        save: Callable[[], None]) -> None:
    """Train until the time is up or `--steps` are done; print progress and save now and then."""
    optimizer = optimizer_for(model, args.rate)
    model.train()
    start = saved = time.monotonic()
    mean, tokens = torch.zeros(2), 0
    source = Batches(encoder, args.seed + 1000, args.batch_tokens, args.length)
    for step in count(1):
        elapsed = time.monotonic() - start
        progress = elapsed / (60 * args.minutes)
        if args.steps:
            progress = max(progress, (step - 1) / args.steps)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.rate)
        batch = source.next(drill_share(progress))
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses(model, batch)
        (loss.text + model.config.router_aux_loss_coef * loss.balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += batch.ids.numel()
        new = torch.stack([loss.text.detach(), loss.copied])
        mean = new if step == 1 else 0.95 * mean + 0.05 * new
        if step % LOG_EVERY == 0 or step <= 5:
            print(f"step {step} min {elapsed / 60:.1f} loss {mean[0]:.4f} copied "
                  f"{mean[1]:.4f} balance {loss.balance:.3f} tokens {tokens / 1e6:.2f}M "
                  f"tokens/s {tokens / (time.monotonic() - start):.0f}", flush=True)
        if time.monotonic() - saved > SAVE_EVERY:
            save()
            saved = time.monotonic()
            print(f"saved at step {step}", flush=True)


def main() -> None:
    """Train the tokenizer and the model, and write the checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("qmix/demo/checkpoint"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: never)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--batch-tokens", type=int, default=1536)
    parser.add_argument("--length", type=int, default=384, help="tokens per row")
    parser.add_argument("--vocab", type=int, default=2048)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(args.out / "tokenizer.model", args.seed, args.vocab, conversations=20000)
    encoder = ChatEncoder(args.out / "tokenizer.model")
    model = new_model(args.vocab)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M weights", flush=True)
    fit(model, encoder, args, lambda: write_checkpoint(model, args.out, temperature=0.7))
    write_checkpoint(model, args.out, temperature=0.7)
    print("done", flush=True)


if __name__ == "__main__":
    main()
