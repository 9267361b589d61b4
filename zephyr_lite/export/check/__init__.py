"""Is the file the trained model?"""
