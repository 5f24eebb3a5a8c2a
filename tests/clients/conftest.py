"""One server for all clients."""

from tests.integration.conftest import bundled_server

__all__ = ["bundled_server"]
