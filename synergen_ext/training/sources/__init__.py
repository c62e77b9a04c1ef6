"""Training data from files: one reader per format, a weighted mixture per task, a position that resumes exactly."""
