"""The HTTP process: OpenAI's API in front of an engine client. Texts and audio in, texts out; no torch.

A request's way through the rooms: http (bytes, capped), requests (what is valid), api (the endpoints, thin), media
(clips), prompt (ids), structured (grammars), generation (the engine's tokens as text, the answer's bytes). Beside
it: transcription and responses, endpoints with shapes of their own; tools, which all stages know; access (who is let
in); observe (what operators see). errors holds every status; app puts the rooms together; lifecycle starts, drains
and stops the process; __main__ is the command line. Rooms import each other one way (tests/test_architecture.py).
"""
