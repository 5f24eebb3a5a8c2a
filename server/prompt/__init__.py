"""From a conversation to token ids: the chat template, tools in it, the tokenizer."""
