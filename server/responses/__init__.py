"""The Responses API's own shapes, round the same generation: requests, items, named events."""
