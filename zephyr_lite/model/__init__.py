"""The model: base, adapters, attention over the layout, the head. Tensors live here."""
