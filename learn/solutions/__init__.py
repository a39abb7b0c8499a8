"""Our solution of each step. The reader's files are made from these: course.py cuts the solutions out."""
