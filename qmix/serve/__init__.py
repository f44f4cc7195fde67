"""A loaded model over HTTP: OpenAI's, Anthropic's and ollama's APIs, all of them translations of one request record.

    request.py        the record; prepare.py makes prompts and grammars of it, before it waits in the queue
    fair_queue.py     who is next
    engine_thread.py  the one thread that owns the engine; answering.py is one answer, sessions.py the KV caches
    events.py         what that thread tells; service.py hands it to the event loop
    openai/, anthropic/, ollama/   each API: a schema, a translation into the record, a translation of the events
    guard.py, body.py what a request must pass before any of it; app.py the routes; server.py uvicorn and signals

Threads. The event loop's thread reads requests and writes answers. Worker threads of the loop encode prompts, one at a
time. The engine thread loads the model and computes. The loop gives it Jobs through the queue, which has a lock, and
sets a job's Cancel; the engine thread gives the loop Events by call_soon_threadsafe. Nothing else is shared, but for
figures that are written whole.
"""
