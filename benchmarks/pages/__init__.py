"""`page.py`: a page's sections, words and pictures."""
