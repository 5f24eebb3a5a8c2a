"""Answers that must have a form: JSON schemas, regexes, choices and tools as grammars, by a process of its own."""
