"""Other people's servers, to measure ours beside them."""
