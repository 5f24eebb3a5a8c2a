"""Tests mirror the folders: tests/engine/ for engine/, and so on. A package, so that names may repeat."""
