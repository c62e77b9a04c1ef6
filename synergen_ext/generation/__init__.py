"""Generation: the slow oracle, and the front end that people call."""
