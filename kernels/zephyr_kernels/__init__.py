"""Tensor operations that know torch and triton only. Empty until the native engine lands."""
