"""`gpu_suite.py`: its clock, its rows, models and steps at 7B, and its questions, a file each."""
