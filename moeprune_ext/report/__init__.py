"""One self-contained page about a run, made of the files that the run left."""
