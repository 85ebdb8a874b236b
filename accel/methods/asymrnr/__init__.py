"""AsymRnR: the method (`asymrnr`), one run of it (`reducer`), and its parts: schedule, budget, matching, correction."""
