"""The endpoints: one module for each group of URLs, and the OpenAPI document that describes them."""
