"""Other models: their FFNs found and swapped, their checkpoints read and written."""
