"""The self-contained example: an invented village, its texts, a tokenizer and a base to train."""
