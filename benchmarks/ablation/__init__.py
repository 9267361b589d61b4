"""`ablations.py`: who judges the answers, and the tables and figure made of the rows."""
