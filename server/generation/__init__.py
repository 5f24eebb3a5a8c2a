"""From token ids to the bytes of an answer: sampling, the engine's tokens as text, bodies and events."""
