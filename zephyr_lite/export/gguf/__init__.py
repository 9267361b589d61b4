"""A GGUF file: what it must say of a model, in which types, and the file itself."""
