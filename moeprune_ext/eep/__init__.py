"""EEP, arXiv 2407.00945: a task to a plan."""
