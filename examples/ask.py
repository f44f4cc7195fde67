"""Ask one question: python ask.py STORE "QUESTION" """

import sys

import qmix

store, question = sys.argv[1:]
with qmix.load(store) as engine:
    for token in engine.generate([qmix.Message("user", question)], qmix.SamplingParams(max_tokens=200)):
        print(token.text, end="", flush=True)
print()
