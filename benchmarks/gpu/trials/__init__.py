"""One kernel on one set of inputs: ours, plain PyTorch, and the truth in fp64."""
