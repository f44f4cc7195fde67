"""The likeliest next tokens of a text: python next_tokens.py STORE "TEXT" """

import sys

import qmix

store, text = sys.argv[1:]
with qmix.load(store, context=1024) as engine:
    logits = engine.session().prefill(engine.tokenizer.encode(text))
    likely, ids = logits.softmax(0).topk(5)
    for probability, token in zip(likely.tolist(), ids.tolist(), strict=True):
        print(f"{probability:6.1%}  {engine.tokenizer.decode([token])!r}")
