"""From a base and an adapter to files one can take home: GGUF, safetensors, Modelfile; verified."""
