"""What is exported: the trained model's weights, from a base and adapters, in fp32."""
