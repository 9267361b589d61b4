"""`race.py`: who races, the work they all do, what each process measures, who agrees."""
