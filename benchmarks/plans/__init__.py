"""`plan_memory.py` and the tests of the plan: trainings whose bytes are planned and counted."""
