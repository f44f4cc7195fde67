"""Terms that a newcomer to qmix asks about, each with its names and a few wordings of the answer.

The question is built from a name of the term ("what is {name}", "explain {name}", ...), see
`questions.py`. The answers are short, because the model that learns them is small.
"""

from __future__ import annotations

CONCEPTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("qmix", "this program", "this project", "the qmix program", "this tool", "this software"), (
        "qmix runs Mixture-of-Experts models on one ordinary machine. It stores the experts in 4 "
        "bits and brings each expert into fast memory only when it is needed.",
        "qmix is a program that runs large Mixture-of-Experts models, such as Mixtral, on one "
        "consumer machine. It quantizes the experts to 4 bits and pages them in and out.",
        "qmix lets a big model like Mixtral run at home. The experts are squeezed to 4 bits and "
        "loaded when the router asks for them.")),
    (("a Mixture-of-Experts model", "mixture of experts", "MoE", "a MoE", "a mixture of experts",
      "an MoE model", "Mixture-of-Experts", "moe models", "the mixture of experts idea"), (
        "A Mixture-of-Experts model has many small networks, called experts, in every layer. For "
        "each token a router picks a few of them, so only a part of the model has to work.",
        "In a Mixture-of-Experts model every layer has several experts, and a router chooses two "
        "of them for each token. The model is large, but the work per token is small.",)),
    (("an expert", "experts", "the experts", "expert networks", "an expert in a MoE"), (
        "An expert is a small feed-forward network. Every layer of Mixtral has eight of them, and "
        "each token is handled by two.", "An expert is one of the feed-forward networks in a "
        "layer. It has three weight matrices, called w1, w2 and w3.",)),
    (("the router", "a router", "routing", "the gate", "the gating network", "a gate", "router",
      "expert routing"), (
        "The router is a small matrix in every layer. It gives each expert a score for the current "
        "token, and the two experts with the best scores do the work.",
        "The router looks at each token and decides which experts should handle it. The choice is "
        "made anew in every layer.",)),
    (("top-2", "top 2", "top-2 routing", "top-k", "top k routing", "top two routing"), (
        "Top-2 means that each token is sent to the two experts with the best router scores. Their "
        "outputs are added, weighted by the scores.", "With top-2 routing only two experts per "
        "layer work on a token. The other six rest.",)),
    (("Mixtral", "Mixtral 8x7B", "the Mixtral model", "mixtral 8x7b", "8x7b"), (
        "Mixtral 8x7B is an open Mixture-of-Experts model by Mistral AI. It has 32 layers with "
        "eight experts each, about 47 billion weights, and uses about 13 billion for each token.",
        "Mixtral is a language model by Mistral AI with eight experts in every layer. Two of them "
        "work on each token.",)),
    (("quantization", "quantizing", "a quantized model", "quantisation", "weight quantization"), (
        "Quantization stores each weight with fewer bits. With 4 bits a model needs about a "
        "quarter of the memory, and the answers change only a little.",
        "To quantize means to round the weights to a few levels. With 4 bits there are sixteen "
        "levels, so the model becomes much smaller.",)),
    (("int4", "4-bit", "4 bit weights", "four bits", "4 bits", "int 4", "4-bit quantization"), (
        "Int4 means that each weight is stored as a whole number from 0 to 15, which takes 4 bits. "
        "A scale and a zero point turn it back into the real value.",
        "With int4 every weight takes only 4 bits, so two weights fit into one byte.",)),
    (("the group size", "group size", "a group", "groups", "a quantization group", "groupsize"), (
        "The group size says how many neighbouring weights share one scale and one zero point. "
        "Smaller groups are more exact, but they take more memory.",
        "Weights are quantized in groups, for example 64 at a time. Each group has its own scale "
        "and zero point.",)),
    (("the scale", "a scale", "scales", "the scales", "a scale factor"), (
        "The scale is the size of one step between two 4-bit levels. Each group of weights has its "
        "own scale.", "A scale turns the small whole numbers back into weights. Take the number, "
        "subtract the zero point and multiply by the scale.",)),
    (("the zero point", "a zero point", "zero points", "zero-point", "zeropoint"), (
        "The zero point is the level that stands for the weight zero. Each group of weights "
        "has its own.", "The zero point says which of the sixteen levels means zero. It is "
        "subtracted before the scale is applied.",)),
    (("hqq", "HQQ", "half-quadratic quantization", "half quadratic quantization", "the hqq method"),
     (
        "HQQ stands for half-quadratic quantization. It tunes the zero points so that the rounding "
        "error gets small, and it needs no sample data.", "HQQ is a way to choose good "
        "quantization values from the weights alone. It is quick and "
        "needs no calibration data.",)),
    (("a tier", "tiers", "the tiers", "memory tiers", "tier"), (
        "A tier is a level of memory where experts can live: the GPU, the main memory or the disk. "
        "The upper tiers are fast and small, the lower ones slow and large.",
        "Tiers are the levels of memory. An expert moves up to a faster tier when it is needed.",)),
    (("a slot", "slots", "the slots", "an expert slot", "slot"), (
        "A slot is a place in fast memory with room for exactly one expert. When all slots are "
        "full, an expert that was not used lately has to go.",
        "A slot holds one expert in fast memory. More slots mean fewer loads.",)),
    (("the cache", "a cache", "caching", "the expert cache", "an expert cache", "cache"), (
        "The cache keeps experts that were used lately in fast memory. If the router asks for one "
        "of them again, nothing has to be loaded.", "The expert cache holds the experts in use, "
        "so that most requests are answered without a load.",)),
    (("a cache hit", "cache hits", "the hit rate", "a cache miss", "a hit", "hit rate"), (
        "A hit means that the expert is already in fast memory. A miss means that it has to be "
        "loaded first, and that costs time. The hit rate is the share of hits.",)),
    (("prefetch", "prefetching", "a prefetch", "the prefetcher", "pre-fetching"), (
        "Prefetch means loading an expert before it is needed. While one layer computes, qmix "
        "guesses the experts of the next layer and starts to load them.",
        "Prefetching hides the waiting time: an expert that will probably be needed soon is loaded "
        "early.",)),
    (("router statistics", "the router statistics", "routing statistics", "expert statistics",
      "router stats"), (
        "Router statistics count how often each expert was chosen. They show which experts are "
        "popular and worth keeping in fast memory.", "The router statistics tell you which "
        "experts were used in each layer and how often.",)),
    (("paging", "expert paging", "offloading", "paging experts", "expert offloading"), (
        "Paging means that experts wait in slow memory or on disk and move into fast memory when "
        "the router picks them.", "With paging the whole model does not have to fit into fast "
        "memory. Experts are loaded when they are needed.",)),
    (("load balancing", "the balance loss", "the auxiliary loss", "balanced experts", "aux loss"), (
        "Load balancing keeps a router from sending everything to one expert. During training a "
        "small extra loss rewards an even use of all experts.",)),
    (("a token", "tokens", "a tokenizer", "the tokenizer", "token"), (
        "A token is a piece of text, often a word or a part of a word. A tokenizer cuts the text "
        "into tokens, and the model reads and writes one token at a time.",)),
    (("bf16", "bfloat16", "b float 16", "the bf16 format"), (
        "Bf16 is a number format with 16 bits. It has the range of a 32-bit number but fewer "
        "digits, and most models are published in it.",)),
    (("a layer", "layers", "the layers", "a transformer layer"), (
        "A layer is one step of the model. It has an attention part, and in Mixtral a set of eight "
        "experts. Mixtral has 32 layers.",)),
    (("attention", "the attention", "self-attention", "self attention"), (
        "Attention is the part of a layer that looks back at the earlier tokens. It is used for "
        "every token, so qmix keeps it in fast memory.",)),
    (("the kv cache", "KV cache", "a kv cache", "the key value cache"), (
        "The KV cache keeps the attention keys and values of the earlier tokens, so they need not "
        "be computed again. It grows with the length of the chat.",)),
    (("temperature", "the temperature", "sampling temperature"), (
        "The temperature says how freely the next token is chosen. At 0 the model always takes the "
        "likeliest token, and higher values make it more playful.",)),
    (("a language model", "an LLM", "llm", "large language models", "language models"), (
        "A language model is a program that has learned from text to guess the next token. Word by "
        "word, that becomes an answer.",)),
    (("a checkpoint", "the checkpoint", "checkpoints", "safetensors", "model weights"), (
        "A checkpoint is a folder with the weights of a model, its settings and its tokenizer. The "
        "weights are usually in safetensors files.",)),
    (("perplexity", "the perplexity", "ppl"), (
        "Perplexity measures how surprised a model is by a text. Lower is better. Compare it "
        "before and after quantization to see what was lost.",)),
    (("`qmix quantize`", "qmix quantize", "the quantize command", "quantize"), (
        "`qmix quantize SRC OUT` reads the checkpoint in the folder SRC, turns its experts into 4 "
        "bits and writes the result to the folder OUT.", "It makes a small copy of a model. Run "
        "`qmix quantize SRC OUT`, and the experts in OUT "
        "take only 4 bits per weight.",)),
    (("`qmix chat`", "qmix chat", "the chat command"), (
        "`qmix chat OUT` starts a chat with the quantized model in the folder OUT. It runs "
        "right in your terminal.",)),
    (("`qmix generate`", "qmix generate", "the generate command"), (
        "`qmix generate OUT -p \"Tell me a story\"` writes one answer to the prompt and stops.",)),
    (("`qmix show`", "qmix show", "the show command"), (
        "`qmix show OUT` prints what is inside a model folder, such as its layers, its experts and "
        "its size.",)),
    (("`qmix verify`", "qmix verify", "verify --deep", "qmix verify --deep", "the verify command"),
     (
        "`qmix verify OUT` checks that a quantized folder is complete. With `--deep` it also reads "
        "all the data and looks for errors.",)),
)

CONCEPT_QUESTIONS = (
    "What is {c}?", "What is {c}?", "What's {c}?", "whats {c}", "Explain {c}", "Explain {c} to me",
    "What does {c} mean?", "Can you explain {c}?", "Tell me about {c}", "How does {c} work?",
    "Define {c}", "{c}?", "I don't understand {c}", "What do you know about {c}?", "what are {c}",
    "What does {c} do?", "Could you tell me what {c} is?", "what exactly is {c}", "describe {c}",
    "Do you know what {c} is?", "I have never heard of {c}", "What is {c} good for?",
    "What is meant by {c}?", "please explain {c} in simple words", "why do I need {c}", "and {c}?",
    "tell me more about {c}", "Give me a short explanation of {c}", "so what is {c} then",
    "how do you explain {c} to a beginner", "i want to know about {c}", "help me understand {c}",
    "explain {c} like i'm five", "What does {c} mean in qmix?", "what is {c} in a model",
)
