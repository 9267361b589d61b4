"""Lengths of real rows: what random token ids are cut to, in races and on a GPU."""
