"""One file per paper; each holds the claims of that paper and what they measure."""
