"""Tools as all stages of a request know them: what may be called, and calls in the text of an answer."""
