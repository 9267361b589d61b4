"""fp32 weights as the bytes of GGML's types."""
