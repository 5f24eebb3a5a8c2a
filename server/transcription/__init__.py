"""A file of any length to its text: form, wording of the prompt, windows side by side, transcripts."""
