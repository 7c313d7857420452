"""Looking inside: selections, gates and attention of a model on a text."""
