"""What may be asked: the bodies that are accepted, as strict models, and what is refused by name."""
