"""What flows between the steps and is kept as a file: data classes that are saved and loaded, nothing else."""
