"""The program's version: read here and, by setuptools, for the package."""

from typing import Final

VERSION: Final = "0.1.0"
