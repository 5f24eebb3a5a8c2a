"""The HTTP process: OpenAI's API in front of an engine client. Texts and audio in, texts out; no torch.

Reading order, the way of a request: routes (thin), body (bytes, capped), schema and parameters (what is valid),
chat or completions (the decisions), media (clips), prompt over tokenizer (ids), sampling, generation over
detokenizer (text deltas), replies and streaming (the answer's bytes). errors holds every status; app puts all
together; lifecycle starts, drains and stops the process; __main__ is the command line.
"""
