"""Data: rows become dialogues and preference pairs, and those become token ids."""
