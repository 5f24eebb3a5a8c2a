"""The command `tympan`. Reading order: main (what the commands are and take), then a module for each of them.

main imports none of these before its command runs, and torch is imported by the engine's process alone: a `--help`
is there in a fraction of a second. endpoint is what the commands that talk to a server share.
"""
