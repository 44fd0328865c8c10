"""Fine-tunes whose truth is known, because it was planted: one organism a file, in its `ORGANISM`."""
