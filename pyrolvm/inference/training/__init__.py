"""`fit` and the loop that it runs."""
