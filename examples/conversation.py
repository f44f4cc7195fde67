"""Several turns over one KV cache: python conversation.py STORE "FIRST" "SECOND" ...

The session keeps what earlier turns left in its KV cache. A prompt that begins with the same ids reads only the rest.
"""

import sys
from itertools import takewhile

import qmix
from qmix.generate import generate

store, *questions = sys.argv[1:]
with qmix.load(store) as engine:
    session, turns = engine.session(), list[qmix.Message]()
    for question in questions:
        turns.append(qmix.Message("user", question))
        ids = engine.tokenizer.encode_chat(turns)
        session.trim(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(session.ids, ids, strict=False))))
        answer = list(generate(session, ids, qmix.SamplingParams(max_tokens=100), engine.tokenizer,
                               stops=engine.tokenizer.turn_stops))
        summary = answer[-1].summary
        assert summary is not None
        text = "".join(token.text for token in answer)
        turns.append(qmix.Message("assistant", text, summary.answer_ids))
        timings = summary.timings
        print(f"> {question}\n{text}\n({timings.cached_tokens} of {timings.prompt_tokens} tokens of the prompt were in "
              "the KV cache)")
