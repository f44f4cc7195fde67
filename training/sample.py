"""Prints what the checkpoint answers to some fixed prompts, by way of `transformers`.

Run it on a checkpoint in the making to see what the model has learned so far.

    python training/sample.py qmix/demo/checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from corpus import Message
from tokenizer import ChatEncoder
from transformers import MixtralForCausalLM

# Each line is one conversation of user messages, parted by "|".
CHATS = (
    "tell me a story about a fox and a lantern|what was the fox's name|who helped her?|"
    "tell it again but shorter|another one please",
    "hi|who are you|what can you do",
    "Can you tell me a funny story about a penguin and a toaster in the library?|"
    "What happens next?|What is the moral?",
    "i want to hear about a dragon who lost his teapot|where did he find it|thanks",
    "write a bedtime story for my daughter about a rabbit called Mimi",
    "story about a platypus and a toothbrush",
    "what is qmix?|and how do i use it|do i need a gpu",
    "explain what an expert is|what is top-2|and the router?",
    "how much memory does mixtral need",
    "what does group size mean|what is hqq",
    "what does prefetch mean in qmix|whats a slot",
    "are you a real model|is my chat private",
    "what is the capital of france|2+2|write me some python code",
    "my name is Susan|tell me a story|what's my name",
    "How do I check that my files are ok?|license?",
    "could you maybe come up with a little tale where a bear and an owl find a key on a mountain",
)


def answer(model: MixtralForCausalLM, encoder: ChatEncoder, messages: list[Message],
           temperature: float) -> str:
    """The model's next answer; greedy at temperature 0."""
    prompt = torch.tensor([encoder.prompt(messages)])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=260,
        do_sample=temperature > 0, temperature=temperature or None,
        top_k=0 if temperature else None,
        eos_token_id=encoder.eos, pad_token_id=encoder.eos,
    )
    return encoder.decode(out[0, prompt.shape[1]:].tolist())


def main() -> None:
    """Hold every conversation once for each temperature."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = MixtralForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    encoder = ChatEncoder(args.checkpoint / "tokenizer.model")
    for temperature in args.temperatures:
        print(f"=== temperature {temperature}")
        for chat in CHATS:
            messages: list[Message] = []
            for question in chat.split("|"):
                messages.append(Message("user", question))
                messages.append(Message("assistant",
                                        answer(model, encoder, messages, temperature)))
                print(f"> {question}\n{messages[-1].content}")
            print(flush=True)


if __name__ == "__main__":
    main()
