"""`export_cost.py`: the steps it measures."""
