"""What every benchmark's rows have in common: where one comes from, and reading them back."""
