"""What a run costs before it starts: bytes, seconds, and how to cut the work so that it fits."""
