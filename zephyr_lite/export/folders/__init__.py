"""Model folders of safetensors: merged, or packed to four bits."""
