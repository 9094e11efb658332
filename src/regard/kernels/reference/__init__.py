"""Executors in plain torch: slow enough to be read, exact enough to be believed."""
